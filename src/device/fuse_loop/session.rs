//! The threads that take the kernel's requests. In: a connection, its ledger. Out: every request answered, or in the hands of the
//! fetch thread, until the filesystem is gone.
//!
//! They wait for requests and for nothing else. A thread answers first what it finds in its slot, which is how what a killed
//! process left is answered too.

use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use rustix::io::Errno;

use super::export::{Export, ThreadScratch};
use super::ledger::{Entry, PendingRead, Slot};
use super::protocol::Request;

/// The threads of one connection.
#[derive(Debug)]
pub(super) struct Session {
    threads: Vec<JoinHandle<()>>,
}

/// What a dead process left for one thread to answer.
#[derive(Default)]
struct Inherited {
    /// Slots that no thread of this process reads into.
    slots: Vec<Slot>,
    reads: Vec<(Entry, PendingRead)>,
}

impl Session {
    /// Takes the kernel's first request, and agrees on what both know.
    ///
    /// # Errors
    /// Of the kernel, or when its protocol is too old.
    pub(super) fn begin(export: &Export, slot: &mut Slot, resend: bool) -> io::Result<()> {
        while slot.request().is_none() {
            match slot.read(export.channel().as_fd()) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(error),
            }
        }
        let agreed = slot.request().map(|request| export.answer_init(request, resend));
        slot.clear();
        if let Some(agreed) = agreed {
            log::debug!("FUSE: {:?}", agreed?);
        }
        Ok(())
    }

    /// Starts `threads` threads, each with one of `slots`, of which there are at least as many. Between them they first answer what
    /// the slots hold, and `left`.
    ///
    /// # Errors
    /// When a thread cannot be started. Those that were end with the filesystem.
    pub(super) fn start(
        export: &Arc<Export>,
        threads: usize,
        mut slots: Vec<Slot>,
        left: Vec<(Entry, PendingRead)>,
    ) -> io::Result<Self> {
        let mut inherited: Vec<Inherited> = (0..threads).map(|_| Inherited::default()).collect();
        for (number, slot) in slots.split_off(threads.min(slots.len())).into_iter().enumerate() {
            inherited[number % threads].slots.push(slot);
        }
        for (number, read) in left.into_iter().enumerate() {
            inherited[number % threads].reads.push(read);
        }
        let start = |(number, (slot, inherited))| {
            let export = Arc::clone(export);
            thread::Builder::new()
                .name("fuse-session".to_owned())
                .spawn(move || run(&export, number, slot, inherited))
        };
        let threads = slots.into_iter().zip(inherited).enumerate().map(start);
        Ok(Self {
            threads: threads.collect::<io::Result<_>>()?,
        })
    }

    /// Whether no thread is left: the filesystem is gone.
    pub(super) fn is_finished(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }
}

/// Whether a read of `/dev/fuse` that failed so is to be tried again: a signal came, or the request was withdrawn.
fn is_transient(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::INTR | Errno::AGAIN | Errno::NOENT)
    )
}

/// A session thread.
fn run(export: &Arc<Export>, number: usize, mut slot: Slot, inherited: Inherited) {
    let mut thread = ThreadScratch::new(number);
    for mut slot in inherited.slots {
        handle(export, &mut thread, &mut slot);
    }
    for (entry, read) in inherited.reads {
        let unique = read.unique;
        guarded(export, unique, || export.read(&mut thread, read, Some(entry)));
    }
    loop {
        handle(export, &mut thread, &mut slot);
        match slot.read(export.channel().as_fd()) {
            Ok(0) => {
                log::error!("what should be /dev/fuse is at its end");
                return;
            }
            Ok(_) => {}
            Err(error) if is_transient(&error) => {}
            Err(error) => {
                let ended = matches!(Errno::from_io_error(&error), Some(Errno::NODEV | Errno::CONNABORTED));
                if !ended {
                    log::error!("cannot take requests from /dev/fuse any more: {error}");
                }
                return;
            }
        }
    }
}

/// Answers the request in `slot`, or enters it in the ledger, and clears the slot.
fn handle(export: &Arc<Export>, thread: &mut ThreadScratch, slot: &mut Slot) {
    if let Some(request) = slot.request() {
        let unique = Request::parse(request).map_or(0, |request| request.unique);
        guarded(export, unique, || export.handle(thread, request));
        slot.clear();
    }
}

/// Runs what answers request `unique`. A panic must not take a session thread away: the request fails, the thread goes on.
fn guarded(export: &Export, unique: u64, answer: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(answer)).is_err() {
        log::error!("answering request {unique:#x} panicked");
        export.channel().refuse(unique, Errno::IO);
    }
}
