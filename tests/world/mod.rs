//! A world that follows from a seed: layers, a server, a line, a disk, readers, and what goes wrong with each of them.
//!
//! Everything runs on one thread with tokio's clock, which moves on when nothing else does. What is told of a world (its [`Log`])
//! is the same each time.

pub(crate) mod chance;
pub(crate) mod layers;
pub(crate) mod origin;

use std::cell::{Cell, RefCell};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;

use tarblk::internals::cache::Slice;
use tarblk::internals::cache::disk::{CacheLimit, DiskCache};
use tarblk::internals::fetch::simulated::{self, Later, Stream, World};
use tarblk::internals::fetch::{FetchError, FetchOptions, FetchStats, Fetcher, LayerRange, Located, ReadCallback};
use tarblk::internals::http;
use tarblk::internals::units::{LayerId, TarOffset, TarRange};
use tokio::sync::oneshot;
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep, timeout};

use self::chance::Chance;
use self::layers::Layer;
use self::origin::{Fault, HONEST, LIES, Origin, Served, Weather};

/// How long a read may take beyond its deadline, whatever the request that was to bring it is doing.
const OVERTIME: Duration = Duration::from_secs(1);
/// The same of a layer that is read from end to end: its readers wait for their turn as long as something comes.
const OVERTIME_OF_STREAMS: Duration = Duration::from_secs(90);
/// A deadline that outlasts every bad weather.
const PATIENT: Duration = Duration::from_secs(600);
/// How long bytes have to be wrong until the layer is believed to be.
const WRONG_FOR: Duration = Duration::from_secs(30);
/// Within this after the weather has cleared all is as if it had never been bad: the longest pause, and the longest wish of a server.
const CLEAR: Duration = Duration::from_secs(15);
/// What of a log is shown.
const SHOWN: usize = 60;

/// What happened, in order.
#[derive(Default)]
pub(crate) struct Log {
    began: Cell<Option<Instant>>,
    lines: RefCell<Vec<String>>,
}

impl Log {
    pub(crate) fn say(&self, what: impl FnOnce() -> String) {
        let time = self.began.get().map_or(0, |began| began.elapsed().as_micros());
        self.lines.borrow_mut().push(format!("{time:>12} us  {}", what()));
    }
}

/// What a seed came to.
#[derive(Debug, PartialEq)]
pub(crate) struct Outcome {
    /// All that happened.
    pub(crate) log: Vec<String>,
    pub(crate) reads: u64,
    /// Reads that were answered with an error that was allowed.
    pub(crate) refused: u64,
    pub(crate) requests: u64,
    pub(crate) faults: Vec<Fault>,
    pub(crate) crashes: u64,
    pub(crate) damages: u64,
    /// Chunks that came from the disk and were not what they had to be.
    pub(crate) rot: u64,
    pub(crate) from_disk: u64,
    pub(crate) poisoned: u64,
    /// The longest that a read took beyond its deadline.
    pub(crate) overtime: Duration,
    /// Virtual time.
    pub(crate) lasted: Duration,
}

/// The kernel of a world.
struct Kernel {
    origin: Rc<Origin>,
    chance: RefCell<Chance>,
    /// Reads of the disk that fail, in a thousand.
    bad_reads: u64,
    /// The longest that a worker takes to begin, in microseconds.
    busy: u64,
    temporary: PathBuf,
}

impl World for Kernel {
    fn connect(&self, _: SocketAddr) -> Later<io::Result<Box<dyn Stream>>> {
        let origin = self.origin.clone();
        Box::pin(async move {
            let line: Box<dyn Stream> = Box::new(origin.connect().await?);
            Ok(line)
        })
    }

    fn worker_delay(&self) -> Duration {
        Duration::from_micros(self.chance.borrow_mut().below(self.busy))
    }

    fn file_delay(&self) -> Duration {
        Duration::from_micros(self.chance.borrow_mut().below(5000))
    }

    fn before_read(&self) -> io::Result<()> {
        if self.chance.borrow_mut().happens(self.bad_reads) {
            return Err(io::Error::from_raw_os_error(5));
        }
        Ok(())
    }

    fn temporary_dir(&self) -> PathBuf {
        self.temporary.clone()
    }
}

