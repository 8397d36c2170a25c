//! How long a blob takes that is read from end to end: `cargo bench --bench stream -- [--mib N] [--each MB/S] [--rtt MS] [--mbit RATE] [--runs N]`.
//!
//! An origin on loopback (20 ms of round trip, 2000 Mbit/s) serves 256 MiB, each answer at most at 40 MB a second, as object stores do.
//! Compared are one plain GET of everything by curl, and what reads a compressed layer that has no index, in turn; then both where the link
//! itself holds no more than one answer.

#[path = "../tests/common/noise.rs"]
mod noise;
mod support;

use std::time::{Duration, Instant};

use noise::noise;
use support::{Runs, download, time_ratios};
use tarblk::internals::bench::origin::{Fault, Link, Origin};
use tarblk::internals::http::HttpOptions;
use tarblk::internals::source::{self, Source, SourceError};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let (mut mib, mut each, mut rtt, mut mbit, mut runs) = (256, 40, 20, 2000, 5);
    let mut arguments = support::arguments().into_iter();
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().and_then(|text| text.parse::<u64>().ok());
        let target = match argument.as_str() {
            "--mib" => &mut mib,
            "--each" => &mut each,
            "--rtt" => &mut rtt,
            "--mbit" => &mut mbit,
            "--runs" => &mut runs,
            other => return Err(format!("no option {other}").into()),
        };
        *target = number().ok_or(format!("{argument} needs a number"))?;
    }
    let origin = Origin::start()?;
    origin.serve_blob("/blob", noise(usize::try_from(mib << 20)?, 1));
    for (what, mbit) in [("each answer", mbit), ("the link", each * 8)] {
        println!("{mib} MiB, {rtt} ms, {mbit} Mbit/s, {what} at most {each} MB/s; {runs} runs each in turn");
        origin.set_link(Link {
            rtt: Duration::from_millis(rtt),
            rate: Some(mbit * 1_000_000 / 8),
        });
        let slow = what == "each answer";
        origin.set_faults(move |_| {
            if slow {
                vec![Fault::SlowBody(each * 1_000_000)]
            } else {
                Vec::new()
            }
        });
        let (mut plain, mut ours) = (Vec::new(), Vec::new());
        for run in 0..runs {
            let start = Instant::now();
            download(&origin.url("/blob"))?;
            plain.push(start.elapsed());
            let start = Instant::now();
            let (requests, bytes) = read(&origin.url("/blob"))?;
            ours.push(start.elapsed());
            if run == 0 {
                println!("  tarblk          {requests} requests, {bytes} bytes");
            }
        }
        println!("  curl            {}", Runs::ms(&plain));
        println!("  tarblk          {}", Runs::ms(&ours));
        println!("  tarblk / curl   {}", time_ratios(&ours, &plain));
    }
    Ok(())
}

/// Everything by what reads layers; requests and bytes.
fn read(url: &str) -> Result<(u64, u64), SourceError> {
    let options = HttpOptions::default();
    let blob = source::open(&Source::parse(url)?, &options)?;
    let mut bytes = 0;
    let requests = source::stream::<SourceError>(&blob, &options, &mut |piece| {
        bytes += u64::try_from(piece.len()).unwrap_or(u64::MAX);
        Ok(())
    })?;
    Ok((requests, bytes))
}
