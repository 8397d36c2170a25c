//! How indexes lie in a registry: manifests around them, tags, annotations. In: descriptors. Out: JSON, and back. No request is
//! made here; docs/index-format.md has it in words.

use std::collections::BTreeMap;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

use super::signature::Signature;
use crate::digest::{Algorithm, Digest};
use crate::profile::Profile;
use crate::source::registry::{Descriptor, OCI_MANIFEST, Version};

/// The kind of a manifest that holds indexes.
pub const ARTIFACT_TYPE: &str = "application/vnd.tarblk.index.v1";
/// The media type of an index file.
pub const INDEX_MEDIA_TYPE: &str = "application/vnd.tarblk.index.layer.v1";
/// On an index's descriptor: the digest of the layer's blob that it is of.
pub const LAYER_ANNOTATION: &str = "io.tarblk.index.layer";
/// On an index's descriptor: the length of its hot part, in bytes.
pub const HOT_SIZE_ANNOTATION: &str = "io.tarblk.index.hot-size";
/// On an index's descriptor: the digest of its hot part.
pub const HOT_DIGEST_ANNOTATION: &str = "io.tarblk.index.hot-digest";
/// On an index's descriptor: signatures that say that it is the layer's, `KEY:SIGNATURE` with semicolons between them.
pub const SIGNATURE_ANNOTATION: &str = "io.tarblk.index.signature";
/// On an image's artifact, and so on its entry in every list of what refers to the image: all of its indexes in short, so that who
/// has the list need not ask for the artifact. For each index the layer's digest, the index's, its length, its hot part's length
/// and digest, and the signatures if there are any, between spaces; a comma between two indexes. On an image's own manifest: the
/// indexes that the manifest names, which are believed as its layers are.
pub const LIST_ANNOTATION: &str = "io.tarblk.index.list";
/// On an image's artifact, and on an image's own manifest, beside [`LIST_ANNOTATION`]: what starts of the image read, a profile in base64.
/// Nobody believes it for anything but the order of fetches.
pub const PROFILE_ANNOTATION: &str = "io.tarblk.profile";
/// A header field of the answer to HEAD for a layer's blob: the digest of a blob of the same repository that is its index.
pub const LAZY_PULL_HEADER: &str = "LazyPull-Digest";

/// What the specification wants where an artifact has no configuration.
pub const EMPTY_CONFIG: &[u8] = b"{}";
const EMPTY_MEDIA_TYPE: &str = "application/vnd.oci.empty.v1+json";

/// No manifest of indexes is longer.
const LONGEST: usize = 4 << 20;

/// No profile in an annotation is longer, in bytes before base64: it comes with every list of what refers to the image.
const LONGEST_PROFILE: usize = 16 << 10;

/// The tag of the manifest that holds the index of the layer with this digest, in every repository that has one.
#[must_use]
pub fn layer_tag(layer: &Digest) -> Version {
    // A tag is at most 128 characters long; 64 hexadecimal digits tell SHA-512s apart as well as SHA-256s.
    let hex: String = layer.hex().chars().take(64).collect();
    Version::Tag(format!("{}-{hex}.tarblk-v1", layer.algorithm().name()))
}

/// An index as a manifest names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// The layer's blob.
    pub layer: Digest,
    /// The index file.
    pub digest: Digest,
    /// The index file's length, in bytes.
    pub size: u64,
    /// Its hot part: how long it is and its digest.
    pub hot: Option<(u64, Digest)>,
    /// Who says that it is the layer's.
    pub signatures: Vec<Signature>,
}

impl Listed {
    /// What is signed: that this index is the layer's. `None` where the hot part's digest is not known, because the hot part is all
    /// of an index that is looked at before it is believed.
    #[must_use]
    pub fn statement(&self) -> Option<Vec<u8>> {
        let (hot_len, hot_digest) = self.hot.as_ref()?;
        let Self {
            layer, digest, size, ..
        } = self;
        let text = format!(
            "tarblk index signature v1\nlayer {layer}\nindex {digest}\nsize {size}\nhot-size {hot_len}\nhot-digest {hot_digest}\n"
        );
        Some(text.into_bytes())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ArtifactManifest {
    schema_version: u32,
    #[serde(default)]
    media_type: String,
    #[serde(default)]
    artifact_type: Option<String>,
    config: Descriptor,
    layers: Vec<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subject: Option<Descriptor>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    annotations: Option<BTreeMap<String, String>>,
}

fn descriptor(media_type: &str, digest: Digest, size: u64) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        digest,
        size,
        urls: Vec::new(),
        annotations: BTreeMap::new(),
        artifact_type: None,
        platform: None,
    }
}

