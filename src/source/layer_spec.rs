//! One layer on its way from a manifest, or a name that was typed, to the fetcher.

use serde::{Deserialize, Serialize};

use super::blob::Blob;
use crate::digest::Digest;

/// A layer: where its blob is, and which bytes have to be there. What the blob holds is in its index.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerSpec {
    /// The layer as it is stored, compressed or not.
    pub blob: Blob,
    /// The blob's digest, if a manifest or an index tells it.
    pub digest: Option<Digest>,
    /// The digest of the tar in it, if an image's configuration or an index tells it.
    pub diff_id: Option<Digest>,
    /// The name under which what is fetched of the layer is cached: layers of one name share it. It stays the same as long as the
    /// layer's content does, and no longer; a digest that the content was compared with is the best. None: a blob at a URL goes
    /// by that and its validator, and what is fetched of others goes with the process.
    pub cached_as: Option<String>,
}

impl From<Blob> for LayerSpec {
    /// A layer of which nothing else is known.
    fn from(blob: Blob) -> Self {
        Self {
            blob,
            digest: None,
            diff_id: None,
            cached_as: None,
        }
    }
}
