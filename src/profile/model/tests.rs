//! Profiles against a plain model: a list of runs, and for each chunk which of them touched it.

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::profile::{ReadFrom, RecordedRead};
use crate::units::{TarOffset, TarRange};

fn layers() -> Vec<ProfiledLayer> {
    ["base", "app"]
        .iter()
        .map(|name| ProfiledLayer {
            key: ProfileKey::of(name),
            size: 100 * CHUNK_BYTES,
        })
        .collect()
}

/// A run that reads these chunks, a millisecond after the other.
fn run(chunks: &[(u32, u32)]) -> StartRun {
    let reads: Vec<RecordedRead> = (0..)
        .zip(chunks)
        .map(|(ms, (layer, chunk))| RecordedRead {
            at: Duration::from_millis(ms),
            layer: LayerId(*layer),
            range: TarRange::new(TarOffset(u64::from(*chunk) * CHUNK_BYTES), 100),
            from: ReadFrom::Memory,
            waited: None,
        })
        .collect();
    StartRun::of(&reads)
}

fn learned(runs: &[Vec<(u32, u32)>]) -> Profile {
    let mut profile = Profile::new(layers());
    for chunks in runs {
        profile.learn(&run(chunks));
    }
    profile
}

/// Any profile that can be learned.
pub(in crate::profile) fn any_profile() -> impl Strategy<Value = Profile> {
    any_runs().prop_map(|runs| learned(&runs))
}

fn any_runs() -> impl Strategy<Value = Vec<Vec<(u32, u32)>>> {
    prop::collection::vec(prop::collection::vec((0_u32..2, 0_u32..100), 0..60), 0..8)
}

/// The chunks that are fetched, in order.
fn fetched(profile: &Profile) -> Vec<(u32, u32)> {
    let likely = profile.likely(&layers());
    likely
        .iter()
        .flat_map(|range| range.keys())
        .map(|key| (key.layer.0, key.index))
        .collect()
}

proptest! {
    #[test]
    fn it_is_what_a_list_of_all_runs_says(runs in any_runs()) {
        let profile = learned(&runs);
        let mut scores: BTreeMap<(u32, u32), f64> = BTreeMap::new();
        let mut possible = 0.0;
        for (number, run) in runs.iter().enumerate() {
            let run: std::collections::BTreeSet<_> = run.iter().collect();
            let is_small = run.len() * 4 < fetched(&learned(&runs[..number])).len();
            let (keeps, gain) = if is_small { (15.0 / 16.0, 16.0) } else { (0.75, 64.0) };
            for score in scores.values_mut() {
                *score *= keeps;
            }
            possible = possible * keeps + gain;
            for chunk in run {
                *scores.entry(*chunk).or_default() += gain;
            }
        }
        let fetched = fetched(&profile);
        let mut once = fetched.clone();
        once.sort_unstable();
        once.dedup();
        prop_assert_eq!(once.len(), fetched.len(), "each chunk once");
        // Scores are whole numbers: what lies close to the border may fall on either side of it.
        for (chunk, score) in &scores {
            let share = score / f64::max(possible, 1.0);
            if share > 0.53 {
                prop_assert!(fetched.contains(chunk), "{chunk:?} is read {share}");
            }
            if share < 0.47 {
                prop_assert!(!fetched.contains(chunk), "{chunk:?} is read {share}");
            }
        }
        prop_assert!(fetched.iter().all(|chunk| scores.contains_key(chunk)));
    }

    #[test]
    fn one_run_comes_in_its_own_order(chunks in prop::collection::vec((0_u32..2, 0_u32..100), 1..60)) {
        let profile = learned(std::slice::from_ref(&chunks));
        let mut first: Vec<(u32, u32)> = Vec::new();
        for chunk in &chunks {
            if !first.contains(chunk) {
                first.push(*chunk);
            }
        }
        let fetched = fetched(&profile);
        prop_assert_eq!(fetched.len(), first.len());
        // But for chunks that lie beside each other and were read in the same moment, which come together.
        for (at, chunk) in fetched.iter().enumerate() {
            let was = first.iter().position(|other| other == chunk).unwrap();
            prop_assert!(was.abs_diff(at) <= 60, "{chunk:?} comes as {at} and was {was}");
        }
    }
}

