//! `tarblk generate`: man pages and completions, made from the command definitions.

use std::path::Path;

use anyhow::Context as _;
use clap::CommandFactory;

use super::cli::{Cli, Generate};
use super::output::write_out;

/// Writes what was asked for.
pub(super) fn run(what: &Generate) -> anyhow::Result<()> {
    match what {
        Generate::Man { dir } => man_pages(dir).with_context(|| format!("{}: cannot write man pages", dir.display())),
        Generate::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "tarblk", &mut script);
            write_out(|out| out.write_all(&script))
        }
    }
}

/// `tarblk.1`, `tarblk-mount.1`, …
fn man_pages(dir: &Path) -> std::io::Result<()> {
    let mut tarblk = Cli::command();
    // Fills in what pages are named by.
    tarblk.build();
    man_page_and_below(&tarblk, dir)
}

fn man_page_and_below(command: &clap::Command, dir: &Path) -> std::io::Result<()> {
    for below in command.get_subcommands().filter(|below| !below.is_hide_set()) {
        man_page_and_below(below, dir)?;
    }
    let man = clap_mangen::Man::new(command.clone());
    let mut page = Vec::new();
    man.render(&mut page)?;
    let page = with_examples(&String::from_utf8_lossy(&page));
    std::fs::write(dir.join(man.get_filename()), in_ascii(&page))
}

/// The generator puts what a help text says at its end under "EXTRA"; readers of man pages look for notes and examples.
fn with_examples(page: &str) -> String {
    page.replace(".SH EXTRA\nExamples:\n", ".SH EXAMPLES\n")
        .replace(".SH EXTRA\nExample:\n", ".SH EXAMPLES\n")
        .replace(".SH EXTRA\n", ".SH NOTES\n")
        .replace("\n\nExample:\n", "\n.SH EXAMPLES\n")
}

/// roff's input is ASCII; every other character has a name, and only those that read it through a converter (as `man` does)
/// do without.
fn in_ascii(page: &str) -> String {
    use std::fmt::Write as _;
    page.chars().fold(String::with_capacity(page.len()), |mut out, c| {
        if c.is_ascii() {
            out.push(c);
        } else {
            let _ = write!(out, "\\[u{:04X}]", u32::from(c));
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_ascii_whatever_help_says() {
        assert_eq!(in_ascii("a … \u{1F600}\n"), "a \\[u2026] \\[u1F600]\n");
    }
}
