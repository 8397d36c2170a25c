//! What the benchmarks share: figures with their spread, and the arguments that `cargo bench` passes along.

#![allow(dead_code)]

use std::fmt;
use std::time::Duration;

/// The arguments meant for the benchmark.
pub(crate) fn arguments() -> Vec<String> {
    std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench")
        .collect()
}

/// Everything at `url`, thrown away, by a client that does nothing else.
pub(crate) fn download(url: &str) -> Result<(), Box<dyn std::error::Error>> {
    let mut body = std::process::Command::new("curl")
        .args(["-sS", "--fail", "-o", "/dev/null", url])
        .spawn()?;
    if !body.wait()?.success() {
        return Err("curl failed".into());
    }
    Ok(())
}

/// Several runs of one measurement, in one unit.
#[derive(Clone, Debug)]
pub(crate) struct Runs {
    sorted: Vec<f64>,
    unit: &'static str,
}

impl Runs {
    /// Of numbers in `unit`.
    pub(crate) fn new(mut values: Vec<f64>, unit: &'static str) -> Self {
        assert!(!values.is_empty(), "nothing was measured");
        values.sort_by(f64::total_cmp);
        Self { sorted: values, unit }
    }

    /// Of times, shown in milliseconds.
    pub(crate) fn ms(times: &[Duration]) -> Self {
        Self::new(times.iter().map(|time| time.as_secs_f64() * 1e3).collect(), "ms")
    }

    /// Of times, shown in microseconds.
    pub(crate) fn us(times: &[Duration]) -> Self {
        Self::new(times.iter().map(|time| time.as_secs_f64() * 1e6).collect(), "us")
    }

    pub(crate) fn median(&self) -> f64 {
        self.at(500)
    }

    /// The value that this many of a thousand runs do not exceed.
    pub(crate) fn at(&self, permille: usize) -> f64 {
        self.sorted[(self.sorted.len() - 1) * permille / 1000]
    }
}

impl fmt::Display for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (min, median, max) = (self.at(0), self.median(), self.at(1000));
        let digits = match median {
            m if m < 10.0 => 2,
            m if m < 1000.0 => 1,
            _ => 0,
        };
        write!(
            f,
            "{median:9.digits$} {}  ({min:.digits$} .. {max:.digits$}, {} runs)",
            self.unit,
            self.sorted.len()
        )
    }
}

/// How often as much as `other` one measurement is, pair by pair: the runs must have been interleaved.
pub(crate) fn ratios(one: &[f64], other: &[f64]) -> Runs {
    Runs::new(one.iter().zip(other).map(|(a, b)| a / b).collect(), "x")
}

/// The same for times.
pub(crate) fn time_ratios(one: &[Duration], other: &[Duration]) -> Runs {
    let seconds = |times: &[Duration]| -> Vec<f64> { times.iter().map(Duration::as_secs_f64).collect() };
    ratios(&seconds(one), &seconds(other))
}
