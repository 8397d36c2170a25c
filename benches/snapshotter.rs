//! Containers from nothing, by containerd: `cargo bench --bench snapshotter -- [OPTIONS]`, as root, with Debian's containerd and runc.
//!
//! A registry (Debian's) is 20 ms and 200 Mbit/s away (`support/far.rs`). The image is pulled through the CRI and a command runs in it, each
//! time with everything new: containerd, its root, the snapshotter, service and caches. In turn: containerd's own overlayfs
//! snapshotter; tarblk without an index of the image; tarblk with one that lies beside it and is believed. Then a second container of
//! the image that is here by now, on each. At the end many images: what claiming and attaching them takes, and the memory of it.
//!
//! `--image LAYOUT:TAG` (below `TARBLK_TEST_IMAGES`; `debian-python:distribution-gzip`), `--rtt MS`, `--mbit N`, `--runs N`,
//! `--many LAYOUT` (`whiteouts`; all its tags) or `--many IMAGESxLAYERS` (`40x8`: made for it; these are pulled and run, too), `--only pull|many`, `--verbose` (the snapshotter's log of each
//! run, and what its devices counted).

mod support;

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "support/far.rs"]
mod far;
#[path = "support/many.rs"]
mod many_images;
#[path = "../tests/registry/mod.rs"]
mod registry;
#[path = "../tests/snapshots/mod.rs"]
mod snapshots;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use far::Far;
use registry::{Access, Registry};
use serde_json::Value;
use snapshots::Lab;
use snapshots::containerd::Containerd;
use support::{Runs, time_ratios};
use tarblk::internals::digest::{Algorithm, Digest};

type Failure = Box<dyn std::error::Error>;

/// So many containers are run after the second one.
const LATER: usize = 5;

/// What the container runs.
const COMMAND: [&str; 3] = ["python3", "-c", "import numpy"];

struct Options {
    image: String,
    rtt: Duration,
    mbit: u32,
    runs: usize,
    many: String,
    only: Option<String>,
    verbose: bool,
}

fn options() -> Result<Options, Failure> {
    let mut options = Options {
        image: "debian-python:distribution-gzip".into(),
        rtt: Duration::from_millis(20),
        mbit: 200,
        runs: 5,
        many: "whiteouts".into(),
        only: None,
        verbose: false,
    };
    let mut arguments = support::arguments().into_iter();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--image" => options.image = value()?,
            "--rtt" => options.rtt = Duration::from_millis(value()?.parse()?),
            "--mbit" => options.mbit = value()?.parse()?,
            "--runs" => options.runs = value()?.parse::<usize>()?.max(1),
            "--many" => options.many = value()?,
            "--verbose" => options.verbose = true,
            "--only" => options.only = Some(value()?),
            other => return Err(format!("what is {other}?").into()),
        }
    }
    Ok(options)
}

/// A way to start a container.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Overlayfs,
    Unindexed,
    Indexed,
    /// Without containerd: `tarblk mount` and chroot.
    Mounted,
}

/// How long the parts of a run took.
#[derive(Default)]
struct Times {
    title: &'static str,
    pull: Vec<Duration>,
    /// Finding the indexes and making the device, within the first container's time.
    attach: Vec<Duration>,
    whole: Vec<Duration>,
    second: Vec<Duration>,
    /// Containers of the image after that, when nothing of the first is written or learned any more.
    later: Vec<Duration>,
}

fn main() -> Result<(), Failure> {
    let options = options()?;
    let images = std::env::var_os("TARBLK_TEST_IMAGES").map(PathBuf::from);
    let images = images.ok_or("set TARBLK_TEST_IMAGES to where tools/test-images put its images")?;
    let wants = |part: &str| options.only.as_ref().is_none_or(|only| only == part);
    if wants("pull") {
        pulls(&options, &images)?;
    }
    if wants("many") {
        many(&options, &images)?;
    }
    Ok(())
}

