//! A disk cache that is damaged again and again, at random, while devices are read through it: the origin is there, so every read
//! has to bring the right bytes. No wrong byte, no zeros in their place, no I/O error.
//!
//! `TARBLK_DAMAGES=10000 cargo test --release --test cache_damage -- --nocapture` does it so often and prints what was done;
//! `TARBLK_DAMAGE_SEED` does the same again.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod lab;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::noise::noise;
use common::packed::gzip;
use common::wait::wait_until;
use lab::{Lab, devices};
use rustix::fs::{FallocateFlags, fallocate};
use tarblk::internals::bench::origin::Origin;

/// Where direct reads may begin and end, in the device and in memory.
const ALIGNMENT: usize = 4096;
const CHUNK: u64 = 32 << 10;
/// All of the layers do not fit, so that chunks are given up, too.
const CACHE_SIZE: &str = "18MiB";
/// So many reads are begun and ended between two damages.
const READS_BETWEEN: u64 = 6;

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |text| text.parse().unwrap())
}

/// George Marsaglia's xorshift.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    fn one_of<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        all.get(usize::try_from(self.below(u64::try_from(all.len()).unwrap())).unwrap())
    }
}

/// A device, and what each byte of it has to be.
struct Device {
    path: PathBuf,
    right: Vec<u8>,
}

/// What readers have seen.
#[derive(Debug, Default)]
struct Tally {
    reads: AtomicU64,
    bytes: AtomicU64,
    /// Blocks of 4 KiB that are not what they have to be...
    wrong: AtomicU64,
    /// ...and those of them that are all zero.
    zero: AtomicU64,
    errors: AtomicU64,
    stop: AtomicBool,
}

fn add(counter: &AtomicU64, n: usize) {
    counter.fetch_add(u64::try_from(n).unwrap(), Ordering::Relaxed);
}

impl Device {
    fn open(&self) -> File {
        // Past the page cache: every read is the service's to answer.
        File::options()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(&self.path)
            .unwrap()
    }

    /// Reads and compares `len` bytes at `at`.
    fn check(&self, file: &File, buffer: &mut [u8], at: usize, len: usize, tally: &Tally) {
        let buffer = &mut buffer[..len];
        match file.read_exact_at(buffer, u64::try_from(at).unwrap()) {
            Ok(()) => {
                let right = &self.right[at..at + len];
                for (block, right) in buffer.chunks(ALIGNMENT).zip(right.chunks(ALIGNMENT)) {
                    if block != right {
                        add(&tally.wrong, 1);
                        add(&tally.zero, usize::from(block.iter().all(|byte| *byte == 0)));
                    }
                }
                add(&tally.bytes, len);
            }
            Err(error) => {
                if tally.errors.load(Ordering::Relaxed) < 10 {
                    eprintln!("{}: {len} bytes at {at}: {error}", self.path.display());
                }
                add(&tally.errors, 1);
            }
        }
        add(&tally.reads, 1);
    }

    /// Compares all of it.
    fn check_all(&self, tally: &Tally) {
        const STEP: usize = 1 << 20;
        let file = self.open();
        let mut memory = aligned(STEP);
        let buffer = within(&mut memory, STEP);
        for at in (0..self.right.len()).step_by(STEP) {
            self.check(&file, buffer, at, STEP.min(self.right.len() - at), tally);
        }
    }

    /// Reads at random places, long and short, until it is told to stop.
    fn hammer(&self, seed: u64, tally: &Tally) {
        const LONGEST: usize = 64;
        let file = self.open();
        let mut memory = aligned(LONGEST * ALIGNMENT);
        let buffer = within(&mut memory, LONGEST * ALIGNMENT);
        let mut random = Random(seed);
        let blocks = u64::try_from(self.right.len() / ALIGNMENT).unwrap();
        while !tally.stop.load(Ordering::Relaxed) {
            let at = random.below(blocks);
            let most = if random.below(3) == 0 { 64 } else { 4 };
            let len = (1 + random.below(most)).min(blocks - at);
            let bytes = |blocks: u64| usize::try_from(blocks).unwrap() * ALIGNMENT;
            self.check(&file, buffer, bytes(at), bytes(len), tally);
        }
    }
}

/// Memory that has `len` bytes from an aligned place on.
fn aligned(len: usize) -> Vec<u8> {
    vec![0; len + ALIGNMENT]
}