/// What is chosen for a whole seed.
#[allow(clippy::struct_excessive_bools)]
struct Plan<'a> {
    layers: Vec<(&'a Layer, bool)>,
    deadline: Duration,
    lies: bool,
    /// Whether answers may speak of another length, which after a while is believed.
    lengths: bool,
    phases: u64,
    memory: u64,
    fetch_all: bool,
    cached: bool,
}

/// A part of a seed's life: one process.
struct Phase<'a> {
    plan: &'a Plan<'a>,
    log: Rc<Log>,
    origin: Rc<Origin>,
    clears: Instant,
    began: Instant,
    ending: Cell<bool>,
    tally: RefCell<Outcome>,
}

fn joined(slices: &[Slice]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for slice in slices {
        bytes.extend_from_slice(slice);
    }
    bytes
}

/// A scratch directory in memory where there is one: a disk's own speed is nothing to this test.
pub(crate) fn scratch() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    if shm.is_dir()
        && let Ok(dir) = tempfile::tempdir_in(shm)
    {
        return dir;
    }
    tempfile::tempdir().unwrap()
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().flatten() {
        // What has been renamed since is as good as not written.
        let _gone = fs::copy(entry.path(), to.join(entry.file_name()));
    }
}

/// Runs the world of `seed`. What is wrong with it is a panic, which says the seed and the last that happened.
pub(crate) fn run(seed: u64, layers: &[Layer]) -> Outcome {
    let log = Rc::new(Log::default());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .unwrap();
    http::chance::seed(Some(seed));
    let lived = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        runtime.block_on(live(seed, layers, &log))
    }));
    http::chance::seed(None);
    match lived {
        Ok(outcome) => outcome,
        Err(panic) => {
            let why = panic
                .downcast_ref::<String>()
                .map(String::as_str)
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("a panic");
            let last = log.lines.borrow();
            let last = last[last.len().saturating_sub(SHOWN)..].join("\n");
            panic!(
                "seed {seed}: {why}\nlast of all that happened:\n{last}\nagain: TARBLK_WORLD_SEED={seed} cargo test --test worlds one_seed -- --nocapture"
            );
        }
    }
}

async fn live(seed: u64, layers: &[Layer], log: &Rc<Log>) -> Outcome {
    let mut chance = Chance::new(seed);
    let began = Instant::now();
    log.began.set(Some(began));
    let lies = chance.happens(350);
    let picked: Vec<(&Layer, bool)> = (0..=chance.below(2))
        .map(|_| (&layers[chance.index(layers.len())], lies || chance.happens(600)))
        .collect();
    let plan = Plan {
        layers: picked,
        deadline: if chance.happens(700) {
            PATIENT
        } else {
            Duration::from_secs(20)
        },
        lies,
        lengths: chance.happens(100),
        phases: 1 + chance.below(3),
        memory: (1 + chance.below(24)) * 32 * 1024,
        fetch_all: chance.happens(150),
        cached: chance.happens(750),
    };
    log.say(|| {
        let names: Vec<_> = plan
            .layers
            .iter()
            .map(|(layer, digests)| (layer.kind, *digests))
            .collect();
        format!(
            "layers {names:?}, deadline {:?}, lies {}, lengths {}, {} phases, memory {}, fetch_all {}, cached {}",
            plan.deadline, plan.lies, plan.lengths, plan.phases, plan.memory, plan.fetch_all, plan.cached
        )
    });
    let dir = scratch();
    let mut outcome = Outcome {
        log: Vec::new(),
        reads: 0,
        refused: 0,
        requests: 0,
        faults: Vec::new(),
        crashes: 0,
        damages: 0,
        rot: 0,
        from_disk: 0,
        poisoned: 0,
        overtime: Duration::ZERO,
        lasted: Duration::ZERO,
    };
    let mut place = dir.path().join("0");
    for number in 0..plan.phases {
        let next = dir.path().join((number + 1).to_string());
        let phase_chance = Chance::new(chance.next());
        outcome = phase(&plan, log, &place, &next, phase_chance, outcome).await;
        if next.exists() {
            place = next;
        }
        if plan.cached && chance.happens(400) {
            outcome.damages += damage(&place, &mut chance, log);
        }
    }
    outcome.lasted = began.elapsed();
    outcome.log = log.lines.take();
    outcome
}

