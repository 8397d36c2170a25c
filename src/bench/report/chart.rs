//! The two charts, drawn as SVG by hand. In: an outcome. Out: one `<svg>` element, coloured by the page's style sheet.

use std::fmt::Write as _;

use super::super::alternative::Row;
use super::super::outcome::{Outcome, RowOutcome, show_seconds};
use crate::quantity::show_time;

/// Width of both drawings, in SVG units.
const WIDTH: f64 = 920.0;

/// The room to the left of the bars, for their names.
const NAMES: f64 = 245.0;

/// The room to the right of the longest bar, for its time.
const TIMES: f64 = 85.0;

/// A bar and the gap below it.
const BAR: f64 = 30.0;
const STEP: f64 = 50.0;

/// The page's colour for an alternative.
const fn colour(row: Row) -> &'static str {
    match row {
        Row::Empty => "var(--empty)",
        Row::Learned => "var(--learned)",
        Row::Walk => "var(--walk)",
        Row::Full => "var(--full)",
        Row::Untar => "var(--untar)",
        Row::Loop => "var(--loop)",
    }
}

/// Phases before the command is ready are paler than the command itself.
const OPACITY: [f64; 3] = [0.5, 0.72, 1.0];

/// A round number of steps that covers `max`: the distance of grid lines.
fn grid_step(max: f64) -> f64 {
    let raw = (max / 5.0).max(1e-9);
    let power = 10_f64.powf(raw.log10().floor());
    [1.0, 2.0, 5.0, 10.0]
        .map(|n| n * power)
        .into_iter()
        .find(|step| *step >= raw)
        .unwrap_or(raw)
}

/// The grid's values up to `max`.
fn grid(max: f64) -> impl Iterator<Item = f64> {
    let step = grid_step(max);
    (0_u32..)
        .map(move |i| f64::from(i) * step)
        .take_while(move |value| *value <= max * 1.0001)
}

/// A number without digits that say nothing.
fn tidy(value: f64) -> String {
    let text = format!("{value:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Bars of time, one for each alternative.
pub(super) fn bars(outcome: &Outcome) -> String {
    let slowest = outcome
        .rows
        .iter()
        .map(|row| row.spread().1.as_secs_f64())
        .fold(0.0, f64::max)
        .max(1e-6);
    let scale = (WIDTH - NAMES - TIMES) / slowest;
    let x = |seconds: f64| NAMES + seconds * scale;
    let count = f64::from(u32::try_from(outcome.rows.len()).unwrap_or(0));
    let top = if outcome.floor_seconds.is_some() { 30.0 } else { 10.0 };
    let bottom = top + count * STEP;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"Time from nothing to the command's end\">\n",
        bottom + 30.0
    );
    for value in grid(slowest) {
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{bottom}\"/>\
             <text class=\"soft\" x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{} s</text>",
            bottom + 20.0,
            tidy(value),
            x = x(value),
        );
    }
    let middles = || {
        (0..outcome.rows.len()).scan(top + STEP / 2.0, |middle, _| {
            Some(std::mem::replace(middle, *middle + STEP))
        })
    };
    for (row, middle) in outcome.rows.iter().zip(middles()) {
        bar(&mut svg, row, middle - BAR / 2.0, &x);
    }
    if let Some(floor) = outcome.floor_seconds {
        let at = x(floor);
        let _ = writeln!(
            svg,
            "<line class=\"floor\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{}\" y2=\"{bottom}\"/>\
             <text x=\"{:.1}\" y=\"{}\">floor {}</text>",
            top - 8.0,
            at + 6.0,
            top - 8.0,
            show_seconds(floor),
        );
    }
    // Over the line of the floor, so that it strikes no figure out.
    for (row, middle) in outcome.rows.iter().zip(middles()) {
        let total = row.median().total;
        let _ = writeln!(
            svg,
            "<text class=\"halo\" x=\"{:.1}\" y=\"{:.1}\" style=\"font-weight:600\">{}</text>",
            x(total.as_secs_f64()) + 8.0,
            middle + 4.5,
            show_time(total),
        );
    }
    svg.push_str("</svg>");
    svg
}

/// One bar with its name, phases and whisker.
fn bar(svg: &mut String, row: &RowOutcome, y: f64, x: &impl Fn(f64) -> f64) {
    let (median, (min, max)) = (row.median(), row.spread());
    let middle = y + BAR / 2.0;
    let _ = writeln!(
        svg,
        "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
        NAMES - 12.0,
        middle + 4.5,
        row.row.title()
    );
    let mut from = 0.0;
    for ((phase, time), opacity) in median.phases.iter().zip(OPACITY) {
        let to = from + time.as_secs_f64();
        let (left, width) = (x(from), x(to) - x(from));
        let _ = writeln!(
            svg,
            "<rect x=\"{left:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" style=\"fill:{};opacity:{opacity}\">\
             <title>{} {}</title></rect>",
            width.max(0.5),
            colour(row.row),
            phase.name(),
            show_time(*time),
        );
        if width > 70.0 {
            let _ = writeln!(
                svg,
                "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" style=\"fill:var(--card);font-weight:600\">{}</text>",
                left + width / 2.0,
                middle + 4.5,
                phase.name(),
            );
        }
        from = to;
    }
    if row.runs.len() < 2 {
        return;
    }
    let (low, high) = (x(min.as_secs_f64()), x(max.as_secs_f64()));
    let whisker = y + BAR + 5.0;
    let _ = writeln!(
        svg,
        "<path class=\"whisker\" fill=\"none\" d=\"M{low:.1} {:.1}v6M{low:.1} {whisker:.1}H{high:.1}M{high:.1} {:.1}v6\"/>",
        whisker - 3.0,
        whisker - 3.0,
    );
}

