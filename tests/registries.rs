//! The laboratory itself: registries that start, let the right people in and forget tokens and URLs in time; images that other
//! programs read. If these fail, what `tests/images.rs` says means nothing.

mod common;
mod registry;

use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use common::unpacked::{self, images};
use common::{have, scratch, skip};
use registry::front::{Front, URL_LIFETIME};
use registry::token::SERVICE;
use registry::{Access, PASSWORD, Registry, TOKEN_SECONDS, USER, manifest};
use serde_json::Value;

/// `curl` with options; what it got, and the status.
fn curl(options: &[&str]) -> (u16, Vec<u8>) {
    let Output { stdout, .. } = common::output(
        "curl",
        &["-s", "-w", "\n%{http_code}"]
            .iter()
            .chain(options)
            .map(std::ffi::OsStr::new)
            .collect::<Vec<_>>(),
    );
    let at = stdout.iter().rposition(|&byte| byte == b'\n').unwrap();
    let status = String::from_utf8_lossy(&stdout[at + 1..]).parse().unwrap();
    (status, stdout[..at].to_vec())
}

#[test]
fn registries_let_the_right_people_in() {
    const NAME: &str = "registries_let_the_right_people_in";
    let Some(images) = images(NAME) else { return };
    let credentials = format!("{USER}:{PASSWORD}");
    for access in [
        Access::Anonymous,
        Access::Password,
        Access::Token,
        Access::AnonymousToken,
        Access::Tls,
        Access::ClientCertificate,
    ] {
        let Some(registry) = Registry::with(NAME, access, &images, &["whiteouts:opaque"]) else {
            return;
        };
        // skopeo, which nobody here wrote, finds what it has put there.
        let found = manifest(&registry, "whiteouts:opaque");
        assert_eq!(
            found,
            unpacked::manifest(&images.join("whiteouts"), "opaque").1,
            "{access:?}"
        );
        // And who has no business there does not, or not without asking for a token.
        let url = format!("{}/v2/whiteouts/manifests/opaque", registry.url());
        let accept = "Accept: application/vnd.oci.image.manifest.v1+json";
        let keys = registry.certificates();
        let key = |name: &str| keys.join(name).to_str().unwrap().to_owned();
        let (ca, cert, private) = (key("ca.crt"), key("client.cert"), key("client.key"));
        let strangers = curl(&["-H", accept, "--cacert", &ca, &url]).0;
        let friends = match access {
            Access::Password => curl(&["-u", &credentials, "-H", accept, &url]).0,
            Access::ClientCertificate => {
                curl(&["--cacert", &ca, "--cert", &cert, "--key", &private, "-H", accept, &url]).0
            }
            _ => 200,
        };
        let expected = match access {
            Access::Anonymous | Access::Tls => 200,
            Access::ClientCertificate => 0,
            _ => 401,
        };
        assert_eq!((strangers, friends), (expected, 200), "{access:?}");
        if registry.is_tls() {
            assert_eq!(curl(&["-H", accept, &url]).0, 0, "an unknown authority was believed");
        }
        assert!(
            registry
                .requests()
                .iter()
                .any(|line| line.ends_with("/v2/whiteouts/manifests/opaque 200"))
        );
    }
}

/// A token for reading `whiteouts`, with these credentials.
fn token(registry: &Registry, options: &[&str]) -> (u16, Option<String>) {
    let service = SERVICE.replace(' ', "%20");
    let url = format!(
        "{}?service={service}&scope=repository:whiteouts:pull",
        registry.tokens().realm()
    );
    let (status, body) = curl(&[options, &[&url]].concat());
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    (status, body["token"].as_str().map(str::to_owned))
}

#[test]
fn tokens_end_after_two_seconds() {
    const NAME: &str = "tokens_end_after_two_seconds";
    let Some(images) = images(NAME) else { return };
    let Some(registry) = Registry::with(NAME, Access::Token, &images, &["whiteouts:opaque"]) else {
        return;
    };
    assert_eq!(token(&registry, &[]).0, 401, "nobody in particular");
    assert_eq!(token(&registry, &["-u", "reader:wrong"]).0, 401);
    let (status, token) = token(&registry, &["-u", &format!("{USER}:{PASSWORD}")]);
    assert_eq!(status, 200);
    let header = format!("Authorization: Bearer {}", token.unwrap());
    let digest = unpacked::layers(&images.join("whiteouts"), "opaque").remove(0);
    let url = format!("{}/v2/whiteouts/blobs/{digest}", registry.url());
    assert_eq!(curl(&["-H", &header, "-o", "/dev/null", &url]).0, 200);
    let other = url.replace("whiteouts", "npm");
    assert_eq!(
        curl(&["-H", &header, "-o", "/dev/null", &other]).0,
        401,
        "of another repository"
    );
    thread::sleep(Duration::from_secs(TOKEN_SECONDS + 1));
    assert_eq!(curl(&["-H", &header, "-o", "/dev/null", &url]).0, 401, "after its time");
    assert!(registry.tokens().counts().1 >= 2);
}