/// Spoils files of a cache as disks and people do.
fn damage(dir: &Path, chance: &mut Chance, log: &Log) -> u64 {
    let Ok(entries) = fs::read_dir(dir) else { return 0 };
    let mut files: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.is_file())
        .collect();
    files.sort();
    let mut done = 0;
    for path in files {
        if !chance.happens(600) {
            continue;
        }
        let Ok(file) = fs::OpenOptions::new().read(true).write(true).open(&path) else {
            continue;
        };
        let len = file.metadata().map_or(0, |meta| meta.len());
        let what = match chance.below(5) {
            0 => {
                fs::remove_file(&path).unwrap();
                "removed".to_owned()
            }
            1 => {
                let to = chance.below(len + 1);
                file.set_len(to).unwrap();
                format!("cut to {to}")
            }
            2 if len > 0 => {
                let at = chance.below(len);
                let most = 1 + chance.index(100_000);
                let end = (at + u64::try_from(most).unwrap()).min(len);
                file.write_all_at(&vec![0; usize::try_from(end - at).unwrap()], at)
                    .unwrap();
                format!("zeros from {at} to {end}")
            }
            _ if len > 0 => {
                let flips = 1 + chance.below(8);
                for _ in 0..flips {
                    let at = chance.below(len);
                    let mut byte = [0];
                    file.read_exact_at(&mut byte, at).unwrap();
                    byte[0] ^= 1 << chance.below(8);
                    file.write_all_at(&byte, at).unwrap();
                }
                format!("{flips} bits flipped")
            }
            _ => continue,
        };
        let kind = path.extension().map(|kind| kind.to_string_lossy().into_owned());
        log.say(|| format!("damage: a {kind:?} file: {what}"));
        done += 1;
    }
    done
}

/// The life of one process. Its cache is in `place`; if it is killed, what is there at that moment is in `next`.
async fn phase(
    plan: &Plan<'_>,
    log: &Rc<Log>,
    place: &Path,
    next: &Path,
    mut chance: Chance,
    tally: Outcome,
) -> Outcome {
    let began = Instant::now();
    let clears = began + Duration::from_millis(chance.below(90_000));
    let mut faults: Vec<Fault> = HONEST.iter().copied().filter(|_| chance.happens(400)).collect();
    if plan.lies {
        faults.extend(LIES);
    }
    if plan.lengths {
        faults.push(Fault::OtherLength);
    }
    if chance.happens(150) {
        faults.push(Fault::Whole);
    }
    let weather = Weather {
        faults,
        permille: chance.one(&[0, 50, 200, 500, 900, 1000]),
        unreachable: chance.one(&[0, 0, 100, 500, 1000]),
        latency: chance.one(&[50, 2000, 30_000, 200_000]),
        rate: chance.one(&[200, 2000, 50_000]),
        clears,
    };
    log.say(|| {
        let Weather { faults, permille, unreachable, latency, rate, .. } = &weather;
        format!(
            "a process; weather until {:?}: {permille} of {faults:?}, {unreachable} unreachable, latency {latency}, rate {rate}",
            clears - began
        )
    });
    let blobs = plan.layers.iter().map(|(layer, _)| Served {
        bytes: layer.blob.clone(),
        tag: format!("\"{}\"", layer.kind),
    });
    let origin = Rc::new(Origin {
        weather,
        blobs: blobs.collect(),
        chance: RefCell::new(Chance::new(chance.next())),
        requests: Cell::new(0),
        happened: RefCell::default(),
        log: log.clone(),
    });
    let kernel = Kernel {
        origin: origin.clone(),
        chance: RefCell::new(Chance::new(chance.next())),
        bad_reads: chance.one(&[0, 0, 100, 500]),
        busy: chance.one(&[1, 100, 5000]),
        temporary: place.parent().expect("a directory in the scratch directory").to_owned(),
    };
    let _entered = simulated::enter(Rc::new(kernel));
    let phase = Rc::new(Phase {
        plan,
        log: log.clone(),
        origin: origin.clone(),
        clears,
        began,
        ending: Cell::new(false),
        tally: RefCell::new(tally),
    });
    let tasks = LocalSet::new();
    tasks.run_until(Phase::live(&phase, place, next, &mut chance)).await;
    // Whatever the engine still does is brought to its end: it may not hang either.
    let ended = timeout(Duration::from_secs(600), tasks).await;
    assert!(ended.is_ok(), "tasks are left when the fetcher has ended");
    let Ok(phase) = Rc::try_unwrap(phase).map_err(|_| ()) else {
        panic!("a reader has not ended")
    };
    let mut outcome = phase.tally.into_inner();
    outcome.requests += origin.requests.get();
    outcome.faults.extend(origin.happened.borrow().iter());
    outcome
}

