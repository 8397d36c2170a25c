//! What a program needs besides itself, read from its own bytes: the interpreter and libraries that an ELF file names, the
//! parts of it that its loader reads before anything runs, the interpreter of a script.
//!
//! In: a file's length and whatever of its bytes is here. Out: names and ranges, or which bytes would have to be here to
//! say. Pure. What it returns only decides what is prefetched: a damaged file costs a useless prefetch at most. Sources: the
//! System V ABI (gabi 4.1, chapters 4 and 5), elf(5), and what glibc's and musl's loaders read.

pub(super) mod loading;

use std::cell::RefCell;

use self::loading::{Entries, Loading};
use crate::units::len_usize;

/// The most program headers that are read; real files have about a dozen.
const MOST_HEADERS: u64 = 64;
/// The longest program header in bytes; real ones have 32 or 56.
const LONGEST_HEADER: u64 = 128;
/// The most bytes of a dynamic section that are read.
const LONGEST_DYNAMIC: u64 = 16 << 10;
/// The most libraries and search paths that are taken from it, of each.
const MOST_NAMES: usize = 64;
/// The most bytes that are fetched of one table that the dynamic section names.
const LONGEST_TABLE: u64 = 64 << 20;
/// The longest name that is read, in bytes.
const LONGEST_NAME: u64 = 256;

/// The files, and the parts of its own file, that a program needs before it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// The program that starts it (`PT_INTERP`, or the `#!` line): an absolute path.
    pub(super) interpreter: Option<Vec<u8>>,
    /// Libraries by name (`DT_NEEDED`), in the order in which they are loaded.
    pub(super) libraries: Vec<Vec<u8>>,
    /// Directories to search for them (`DT_RPATH`, `DT_RUNPATH`), with `$ORIGIN` not yet replaced.
    pub(super) search: Vec<Vec<u8>>,
    /// The parts of the file that a loader reads before the program runs, as offset and length in bytes: segments in front
    /// of the code, writable segments, initialisers and finalisers. Of a long one it may be only a little.
    pub(super) parts: Vec<(u64, u64)>,
    /// The parts that it reads whole: the tables that the dynamic section names.
    pub(super) tables: Vec<(u64, u64)>,
    /// What relocations and initialisers can be read with, once the dynamic section is here.
    pub(super) loading: Option<Loading>,
    /// Parts of the file that have to be fetched before more can be read from it, as offset and length in bytes.
    pub(super) lacking: Vec<(u64, u64)>,
}

/// Reads bytes of the file by offset and length; none when not all of them are in memory.
pub(super) type Peek<'a> = &'a dyn Fn(u64, u64) -> Option<Vec<u8>>;

/// Reads what a file needs, as far as its bytes are in memory; the planner calls it again when [`Needs::lacking`] has come. Empty
/// for what is neither an ELF file nor a script, or is malformed.
pub(super) fn needs(file_len: u64, peek: Peek<'_>) -> Needs {
    let file = File {
        len: file_len,
        peek,
        lacking: RefCell::default(),
    };
    let mut needs = Needs::default();
    if let Some(head) = file.bytes(0, 64.min(file_len)) {
        if head.starts_with(b"#!") {
            needs = script(&head);
        } else if let Some(elf) = Elf::new(&head) {
            elf.needs(&file, &mut needs);
        }
    }
    needs.lacking = file.lacking.into_inner();
    needs
}

/// Parses a script's first line, `#! interpreter argument`. For `env` the interpreter is its argument, looked for in `/usr/bin`.
fn script(head: &[u8]) -> Needs {
    let line = head.get(2..).unwrap_or_default();
    let mut words = line
        .split(|&byte| byte == b'\n')
        .next()
        .unwrap_or_default()
        .split(|byte| matches!(byte, b' ' | b'\t'))
        .filter(|word| !word.is_empty());
    let interpreter = words.next().filter(|word| word.starts_with(b"/")).map(<[u8]>::to_vec);
    let through_env = interpreter.as_ref().is_some_and(|path| path.ends_with(b"/env"));
    let named = words.next().filter(|word| through_env && !word.starts_with(b"-"));
    Needs {
        interpreter: match named {
            Some(name) => Some([b"/usr/bin/".as_slice(), name].concat()),
            None => interpreter,
        },
        ..Needs::default()
    }
}

