//! Whether an index that was handed to us says what the layer's headers say. In: a layer at hand, an index that was named. Out:
//! nothing, or where the two differ.
//!
//! An index has the digests of the layer's bytes, and its entries beside them: a forged index can give a file another
//! mode or owner and leave all bytes as they are. Where the layer is a plain tar in a file its headers are read in milliseconds,
//! so an index is not taken at its word there. Elsewhere reading the headers is what the index is to save; there the fetcher compares
//! the two once all of the layer has come (`fetch/unproven`).

use super::OpenError;
use crate::http::HttpOptions;
use crate::index::{Entries, Entry, EntrySink, Index, IndexError, says_the_same};
use crate::layer::Coding;
use crate::source::{Blob, Place};
use crate::walk::{WalkError, walk};

/// Compares an index with the headers of its layer, if that is a plain tar in a file. `name` is the index's.
///
/// # Errors
/// [`OpenError::Index`] where they differ; that the headers cannot be read.
pub(super) fn check_headers(
    index: &Index<Vec<u8>>,
    name: &str,
    blob: &Blob,
    http: &HttpOptions,
) -> Result<(), OpenError> {
    if index.identity().coding != Coding::Plain || !matches!(blob.place, Place::File(_)) {
        return Ok(());
    }
    let bad = |cause| OpenError::Index {
        name: name.to_owned(),
        cause,
    };
    let mut comparison = Comparison {
        entries: index.entries().map_err(bad)?,
        differs: false,
    };
    let walked = walk(blob, &mut comparison, None, http, &mut |_, _| ());
    match walked {
        Err(WalkError::Tar { source, .. }) if comparison.differs => Err(bad(source)),
        Err(error) => Err(error.into()),
        Ok(_) => match comparison.entries.next_entry().map_err(bad)? {
            Some(more) => Err(bad(other(Some(more), None))),
            None => Ok(()),
        },
    }
}

/// Takes the entries of a layer and compares them with those of an index.
struct Comparison<'i> {
    entries: Entries<'i>,
    differs: bool,
}

impl EntrySink for Comparison<'_> {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        let said = self.entries.next_entry()?;
        if said.is_some_and(|said| says_the_same(said, entry, false)) {
            return Ok(());
        }
        self.differs = true;
        Err(other(said, Some(entry)))
    }
}

fn other(said: Option<&Entry>, found: Option<&Entry>) -> IndexError {
    let shown = |entry: Option<&Entry>| match entry {
        Some(entry) => {
            let path: String = String::from_utf8_lossy(&entry.path).chars().take(200).collect();
            format!("{path:?} (mode {:o}, owner {}/{})", entry.mode, entry.uid, entry.gid)
        }
        None => "none".to_owned(),
    };
    IndexError::OtherLayer {
        what: "entry",
        found: shown(said),
        wanted: shown(found),
    }
}
