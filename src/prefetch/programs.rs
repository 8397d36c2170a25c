//! Prefetch of what programs load. In: files as they are read for the first time, chunks as they come. Out: ranges of other files
//! that will be read before the program runs.
//!
//! A loader goes from library to library and an interpreter from module to module, and over a network each step costs the
//! reader a round trip or two. The names of the next files are in the bytes that have just come: they are parsed here as
//! soon as they are in memory, and the files that they name are queued at once.

use std::collections::{HashMap, VecDeque};

use super::chunks::ChunkRange;
use super::elf::{Needs, needs};
use super::hint::{Hint, Layers, Touch};
use super::node;
use super::options::PlanOptions;
use super::python::{self, Modules, When};
use super::reason::{Planned, Reason};
use super::wishes::Wishes;
use super::{Look, Peek};
use crate::cache::chunk::ChunkKey;
use crate::image::{DirectoryId, FileId, FileMap, StoredFile};
use crate::units::{CHUNK_BYTES, LayerId, TarRange, len_u64, len_usize};

/// The most files that wait for bytes to be parsed; the oldest is dropped for another.
const MOST_PENDING: usize = 256;
/// The most files that are parsed in all. A system has a few thousand programs; further ones are served without this prefetch.
const MOST_KNOWN: usize = 1 << 16;
/// The most directories with libraries that are remembered.
const MOST_LIBRARY_DIRS: usize = 16;
/// The loader's list of libraries (ldconfig(8)), which it reads before any of them.
const LOADER_CACHE: &[u8] = b"/etc/ld.so.cache";
/// The longest module that is parsed, in bytes.
const LONGEST_MODULE: u64 = 1 << 20;

/// A file that waits for bytes to be parsed.
#[derive(Debug)]
struct Pending {
    file: StoredFile,
    /// The chunks that have to be in memory before it can be parsed further.
    lacking: Vec<ChunkRange>,
    /// How many loads lead to it from a file that a reader touched.
    hops: u8,
}

/// A range to prefetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wanted {
    layer: LayerId,
    range: TarRange,
    reason: Reason,
    /// Whether it is read for certain before the program that names it runs; else it is only likely.
    certain: bool,
}

/// Parses touched files for what they load, as their bytes come.
#[derive(Debug, Default)]
pub(super) struct Programs {
    pending: VecDeque<Pending>,
    /// Files that were parsed or wait for it, with their `hops` at that time.
    known: HashMap<FileId, u8>,
    /// Directories in which libraries were found, the latest first.
    library_dirs: VecDeque<DirectoryId>,
    modules: Modules,
    /// Whether files were touched since they were last read on.
    fresh: bool,
    /// What is only likely.
    wishes: Wishes,
}

impl Hint for Programs {
    /// A file that is touched for the first time is parsed as soon as its first bytes are here.
    fn touched(&mut self, touch: Touch, _: &Layers, _: Look<'_>, _: &mut Vec<Planned>) {
        if let Some(file) = touch.file.filter(|_| touch.is_first) {
            self.look_into(file, 0);
            self.fresh = true;
        }
    }

    fn awaits(&self, key: ChunkKey) -> bool {
        let is_it = |part: &ChunkRange| part.layer == key.layer && (part.first..part.end).contains(&key.index);
        self.pending.iter().any(|waiting| waiting.lacking.iter().any(is_it))
    }

    fn is_fresh(&self) -> bool {
        self.fresh
    }

    fn read_on(&mut self, layers: &Layers, peek: Peek<'_>, now: &mut Vec<Planned>) {
        let Some(files) = &layers.files else { return };
        let wanted = self.parse(&**files, &layers.options, peek);
        let want = |wanted: &Wanted| wanted.reason.of(ChunkRange::of(wanted.layer, wanted.range));
        now.extend(wanted.iter().filter(|wanted| wanted.certain).map(want));
        // In the tar's order, so that neighbours are one request; before what was wanted earlier, because the latest
        // module's imports are read before those of the ones that import it.
        let mut likely: Vec<Planned> = wanted.iter().filter(|wanted| !wanted.certain).map(want).collect();
        likely.sort_unstable_by_key(|want| want.chunks);
        self.wishes.push_all_front(likely);
    }

