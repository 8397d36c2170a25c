use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::cache::disk::{CacheLimit, DiskCache};
use crate::cache::memory::MemoryCache;
use crate::fetch::content::Contents;
use crate::index::ChunkHasher;
use crate::units::len_u64;

/// Bytes that are nowhere the same.
fn noise(len: u64, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let step = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    };
    (0..len).map(step).collect()
}

fn range(start: u64, len: u64) -> TarRange {
    TarRange::new(TarOffset(start), len)
}

fn of(bytes: &[u8], range: TarRange) -> &[u8] {
    &bytes[len_usize(range.start.0)..len_usize(range.end().0)]
}

fn short(bytes: &[u8]) -> ShortDigest {
    let digest: [u8; 32] = Sha256::digest(bytes).into();
    *digest.first_chunk().unwrap()
}

/// A donor in a cache directory of its own.
struct World {
    dir: tempfile::TempDir,
    disk: Arc<DiskCache>,
    contents: Contents,
    key: LayerKey,
}

impl World {
    /// A cache that holds `donor`, but for the chunks in `absent`.
    fn new(donor: &[u8], absent: &[u32]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = DiskCache::open(dir.path(), CacheLimit::bytes(1 << 40)).unwrap();
        let key = LayerKey::of_content("donor", len_u64(donor.len()));
        let cache = disk.layer(key, len_u64(donor.len())).unwrap();
        for (index, chunk) in (0..).zip(donor.chunks(len_usize(CHUNK_BYTES))) {
            if !absent.contains(&index) {
                cache.put(TarOffset(u64::from(index) * CHUNK_BYTES), chunk);
            }
        }
        cache.commit().unwrap();
        Self {
            dir,
            disk,
            contents: Contents::new(Arc::new(MemoryCache::new(1 << 20))),
            key,
        }
    }

    fn lend(&self) -> Option<Arc<LayerContent>> {
        self.contents.lend(self.key, Some(&self.disk))
    }
}

fn verifier(layer: &[u8]) -> Verifier {
    let mut hasher = ChunkHasher::new();
    hasher.feed(layer);
    Verifier::chunk_digests(hasher.finish())
}

/// All of `range` by its parts, if donors have it.
fn read(table: &DedupTable, range: TarRange, verifier: &Verifier) -> Option<Vec<u8>> {
    let parts: Vec<Part> = table.holds(range).then(|| table.parts(range).collect())?;
    let read = |part: &Part| table.read(part, Some(verifier)).unwrap();
    Some(parts.iter().flat_map(read).collect())
}