fn within(memory: &mut [u8], len: usize) -> &mut [u8] {
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    &mut memory[start..start + len]
}

/// The files of the cache's layers that end like this.
fn files(layers: &Path, kind: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(layers).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|it| it == kind))
        .collect();
    found.sort();
    found
}

/// Does something to the cache that it must survive, and says what; nothing if there is nothing to do it to now.
fn damage(lab: &Lab, random: &mut Random) -> Option<&'static str> {
    let layers = lab.path("cache/layers");
    let kind = random.below(1000);
    let open = |path: &PathBuf| File::options().read(true).write(true).open(path).ok();
    let data = files(&layers, "data");
    let file = random.one_of(&data).and_then(open);
    let len = file
        .as_ref()
        .and_then(|file| file.metadata().ok())
        .map_or(0, |meta| meta.len());
    let flip = |file: &File, at: u64, bit: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).ok()?;
        file.write_all_at(&[byte[0] ^ (1 << bit)], at).ok()
    };
    Some(match kind {
        0..2 => {
            // Not all of the cache: what the service may write to, it may not make.
            fs::remove_dir_all(&layers).ok()?;
            "directory deleted"
        }
        2..5 => {
            for path in fs::read_dir(&layers).ok()?.flatten() {
                let _gone_already = fs::remove_file(path.path());
            }
            "directory emptied"
        }
        5..10 => {
            fs::remove_file(random.one_of(&data)?).ok()?;
            "data file deleted"
        }
        10..15 => {
            fs::remove_file(random.one_of(&files(&layers, "map"))?).ok()?;
            "map deleted"
        }
        15..30 => {
            let map = open(random.one_of(&files(&layers, "map"))?)?;
            flip(&map, random.below(map.metadata().ok()?.len()), random.below(8))?;
            "bit of a map flipped"
        }
        30..33 => {
            // Its keepers stay: no loop device outlives all three of them.
            let listed = lab.json(&["ps", "--json"]);
            let pid = i32::try_from(listed[0]["process"]["pid"].as_i64()?).ok()?;
            rustix::process::kill_process(rustix::process::Pid::from_raw(pid)?, rustix::process::Signal::KILL).ok()?;
            "service killed"
        }
        33..60 => {
            file?.set_len(random.below(len)).ok()?;
            "data file truncated"
        }
        60..80 => {
            let at = random.below(len);
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file?, hole, at, 1 + random.below(1 << 20)).ok()?;
            "hole punched"
        }
        80..140 => {
            let zeros = vec![0; usize::try_from(1 + random.below(200_000)).unwrap()];
            file?.write_all_at(&zeros, random.below(len)).ok()?;
            "zeros written"
        }
        140..200 => {
            let garbage = noise(usize::try_from(1 + random.below(200_000)).unwrap(), random.next());
            file?.write_all_at(&garbage, random.below(len)).ok()?;
            "garbage written"
        }
        200..260 => {
            let file = file?;
            let mut chunk = vec![0; usize::try_from(CHUNK).unwrap()];
            let chunks = len / CHUNK;
            file.read_exact_at(&mut chunk, random.below(chunks) * CHUNK).ok()?;
            file.write_all_at(&chunk, random.below(chunks) * CHUNK).ok()?;
            "right chunk in a wrong place"
        }
        260..300 => {
            let from = open(random.one_of(&data)?)?;
            let mut chunk = vec![0; usize::try_from(CHUNK).unwrap()];
            let at = random.below(len / CHUNK) * CHUNK;
            from.read_exact_at(&mut chunk, at).ok()?;
            file?.write_all_at(&chunk, at).ok()?;
            "another layer's chunk"
        }
        _ => {
            flip(&file?, random.below(len), random.below(8))?;
            "bit flipped"
        }
    })
}

/// A tar with files of `seed`, some long and many short.
fn tar_of(seed: u64, files: u64) -> Vec<u8> {
    let mut random = Random(seed);
    let mut tar = tar::Builder::new(Vec::new());
    for n in 0..files {
        let most = if n % 8 == 0 { 2_000_000 } else { 60_000 };
        let content = noise(usize::try_from(random.below(most)).unwrap(), seed * 1000 + n);
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(u64::try_from(content.len()).unwrap());
        tar.append_data(&mut header, format!("file{n}"), content.as_slice())
            .unwrap();
    }
    tar.into_inner().unwrap()
}

