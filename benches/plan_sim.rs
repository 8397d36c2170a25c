//! Replays a trace of block reads against the planner on a simulated link and prints time, requests and bytes.
//!
//! `cargo bench --bench plan_sim -- FILES TRACE [RTT_MS] [MBIT]`
//!
//! FILES has a line `TAR_OFFSET SIZE DIRECTORY_NUMBER` for each regular file in tar order; TRACE a line `MICROSECONDS
//! TAR_OFFSET LENGTH` for each read, in order. The pauses of the trace are kept, so its own storage time is in the result.
//! Without arguments it makes a tree and a reader of its own.
//!
//! The link is first in, first out: a request's bytes queue behind those asked for before, and the reader waits for every
//! read. That is harsher than parallel connections and asynchronous readahead.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tarblk::fetch::link::Link;
use tarblk::fetch::plan::{PlanOptions, Planner, Presence, Stretch, merge};
use tarblk::fetch::{CHUNK_BYTES, ChunkKey};
use tarblk::image::{FileId, FileMap, StoredFile};
use tarblk::units::{LayerId, TarOffset, TarRange};

#[derive(Debug, Default)]
struct Files {
    /// Offset, size, directory; in tar order.
    files: Vec<(u64, u64, u32)>,
    directories: HashMap<u32, Vec<u32>>,
}

impl Files {
    fn new(files: Vec<(u64, u64, u32)>) -> Self {
        let mut directories: HashMap<u32, Vec<u32>> = HashMap::new();
        for (number, file) in files.iter().enumerate() {
            directories
                .entry(file.2)
                .or_default()
                .push(u32::try_from(number).unwrap());
        }
        Self { files, directories }
    }

    fn stored(&self, number: u32) -> StoredFile {
        let (offset, size, _) = self.files[usize::try_from(number).unwrap()];
        StoredFile {
            file: FileId(number),
            layer: LayerId(0),
            range: TarRange::new(TarOffset(offset), size),
        }
    }
}

impl FileMap for Files {
    fn file_at(&self, _layer: LayerId, at: TarOffset) -> Option<StoredFile> {
        let after = self.files.partition_point(|file| file.0 <= at.0);
        let found = self.stored(u32::try_from(after.checked_sub(1)?).unwrap());
        found.range.contains(at).then_some(found)
    }

    fn neighbours(&self, file: FileId, visit: &mut dyn FnMut(StoredFile) -> ControlFlow<()>) {
        let directory = &self.directories[&self.files[usize::try_from(file.0).unwrap()].2];
        let here = directory.partition_point(|number| *number < file.0);
        for number in directory[here + 1..].iter().chain(&directory[..here]) {
            if visit(self.stored(*number)).is_break() {
                return;
            }
        }
    }
}

struct Read {
    pause_us: u64,
    range: TarRange,
}

/// An event: a request's head, or a chunk.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Head(u64),
    Chunk(ChunkKey),
}

struct Outcome {
    waits: u64,
    us: u64,
    requests: u64,
    fetched: u64,
    touched: u64,
}

struct Simulation {
    now: u64,
    epoch: Instant,
    rtt_us: u64,
    bytes_per_us: f64,
    free_at: f64,
    events: BinaryHeap<Reverse<(u64, Event)>>,
    here: HashSet<ChunkKey>,
    coming: HashSet<ChunkKey>,
    unread: HashSet<ChunkKey>,
    outstanding: u64,
    link: Link,
    requests: u64,
    fetched: u64,
}

fn float(n: u64) -> f64 {
    f64::from(u32::try_from(n).unwrap_or(u32::MAX))
}

fn whole(n: f64) -> u64 {
    Duration::from_secs_f64(n / 1e6).as_micros().try_into().unwrap()
}

impl Simulation {
    fn presence(&self, key: ChunkKey) -> Presence {
        if self.here.contains(&key) {
            Presence::Here
        } else if self.coming.contains(&key) {
            Presence::Coming
        } else {
            Presence::Absent
        }
    }

    fn instant(&self) -> Instant {
        self.epoch + Duration::from_micros(self.now)
    }

