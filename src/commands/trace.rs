//! `tarblk trace`: what was read of a device while it started. In: a device, or the last one that there was. Out: a table of its files,
//! JSON, or a page with a timeline.

mod report;

use std::fs;

use anyhow::Context as _;
use serde::Serialize;

use super::Session;
use super::attach::states;
use super::cli::TraceArgs;
use super::layer::cache_dir;
use super::output::{Table, print, println};
use crate::device::inventory;
use crate::device::service;
use crate::device::state::State;
use crate::device::trace::{MAX_TRACE_BYTES, Trace, TracedFile, TracedRead};
use crate::excerpt;
use crate::open::Profiles;
use crate::profile::ReadFrom;
use crate::quantity::{show_count, show_size, show_time};

/// `tarblk trace`.
pub(super) fn trace(args: &TraceArgs, session: Session) -> anyhow::Result<()> {
    let trace = match &args.device {
        Some(device) => service::trace(&states(), &inventory::find(&states(), device)?)?,
        None => last(args)?,
    };
    if let Some(path) = &args.report {
        let page = report::html(&trace);
        fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
        session.talk.note(format_args!("the report is in {}", path.display()));
        if !args.json {
            return Ok(());
        }
    }
    if args.json {
        return println(serde_json::to_string_pretty(&TraceReport::of(&trace))?);
    }
    print(table(&trace, args.all))?;
    for line in summary(&trace) {
        println(line)?;
    }
    Ok(())
}

/// The start that began last: of what is attached, or of the device whose trace was kept.
fn last(args: &TraceArgs) -> anyhow::Result<Trace> {
    let dir = states();
    let cache = args.cache.clone().unwrap_or_else(cache_dir);
    let kept = Profiles::new(&cache, None).last_trace(MAX_TRACE_BYTES);
    let kept = kept.and_then(|bytes| Trace::parse(&bytes));
    let after = kept.as_ref().map_or(0, |kept| kept.instance);
    let (mut all, _) = dir.list()?;
    all.sort_by_key(|state: &State| std::cmp::Reverse(state.instance));
    // A device that was attached and never read has no start yet.
    let served = all
        .iter()
        .filter(|state| state.instance > after)
        .find_map(|state| service::trace(&dir, state).ok().filter(|trace| !trace.reads.is_empty()));
    let none = || {
        format!(
            "no start is kept in {}, and nothing that is attached was read",
            cache.display()
        )
    };
    served.or(kept).with_context(none)
}

/// What was read of one file.
#[derive(Clone, Debug, Default, Serialize)]
struct FileSum {
    /// Its path.
    path: String,
    /// The layer that holds it, counted from 1, the lowest.
    layer: u32,
    /// How many bytes it has.
    size: u64,
    /// When it was first asked for, in microseconds since the first read.
    first_us: u64,
    /// How often it was read.
    reads: u64,
    /// Bytes that came from memory, fetched ahead or read before.
    memory: u64,
    /// Bytes that came from the disk cache or a local layer.
    disk: u64,
    /// Bytes that a read waited for the layer's server for.
    origin: u64,
    /// Bytes that a read waited for which another device of the machine had asked for.
    peer: u64,
    /// How long reads waited, all together, in microseconds.
    waited_us: u64,
    /// The longest wait of one read, in microseconds.
    longest_wait_us: u64,
}

impl FileSum {
    fn of(file: &TracedFile) -> Self {
        Self {
            path: file.path.clone(),
            layer: file.layer + 1,
            size: file.size,
            first_us: u64::MAX,
            ..Self::default()
        }
    }

    fn add(&mut self, read: &TracedRead) {
        self.reads += 1;
        self.first_us = self.first_us.min(read.at_us);
        *match read.from {
            ReadFrom::Memory => &mut self.memory,
            ReadFrom::Disk => &mut self.disk,
            ReadFrom::Origin => &mut self.origin,
            ReadFrom::Peer => &mut self.peer,
        } += read.bytes;
        let waited = read.waited_us.unwrap_or(0);
        self.waited_us += waited;
        self.longest_wait_us = self.longest_wait_us.max(waited);
    }

    const fn bytes(&self) -> u64 {
        self.memory + self.disk + self.origin + self.peer
    }
}

/// The files of a trace, in the order of their first reads, with what was read of each.
fn sums(trace: &Trace) -> Vec<FileSum> {
    let mut sums: Vec<FileSum> = trace.files.iter().map(FileSum::of).collect();
    for read in &trace.reads {
        let file = read.file.and_then(|file| usize::try_from(file).ok());
        if let Some(sum) = file.and_then(|file| sums.get_mut(file)) {
            sum.add(read);
        }
    }
    sums
}

/// What `--json` says.
#[derive(Debug, Serialize)]
struct TraceReport<'a> {
    /// The device's name.
    name: &'a str,
    /// The layer or image, as it was named.
    source: &'a str,
    /// Whether the start is over.
    is_over: bool,
    /// From the first read to the end of the last, in microseconds.
    lasted_us: u64,
    files: Vec<FileSum>,
    reads: &'a [TracedRead],
    left_out: u64,
}

