//! Any bytes as a table of spans, as a blob, and as a table of contents: no panic, no endless loop, never more bytes
//! than the table or the limit says, and what decodes as a whole decodes the same from each of its spans. Run with
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run layer`.

#![no_main]

use std::collections::BTreeMap;

use libfuzzer_sys::fuzz_target;
use tarblk::internals::index::{EntrySink, IndexBuilder};
use tarblk::internals::index::toc::Place;
use tarblk::internals::layer::{Begins, Coding, Decoder, Indexer, LayerError, SpanTable, Spans};

const LIMIT: u64 = 4 << 20;

/// Whatever a table says, a decoder keeps to it.
fn table(data: &[u8]) {
    let Ok(table) = SpanTable::decode(data) else { return };
    let mut again = Vec::new();
    table.encode(&mut again);
    assert_eq!(again, data);
    for n in (0..table.len()).step_by(table.len() / 4 + 1) {
        let span = table.span(n);
        assert!(!span.tar.is_empty() && span.tar.end().0 <= table.tar_len() && span.blob.end <= table.blob_len());
        assert_eq!(table.span_at(span.tar.start), n);
        let window = vec![b'w'; span.window as usize];
        let started = Decoder::start(&table, n, &window);
        if table.has_blocks() && started.is_err() {
            continue;
        }
        let mut decoder = started.expect("the window is as long as the table says");
        let mut given = 0;
        for piece in data.chunks(100) {
            if decoder.feed(piece, &mut |bytes| given += bytes.len() as u64).is_err() {
                break;
            }
        }
        assert!(given <= table.tar_len() - span.tar.start.0);
        assert_eq!(decoder.position().0, span.tar.start.0 + given);
    }
}

fn index(coding: Coding, blob: &[u8], piece: usize) -> Result<(Spans, Vec<u8>), LayerError> {
    let mut indexer = Indexer::new(coding, 0).limit(LIMIT);
    let mut tar = Vec::new();
    for bytes in blob.chunks(piece) {
        indexer.feed(bytes, &mut |out| tar.extend_from_slice(out))?;
        assert!(tar.len() as u64 <= LIMIT);
    }
    Ok((indexer.finish()?, tar))
}

fn blob(data: &[u8]) {
    for coding in [Coding::Gzip, Coding::Zstd] {
        let outcome = index(coding, data, usize::MAX);
        let pieces = index(coding, data, 1 + usize::from(data.first().copied().unwrap_or(0)));
        assert_eq!(outcome.is_ok(), pieces.is_ok(), "{outcome:?} {pieces:?}");
        let (Ok((spans, tar)), Ok((same, tar_again))) = (outcome, pieces) else { continue };
        assert!(tar == tar_again && spans.table == same.table && spans.windows == same.windows);
        for n in 0..spans.table.len() {
            let span = spans.table.span(n);
            if span.begins == Begins::Within {
                continue;
            }
            let mut decoder = Decoder::start(&spans.table, n, &spans.windows[n]).expect("our own table");
            let mut out = Vec::new();
            let bytes = &data[span.blob.start as usize..span.blob.end as usize];
            decoder.until(span.tar.end()).feed(bytes, &mut |bytes| out.extend_from_slice(bytes)).expect("it decoded before");
            assert!(out == tar[span.tar.start.0 as usize..span.tar.end().0 as usize]);
            if (n..spans.table.len()).any(|n| spans.table.span(n).begins == Begins::Within) {
                continue;
            }
            decoder = Decoder::start_with(&spans.table, n, spans.windows[n..].to_vec()).expect("our own table");
            decoder.feed(&data[span.blob.start as usize..], &mut |_| {}).expect("it decoded before");
            assert_eq!(decoder.position().0, spans.table.tar_len());
        }
    }
}

/// A zstd frame with one block that is not compressed.
fn frame(content: &[u8]) -> Vec<u8> {
    let len = content.len() as u32;
    let mut out = b"\x28\xb5\x2f\xfd\xa0".to_vec();
    out.extend(len.to_le_bytes());
    out.extend(&(len << 3 | 1).to_le_bytes()[..3]);
    out.extend(content);
    out
}

/// Any text as the JSON of a zstd:chunked layer. Its entries are fit for an index.
fn contents(json: &[u8]) {
    let _ = Place::of_tail(json, 1 << 40);
    let json = &json[..json.len().min(100_000)];
    let stored = frame(json);
    let mut tail = b"\x50\x2a\x4d\x18\x40\0\0\0".to_vec();
    let blob_len = 1_u64 << 32;
    let at = blob_len - 1000 - stored.len() as u64;
    for number in [at, stored.len() as u64, json.len() as u64, 1, 0, 0, 0] {
        tail.extend(number.to_le_bytes());
    }
    tail.extend(b"GNUlInUx");
    let place = Place::of_tail(&tail, blob_len).expect("a footer");
    let Ok(contents) = place.open(&stored, blob_len, &BTreeMap::new()) else { return };
    let mut builder = IndexBuilder::new();
    let mut entries = 0;
    struct Counting<'a>(&'a mut IndexBuilder, &'a mut u64);
    impl EntrySink for Counting<'_> {
        fn entry(&mut self, entry: &tarblk::internals::index::Entry) -> Result<(), tarblk::internals::index::IndexError> {
            *self.1 += 1;
            self.0.entry(entry)
        }
    }
    contents.replay(&mut Counting(&mut builder, &mut entries)).expect("an index takes what a table of contents has");
    assert_eq!(entries, contents.entries());
    let mut at = 0;
    contents.digests(&mut |piece, _| {
        assert!(piece.start.0 >= at && piece.end().0 <= contents.table().tar_len());
        at = piece.end().0;
    });
    // Only a piece that is too long to be checked keeps it from being an index.
    if let Ok(index) = contents.into_index(IndexBuilder::new()) {
        let index = tarblk::internals::index::Index::open(index).expect("what was written is read");
        assert!(index.is_of_contents());
        index.verify().expect("it is what was written");
    }
}

fuzz_target!(|data: &[u8]| {
    table(data);
    blob(data);
    contents(data);
});
