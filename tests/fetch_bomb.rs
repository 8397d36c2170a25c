//! Layers that unpack to much more than they are: memory stays bounded. Alone in its process, because it measures that.

use std::fs::File;
use std::process::Command;
use std::sync::Arc;

use tarblk::internals::bench::origin::Origin;
use tarblk::internals::fetch::{Coded, FetchOptions, Fetcher, LayerRange, LayerSource, Windows};
use tarblk::internals::layer::{Coding, Indexer};
use tarblk::internals::source::{Blob, UrlBlob};
use tarblk::internals::units::{LayerId, TarOffset, TarRange};

const LEN: u64 = 320 << 20;
/// A decoder, a megabyte of chunks, what waits for the disk (64 MiB at most), and as much again that the allocator keeps for later;
/// far from the layer's length.
const MOST: u64 = 160 << 20;

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn a_bomb_takes_little_memory() {
    let dir = tempfile::tempdir().unwrap();
    let zeros = dir.path().join("zeros");
    File::create(&zeros).unwrap().set_len(LEN).unwrap();
    for (command, coding) in [("gzip -9nc", Coding::Gzip), ("zstd -q -c", Coding::Zstd)] {
        let mut words = command.split(' ');
        let packed = Command::new(words.next().unwrap())
            .args(words)
            .stdin(File::open(&zeros).unwrap())
            .output();
        let blob = packed
            .unwrap_or_else(|error| panic!("{command} is needed: {error}"))
            .stdout;
        let size = u64::try_from(blob.len()).unwrap();
        assert!(size < LEN / 500, "{command}: {size} bytes are no bomb");
        let mut indexer = Indexer::new(coding, 1 << 20);
        indexer.feed(&blob, &mut |_| {}).unwrap();
        let spans = indexer.finish().unwrap();
        let origin = Origin::start().unwrap();
        origin.serve_blob("/blob", blob);
        let http = Blob::of_url(UrlBlob::new(&origin.url("/blob").parse().unwrap()), size);
        let layer = LayerSource {
            coding: Some(Coded {
                table: spans.table,
                windows: Windows::Memory(Arc::new(spans.windows)),
            }),
            layer: http.into(),
            verifier: None,
            unproven: None,
        };
        let options = FetchOptions {
            memory_bytes: 1 << 20,
            ..FetchOptions::default()
        };
        let before = resident();
        let fetcher = Fetcher::start(vec![layer], options, None).unwrap();
        let mut most = 0;
        for n in 0..16 {
            let asked = LayerRange {
                layer: LayerId(0),
                range: TarRange::new(TarOffset(n * (LEN / 16)), 100_000),
            };
            let slices = fetcher.read_blocking(vec![asked]).unwrap();
            assert!(slices.iter().all(|slice| slice.iter().all(|byte| *byte == 0)));
            most = most.max(resident());
        }
        let grown = most.saturating_sub(before);
        assert!(grown < MOST, "{command}: {grown} bytes more in memory");
    }
}
