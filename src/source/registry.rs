//! Images: in a registry, or in a directory with the OCI layout. In: a name as containers-transports(5) spells it. Out: an
//! [`Image`]: its layers in order, where each one's bytes are, and what they have to be.
//!
//! Nothing is believed that can be checked: manifests, indexes and configurations are compared with their digests before
//! they are read, and their sizes are bounded. Layers are checked where they are read.
//!
//! Parts: `reference` (names), `hosts` (which servers), `login`, `credentials`, `kept` and `challenge` (logging in), `session` (requests),
//! `redirect` (where storage is), `access` (a blob's bytes, now and later), `client` (reading and writing for callers that may
//! wait), `manifest` (documents), `lenient` (their fields as others write them), `platform` and `choice` (which image of an index),
//! `oci_layout`.

mod access;
mod answer;
mod challenge;
mod choice;
mod client;
mod credentials;
#[cfg(feature = "unstable-internals")]
pub mod fuzzing;
mod hosts;
mod kept;
mod lenient;
mod login;
mod manifest;
mod oci_layout;
mod pattern;
mod platform;
mod redirect;
mod reference;
mod session;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use access::{BlobAccess, BlobLocation};
pub use client::{BlobHead, Fetched, Registry};
pub use credentials::{Keyring, is_server};
pub use hosts::DEFAULT_HOSTS_DIR;
pub use kept::KeptLogins;
pub use login::{Login, LoginParts};
pub use manifest::{DOCKER_LIST, DOCKER_MANIFEST, Descriptor, ImageConfig, Manifest, OCI_INDEX, OCI_MANIFEST};
pub use pattern::RepositoryPattern;
pub use platform::Platform;
pub use reference::{ImageName, LayoutName, Reference, Version};

use super::error::SourceError;
use crate::digest::Digest;
use crate::http::HttpOptions;
use crate::layer::LayerType;
use choice::Wanted;
use manifest::{LONGEST_CONFIG, LONGEST_MANIFEST};
use oci_layout::Layout;

/// The deepest nesting of indexes that is followed; builders make one level, or two.
const DEEPEST_INDEX: usize = 4;

/// When servers are asked what a name means, as podman's `--pull` has it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// Each time, and without an answer there is nothing.
    Always,
    /// Each time; when there is no answer, what it meant the last time is used, if that is known.
    #[default]
    Newer,
    /// Only when it is not known what it meant the last time.
    Missing,
    /// Never: what is not known and kept is not there.
    Never,
}

/// What a tag meant the last time that its registry was asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownTag {
    /// Of the manifest.
    pub digest: Digest,
    /// When that was.
    pub at: SystemTime,
}

/// A name that was not asked for, or in vain: what it meant before is used.
#[derive(Clone, Debug)]
pub struct Recalled {
    /// When it meant that.
    pub at: SystemTime,
    /// Why the server did not say; none if it was not asked.
    pub because: Option<String>,
}

/// So long a registry is waited for that need not answer, unless a person wants to wait for longer than usual.
const SPARE_PATIENCE: Duration = Duration::from_secs(10);

/// How long a server is waited for when it can be done without.
#[must_use]
pub fn patience_to_spare(http: &HttpOptions) -> Duration {
    if http.retry.deadline > HttpOptions::default().retry.deadline {
        http.retry.deadline
    } else {
        SPARE_PATIENCE
    }
}

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
    pub http: HttpOptions,
    /// When they are asked what a name means; no request is sent at all under [`PullPolicy::Never`].
    pub pull: PullPolicy,
    /// The cache for manifests and configurations; none are cached without.
    pub cache: Option<Arc<dyn SmallBlobCache>>,
}

/// A cache of manifests and configurations, so that they are asked for once. May forget anything at any time; what it gives back
/// is compared with the digest again.
pub trait SmallBlobCache: fmt::Debug + Send + Sync {
    /// What is cached under this digest: its media type and its bytes.
    fn get(&self, digest: &Digest) -> Option<(String, Vec<u8>)>;
    /// Caches it. A failure is logged by the cache and has no other effect.
    fn put(&self, digest: &Digest, media_type: &str, bytes: &[u8]);
    /// What an image's name with a tag meant the last time.
    fn tag(&self, name: &str) -> Option<KnownTag>;
    /// Notes what it means now.
    fn put_tag(&self, name: &str, digest: &Digest);
}

