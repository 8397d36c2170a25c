//! Whatever entries there are, they come back: through the index file, and through a tar that somebody else writes. And
//! whatever is broken in an index file is noticed.

#[path = "common/packed.rs"]
mod packed;

use packed::gzip;
use std::sync::OnceLock;

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use tarblk::internals::digest::{Algorithm, Digest};
use tarblk::internals::index::{
    ChunkDigests, ChunkHasher, ColdPart, Collector, EndOfArchive, Entry, EntrySink, InImage, Index, IndexBuilder,
    IndexError, IndexFault, Kind, LayerIdentity, Parser, Segment, Timestamp, Xattr, hot_len, is_index,
};
use tarblk::internals::layer::{Coding, Indexer, Spans};
use tarblk::internals::units::{TarOffset, TarRange};

/// A length as a position.
fn long(len: usize) -> u64 {
    u64::try_from(len).unwrap()
}

/// Entries as a parser makes them, but for what it says about their place.
fn any_entry() -> impl Strategy<Value = (Entry, u64, u64)> {
    let kind = prop::sample::select(vec![
        Kind::File,
        Kind::File,
        Kind::File,
        Kind::Directory,
        Kind::Symlink,
        Kind::Hardlink,
        Kind::CharDevice,
        Kind::BlockDevice,
        Kind::Fifo,
    ]);
    let path = prop_oneof![
        "(usr|etc)/(share|lib)/[a-c]{1,3}/[a-z]{1,8}".prop_map(String::into_bytes),
        vec(any::<u8>(), 0..300),
    ];
    let owner = (
        0_u16..0o10000,
        prop_oneof![Just(0), Just(1000), any::<i64>()],
        prop_oneof![Just(0), any::<i64>()],
    );
    let mtime = prop_oneof![
        (1_700_000_000_i64..1_700_000_010).prop_map(|secs| Timestamp { secs, nanos: 0 }),
        (any::<i64>(), 0_u32..1_000_000_000).prop_map(|(secs, nanos)| Timestamp { secs, nanos }),
    ];
    let xattrs = prop_oneof![
        3 => Just(Vec::new()),
        1 => btree_map(vec(any::<u8>(), 1..20), vec(any::<u8>(), 0..40), 1..4)
            .prop_map(|all| all.into_iter().map(|(name, value)| Xattr { name, value }).collect()),
        1 => Just(vec![Xattr { name: b"security.selinux".to_vec(), value: b"system_u:object_r:usr_t:s0\0".to_vec() }]),
    ];
    let runs = prop_oneof![
        4 => Just(None),
        1 => vec((0_u64..5000, 1_u64..5000), 0..20).prop_map(Some),
    ];
    let shape = (0_u64..100_000, runs, any::<u32>(), any::<u32>());
    let place = (
        prop_oneof![5 => Just(0_u64), 1 => 1_u64..10],
        prop_oneof![5 => Just(1_u64), 1 => 1_u64..50],
    );
    (kind, path, owner, mtime, xattrs, shape, vec(any::<u8>(), 0..100), place).prop_map(
        |(
            kind,
            path,
            (mode, uid, gid),
            mtime,
            xattrs,
            (size, runs, device_major, device_minor),
            link,
            (gap, blocks),
        )| {
            let mut entry = Entry {
                path,
                kind,
                mode,
                uid,
                gid,
                mtime,
                xattrs,
                ..Entry::default()
            };
            match kind {
                Kind::File => {
                    let (mut at, mut segments) = (0, Vec::new());
                    for (hole, len) in runs.clone().unwrap_or_default() {
                        segments.push(Segment {
                            file_offset: at + hole,
                            tar_offset: TarOffset(0),
                            len,
                        });
                        at += hole + len;
                    }
                    entry.size = size.max(at);
                    if runs.is_none() && size > 0 {
                        segments.push(Segment {
                            file_offset: 0,
                            tar_offset: TarOffset(0),
                            len: size,
                        });
                    }
                    entry.segments = segments;
                }
                Kind::Symlink | Kind::Hardlink => entry.link = link,
                Kind::CharDevice | Kind::BlockDevice => {
                    (entry.device_major, entry.device_minor) = (device_major, device_minor);
                }
                _ => {}
            }
            entry.in_image = other_in_image(&entry, device_major, device_minor);
            (entry, gap, blocks)
        },
    )
}

