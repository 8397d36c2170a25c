//! Replays a trace of block reads of a layer's image against the planner on a simulated link, and prints time, waits,
//! requests and bytes.
//!
//! `cargo bench --bench plan_sim -- LAYER.tar TRACE [RTT_MS [MBIT [search]]]`
//!
//! TRACE has a line `MICROSECONDS OFFSET LENGTH` for each read of the device, in order; times are those of a reader that
//! waits for nothing, so that its own work is in the result and no storage's. The kernel's block layer tells them
//! (`blktrace`, or the events `block_rq_issue` and `block_rq_complete`). Without arguments it makes a layer and a reader
//! of its own. `search` tries planners of other numbers. For each reason to fetch it says how much that brought and how
//! much of it was read. With `SIM_WAITS` in the environment each wait is a line `wait MICROSECONDS absent|coming OFFSET LENGTH FILE`; with
//! `SIM_WASTE` the files of which most was fetched for nothing are told.
//!
//! The link is first in, first out: a request's bytes queue behind those asked for before, and the reader waits for every
//! read. That is harsher than parallel connections and asynchronous readahead.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap, HashMap, HashSet};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tarblk::internals::cache::ChunkKey;
use tarblk::internals::image::ext4::{Ext4Image, Ext4Options};
use tarblk::internals::image::{BlockImage as _, Origin};
use tarblk::internals::index::walk;
use tarblk::internals::prefetch::bandwidth::BdpEstimator;
use tarblk::internals::prefetch::{
    Budget, Budgets, ChunkRange, HintCounts, PlanOptions, Planned, PlannedFlight, Planner, Presence, Reason, merge,
};
use tarblk::internals::tree::TreeBuilder;
use tarblk::internals::units::CHUNK_BYTES;
use tarblk::internals::units::{BLOCK_SIZE, LayerId, TarOffset, TarRange};

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
    /// Chunks fetched for each reason, and how many of them were read.
    hints: BTreeMap<Reason, (u64, u64)>,
}

struct Simulation<'a> {
    tar: &'a File,
    gap: u32,
    now: u64,
    epoch: Instant,
    rtt_us: u64,
    bytes_per_us: f64,
    free_at: f64,
    events: BinaryHeap<Reverse<(u64, Event)>>,
    here: HashSet<ChunkKey>,
    coming: HashSet<ChunkKey>,
    unread: HashSet<ChunkKey>,
    /// Why each chunk was fetched.
    why: HashMap<ChunkKey, Reason>,
    read: HashSet<ChunkKey>,
    outstanding: u64,
    link: BdpEstimator,
    requests: u64,
    fetched: u64,
}

fn float(n: u64) -> f64 {
    f64::from(u32::try_from(n).unwrap_or(u32::MAX))
}

fn whole(n: f64) -> u64 {
    Duration::from_secs_f64(n / 1e6).as_micros().try_into().unwrap()
}

impl Simulation<'_> {
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

    fn send(&mut self, flight: ChunkRange) {
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

    /// Shows a chunk that is here.
    fn peek(&self, key: ChunkKey, show: &mut dyn FnMut(&[u8])) -> bool {
        let here = self.here.contains(&key);
        if here {
            let mut chunk = vec![0; 32 << 10];
            let start = u64::from(key.index) * CHUNK_BYTES;
            let len = self.tar.read_at(&mut chunk, start).unwrap_or(0);
            show(&chunk[..len]);
        }
        here
    }

    /// Sends what is absent of `now`; only the `demanded` chunks are waited for.
    fn send_all(&mut self, now: &[Planned], demanded: &[ChunkKey], planner: &mut Planner) {
        for flight in merge(now, self.gap, 128, &|key| self.presence(key)) {
            for key in flight.chunks().keys() {
                let reason = flight.reason(key.index);
                self.why.insert(key, reason);
                if demanded.contains(&key) {
                    planner.demanded();
                } else {
                    planner.prefetched(key, reason);
                    self.unread.insert(key);
                }
            }
            self.send(flight.chunks());
        }
    }

    /// Fills the link behind demand.
    fn pump(&mut self, planner: &mut Planner) {
        loop {
            let window = self.link.in_flight_limit();
            let room = window.saturating_sub(self.outstanding);
            if room < window / 2 {
                return;
            }
            let next = planner.next(room, &|key| self.presence(key));
            let Some(flight) = next.map(PlannedFlight::from) else {
                return;
            };
            for key in flight.chunks().keys() {
                let reason = flight.reason(key.index);
                self.why.insert(key, reason);
                planner.prefetched(key, reason);
                self.unread.insert(key);
            }
            self.send(flight.chunks());
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
                    let mut now = Vec::new();
                    planner.arrived(key, &|key, show| self.peek(key, show), &mut now);
                    self.send_all(&now, &[], planner);
                    self.pump(planner);
                }
            }
        }
    }
}

