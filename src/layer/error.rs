//! The error of decoding a compressed layer, or of a span table that cannot be used.

use super::Coding;
use crate::units::TarOffset;

/// Why a layer cannot be decoded. Positions are bytes in the blob, unless they are called bytes of the tar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayerError {
    /// The compressed bytes are not what their format allows.
    #[error("the {coding} layer is damaged at byte {at}: {what}")]
    Corrupt {
        /// How the layer is compressed.
        coding: Coding,
        /// The position in the blob, in bytes.
        at: u64,
        /// The rule of the format that is broken.
        what: &'static str,
    },

    /// The compressed bytes are legal, but of a kind that no container layer should have.
    #[error("the {coding} layer cannot be read at byte {at}: {what}")]
    Unsupported {
        /// How the layer is compressed.
        coding: Coding,
        /// The position in the blob, in bytes.
        at: u64,
        /// The feature that is not supported.
        what: &'static str,
    },

    /// The blob ends in the middle of something.
    #[error("the {coding} layer is cut short: it ends at byte {at}, in the middle of {what}")]
    Truncated {
        /// How the layer is compressed.
        coding: Coding,
        /// The blob's length.
        at: u64,
        /// What is incomplete.
        what: &'static str,
    },

    /// What came out is not what the format's own checksum says.
    #[error("the {coding} layer is damaged before byte {at}: its {what} is wrong")]
    Checksum {
        /// How the layer is compressed.
        coding: Coding,
        /// Where in the blob the checksum ends.
        at: u64,
        /// The checksum's name.
        what: &'static str,
    },

    /// Decoding would take more memory for history than this program gives.
    #[error(
        "the {coding} layer at byte {at} needs a window of {needs} bytes, more than the {limit} that are accepted: compress it again with a smaller one (zstd --long=27, or without)"
    )]
    Window {
        /// How the layer is compressed.
        coding: Coding,
        /// The position in the blob, in bytes.
        at: u64,
        /// How many bytes of history it asks for.
        needs: u64,
        /// The most that is accepted.
        limit: u64,
    },

    /// The histories of all layers that are being decoded would take more memory than this program gives.
    #[error(
        "the zstd frame at byte {at} has a long window, and those of all layers that are decoded now take more than {limit} bytes: try again when less is read, or compress it again with a smaller one (zstd --long=27, or without)"
    )]
    Windows {
        /// Where the frame begins in the blob.
        at: u64,
        /// The most that they may take together, in bytes.
        limit: u64,
    },

    /// What is behind the blob's first skippable frames is no zstd.
    #[error(
        "the layer is {what} (at byte {at}), which layers cannot be: make a tar of it first (`{command}`), or compress that with gzip or zstd"
    )]
    OtherFormat {
        /// The position in the blob, in bytes.
        at: u64,
        /// The format's name.
        what: &'static str,
        /// The command that makes a tar of it.
        command: &'static str,
    },

    /// More comes out of it than was agreed to.
    #[error("the layer unpacks to more than {limit} bytes (at byte {at} of it): refused")]
    TooLong {
        /// The position in the blob, in bytes.
        at: u64,
        /// The most that was accepted, in bytes of the tar.
        limit: u64,
    },

    /// A decoder was not given the history that its span needs.
    #[error("the history for decoding from byte {at} of the tar is {found} bytes long instead of {needs}")]
    History {
        /// Where the span begins in the tar.
        at: TarOffset,
        /// How long the history that came is.
        found: usize,
        /// The length that it has to have, in bytes.
        needs: u32,
    },

    /// A span that the table does not have.
    #[error("the layer has no span {0}")]
    NoSpan(usize),

    /// The table of spans cannot be used.
    #[error("the layer's table of spans is malformed: {0}")]
    Table(&'static str),

    /// The layer's own table of contents, or its footer, cannot be used.
    #[error("the layer's table of contents cannot be used: {0}")]
    Contents(String),

    /// There is no memory for a decoder.
    #[error("no memory for a {0} decoder")]
    Memory(Coding),
}
