//! The requests of one FUSE connection that are not answered yet, in memory that outlives the process that serves them. In:
//! requests as they come from `/dev/fuse`, reads whose bytes are on the way. Out: the same again in another process, after
//! the first was killed at any instruction.
//!
//! A memfd: whoever holds its descriptor keeps it, without looking inside. It has three parts, all in the machine's byte order:
//!
//! ```text
//! header    magic, version and geometry; what was negotiated with the kernel; the filesystem's device number; which image
//! table     reads that wait for bytes: state, size, number, offset
//! slots     one for each session thread: read(2) of /dev/fuse goes straight into it
//! ```
//!
//! *Invariant:* a request that the kernel has handed out is in a slot or in the table until after its answer was written. A slot
//! is cleared only after its request was answered or entered in the table, an entry only after its answer. So a request
//! may be found although it was answered, never the other way round; the kernel knows a second answer's number no more
//! and refuses it.
//!
//! *Invariant:* the pages that the kernel copies requests to are there and stay there (touched and locked). Where one had to be
//! brought in first for a process that is being killed, the kernel would give up and end the request with an error.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use super::protocol::{MAX_BACKGROUND, MIN_READ_BUFFER, Negotiated};

const MAGIC: u64 = u64::from_ne_bytes(*b"tarblkFU");

/// Changes whenever a process of another version would read something else here.
const VERSION: u32 = 1;

/// The most session threads that a connection can have.
pub(super) const MAX_THREADS: u16 = 64;

/// Reads that can wait for bytes at once; twice what the kernel has in flight in the background.
const ENTRIES: u32 = 2 * to_u32(MAX_BACKGROUND);

const PAGE: usize = 4096;
const ENTRY_BYTES: usize = 32;
const TABLE_AT: usize = PAGE;
const SLOTS_AT: usize = TABLE_AT + to_usize(ENTRIES) * ENTRY_BYTES;
const LEN: usize = SLOTS_AT + to_usize(to_u32(MAX_THREADS)) * MIN_READ_BUFFER;

/// Where the header's fields are, in bytes.
mod field {
    pub(super) const MAGIC: usize = 0;
    pub(super) const VERSION: usize = 8;
    pub(super) const SLOTS: usize = 12;
    pub(super) const SLOT_BYTES: usize = 16;
    pub(super) const ENTRIES: usize = 20;
    pub(super) const ENTRY_BYTES: usize = 24;
    /// How many slots were ever used; the others were never touched.
    pub(super) const THREADS: usize = 28;
    /// The protocol's minor number; 0 before the kernel's first request was answered.
    pub(super) const MINOR: usize = 32;
    pub(super) const FLAGS: usize = 40;
    pub(super) const FILESYSTEM: usize = 48;
    pub(super) const IMAGE_LEN: usize = 56;
    /// 0 when unknown.
    pub(super) const IMAGE_CHECK: usize = 64;
}

/// Where an entry's fields are, in bytes from its beginning.
mod entry_field {
    pub(super) const STATE: usize = 0;
    pub(super) const SIZE: usize = 4;
    pub(super) const UNIQUE: usize = 8;
    pub(super) const OFFSET: usize = 16;
}

/// An entry that holds nothing.
const EMPTY: u32 = 0;
/// An entry that is being written. Its request is still in its slot.
const CLAIMED: u32 = 1;
/// An entry that holds a read.
const HOLDS: u32 = 2;

#[allow(
    clippy::as_conversions,
    reason = "usize has at least 32 bits wherever Linux has FUSE"
)]
const fn to_usize(n: u32) -> usize {
    n as usize
}

#[allow(clippy::as_conversions, reason = "a wider type, and From is not const")]
const fn to_u32(n: u16) -> u32 {
    n as u32
}