/// A file of which only some bytes are in memory; notes those that were asked for and are not.
struct File<'a> {
    /// In bytes.
    len: u64,
    peek: Peek<'a>,
    lacking: RefCell<Vec<(u64, u64)>>,
}

impl File<'_> {
    /// The `len` bytes at offset `at`, if they are in memory; empty when they reach past the file's end.
    fn bytes(&self, at: u64, len: u64) -> Option<Vec<u8>> {
        if len == 0 || at.checked_add(len).is_none_or(|end| end > self.len) {
            return Some(Vec::new());
        }
        let bytes = (self.peek)(at, len);
        if bytes.is_none() {
            self.lacking.borrow_mut().push((at, len));
        }
        bytes
    }
}

/// An ELF header: the width and byte order of the file, and where its program headers are.
struct Elf {
    wide: bool,
    big: bool,
    machine: u64,
    headers_at: u64,
    header_len: u64,
    headers: u64,
}

/// A program header. Offset and length are in bytes of the file, the address is in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    kind: u64,
    offset: u64,
    address: u64,
    len: u64,
    writable: bool,
    executable: bool,
}

/// The page size in bytes; larger ones only make the prefetched part of the code too short.
const PAGE: u64 = 4096;
// Types of program headers, and tags of the dynamic section.
const LOAD: u64 = 1;
const DYNAMIC: u64 = 2;
const INTERP: u64 = 3;
const TLS: u64 = 7;
const RELRO: u64 = 0x6474_e552;
const DT_NEEDED: u64 = 1;
const DT_PLTRELSZ: u64 = 2;
const DT_HASH: u64 = 4;
const DT_STRTAB: u64 = 5;
const DT_SYMTAB: u64 = 6;
const DT_RELA: u64 = 7;
const DT_RELASZ: u64 = 8;
const DT_STRSZ: u64 = 10;
const DT_RPATH: u64 = 15;
const DT_REL: u64 = 17;
const DT_RELSZ: u64 = 18;
const DT_PLTREL: u64 = 20;
const DT_JMPREL: u64 = 23;
const DT_INIT_ARRAY: u64 = 25;
const DT_INIT_ARRAYSZ: u64 = 27;
const DT_RUNPATH: u64 = 29;
const DT_RELRSZ: u64 = 35;
const DT_RELR: u64 = 36;
const DT_GNU_HASH: u64 = 0x6fff_fef5;
const DT_VERSYM: u64 = 0x6fff_fff0;
const DT_VERDEF: u64 = 0x6fff_fffc;
const DT_VERNEED: u64 = 0x6fff_fffe;

impl Elf {
    fn new(head: &[u8]) -> Option<Self> {
        if !head.starts_with(b"\x7fELF") {
            return None;
        }
        let (wide, big) = (*head.get(4)? == 2, *head.get(5)? == 2);
        let elf = Self {
            wide,
            big,
            machine: 0,
            headers_at: 0,
            header_len: 0,
            headers: 0,
        };
        let (headers_at, header_len, headers) = if wide { (32, 54, 56) } else { (28, 42, 44) };
        Some(Self {
            machine: elf.number(head, 18, 2)?,
            headers_at: elf.word(head, headers_at)?,
            header_len: elf.number(head, header_len, 2).filter(|len| *len <= LONGEST_HEADER)?,
            headers: elf.number(head, headers, 2)?.min(MOST_HEADERS),
            ..elf
        })
    }

    /// An unsigned field of `len` bytes at offset `at`, in the file's byte order.
    fn number(&self, bytes: &[u8], at: usize, len: usize) -> Option<u64> {
        let field = bytes.get(at..at.checked_add(len)?)?;
        let add = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
        Some(if self.big {
            field.iter().fold(0, add)
        } else {
            field.iter().rev().fold(0, add)
        })
    }

    /// An address, offset or size at offset `at`: 8 bytes in a 64-bit file, else 4.
    fn word(&self, bytes: &[u8], at: usize) -> Option<u64> {
        self.number(bytes, at, if self.wide { 8 } else { 4 })
    }

