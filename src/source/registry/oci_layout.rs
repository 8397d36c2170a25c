//! Images in a directory (OCI image layout 1.0). In: the directory and what is wanted of it. Out: manifests and small blobs,
//! checked, and the paths of layers.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::choice::Wanted;
use super::manifest::{Descriptor, LONGEST_MANIFEST, ManifestList};
use super::reference::{LayoutName, Version};
use crate::source::SourceError;

/// Under which annotations a layout's manifests are named, by OCI and by containerd.
const NAMES: [&str; 2] = ["org.opencontainers.image.ref.name", "io.containerd.image.name"];

/// The names of an entry of a layout's index.
fn names(descriptor: &Descriptor) -> Vec<String> {
    NAMES
        .iter()
        .filter_map(|key| descriptor.annotations.get(*key).cloned())
        .collect()
}

/// A directory with the layout.
#[derive(Debug)]
pub(super) struct Layout {
    dir: PathBuf,
}

impl Layout {
    pub(super) fn open(dir: &Path) -> Result<Self, SourceError> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Marker {
            image_layout_version: String,
        }
        let layout = Self { dir: dir.to_owned() };
        let path = dir.join("oci-layout");
        let marker = read(&path, 4 << 10)?;
        let marker: Marker =
            serde_json::from_slice(&marker).map_err(|error| layout.bad(format!("oci-layout: {error}")))?;
        if marker.image_layout_version != "1.0.0" {
            let version: String = marker.image_layout_version.chars().take(20).collect();
            return Err(layout.bad(format!("it has layout version {version:?}, not 1.0.0")));
        }
        Ok(layout)
    }

    fn bad(&self, why: String) -> SourceError {
        SourceError::Image {
            name: format!("oci:{}", self.dir.display()),
            why,
        }
    }

    /// The descriptor of what is named. Several of one name are one image for several platforms (image specification issue
    /// 581): then `wanted` chooses, as in an index.
    pub(super) fn find(&self, name: &LayoutName, wanted: &Wanted) -> Result<Descriptor, SourceError> {
        let bytes = read(&self.dir.join("index.json"), LONGEST_MANIFEST)?;
        let index: ManifestList =
            serde_json::from_slice(&bytes).map_err(|error| self.bad(format!("index.json: {error}")))?;
        let all = index.manifests.unwrap_or_default();
        let named: Vec<&Descriptor> = match &name.version {
            Some(Version::Digest(digest)) => all
                .iter()
                .filter(|descriptor| descriptor.digest == *digest)
                .take(1)
                .collect(),
            Some(Version::Tag(tag)) => all
                .iter()
                .filter(|descriptor| names(descriptor).contains(tag))
                .collect(),
            None => {
                let images: Vec<_> = all
                    .iter()
                    .filter(|descriptor| descriptor.artifact_type.is_none())
                    .collect();
                let one_name = images.windows(2).all(|pair| names(pair[0]) == names(pair[1]));
                if one_name { images } else { Vec::new() }
            }
        };
        let has_platforms = named.iter().any(|descriptor| descriptor.platform.is_some());
        match named[..] {
            [] => {}
            [only] => return Ok(only.clone()),
            [..] if has_platforms => {
                let chosen = wanted.choose(named.iter().copied()).map_err(|why| self.bad(why))?;
                return Ok(chosen.clone());
            }
            // With nothing to tell them apart the first is as good as any, if it was named.
            [first, ..] if name.version.is_some() => return Ok(first.clone()),
            [..] => {}
        }
        let mut offered: Vec<String> = all
            .iter()
            .flat_map(names)
            .collect::<BTreeSet<_>>()
            .into_iter()
            .collect();
        offered.truncate(20);
        let offered = if offered.is_empty() {
            "nothing with a name".to_owned()
        } else {
            offered.join(", ")
        };
        Err(self.bad(match &name.version {
            Some(version) => format!("there is no {version} in it; it holds {offered}"),
            None => format!(
                "it holds {} images; name one behind the directory, as in oci:DIR:TAG: {offered}",
                all.len()
            ),
        }))
    }

    /// Where a blob is. Only a regular file of the right length is one.
    pub(super) fn path(&self, descriptor: &Descriptor) -> Result<PathBuf, SourceError> {
        let Descriptor { digest, size, .. } = descriptor;
        let path = self
            .dir
            .join("blobs")
            .join(digest.algorithm().name())
            .join(digest.hex());
        let meta = std::fs::metadata(&path).map_err(|source| match descriptor.foreign() {
            Some(why) if source.kind() == io::ErrorKind::NotFound => self.bad(format!("layer {digest}: {why}")),
            None if source.kind() == io::ErrorKind::NotFound => self.bad(format!(
                "blob {digest} is not in it, though a manifest names it: the copy is not complete; make it again"
            )),
            _ => SourceError::File {
                path: path.clone(),
                source,
            },
        })?;
        if !meta.is_file() || meta.len() != *size {
            return Err(self.bad(format!(
                "blob {digest} is {} bytes long and has to be {size}",
                meta.len()
            )));
        }
        Ok(path)
    }

    /// A small blob, whole, checked.
    pub(super) fn small(&self, descriptor: &Descriptor, what: &'static str, most: u64) -> Result<Vec<u8>, SourceError> {
        if descriptor.size > most {
            return Err(self.bad(format!(
                "the {what} is {} bytes long, and no more than {most} can be used",
                descriptor.size
            )));
        }
        let path = self.path(descriptor)?;
        let bytes = read(&path, descriptor.size)?;
        if !descriptor.digest.matches(&bytes) {
            return Err(SourceError::Digest {
                name: path.display().to_string(),
                what,
                expected: descriptor.digest.to_string(),
            });
        }
        Ok(bytes)
    }
}

/// Reads a file that is not longer than `most` bytes.
fn read(path: &Path, most: u64) -> Result<Vec<u8>, SourceError> {
    let failed = |source| SourceError::File {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(most.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > most) {
        return Err(failed(io::Error::other(format!("it is longer than {most} bytes"))));
    }
    Ok(bytes)
}
