//! What an index says of its layer's files that may be in other layers, too. In: an index, and pieces of its cold part from wherever they are.
//! Out: where files' bytes lie, and their digests.
//!
//! Nothing is fetched but by [`cold_piece`], which checks what comes. An index that has no digests, or whose rest cannot be had, says less;
//! that is no failure.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::super::{OpenError, PreparedLayer};
use crate::http::HttpOptions;
use crate::index::{ColdPart, ContentPieces, Index, IndexError, Payloads};
use crate::source::{self, Blob};
use crate::units::len_usize;

/// A piece of an index's cold part: of a hot part that has a `file` from there, or else from where its `rest` is. What comes is
/// checked, and put where the next one finds it.
pub(super) fn cold_piece(
    index: &Index<Vec<u8>>,
    file: Option<File>,
    rest: Option<&Blob>,
    part: ColdPart,
    number: usize,
) -> Option<Vec<u8>> {
    if index.is_whole() {
        return index.cold_piece(part, number).ok()?;
    }
    let piece = index.cold().piece(part, number)?;
    let len = len_usize(piece.range.end - piece.range.start);
    if let Some(file) = &file {
        let mut stored = vec![0; len];
        if file.read_exact_at(&mut stored, piece.range.start).is_ok()
            && let Ok(decoded) = piece.open(&stored)
        {
            return Some(decoded);
        }
    }
    let stored = source::read_range(rest?, piece.range.clone(), &HttpOptions::default());
    let stored = stored
        .inspect_err(|error| log::info!("{error}; going on without what it says of equal files"))
        .ok()?;
    let decoded = piece.open(&stored).ok()?;
    if let Some(Err(error)) = file.map(|file| file.write_all_at(&stored, piece.range.start)) {
        log::debug!("digests of files are not kept: {error}");
    }
    Some(decoded)
}

/// The content-defined pieces of an index's long payloads, if it has them and `piece` gives all pieces of that section.
pub(super) fn content_pieces(
    index: &Index<Vec<u8>>,
    payloads: &Payloads,
    piece: &dyn Fn(usize) -> Option<Vec<u8>>,
) -> Option<ContentPieces> {
    let range = index.cold().range(ColdPart::ContentPieces)?;
    if range.end - range.start > ContentPieces::longest_section(payloads) {
        log::info!("an index has more content pieces than its files can have; going on without them");
        return None;
    }
    let count = index.cold().pieces(ColdPart::ContentPieces);
    let section: Vec<Vec<u8>> = (0..count).map(piece).collect::<Option<_>>()?;
    let decoded = ContentPieces::decode(&section.concat(), payloads);
    decoded.inspect_err(|fault| log::info!("{fault}")).ok()
}

/// The payloads of a layer with their digests, and the pieces of long ones, as far as an index has them.
#[derive(Clone, Debug)]
pub struct KnownPayloads {
    /// The payloads.
    pub payloads: Payloads,
    /// The content-defined pieces of long ones.
    pub pieces: ContentPieces,
}

impl KnownPayloads {
    /// Those of an index that is whole, or of which only the hot part is to be looked at.
    ///
    /// # Errors
    /// A damaged index.
    pub fn of(index: &Index<Vec<u8>>) -> Result<Self, IndexError> {
        Self::by_pieces(index, &|part, number| cold_piece(index, None, None, part, number))
    }

    /// Those of a prepared layer. What its index has elsewhere is fetched.
    ///
    /// # Errors
    /// [`OpenError::Index`] when the index is damaged.
    pub fn of_layer(layer: &PreparedLayer) -> Result<Self, OpenError> {
        let hot = layer.kept.as_ref().filter(|_| layer.rest.is_some());
        let piece = |part, number| {
            let file = hot.and_then(|path| File::options().read(true).write(true).open(path).ok());
            cold_piece(&layer.index, file, layer.rest.as_ref(), part, number)
        };
        Self::by_pieces(&layer.index, &piece).map_err(|cause| OpenError::Index {
            name: format!("index for {}", layer.layer.blob.name),
            cause,
        })
    }

    fn by_pieces(
        index: &Index<Vec<u8>>,
        piece: &dyn Fn(ColdPart, usize) -> Option<Vec<u8>>,
    ) -> Result<Self, IndexError> {
        let mut payloads = Payloads::of(index)?;
        for number in 0..payloads.pieces().count() {
            if let Some(digests) = piece(ColdPart::PayloadDigests, number) {
                payloads.put_piece(number, digests)?;
            }
        }
        let pieces = content_pieces(index, &payloads, &|number| piece(ColdPart::ContentPieces, number));
        Ok(Self {
            payloads,
            pieces: pieces.unwrap_or_default(),
        })
    }
}
