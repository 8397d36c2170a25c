//! Who is told and who is believed: secrets stay with the host they are for, and what one registry says of a layer is not
//! believed of another's.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

#[path = "common/anonymous.rs"]
mod anonymous;
mod scripted;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anonymous::{http_options, registry_options};
use scripted::{Door, TestRegistry};
use tarblk::internals::digest::{Algorithm, Digest};
use tarblk::internals::http::{HttpOptions, RetryPolicy};
use tarblk::internals::index::build::{Contents, Recorder};
use tarblk::internals::index::{Collector, LayerIdentity};
use tarblk::internals::layer::Coding;
use tarblk::internals::open::{
    Cache, Fetching, IndexChoice, IndexOrigin, OpenError, OpenOptions, Prepared, Unwatched, prepare, serve_here,
};
use tarblk::internals::source::registry::{
    ImageName, Keyring, Login, OCI_MANIFEST, Registry, RegistryOptions, resolve,
};
use tarblk::internals::source::{self, Source, SourceError};
use tarblk::internals::units::{LayerId, TarOffset, TarRange};
use tarblk::internals::walk::walk;

const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

fn patience() -> HttpOptions {
    http_options(3)
}

fn options() -> RegistryOptions {
    registry_options(3)
}

/// A server that answers every connection's first request by `answer`, which is told the request and which connection it is.
fn server(answer: impl Fn(&str, usize) -> Option<String> + Send + 'static) -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for (number, stream) in listener.incoming().enumerate() {
            let Ok(mut stream) = stream else { return };
            // A TLS client says something else and waits for an answer.
            stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            let head = head(&mut stream);
            if let Some(answer) = answer(&head, number) {
                let _ = stream.write_all(answer.as_bytes());
            }
        }
    });
    port
}

fn head(stream: &mut TcpStream) -> String {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|got| got == 1) {
        head.push(byte[0]);
    }
    String::from_utf8_lossy(&head).into_owned()
}