impl<'a> Phase<'a> {
    async fn live(phase: &Rc<Phase<'a>>, place: &Path, next: &Path, chance: &mut Chance) {
        let plan = phase.plan;
        let sources = plan
            .layers
            .iter()
            .enumerate()
            .map(|(number, (layer, digests))| layer.source(&format!("http://127.0.0.1:7/{number}"), *digests));
        let options = FetchOptions {
            memory_bytes: plan.memory,
            connections: chance.one(&[1, 2, 4, 16]),
            deadline: plan.deadline,
            wrong_for: WRONG_FOR,
            prefetch: chance.happens(800),
            fetch_all: plan.fetch_all,
            store: plan
                .cached
                .then(|| DiskCache::open(place, CacheLimit::bytes(1 << 40)).expect("a cache")),
            ..FetchOptions::default()
        };
        let fetcher = Fetcher::start(sources.collect(), options, None).expect("a fetcher");
        let kill = plan.cached && chance.happens(500);
        let killed_at = Duration::from_millis(chance.below(30_000));
        let readers = 1 + chance.below(4);
        let reads = 4 + chance.below(20);
        let mut all = Vec::new();
        for number in 0..readers {
            let mut own = Chance::new(chance.next());
            let (fetcher, phase) = (fetcher.clone(), phase.clone());
            all.push(async move {
                for _ in 0..reads {
                    if own.happens(300) {
                        sleep(Duration::from_millis(own.below(4000))).await;
                    }
                    let asked = phase.some_ranges(&mut own);
                    phase.read(&fetcher, number, asked).await;
                }
            });
        }
        let reading = futures_util::future::join_all(all);
        if kill {
            let dying = async {
                sleep(killed_at).await;
                copy(place, next);
                phase
                    .log
                    .say(|| "killed: from here on its disk is another world's".to_owned());
                phase.tally.borrow_mut().crashes += 1;
            };
            tokio::join!(reading, dying);
        } else {
            reading.await;
        }
        // Bad weather ends, and then everything is there.
        let clear = (phase.clears + CLEAR).saturating_duration_since(Instant::now());
        sleep(clear).await;
        for (layer, (content, _)) in (0..).map(LayerId).zip(&plan.layers) {
            let len = u64::try_from(content.tar.len()).unwrap();
            let range = TarRange::new(TarOffset(0), len);
            phase.read(&fetcher, 99, vec![LayerRange { layer, range }]).await;
        }
        let stats = fetcher.stats();
        phase.check(&stats);
        phase.ending.set(true);
        drop(fetcher);
    }

    fn check(&self, stats: &FetchStats) {
        let mut tally = self.tally.borrow_mut();
        tally.rot += stats.cache_damaged;
        tally.from_disk += stats.bytes.disk;
        tally.poisoned += stats.layers_poisoned;
        assert_eq!(
            stats.in_flight, 0,
            "reads are counted as under way when none is: {stats:?}"
        );
    }

    fn some_ranges(&self, chance: &mut Chance) -> Vec<LayerRange> {
        let count = 1 + chance.below(8) / 6;
        let some = (0..count).map(|_| {
            let number = chance.index(self.plan.layers.len());
            let len = u64::try_from(self.plan.layers[number].0.tar.len()).unwrap();
            let start = chance.below(len);
            let longest = chance.one(&[1, 4096, 40_000, 300_000]);
            let range = TarRange::new(TarOffset(start), (1 + chance.below(longest)).min(len - start));
            let layer = LayerId(u32::try_from(number).unwrap());
            LayerRange { layer, range }
        });
        some.collect()
    }

