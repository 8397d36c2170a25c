//! Compressed layers as other programs make them: at every entry point the decoder gives what the whole stream gives
//! there, whatever the pieces in which the blob comes, and the whole is what the other program unpacks.
//!
//! Written by gzip, pigz, zstd, pzstd and Python's zlib (the latter with header flags, flush points, stored and fixed
//! blocks, which no command line makes); read back by gzip and zstd.

#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::collections::BTreeMap;
use std::io::Write;
use std::process::{Command, Stdio};

use common::unzstd::{self, Held, Which};
use common::{have, skip};
use tarblk::internals::layer::{Begins, Coding, Decoder, Indexer, LayerError, SpanTable, Spans};
use tarblk::internals::units::{TarOffset, TarRange};

/// Close enough for many points in a few megabytes.
const SPACING: u64 = 64 << 10;

/// What a layer is like: text, machine code as good as random, long runs, repetitions from far away.
fn content() -> Vec<u8> {
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let words = include_str!("../docs/ARCHITECTURE.md").as_bytes();
    let mut out = Vec::new();
    while out.len() < 3_000_000 {
        let kind = random() % 6;
        let len = usize::try_from(random() % 60_000).unwrap();
        match kind {
            0 => out.extend(std::iter::repeat_with(|| random().to_le_bytes()[3]).take(len)),
            1 => out.extend(std::iter::repeat_n(0, len * 3)),
            2 if out.len() > 40_000 => {
                let from = out.len() - 1 - usize::try_from(random() % 32_000).unwrap();
                let copy = out[from..].to_vec();
                out.extend(copy);
            }
            _ => {
                let from = usize::try_from(random()).unwrap() % words.len();
                out.extend(
                    words
                        .iter()
                        .cycle()
                        .skip(from)
                        .step_by(1 + usize::from(kind == 5))
                        .take(len),
                );
            }
        }
    }
    out
}

/// Runs a filter over bytes.
fn filter(program: &str, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    let mut stdin = child.stdin.take().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || stdin.write_all(input).unwrap());
        child.wait_with_output().unwrap().stdout
    })
}

/// Python's zlib, told what to do by a few lines that turn `data` into `out`.
fn python(lines: &str, input: &[u8]) -> Vec<u8> {
    let script = format!(
        "import sys, zlib, gzip, struct, io\ndata = sys.stdin.buffer.read()\n\
         def raw(d, level=6, strategy=0, end=zlib.Z_FINISH):\n c = zlib.compressobj(level, zlib.DEFLATED, -15, 9, strategy)\n return c.compress(d) + c.flush(end)\n\
         def tail(d): return struct.pack('<II', zlib.crc32(d), len(d) & 0xffffffff)\n\
         HEAD = b'\\x1f\\x8b\\x08\\x00\\x00\\x00\\x00\\x00\\x00\\x03'\n\
         def member(d, **how): return HEAD + raw(d, **how) + tail(d)\n\
         {lines}\nsys.stdout.buffer.write(out)\n"
    );
    filter("python3", &["-c", &script], input)
}

fn len(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap()
}

/// Streams a blob through an indexer in pieces of `piece` bytes.
fn index(coding: Coding, spacing: u64, blob: &[u8], piece: usize) -> Result<(Spans, Vec<u8>), LayerError> {
    let mut indexer = Indexer::new(coding, spacing);
    let mut tar = Vec::new();
    for bytes in blob.chunks(piece) {
        indexer.feed(bytes, &mut |out| tar.extend_from_slice(out))?;
        assert_eq!(indexer.position(), TarOffset(len(&tar)));
    }
    Ok((indexer.finish()?, tar))
}

