//! Tables of contents against what they are the contents of: the layer read as a whole, through tarblk's own tar
//! parser, must have the same entries in the same order with the same bytes in them.
//!
//! Layers as containerd's converter makes them (tools/test-images), and some made here, with what that converter does
//! not do.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};

use common::{have, skip, unpacked};
use sha2::{Digest, Sha256};
use tarblk::internals::index::toc::{Contents, Format, Place, TAIL};
use tarblk::internals::index::{Collector, Entry, EntrySink, Index, IndexBuilder, Kind, Parser, rebuild_tar};
use tarblk::internals::layer::{Coding, Decoder, Indexer};
use tarblk::internals::units::TarOffset;

type Annotations = BTreeMap<String, String>;

fn len(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap()
}

fn range(start: u64, end: u64) -> std::ops::Range<usize> {
    usize::try_from(start).unwrap()..usize::try_from(end).unwrap()
}

/// A blob's tar and its entries, by way of its headers.
fn read_whole(blob: &[u8]) -> (Vec<u8>, Vec<Entry>) {
    let mut indexer = Indexer::new(Coding::of_bytes(blob), 1 << 20);
    let mut tar = Vec::new();
    for piece in blob.chunks(1 << 20) {
        indexer.feed(piece, &mut |bytes| tar.extend_from_slice(bytes)).unwrap();
    }
    indexer.finish().unwrap();
    let (mut parser, mut entries) = (Parser::new(), Collector::default());
    parser.feed(TarOffset(0), &tar, &mut entries).unwrap();
    parser.finish(TarOffset(len(&tar))).unwrap();
    (tar, entries.0)
}

/// Decodes what the table of contents calls the tar from one of its spans on.
fn decode(contents: &Contents, span: usize, blob: &[u8], until: TarOffset, piece: usize) -> Vec<u8> {
    let mut decoder = Decoder::start(contents.table(), span, &[]).unwrap().until(until);
    let mut out = Vec::new();
    let from = usize::try_from(contents.table().span(span).blob.start).unwrap();
    for bytes in blob[from..].chunks(piece) {
        decoder.feed(bytes, &mut |bytes| out.extend_from_slice(bytes)).unwrap();
    }
    assert!(decoder.is_done());
    out
}

fn open(blob: &[u8], annotations: &Annotations) -> Contents {
    let tail = &blob[blob.len().saturating_sub(usize::try_from(TAIL).unwrap())..];
    let place = Place::of_tail(tail, len(blob)).expect("a footer");
    if let Some(annotated) = Place::of_annotations(annotations, len(blob)) {
        assert_eq!(annotated, place);
    }
    place
        .open(&blob[range(place.blob.start, place.blob.end)], len(blob), annotations)
        .unwrap()
}

/// What stays the same: everything but where it lies, whole seconds, and how names are written.
fn essence(entry: &Entry, seconds: bool) -> Entry {
    let mut entry = entry.clone();
    let path = entry.path.strip_prefix(b"./").unwrap_or(&entry.path);
    entry.path = path.strip_suffix(b"/").unwrap_or(path).to_vec();
    if entry.kind == Kind::Hardlink {
        entry.link = entry.link.strip_prefix(b"./").unwrap_or(&entry.link).to_vec();
    }
    if seconds {
        entry.mtime.nanos = 0;
    }
    entry.segments.clear();
    entry.headers = tarblk::internals::units::TarRange::default();
    entry
}

/// A file's content by its segments.
fn content(entry: &Entry, tar: &[u8]) -> Vec<u8> {
    let mut out = vec![0; usize::try_from(entry.size).unwrap()];
    for segment in &entry.segments {
        let bytes = &tar[range(segment.tar_offset.0, segment.tar_offset.0 + segment.len)];
        out[range(segment.file_offset, segment.file_offset + segment.len)].copy_from_slice(bytes);
    }
    out
}