/// The descriptor of an artifact's configuration, which is [`EMPTY_CONFIG`].
#[must_use]
pub fn empty_config() -> Descriptor {
    let digest = Digest::of(Algorithm::Sha256, EMPTY_CONFIG);
    descriptor(EMPTY_MEDIA_TYPE, digest, 2)
}

/// A manifest that holds indexes: of one layer, or, with the image's manifest as `subject`, of an image's layers, the lowest
/// first. The same list always makes the same bytes.
#[must_use]
pub fn manifest(indexes: &[Listed], subject: Option<(&str, &Digest, u64)>) -> Vec<u8> {
    let layers = indexes.iter().map(|index| {
        let mut entry = descriptor(INDEX_MEDIA_TYPE, index.digest.clone(), index.size);
        entry
            .annotations
            .insert(LAYER_ANNOTATION.into(), index.layer.to_string());
        if let Some((len, digest)) = &index.hot {
            entry.annotations.insert(HOT_SIZE_ANNOTATION.into(), len.to_string());
            entry
                .annotations
                .insert(HOT_DIGEST_ANNOTATION.into(), digest.to_string());
        }
        if !index.signatures.is_empty() {
            let signatures = Signature::all_to_text(&index.signatures);
            entry.annotations.insert(SIGNATURE_ANNOTATION.into(), signatures);
        }
        entry
    });
    let manifest = ArtifactManifest {
        schema_version: 2,
        media_type: OCI_MANIFEST.to_owned(),
        artifact_type: Some(ARTIFACT_TYPE.to_owned()),
        config: empty_config(),
        layers: layers.collect(),
        annotations: subject
            .is_some()
            .then(|| BTreeMap::from([(LIST_ANNOTATION.to_owned(), in_short(indexes))])),
        subject: subject.map(|(media_type, digest, size)| descriptor(media_type, digest.clone(), size)),
    };
    // Strings and numbers: nothing of it can fail.
    serde_json::to_vec(&manifest).unwrap_or_default()
}

/// The descriptor of such a manifest, as a list of referrers has it: with its annotations.
#[must_use]
pub fn manifest_descriptor(manifest: &[u8]) -> Descriptor {
    let digest = Digest::of(Algorithm::Sha256, manifest);
    let mut entry = descriptor(OCI_MANIFEST, digest, u64::try_from(manifest.len()).unwrap_or(u64::MAX));
    entry.artifact_type = Some(ARTIFACT_TYPE.to_owned());
    if let Ok(ArtifactManifest {
        annotations: Some(annotations),
        ..
    }) = serde_json::from_slice(manifest)
    {
        entry.annotations = annotations;
    }
    entry
}

/// What [`LIST_ANNOTATION`] holds.
fn in_short(indexes: &[Listed]) -> String {
    let one = |index: &Listed| {
        let Listed {
            layer, digest, size, ..
        } = index;
        match &index.hot {
            Some((len, hot)) if index.signatures.is_empty() => format!("{layer} {digest} {size} {len} {hot}"),
            Some((len, hot)) => {
                let signatures = Signature::all_to_text(&index.signatures);
                format!("{layer} {digest} {size} {len} {hot} {signatures}")
            }
            None => format!("{layer} {digest} {size}"),
        }
    };
    indexes.iter().map(one).collect::<Vec<_>>().join(",")
}

/// The same manifest of an image, naming indexes of its layers: its annotations have [`LIST_ANNOTATION`], everything else in it
/// stays. Without signatures, because who believes the manifest needs none.
///
/// # Errors
/// What is wrong with the manifest, in words that fit behind "NAME: ".
pub fn naming(manifest: &[u8], indexes: &[Listed]) -> Result<Vec<u8>, String> {
    let unsigned = |index: &Listed| Listed {
        signatures: Vec::new(),
        ..index.clone()
    };
    let unsigned: Vec<Listed> = indexes.iter().map(unsigned).collect();
    annotated(manifest, LIST_ANNOTATION, &in_short(&unsigned))
}

/// The same manifest with a profile in its annotations, in place of one that is there; everything else in it stays. Of a long profile
/// what is likely to be read.
///
/// # Errors
/// What is wrong with the manifest, in words that fit behind "NAME: ".
pub fn with_profile(manifest: &[u8], profile: &Profile) -> Result<Vec<u8>, String> {
    let text = BASE64_STANDARD.encode(profile.to_bytes(LONGEST_PROFILE));
    annotated(manifest, PROFILE_ANNOTATION, &text)
}

/// The profile in annotations, if there is one that makes sense.
#[must_use]
pub fn profile_with(annotations: &BTreeMap<String, String>) -> Option<Profile> {
    let text = annotations.get(PROFILE_ANNOTATION)?;
    if text.len() > LONGEST_PROFILE * 2 {
        return None;
    }
    Profile::parse(&BASE64_STANDARD.decode(text).ok()?).ok()
}

