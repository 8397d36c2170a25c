//! Images in registries: found, believed only as far as their digests go, and read for as long as a device lives.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod scripted;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::anonymous::registry_options;
use common::noise::noise;
use scripted::{Asked, Door, TestRegistry};
use tarblk::internals::digest::{Algorithm, Digest};
use tarblk::internals::fetch::{FetchOptions, Fetcher, LayerRange, LayerSource, Verifier};
use tarblk::internals::http::{HttpOptions, Timeouts};
use tarblk::internals::layer::Coding;
use tarblk::internals::source::Blob;
use tarblk::internals::source::SourceError;
use tarblk::internals::source::registry::{
    BlobAccess, BlobPlace, Descriptor, Image, ImageName, KeptLogins, Login, OCI_INDEX, OCI_MANIFEST, Reference,
    Registry, RegistryOptions, Version, resolve,
};
use tarblk::internals::units::CHUNK_BYTES;
use tarblk::internals::units::{LayerId, TarOffset, TarRange};

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";
const GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";

fn options() -> RegistryOptions {
    registry_options(2)
}

fn given(pair: &str) -> RegistryOptions {
    let mut options = options();
    options.keyring.given = Some(Login::parse(pair).unwrap());
    options
}

fn find(name: &str, options: &RegistryOptions) -> Result<Image, SourceError> {
    resolve(&ImageName::parse(name).unwrap(), options)
}

fn config_of(architecture: &str, layers: &[&[u8]]) -> Vec<u8> {
    let diff_ids: Vec<_> = layers
        .iter()
        .map(|layer| Digest::of(Algorithm::Sha256, layer))
        .collect();
    serde_json::json!({ "architecture": architecture, "os": "linux", "rootfs": { "type": "layers", "diff_ids": diff_ids } })
        .to_string()
        .into_bytes()
}

fn manifest_of(config: &[u8], layers: &[(&[u8], &str)]) -> Vec<u8> {
    let descriptor = |bytes: &[u8], kind: &str| serde_json::json!({ "mediaType": kind, "digest": Digest::of(Algorithm::Sha256, bytes), "size": bytes.len() });
    let layers: Vec<_> = layers.iter().map(|(bytes, kind)| descriptor(bytes, kind)).collect();
    serde_json::json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor(config, CONFIG), "layers": layers })
        .to_string()
        .into_bytes()
}

/// Puts an image of these layers into the registry; returns its manifest's digest.
fn put_image(registry: &TestRegistry, tag: &str, layers: &[(&[u8], &str)]) -> Digest {
    let contents: Vec<&[u8]> = layers.iter().map(|(bytes, _)| *bytes).collect();
    let config = config_of("amd64", &contents);
    registry.put_blob(&config);
    for bytes in contents {
        registry.put_blob(bytes);
    }
    registry.put_manifest("some/image", tag, OCI_MANIFEST, &manifest_of(&config, layers))
}

fn access(image: &Image, layer: usize) -> BlobAccess {
    match &image.layers[layer].place {
        BlobPlace::Registry(access) => access.clone(),
        BlobPlace::File(path) => panic!("{}", path.display()),
    }
}

/// A fetcher that has only what another process would be told.
fn fetcher(access: &BlobAccess, deadline: Duration) -> Fetcher {
    checking_fetcher(access, deadline, None)
}

/// The same, by somebody who knows what the chunks have to be.
fn checking_fetcher(access: &BlobAccess, deadline: Duration, digests: Option<Verifier>) -> Fetcher {
    let told: BlobAccess = serde_json::from_str(&serde_json::to_string(access).unwrap()).unwrap();
    let layer = Blob::of_registry(told);
    let options = FetchOptions {
        deadline,
        memory_bytes: 256 << 10,
        prefetch: false,
        timeouts: Timeouts {
            head: Duration::from_secs(1),
            ..FetchOptions::default().timeouts
        },
        ..FetchOptions::default()
    };
    let mut source = LayerSource::from(layer);
    source.verifier = digests;
    Fetcher::start(vec![source], options, None).unwrap()
}

fn read(fetcher: &Fetcher, start: u64, len: u64) -> Result<Vec<u8>, String> {
    let range = LayerRange {
        layer: LayerId(0),
        range: TarRange::new(TarOffset(start), len),
    };
    let slices = fetcher.read_blocking(vec![range]).map_err(|error| error.to_string())?;
    Ok(slices.iter().flat_map(|slice| slice.iter().copied()).collect())
}

/// Reads all over the layer for `lasting`, several readers at once, and compares.
fn read_for(fetcher: &Fetcher, layer: &[u8], lasting: Duration) -> u32 {
    let began = Instant::now();
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4_u64)
            .map(|reader| {
                scope.spawn(move || {
                    let mut reads = 0;
                    let dice = noise(1 << 16, reader + 1);
                    while began.elapsed() < lasting {
                        let at = usize::from(dice[reads % dice.len()]) * (layer.len() - 5000) / 256;
                        let bytes = read(fetcher, u64::try_from(at).unwrap(), 5000).unwrap();
                        assert_eq!(bytes, layer[at..at + 5000], "at {at}");
                        reads += 1;
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    u32::try_from(reads).unwrap()
                })
            })
            .collect();
        readers.into_iter().map(|reader| reader.join().unwrap()).sum()
    })
}

