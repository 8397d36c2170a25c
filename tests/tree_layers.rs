//! The merged tree of an image's layers equals what `umoci unpack` makes of the same image, and what overlayfs shows of its
//! layers one by one.

#![allow(clippy::unwrap_used)]

mod common;
mod layered;
mod oracle;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use common::unpacked;
use layered::{
    Made, Style, What, dir, feed, file, hardlink, random_layers, symlink, tar_of, whiteout, write_image,
    write_oci_layout,
};
use oracle::{Item, Kind, Mounted, Snapshot, assert_clean, assert_same, can_mount, snapshot, unmount};
use tarblk::internals::tree::{TreeBuilder, TreeMode};

/// What a test compares with.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Against {
    Umoci,
    Overlayfs,
}

/// Whether that is possible here; says so when it is not.
fn can_run(against: Against) -> bool {
    let overlayfs = || {
        let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
        known.lines().any(|line| line.ends_with("\toverlay"))
            || Command::new("modprobe")
                .arg("overlay")
                .status()
                .is_ok_and(|status| status.success())
    };
    let why = match against {
        _ if !can_mount() => "images cannot be mounted here",
        Against::Umoci if !common::have("umoci") => "umoci is not installed",
        Against::Overlayfs if !overlayfs() => "this kernel has no overlayfs",
        _ => return true,
    };
    common::skip("tree_layers", why);
    false
}

/// So many seeds from `first` on, or as many as `TARBLK_SEEDS` says.
fn seeds(first: u64, count: u64) -> std::ops::Range<u64> {
    let wanted = std::env::var("TARBLK_SEEDS").ok().and_then(|seeds| seeds.parse().ok());
    first..first + wanted.unwrap_or(count)
}

/// What a mounted image of these layers holds.
fn mounted(mode: TreeMode, tars: &[Vec<u8>], image: &Path) -> Mounted {
    write_image(mode, tars, image);
    assert_clean(image);
    Mounted::new(image).unwrap()
}

#[track_caller]
fn check_with_umoci(layers: &[Vec<Made>]) {
    let tars: Vec<_> = layers.iter().map(|layer| tar_of(layer)).collect();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let layout = work.path().join("layout");
    write_oci_layout(&tars, &layout);
    check_image_with_umoci(&layout, "test", &tars, work.path(), &mut |_| {});
}

/// Compares the mounted image of these tars with the unpacked image that has this tag, after `known` has changed in that
/// what is known to differ.
#[track_caller]
fn check_image_with_umoci(
    layout: &Path,
    tag: &str,
    tars: &[Vec<u8>],
    work: &Path,
    known: &mut dyn FnMut(&mut Snapshot),
) {
    let began = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let mut expected = snapshot(&unpacked::umoci_unpack(layout, tag, &work.join("bundle")).root);
    known(&mut expected);
    let found = mounted(TreeMode::Merged, tars, &work.join("image"));
    let found = snapshot(found.path());
    // umoci leaves directories that it made itself, and those below a hidden one from which it took something, the time of
    // the unpacking; a root without an entry gets no time at all, here that of the first entry.
    for (path, item) in &mut expected {
        let now = item.mtime.0 >= i64::try_from(began).unwrap();
        let root = path.is_empty() && item.mtime == (0, 0);
        if item.kind == Kind::Directory && (now || root) {
            item.mtime = found.get(path).map_or(item.mtime, |found| found.mtime);
        }
    }
    assert_same(&found, &expected);
}

