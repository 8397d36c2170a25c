//! What a layer has in common with others that are here is not fetched again, and not kept twice: two images in a registry, on one machine.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod scripted;

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use common::anonymous::registry_options;
use common::noise::noise;
use common::packed::{gzip, through};
use common::rawtar::RawTar;
use scripted::TestRegistry;
use tarblk::internals::digest::Digest;
use tarblk::internals::fetch::{Fetcher, LayerRange, Located};
use tarblk::internals::open::publish::{PushOptions, push};
use tarblk::internals::open::{
    Cache, Fetching, IndexChoice, OpenOptions, Opened, Shared, TrustPolicy, Unwatched, prepare,
};
use tarblk::internals::source::registry::Reference;
use tarblk::internals::units::{CHUNK_BYTES, LayerId, TarOffset, TarRange};

const KINDS: [&str; 3] = ["tar", "tar+gzip", "tar+zstd"];

/// Nothing takes so long, on however busy a machine.
const PATIENCE: Duration = Duration::from_secs(600);

fn u(n: usize) -> u64 {
    u64::try_from(n).unwrap()
}

/// A tar, and where its files are.
struct Layer {
    tar: Vec<u8>,
    files: Vec<TarRange>,
}

/// A tar of these files.
fn layer(files: &[Vec<u8>]) -> Layer {
    let (mut tar, mut places) = (RawTar::new(), Vec::new());
    for (number, content) in files.iter().enumerate() {
        places.push(TarRange::new(TarOffset(u(tar.0.len()) + 512), u(content.len())));
        tar = tar.file(format!("dir{}/file{number}", number / 10).as_bytes(), content);
    }
    let tar = tar.end().0;
    Layer { tar, files: places }
}

/// Files of many lengths, and a long one; of those numbered from `changed` on as many as a tenth of all bytes are others with another `seed`.
fn contents(seed: u64) -> Vec<Vec<u8>> {
    let mut files: Vec<Vec<u8>> = (0..300)
        .map(|number| {
            let changed = (150..180).contains(&number);
            noise(
                1 + (number * 7919) % 40_000,
                u(number) + if changed { seed << 20 } else { 0 },
            )
        })
        .collect();
    files.push(noise(3_000_000, 77));
    files
}

/// What is before all other files, so that these lie elsewhere than in another layer.
fn shifted(seed: u64, by: usize) -> Vec<Vec<u8>> {
    let mut files = contents(seed);
    files.insert(0, noise(by, seed));
    files
}

fn packed(tar: &[u8], kind: &str) -> Vec<u8> {
    match kind {
        "tar" => tar.to_vec(),
        "tar+gzip" => gzip(tar),
        // So that it can be read from the middle.
        _ => frames(tar, 128 << 10),
    }
}

/// zstd with frames of their own for each `len` bytes.
fn frames(tar: &[u8], len: usize) -> Vec<u8> {
    let frames = tar.chunks(len).flat_map(|piece| through(&["zstd", "-3", "-c"], piece));
    frames.collect()
}

/// Puts an image of these layers into a registry, with indexes that its manifest names; the digests of its layers' blobs.
fn put_image(registry: &TestRegistry, name: &str, layers: &[&Layer], kind: &str) -> Vec<(Digest, u64)> {
    let blobs: Vec<Vec<u8>> = layers.iter().map(|layer| packed(&layer.tar, kind)).collect();
    let both: Vec<_> = layers.iter().copied().zip(blobs.iter().map(Vec::as_slice)).collect();
    put_packed(registry, name, &both, kind, Some(64 << 10))
}