#[test]
fn a_payload_is_read_from_its_donor_once_it_was_proven() {
    let long = PROVEN_WHOLE + 3 * CHUNK_BYTES;
    let donor = noise(2 * PROVEN_WHOLE + 4 * CHUNK_BYTES, 1);
    // Twenty thousand bytes, and a long payload that lies elsewhere in its chunks.
    let (small, small_from) = (range(700, 20_000), TarOffset(40_000));
    let (big, big_from) = (range(30_000, long), TarOffset(100_001));
    let mut layer = noise(30_000 + long + 5000, 2);
    for (to, from) in [(small, small_from), (big, big_from)] {
        let there = of(&donor, TarRange::new(from, to.len)).to_vec();
        layer[len_usize(to.start.0)..len_usize(to.end().0)].copy_from_slice(&there);
    }
    let verifier = verifier(&layer);
    let world = World::new(&donor, &[]);
    let extent = |range: TarRange, from, digest| SharedExtent {
        range,
        digest,
        donor: 0,
        from,
    };
    let shared = SharedPayloads {
        donors: vec![world.key],
        extents: vec![
            extent(big, big_from, [0; 20]),
            extent(small, small_from, short(of(&layer, small))),
        ],
        others: vec![range(21_000, 100)],
    };
    let size = len_u64(layer.len());
    let table = DedupTable::new(size, vec![world.lend()], &shared, true);
    assert!(matches!(table.locate(small), Some(AtDonors::Here)));
    let mut target = vec![0; 20_000];
    assert!(!table.read_at_once(small, &mut target), "it was not proven");
    assert!(read(&table, range(10_000, 5), &verifier).unwrap() == of(&layer, range(10_000, 5)));
    assert!(table.read_at_once(small, &mut target) && target == of(&layer, small));
    // Of a long one what lies in chunks of its own.
    let inside = range(CHUNK_BYTES, long - 2 * CHUNK_BYTES);
    assert!(read(&table, inside, &verifier).unwrap() == of(&layer, inside));
    let mut target = vec![0; len_usize(inside.len)];
    assert!(table.read_at_once(inside, &mut target) && target == of(&layer, inside));
    assert!(!table.holds(range(CHUNK_BYTES - 1, 2)) && !table.holds(range(20_690, 20)));
    assert!(!table.holds(range(0, 701)) && !table.holds(range(0, 0)));
    // Chunk 0 has bytes of others; all chunks inside of the long payload have not.
    let held: Vec<u32> = (0..40).filter(|index| table.holds_chunk(*index, size)).collect();
    assert_eq!(
        held,
        (1..u32::try_from(big.end().0 / CHUNK_BYTES).unwrap()).collect::<Vec<_>>()
    );
    // Without digests of chunks there is nothing to prove it by.
    assert!(!DedupTable::new(size, vec![world.lend()], &shared, false).holds(inside));
    assert_eq!(std::mem::size_of::<Extent>(), 56, "what is said of the bound");
}

#[test]
fn the_ends_of_a_long_payload_are_proven_by_pieces() {
    let long = PROVEN_WHOLE + 3 * CHUNK_BYTES;
    let donor = noise(2 * PROVEN_WHOLE, 1);
    let mut layer = noise(30_000 + long + 5000, 2);
    let (big, from) = (range(30_000, long), 1001);
    let there = of(&donor, range(from, long)).to_vec();
    layer[30_000..30_000 + len_usize(long)].copy_from_slice(&there);
    let verifier = verifier(&layer);
    let world = World::new(&donor, &[]);
    let extent = |at: u64, len: u64, lies: bool| {
        let part = range(30_000 + at, len);
        let digest = if lies { [1; 20] } else { short(of(&layer, part)) };
        SharedExtent {
            range: part,
            digest,
            donor: 0,
            from: TarOffset(from + at),
        }
    };
    let table = |extents| {
        let shared = SharedPayloads {
            donors: vec![world.key],
            extents,
            others: Vec::new(),
        };
        DedupTable::new(len_u64(layer.len()), vec![world.lend()], &shared, true)
    };
    // The first one ends before the chunk does in which it begins, the second one in the next; the last one begins before the last chunk.
    let pieces = |lies| {
        [
            extent(0, 2000, false),
            extent(2000, 50_000, lies),
            extent(long - 100_000, 100_000, false),
        ]
    };
    let whole = extent(0, long, true);
    let all = table([&pieces(false)[..], &[whole]].concat());
    for wanted in [
        big,
        range(30_000, 100),
        range(32_500, 1000),
        range(30_000 + long - 10, 10),
        range(31_000, 300_000),
    ] {
        assert!(read(&all, wanted, &verifier).unwrap() == of(&layer, wanted), "{wanted}");
    }
    let size = len_u64(layer.len());
    assert!(chunks(big).all(|index| all.holds_chunk(index, size)));
    // Without them the ends are in no extent, and one that is something else is found out.
    let alone = table(vec![whole]);
    assert!(read(&alone, big, &verifier).is_none() && read(&alone, range(65_536, 70_000), &verifier).is_some());
    let lying = table([&pieces(true)[..], &[whole]].concat());
    let part = lying.parts(range(32_500, 100)).next().unwrap();
    assert!(matches!(lying.read(&part, Some(&verifier)), Err(DonorFault::Other)));
    assert!(!lying.holds(range(32_500, 100)) && lying.holds(range(30_000, 100)));
}

