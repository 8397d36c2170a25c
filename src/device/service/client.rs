//! A command's side of control sockets. In: what it wants of the service, and the state of a device. Out: the service's answers; a service that
//! is started if there is none, or exchanged for another program.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Child;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::Serialize;

use super::control::{Answer, Call, Condition, ControlError, ENDING, Named, REQUEST_LIMIT, Request};
use super::counts::ServiceStats;
use super::message::{borrowed, receive, send};
use super::{
    Attached, Builder, DescriptorStore, LOG_NAME, Launcher, OLDER_LOG_NAME, ServeSpec, ServiceError, Start, failed,
    held, keeper, open_files, record,
};
use crate::device::state::{State, StateDir, StateError};
use crate::device::trace::{MAX_TRACE_BYTES, Trace};
use crate::device::users::{self, User};
use crate::device::{Backend, load_drivers, ublk, wait_until};

/// No answer is longer, in bytes.
const MAX_ANSWER_BYTES: u64 = MAX_TRACE_BYTES;

/// How long a service may take to answer. Making a device of many entries and taking one down take it the longest.
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

/// How long it may take to say how all devices are. It looks only at what is in memory.
const GLANCE_LIMIT: Duration = Duration::from_secs(2);

/// How long a service may take to start, or to be started again by its keepers.
const START_LIMIT: Duration = Duration::from_secs(20);

/// How long others may take to let go of copies of a mount that is gone.
const COPIES_LIMIT: Duration = Duration::from_secs(2);

/// Makes a device of `spec`, by the service of its state directory, which is started if there is none.
///
/// # Errors
/// Why there is no device; then nothing is left of it.
pub fn launch<B: Builder>(launcher: &Launcher, spec: &ServeSpec<B::Image>) -> Result<Attached, ServiceError> {
    if !rustix::process::geteuid().is_root() {
        return Err(ServiceError::NotRoot);
    }
    let states = StateDir::new(&spec.states);
    states.create()?;
    let files = open_files(&B::files(&spec.image)).map_err(failed("open a file of the layer"))?;
    // The service may load no modules.
    load_drivers(spec.options.backend);
    let writes = B::writes(&spec.image);
    for dir in &writes {
        // Whether it can be used is told when it is.
        let _ = fs::DirBuilder::new().recursive(true).mode(0o700).create(dir);
    }
    let mut launcher = launcher.clone();
    launcher.writable.extend(writes);
    let request = Request::Attach(Box::new(spec.clone()));
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let stream = connect_or_start(&launcher, &states, deadline, None)?;
        let log_len = fs::metadata(states.path().join(LOG_NAME)).map_or(0, |meta| meta.len());
        match call(&stream, &request, &files, ANSWER_LIMIT) {
            Ok(Answer::Attached(attached)) => return Ok(*attached),
            Ok(Answer::Confined(to)) if Instant::now() < deadline => {
                log::info!("the service is started anew to be able to write to another directory");
                launcher.writable.extend(to);
                // Whatever became of that, it is asked again.
                if let Err(error) = replace(&states, &launcher) {
                    log::warn!("{error}");
                }
            }
            // It was about to end, having been idle: the next one is not.
            Ok(Answer::Refused(why)) if why.starts_with(ENDING) && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(5));
            }
            Ok(Answer::Refused(why)) => return Err(ServiceError::Reported(why)),
            Ok(_) => return Err(ServiceError::Reported("the service answered something else".to_owned())),
            // One that ended before it looked at the call.
            Err(error) if is_gone(&error) && !has_died(&states) && Instant::now() < deadline => {}
            Err(error) if is_gone(&error) => {
                let last_words = last_words(&states, log_len);
                keeper::clean_up(&states, REQUEST_LIMIT);
                return Err(ServiceError::Died { last_words });
            }
            Err(error) => return Err(failed("talk to the service")(error)),
        }
    }
}

/// Keeps the service from ending for want of devices; the service tells its metrics meanwhile, if it was given where.
#[derive(Debug)]
pub struct Stay(UnixStream);

impl Stay {
    /// Whether that service is still there.
    #[must_use]
    pub fn is_there(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        // It says nothing more: anything to read is its end.
        matches!(poll(&mut [PollFd::new(&self.0, PollFlags::IN)], Some(&now)), Ok(0))
    }
}