/// The same of layers and their blobs, with entry points `spacing` bytes apart, or as far as is usual.
fn put_packed(
    registry: &TestRegistry,
    name: &str,
    layers: &[(&Layer, &[u8])],
    kind: &str,
    spacing: Option<u64>,
) -> Vec<(Digest, u64)> {
    let media_type = format!("application/vnd.oci.image.layer.v1.{kind}");
    let put: Vec<_> = layers
        .iter()
        .map(|(layer, blob)| (&*layer.tar, *blob, &*media_type))
        .collect();
    registry.put_image(name, "plain", &put);
    let reference = Reference::parse(&format!("{}/{name}:plain", registry.host())).unwrap();
    let how = PushOptions {
        into: Some("latest".to_owned()),
        ..PushOptions::new(spacing)
    };
    push(&reference, &registry_options(2), &how, &mut Unwatched).unwrap();
    registry.take_log();
    let described = layers.iter().map(|(_, blob)| (common::sha256(blob), u(blob.len())));
    described.collect()
}

/// A machine with a cache and a service.
struct Machine {
    cache: tempfile::TempDir,
    states: tempfile::TempDir,
    service: Shared,
    /// Bytes that its cache may take.
    room: std::cell::Cell<u64>,
}

impl Machine {
    fn new() -> Self {
        Self {
            cache: common::scratch("dedup-"),
            states: common::scratch("dedup-states-"),
            service: Shared::default(),
            room: std::cell::Cell::new(1 << 30),
        }
    }

    /// The service ends, and another one begins.
    fn restart(&mut self) {
        self.service = Shared::default();
    }

    fn attach(&self, registry: &TestRegistry, name: &str, trust: TrustPolicy) -> Opened {
        let options = OpenOptions {
            index: IndexChoice::Auto,
            cache: Some(Cache::new(self.cache.path()).unwrap()),
            trust,
            registry: registry_options(2),
            ..OpenOptions::default()
        };
        let prepared = prepare(&registry.name(name), &options, &mut Unwatched).unwrap();
        let fetching = Fetching {
            memory_bytes: Some(64 << 20),
            connections: 4,
            fetch_all: false,
            deadline: Some(PATIENCE),
            store_bytes: Some(self.room.get()),
        };
        let spec = prepared.image_spec(self.states.path(), fetching).unwrap();
        spec.serve(&self.service).unwrap()
    }
}

/// A range as a device reads it: at once where that is possible.
fn read(fetcher: &Fetcher, layer: u32, range: TarRange) -> Vec<u8> {
    let layer = LayerId(layer);
    let mut bytes = Vec::new();
    let mut at = range.start;
    while at < range.end() {
        let len = range.end().since(at).min(128 << 10);
        let asked = LayerRange {
            layer,
            range: TarRange::new(at, len),
        };
        let mut target = vec![0; usize::try_from(len).unwrap()];
        let located = fetcher.locate(asked);
        match located {
            Located::Memory(slices) => {
                for slice in &slices {
                    bytes.extend_from_slice(slice);
                }
            }
            Located::Disk if fetcher.read_at_once(asked, &mut target) => bytes.append(&mut target),
            _ => {
                let slices = fetcher.read_blocking(vec![asked]).unwrap();
                for slice in &slices {
                    bytes.extend_from_slice(slice);
                }
            }
        }
        at = at.plus(len);
    }
    bytes
}

/// Reads all files of a layer and compares them.
fn read_all(fetcher: &Fetcher, number: u32, layer: &Layer) {
    for range in &layer.files {
        let (start, end) = (
            usize::try_from(range.start.0).unwrap(),
            usize::try_from(range.end().0).unwrap(),
        );
        assert!(read(fetcher, number, *range) == layer.tar[start..end], "{range}");
    }
}

/// Whether a device knows that others have the beginning of a file.
fn is_known(fetcher: &Fetcher, layer: u32, file: TarRange) -> bool {
    let asked = LayerRange {
        layer: LayerId(layer),
        range: TarRange::new(file.start, file.len.min(1)),
    };
    matches!(fetcher.locate(asked), Located::Disk | Located::Memory(_))
}

