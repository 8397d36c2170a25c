//! A lazily pulled image's layers, for those who want them whole: `tarblk content push`. In: the name of an image that containerd has.
//! Out: its layers' blobs, compressed as its registry has them, in containerd's content store, so that it can be exported, saved, pushed
//! elsewhere and built upon.
//!
//! containerd compares each blob with its digest before it is content, and so does this room before it asks for that; what was broken
//! off goes on where it was. *Invariant:* nothing is put there that containerd's collector would not take with the image: the manifest
//! refers to its layers (`containerd.io/gc.ref.content.*`) before the first byte comes.

pub mod messages;
mod store;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::config::Config;
use super::grpc::client::{CallError, Connection, NOT_FOUND, PATIENCE};
use super::records::{self, RecordError};
use crate::digest::Digest;
use crate::http::HttpOptions;
use crate::source::registry::{Descriptor, Manifest, OCI_MANIFEST, Reference, Registry, RegistryOptions};
use crate::source::{self, Blob, SourceError};
use messages::Target;
use store::{Store, WriteFailed, Written};

/// The deepest nesting of indexes that is followed.
const DEEPEST_INDEX: usize = 4;

/// How much is written at once, in bytes.
const PIECE_BYTES: usize = 1 << 20;

/// So many pieces may be on their way from a registry to containerd.
const PIECES_AHEAD: usize = 4;

/// Why an image's layers are not all there.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ContentError {
    /// containerd does not do what it was asked for.
    #[error("containerd: {0}")]
    Containerd(#[from] CallError),
    /// It has no such image.
    #[error(
        "containerd has no image {image} in its namespace {namespace}; `ctr -n {namespace} images ls` lists those that it has"
    )]
    NoImage {
        /// The image as it was named.
        image: String,
        /// The namespace.
        namespace: String,
    },
    /// What it has is not an image.
    #[error("{image}: {why}")]
    NotAnImage {
        /// The image.
        image: String,
        /// What is wrong.
        why: String,
    },
    /// A layer is in no registry that is known.
    #[error(
        "{image}: layer {layer} is not in containerd's content store, and no repository is known that has it: pull the image again"
    )]
    NoSource {
        /// The image.
        image: String,
        /// The layer.
        layer: Digest,
    },
    /// A registry does not give a layer.
    #[error("{image}: {cause}")]
    Source {
        /// The image.
        image: String,
        /// Why.
        #[source]
        cause: Box<SourceError>,
    },
    /// What a registry sent is not the layer.
    #[error("{image}: what {from} sends is not layer {layer}")]
    Damaged {
        /// The image.
        image: String,
        /// The repository.
        from: String,
        /// The layer.
        layer: Digest,
        /// So many bytes of it were there before.
        resumed: u64,
    },
    /// What the snapshotter noted cannot be read.
    #[error(transparent)]
    Records(#[from] RecordError),
}

/// A layer of an image that was named, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PushedLayer {
    /// The blob.
    pub digest: Digest,
    /// Its length in bytes.
    pub bytes: u64,
    /// The repository that it came from; none if containerd had it.
    pub from: Option<String>,
    /// How much of it was there from a write that was broken off, in bytes.
    pub resumed: u64,
}

/// Told of progress.
pub trait PushWatch {
    /// So many bytes of `layer` are in the content store.
    fn written(&mut self, layer: &Digest, at: u64, of: u64);
}

/// Puts layers into one namespace of one containerd.
#[derive(Debug)]
pub struct Pusher {
    store: Store,
    options: RegistryOptions,
    /// The repositories that the snapshotter saw layers in.
    known: BTreeMap<Digest, Vec<String>>,
}

impl Pusher {
    /// `config` is the snapshotter's: its registries, credentials and records are used.
    ///
    /// # Errors
    /// [`ContentError`] when containerd cannot be reached or records cannot be read.
    pub fn new(config: &Config, address: &Path, namespace: &str) -> Result<Self, ContentError> {
        let store = Store::new(Connection::open(address, namespace, PATIENCE)?);
        Ok(Self {
            store,
            options: config.registry_options(HttpOptions::default()),
            known: records::repositories(&config.root.join("records"))?,
        })
    }

