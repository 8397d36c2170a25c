//! What docs/RELIABILITY.md says, measured: `cargo bench --bench reliability -- WHAT [OPTIONS]`, as root. Everything is read through
//! the built command's own service, in a state directory of its own, and every byte is compared with the image that
//! `tarblk image` wrote.
//!
//! `kills`: readers of one device while the service, a keeper, or the service and a keeper at once are killed (`--rounds N`, 100).
//! `upgrade`: readers of one device while another program takes over (`--rounds N`, 100).
//! `devices`: one image attached again and again, then all of them read through (`--devices N`, 100).
//! `soak`: devices of several layers behind a failing origin, a cache much smaller than they are, and kills (`--minutes N`, 10;
//! `--devices N`, 20).
//!
//! `--files N` (50,000): files of a layer; `--backend loop|ublk`; `--seed N`.

mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::Runs;
use tarblk::internals::bench::origin::{Fault, Origin, at_random};
use tarblk::internals::device::inventory::{self, Status};
use tarblk::internals::device::state::StateDir;

type Failure = Box<dyn std::error::Error>;

const TARBLK: &str = env!("CARGO_BIN_EXE_tarblk");

/// A read that takes longer is called hanging, and ends the run.
const PATIENCE: Duration = Duration::from_secs(120);

struct Options {
    what: String,
    rounds: usize,
    devices: usize,
    minutes: u64,
    files: usize,
    backend: String,
    seed: u64,
}

fn options() -> Result<Options, Failure> {
    let mut options = Options {
        what: String::new(),
        rounds: 100,
        devices: 0,
        minutes: 10,
        files: 50_000,
        backend: "loop".into(),
        seed: 1,
    };
    let mut arguments = support::arguments().into_iter();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--rounds" => options.rounds = value()?.parse()?,
            "--devices" => options.devices = value()?.parse()?,
            "--minutes" => options.minutes = value()?.parse()?,
            "--files" => options.files = value()?.parse()?,
            "--backend" => options.backend = value()?,
            "--seed" => options.seed = value()?.parse()?,
            what if !what.starts_with('-') && options.what.is_empty() => options.what = what.into(),
            other => return Err(format!("what is {other}?").into()),
        }
    }
    Ok(options)
}

fn main() -> Result<(), Failure> {
    let options = options()?;
    match options.what.as_str() {
        "kills" => kills(&options),
        "upgrade" => upgrade(&options),
        "devices" => devices(&options),
        "soak" => soak(&options),
        _ => Err("say what: kills, upgrade, devices or soak".into()),
    }
}

// ------------------------------------------------------------------------------------------------------------ the place

/// A generator of numbers that look random.
#[derive(Clone)]
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }
}

/// An origin with layers, and a state and a cache directory for what is attached from it.
struct Place {
    dir: tempfile::TempDir,
    origin: Origin,
    backend: String,
    cache_size: String,
}

/// A layer that the origin has: where, and the image that it is to be.
struct Layer {
    url: String,
    index: PathBuf,
    image: File,
    len: u64,
}

impl Place {
    fn new(options: &Options, cache_size: &str) -> Result<Self, Failure> {
        Ok(Self {
            dir: tempfile::tempdir()?,
            origin: Origin::start()?,
            backend: options.backend.clone(),
            cache_size: cache_size.into(),
        })
    }

    fn states(&self) -> StateDir {
        StateDir::new(self.dir.path().join("states"))
    }

    fn cache(&self) -> PathBuf {
        self.dir.path().join("cache")
    }

