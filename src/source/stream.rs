//! A layer's blob from beginning to end, wherever it is. In: a blob that was found. Out: its bytes, in order, each once.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt as _;

use super::http::{HttpBlob, Patience, Requests, Tries};
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
    let name = blob.source.to_string();
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

/// The same sink with the room's own errors.
type Named<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), SourceError>;

fn stream_file(file: &File, blob: &LayerBlob, sink: Named<'_>) -> Result<u64, SourceError> {
    let bad = |source| SourceError::Tar {
        source_name: blob.source.to_string(),
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
            requests.range(blob, reached, blob.len - reached).await
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