impl Default for RegistryOptions {
    fn default() -> Self {
        Self {
            platform: None,
            plain_http: false,
            keyring: Keyring::default(),
            hosts_dir: DEFAULT_HOSTS_DIR.into(),
            http: HttpOptions::default(),
            pull: PullPolicy::default(),
            cache: None,
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
    /// That manifest's JSON.
    pub manifest: Vec<u8>,
    /// The lowest first.
    pub layers: Vec<ImageLayer>,
    /// What the manifest says of the image besides; covered by its digest.
    pub annotations: BTreeMap<String, String>,
    /// What it says of itself.
    pub config: ImageConfig,
}

/// One layer of an image.
#[derive(Clone, Debug)]
pub struct ImageLayer {
    /// What the manifest says of it.
    pub descriptor: Descriptor,
    /// What its media type says; its first bytes know better.
    pub kind: LayerType,
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
    let found = find(name, options)?;
    let config = found.config()?;
    Ok(found.with(config))
}

/// An image whose manifest is here and whose configuration is not: what needs only the digests of its layers can be done
/// while [`config`](Self::config) waits for that.
#[derive(Debug)]
pub struct Found {
    name: ImageName,
    manifest: Fetched,
    layers: Vec<(Descriptor, LayerType, BlobPlace)>,
    annotations: BTreeMap<String, String>,
    config: Descriptor,
    holder: Holder,
    wanted: Wanted,
    recalled: Option<Recalled>,
}

/// Finds an image's manifest, through indexes if need be: in one request, or two. See [`resolve`].
///
/// # Errors
/// [`SourceError`].
pub fn find(name: &ImageName, options: &RegistryOptions) -> Result<Found, SourceError> {
    let bad = |why: String| SourceError::Image {
        name: name.to_string(),
        why,
    };
    let wanted = Wanted::of(options.platform.as_ref());
    let mut recalled = None;
    let (holder, mut fetched) = match name {
        ImageName::Registry(reference) => {
            let (registry, fetched, memory) = by_reference(name, reference, options)?;
            recalled = memory;
            (Holder::Registry(registry), fetched)
        }
        ImageName::Layout(name) => {
            let layout = Layout::open(&name.dir)?;
            let descriptor = layout.find(name, &wanted)?;
            let holder = Holder::Layout(layout);
            let fetched = holder.manifest(&descriptor)?;
            (holder, fetched)
        }
    };
    for _ in 0..DEEPEST_INDEX {
        match Manifest::parse(&fetched.bytes, &fetched.media_type).map_err(bad)? {
            Manifest::Index(manifests) => {
                let chosen = wanted.choose(&manifests).map_err(bad)?;
                fetched = holder.manifest(chosen)?;
            }
            Manifest::Image {
                config,
                layers,
                annotations,
            } => {
                let count = layers.len();
                let layers = layers.into_iter().enumerate().map(|(number, descriptor)| {
                    let kind = LayerType::parse(&descriptor.media_type)
                        .map_err(|why| bad(format!("layer {} of {count} ({}) {why}", number + 1, descriptor.digest)))?;
                    let place = holder.blob(&descriptor)?;
                    Ok((descriptor, kind, place))
                });
                let layers = layers.collect::<Result<_, SourceError>>()?;
                return Ok(Found {
                    name: name.clone(),
                    manifest: fetched,
                    layers,
                    annotations,
                    config: *config,
                    holder,
                    wanted,
                    recalled,
                });
            }
        }
    }
    Err(bad("indexes within indexes without end".to_owned()))
}

/// A manifest by its name, from the registry or from memory; in the latter case, that it was.
fn by_reference(
    name: &ImageName,
    reference: &Reference,
    options: &RegistryOptions,
) -> Result<(Registry, Fetched, Option<Recalled>), SourceError> {
    let registry = Registry::new(reference, options)?;
    let Version::Tag(_) = &reference.version else {
        let fetched = registry.manifest(&reference.version)?;
        return Ok((registry, fetched, None));
    };
    let title = name.to_string();
    // What is known of it, with its manifest.
    let known = || {
        let cache = options.cache.as_ref()?;
        let known = cache.tag(&title)?;
        let fetched = registry.cached_manifest(&known.digest)?;
        Some((fetched, known.at))
    };
    let known = match options.pull {
        PullPolicy::Always => None,
        PullPolicy::Newer | PullPolicy::Missing | PullPolicy::Never => known(),
    };
    let asked = match (&options.pull, &known) {
        (PullPolicy::Missing | PullPolicy::Never, Some(_)) => None,
        (PullPolicy::Newer, Some(_)) => {
            Some(registry.manifest_within(&reference.version, patience_to_spare(&options.http)))
        }
        _ => Some(registry.manifest(&reference.version)),
    };
    match (asked, known) {
        (Some(Ok(fetched)), _) => {
            if let Some(cache) = &options.cache {
                cache.put_tag(&title, &fetched.digest);
            }
            Ok((registry, fetched, None))
        }
        (Some(Err(error)), Some((fetched, at))) if error.may_pass() => {
            let because = Some(error.to_string());
            let offline = registry.offline(format!("and {} cannot be reached", reference.host));
            Ok((offline, fetched, Some(Recalled { at, because })))
        }
        (Some(Err(error)), _) => Err(error),
        (None, Some((fetched, at))) => Ok((registry, fetched, Some(Recalled { at, because: None }))),
        (None, None) => Err(registry.is_offline_error()),
    }
}

impl Found {
    /// That what the name means was not asked for now, or in vain; none if the registry has said it.
    #[must_use]
    pub const fn recalled(&self) -> Option<&Recalled> {
        self.recalled.as_ref()
    }

    /// Of the image's own manifest.
    #[must_use]
    pub const fn manifest_digest(&self) -> &Digest {
        &self.manifest.digest
    }

    /// What the manifest says of its layers, the lowest first.
    #[must_use]
    pub fn layers(&self) -> impl ExactSizeIterator<Item = &Descriptor> {
        self.layers.iter().map(|(descriptor, ..)| descriptor)
    }

    /// The repository that holds it, if it is in a registry.
    #[must_use]
    pub const fn registry(&self) -> Option<&Registry> {
        match &self.holder {
            Holder::Registry(registry) => Some(registry),
            Holder::Layout(_) => None,
        }
    }

    /// Brings the configuration, and compares it with what was wanted.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn config(&self) -> Result<ImageConfig, SourceError> {
        let bad = |why: String| SourceError::Image {
            name: self.name.to_string(),
            why,
        };
        let json = self.holder.small(&self.config, "configuration", LONGEST_CONFIG)?;
        let config = ImageConfig::parse(json, self.config.digest.clone(), self.layers.len()).map_err(bad)?;
        if !self.wanted.can_use(&config.platform) {
            if self.wanted.insisted {
                return Err(bad(format!(
                    "the image is for {}, not for {}",
                    config.platform, self.wanted.platform
                )));
            }
            log::warn!(
                "{}: the image is for {}; this machine is {}",
                self.name,
                config.platform,
                self.wanted.platform
            );
        }
        Ok(config)
    }

    /// The image as far as its manifest tells it: no layer has a diff ID, and the configuration is empty.
    #[must_use]
    pub fn by_manifest(&self) -> Image {
        self.image(ImageConfig {
            platform: self.wanted.platform.clone(),
            diff_ids: Vec::new(),
            digest: self.config.digest.clone(),
            json: Vec::new(),
        })
    }

    /// The whole image, with its configuration.
    #[must_use]
    pub fn with(self, config: ImageConfig) -> Image {
        self.image(config)
    }

    fn image(&self, config: ImageConfig) -> Image {
        let layers = self.layers.iter().cloned().enumerate();
        Image {
            name: self.name.to_string(),
            manifest_digest: self.manifest.digest.clone(),
            manifest: self.manifest.bytes.clone(),
            layers: layers
                .map(|(number, (descriptor, kind, place))| ImageLayer {
                    descriptor,
                    kind,
                    diff_id: config.diff_ids.get(number).cloned(),
                    place,
                })
                .collect(),
            annotations: self.annotations.clone(),
            config,
        }
    }
}

/// Where an image's parts are.
#[derive(Debug)]
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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};

    use url::Url;

    use super::challenge::Challenge;
    use super::*;

    proptest! {
        /// What strangers say never does more than make an error.
        #[test]
        fn nothing_that_is_read_panics(text in "\\PC{0,200}", kind in prop::sample::select(vec![OCI_INDEX, OCI_MANIFEST, ""])) {
            drop(Manifest::parse(text.as_bytes(), kind));
            drop(ImageConfig::parse(text.clone().into_bytes(), Digest::of(crate::digest::Algorithm::Sha256, b""), 1));
            drop(ImageName::parse(&text));
            drop(ImageName::parse(&format!("docker://{text}")));
            drop(ImageName::parse(&format!("oci:{text}")));
            drop(text.parse::<Platform>());
            drop(LayerType::parse(&text));
            for text in [text.clone(), format!("Bearer realm={text}"), format!("Basic x=\"{text}\", Bearer {text}")] {
                if let Ok(value) = HeaderValue::from_str(&text) {
                    let mut headers = HeaderMap::new();
                    headers.insert(WWW_AUTHENTICATE, value);
                    drop(Challenge::of(&headers, &Url::parse("https://host/v2/").unwrap()));
                }
            }
        }

        /// Names that are understood are understood again when they are shown.
        #[test]
        fn names_survive_being_shown(name in "([a-z0-9]{1,8}(\\.[a-z]{1,4})?(:[0-9]{1,5})?/)?[a-z0-9]{1,8}([._-][a-z0-9]{1,4})?(/[a-z]{1,5})?(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,12})?") {
            if let Ok(name) = ImageName::parse(&format!("docker://{name}")) {
                prop_assert_eq!(ImageName::parse(&name.to_string()), Ok(name));
            }
        }
    }
}
