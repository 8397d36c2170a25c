//! Manifests, indexes and image configurations: OCI's (image specification 1.1) and Docker's (schema 2). In: JSON from a
//! registry or a layout, its digest already checked. Out: which layers, in which coding; or why this is no image that can be
//! mounted.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::layer::LayerType;
use crate::source::without_secrets;

/// No manifest or index is longer (the distribution specification's limit).
pub(super) const LONGEST_MANIFEST: u64 = 4 << 20;
/// No configuration is longer; history and labels make it grow.
pub(super) const LONGEST_CONFIG: u64 = 8 << 20;
/// Container runtimes stop far below.
const MOST_LAYERS: usize = 1024;
/// So many manifests of an index are looked at.
const MOST_MANIFESTS: usize = 10_000;

/// OCI's manifest.
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// OCI's index.
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// Docker's manifest.
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
/// Docker's list of manifests.
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const EMPTY_CONFIG: &str = "application/vnd.oci.empty.v1+json";

/// Points at content (image specification, "Descriptors").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub media_type: String,
    /// Of its bytes.
    #[serde(deserialize_with = "digest_in_any_case")]
    pub digest: Digest,
    /// In bytes.
    #[serde(deserialize_with = "whole_number")]
    pub size: u64,
    /// Who else has it, where registries need not.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_empty")]
    pub urls: Vec<String>,
    /// What else is said of it.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "nulls_are_empty"
    )]
    pub annotations: BTreeMap<String, String>,
    /// The kind of artifact, where a list names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Where it runs, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

impl Descriptor {
    /// Why a layer that is not where it was looked for may be missing, in words that fit behind "NAME: "; none of a layer that
    /// every registry has to hold.
    #[must_use]
    pub fn foreign(&self) -> Option<String> {
        let is_foreign = LayerType::parse(&self.media_type).is_ok_and(|kind| kind.foreign);
        if !is_foreign && self.urls.is_empty() {
            return None;
        }
        let urls: Vec<_> = self
            .urls
            .iter()
            .take(MOST_URLS)
            .map(|url| without_secrets(url))
            .collect();
        let place = if urls.is_empty() {
            "its manifest does not say where it is".to_owned()
        } else {
            format!("its publisher has it at {}", urls.join(", "))
        };
        Some(format!(
            "it is a foreign layer ({}), which registries and layouts need not hold, and it is not here; {place}; use a copy of \
             the image that includes it",
            self.media_type
        ))
    }
}

/// So many places of a foreign layer are shown.
const MOST_URLS: usize = 4;

/// What Go writes for something empty is `null` as well.
pub(super) fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// The same for every value of a map.
fn nulls_are_empty<'de, D>(deserializer: D) -> Result<BTreeMap<String, String>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let map: Option<BTreeMap<String, Option<String>>> = Option::deserialize(deserializer)?;
    let pairs = map.unwrap_or_default().into_iter();
    Ok(pairs.map(|(key, value)| (key, value.unwrap_or_default())).collect())
}

/// A digest whose hexadecimal digits some tools write in upper case.
fn digest_in_any_case<'de, D>(deserializer: D) -> Result<Digest, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let text = String::deserialize(deserializer)?;
    text.to_ascii_lowercase().parse().map_err(serde::de::Error::custom)
}

/// A number that tools without integers write with a fraction of zero.
fn whole_number<'de, D>(deserializer: D) -> Result<u64, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let number = serde_json::Number::deserialize(deserializer)?;
    let text = number.to_string();
    let whole = text.strip_suffix(".0").unwrap_or(&text);
    whole
        .parse()
        .map_err(|_| serde::de::Error::custom(format!("{text} is no length in bytes")))
}

/// A list of descriptors of which some may make no sense: those are passed over, because the others do not depend on them.
fn descriptors_that_make_sense<'de, D>(deserializer: D) -> Result<Option<Vec<Descriptor>>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    let entries: Option<Vec<serde_json::Value>> = Option::deserialize(deserializer)?;
    let readable = |entry: serde_json::Value| match Descriptor::deserialize(entry) {
        Ok(descriptor) => Some(descriptor),
        Err(error) => {
            log::info!("an entry of a list of manifests makes no sense: {error}");
            None
        }
    };
    Ok(entries.map(|entries| entries.into_iter().filter_map(readable).collect()))
}

