//! The life of a process that serves devices. In: a socket, signals, the passing of time. Out: devices, until there is no need of it
//! any more.
//!
//! The service takes over what an earlier one left, then answers; it ends when it has had no device for a while, or was told to end and
//! no device is in use.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream as Stream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::net::UnixListener;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::blame::Blame;
use super::control::{Answer, Call, ControlError, MAX_REQUEST_BYTES, Named, REQUEST_LIMIT, Request, parse};
use super::held::Kind;
use super::holders::Holders;
use super::keeper;
use super::message::{receive, send};
use super::sandbox::Writable;
use super::table::{self, Table};
use super::{
    Builder, LISTENER_NAME, LOG_NAME, Launcher, OLDER_LOG_NAME, ServiceError, Start, failed, namespace, sandbox, scrape,
};
use crate::device::state::StateDir;

/// How often it is looked whether devices are still there and in use, and whether keepers live.
const GLANCE: Duration = Duration::from_millis(200);

/// Whoever started a service may take this long to call it.
const FIRST_CALL_LIMIT: Duration = Duration::from_secs(5);

/// How long handing over waits for devices that are being made.
const HAND_OVER_LIMIT: Duration = Duration::from_secs(20);

/// So many requests are worked on at once; more wait.
const MOST_CALLS: usize = 64;

/// The machine's own order of whom to kill for memory, from -1000 (never) to 1000.
const OOM_SCORE_ADJ: &str = "-900";

/// The hidden subcommand's service.
pub(super) fn service<B: Builder>(
    states: &StateDir,
    launcher: Launcher,
    builder: B,
    start: Start,
) -> Result<(), ServiceError> {
    states.create()?;
    let lock = take_lock()?;
    let idle = builder.idle_limit();
    let mut holders = Holders::find(states, launcher);
    let tidy = match start {
        Start::First => {
            Blame::forget(states);
            leave(states, &builder, &mut holders)
        }
        Start::Again => None,
    };
    let writable = sandbox::limits_writes().then(|| {
        let all = holders.writable().iter().filter_map(|dir| Writable::of(dir));
        all.filter(|dir| start == Start::First || dir.takes_files()).collect()
    });
    let listener = listen(states, &holders)?;
    let kept = listener
        .try_clone()
        .map_err(failed("duplicate the control socket"))?
        .into();
    let table = Arc::new(Table::new(states, holders, builder, writable));
    let runtime = runtime()?;
    let ended = runtime.block_on(async {
        let signals = Signals::new().map_err(failed("receive signals"))?;
        // The sooner there are two keepers again, the better: one may have died with the last service.
        let keepers = {
            let table = Arc::clone(&table);
            thread::spawn(move || {
                if let Err(error) = table.holders().hold(LISTENER_NAME, vec![(Kind::Listener, kept)]) {
                    log::warn!("cannot keep the control socket: {error}");
                }
            })
        };
        table.resume_all();
        let listener = UnixListener::from_std(listener).map_err(failed("use the control socket"))?;
        announce_ready(start);
        if let Some(tidy) = tidy {
            let _ = tidy.send(());
        }
        {
            let table = Arc::clone(&table);
            thread::spawn(move || {
                let _ = keepers.join();
                // Those of the service before would start the next one with what that one was confined to.
                if start == Start::First {
                    table.holders().renew();
                }
            });
        }
        Ok::<_, ServiceError>(work(&table, &listener, signals, idle, start == Start::Again).await)
    })?;
    if ended == Ending::HandOver {
        // Whoever asked starts it as soon as the lock is free.
        log::info!("handing over to another service");
        table.leave_counts();
        // The process ends with its devices as they are. Taking anything apart first could answer reads with errors.
        std::mem::forget(table);
        return Ok(());
    }
    // Before the socket is closed: who finds it closed and no log knows that nothing bad has happened.
    for name in [LOG_NAME, OLDER_LOG_NAME] {
        let _ = fs::remove_file(states.path().join(name));
    }
    let _ = fs::remove_file(states.service_socket());
    Blame::forget(states);
    states.remove_leftovers();
    table.holders().retire();
    let _ = fs::remove_file(keeper::lock_file(states));
    drop(lock);
    Ok(())
}

