//! Whom an index is believed: what a lying one beside a good image does by default (nothing), and what vouches for a true one: a key, the
//! image's manifest, a pin, or somebody's word that the registry is believed.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod scripted;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::anonymous::registry_options;
use common::noise::noise;
use common::packed::gzip;
use common::rawtar::{Header, RawTar};
use common::session::Session;
use common::sha256;
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair};
use scripted::TestRegistry;
use tarblk::internals::device::volume::{Scratch, Volume};
use tarblk::internals::digest::Digest;
use tarblk::internals::fetch::{BytesTrust, FetchStats, IndexTrust};
use tarblk::internals::index::build::{BlobRecorder, Contents};
use tarblk::internals::index::{ColdPart, Entry, Index, IndexBuilder};
use tarblk::internals::layer::{Coding, Spans};
use tarblk::internals::open::artifact::{self, LIST_ANNOTATION, Listed, layer_tag};
use tarblk::internals::open::discover::hot_digest;
use tarblk::internals::open::publish::{Publication, Published, PushOptions, push};
use tarblk::internals::open::trust::SigningKey;
use tarblk::internals::open::{
    Cache, Fetching, IndexChoice, IndexOrigin, OpenError, OpenOptions, Prepared, Shared, TrustPolicy, Unwatched,
    prepare,
};
use tarblk::internals::source::registry::{OCI_INDEX, OCI_MANIFEST, PullPolicy, Reference, RegistryOptions, Version};
use tarblk::internals::tree::NodeId;
use tarblk::internals::units::{TarOffset, TarRange};

const REPOSITORY: &str = "some/image";
const TYPE: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// A layer with a program that root might run, and something that makes it long enough for several chunks.
struct Layer {
    tar: Vec<u8>,
    blob: Vec<u8>,
}

impl Layer {
    fn new(seed: u64) -> Self {
        let tool = Header::new(b'0', b"bin/tool").mode(0o755).size(9);
        let tar = RawTar::new()
            .entry(tool, b"#!/bin/sh")
            .file(b"etc/allowed", b"somebody trustworthy")
            .file(b"etc/refused", b"everybody who is not")
            .file(b"var/noise", &noise(200_000, seed))
            .end()
            .0;
        Self { blob: gzip(&tar), tar }
    }

    fn digest(&self) -> Digest {
        sha256(&self.blob)
    }

    fn index(&self) -> Index<Vec<u8>> {
        let mut recorder = BlobRecorder::new(Coding::of_bytes(&self.blob), 64 << 10, Contents::FULL);
        recorder.feed(&self.blob).unwrap();
        Index::open(recorder.finish().unwrap().into_index()).unwrap()
    }

    /// An index with all digests of this layer right, and entries that `lie` has changed.
    fn lying(&self, lie: &dyn Fn(&mut Vec<Entry>)) -> Vec<u8> {
        let honest = self.index();
        let mut entries = tarblk::internals::index::Collector::default();
        honest.replay(&mut entries).unwrap();
        lie(&mut entries.0);
        let mut builder = IndexBuilder::new();
        for entry in &entries.0 {
            tarblk::internals::index::EntrySink::entry(&mut builder, entry).unwrap();
        }
        builder.chunk_digests(honest.chunk_digests().unwrap().clone());
        builder.identity(honest.identity().clone());
        let window = |n| honest.cold_piece(ColdPart::Windows, n).unwrap().unwrap_or_default();
        if let Some(table) = honest.spans().cloned() {
            let windows = (0..table.len()).map(window).collect();
            builder.spans(Spans { table, windows });
        }
        builder.finish(honest.tar_len(), honest.end())
    }
}

type Lie = fn(&mut Vec<Entry>);

/// What a lying index can say with every digest in it right.
fn lies() -> [(&'static str, Lie); 3] {
    [
        ("mode", |entries| entries[0].mode = 0o4755),
        ("exchanged", |entries| {
            let first = entries[1].path.clone();
            entries[1].path = std::mem::replace(&mut entries[2].path, first);
        }),
        ("added", |entries| {
            let last = entries.last().unwrap();
            let end = last.payload().end().0.next_multiple_of(512);
            entries.push(Entry {
                path: b"etc/more".to_vec(),
                mode: 0o4777,
                headers: TarRange::new(TarOffset(end), 512),
                ..Entry::default()
            });
        }),
    ]
}

fn listed(index: &[u8], layer: &Digest) -> Listed {
    let open = Index::open(index).unwrap();
    Listed {
        layer: layer.clone(),
        digest: sha256(index),
        size: open.file_len(),
        hot: Some((open.hot_len(), hot_digest(&open))),
        signatures: Vec::new(),
    }
}

fn manifest(registry: &TestRegistry, layers: &[&Layer], annotations: &BTreeMap<&str, String>) -> Vec<u8> {
    let descriptor = |bytes: &[u8], kind: &str| serde_json::json!({ "mediaType": kind, "digest": sha256(bytes), "size": bytes.len() });
    let diff_ids: Vec<_> = layers.iter().map(|layer| sha256(&layer.tar)).collect();
    let rootfs = serde_json::json!({ "type": "layers", "diff_ids": diff_ids });
    let config = serde_json::json!({ "architecture": "amd64", "os": "linux", "rootfs": rootfs });
    let config = config.to_string().into_bytes();
    registry.put_blob(&config);
    let of_layer = |layer: &&Layer| {
        registry.put_blob(&layer.blob);
        descriptor(&layer.blob, TYPE)
    };
    let listed: Vec<_> = layers.iter().map(of_layer).collect();
    let config = descriptor(&config, "application/vnd.oci.image.config.v1+json");
    let mut manifest =
        serde_json::json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config, "layers": listed });
    if !annotations.is_empty() {
        manifest["annotations"] = serde_json::json!(annotations);
    }
    manifest.to_string().into_bytes()
}