#[test]
fn of_extents_that_overlap_each_byte_is_served_by_one() {
    let donor = noise(4 * CHUNK_BYTES, 1);
    let mut layer = noise(40_000, 2);
    layer[1000..31_000].copy_from_slice(of(&donor, range(5000, 30_000)));
    let verifier = verifier(&layer);
    let world = World::new(&donor, &[]);
    let extent = |start: u64, len: u64, lies: bool| SharedExtent {
        range: range(start, len),
        digest: if lies {
            [1; 20]
        } else {
            short(of(&layer, range(start, len)))
        },
        donor: 0,
        from: TarOffset(start + 4000),
    };
    let table = |extents| {
        let shared = SharedPayloads {
            donors: vec![world.key],
            extents,
            others: Vec::new(),
        };
        DedupTable::new(len_u64(layer.len()), vec![world.lend()], &shared, true)
    };
    // The second one is served from where the first one ends, the third one lies in it, and the fourth one is the first once more.
    let (first, inside) = (extent(1000, 20_000, false), extent(3000, 100, true));
    let good = table(vec![extent(11_000, 20_000, false), inside, first, first]);
    assert_eq!(good.bytes(), 30_000);
    for wanted in [range(1000, 30_000), range(20_990, 20), range(3000, 100)] {
        assert!(
            read(&good, wanted, &verifier).unwrap() == of(&layer, wanted),
            "{wanted}"
        );
    }
    // One that is something else takes nothing from the other.
    let bad = table(vec![extent(11_000, 20_000, true), first]);
    let part = bad.parts(range(25_000, 10)).next().unwrap();
    assert!(matches!(bad.read(&part, Some(&verifier)), Err(DonorFault::Other)));
    assert!(!bad.holds(range(25_000, 10)) && bad.holds(range(1000, 20_000)));
}

#[test]
fn what_is_something_else_is_not_read_and_not_looked_for_again() {
    let donor = noise(3 * PROVEN_WHOLE, 1);
    let world = World::new(&donor, &[]);
    let layer = noise(3 * PROVEN_WHOLE, 2);
    let verifier = verifier(&layer);
    let lies = [range(0, 1000), range(CHUNK_BYTES, 2 * PROVEN_WHOLE)];
    let extents = lies.map(|range| SharedExtent {
        range,
        digest: short(of(&layer, range)),
        donor: 0,
        from: TarOffset(5),
    });
    let shared = SharedPayloads {
        donors: vec![world.key],
        extents: extents.to_vec(),
        others: Vec::new(),
    };
    let table = DedupTable::new(len_u64(layer.len()), vec![world.lend()], &shared, true);
    for lie in lies {
        let first = range(lie.start.0, 100);
        let part = table.parts(first).next().unwrap();
        assert_eq!(table.read(&part, Some(&verifier)), Err(DonorFault::Other));
        assert!(!table.holds(first) && table.locate(lie).is_none());
    }
    assert!(!table.holds_chunk(0, 3 * PROVEN_WHOLE) && !table.holds_chunk(5, 3 * PROVEN_WHOLE));
}