/// Starts the service if there is none, and keeps it until what this returns is dropped. It tells its metrics to those who connect to
/// `metrics`, a listening socket. What it needs to go on after its end is held by `store` as well, and one that is started goes on with what
/// is held there.
///
/// # Errors
/// Why there is no service.
pub fn stay(
    launcher: &Launcher,
    states: &StateDir,
    metrics: Option<BorrowedFd<'_>>,
    store: &Arc<DescriptorStore>,
) -> Result<Stay, ServiceError> {
    states.create()?;
    let deadline = Instant::now() + START_LIMIT;
    let stream = connect_or_start(launcher, states, deadline, Some(store))?;
    let metrics = metrics.map(|socket| socket.try_clone_to_owned()).transpose();
    let files: Vec<OwnedFd> = metrics.map_err(failed("pass the socket on"))?.into_iter().collect();
    call_for_long(&stream, &Request::Stay, &files)?;
    let link = UnixStream::connect(states.service_socket()).map_err(failed("reach the service"))?;
    // An older service knows no such request, and does without.
    match call_for_long(&link, &Request::Store, &[]) {
        Ok(()) => {
            let store = Arc::clone(store);
            let serve = move || store.serve(&link);
            let started = thread::Builder::new().name("store".to_owned()).spawn(serve);
            started.map_err(failed("hold what the service holds"))?;
        }
        Err(error) => log::warn!("this command holds nothing for the service: {error}"),
    }
    Ok(Stay(stream))
}

/// Makes a request that is done for as long as the caller does not hang up.
fn call_for_long(stream: &UnixStream, request: &Request<()>, files: &[OwnedFd]) -> Result<(), ServiceError> {
    match call(stream, request, files, ANSWER_LIMIT).map_err(failed("talk to the service"))? {
        Answer::Done => Ok(()),
        Answer::Refused(why) => Err(ServiceError::Reported(why)),
        _ => Err(ServiceError::Reported("the service answered something else".to_owned())),
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe
    )
}

/// Whether the service had a bad end: then the request may be why, and is not made again. One that ends in good order removes its
/// log before it hangs up.
fn has_died(states: &StateDir) -> bool {
    states.path().join(LOG_NAME).exists()
}

/// Connects to the service, starting it if there is none; then it goes on with what is in `store`.
fn connect_or_start(
    launcher: &Launcher,
    states: &StateDir,
    deadline: Instant,
    store: Option<&DescriptorStore>,
) -> Result<UnixStream, ServiceError> {
    let socket = states.service_socket();
    loop {
        match UnixStream::connect(&socket) {
            Ok(stream) => return Ok(stream),
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
                    && Instant::now() < deadline => {}
            Err(error) => return Err(failed("reach the service")(error)),
        }
        let lock = keeper::try_lock(states).map_err(failed("lock the service"))?;
        let Some(lock) = lock else {
            // Somebody else starts or ends it.
            thread::sleep(Duration::from_millis(2));
            continue;
        };
        if let Some(store) = store
            && let Err(error) = store.give_to_keepers(states, launcher)
        {
            log::error!("what was stored is lost: {error}");
        }
        let mut child =
            keeper::start_service(launcher, states, &lock, Start::First, None).map_err(failed("start the service"))?;
        drop(lock);
        if !is_ready(&mut child) {
            let _ = child.wait();
            return Err(ServiceError::Died {
                last_words: last_words(states, 0),
            });
        }
        // Whoever launches without ending soon after would otherwise keep its entry in the process table when it ends.
        thread::spawn(move || child.wait());
    }
}

/// Waits until a service that was started can be called; false if it ends before.
fn is_ready(service: &mut Child) -> bool {
    // It closes its standard output when it can be called, or when it has died.
    let mut word = String::new();
    if let Some(mut stdout) = service.stdout.take() {
        let _ = stdout.by_ref().take(64).read_to_string(&mut word);
    }
    word.starts_with("ready")
}

