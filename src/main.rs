//! The `tarblk` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    tarblk::run_command()
}
