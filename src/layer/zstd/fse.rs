//! FSE tables (RFC 8878, section 4.1), as far as the sequences of blocks need them. In: a table's description. Out: its cells, and
//! the descriptions of the tables that the format predefines.
//!
//! What is described wrong is nothing; no description makes a table of more than 512 cells.

use std::sync::LazyLock;

/// The most cells that a table has.
pub(super) const MOST_CELLS: usize = 512;

/// What a table's symbols stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// How far back a match lies.
    Offsets,
    /// How long it is.
    Matches,
    /// How many literals come before it.
    Literals,
}

/// One state of a decoder: what it stands for, and which comes next.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cell {
    /// What the symbol means, to which `extra` further bits of the stream are added.
    pub(super) base: u32,
    /// The next state, to which `bits` further bits of the stream are added.
    pub(super) next: u16,
    pub(super) extra: u8,
    pub(super) bits: u8,
}

/// A decoding table.
#[derive(Clone, Debug)]
pub(super) struct Fse {
    /// How many bits of the stream tell the first state.
    pub(super) log: u8,
    pub(super) cells: Box<[Cell; MOST_CELLS]>,
}

/// How often each symbol occurs, of `1 << log`; -1 for less than once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Counts {
    log: u8,
    each: Vec<i16>,
}

/// The literals' lengths from code 16 on: the shortest, and how many bits are added to it.
const LITERALS: [(u32, u8); 20] = [
    (16, 1),
    (18, 1),
    (20, 1),
    (22, 1),
    (24, 2),
    (28, 2),
    (32, 3),
    (40, 3),
    (48, 4),
    (64, 6),
    (128, 7),
    (256, 8),
    (512, 9),
    (1024, 10),
    (2048, 11),
    (4096, 12),
    (8192, 13),
    (16_384, 14),
    (32_768, 15),
    (65_536, 16),
];

/// The matches' lengths from code 32 on.
const MATCHES: [(u32, u8); 21] = [
    (35, 1),
    (37, 1),
    (39, 1),
    (41, 1),
    (43, 2),
    (47, 2),
    (51, 3),
    (59, 3),
    (67, 4),
    (83, 4),
    (99, 5),
    (131, 7),
    (259, 8),
    (515, 9),
    (1027, 10),
    (2051, 11),
    (4099, 12),
    (8195, 13),
    (16_387, 14),
    (32_771, 15),
    (65_539, 16),
];

/// Once each.
const ONE: i16 = 1;
/// Less than once.
const RARE: i16 = -1;

const LITERALS_COUNTS: [i16; 36] = [
    4, 3, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 2, 1, 1, 1, 1, 1, RARE, RARE, RARE,
    RARE,
];
const MATCHES_COUNTS: [i16; 53] = {
    let mut counts = [ONE; 53];
    (counts[1], counts[2]) = (4, 3);
    let mut at = 3;
    while at < 9 {
        counts[at] = 2;
        at += 1;
    }
    at = 46;
    while at < 53 {
        counts[at] = RARE;
        at += 1;
    }
    counts
};
const OFFSETS_COUNTS: [i16; 29] = {
    let mut counts = [ONE; 29];
    (counts[6], counts[7], counts[8]) = (2, 2, 2);
    let mut at = 24;
    while at < 29 {
        counts[at] = RARE;
        at += 1;
    }
    counts
};

impl Kind {
    /// What a symbol stands for: the least, and how many bits are added to it.
    fn meaning(self, symbol: u8) -> Option<(u32, u8)> {
        let code = u32::from(symbol);
        let of = |table: &[(u32, u8)], plain: u8, least: u32| match symbol.checked_sub(plain) {
            None => Some((code + least, 0)),
            Some(further) => table.get(usize::from(further)).copied(),
        };
        match self {
            Self::Offsets => 1_u32.checked_shl(code).map(|least| (least, symbol)),
            Self::Matches => of(&MATCHES, 32, 3),
            Self::Literals => of(&LITERALS, 16, 0),
        }
    }

    /// How many symbols there can be.
    const fn symbols(self) -> usize {
        match self {
            Self::Offsets => 32,
            Self::Matches => 53,
            Self::Literals => 36,
        }
    }

    /// The logarithm of the most cells.
    const fn most_log(self) -> u8 {
        match self {
            Self::Offsets => 8,
            Self::Matches | Self::Literals => 9,
        }
    }

