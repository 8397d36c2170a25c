//! What loading a library touches of it, beyond the tables that its dynamic section names. In: relocation tables, piece by piece as
//! they come, then the code of its initialisers. Out: the pages that are relocated, and what initialisers call and refer to.
//!
//! A dynamic loader writes where a relocation says, so it reads exactly those pages of the writable segments; relocations of
//! `DT_INIT_ARRAY` are the addresses of the functions that run before anything else does. These lie all over a big library, and
//! what they call or take the address of in their own code is touched next. Only x86-64 and `AArch64` code is looked into. Pure. What it
//! returns only decides what is prefetched. Sources: gabi 4.1 chapters 4 and 5, its `SHT_RELR`; Intel's and Arm's manuals for
//! the few instructions.

use super::Segment;
use crate::units::{len_u64, len_usize};

/// The most bytes of relocation tables that are read of one file; the largest known have a tenth of it.
const MOST_TABLE_BYTES: u64 = 128 << 20;
/// Tables are parsed in pieces of so many bytes, a multiple of every length of entries.
const PIECE: u64 = 24 * 8192;
/// The most initialisers that are followed.
const MOST_FUNCTIONS: usize = 1 << 16;
/// Of a function whose end is not known, so many bytes at most are looked into.
const LONGEST_FUNCTION: u64 = 4096;
/// What is wanted of a function, or of what one refers to: the page.
const PAGE: u64 = super::PAGE;
const X86_64: u64 = 62;
const AARCH64: u64 = 183;

/// How the entries of a relocation table are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Entries {
    /// Offset and information.
    Rel,
    /// Offset, information and addend.
    Rela,
    /// Addresses and bitmaps of those that follow them.
    Relr,
}

/// A piece of a relocation table: offset and length in bytes of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    entries: Entries,
    at: u64,
    len: u64,
}

/// What is known of how a file is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::prefetch) struct Loading {
    wide: bool,
    big: bool,
    machine: u64,
    segments: Vec<Segment>,
    pieces: Vec<Piece>,
    /// The addresses of `DT_INIT_ARRAY`: the first, and one past the last.
    array: (u64, u64),
}

/// What relocations say, as far as they have been read.
#[derive(Debug, Default)]
pub(in crate::prefetch) struct Relocated {
    /// The next piece.
    next: usize,
    /// The next address that a bitmap of a `DT_RELR` table is about.
    bitmap_at: u64,
    /// Addresses of initialisers; sorted once all is read.
    functions: Vec<u64>,
}

/// A part of a file: offset and length in bytes.
pub(in crate::prefetch) type Part = (u64, u64);

impl Loading {
    /// Of a file with these loaded segments, relocation tables (offset and length in the file), and initialisers.
    pub(super) fn new(
        (wide, big, machine): (bool, bool, u64),
        segments: Vec<Segment>,
        tables: &[(Entries, Part)],
        array: (u64, u64),
    ) -> Self {
        let mut pieces = Vec::new();
        let mut room = MOST_TABLE_BYTES;
        for &(entries, (at, len)) in tables {
            let end = at.saturating_add(len.min(room));
            room -= len.min(room);
            let starts = (at..end).step_by(len_usize(PIECE));
            pieces.extend(starts.map(|at| Piece {
                entries,
                at,
                len: PIECE.min(end - at),
            }));
        }
        Self {
            wide,
            big,
            machine,
            segments,
            pieces,
            array,
        }
    }

    /// The part of the file that is needed next for `relocated`; none when there is no more.
    pub(in crate::prefetch) fn needs(&self, relocated: &Relocated) -> Option<Part> {
        self.pieces.get(relocated.next).map(|piece| (piece.at, piece.len))
    }