/// Waits until a device knows that others have the beginning of a file.
fn wait_until_known(fetcher: &Fetcher, layer: u32, file: TarRange) {
    let began = Instant::now();
    while !is_known(fetcher, layer, file) {
        // No bar: only so that a failure says something.
        let stats = fetcher.stats();
        assert!(began.elapsed() < PATIENCE, "nothing became known: {stats:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Body bytes that a registry has sent of a blob since it was asked last.
fn sent(registry: &TestRegistry, blob: &Digest) -> u64 {
    let asked = registry.take_log();
    let of_blob = asked.iter().filter(|asked| asked.path.contains(&blob.to_string()));
    of_blob.map(|asked| asked.sent).sum()
}

/// Bytes of disk that layers take.
fn disk(cache: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let entries = std::fs::read_dir(cache.join("layers")).unwrap().flatten();
    let data = entries.filter(|entry| entry.path().extension().is_some_and(|ext| ext == "data"));
    data.map(|entry| entry.metadata().unwrap().blocks() * 512).sum()
}

#[test]
fn an_image_that_shares_nine_tenths_fetches_little_whatever_the_compression() {
    let (old, new) = (layer(&contents(1)), layer(&shifted(2, 5000)));
    for (number, kind) in KINDS.iter().enumerate() {
        // The other one came in another compression.
        let registry = TestRegistry::start();
        put_image(&registry, "old", &[&old], KINDS[(number + 1) % 3]);
        let blobs = put_image(&registry, "new", &[&new], kind);
        let (blob, len) = &blobs[0];
        let mut machine = Machine::new();
        let first = machine.attach(&registry, "old:latest", TrustPolicy::default());
        read_all(&first.fetcher, 0, &old);
        if number == 1 {
            // It is not attached any more, and served by another process.
            first.fetcher.shutdown();
            drop(first);
            machine.restart();
        } else {
            std::mem::forget(first);
        }
        registry.take_log();
        let second = machine.attach(&registry, "new:latest", TrustPolicy::default());
        wait_until_known(&second.fetcher, 0, new.files[1]);
        read_all(&second.fetcher, 0, &new);
        let fetched = sent(&registry, blob);
        assert!(fetched * 100 < len * 15, "{kind}: {fetched} of {len}");
        let stats = second.stats();
        assert!(stats.bytes.deduplicated > len * 8 / 10, "{stats:?}");
        assert_eq!((stats.read_errors, stats.chunks_wrong, stats.cache_damaged), (0, 0, 0));
        // Again, now that all is proven.
        read_all(&second.fetcher, 0, &new);
        assert_eq!(sent(&registry, blob), 0);
        second.fetcher.shutdown();
        // Kept once.
        let kept = second.stats().bytes_held;
        assert!(kept * 100 < u(new.tar.len()) * 15, "{kind}: {kept}");
    }
}

/// What a machine that has a layer fetches of another one's blob, all of whose files are read.
struct Beside {
    /// Bytes of the blob that were sent, and what was predicted.
    fetched: u64,
    predicted: u64,
    /// Bytes of the blob.
    len: u64,
    /// How long after the attach it was known what the two have in common.
    known: Duration,
}

/// Reads `old`, which the registry has, and then `new`, of which `shared` is a file that `old` has, too.
fn read_beside(
    registry: &TestRegistry,
    (old, new): (&Layer, &Layer),
    shared: TarRange,
    (_, kind, pack): Form,
) -> Beside {
    let (blob, len) = put_packed(registry, "new", &[(new, &pack(&new.tar))], kind, None).remove(0);
    let predicted = predicted(registry, "old:latest", "new:latest");
    let machine = Machine::new();
    let first = machine.attach(registry, "old:latest", TrustPolicy::default());
    read_all(&first.fetcher, 0, old);
    let began = Instant::now();
    let second = machine.attach(registry, "new:latest", TrustPolicy::default());
    wait_until_known(&second.fetcher, 0, shared);
    let known = began.elapsed();
    registry.take_log();
    read_all(&second.fetcher, 0, new);
    let stats = second.stats();
    assert_eq!((stats.read_errors, stats.chunks_wrong, stats.cache_damaged), (0, 0, 0));
    Beside {
        fetched: sent(registry, &blob),
        predicted,
        len,
        known,
    }
}

/// Long files begin and end within chunks in which headers lie, too, which no other layer has; where a layer is compressed, each of these
/// costs the way from a place to decode from.
#[test]
fn the_ends_of_long_files_that_are_the_same_are_not_fetched() {
    let mut files: Vec<Vec<u8>> = (0..12)
        .map(|number| noise(2_000_000 + number * 1001, u(number)))
        .collect();
    let old = layer(&files);
    files.insert(0, noise(5000, 99));
    let new = layer(&files);
    for form in FORMS {
        let (name, kind, pack) = form;
        let registry = TestRegistry::start();
        put_packed(&registry, "old", &[(&old, &pack(&old.tar))], kind, None);
        // All that is fetched is for one file, and the way to it.
        let Beside {
            fetched,
            predicted,
            len,
            ..
        } = read_beside(&registry, (&old, &new), new.files[1], form);
        assert!(fetched * 100 < len * 12, "{name}: {fetched} of {len}");
        assert!(
            fetched.abs_diff(predicted) * 20 <= predicted.max(CHUNK_BYTES),
            "{name}: {fetched}, {predicted} predicted"
        );
    }
}

/// What lies behind the last byte of a span that is nowhere else is not fetched, though it would come along.
#[test]
fn the_end_of_a_span_that_is_here_is_not_fetched() {
    let files = |seed: u64| -> Vec<Vec<u8>> {
        let pair = |number: usize| {
            [
                noise(5000, (seed << 20) + u(number)),
                noise(1_990_000 + number * 41_003, u(number)),
            ]
        };
        (0..6).flat_map(pair).collect()
    };
    let (old, new) = (layer(&files(1)), layer(&files(2)));
    // Of six spans of 2 MiB each has one of the files that changed, all of them together a quarter of a percent of the layer.
    let [.., form, _] = FORMS;
    let (_, kind, pack) = form;
    let registry = TestRegistry::start();
    put_packed(&registry, "old", &[(&old, &pack(&old.tar))], kind, None);
    let Beside {
        fetched,
        predicted,
        len,
        ..
    } = read_beside(&registry, (&old, &new), new.files[1], form);
    assert!(fetched * 100 < len * 70, "{fetched} of {len}");
    assert!(
        fetched.abs_diff(predicted) * 20 <= predicted,
        "{fetched}, {predicted} predicted"
    );
}

/// Two images on one machine that have all files but one in common, the second one shifted; what they are and their blobs.
fn two_images(registry: &TestRegistry) -> ([Layer; 2], [(Digest, u64); 2]) {
    let mut files = contents(1);
    let old = layer(&files);
    files.insert(0, noise(5000, 99));
    let new = layer(&files);
    let first = put_image(registry, "old", &[&old], "tar").remove(0);
    let second = put_image(registry, "new", &[&new], "tar").remove(0);
    ([old, new], [first, second])
}

/// The data files of the layers that a cache holds.
fn data_files(cache: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(cache.join("layers")).unwrap().flatten();
    let paths = entries.map(|entry| entry.path());
    paths
        .filter(|path| path.extension().is_some_and(|ext| ext == "data"))
        .collect()
}

#[test]
fn two_attached_images_have_a_file_once_whoever_reads_it_first() {
    let registry = TestRegistry::start();
    let ([old, new], [(_, _), (blob, len)]) = two_images(&registry);
    let machine = Machine::new();
    // The one that comes first knows nothing of the other, until that comes.
    let second = machine.attach(&registry, "new:latest", TrustPolicy::default());
    let half = new.files.len() / 2;
    for range in &new.files[..half] {
        let _bytes = read(&second.fetcher, 0, *range);
    }
    let first = machine.attach(&registry, "old:latest", TrustPolicy::default());
    wait_until_known(&first.fetcher, 0, old.files[0]);
    // What the first one reads is there for the second.
    for range in &old.files[half..] {
        let _bytes = read(&first.fetcher, 0, *range);
    }
    wait_until_known(&second.fetcher, 0, new.files[half + 5]);
    registry.take_log();
    read_all(&second.fetcher, 0, &new);
    read_all(&first.fetcher, 0, &old);
    assert!(sent(&registry, &blob) * 10 < len);
    second.fetcher.shutdown();
    first.fetcher.shutdown();
    let kept = disk(machine.cache.path());
    assert!(kept * 100 < u(new.tar.len()) * 125, "{kept} of {}", new.tar.len());
}

#[test]
fn a_donor_that_is_damaged_or_given_up_under_readers_costs_a_request_and_no_byte() {
    let registry = TestRegistry::start();
    let ([old, new], [_, (blob, len)]) = two_images(&registry);
    let machine = Machine::new();
    let first = machine.attach(&registry, "old:latest", TrustPolicy::default());
    read_all(&first.fetcher, 0, &old);
    first.fetcher.shutdown();
    drop(first);
    let donor = data_files(machine.cache.path()).remove(0);
    let second = machine.attach(&registry, "new:latest", TrustPolicy::default());
    wait_until_known(&second.fetcher, 0, new.files[1]);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..3).for_each(|_| read_all(&second.fetcher, 0, &new)));
        }
        scope.spawn(|| {
            let file = std::fs::File::options().write(true).open(&donor).unwrap();
            for at in (0..old.tar.len()).step_by(90_000) {
                file.write_all_at(b"damage", u(at)).unwrap();
                std::thread::sleep(Duration::from_millis(2));
            }
            // All at once: as if the disk had lost it.
            file.set_len(0).unwrap();
            file.set_len(u(old.tar.len())).unwrap();
        });
    });
    read_all(&second.fetcher, 0, &new);
    let stats = second.stats();
    assert_eq!((stats.read_errors, stats.chunks_wrong), (0, 0));
    assert!(stats.cache_damaged > 0, "{stats:?}");
    assert!(sent(&registry, &blob) < len * 3 / 2);
}