/// What is read otherwise in an image, for every fourth entry, by the bits of a number.
fn other_in_image(entry: &Entry, which: u32, bits: u32) -> Option<Box<InImage>> {
    let is = |bit: u32| bits >> bit & 1 != 0;
    let other = InImage {
        path: is(0).then(|| entry.path.iter().rev().copied().collect()),
        link: is(1).then(|| b"elsewhere".to_vec()),
        uid: is(2).then_some(entry.gid),
        gid: is(3).then_some(entry.uid),
        mtime: is(4).then_some(Timestamp {
            secs: entry.mtime.secs.wrapping_neg(),
            ..entry.mtime
        }),
        refused_type: is(5).then_some(bits.to_le_bytes()[3]),
    };
    (which.is_multiple_of(4) && other != InImage::default()).then(|| other.into())
}

/// Puts entries one behind the other; returns the tar's length as well.
fn placed(entries: Vec<(Entry, u64, u64)>) -> (Vec<Entry>, u64) {
    let mut at = 0_u64;
    let entries = entries.into_iter().map(|(mut entry, gap, blocks)| {
        entry.headers = TarRange::new(TarOffset(at + gap * 512), blocks * 512);
        let mut tar = entry.headers.end();
        for segment in &mut entry.segments {
            segment.tar_offset = tar;
            tar = tar.plus(segment.len);
        }
        at = tar.0.next_multiple_of(512);
        entry
    });
    let entries = entries.collect();
    (entries, at)
}

fn builder(entries: &[Entry]) -> IndexBuilder {
    let mut builder = IndexBuilder::new();
    for entry in entries {
        builder.entry(entry).unwrap();
    }
    builder
}

fn encode(entries: &[Entry], len: u64) -> Vec<u8> {
    builder(entries).finish(len, EndOfArchive::Marked)
}

/// Bytes of a tar that is nothing but long: words that come again and again, no two lines the same.
fn made_up(len: u64) -> Vec<u8> {
    let lines = (0_u64..).flat_map(|line| {
        let other = line.wrapping_mul(6_364_136_223_846_793_005) >> 20;
        format!("line {line} of a tar with {other:x} in it\n").into_bytes()
    });
    lines.take(usize::try_from(len).unwrap()).collect()
}

/// How long the made up tar is.
const MADE_UP: u64 = 600_000;

/// What was noted of the made up tar while its blob was decoded, once for all tests.
fn noted() -> &'static (LayerIdentity, ChunkDigests, Spans) {
    static NOTED: OnceLock<(LayerIdentity, ChunkDigests, Spans)> = OnceLock::new();
    NOTED.get_or_init(|| {
        let blob = gzip(&made_up(MADE_UP));
        let mut hasher = ChunkHasher::new();
        let mut indexer = Indexer::new(Coding::Gzip, 32 << 10);
        indexer.feed(&blob, &mut |tar| hasher.feed(tar)).unwrap();
        let identity = LayerIdentity {
            coding: Coding::Gzip,
            blob_len: long(blob.len()),
            blob_digest: Some(Digest::of(Algorithm::Sha256, &blob)),
            diff_id: None,
            spacing: 32 << 10,
        };
        (identity, hasher.finish(), indexer.finish().unwrap())
    })
}

/// An index with everything in it that a compressed layer's has, of the made up tar and as many of the entries as fit it.
fn encode_all(entries: &[Entry]) -> Vec<u8> {
    let (identity, digests, spans) = noted().clone();
    let fitting = entries.partition_point(|entry| entry.payload().end().0 <= MADE_UP);
    let mut builder = builder(&entries[..fitting]);
    builder.identity(identity).chunk_digests(digests).spans(spans);
    builder.finish(MADE_UP, EndOfArchive::Marked)
}

