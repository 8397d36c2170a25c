//! Layers that need not be unpacked. In: what a client says of a layer that it is about to pull. Out: the claim, on disk, or why it is
//! pulled as usual. Nothing of the layer itself is fetched.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::grpc::{Code, Status};
use super::images::{Declined, LazyImage, Reason};
use super::labels::WantedLayer;
use super::messages::Labels;
use super::records::{Content, Moment, Record, RemoteLayer};
use super::snapshots::{Snapshots, no_snapshot};

impl Snapshots {
    /// Notes a layer that need not be unpacked. The outer error is the call's.
    pub(super) fn claim(
        &self,
        key: &str,
        parent: Option<&str>,
        labels: &Labels,
        wanted: &WantedLayer,
    ) -> Result<Result<(), Declined>, Status> {
        let name = wanted.chain.to_string();
        let is_known = {
            let records = self.records();
            if records.get(key).is_some() {
                return Err(Status::new(Code::AlreadyExists, format!("snapshot {key} is there")));
            }
            match parent.map(|parent| records.get(parent)) {
                None => {}
                Some(Some(below)) if below.remote().is_some() => {}
                Some(Some(_)) => return Ok(Err(above_files())),
                Some(None) => return Err(no_snapshot(parent.unwrap_or_default())),
            }
            match records.get(&name) {
                None => false,
                Some(known) if known.remote().is_some() && known.parent.as_deref() == parent => true,
                Some(_) => return Ok(Err(above_files())),
            }
        };
        match self.find(parent, wanted) {
            Ok((image, at)) => {
                self.note(parent, labels, wanted, &image, at)?;
                self.images.warm(&image.source);
                Ok(Ok(()))
            }
            // What was claimed before is there, whatever became of this image or its registry.
            Err(declined) if is_known => {
                log::info!("{name} is there already, though {declined}");
                Ok(Ok(()))
            }
            Err(declined) => Ok(Err(declined)),
        }
    }

    /// The image that a client names, and which of its layers is wanted: none but the one that the client says, above `parent`.
    fn find(&self, parent: Option<&str>, wanted: &WantedLayer) -> Result<(Arc<LazyImage>, usize), Declined> {
        let unnamed = || Declined::new(Reason::Unnamed, "the client does not say of which image it is");
        let named = wanted.image.as_ref().ok_or_else(unnamed)?;
        let image = self.images.lazy(named)?;
        let is_wanted = |at: usize| {
            let below = at.checked_sub(1).map(|below| image.layers[below].chain.to_string());
            let layer = &image.layers[at];
            layer.chain == wanted.chain && layer.digest == named.layer && below.as_deref() == parent
        };
        let at = (0..image.layers.len()).find(|at| is_wanted(*at));
        let mismatch = || {
            let (image, chain) = (&named.reference, &wanted.chain);
            let why = format!("{image} has no such layer as the client says ({chain})");
            Declined::new(Reason::Mismatch, why)
        };
        Ok((image.clone(), at.ok_or_else(mismatch)?))
    }

    /// Writes down that a layer is claimed, and of which image; also of those below it, because the image that they were claimed of
    /// may go.
    fn note(
        &self,
        parent: Option<&str>,
        labels: &Labels,
        wanted: &WantedLayer,
        image: &LazyImage,
        at: usize,
    ) -> Result<(), Status> {
        let name = wanted.chain.to_string();
        let mut records = self.records();
        // Another client may have been faster.
        if records.get(&name).is_none() {
            if let Some(parent) = parent
                && records.get(parent).is_none()
            {
                return Err(no_snapshot(parent));
            }
            let now = Moment::now();
            let layer = &image.layers[at];
            let record = Record {
                id: records.next_id(),
                name: name.clone(),
                parent: parent.map(str::to_owned),
                content: Content::Remote(RemoteLayer {
                    layer: layer.digest.clone(),
                    bytes: layer.bytes,
                    depth: at + 1,
                    sources: vec![image.source.clone()],
                }),
                labels: labels.clone(),
                created: now,
                updated: now,
            };
            records.put(record)?;
            self.counters.claimed.fetch_add(1, Ordering::Relaxed);
        }
        let mut next = Some(name);
        while let Some(mut record) = next.as_deref().and_then(|name| records.get(name)).cloned() {
            let Content::Remote(layer) = &mut record.content else {
                break;
            };
            next.clone_from(&record.parent);
            if layer.learn(&image.source) {
                records.put(record)?;
            }
        }
        Ok(())
    }

    pub(super) fn tell_declined(&self, wanted: &WantedLayer, declined: &Declined) {
        let mut counts = self.counters.declined.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(declined.reason).or_default() += 1;
        let image = wanted
            .image
            .as_ref()
            .map_or("a layer", |image| image.reference.as_str());
        let chain = &wanted.chain;
        match declined.reason {
            // Said of the layer below, or meant.
            Reason::AboveFiles | Reason::Policy | Reason::Unnamed => {
                log::info!("{image}: {chain} is pulled as usual: {declined}");
            }
            _ => log::warn!("{image}: {chain} is pulled as usual: {declined}"),
        }
    }
}

fn above_files() -> Declined {
    Declined::new(Reason::AboveFiles, "what is below it was unpacked")
}