#[test]
fn damage_and_loss_of_a_donor_are_told() {
    let donor = noise(10 * CHUNK_BYTES, 1);
    let world = World::new(&donor, &[7]);
    let payload = |chunk: u64| range(chunk * CHUNK_BYTES + 5, 40_000);
    let extents: Vec<_> = [1, 4, 6]
        .map(payload)
        .map(|range| SharedExtent {
            range,
            digest: short(of(&donor, range)),
            donor: 0,
            from: range.start,
        })
        .to_vec();
    let shared = SharedPayloads {
        donors: vec![world.key],
        extents,
        others: Vec::new(),
    };
    let lent = world.lend().unwrap();
    let table = DedupTable::new(len_u64(donor.len()), vec![Some(lent.clone())], &shared, true);
    let first = |chunk| table.parts(payload(chunk)).next().unwrap();
    assert!(table.holds(payload(1)) && table.holds(payload(4)) && !table.holds(payload(6)));
    assert!(table.read(&first(1), None).is_ok());
    let cache = lent.cache.get().unwrap();
    let path = world.dir.path().join(format!("{}.data", world.key.hex()));
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", 2 * CHUNK_BYTES + 9).unwrap();
    let mut target = vec![0; 40_000];
    assert!(!table.read_at_once(payload(1), &mut target));
    assert_eq!(table.read(&first(1), None), Err(DonorFault::Damaged));
    assert_eq!(table.read(&first(1), None), Err(DonorFault::Gone));
    assert!(table.locate(payload(1)).is_none());
    // Given up.
    cache.lost(5);
    assert_eq!(table.read(&first(4), None), Err(DonorFault::Gone));
}

#[test]
fn a_donor_that_becomes_a_layer_by_other_rules_is_left() {
    let donor = noise(4 * CHUNK_BYTES, 1);
    let world = World::new(&donor, &[]);
    let payload = range(10, 5000);
    let shared = SharedPayloads {
        donors: vec![world.key],
        extents: vec![SharedExtent {
            range: payload,
            digest: short(of(&donor, payload)),
            donor: 0,
            from: payload.start,
        }],
        others: Vec::new(),
    };
    let size = len_u64(donor.len());
    let table = DedupTable::new(size, vec![world.lend()], &shared, true);
    let part = table.parts(payload).next().unwrap();
    assert!(table.read(&part, None).is_ok());
    let blob = crate::source::Blob::of_url(
        crate::source::UrlBlob::new(&"http://127.0.0.1:1/layer".parse().unwrap()),
        size,
    );
    let source = crate::fetch::LayerSource {
        layer: crate::source::LayerSpec {
            cached_as: Some("donor".to_owned()),
            ..blob.into()
        },
        coding: None,
        verifier: Some(verifier(&donor)),
        unproven: None,
    };
    let device = world.contents.of(&source, Some(&world.disk));
    assert!(!table.holds(payload) && !table.read_at_once(payload, &mut vec![0; 5000]));
    assert_eq!(table.read(&part, None), Err(DonorFault::Gone));
    // It has the files that were kept, and lends them by its rules.
    assert!(device.cache.get().unwrap().has(0));
    let again = DedupTable::new(size, vec![world.lend()], &shared, true);
    assert!(again.holds(payload) && world.lend().unwrap().is_constant());
    drop(device);
    assert!(again.read(&again.parts(payload).next().unwrap(), None).is_ok());
}

