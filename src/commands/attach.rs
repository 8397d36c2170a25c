//! `tarblk attach`, `mount`, `umount`, `detach`, and the hidden command that a daemon runs.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;

use super::cli::{AttachArgs, BackendArg, DetachArgs, DeviceArgs, LayerArgs, MountArgs, UmountArgs};
use super::laziness::{Downloaded, Laziness, line_of_mount};
use super::output::{ReaderGone, println};
use super::{Session, UsageError, layer};
use crate::device::inventory;
use crate::device::service::{
    self, Attached, BuildError, Builder, ControlError, Launcher, READY, Reach, STOPPING, ServeSpec, Served,
    ServiceError, StartLearner, notify,
};
use crate::device::state::StateDir;
use crate::device::trace::Trace;
use crate::device::{DeviceOptions, begin_to_load_drivers};
use crate::digest::Digest;
use crate::fetch::LayerTrust;
use crate::interrupt::Interrupt;
use crate::mount::{self, MountError, MountOptions, Upper};
use crate::open::{Fetching, ImageSpec, ImageStart, IndexOrigin, Prepared, PreparedLayer, Shared};
use crate::profile::RecordedRead;
use crate::snapshotter::Mounter;
use crate::source::Source;
use crate::source::registry::{ImageName, LayoutName};

/// The hidden command that the service and its keepers run.
pub(super) const SERVE: &str = "serve-devices";

/// The most queues of a device without `--queues`: more only cost memory.
const MOST_QUEUES: usize = 4;

/// How often `attach --foreground` looks whether its device is still there.
const GLANCE: Duration = Duration::from_millis(200);

/// How long `--foreground` waits between tries to take down what is in use.
const BUSY_PAUSE: Duration = Duration::from_millis(500);

/// What `mount --json` says.
#[derive(Debug, Serialize)]
struct Mounted<'a> {
    #[serde(flatten)]
    attached: &'a Attached,
    /// Of each layer, the lowest first.
    indexes: &'a [LayerIndex],
    #[serde(flatten)]
    cost: &'a Cost,
    #[serde(rename = "mounted_on")]
    dir: &'a Path,
    /// Until the device was there: finding the layer, its index, the daemon.
    attach_seconds: f64,
    /// Mounting it.
    mount_seconds: f64,
}

/// Where the index of a layer came from.
#[derive(Debug, Serialize)]
struct LayerIndex {
    /// The layer's digest, if it is known.
    layer: Option<Digest>,
    #[serde(flatten)]
    origin: IndexOrigin,
    /// On whose word it is believed, and what the bytes are compared with.
    trust: LayerTrust,
}

impl LayerIndex {
    fn of(layer: &PreparedLayer) -> Self {
        Self {
            layer: layer.layer.digest.clone(),
            origin: layer.origin,
            trust: layer.trust,
        }
    }
}

/// What it took, and whether it was lazy.
#[derive(Debug, Serialize)]
struct Cost {
    lazy: Option<Laziness>,
    downloaded: Downloaded,
}

/// What `attach --json` says.
#[derive(Debug, Serialize)]
struct AttachReport<'a> {
    #[serde(flatten)]
    attached: &'a Attached,
    /// Of each layer, the lowest first.
    indexes: &'a [LayerIndex],
    #[serde(flatten)]
    cost: &'a Cost,
}

/// `tarblk attach`.
pub(super) fn attach(args: &AttachArgs, session: Session) -> anyhow::Result<()> {
    let spec = specify(&args.layer, &args.device, args.fetch_all, session)?;
    let tell = |attached: &Attached| -> anyhow::Result<()> {
        report_backend(attached, session);
        if args.json {
            let (indexes, cost) = (&spec.indexes, &spec.cost);
            println(serde_json::to_string_pretty(&AttachReport {
                attached,
                indexes,
                cost,
            })?)
        } else {
            println(attached.state.device.display())
        }
    };
    // From here on a signal must not come between the daemon and what is known of it.
    let interrupt = Interrupt::catch().context("cannot catch signals")?;
    let attached = spec.launch()?;
    // An interrupted caller, or one whose standard output is closed, does not learn the device's name and cannot use it.
    if let Err(error) = interrupt.check().map_err(Into::into).and_then(|()| tell(&attached)) {
        return Err(detach_unwanted(&attached, error));
    }
    if args.foreground {
        hold_device(&attached, &interrupt, session)
    } else {
        Ok(())
    }
}