/// The end of the log since it was `from` bytes long, for a message of one line.
fn last_words(states: &StateDir, from: u64) -> String {
    const MOST: usize = 500;
    let mut text = String::new();
    let read = fs::File::open(states.path().join(LOG_NAME)).and_then(|mut file| {
        io::Seek::seek(&mut file, io::SeekFrom::Start(from))?;
        file.take(1 << 20).read_to_string(&mut text)
    });
    match text
        .lines()
        .rfind(|line| !line.trim().is_empty() && !line.contains("[INFO") && !line.contains(" INFO "))
    {
        Some(line) if read.is_ok() => format!(
            "; its last words: {}",
            line.trim().chars().take(MOST).collect::<String>()
        ),
        _ => String::new(),
    }
}

/// Sends a request and waits for its answer.
fn call<I: Serialize>(
    stream: &UnixStream,
    request: &Request<I>,
    files: &[OwnedFd],
    limit: Duration,
) -> io::Result<Answer> {
    stream.set_write_timeout(Some(REQUEST_LIMIT))?;
    stream.set_read_timeout(Some(limit))?;
    let call = Call {
        version: held::version(),
        request: serde_json::to_string(request)?,
    };
    send(stream, &call, &borrowed(files))?;
    match receive(stream, MAX_ANSWER_BYTES) {
        Ok(Some((answer, _))) => Ok(answer),
        Ok(None) => Err(io::ErrorKind::UnexpectedEof.into()),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(io::Error::new(
            io::ErrorKind::TimedOut,
            format!("it has not answered for {} s", limit.as_secs()),
        )),
        Err(error) => Err(error),
    }
}

/// Asks the server of `state` for its counters.
///
/// # Errors
/// When it is dead or does not answer.
pub fn stats(states: &StateDir, state: &State) -> Result<ServiceStats, ControlError> {
    match ask(states, state, &Request::Stats(Named::of(state)))? {
        Answer::Stats(counted) => Ok(*counted),
        Answer::Refused(why) => Err(ControlError::Refused(why)),
        _ => Err(silent(state, "it answered something else")),
    }
}

/// Asks the server of `state` what was read of its device while that started.
///
/// # Errors
/// When it is dead, does not answer or does not know.
pub fn trace(states: &StateDir, state: &State) -> Result<Trace, ControlError> {
    match ask(states, state, &Request::Trace(Named::of(state)))? {
        Answer::Trace(trace) => Ok(*trace),
        Answer::Refused(why) => Err(ControlError::Refused(why)),
        _ => Err(silent(state, "it answered something else")),
    }
}

/// Takes the device of `state` down and waits until its device and files are gone. Works for a dead server's device as well.
///
/// # Errors
/// [`ControlError::InUse`] when the device is mounted or otherwise in use, or whatever else kept it.
pub fn detach(states: &StateDir, state: &State) -> Result<(), ControlError> {
    if is_over(states, state) {
        return Ok(());
    }
    // The service will look too, but it sees mounts from its own namespace.
    if let Err(used) = refuse_if_used_for_long(state) {
        return if is_over(states, state) { Ok(()) } else { Err(used) };
    }
    match ask(states, state, &Request::Detach(Named::of(state))) {
        Ok(Answer::Done) => {}
        Ok(Answer::Refused(why)) => return Err(ControlError::Refused(why)),
        Ok(_) => return Err(silent(state, "it answered something else")),
        Err(ControlError::Dead { .. }) => return bury(states, state),
        Err(error) => return Err(error),
    }
    Ok(())
}

/// Whether the device went with its last user: whatever is in use under its name, here or by another service, is another one.
pub(crate) fn is_over(states: &StateDir, state: &State) -> bool {
    match states.read(&state.name) {
        Ok(now) => now.instance != state.instance,
        Err(StateError::File { cause, .. }) => cause.kind() == io::ErrorKind::NotFound,
        Err(_) => false,
    }
}

/// From now on the device of `state` goes with its last user.
///
/// # Errors
/// When its server is dead or does not answer.
pub fn let_go(states: &StateDir, state: &State) -> Result<(), ControlError> {
    match ask(states, state, &Request::LetGo(Named::of(state)))? {
        Answer::Done => Ok(()),
        Answer::Refused(why) => Err(ControlError::Refused(why)),
        _ => Err(silent(state, "it answered something else")),
    }
}

