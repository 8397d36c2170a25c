//! The images that tools/test-images makes, merged by the library alone: no daemon, no coding, no registry. Merged, they are
//! what `umoci unpack` makes of them; layer by layer under overlayfs, they are the same.

mod common;
mod layered;
mod oracle;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::unpacked::{self, images, umoci_unpack};
use common::{scratch, skip, tree};
use oracle::Mounted;
use tarblk::internals::tree::TreeMode;

/// The images, if everything is here to mount and unpack them.
fn laboratory(test: &str) -> Option<PathBuf> {
    let cannot_mount = || (!oracle::can_mount()).then_some("images cannot be mounted here");
    if let Some(why) = unpacked::no_unpacking().or_else(cannot_mount) {
        skip(test, why);
        return None;
    }
    images(test)
}

/// The layers of an image whose layers are plain tars.
fn tars(layout: &Path, tag: &str) -> Vec<Vec<u8>> {
    let read = |digest: &String| fs::read(unpacked::blob(layout, digest)).unwrap();
    unpacked::layers(layout, tag).iter().map(read).collect()
}

/// A tree as a mounted image file.
fn mounted(mode: TreeMode, tars: &[Vec<u8>], file: &Path) -> Mounted {
    layered::write_image(mode, tars, file);
    oracle::assert_clean(file);
    Mounted::new(file).unwrap()
}

#[test]
fn merged_layers_are_what_umoci_makes_of_them() {
    let Some(images) = laboratory("merged_layers_are_what_umoci_makes_of_them") else {
        return;
    };
    let work = scratch("merged-");
    let mut complaints = Vec::new();
    let tags = unpacked::tags(&images.join("whiteouts"));
    let tags = tags.iter().map(|tag| ("whiteouts", tag.as_str()));
    for (name, tag) in tags.chain([("debian-python", "plain")]) {
        let (layout, place) = (images.join(name), work.path().join("unpacked"));
        let expected = umoci_unpack(&layout, tag, &place);
        let found = mounted(TreeMode::Merged, &tars(&layout, tag), &work.path().join("image"));
        let differences = tree::differences(&expected.root, found.path(), &expected.implied);
        let unknown = differences.into_iter().filter(|line| !unpacked::is_known(tag, line));
        complaints.extend(unknown.map(|line| format!("{name}:{tag}: {line}")));
        drop(found);
        fs::remove_dir_all(place).unwrap();
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn single_layers_under_overlayfs_are_the_merged_tree() {
    const NAME: &str = "single_layers_under_overlayfs_are_the_merged_tree";
    let Some(images) = laboratory(NAME) else { return };
    if !unpacked::has_overlayfs() {
        return skip(NAME, "this kernel has no overlayfs");
    }
    let (layout, work) = (images.join("whiteouts"), scratch("stacked-"));
    let mut complaints = Vec::new();
    for tag in unpacked::tags(&layout) {
        if unpacked::NOT_ALONE.iter().any(|(name, _)| *name == tag) {
            continue;
        }
        let place = work.path().join("unpacked");
        let mut expected = umoci_unpack(&layout, &tag, &place);
        // A directory that a layer does not describe has made-up attributes there, which hide the lower layer's.
        for digest in unpacked::layers(&layout, &tag) {
            let blob = unpacked::blob(&layout, &digest);
            expected.implied.extend(unpacked::parents_without_entry(&blob));
        }
        let layers: Vec<_> = tars(&layout, &tag)
            .into_iter()
            .enumerate()
            .map(|(n, tar)| mounted(TreeMode::Overlay, &[tar], &work.path().join(n.to_string())))
            .collect();
        let stack = Stack::mount(&layers, &work.path().join("stack"));
        let differences = tree::differences(&expected.root, &stack.0, &expected.implied);
        let unknown = differences
            .into_iter()
            .filter(|line| !unpacked::is_known(&tag, line) && !unpacked::is_links_only(line));
        complaints.extend(unknown.map(|line| format!("{tag}: {line}")));
        drop(stack);
        fs::remove_dir_all(place).unwrap();
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// Overlayfs over mounted layers, the lowest first; unmounted when dropped.
struct Stack(PathBuf);

impl Stack {
    fn mount(layers: &[Mounted], at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        let lower: Vec<_> = layers
            .iter()
            .rev()
            .map(|layer| layer.path().to_str().unwrap())
            .collect();
        let options = format!("ro,lowerdir={}", lower.join(":"));
        let mut command = Command::new("mount");
        common::succeed(command.args(["-t", "overlay", "overlay", "-o", &options]).arg(at));
        Self(at.to_owned())
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        oracle::unmount(&self.0);
    }
}