    fn run(&self, arguments: &[&str]) -> Result<String, Failure> {
        let output = Command::new(TARBLK)
            .args(arguments)
            .env("TARBLK_STATE_DIR", self.dir.path().join("states"))
            .env("TARBLK_CACHE", self.cache())
            .output()?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(format!("tarblk {}: {said}", arguments.join(" ")).into());
        }
        Ok(String::from_utf8(output.stdout)?)
    }

    /// A layer of `files` files, most of them small, whose bytes follow from `seed`.
    fn layer(&self, files: usize, seed: u64) -> Result<Layer, Failure> {
        let path = |what: &str| self.dir.path().join(format!("{seed}.{what}"));
        let mut dice = Dice(seed);
        let mut tar = tar::Builder::new(std::io::BufWriter::new(File::create(path("tar"))?));
        for number in 0..files {
            let len = match dice.below(1000) {
                0 => 1 << 20,
                1..100 => dice.below(64 << 10),
                _ => dice.below(6 << 10),
            };
            let mut bytes = Vec::with_capacity(usize::try_from(len)? + 8);
            while u64::try_from(bytes.len())? < len {
                bytes.extend_from_slice(&dice.next().to_le_bytes());
            }
            bytes.truncate(usize::try_from(len)?);
            let mut header = tar::Header::new_gnu();
            header.set_size(len);
            header.set_mode(0o644);
            tar.append_data(&mut header, format!("d{}/f{number}", number / 500), bytes.as_slice())?;
        }
        tar.into_inner()?.flush()?;
        let name = format!("/{seed}.tar");
        self.origin.serve_file(&name, &path("tar"))?;
        let (tar, index, image) = (path("tar"), path("tarblk"), path("ext4"));
        let text = |path: &Path| path.to_str().map(str::to_owned).ok_or("a path that is no text");
        self.run(&["index", &text(&tar)?, "-o", &text(&index)?])?;
        self.run(&["image", &text(&tar)?, "-o", &text(&image)?])?;
        let image = File::open(image)?;
        let len = image.metadata()?.len();
        Ok(Layer {
            url: self.origin.url(&name),
            index,
            image,
            len,
        })
    }

    /// Attaches a layer and hands back its device.
    fn attach(&self, layer: &Layer) -> Result<PathBuf, Failure> {
        let index = layer.index.to_str().ok_or("a path that is no text")?;
        let said = self.run(&[
            "attach",
            &layer.url,
            "--index",
            index,
            "--backend",
            &self.backend,
            "--cache-size",
            &self.cache_size,
        ])?;
        Ok(PathBuf::from(said.trim()))
    }

    fn detach_all(&self) -> Result<(), Failure> {
        self.run(&["detach", "--all"]).map(drop)
    }

    /// The service's number, once it answers for every device.
    fn service(&self) -> Result<u32, Failure> {
        let began = Instant::now();
        loop {
            let (listed, _) = inventory::list(&self.states())?;
            let answers = |device: &inventory::Listed| device.status == Status::Serving && device.state.is_alive();
            if let Some(first) = listed.first()
                && listed.iter().all(answers)
            {
                return Ok(first.state.process.pid);
            }
            if began.elapsed() > PATIENCE {
                return Err("there is no service".into());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The numbers of the service's and the keepers' processes.
    fn processes(&self) -> BTreeSet<u32> {
        let dir = self.dir.path().join("states").to_string_lossy().into_owned();
        let all = fs::read_dir("/proc").into_iter().flatten().flatten();
        let numbers = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        numbers
            .filter(|pid: &u32| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&line).contains(&dir)
            })
            .collect()
    }

    /// The numbers of the two keepers, once both hold something. A process that the service is just starting has a copy of the
    /// service's descriptors, which go when it becomes a keeper: so its command line is looked at as well.
    fn keepers(&self, service: u32) -> Result<Vec<u32>, Failure> {
        let holds = |pid: &u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let mut open = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            line.split(|byte| *byte == 0).any(|word| word == b"keep")
                && open.any(|fd| {
                    fs::read_link(fd.path()).is_ok_and(|file| file.to_string_lossy().contains("tarblk-record"))
                })
        };
        let began = Instant::now();
        loop {
            let keepers: Vec<_> = self
                .processes()
                .into_iter()
                .filter(|pid| *pid != service && holds(pid))
                .collect();
            if keepers.len() == 2 {
                return Ok(keepers);
            }
            if began.elapsed() > PATIENCE {
                return Err(format!("there are {} keepers", keepers.len()).into());
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // What could not be detached is told by the error that led here.
        let _ = self.run(&["detach", "--all", "--force"]);
    }
}

// ------------------------------------------------------------------------------------------------------------- reading

/// What readers found.
#[derive(Default)]
struct Readings {
    reads: AtomicU64,
    bytes: AtomicU64,
    wrong: AtomicU64,
    errors: AtomicU64,
    /// When each read began and how long it took.
    times: Mutex<Vec<(Instant, Duration)>>,
    stop: AtomicBool,
}

impl Readings {
    fn is_over(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// Reads here and there, around the page cache, and compares, until it is told to stop.
    fn read(&self, device: &Path, layer: &Layer, seed: u64) -> std::io::Result<()> {
        let file = File::open(device)?;
        let (mut dice, mut got, mut wanted) = (Dice(seed), vec![0; 128 << 10], vec![0; 128 << 10]);
        while !self.is_over() {
            let blocks = layer.len / 4096;
            let at = dice.below(blocks);
            let len = (dice.below(32) + 1).min(blocks - at) * 4096;
            let size = usize::try_from(len).unwrap_or(usize::MAX);
            rustix::fs::fadvise(&file, at * 4096, NonZeroU64::new(len), rustix::fs::Advice::DontNeed)?;
            let began = Instant::now();
            let read = file.read_exact_at(&mut got[..size], at * 4096);
            let took = began.elapsed();
            layer.image.read_exact_at(&mut wanted[..size], at * 4096)?;
            match read {
                Ok(()) if got[..size] == wanted[..size] => {}
                Ok(()) => {
                    eprintln!("{}: {len} bytes at {} differ", device.display(), at * 4096);
                    self.wrong.fetch_add(1, Ordering::Relaxed);
                }
                Err(error) => {
                    // A device that is lost fails every read.
                    if self.errors.fetch_add(1, Ordering::Relaxed) < 10 {
                        eprintln!("{}: {len} bytes at {}: {error}", device.display(), at * 4096);
                    }
                }
            }
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.bytes.fetch_add(len, Ordering::Relaxed);
            self.times.lock().expect("no reader panics with it").push((began, took));
        }
        Ok(())
    }

    /// Of each of `moments`: the longest read that was under way between it and the next one, at most two seconds later, and the
    /// time until a read that began after it had ended. `all` are the moments of every kind.
    fn pauses(&self, moments: &[Instant], all: &[Instant]) -> (Vec<Duration>, Vec<Duration>) {
        let times = self.times.lock().expect("no reader panics with it");
        let mut sorted: Vec<_> = times.clone();
        sorted.sort();
        let (mut ends, mut longest) = (Vec::new(), Vec::new());
        for moment in moments {
            let next = all.iter().filter(|other| *other > moment).min();
            let until = (*moment + Duration::from_secs(2)).min(next.copied().unwrap_or(*moment + PATIENCE));
            let within = sorted
                .iter()
                .filter(|(began, took)| *began < until && *began + *took > *moment);
            longest.extend(within.map(|(_, took)| *took).max());
            let after = sorted
                .iter()
                .filter(|(began, _)| began >= moment && *began < until + PATIENCE);
            ends.extend(after.map(|(began, took)| *began + *took - *moment).min());
        }
        (longest, ends)
    }

    fn print(&self) {
        println!(
            "{} reads, {} MB compared: {} wrong, {} errors",
            self.reads.load(Ordering::Relaxed),
            self.bytes.load(Ordering::Relaxed) / 1_000_000,
            self.wrong.load(Ordering::Relaxed),
            self.errors.load(Ordering::Relaxed)
        );
    }

    fn verdict(&self) -> Result<(), Failure> {
        match (self.wrong.load(Ordering::Relaxed), self.errors.load(Ordering::Relaxed)) {
            (0, 0) => Ok(()),
            (wrong, errors) => Err(format!("{wrong} wrong reads and {errors} failed ones").into()),
        }
    }
}

impl Place {
    /// Does `work` while so many readers of each device read and compare. If that or a read fails, the service's last words are
    /// printed.
    fn under_load(
        &self,
        devices: &[(PathBuf, &Layer)],
        readers: u64,
        readings: &Readings,
        work: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let worked = thread::scope(|scope| {
            let mut threads = Vec::new();
            for (number, (device, layer)) in (0..).zip(devices) {
                for seed in 0..readers {
                    threads.push(scope.spawn(move || readings.read(device, layer, number * 1000 + seed)));
                }
            }
            let worked = work();
            readings.stop.store(true, Ordering::Relaxed);
            for thread in threads {
                thread.join().map_err(|_| "a reader panicked")??;
            }
            worked
        });
        if worked.is_err() || readings.errors.load(Ordering::Relaxed) > 0 {
            let log = fs::read_to_string(self.dir.path().join("states/service.log")).unwrap_or_default();
            let lines: Vec<_> = log.lines().collect();
            eprintln!("{}", lines[lines.len().saturating_sub(60)..].join("\n"));
        }
        worked
    }
}

fn kill_now(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // It may have ended by itself.
        let _ = kill_process(pid, Signal::KILL);
    }
}

// ---------------------------------------------------------------------------------------------------------------- parts

fn kills(options: &Options) -> Result<(), Failure> {
    let place = Place::new(options, "4GiB")?;
    let layer = place.layer(options.files, options.seed)?;
    let device = place.attach(&layer)?;
    let (readings, mut dice) = (Readings::default(), Dice(options.seed));
    let mut moments: [Vec<Instant>; 3] = Default::default();
    place.under_load(&[(device, &layer)], 4, &readings, || {
        for round in 0..options.rounds {
            thread::sleep(Duration::from_millis(50 + dice.below(300)));
            let service = place.service()?;
            let keepers = place.keepers(service)?;
            let keeper = keepers[usize::try_from(dice.below(2))?];
            let victims: &[u32] = match round % 3 {
                0 => &[service],
                1 => &[keeper],
                _ => &[service, keeper],
            };
            moments[round % 3].push(Instant::now());
            victims.iter().copied().for_each(kill_now);
        }
        place.service()?;
        thread::sleep(Duration::from_secs(2));
        Ok(())
    })?;
    println!(
        "kills, {}, a layer of {} files, {} rounds",
        options.backend, options.files, options.rounds
    );
    readings.print();
    let all = moments.concat();
    for (what, moments) in ["service", "keeper", "service and keeper"].iter().zip(&moments) {
        if moments.is_empty() {
            continue;
        }
        let (longest, ends) = readings.pauses(moments, &all);
        println!(
            "  {what:<20} to the first read's end {}, longest read {}",
            Runs::ms(&ends),
            Runs::ms(&longest)
        );
    }
    place.detach_all()?;
    readings.verdict()
}

fn upgrade(options: &Options) -> Result<(), Failure> {
    let place = Place::new(options, "4GiB")?;
    let layer = place.layer(options.files, options.seed)?;
    let device = place.attach(&layer)?;
    let (readings, mut moments, mut took) = (Readings::default(), Vec::new(), Vec::new());
    place.under_load(&[(device, &layer)], 4, &readings, || {
        for _ in 0..options.rounds {
            thread::sleep(Duration::from_millis(300));
            let before = place.service()?;
            let began = Instant::now();
            moments.push(began);
            place.run(&["upgrade"])?;
            took.push(began.elapsed());
            if place.service()? == before {
                return Err("the service is the one from before".into());
            }
        }
        thread::sleep(Duration::from_secs(2));
        Ok(())
    })?;
    println!(
        "upgrade, {}, a layer of {} files, {} rounds",
        options.backend, options.files, options.rounds
    );
    readings.print();
    let (longest, _) = readings.pauses(&moments, &moments);
    println!("  longest read {}", Runs::ms(&longest));
    println!("  the command  {}", Runs::ms(&took));
    place.detach_all()?;
    readings.verdict()
}

/// What processes use: memory in bytes (shared pages by their share), descriptors, threads.
#[derive(Clone, Copy, Debug, Default)]
struct Use {
    memory: u64,
    descriptors: usize,
    threads: usize,
}

fn used(pid: u32) -> Use {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    let pss = text.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = pss.and_then(|line| line.trim().trim_end_matches(" kB").trim().parse::<u64>().ok());
    let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).map_or(0, Iterator::count);
    Use {
        memory: kib.unwrap_or_default() << 10,
        descriptors: count("fd"),
        threads: count("task"),
    }
}

