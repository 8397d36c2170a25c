//! A layer's blob from beginning to end, wherever it is. In: a blob that was found. Out: its bytes, in order, each once.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use super::blob::{Blob, BlobSink, Place};
use super::error::{SourceError, wait_after};
use super::lanes;
use super::request::Requests;
use crate::http::{Backoff, Body, HttpOptions, runtime};

/// How much of a file is read at once, in bytes.
const STRIDE: usize = 256 << 10;

/// Hands all of the blob's bytes to `sink`, in order, and returns how many reads or requests that took. Must not be called from
/// within an asynchronous runtime.
///
/// # Errors
/// [`SourceError`]: what is wrong with the file or the server; what `sink` returns.
pub fn stream<E: From<SourceError>>(blob: &Blob, options: &HttpOptions, sink: BlobSink<'_, E>) -> Result<u64, E> {
    stream_from(blob, 0, options, sink)
}

/// The same from byte `from` of the blob on.
///
/// # Errors
/// As of [`stream`].
pub fn stream_from<E: From<SourceError>>(
    blob: &Blob,
    from: u64,
    options: &HttpOptions,
    sink: BlobSink<'_, E>,
) -> Result<u64, E> {
    match &blob.place {
        Place::File(file) => stream_file(&file.open()?, blob, from, sink),
        Place::Url(_) | Place::Registry(_) => {
            let runtime = runtime::runtime().map_err(SourceError::from)?;
            runtime.block_on(stream_http(blob, from, options, sink))
        }
    }
}

/// The blob's first `len` bytes, or all of a shorter one. Must not be called from within an asynchronous runtime.
///
/// # Errors
/// [`SourceError`]: what is wrong with the file or the server.
pub fn first_bytes(blob: &Blob, len: usize, options: &HttpOptions) -> Result<Vec<u8>, SourceError> {
    let len = u64::try_from(len).unwrap_or(u64::MAX).min(blob.len);
    read_range(blob, 0..len, options)
}

/// Some bytes of the blob, by one request; a caller bounds how many. Must not be called from within an asynchronous runtime.
///
/// # Errors
/// [`SourceError`]: what is wrong with the file or the server; that the blob has not so many bytes.
pub fn read_range(blob: &Blob, range: Range<u64>, options: &HttpOptions) -> Result<Vec<u8>, SourceError> {
    let want = range.end.saturating_sub(range.start);
    if want == 0 {
        return Ok(Vec::new());
    }
    match &blob.place {
        Place::File(file) => {
            let mut bytes = Vec::new();
            let file = &file.open()?;
            let mut reader = Offset { file, at: range.start }.take(want);
            let read = reader.read_to_end(&mut bytes).and_then(|got| {
                let whole = u64::try_from(got) == Ok(want);
                whole.then_some(()).ok_or_else(|| ErrorKind::UnexpectedEof.into())
            });
            read.map(|()| bytes).map_err(|source| SourceError::Read {
                name: blob.name.clone(),
                at: range.start,
                source,
            })
        }
        Place::Url(_) | Place::Registry(_) => runtime::runtime()?.block_on(range_of_http(blob, range, options)),
    }
}

/// A file from a position on.
struct Offset<'a> {
    file: &'a File,
    at: u64,
}

impl Read for Offset<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let got = self.file.read_at(buffer, self.at)?;
        self.at = self.at.saturating_add(u64::try_from(got).unwrap_or(u64::MAX));
        Ok(got)
    }
}

async fn range_of_http(blob: &Blob, range: Range<u64>, options: &HttpOptions) -> Result<Vec<u8>, SourceError> {
    let requests = Requests::of(blob, options)?;
    let mut backoff = requests.backoff();
    let mut got = Vec::new();
    loop {
        let reached = range.start.saturating_add(u64::try_from(got.len()).unwrap_or(u64::MAX));
        if reached >= range.end {
            return Ok(got);
        }
        let answer = if blob.answers_ranges() {
            requests.range(blob, reached, range.end - reached).await
        } else {
            requests.whole(blob).await
        };
        let failure = match answer {
            Ok(mut body) => collect(&mut body, &range, &mut got, &mut backoff).await,
            Err(failure) => Some(failure),
        };
        // Without a failure all of it has come, or as much as the server gives at once.
        if let Some(failure) = failure {
            wait_after(&mut backoff, failure).await?;
        }
    }
}

/// Takes what of an answer is wanted and not there yet.
async fn collect(body: &mut Body, range: &Range<u64>, got: &mut Vec<u8>, backoff: &mut Backoff) -> Option<SourceError> {
    loop {
        let next = range.start.saturating_add(u64::try_from(got.len()).unwrap_or(u64::MAX));
        if next >= range.end {
            return None;
        }
        match body.next().await {
            Ok(None) => return None,
            Ok(Some((at, bytes))) => {
                // A server without ranges began at the beginning.
                let known = usize::try_from(next.saturating_sub(at)).unwrap_or(usize::MAX);
                let room = usize::try_from(range.end - next).unwrap_or(usize::MAX);
                if let Some(fresh) = bytes.get(known..).filter(|fresh| !fresh.is_empty()) {
                    got.extend_from_slice(&fresh[..fresh.len().min(room)]);
                    backoff.came(fresh.len());
                }
            }
            Err(failure) => return Some(failure.into()),
        }
    }
}

fn stream_file<E: From<SourceError>>(file: &File, blob: &Blob, from: u64, sink: BlobSink<'_, E>) -> Result<u64, E> {
    let mut buffer = vec![0; STRIDE];
    let (mut at, mut reads) = (from, 0);
    while at < blob.len {
        let want = usize::try_from(blob.len - at).unwrap_or(usize::MAX).min(STRIDE);
        let got = match file.read_at(&mut buffer[..want], at) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            outcome => outcome.map_err(|source| SourceError::Read {
                name: blob.name.clone(),
                at,
                source,
            })?,
        };
        if got == 0 {
            // The file was cut while it was read.
            let shortened = SourceError::Shortened {
                name: blob.name.clone(),
                len: at,
                expected: blob.len,
            };
            return Err(shortened.into());
        }
        reads += 1;
        sink(&buffer[..got])?;
        at = at.saturating_add(u64::try_from(got).unwrap_or(u64::MAX));
    }
    Ok(reads)
}

/// Pieces, by as many connections as bring more; one long answer of a server that has no ranges, passed over again when it broke off.
async fn stream_http<E: From<SourceError>>(
    blob: &Blob,
    from: u64,
    options: &HttpOptions,
    sink: BlobSink<'_, E>,
) -> Result<u64, E> {
    let requests = Requests::of(blob, options)?;
    if blob.answers_ranges() {
        return lanes::stream(&requests, blob, from, sink).await;
    }
    let mut backoff = requests.backoff();
    let (mut reached, mut asked) = (from, 0);
    while reached < blob.len {
        asked += 1;
        let failed = match requests.whole(blob).await {
            Ok(mut body) => loop {
                match body.next().await {
                    Ok(None) => break None,
                    Ok(Some((at, bytes))) => {
                        // What came before is passed over.
                        let known = usize::try_from(reached.saturating_sub(at)).unwrap_or(usize::MAX);
                        if let Some(fresh) = bytes.get(known..).filter(|fresh| !fresh.is_empty()) {
                            sink(fresh)?;
                            reached = body.at();
                            backoff.came(fresh.len());
                        }
                    }
                    Err(failure) => break Some(SourceError::from(failure)),
                }
            },
            Err(failure) => Some(failure),
        };
        if let Some(failure) = failed {
            wait_after(&mut backoff, failure).await?;
        }
    }
    Ok(asked)
}
