//! What preparing layers downloads, by what it is for. In: the marks between the steps of preparing. Out: a [`PrepareCost`].
//!
//! What comes is counted by the HTTP client for the process as a whole, so a step's bytes are those that came since the one
//! before: exact, retries included, as long as one image is prepared at a time, which is what a command does.

use super::{IndexOrigin, PreparedLayer};
use crate::fetch::{KnownBy, LayerCost, PrepareCost};
use crate::http::received_bytes;

/// Counts while an image is prepared.
#[derive(Debug)]
pub(super) struct CostMeter {
    cost: PrepareCost,
    /// What the client had counted at the last mark, in bytes.
    at_mark: u64,
}

impl CostMeter {
    pub(super) fn start() -> Self {
        Self {
            cost: PrepareCost::default(),
            at_mark: received_bytes(),
        }
    }

    /// How many bytes came since the last mark.
    fn mark(&mut self) -> u64 {
        let now = received_bytes();
        now.saturating_sub(std::mem::replace(&mut self.at_mark, now))
    }

    /// What came since the last mark were manifests and whatever else finding layers takes.
    pub(super) fn manifests(&mut self) {
        self.cost.bytes_manifests += self.mark();
    }

    /// What came since the last mark were indexes.
    pub(super) fn indexes(&mut self) {
        self.cost.bytes_indexes += self.mark();
    }

    /// What came since the last mark were layers.
    pub(super) fn layers(&mut self) {
        self.cost.bytes_layers += self.mark();
    }

    /// All of it, of these layers.
    pub(super) fn finish(self, layers: &[PreparedLayer]) -> PrepareCost {
        PrepareCost {
            layers: layers.iter().map(cost_of).collect(),
            ..self.cost
        }
    }
}

fn cost_of(layer: &PreparedLayer) -> LayerCost {
    let blob = &layer.layer.blob;
    let (known_by, downloaded) = match layer.origin {
        _ if !blob.is_remote() => (KnownBy::LocalFile, 0),
        IndexOrigin::Given => (KnownBy::NamedIndex, 0),
        IndexOrigin::Kept => (KnownBy::CachedIndex, 0),
        IndexOrigin::Published { .. } => (KnownBy::PublishedIndex, 0),
        IndexOrigin::Contents { bytes, .. } => (KnownBy::TableOfContents, bytes),
        IndexOrigin::Read { bytes, .. } if bytes >= blob.len => (KnownBy::WholeDownload, bytes),
        IndexOrigin::Read { bytes, .. } => (KnownBy::Headers, bytes),
    };
    LayerCost {
        blob_bytes: blob.len,
        downloaded,
        known_by,
        ranges: blob.answers_ranges(),
        unbelieved_index: layer.unbelieved,
        trust: Some(layer.trust),
    }
}
