//! Ctrl-C as a value. In: SIGINT, SIGTERM, SIGHUP. Out: a flag that long work looks at, and a channel that waiting work hears.
//!
//! Work that leaves things behind (mounts, devices, files) must end by returning, so that its guards run; a signal that
//! kills the process would leave them. Whoever calls [`Interrupt::catch`] promises to look.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use tokio::signal::unix::{SignalKind, signal};

/// The person, or the system, wants this to end.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("interrupted")]
pub struct Interrupted;

/// A flag that SIGINT, SIGTERM and SIGHUP set: the work is to end. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    raised: AtomicBool,
    listeners: Mutex<Vec<mpsc::Sender<()>>>,
}

impl Interrupt {
    /// From now on SIGINT, SIGTERM and SIGHUP raise the flag and do nothing else. A second signal of these ends the process
    /// at once, as people expect of the second Ctrl-C.
    ///
    /// # Errors
    /// When the signals cannot be caught.
    pub fn catch() -> io::Result<Self> {
        let interrupt = Self::default();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
        let (mut int, mut term, mut hup) = {
            let _inside = runtime.enter();
            (
                signal(SignalKind::interrupt())?,
                signal(SignalKind::terminate())?,
                signal(SignalKind::hangup())?,
            )
        };
        let raised = interrupt.clone();
        thread::Builder::new().name("signals".into()).spawn(move || {
            runtime.block_on(async move {
                loop {
                    tokio::select! {
                        _ = int.recv() => {}
                        _ = term.recv() => {}
                        _ = hup.recv() => {}
                    }
                    if raised.is_raised() {
                        std::process::exit(130);
                    }
                    raised.raise();
                }
            });
        })?;
        Ok(interrupt)
    }

    /// Raises the flag, as a signal would.
    pub fn raise(&self) {
        self.shared.raised.store(true, Ordering::SeqCst);
        for listener in self.listeners().drain(..) {
            let _ = listener.send(());
        }
    }

    /// Whether it was raised.
    #[must_use]
    pub fn is_raised(&self) -> bool {
        self.shared.raised.load(Ordering::SeqCst)
    }

    /// Ok as long as it was not raised.
    ///
    /// # Errors
    /// [`Interrupted`] when it was.
    pub fn check(&self) -> Result<(), Interrupted> {
        if self.is_raised() { Err(Interrupted) } else { Ok(()) }
    }

    /// Waits until it is raised.
    pub fn wait(&self) {
        let (give, take) = mpsc::channel();
        self.listeners().push(give);
        if !self.is_raised() {
            let _ = take.recv();
        }
    }

    /// Sleeps, but not past an interrupt.
    ///
    /// # Errors
    /// [`Interrupted`] when it was raised meanwhile.
    pub fn sleep(&self, time: Duration) -> Result<(), Interrupted> {
        let until = Instant::now() + time;
        while !self.is_raised() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(Duration::from_millis(20)));
        }
        Err(Interrupted)
    }

    fn listeners(&self) -> std::sync::MutexGuard<'_, Vec<mpsc::Sender<()>>> {
        self.shared.listeners.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raising_wakes_and_stays() {
        let interrupt = Interrupt::default();
        assert!(interrupt.check().is_ok());
        assert!(interrupt.sleep(Duration::from_millis(1)).is_ok());
        let twin = interrupt.clone();
        let waiter = thread::spawn(move || twin.wait());
        interrupt.raise();
        waiter.join().expect("woken");
        assert!(interrupt.check().is_err());
        assert!(interrupt.sleep(Duration::from_secs(3600)).is_err());
        interrupt.wait();
    }
}
