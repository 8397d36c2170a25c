//! Any bytes as a manifest, an index or a configuration: see `tests/fuzzed`. Run with `RUSTC_BOOTSTRAP=1 cargo fuzz run manifest`.

#![no_main]

#[path = "../../tests/fuzzed/mod.rs"]
mod fuzzed;

fuzzed::fuzz!("manifest");
