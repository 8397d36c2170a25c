//! Images whose layers bring their own tables of contents (eStargz and zstd:chunked), mounted without anybody having indexed them:
//! the tree is what `umoci unpack` makes of them, no layer is read whole, and nothing that lies is served.

mod common;
mod registry;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use common::chunked::{self, CHECKSUM, Chunked, POSITION};
use common::images::{compare, laboratory, none, nothing_left, one_line, refused};
use common::noise::noise;
use common::scratch;
use common::session::Session;
use common::unpacked::{self, umoci_unpack};
use registry::{Access, Registry};
use serde_json::{Value, json};
use tarblk::internals::bench::origin::Origin;

/// The images of the laboratory that have such layers only, as far as they were made.
fn with_contents(images: &Path) -> Vec<(&'static str, &'static str)> {
    let all = [
        ("debian-python", "estargz"),
        ("npm", "zstdchunked"),
        ("npm", "zstdchunked-skopeo"),
    ];
    let made = |(name, tag): &(&str, &str)| unpacked::tags_if_any(&images.join(name)).contains(&(*tag).to_owned());
    all.into_iter().filter(made).collect()
}

#[test]
fn layers_are_mounted_by_their_own_contents() {
    const NAME: &str = "layers_are_mounted_by_their_own_contents";
    let Some(images) = laboratory(NAME) else { return };
    let work = scratch("contents-");
    let mut complaints = Vec::new();
    for (name, tag) in with_contents(&images) {
        let image = format!("{name}:{tag}");
        let Some(registry) = Registry::with(NAME, Access::Anonymous, &images, &[&image]) else {
            return;
        };
        let expected = umoci_unpack(&images.join(name), tag, &work.path().join("unpacked"));
        let mut session = Session::new("loop");
        let source: OsString = registry.image(&image).into();
        // Who requires an index is content with these.
        let options = [registry.arguments(), vec!["--index".into(), "require".into()]].concat();
        session.mount_with(&source, &options);
        for digest in unpacked::layers(&images.join(name), tag) {
            let len = fs::metadata(unpacked::blob(&images.join(name), &digest)).unwrap().len();
            let sent = registry.sent(&digest);
            eprintln!("{image}: {sent} of {len} bytes until the mount was there");
            assert!(
                sent < len / 4 + (128 << 10),
                "{image}: {sent} of {len} bytes for a mount"
            );
        }
        session.umount();
        complaints.extend(compare(&mut session, &image, &source, &options, &expected));
        // Once more from what is kept: nothing of any layer is asked for again.
        let layers = unpacked::layers(&images.join(name), tag);
        let before: Vec<_> = layers.iter().map(|digest| registry.sent(digest)).collect();
        complaints.extend(compare(&mut session, &image, &source, &options, &expected));
        let again: Vec<_> = layers.iter().map(|digest| registry.sent(digest)).collect();
        eprintln!("{image}: {before:?} bytes the first time, then {again:?}");
        fs::remove_dir_all(work.path().join("unpacked")).unwrap();
        nothing_left(session);
    }
    none(&complaints);
}

/// A layout with one image of one layer, as a maker of layers or somebody who lies puts it together; pushed like the others.
fn put(dir: &Path, tag: &str, layer: &Chunked, annotations: &BTreeMap<String, String>) {
    let layout = dir.join("made");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let store = |bytes: &[u8]| {
        let digest = chunked::hex(bytes);
        fs::write(blobs.join(digest.strip_prefix("sha256:").unwrap()), bytes).unwrap();
        (digest, bytes.len())
    };
    let (digest, size) = store(&layer.blob);
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": [chunked::hex(&layer.tar)] },
    });
    let (config, config_size) = store(config.to_string().as_bytes());
    let manifest = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": config_size },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar+zstd", "digest": digest, "size": size,
            "annotations": annotations,
        }],
    });
    let (manifest, manifest_size) = store(manifest.to_string().as_bytes());
    let index = json!({ "schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": manifest_size,
        "annotations": { "org.opencontainers.image.ref.name": tag },
    }]});
    fs::write(layout.join("index.json"), index.to_string()).unwrap();
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// Some files: the first short, the second in pieces.
fn files() -> Vec<(String, Vec<Vec<u8>>)> {
    vec![
        ("short".to_owned(), vec![noise(5000, 1)]),
        ("long".to_owned(), (2..8).map(|seed| noise(100_000, seed)).collect()),
        ("last".to_owned(), vec![noise(200_000, 9)]),
    ]
}