#[test]
fn room_is_made_of_donors_as_well() {
    let registry = TestRegistry::start();
    let ([old, new], [_, (blob, _)]) = two_images(&registry);
    let machine = Machine::new();
    let first = machine.attach(&registry, "old:latest", TrustPolicy::default());
    read_all(&first.fetcher, 0, &old);
    first.fetcher.shutdown();
    drop(first);
    let second = machine.attach(&registry, "new:latest", TrustPolicy::default());
    wait_until_known(&second.fetcher, 0, new.files[1]);
    read_all(&second.fetcher, 0, &new);
    registry.take_log();
    // Whoever comes next may have no more than this, nobody else either.
    put_image(&registry, "little", &[&layer(&[noise(100, 5)])], "tar");
    std::thread::scope(|scope| {
        let readers = scope.spawn(|| (0..3).for_each(|_| read_all(&second.fetcher, 0, &new)));
        machine.room.set(256 << 10);
        let third = machine.attach(&registry, "little:latest", TrustPolicy::default());
        readers.join().unwrap();
        third.fetcher.shutdown();
    });
    read_all(&second.fetcher, 0, &new);
    let stats = second.stats();
    assert_eq!((stats.read_errors, stats.chunks_wrong, stats.cache_damaged), (0, 0, 0));
    assert!(sent(&registry, &blob) > 0, "nothing was given up");
}

