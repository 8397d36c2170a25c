//! What a decoder's step reports, the same for gzip and zstd.

/// What happened at the end of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Nothing of note: more input is needed, or more room for output.
    None,
    /// The header of a unit that began at byte `at` of the blob has been read.
    Begin { at: u64 },
    /// A deflate block ended that is not its member's last; `bits` of the last consumed byte belong to what follows.
    Block { bits: u8 },
    /// A unit ended, its checksum with it.
    End,
}

/// The outcome of one step of a decoder, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) consumed: usize,
    pub(super) produced: usize,
    pub(super) event: Event,
}

impl Step {
    /// Input that yielded nothing.
    pub(super) const fn took(consumed: usize) -> Self {
        Self {
            consumed,
            produced: 0,
            event: Event::None,
        }
    }

    /// Whether more can come of no more input, after a step that had `room` for output.
    pub(super) fn may_go_on(&self, room: usize) -> bool {
        self.produced == room || self.event != Event::None
    }
}