    /// Parses one program header; none if it is cut off.
    fn segment(&self, header: &[u8]) -> Option<Segment> {
        let (flags, offset, address, len) = if self.wide { (4, 8, 16, 32) } else { (24, 4, 8, 16) };
        let flags = self.number(header, flags, 4)?;
        Some(Segment {
            kind: self.number(header, 0, 4)?,
            offset: self.word(header, offset)?,
            address: self.word(header, address)?,
            len: self.word(header, len)?,
            writable: flags & 2 != 0,
            executable: flags & 1 != 0,
        })
    }

    fn needs(&self, file: &File<'_>, needs: &mut Needs) {
        let Some(table) = file.bytes(self.headers_at, self.headers * self.header_len) else {
            return;
        };
        let segments: Vec<Segment> = table
            .chunks_exact(len_usize(self.header_len).max(1))
            .filter_map(|header| self.segment(header))
            .collect();
        // The loader reads symbols and relocations, which lie in the first segment in front of the code, and relocates
        // what is writable.
        let mut loads = segments.iter().filter(|segment| segment.kind == LOAD);
        let part = |segment: &Segment| (segment.offset, segment.len);
        needs.parts.extend(loads.next().map(part));
        for segment in loads {
            if segment.writable {
                needs.parts.push(part(segment));
            } else if segment.executable {
                // `.init` is the first of it, `.fini` the last; each library's are called.
                let page = segment.len.min(PAGE);
                needs.parts.push((segment.offset, page));
                needs
                    .parts
                    .push((segment.offset.saturating_add(segment.len - page), page));
            }
        }
        if let Some(interp) = segments.iter().find(|segment| segment.kind == INTERP)
            && let Some(name) = file.bytes(interp.offset, interp.len.min(LONGEST_NAME))
        {
            needs.interpreter = Some(until_nul(&name)).filter(|name| name.starts_with(b"/"));
        }
        if let Some(dynamic) = segments.iter().find(|segment| segment.kind == DYNAMIC)
            && let Some(table) = file.bytes(dynamic.offset, dynamic.len.min(LONGEST_DYNAMIC))
        {
            self.dynamic(file, &segments, &table, needs);
        }
    }

    /// Takes libraries and search paths from the dynamic section.
    fn dynamic(&self, file: &File<'_>, segments: &[Segment], table: &[u8], needs: &mut Needs) {
        let width = if self.wide { 8 } else { 4 };
        let entries = || {
            table
                .chunks_exact(2 * width)
                .filter_map(|entry| Some((self.word(entry, 0)?, self.word(entry, width)?)))
                .take_while(|(tag, _)| *tag != 0)
        };
        let value = |wanted| entries().find(|(tag, _)| *tag == wanted).map(|(_, value)| value);
        self.tables(file, segments, &value, needs);
        let (Some(strings), Some(size)) = (value(DT_STRTAB), value(DT_STRSZ)) else {
            return;
        };
        // DT_STRTAB is an address in memory: the segment that is loaded there says where that is in the file.
        let home = segments.iter().find(|segment| {
            segment.kind == LOAD && segment.address <= strings && strings - segment.address < segment.len
        });
        let Some(strings_at) = home.and_then(|home| home.offset.checked_add(strings - home.address)) else {
            return;
        };
        let text = |offset: u64| {
            let at = strings_at.saturating_add(offset.min(size));
            let len = LONGEST_NAME
                .min(size.saturating_sub(offset))
                .min(file.len.saturating_sub(at));
            file.bytes(at, len).map(|bytes| until_nul(&bytes))
        };
        let named = |wanted: &'static [u64]| entries().filter(|(tag, _)| wanted.contains(tag)).take(MOST_NAMES);
        let libraries = named(&[DT_NEEDED]).filter_map(|(_, offset)| text(offset));
        needs.libraries.extend(libraries);
        for paths in named(&[DT_RPATH, DT_RUNPATH]).filter_map(|(_, offset)| text(offset)) {
            let paths = paths.split(|&byte| byte == b':').map(<[u8]>::to_vec);
            needs.search.extend(paths.take(MOST_NAMES));
        }
    }
}