/// Decodes what is in a range of a blob from span `n` on.
fn decode(spans: &Spans, n: usize, blob: &[u8], until: TarOffset, piece: usize) -> Vec<u8> {
    let windows = spans.windows.get(n..).unwrap_or_default().to_vec();
    let mut decoder = Decoder::start_with(&spans.table, n, windows).unwrap().until(until);
    let from = usize::try_from(spans.table.span(n).blob.start).unwrap();
    let mut out = Vec::new();
    for bytes in blob[from..].chunks(piece) {
        decoder.feed(bytes, &mut |bytes| out.extend_from_slice(bytes)).unwrap();
    }
    assert!(decoder.is_done());
    out
}

/// Everything that must hold of a blob and what it unpacks to. Returns the table.
fn check(what: &str, coding: Coding, blob: &[u8], tar: &[u8]) -> Spans {
    assert_eq!(Coding::of_bytes(blob), coding, "{what}");
    let (spans, unpacked) = index(coding, SPACING, blob, usize::MAX).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(unpacked == tar, "{what}: the whole stream");
    let table = &spans.table;
    assert_eq!((table.tar_len(), table.blob_len()), (len(tar), len(blob)), "{what}");
    for piece in [1, 13, 4096, 50_001] {
        if piece * 2_000_000 < blob.len() {
            continue;
        }
        let (again, unpacked) = index(coding, SPACING, blob, piece).unwrap();
        assert!(unpacked == tar, "{what}: in pieces of {piece}");
        assert_eq!(again.table, *table, "{what}: in pieces of {piece}");
        assert!(again.windows == spans.windows, "{what}: in pieces of {piece}");
    }
    let mut encoded = Vec::new();
    table.encode(&mut encoded);
    let mut encoded_blocks = Vec::new();
    table.encode_blocks(&mut encoded_blocks);
    let frames = SpanTable::decode(&encoded).unwrap();
    assert_eq!(frames, table.without_blocks(), "{what}");
    assert_eq!(frames.with_blocks(&encoded_blocks).as_ref(), Ok(table), "{what}");

    let mut at = 0;
    for n in 0..table.len() {
        let span = table.span(n);
        assert_eq!(span.tar.start, TarOffset(at), "{what}: span {n}");
        if coding == Coding::Zstd {
            assert_eq!(span.window == 0, spans.windows[n].is_empty(), "{what}: span {n}");
        } else {
            assert_eq!(len(&spans.windows[n]), u64::from(span.window), "{what}: span {n}");
        }
        for inside in [span.tar.start, TarOffset(span.tar.end().0 - 1)] {
            assert_eq!(table.span_at(inside), n, "{what}");
        }
        // Just the span's own bytes have to do, in any pieces.
        let bytes = &blob[..usize::try_from(span.blob.end).unwrap()];
        let expected = &tar[usize::try_from(at).unwrap()..usize::try_from(span.tar.end().0).unwrap()];
        for piece in [usize::MAX, 777, 1] {
            if span.begins == Begins::Within {
                continue;
            }
            let decoded = decode(&spans, n, bytes, span.tar.end(), piece);
            assert!(decoded == expected, "{what}: span {n} in pieces of {piece}");
        }
        at = span.tar.end().0;
    }
    assert_eq!(at, len(tar), "{what}");
    let all_can_be_entered = (0..table.len()).all(|n| table.span(n).begins != Begins::Within);
    for n in (0..table.len()).step_by(7).filter(|n| *n == 0 || all_can_be_entered) {
        let from = usize::try_from(table.span(n).tar.start.0).unwrap();
        assert!(
            decode(&spans, n, blob, TarOffset(u64::MAX), 10_000) == tar[from..],
            "{what}: from span {n} to the end"
        );
    }
    spans
}

fn needs(test: &str, program: &str) -> bool {
    if !have(program) {
        skip(test, &format!("no {program}"));
    }
    have(program)
}

#[test]
fn gzip_at_every_level() {
    if !needs("gzip_at_every_level", "gzip") {
        return;
    }
    let tar = content();
    for level in ["-1", "-6", "-9"] {
        let blob = filter("gzip", &[level, "-c"], &tar);
        let spans = check(&format!("gzip {level}"), Coding::Gzip, &blob, &tar);
        assert!(spans.table.len() > 10, "{level}: {}", spans.table.len());
        assert!(spans.table.seekable());
    }
}

