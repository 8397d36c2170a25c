//! `tarblk ps` and `stats`: what is attached and what it has done.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::Value;

use super::Session;
use super::attach::states;
use super::cli::{PsArgs, StatsArgs};
use super::output::{Table, print, println, write_out};
use crate::device::daemon::DaemonStats;
use crate::device::registry::{self, Status};
use crate::device::state::State;
use crate::quantity::{show_count, show_size, show_time};

/// `tarblk ps`.
pub(super) fn ps(args: &PsArgs, session: Session) -> anyhow::Result<()> {
    let (listed, damaged) = registry::list(&states())?;
    for error in damaged {
        log::warn!("{error}");
    }
    if args.json {
        return println(serde_json::to_string_pretty(&listed)?);
    }
    if args.names {
        return write_out(|out| {
            for line in &listed {
                writeln!(out, "{}", line.state.device.display())?;
                for dir in &line.mounts {
                    writeln!(out, "{}", dir.display())?;
                }
            }
            Ok(())
        });
    }
    if listed.is_empty() {
        session.talk.note("nothing is attached");
        return Ok(());
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let mut table = Table::new(&[
        "DEVICE",
        "BACKEND",
        "STATUS",
        ">SIZE",
        ">UP",
        ">PID",
        "MOUNTED ON",
        "SOURCE",
        "LOG",
    ]);
    for line in &listed {
        let state = &line.state;
        let mounts: Vec<_> = line.mounts.iter().map(|path| path.display().to_string()).collect();
        table.row([
            state.device.display().to_string(),
            state.backend.to_string(),
            match line.status {
                Status::Serving => "serving".into(),
                Status::Dead => "dead".into(),
            },
            show_size(state.len),
            show_age(now.saturating_sub(state.since)),
            state.process.pid.to_string(),
            if mounts.is_empty() {
                "-".into()
            } else {
                mounts.join(", ")
            },
            state.source.clone(),
            state
                .log
                .as_ref()
                .map_or_else(|| "-".into(), |path| path.display().to_string()),
        ]);
    }
    print(table)
}

/// An age in its biggest unit.
fn show_age(secs: u64) -> String {
    match secs {
        0..60 => format!("{secs}s"),
        60..3600 => format!("{}m", secs / 60),
        3600..86_400 => format!("{}h", secs / 3600),
        _ => format!("{}d", secs / 86_400),
    }
}

/// What `stats --json` says.
#[derive(Debug, Serialize)]
struct Counted<'a> {
    state: &'a State,
    counters: &'a DaemonStats,
}

/// `tarblk stats`.
pub(super) fn stats(args: &StatsArgs, _: Session) -> anyhow::Result<()> {
    let (state, counters) = registry::stats(&states(), &args.device)?;
    if args.json {
        return println(serde_json::to_string_pretty(&Counted {
            state: &state,
            counters: &counters,
        })?);
    }
    let mut table = Table::plain();
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    let about = (state.device.display(), state.backend, show_size(state.len));
    row("device", format!("{} ({}), {}", about.0, about.1, about.2));
    row("source", state.source.clone());
    row("up", show_time(Duration::from_millis(counters.up_ms)));
    let (resident, pid) = (show_size(counters.resident_bytes), state.process.pid);
    row("memory", format!("{resident} resident, pid {pid}"));
    rows_of_device(&counters, &mut row);
    rows_of_fetcher(&counters.fetch, &mut row);
    print(table)
}

/// What the device counted.
fn rows_of_device(counters: &DaemonStats, row: &mut dyn FnMut(&str, String)) {
    let device = &counters.device;
    let reads = show_count(device.reads);
    row(
        "reads",
        format!("{reads}, {} failed, {} refused", device.errors, device.refused),
    );
    row("from metadata", show_size(device.bytes.metadata));
    // The device knows only that the fetcher had to be asked; where bytes were then, the fetcher knows.
    let from = |place: &str| number(counters.fetch.get("bytes").unwrap_or(&Value::Null), place);
    row("from memory", show_size(from("memory")));
    row("from disk", show_size(from("disk")));
    row("from network", show_size(from("network")));
    row("zeros", show_size(device.bytes.zero));
    let latency = |nanos: u64| show_time(Duration::from_nanos(nanos));
    row(
        "latency",
        format!(
            "median {}, 90% {}, 99% {}, worst {}",
            latency(device.latency.p50_ns),
            latency(device.latency.p90_ns),
            latency(device.latency.p99_ns),
            latency(device.latency.max_ns),
        ),
    );
}

/// What the fetcher counted.
fn rows_of_fetcher(counters: &Value, row: &mut dyn FnMut(&str, String)) {
    let count = |name: &str| show_count(number(counters, name));
    let size = |name: &str| show_size(number(counters, name));
    row(
        "requests",
        format!("{} on {} connections", count("requests"), count("connections")),
    );
    row(
        "fetched",
        format!(
            "{}, {} of it ahead of need",
            size("bytes_fetched"),
            size("bytes_prefetched")
        ),
    );
    let filled = match number(counters, "bytes_filled") {
        0 => String::new(),
        _ => format!(", {} of it fetched while nobody read", size("bytes_filled")),
    };
    row(
        "kept",
        format!("{} of {}{filled}", size("bytes_held"), size("bytes_layers")),
    );
    row(
        "retries",
        format!("{}, {} bad answers", count("retries"), count("errors")),
    );
    row(
        "checked",
        format!("{} chunks, {} wrong", count("chunks_checked"), count("chunks_wrong")),
    );
}

/// A counter of the fetcher; 0 where this version does not have it.
fn number(fetch: &Value, name: &str) -> u64 {
    fetch.get(name).and_then(Value::as_u64).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages() {
        assert_eq!(
            [0, 59, 60, 3599, 7200, 90_000].map(show_age),
            ["0s", "59s", "1m", "59m", "2h", "1d"]
        );
    }
}