/// How the devices of the service are; none if there is no service.
///
/// # Errors
/// When it does not answer.
pub(crate) fn conditions(states: &StateDir) -> io::Result<Option<BTreeMap<String, Condition>>> {
    let deadline = Instant::now() + GLANCE_LIMIT;
    loop {
        let stream = match UnixStream::connect(states.service_socket()) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        match call(&stream, &Request::<()>::Conditions, &[], GLANCE_LIMIT) {
            Ok(Answer::Conditions(conditions)) => return Ok(Some(conditions)),
            Ok(_) => return Err(io::Error::other("it answered something else")),
            // It died under the question: in a moment there is another one, or none.
            Err(error) if is_gone(&error) && Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
            Err(error) => return Err(error),
        }
    }
}

/// Lets the program of `launcher` go on with every device of the service, in place of the program that serves them now; returns the
/// numbers of the processes before and after. None if there is no service.
///
/// # Errors
/// When the service refuses, or that program does not start; then the one before has come back.
pub fn upgrade(states: &StateDir, launcher: &Launcher) -> Result<Option<(u32, u32)>, ServiceError> {
    // What the present one may write to, the next one finds in the descriptions of its devices.
    replace(states, launcher)
}

/// Ends the service and starts another one in its place, which goes on with all devices.
fn replace(states: &StateDir, launcher: &Launcher) -> Result<Option<(u32, u32)>, ServiceError> {
    let Ok(stream) = UnixStream::connect(states.service_socket()) else {
        return Ok(None);
    };
    let Some(before) = keeper::holder_of_lock(states) else {
        return Ok(None);
    };
    let place = Place::of(before);
    let asked = call(&stream, &Request::<()>::HandOver, &[], ANSWER_LIMIT);
    match asked.map_err(failed("talk to the service"))? {
        Answer::Done => {}
        Answer::Refused(why) => return Err(ServiceError::Reported(why)),
        _ => return Err(ServiceError::Reported("the service answered something else".to_owned())),
    }
    let deadline = Instant::now() + keeper::STAND_BACK;
    let lock = loop {
        match keeper::try_lock(states).map_err(failed("lock the service"))? {
            Some(lock) => break lock,
            None if Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
            None => return Err(ServiceError::Reported("the service does not end".to_owned())),
        }
    };
    let started = keeper::start_service(launcher, states, &lock, Start::First, place.environment);
    let ready = started.and_then(|mut child| {
        place.cgroup.take_in(child.id());
        if is_ready(&mut child) {
            let pid = child.id();
            thread::spawn(move || child.wait());
            Ok(pid)
        } else {
            let _ = child.wait();
            Err(io::Error::other("it ended at once"))
        }
    });
    let cause = match ready {
        Ok(now) => return Ok(Some((before, now))),
        Err(cause) => cause,
    };
    let last_words = last_words(states, 0);
    // The keepers need not wait any longer.
    let _ = lock.set_len(0);
    drop(lock);
    let deadline = Instant::now() + START_LIMIT;
    while Instant::now() < deadline {
        if let Some(now) = keeper::holder_of_lock(states)
            && matches!(conditions(states), Ok(Some(_)))
        {
            return Err(ServiceError::Reported(format!(
                "this program does not go on with what is attached ({cause}); the one before does, as process {now}{last_words}"
            )));
        }
        thread::sleep(Duration::from_millis(5));
    }
    Err(ServiceError::Died { last_words })
}

/// Whether the service runs another program than the launcher's: another file, be it of the same version. False if there is no
/// service.
///
/// # Errors
/// When the program cannot be looked at.
pub fn runs_other(states: &StateDir, launcher: &Launcher) -> Result<bool, ServiceError> {
    let wanted = fs::metadata(&launcher.program).map_err(failed("look at the program"))?;
    let runs = keeper::holder_of_lock(states).and_then(|pid| fs::metadata(format!("/proc/{pid}/exe")).ok());
    Ok(runs.is_some_and(|runs| (runs.dev(), runs.ino()) != (wanted.dev(), wanted.ino())))
}

/// What a service is started with that is not its own: the one after it, started from somewhere else, gets the same.
struct Place {
    /// None if it cannot be read.
    environment: Option<Vec<(OsString, OsString)>>,
    cgroup: Cgroup,
}

/// The control group of a process, as a directory; none where there are none of version 2.
struct Cgroup(Option<PathBuf>);

