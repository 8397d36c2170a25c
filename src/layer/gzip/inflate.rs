//! Raw deflate, entered and left at any bit.
//!
//! Why there is `unsafe` here: entering a deflate stream in its middle takes three things that zlib has and no safe
//! interface of a decoder as fast offers: stopping at block boundaries (`Z_BLOCK`) and learning at which bit, pushing
//! the rest of a byte in front of the input (`inflatePrime`), and handing in history (`inflateSetDictionary`).
//! libz-rs-sys is zlib-rs, which is written in Rust, behind zlib's C interface; what is unsafe about calling it is only
//! that lengths and pointers travel separately. This module puts them together again; nothing outside of it sees a
//! pointer.
#![allow(unsafe_code)]

use libz_rs_sys as z;

/// The most that a deflate stream reaches back, in bytes.
pub(crate) const WINDOW: usize = 32 << 10;

/// The reason why a run of the decoder ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// The input is used up, or the output full.
    Buffers,
    /// The end of a block that is not the last, where `bits` bits (at most seven) of the last consumed byte belong to
    /// what follows.
    Block {
        /// How many of the highest bits of the last consumed byte are not used yet.
        bits: u8,
    },
    /// The end of the stream.
    End,
}

/// The outcome of one run of the decoder, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Progress {
    /// Bytes of the input that are dealt with.
    pub(super) consumed: usize,
    /// Bytes of the output that are written.
    pub(super) produced: usize,
    pub(super) stop: Stop,
}

/// A decoder of raw deflate.
pub(super) struct Inflate {
    /// Boxed, because zlib's interface does not allow a stream to move.
    stream: Box<z::z_stream>,
}

// SAFETY: the stream's state is owned by this value alone and is not tied to a thread; the pointers to input and output
// in it are only ever followed during `run`, which sets them anew.
unsafe impl Send for Inflate {}

impl std::fmt::Debug for Inflate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inflate").finish_non_exhaustive()
    }
}

impl Inflate {
    /// A decoder at the beginning of a stream, or nothing when there is no memory for it.
    pub(super) fn new() -> Option<Self> {
        let mut stream = Box::new(z::z_stream::default());
        let size = i32::try_from(size_of::<z::z_stream>()).ok()?;
        // SAFETY: the stream is a default one with no allocator of its own, as inflateInit2_ wants it, and the version
        // is a static string with a NUL.
        let code = unsafe { z::inflateInit2_(&raw mut *stream, -15, z::zlibVersion(), size) };
        (code == z::Z_OK).then_some(Self { stream })
    }

    /// Makes it a decoder at the beginning of a stream again.
    pub(super) fn reset(&mut self) {
        // SAFETY: the stream was initialised in `new`.
        let code = unsafe { z::inflateReset(&raw mut *self.stream) };
        debug_assert_eq!(code, z::Z_OK);
    }

    /// Makes it a decoder in the middle of a stream: of the byte before the input `bits` bits (at most seven), in
    /// `value`, are still to be read, and the stream so far ended with `history` (at most [`WINDOW`] bytes). `false`
    /// when that cannot be.
    pub(super) fn enter(&mut self, bits: u8, value: u8, history: &[u8]) -> bool {
        self.reset();
        let Ok(len) = u32::try_from(history.len()) else {
            return false;
        };
        // SAFETY: the stream was initialised in `new`; pointer and length are of one slice, which is copied.
        unsafe {
            (bits == 0 || z::inflatePrime(&raw mut *self.stream, bits.into(), value.into()) == z::Z_OK)
                && (len == 0 || z::inflateSetDictionary(&raw mut *self.stream, history.as_ptr(), len) == z::Z_OK)
        }
    }

    /// Decodes from `input` into `output` until one of them is used up, the stream ends, or, with `at_blocks`, a block
    /// ends. An error is what zlib says of the damage.
    pub(super) fn run(&mut self, input: &[u8], output: &mut [u8], at_blocks: bool) -> Result<Progress, &'static str> {
        let stream = &mut *self.stream;
        let (given, room) = (
            u32::try_from(input.len()).unwrap_or(u32::MAX),
            u32::try_from(output.len()).unwrap_or(u32::MAX),
        );
        stream.next_in = input.as_ptr();
        stream.avail_in = given;
        stream.next_out = output.as_mut_ptr();
        stream.avail_out = room;
        let flush = if at_blocks { z::Z_BLOCK } else { z::Z_NO_FLUSH };
        // SAFETY: the stream was initialised in `new`, and the four fields above name two slices that outlive the call.
        let code = unsafe { z::inflate(&raw mut *stream, flush) };
        let (left, free) = (stream.avail_in, stream.avail_out);
        stream.next_in = std::ptr::null();
        stream.avail_in = 0;
        stream.next_out = std::ptr::null_mut();
        stream.avail_out = 0;
        let stop = match code {
            z::Z_STREAM_END => Stop::End,
            z::Z_OK | z::Z_BUF_ERROR => boundary(stream.data_type)
                .filter(|_| at_blocks)
                .unwrap_or(Stop::Buffers),
            z::Z_MEM_ERROR => return Err("no memory for its window"),
            _ => return Err(self.message()),
        };
        let count = |before: u32, after: u32| usize::try_from(before.saturating_sub(after)).unwrap_or(usize::MAX);
        Ok(Progress {
            consumed: count(given, left),
            produced: count(room, free),
            stop,
        })
    }

    /// What zlib says of the last error.
    fn message(&self) -> &'static str {
        if self.stream.msg.is_null() {
            return "it is no deflate stream";
        }
        // SAFETY: zlib's messages are static strings with a NUL at their end.
        unsafe { std::ffi::CStr::from_ptr::<'static>(self.stream.msg) }
            .to_str()
            .unwrap_or("it is no deflate stream")
    }
}

/// What zlib's `data_type` says: bit 7 is set right behind a block, bit 6 in the last one, the low bits count unused
/// bits.
fn boundary(data_type: i32) -> Option<Stop> {
    let bits = u8::try_from(data_type & 0x3f).ok()?;
    (data_type & 0xc0 == 0x80 && bits < 8).then_some(Stop::Block { bits })
}

impl Drop for Inflate {
    fn drop(&mut self) {
        // SAFETY: the stream was initialised in `new` and is not used again.
        unsafe { z::inflateEnd(&raw mut *self.stream) };
    }
}
