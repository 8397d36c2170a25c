//! What devices count, in the text format that Prometheus scrapes (version 0.0.4 of its exposition format). In: devices with
//! their counters. Out: text. Pure: whoever serves it decides where.

use std::fmt::{Display, Write as _};

use super::Backend;
use super::service::{Condition, ServiceStats};
use super::state::State;
use crate::fetch::HintTotal;

/// What the text is called when it is sent by HTTP.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// A device and what was counted for it.
#[derive(Clone, Copy, Debug)]
pub struct DeviceMetrics<'a> {
    /// The device's name: `ublkb0`.
    pub name: &'a str,
    /// What is on it, as lists show it.
    pub source: &'a str,
    /// What carries it: `ublk` or `loop`.
    pub backend: &'a str,
    /// Its counters; none if whoever serves it does not say.
    pub stats: Option<&'a ServiceStats>,
}

impl<'a> DeviceMetrics<'a> {
    /// Of a device's state and counters.
    #[must_use]
    pub fn new(device: &'a State, stats: Option<&'a ServiceStats>) -> Self {
        Self {
            name: &device.name,
            source: &device.source,
            backend: match device.backend {
                Backend::Ublk => "ublk",
                Backend::Loop => "loop",
            },
            stats,
        }
    }
}

/// What Prometheus calls the two kinds of figures.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Only grows as long as the device is served.
    Counter,
    /// Goes up and down.
    Gauge,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
        }
    }
}

