//! Bytes through programs that nobody here wrote: gzip's own, and whatever else packs from standard input to standard output.

use std::io::Write as _;
use std::process::{Command, Stdio};

/// What `program` (its name, then its arguments) makes of `input`. It has to be installed, and to end well.
pub(crate) fn through(program: &[&str], input: &[u8]) -> Vec<u8> {
    let mut child = Command::new(program[0])
        .args(&program[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{} is needed: {error}", program[0]));
    let mut to = child.stdin.take().unwrap();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || to.write_all(input).unwrap());
        child.wait_with_output().unwrap()
    });
    assert!(output.status.success(), "{program:?}: {}", output.status);
    output.stdout
}

/// gzip's own program, which every machine has; without the time, so that it is the same each time.
pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    through(&["gzip", "-6", "-n"], bytes)
}