/// Gives up all that a service does not need and that it and its keepers inherit from whoever started them first: their mount
/// namespace, their privileges. The sender's message lets mounts be undone that would be kept busy for nothing.
fn leave<B: Builder>(states: &StateDir, builder: &B, holders: &mut Holders) -> Option<mpsc::Sender<()>> {
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ);
    let (go, gone) = mpsc::channel();
    // On a thread of its own, because the kernel takes a while for each; begun before privileges are dropped, and ended with its work.
    let tidying = namespace::leave() && {
        let (states, reach) = (states.clone(), builder.reach());
        let tidy = move || {
            if gone.recv().is_ok() {
                namespace::tidy(&states, &reach);
            }
        };
        thread::Builder::new().name("tidy".to_owned()).spawn(tidy).is_ok()
    };
    let needed = table::written_by_found::<B>(states, holders);
    holders.widen(needed);
    let states = std::iter::once(states.path().to_owned());
    sandbox::enter(&states.chain(holders.writable().iter().cloned()).collect::<Vec<_>>());
    tidying.then_some(go)
}

/// The lock that this process was started with, as its standard input.
fn take_lock() -> Result<File, ServiceError> {
    let mut lock: File = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)
        .map(Into::into)
        .map_err(|error| failed("take the service's lock")(error.into()))?;
    let null = File::open("/dev/null").map_err(failed("open /dev/null"))?;
    let _ = rustix::stdio::dup2_stdin(&null);
    // For whoever wants to know who the service is.
    let noted = lock
        .rewind()
        .and_then(|()| lock.set_len(0))
        .and_then(|()| writeln!(lock, "{}", std::process::id()));
    noted.map_err(failed("note the service's number"))?;
    Ok(lock)
}

fn runtime() -> Result<tokio::runtime::Runtime, ServiceError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed("start a runtime"))
}

/// The control socket: the one that the keepers hold, else a new one.
fn listen(states: &StateDir, holders: &Holders) -> Result<std::os::unix::net::UnixListener, ServiceError> {
    let found = holders.found().map_err(failed("take over the control socket"))?;
    let inherited = found
        .into_iter()
        .find(|(name, _)| name == LISTENER_NAME)
        .and_then(|(_, holding)| holding.into_iter().find(|(kind, _)| *kind == Kind::Listener));
    let listener = match inherited {
        Some((_, listener)) => listener.into(),
        None => bind(&states.service_socket())?,
    };
    listener
        .set_nonblocking(true)
        .map_err(failed("use the control socket"))?;
    Ok(listener)
}

fn bind(path: &Path) -> Result<std::os::unix::net::UnixListener, ServiceError> {
    // A dead process's: this one has the lock, or the device's number.
    let _ = fs::remove_file(path);
    let listener = std::os::unix::net::UnixListener::bind(path).map_err(failed("open the control socket"))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .map_err(failed("close the control socket to others"))?;
    Ok(listener)
}

/// Tells whoever started this process that it can be called.
fn announce_ready(start: Start) {
    if start == Start::First {
        let mut stdout = io::stdout().lock();
        let _ = stdout.write_all(b"ready\n").and_then(|()| stdout.flush());
    }
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}

/// Why a process stops serving.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// There is nothing to serve.
    Unneeded,
    /// Another program goes on with the devices.
    HandOver,
}