#[test]
fn where_a_redirect_leads_is_told_no_secret() {
    let (tell, told) = mpsc::channel();
    let storage = server(move |head, _| {
        tell.send(head.to_owned()).unwrap();
        Some(
            "HTTP/1.1 206 X\r\nContent-Range: bytes 0-0/1024\r\nContent-Length: 1\r\nConnection: close\r\n\r\n0"
                .to_owned(),
        )
    });
    let front = server(move |_, _| {
        Some(format!(
            "HTTP/1.1 302 X\r\nLocation: http://127.0.0.1:{storage}/blob\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        ))
    });
    let url = format!("http://me:secret-password@127.0.0.1:{front}/layer.tar?signature=secret-signature");
    let blob = source::open(&Source::parse(&url).unwrap(), &patience()).unwrap();
    assert_eq!(blob.len, 1024);
    let head = told.recv().unwrap();
    assert!(!head.contains("secret"), "{head}");
    assert!(!head.to_ascii_lowercase().contains("authorization"), "{head}");
}

#[test]
fn a_registry_that_hangs_up_once_is_not_taken_for_one_with_tls() {
    let port = server(|head, number| {
        let found = head.contains("/manifests/");
        (number > 0 && found)
            .then(|| "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned())
    });
    let name = ImageName::parse(&format!("docker://127.0.0.1:{port}/some/image:v1")).unwrap();
    let error = resolve(&name, &options()).unwrap_err();
    assert!(
        error.http().is_some_and(|error| error.status_code().is_some()),
        "{error}"
    );
}

#[test]
fn credentials_are_for_the_registry_that_was_named() {
    let elsewhere = TestRegistry::start();
    elsewhere.rules(|rules| rules.door = Door::Basic("me:secret".into()));
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("_default");
    std::fs::create_dir_all(&place).unwrap();
    std::fs::write(
        place.join("hosts.toml"),
        format!("server = \"http://{}\"\n", elsewhere.host()),
    )
    .unwrap();
    let authfile = dir.path().join("auth.json");
    // "me:secret", for the registry that was named.
    std::fs::write(
        &authfile,
        r#"{"auths": {"registry.example": {"auth": "bWU6c2VjcmV0"}}}"#,
    )
    .unwrap();
    let name = ImageName::parse("docker://registry.example/some/image:v1").unwrap();
    for given in [None, Some(Login::parse("me:secret").unwrap())] {
        let options = RegistryOptions {
            hosts_dir: dir.path().to_owned(),
            keyring: Keyring {
                given,
                authfile: Some(authfile.clone()),
                usual: None,
                kept: None,
            },
            ..options()
        };
        assert!(matches!(resolve(&name, &options), Err(SourceError::Denied { .. })));
        let log = elsewhere.take_log();
        assert!(log.iter().all(|asked| !asked.headers.contains_key("authorization")));
        // It is told whom it stands for, as containerd does.
        assert!(log.iter().all(|asked| asked.query.contains("ns=registry.example")));
    }
    // What the file says of it itself is shown to it.
    std::fs::write(
        &authfile,
        format!(r#"{{"auths": {{"{}": {{"auth": "bWU6c2VjcmV0"}}}}}}"#, elsewhere.host()),
    )
    .unwrap();
    let options = RegistryOptions {
        hosts_dir: dir.path().to_owned(),
        keyring: Keyring {
            given: None,
            authfile: Some(authfile),
            usual: None,
            kept: None,
        },
        ..options()
    };
    let error = resolve(&name, &options).unwrap_err();
    assert!(
        error.http().is_some_and(|error| error.status_code().is_some()),
        "{error}"
    );
}

#[test]
fn long_lists_of_referrers_are_read_to_their_end() {
    let registry = TestRegistry::start();
    let subject = Digest::of(Algorithm::Sha256, b"subject");
    for number in 0..7 {
        let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": "application/x",
            "number": number, "layers": [], "subject": { "mediaType": OCI_MANIFEST, "digest": subject, "size": 7 } });
        registry.put_manifest(
            "some/image",
            &format!("t{number}"),
            OCI_MANIFEST,
            manifest.to_string().as_bytes(),
        );
    }
    let ImageName::Registry(reference) = ImageName::parse(&registry.name("some/image")).unwrap() else {
        panic!()
    };
    let client = Registry::new(&reference, &options()).unwrap();
    for page in [None, Some(2), Some(7)] {
        registry.rules(|rules| rules.referrers_page = page);
        assert_eq!(client.referrers(&subject, None).unwrap().len(), 7, "{page:?}");
    }
    // One that never ends is an error at some point, and nobody is sent elsewhere.
    let same = format!("/v2/some/image/referrers/{subject}?from=0");
    registry.rules(|rules| (rules.referrers_page, rules.referrers_next) = (Some(2), Some(same.clone())));
    let error = client.referrers(&subject, None).unwrap_err().to_string();
    assert!(error.contains("without end"), "{error}");
    let elsewhere = TestRegistry::start();
    for path in [same.as_str(), "/v2/some/other"] {
        registry.take_log();
        let next = format!("http://{}{path}", elsewhere.host());
        registry.rules(|rules| rules.referrers_next = Some(next));
        drop(client.referrers(&subject, None));
        assert!(elsewhere.take_log().is_empty());
        let wanted = |path: &str| path.contains("/referrers/") || path.contains("/manifests/sha256-");
        let others = |asked: &scripted::Asked| !wanted(&asked.path);
        assert!(!registry.take_log().iter().any(others));
    }
}

/// A tar of files that all have this name and content, and numbers.
fn tar_of(name: &str, content: &[u8]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for number in 0..40 {
        let mut header = tar::Header::new_ustar();
        header.set_size(u64::try_from(content.len()).unwrap());
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("{name}{number}"), content)
            .unwrap();
    }
    tar.into_inner().unwrap()
}

/// Puts an image of one layer into the registry, whose manifest and configuration say that it is `layer`.
fn put_image(registry: &TestRegistry, layer: &[u8], digest: &Digest) {
    let config = serde_json::json!({ "architecture": "amd64", "os": "linux",
        "rootfs": { "type": "layers", "diff_ids": [Digest::of(digest.algorithm(), layer)] } })
    .to_string();
    let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST,
        "config": { "mediaType": CONFIG, "digest": registry.put_blob(config.as_bytes()), "size": config.len() },
        "layers": [{ "mediaType": PLAIN, "digest": digest, "size": layer.len() }] })
    .to_string();
    registry.put_manifest("some/image", "v1", OCI_MANIFEST, manifest.as_bytes());
}