#[test]
fn an_image_is_found_by_tag_and_digest_and_platform() {
    let registry = TestRegistry::start();
    let (one, two) = (noise(100_000, 1), noise(5000, 2));
    let digest = put_image(&registry, "v1", &[(&one, PLAIN), (&two, GZIP)]);
    let image = find(&registry.name("some/image:v1"), &options()).unwrap();
    assert_eq!(image.manifest_digest, digest);
    assert_eq!(image.layers.len(), 2);
    assert_eq!(image.layers[0].kind.coding, Some(Coding::Plain));
    assert_eq!(image.layers[1].kind.coding, Some(Coding::Gzip));
    assert_eq!(
        image.layers[1].diff_id.as_ref().unwrap(),
        &Digest::of(Algorithm::Sha256, &two)
    );
    assert_eq!(image.layers[0].descriptor.size, 100_000);
    let by_digest = find(&registry.name(&format!("some/image@{digest}")), &options()).unwrap();
    assert_eq!(by_digest.manifest_digest, digest);

    let arm = config_of("arm64", &[&one]);
    registry.put_blob(&arm);
    let arm = manifest_of(&arm, &[(&one, PLAIN)]);
    let arm_digest = registry.put_manifest("some/image", "arm", OCI_MANIFEST, &arm);
    let amd = registry.put_manifest(
        "some/image",
        "amd",
        OCI_MANIFEST,
        &manifest_of(&config_of("amd64", &[&one, &two]), &[(&one, PLAIN), (&two, GZIP)]),
    );
    assert_eq!(amd, digest);
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [
        { "mediaType": OCI_MANIFEST, "digest": arm_digest, "size": arm.len(), "platform": { "os": "linux", "architecture": "arm64" } },
        { "mediaType": OCI_MANIFEST, "digest": digest, "size": manifest_of(&config_of("amd64", &[&one, &two]), &[(&one, PLAIN), (&two, GZIP)]).len(),
          "platform": { "os": "linux", "architecture": "amd64" } },
    ]});
    registry.put_manifest("some/image", "all", OCI_INDEX, index.to_string().as_bytes());
    let mut options = options();
    let name = registry.name("some/image:all");
    assert_eq!(find(&name, &options).unwrap().manifest_digest, digest);
    options.platform = Some("linux/arm64".parse().unwrap());
    assert_eq!(find(&name, &options).unwrap().manifest_digest, arm_digest);
    options.platform = Some("linux/s390x".parse().unwrap());
    let error = find(&name, &options).unwrap_err().to_string();
    assert!(error.contains("linux/amd64, linux/arm64"), "{error}");
    let error = find(&registry.name("some/image:arm2"), &options)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("404") && error.contains("check the name") && error.contains("logged in"),
        "{error}"
    );
}

#[test]
fn passwords_open_the_door_and_stay_secret() {
    let registry = TestRegistry::start();
    let layer = noise(300_000, 3);
    put_image(&registry, "v1", &[(&layer, PLAIN)]);
    registry.rules(|rules| rules.door = Door::Basic("me:sec:ret".into()));
    let name = registry.name("some/image:v1");
    for (options, word) in [(options(), "wants a user"), (given("me:secret-wrong"), "does not take")] {
        let error = find(&name, &options).unwrap_err();
        assert!(matches!(error, SourceError::Denied { .. }), "{error}");
        let shown = format!("{error} {error:?} {options:?}");
        assert!(shown.contains(word) && !shown.contains("secret"), "{shown}");
    }
    let image = find(&name, &given("me:sec:ret")).unwrap();
    assert!(!format!("{image:?}").contains("sec:ret"));
    // From a credentials file.
    let dir = common::scratch("auth");
    let path = dir.path().join("auth.json");
    let auths = format!(
        r#"{{"auths":{{"http://{}/v2/":{{"auth":"bWU6c2VjOnJldA=="}}}}}}"#,
        registry.host()
    );
    std::fs::write(&path, auths).unwrap();
    let mut filed = options();
    filed.keyring.authfile = Some(path);
    let image = find(&name, &filed).unwrap();
    let fetcher = fetcher(&access(&image, 0), Duration::from_secs(10));
    assert_eq!(read(&fetcher, 0, 300_000).unwrap(), layer);
    assert_eq!(fetcher.stats().errors, 0);
}

#[test]
fn tokens_and_signed_urls_of_two_seconds_are_enough_for_a_long_life() {
    let registry = TestRegistry::start();
    let layer = noise(8 << 20, 4);
    put_image(&registry, "v1", &[(&layer, PLAIN)]);
    registry.rules(|rules| {
        rules.door = Door::Token(Duration::from_secs(2));
        rules.token_user = Some("me:secret".into());
        rules.signed = Some(Duration::from_secs(2));
    });
    let image = find(&registry.name("some/image:v1"), &given("me:secret")).unwrap();
    let access = access(&image, 0);
    assert!(!format!("{access:?} {image:?}").contains("secret"));
    registry.take_log();
    let fetcher = fetcher(&access, Duration::from_secs(5));
    let reads = read_for(&fetcher, &layer, Duration::from_secs(7));
    let log = registry.take_log();
    let tokens = log.iter().filter(|asked| asked.path == "/token").count();
    let redirects = log.iter().filter(|asked| asked.status == 307).count();
    let served = log.iter().filter(|asked| asked.storage && asked.status == 206).count();
    assert!(served > 50 && reads > 50, "{reads} reads, {served} served");
    // About one for each life; one refresh however many readers wait.
    assert!((2..=5).contains(&tokens), "{tokens} tokens");
    assert!((3..=40).contains(&redirects), "{redirects} redirects");
    assert!(
        log.iter()
            .all(|asked| !asked.storage || !asked.headers.contains_key("authorization"))
    );
    assert_eq!(
        fetcher.stats().errors,
        0,
        "no request failed in a way that a read noticed"
    );
}

#[test]
fn what_expires_without_saying_when_is_asked_for_again() {
    let registry = TestRegistry::start();
    let layer = noise(8 << 20, 5);
    put_image(&registry, "v1", &[(&layer, PLAIN)]);
    registry.rules(|rules| {
        rules.door = Door::Token(Duration::from_secs(300));
        rules.signed = Some(Duration::from_secs(1));
        rules.says_when = false;
    });
    let image = find(&registry.name("some/image:v1"), &options()).unwrap();
    let fetcher = fetcher(&access(&image, 0), Duration::from_secs(5));
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| read_for(&fetcher, &layer, Duration::from_secs(4)));
        for _ in 0..5 {
            std::thread::sleep(Duration::from_millis(700));
            // A registry that was restarted, or a key that was rotated.
            registry.forget_tokens();
        }
        reading.join().unwrap();
    });
    let log = registry.take_log();
    assert!(log.iter().any(|asked| asked.storage && asked.status == 403));
    assert!(
        log.iter()
            .any(|asked| asked.path.contains("/blobs/") && asked.status == 401)
    );
    assert_eq!(fetcher.stats().errors, 0);
}

