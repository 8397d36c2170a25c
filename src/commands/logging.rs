//! What is logged, and where. In: records of all rooms. Out: lines on standard error; of a daemon, whose standard error is a file,
//! no more than fits.
//!
//! `TARBLK_LOG_FORMAT=json` makes each line a JSON object (`time`, `level`, `target`, `message`), for programs that gather
//! logs. Levels are those of `-v` and `RUST_LOG`.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek as _, Write};
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use env_logger::{Builder, Env, Target};
use jiff::Timestamp;
use log::Record;
use serde::Serialize;

use super::cli::TalkArgs;
use super::output::without_errno;
use crate::excerpt;

/// A daemon's log is no longer, in bytes: then it becomes the older one, in whose place it comes. Together they hold at least as
/// much, and at most twice that and a record.
const MOST_BYTES: u64 = 4 << 20;

/// Sends the log to standard error: warnings, and more with `-v`.
pub(super) fn start(talk: TalkArgs) {
    let level = match (talk.quiet, talk.verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "tarblk=info,warn",
        (_, 2) => "tarblk=debug,info",
        _ => "trace",
    };
    let mut builder = Builder::from_env(Env::default().default_filter_or(level));
    if is_json() {
        builder.format(write_json);
    } else {
        builder.format(|out, record| {
            let level = record.level().as_str().to_ascii_lowercase();
            writeln!(
                out,
                "tarblk: {level}: {}",
                excerpt::of_line(&without_errno(&record.args().to_string()))
            )
        });
    }
    // A second logger (in a test) is no reason to fail.
    let _ = builder.try_init();
}

/// A daemon's log, on its standard error: with times, because it is read later.
pub(super) fn start_daemon() {
    let mut builder = Builder::from_env(Env::default().default_filter_or("tarblk=info,warn"));
    if is_json() {
        builder.format(write_json);
    } else {
        builder.format(|out, record| {
            let words = excerpt::of_line(&without_errno(&record.args().to_string()));
            writeln!(out, "[{} {:<5}] {words}", out.timestamp_millis(), record.level())
        });
    }
    if let Ok(file) = io::stderr().as_fd().try_clone_to_owned().map(File::from)
        && file.metadata().is_ok_and(|meta| meta.is_file())
    {
        let most = MOST_BYTES;
        builder.target(Target::Pipe(Box::new(BoundedLog { file, most })));
    }
    let _ = builder.try_init();
}

fn is_json() -> bool {
    std::env::var_os("TARBLK_LOG_FORMAT").is_some_and(|format| format == "json")
}

/// A record as programs read it.
#[derive(Serialize)]
struct JsonRecord<'a> {
    /// When, in UTC.
    time: String,
    level: String,
    /// The part of the program that says it.
    target: &'a str,
    message: String,
}

fn write_json(out: &mut impl Write, record: &Record<'_>) -> io::Result<()> {
    let now = Timestamp::try_from(SystemTime::now()).unwrap_or_default();
    let line = JsonRecord {
        time: now.strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string(),
        level: record.level().as_str().to_ascii_lowercase(),
        target: record.target(),
        message: excerpt::of_line(&without_errno(&record.args().to_string())),
    };
    serde_json::to_writer(&mut *out, &line)?;
    out.write_all(b"\n")
}

/// Where the older part of a log is.
pub(super) fn older(log: &Path) -> PathBuf {
    let mut name = log.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// A log in a file that was opened for appending. What it is called is asked when it matters: a daemon's log gets its name
/// when there is a device. Other writers of the file (a panic) need not know of it: the file stays the same, and is emptied.
struct BoundedLog {
    file: File,
    /// In bytes.
    most: u64,
}

impl BoundedLog {
    /// Copies what is there to the older log, and empties the file.
    fn turn(&mut self) -> io::Result<()> {
        let path = fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.file)))?;
        // Nothing is kept of a log that has no name any more.
        if fs::metadata(&path).is_ok() {
            let mut from = File::open(&path)?;
            let mut to = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW)
                .open(older(&path))?;
            io::copy(&mut from, &mut to)?;
        }
        self.file.set_len(0)?;
        self.file.rewind()
    }
}

impl Write for BoundedLog {
    /// Called once for each record.
    fn write(&mut self, record: &[u8]) -> io::Result<usize> {
        let len = self.file.metadata().map_or(0, |meta| meta.len());
        let is_full = len.saturating_add(u64::try_from(record.len()).unwrap_or(u64::MAX)) > self.most;
        // On a full disk the older log is lost before the newer one is.
        if is_full && len > 0 && self.turn().is_err() {
            self.file.set_len(0)?;
        }
        self.file.write_all(record)?;
        Ok(record.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded_and_loses_nothing_young() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("starting.log");
        let file = OpenOptions::new().append(true).create(true).open(&path).unwrap();
        let mut other = file.try_clone().unwrap();
        let mut log = BoundedLog { file, most: 1000 };
        for number in 0..30 {
            log.write_all(format!("record {number:03}\n").as_bytes()).unwrap();
        }
        // It gets its name while it is open.
        let named = dir.path().join("loop7.log");
        fs::rename(&path, &named).unwrap();
        for number in 30..1000 {
            log.write_all(format!("record {number:03}\n").as_bytes()).unwrap();
            if number % 100 == 0 {
                other.write_all(b"a word of another\n").unwrap();
            }
            let sizes = [&named, &older(&named)].map(|path| fs::metadata(path).map_or(0, |meta| meta.len()));
            assert!(sizes[0] <= 1000 && sizes[1] <= 1000 + 18, "{sizes:?}");
        }
        let text = [older(&named), named]
            .map(|path| fs::read_to_string(path).unwrap())
            .concat();
        let records: Vec<&str> = text.lines().filter(|line| line.starts_with("record")).collect();
        assert_eq!(records.last(), Some(&"record 999"));
        assert!(records.len() > 80, "{}", records.len());
        let first: usize = records[0].rsplit(' ').next().unwrap().parse().unwrap();
        assert_eq!(records.len(), 1000 - first, "none is missing in between");
    }

    #[test]
    fn records_for_programs_are_one_line_each() {
        let mut out = Vec::new();
        let message = format_args!("a \"word\"\nand an error (os error 2)");
        let record = Record::builder()
            .level(log::Level::Warn)
            .target("tarblk::x")
            .args(message)
            .build();
        write_json(&mut out, &record).unwrap();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(text.matches('\n').count(), 1);
        let read: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!((&read["level"], &read["target"]), (&"warn".into(), &"tarblk::x".into()));
        // What would move the cursor of a terminal is written out before it becomes JSON.
        assert_eq!(read["message"], "a \"word\"\\nand an error");
        assert!(read["time"].as_str().unwrap().ends_with('Z'));
    }
}