/// Why a descriptor is no ledger that this process can go on with.
#[derive(Debug, thiserror::Error)]
pub(super) enum LedgerError {
    /// The kernel refused something.
    #[error("cannot open the ledger of a FUSE connection: {0}")]
    Io(#[from] io::Error),
    /// Not a ledger at all.
    #[error("what should be the ledger of a FUSE connection is none: {0}")]
    Foreign(&'static str),
    /// Made by another version of this program.
    #[error("the ledger of the FUSE connection has version {0}; this program knows version {VERSION}")]
    Version(u32),
}

/// One read that waits for bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PendingRead {
    /// The number by which it is answered.
    pub(super) unique: u64,
    /// Where it begins in the file, in bytes.
    pub(super) offset: u64,
    /// How many bytes.
    pub(super) size: u32,
}

/// By what an image is known to be the one that was served before. Another one would be wrong bytes under a mounted filesystem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ImageIdentity {
    /// Its length in bytes.
    pub(super) len: u64,
    /// Made of its first block; 0 when that was not at hand.
    pub(super) check: u64,
}

impl ImageIdentity {
    /// Whether both may be the same image.
    pub(super) const fn agrees(self, other: Self) -> bool {
        self.len == other.len && (self.check == other.check || self.check == 0 || other.check == 0)
    }
}

/// The mapped memfd.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
}

// SAFETY: the memory stays mapped until drop, and is accessed through atomics or by the one owner of a slot.
#[allow(unsafe_code)]
unsafe impl Send for Mapping {}
// SAFETY: as above.
#[allow(unsafe_code)]
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `memfd`, which is [`LEN`] bytes long and sealed so that it stays so.
    fn new(memfd: BorrowedFd<'_>) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        #[allow(unsafe_code)]
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), LEN, protection, MapFlags::SHARED, memfd, 0) }?;
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { start })
    }

    fn u32(&self, at: usize) -> &AtomicU32 {
        assert!(at + 4 <= LEN && at.is_multiple_of(4));
        // SAFETY: inside the mapping, aligned as the mapping is by pages, and only ever accessed as this atomic while it is shared:
        // `Slot::bytes` and `Slot::read` borrow their slot exclusively.
        #[allow(unsafe_code)]
        unsafe {
            AtomicU32::from_ptr(self.start.as_ptr().add(at).cast())
        }
    }

    fn u64(&self, at: usize) -> &AtomicU64 {
        assert!(at + 8 <= LEN && at.is_multiple_of(8));
        // SAFETY: as above.
        #[allow(unsafe_code)]
        unsafe {
            AtomicU64::from_ptr(self.start.as_ptr().add(at).cast())
        }
    }

    /// Makes the pages of `len` bytes from `at` on present and writable, and keeps them so.
    fn keep_in_memory(&self, at: usize, len: usize) {
        assert!(at + len <= LEN);
        // SAFETY: inside the mapping; locking changes no content.
        #[allow(unsafe_code)]
        let locked = unsafe { rustix::mm::mlock(self.start.as_ptr().add(at).cast(), len) };
        if let Err(error) = locked {
            log::debug!("cannot lock {len} bytes of a FUSE connection's ledger in memory: {error}");
        }
        for page in (at..at + len).step_by(PAGE) {
            // A write that changes nothing.
            self.u64(page).fetch_or(0, Ordering::Relaxed);
        }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nothing borrows from it any more.
        #[allow(unsafe_code)]
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), LEN) };
        if let Err(error) = unmapped {
            log::warn!("cannot unmap a ledger: {error}");
        }
    }
}

/// The ledger of one connection, in this process.
#[derive(Debug)]
pub(super) struct Ledger {
    map: Mapping,
    memfd: OwnedFd,
    /// Where the search for an empty entry begins.
    next: AtomicUsize,
}

impl Ledger {
    /// An empty ledger with a slot for each of `threads` session threads.
    pub(super) fn create(threads: u16) -> io::Result<(Arc<Self>, Vec<Slot>)> {
        let memfd = rustix::fs::memfd_create("tarblk-ledger", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&memfd, u64::try_from(LEN).map_err(io::Error::other)?)?;
        rustix::fs::fcntl_add_seals(&memfd, SEALS | SealFlags::SEAL)?;
        let map = Mapping::new(memfd.as_fd())?;
        for (at, value) in GEOMETRY {
            map.u32(at).store(value, Ordering::Relaxed);
        }
        map.u64(field::MAGIC).store(MAGIC, Ordering::Release);
        Ok(Self::with_slots(map, memfd, threads))
    }

