//! Prefetch of what programs load. In: files as they are read for the first time, chunks as they come. Out: ranges of other files
//! that will be read before the program runs.
//!
//! A loader goes from library to library and an interpreter from module to module, and over a network each step costs the
//! reader a round trip or two. The names of the next files are in the bytes that have just come: they are parsed here as
//! soon as they are in memory, and the files that they name are queued at once.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use super::chunks::ChunkRange;
use super::elf::loading::{Code, Loading, Part, Relocated};
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
use crate::units::{CHUNK_BYTES, TarRange, len_u64, len_usize};

/// The most files, and parts of their code, that wait for bytes to be parsed; then all are forgotten.
const MOST_PENDING: usize = 1 << 13;
/// The most files that are parsed in all. A system has a few thousand programs; further ones are served without this prefetch.
const MOST_KNOWN: usize = 1 << 16;
/// The most directories with libraries that are remembered.
const MOST_LIBRARY_DIRS: usize = 16;
/// The loader's list of libraries (ldconfig(8)), which it reads before any of them.
const LOADER_CACHE: &[u8] = b"/etc/ld.so.cache";
/// So many compiled modules whose sources were read as well mean that all of them are stale.
const MANY_STALE: u32 = 3;
/// The longest module that is parsed, in bytes.
const LONGEST_MODULE: u64 = 1 << 20;

/// What is read of a file next.
#[derive(Debug)]
enum Step {
    /// What it names: interpreter, libraries, modules; and the tables that its loader reads.
    Names,
    /// Its relocations.
    Relocations(Rc<Loading>, Relocated),
    /// The list of its initialisers.
    Initialisers(Rc<Loading>, Relocated),
    /// The code of some of them.
    Code(Rc<Loading>, Code),
}

/// A file that waits for bytes to be parsed.
#[derive(Debug)]
struct Pending {
    file: StoredFile,
    step: Step,
    /// The chunks that have to be in memory before it can be parsed further, the first of them last.
    lacking: Vec<ChunkRange>,
    /// How many loads lead to it from a file that a reader touched.
    hops: u8,
}

/// What is to be fetched.
#[derive(Debug, Default)]
struct Wants {
    /// Read for certain before the program that names it runs, and little: it goes like demand.
    now: Vec<Planned>,
    /// The rest, for when the link has room.
    soon: Vec<Planned>,
}

/// Parses touched files for what they load, as their bytes come.
#[derive(Debug, Default)]
pub(super) struct Programs {
    /// Files by a chunk that they wait for.
    waiting: HashMap<ChunkKey, Vec<Pending>>,
    /// How many those are.
    waiting_len: usize,
    /// Files whose chunks may be here: they are looked at next.
    fresh: Vec<Pending>,
    /// Files that were parsed or wait for it, with their `hops` at that time.
    known: HashMap<FileId, u8>,
    /// Directories in which libraries were found, the latest first.
    library_dirs: VecDeque<DirectoryId>,
    modules: Modules,
    /// How many sources of compiled modules were read after those.
    stale_modules: u32,
    wishes: Wishes,
}

impl Hint for Programs {
    /// A file that is touched for the first time is parsed as soon as its first bytes are here.
    fn touched(&mut self, touch: Touch, layers: &Layers, _: Look<'_>, _: &mut Vec<Planned>) {
        if let Some(file) = touch.file.filter(|_| touch.is_first) {
            if let Some(files) = layers.files.as_deref().filter(|_| self.stale_modules < MANY_STALE) {
                self.note_source(files, file);
            }
            self.look_into(file, 0);
        }
    }

    fn look_inside(&mut self, came: Option<ChunkKey>, layers: &Layers, peek: Peek<'_>, now: &mut Vec<Planned>) {
        let Some(files) = &layers.files else { return };
        if let Some(waiting) = came.and_then(|key| self.waiting.remove(&key)) {
            self.waiting_len -= waiting.len();
            self.fresh.extend(waiting);
        }
        let mut wants = Wants::default();
        while let Some(pending) = self.fresh.pop() {
            self.go_on(&**files, pending, &layers.options, peek, &mut wants);
        }
        now.append(&mut wants.now);
        // In the tar's order, so that neighbours are one request; before what was wanted earlier, because the latest
        // module's imports are read before those of the ones that import it, and the latest library is relocated first.
        wants.soon.sort_unstable_by_key(|want| want.chunks);
        self.wishes.push_all_front(wants.soon);
    }

    fn wishes(&mut self) -> &mut Wishes {
        &mut self.wishes
    }
}

