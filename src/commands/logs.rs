//! `tarblk logs`: what a device's daemon has to say. In: a device or where it is mounted. Out: its log, to the end or as it
//! grows.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek as _};
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use anyhow::Context as _;

use super::attach::states;
use super::cli::LogsArgs;
use super::logging::older;
use super::output::write_out;
use crate::device::inventory;
use crate::device::state::State;

/// How often a log that is followed is looked at again.
const GLANCE: Duration = Duration::from_millis(200);

/// `tarblk logs`.
pub(super) fn logs(args: &LogsArgs) -> anyhow::Result<()> {
    let state = inventory::find(&states(), &args.device)?;
    let path = state
        .log
        .clone()
        .with_context(|| format!("{} has no log", state.device.display()))?;
    let file = File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut log = BufReader::new(file);
    // What did not fit into it any more.
    let older = File::open(older(&path)).ok();
    match (args.lines, older) {
        (Some(most), Some(older)) => last_lines(&mut BufReader::new(older).chain(&mut log), most)?,
        (Some(most), None) => last_lines(&mut log, most)?,
        (None, Some(mut older)) => copy(&mut older).and_then(|()| copy(&mut log))?,
        (None, None) => copy(&mut log)?,
    }
    while args.follow && goes_on(&log, &state)? {
        std::thread::sleep(GLANCE);
        // It was full, and begins again.
        if log.stream_position()? > log.get_ref().metadata()?.len() {
            log.rewind()?;
        }
        copy(&mut log)?;
    }
    Ok(())
}

/// Whether more may come of the device: it is there, and so is the log. What was written before it went is printed before this is
/// false for good.
fn goes_on(log: &BufReader<File>, state: &State) -> anyhow::Result<bool> {
    let is_there = states().read(&state.name).is_ok_and(|now| now.since == state.since);
    Ok(is_there && log.get_ref().metadata()?.nlink() > 0)
}

/// Prints what is there from here on.
fn copy(log: &mut impl Read) -> anyhow::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        let len = log.read(&mut buffer).context("cannot read the log")?;
        if len == 0 {
            return Ok(());
        }
        print(&mut buffer[..len])?;
    }
}

/// Prints the last `most` lines.
fn last_lines(log: &mut impl BufRead, most: usize) -> anyhow::Result<()> {
    let mut last = VecDeque::new();
    loop {
        let mut line = Vec::new();
        if log.read_until(b'\n', &mut line).context("cannot read the log")? == 0 {
            break;
        }
        last.push_back(line);
        if last.len() > most {
            last.pop_front();
        }
    }
    last.iter_mut().try_for_each(|line| print(line))
}

/// Prints a piece of a log. Names from layers and servers are in it, and must not move the cursor or colour the screen.
fn print(text: &mut [u8]) -> anyhow::Result<()> {
    for byte in text.iter_mut() {
        if byte.is_ascii_control() && !matches!(byte, b'\n' | b'\t') {
            *byte = b'?';
        }
    }
    write_out(|out| out.write_all(text))
}
