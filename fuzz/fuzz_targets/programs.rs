//! Any bytes as an ELF file, a script, a compiled Python module, JavaScript: see `tests/fuzzed`. Run with `RUSTC_BOOTSTRAP=1 cargo fuzz run programs`.

#![no_main]

#[path = "../../tests/fuzzed/mod.rs"]
mod fuzzed;

fuzzed::fuzz!("programs");
