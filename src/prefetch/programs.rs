//! Programs and what they need. In: files at their first touch, chunks as they come. Out: ranges of other files that will be
//! read before the program runs.
//!
//! A loader goes from library to library and an interpreter from module to module, and over a network each step costs the
//! reader a round trip or two. The names of the next ones stand in the bytes that have just come: they are read here as
//! soon as they are in memory, and what they name is asked for at once.

use std::collections::{HashMap, VecDeque};

use super::elf::{Needs, needs};
use super::node;
use super::python::{self, Modules, When};
use super::{ChunkRange, Peek, PlanOptions, Reason};
use crate::cache::chunk::ChunkKey;
use crate::image::{DirectoryId, FileId, FileMap, StoredFile};
use crate::units::{CHUNK_BYTES, LayerId, TarRange, len_u64, len_usize};

/// Files that are being looked into at once; beyond, the oldest is given up.
const MOST_OPEN: usize = 256;
/// Files looked into in all. A system has a few thousand programs; who has more is served without.
const MOST_KNOWN: usize = 1 << 16;
/// Directories in which libraries were found.
const MOST_HOMES: usize = 16;
/// The loader's own list of libraries, which it reads before any of them.
const LOADER_CACHE: &[u8] = b"/etc/ld.so.cache";
/// Compiled modules longer than this are not searched.
const LONGEST_MODULE: u64 = 1 << 20;

/// A file that is being looked into.
#[derive(Debug)]
struct Open {
    file: StoredFile,
    /// What must be here before more can be said.
    lacking: Vec<ChunkRange>,
    /// How many files lie between it and one that a reader touched.
    hops: u8,
}

/// What will be read: where, and whether certainly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) layer: LayerId,
    pub(super) range: TarRange,
    pub(super) reason: Reason,
    /// It is read before the program that names it runs; else it is likely.
    pub(super) certain: bool,
}

/// The touched files that are to be looked into, and the loaders that read them; see the module.
#[derive(Debug, Default)]
pub(super) struct Programs {
    open: VecDeque<Open>,
    /// Files that were looked into, and how far from a touched one they were then.
    known: HashMap<FileId, u8>,
    /// Where libraries were found, the latest first.
    homes: VecDeque<DirectoryId>,
    modules: Modules,
    /// Whether files were touched that have not been looked into yet.
    fresh: bool,
}

impl Programs {
    /// A file is touched for the first time: its first bytes are here or will be soon.
    pub(super) fn touched(&mut self, file: StoredFile) {
        self.look_into(file, 0);
        self.fresh = true;
    }

    fn look_into(&mut self, file: StoredFile, hops: u8) {
        let known = self.known.get(&file.file).is_some_and(|before| *before <= hops);
        if known || self.known.len() >= MOST_KNOWN {
            return;
        }
        self.known.insert(file.file, hops);
        self.wait(file, &[(0, file.range.len.min(64))], hops);
    }

    fn wait(&mut self, file: StoredFile, lacking: &[(u64, u64)], hops: u8) {
        let range = |&(at, len): &(u64, u64)| TarRange::new(file.range.start.plus(at), len);
        let lacking = lacking
            .iter()
            .map(|part| ChunkRange::of(file.layer, range(part)))
            .collect();
        self.open.push_back(Open { file, lacking, hops });
        if self.open.len() > MOST_OPEN {
            self.open.pop_front();
        }
    }

    /// Whether there is something to look into that may have been here before it was touched.
    pub(super) fn is_fresh(&self) -> bool {
        self.fresh
    }

    /// Whether a chunk is one that is waited for.
    pub(super) fn awaits(&self, key: ChunkKey) -> bool {
        let is_it = |part: &ChunkRange| part.layer == key.layer && (part.first..part.end).contains(&key.index);
        self.open.iter().any(|open| open.lacking.iter().any(is_it))
    }

    /// Looks into the files whose bytes are here. Returns what to fetch, the most urgent first.
    pub(super) fn read_on(&mut self, files: &dyn FileMap, options: &PlanOptions, peek: Peek<'_>) -> Vec<Wanted> {
        self.fresh = false;
        let mut wanted = Vec::new();
        for _ in 0..self.open.len() {
            let Some(open) = self.open.pop_front() else { break };
            let here = |part: &ChunkRange| part.keys().all(|key| peek(key, &mut |_| ()));
            if open.lacking.iter().all(here) {
                self.read(files, &open, options, peek, &mut wanted);
            } else {
                self.open.push_back(open);
            }
        }
        wanted
    }

    fn read(
        &mut self,
        files: &dyn FileMap,
        open: &Open,
        options: &PlanOptions,
        peek: Peek<'_>,
        wanted: &mut Vec<Wanted>,
    ) {
        let (file, len) = (open.file, open.file.range.len);
        let bytes = |at, len| bytes_of(file, at, len, peek);
        let Some(head) = bytes(0, len.min(64)) else { return };
        let path = files.path(file.file).unwrap_or_default();
        if len <= LONGEST_MODULE && (python::is_compiled(&head) || node::is_script(&path)) {
            match bytes(0, len) {
                Some(bytes) => self.import(files, file, &path, &bytes, open.hops, options, wanted),
                None => self.wait(file, &[(0, len)], open.hops),
            }
            return;
        }
        let needs = needs(len, &bytes);
        self.follow(files, file, &needs, options, open.hops, wanted);
        if !needs.lacking.is_empty() {
            wanted.extend(needs.lacking.iter().map(|(at, len)| part_of(file, *at, *len)));
            self.wait(file, &needs.lacking, open.hops);
        }
    }

