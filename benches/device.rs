//! The device from cold, as the command makes it: 4 KiB reads beyond the origin's own latency, and reading it from end to end
//! against `curl -o FILE` from the same nginx.
//!
//! `cargo bench --bench device [-- [cold] [sequential] [kept] [--backend auto|ublk|loop] [--mib N] [--runs N] [--with TARBLK]...]`, as
//! root; needs nginx and curl. Each `--with` names another build of the command, which takes its turn in each run. The layer is made: N MiB (1024) of noise in files of 4 MiB. Everything, nginx's document and the caches too, lies in
//! a temporary directory (TMPDIR chooses where), and the layer is in the page cache. Every device is new: its cache directory
//! is empty, and nothing of it is in the kernel.

#![allow(clippy::as_conversions, clippy::cast_precision_loss)]

mod support;

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use support::{Runs, ratios};
use tarblk::internals::bench::origin::{Link, Origin};
use tarblk::internals::units::CHUNK_BYTES;

const MIB: u64 = 1 << 20;
const FILE_BYTES: u64 = 4 * MIB;
const BLOCK: usize = 4096;

/// Cold reads of one device.
const READS: u64 = 300;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

struct Plan {
    backend: String,
    mib: u64,
    runs: usize,
    parts: Vec<String>,
    /// The command, in all the builds that are compared.
    programs: Vec<String>,
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("device: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Outcome<()> {
    let mut plan = Plan {
        backend: "auto".to_owned(),
        mib: 1024,
        runs: 7,
        parts: Vec::new(),
        programs: vec![env!("CARGO_BIN_EXE_tarblk").to_owned()],
    };
    let mut arguments = support::arguments().into_iter();
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--backend" => plan.backend = value()?,
            "--mib" => plan.mib = value()?.parse()?,
            "--runs" => plan.runs = value()?.parse()?,
            "--with" => plan.programs.push(value()?),
            "cold" | "sequential" | "kept" => plan.parts.push(argument),
            other => return Err(format!("unknown argument {other}").into()),
        }
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: device: needs root");
        return Ok(());
    }
    let lacks = |tool: &&&str| Command::new(tool).arg("-V").output().is_err();
    if let Some(tool) = ["nginx", "curl"].iter().find(lacks) {
        eprintln!("SKIP: device: needs {tool}");
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let layer = dir.path().join("layer.tar");
    make_layer(&layer, plan.mib)?;
    let index = dir.path().join("layer.tarblk");
    let own = &plan.programs[0];
    tarblk(own, &["index", "--quiet", text(&layer)?, "-o", text(&index)?])?;
    let wanted = |part: &str| plan.parts.is_empty() || plan.parts.iter().any(|asked| asked == part);
    let lab = Lab {
        plan: &plan,
        dir: dir.path(),
        layer: &layer,
        index: &index,
    };
    if wanted("cold") {
        lab.cold_from_nginx()?;
        lab.cold_from_afar()?;
    }
    if wanted("sequential") {
        lab.sequential()?;
    }
    if wanted("kept") {
        lab.kept()?;
    }
    Ok(())
}

/// What the measurements share.
struct Lab<'a> {
    plan: &'a Plan,
    dir: &'a Path,
    layer: &'a Path,
    index: &'a Path,
}

