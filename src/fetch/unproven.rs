//! Indexes that nothing but somebody's word stands for. In: an index that a device was made of. Out: once all of the layer is here, whether
//! the layer's headers say the same.
//!
//! The index is not kept in memory meanwhile: it is read again from the file that it came from, which must still hold the same.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::trust::IndexTrust;
use crate::cache::chunk::ChunkKey;
use crate::cache::disk::LayerCache;
use crate::index::{EntryCheck, Index, IndexError, hot_len};
use crate::units::{LayerId, len_usize};

/// So many bytes at its beginning tell how long an index's hot part is.
const PREFIX: usize = 24;

/// An index that nothing but somebody's word stands for.
#[derive(Clone, Debug)]
pub struct UnprovenIndex {
    trust: IndexTrust,
    place: Place,
}

#[derive(Clone, Debug)]
enum Place {
    Memory(Arc<Index<Vec<u8>>>),
    /// A file that begins with its hot part, and the SHA-256 of that.
    File(Arc<OwnedFd>, [u8; 32]),
}

impl UnprovenIndex {
    /// One that is in `file`, if it has to be compared.
    #[must_use]
    pub fn in_file(trust: IndexTrust, index: &Index<Vec<u8>>, file: &Arc<OwnedFd>) -> Option<Self> {
        Self::of(trust, index, || Place::File(Arc::clone(file), index.hot_digest()))
    }

    /// One that is in memory, if it has to be compared.
    #[must_use]
    pub fn in_memory(trust: IndexTrust, index: &Index<Vec<u8>>) -> Option<Self> {
        Self::of(trust, index, || Place::Memory(Arc::new(index.clone())))
    }

    fn of(trust: IndexTrust, index: &Index<Vec<u8>>, place: impl FnOnce() -> Place) -> Option<Self> {
        // What a table of contents makes up has no headers.
        (trust.is_to_be_compared() && !index.is_of_contents()).then(|| Self { trust, place: place() })
    }

    /// Compares it with the headers of a layer all of which lies in `cache`, reading no more of that than it takes: the difference, in
    /// words for a message; none if there is none. Waits for the disk.
    ///
    /// # Errors
    /// The number of a chunk that could not be read, or was not what was written: what the disk spoiled is not the layer's fault.
    pub(super) fn compare(&self, cache: &LayerCache) -> Result<Option<String>, u32> {
        let unfit = |error: IndexError| Ok(Some(format!("its index does not fit it: {error}")));
        let index = match self.open() {
            Ok(index) => index,
            Err(error) => return Ok(Some(format!("its index cannot be read again to be compared: {error}"))),
        };
        let mut check = match EntryCheck::new(&index, self.trust != IndexTrust::Given) {
            Ok(check) => check,
            Err(error) => return unfit(error),
        };
        let mut buffer = Vec::new();
        while let Some(wanted) = check.wants() {
            let key = ChunkKey::holding(LayerId(0), wanted);
            if !cache.read_chunk(key.index, &mut buffer) {
                return Err(key.index);
            }
            if let Err(error) = check.feed(key.start(), &buffer) {
                return unfit(error);
            }
        }
        match check.finish() {
            Ok(difference) => Ok(difference.map(|found| format!("its index says other than its headers: {found}"))),
            Err(error) => unfit(error),
        }
    }

    /// The index, as it was when the device was made.
    fn open(&self) -> io::Result<Arc<Index<Vec<u8>>>> {
        let (file, digest) = match &self.place {
            Place::Memory(index) => return Ok(Arc::clone(index)),
            Place::File(file, digest) => (File::from(file.try_clone()?), digest),
        };
        let bad = |error: IndexError| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
        let mut bytes = vec![0; PREFIX];
        file.read_exact_at(&mut bytes, 0)?;
        let len = hot_len(&bytes).map_err(bad)?.ok_or(io::ErrorKind::InvalidData)?;
        if len > file.metadata()?.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes.resize(len_usize(len), 0);
        file.read_exact_at(&mut bytes, 0)?;
        let index = Index::open_hot(bytes).map_err(bad)?;
        if index.hot_digest() != *digest {
            return Err(io::Error::other("its file holds another one now"));
        }
        Ok(Arc::new(index))
    }

    /// Empties the file that it is kept in, so that it is not used again; the cache takes what is empty for nothing. A file that a person
    /// named is left alone, and so is what this process may not write to.
    pub(super) fn discard(&self) {
        if let (Place::File(file, _), true) = (&self.place, self.trust != IndexTrust::Given) {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let emptied = File::options().write(true).open(path).and_then(|file| file.set_len(0));
            if let Err(error) = emptied {
                log::warn!("an index that lies is still in the cache: {error}");
            }
        }
    }
}