    /// What a module of Python or Node loads.
    #[expect(clippy::too_many_arguments, reason = "a file, and what it is looked into with")]
    fn import(
        &mut self,
        files: &dyn FileMap,
        file: StoredFile,
        path: &[u8],
        bytes: &[u8],
        hops: u8,
        options: &PlanOptions,
        wanted: &mut Vec<Wanted>,
    ) {
        if hops >= options.import_hops {
            return;
        }
        let exists = |path: &[u8]| files.resolve(file.directory, path);
        let modules = if node::is_script(path) {
            node::loads(path, bytes, &exists)
        } else {
            // What only functions import is hardly ever read before something else shows it.
            let imports = self.modules.imports(path, bytes, &exists).into_iter();
            imports
                .filter(|(_, when)| *when == When::Imported)
                .map(|(module, _)| module)
                .collect()
        };
        let first = wanted.len();
        for module in modules {
            self.want(module, options, hops + 1, wanted);
        }
        for wanted in &mut wanted[first..] {
            (wanted.certain, wanted.reason) = (false, Reason::Import);
        }
    }

    fn follow(
        &mut self,
        files: &dyn FileMap,
        file: StoredFile,
        needs: &Needs,
        options: &PlanOptions,
        hops: u8,
        wanted: &mut Vec<Wanted>,
    ) {
        if !needs.parts.is_empty()
            && let Some(path) = files.path(file.file)
        {
            self.modules.saw(&path);
        }
        if let Some(interpreter) = needs.interpreter.as_ref()
            && let Some(interpreter) = files.resolve(file.directory, interpreter)
        {
            self.want(interpreter, options, hops, wanted);
            // Libraries lie where the one that loads them lies.
            self.found_in(interpreter.directory);
            if !needs.libraries.is_empty()
                && let Some(cache) = files.resolve(file.directory, LOADER_CACHE)
            {
                wanted.push(part_of(cache, 0, options.program_part_bytes));
            }
        }
        for &(at, len) in &needs.parts {
            // A fault brings what lies around it as well.
            let (from, to) = (at.saturating_sub(options.fault_around_bytes), at.saturating_add(len));
            let at = from.min(file.range.len);
            let len = to.saturating_add(options.fault_around_bytes).min(file.range.len) - at;
            let mut want = |at, len| {
                if len > 0 {
                    wanted.push(part_of(file, at, len));
                }
            };
            if len <= options.program_part_bytes {
                want(at, len);
            } else {
                // Of a big part both ends: tables lie at the beginning, the kernel clears what is behind the end.
                let half = options.program_part_bytes / 2;
                want(at, half);
                want(at + len - half, half);
            }
        }
        for name in &needs.libraries {
            if let Some(library) = self.find(files, file.directory, &needs.search, name) {
                self.want(library, options, hops, wanted);
                self.found_in(library.directory);
            }
        }
    }

    /// The library `name`: where the program says, beside the program, or where others were found.
    fn find(&self, files: &dyn FileMap, origin: DirectoryId, search: &[Vec<u8>], name: &[u8]) -> Option<StoredFile> {
        if name.is_empty() || name.contains(&b'/') {
            return files.resolve(origin, name);
        }
        let named = search.iter().find_map(|place| {
            let place = place
                .strip_prefix(b"$ORIGIN")
                .or_else(|| place.strip_prefix(b"${ORIGIN}"))
                .map_or_else(|| place.clone(), |rest| [b".", rest].concat());
            files.resolve(origin, &[&place[..], b"/", name].concat())
        });
        named.or_else(|| self.homes.iter().find_map(|home| files.resolve(*home, name)))
    }

    /// A file that will be read: its beginning, and when that is here what it says.
    fn want(&mut self, file: StoredFile, options: &PlanOptions, hops: u8, wanted: &mut Vec<Wanted>) {
        if self.known.contains_key(&file.file) {
            return;
        }
        let whole = file.range.len <= options.program_part_bytes;
        wanted.push(part_of(file, 0, if whole { file.range.len } else { 2 * CHUNK_BYTES }));
        self.look_into(file, hops);
    }

    fn found_in(&mut self, directory: DirectoryId) {
        self.homes.retain(|home| *home != directory);
        self.homes.push_front(directory);
        self.homes.truncate(MOST_HOMES);
    }
}

/// A part of a file, as far as the file goes.
fn part_of(file: StoredFile, at: u64, len: u64) -> Wanted {
    let len = len.min(file.range.len.saturating_sub(at));
    Wanted {
        layer: file.layer,
        range: TarRange::new(file.range.start.plus(at), len),
        reason: Reason::Loader,
        certain: true,
    }
}

/// Bytes of a file out of the chunks that hold them, when all of them are in memory.
fn bytes_of(file: StoredFile, at: u64, len: u64, peek: Peek<'_>) -> Option<Vec<u8>> {
    let range = TarRange::new(file.range.start.plus(at), len);
    let mut bytes = Vec::with_capacity(len_usize(len));
    for key in ChunkRange::of(file.layer, range).keys() {
        let from = range.start.0.saturating_sub(key.start().0);
        let to = range.end().0 - key.start().0;
        peek(key, &mut |chunk| {
            let to = to.min(len_u64(chunk.len()));
            bytes.extend_from_slice(chunk.get(len_usize(from)..len_usize(to)).unwrap_or_default());
        });
    }
    (len_u64(bytes.len()) == len).then_some(bytes)
}