    /// Takes the bytes of the part that was needed. Returns the parts that its relocations write to.
    pub(in crate::prefetch) fn relocate(&self, relocated: &mut Relocated, bytes: &[u8]) -> Vec<Part> {
        let Some(piece) = self.pieces.get(relocated.next) else {
            return Vec::new();
        };
        relocated.next += 1;
        let mut pages = Pages::default();
        let width = if self.wide { 8 } else { 4 };
        let word = |entry: &[u8], n: usize| self.word(entry.get(n * width..).unwrap_or_default());
        match piece.entries {
            Entries::Rel => {
                for entry in bytes.chunks_exact(2 * width) {
                    pages.add(self, word(entry, 0));
                }
            }
            Entries::Rela => {
                for entry in bytes.chunks_exact(3 * width) {
                    let address = word(entry, 0);
                    pages.add(self, address);
                    if self.is_in_array(address) {
                        relocated.add(self, word(entry, 2));
                    }
                }
            }
            Entries::Relr => {
                let bits = if self.wide { 63 } else { 31 };
                let step = len_u64(width);
                for entry in bytes.chunks_exact(width).map(|entry| self.word(entry)) {
                    if entry & 1 == 0 {
                        pages.add(self, entry);
                        relocated.bitmap_at = entry.saturating_add(step);
                    } else {
                        let set = (0..bits).filter(|bit| entry >> (bit + 1) & 1 == 1);
                        set.for_each(|bit| pages.add(self, relocated.bitmap_at.saturating_add(bit * step)));
                        relocated.bitmap_at = relocated.bitmap_at.saturating_add(bits * step);
                    }
                }
            }
        }
        pages.parts()
    }

    /// Where `DT_INIT_ARRAY` lies in the file, if it does.
    pub(in crate::prefetch) fn array_in_file(&self) -> Option<Part> {
        let len = self
            .array
            .1
            .saturating_sub(self.array.0)
            .min(len_u64(MOST_FUNCTIONS) * 8);
        Some((self.offset(self.array.0)?, len)).filter(|_| len > 0)
    }

    /// Takes the bytes of `DT_INIT_ARRAY`, in which addresses stand where no relocation has them. Returns the code of all
    /// initialisers, a few functions in each part.
    pub(in crate::prefetch) fn initialisers(&self, mut relocated: Relocated, array: &[u8]) -> Vec<Code> {
        let width = if self.wide { 8 } else { 4 };
        for address in array.chunks_exact(width).map(|entry| self.word(entry)) {
            if address != 0 {
                relocated.add(self, address);
            }
        }
        let mut functions = relocated.functions;
        functions.sort_unstable();
        functions.dedup();
        let mut code: Vec<Code> = Vec::new();
        for (n, &address) in functions.iter().enumerate() {
            let next = functions.get(n + 1).copied().unwrap_or(u64::MAX);
            let Some(at) = self.offset(address) else { continue };
            let end = self
                .code_end(address)
                .min(next)
                .min(address.saturating_add(LONGEST_FUNCTION));
            let len = end - address;
            match code.last_mut() {
                Some(last)
                    if at.saturating_sub(last.at + last.len) < PAGE && at >= last.at && last.len < Code::LONG =>
                {
                    last.len = at + len - last.at;
                    last.functions.push((at - last.at, len));
                }
                _ => code.push(Code {
                    at,
                    len,
                    address,
                    functions: vec![(0, len)],
                }),
            }
        }
        code
    }

    /// The parts of the file that `code`, whose bytes these are, calls or takes the address of.
    pub(in crate::prefetch) fn references(&self, code: &Code, bytes: &[u8]) -> Vec<Part> {
        let mut pages = Pages::default();
        for &(from, len) in &code.functions {
            let (from, address) = (len_usize(from), code.address.saturating_add(from));
            let end = from.saturating_add(len_usize(len)).min(bytes.len());
            let Some(function) = bytes.get(from..end) else { continue };
            match self.machine {
                X86_64 => x86_64(function, address, &mut |target, is_code| {
                    // Compilers align functions.
                    if !is_code || target % 16 == 0 && self.is_code(target) {
                        pages.add(self, target);
                    }
                }),
                AARCH64 => aarch64(function, address, &mut |target, is_code| {
                    if !is_code || self.is_code(target) {
                        pages.add(self, target);
                    }
                }),
                _ => {}
            }
        }
        pages.parts()
    }