/// A list of manifests: an index, or what refers to something.
#[derive(Debug, Default, Deserialize)]
pub(super) struct ManifestList {
    /// Its entries, without those that make no sense.
    #[serde(default, deserialize_with = "descriptors_that_make_sense")]
    pub(super) manifests: Option<Vec<Descriptor>>,
}

/// `os/arch[/variant]`, as Go names them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`; empty where nothing is said.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub os: String,
    /// `amd64`, `arm64`, …; empty where nothing is said.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub architecture: String,
    /// `v7`, `v8`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// Linux on this machine's processor.
    #[must_use]
    pub fn here() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "x86" => ("386", None),
            "aarch64" => ("arm64", None),
            "arm" => ("arm", Some("v7")),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        }
    }

    /// The same with the level of this processor, where images are made for several: what it runs beside what is meant by default.
    fn here_at_best() -> Self {
        #[cfg(target_arch = "x86_64")]
        return Self {
            variant: level_of_processor().map(str::to_owned),
            ..Self::here()
        };
        #[cfg(not(target_arch = "x86_64"))]
        Self::here()
    }

    /// The names that Go has for what others call otherwise (containerd's platforms package, "Normalize").
    fn normal(&self) -> Self {
        let os = match self.os.to_ascii_lowercase().as_str() {
            "" => "linux".to_owned(),
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        let said = self.variant.as_deref().unwrap_or_default().to_ascii_lowercase();
        let (architecture, variant) = match self.architecture.to_ascii_lowercase().as_str() {
            "x86_64" | "x86-64" => ("amd64".to_owned(), said),
            "i386" => ("386".to_owned(), String::new()),
            "aarch64" => ("arm64".to_owned(), said),
            "armhf" => ("arm".to_owned(), "v7".to_owned()),
            "armel" => ("arm".to_owned(), "v6".to_owned()),
            other => (other.to_owned(), said),
        };
        Self {
            os,
            architecture,
            variant: Some(variant).filter(|variant| !variant.is_empty()),
        }
    }

    /// Whether nothing is said of the processor: then the image's configuration may say more, or it is for any.
    fn is_unsaid(&self) -> bool {
        self.architecture.is_empty()
    }

    /// How well `offered` serves a machine that is this; less is better, none is not at all.
    fn distance(&self, offered: &Self) -> Option<u32> {
        let (wanted, offered) = (self.normal(), offered.normal());
        if wanted.os != offered.os {
            return None;
        }
        // What is meant where nothing is said (containerd's defaults).
        let usual = match wanted.architecture.as_str() {
            "arm64" => "v8",
            "arm" => "v7",
            "amd64" => "v1",
            _ => "",
        };
        let level = |platform: &Self| {
            let variant = platform.variant.as_deref().unwrap_or(usual);
            match variant.strip_prefix('v').unwrap_or(variant).parse::<u32>() {
                Ok(level) => Ok(level),
                Err(_) => Err(variant.to_owned()),
            }
        };
        match (wanted.architecture.as_str(), offered.architecture.as_str()) {
            (wanted_for, offered_for) if wanted_for == offered_for => match (level(&wanted), level(&offered)) {
                (Ok(wanted), Ok(offered)) => wanted.checked_sub(offered),
                (wanted, offered) => (wanted == offered).then_some(0),
            },
            // What these processors run too, when there is nothing better.
            ("amd64", "386") => Some(FOREIGN),
            ("arm64", "arm") => {
                let arm = Self {
                    architecture: "arm".to_owned(),
                    variant: Some("v8".to_owned()),
                    ..wanted
                };
                arm.distance(&offered).map(|distance| FOREIGN.saturating_add(distance))
            }
            _ => None,
        }
    }
}

