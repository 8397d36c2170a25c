//! What goes to the terminal. In: lines, tables, progress. Out: standard output and standard error.
//!
//! Results go to standard output, everything else to standard error. A reader that has seen enough (`| head`) ends the
//! command quietly. Progress is drawn only on a terminal that shows standard error, and never with `--quiet`.

use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};

use crate::http;
use crate::quantity::show_size;

/// The reader of standard output has gone: an end like any other.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the output is no longer read")]
pub struct ReaderGone;

/// Writes to standard output.
///
/// # Errors
/// [`ReaderGone`] when the other end of the pipe is closed; whatever else standard output says.
pub fn print(text: impl fmt::Display) -> anyhow::Result<()> {
    write_out(|out| write!(out, "{text}"))
}

/// Writes a line to standard output.
///
/// # Errors
/// Those of [`print()`].
pub fn println(text: impl fmt::Display) -> anyhow::Result<()> {
    write_out(|out| writeln!(out, "{text}"))
}

/// Lets `write` write to a buffered standard output and flushes it.
///
/// # Errors
/// Those of [`print()`].
pub fn write_out(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> anyhow::Result<()> {
    let mut out = io::BufWriter::with_capacity(64 * 1024, io::stdout().lock());
    let written = write(&mut out).and_then(|()| out.flush());
    // What the buffer still holds must not be tried again when it is dropped.
    let _ = out.into_parts();
    written.map_err(|e| match e.kind() {
        io::ErrorKind::BrokenPipe => ReaderGone.into(),
        _ => anyhow::Error::new(e).context("cannot write to standard output"),
    })
}

/// A message without the numbers that the standard library puts behind the system's words: `No such file or directory (os
/// error 2)` says nothing more to a person than the words alone.
#[must_use]
pub fn without_errno(message: &str) -> String {
    const BEFORE: &str = " (os error ";
    let mut words = String::with_capacity(message.len());
    let mut rest = message;
    while let Some((head, tail)) = rest.split_once(BEFORE) {
        words.push_str(head);
        let digits = tail.bytes().take_while(u8::is_ascii_digit).count();
        match tail[digits..].strip_prefix(')') {
            Some(after) if digits > 0 => rest = after,
            _ => {
                words.push_str(BEFORE);
                rest = tail;
            }
        }
    }
    words + rest
}

/// A table with aligned columns, numbers to the right.
#[derive(Clone, Debug, Default)]
pub struct Table {
    right: Vec<bool>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these headings; those that begin with `>` are right-aligned.
    #[must_use]
    pub fn new(headings: &[&str]) -> Self {
        let right = headings.iter().map(|heading| heading.starts_with('>')).collect();
        let first = headings
            .iter()
            .map(|heading| heading.trim_start_matches('>').to_owned())
            .collect();
        Self {
            right,
            rows: vec![first],
        }
    }

    /// Two columns without headings: names and what they are.
    #[must_use]
    pub fn plain() -> Self {
        Self {
            right: vec![false, false],
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| {
            self.rows
                .iter()
                .filter_map(|row| row.get(column))
                .map(|cell| cell.chars().count())
                .max()
        };
        let widths: Vec<usize> = (0..self.right.len()).map(|column| width(column).unwrap_or(0)).collect();
        for row in &self.rows {
            let mut line = String::new();
            for ((cell, &width), &right) in row.iter().zip(&widths).zip(&self.right) {
                if !line.is_empty() {
                    line.push_str("  ");
                }
                let padding = " ".repeat(width.saturating_sub(cell.chars().count()));
                if right {
                    line.push_str(&padding);
                    line.push_str(cell);
                } else {
                    line.push_str(cell);
                    line.push_str(&padding);
                }
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// How much is said besides the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Talk {
    /// Nothing but errors.
    pub quiet: bool,
    /// Also what is said once otherwise.
    pub verbose: bool,
}

impl Talk {
    /// A line for the person, on standard error.
    pub fn note(self, text: impl fmt::Display) {
        if !self.quiet {
            let _ = writeln!(io::stderr(), "{}", without_errno(&text.to_string()));
        }
    }

    /// A bar over `total` bytes of work that began `elapsed` ago, if it is to be seen.
    #[must_use]
    pub fn bar(self, what: &str, total: u64, elapsed: Duration) -> ProgressBar {
        let style = "{msg:22} {wide_bar} {binary_bytes:>10} of {binary_total_bytes:<10} {rate:>12} {left:>4}";
        let bar = ProgressBar::with_draw_target(Some(total), target(self)).with_elapsed(elapsed);
        let bar = styled(bar, what, style);
        // Drawn before the first byte comes too, and while none comes: that may take the longest.
        bar.tick();
        bar.enable_steady_tick(Duration::from_millis(500));
        bar
    }

    /// A sign of life for work of unknown length.
    #[must_use]
    pub fn spinner(self, what: &str) -> ProgressBar {
        let bar = styled(
            ProgressBar::with_draw_target(None, target(self)),
            what,
            "{spinner} {msg} {elapsed} {rate}",
        );
        bar.enable_steady_tick(Duration::from_millis(120));
        bar
    }
}

fn styled(bar: ProgressBar, what: &str, style: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(style).unwrap_or_else(|_| ProgressStyle::default_bar());
    // The library's own figures begin with the first call, at which much may have come already, as if that had taken no time.
    let style = style
        .with_key("rate", |state: &ProgressState, out: &mut dyn fmt::Write| {
            // Why it waits stands in the log, once.
            let said = match http::waiting().first() {
                Some(wait) => format!("waits {}s", wait.left().as_secs()),
                None => average_rate(state.pos(), state.elapsed()),
            };
            let _ = out.write_str(&said);
        })
        .with_key("left", |state: &ProgressState, out: &mut dyn fmt::Write| {
            let total = state.len().unwrap_or(0);
            let _ = out.write_str(&time_left(state.pos(), total, state.elapsed()));
        });
    bar.with_style(style.progress_chars("━╸ "))
        .with_message(what.to_owned())
}

/// Bytes per second since the work began; nothing while that says nothing.
fn average_rate(bytes: u64, elapsed: Duration) -> String {
    let millis = elapsed.as_millis();
    match u64::try_from(u128::from(bytes) * 1000 / millis.max(1)) {
        Ok(rate) if millis > 0 && bytes > 0 => format!("{}/s", show_size(rate)),
        _ => String::new(),
    }
}

/// How long the rest takes at the average rate.
fn time_left(bytes: u64, total: u64, elapsed: Duration) -> String {
    let left = u128::from(total.saturating_sub(bytes));
    let secs = (elapsed.as_millis() * left)
        .checked_div(u128::from(bytes))
        .and_then(|millis| u64::try_from(millis.div_ceil(1000)).ok());
    match secs {
        None => String::new(),
        Some(secs @ 0..60) => format!("{secs}s"),
        Some(secs @ 60..3600) => format!("{}m", secs / 60),
        Some(secs) => format!("{}h", secs / 3600),
    }
}

fn target(talk: Talk) -> ProgressDrawTarget {
    if talk.quiet || !io::stderr().is_terminal() {
        ProgressDrawTarget::hidden()
    } else {
        ProgressDrawTarget::stderr_with_hz(10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_errors_are_left_out() {
        for (said, words) in [
            (
                "cannot open x: No such file or directory (os error 2)",
                "cannot open x: No such file or directory",
            ),
            ("a (os error 5), b (os error 28); c", "a, b; c"),
            (
                "a (os error ) b (os error x) (os error 7",
                "a (os error ) b (os error x) (os error 7",
            ),
            ("nothing", "nothing"),
        ] {
            assert_eq!(without_errno(said), words);
        }
    }

    #[test]
    fn rates_are_averages_from_the_beginning() {
        assert_eq!(average_rate(10 << 20, Duration::from_secs(2)), "5 MiB/s");
        assert_eq!(average_rate(1 << 40, Duration::ZERO), "");
        assert_eq!(average_rate(0, Duration::from_secs(1)), "");
        assert_eq!(time_left(10, 40, Duration::from_secs(5)), "15s");
        assert_eq!(time_left(1, 3600, Duration::from_secs(2)), "1h");
        assert_eq!(time_left(0, 40, Duration::from_secs(5)), "");
    }

    #[test]
    fn tables_align() {
        let mut table = Table::new(&["NAME", ">SIZE", "WHERE"]);
        table.row(["a", "1", "here"]);
        table.row(["büro", "100 KiB", ""]);
        assert_eq!(
            table.to_string(),
            "NAME     SIZE  WHERE\na           1  here\nbüro  100 KiB\n"
        );
    }
}
