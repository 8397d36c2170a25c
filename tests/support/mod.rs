//! What the tests of devices share: an image cut from a plain file so that every way a block can come is used, and a small
//! harness, because a test program that is its own daemon cannot be run by the usual one.

#![allow(dead_code, clippy::unwrap_used, clippy::missing_panics_doc)]

pub(crate) mod blame_cases;
pub(crate) mod device_cases;
pub(crate) mod harness;
pub(crate) mod sandbox_cases;
#[path = "../common/wait.rs"]
pub(crate) mod wait;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use tarblk::internals::cache::Slice;
use tarblk::internals::device::DeviceError;
use tarblk::internals::device::volume::BlobReader;
use tarblk::internals::fetch::{LayerRange, Located, ReadCallback};
use tarblk::internals::image::{BlockImage, Origin, Piece};
use tarblk::internals::units::{BLOCK_SIZE, LayerId, TarOffset};

const BLOCK: usize = 4096;

/// The layers of a [`Patchwork`]: where a layer's bytes are is decided by its number.
const IN_MEMORY: LayerId = LayerId(0);
const IN_FILE: LayerId = LayerId(1);
const FAR_AWAY: LayerId = LayerId(2);

/// An image with the content of a plain file: its blocks are metadata, zeros, memory, a local file or far away, by turns.
#[derive(Debug)]
pub(crate) struct Patchwork {
    content: Arc<Vec<u8>>,
    /// Every block from the same place, for measuring.
    uniform: Option<Everything>,
}

/// Where every block comes from.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Everything {
    /// Layer bytes in memory.
    Memory,
    /// Computed metadata; here it is copied.
    Metadata,
    /// The fetch thread, which has it at once.
    FarAway,
}

impl Patchwork {
    fn origin(&self, block: u64) -> Origin {
        let start = usize::try_from(block * BLOCK_SIZE).unwrap();
        let Some(bytes) = self.content.get(start..start + BLOCK) else {
            return Origin::Zero;
        };
        let at = TarOffset(block * BLOCK_SIZE);
        match self.uniform {
            Some(Everything::Memory) => return Origin::Layer(IN_MEMORY, at),
            Some(Everything::Metadata) => return Origin::Metadata,
            Some(Everything::FarAway) => return Origin::Layer(FAR_AWAY, at),
            None => {}
        }
        if bytes.iter().all(|&byte| byte == 0) {
            return Origin::Zero;
        }
        // Runs of a few blocks, so that pieces are longer than a block but requests cross their borders.
        match (block / 3).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 62 {
            0 => Origin::Metadata,
            1 => Origin::Layer(IN_MEMORY, at),
            2 => Origin::Layer(IN_FILE, at),
            _ => Origin::Layer(FAR_AWAY, at),
        }
    }

    /// How many bytes of a data block are not its zero tail; such a block is two pieces, like the end of a file.
    fn filled(&self, block: u64) -> u64 {
        let start = usize::try_from(block * BLOCK_SIZE).unwrap();
        let bytes = &self.content[start..start + BLOCK];
        bytes
            .iter()
            .rposition(|&byte| byte != 0)
            .map_or(0, |last| u64::try_from(last + 1).unwrap())
    }
}

impl BlockImage for Patchwork {
    fn len(&self) -> u64 {
        u64::try_from(self.content.len()).unwrap()
    }

    fn pieces(&self, block: u64, count: u64, out: &mut Vec<Piece>) {
        for block in block..block + count {
            let origin = self.origin(block);
            if let (Origin::Layer(..), None) = (origin, self.uniform) {
                let filled = self.filled(block);
                out.push(Piece { len: filled, origin });
                if filled < BLOCK_SIZE {
                    out.push(Piece {
                        len: BLOCK_SIZE - filled,
                        origin: Origin::Zero,
                    });
                }
                continue;
            }
            match out.last_mut() {
                Some(last) if continues(*last, origin) => last.len += BLOCK_SIZE,
                _ => out.push(Piece {
                    len: BLOCK_SIZE,
                    origin,
                }),
            }
        }
    }

    fn fill_metadata(&self, block: u64, out: &mut [u8]) {
        let start = usize::try_from(block * BLOCK_SIZE).unwrap();
        out.copy_from_slice(&self.content[start..start + BLOCK]);
    }
}

fn continues(last: Piece, origin: Origin) -> bool {
    match (last.origin, origin) {
        (Origin::Zero, Origin::Zero) | (Origin::Metadata, Origin::Metadata) => true,
        (Origin::Layer(a, at), Origin::Layer(b, next)) => a == b && at.plus(last.len) == next,
        _ => false,
    }
}

/// The layers behind a [`Patchwork`].
#[derive(Debug)]
pub(crate) struct PatchworkBytes {
    chunks: Vec<Slice>,
    file: File,
    far_away: tokio::sync::mpsc::UnboundedSender<FarRead>,
}

struct FarRead {
    ranges: Vec<LayerRange>,
    waiter: Box<dyn ReadCallback>,
}

const CHUNK: usize = 64 << 10;

