//! `tarblk demo`: what tarblk does, shown on a layer of this machine's own files.
//!
//! Every step prints the command line it runs and what that printed, nothing is staged. All of it happens in a directory of
//! its own and on loopback; the directory, mounts and devices are gone when the demo ends, however it ends. Only the report
//! stays.

mod layer;

use std::ffi::OsString;
use std::fs;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser as _;

use super::Session;
use super::bench::{default_scratch, measure, options, this_program, write_report};
use super::cli::{self, Cli, DemoArgs};
use super::output::println;
use crate::bench::origin::{Link, Origin};
use crate::bench::{Outcome, Row, RowOutcome};
use crate::interrupt::Interrupt;
use crate::quantity::{show_count, show_size, show_time};

/// The link of the demo: far away, and as wide as a good office line.
const RTT: Duration = Duration::from_millis(20);
const RATE: u64 = 200_000_000 / 8;

/// How a line of output is set off from the words around it.
const INDENT: &str = "    ";

/// Longer outputs are cut here, and said to be.
const MAX_LINES: usize = 24;

/// `tarblk demo`.
pub(super) fn run(args: &DemoArgs, session: Session) -> anyhow::Result<()> {
    let began = Instant::now();
    let report = std::path::absolute(args.report.as_deref().unwrap_or_else(|| Path::new("tarblk-demo.html")))?;
    let interrupt = Interrupt::catch().context("cannot catch signals")?;
    let stage = Stage::new(session, interrupt)?;
    println(
        "This shows tarblk on a layer made of this machine's own files: no network but loopback, nothing left behind.",
    )?;

    let made = stage.make_layer()?;
    let saw = stage.show_headers()?;
    if !rustix::process::geteuid().is_root() {
        anyhow::bail!("the rest of the demo makes block devices and mounts them, which needs root: sudo tarblk demo");
    }
    let mounted = stage.show_mount(&made)?;
    stage.show_local()?;
    let summary = stage.show_bench(&made, &report)?;

    stage.say("What this showed")?;
    println(format_args!("{INDENT}{saw}"))?;
    println(format_args!("{INDENT}{mounted}"))?;
    for line in summary {
        println(format_args!("{INDENT}{line}"))?;
    }
    println(format_args!(
        "\nThe report with charts: {}  ({} in all)",
        report.display(),
        show_time(began.elapsed())
    ))
}

/// Where the demo happens.
struct Stage {
    dir: tempfile::TempDir,
    session: Session,
    interrupt: Interrupt,
    step: std::cell::Cell<u32>,
}

