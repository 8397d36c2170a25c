//! What it takes to know a layer well enough to mount it: `cargo bench --bench plan -- [LAYER.tar] [--mkfs MKFS.EROFS]`.
//!
//! With a layer: from its headers (in the page cache) to an index file and a planned image, a process a run, against
//! `mkfs.erofs --tar=i` of erofs-utils 1.9, which does the same for EROFS; found on PATH unless `--mkfs` names it. The two
//! take turns; times and memory are those of whole processes.
//!
//! Always: an index of 1,000,000 entries that it makes, from the file to a planned image, and how long a metadata block
//! takes to fill; the same as ten layers that hide some of each other; then, as root, from a planned image to a mounted one.

#![allow(
    clippy::as_conversions,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation
)]

mod support;

use std::fs::{self, File};
use std::hint::black_box;
use std::io::Read as _;
use std::ops::Range;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use support::{Runs, ratios, time_ratios};
use tarblk::internals::device::volume::Volume;
use tarblk::internals::device::{Device, DeviceOptions};
use tarblk::internals::fetch::{FetchOptions, Fetcher, LayerSource};
use tarblk::internals::image::ext4::{Ext4Image, Ext4Options};
use tarblk::internals::image::{BlockImage as _, Origin};
use tarblk::internals::index::{Entry, EntrySink as _, Index, IndexBuilder, Kind, Segment, Timestamp, walk};
use tarblk::internals::mount::{MountOptions, mount_device};
use tarblk::internals::source::Blob;
use tarblk::internals::tree::{TreeBuilder, TreeMode};
use tarblk::internals::units::{LayerId, TarOffset};

const RUNS: usize = 15;
const ENTRIES: u32 = 1_000_000;
const LAYERS: u32 = 10;

/// `mkfs.erofs` has `--tar=i` since 1.7; the figure to beat is of this version.
const RIVAL_VERSION: (u32, u32) = (1, 9);

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let args = support::arguments();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["layer", layer, index] => return know_layer(layer, index),
        ["make", path] => return Ok(fs::write(path, make_index(0..ENTRIES)?)?),
        ["make-layers", path] => return make_layers(path),
        ["planned", index] => return planned(TreeMode::Plain, &[index.to_owned()]),
        ["planned-layers", path] => {
            return planned(
                TreeMode::Merged,
                &(0..LAYERS).map(|layer| layer_path(path, layer)).collect::<Vec<_>>(),
            );
        }
        ["mounted", index, dir] => return mounted(index, dir),
        [] => {}
        [layer] => compare(layer, "mkfs.erofs")?,
        [layer, "--mkfs", mkfs] | ["--mkfs", mkfs, layer] => compare(layer, mkfs)?,
        _ => return Err("usage: plan [LAYER.tar] [--mkfs MKFS.EROFS]".into()),
    }
    million()
}

// ------------------------------------------------------------------------------------------------ a layer, and a rival

fn compare(layer: &str, mkfs: &str) -> Outcome<()> {
    let rival = match rival_version(mkfs) {
        Ok(version) => {
            println!("{layer}: index file and image plan, against {version} --tar=i, {RUNS} runs each in turn");
            true
        }
        Err(why) => {
            eprintln!("SKIP: the comparison with mkfs.erofs: {why}");
            println!("{layer}: index file and image plan, {RUNS} runs");
            false
        }
    };
    // Both find the layer in the page cache.
    std::io::copy(&mut File::open(layer)?, &mut std::io::sink())?;
    let dir = tempfile::tempdir()?;
    let at = |name: &str| dir.path().join(name).display().to_string();
    let this = std::env::current_exe()?.display().to_string();
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        ours.push(whole_process(&[&this, "layer", layer, &at("index")])?);
        if rival {
            // An image that is there already would be overwritten, which is another job than writing a new one.
            let _absent_at_first = fs::remove_file(at("image"));
            theirs.push(whole_process(&[mkfs, "--quiet", "--tar=i", &at("image"), layer])?);
        }
    }
    show("tarblk", &ours);
    if rival {
        show("mkfs.erofs", &theirs);
        let times = |all: &[Process]| all.iter().map(|one| one.took).collect::<Vec<_>>();
        println!(
            "  {:<22} {}",
            "mkfs.erofs / tarblk",
            time_ratios(&times(&theirs), &times(&ours))
        );
        if let (Some(ours), Some(theirs)) = (memory(&ours), memory(&theirs)) {
            println!("  {:<22} {}", "memory, the same", ratios(&theirs, &ours));
        }
    }
    Ok(())
}

