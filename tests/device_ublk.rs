//! The ublk back end, where the kernel has it: the same cases as on a loop device. Where it has not they are skipped loudly;
//! `tools/test` runs this program in a guest that has.

mod support;

use std::process::ExitCode;

use support::{device_cases, harness};
use tarblk::internals::device::{BackendChoice, ublk};

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(harness::DAEMON) {
        return device_cases::daemon_main();
    }
    device_cases::choose(BackendChoice::Ublk);
    harness::run(device_cases::CASES, support::missing(ublk::preflight().err()))
}
