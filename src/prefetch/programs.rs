//! Prefetch of what programs load. In: files as they are read for the first time, chunks as they come. Out: ranges of other files
//! that will be read before the program runs.
//!
//! A loader goes from library to library and an interpreter from module to module, and over a network each step costs the
//! reader a round trip or two. The names of the next files are in the bytes that have just come: they are parsed here as
//! soon as they are in memory, and the files that they name are queued at once.

use std::collections::{HashMap, VecDeque};
use std::ops::ControlFlow;
use std::rc::Rc;

use super::elf::loading::{Code, Loading, Part, Relocated};
use super::elf::{Needs, needs};
use super::hint::{Hint, Layers, Touch};
use super::node;
use super::options::PlanOptions;
use super::python::{self, Modules, When};
use super::reason::{Planned, Reason};
use super::scripts::{Language, Scripts};
use super::waiting::{Pending, Waiting, bytes_of, planned};
use super::wishes::Wishes;
use super::{Look, Peek};
use crate::cache::chunk::ChunkKey;
use crate::image::{DirectoryId, FileId, FileMap, StoredFile};
use crate::units::CHUNK_BYTES;

/// The most files that are parsed in all. A system has a few thousand programs; further ones are served without this prefetch.
const MOST_KNOWN: usize = 1 << 16;
/// The most directories with libraries that are remembered.
const MOST_LIBRARY_DIRS: usize = 16;
/// The loader's list of libraries (ldconfig(8)), which it reads before any of them.
const LOADER_CACHE: &[u8] = b"/etc/ld.so.cache";
/// So many compiled modules whose sources were read as well mean that all of them are stale.
const MANY_STALE: u32 = 3;
/// The most settings files of one directory that are looked into.
const MOST_BESIDE: usize = 64;
/// The longest module that is parsed, in bytes.
const LONGEST_MODULE: u64 = 1 << 20;

/// What a library opens by name as soon as it runs (dlopen(3), open(2)), which no table of it says: by the end of its path, with paths
/// relative to its directory. Java's launcher picks a virtual machine, which has the runtime's own classes and libraries beside it.
const OPENED_BY: [(&[u8], &[&[u8]]); 2] = [
    (b"/libjli.so", &[b"jvm.cfg", b"server/libjvm.so"]),
    (
        b"/server/libjvm.so",
        &[
            b"../libjimage.so",
            b"../libjava.so",
            b"../modules",
            b"classes.jsa",
            b"../libnio.so",
            b"../libnet.so",
            b"../libzip.so",
            b"../libjsvml.so",
        ],
    ),
];

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
    waiting: Waiting<Step>,
    /// Files that were parsed or wait for it, with their `hops` at that time.
    known: HashMap<FileId, u8>,
    /// Directories in which libraries were found, the latest first.
    library_dirs: VecDeque<DirectoryId>,
    modules: Modules,
    scripts: Scripts,
    /// How many sources of compiled modules were read after those.
    stale_modules: u32,
    wishes: Wishes,
}

impl Hint for Programs {
    /// A file that is touched for the first time is parsed as soon as its first bytes are here.
    fn touched(&mut self, touch: Touch, layers: &Layers, _: Look<'_>, _: &mut Vec<Planned>) {
        if let Some(file) = touch.file.filter(|_| touch.is_first) {
            if let Some(files) = layers.files.as_deref() {
                let path = files.path(file.file).unwrap_or_default();
                if self.stale_modules < MANY_STALE {
                    self.note_source(files, file, &path);
                }
                let named = self.scripts.saw(&path, &|path| files.resolve(file.directory, path));
                for module in named {
                    let beginning = self.want(module, &layers.options, 1);
                    self.wishes.push_all_front(planned(module, &beginning, Reason::Import));
                }
            }
            self.look_into(file, 0);
        }
    }

    fn look_inside(&mut self, came: Option<ChunkKey>, layers: &Layers, peek: Peek<'_>, now: &mut Vec<Planned>) {
        let Some(files) = &layers.files else { return };
        if let Some(key) = came {
            self.waiting.came(key);
        }
        let mut wants = Wants::default();
        while let Some(pending) = self.waiting.ready(peek) {
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
    fn note_source(&mut self, files: &dyn FileMap, file: StoredFile, path: &[u8]) {
        let compiled = self.modules.compiled_of(path);
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
        self.waiting
            .wait(file, Step::Names, &[(0, file.range.len.min(64))], hops);
    }

    /// Parses a file whose bytes have come.
    fn go_on(
        &mut self,
        files: &dyn FileMap,
        pending: Pending<Step>,
        options: &PlanOptions,
        peek: Peek<'_>,
        wants: &mut Wants,
    ) {
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
                        self.waiting
                            .wait(file, Step::Code(loading.clone(), code), &[part], hops);
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
            self.waiting
                .wait(file, Step::Relocations(loading, relocated), &[part], hops);
        } else if let Some(array) = loading.array_in_file() {
            self.waiting
                .wait(file, Step::Initialisers(loading, relocated), &[array], hops);
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
        let language = Language::of(&path, &head);
        if len <= LONGEST_MODULE && (python::is_compiled(&head) || node::is_script(&path) || language.is_some()) {
            match bytes(0, len) {
                Some(bytes) => self.import(files, file, &path, &bytes, hops, options, wants),
                None => self.waiting.wait(file, Step::Names, &[(0, len)], hops),
            }
            if !head.starts_with(b"#!") {
                return;
            }
        }
        let needs = needs(len, &bytes);
        self.follow(files, file, &needs, options, hops, wants);
        self.open(files, file, &path, options, hops, wants);
        if !needs.lacking.is_empty() {
            wants.now.extend(planned(file, &needs.lacking, Reason::Loader));
            self.waiting.wait(file, Step::Names, &needs.lacking, hops);
        } else if let Some(loading) = needs.loading
            && len > options.small_file_bytes
        {
            self.relocate(file, Rc::new(loading), Relocated::default(), hops);
        }
    }

    /// Adds what a module of Python or Node.js, or a script of another language, loads.
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
        } else if let Some(language) = Language::of(path, bytes) {
            if language == Language::PhpSettings {
                self.look_beside(files, file, hops);
            }
            self.scripts.loads(language, path, bytes, &exists)
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

    /// Looks into the settings beside one as well: all of a directory are read in a row, and most of them come in one chunk.
    fn look_beside(&mut self, files: &dyn FileMap, file: StoredFile, hops: u8) {
        let mut visits = 0;
        files.neighbours(file.file, &mut |beside| {
            visits += 1;
            if files.path(beside.file).is_some_and(|path| path.ends_with(b".ini")) {
                self.look_into(beside, hops);
            }
            if visits < MOST_BESIDE {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        });
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

    /// Adds what a library opens by name.
    fn open(
        &mut self,
        files: &dyn FileMap,
        file: StoredFile,
        path: &[u8],
        options: &PlanOptions,
        hops: u8,
        wants: &mut Wants,
    ) {
        let opened = OPENED_BY.iter().find(|(ending, _)| path.ends_with(ending));
        for name in opened.map_or(&[][..], |(_, names)| names) {
            if let Some(file) = files.resolve(file.directory, name) {
                let beginning = self.want(file, options, hops);
                wants.now.extend(planned(file, &beginning, Reason::Loader));
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