/// What one finished process took.
struct Process {
    took: Duration,
    /// Peak memory in MB, where GNU time is there to tell.
    memory: Option<f64>,
}

fn whole_process(command: &[&str]) -> Outcome<Process> {
    let timer = Path::new("/usr/bin/time");
    let note = tempfile::NamedTempFile::new()?;
    let mut all = if timer.exists() {
        let mut all = Command::new(timer);
        all.args(["-f", "%M", "-o"]).arg(note.path()).args(command);
        all
    } else {
        let mut all = Command::new(command[0]);
        all.args(&command[1..]);
        all
    };
    let start = Instant::now();
    let output = all.stdout(Stdio::null()).stderr(Stdio::piped()).output()?;
    let took = start.elapsed();
    if !output.status.success() {
        return Err(format!("{} failed: {}", command[0], String::from_utf8_lossy(&output.stderr)).into());
    }
    let kib: Option<f64> = fs::read_to_string(note.path())?.trim().parse().ok();
    let memory = kib.map(|kib| kib * 1024.0 / 1e6);
    Ok(Process { took, memory })
}

fn memory(all: &[Process]) -> Option<Vec<f64>> {
    all.iter().map(|one| one.memory).collect()
}

fn show(name: &str, all: &[Process]) {
    let times: Vec<Duration> = all.iter().map(|one| one.took).collect();
    println!("  {name:<22} {}", Runs::ms(&times));
    match memory(all) {
        Some(peaks) => println!("  {:<22} {}", "  peak memory", Runs::new(peaks, "MB")),
        None => println!("  {:<22} not measured: needs GNU time (/usr/bin/time)", "  peak memory"),
    }
}

/// The name and version that a usable `mkfs.erofs` gives itself.
fn rival_version(mkfs: &str) -> Result<String, String> {
    let output = Command::new(mkfs)
        .arg("--version")
        .output()
        .map_err(|error| format!("cannot run {mkfs}: {error} (--mkfs names it)"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    let first = text.lines().next().unwrap_or_default();
    let parse = |word: &str| -> Option<(u32, u32)> {
        let mut numbers = word.split('.');
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    };
    match first.split_whitespace().find_map(parse) {
        Some(version) if version >= RIVAL_VERSION => Ok(first.to_owned()),
        Some(_) => Err(format!("`{first}` is too old: needs erofs-utils 1.9")),
        None => Err(format!("`{mkfs} --version` says no version: `{first}`")),
    }
}

/// What `attach` does with a layer nobody indexed: headers to an index, which is kept; index to tree, tree to image.
fn know_layer(layer: &str, path: &str) -> Outcome<()> {
    let file = File::open(layer)?;
    let len = file.metadata()?.len();
    let mut builder = IndexBuilder::new();
    let walked = walk::local(&file, len, &mut builder, &mut |_, _| {})?;
    let bytes = builder.finish(len, walked.end);
    fs::write(path, &bytes)?;
    black_box(plan(bytes)?);
    Ok(())
}

fn plan(index: Vec<u8>) -> Outcome<Ext4Image> {
    let mut tree = TreeBuilder::new();
    Index::open(index)?.replay(&mut tree)?;
    Ok(Ext4Image::plan(tree.finish(), &Ext4Options::default())?)
}

// ------------------------------------------------------------------------------------------------ a million entries

fn million() -> Outcome<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("million.tarblk");
    let path = path.to_str().ok_or("an odd temporary path")?;
    child::<0>(&["make", path])?;
    println!(
        "1,000,000 entries in an index file of {:.1} MB; a process a run",
        fs::metadata(path)?.len() as f64 / 1e6
    );
    show_planned("planned", path)?;
    child::<0>(&["make-layers", path])?;
    println!("  the same in {LAYERS} layers:");
    show_planned("planned-layers", path)?;

    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: from planned to mounted: needs root");
        return Ok(());
    }
    let mount_point = dir.path().join("mounted");
    fs::create_dir(&mount_point)?;
    let mount_point = mount_point.to_str().ok_or("an odd temporary path")?;
    let runs: Vec<[f64; 4]> = (0..RUNS)
        .map(|_| child(&["mounted", path, mount_point]))
        .collect::<Result<_, _>>()?;
    let carrier = if runs[0][3] > 0.0 { "ublk" } else { "loop" };
    let show = |name: &str, field: usize, unit| {
        let values = runs.iter().map(|run| run[field]).collect();
        println!("  {name:<22} {}", Runs::new(values, unit));
    };
    println!("  then, on {carrier}:");
    show("device and mount", 0, "ms");
    show("  peak memory", 1, "MB");
    show("first `ls` of the root", 2, "ms");
    Ok(())
}