#[test]
fn pigz_in_blocks_and_in_independent_blocks() {
    if !needs("pigz_in_blocks_and_in_independent_blocks", "pigz") {
        return;
    }
    let tar = content();
    for options in [
        &["-c"][..],
        &["-c", "-i"],
        &["-c", "-p", "1", "-9"],
        &["-c", "-11", "-p", "2", "-b", "512"],
    ] {
        let blob = filter("pigz", options, &tar[..1_500_000]);
        check(&format!("pigz {options:?}"), Coding::Gzip, &blob, &tar[..1_500_000]);
    }
}

#[test]
fn histories_are_handed_out_as_they_come() {
    let tar = content();
    let blob = filter("gzip", &["-6nc"], &tar);
    let (whole, _) = index(Coding::Gzip, SPACING / 32, &blob, 4096).unwrap();
    assert!(whole.table.len() > 20, "{} spans", whole.table.len());
    for piece in [1, 4096, 50_001] {
        let mut indexer = Indexer::new(Coding::Gzip, SPACING / 32);
        let mut taken = Vec::new();
        let mut since = TarOffset(0);
        for bytes in blob.chunks(piece) {
            indexer.feed(bytes, &mut |_| {}).unwrap();
            let before = taken.len();
            taken.extend(indexer.take_windows());
            let passed = indexer.position().since(since) / (SPACING / 32);
            let fresh = u64::try_from(taken.len() - before).unwrap();
            assert!(fresh <= passed + 2, "in pieces of {piece}");
            since = indexer.position();
        }
        let spans = indexer.finish().unwrap();
        assert!(spans.windows.len() <= 2, "{} were kept", spans.windows.len());
        taken.extend(spans.windows);
        assert_eq!(spans.table, whole.table, "in pieces of {piece}");
        assert!(taken == whole.windows, "in pieces of {piece}");
    }
}

/// A stream that says the same 32,000 bytes over and over needs all of them at every point, and is a hundredth of what
/// comes out of it.
#[test]
fn all_histories_are_no_longer_than_the_blob() {
    let unit: Vec<u8> = content().into_iter().skip(5000).take(32_000).collect();
    let tar = unit.repeat(500);
    let blob = filter("gzip", &["-9nc"], &tar);
    let spans = check("a bomb of histories", Coding::Gzip, &blob, &tar);
    let total: usize = spans.windows.iter().map(Vec::len).sum();
    assert!(blob.len() * 40 < tar.len(), "{} bytes", blob.len());
    assert!(total <= blob.len() + (64 << 10), "{total} of {}", blob.len());
    assert!(spans.table.len() > 2, "{} spans", spans.table.len());
    assert!(spans.table.len() < tar.len() >> 21, "{} spans", spans.table.len());
}

#[test]
fn members_are_places_without_history() {
    let tar = content();
    // BGZF: 65,280 bytes a member, its compressed length in an extra field, an empty member at the end.
    let blob = python(
        "out = b''\n\
         for at in range(0, len(data), 65280):\n  d = data[at:at+65280]; c = raw(d)\n  \
         out += b'\\x1f\\x8b\\x08\\x04\\0\\0\\0\\0\\0\\xff\\x06\\0BC\\x02\\0' + struct.pack('<H', len(c) + 25) + c + tail(d)\n\
         out += bytes.fromhex('1f8b08040000000000ff0600424302001b0003000000000000000000')\n",
        &tar,
    );
    let spans = check("BGZF", Coding::Gzip, &blob, &tar);
    assert_eq!(spans.table.len(), tar.len().div_ceil(65_280));
    assert!(spans.windows.iter().all(Vec::is_empty));

    // Members of all sizes, many of them empty or tiny.
    let blob = python(
        "out = b''\nat = 0; n = 0\n\
         while at < len(data):\n  size = [0, 1, 7, 300, 0, 0, 40000, 200000][n % 8]; n += 1\n  out += member(data[at:at+size]); at += size\n",
        &tar,
    );
    let spans = check("members of all sizes", Coding::Gzip, &blob, &tar);
    let begins: Vec<Begins> = (0..spans.table.len()).map(|n| spans.table.span(n).begins).collect();
    assert!(begins.contains(&Begins::Whole) && begins.contains(&Begins::Block));
}