/// What the command says that the second image takes on a machine that has the first.
fn predicted(registry: &TestRegistry, old: &str, new: &str) -> u64 {
    let [old, new] = [old, new].map(|name| registry.name(name));
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_tarblk"))
        .args([
            "diff",
            "--json",
            "--platform",
            "linux/amd64",
            "--hosts-dir",
            "/nonexistent",
            "--authfile",
        ])
        .arg(common::anonymous::empty_authfile())
        .args([old, new])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let totals: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    totals["network"]["bytes"].as_u64().unwrap()
}

#[test]
fn what_is_predicted_is_what_is_measured() {
    let (old, new) = (layer(&contents(1)), layer(&shifted(2, 5000)));
    for kind in KINDS {
        let registry = TestRegistry::start();
        put_image(&registry, "old", &[&old], kind);
        let (blob, len) = put_image(&registry, "new", &[&new], kind).remove(0);
        let predicted = predicted(&registry, "old:latest", "new:latest");
        assert!(predicted > 0 && predicted < len / 5, "{kind}: {predicted} of {len}");
        let machine = Machine::new();
        let first = machine.attach(&registry, "old:latest", TrustPolicy::default());
        read_all(&first.fetcher, 0, &old);
        let second = machine.attach(&registry, "new:latest", TrustPolicy::default());
        wait_until_known(&second.fetcher, 0, new.files[1]);
        registry.take_log();
        read_all(&second.fetcher, 0, &new);
        let measured = sent(&registry, &blob);
        assert!(
            measured.abs_diff(predicted) * 20 <= predicted,
            "{kind}: {measured} for {predicted}"
        );
    }
}

