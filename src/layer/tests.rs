//! Blobs that are damaged, cut short or made to hurt, and tables that lie.

use super::*;
use crate::units::{TarOffset, len_u64};

const SPACING: u64 = 1 << 20;

/// A gzip member around deflate's bytes, with right checksums.
fn member(content: &[u8]) -> Vec<u8> {
    let mut out = b"\x1f\x8b\x08\0\0\0\0\0\0\x03".to_vec();
    for (n, piece) in content.chunks(0xffff).enumerate() {
        // Stored blocks: the last one has bit 0 set.
        let last = u8::from((n + 1) * 0xffff >= content.len());
        let len = u16::try_from(piece.len()).unwrap();
        out.push(last);
        out.extend(len.to_le_bytes());
        out.extend((!len).to_le_bytes());
        out.extend(piece);
    }
    out.extend(zlib_rs::crc32::crc32(0, content).to_le_bytes());
    out.extend(u32::try_from(content.len()).unwrap().to_le_bytes());
    out
}

fn index(coding: Coding, blob: &[u8], limit: u64) -> Result<(Spans, Vec<u8>), LayerError> {
    let mut indexer = Indexer::new(coding, SPACING).limit(limit);
    let mut out = Vec::new();
    for piece in blob.chunks(7000) {
        indexer.feed(piece, &mut |bytes| out.extend_from_slice(bytes))?;
    }
    Ok((indexer.finish()?, out))
}

fn some_bytes(len: u32) -> Vec<u8> {
    (0..len)
        .map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3])
        .collect()
}

#[test]
fn any_spacing_will_do() {
    let content = some_bytes(700_000);
    // A frame that does not say how much comes out of it.
    let zstd = ::zstd::stream::encode_all(&content[..], 1).unwrap();
    for (coding, blob) in [(Coding::Gzip, member(&content)), (Coding::Zstd, zstd)] {
        for spacing in [0, 1, SPACING, 1 << 40, u64::MAX / 2, u64::MAX] {
            let (mut indexer, mut out) = (Indexer::new(coding, spacing), Vec::new());
            indexer
                .feed(&blob, &mut |bytes| out.extend_from_slice(bytes))
                .unwrap_or_else(|error| panic!("{coding} {spacing}: {error}"));
            assert!(indexer.finish().is_ok(), "{coding} {spacing}");
            assert!(out == content, "{coding} {spacing}");
        }
    }
}

#[test]
fn every_cut_is_noticed() {
    let content = some_bytes(300);
    for (coding, blob) in [
        (Coding::Gzip, member(&content)),
        (Coding::Zstd, ::zstd::bulk::compress(&content, 1).unwrap()),
    ] {
        assert_eq!(index(coding, &blob, 1000).unwrap().1, content);
        for cut in 0..blob.len() {
            let error = index(coding, &blob[..cut], 1000).unwrap_err();
            assert!(matches!(error, LayerError::Truncated { .. }), "{coding} {cut}: {error}");
        }
    }
}

#[test]
fn every_flipped_bit_of_content_is_noticed() {
    let content = some_bytes(100);
    let gzip = member(&content);
    let mut zstd = ::zstd::stream::write::Encoder::new(Vec::new(), 1).unwrap();
    zstd.include_checksum(true).unwrap();
    std::io::Write::write_all(&mut zstd, &content).unwrap();
    for (coding, blob) in [(Coding::Gzip, gzip), (Coding::Zstd, zstd.finish().unwrap())] {
        for bit in 0..blob.len() * 8 {
            let mut flipped = blob.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            // Nothing protects a gzip header's time and system, the bits between a stored block's header and its
            // length, the bit of a zstd frame's descriptor that has no meaning, and how much history the frame asks
            // for.
            if let Ok((_, out)) = index(coding, &flipped, 10_000) {
                let free = match coding {
                    Coding::Gzip => (3 * 8..10 * 8).contains(&bit) || (10 * 8 + 3..11 * 8).contains(&bit),
                    _ => bit == 4 * 8 + 4 || (5 * 8..6 * 8).contains(&bit),
                };
                assert!(free, "{coding}: bit {bit}");
                assert_eq!(out, content);
            }
        }
    }
}