#[test]
fn whatever_becomes_of_the_cache_reads_are_right() {
    let Some(_devices) = devices("a damaged cache") else {
        return;
    };
    let damages = number("TARBLK_DAMAGES", 200);
    let seed = number("TARBLK_DAMAGE_SEED", u64::from(std::process::id())) | 1;
    eprintln!("TARBLK_DAMAGES={damages} TARBLK_DAMAGE_SEED={seed}");
    let lab = Lab::new();
    let origin = Origin::start().unwrap();
    let mut all = Vec::new();
    for (name, content, digests) in [
        ("digests.tar", tar_of(1, 80), true),
        ("none.tar", tar_of(2, 80), false),
        ("coded.tar.gz", gzip(&tar_of(3, 60)), true),
    ] {
        origin.serve_blob(&format!("/{name}"), content);
        let url = origin.url(&format!("/{name}"));
        let index = format!("{name}.index");
        let of_kind = if digests { "--full" } else { "--no-digests" };
        lab.good(&["index", &url, "-o", &index, of_kind]);
        lab.good(&["image", &url, "--index", &index, "--no-cache", "-o", "right"]);
        let right = fs::read(lab.path("right")).unwrap();
        fs::remove_file(lab.path("right")).unwrap();
        let device = lab.good(&[
            "attach",
            &url,
            "--index",
            &index,
            "--cache-size",
            CACHE_SIZE,
            "--memory",
            "1MiB",
            "--backend",
            "loop",
        ]);
        all.push(Device {
            path: device.trim().into(),
            right,
        });
    }
    let (all, tally) = (Arc::new(all), Arc::new(Tally::default()));
    for device in &*all {
        device.check_all(&tally);
    }
    let readers: Vec<_> = (0..all.len())
        .flat_map(|device| [(device, 1), (device, 2)])
        .map(|(device, nth)| {
            let (all, tally) = (all.clone(), tally.clone());
            let seed = seed.wrapping_mul(u64::try_from(10 * device + nth).unwrap()) | 1;
            std::thread::spawn(move || all[device].hammer(seed, &tally))
        })
        .collect();

    let mut random = Random(seed);
    let mut done = BTreeMap::<&str, u64>::new();
    let mut found = 0;
    let mut in_vain = 0;
    while done.values().sum::<u64>() < damages {
        if random.below(100) == 0 {
            // What is counted goes with a service that is killed.
            found = found.max(found_damaged(&lab));
        }
        let before = tally.reads.load(Ordering::Relaxed);
        if let Some(what) = damage(&lab, &mut random) {
            *done.entry(what).or_default() += 1;
            in_vain = 0;
        } else {
            in_vain += 1;
            if in_vain == 20_000 {
                let log = fs::read_to_string(lab.path("states/service.log")).unwrap_or_default();
                panic!("nothing is kept any more: {done:?}\n{log}");
            }
        }
        wait_until("more reads", || {
            tally.reads.load(Ordering::Relaxed) >= before + READS_BETWEEN
        });
    }
    tally.stop.store(true, Ordering::Relaxed);
    for reader in readers {
        reader.join().unwrap();
    }
    for device in &*all {
        device.check_all(&tally);
    }
    let found = found.max(found_damaged(&lab));
    println!("{done:#?}\n{tally:?}\n{found} damaged chunks were found, at least");
    // Before anything is asserted, so that nothing is left of what failed.
    for device in &*all {
        lab.good(&["detach", device.path.to_str().unwrap()]);
    }
    lab.assert_nothing_served();
    let zero = |counter: &AtomicU64| counter.load(Ordering::Relaxed) == 0;
    assert!(
        zero(&tally.wrong) && zero(&tally.zero) && zero(&tally.errors),
        "{tally:?}"
    );
    assert!(found > 0, "no damage was ever met");
    // What is left of it is told of, and a cache that can be used.
    let _some_is_damaged = lab.run(&["cache", "verify"]);
    lab.good(&["cache", "verify"]);
}

/// Chunks that the service, since it was last started, has found damaged.
fn found_damaged(lab: &Lab) -> u64 {
    let listed = lab.json(&["ps", "--json"]);
    let of = |device: &serde_json::Value| {
        let output = lab.run(&["stats", "--json", device["device"].as_str()?]);
        let stats: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
        stats["counters"]["fetch"]["cache_damaged"].as_u64()
    };
    listed.as_array().unwrap().iter().filter_map(of).sum()
}