#[test]
fn identity_tokens_are_exchanged() {
    let registry = TestRegistry::start();
    put_image(&registry, "v1", &[(b"layer", PLAIN)]);
    registry.rules(|rules| {
        rules.door = Door::Token(Duration::from_secs(60));
        rules.identity = Some("secret-identity".into());
    });
    let dir = common::scratch("auth");
    let path = dir.path().join("auth.json");
    let auths = format!(
        r#"{{"auths":{{"{}":{{"identitytoken":"secret-identity"}}}}}}"#,
        registry.host()
    );
    std::fs::write(&path, auths).unwrap();
    let mut options = options();
    let name = registry.name("some/image:v1");
    let error = find(&name, &options).unwrap_err().to_string();
    assert!(error.contains("WHO_ARE_YOU"), "{error}");
    options.keyring.authfile = Some(path);
    find(&name, &options).unwrap();
    assert!(
        registry
            .take_log()
            .iter()
            .any(|asked| asked.path == "/token" && asked.method == "POST" && asked.status == 200)
    );
}

#[test]
fn nothing_is_believed_that_has_another_digest() {
    let registry = TestRegistry::start();
    let digest = put_image(&registry, "v1", &[(b"layer", PLAIN)]);
    let good = manifest_of(&config_of("amd64", &[b"layer"]), &[(b"layer", PLAIN)]);
    assert!(digest.matches(&good));
    let lie = |name: &str| find(&registry.name(name), &options()).unwrap_err();
    // A configuration with other bytes.
    let config = config_of("amd64", &[b"layer"]);
    let mut forged = config.clone();
    *forged.last_mut().unwrap() = b' ';
    registry.put_blob_as(&Digest::of(Algorithm::Sha256, &config), &forged);
    assert!(matches!(lie("some/image:v1"), SourceError::Digest { .. }));
    // An index that leads to something else than it says.
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [{ "mediaType": OCI_MANIFEST, "digest": digest,
        "size": good.len() + 1, "platform": { "os": "linux", "architecture": "amd64" } }]});
    registry.put_manifest("some/image", "sized", OCI_INDEX, index.to_string().as_bytes());
    let error = lie("some/image:sized").to_string();
    assert!(error.contains("the index says"), "{error}");
    for (tag, kind, json, word) in [
        (
            "unknown",
            OCI_MANIFEST,
            manifest_of(&config, &[(b"layer", "application/x-squashfs")]),
            "not a tar layer",
        ),
        (
            "old",
            "application/vnd.docker.distribution.manifest.v1+prettyjws",
            br#"{"schemaVersion":1,"fsLayers":[]}"#.to_vec(),
            "schema 1",
        ),
        ("long", OCI_MANIFEST, vec![b' '; 5 << 20], "more than"),
        ("page", "text/html", b"<html>".to_vec(), "no sense"),
    ] {
        registry.put_blob(&config);
        registry.put_manifest("some/image", tag, kind, &json);
        let error = lie(&format!("some/image:{tag}")).to_string();
        assert!(error.contains(word), "{tag}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

fn hosts(dir: &Path, registry: &str, text: &str) -> RegistryOptions {
    let place = dir.join(registry);
    std::fs::create_dir_all(&place).unwrap();
    std::fs::write(place.join("hosts.toml"), text).unwrap();
    RegistryOptions {
        hosts_dir: dir.to_owned(),
        ..options()
    }
}

#[test]
fn mirrors_are_asked_first_and_may_die() {
    let (mirror, origin) = (TestRegistry::start(), TestRegistry::start());
    let layer = noise(8 << 20, 6);
    for registry in [&mirror, &origin] {
        put_image(registry, "v1", &[(&layer, PLAIN)]);
    }
    mirror.rules(|rules| rules.wanted_header = Some(("x-team".into(), "secret-team".into())));
    let dir = common::scratch("hosts");
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n\
         [host.\"http://{}\".header]\nx-team = \"secret-team\"\n",
        origin.host(),
        mirror.host(),
        mirror.host()
    );
    // It loses the blob; it says nothing any more; it is gone. Each time for another registry, which knows nothing of before.
    for ill in ["lost", "silent", "gone"] {
        let registry = format!("{ill}.example");
        let options = hosts(dir.path(), &registry, &text);
        let image = find(&format!("docker://{registry}/some/image:v1"), &options).unwrap();
        let fetcher = fetcher(&access(&image, 0), Duration::from_secs(20));
        read_for(&fetcher, &layer, Duration::from_millis(300));
        assert!(origin.take_log().is_empty(), "{ill}");
        let ours = |asked: &Asked| asked.query.contains(&format!("ns={registry}"));
        let served = |asked: &Asked| asked.status == 206 && ours(asked);
        assert!(mirror.take_log().iter().any(served), "{ill}");
        match ill {
            "lost" => mirror.rules(|rules| rules.lost = true),
            "silent" => mirror.rules(|rules| (rules.lost, rules.silent) = (false, true)),
            _ => mirror.stop(),
        }
        read_for(&fetcher, &layer, Duration::from_millis(1500));
        let log = origin.take_log();
        assert!(log.iter().any(|asked| asked.status == 206), "{ill}");
        assert!(log.iter().all(|asked| !asked.headers.contains_key("x-team")), "{ill}");
        if ill == "lost" {
            assert_eq!(fetcher.stats().errors, 0);
        }
        fetcher.shutdown();
        drop((image, fetcher));
        mirror.rules(|rules| (rules.lost, rules.silent) = (false, false));
    }
    // Tags are not asked of those that may not resolve them.
    origin.take_log();
    let options = hosts(dir.path(), "other.example", &text.replace(", \"resolve\"", ""));
    find("docker://other.example/some/image:v1", &options).unwrap();
    assert!(
        origin
            .take_log()
            .iter()
            .any(|asked| asked.path.ends_with("/manifests/v1"))
    );
}

#[test]
fn a_wrong_chunk_is_asked_of_another_endpoint() {
    let (mirror, origin) = (TestRegistry::start(), TestRegistry::start());
    let layer = noise(4 << 20, 17);
    for registry in [&mirror, &origin] {
        put_image(registry, "v1", &[(&layer, PLAIN)]);
    }
    let dir = common::scratch("wrong-chunk");
    let text = format!(
        "server = \"http://{}\"\n[host.\"http://{}\"]\ncapabilities = [\"pull\", \"resolve\"]\n",
        origin.host(),
        mirror.host()
    );
    let options = hosts(dir.path(), "spoiled.example", &text);
    let image = find("docker://spoiled.example/some/image:v1", &options).unwrap();
    let access = access(&image, 0);
    // The mirror's copy has gone bad, under the right name.
    let spoiled: Vec<u8> = layer.iter().map(|byte| byte ^ 1).collect();
    mirror.put_blob_as(access.digest(), &spoiled);
    let right = layer.clone();
    let check = Verifier::chunks(move |index, bytes| {
        let start = usize::try_from(u64::from(index) * CHUNK_BYTES).unwrap();
        right.get(start..start + bytes.len()) == Some(bytes)
    });
    let fetcher = checking_fetcher(&access, Duration::from_secs(20), Some(check));
    mirror.take_log();
    origin.take_log();
    for at in [1_000_000, 3_000_000] {
        let bytes = read(&fetcher, u64::try_from(at).unwrap(), 5000).unwrap();
        assert_eq!(bytes, layer[at..at + 5000]);
    }
    let served = |asked: &Asked| asked.status == 206;
    assert!(mirror.take_log().iter().any(served), "the mirror comes first");
    assert!(origin.take_log().iter().any(served));
    let stats = fetcher.stats();
    assert!(stats.chunks_wrong > 0 && stats.layers_poisoned == 0, "{stats:?}");
    fetcher.shutdown();
}

#[test]
fn things_are_pushed_and_found_again() {
    let registry = TestRegistry::start();
    registry.rules(|rules| {
        rules.door = Door::Token(Duration::from_secs(60));
        rules.token_user = Some("me:secret".into());
    });
    let ImageName::Registry(reference) = ImageName::parse(&registry.name("some/image:v1")).unwrap() else {
        panic!()
    };
    let client = Registry::new(&reference, &given("me:secret")).unwrap();
    let blob = noise(100_000, 7);
    let digest = Digest::of(Algorithm::Sha256, &blob);
    assert!(client.head_blob(&digest).unwrap().is_none());
    client.push_blob(&digest, &blob).unwrap();
    client.push_blob(&digest, &blob).unwrap();
    let head = client.head_blob(&digest).unwrap().unwrap();
    assert_eq!(head.size, Some(100_000));
    assert_eq!(head.header("lazypull-digest"), Some(digest.to_string().as_str()));
    assert_eq!(client.small_blob(&digest, 100_000, 1 << 20).unwrap(), blob);
    assert!(client.small_blob(&digest, 99_999, 1 << 20).is_err());
    assert!(client.small_blob(&digest, 100_000, 99_999).is_err());
    let other = Reference::parse(&format!("{}/other/image", registry.host())).unwrap();
    let elsewhere = Registry::new(&other, &given("me:secret")).unwrap();
    assert!(elsewhere.mount_blob(&digest, &reference).unwrap());
    assert!(
        !elsewhere
            .mount_blob(&Digest::of(Algorithm::Sha256, b"x"), &reference)
            .unwrap()
    );

    let subject = put_image(&registry, "v1", &[(&blob, PLAIN)]);
    for (api, kind) in [
        (true, "application/vnd.test.a"),
        (false, "application/vnd.test.b"),
        (false, "application/vnd.test.c"),
    ] {
        registry.rules(|rules| rules.referrers_api = api);
        let artifact = serde_json::json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": kind,
            "config": { "mediaType": "application/vnd.oci.empty.v1+json", "digest": digest, "size": 1 }, "layers": [],
            "subject": { "mediaType": OCI_MANIFEST, "digest": subject, "size": 1 } });
        let bytes = artifact.to_string().into_bytes();
        let entry = Descriptor {
            media_type: OCI_MANIFEST.into(),
            digest: Digest::of(Algorithm::Sha256, &bytes),
            size: u64::try_from(bytes.len()).unwrap(),
            urls: Vec::new(),
            annotations: [("a".to_owned(), "b".to_owned())].into(),
            artifact_type: Some(kind.into()),
            platform: None,
        };
        for _ in 0..2 {
            client.push_referrer(&subject, &entry, &bytes).unwrap();
        }
        let found = client.referrers(&subject, Some(kind)).unwrap();
        assert_eq!(found.len(), 1, "{kind}");
        assert_eq!(found[0].digest, entry.digest);
        let fetched = client.manifest(&Version::Digest(entry.digest)).unwrap();
        assert_eq!(fetched.bytes, bytes);
    }
    assert_eq!(client.referrers(&subject, None).unwrap().len(), 2);
    let nobody = Digest::of(Algorithm::Sha256, b"nobody");
    assert!(client.referrers(&nobody, None).unwrap().is_empty());
}