/// A registry with one image, and what opens it with one cache.
struct Lab {
    registry: TestRegistry,
    cache: tempfile::TempDir,
    image: Digest,
}

/// Believes what is signed by these keys.
fn keys(keys: &[&SigningKey]) -> TrustPolicy {
    TrustPolicy::of_keys(keys.iter().map(|key| key.public()).collect())
}

impl Lab {
    fn new(layers: &[&Layer]) -> Self {
        let registry = TestRegistry::start();
        let manifest = manifest(&registry, layers, &BTreeMap::new());
        let image = registry.put_manifest(REPOSITORY, "latest", OCI_MANIFEST, &manifest);
        Self {
            registry,
            cache: tempfile::tempdir().unwrap(),
            image,
        }
    }

    fn options(&self, index: &IndexChoice, trust: &TrustPolicy) -> OpenOptions {
        OpenOptions {
            index: index.clone(),
            trust: trust.clone(),
            cache: Some(Cache::new(self.cache.path()).unwrap()),
            registry: registry_options(2),
            ..OpenOptions::default()
        }
    }

    fn open(&self, tag: &str, index: &IndexChoice, trust: &TrustPolicy) -> Result<Prepared, OpenError> {
        let name = self.registry.name(&format!("{REPOSITORY}:{tag}"));
        prepare(&name, &self.options(index, trust), &mut Unwatched)
    }

    fn empty_cache(&self) {
        for entry in std::fs::read_dir(self.cache.path()).unwrap().flatten() {
            std::fs::remove_dir_all(entry.path()).unwrap();
        }
    }

    /// Opens the image as `tag` anew, and tells of its first layer where the index came from and on whose word it is right.
    fn origin(&self, tag: &str, trust: &TrustPolicy) -> (IndexOrigin, IndexTrust) {
        self.empty_cache();
        self.origin_kept(tag, trust)
    }

    /// The same with what is kept.
    fn origin_kept(&self, tag: &str, trust: &TrustPolicy) -> (IndexOrigin, IndexTrust) {
        let prepared = self.open(tag, &IndexChoice::Auto, trust).unwrap();
        assert_eq!(prepared.layers[0].trust.bytes, BytesTrust::EachChunk);
        (prepared.layers[0].origin, prepared.layers[0].trust.index)
    }

    /// Puts an index under its layer's tag, as whoever may write to the repository can.
    fn put_index(&self, listed: &Listed, index: &[u8]) {
        self.registry.put_blob_as(&listed.digest, index);
        let Version::Tag(tag) = layer_tag(&listed.layer) else {
            panic!("a tag")
        };
        let manifest = artifact::manifest(std::slice::from_ref(listed), None);
        self.registry.put_manifest(REPOSITORY, &tag, OCI_MANIFEST, &manifest);
    }

    /// Puts an artifact with these indexes beside the image.
    fn put_artifact(&self, listed: &[Listed]) -> Digest {
        let manifest = artifact::manifest(listed, Some((OCI_MANIFEST, &self.image, 1)));
        self.registry
            .put_manifest(REPOSITORY, &sha256(&manifest).hex()[..16], OCI_MANIFEST, &manifest)
    }

    fn push(&self, change: impl FnOnce(&mut PushOptions)) -> Publication {
        let image = Reference::parse(&format!("{}/{REPOSITORY}:latest", self.registry.host())).unwrap();
        let mut how = PushOptions::new(64 << 10);
        change(&mut how);
        push(&image, &registry_options(2), &how, &mut Unwatched).unwrap()
    }
}

fn pem(der: &[u8]) -> Vec<u8> {
    use base64::Engine as _;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN PRIVATE KEY-----\n{text}\n-----END PRIVATE KEY-----\n").into_bytes()
}

fn ed25519() -> Arc<SigningKey> {
    let der = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
    Arc::new(SigningKey::parse(&pem(der.as_ref())).unwrap())
}

fn p256() -> Arc<SigningKey> {
    let der = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new()).unwrap();
    Arc::new(SigningKey::parse(&pem(der.as_ref())).unwrap())
}

const fn is_read(origin: IndexOrigin) -> bool {
    matches!(origin, IndexOrigin::Read { .. })
}

const fn is_published(origin: IndexOrigin) -> bool {
    matches!(origin, IndexOrigin::Published { .. })
}

/// The mode of the program, and how many names there are in etc.
fn tree(prepared: &Prepared) -> (u16, usize) {
    let tree = prepared.tree().unwrap();
    let tool = tree.resolve(NodeId::ROOT, b"bin/tool").unwrap();
    let etc = tree.resolve(NodeId::ROOT, b"etc").unwrap();
    (tree.node(tool).mode(), tree.children(etc).count())
}