impl Place {
    /// Service and keepers together.
    fn used(&self) -> Use {
        self.processes()
            .into_iter()
            .map(used)
            .fold(Use::default(), |sum, one| Use {
                memory: sum.memory + one.memory,
                descriptors: sum.descriptors + one.descriptors,
                threads: sum.threads + one.threads,
            })
    }
}

fn mib(bytes: u64) -> u64 {
    bytes >> 20
}

fn devices(options: &Options) -> Result<(), Failure> {
    let count = if options.devices == 0 { 100 } else { options.devices };
    let place = Place::new(options, "4GiB")?;
    let layer = place.layer(options.files, options.seed)?;
    let (mut attached, mut took) = (Vec::new(), Vec::new());
    for number in 0..count {
        let began = Instant::now();
        attached.push(place.attach(&layer)?);
        took.push(began.elapsed());
        if [0, 9, count - 1].contains(&number) {
            println!(
                "{:3} devices: {} MiB, {:?}",
                number + 1,
                mib(place.used().memory),
                place.used()
            );
        }
    }
    let tenth = (count / 10).max(1);
    println!("attach, the first {tenth}: {}", Runs::ms(&took[..tenth]));
    println!("attach, the last {tenth}:  {}", Runs::ms(&took[count - tenth..]));
    let (mut got, mut wanted) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let (mut wrong, began, mut most) = (0, Instant::now(), 0);
    for device in &attached {
        let file = File::open(device)?;
        let mut at = 0;
        while at < layer.len {
            let size = usize::try_from((layer.len - at).min(1 << 20))?;
            file.read_exact_at(&mut got[..size], at)?;
            layer.image.read_exact_at(&mut wanted[..size], at)?;
            wrong += usize::from(got[..size] != wanted[..size]);
            at += 1 << 20;
        }
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        most = most.max(place.used().memory);
    }
    let bytes = layer.len * u64::try_from(count)?;
    println!(
        "read through: {} GB in {:.0?}, {wrong} MiB wrong; service and keepers at most {} MiB, then {} MiB",
        bytes / 1_000_000_000,
        began.elapsed(),
        mib(most),
        mib(place.used().memory)
    );
    place.detach_all()?;
    if wrong == 0 { Ok(()) } else { Err("wrong bytes".into()) }
}

