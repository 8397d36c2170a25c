//! `tarblk stats`: what a device has done, and what it took. In: a device or where it is mounted. Out: a table, JSON, or what
//! Prometheus reads.

use std::io::{self, IsTerminal as _};
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

use super::Session;
use super::attach::states;
use super::cli::StatsArgs;
use super::laziness::{Downloaded, Laziness};
use super::output::{Table, print, println};
use super::ps::word;
use crate::device::inventory::{self, Counted, Status};
use crate::device::metrics::{self, DeviceMetrics};
use crate::device::service::{self, Condition, ServiceStats};
use crate::device::state::State;
use crate::fetch::{FetchStats, trust};
use crate::quantity::{show_count, show_size, show_time};

/// What `stats --json` says.
#[derive(Debug, Serialize)]
struct StatsReport<'a> {
    #[serde(flatten)]
    counted: &'a Counted,
    /// How the device is.
    #[serde(flatten)]
    status: Status,
    /// Whether the layers came lazily; none where the daemon does not say.
    lazy: Option<Laziness>,
    /// What was downloaded, before the device was there and since.
    downloaded: Downloaded,
}

impl<'a> StatsReport<'a> {
    fn of(counted: &'a Counted) -> Self {
        let fetch = &counted.counters.fetch;
        Self {
            counted,
            status: Condition::of(fetch).into(),
            lazy: Laziness::of(&fetch.prepared, &counted.state.source),
            downloaded: Downloaded::of(&fetch.prepared, fetch.bytes_fetched),
        }
    }
}

/// `tarblk stats`.
pub(super) fn stats(args: &StatsArgs, _: Session) -> anyhow::Result<()> {
    let Some(device) = &args.device else {
        return prometheus(None);
    };
    if args.prometheus {
        return prometheus(Some(device));
    }
    let counted = inventory::stats(&states(), device)?;
    match args.watch {
        Some(pause) => watch(device, counted, pause, args.json),
        None if args.json => println(serde_json::to_string_pretty(&StatsReport::of(&counted))?),
        None => print(table(&counted)),
    }
}

/// The counters of one device or of all, for Prometheus. Of those that do not answer it is said that they do not.
fn prometheus(device: Option<&Path>) -> anyhow::Result<()> {
    let dir = states();
    let all = match device {
        Some(device) => vec![inventory::find(&dir, device)?],
        None => dir.list()?.0,
    };
    let ask = |state: State| {
        let counters = service::stats(&dir, &state);
        let counters = counters.inspect_err(|error| log::warn!("{error}")).ok();
        (state, counters)
    };
    let all: Vec<_> = all.into_iter().map(ask).collect();
    let devices = all
        .iter()
        .map(|(state, counters)| DeviceMetrics::new(state, counters.as_ref()));
    print(metrics::exposition(&devices.collect::<Vec<_>>()))
}

/// Shows the counters again and again: on a terminal in the same place, else below each other.
fn watch(device: &Path, first: Counted, pause: Duration, json: bool) -> anyhow::Result<()> {
    /// To the upper left corner, and everything below it blank.
    const CLEAR: &str = "\x1b[H\x1b[2J";
    let clear = if io::stdout().is_terminal() { CLEAR } else { "" };
    let mut last: Option<Counted> = None;
    let mut counted = first;
    loop {
        if json {
            println(serde_json::to_string(&StatsReport::of(&counted))?)?;
        } else {
            let mut table = table(&counted);
            if let Some(last) = &last {
                table.row(["now".to_owned(), show_rates(&last.counters, &counted.counters)]);
            }
            print(format_args!("{clear}{table}"))?;
            if clear.is_empty() {
                println("")?;
            }
        }
        std::thread::sleep(pause);
        last = Some(counted);
        counted = inventory::stats(&states(), device)?;
    }
}