#[test]
fn a_layout_is_read_and_checked() {
    let dir = common::scratch("layout");
    let root = dir.path();
    let put = |bytes: &[u8], algorithm: Algorithm| {
        let digest = Digest::of(algorithm, bytes);
        let place = root.join("blobs").join(digest.algorithm().name());
        std::fs::create_dir_all(&place).unwrap();
        std::fs::write(place.join(digest.hex()), bytes).unwrap();
        digest
    };
    let layer = noise(1000, 8);
    let layer_digest = put(&layer, Algorithm::Sha512);
    let config = config_of("amd64", &[&layer]);
    let config_digest = put(&config, Algorithm::Sha256);
    let manifest = serde_json::json!({ "schemaVersion": 2,
        "config": { "mediaType": CONFIG, "digest": config_digest, "size": config.len() },
        "layers": [{ "mediaType": PLAIN, "digest": layer_digest, "size": layer.len() }] })
    .to_string();
    let digest = put(manifest.as_bytes(), Algorithm::Sha256);
    std::fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let entry = |tag: &str| {
        serde_json::json!({ "mediaType": OCI_MANIFEST, "digest": digest, "size": manifest.len(),
            "annotations": { "org.opencontainers.image.ref.name": tag } })
    };
    let index = |tags: &[&str]| {
        let manifests: Vec<_> = tags.iter().map(|tag| entry(tag)).collect();
        let index = serde_json::json!({ "schemaVersion": 2, "manifests": manifests }).to_string();
        std::fs::write(root.join("index.json"), index).unwrap();
    };
    index(&["one"]);
    let name = |rest: &str| format!("oci:{}{rest}", root.display());
    for rest in [String::new(), ":one".into(), format!("@{digest}")] {
        let image = find(&name(&rest), &options()).unwrap();
        assert_eq!(image.manifest_digest, digest);
        let BlobPlace::File(path) = &image.layers[0].place else {
            panic!()
        };
        assert_eq!(std::fs::read(path).unwrap(), layer);
    }
    // One image for several machines, named or not.
    let both = |names: [Option<&str>; 2], platforms: [&str; 2]| {
        let manifests = names.iter().zip(platforms).map(|(name, architecture)| {
            let mut entry = entry(name.unwrap_or_default());
            if name.is_none() {
                entry.as_object_mut().unwrap().remove("annotations");
            }
            if !architecture.is_empty() {
                entry["platform"] = serde_json::json!({ "os": "linux", "architecture": architecture });
            }
            if architecture == "arm64" {
                entry["digest"] = serde_json::json!(Digest::of(Algorithm::Sha256, b"not here"));
            }
            entry
        });
        let index = serde_json::json!({ "schemaVersion": 2, "manifests": manifests.collect::<Vec<_>>() });
        std::fs::write(root.join("index.json"), index.to_string()).unwrap();
    };
    for (names, rest) in [([Some("one"); 2], ":one"), ([Some("one"); 2], ""), ([None; 2], "")] {
        both(names, ["arm64", "amd64"]);
        assert_eq!(
            find(&name(rest), &options()).unwrap().manifest_digest,
            digest,
            "{names:?}"
        );
        both(names, ["arm64", "s390x"]);
        let error = find(&name(rest), &options()).unwrap_err().to_string();
        assert!(error.contains("linux/arm64, linux/s390x"), "{error}");
    }
    // Several of one name for no machine in particular: the first, as skopeo does.
    both([Some("one"); 2], ["", ""]);
    assert_eq!(find(&name(":one"), &options()).unwrap().manifest_digest, digest);
    both([None; 2], ["", ""]);
    let error = find(&name(""), &options()).unwrap_err().to_string();
    assert!(error.contains("2 images"), "{error}");
    // An entry that makes no sense leaves the others as they are.
    std::fs::write(
        root.join("index.json"),
        serde_json::json!({ "manifests": [{ "digest": "md5:0", "size": 1 }, entry("one")] }).to_string(),
    )
    .unwrap();
    assert_eq!(find(&name(":one"), &options()).unwrap().manifest_digest, digest);
    index(&["one", "two"]);
    let error = find(&name(""), &options()).unwrap_err().to_string();
    assert!(error.contains("2 images") && error.contains("one, two"), "{error}");
    let error = find(&name(":three"), &options()).unwrap_err().to_string();
    assert!(error.contains("no three"), "{error}");
    let blob = |digest: &Digest| root.join("blobs").join(digest.algorithm().name()).join(digest.hex());
    std::fs::write(blob(&layer_digest), &layer[1..]).unwrap();
    let error = find(&name(":one"), &options()).unwrap_err().to_string();
    assert!(error.contains("999 bytes"), "{error}");
    std::fs::write(blob(&layer_digest), &layer).unwrap();
    std::fs::write(blob(&config_digest), vec![b' '; config.len()]).unwrap();
    assert!(matches!(
        find(&name(":one"), &options()).unwrap_err(),
        SourceError::Digest { .. }
    ));
    std::fs::write(root.join("oci-layout"), r#"{"imageLayoutVersion":"2.0.0"}"#).unwrap();
    assert!(
        find(&name(":one"), &options())
            .unwrap_err()
            .to_string()
            .contains("2.0.0")
    );
}

/// A certificate authority and what it signed, in PEM files.
struct Certificates {
    dir: tempfile::TempDir,
}

impl Certificates {
    fn make() -> Self {
        let dir = common::scratch("certificates");
        let script = "set -e; cd \"$1\"
            new() { openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout $1.key -subj /CN=$1 \"$2\" -out $3; }
            new ca -x509 ca.pem
            printf 'subjectAltName=IP:127.0.0.1,DNS:localhost' >server.ext
            printf 'extendedKeyUsage=clientAuth' >client.ext
            for who in server client; do
                new $who -batch $who.csr
                openssl x509 -req -in $who.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile $who.ext -out $who.pem
            done";
        common::succeed(
            std::process::Command::new("sh")
                .args(["-c", script, "sh"])
                .arg(dir.path()),
        );
        Self { dir }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.dir.path().join(name)
    }

    /// A server that wants to see a client certificate, if `strict`.
    fn server(&self, strict: bool) -> Arc<rustls::ServerConfig> {
        use rustls::pki_types::pem::PemObject;
        use rustls::pki_types::{CertificateDer, PrivateKeyDer};
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = if strict {
            let mut roots = rustls::RootCertStore::empty();
            roots
                .add(CertificateDer::from_pem_file(self.path("ca.pem")).unwrap())
                .unwrap();
            let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), provider);
            builder.with_client_cert_verifier(verifier.build().unwrap())
        } else {
            builder.with_no_client_auth()
        };
        let chain = vec![CertificateDer::from_pem_file(self.path("server.pem")).unwrap()];
        let key = PrivateKeyDer::from_pem_file(self.path("server.key")).unwrap();
        Arc::new(builder.with_single_cert(chain, key).unwrap())
    }
}

