//! Any bytes as a tar: no panic, no endless loop, the same entries however the bytes are cut, entries that keep their type's
//! promises and that an index gives back unchanged. Run with `RUSTC_BOOTSTRAP=1 cargo fuzz run parser`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tarblk::internals::index::{Collector, Entry, EntrySink, Index, IndexBuilder, IndexError, Parser};
use tarblk::internals::units::TarOffset;

/// The checksum is the first thing that random bytes get wrong; where a block looks meant as a header, it is put right.
fn with_checksums(data: &[u8]) -> Vec<u8> {
    let mut tar = data.to_vec();
    for block in tar.chunks_exact_mut(512) {
        if &block[257..262] == b"ustar" {
            block[148..156].fill(b' ');
            let sum: u32 = block.iter().map(|b| u32::from(*b)).sum();
            block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    tar
}

fn parse(tar: &[u8], piece: usize) -> (Vec<Entry>, Result<(), IndexError>) {
    let mut all = Collector::default();
    let mut parser = Parser::new();
    let mut at = 0;
    let outcome = tar.chunks(piece).try_for_each(|bytes| {
        let from = TarOffset(at);
        at += bytes.len() as u64;
        parser.feed(from, bytes, &mut all)
    });
    let outcome = outcome.and_then(|()| parser.finish(TarOffset(tar.len() as u64)).map(drop));
    (all.0, outcome)
}

fuzz_target!(|data: &[u8]| {
    let tar = with_checksums(data);
    let (entries, outcome) = parse(&tar, usize::MAX);
    let piece = 1 + usize::from(data.first().copied().unwrap_or(0)) * 7;
    let (pieces, same) = parse(&tar, piece);
    assert_eq!(entries, pieces);
    assert_eq!(outcome.map_err(|e| e.to_string()), same.map_err(|e| e.to_string()));

    let mut builder = IndexBuilder::new();
    for entry in &entries {
        builder.entry(entry).expect("a parser makes no entries that an index cannot hold");
    }
    let len = entries.last().map_or(0, |entry| entry.payload().end().0);
    let index = Index::open(builder.finish(len, tarblk::internals::index::EndOfArchive::Missing)).expect("our own index");
    let mut replayed = Collector::default();
    index.replay(&mut replayed).expect("our own index");
    assert_eq!(replayed.0, entries);
});
