//! An index with everything in it gives back the exact tar, knows every chunk and every file by digest, and is the same
//! whoever makes it: on every tar of the corpus, on Go's test archives, and on tars with odd paddings and ends.

mod common;

use std::fs;
use std::ops::Range;

use common::noise::noise;
use common::rawtar::{Header, RawTar};
use common::{corpus, no_loop_mounts, scratch, skip};
use sha2::{Digest, Sha256};
use tarblk::internals::index::build::{Contents, Recorder};
use tarblk::internals::index::{ColdPart, Collector, Entry, Index, IndexError, Parser, RebuildError, rebuild_tar};
use tarblk::internals::units::TarOffset;

fn long(len: usize) -> u64 {
    u64::try_from(len).unwrap()
}

fn place(range: tarblk::internals::units::TarRange) -> Range<usize> {
    usize::try_from(range.start.0).unwrap()..usize::try_from(range.end().0).unwrap()
}

/// The index of a tar that comes in pieces of these lengths, again and again.
fn record(tar: &[u8], contents: Contents, pieces: &[usize]) -> Result<Vec<u8>, IndexError> {
    let mut recorder = Recorder::new(contents);
    let (mut rest, mut lens) = (tar, pieces.iter().cycle());
    while !rest.is_empty() {
        let (piece, behind) = rest.split_at((*lens.next().unwrap()).min(rest.len()));
        recorder.feed(piece)?;
        rest = behind;
    }
    Ok(recorder.finish()?.into_plain_index())
}

fn entries(tar: &[u8]) -> Result<Vec<Entry>, IndexError> {
    let (mut all, mut parser) = (Collector::default(), Parser::new());
    parser.feed(TarOffset(0), tar, &mut all)?;
    parser.finish(TarOffset(long(tar.len())))?;
    Ok(all.0)
}

/// Everything but stored bytes of files made unrecognisable.
fn payload_only(tar: &[u8], entries: &[Entry]) -> Vec<u8> {
    let mut only = vec![0xee; tar.len()];
    for entry in entries {
        only[place(entry.payload())].copy_from_slice(&tar[place(entry.payload())]);
    }
    only
}

fn rebuild(index: &Index<Vec<u8>>, payload: &[u8]) -> Result<Vec<u8>, RebuildError> {
    let mut out = Vec::new();
    let mut read = |at: TarOffset, buffer: &mut [u8]| {
        let at = usize::try_from(at.0).unwrap();
        buffer.copy_from_slice(&payload[at..at + buffer.len()]);
        Ok(())
    };
    rebuild_tar(index, &mut read, &mut out)?;
    Ok(out)
}

/// All that an index of `tar` promises.
fn check(name: &str, tar: &[u8]) {
    let entries = entries(tar).unwrap();
    let bytes = record(tar, Contents::FULL, &[256 << 10]).unwrap();
    for pieces in [&[1 << 30][..], &[1, 511, 700, 40_000], &[32 << 10]] {
        assert!(
            bytes == record(tar, Contents::FULL, pieces).unwrap(),
            "{name}: in pieces of {pieces:?}"
        );
    }
    let index = Index::open(bytes).unwrap();
    index.verify().unwrap();
    let mut all = Collector::default();
    index.replay(&mut all).unwrap();
    assert!(all.0 == entries, "{name}: entries");

    let digests = index.chunk_digests().unwrap();
    assert_eq!(digests.len(), long(tar.len().div_ceil(32 << 10)), "{name}");
    for (number, chunk) in (0..).zip(tar.chunks(32 << 10)) {
        assert!(digests.check(number, chunk), "{name}: chunk {number}");
    }
    let whole = tarblk::internals::digest::Digest::of(tarblk::internals::digest::Algorithm::Sha256, tar);
    assert_eq!(index.identity().diff_id.as_ref(), Some(&whole), "{name}");
    assert_eq!(
        (index.identity().blob_digest.as_ref(), index.identity().blob_len),
        (Some(&whole), long(tar.len()))
    );

    let pieces = index.cold().pieces(ColdPart::PayloadDigests);
    let payload: Vec<u8> = (0..pieces)
        .flat_map(|number| index.cold_piece(ColdPart::PayloadDigests, number).unwrap().unwrap())
        .collect();
    let expected: Vec<u8> = entries
        .iter()
        .filter(|entry| entry.stored_bytes() > 0)
        .flat_map(|entry| Sha256::digest(&tar[place(entry.payload())]).to_vec())
        .collect();
    assert!(payload == expected, "{name}: payload digests");

    let only = payload_only(tar, &entries);
    let rebuilt = rebuild(&index, &only).unwrap();
    let first = rebuilt.iter().zip(tar).position(|(a, b)| a != b);
    assert!(
        rebuilt == tar,
        "{name}: rebuilt {} of {} bytes, the first other one at {first:?}",
        rebuilt.len(),
        tar.len()
    );

    // A byte of payload that is another one is never let through.
    if let Some(entry) = entries.iter().find(|entry| entry.stored_bytes() > 0) {
        let mut wrong = only;
        wrong[place(entry.payload()).start] ^= 1;
        assert!(
            matches!(rebuild(&index, &wrong), Err(RebuildError::Mismatch { .. })),
            "{name}"
        );
    }
}