#[test]
fn headers_with_everything() {
    let tar = &content()[..200_000];
    let blob = python(
        "def head(flags):\n  h = bytes([0x1f, 0x8b, 8, flags, 1, 2, 3, 4, 2, 255])\n  \
         if flags & 4: h += struct.pack('<H', 300) + b'AB' + struct.pack('<H', 296) + bytes(i & 255 for i in range(296))\n  \
         if flags & 8: h += b'layer \\xff.tar\\0'\n  \
         if flags & 16: h += b'a comment, ' * 100 + b'\\0'\n  \
         if flags & 2: h += struct.pack('<H', zlib.crc32(h) & 0xffff)\n  return h\n\
         out = b''\nstep = len(data) // 32 + 1\n\
         for flags in range(32):\n  d = data[flags*step:(flags+1)*step]; out += head(flags) + raw(d) + tail(d)\n",
        tar,
    );
    check("all flags", Coding::Gzip, &blob, tar);
    // The flags of the third member with a header checksum (6: extra and checksum).
    let mut wrong = blob.clone();
    let at = wrong.windows(4).position(|bytes| bytes == [0x1f, 0x8b, 8, 6]).unwrap();
    wrong[at + 100] ^= 1;
    assert!(matches!(
        index(Coding::Gzip, SPACING, &wrong, 99),
        Err(LayerError::Corrupt { .. })
    ));
}

#[test]
fn blocks_of_every_kind() {
    let tar = content();
    for (what, lines) in [
        ("stored", "out = member(data, level=0)"),
        ("fixed", "out = member(data, strategy=zlib.Z_FIXED)"),
        ("huffman only", "out = member(data, strategy=zlib.Z_HUFFMAN_ONLY)"),
        ("run lengths", "out = member(data, strategy=zlib.Z_RLE)"),
        (
            "flush points of every kind",
            "c = zlib.compressobj(6, zlib.DEFLATED, -15)\nout = HEAD\n\
             for n, at in enumerate(range(0, len(data), 20000)):\n  \
             out += c.compress(data[at:at+20000]) + c.flush([zlib.Z_SYNC_FLUSH, zlib.Z_FULL_FLUSH, zlib.Z_PARTIAL_FLUSH, zlib.Z_BLOCK, zlib.Z_NO_FLUSH][n % 5])\n\
             out += c.flush() + tail(data)\n",
        ),
        ("gzip.compress", "out = gzip.compress(data)"),
    ] {
        let blob = python(lines, &tar);
        let spans = check(what, Coding::Gzip, &blob, &tar);
        if what == "huffman only" || what == "stored" {
            assert!(spans.windows.iter().all(Vec::is_empty), "{what}: nothing reaches back");
        }
        // A fixed block can be as long as the stream.
        assert!(
            spans.table.len() > 10 || what == "fixed",
            "{what}: {} spans",
            spans.table.len()
        );
    }
}

#[test]
fn empty_and_tiny() {
    for (what, lines, tar) in [
        ("an empty member", "out = member(b'')", &b""[..]),
        ("two empty members", "out = member(b'') * 2", b""),
        ("one byte", "out = member(b'x')", b"x"),
        (
            "empty, byte, empty",
            "out = member(b'') + member(b'x') + member(b'')",
            b"x",
        ),
    ] {
        check(what, Coding::Gzip, &python(lines, b""), tar);
    }
    if needs("empty_and_tiny", "zstd") {
        check("an empty frame", Coding::Zstd, &filter("zstd", &["-c"], b""), b"");
        check("a frame of a byte", Coding::Zstd, &filter("zstd", &["-c"], b"x"), b"x");
    }
}

