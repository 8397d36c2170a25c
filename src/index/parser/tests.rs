//! What headers mean, rule by rule, on tars made by hand.

use super::testing::*;
use super::*;
use crate::index::Collector;

fn fault(tar: &[u8]) -> HeaderFault {
    match parse(tar) {
        Err(IndexError::Header { fault, .. }) => fault,
        other => panic!("expected a header fault, not {other:?}"),
    }
}

fn names(tar: &[u8]) -> Vec<String> {
    parse(tar)
        .unwrap()
        .iter()
        .map(|entry| String::from_utf8_lossy(&entry.path).into_owned())
        .collect()
}

#[test]
fn a_plain_file_is_what_its_header_says() {
    let tar = [member(b'0', b"dir/file", b"hello"), end()].concat();
    let entry = parse_one(&tar);
    assert_eq!(entry.path, b"dir/file");
    assert_eq!(
        (entry.kind, entry.mode, entry.uid, entry.gid, entry.size),
        (Kind::File, 0o644, 1000, 100, 5)
    );
    assert_eq!(entry.mtime, Timestamp { secs: 10, nanos: 0 });
    assert_eq!(entry.headers, TarRange::new(TarOffset(0), 512));
    assert_eq!(
        entry.segments,
        [Segment {
            file_offset: 0,
            tar_offset: TarOffset(512),
            len: 5
        }]
    );
    assert_eq!(content(&tar, &entry), b"hello");
}

#[test]
fn types_become_kinds() {
    for (flag, kind) in [
        (b'0', Kind::File),
        (0, Kind::File),
        (b'7', Kind::File),
        (b'1', Kind::Hardlink),
        (b'2', Kind::Symlink),
        (b'3', Kind::CharDevice),
        (b'4', Kind::BlockDevice),
        (b'5', Kind::Directory),
        (b'6', Kind::Fifo),
        (b'D', Kind::Directory),
    ] {
        let block = RawHeader::new(flag, b"x", 0)
            .field(157, b"target")
            .field(329, b"0000010\0")
            .field(337, b"0000003\0");
        let entry = parse_one(&block.sealed());
        assert_eq!(entry.kind, kind, "{}", char::from(flag));
        let link = matches!(kind, Kind::Hardlink | Kind::Symlink);
        assert_eq!(entry.link, if link { &b"target"[..] } else { b"" });
        let device = matches!(kind, Kind::CharDevice | Kind::BlockDevice);
        assert_eq!(
            (entry.device_major, entry.device_minor),
            if device { (8, 3) } else { (0, 0) }
        );
    }
    for flag in [b'A', b'N', b'I', b'Z', b'8', 0xff] {
        // GNU tar extracts a regular file; containerd refuses the layer.
        let tar = [member(flag, b"x", b"content"), member(b'0', b"next", b"")].concat();
        let entries = parse(&tar).unwrap();
        assert_eq!(names(&tar), ["x", "next"]);
        assert_eq!((entries[0].kind, entries[0].size), (Kind::File, 7));
        assert_eq!(entries[0].in_image.as_ref().unwrap().refused_type, Some(flag));
        assert_eq!(entries[1].in_image, None);
    }
    assert_eq!(fault(&RawHeader::new(b'M', b"x", 0).sealed()), HeaderFault::MultiVolume);
    assert_eq!(
        names(&[member(b'V', b"label", b""), member(b'0', b"file", b"")].concat()),
        ["file"]
    );
}

#[test]
fn a_trailing_slash_makes_a_v7_directory() {
    let v7 = |name: &[u8]| {
        RawHeader::new(0, name, 0)
            .field(257, &[0; 8])
            .field(329, b"junkjunkjunk")
            .sealed()
    };
    assert_eq!(parse_one(&v7(b"dir/")).kind, Kind::Directory);
    assert_eq!(parse_one(&v7(b"file")).kind, Kind::File);
    assert_eq!(parse_one(&RawHeader::new(b'0', b"file/", 0).sealed()).kind, Kind::File);
    let long = [pax(b'x', &[("path", b"dir/")]), RawHeader::new(0, b"x", 0).sealed()].concat();
    assert_eq!(parse_one(&long).kind, Kind::Directory);
}