/// A layer, its image, and who reads it.
struct Case {
    tar: File,
    size: u64,
    image: Arc<Ext4Image>,
    trace: Vec<Read>,
}

fn simulate(case: &Case, options: &PlanOptions, rtt_ms: u64, mbit: u64) -> Outcome {
    let counts = Arc::new(HintCounts::new(1));
    let mut planner = Planner::new(Some(case.image.clone()), vec![case.size], options.clone(), counts);
    let mut sim = Simulation {
        tar: &case.tar,
        gap: options.gap_chunks,
        now: 0,
        epoch: Instant::now(),
        rtt_us: rtt_ms * 1000,
        bytes_per_us: float(mbit) / 8.0,
        free_at: 0.0,
        events: BinaryHeap::new(),
        here: HashSet::new(),
        coming: HashSet::new(),
        unread: HashSet::new(),
        why: HashMap::new(),
        read: HashSet::new(),
        outstanding: 0,
        link: BdpEstimator::new(),
        requests: 0,
        fetched: 0,
    };
    let mut waits = 0;
    let mut touched: HashSet<u64> = HashSet::new();
    for read in &case.trace {
        for page in read.range.start.0 / 4096..=(read.range.end().0 - 1) / 4096 {
            touched.insert(page);
        }
        let due = sim.now + read.pause_us;
        sim.run(&mut planner, due, &|_| false);
        let wanted = ChunkRange::of(LayerId(0), read.range);
        let paid: Vec<ChunkKey> = wanted.keys().filter(|key| sim.unread.contains(key)).collect();
        for key in &paid {
            sim.unread.remove(key);
        }
        sim.read.extend(wanted.keys());
        planner.set_link(sim.link.estimate());
        let was_coming = wanted.keys().all(|key| sim.presence(key) != Presence::Absent);
        let mut now = Vec::new();
        if wanted.keys().all(|key| sim.here.contains(&key)) {
            if !paid.is_empty() {
                planner.hit(LayerId(0), read.range, &|key| sim.presence(key), &mut now);
            }
        } else {
            planner.miss(LayerId(0), read.range, &|key| sim.presence(key), &mut now);
        }
        sim.send_all(&now, &wanted.keys().collect::<Vec<_>>(), &mut planner);
        now.clear();
        planner.touched(&|key, show| sim.peek(key, show), &mut now);
        sim.send_all(&now, &[], &mut planner);
        sim.pump(&mut planner);
        if std::env::var_os("SIM_WAITS").is_some() && !wanted.keys().all(|key| sim.here.contains(&key)) {
            tell_wait(case, &sim, read, was_coming);
        }
        waits += u64::from(!wanted.keys().all(|key| sim.here.contains(&key)));
        sim.run(&mut planner, u64::MAX, &|sim: &Simulation| {
            wanted.keys().all(|key| sim.here.contains(&key))
        });
    }
    let mut hints: BTreeMap<Reason, (u64, u64)> = BTreeMap::new();
    for (key, reason) in &sim.why {
        let (fetched, read) = hints.entry(*reason).or_default();
        *fetched += 1;
        *read += u64::from(sim.read.contains(key));
    }
    if std::env::var_os("SIM_WASTE").is_some() {
        tell_waste(case, &sim);
    }
    Outcome {
        hints,
        waits,
        us: sim.now,
        requests: sim.requests,
        fetched: sim.fetched,
        touched: u64::try_from(touched.len()).unwrap() * 4096,
    }
}

