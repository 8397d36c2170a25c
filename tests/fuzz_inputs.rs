//! The fuzz targets of `fuzzed`, on a bounded number of inputs that follow from a seed: those to begin with, and what becomes of them
//! when bytes are changed, cut, doubled and mixed. What fails is printed as the input that it was.
//!
//! `TARBLK_FUZZ_RUNS=N` tries so many on each target.

mod fuzzed;

use fuzzed::{TARGETS, Target};

/// Inputs for each target in a usual run: together some seconds.
const USUAL: u64 = 3000;
/// No input is longer.
const LONGEST: usize = 8 << 10;

/// Sebastiano Vigna's splitmix64.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        let bound = u64::try_from(bound.max(1)).unwrap();
        usize::try_from(self.next() % bound).unwrap()
    }
}

/// Changes an input as a fuzzer does, once.
fn mutate(input: &mut Vec<u8>, other: &[u8], chance: &mut Chance) {
    const WORDS: [&[u8]; 20] = [
        b"\"",
        b"\\",
        b"\0",
        b"\x1b[2J",
        b"\xff",
        b"\n",
        b"{",
        b"]",
        b"null",
        b"-1",
        b"1e999",
        b"18446744073709551615",
        b"9223372036854775808",
        b"0",
        b"\\u0007",
        b"\xe2\x80\xae",
        b"'",
        b"/",
        b"..",
        b":",
    ];
    let at = chance.below(input.len() + 1);
    match chance.below(9) {
        0 if !input.is_empty() => {
            let at = at.min(input.len() - 1);
            input[at] ^= 1 << chance.below(8);
        }
        1 if !input.is_empty() => {
            let at = at.min(input.len() - 1);
            input[at] = u8::try_from(chance.below(256)).unwrap();
        }
        2 => {
            let to = (at + chance.below(20)).min(input.len());
            input.drain(at..to);
        }
        3 => {
            let to = (at + chance.below(200)).min(input.len());
            let piece = input[at..to].to_vec();
            let times = 1 + chance.below(5);
            input.splice(at..at, piece.repeat(times));
        }
        4 | 5 => {
            let word = WORDS[chance.below(WORDS.len())];
            input.splice(at..at, word.iter().copied());
        }
        6 => {
            let from = chance.below(other.len() + 1);
            let to = (from + chance.below(100)).min(other.len());
            input.splice(at..at, other[from..to].iter().copied());
        }
        7 => input.truncate(at),
        _ => {
            let word = WORDS[chance.below(WORDS.len())];
            let times = 1 + chance.below(600);
            input.splice(at..at, word.repeat(times));
        }
    }
    input.truncate(LONGEST);
}

/// Runs a target on one input; a failure names it.
fn check(target: &Target, input: &[u8]) {
    let outcome = std::panic::catch_unwind(|| (target.check)(input));
    if let Err(why) = outcome {
        let why = why
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| why.downcast_ref::<&str>().copied())
            .unwrap_or("a panic");
        panic!("{}: {why}\nthe input: b\"{}\"", target.name, input.escape_ascii());
    }
}

fn runs() -> u64 {
    std::env::var("TARBLK_FUZZ_RUNS").map_or(USUAL, |text| text.parse().expect("TARBLK_FUZZ_RUNS is a number"))
}

fn try_out(name: &str) {
    let target = TARGETS
        .iter()
        .find(|target| target.name == name)
        .expect("a target of this name");
    let seeds = (target.seeds)();
    for seed in &seeds {
        check(target, seed);
    }
    check(target, b"");
    let mut chance = Chance(0);
    for _ in 0..runs() {
        let mut input = seeds[chance.below(seeds.len())].clone();
        let other = &seeds[chance.below(seeds.len())];
        for _ in 0..=chance.below(6) {
            mutate(&mut input, other, &mut chance);
        }
        check(target, &input);
    }
}

/// Every target is run by a test below, and has a program for the fuzzer.
#[test]
fn every_target_is_run() {
    let own = include_str!("fuzz_inputs.rs");
    let manifest = include_str!("../fuzz/Cargo.toml");
    for target in TARGETS {
        assert!(
            own.contains(&format!("try_out(\"{}\")", target.name)),
            "{}",
            target.name
        );
        assert!(
            manifest.contains(&format!("name = \"{}\"", target.name)),
            "{}",
            target.name
        );
    }
}

#[test]
fn maps_of_the_cache() {
    try_out("cache_map");
}

#[test]
fn credentials_files() {
    try_out("credentials");
}

#[test]
fn hosts_files() {
    try_out("hosts");
}

#[test]
fn manifests_and_configurations() {
    try_out("manifest");
}

#[test]
fn profile() {
    try_out("profile");
}

#[test]
fn programs() {
    try_out("programs");
}

#[test]
fn heads_of_answers() {
    try_out("response");
}

#[test]
fn state_files() {
    try_out("state");
}

#[test]
fn challenges_and_tokens() {
    try_out("token");
}

#[test]
fn signatures_annotations_and_keys() {
    try_out("trust");
}

#[test]
fn blocks_of_zstd_frames() {
    try_out("zstd_blocks");
}