impl Place {
    fn of(pid: u32) -> Self {
        let variable = |line: &[u8]| {
            let at = line.iter().position(|byte| *byte == b'=')?;
            let text = |part: &[u8]| OsString::from_vec(part.to_vec());
            Some((text(&line[..at]), text(&line[at + 1..])))
        };
        let environment = fs::read(format!("/proc/{pid}/environ")).ok();
        let environment = environment.map(|text| text.split(|byte| *byte == 0).filter_map(variable).collect());
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        let path = groups.lines().find_map(|line| line.strip_prefix("0::/"));
        Self {
            environment,
            cgroup: Cgroup(path.map(|path| PathBuf::from("/sys/fs/cgroup").join(path))),
        }
    }
}

impl Cgroup {
    /// Moves a process there: it is not to end with whoever started it.
    fn take_in(&self, pid: u32) {
        if let Some(dir) = &self.0
            && let Err(error) = fs::write(dir.join("cgroup.procs"), pid.to_string())
        {
            log::debug!("the service stays in this command's control group: {error}");
        }
    }
}

/// Removes what a dead daemon left: its device, unless that is in use, and its files.
pub(crate) fn bury(states: &StateDir, state: &State) -> Result<(), ControlError> {
    if state.device_exists() {
        refuse_if_used_for_long(state)?;
        match state.backend {
            Backend::Ublk => ublk::delete_dead(state.number, state.process.pid)?,
            // The kernel takes a loop device down at its last close, and somebody has it open still.
            Backend::Loop => {}
        }
    }
    record::remove(states, &state.name);
    states.remove(state);
    if states.list().is_ok_and(|(all, _)| all.is_empty()) && keeper::clean_up(states, Duration::ZERO) {
        for name in [LOG_NAME, OLDER_LOG_NAME] {
            let _ = fs::remove_file(states.path().join(name));
        }
    }
    Ok(())
}

/// Ends the reads that wait for a dead daemon, of a device that may be mounted: nobody will answer them any more.
pub(crate) fn end_reads(state: &State) -> Result<(), ControlError> {
    match state.backend {
        Backend::Ublk => Ok(ublk::stop_dead(state.number, state.process.pid)?),
        // Its reads failed when the daemon died.
        Backend::Loop => Ok(()),
    }
}

/// Fails when something uses the device.
pub(super) fn refuse_if_used(state: &State) -> Result<(), ControlError> {
    let users = state.users();
    if users.is_empty() {
        return Ok(());
    }
    let users = users.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    Err(ControlError::InUse {
        device: state.device.clone(),
        users,
    })
}

/// The same, but not because of a mount that only others see and that they let go of: a process that starts in a mount
/// namespace of its own (another device's daemon, a container) takes a copy of every mount along at first.
fn refuse_if_used_for_long(state: &State) -> Result<(), ControlError> {
    let seen_here = |user: &User| matches!(user, User::Mount(_) | User::Holder(_));
    wait_until(COPIES_LIMIT, || {
        let users = state.users();
        users.is_empty() || users.iter().any(seen_here)
    });
    refuse_if_used(state)
}

fn silent(state: &State, cause: &str) -> ControlError {
    ControlError::Silent {
        name: state.name.clone(),
        pid: state.process.pid,
        cause: cause.to_owned(),
    }
}

fn ask(states: &StateDir, state: &State, request: &Request<()>) -> Result<Answer, ControlError> {
    let dead = || {
        let mounted = users::mount_points(&state.device);
        ControlError::Dead {
            name: state.name.clone(),
            pid: state.process.pid,
            cleans_up: match mounted.last() {
                Some(dir) => format!("umount {}", dir.display()),
                None => format!("detach {}", state.name),
            },
        }
    };
    let deadline = Instant::now() + START_LIMIT;
    loop {
        let stream = match UnixStream::connect(states.service_socket()) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Err(dead());
            }
            Err(error) => return Err(silent(state, &error.to_string())),
        };
        match call(&stream, request, &[], ANSWER_LIMIT) {
            Ok(answer) => return Ok(answer),
            // The service was killed under the request; its keepers start it again. What is asked may be asked twice.
            Err(error) if is_gone(&error) && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(5));
            }
            Err(error) if is_gone(&error) => return Err(dead()),
            Err(error) => return Err(silent(state, &error.to_string())),
        }
    }
}