impl Lab<'_> {
    fn attach<'a>(&self, program: &'a str, url: &str, keep: bool) -> Outcome<Attached<'a>> {
        let cache = tempfile::tempdir_in(self.dir)?;
        let mut attached = self.attach_with(program, url, self.index, keep.then_some(cache.path()))?;
        attached.cache = Some(cache);
        Ok(attached)
    }

    /// The same with this index and this cache directory, if any.
    fn attach_with<'a>(
        &self,
        program: &'a str,
        url: &str,
        index: &Path,
        cache: Option<&Path>,
    ) -> Outcome<Attached<'a>> {
        let mut arguments = vec!["attach", url, "--quiet", "--json", "--backend", &self.plan.backend];
        arguments.extend(["--index", text(index)?]);
        match cache {
            Some(cache) => arguments.extend(["--cache", text(cache)?]),
            None => arguments.push("--no-cache"),
        }
        let said: serde_json::Value = serde_json::from_str(&tarblk(program, &arguments)?)?;
        let field = |name: &str| {
            said[name]
                .as_str()
                .map(str::to_owned)
                .ok_or(format!("no {name} in {said}"))
        };
        Ok(Attached {
            program,
            device: field("device")?,
            backend: field("backend")?,
            cache: None,
        })
    }

    fn cold_from_nginx(&self) -> Outcome<()> {
        let (_server, url) = nginx(self.dir)?;
        self.cold("nginx on loopback", &url)
    }

    /// The same with a way to the origin on which requests can be under way while others are waited for.
    fn cold_from_afar(&self) -> Outcome<()> {
        let origin = Origin::start()?;
        origin.serve_file("/layer.tar", self.layer)?;
        origin.set_link(Link {
            rtt: Duration::from_millis(5),
            rate: None,
        });
        self.cold("an origin 5 ms away", &origin.url("/layer.tar"))
    }

    /// 4 KiB reads of the device past the page cache, one at a time, where nothing was read before; in turn with a plain
    /// request for 4 KiB on a connection of its own that is kept.
    fn cold(&self, origin: &str, url: &str) -> Outcome<()> {
        println!(
            "cold 4 KiB reads, {origin}: {READS} of each of {} devices, in turn with plain requests",
            self.plan.runs
        );
        let mut all: Vec<Cold> = self.plan.programs.iter().map(|_| Cold::default()).collect();
        let mut backend = String::new();
        for run in 0..self.plan.runs {
            for (program, cold) in self.plan.programs.iter().zip(&mut all) {
                let attached = self.attach(program, url, true)?;
                backend.clone_from(&attached.backend);
                self.cold_device(&attached, url, run, cold)?;
            }
        }
        for (program, cold) in self.plan.programs.iter().zip(all) {
            if self.plan.programs.len() > 1 {
                println!("  {program}");
            }
            let (ours, bare) = (Runs::us(&cold.devices), Runs::us(&cold.plains));
            println!(
                "  {:<26} {ours}, 90% {:.0}",
                format!("device ({backend})"),
                ours.at(900)
            );
            println!("  {:<26} {bare}, 90% {:.0}", "plain request", bare.at(900));
            println!("  {:<26} {}", "medians' difference", Runs::new(cold.beyond, "us"));
            println!("  {:<26} {}", "bytes from the network", Runs::new(cold.shares, "%"));
        }
        Ok(())
    }

    /// One device's cold reads.
    fn cold_device(&self, attached: &Attached<'_>, url: &str, run: usize, cold: &mut Cold) -> Outcome<()> {
        let device = direct(&attached.device)?;
        let mut plain = Plain::connect(url)?;
        let mut buffer = Aligned::new();
        let blocks = self.plan.mib * MIB / BLOCK as u64;
        let mut place = Places::new(run as u64 + 1, blocks);
        let (mut devices, mut plains) = (Vec::new(), Vec::new());
        // The first of each opens a connection.
        device.read_exact_at(buffer.block(), place.next())?;
        plain.get(place.next())?;
        for _ in 0..READS {
            let start = Instant::now();
            plain.get(place.next())?;
            plains.push(start.elapsed());
            let start = Instant::now();
            device.read_exact_at(buffer.block(), place.next())?;
            devices.push(start.elapsed());
        }
        let (of_devices, of_plains) = (Runs::us(&devices), Runs::us(&plains));
        cold.beyond.push(of_devices.median() - of_plains.median());
        cold.shares.push(attached.network_share()?);
        cold.devices.extend(devices);
        cold.plains.extend(plains);
        Ok(())
    }

    /// The device from end to end by a plain reader, through the page cache, in turn with curl.
    fn sequential(&self) -> Outcome<()> {
        let (_server, url) = nginx(self.dir)?;
        println!(
            "from end to end, {} MiB from nginx, {} runs each in turn",
            self.plan.mib, self.plan.runs
        );
        let mut curl = Vec::new();
        let mut all: Vec<Sequential> = self.plan.programs.iter().map(|_| Sequential::default()).collect();
        let mut backend = String::new();
        for _ in 0..self.plan.runs {
            curl.push(self.curl(&url)?);
            for (program, rates) in self.plan.programs.iter().zip(&mut all) {
                for (rates, keep) in [(&mut rates.kept, true), (&mut rates.unkept, false)] {
                    let attached = self.attach(program, &url, keep)?;
                    backend.clone_from(&attached.backend);
                    rates.push(read_through(&attached.device)?);
                }
            }
        }
        println!("  {:<26} {}", "curl -o FILE", Runs::new(curl.clone(), "MB/s"));
        for (program, rates) in self.plan.programs.iter().zip(&all) {
            if self.plan.programs.len() > 1 {
                println!("  {program}");
            }
            for (name, rates) in [("kept on disk", &rates.kept), ("--no-cache", &rates.unkept)] {
                println!(
                    "  {:<26} {}",
                    format!("device ({backend}), {name}"),
                    Runs::new(rates.clone(), "MB/s")
                );
                println!("  {:<26} {}", "  / curl", ratios(rates, &curl));
            }
        }
        if let [own, other] = &all[..] {
            println!("  {:<26} {}", "the first / the second", ratios(&own.kept, &other.kept));
            println!("  {:<26} {}", "  --no-cache", ratios(&own.unkept, &other.unkept));
        }
        Ok(())
    }

    /// The device from end to end, all of the layer being in the disk cache: with an index's digests and without, and with the cache's
    /// file in the page cache and not there. Past the device's page cache: where a virtual machine has to be given memory for that
    /// by its host, or has it from the run before, that makes three times the difference of what is measured.
    fn kept(&self) -> Outcome<()> {
        let (_server, url) = nginx(self.dir)?;
        println!(
            "from end to end, {} MiB from the disk cache, {} runs each in turn",
            self.plan.mib, self.plan.runs
        );
        let without = self.dir.join("without.tarblk");
        let made = [
            "index",
            "--quiet",
            "--no-digests",
            text(self.layer)?,
            "-o",
            text(&without)?,
        ];
        tarblk(&self.plan.programs[0], &made)?;
        for (name, index) in [("no digests", without.as_path()), ("digests", self.index)] {
            let mut caches = Vec::new();
            for program in &self.plan.programs {
                let cache = tempfile::tempdir_in(self.dir)?;
                let attached = self.attach_with(program, &url, index, Some(cache.path()))?;
                attached.keep_all()?;
                caches.push(cache);
            }
            // What a service has compared with digests it compares with checksums from then on, if it lives on.
            let known = [false, true].into_iter().take(if name == "digests" { 2 } else { 1 });
            for (is_known, is_warm) in known.flat_map(|known| [(known, true), (known, false)]) {
                SERVICE_LIVES_ON.store(is_known, Ordering::Relaxed);
                if is_known {
                    // Not of files that were written a moment ago.
                    std::thread::sleep(Duration::from_secs(3));
                    for (program, cache) in self.plan.programs.iter().zip(&caches) {
                        read_directly(&self.attach_with(program, &url, index, Some(cache.path()))?.device)?;
                    }
                }
                let mut all: Vec<Vec<f64>> = vec![Vec::new(); caches.len()];
                for _ in 0..self.plan.runs {
                    for ((program, cache), rates) in self.plan.programs.iter().zip(&caches).zip(&mut all) {
                        set_page_cache(cache.path(), is_warm)?;
                        let attached = self.attach_with(program, &url, index, Some(cache.path()))?;
                        rates.push(read_directly(&attached.device)?);
                        if attached.network_share()? > 0.5 {
                            return Err("the cache did not have all of it".into());
                        }
                    }
                }
                let place = match (is_known, is_warm) {
                    (false, true) => "page cache",
                    (false, false) => "disk",
                    (true, true) => "known, page cache",
                    (true, false) => "known, disk",
                };
                for (program, rates) in self.plan.programs.iter().zip(&all) {
                    let label = format!("{name}, {place}");
                    println!("  {label:<26} {}  {program}", Runs::new(rates.clone(), "MB/s"));
                }
                if let [own, other] = &all[..] {
                    println!("  {:<26} {}", "the first / the second", ratios(own, other));
                }
            }
            SERVICE_LIVES_ON.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// MB/s of a download to a new file.
    fn curl(&self, url: &str) -> Outcome<f64> {
        let file = self.dir.join("downloaded");
        let start = Instant::now();
        let status = Command::new("curl")
            .args(["-sS", "--fail", "-o"])
            .arg(&file)
            .arg(url)
            .status()?;
        let took = start.elapsed();
        if !status.success() {
            return Err(format!("curl: {status}").into());
        }
        let len = fs::metadata(&file)?.len();
        fs::remove_file(&file)?;
        Ok(len as f64 / 1e6 / took.as_secs_f64())
    }
}

/// Has the files of a disk cache in the page cache, or not.
fn set_page_cache(cache: &Path, is_warm: bool) -> Outcome<()> {
    for entry in fs::read_dir(cache.join("layers"))? {
        let mut file = match File::open(entry?.path()) {
            Ok(file) => file,
            // The lock of a service that has just ended.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error.into()),
        };
        if is_warm {
            std::io::copy(&mut file, &mut std::io::sink())?;
        } else {
            file.sync_all()?;
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
        }
    }
    Ok(())
}

/// What was measured of one build.
#[derive(Default)]
struct Cold {
    devices: Vec<Duration>,
    plains: Vec<Duration>,
    beyond: Vec<f64>,
    shares: Vec<f64>,
}

/// The same of reading in order, in MB/s.
#[derive(Default)]
struct Sequential {
    kept: Vec<f64>,
    unkept: Vec<f64>,
}

/// MB/s of reading all of a device in order.
fn read_through(device: &str) -> Outcome<f64> {
    let mut file = File::open(device)?;
    let mut buffer = vec![0; 1 << 20];
    let mut len = 0;
    let start = Instant::now();
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(len as f64 / 1e6 / start.elapsed().as_secs_f64()),
            n => len += n,
        }
    }
}