fn show_planned(mode: &str, path: &str) -> Outcome<()> {
    let runs: Vec<[f64; 6]> = (0..RUNS).map(|_| child(&[mode, path])).collect::<Result<_, _>>()?;
    let show = |name: &str, field: usize, unit| {
        let values = runs.iter().map(|run| run[field]).collect();
        println!("  {name:<22} {}", Runs::new(values, unit));
    };
    show("index file + tree", 0, "ms");
    show("image plan", 1, "ms");
    show("planned", 2, "ms");
    show("  peak memory", 3, "MB");
    show("a metadata block", 4, "us");
    show("image", 5, "MB");
    Ok(())
}

/// From the index file to a planned image, measured in this process; prints the numbers for the parent.
fn planned(mode: TreeMode, paths: &[String]) -> Outcome<()> {
    let start = Instant::now();
    let mut builder = TreeBuilder::with_mode(mode);
    for (layer, path) in (0..).zip(paths) {
        builder.begin_layer(LayerId(layer))?;
        Index::open(fs::read(path)?)?.replay(&mut builder)?;
    }
    let tree = builder.finish();
    let tree_time = start.elapsed();
    let image = Ext4Image::plan(tree, &Ext4Options::default())?;
    let planned = start.elapsed();
    let memory = peak_memory()?;
    let mut pieces = Vec::new();
    image.pieces(0, image.len() / 4096, &mut pieces);
    let metadata: u64 = pieces
        .iter()
        .filter(|piece| piece.origin == Origin::Metadata)
        .map(|piece| piece.len / 4096)
        .sum();
    let start = Instant::now();
    let mut block = [0; 4096];
    for number in 0..metadata {
        image.fill_metadata(number, &mut block);
        black_box(&block);
    }
    let fill = start.elapsed().as_secs_f64() * 1e6 / metadata as f64;
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    println!(
        "{} {} {} {memory} {fill} {}",
        ms(tree_time),
        ms(planned.saturating_sub(tree_time)),
        ms(planned),
        image.len() as f64 / 1e6
    );
    Ok(())
}

/// From a planned image to a mounted one: the fetcher's thread, the device, the kernel's mount. The layer is a file of the
/// right length with nothing in it, which mounting does not notice.
fn mounted(index: &str, dir: &str) -> Outcome<()> {
    let bytes = fs::read(index)?;
    let size = Index::open(bytes.clone())?.tar_len();
    let image = Arc::new(plan(bytes)?);
    let file = tempfile::NamedTempFile::new()?;
    file.as_file().set_len(size)?;
    let start = Instant::now();
    let layer = LayerSource::from(Blob::of_file("million.tar".to_owned(), file.path())?);
    let fetcher = Fetcher::start(vec![layer], FetchOptions::default(), Some(image.clone()))?;
    let options = DeviceOptions::default();
    let volume = Arc::new(Volume::new(
        image,
        Arc::new(fetcher.clone()),
        usize::from(options.queues),
    ));
    let (device, _) = Device::start(&volume, &options)?;
    let mounted = mount_device(device.path(), Path::new(dir), &MountOptions::default());
    let took = start.elapsed();
    let memory = peak_memory()?;
    let start = Instant::now();
    let listed = fs::read_dir(dir).map(Iterator::count);
    let ls = start.elapsed();
    let ublk = device.backend() == tarblk::internals::device::Backend::Ublk;
    if mounted.is_ok() {
        rustix::mount::unmount(dir, rustix::mount::UnmountFlags::empty())?;
    }
    device.stop()?;
    fetcher.shutdown();
    mounted?;
    if listed? == 0 {
        return Err("the mounted root is empty".into());
    }
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    println!("{} {memory} {} {}", ms(took), ms(ls), u8::from(ublk));
    Ok(())
}

