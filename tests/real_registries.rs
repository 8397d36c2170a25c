//! Images in Debian's docker-registry, behind every kind of door that people put before one: found as skopeo finds them, and
//! their blobs read to the last byte, whatever expires meanwhile.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod registry;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use common::unpacked;
use registry::front::Front;
use registry::{Access, PASSWORD, Registry, USER};
use tarblk::internals::fetch::{FetchOptions, Fetcher, LayerRange, LayerSource};
use tarblk::internals::source::Blob;
use tarblk::internals::source::SourceError;
use tarblk::internals::source::registry::{BlobAccess, BlobPlace, Image, ImageName, Login, RegistryOptions, resolve};
use tarblk::internals::units::{LayerId, TarOffset, TarRange};

fn find(name: &str, options: &RegistryOptions) -> Result<Image, SourceError> {
    resolve(&ImageName::parse(name).unwrap(), options)
}

/// Nothing of this machine's own settings.
fn options(dir: &Path) -> RegistryOptions {
    let authfile = dir.join("empty.json");
    std::fs::write(&authfile, "{}").unwrap();
    let mut options = RegistryOptions {
        hosts_dir: dir.join("hosts"),
        ..RegistryOptions::default()
    };
    options.keyring.authfile = Some(authfile);
    options
}

fn access(image: &Image, layer: usize) -> BlobAccess {
    match &image.layers[layer].place {
        BlobPlace::Registry(access) => access.clone(),
        BlobPlace::File(path) => panic!("{}", path.display()),
    }
}

/// A fetcher of a blob's own bytes, told of it as a daemon is.
fn fetcher(access: &BlobAccess) -> Fetcher {
    let told: BlobAccess = serde_json::from_str(&serde_json::to_string(access).unwrap()).unwrap();
    let layer = Blob::of_registry(told);
    let options = FetchOptions {
        deadline: Duration::from_secs(20),
        memory_bytes: 1 << 20,
        ..FetchOptions::default()
    };
    Fetcher::start(vec![LayerSource::from(layer)], options, None).unwrap()
}

/// Reads a piece and compares it with the layout's blob.
fn check(fetcher: &Fetcher, blob: &File, start: u64, len: u64) {
    let range = LayerRange {
        layer: LayerId(0),
        range: TarRange::new(TarOffset(start), len),
    };
    let slices = fetcher.read_blocking(vec![range]).unwrap();
    let got: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
    let mut expected = vec![0; usize::try_from(len).unwrap()];
    blob.read_exact_at(&mut expected, start).unwrap();
    assert!(got == expected, "{len} bytes from {start} on");
}

#[test]
fn every_door_opens_to_those_who_may_come_in() {
    const NAME: &str = "every_door_opens_to_those_who_may_come_in";
    let Some(images) = unpacked::images(NAME) else { return };
    let layout = images.join("whiteouts");
    let digest = unpacked::manifest(&layout, "opaque").0;
    for kind in [
        Access::Anonymous,
        Access::Password,
        Access::Token,
        Access::AnonymousToken,
        Access::Tls,
        Access::ClientCertificate,
    ] {
        let Some(registry) = Registry::with(NAME, kind, &images, &["whiteouts:opaque"]) else {
            return;
        };
        let dir = common::scratch("door-");
        let stranger = options(dir.path());
        let name = registry.image("whiteouts:opaque");
        let refused = find(&name, &stranger).err();
        let closed = !matches!(kind, Access::Anonymous | Access::AnonymousToken);
        assert_eq!(refused.is_some(), closed, "{kind:?}: {refused:?}");
        let mut friends = Vec::new();
        match kind {
            Access::Tls | Access::ClientCertificate => {
                std::fs::create_dir_all(dir.path().join("hosts")).unwrap();
                let place = dir.path().join("hosts").join(registry.host());
                std::os::unix::fs::symlink(registry.certificates(), place).unwrap();
                friends.push(options(dir.path()));
            }
            _ => {
                let mut typed = stranger.clone();
                typed.keyring.given = Some(Login::parse(&format!("{USER}:{PASSWORD}")).unwrap());
                let mut filed = stranger.clone();
                filed.keyring.authfile = Some(registry.auth_file());
                friends.extend([typed, filed]);
            }
        }
        if closed && !registry.is_tls() {
            let mut liar = stranger.clone();
            liar.keyring.given = Some(Login::parse(&format!("{USER}:wr0ng-one")).unwrap());
            let error = find(&name, &liar).unwrap_err();
            assert!(matches!(error, SourceError::Denied { .. }), "{kind:?}: {error}");
            assert!(!error.to_string().contains("wr0ng"), "{error}");
        }
        for friend in &friends {
            let image = find(&name, friend).unwrap_or_else(|error| panic!("{kind:?}: {error}"));
            assert_eq!(image.manifest_digest.to_string(), digest);
            for layer in 0..image.layers.len() {
                let access = access(&image, layer);
                let blob = File::open(unpacked::blob(&layout, &access.digest().to_string())).unwrap();
                let fetcher = fetcher(&access);
                check(&fetcher, &blob, 0, access.size());
                assert_eq!(fetcher.stats().errors, 0, "{kind:?}");
                fetcher.shutdown();
            }
        }
    }
}

#[test]
fn two_second_tokens_and_urls_outlast_a_long_read() {
    const NAME: &str = "two_second_tokens_and_urls_outlast_a_long_read";
    let Some(images) = unpacked::images(NAME) else { return };
    let Some(registry) = Registry::with(NAME, Access::Token, &images, &["debian-python:latest"]) else {
        return;
    };
    let front = Front::start(&registry);
    let dir = common::scratch("long-");
    let mut options = options(dir.path());
    options.keyring.given = Some(Login::parse(&format!("{USER}:{PASSWORD}")).unwrap());
    let image = find(&front.image("debian-python:latest"), &options).unwrap();
    let layout = images.join("debian-python");
    assert_eq!(
        image.manifest_digest.to_string(),
        unpacked::manifest(&layout, "latest").0
    );
    let largest = (0..image.layers.len())
        .max_by_key(|layer| image.layers[*layer].descriptor.size)
        .unwrap();
    let access = access(&image, largest);
    let blob = File::open(unpacked::blob(&layout, &access.digest().to_string())).unwrap();
    let fetcher = fetcher(&access);
    let began = Instant::now();
    let mut at = 0;
    while began.elapsed() < Duration::from_secs(6) {
        // Steps that no read-ahead foresees.
        at = (at + 7_654_321) % (access.size() - 10_000);
        check(&fetcher, &blob, at, 10_000);
        std::thread::sleep(Duration::from_millis(10));
    }
    let seen = front.seen();
    assert_eq!(seen.leaks, 0, "credentials were shown to the storage");
    assert!(seen.redirects >= 3 && seen.served > seen.redirects, "{seen:?}");
    assert_eq!(
        fetcher.stats().errors,
        0,
        "something failed in a way that a read noticed"
    );
}
