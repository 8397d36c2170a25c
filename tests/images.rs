//! Whole images, from layouts and from real registries: the mounted tree is what `umoci unpack` makes of the image, for every
//! coding and everything that a layer can do to those below it. What lies is in `image_lies.rs`.

mod common;
mod registry;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use common::images::{compare, laboratory, none, nothing_left, oci, refused};
use common::session::{Session, is_mounted};
use common::unpacked::{self, umoci_unpack};
use common::{scratch, skip, tree};
use registry::front::{Front, URL_LIFETIME};
use registry::{Access, Registry, TOKEN_SECONDS};
use serde_json::Value;

#[test]
fn layers_do_to_each_other_what_umoci_makes_of_them() {
    const NAME: &str = "layers_do_to_each_other_what_umoci_makes_of_them";
    let Some(images) = laboratory(NAME) else { return };
    let (layout, work) = (images.join("whiteouts"), scratch("whiteouts-"));
    let mut session = Session::new("loop");
    let mut complaints = Vec::new();
    for tag in unpacked::tags(&layout) {
        let expected = umoci_unpack(&layout, &tag, &work.path().join(tag.as_str()));
        complaints.extend(compare(
            &mut session,
            &tag,
            &oci(&images, "whiteouts", &tag),
            &[],
            &expected,
        ));
    }
    none(&complaints);
    nothing_left(session);
}

#[test]
fn every_coding_is_what_umoci_makes_of_it() {
    const NAME: &str = "every_coding_is_what_umoci_makes_of_it";
    let Some(images) = laboratory(NAME) else { return };
    let work = scratch("codings-");
    let mut session = Session::new("loop");
    let mut complaints = Vec::new();
    // `latest` of debian-python has a layer of every coding; npm has those one by one whose makers are others.
    let npm = unpacked::tags_if_any(&images.join("npm"));
    if npm.is_empty() {
        skip(NAME, "no npm image (npm was missing when the images were made)");
    }
    let npm = npm
        .iter()
        .filter(|tag| ["estargz", "zstd", "zstdchunked-skopeo"].contains(&tag.as_str()))
        .map(|tag| ("npm", tag.as_str()));
    for (name, tag) in [("debian-python", "latest"), ("debian-python", "estargz")]
        .into_iter()
        .chain(npm)
    {
        let place = work.path().join("unpacked");
        let expected = umoci_unpack(&images.join(name), tag, &place);
        let what = format!("{name}:{tag}");
        complaints.extend(compare(&mut session, &what, &oci(&images, name, tag), &[], &expected));
        // Once more from what the first time left behind.
        complaints.extend(compare(&mut session, &what, &oci(&images, name, tag), &[], &expected));
        session.empty_cache();
        fs::remove_dir_all(place).unwrap();
    }
    none(&complaints);
    nothing_left(session);
}

/// Overlayfs over directories, the lowest first; unmounted when dropped.
struct Stack(PathBuf);