/// Detaches what turned out not to be wanted; returns the error to end with.
fn detach_unwanted(attached: &Attached, error: anyhow::Error) -> anyhow::Error {
    if let Err(left) = service::detach(&states(), &attached.state) {
        log::warn!("{left}");
    }
    if error.is::<ReaderGone>() {
        // Here that is no good end: what was asked for is not there.
        return anyhow::anyhow!("standard output is closed, so the device was detached again");
    }
    error
}

/// `tarblk mount`.
pub(super) fn mount(args: &MountArgs, session: Session) -> anyhow::Result<()> {
    // What is wrong with options and directory is told before the network is asked anything.
    // With an overlay it can be written on.
    let heeded = args
        .options
        .iter()
        .filter(|option| args.overlay.is_none() || *option != "rw");
    let options = MountOptions::parse(heeded.map(String::as_str));
    let options = options.map_err(|why| UsageError(format!("-o {why}")))?;
    let dir = mount::check_directory(&states(), &args.dir)?;
    let upper = args.overlay.as_ref().map(|path| Upper::open(path, &dir)).transpose()?;
    let began = Instant::now();
    let spec = specify(&args.layer, &args.device, args.fetch_all, session)?;
    // Until here there is nothing that a signal would leave behind.
    let interrupt = Interrupt::catch().context("cannot catch signals")?;
    let attached = spec.launch()?;
    let attach_seconds = began.elapsed().as_secs_f64();
    report_backend(&attached, session);
    let device = &attached.state.device;
    let mounted = match &upper {
        Some(upper) => upper.mount(&states(), device, &dir, &options),
        None => mount::mount_device(device, &dir, &options),
    };
    if let Err(error) = mounted {
        return Err(detach_unwanted(&attached, error.into()));
    }
    // From here on it goes when it is unmounted, whoever does that.
    if let Err(error) = service::let_go(&states(), &attached.state) {
        log::warn!(
            "{} stays when it is unmounted: {error}",
            attached.state.device.display()
        );
    }
    let mounted = Mounted {
        attached: &attached,
        indexes: &spec.indexes,
        cost: &spec.cost,
        dir: &dir,
        attach_seconds,
        mount_seconds: began.elapsed().as_secs_f64() - attach_seconds,
    };
    if let Some(line) = &spec.line {
        session.talk.note(format_args!("tarblk: {line}"));
    }
    let mut told = Ok(());
    if !args.foreground {
        told = interrupt.check().map_err(Into::into);
    }
    if args.json {
        told = told.and_then(|()| println(serde_json::to_string_pretty(&mounted)?));
    }
    if let Err(error) = told {
        let _ = rustix::mount::unmount(&dir, rustix::mount::UnmountFlags::empty());
        return Err(detach_unwanted(&attached, error));
    }
    if args.foreground {
        hold_mount(&dir, &interrupt, session)
    } else {
        Ok(())
    }
}

/// Waits for a signal, then detaches as soon as the device is no longer in use; or until another command has detached it.
fn hold_device(attached: &Attached, interrupt: &Interrupt, session: Session) -> anyhow::Result<()> {
    let (states, device) = (states(), &attached.state);
    let is_there = || {
        states
            .read(&device.name)
            .is_ok_and(|now| now.instance == device.instance)
    };
    notify(READY);
    while is_there() && interrupt.sleep(GLANCE).is_ok() {}
    notify(STOPPING);
    when_unused("leaves it attached", session, || {
        if !is_there() {
            return Ok(());
        }
        match service::detach(&states, device) {
            Err(busy @ ControlError::InUse { .. }) => Err(Unfinished::Busy(busy.to_string())),
            other => other.map_err(|error| Unfinished::Failed(error.into())),
        }
    })
}