#[test]
fn every_rule_is_umocis() {
    if !can_run(Against::Umoci) {
        return;
    }
    check_with_umoci(&[
        vec![
            dir("./"),
            dir("usr"),
            dir("usr/lib"),
            file("usr/lib/old", "1"),
            file("usr/lib/gone", "2"),
            symlink("lib", "usr/lib"),
            symlink("abs", "/usr"),
            dir("etc").with_xattr("user.layer", "1").with_xattr("user.old", "1"),
            file("etc/a", "a"),
            file("etc/b", "b"),
            file("etc/c", "c"),
            dir("opaque"),
            dir("opaque/sub"),
            file("opaque/sub/old", "x"),
            file("opaque/old", "x"),
            file("becomes-dir", "x"),
            dir("becomes-file"),
            file("becomes-file/x", "x"),
            symlink("becomes-fifo", "nowhere"),
            file("linked", "linked"),
            hardlink("linked-too", "linked"),
            Made::new("dev", What::Char(1, 3)),
        ],
        vec![
            // Parents that no entry makes stay what they were; linked ones lead on.
            file("lib/new", "3"),
            whiteout("lib/.wh.gone"),
            file("abs/lib/newer", "4"),
            whiteout("etc/.wh.a"),
            dir("etc").with_xattr("user.layer", "2"),
            whiteout("etc/.wh.never-there"),
            // Hidden and there again, in both orders.
            file("etc/b", "b again"),
            whiteout("etc/.wh.b"),
            whiteout("etc/.wh.c"),
            file("etc/c", "c again"),
            // Spared by the whiteout of its own layer that comes later.
            dir("opaque/sub"),
            file("opaque/sub/new", "y"),
            file("opaque/new", "y"),
            whiteout("opaque/.wh..wh..opq"),
            file("opaque/newer", "z"),
            dir("becomes-dir"),
            file("becomes-dir/y", "y"),
            file("becomes-file", "y"),
            Made::new("becomes-fifo", What::Fifo),
            // Across layers.
            hardlink("linked-from-above", "linked"),
            hardlink("usr/dev", "dev"),
            whiteout(".wh..wh.aufs"),
        ],
        vec![
            dir("./"),
            // What a link names may go: the file lives on.
            whiteout(".wh.linked"),
            whiteout(".wh.linked-too"),
            hardlink("yet-another", "linked-from-above"),
            whiteout(".wh.dev"),
            whiteout("usr/lib/.wh..wh..opq"),
            dir("lib"),
            file("lib/own", "5"),
        ],
    ]);
}

#[test]
fn a_hidden_root_is_umocis() {
    if !can_run(Against::Umoci) {
        return;
    }
    check_with_umoci(&[
        vec![dir("./"), dir("d"), file("d/f", "1"), file("f", "2")],
        vec![dir("d"), file("d/g", "3"), whiteout(".wh..wh..opq")],
    ]);
}

/// Calls `check` with the tag, layout and layers of each image that shows one thing which layers do to each other.
fn for_all_cases(mut check: impl FnMut(&str, &Path, &[Vec<u8>])) {
    let Some(images) = unpacked::images("tree_layers") else {
        return;
    };
    let layout = images.join("whiteouts");
    for tag in unpacked::tags(&layout) {
        eprintln!("{tag}");
        let layers = unpacked::layers(&layout, &tag);
        let tars: Vec<_> = layers
            .iter()
            .map(|digest| fs::read(unpacked::blob(&layout, digest)).unwrap())
            .collect();
        check(&tag, &layout, &tars);
    }
}

#[test]
fn all_that_layers_do_to_each_other_is_umocis() {
    if !can_run(Against::Umoci) {
        return;
    }
    for_all_cases(|tag, layout, tars| {
        let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        check_image_with_umoci(layout, tag, tars, work.path(), &mut |expected| {
            // containerd and overlayfs show a directory that is there for a whiteout only; umoci makes none.
            if tag == "missing-parent" {
                let made = Item {
                    kind: Kind::Directory,
                    mode: 0o755,
                    mtime: (i64::MAX, 0),
                    ..Item::default()
                };
                assert!(expected.insert(b"none".to_vec(), made).is_none());
            }
        });
    });
}

#[test]
fn all_that_layers_do_to_each_other_is_overlayfss() {
    // What no stack of single layers can show.
    const OPAQUE_ROOT: [&str; 1] = ["opaque-root"];
    const THROUGH_LINKS: [&str; 3] = ["through-links", "whiteouts-through-links", "out-of-the-root"];
    const LINKS_ACROSS: [&str; 5] = [
        "hard-link-down",
        "hard-link-to-new",
        "hard-link-to-link",
        "hard-link-target-gone",
        "through-links",
    ];
    if !can_run(Against::Overlayfs) {
        return;
    }
    for_all_cases(|tag, _, tars| {
        let alone = |tar: &Vec<u8>| feed(tar, &mut TreeBuilder::with_mode(TreeMode::Overlay));
        let error = tars.iter().find_map(|tar| alone(tar).err());
        assert_eq!(error.is_some(), LINKS_ACROSS.contains(&tag), "{tag}: {error:?}");
        if let Some(error) = error {
            assert!(error.to_string().contains("perhaps in a lower layer"), "{tag}: {error}");
            return;
        }
        if OPAQUE_ROOT.contains(&tag) || THROUGH_LINKS.contains(&tag) {
            return;
        }
        let (mut found, mut expected) = stacked_and_merged(tars);
        // A directory without an entry in its layer has no attributes there.
        for item in found.values_mut().chain(expected.values_mut()) {
            if item.kind == Kind::Directory {
                *item = Item {
                    kind: Kind::Directory,
                    ..Item::default()
                };
            }
        }
        assert_same(&found, &expected);
    });
}

