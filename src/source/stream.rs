//! A layer's blob from beginning to end, wherever it is. In: a blob that was found. Out: its bytes, in order, each once.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt as _;

use super::http::{Body, Failure, HttpBlob, Patience, Requests, Tries};
use super::{LayerBlob, Place, SourceError, remote};
use crate::index::IndexError;
use crate::units::TarOffset;

/// How much of a file is read at once, in bytes.
const STRIDE: usize = 256 << 10;

/// Takes a blob's next bytes.
pub type BlobSink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), IndexError>;

/// Hands all of the blob's bytes to `sink`, in order, and returns how many reads or requests that took. Must not be called from within an asynchronous runtime.
///
/// # Errors
/// [`SourceError`]: what is wrong with the file or the server; what `sink` returns, as a fault of the layer.
pub fn stream(blob: &LayerBlob, patience: &Patience, sink: BlobSink<'_>) -> Result<u64, SourceError> {
    let name = blob.name();
    let mut sink = |bytes: &[u8]| {
        sink(bytes).map_err(|source| SourceError::Tar {
            source_name: name.clone(),
            source,
        })
    };
    match &blob.place {
        Place::File(file) => stream_file(file, blob, &mut sink),
        Place::Http(http) => remote::runtime()?.block_on(stream_http(http, patience, &mut sink)),
    }
}

/// The blob's first `len` bytes, or all of a shorter one. Must not be called from within an asynchronous runtime.
///
/// # Errors
/// [`SourceError`]: what is wrong with the file or the server.
pub fn first_bytes(blob: &LayerBlob, len: usize, patience: &Patience) -> Result<Vec<u8>, SourceError> {
    let len = u64::try_from(len).unwrap_or(u64::MAX).min(blob.len);
    read_range(blob, 0..len, patience)
}

/// Some bytes of the blob, by one request; a caller bounds how many. Must not be called from within an asynchronous runtime.
///
/// # Errors
/// [`SourceError`]: what is wrong with the file or the server; that the blob has not so many bytes.
pub fn read_range(blob: &LayerBlob, range: Range<u64>, patience: &Patience) -> Result<Vec<u8>, SourceError> {
    let want = range.end.saturating_sub(range.start);
    if want == 0 {
        return Ok(Vec::new());
    }
    match &blob.place {
        Place::File(file) => {
            let mut bytes = Vec::new();
            let mut reader = Offset { file, at: range.start }.take(want);
            let read = reader.read_to_end(&mut bytes).and_then(|got| {
                let whole = u64::try_from(got) == Ok(want);
                whole.then_some(()).ok_or_else(|| ErrorKind::UnexpectedEof.into())
            });
            read.map(|()| bytes).map_err(|source| SourceError::Tar {
                source_name: blob.name(),
                source: IndexError::Read {
                    at: TarOffset(range.start),
                    source,
                },
            })
        }
        Place::Http(http) => remote::runtime()?.block_on(range_of_http(http, range, patience)),
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

async fn range_of_http(blob: &HttpBlob, range: Range<u64>, patience: &Patience) -> Result<Vec<u8>, SourceError> {
    let requests = Requests::new(&blob.url, *patience)?;
    let mut tries = Tries::default();
    let mut got = Vec::new();
    loop {
        let reached = range.start.saturating_add(u64::try_from(got.len()).unwrap_or(u64::MAX));
        if reached >= range.end {
            return Ok(got);
        }
        let answer = if blob.ranges {
            requests.range_or_whole(blob, reached, range.end - reached).await
        } else {
            requests.whole(blob).await
        };
        let failure = match answer {
            Ok(mut body) => collect(&mut body, &range, &mut got, &mut tries).await,
            Err(failure) => Some(failure),
        };
        match failure {
            Some(failure) => tries.failed(failure, &requests.patience).await?,
            None if u64::try_from(got.len()) == Ok(range.end - range.start) => return Ok(got),
            None => {
                return Err(SourceError::WrongAnswer {
                    url: blob.name(),
                    why: "fewer bytes than it has".to_owned(),
                });
            }
        }
    }
}

/// Takes what of an answer is wanted and not there yet.
async fn collect(body: &mut Body, range: &Range<u64>, got: &mut Vec<u8>, tries: &mut Tries) -> Option<Failure> {
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
                    tries.succeeded();
                }
            }
            Err(failure) => return Some(failure),
        }
    }
}

/// The same sink with the room's own errors.
type Named<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), SourceError>;

fn stream_file(file: &File, blob: &LayerBlob, sink: Named<'_>) -> Result<u64, SourceError> {
    let bad = |source| SourceError::Tar {
        source_name: blob.name(),
        source,
    };
    let mut buffer = vec![0; STRIDE];
    let (mut at, mut reads) = (0, 0);
    while at < blob.len {
        let want = usize::try_from(blob.len - at).unwrap_or(usize::MAX).min(STRIDE);
        let got = match file.read_at(&mut buffer[..want], at) {
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            outcome => outcome.map_err(|source| {
                bad(IndexError::Read {
                    at: TarOffset(at),
                    source,
                })
            })?,
        };
        if got == 0 {
            // Somebody cut the file while it was read.
            return Err(bad(IndexError::Truncated {
                len: TarOffset(at),
                needs: TarOffset(blob.len),
                what: "the file",
                path: None,
            }));
        }
        reads += 1;
        sink(&buffer[..got])?;
        at = at.saturating_add(u64::try_from(got).unwrap_or(u64::MAX));
    }
    Ok(reads)
}

/// One long request, asked again from where it broke off; from the beginning of a server that answers no ranges.
async fn stream_http(blob: &HttpBlob, patience: &Patience, sink: Named<'_>) -> Result<u64, SourceError> {
    let requests = Requests::new(&blob.url, *patience)?;
    let mut tries = Tries::default();
    let (mut reached, mut asked) = (0, 0);
    while reached < blob.len {
        asked += 1;
        let answer = if blob.ranges {
            requests.range_or_whole(blob, reached, blob.len - reached).await
        } else {
            requests.whole(blob).await
        };
        let failed = match answer {
            Ok(mut body) => loop {
                match body.next().await {
                    Ok(None) => break None,
                    Ok(Some((at, bytes))) => {
                        // A server without ranges began anew: what came before is passed over.
                        let known = usize::try_from(reached.saturating_sub(at)).unwrap_or(usize::MAX);
                        if let Some(fresh) = bytes.get(known..).filter(|fresh| !fresh.is_empty()) {
                            sink(fresh)?;
                            reached = body.at;
                            tries.succeeded();
                        }
                    }
                    Err(failure) => break Some(failure),
                }
            },
            Err(failure) => Some(failure),
        };
        if let Some(failure) = failed {
            tries.failed(failure, &requests.patience).await?;
        }
    }
    Ok(asked)
}
