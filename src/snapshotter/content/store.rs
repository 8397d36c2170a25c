//! containerd's content store, by its services. In: digests, bytes in order. Out: content that containerd has compared with its digest.

use std::collections::BTreeMap;
use std::thread;
use std::time::{Duration, Instant};

use super::DISTRIBUTION_SOURCE;
use super::messages::{
    AbortRequest, CONTENT, ContentInfo, GetImageRequest, GetImageResponse, IMAGES, InfoRequest, InfoResponse,
    ReadRequest, ReadResponse, Target, UpdateRequest, WriteAction, WriteRequest, WriteResponse,
};
use crate::digest::Digest;
use crate::snapshotter::grpc::client::{ALREADY_EXISTS, CallError, Connection, Conversation, NOT_FOUND, UNAVAILABLE};
use crate::snapshotter::messages::{Empty, FieldMask};
use crate::source::registry::{Descriptor, Reference};

/// No manifest is longer, in bytes.
const LONGEST_MANIFEST: i64 = 4 << 20;

/// How long a piece may take to be written, and the whole to be synced and compared.
const PIECE_PATIENCE: Duration = Duration::from_secs(60);
const COMMIT_PATIENCE: Duration = Duration::from_secs(600);

/// How long another write of the same blob (a pull) is waited for.
const LOCKED_PATIENCE: Duration = Duration::from_secs(60);

/// How often it is looked whether that has ended.
const LOCKED_PAUSE: Duration = Duration::from_millis(200);

/// What keeps content for something that refers to it.
const GC_REF: &str = "containerd.io/gc.ref.content";

/// gRPC's number of "not as things are": a blob that has another digest or length.
const FAILED_PRECONDITION: u32 = 9;
/// gRPC's number of "it ends before that".
const OUT_OF_RANGE: u32 = 11;

/// One namespace's content.
#[derive(Debug)]
pub(super) struct Store {
    connection: Connection,
}

/// What became of a blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// It was there when it was to be written.
    WasThere,
    /// It was written, after so many bytes that were there.
    Now { resumed: u64 },
}

/// Why a blob is not content now.
#[derive(Debug)]
pub(super) enum WriteFailed {
    /// What was written is something else.
    Damaged,
    Call(CallError),
}

/// A blob that is being written.
#[derive(Debug)]
pub(super) struct Write<'a> {
    conversation: Conversation<'a>,
    request: WriteRequest,
    at: u64,
}

fn path(method: &str) -> String {
    format!("{CONTENT}{method}")
}

impl Store {
    pub(super) const fn new(connection: Connection) -> Self {
        Self { connection }
    }

    pub(super) fn namespace(&self) -> &str {
        self.connection.namespace()
    }

    /// What an image's name stands for.
    pub(super) fn image(&self, name: &str) -> Result<Target, CallError> {
        let request = GetImageRequest { name: name.to_owned() };
        let found: GetImageResponse = self.connection.call(&format!("{IMAGES}Get"), &request)?;
        let target = found.image.and_then(|image| image.target);
        Ok(target.unwrap_or_default())
    }

    fn info(&self, digest: &Digest) -> Result<ContentInfo, CallError> {
        let request = InfoRequest {
            digest: digest.to_string(),
        };
        let found: InfoResponse = self.connection.call(&path("Info"), &request)?;
        Ok(found.info.unwrap_or_default())
    }

    /// Whether all of it is there.
    pub(super) fn has(&self, digest: &Digest) -> Result<bool, CallError> {
        match self.info(digest) {
            Ok(_) => Ok(true),
            Err(error) if error.code() == Some(NOT_FOUND) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// What is noted with it.
    pub(super) fn labels(&self, digest: &Digest) -> Result<BTreeMap<String, String>, CallError> {
        Ok(self.info(digest)?.labels)
    }

    /// A manifest's bytes, of which it is said that they are `size`.
    pub(super) fn read_small(&self, digest: &Digest, size: i64) -> Result<Vec<u8>, CallError> {
        if size > LONGEST_MANIFEST {
            return Ok(Vec::new());
        }
        let request = ReadRequest {
            digest: digest.to_string(),
        };
        let mut bytes = Vec::new();
        self.connection
            .call_for_all(&path("Read"), &request, |part: ReadResponse| {
                // What is longer than it is said to be has another digest.
                if i64::try_from(bytes.len()).is_ok_and(|len| len <= LONGEST_MANIFEST) {
                    bytes.extend_from_slice(&part.data);
                }
            })?;
        Ok(bytes)
    }

    /// Sees to it that layers are kept for as long as their manifest is.
    pub(super) fn refer(
        &self,
        manifest: &Digest,
        notes: &BTreeMap<String, String>,
        layers: &[&Digest],
    ) -> Result<(), CallError> {
        let missing = missing_references(notes, layers);
        if missing.is_empty() {
            return Ok(());
        }
        let request = UpdateRequest {
            update_mask: Some(FieldMask {
                paths: missing.keys().map(|key| format!("labels.{key}")).collect(),
            }),
            info: Some(ContentInfo {
                digest: manifest.to_string(),
                labels: missing,
                ..ContentInfo::default()
            }),
        };
        self.connection.call::<InfoResponse>(&path("Update"), &request)?;
        Ok(())
    }

    /// Begins to write a blob, or goes on with it. It has the name that containerd's own pulls give it, so that both go on with each
    /// other's halves, and never write at the same time.
    pub(super) fn write(&self, layer: &Descriptor, from: &Reference) -> Result<Result<Write<'_>, Written>, CallError> {
        let since = Instant::now();
        loop {
            match self.begin(layer, from) {
                Ok(write) => return Ok(Ok(write)),
                Err(error) if error.code() == Some(ALREADY_EXISTS) => return Ok(Err(Written::WasThere)),
                Err(error) if error.code() == Some(UNAVAILABLE) && since.elapsed() < LOCKED_PATIENCE => {
                    log::info!("waiting: {error}");
                    thread::sleep(LOCKED_PAUSE);
                }
                Err(error) => return Err(error),
            }
        }
    }

    fn begin(&self, layer: &Descriptor, from: &Reference) -> Result<Write<'_>, CallError> {
        let request = WriteRequest {
            action: WriteAction::Stat.into(),
            r#ref: write_name(&layer.digest),
            total: i64::try_from(layer.size).unwrap_or(i64::MAX),
            expected: layer.digest.to_string(),
            ..WriteRequest::default()
        };
        let mut conversation = self.connection.converse(&path("Write"))?;
        conversation.send(&request)?;
        let state: Option<WriteResponse> = conversation.receive(PIECE_PATIENCE)?;
        let at = state.and_then(|state| u64::try_from(state.offset).ok()).unwrap_or(0);
        Ok(Write {
            conversation,
            request: WriteRequest {
                labels: BTreeMap::from([(format!("{DISTRIBUTION_SOURCE}{}", from.host), from.repository.clone())]),
                ..request
            },
            // What is longer than the blob is not a part of it.
            at: if at > layer.size { 0 } else { at },
        })
    }

