//! How long it takes from nothing until an indexed image is mounted: `cargo bench --bench attach -- [OPTIONS]`, as root.
//!
//! Two registries hold the image and its published indexes: the tests' own, with the referrers API, and Debian's
//! `docker-registry`, which has none. Both are 20 ms away, TCP's slow start included (`support/far.rs`). Each is mounted by the
//! command with nothing cached, and then again with what the first mount kept, in turn; also without the way, which is what the
//! work itself costs. The machine's service runs already, but for the first time of all. `--timeline` shows when each request of the last
//! runs was sent and answered.
//!
//! `--image LAYOUT:TAG` (below `TARBLK_TEST_IMAGES`; `debian-python:distribution`, which has four layers), `--rtt MS`, `--runs N`,
//! `--only WORDS` (some of the rows), `--door token` (the tests' registry hands out tokens first).

mod support;

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "support/far.rs"]
mod far;
#[path = "../tests/registry/mod.rs"]
mod registry;
#[path = "../tests/scripted/mod.rs"]
mod scripted;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use far::{Far, Passed};
use scripted::{Door, TestRegistry};
use support::Runs;

type Failure = Box<dyn std::error::Error>;

const TARBLK: &str = env!("CARGO_BIN_EXE_tarblk");

struct Options {
    image: String,
    rtt: Duration,
    runs: usize,
    only: Option<String>,
    token: bool,
    timeline: bool,
}

fn options() -> Result<Options, Failure> {
    let mut options = Options {
        image: "debian-python:distribution".into(),
        rtt: Duration::from_millis(20),
        runs: 7,
        only: None,
        token: false,
        timeline: false,
    };
    let mut arguments = support::arguments().into_iter();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--image" => options.image = value()?,
            "--rtt" => options.rtt = Duration::from_millis(value()?.parse()?),
            "--runs" => options.runs = value()?.parse::<usize>()?.max(1),
            "--only" => options.only = Some(value()?),
            "--door" => options.token = value()? == "token",
            "--timeline" => options.timeline = true,
            other => return Err(format!("what is {other}?").into()),
        }
    }
    Ok(options)
}

/// A registry with the image and its indexes.
struct Place {
    name: &'static str,
    far: Far,
    near: SocketAddr,
    authfile: PathBuf,
}

/// One measurement: which registry, how far away it is, what is cached.
struct Row<'a> {
    place: &'a Place,
    title: String,
    away: bool,
    second: bool,
    took: Vec<Duration>,
    last: (Instant, Vec<Passed>, usize),
}

fn main() -> Result<(), Failure> {
    let options = options()?;
    let images = std::env::var_os("TARBLK_TEST_IMAGES").map(PathBuf::from);
    let images = images.ok_or("set TARBLK_TEST_IMAGES to where tools/test-images put its images")?;
    let (layout, _) = options.image.split_once(':').ok_or("--image LAYOUT:TAG")?;
    let dir = tempfile::tempdir()?;
    let open = dir.path().join("nobody.json");
    fs::write(&open, "{}")?;

    let own = TestRegistry::start();
    fill(&own, &images.join(layout), &options.image)?;
    let own_at = SocketAddr::from(([127, 0, 0, 1], own.port()));
    push(own_at, &open, &options.image)?;
    if options.token {
        own.rules(|rules| rules.door = Door::Token(Duration::from_secs(300)));
    }
    let mut places = vec![Place {
        name: "referrers API",
        far: Far::from(own_at, options.rtt)?,
        near: own_at,
        authfile: open.clone(),
    }];
    let debian = registry::Registry::with(
        "attach",
        registry::Access::Anonymous,
        &images,
        &[options.image.as_str()],
    );
    if let Some(debian) = &debian {
        let at = debian.host().parse()?;
        push(at, &open, &options.image)?;
        places.push(Place {
            name: "docker-registry",
            far: Far::from(at, options.rtt)?,
            near: at,
            authfile: open.clone(),
        });
    }
    let mut rows = Vec::new();
    for place in &places {
        for (away, second) in [(true, false), (true, true), (false, false)] {
            let title = format!(
                "{}, {}, {}",
                place.name,
                if away { "away" } else { "near" },
                if second { "second" } else { "nothing cached" }
            );
            if options.only.as_ref().is_none_or(|only| title.contains(only.as_str())) {
                let last = (Instant::now(), Vec::new(), 0);
                rows.push(Row {
                    place,
                    title,
                    away,
                    second,
                    took: Vec::new(),
                    last,
                });
            }
        }
    }
    println!(
        "{}, {} ms away with slow start; {} runs each in turn",
        options.image,
        options.rtt.as_millis(),
        options.runs
    );
    for _ in 0..options.runs {
        for row in &mut rows {
            row.run(dir.path(), &options.image)?;
        }
    }
    for row in &rows {
        row.report(&options);
    }
    Ok(())
}