/// Says for what the reader waits now.
fn tell_wait(case: &Case, sim: &Simulation<'_>, read: &Read, was_coming: bool) {
    use tarblk::internals::image::FileMap as _;
    let file = case.image.file_at(LayerId(0), read.range.start);
    let path = file.and_then(|file| case.image.path(file.file)).unwrap_or_default();
    let at = read
        .range
        .start
        .since(file.map_or(TarOffset(0), |file| file.range.start));
    let how = if was_coming { "coming" } else { "absent" };
    let path = String::from_utf8_lossy(&path);
    println!("wait {} {how} {at} {} {path}", sim.now, read.range.len);
}

/// Says of which files most was fetched that nobody read, and why.
fn tell_waste(case: &Case, sim: &Simulation<'_>) {
    use tarblk::internals::image::FileMap as _;
    const TOLD: usize = 50;
    let mut waste: BTreeMap<(Reason, Vec<u8>), u64> = BTreeMap::new();
    for (key, reason) in sim.why.iter().filter(|(key, _)| !sim.read.contains(key)) {
        // The first file that has bytes in the chunk.
        let begins = |n: u64| TarOffset(u64::from(key.index) * CHUNK_BYTES + n * 512);
        let file = (0..CHUNK_BYTES / 512).find_map(|n| case.image.file_at(key.layer, begins(n)));
        let path = file.and_then(|file| case.image.path(file.file)).unwrap_or_default();
        *waste.entry((*reason, path)).or_default() += CHUNK_BYTES;
    }
    let mut waste: Vec<_> = waste.into_iter().collect();
    waste.sort_by_key(|(_, bytes)| Reverse(*bytes));
    for ((reason, path), bytes) in waste.iter().take(TOLD) {
        let path = String::from_utf8_lossy(path);
        println!("waste {:>6} KiB {} {path}", bytes >> 10, reason.name());
    }
}

