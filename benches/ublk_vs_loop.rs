//! 4 KiB random reads of a device whose bytes are all in memory: ublk against the kernel's loop device over the same bytes in
//! tmpfs, in one run, with the same fio.
//!
//! `cargo bench --bench ublk_vs_loop -- [--seconds N] [--rounds N] [--mib N] [--only PART,PART] [--jobs PART,PART]`, as root on a kernel with ublk;
//! `--only` chooses devices and `--jobs` lines of the table by parts of their names. Needs fio and losetup. Where ublk is missing it says so and measures the rest. Every figure is the median of the rounds, which are
//! interleaved; the ratio is to the better of the two loop devices in the same round, with its lowest and highest.

#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

use support::Everything;
use tarblk::internals::device::volume::Volume;
use tarblk::internals::device::{BackendChoice, Device, DeviceOptions, fuse_loop, ublk};

struct Plan {
    seconds: usize,
    rounds: usize,
    mib: usize,
    only: Option<String>,
    jobs: Option<String>,
}

impl Plan {
    fn job(&self, job: Job) -> bool {
        let name = name_of(job);
        self.jobs
            .as_ref()
            .is_none_or(|jobs| jobs.split(',').any(|part| name.contains(part)))
    }
}

/// How fio asks: engine, requests in flight, processes.
type Job = (&'static str, u32, u32);

fn name_of((engine, depth, processes): Job) -> String {
    format!("{engine} qd{depth} x{processes}")
}

const JOBS: &[Job] = &[
    ("libaio", 1, 1),
    ("libaio", 16, 1),
    ("libaio", 64, 1),
    ("libaio", 1, 2),
    ("libaio", 16, 2),
    ("libaio", 64, 2),
    ("io_uring", 1, 1),
    ("io_uring", 64, 2),
];

fn main() -> ExitCode {
    let mut plan = Plan {
        seconds: 2,
        rounds: 3,
        mib: 256,
        only: None,
        jobs: None,
    };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    for pair in arguments.windows(2) {
        let value = || pair[1].parse().expect("a number");
        match pair[0].as_str() {
            "--seconds" => plan.seconds = value(),
            "--rounds" => plan.rounds = value(),
            "--mib" => plan.mib = value(),
            "--only" => plan.only = Some(pair[1].clone()),
            "--jobs" => plan.jobs = Some(pair[1].clone()),
            _ => {}
        }
    }
    let lacks = |tool: &&&str| Command::new(tool).arg("--version").output().is_err();
    let tool = ["fio", "losetup"]
        .iter()
        .find(lacks)
        .map(|tool| format!("needs {tool}"));
    if let Some(why) = support::missing(None).or(tool) {
        eprintln!("SKIP: ublk_vs_loop: {why}");
        return ExitCode::SUCCESS;
    }
    let dir = tempfile::tempdir_in("/dev/shm").expect("a directory in tmpfs");
    let file = dir.path().join("image");
    fill(&file, plan.mib);

    let mut targets: Vec<(&str, PathBuf)> = Vec::new();
    let mut devices = Vec::new();
    let wanted = |name: &str| {
        plan.only
            .as_ref()
            .is_none_or(|only| only.split(',').any(|part| name.contains(part)))
    };
    for (name, options, everything) in carriers().into_iter().filter(|(name, ..)| wanted(name)) {
        let missing = match options.backend {
            BackendChoice::Loop => fuse_loop::preflight(),
            _ => ublk::preflight(),
        };
        if let Err(why) = missing {
            eprintln!("SKIP: {name}: {why}");
            continue;
        }
        let (image, bytes) = support::uniform(&file, everything);
        let volume = Arc::new(Volume::new(image, bytes, 3));
        let (device, _) = Device::start(&volume, &options).expect("a device");
        targets.push((name, device.path().to_owned()));
        devices.push(device);
    }
    let loops = [
        ("loop", attach_loop(&file, false)),
        ("loop, direct", attach_loop(&file, true)),
    ];
    targets.extend(
        loops
            .iter()
            .filter_map(|(name, path)| path.clone().map(|path| (*name, path))),
    );

    let mut results: BTreeMap<(usize, usize), Vec<(f64, f64)>> = BTreeMap::new();
    for _ in 0..plan.rounds {
        for (j, job) in JOBS.iter().enumerate().filter(|(_, job)| plan.job(**job)) {
            for (t, (_, path)) in targets.iter().enumerate() {
                if let Some(measured) = fio(path, *job, plan.seconds) {
                    results.entry((j, t)).or_default().push(measured);
                }
            }
        }
    }
    report(&targets, &results);
    for path in loops.into_iter().filter_map(|(_, path)| path) {
        let _ = Command::new("losetup").arg("-d").arg(path).status();
    }
    for device in devices {
        device.stop().expect("the device goes away");
    }
    ExitCode::SUCCESS
}

/// The devices that are compared: name, how it is made, where its blocks come from.
fn carriers() -> [(&'static str, DeviceOptions, Everything); 7] {
    let by = |backend| DeviceOptions {
        backend,
        ..DeviceOptions::default()
    };
    let (ublk, fuse) = (by(BackendChoice::Ublk), by(BackendChoice::Loop));
    let pinned = DeviceOptions {
        pin_queues: true,
        ..ublk.clone()
    };
    let one_queue = DeviceOptions {
        queues: 1,
        ..ublk.clone()
    };
    [
        ("ublk, layer bytes", ublk.clone(), Everything::Memory),
        ("ublk, metadata", ublk.clone(), Everything::Metadata),
        ("ublk, pinned", pinned, Everything::Memory),
        ("ublk, one queue", one_queue, Everything::Memory),
        ("ublk, fetched", ublk, Everything::FarAway),
        ("fuse+loop", fuse.clone(), Everything::Memory),
        ("fuse+loop, fetched", fuse, Everything::FarAway),
    ]
}

/// Bytes that are nowhere zero and nowhere alike.
fn fill(path: &Path, mib: usize) {
    let mut state = 7u64;
    let mut file = File::create(path).expect("a file");
    let mut buf = vec![0u8; 1 << 20];
    for _ in 0..mib {
        for word in buf.chunks_exact_mut(8) {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&buf).expect("room for the image");
    }
}

fn attach_loop(file: &Path, direct: bool) -> Option<PathBuf> {
    let mut command = Command::new("losetup");
    command.args(["--find", "--show", "--read-only", "--sector-size", "4096"]);
    command.arg(format!("--direct-io={}", if direct { "on" } else { "off" }));
    let output = command.arg(file).output().ok()?;
    if !output.status.success() {
        eprintln!("losetup: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    output
        .status
        .success()
        .then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

/// Reads per second, and the median latency in nanoseconds.
fn fio(path: &Path, (engine, depth, processes): Job, seconds: usize) -> Option<(f64, f64)> {
    let output = Command::new("fio")
        .args([
            "--name=read",
            "--rw=randread",
            "--bs=4k",
            "--direct=1",
            "--readonly",
            "--time_based",
            "--norandommap",
        ])
        .args(["--group_reporting", "--randrepeat=0", "--output-format=json"])
        .arg(format!("--ioengine={engine}"))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--numjobs={processes}"))
        .arg(format!("--runtime={seconds}"))
        .arg(format!("--filename={}", path.display()))
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let json: serde_json::Value = serde_json::from_str(&text[text.find('{')?..]).ok()?;
    let read = &json["jobs"][0]["read"];
    Some((
        read["iops"].as_f64()?,
        read["clat_ns"]["percentile"]["50.000000"].as_f64()?,
    ))
}

/// For each job and device: reads per second and waiting time (medians of the rounds), and how it compares with the better
/// loop device, round by round.
fn report(targets: &[(&str, PathBuf)], results: &BTreeMap<(usize, usize), Vec<(f64, f64)>>) {
    for (j, job) in JOBS.iter().enumerate() {
        let of = |t: usize| results.get(&(j, t));
        let loops: Vec<_> = (0..targets.len())
            .filter(|&t| targets[t].0.starts_with("loop"))
            .filter_map(of)
            .collect();
        let Some(rounds) = (0..targets.len()).filter_map(of).map(Vec::len).min() else {
            continue;
        };
        let bars: Vec<f64> = (0..rounds)
            .map(|round| loops.iter().map(|values| values[round].0).fold(0.0, f64::max))
            .collect();
        println!("{}", name_of(*job));
        for (t, (name, _)) in targets.iter().enumerate() {
            let Some(values) = of(t) else { continue };
            let ratios = values.iter().zip(&bars).map(|((iops, _), bar)| iops / bar);
            let (ratio, low, high) = spread(ratios.collect());
            let (iops, ..) = spread(values.iter().map(|(iops, _)| iops / 1000.0).collect());
            let (wait, ..) = spread(values.iter().map(|(_, wait)| wait / 1000.0).collect());
            println!("  {name:<20} {iops:>7.1} kIOPS  {wait:>6.1} us   {ratio:.2}x  ({low:.2} .. {high:.2})");
        }
    }
}

/// Median, lowest and highest.
fn spread(mut values: Vec<f64>) -> (f64, f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |place: usize| values.get(place).copied().unwrap_or(f64::NAN);
    (at(values.len() / 2), at(0), at(values.len().saturating_sub(1)))
}