impl Row<'_> {
    fn run(&mut self, dir: &Path, image: &str) -> Result<(), Failure> {
        let at = if self.away {
            self.place.far.address()
        } else {
            self.place.near
        };
        // The same directory each time: a service that is to write to another one is started anew.
        let cache = dir.join("cache");
        fs::create_dir_all(&cache)?;
        empty(&cache)?;
        let mounting = || mount(dir, at, image, &self.place.authfile, &cache);
        if self.second {
            mounting()?;
            // Not kept alive: the way's window would be.
            self.place.far.take();
        }
        let began = Instant::now();
        self.took.push(mounting()?);
        let (passed, connections) = self.place.far.take();
        self.last = (began, passed, connections);
        Ok(())
    }

    fn report(&self, options: &Options) {
        let (began, passed, connections) = &self.last;
        println!("{:42} {}", self.title, Runs::ms(&self.took));
        if !self.away {
            return;
        }
        let trips = Runs::ms(&self.took).median() / (options.rtt.as_secs_f64() * 1e3);
        println!(
            "{:42} {trips:9.1} round trips in all, {} requests, {connections} connections, {:.1} round trips until the last answer",
            "",
            passed.len(),
            passed
                .iter()
                .filter_map(|passed| passed.last)
                .max()
                .map_or(0.0, |last| (last - *began).as_secs_f64() / options.rtt.as_secs_f64())
        );
        if !options.timeline {
            return;
        }
        let at = |time: Instant| time.saturating_duration_since(*began).as_secs_f64() * 1e3;
        for one in passed {
            println!(
                "  {:5.1} .. {:5.1} ms  {:3.1} trips  connection {:2} (made at {:5.1})  {:>7} bytes  {} {}",
                at(one.sent),
                one.last.map_or(f64::NAN, at),
                one.round_trips(options.rtt),
                one.connection,
                at(one.connected),
                one.bytes,
                one.what,
                one.status
            );
        }
    }
}

/// Removes the files in `dir` and below.
fn empty(dir: &Path) -> Result<(), Failure> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            empty(&path)?;
        } else {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

fn tarblk() -> Command {
    let mut command = Command::new(TARBLK);
    command.arg("--quiet").env_remove("RUST_LOG").env_remove("TARBLK_CREDS");
    command
}

fn good(command: &mut Command) -> Result<(), Failure> {
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{command:?}: {}", String::from_utf8_lossy(&output.stderr)).into())
}

fn with_registry<'c>(command: &'c mut Command, authfile: &Path) -> &'c mut Command {
    command
        .arg("--authfile")
        .arg(authfile)
        .args(["--plain-http", "--hosts-dir", "/nonexistent"])
}

/// Mounts the image from nothing and unmounts it again; how long the mounting took.
fn mount(dir: &Path, at: SocketAddr, image: &str, authfile: &Path, cache: &Path) -> Result<Duration, Failure> {
    let target = tempfile::tempdir_in(dir)?;
    let states = dir.join("states");
    let mut command = tarblk();
    command
        .args(["mount", &format!("docker://{at}/{image}")])
        .arg(target.path())
        .arg("--cache")
        .arg(cache)
        .args(["--index", "require", "--trust", "registry", "--backend", "loop"])
        .env("TARBLK_STATE_DIR", &states);
    let began = Instant::now();
    good(with_registry(&mut command, authfile))?;
    let took = began.elapsed();
    let looked = fs::read_dir(target.path())?.count();
    let mut command = tarblk();
    good(
        command
            .arg("umount")
            .arg(target.path())
            .env("TARBLK_STATE_DIR", &states),
    )?;
    if looked < 5 {
        return Err("the mounted image is empty".into());
    }
    Ok(took)
}

fn push(at: SocketAddr, authfile: &Path, image: &str) -> Result<(), Failure> {
    let mut command = tarblk();
    command.args(["index", "push", &format!("docker://{at}/{image}")]);
    good(with_registry(&mut command, authfile))
}

/// Puts one image of a layout into the tests' registry.
fn fill(registry: &TestRegistry, layout: &Path, name: &str) -> Result<(), Failure> {
    let (repository, tag) = name.split_once(':').ok_or("LAYOUT:TAG")?;
    let read = |digest: &str| fs::read(layout.join("blobs").join(digest.replace(':', "/")));
    let index: serde_json::Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let listed = index["manifests"].as_array().ok_or("no manifests")?;
    let entry = listed
        .iter()
        .find(|entry| entry["annotations"]["org.opencontainers.image.ref.name"] == tag)
        .ok_or("no such tag")?;
    let bytes = read(entry["digest"].as_str().unwrap_or_default())?;
    let manifest: serde_json::Value = serde_json::from_slice(&bytes)?;
    let layers = manifest["layers"].as_array().ok_or("no image")?;
    for blob in layers.iter().chain([&manifest["config"]]) {
        registry.put_blob(&read(blob["digest"].as_str().unwrap_or_default())?);
    }
    let kind = entry["mediaType"].as_str().unwrap_or_default();
    registry.put_manifest(repository, tag, kind, &bytes);
    Ok(())
}
