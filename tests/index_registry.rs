//! `tarblk index push` and `index copy` with Debian's `docker-registry` and images of every coding; nothing is published of
//! images that lie.

mod common;
mod registry;

use std::path::Path;
use std::process::{Command, Output};

use common::{TARBLK, output, unpacked};
use registry::{Access, Registry};
use serde_json::Value;

/// `tarblk` with what opens this registry, and nothing of this machine's user.
fn tarblk(registry: &Registry, arguments: &[&str]) -> Output {
    let mut command = Command::new(TARBLK);
    command
        .args(arguments)
        .arg("--authfile")
        .arg(registry.auth_file())
        .args(["--hosts-dir", "/nonexistent"]);
    command.output().unwrap()
}

fn json(registry: &Registry, arguments: &[&str]) -> Value {
    let Output { status, stdout, stderr } = tarblk(registry, &[arguments, &["--json"]].concat());
    assert!(status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&stderr));
    serde_json::from_slice(&stdout).unwrap()
}

fn bad(registry: &Registry, arguments: &[&str]) -> String {
    let Output { status, stderr, .. } = tarblk(registry, arguments);
    let said = String::from_utf8(stderr).unwrap();
    assert_eq!(status.code(), Some(1), "{said}");
    said
}

/// Checks a layer's index that lies in the registry by reading the layer where the images lie: made again, it is the same.
fn verify(registry: &Registry, layout: &Path, layer: &Value) {
    let blob = unpacked::blob(layout, layer["layer"].as_str().unwrap());
    let index = registry.blob_file(layer["index"].as_str().unwrap());
    let out = output(
        TARBLK,
        &["index".as_ref(), "verify".as_ref(), index.as_ref(), blob.as_ref()],
    );
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        out.status.success(),
        "{layer}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert!(said.contains("the same to the last bit"), "{said}");
}

#[test]
fn indexes_are_pushed_and_copied() {
    const NAME: &str = "indexes_are_pushed_and_copied";
    let Some(images) = unpacked::images(NAME) else { return };
    for (access, name) in [
        (Access::Anonymous, "npm:latest"),
        (Access::Password, "whiteouts:many-layers"),
        (Access::Password, "whiteouts:types"),
    ] {
        let Some(registry) = Registry::with(NAME, access, &images, &[name]) else {
            return;
        };
        let image = registry.image(name);
        let pushed = json(&registry, &["index", "push", &image]);
        let (layout, tag) = name.split_once(':').unwrap();
        let layout = images.join(layout);
        let layers = pushed["layers"].as_array().unwrap();
        let digests: Vec<_> = layers.iter().map(|layer| layer["layer"].as_str().unwrap()).collect();
        assert_eq!(digests, unpacked::layers(&layout, tag));
        // Every tag that it made is told, and no other one.
        let mut made: Vec<_> = registry
            .requests()
            .iter()
            .filter(|line| line.starts_with("PUT"))
            .filter_map(|line| {
                Some(
                    line.split_once("/manifests/")?
                        .1
                        .split([' ', '?', '"'])
                        .next()?
                        .to_owned(),
                )
            })
            .filter(|version| !version.contains(':') && !version.contains("%3A"))
            .filter(|version| version.starts_with("sha256-"))
            .collect();
        let told = pushed["tags"].as_array().unwrap().iter();
        let mut told: Vec<_> = told.map(|tag| tag.as_str().unwrap().to_owned()).collect();
        made.sort();
        made.dedup();
        told.sort();
        assert_eq!(told, made);
        assert!(
            told.iter().filter(|tag| tag.ends_with(".tarblk-v1")).count() >= 1,
            "{told:?}"
        );
        let said = tarblk(&registry, &["index", "push", &image]);
        let (shown, noted) = (
            String::from_utf8(said.stdout).unwrap(),
            String::from_utf8(said.stderr).unwrap(),
        );
        assert!(told.iter().all(|tag| shown.contains(tag)), "{shown}");
        assert!(noted.contains(&format!("{} tag", told.len())), "{noted}");
        for layer in layers {
            assert!(layer["hot_bytes"].as_u64().unwrap() <= layer["index_bytes"].as_u64().unwrap());
            verify(&registry, &layout, layer);
        }
        // Another look finds all of it and publishes the same.
        let again = json(&registry, &["index", "push", &image]);
        assert_eq!(again["artifact"], pushed["artifact"]);
        assert!(
            again["layers"]
                .as_array()
                .unwrap()
                .iter()
                .all(|layer| layer["published"] == "kept")
        );
        // The manifest is what it was.
        assert_eq!(pushed["manifest"].as_str().unwrap(), unpacked::manifest(&layout, tag).0);
        // To another repository that has the image.
        let (from, to) = (image.clone(), registry.image(&format!("copy/of/{name}")));
        let skopeo = Command::new("skopeo")
            .args([
                "copy",
                "--quiet",
                "--preserve-digests",
                "--src-tls-verify=false",
                "--dest-tls-verify=false",
            ])
            .arg("--authfile")
            .arg(registry.auth_file())
            .args([&from, &to])
            .status();
        assert!(skopeo.unwrap().success());
        let copied = json(&registry, &["index", "copy", &from, &to]);
        assert_eq!(
            copied["artifact"], pushed["artifact"],
            "the same image, the same indexes"
        );
        assert!(
            copied["layers"]
                .as_array()
                .unwrap()
                .iter()
                .all(|layer| layer["published"] == "copied")
        );
    }
}

#[test]
fn of_images_that_lie_nothing_is_published() {
    const NAME: &str = "of_images_that_lie_nothing_is_published";
    let Some(images) = unpacked::images(NAME) else { return };
    let Some(registry) = Registry::with(NAME, Access::Anonymous, &images, &["whiteouts:types"]) else {
        return;
    };
    let image = registry.image("whiteouts:types");
    let layers = unpacked::layers(&images.join("whiteouts"), "types");
    // A bit of a blob is another one than when its digest was made.
    registry.flip(&layers[0], 40);
    let said = bad(&registry, &["index", "push", &image]);
    assert!(said.lines().count() == 1 && said.contains("whiteouts"), "{said}");
    let tags = registry.requests();
    assert!(
        !tags
            .iter()
            .any(|line| line.starts_with("PUT") && line.contains("tarblk-v1")),
        "{tags:?}"
    );
    // What is no image in a registry, what is not there, and who may not write.
    for (arguments, expected) in [
        (["index", "push", "oci:nowhere"], "docker://"),
        (["index", "push", "layer.tar"], "docker://"),
        (["index", "push", &registry.image("absent:latest")], "404"),
    ] {
        let said = bad(&registry, &arguments);
        assert!(said.contains(expected), "{said}");
    }
}
