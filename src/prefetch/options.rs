//! The planner's numbers.

use super::reason::Reason;

/// The planner's numbers: `_bytes` are bytes of tar, `_percent` hundredths, `_chunks` chunks of
/// [`CHUNK_BYTES`](crate::units::CHUNK_BYTES). The defaults are what `benches/plan_sim.rs` found best on the traces of a Debian layer.
#[derive(Clone, Debug)]
pub struct PlanOptions {
    /// Files up to this size are fetched whole at their first touch.
    pub small_file_bytes: u64,
    /// Of a small file that does not fit this, or what the link holds, only so much goes with the demand; the rest follows behind it.
    pub demand_bytes: u64,
    /// At the first miss in a bigger file an aligned window around it is wanted, of this percentage of what the link holds...
    pub first_touch_percent: u64,
    /// ...but no more than this; at a further one a wider or a narrower window, as `Surroundings` says...
    pub first_touch_bytes: u64,
    /// ...up to this percentage of what the link holds...
    pub widest_touch_percent: u64,
    /// ...but no more than this...
    pub widest_touch_bytes: u64,
    /// ...and down to this, or to what the link holds if that is less: so much costs no more than it may save.
    pub narrowest_touch_bytes: u64,
    /// At the first touch of a file so many bytes of its directory are queued...
    pub neighbour_bytes: u64,
    /// ...and at each further file's so many that what is queued and unread is at most this percentage of what was read
    /// there, and [`neighbour_bytes`](Self::neighbour_bytes) on top: a directory whose files are read one after the other comes
    /// whole, one that is visited for a single file does not.
    pub neighbour_percent: u64,
    /// Files of a directory are neighbours up to this size.
    pub small_neighbour_bytes: u64,
    /// Of a library that a program names and of the parts of a program that its loader reads, at most so much is queued.
    pub program_part_bytes: u64,
    /// Modules are followed so many imports from one that a reader touched.
    pub import_hops: u8,
    /// Classes of an archive are followed so many uses from one that a reader touched.
    pub class_hops: u8,
    /// What the kernel reads on both sides of a fault in a mapped file: half its read-ahead.
    pub fault_around_bytes: u64,
    /// A reader that has read so many bytes in one go is sequential; what is read ahead of it is as long as that...
    pub first_read_ahead_bytes: u64,
    /// ...up to this. The fetcher lowers it to a quarter of its memory cache, so that what is read ahead does not push out of
    /// memory what the reader has not read yet.
    pub largest_read_ahead_bytes: u64,
    /// What each hint may have fetched that is not read.
    pub budgets: Budgets,
    /// Ranges with at most so many chunks between them are one request.
    pub gap_chunks: u32,
}

impl Default for PlanOptions {
    fn default() -> Self {
        Self {
            small_file_bytes: 512 << 10,
            demand_bytes: 512 << 10,
            first_touch_percent: 50,
            first_touch_bytes: 1 << 20,
            widest_touch_percent: 400,
            widest_touch_bytes: 4 << 20,
            narrowest_touch_bytes: 64 << 10,
            neighbour_bytes: 32 << 10,
            neighbour_percent: 50,
            small_neighbour_bytes: 64 << 10,
            program_part_bytes: 512 << 10,
            import_hops: 20,
            class_hops: 2,
            fault_around_bytes: 16 << 10,
            first_read_ahead_bytes: 256 << 10,
            largest_read_ahead_bytes: 16 << 20,
            budgets: Budgets::default(),
            gap_chunks: 4,
        }
    }
}

/// How many bytes may lie fetched and unread of one hint and one layer: it is silent while there are more. A hint that is right
/// earns room with what is read of its guesses; one that is wrong uses up what it was given, and from then on has the small
/// part of all that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// So many bytes before anything was read of them...
    pub bytes: u64,
    /// ...plus this percentage of the bytes that were read of what it had fetched...
    pub own_percent: u64,
    /// ...plus this percentage of all bytes that readers got.
    pub all_percent: u64,
}

impl Budget {
    /// For what is no guess.
    pub const UNLIMITED: Self = Self {
        bytes: u64::MAX,
        own_percent: 0,
        all_percent: 0,
    };

    /// The room of a hint of which `own` bytes were read, of `all` that readers got.
    #[must_use]
    pub fn room(self, own: u64, all: u64) -> u64 {
        let part = |bytes: u64, percent| (bytes / 100).saturating_mul(percent);
        let earned = part(own, self.own_percent).saturating_add(part(all, self.all_percent));
        self.bytes.saturating_add(earned)
    }
}

/// The budget of each hint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// For [`Reason::Profile`].
    pub profile: Budget,
    /// For [`Reason::Rest`].
    pub rest: Budget,
    /// For [`Reason::Ahead`].
    pub ahead: Budget,
    /// For [`Reason::Loader`].
    pub loader: Budget,
    /// For [`Reason::Initialiser`].
    pub initialiser: Budget,
    /// For [`Reason::Import`].
    pub import: Budget,
    /// For [`Reason::Archive`].
    pub archive: Budget,
    /// For [`Reason::Neighbour`].
    pub neighbour: Budget,
}

impl Budgets {
    /// The budget of what is fetched for `reason`.
    #[must_use]
    pub const fn of(&self, reason: Reason) -> Budget {
        match reason {
            Reason::Profile => self.profile,
            Reason::Rest => self.rest,
            Reason::Ahead => self.ahead,
            Reason::Loader => self.loader,
            Reason::Initialiser => self.initialiser,
            Reason::Import => self.import,
            Reason::Archive => self.archive,
            Reason::Neighbour => self.neighbour,
            Reason::Demand | Reason::Between | Reason::Bundled | Reason::Fill => Budget::UNLIMITED,
        }
    }
}

impl Default for Budgets {
    fn default() -> Self {
        let budget = |mib: u64, own_percent, all_percent| Budget {
            bytes: mib << 20,
            own_percent,
            all_percent,
        };
        Self {
            profile: budget(8, 100, 0),
            rest: budget(64, 400, 100),
            ahead: budget(32, 400, 50),
            loader: budget(64, 200, 25),
            initialiser: budget(64, 200, 25),
            import: budget(64, 200, 25),
            archive: budget(8, 200, 10),
            neighbour: budget(1, 200, 10),
        }
    }
}