/// Answers calls and signals until there has been nothing to serve for as long as `idle`. Unless it `was_called` before, it waits for
/// a first call.
async fn work<B: Builder>(
    table: &Arc<Table<B>>,
    listener: &UnixListener,
    mut signals: Signals,
    idle: Duration,
    mut was_called: bool,
) -> Ending {
    let mut leaving = false;
    let mut busy_since = Instant::now();
    let calls = Arc::new(Calls::default());
    let hand_over = Arc::new(tokio::sync::Notify::new());
    // Goes on whatever else happens: requests that come more often must not keep it from looking whether it is needed.
    let mut glance = tokio::time::interval(GLANCE);
    glance.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let (wake, woken) = mpsc::channel();
    start_glancing(table, woken);
    loop {
        tokio::select! {
            accepted = listener.accept(), if calls.open.load(Ordering::Relaxed) < MOST_CALLS => {
                if let Ok((stream, _)) = accepted
                    && let Ok(stream) = stream.into_std()
                {
                    hear(table, stream, &calls, &hand_over);
                }
            }
            () = hand_over.notified() => return Ending::HandOver,
            name = signals.next() => {
                leaving = true;
                table.refuse_more();
                match table.in_use() {
                    Some(used) => log::warn!("{name}: {used}; staying until then"),
                    None => log::info!("{name}: detaching"),
                }
                let _ = wake.send(());
            }
            _ = glance.tick() => {}
        }
        let idle = if was_called { idle } else { idle.max(FIRST_CALL_LIMIT) };
        if !table.is_empty() || calls.are_open() || (calls.stay() && !leaving) {
            was_called = true;
            busy_since = Instant::now();
        } else if (leaving || busy_since.elapsed() >= idle) && table.close() {
            return Ending::Unneeded;
        }
    }
}