/// What is behind the last member is treated as gzip(1) treats it.
#[test]
fn padding_and_garbage_behind_the_last_member() {
    let tar = &content()[..300_000];
    let member = python("out = member(data)", tar);
    let unpacked_by_gzip = have("gzip");
    let tails: [&[u8]; 8] = [
        &[0; 1],
        &[0; 5000],
        b"garbage",
        b"\x1f",
        b"\x1f\x00",
        b"\0\0\0\x1f\x8b\x08",
        &[0xff; 3],
        b"\x1f\x1f\x8b\x08",
    ];
    for tail in tails {
        let blob = [&member[..], tail].concat();
        let spans = check(&format!("{tail:?}"), Coding::Gzip, &blob, tar);
        assert_eq!(
            spans.table.span(spans.table.len() - 1).blob.end,
            len(&member),
            "{tail:?}"
        );
        if unpacked_by_gzip {
            assert!(filter("gzip", &["-dc"], &blob) == tar, "{tail:?}");
        }
    }
    // What begins like a member has to be one.
    for tail in [
        &b"\x1f\x8b"[..],
        b"\x1f\x8b\x07\0\0\0\0\0\0\0\0",
        b"\x1f\x8b\x08\xe0\0\0\0\0\0\0\0",
        &member[..member.len() - 1],
    ] {
        let blob = [&member[..], tail].concat();
        assert!(index(Coding::Gzip, SPACING, &blob, 1000).is_err(), "{tail:?}");
    }
}

#[test]
fn zstd_of_one_frame_is_entered_at_its_blocks() {
    if !needs("zstd_of_one_frame_is_entered_at_its_blocks", "zstd") {
        return;
    }
    let tar = content();
    for options in [
        &["-c", "-3"][..],
        &["-c", "-T2"],
        &["-c", "-6", "--rsyncable", "-T2"],
        &["-c", "-3", "-T2", "-B64K"],
        &["-c", "-19", "--long=24"],
        &["-c", "-16"],
        &["-c", "--no-check", "-1"],
        &["-c", "--fast=5"],
        &["-c", "-3", "--zstd=wlog=10"],
    ] {
        let blob = filter("zstd", options, &tar);
        let spans = check(&format!("zstd {options:?}"), Coding::Zstd, &blob, &tar);
        assert!(spans.table.len() > 5, "{options:?}: {} spans", spans.table.len());
        assert!(spans.table.seekable() && !spans.table.without_blocks().seekable());
        check_against_the_rfc(&format!("zstd {options:?}"), &blob, &tar, &spans);
    }
    for options in [&["-c", "--long=28"][..], &["-c", "--ultra", "--long=30"]] {
        let blob = filter("zstd", options, &tar);
        check(&format!("zstd {options:?}"), Coding::Zstd, &blob, &tar);
    }
    let blob = filter("zstd", &["-c", "--ultra", "--long=31"], &tar);
    let refused = LayerError::Window {
        coding: Coding::Zstd,
        at: 0,
        needs: 1 << 31,
        limit: 1 << 30,
    };
    assert_eq!(index(Coding::Zstd, SPACING, &blob, 3).unwrap_err(), refused);
}

/// Numbers and bytes from the front, as indexes have them.
struct Front<'a>(&'a [u8]);

impl<'a> Front<'a> {
    fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(count);
        self.0 = rest;
        head
    }

    fn number(&mut self) -> usize {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = self.bytes(1)[0];
            value |= usize::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }
}