/// Why something is not taken down yet.
enum Unfinished {
    /// It is in use: which, in words.
    Busy(String),
    Failed(anyhow::Error),
}

/// Does `take_down` as soon as it can be done. Another signal ends the process, which `leaves` things as they are.
fn when_unused(leaves: &str, session: Session, take_down: impl Fn() -> Result<(), Unfinished>) -> anyhow::Result<()> {
    let mut told = false;
    loop {
        match take_down() {
            Ok(()) => return Ok(()),
            Err(Unfinished::Failed(error)) => return Err(error),
            Err(Unfinished::Busy(busy)) if !told => {
                told = true;
                session
                    .talk
                    .note(format_args!("{busy}; waiting for it (Ctrl-C again {leaves})"));
            }
            Err(Unfinished::Busy(_)) => {}
        }
        std::thread::sleep(BUSY_PAUSE);
    }
}

/// Waits for a signal, then unmounts as soon as the directory is no longer in use.
fn hold_mount(dir: &Path, interrupt: &Interrupt, session: Session) -> anyhow::Result<()> {
    session
        .talk
        .note(format_args!("mounted on {}; Ctrl-C unmounts it", dir.display()));
    notify(READY);
    interrupt.wait();
    notify(STOPPING);
    when_unused("leaves it mounted", session, || match mount::unmount(&states(), dir) {
        Err(busy @ MountError::Busy { .. }) => Err(Unfinished::Busy(busy.to_string())),
        other => other.map(drop).map_err(|error| Unfinished::Failed(error.into())),
    })
}

/// `tarblk umount`.
pub(super) fn umount(args: &UmountArgs, session: Session) -> anyhow::Result<()> {
    let unmounted = mount::unmount(&states(), &args.dir)?;
    if let Some(used) = unmounted.still_used {
        session.talk.note(format_args!(
            "{} is unmounted; {used}, and its device goes when that is over",
            args.dir.display()
        ));
    }
    Ok(())
}

/// `tarblk detach`.
pub(super) fn detach(args: &DetachArgs, session: Session) -> anyhow::Result<()> {
    let states = states();
    let devices: Vec<PathBuf> = if args.all {
        let (all, wrong) = states.list()?;
        for error in wrong {
            log::warn!("{error}");
        }
        all.into_iter().map(|state| state.device).collect()
    } else {
        args.devices.clone()
    };
    let one = |device: &Path| -> anyhow::Result<()> {
        if !args.force {
            inventory::detach(&states, device)?;
            return Ok(());
        }
        let state = inventory::find(&states, device)?;
        if let Some(used) = mount::detach_used(&states, &state)? {
            session.talk.note(format_args!(
                "{}: {used}; it goes when that is over",
                state.device.display()
            ));
        }
        Ok(())
    };
    // One that stays keeps no other.
    let mut stay = Vec::new();
    for device in &devices {
        if let Err(error) = one(device) {
            stay.push(error);
        }
    }
    let Some(last) = stay.pop() else { return Ok(()) };
    for error in &stay {
        session.talk.note(format_args!("{error:#}"));
    }
    Err(last)
}

/// The hidden command: the life of the service or of a keeper.
pub(super) fn serve(arguments: &[OsString]) -> ExitCode {
    crate::fetch::descriptors::raise();
    service::main(SERVE, arguments, Images::default())
}

/// Attaches by the machine's service and mounts, for the snapshotter.
///
/// # Errors
/// When this program's own path cannot be found out.
pub(super) fn mounter() -> anyhow::Result<Mounter> {
    let launcher = launcher()?;
    Ok(Box::new(move |spec, dir, options| {
        mount::mount::<Images>(&launcher, spec, dir, options)
    }))
}

/// Attaches by the machine's service and mounts with an overlay, for a container.
///
/// # Errors
/// Why nothing is mounted.
pub(super) fn mount_writable(
    spec: &ServeSpec<ImageSpec>,
    dir: &Path,
    options: &MountOptions,
    upper: &Upper,
) -> anyhow::Result<Attached> {
    Ok(mount::mount_writable::<Images>(
        &launcher()?,
        spec,
        dir,
        options,
        upper,
    )?)
}