/// The same past the device's page cache.
fn read_directly(device: &str) -> Outcome<f64> {
    const LEN: usize = 1 << 20;
    let mut file = direct(device)?;
    let mut memory = vec![0; LEN + BLOCK];
    let aligned = memory.as_ptr().align_offset(BLOCK);
    let buffer = &mut memory[aligned..aligned + LEN];
    let mut len = 0;
    let start = Instant::now();
    loop {
        match file.read(buffer)? {
            0 => return Ok(len as f64 / 1e6 / start.elapsed().as_secs_f64()),
            n => len += n,
        }
    }
}

fn direct(device: &str) -> Outcome<File> {
    Ok(OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)?)
}

/// A block where direct reads may go.
struct Aligned(Vec<u8>);

impl Aligned {
    fn new() -> Self {
        Self(vec![0; 2 * BLOCK])
    }

    fn block(&mut self) -> &mut [u8] {
        let start = self.0.as_ptr().align_offset(BLOCK);
        &mut self.0[start..start + BLOCK]
    }
}

/// Random places of whole blocks, in bytes, each in a piece of the layer of its own.
struct Places {
    state: u64,
    turn: u64,
    blocks: u64,
}

impl Places {
    fn new(seed: u64, blocks: u64) -> Self {
        Self {
            state: seed,
            turn: 0,
            blocks,
        }
    }

