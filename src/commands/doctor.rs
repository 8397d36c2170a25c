//! `tarblk doctor`: what keeps tarblk from working, and what to do about it. In: this machine, and a source perhaps. Out: one line
//! for each thing that was looked at; nothing is changed.

mod machine;
mod remote;

use std::fmt::Write as _;

use serde::Serialize;

use super::Session;
use super::cli::DoctorArgs;
use super::output::{print, println};
use crate::excerpt;
use machine::Machine;

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Health {
    /// As it should be.
    Ok,
    /// Works, but worse than it could.
    Warning,
    /// Something does not work.
    Problem,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    /// What was looked at, in a word or two.
    name: &'static str,
    state: Health,
    /// How it is.
    found: String,
    /// What to do; none where nothing is to be done.
    advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            state: Health::Ok,
            found: found.into(),
            advice: None,
        }
    }

    fn warning(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            name,
            state: Health::Warning,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }

    fn problem(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            state: Health::Problem,
            ..Self::warning(name, found, advice)
        }
    }
}

/// What `doctor --json` says.
#[derive(Debug, Serialize)]
struct DoctorReport<'a> {
    /// The worst of all.
    state: Health,
    checks: &'a [Check],
}

/// `tarblk doctor`.
pub(super) fn doctor(args: &DoctorArgs, _: Session) -> anyhow::Result<()> {
    let mut checks = Machine::this(args.cache.clone()).checks();
    if let Some(source) = &args.source {
        checks.extend(remote::checks(source, &args.registry)?);
    }
    let state = checks.iter().map(|check| check.state).max().unwrap_or(Health::Ok);
    if args.json {
        let checks = &checks;
        println(serde_json::to_string_pretty(&DoctorReport { state, checks })?)?;
    } else {
        print(text(&checks))?;
    }
    match checks.iter().filter(|check| check.state == Health::Problem).count() {
        0 => Ok(()),
        1 => anyhow::bail!("there is a problem"),
        count => anyhow::bail!("there are {count} problems"),
    }
}

/// The checks for people: a line each, and what to do below it.
fn text(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for check in checks {
        let state = match check.state {
            Health::Ok => "ok     ",
            Health::Warning => "warning",
            Health::Problem => "PROBLEM",
        };
        let _infallible = writeln!(
            text,
            "{state}  {:width$}  {}",
            check.name,
            excerpt::of_line(&check.found)
        );
        if let Some(advice) = &check.advice {
            let _infallible = writeln!(text, "{:width$}           -> {}", "", excerpt::of_line(advice));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_says_how_it_is_and_what_to_do() {
        let checks = [
            Check::ok("kernel", "Linux 6.12"),
            Check::problem("back end", "no\u{1b}[31m FUSE", "modprobe fuse"),
        ];
        assert_eq!(
            text(&checks),
            "ok       kernel    Linux 6.12\nPROBLEM  back end  no\\u{1b}[31m FUSE\n                   -> modprobe fuse\n"
        );
    }
}