/// What the table says that a decoder holds at each block that can be entered, by the block's byte of the blob: read as
/// docs/index-format.md has it.
fn held_at_blocks(table: &SpanTable) -> BTreeMap<usize, Held> {
    let mut bytes = Vec::new();
    table.encode_blocks(&mut bytes);
    let mut front = Front(&bytes);
    let (mut all, mut blob) = (BTreeMap::new(), 0);
    for _ in 0..front.number() {
        front.number();
        blob += front.number();
        if front.bytes(1)[0] == 0 {
            continue;
        }
        front.number();
        let flags = front.bytes(2)[1];
        let repeats = [front.number(), front.number(), front.number()];
        let mut described = |flag: u8| {
            let is_there = flags & flag != 0;
            is_there.then(|| {
                let len = front.number();
                front.bytes(len)
            })
        };
        let huffman = described(2).map(|bytes| unzstd::huffman(bytes).0);
        let mut table = |flag, which| {
            let bytes = described(flag)?;
            Some(if bytes.is_empty() {
                unzstd::predefined(which)
            } else {
                unzstd::described(bytes).0
            })
        };
        let held = Held {
            repeats,
            huffman,
            offsets: table(4, Which::Offsets),
            matches: table(8, Which::Matches),
            literals: table(16, Which::Literals),
        };
        all.insert(blob, held);
    }
    assert!(front.0.is_empty());
    all
}

/// Decodes the frame that is `blob` by the decoder of the tests: as a whole, and each span from its block, of whose history it knows
/// only what the window has. A table or a byte that is used and was not said to be needed is an error there.
fn check_against_the_rfc(what: &str, blob: &[u8], tar: &[u8], spans: &Spans) {
    let (window, _, first) = unzstd::header(blob);
    let mut held = Held::default();
    let (mut at, mut out) = (first, Vec::new());
    let mut begins = BTreeMap::new();
    loop {
        begins.insert(at, out.len());
        let (len, last) = unzstd::block(&blob[at..], &mut held, &mut out);
        at += len;
        if last {
            break;
        }
    }
    assert!(
        out.iter().map(|byte| byte.unwrap()).eq(tar.iter().copied()),
        "{what}: the whole"
    );
    let table = &spans.table;
    let held = held_at_blocks(table);
    for n in 1..table.len() {
        let span = table.span(n);
        let [from, to] = [span.blob.start, span.blob.end].map(|at| usize::try_from(at).unwrap());
        let [start, end] = [span.tar.start.0, span.tar.end().0].map(|at| usize::try_from(at).unwrap());
        assert_eq!(begins.get(&from), Some(&start), "{what}: span {n} begins at no block");
        if span.begins != Begins::Block {
            continue;
        }
        let mut out: Vec<Option<u8>> = vec![None; start];
        let reach = usize::try_from(span.window).unwrap();
        assert!(reach <= window, "{what}: span {n} reaches {reach} bytes back");
        if reach > 0 {
            let mut piece = Front(&spans.windows[n]);
            let mut place = start - reach;
            let extents: Vec<_> = (0..piece.number())
                .map(|_| {
                    place += piece.number();
                    let len = piece.number();
                    place += len;
                    place - len..place
                })
                .collect();
            for extent in extents {
                let bytes = piece.bytes(extent.len());
                assert_eq!(bytes, &tar[extent.clone()], "{what}: span {n}, its window");
                for (place, byte) in extent.zip(bytes) {
                    out[place] = Some(*byte);
                }
            }
        }
        let (mut held, mut at) = (held[&from].clone(), from);
        while at < to && out.len() < end {
            at += unzstd::block(&blob[at..], &mut held, &mut out).0;
        }
        let decoded = out[start..].iter().map(|byte| byte.unwrap());
        assert!(decoded.eq(tar[start..end].iter().copied()), "{what}: span {n}");
    }
}

/// A frame's header with a window of 1 MiB and no content size, and these blocks.
fn frame_of(blocks: &[Vec<u8>]) -> Vec<u8> {
    let mut frame = b"\x28\xb5\x2f\xfd\0\x50".to_vec();
    frame.extend(blocks.concat());
    frame
}