    /// The ledger behind `memfd`, whose process is dead, with a slot for each of `threads` session threads and each that there was.
    ///
    /// # Errors
    /// When it is no ledger, of another version, or of a connection that never began.
    pub(super) fn open(memfd: OwnedFd, threads: u16) -> Result<(Arc<Self>, Vec<Slot>), LedgerError> {
        let seals = rustix::fs::fcntl_get_seals(&memfd).map_err(|_| LedgerError::Foreign("it is no memfd"))?;
        let stat = rustix::fs::fstat(&memfd).map_err(io::Error::from)?;
        // A shorter one would be SIGBUS, now or when it is cut.
        if !seals.contains(SEALS) {
            return Err(LedgerError::Foreign("its length may change"));
        }
        if usize::try_from(stat.st_size) != Ok(LEN) {
            // What a version is cannot be read from less than a page.
            return Err(LedgerError::Foreign("its length is another"));
        }
        let map = Mapping::new(memfd.as_fd())?;
        if map.u64(field::MAGIC).load(Ordering::Acquire) != MAGIC {
            return Err(LedgerError::Foreign("it does not begin as one"));
        }
        let version = map.u32(field::VERSION).load(Ordering::Relaxed);
        if version != VERSION {
            return Err(LedgerError::Version(version));
        }
        let as_here = |(at, value): (usize, u32)| map.u32(at).load(Ordering::Relaxed) == value;
        if !GEOMETRY.into_iter().all(as_here) {
            return Err(LedgerError::Foreign("its parts have other sizes"));
        }
        if map.u32(field::MINOR).load(Ordering::Relaxed) == 0 {
            return Err(LedgerError::Foreign("its connection never began"));
        }
        let (ledger, slots) = Self::with_slots(map, memfd, threads);
        for index in 0..ENTRIES {
            // Killed while it wrote the entry; the slot still has the request.
            let state = ledger.entry_u32(index, entry_field::STATE);
            let _ = state.compare_exchange(CLAIMED, EMPTY, Ordering::Relaxed, Ordering::Relaxed);
        }
        Ok((ledger, slots))
    }

    fn with_slots(map: Mapping, memfd: OwnedFd, threads: u16) -> (Arc<Self>, Vec<Slot>) {
        let used = map
            .u32(field::THREADS)
            .fetch_max(u32::from(threads), Ordering::Relaxed)
            .max(u32::from(threads))
            .min(u32::from(MAX_THREADS));
        map.keep_in_memory(0, SLOTS_AT + to_usize(used) * MIN_READ_BUFFER);
        let ledger = Arc::new(Self {
            map,
            memfd,
            next: AtomicUsize::new(0),
        });
        let slots = (0..used).map(|number| Slot {
            ledger: Arc::clone(&ledger),
            at: SLOTS_AT + to_usize(number) * MIN_READ_BUFFER,
        });
        let slots = slots.collect();
        (ledger, slots)
    }

