//! Compares two directory trees in everything a tar can record: names, types, modes, owners, nanosecond times, sizes, link
//! structure, device numbers, extended attributes and content.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What a name has, content apart.
#[derive(Debug, PartialEq, Eq)]
struct Node {
    kind: &'static str,
    mode: u32,
    owner: (u32, u32),
    /// Seconds and nanoseconds.
    mtime: (i64, i64),
    /// Of regular files; directories are as big as their filesystem makes them.
    size: u64,
    /// How many names it has; of everything but directories.
    links: u64,
    /// The first of its names, in order: names with the same first name are one file.
    first_name: PathBuf,
    /// Of devices.
    device: (u32, u32),
    link_text: OsString,
    xattrs: BTreeMap<CString, Vec<u8>>,
}

/// How the trees differ, a line each, in the order of names; empty when they do not. `implied` are directories that the
/// tar does not record (the empty path is the root): only their existence is compared. Ends after a hundred lines.
pub(crate) fn differences(expected: &Path, found: &Path, implied: &[PathBuf]) -> Vec<String> {
    let (left, right) = (read(expected), read(found));
    let mut lines = Vec::new();
    for name in left.keys() {
        if !right.contains_key(name) {
            lines.push(format!("{}: missing", name.display()));
        }
    }
    for (name, node) in &right {
        if lines.len() >= 100 {
            lines.push("and so on".to_owned());
            break;
        }
        let Some(wanted) = left.get(name) else {
            lines.push(format!("{}: should not be there", name.display()));
            continue;
        };
        if implied.contains(name) && wanted.kind == node.kind {
            continue;
        }
        if wanted != node {
            lines.push(format!("{}: {}", name.display(), describe(wanted, node)));
        }
        if node.kind == "file"
            && wanted.kind == "file"
            && let Some(at) = first_difference(&expected.join(name), &found.join(name))
        {
            lines.push(format!("{}: content differs from byte {at} on", name.display()));
        }
    }
    lines
}

/// Calls a function for every directory of a tree, the root first and under an empty name.
pub(crate) fn directories(root: &Path, found: &mut dyn FnMut(&Path, &fs::Metadata)) {
    let mut waiting = vec![PathBuf::new()];
    while let Some(dir) = waiting.pop() {
        found(&dir, &fs::symlink_metadata(root.join(&dir)).unwrap());
        for entry in fs::read_dir(root.join(&dir)).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                waiting.push(dir.join(entry.file_name()));
            }
        }
    }
}

/// The names of a tree, sorted, its root left out.
pub(crate) fn names(root: &Path) -> Vec<PathBuf> {
    read(root)
        .into_keys()
        .filter(|name| !name.as_os_str().is_empty())
        .collect()
}

/// How many names a tree has, its root included.
pub(crate) fn count(root: &Path) -> usize {
    read(root).len()
}

fn describe(wanted: &Node, found: &Node) -> String {
    let mut parts = Vec::new();
    let mut part = |what: &str, wanted: String, found: String| {
        if wanted != found {
            parts.push(format!("{what} is {found}, not {wanted}"));
        }
    };
    part("type", wanted.kind.to_owned(), found.kind.to_owned());
    part("mode", format!("{:o}", wanted.mode), format!("{:o}", found.mode));
    part("owner", format!("{:?}", wanted.owner), format!("{:?}", found.owner));
    part("time", format!("{:?}", wanted.mtime), format!("{:?}", found.mtime));
    part("size", wanted.size.to_string(), found.size.to_string());
    part("link count", wanted.links.to_string(), found.links.to_string());
    part(
        "first name",
        printable(&wanted.first_name),
        printable(&found.first_name),
    );
    part("device", format!("{:?}", wanted.device), format!("{:?}", found.device));
    part("link text", printable(&wanted.link_text), printable(&found.link_text));
    part("xattrs", format!("{:?}", wanted.xattrs), format!("{:?}", found.xattrs));
    parts.join("; ")
}