#[test]
fn a_lying_index_beside_a_good_image_is_not_used() {
    let layer = Layer::new(1);
    let none = TrustPolicy::default();
    for (lie, change) in lies() {
        let index = layer.lying(&change);
        let lab = Lab::new(&[&layer]);
        let honest = lab.open("latest", &IndexChoice::Build, &none).unwrap();
        // By the layer's tag, beside the image, and in the blob's header field.
        for way in ["tag", "referrer", "header"] {
            let lab = Lab::new(&[&layer]);
            let one = listed(&index, &layer.digest());
            match way {
                "tag" => lab.put_index(&one, &index),
                "referrer" => {
                    lab.registry.put_blob(&index);
                    lab.put_artifact(std::slice::from_ref(&one));
                }
                _ => {
                    let digest = lab.registry.put_blob(&index);
                    lab.registry.rules(|rules| {
                        rules.lazy.insert(layer.digest().to_string(), digest.to_string());
                    });
                }
            }
            let prepared = lab.open("latest", &IndexChoice::Auto, &none).unwrap();
            assert!(is_read(prepared.layers[0].origin), "{lie}, {way}");
            assert_eq!(prepared.layers[0].trust.index, IndexTrust::Made);
            assert!(prepared.cost.layers[0].unbelieved_index, "{lie}, {way}");
            assert_eq!(tree(&prepared), tree(&honest), "{lie}, {way}");
            // A key of somebody else changes nothing.
            assert!(is_read(lab.origin("latest", &keys(&[&ed25519()])).0), "{lie}, {way}");
            lab.empty_cache();
            let refused = lab.open("latest", &IndexChoice::Require, &none).unwrap_err();
            assert!(matches!(refused, OpenError::Unbelieved { .. }), "{refused}");
            let said = refused.to_string();
            assert!(said.lines().count() == 1 && said.contains("--trust"), "{said}");
            // Who believes the registry believes this.
            lab.empty_cache();
            let believed = lab
                .open("latest", &IndexChoice::Auto, &TrustPolicy::of_registry())
                .unwrap();
            assert!(is_published(believed.layers[0].origin), "{lie}, {way}");
            assert_eq!(believed.layers[0].trust.index, IndexTrust::Registry);
            assert!(!believed.cost.layers[0].unbelieved_index);
        }
    }
}

#[test]
fn signed_indexes_are_believed_by_their_key_alone() {
    let (one, two) = (Layer::new(2), Layer::new(3));
    for key in [ed25519(), p256()] {
        let lab = Lab::new(&[&one, &two]);
        let pushed = lab.push(|how| how.sign = Some(key.clone()));
        let believed = IndexTrust::Key { key: key.public().id() };
        let (origin, trust) = lab.origin("latest", &keys(&[&ed25519(), &key]));
        assert!(is_published(origin), "{origin:?}");
        assert_eq!(trust, believed);
        assert!(is_read(lab.origin("latest", &TrustPolicy::default()).0));
        assert!(is_read(lab.origin("latest", &keys(&[&ed25519()])).0));
        // Pushed again all of it is there, signatures too; another key's signature comes beside it.
        let again = lab.push(|how| how.sign = Some(key.clone()));
        assert_eq!(again.artifact, pushed.artifact);
        assert!(again.layers.iter().all(|(_, how, _)| *how == Published::Kept));
        let other = p256();
        let both = lab.push(|how| {
            how.sign = Some(other.clone());
            how.trust = keys(&[&key]);
        });
        assert!(both.layers.iter().all(|(_, how, _)| *how == Published::Kept));
        assert_eq!(both.layers[0].2.as_ref().unwrap().signatures.len(), 2);
        for (policy, key) in [(keys(&[&key]), &key), (keys(&[&other]), &other)] {
            let (_, trust) = lab.origin("latest", &policy);
            assert_eq!(trust, IndexTrust::Key { key: key.public().id() });
        }
    }
}

#[test]
fn signatures_of_something_else_vouch_for_nothing() {
    let (good, other) = (Layer::new(4), Layer::new(5));
    let key = ed25519();
    let policy = keys(&[&key]);
    let lying = good.lying(&|entries| entries[0].mode = 0o4755);
    let honest = good.index().as_bytes().to_vec();
    let sign = |listed: &Listed| key.sign(listed).unwrap();
    let of_lie = listed(&lying, &good.digest());
    let of_honest = listed(&honest, &good.digest());
    let of_other = listed(other.index().as_bytes(), &other.digest());
    let stranger = ed25519();
    let mut flipped = sign(&of_lie);
    flipped.bytes[5] ^= 1;
    let mut renamed = stranger.sign(&of_lie).unwrap();
    renamed.key = key.public().id();
    let mut cut = sign(&of_honest);
    cut.bytes.truncate(63);
    let forged = [
        ("of the honest index", vec![sign(&of_honest)]),
        ("of another layer's index", vec![sign(&of_other)]),
        ("a flipped bit", vec![flipped]),
        ("under another's name", vec![renamed]),
        ("cut", vec![cut]),
        ("a stranger's", vec![stranger.sign(&of_lie).unwrap()]),
        ("none", Vec::new()),
    ];
    for (what, signatures) in forged {
        let lab = Lab::new(&[&good]);
        let forged = Listed {
            signatures,
            ..of_lie.clone()
        };
        lab.put_index(&forged, &lying);
        lab.put_artifact(std::slice::from_ref(&forged));
        let (origin, _) = lab.origin("latest", &policy);
        assert!(is_read(origin), "{what}: {origin:?}");
    }
    // What is signed for one layer, beside another: it does not even name it.
    let lab = Lab::new(&[&good]);
    let mut replayed = of_other.clone();
    replayed.signatures = vec![sign(&of_other)];
    replayed.layer = good.digest();
    lab.put_index(&replayed, other.index().as_bytes());
    assert!(is_read(lab.origin("latest", &policy).0));
    // The right one, and other bytes in its place.
    let lab = Lab::new(&[&good]);
    let signed = Listed {
        signatures: vec![sign(&of_honest)],
        ..of_honest.clone()
    };
    lab.put_index(&signed, &lying);
    assert!(is_read(lab.origin("latest", &policy).0));
    lab.put_index(&signed, &honest);
    assert!(is_published(lab.origin("latest", &policy).0));
    // However many artifacts somebody puts before it.
    let lab = Lab::new(&[&good]);
    lab.registry.put_blob(&honest);
    lab.registry.put_blob(&lying);
    let signed = lab.put_artifact(&[signed]);
    let before = (0..).find_map(|n: u64| {
        let one = Listed {
            size: of_lie.size + n,
            ..of_lie.clone()
        };
        let bytes = artifact::manifest(std::slice::from_ref(&one), Some((OCI_MANIFEST, &lab.image, 1)));
        (sha256(&bytes).to_string() < signed.to_string()).then_some(one)
    });
    lab.put_artifact(&[before.unwrap()]);
    assert!(is_published(lab.origin("latest", &policy).0));
}

