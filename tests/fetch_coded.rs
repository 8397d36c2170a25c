//! The fetcher on compressed layers: the plain file's bytes, whatever the coding, whatever the server does; and never a byte
//! that is not what an index vouches for.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tarblk::bench::origin::{Fault, Origin, at_random};
use tarblk::fetch::store::Store;
use tarblk::fetch::{
    Blob, CHUNK_BYTES, ChunkCheck, Coded, FetchError, FetchOptions, Fetcher, FileLayer, HttpLayer, LayerRange,
    LayerSource, Located, Slice, WholeDigests, WindowPlace, Windows,
};
use tarblk::layer::{Coding, Indexer, Spans};
use tarblk::units::{LayerId, TarOffset, TarRange};

const SIZE: usize = 5_000_321;
const SPACING: u64 = 200_000;

fn u(n: usize) -> u64 {
    u64::try_from(n).unwrap()
}

/// Something between text and noise: compresses to about a third.
fn content(len: usize) -> Vec<u8> {
    let mut state = 0x2545_F491_4F6C_DD1Du64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bytes = Vec::with_capacity(len + 64);
    while bytes.len() < len {
        match random() % 5 {
            0 => bytes.extend_from_slice(&random().to_le_bytes()),
            1 if bytes.len() > 40_000 => {
                let from = bytes.len() - 1 - usize::try_from(random() % 30_000).unwrap();
                let again = bytes[from..bytes.len().min(from + 50)].to_vec();
                bytes.extend_from_slice(&again);
            }
            _ => bytes.extend_from_slice(b"a line that comes often\n"),
        }
    }
    bytes.truncate(len);
    bytes
}

/// Runs a compressor as a filter.
fn through(command: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{} is needed: {error}", command[0]));
    let mut stdin = child.stdin.take().unwrap();
    let input = input.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap().unwrap();
    assert!(output.status.success());
    output.stdout
}

/// One of the ways in which layers are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// One member.
    Gzip,
    /// Many members.
    Members,
    /// Many frames.
    Frames,
    /// One frame: it cannot be entered in the middle.
    OneFrame,
}

const WAYS: [Way; 4] = [Way::Gzip, Way::Members, Way::Frames, Way::OneFrame];

/// A layer, compressed and indexed.
struct Made {
    tar: Arc<Vec<u8>>,
    blob: Arc<Vec<u8>>,
    spans: Spans,
}

fn indexed(coding: Coding, blob: &[u8]) -> Spans {
    let mut indexer = Indexer::new(coding, SPACING);
    for piece in blob.chunks(100_000) {
        indexer.feed(piece, &mut |_| {}).unwrap();
    }
    indexer.finish().unwrap()
}

fn make(way: Way) -> Made {
    make_of(way, content(SIZE))
}

