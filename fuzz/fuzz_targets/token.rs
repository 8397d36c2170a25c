//! Any bytes as a registry's challenge, a token server's answer: see `tests/fuzzed`. Run with `RUSTC_BOOTSTRAP=1 cargo fuzz run token`.

#![no_main]

#[path = "../../tests/fuzzed/mod.rs"]
mod fuzzed;

fuzzed::fuzz!("token");