#[test]
fn of_an_image_of_several_gzip_layers_stats_say_what_diff_said() {
    let registry = TestRegistry::start();
    let long = noise(3_000_000, 11);
    let mut changed = long.clone();
    changed.splice(1_000_000..1_000_010, noise(3000, 12));
    let old = [layer(&contents(1)), layer(&[long, noise(30_000, 13)])];
    // Of the lowest layer files changed, of the next one a part of a file, and the last one is new but for a file of the lowest.
    let repeated = contents(1).pop().unwrap();
    let new = [
        layer(&shifted(2, 5000)),
        layer(&[noise(30_000, 13), changed]),
        layer(&[noise(400_000, 14), repeated]),
    ];
    put_image(&registry, "old", &old.each_ref(), "tar+gzip");
    put_image(&registry, "new", &new.each_ref(), "tar+gzip");
    let predicted = predicted(&registry, "old:latest", "new:latest");
    let machine = Machine::new();
    let first = machine.attach(&registry, "old:latest", TrustPolicy::default());
    for (number, layer) in (0..).zip(&old) {
        read_all(&first.fetcher, number, layer);
    }
    let second = machine.attach(&registry, "new:latest", TrustPolicy::default());
    // A long file is known by its whole chunks, so not from its first byte on.
    let long = TarRange::new(new[2].files[1].start.plus(1_000_000), 1);
    let shared = [new[0].files[1], new[1].files[0], long];
    for (number, file) in (0..).zip(shared) {
        wait_until_known(&second.fetcher, number, file);
    }
    for (number, layer) in (0..).zip(&new) {
        read_all(&second.fetcher, number, layer);
    }
    let fetched = second.stats().bytes_fetched;
    assert!(
        fetched.abs_diff(predicted) * 20 <= predicted,
        "{fetched} for {predicted}"
    );
}

#[test]
fn of_a_long_file_that_changed_a_little_the_rest_is_shared() {
    let (base, other) = (noise(6_000_000, 5), noise(3000, 6));
    let mut changed = base.clone();
    // Some of it is longer now, so that everything behind lies elsewhere.
    changed.splice(2_000_000..2_000_100, other.iter().copied());
    changed.splice(4_000_000..4_000_000, [7]);
    let (old, new) = (layer(&[base]), layer(&[noise(700, 1), changed]));
    for kind in KINDS {
        let registry = TestRegistry::start();
        put_image(&registry, "old", &[&old], kind);
        let (blob, len) = put_image(&registry, "new", &[&new], kind).remove(0);
        let predicted = predicted(&registry, "old:latest", "new:latest");
        let machine = Machine::new();
        let first = machine.attach(&registry, "old:latest", TrustPolicy::default());
        read_all(&first.fetcher, 0, &old);
        let second = machine.attach(&registry, "new:latest", TrustPolicy::default());
        wait_until_known(&second.fetcher, 0, TarRange::new(new.files[1].start.plus(1_000_000), 1));
        registry.take_log();
        read_all(&second.fetcher, 0, &new);
        let fetched = sent(&registry, &blob);
        assert!(fetched * 100 < len * 15, "{kind}: {fetched} of {len}");
        assert!(
            fetched.abs_diff(predicted) * 20 <= predicted,
            "{kind}: {fetched} for {predicted}"
        );
    }
}