    /// Reads as a device does: looks first. Holds what comes against what has to come.
    async fn read(&self, fetcher: &Fetcher, reader: u64, asked: Vec<LayerRange>) {
        struct Tell(oneshot::Sender<Result<Vec<Slice>, FetchError>>);
        impl ReadCallback for Tell {
            fn complete(self: Box<Self>, outcome: Result<Vec<Slice>, FetchError>) {
                // Who has given up has said so.
                drop(self.0.send(outcome));
            }
        }
        let began = Instant::now();
        let mut right = Vec::new();
        for asked in &asked {
            right.extend_from_slice(self.right(*asked));
        }
        let found = match asked[..] {
            [only] => match fetcher.locate(only) {
                Located::Memory(slices) => Some(joined(&slices)),
                Located::File(fd, at) => {
                    let file = fs::File::open(format!("/proc/self/fd/{}", fd.as_raw_fd())).unwrap();
                    let mut bytes = vec![0; right.len()];
                    file.read_exact_at(&mut bytes, at).unwrap();
                    Some(bytes)
                }
                Located::Disk | Located::Elsewhere => None,
            },
            _ => None,
        };
        let outcome = if let Some(bytes) = found {
            Ok(bytes)
        } else {
            let (tell, told) = oneshot::channel();
            fetcher.read(asked.clone(), Box::new(Tell(tell)));
            let Ok(told) = timeout(self.plan.deadline + OVERTIME_OF_STREAMS, told).await else {
                panic!("reader {reader}: {asked:?} hangs since {:?}", began - self.began)
            };
            let Ok(outcome) = told else {
                panic!("reader {reader}: {asked:?} was never answered")
            };
            outcome.map(|slices| joined(&slices))
        };
        let took = began.elapsed();
        let ranges: Vec<String> = asked
            .iter()
            .map(|asked| format!("{}:{}", asked.layer.0, asked.range))
            .collect();
        self.log.say(|| {
            format!(
                "reader {reader}: {ranges:?}: {:?} in {took:?}",
                outcome.as_ref().map(Vec::len)
            )
        });
        let overtime = took.saturating_sub(self.plan.deadline);
        assert!(
            overtime <= OVERTIME || self.may_stream(&asked),
            "reader {reader}: {ranges:?} took {overtime:?} longer than it may"
        );
        let mut tally = self.tally.borrow_mut();
        tally.reads += 1;
        tally.overtime = tally.overtime.max(overtime);
        match outcome {
            Ok(bytes) => {
                let wrong = || bytes.iter().zip(&right).position(|(is, has_to_be)| is != has_to_be);
                assert!(
                    bytes == right,
                    "reader {reader}: {ranges:?}: wrong bytes: {} of {}, from {:?} on",
                    bytes.len(),
                    right.len(),
                    wrong()
                );
            }
            Err(error) => {
                tally.refused += 1;
                self.is_allowed(&error, began);
            }
        }
    }

    /// Whether any of what is asked may be of a layer that is read from end to end.
    fn may_stream(&self, asked: &[LayerRange]) -> bool {
        let of = |asked: &LayerRange| self.plan.layers[usize::try_from(asked.layer.0).unwrap()];
        let whole = self.origin.happened.borrow().contains(&Fault::Whole);
        // Wrong bytes may as well follow from what an index says of blocks of zstd frames, and where no digest would tell they are not entered.
        let streams = |(layer, checked): (&Layer, bool)| {
            !layer.can_seek() || (layer.has_blocks() && (self.plan.lies || !checked))
        };
        whole || asked.iter().any(|asked| streams(of(asked)))
    }

    fn right(&self, asked: LayerRange) -> &'a [u8] {
        let (layer, _) = self.plan.layers[usize::try_from(asked.layer.0).unwrap()];
        let start = usize::try_from(asked.range.start.0).unwrap();
        &layer.tar[start..start + usize::try_from(asked.range.len).unwrap()]
    }

    /// An error is right only where the world has made it so.
    fn is_allowed(&self, error: &FetchError, began: Instant) {
        let text = error.to_string();
        assert!(
            !text.chars().any(char::is_control),
            "a message with control characters: {text:?}"
        );
        let long_enough = self.clears - self.began >= WRONG_FOR;
        let patient = self.plan.deadline >= PATIENT;
        let allowed = match error {
            FetchError::Poisoned { .. } => self.plan.lies && long_enough,
            FetchError::Changed { .. } => self.plan.lengths && long_enough,
            FetchError::Deadline { .. } | FetchError::WrongAnswer { .. } | FetchError::Refused { .. } => {
                !patient && began < self.clears + CLEAR
            }
            _ => false,
        };
        assert!(
            allowed,
            "an error that nothing accounts for, {:?} after the beginning, weather until {:?}: {text}; {} requests",
            began - self.began,
            self.clears - self.began,
            self.origin.requests.get()
        );
    }
}
