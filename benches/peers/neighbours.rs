//! The neighbours, as far as they are installed: stargz-snapshotter, Nydus, ratarmount, and a block device by nbdkit. Each is run as its
//! documentation says, by programs that nobody here wrote (stargz.go calls stargz-snapshotter's library, for want of a packaged daemon).

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use ::tarblk::internals::digest::{Algorithm, Digest};

use super::stage::{Layer, Stage, download, last_words, run};
use super::{Failure, Ready, System, WORKLOADS, Workload, execute};

/// How long a neighbour may take until its root is there.
const PATIENCE: Duration = Duration::from_secs(120);

/// All that are known, installed or not.
pub(crate) fn systems() -> Vec<Box<dyn System>> {
    let stargz = |name, needs, recorded| -> Box<dyn System> {
        Box::new(Stargz {
            name,
            needs,
            recorded,
            layers: Vec::new(),
        })
    };
    let nydus = |name, needs, unmodified| -> Box<dyn System> {
        Box::new(Nydus {
            name,
            needs,
            unmodified,
        })
    };
    vec![
        stargz("stargz", "a converted layer", false),
        stargz("stargz, recorded", "a converted layer, recorded", true),
        nydus("Nydus, RAFS v6", "a converted layer", false),
        nydus("Nydus, targz-ref, gzip", "an index", true),
        Box::new(Ratarmount),
        Box::new(Nbdkit),
    ]
}

