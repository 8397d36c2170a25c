//! The usual way: download all of it, and unpack it as it comes.

use std::path::Path;
use std::process::Command;

use super::stage::{Layer, Stage, run};
use super::{Failure, Ready, System, Workload};

/// Download and untar, for each form.
pub(crate) fn systems() -> Vec<Box<dyn System>> {
    let form = |name, ending, option| -> Box<dyn System> { Box::new(Unpack { name, ending, option }) };
    vec![
        form("download + untar, tar", "tar", ""),
        form("download + untar, gzip", "tar.gz", "--gzip"),
        form("download + untar, zstd", "tar.zst", "--zstd"),
    ]
}

struct Unpack {
    name: &'static str,
    ending: &'static str,
    option: &'static str,
}

impl System for Unpack {
    fn name(&self) -> &'static str {
        self.name
    }

    fn needs(&self) -> &'static str {
        "nothing"
    }

    fn publish(&mut self, _: &Stage, _: &Layer) -> Result<(), Failure> {
        Ok(())
    }

    fn ready(&self, stage: &Stage, workload: &Workload, work: &Path) -> Result<Box<dyn Ready>, Failure> {
        let layer = stage.layer(workload.layer)?;
        let url = stage.origin.url(&format!("/{}.{}", layer.name, self.ending));
        let into = work.join("unpacked");
        std::fs::create_dir(&into)?;
        let script = format!(
            "set -o pipefail; curl -fsS '{url}' | tar -x {} -C '{}'",
            self.option,
            into.display()
        );
        Ok(Box::new(Unpacking { script, into }))
    }
}

struct Unpacking {
    script: String,
    into: std::path::PathBuf,
}

impl Ready for Unpacking {
    fn start(&mut self, root: &Path) -> Result<(), Failure> {
        run(Command::new("bash").args(["-c", &self.script]))?;
        run(Command::new("mount").arg("--bind").arg(&self.into).arg(root))
    }

    fn stop(&mut self, root: &Path) {
        let _ = run(Command::new("umount").arg(root));
    }
}