fn decode(bytes: &[u8]) -> Result<Vec<Entry>, IndexError> {
    let index = Index::open(bytes)?;
    let mut all = Collector::default();
    index.replay(&mut all)?;
    Ok(all.0)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_index_gives_back_what_it_got(entries in vec(any_entry(), 0..60)) {
        let (entries, len) = placed(entries);
        let bytes = encode(&entries, len);
        prop_assert!(is_index(&bytes));
        prop_assert_eq!(&bytes, &encode(&entries, len), "the same bits again");
        prop_assert_eq!(decode(&bytes).unwrap(), entries.clone());
        let index = Index::open(bytes).unwrap();
        index.verify().unwrap();
        prop_assert_eq!(index.tar_len(), len);
        prop_assert_eq!(index.end(), EndOfArchive::Marked);
        prop_assert_eq!(index.summary().entries, long(entries.len()));
    }

    #[test]
    fn a_flipped_bit_is_noticed(entries in vec(any_entry(), 1..30), place in any::<prop::sample::Index>(), bit in 0..8) {
        let (entries, _) = placed(entries);
        let mut bytes = encode_all(&entries);
        let hot = usize::try_from(hot_len(&bytes).unwrap().unwrap()).unwrap();
        let place = place.index(bytes.len());
        bytes[place] ^= 1_u8 << bit;
        let outcome = Index::open(&bytes);
        prop_assert!(matches!(outcome, Err(IndexError::Index(_))), "bit {} of byte {}", bit, place);
        let outcome = Index::open_hot(&bytes[..hot]);
        prop_assert_eq!(outcome.is_err(), place < hot, "bit {} of byte {}", bit, place);
    }

    #[test]
    fn a_cut_index_is_noticed(entries in vec(any_entry(), 1..30), place in any::<prop::sample::Index>(), more in any::<bool>()) {
        let (entries, _) = placed(entries);
        let mut bytes = encode_all(&entries);
        if more {
            bytes.push(0);
        } else {
            bytes.truncate(place.index(bytes.len()));
        }
        prop_assert!(matches!(Index::open(&bytes), Err(IndexError::Index(_))));
        let hot = hot_len(&bytes).unwrap_or_default().and_then(|len| usize::try_from(len).ok());
        prop_assert_eq!(Index::open_hot(&bytes).is_ok(), hot == Some(bytes.len()));
    }

    #[test]
    fn a_tar_of_the_tar_crate_says_what_was_written(
        files in vec(("[a-z]{1,10}(/[a-zé ]{1,60}){0,4}", vec(any::<u8>(), 0..3000), 0_u32..0o10000, any::<u32>(), 0_u64..1 << 34), 0..12),
        size in 1_usize..2000,
    ) {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, content, mode, uid, mtime) in &files {
            let mut header = tar::Header::new_gnu();
            header.set_size(long(content.len()));
            header.set_mode(*mode);
            header.set_uid(u64::from(*uid));
            header.set_mtime(*mtime);
            builder.append_data(&mut header, path, content.as_slice()).unwrap();
        }
        let tar = builder.into_inner().unwrap();
        let mut all = Collector::default();
        let mut parser = Parser::new();
        for (number, piece) in tar.chunks(size).enumerate() {
            parser.feed(TarOffset(long(number * size)), piece, &mut all).unwrap();
        }
        prop_assert_eq!(parser.finish(TarOffset(long(tar.len()))).unwrap(), EndOfArchive::Marked);
        prop_assert_eq!(all.0.len(), files.len());
        for (entry, (path, content, mode, uid, mtime)) in all.0.iter().zip(&files) {
            prop_assert_eq!(&entry.path, path.as_bytes());
            prop_assert_eq!((u32::from(entry.mode), entry.uid), (*mode, i64::from(*uid)));
            prop_assert_eq!(entry.mtime, Timestamp { secs: i64::try_from(*mtime).unwrap(), nanos: 0 });
            let start = usize::try_from(entry.payload().start.0).unwrap();
            prop_assert_eq!(&tar[start..start + content.len()], content.as_slice());
        }
    }
}

