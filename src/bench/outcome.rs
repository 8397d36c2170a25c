//! What came out: the runs, their medians, the floor; as a table for a person and as a value that serialises.

use std::fmt::{self, Write as _};
use std::time::Duration;

use serde::{Serialize, Serializer};

use super::BenchSource;
use super::alternative::{Row, Traffic};
use super::stage::Stage;
use crate::quantity::{show_count, show_rate, show_size, show_time};
use crate::source::registry::ImageName;

/// A part of a run's time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// tarblk: until the block device is there.
    Attach,
    /// Until the filesystem is mounted.
    Mount,
    /// Until the last byte has come.
    Download,
    /// Until tar has written the last file, after the last byte had come.
    Unpack,
    /// The command itself.
    Run,
}

impl Phase {
    /// Its name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Attach => "attach",
            Self::Mount => "mount",
            Self::Download => "download",
            Self::Unpack => "unpack",
            Self::Run => "run",
        }
    }
}

/// One run of one alternative.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// From nothing to the command's end.
    #[serde(rename = "seconds", serialize_with = "seconds")]
    pub total: Duration,
    /// Its parts, in order.
    #[serde(serialize_with = "phases")]
    pub phases: Vec<(Phase, Duration)>,
    /// Body bytes that the link carried until the command's end.
    pub fetched_bytes: u64,
    /// Requests made until then.
    pub requests: u64,
    /// Seconds since the clock started, and bytes by then; empty where the layer comes from another server.
    #[serde(skip)]
    pub timeline: Vec<(f64, u64)>,
}

impl Run {
    /// A run from the times at which its phases ended; the last one's end is the run's.
    pub(super) fn new(ends: &[(Phase, Duration)], traffic: Traffic) -> Self {
        let mut total = Duration::ZERO;
        let mut phases = Vec::with_capacity(ends.len());
        for &(phase, end) in ends {
            phases.push((phase, end.saturating_sub(total)));
            total = total.max(end);
        }
        Self {
            total,
            phases,
            fetched_bytes: traffic.bytes,
            requests: traffic.requests,
            timeline: traffic.timeline,
        }
    }
}

fn seconds<S: Serializer>(time: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_f64(time.as_secs_f64())
}

fn phases<S: Serializer>(phases: &[(Phase, Duration)], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_map(phases.iter().map(|(phase, time)| (phase.name(), time.as_secs_f64())))
}

/// All runs of one alternative; at least one.
#[derive(Clone, Debug, Serialize)]
pub struct RowOutcome {
    /// The alternative that was run.
    pub row: Row,
    /// In the order they ran.
    pub runs: Vec<Run>,
}

impl RowOutcome {
    /// The run whose time is the median; of an even number the slower one of the middle two.
    ///
    /// # Panics
    /// When there are no runs, which no benchmark makes.
    #[must_use]
    pub fn median(&self) -> &Run {
        let mut sorted: Vec<&Run> = self.runs.iter().collect();
        sorted.sort_by_key(|run| run.total);
        sorted[sorted.len() / 2]
    }

    /// The fastest and the slowest run's time.
    #[must_use]
    pub fn spread(&self) -> (Duration, Duration) {
        let times = || self.runs.iter().map(|run| run.total);
        (times().min().unwrap_or_default(), times().max().unwrap_or_default())
    }
}

/// What the command reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Touched {
    /// Different bytes of the layer, in whole pages, that the kernel read from the device without reading ahead.
    pub bytes: u64,
    /// The same as they travel: those of a compressed layer at the ratio of all layers together.
    pub link_bytes: u64,
    /// In how many reads.
    pub reads: u64,
}

impl Touched {
    /// How long they are on the link, in words, if not as they are.
    pub(super) fn travels(&self) -> String {
        if self.link_bytes == self.bytes {
            return String::new();
        }
        format!(" ({} as it travels, compressed)", show_size(self.link_bytes))
    }
}

/// So many of something, in words.
pub(super) fn counted(count: usize, what: &str) -> String {
    match count {
        1 => format!("1 {what}"),
        count => format!("{count} {what}s"),
    }
}

