//! A daemon's life: order, image, device, state and socket; then requests and signals; then everything backwards.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::control::{Answer, DaemonStats, MAX_REQUEST_BYTES, REQUEST_LIMIT, Request, refuse_if_used};
use super::{
    Attached, BuildError, DaemonError, MAX_SPEC_BYTES, Order, REPORT_MARK, Report, ServeSpec, Served, failed, namespace,
};
use crate::device::state::{Process, State, StateDir};
use crate::device::volume::Volume;
use crate::device::{Backend, Device};
use crate::fetch::FetchStats;

/// How often a daemon looks whether its device is still there, and whether one that it was told to leave is still in use.
const GLANCE: Duration = Duration::from_millis(500);

/// The hidden subcommand: serves what the order on stdin says, and reports on stdout. The caller has set up logging to
/// stderr, which is the daemon's log, and has started no thread.
pub fn main<I: DeserializeOwned>(build: impl FnOnce(I) -> Result<Served, BuildError>) -> ExitCode {
    // Out of the terminal's reach before anything else. This fails only where there is nothing to leave.
    let _ = rustix::process::setsid();
    let _ = std::env::set_current_dir("/");
    let order = read_order();
    let served = order.and_then(|Order { spec, log }| {
        serve(spec, log.as_deref(), build, |attached| {
            report(&Report::Ready(Box::new(attached.clone())))?;
            let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
            rustix::stdio::dup2_stdin(&null)?;
            rustix::stdio::dup2_stdout(&null)?;
            Ok(())
        })
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error}");
            // Nobody listens any more if the device was ready once; then the log is all there is.
            let _ = report(&Report::Failed(error.to_string()));
            ExitCode::FAILURE
        }
    }
}

fn read_order<I: DeserializeOwned>() -> Result<Order<ServeSpec<I>>, DaemonError> {
    let mut text = Vec::new();
    io::stdin()
        .lock()
        .take(MAX_SPEC_BYTES)
        .read_to_end(&mut text)
        .map_err(failed("read the daemon's order"))?;
    serde_json::from_slice(&text).map_err(|error| failed("read the daemon's order")(error.into()))
}

fn report(report: &Report) -> io::Result<()> {
    let mut line = format!("\n{REPORT_MARK}").into_bytes();
    serde_json::to_writer(&mut line, report)?;
    line.push(b'\n');
    let mut stdout = io::stdout().lock();
    stdout.write_all(&line)?;
    stdout.flush()
}

/// Serves a device in this process until it is told to stop: by its socket, by SIGTERM or SIGINT, or because somebody else
/// took the device down. `announce` is called once, when the device can be mounted; if it fails the device is taken down.
///
/// A signal while the device is in use does not cut its users off: the daemon stays until they have let go.
///
/// # Errors
/// Why the device could not be made or taken down.
pub fn serve<I>(
    spec: ServeSpec<I>,
    log: Option<&Path>,
    build: impl FnOnce(I) -> Result<Served, BuildError>,
    announce: impl FnOnce(&Attached) -> io::Result<()>,
) -> Result<(), DaemonError> {
    let ServeSpec {
        options,
        source,
        states,
        image,
    } = spec;
    let states = StateDir::new(&states);
    states.create()?;
    let apart = namespace::leave();
    let Served {
        image,
        bytes,
        fetch_stats,
        finish,
        reach,
    } = build(image).map_err(DaemonError::Build)?;
    // Not before the layer is open: it may lie in another layer. Beside the rest, because the kernel takes a while for each.
    let tidying = apart.then(|| {
        let states = states.clone();
        thread::spawn(move || namespace::tidy(&states, &reach))
    });
    let threads = usize::from(options.queues).max(1) + 1;
    let volume = Arc::new(Volume::new(image, bytes, threads));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed("start the daemon's runtime"))?;
    let ended = runtime.block_on(async {
        // From here on signals are requests; until here they end the process, which has nothing to clean up yet.
        let signals = Signals::new().map_err(failed("receive signals"))?;
        let (device, why_not_ublk) = Device::start(&volume, &options)?;
        let state = describe(&device, &volume, source.clone(), log.is_some(), &states);
        let socket = states.socket(&state.name);
        let office = Office {
            states: &states,
            volume: &volume,
            fetch_stats,
            began: Instant::now(),
        };
        let opened = open_office(&states, &state, log, &socket);
        let listener = match opened {
            Ok(listener) => listener,
            Err(error) => {
                let _ = device.stop();
                states.remove(&state);
                return Err(error);
            }
        };
        log::info!("serving {} as {} ({})", source, state.device.display(), state.backend);
        if let Some(why) = &why_not_ublk {
            log::info!("not by ublk: {why}");
        }
        if let Some(tidying) = tidying {
            let _ = tidying.join();
        }
        let attached = Attached {
            state: state.clone(),
            why_not_ublk,
        };
        if let Err(error) = announce(&attached) {
            log::warn!("whoever wanted {} is gone: {error}", state.device.display());
            let _ = office.close(device, &state);
            return Err(failed("announce the device")(error));
        }
        office.work(device, &state, &listener, signals).await
    });
    drop(volume);
    finish();
    ended
}

