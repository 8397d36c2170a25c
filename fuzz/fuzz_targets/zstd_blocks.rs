//! Any bytes as a zstd layer that is entered at its blocks: see `tests/fuzzed`. Run with `RUSTC_BOOTSTRAP=1 cargo fuzz run zstd_blocks`.

#![no_main]

#[path = "../../tests/fuzzed/mod.rs"]
mod fuzzed;

fuzzed::fuzz!("zstd_blocks");