impl Stage {
    fn new(session: Session, interrupt: Interrupt) -> anyhow::Result<Self> {
        let scratch = default_scratch();
        let dir = tempfile::Builder::new()
            .prefix("tarblk-demo-")
            .tempdir_in(&scratch)
            .with_context(|| format!("cannot make a directory in {}", scratch.display()))?;
        for name in ["bin", "mnt"] {
            fs::create_dir(dir.path().join(name))?;
        }
        // The command lines that are shown say `tarblk`, wherever this program is.
        std::os::unix::fs::symlink(this_program()?, dir.path().join("bin/tarblk"))?;
        Ok(Self {
            dir,
            session,
            interrupt,
            step: std::cell::Cell::new(0),
        })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Begins a step.
    fn say(&self, what: &str) -> anyhow::Result<()> {
        self.interrupt.check()?;
        self.step.set(self.step.get() + 1);
        println(format_args!("\n{}. {what}", self.step.get()))
    }

    /// Shows a command line, runs it, shows its output. It must succeed.
    fn show(&self, line: &str) -> anyhow::Result<String> {
        let (good, output) = self.try_show(line)?;
        anyhow::ensure!(good, "`{line}` failed, which this demo did not expect");
        Ok(output)
    }

    /// The same for one that may fail; says whether it succeeded.
    fn try_show(&self, line: &str) -> anyhow::Result<(bool, String)> {
        println(format_args!("{INDENT}$ {line}"))?;
        let (good, output) = self.shell(line)?;
        let lines: Vec<&str> = output.lines().collect();
        for shown in lines.iter().take(MAX_LINES) {
            println(format_args!("{INDENT}{shown}"))?;
        }
        if lines.len() > MAX_LINES {
            println(format_args!("{INDENT}… {} more lines", lines.len() - MAX_LINES))?;
        }
        Ok((good, output))
    }

    /// Runs a command line; its outputs together.
    fn shell(&self, line: &str) -> anyhow::Result<(bool, String)> {
        let path = format!(
            "{}:{}",
            self.path("bin").display(),
            std::env::var("PATH").unwrap_or_default()
        );
        let mut both = tempfile::tempfile_in(self.dir.path())?;
        let mut child = Command::new("sh")
            .args(["-c", line])
            .current_dir(self.dir.path())
            .env("PATH", path)
            .env("TARBLK_CACHE", self.path("cache"))
            .env("TMPDIR", self.dir.path())
            .stdin(Stdio::null())
            .stdout(both.try_clone()?)
            .stderr(both.try_clone()?)
            .spawn()
            .context("cannot run sh")?;
        let status = self.wait(&mut child)?;
        let mut output = Vec::new();
        both.seek(SeekFrom::Start(0))?;
        both.read_to_end(&mut output)?;
        Ok((status.success(), String::from_utf8_lossy(&output).into_owned()))
    }

    /// Waits for a child; an interrupt ends it first.
    fn wait(&self, child: &mut Child) -> anyhow::Result<std::process::ExitStatus> {
        loop {
            if let Some(status) = child.try_wait()? {
                return Ok(status);
            }
            if let Err(interrupted) = self.interrupt.sleep(Duration::from_millis(5)) {
                let _ = rustix::process::kill_process(
                    rustix::process::Pid::from_child(child),
                    rustix::process::Signal::TERM,
                );
                child.wait()?;
                return Err(interrupted.into());
            }
        }
    }

    fn make_layer(&self) -> anyhow::Result<layer::Made> {
        self.say("A layer that was not prepared: programs, libraries and documents of this machine, as a plain tar")?;
        let spinner = self.session.talk.spinner("collecting files");
        let made = layer::make(&self.path("layer.tar"), &self.interrupt);
        spinner.finish_and_clear();
        let made = made?;
        let what = made.programs.join(", ");
        println(format_args!(
            "{INDENT}layer.tar: {} of {} files, with {what}",
            show_size(made.bytes),
            show_count(made.files)
        ))?;
        Ok(made)
    }

    fn show_headers(&self) -> anyhow::Result<String> {
        self.say("Its headers say where every byte lies; that is all tarblk needs to know")?;
        self.show("tarblk index layer.tar -o layer.tarblk")?;
        self.show("tarblk ls layer.tarblk | tail -n 4")?;
        self.say("From them it computes an ext4 filesystem. Written out, with the data filled in, other programs can check it")?;
        self.show("tarblk image layer.tar -o layer.ext4")?;
        if which("e2fsck") {
            self.show("e2fsck -fn layer.ext4 2>&1 | tail -n 1")?;
        }
        let (tar, index) = (
            fs::metadata(self.path("layer.tar"))?.len(),
            fs::metadata(self.path("layer.tarblk"))?.len(),
        );
        Ok(format!(
            "an index of {} describes a layer of {}, which stays as it is",
            show_size(index),
            show_size(tar)
        ))
    }

    fn show_mount(&self, made: &layer::Made) -> anyhow::Result<String> {
        self.say("Now the layer is on a server 20 ms away, behind 200 Mbit/s (simulated on loopback), and gets mounted from there")?;
        let origin = Origin::start().context("cannot start an HTTP origin on loopback")?;
        for name in ["layer.tar", "layer.tarblk"] {
            origin.serve_file(&format!("/{name}"), &self.path(name))?;
        }
        origin.set_link(Link {
            rtt: RTT,
            rate: Some(RATE),
        });
        let (url, index) = (origin.url("/layer.tar"), origin.url("/layer.tarblk"));
        let began = Instant::now();
        self.show(&format!("tarblk mount {url} mnt --index {index}"))?;
        let _unmount = Unmount(self);
        let took = began.elapsed();
        let bytes = origin.counters().bytes;
        println(format_args!(
            "{INDENT}That took {} and {}; the layer has {}.",
            show_time(took),
            show_size(bytes),
            show_size(made.bytes)
        ))?;
        self.show("findmnt -no SOURCE,FSTYPE,SIZE,OPTIONS mnt || grep tarblk /proc/mounts")?;
        self.say("A program starts in it, and brings what it touches")?;
        let began = Instant::now();
        self.show(&format!("chroot mnt {}", made.command))?;
        println(format_args!("{INDENT}That took {}.", show_time(began.elapsed())))?;
        self.show("tarblk ps")?;
        self.show("tarblk stats mnt")?;
        let sample = &made.sample;
        self.show(&format!(
            "cmp mnt{sample} {sample} && echo identical to the file of this machine"
        ))?;
        println(format_args!("{INDENT}While mounted it cannot be detached:"))?;
        let (good, _) = self.try_show("tarblk detach mnt")?;
        anyhow::ensure!(!good, "a mounted device was detached");
        self.show("tarblk umount mnt && tarblk ps")?;
        Ok(format!(
            "mounted from a server in {}, after {} of {}",
            show_time(took),
            show_size(bytes),
            show_size(made.bytes)
        ))
    }

    fn show_local(&self) -> anyhow::Result<()> {
        self.say("A local tar is attached the same way")?;
        let device = self.show("tarblk attach layer.tar")?;
        let device = device.lines().last().unwrap_or_default().trim().to_owned();
        let shown = self.show(&format!(
            "blockdev --getsize64 --getro {device} && tarblk detach {device}"
        ));
        if shown.is_err() {
            let _ = self.shell(&format!("tarblk detach {device}"));
        }
        shown.map(drop)
    }

    fn show_bench(&self, made: &layer::Made, report: &Path) -> anyhow::Result<Vec<String>> {
        self.say("How long until a program has run that is not there yet? Against download and untar, and download and mount")?;
        let words = format!(
            "tarblk bench layer.tar --rtt 20ms --rate 200mbit --runs 2 --report {}",
            report.display()
        );
        println(format_args!("{INDENT}$ {words} -- {}", made.command))?;
        // The same arguments through the same code; only the layer's name is spelled out, for this process is elsewhere.
        let layer = self.path("layer.tar");
        let args = ["tarblk", "bench", "--rtt=20ms", "--rate=200mbit", "--runs=2"].map(OsString::from);
        let scratch = [
            OsString::from("--scratch"),
            self.dir.path().into(),
            layer.into(),
            "--".into(),
        ];
        let command = made.words.iter().map(OsString::from);
        let cli = Cli::try_parse_from(args.into_iter().chain(scratch).chain(command))?;
        let Cli {
            command: cli::Command::Bench(args),
            ..
        } = cli
        else {
            anyhow::bail!("`bench` was not understood")
        };
        let mut outcome = measure(&options(&args)?, &self.interrupt, self.session)?;
        outcome.source = "layer.tar".into();
        write_report(report, &outcome)?;
        for line in outcome.to_string().lines() {
            println(format_args!("{INDENT}{line}"))?;
        }
        Ok(lessons(&outcome))
    }
}

/// What a benchmark's figures say, in sentences.
fn lessons(outcome: &Outcome) -> Vec<String> {
    let median = |wanted: Row| {
        outcome
            .rows
            .iter()
            .find(|row| row.row == wanted)
            .map(RowOutcome::median)
    };
    let mut lessons = Vec::new();
    if let (Some(ours), Some(theirs)) = (median(Row::Empty), median(Row::Untar)) {
        lessons.push(format!(
            "from nothing to the program's end: {} with tarblk, {} by download and untar",
            show_time(ours.total),
            show_time(theirs.total),
        ));
        lessons.push(format!(
            "by then {} had been fetched of {}; the program touches {}",
            show_size(ours.fetched_bytes),
            show_size(outcome.layer_bytes),
            show_size(outcome.touched.bytes),
        ));
    }
    if let Some(full) = median(Row::Full) {
        lessons.push(format!(
            "the second time, from the cache on disk: {}",
            show_time(full.total)
        ));
    }
    lessons
}

/// Unmounts what the demo mounted, if it still is.
struct Unmount<'a>(&'a Stage);

impl Drop for Unmount<'_> {
    fn drop(&mut self) {
        let program = self.0.path("bin/tarblk");
        let mut umount = Command::new(program);
        let _ = umount
            .arg("umount")
            .arg(self.0.path("mnt"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
    }
}

fn which(program: &str) -> bool {
    let dirs = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&dirs).any(|dir| dir.join(program).is_file())
}