/// The level of an x86-64 processor (System V ABI, "Micro-Architecture Levels").
#[cfg(target_arch = "x86_64")]
fn level_of_processor() -> Option<&'static str> {
    use std::arch::is_x86_feature_detected as has;
    let v2 = has!("cmpxchg16b") && has!("popcnt") && has!("sse4.2") && has!("ssse3");
    let v3 = v2 && has!("avx2") && has!("bmi1") && has!("bmi2") && has!("f16c") && has!("fma") && has!("lzcnt");
    let v4 = v3 && has!("avx512f") && has!("avx512bw") && has!("avx512cd") && has!("avx512dq") && has!("avx512vl");
    [(v4, "v4"), (v3, "v3"), (v2, "v2")]
        .into_iter()
        .find_map(|(has, level)| has.then_some(level))
}

/// For which machine an image is wanted.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) platform: Platform,
    /// Whether a person said so; else it is for this machine.
    pub(super) insisted: bool,
}

impl Wanted {
    /// What a person wants, or else this machine.
    pub(super) fn of(platform: Option<&Platform>) -> Self {
        Self {
            platform: platform.cloned().unwrap_or_else(Platform::here),
            insisted: platform.is_some(),
        }
    }

    /// The manifest for it among an index's. Where there is none of the kind that is meant by default, one for just this
    /// processor is taken, unless a person said what to take.
    ///
    /// # Errors
    /// That there is none, and what there is.
    pub(super) fn choose<'a>(
        &self,
        manifests: impl IntoIterator<Item = &'a Descriptor, IntoIter: Clone>,
    ) -> Result<&'a Descriptor, String> {
        let manifests = manifests.into_iter();
        let chosen = choose(manifests.clone(), &self.platform);
        if chosen.is_err() && !self.insisted {
            return choose(manifests, &Platform::here_at_best()).or(chosen);
        }
        chosen
    }

    /// Whether it can use what is for `offered`.
    pub(super) fn can_use(&self, offered: &Platform) -> bool {
        let at_best = || !self.insisted && Platform::here_at_best().distance(offered).is_some();
        offered.is_unsaid() || self.platform.distance(offered).is_some() || at_best()
    }
}

/// The distance of a platform of another name that a processor runs too.
const FOREIGN: u32 = 1 << 16;

impl FromStr for Platform {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split('/').map(str::to_owned);
        let (os, architecture, variant) = (parts.next(), parts.next(), parts.next());
        let word =
            |part: &str| !part.is_empty() && part.bytes().all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c));
        match (os, architecture, variant, parts.next()) {
            (Some(os), Some(architecture), variant, None)
                if word(&os) && word(&architecture) && variant.as_deref().is_none_or(word) =>
            {
                let named = Self {
                    os,
                    architecture,
                    variant,
                };
                Ok(named.normal())
            }
            _ => Err("a platform is written os/arch or os/arch/variant, as linux/amd64 or linux/arm/v7".to_owned()),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// What a manifest's JSON says, whichever kind it is.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default, deserialize_with = "null_is_empty")]
    schema_version: u32,
    #[serde(default, deserialize_with = "null_is_empty")]
    media_type: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    artifact_type: String,
    #[serde(default, deserialize_with = "descriptors_that_make_sense")]
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    #[serde(default, rename = "fsLayers", deserialize_with = "null_is_empty")]
    fs_layers: Vec<serde::de::IgnoredAny>,
}

/// A manifest or an index.
#[derive(Clone, Debug)]
pub(super) enum Manifest {
    /// Of one image.
    Image {
        config: Descriptor,
        layers: Vec<Descriptor>,
    },
    /// Of several, for different machines.
    Index(Vec<Descriptor>),
}

/// What a media type says of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Image,
    Index,
    /// Something general, that could be either.
    Unsaid,
    Other,
}

impl Kind {
    fn of(media_type: &str) -> Self {
        match media_type {
            OCI_MANIFEST | DOCKER_MANIFEST => Self::Image,
            OCI_INDEX | DOCKER_LIST => Self::Index,
            "" | "application/json" | "application/octet-stream" | "binary/octet-stream" | "text/plain" => Self::Unsaid,
            _ => Self::Other,
        }
    }
}

