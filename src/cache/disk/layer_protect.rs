//! Whole layers that the kernel keeps as they are. In: a layer all of which is in its data file, and what compares it with digests. Out: the
//! same, protected by fs-verity, with what it was compared with in its map: a later process need not compare it again, and nothing that
//! is read of it needs a checksum.
//!
//! What is protected can never be written again, nor given up in part. So it is done only where a layer may well stay: the cache is not
//! tight, and the layer a small part of it. When room is needed after all, a layer that is protected goes as a whole, and counts as unused as
//! long as the part of it that was used last.
//!
//! Invariant: the comparison reads the file after it was protected, so that what the kernel keeps is what was compared.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::files::data_name;
use super::layer::LayerCache;
use super::map::Protection;
use super::{lock, verity};

/// No layer is protected that takes more than this part of the cache's limit: one in so many.
const SHARE: u64 = 4;

/// What became of a layer that was to be protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protected {
    /// The kernel keeps all of it as it is, and it is right.
    Yes,
    /// It cannot be, or is not to be, or not now.
    No,
    /// The first chunk that cannot be read, or is something else.
    Wrong(u32),
}

impl LayerCache {
    /// What all of it was compared with, if the kernel has kept it since: SHA-256 of its chunk digests, as
    /// [`protect`](Self::protect) was told.
    pub(crate) fn protection(&self) -> Option<[u8; 32]> {
        let files = self.files();
        let protection = files
            .protection
            .get()
            .filter(|_| files.map.bits.is_full() && !self.is_poisoned());
        protection.map(|protection| protection.digests)
    }

    /// Whether it makes sense to [`protect`](Self::protect) it now.
    pub(crate) fn may_be_protected(&self) -> bool {
        let Some(store) = self.store() else { return false };
        let files = self.files();
        files.named
            && files.data.is_ours()
            && files.others.is_none()
            && files.map.bits.is_full()
            && files.protection.get().is_none()
            && !(self.is_poisoned() || store.unprotectable.load(Ordering::Relaxed) || store.is_tight())
            && self.size() <= store.limit() / SHARE
    }

    /// Has the kernel keep the layer as it is, and compares all of it: `is_right` says of a chunk, by its number and bytes, whether it
    /// is what it has to be, by digests whose SHA-256 is `digests`; none when nobody wants to know any more. Waits for the disk, and reads
    /// all of the layer twice.
    ///
    /// # Errors
    /// What the kernel says, unless it is that there is no such thing here.
    pub(crate) fn protect(
        &self,
        digests: [u8; 32],
        is_right: &mut dyn FnMut(u32, &[u8]) -> Option<bool>,
    ) -> io::Result<Protected> {
        let Some(store) = self.store().filter(|_| self.may_be_protected()) else {
            return Ok(Protected::No);
        };
        let files = self.files();
        let dir = store.dir();
        if !files.data.is_called(&dir, &data_name(self.key())) {
            return Ok(Protected::No);
        }
        files.data.sync()?;
        let ended = {
            let _nobody_writes = lock(self.layout());
            files.data.end_writing()
        };
        let file = match ended.and_then(|()| files.data.protect()) {
            Ok(file) => file,
            Err(error) if verity::is_unsupported(&error) => {
                store.unprotectable.store(true, Ordering::Relaxed);
                return Ok(Protected::No);
            }
            Err(error) => return Err(error),
        };
        let (mut wrong, mut wanted) = (None, true);
        self.read_whole(&mut |index, bytes| {
            match bytes.map_or(Some(false), |bytes| is_right(index, bytes)) {
                Some(true) => {}
                Some(false) => wrong = Some(index),
                None => wanted = false,
            }
            wanted && wrong.is_none()
        });
        if let Some(index) = wrong {
            return Ok(Protected::Wrong(index));
        }
        // Given up meanwhile, it was read from another file.
        let is_same = Arc::ptr_eq(&files, &self.files()) && files.map.bits.is_full();
        if !wanted || !is_same || files.protection.set(Protection { file, digests }).is_err() {
            return Ok(Protected::No);
        }
        self.changed();
        match self.commit() {
            Ok(()) => log::debug!("{}: the kernel keeps it as it is", data_name(self.key())),
            Err(error) => log::debug!("{error}"),
        }
        Ok(Protected::Yes)
    }
}
