//! Programs that nobody here wrote, asked what an image holds: e2fsck, the kernel's ext4 driver, the ext4-view crate, and
//! GNU tar for what it should hold. What is missing on a machine is said loudly.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    missing_docs,
    unreachable_pub
)]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use sha2::{Digest as _, Sha256};
use tarblk::internals::image::ext4::{Ext4Image, Ext4Options};
use tarblk::internals::image::{BlockImage, Origin, Piece};
use tarblk::internals::index::{Entry, walk};
use tarblk::internals::tree::TreeBuilder;
use tarblk::internals::units::TarOffset;

/// What a tree holds under one path. Two are equal when no program could tell the two trees apart there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Item {
    pub kind: Kind,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, u32),
    /// Zero for directories, whose size is the filesystem's business.
    pub size: u64,
    pub link: Vec<u8>,
    pub device: (u32, u32),
    /// Names of the same inode; zero for directories.
    pub names: u64,
    /// The inode's first path in this tree.
    pub first_path: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// SHA-256 of a file's content; of samples of it, if it is big.
    pub digest: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    #[default]
    File,
    Directory,
    Symlink,
    Char,
    Block,
    Fifo,
    Other,
}

/// A tree by path; the root's is empty.
pub type Snapshot = BTreeMap<Vec<u8>, Item>;

/// Files up to this size are compared byte by byte.
pub const WHOLE_UP_TO: u64 = 48 << 20;

/// Where bigger files are sampled, 4 KiB each.
pub fn samples(size: u64) -> impl Iterator<Item = u64> {
    let last = size - 4096;
    let step = (last / 200).max(1);
    (0..=200).map(move |at| (at * step).min(last)).chain([last])
}

/// Reads a mounted or extracted tree.
pub fn snapshot(root: &Path) -> Snapshot {
    let mut found = Snapshot::new();
    let mut first_paths = BTreeMap::new();
    let mut pending = vec![Vec::new()];
    while let Some(path) = pending.pop() {
        let full = root.join(OsStr::from_bytes(&path));
        let metadata = full.symlink_metadata().unwrap();
        let file_type = metadata.file_type();
        let mut item = Item {
            mode: metadata.mode() & 0o7777,
            owner: (metadata.uid(), metadata.gid()),
            mtime: (metadata.mtime(), u32::try_from(metadata.mtime_nsec()).unwrap()),
            size: metadata.size(),
            names: metadata.nlink(),
            xattrs: xattrs(&full),
            ..Item::default()
        };
        if file_type.is_dir() {
            item.kind = Kind::Directory;
            (item.size, item.names) = (0, 0);
            for entry in fs::read_dir(&full).unwrap() {
                let name = entry.unwrap().file_name().into_vec();
                let mut below = path.clone();
                if !below.is_empty() {
                    below.push(b'/');
                }
                below.extend(name);
                pending.push(below);
            }
        } else if file_type.is_symlink() {
            item.kind = Kind::Symlink;
            item.link = fs::read_link(&full).unwrap().into_os_string().into_vec();
        } else if file_type.is_file() {
            item.kind = Kind::File;
            let file = File::open(&full).unwrap();
            item.digest = digest(metadata.size(), |at, out| file.read_exact_at(out, at).unwrap());
        } else {
            item.kind = match file_type {
                kind if kind.is_char_device() => Kind::Char,
                kind if kind.is_block_device() => Kind::Block,
                kind if kind.is_fifo() => Kind::Fifo,
                _ => Kind::Other,
            };
            item.size = 0;
            item.device = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
        }
        if item.names > 1 {
            first_paths
                .entry(metadata.ino())
                .or_insert_with(Vec::new)
                .push(path.clone());
        }
        found.insert(path, item);
    }
    for paths in first_paths.into_values() {
        let first = paths.iter().min().unwrap().clone();
        for path in paths {
            found.get_mut(&path).unwrap().first_path.clone_from(&first);
        }
    }
    found
}