fn read(root: &Path) -> BTreeMap<PathBuf, Node> {
    let mut names = vec![PathBuf::new()];
    let mut waiting = vec![PathBuf::new()];
    while let Some(dir) = waiting.pop() {
        for entry in fs::read_dir(root.join(&dir)).unwrap_or_else(|e| panic!("{}: {e}", dir.display())) {
            let entry = entry.unwrap();
            let name = dir.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                waiting.push(name.clone());
            }
            names.push(name);
        }
    }
    names.sort();
    let mut first_names = BTreeMap::new();
    let mut nodes = BTreeMap::new();
    for name in names {
        let path = if name.as_os_str().is_empty() {
            root.to_owned()
        } else {
            root.join(&name)
        };
        let found = fs::symlink_metadata(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let kind = found.file_type();
        let first_name = first_names
            .entry((found.dev(), found.ino()))
            .or_insert_with(|| name.clone())
            .clone();
        let node = Node {
            kind: match () {
                () if kind.is_dir() => "directory",
                () if kind.is_file() => "file",
                () if kind.is_symlink() => "symlink",
                () if kind.is_fifo() => "fifo",
                () if kind.is_char_device() => "character device",
                () if kind.is_block_device() => "block device",
                () => "socket",
            },
            mode: found.mode() & 0o7777,
            owner: (found.uid(), found.gid()),
            mtime: (found.mtime(), found.mtime_nsec()),
            size: if kind.is_file() { found.size() } else { 0 },
            links: if kind.is_dir() { 0 } else { found.nlink() },
            first_name,
            device: if kind.is_char_device() || kind.is_block_device() {
                (rustix::fs::major(found.rdev()), rustix::fs::minor(found.rdev()))
            } else {
                (0, 0)
            },
            link_text: if kind.is_symlink() {
                fs::read_link(&path).unwrap().into()
            } else {
                OsString::new()
            },
            xattrs: xattrs(&path),
        };
        nodes.insert(name, node);
    }
    nodes
}

fn xattrs(path: &Path) -> BTreeMap<CString, Vec<u8>> {
    let mut names = vec![0; 65536];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut values = vec![0; 65536];
    names[..length]
        .split_inclusive(|&byte| byte == 0)
        .map(|name| {
            let name = CStr::from_bytes_with_nul(name).unwrap();
            let length = rustix::fs::lgetxattr(path, name, &mut values[..])
                .unwrap_or_else(|e| panic!("{}: {name:?} is listed but cannot be read: {e}", path.display()));
            (name.to_owned(), values[..length].to_vec())
        })
        .collect()
}

fn first_difference(expected: &Path, found: &Path) -> Option<u64> {
    let (mut left, mut right) = (File::open(expected).unwrap(), File::open(found).unwrap());
    let (mut left_bytes, mut right_bytes) = (Vec::new(), Vec::new());
    let mut at = 0;
    loop {
        left_bytes.clear();
        right_bytes.clear();
        left.by_ref().take(1 << 20).read_to_end(&mut left_bytes).unwrap();
        right
            .by_ref()
            .take(1 << 20)
            .read_to_end(&mut right_bytes)
            .unwrap_or_else(|e| panic!("{}: {e}", found.display()));
        if left_bytes != right_bytes {
            let same = left_bytes
                .iter()
                .zip(&right_bytes)
                .take_while(|(left, right)| left == right)
                .count();
            return Some(at + u64::try_from(same).unwrap());
        }
        if left_bytes.is_empty() {
            return None;
        }
        at += u64::try_from(left_bytes.len()).unwrap();
    }
}

/// A name or text as it may be written in a message: bytes that are not plain ASCII escaped, and quoted.
pub(crate) fn printable(text: impl AsRef<OsStr>) -> String {
    format!("\"{}\"", text.as_ref().as_bytes().escape_ascii())
}