/// Compares a table of contents with the layer. Returns how many files' bytes were compared.
fn check(what: &str, blob: &[u8], annotations: &Annotations) -> usize {
    let (tar, expected) = read_whole(blob);
    let contents = open(blob, annotations);
    let mut collected = Collector::default();
    contents.replay(&mut collected).unwrap();
    let entries = collected.0;
    assert_eq!(entries.len(), usize::try_from(contents.entries()).unwrap());
    let seconds =
        contents.format() == Format::Stargz || annotations.contains_key("containerd.io/snapshot/stargz/toc.digest");
    for (found, expected) in entries.iter().zip(&expected) {
        let (mut found, mut expected) = (essence(found, seconds), essence(expected, seconds));
        if seconds && found.mtime.secs == expected.mtime.secs + 1 {
            // Times are rounded there, not cut.
            expected.mtime = found.mtime;
        }
        // An empty text and no time are the same to containerd's converter.
        if found.mtime.secs <= 0 && expected.mtime.secs <= 0 {
            found.mtime = expected.mtime;
        }
        assert_eq!(found, expected, "{what}");
    }
    assert_eq!(entries.len(), expected.len(), "{what}");

    // All of its tar space at once, then from many places in it, with no more than a span's bytes.
    let table = contents.table();
    let all = decode(&contents, 0, blob, TarOffset(u64::MAX), 65_537);
    assert_eq!(len(&all), table.tar_len(), "{what}");
    let mut files = 0;
    for (found, expected) in entries.iter().zip(&expected) {
        if found.kind == Kind::File {
            files += 1;
            let name = String::from_utf8_lossy(&found.path);
            assert!(content(found, &all) == content(expected, &tar), "{what}: {name}");
        }
    }
    for n in (0..table.len()).step_by(table.len() / 300 + 1) {
        let span = table.span(n);
        let bytes = &blob[..usize::try_from(span.blob.end).unwrap()];
        let decoded = decode(&contents, n, bytes, span.tar.end(), 1000);
        assert!(
            decoded == all[range(span.tar.start.0, span.tar.end().0)],
            "{what}: span {n}"
        );
    }
    let mut pieces = 0;
    contents.digests(&mut |piece, digest| {
        let bytes = &all[range(piece.start.0, piece.end().0)];
        assert!(
            digest.is_none_or(|digest| digest == <[u8; 32]>::from(Sha256::digest(bytes))),
            "{what}: {piece}"
        );
        pieces += piece.len;
    });
    let stored: u64 = entries
        .iter()
        .flat_map(|entry| &entry.segments)
        .map(|segment| segment.len)
        .sum();
    assert_eq!(pieces, stored, "{what}: every byte of content lies in a piece");
    // An index takes them, and the table survives being written down.
    let mut builder = IndexBuilder::new();
    for entry in &entries {
        builder.entry(entry).unwrap();
    }
    let mut encoded = Vec::new();
    table.encode(&mut encoded);
    assert_eq!(
        tarblk::internals::layer::SpanTable::decode(&encoded).as_ref(),
        Ok(table)
    );
    let (table, complete) = (table.clone(), contents.are_digests_complete());
    let index = Index::open(contents.into_index(IndexBuilder::new()).unwrap()).unwrap();
    assert!(index.is_of_contents() && index.spans() == Some(&table));
    let mut again = Collector::default();
    index.replay(&mut again).unwrap();
    assert_eq!(again.0, entries, "{what}");
    let digests = index.piece_digests().unwrap();
    assert_eq!(digests.are_complete(), complete);
    // Its positions are of no use to who wants the tar itself.
    assert!(rebuild_tar(&index, &mut |_, _| Ok(()), &mut std::io::sink()).is_err());
    files
}

#[test]
fn layers_by_containerds_converter() {
    let test = "layers_by_containerds_converter";
    let Some(images) = unpacked::images(test) else { return };
    let (mut layers, mut files) = (0, 0);
    for (image, tags) in [
        ("debian-python", ["estargz", "zstdchunked"]),
        ("npm", ["estargz", "zstdchunked"]),
    ] {
        let layout = images.join(image);
        if !layout.exists() {
            skip(test, &format!("no image {image}"));
            continue;
        }
        for tag in tags {
            let (_, manifest) = unpacked::manifest(&layout, tag);
            for layer in manifest["layers"].as_array().unwrap() {
                // The biggest ones take long without optimisation, and have nothing that the others lack.
                if layer["size"].as_u64().unwrap() > 12_000_000 {
                    continue;
                }
                let digest = layer["digest"].as_str().unwrap();
                let blob = fs::read(unpacked::blob(&layout, digest)).unwrap();
                let annotations: Annotations = serde_json::from_value(layer["annotations"].clone()).unwrap();
                assert!(open(&blob, &annotations).is_vouched());
                files += check(&format!("{image}:{tag} {digest}"), &blob, &annotations);
                layers += 1;
            }
        }
    }
    assert!(layers > 3 && files > 1000, "{layers} layers, {files} files");
}

/// A layer that a few lines of Python make: `members` of compressed tar, a table of contents, a footer.
fn made(lines: &str) -> Option<Vec<u8>> {
    if !have("python3") || !have("zstd") {
        skip("layer_contents", "no python3 or no zstd");
        return None;
    }
    let script = format!("{PRELUDE}\n{lines}\nsys.stdout.buffer.write(out)\n");
    let made = Command::new("python3")
        .args(["-c", &script])
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(made.status.success());
    Some(made.stdout)
}