/// The digest of a file's content.
pub fn digest(size: u64, mut read: impl FnMut(u64, &mut [u8])) -> Vec<u8> {
    let mut digest = Sha256::new();
    if size <= WHOLE_UP_TO {
        let mut buffer = vec![0; 1 << 20];
        let mut at = 0;
        while at < size {
            let len = usize::try_from((size - at).min(1 << 20)).unwrap();
            read(at, &mut buffer[..len]);
            digest.update(&buffer[..len]);
            at += u64::try_from(len).unwrap();
        }
    } else {
        let mut buffer = [0; 4096];
        for at in samples(size) {
            read(at, &mut buffer);
            digest.update(buffer);
        }
    }
    digest.finalize().to_vec()
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut list = vec![0; 1 << 16];
    let len = match rustix::fs::llistxattr(path, &mut list[..]) {
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        outcome => outcome.unwrap(),
    };
    let names = list[..len].split(|&byte| byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 1 << 16];
            let len = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..])
                .unwrap_or_else(|error| panic!("{}: {}: {error}", path.display(), String::from_utf8_lossy(name)));
            value.truncate(len);
            (name.to_vec(), value)
        })
        .collect()
}

/// Fails with the first few differences, if there are any.
#[track_caller]
pub fn assert_same(found: &Snapshot, expected: &Snapshot) {
    let mut differences = Vec::new();
    for (path, expected) in expected {
        match found.get(path) {
            Some(found) if found == expected => {}
            other => differences.push(format!(
                "{:?}: found {other:?}, expected {expected:?}",
                String::from_utf8_lossy(&path[..path.len().min(80)])
            )),
        }
    }
    for path in found.keys().filter(|path| !expected.contains_key(*path)) {
        differences.push(format!("{:?} is too much", String::from_utf8_lossy(path)));
    }
    let shown = differences.iter().take(5).cloned().collect::<Vec<_>>().join("\n");
    assert!(differences.is_empty(), "{} differences:\n{shown}", differences.len());
}

/// The image of a tar file.
pub fn image_of(tar: &Path) -> Ext4Image {
    let file = File::open(tar).unwrap();
    let mut builder = TreeBuilder::new();
    walk::local(&file, file.metadata().unwrap().len(), &mut builder, &mut |_, _| {}).unwrap();
    Ext4Image::plan(builder.finish(), &Ext4Options::default()).unwrap()
}

/// The image of these entries.
pub fn image_of_entries<'a>(entries: impl IntoIterator<Item = &'a Entry>) -> Ext4Image {
    let mut builder = TreeBuilder::new();
    for entry in entries {
        builder.push(entry).unwrap();
    }
    Ext4Image::plan(builder.finish(), &Ext4Options::default()).unwrap()
}

/// A directory for images: in memory where there is some, because writing out and unmounting take disks a while.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap())
}

/// Whether a program is there; says so when it is not.
pub fn have(program: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", "command -v \"$0\" >/dev/null", program])
        .status()
        .unwrap()
        .success();
    if !found {
        eprintln!("SKIP: {program} is not installed: nothing checked by it");
    }
    found
}

/// Whether images can be mounted here; says so when they cannot.
pub fn can_mount() -> bool {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: not root: nothing compared on a mounted image");
        return false;
    }
    let free_loop = Command::new("losetup")
        .arg("-f")
        .output()
        .is_ok_and(|output| output.status.success());
    if !free_loop {
        eprintln!("SKIP: no loop devices here: nothing compared on a mounted image");
    }
    free_loop
}

/// Fails unless e2fsck finds nothing at all to say against the image.
#[track_caller]
pub fn assert_clean(image: &Path) {
    if !have("e2fsck") {
        return;
    }
    let output = Command::new("e2fsck").arg("-fn").arg(image).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let start = text.char_indices().nth(6000).map_or(text.len(), |(at, _)| at);
    assert!(
        output.status.success(),
        "e2fsck -fn: {}\n{}",
        output.status,
        &text[..start]
    );
}

