//! The FUSE-and-loop back end, natively: daemons that serve an image cut from a plain ext4 file.

mod support;

use std::process::ExitCode;

use support::{device_cases, harness};
use tarblk::internals::device::{BackendChoice, fuse_loop};

fn main() -> ExitCode {
    if std::env::args().nth(1).as_deref() == Some(harness::DAEMON) {
        return device_cases::daemon_main();
    }
    device_cases::choose(BackendChoice::Loop);
    harness::run(device_cases::CASES, support::missing(fuse_loop::preflight().err()))
}
