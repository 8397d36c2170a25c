//! What a device serves. In: an image and the bytes of its layers. Out: block ranges, as far as they are here, and the
//! exact list of what is not.
//!
//! Both back ends and `tarblk image` read through here, so that a block is the same block on every way out. Nothing here
//! waits, except [`Volume::read_blocking`], which no thread that answers the kernel may call.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use smallvec::SmallVec;

use crate::cache::Slice;
use crate::fetch::{FetchError, Fetcher, LayerRange, Located, ReadCallback};
use crate::image::{BlockImage, Origin, Piece};
use crate::profile::{ReadFrom, StartRecorder, Waiting};
use crate::units::{BLOCK_SIZE, TarRange};

use super::stats::{DeviceStats, Source, ThreadCounters, snapshot};

/// Where layer bytes come from, as a device sees it: [`Fetcher`], or what stands for it in tests and benchmarks.
pub trait BlobReader: Send + Sync + std::fmt::Debug {
    /// See [`Fetcher::locate`].
    fn locate(&self, range: LayerRange) -> Located<'_>;

    /// See [`Fetcher::read_at_once`].
    fn read_at_once(&self, _range: LayerRange, _target: &mut [u8]) -> bool {
        false
    }

    /// See [`Fetcher::read`].
    fn read(&self, ranges: Vec<LayerRange>, waiter: Box<dyn ReadCallback>);

    /// See [`Fetcher::poisoned`].
    fn poisoned(&self) -> Option<&FetchError> {
        None
    }
}

impl BlobReader for Fetcher {
    fn locate(&self, range: LayerRange) -> Located<'_> {
        Fetcher::locate(self, range)
    }

    fn read_at_once(&self, range: LayerRange, target: &mut [u8]) -> bool {
        Fetcher::read_at_once(self, range, target)
    }

    fn read(&self, ranges: Vec<LayerRange>, waiter: Box<dyn ReadCallback>) {
        Fetcher::read(self, ranges, waiter);
    }

    fn poisoned(&self) -> Option<&FetchError> {
        Fetcher::poisoned(self)
    }
}

/// Why a read failed. Every one is `EIO` to the kernel, and the text is for the log: a filesystem's readers get `EIO` for every
/// error of its device, and only who reads the device directly could see another.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    /// The request does not lie on whole blocks.
    #[error("a read of {len} bytes at {offset} is not made of whole blocks")]
    Unaligned {
        /// Where it began, in bytes.
        offset: u64,
        /// How long it was, in bytes.
        len: usize,
    },
    /// The fetch thread could not bring the bytes.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The fetch thread gave more or fewer bytes than it was asked for: serving them would be serving wrong ones.
    #[error("asked for {wanted} bytes of the layer and got {got}")]
    WrongLength {
        /// Bytes asked for.
        wanted: u64,
        /// Bytes received.
        got: u64,
    },
    /// The device is being taken down, or the fetch thread is gone.
    #[error("the device is going away")]
    Stopped,
}

/// A stretch of a read that is not in memory: where it goes in the reader's buffer, and where it can be had.
#[derive(Clone, Copy, Debug)]
pub struct Gap<'v> {
    /// Where in the buffer, in bytes.
    pub at: usize,
    /// How many bytes.
    pub len: usize,
    /// The layer's bytes that belong there.
    pub range: LayerRange,
    /// A local file that holds them, if one does, and from which byte on. Borrowed from the volume.
    pub file: Option<(BorrowedFd<'v>, u64)>,
    /// Whether they are on this machine's disk: in that file, or in the disk cache.
    pub on_disk: bool,
}

/// What [`Volume::look`] found.
#[derive(Debug)]
pub enum Found {
    /// All of it is zero; the buffer was not touched.
    Zero,
    /// All of it lies in memory in one piece; the buffer was not touched.
    Memory(Slice),
    /// The buffer is filled.
    Filled,
    /// The buffer is filled but for the gaps listed in [`Scratch::gaps`].
    Gaps,
}

/// Lists that are reused from read to read, so that a hit allocates nothing.
#[derive(Debug, Default)]
pub struct Scratch<'v> {
    pieces: Vec<Piece>,
    /// After [`Found::Gaps`]: what is missing, in order.
    pub gaps: Vec<Gap<'v>>,
}