/// How the service is started: with the machine's cache to write to, besides that of the first device.
pub(super) fn launcher() -> Result<Launcher, ServiceError> {
    let mut launcher = Launcher::this_program(SERVE)?;
    launcher.writable.push(layer::cache_dir());
    Ok(launcher)
}

/// Sees to it that the service is this program: one that an older one left would refuse what this one asks. A service that cannot be
/// replaced goes on, and says so when it is asked.
pub(super) fn upgrade_other() {
    let replaced = || -> anyhow::Result<()> {
        let states = states();
        let launcher = launcher()?;
        if service::runs_other(&states, &launcher)?
            && let Some((before, now)) = service::upgrade(&states, &launcher)?
        {
            log::info!("process {now} of this program goes on with what process {before} served");
        }
        Ok(())
    };
    if let Err(error) = replaced() {
        log::warn!("the service is another program and could not be replaced: {error:#}");
    }
}

/// `tarblk upgrade`.
pub(super) fn upgrade(session: Session) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(ServiceError::NotRoot.into());
    }
    match service::upgrade(&states(), &launcher()?)? {
        Some((before, now)) => session.talk.note(format_args!(
            "process {now} of this program goes on with what process {before} served"
        )),
        None => session.talk.note("there is no service to upgrade: nothing is attached"),
    }
    Ok(())
}

/// The directory of device states: `TARBLK_STATE_DIR` (for tests, and where /run cannot be written), else /run/tarblk.
pub(super) fn states() -> StateDir {
    // The daemon works in another directory.
    let dir = std::env::var_os("TARBLK_STATE_DIR").and_then(|dir| std::path::absolute(dir).ok());
    dir.map_or_else(StateDir::default, StateDir::new)
}

/// Which back end carries the device, if it is not the one that `auto` prefers. The machine stays as it is until it is started
/// anew, so once is enough.
fn report_backend(attached: &Attached, session: Session) {
    log::info!(
        "{} is carried by {}",
        attached.state.device.display(),
        attached.state.backend
    );
    if let Some(why) = &attached.why_not_ublk
        && !session.talk.quiet
        && (session.talk.verbose || states().is_first_since_boot("no-ublk"))
    {
        session
            .talk
            .note(format_args!("tarblk: {why}; using FUSE under a loop device instead"));
    }
}

/// What the daemon is told, and what the person is.
pub(super) struct AttachRequest {
    pub(super) spec: ServeSpec<ImageSpec>,
    indexes: Vec<LayerIndex>,
    cost: Cost,
    /// The same in one line, where there is something to say.
    pub(super) line: Option<String>,
    /// Only dropped: when the daemon had its chance to read them.
    _lent: LentIndexes,
}

/// Index files that were written for the daemon alone; removed when this is dropped.
struct LentIndexes(Vec<PathBuf>);

impl AttachRequest {
    fn launch(&self) -> anyhow::Result<Attached> {
        Ok(service::launch::<Images>(&launcher()?, &self.spec)?)
    }
}

impl Drop for LentIndexes {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Finds the layer and its index, and writes down what the daemon must know.
fn specify(layer: &LayerArgs, device: &DeviceArgs, fetch_all: bool, session: Session) -> anyhow::Result<AttachRequest> {
    make_ready(device.backend)?;
    let prepared = layer::prepare(layer, session)?;
    let source = from_anywhere(&layer.source, &prepared.name);
    request(&prepared, source, layer, device, fetch_all)
}

/// Makes sure that devices can be attached, begins to load drivers, and removes what dead daemons left.
pub(super) fn make_ready(backend: BackendArg) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(ServiceError::NotRoot.into());
    }
    begin_to_load_drivers(backend.into());
    let states = states();
    states.create()?;
    if let Err(error) = inventory::sweep(&states) {
        log::warn!("{error}");
    }
    Ok(())
}