/// The type without parameters, in lower case.
fn essence(media_type: &str) -> String {
    let essence = media_type.split(';').next().unwrap_or_default().trim();
    essence.to_ascii_lowercase()
}

impl Manifest {
    /// Reads what was delivered as `media_type`. OCI's and Docker's documents of one kind are read alike, whichever of the two
    /// the document and its delivery say it is: proxies change the one and not the other. An index and a manifest are never
    /// taken for each other: what two readers could take for two different things is nothing (CVE-2021-41190).
    ///
    /// # Errors
    /// What is wrong with it, or that it is no image, in words that fit behind "NAME: ".
    pub(super) fn parse(bytes: &[u8], media_type: &str) -> Result<Self, String> {
        let document: Document =
            serde_json::from_slice(bytes).map_err(|error| format!("the manifest makes no sense: {error}"))?;
        let (said, delivered) = (essence(&document.media_type), essence(media_type));
        let is_old = document.schema_version == 1 && document.config.is_none();
        if is_old || !document.fs_layers.is_empty() {
            return Err(
                "this is a manifest of Docker's schema 1, which has no digests of layers as they are; \
                        push the image again with a newer tool"
                    .to_owned(),
            );
        }
        // Programs in Go do not look at the number; one that does not exist yet may mean anything.
        if document.schema_version > 2 {
            return Err(format!("the manifest is of version {}, not 2", document.schema_version));
        }
        let manifests = document.manifests;
        let is_index = match (Kind::of(&said), Kind::of(&delivered)) {
            (Kind::Image, Kind::Index) | (Kind::Index, Kind::Image) => {
                return Err(format!(
                    "the manifest says it is {said:?} and was delivered as {delivered:?}"
                ));
            }
            (Kind::Index, _) | (Kind::Unsaid, Kind::Index) => true,
            (Kind::Image, _) | (Kind::Unsaid, Kind::Image) => false,
            (Kind::Unsaid, Kind::Unsaid) => manifests.is_some(),
            (Kind::Unsaid, Kind::Other) => return Err(format!("this is {delivered:?}, not an image")),
            (Kind::Other, _) => return Err(format!("this is {said:?}, not an image")),
        };
        match (is_index, manifests, document.config, document.layers) {
            (true, Some(manifests), None, None) if manifests.len() > MOST_MANIFESTS => {
                Err(format!("the index lists {} manifests", manifests.len()))
            }
            (true, manifests, None, None) => Ok(Self::Index(manifests.unwrap_or_default())),
            (false, None, Some(config), layers) => {
                Self::image(config, layers.unwrap_or_default(), &document.artifact_type)
            }
            _ => Err("the manifest is not clearly one of an image or of an index".to_owned()),
        }
    }

    fn image(config: Descriptor, layers: Vec<Descriptor>, artifact_type: &str) -> Result<Self, String> {
        let config_type = essence(&config.media_type);
        let is_image = match config_type.as_str() {
            OCI_CONFIG | DOCKER_CONFIG => true,
            // What old tools and registries call configurations of images (moby's list).
            "" | "application/octet-stream" | "application/json" | "text/html" => artifact_type.is_empty(),
            _ => false,
        };
        if !is_image {
            // OCI's empty configuration says nothing; there, and where a general type does, the artifact's own type does.
            let says_nothing = config_type == EMPTY_CONFIG || Kind::of(&config_type) == Kind::Unsaid;
            let kind = if says_nothing && !artifact_type.is_empty() {
                artifact_type
            } else {
                &config.media_type
            };
            let kind: String = kind.chars().take(200).collect();
            return Err(format!("this is an artifact of type {kind:?}, not a container image"));
        }
        if layers.len() > MOST_LAYERS {
            return Err(format!(
                "the image has {} layers; at most {MOST_LAYERS} can be used",
                layers.len()
            ));
        }
        Ok(Self::Image { config, layers })
    }
}