    /// An address at the beginning of `bytes`; 0 where there are too few.
    fn word(&self, bytes: &[u8]) -> u64 {
        if self.wide {
            let Some(word) = bytes.first_chunk() else { return 0 };
            if self.big {
                u64::from_be_bytes(*word)
            } else {
                u64::from_le_bytes(*word)
            }
        } else {
            let Some(word) = bytes.first_chunk() else { return 0 };
            let word = if self.big {
                u32::from_be_bytes(*word)
            } else {
                u32::from_le_bytes(*word)
            };
            word.into()
        }
    }

    fn is_in_array(&self, address: u64) -> bool {
        (self.array.0..self.array.1).contains(&address)
    }

    /// The loaded segment that has bytes of the file for `address`.
    fn segment(&self, address: u64) -> Option<&Segment> {
        self.segments
            .iter()
            .find(|segment| segment.address <= address && address - segment.address < segment.len)
    }

    /// Where in the file the byte for `address` is.
    fn offset(&self, address: u64) -> Option<u64> {
        let segment = self.segment(address)?;
        segment.offset.checked_add(address - segment.address)
    }

    fn is_code(&self, address: u64) -> bool {
        self.segment(address).is_some_and(|segment| segment.executable)
    }

    /// The end of the segment that `address` is in.
    fn code_end(&self, address: u64) -> u64 {
        let end = |segment: &Segment| segment.address.saturating_add(segment.len);
        self.segment(address).map_or(address, end)
    }
}

impl Relocated {
    /// An address that `DT_INIT_ARRAY` holds.
    fn add(&mut self, loading: &Loading, address: u64) {
        if self.functions.len() < MOST_FUNCTIONS && loading.is_code(address) {
            self.functions.push(address);
        }
    }
}

/// Some initialisers that lie side by side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::prefetch) struct Code {
    /// Where they begin in the file, and their length in bytes.
    at: u64,
    len: u64,
    /// Where the first of them is loaded.
    address: u64,
    /// Each one's first byte, counted from `at`, and its length in bytes.
    functions: Vec<(u64, u64)>,
}

impl Code {
    /// No longer in bytes than this and one function.
    const LONG: u64 = 64 << 10;

    /// Where it is in the file.
    pub(in crate::prefetch) const fn part(&self) -> Part {
        (self.at, self.len)
    }
}

/// Pages of a file, by number.
#[derive(Debug, Default)]
struct Pages(Vec<u64>);

impl Pages {
    /// The page of `address`, if the file has it.
    fn add(&mut self, loading: &Loading, address: u64) {
        if let Some(at) = loading.offset(address)
            && self.0.last() != Some(&(at / PAGE))
        {
            self.0.push(at / PAGE);
        }
    }

    /// The pages as parts of the file, in order.
    fn parts(mut self) -> Vec<Part> {
        self.0.sort_unstable();
        self.0.dedup();
        let mut parts: Vec<Part> = Vec::new();
        for page in self.0 {
            match parts.last_mut() {
                Some((at, len)) if *at + *len == page * PAGE => *len += PAGE,
                _ => parts.push((page * PAGE, PAGE)),
            }
        }
        parts
    }
}

/// Tells `found` what a function of x86-64 that is loaded at `address` refers to, and whether that is a call: `call` and `jmp`
/// with 32 bits (E8, E9), `lea` relative to the instruction (REX.W 8D /r). Instructions are not told apart from each other: what
/// looks like one inside another is taken for one.
fn x86_64(code: &[u8], address: u64, found: &mut dyn FnMut(u64, bool)) {
    let target = |end: usize| -> Option<u64> {
        let field = code.get(end.checked_sub(4)?..end)?.first_chunk()?;
        let distance = i64::from(i32::from_le_bytes(*field));
        Some(address.wrapping_add(len_u64(end)).wrapping_add_signed(distance))
    };
    for (at, window) in code.windows(3).enumerate() {
        match *window {
            [0xe8 | 0xe9, ..] => {
                if let Some(target) = target(at + 5) {
                    found(target, true);
                }
            }
            [0x48 | 0x4c, 0x8d, mode] if mode & 0xc7 == 0x05 => {
                if let Some(target) = target(at + 7) {
                    found(target, false);
                }
            }
            _ => {}
        }
    }
}