fn open_options(cache: &Path) -> OpenOptions {
    OpenOptions {
        cache: Some(Cache::new(cache).unwrap()),
        http: patience(),
        registry: options(),
        ..OpenOptions::default()
    }
}

fn names(prepared: &Prepared) -> Vec<String> {
    let mut entries = Collector::default();
    prepared.layers[0].index.replay(&mut entries).unwrap();
    let name = |path: &Vec<u8>| String::from_utf8_lossy(path).into_owned();
    entries.0.iter().map(|entry| name(&entry.path)).collect()
}

/// The first bytes of the layer as a reader of the image is given them.
fn first_bytes(prepared: Prepared, len: usize) -> Vec<u8> {
    let fetching = Fetching {
        memory_bytes: Some(1 << 20),
        connections: 2,
        fetch_all: false,
        deadline: Some(Duration::from_secs(20)),
        store_bytes: Some(1 << 30),
    };
    let opened = serve_here(prepared, &fetching).unwrap();
    let range = tarblk::internals::fetch::LayerRange {
        layer: LayerId(0),
        range: TarRange::new(TarOffset(0), u64::try_from(len).unwrap()),
    };
    let pieces = opened.fetcher.read_blocking(vec![range]).unwrap();
    opened.fetcher.shutdown();
    pieces.iter().flat_map(|piece| piece.iter().copied()).collect()
}

#[test]
fn what_one_registry_said_of_a_layer_is_not_believed_of_another() {
    let (honest, liar) = (TestRegistry::start(), TestRegistry::start());
    let (right, wrong) = (tar_of("right", &vec![1; 20_000]), tar_of("wrong", &vec![2; 20_000]));
    assert_eq!(right.len(), wrong.len());
    let digest = honest.put_blob(&right);
    liar.put_blob_as(&digest, &wrong);
    for registry in [&honest, &liar] {
        put_image(registry, &right, &digest);
    }
    let cache = tempfile::tempdir().unwrap();
    let options = open_options(cache.path());
    let open = |registry: &TestRegistry| prepare(&registry.name("some/image:v1"), &options, &mut Unwatched).unwrap();
    let lied = open(&liar);
    assert!(names(&lied)[0].starts_with("wrong"));
    first_bytes(lied, 64 << 10);
    let found = open(&honest);
    assert!(names(&found)[0].starts_with("right"), "{:?}", names(&found));
    assert!(first_bytes(found, 64 << 10) == right[..64 << 10]);
    // Of the same registry it is.
    let again = open(&honest);
    assert_eq!(again.layers[0].origin, IndexOrigin::Kept);
}

#[test]
fn layers_are_checked_whatever_the_algorithm_of_their_digest() {
    let registry = TestRegistry::start();
    let layer = tar_of("file", &[3; 1000]);
    let digest = Digest::of(Algorithm::Sha512, &layer);
    registry.put_blob_as(&digest, &layer);
    put_image(&registry, &layer, &digest);
    let cache = tempfile::tempdir().unwrap();
    let options = OpenOptions {
        index: IndexChoice::Build,
        ..open_options(cache.path())
    };
    let name = registry.name("some/image:v1");
    let found = prepare(&name, &options, &mut Unwatched).unwrap();
    assert_eq!(names(&found).len(), 40);
    assert!(first_bytes(found, 1000) == layer[..1000]);
    let mut damaged = layer.clone();
    damaged[600] ^= 1;
    registry.put_blob_as(&digest, &damaged);
    let error = prepare(&name, &options, &mut Unwatched).unwrap_err();
    assert!(matches!(error, OpenError::Digest { .. }), "{error}");
}

