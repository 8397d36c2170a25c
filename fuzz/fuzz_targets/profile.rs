//! Any bytes as a profile of a start: see `tests/fuzzed`. Run with `RUSTC_BOOTSTRAP=1 cargo fuzz run profile`.

#![no_main]

#[path = "../../tests/fuzzed/mod.rs"]
mod fuzzed;

fuzzed::fuzz!("profile");