/// The profile in a manifest's own annotations.
#[must_use]
pub fn profile_of(manifest: &[u8]) -> Option<Profile> {
    let manifest: ArtifactManifest = serde_json::from_slice(manifest).ok()?;
    profile_with(&manifest.annotations?)
}

/// An object of JSON whose values stay as they were written: numbers too long for any type of ours, and whatever else is in a manifest.
type Written = BTreeMap<String, Box<RawValue>>;

/// A manifest with another annotation.
fn annotated(manifest: &[u8], name: &str, text: &str) -> Result<Vec<u8>, String> {
    let mut document: Written =
        serde_json::from_slice(manifest).map_err(|error| format!("the manifest makes no sense: {error}"))?;
    let annotations = document.get("annotations").map_or("null", |value| value.get());
    let annotations: Option<Written> =
        serde_json::from_str(annotations).map_err(|_| "the manifest's annotations are no object")?;
    let mut annotations = annotations.unwrap_or_default();
    let unwritable = |error: serde_json::Error| format!("the manifest cannot be written: {error}");
    annotations.insert(name.to_owned(), to_raw_value(text).map_err(unwritable)?);
    document.insert(
        "annotations".to_owned(),
        to_raw_value(&annotations).map_err(unwritable)?,
    );
    serde_json::to_vec(&document).map_err(unwritable)
}

/// The indexes that annotations name: those of an artifact in a list of referrers, or those of an image's own manifest. None where
/// they do not, or not so that it makes sense.
#[must_use]
pub fn listed_with(annotations: &BTreeMap<String, String>) -> Option<Vec<Listed>> {
    let text = annotations.get(LIST_ANNOTATION)?;
    let one = |text: &str| {
        let mut words = text.split(' ');
        let mut word = || words.next();
        let (layer, digest, size) = (word()?.parse().ok()?, word()?.parse().ok()?, word()?.parse().ok()?);
        let hot = match word() {
            None => None,
            Some(len) => Some((len.parse().ok()?, word()?.parse().ok()?)),
        };
        let signatures = match word() {
            None => Vec::new(),
            Some(text) => Some(Signature::parse_all(text)).filter(|all| !all.is_empty())?,
        };
        word().is_none().then_some(Listed {
            layer,
            digest,
            size,
            hot,
            signatures,
        })
    };
    text.split(',').map(one).collect()
}

