//! A trace as one HTML page. In: a [`Trace`]. Out: text that needs nothing from outside: no script, no font, no image. Files are rows in the
//! order of their first reads, time goes to the right, colours say where the bytes were.
//!
//! A read at hand is a tick; one that waited is as long as it waited. So what is long and coloured as the origin is what the start waited
//! for.

use std::fmt::Write as _;

use super::{FileSum, micros, sums};
use crate::device::trace::{Trace, TracedRead};
use crate::excerpt;
use crate::page;
use crate::profile::ReadFrom;
use crate::quantity::{show_count, show_size};

/// What the page adds to the style sheet of all pages.
const STYLE: &str = "
:root { --memory: #2f8f4e; --disk: #2563c9; --origin: #c8501a; --peer: #8a5cc2; }
@media (prefers-color-scheme: dark) { :root { --memory: #68c587; --disk: #6fa3f7; --origin: #ef8a54; --peer: #c39bf0; } }
main { max-width: 84rem; }
svg { min-width: 52rem; font: 11px ui-monospace, monospace; }
.memory { fill: var(--memory); } .disk { fill: var(--disk); } .origin { fill: var(--origin); } .peer { fill: var(--peer); } .track { fill: var(--line); opacity: .35; }
.key { display: inline-block; width: .8em; height: .8em; border-radius: .15em; margin: 0 .35em 0 1em; vertical-align: -.05em; }
.key.memory { background: var(--memory); } .key.disk { background: var(--disk); } .key.origin { background: var(--origin); } .key.peer { background: var(--peer); }
th, td { padding: .25rem .6rem; }
th:last-child, td:last-child { font-family: ui-monospace, monospace; }
";

/// Width of the drawing, in SVG units; the part of it for names, and the height of a row.
const WIDTH: f64 = 1280.0;
const NAMES: f64 = 380.0;
const ROW: f64 = 15.0;
const TOP: f64 = 26.0;
/// A name has no more characters than fit there: its end says more than its beginning.
const NAME_CHARS: usize = 56;
/// No read is drawn narrower.
const NARROWEST: f64 = 1.2;
/// So many files have a row in the drawing; all have one in the table.
const MOST_ROWS: usize = 400;

/// The whole page.
pub(super) fn html(trace: &Trace) -> String {
    let sums = sums(trace);
    let source = escape(&trace.source);
    let heading = format!("Start of <code>{source}</code>");
    let mut out = page::begin(&format!("Start of {source}"), STYLE, &heading);
    let _ = writeln!(
        out,
        "<p class=\"soft\">{}</p>",
        if trace.is_over {
            "From the first read to the last."
        } else {
            "It is not over yet: this is what there was until now."
        },
    );
    tiles(&mut out, trace);
    let _ = write!(
        out,
        "<h2>Files and time</h2>\n<p class=\"soft\">A file in each row, in the order of their first reads{}; a mark for each read, as long as \
         it waited.<span class=\"key memory\"></span>in memory, fetched ahead or read before<span class=\"key disk\"></span>on this \
         machine’s disk<span class=\"key origin\"></span>waited for its server\
         <span class=\"key peer\"></span>waited for what another device had asked for</p>\n<figure>{}</figure>\n",
        if sums.len() > MOST_ROWS {
            format!(", the first {MOST_ROWS} of {}", sums.len())
        } else {
            String::new()
        },
        timeline(trace, &sums),
    );
    table(&mut out, &sums);
    if trace.left_out > 0 {
        let _ = writeln!(
            out,
            "<p class=\"soft\">{} more reads were left out.</p>",
            show_count(trace.left_out)
        );
    }
    out.push_str(page::END);
    out
}

const fn class(from: ReadFrom) -> &'static str {
    match from {
        ReadFrom::Memory => "memory",
        ReadFrom::Disk => "disk",
        ReadFrom::Origin => "origin",
        ReadFrom::Peer => "peer",
    }
}

/// The figures that matter most.
fn tiles(out: &mut String, trace: &Trace) {
    let bytes = |from: Option<ReadFrom>| {
        let of = trace
            .reads
            .iter()
            .filter(|read| from.is_none_or(|from| read.from == from));
        of.map(|read| read.bytes).sum::<u64>()
    };
    let waits: Vec<u64> = trace
        .reads
        .iter()
        .filter(|read| read.from == ReadFrom::Origin)
        .filter_map(|read| read.waited_us)
        .collect();
    let all = bytes(None);
    let tiles = [
        (micros(trace.lasted_us()), "from the first read to the last".to_owned()),
        (
            show_size(all),
            format!("read, of {} files", show_count(trace.file_count())),
        ),
        (
            show_size(bytes(Some(ReadFrom::Memory))),
            "were in memory when they were asked for".to_owned(),
        ),
        (
            show_count(waits.len().try_into().unwrap_or(u64::MAX)),
            format!(
                "reads waited for the server, {} all together",
                micros(waits.iter().sum())
            ),
        ),
    ];
    page::tiles(out, &tiles);
}

/// A number of microseconds as a coordinate's factor.
fn float(us: u64) -> f64 {
    std::time::Duration::from_micros(us).as_secs_f64()
}

/// The drawing.
fn timeline(trace: &Trace, sums: &[FileSum]) -> String {
    let rows = sums.len().min(MOST_ROWS);
    let bottom = TOP + ROW * f64::from(u32::try_from(rows).unwrap_or(0));
    let lasted = float(trace.lasted_us()).max(1e-4);
    let x = |us: u64| NAMES + float(us) / lasted * (WIDTH - NAMES - 10.0);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"Reads of files over time\">\n",
        bottom + 8.0
    );
    for value in ticks(trace.lasted_us()) {
        let at = x(value);
        let _ = writeln!(
            svg,
            "<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{}\" y2=\"{bottom}\"/>\
             <text class=\"soft\" x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            TOP - 6.0,
            TOP - 10.0,
            micros(value),
        );
    }
    let top_of = |row: usize| TOP + ROW * f64::from(u32::try_from(row).unwrap_or(0));
    for (row, sum) in sums.iter().take(rows).enumerate() {
        let top = top_of(row);
        let _ = writeln!(
            svg,
            "<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}<title>{}</title></text>\
             <rect class=\"track\" x=\"{NAMES}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{}\"/>",
            NAMES - 8.0,
            top + ROW - 4.0,
            escape(&short(&sum.path)),
            escape(&sum.path),
            top + 2.0,
            WIDTH - NAMES - 10.0,
            ROW - 4.0,
        );
    }
    for marks in merged(trace, rows, lasted) {
        let Mark {
            row,
            from,
            at_us,
            until_us,
            bytes,
            ..
        } = marks;
        let (left, right) = (x(at_us), x(until_us));
        let _ = writeln!(
            svg,
            "<rect class=\"{}\" x=\"{left:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"{}\"><title>{} at {}, {}</title></rect>",
            class(from),
            top_of(row) + 2.0,
            (right - left).max(NARROWEST),
            ROW - 4.0,
            show_size(bytes),
            micros(at_us),
            if until_us > at_us {
                format!("until {}", micros(until_us))
            } else {
                "at once".to_owned()
            },
        );
    }
    svg.push_str("</svg>");
    svg
}

/// A mark of the drawing: one read, or several that would lie on each other.
struct Mark {
    row: usize,
    from: ReadFrom,
    at_us: u64,
    until_us: u64,
    bytes: u64,
}

/// The marks of the first `rows` files. Reads of a file from one place that are closer than can be seen are one.
fn merged(trace: &Trace, rows: usize, lasted: f64) -> Vec<Mark> {
    let visible = lasted * 1e6 / (WIDTH - NAMES);
    let mut marks: Vec<Mark> = Vec::new();
    let mut last: std::collections::HashMap<(usize, ReadFrom), usize> = std::collections::HashMap::new();
    let row_of = |read: &TracedRead| usize::try_from(read.file?).ok().filter(|row| *row < rows);
    for read in &trace.reads {
        let Some(row) = row_of(read) else { continue };
        let until_us = read.at_us + read.waited_us.unwrap_or(0);
        let before = last.get(&(row, read.from)).and_then(|at| marks.get_mut(*at));
        match before {
            Some(mark) if float(read.at_us.saturating_sub(mark.until_us)) * 1e6 < visible => {
                mark.until_us = mark.until_us.max(until_us);
                mark.bytes += read.bytes;
            }
            _ => {
                last.insert((row, read.from), marks.len());
                marks.push(Mark {
                    row,
                    from: read.from,
                    at_us: read.at_us,
                    until_us,
                    bytes: read.bytes,
                });
            }
        }
    }
    marks
}

/// Round times up to `longest`, about eight of them.
fn ticks(longest: u64) -> impl Iterator<Item = u64> {
    let wanted = (longest / 8).max(1);
    let power = 10_u64.pow(wanted.ilog10());
    let step = [1, 2, 5, 10]
        .map(|n| n * power)
        .into_iter()
        .find(|step| *step >= wanted)
        .unwrap_or(wanted);
    (0..).map(move |n| n * step).take_while(move |tick| *tick <= longest)
}

/// All files, with numbers.
fn table(out: &mut String, sums: &[FileSum]) {
    out.push_str(
        "<h2>Files</h2>\n<div class=\"scroll\"><table>\n<tr><th>first read</th><th>reads</th><th>memory</th><th>disk</th><th>origin</th><th>peer</th>\
         <th>waited</th><th>longest wait</th><th>of</th><th>file</th></tr>\n",
    );
    for sum in sums {
        let _ = writeln!(
            out,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            micros(sum.first_us),
            show_count(sum.reads),
            show_size(sum.memory),
            show_size(sum.disk),
            show_size(sum.origin),
            show_size(sum.peer),
            micros(sum.waited_us),
            micros(sum.longest_wait_us),
            show_size(sum.size),
            escape(&sum.path),
        );
    }
    out.push_str("</table></div>\n");
}

/// The end of a path that is too long.
fn short(path: &str) -> String {
    let count = path.chars().count();
    if count <= NAME_CHARS {
        return path.to_owned();
    }
    let end: String = path.chars().skip(count - NAME_CHARS + 1).collect();
    format!("…{end}")
}

/// A name from a layer as HTML: it is anybody's.
fn escape(name: &str) -> String {
    excerpt::escaped_html(&excerpt::of_line(name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::trace::tests::sample;

    #[test]
    fn names_from_layers_are_only_text() {
        let page = html(&sample());
        assert!(page.contains("/lib/&lt;b&gt;&amp;x") && !page.contains("<b>&x"));
        assert!(!page.contains("<script") && !page.contains("http://") && !page.contains("https://"));
        assert_eq!(page.matches("<rect class=\"origin\"").count(), 1);
        assert_eq!(page.matches("<rect class=\"memory\"").count(), 1);
    }

    #[test]
    fn reads_on_each_other_are_one_mark() {
        let mut trace = sample();
        let read = trace.reads[1];
        trace.reads.extend([
            TracedRead { at_us: 21_510, ..read },
            TracedRead { at_us: 23_000, ..read },
        ]);
        let marks = merged(&trace, 2, 0.023);
        let memory: Vec<u64> = marks
            .iter()
            .filter(|mark| mark.from == ReadFrom::Memory)
            .map(|mark| mark.bytes)
            .collect();
        assert_eq!(memory, [16_384, 8192]);
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!(
            ticks(80_000).collect::<Vec<_>>(),
            (0..9).map(|n| n * 10_000).collect::<Vec<_>>()
        );
        assert_eq!(ticks(0).collect::<Vec<_>>(), [0]);
        assert!(ticks(1_234_567).count() <= 9);
    }

    #[test]
    fn long_names_keep_their_ends() {
        let long = format!("/usr/lib/{}/end.py", "x".repeat(200));
        let short = short(&long);
        assert_eq!(short.chars().count(), NAME_CHARS);
        assert!(short.starts_with('…') && short.ends_with("/end.py"));
    }
}