#[test]
fn a_donor_that_is_in_use_elsewhere_when_a_device_comes_is_one_once_it_is_free() {
    let registry = TestRegistry::start();
    let files = [noise(900_000, 1), noise(900_000, 2)];
    let [first, second] = files.each_ref().map(|file| layer(std::slice::from_ref(file)));
    let [one, other] = files;
    let both = layer(&[noise(5000, 3), one, other]);
    for (name, layer) in [("first", &first), ("second", &second)] {
        put_image(&registry, name, &[layer], "tar");
    }
    let (blob, len) = put_image(&registry, "both", &[&both], "tar").remove(0);
    let machine = Machine::new();
    let read_once = |name, layer| {
        let device = machine.attach(&registry, &format!("{name}:latest"), TrustPolicy::default());
        read_all(&device.fetcher, 0, layer);
        device.fetcher.shutdown();
    };
    read_once("first", &first);
    let kept = data_files(machine.cache.path()).remove(0);
    read_once("second", &second);
    // As a process has it that closes it, however long that takes. Comes back when this one has closed it.
    let in_use = std::fs::File::open(kept).unwrap();
    rustix::fs::flock(&in_use, rustix::fs::FlockOperation::LockExclusive).unwrap();
    let device = machine.attach(&registry, "both:latest", TrustPolicy::default());
    // All that can be looked at now was looked at.
    wait_until_known(&device.fetcher, 0, both.files[2]);
    assert!(!is_known(&device.fetcher, 0, both.files[1]));
    drop(in_use);
    wait_until_known(&device.fetcher, 0, both.files[1]);
    registry.take_log();
    read_all(&device.fetcher, 0, &both);
    let fetched = sent(&registry, &blob);
    assert!(fetched * 100 < len * 15, "{fetched} of {len}");
}

#[test]
fn an_upper_layer_repeats_files_of_a_lower_one() {
    let registry = TestRegistry::start();
    let lower = layer(&contents(1));
    let upper = layer(&shifted(2, 700));
    let blobs = put_image(&registry, "app", &[&lower, &upper], "tar+gzip");
    let machine = Machine::new();
    let app = machine.attach(&registry, "app:latest", TrustPolicy::default());
    read_all(&app.fetcher, 0, &lower);
    wait_until_known(&app.fetcher, 1, upper.files[1]);
    registry.take_log();
    read_all(&app.fetcher, 1, &upper);
    let (blob, len) = &blobs[1];
    let fetched = sent(&registry, blob);
    assert!(fetched * 100 < len * 15, "{fetched} of {len}");
}

#[test]
fn who_is_not_believed_gets_nothing() {
    let registry = TestRegistry::start();
    let ([old, new], [_, (blob, len)]) = two_images(&registry);
    let machine = Machine::new();
    let first = machine.attach(&registry, "old:latest", TrustPolicy::default());
    read_all(&first.fetcher, 0, &old);
    // On the registry's word alone its layer has to be here as a whole, to be compared with.
    let second = machine.attach(&registry, "new:plain", TrustPolicy::of_registry());
    registry.take_log();
    read_all(&second.fetcher, 0, &new);
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(second.stats().bytes.deduplicated, 0);
    let fetched = sent(&registry, &blob);
    assert!(fetched * 100 > len * 95, "{fetched} of {len}");
}

/// A form in which a real layer travels: what it is called, how its media type ends, and what packs it.
type Form = (&'static str, &'static str, fn(&[u8]) -> Vec<u8>);

