//! zstd:chunked layers made here, so that tests can make them lie.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// What the manifest says of the table of contents.
pub(crate) const CHECKSUM: &str = "io.github.containers.zstd-chunked.manifest-checksum";
pub(crate) const POSITION: &str = "io.github.containers.zstd-chunked.manifest-position";

/// A layer as an image has it.
#[derive(Clone, Debug)]
pub(crate) struct Chunked {
    pub(crate) blob: Vec<u8>,
    pub(crate) tar: Vec<u8>,
    pub(crate) annotations: BTreeMap<String, String>,
    /// Where in the blob its table of contents begins.
    pub(crate) contents_at: usize,
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().fold("sha256:".to_owned(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn frame(bytes: &[u8]) -> Vec<u8> {
    zstd::bulk::compress(bytes, 1).unwrap()
}

fn skippable(bytes: &[u8]) -> Vec<u8> {
    let len = u32::try_from(bytes.len()).unwrap().to_le_bytes();
    [&b"\x50\x2a\x4d\x18"[..], &len, bytes].concat()
}

/// A layer of files, each in its pieces. `tweak` changes the table of contents before it is written.
pub(crate) fn layer(files: &[(String, Vec<Vec<u8>>)], tweak: impl FnOnce(&mut Vec<Value>)) -> Chunked {
    let (mut blob, mut tar, mut entries) = (Vec::new(), Vec::new(), Vec::new());
    let put = |bytes: &[u8], blob: &mut Vec<u8>, tar: &mut Vec<u8>| {
        let at = blob.len();
        blob.extend(frame(bytes));
        tar.extend_from_slice(bytes);
        at
    };
    for (name, pieces) in files {
        let size: usize = pieces.iter().map(Vec::len).sum();
        let mut header = tar::Header::new_gnu();
        header.set_path(name).unwrap();
        header.set_size(u64::try_from(size).unwrap());
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000);
        header.set_uid(0);
        header.set_gid(0);
        header.set_cksum();
        put(header.as_bytes(), &mut blob, &mut tar);
        let mut from = 0;
        for (number, piece) in pieces.iter().enumerate() {
            let at = put(piece, &mut blob, &mut tar);
            let mut entry = json!({
                "type": if number == 0 { "reg" } else { "chunk" }, "name": name, "offset": at,
                "chunkOffset": from, "chunkSize": piece.len(), "chunkDigest": hex(piece),
            });
            if number == 0 {
                entry["size"] = json!(size);
                entry["mode"] = json!(0o644);
                entry["modtime"] = json!("2023-11-14T22:13:20Z");
            }
            entries.push(entry);
            from += piece.len();
        }
        if !size.is_multiple_of(512) {
            put(&vec![0; 512 - size % 512], &mut blob, &mut tar);
        }
    }
    put(&[0; 1024], &mut blob, &mut tar);
    tweak(&mut entries);
    let json = json!({ "version": 1, "entries": entries }).to_string();
    let packed = frame(json.as_bytes());
    let at = blob.len() + 8;
    blob.extend(skippable(&packed));
    let numbers = [at, packed.len(), json.len(), 1, 0, 0, 0].map(|number| u64::try_from(number).unwrap().to_le_bytes());
    blob.extend(skippable(&[numbers.as_flattened(), b"GNUlInUx"].concat()));
    let position = format!("{at}:{}:{}:1", packed.len(), json.len());
    let annotations = [(CHECKSUM.to_owned(), hex(&packed)), (POSITION.to_owned(), position)];
    Chunked {
        blob,
        tar,
        annotations: annotations.into(),
        contents_at: at,
    }
}
