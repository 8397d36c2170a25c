//! What came out: one table, one picture.

use std::fmt::{self, Write as _};
use std::time::Duration;

use tarblk::internals::bench::origin::Link;

/// One cold start.
pub(crate) struct Run {
    pub(crate) took: Duration,
    /// Bytes of bodies that the origin sent.
    pub(crate) bytes: u64,
    pub(crate) requests: u64,
    /// The servers' memory at its most, in bytes.
    pub(crate) memory: u64,
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.2} s, {:.1} MB, {} requests, {} MB resident",
            self.took.as_secs_f64(),
            megabytes(self.bytes),
            self.requests,
            self.memory / 1_000_000
        )
    }
}

/// In millions, to the thousand.
fn megabytes(bytes: u64) -> f64 {
    f64::from(u32::try_from(bytes / 1000).unwrap_or(u32::MAX)) / 1e3
}

/// All runs of a system and a workload.
#[derive(Default)]
struct Cell {
    runs: Vec<Run>,
    failed: Option<String>,
}

impl Cell {
    /// The median, smallest and largest of a figure; none without runs.
    fn figures(&self, of: impl Fn(&Run) -> f64) -> Option<(f64, f64, f64)> {
        let mut all: Vec<_> = self.runs.iter().map(of).collect();
        all.sort_by(f64::total_cmp);
        Some((all.get(all.len() / 2).copied()?, *all.first()?, *all.last()?))
    }

    fn seconds(&self) -> Option<(f64, f64, f64)> {
        self.figures(|run| run.took.as_secs_f64())
    }
}

/// Everything measured: a row for each system, a column for each workload.
pub(crate) struct Results {
    systems: Vec<(&'static str, &'static str)>,
    workloads: Vec<&'static str>,
    cells: Vec<Vec<Cell>>,
}

impl Results {
    /// Nothing yet, of systems with what they need, and workloads.
    pub(crate) fn new(systems: Vec<(&'static str, &'static str)>, workloads: Vec<&'static str>) -> Self {
        let row = || workloads.iter().map(|_| Cell::default()).collect();
        let cells = systems.iter().map(|_| row()).collect();
        Self {
            systems,
            workloads,
            cells,
        }
    }

    pub(crate) fn add(&mut self, row: usize, column: usize, run: Run) {
        self.cells[row][column].runs.push(run);
    }

    pub(crate) fn fail(&mut self, row: usize, column: usize, why: &str) {
        self.cells[row][column].failed = Some(why.lines().next().unwrap_or_default().into());
    }

    /// Seconds (median, smallest .. largest), megabytes and requests (medians) of each workload, and the most memory that the servers
    /// of a start held.
    pub(crate) fn table(&self, link: Link) -> String {
        let mut text = format!("\n{}\n\n| system | prepared |", shown(link));
        for workload in &self.workloads {
            let _ = write!(text, " {workload} |");
        }
        text.push_str(" MB resident |\n|---|---|");
        text.push_str(&"---|".repeat(self.workloads.len() + 1));
        text.push('\n');
        for ((name, needs), row) in self.systems.iter().zip(&self.cells) {
            let _ = write!(text, "| {name} | {needs} |");
            for cell in row {
                let Some((median, min, max)) = cell.seconds() else {
                    text.push_str(" failed |");
                    continue;
                };
                let bytes = cell
                    .figures(|run| megabytes(run.bytes))
                    .map_or(0.0, |figures| figures.0);
                let mut requests: Vec<_> = cell.runs.iter().map(|run| run.requests).collect();
                requests.sort_unstable();
                let _ = write!(
                    text,
                    " **{median:.2}** s ({min:.2} .. {max:.2}), {bytes:.1} MB, {} |",
                    requests[requests.len() / 2]
                );
            }
            let memory = row.iter().flat_map(|cell| &cell.runs).map(|run| run.memory).max();
            let _ = writeln!(text, " {} |", memory.unwrap_or(0) / 1_000_000);
        }
        for ((name, _), row) in self.systems.iter().zip(&self.cells) {
            for (workload, cell) in self.workloads.iter().zip(row) {
                if let Some(why) = &cell.failed {
                    let _ = writeln!(text, "\n{name}, {workload}: failed: {why}");
                }
            }
        }
        text
    }

    /// The medians as bars, a group for each workload, as SVG.
    pub(crate) fn plot(&self, link: Link) -> String {
        const WIDTH: f64 = 900.0;
        const LABEL: f64 = 230.0;
        const BAR: f64 = 16.0;
        const GAP: f64 = 34.0;
        let medians = |column: usize| {
            self.cells
                .iter()
                .map(move |row| row[column].seconds().map(|(median, _, _)| median))
        };
        let (mut body, mut y) = (String::new(), 40.0);
        for (column, workload) in self.workloads.iter().enumerate() {
            let longest = medians(column).flatten().fold(f64::MIN_POSITIVE, f64::max);
            let _ = writeln!(body, r#"<text x="8" y="{y}" font-weight="bold">{workload}</text>"#);
            y += 8.0;
            for ((name, _), median) in self.systems.iter().zip(medians(column)) {
                let Some(median) = median else { continue };
                let width = (WIDTH - LABEL - 80.0) * median / longest;
                let colour = if name.starts_with("tarblk") {
                    "#2a6fb0"
                } else {
                    "#b8bec5"
                };
                let (base, end) = (y + BAR - 4.0, LABEL + width + 6.0);
                let _ = writeln!(
                    body,
                    r#"<text x="{}" y="{base}" text-anchor="end">{name}</text><rect x="{LABEL}" y="{y}" width="{width:.1}" height="{}" fill="{colour}"/><text x="{end:.1}" y="{base}">{median:.2} s</text>"#,
                    LABEL - 8.0,
                    BAR - 3.0,
                );
                y += BAR;
            }
            y += GAP;
        }
        format!(
            r##"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y}" font-family="sans-serif" font-size="12">
<rect width="100%" height="100%" fill="#ffffff"/>
<text x="8" y="18">Cold starts, {}: medians, shorter is better</text>
{body}</svg>
"##,
            shown(link)
        )
    }
}

fn shown(link: Link) -> String {
    let rate = link
        .rate
        .map_or("no limit".into(), |rate| format!("{} Mbit/s", rate * 8 / 1_000_000));
    format!("{} ms, {rate}", link.rtt.as_millis())
}
