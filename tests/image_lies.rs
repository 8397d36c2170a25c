//! Images and indexes that lie or are damaged: found out, told in one line, never served. What each image does is in
//! tools/images/hostile.py.

mod common;
mod registry;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::images::{compare, laboratory, none, nothing_left, oci, one_line, refused};
use common::session::Session;
use common::unpacked::{self, umoci_unpack};
use common::{TARBLK, scratch, tree};
use registry::{Access, Registry};

/// Reads every file of the right tree from the mounted one: each read fails or gives what is right. How many failed.
fn fails_or_right(what: &str, right: &Path, mounted: &Path) -> usize {
    let mut failed = 0;
    for name in tree::names(right) {
        if right.join(&name).is_file() {
            match fs::read(mounted.join(&name)) {
                Ok(read) => assert!(
                    read == fs::read(right.join(&name)).unwrap(),
                    "{what}: {} was served damaged",
                    name.display()
                ),
                Err(_) => failed += 1,
            }
        }
    }
    failed
}

#[test]
fn images_that_lie_are_never_served() {
    const NAME: &str = "images_that_lie_are_never_served";
    let Some(images) = laboratory(NAME) else { return };
    let (layout, work) = (images.join("hostile"), scratch("hostile-"));
    let mut session = Session::new("loop");
    let honest = umoci_unpack(&layout, "honest", &work.path().join("honest"));
    none(&compare(
        &mut session,
        "honest",
        &oci(&images, "hostile", "honest"),
        &[],
        &honest,
    ));
    // A wrong media type is no lie that counts: the first bytes say what a blob is, and the digests what it has to be.
    for tag in ["not-gzip", "not-plain", "not-zstd"] {
        let right = umoci_unpack(&layout, &format!("{tag}-whole"), &work.path().join(tag));
        none(&compare(&mut session, tag, &oci(&images, "hostile", tag), &[], &right));
    }
    // Damage is found while the headers are read, or when what is damaged is read; found it is.
    for tag in ["flipped", "flipped-plain", "flipped-zstd", "swapped", "short"] {
        let right = umoci_unpack(&layout, &format!("{tag}-whole"), &work.path().join(tag));
        match session.try_mount(oci(&images, "hostile", tag), &[]) {
            Err(output) => drop(one_line(tag, &output)),
            Ok(mounted) => {
                assert!(fails_or_right(tag, &right.root, &mounted) > 0, "{tag}: nobody noticed");
                session.umount();
            }
        }
    }
    for tag in [
        "wrong-manifest",
        "wrong-config",
        "wrong-size",
        "missing-blob",
        "unknown-type",
        "foreign",
        "not-gzip-wrong",
    ] {
        refused(&mut session, &oci(&images, "hostile", tag), &[]);
    }
    nothing_left(session);
}

#[test]
fn whiteouts_of_nothing_remove_nothing() {
    const NAME: &str = "whiteouts_of_nothing_remove_nothing";
    let Some(images) = laboratory(NAME) else { return };
    let mut session = Session::new("loop");
    for tag in ["whiteout-of-dot", "whiteout-of-dots", "whiteout-of-nothing"] {
        match session.try_mount(oci(&images, "hostile", tag), &[]) {
            Err(output) => drop(one_line(tag, &output)),
            Ok(mounted) => {
                assert_eq!(fs::read(mounted.join("data/text")).unwrap().len(), 60_000, "{tag}");
                session.umount();
            }
        }
    }
    nothing_left(session);
}

#[test]
fn a_blob_damaged_behind_a_good_index_is_found_out() {
    const NAME: &str = "a_blob_damaged_behind_a_good_index_is_found_out";
    let Some(images) = laboratory(NAME) else { return };
    let (layout, work) = (images.join("hostile"), scratch("damaged-"));
    let right = umoci_unpack(&layout, "honest", &work.path().join("honest"));
    let Some(registry) = Registry::with(NAME, Access::Anonymous, &images, &["hostile:honest"]) else {
        return;
    };
    let mut session = Session::new("loop");
    let image = registry.image("hostile:honest");
    let push = [
        vec!["index".into(), "push".into(), image.clone().into()],
        registry.arguments(),
    ]
    .concat();
    session.succeed(&push);
    session.empty_cache();
    let digest = unpacked::layers(&layout, "honest").remove(0);
    registry.flip(&digest, 200_000);
    let believed = ["--index", "require", "--trust", "registry"].map(Into::into).to_vec();
    let required = [registry.arguments(), believed].concat();
    let mounted = session.mount_with(&image, &required);
    assert!(fails_or_right("honest", &right.root, &mounted) > 0, "nobody noticed");
    session.umount();
    nothing_left(session);
}

#[test]
fn an_index_that_is_not_this_layers_is_refused() {
    const NAME: &str = "an_index_that_is_not_this_layers_is_refused";
    let Some(images) = laboratory(NAME) else { return };
    let mut session = Session::new("loop");
    let file = |name: &str| session.dir().join(name);
    let (good, other, short) = (file("good.tarblk"), file("other.tarblk"), file("short.tarblk"));
    for (tag, to) in [("honest", &good), ("short-whole", &other)] {
        let source = oci(&images, "hostile", tag);
        session.succeed(&["index".into(), source, "-o".into(), to.into()]);
    }
    let honest = oci(&images, "hostile", "honest");
    session.mount_with(&honest, &["--index".into(), good.clone().into()]);
    session.umount();
    let whole = fs::read(&good).unwrap();
    for length in [0, 7, whole.len() / 2, whole.len() - 1] {
        fs::write(&short, &whole[..length]).unwrap();
        refused(&mut session, &honest, &["--index".into(), short.clone().into()]);
    }
    for at in (0..whole.len()).step_by(whole.len().div_ceil(16)) {
        let mut damaged = whole.clone();
        damaged[at] ^= 0x40;
        fs::write(&short, &damaged).unwrap();
        // Cold parts are read, and checked, when they are needed.
        if let Ok(mounted) = session.try_mount(&honest, &["--index".into(), short.clone().into()]) {
            if let Ok(text) = fs::read(mounted.join("data/text")) {
                assert!(text == b"all is well\n".repeat(5000), "damaged at {at}");
            }
            session.umount();
        }
    }
    refused(&mut session, &honest, &["--index".into(), other.into()]);
    nothing_left(session);
}

/// So much address space has to be enough for a layer that unpacks to much more, in bytes.
const ENOUGH: &str = "3000000000";

#[test]
fn bombs_do_not_fill_memory() {
    const NAME: &str = "bombs_do_not_fill_memory";
    let Some(images) = laboratory(NAME) else { return };
    let work = scratch("bombs-");
    for tag in ["bomb-gzip", "bomb-zstd", "bomb-file"] {
        let output = Command::new("prlimit")
            .args([&format!("--as={ENOUGH}"), TARBLK, "ls", "--json"])
            .arg(oci(&images, "hostile", tag))
            .env("TARBLK_CACHE", work.path().join(tag))
            .output()
            .unwrap();
        if !output.status.success() {
            one_line(tag, &output);
        }
    }
}