#[test]
fn what_the_last_runs_read_counts_most() {
    let profile = learned(&[vec![(0, 1), (0, 5)], vec![(0, 1)], vec![(0, 1), (1, 9)]]);
    // Of 5 only the first run knew, of 9 the last.
    assert_eq!(fetched(&profile), [(0, 1)]);
    let profile = learned(&[vec![(0, 1), (0, 5)], vec![(0, 1), (1, 9)]]);
    assert_eq!(fetched(&profile), [(0, 1), (1, 9)]);
    // Another program: after a few starts nothing is known of the first.
    let mut profile = learned(&vec![vec![(0, 1)]; 20]);
    for _ in 0..9 {
        profile.learn(&run(&[(1, 7)]));
    }
    assert_eq!(profile.entries().len(), 1);
    assert_eq!(fetched(&profile), [(1, 7)]);
    assert!(profile.percent(&profile.entries()[0]) > 90);
}

#[test]
fn who_only_looks_into_an_image_changes_little() {
    let program: Vec<(u32, u32)> = (0..50).map(|chunk| (0, chunk)).collect();
    let mut profile = learned(std::slice::from_ref(&program));
    for _ in 0..3 {
        profile.learn(&run(&[(0, 0), (1, 3)]));
    }
    assert!(fetched(&profile).len() >= 50);
    // Who always does is a program of his own.
    for _ in 0..20 {
        profile.learn(&run(&[(0, 0), (1, 3)]));
    }
    assert_eq!(fetched(&profile), [(0, 0), (1, 3)]);
}

#[test]
fn ranges_are_clipped_to_the_layers_that_are_there() {
    let profile = learned(&[vec![(0, 3), (0, 4), (1, 8), (1, 200)]]);
    let both = layers();
    let count = |layers: &[ProfiledLayer]| profile.likely(layers).iter().map(|range| range.count()).sum::<u32>();
    assert_eq!(count(&both), 3, "there is no chunk 200");
    let turned = [both[1], both[0]];
    assert_eq!(profile.likely(&turned)[0].layer, LayerId(1));
    assert_eq!(count(&both[1..]), 1);
    // The same layer with another length is another one.
    let shorter = ProfiledLayer {
        size: 4 * CHUNK_BYTES,
        ..both[0]
    };
    assert_eq!(count(&[shorter]), 0);
    assert_eq!(count(&[]), 0);
}

#[test]
fn a_layer_is_known_by_itself() {
    let profile = learned(&[vec![(0, 3), (1, 8), (1, 9)]]);
    let app = profile.of_layer(1);
    assert_eq!(app.layers(), &layers()[1..]);
    assert_eq!(app.likely(&layers()).iter().map(|range| range.count()).sum::<u32>(), 2);
    assert!(profile.of_layer(7).layers().is_empty());
}

#[test]
fn what_is_too_much_is_left_out() {
    let big = ProfiledLayer {
        key: ProfileKey::of("big"),
        size: u64::from(u32::MAX) * CHUNK_BYTES,
    };
    let mut profile = Profile::new(vec![big]);
    let apart = |n: u32| (0, n * 3);
    profile.learn(&run(&(0..5000).map(apart).collect::<Vec<_>>()));
    assert_eq!(profile.entries().len(), MOST_ENTRIES);
    assert_eq!(profile.entries()[0].chunks.first, 0);
    // All of it is long: the first of what is equally likely stays.
    let mut long = Profile::new(vec![big]);
    let whole = |n: u64| RecordedRead {
        at: Duration::from_secs(n),
        layer: LayerId(0),
        range: TarRange::new(TarOffset(n << 30), 1 << 29),
        from: ReadFrom::Disk,
        waited: None,
    };
    long.learn(&StartRun::of(&(0..7).map(whole).collect::<Vec<_>>()));
    assert_eq!((long.count(), long.bytes()), (4, 2 << 30));
}
