//! `tarblk ps` and `stats`: what is attached and what it has done.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Session;
use super::attach::states;
use super::cli::{PsArgs, StatsArgs};
use super::output::{Table, print, println, write_out};
use crate::device::daemon::DaemonStats;
use crate::device::inventory::{self, Counted, Status};
use crate::fetch::FetchStats;
use crate::quantity::{show_count, show_size, show_time};

/// `tarblk ps`.
pub(super) fn ps(args: &PsArgs, session: Session) -> anyhow::Result<()> {
    let (listed, damaged) = inventory::list(&states())?;
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

/// `tarblk stats`.
pub(super) fn stats(args: &StatsArgs, _: Session) -> anyhow::Result<()> {
    let counted = inventory::stats(&states(), &args.device)?;
    if args.json {
        return println(serde_json::to_string_pretty(&counted)?);
    }
    let Counted { state, counters } = counted;
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
    let from = counters.fetch.bytes;
    row("from memory", show_size(from.memory));
    row("from disk", show_size(from.disk));
    row("from network", show_size(from.network));
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
fn rows_of_fetcher(fetch: &FetchStats, row: &mut dyn FnMut(&str, String)) {
    let (requests, connections) = (show_count(fetch.requests), show_count(fetch.connections));
    row("requests", format!("{requests} on {connections} connections"));
    let (fetched, ahead) = (show_size(fetch.bytes_fetched), show_size(fetch.bytes_prefetched));
    row("fetched", format!("{fetched}, {ahead} of it ahead of need"));
    let filled = match fetch.bytes_filled {
        0 => String::new(),
        filled => format!(", {} of it fetched while idle", show_size(filled)),
    };
    let (held, all) = (show_size(fetch.bytes_held), show_size(fetch.bytes_layers));
    row("kept", format!("{held} of {all}{filled}"));
    let (retries, errors) = (show_count(fetch.retries), show_count(fetch.errors));
    row("retries", format!("{retries}, {errors} bad answers"));
    let (checked, wrong) = (show_count(fetch.chunks_checked), show_count(fetch.chunks_wrong));
    row("checked", format!("{checked} chunks, {wrong} wrong"));
    for wait in &fetch.waiting {
        let left = show_time(Duration::from_millis(wait.left_ms));
        row("waiting", format!("{left} more for {}: {}", wait.place, wait.why));
    }
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
