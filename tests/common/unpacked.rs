//! Images as `umoci unpack` unpacks them: what a mounted one has to be like.
//!
//! umoci follows the image-spec where containerd 1.6 with overlayfs, compared case by case on the layout `whiteouts`, does not:
//!
//! - containerd changes the time of a directory that gets or loses a name; umoci puts it back, as far as it can (below).
//! - A directory that is whited out and made anew in one layer (`recreated`) still shows its old content in containerd.
//! - A layer's opaque mark in the root (`opaque-root`) does nothing in containerd.
//! - A whiteout beside an opaque mark (`opaque-and-whiteout`) is listed by readdir in containerd's mounts, and cannot be opened.
//! - Names that lead through links of lower layers (`whiteouts-through-links`, `out-of-the-root`) replace the links by
//!   directories in containerd.
//! - containerd refuses hard links to what only a lower layer has (`hard-link-down` and others).
//!
//! In one thing containerd is followed: a whiteout in a directory that is not there (`missing-parent`) makes the directory, as
//! any other entry would; umoci passes it over ([`is_known`]).
//!
//! In another it is, too: a hard link's header gives its attributes to the file ([`follow_containerd_in_hard_links`]);
//! `tests/rules.rs` holds that against containerd.
//!
//! What umoci cannot be asked about: directories that no entry is for, and those that lose a name to an opaque mark further up
//! (`opaque-last`), have the time of unpacking. [`Unpacked::implied`] lists them; of those only the existence is compared.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tarblk::internals::index::build::{BlobRecorder, Contents};
use tarblk::internals::index::{Entry, EntrySink, Index, IndexError, Kind, Timestamp};
use tarblk::internals::layer::Coding;
use tarblk::internals::tree::{Node, NodeId, NodeKind, TreeBuilder, TreeMode, Xattrs};
use tarblk::internals::units::LayerId;

use super::{have, skip, succeed};

/// Where the images are that tools/test-images makes: `TARBLK_TEST_IMAGES`, or where it puts them. `None`, having said so,
/// if nobody has made them.
pub(crate) fn images(test: &str) -> Option<PathBuf> {
    let made = std::env::var_os("TARBLK_TEST_IMAGES").map(PathBuf::from).or_else(|| {
        let variable = |name: &str| std::env::var_os(name).map(PathBuf::from);
        let cache = variable("TARBLK_TEST_CACHE").or_else(|| {
            let home = variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache")))?;
            Some(home.join("tarblk-tests"))
        })?;
        Some(cache.join("images"))
    });
    let made = made.filter(|made| made.join("version").exists());
    if made.is_none() {
        skip(test, "no images (tools/test-images makes them)");
    }
    made
}

/// The tags of a layout.
pub(crate) fn tags(layout: &Path) -> Vec<String> {
    let index = fs::read(layout.join("index.json")).unwrap_or_else(|e| panic!("{}: {e}", layout.display()));
    let index: Value = serde_json::from_slice(&index).unwrap();
    let name = "org.opencontainers.image.ref.name";
    let manifests = index["manifests"].as_array().unwrap().iter();
    manifests
        .filter_map(|found| Some(found["annotations"][name].as_str()?.to_owned()))
        .collect()
}

/// The same of a layout that may not have been made.
pub(crate) fn tags_if_any(layout: &Path) -> Vec<String> {
    if layout.exists() { tags(layout) } else { Vec::new() }
}

/// A layout's manifest with this tag, and its digest.
pub(crate) fn manifest(layout: &Path, tag: &str) -> (String, Value) {
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json")).unwrap()).unwrap();
    let manifests = index["manifests"].as_array().unwrap();
    let found = manifests
        .iter()
        .find(|found| found["annotations"]["org.opencontainers.image.ref.name"] == tag)
        .unwrap_or_else(|| panic!("{} has no {tag}", layout.display()));
    let digest = found["digest"].as_str().unwrap().to_owned();
    let manifest = serde_json::from_slice(&fs::read(blob(layout, &digest)).unwrap()).unwrap();
    (digest, manifest)
}