/// What a plain reading of the rules says of every byte of a layer: where a donor has it, if one has.
fn model(size: u64, shared: &SharedPayloads) -> Vec<Option<u64>> {
    let mut at = vec![None; len_usize(size)];
    let mut serve = |range: TarRange, extent: &SharedExtent| {
        for place in range.start.0..range.end().0 {
            let there = extent.from.0 + (place - extent.range.start.0);
            at[len_usize(place)].get_or_insert(there);
        }
    };
    // Long ones by the chunks inside of them; then whatever is proven as a whole, up to what is served already.
    let mut wanted = shared.extents.clone();
    wanted.retain(|extent| extent.range.end().0 <= size);
    wanted.sort_by_key(|extent| (extent.range.len <= PROVEN_WHOLE, extent.range.start));
    for extent in &wanted {
        if extent.range.len <= PROVEN_WHOLE {
            serve(extent.range, extent);
        } else {
            for index in chunks(extent.range) {
                let chunk = TarRange::new(TarOffset(u64::from(index) * CHUNK_BYTES), chunk_len(size, index));
                if chunk.start >= extent.range.start && chunk.end() <= extent.range.end() {
                    serve(chunk, extent);
                }
            }
        }
    }
    at
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Every byte that the table gives is the one that a plain model gives, and it gives what the model does.
    #[test]
    fn a_table_says_what_a_plain_model_says(
        places in proptest::collection::vec((1_u64..90_000, 0_u64..40_000, 0_u64..300_000), 1..12),
        long in proptest::option::of((0_u64..200_000, proptest::collection::vec(16_000_u64..90_000, 0..3), 0_u64..200_000)),
        absent in proptest::collection::vec(0_u32..60, 0..6),
        reads in proptest::collection::vec((0_u64..1_800_000, 1_u64..200_000), 20),
    ) {
        let donor = noise(60 * CHUNK_BYTES, 9);
        let mut layer = noise(200_000, 3);
        let (mut extents, mut others) = (Vec::new(), vec![range(0, 100)]);
        let mut add = |layer: &mut Vec<u8>, len: u64, from: u64, gap: u64| {
            layer.extend(noise(512 + gap, gap));
            let start = len_u64(layer.len());
            let there = range(from, len);
            layer.extend_from_slice(of(&donor, there));
            let digest = short(of(&donor, there));
            extents.push(SharedExtent { range: range(start, len), digest, donor: 1, from: TarOffset(from) });
        };
        for (len, gap, from) in places {
            add(&mut layer, len, from, gap);
        }
        if let Some((from, first, last)) = long {
            add(&mut layer, PROVEN_WHOLE + 100_000, from, 7);
            // Pieces at its ends, some of which end short of its first whole chunk.
            let whole = extents[extents.len() - 1].range;
            let mut at = 0;
            for (len, skip) in first.into_iter().map(|len| (len, 0)).chain([(last, whole.len - last)]) {
                at = at.max(skip);
                let piece = range(whole.start.0 + at, len);
                let digest = short(of(&layer, piece));
                extents.push(SharedExtent { range: piece, digest, donor: 1, from: TarOffset(from + at) });
                at += len;
            }
        }
        others.push(range(len_u64(layer.len()), 777));
        layer.extend(noise(777, 5));
        let size = len_u64(layer.len());
        let world = World::new(&donor, &absent);
        let shared = SharedPayloads { donors: vec![world.key; 2], extents, others: others.clone() };
        let table = DedupTable::new(size, vec![None, world.lend()], &shared, true);
        let model = model(size, &shared);
        let verifier = verifier(&layer);
        for (start, len) in reads {
            let wanted = range(start % size, len.min(size - start % size));
            let places = &model[len_usize(wanted.start.0)..len_usize(wanted.end().0)];
            let known = places.iter().all(Option::is_some);
            match read(&table, wanted, &verifier) {
                Some(bytes) => prop_assert!(known && bytes == of(&layer, wanted)),
                // All of a payload has to be here before it is proven.
                None => prop_assert!(!known || !absent.is_empty()),
            }
        }
        // A chunk is here when each byte that is a file's is; headers are none.
        let mut is_file = vec![false; len_usize(size)];
        for range in shared.extents.iter().map(|extent| extent.range).chain(others) {
            is_file[len_usize(range.start.0)..len_usize(range.end().0)].fill(true);
        }
        for index in 0..chunks(range(0, size)).end {
            let start = len_usize(u64::from(index) * CHUNK_BYTES);
            let chunk = start..(start + len_usize(CHUNK_BYTES)).min(len_usize(size));
            let mut files = chunk.filter(|at| is_file[*at]).peekable();
            if table.holds_chunk(index, size) {
                prop_assert!(files.peek().is_some() && files.all(|at| model[at].is_some()));
            } else if absent.is_empty() && files.peek().is_some() {
                prop_assert!(files.any(|at| model[at].is_none()));
            }
        }
    }
}