    fn next(&mut self) -> u64 {
        self.state = self
            .state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        // A stride that shares no factor with the number of pieces visits all of them, none twice.
        let pieces = READS * 2 + 3;
        let each = self.blocks / pieces;
        self.turn = (self.turn + 257) % pieces;
        (self.turn * each + (self.state >> 33) % each) * BLOCK as u64
    }
}

/// A device of the command, detached when it goes.
struct Attached<'a> {
    program: &'a str,
    device: String,
    backend: String,
    #[allow(dead_code, reason = "goes with the device")]
    cache: Option<tempfile::TempDir>,
}

impl Attached<'_> {
    /// Reads until the disk cache holds all of the layer that the image is made of, which is all but the end of the archive: readers do not
    /// wait for the disk, and what it is too slow for is not kept.
    fn keep_all(&self) -> Outcome<()> {
        let mut last = serde_json::Value::Null;
        for _ in 0..10 {
            read_directly(&self.device)?;
            for _ in 0..20 {
                let said = tarblk(self.program, &["stats", &self.device, "--json"])?;
                let mut stats: serde_json::Value = serde_json::from_str(&said)?;
                last = stats["counters"]["fetch"].take();
                let left = last["bytes_layers"].as_u64().zip(last["bytes_held"].as_u64());
                if left.is_some_and(|(all, held)| all - held < CHUNK_BYTES) {
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(100));
            }
        }
        Err(format!("the disk cache does not get all of the layer: {last}").into())
    }

    /// How many of a hundred layer bytes that the device gave came straight from the network.
    fn network_share(&self) -> Outcome<f64> {
        let stats: serde_json::Value =
            serde_json::from_str(&tarblk(self.program, &["stats", &self.device, "--json"])?)?;
        let bytes = &stats["counters"]["device"]["bytes"];
        let of = |name: &str| bytes[name].as_f64().ok_or(format!("no bytes by origin in {stats}"));
        let network = of("fetched")?;
        Ok(network / (network + of("memory")? + of("disk")?) * 100.0)
    }
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        if let Err(error) = tarblk(self.program, &["detach", &self.device]) {
            eprintln!("{}: {error}", self.device);
        }
    }
}