/// A mounted image, unmounted when it goes.
pub struct Mounted {
    directory: tempfile::TempDir,
}

impl Mounted {
    /// Mounts as `tarblk mount` does. `None` where that is not possible.
    #[track_caller]
    pub fn new(image: &Path) -> Option<Self> {
        if !can_mount() {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let output = Command::new("mount")
            .args(["-o", "ro,noload,loop"])
            .arg(image)
            .arg(directory.path())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "mount: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Some(Self { directory })
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        unmount(self.directory.path());
    }
}

/// Unmounts. Whoever looks through all mounts at that moment (another test's mount(8)) keeps one busy for a blink.
pub fn unmount(path: &Path) {
    for _ in 0..50 {
        let output = Command::new("umount").arg(path).output();
        if output.is_ok_and(|output| output.status.success()) {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    let detached = Command::new("umount").arg("-l").arg(path).status();
    eprintln!("{} stays busy, so it was only detached: {detached:?}", path.display());
}

/// GNU tar's extraction of a tar.
pub fn extracted(tar: &Path, to: &Path) -> Snapshot {
    let output = Command::new("tar")
        .args([
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
            "--same-owner",
            "--delay-directory-restore",
            "-pxf",
        ])
        .arg(tar)
        .arg("-C")
        .arg(to)
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "tar -x: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    snapshot(to)
}

/// The bytes of a layer that exists only as arithmetic.
#[derive(Clone, Copy, Debug)]
pub enum Payload {
    /// No byte like its neighbours.
    Dense,
    /// The same, but only 64 KiB of every GiB: the rest is zero, so that huge layers can be written sparsely.
    Rare,
}

const WINDOW: u64 = 64 << 10;
const EVERY: u64 = 1 << 30;

impl Payload {
    pub fn fill(self, at: TarOffset, out: &mut [u8]) {
        for (at, byte) in (at.0..).zip(out) {
            let shown = matches!(self, Self::Dense) || at % EVERY < WINDOW;
            *byte = if shown {
                (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56).to_le_bytes()[0]
            } else {
                0
            };
        }
    }

    /// The next stretch of `at..end` that is not zero.
    fn next(self, at: u64, end: u64) -> Option<(u64, u64)> {
        let (start, stop) = match self {
            Self::Dense => (at, end.min(at + (1 << 20))),
            Self::Rare if at % EVERY < WINDOW => (at, at - at % EVERY + WINDOW),
            Self::Rare => (at.next_multiple_of(EVERY), at.next_multiple_of(EVERY) + WINDOW),
        };
        (start < end).then_some((start, stop.min(end)))
    }

    /// The content of an entry's file from `at` on.
    pub fn read(self, entry: &Entry, at: u64, out: &mut [u8]) {
        out.fill(0);
        let end = at + u64::try_from(out.len()).unwrap();
        let first = entry
            .segments
            .partition_point(|segment| segment.file_offset + segment.len <= at);
        for segment in entry.segments[first..]
            .iter()
            .take_while(|segment| segment.file_offset < end)
        {
            let from = segment.file_offset.max(at);
            let to = (segment.file_offset + segment.len).min(end);
            let range = usize::try_from(from - at).unwrap()..usize::try_from(to - at).unwrap();
            self.fill(segment.tar_offset.plus(from - segment.file_offset), &mut out[range]);
        }
    }
}

/// Writes an image whose layer is `payload`; unlike the library's own writer, in one look at all pieces.
pub fn write_image(image: &dyn BlockImage, payload: Payload, path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(image.len()).unwrap();
    let mut pieces: Vec<Piece> = Vec::new();
    image.pieces(0, image.len() / 4096, &mut pieces);
    let mut at = 0;
    let mut block = [0; 4096];
    for piece in pieces {
        match piece.origin {
            Origin::Zero => {}
            Origin::Metadata => {
                for block_at in (at..at + piece.len).step_by(4096) {
                    image.fill_metadata(block_at / 4096, &mut block);
                    if block.iter().any(|&byte| byte != 0) {
                        file.write_all_at(&block, block_at).unwrap();
                    }
                }
            }
            Origin::Layer(_, start) => {
                let mut from = start.0;
                while let Some((first, stop)) = payload.next(from, start.0 + piece.len) {
                    let mut buffer = vec![0; usize::try_from(stop - first).unwrap()];
                    payload.fill(TarOffset(first), &mut buffer);
                    file.write_all_at(&buffer, at + (first - start.0)).unwrap();
                    from = stop;
                }
            }
        }
        at += piece.len;
    }
    assert_eq!(at, image.len());
}

/// What entries hold that do not replace each other and need no rules to be understood: every path clean, every
/// directory there.
pub fn expected(entries: &[Entry], payload: Payload) -> Snapshot {
    let mut found = Snapshot::new();
    let mut first_paths: BTreeMap<Vec<u8>, Vec<Vec<u8>>> = BTreeMap::new();
    for entry in entries {
        let path = entry.path.strip_prefix(b"./").unwrap_or(&entry.path).to_vec();
        if entry.kind == tarblk::internals::index::Kind::Hardlink {
            let item = found[&entry.link].clone();
            first_paths
                .entry(entry.link.clone())
                .or_insert_with(|| vec![entry.link.clone()])
                .push(path.clone());
            found.insert(path, item);
            continue;
        }
        let mut item = Item {
            mode: entry.mode.into(),
            owner: (u32::try_from(entry.uid).unwrap(), u32::try_from(entry.gid).unwrap()),
            mtime: (entry.mtime.secs, entry.mtime.nanos),
            names: 1,
            xattrs: entry
                .xattrs
                .iter()
                .map(|xattr| (xattr.name.clone(), xattr.value.clone()))
                .collect(),
            ..Item::default()
        };
        match entry.kind {
            tarblk::internals::index::Kind::Directory => (item.kind, item.names) = (Kind::Directory, 0),
            tarblk::internals::index::Kind::Symlink => {
                item.kind = Kind::Symlink;
                item.mode = 0o777;
                item.size = u64::try_from(entry.link.len()).unwrap();
                item.link.clone_from(&entry.link);
            }
            tarblk::internals::index::Kind::CharDevice => item.kind = Kind::Char,
            tarblk::internals::index::Kind::BlockDevice => item.kind = Kind::Block,
            tarblk::internals::index::Kind::Fifo => item.kind = Kind::Fifo,
            _ => {
                item.size = entry.size;
                item.digest = digest(entry.size, |at, out| payload.read(entry, at, out));
            }
        }
        if matches!(item.kind, Kind::Char | Kind::Block) {
            item.device = (entry.device_major, entry.device_minor);
        }
        found.insert(path, item);
    }
    for paths in first_paths.into_values() {
        let first = paths.iter().min().unwrap().clone();
        for path in &paths {
            let item = found.get_mut(path).unwrap();
            item.first_path.clone_from(&first);
            item.names = u64::try_from(paths.len()).unwrap();
        }
    }
    found
}

/// All oracles at once: writes the image of these entries, checks it, mounts it and compares. Returns the mounted image for
/// further questions.
#[track_caller]
pub fn check_entries(entries: &[Entry], payload: Payload) -> (Checked, Ext4Image) {
    let image = image_of_entries(entries);
    let directory = scratch();
    let path = directory.path().join("image");
    write_image(&image, payload, &path);
    assert_clean(&path);
    let mounted = Mounted::new(&path);
    if let Some(mounted) = &mounted {
        assert_same(&snapshot(mounted.path()), &expected(entries, payload));
    }
    (
        Checked {
            mounted,
            path,
            _directory: directory,
        },
        image,
    )
}

/// A checked image. Unmounts before its file goes.
pub struct Checked {
    pub mounted: Option<Mounted>,
    pub path: PathBuf,
    _directory: tempfile::TempDir,
}