impl Programs {
    /// Notes whether a file is the source of a compiled module that was read before: the interpreter takes that for stale, as when
    /// an image's times were changed after it was compiled. If many are, so will the others be: their sources are wanted as well.
    fn note_source(&mut self, files: &dyn FileMap, file: StoredFile) {
        let compiled = files.path(file.file).and_then(|path| self.modules.compiled_of(&path));
        let compiled = compiled.and_then(|path| files.resolve(file.directory, &path));
        if !compiled.is_some_and(|compiled| self.known.contains_key(&compiled.file)) {
            return;
        }
        self.stale_modules += 1;
        if self.stale_modules == MANY_STALE {
            let mut sources: Vec<Planned> = self.known.keys().filter_map(|file| source(files, *file)).collect();
            sources.sort_unstable_by_key(|want| want.chunks);
            self.wishes.push_all_front(sources);
        }
    }

    fn look_into(&mut self, file: StoredFile, hops: u8) {
        let known = self.known.get(&file.file).is_some_and(|before| *before <= hops);
        if known || self.known.len() >= MOST_KNOWN {
            return;
        }
        self.known.insert(file.file, hops);
        self.wait(file, Step::Names, &[(0, file.range.len.min(64))], hops);
    }

    /// Goes on with a file at `step` when these parts of it are in memory.
    fn wait(&mut self, file: StoredFile, step: Step, parts: &[Part], hops: u8) {
        let range = |&(at, len): &Part| TarRange::new(file.range.start.plus(at), len);
        let lacking = parts.iter().rev();
        let lacking = lacking.map(|part| ChunkRange::of(file.layer, range(part))).collect();
        self.fresh.push(Pending {
            file,
            step,
            lacking,
            hops,
        });
    }

    /// Parses a file if its bytes have come, or leaves it until the next of them comes.
    fn go_on(
        &mut self,
        files: &dyn FileMap,
        mut pending: Pending,
        options: &PlanOptions,
        peek: Peek<'_>,
        wants: &mut Wants,
    ) {
        while let Some(part) = pending.lacking.last_mut() {
            if part.is_empty() {
                pending.lacking.pop();
                continue;
            }
            let key = ChunkKey {
                layer: part.layer,
                index: part.first,
            };
            if !peek(key, &mut |_| ()) {
                if self.waiting_len >= MOST_PENDING {
                    self.waiting.clear();
                    self.waiting_len = 0;
                }
                self.waiting.entry(key).or_default().push(pending);
                self.waiting_len += 1;
                return;
            }
            part.first += 1;
        }
        let (file, hops) = (pending.file, pending.hops);
        match pending.step {
            Step::Names => self.read(files, file, hops, options, peek, wants),
            Step::Relocations(loading, mut relocated) => {
                if let Some((at, len)) = loading.needs(&relocated)
                    && let Some(bytes) = bytes_of(file, at, len, peek)
                {
                    let parts = loading.relocate(&mut relocated, &bytes);
                    wants.soon.extend(planned(file, &parts, Reason::Loader));
                    self.relocate(file, loading, relocated, hops);
                }
            }
            Step::Initialisers(loading, relocated) => {
                let array = loading.array_in_file();
                if let Some(array) = array.and_then(|(at, len)| bytes_of(file, at, len, peek)) {
                    for code in loading.initialisers(relocated, &array) {
                        wants.soon.extend(planned(file, &[code.part()], Reason::Initialiser));
                        let part = code.part();
                        self.wait(file, Step::Code(loading.clone(), code), &[part], hops);
                    }
                }
            }
            Step::Code(loading, code) => {
                let (at, len) = code.part();
                if let Some(bytes) = bytes_of(file, at, len, peek) {
                    let parts = loading.references(&code, &bytes);
                    wants.soon.extend(planned(file, &parts, Reason::Initialiser));
                }
            }
        }
    }

    /// Goes on with the next piece of a file's relocations, or with its initialisers when there is none.
    fn relocate(&mut self, file: StoredFile, loading: Rc<Loading>, relocated: Relocated, hops: u8) {
        if let Some(part) = loading.needs(&relocated) {
            self.wait(file, Step::Relocations(loading, relocated), &[part], hops);
        } else if let Some(array) = loading.array_in_file() {
            self.wait(file, Step::Initialisers(loading, relocated), &[array], hops);
        }
    }