/// The manifest for `wanted` among an index's.
///
/// # Errors
/// That there is none, and what there is.
fn choose<'a>(
    manifests: impl IntoIterator<Item = &'a Descriptor, IntoIter: Clone>,
    wanted: &Platform,
) -> Result<&'a Descriptor, String> {
    let manifests = manifests.into_iter();
    let fitting = manifests.clone().filter_map(|descriptor| {
        let distance = wanted.distance(descriptor.platform.as_ref()?)?;
        Some((distance, descriptor))
    });
    // The first of the best: min_by_key keeps the order of equals.
    if let Some((_, best)) = fitting.min_by_key(|(distance, _)| *distance) {
        return Ok(best);
    }
    // A single manifest of which no platform is said: its configuration says it.
    let nameless = |descriptor: &&Descriptor| {
        let attestation = descriptor.annotations.contains_key("vnd.docker.reference.type");
        let unsaid = descriptor.platform.as_ref().is_none_or(Platform::is_unsaid);
        unsaid && descriptor.artifact_type.is_none() && !attestation
    };
    let mut unsaid = manifests.clone().filter(nameless);
    if let (Some(only), None) = (unsaid.next(), unsaid.next()) {
        return Ok(only);
    }
    let mut offered: Vec<String> = manifests
        .filter_map(|descriptor| descriptor.platform.as_ref())
        .filter(|platform| platform.os != "unknown" && !platform.is_unsaid())
        .map(ToString::to_string)
        .collect();
    offered.sort();
    offered.dedup();
    offered.truncate(20);
    Err(format!(
        "there is no image for {wanted} here, only for {}; choose with --platform",
        if offered.is_empty() {
            "none at all".to_owned()
        } else {
            offered.join(", ")
        }
    ))
}

/// What an image's configuration says that matters here.
#[derive(Clone, PartialEq, Eq)]
pub struct ImageConfig {
    /// For which machines.
    pub platform: Platform,
    /// The digests of the layers' uncompressed tars, in order.
    pub diff_ids: Vec<Digest>,
    /// The configuration's own digest.
    pub digest: Digest,
    /// The JSON as it is.
    pub json: Vec<u8>,
}

impl fmt::Debug for ImageConfig {
    /// Without the JSON: people put secrets into their images' environments.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImageConfig")
            .field("platform", &self.platform)
            .field("diff_ids", &self.diff_ids)
            .field("digest", &self.digest)
            .finish_non_exhaustive()
    }
}