    fn send(&mut self, flight: Stretch) {
        self.requests += 1;
        self.fetched += flight.bytes();
        self.outstanding += flight.bytes();
        let mut at = self.free_at.max(float(self.now + self.rtt_us));
        self.events.push(Reverse((whole(at), Event::Head(self.now))));
        for key in flight.keys() {
            at += float(CHUNK_BYTES) / self.bytes_per_us;
            self.coming.insert(key);
            self.events.push(Reverse((whole(at), Event::Chunk(key))));
        }
        self.free_at = at;
    }

    /// Fills the link behind demand.
    fn pump(&mut self, planner: &mut Planner) {
        loop {
            let window = self.link.window();
            let room = window.saturating_sub(self.outstanding);
            if room < window / 2 {
                return;
            }
            let next = planner.next(room, &|key| self.presence(key));
            let Some(flight) = next else { return };
            planner.suspected(flight.bytes());
            self.unread.extend(flight.keys());
            self.send(flight);
        }
    }

    /// Lets everything up to `until` happen, or until `stop` says so.
    fn run(&mut self, planner: &mut Planner, until: u64, stop: &dyn Fn(&Self) -> bool) {
        while !stop(self) {
            match self.events.peek() {
                Some(Reverse((at, _))) if *at <= until => {}
                _ => {
                    self.now = until;
                    return;
                }
            }
            let Some(Reverse((at, event))) = self.events.pop() else {
                return;
            };
            self.now = at;
            match event {
                Event::Head(sent) => self.link.head(self.instant(), Duration::from_micros(at - sent)),
                Event::Chunk(key) => {
                    self.outstanding -= CHUNK_BYTES;
                    self.link.arrived(self.instant(), CHUNK_BYTES);
                    self.coming.remove(&key);
                    self.here.insert(key);
                    self.pump(planner);
                }
            }
        }
    }
}

fn simulate(files: &Arc<Files>, trace: &[Read], size: u64, options: &PlanOptions, rtt_ms: u64, mbit: u64) -> Outcome {
    let mut planner = Planner::new(Some(files.clone()), vec![size], options.clone());
    let mut sim = Simulation {
        now: 0,
        epoch: Instant::now(),
        rtt_us: rtt_ms * 1000,
        bytes_per_us: float(mbit) / 8.0,
        free_at: 0.0,
        events: BinaryHeap::new(),
        here: HashSet::new(),
        coming: HashSet::new(),
        unread: HashSet::new(),
        outstanding: 0,
        link: Link::new(),
        requests: 0,
        fetched: 0,
    };
    let mut waits = 0;
    let mut touched: HashSet<u64> = HashSet::new();
    for read in trace {
        for page in read.range.start.0 / 4096..=(read.range.end().0 - 1) / 4096 {
            touched.insert(page);
        }
        let due = sim.now + read.pause_us;
        sim.run(&mut planner, due, &|_| false);
        let wanted = Stretch::of(LayerId(0), read.range);
        let paid: Vec<ChunkKey> = wanted.keys().filter(|key| sim.unread.contains(key)).collect();
        for key in &paid {
            sim.unread.remove(key);
            planner.paid(CHUNK_BYTES);
        }
        let mut now = Vec::new();
        if wanted.keys().all(|key| sim.here.contains(&key)) {
            if !paid.is_empty() {
                planner.hit(LayerId(0), read.range, &|key| sim.presence(key));
            }
        } else {
            planner.miss(LayerId(0), read.range, &|key| sim.presence(key), &mut now);
        }
        for flight in merge(&now, options.gap, 128, &|key| sim.presence(key)) {
            for key in flight.keys() {
                if wanted.keys().any(|asked| asked == key) {
                    planner.demanded(CHUNK_BYTES);
                } else if sim.presence(key) == Presence::Absent {
                    planner.suspected(CHUNK_BYTES);
                    sim.unread.insert(key);
                }
            }
            sim.send(flight);
        }
        sim.pump(&mut planner);
        if std::env::var_os("SIM_WAITS").is_some() && !wanted.keys().all(|key| sim.here.contains(&key)) {
            println!(
                "wait {} {} {} {}",
                sim.now,
                read.range.start.0,
                read.range.len,
                now.is_empty()
                    || merge(&now, 0, 1, &|key| if sim.coming.contains(&key) {
                        Presence::Absent
                    } else {
                        Presence::Here
                    })
                    .is_empty()
            );
        }
        waits += u64::from(!wanted.keys().all(|key| sim.here.contains(&key)));
        sim.run(&mut planner, u64::MAX, &|sim: &Simulation| {
            wanted.keys().all(|key| sim.here.contains(&key))
        });
    }
    Outcome {
        waits,
        us: sim.now,
        requests: sim.requests,
        fetched: sim.fetched,
        touched: u64::try_from(touched.len()).unwrap() * 4096,
    }
}