/// What happened between two looks: `12 reads/s, 3.4 MiB/s served, 1.2 MiB/s fetched`.
fn show_rates(before: &ServiceStats, after: &ServiceStats) -> String {
    let millis = after.up_ms.saturating_sub(before.up_ms).max(1);
    let rate = |before: u64, after: u64| after.saturating_sub(before).saturating_mul(1000) / millis;
    let served =
        |stats: &ServiceStats| stats.device.bytes.metadata + stats.device.bytes.zero + stats.device.bytes.of_layers();
    format!(
        "{} reads/s, {}/s served, {}/s fetched",
        show_count(rate(before.device.reads, after.device.reads)),
        show_size(rate(served(before), served(after))),
        show_size(rate(before.fetch.bytes_fetched, after.fetch.bytes_fetched))
    )
}

/// The counters as a table for people.
fn table(counted: &Counted) -> Table {
    let StatsReport {
        status,
        lazy,
        downloaded,
        ..
    } = StatsReport::of(counted);
    let Counted { state, counters } = counted;
    let mut table = Table::plain();
    let mut row = |name: &str, value: String| table.row([name.to_owned(), value]);
    if let Some(lazy) = &lazy {
        row("lazy", lazy.sentence());
    }
    if downloaded.of_bytes > 0 || downloaded.bytes > 0 {
        row("downloaded", downloaded.sentence());
    }
    // What it waits for stands below, with all that was fetched.
    if let Status::Poisoned { why } | Status::Degraded { why } = &status {
        row(word(&status), why.clone());
    }
    let about = (state.device.display(), state.backend, show_size(state.len));
    row("device", format!("{} ({}), {}", about.0, about.1, about.2));
    row("source", state.source.clone());
    if !state.trust.is_empty() {
        row("trust", trust::in_short(&state.trust));
    }
    row("up", show_time(Duration::from_millis(counters.up_ms)));
    let (resident, pid) = (show_size(counters.resident_bytes), state.process.pid);
    row("memory", format!("{resident} resident, pid {pid}"));
    rows_of_device(counters, &mut row);
    rows_of_fetcher(&counters.fetch, &mut row);
    table
}

/// What the device counted.
fn rows_of_device(counters: &ServiceStats, row: &mut dyn FnMut(&str, String)) {
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
    row("deduplicated", show_size(from.deduplicated));
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
    // As it travels; everything else here counts bytes of the layers' tars.
    let (fetched, ahead) = (show_size(fetch.bytes_fetched), show_size(fetch.bytes_prefetched));
    row("fetched", format!("{fetched}, {ahead} of it ahead of need"));
    for hint in fetch.hint_totals() {
        let percent = hint.read.saturating_mul(100).checked_div(hint.fetched).unwrap_or(0);
        let silent = match hint.silent_layers {
            0 => String::new(),
            1 => "; silent for 1 layer now".to_owned(),
            layers => format!("; silent for {layers} layers now"),
        };
        let (fetched, read) = (show_size(hint.fetched), show_size(hint.read));
        row(
            &format!("  {}", hint.hint),
            format!("{fetched} fetched, {read} read ({percent}%){silent}"),
        );
    }
    let filled = match fetch.bytes_filled {
        0 => String::new(),
        filled => format!(", {} of it fetched while idle", show_size(filled)),
    };
    let (held, all) = (show_size(fetch.bytes_held), show_size(fetch.bytes_layers));
    row("kept", format!("{held} of {all} uncompressed{filled}"));
    let (retries, errors) = (show_count(fetch.retries), show_count(fetch.errors));
    row("retries", format!("{retries}, {errors} bad answers"));
    let (checked, wrong) = (show_count(fetch.chunks_checked), show_count(fetch.chunks_wrong));
    row("checked", format!("{checked} chunks, {wrong} wrong"));
    for wait in &fetch.waiting {
        let shown = |ms| show_time(Duration::from_millis(ms));
        let times = match wait.left_ms {
            0 => format!("{} so far", shown(wait.waited_ms)),
            left => format!("{} so far, {} more", shown(wait.waited_ms), shown(left)),
        };
        row("waiting", format!("{times} for {}: {}", wait.place, wait.why));
    }
}