/// Somebody's index that lies there is neither signed nor named by who publishes: that would make it believed.
#[test]
fn who_vouches_for_indexes_makes_them() {
    let layer = Layer::new(6);
    // As complete as ours, and another one.
    let mut recorder = BlobRecorder::new(Coding::of_bytes(&layer.blob), 128 << 10, Contents::FULL);
    recorder.feed(&layer.blob).unwrap();
    let strangers = recorder.finish().unwrap().into_index();
    let strangers_listed = listed(&strangers, &layer.digest());
    let key = ed25519();
    let vouching: [&dyn Fn(&mut PushOptions); 2] = [&|how| how.sign = Some(key.clone()), &|how| {
        how.into = Some("lazy".to_owned());
    }];
    for vouch in vouching {
        let lab = Lab::new(&[&layer]);
        let (none, key) = (TrustPolicy::default(), keys(&[&key]));
        lab.put_index(&strangers_listed, &strangers);
        // Where nothing is vouched for, it is left as it is.
        let left = lab.push(|_| ());
        assert_eq!(left.layers[0].1, Published::Kept);
        assert_eq!(left.layers[0].2.as_ref(), Some(&strangers_listed));
        let pushed = lab.push(vouch);
        assert_eq!(pushed.layers[0].1, Published::Made);
        assert_ne!(pushed.layers[0].2.as_ref().unwrap().digest, strangers_listed.digest);
        let (tag, policy) = if pushed.into.is_some() {
            ("lazy", &none)
        } else {
            ("latest", &key)
        };
        assert!(is_published(lab.origin(tag, policy).0));
        // Who says that the registry is believed takes what is there.
        lab.put_index(&strangers_listed, &strangers);
        let taken = lab.push(|how| {
            vouch(how);
            how.trust = TrustPolicy::of_registry();
        });
        assert_eq!(taken.layers[0].1, Published::Kept);
        assert_eq!(taken.layers[0].2.as_ref().unwrap().digest, strangers_listed.digest);
    }
}

#[test]
fn a_manifest_names_its_indexes() {
    let (one, two) = (Layer::new(7), Layer::new(8));
    let lab = Lab::new(&[&one, &two]);
    let none = TrustPolicy::default();
    let pushed = lab.push(|how| {
        how.into = Some("lazy".to_owned());
    });
    let (tag, digest) = pushed.into.unwrap();
    assert_eq!(tag, "lazy");
    assert_ne!(digest, lab.image);
    lab.registry.take_log();
    let (origin, trust) = lab.origin("lazy", &none);
    assert!(is_published(origin), "{origin:?}");
    assert_eq!(trust, IndexTrust::Manifest);
    // Nobody is asked what lies beside it.
    let asked = lab.registry.take_log();
    let beside = |path: &str| path.contains("referrers") || path.contains("tarblk-v1");
    assert!(!asked.iter().any(|asked| beside(&asked.path)), "{asked:?}");
    // The next one takes what is kept; the image itself names none.
    assert_eq!(
        lab.origin_kept("lazy", &none),
        (IndexOrigin::Kept, IndexTrust::Manifest)
    );
    assert!(is_read(lab.origin("latest", &none).0));
    // Pushed again it is the same, to the last bit.
    let again = lab.push(|how| {
        how.into = Some("lazy".to_owned());
        how.anew = true;
    });
    assert_eq!(again.into.unwrap().1, digest);
    // The same layers and configuration.
    let read = |tag: &str| lab.open(tag, &IndexChoice::Ignore, &none).unwrap();
    for (a, b) in read("lazy").layers.iter().zip(&read("latest").layers) {
        assert_eq!(a.layer.digest, b.layer.digest);
        assert_eq!(a.layer.diff_id, b.layer.diff_id);
    }
}