fn pulls(options: &Options, images: &Path) -> Result<(), Failure> {
    let registry = Registry::with("bench", Access::Anonymous, images, &[&options.image]).ok_or("no registry")?;
    let near = registry.host();
    common::succeed(
        Command::new(common::TARBLK)
            .args(["--quiet", "index", "push", "--plain-http"])
            .arg(format!("docker://{near}/{}", options.image)),
    );
    let far = Far::with_rate(near.parse()?, options.rtt, Some(options.mbit * 125_000))?;
    let mut all = [
        (Way::Overlayfs, "containerd, overlayfs"),
        (Way::Unindexed, "tarblk, no index"),
        (Way::Indexed, "tarblk, index beside it"),
        (Way::Mounted, "the same by tarblk mount"),
    ]
    .map(|(way, title)| {
        let times = Times {
            title,
            ..Times::default()
        };
        (way, times)
    });
    println!(
        "{}, {} ms and {} Mbit/s away; {} runs each in turn",
        options.image,
        options.rtt.as_millis(),
        options.mbit,
        options.runs
    );
    for _ in 0..options.runs {
        for (way, times) in &mut all {
            if *way == Way::Mounted {
                mount(times, &far.address().to_string(), options)?;
                continue;
            }
            run(*way, times, &far.address().to_string(), options)?;
            far.take();
        }
    }
    for (_, times) in &all {
        if times.pull.is_empty() {
            println!("{:26} mount and run      {}", times.title, Runs::ms(&times.whole));
            continue;
        }
        println!("{:26} pull               {}", times.title, Runs::ms(&times.pull));
        println!("{:26} of which attach    {}", "", Runs::ms(&times.attach));
        println!("{:26} pull and run       {}", "", Runs::ms(&times.whole));
        println!("{:26} a second container {}", "", Runs::ms(&times.second));
        println!("{:26} later ones        {}", "", Runs::ms(&times.later));
    }
    let [(_, overlayfs), (_, unindexed), (_, indexed), (_, mounted)] = &all;
    println!(
        "no index / overlayfs, pull and run: {}",
        time_ratios(&unindexed.whole, &overlayfs.whole)
    );
    println!(
        "index / overlayfs, pull and run: {}",
        time_ratios(&indexed.whole, &overlayfs.whole)
    );
    println!(
        "index by containerd / by tarblk mount: {}",
        time_ratios(&indexed.whole, &mounted.whole)
    );
    println!(
        "second container / overlayfs: {}",
        time_ratios(&unindexed.second, &overlayfs.second)
    );
    println!(
        "later ones / overlayfs: {}",
        time_ratios(&unindexed.later, &overlayfs.later)
    );
    Ok(())
}

/// One container from nothing, and a second one.
fn run(way: Way, times: &mut Times, registry: &str, options: &Options) -> Result<(), Failure> {
    let lab = Lab::new("bench", "").ok_or("containers cannot be run here")?;
    let snapshotter = match way {
        Way::Overlayfs => "overlayfs",
        Way::Unindexed | Way::Indexed | Way::Mounted => "tarblk",
    };
    let mut lab = lab;
    if way == Way::Indexed {
        lab.stop();
        fs::create_dir_all(lab.dir().join("etc"))?;
        fs::write(lab.dir().join("etc/tarblk.toml"), "trust = \"registry\"\n")?;
        lab.start();
    }
    let containerd = Containerd::start(&lab, registry, snapshotter);
    let image = format!("{registry}/{}", options.image);
    let began = Instant::now();
    containerd.pull(&image);
    times.pull.push(began.elapsed());
    containerd.run(snapshotter, &image, "first", &COMMAND);
    times.whole.push(began.elapsed());
    let metrics = lab.get("/metrics");
    let attach = metrics
        .lines()
        .find_map(|line| line.strip_prefix("tarblk_snapshotter_attach_seconds_total "));
    times
        .attach
        .push(Duration::from_secs_f64(attach.ok_or("no metrics")?.parse()?));
    if options.verbose {
        println!("{}", lab.log());
        for chain in lab.chains() {
            let stats = common::succeed(&mut lab.command(&["stats", &chain.display().to_string()]));
            println!("{}", String::from_utf8_lossy(&stats));
        }
    }
    // What the first one read is in memory now, on both.
    let began = Instant::now();
    containerd.run(snapshotter, &image, "second", &COMMAND);
    times.second.push(began.elapsed());
    for number in 0..LATER {
        let began = Instant::now();
        containerd.run(snapshotter, &image, &format!("later-{number}"), &COMMAND);
        times.later.push(began.elapsed());
    }
    let names = containerd.succeed(&["images", "ls", "--quiet"]);
    containerd.succeed(&[&["images", "rm", "--sync"], &names.lines().collect::<Vec<_>>()[..]].concat());
    drop(containerd);
    Ok(())
}