/// Bytes on disk of a directory's files.
fn disk_use(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(of) if of.is_dir() => disk_use(&entry.path()),
            Ok(of) => of.blocks() * 512,
            Err(_) => 0,
        })
        .sum()
}

fn soak(options: &Options) -> Result<(), Failure> {
    const LIMIT: u64 = 96 << 20;
    const LAYERS: u64 = 5;
    let count = if options.devices == 0 { 20 } else { options.devices };
    let place = Place::new(options, "96MiB")?;
    let layers: Result<Vec<_>, _> = (0..LAYERS)
        .map(|number| place.layer(options.files / 5, options.seed * 100 + number))
        .collect();
    let layers = layers?;
    let mut attached = Vec::new();
    for number in 0..count {
        let layer = &layers[number % layers.len()];
        attached.push((place.attach(layer)?, layer));
    }
    let menu = vec![
        Fault::ResetBefore,
        Fault::ResetWithin(3000),
        Fault::Status(503, None),
        Fault::Status(500, None),
        Fault::Status(429, Some(1)),
        Fault::ShortBody(100),
        Fault::WrongRange(4096),
        Fault::Delay(Duration::from_millis(300)),
        Fault::SlowBody(200_000),
        Fault::Close,
    ];
    place.origin.set_faults(at_random(options.seed, 50, menu));
    let (readings, mut dice, mut kills) = (Readings::default(), Dice(options.seed), 0);
    let mut samples = Vec::new();
    let until = Instant::now() + Duration::from_secs(options.minutes * 60);
    place.under_load(&attached, 1, &readings, || {
        while Instant::now() < until {
            for _ in 0..20 {
                thread::sleep(Duration::from_millis(500));
                samples.push((place.used(), disk_use(&place.cache())));
            }
            // The list of times would be what grows.
            readings.times.lock().expect("no reader panics with it").clear();
            let service = place.service()?;
            let keepers = place.keepers(service)?;
            match dice.below(3) {
                0 => kill_now(service),
                1 => kill_now(keepers[0]),
                _ => [service, keepers[1]].into_iter().for_each(kill_now),
            }
            kills += 1;
        }
        Ok(())
    })?;
    println!(
        "soak, {}, {} minutes, {count} devices of {LAYERS} layers, {kills} kills",
        options.backend, options.minutes
    );
    readings.print();
    let quarter = samples.len() / 4;
    for (when, part) in [
        ("first quarter", &samples[..quarter]),
        ("last quarter", &samples[samples.len() - quarter..]),
    ] {
        let most = |of: fn(&(Use, u64)) -> u64| part.iter().map(of).max().unwrap_or_default();
        println!(
            "  {when:<14} at most {} MiB of memory, {} descriptors, {} threads, {} MiB of cache",
            mib(most(|(used, _)| used.memory)),
            most(|(used, _)| u64::try_from(used.descriptors).unwrap_or(u64::MAX)),
            most(|(used, _)| u64::try_from(used.threads).unwrap_or(u64::MAX)),
            mib(most(|(_, cache)| *cache))
        );
    }
    let over = samples.iter().filter(|(_, cache)| *cache > LIMIT).count();
    println!(
        "  {over} of {} samples of the cache above its limit of {} MiB",
        samples.len(),
        mib(LIMIT)
    );
    println!("  {:?}", place.origin.counters());
    place.detach_all()?;
    readings.verdict()
}