#[test]
fn what_is_no_file_has_no_payload() {
    for flag in [b'1', b'2', b'3', b'4', b'5', b'6'] {
        let tar = [RawHeader::new(flag, b"a", 5000).sealed(), member(b'0', b"b", b"x")].concat();
        let entries = parse(&tar).unwrap();
        assert_eq!((entries[0].size, entries[0].segments.len()), (0, 0));
        assert_eq!(entries[1].path, b"b");
    }
    // A dump directory's list of names is payload, and passed over.
    let tar = [member(b'D', b"d/", b"Yfile\0"), member(b'0', b"b", b"x")].concat();
    assert_eq!(names(&tar), ["d/", "b"]);
}

#[test]
fn prefixes_depend_on_the_dialect() {
    let block = || RawHeader::new(b'0', b"name", 0).field(345, b"prefix");
    assert_eq!(parse_one(&block().sealed()).path, b"prefix/name");
    assert_eq!(
        parse_one(&block().field(257, &[0; 8]).sealed()).path,
        b"name",
        "v7 has none"
    );
    let full = RawHeader::new(b'0', &[b'n'; 100], 0).field(345, &[b'p'; 155]).sealed();
    assert_eq!(parse_one(&full).path, [&[b'p'; 155][..], b"/", &[b'n'; 100]].concat());
    let star = RawHeader::new(b'0', b"name", 0)
        .field(345, &[b'p'; 131])
        .field(476, b"00000000001 ")
        .field(508, b"tar\0");
    assert_eq!(parse_one(&star.sealed()).path, [&[b'p'; 131][..], b"/name"].concat());
    // GNU headers have times there; Go once wrote a prefix over them.
    assert_eq!(parse_one(&block().gnu().sealed()).path, b"prefix/name");
    let times = RawHeader::new(b'0', b"name", 0)
        .gnu()
        .field(345, b"14412345670\x0014412345670\0");
    assert_eq!(parse_one(&times.sealed()).path, b"name");
}

#[test]
fn names_have_an_order_of_precedence() {
    let file = RawHeader::new(b'0', b"own", 0).gnu().sealed();
    let local = pax(b'x', &[("path", b"from-pax")]);
    let long = member(b'L', b"././@LongLink", b"from-gnu\0junk");
    assert_eq!(parse_one(&[&local[..], &file].concat()).path, b"from-pax");
    assert_eq!(parse_one(&[&long[..], &file].concat()).path, b"from-gnu");
    assert_eq!(parse_one(&[&local[..], &long, &file].concat()).path, b"from-pax");
    assert_eq!(parse_one(&[&long[..], &local, &file].concat()).path, b"from-pax");
    let empty = pax(b'x', &[("path", b"")]);
    assert_eq!(parse_one(&[&empty[..], &file].concat()).path, b"own");
    let tar = [&long[..], &file, &file].concat();
    assert_eq!(names(&tar), ["from-gnu", "own"], "extensions count for one entry");
}

#[test]
fn of_repeated_extensions_the_last_counts_alone() {
    let tar = [
        pax(b'x', &[("path", b"first"), ("uid", b"7")]),
        pax(b'x', &[("gid", b"8")]),
        RawHeader::new(b'0', b"own", 0).sealed(),
    ]
    .concat();
    let entry = parse_one(&tar);
    assert_eq!((&entry.path[..], entry.uid, entry.gid), (&b"own"[..], 1000, 8));
    assert_eq!(entry.headers, TarRange::new(TarOffset(0), 5 * 512));
    let long = |name: &[u8]| member(b'K', b"././@LongLink", name);
    let tar = [
        long(b"one\0"),
        long(b"two\0"),
        RawHeader::new(b'2', b"l", 0).gnu().sealed(),
    ]
    .concat();
    assert_eq!(parse_one(&tar).link, b"two");
}