    /// How often the symbols occur where no description comes.
    fn predefined_counts(self) -> Counts {
        let (log, each) = match self {
            Self::Offsets => (5, &OFFSETS_COUNTS[..]),
            Self::Matches => (6, &MATCHES_COUNTS[..]),
            Self::Literals => (6, &LITERALS_COUNTS[..]),
        };
        Counts {
            log,
            each: each.to_vec(),
        }
    }

    const fn slot(self) -> usize {
        match self {
            Self::Offsets => 0,
            Self::Matches => 1,
            Self::Literals => 2,
        }
    }

    /// The table where no description comes.
    pub(super) fn predefined(self) -> &'static Fse {
        static TABLES: LazyLock<[Fse; 3]> = LazyLock::new(|| {
            [Kind::Offsets, Kind::Matches, Kind::Literals]
                .map(|kind| Fse::of_counts(kind, &kind.predefined_counts()).unwrap_or_else(Fse::empty))
        });
        &TABLES[self.slot()]
    }

    /// The description of the predefined table, for who has to describe it all the same.
    pub(super) fn predefined_description(self) -> &'static [u8] {
        static DESCRIPTIONS: LazyLock<[Vec<u8>; 3]> = LazyLock::new(|| {
            [Kind::Offsets, Kind::Matches, Kind::Literals].map(|kind| kind.predefined_counts().write())
        });
        &DESCRIPTIONS[self.slot()]
    }
}

impl Counts {
    /// Reads a description (section 4.1.1), and says how many bytes it has.
    pub(super) fn read(kind: Kind, bytes: &[u8]) -> Option<(Self, usize)> {
        let peek = |at: usize| {
            let rest = bytes.get(at / 8..).unwrap_or_default();
            let mut word = [0; 8];
            let len = rest.len().min(8);
            word[..len].copy_from_slice(&rest[..len]);
            u64::from_le_bytes(word) >> (at % 8)
        };
        let log = u8::try_from(peek(0) & 15).ok()? + 5;
        if log > kind.most_log() {
            return None;
        }
        let mut at = 4;
        // One more than what is left to give away, as the format counts.
        let mut left = (1_u64 << log) + 1;
        let mut threshold = 1_u64 << log;
        let mut width = usize::from(log) + 1;
        let mut each = Vec::with_capacity(kind.symbols());
        while left > 1 {
            let short = 2 * threshold - 1 - left;
            let bits = peek(at);
            let value = if bits & (threshold - 1) < short {
                at += width - 1;
                bits & (threshold - 1)
            } else {
                at += width;
                let value = bits & (2 * threshold - 1);
                if value >= threshold { value - short } else { value }
            };
            left = left.checked_sub(if value == 0 { 1 } else { value - 1 })?;
            each.push(i16::try_from(value).ok()? - 1);
            if value == 1 {
                loop {
                    let zeros = peek(at) & 3;
                    at += 2;
                    each.extend(std::iter::repeat_n(0, usize::try_from(zeros).ok()?));
                    if zeros < 3 || each.len() > kind.symbols() {
                        break;
                    }
                }
            }
            if each.len() > kind.symbols() {
                return None;
            }
            while left < threshold {
                width -= 1;
                threshold >>= 1;
            }
        }
        let used = at.div_ceil(8);
        (left == 1 && used <= bytes.len()).then_some((Self { log, each }, used))
    }

    /// The description, of counts none of which is 0.
    fn write(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let (mut bits, mut have) = (u64::from(self.log) - 5, 4_u32);
        let mut left = (1_u64 << self.log) + 1;
        let mut threshold = 1_u64 << self.log;
        let mut width = u32::from(self.log) + 1;
        for count in &self.each {
            let short = 2 * threshold - 1 - left;
            let value = u64::try_from(count + 1).unwrap_or(0);
            left -= u64::from(count.unsigned_abs());
            bits |= (if value >= threshold { value + short } else { value }) << have;
            have += if value < short { width - 1 } else { width };
            while have >= 8 {
                out.push(bits.to_le_bytes()[0]);
                bits >>= 8;
                have -= 8;
            }
            while left < threshold && threshold > 1 {
                width -= 1;
                threshold >>= 1;
            }
        }
        if have > 0 {
            out.push(bits.to_le_bytes()[0]);
        }
        out
    }
}

impl Fse {
    /// A table that always gives what costs nothing.
    pub(super) fn empty() -> Self {
        Self {
            log: 0,
            cells: Box::new([Cell::default(); MOST_CELLS]),
        }
    }