/// Mounts what was put under `tag`, and compares every file with what it has to be: read right, or not read at all. How many could
/// not be read; the error if it could not even be mounted.
fn fails_or_right(session: &mut Session, source: &OsString, options: &[OsString]) -> Result<usize, String> {
    let mounted = match session.try_mount(source, options) {
        Ok(mounted) => mounted,
        Err(output) => {
            // Why a table is not used is a line before the one that says how it ended.
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let errors = said.lines().filter(|line| !line.starts_with("tarblk: warn: "));
            assert!(output.status.code() == Some(1) && errors.count() == 1, "{said}");
            return Err(said);
        }
    };
    let mut failed = 0;
    for (name, pieces) in files() {
        match fs::read(mounted.join(&name)) {
            Ok(read) => assert!(read == pieces.concat(), "{name} was served damaged"),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc_eio()), "{name}: {error}");
                failed += 1;
            }
        }
    }
    session.umount();
    Ok(failed)
}

/// `EIO` on Linux.
const fn libc_eio() -> i32 {
    5
}

/// How a lie ends: with `--index auto` and with `require`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// All is read right.
    Right,
    /// The mount is refused.
    Refused,
    /// What is wrong cannot be read.
    Unreadable,
}

/// A layer with these annotations, and what comes of it by `--index auto` and by `--index require`.
type Lie = (&'static str, (Chunked, BTreeMap<String, String>), [End; 2]);

fn lies() -> Vec<Lie> {
    let honest = chunked::layer(&files(), |_| {});
    let other = chunked::layer(&[("else".to_owned(), vec![noise(5000, 77)])], |_| {});
    let with = |key: &str, value: String| {
        let mut annotations = honest.annotations.clone();
        annotations.insert(key.to_owned(), value);
        annotations
    };
    let made = |tweak: &dyn Fn(&mut Vec<Value>)| {
        let layer = chunked::layer(&files(), |entries| tweak(entries));
        let annotations = layer.annotations.clone();
        (layer, annotations)
    };
    let of = |annotations: BTreeMap<String, String>| (honest.clone(), annotations);
    let len = honest.blob.len();
    // What is not vouched for is not used, and what does not fit is not believed: then the whole layer is read.
    vec![
        ("honest", of(honest.annotations.clone()), [End::Right, End::Right]),
        ("unvouched", of(BTreeMap::new()), [End::Right, End::Refused]),
        (
            "wrong digest",
            of(with(CHECKSUM, chunked::hex(b"else"))),
            [End::Right, End::Refused],
        ),
        (
            "no digest",
            of(with(CHECKSUM, "md5:00".to_owned())),
            [End::Right, End::Refused],
        ),
        (
            "of another layer",
            of(other.annotations.clone()),
            [End::Right, End::Refused],
        ),
        // The footer says where it is.
        (
            "position outside",
            of(with(POSITION, format!("{}:100:1000:1", len - 10))),
            [End::Right, End::Right],
        ),
        (
            "position elsewhere",
            of(with(POSITION, "0:100:1000:1".to_owned())),
            [End::Right, End::Refused],
        ),
        (
            "position enormous",
            of(with(POSITION, format!("{}:5:5:1", u64::MAX))),
            [End::Right, End::Right],
        ),
        // Whoever made the layer lied about a file: of that there is no other truth.
        (
            "content",
            made(&|entries| entries[3]["chunkDigest"] = json!(chunked::hex(b"else"))),
            [End::Unreadable, End::Unreadable],
        ),
        (
            "without digest",
            made(&|entries| entries[3]["chunkDigest"] = json!("")),
            [End::Right, End::Refused],
        ),
        (
            "offset outside",
            made(&|entries| entries[7]["offset"] = json!(1_u64 << 40)),
            [End::Right, End::Refused],
        ),
        (
            "overlapping",
            made(&|entries| entries[3]["offset"] = entries[2]["offset"].clone()),
            [End::Right, End::Refused],
        ),
        (
            "backwards",
            made(&|entries| entries.swap(0, 7)),
            [End::Right, End::Refused],
        ),
        (
            "too long",
            made(&|entries| entries[7]["chunkSize"] = json!(9 << 20)),
            [End::Right, End::Refused],
        ),
        (
            "no contents",
            made(&|entries| entries[1]["type"] = json!("what")),
            [End::Right, End::Refused],
        ),
    ]
}

#[test]
fn contents_that_lie_are_never_served() {
    const NAME: &str = "contents_that_lie_are_never_served";
    if laboratory(NAME).is_none() {
        return;
    }
    let work = scratch("lies-");
    let Some(registry) = Registry::start(NAME, Access::Anonymous) else {
        return;
    };
    for (number, (what, (layer, annotations), ends)) in lies().iter().enumerate() {
        let tag = format!("case-{number}");
        put(work.path(), &tag, layer, annotations);
        registry.push(work.path(), &format!("made:{tag}"));
        let source: OsString = registry.image(&format!("made:{tag}")).into();
        let mut session = Session::new("loop");
        for (index, end) in ["auto", "require"].into_iter().zip(*ends) {
            let options = [registry.arguments(), vec!["--index".into(), index.into()]].concat();
            let found = match fails_or_right(&mut session, &source, &options) {
                Ok(0) => End::Right,
                Ok(_) => End::Unreadable,
                Err(_) => End::Refused,
            };
            assert_eq!(found, end, "{what} with --index {index}");
            session.empty_cache();
        }
        nothing_left(session);
    }
}

#[test]
fn damage_behind_good_contents_is_found_out() {
    const NAME: &str = "damage_behind_good_contents_is_found_out";
    if laboratory(NAME).is_none() {
        return;
    }
    let honest = chunked::layer(&files(), |_| {});
    let work = scratch("damaged-");
    put(work.path(), "it", &honest, &honest.annotations);
    let Some(registry) = Registry::with(NAME, Access::Anonymous, work.path(), &["made:it"]) else {
        return;
    };
    let source: OsString = registry.image("made:it").into();
    let digest = chunked::hex(&honest.blob);
    let mut session = Session::new("loop");
    let options = registry.arguments();
    assert_eq!(fails_or_right(&mut session, &source, &options), Ok(0));
    // What is kept is damaged, and so is the layer meanwhile: neither is served.
    let content = u64::try_from(honest.blob.len() / 2).unwrap();
    registry.flip(&digest, content);
    for entry in fs::read_dir(session.dir().join("cache/layers")).unwrap().flatten() {
        if entry.path().extension().is_some_and(|kind| kind == "data") {
            registry::flip(&entry.path(), 300_000);
        }
    }
    assert!(
        fails_or_right(&mut session, &source, &options).unwrap() > 0,
        "nobody noticed"
    );
    session.empty_cache();
    assert!(
        fails_or_right(&mut session, &source, &options).unwrap() > 0,
        "nobody noticed"
    );
    registry.flip(&digest, content);
    assert_eq!(
        fails_or_right(&mut session, &source, &options),
        Ok(0),
        "nothing wrong was kept"
    );
    // A damaged table is none: the whole layer is read, and has another digest.
    session.empty_cache();
    for at in [honest.contents_at + 20, honest.contents_at - 4] {
        registry.flip(&digest, u64::try_from(at).unwrap());
        let outcome = fails_or_right(&mut session, &source, &options);
        // The frame's head that is not part of the table matters to nobody who has the annotation.
        assert!(outcome.is_err() || at < honest.contents_at, "{at}: {outcome:?}");
        registry.flip(&digest, u64::try_from(at).unwrap());
        session.empty_cache();
    }
    nothing_left(session);
}

#[test]
fn an_index_made_of_contents_stays_where_it_is() {
    const NAME: &str = "an_index_made_of_contents_stays_where_it_is";
    if laboratory(NAME).is_none() {
        return;
    }
    let honest = chunked::layer(&files(), |_| {});
    let work = scratch("stays-");
    put(work.path(), "it", &honest, &honest.annotations);
    let Some(registry) = Registry::with(NAME, Access::Anonymous, work.path(), &["made:it"]) else {
        return;
    };
    let mut session = Session::new("loop");
    let source: OsString = registry.image("made:it").into();
    let digest = chunked::hex(&honest.blob);
    let options = registry.arguments();
    let from = |session: &mut Session, index: &str| -> Value {
        let dir = session.dir().join("at");
        fs::create_dir_all(&dir).unwrap();
        let mut arguments = vec![
            OsString::from("mount"),
            source.clone(),
            dir.clone().into(),
            "--json".into(),
        ];
        arguments.extend(["--backend".into(), "loop".into(), "--index".into(), index.into()]);
        arguments.extend(["--trust".into(), "registry".into()]);
        arguments.extend(options.clone());
        let said: Value = serde_json::from_str(&session.succeed(&arguments)).unwrap();
        session.succeed(&[OsString::from("umount"), dir.into()]);
        said["indexes"][0]["from"].clone()
    };
    assert_eq!(from(&mut session, "auto"), "contents");
    assert_eq!(from(&mut session, "auto"), "kept");
    let kept: Vec<_> = fs::read_dir(session.dir().join("cache/index"))
        .unwrap()
        .flatten()
        .collect();
    let [kept] = &kept[..] else {
        panic!("{} indexes are kept", kept.len())
    };
    let kept: OsString = kept.path().into();
    // As anybody else's index it is refused.
    let named = [options.clone(), vec!["--index".into(), kept.clone()]].concat();
    let said = refused(&mut session, &source, &named);
    assert!(said.contains("table of contents"), "{said}");
    let blob: OsString = unpacked::blob(&work.path().join("made"), &digest).into();
    let verified = session.run(&["index".into(), "verify".into(), kept, blob]);
    assert!(one_line("verify", &verified).contains("table of contents"));
    // Who wants none that the layer brings, or another one, gets it, and it is found before the other.
    assert_eq!(from(&mut session, "ignore"), "read");
    let before = registry.sent(&digest);
    assert!(before >= u64::try_from(honest.blob.len()).unwrap());
    assert_eq!(from(&mut session, "auto"), "kept");
    assert_eq!(fs::read_dir(session.dir().join("cache/index")).unwrap().count(), 2);
    let listed = session.succeed(&["ls".into(), source.clone(), "--plain-http".into()]);
    assert!(
        files().iter().all(|(name, _)| listed.contains(name.as_str())),
        "{listed}"
    );
    // A published one comes first.
    let push = [vec!["index".into(), "push".into(), source.clone()], options.clone()].concat();
    session.succeed(&push);
    session.empty_cache();
    assert_eq!(from(&mut session, "auto"), "published");
    assert_eq!(from(&mut session, "require"), "kept");
    nothing_left(session);
}

#[test]
fn a_layer_on_a_web_server_is_mounted_by_its_contents() {
    const NAME: &str = "a_layer_on_a_web_server_is_mounted_by_its_contents";
    if laboratory(NAME).is_none() {
        return;
    }
    let many: Vec<_> = (0..40)
        .map(|n| (format!("more-{n}"), vec![noise(50_000, 100 + n)]))
        .collect();
    let all = [files(), many].concat();
    let honest = chunked::layer(&all, |_| {});
    let forged = chunked::layer(&all, |entries| entries[3]["chunkDigest"] = json!(chunked::hex(b"else")));
    let broken = chunked::layer(&all, |entries| entries[3]["offset"] = json!(1_u64 << 40));
    let origin = Origin::start().unwrap();
    for (path, layer) in [("/honest", &honest), ("/forged", &forged), ("/broken", &broken)] {
        origin.serve_blob(path, layer.blob.as_slice());
    }
    let mut session = Session::new("loop");
    let none: &[OsString] = &[];
    let fetched = |origin: &Origin| origin.counters().bytes;
    let whole = u64::try_from(honest.blob.len()).unwrap();
    // Nobody vouches for such a file; what its table says is right is checked nevertheless.
    session.succeed(&["ls", &origin.url("/honest")]);
    assert!(fetched(&origin) < whole / 4, "{} bytes for a listing", fetched(&origin));
    assert_eq!(fails_or_right(&mut session, &origin.url("/honest").into(), none), Ok(0));
    assert!(fails_or_right(&mut session, &origin.url("/forged").into(), none).unwrap() > 0);
    // Without a table that makes sense, and without ranges, it is read as a whole.
    assert_eq!(fails_or_right(&mut session, &origin.url("/broken").into(), none), Ok(0));
    session.empty_cache();
    origin.set_ranges(false);
    assert_eq!(fails_or_right(&mut session, &origin.url("/honest").into(), none), Ok(0));
    // Nobody vouches for it.
    let required = ["--index".into(), "require".into()];
    assert!(fails_or_right(&mut session, &origin.url("/honest").into(), &required).is_err());
    nothing_left(session);
}
