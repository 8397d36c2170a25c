//! Any bytes as signatures of indexes, annotations that name them, manifests that are to name them, and keys: see `tests/fuzzed`. Run
//! with `RUSTC_BOOTSTRAP=1 cargo fuzz run trust`.

#![no_main]

#[path = "../../tests/fuzzed/mod.rs"]
mod fuzzed;

fuzzed::fuzz!("trust");