/// All metrics of all devices.
#[must_use]
pub fn exposition(devices: &[DeviceMetrics<'_>]) -> String {
    let mut out = Exposition {
        text: Text::default(),
        devices,
    };
    out.family(
        "tarblk_device_info",
        Kind::Gauge,
        "Devices, what is on them and what carries them.",
        |device| {
            vec![(
                vec![("source", device.source), ("backend", device.backend)],
                Figure::Whole(1),
            )]
        },
    );
    out.family(
        "tarblk_device_up",
        Kind::Gauge,
        "Whether the process that serves the device answers.",
        |device| vec![(Vec::new(), Figure::Whole(u64::from(device.stats.is_some())))],
    );
    let help =
        "How the device is: serving, waiting for the network, degraded (its disk cache takes nothing) or poisoned.";
    out.family("tarblk_device_condition", Kind::Gauge, help, |device| {
        let condition = device.stats.map(|stats| Condition::of(&stats.fetch).word());
        let sample = condition.map(|word| (vec![("condition", word)], Figure::Whole(1)));
        sample.into_iter().collect()
    });
    of_device(&mut out);
    of_fetching(&mut out);
    of_layers(&mut out);
    out.text.into_string()
}

/// What the kernel asked and was answered.
fn of_device(out: &mut Exposition<'_>) {
    out.gauge(
        "tarblk_served_seconds",
        "How long the device has been there.",
        |stats| Figure::Millis(stats.up_ms),
    );
    out.gauge(
        "tarblk_resident_memory_bytes",
        "Resident memory of the process that serves the device.",
        |stats| Figure::Whole(stats.resident_bytes),
    );
    out.counter("tarblk_reads_total", "Read requests of the kernel.", |stats| {
        stats.device.reads
    });
    out.counter(
        "tarblk_read_errors_total",
        "Reads that ended with an I/O error.",
        |stats| stats.device.errors,
    );
    out.counter(
        "tarblk_refused_requests_total",
        "Writes and the like, which a read-only device refuses.",
        |stats| stats.device.refused,
    );
    out.family(
        "tarblk_served_bytes_total",
        Kind::Counter,
        "Bytes served, by where they came from.",
        |device| {
            let Some(ServiceStats { device, .. }) = device.stats else {
                return Vec::new();
            };
            [
                ("metadata", device.bytes.metadata),
                ("zero", device.bytes.zero),
                ("memory", device.bytes.memory),
                ("disk", device.bytes.disk),
                ("fetched", device.bytes.fetched),
            ]
            .map(|(from, bytes)| (vec![("from", from)], Figure::Whole(bytes)))
            .to_vec()
        },
    );
    let help = "How long reads took since the device is served: no read of this share took longer.";
    out.family("tarblk_read_latency_seconds", Kind::Gauge, help, |device| {
        let Some(ServiceStats { device, .. }) = device.stats else {
            return Vec::new();
        };
        [
            ("50", device.latency.p50_ns),
            ("90", device.latency.p90_ns),
            ("99", device.latency.p99_ns),
            ("100", device.latency.max_ns),
        ]
        .map(|(percent, nanos)| (vec![("percent", percent)], Figure::Nanos(nanos)))
        .to_vec()
    });
}

/// What was asked of servers, and what came.
fn of_fetching(out: &mut Exposition<'_>) {
    out.counter(
        "tarblk_requests_total",
        "Requests sent to servers, retries and redirects included.",
        |stats| stats.fetch.requests,
    );
    out.counter("tarblk_retries_total", "Requests that had to be sent again.", |stats| {
        stats.fetch.retries
    });
    out.counter(
        "tarblk_bad_answers_total",
        "Answers that were wrong or missing.",
        |stats| stats.fetch.errors,
    );
    out.counter("tarblk_connections_total", "Connections opened.", |stats| {
        stats.fetch.connections
    });
    out.counter(
        "tarblk_fetched_bytes_total",
        "Body bytes that came over the network, as they travel.",
        |stats| stats.fetch.bytes_fetched,
    );
    out.counter(
        "tarblk_deduplicated_bytes_total",
        "Bytes read that other layers had, so that they were neither fetched nor kept again.",
        |stats| stats.fetch.bytes.deduplicated,
    );
    out.counter(
        "tarblk_prefetched_bytes_total",
        "Of the fetched bytes, those that were fetched ahead of need.",
        |stats| stats.fetch.bytes_prefetched,
    );
    out.counter(
        "tarblk_prefetched_used_bytes_total",
        "Of the prefetched bytes, those of chunks that were read later.",
        |stats| stats.fetch.prefetched_used,
    );
    let help = "Bytes of tar fetched ahead of need, in whole chunks, by why they were expected to be read.";
    out.of_hints("tarblk_hint_fetched_bytes_total", Kind::Counter, help, |hint| {
        hint.fetched
    });
    let help = "Of these, the bytes of chunks that were read later.";
    out.of_hints("tarblk_hint_read_bytes_total", Kind::Counter, help, |hint| hint.read);
    let help = "Layers for which the hint is silent, because too little of what it had fetched was read.";
    out.of_hints("tarblk_hint_silent_layers", Kind::Gauge, help, |hint| {
        hint.silent_layers
    });
    out.counter(
        "tarblk_filled_bytes_total",
        "Bytes fetched while idle, because everything is to be here.",
        |stats| stats.fetch.bytes_filled,
    );
    out.counter(
        "tarblk_decoded_bytes_total",
        "Bytes that came out of decoders.",
        |stats| stats.fetch.bytes_decoded,
    );
    out.counter(
        "tarblk_chunks_checked_total",
        "Chunks compared with digests.",
        |stats| stats.fetch.chunks_checked,
    );
    out.counter(
        "tarblk_chunks_wrong_total",
        "Chunks that were not what they have to be.",
        |stats| stats.fetch.chunks_wrong,
    );
    out.counter(
        "tarblk_layers_poisoned_total",
        "Layers that turned out to be damaged or forged.",
        |stats| stats.fetch.layers_poisoned,
    );
    out.gauge(
        "tarblk_reads_in_flight",
        "Reads that wait for bytes to be brought.",
        |stats| Figure::Whole(stats.fetch.in_flight),
    );
    out.gauge(
        "tarblk_waits",
        "What the device waits for on the network for long enough to be told of.",
        |stats| Figure::Whole(u64::try_from(stats.fetch.waiting.len()).unwrap_or(u64::MAX)),
    );
    out.gauge(
        "tarblk_longest_wait_seconds",
        "How long nothing has come of what the device waits for the longest.",
        |stats| Figure::Millis(stats.fetch.waiting.iter().map(|wait| wait.waited_ms).max().unwrap_or(0)),
    );
}

/// What the layers are, and what they took before there was a device.
fn of_layers(out: &mut Exposition<'_>) {
    out.gauge(
        "tarblk_layers_bytes",
        "Uncompressed bytes of all layers that have to be brought.",
        |stats| Figure::Whole(stats.fetch.bytes_layers),
    );
    out.gauge(
        "tarblk_kept_bytes",
        "Of these, the bytes that are in the disk cache.",
        |stats| Figure::Whole(stats.fetch.bytes_held),
    );
    let help = "Bytes downloaded before there was a device, by what they were for.";
    out.family("tarblk_prepare_downloaded_bytes", Kind::Gauge, help, |device| {
        let Some(ServiceStats { fetch, .. }) = device.stats else {
            return Vec::new();
        };
        [
            ("manifests", fetch.prepared.bytes_manifests),
            ("indexes", fetch.prepared.bytes_indexes),
            ("layers", fetch.prepared.bytes_layers),
        ]
        .map(|(what, bytes)| (vec![("for", what)], Figure::Whole(bytes)))
        .to_vec()
    });
}

/// A value, exact as far as it was counted.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Figure {
    Whole(u64),
    /// Of seconds.
    Millis(u64),
    /// Of seconds.
    Nanos(u64),
}

