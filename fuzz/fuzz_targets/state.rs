//! Any bytes as a state file: see `tests/fuzzed`. Run with `RUSTC_BOOTSTRAP=1 cargo fuzz run state`.

#![no_main]

#[path = "../../tests/fuzzed/mod.rs"]
mod fuzzed;

fuzzed::fuzz!("state");
