//! An index of everything in a layer, made by reading all of its blob once. In: a layer that was found. Out: the index, with
//! whatever digests, entry points and header bytes were asked for.

use super::{IndexOrigin, OpenError, OpenOptions, Prepared, Watch, open_index};
use crate::index::build::{BlobRecorder, Contents};
use crate::layer::Coding;
use crate::source::{self, LayerBlob, Patience, Source, SourceError};

/// How a layer is recorded.
#[derive(Clone, Copy, Debug)]
pub struct Recording {
    /// What the index is to hold.
    pub contents: Contents,
    /// The distance of entry points into a gzip layer, in bytes of the tar.
    pub spacing: u64,
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
    let (bytes, reads) = record_blob(&blob, recording, &options.patience, watch)?;
    let index = open_index(bytes, &blob.source.to_string())?;
    Ok(Prepared {
        origin: IndexOrigin::Read { reads, bytes: blob.len },
        blob,
        index,
        cache: options.cache.clone(),
        kept: None,
    })
}

/// Reads all of a layer's blob into an index file, and returns how many reads or requests that took.
///
/// # Errors
/// [`OpenError::Source`]: what is wrong with the server, the compression or the tar.
pub fn record_blob(
    blob: &LayerBlob,
    recording: &Recording,
    patience: &Patience,
    watch: &mut dyn Watch,
) -> Result<(Vec<u8>, u64), OpenError> {
    let bad_tar = |source| SourceError::Tar {
        source_name: blob.source.to_string(),
        source,
    };
    let coding = coding_of(blob, patience)?;
    let mut recorder = BlobRecorder::new(coding, recording.spacing, recording.contents);
    let mut sink = |bytes: &[u8]| {
        recorder.feed(bytes)?;
        watch.headers(recorder.blob_position(), blob.len);
        Ok(())
    };
    let reads = source::stream(blob, patience, &mut sink)?;
    let whole = recorder.finish().map_err(bad_tar)?;
    Ok((whole.into_index(), reads))
}

/// How a layer's blob is compressed, by its first bytes.
///
/// # Errors
/// [`OpenError::Source`] when they cannot be read.
pub fn coding_of(blob: &LayerBlob, patience: &Patience) -> Result<Coding, OpenError> {
    let start = source::first_bytes(blob, Coding::TELLING, patience)?;
    Ok(Coding::of_bytes(&start))
}