#[test]
fn more_than_agreed_to_is_refused() {
    let content = vec![0; 5_000_000];
    let bomb = ::zstd::bulk::compress(&content, 19).unwrap();
    assert!(bomb.len() < 1000);
    let mut given = 0;
    let mut indexer = Indexer::new(Coding::Zstd, SPACING).limit(1_000_000);
    let error = indexer.feed(&bomb, &mut |bytes| given += bytes.len()).unwrap_err();
    assert_eq!(
        error,
        LayerError::TooLong {
            at: len_u64(bomb.len()),
            limit: 1_000_000
        }
    );
    assert!(given <= 1_000_000);
    assert!(index(Coding::Zstd, &bomb, 5_000_000).is_ok());
    assert!(matches!(
        index(Coding::Plain, &content, 4_999_999),
        Err(LayerError::TooLong { .. })
    ));
    assert!(matches!(
        index(Coding::Gzip, &member(&content), 4_999_999),
        Err(LayerError::TooLong { .. })
    ));

    // A table that says less than there is: the decoder stops.
    let points = vec![table::Point::whole(0, 0)];
    let ends = (len_u64(bomb.len()), len_u64(bomb.len()));
    let table = SpanTable::new(
        (Coding::Zstd, table::Layout::Everything),
        ends,
        70_000,
        (points, Vec::new()),
    )
    .unwrap();
    let mut decoder = Decoder::start(&table, 0, &[]).unwrap();
    let mut given = 0;
    decoder.feed(&bomb, &mut |bytes| given += bytes.len()).unwrap();
    assert_eq!(
        (given, decoder.is_done(), decoder.position()),
        (70_000, true, TarOffset(70_000))
    );
}

#[test]
fn what_cannot_be_read_is_named() {
    let named = |coding, blob: &[u8]| index(coding, blob, 1 << 20).unwrap_err().to_string();
    assert_eq!(
        named(Coding::Gzip, b"hello, hello"),
        "the gzip layer is damaged at byte 0: there is no gzip header"
    );
    assert_eq!(
        named(Coding::Zstd, b"hello, hello"),
        "the zstd layer is damaged at byte 0: there is no zstd frame"
    );
    assert!(named(Coding::Zstd, b"\x28\xb5\x2f\xfd\x01\x50\x07").contains("dictionary"));
    assert!(named(Coding::Zstd, b"\x28\xb5\x2f\xfd\x00\xff\x00").contains("window"));
    assert!(named(Coding::Gzip, b"\x1f\x8b\x09\0\0\0\0\0\0\x03\x00").contains("method"));
    assert!(named(Coding::Gzip, b"").contains("cut short"));
    let twice = [member(b"x"), b"\x1f\x8b\x08\0\0\0\0\0\0\x03\xff\xff".to_vec()].concat();
    assert!(named(Coding::Gzip, &twice).starts_with("the gzip layer is damaged at byte "));
}

#[test]
fn a_decoder_says_what_it_was_not_given() {
    let (spans, _) = index(Coding::Gzip, &member(&some_bytes(100)), 1000).unwrap();
    assert_eq!(Decoder::start(&spans.table, 1, &[]).unwrap_err(), LayerError::NoSpan(1));
    let error = Decoder::start(&spans.table, 0, &[0; 5]).unwrap_err();
    assert_eq!(
        error,
        LayerError::History {
            at: TarOffset(0),
            found: 5,
            needs: 0
        }
    );
    // After an error nothing more comes.
    let mut decoder = Decoder::start(&spans.table, 0, &[]).unwrap();
    assert!(decoder.feed(b"junk", &mut |_| {}).is_err());
    decoder
        .feed(&member(b"x"), &mut |_| panic!("output after an error"))
        .unwrap();
    assert!(decoder.is_done());
}