const PRELUDE: &str = r#"
import sys, gzip, tarfile, io, json, struct, subprocess, hashlib, base64
def header(name, size=0, **how):
    info = tarfile.TarInfo(name); info.size = size
    for key, value in how.items(): setattr(info, key, value)
    return info.tobuf(tarfile.PAX_FORMAT)
def pad(n): return bytes(-n % 512)
def z(data): return subprocess.run(["zstd", "-qc"], input=data, stdout=subprocess.PIPE, check=True).stdout
def gz(data): return gzip.compress(data, mtime=0)
def skippable(data): return b"\x50\x2a\x4d\x18" + struct.pack("<I", len(data)) + data
def sha(data): return "sha256:" + hashlib.sha256(data).hexdigest()
def stargz(out, entries, old=False):
    toc = json.dumps({"version": 1, "entries": entries, "later": [{"x": {}}]}).encode()
    at = len(out)
    out += gz(header("stargz.index.json", len(toc), mode=0) + toc + pad(len(toc)) + bytes(1024))
    field = b"%016xSTARGZ" % at
    if not old: field = b"SG" + struct.pack("<H", len(field)) + field
    return out + b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H", len(field)) + field + b"\x01\0\0\xff\xff" + bytes(8)
def chunked(out, entries, footer=64, magic=b"GNUlInUx"):
    toc = json.dumps({"version": 1, "entries": entries}).encode(); packed = z(toc)
    at = len(out) + 8
    out += skippable(packed) + skippable(b"tar-split would be here")
    numbers = [at, len(packed), len(toc), 1, 0, 0, 0]
    return out + skippable(struct.pack("<%dQ" % (footer // 8 - 1), *numbers[:footer // 8 - 1]) + magic)
text = b"".join(b"line %d of a file\n" % n for n in range(5000))
"#;

/// Several files in one member, a file that begins in one member and ends in another, the old footer.
#[test]
fn members_that_are_shared() {
    let lines = r#"
first, second, big = text[:700], text[700:900], text
shared = header("first", len(first)) + first + pad(len(first)) + header("dir/", type=tarfile.DIRTYPE, mode=0o755) + header("second", len(second)) + second + pad(len(second)) + header("big", len(big), mtime=1700000000)
inner = [512, 512 + 1024 + 512 + 512]
m1 = shared + big[:4000]
m2 = big[4000:50000]
m3 = big[50000:] + pad(len(big)) + header("link", type=tarfile.SYMTYPE, linkname="../big")
out = b""
offsets = []
for m in (m1, m2, m3):
    offsets.append(len(out)); out += gz(m)
entries = [
  {"name": "first", "type": "reg", "size": len(first), "innerOffset": inner[0], "mode": 0o644, "digest": sha(first)},
  {"name": "dir/", "type": "dir", "mode": 0o755},
  {"name": "second", "type": "reg", "size": len(second), "innerOffset": inner[1], "mode": 0o644, "chunkDigest": sha(second)},
  {"name": "big", "type": "reg", "size": len(big), "modtime": "2023-11-14T22:13:20Z", "innerOffset": len(shared), "chunkSize": 4000, "mode": 0o644, "chunkDigest": sha(big[:4000])},
  {"name": "big", "type": "chunk", "offset": offsets[1], "chunkOffset": 4000, "chunkSize": 46000, "chunkDigest": sha(big[4000:50000])},
  {"name": "big", "type": "chunk", "offset": offsets[2], "chunkOffset": 50000},
  {"name": "link", "type": "symlink", "linkName": "../big", "mode": 0o644},
]
"#;
    for footer in ["out = stargz(out, entries)", "out = stargz(out, entries, old=True)"] {
        let Some(blob) = made(&format!("{lines}{footer}")) else {
            return;
        };
        assert_eq!(check(footer, &blob, &Annotations::new()), 4);
    }
}

/// Frames of headers between frames of content, holes, attributes, both footers.
#[test]
fn frames_of_content_only() {
    let lines = r#"
out = b""
entries = []
def frame(data):
    global out
    at = len(out); out += z(data); return at
a = text[:1234]
holes = text[:5000] + bytes(20000) + text[:77]
frame(header("a", len(a), uid=3000000000, pax_headers={"SCHILY.xattr.user.k": "value", "mtime": "1700000000.25"}))
at = frame(a)
entries.append({"name": "a", "type": "reg", "size": len(a), "offset": at, "endOffset": len(out), "mode": 0o644, "uid": 3000000000, "modtime": "2023-11-15T00:13:20.25+02:00", "xattrs": {"user.k": base64.b64encode(b"value").decode()}, "digest": sha(a)})
frame(pad(len(a)) + header("dev", type=tarfile.CHRTYPE, devmajor=5, devminor=300) + header("fifo", type=tarfile.FIFOTYPE) + header("holes", len(holes)))
entries.append({"name": "dev", "type": "char", "devMajor": 5, "devMinor": 300, "mode": 0o644})
entries.append({"name": "fifo", "type": "fifo", "mode": 0o644})
at = frame(holes[:5000])
entries.append({"name": "holes", "type": "reg", "size": len(holes), "offset": at, "chunkSize": 5000, "mode": 0o644, "chunkDigest": sha(holes[:5000])})
entries.append({"name": "holes", "type": "chunk", "chunkOffset": 5000, "chunkSize": 20000, "chunkType": "zeros"})
frame(holes[5000:25000])
at = frame(holes[25000:])
entries.append({"name": "holes", "type": "chunk", "offset": at, "chunkOffset": 25000, "chunkSize": 77})
frame(pad(len(holes)) + header("same", type=tarfile.LNKTYPE, linkname="a") + header("empty") + bytes(1024))
entries.append({"name": "same", "type": "hardlink", "linkName": "a", "mode": 0o644})
entries.append({"name": "empty", "type": "reg", "mode": 0o644})
"#;
    for footer in [
        "out = chunked(out, entries)",
        "out = chunked(out, entries, 40, b'GnUlInUx')",
    ] {
        let Some(blob) = made(&format!("{lines}{footer}")) else {
            return;
        };
        assert_eq!(check(footer, &blob, &Annotations::new()), 3);
        let digest = "io.github.containers.zstd-chunked.manifest-checksum";
        let annotations = Annotations::from([(digest.to_owned(), format!("sha256:{}", "0".repeat(64)))]);
        let tail = &blob[blob.len() - usize::try_from(TAIL).unwrap()..];
        let place = Place::of_tail(tail, len(&blob)).unwrap();
        let stored = &blob[range(place.blob.start, place.blob.end)];
        let error = place.open(stored, len(&blob), &annotations).unwrap_err().to_string();
        assert!(error.contains("digest"), "{error}");
    }
}

/// What a table of contents says must not go beyond what decodes, and what decodes must not go beyond what it says.
#[test]
fn tables_that_lie() {
    let lines = |entries: &str| {
        format!(
            "out = b''\nm = text[:1000]\nout += gz(header('a', 1000))\nat = len(out)\nout += gz(m + pad(1000))\nend = len(out)\nentries = {entries}\nout = stargz(out, entries)"
        )
    };
    let entry =
        |more: &str| format!("[{{'name': 'a', 'type': 'reg', 'mode': 420, 'size': 1000, 'offset': at, **{{{more}}}}}]");
    // Longer than what there is: found when it is decoded.
    let Some(blob) = made(&lines(&entry("'size': 9000"))) else {
        return;
    };
    let contents = open(&blob, &Annotations::new());
    let mut decoder = Decoder::start(contents.table(), 0, &[]).unwrap();
    let from = usize::try_from(contents.table().span(0).blob.start).unwrap();
    let error = decoder.feed(&blob[from..], &mut |_| {}).unwrap_err().to_string();
    assert!(error.contains("less comes out"), "{error}");
    // What makes no sense: found when it is opened.
    let more = [
        "'offset': 1 << 62",
        "'chunkOffset': 5",
        "'chunkSize': 400",
        "'size': 1 << 63",
        "'type': 'what'",
        "'innerOffset': 100",
        "'offset': end + 5",
        "'modtime': '2023'",
        "'size': -1",
        "'xattrs': {'user.x': '*'}",
    ];
    let lists = more.map(entry).into_iter().chain(
        [
            "[{'type': 'chunk', 'name': 'a', 'offset': at}]",
            "[{'name': 'a', 'type': 'reg', 'size': 5, 'offset': at}, {'name': 'b', 'type': 'reg', 'size': 5, 'offset': 3}]",
            "[{'name': 'a', 'type': 'reg', 'size': 600, 'offset': at}, {'name': 'b', 'type': 'reg', 'size': 5, 'offset': at, 'innerOffset': 512}]",
            "5",
            "[[[[[[]]]]]]",
        ]
        .map(str::to_owned),
    );
    for list in lists {
        let blob = made(&lines(&list)).unwrap();
        let tail = &blob[blob.len() - usize::try_from(TAIL).unwrap()..];
        let place = Place::of_tail(tail, len(&blob)).unwrap();
        let outcome = place.open(
            &blob[range(place.blob.start, place.blob.end)],
            len(&blob),
            &Annotations::new(),
        );
        assert!(outcome.is_err(), "{list}: {outcome:?}");
    }
}
