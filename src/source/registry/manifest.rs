//! Manifests, indexes and image configurations: OCI's (image specification 1.1) and Docker's (schema 2). In: JSON from a
//! registry or a layout, its digest already checked. Out: which layers, in which coding; or why this is no image that can be
//! mounted.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

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

/// Points at content (image specification, "Descriptors").
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    #[serde(default)]
    pub media_type: String,
    /// Of its bytes.
    pub digest: Digest,
    /// In bytes.
    pub size: u64,
    /// What else is said of it.
    #[serde(
        default,
        skip_serializing_if = "BTreeMap::is_empty",
        deserialize_with = "null_is_empty"
    )]
    pub annotations: BTreeMap<String, String>,
    /// The kind of artifact, where a list names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Where it runs, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
}

/// What Go writes for something empty is `null` as well.
pub(super) fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// `os/arch[/variant]`, as Go names them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`.
    #[serde(default)]
    pub os: String,
    /// `amd64`, `arm64`, …
    #[serde(default)]
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

    /// How well `offered` serves somebody who wants this; less is better, none is not at all.
    fn distance(&self, offered: &Self) -> Option<u32> {
        if self.os != offered.os || self.architecture != offered.architecture {
            return None;
        }
        // What is meant where nothing is said (containerd's defaults).
        let usual = match self.architecture.as_str() {
            "arm64" => "v8",
            "arm" => "v7",
            "amd64" => "v1",
            _ => "",
        };
        let level = |platform: &Self| {
            let variant = platform.variant.as_deref().filter(|variant| !variant.is_empty());
            let variant = variant.unwrap_or(usual);
            match variant.strip_prefix('v').unwrap_or(variant).parse::<u32>() {
                Ok(level) => Ok(level),
                Err(_) => Err(variant.to_owned()),
            }
        };
        match (level(self), level(offered)) {
            (Ok(wanted), Ok(offered)) => wanted.checked_sub(offered),
            (wanted, offered) => (wanted == offered).then_some(0),
        }
    }
}

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
                let architecture = match architecture.as_str() {
                    "x86_64" | "x86-64" => "amd64".to_owned(),
                    "aarch64" => "arm64".to_owned(),
                    _ => architecture,
                };
                Ok(Self {
                    os,
                    architecture,
                    variant,
                })
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

/// How a layer's tar is packed, by its media type.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LayerCoding {
    /// Not at all.
    Plain,
    /// gzip.
    Gzip,
    /// zstd.
    Zstd,
}

impl LayerCoding {
    /// The coding that a layer's media type names.
    ///
    /// # Errors
    /// What else it is, in words that fit behind "layer N ".
    pub fn of(media_type: &str) -> Result<Self, String> {
        // Parameters and case do not count.
        let plain = media_type
            .split(';')
            .next()
            .unwrap_or_default()
            .trim()
            .to_ascii_lowercase();
        match plain.as_str() {
            "application/vnd.oci.image.layer.v1.tar"
            | "application/vnd.docker.image.rootfs.diff.tar"
            | "application/vnd.docker.container.image.rootfs.diff" => Ok(Self::Plain),
            "application/vnd.oci.image.layer.v1.tar+gzip" | "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
                Ok(Self::Gzip)
            }
            "application/vnd.oci.image.layer.v1.tar+zstd" | "application/vnd.docker.image.rootfs.diff.tar.zstd" => {
                Ok(Self::Zstd)
            }
            foreign if foreign.contains("nondistributable") || foreign.contains(".foreign.") => Err(format!(
                "is foreign ({foreign}): its publisher does not let registries hand it out, so it cannot be read from here"
            )),
            "" => Err("has no media type".to_owned()),
            sealed if sealed.ends_with("+encrypted") => {
                Err(format!("is encrypted ({sealed}); decrypt the image first"))
            }
            other => Err(format!(
                "is of type {other:?}, which is not a tar layer; plain, gzip and zstd ones can be read"
            )),
        }
    }
}

/// What a manifest's JSON says, whichever kind it is.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    #[serde(default)]
    schema_version: u32,
    #[serde(default)]
    media_type: Option<String>,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    #[serde(rename = "fsLayers")]
    fs_layers: Option<serde::de::IgnoredAny>,
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

impl Manifest {
    /// Reads what was delivered as `media_type`.
    ///
    /// # Errors
    /// What is wrong with it, or that it is no image, in words that fit behind "NAME: ".
    pub(super) fn parse(bytes: &[u8], media_type: &str) -> Result<Self, String> {
        let document: Document =
            serde_json::from_slice(bytes).map_err(|error| format!("the manifest makes no sense: {error}"))?;
        if document.fs_layers.is_some() || document.schema_version == 1 {
            return Err(
                "this is a manifest of Docker's schema 1, which has no digests of layers as they are; \
                        push the image again with a newer tool"
                    .to_owned(),
            );
        }
        if document.schema_version != 2 {
            return Err(format!("the manifest is of version {}, not 2", document.schema_version));
        }
        let delivered = media_type.split(';').next().unwrap_or_default().trim();
        let said = document.media_type.as_deref().unwrap_or_default();
        // What two readers could take for two different things is nothing (CVE-2021-41190).
        let generic = ["", "application/json", "application/octet-stream", "text/plain"];
        if !said.is_empty() && !generic.contains(&delivered) && said != delivered {
            return Err(format!(
                "the manifest says it is {said:?} and was delivered as {delivered:?}"
            ));
        }
        let kind = if said.is_empty() { delivered } else { said };
        let is_index = match kind {
            OCI_INDEX | DOCKER_LIST => true,
            OCI_MANIFEST | DOCKER_MANIFEST => false,
            other if generic.contains(&other) => document.manifests.is_some(),
            other => return Err(format!("this is {other:?}, not an image")),
        };
        match (is_index, document.manifests, document.config, document.layers) {
            (true, Some(manifests), None, None) if manifests.len() <= MOST_MANIFESTS => Ok(Self::Index(manifests)),
            (true, Some(manifests), None, None) => Err(format!("the index lists {} manifests", manifests.len())),
            (false, None, Some(config), Some(layers)) => Self::image(config, layers),
            _ => Err("the manifest is not clearly one of an image or of an index".to_owned()),
        }
    }

