//! tarblk in each of its forms.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::stage::{Layer, Stage, run};
use super::{Failure, Ready, System, Workload, execute};

/// The forms: what is served, whether there is an index, what is kept of an earlier start.
pub(crate) fn systems() -> Vec<Box<dyn System>> {
    let form = |name, needs, ending, index, kept| -> Box<dyn System> {
        Box::new(Tarblk {
            name,
            needs,
            ending,
            index,
            kept,
            full: Vec::new(),
        })
    };
    vec![
        form("tarblk, tar", "nothing", "tar", false, Kept::Nothing),
        form("tarblk, tar, index", "an index", "tar", true, Kept::Nothing),
        form("tarblk, gzip, index", "an index", "tar.gz", true, Kept::Nothing),
        form("tarblk, zstd, index", "an index", "tar.zst", true, Kept::Nothing),
        form(
            "tarblk, gzip, all cached",
            "an earlier start",
            "tar.gz",
            true,
            Kept::All,
        ),
    ]
}

/// What is in the cache before the start.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kept {
    Nothing,
    /// What one start of the same command read: the profile, and no byte of the layer or its index.
    Profile,
    /// The whole layer.
    All,
}

struct Tarblk {
    name: &'static str,
    needs: &'static str,
    ending: &'static str,
    index: bool,
    kept: Kept,
    /// Full caches, by layer.
    full: Vec<(String, tempfile::TempDir)>,
}

impl Tarblk {
    fn url(&self, stage: &Stage, layer: &Layer) -> String {
        stage.origin.url(&format!("/{}.{}", layer.name, self.ending))
    }

    fn mount(&self, stage: &Stage, layer: &Layer, cache: &Path, states: &Path) -> Mount {
        let url = self.url(stage, layer);
        Mount {
            index: self.index.then(|| format!("{url}.tarblk")),
            url,
            cache: cache.into(),
            states: states.into(),
        }
    }
}

impl System for Tarblk {
    fn name(&self) -> &'static str {
        self.name
    }

    fn needs(&self) -> &'static str {
        self.needs
    }

    fn publish(&mut self, stage: &Stage, layer: &Layer) -> Result<(), Failure> {
        let blob = match self.ending {
            "tar" => &layer.tar,
            "tar.gz" => &layer.gzip,
            _ => &layer.zstd,
        };
        if self.index {
            let work = stage.directory()?;
            let index = work.path().join("index");
            let mut make = tarblk(work.path());
            run(make.args(["index", "--quiet", "-o"]).arg(&index).arg(blob))?;
            stage.serve(&format!("/{}.{}.tarblk", layer.name, self.ending), &index)?;
        }
        if self.kept == Kept::All {
            let (cache, root) = (stage.directory()?, stage.root()?);
            let work = stage.directory()?;
            let mut mount = self.mount(stage, layer, cache.path(), work.path());
            mount.start(&root)?;
            let read = run(Command::new("sh")
                .args(["-c", "find \"$0\" -xdev -type f -exec cat {} + >/dev/null"])
                .arg(&root));
            mount.stop(&root);
            read?;
            self.full.push((layer.name.clone(), cache));
        }
        Ok(())
    }

    fn ready(&self, stage: &Stage, workload: &Workload, work: &Path) -> Result<Box<dyn Ready>, Failure> {
        let layer = stage.layer(workload.layer)?;
        let full = self.full.iter().find(|(name, _)| *name == layer.name);
        let cache = full.map_or_else(|| work.join("cache"), |(_, cache)| cache.path().into());
        let mut mount = self.mount(stage, layer, &cache, &work.join("states"));
        if self.kept == Kept::Profile {
            let root = stage.root()?;
            let ran = mount.start(&root).and_then(|()| execute(&root, workload, || Ok(())));
            mount.stop(&root);
            ran?;
            for entry in fs::read_dir(&cache)? {
                let path = entry?.path();
                if path.is_dir() && !path.ends_with("profiles") {
                    fs::remove_dir_all(&path)?;
                }
            }
        }
        Ok(Box::new(mount))
    }
}

struct Mount {
    url: String,
    index: Option<String>,
    cache: PathBuf,
    states: PathBuf,
}

/// The command, with a service of its own that ends with its last device.
fn tarblk(states: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tarblk"));
    command
        .env_remove("TARBLK_CACHE")
        .env("TARBLK_STATE_DIR", states)
        .env("TARBLK_SERVICE_IDLE", "0");
    command
}

impl Ready for Mount {
    fn start(&mut self, root: &Path) -> Result<(), Failure> {
        let mut mount = tarblk(&self.states);
        mount.args(["mount", "--quiet", "--cache"]).arg(&self.cache);
        if let Some(index) = &self.index {
            mount.args(["--index", index]);
        }
        run(mount.arg(&self.url).arg(root).stdout(Stdio::null()))
    }

    fn stop(&mut self, root: &Path) {
        let _ = run(tarblk(&self.states).arg("umount").arg(root).stdout(Stdio::null()));
    }
}
