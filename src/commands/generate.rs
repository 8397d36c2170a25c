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
    clap_mangen::generate_to(Cli::command(), dir)
}
