//! What a person types. In: arguments. Out: exit codes, results on standard output, one line on standard error when
//! something failed.
//!
//! Every command is a module with one function that takes its arguments and a [`Session`]. This room composes the others
//! and decides nothing about bytes.

mod cli;
mod generate;
pub mod output;

use std::process::ExitCode;

use clap::Parser;

use crate::interrupt::Interrupted;
pub use cli::Cli;
use cli::{Command, TalkArgs};
use output::{ReaderGone, Talk};

/// It did not work.
const FAILED: u8 = 1;

/// What every command is told besides its arguments.
#[derive(Clone, Copy, Debug, Default)]
pub struct Session {
    /// How much it may say.
    pub talk: Talk,
}

/// Runs the command line of this process and returns its exit code: 0, 1 (failed) or 2 (usage).
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => e.exit(),
    };
    start_log(cli.talk);
    let session = Session {
        talk: Talk { quiet: cli.talk.quiet },
    };
    match run(cli.command, session) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if e.is::<ReaderGone>() => ExitCode::SUCCESS,
        Err(e) => {
            report(&e);
            ExitCode::from(FAILED)
        }
    }
}

/// Runs one command.
fn run(command: Command, session: Session) -> anyhow::Result<()> {
    match command {
        Command::Generate(what) => generate::run(&what),
        _ => anyhow::bail!("not wired"),
    }
}

/// Says in one line what went wrong: the causes from the outside in.
fn report(error: &anyhow::Error) {
    let line = one_line(error);
    // With standard error gone there is nobody to tell.
    let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("tarblk: {line}\n"));
}

/// The causes of an error in one line, a cause that repeats what was said left out.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let cause = cause.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        if line.ends_with(&cause) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        line.push_str(&cause);
    }
    line
}

/// Sends the log to standard error: warnings, and more with `-v`.
fn start_log(talk: TalkArgs) {
    let level = match (talk.quiet, talk.verbose) {
        (true, _) => "error",
        (_, 0) => "warn",
        (_, 1) => "tarblk=info,warn",
        (_, 2) => "tarblk=debug,info",
        _ => "trace",
    };
    let mut builder = env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level));
    builder.format(|out, record| {
        use std::io::Write;
        let level = record.level().as_str().to_ascii_lowercase();
        writeln!(out, "tarblk: {level}: {}", record.args())
    });
    // A second logger (in a test) is no reason to fail.
    let _ = builder.try_init();
}

/// Whether the person ended it.
fn _is_interrupt(error: &anyhow::Error) -> bool {
    error.is::<Interrupted>()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_take_one_line() {
        let inner = std::io::Error::other("no\nroute");
        let error = anyhow::Error::new(inner).context("cannot read").context("layer.tar");
        assert_eq!(one_line(&error), "layer.tar: cannot read: no route");
        let twice = anyhow::anyhow!("it broke").context("first: it broke");
        assert_eq!(one_line(&twice), "first: it broke");
    }
}