fn make_of(way: Way, tar: Vec<u8>) -> Made {
    let pieces = |command: &[&str]| tar.chunks(333_333).flat_map(|piece| through(command, piece)).collect();
    let (coding, blob): (_, Vec<u8>) = match way {
        Way::Gzip => (Coding::Gzip, through(&["gzip", "-6n"], &tar)),
        Way::Members => (Coding::Gzip, pieces(&["gzip", "-6n"])),
        Way::Frames => (Coding::Zstd, pieces(&["zstd", "-q", "-c"])),
        Way::OneFrame => (Coding::Zstd, through(&["zstd", "-q", "-c"], &tar)),
    };
    let spans = indexed(coding, &blob);
    assert_eq!(spans.table.seekable(), way != Way::OneFrame);
    Made {
        tar: Arc::new(tar),
        blob: Arc::new(blob),
        spans,
    }
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

impl Made {
    fn coded(&self) -> Coded {
        Coded {
            table: self.spans.table.clone(),
            windows: Windows::Memory(Arc::new(self.spans.windows.clone())),
        }
    }

    fn check(&self) -> ChunkCheck {
        let chunk = usize::try_from(CHUNK_BYTES).unwrap();
        let digests: Vec<[u8; 32]> = self.tar.chunks(chunk).map(sha256).collect();
        ChunkCheck::new(move |index, bytes| digests.get(usize::try_from(index).unwrap()) == Some(&sha256(bytes)))
    }

    fn whole(&self) -> WholeDigests {
        WholeDigests {
            blob: Some(sha256(&self.blob)),
            tar: Some(sha256(&self.tar)),
        }
    }

    fn over_http(&self, origin: &Origin) -> LayerSource {
        let http = HttpLayer {
            url: origin.url("/blob"),
            size: u(self.blob.len()),
            validator: None,
            headers: Vec::new(),
        };
        LayerSource {
            coding: Some(self.coded()),
            digests: Some(self.check()),
            whole: self.whole(),
            identity: Some("sha256:test".to_owned()),
            ..Blob::Http(http).into()
        }
    }

    fn in_a_file(&self, path: &Path) -> LayerSource {
        std::fs::write(path, self.blob.as_slice()).unwrap();
        let file = FileLayer {
            path: path.to_owned(),
            file: File::open(path).unwrap().into(),
            size: u(self.blob.len()),
        };
        LayerSource {
            coding: Some(self.coded()),
            digests: Some(self.check()),
            whole: self.whole(),
            ..Blob::File(file).into()
        }
    }

    fn served(&self) -> Origin {
        let origin = Origin::start().unwrap();
        origin.serve_blob("/blob", self.blob.as_slice());
        origin
    }
}

fn range(start: usize, len: usize) -> LayerRange {
    LayerRange {
        layer: LayerId(0),
        range: TarRange::new(TarOffset(u(start)), u(len)),
    }
}

fn joined(slices: &[Slice]) -> Vec<u8> {
    slices.iter().flat_map(|slice| slice.to_vec()).collect()
}

fn quick() -> FetchOptions {
    FetchOptions {
        connect_deadline: Duration::from_millis(500),
        head_deadline: Duration::from_millis(500),
        stall_deadline: Duration::from_millis(500),
        slowest_body: 16 << 10,
        deadline: Duration::from_secs(60),
        memory_bytes: 1 << 20,
        ..FetchOptions::default()
    }
}

fn start(layer: LayerSource, options: FetchOptions) -> Fetcher {
    Fetcher::start(vec![layer], options, None).unwrap()
}

fn read(fetcher: &Fetcher, start: usize, len: usize) -> Result<Vec<u8>, FetchError> {
    Ok(match fetcher.locate(range(start, len)) {
        Located::Memory(slices) => joined(&slices),
        Located::File(fd, at) => {
            let path = PathBuf::from(format!("/proc/self/fd/{fd}"));
            let mut bytes = vec![0; len];
            std::os::unix::fs::FileExt::read_exact_at(&File::open(path).unwrap(), &mut bytes, at).unwrap();
            bytes
        }
        Located::Elsewhere => joined(&fetcher.read_blocking(vec![range(start, len)])?),
    })
}

/// Four readers at random places.
fn hammer(fetcher: &Fetcher, tar: &Arc<Vec<u8>>, reads: usize) {
    let readers: Vec<_> = (0..4u64)
        .map(|seed| {
            let (fetcher, tar) = (fetcher.clone(), tar.clone());
            std::thread::spawn(move || {
                let mut state = seed * 77 + 1;
                let mut random = |below: usize| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    usize::try_from(state >> 33).unwrap() % below
                };
                for _ in 0..reads {
                    let start = random(tar.len());
                    let len = (1 + random(200_000)).min(tar.len() - start);
                    let bytes = read(&fetcher, start, len).unwrap();
                    assert!(bytes == tar[start..start + len], "wrong bytes at {start}+{len}");
                }
            })
        })
        .collect();
    for reader in readers {
        reader.join().unwrap();
    }
}

#[test]
fn every_way_reads_as_the_plain_file() {
    for way in WAYS {
        let made = make(way);
        let origin = made.served();
        let fetcher = start(made.over_http(&origin), quick());
        hammer(&fetcher, &made.tar, 15);
        let stats = fetcher.stats();
        assert_eq!(
            (stats.read_errors, stats.in_flight, stats.chunks_wrong),
            (0, 0, 0),
            "{way:?}: {stats:?}"
        );
        assert!(
            stats.chunks_checked > 0 && stats.bytes_decoded + stats.bytes_stored > 0,
            "{way:?}: {stats:?}"
        );
    }
}

#[test]
fn local_blobs_read_as_the_plain_file() {
    let dir = tempfile::tempdir().unwrap();
    for way in WAYS {
        let made = make(way);
        let fetcher = start(made.in_a_file(&dir.path().join(format!("{way:?}"))), quick());
        hammer(&fetcher, &made.tar, 15);
        let stats = fetcher.stats();
        assert_eq!(
            (stats.read_errors, stats.in_flight, stats.chunks_wrong),
            (0, 0, 0),
            "{way:?}: {stats:?}"
        );
        assert_eq!((stats.requests, stats.bytes_fetched), (0, 0), "{way:?}: {stats:?}");
    }
}