impl ImageConfig {
    /// Reads a configuration for an image of `layers` layers.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(super) fn parse(json: Vec<u8>, digest: Digest, layers: usize) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Config {
            #[serde(flatten)]
            platform: Platform,
            #[serde(default, deserialize_with = "null_is_empty")]
            rootfs: RootFs,
        }
        #[derive(Default, Deserialize)]
        struct RootFs {
            #[serde(default, deserialize_with = "null_is_empty")]
            diff_ids: Vec<Digest>,
        }
        let config: Config = serde_json::from_slice(&json)
            .map_err(|error| format!("the image's configuration makes no sense: {error}"))?;
        let diff_ids = config.rootfs.diff_ids;
        if diff_ids.len() != layers {
            return Err(format!(
                "the manifest has {layers} layers and the configuration {}",
                diff_ids.len()
            ));
        }
        Ok(Self {
            platform: config.platform,
            diff_ids,
            digest,
            json,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn entry(platform: Option<&str>, digest_of: &str) -> Descriptor {
        Descriptor {
            media_type: OCI_MANIFEST.into(),
            digest: Digest::of(Algorithm::Sha256, digest_of.as_bytes()),
            size: 1,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
            artifact_type: None,
            platform: platform.map(|platform| platform.parse().unwrap()),
        }
    }

    fn chosen(offered: &[Option<&str>], wanted: &str) -> Option<usize> {
        let manifests: Vec<_> = offered
            .iter()
            .enumerate()
            .map(|(n, platform)| entry(*platform, &n.to_string()))
            .collect();
        let best = choose(&manifests, &wanted.parse().unwrap()).ok()?;
        manifests.iter().position(|descriptor| descriptor == best)
    }

    #[test]
    fn the_best_platform_is_chosen() {
        let usual = [
            Some("linux/amd64"),
            Some("linux/arm/v5"),
            Some("linux/arm/v7"),
            Some("linux/arm64/v8"),
        ];
        assert_eq!(chosen(&usual, "linux/amd64"), Some(0));
        assert_eq!(chosen(&usual, "linux/x86_64"), Some(0));
        assert_eq!(chosen(&usual, "linux/arm"), Some(2));
        assert_eq!(chosen(&usual, "linux/arm/v6"), Some(1));
        assert_eq!(chosen(&usual, "linux/arm64"), Some(3));
        assert_eq!(chosen(&usual, "linux/s390x"), None);
        assert_eq!(chosen(&usual, "windows/amd64"), None);
        let levels = [Some("linux/amd64/v3"), Some("linux/amd64/v2"), Some("linux/amd64")];
        assert_eq!(chosen(&levels, "linux/amd64"), Some(2));
        assert_eq!(chosen(&levels, "linux/amd64/v3"), Some(0));
        assert_eq!(chosen(&levels[..2], "linux/amd64"), None);
        // Without a wish, what just this processor runs is better than nothing.
        let here = Platform::here_at_best();
        let only = entry(Some(&here.to_string()), "");
        assert_eq!(Wanted::of(None).choose([&only]), Ok(&only));
        assert!(Wanted::of(None).can_use(&here));
        if here.variant.is_some() {
            assert!(
                Wanted::of(Some(&Platform { variant: None, ..here }))
                    .choose([&only])
                    .is_err()
            );
        }
        assert_eq!(chosen(&[Some("unknown/unknown"), None], "linux/amd64"), Some(1));
        assert_eq!(chosen(&[None, None], "linux/amd64"), None);
        assert_eq!(chosen(&[], "linux/amd64"), None);
        // What a processor runs too, when there is nothing better (containerd's platforms package, "Only").
        let others = [Some("linux/386"), Some("linux/arm/v6"), Some("linux/arm/v7")];
        assert_eq!(chosen(&others, "linux/amd64"), Some(0));
        assert_eq!(chosen(&others, "linux/arm64"), Some(2));
        assert_eq!(chosen(&others, "linux/386"), Some(0));
        assert_eq!(
            chosen(&[Some("linux/386"), Some("linux/amd64")], "linux/amd64"),
            Some(1)
        );
        assert_eq!(chosen(&[Some("linux/amd64"), Some("linux/arm64")], "linux/386"), None);
        let odd = |os: &str, architecture: &str| {
            let mut odd = entry(None, "");
            odd.platform = Some(Platform {
                os: os.into(),
                architecture: architecture.into(),
                variant: Some(String::new()),
            });
            choose([&odd], &"linux/amd64".parse().unwrap()).is_ok()
        };
        for (os, architecture) in [
            ("", ""),
            ("linux", ""),
            ("", "amd64"),
            ("Linux", "X86_64"),
            ("linux", "x86-64"),
        ] {
            assert!(odd(os, architecture), "{os}/{architecture}");
        }
        for (os, architecture) in [("windows", "amd64"), ("linux", "aarch64"), ("unknown", "unknown")] {
            assert!(!odd(os, architecture), "{os}/{architecture}");
        }
        assert!("linux".parse::<Platform>().is_err() && "a/b/c/d".parse::<Platform>().is_err());
    }

    fn parse(json: &str, media_type: &str) -> Result<Manifest, String> {
        Manifest::parse(json.as_bytes(), media_type)
    }

    #[test]
    fn manifests_are_read() {
        let config = format!(r#"{{"mediaType":"{OCI_CONFIG}","digest":"{D}","size":2}}"#);
        let layer = format!(r#"{{"mediaType":"x","digest":"{D}","size":3,"annotations":null}}"#);
        let image = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[{layer}]}}"#);
        assert!(matches!(parse(&image, OCI_MANIFEST), Ok(Manifest::Image { layers, .. }) if layers.len() == 1));
        assert!(matches!(parse(&image, "application/json"), Ok(Manifest::Image { .. })));
        let index = format!(r#"{{"schemaVersion":2,"manifests":[{layer}]}}"#);
        assert!(matches!(parse(&index, OCI_INDEX), Ok(Manifest::Index(list)) if list.len() == 1));
        let both = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[],"manifests":[]}}"#);
        // OCI's and Docker's names of one kind are read alike, and so is what a server calls a document that knows its type.
        let typed = |json: &str, kind: &str| json.replacen('{', &format!(r#"{{"mediaType":"{kind}","#), 1);
        for (said, delivered) in [
            (DOCKER_MANIFEST, OCI_MANIFEST),
            (OCI_MANIFEST, DOCKER_MANIFEST),
            (DOCKER_MANIFEST, "text/html"),
            (
                OCI_MANIFEST,
                "Application/VND.oci.image.manifest.v1+JSON; charset=utf-8",
            ),
        ] {
            assert!(
                matches!(parse(&typed(&image, said), delivered), Ok(Manifest::Image { .. })),
                "{delivered}"
            );
        }
        for (said, delivered) in [(DOCKER_LIST, OCI_INDEX), (OCI_INDEX, DOCKER_LIST)] {
            assert!(
                matches!(parse(&typed(&index, said), delivered), Ok(Manifest::Index(_))),
                "{delivered}"
            );
        }
        let lies = format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[]}}"#);
        let list_of_docker = typed(&index, DOCKER_LIST);
        let artifact = image.replace(OCI_CONFIG, "application/vnd.cncf.helm.config.v1+json");
        for (json, media_type, word) in [
            (both.as_str(), OCI_MANIFEST, "not clearly"),
            (both.as_str(), OCI_INDEX, "not clearly"),
            (&index, OCI_MANIFEST, "not clearly"),
            (&lies, OCI_MANIFEST, "delivered as"),
            (&list_of_docker, OCI_MANIFEST, "delivered as"),
            (&typed(&image, DOCKER_MANIFEST), OCI_INDEX, "delivered as"),
            (&typed(&both, OCI_MANIFEST), DOCKER_MANIFEST, "not clearly"),
            (&artifact, OCI_MANIFEST, "artifact"),
            (r#"{"schemaVersion":1,"fsLayers":[]}"#, "", "schema 1"),
            (r#"{"schemaVersion":3}"#, OCI_MANIFEST, "version 3"),
            (&image, "text/html", "not an image"),
            ("{", OCI_MANIFEST, "no sense"),
            (&image.replace(D, "sha256:1"), OCI_MANIFEST, "not a digest"),
            (&image.replace("\"size\":3", "\"size\":-3"), OCI_MANIFEST, "no sense"),
        ] {
            let error = parse(json, media_type).unwrap_err();
            assert!(error.contains(word), "{json}: {error}");
        }
    }

    /// What programs in Go write and read (their zero values), and what other tools make of it.
    #[test]
    fn documents_are_read_as_programs_in_go_read_them() {
        let config = format!(r#""config":{{"mediaType":"{OCI_CONFIG}","digest":"{D}","size":2}}"#);
        let layer = |more: &str| format!(r#""layers":[{{"digest":"{D}","size":3{more}}}]"#);
        let upper = D[7..].to_uppercase();
        for (json, layers) in [
            (format!(r#"{{"schemaVersion":2,{config}}}"#), 0),
            (format!(r#"{{"schemaVersion":2,{config},"layers":null}}"#), 0),
            (format!(r#"{{"schemaVersion":2,{config},"layers":[]}}"#), 0),
            (format!(r"{{{config},{}}}", layer("")), 1),
            (format!(r#"{{"schemaVersion":1,{config},{}}}"#, layer("")), 1),
            (
                format!(
                    r#"{{"schemaVersion":null,"mediaType":null,"fsLayers":null,"manifests":null,"subject":null,"annotations":null,{config},{}}}"#,
                    layer("")
                ),
                1,
            ),
            (
                format!(r#"{{"fsLayers":[],"artifactType":"x/y",{config},{}}}"#, layer("")),
                1,
            ),
            (
                format!(
                    r"{{{config},{}}}",
                    layer(r#","mediaType":null,"urls":null,"annotations":{"a":null},"platform":{"os":null}"#)
                ),
                1,
            ),
            (
                format!(r#"{{{config},"layers":[{{"digest":"sha256:{upper}","size":3.0}}]}}"#),
                1,
            ),
        ] {
            match parse(&json, OCI_MANIFEST) {
                Ok(Manifest::Image { layers: read, .. }) => {
                    assert_eq!(read.len(), layers, "{json}");
                    assert!(
                        read.iter()
                            .all(|layer| layer.size == 3 && layer.digest.to_string() == D)
                    );
                }
                other => panic!("{json}: {other:?}"),
            }
        }
        for json in ["{}", r#"{"manifests":null}"#] {
            assert!(
                matches!(parse(json, OCI_INDEX), Ok(Manifest::Index(list)) if list.is_empty()),
                "{json}"
            );
        }
        // An entry that makes no sense does not take the others with it.
        let index = format!(
            r#"{{"manifests":[{{"digest":"md5:0","size":1}},{{"digest":"{D}","size":-1}},{{"digest":"{D}","size":1}}]}}"#
        );
        assert!(matches!(parse(&index, DOCKER_LIST), Ok(Manifest::Index(list)) if list.len() == 1));
        for (config, fits) in [
            (r#"{"rootfs":{}}"#, true),
            ("{}", true),
            (r#"{"rootfs":null,"os":null,"architecture":null,"variant":null}"#, true),
            (r#"{"os":"Linux","architecture":"x86_64"}"#, true),
            (r#"{"os":"linux","architecture":"386"}"#, true),
            (r#"{"os":"windows","architecture":"amd64"}"#, false),
        ] {
            let config = ImageConfig::parse(config.as_bytes().to_vec(), D.parse().unwrap(), 0).unwrap();
            let wanted = Wanted::of(Some(&"linux/amd64".parse().unwrap()));
            assert_eq!(wanted.can_use(&config.platform), fits, "{:?}", config.platform);
        }
    }

    #[test]
    fn artifacts_are_told_from_images_by_their_configurations_type() {
        let with = |kind: &str, more: &str| {
            let json = format!(r#"{{"config":{{"mediaType":"{kind}","digest":"{D}","size":2}},"layers":[]{more}}}"#);
            parse(&json, DOCKER_MANIFEST)
        };
        for kind in [
            OCI_CONFIG,
            DOCKER_CONFIG,
            "application/octet-stream",
            "application/json",
            "text/html",
            "Text/HTML; charset=utf-8",
            "",
        ] {
            assert!(with(kind, "").is_ok(), "{kind}");
        }
        let typed = r#","artifactType":"application/vnd.example.thing""#;
        for (kind, more, word) in [
            (
                "application/vnd.cncf.helm.config.v1+json",
                "",
                "application/vnd.cncf.helm.config.v1+json",
            ),
            (
                "application/vnd.cncf.helm.config.v1+json",
                typed,
                "application/vnd.cncf.helm.config.v1+json",
            ),
            (
                "application/vnd.docker.plugin.v1+json",
                "",
                "application/vnd.docker.plugin.v1+json",
            ),
            (EMPTY_CONFIG, "", EMPTY_CONFIG),
            (EMPTY_CONFIG, typed, "application/vnd.example.thing"),
            ("", typed, "application/vnd.example.thing"),
        ] {
            let error = with(kind, more).unwrap_err();
            assert!(error.contains("artifact") && error.contains(word), "{kind}: {error}");
        }
    }

    #[test]
    fn the_configuration_has_to_fit() {
        let json = format!(r#"{{"architecture":"arm64","os":"linux","variant":"v8","rootfs":{{"diff_ids":["{D}"]}}}}"#);
        let parse = |layers| ImageConfig::parse(json.clone().into_bytes(), D.parse().unwrap(), layers);
        let config = parse(1).unwrap();
        assert_eq!(config.platform.to_string(), "linux/arm64/v8");
        let can_use = |wanted: &str| Wanted::of(Some(&wanted.parse().unwrap())).can_use(&config.platform);
        assert!(can_use("linux/arm64") && !can_use("linux/amd64"));
        assert!(parse(2).unwrap_err().contains("2 layers"));
    }
}