/// Whether a service that is started now lives on for a while without devices.
static SERVICE_LIVES_ON: AtomicBool = AtomicBool::new(false);

fn tarblk(program: &str, arguments: &[&str]) -> Outcome<String> {
    // Each program has a service of its own, which usually ends with its last device.
    let idle = if SERVICE_LIVES_ON.load(Ordering::Relaxed) {
        "3000"
    } else {
        "0"
    };
    let states = std::env::temp_dir().join(format!(
        "tarblk-bench-{}-{:x}",
        std::process::id(),
        crc32c::crc32c(program.as_bytes())
    ));
    let output = Command::new(program)
        .args(arguments)
        .env("TARBLK_STATE_DIR", states)
        .env("TARBLK_SERVICE_IDLE", idle)
        .output()?;
    if !output.status.success() {
        return Err(format!("tarblk {arguments:?}: {}", String::from_utf8_lossy(&output.stderr)).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

fn text(path: &Path) -> Outcome<&str> {
    path.to_str().ok_or_else(|| "an odd temporary path".into())
}

/// A connection on which 4 KiB are asked for by hand.
struct Plain {
    stream: TcpStream,
    host: String,
}

impl Plain {
    fn connect(url: &str) -> Outcome<Self> {
        let host = url
            .trim_start_matches("http://")
            .split('/')
            .next()
            .unwrap_or_default()
            .to_owned();
        let stream = TcpStream::connect(&host)?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, host })
    }

    fn get(&mut self, at: u64) -> Outcome<()> {
        let (host, last) = (&self.host, at + BLOCK as u64 - 1);
        let request = format!("GET /layer.tar HTTP/1.1\r\nHost: {host}\r\nRange: bytes={at}-{last}\r\n\r\n");
        self.stream.write_all(request.as_bytes())?;
        let mut answer = Vec::with_capacity(2 * BLOCK);
        let mut buffer = [0; 2 * BLOCK];
        loop {
            let n = self.stream.read(&mut buffer)?;
            if n == 0 {
                return Err("the origin closed a kept connection".into());
            }
            answer.extend_from_slice(&buffer[..n]);
            let head = answer.windows(4).position(|four| four == b"\r\n\r\n");
            if head.is_some_and(|head| answer.len() >= head + 4 + BLOCK) {
                return Ok(());
            }
        }
    }
}

struct Nginx(Child);

impl Drop for Nginx {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _gone = self.0.kill();
        let _gone = self.0.wait();
    }
}

/// A server of the files in `dir`, with nothing tuned but the log, and the layer's URL.
fn nginx(dir: &Path) -> Outcome<(Nginx, String)> {
    let port = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
    let conf = format!(
        "daemon off; master_process off; error_log stderr crit; pid {0}/pid; events {{ worker_connections 256; }}\n\
         http {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000;\n\
         client_body_temp_path {0}/a; proxy_temp_path {0}/b; fastcgi_temp_path {0}/c; uwsgi_temp_path {0}/d; scgi_temp_path {0}/e;\n\
         server {{ listen 127.0.0.1:{port}; root {0}; }} }}\n",
        dir.display()
    );
    let path: PathBuf = dir.join("nginx.conf");
    fs::write(&path, conf)?;
    let child = Command::new("nginx")
        .arg("-c")
        .arg(&path)
        .stderr(Stdio::null())
        .spawn()?;
    let server = Nginx(child);
    for _ in 0..100 {
        if TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return Ok((server, format!("http://127.0.0.1:{port}/layer.tar")));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err("nginx did not start".into())
}

/// Files of noise, so that no block is like another or zero.
fn make_layer(path: &Path, mib: u64) -> Outcome<()> {
    let mut tar = tar::Builder::new(std::io::BufWriter::new(File::create(path)?));
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut bytes = Vec::new();
    for number in 0..(mib * MIB).div_ceil(FILE_BYTES) {
        bytes.clear();
        for _ in 0..FILE_BYTES / 8 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        let mut header = tar::Header::new_gnu();
        header.set_size(FILE_BYTES);
        header.set_mode(0o644);
        tar.append_data(&mut header, format!("data/part-{number}.bin"), &bytes[..])?;
    }
    tar.into_inner()?.flush()?;
    Ok(())
}
