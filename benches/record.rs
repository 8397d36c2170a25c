//! How fast an index is made of a tar that streams by: `cargo bench --bench record -- LAYER.tar`.
//!
//! The tar is read into memory first; one core does everything. Prints megabytes of tar a second and the index's bytes, for
//! each choice of contents. Without a layer it makes one of 20,000 files, so that it can run anywhere.

use std::hint::black_box;
use std::time::{Duration, Instant};

use tarblk::internals::index::build::{Contents, Recorder};
use tarblk::internals::index::{ColdPart, Index, IndexError};

const RUNS: usize = 7;

/// A layer of files whose bytes do not repeat.
fn make_layer() -> std::io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut state = 1_u64;
    for number in 0..20_000_u32 {
        let size = usize::try_from(number.wrapping_mul(2_654_435_761) >> 18).unwrap_or(0);
        let content: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            state.to_le_bytes()[7]
        })
        .take(size)
        .collect();
        let mut header = tar::Header::new_gnu();
        header.set_size(u64::try_from(size).unwrap_or(0));
        header.set_mode(0o644);
        header.set_mtime(1_700_000_000 + u64::from(number / 100));
        tar.append_data(
            &mut header,
            format!("usr/share/part-{}/file-{number}", number / 40),
            &content[..],
        )?;
    }
    tar.into_inner()
}

fn record(tar: &[u8], contents: Contents) -> Result<Vec<u8>, IndexError> {
    let mut recorder = Recorder::new(contents);
    for piece in tar.chunks(256 << 10) {
        recorder.feed(piece)?;
    }
    Ok(recorder.finish()?.into_plain_index())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let layer = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let tar = match &layer {
        Some(path) => std::fs::read(path)?,
        None => make_layer()?,
    };
    println!("layer     {} bytes", tar.len());
    let checked = Contents::CHECKED;
    let some = |headers, payload_digests| Contents {
        payload_digests,
        headers,
        ..checked
    };
    for (name, contents) in [
        ("entries", Contents::ENTRIES),
        (
            "+ chunks",
            Contents {
                diff_id: false,
                ..checked
            },
        ),
        ("+ diff ID", checked),
        ("+ headers", some(true, false)),
        ("+ payload", some(false, true)),
        (
            "+ pieces",
            Contents {
                content_pieces: true,
                ..checked
            },
        ),
        ("all", Contents::FULL),
    ] {
        let mut times: Vec<Duration> = (0..RUNS)
            .map(|_| {
                let start = Instant::now();
                drop(black_box(record(&tar, contents)));
                start.elapsed()
            })
            .collect();
        times.sort();
        let index = Index::open(record(&tar, contents)?)?;
        let part = |part| index.cold().range(part).map_or(0, |range| range.end - range.start);
        let micros = times[RUNS / 2].as_micros().max(1);
        println!(
            "{name:<10}{:>6} MB/s   hot {}, headers {}, payload digests {}, content pieces {} bytes; {} entries",
            u128::try_from(tar.len())? / micros,
            index.hot_len(),
            part(ColdPart::Headers),
            part(ColdPart::PayloadDigests),
            part(ColdPart::ContentPieces),
            index.summary().entries,
        );
    }
    Ok(())
}