#[test]
fn private_authorities_and_client_certificates_are_used_everywhere() {
    if !common::have("openssl") {
        return common::skip("private_authorities", "openssl is not installed");
    }
    let certificates = Certificates::make();
    let registry = TestRegistry::start_with(&Some(certificates.server(true)), &None);
    let layer = noise(4 << 20, 9);
    put_image(&registry, "v1", &[(&layer, PLAIN)]);
    registry.rules(|rules| rules.door = Door::Token(Duration::from_secs(2)));
    let name = registry.name("some/image:v1");
    // Nobody said whom to believe.
    let error = find(&name, &options()).unwrap_err().to_string();
    assert!(error.contains("certificate"), "{error}");
    let dir = common::scratch("hosts");
    let ca = certificates.path("ca.pem");
    let host = registry.host();
    let only_ca = format!("server = \"https://{host}\"\nca = {:?}\n", ca.display());
    let error = find(&name, &hosts(dir.path(), &host, &only_ca))
        .unwrap_err()
        .to_string();
    assert!(!error.contains("not valid"), "{error}");
    let text = format!(
        "{only_ca}client = [[{:?}, {:?}]]\n",
        certificates.path("client.pem").display(),
        certificates.path("client.key").display()
    );
    let image = find(&name, &hosts(dir.path(), &host, &text)).unwrap();
    let fetcher = fetcher(&access(&image, 0), Duration::from_secs(10));
    read_for(&fetcher, &layer, Duration::from_secs(3));
    assert_eq!(fetcher.stats().errors, 0);
    // The directory of certificates that Docker has, too.
    let dir = common::scratch("certs.d");
    let place = dir.path().join(&host);
    std::fs::create_dir_all(&place).unwrap();
    for (from, to) in [
        ("ca.pem", "ca.crt"),
        ("client.pem", "client.cert"),
        ("client.key", "client.key"),
    ] {
        std::fs::copy(certificates.path(from), place.join(to)).unwrap();
    }
    let mut options = options();
    options.hosts_dir = dir.path().to_owned();
    find(&name, &options).unwrap();
}