/// Where it was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// The kernel's release.
    pub kernel: String,
    /// How many CPUs this process may use.
    pub cpus: usize,
    /// What carried tarblk's devices: `ublk` or `loop`.
    pub backend: String,
    /// This program's version.
    pub version: &'static str,
}

/// All results.
#[derive(Clone, Debug, Serialize)]
pub struct Outcome {
    /// The layer or image, as it was named.
    pub source: String,
    /// The length of its blobs in bytes; 0 where it was not asked.
    pub layer_bytes: u64,
    /// How many layers an image has; none of a layer alone.
    pub layers: Option<usize>,
    /// The command, joined for reading.
    pub command: String,
    /// The simulated link's round trip; none with a URL.
    pub rtt_seconds: Option<f64>,
    /// The simulated link's rate in bytes per second; none when unlimited or with a URL.
    pub rate_bytes_per_second: Option<u64>,
    /// The alternatives.
    pub rows: Vec<RowOutcome>,
    /// What the command touches.
    pub touched: Touched,
    /// The median time of the command with everything in memory, in seconds.
    pub local_run_seconds: f64,
    /// What no system can beat: touched bytes, as they travel, over the rate, two round trips, the local run. None with a URL, whose link
    /// is unknown.
    pub floor_seconds: Option<f64>,
    /// Where it was measured.
    pub machine: Machine,
}

impl Outcome {
    pub(super) fn new(stage: &Stage<'_>, rows: Vec<RowOutcome>, touched: Touched, mut local: Vec<Duration>) -> Self {
        let source = match &stage.options.source {
            BenchSource::Local { path, .. } => path.display().to_string(),
            BenchSource::Image { layout, .. } => ImageName::Layout(layout.clone()).to_string(),
            BenchSource::Registry { reference, .. } => ImageName::Registry(reference.clone()).to_string(),
            BenchSource::Url { url, .. } => url.clone(),
        };
        let link = stage.options.source.link();
        let layers = match &stage.options.source {
            BenchSource::Image { .. } | BenchSource::Registry { .. } => Some(stage.layers.len()),
            _ => None,
        };
        local.sort();
        let local = local.get(local.len() / 2).copied().unwrap_or_default();
        let floor = link.map(|link| {
            let carried = link
                .rate
                .map_or(Duration::ZERO, |rate| super::origin::time_for(touched.link_bytes, rate));
            carried + link.rtt * 2 + local
        });
        let words: Vec<_> = stage
            .options
            .command
            .iter()
            .map(|word| quoted(&word.to_string_lossy()))
            .collect();
        Self {
            source,
            layer_bytes: stage.layer_bytes,
            layers,
            command: words.join(" "),
            rtt_seconds: link.map(|link| link.rtt.as_secs_f64()),
            rate_bytes_per_second: link.and_then(|link| link.rate),
            rows,
            touched,
            local_run_seconds: local.as_secs_f64(),
            floor_seconds: floor.map(|floor| floor.as_secs_f64()),
            machine: Machine {
                kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
                cpus: std::thread::available_parallelism().map_or(1, usize::from),
                backend: stage.backend.clone(),
                version: env!("CARGO_PKG_VERSION"),
            },
        }
    }

    /// What was measured, in a word.
    pub(super) const fn kind(&self) -> &'static str {
        if self.layers.is_some() { "image" } else { "layer" }
    }

    /// Its size in words.
    pub(super) fn size(&self) -> String {
        let size = show_size(self.layer_bytes);
        match self.layers {
            None => size,
            Some(1) => format!("{size}, 1 layer"),
            Some(layers) => format!("{size}, {layers} layers"),
        }
    }

    /// The link in words.
    #[must_use]
    pub fn link(&self) -> String {
        let rate = self.rate_bytes_per_second.map(show_rate);
        match (self.rtt_seconds, rate) {
            (None, _) => "the link as it is".into(),
            (Some(rtt), Some(rate)) => format!("{}, {rate}", show_seconds(rtt)),
            (Some(rtt), None) => format!("{}, unlimited rate", show_seconds(rtt)),
        }
    }
}