#[test]
fn the_hot_part_alone_is_enough_but_for_what_is_cold() {
    let (entries, _) = placed(vec![(Entry::default(), 0, 100), (Entry::default(), 3, 1)]);
    let bytes = encode_all(&entries);
    assert_eq!(hot_len(&bytes[..23]).unwrap(), None);
    let hot = hot_len(&bytes[..24]).unwrap().unwrap();
    let whole = Index::open(&bytes).unwrap();
    let part = Index::open_hot(&bytes[..usize::try_from(hot).unwrap()]).unwrap();
    assert!(whole.is_whole() && !part.is_whole());
    whole.verify().unwrap();
    part.verify().unwrap();
    let mut all = Collector::default();
    part.replay(&mut all).unwrap();
    assert_eq!(all.0, entries);
    assert_eq!((part.hot_digest(), part.hot_len()), (whole.hot_digest(), hot));
    assert_eq!((part.identity(), part.spans()), (whole.identity(), whole.spans()));
    assert_eq!(part.identity().coding, Coding::Gzip);
    let tar = made_up(part.tar_len());
    for (number, chunk) in (0..).zip(tar.chunks(32 << 10)) {
        let digests = part.chunk_digests().unwrap();
        assert!(digests.check(number, chunk) && !digests.check(number + 1, chunk));
    }

    // Windows are what of the tar lies before a span.
    let (table, cold) = (part.spans().unwrap(), part.cold());
    assert!(table.len() > 2 && cold.pieces(ColdPart::Windows) == table.len());
    for number in 0..table.len() {
        let window = whole.cold_piece(ColdPart::Windows, number).unwrap().unwrap();
        let span = table.span(number);
        assert_eq!(long(window.len()), u64::from(span.window));
        assert!(part.cold_piece(ColdPart::Windows, number).is_err() || window.is_empty());
        // What a range request brings.
        let piece = cold.piece(ColdPart::Windows, number).unwrap();
        let range = usize::try_from(piece.range.start).unwrap()..usize::try_from(piece.range.end).unwrap();
        assert_eq!(piece.open(&bytes[range.clone()]).unwrap(), window);
        if !window.is_empty() {
            assert_eq!(crc32c::crc32c(&bytes[range.clone()]), piece.crc);
            let mut damaged = bytes[range].to_vec();
            damaged[3] ^= 1;
            assert!(piece.open(&damaged).is_err() && piece.open(&damaged[1..]).is_err());
        }
    }
    assert!(cold.piece(ColdPart::Windows, table.len()).is_none() && cold.piece(ColdPart::Headers, 0).is_none());
    assert!(!cold.has(ColdPart::Headers) && cold.has(ColdPart::Windows));
}

#[test]
fn many_entries_span_many_batches() {
    let entries = (0..10_000_u64).map(|n| {
        let entry = Entry {
            path: format!("dir-{}/file-{n}", n / 100).into_bytes(),
            // More different owners and attributes than there are numbers for.
            uid: i64::try_from(n % 70_000).unwrap(),
            xattrs: vec![Xattr {
                name: b"user.n".to_vec(),
                value: n.to_le_bytes().to_vec(),
            }],
            mtime: Timestamp {
                secs: i64::try_from(n % 40).unwrap(),
                nanos: 0,
            },
            ..Entry::default()
        };
        (entry, 0, 1)
    });
    let (entries, len) = placed(entries.collect());
    assert!(decode(&encode(&entries, len)).unwrap() == entries);
}

#[test]
fn other_versions_and_other_files_are_told_apart() {
    let bytes = encode(&[], 0);
    assert!(!is_index(&bytes[1..]) && !is_index(b"") && is_index(&bytes));
    let open = |bytes: &[u8]| match Index::open(bytes) {
        Err(IndexError::Index(fault)) => fault,
        other => panic!("{other:?}"),
    };
    assert_eq!(open(b"ustar"), IndexFault::Magic);
    let mut newer = bytes.clone();
    newer[8] = 9;
    assert_eq!(open(&newer), IndexFault::Version { found: 9, known: 1 });
    let message = Index::open(&newer).unwrap_err().to_string();
    assert!(
        message.contains("version 9") && message.contains("tarblk index"),
        "{message}"
    );
    assert_eq!(open(&bytes[..20]), IndexFault::Truncated);
}