#[test]
fn an_index_without_entry_points_does_not_pass_for_that_of_a_plain_layer() {
    let dir = tempfile::tempdir().unwrap();
    // Nobody looks into it.
    let blob = [&[0x1f, 0x8b, 8][..], &[0; 900]].concat();
    let mut recorder = Recorder::new(Contents::ENTRIES);
    recorder.feed(&tar_of("file", &[4; 1000])).unwrap();
    let identity = LayerIdentity {
        coding: Coding::Gzip,
        blob_len: u64::try_from(blob.len()).unwrap(),
        ..LayerIdentity::default()
    };
    let index = recorder.finish().unwrap().into_index(identity);
    let (layer, path) = (dir.path().join("layer.tar.gz"), dir.path().join("layer.tarblk"));
    std::fs::write(&layer, blob).unwrap();
    std::fs::write(&path, index).unwrap();
    let options = OpenOptions {
        index: IndexChoice::Named(path.to_str().unwrap().to_owned()),
        ..OpenOptions::default()
    };
    let error = prepare(layer.to_str().unwrap(), &options, &mut Unwatched)
        .unwrap_err()
        .to_string();
    assert!(error.contains("no span table"), "{error}");
}

#[test]
fn a_file_that_was_written_anew_is_read_anew() {
    let dir = tempfile::tempdir().unwrap();
    let layer = dir.path().join("layer.tar");
    let options = open_options(&dir.path().join("cache"));
    let open = || prepare(layer.to_str().unwrap(), &options, &mut Unwatched).unwrap();
    std::fs::write(&layer, tar_of("one", &[5; 1000])).unwrap();
    let time = std::fs::metadata(&layer).unwrap().modified().unwrap();
    assert!(names(&open())[0].starts_with("one"));
    assert_eq!(open().layers[0].origin, IndexOrigin::Kept);
    // Clocks of file systems tick a hundred times a second.
    thread::sleep(Duration::from_millis(30));
    // In place, as long as before, and with the time that reproducible builds give everything.
    std::fs::write(&layer, tar_of("two", &[5; 1000])).unwrap();
    std::fs::File::options()
        .write(true)
        .open(&layer)
        .unwrap()
        .set_modified(time)
        .unwrap();
    assert!(names(&open())[0].starts_with("two"));
}

#[test]
fn a_pipe_is_refused_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let (tell, told) = mpsc::channel();
    let name = pipe.to_str().unwrap().to_owned();
    thread::spawn(move || {
        let listed = tarblk::internals::open::index_of(&name, &OpenOptions::default(), &mut Unwatched);
        let loaded = tarblk::internals::open::load_index(&name, &patience());
        tell.send([listed.map(drop), loaded.map(drop)]).unwrap();
    });
    let refused = told
        .recv_timeout(Duration::from_secs(20))
        .expect("it waits for a writer");
    for outcome in refused {
        let error = outcome.unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }
}

#[test]
fn impossible_lengths_are_refused_before_anything_is_made_for_them() {
    let registry = TestRegistry::start();
    let layer = tar_of("file", &[6; 1000]);
    let digest = registry.put_blob(&layer);
    let cache = tempfile::tempdir().unwrap();
    for size in [1 << 60, i64::MAX.unsigned_abs(), u64::MAX] {
        let config = serde_json::json!({ "architecture": "amd64", "os": "linux",
            "rootfs": { "type": "layers", "diff_ids": [digest, digest] } })
        .to_string();
        let described = serde_json::json!({ "mediaType": PLAIN, "digest": digest, "size": size });
        let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": { "mediaType": CONFIG, "digest": registry.put_blob(config.as_bytes()), "size": config.len() },
            "layers": [described, described] })
        .to_string();
        registry.put_manifest("some/image", "v1", OCI_MANIFEST, manifest.as_bytes());
        let error = prepare(
            &registry.name("some/image:v1"),
            &open_options(cache.path()),
            &mut Unwatched,
        );
        let error = error.unwrap_err().to_string();
        assert!(error.contains("bytes long"), "{error}");
    }
    let server = server(|_, _| {
        Some(
            "HTTP/1.1 206 X\r\nContent-Range: bytes 0-0/9223372036854775807\r\nContent-Length: 1\r\nConnection: close\r\n\r\n0"
                .to_owned(),
        )
    });
    let url = format!("http://127.0.0.1:{server}/layer.tar");
    let error = prepare(&url, &open_options(cache.path()), &mut Unwatched)
        .unwrap_err()
        .to_string();
    assert!(error.contains("bytes long"), "{error}");
}