/// The layer at `path`, read by nobody yet.
fn case(path: &str) -> Case {
    let tar = File::open(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let size = tar.metadata().expect("a file").len();
    let mut tree = TreeBuilder::new();
    walk::local(&tar, size, &mut tree, &mut |_, _| ()).expect("a tar");
    let image = Ext4Image::plan(tree.finish(), &Ext4Options::default()).expect("an image");
    Case {
        tar,
        size,
        image: Arc::new(image),
        trace: Vec::new(),
    }
}

impl Case {
    /// Adds a read of the image: of the layer's bytes in it, one piece after the other.
    fn read(&mut self, mut pause_us: u64, offset: u64, len: u64) {
        let mut pieces = Vec::new();
        let first = offset / BLOCK_SIZE;
        self.image
            .pieces(first, (offset + len).div_ceil(BLOCK_SIZE) - first, &mut pieces);
        for piece in pieces {
            if let Origin::Layer(_, start) = piece.origin {
                let range = TarRange::new(start, piece.len);
                self.trace.push(Read { pause_us, range });
                pause_us = 0;
            }
        }
    }

    fn replay(&mut self, path: &str) {
        let text = std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let mut last = 0;
        for line in text.lines() {
            let mut fields = line
                .split_whitespace()
                .map(|field| field.parse::<u64>().expect("numbers"));
            let mut field = || fields.next().expect("three numbers a line");
            let (at, offset, len) = (field(), field(), field());
            self.read(at - last, offset, len);
            last = at;
        }
    }
}

/// 400 directories of 25 files; a reader that opens a third of the files of every twentieth directory.
fn invented(directory: &std::path::Path) -> Case {
    let path = directory.join("layer.tar");
    let mut tar = tar::Builder::new(File::create(&path).expect("a file"));
    let mut state = 1u64;
    for file in 0..10_000u32 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let mut header = tar::Header::new_ustar();
        let size = 1u64 << (9 + (state >> 33) % 11);
        header.set_size(size);
        header.set_mode(0o644);
        let name = format!("{}/{}", file / 25, file % 25);
        let content = vec![b'x'; usize::try_from(size).expect("small")];
        tar.append_data(&mut header, name, &content[..])
            .expect("room for the layer");
    }
    tar.finish().expect("room for the layer");
    let mut case = case(path.to_str().expect("a plain path"));
    let mut reads = Vec::new();
    let mut collect = |file: tarblk::internals::image::StoredFile| reads.push((file.file.0, file.range));
    let mut at = TarOffset(512);
    while at.0 < case.size {
        use tarblk::internals::image::FileMap as _;
        match case.image.file_at(LayerId(0), at) {
            Some(file) => {
                collect(file);
                at = TarOffset(file.range.end().0.next_multiple_of(512) + 512);
            }
            None => at = at.plus(512),
        }
    }
    for (number, range) in reads {
        if number / 25 % 20 == 0 && number % 3 == 0 {
            let range = TarRange::new(range.start, range.len.min(65536));
            case.trace.push(Read { pause_us: 1000, range });
        }
    }
    case
}

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect();
    let scratch = tempfile::tempdir().expect("a directory");
    let case = match arguments.get(..2) {
        Some([layer, trace]) => {
            let mut case = case(layer);
            case.replay(trace);
            case
        }
        _ => invented(scratch.path()),
    };
    let argument = |n: usize, or: u64| arguments.get(n).map_or(or, |text| text.parse().unwrap());
    let (rtt_ms, mbit) = (argument(2, 20), argument(3, 200));
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
        let budget = |pick: &mut dyn FnMut(&[u64]) -> u64| Budget {
            bytes: pick(&[1 << 20, 2 << 20, 4 << 20, 8 << 20]),
            own_percent: pick(&[50, 100, 200, 400]),
            all_percent: pick(&[2, 5, 10, 25, 50, 100]),
        };
        for _ in 0..3000 {
            let options = PlanOptions {
                small_file_bytes: pick(&[256 << 10, 512 << 10, 1 << 20]),
                demand_bytes: pick(&[64 << 10, 128 << 10, 256 << 10, 512 << 10]),
                first_touch_percent: pick(&[12, 25, 50, 100, 200]),
                widest_touch_percent: pick(&[50, 100, 200, 400, 800]),
                narrowest_touch_bytes: pick(&[32 << 10, 64 << 10, 128 << 10, 256 << 10]),
                neighbour_bytes: pick(&[32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10]),
                neighbour_percent: pick(&[50, 100, 200, 400]),
                small_neighbour_bytes: pick(&[64 << 10, 128 << 10, 256 << 10, 512 << 10]),
                program_part_bytes: pick(&[64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20]),
                first_read_ahead_bytes: pick(&[128 << 10, 256 << 10, 512 << 10, 1 << 20]),
                budgets: Budgets {
                    rest: budget(&mut pick),
                    neighbour: budget(&mut pick),
                    ..Budgets::default()
                },
                fault_around_bytes: pick(&[0, 16 << 10, 32 << 10, 64 << 10]),
                import_hops: u8::try_from(pick(&[0, 3, 20])).unwrap(),
                gap_chunks: u32::try_from(pick(&[0, 1, 2, 4])).unwrap(),
                ..base.clone()
            };
            policies.push((format!("{options:?}").replace(' ', ""), options));
        }
    }
    for (name, options) in policies {
        let out = simulate(&case, &options, rtt_ms, mbit);
        let mib = |bytes: u64| float(bytes) / 1_048_576.0;
        println!(
            "{name:>52} {:>7.2} {:>6} {:>9} {:>8.1} {:>8.1}",
            float(out.us) / 1e6,
            out.waits,
            out.requests,
            mib(out.fetched),
            mib(out.touched)
        );
        if arguments.get(4).is_none() {
            for (reason, (fetched, read)) in out.hints {
                let name = reason.name();
                let (fetched, read) = (mib(fetched * CHUNK_BYTES), mib(read * CHUNK_BYTES));
                println!("{name:>52} {fetched:>8.1} MiB, {read:.1} of it read");
            }
        }
    }
}