    /// The descriptor that keeps it.
    pub(super) fn memfd(&self) -> BorrowedFd<'_> {
        self.memfd.as_fd()
    }

    /// What was negotiated with the kernel; `None` before its first request was answered.
    pub(super) fn negotiated(&self) -> Option<Negotiated> {
        let minor = self.map.u32(field::MINOR).load(Ordering::Acquire);
        let flags = self.map.u64(field::FLAGS).load(Ordering::Relaxed);
        (minor != 0).then_some(Negotiated { minor, flags })
    }

    /// Notes what was negotiated.
    pub(super) fn set_negotiated(&self, negotiated: Negotiated) {
        self.map.u64(field::FLAGS).store(negotiated.flags, Ordering::Relaxed);
        self.map.u32(field::MINOR).store(negotiated.minor, Ordering::Release);
    }

    /// The device number of the FUSE filesystem, by which its loop device is known; 0 before there is one.
    pub(super) fn filesystem(&self) -> u64 {
        self.map.u64(field::FILESYSTEM).load(Ordering::Relaxed)
    }

    /// Notes the device number of the FUSE filesystem.
    pub(super) fn set_filesystem(&self, device: u64) {
        self.map.u64(field::FILESYSTEM).store(device, Ordering::Relaxed);
    }

    /// What is served.
    pub(super) fn image(&self) -> ImageIdentity {
        ImageIdentity {
            len: self.map.u64(field::IMAGE_LEN).load(Ordering::Relaxed),
            check: self.map.u64(field::IMAGE_CHECK).load(Ordering::Relaxed),
        }
    }

    /// Notes what is served.
    pub(super) fn set_image(&self, image: ImageIdentity) {
        self.map.u64(field::IMAGE_LEN).store(image.len, Ordering::Relaxed);
        self.map.u64(field::IMAGE_CHECK).store(image.check, Ordering::Relaxed);
    }

    fn entry_u32(&self, index: u32, field: usize) -> &AtomicU32 {
        self.map.u32(TABLE_AT + to_usize(index) * ENTRY_BYTES + field)
    }

    fn entry_u64(&self, index: u32, field: usize) -> &AtomicU64 {
        self.map.u64(TABLE_AT + to_usize(index) * ENTRY_BYTES + field)
    }

    /// Enters a read, whose slot may then be cleared; `None` when the table is full.
    pub(super) fn enter(self: &Arc<Self>, read: PendingRead) -> Option<Entry> {
        let entries = to_usize(ENTRIES);
        let first = self.next.fetch_add(1, Ordering::Relaxed);
        for step in 0..entries {
            let index = u32::try_from(first.wrapping_add(step) % entries).unwrap_or(0);
            let state = self.entry_u32(index, entry_field::STATE);
            if state.load(Ordering::Relaxed) == EMPTY
                && state
                    .compare_exchange(EMPTY, CLAIMED, Ordering::Acquire, Ordering::Relaxed)
                    .is_ok()
            {
                self.entry_u32(index, entry_field::SIZE)
                    .store(read.size, Ordering::Relaxed);
                self.entry_u64(index, entry_field::UNIQUE)
                    .store(read.unique, Ordering::Relaxed);
                self.entry_u64(index, entry_field::OFFSET)
                    .store(read.offset, Ordering::Relaxed);
                state.store(HOLDS, Ordering::Release);
                return Some(Entry {
                    ledger: Arc::clone(self),
                    index,
                });
            }
        }
        None
    }

    /// Every entry that holds a read: what a dead process left. Only to be called before anything is entered here.
    pub(super) fn left(self: &Arc<Self>) -> Vec<(Entry, PendingRead)> {
        let holds = |index: &u32| self.entry_u32(*index, entry_field::STATE).load(Ordering::Acquire) == HOLDS;
        let entry = |index| {
            let read = PendingRead {
                unique: self.entry_u64(index, entry_field::UNIQUE).load(Ordering::Relaxed),
                offset: self.entry_u64(index, entry_field::OFFSET).load(Ordering::Relaxed),
                size: self.entry_u32(index, entry_field::SIZE).load(Ordering::Relaxed),
            };
            let ledger = Arc::clone(self);
            (Entry { ledger, index }, read)
        };
        (0..ENTRIES).filter(holds).map(entry).collect()
    }
}

/// A ledger can neither be cut short, which would be SIGBUS for who has it mapped, nor become longer.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// The header's fields that are the same in every ledger of this version.
const GEOMETRY: [(usize, u32); 5] = [
    (field::VERSION, VERSION),
    (field::SLOTS, to_u32(MAX_THREADS)),
    (field::SLOT_BYTES, 8192),
    (field::ENTRIES, ENTRIES),
    (field::ENTRY_BYTES, 32),
];

/// A read in the table. Dropped, it stays there: only [`Entry::clear`] takes it out, after the answer.
#[derive(Debug)]
pub(super) struct Entry {
    ledger: Arc<Ledger>,
    index: u32,
}

impl Entry {
    /// Takes the read out of the table. Its answer has been written.
    pub(super) fn clear(self) {
        self.ledger
            .entry_u32(self.index, entry_field::STATE)
            .store(EMPTY, Ordering::Release);
    }
}

/// The place of one session thread's present request. There is one value of this type for each place, so its owner has it alone.
#[derive(Debug)]
pub(super) struct Slot {
    ledger: Arc<Ledger>,
    /// Where it begins, in bytes.
    at: usize,
}

