//! `tarblk` run as a person would run it, with everything it makes below one directory, and nothing of it left at the end.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::TARBLK;

/// A cache of its own and directories to mount on. Whatever is still mounted when it is dropped is unmounted.
#[derive(Debug)]
pub(crate) struct Session {
    scratch: tempfile::TempDir,
    mounted: Vec<PathBuf>,
    backend: &'static str,
}

impl Session {
    pub(crate) fn new(backend: &'static str) -> Self {
        Self {
            scratch: super::scratch("session-"),
            mounted: Vec::new(),
            backend,
        }
    }

    /// One below `dir`, for a guest, where the usual places cannot be written.
    pub(crate) fn below(dir: &Path, backend: &'static str) -> Self {
        let scratch = tempfile::Builder::new().prefix("session-").tempdir_in(dir).unwrap();
        Self {
            scratch,
            mounted: Vec::new(),
            backend,
        }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.scratch.path()
    }

    /// Runs a command to its end.
    pub(crate) fn run<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Output {
        Command::new(TARBLK)
            .args(arguments)
            .env("TARBLK_CACHE", self.dir().join("cache"))
            .env("TARBLK_STATE_DIR", self.dir().join("states"))
            .env("TARBLK_SERVICE_IDLE", "0")
            .env_remove("RUST_LOG")
            .env("NO_COLOR", "1")
            .output()
            .unwrap()
    }

    /// Runs a command that has to succeed; its standard output.
    pub(crate) fn succeed<A: AsRef<OsStr> + std::fmt::Debug>(&self, arguments: &[A]) -> String {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "tarblk {arguments:?}: {}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Mounts a layer; where it then is.
    pub(crate) fn mount(&mut self, source: &OsStr) -> PathBuf {
        self.mount_with(source, &[])
    }

    /// Mounts a layer or an image with options.
    pub(crate) fn mount_with(&mut self, source: impl AsRef<OsStr>, options: &[OsString]) -> PathBuf {
        let source = source.as_ref();
        match self.try_mount(source, options) {
            Ok(dir) => dir,
            Err(output) => panic!(
                "tarblk mount {} {options:?}: {}\n{}",
                source.display(),
                output.status,
                String::from_utf8_lossy(&output.stderr)
            ),
        }
    }

    /// The same, where it may also fail.
    pub(crate) fn try_mount(&mut self, source: impl AsRef<OsStr>, options: &[OsString]) -> Result<PathBuf, Output> {
        let dir = self.dir().join(format!("mount-{}", self.mounted.len()));
        fs::create_dir_all(&dir).unwrap();
        let mut arguments = vec![OsStr::new("mount"), source.as_ref(), dir.as_os_str()];
        arguments.extend([OsStr::new("--backend"), OsStr::new(self.backend)]);
        arguments.extend(options.iter().map(OsString::as_os_str));
        let output = self.run(&arguments);
        if !output.status.success() {
            return Err(output);
        }
        self.mounted.push(dir.clone());
        Ok(dir)
    }

    /// Forgets everything that was kept: the next mount is the first.
    pub(crate) fn empty_cache(&self) {
        let _ = fs::remove_dir_all(self.dir().join("cache"));
    }

    /// Unmounts what [`Session::mount`] mounted last.
    pub(crate) fn umount(&mut self) {
        let dir = self.mounted.pop().expect("something is mounted");
        self.succeed(&[OsStr::new("umount"), dir.as_os_str()]);
        assert!(!is_mounted(&dir), "{} is still mounted", dir.display());
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for dir in self.mounted.iter().rev() {
            let _ = self.run(&[OsStr::new("umount"), dir.as_os_str()]);
            if is_mounted(dir) {
                let _ = Command::new("umount").arg("-l").arg(dir).output();
            }
        }
    }
}

fn mounts() -> String {
    String::from_utf8_lossy(&fs::read("/proc/self/mounts").unwrap()).into_owned()
}

/// The device under a mounted directory.
pub(crate) fn device(dir: &Path) -> String {
    let dir = dir.to_str().unwrap();
    mounts()
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ');
            let device = fields.next()?;
            (fields.next()? == dir).then(|| device.to_owned())
        })
        .unwrap_or_else(|| panic!("{dir} is not mounted"))
}

pub(crate) fn is_mounted(dir: &Path) -> bool {
    let dir = dir.to_str().unwrap();
    mounts().lines().any(|line| line.split(' ').nth(1) == Some(dir))
}

/// What a device could leave behind on this machine: processes, mounts, loop devices, ublk devices, state files. Only what
/// belongs to `marker`, a path that its command lines or backing files contain, so that others may work beside it.
pub(crate) fn leftovers(marker: &Path) -> Vec<String> {
    // The service ends a moment after its last device.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let found = leftovers_now(marker);
        if found.is_empty() || std::time::Instant::now() > deadline {
            return found;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

fn leftovers_now(marker: &Path) -> Vec<String> {
    let marker = marker.to_str().unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let pid = entry.file_name();
        if !pid.to_string_lossy().bytes().all(|byte| byte.is_ascii_digit()) || entry.path() == Path::new("/proc/self") {
            continue;
        }
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        let is_ours = command.starts_with(TARBLK.as_bytes()) || command.starts_with(b"tarblk");
        let text = [String::from_utf8_lossy(&command), String::from_utf8_lossy(&environment)].concat();
        if is_ours && text.contains(marker) {
            found.push(format!(
                "process {}: {}",
                pid.display(),
                String::from_utf8_lossy(&command).replace('\0', " ")
            ));
        }
    }
    found.extend(
        mounts()
            .lines()
            .filter(|line| line.contains(marker))
            .map(|line| format!("mount {line}")),
    );
    for entry in fs::read_dir("/sys/block").unwrap().flatten() {
        if let Ok(file) = fs::read_to_string(entry.path().join("loop/backing_file"))
            && file.contains(marker)
        {
            found.push(format!("{} over {}", entry.file_name().display(), file.trim()));
        }
    }
    for entry in fs::read_dir(Path::new(marker).join("states"))
        .into_iter()
        .flatten()
        .flatten()
    {
        found.push(format!("state file {}", entry.path().display()));
    }
    found
}
