//! What a person types. In: arguments. Out: exit codes, results on standard output, one line on standard error when
//! something failed.
//!
//! Every command is a module with one function that takes its arguments and a [`Session`]. This room composes the others
//! and decides nothing about bytes.

mod attach;
mod bench;
mod cache;
mod cli;
mod container_image;
mod content;
mod demo;
mod diff;
mod doctor;
mod generate;
mod index;
mod install;
mod layer;
mod laziness;
mod logging;
mod logs;
mod mount_helper;
pub mod output;
mod podman;
mod profile;
mod ps;
mod publish;
mod registry;
mod replace;
mod run;
mod service;
mod setup;
mod snapshotter;
mod stats;
mod trace;
mod waits;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;
use clap::error::{ContextKind, ContextValue};

pub use cli::Cli;
use cli::{Command, SnapshotterCommand};
use output::{ReaderGone, Talk, without_errno};

use crate::container::ContainerError;
use crate::excerpt;

/// It did not work.
const FAILED: u8 = 1;

/// It was not asked for in a way that makes sense.
const USAGE: u8 = 2;

/// What every command is told besides its arguments.
#[derive(Clone, Copy, Debug, Default)]
pub struct Session {
    /// How much it may say.
    pub talk: Talk,
}

/// Arguments that do not fit each other; the sentence says which.
#[derive(Debug, thiserror::Error)]
#[error("{0}; see --help")]
struct UsageError(String);

/// Runs the command line of this process and returns its exit code: 0, 1 (failed) or 2 (usage).
#[must_use]
pub fn main() -> ExitCode {
    let mut typed: Vec<OsString> = std::env::args_os().collect();
    let (mut failed, mut usage) = (FAILED, USAGE);
    if mount_helper::is_meant(typed.first().map(OsString::as_os_str)) {
        (failed, usage) = (mount_helper::FAILED_STATUS, mount_helper::USAGE_STATUS);
        match mount_helper::parse(typed.into_iter().skip(1)) {
            Ok(wanted) if wanted.is_fake => return ExitCode::SUCCESS,
            Ok(wanted) => typed = wanted.arguments,
            Err(why) => {
                report(&anyhow::anyhow!("{}: {why}", mount_helper::NAME));
                return ExitCode::from(usage);
            }
        }
    }
    let cli = match Cli::try_parse_from(typed).map_err(without_wrong_tips) {
        Ok(cli) => cli,
        Err(e) if e.use_stderr() => {
            // Where standard error is closed there is no other place for it.
            let _ = e.print();
            return ExitCode::from(usage);
        }
        Err(e) => e.exit(),
    };
    if let Command::ServeDevices { arguments } = &cli.command {
        logging::start_daemon();
        return attach::serve(arguments);
    }
    // What is read later has times.
    if matches!(&cli.command, Command::Snapshotter(args) if args.what.is_none()) {
        logging::start_daemon();
    }
    if matches!(cli.command, Command::Run(_)) {
        failed = run::FAILED;
        usage = run::FAILED;
    }
    logging::start(cli.talk);
    let session = Session {
        talk: Talk {
            quiet: cli.talk.quiet,
            verbose: cli.talk.verbose > 0,
        },
    };
    match run(&cli.command, session) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if e.is::<ReaderGone>() => ExitCode::SUCCESS,
        Err(e) => {
            // That was its own business.
            if let Some(run::Ended(status)) = e.downcast_ref() {
                return ExitCode::from(*status);
            }
            report(&e);
            let failed = e.downcast_ref().and_then(ContainerError::status).unwrap_or(failed);
            ExitCode::from(if e.is::<UsageError>() { usage } else { failed })
        }
    }
}

/// A usage error without the advice to pass an unknown option as a value: that is for files whose names begin with a dash, so
/// it stays where there is one.
fn without_wrong_tips(mut error: clap::Error) -> clap::Error {
    let is_file = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(arg)) => std::path::Path::new(arg).exists(),
        _ => false,
    };
    let tips = error.get(ContextKind::Suggested).cloned();
    if let (false, Some(ContextValue::StyledStrs(mut tips))) = (is_file, tips) {
        tips.retain(|tip| !tip.to_string().contains("as a value"));
        error.remove(ContextKind::Suggested);
        if !tips.is_empty() {
            error.insert(ContextKind::Suggested, ContextValue::StyledStrs(tips));
        }
    }
    error
}

/// Runs one command.
fn run(command: &Command, session: Session) -> anyhow::Result<()> {
    match command {
        Command::Index(args) => index::run(args, session),
        Command::Ls(args) => layer::ls(args, session),
        Command::Diff(args) => diff::diff(args, session),
        Command::Image(args) => layer::image(args, session),
        Command::Attach(args) => attach::attach(args, session),
        Command::Mount(args) => attach::mount(args, session),
        Command::Umount(args) => attach::umount(args, session),
        Command::Detach(args) => {
            // Their devices go with them.
            run::remove_left();
            attach::detach(args, session)
        }
        Command::Ps(args) => ps::ps(args, session),
        Command::Stats(args) => stats::stats(args, session),
        Command::Trace(args) => trace::trace(args, session),
        Command::Profile(args) => profile::profile(args, session),
        Command::Doctor(args) => doctor::doctor(args, session),
        Command::Cache(args) => cache::cache(args, session),
        Command::Logs(args) => logs::logs(args),
        Command::Bench(args) => bench::run(args, session),
        Command::Generate(what) => generate::run(what),
        Command::Install(args) => install::run(args, session),
        Command::Demo(args) => demo::run(args, session),
        Command::Service(args) => service::run(args, session),
        Command::Upgrade => attach::upgrade(session),
        Command::Snapshotter(args) => match &args.what {
            Some(SnapshotterCommand::Setup(args)) => setup::run(args, session),
            None => snapshotter::run(args),
        },
        Command::Content(what) => content::run(what, session),
        Command::Podman(args) => podman::run(args, session),
        Command::Run(args) => run::run(args, session),
        Command::ServeDevices { .. } => Ok(()),
    }
}

/// Says in one line what went wrong: the causes from the outside in.
fn report(error: &anyhow::Error) {
    let line = one_line(error);
    // Where standard error is closed there is no other place for it.
    let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("tarblk: {line}\n"));
}

/// The causes of an error in one line, a cause that repeats what was said left out.
fn one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let cause = without_errno(&cause.to_string());
        let cause = cause.split_whitespace().collect::<Vec<_>>().join(" ");
        if line.ends_with(&cause) || line.contains(&format!(": {cause}")) {
            continue;
        }
        if !line.is_empty() {
            line.push_str(": ");
        }
        // Names from layers and command lines must not move the cursor or colour the screen.
        line.push_str(&excerpt::of_line(&cause));
    }
    line
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
        let numbered = anyhow::Error::new(std::io::Error::from_raw_os_error(2)).context("cannot open x");
        assert_eq!(one_line(&numbered), "cannot open x: No such file or directory");
        let red = anyhow::anyhow!("\u{1b}[31mred: no such layer");
        assert_eq!(one_line(&red), "\\u{1b}[31mred: no such layer");
    }
}