impl Gap<'_> {
    /// The same without the file, to be kept longer than the volume is borrowed.
    #[must_use]
    pub fn detached(self) -> Gap<'static> {
        Gap { file: None, ..self }
    }
}

impl Scratch<'_> {
    /// The same lists, empty, to be kept longer than the volume that they were filled from.
    #[must_use]
    pub fn emptied(mut self) -> Scratch<'static> {
        self.gaps.clear();
        // An empty list has no gap to convert; collecting it keeps its memory.
        let gaps = self.gaps.into_iter().map(Gap::detached).collect();
        Scratch {
            pieces: self.pieces,
            gaps,
        }
    }
}

/// An image, the bytes behind it, and the counters of the device that serves it.
#[derive(Debug)]
pub struct Volume {
    image: Arc<dyn BlockImage>,
    bytes: Arc<dyn BlobReader>,
    len: u64,
    per_thread: Box<[ThreadCounters]>,
    closed: AtomicBool,
    /// Notes what is read while the device starts.
    recorder: Option<Arc<StartRecorder>>,
}

impl Volume {
    /// A volume for `threads` answering threads, each with its own [`ThreadCounters`].
    #[must_use]
    pub fn new(image: Arc<dyn BlockImage>, bytes: Arc<dyn BlobReader>, threads: usize) -> Self {
        let len = image.len();
        let per_thread = (0..threads.max(1)).map(|_| ThreadCounters::default()).collect();
        Self {
            image,
            bytes,
            len,
            per_thread,
            closed: AtomicBool::new(false),
            recorder: None,
        }
    }

    /// The same, whose reads are noted by `recorder` until the start is over.
    #[must_use]
    pub fn recorded(self, recorder: Arc<StartRecorder>) -> Self {
        Self {
            recorder: Some(recorder),
            ..self
        }
    }

    /// Notes a read whose bytes are at hand.
    fn note(&self, range: LayerRange, from: ReadFrom) {
        if let Some(recorder) = &self.recorder {
            recorder.note(range.layer, range.range, from);
        }
    }

    /// The image's length in bytes, a multiple of the block size.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is no block at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The counters of the answering thread `thread`; threads past the number given to [`Volume::new`] share.
    #[must_use]
    pub fn counters(&self, thread: usize) -> &ThreadCounters {
        &self.per_thread[thread % self.per_thread.len()]
    }

    /// All counters added up.
    #[must_use]
    pub fn stats(&self) -> DeviceStats {
        snapshot(self.per_thread.iter())
    }