/// A section that a later version may add, hot (behind the other hot ones) or cold (at the end).
fn with_section(bytes: &[u8], flags: u16) -> Vec<u8> {
    let count = usize::from(bytes[10]);
    let table_end = 24 + 40 * count;
    let extra = b"something new";
    let hot = flags & 2 == 0;
    let hot_len = u64::from_le_bytes(bytes[16..24].try_into().unwrap());
    let place = if hot { hot_len } else { long(bytes.len()) };
    let mut records: Vec<Vec<u8>> = bytes[24..table_end].chunks(40).map(<[u8]>::to_vec).collect();
    let mut number = 0;
    for record in &mut records {
        let offset = u64::from_le_bytes(record[8..16].try_into().unwrap());
        let before = offset < place;
        number += usize::from(before);
        let moved = offset + 40 + if before { 0 } else { long(extra.len()) };
        record[8..16].copy_from_slice(&moved.to_le_bytes());
    }
    let mut new = 77_u32.to_le_bytes().to_vec();
    new.extend(flags.to_le_bytes());
    new.extend(0_u16.to_le_bytes());
    new.extend((place + 40).to_le_bytes());
    new.extend(long(extra.len()).to_le_bytes());
    new.extend(long(extra.len()).to_le_bytes());
    new.extend(crc32c::crc32c(extra).to_le_bytes());
    new.extend([0; 4]);
    records.insert(number, new);
    let mut file = bytes[..12].to_vec();
    file[10] += 1;
    let mut rest = (hot_len + 40 + if hot { long(extra.len()) } else { 0 })
        .to_le_bytes()
        .to_vec();
    rest.extend(records.concat());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&file), &rest);
    file.extend(crc.to_le_bytes());
    file.extend(rest);
    let place = usize::try_from(place).unwrap();
    file.extend(&bytes[table_end..place]);
    file.extend(extra);
    file.extend(&bytes[place..]);
    file
}

#[test]
fn unknown_sections_are_passed_over_unless_required() {
    let (entries, len) = placed(vec![(Entry::default(), 0, 1)]);
    let bytes = encode(&entries, len);
    for flags in [0, 2] {
        assert_eq!(decode(&with_section(&bytes, flags)).unwrap(), entries);
        let fault = Index::open(with_section(&bytes, flags | 1)).unwrap_err();
        assert!(
            matches!(fault, IndexError::Index(IndexFault::UnknownSection(77))),
            "{fault}"
        );
    }
}

#[test]
fn entries_that_break_the_rules_are_not_taken() {
    let good = Entry {
        headers: TarRange::new(TarOffset(0), 512),
        ..Entry::default()
    };
    let segment = |file_offset, tar_offset, len| Segment {
        file_offset,
        tar_offset: TarOffset(tar_offset),
        len,
    };
    let twice = |name: &[u8]| Xattr {
        name: name.to_vec(),
        value: Vec::new(),
    };
    for bad in [
        Entry {
            headers: TarRange::new(TarOffset(100), 512),
            ..good.clone()
        },
        Entry {
            headers: TarRange::new(TarOffset(0), 100),
            ..good.clone()
        },
        Entry {
            mode: 0o10000,
            ..good.clone()
        },
        Entry {
            mtime: Timestamp {
                secs: 0,
                nanos: 1_000_000_000,
            },
            ..good.clone()
        },
        Entry {
            link: b"x".to_vec(),
            ..good.clone()
        },
        Entry {
            device_minor: 1,
            ..good.clone()
        },
        Entry {
            kind: Kind::Directory,
            size: 1,
            ..good.clone()
        },
        Entry {
            size: 10,
            segments: vec![segment(0, 1024, 10)],
            ..good.clone()
        },
        Entry {
            size: 10,
            segments: vec![segment(0, 512, 11)],
            ..good.clone()
        },
        Entry {
            size: 10,
            segments: vec![segment(5, 512, 1), segment(4, 513, 1)],
            ..good.clone()
        },
        Entry {
            size: u64::MAX,
            ..good.clone()
        },
        Entry {
            xattrs: vec![twice(b"b"), twice(b"a")],
            ..good.clone()
        },
        Entry {
            xattrs: vec![twice(b"a"), twice(b"a")],
            ..good.clone()
        },
    ] {
        let outcome = IndexBuilder::new().entry(&bad);
        assert!(matches!(outcome, Err(IndexError::Unencodable { .. })), "{bad:?}");
    }
    let mut builder = IndexBuilder::new();
    builder.entry(&good).unwrap();
    assert!(builder.entry(&good).is_err(), "not behind the entry before");
}