#[test]
fn redirects_end_after_two_seconds_and_want_no_credentials() {
    const NAME: &str = "redirects_end_after_two_seconds_and_want_no_credentials";
    let Some(images) = images(NAME) else { return };
    let Some(registry) = Registry::with(NAME, Access::Password, &images, &["whiteouts:opaque"]) else {
        return;
    };
    let front = Front::start(&registry);
    let credentials = format!("{USER}:{PASSWORD}");
    let layout = images.join("whiteouts");
    let digest = unpacked::layers(&layout, "opaque").remove(0);
    let content = std::fs::read(unpacked::blob(&layout, &digest)).unwrap();
    let url = format!("http://{}/v2/whiteouts/blobs/{digest}", front.host());
    assert_eq!(curl(&[&url]).0, 401, "the front asks the registry");
    assert_eq!(front.seen().redirects, 0);
    // curl gives its credentials to the first host only.
    assert_eq!(curl(&["-L", "-u", &credentials, &url]), (200, content.clone()));
    assert_eq!(
        curl(&["-L", "-u", &credentials, "-r", "512-1023", &url]),
        (206, content[512..1024].to_vec())
    );
    assert_eq!(
        curl(&["-I", "-o", "/dev/null", "-u", &credentials, &url]).0,
        200,
        "HEAD is not redirected"
    );
    let location = curl(&[
        "-u",
        &credentials,
        "-o",
        "/dev/null",
        "-w",
        "%{redirect_url}\n%{http_code}",
        &url,
    ]);
    assert_eq!(location.0, 307);
    let target = String::from_utf8(
        common::output(
            "curl",
            &[
                "-s",
                "-u",
                &credentials,
                "-o",
                "/dev/null",
                "-w",
                "%{redirect_url}",
                &url,
            ]
            .map(std::ffi::OsStr::new),
        )
        .stdout,
    )
    .unwrap();
    assert_eq!(curl(&[&target]), (200, content));
    assert_eq!(front.seen().leaks, 0);
    assert_eq!(
        curl(&["-u", &credentials, &target]).0,
        400,
        "the storage wants no credentials"
    );
    assert_eq!(front.seen().leaks, 1);
    thread::sleep(URL_LIFETIME);
    assert_eq!((curl(&[&target]).0, front.seen().expired), (403, 1));
}

#[test]
fn a_blob_is_announced_as_the_index_of_another() {
    const NAME: &str = "a_blob_is_announced_as_the_index_of_another";
    let Some(images) = images(NAME) else { return };
    let Some(registry) = Registry::with(NAME, Access::Anonymous, &images, &["whiteouts:opaque"]) else {
        return;
    };
    let index = registry.dir().join("index");
    std::fs::write(&index, "an index").unwrap();
    let index = registry.put_blob("whiteouts", &index);
    let front = Front::start(&registry);
    let layers = unpacked::layers(&images.join("whiteouts"), "opaque");
    front.announce(&layers[0], &index);
    let url = |digest: &str| format!("http://{}/v2/whiteouts/blobs/{digest}", front.host());
    let head = |digest: &str| String::from_utf8(curl(&["-I", &url(digest)]).1).unwrap();
    assert!(
        head(&layers[0]).contains(&format!("LazyPull-Digest: {index}")),
        "{}",
        head(&layers[0])
    );
    assert!(!head(&layers[1]).contains("LazyPull-Digest"));
    assert_eq!(curl(&["-L", &url(&index)]), (200, b"an index".to_vec()));
}

#[test]
fn nothing_is_left_of_a_registry() {
    const NAME: &str = "nothing_is_left_of_a_registry";
    let Some(registry) = Registry::start(NAME, Access::Token) else {
        return;
    };
    let (dir, host, realm) = (registry.dir().to_owned(), registry.host(), registry.tokens().realm());
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _registry = registry;
        std::panic::resume_unwind(Box::new("as a failing test does"));
    }));
    assert!(panicked.is_err());
    assert!(!dir.exists());
    let port = |url: &str| url.split([':', '/']).find_map(|word| word.parse::<u16>().ok()).unwrap();
    for gone in [port(&host), port(&realm)] {
        assert!(
            std::net::TcpStream::connect(("127.0.0.1", gone)).is_err(),
            "somebody listens on {gone}"
        );
    }
}

#[test]
fn other_programs_read_the_images() {
    const NAME: &str = "other_programs_read_the_images";
    let Some(images) = images(NAME) else { return };
    if let Some(why) = unpacked::no_unpacking().or_else(|| (!have("skopeo")).then_some("no skopeo")) {
        return skip(NAME, why);
    }
    let work = scratch("unpacked-");
    let layout = images.join("debian-python");
    for tag in unpacked::tags(&layout) {
        let image = format!("oci:{}:{tag}", layout.display());
        let mut command = Command::new("skopeo");
        let found: Value = serde_json::from_slice(&common::succeed(command.args(["inspect", &image]))).unwrap();
        assert_eq!(found["Architecture"], "amd64", "{tag}");
        let layers = if tag.starts_with("distribution") { 4 } else { 6 };
        assert_eq!(found["Layers"].as_array().unwrap().len(), layers, "{tag}");
    }
    // umoci checks every digest and diff_id on its way.
    let root = unpacked::umoci_unpack(&layout, "latest", &work.path().join("debian")).root;
    assert!(root.join("opt/app/main.py").exists() && !root.join("etc/motd").exists());
    assert!(root.join("usr/lib/python3/dist-packages/numpy").is_dir());
    let layout = images.join("whiteouts");
    for tag in unpacked::tags(&layout) {
        unpacked::umoci_unpack(&layout, &tag, &work.path().join(tag.as_str()));
    }
}