impl<'a> TraceReport<'a> {
    fn of(trace: &'a Trace) -> Self {
        Self {
            name: &trace.name,
            source: &trace.source,
            is_over: trace.is_over,
            lasted_us: trace.lasted_us(),
            files: sums(trace),
            reads: &trace.reads,
            left_out: trace.left_out,
        }
    }
}

fn micros(us: u64) -> String {
    if us == 0 {
        return "0".to_owned();
    }
    show_time(std::time::Duration::from_micros(us))
}

/// So many files are in the table unless all are wanted.
const MOST_ROWS: usize = 40;

/// The files that were waited for the longest, or all of them, in the order of their first reads.
fn table(trace: &Trace, all: bool) -> Table {
    let mut sums = sums(trace);
    if !all && sums.len() > MOST_ROWS {
        sums.sort_by_key(|sum| std::cmp::Reverse((sum.waited_us, sum.bytes())));
        sums.truncate(MOST_ROWS);
        sums.sort_by_key(|sum| sum.first_us);
    }
    let mut table = Table::new(&[
        ">AT", ">READS", ">READ", ">MEMORY", ">DISK", ">ORIGIN", ">PEER", ">WAITED", "FILE",
    ]);
    let size = |bytes| if bytes == 0 { "-".to_owned() } else { show_size(bytes) };
    for sum in sums {
        table.row([
            micros(sum.first_us),
            show_count(sum.reads),
            show_size(sum.bytes()),
            size(sum.memory),
            size(sum.disk),
            size(sum.origin),
            size(sum.peer),
            if sum.waited_us == 0 {
                "-".to_owned()
            } else {
                micros(sum.waited_us)
            },
            excerpt::of_line(&sum.path),
        ]);
    }
    table
}

/// All of it in a few sentences.
fn summary(trace: &Trace) -> Vec<String> {
    let sum = |from: ReadFrom| {
        let of = trace.reads.iter().filter(|read| read.from == from);
        let bytes: u64 = of.clone().map(|read| read.bytes).sum();
        let waited: u64 = of.filter_map(|read| read.waited_us).sum();
        (show_size(bytes), micros(waited))
    };
    let shown = trace.file_count().min(u64::try_from(MOST_ROWS).unwrap_or(u64::MAX));
    let of_files = if shown < trace.file_count() {
        format!(", of which {shown} were waited for the longest (--all shows all)")
    } else {
        String::new()
    };
    let mut lines = vec![format!(
        "{}: {} in {} reads of {} files{of_files}, in {}{}",
        excerpt::of_line(&trace.source),
        show_size(trace.reads.iter().map(|read| read.bytes).sum()),
        show_count(trace.reads.len().try_into().unwrap_or(u64::MAX)),
        show_count(trace.file_count()),
        micros(trace.lasted_us()),
        if trace.is_over { "" } else { " until now" },
    )];
    let (memory, _) = sum(ReadFrom::Memory);
    let (disk, disk_waited) = sum(ReadFrom::Disk);
    let (origin, origin_waited) = sum(ReadFrom::Origin);
    lines.push(format!(
        "from memory {memory}; from disk {disk}, waited {disk_waited}; from the origin {origin}, waited {origin_waited}"
    ));
    let (peer, peer_waited) = sum(ReadFrom::Peer);
    if trace.reads.iter().any(|read| read.from == ReadFrom::Peer) {
        lines.push(format!(
            "from what other devices had asked for {peer}, waited {peer_waited}"
        ));
    }
    if trace.left_out > 0 {
        lines.push(format!("{} more reads were left out", show_count(trace.left_out)));
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn sample() -> Trace {
        let read = |at_us, file, bytes, from, waited_us| TracedRead {
            at_us,
            file,
            layer: 0,
            tar_offset: 0,
            bytes,
            from,
            waited_us,
        };
        let file = |path: &str| TracedFile {
            path: path.to_owned(),
            layer: 0,
            tar_offset: 512,
            size: 8192,
        };
        Trace {
            name: "loop0".to_owned(),
            source: "app.tar".to_owned(),
            instance: 1,
            is_over: true,
            files: vec![file("/bin/app"), file("/lib/<b>&x")],
            reads: vec![
                read(0, Some(0), 4096, ReadFrom::Origin, Some(21_000)),
                read(21_500, Some(1), 8192, ReadFrom::Memory, Some(0)),
                read(22_000, Some(0), 4096, ReadFrom::Disk, Some(100)),
                read(23_000, None, 512, ReadFrom::Disk, None),
            ],
            left_out: 0,
        }
    }

    #[test]
    fn each_file_has_a_line() {
        let shown = table(&sample(), false).to_string();
        assert_eq!(
            shown,
            "     AT  READS   READ  MEMORY   DISK  ORIGIN  PEER   WAITED  FILE\n\
             \x20     0      2  8 KiB       -  4 KiB   4 KiB     -  21.1 ms  /bin/app\n\
             21.5 ms      1  8 KiB   8 KiB      -       -     -        -  /lib/<b>&x\n"
        );
        assert_eq!(
            summary(&sample()),
            [
                "app.tar: 16.5 KiB in 4 reads of 2 files, in 23.0 ms",
                "from memory 8 KiB; from disk 4.5 KiB, waited 100 µs; from the origin 4 KiB, waited 21.0 ms",
            ]
        );
    }
}