/// What names an index has to stand in the image's own manifest, whose digest is the image's.
#[test]
fn annotations_elsewhere_name_nothing() {
    let layer = Layer::new(9);
    let lab = Lab::new(&[&layer]);
    let none = TrustPolicy::default();
    let index = layer.index().as_bytes().to_vec();
    lab.registry.put_blob(&index);
    let one = listed(&index, &layer.digest());
    let artifact = artifact::manifest(std::slice::from_ref(&one), Some((OCI_MANIFEST, &lab.image, 1)));
    let list = artifact::manifest_descriptor(&artifact).annotations[LIST_ANNOTATION].clone();
    let own = manifest(&lab.registry, &[&layer], &BTreeMap::new());
    // Of a list of platforms, and of its entry.
    let platform = serde_json::json!({ "architecture": "amd64", "os": "linux" });
    let annotations = serde_json::json!({ LIST_ANNOTATION: list });
    let entry = serde_json::json!({
        "mediaType": OCI_MANIFEST, "digest": lab.image, "size": own.len(), "platform": platform, "annotations": annotations,
    });
    let platforms = serde_json::json!({
        "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entry], "annotations": annotations,
    });
    lab.registry
        .put_manifest(REPOSITORY, "many", OCI_INDEX, platforms.to_string().as_bytes());
    assert!(is_read(lab.origin("many", &none).0));
    // Of the layer's descriptor.
    let mut odd: serde_json::Value = serde_json::from_slice(&own).unwrap();
    odd["layers"][0]["annotations"] = annotations.clone();
    lab.registry
        .put_manifest(REPOSITORY, "odd", OCI_MANIFEST, odd.to_string().as_bytes());
    assert!(is_read(lab.origin("odd", &none).0));
    // Of another image: it names no index of this one's layers.
    let other = Layer::new(10);
    let annotations = BTreeMap::from([(LIST_ANNOTATION, list.clone())]);
    let stranger = manifest(&lab.registry, &[&other], &annotations);
    lab.registry
        .put_manifest(REPOSITORY, "stranger", OCI_MANIFEST, &stranger);
    assert!(is_read(lab.origin("stranger", &none).0));
    // Named for this layer, with another layer's index, or with bytes that are not the named ones.
    let foreign = other.index().as_bytes().to_vec();
    lab.registry.put_blob(&foreign);
    let named = |listed: &Listed| {
        let bytes = artifact::naming(&own, std::slice::from_ref(listed)).unwrap();
        lab.registry.put_manifest(REPOSITORY, "named", OCI_MANIFEST, &bytes);
        lab.origin("named", &none)
    };
    assert!(is_read(named(&listed(&foreign, &layer.digest())).0));
    let lying = layer.lying(&|entries| entries[0].mode = 0o4755);
    lab.registry.put_blob_as(&one.digest, &lying);
    assert!(is_read(named(&one).0));
    assert!(is_read(
        named(&Listed {
            hot: None,
            ..one.clone()
        })
        .0
    ));
    lab.registry.put_blob(&index);
    assert_eq!(named(&one).1, IndexTrust::Manifest);
    assert_eq!(
        named(&Listed {
            hot: None,
            ..one.clone()
        })
        .1,
        IndexTrust::Manifest
    );
    // Annotations that make no sense hide nothing else.
    for odd in [
        serde_json::json!([]),
        serde_json::json!({ LIST_ANNOTATION: 5 }),
        serde_json::json!({ LIST_ANNOTATION: "x" }),
    ] {
        let mut document: serde_json::Value = serde_json::from_slice(&own).unwrap();
        document["annotations"] = odd;
        lab.registry
            .put_manifest(REPOSITORY, "senseless", OCI_MANIFEST, document.to_string().as_bytes());
        assert!(is_read(lab.origin("senseless", &none).0));
    }
}

/// What the cache has of an index says nothing for it: that is decided anew.
#[test]
fn what_is_kept_is_believed_on_the_word_of_now() {
    let layer = Layer::new(11);
    let lab = Lab::new(&[&layer]);
    let key = ed25519();
    let (none, registry) = (TrustPolicy::default(), TrustPolicy::of_registry());
    lab.push(|_| ());
    let is_kept = |policy: &TrustPolicy| {
        let prepared = lab.open("latest", &IndexChoice::Require, policy);
        prepared.map(|prepared| (prepared.layers[0].origin, prepared.layers[0].trust.index))
    };
    // On the registry's word; then that is not taken any more.
    assert!(is_published(is_kept(&registry).unwrap().0));
    assert_eq!(is_kept(&registry).unwrap(), (IndexOrigin::Kept, IndexTrust::Registry));
    assert!(matches!(is_kept(&none).unwrap_err(), OpenError::Unbelieved { .. }));
    assert!(matches!(
        is_kept(&keys(&[&key])).unwrap_err(),
        OpenError::Unbelieved { .. }
    ));
    // The same bytes are signed: they need not come again, and the signature is kept.
    lab.push(|how| {
        how.sign = Some(key.clone());
        how.trust = TrustPolicy::of_registry();
    });
    let signed = IndexTrust::Key { key: key.public().id() };
    for _ in 0..2 {
        assert_eq!(is_kept(&keys(&[&key])).unwrap(), (IndexOrigin::Kept, signed));
    }
    assert!(is_kept(&none).is_err());
    // Without a question: the signature is enough, and the registry's word is if that is taken.
    let offline = |policy: &TrustPolicy| {
        let options = lab.options(&IndexChoice::Require, policy);
        let options = OpenOptions {
            registry: RegistryOptions {
                pull: PullPolicy::Never,
                ..options.registry.clone()
            },
            ..options
        };
        let name = lab.registry.name(&format!("{REPOSITORY}:latest"));
        prepare(&name, &options, &mut Unwatched).map(|prepared| prepared.layers[0].trust.index)
    };
    assert_eq!(offline(&keys(&[&key])).unwrap(), signed);
    assert_eq!(offline(&registry).unwrap(), IndexTrust::Registry);
    assert!(offline(&none).is_err() && offline(&keys(&[&ed25519()])).is_err());
    // Forged where it is kept.
    let hot = std::fs::read_dir(lab.cache.path().join("hot"))
        .unwrap()
        .next()
        .unwrap()
        .unwrap();
    let tampered = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = std::fs::read(hot.path()).unwrap();
        change(&mut bytes);
        std::fs::write(hot.path(), bytes).unwrap();
        offline(&keys(&[&key])).is_err()
    };
    assert!(tampered(&|bytes| {
        let at = bytes.len() - 20;
        bytes[at] = if bytes[at] == b'A' { b'B' } else { b'A' };
    }));
}