/// The same for `AArch64`: `bl`, `b` and `adrp`, which names the page.
fn aarch64(code: &[u8], address: u64, found: &mut dyn FnMut(u64, bool)) {
    let signed = |value: u32, bits: u32| i64::from((value << (32 - bits)).cast_signed() >> (32 - bits));
    for (at, word) in (0..).step_by(4).zip(code.chunks_exact(4)) {
        let Some(word) = word.first_chunk().map(|word| u32::from_le_bytes(*word)) else {
            continue;
        };
        let here = address.wrapping_add(at);
        if word & 0x7c00_0000 == 0x1400_0000 {
            found(here.wrapping_add_signed(signed(word & 0x03ff_ffff, 26) * 4), true);
        } else if word & 0x9f00_0000 == 0x9000_0000 {
            let pages = signed(word >> 3 & 0x001f_fffc | word >> 29 & 3, 21);
            found((here & !(PAGE - 1)).wrapping_add_signed(pages * 4096), false);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A library of one readable and executable segment at 0x1000, and a writable one at 0x9000 that lies at 0x5000 in the file.
    fn loading(machine: u64, tables: &[(Entries, Part)]) -> Loading {
        let segment = |offset, address, len, writable, executable| Segment {
            kind: 1,
            offset,
            address,
            len,
            writable,
            executable,
        };
        let segments = vec![
            segment(0, 0x1000, 0x5000, false, true),
            segment(0x5000, 0x9000, 0x4000, true, false),
        ];
        Loading::new((true, false, machine), segments, tables, (0x9000, 0x9010))
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    #[test]
    fn relocations_say_which_pages_are_written_and_what_runs_first() {
        let table = (Entries::Rela, (0x100, 4 * 24));
        let loading = loading(X86_64, &[table]);
        let mut relocated = Relocated::default();
        assert_eq!(loading.needs(&relocated), Some((0x100, 96)));
        let bytes = words(&[0x9000, 8, 0x2000, 0x9008, 8, 0x1040, 0xb000, 8, 0x1000, 0x77_0000, 8, 0]);
        // The last one is in no segment.
        assert_eq!(
            loading.relocate(&mut relocated, &bytes),
            [(0x5000, 0x1000), (0x7000, 0x1000)]
        );
        assert_eq!(loading.needs(&relocated), None);
        assert_eq!(loading.array_in_file(), Some((0x5000, 16)));
        let code = loading.initialisers(relocated, &[0; 16]);
        let parts: Vec<Part> = code.iter().map(Code::part).collect();
        assert_eq!(parts, [(0x40, 0xfc0 + LONGEST_FUNCTION)]);
        assert_eq!(code[0].functions, [(0, 0xfc0), (0xfc0, LONGEST_FUNCTION)]);
    }

    #[test]
    fn addresses_without_addends_stand_in_the_file() {
        let table = (Entries::Relr, (0x100, 3 * 8));
        let loading = loading(X86_64, &[table]);
        let mut relocated = Relocated::default();
        // An address, the words 1 and 63 behind it, and from there on the words 0 and 512 / 8 behind that.
        let bytes = words(&[0x9000, 1 | 1 << 1 | 1 << 63, 1 | 1 << 9]);
        let far = 0x9008 + 63 * 8 + 8 * 8;
        assert_eq!(loading.relocate(&mut relocated, &bytes), [(0x5000, 0x1000)]);
        assert_eq!((far, relocated.bitmap_at), (0x9240, 0x9008 + 2 * 63 * 8));
        let code = loading.initialisers(relocated, &words(&[0x2000, 0x99_9999]));
        assert_eq!(
            code.iter().map(Code::part).collect::<Vec<_>>(),
            [(0x1000, LONGEST_FUNCTION)]
        );
    }

    #[test]
    fn calls_and_addresses_in_code_are_found() {
        let all = |loading: &Loading, bytes: &[u8]| {
            let code = Code {
                at: 0,
                len: len_u64(bytes.len()),
                address: 0x1000,
                functions: vec![(0, len_u64(bytes.len()))],
            };
            loading.references(&code, bytes)
        };
        // nop; call 0x3000; lea 0xa123(%rip), %rdi; call to what is not aligned; call to data.
        let intel = [
            &[0x90, 0xe8][..],
            &(0x3000_i32 - 0x1006).to_le_bytes(),
            &[0x48, 0x8d, 0x3d],
            &(0xa123_i32 - 0x100d).to_le_bytes(),
            &[0xe8],
            &(0x4003_i32 - 0x1012).to_le_bytes(),
            &[0xe8],
            &(0x9000_i32 - 0x1017).to_le_bytes(),
        ]
        .concat();
        assert_eq!(all(&loading(X86_64, &[]), &intel), [(0x2000, 0x1000), (0x6000, 0x1000)]);
        // bl 0x3000; adrp x0, 0xb000.
        let arm = [0x9400_0000_u32 | (0x2000 / 4), 0x9000_0000 | (0b10 << 29) | (0b10 << 5)]
            .map(u32::to_le_bytes)
            .concat();
        assert_eq!(all(&loading(AARCH64, &[]), &arm), [(0x2000, 0x1000), (0x7000, 0x1000)]);
        assert_eq!(all(&loading(0, &[]), &intel), []);
    }

    proptest! {
        /// Against a plain model: each relocation's page, once, in order.
        #[test]
        fn relocated_pages_are_those_of_the_model(addresses in prop::collection::vec(0x8000u64..0xe000, 0..200)) {
            let bytes: Vec<u8> = addresses.iter().flat_map(|address| words(&[*address, 8, 0])).collect();
            let loading = loading(X86_64, &[(Entries::Rela, (0, len_u64(bytes.len())))]);
            let mut model: Vec<u64> = addresses
                .iter()
                .filter(|address| (0x9000..0xd000).contains(*address))
                .map(|address| (address - 0x4000) / PAGE)
                .collect();
            model.sort_unstable();
            model.dedup();
            let parts = loading.relocate(&mut Relocated::default(), &bytes);
            let pages: Vec<u64> = parts.iter().flat_map(|(at, len)| at / PAGE..(at + len) / PAGE).collect();
            prop_assert_eq!(pages, model);
        }

        #[test]
        fn no_bytes_do_harm(
            bytes in prop::collection::vec(any::<u8>(), 0..3000),
            segments in prop::collection::vec((any::<u64>(), any::<u64>(), any::<u64>(), any::<bool>()), 0..4),
            kind in 0..3usize,
            wide: bool,
            big: bool,
            array: (u64, u64),
            machine in prop::sample::select(vec![X86_64, AARCH64, 3]),
        ) {
            let segments = segments
                .into_iter()
                .map(|(offset, address, len, executable)| Segment { kind: 1, offset, address, len, writable: true, executable })
                .collect();
            let entries = [Entries::Rel, Entries::Rela, Entries::Relr][kind];
            let loading = Loading::new((wide, big, machine), segments, &[(entries, array), (entries, (0, 500))], array);
            let mut relocated = Relocated::default();
            for _ in 0..4 {
                drop(loading.relocate(&mut relocated, &bytes));
            }
            prop_assert!(loading.array_in_file().is_none_or(|(_, len)| len > 0));
            for code in loading.initialisers(relocated, &bytes) {
                drop(loading.references(&code, &bytes));
            }
        }
    }
}
