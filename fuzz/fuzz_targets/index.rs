//! Any bytes as an index file: no panic, no memory without bound, and what can be read can be written again. Run with
//! `RUSTC_BOOTSTRAP=1 cargo fuzz run index`.

#![no_main]

use libfuzzer_sys::fuzz_target;
use tarblk::index::fuzzing::index_around;
use tarblk::index::{Entry, EntrySink, Index, IndexBuilder, IndexError, listing};

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

fuzz_target!(|data: &[u8]| {
    let _ = Index::open(data);
    // The checksums and the compression would keep all of it from the decoder: put them around it.
    let Ok(index) = Index::open(index_around(data)) else { return };
    let mut again = Again { builder: IndexBuilder::new(), left: 10_000 };
    let outcome = index.replay(&mut again);
    assert!(!matches!(outcome, Err(IndexError::Unencodable { .. })), "{outcome:?}");
    if outcome.is_ok() {
        for format in [listing::Format::Plain, listing::Format::Json, listing::Format::Mtree] {
            listing::write(&index, format, &mut std::io::sink()).expect("it was readable");
        }
    }
});