    /// Fills `buf` with the image from `offset` on as far as it is here, and says what is missing. Never blocks.
    ///
    /// # Errors
    /// [`ReadError::Unaligned`] when the range is not made of whole blocks; [`ReadError::Fetch`] when nothing more is read of the
    /// device.
    pub fn look<'v>(
        &'v self,
        offset: u64,
        buf: &mut [u8],
        scratch: &mut Scratch<'v>,
        counters: &ThreadCounters,
    ) -> Result<Found, ReadError> {
        let unaligned = || ReadError::Unaligned { offset, len: buf.len() };
        let len = u64::try_from(buf.len()).map_err(|_| unaligned())?;
        if !offset.is_multiple_of(BLOCK_SIZE) || !len.is_multiple_of(BLOCK_SIZE) {
            return Err(unaligned());
        }
        // Names and modes are as much of a lie as bytes then.
        if let Some(error) = self.bytes.poisoned() {
            return Err(error.clone().into());
        }
        scratch.pieces.clear();
        scratch.gaps.clear();
        self.image
            .pieces(offset / BLOCK_SIZE, len / BLOCK_SIZE, &mut scratch.pieces);
        if let [only] = scratch.pieces[..] {
            match only.origin {
                Origin::Zero => {
                    counters.bytes(Source::Zero, len);
                    return Ok(Found::Zero);
                }
                Origin::Layer(layer, start) => {
                    let range = LayerRange {
                        layer,
                        range: TarRange::new(start, only.len),
                    };
                    let located = self.bytes.locate(range);
                    if let Located::Memory(slices) = &located
                        && let [slice] = &slices[..]
                        && slice.len() == buf.len()
                    {
                        counters.bytes(Source::Memory, len);
                        self.note(range, ReadFrom::Memory);
                        return Ok(Found::Memory(slice.clone()));
                    }
                    self.place_located(&located, 0, range, buf, &mut scratch.gaps, counters)?;
                    return Ok(if scratch.gaps.is_empty() {
                        Found::Filled
                    } else {
                        Found::Gaps
                    });
                }
                Origin::Metadata => {}
            }
        }
        self.assemble(offset, buf, scratch, counters)
    }

    /// The general case of [`Volume::look`]: piece by piece.
    fn assemble<'v>(
        &'v self,
        offset: u64,
        buf: &mut [u8],
        scratch: &mut Scratch<'v>,
        counters: &ThreadCounters,
    ) -> Result<Found, ReadError> {
        let Scratch { pieces, gaps } = scratch;
        let mut at = 0;
        for piece in pieces.iter() {
            // Pieces that do not add up to the request would be an image's mistake; they must not become a panic here.
            let len = usize::try_from(piece.len).unwrap_or(usize::MAX).min(buf.len() - at);
            let target = &mut buf[at..at + len];
            match piece.origin {
                Origin::Zero => {
                    target.fill(0);
                    counters.bytes(Source::Zero, piece.len);
                }
                Origin::Metadata => {
                    let first = (offset + to_u64(at)) / BLOCK_SIZE;
                    for (block, out) in (first..).zip(target.chunks_exact_mut(BLOCK)) {
                        self.image.fill_metadata(block, out);
                    }
                    counters.bytes(Source::Metadata, piece.len);
                }
                Origin::Layer(layer, start) => {
                    let range = LayerRange {
                        layer,
                        range: TarRange::new(start, to_u64(len)),
                    };
                    self.place_located(&self.bytes.locate(range), at, range, buf, gaps, counters)?;
                }
            }
            at += len;
        }
        if at != buf.len() {
            return Err(ReadError::WrongLength {
                wanted: to_u64(buf.len()),
                got: to_u64(at),
            });
        }
        Ok(if gaps.is_empty() { Found::Filled } else { Found::Gaps })
    }

    /// Copies `range`'s bytes to `buf[at..]` if they are in memory, or can be read without waiting; or adds a gap.
    fn place_located<'v>(
        &'v self,
        located: &Located<'v>,
        at: usize,
        range: LayerRange,
        buf: &mut [u8],
        gaps: &mut Vec<Gap<'v>>,
        counters: &ThreadCounters,
    ) -> Result<(), ReadError> {
        let wanted = range.range.len;
        let len = usize::try_from(wanted).unwrap_or(usize::MAX).min(buf.len() - at);
        let (file, on_disk) = match *located {
            Located::Memory(ref slices) => {
                let whole = Gap {
                    at,
                    len,
                    range,
                    file: None,
                    on_disk: false,
                };
                fill_gaps(&[whole], slices, buf)?;
                counters.bytes(Source::Memory, wanted);
                self.note(range, ReadFrom::Memory);
                return Ok(());
            }
            Located::File(fd, offset) => {
                self.note(range, ReadFrom::Disk);
                (Some((fd, offset)), true)
            }
            Located::Disk => {
                if buf
                    .get_mut(at..at + len)
                    .is_some_and(|target| self.bytes.read_at_once(range, target))
                {
                    counters.bytes(Source::Disk, wanted);
                    self.note(range, ReadFrom::Disk);
                    return Ok(());
                }
                (None, true)
            }
            Located::Elsewhere => (None, false),
        };
        gaps.push(Gap {
            at,
            len,
            range,
            file,
            on_disk,
        });
        Ok(())
    }

    /// Counts a failed read, and logs it unless there were many: a reader that reads on regardless must not fill the disk.
    pub fn failed(&self, counters: &ThreadCounters, offset: u64, len: usize, error: &ReadError) {
        counters.error();
        let errors = self.stats().errors;
        if errors <= LOGGED_ERRORS {
            log::error!("read of {len} bytes at {offset} failed (EIO): {error}");
        }
        if errors == LOGGED_ERRORS {
            log::error!("that was failure {errors}; from now on they are only counted");
        }
    }

    /// From now on nothing is fetched any more: a read of what is not here fails at once. For a device that is being taken
    /// down while it is still read.
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Asks the fetch thread for the gaps; `waiter` is told when they are all here, in the order of `gaps`. A waiter that is
    /// dropped untold has to end its read itself.
    pub fn fetch(&self, gaps: &[Gap<'_>], waiter: Box<dyn ReadCallback>) {
        if self.closed.load(Ordering::Acquire) {
            return;
        }
        let waiter = match &self.recorder {
            Some(recorder) if !recorder.is_over() => Box::new(RecordedCallback::new(recorder, gaps, waiter)),
            _ => waiter,
        };
        self.bytes.read(gaps.iter().map(|gap| gap.range).collect(), waiter);
    }

    /// Fills `buf` with the image from `offset` on, waiting for what is not here.
    ///
    /// # Errors
    /// Whatever kept the bytes away.
    pub fn read_blocking<'v>(
        &'v self,
        offset: u64,
        buf: &mut [u8],
        scratch: &mut Scratch<'v>,
    ) -> Result<(), ReadError> {
        let counters = self.counters(0);
        counters.read();
        match self.look(offset, buf, scratch, counters)? {
            Found::Zero => buf.fill(0),
            Found::Memory(slice) => buf.copy_from_slice(&slice),
            Found::Filled => {}
            Found::Gaps => {
                let (tell, told) = mpsc::sync_channel(1);
                self.fetch(&scratch.gaps, Box::new(ChannelCallback(tell)));
                let slices = told.recv().map_err(|_| ReadError::Stopped)??;
                fill_gaps(&scratch.gaps, &slices, buf)?;
                GapBytes::of(&scratch.gaps).count(counters);
            }
        }
        Ok(())
    }
}