    /// Puts the layers of an image that are not there into the content store; all of those of whose manifests containerd has.
    ///
    /// # Errors
    /// [`ContentError`]; layers that came before stay.
    pub fn push(&self, image: &str, watch: &mut dyn PushWatch) -> Result<Vec<PushedLayer>, ContentError> {
        let target = self.target(image)?;
        let mut pushed = Vec::new();
        self.push_target(image, &target, DEEPEST_INDEX, watch, &mut pushed)?;
        Ok(pushed)
    }

    /// What a name stands for in containerd, which knows full names only.
    fn target(&self, image: &str) -> Result<Target, ContentError> {
        let full = Reference::parse(image).map(|reference| reference.to_string());
        for name in [Some(image.to_owned()), full.ok()].into_iter().flatten() {
            match self.store.image(&name) {
                Err(error) if error.code() == Some(NOT_FOUND) => {}
                found => return Ok(found?),
            }
        }
        Err(ContentError::NoImage {
            image: image.to_owned(),
            namespace: self.store.namespace().to_owned(),
        })
    }

    fn push_target(
        &self,
        image: &str,
        target: &Target,
        depth: usize,
        watch: &mut dyn PushWatch,
        pushed: &mut Vec<PushedLayer>,
    ) -> Result<(), ContentError> {
        let bad = |why: String| ContentError::NotAnImage {
            image: image.to_owned(),
            why,
        };
        let digest: Digest = target.digest.parse().map_err(|error| bad(format!("{error}")))?;
        let bytes = self
            .store
            .read_small(&digest, target.size)
            .map_err(|error| match error.code() {
                Some(NOT_FOUND) => bad(format!("its manifest {digest} is not in the content store")),
                _ => error.into(),
            })?;
        if !digest.matches(&bytes) {
            return Err(bad(format!("its manifest in the content store is not {digest}")));
        }
        match Manifest::parse(&bytes, &target.media_type).map_err(bad)? {
            Manifest::Index(_) if depth == 0 => Err(bad("indexes within indexes without end".to_owned())),
            Manifest::Index(manifests) => {
                for child in manifests {
                    // Those of other platforms were not pulled.
                    if self.store.has(&child.digest)? {
                        let target = Target {
                            media_type: child.media_type,
                            digest: child.digest.to_string(),
                            size: i64::try_from(child.size).unwrap_or(i64::MAX),
                        };
                        match self.push_target(image, &target, depth - 1, watch, pushed) {
                            // What a builder says of the image, for instance.
                            Err(error @ ContentError::NotAnImage { .. }) => log::info!("passed over: {error}"),
                            other => other?,
                        }
                    }
                }
                Ok(())
            }
            Manifest::Image { layers, .. } => {
                let notes = self.store.labels(&digest)?;
                let digests: Vec<&Digest> = layers.iter().map(|layer| &layer.digest).collect();
                self.store.refer(&digest, &notes, &digests)?;
                let repositories = repositories(image, &notes);
                for layer in layers {
                    if !pushed.iter().any(|known| known.digest == layer.digest) {
                        pushed.push(self.push_layer(image, &layer, &repositories, watch)?);
                    }
                }
                Ok(())
            }
        }
    }

