//! What the pages have in common that commands write for people. In: a title and what a page adds to the style sheet. Out: the page's
//! beginning, and its tiles and end. A page needs nothing from outside: no script, no font, no image; it follows the reader's light or
//! dark setting, and prints well.

use std::fmt::Write as _;

/// The part of the style sheet that is the same on all pages. Colours by role, so that light and dark differ in one place.
const STYLE: &str = "
:root { color-scheme: light dark; --page: #fcfcfb; --card: #ffffff; --ink: #1d2228; --soft: #5c6670; --line: #dfe3e7; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2024; --ink: #e8eaed; --soft: #9aa4ae; --line: #333a41; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .4rem; font-weight: 650; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2.4rem 0 .3rem; font-weight: 650; }
p { margin: .3rem 0; } .soft { color: var(--soft); } code { font: .92em ui-monospace, monospace; }
.tiles { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.5rem 0 0; }
.tile { flex: 1 1 11rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.7rem; font-weight: 650; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .88rem; }
figure { margin: .6rem 0 0; background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; overflow-x: auto; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); } svg .soft { fill: var(--soft); } svg .grid { stroke: var(--line); }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; }
th, td { text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:last-child, td:last-child { text-align: left; padding-left: 1.5rem; } th { color: var(--soft); font-weight: 500; }
@media print { body { background: none; } }
";

/// How a page ends.
pub(crate) const END: &str = "</main>\n</body>\n</html>\n";

/// A page as far as its first heading, `heading` being HTML. `style` is what it adds to the style sheet.
pub(crate) fn begin(title: &str, style: &str, heading: &str) -> String {
    let mut out = String::with_capacity(64 << 10);
    let _ = write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n<main>\n<h1>{heading}</h1>\n"
    );
    out
}

/// The figures that matter most, each with what it is.
pub(crate) fn tiles(out: &mut String, tiles: &[(String, String)]) {
    out.push_str("<div class=\"tiles\">\n");
    for (value, what) in tiles {
        let _ = writeln!(out, "<div class=\"tile\"><b>{value}</b><span>{what}</span></div>");
    }
    out.push_str("</div>\n");
}