#[test]
fn storage_may_have_the_registrys_private_authority() {
    use tarblk::internals::source;
    if !common::have("openssl") {
        return common::skip(
            "storage_may_have_the_registrys_private_authority",
            "openssl is not installed",
        );
    }
    let certificates = Certificates::make();
    let registry = TestRegistry::start_with(&Some(certificates.server(true)), &Some(certificates.server(false)));
    let layer = noise(4 << 20, 9);
    put_image(&registry, "v1", &[(&layer, PLAIN)]);
    registry.rules(|rules| rules.signed = Some(Duration::from_secs(2)));
    let dir = common::scratch("hosts");
    let host = registry.host();
    let [ca, certificate, key] = ["ca.pem", "client.pem", "client.key"].map(|name| certificates.path(name));
    let text = format!(
        "server = \"https://{host}\"\nca = {:?}\nclient = [[{:?}, {:?}]]\n",
        ca.display(),
        certificate.display(),
        key.display()
    );
    let options = hosts(dir.path(), &host, &text);
    let name = registry.name("some/image:v1");
    let image = find(&name, &options).unwrap();
    let fetcher = fetcher(&access(&image, 0), Duration::from_secs(10));
    read_for(&fetcher, &layer, Duration::from_secs(3));
    assert_eq!(fetcher.stats().errors, 0);
    let asked = registry.take_log();
    assert!(
        asked.iter().filter(|asked| asked.storage).count() > 1,
        "nobody was redirected"
    );
    // Whoever asks for a few bytes goes the same way.
    let blob = source::layer_blob(&ImageName::parse(&name).unwrap(), &image.layers[0]).unwrap();
    let bytes = source::read_range(&blob, 100..200, &HttpOptions::default()).unwrap();
    assert!(bytes == layer[100..200]);
    assert!(
        registry.take_log().iter().any(|asked| asked.storage),
        "nobody was redirected"
    );
}

/// A proxy that opens tunnels for those who know its password, and counts them.
fn proxy(password: &'static str) -> (std::net::SocketAddr, Arc<std::sync::atomic::AtomicU32>) {
    use std::io::{BufRead, BufReader, Write, copy};
    use std::net::{TcpListener, TcpStream};
    use std::sync::atomic::{AtomicU32, Ordering};
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let opened = Arc::new(AtomicU32::new(0));
    let counter = opened.clone();
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(mut client), counter) = (client, counter.clone()) else {
                continue;
            };
            std::thread::spawn(move || {
                let mut reader = BufReader::new(client.try_clone().unwrap());
                let mut head = Vec::new();
                loop {
                    let mut line = String::new();
                    reader.read_line(&mut line).unwrap();
                    if line.trim().is_empty() {
                        break;
                    }
                    head.push(line.trim().to_owned());
                }
                let Some(target) = head[0].strip_prefix("CONNECT ").and_then(|rest| rest.split(' ').next()) else {
                    return;
                };
                let wanted = format!("proxy-authorization: basic {password}");
                if !head.iter().any(|line| line.eq_ignore_ascii_case(&wanted)) {
                    let _ =
                        client.write_all(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n");
                    return;
                }
                let mut server = TcpStream::connect(target).unwrap();
                client
                    .write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
                    .unwrap();
                counter.fetch_add(1, Ordering::SeqCst);
                let (mut back, mut there) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let answers = std::thread::spawn(move || copy(&mut server, &mut back));
                let _ = copy(&mut reader, &mut there);
                let _ = there.shutdown(std::net::Shutdown::Both);
                let _ = answers.join();
            });
        }
    });
    (address, opened)
}