/// Writes down what the daemon must know of layers that were found; lists of devices show it as `source`.
pub(super) fn request(
    prepared: &Prepared,
    source: String,
    layer: &LayerArgs,
    device: &DeviceArgs,
    fetch_all: bool,
) -> anyhow::Result<AttachRequest> {
    let states = states();
    let fetching = Fetching {
        memory_bytes: device.fetch.memory,
        connections: device.fetch.connections,
        fetch_all,
        deadline: device.fetch.deadline,
        store_bytes: layer.cache_size,
    };
    let image = prepared.image_spec(states.path(), fetching)?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let queues = device
        .queues
        .unwrap_or_else(|| u16::try_from(cpus.min(MOST_QUEUES)).unwrap_or(1));
    let options = DeviceOptions {
        backend: device.backend.into(),
        queues,
        label: source.clone(),
        ..DeviceOptions::default()
    };
    let indexes = prepared.layers.iter().map(LayerIndex::of).collect();
    let cost = Cost {
        lazy: Laziness::of(&prepared.cost, &source),
        downloaded: Downloaded::of(&prepared.cost, 0),
    };
    let line = line_of_mount(&prepared.cost, &source);
    let lent = LentIndexes(image.lent().map(Path::to_owned).collect());
    Ok(AttachRequest {
        spec: ServeSpec {
            options,
            source,
            states: states.path().to_owned(),
            image,
        },
        indexes,
        cost,
        line,
        _lent: lent,
    })
}

/// What a layer is called in lists, which are read in other directories than the one where it was named.
pub(super) fn from_anywhere(typed: &str, name: &str) -> String {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    match Source::parse(typed) {
        Ok(Source::Path(path)) => absolute(&path).display().to_string(),
        Ok(Source::Image(ImageName::Layout(layout))) => {
            let dir = absolute(&layout.dir);
            ImageName::Layout(LayoutName { dir, ..layout }).to_string()
        }
        _ => name.to_owned(),
    }
}

impl StartLearner for ImageStart {
    fn begin(&self) {
        self.follow();
    }

    fn learn(&self, reads: &[RecordedRead], trace: &Trace) {
        self.keep(reads);
        if let Ok(bytes) = trace.to_bytes() {
            self.keep_trace(&bytes);
        }
    }
}

/// Makes image and fetcher of their description, in the process that serves them.
#[derive(Default)]
struct Images {
    /// What all devices of this process have together.
    shared: Shared,
}

impl Builder for Images {
    type Image = ImageSpec;

    fn build(&self, image: ImageSpec) -> Result<Served, BuildError> {
        let opened = image.serve(&self.shared)?;
        let (image, bytes, ended) = (opened.image.clone(), opened.fetcher.clone(), opened.fetcher.clone());
        let learner = opened
            .start
            .clone()
            .map(|start| -> Box<dyn StartLearner> { Box::new(start) });
        Ok(Served {
            image,
            bytes: Arc::new(bytes),
            files: Some(opened.files.clone()),
            learner,
            fetch_stats: Box::new(move || opened.stats()),
            finish: Box::new(move || ended.shutdown()),
        })
    }

    fn files(image: &ImageSpec) -> Vec<PathBuf> {
        image.files()
    }

    fn moved(image: ImageSpec, paths: &[PathBuf]) -> ImageSpec {
        image.moved(paths)
    }

    fn without_secrets(image: &ImageSpec) -> ImageSpec {
        image.without_secrets()
    }

    fn writes(image: &ImageSpec) -> Vec<PathBuf> {
        image.writes()
    }

    /// `TARBLK_SERVICE_IDLE` in milliseconds, for tests.
    fn idle_limit(&self) -> Duration {
        let said = std::env::var("TARBLK_SERVICE_IDLE")
            .ok()
            .and_then(|text| text.parse().ok());
        said.map_or(service::IDLE_LIMIT, Duration::from_millis)
    }

    /// Devices to come may need anything: caches, credentials, helpers.
    fn reach(&self) -> Reach {
        Reach::Everything
    }
}
