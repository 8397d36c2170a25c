//! What it takes to know a layer well enough to mount it: `cargo bench --bench plan -- [LAYER.tar]`.
//!
//! Prints, for a layer (when one is named) and for an index of 1,000,000 entries that it makes: the time to read the
//! headers or the index file, to build the tree and to plan the image, and the peak memory of the whole process; then how
//! long a metadata block takes to fill. Every run is a process of its own, so that memory is honest; times are medians.

#![allow(
    clippy::as_conversions,
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation
)]

use std::fs::File;
use std::hint::black_box;
use std::io::Read as _;
use std::process::Command;
use std::time::{Duration, Instant};

use tarblk::image::ext4::{Ext4Image, Ext4Options};
use tarblk::image::{BlockImage as _, Origin};
use tarblk::index::{Entry, EntrySink as _, Index, IndexBuilder, Kind, Segment, Timestamp, walk};
use tarblk::tree::TreeBuilder;
use tarblk::units::TarOffset;

const RUNS: usize = 9;
const ENTRIES: u32 = 1_000_000;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// What one run measured.
struct Run {
    tree: Duration,
    plan: Duration,
    fill: Duration,
    blocks: u64,
    image: u64,
    rss: u64,
}

fn main() -> Outcome<()> {
    let args: Vec<String> = std::env::args().skip(1).filter(|arg| arg != "--bench").collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["once", form, path] => once(form, path),
        [layer] => {
            report("tar", layer, "tar headers + tree")?;
            million()
        }
        _ => million(),
    }
}

fn million() -> Outcome<()> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("million.index");
    let index = make_index()?;
    println!("1,000,000 entries: an index file of {:.1} MB", mega(index.len() as f64));
    std::fs::write(&path, index)?;
    report(
        "index",
        path.to_str().ok_or("an odd temporary path")?,
        "index file + tree",
    )
}

/// Measures once, in this process, and prints the numbers for the parent.
fn once(form: &str, path: &str) -> Outcome<()> {
    let start = Instant::now();
    let mut builder = TreeBuilder::new();
    if form == "tar" {
        let file = File::open(path)?;
        walk::local(&file, file.metadata()?.len(), &mut builder, &mut |_, _| {})?;
    } else {
        let mut bytes = Vec::new();
        File::open(path)?.read_to_end(&mut bytes)?;
        let index = Index::open(bytes)?;
        index.replay(&mut builder)?;
    }
    let tree = builder.finish();
    let tree_time = start.elapsed();
    let image = Ext4Image::plan(tree, &Ext4Options::default())?;
    let plan_time = start.elapsed();
    let rss = peak_rss()?;
    let mut pieces = Vec::new();
    image.pieces(0, image.len() / 4096, &mut pieces);
    let metadata = pieces
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
    let fill = start.elapsed();
    println!(
        "{} {} {} {metadata} {} {rss}",
        tree_time.as_nanos(),
        plan_time.saturating_sub(tree_time).as_nanos(),
        fill.as_nanos(),
        image.len()
    );
    Ok(())
}

fn report(form: &str, path: &str, first: &str) -> Outcome<()> {
    let runs: Vec<Run> = (0..RUNS).map(|_| child(form, path)).collect::<Result<_, _>>()?;
    let median = |field: fn(&Run) -> u64| {
        let mut values: Vec<u64> = runs.iter().map(field).collect();
        values.sort_unstable();
        values[RUNS / 2] as f64
    };
    let ms = |nanos: f64| nanos / 1e6;
    let tree = median(|run| run.tree.as_nanos() as u64);
    let plan = median(|run| run.plan.as_nanos() as u64);
    let fill = median(|run| run.fill.as_nanos() as u64);
    let blocks = median(|run| run.blocks);
    println!("{path}");
    println!("  {first:<20} {:9.1} ms", ms(tree));
    println!("  {:<20} {:9.1} ms", "image plan", ms(plan));
    println!("  {:<20} {:9.1} ms", "together", ms(tree + plan));
    println!("  {:<20} {:9.1} MB", "peak memory", mega(median(|run| run.rss)));
    println!("  {:<20} {:9.1} MB", "image", mega(median(|run| run.image)));
    println!(
        "  {:<20} {:9.2} us, {blocks} of them",
        "a metadata block",
        fill / blocks / 1e3
    );
    Ok(())
}

fn child(form: &str, path: &str) -> Outcome<Run> {
    let output = Command::new(std::env::current_exe()?)
        .args(["once", form, path])
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    let numbers: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
    let [tree, plan, fill, blocks, image, rss] = numbers[..] else {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    };
    let nanos = Duration::from_nanos;
    Ok(Run {
        tree: nanos(tree),
        plan: nanos(plan),
        fill: nanos(fill),
        blocks,
        image,
        rss,
    })
}

/// A big but ordinary layer: packages of a few directories with a dozen small files each, some links.
fn make_index() -> Outcome<Vec<u8>> {
    let mut builder = IndexBuilder::new();
    let mut at = 0;
    let mut entry = Entry::default();
    for number in 0..ENTRIES {
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
    Ok(builder.finish(at + 1024, tarblk::index::EndOfArchive::Marked))
}

/// `VmHWM`, in bytes.
fn peak_rss() -> Outcome<u64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}

fn mega(bytes: f64) -> f64 {
    bytes / 1e6
}
