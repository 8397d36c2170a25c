//! The caches of chunks, in memory and on disk. In: chunks of a layer, as they are fetched. Out: the same chunks, from memory or from disk, to any
//! thread that asks.
//!
//! The unit is a chunk of [`CHUNK_BYTES`](crate::units::CHUNK_BYTES) bytes of tar space ([`ChunkKey`]). `memory` is bounded and goes
//! with the process; [`disk`] is one directory for the machine and survives it; `early` knows which chunks no reader has asked for
//! yet. Invariant: a chunk comes out only as it was put in. This room never fetches, never decodes, and never verifies: `fetch`
//! decides what is put in.

pub(crate) mod chunk;
pub mod disk;
pub(crate) mod early;
pub(crate) mod memory;

pub use chunk::{ChunkKey, Slice, Slices};
