//! Many small images, as an OCI layout: each has the same lowest layer (busybox) and gzip layers of its own above it.

use std::fs;
use std::io;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tarblk::internals::digest::{Algorithm, Digest};

use crate::common::{packed::gzip, succeed};

/// Files in each layer of an image's own, and bytes in each file.
const FILES: usize = 20;
const FILE_BYTES: usize = 4096;

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

/// Writes `images` images of `layers` layers into `dir`, with the tags `0`, `1` and so on.
pub(crate) fn write(dir: &Path, images: usize, layers: usize) -> io::Result<()> {
    fs::create_dir_all(dir.join("blobs/sha256"))?;
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let base = pack(dir, &base()?)?;
    let mut manifests = Vec::new();
    for image in 0..images {
        let mut all = vec![base.clone()];
        for layer in 1..layers {
            all.push(pack(dir, &own(image, layer)?)?);
        }
        let (descriptors, diff_ids): (Vec<_>, Vec<_>) = all.into_iter().unzip();
        let config = json!({ "architecture": "amd64", "os": "linux", "config": { "Cmd": ["/bin/true"] },
            "rootfs": { "type": "layers", "diff_ids": diff_ids } });
        let config = put(dir, CONFIG, config.to_string().as_bytes())?;
        let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": descriptors });
        let mut manifest = put(dir, MANIFEST, manifest.to_string().as_bytes())?;
        manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": image.to_string() });
        manifests.push(manifest);
    }
    let index = json!({ "schemaVersion": 2, "manifests": manifests });
    fs::write(dir.join("index.json"), index.to_string())
}

fn put(dir: &Path, media_type: &str, bytes: &[u8]) -> io::Result<Value> {
    let digest = Digest::of(Algorithm::Sha256, bytes);
    fs::write(dir.join("blobs/sha256").join(digest.hex()), bytes)?;
    Ok(json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }))
}

/// A layer's descriptor and its diff ID.
fn pack(dir: &Path, tar: &[u8]) -> io::Result<(Value, Digest)> {
    Ok((put(dir, LAYER, &gzip(tar))?, Digest::of(Algorithm::Sha256, tar)))
}

fn base() -> io::Result<Vec<u8>> {
    let found = succeed(Command::new("sh").args(["-c", "command -v busybox"]));
    let busybox = fs::read(String::from_utf8_lossy(&found).trim())?;
    let mut tar = tar::Builder::new(Vec::new());
    for name in ["bin/", "etc/", "proc/", "sys/", "dev/", "run/"] {
        append(&mut tar, name, tar::EntryType::Directory, 0o755, &[])?;
    }
    append(&mut tar, "bin/true", tar::EntryType::Regular, 0o755, &busybox)?;
    tar.into_inner()
}

fn own(image: usize, layer: usize) -> io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let dir = format!("image-{image}-layer-{layer}/");
    append(&mut tar, &dir, tar::EntryType::Directory, 0o755, &[])?;
    for file in 0..FILES {
        let line = format!("{image} {layer} {file}\n");
        let content: Vec<u8> = line.bytes().cycle().take(FILE_BYTES).collect();
        append(
            &mut tar,
            &format!("{dir}{file}"),
            tar::EntryType::Regular,
            0o644,
            &content,
        )?;
    }
    tar.into_inner()
}

fn append(
    tar: &mut tar::Builder<Vec<u8>>,
    name: &str,
    kind: tar::EntryType,
    mode: u32,
    content: &[u8],
) -> io::Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_mtime(1_700_000_000);
    header.set_size(u64::try_from(content.len()).unwrap_or_default());
    tar.append_data(&mut header, name, content)
}