    fn push_layer(
        &self,
        image: &str,
        layer: &Descriptor,
        repositories: &[String],
        watch: &mut dyn PushWatch,
    ) -> Result<PushedLayer, ContentError> {
        let had = |from, resumed| PushedLayer {
            digest: layer.digest.clone(),
            bytes: layer.size,
            from,
            resumed,
        };
        if self.store.has(&layer.digest)? {
            return Ok(had(None, 0));
        }
        let known = self.known.get(&layer.digest).into_iter().flatten();
        let mut failed = None;
        for repository in known.chain(repositories.iter().filter(|one| !self.is_known(&layer.digest, one))) {
            let mut brought = self.bring(image, layer, repository, watch);
            if matches!(brought, Err(ContentError::Damaged { resumed, .. }) if resumed > 0) {
                // It may be what was there before that is damaged.
                brought = self.bring(image, layer, repository, watch);
            }
            match brought {
                Ok(Written::WasThere) => return Ok(had(None, 0)),
                Ok(Written::Now { resumed }) => return Ok(had(Some(repository.clone()), resumed)),
                Err(error @ (ContentError::Source { .. } | ContentError::Damaged { .. })) => {
                    log::info!("{error}");
                    failed = failed.or(Some(error));
                }
                Err(error) => return Err(error),
            }
        }
        Err(failed.unwrap_or_else(|| ContentError::NoSource {
            image: image.to_owned(),
            layer: layer.digest.clone(),
        }))
    }

    fn is_known(&self, layer: &Digest, repository: &str) -> bool {
        self.known
            .get(layer)
            .is_some_and(|known| known.iter().any(|one| one == repository))
    }

    /// Brings a layer from a repository.
    fn bring(
        &self,
        image: &str,
        layer: &Descriptor,
        repository: &str,
        watch: &mut dyn PushWatch,
    ) -> Result<Written, ContentError> {
        let sourced = |cause| ContentError::Source {
            image: image.to_owned(),
            cause: Box::new(cause),
        };
        let reference = Reference::parse(repository).map_err(|why| ContentError::NotAnImage {
            image: image.to_owned(),
            why,
        })?;
        let registry = Registry::new(&reference, &self.options).map_err(sourced)?;
        let blob = Blob::of_registry(registry.blob(&layer.digest, layer.size));
        let mut write = match self.store.write(layer, &reference)? {
            Ok(write) => write,
            Err(was_there) => return Ok(was_there),
        };
        let resumed = write.at();
        // What was there already is containerd's to compare.
        let mut hasher = (resumed == 0).then(|| layer.digest.algorithm().hasher());
        thread::scope(|scope| {
            let (pieces, arriving) = mpsc::sync_channel::<Vec<u8>>(PIECES_AHEAD);
            let reading = scope.spawn(|| read_pieces(&blob, resumed, &self.options.http, pieces));
            for piece in arriving {
                if let Some(hasher) = &mut hasher {
                    hasher.update(&piece);
                }
                write.append(piece)?;
                watch.written(&layer.digest, write.at(), layer.size);
            }
            let read = reading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            read.map_err(sourced)
        })?;
        let is_damaged = hasher.is_some_and(|hasher| hasher.finish() != layer.digest);
        let committed = if is_damaged {
            Err(write.give_up())
        } else {
            write.commit()
        };
        match committed {
            Ok(()) => Ok(Written::Now { resumed }),
            Err(WriteFailed::Damaged) => {
                // What follows begins anew.
                self.store.abort(&layer.digest)?;
                Err(ContentError::Damaged {
                    image: image.to_owned(),
                    from: repository.to_owned(),
                    layer: layer.digest.clone(),
                    resumed,
                })
            }
            Err(WriteFailed::Call(error)) => Err(error.into()),
        }
    }
}

/// A manifest or a configuration, and what it is called.
#[derive(Debug)]
pub(super) struct Document {
    /// Of its bytes, with which it was compared.
    pub(super) digest: Digest,
    /// What it is.
    pub(super) media_type: String,
    pub(super) bytes: Vec<u8>,
}

