//! Any entries whatever, in any layers -> tree -> image: never a panic, the pieces of any range always as long as the range, the same
//! pieces block by block as at once, and every metadata block can be filled.

#![no_main]

use std::ops::ControlFlow;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use tarblk::internals::image::ext4::{Ext4Image, Ext4Options};
use tarblk::internals::image::{BlockImage, FileMap, Origin, Piece};
use tarblk::internals::index::{Entry, Kind, Segment, Timestamp, Xattr};
use tarblk::internals::tree::{TreeBuilder, TreeMode};
use tarblk::internals::units::{LayerId, TarOffset};

#[derive(Arbitrary, Debug)]
struct Input {
    entries: Vec<RawEntry>,
    ranges: Vec<(u64, u16)>,
    /// What the entries are: a plain tar, layers to merge, one layer for overlayfs.
    mode: u8,
}

#[derive(Arbitrary, Debug)]
struct RawEntry {
    path: RawPath,
    kind: u8,
    mode: u16,
    owner: (i64, i64),
    mtime: (i64, u32),
    size: u64,
    link: RawPath,
    device: (u32, u32),
    xattrs: Vec<(u8, Vec<u8>, u16)>,
    segments: Vec<(u64, u64, u64)>,
    /// How often the entry comes, under different names: big directories from small inputs.
    repeat: u8,
    /// Begins a layer, if the tree has several.
    begins: bool,
}

#[derive(Arbitrary, Debug)]
enum RawPath {
    Bytes(Vec<u8>),
    /// Parts out of a few, so that paths meet.
    Parts(Vec<u8>),
}

impl RawPath {
    fn bytes(&self) -> Vec<u8> {
        const PARTS: [&[u8]; 12] = [
            b"a",
            b"b",
            b"c",
            b"..",
            b".",
            b"",
            b"name",
            &[b'n'; 200],
            b".wh.a",
            b".wh.b",
            b".wh..wh..opq",
            b".wh.",
        ];
        match self {
            Self::Bytes(bytes) => bytes.clone(),
            Self::Parts(parts) => {
                parts.iter().map(|part| PARTS[usize::from(*part) % PARTS.len()]).collect::<Vec<_>>().join(&b'/')
            }
        }
    }
}

impl RawEntry {
    fn entry(&self) -> Entry {
        const PREFIXES: [&[u8]; 6] =
            [b"user.", b"trusted.", b"security.", b"system.posix_acl_access", b"system.posix_acl_default", b""];
        let kinds = [
            Kind::File,
            Kind::Directory,
            Kind::Symlink,
            Kind::Hardlink,
            Kind::CharDevice,
            Kind::BlockDevice,
            Kind::Fifo,
            Kind::File,
        ];
        let xattr = |(prefix, rest, len): &(u8, Vec<u8>, u16)| {
            let name = [PREFIXES[usize::from(*prefix) % 6], rest].concat();
            Xattr { name, value: rest.iter().copied().cycle().take(usize::from(*len)).collect() }
        };
        let kind = kinds[usize::from(self.kind) % 8];
        // Mostly one whole segment, as in most tars; otherwise whatever came.
        let segment = |&(file_offset, at, len): &(u64, u64, u64)| Segment { file_offset, tar_offset: TarOffset(at), len };
        let mut segments: Vec<_> = self.segments.iter().map(segment).collect();
        if self.kind & 0x80 == 0 && self.size > 0 {
            let at = TarOffset(u64::from(self.device.0) * 512);
            segments = vec![Segment { file_offset: 0, tar_offset: at, len: self.size }];
        }
        Entry {
            path: self.path.bytes(),
            kind,
            mode: self.mode,
            uid: self.owner.0,
            gid: self.owner.1,
            mtime: Timestamp { secs: self.mtime.0, nanos: self.mtime.1 },
            size: if kind == Kind::File { self.size } else { 0 },
            link: self.link.bytes(),
            device_major: self.device.0,
            device_minor: self.device.1,
            xattrs: self.xattrs.iter().map(xattr).collect(),
            segments: if kind == Kind::File { segments } else { Vec::new() },
            ..Entry::default()
        }
    }
}

/// Cut at block boundaries, joined where one goes on, so that two ways of telling the same are equal.
fn normal(pieces: &[Piece]) -> Vec<Piece> {
    let mut joined: Vec<Piece> = Vec::new();
    for piece in pieces {
        if let Some(last) = joined.last_mut() {
            let goes_on = match (last.origin, piece.origin) {
                (Origin::Layer(layer, at), Origin::Layer(other, next)) => layer == other && at.plus(last.len) == next,
                (one, other) => one == other,
            };
            if goes_on {
                last.len += piece.len;
                continue;
            }
        }
        joined.push(*piece);
    }
    joined
}

fuzz_target!(|input: Input| {
    let mode = [TreeMode::Plain, TreeMode::Merged, TreeMode::Overlay][usize::from(input.mode) % 3];
    let mut builder = TreeBuilder::with_mode(mode);
    let mut layer = 0;
    for raw in &input.entries {
        if raw.begins && mode == TreeMode::Merged {
            layer += 1;
            builder.begin_layer(LayerId(layer)).expect("layers in order");
        }
        let mut entry = raw.entry();
        for number in 0..=raw.repeat {
            if builder.push(&entry).is_err() {
                return;
            }
            entry.path.extend_from_slice(number.to_string().as_bytes());
        }
    }
    let Ok(image) = Ext4Image::plan(builder.finish(), &Ext4Options::default()) else { return };
    let blocks = image.len() / 4096;
    assert_eq!(image.len() % 4096, 0);

    let mut pieces = Vec::new();
    image.pieces(0, blocks, &mut pieces);
    assert_eq!(pieces.iter().map(|piece| piece.len).sum::<u64>(), image.len());
    let metadata = pieces.iter().filter(|piece| piece.origin == Origin::Metadata).map(|piece| piece.len / 4096).sum::<u64>();
    let mut block = [0; 4096];
    for number in (0..metadata.min(2000)).chain(input.ranges.iter().map(|(start, _)| start % (metadata + 2))) {
        image.fill_metadata(number, &mut block);
    }

    let near_data = input.ranges.iter().map(|&(start, count)| (metadata + start % 50, count));
    for (start, count) in input.ranges.iter().copied().chain(near_data) {
        let count = u64::from(count % 100);
        let mut at_once = Vec::new();
        image.pieces(start, count, &mut at_once);
        let wanted = start.saturating_add(count) - start;
        assert_eq!(at_once.iter().map(|piece| piece.len).sum::<u64>(), wanted * 4096);
        let mut one_by_one = Vec::new();
        for block in start..start + wanted {
            image.pieces(block, 1, &mut one_by_one);
        }
        assert_eq!(normal(&at_once), normal(&one_by_one));
        for piece in at_once {
            let Origin::Layer(layer, at) = piece.origin else { continue };
            if let Some(file) = image.file_at(layer, at) {
                assert!(file.range.contains(at));
                let mut visited = 0;
                image.neighbours(file.file, &mut |other| {
                    assert_ne!(other.file, file.file);
                    visited += 1;
                    if visited < 1000 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
                });
            }
        }
    }
    image.file_at(LayerId(u32::MAX), TarOffset(u64::MAX));
});
