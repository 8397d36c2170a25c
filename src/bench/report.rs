//! The results as one HTML file. In: an [`Outcome`]. Out: text that needs nothing from outside: no script, no font, no image.
//!
//! Follows the reader's light or dark setting; prints well; every number of the charts is in a table below them as well.

mod chart;

use std::fmt::Write as _;

use super::alternative::Row;
use super::outcome::{Outcome, counted, show_seconds};
use crate::excerpt::escaped_html as escape;
use crate::page;
use crate::quantity::{show_count, show_size, show_time};

/// What the page adds to the style sheet of all pages.
const STYLE: &str = "
:root { --empty: #2563c9; --learned: #5b3fb5; --walk: #0f8a9d; --full: #2f8f4e; --untar: #c8741a; --loop: #a04a86; --floor: #1d2228; }
@media (prefers-color-scheme: dark) { :root { --empty: #6fa3f7; --learned: #a78bfa; --walk: #4cc3d4; --full: #68c587; --untar: #efa254;
  --loop: #d98fc2; --floor: #e8eaed; } }
main { max-width: 60rem; }
svg { min-width: 36rem; font: 13px system-ui, sans-serif; } svg .axis { stroke: var(--soft); }
svg .whisker { stroke: var(--ink); stroke-width: 1.5; } svg .floor { stroke: var(--floor); stroke-dasharray: 4 4; }
svg .line { fill: none; stroke-width: 2.25; stroke-linejoin: round; } svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
th, td { padding: .35rem .6rem; }
th:first-child, td:first-child { text-align: left; padding-left: 0; } td:last-child { text-align: right; padding-left: .6rem; }
td.wide { text-align: left; padding-left: 1.5rem; white-space: normal; min-width: 14rem; }
";

/// The whole report.
#[must_use]
pub fn html(outcome: &Outcome) -> String {
    let command = escape(&outcome.command);
    let is_spread = outcome.rows.iter().any(|row| row.runs.len() > 1);
    let heading = format!("Cold start of <code>{command}</code>");
    let mut out = page::begin(&format!("Cold start: {command}"), STYLE, &heading);
    let _ = writeln!(out, "<p class=\"soft\">{}</p>", setting(outcome));
    tiles(&mut out, outcome);
    let _ = write!(
        out,
        "<h2>From nothing to the command’s end</h2>\n<p class=\"soft\">{}</p>\n<figure>{}</figure>\n",
        if is_spread {
            "Median run, split into its phases; the whisker spans the fastest and the slowest run."
        } else {
            "One run each, split into its phases."
        },
        chart::bars(outcome),
    );
    if outcome.rows.iter().any(|row| !row.median().timeline.is_empty()) {
        let _ = write!(
            out,
            "<h2>Bytes over the link</h2>\n<p class=\"soft\">Each line is the median run of one alternative and ends with \
             its command.</p>\n<figure>{}</figure>\n",
            chart::lines(outcome),
        );
    }
    table(&mut out, outcome);
    notes(&mut out, outcome);
    out.push_str(page::END);
    out
}

/// Layer, link, machine.
fn setting(outcome: &Outcome) -> String {
    let machine = &outcome.machine;
    let size = if outcome.layer_bytes > 0 {
        format!(" ({})", outcome.size())
    } else {
        String::new()
    };
    format!(
        "{} <code>{}</code>{size} · link {} · tarblk {} on {} · Linux {}, {}",
        if outcome.layers.is_some() { "Image" } else { "Layer" },
        escape(&outcome.source),
        escape(&outcome.link()),
        machine.version,
        escape(&machine.backend),
        escape(&machine.kernel),
        counted(machine.cpus, "CPU"),
    )
}

/// The figures that matter most.
fn tiles(out: &mut String, outcome: &Outcome) {
    let median = |wanted: Row| {
        outcome
            .rows
            .iter()
            .find(|row| row.row == wanted)
            .map(|row| row.median().total)
    };
    let mut tiles = Vec::new();
    if let Some(ours) = median(Row::Empty) {
        let versus = median(Row::Untar).map_or_else(String::new, |untar| {
            let ratio = untar.as_secs_f64() / ours.as_secs_f64().max(1e-9);
            format!(", {ratio:.1} times as fast as download and untar")
        });
        tiles.push((show_time(ours), format!("tarblk with nothing cached{versus}")));
    }
    if let Some(theirs) = [Row::Untar, Row::Loop].into_iter().find(|row| median(*row).is_some()) {
        tiles.push((
            median(theirs).map_or_else(String::new, show_time),
            theirs.title().into(),
        ));
    }
    if let Some(floor) = outcome.floor_seconds {
        tiles.push((
            show_seconds(floor),
            "the floor: what no system can beat when nothing is cached".into(),
        ));
    }
    tiles.push((
        show_size(outcome.touched.bytes),
        format!(
            "of the {} is what the command touches{}",
            outcome.kind(),
            outcome.touched.travels()
        ),
    ));
    page::tiles(out, &tiles);
}

/// The figures behind the charts.
fn table(out: &mut String, outcome: &Outcome) {
    out.push_str(
        "<h2>In figures</h2>\n<div class=\"scroll\"><table>\n<tr><th>Alternative</th><th>Median</th><th>Fastest</th><th>Slowest</th>\
         <th>Fetched</th><th>Requests</th><th>Phases of the median run</th></tr>\n",
    );
    for row in &outcome.rows {
        let (median, (min, max)) = (row.median(), row.spread());
        let phases: Vec<_> = median
            .phases
            .iter()
            .map(|(phase, time)| format!("{} {}", phase.name(), show_time(*time)))
            .collect();
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"wide\">{}</td></tr>",
            row.row.title(),
            show_time(median.total),
            show_time(min),
            show_time(max),
            show_size(median.fetched_bytes),
            show_count(median.requests),
            phases.join(", "),
        );
    }
    if let Some(floor) = outcome.floor_seconds {
        let _ = writeln!(
            out,
            "<tr><td>floor</td><td>{}</td><td></td><td></td><td>{}</td><td></td><td></td></tr>",
            show_seconds(floor),
            show_size(outcome.touched.link_bytes),
        );
    }
    out.push_str("</table></div>\n");
}

/// How it was measured.
fn notes(out: &mut String, outcome: &Outcome) {
    let _ = write!(
        out,
        "<h2>How it was measured</h2>\n<p>Each run starts with nothing: page caches dropped, no process, no mount. The clock \
         stops when the command, run with the {} as its root directory, has ended successfully. The alternatives take \
         turns. tarblk’s index comes over the same link, inside the clock; “all cached” means on disk, not in memory. The \
         image that is downloaded for loop-mounting was made beforehand, outside the clock.</p>\n\
         <p>Touched ({}{} in {} reads) is what the kernel reads from the device with its read-ahead switched off and an empty \
         page cache. With everything in memory the command takes {}. The floor is touched bytes, as they travel, over the \
         link’s rate, two round trips, and that{}.</p>\n",
        outcome.kind(),
        show_size(outcome.touched.bytes),
        outcome.touched.travels(),
        show_count(outcome.touched.reads),
        show_seconds(outcome.local_run_seconds),
        if outcome.touched.link_bytes == outcome.touched.bytes {
            ""
        } else {
            "; which bytes of a compressed layer those are is estimated by the ratio of the whole"
        },
    );
    if outcome.layers.is_some() {
        out.push_str(
            "<p>The image is served as a registry serves it; with an index means that indexes of all layers are published \
             beside it. Download and untar: all blobs at the same time, each into a tar of its own as it comes, the layers’ \
             directories stacked by overlayfs.</p>\n",
        );
    }
    if outcome.rtt_seconds.is_some() {
        out.push_str(
            "<p>The link is simulated on loopback: a connection costs a round trip, each request another; all answers share \
             the rate first-in first-out. Slow start, packet headers and loss are not simulated.</p>\n",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_with_nothing_from_outside() {
        let mut outcome = super::super::outcome::tests::example();
        outcome.command = "sh -c '<script>&'".into();
        let page = html(&outcome);
        assert!(page.contains("sh -c &#39;&lt;script&gt;&amp;&#39;") && !page.contains("<script"));
        assert!(!page.contains("http:") && !page.contains("https:"), "nothing is loaded");
        assert_eq!(page.matches("<svg").count(), 2);
        for word in ["11.9 s", "2.31 s", "download and untar", "5.2 times as fast", "838 ms"] {
            assert!(page.contains(word), "{word}");
        }
        let balance =
            |tag: &str| page.matches(&format!("<{tag}")).count() == page.matches(&format!("</{tag}>")).count();
        for tag in ["svg", "text", "g>", "figure", "table", "tr", "div", "p>", "main"] {
            let tag = tag.trim_end_matches('>');
            assert!(tag.len() == 1 || balance(tag), "{tag}");
        }
    }

    #[test]
    fn one_run_has_no_whisker() {
        let mut outcome = super::super::outcome::tests::example();
        assert_eq!(html(&outcome).matches("class=\"whisker\"").count(), outcome.rows.len());
        outcome.rows.iter_mut().for_each(|row| row.runs.truncate(1));
        outcome.machine.cpus = 1;
        let page = html(&outcome);
        assert!(!page.contains("class=\"whisker\"") && !page.contains("the whisker spans"));
        assert!(page.contains(", 1 CPU<") && page.contains("One run each"));
    }

    #[test]
    fn a_report_of_somebody_elses_server_has_no_lines() {
        let mut outcome = super::super::outcome::tests::example();
        for run in outcome.rows.iter_mut().flat_map(|row| &mut row.runs) {
            run.timeline.clear();
        }
        outcome.rtt_seconds = None;
        outcome.floor_seconds = None;
        assert_eq!(html(&outcome).matches("<svg").count(), 1);
    }
}