/// Looks after devices and keepers again and again, on a thread of its own because devices are taken down there. From the first
/// message of `woken` on all devices are to go; it ends with the sender.
fn start_glancing<B: Builder>(table: &Arc<Table<B>>, woken: mpsc::Receiver<()>) {
    let table = Arc::clone(table);
    let mut leaving = false;
    let started = thread::Builder::new().name("glance".to_owned()).spawn(move || {
        loop {
            match woken.recv_timeout(GLANCE) {
                Ok(()) => leaving = true,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            table.glance(leaving);
            if !table.is_empty() {
                table.holders().mend();
            }
        }
    });
    if let Err(error) = started {
        log::error!("nothing looks after devices that others take down: {error}");
    }
}

/// The calls that are being answered, each on a thread of its own.
#[derive(Default)]
struct Calls {
    /// Those that have not had their answer.
    open: AtomicUsize,
    /// Those whose callers want the service to stay.
    staying: AtomicUsize,
}

impl Calls {
    fn are_open(&self) -> bool {
        self.open.load(Ordering::Relaxed) > 0
    }

    fn stay(&self) -> bool {
        self.staying.load(Ordering::Relaxed) > 0
    }
}

/// Counted up, until this is dropped.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Answers one call on a thread of its own.
fn hear<B: Builder>(table: &Arc<Table<B>>, stream: Stream, calls: &Arc<Calls>, hand_over: &Arc<tokio::sync::Notify>) {
    // Counted from here on, so that the service does not end before the thread runs.
    calls.open.fetch_add(1, Ordering::Relaxed);
    let (table, shared, hand_over) = (Arc::clone(table), Arc::clone(calls), Arc::clone(hand_over));
    let heard = thread::Builder::new().name("call".to_owned()).spawn(move || {
        let answered = answer(&table, &stream, &hand_over);
        let staying = matches!(answered, Ok(Answered::Stay(_))).then(|| Counted::new(&shared.staying));
        shared.open.fetch_sub(1, Ordering::Relaxed);
        let ended = answered.and_then(|answered| match answered {
            Answered::Stay(socket) => remain(table, stream, socket),
            Answered::Store => table.store_with(stream),
            Answered::Done => Ok(()),
        });
        drop(staying);
        if let Err(error) = ended {
            log::debug!("a call came to nothing: {error}");
        }
    });
    if let Err(error) = heard {
        calls.open.fetch_sub(1, Ordering::Relaxed);
        log::warn!("cannot answer a call: {error}");
    }
}

/// Tells metrics to those who connect to the `socket`, if there is one, until the caller of [`Request::Stay`] hangs up.
fn remain<B: Builder>(table: Arc<Table<B>>, mut stream: Stream, socket: Option<OwnedFd>) -> io::Result<()> {
    if let Some(socket) = socket {
        return scrape::serve(socket, stream, Arc::new(move || table.exposition()));
    }
    stream.set_read_timeout(None)?;
    stream.read(&mut [0]).map(drop)
}

/// What is left to do for a caller who has had an answer.
enum Answered {
    Done,
    /// The service is to stay until the caller hangs up; it tells metrics on the socket, if there is one.
    Stay(Option<OwnedFd>),
    /// The caller holds what the keepers hold.
    Store,
}

/// Answers a call.
fn answer<B: Builder>(table: &Table<B>, stream: &Stream, hand_over: &tokio::sync::Notify) -> io::Result<Answered> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(REQUEST_LIMIT))?;
    stream.set_write_timeout(Some(REQUEST_LIMIT))?;
    if !keeper::is_root(stream) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    let Some((call, files)) = receive::<Call>(stream, MAX_REQUEST_BYTES)? else {
        return Ok(Answered::Done);
    };
    let say = |answer: &Answer| send(stream, answer, &[]);
    let refused = |error: ControlError| Answer::Refused(error.to_string());
    let said = match parse::<B::Image>(&call) {
        Ok(Request::Stay) => {
            say(&Answer::Done)?;
            return Ok(Answered::Stay(files.into_iter().next()));
        }
        Ok(Request::Store) => {
            say(&Answer::Done)?;
            return Ok(Answered::Store);
        }
        Err(why) => say(&Answer::Refused(why)),
        Ok(Request::Attach(spec)) if !table.may_write(&B::writes(&spec.image)) => {
            say(&Answer::Confined(table.writable()))
        }
        Ok(Request::Attach(spec)) => match table.attach(*spec, files) {
            Ok(attached) => {
                let device = Named::of(&attached.state);
                // Whoever wanted it does not learn its name: it is of no use to anybody.
                say(&Answer::Attached(Box::new(attached))).inspect_err(|_| {
                    log::warn!("whoever wanted {} is gone", device.name);
                    let _ = table.detach(&device);
                })
            }
            Err(error) => say(&Answer::Refused(error.to_string())),
        },
        Ok(Request::Stats(device)) => {
            let counted = table.stats(&device);
            say(&counted.map_or_else(refused, |counted| Answer::Stats(Box::new(counted))))
        }
        Ok(Request::Trace(device)) => {
            let traced = table.trace(&device);
            say(&traced.map_or_else(refused, |trace| Answer::Trace(Box::new(trace))))
        }
        Ok(Request::Conditions) => say(&Answer::Conditions(table.conditions())),
        Ok(Request::Detach(device)) => say(&match table.detach(&device) {
            // Gone is gone, whoever was first.
            Ok(()) | Err(ControlError::Unknown(_)) => Answer::Done,
            Err(error) => refused(error),
        }),
        Ok(Request::LetGo(device)) => say(&table.let_go(&device).map_or_else(refused, |()| Answer::Done)),
        Ok(Request::HandOver) => match prepare_hand_over(table) {
            Ok(()) => {
                let said = say(&Answer::Done);
                hand_over.notify_one();
                said
            }
            Err(error) => say(&Answer::Refused(format!("cannot hand over: {error}"))),
        },
    };
    said.map(|()| Answered::Done)
}

/// Makes the keepers leave the next start to whoever asked.
fn prepare_hand_over<B: Builder>(table: &Table<B>) -> io::Result<()> {
    if !table.quiesce(HAND_OVER_LIMIT) {
        return Err(io::Error::other("devices are being made; try again"));
    }
    table.holders().stand_back()
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hang_up.recv() => "SIGHUP",
        }
    }
}