#[test]
fn proxies_of_the_environment_are_used_everywhere() {
    use std::sync::atomic::Ordering;
    const INSIDE: &str = "TARBLK_TEST_BEHIND_PROXY";
    if let Ok(told) = std::env::var(INSIDE) {
        // In a process of its own, whose environment names the proxy.
        let (host, dir) = told.split_once(' ').unwrap();
        let mut options = options();
        options.hosts_dir = dir.into();
        let image = find(&format!("docker://{host}/some/image:v1"), &options).unwrap();
        let fetcher = fetcher(&access(&image, 0), Duration::from_secs(10));
        assert_eq!(read(&fetcher, 0, 300_000).unwrap(), noise(300_000, 10));
        return;
    }
    if !common::have("openssl") {
        return common::skip("proxies_of_the_environment", "openssl is not installed");
    }
    let certificates = Certificates::make();
    let registry = TestRegistry::start_with(&Some(certificates.server(false)), &None);
    put_image(&registry, "v1", &[(&noise(300_000, 10), PLAIN)]);
    let dir = common::scratch("hosts");
    let host = format!("localhost:{}", registry.port());
    let text = format!(
        "server = \"https://{host}\"\nca = {:?}\n",
        certificates.path("ca.pem").display()
    );
    hosts(dir.path(), &host, &text);
    // me:secret
    let (address, opened) = proxy("bWU6c2VjcmV0");
    let run = |proxy: &str, without: &str| {
        std::process::Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "proxies_of_the_environment_are_used_everywhere",
                "--nocapture",
            ])
            .env(INSIDE, format!("{host} {}", dir.path().display()))
            .env("HTTPS_PROXY", proxy)
            .env("NO_PROXY", without)
            .env_remove("https_proxy")
            .env_remove("no_proxy")
            .output()
            .unwrap()
    };
    let output = run(&format!("http://me:secret@{address}"), "");
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{text}");
    // Two clients: one that finds the image, one that fetches its bytes.
    assert!(opened.swap(0, Ordering::SeqCst) >= 2);
    let output = run(&format!("http://me:secret@{address}"), "localhost");
    assert!(output.status.success() && opened.load(Ordering::SeqCst) == 0);
    let output = run(&format!("http://me:wrong-secret@{address}"), "");
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(!output.status.success() && !text.contains("wrong-secret"), "{text}");
}

#[test]
fn a_plain_layer_is_walked_where_it_lies() {
    use tarblk::internals::source;
    use tarblk::internals::walk::walk;
    let registry = TestRegistry::start();
    let mut tar = tar::Builder::new(Vec::new());
    for number in 0..200_u32 {
        let content = noise(usize::try_from(number * 37 % 20_000).unwrap(), u64::from(number));
        let mut header = tar::Header::new_ustar();
        header.set_size(u64::try_from(content.len()).unwrap());
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("dir/file{number}"), content.as_slice())
            .unwrap();
    }
    let layer = tar.into_inner().unwrap();
    put_image(&registry, "v1", &[(&layer, PLAIN)]);
    registry.rules(|rules| {
        rules.door = Door::Token(Duration::from_secs(60));
        rules.signed = Some(Duration::from_secs(60));
    });
    let name = ImageName::parse(&registry.name("some/image:v1")).unwrap();
    let image = resolve(&name, &options()).unwrap();
    let blob = source::layer_blob(&name, &image.layers[0]).unwrap();
    assert_eq!(blob.state(), Some(image.layers[0].descriptor.digest.to_string()));
    assert_eq!(blob.len, u64::try_from(layer.len()).unwrap());
    let mut builder = tarblk::internals::index::IndexBuilder::new();
    let walked = walk(&blob, &mut builder, None, &HttpOptions::default(), &mut |_, _| {}).unwrap();
    let index = tarblk::internals::index::Index::open(builder.finish(walked.tar_len, walked.end)).unwrap();
    assert_eq!(index.summary().files, 200);
    let log = registry.take_log();
    // The redirect is kept: storage is asked, the registry once or twice.
    assert!(log.iter().filter(|asked| asked.status == 307).count() < 4);
    assert!(
        log.iter()
            .all(|asked| !asked.storage || !asked.headers.contains_key("authorization"))
    );
    // What is not there is an error that says so.
    put_image(&registry, "v2", &[(&noise(2000, 11), PLAIN)]);
    let image = resolve(&ImageName::parse(&registry.name("some/image:v2")).unwrap(), &options()).unwrap();
    registry.rules(|rules| rules.lost = true);
    let blob = source::layer_blob(&name, &image.layers[0]).unwrap();
    let mut builder = tarblk::internals::index::IndexBuilder::new();
    let error = walk(&blob, &mut builder, None, &HttpOptions::default(), &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("BLOB_UNKNOWN"), "{error}");
}

#[test]
fn passwords_that_change_are_looked_up_again() {
    let registry = TestRegistry::start();
    let layer = noise(4 << 20, 12);
    put_image(&registry, "v1", &[(&layer, PLAIN)]);
    let dir = common::scratch("auth");
    let path = dir.path().join("auth.json");
    let keep = |pair: &str| {
        let (user, password) = pair.split_once(':').unwrap();
        let auths = serde_json::json!({ "auths": { registry.host(): { "username": user, "password": password } } });
        std::fs::write(&path, auths.to_string()).unwrap();
    };
    let mut options = options();
    options.keyring.authfile = Some(path.clone());
    for door in ["basic", "token"] {
        let change = |pair: &str| {
            keep(pair);
            registry.rules(|rules| {
                if door == "basic" {
                    rules.door = Door::Basic(pair.to_owned());
                } else {
                    rules.door = Door::Token(Duration::from_secs(1));
                    rules.token_user = Some(pair.to_owned());
                }
            });
        };
        change("me:first");
        // Another repository each time, which knows nothing of before.
        let repository = format!("{door}/image");
        let manifest = manifest_of(&config_of("amd64", &[&layer]), &[(&layer, PLAIN)]);
        registry.put_manifest(&repository, "v1", OCI_MANIFEST, &manifest);
        let image = find(&registry.name(&format!("{repository}:v1")), &options).unwrap();
        let fetcher = fetcher(&access(&image, 0), Duration::from_secs(5));
        read_for(&fetcher, &layer, Duration::from_millis(300));
        change("me:second");
        read_for(&fetcher, &layer, Duration::from_millis(1500));
        assert_eq!(fetcher.stats().errors, 0, "{door}");
    }
}

