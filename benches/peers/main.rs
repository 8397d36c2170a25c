//! Cold starts side by side: `cargo bench --bench peers -- [OPTIONS]`, as root. What a command takes from nothing, with tarblk in each of
//! its forms, by downloading and unpacking, and by its neighbours, over the same simulated link, runs interleaved.
//!
//! `--runs N` (3); `--rtt MS` (20); `--mbit N` (200); `--systems TEXT`: those whose name has this in it; `--workloads TEXT`, likewise;
//! `--plot FILE.svg`: the medians as a picture.
//!
//! The layers are `tools/debian-layer`'s, with Python and with Node. A neighbour that is not installed is a line that says so, and how
//! to get it: `tools/peers` installs all that there are. Metadata (indexes, bootstraps, tables of contents) come over the link inside
//! the clock, daemons that a machine has running anyway are running before it starts.
//!
//! Parts: `stage` (origin, layers, cold caches, processes), `tarblk` and `unpack` (ours and the usual way), `neighbours` (the others),
//! `results` (table and picture).

mod neighbours;
mod results;
mod stage;
#[path = "../support/mod.rs"]
mod support;
mod tarblk;
mod unpack;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use ::tarblk::internals::bench::ChrootMounts;
use ::tarblk::internals::bench::origin::Link;
use results::{Results, Run};
use stage::{Layer, Stage, drop_caches, memory_of};

type Failure = Box<dyn std::error::Error>;

/// A way from a layer on a server to a root directory.
trait System {
    /// What tables call it.
    fn name(&self) -> &'static str;

    /// What has to be made of a layer beforehand, and published, for it.
    fn needs(&self) -> &'static str;

    /// Makes and publishes that. Called once for each layer; an error is why this system is left out.
    fn publish(&mut self, stage: &Stage, layer: &Layer) -> Result<(), Failure>;

    /// Brings into being what a machine has running before a start: daemons without any of the layer's bytes. `work` is an empty
    /// directory on disk for this run, `workload` what will be run in it.
    fn ready(&self, stage: &Stage, workload: &Workload, work: &Path) -> Result<Box<dyn Ready>, Failure>;
}

/// A system that is ready to start something.
trait Ready {
    /// Makes the layer's root appear at `root`, which is an empty directory. The clock runs.
    fn start(&mut self, root: &Path) -> Result<(), Failure>;

    /// Takes down what there is, as far as it came.
    fn stop(&mut self, root: &Path);
}

/// What runs in a layer.
struct Workload {
    name: &'static str,
    layer: &'static str,
    command: &'static [&'static str],
}

const WORKLOADS: [Workload; 5] = [
    Workload {
        name: "cat one file",
        layer: "numpy",
        command: &["cat", "/etc/os-release"],
    },
    Workload {
        name: "import numpy",
        layer: "numpy",
        command: &["python3", "-c", "import numpy"],
    },
    Workload {
        name: "find with stat",
        layer: "numpy",
        command: &["find", "/", "-xdev", "-printf", "%s %m %t %p\\n"],
    },
    Workload {
        name: "read 1,744 files",
        layer: "numpy",
        command: &[
            "find",
            "/usr/lib/python3/dist-packages",
            "-type",
            "f",
            "-exec",
            "cat",
            "{}",
            "+",
        ],
    },
    Workload {
        name: "node, express",
        layer: "node",
        command: &["node", "-e", "require('express')"],
    },
];

struct Options {
    runs: usize,
    link: Link,
    systems: String,
    workloads: String,
    plot: Option<String>,
}

fn options() -> Result<Options, Failure> {
    let mut options = Options {
        runs: 3,
        link: Link {
            rtt: std::time::Duration::from_millis(20),
            rate: Some(200_000_000 / 8),
        },
        systems: String::new(),
        workloads: String::new(),
        plot: None,
    };
    let mut arguments = support::arguments().into_iter();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--runs" => options.runs = value()?.parse()?,
            "--rtt" => options.link.rtt = std::time::Duration::from_millis(value()?.parse()?),
            "--mbit" => options.link.rate = Some(value()?.parse::<u64>()? * 1_000_000 / 8),
            "--systems" => options.systems = value()?,
            "--workloads" => options.workloads = value()?,
            "--plot" => options.plot = Some(value()?),
            other => return Err(format!("what is {other}? See the head of benches/peers/main.rs").into()),
        }
    }
    Ok(options)
}

fn main() -> Result<(), Failure> {
    let options = options()?;
    let workloads: Vec<_> = WORKLOADS
        .iter()
        .filter(|workload| workload.name.contains(&options.workloads))
        .collect();
    let stage = Stage::new(workloads.iter().map(|workload| workload.layer))?;
    let mut systems: Vec<Box<dyn System>> = unpack::systems();
    systems.extend(tarblk::systems());
    systems.extend(neighbours::systems());
    systems.retain(|system| system.name().contains(&options.systems));

    // Whoever cannot be prepared is told now and left out.
    let mut there = Vec::new();
    for mut system in systems {
        eprintln!("preparing {}", system.name());
        let prepared = stage.layers.iter().try_for_each(|layer| system.publish(&stage, layer));
        match prepared {
            Ok(()) => there.push(system),
            Err(why) => println!("left out: {}: {why}", system.name()),
        }
    }

    let mut results = Results::new(
        there.iter().map(|system| (system.name(), system.needs())).collect(),
        workloads.iter().map(|workload| workload.name).collect(),
    );
    for round in 0..options.runs {
        for (column, workload) in workloads.iter().enumerate() {
            for (row, system) in there.iter().enumerate() {
                stage.origin.set_link(Link::default());
                let run = run(&stage, system.as_ref(), workload, options.link);
                match run {
                    Ok(run) => {
                        eprintln!("{round}: {}, {}: {run}", workload.name, system.name());
                        results.add(row, column, run);
                    }
                    Err(why) => {
                        eprintln!("{round}: {}, {}: failed: {why}", workload.name, system.name());
                        results.fail(row, column, &why.to_string());
                    }
                }
            }
        }
    }
    print!("{}", results.table(options.link));
    if let Some(file) = options.plot {
        std::fs::write(file, results.plot(options.link))?;
    }
    Ok(())
}

/// Runs a workload to its end with `root` as its root directory; `ended` is told when that was, before anything is taken down.
fn execute<T>(root: &Path, workload: &Workload, ended: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    let mounts = ChrootMounts::new(root)?;
    let output = Command::new("chroot")
        .arg(root)
        .args(workload.command)
        .current_dir("/")
        .env_clear()
        .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()?;
    let told = ended();
    drop(mounts);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("{}: {}", output.status, said.trim()).into());
    }
    told
}

/// One cold start.
fn run(stage: &Stage, system: &dyn System, workload: &Workload, link: Link) -> Result<Run, Failure> {
    let work = stage.directory()?;
    let root = stage.root()?;
    let mut ready = system.ready(stage, workload, work.path())?;
    drop_caches()?;
    stage.origin.set_link(link);
    let _ = stage.origin.take_log();
    let clock = Instant::now();
    let ran = ready.start(&root).and_then(|()| {
        execute(&root, workload, || {
            let took = clock.elapsed();
            let log = stage.origin.log();
            Ok(Run {
                took,
                bytes: log
                    .timeline
                    .iter()
                    .rfind(|(at, _)| *at <= took)
                    .map_or(0, |point| point.1),
                requests: log.arrived,
                memory: memory_of(work.path())?,
            })
        })
    });
    stage.origin.set_link(Link::default());
    ready.stop(&root);
    ran
}
