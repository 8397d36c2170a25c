//! A layer on its way to being served: found, and then with its index. In: what a manifest or a name says of a layer, and an index.
//! Out: both, as far as they fit each other, and the names by which the cache knows them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::{IndexOrigin, OpenError};
use crate::fetch::{BytesTrust, IndexTrust, LayerTrust, WholeDigests};
use crate::index::{Index, IndexError, IndexFault, toc};
use crate::layer::{Coding, SpanTable};
use crate::source::registry::{ImageLayer, ImageName};
use crate::source::{self, Blob, LayerSpec, SourceError};

/// A layer that was found, before it is known what it holds.
#[derive(Clone, Debug)]
pub(super) struct FoundLayer {
    pub(super) layer: LayerSpec,
    /// How its media type says that it is compressed. Its first bytes know better.
    pub(super) coding: Option<Coding>,
    /// What else a manifest says of it.
    pub(super) annotations: BTreeMap<String, String>,
    /// Why a registry may not have it, of a foreign layer.
    pub(super) foreign: Option<String>,
    /// An index that is published beside it, and believed.
    pub(super) published: Option<Published>,
    /// Whether there is one that nothing vouches for.
    pub(super) unbelieved: bool,
}

impl From<Blob> for FoundLayer {
    /// A layer of no image.
    fn from(blob: Blob) -> Self {
        Self {
            layer: blob.into(),
            coding: None,
            annotations: BTreeMap::new(),
            foreign: None,
            published: None,
            unbelieved: false,
        }
    }
}

impl FoundLayer {
    /// A layer of an image, and where it is.
    ///
    /// # Errors
    /// [`SourceError::File`] for a layer of a layout that cannot be opened.
    pub(super) fn of_image(image: &ImageName, layer: &ImageLayer) -> Result<Self, SourceError> {
        Ok(Self {
            layer: LayerSpec {
                digest: Some(layer.descriptor.digest.clone()),
                diff_id: layer.diff_id.clone(),
                ..source::layer_blob(image, layer)?.into()
            },
            coding: layer.kind.coding,
            annotations: layer.descriptor.annotations.clone(),
            foreign: layer.descriptor.foreign(),
            published: None,
            unbelieved: false,
        })
    }
}

/// A published index of a layer.
#[derive(Clone, Debug)]
pub(super) struct Published {
    /// Its hot part.
    pub(super) index: Index<Vec<u8>>,
    /// Where all of it is.
    pub(super) rest: Blob,
    /// Whether it came from the cache directory.
    pub(super) was_kept: bool,
    /// Where it is there now.
    pub(super) kept: Option<PathBuf>,
    /// Why it is believed.
    pub(super) trust: IndexTrust,
}

/// A layer that was found, with its index.
#[derive(Debug)]
pub struct PreparedLayer {
    /// The layer; also with what its index says of it.
    pub layer: LayerSpec,
    /// What it holds.
    pub index: Index<Vec<u8>>,
    /// Where the index came from.
    pub origin: IndexOrigin,
    /// On whose word the layer is what it is shown as.
    pub trust: LayerTrust,
    /// Whether there is an index beside the image that nothing vouches for, and that was not used.
    pub unbelieved: bool,
    /// The index in the cache directory, if it is there: all of it, or if there is a `rest`, its hot part.
    pub(super) kept: Option<PathBuf>,
    /// Where the rest of the index is, if what is here is its hot part alone.
    pub(super) rest: Option<Blob>,
}

impl PreparedLayer {
    /// A layer and its index, as far as they fit each other.
    pub(super) fn new(
        found: &FoundLayer,
        index: Index<Vec<u8>>,
        origin: IndexOrigin,
        trust: IndexTrust,
        kept: Option<PathBuf>,
    ) -> Result<Self, OpenError> {
        let LayerSpec {
            blob,
            digest: wanted_digest,
            diff_id: wanted_diff_id,
            ..
        } = &found.layer;
        let identity = index.identity();
        let (expected, found_len) = (identity.blob_len, blob.len);
        let bad = |cause| OpenError::Index {
            name: format!("index for {}", blob.name),
            cause,
        };
        let digest = identity.blob_digest.clone();
        if expected != found_len {
            return Err(OpenError::OtherLayer {
                name: format!("of {}", blob.name),
                expected,
                source_name: wanted_digest
                    .as_ref()
                    .map_or_else(|| blob.name.clone(), ToString::to_string),
                found: found_len,
            });
        }
        if let (Some(found), Some(wanted)) = (&digest, wanted_digest)
            && found.algorithm() == wanted.algorithm()
            && found != wanted
        {
            return Err(bad(IndexError::OtherLayer {
                what: "digest",
                found: found.to_string(),
                wanted: wanted.to_string(),
            }));
        }
        // A blob that is not compressed is the tar. Of what a table of contents makes up there is no digest.
        let of_tar = match identity.coding {
            _ if index.is_of_contents() => None,
            Coding::Plain => identity.diff_id.as_ref().or(wanted_digest.as_ref()),
            Coding::Gzip | Coding::Zstd => identity.diff_id.as_ref(),
        };
        if let (Some(found), Some(wanted)) = (of_tar, wanted_diff_id)
            && found.algorithm() == wanted.algorithm()
            && found != wanted
        {
            return Err(OpenError::Digest {
                source_name: blob.name.clone(),
                what: "tar",
                expected: wanted.to_string(),
                found: found.to_string(),
            });
        }
        // An image may have empty layers; a layer that is no image's is one whose making failed.
        if wanted_digest.is_none() && !index.is_of_contents() && index.summary().tar_bytes == 0 {
            return Err(OpenError::Empty {
                name: blob.name.clone(),
                len: "0 bytes, decompressed",
            });
        }
        // Without them what is compressed would be taken for the tar.
        if identity.coding != Coding::Plain && index.spans().is_none() {
            return Err(bad(IndexFault::Missing("span table").into()));
        }
        let digest = wanted_digest.clone().or(digest);
        let cached_as = match &digest {
            _ if index.is_of_contents() => kept_as(found),
            // Chunks that no index vouches for are what a server claims until all of them have come.
            Some(digest) if index.chunk_digests().is_none() => {
                blob.claimed(digest).or_else(|| Some(digest.to_string()))
            }
            digest => digest.as_ref().map(ToString::to_string),
        };
        let layer = LayerSpec {
            blob: blob.clone(),
            digest,
            diff_id: wanted_diff_id.clone().or_else(|| identity.diff_id.clone()),
            cached_as,
        };
        Ok(Self {
            trust: LayerTrust {
                index: trust,
                bytes: compared_with(&layer, &index),
            },
            unbelieved: found.unbelieved,
            layer,
            index,
            origin,
            kept,
            rest: None,
        })
    }