#[test]
fn all_logins_that_came_with_pulls_are_tried() {
    let registry = TestRegistry::start();
    let layer = noise(4 << 20, 13);
    let dir = common::scratch("kept");
    let path = dir.path().join("logins.json");
    let mut options = options();
    options.keyring.kept = Some(path.clone());
    for door in ["basic", "token"] {
        let repository = format!("{door}/image");
        let mut kept = KeptLogins::default();
        let mut keep = |repository: &str, pair: &str| {
            kept.keep(&registry.host(), repository, &Login::parse(pair).unwrap());
            std::fs::write(&path, kept.to_bytes().unwrap()).unwrap();
        };
        let change = |pair: &str| {
            registry.rules(|rules| {
                if door == "basic" {
                    rules.door = Door::Basic(pair.to_owned());
                } else {
                    rules.door = Door::Token(Duration::from_secs(1));
                    rules.token_user = Some(pair.to_owned());
                }
            });
        };
        let manifest = manifest_of(&config_of("amd64", &[&layer]), &[(&layer, PLAIN)]);
        registry.put_manifest(&repository, "v1", OCI_MANIFEST, &manifest);
        put_image(&registry, "v1", &[(&layer, PLAIN)]);
        change("me:secret-right");
        // What opens another repository does not open this one.
        keep("another/image", "me:secret-right");
        let name = registry.name(&format!("{repository}:v1"));
        let error = find(&name, &options).unwrap_err();
        assert!(matches!(error, SourceError::Denied { .. }), "{error}");
        for pair in ["me:secret-old", "me:secret-right", "you:secret-wrong"] {
            keep(&repository, pair);
        }
        let image = find(&name, &options).unwrap();
        let fetcher = fetcher(&access(&image, 0), Duration::from_secs(5));
        read_for(&fetcher, &layer, Duration::from_millis(300));
        // An older one that works again, and one that comes while a read waits.
        change("me:secret-old");
        read_for(&fetcher, &layer, Duration::from_millis(1500));
        assert_eq!(fetcher.stats().errors, 0, "{door}");
        change("me:secret-new");
        std::thread::scope(|scope| {
            let reading = scope.spawn(|| read_for(&fetcher, &layer, Duration::from_millis(2500)));
            std::thread::sleep(Duration::from_millis(500));
            keep(&repository, "me:secret-new");
            reading.join().unwrap();
        });
        change("me:secret-none");
        let error = find(&name, &options).unwrap_err();
        assert!(matches!(error, SourceError::Denied { .. }), "{error}");
        let shown = format!("{error} {error:?} {options:?} {image:?}");
        assert!(!shown.contains("secret"), "{shown}");
    }
}

/// Registries that answer strangers as if there were nothing, and say only at their front door how to be let in.
#[test]
fn registries_that_hide_are_asked_how_to_be_let_in() {
    let doors = |log: &[Asked]| log.iter().filter(|asked| asked.path == "/v2/").count();
    for door in [Door::Basic("me:secret".into()), Door::Token(Duration::from_secs(60))] {
        for status in [404, 403, 401] {
            let registry = TestRegistry::start();
            let layer = noise(50_000, 11);
            put_image(&registry, "v1", &[(&layer, PLAIN)]);
            registry.rules(|rules| {
                rules.door = door.clone();
                rules.token_user = Some("me:secret".into());
                rules.hides = Some(status);
            });
            let name = registry.name("some/image:v1");
            let image = find(&name, &given("me:secret")).unwrap();
            let fetcher = fetcher(&access(&image, 0), Duration::from_secs(5));
            assert_eq!(read(&fetcher, 0, 50_000).unwrap(), layer);
            let log = registry.take_log();
            assert_eq!(doors(&log), 1, "{door:?} {status}");
            assert!(
                log.iter()
                    .all(|asked| asked.path != "/v2/" || !asked.headers.contains_key("authorization")),
                "nothing is shown before it is asked for"
            );
            // What is not there is not there for who was let in either, and the door was open once.
            let error = find(&registry.name("some/image:v2"), &given("me:secret")).unwrap_err();
            assert!(
                error.is_absence() || matches!(error, SourceError::Denied { .. }),
                "{error}"
            );
            registry.take_log();
            // Who has nothing to show does not ask.
            let error = find(&name, &options()).unwrap_err().to_string();
            assert!(
                error.contains(&status.to_string()) || error.contains("no: HIDDEN"),
                "{error}"
            );
            assert_eq!(doors(&registry.take_log()), 0);
        }
    }
    // Where everything is open, one question is all that an absence costs, and none once something was there.
    let registry = TestRegistry::start();
    put_image(&registry, "v1", &[(b"layer", PLAIN)]);
    let client = |options: &RegistryOptions| {
        let reference = Reference::parse(&format!("{}/some/image", registry.host())).unwrap();
        Registry::new(&reference, options).unwrap()
    };
    let missing = Version::Tag("missing".into());
    let strange = client(&given("me:other"));
    for _ in 0..2 {
        assert!(strange.manifest(&missing).unwrap_err().is_absence());
    }
    assert_eq!(doors(&registry.take_log()), 1);
    let known = client(&given("me:another"));
    known.manifest(&Version::Tag("v1".into())).unwrap();
    assert!(known.manifest(&missing).unwrap_err().is_absence());
    assert_eq!(doors(&registry.take_log()), 0);
}

/// Connections that were opened ahead are used for what is asked, and are opened without asking anything.
#[test]
fn connections_are_opened_ahead_without_a_request() {
    let certificates = Certificates::make();
    let layer = noise(10_000, 12);
    for tls in [None, Some(certificates.server(false))] {
        let registry = TestRegistry::start_with(&tls, &None);
        let digest = put_image(&registry, "v1", &[(&layer, PLAIN)]);
        let dir = common::scratch("ahead");
        let options = match tls {
            None => RegistryOptions {
                plain_http: true,
                ..options()
            },
            Some(_) => hosts(
                dir.path(),
                &registry.host(),
                &format!(
                    "server = \"https://{}\"\nca = {:?}\n",
                    registry.host(),
                    certificates.path("ca.pem")
                ),
            ),
        };
        let reference = Reference::parse(&format!("{}/some/image", registry.host())).unwrap();
        let client = Registry::new(&reference, &options).unwrap();
        client.warm_up(3);
        let waiting = Instant::now();
        while registry.accepted() < 3 && waiting.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(5));
        }
        // TLS takes a moment more than what the server counts.
        std::thread::sleep(Duration::from_millis(300));
        assert!(registry.take_log().is_empty(), "nothing was asked");
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    client
                        .small_blob(&Digest::of(Algorithm::Sha256, &layer), 10_000, 1 << 20)
                        .unwrap()
                });
            }
        });
        assert_eq!(client.manifest(&Version::Tag("v1".into())).unwrap().digest, digest);
        assert_eq!(registry.accepted(), 3);
        assert_eq!(registry.take_log().len(), 4);
    }
}
