//! Where the indexes of layers are that were served: what the cache notes of each, so that the layer can be a donor when no device has it.
//! In: a layer that is served. Out, later and maybe in another process: the layer's index.
//!
//! What is noted is a hint: it may name files in the cache directory alone, and nothing is believed of what is read there.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::super::index_cache::read_hot;
use super::super::{Cache, MAX_INDEX_BYTES};
use super::IndexedLayer;
use crate::cache::disk::LayerKey;
use crate::index::Index;
use crate::source::Blob;

/// What the cache notes of a layer that was served: where its index is.
#[derive(Serialize, Deserialize)]
struct DonorRecord {
    /// The file in the cache directory: `index/…` or `hot/…`.
    index: PathBuf,
    /// Where the rest of the index is, without secrets.
    rest: Option<Blob>,
}

fn record_name(key: LayerKey) -> String {
    format!("donor\n{}", key.hex())
}

/// Notes where the index of a layer is, if the cache keeps it.
pub(super) fn note(cache: &Cache, layer: &IndexedLayer) {
    let (Some(key), Some(file)) = (layer.key, &layer.file) else {
        return;
    };
    let Ok(path) = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())) else {
        return;
    };
    let Ok(index) = path.strip_prefix(cache.dir()) else {
        return;
    };
    if index_path(cache, index).is_some() {
        let record = DonorRecord {
            index: index.to_owned(),
            rest: layer.rest.as_ref().map(Blob::without_secrets),
        };
        cache.remember(&record_name(key), &record);
    }
}

/// The file of an index in the cache directory, if `index` names one there.
fn index_path(cache: &Cache, index: &Path) -> Option<PathBuf> {
    let mut parts = index.components();
    let (Some(Component::Normal(dir)), Some(Component::Normal(_)), None) = (parts.next(), parts.next(), parts.next())
    else {
        return None;
    };
    let path = cache.dir().join(index);
    ((dir == "index" || dir == "hot") && path.is_file()).then_some(path)
}

/// A layer that the cache has, with the index that was noted for it. Nothing is believed of that.
pub(super) fn recall(cache: &Cache, key: LayerKey) -> Option<IndexedLayer> {
    let record: DonorRecord = cache.recall(&record_name(key))?;
    let path = index_path(cache, &record.index)?;
    let (index, file) = if record.index.starts_with("hot") {
        let mut file = File::options().read(true).write(true).open(&path).ok()?;
        (read_hot(&mut file)?, Some(Arc::new(file.into())))
    } else {
        let whole = fs::metadata(&path).ok().filter(|meta| meta.len() <= MAX_INDEX_BYTES);
        (
            Index::open(fs::read(&path).ok().filter(|_| whole.is_some())?).ok()?,
            None,
        )
    };
    Some(IndexedLayer {
        key: Some(key),
        index,
        file,
        rest: record.rest,
        trust: None,
    })
}