/// An image's manifest, and its configuration if containerd has that too. Each call may take as long as `patience`.
///
/// # Errors
/// [`ContentError`], also when they are not what their digests say.
pub(super) fn documents(
    address: &Path,
    namespace: &str,
    manifest: &Digest,
    patience: Duration,
) -> Result<Vec<Document>, ContentError> {
    let store = Store::new(Connection::open(address, namespace, patience)?);
    let bad = |why: String| ContentError::NotAnImage {
        image: manifest.to_string(),
        why,
    };
    let read = |digest: &Digest| -> Result<Vec<u8>, ContentError> {
        let bytes = store.read_small(digest, 0)?;
        let is_it = digest.matches(&bytes);
        is_it
            .then_some(bytes)
            .ok_or_else(|| bad(format!("{digest} in the content store is something else")))
    };
    let bytes = read(manifest)?;
    let Manifest::Image { config, .. } = Manifest::parse(&bytes, "").map_err(bad)? else {
        return Err(bad("it is an index".to_owned()));
    };
    let said: Option<serde_json::Value> = serde_json::from_slice(&bytes).ok();
    let media_type = said.and_then(|said| Some(said.get("mediaType")?.as_str()?.to_owned()));
    let mut documents = vec![Document {
        digest: manifest.clone(),
        media_type: media_type.unwrap_or_else(|| OCI_MANIFEST.to_owned()),
        bytes,
    }];
    if let Ok(bytes) = read(&config.digest) {
        documents.push(Document {
            digest: config.digest.clone(),
            media_type: config.media_type,
            bytes,
        });
    }
    Ok(documents)
}

/// Why pieces are no longer read.
enum Stopped {
    Failed(SourceError),
    /// Whoever took them has failed.
    Unwanted,
}

impl From<SourceError> for Stopped {
    fn from(error: SourceError) -> Self {
        Self::Failed(error)
    }
}

/// Reads a blob from `from` on, in pieces.
fn read_pieces(
    blob: &Blob,
    from: u64,
    http: &HttpOptions,
    pieces: mpsc::SyncSender<Vec<u8>>,
) -> Result<(), SourceError> {
    let mut piece = Vec::new();
    let mut take = |bytes: &[u8]| -> Result<(), Stopped> {
        piece.extend_from_slice(bytes);
        if piece.len() >= PIECE_BYTES {
            return pieces.send(std::mem::take(&mut piece)).map_err(|_| Stopped::Unwanted);
        }
        Ok(())
    };
    let read = source::stream_from(blob, from, http, &mut take);
    if read.is_ok() {
        // Whoever does not want it has said why.
        let _ = pieces.send(piece);
    }
    // Nothing more comes.
    drop(pieces);
    match read {
        Err(Stopped::Failed(error)) => Err(error),
        Ok(_) | Err(Stopped::Unwanted) => Ok(()),
    }
}

/// What containerd notes with content: a registry's host, and its repositories that have it.
const DISTRIBUTION_SOURCE: &str = "containerd.io/distribution.source.";

/// The repositories that should have an image's layers: where its manifest is from, and what it is called.
fn repositories(image: &str, notes: &BTreeMap<String, String>) -> Vec<String> {
    let mut found = Vec::new();
    for (key, value) in notes {
        if let Some(host) = key.strip_prefix(DISTRIBUTION_SOURCE) {
            found.extend(
                value
                    .split(',')
                    .filter(|one| !one.is_empty())
                    .map(|one| format!("{host}/{one}")),
            );
        }
    }
    if let Ok(reference) = Reference::parse(image) {
        found.push(format!("{}/{}", reference.host, reference.repository));
    }
    let mut seen = Vec::new();
    found.retain(|one| {
        let is_new = !seen.contains(one);
        seen.push(one.clone());
        is_new
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_those_of_the_manifest_first() {
        let notes = BTreeMap::from(
            [
                ("containerd.io/distribution.source.a.example", "x/y,z"),
                ("containerd.io/gc.ref.content.l.0", "sha256:0"),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned())),
        );
        assert_eq!(repositories("a.example/z:1", &notes), ["a.example/x/y", "a.example/z"]);
        assert_eq!(repositories("busybox", &BTreeMap::new()), ["docker.io/library/busybox"]);
        assert!(repositories("no name at all", &BTreeMap::new()).is_empty());
    }
}