impl Display for Figure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::Whole(number) => number.fmt(f),
            Self::Millis(millis) => write!(f, "{}.{:03}", millis / 1000, millis % 1000),
            Self::Nanos(nanos) => write!(f, "{}.{:09}", nanos / 1_000_000_000, nanos % 1_000_000_000),
        }
    }
}

/// A sample: labels beside the device's, and the value.
type Sample<'a> = (Vec<(&'static str, &'a str)>, Figure);

/// The text as far as it is written.
struct Exposition<'a> {
    text: Text,
    devices: &'a [DeviceMetrics<'a>],
}

impl<'a> Exposition<'a> {
    fn counter(&mut self, name: &str, help: &str, value: impl Fn(&ServiceStats) -> u64) {
        self.single(name, Kind::Counter, help, |stats| Figure::Whole(value(stats)));
    }

    fn gauge(&mut self, name: &str, help: &str, value: impl Fn(&ServiceStats) -> Figure) {
        self.single(name, Kind::Gauge, help, value);
    }

    /// A metric with a sample for each hint of each device.
    fn of_hints(&mut self, name: &str, kind: Kind, help: &str, value: impl Fn(&HintTotal<'_>) -> u64) {
        self.family(name, kind, help, |device| {
            let totals = device.stats.map(|stats| stats.fetch.hint_totals()).unwrap_or_default();
            let sample = |total: &HintTotal<'a>| (vec![("hint", total.hint)], Figure::Whole(value(total)));
            totals.iter().map(sample).collect()
        });
    }

    /// A metric with one sample for each device that has counters.
    fn single(&mut self, name: &str, kind: Kind, help: &str, value: impl Fn(&ServiceStats) -> Figure) {
        self.family(name, kind, help, |device| {
            let sample = device.stats.map(|stats| (Vec::new(), value(stats)));
            sample.into_iter().collect()
        });
    }

    /// A metric of all devices. One without a sample is left out.
    fn family(
        &mut self,
        name: &str,
        kind: Kind,
        help: &str,
        samples: impl Fn(&'a DeviceMetrics<'a>) -> Vec<Sample<'a>>,
    ) {
        let samples = self.devices.iter().flat_map(|device| {
            let of = std::iter::once(("device", device.name));
            let with_device = move |(labels, value): Sample<'a>| (of.clone().chain(labels).collect(), value);
            samples(device).into_iter().map(with_device)
        });
        self.text.family(name, kind, help, samples);
    }
}

/// Metrics in the text format, as far as they are written.
#[derive(Debug, Default)]
pub(crate) struct Text(String);

impl Text {
    /// A metric with its samples: their labels and values. One without a sample is left out.
    pub(crate) fn family<'l>(
        &mut self,
        name: &str,
        kind: Kind,
        help: &str,
        samples: impl IntoIterator<Item = (Vec<(&'l str, &'l str)>, Figure)>,
    ) {
        let mut body = String::new();
        for (labels, value) in samples {
            body.push_str(name);
            let mut before = '{';
            for (label, text) in &labels {
                body.push(before);
                before = ',';
                let _infallible = write!(body, "{label}=\"{}\"", escaped(text));
            }
            let end = if labels.is_empty() { "" } else { "}" };
            let _infallible = writeln!(body, "{end} {value}");
        }
        if !body.is_empty() {
            let kind = kind.name();
            let _infallible = write!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}\n{body}");
        }
    }

    pub(crate) fn into_string(self) -> String {
        self.0
    }
}

