//! Any bytes as a map file of the disk cache: see `tests/fuzzed`. Run with `RUSTC_BOOTSTRAP=1 cargo fuzz run cache_map`.

#![no_main]

#[path = "../../tests/fuzzed/mod.rs"]
mod fuzzed;

fuzzed::fuzz!("cache_map");