/// A word as a shell would take it.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

/// Seconds in words.
pub(super) fn show_seconds(seconds: f64) -> String {
    show_time(Duration::try_from_secs_f64(seconds).unwrap_or_default())
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.rows.first().map_or(0, |row| row.runs.len());
        writeln!(f, "{} in {} ({})", self.command, self.source, self.size())?;
        writeln!(
            f,
            "link: {}; {} each, cold; tarblk on {}",
            self.link(),
            counted(runs, "run"),
            self.machine.backend
        )?;
        writeln!(f)?;
        let heading = ["", "median", "min .. max", "fetched", "requests", "of which"];
        let mut lines = vec![heading.map(str::to_owned)];
        for row in &self.rows {
            let (median, (min, max)) = (row.median(), row.spread());
            let phases: Vec<_> = median
                .phases
                .iter()
                .map(|(phase, time)| format!("{} {}", phase.name(), show_time(*time)))
                .collect();
            lines.push([
                row.row.title().into(),
                show_time(median.total),
                match row.runs.len() {
                    1 => String::new(),
                    _ => format!("{} .. {}", show_time(min), show_time(max)),
                },
                show_size(median.fetched_bytes),
                show_count(median.requests),
                phases.join(", "),
            ]);
        }
        if let Some(floor) = self.floor_seconds {
            let touched = show_size(self.touched.link_bytes);
            lines.push([
                "floor".into(),
                show_seconds(floor),
                String::new(),
                touched,
                String::new(),
                String::new(),
            ]);
        }
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0);
        let widths: [usize; 6] = std::array::from_fn(width);
        for line in &lines {
            let mut text = format!("{:<w$}", line[0], w = widths[0]);
            for column in 1..5 {
                write!(text, "  {:>w$}", line[column], w = widths[column])?;
            }
            writeln!(f, "{}", format!("{text}  {}", line[5]).trim_end())?;
        }
        writeln!(f)?;
        let (touched, kind) = (show_size(self.touched.bytes), self.kind());
        let reads = show_count(self.touched.reads);
        let local = show_seconds(self.local_run_seconds);
        if self.touched.link_bytes == self.touched.bytes {
            write!(
                f,
                "The command touches {touched} of the {kind}, in {reads} reads with the kernel's read-ahead off; with everything in memory it\n\
                 takes {local}. The floor is the touched bytes over the link's rate, two round trips, and that.\n"
            )
        } else {
            let travels = show_size(self.touched.link_bytes);
            write!(
                f,
                "The command touches {touched} of the {kind}, {travels} as it travels (compressed), in {reads} reads with the kernel's\n\
                 read-ahead off; with everything in memory it takes {local}. The floor is what travels over the link's rate, two round\n\
                 trips, and that.\n"
            )
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A result to draw and print.
    pub(in crate::bench) fn example() -> Outcome {
        let run = |row: Row, millis: u64, bytes: u64, requests: u64| {
            let total = Duration::from_millis(millis);
            let phases = if row.is_tarblk() {
                vec![
                    (Phase::Attach, total / 10),
                    (Phase::Mount, total / 50),
                    (Phase::Run, total * 44 / 50),
                ]
            } else {
                vec![
                    (Phase::Download, total * 9 / 10),
                    (Phase::Unpack, total / 50),
                    (Phase::Run, total * 4 / 50),
                ]
            };
            let steps = 40_u32;
            let timeline = (0..=steps).map(|i| {
                (
                    total.as_secs_f64() * f64::from(i) / f64::from(steps),
                    bytes * u64::from(i) / u64::from(steps),
                )
            });
            Run {
                total,
                phases,
                fetched_bytes: bytes,
                requests,
                timeline: timeline.collect(),
            }
        };
        let row = |row: Row, millis: u64, bytes: u64, requests: u64| RowOutcome {
            row,
            runs: [96, 100, 107]
                .iter()
                .map(|percent| run(row, millis * percent / 100, bytes, requests))
                .collect(),
        };
        Outcome {
            source: "debian.tar".into(),
            layer_bytes: 286_543_360,
            layers: None,
            command: "python3 -c 'import numpy'".into(),
            rtt_seconds: Some(0.02),
            rate_bytes_per_second: Some(25_000_000),
            rows: vec![
                row(Row::Empty, 2_310, 31_000_000, 190),
                row(Row::Full, 640, 0, 1),
                row(Row::Untar, 11_900, 286_543_360, 1),
                row(Row::Loop, 12_100, 288_000_000, 1),
            ],
            touched: Touched {
                bytes: 17_700_000,
                link_bytes: 17_700_000,
                reads: 551,
            },
            local_run_seconds: 0.09,
            floor_seconds: Some(0.838),
            machine: Machine {
                kernel: "6.12.1".into(),
                cpus: 2,
                backend: "ublk".into(),
                version: "0.1.0",
            },
        }
    }

    #[test]
    fn the_table_reads_well() {
        let text = example().to_string();
        assert_eq!(
            text,
            "\
python3 -c 'import numpy' in debian.tar (273 MiB)
link: 20.0 ms, 200 Mbit/s; 3 runs each, cold; tarblk on ublk

                               median        min .. max   fetched  requests  of which
tarblk, nothing cached         2.31 s  2.21 s .. 2.47 s  29.5 MiB       190  attach 231 ms, mount 46.2 ms, run 2.03 s
tarblk, all cached             640 ms  614 ms .. 684 ms       0 B         1  attach 64.0 ms, mount 12.8 ms, run 563 ms
download and untar             11.9 s  11.4 s .. 12.7 s   273 MiB         1  download 10.7 s, unpack 238 ms, run 952 ms
download image and loop-mount  12.1 s  11.6 s .. 12.9 s   274 MiB         1  download 10.8 s, unpack 242 ms, run 968 ms
floor                          838 ms                    16.8 MiB

The command touches 16.8 MiB of the layer, in 551 reads with the kernel's read-ahead off; with everything in memory it
takes 90.0 ms. The floor is the touched bytes over the link's rate, two round trips, and that.
"
        );
    }

    #[test]
    fn one_run_has_no_spread() {
        let mut outcome = example();
        outcome.rows.iter_mut().for_each(|row| row.runs.truncate(1));
        let text = outcome.to_string();
        assert!(
            text.contains("; 1 run each, cold;") && !text.contains(" s .. "),
            "{text}"
        );
    }

    #[test]
    fn the_floor_is_of_what_travels() {
        let mut outcome = example();
        outcome.touched.link_bytes = 6_000_000;
        let text = outcome.to_string();
        assert!(
            text.contains("touches 16.8 MiB of the layer, 5.7 MiB as it travels (compressed), in 551"),
            "{text}"
        );
        let floor = text.lines().find(|line| line.starts_with("floor ")).unwrap();
        assert!(floor.ends_with("5.7 MiB"), "{floor}");
    }

    #[test]
    fn an_image_is_told_from_a_layer() {
        let mut outcome = example();
        outcome.layers = Some(4);
        let text = outcome.to_string();
        assert!(
            text.contains("(273 MiB, 4 layers)\n") && text.contains("of the image, in 551 reads"),
            "{text}"
        );
    }

    #[test]
    fn medians_and_json() {
        let outcome = example();
        assert_eq!(outcome.rows[0].median().total, Duration::from_millis(2_310));
        let json = serde_json::to_value(&outcome).expect("serialises");
        assert_eq!(json["rows"][1]["row"], "full");
        assert_eq!(json["rows"][0]["runs"][1]["seconds"], 2.31);
        assert_eq!(json["rows"][0]["runs"][1]["phases"]["attach"], 0.231);
        assert_eq!(json["rows"][0]["runs"][1]["requests"], 190);
        assert_eq!(json["machine"]["backend"], "ublk");
    }

    #[test]
    fn words_are_quoted_as_a_shell_takes_them() {
        assert_eq!(quoted("a-b_c/d.e"), "a-b_c/d.e");
        assert_eq!(quoted("import numpy"), "'import numpy'");
        assert_eq!(quoted("it's"), "'it'\\''s'");
        assert_eq!(quoted(""), "''");
    }
}