impl Elf {
    /// Notes which tables a loader reads, and which of them say what else it does. `value` is what the dynamic section has for a tag.
    fn tables(&self, file: &File<'_>, segments: &[Segment], value: &dyn Fn(u64) -> Option<u64>, needs: &mut Needs) {
        /// Tables without a length of their own: they end where another one begins, or their segment ends.
        const OPEN: [u64; 6] = [DT_HASH, DT_SYMTAB, DT_GNU_HASH, DT_VERSYM, DT_VERDEF, DT_VERNEED];
        const CLOSED: [(u64, u64); 5] = [
            (DT_STRTAB, DT_STRSZ),
            (DT_RELA, DT_RELASZ),
            (DT_REL, DT_RELSZ),
            (DT_RELR, DT_RELRSZ),
            (DT_JMPREL, DT_PLTRELSZ),
        ];
        let loads: Vec<Segment> = segments
            .iter()
            .filter(|segment| segment.kind == LOAD)
            .copied()
            .collect();
        // Where a table at an address lies in the file, and how much of the file there is from there on.
        let place = |address: u64| {
            let holds = |segment: &&Segment| segment.address <= address && address - segment.address < segment.len;
            let home = loads.iter().find(holds)?;
            let inside = address - home.address;
            Some((home.offset.checked_add(inside)?, home.len - inside))
        };
        let closed = |(start, size)| {
            let (at, most) = place(value(start)?)?;
            let len = value(size)?
                .min(most)
                .min(file.len.saturating_sub(at))
                .min(LONGEST_TABLE);
            Some((at, len)).filter(|_| len > 0)
        };
        let starts = || {
            OPEN.iter()
                .chain(CLOSED.iter().map(|(start, _)| start))
                .filter_map(|tag| value(*tag))
        };
        let open = |tag: &u64| {
            let start = value(*tag)?;
            let (at, most) = place(start)?;
            let next = starts().filter(|other| *other > start).min().unwrap_or(u64::MAX);
            let len = most
                .min(next - start)
                .min(file.len.saturating_sub(at))
                .min(LONGEST_TABLE);
            Some((at, len))
        };
        needs.tables.extend(CLOSED.iter().filter_map(|table| closed(*table)));
        needs.tables.extend(OPEN.iter().filter_map(open));
        // Relocated all over, and then made read-only; what each thread gets a copy of.
        let whole = segments
            .iter()
            .filter(|segment| matches!(segment.kind, RELRO | TLS) && segment.len > 0);
        needs
            .tables
            .extend(whole.map(|segment| (segment.offset, segment.len.min(LONGEST_TABLE))));
        let by_jumps = if value(DT_PLTREL) == Some(DT_REL) {
            Entries::Rel
        } else {
            Entries::Rela
        };
        let relocations = [
            (Entries::Rela, (DT_RELA, DT_RELASZ)),
            (Entries::Rel, (DT_REL, DT_RELSZ)),
            (Entries::Relr, (DT_RELR, DT_RELRSZ)),
            (by_jumps, (DT_JMPREL, DT_PLTRELSZ)),
        ];
        let relocations: Vec<_> = relocations
            .into_iter()
            .filter_map(|(entries, table)| Some((entries, closed(table)?)))
            .collect();
        let array = value(DT_INIT_ARRAY).map_or((0, 0), |start| {
            (start, start.saturating_add(value(DT_INIT_ARRAYSZ).unwrap_or(0)))
        });
        needs.loading = Some(Loading::new(
            (self.wide, self.big, self.machine),
            loads,
            &relocations,
            array,
        ));
    }
}