/// A block of this kind (0 raw, 1 one byte that comes `size` times, 2 compressed).
fn block(kind: u32, size: usize, content: &[u8], last: bool) -> Vec<u8> {
    let header = u32::try_from(size).unwrap() << 3 | kind << 1 | u32::from(last);
    [&header.to_le_bytes()[..3], content].concat()
}

#[test]
fn zstd_frames_of_raw_blocks_and_of_runs_are_entered_without_a_window() {
    const MOST: usize = 128 << 10;
    let tar = content();
    let raw: Vec<Vec<u8>> = tar[..20 * MOST]
        .chunks(MOST)
        .map(|bytes| block(0, MOST, bytes, false))
        .collect();
    let blob = [frame_of(&raw), block(0, 0, b"", true)].concat();
    let spans = check("raw blocks", Coding::Zstd, &blob, &tar[..20 * MOST]);
    assert!(spans.table.len() > 5 && spans.windows.iter().all(Vec::is_empty));

    let runs: Vec<Vec<u8>> = (0..1000_u32)
        .map(|n| block(1, MOST, &n.to_le_bytes()[..1], n == 999))
        .collect();
    let blob = frame_of(&runs);
    let tar: Vec<u8> = (0..1000_u32).flat_map(|n| vec![n.to_le_bytes()[0]; MOST]).collect();
    let (spans, out) = index(Coding::Zstd, 8 << 20, &blob, 4096).unwrap();
    assert!(out == tar && blob.len() < 5000 && spans.windows.iter().all(Vec::is_empty));
    assert!((10..40).contains(&spans.table.len()), "{} spans", spans.table.len());
    for n in 0..spans.table.len() {
        let span = spans.table.span(n);
        let [start, end] = [span.tar.start.0, span.tar.end().0].map(|at| usize::try_from(at).unwrap());
        assert!(
            decode(&spans, n, &blob, span.tar.end(), 7) == tar[start..end],
            "span {n}"
        );
    }
}

/// A table of one symbol can be used again by a block, and no dictionary can say so: such a block is none to enter at.
#[test]
fn zstd_blocks_that_repeat_a_table_of_one_symbol_are_not_entered() {
    let sequence = |modes: &[u8]| {
        // Four literals as they are; one sequence, of four literals and a match as long as a block takes it, by the last offset.
        let mut content = b"\x20abcd\x01".to_vec();
        content.extend(modes);
        // Sixteen bits of the match's length, and the bit that ends them.
        content.extend(b"\x00\xfe\x01");
        content
    };
    let first = sequence(b"\x54\x04\x00\x34");
    let again = sequence(b"\xfc");
    let mut blocks = vec![block(2, first.len(), &first, false)];
    blocks.extend((0..30).map(|n| block(2, again.len(), &again, n == 29)));
    let blob = frame_of(&blocks);
    let (spans, tar) = index(Coding::Zstd, SPACING, &blob, 100).unwrap();
    let mut expected = b"abcd".to_vec();
    expected.resize(4 + 65_539 + 0xfe00, b'd');
    assert!(tar == expected.repeat(31), "{} bytes", tar.len());
    assert!(spans.table.len() > 1 && !spans.table.seekable(), "{:?}", spans.table);
    for n in 1..spans.table.len() {
        assert_eq!(spans.table.span(n).begins, Begins::Within);
        assert!(Decoder::start(&spans.table, n, &[]).is_err());
    }
    // Once a block brings tables of its own, the next can be entered.
    let own = sequence(b"\x54\x04\x00\x34");
    let mixed = (0..30).map(|n| if n % 2 == 0 { &own } else { &again });
    let mixed: Vec<Vec<u8>> = mixed
        .zip(0..)
        .map(|(content, n)| block(2, content.len(), content, n == 29))
        .collect();
    let blob = frame_of(&mixed);
    let spans = check("every other block", Coding::Zstd, &blob, &expected.repeat(30));
    assert!(spans.table.seekable(), "{:?}", spans.table);
}