/// Serves what was prepared as the service does, from files, until `is_so`; its statistics then, and why the device's first block
/// cannot be read, if it cannot.
fn served(
    prepared: &Prepared,
    lending: &Path,
    fetch_all: bool,
    is_so: &dyn Fn(&FetchStats) -> bool,
) -> (FetchStats, Option<String>) {
    let fetching = Fetching {
        memory_bytes: Some(64 << 20),
        connections: 4,
        fetch_all,
        deadline: Some(Duration::from_secs(60)),
        store_bytes: Some(1 << 30),
    };
    let spec = prepared.image_spec(lending, fetching).unwrap();
    let opened = spec.serve(&Shared::default()).unwrap();
    let began = Instant::now();
    let stats = loop {
        let stats = opened.stats();
        if is_so(&stats) {
            break stats;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{stats:?}");
        std::thread::sleep(Duration::from_millis(20));
    };
    let volume = Volume::new(opened.image.clone(), Arc::new(opened.fetcher.clone()), 1);
    let read = volume.read_blocking(0, &mut [0; 4096], &mut Scratch::default());
    opened.fetcher.shutdown();
    (stats, read.err().map(|error| error.to_string()))
}

fn is_poisoned(stats: &FetchStats) -> bool {
    stats.poisoned.is_some()
}

/// The files of a directory of the cache, with their lengths.
fn kept(cache: &Path, of: &str) -> Vec<u64> {
    let files = std::fs::read_dir(cache.join(of)).into_iter().flatten().flatten();
    files.map(|file| file.metadata().unwrap().len()).collect()
}

#[test]
fn a_lie_that_was_believed_is_found_out_when_all_has_come() {
    let registry = TrustPolicy::of_registry();
    let zipped = Layer::new(20);
    let plain = Layer {
        blob: zipped.tar.clone(),
        tar: zipped.tar.clone(),
    };
    for layer in [&zipped, &plain] {
        for (lie, change) in lies() {
            let lab = Lab::new(&[layer]);
            let index = layer.lying(&change);
            lab.put_index(&listed(&index, &layer.digest()), &index);
            let lending = tempfile::tempdir().unwrap();
            let prepared = lab.open("latest", &IndexChoice::Require, &registry).unwrap();
            let (stats, block) = served(&prepared, lending.path(), true, &is_poisoned);
            let why = stats.poisoned.unwrap();
            assert!(why.contains("says other than its headers"), "{lie}: {why}");
            // Nothing is read of the device any more, names and modes neither.
            assert_eq!(block.as_deref(), Some(why.as_str()), "{lie}");
            // The layer's bytes are what they have to be, and stay; the index does not.
            assert!(
                kept(lab.cache.path(), "layers").iter().any(|len| *len > 200_000),
                "{lie}"
            );
            assert_eq!(kept(lab.cache.path(), "hot"), [0], "{lie}");
            // With all of it here it is found out at once.
            let prepared = lab.open("latest", &IndexChoice::Require, &registry).unwrap();
            assert!(is_published(prepared.layers[0].origin), "{lie}");
            let (stats, _) = served(&prepared, lending.path(), false, &is_poisoned);
            assert_eq!(stats.bytes_filled, 0, "{lie}");
        }
        // An honest one is not taken for a lie, from registry or cache.
        let lab = Lab::new(&[layer]);
        lab.push(|_| ());
        let lending = tempfile::tempdir().unwrap();
        for _ in 0..2 {
            let prepared = lab.open("latest", &IndexChoice::Require, &registry).unwrap();
            let all_held = |stats: &FetchStats| stats.bytes_held == stats.bytes_layers;
            let (stats, block) = served(&prepared, lending.path(), true, &all_held);
            assert_eq!((stats.poisoned, block), (None, None));
            let seen = Instant::now();
            let (stats, block) = served(&prepared, lending.path(), true, &|_| {
                seen.elapsed() > Duration::from_millis(700)
            });
            assert_eq!((stats.poisoned, block), (None, None));
        }
    }
}

/// Headers that a registry sent are its word, too: it can send other ones when the bytes are fetched.
#[test]
fn headers_that_were_other_ones_before_are_found_out() {
    let layer = |mode: u64| {
        let tool = Header::new(b'0', b"bin/tool").mode(mode).size(9);
        let tar = RawTar::new()
            .entry(tool, b"#!/bin/sh")
            .file(b"var/noise", &noise(3_000_000, 21));
        let tar = tar.end().0;
        Layer { blob: tar.clone(), tar }
    };
    let (honest, evil) = (layer(0o755), layer(0o4755));
    let lab = Lab::new(&[&honest]);
    let none = TrustPolicy::default();
    // As if the media type said that it is plain: then headers are enough.
    let mut document: serde_json::Value =
        serde_json::from_slice(&manifest(&lab.registry, &[&honest], &BTreeMap::new())).unwrap();
    document["layers"][0]["mediaType"] = "application/vnd.oci.image.layer.v1.tar".into();
    lab.registry
        .put_manifest(REPOSITORY, "plain", OCI_MANIFEST, document.to_string().as_bytes());
    lab.registry.put_blob_as(&honest.digest(), &evil.blob);
    let name = lab.registry.name(&format!("{REPOSITORY}:plain"));
    let prepared = prepare(&name, &lab.options(&IndexChoice::Auto, &none), &mut Unwatched).unwrap();
    assert_eq!(prepared.layers[0].trust.index, IndexTrust::Headers);
    assert_eq!(prepared.layers[0].trust.bytes, BytesTrust::Whole);
    // What came with the headers is forgotten; what comes now is right.
    lab.registry.put_blob(&honest.blob);
    std::fs::remove_dir_all(lab.cache.path().join("layers")).unwrap();
    let lending = tempfile::tempdir().unwrap();
    let (stats, block) = served(&prepared, lending.path(), true, &is_poisoned);
    let why = stats.poisoned.unwrap();
    assert!(
        why.contains("says other than its headers") && why.contains("4755"),
        "{why}"
    );
    assert!(block.is_some());
}

/// What a person sees of it.
#[test]
fn a_device_that_shows_a_lie_says_so() {
    const NAME: &str = "a_device_that_shows_a_lie_says_so";
    if let Some(why) = common::no_loop_mounts() {
        return common::skip(NAME, why);
    }
    let layer = Layer::new(22);
    let lab = Lab::new(&[&layer]);
    let index = layer.lying(&|entries| entries[0].mode = 0o4755);
    lab.put_index(&listed(&index, &layer.digest()), &index);
    let mut session = Session::new("loop");
    let options = [
        "--trust",
        "registry",
        "--hosts-dir",
        "/nonexistent",
        "--platform",
        "linux/amd64",
    ];
    let image = lab.registry.name(&format!("{REPOSITORY}:latest"));
    let devices =
        |session: &Session| -> serde_json::Value { serde_json::from_str(&session.succeed(&["ps", "--json"])).unwrap() };
    let typed = |more: &[&str]| -> Vec<std::ffi::OsString> { options.iter().chain(more).map(Into::into).collect() };
    let dir = session.mount_with(&image, &typed(&[]));
    let before = devices(&session);
    assert_eq!(before[0]["trust"][0]["index"]["by"], "registry");
    assert!(session.succeed(&["ps"]).contains("registry"));
    assert_eq!(std::fs::read(dir.join("bin/tool")).unwrap(), b"#!/bin/sh");
    session.umount();
    let dir = session.mount_with(&image, &typed(&["--fetch-all"]));
    let began = Instant::now();
    let device = loop {
        let device = devices(&session)[0].clone();
        if device["status"] == "poisoned" {
            break device;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{device}");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(
        device["why"].as_str().unwrap().contains("says other than its headers"),
        "{device}"
    );
    assert!(session.succeed(&["ps"]).contains("poisoned"));
    let log = session.succeed(&[std::ffi::OsStr::new("logs"), dir.as_os_str()]);
    assert!(log.contains("says other than its headers"), "{log}");
    let counted = session.succeed(&[std::ffi::OsStr::new("stats"), dir.as_os_str()]);
    assert!(counted.lines().any(|line| line.starts_with("poisoned ")), "{counted}");
    assert!(std::fs::read(dir.join("var/noise")).is_err());
    session.umount();
}

/// What a person types.
#[test]
fn keys_and_words_of_the_command_line() {
    let layer = Layer::new(12);
    let lab = Lab::new(&[&layer]);
    let dir = tempfile::tempdir().unwrap();
    let (private, public) = openssl_keys();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        mode(&path, 0o600);
        path
    };
    let (private, public) = (file("sign.pem", private), file("team.pub", public));
    let (private, public) = (private.to_str().unwrap(), public.to_str().unwrap());
    let config = dir.path().join("etc");
    std::fs::create_dir_all(config.join("keys.d")).unwrap();
    let name = lab.registry.name(&format!("{REPOSITORY}:latest"));
    let run = |arguments: &[&str]| {
        let output = std::process::Command::new(common::TARBLK)
            .args(arguments)
            .args(["--hosts-dir", "/nonexistent", "--platform", "linux/amd64"])
            .env("TARBLK_CONFIG_DIR", &config)
            .env("TARBLK_CACHE", dir.path().join("cache"))
            .output()
            .unwrap();
        drop(std::fs::remove_dir_all(dir.path().join("cache")));
        let said = String::from_utf8(output.stderr).unwrap();
        (output.status.success(), said, String::from_utf8(output.stdout).unwrap())
    };
    let (good, said, report) = run(&["index", "push", &name, "--sign", private, "--into", "lazy", "--json"]);
    assert!(good, "{said}");
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(report["into"]["tag"], "lazy");
    assert_eq!(report["signed"].as_str().unwrap().len(), 64);
    // Which indexes are used is told by whether layers are read.
    let reads = |more: &[&str]| {
        lab.registry.take_log();
        let (good, said, _) = run(&[&["ls", name.as_str()], more].concat());
        assert!(good, "{said}");
        let blob = format!("/v2/{REPOSITORY}/blobs/{}", layer.digest());
        let is_read = lab.registry.take_log().iter().any(|asked| asked.path == blob);
        assert_eq!(
            said.lines().filter(|line| line.contains("nothing vouches")).count(),
            usize::from(is_read),
            "{said}"
        );
        assert!(!is_read || said.contains("--trust registry"), "{said}");
        is_read
    };
    assert!(reads(&[]));
    assert!(!reads(&["--trust", "registry"]));
    assert!(!reads(&["--trust-key", public]));
    std::fs::write(config.join("tarblk.toml"), "trust = \"registry\"\n").unwrap();
    mode(&config.join("tarblk.toml"), 0o644);
    assert!(!reads(&[]) && reads(&["--trust", "verified"]));
    // Or this repository alone.
    let repository = name.strip_prefix("docker://").unwrap().strip_suffix(":latest").unwrap();
    for (pattern, believed) in [(repository, true), ("127.0.0.1:*/other/*", false)] {
        let own = format!("[[repository]]\npattern = {pattern:?}\ntrust = \"registry\"\n");
        std::fs::write(config.join("tarblk.toml"), own).unwrap();
        assert_eq!(reads(&[]), !believed, "{pattern}");
    }
    std::fs::write(
        config.join("tarblk.toml"),
        format!("trust = \"registry\"\n[[repository]]\npattern = {repository:?}\ntrust = \"verified\"\n"),
    )
    .unwrap();
    assert!(reads(&[]) && !reads(&["--trust", "registry"]));
    std::fs::remove_file(config.join("tarblk.toml")).unwrap();
    let installed = config.join("keys.d/team.pub");
    std::fs::copy(public, &installed).unwrap();
    mode(&installed, 0o644);
    mode(&config.join("keys.d"), 0o755);
    assert!(!reads(&[]));
    // Another user could have put it there.
    mode(&installed, 0o664);
    let (good, said, _) = run(&["ls", name.as_str()]);
    assert!(good && said.contains("team.pub is not used"), "{said}");
    mode(Path::new(public), 0o666);
    let (good, said, _) = run(&["ls", name.as_str(), "--trust-key", public]);
    assert!(
        !good && said.contains("team.pub is not used") && said.lines().any(|line| line.contains("chmod")),
        "{said}"
    );
    let (good, said, _) = run(&["ls", name.as_str(), "--trust-key", private]);
    assert!(!good && said.contains("it holds no public key"), "{said}");
    mode(Path::new(public), 0o600);
    let (good, said, _) = run(&["index", "push", &name, "--sign", public]);
    assert!(!good && said.contains("it holds no private key"), "{said}");
    let (good, said, _) = run(&["index", "push", &name, "--into", "not/a:tag"]);
    assert!(!good && said.contains("is no tag"), "{said}");
}

/// A key pair as cosign keeps it: the private half under a password, which is in the environment, or asked for where there is a terminal.
#[test]
fn keys_of_cosign_sign_with_their_password() {
    let lab = Lab::new(&[&Layer::new(13)]);
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        mode(&path, 0o600);
        path
    };
    let (private, public) = COSIGN_KEYS;
    let (private, public) = (file("cosign.key", private), file("cosign.pub", public));
    let name = lab.registry.name(&format!("{REPOSITORY}:latest"));
    let run = |arguments: &[&str], password: Option<&str>| {
        // Without a terminal, whoever runs the test.
        let mut command = std::process::Command::new("setsid");
        command.args(["--wait", common::TARBLK]).args(arguments);
        command.args(["--hosts-dir", "/nonexistent", "--platform", "linux/amd64"]);
        command.env("TARBLK_CACHE", dir.path().join("cache"));
        command
            .env_remove("COSIGN_PASSWORD")
            .envs(password.map(|password| ("COSIGN_PASSWORD", password)));
        let output = command.stdin(std::process::Stdio::null()).output().unwrap();
        (output.status.success(), String::from_utf8(output.stderr).unwrap())
    };
    let push = ["index", "push", &name, "--sign", private.to_str().unwrap()];
    let (good, said) = run(&push, None);
    assert!(
        !good && said.contains("cosign.key takes a password: set COSIGN_PASSWORD"),
        "{said}"
    );
    let (good, said) = run(&push, Some("Geheim"));
    assert!(
        !good && said.contains("cosign.key takes a password: this one is not it"),
        "{said}"
    );
    assert!(!said.contains("Geheim"), "{said}");
    let (good, said) = run(&push, Some("geheim"));
    assert!(good, "{said}");
    drop(std::fs::remove_dir_all(dir.path().join("cache")));
    let (good, said) = run(&["ls", &name, "--trust-key", public.to_str().unwrap()], None);
    assert!(good && !said.contains("nothing vouches"), "{said}");
}

