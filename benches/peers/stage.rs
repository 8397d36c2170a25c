//! What every system runs on: an origin that serves layers over a link, empty directories, cold caches.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{MemfdFlags, memfd_create};
use tarblk::internals::bench::origin::Origin;

use super::Failure;

/// A layer in the forms in which it is published.
pub(crate) struct Layer {
    /// What `tools/debian-layer` calls it.
    pub(crate) name: String,
    /// The uncompressed tar.
    pub(crate) tar: PathBuf,
    /// The same by `gzip -6`.
    pub(crate) gzip: PathBuf,
    /// The same by `zstd -3`: one frame.
    pub(crate) zstd: PathBuf,
}

/// The origin and directories.
pub(crate) struct Stage {
    pub(crate) origin: Origin,
    pub(crate) layers: Vec<Layer>,
    scratch: tempfile::TempDir,
    kept: PathBuf,
}

impl Stage {
    /// Serves the layers with these names.
    pub(crate) fn new<'a>(names: impl Iterator<Item = &'a str>) -> Result<Self, Failure> {
        let kept = match std::env::var_os("TARBLK_TEST_CACHE") {
            Some(dir) => PathBuf::from(dir),
            None => PathBuf::from(std::env::var_os("HOME").ok_or("HOME is not set")?).join(".cache/tarblk-tests"),
        };
        let mut stage = Self {
            origin: Origin::start()?,
            layers: Vec::new(),
            scratch: tempfile::Builder::new().prefix("tarblk-peers-").tempdir()?,
            kept,
        };
        fs::create_dir_all(stage.made())?;
        fs::create_dir(stage.scratch.path().join("root"))?;
        for name in names.collect::<BTreeSet<_>>() {
            let layer = stage.forms(name)?;
            for (form, path) in [("tar", &layer.tar), ("tar.gz", &layer.gzip), ("tar.zst", &layer.zstd)] {
                stage.serve(&format!("/{name}.{form}"), path)?;
            }
            stage.layers.push(layer);
        }
        Ok(stage)
    }

    /// Where things are kept that take long to make of a layer.
    pub(crate) fn made(&self) -> PathBuf {
        self.kept.join("peers")
    }

    fn forms(&self, name: &str) -> Result<Layer, Failure> {
        let said = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tools/debian-layer"))
            .arg(name)
            .stderr(Stdio::inherit())
            .output()?;
        if !said.status.success() {
            return Err(format!("tools/debian-layer {name} failed").into());
        }
        let tar = PathBuf::from(String::from_utf8(said.stdout)?.trim());
        let compressed = |ending: &str, program: &str, options: &[&str]| -> Result<PathBuf, Failure> {
            let path = self.made().join(format!("{name}.{ending}"));
            if !path.exists() {
                let new = path.with_extension("new");
                run(Command::new(program)
                    .args(options)
                    .stdin(File::open(&tar)?)
                    .stdout(File::create(&new)?))?;
                fs::rename(new, &path)?;
            }
            Ok(path)
        };
        Ok(Layer {
            name: name.into(),
            gzip: compressed("tar.gz", "gzip", &["-6", "-n", "-c"])?,
            zstd: compressed("tar.zst", "zstd", &["-3", "-q", "-c"])?,
            tar,
        })
    }

    /// Serves a file from memory, so that the origin's disk is not measured.
    pub(crate) fn serve(&self, at: &str, file: &Path) -> Result<(), Failure> {
        let mut copy = File::from(memfd_create("tarblk-peers", MemfdFlags::CLOEXEC)?);
        io::copy(&mut File::open(file)?, &mut copy)?;
        Ok(self.origin.serve_open_file(at, copy)?)
    }

    pub(crate) fn layer(&self, name: &str) -> Result<&Layer, Failure> {
        let found = self.layers.iter().find(|layer| layer.name == name);
        found.ok_or_else(|| format!("there is no layer {name}").into())
    }

    /// An empty directory, removed when it is dropped.
    pub(crate) fn directory(&self) -> Result<tempfile::TempDir, Failure> {
        Ok(tempfile::tempdir_in(self.scratch.path())?)
    }

    /// The directory on which roots appear.
    pub(crate) fn root(&self) -> Result<PathBuf, Failure> {
        let root = self.scratch.path().join("root");
        if fs::read_dir(&root)?.next().is_some() {
            return Err(format!("{} is not empty: a run before left something", root.display()).into());
        }
        Ok(root)
    }
}

/// Nothing dirty, nothing cached but the programs that all the ways need.
pub(crate) fn drop_caches() -> Result<(), Failure> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3")?;
    for program in ["tar", "chroot", "mount", "curl", "sh", env!("CARGO_BIN_EXE_tarblk")] {
        // One that is missing is told when it is needed.
        let _ = Command::new(program)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
    Ok(())
}

/// The most memory, in bytes, that the processes together held whose command lines name `work`: the servers of a run.
pub(crate) fn memory_of(work: &Path) -> Result<u64, Failure> {
    let mut total = 0;
    for entry in fs::read_dir("/proc")? {
        let path = entry?.path();
        let Ok(line) = fs::read(path.join("cmdline")) else {
            continue;
        };
        if !String::from_utf8_lossy(&line).contains(&*work.to_string_lossy()) {
            continue;
        }
        let status = fs::read_to_string(path.join("status")).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = peak.and_then(|text| text.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
        total += kib.unwrap_or(0) * 1024;
    }
    Ok(total)
}

/// Runs a program to its successful end; what it says on standard error becomes the failure's text.
pub(crate) fn run(command: &mut Command) -> Result<(), Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|why| format!("{program}: {why}; tools/peers installs the neighbours"))?
        .wait_with_output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program}: {}: {}", output.status, said.trim()).into())
}

/// The end of what a server said, on one line.
pub(crate) fn last_words(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let words: Vec<_> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    words[words.len().saturating_sub(3)..].join("; ")
}

/// Fetches a file over the link, as a start does that needs it first.
pub(crate) fn download(url: &str, to: &Path) -> Result<(), Failure> {
    run(Command::new("curl").args(["-fsS", "-o"]).arg(to).arg(url))
}