impl Slot {
    /// The first field of a request, its length: 0 when there is none.
    fn request_len(&self) -> &AtomicU32 {
        self.ledger.map.u32(self.at)
    }

    /// Waits for the next request of `channel`, an open `/dev/fuse`, and takes it in. The slot must be clear.
    pub(super) fn read(&mut self, channel: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: inside the mapping, which lives as long as the ledger; this slot's only value is borrowed exclusively, and
        // no other process uses the memory while this one lives.
        #[allow(unsafe_code)]
        let bytes =
            unsafe { std::slice::from_raw_parts_mut(self.ledger.map.start.as_ptr().add(self.at), MIN_READ_BUFFER) };
        rustix::io::read(channel, bytes).map_err(|error| {
            // A request that the kernel could not copy whole has been ended by it.
            self.clear();
            error.into()
        })
    }

    /// The slot's bytes, which begin with a request; `None` when there is none.
    pub(super) fn request(&mut self) -> Option<&[u8]> {
        if self.request_len().load(Ordering::Acquire) == 0 {
            return None;
        }
        // SAFETY: as in `read`.
        #[allow(unsafe_code)]
        Some(unsafe { std::slice::from_raw_parts(self.ledger.map.start.as_ptr().add(self.at), MIN_READ_BUFFER) })
    }

