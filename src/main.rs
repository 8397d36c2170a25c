//! The `tarblk` command.

fn main() {}