/// The digests of an image's layers, the lowest first.
pub(crate) fn layers(layout: &Path, tag: &str) -> Vec<String> {
    let (_, manifest) = manifest(layout, tag);
    let layers = manifest["layers"].as_array().unwrap().iter();
    layers
        .map(|layer| layer["digest"].as_str().unwrap().to_owned())
        .collect()
}

/// The file of a layout's blob.
pub(crate) fn blob(layout: &Path, digest: &str) -> PathBuf {
    layout.join("blobs").join(digest.replace(':', "/"))
}

/// An unpacked image.
#[derive(Debug)]
pub(crate) struct Unpacked {
    /// Its root directory.
    pub(crate) root: PathBuf,
    /// Directories whose attributes are umoci's own doing, the empty path being the root.
    pub(crate) implied: Vec<PathBuf>,
}

/// Unpacks an image into the directory `to`, which must not exist. umoci 0.4 knows no zstd: where the layout has the same
/// image without under `TAG-unpack`, that is unpacked.
pub(crate) fn umoci_unpack(layout: &Path, tag: &str, to: &Path) -> Unpacked {
    let without_zstd = format!("{tag}-unpack");
    let tag = if tags(layout).contains(&without_zstd) {
        &without_zstd
    } else {
        tag
    };
    let began = SystemTime::now() - Duration::from_secs(1);
    let mut command = Command::new("umoci");
    command
        .args(["unpack", "--image"])
        .arg(format!("{}:{tag}", layout.display()))
        .arg(to);
    succeed(&mut command);
    let root = to.join("rootfs");
    follow_containerd_in_hard_links(layout, tag, &root);
    let mut implied = Vec::new();
    // Nothing in the images is as new as this.
    super::tree::directories(&root, &mut |name, metadata| {
        let time = metadata.modified().unwrap();
        if time >= began || (name.as_os_str().is_empty() && time == SystemTime::UNIX_EPOCH) {
            implied.push(name.to_owned());
        }
    });
    Unpacked { root, implied }
}

/// Hands entries on, with a time of their own for hard links.
struct Marked<'a>(&'a mut TreeBuilder);

const MARK: Timestamp = Timestamp {
    secs: 123_456_789,
    nanos: 987_654_321,
};

impl EntrySink for Marked<'_> {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        let mut entry = entry.clone();
        if entry.kind == Kind::Hardlink {
            (entry.mtime, entry.in_image) = (MARK, None);
        }
        self.0.entry(&entry)
    }
}

/// Gives the files that a hard link's header describes the attributes that it says, as containerd does and umoci does not.
fn follow_containerd_in_hard_links(layout: &Path, tag: &str, root: &Path) {
    let indexes: Vec<_> = layers(layout, tag)
        .iter()
        .map(|digest| {
            let blob = fs::read(blob(layout, digest)).unwrap();
            let coding = Coding::of_bytes(&blob);
            let mut recorder = BlobRecorder::new(coding, coding.spacing(), Contents::ENTRIES);
            recorder.feed(&blob).unwrap();
            Index::open(recorder.finish().unwrap().into_index()).unwrap()
        })
        .collect();
    let tree = |mark: bool| {
        let mut builder = TreeBuilder::with_mode(TreeMode::Merged);
        for (layer, index) in (0..).zip(&indexes) {
            builder.begin_layer(LayerId(layer)).unwrap();
            if mark {
                index.replay_in_image(&mut Marked(&mut builder)).unwrap();
            } else {
                index.replay_in_image(&mut builder).unwrap();
            }
        }
        builder.finish()
    };
    let (marked, tree) = (tree(true), tree(false));
    let mut pending = vec![(root.to_owned(), NodeId::ROOT)];
    while let Some((path, id)) = pending.pop() {
        pending.extend(
            tree.children(id)
                .map(|child| (path.join(OsStr::from_bytes(child.name)), child.node)),
        );
        if marked.node(id).mtime() == MARK {
            let node = tree.node(id);
            set_attributes(&path, node, tree.xattrs(node.xattr_set()));
        }
    }
}

