//! What the fetcher's tests share: layers behind an origin, short waits, and readers at random places.

#![allow(dead_code, reason = "every test program uses its own part of this")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tarblk::internals::bench::origin::Origin;
use tarblk::internals::cache::Slice;
use tarblk::internals::fetch::{FetchError, FetchOptions, Fetcher, LayerRange, Located, ReadCallback};
use tarblk::internals::http::{Timeouts, Validator};
use tarblk::internals::source::{Blob, Place, UrlBlob};
use tarblk::internals::units::{LayerId, TarOffset, TarRange};

pub(crate) fn u(n: usize) -> u64 {
    u64::try_from(n).unwrap()
}

pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// A range of the first layer.
pub(crate) fn range(start: usize, len: usize) -> LayerRange {
    LayerRange {
        layer: LayerId(0),
        range: TarRange::new(TarOffset(u(start)), u(len)),
    }
}

pub(crate) fn joined(slices: &[Slice]) -> Vec<u8> {
    slices.iter().flat_map(|slice| slice.to_vec()).collect()
}

/// A blob of `len` bytes at `url`, of which nothing else is known.
pub(crate) fn blob_at(url: &str, len: u64) -> Blob {
    Blob::of_url(UrlBlob::new(&url.parse().unwrap()), len)
}

/// A blob of `size` bytes behind `origin`.
pub(crate) fn at_origin(origin: &Origin, path: &str, size: usize) -> Blob {
    blob_at(&origin.url(path), u(size))
}

/// The same blob in the state that `validator` tells.
pub(crate) fn in_state(blob: Blob, validator: Validator) -> Blob {
    let Place::Url(at) = blob.place else {
        panic!("{} is not at a URL", blob.name)
    };
    Blob {
        place: Place::Url(UrlBlob {
            validator: Some(validator),
            ..at
        }),
        ..blob
    }
}

/// The files in a disk cache's directory, but for those that say what a process may still write.
pub(crate) fn kept_files(store: &Path) -> Vec<String> {
    let is_ledger = |name: &str| name.starts_with("writer-");
    let names = std::fs::read_dir(store).unwrap();
    let names = names.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| !is_ledger(name)).collect()
}

/// The blob in a file.
pub(crate) fn in_file(path: &Path) -> Blob {
    Blob::of_file("layer.tar".to_owned(), path).unwrap()
}

/// Short waits, so that the failures of a minute pass in a second; a long patience, so that reads outlive them; and little
/// memory, so that chunks leave it.
pub(crate) fn quick() -> FetchOptions {
    FetchOptions {
        timeouts: Timeouts {
            connect: Duration::from_millis(500),
            head: Duration::from_millis(500),
            stall: Duration::from_millis(500),
        },
        slowest_body: 16 << 10,
        deadline: Duration::from_secs(60),
        wrong_for: Duration::from_secs(1),
        memory_bytes: 1 << 20,
        ..FetchOptions::default()
    }
}

/// How a read ends.
pub(crate) type Outcome = Result<Vec<Slice>, FetchError>;

/// Leaves a read and returns where its outcome will come.
pub(crate) fn leave(fetcher: &Fetcher, asked: LayerRange) -> Receiver<Outcome> {
    struct Tell(mpsc::Sender<Outcome>);
    impl ReadCallback for Tell {
        fn complete(self: Box<Self>, outcome: Outcome) {
            let _reader_is_gone = self.0.send(outcome);
        }
    }
    let (tell, told) = mpsc::channel();
    fetcher.read(vec![asked], Box::new(Tell(tell)));
    told
}

/// Reads as the device does: looks first, and takes bytes from wherever they are.
pub(crate) fn read(fetcher: &Fetcher, start: usize, len: usize) -> Result<Vec<u8>, FetchError> {
    Ok(match fetcher.locate(range(start, len)) {
        Located::Memory(slices) => joined(&slices),
        Located::File(fd, at) => {
            let file = File::open(PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))).unwrap();
            let mut bytes = vec![0; len];
            file.read_exact_at(&mut bytes, at).unwrap();
            bytes
        }
        Located::Disk => {
            let mut bytes = vec![0; len];
            if fetcher.read_at_once(range(start, len), &mut bytes) {
                return Ok(bytes);
            }
            joined(&fetcher.read_blocking(vec![range(start, len)])?)
        }
        Located::Elsewhere => joined(&fetcher.read_blocking(vec![range(start, len)])?),
    })
}

/// Four readers at random places, each of which reads so often.
pub(crate) fn hammer(fetcher: &Fetcher, data: &Arc<Vec<u8>>, reads: usize) {
    let readers: Vec<_> = (0..4u64)
        .map(|seed| {
            let (fetcher, data) = (fetcher.clone(), data.clone());
            std::thread::spawn(move || {
                let mut state = seed * 77 + 1;
                let mut random = |below: usize| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    usize::try_from(state >> 33).unwrap() % below
                };
                for _ in 0..reads {
                    let start = random(data.len());
                    let len = (1 + random(200_000)).min(data.len() - start);
                    let bytes = read(&fetcher, start, len).unwrap();
                    assert!(bytes == data[start..start + len], "wrong bytes at {start}+{len}");
                }
            })
        })
        .collect();
    for reader in readers {
        reader.join().unwrap();
    }
}