#[test]
fn tables_that_lie_are_refused() {
    let (spans, _) = index(Coding::Gzip, &member(&some_bytes(4_000_000)), 1 << 30).unwrap();
    assert_eq!(spans.table.len(), 4);
    let mut encoded = Vec::new();
    spans.table.encode(&mut encoded);
    assert_eq!(SpanTable::decode(&encoded).unwrap(), spans.table);
    assert!(spans.table.check(spans.table.blob_len()).is_ok());
    assert!(spans.table.check(spans.table.blob_len() + 1).is_err());
    for cut in 0..encoded.len() {
        assert!(SpanTable::decode(&encoded[..cut]).is_err(), "{cut}");
    }
    encoded.push(0);
    assert!(SpanTable::decode(&encoded).is_err());
    for (what, bytes) in [
        ("an unknown coding", &[3, 0, 0][..]),
        ("a plain tar that is not as long as its blob", &[0, 5, 6]),
        (
            "a length of 2^63",
            &[1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0],
        ),
        ("a number with a needless byte", &[0, 0x85, 0, 5]),
        ("no place to begin", &[1, 100, 50, 0, 0]),
        ("an end before the beginning", &[1, 100, 50, 101, 1, 0, 0, 0]),
        ("more places than bytes", &[1, 100, 50, 0, 0x7f, 0, 0, 0]),
        ("a first place that is not the beginning", &[1, 100, 50, 0, 1, 1, 0, 0]),
        ("a first place inside a member", &[1, 100, 50, 0, 1, 0, 0, 8]),
        ("a place behind the tar", &[1, 100, 50, 0, 2, 0, 0, 0, 50, 5, 0]),
        ("a place behind the blob", &[1, 100, 50, 0, 2, 0, 0, 0, 5, 100, 0]),
        ("two places at once", &[1, 100, 50, 0, 2, 0, 0, 0, 0, 5, 0]),
        ("bits in front of a member", &[1, 100, 50, 0, 2, 0, 0, 0, 5, 5, 1]),
        ("a place inside a zstd frame", &[2, 100, 50, 0, 2, 0, 0, 0, 5, 5, 8]),
        (
            "a window of 32,769 bytes",
            &[1, 100, 50, 0, 2, 0, 0, 0, 5, 5, 0x98, 0x80, 0x20],
        ),
    ] {
        assert!(SpanTable::decode(bytes).is_err(), "{what}");
    }
    assert!(
        SpanTable::decode(&[1, 100, 50, 0, 2, 0, 0, 0, 5, 5, 0x88, 0x80, 0x20]).is_ok(),
        "a window of 32,768 bytes"
    );
}

#[test]
fn codings_are_told_apart() {
    for (bytes, coding) in [
        (&b"\x1f\x8b\x08\0"[..], Coding::Gzip),
        (b"\x28\xb5\x2f\xfd", Coding::Zstd),
        (b"\x5e\x2a\x4d\x18", Coding::Zstd),
        (b"\x60\x2a\x4d\x18", Coding::Plain),
        (b"\x1f", Coding::Plain),
        (b"", Coding::Plain),
        (b"etc/", Coding::Plain),
    ] {
        assert_eq!(Coding::of_bytes(bytes), coding, "{bytes:?}");
    }
    for (media_type, coding) in [
        ("application/vnd.oci.image.layer.v1.tar", Some(Coding::Plain)),
        ("application/vnd.oci.image.layer.v1.tar+gzip", Some(Coding::Gzip)),
        ("application/vnd.oci.image.layer.v1.tar+zstd; x=y", Some(Coding::Zstd)),
        (
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            Some(Coding::Gzip),
        ),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", Some(Coding::Gzip)),
        ("application/vnd.docker.image.rootfs.diff.tar", Some(Coding::Plain)),
        (
            "application/vnd.docker.container.image.rootfs.diff",
            Some(Coding::Plain),
        ),
        ("Application/Vnd.OCI.image.layer.v1.TAR+GZIP", Some(Coding::Gzip)),
        (
            "application/vnd.docker.image.rootfs.foreign.diff.tar",
            Some(Coding::Plain),
        ),
        ("application/octet-stream", None),
        ("", None),
        ("application/vnd.oci.image.layer.v1.tar+encrypted", None),
        ("application/vnd.oci.empty.v1+json", None),
    ] {
        assert_eq!(Coding::of_media_type(media_type), coding, "{media_type}");
    }
}

#[test]
fn layers_of_files_are_told_from_everything_else() {
    for (text, foreign) in [
        ("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", true),
        ("application/vnd.oci.image.layer.nondistributable.v1.tar+zstd", true),
        ("application/vnd.oci.image.layer.v1.tar", false),
        ("", false),
    ] {
        assert_eq!(LayerType::parse(text).unwrap().foreign, foreign, "{text}");
    }
    for (text, word) in [
        ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", "encrypted"),
        ("application/vnd.oci.image.layer.v1.tar+brotli", "not a tar layer"),
        ("application/vnd.in-toto+json", "not a tar layer"),
        ("text/html", "not a tar layer"),
    ] {
        assert!(LayerType::parse(text).unwrap_err().contains(word), "{text}");
    }
}