#[test]
fn zeros_behind_the_last_frame_are_padding() {
    if !needs("zeros_behind_the_last_frame_are_padding", "zstd") {
        return;
    }
    let tar = content();
    let frame = filter("zstd", &["-c", "-1"], &tar);
    let skippable = b"\x50\x2a\x4d\x18\x04\0\0\0skip";
    for tail in [
        &[0; 1][..],
        &[0; 3],
        &[0; 4],
        &[0; 5000],
        &[&skippable[..], &[0; 7]].concat(),
    ] {
        let blob = [&frame[..], tail].concat();
        let spans = check(&format!("{} bytes behind", tail.len()), Coding::Zstd, &blob, &tar);
        assert_eq!(spans.table.without_blocks().len(), 1);
    }
    // Anything else is no padding, and zeros are nothing to begin with.
    let beginning = [&[0; 8][..], &frame].concat();
    for bad in [
        [&frame[..], b"garbage"].concat(),
        [&frame[..], &[0; 100], b"x"].concat(),
        [&frame[..], &[0; 2], b"x"].concat(),
        [&frame[..], &[0; 100], &frame].concat(),
    ] {
        for piece in [1000, usize::MAX] {
            let outcome = index(Coding::Zstd, SPACING, &bad, piece);
            assert!(matches!(
                outcome,
                Err(LayerError::Corrupt { .. } | LayerError::Truncated { .. })
            ));
        }
    }
    assert!(index(Coding::Zstd, SPACING, &beginning, 1000).is_err());
    let lz4 = [&skippable[..], b"\x04\x22\x4d\x18\x64\x40\xa7"].concat();
    let refused = index(Coding::of_bytes(&lz4), SPACING, &lz4, 1).unwrap_err();
    assert!(refused.to_string().contains("`lz4 -d`"), "{refused}");
}

#[test]
fn frames_are_places() {
    if !needs("frames_are_places", "zstd") || !needs("frames_are_places", "pzstd") {
        return;
    }
    let tar = content();
    let much = tar.repeat(4);
    let blob = filter("pzstd", &["-c", "-1", "-p", "4"], &much);
    let spans = check("pzstd", Coding::Zstd, &blob, &much);
    assert!(spans.table.seekable());

    // Frames of all sizes with skippable ones between, before and behind them.
    let mut blob = b"\x5f\x2a\x4d\x18\x05\0\0\0hello".to_vec();
    let mut at = 0;
    for size in [0, 1, 5000, 100_000, 33_000, 3, 0, 400_000].iter().cycle() {
        if at == tar.len() {
            break;
        }
        let end = tar.len().min(at + size);
        blob.extend(filter("zstd", &["-c"], &tar[at..end]));
        at = end;
        if size % 2 == 1 {
            blob.extend(b"\x50\x2a\x4d\x18\0\0\0\0");
        }
    }
    // A seek table as the seekable format has it: for us a skippable frame like any other.
    blob.extend(b"\x5e\x2a\x4d\x18\x11\0\0\0\x01\0\0\0\x01\0\0\0\x02\0\0\0\0\xb1\xea\x92\x8f");
    let spans = check("frames of all sizes", Coding::Zstd, &blob, &tar);
    assert!(spans.table.len() > 15);
    assert!(filter("zstd", &["-dc"], &blob) == tar);
}

#[test]
fn plain_layers_take_the_same_way() {
    let tar = &content()[..100_001];
    let (spans, same) = index(Coding::Plain, SPACING, tar, 1000).unwrap();
    assert_eq!(same, tar);
    assert_eq!(spans.table.len(), 4);
    let span = spans.table.span(3);
    assert_eq!(
        (span.tar, span.blob.clone()),
        (TarRange::new(TarOffset(98_304), 1697), 98_304..100_001)
    );
    for n in 0..4 {
        let span = spans.table.span(n);
        let from = usize::try_from(span.blob.start).unwrap();
        assert_eq!(
            decode(&spans, n, tar, span.tar.end(), 10),
            tar[from..usize::try_from(span.blob.end).unwrap()]
        );
    }
}
