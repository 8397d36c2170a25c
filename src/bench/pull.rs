//! An image of a registry, brought into a layout. In: its name. Out: a directory that the benchmark serves over a link that is the same
//! in every run, which the registry's is not. Everything in it was compared with its digest.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use super::{BenchError, Watch};
use crate::digest::Digest;
use crate::interrupt::{Interrupt, Interrupted};
use crate::source::registry::{
    self, Descriptor, ImageLayer, ImageName, LayoutName, OCI_INDEX, Reference, Registry, RegistryOptions, Version,
};
use crate::source::{self, SourceError};

/// Brings the image `reference` into the empty directory `dir`.
///
/// # Errors
/// [`BenchError::Download`]; [`BenchError::Step`] when it cannot be written down.
pub(super) fn pull(
    reference: &Reference,
    options: &RegistryOptions,
    dir: &Path,
    interrupt: &Interrupt,
    watch: &mut dyn Watch,
) -> Result<LayoutName, BenchError> {
    let name = ImageName::Registry(reference.clone());
    let failed = |source: Box<dyn std::error::Error + Send + Sync>| BenchError::Download {
        url: name.to_string(),
        source,
    };
    watch.step("looking for the image", 0, 0);
    let asked = || -> Result<_, SourceError> {
        let image = registry::resolve(&name, options)?;
        let own = Version::Digest(image.manifest_digest.clone());
        let manifest = Registry::new(reference, options)?.manifest(&own)?;
        Ok((image, manifest))
    };
    let (image, manifest) = asked().map_err(|error| failed(error.into()))?;
    let blobs = |digest: &Digest| dir.join("blobs").join(digest.algorithm().name()).join(digest.hex());
    let write = |digest: &Digest, bytes: &[u8]| -> io::Result<()> {
        let path = blobs(digest);
        path.parent().map_or(Ok(()), fs::create_dir_all)?;
        fs::write(path, bytes)
    };
    let cannot = || BenchError::step(format!("{}: cannot write the image into it", dir.display()));
    write(&image.config.digest, &image.config.json).map_err(cannot())?;
    write(&manifest.digest, &manifest.bytes).map_err(cannot())?;
    for (number, layer) in image.layers.iter().enumerate() {
        let path = blobs(&layer.descriptor.digest);
        if path.exists() {
            continue;
        }
        watch.step(
            &format!("downloading layer {} of {}", number + 1, image.layers.len()),
            0,
            0,
        );
        path.parent().map_or(Ok(()), fs::create_dir_all).map_err(cannot())?;
        let file = File::create(&path).map_err(cannot())?;
        bring(&name, layer, options, file, interrupt).map_err(|error| match error.downcast::<Interrupted>() {
            Ok(interrupted) => (*interrupted).into(),
            Err(error) => failed(error),
        })?;
    }
    let entry = Descriptor {
        media_type: manifest.media_type,
        digest: manifest.digest,
        size: u64::try_from(manifest.bytes.len()).unwrap_or(u64::MAX),
        urls: Vec::new(),
        annotations: std::collections::BTreeMap::new(),
        artifact_type: None,
        platform: None,
    };
    let index = serde_json::json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry] });
    fs::write(dir.join("index.json"), index.to_string()).map_err(cannot())?;
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).map_err(cannot())?;
    Ok(LayoutName {
        dir: dir.to_owned(),
        version: None,
    })
}

/// Writes a layer's blob into `file`, if it has its digest.
fn bring(
    image: &ImageName,
    layer: &ImageLayer,
    options: &RegistryOptions,
    mut file: File,
    interrupt: &Interrupt,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let blob = source::layer_blob(image, layer)?;
    let wanted = &layer.descriptor.digest;
    let mut hasher = wanted.algorithm().hasher();
    source::stream::<Box<dyn std::error::Error + Send + Sync>>(&blob, &options.http, &mut |bytes| {
        interrupt.check()?;
        hasher.update(bytes);
        Ok(file.write_all(bytes)?)
    })?;
    let found = hasher.finish();
    if found != *wanted {
        return Err(format!("{}: its digest is {found}", blob.name).into());
    }
    Ok(())
}