/// The state of a device that has just been made, of the layer that a person named `source`.
fn describe(device: &Device, volume: &Volume, source: String, logs: bool, states: &StateDir) -> State {
    let number = match device {
        Device::Ublk(device) => device.id(),
        Device::Loop(device) => device.number(),
    };
    let name = match device.backend() {
        Backend::Ublk => format!("ublkb{number}"),
        Backend::Loop => format!("loop{number}"),
    };
    let process = Process::current().unwrap_or_else(|error| {
        log::warn!("cannot tell when this process began: {error}");
        Process {
            pid: std::process::id(),
            born: 0,
            boot: String::new(),
        }
    });
    State {
        device: device.path().to_owned(),
        backend: device.backend(),
        number,
        len: volume.len(),
        source,
        process,
        since: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        log: logs.then(|| states.log(&name)),
        name,
    }
}

/// Makes the daemon findable: its log under the device's name, its socket, its state.
fn open_office(
    states: &StateDir,
    state: &State,
    log: Option<&Path>,
    socket: &PathBuf,
) -> Result<UnixListener, DaemonError> {
    let _turn = states.turn();
    if let Some(log) = log {
        fs::rename(log, states.log(&state.name)).map_err(failed("name the log"))?;
    }
    // A dead daemon's: the number is ours now, so its device is gone.
    let _ = fs::remove_file(socket);
    let listener = UnixListener::bind(socket).map_err(failed("open the control socket"))?;
    fs::set_permissions(socket, fs::Permissions::from_mode(0o600))
        .map_err(failed("close the control socket to others"))?;
    states.write(state)?;
    Ok(listener)
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

/// What requests are answered from.
struct Office<'a> {
    states: &'a StateDir,
    volume: &'a Volume,
    fetch_stats: Box<dyn Fn() -> FetchStats>,
    began: Instant,
}

impl Office<'_> {
    /// Answers requests and signals until the device is gone.
    async fn work(
        &self,
        device: Device,
        state: &State,
        listener: &UnixListener,
        mut signals: Signals,
    ) -> Result<(), DaemonError> {
        let mut leaving = false;
        // Goes on whatever else happens: requests that come more often must not keep it from looking.
        let mut glance = tokio::time::interval(GLANCE);
        glance.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                accepted = listener.accept() => {
                    let Ok((mut stream, _)) = accepted else { continue };
                    match tokio::time::timeout(REQUEST_LIMIT, hear(&mut stream)).await {
                        Ok(Ok(Request::Stats)) => say(&mut stream, &Answer::Stats(Box::new(self.stats()))).await,
                        Ok(Ok(Request::Detach)) => {
                            if let Err(used) = refuse_if_used(state) {
                                say(&mut stream, &Answer::Refused(used.to_string())).await;
                                continue;
                            }
                            let closed = self.close(device, state);
                            let answer = closed
                                .as_ref()
                                .map_or_else(|error| Answer::Refused(error.to_string()), |()| Answer::Detached);
                            say(&mut stream, &answer).await;
                            return closed;
                        }
                        Ok(Err(error)) => say(&mut stream, &Answer::Refused(error.to_string())).await,
                        Err(_) => {}
                    }
                }
                name = signals.next() => match refuse_if_used(state) {
                    Ok(()) => {
                        log::info!("{name}: detaching");
                        return self.close(device, state);
                    }
                    Err(used) => {
                        log::warn!("{name}: {used}; staying until then");
                        leaving = true;
                    }
                },
                _ = glance.tick() => {
                    if !device.is_running() {
                        log::warn!("somebody else took {} down", state.device.display());
                        return self.close(device, state);
                    }
                    if leaving && refuse_if_used(state).is_ok() {
                        log::info!("no longer in use: detaching");
                        return self.close(device, state);
                    }
                }
            }
        }
    }

    /// Takes the device down and removes the daemon's files.
    fn close(&self, device: Device, state: &State) -> Result<(), DaemonError> {
        let stopped = device.stop();
        match &stopped {
            Ok(()) => self.states.remove(state),
            // The state stays as long as the device may: it says what there is to clean up.
            Err(error) => log::error!("{error}"),
        }
        Ok(stopped?)
    }

    fn stats(&self) -> DaemonStats {
        let up = self.began.elapsed().as_millis();
        DaemonStats {
            device: self.volume.stats(),
            fetch: (self.fetch_stats)(),
            up_ms: u64::try_from(up).unwrap_or(u64::MAX),
            resident_bytes: resident_bytes().unwrap_or(0),
        }
    }
}

fn resident_bytes() -> Option<u64> {
    let pages: u64 = fs::read_to_string("/proc/self/statm")
        .ok()?
        .split(' ')
        .nth(1)?
        .parse()
        .ok()?;
    Some(pages * u64::try_from(rustix::param::page_size()).ok()?)
}

async fn hear(stream: &mut UnixStream) -> io::Result<Request> {
    let mut line = Vec::new();
    BufReader::new(stream.take(MAX_REQUEST_BYTES))
        .read_until(b'\n', &mut line)
        .await?;
    Ok(serde_json::from_slice(&line)?)
}

/// Answers; a client that does not listen is its own problem.
async fn say(stream: &mut UnixStream, answer: &Answer) {
    let Ok(mut line) = serde_json::to_vec(answer) else {
        return;
    };
    line.push(b'\n');
    let _ = tokio::time::timeout(REQUEST_LIMIT, stream.write_all(&line)).await;
}