#[test]
fn pax_sizes_and_owners_go_before_the_header() {
    let records = [
        ("size", &b"3"[..]),
        ("uid", b"5000000000"),
        ("gid", b"0"),
        ("mtime", b"-1.5"),
    ];
    let tar = [
        pax(b'x', &records),
        RawHeader::new(b'0', b"a", 0).sealed(),
        padded(b"abc"),
        member(b'0', b"b", b""),
    ]
    .concat();
    let entries = parse(&tar).unwrap();
    assert_eq!((entries[0].size, entries[0].uid, entries[0].gid), (3, 5_000_000_000, 0));
    assert_eq!(
        entries[0].mtime,
        Timestamp {
            secs: -2,
            nanos: 500_000_000
        }
    );
    assert_eq!(content(&tar, &entries[0]), b"abc");
    // Not those of an extension header in between, as smugglers would have it.
    let tar = [
        pax(b'x', &[("size", b"1024")]),
        member(b'L', b"././@LongLink", b"long\0"),
        RawHeader::new(b'0', b"a", 0).gnu().sealed(),
        member(b'0', b"hidden", b""),
        vec![0; 512],
        member(b'0', b"b", b""),
    ]
    .concat();
    assert_eq!(names(&tar), ["long", "b"]);
}

#[test]
fn globals_apply_outside_of_images_until_overridden_and_name_nothing() {
    let file = |name: &[u8]| RawHeader::new(b'0', name, 0).sealed();
    let tar = [
        pax(
            b'g',
            &[
                ("path", b"all"),
                ("size", b"9"),
                ("uid", b"1"),
                ("mtime", b"99.5"),
                ("SCHILY.xattr.user.g", b"1"),
            ],
        ),
        file(b"a"),
        pax(b'x', &[("uid", b"2"), ("SCHILY.xattr.user.g", b"2")]),
        file(b"b"),
        pax(b'x', &[("uid", b"")]),
        file(b"c"),
        pax(b'g', &[("uid", b""), ("comment", b"x")]),
        file(b"d"),
    ]
    .concat();
    let entries = parse(&tar).unwrap();
    let seen: Vec<_> = entries.iter().map(|e| (&e.path[..], e.uid, e.size)).collect();
    assert_eq!(
        seen,
        [(&b"a"[..], 1, 0), (b"b", 2, 0), (b"c", 1000, 0), (b"d", 1000, 0)]
    );
    assert!(entries.iter().all(|e| e.mtime
        == Timestamp {
            secs: 99,
            nanos: 500_000_000
        }));
    // In an image they change nothing.
    let in_image: Vec<_> = entries
        .iter()
        .map(|e| (e.as_in_image().uid, e.as_in_image().mtime.secs))
        .collect();
    assert_eq!(in_image, [(1000, 10), (2, 10), (1000, 10), (1000, 10)]);
    assert_eq!(entries[0].xattrs, []);
    assert_eq!(entries[1].xattrs[0].value, b"2");
    assert_eq!(
        entries[0].headers.start,
        TarOffset(1024),
        "a global header belongs to no entry"
    );

    let between = [pax(b'x', &[("uid", b"2")]), pax(b'g', &[]), file(b"a")].concat();
    assert_eq!(fault(&between), HeaderFault::GlobalBetween);
}

#[test]
fn pax_names_go_before_gnus_but_in_images() {
    let file = |name: &[u8]| RawHeader::new(b'0', name, 0).sealed();
    let link = || RawHeader::new(b'2', b"s", 0).field(157, b"zz").sealed();
    let (long, path) = (member(b'L', b"x", b"long\0"), pax(b'x', &[("path", b"paxname")]));
    for tar in [
        [&long[..], &path, &file(b"a")].concat(),
        [&path[..], &long, &file(b"a")].concat(),
    ] {
        let entry = parse_one(&tar);
        assert_eq!(
            (&entry.path[..], &entry.as_in_image().path[..]),
            (&b"paxname"[..], &b"long"[..])
        );
    }
    let target = pax(b'x', &[("linkpath", b"two")]);
    let entry = parse_one(&[&member(b'K', b"x", b"one\0")[..], &target, &link()].concat());
    assert_eq!(
        (&entry.link[..], &entry.as_in_image().link[..]),
        (&b"two"[..], &b"one"[..])
    );
    // Where both say the same there is nothing to say.
    let same = [&member(b'L', b"x", b"paxname\0")[..], &path, &file(b"a")].concat();
    assert_eq!(parse_one(&same).in_image, None);
    // A target means nothing to a file.
    let of_file = [&member(b'K', b"x", b"one\0")[..], &target, &file(b"a")].concat();
    assert_eq!(parse_one(&of_file).in_image, None);
    let sparse = pax(
        b'x',
        &[
            ("path", b"p"),
            ("GNU.sparse.major", b"0"),
            ("GNU.sparse.minor", b"1"),
            ("GNU.sparse.name", b"real"),
            ("GNU.sparse.numblocks", b"0"),
            ("GNU.sparse.map", b"0,0"),
        ],
    );
    let sparse = [&long[..], &sparse, &file(b"a")].concat();
    if let Ok(entries) = parse(&sparse) {
        assert_eq!(
            (&entries[0].path[..], entries[0].in_image.is_none()),
            (&b"real"[..], true)
        );
    }
}

