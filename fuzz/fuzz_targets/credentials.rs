//! Any bytes as a credentials file, Docker's or containers': see `tests/fuzzed`. Run with `RUSTC_BOOTSTRAP=1 cargo fuzz run credentials`.

#![no_main]

#[path = "../../tests/fuzzed/mod.rs"]
mod fuzzed;

fuzzed::fuzz!("credentials");