#[test]
fn answers_that_were_compressed_on_the_way_are_not_taken_for_the_layer() {
    // Only what was asked after the length is compressed, as a meddling proxy does it with what it takes for text.
    let port = server(|head, _| {
        let probe = head.to_ascii_lowercase().contains("range: bytes=0-0\r\n");
        let (range, coding) = if probe {
            ("0-0", "")
        } else {
            ("0-511", "Content-Encoding: gzip\r\n")
        };
        let body = if probe { "0".to_owned() } else { "x".repeat(512) };
        Some(format!(
            "HTTP/1.1 206 X\r\nContent-Range: bytes {range}/512\r\nContent-Length: {}\r\n{coding}Connection: close\r\n\r\n{body}",
            body.len()
        ))
    });
    let source = Source::parse(&format!("http://127.0.0.1:{port}/layer.tar")).unwrap();
    let blob = source::open(&source, &patience()).unwrap();
    let error = source::read_range(&blob, 0..512, &patience()).unwrap_err().to_string();
    assert!(error.contains("Content-Encoding"), "{error}");
    let error = walk(&blob, &mut Collector::default(), None, &patience(), &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("Content-Encoding"), "{error}");
}

/// The bytes that a request names, if it names any: where they begin and end.
fn named(head: &str) -> Option<(usize, usize)> {
    let line = head.lines().find_map(|line| {
        line.to_ascii_lowercase()
            .strip_prefix("range: bytes=")
            .map(str::to_owned)
    })?;
    let (first, last) = line.trim().split_once('-')?;
    Some((first.parse().ok()?, last.parse::<usize>().ok()? + 1))
}

/// Status and headers for the bytes from the one to the other.
type Reply = Box<dyn Fn(usize, usize) -> (u16, String) + Send>;