fn set_attributes(path: &Path, node: &Node, xattrs: Xattrs<'_>) {
    let (uid, gid) = (node.uid(), node.gid());
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
    let mut names = vec![0; 1 << 16];
    let len = rustix::fs::llistxattr(path, &mut names).unwrap();
    for name in names[..len].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        rustix::fs::lremovexattr(path, name).unwrap();
    }
    for (name, value) in xattrs {
        rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
    }
    if node.kind() != NodeKind::Symlink {
        fs::set_permissions(path, fs::Permissions::from_mode(u32::from(node.mode() & 0o7777))).unwrap();
    }
    let time = rustix::fs::Timespec {
        tv_sec: node.mtime().secs,
        tv_nsec: node.mtime().nanos.into(),
    };
    let times = rustix::fs::Timestamps {
        last_access: time,
        last_modification: time,
    };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

/// The directories of a layer's tar that hold something and have no entry of their own, the empty path being the root: by GNU
/// tar, which reads every coding.
pub(crate) fn parents_without_entry(blob: &Path) -> Vec<PathBuf> {
    let mut command = Command::new("tar");
    let listed = succeed(command.args(["--quoting-style=literal", "-tf"]).arg(blob));
    let (mut directories, mut parents) = (BTreeSet::new(), BTreeSet::new());
    for line in listed.split(|&byte| byte == b'\n') {
        let name: PathBuf = Path::new(OsStr::from_bytes(line))
            .components()
            .filter(|part| !matches!(part, Component::CurDir | Component::RootDir))
            .collect();
        parents.extend(name.ancestors().skip(1).map(Path::to_owned));
        if line.ends_with(b"/") {
            directories.insert(name);
        }
    }
    parents.difference(&directories).cloned().collect()
}

/// Whether a difference, as `tree::differences` writes it, is one where umoci is not followed.
pub(crate) fn is_known(tag: &str, difference: &str) -> bool {
    tag == "missing-parent" && difference == "none: should not be there"
}

/// Whether nothing but a file's link count differs: overlayfs says how many names the file has in its layer, also when higher
/// layers hide some of them.
pub(crate) fn is_links_only(difference: &str) -> bool {
    let what = difference.split_once(": ").map_or("", |(_, what)| what);
    what.starts_with("link count is ") && !what.contains("; ")
}

/// Cases of the layout `whiteouts` in which one layer alone cannot be what it is above others.
pub(crate) const NOT_ALONE: [(&str, &str); 8] = [
    ("hard-link-down", "the link's target is in a lower layer"),
    ("hard-link-to-new", "the link's target is in a lower layer"),
    ("hard-link-to-link", "the link's target is in a lower layer"),
    ("hard-link-target-gone", "the link's target is in a lower layer"),
    ("through-links", "where the name leads to is in a lower layer"),
    ("whiteouts-through-links", "where the name leads to is in a lower layer"),
    ("out-of-the-root", "where the name leads to is in a lower layer"),
    ("opaque-root", "overlayfs knows no opaque root"),
];

/// Whether this kernel has overlayfs, loaded now if it is a module.
pub(crate) fn has_overlayfs() -> bool {
    let known = || {
        fs::read_to_string("/proc/filesystems")
            .unwrap_or_default()
            .contains("\toverlay\n")
    };
    known() || (Command::new("modprobe").arg("overlay").status().is_ok() && known())
}

/// Why nothing can be unpacked here, if so.
pub(crate) fn no_unpacking() -> Option<&'static str> {
    if !have("umoci") {
        return Some("no umoci: run tools/setup --tests");
    }
    if !rustix::process::geteuid().is_root() {
        return Some("unpacking owners and devices needs root");
    }
    None
}