#[test]
#[ignore = "takes a minute; whole commands are compared on the same image"]
fn a_real_image_is_umocis() {
    if !can_run(Against::Umoci) {
        return;
    }
    let Some(images) = unpacked::images("tree_layers") else {
        return;
    };
    let layout = images.join("debian-python");
    let layers = unpacked::layers(&layout, "plain");
    let tars: Vec<_> = layers
        .iter()
        .map(|digest| fs::read(unpacked::blob(&layout, digest)).unwrap())
        .collect();
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    check_image_with_umoci(&layout, "plain", &tars, work.path(), &mut |_| {});
}

#[test]
fn random_images_are_umocis() {
    if !can_run(Against::Umoci) {
        return;
    }
    let style = Style {
        all_parents: false,
        links_across: true,
    };
    for seed in seeds(0, 40) {
        eprintln!("seed {seed}");
        check_with_umoci(&random_layers(seed, style));
    }
}

/// Layers mounted one by one and stacked by the kernel; unmounted when it goes, before what it is made of.
struct Stack {
    directory: tempfile::TempDir,
    _layers: Vec<Mounted>,
}

impl Stack {
    fn new(tars: &[Vec<u8>], work: &Path) -> Self {
        let mut layers: Vec<_> = tars
            .iter()
            .enumerate()
            .map(|(number, tar)| {
                let image = work.join(format!("layer-{number}"));
                mounted(TreeMode::Overlay, std::slice::from_ref(tar), &image)
            })
            .collect();
        // overlayfs wants the highest first, and two at least.
        layers.reverse();
        let below = work.join("nothing");
        fs::create_dir(&below).unwrap();
        let mut lower: Vec<_> = layers.iter().map(|layer| layer.path().display().to_string()).collect();
        lower.push(below.display().to_string());
        let directory = tempfile::tempdir().unwrap();
        let output = Command::new("mount")
            .args(["-t", "overlay", "overlay", "-o"])
            .arg(format!("ro,lowerdir={}", lower.join(":")))
            .arg(directory.path())
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "mount -t overlay: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Self {
            directory,
            _layers: layers,
        }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        unmount(self.directory.path());
    }
}

/// What overlayfs shows of these layers, and what their merged image holds.
fn stacked_and_merged(tars: &[Vec<u8>]) -> (Snapshot, Snapshot) {
    let work = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let stack = Stack::new(tars, work.path());
    let merged = mounted(TreeMode::Merged, tars, &work.path().join("image"));
    let (mut found, mut expected) = (snapshot(stack.directory.path()), snapshot(merged.path()));
    // overlayfs counts the links that a layer has, hidden ones too, and numbers inodes its own way.
    for item in found.values_mut().chain(expected.values_mut()) {
        item.names = 0;
        item.first_path.clear();
    }
    (found, expected)
}

#[track_caller]
fn check_with_overlayfs(layers: &[Vec<Made>]) {
    let tars: Vec<_> = layers.iter().map(|layer| tar_of(layer)).collect();
    let (found, expected) = stacked_and_merged(&tars);
    assert_same(&found, &expected);
}

#[test]
fn overlayfs_shows_no_whiteouts() {
    if !can_run(Against::Overlayfs) {
        return;
    }
    check_with_overlayfs(&[
        vec![
            dir("./"),
            dir("d"),
            file("d/a", "1"),
            file("d/b", "2"),
            dir("o"),
            file("o/a", "3"),
            file("f", "4"),
        ],
        vec![
            dir("./"),
            dir("d"),
            whiteout("d/.wh.a"),
            // Nothing below it to merge with: a whiteout there would be listed, were it not for the marks.
            dir("new"),
            whiteout("new/.wh.x"),
            dir("new/sub"),
            whiteout("new/sub/.wh.y"),
            dir("o"),
            whiteout("o/.wh..wh..opq"),
            whiteout("o/.wh.a"),
            file("o/b", "5"),
            whiteout(".wh.f"),
        ],
        vec![
            dir("./"),
            dir("f"),
            file("f/x", "6"),
            whiteout(".wh.d"),
            dir("d"),
            file("d/c", "7"),
            whiteout(".wh.never"),
        ],
    ]);
}

#[test]
fn random_stacks_under_overlayfs_are_the_merged_trees() {
    if !can_run(Against::Overlayfs) {
        return;
    }
    let style = Style {
        all_parents: true,
        links_across: false,
    };
    for seed in seeds(100_000, 20) {
        eprintln!("seed {seed}");
        check_with_overlayfs(&random_layers(seed, style));
    }
}