/// Tells the recorder of a start when a read does not wait any more, then whoever waits for it.
struct RecordedCallback {
    recorder: Arc<StartRecorder>,
    waiting: SmallVec<[Waiting; 2]>,
    by_another_device: bool,
    inner: Option<Box<dyn ReadCallback>>,
}

impl RecordedCallback {
    /// For `gaps`; those in local files were noted when they were found.
    fn new(recorder: &Arc<StartRecorder>, gaps: &[Gap<'_>], inner: Box<dyn ReadCallback>) -> Self {
        let note = |gap: &Gap<'_>| {
            let from = if gap.on_disk { ReadFrom::Disk } else { ReadFrom::Origin };
            recorder.note_waiting(gap.range.layer, gap.range.range, from)
        };
        Self {
            recorder: Arc::clone(recorder),
            waiting: gaps.iter().filter(|gap| gap.file.is_none()).filter_map(note).collect(),
            by_another_device: false,
            inner: Some(inner),
        }
    }
}

impl ReadCallback for RecordedCallback {
    fn by_another_device(&mut self) {
        self.by_another_device = true;
    }

    fn complete(mut self: Box<Self>, outcome: Result<Vec<Slice>, FetchError>) {
        let inner = self.inner.take();
        drop(self);
        if let Some(inner) = inner {
            inner.complete(outcome);
        }
    }
}

impl Drop for RecordedCallback {
    /// Also of one that is dropped untold: then the read ends some other way.
    fn drop(&mut self) {
        for waiting in self.waiting.drain(..) {
            self.recorder.came(waiting, self.by_another_device);
        }
    }
}

/// Wakes a thread that waits on a channel.
struct ChannelCallback(mpsc::SyncSender<Result<Vec<Slice>, FetchError>>);

impl ReadCallback for ChannelCallback {
    fn complete(self: Box<Self>, outcome: Result<Vec<Slice>, FetchError>) {
        // The receiver may have gone; then the bytes are not wanted any more.
        let _ = self.0.try_send(outcome);
    }
}

/// Copies what fetching brought to where the gaps are.
///
/// # Errors
/// [`ReadError::WrongLength`] when the slices are not exactly as long as the gaps.
pub fn fill_gaps(gaps: &[Gap<'_>], slices: &[Slice], buf: &mut [u8]) -> Result<(), ReadError> {
    let wanted: usize = gaps.iter().map(|gap| gap.len).sum();
    let got: usize = slices.iter().map(|slice| slice.len()).sum();
    if wanted != got {
        return Err(ReadError::WrongLength {
            wanted: to_u64(wanted),
            got: to_u64(got),
        });
    }
    let mut slices = slices.iter();
    let mut rest: &[u8] = &[];
    for gap in gaps {
        let mut target = &mut buf[gap.at..gap.at + gap.len];
        while !target.is_empty() {
            if rest.is_empty() {
                let Some(slice) = slices.next() else { break };
                rest = slice;
            }
            let n = rest.len().min(target.len());
            let (now, later) = target.split_at_mut(n);
            now.copy_from_slice(&rest[..n]);
            rest = &rest[n..];
            target = later;
        }
    }
    Ok(())
}

/// The bytes of gaps, by where they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GapBytes {
    disk: u64,
    fetched: u64,
}