#[test]
fn checksums_may_be_of_signed_bytes() {
    let block = || RawHeader::new(b'0', b"na\xefve\xff", 0);
    assert_eq!(parse_one(&block().sealed()).path, b"na\xefve\xff");
    let signed = block().sealed_with(|byte| i64::from(byte.cast_signed()));
    assert_eq!(parse_one(&signed).path, b"na\xefve\xff");
    let mut wrong = [member(b'0', b"a", b""), member(b'0', b"b", b"")].concat();
    wrong[512 + 3] ^= 1;
    assert!(matches!(
        parse(&wrong),
        Err(IndexError::Header {
            at: TarOffset(512),
            fault: HeaderFault::Checksum,
            ..
        })
    ));
}

#[test]
fn numbers_may_be_base_256_and_must_be_in_range() {
    let big = RawHeader::new(b'0', b"a", 0)
        .field(108, b"\x80\0\0\0\xff\xff\xff\xfe")
        .field(136, &[0xff; 12]);
    let entry = parse_one(&big.sealed());
    assert_eq!((entry.uid, entry.mtime.secs), (4_294_967_294, -1));
    let bad = |at: usize, bytes: &[u8]| fault(&RawHeader::new(b'0', b"a", 0).field(at, bytes).sealed());
    let below = RawHeader::new(b'0', b"a", 0).field(108, &[0xff; 8]).sealed();
    assert_eq!(parse_one(&below).uid, -1);
    assert_eq!(bad(108, b"abc\0\0\0\0\0"), HeaderFault::Number("uid"));
    assert_eq!(bad(100, b"99999999"), HeaderFault::Number("mode"));
    assert_eq!(bad(136, b"x"), HeaderFault::Number("mtime"));
    assert_eq!(bad(124, &[0xff; 12]), HeaderFault::NegativeSize);
    assert_eq!(
        bad(124, b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"),
        HeaderFault::HugeSize
    );
    assert_eq!(
        bad(124, b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        HeaderFault::Number("size")
    );
    let records = |key, value| fault(&[pax(b'x', &[(key, value)]), RawHeader::new(b'0', b"a", 0).sealed()].concat());
    assert_eq!(records("size", b"-1"), HeaderFault::NegativeSize);
    assert_eq!(records("size", b"9223372036854775807"), HeaderFault::HugeSize);
    assert_eq!(records("size", b"99999999999999999999"), HeaderFault::PaxValue("size"));
    let below = [pax(b'x', &[("gid", b"-2")]), RawHeader::new(b'0', b"a", 0).sealed()].concat();
    assert_eq!(parse_one(&below).gid, -2);
    // Empty fields are zero.
    let empty = RawHeader::new(b'0', b"a", 0)
        .field(100, &[0; 8])
        .field(108, &[b' '; 8])
        .sealed();
    assert_eq!((parse_one(&empty).mode, parse_one(&empty).uid), (0, 0));
}

#[test]
fn extension_headers_have_a_limit() {
    let len = 8 << 30;
    for flag in [b'x', b'g', b'L', b'K'] {
        let limit = HeaderFault::ExtensionTooLong { len, limit: 1 << 20 };
        assert_eq!(fault(&RawHeader::new(flag, b"x", len).sealed()), limit);
    }
    let name = vec![b'n'; 1 << 20];
    let tar = [member(b'L', b"x", &name), RawHeader::new(b'0', b"a", 0).gnu().sealed()].concat();
    assert_eq!(parse_one(&tar).path, name);
}

#[test]
fn a_tar_may_just_end() {
    let file = member(b'0', b"a", b"12345");
    for tail in [0, 1, 2, 3] {
        let tar = [&file[..], &vec![0; tail * 512]].concat();
        assert_eq!(parse(&tar).unwrap().len(), 1, "{tail} zero blocks");
    }
    assert_eq!(parse(&file[..512 + 5]).unwrap().len(), 1, "no padding");
    let junk = [&file[..], &end(), b"what follows the end is ignored"].concat();
    assert_eq!(parse(&junk).unwrap().len(), 1);
    assert_eq!(parse(&end()).unwrap().len(), 0);
    assert_eq!(parse(&[]).unwrap().len(), 0);
    let lone = [&file[..], &[0; 512], &file].concat();
    assert_eq!(parse(&lone).unwrap().len(), 1, "the end, for GNU tar");
    let mut parser = Parser::new();
    parser.feed(TarOffset(0), &lone, &mut Collector::default()).unwrap();
    assert_eq!(
        parser.finish(TarOffset(len_u64(lone.len()))).unwrap(),
        EndOfArchive::LoneZeroBlock
    );
}

#[test]
fn a_cut_tar_is_an_error_that_says_where() {
    let tar = [
        pax(b'x', &[("path", b"p/q")]),
        member(b'0', b"a", &[7; 1000]),
        member(b'0', b"b", b""),
    ]
    .concat();
    for cut in 1..tar.len() {
        let outcome = parse(&tar[..cut]);
        // Whole entries may be missing at the end, and the last padding.
        let whole = matches!(cut, 2536..=2560);
        match outcome {
            Ok(entries) => assert!(whole && entries.len() == 1, "{cut}"),
            Err(IndexError::NotATar(_)) => assert!(cut < 512),
            Err(IndexError::Truncated { len, needs, .. }) => assert!(!whole && len.0 == at(cut) && needs > len),
            Err(other) => panic!("{cut}: {other}"),
        }
    }
    let message = parse(&tar[..2000]).unwrap_err().to_string();
    assert!(
        message.contains("byte 2000") && message.contains("byte 2536") && message.contains("p/q"),
        "{message}"
    );
}

#[test]
fn what_is_no_tar_is_recognised() {
    for (start, word) in [
        (&b"\x1f\x8b\x08"[..], "gzip -d"),
        (b"\x28\xb5\x2f\xfd", "zstd -d"),
        (b"\xfd7zXZ\0", "xz"),
        (b"BZh9", "bzip2"),
        (b"PK\x03\x04", "zip"),
        (b"\x04\x22\x4d\x18", "lz4"),
        (b"LZIP", "lzip"),
        (b"\x1f\x9d", "(.Z)"),
        (b"\x5d\0\0\x80\0\xff\xff\xff\xff\xff\xff\xff\xff", "lzma"),
        (b"<html>", "checksum"),
    ] {
        let mut block = vec![b'?'; 2048];
        block[..start.len()].copy_from_slice(start);
        let message = parse(&block).unwrap_err().to_string();
        assert!(message.starts_with("not a tar") && message.contains(word), "{message}");
    }
    assert!(matches!(parse(b"short"), Err(IndexError::NotATar(_))));
}

/// A GNU sparse file: header with up to four pairs, extension blocks with the rest.
fn gnu_sparse(runs: &[(u64, u64)], real: u64, payload: &[u8]) -> Vec<u8> {
    let stored: u64 = runs.iter().map(|run| run.1).sum();
    let mut block = RawHeader::new(b'S', b"s", stored)
        .gnu()
        .field(483, format!("{real:011o}\0").as_bytes());
    let pair = |run: &(u64, u64)| format!("{:011o}\0{:011o}\0", run.0, run.1).into_bytes();
    let (first, rest) = runs.split_at(runs.len().min(4));
    for (place, run) in first.iter().enumerate() {
        block = block.field(386 + place * 24, &pair(run));
    }
    let mut chunks = rest.chunks(21).peekable();
    let mut tar = block.field(482, &[u8::from(chunks.peek().is_some())]).sealed();
    while let Some(chunk) = chunks.next() {
        let mut block = chunk.iter().flat_map(pair).collect::<Vec<u8>>();
        block.resize(504, 0);
        block.push(u8::from(chunks.peek().is_some()));
        block.resize(512, 0);
        tar.extend(block);
    }
    [tar, padded(payload)].concat()
}

#[test]
fn sparse_files_come_in_four_forms() {
    // Thirty runs of single bytes: byte-granular, and more than one extension block.
    let runs: Vec<(u64, u64)> = (0..30).map(|n| (n * 2 + 1, 1)).collect();
    let payload: Vec<u8> = (1..=30).collect();
    let expected: Vec<u8> = (0..70)
        .map(|at| if at % 2 == 1 && at < 60 { at / 2 + 1 } else { 0 })
        .collect();
    let map = runs
        .iter()
        .flat_map(|run| [run.0.to_string(), run.1.to_string()])
        .collect::<Vec<_>>();
    let pairs: Vec<(&str, &[u8])> = map
        .chunks(2)
        .flat_map(|p| {
            [
                ("GNU.sparse.offset", p[0].as_bytes()),
                ("GNU.sparse.numbytes", p[1].as_bytes()),
            ]
        })
        .collect();
    let joined = map.join(",");
    let lines = padded(format!("30\n{}\n", map.join("\n")).as_bytes());
    let v00 = [
        &[("GNU.sparse.size", &b"70"[..]), ("GNU.sparse.numblocks", b"30")][..],
        &pairs,
    ]
    .concat();
    let v01 = [
        ("GNU.sparse.size", &b"70"[..]),
        ("GNU.sparse.numblocks", b"30"),
        ("GNU.sparse.name", b"s"),
        ("GNU.sparse.map", joined.as_bytes()),
    ];
    let v10 = [
        ("GNU.sparse.major", &b"1"[..]),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"s"),
        ("GNU.sparse.realsize", b"70"),
    ];
    let next = member(b'0', b"next", b"");
    let posix = |records: &[(&str, &[u8])], payload: &[u8]| {
        [
            pax(b'x', records),
            member(b'0', b"GNUSparseFile.0/s", payload),
            next.clone(),
        ]
        .concat()
    };
    for (form, tar) in [
        ("old GNU", [gnu_sparse(&runs, 70, &payload), next.clone()].concat()),
        ("0.0", posix(&v00, &payload)),
        ("0.1", posix(&v01, &payload)),
        ("1.0", posix(&v10, &[&lines[..], &payload].concat())),
    ] {
        let entries = parse(&tar).unwrap_or_else(|error| panic!("{form}: {error}"));
        assert_eq!(entries.len(), 2, "{form}");
        let entry = &entries[0];
        assert_eq!(
            (entry.size, entry.stored_bytes(), entry.segments.len()),
            (70, 30, 30),
            "{form}"
        );
        assert_eq!(content(&tar, entry), expected, "{form}");
        assert_eq!(entry.payload().start, entry.headers.end());
        let name: &[u8] = if form == "0.0" { b"GNUSparseFile.0/s" } else { b"s" };
        assert_eq!(entry.path, name, "{form}");
        assert_eq!(entries[1].path, b"next", "{form}");
    }
}

#[test]
fn sparse_maps_that_lie_are_errors() {
    for (runs, real, payload) in [
        (&[(10, 5), (12, 5)][..], 100, 10),
        (&[(10, 5), (0, 5)], 100, 10),
        (&[(98, 5)], 100, 5),
        (&[(0, 5)], 100, 0),
        (&[(0, 0x1_ffff_ffff), (0x1_ffff_ffff, 0x1_ffff_ffff)], 0x1_ffff_ffff, 0),
    ] {
        let mut tar = gnu_sparse(runs, real, &vec![1; payload]);
        if payload == 0 {
            // The header says that nothing is stored.
            let block = RawHeader(*tar.first_chunk().unwrap())
                .field(124, b"00000000000\0")
                .sealed();
            tar[..512].copy_from_slice(&block);
        }
        assert!(matches!(fault(&tar), HeaderFault::Sparse(_)), "{runs:?}");
    }
    let posix =
        |records: &[(&str, &[u8])], payload: &[u8]| fault(&[pax(b'x', records), member(b'0', b"s", payload)].concat());
    let v10 = [
        ("GNU.sparse.major", &b"1"[..]),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.realsize", b"70"),
    ];
    for lines in [
        &b"-1\n"[..],
        b"x\n",
        b"1\n0\n",
        b"2\n0\n1\n",
        b"9223372036854775807\n0\n1\n",
        b"1\n-1\n1\n",
        b"1\n5\n80\n",
    ] {
        assert!(
            matches!(posix(&v10, &padded(lines)), HeaderFault::Sparse(_)),
            "{}",
            String::from_utf8_lossy(lines)
        );
    }
    assert!(matches!(posix(&v10, b"short"), HeaderFault::Sparse(_)));
    assert!(
        matches!(posix(&[("GNU.sparse.map", b"0,1")], b"x"), HeaderFault::Sparse(_)),
        "no numblocks"
    );
    let odd = [("GNU.sparse.map", &b"0,1,2"[..]), ("GNU.sparse.numblocks", b"1")];
    assert!(matches!(posix(&odd, b"x"), HeaderFault::Sparse(_)));
    let negative = [
        ("GNU.sparse.map", &b"0,1"[..]),
        ("GNU.sparse.numblocks", b"1"),
        ("GNU.sparse.size", b"-5"),
    ];
    assert_eq!(posix(&negative, b"x"), HeaderFault::NegativeSize);
    let link = [pax(b'x', &v10), RawHeader::new(b'2', b"l", 0).sealed()].concat();
    assert!(matches!(fault(&link), HeaderFault::Sparse(_)));
    assert!(
        matches!(fault(&RawHeader::new(b'S', b"s", 0).sealed()), HeaderFault::Sparse(_)),
        "not a GNU header"
    );
    // An unknown version is a plain file, as everywhere.
    let unknown = [
        pax(b'x', &[("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0")]),
        member(b'0', b"s", b"abc"),
    ];
    assert_eq!(parse_one(&unknown.concat()).size, 3);
}

#[test]
fn pieces_of_any_size_give_the_same() {
    let runs: Vec<(u64, u64)> = (0..30).map(|n| (n * 4, 2)).collect();
    let tar = [
        pax(b'g', &[("mtime", b"5")]),
        pax(b'x', &[("path", &[b'p'; 700]), ("SCHILY.xattr.user.a", b"b")]),
        member(b'0', b"a", &[1; 3000]),
        gnu_sparse(&runs, 200, &[9; 60]),
        member(b'L', b"././@LongLink", &[b'l'; 600]),
        RawHeader::new(b'2', b"short", 0).gnu().field(157, b"to").sealed(),
        end(),
    ]
    .concat();
    let whole = parse(&tar).unwrap();
    assert_eq!(whole.len(), 3);
    for size in [1, 2, 3, 7, 100, 511, 512, 513, 1000, 5000] {
        let mut all = Collector::default();
        let mut parser = Parser::new();
        for (number, piece) in tar.chunks(size).enumerate() {
            parser.feed(TarOffset(at(number * size)), piece, &mut all).unwrap();
        }
        assert_eq!(parser.finish(TarOffset(at(tar.len()))).unwrap(), EndOfArchive::Marked);
        assert_eq!(all.0, whole, "pieces of {size}");
    }
    // Only what is wanted, unit by unit: no payload is ever asked for.
    let mut all = Collector::default();
    let mut parser = Parser::new();
    let mut fed = 0;
    while let Some(at) = parser.wants() {
        let start = usize::try_from(at.0).unwrap();
        let unit = &tar[start..start + parser.wants_len()];
        fed += unit.len();
        parser.feed(at, unit, &mut all).unwrap();
    }
    assert_eq!(all.0, whole);
    assert!(fed < tar.len() - 3000);
}

#[test]
fn a_gap_is_noticed() {
    let mut parser = Parser::new();
    let outcome = parser.feed(TarOffset(512), &[0; 512], &mut Collector::default());
    assert!(matches!(
        outcome,
        Err(IndexError::Archive {
            fault: ArchiveFault::Gap,
            ..
        })
    ));
    assert!(matches!(
        Parser::new().finish(TarOffset(4096)),
        Err(IndexError::Archive { .. })
    ));
}
