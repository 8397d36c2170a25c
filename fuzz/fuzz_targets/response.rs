//! Any bytes as the head of an HTTP answer: see `tests/fuzzed`. Run with `RUSTC_BOOTSTRAP=1 cargo fuzz run response`.

#![no_main]

#[path = "../../tests/fuzzed/mod.rs"]
mod fuzzed;

fuzzed::fuzz!("response");
