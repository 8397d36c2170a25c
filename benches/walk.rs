//! How long the headers of a layer behind HTTP take: `cargo bench --bench walk -- [LAYER.tar]`.
//!
//! An origin on loopback with 20 ms of round trip and 1 Gbit/s (and a second one with 200 Mbit/s) serves the layer, or a made
//! one of 1,250 files and 400 MB. Compared are one plain GET of everything and the walk, medians of interleaved runs, the
//! walk's first question for the layer's length included.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use tarblk::bench::origin::{Link, Origin};
use tarblk::index::{EntrySink, IndexBuilder, walk::Walked};
use tarblk::source::{self, Patience, Source};

const RUNS: usize = 5;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let layer = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let dir = tempfile::tempdir()?;
    let big = dir.path().join("big.tar");
    make_big_files(&big)?;
    for path in layer.iter().map(Path::new).chain([big.as_path()]) {
        println!("{} ({} bytes)", path.display(), path.metadata()?.len());
        for rate in [1_000_000_000, 200_000_000] {
            compare(path, rate)?;
        }
    }
    Ok(())
}

fn compare(path: &Path, bits_per_second: u64) -> Result<(), Box<dyn std::error::Error>> {
    let origin = Origin::start()?;
    origin.serve_file("/layer.tar", path)?;
    origin.set_link(Link {
        rtt: Duration::from_millis(20),
        rate: Some(bits_per_second / 8),
    });
    let (mut streamed, mut walked) = (Vec::new(), Vec::new());
    let mut last = None;
    for _ in 0..RUNS {
        let start = Instant::now();
        stream(&origin.url("/layer.tar"))?;
        streamed.push(start.elapsed());
        let start = Instant::now();
        last = Some(walk(&origin.url("/layer.tar"))?);
        walked.push(start.elapsed());
    }
    let median = |times: &mut Vec<Duration>| {
        times.sort();
        times[times.len() / 2]
    };
    let (streamed, walked) = (median(&mut streamed), median(&mut walked));
    let cost = last.map_or(String::new(), |(w, len)| {
        format!(
            "{} requests, {} MB, index {len} bytes",
            w.reads,
            w.bytes_read / 1_000_000
        )
    });
    let part = walked.as_secs_f64() / streamed.as_secs_f64();
    println!(
        "  {:>4} Mbit/s: stream {streamed:.2?}  walk {walked:.2?}  = {part:.2}  ({cost})",
        bits_per_second / 1_000_000
    );
    Ok(())
}

/// Everything, thrown away, by a client that does nothing else.
fn stream(url: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut body = std::process::Command::new("curl")
        .args(["-sS", "--fail", "-o", "/dev/null", url])
        .spawn()?;
    if !body.wait()?.success() {
        return Err("curl failed".into());
    }
    Ok(())
}

fn walk(url: &str) -> Result<(Walked, usize), Box<dyn std::error::Error>> {
    let patience = Patience::default();
    let blob = source::open(&Source::parse(url)?, &patience)?;
    let mut index = IndexBuilder::new();
    let sink: &mut dyn EntrySink = &mut index;
    let walked = source::walk(&blob, sink, None, &patience, &mut |_, _| {})?;
    Ok((walked, index.finish(walked.tar_len, walked.end).len()))
}

/// 1,250 files of 320 KB.
fn make_big_files(path: &Path) -> std::io::Result<()> {
    let mut tar = tar::Builder::new(std::io::BufWriter::new(File::create(path)?));
    for number in 0..1250 {
        let mut header = tar::Header::new_gnu();
        header.set_size(320_000);
        header.set_mode(0o644);
        tar.append_data(
            &mut header,
            format!("models/part-{number}.bin"),
            std::io::repeat(b'x').take(320_000),
        )?;
    }
    tar.finish()
}
