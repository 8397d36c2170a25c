//! A small harness for tests that are their own daemon: the program is run again with [`DAEMON`] as its only argument, which
//! the usual harness would take for a filter.
//!
//! Understands what `cargo test` passes along: filters, `--list`, `--exact`, and ignores the rest.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

/// The hidden subcommand under which a test program is a daemon.
pub(crate) const DAEMON: &str = "serve-as-daemon";

/// A test: its name and what it does.
pub(crate) type Case = (&'static str, fn());

/// Runs the cases that the arguments ask for, one after the other.
pub(crate) fn run(cases: &[Case], skip: Option<String>) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let filters: Vec<&String> = arguments.iter().filter(|argument| !argument.starts_with('-')).collect();
    let exact = arguments.iter().any(|argument| argument == "--exact");
    let wanted = |name: &str| {
        filters.is_empty()
            || filters
                .iter()
                .any(|filter| if exact { *filter == name } else { name.contains(*filter) })
    };
    let cases: Vec<&Case> = cases.iter().filter(|(name, _)| wanted(name)).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        for (name, _) in &cases {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    if let Some(why) = skip {
        for (name, _) in &cases {
            eprintln!("SKIP: {name}: {why}");
        }
        println!(
            "\ntest result: ok. 0 passed; 0 failed; {} ignored ({why})\n",
            cases.len()
        );
        return ExitCode::SUCCESS;
    }
    println!("\nrunning {} tests", cases.len());
    let mut failed = Vec::new();
    for (name, case) in &cases {
        let began = Instant::now();
        let passed = catch_unwind(AssertUnwindSafe(case)).is_ok();
        let took = began.elapsed().as_secs_f64();
        println!("test {name} ... {} ({took:.2} s)", if passed { "ok" } else { "FAILED" });
        if !passed {
            failed.push(*name);
        }
    }
    println!(
        "\ntest result: {} passed; {} failed {failed:?}\n",
        cases.len() - failed.len(),
        failed.len()
    );
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}
