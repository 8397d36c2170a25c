//! Manifests, indexes and image configurations: OCI's (image specification 1.1) and Docker's (schema 2). In: JSON from a
//! registry or a layout, its digest already checked. Out: descriptors of the layers, or of an index's manifests; or why this is no
//! image that can be mounted.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::lenient::{digest_in_any_case, null_is_empty, nulls_are_empty, texts_of_an_object, whole_number};
use super::platform::Platform;
use crate::digest::Digest;
use crate::http::{excerpt, meant_url};
use crate::layer::LayerType;

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
        let urls: Vec<_> = self.urls.iter().take(MOST_URLS).map(|url| meant_url(url)).collect();
        let place = if urls.is_empty() {
            "its manifest does not say where it is".to_owned()
        } else {
            excerpt(&format!("its publisher has it at {}", urls.join(", ")))
        };
        Some(format!(
            "it is a foreign layer ({}), which registries and layouts need not hold, and it is not here; {place}; use a copy of \
             the image that includes it",
            excerpt(&self.media_type)
        ))
    }
}

/// So many places of a foreign layer are shown.
const MOST_URLS: usize = 4;

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
    #[serde(default, deserialize_with = "texts_of_an_object")]
    annotations: BTreeMap<String, String>,
    #[serde(default, rename = "fsLayers", deserialize_with = "null_is_empty")]
    fs_layers: Vec<serde::de::IgnoredAny>,
}

/// A manifest or an index.
#[derive(Clone, Debug)]
pub enum Manifest {
    /// Of one image.
    Image {
        /// Its configuration.
        config: Box<Descriptor>,
        /// The lowest first.
        layers: Vec<Descriptor>,
        /// What it says of the image besides.
        annotations: BTreeMap<String, String>,
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
    pub fn parse(bytes: &[u8], media_type: &str) -> Result<Self, String> {
        Self::parse_all(bytes, media_type).map_err(|why| excerpt(&why))
    }

    fn parse_all(bytes: &[u8], media_type: &str) -> Result<Self, String> {
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
            (false, None, Some(config), layers) => Self::image(
                config,
                layers.unwrap_or_default(),
                document.annotations,
                &document.artifact_type,
            ),
            _ => Err("the manifest is not clearly one of an image or of an index".to_owned()),
        }
    }

    fn image(
        config: Descriptor,
        layers: Vec<Descriptor>,
        annotations: BTreeMap<String, String>,
        artifact_type: &str,
    ) -> Result<Self, String> {
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
        Ok(Self::Image {
            config: Box::new(config),
            layers,
            annotations,
        })
    }
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
            .map_err(|error| excerpt(&format!("the image's configuration makes no sense: {error}")))?;
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
    use super::super::choice::Wanted;
    use super::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

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