/// The same command in the same image from nothing, mounted by hand.
fn mount(times: &mut Times, registry: &str, options: &Options) -> Result<(), Failure> {
    let lab = Lab::new("bench", "").ok_or("containers cannot be run here")?;
    let dir = lab.dir().join("mounted");
    fs::create_dir(&dir)?;
    let (image, dir) = (
        format!("docker://{registry}/{}", options.image),
        dir.display().to_string(),
    );
    let began = Instant::now();
    let arguments = ["--quiet", "mount", &image, &dir, "--trust", "registry", "--plain-http"];
    common::succeed(&mut lab.command(&arguments));
    common::succeed(Command::new("chroot").arg(&dir).args(COMMAND));
    times.whole.push(began.elapsed());
    common::succeed(&mut lab.command(&["umount", &dir]));
    Ok(())
}

/// What a process has in memory, in MiB.
fn resident(pid: u32) -> Result<f64, Failure> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .ok_or("no VmRSS")?;
    let kib: f64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib / 1024.0)
}

/// How many devices there are, and the memory of the service of them.
fn devices(lab: &Lab) -> Result<(usize, f64), Failure> {
    let devices = common::succeed(&mut lab.command(&["ps", "--json"]));
    let devices: Value = serde_json::from_slice(&devices)?;
    let service = devices[0]["process"]["pid"]
        .as_u64()
        .and_then(|pid| u32::try_from(pid).ok());
    let count = devices.as_array().map_or(0, Vec::len);
    Ok((count, resident(service.ok_or("no service")?)?))
}

/// Pulls every image through the CRI and runs a command in each, one after the other.
fn many_pulled(options: &Options, images: &Path, tags: &[String], names: &[&str]) -> Result<(), Failure> {
    let registry = Registry::with("bench", Access::Anonymous, images, names).ok_or("no registry")?;
    let far = Far::with_rate(registry.host().parse()?, options.rtt, Some(options.mbit * 125_000))?;
    let lab = Lab::new("bench", "").ok_or("containers cannot be run here")?;
    let containerd = Containerd::start(&lab, &far.address().to_string(), "tarblk");
    let image = |tag: &String| format!("{}/{}:{tag}", far.address(), options.many);
    let (mut pulls, mut runs) = (Vec::new(), Vec::new());
    for tag in tags {
        let began = Instant::now();
        containerd.pull(&image(tag));
        pulls.push(began.elapsed());
    }
    println!("a pull of each, by the CRI: {}", Runs::ms(&pulls));
    println!("snapshotter: {:.1} MiB resident", resident(lab.pid())?);
    for (number, tag) in tags.iter().enumerate() {
        let began = Instant::now();
        containerd.run("tarblk", &image(tag), &format!("c{number}"), &["/bin/true"]);
        runs.push(began.elapsed());
    }
    println!("a first container of each: {}", Runs::ms(&runs));
    let (count, service) = devices(&lab)?;
    println!(
        "{count} devices; the service of them has {service:.1} MiB, the snapshotter {:.1} MiB",
        resident(lab.pid())?
    );
    containerd.remove_images(&lab);
    drop(containerd);
    lab.assert_gone();
    Ok(())
}