    /// Forgets the request, which was answered or entered in the table.
    pub(super) fn clear(&mut self) {
        self.request_len().store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn read(n: u64) -> PendingRead {
        PendingRead {
            unique: n,
            offset: n << 12,
            size: 4096,
        }
    }

    fn reopened(ledger: &Ledger, threads: u16) -> Result<(Arc<Ledger>, Vec<Slot>), LedgerError> {
        Ledger::open(ledger.memfd().try_clone_to_owned().unwrap(), threads)
    }

    fn begun(threads: u16) -> (Arc<Ledger>, Vec<Slot>) {
        let (ledger, slots) = Ledger::create(threads).unwrap();
        ledger.set_negotiated(Negotiated { minor: 31, flags: 1 });
        (ledger, slots)
    }

    /// Whatever reads as a file descriptor does: here a pipe for `/dev/fuse`.
    fn take_in(slot: &mut Slot, bytes: &[u8]) {
        let (from, mut to) = io::pipe().unwrap();
        to.write_all(bytes).unwrap();
        assert_eq!(slot.read(from.as_fd()).unwrap(), bytes.len());
    }

    #[test]
    fn another_process_finds_what_was_not_answered() {
        let (ledger, mut slots) = begun(2);
        ledger.set_filesystem(77);
        let image = ImageIdentity { len: 4096, check: 3 };
        ledger.set_image(image);
        let entries: Vec<Entry> = (1..=5).map(|n| ledger.enter(read(n)).unwrap()).collect();
        for (n, entry) in entries.into_iter().enumerate() {
            if n % 2 == 0 {
                entry.clear();
            }
        }
        take_in(&mut slots[1], b"\x28\0\0\0 a request");
        take_in(&mut slots[0], b"\x28\0\0\0 answered");
        slots[0].clear();

        let (ledger, mut slots) = reopened(&ledger, 1).unwrap();
        assert_eq!(ledger.negotiated(), Some(Negotiated { minor: 31, flags: 1 }));
        assert_eq!((ledger.filesystem(), ledger.image()), (77, image));
        let left: Vec<PendingRead> = ledger.left().into_iter().map(|(_, read)| read).collect();
        assert_eq!(left, [read(2), read(4)]);
        // One thread fewer, but its slot is still looked at.
        assert_eq!(slots.len(), 2);
        assert_eq!(slots[0].request(), None);
        assert!(slots[1].request().unwrap().starts_with(b"\x28\0\0\0 a request"));
        slots[1].clear();

        // What is dropped stays; more threads get more slots.
        let (ledger, mut slots) = reopened(&ledger, 3).unwrap();
        assert_eq!(slots.len(), 3);
        assert!(slots.iter_mut().all(|slot| slot.request().is_none()));
        for (entry, _) in ledger.left() {
            entry.clear();
        }
        assert!(ledger.left().is_empty());
    }

    #[test]
    fn an_entry_that_was_being_written_is_free_again() {
        let (ledger, _) = begun(1);
        let entry = ledger.enter(read(1)).unwrap();
        ledger
            .entry_u32(entry.index, entry_field::STATE)
            .store(CLAIMED, Ordering::Relaxed);
        let (ledger, _) = reopened(&ledger, 1).unwrap();
        assert!(ledger.left().is_empty());
        let all: Vec<Entry> = std::iter::from_fn(|| ledger.enter(read(2))).collect();
        assert_eq!(all.len(), to_usize(ENTRIES));
    }

    #[test]
    fn a_full_table_takes_nothing_until_one_is_cleared() {
        let (ledger, _) = begun(1);
        let mut all: Vec<Entry> = std::iter::from_fn(|| ledger.enter(read(1))).collect();
        assert_eq!(all.len(), to_usize(ENTRIES));
        all.swap_remove(100).clear();
        assert_eq!(ledger.enter(read(9)).map(|entry| entry.index), Some(100));
        assert!(ledger.enter(read(10)).is_none());
    }

    #[test]
    fn threads_enter_and_clear_at_once() {
        let (ledger, _) = begun(1);
        std::thread::scope(|scope| {
            for thread in 0..4u64 {
                let ledger = &ledger;
                scope.spawn(move || {
                    for n in 0..2000 {
                        let entries: Vec<Entry> = (0..8)
                            .map(|k| ledger.enter(read(thread << 32 | n << 8 | k)).unwrap())
                            .collect();
                        for (k, entry) in (0..).zip(entries) {
                            let unique = ledger.entry_u64(entry.index, entry_field::UNIQUE);
                            assert_eq!(unique.load(Ordering::Relaxed), thread << 32 | n << 8 | k);
                            entry.clear();
                        }
                    }
                });
            }
        });
        assert!(ledger.left().is_empty());
    }

    #[test]
    fn what_is_no_ledger_is_refused() {
        let (never, _) = Ledger::create(1).unwrap();
        let error = reopened(&never, 1).unwrap_err().to_string();
        assert!(error.contains("never began"), "{error}");

        for (at, value, says) in [
            (field::VERSION, VERSION + 1, "version 2"),
            (field::MAGIC, 0, "begin"),
            (field::ENTRIES, 7, "sizes"),
            (field::SLOT_BYTES, 4096, "sizes"),
        ] {
            let (ledger, _) = begun(1);
            ledger.map.u32(at).store(value, Ordering::Relaxed);
            let error = reopened(&ledger, 1).unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }

        let file = tempfile::tempfile().unwrap();
        assert!(matches!(Ledger::open(file.into(), 1), Err(LedgerError::Foreign(_))));
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        for (len, seals) in [(LEN, SealFlags::empty()), (100, SEALS), (LEN, SEALS)] {
            let memfd = rustix::fs::memfd_create("other", flags).unwrap();
            rustix::fs::ftruncate(&memfd, u64::try_from(len).unwrap()).unwrap();
            rustix::fs::fcntl_add_seals(&memfd, seals).unwrap();
            assert!(matches!(Ledger::open(memfd, 1), Err(LedgerError::Foreign(_))));
        }
        let (ledger, _) = begun(1);
        assert!(rustix::fs::ftruncate(ledger.memfd(), 0).is_err(), "a ledger can be cut");
    }

    #[test]
    fn only_the_same_image_agrees() {
        let image = |len, check| ImageIdentity { len, check };
        assert!(image(4096, 3).agrees(image(4096, 3)) && image(4096, 3).agrees(image(4096, 0)));
        assert!(image(4096, 0).agrees(image(4096, 3)));
        assert!(!image(4096, 3).agrees(image(8192, 3)) && !image(4096, 3).agrees(image(4096, 4)));
        assert!(!image(4096, 0).agrees(image(8192, 0)));
    }

    #[test]
    fn a_number_of_threads_that_makes_no_sense_is_bounded() {
        let (ledger, _) = begun(1);
        ledger.map.u32(field::THREADS).store(u32::MAX, Ordering::Relaxed);
        assert_eq!(reopened(&ledger, 1).unwrap().1.len(), usize::from(MAX_THREADS));
    }
}
