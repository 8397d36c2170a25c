//! Images: in a registry, or in a directory with the OCI layout. In: a name as containers-transports(5) spells it. Out: an
//! [`Image`]: its layers in order, where each one's bytes are, and what they have to be.
//!
//! Nothing is believed that can be checked: manifests, indexes and configurations are compared with their digests before
//! they are read, and their sizes are bounded. Layers are checked by whoever reads them.
//!
//! Parts: `reference` (names), `hosts` (which servers), `credentials` and `challenge` (logging in), `session` (requests),
//! `access` (a blob's bytes, now and later), `client` (reading and writing for those who may wait), `manifest`, `oci_layout`.

mod access;
mod challenge;
mod client;
mod credentials;
mod hosts;
mod manifest;
mod oci_layout;
mod reference;
mod session;

use std::path::PathBuf;

pub use access::{BlobAccess, Located};
pub use client::{BlobHead, Fetched, Registry};
pub use credentials::{Keyring, Login};
pub use hosts::DEFAULT_HOSTS_DIR;
pub use manifest::{
    DOCKER_LIST, DOCKER_MANIFEST, Descriptor, ImageConfig, LayerCoding, OCI_INDEX, OCI_MANIFEST, Platform,
};
pub use reference::{ImageName, LayoutName, Reference, Version};

use super::SourceError;
use super::http::Patience;
use crate::digest::Digest;
use manifest::{LONGEST_CONFIG, LONGEST_MANIFEST, Manifest};
use oci_layout::Layout;

/// An index in an index in an index is somebody's joke.
const DEEPEST_INDEX: usize = 4;

/// How registries are talked to.
#[derive(Clone, Debug)]
pub struct RegistryOptions {
    /// For which machine; this one, if none.
    pub platform: Option<Platform>,
    /// Whether the registry that is named speaks HTTP without TLS.
    pub plain_http: bool,
    /// Where credentials are.
    pub keyring: Keyring,
    /// containerd's directory of `hosts.toml` files.
    pub hosts_dir: PathBuf,
    /// How long to wait.
    pub patience: Patience,
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            platform: None,
            plain_http: false,
            keyring: Keyring::default(),
            hosts_dir: DEFAULT_HOSTS_DIR.into(),
            patience: Patience::default(),
        }
    }
}

/// An image that was found.
#[derive(Clone, Debug)]
pub struct Image {
    /// What was named, for messages.
    pub name: String,
    /// Of the image's own manifest, not of the index it was chosen from.
    pub manifest_digest: Digest,
    /// The lowest first.
    pub layers: Vec<ImageLayer>,
    /// What it says of itself.
    pub config: ImageConfig,
}

/// One layer of an image.
#[derive(Clone, Debug)]
pub struct ImageLayer {
    /// What the manifest says of it.
    pub descriptor: Descriptor,
    /// How its tar is packed, by its media type.
    pub coding: LayerCoding,
    /// Of the uncompressed tar, from the configuration.
    pub diff_id: Option<Digest>,
    /// Where its bytes are.
    pub place: BlobPlace,
}

/// Where a blob is.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum BlobPlace {
    /// In this file.
    File(PathBuf),
    /// In a registry.
    Registry(BlobAccess),
}

/// Finds an image and everything about it but its layers' bytes. Waits, with deadlines; must not be called from within a
/// runtime.
///
/// # Errors
/// [`SourceError`], in one line that names the image, the cause and what to do.
pub fn resolve(name: &ImageName, options: &RegistryOptions) -> Result<Image, SourceError> {
    let place = match name {
        ImageName::Registry(reference) => Holder::Registry(Registry::new(reference, options)?),
        ImageName::Layout(layout) => Holder::Layout(Layout::open(&layout.dir)?),
    };
    let bad = |why: String| SourceError::Image {
        name: name.to_string(),
        why,
    };
    let wanted = options.platform.clone().unwrap_or_else(Platform::here);
    let mut fetched = match (&place, name) {
        (Holder::Registry(registry), ImageName::Registry(reference)) => registry.manifest(&reference.version)?,
        (Holder::Layout(layout), ImageName::Layout(name)) => place.manifest(&layout.find(name)?)?,
        _ => unreachable!("the place was made from the name"),
    };
    for _ in 0..DEEPEST_INDEX {
        match Manifest::parse(&fetched.bytes, &fetched.media_type).map_err(bad)? {
            Manifest::Index(manifests) => {
                let chosen = manifest::choose(&manifests, &wanted).map_err(bad)?;
                fetched = place.manifest(chosen)?;
            }
            Manifest::Image { config, layers } => {
                let json = place.small(&config, "configuration", LONGEST_CONFIG)?;
                let config = ImageConfig::parse(json, config.digest, layers.len()).map_err(bad)?;
                if !config.serves(&wanted) {
                    if options.platform.is_some() {
                        return Err(bad(format!("the image is for {}, not for {wanted}", config.platform)));
                    }
                    log::warn!("{name}: the image is for {}; this machine is {wanted}", config.platform);
                }
                let layers = layers.into_iter().zip(&config.diff_ids).enumerate();
                let layers = layers.map(|(number, (descriptor, diff_id))| {
                    let coding = LayerCoding::of(&descriptor.media_type)
                        .map_err(|why| bad(format!("layer {} of {} {why}", number + 1, config.diff_ids.len())))?;
                    Ok(ImageLayer {
                        place: place.blob(&descriptor)?,
                        coding,
                        diff_id: Some(diff_id.clone()),
                        descriptor,
                    })
                });
                let layers = layers.collect::<Result<_, SourceError>>()?;
                return Ok(Image {
                    name: name.to_string(),
                    manifest_digest: fetched.digest,
                    layers,
                    config,
                });
            }
        }
    }
    Err(bad("indexes within indexes without end".to_owned()))
}

/// Where an image's parts are.
enum Holder {
    Registry(Registry),
    Layout(Layout),
}

impl Holder {
    /// A manifest that another one, or the layout's index, names.
    fn manifest(&self, descriptor: &Descriptor) -> Result<Fetched, SourceError> {
        match self {
            Self::Registry(registry) => {
                let fetched = registry.manifest(&Version::Digest(descriptor.digest.clone()))?;
                if !u64::try_from(fetched.bytes.len()).is_ok_and(|len| len == descriptor.size) {
                    return Err(SourceError::Image {
                        name: format!("{}@{}", registry.name(), descriptor.digest),
                        why: format!(
                            "it is {} bytes long, and the index says {}",
                            fetched.bytes.len(),
                            descriptor.size
                        ),
                    });
                }
                Ok(fetched)
            }
            Self::Layout(layout) => Ok(Fetched {
                bytes: layout.small(descriptor, "manifest", LONGEST_MANIFEST)?,
                media_type: descriptor.media_type.clone(),
                digest: descriptor.digest.clone(),
            }),
        }
    }

    fn small(&self, descriptor: &Descriptor, what: &'static str, most: u64) -> Result<Vec<u8>, SourceError> {
        match self {
            Self::Registry(registry) => registry.small_blob(&descriptor.digest, descriptor.size, most),
            Self::Layout(layout) => layout.small(descriptor, what, most),
        }
    }

    fn blob(&self, descriptor: &Descriptor) -> Result<BlobPlace, SourceError> {
        Ok(match self {
            Self::Registry(registry) => BlobPlace::Registry(registry.blob(&descriptor.digest, descriptor.size)),
            Self::Layout(layout) => BlobPlace::File(layout.path(descriptor)?),
        })
    }
}