/// A label's value as the format wants it.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '\\' => escaped.push_str("\\\\"),
            '"' => escaped.push_str("\\\""),
            '\n' => escaped.push_str("\\n"),
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use std::collections::{HashMap, HashSet};

    use super::*;
    use crate::device::stats::DeviceStats;
    use crate::fetch::{FetchStats, Wait};

    fn stats() -> ServiceStats {
        ServiceStats {
            device: DeviceStats {
                reads: 7,
                ..DeviceStats::default()
            },
            fetch: FetchStats {
                bytes_fetched: 1 << 40,
                waiting: vec![Wait {
                    waited_ms: 12_034,
                    ..Wait::default()
                }],
                ..FetchStats::default()
            },
            up_ms: 61_005,
            resident_bytes: 4096,
        }
    }

    /// Reads a label's value from behind its opening quote; the rest from behind the closing one.
    fn label_value(text: &str) -> (String, &str) {
        let mut value = String::new();
        let mut characters = text.char_indices();
        while let Some((at, character)) = characters.next() {
            match character {
                '"' => return (value, &text[at + 1..]),
                '\\' => match characters.next().map(|(_, escaped)| escaped) {
                    Some('n') => value.push('\n'),
                    Some(escaped @ ('\\' | '"')) => value.push(escaped),
                    other => panic!("{other:?} is no escape"),
                },
                '\n' => panic!("a line ends within a value"),
                other => value.push(other),
            }
        }
        panic!("{text} has no end");
    }

    fn is_name(text: &str) -> bool {
        let is_first = |byte: u8| byte.is_ascii_alphabetic() || byte == b'_';
        !text.is_empty()
            && is_first(text.as_bytes()[0])
            && text.bytes().all(|byte| is_first(byte) || byte.is_ascii_digit())
    }

    /// The rules of the format, and those of `promtool check metrics`: what was written, by metric and labels.
    fn parse(text: &str) -> HashMap<(String, Vec<(String, String)>), f64> {
        assert!(text.is_empty() || text.ends_with('\n'));
        let mut samples = HashMap::new();
        let mut seen = HashSet::new();
        let mut current: Option<(String, String)> = None;
        let mut help: Option<String> = None;
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, words) = rest.split_once(' ').unwrap();
                assert!(is_name(name) && words.ends_with('.') && !words.contains('\\'), "{line}");
                assert!(
                    seen.insert(name.to_owned()),
                    "{name} is described twice, or its samples are apart"
                );
                help = Some(name.to_owned());
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert_eq!(help.take().as_deref(), Some(name), "its help stands before it");
                assert!(["counter", "gauge"].contains(&kind), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                current = Some((name.to_owned(), kind.to_owned()));
            } else {
                let (name, _) = current.as_ref().expect("a type stands before a sample");
                let rest = line.strip_prefix(name.as_str()).and_then(|rest| rest.strip_prefix('{'));
                let mut rest = rest.unwrap_or_else(|| panic!("{line} is not of {name}"));
                let mut labels = Vec::new();
                while let Some((label, after)) = rest.split_once("=\"") {
                    let label = label.trim_start_matches(',');
                    assert!(is_name(label) && !label.starts_with("__"), "{line}");
                    assert!(
                        !["quantile", "le"].contains(&label),
                        "{label} is for summaries and histograms"
                    );
                    let (value, after) = label_value(after);
                    labels.push((label.to_owned(), value));
                    rest = after;
                }
                let value = rest.strip_prefix("} ").unwrap_or_else(|| panic!("{line}"));
                let names: HashSet<_> = labels.iter().map(|(label, _)| label.clone()).collect();
                assert_eq!(names.len(), labels.len(), "{line}");
                let before = samples.insert((name.clone(), labels), value.parse::<f64>().unwrap());
                assert!(before.is_none(), "{line} is there twice");
            }
        }
        samples
    }

    #[test]
    fn the_text_keeps_to_the_formats_rules() {
        assert_eq!(exposition(&[]), "");
        let counted = stats();
        let strange = "tar \"with\" \\ and\nlines, {braces} and = ü";
        let device = |name, source, stats| DeviceMetrics {
            name,
            source,
            backend: "loop",
            stats,
        };
        let devices = [
            device("loop0", "docker://host/app:1", Some(&counted)),
            device("loop1", strange, Some(&counted)),
            device("loop2", "x.tar", None),
        ];
        let samples = parse(&exposition(&devices));
        let own = |labels: &[(&str, &str)]| {
            labels
                .iter()
                .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()))
                .collect::<Vec<_>>()
        };
        let get = |name: &str, labels: &[(&str, &str)]| samples.get(&(name.to_owned(), own(labels))).copied();
        let same = |found: Option<f64>, wanted: f64| found.is_some_and(|found| (found - wanted).abs() < 1e-9);
        let info = [("device", "loop1"), ("source", strange), ("backend", "loop")];
        assert!(same(get("tarblk_device_info", &info), 1.0));
        assert!(same(get("tarblk_device_up", &[("device", "loop0")]), 1.0));
        assert!(same(get("tarblk_device_up", &[("device", "loop2")]), 0.0));
        assert!(same(get("tarblk_reads_total", &[("device", "loop0")]), 7.0));
        assert_eq!(get("tarblk_reads_total", &[("device", "loop2")]), None);
        assert!(same(
            get("tarblk_fetched_bytes_total", &[("device", "loop0")]),
            1_099_511_627_776.0
        ));
        assert!(same(get("tarblk_served_seconds", &[("device", "loop0")]), 61.005));
        assert!(same(get("tarblk_longest_wait_seconds", &[("device", "loop1")]), 12.034));
        let waiting = [("device", "loop0"), ("condition", "waiting")];
        assert!(same(get("tarblk_device_condition", &waiting), 1.0));
        assert!(get("tarblk_served_bytes_total", &[("device", "loop1"), ("from", "zero")]).is_some());
    }
}