const FORMS: [Form; 4] = [
    ("plain", "tar", <[u8]>::to_vec),
    ("gzip -6", "tar+gzip", gzip),
    ("zstd -3", "tar+zstd", |tar| through(&["zstd", "-3", "-c"], tar)),
    ("zstd -3, a frame each MiB", "tar+zstd", |tar| frames(tar, 1 << 20)),
];

/// What was changed in a real layer.
#[derive(Clone, Copy, Debug)]
enum Change {
    /// A tenth of all bytes: of each ten runs of so many files one is other files.
    Files(usize),
    /// Eight bytes in the middle of each file of more than 1 MiB.
    LongFiles,
}

/// A layer with a file more at its beginning, so that all others lie elsewhere, and with a change; and how many bytes of files changed.
/// What is new compresses as what was there did.
fn changed(old: &Layer, change: Change) -> (Layer, u64) {
    let first = RawTar::new().file(b"first", &noise(5000, 1)).0;
    let shift = u(first.len());
    let moved = |file: &TarRange| TarRange::new(file.start.plus(shift), file.len);
    let mut new = Layer {
        tar: [first, old.tar.clone()].concat(),
        files: old.files.iter().map(moved).collect(),
    };
    let payload: u64 = old.files.iter().map(|file| file.len).sum();
    let mut bytes = 0;
    for (number, file) in new.files.iter().enumerate() {
        let at = usize::try_from(file.start.0).unwrap();
        let len = usize::try_from(file.len).unwrap();
        let part = match change {
            Change::Files(run) if number / run % 10 == 3 && bytes + file.len <= payload / 10 => at..at + len,
            Change::LongFiles if len > 1 << 20 => at + len / 2..at + len / 2 + 8,
            _ => continue,
        };
        bytes += u(part.len());
        for byte in &mut new.tar[part] {
            *byte = byte.wrapping_add(1);
        }
    }
    (new, bytes)
}

/// Not for every day: what a real layer that was changed takes beside the one that it was, by form and by how the change lies.
#[test]
#[ignore = "takes minutes; needs TARBLK_TEST_LAYER"]
fn a_real_layer_that_was_changed() {
    use tarblk::internals::index::build::{Contents, Recorder};
    use tarblk::internals::index::{Index, LayerIdentity, Payloads};
    let tar = std::fs::read(std::env::var_os("TARBLK_TEST_LAYER").unwrap()).unwrap();
    let mut recorder = Recorder::new(Contents::ENTRIES);
    recorder.feed(&tar).unwrap();
    let index = Index::open(recorder.finish().unwrap().into_index(LayerIdentity::default())).unwrap();
    let files = Payloads::of(&index).unwrap().ranges().to_vec();
    let payload: u64 = files.iter().map(|file| file.len).sum();
    let old = Layer { tar, files };
    // Runs of neighbours, as when packages are upgraded; or single files all over the layer.
    let changes = [
        Change::Files(400),
        Change::Files(20),
        Change::Files(1),
        Change::LongFiles,
    ];
    let layers = changes.map(|change| (change, changed(&old, change)));
    for form in FORMS {
        let (name, kind, pack) = form;
        let registry = TestRegistry::start();
        put_packed(&registry, "old", &[(&old, &pack(&old.tar))], kind, None);
        for (change, (new, bytes)) in &layers {
            let beside = read_beside(&registry, (&old, new), new.files[0], form);
            let Beside {
                fetched,
                predicted,
                len,
                known,
            } = beside;
            let percent = |part: u64, of: u64| format!("{}.{:02} %", part * 100 / of, part * 10_000 / of % 100);
            println!(
                "{name}, {change:?}: {} of the payload changed; {fetched} of {len} bytes fetched, {}; {predicted} predicted, {} of that off; \
                 known after {known:.1?}",
                percent(*bytes, payload),
                percent(fetched, len),
                percent(fetched.abs_diff(predicted), predicted),
            );
        }
    }
}