    /// Throws away what was written of a blob.
    pub(super) fn abort(&self, layer: &Digest) -> Result<(), CallError> {
        let request = AbortRequest {
            r#ref: write_name(layer),
        };
        match self.connection.call::<Empty>(&path("Abort"), &request) {
            Ok(_) => Ok(()),
            Err(error) if error.code() == Some(NOT_FOUND) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn write_name(layer: &Digest) -> String {
    format!("layer-{layer}")
}

/// The labels with which a manifest has to refer to its layers and does not.
fn missing_references(notes: &BTreeMap<String, String>, layers: &[&Digest]) -> BTreeMap<String, String> {
    let refers = |layer: &str| {
        notes
            .iter()
            .any(|(key, value)| key.starts_with(GC_REF) && value == layer)
    };
    let mut missing = BTreeMap::new();
    for (number, layer) in layers.iter().enumerate() {
        let layer = layer.to_string();
        if !refers(&layer) {
            missing.insert(format!("{GC_REF}.l.{number}"), layer);
        }
    }
    missing
}

impl Write<'_> {
    /// How much of the blob is there, in bytes.
    pub(super) const fn at(&self) -> u64 {
        self.at
    }

    fn exchange(&mut self, action: WriteAction, data: Vec<u8>, patience: Duration) -> Result<(), CallError> {
        self.request.action = action.into();
        self.request.offset = i64::try_from(self.at).unwrap_or(i64::MAX);
        self.request.data = data;
        let sent = self.conversation.send(&self.request);
        let len = std::mem::take(&mut self.request.data).len();
        // Why nothing can be sent any more is in what comes.
        match self.conversation.receive::<WriteResponse>(patience)? {
            Some(state) => {
                self.at = self.at.saturating_add(u64::try_from(len).unwrap_or(u64::MAX));
                if u64::try_from(state.offset) == Ok(self.at) {
                    return Ok(());
                }
                let why = format!(
                    "it has {} bytes of a blob of which {} were written",
                    state.offset, self.at
                );
                Err(self.conversation.broken(why))
            }
            None => sent,
        }
    }

    /// Adds the next bytes.
    pub(super) fn append(&mut self, data: Vec<u8>) -> Result<(), CallError> {
        if data.is_empty() {
            return Ok(());
        }
        self.exchange(WriteAction::Write, data, PIECE_PATIENCE)
    }

    /// Ends the write, so that it can be thrown away: what came is something else.
    pub(super) fn give_up(self) -> WriteFailed {
        drop(self);
        WriteFailed::Damaged
    }

    /// Makes it content.
    pub(super) fn commit(mut self) -> Result<(), WriteFailed> {
        match self.exchange(WriteAction::Commit, Vec::new(), COMMIT_PATIENCE) {
            Err(error) if error.code() == Some(ALREADY_EXISTS) => Ok(()),
            Err(error) if matches!(error.code(), Some(FAILED_PRECONDITION | OUT_OF_RANGE)) => Err(WriteFailed::Damaged),
            other => other.map_err(WriteFailed::Call),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;

    #[test]
    fn what_is_referred_to_is_not_referred_to_again() {
        let [a, b] = [b"a", b"b"].map(|text| Digest::of(Algorithm::Sha256, text));
        let notes = |key: &str, value: &Digest| BTreeMap::from([(key.to_owned(), value.to_string())]);
        let here = notes("containerd.io/gc.ref.content.l.0", &a);
        assert!(missing_references(&here, &[&a]).is_empty());
        assert_eq!(
            missing_references(&here, &[&a, &b]),
            notes("containerd.io/gc.ref.content.l.1", &b)
        );
        // Another key may do the same, and the same value under another key does not.
        assert!(missing_references(&notes("containerd.io/gc.ref.content.7", &a), &[&a]).is_empty());
        assert_eq!(missing_references(&notes("other", &a), &[&a]).len(), 1);
    }
}
