//! An image as a registry serves it. In: an image in an OCI layout. Out: two repositories on the origin that hold it, one with
//! the indexes of its layers published beside it, one without, so that `tarblk mount docker://…` can be measured as typed.
//!
//! What is served is what the layout has, byte for byte; only the indexes and what refers to them is made here, as
//! `tarblk index push` makes it.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use serde::Deserialize;

use super::origin::Origin;
use super::stage::{Layer, MountArguments, Stage, tar_option};
use super::whiteouts::Whiteouts;
use super::{BenchError, Watch};
use crate::digest::{Algorithm, Digest};
use crate::index::Index;
use crate::open::{artifact, publish};
use crate::source::registry::{self, BlobPlace, Descriptor, ImageName, LayoutName, OCI_INDEX, OCI_MANIFEST};

/// The repository with indexes beside the image.
const INDEXED: &str = "indexed";
/// The same image alone.
const ALONE: &str = "alone";
/// The only tag in both.
const TAG: &str = "latest";
/// No manifest is longer.
const LONGEST_MANIFEST: u64 = 4 << 20;

/// What of a manifest is needed to serve it.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    #[serde(default)]
    media_type: Option<String>,
    config: Descriptor,
}

/// A list of manifests that refer to another (distribution specification, "Listing Referrers").
#[derive(Debug, serde::Serialize)]
#[serde(rename_all = "camelCase")]
struct Referrers {
    schema_version: u32,
    media_type: &'static str,
    manifests: Vec<Descriptor>,
}

impl Stage<'_> {
    /// Serves an image of a layout, its layers' indexes, and the merged filesystem if a row needs that.
    pub(super) fn set_registry(&mut self, layout: &LayoutName, watch: &mut dyn Watch) -> Result<(), BenchError> {
        let name = ImageName::Layout(layout.clone());
        let failed = || BenchError::step(format!("{name}: cannot serve it"));
        let found = registry::resolve(&name, &registry::RegistryOptions::default());
        let image = found.map_err(|error| failed()(io::Error::other(error)))?;
        let origin = Origin::start().map_err(BenchError::step("cannot start an HTTP origin on loopback"))?;
        let place = |digest: &Digest| {
            let blobs = layout.dir.join("blobs").join(digest.algorithm().name());
            blobs.join(digest.hex())
        };
        let manifest = read_small(&place(&image.manifest_digest)).map_err(failed())?;
        let said: Manifest = serde_json::from_slice(&manifest).map_err(|e| failed()(e.into()))?;
        let kind = said.media_type.as_deref().unwrap_or(OCI_MANIFEST);
        for repository in [INDEXED, ALONE] {
            for version in [TAG, &image.manifest_digest.to_string()] {
                origin.serve_typed(
                    &format!("/v2/{repository}/manifests/{version}"),
                    kind,
                    manifest.as_slice(),
                );
            }
            self.serve(
                &origin,
                &blob_path(repository, &said.config.digest),
                &place(&said.config.digest),
            )?;
        }
        let none = referrers(Vec::new());
        let of_image = |repository: &str| format!("/v2/{repository}/referrers/{}", image.manifest_digest);
        origin.serve_typed(&of_image(ALONE), OCI_INDEX, none);

        let mut listed = Vec::new();
        for (number, layer) in image.layers.iter().enumerate() {
            watch.step(&format!("reading layer {} of {}", number + 1, image.layers.len()), 0, 0);
            let BlobPlace::File(blob) = &layer.place else {
                return Err(failed()(io::Error::other("a layer is not in the layout")));
            };
            let digest = &layer.descriptor.digest;
            let file = self.scratch().join(format!("layer-{number}.tarblk"));
            self.index(blob.as_ref(), &file, true)?;
            let bad = |cause| failed()(io::Error::other(cause));
            let index = Index::open(fs::read(&file).map_err(failed())?).map_err(bad)?;
            let entry = publish::listed(&index, digest);
            for repository in [INDEXED, ALONE] {
                self.serve(&origin, &blob_path(repository, digest), blob)?;
            }
            self.serve(&origin, &blob_path(INDEXED, &entry.digest), &file)?;
            self.layers.push(Layer {
                url: origin.url(&blob_path(ALONE, digest)),
                blob_bytes: layer.descriptor.size,
                tar_bytes: index.summary().tar_bytes,
                decompress: tar_option(index.identity().coding),
                whiteouts: Some(Whiteouts::of(&index).map_err(bad)?),
            });
            self.layer_bytes += layer.descriptor.size;
            listed.push(entry);
        }
        let len = u64::try_from(manifest.len()).unwrap_or(u64::MAX);
        let bytes = artifact::manifest(&listed, Some((kind, &image.manifest_digest, len)));
        let entry = artifact::manifest_descriptor(&bytes);
        origin.serve_typed(
            &format!("/v2/{INDEXED}/manifests/{}", entry.digest),
            OCI_MANIFEST,
            bytes,
        );
        origin.serve_typed(&of_image(INDEXED), OCI_INDEX, referrers(vec![entry]));
        origin.serve_blob(
            &blob_path(INDEXED, &Digest::of(Algorithm::Sha256, artifact::EMPTY_CONFIG)),
            artifact::EMPTY_CONFIG,
        );
        self.serve_merged(&origin, name.to_string().as_ref(), watch)?;
        let given = |repository: &str, index: &str| MountArguments {
            source: format!("docker://{}/{repository}:{TAG}", origin.address()),
            options: ["--plain-http", "--index", index, "--trust", "registry"]
                .map(Into::into)
                .to_vec(),
        };
        self.indexed = given(INDEXED, "require");
        self.unindexed = given(ALONE, "auto");
        self.begin(origin);
        Ok(())
    }
}

fn blob_path(repository: &str, digest: &Digest) -> String {
    format!("/v2/{repository}/blobs/{digest}")
}

fn referrers(manifests: Vec<Descriptor>) -> Vec<u8> {
    let list = Referrers {
        schema_version: 2,
        media_type: OCI_INDEX,
        manifests,
    };
    // Strings and numbers: nothing of it can fail.
    serde_json::to_vec(&list).unwrap_or_default()
}

fn read_small(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(LONGEST_MANIFEST).read_to_end(&mut bytes)?;
    Ok(bytes)
}
