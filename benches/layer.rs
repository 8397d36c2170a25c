//! What a compressed layer costs: `cargo bench --bench layer -- [LAYER...]`.
//!
//! For each layer (gzip, zstd or plain; a plain one is compressed first, by `gzip -6` and by `zstd -3`; without one,
//! the programs in /usr/bin stand in for it) prints how fast the tar comes out while the table is made, and
//! with 1, 2 and 4 MiB between places: how many there are, how long their histories are in all (as they are, and each
//! compressed on its own as an index file keeps them), the table's bytes, and how long reading 64 KiB at a random place
//! takes, with the compressed bytes that go into it.

use std::hint::black_box;
use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tarblk::internals::layer::{Begins, Coding, Decoder, Indexer, LayerError, Spans};
use tarblk::internals::units::TarOffset;

const RUNS: usize = 5;
const READS: usize = 200;
const READ: u64 = 64 << 10;
/// As it comes from a socket.
const PIECE: usize = 64 << 10;

fn median<T: Ord + Copy>(mut values: Vec<T>) -> T {
    values.sort();
    values[values.len() / 2]
}

/// How long this thread has had a processor, where the kernel counts that.
fn processor_time() -> Option<Duration> {
    let counts = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(Duration::from_nanos(counts.split_whitespace().next()?.parse().ok()?))
}

/// The table, how long it took, and how long the processor had to do with it, which other programs do not change much.
fn index(blob: &[u8], coding: Coding, spacing: u64) -> Result<(Spans, Duration, Duration), LayerError> {
    let (start, busy) = (Instant::now(), processor_time());
    let mut indexer = Indexer::new(coding, spacing);
    for piece in blob.chunks(PIECE) {
        indexer.feed(piece, &mut |bytes| {
            black_box(bytes);
        })?;
    }
    let spans = indexer.finish()?;
    let elapsed = start.elapsed();
    let busy = busy.and_then(|busy| processor_time()?.checked_sub(busy));
    Ok((spans, elapsed, busy.unwrap_or(elapsed)))
}

#[expect(clippy::as_conversions, clippy::cast_precision_loss, reason = "figures for people")]
fn ratio(of: u64, to: u64) -> f64 {
    of as f64 / to.max(1) as f64
}

fn megabytes_per_second(bytes: u64, time: Duration) -> f64 {
    ratio(bytes, 1_000_000) / time.as_secs_f64()
}

/// Reads 64 KiB at places spread over the tar: median time, mean compressed bytes.
fn random_reads(blob: &[u8], spans: &Spans) -> Result<(Duration, u64), Box<dyn std::error::Error>> {
    let table = &spans.table;
    let mut times = Vec::new();
    let mut fetched = 0;
    let mut seed = 1_u64;
    for _ in 0..READS {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let at = (seed >> 11) % table.tar_len().saturating_sub(READ).max(1);
        let end = (at + READ).min(table.tar_len());
        let (mut first, last) = (table.span_at(TarOffset(at)), table.span_at(TarOffset(end - 1)));
        while table.span(first).begins == Begins::Within {
            first -= 1;
        }
        let range = table.span(first).blob.start..table.span(last).blob.end;
        let bytes = &blob[usize::try_from(range.start)?..usize::try_from(range.end)?];
        let windows = spans.windows[first..=last].to_vec();
        let start = Instant::now();
        let mut decoder = Decoder::start_with(table, first, windows)?.until(TarOffset(end));
        let mut got = 0;
        for piece in bytes.chunks(PIECE) {
            decoder.feed(piece, &mut |bytes| got += bytes.len())?;
            if decoder.is_done() {
                break;
            }
        }
        times.push(start.elapsed());
        assert_eq!(decoder.position(), TarOffset(end));
        black_box(got);
        fetched += range.end - range.start;
    }
    Ok((median(times), fetched / u64::try_from(READS)?))
}

fn measure(name: &str, blob: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
    let coding = Coding::of_bytes(blob);
    let blob_len = u64::try_from(blob.len())?;
    for spacing in [1_u64 << 20, 2 << 20, 4 << 20] {
        let (spans, time, busy) = index(blob, coding, spacing)?;
        let (mut times, mut busies) = (vec![time], vec![busy]);
        for _ in 1..RUNS {
            let (_, time, busy) = index(blob, coding, spacing)?;
            times.push(time);
            busies.push(busy);
        }
        let (time, busy) = (median(times), median(busies));
        let tar_len = spans.table.tar_len();
        let mut table = Vec::new();
        spans.table.encode(&mut table);
        if spans.table.has_blocks() {
            spans.table.encode_blocks(&mut table);
        }
        let raw: usize = spans.windows.iter().map(Vec::len).sum();
        let mut packed = 0;
        for window in &spans.windows {
            packed += zstd::bulk::compress(window, 3)?.len();
        }
        println!(
            "{name} ({coding}, {blob_len} -> {tar_len} bytes) every {} MiB: {:.0} MB/s ({:.0} MB a processor second), {} spans, table {} bytes, history {raw} bytes, {packed} compressed ({:.2} % of the blob)",
            spacing >> 20,
            megabytes_per_second(tar_len, time),
            megabytes_per_second(tar_len, busy),
            spans.table.len(),
            table.len(),
            100.0 * ratio(u64::try_from(packed)?, blob_len),
        );
        if spans.table.seekable() {
            let (time, bytes) = random_reads(blob, &spans)?;
            println!("    64 KiB at random: {time:?}, {} KiB compressed", bytes >> 10);
        }
    }
    Ok(())
}

fn filter(program: &str, arguments: &[&str], input: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().expect("it was asked for");
    std::thread::scope(|scope| {
        let writer = scope.spawn(move || stdin.write_all(input));
        let output = child.wait_with_output()?.stdout;
        writer.join().expect("it does not panic")?;
        Ok(output)
    })
}

/// A hundred megabytes of what lies in /usr/bin.
fn programs() -> std::io::Result<Vec<u8>> {
    let mut paths: Vec<_> = std::fs::read_dir("/usr/bin")?
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .collect();
    paths.sort();
    let mut out = Vec::new();
    for path in paths {
        if out.len() > 100_000_000 {
            break;
        }
        out.extend(std::fs::read(path).unwrap_or_default());
    }
    Ok(out)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let layers: Vec<String> = std::env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let mut inputs = Vec::new();
    for layer in &layers {
        inputs.push((layer.clone(), std::fs::read(layer)?));
    }
    if inputs.is_empty() {
        inputs.push(("/usr/bin".to_owned(), programs()?));
    }
    for (name, bytes) in inputs {
        if Coding::of_bytes(&bytes) != Coding::Plain {
            measure(&name, &bytes)?;
            continue;
        }
        measure(&format!("{name} | gzip -6"), &filter("gzip", &["-6", "-c"], &bytes)?)?;
        measure(&format!("{name} | zstd -3"), &filter("zstd", &["-3", "-c"], &bytes)?)?;
    }
    Ok(())
}