/// Waits until something is mounted on `root`, as long as `child` lives.
fn wait_for_mount(root: &Path, child: &mut Child, log: &Path) -> Result<(), Failure> {
    let before = parent_device(root)?;
    let began = Instant::now();
    loop {
        if device(root).is_some_and(|device| device != before) {
            return Ok(());
        }
        if let Some(status) = child.try_wait()? {
            return Err(format!(
                "it ended before it had mounted anything ({status}): {}",
                last_words(log)
            )
            .into());
        }
        if began.elapsed() > PATIENCE {
            return Err("it mounted nothing".into());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn device(path: &Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(path).ok().map(|meta| meta.dev())
}

fn parent_device(path: &Path) -> Result<u64, Failure> {
    let parent = path.parent().and_then(device);
    parent.ok_or_else(|| format!("{} has no directory", path.display()).into())
}

/// Ends a server; by force, if it does not.
fn end(child: &mut Child) {
    let pid = i32::try_from(child.id()).ok().and_then(rustix::process::Pid::from_raw);
    if let Some(pid) = pid {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    let began = Instant::now();
    while matches!(child.try_wait(), Ok(None)) {
        if began.elapsed() > Duration::from_secs(10) {
            let _ = child.kill();
            let _ = child.wait();
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn unmount(root: &Path) {
    let _ = run(Command::new("umount").arg("-l").arg(root));
}

/// Unpacks a layer into `tree`, which is made, for what is made of directories.
fn unpack(layer: &Layer, tree: &Path) -> Result<(), Failure> {
    fs::create_dir(tree)?;
    run(Command::new("tar").arg("-xf").arg(&layer.tar).arg("-C").arg(tree))
}

/// Serves a file as a blob of a repository; returns its digest.
fn serve_blob(stage: &Stage, repository: &str, file: &Path) -> Result<String, Failure> {
    let digest = Digest::of(Algorithm::Sha256, &fs::read(file)?).to_string();
    stage.serve(&format!("/v2/{repository}/blobs/{digest}"), file)?;
    Ok(digest)
}

// ---------------------------------------------------------------------------------------------------------------- stargz

/// stargz-snapshotter's library, see stargz.go.
struct Stargz {
    name: &'static str,
    needs: &'static str,
    /// Whether the files that a workload reads come first, and are fetched at once.
    recorded: bool,
    /// A layer's name, its blob's digest and that of its table of contents.
    layers: Vec<(String, String, String)>,
}

const STARGZ: &str = "tarblk-peer-stargz";

impl System for Stargz {
    fn name(&self) -> &'static str {
        self.name
    }

    fn needs(&self) -> &'static str {
        self.needs
    }

    fn publish(&mut self, stage: &Stage, layer: &Layer) -> Result<(), Failure> {
        let form = if self.recorded { "recorded.esgz" } else { "esgz" };
        let blob = stage.made().join(format!("{}.{form}", layer.name));
        let known = blob.with_extension("toc");
        if !known.exists() {
            let list = stage.made().join(format!("{}.files", layer.name));
            let mut convert = Command::new(STARGZ);
            convert.arg("convert").arg(&layer.tar).arg(&blob);
            if self.recorded {
                fs::write(&list, files_read(stage, layer)?)?;
                convert.arg(list);
            }
            let said = convert
                .stderr(Stdio::inherit())
                .output()
                .map_err(|why| format!("{STARGZ}: {why}; tools/peers installs the neighbours"))?;
            if !said.status.success() {
                return Err(format!("{STARGZ}: {}", said.status).into());
            }
            fs::write(&known, said.stdout)?;
        }
        let toc = fs::read_to_string(known)?.trim().to_owned();
        let digest = serve_blob(stage, "stargz", &blob)?;
        self.layers.push((layer.name.clone(), digest, toc));
        Ok(())
    }

    fn ready(&self, stage: &Stage, workload: &Workload, work: &Path) -> Result<Box<dyn Ready>, Failure> {
        let layer = stage.layer(workload.layer)?;
        let found = self.layers.iter().find(|(name, ..)| *name == layer.name);
        let (_, digest, toc) = found.ok_or("this layer was not converted")?;
        let mut server = Command::new(STARGZ)
            .arg("mount")
            .arg(work.join("stargz"))
            .arg(stage.root()?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(work.join("log"))?)
            .spawn()?;
        let orders = server.stdin.take().ok_or("it has no input")?;
        let answers = BufReader::new(server.stdout.take().ok_or("it has no output")?);
        let mut ready = Snapshotter {
            server,
            orders: Some(orders),
            answers,
            order: format!("{}/stargz:latest {digest} {toc}\n", stage.origin.address()),
            log: work.join("log"),
        };
        ready.hear("ready")?;
        Ok(Box::new(ready))
    }
}

struct Snapshotter {
    server: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<std::process::ChildStdout>,
    order: String,
    log: PathBuf,
}

impl Snapshotter {
    fn hear(&mut self, word: &str) -> Result<(), Failure> {
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        if line.trim() == word {
            return Ok(());
        }
        Err(format!("{STARGZ} failed: {}", last_words(&self.log)).into())
    }
}

impl Ready for Snapshotter {
    fn start(&mut self, _: &Path) -> Result<(), Failure> {
        let orders = self.orders.as_mut().ok_or("it was stopped")?;
        orders.write_all(self.order.as_bytes())?;
        self.hear("mounted")
    }

    fn stop(&mut self, root: &Path) {
        unmount(root);
        drop(self.orders.take());
        let began = Instant::now();
        while matches!(self.server.try_wait(), Ok(None)) && began.elapsed() < Duration::from_secs(5) {
            std::thread::sleep(Duration::from_millis(10));
        }
        end(&mut self.server);
        // Its snapshots' mounts are below its directory.
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        let below = self.log.with_file_name("stargz");
        for line in mounts.lines().rev() {
            let path = line.split(' ').nth(1).unwrap_or_default();
            if Path::new(path).starts_with(&below) {
                unmount(Path::new(path));
            }
        }
    }
}

/// The files that the layer's recorded workload reads, in the order of their first reads, one a line: what access times say of the
/// layer unpacked in memory.
fn files_read(stage: &Stage, layer: &Layer) -> Result<String, Failure> {
    let recorded = WORKLOADS
        .iter()
        .find(|workload| workload.layer == layer.name && !workload.command[0].starts_with("cat"))
        .ok_or("nothing runs in this layer")?;
    let root = stage.root()?;
    run(Command::new("mount")
        .args(["-t", "tmpfs", "-o", "strictatime,size=2g", "tarblk-peers"])
        .arg(&root))?;
    let read = || -> Result<String, Failure> {
        run(Command::new("tar").arg("-xf").arg(&layer.tar).arg("-C").arg(&root))?;
        std::thread::sleep(Duration::from_millis(50));
        let mark = root.join("tarblk-mark");
        File::create(&mark)?;
        std::thread::sleep(Duration::from_millis(50));
        execute(&root, recorded, || Ok(()))?;
        let list = Command::new("find")
            .arg(&root)
            .args(["-xdev", "-type", "f", "-anewer"])
            .arg(&mark)
            .args(["-printf", "%A@ %P\\n"])
            .output()?;
        let text = String::from_utf8(list.stdout)?;
        let mut files: Vec<_> = text.lines().filter_map(|line| line.split_once(' ')).collect();
        files.sort_by(|one, other| one.0.cmp(other.0));
        files.retain(|(_, path)| *path != "tarblk-mark");
        let paths: Vec<_> = files.into_iter().map(|(_, path)| path).collect();
        Ok(paths.join("\n"))
    };
    let files = read();
    unmount(&root);
    files
}

// ----------------------------------------------------------------------------------------------------------------- Nydus

/// nydusd of Nydus 2.2 (the crate `nydus-rs`), by FUSE.
struct Nydus {
    name: &'static str,
    needs: &'static str,
    /// Whether the gzip layer stays as it is and only an index is made.
    unmodified: bool,
}

impl Nydus {
    fn bootstrap(&self, layer: &Layer) -> String {
        let form = if self.unmodified { "zran" } else { "v6" };
        format!("/nydus/{}.{form}", layer.name)
    }
}

impl System for Nydus {
    fn name(&self) -> &'static str {
        self.name
    }

    fn needs(&self) -> &'static str {
        self.needs
    }

    fn publish(&mut self, stage: &Stage, layer: &Layer) -> Result<(), Failure> {
        let work = stage.directory()?;
        let (bootstrap, blobs, tree) = (
            work.path().join("bootstrap"),
            work.path().join("blobs"),
            work.path().join("tree"),
        );
        fs::create_dir(&blobs)?;
        let mut create = Command::new("nydus-image");
        create.args(["create", "--fs-version", "6", "--log-level", "error"]);
        create.arg("--bootstrap").arg(&bootstrap).arg("--blob-dir").arg(&blobs);
        if self.unmodified {
            create.args(["--type", "targz-ref"]).arg(&layer.gzip);
        } else {
            unpack(layer, &tree)?;
            create.args(["--type", "directory"]).arg(&tree);
        }
        run(create.stdout(Stdio::null()))?;
        for blob in fs::read_dir(&blobs)? {
            let blob = blob?;
            let id = blob.file_name().to_string_lossy().into_owned();
            stage.serve(&format!("/v2/nydus/blobs/sha256:{id}"), &blob.path())?;
        }
        if self.unmodified {
            serve_blob(stage, "nydus", &layer.gzip)?;
        }
        stage.serve(&self.bootstrap(layer), &bootstrap)
    }

    fn ready(&self, stage: &Stage, workload: &Workload, work: &Path) -> Result<Box<dyn Ready>, Failure> {
        let layer = stage.layer(workload.layer)?;
        let config = serde_json::json!({
            "device": {
                "backend": {
                    "type": "registry",
                    "config": { "scheme": "http", "host": stage.origin.address().to_string(), "repo": "nydus" }
                },
                "cache": { "type": "blobcache", "config": { "work_dir": work.join("cache") } }
            },
            "mode": "direct",
            "digest_validate": false,
            "iostats_files": false,
            "enable_xattr": true
        });
        fs::create_dir(work.join("cache"))?;
        fs::write(work.join("config.json"), serde_json::to_vec(&config)?)?;
        Ok(Box::new(Nydusd {
            bootstrap: stage.origin.url(&self.bootstrap(layer)),
            work: work.into(),
            server: None,
        }))
    }
}

struct Nydusd {
    bootstrap: String,
    work: PathBuf,
    server: Option<Child>,
}

impl Ready for Nydusd {
    fn start(&mut self, root: &Path) -> Result<(), Failure> {
        let bootstrap = self.work.join("bootstrap");
        download(&self.bootstrap, &bootstrap)?;
        let name = self.work.join("log");
        let log = File::create(&name)?;
        let server = Command::new("nydusd")
            .args(["fuse", "--log-level", "error", "--rlimit-nofile", "0", "--mountpoint"])
            .arg(root)
            .arg("--bootstrap")
            .arg(&bootstrap)
            .arg("--config")
            .arg(self.work.join("config.json"))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()?;
        wait_for_mount(root, self.server.insert(server), &name)
    }

    fn stop(&mut self, root: &Path) {
        unmount(root);
        if let Some(mut server) = self.server.take() {
            end(&mut server);
        }
    }
}

// ------------------------------------------------------------------------------------------------------------ ratarmount

/// ratarmount, a package of Python's, on an HTTP URL, with an index that it has made.
struct Ratarmount;

impl System for Ratarmount {
    fn name(&self) -> &'static str {
        "ratarmount, tar"
    }

    fn needs(&self) -> &'static str {
        "an index"
    }

    fn publish(&mut self, stage: &Stage, layer: &Layer) -> Result<(), Failure> {
        let (work, root) = (stage.directory()?, stage.root()?);
        let mut maker = Ratar::new(stage, layer, work.path());
        let made = maker.mount(&root);
        maker.stop(&root);
        made?;
        stage.serve(&format!("/{}.sqlite", layer.name), &maker.file("index"))
    }

    fn ready(&self, stage: &Stage, workload: &Workload, work: &Path) -> Result<Box<dyn Ready>, Failure> {
        let layer = stage.layer(workload.layer)?;
        Ok(Box::new(Ratar::new(stage, layer, work)))
    }
}

struct Ratar {
    url: String,
    index: String,
    work: PathBuf,
    server: Option<Child>,
}

impl Ratar {
    fn new(stage: &Stage, layer: &Layer, work: &Path) -> Self {
        Self {
            url: stage.origin.url(&format!("/{}.tar", layer.name)),
            index: stage.origin.url(&format!("/{}.sqlite", layer.name)),
            work: work.into(),
            server: None,
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.work.join(name)
    }

    /// Mounts; makes the index, if it is not there.
    fn mount(&mut self, root: &Path) -> Result<(), Failure> {
        let name = self.file("log");
        let log = File::create(&name)?;
        // In the foreground: its reader of URLs has threads, with which it does not go into the background.
        let server = Command::new("ratarmount")
            .args(["-f", "-o", "allow_other,dev,suid", "--index-file"])
            .arg(self.file("index"))
            .arg(&self.url)
            .arg(root)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .map_err(|why| format!("ratarmount: {why}; tools/peers installs the neighbours"))?;
        wait_for_mount(root, self.server.insert(server), &name)
    }
}

impl Ready for Ratar {
    fn start(&mut self, root: &Path) -> Result<(), Failure> {
        download(&self.index, &self.file("index"))?;
        self.mount(root)
    }

    fn stop(&mut self, root: &Path) {
        unmount(root);
        if let Some(mut server) = self.server.take() {
            end(&mut server);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------- nbdkit

/// An EROFS image (mkfs.erofs) as a block device by nbdkit's curl plugin: nbdfuse makes it a file, and a loop device a device, since few
/// kernels have NBD.
struct Nbdkit;

impl System for Nbdkit {
    fn name(&self) -> &'static str {
        "nbdkit-curl, EROFS"
    }

    fn needs(&self) -> &'static str {
        "an image"
    }

    fn publish(&mut self, stage: &Stage, layer: &Layer) -> Result<(), Failure> {
        for program in ["nbdkit", "nbdfuse"] {
            run(Command::new(program).arg("--version").stdout(Stdio::null()))?;
        }
        let work = stage.directory()?;
        let (tree, image) = (work.path().join("tree"), work.path().join("image"));
        unpack(layer, &tree)?;
        run(Command::new("mkfs.erofs").arg(&image).arg(&tree).stdout(Stdio::null()))?;
        stage.serve(&format!("/{}.erofs", layer.name), &image)
    }

    fn ready(&self, stage: &Stage, workload: &Workload, work: &Path) -> Result<Box<dyn Ready>, Failure> {
        let layer = stage.layer(workload.layer)?;
        let dir = work.join("nbd");
        fs::create_dir(&dir)?;
        Ok(Box::new(Nbd {
            url: stage.origin.url(&format!("/{}.erofs", layer.name)),
            dir,
            server: None,
        }))
    }
}

struct Nbd {
    url: String,
    dir: PathBuf,
    server: Option<Child>,
}

impl Ready for Nbd {
    fn start(&mut self, root: &Path) -> Result<(), Failure> {
        let log = self.dir.with_extension("log");
        let server = Command::new("nbdfuse")
            .arg("--readonly")
            .arg(&self.dir)
            .args(["--command", "nbdkit", "-s", "--exit-with-parent", "--readonly"])
            .args([
                "--filter=cache",
                "curl",
                "cache-min-block-size=256K",
                "cache-on-read=true",
            ])
            .arg(format!("url={}", self.url))
            .arg("protocols=http")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()?;
        wait_for_mount(&self.dir, self.server.insert(server), &log)?;
        run(Command::new("mount")
            .args(["-t", "erofs", "-o", "loop,ro"])
            .arg(self.dir.join("nbd"))
            .arg(root))
    }

    fn stop(&mut self, root: &Path) {
        let _ = run(Command::new("umount").arg(root));
        unmount(&self.dir);
        if let Some(mut server) = self.server.take() {
            end(&mut server);
        }
    }
}