/// Bytes over time, one line for each alternative.
pub(super) fn lines(outcome: &Outcome) -> String {
    const LEFT: f64 = 60.0;
    const TOP: f64 = 22.0;
    const HEIGHT: f64 = 330.0;
    let right = WIDTH - 20.0;
    let bottom = TOP + HEIGHT;
    let rows: Vec<_> = outcome
        .rows
        .iter()
        .filter(|row| !row.median().timeline.is_empty())
        .collect();
    let longest = rows
        .iter()
        .map(|row| row.median().total.as_secs_f64())
        .fold(0.0, f64::max)
        .max(1e-6);
    let most = rows
        .iter()
        .map(|row| mib(row.median().fetched_bytes))
        .fold(0.0, f64::max)
        .max(1e-6);
    let x = |seconds: f64| LEFT + (right - LEFT) * seconds / longest;
    let y = |bytes: f64| bottom - HEIGHT * bytes / most;
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"Bytes fetched over time\">\n<text class=\"soft\" x=\"4\" y=\"12\">MiB</text>\n",
        bottom + 40.0
    );
    for value in grid(most) {
        let at = y(value);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text class=\"soft\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 4.5,
            tidy(value),
        );
    }
    for value in grid(longest) {
        let _ = writeln!(
            svg,
            "<text class=\"soft\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{} s</text>",
            x(value),
            bottom + 20.0,
            tidy(value),
        );
    }
    // Ends, so that labels can keep out of each other's way.
    let mut labels: Vec<(f64, f64, Row)> = Vec::new();
    for row in &rows {
        let median = row.median();
        let mut path = format!("M{:.1} {:.1}", x(0.0), y(0.0));
        for (at, bytes) in thinned(&median.timeline) {
            let _ = write!(path, "L{:.1} {:.1}", x(at), y(mib(bytes)));
        }
        let end = (x(median.total.as_secs_f64()), y(mib(median.fetched_bytes)));
        let _ = write!(path, "L{:.1} {:.1}", end.0, end.1);
        let _ = writeln!(
            svg,
            "<path class=\"line\" d=\"{path}\" style=\"stroke:{c}\"/><circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"4.5\" style=\"fill:{c}\"/>",
            end.0,
            end.1,
            c = colour(row.row),
        );
        labels.push((end.0, end.1, row.row));
    }
    place_labels(&mut labels);
    for (at, height, row) in labels {
        // To the right of the line's end, or above it where there is no room: a line comes from the lower left.
        let (anchor, shift, lift) = if at > WIDTH * 0.7 {
            ("end", -8.0, 10.0)
        } else {
            ("start", 10.0, -4.5)
        };
        let _ = writeln!(
            svg,
            "<text class=\"halo\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\" style=\"fill:{};font-weight:600\">{}</text>",
            at + shift,
            height - lift,
            colour(row),
            row.title(),
        );
    }
    svg.push_str("</svg>");
    svg
}

/// Bytes in MiB; charts need no more than a double's precision.
#[allow(clippy::as_conversions, clippy::cast_precision_loss)]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / 1_048_576.0
}

/// At most some hundred points of a line, its last one always.
fn thinned(timeline: &[(f64, u64)]) -> impl Iterator<Item = (f64, u64)> {
    let every = (timeline.len() / 400).max(1);
    let last = timeline.len().saturating_sub(1);
    timeline
        .iter()
        .enumerate()
        .filter(move |(i, _)| i % every == 0 || *i == last)
        .map(|(_, point)| *point)
}

/// Moves labels that would lie on each other upwards, the lowest stays.
fn place_labels(labels: &mut [(f64, f64, Row)]) {
    const APART: f64 = 18.0;
    const NEAR: f64 = 230.0;
    labels.sort_by(|a, b| b.1.total_cmp(&a.1));
    for i in 1..labels.len() {
        for j in 0..i {
            let (placed, label) = (labels[j], &mut labels[i]);
            if (placed.0 - label.0).abs() < NEAR && placed.1 - label.1 < APART {
                label.1 = label.1.min(placed.1 - APART);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grids_are_round() {
        let values = |max: f64| grid(max).collect::<Vec<_>>();
        assert_eq!(values(12.1), [0.0, 5.0, 10.0]);
        assert_eq!(values(1.0), [0.0, 0.2, 0.4, 0.600_000_000_000_000_1, 0.8, 1.0]);
        assert_eq!(tidy(0.600_000_000_000_000_1), "0.6");
        assert_eq!(tidy(10.0), "10");
    }

    #[test]
    fn labels_keep_apart() {
        let mut labels = [
            (10.0, 100.0, Row::Empty),
            (12.0, 98.0, Row::Full),
            (14.0, 99.0, Row::Walk),
            (600.0, 100.0, Row::Loop),
        ];
        place_labels(&mut labels);
        for (i, a) in labels.iter().enumerate() {
            for b in &labels[..i] {
                assert!((a.0 - b.0).abs() > 200.0 || (a.1 - b.1).abs() >= 18.0, "{labels:?}");
            }
        }
    }
}
