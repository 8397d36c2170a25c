//! 4 KiB random reads of a device whose bytes are all in memory: ublk against the kernel's loop device over the same bytes in
//! tmpfs, in one run, with the same fio.
//!
//! `cargo bench --bench ublk_vs_loop -- [--seconds N] [--rounds N] [--mib N] [--only PART,PART]`, as root on a kernel with ublk; needs fio and
//! losetup. Where ublk is missing it says so and measures the rest. Every figure is the median of the rounds, which are
//! interleaved; the ratio is to the better of the two loop devices.

#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::Arc;

use support::Everything;
use tarblk::device::volume::Volume;
use tarblk::device::{BackendChoice, Device, DeviceOptions, fuse_loop, ublk};

struct Plan {
    seconds: usize,
    rounds: usize,
    mib: usize,
    only: Option<String>,
}

/// How fio asks: engine, requests in flight, processes.
const JOBS: &[(&str, u32, u32)] = &[
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
    };
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    for pair in arguments.windows(2) {
        let value = || pair[1].parse().expect("a number");
        match pair[0].as_str() {
            "--seconds" => plan.seconds = value(),
            "--rounds" => plan.rounds = value(),
            "--mib" => plan.mib = value(),
            "--only" => plan.only = Some(pair[1].clone()),
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
    for (name, options, everything) in carriers() {
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
    if let Some(only) = &plan.only {
        targets.retain(|(name, _)| only.split(',').any(|part| name.contains(part)));
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
        for (j, job) in JOBS.iter().enumerate() {
            for (t, (_, path)) in targets.iter().enumerate() {
                if let Some(measured) = fio(path, *job, plan.seconds) {
                    results.entry((j, t)).or_default().push(measured);
                }
            }
        }
    }
    report(&targets, &mut results);
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
fn fio(path: &Path, (engine, depth, processes): (&str, u32, u32), seconds: usize) -> Option<(f64, f64)> {
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

fn report(targets: &[(&str, PathBuf)], results: &mut BTreeMap<(usize, usize), Vec<(f64, f64)>>) {
    print!("{:<18}", "kIOPS, median wait");
    for (name, _) in targets {
        print!("{name:>24}");
    }
    println!();
    for (j, (engine, depth, processes)) in JOBS.iter().enumerate() {
        print!("{:<18}", format!("{engine} qd{depth} x{processes}"));
        let mut median = |t: usize| {
            let values = results.get_mut(&(j, t))?;
            values.sort_by(|a, b| a.0.total_cmp(&b.0));
            values.get(values.len() / 2).copied()
        };
        let medians: Vec<_> = (0..targets.len()).map(&mut median).collect();
        let loops = targets
            .iter()
            .zip(&medians)
            .filter(|((name, _), _)| name.starts_with("loop"));
        let bar = loops
            .filter_map(|(_, median)| *median)
            .map(|(iops, _)| iops)
            .fold(0.0, f64::max);
        for value in medians {
            let show = |(iops, latency): (f64, f64)| {
                format!("{:.1} ({:.2}x) {:.0}us", iops / 1000.0, iops / bar, latency / 1000.0)
            };
            let cell = value.map_or("-".to_owned(), show);
            print!("{cell:>24}");
        }
        println!();
    }
}