fn numbers(path: &str) -> Vec<[u64; 3]> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let line = |line: &str| -> [u64; 3] {
        let mut fields = line.split_whitespace().map(|field| field.parse().unwrap());
        std::array::from_fn(|_| fields.next().unwrap())
    };
    text.lines().map(line).collect()
}

/// 400 directories of 25 files; a reader that opens a third of the files of every twentieth directory.
fn invented() -> (Vec<(u64, u64, u32)>, Vec<Read>) {
    let (mut files, mut trace, mut offset, mut state) = (Vec::new(), Vec::new(), 512, 1u64);
    for directory in 0..400 {
        for file in 0..25 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let size = 1 << (9 + (state >> 33) % 11);
            files.push((offset, size, directory));
            if directory % 20 == 0 && file % 3 == 0 {
                trace.push(Read {
                    pause_us: 1000,
                    range: TarRange::new(TarOffset(offset), size.min(65536)),
                });
            }
            offset += size.div_ceil(512) * 512 + 512;
        }
    }
    (files, trace)
}

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let (files, trace) = match arguments.get(..2) {
        Some([files, trace]) => {
            let files = numbers(files)
                .into_iter()
                .map(|[a, b, c]| (a, b, u32::try_from(c).unwrap()))
                .collect();
            let mut last = 0;
            let read = |[at, offset, len]: [u64; 3]| {
                let pause_us = at - last;
                last = at;
                Read {
                    pause_us,
                    range: TarRange::new(TarOffset(offset), len),
                }
            };
            (files, numbers(trace).into_iter().map(read).collect::<Vec<_>>())
        }
        _ => invented(),
    };
    let argument = |n: usize, or: u64| arguments.get(n).map_or(or, |text| text.parse().unwrap());
    let (rtt_ms, mbit) = (argument(2, 20), argument(3, 200));
    let size = files.iter().map(|file| file.0 + file.1).max().unwrap_or(0) + 1024;
    let files = Arc::new(Files::new(files));
    println!(
        "{:>52} {:>7} {:>6} {:>9} {:>8} {:>8}",
        "policy", "s", "waits", "requests", "MiB", "touched"
    );
    let base = PlanOptions::default();
    let mut policies = vec![("default".to_owned(), base.clone())];
    if arguments.get(4).is_some() {
        let mut state = 7u64;
        let mut pick = |choices: &[u64]| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            choices[usize::try_from(state >> 40).unwrap() % choices.len()]
        };
        for _ in 0..3000 {
            let options = PlanOptions {
                small_file: pick(&[256 << 10, 512 << 10, 1 << 20]),
                with_demand: pick(&[64 << 10, 128 << 10, 256 << 10, 512 << 10]),
                first_touch: pick(&[64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20]),
                widest_touch: pick(&[512 << 10, 1 << 20, 2 << 20, 4 << 20, 8 << 20]),
                neighbours: pick(&[128 << 10, 256 << 10, 512 << 10, 1 << 20]),
                first_window: pick(&[128 << 10, 256 << 10, 512 << 10, 1 << 20]),
                credit: pick(&[256 << 10, 1 << 20, 2 << 20]),
                credit_percent: pick(&[10, 20, 30, 40, 60, 80, 100]),
                urgent_percent: pick(&[40, 60, 80, 100, 150, 1000]),
                gap: u32::try_from(pick(&[0, 1, 2, 4])).unwrap(),
                ..base.clone()
            };
            policies.push((format!("{options:?}").replace(' ', ""), options));
        }
    }
    for (name, options) in policies {
        let out = simulate(&files, &trace, size, &options, rtt_ms, mbit);
        let mib = |bytes: u64| float(bytes) / 1_048_576.0;
        println!(
            "{name:>52} {:>7.2} {:>6} {:>9} {:>8.1} {:>8.1}",
            float(out.us) / 1e6,
            out.waits,
            out.requests,
            mib(out.fetched),
            mib(out.touched)
        );
    }
}
