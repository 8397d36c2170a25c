//! An index of everything in a layer, made by reading all of it once. In: a layer that was found. Out: the index, with whatever
//! digests and header bytes were asked for.

use super::{IndexOrigin, OpenError, OpenOptions, Prepared, Watch, open_index};
use crate::index::build::{Contents, Recorder};
use crate::source::{self, Source};

/// How a layer is recorded.
#[derive(Clone, Copy, Debug)]
pub struct Recording {
    /// What the index is to hold.
    pub contents: Contents,
}

/// Finds a layer and reads all of it into an index.
///
/// # Errors
/// [`OpenError`], in one line for the person.
pub fn record(
    text: &str,
    recording: &Recording,
    options: &OpenOptions,
    watch: &mut dyn Watch,
) -> Result<Prepared, OpenError> {
    let blob = source::open(&Source::parse(text)?, &options.patience)?;
    let bad_tar = |source| source::SourceError::Tar {
        source_name: blob.source.to_string(),
        source,
    };
    let mut recorder = Recorder::new(recording.contents);
    let mut sink = |bytes: &[u8]| {
        recorder.feed(bytes)?;
        watch.headers(recorder.position().0, blob.len);
        Ok(())
    };
    let reads = source::stream(&blob, &options.patience, &mut sink)?;
    let bytes = recorder.finish().map_err(bad_tar)?.into_plain_index();
    let index = open_index(bytes, &blob.source.to_string())?;
    Ok(Prepared {
        origin: IndexOrigin::Read { reads, bytes: blob.len },
        blob,
        index,
        cache: options.cache.clone(),
        kept: None,
    })
}