fn mode(path: &Path, mode: u32) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
}

/// A key pair of cosign 3.1.1; the password is "geheim".
const COSIGN_KEYS: (&str, &str) = (
    "-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\neyJrZGYiOnsibmFtZSI6InNjcnlwdCIsInBhcmFtcyI6eyJOIjo2NTUzNiwiciI6\nOCwicCI6MX0sInNhbHQiOiIzUlAyN3AvOWY1S0t0RnVwMXVGemwzZWJ1QWZtTHJT\nOS9Mckd1eDF2ZDlJPSJ9LCJjaXBoZXIiOnsibmFtZSI6Im5hY2wvc2VjcmV0Ym94\nIiwibm9uY2UiOiJuSnR0WVdQSDdSZGVHR1hvMGNiSEtBOVZxY2RxUzlWcCJ9LCJj\naXBoZXJ0ZXh0IjoiRzlyR2g0WEZLU0pBNGRHTzI4MWlpaEErMTFZMktaZDFEbHFz\nbW1qR0F3K2I4TFhHZzBQRWhQTzN3S05VNEpScGJUYUFRcmlCajhtQldmaUFCNUtu\nWXc9PSJ9\n-----END ENCRYPTED SIGSTORE PRIVATE KEY-----\n",
    "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA/VaDN7LJqxkeUaudvIuk8UZKH0Kr7pFeACHqeVm1uig=\n-----END PUBLIC KEY-----\n",
);

/// A key pair of OpenSSL 3.
const fn openssl_keys() -> (&'static str, &'static str) {
    (
        "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIHLslPuI0ws63T/wnFNIysw5ImdEIPxtXQi93YEn8H/Z\n-----END PRIVATE KEY-----\n",
        "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA8+lph4aQHW4ptLhVjsxUOKwfLkFzvq2bFR04+PKwSnQ=\n-----END PUBLIC KEY-----\n",
    )
}