fn until_nul(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|&byte| byte == 0).next().unwrap_or_default().to_vec()
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io::Read as _;
    use std::process::Command;
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::units::len_u64;

    fn peek_at(bytes: &[u8], at: u64, len: u64) -> Option<Vec<u8>> {
        let at = len_usize(at);
        Some(bytes.get(at..at.checked_add(len_usize(len))?)?.to_vec())
    }

    fn of(bytes: &[u8]) -> Needs {
        let needs = needs(len_u64(bytes.len()), &|at, len| peek_at(bytes, at, len));
        assert_eq!(needs.lacking, [], "all bytes are here");
        needs
    }

    #[test]
    fn scripts_name_their_interpreter() {
        let interpreter = |text: &[u8]| of(text).interpreter.map(|path| String::from_utf8(path).unwrap());
        assert_eq!(interpreter(b"#!/bin/sh\necho").as_deref(), Some("/bin/sh"));
        assert_eq!(
            interpreter(b"#! /usr/bin/env python3 -x\n").as_deref(),
            Some("/usr/bin/python3")
        );
        assert_eq!(interpreter(b"#!/usr/bin/env -S x\n").as_deref(), Some("/usr/bin/env"));
        assert_eq!(interpreter(b"#!sh\n"), None);
        assert_eq!(interpreter(b"#!"), None);
        assert_eq!(of(b""), Needs::default());
        assert_eq!(of(b"\x7fELF"), Needs::default());
        assert_eq!(of(&[0; 5000]), Needs::default());
    }

    /// What binutils says of this machine's shell is what is found in it.
    #[test]
    fn a_real_program_needs_what_readelf_says() {
        let path = std::fs::canonicalize("/bin/sh").unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let Ok(output) = Command::new("readelf").args(["-d", "-l", "-W"]).arg(&path).output() else {
            eprintln!("SKIP: a_real_program_needs_what_readelf_says: no readelf");
            return;
        };
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let between = |line: &str, open: char, close: char| {
            let (_, rest) = line.split_once(open)?;
            Some(rest.split_once(close)?.0.trim().to_owned())
        };
        let libraries: Vec<String> = said
            .lines()
            .filter(|line| line.contains("(NEEDED)"))
            .filter_map(|line| between(line, '[', ']'))
            .collect();
        let interpreter = said
            .lines()
            .find_map(|line| between(line.split_once("interpreter")?.1, ':', ']'));
        let found = of(&bytes);
        let text = |bytes: &Vec<u8>| String::from_utf8_lossy(bytes).into_owned();
        assert_eq!(found.libraries.iter().map(text).collect::<Vec<_>>(), libraries);
        assert_eq!(found.interpreter.as_ref().map(text), interpreter);
        assert!(found.parts.len() > 1 || libraries.is_empty());
        // The code's first and last page, but not what lies between.
        let hex = |field: Option<&str>| u64::from_str_radix(field?.strip_prefix("0x")?, 16).ok();
        let code = said
            .lines()
            .filter(|line| line.trim_start().starts_with("LOAD") && line.contains(" R E "));
        for line in code {
            let mut fields = line.split_whitespace().skip(1);
            let (offset, len) = (hex(fields.next()).unwrap(), hex(fields.nth(2)).unwrap());
            let page = len.min(PAGE);
            for part in [(offset, page), (offset + len - page, page)] {
                assert!(found.parts.contains(&part), "{part:x?} of {:x?}", found.parts);
            }
        }
    }

    /// Asking for what is lacking, piece by piece, comes to the same end, in few steps.
    #[test]
    fn what_is_lacking_is_asked_for() {
        let bytes = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let here = RefCell::new(Vec::<(u64, u64)>::new());
        let mut asked = 0;
        let found = loop {
            let peek = |at, len| {
                let known = here.borrow().iter().any(|&(from, to)| from <= at && at + len <= to);
                known.then(|| peek_at(&bytes, at, len)).flatten()
            };
            let found = needs(len_u64(bytes.len()), &peek);
            if found.lacking.is_empty() {
                break found;
            }
            asked += 1;
            assert!(asked < 6, "asks without end");
            here.borrow_mut()
                .extend(found.lacking.iter().map(|(at, len)| (*at, at + len)));
        };
        assert_eq!(found, of(&bytes));
        assert!(
            found.libraries.iter().any(|name| name.starts_with(b"libc.")),
            "{found:?}"
        );
    }

    /// The beginning of this program.
    static PROGRAM: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut bytes = Vec::new();
        let file = std::fs::File::open("/proc/self/exe").unwrap();
        file.take(1 << 20).read_to_end(&mut bytes).unwrap();
        bytes
    });

    proptest! {
        #[test]
        fn no_file_does_harm(mut bytes in proptest::collection::vec(any::<u8>(), 0..2000), real: bool) {
            if real {
                bytes.splice(0..0, *b"\x7fELF\x02\x01");
            }
            let found = of(&bytes);
            prop_assert!(found.libraries.len() <= MOST_NAMES);
        }

        #[test]
        fn no_damaged_program_does_harm(flips in proptest::collection::vec((0usize..4096, any::<u8>()), 1..20)) {
            let mut bytes = PROGRAM.clone();
            for (at, value) in flips {
                bytes[at] = value;
            }
            let found = of(&bytes);
            prop_assert!(found.libraries.len() <= MOST_NAMES);
        }
    }
}