impl GapBytes {
    /// Adds up `gaps`.
    #[must_use]
    pub fn of(gaps: &[Gap<'_>]) -> Self {
        let mut sum = Self::default();
        for gap in gaps {
            let place = if gap.on_disk { &mut sum.disk } else { &mut sum.fetched };
            *place += to_u64(gap.len);
        }
        sum
    }

    /// Counts them as served.
    pub fn count(self, counters: &ThreadCounters) {
        counters.bytes(Source::Disk, self.disk);
        counters.bytes(Source::Fetched, self.fetched);
    }
}

const BLOCK: usize = 4096;

/// After this many failed reads of one device, failures are only counted.
const LOGGED_ERRORS: u64 = 100;

/// Lossless on every platform that Rust's `usize` has: there is none wider than 64 bits.
pub(super) fn to_u64(n: usize) -> u64 {
    u64::try_from(n).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Mutex;

    use super::*;
    use crate::units::{LayerId, TarOffset};

    /// Six blocks: metadata, zeros, a layer block in memory, one in a file, one elsewhere, and a file's end before zeros.
    #[derive(Debug)]
    struct Sample;

    const TAIL: u64 = 100;

    impl BlockImage for Sample {
        fn len(&self) -> u64 {
            6 * BLOCK_SIZE
        }

        fn pieces(&self, block: u64, count: u64, out: &mut Vec<Piece>) {
            for block in block..block + count {
                let layer = |n| Origin::Layer(LayerId(n), TarOffset(block * BLOCK_SIZE));
                let (len, origin) = match block {
                    0 => (BLOCK_SIZE, Origin::Metadata),
                    2 => (BLOCK_SIZE, layer(0)),
                    3 => (BLOCK_SIZE, layer(1)),
                    4 => (BLOCK_SIZE, layer(2)),
                    5 => (TAIL, layer(0)),
                    _ => (BLOCK_SIZE, Origin::Zero),
                };
                out.push(Piece { len, origin });
                if len < BLOCK_SIZE {
                    out.push(Piece {
                        len: BLOCK_SIZE - len,
                        origin: Origin::Zero,
                    });
                }
            }
        }

        fn fill_metadata(&self, block: u64, out: &mut [u8]) {
            out.fill(b'm' + u8::try_from(block).unwrap());
        }
    }

    /// Layer bytes are the letter `a`, in slices of 1000 bytes; what is read is kept.
    #[derive(Debug)]
    struct Letters {
        asked: Mutex<Vec<LayerRange>>,
        short: bool,
        file: std::fs::File,
    }

    impl Letters {
        fn slices(range: TarRange) -> Vec<Slice> {
            let len = usize::try_from(range.len).unwrap();
            vec![b'a'; len]
                .chunks(1000)
                .map(|chunk| Slice::from(chunk.to_vec()))
                .collect()
        }
    }

    impl BlobReader for Letters {
        fn locate(&self, range: LayerRange) -> Located<'_> {
            match range.layer.0 {
                0 => Located::Memory(Self::slices(range.range).into()),
                1 => Located::File(self.file.as_fd(), range.range.start.0),
                _ => Located::Elsewhere,
            }
        }

        fn read(&self, ranges: Vec<LayerRange>, waiter: Box<dyn ReadCallback>) {
            let mut slices: Vec<Slice> = ranges.iter().flat_map(|range| Self::slices(range.range)).collect();
            if self.short {
                slices.pop();
            }
            self.asked.lock().unwrap().extend(ranges);
            waiter.complete(Ok(slices));
        }
    }

    fn volume(short: bool) -> Volume {
        Volume::new(
            Arc::new(Sample),
            Arc::new(Letters {
                short,
                asked: Mutex::default(),
                file: std::fs::File::open("/dev/null").unwrap(),
            }),
            1,
        )
    }

