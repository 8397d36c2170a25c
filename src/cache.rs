//! The chunks that are here. In: chunks of a layer, as they are fetched. Out: the same chunks, from memory or from disk, to any
//! thread that asks.
//!
//! The unit is a chunk of [`CHUNK_BYTES`](crate::units::CHUNK_BYTES) bytes of tar space ([`ChunkKey`]). `memory` is bounded and goes with the process;
//! [`disk`] is one directory for the machine and survives it. This room must never fetch, never decode, and never hand out a
//! chunk that was not put in: whoever fetches decides what is verified.

pub(crate) mod chunk;
pub mod disk;
pub(crate) mod memory;

pub use chunk::{ChunkKey, Slice, Slices};