    /// The tar's length in bytes.
    #[must_use]
    pub fn tar_len(&self) -> u64 {
        let spans = self.index.spans().filter(|_| self.coding() != Coding::Plain);
        spans.map_or(self.layer.blob.len, SpanTable::tar_len)
    }

    /// How the layer is compressed.
    #[must_use]
    pub fn coding(&self) -> Coding {
        self.index.identity().coding
    }
}

/// What a layer's bytes are compared with when they are read.
fn compared_with(layer: &LayerSpec, index: &Index<Vec<u8>>) -> BytesTrust {
    let whole = WholeDigests::of(layer);
    let is_plain = index.identity().coding == Coding::Plain;
    if index.chunk_digests().is_some() || index.piece_digests().is_some() {
        BytesTrust::EachChunk
    } else if is_plain && !layer.blob.is_remote() {
        BytesTrust::File
    } else if whole.tar.is_some() || (is_plain && whole.blob.is_some()) {
        BytesTrust::Whole
    } else {
        BytesTrust::Unchecked
    }
}

/// Why an index is believed that was made here of what is at hand: all of the blob, or headers.
pub(super) fn made_here(blob: &Blob, index: &Index<Vec<u8>>) -> IndexTrust {
    if blob.is_remote() && index.identity().blob_digest.is_none() {
        IndexTrust::Headers
    } else {
        IndexTrust::Made
    }
}

/// Why an index is believed that was made of the layer's own table of contents: the manifest names that, if there is one.
pub(super) fn of_contents(found: &FoundLayer) -> IndexTrust {
    if found.layer.digest.is_some() {
        IndexTrust::Manifest
    } else {
        IndexTrust::Headers
    }
}

/// What the cache knows a layer by, and its tar, before it was compared with its digest: that, and whose claim it is; or its name
/// and the state that it is in.
pub(super) fn kept_under(layer: &LayerSpec) -> Option<String> {
    match &layer.digest {
        Some(digest) => layer.blob.claimed(digest).or_else(|| Some(digest.to_string())),
        None => layer.blob.cache_name(),
    }
}

/// What the cache knows the layer's tar space by, if it is made up from the layer's table of contents; `None` where no such table
/// would be used. The name holds the table's digest: a lying registry must not leave anything behind for an honest one.
pub(super) fn kept_as(found: &FoundLayer) -> Option<String> {
    let named = match (&found.layer.digest, toc::promised(&found.annotations)) {
        (Some(_), None) => return None,
        (Some(_), Some(digests)) => digests,
        (None, _) => String::new(),
    };
    // Under both digests there is nothing that was not compared with the second.
    let of_image = found.layer.digest.as_ref().map(ToString::to_string);
    let name = of_image.or_else(|| kept_under(&found.layer))?;
    Some(format!("{name}{OF_CONTENTS}{named}"))
}

/// In the name of a tar space that is made up from a layer's table of contents.
const OF_CONTENTS: &str = "\ntable of contents ";

/// Whether the tar space that the cache knows as `cached_as` is made up from a layer's table of contents, and not the tar.
pub(super) fn is_of_contents(cached_as: &str) -> bool {
    cached_as.contains(OF_CONTENTS)
}

/// The same error, or for a foreign layer that is absent one that says so and names its URLs.
pub(super) fn named_if_foreign(error: OpenError, name: &str, foreign: Option<&str>) -> OpenError {
    match (&error, foreign) {
        (OpenError::Source(absence), Some(why)) if absence.is_absence() => {
            let (name, why) = (name.to_owned(), why.to_owned());
            SourceError::Image { name, why }.into()
        }
        _ => error,
    }
}