    fn look(volume: &Volume, block: u64, count: usize) -> (Found, Vec<u8>, Vec<Gap<'_>>) {
        let mut buf = vec![b'?'; count * BLOCK];
        let mut scratch = Scratch::default();
        let found = volume
            .look(block * BLOCK_SIZE, &mut buf, &mut scratch, volume.counters(0))
            .unwrap();
        (found, buf, scratch.gaps)
    }

    #[test]
    fn each_origin_by_itself() {
        let volume = volume(false);
        assert!(matches!(look(&volume, 0, 1), (Found::Filled, buf, _) if buf.iter().all(|&byte| byte == b'm')));
        assert!(matches!(look(&volume, 1, 1).0, Found::Zero));
        assert!(matches!(look(&volume, 2, 1), (Found::Filled, buf, _) if buf.iter().all(|&byte| byte == b'a')));
        let (found, _, gaps) = look(&volume, 3, 1);
        assert!(matches!(found, Found::Gaps));
        assert_eq!(
            (gaps.len(), gaps[0].file.map(|(_, at)| at), gaps[0].len),
            (1, Some(3 * BLOCK_SIZE), BLOCK)
        );
        let (found, _, gaps) = look(&volume, 4, 1);
        assert!(matches!(found, Found::Gaps));
        assert!(gaps[0].file.is_none());
        assert_eq!(gaps[0].range.range.start.0, 4 * BLOCK_SIZE);
        let (found, buf, _) = look(&volume, 5, 1);
        assert!(matches!(found, Found::Filled));
        assert_eq!((buf[99], buf[100], buf[4095]), (b'a', 0, 0));
    }

    #[test]
    fn all_origins_in_one_read() {
        let volume = volume(false);
        let (found, buf, gaps) = look(&volume, 0, 6);
        assert!(matches!(found, Found::Gaps));
        assert_eq!(
            gaps.iter().map(|gap| (gap.at, gap.len)).collect::<Vec<_>>(),
            [(3 * BLOCK, BLOCK), (4 * BLOCK, BLOCK)]
        );
        // Only the gaps are untouched.
        let untouched = buf
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == b'?')
            .map(|(at, _)| at / BLOCK);
        assert!(untouched.clone().all(|block| block == 3 || block == 4));
        assert_eq!(untouched.count(), 2 * BLOCK);

        let mut whole = vec![b'?'; 6 * BLOCK];
        volume.read_blocking(0, &mut whole, &mut Scratch::default()).unwrap();
        let mut expected = vec![b'm'; BLOCK];
        expected.extend(vec![0; BLOCK]);
        expected.extend(vec![b'a'; 3 * BLOCK + 100]);
        expected.resize(6 * BLOCK, 0);
        assert!(whole == expected);
        let bytes = volume.stats().bytes;
        assert_eq!((bytes.disk, bytes.fetched), (BLOCK_SIZE, BLOCK_SIZE));
    }

    #[test]
    fn blocks_past_the_end_are_zero() {
        assert!(matches!(look(&volume(false), 1000, 1).0, Found::Zero));
    }

    #[test]
    fn odd_reads_are_refused() {
        let volume = volume(false);
        for (offset, len) in [(1, BLOCK), (0, 17), (BLOCK_SIZE - 1, BLOCK)] {
            let read = volume.read_blocking(offset, &mut vec![0; len], &mut Scratch::default());
            assert!(matches!(read, Err(ReadError::Unaligned { .. })));
        }
    }

    #[test]
    fn too_few_bytes_are_an_error_and_never_served() {
        let read = volume(true).read_blocking(4 * BLOCK_SIZE, &mut [0; BLOCK], &mut Scratch::default());
        assert!(
            matches!(
                read,
                Err(ReadError::WrongLength {
                    wanted: 4096,
                    got: 4000
                })
            ),
            "{read:?}"
        );
    }

    #[test]
    fn a_closed_volume_fetches_nothing() {
        let volume = volume(false);
        volume.close();
        let mut buf = [0; BLOCK];
        volume
            .read_blocking(2 * BLOCK_SIZE, &mut buf, &mut Scratch::default())
            .unwrap();
        let read = volume.read_blocking(4 * BLOCK_SIZE, &mut buf, &mut Scratch::default());
        assert!(matches!(read, Err(ReadError::Stopped)));
    }
}
