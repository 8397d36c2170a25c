//! One hardware queue of a ublk device. In: the driver's requests. Out: their answers.
//!
//! A queue is one thread with one ring and one task for every tag. A task looks its request up in the volume; what is in
//! memory it commits from where it lies, metadata it computes into a buffer, local files it reads through the
//! queue's own ring, and for everything else it leaves a request with the fetch thread and sleeps until the answer lands
//! (see `completion`). Nothing in here may block but `io_uring_enter`.
//!
//! Buffers belong to the queue, not to its tags: the kernel hands out tags by turns, and 128 buffers that have each been
//! touched once are memory wasted. The driver copies an answer while it takes the commit, so a buffer is free again when
//! a system call of the queue has returned and left nothing in the submission queue.
//!
//! Rules that libublk 0.4 imposes: a future of an operation must be awaited to its end, never dropped (its slot would
//! leak, and the kernel might still write to the buffer); and nothing may be committed once the queue is stopping (the
//! command would never be submitted and its future never resolve).

use std::cell::{Cell, RefCell};
use std::os::fd::{AsRawFd as _, BorrowedFd, RawFd};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use io_uring::{IoUring, opcode, squeue, types};
use libublk::helpers::IoBuf;
use libublk::io::{UblkDev, UblkQueue};
use libublk::uring_async::{UblkUringOpFuture, ublk_reap_io_events_with_update_queue, ublk_wake_task};
use libublk::{BufDesc, UblkError, UblkUringData, sys, ublk_init_task_ring, with_task_io_ring_mut};

use super::completion::{Completion, RingCallback};
use crate::cache::Slice;
use crate::device::stats::ThreadCounters;
use crate::device::volume::{Found, Gap, GapBytes, ReadError, Scratch, Volume, fill_gaps, to_u64};
use crate::fetch::FetchError;
use crate::units::BLOCK_SIZE;

/// [`BLOCK_SIZE`] as a length in memory.
const BLOCK: usize = 4096;

/// One hit in this many has its time taken.
const SAMPLE: u32 = 16;

/// What a queue thread shares with the threads that start and end its device.
#[derive(Debug)]
pub(super) struct QueueControl {
    /// What each tag waits for, if it does.
    waits: Vec<Mutex<Option<Arc<Completion>>>>,
    /// Wakes the queue's thread. None before it serves, and after.
    bell: Mutex<Option<Arc<Completion>>>,
    end: AtomicU8,
}

/// How a queue is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// Not yet.
    NotYet,
    /// The device is being stopped: every request has to be answered, with an error if need be.
    Stop,
    /// Another process will serve the device: requests that are not answered yet are left to it.
    Leave,
}

impl QueueControl {
    /// For a queue of `depth` tags.
    pub(super) fn new(depth: u16) -> Arc<Self> {
        Arc::new(Self {
            waits: (0..depth).map(|_| Mutex::new(None)).collect(),
            bell: Mutex::new(None),
            end: AtomicU8::new(0),
        })
    }

    fn end(&self) -> End {
        match self.end.load(Ordering::SeqCst) {
            0 => End::NotYet,
            1 => End::Stop,
            _ => End::Leave,
        }
    }

    /// Remembers what `tag` waits for. What is wanted no more does not have to be waited for.
    fn wait_for(&self, tag: u16, completion: &Arc<Completion>) {
        if let Some(slot) = self.waits.get(usize::from(tag)) {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(completion));
        }
        // After it can be seen by `give_up`, and so not missed by both. Who stops a device gives reads a moment.
        if self.end() == End::Leave {
            completion.give_up();
        }
    }

    fn arrived(&self, tag: u16) {
        if let Some(slot) = self.waits.get(usize::from(tag)) {
            *slot.lock().unwrap_or_else(PoisonError::into_inner) = None;
        }
    }

    /// From now on reads that cannot be answered may fail.
    pub(super) fn stop(&self) {
        self.end.store(1, Ordering::SeqCst);
    }

    /// Ends every wait for the fetch thread without bytes.
    pub(super) fn give_up(&self) {
        for slot in &self.waits {
            let completion = slot.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(completion) = completion {
                completion.give_up();
            }
        }
    }

    /// Ends the queue's thread without stopping the device: what has not been answered is left to the next server.
    pub(super) fn leave(&self) {
        self.end.store(2, Ordering::SeqCst);
        self.give_up();
        self.ring();
    }

    /// Wakes the queue's thread, if it can sleep. Holds the lock meanwhile, so that the thread's ring stays.
    fn ring(&self) {
        if let Some(bell) = &*self.bell.lock().unwrap_or_else(PoisonError::into_inner) {
            bell.give_up();
        }
    }

    /// Lets others wake this thread by a message to its ring, until the guard is dropped: the ring ends with the thread.
    fn hang_bell(&self, bell: Arc<Completion>) -> HungBell<'_> {
        *self.bell.lock().unwrap_or_else(PoisonError::into_inner) = Some(bell);
        HungBell(self)
    }
}