impl Stack {
    fn mount(layers: &[PathBuf], at: PathBuf) -> Self {
        fs::create_dir_all(&at).unwrap();
        let lower: Vec<_> = layers.iter().rev().map(|dir| dir.to_str().unwrap()).collect();
        let options = format!("ro,lowerdir={}", lower.join(":"));
        common::succeed(
            Command::new("mount")
                .args(["-t", "overlay", "overlay", "-o", &options])
                .arg(&at),
        );
        Self(at)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn single_layers_under_overlayfs_are_the_whole() {
    const NAME: &str = "single_layers_under_overlayfs_are_the_whole";
    let Some(images) = laboratory(NAME) else { return };
    let work = scratch("stacks-");
    if !unpacked::has_overlayfs() {
        return skip(NAME, "this kernel has no overlayfs");
    }
    let mut complaints = Vec::new();
    let tags = unpacked::tags(&images.join("whiteouts"));
    let alone = |tag: &&String| unpacked::NOT_ALONE.iter().all(|(name, _)| name != tag);
    let tags: Vec<_> = tags
        .iter()
        .filter(alone)
        .map(|tag| ("whiteouts", tag.as_str()))
        .collect();
    for (name, tag) in tags.into_iter().chain([("debian-python", "distribution")]) {
        let layout = images.join(name);
        let mut expected = umoci_unpack(&layout, tag, &work.path().join(tag));
        // A directory that a layer does not describe has made-up attributes there, which hide the lower layer's.
        for digest in unpacked::layers(&layout, tag) {
            expected
                .implied
                .extend(unpacked::parents_without_entry(&unpacked::blob(&layout, &digest)));
        }
        let mut session = Session::new("loop");
        let source = oci(&images, name, tag);
        let layers: Vec<_> = (0..unpacked::layers(&layout, tag).len())
            .map(|n| session.mount_with(&source, &["--layer".into(), (n + 1).to_string().into()]))
            .collect();
        let stack = Stack::mount(&layers, work.path().join(format!("{tag}-stack")));
        let differences = tree::differences(&expected.root, &stack.0, &expected.implied);
        let unknown = differences
            .into_iter()
            .filter(|line| !unpacked::is_known(tag, line) && !unpacked::is_links_only(line));
        complaints.extend(unknown.map(|line| format!("{name}:{tag}: {line}")));
        // A daemon that starts now sees the stack, and must not keep what it stands on.
        let mut later = Session::new("loop");
        later.mount_with(&source, &["--layer".into(), "1".into()]);
        drop(stack);
        for _ in layers {
            session.umount();
        }
        later.umount();
        nothing_left(later);
        nothing_left(session);
        fs::remove_dir_all(work.path().join(tag)).unwrap();
    }
    none(&complaints);
}

#[test]
fn registries_of_every_kind_give_the_same_image() {
    const NAME: &str = "registries_of_every_kind_give_the_same_image";
    let Some(images) = laboratory(NAME) else { return };
    let work = scratch("registries-");
    let expected = umoci_unpack(&images.join("whiteouts"), "types", &work.path().join("types"));
    let mut complaints = Vec::new();
    for access in [
        Access::Anonymous,
        Access::Password,
        Access::Token,
        Access::AnonymousToken,
        Access::Tls,
        Access::ClientCertificate,
    ] {
        let Some(registry) = Registry::with(NAME, access, &images, &["whiteouts:types"]) else {
            return;
        };
        let mut session = Session::new("loop");
        let source = registry.image("whiteouts:types").into();
        let what = format!("{access:?}");
        complaints.extend(compare(&mut session, &what, &source, &registry.arguments(), &expected));
        session.empty_cache();
        // Docker's manifest of the same, and the image by its digest.
        registry.push_schema2(&images, "whiteouts:types", "whiteouts:docker");
        let docker = registry.image("whiteouts:docker").into();
        complaints.extend(compare(&mut session, &what, &docker, &registry.arguments(), &expected));
        let (digest, _) = unpacked::manifest(&images.join("whiteouts"), "types");
        let by_digest = registry.image(&format!("whiteouts@{digest}")).into();
        complaints.extend(compare(
            &mut session,
            &what,
            &by_digest,
            &registry.arguments(),
            &expected,
        ));
        nothing_left(session);
    }
    none(&complaints);
}

#[test]
fn wrong_credentials_are_refused_in_one_line_without_them() {
    const NAME: &str = "wrong_credentials_are_refused_in_one_line_without_them";
    let Some(images) = laboratory(NAME) else { return };
    for access in [Access::Password, Access::Token] {
        let Some(registry) = Registry::with(NAME, access, &images, &["whiteouts:file"]) else {
            return;
        };
        let mut session = Session::new("loop");
        for credentials in [vec![], vec!["--creds".into(), "reader:wr0ng-one".into()]] {
            let options = [credentials, vec!["--plain-http".into()]].concat();
            let said = refused(&mut session, &registry.image("whiteouts:file").into(), &options);
            assert!(!said.contains("wr0ng-one"), "{said}");
        }
        nothing_left(session);
    }
}

#[test]
fn tokens_and_signed_urls_end_and_no_read_fails() {
    const NAME: &str = "tokens_and_signed_urls_end_and_no_read_fails";
    let Some(images) = laboratory(NAME) else { return };
    let work = scratch("expiry-");
    let expected = umoci_unpack(&images.join("debian-python"), "latest", &work.path().join("unpacked"));
    let Some(registry) = Registry::with(NAME, Access::Token, &images, &["debian-python:latest"]) else {
        return;
    };
    let front = Front::start(&registry);
    let mut session = Session::new("loop");
    let mounted = session.mount_with(front.image("debian-python:latest"), &front.arguments(&registry));
    let files = [
        "usr/bin/python3.11",
        "usr/lib/python3/dist-packages/numpy/__init__.py",
        "opt/app/noise",
        "usr/lib/x86_64-linux-gnu/libc.so.6",
        "etc/app/07.json",
    ];
    for name in files {
        // By now neither a token nor a URL that it has is good any more.
        thread::sleep(Duration::max(Duration::from_secs(TOKEN_SECONDS + 1), URL_LIFETIME));
        let read = fs::read(mounted.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(read == fs::read(expected.root.join(name)).unwrap(), "{name} differs");
    }
    let seen = front.seen();
    assert_eq!(seen.leaks, 0, "credentials went to the storage: {seen:?}");
    assert!(seen.redirects >= 2 && seen.served >= 2, "{seen:?}");
    assert!(
        registry.tokens().counts().0 >= 2,
        "one token was enough: nothing has been tested"
    );
    // What is not secret may be seen: nothing here is.
    let stats = session.succeed(&["stats", mounted.to_str().unwrap()]);
    let kept: String = fs::read_dir(session.dir().join("states"))
        .into_iter()
        .flatten()
        .flatten()
        .filter(|entry| {
            entry
                .path()
                .extension()
                .is_some_and(|name| name == "json" || name == "log" || name == "spec")
        })
        .map(|entry| fs::read_to_string(entry.path()).unwrap_or_default())
        .collect();
    for secret in [registry::PASSWORD, "X-Signature", "eyJ"] {
        assert!(
            !stats.contains(secret) && !kept.contains(secret),
            "{secret} can be seen"
        );
    }
    session.umount();
    nothing_left(session);
}

#[test]
fn ls_lists_the_merged_tree() {
    const NAME: &str = "ls_lists_the_merged_tree";
    let Some(images) = laboratory(NAME) else { return };
    let work = scratch("ls-");
    let session = Session::new("loop");
    let tags = unpacked::tags(&images.join("whiteouts"));
    let tags = tags.iter().map(|tag| ("whiteouts", tag.as_str()));
    for (name, tag) in tags.chain([("debian-python", "latest")]) {
        let expected = umoci_unpack(&images.join(name), tag, &work.path().join(tag));
        let mut expected: BTreeSet<PathBuf> = tree::names(&expected.root).into_iter().collect();
        if tag == "missing-parent" {
            expected.insert("none".into());
        }
        let source = oci(&images, name, tag).into_string().unwrap();
        let found: BTreeSet<PathBuf> = session
            .succeed(&["ls", &source, "--json"])
            .lines()
            .map(|line| {
                let entry: Value = serde_json::from_str(line).unwrap();
                let path = entry["path"].as_str().unwrap();
                PathBuf::from(path.trim_start_matches("./").trim_matches('/'))
            })
            .filter(|path| !path.as_os_str().is_empty() && path != Path::new("."))
            .collect();
        let differences: Vec<_> = expected.symmetric_difference(&found).collect();
        assert!(differences.is_empty(), "{name}:{tag}: {differences:?}");
        fs::remove_dir_all(work.path().join(tag)).unwrap();
    }
}

#[test]
fn diff_tells_what_changed_and_what_it_costs() {
    const NAME: &str = "diff_tells_what_changed_and_what_it_costs";
    let Some(images) = laboratory(NAME) else { return };
    let session = Session::new("loop");
    let diff = |a: &str, b: &str| -> Vec<Value> {
        let [a, b] = [a, b].map(|tag| oci(&images, "whiteouts", tag).into_string().unwrap());
        let lines = session.succeed(&["diff", &a, &b, "--json"]);
        lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let changes = |lines: &[Value]| -> Vec<String> {
        let changed = lines.iter().filter(|line| line["change"].is_string());
        let path = |line: &Value| {
            let side = if line["after"].is_object() { "after" } else { "before" };
            line[side]["path"]
                .as_str()
                .unwrap_or_default()
                .trim_start_matches("./")
                .trim_end_matches('/')
                .to_owned()
        };
        changed
            .map(|line| format!("{} {}", line["change"].as_str().unwrap(), path(line)))
            .collect()
    };
    assert_eq!(changes(&diff("nothing", "nothing")), Vec::<String>::new());
    assert_eq!(changes(&diff("nothing", "file")), ["removed a/one"]);
    assert_eq!(changes(&diff("file", "nothing")), ["added a/one"]);
    assert_eq!(
        changes(&diff("nothing", "dir")),
        [
            "removed a/sub",
            "removed a/sub/deep",
            "removed a/sub/deep/four",
            "removed a/sub/three"
        ]
    );
}

#[test]
fn a_pushed_index_is_found_and_spares_the_layers() {
    const NAME: &str = "a_pushed_index_is_found_and_spares_the_layers";
    let Some(images) = laboratory(NAME) else { return };
    let work = scratch("pushed-");
    let expected = umoci_unpack(&images.join("debian-python"), "latest", &work.path().join("unpacked"));
    let Some(registry) = Registry::with(NAME, Access::Token, &images, &["debian-python:latest"]) else {
        return;
    };
    let mut session = Session::new("loop");
    let image = registry.image("debian-python:latest");
    let options = registry.arguments();
    let push = [
        vec!["index".into(), "push".into(), image.clone().into()],
        options.clone(),
    ]
    .concat();
    session.succeed(&push);
    session.empty_cache();
    let before = registry.requests().len();
    let believed = ["--index", "require", "--trust", "registry"].map(Into::into).to_vec();
    let required = [options, believed].concat();
    let mounted = session.mount_with(&image, &required);
    assert_eq!(
        fs::read(mounted.join("opt/app/main.py")).unwrap(),
        fs::read(expected.root.join("opt/app/main.py")).unwrap()
    );
    // No layer was read as a whole: every answer with bytes of one was of a range.
    let requests = registry.requests();
    for digest in unpacked::layers(&images.join("debian-python"), "latest") {
        let whole = format!("GET /v2/debian-python/blobs/{digest} 200");
        assert!(!requests[before..].contains(&whole), "{whole}");
    }
    session.umount();
    none(&compare(
        &mut session,
        "debian-python:latest",
        &image.clone().into(),
        &required,
        &expected,
    ));
    // The next one asks what the tag is, and then for bytes alone.
    let requests = registry.requests();
    session.mount_with(&image, &required);
    let before = requests.len();
    let asked = registry.requests()[before..].join("\n");
    assert!(
        asked.contains("/manifests/latest 200") && !asked.contains("referrers"),
        "{asked}"
    );
    assert!(!asked.contains("/manifests/sha256"), "{asked}");
    session.umount();
    nothing_left(session);
}

#[test]
fn an_announced_index_is_used() {
    const NAME: &str = "an_announced_index_is_used";
    let Some(images) = laboratory(NAME) else { return };
    let work = scratch("announced-");
    let expected = umoci_unpack(&images.join("hostile"), "honest", &work.path().join("unpacked"));
    let Some(registry) = Registry::with(NAME, Access::Anonymous, &images, &["hostile:honest"]) else {
        return;
    };
    let front = Front::start(&registry);
    let mut session = Session::new("loop");
    let index = session.dir().join("honest.tarblk");
    session.succeed(&[
        "index".into(),
        oci(&images, "hostile", "honest"),
        "-o".into(),
        index.clone().into(),
    ]);
    let digest = registry.put_blob("hostile", &index);
    front.announce(&unpacked::layers(&images.join("hostile"), "honest")[0], &digest);
    session.empty_cache();
    let options = ["--plain-http", "--index", "require", "--trust", "registry"].map(Into::into);
    let image = front.image("hostile:honest").into();
    none(&compare(&mut session, "hostile:honest", &image, &options, &expected));
    nothing_left(session);
}

#[test]
fn a_mirror_stands_for_a_registry_that_is_not_there() {
    const NAME: &str = "a_mirror_stands_for_a_registry_that_is_not_there";
    let Some(images) = laboratory(NAME) else { return };
    let work = scratch("mirror-");
    let expected = umoci_unpack(&images.join("whiteouts"), "types", &work.path().join("types"));
    let Some(mirror) = Registry::with(NAME, Access::Tls, &images, &["whiteouts:types"]) else {
        return;
    };
    // Nobody can look up a name below `invalid` (RFC 6761), and the first mirror does not answer.
    let host = work.path().join("hosts/registry.invalid");
    fs::create_dir_all(&host).unwrap();
    let certificate = mirror.authority().path("ca.crt");
    let table = format!(
        "server = \"https://registry.invalid\"\n\
         [host.\"http://127.0.0.1:9\"]\n  capabilities = [\"pull\", \"resolve\"]\n\
         [host.\"{}\"]\n  capabilities = [\"pull\", \"resolve\"]\n  ca = {certificate:?}\n",
        mirror.url(),
    );
    fs::write(host.join("hosts.toml"), table).unwrap();
    let mut session = Session::new("loop");
    let options = ["--hosts-dir".into(), work.path().join("hosts").into()];
    let image = "docker://registry.invalid/whiteouts:types".into();
    none(&compare(&mut session, "by a mirror", &image, &options, &expected));
    nothing_left(session);
}

#[test]
fn the_right_platform_is_taken() {
    const NAME: &str = "the_right_platform_is_taken";
    let Some(images) = laboratory(NAME) else { return };
    let Some(registry) = Registry::with(NAME, Access::Anonymous, &images, &["debian-python:multi"]) else {
        return;
    };
    let mut session = Session::new("loop");
    for (platform, has_numpy) in [("linux/amd64", true), ("linux/arm64", false)] {
        let options = ["--plain-http".into(), "--platform".into(), platform.into()];
        let mounted = session.mount_with(registry.image("debian-python:multi"), &options);
        assert_eq!(
            mounted.join("usr/lib/python3/dist-packages/numpy").is_dir(),
            has_numpy,
            "{platform}"
        );
        session.umount();
        assert!(!is_mounted(&mounted));
    }
    let options = ["--plain-http".into(), "--platform".into(), "linux/s390x".into()];
    let said = refused(&mut session, &registry.image("debian-python:multi").into(), &options);
    assert!(said.contains("s390x"), "{said}");
    nothing_left(session);
}