/// The indexes that a manifest holds. Other things in it, and entries that make no sense, are passed over.
///
/// # Errors
/// That it is no manifest of indexes, in words that fit behind "NAME: ".
pub fn parse(manifest: &[u8]) -> Result<Vec<Listed>, String> {
    if manifest.len() > LONGEST {
        return Err("its manifest is too long".to_owned());
    }
    let manifest: ArtifactManifest =
        serde_json::from_slice(manifest).map_err(|error| format!("its manifest makes no sense: {error}"))?;
    if manifest.artifact_type.as_deref() != Some(ARTIFACT_TYPE) {
        return Err(format!("it is no artifact of type {ARTIFACT_TYPE}"));
    }
    let listed = manifest.layers.into_iter().filter_map(|entry| {
        let note = |name: &str| entry.annotations.get(name);
        let layer = note(LAYER_ANNOTATION)?.parse().ok()?;
        let hot = note(HOT_SIZE_ANNOTATION).and_then(|len| len.parse().ok());
        let hot = hot.zip(note(HOT_DIGEST_ANNOTATION).and_then(|digest| digest.parse().ok()));
        let signatures = note(SIGNATURE_ANNOTATION).map(|text| Signature::parse_all(text));
        (entry.media_type == INDEX_MEDIA_TYPE).then_some(Listed {
            layer,
            digest: entry.digest.clone(),
            size: entry.size,
            hot,
            signatures: signatures.unwrap_or_default(),
        })
    });
    Ok(listed.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(text: &str) -> Digest {
        Digest::of(Algorithm::Sha256, text.as_bytes())
    }

    #[test]
    fn a_manifest_comes_back() {
        let listed = [
            Listed {
                layer: digest("layer"),
                digest: digest("index"),
                size: 1234,
                hot: Some((1000, digest("hot"))),
                signatures: vec![Signature {
                    key: crate::fetch::KeyId([7; 32]),
                    bytes: vec![1; 64],
                }],
            },
            Listed {
                layer: Digest::of(Algorithm::Sha512, b"other"),
                digest: digest("other index"),
                size: 5,
                hot: None,
                signatures: Vec::new(),
            },
        ];
        let image = digest("image");
        let bytes = manifest(&listed, Some((OCI_MANIFEST, &image, 700)));
        assert_eq!(bytes, manifest(&listed, Some((OCI_MANIFEST, &image, 700))));
        assert_eq!(parse(&bytes).unwrap(), listed);
        let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        assert_eq!(json["subject"]["digest"], image.to_string());
        assert_eq!(json["config"]["digest"], digest("{}").to_string());
        assert_eq!(json["artifactType"], ARTIFACT_TYPE);
        assert!(!String::from_utf8(manifest(&listed, None)).unwrap().contains("subject"));
        let described = manifest_descriptor(&bytes);
        assert!(described.digest.matches(&bytes));
        assert_eq!(described.artifact_type.as_deref(), Some(ARTIFACT_TYPE));
        assert_eq!(listed_with(&described.annotations).unwrap(), listed);
        // A layer's own manifest is found by its tag and in no list.
        assert!(manifest_descriptor(&manifest(&listed, None)).annotations.is_empty());
    }

    #[test]
    fn what_an_annotation_is_added_to_stays_as_it_was_written() {
        let others = r#""big": 12345678901234567890123456789, "near": 0.1000000000000000055511151231257827, "wide": 1e999, "text": "\u00e9\ud83d\ude00""#;
        for annotations in ["null", "{}", r#"{"kept": "a", "number": 1E400}"#] {
            let manifest = format!(r#"{{{others}, "annotations": {annotations}}}"#);
            let named = String::from_utf8(naming(manifest.as_bytes(), &[]).unwrap()).unwrap();
            for other in others.split(", ") {
                let (name, value) = other.split_once(": ").unwrap();
                assert!(named.contains(&format!("{name}:{value}")), "{named}");
            }
            assert_eq!(
                named.contains(r#""kept":"a""#) && named.contains("1E400"),
                annotations.contains("kept"),
                "{named}"
            );
        }
        for wrong in ["[]", "1", "{", r#"{"annotations": []}"#, r#"{"annotations": "text"}"#] {
            assert!(naming(wrong.as_bytes(), &[]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn lists_that_make_no_sense_name_nothing() {
        let one = Listed {
            layer: digest("layer"),
            digest: digest("index"),
            size: 1234,
            hot: Some((1000, digest("hot"))),
            signatures: Vec::new(),
        };
        let image = digest("image");
        let good = manifest_descriptor(&manifest(&[one], Some((OCI_MANIFEST, &image, 700))));
        let with = |text: &str| {
            let mut odd = good.clone();
            odd.annotations.insert(LIST_ANNOTATION.into(), text.into());
            listed_with(&odd.annotations)
        };
        let text = good.annotations[LIST_ANNOTATION].clone();
        assert!(with(&text).is_some());
        for odd in [
            String::new(),
            format!("{text},"),
            format!("{text} more"),
            text.replace(" 1234 ", " -1 "),
            text.replace(" 1000 ", " "),
            text.replace("sha256:", ""),
        ] {
            assert_eq!(with(&odd), None, "{odd}");
        }
        assert_eq!(listed_with(&BTreeMap::new()), None);
    }

    #[test]
    fn what_is_no_list_of_indexes_is_refused() {
        let other = String::from_utf8(manifest(&[], None)).unwrap();
        assert_eq!(parse(other.as_bytes()).unwrap(), []);
        assert!(parse(other.replace(ARTIFACT_TYPE, "application/x").as_bytes()).is_err());
        assert!(parse(b"{}").is_err() && parse(b"").is_err());
        // An entry whose annotations are no digests and numbers is passed over, or has no hot part.
        let one = Listed {
            layer: digest("layer"),
            digest: digest("index"),
            size: 1234,
            hot: Some((1000, digest("hot"))),
            signatures: Vec::new(),
        };
        let text = String::from_utf8(manifest(std::slice::from_ref(&one), None)).unwrap();
        let odd = text.replace(&one.layer.to_string(), "sha256:x");
        assert_eq!(parse(odd.as_bytes()).unwrap(), []);
        let odd = text.replace("\"1000\"", "\"-1000\"");
        assert_eq!(parse(odd.as_bytes()).unwrap(), [Listed { hot: None, ..one }]);
    }

    #[test]
    fn tags_are_made_of_the_layers_digest() {
        let Version::Tag(tag) = layer_tag(&digest("")) else {
            panic!("a tag")
        };
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(tag, format!("sha256-{hex}.tarblk-v1"));
        let Version::Tag(long) = layer_tag(&Digest::of(Algorithm::Sha512, b"")) else {
            panic!("a tag")
        };
        assert!(long.starts_with("sha512-cf83e1357eefb8bd") && long.len() <= 128);
    }
}
