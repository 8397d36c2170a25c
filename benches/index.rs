//! How long it takes to read a layer's headers and to keep them: `cargo bench --bench index -- LAYER.tar`.
//!
//! Prints medians of the walk alone, of walk and index file together, and of reading the index file back, with the bytes an
//! entry takes. Without a layer it makes one of 50,000 small entries, so that it can run anywhere.

use std::fs::File;
use std::hint::black_box;
use std::time::{Duration, Instant};

use tarblk::internals::index::{Collector, Entry, EntrySink, Index, IndexBuilder, IndexError, walk};

const RUNS: usize = 15;

/// Takes entries and forgets them.
struct Nothing;

impl EntrySink for Nothing {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        black_box(entry);
        Ok(())
    }
}

fn median(mut run: impl FnMut()) -> Duration {
    let mut times: Vec<Duration> = (0..RUNS)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .collect();
    times.sort();
    times[RUNS / 2]
}

fn make_layer() -> std::io::Result<File> {
    let mut tar = tar::Builder::new(tempfile::tempfile()?);
    for number in 0..50_000_u32 {
        let mut header = tar::Header::new_gnu();
        let size = u64::from(number.wrapping_mul(2_654_435_761) >> 18);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000 + u64::from(number / 100));
        let name = format!(
            "usr/share/package-{}/part-{}/file-{number}.txt",
            number / 400,
            number / 40 % 10
        );
        tar.append_data(&mut header, name, std::io::Read::take(std::io::repeat(b'x'), size))?;
    }
    tar.into_inner()
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let layer = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let file = match &layer {
        Some(path) => File::open(path)?,
        None => make_layer()?,
    };
    let len = file.metadata()?.len();
    let walk = |sink: &mut dyn EntrySink| walk::local(&file, len, sink, &mut |_, _| {});

    let walked = walk(&mut Nothing)?;
    let mut all = Collector::default();
    walk(&mut all)?;
    let build = || -> Result<Vec<u8>, IndexError> {
        let mut builder = IndexBuilder::new();
        let walked = walk(&mut builder)?;
        Ok(builder.finish(len, walked.end))
    };
    let index = Index::open(build()?)?;
    let entries = index.summary().entries;
    println!("layer     {} bytes, {entries} entries", index.tar_len());
    println!(
        "walk      {:?}  ({} reads, {} bytes)",
        median(|| drop(black_box(walk(&mut Nothing)))),
        walked.reads,
        walked.bytes_read
    );
    println!("+ index   {:?}", median(|| drop(black_box(build()))));
    let encode = median(|| {
        let mut builder = IndexBuilder::new();
        all.0.iter().for_each(|entry| drop(builder.entry(entry)));
        black_box(builder.finish(len, walked.end));
    });
    println!("encode    {encode:?}");
    println!("replay    {:?}", median(|| drop(black_box(index.replay(&mut Nothing)))));
    println!("file      {} bytes", index.as_bytes().len());
    let hundredths = u64::try_from(index.as_bytes().len())? * 100 / entries.max(1);
    println!("an entry  {}.{:02} bytes", hundredths / 100, hundredths % 100);
    Ok(())
}