    /// The table of one symbol, which takes no bits.
    pub(super) fn single(&mut self, kind: Kind, symbol: u8) -> Option<()> {
        if usize::from(symbol) >= kind.symbols() {
            return None;
        }
        let (base, extra) = kind.meaning(symbol)?;
        self.log = 0;
        self.cells[0] = Cell {
            base,
            next: 0,
            extra,
            bits: 0,
        };
        Some(())
    }

    fn of_counts(kind: Kind, counts: &Counts) -> Option<Self> {
        let mut table = Self::empty();
        table.fill(kind, counts).map(|()| table)
    }

    /// Makes it the table of these counts.
    pub(super) fn fill(&mut self, kind: Kind, counts: &Counts) -> Option<()> {
        let size = 1_usize << counts.log;
        let mut symbols = [0_u8; MOST_CELLS];
        let mut next = [0_u16; 64];
        let mut high = size;
        for (symbol, count) in (0_u8..).zip(&counts.each) {
            if *count == RARE {
                high = high.checked_sub(1)?;
                symbols[high] = symbol;
            }
            next[usize::from(symbol)] = count.unsigned_abs();
        }
        let step = (size >> 1) + (size >> 3) + 3;
        let mut place = 0;
        for (symbol, count) in (0_u8..).zip(&counts.each) {
            for _ in 0..(*count).max(0) {
                symbols[place] = symbol;
                loop {
                    place = (place + step) & (size - 1);
                    if place < high || high == 0 {
                        break;
                    }
                }
            }
        }
        if place != 0 {
            return None;
        }
        for (state, symbol) in symbols[..size].iter().enumerate() {
            let (base, extra) = kind.meaning(*symbol)?;
            let number = next[usize::from(*symbol)];
            next[usize::from(*symbol)] += 1;
            let bits = u32::from(counts.log).checked_sub(number.checked_ilog2()?)?;
            self.cells[state] = Cell {
                base,
                next: u16::try_from((u32::from(number) << bits).checked_sub(1 << counts.log)?).ok()?,
                extra,
                bits: u8::try_from(bits).ok()?,
            };
        }
        self.log = counts.log;
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [Kind; 3] = [Kind::Offsets, Kind::Matches, Kind::Literals];

    #[test]
    fn predefined_tables_can_be_described() {
        for kind in KINDS {
            let counts = kind.predefined_counts();
            let given: i16 = counts.each.iter().map(|count| count.abs()).sum();
            assert_eq!(given, 1 << counts.log, "{kind:?}");
            let description = kind.predefined_description();
            assert_eq!(
                Counts::read(kind, description),
                Some((counts, description.len())),
                "{kind:?}"
            );
            for cut in 0..description.len() {
                assert_eq!(Counts::read(kind, &description[..cut]), None, "{kind:?} {cut}");
            }
        }
    }

    /// The first states of the tables in the format's appendix A.
    #[test]
    fn predefined_tables_are_the_formats() {
        let row = |kind: Kind, state: usize| {
            let cell = kind.predefined().cells[state];
            (cell.base, cell.extra, cell.bits, cell.next)
        };
        assert_eq!(row(Kind::Literals, 0), (0, 0, 4, 0));
        assert_eq!(row(Kind::Literals, 1), (0, 0, 4, 16));
        assert_eq!(row(Kind::Literals, 63), (8192, 13, 6, 0));
        assert_eq!(row(Kind::Matches, 0), (3, 0, 6, 0));
        assert_eq!(row(Kind::Matches, 1), (4, 0, 4, 0));
        assert_eq!(row(Kind::Matches, 63), (1027, 10, 6, 0));
        assert_eq!(row(Kind::Offsets, 0), (1, 0, 5, 0));
        assert_eq!(row(Kind::Offsets, 1), (1 << 6, 6, 4, 0));
        assert_eq!(row(Kind::Offsets, 31), (1 << 24, 24, 5, 0));
    }

    #[test]
    fn no_description_breaks_the_reader() {
        let mut state = 1_u64;
        for _ in 0..200_000 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let bytes = state.rotate_left(17).to_le_bytes();
            for kind in KINDS {
                if let Some((counts, used)) = Counts::read(kind, &bytes) {
                    assert!(used <= bytes.len() && counts.each.len() <= kind.symbols());
                    Fse::of_counts(kind, &counts).expect("what was read is a table");
                }
            }
        }
    }
}