/// Ways to answer a range that are right, or nearly, or that say that there are no ranges.
#[test]
fn answers_to_ranges_as_servers_give_them() {
    const LEN: usize = 30_000;
    let content: String = (0..LEN)
        .map(|n| char::from(b'a' + u8::try_from(n * 7 % 23).unwrap()))
        .collect();
    let label = |label: &'static str| {
        move |first: usize, end: usize| {
            (
                206,
                format!(
                    "Content-Range: bytes {first}-{}/{LEN}\r\nContent-Encoding: {label}\r\n",
                    end - 1
                ),
            )
        }
    };
    let range = |unit: &'static str, total: &'static str| -> Reply {
        Box::new(move |first, end| (206, format!("Content-Range: {unit} {first}-{}/{total}\r\n", end - 1)))
    };
    let status = |status: u16, headers: &'static str| -> Reply { Box::new(move |_, _| (status, headers.to_owned())) };
    let part_as_200: Reply =
        Box::new(|first, end| (200, format!("Content-Range: bytes {first}-{}/{LEN}\r\n", end - 1)));
    let replies: [(&str, Reply, bool); 10] = [
        ("plain", range("bytes", "30000"), true),
        ("unit in capitals", range("Bytes", "30000"), true),
        ("unknown total", range("bytes", "*"), true),
        ("a part that calls itself 200", part_as_200, true),
        ("labelled", Box::new(label("gzip")), true),
        ("labelled otherwise", Box::new(label("aws-chunked")), true),
        ("400", status(400, ""), false),
        ("501", status(501, ""), false),
        (
            "416 with the right length",
            status(416, "Content-Range: bytes */30000\r\n"),
            false,
        ),
        ("ranges are ignored", status(200, ""), false),
    ];
    for (name, reply, ranges) in replies {
        let (body, all) = (content.clone(), content.clone());
        let port = server(move |head, _| {
            let (status, headers, body) = match named(head) {
                None => (200, String::new(), &body[..]),
                Some((first, end)) => {
                    let end = end.min(LEN);
                    let (status, headers) = reply(first, end);
                    let body = match status {
                        206 => &body[first..end],
                        200 if !headers.is_empty() => &body[first..end],
                        200 => &body[..],
                        _ => "no",
                    };
                    (status, headers, body)
                }
            };
            let len = body.len();
            Some(format!(
                "HTTP/1.1 {status} X\r\nContent-Length: {len}\r\n{headers}Connection: close\r\n\r\n{body}"
            ))
        });
        let source = Source::parse(&format!("http://127.0.0.1:{port}/layer.tar")).unwrap();
        let once = HttpOptions {
            retry: RetryPolicy::once(),
            ..HttpOptions::default()
        };
        let blob = source::open(&source, &once).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(blob.len, u64::try_from(LEN).unwrap(), "{name}");
        assert_eq!(blob.answers_ranges(), ranges, "{name}");
        let middle = source::read_range(&blob, 10_000..20_000, &once).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(middle == all.as_bytes()[10_000..20_000], "{name}");
        let mut got = Vec::new();
        source::stream::<SourceError>(&blob, &once, &mut |bytes| {
            got.extend_from_slice(bytes);
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(got == all.as_bytes(), "{name}");
    }
}

/// A redirect that was kept expires with a 400: the address that was named leads to a new one, with ranges.
#[test]
fn an_expired_redirect_is_asked_for_again_whatever_it_says() {
    for status in [400, 401, 403, 404, 410] {
        let port = server(move |head, number| {
            let (path, range) = (
                head.split(' ').nth(1)?,
                head.to_ascii_lowercase().contains("range: bytes="),
            );
            Some(match path {
                "/layer.tar" => {
                    let to = if number == 0 { "/old" } else { "/new" };
                    format!("HTTP/1.1 302 X\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                }
                // Found there once.
                "/old" if number == 1 => {
                    "HTTP/1.1 206 X\r\nContent-Range: bytes 0-0/4\r\nContent-Length: 1\r\nConnection: close\r\n\r\na"
                        .to_owned()
                }
                "/new" if range => {
                    "HTTP/1.1 206 X\r\nContent-Range: bytes 1-2/4\r\nContent-Length: 2\r\nConnection: close\r\n\r\nbc"
                        .to_owned()
                }
                "/new" => "HTTP/1.1 500 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_owned(),
                _ => format!("HTTP/1.1 {status} X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"),
            })
        });
        let source = Source::parse(&format!("http://127.0.0.1:{port}/layer.tar")).unwrap();
        let once = HttpOptions {
            retry: RetryPolicy::once(),
            ..HttpOptions::default()
        };
        let blob = source::open(&source, &once).unwrap();
        assert_eq!(source::read_range(&blob, 1..3, &once).unwrap(), b"bc", "{status}");
    }
}

#[test]
fn where_a_server_sends_us_shows_no_secrets() {
    for location in [
        "http://me:word@[bad",
        "//me:word@[bad/x?sig=word",
        "http://me:word@host:99999/?word",
        "ftp://me:word@host/x?word",
    ] {
        let port = server(move |_, _| {
            Some(format!(
                "HTTP/1.1 302 X\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            ))
        });
        let source = Source::parse(&format!("http://127.0.0.1:{port}/layer.tar")).unwrap();
        let error = source::open(&source, &patience()).unwrap_err();
        let said = format!("{error} {error:?}");
        assert!(
            said.contains("redirect") && !said.contains("word"),
            "{location}: {said}"
        );
    }
}

#[test]
fn options_show_no_secrets() {
    let options = OpenOptions {
        index: IndexChoice::Named("https://me:secret@host/x.tarblk?sig=secret".to_owned()),
        registry: RegistryOptions {
            keyring: Keyring {
                given: Some(Login::parse("me:secret").unwrap()),
                authfile: None,
                usual: None,
                kept: None,
            },
            ..RegistryOptions::default()
        },
        ..OpenOptions::default()
    };
    let shown = format!("{options:?}");
    assert!(shown.contains("host/x.tarblk") && !shown.contains("secret"), "{shown}");
}