impl PatchworkBytes {
    /// Bytes far away come after `delay`; never, when there is none.
    fn new(content: &[u8], file: File, delay: Option<Duration>) -> Self {
        let chunks: Vec<Slice> = content.chunks(CHUNK).map(|chunk| Slice::from(chunk.to_vec())).collect();
        let (far_away, mut reads) = tokio::sync::mpsc::unbounded_channel::<FarRead>();
        let held = chunks.clone();
        std::thread::spawn(move || {
            let held = std::rc::Rc::new(held);
            tokio_uring::start(async move {
                while let Some(read) = reads.recv().await {
                    let held = std::rc::Rc::clone(&held);
                    tokio_uring::spawn(async move {
                        match delay {
                            Some(delay) if delay.is_zero() => {}
                            Some(delay) => tokio::time::sleep(delay).await,
                            None => std::future::pending().await,
                        }
                        let slices = read.ranges.iter().flat_map(|range| cut(&held, *range)).collect();
                        read.waiter.complete(Ok(slices));
                    });
                }
            });
        });
        Self { chunks, file, far_away }
    }
}

/// The slices of `chunks` that make `range`.
fn cut(chunks: &[Slice], range: LayerRange) -> Vec<Slice> {
    let mut at = usize::try_from(range.range.start.0).unwrap();
    let end = at + usize::try_from(range.range.len).unwrap();
    let mut slices = Vec::new();
    while at < end {
        let slice = chunks[at / CHUNK].part(at % CHUNK, end - at);
        at += slice.len();
        slices.push(slice);
    }
    slices
}

impl BlobReader for PatchworkBytes {
    fn locate(&self, range: LayerRange) -> Located<'_> {
        match range.layer {
            IN_MEMORY => Located::Memory(cut(&self.chunks, range).into()),
            IN_FILE => Located::File(self.file.as_fd(), range.range.start.0),
            _ => Located::Elsewhere,
        }
    }

    fn read(&self, ranges: Vec<LayerRange>, waiter: Box<dyn ReadCallback>) {
        let _ = self.far_away.send(FarRead { ranges, waiter });
    }
}

/// The image and the bytes for the plain file at `path`.
pub(crate) fn patchwork(path: &Path, delay: Option<Duration>) -> (Arc<dyn BlockImage>, Arc<dyn BlobReader>) {
    make(path, None, delay, File::open(path).unwrap())
}

/// The same, but the local file that is to hold bytes of the layers holds none.
pub(crate) fn hollow(path: &Path, delay: Option<Duration>) -> (Arc<dyn BlockImage>, Arc<dyn BlobReader>) {
    make(path, None, delay, File::open("/dev/null").unwrap())
}

/// The same with every block from one place.
pub(crate) fn uniform(path: &Path, everything: Everything) -> (Arc<dyn BlockImage>, Arc<dyn BlobReader>) {
    make(path, Some(everything), Some(Duration::ZERO), File::open(path).unwrap())
}

/// The blocks of [`patchwork`]'s image that are far away.
pub(crate) fn far_away_blocks(path: &Path) -> Vec<u64> {
    let content = Arc::new(read_all(path));
    let blocks = u64::try_from(content.len() / BLOCK).unwrap();
    let image = Patchwork { content, uniform: None };
    let is_far = |block: &u64| matches!(image.origin(*block), Origin::Layer(FAR_AWAY, _));
    (0..blocks).filter(is_far).collect()
}

fn make(
    path: &Path,
    uniform: Option<Everything>,
    delay: Option<Duration>,
    file: File,
) -> (Arc<dyn BlockImage>, Arc<dyn BlobReader>) {
    let content = read_all(path);
    assert_eq!(content.len() % BLOCK, 0);
    let bytes = PatchworkBytes::new(&content, file, delay);
    (
        Arc::new(Patchwork {
            content: Arc::new(content),
            uniform,
        }),
        Arc::new(bytes),
    )
}

/// An ext4 filesystem of `mib` MiB with a few files, made by `mke2fs`, in a plain file.
pub(crate) fn make_ext4(path: &Path, mib: u64) {
    let tree = tempfile::tempdir().unwrap();
    let mut state = 1u64;
    for (name, len) in [("small", 700), ("block", 4096), ("odd", 123_457), ("big", 3_000_001)] {
        let bytes: Vec<u8> = std::iter::repeat_with(|| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()[7]
        })
        .take(len)
        .collect();
        File::create(tree.path().join(name)).unwrap().write_all(&bytes).unwrap();
    }
    std::fs::create_dir(tree.path().join("directory")).unwrap();
    std::os::unix::fs::symlink("small", tree.path().join("directory/link")).unwrap();
    let made = Command::new("mke2fs")
        .args(["-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0", "-t", "ext4", "-d"])
        .args([tree.path(), path])
        .arg(format!("{mib}M"))
        .output()
        .expect("mke2fs (e2fsprogs) is needed");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
}

/// A whole file or device.
pub(crate) fn read_all(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

/// Why device tests cannot run here, if they cannot.
pub(crate) fn missing(backend: Option<DeviceError>) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    if Command::new("mke2fs").arg("-V").output().is_err() {
        return Some("needs mke2fs (e2fsprogs)".to_owned());
    }
    backend.map(|error| error.to_string())
}