/// Runs this program again, in the mode that `args` name, and reads the numbers that it prints.
fn child<const N: usize>(args: &[&str]) -> Outcome<[f64; N]> {
    let output = Command::new(std::env::current_exe()?).args(args).output()?;
    let text = String::from_utf8(output.stdout)?;
    let numbers: Vec<f64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let wrong = || format!("{args:?}: {text}{}", String::from_utf8_lossy(&output.stderr)).into();
    if !output.status.success() {
        return Err(wrong());
    }
    numbers.try_into().map_err(|_| wrong())
}

/// A big but ordinary layer: packages of a few directories with a dozen small files each, some links.
/// With numbers that do not begin at 0, a layer that hides every tenth package of the one before and goes on in others.
fn make_index(numbers: Range<u32>) -> Outcome<Vec<u8>> {
    let mut builder = IndexBuilder::new();
    let mut at = 0;
    let mut entry = Entry::default();
    for package in (numbers.start.saturating_sub(ENTRIES / LAYERS)..numbers.start)
        .step_by(250)
        .map(|n| n / 250)
    {
        let modules = "srv/app/node_modules";
        entry.clear();
        entry.headers.start = TarOffset(at);
        entry.headers.len = 512;
        at += 512;
        entry.path = match package % 10 {
            0 => format!("{modules}/.wh.package-{package}"),
            1 => format!("{modules}/package-{package}/lib/.wh..wh..opq"),
            _ => format!("{modules}/package-{package}/lib/part2/more.js"),
        }
        .into_bytes();
        builder.entry(&entry)?;
    }
    for number in numbers {
        let (package, within) = (number / 250, number % 250);
        let directory = format!("srv/app/node_modules/package-{package}/lib/part{}", within / 25);
        entry.clear();
        entry.mtime = Timestamp {
            secs: 1_700_000_000 + i64::from(package),
            nanos: number * 997 % 1_000_000_000,
        };
        entry.headers.start = TarOffset(at);
        entry.headers.len = 512;
        at += 512;
        entry.mode = 0o644;
        match within % 25 {
            0 => {
                entry.kind = Kind::Directory;
                entry.mode = 0o755;
                entry.path = format!("{directory}/").into_bytes();
            }
            1 => {
                entry.kind = Kind::Symlink;
                entry.path = format!("{directory}/link-{within}").into_bytes();
                entry.link = format!("file-{}.js", within + 1).into_bytes();
            }
            _ => {
                entry.kind = Kind::File;
                entry.path = format!("{directory}/file-{within}.js").into_bytes();
                entry.size = u64::from(number.wrapping_mul(2_654_435_761) >> 19);
                if entry.size > 0 {
                    entry.segments.push(Segment {
                        file_offset: 0,
                        tar_offset: TarOffset(at),
                        len: entry.size,
                    });
                }
                at += entry.size.next_multiple_of(512);
            }
        }
        builder.entry(&entry)?;
    }
    Ok(builder.finish(at + 1024, tarblk::internals::index::EndOfArchive::Marked))
}

fn layer_path(path: &str, layer: u32) -> String {
    format!("{path}.{layer}")
}

/// The million as layers, an index file each.
fn make_layers(path: &str) -> Outcome<()> {
    let each = ENTRIES / LAYERS;
    for layer in 0..LAYERS {
        fs::write(layer_path(path, layer), make_index(layer * each..(layer + 1) * each)?)?;
    }
    Ok(())
}

/// `VmHWM`, in MB.
fn peak_memory() -> Outcome<f64> {
    let mut status = String::new();
    File::open("/proc/self/status")?.read_to_string(&mut status)?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? * 1024.0 / 1e6)
}
