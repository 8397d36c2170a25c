//! What layers cost before they could be served: which of them had an index, and what finding and reading them downloaded.
//!
//! In: counts, from the process that prepared the layers. Out: the same, in the statistics of the process that serves them, so
//! that what a mount cost can be told from its first byte. Bytes are those of HTTP bodies as they travel: of compressed
//! layers the compressed ones.

use serde::{Deserialize, Serialize};

use super::trust::LayerTrust;

/// What preparing layers downloaded, by what it was for. Read from another process it may be another version's: what is not
/// there is 0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PrepareCost {
    /// Bytes of manifests, configurations, lists of indexes, and whatever logging in took.
    pub bytes_manifests: u64,
    /// Bytes of indexes that were published or named.
    pub bytes_indexes: u64,
    /// Bytes of the layers themselves: headers, tables of contents, or all of them.
    pub bytes_layers: u64,
    /// Of each layer, the lowest first; none where nothing is known.
    pub layers: Vec<LayerCost>,
}

/// What preparing one layer cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerCost {
    /// The blob's length in bytes: what downloading all of it takes.
    pub blob_bytes: u64,
    /// Bytes of the blob that were downloaded.
    pub downloaded: u64,
    /// How it became known what the layer holds.
    pub known_by: KnownBy,
    /// Whether parts of it can be asked for, as far as that is known.
    pub ranges: bool,
    /// Whether there is an index beside the image that nothing vouches for, and that was not used.
    #[serde(default)]
    pub unbelieved_index: bool,
    /// On whose word it is what it is shown as; none if an older version of this program prepared it.
    #[serde(default)]
    pub trust: Option<LayerTrust>,
}

/// How it became known what a layer holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum KnownBy {
    /// The layer is a file of this machine, and was read there if need be.
    LocalFile,
    /// Its index was named.
    NamedIndex,
    /// Its index was in the cache directory.
    CachedIndex,
    /// Its index was published beside the image.
    PublishedIndex,
    /// By its own table of contents.
    TableOfContents,
    /// Its headers were read, and its content passed over as far as that saves something.
    Headers,
    /// All of it was downloaded.
    WholeDownload,
}

impl PrepareCost {
    /// Everything that was downloaded, in bytes.
    #[must_use]
    pub fn downloaded(&self) -> u64 {
        self.bytes_manifests
            .saturating_add(self.bytes_indexes)
            .saturating_add(self.bytes_layers)
    }

    /// The layers that are not on this machine.
    pub fn remote(&self) -> impl Iterator<Item = &LayerCost> + Clone {
        self.layers.iter().filter(|layer| layer.known_by != KnownBy::LocalFile)
    }

    /// What downloading all of these layers would take, in bytes.
    #[must_use]
    pub fn remote_bytes(&self) -> u64 {
        self.remote().map(|layer| layer.blob_bytes).fold(0, u64::saturating_add)
    }
}
