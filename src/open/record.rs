//! An index of everything in a layer, made by reading all of its blob once. In: a layer that was found. Out: the index, with
//! whatever digests, entry points and header bytes were asked for.

use super::limit::SizeLimit;
use super::prepared::{PreparedLayer, named_if_foreign};
use super::{IndexOrigin, OpenError, OpenOptions, Reading, Watch, find_one, open_index, warn_without_ranges};
use crate::digest::{Algorithm, Digest};
use crate::fetch::IndexTrust;
use crate::http::HttpOptions;
use crate::index::build::{BlobRecorder, Contents};
use crate::index::{IndexBuilder, LayerIdentity};
use crate::layer::Coding;
use crate::source::{self, Blob};
use crate::units::TarOffset;

/// How much of the tar passes, in bytes, before it is told again how far in the blob that is.
const SIGN_OF_LIFE: usize = 16 << 20;

/// How a layer is recorded.
#[derive(Clone, Copy, Debug)]
pub struct Recording {
    /// What the index is to hold.
    pub contents: Contents,
    /// The distance of entry points into a compressed layer, in bytes of the tar; what its compression usually has if none is said.
    pub spacing: Option<u64>,
    /// How long the layer may be.
    pub size: SizeLimit,
}

/// A layer that was read whole.
#[derive(Debug)]
pub struct RecordedBlob {
    /// The index file.
    pub index: Vec<u8>,
    /// Which layer it is, by what passed.
    pub identity: LayerIdentity,
    /// How many reads or requests it took.
    pub reads: u64,
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
) -> Result<PreparedLayer, OpenError> {
    let found = find_one(text, options)?;
    let blob = &found.layer.blob;
    warn_without_ranges(blob);
    let reading = Reading::all_of(blob);
    let mut reached = |at| watch.reading(reading, at, blob.len);
    let recorded = record_blob(
        blob,
        recording,
        algorithms(found.layer.digest.as_ref(), found.layer.diff_id.as_ref()),
        &options.http,
        &mut reached,
        &mut |_, _| (),
    )
    .map_err(|error| named_if_foreign(error, &blob.name, found.foreign.as_deref()))?;
    let index = open_index(recorded.index, &blob.name)?;
    let origin = IndexOrigin::Read {
        reads: recorded.reads,
        bytes: blob.len,
    };
    let layer = PreparedLayer::new(&found, index, origin, IndexTrust::Made, None)?;
    options.size.check(&layer)?;
    Ok(layer)
}

/// The algorithms of digests that a blob and its tar have to have.
pub(super) fn algorithms(digest: Option<&Digest>, diff_id: Option<&Digest>) -> [Algorithm; 2] {
    [digest, diff_id].map(|digest| digest.map_or(Algorithm::Sha256, Digest::algorithm))
}

/// Reads all of a layer's blob into an index file, whose digests of blob and tar are made by these algorithms. How the blob is
/// compressed its first bytes say. Tells `reached` how far in the blob it is, and hands the tar's bytes to `tap` as they pass.
///
/// # Errors
/// [`OpenError::Source`], [`OpenError::Tar`]: what is wrong with the server, the compression or the tar.
pub fn record_blob(
    blob: &Blob,
    recording: &Recording,
    [of_blob, of_tar]: [Algorithm; 2],
    http: &HttpOptions,
    reached: &mut dyn FnMut(u64),
    tap: &mut dyn FnMut(TarOffset, &[u8]),
) -> Result<RecordedBlob, OpenError> {
    recording.size.check_blob(blob, blob.is_remote())?;
    let bad_tar = |error| SizeLimit::explain(blob, error);
    let recorder_of = |first: &[u8]| {
        let coding = Coding::of_bytes(first);
        let spacing = recording.spacing.unwrap_or(coding.spacing());
        let recorder = BlobRecorder::new(coding, spacing, recording.contents);
        let most = recording.size.of_decoded(coding, blob.len);
        recorder.limit(most).algorithms(of_blob, of_tar)
    };
    // The bytes that came before there were enough of them to tell the coding.
    let mut first = Vec::new();
    let mut recorder = None;
    let mut sink = |bytes: &[u8]| {
        let recorder = if let Some(recorder) = &mut recorder {
            recorder
        } else {
            first.extend_from_slice(bytes);
            if first.len() < Coding::TELLING {
                return Ok(());
            }
            recorder.insert(recorder_of(&first))
        };
        let bytes = if first.is_empty() { bytes } else { &first };
        let (at, mut unsaid) = (recorder.blob_position(), 0);
        // A piece of the blob may become so much that whoever waits wants to see a sign of life.
        let mut tap = |position, tar: &[u8]| {
            tap(position, tar);
            unsaid += tar.len();
            if unsaid >= SIGN_OF_LIFE {
                unsaid = 0;
                reached(at);
            }
        };
        let fed = recorder.feed_into(bytes, &mut None::<IndexBuilder>, &mut tap);
        fed.map_err(bad_tar)?;
        first.clear();
        reached(recorder.blob_position());
        Ok(())
    };
    let reads = source::stream::<OpenError>(blob, http, &mut sink)?;
    let recorder = if let Some(recorder) = recorder {
        recorder
    } else {
        let mut recorder = recorder_of(&first);
        recorder
            .feed_into(&first, &mut None::<IndexBuilder>, tap)
            .map_err(bad_tar)?;
        recorder
    };
    let whole = recorder.finish().map_err(bad_tar)?;
    Ok(RecordedBlob {
        identity: whole.identity(),
        index: whole.into_index(),
        reads,
    })
}

/// How a layer's blob is compressed, by its first bytes.
///
/// # Errors
/// [`OpenError::Source`] when they cannot be read.
pub(super) fn coding_of(blob: &Blob, http: &HttpOptions) -> Result<Coding, OpenError> {
    let start = source::first_bytes(blob, Coding::TELLING, http)?;
    Ok(Coding::of_bytes(&start))
}
