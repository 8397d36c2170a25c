//! How long the headers of a layer behind HTTP take: `cargo bench --bench walk -- [LAYER.tar] [--mbit RATE] [--runs N]`.
//!
//! An origin on loopback with 20 ms of round trip and 1000 Mbit/s, or another rate, serves the layer, and a made one of 1,250
//! files and 400 MB. Compared are one plain GET of everything by curl and the walk, in turn, the walk's first question for the
//! layer's length included.

mod support;

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::{Duration, Instant};

use support::{Runs, download, time_ratios};
use tarblk::internals::bench::origin::{Link, Origin};
use tarblk::internals::http::HttpOptions;
use tarblk::internals::index::{EntrySink, IndexBuilder, walk::Walked};
use tarblk::internals::source::{self, Source};
use tarblk::internals::walk::walk as walk_blob;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut layer, mut mbit, mut runs) = (None, 1000, 7);
    let mut arguments = support::arguments().into_iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--mbit" => mbit = arguments.next().ok_or("--mbit needs a number")?.parse()?,
            "--runs" => runs = arguments.next().ok_or("--runs needs a number")?.parse()?,
            _ => layer = Some(argument),
        }
    }
    let dir = tempfile::tempdir()?;
    let big = dir.path().join("big.tar");
    make_big_files(&big)?;
    for path in layer.iter().map(Path::new).chain([big.as_path()]) {
        compare(path, mbit, runs)?;
    }
    Ok(())
}

fn compare(path: &Path, mbit: u64, runs: usize) -> Result<(), Box<dyn std::error::Error>> {
    println!(
        "{}, {} bytes, 20 ms, {mbit} Mbit/s; {runs} runs each in turn",
        path.display(),
        path.metadata()?.len()
    );
    let origin = Origin::start()?;
    origin.serve_file("/layer.tar", path)?;
    origin.set_link(Link {
        rtt: Duration::from_millis(20),
        rate: Some(mbit * 1_000_000 / 8),
    });
    let (mut streamed, mut walked) = (Vec::new(), Vec::new());
    for run in 0..runs {
        let start = Instant::now();
        download(&origin.url("/layer.tar"))?;
        streamed.push(start.elapsed());
        let start = Instant::now();
        let (walk, index_len) = walk(&origin.url("/layer.tar"))?;
        walked.push(start.elapsed());
        if run == 0 {
            let megabytes = walk.bytes_read / 1_000_000;
            println!(
                "  the walk: {} requests, {megabytes} MB, an index of {index_len} bytes",
                walk.reads
            );
        }
    }
    println!("  stream (curl)   {}", Runs::ms(&streamed));
    println!("  walk            {}", Runs::ms(&walked));
    println!("  walk / stream   {}", time_ratios(&walked, &streamed));
    Ok(())
}

fn walk(url: &str) -> Result<(Walked, usize), Box<dyn std::error::Error>> {
    let patience = HttpOptions::default();
    let blob = source::open(&Source::parse(url)?, &patience)?;
    let mut index = IndexBuilder::new();
    let sink: &mut dyn EntrySink = &mut index;
    let walked = walk_blob(&blob, sink, None, &patience, &mut |_, _| {})?;
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
