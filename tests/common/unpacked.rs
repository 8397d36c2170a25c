//! Images as `umoci unpack` unpacks them: what a mounted one has to be like.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

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

/// Unpacks an image into the directory `to`, which must not exist, and returns the root filesystem in there. umoci 0.4
/// knows no zstd: where the layout has the same image without under `TAG-unpack`, that is unpacked.
pub(crate) fn umoci_unpack(layout: &Path, tag: &str, to: &Path) -> PathBuf {
    let without_zstd = format!("{tag}-unpack");
    let tag = if tags(layout).contains(&without_zstd) {
        &without_zstd
    } else {
        tag
    };
    let mut command = Command::new("umoci");
    command
        .args(["unpack", "--image"])
        .arg(format!("{}:{tag}", layout.display()))
        .arg(to);
    succeed(&mut command);
    to.join("rootfs")
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