/// Claims every image of a layout and makes a container's snapshot on each.
fn many(options: &Options, images: &Path) -> Result<(), Failure> {
    let made = common::scratch("many-");
    let counts = options
        .many
        .split_once('x')
        .and_then(|(images, layers)| Some((images.parse().ok()?, layers.parse().ok()?)));
    let images = match counts {
        Some((count, layers)) => {
            many_images::write(&made.path().join(&options.many), count, layers)?;
            made.path()
        }
        None => images,
    };
    let layout = images.join(&options.many);
    let tags = common::unpacked::tags(&layout);
    let names: Vec<String> = tags.iter().map(|tag| format!("{}:{tag}", options.many)).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    if counts.is_some() {
        many_pulled(options, images, &tags, &names)?;
    }
    let registry = Registry::with("bench", Access::Anonymous, images, &names).ok_or("no registry")?;
    let lab = Lab::new("bench", "").ok_or("containers cannot be run here")?;
    let empty = resident(lab.pid())?;
    let (mut layers, mut tops) = (0, Vec::new());
    let began = Instant::now();
    for tag in &tags {
        let (manifest, value) = common::unpacked::manifest(&layout, tag);
        let config = value["config"]["digest"].as_str().unwrap_or_default();
        let config: Value = serde_json::from_slice(&fs::read(common::unpacked::blob(&layout, config))?)?;
        let diff_ids = config["rootfs"]["diff_ids"].as_array().ok_or("no diff IDs")?;
        let mut parent = String::new();
        for (layer, diff_id) in value["layers"].as_array().ok_or("no layers")?.iter().zip(diff_ids) {
            let diff_id = diff_id.as_str().unwrap_or_default();
            let chain = if parent.is_empty() {
                diff_id.to_owned()
            } else {
                Digest::of(Algorithm::Sha256, format!("{parent} {diff_id}").as_bytes()).to_string()
            };
            let labels = [
                ("containerd.io/snapshot.ref", chain.as_str()),
                (
                    "containerd.io/snapshot/cri.image-ref",
                    &format!("{}/{}:{tag}", registry.host(), options.many),
                ),
                (
                    "containerd.io/snapshot/cri.layer-digest",
                    layer["digest"].as_str().unwrap_or_default(),
                ),
                ("containerd.io/snapshot/cri.manifest-digest", &manifest),
            ];
            match lab.prepare_with(&format!("{tag}/{chain}"), &parent, &labels) {
                Err(failed) if failed.code == snapshots::client::ALREADY_EXISTS => layers += 1,
                other => return Err(format!("{tag} is not claimed: {other:?}").into()),
            }
            parent = chain;
        }
        tops.push((tag, parent));
    }
    let claiming = began.elapsed();
    println!(
        "{}: {} images of {layers} layers claimed in {:.2} s; {:.1} MiB resident, {empty:.1} MiB before",
        options.many,
        tags.len(),
        claiming.as_secs_f64(),
        resident(lab.pid())?
    );
    let mut times = Vec::new();
    for (tag, top) in &tops {
        let began = Instant::now();
        let made = lab.prepare(&format!("container-{tag}"), top);
        made.map_err(|failed| format!("{tag}: {failed:?}"))?;
        times.push(began.elapsed());
    }
    println!("a device for each, in turn: {}", Runs::ms(&times));
    println!("{:.1} MiB resident then", resident(lab.pid())?);
    let (count, service) = devices(&lab)?;
    println!("{count} devices; the service of them has {service:.1} MiB");
    for (tag, _) in &tops {
        lab.remove(&format!("container-{tag}"))
            .map_err(|failed| failed.message)?;
    }
    // From above: what has others above it stays for a later round.
    while !lab.names().is_empty() {
        for name in lab.names() {
            let _ = lab.remove(&name);
        }
    }
    lab.assert_gone();
    Ok(())
}