    fn read(
        &mut self,
        files: &dyn FileMap,
        file: StoredFile,
        hops: u8,
        options: &PlanOptions,
        peek: Peek<'_>,
        wants: &mut Wants,
    ) {
        let len = file.range.len;
        let bytes = |at, len| bytes_of(file, at, len, peek);
        let Some(head) = bytes(0, len.min(64)) else { return };
        let path = files.path(file.file).unwrap_or_default();
        if len <= LONGEST_MODULE && (python::is_compiled(&head) || node::is_script(&path)) {
            match bytes(0, len) {
                Some(bytes) => self.import(files, file, &path, &bytes, hops, options, wants),
                None => self.wait(file, Step::Names, &[(0, len)], hops),
            }
            return;
        }
        let needs = needs(len, &bytes);
        self.follow(files, file, &needs, options, hops, wants);
        if !needs.lacking.is_empty() {
            wants.now.extend(planned(file, &needs.lacking, Reason::Loader));
            self.wait(file, Step::Names, &needs.lacking, hops);
        } else if let Some(loading) = needs.loading
            && len > options.small_file_bytes
        {
            self.relocate(file, Rc::new(loading), Relocated::default(), hops);
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
        wants: &mut Wants,
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
        for module in modules {
            let beginning = self.want(module, options, hops + 1);
            if self.stale_modules >= MANY_STALE && !beginning.is_empty() {
                wants.soon.extend(source(files, module.file));
            }
            // The libraries that an extension needs are a chain of waits, so it is begun at once; it is only the beginnings of files.
            let is_extension = files.path(module.file).is_some_and(|path| path.ends_with(b".so"));
            let wants = if is_extension { &mut wants.now } else { &mut wants.soon };
            wants.extend(planned(module, &beginning, Reason::Import));
        }
    }

    fn follow(
        &mut self,
        files: &dyn FileMap,
        file: StoredFile,
        needs: &Needs,
        options: &PlanOptions,
        hops: u8,
        wants: &mut Wants,
    ) {
        if !needs.parts.is_empty()
            && let Some(path) = files.path(file.file)
        {
            self.modules.saw(&path);
        }
        if let Some(interpreter) = needs.interpreter.as_ref()
            && let Some(interpreter) = files.resolve(file.directory, interpreter)
        {
            let beginning = self.want(interpreter, options, hops);
            wants.now.extend(planned(interpreter, &beginning, Reason::Loader));
            // Libraries are often in the directory of the loader.
            self.found_in(interpreter.directory);
            if !needs.libraries.is_empty()
                && let Some(cache) = files.resolve(file.directory, LOADER_CACHE)
            {
                wants
                    .now
                    .extend(planned(cache, &[(0, options.program_part_bytes)], Reason::Loader));
            }
        }
        let parts: Vec<Part> = needs
            .parts
            .iter()
            .flat_map(|part| around(file, *part, options))
            .collect();
        wants.now.extend(planned(file, &parts, Reason::Loader));
        let tables = planned(file, &needs.tables, Reason::Loader);
        if needs.tables.iter().map(|(_, len)| len).sum::<u64>() <= options.program_part_bytes {
            wants.now.extend(tables);
        } else {
            wants.soon.extend(tables);
        }
        for name in &needs.libraries {
            if let Some(library) = self.find(files, file.directory, &needs.search, name) {
                let beginning = self.want(library, options, hops);
                wants.now.extend(planned(library, &beginning, Reason::Loader));
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

    /// The beginning of a file that will be read, which is parsed when that has come; nothing if it is known already.
    fn want(&mut self, file: StoredFile, options: &PlanOptions, hops: u8) -> Vec<Part> {
        if self.known.contains_key(&file.file) {
            return Vec::new();
        }
        let whole = file.range.len <= options.program_part_bytes;
        self.look_into(file, hops);
        vec![(0, if whole { file.range.len } else { 2 * CHUNK_BYTES })]
    }

    fn found_in(&mut self, directory: DirectoryId) {
        self.library_dirs.retain(|home| *home != directory);
        self.library_dirs.push_front(directory);
        self.library_dirs.truncate(MOST_LIBRARY_DIRS);
    }
}

/// The source of a compiled module of Python, if that is what the file is.
fn source(files: &dyn FileMap, compiled: FileId) -> Option<Planned> {
    let path = files.path(compiled).and_then(|path| python::source_of(&path))?;
    let source = files.resolve(DirectoryId(0), &path)?;
    planned(source, &[(0, LONGEST_MODULE)], Reason::Import).pop()
}

/// What is fetched of a part of a program that is read here and there: what a page fault brings around it as well (fault-around),
/// and of a big part both ends, because tables are at the beginning, and the kernel clears the last page behind the data.
fn around(file: StoredFile, (at, len): Part, options: &PlanOptions) -> Vec<Part> {
    let (from, to) = (at.saturating_sub(options.fault_around_bytes), at.saturating_add(len));
    let at = from.min(file.range.len);
    let len = to.saturating_add(options.fault_around_bytes).min(file.range.len) - at;
    if len <= options.program_part_bytes {
        return vec![(at, len)];
    }
    let half = options.program_part_bytes / 2;
    vec![(at, half), (at + len - half, half)]
}

/// Parts of a file, cut at its end, as ranges of chunks; those that touch are one.
fn planned(file: StoredFile, parts: &[Part], reason: Reason) -> Vec<Planned> {
    let mut all: Vec<Planned> = Vec::new();
    for &(at, len) in parts {
        let len = len.min(file.range.len.saturating_sub(at));
        let range = TarRange::new(file.range.start.plus(at), len);
        let chunks = ChunkRange::of(file.layer, range);
        match all.last_mut() {
            Some(last) if (last.chunks.first..=last.chunks.end).contains(&chunks.first) => {
                last.chunks.end = last.chunks.end.max(chunks.end);
            }
            _ if chunks.is_empty() => {}
            _ => all.push(reason.of(chunks)),
        }
    }
    all
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
