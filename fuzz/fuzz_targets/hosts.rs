//! Any bytes as a `hosts.toml`: see `tests/fuzzed`. Run with `RUSTC_BOOTSTRAP=1 cargo fuzz run hosts`.

#![no_main]

#[path = "../../tests/fuzzed/mod.rs"]
mod fuzzed;

fuzzed::fuzz!("hosts");