#[test]
fn tars_made_by_hand_come_back() {
    let work = scratch("exact-");
    for archive in corpus::by_hand(work.path()) {
        check(&archive.name, &fs::read(&archive.path).unwrap());
    }
}

#[test]
fn tars_of_every_program_come_back() {
    const NAME: &str = "tars_of_every_program_come_back";
    if let Some(why) = no_loop_mounts() {
        return skip(NAME, why);
    }
    let work = scratch("exact-programs-");
    for archive in corpus::planted(work.path()) {
        check(&archive.name, &fs::read(&archive.path).unwrap());
    }
}

#[test]
fn archives_of_go_come_back() {
    let all = corpus::of_go();
    if all.is_empty() {
        return skip("archives_of_go_come_back", "Debian's golang-src is not installed");
    }
    let mut checked = 0;
    for (name, path) in all {
        let tar = fs::read(path).unwrap();
        if entries(&tar).is_ok() {
            check(&name.to_string_lossy(), &tar);
            checked += 1;
        }
    }
    assert!(checked > 15, "only {checked}");
}

#[test]
fn odd_paddings_and_ends_come_back() {
    let plain = RawTar::new()
        .pax(b'g', &[("comment", b"of all"), ("mtime", b"12.5")])
        .file(b"one", &noise(700, 1))
        .pax(b'x', &[("path", b"two"), ("SCHILY.xattr.user.a", b"b")])
        .file(b"short", &noise(40_000, 2))
        .entry(Header::gnu(b'V', b"a label"), b"")
        .dir(b"dir/")
        .link(b'1', b"three", b"one")
        .file(b"empty", b"")
        .file(b"last", &noise(513, 3));
    let body = plain.0.clone();
    let ended = plain.end().0;
    let with = |tail: &[u8]| [&ended[..], tail].concat();
    check("as usual", &ended);
    check("no end", &body);
    check("half an end", &[&body[..], &[0; 512]].concat());
    check("padded to a record", &with(&[0; 10_240]));
    check("something behind the end", &with(&noise(3_000_001, 9)));
    check("another tar behind the end", &[&ended[..], &ended[..]].concat());
    // The last file's padding is missing, or part of it.
    let payload_end = body.len() - (1024 - 513);
    check("no last padding", &body[..payload_end]);
    check("a part of the last padding", &body[..payload_end + 100]);
    // Padding that is not zeros: behind a file, behind an extension header, behind the last file.
    let mut junk = ended.clone();
    let start = |name: &[u8]| {
        let entry = entries(&ended)
            .unwrap()
            .into_iter()
            .find(|entry| entry.path == name)
            .unwrap();
        place(entry.payload())
    };
    for end in [start(b"one").end, start(b"two").end, start(b"last").end] {
        let padding = end..end.next_multiple_of(512);
        let len = padding.len();
        junk[padding].copy_from_slice(&noise(len, long(end)));
    }
    assert_ne!(junk, ended);
    check("padding that is not zeros", &junk);
    check("nothing", &[0; 1024]);
    check("no bytes at all", &[]);
}

#[test]
fn without_header_bytes_there_is_no_tar() {
    let tar = RawTar::new().file(b"one", b"content").end().0;
    let index = Index::open(record(&tar, Contents::CHECKED, &[1000]).unwrap()).unwrap();
    assert!(matches!(rebuild(&index, &tar), Err(RebuildError::NoHeaders)));
    // The hot part alone knows that there are header bytes, but has none.
    let whole = record(&tar, Contents::FULL, &[1000]).unwrap();
    let hot = tarblk::internals::index::hot_len(&whole).unwrap().unwrap();
    let hot = Index::open_hot(whole[..usize::try_from(hot).unwrap()].to_vec()).unwrap();
    assert!(matches!(rebuild(&hot, &tar), Err(RebuildError::Index(_))));
}