/// While it lives, a queue's thread can be woken.
struct HungBell<'a>(&'a QueueControl);

impl Drop for HungBell<'_> {
    fn drop(&mut self) {
        *self.0.bell.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Where the queue threads of a device wait for each other before they fetch their first requests.
///
/// A process that is killed when some queues have fetched and others have not leaves a device that some kernels (6.16 to
/// 6.19) can neither give to another server nor delete. So they fetch at the same time, as nearly as can be: it is a matter
/// of microseconds, and worth spinning for.
#[derive(Debug)]
pub(super) struct StartLine {
    missing: AtomicUsize,
    called_off: AtomicBool,
}

impl StartLine {
    /// For `queues` threads.
    pub(super) fn new(queues: usize) -> Arc<Self> {
        Arc::new(Self {
            missing: AtomicUsize::new(queues),
            called_off: AtomicBool::new(false),
        })
    }

    /// Lets those that wait go without a start.
    pub(super) fn call_off(&self) {
        self.called_off.store(true, Ordering::SeqCst);
    }

    /// Waits for the others; false when one will not come.
    fn wait(&self) -> bool {
        self.missing.fetch_sub(1, Ordering::SeqCst);
        let mut looks = 0u32;
        while self.missing.load(Ordering::SeqCst) != 0 {
            if self.called_off.load(Ordering::SeqCst) {
                return false;
            }
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(LookOut::PER_YIELD) {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        true
    }
}

/// Everything the tasks of one queue share.
struct QueueContext<'a> {
    queue: UblkQueue<'a>,
    volume: &'a Volume,
    counters: &'a ThreadCounters,
    control: &'a QueueControl,
    io_bytes: usize,
    /// Zeros for the largest request from [`QueueContext::zeros`] on. Never written, so they cost no memory.
    zeros: Box<[u8]>,
    /// Ready to be used, the last used first.
    buffers: RefCell<Vec<IoBuf<u8>>>,
    /// Committed, and free after the next system call.
    retiring: RefCell<Vec<IoBuf<u8>>>,
    scratch: RefCell<Vec<Scratch<'a>>>,
    sampled: Cell<u32>,
    /// Requests that a task is about to answer.
    busy: Cell<usize>,
}

impl QueueContext<'_> {
    /// Where zeros are. They begin with a page: the driver may stop copying an answer between pages when this process is
    /// killed, and then asks the next server for the rest, counted in sectors of 512 bytes.
    fn zeros(&self) -> *const u8 {
        let start = self.zeros.as_ptr();
        start.wrapping_add(start.align_offset(BLOCK))
    }

    fn take_buffer(&self) -> IoBuf<u8> {
        self.buffers
            .borrow_mut()
            .pop()
            .unwrap_or_else(|| IoBuf::new(self.io_bytes))
    }

    fn give_back(&self, buf: IoBuf<u8>) {
        self.buffers.borrow_mut().push(buf);
    }
}

/// How a request is answered: with which bytes, and how many of them or which error.
enum Answer {
    /// From a buffer, past so many bytes.
    Buffer(IoBuf<u8>, usize, i32),
    /// Zeros.
    Zeros(i32),
    /// From memory of the fetch room, which this keeps alive until the tag's next request.
    Memory(Slice, i32),
    /// Nothing but a result: zero, or a negative errno.
    Bare(i32),
}

/// Serves queue `id` until the device is stopped, or the queue is to leave it. `ready` is called once, with the reason if the
/// queue could not be set up, and before anything is served; then it waits at `start_line`.
///
/// Returns the ring of a queue that left with fetches in flight. It is to be closed when the thread has ended, whose end ends
/// them: Linux 6.12 frees requests twice when a ring is closed with fetches in it.
pub(super) fn serve(
    id: u16,
    dev: &UblkDev,
    volume: &Volume,
    control: &QueueControl,
    start_line: &StartLine,
    ready: impl FnOnce(Result<(), UblkError>),
) -> Option<IoUring> {
    let depth = dev.dev_info.queue_depth;
    let queue = match init_ring(depth).and_then(|()| UblkQueue::new(id, dev)) {
        Ok(queue) => queue,
        Err(error) => {
            ready(Err(error));
            return None;
        }
    };
    let io_bytes = usize::try_from(dev.dev_info.max_io_buf_bytes).unwrap_or(1 << 19);
    let context = QueueContext {
        queue,
        volume,
        counters: volume.counters(usize::from(id)),
        control,
        io_bytes,
        zeros: vec![0; io_bytes + BLOCK].into_boxed_slice(),
        buffers: RefCell::default(),
        retiring: RefCell::default(),
        scratch: RefCell::default(),
        sampled: Cell::new(0),
        busy: Cell::new(0),
    };
    let executor = smol::LocalExecutor::new();
    let context = Rc::new(context);
    // What FETCH names as its buffer is only ever written by a WRITE, which a read-only device does not get.
    let unused = Rc::new(IoBuf::<u8>::new(io_bytes));
    let tag_task = |tag| executor.spawn(serve_tag(Rc::clone(&context), tag, Rc::clone(&unused)));
    let tasks: Vec<_> = context.queue.tags().map(tag_task).collect();
    let bell = UblkUringOpFuture::new(TARGET);
    let _hung = control.hang_bell(Completion::new(ring_fd(&context.queue), bell.user_data));
    // Has nothing to do but to be woken: then the thread looks why.
    let woken = executor.spawn(async move {
        bell.await;
    });
    // The first tick makes every task register its buffer and queue its first FETCH, which START_DEV waits for. They fit the
    // submission queue, so that one system call sends them all: see `StartLine`.
    while executor.try_tick() {}
    ready(Ok(()));
    if !start_line.wait() {
        return None;
    }
    let mut look_out = LookOut::default();
    let is_left = || control.end() == End::Leave && context.busy.get() == 0;
    while !(is_left() || tasks.iter().all(smol::Task::is_finished)) {
        if let Err(error) = wait_for_events(&context.queue, &mut look_out) {
            log::error!("ublk queue {id} ends: {error}");
            // Operations may still be in flight and write to the tags' buffers: those must never be freed.
            std::mem::forget((executor, tasks, woken, context, unused));
            return None;
        }
        // A kernel short of memory takes only a part of what is queued: then a commit may still be to come.
        if with_task_io_ring_mut(|ring: &mut IoUring<squeue::Entry>| ring.submission().is_empty()) {
            context.buffers.borrow_mut().append(&mut context.retiring.borrow_mut());
        }
        while executor.try_tick() {}
    }
    if !is_left() {
        return None;
    }
    // These tasks wait for requests: nothing but the driver's answer is in flight for them.
    drop((tasks, woken, executor));
    if let Ok(context) = Rc::try_unwrap(context) {
        abandon(context.queue);
    }
    match IoUring::new(1) {
        Ok(empty) => Some(with_task_io_ring_mut(|ring| std::mem::replace(ring, empty))),
        Err(error) => {
            log::error!("cannot make a ring: {error}");
            None
        }
    }
}

/// Lets go of a queue whose fetches are still with the driver. Dropping it would take its file out of the ring first, and
/// kernels before 6.13 wait for all fetches to end before they do that.
fn abandon(queue: UblkQueue<'_>) {
    let requests = std::ptr::from_ref(queue.get_iod(0)).cast_mut();
    let bytes = (queue.tags().count() * size_of::<sys::ublksrv_io_desc>()).next_multiple_of(rustix::param::page_size());
    // What is forgotten is a ring's registration, which ends with the ring, and this mapping.
    std::mem::forget(queue);
    // SAFETY: the mapping is the queue's, as long as libublk made it: all its tags' requests from the first on, in whole pages.
    // Nothing refers to it any more. It has to go because it keeps the device open.
    #[allow(unsafe_code)]
    let unmapped = unsafe { libc::munmap(requests.cast(), bytes) };
    if unmapped != 0 {
        log::error!("cannot let go of a ublk queue: {}", std::io::Error::last_os_error());
    }
}

/// Makes this thread's ring. `DEFER_TASKRUN` (Linux 6.1) runs completions when this thread asks for them instead of by
/// interrupting it; the completion queue is large because every tag may have reads and messages in flight.
fn init_ring(depth: u16) -> Result<(), UblkError> {
    ublk_init_task_ring(|cell| {
        if cell.get().is_none() {
            let entries = u32::from(depth).next_power_of_two();
            let ring = IoUring::builder()
                .setup_cqsize(entries * 8)
                .setup_single_issuer()
                .setup_defer_taskrun()
                .setup_taskrun_flag()
                .build(entries)
                .or_else(|_| {
                    IoUring::builder()
                        .setup_cqsize(entries * 8)
                        .setup_coop_taskrun()
                        .build(entries)
                })?;
            cell.set(RefCell::new(ring))
                .map_err(|_| UblkError::OtherError(-libc::EEXIST))?;
        }
        Ok(())
    })
}

/// Looking out for the next request before going to sleep.
///
/// Falling asleep and being woken costs more than a read from memory. While requests follow close on one another, looking
/// out for a moment is cheaper; each time it was in vain, it is left for twice as many sleeps, so that an idle queue or a
/// slow reader costs nothing. Whoever else can run on this CPU is let through, for it may be the one who will ask.
#[derive(Debug, Default)]
struct LookOut {
    /// How many sleeps to go before looking out again.
    skip: u32,
    /// How many were skipped the last time.
    skipped: u32,
}

impl LookOut {
    /// How often it looks: some 50 microseconds in all.
    const LOOKS: u32 = 1024;
    /// How often it looks between letting others run.
    const PER_YIELD: u32 = 64;
    /// The most sleeps in a row without looking out.
    const MOST_SKIPPED: u32 = 1023;

    /// Whether it is worth looking out this time.
    fn is_due(&mut self) -> bool {
        let due = self.skip == 0;
        self.skip = self.skip.saturating_sub(1);
        due
    }

    /// Looks out for `arrived`; true when it did.
    fn look(&mut self, mut arrived: impl FnMut() -> bool) -> bool {
        for look in 1..=Self::LOOKS {
            if arrived() {
                self.skipped = 0;
                return true;
            }
            if look % Self::PER_YIELD == 0 {
                std::thread::yield_now();
            } else {
                std::hint::spin_loop();
            }
        }
        self.skipped = (self.skipped * 2 + 1).min(Self::MOST_SKIPPED);
        self.skip = self.skipped;
        false
    }
}

/// Submits what the tasks have queued, waits until something completes, and wakes the tasks concerned.
fn wait_for_events(queue: &UblkQueue<'_>, look_out: &mut LookOut) -> Result<(), UblkError> {
    let entered = with_task_io_ring_mut(|ring: &mut IoUring<squeue::Entry>| {
        if look_out.is_due() {
            ring.submit()?;
            if look_out.look(|| ring.submission().taskrun() || !ring.completion().is_empty()) {
                return ring.submit_and_wait(0);
            }
        }
        ring.submit_and_wait(1)
    });
    match entered {
        Ok(_) => {}
        // Interrupted by a signal, or the completion queue has to be emptied first.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN)) => {}
        Err(error) => return Err(error.into()),
    }
    ublk_reap_io_events_with_update_queue(queue, false, None, |cqe| ublk_wake_task(cqe.user_data(), cqe))?;
    Ok(())
}

/// The life of one tag: fetch a request, answer it, fetch the next.
async fn serve_tag(context: Rc<QueueContext<'_>>, tag: u16, unused: Rc<IoBuf<u8>>) {
    let queue = &context.queue;
    let mut next = queue
        .submit_io_prep_cmd(tag, BufDesc::Slice(unused.as_slice()), 0, Some(&unused))
        .await;
    loop {
        match next {
            Ok(SERVE) => {}
            Ok(other) => {
                log::error!("ublk tag {tag} is lost: the driver answered {other}");
                return;
            }
            Err(_) => return,
        }
        context.busy.set(context.busy.get() + 1);
        let answer = answer(&context, tag).await;
        context.busy.set(context.busy.get() - 1);
        let Some(answer) = answer else { return };
        if queue.is_stopping() || context.control.end() == End::Leave {
            return;
        }
        let (address, result) = match &answer {
            Answer::Zeros(result) => (context.zeros(), *result),
            Answer::Memory(slice, result) => (slice.as_ptr(), *result),
            Answer::Buffer(buf, skip, result) => (buf.as_ptr().wrapping_add(*skip), *result),
            Answer::Bare(result) => (unused.as_ptr(), *result),
        };
        // A slice is kept until the commit's completion, which is the tag's next request.
        let _kept = match answer {
            Answer::Buffer(buf, ..) => {
                context.retiring.borrow_mut().push(buf);
                None
            }
            Answer::Memory(slice, _) => Some(slice),
            Answer::Zeros(_) | Answer::Bare(_) => None,
        };
        next = queue
            .submit_io_commit_cmd(tag, BufDesc::RawAddress(address), result)
            .await;
    }
}

/// The driver's "here is a request".
#[allow(clippy::as_conversions, clippy::cast_possible_wrap)] // a small constant that bindgen gives as u32
const SERVE: i32 = sys::UBLK_IO_RES_OK as i32;

/// Answers the request that tag `tag` holds; none when it is to be left to the next server.
async fn answer(context: &QueueContext<'_>, tag: u16) -> Option<Answer> {
    if context.control.end() == End::Leave {
        return None;
    }
    let request = context.queue.get_iod(tag);
    let (op, sectors, start) = (request.op_flags & 0xff, request.nr_sectors, request.start_sector);
    match op {
        sys::UBLK_IO_OP_READ => {}
        sys::UBLK_IO_OP_FLUSH => return Some(Answer::Bare(0)),
        sys::UBLK_IO_OP_WRITE => {
            context.counters.refused();
            return Some(Answer::Bare(-libc::EROFS));
        }
        _ => {
            context.counters.refused();
            return Some(Answer::Bare(-libc::EOPNOTSUPP));
        }
    }
    context.counters.read();
    let len = usize::try_from(sectors).unwrap_or(usize::MAX).saturating_mul(512);
    let offset = start.saturating_mul(512);
    // The rest of a request whose answer a kill cut short begins within a block; all others begin with one.
    let skip = usize::try_from(offset % BLOCK_SIZE).unwrap_or(0);
    let done = match i32::try_from(len) {
        Ok(done) if skip + len <= context.io_bytes => done,
        _ => return Some(Answer::Bare(-libc::EINVAL)),
    };
    let (offset, len) = (offset - to_u64(skip), skip + len);
    let sampled = context.sampled.get();
    context.sampled.set(sampled.wrapping_add(1));
    let began = sampled.is_multiple_of(SAMPLE).then(Instant::now);
    let mut scratch = context.scratch.borrow_mut().pop().unwrap_or_default();
    let mut buf = context.take_buffer();
    let found = context
        .volume
        .look(offset, &mut buf.as_mut_slice()[..len], &mut scratch, context.counters);
    let found = match found {
        Ok(Found::Gaps) => {
            let began = began.unwrap_or_else(Instant::now);
            let closed = close_gaps(context, tag, &scratch.gaps, &mut buf, len).await;
            context.counters.took(began.elapsed(), 1);
            closed
        }
        found => {
            if let Some(began) = began {
                context.counters.took(began.elapsed(), u64::from(SAMPLE));
            }
            found
        }
    };
    context.scratch.borrow_mut().push(scratch);
    Some(match found {
        Ok(Found::Filled | Found::Gaps) => Answer::Buffer(buf, skip, done),
        Ok(Found::Zero) => {
            context.give_back(buf);
            Answer::Zeros(done)
        }
        Ok(Found::Memory(slice)) => {
            context.give_back(buf);
            Answer::Memory(if skip == 0 { slice } else { slice.part(skip, len) }, done)
        }
        Err(error) => {
            context.give_back(buf);
            if is_stopped(&error) && wait_for_end(context, tag).await == End::Leave {
                return None;
            }
            context.volume.failed(context.counters, offset, len, &error);
            Answer::Bare(-libc::EIO)
        }
    })
}

/// Whether a read failed because the fetch thread ends, and not because of what it found.
fn is_stopped(error: &ReadError) -> bool {
    matches!(error, ReadError::Stopped | ReadError::Fetch(FetchError::Stopped))
}

/// Waits until the queue is to end. A fetch thread that ends before the device does says nothing of the bytes: the read is
/// for the next server to answer.
async fn wait_for_end(context: &QueueContext<'_>, tag: u16) -> End {
    while context.control.end() == End::NotYet {
        log::warn!("a read waits for another server of its device, because the fetch thread of this one is gone");
        let ended = UblkUringOpFuture::new(TARGET);
        let completion = Completion::new(ring_fd(&context.queue), ended.user_data);
        context.control.wait_for(tag, &completion);
        ended.await;
        context.control.arrived(tag);
    }
    context.control.end()
}

/// Brings what is missing: local files through this queue's ring, everything else from the fetch thread, all at once.
/// The buffer is filled, unless one slice turns out to be the whole request.
async fn close_gaps(
    context: &QueueContext<'_>,
    tag: u16,
    gaps: &[Gap<'_>],
    buf: &mut IoBuf<u8>,
    len: usize,
) -> Result<Found, ReadError> {
    let remote: Vec<Gap<'_>> = gaps.iter().filter(|gap| gap.file.is_none()).copied().collect();
    let fetched = (!remote.is_empty()).then(|| ask(context, tag, &remote));
    let unread = read_files(context, gaps, buf).await;
    let slices = match fetched {
        Some(asked) => hear(context, tag, asked).await?,
        None => Vec::new(),
    };
    if !unread.is_empty() {
        // The fetch thread finds out what is wrong with a file that cannot be read.
        let slices = hear(context, tag, ask(context, tag, &unread)).await?;
        fill_gaps(&unread, &slices, buf.as_mut_slice())?;
    }
    GapBytes::of(gaps).count(context.counters);
    if let ([gap], [slice]) = (&remote[..], &slices[..])
        && gap.len == len
        && slice.len() == len
    {
        return Ok(Found::Memory(slice.clone()));
    }
    fill_gaps(&remote, &slices, buf.as_mut_slice())?;
    Ok(Found::Filled)
}

/// Asks the fetch thread for `gaps`. What comes back has to be heard: the future may not be dropped.
fn ask(context: &QueueContext<'_>, tag: u16, gaps: &[Gap<'_>]) -> (UblkUringOpFuture, Arc<Completion>) {
    let arrival = UblkUringOpFuture::new(TARGET);
    let completion = Completion::new(ring_fd(&context.queue), arrival.user_data);
    context.control.wait_for(tag, &completion);
    context
        .volume
        .fetch(gaps, Box::new(RingCallback(Arc::clone(&completion))));
    (arrival, completion)
}

/// Waits for what the fetch thread was asked for.
async fn hear(
    context: &QueueContext<'_>,
    tag: u16,
    (arrival, completion): (UblkUringOpFuture, Arc<Completion>),
) -> Result<Vec<Slice>, ReadError> {
    arrival.await;
    context.control.arrived(tag);
    completion.take()
}

/// Marks a completion as ours, not the driver's.
#[allow(clippy::as_conversions)] // an enum's discriminant
const TARGET: u64 = UblkUringData::Target as u64;

fn ring_fd(queue: &UblkQueue<'_>) -> RawFd {
    queue.as_raw_fd()
}

/// Reads the gaps that lie in local files into `buf`, all in flight together. Returns those whose files did not give them.
async fn read_files<'v>(context: &QueueContext<'_>, gaps: &[Gap<'v>], buf: &mut IoBuf<u8>) -> Vec<Gap<'v>> {
    let base = buf.as_mut_ptr();
    let mut unread = Vec::new();
    let mut reads = Vec::new();
    for gap in gaps {
        if let Some((fd, offset)) = gap.file {
            reads.push((gap, 0, submit_read(context, base, gap, fd, offset, 0)));
        }
    }
    while let Some((gap, done, read)) = reads.pop() {
        let Some((fd, offset)) = gap.file else { continue };
        let result = read.await;
        let mut failed = |cause: &dyn std::fmt::Display| {
            log::debug!("read of {} bytes at {offset} of a local file: {cause}", gap.len);
            unread.push(*gap);
        };
        match usize::try_from(result) {
            Ok(0) => failed(&"it ends before"),
            Ok(n) if done + n >= gap.len => {}
            Ok(n) => reads.push((gap, done + n, submit_read(context, base, gap, fd, offset, done + n))),
            Err(_) if result == -libc::EINTR || result == -libc::EAGAIN => {
                reads.push((gap, done, submit_read(context, base, gap, fd, offset, done)));
            }
            Err(_) => failed(&std::io::Error::from_raw_os_error(-result)),
        }
    }
    unread
}

/// Queues a read of what `gap` still lacks after its first `done` bytes.
fn submit_read(
    context: &QueueContext<'_>,
    base: *mut u8,
    gap: &Gap<'_>,
    fd: BorrowedFd<'_>,
    offset: u64,
    done: usize,
) -> UblkUringOpFuture {
    // `look` keeps gaps inside the buffer that it was given.
    let target = base.wrapping_add(gap.at + done);
    let len = u32::try_from(gap.len - done).unwrap_or(u32::MAX);
    let entry = opcode::Read::new(types::Fd(fd.as_raw_fd()), target, len)
        .offset(offset + to_u64(done))
        .build();
    // The buffer outlives the operation because the task that holds it awaits it, and the task is not dropped before that.
    context.queue.ublk_submit_sqe(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many messages a ring has got.
    fn messages(ring: &mut IoUring) -> usize {
        ring.completion().count()
    }

    #[test]
    fn queues_start_together_or_not_at_all() {
        for comes in [true, false] {
            let line = StartLine::new(3);
            let started = std::thread::scope(|scope| {
                let waiting: Vec<_> = (0..2).map(|_| scope.spawn(|| line.wait())).collect();
                if comes {
                    assert!(line.wait());
                } else {
                    line.call_off();
                }
                waiting.into_iter().map(|one| one.join().unwrap()).collect::<Vec<_>>()
            });
            assert_eq!(started, [comes; 2]);
        }
    }

    #[test]
    fn who_waits_when_a_queue_leaves_is_woken_once() {
        let mut ring = IoUring::new(4).unwrap();
        let control = QueueControl::new(2);
        let completion = |user_data| Completion::new(ring.as_raw_fd(), user_data);
        let (before, after, bell) = (completion(1 << 16), completion(2 << 16), completion(3 << 16));
        assert_eq!(control.end(), End::NotYet);
        control.wait_for(0, &before);
        let hung = control.hang_bell(bell);
        assert_eq!(messages(&mut ring), 0);
        control.leave();
        assert_eq!(control.end(), End::Leave);
        assert!(matches!(before.take(), Err(ReadError::Stopped)));
        assert_eq!(messages(&mut ring), 2, "one for the wait, one for the bell");
        // Nothing is waited for any more, and nobody is woken twice.
        control.wait_for(1, &after);
        control.leave();
        assert_eq!(messages(&mut ring), 1);
        // The ring goes with the thread: nothing may be sent there.
        drop(hung);
        control.ring();
        assert_eq!(messages(&mut ring), 0);
    }

    #[test]
    fn a_stop_gives_reads_a_moment() {
        let mut ring = IoUring::new(4).unwrap();
        let control = QueueControl::new(1);
        control.stop();
        let completion = Completion::new(ring.as_raw_fd(), 1 << 16);
        control.wait_for(0, &completion);
        assert_eq!((control.end(), messages(&mut ring)), (End::Stop, 0));
        control.give_up();
        assert_eq!(messages(&mut ring), 1);
        control.arrived(0);
        control.give_up();
        assert_eq!(messages(&mut ring), 0);
    }

    #[test]
    fn looking_out_in_vain_becomes_rare_and_success_makes_it_usual_again() {
        let mut look_out = LookOut::default();
        let mut looked = 0;
        for _ in 0..100_000 {
            if look_out.is_due() {
                looked += 1;
                assert!(!look_out.look(|| false));
            }
        }
        assert!(
            (100..120).contains(&looked),
            "an idle queue looked out {looked} times in 100,000 sleeps"
        );
        while !look_out.is_due() {}
        assert!(look_out.look(|| true));
        assert!(look_out.is_due() && look_out.look(|| true) && look_out.is_due());
    }
}
