//! Any bytes as an index file: no panic, no memory without bound, and what can be read can be written again. Run with
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run index`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tarblk::internals::index::fuzzing::{index_around, index_of_sections};
use tarblk::internals::index::{
    ColdPart, Entry, EntrySink, Index, IndexBuilder, IndexError, first_difference, hot_len, listing, rebuild_tar,
};

/// Writes what it takes, and stops a short file that unpacks to millions of entries.
struct Again {
    builder: IndexBuilder,
    left: u32,
}

impl EntrySink for Again {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        self.left = self.left.checked_sub(1).ok_or_else(|| IndexError::sink(std::fmt::Error))?;
        self.builder.entry(entry)
    }
}

/// Reads an index in every way there is.
fn use_all_of(bytes: &[u8]) {
    let hot = hot_len(bytes).ok().flatten().and_then(|len| usize::try_from(len).ok());
    let hot = hot.and_then(|len| bytes.get(..len)).map(Index::open_hot);
    let Ok(index) = Index::open(bytes) else { return };
    let hot = hot.expect("a whole index has a hot part").expect("the hot part of a good index is good");
    assert_eq!(hot.hot_digest(), index.hot_digest());
    let mut again = Again { builder: IndexBuilder::new(), left: 10_000 };
    let outcome = index.replay(&mut again);
    assert!(!matches!(outcome, Err(IndexError::Unencodable { .. })), "{outcome:?}");
    for part in [ColdPart::Windows, ColdPart::PayloadDigests, ColdPart::Headers] {
        for number in 0..index.cold().pieces(part) {
            let piece = index.cold_piece(part, number);
            assert!(piece.is_err() || piece.unwrap().expect("it is counted").len() <= 1 << 20);
        }
    }
    if let Some(digests) = index.chunk_digests() {
        assert!(!digests.check(digests.len(), b""));
        assert_eq!(digests.len(), index.tar_len().div_ceil(32 << 10));
    }
    if let Some(pieces) = index.piece_digests() {
        let all = pieces.widened(tarblk::internals::units::TarRange::new(tarblk::internals::units::TarOffset(0), index.tar_len()));
        assert_eq!((all.start.0, all.len), (0, index.tar_len()));
        assert_eq!(pieces.overlapping(all), 0..pieces.len());
        assert!(index.is_of_contents() && !index.spans().expect("it has spans").is_whole_tar());
    }
    if outcome.is_ok() {
        for format in [listing::Format::Plain, listing::Format::Json, listing::Format::Mtree] {
            listing::write(&index, format, &mut std::io::sink()).expect("it was readable");
        }
        // The hot part says nothing else; what it cannot say is an error.
        assert_eq!(first_difference(&index, &hot).ok().flatten(), None);
        if index.tar_len() < 1 << 24 {
            let mut tar = Vec::new();
            if rebuild_tar(&index, &mut |_, _| Ok(()), &mut tar).is_ok() {
                assert_eq!(u64::try_from(tar.len()), Ok(index.tar_len()));
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    use_all_of(data);
    // The checksums and the compression would keep all of it from the decoders: put them around it.
    use_all_of(&index_around(data));
    use_all_of(&index_of_sections(data));
});