    fn image(config: Descriptor, layers: Vec<Descriptor>) -> Result<Self, String> {
        if config.media_type != OCI_CONFIG && config.media_type != DOCKER_CONFIG {
            return Err(format!(
                "this is an artifact of type {:?}, not a container image",
                config.media_type
            ));
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
pub(super) fn choose<'a>(manifests: &'a [Descriptor], wanted: &Platform) -> Result<&'a Descriptor, String> {
    let fitting = manifests.iter().filter_map(|descriptor| {
        let distance = wanted.distance(descriptor.platform.as_ref()?)?;
        Some((distance, descriptor))
    });
    // The first of the best: min_by_key keeps the order of equals.
    if let Some((_, best)) = fitting.min_by_key(|(distance, _)| *distance) {
        return Ok(best);
    }
    // A single manifest for nobody in particular: its configuration says for whom.
    let nameless = |descriptor: &&Descriptor| {
        let attestation = descriptor.annotations.contains_key("vnd.docker.reference.type");
        descriptor.platform.is_none() && descriptor.artifact_type.is_none() && !attestation
    };
    let mut anybody = manifests.iter().filter(nameless);
    if let (Some(only), None) = (anybody.next(), anybody.next()) {
        return Ok(only);
    }
    let mut offered: Vec<String> = manifests
        .iter()
        .filter_map(|descriptor| descriptor.platform.as_ref())
        .filter(|platform| platform.os != "unknown")
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
            rootfs: RootFs,
        }
        #[derive(Deserialize)]
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

    /// Whether somebody who wants `wanted` can use this image.
    pub(super) fn serves(&self, wanted: &Platform) -> bool {
        wanted.distance(&self.platform).is_some()
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
        assert_eq!(chosen(&[Some("unknown/unknown"), None], "linux/amd64"), Some(1));
        assert_eq!(chosen(&[None, None], "linux/amd64"), None);
        assert_eq!(chosen(&[], "linux/amd64"), None);
        assert!("linux".parse::<Platform>().is_err() && "a/b/c/d".parse::<Platform>().is_err());
    }

    #[test]
    fn layers_are_told_apart() {
        let gzip = [
            "application/vnd.oci.image.layer.v1.tar+gzip",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
        ];
        assert!(gzip.iter().all(|text| LayerCoding::of(text) == Ok(LayerCoding::Gzip)));
        assert_eq!(
            LayerCoding::of("application/vnd.oci.image.layer.v1.tar"),
            Ok(LayerCoding::Plain)
        );
        assert_eq!(
            LayerCoding::of("application/vnd.oci.image.layer.v1.tar+zstd"),
            Ok(LayerCoding::Zstd)
        );
        for (text, word) in [
            ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "foreign"),
            ("application/vnd.oci.image.layer.nondistributable.v1.tar", "foreign"),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "encrypted"),
            ("application/vnd.in-toto+json", "not a tar layer"),
            ("", "no media type"),
        ] {
            assert!(LayerCoding::of(text).unwrap_err().contains(word), "{text}");
        }
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
        let lies = format!(r#"{{"schemaVersion":2,"mediaType":"{OCI_INDEX}","manifests":[]}}"#);
        let artifact = image.replace(OCI_CONFIG, "application/vnd.cncf.helm.config.v1+json");
        for (json, media_type, word) in [
            (both.as_str(), OCI_MANIFEST, "not clearly"),
            (both.as_str(), OCI_INDEX, "not clearly"),
            (&index, OCI_MANIFEST, "not clearly"),
            (&lies, OCI_MANIFEST, "delivered as"),
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

    #[test]
    fn the_configuration_has_to_fit() {
        let json = format!(r#"{{"architecture":"arm64","os":"linux","variant":"v8","rootfs":{{"diff_ids":["{D}"]}}}}"#);
        let parse = |layers| ImageConfig::parse(json.clone().into_bytes(), D.parse().unwrap(), layers);
        let config = parse(1).unwrap();
        assert_eq!(config.platform.to_string(), "linux/arm64/v8");
        assert!(config.serves(&"linux/arm64".parse().unwrap()));
        assert!(!config.serves(&"linux/amd64".parse().unwrap()));
        assert!(parse(2).unwrap_err().contains("2 layers"));
    }
}