    fn wishes(&mut self) -> &mut Wishes {
        &mut self.wishes
    }
}

impl Programs {
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
        self.pending.push_back(Pending { file, lacking, hops });
        if self.pending.len() > MOST_PENDING {
            self.pending.pop_front();
        }
    }

    /// Parses the files whose bytes have come. Returns what to fetch, the most urgent first.
    fn parse(&mut self, files: &dyn FileMap, options: &PlanOptions, peek: Peek<'_>) -> Vec<Wanted> {
        self.fresh = false;
        let mut wanted = Vec::new();
        for _ in 0..self.pending.len() {
            let Some(waiting) = self.pending.pop_front() else { break };
            let here = |part: &ChunkRange| part.keys().all(|key| peek(key, &mut |_| ()));
            if waiting.lacking.iter().all(here) {
                self.read(files, &waiting, options, peek, &mut wanted);
            } else {
                self.pending.push_back(waiting);
            }
        }
        wanted
    }

    fn read(
        &mut self,
        files: &dyn FileMap,
        waiting: &Pending,
        options: &PlanOptions,
        peek: Peek<'_>,
        wanted: &mut Vec<Wanted>,
    ) {
        let (file, len) = (waiting.file, waiting.file.range.len);
        let bytes = |at, len| bytes_of(file, at, len, peek);
        let Some(head) = bytes(0, len.min(64)) else { return };
        let path = files.path(file.file).unwrap_or_default();
        if len <= LONGEST_MODULE && (python::is_compiled(&head) || node::is_script(&path)) {
            match bytes(0, len) {
                Some(bytes) => self.import(files, file, &path, &bytes, waiting.hops, options, wanted),
                None => self.wait(file, &[(0, len)], waiting.hops),
            }
            return;
        }
        let needs = needs(len, &bytes);
        self.follow(files, file, &needs, options, waiting.hops, wanted);
        if !needs.lacking.is_empty() {
            wanted.extend(needs.lacking.iter().map(|(at, len)| part_of(file, *at, *len)));
            self.wait(file, &needs.lacking, waiting.hops);
        }
    }

    /// Adds what a module of Python or Node.js loads.
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
            // What only functions import is seldom read at all, and then long after.
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
            // Libraries are often in the directory of the loader.
            self.found_in(interpreter.directory);
            if !needs.libraries.is_empty()
                && let Some(cache) = files.resolve(file.directory, LOADER_CACHE)
            {
                wanted.push(part_of(cache, 0, options.program_part_bytes));
            }
        }
        for &(at, len) in &needs.parts {
            // A page fault brings pages around it as well (fault-around).
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
                // Of a big part both ends: tables are at the beginning, and the kernel clears the last page behind the data.
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

    /// Finds the library `name`: in the search paths of the program, or where others were found.
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
        named.or_else(|| self.library_dirs.iter().find_map(|home| files.resolve(*home, name)))
    }

    /// Adds the beginning of a file that will be read, and parses it when that has come.
    fn want(&mut self, file: StoredFile, options: &PlanOptions, hops: u8, wanted: &mut Vec<Wanted>) {
        if self.known.contains_key(&file.file) {
            return;
        }
        let whole = file.range.len <= options.program_part_bytes;
        wanted.push(part_of(file, 0, if whole { file.range.len } else { 2 * CHUNK_BYTES }));
        self.look_into(file, hops);
    }

    fn found_in(&mut self, directory: DirectoryId) {
        self.library_dirs.retain(|home| *home != directory);
        self.library_dirs.push_front(directory);
        self.library_dirs.truncate(MOST_LIBRARY_DIRS);
    }
}

/// A part of a file, by offset and length in bytes, cut at the file's end.
fn part_of(file: StoredFile, at: u64, len: u64) -> Wanted {
    let len = len.min(file.range.len.saturating_sub(at));
    Wanted {
        layer: file.layer,
        range: TarRange::new(file.range.start.plus(at), len),
        reason: Reason::Loader,
        certain: true,
    }
}

/// The `len` bytes of a file at offset `at`; none unless all chunks that hold them are in memory.
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
