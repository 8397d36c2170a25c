//! Prefetch inside of Java's archives. In: archives as they are read for the first time, chunks as they come. Out: their
//! directories, and the classes that will be loaded.
//!
//! A virtual machine opens one archive of its class path after the other, reads the end of each, then its directory, and then takes
//! class after class out of the middle of them, each of which costs the reader a round trip or two. But the directory says where every
//! class is, a manifest which one runs first and which archives belong to it, and each class which others it uses: they are followed
//! as they come, as far as [`PlanOptions::class_hops`](super::PlanOptions::class_hops).

mod jar;

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::ops::ControlFlow;

use super::elf::loading::Part;
use super::hint::{Hint, Layers, Touch};
use super::options::PlanOptions;
use super::reason::{Planned, Reason};
use super::waiting::{Pending, Waiting, bytes_of, planned};
use super::wishes::Wishes;
use super::{Look, Peek};
use crate::cache::chunk::ChunkKey;
use crate::image::{DirectoryId, FileId, FileMap, StoredFile};
use crate::units::{TarRange, len_u64, len_usize};

/// The most archives that are opened, those inside of others counted.
const MOST_ARCHIVES: usize = 1024;
/// The most classes whose places are remembered: about 5 MB.
const MOST_CLASSES: usize = 1 << 17;
/// The longest directory that is parsed, in bytes.
const LONGEST_DIRECTORY: u64 = 8 << 20;
/// The most bytes of directories that are parsed in all: what an archive says of those inside of it may be the same for all of them.
const MOST_DIRECTORY_BYTES: u64 = 64 << 20;
/// The most entries that are unpacked in all.
const MOST_ENTRIES: usize = 1 << 13;
/// The most classes that are taken for those that a reader turned to with one read.
const MOST_READ: usize = 16;
/// The longest class that is followed, in bytes as it is stored.
const LONGEST_CLASS: u64 = 128 << 10;
/// The end of an archive that is searched for its end record, in bytes.
const TAIL: u64 = 1 << 10;
/// The same for an archive inside of another, which ends where the next entry begins but for a few bytes.
const INNER_TAIL: u64 = 64;
/// The most files of a directory that are looked at for further archives.
const MOST_BESIDE: usize = 512;
/// The index of `lib/modules` is read here and there, soon nearly all of it; so much of it at most, in bytes.
const LONGEST_INDEX: u64 = 8 << 20;
/// The page size in bytes.
const PAGE: u64 = 4096;
/// The header of `lib/modules`, in bytes.
const IMAGE_HEADER: u64 = 28;

/// What is read of an archive next.
#[derive(Debug)]
enum Step {
    /// The end record, in front of this place in the file.
    End(u64),
    /// The directory, this part of the file, of an archive that begins there.
    Directory(Part, u64),
    /// The entry that says what belongs to the archive.
    Manifest(Part),
    /// A class, and how many others led to it.
    Class(Part),
    /// The header of the runtime's own classes (`lib/modules`).
    Image,
}

/// Where a class lies.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Which of the archives.
    archive: u32,
    /// Offset and length in bytes, in the file of the archive.
    at: u32,
    len: u32,
    /// By how many steps it was reached, if it was.
    hops: u8,
}

/// An archive whose directory was parsed.
#[derive(Debug)]
struct Archive {
    file: StoredFile,
    /// Offset and length in bytes of each class, in order.
    classes: Vec<(u32, u32)>,
}

/// Not reached yet.
const UNKNOWN: u8 = u8::MAX;

/// Follows archives and their classes; see the module.
#[derive(Debug, Default)]
pub(super) struct Archives {
    waiting: Waiting<Step>,
    /// The archives whose directories were parsed.
    parsed: Vec<Archive>,
    /// Where classes lie, by the hashes of their names. Two with the same hash are a wrong guess at most.
    classes: HashMap<u64, Place>,
    /// The files that were opened, with the numbers of the archives in each.
    known: HashMap<FileId, Vec<usize>>,
    /// How many bytes of directories were parsed, and entries unpacked.
    directory_bytes: u64,
    unpacked: usize,
    /// How many archives of a directory readers turned to.
    directories: HashMap<DirectoryId, usize>,
    wishes: Wishes,
}

impl Hint for Archives {
    /// An archive that is touched for the first time is opened.
    fn touched(&mut self, touch: Touch, layers: &Layers, _: Look<'_>, now: &mut Vec<Planned>) {
        let (Some(files), Some(file)) = (layers.files.as_deref(), touch.file) else {
            return;
        };
        if !touch.is_first {
            return self.follow_read(file, touch.range);
        }
        let path = files.path(file.file).unwrap_or_default();
        if path.ends_with(b"/lib/modules") {
            self.waiting.wait(file, Step::Image, &[(0, IMAGE_HEADER)], 0);
        } else if is_archive(&path) {
            now.extend(self.open(file, 0));
            self.open_beside(files, file);
        }
    }

    fn look_inside(&mut self, came: Option<ChunkKey>, layers: &Layers, peek: Peek<'_>, now: &mut Vec<Planned>) {
        let Some(files) = &layers.files else { return };
        if let Some(key) = came {
            self.waiting.came(key);
        }
        while let Some(pending) = self.waiting.ready(peek) {
            self.go_on(&**files, &pending, &layers.options, peek, now);
        }
    }

    fn wishes(&mut self) -> &mut Wishes {
        &mut self.wishes
    }
}

impl Archives {
    /// Opens an archive unless it is known: what has to come of it first.
    fn open(&mut self, file: StoredFile, hops: u8) -> Vec<Planned> {
        if self.known.len() >= MOST_ARCHIVES || self.known.contains_key(&file.file) {
            return Vec::new();
        }
        self.known.insert(file.file, Vec::new());
        self.open_at(file, file.range.len, TAIL, hops)
    }

    /// Opens the archive that ends at `end` of the file.
    fn open_at(&mut self, file: StoredFile, end: u64, tail: u64, hops: u8) -> Vec<Planned> {
        let tail = (end.saturating_sub(tail), end.min(tail));
        self.waiting.wait(file, Step::End(end), &[tail], hops);
        planned(file, &[tail], Reason::Archive)
    }

    /// Opens the archives beside one, if readers turn to one after the other: twice as many as they have.
    fn open_beside(&mut self, files: &dyn FileMap, file: StoredFile) {
        let read = self.directories.entry(file.directory).or_default();
        *read += 1;
        let (mut room, mut visits) = (if *read > 1 { 2 * *read } else { 0 }, 0);
        let mut wants = Vec::new();
        files.neighbours(file.file, &mut |beside| {
            visits += 1;
            if room == 0 || visits > MOST_BESIDE {
                return ControlFlow::Break(());
            }
            if files.path(beside.file).is_some_and(|path| is_archive(&path)) {
                let opened = self.open(beside, 1);
                room -= usize::from(!opened.is_empty());
                wants.extend(opened);
            }
            ControlFlow::Continue(())
        });
        self.wishes.push_all_front(wants);
    }

    /// A reader turned to this range of a file: to a class that begins in its first page, if the file is an archive.
    fn follow_read(&mut self, file: StoredFile, range: TarRange) {
        let from = range.start.since(file.range.start) / PAGE * PAGE;
        let Some(numbers) = self.known.get(&file.file) else {
            return;
        };
        for archive in numbers.iter().filter_map(|number| self.parsed.get(*number)) {
            let first = archive.classes.partition_point(|(at, _)| u64::from(*at) < from);
            let begins = archive.classes[first..]
                .iter()
                .take_while(|(at, _)| u64::from(*at) < from + PAGE);
            for (at, len) in begins.take(MOST_READ) {
                let part = (u64::from(*at), u64::from(*len));
                self.waiting.wait(file, Step::Class(part), &[part], 0);
            }
        }
    }

    /// Goes on with an archive whose bytes have come.
    fn go_on(
        &mut self,
        files: &dyn FileMap,
        pending: &Pending<Step>,
        options: &PlanOptions,
        peek: Peek<'_>,
        now: &mut Vec<Planned>,
    ) {
        let (file, hops) = (pending.file, pending.hops);
        let bytes = |(at, len): Part| bytes_of(file, at, len, peek);
        if matches!(pending.step, Step::Manifest(_) | Step::Class(_)) {
            self.unpacked += 1;
            if self.unpacked > MOST_ENTRIES {
                return;
            }
        }
        match pending.step {
            Step::End(end) => {
                let tail = if end == file.range.len { TAIL } else { INNER_TAIL };
                let from = end.saturating_sub(tail);
                let record = bytes((from, end - from)).as_deref().and_then(jar::end);
                let Some((at, record)) = record.map(|record| (from + record.at, record)) else {
                    return;
                };
                let directory = at.checked_sub(record.directory_len);
                let Some(directory) = directory.filter(|_| record.directory_len <= LONGEST_DIRECTORY) else {
                    return;
                };
                if let Some(begin) = directory.checked_sub(record.directory_at) {
                    let part = (directory, record.directory_len);
                    let wants = planned(file, &[part], Reason::Archive);
                    self.waiting.wait(file, Step::Directory(part, begin), &[part], hops);
                    // Whoever opens an archive reads all of it.
                    if hops == 0 {
                        now.extend(wants);
                    } else {
                        self.wishes.push_all_front(wants);
                    }
                }
            }
            Step::Directory(part, begin) => {
                if let Some(directory) = bytes(part) {
                    self.read_directory(file, &directory, part.0, begin, hops);
                }
            }
            Step::Manifest(part) => {
                let Some(text) = bytes(part).as_deref().and_then(jar::content) else {
                    return;
                };
                let manifest = jar::manifest(&text);
                for path in &manifest.class_path {
                    if let Some(other) = files.resolve(file.directory, path) {
                        let wants = self.open(other, 1);
                        for want in wants {
                            self.wishes.push_back(want);
                        }
                    }
                }
                // Only of the archive that runs.
                if hops == 0 {
                    for class in &manifest.main {
                        self.load(class, 0);
                    }
                }
            }
            Step::Class(part) => {
                if hops < options.class_hops
                    && let Some(class) = bytes(part).as_deref().and_then(jar::content)
                {
                    for name in jar::classes(&class) {
                        self.load(name, hops + 1);
                    }
                }
            }
            Step::Image => {
                if let Some(len) = bytes((0, IMAGE_HEADER)).as_deref().and_then(image_index) {
                    let wants = planned(file, &[(0, len.min(LONGEST_INDEX))], Reason::Archive);
                    self.wishes.push_all_front(wants);
                }
            }
        }
    }

    /// Remembers where the classes of an archive lie, and goes on with its manifest and the archives in it. The directory is that at
    /// `ends` of the file, the archive begins at `begin`.
    fn read_directory(&mut self, file: StoredFile, directory: &[u8], ends: u64, begin: u64, hops: u8) {
        let number = self.parsed.len();
        self.directory_bytes += len_u64(directory.len());
        let may = number < MOST_ARCHIVES && self.directory_bytes <= MOST_DIRECTORY_BYTES;
        let Some(archive) = u32::try_from(number).ok().filter(|_| may) else {
            return;
        };
        let mut classes = Vec::new();
        let mut starts: Vec<u64> = Vec::new();
        let mut inner: Vec<u64> = Vec::new();
        let mut has_manifest = false;
        for entry in jar::entries(directory) {
            let Some(at) = begin.checked_add(entry.at).filter(|at| *at < ends) else {
                continue;
            };
            let part = (at, entry.len.min(file.range.len - at));
            starts.push(at);
            if let Some(name) = entry.name.strip_suffix(b".class") {
                let name = [&b"BOOT-INF/classes/"[..], b"WEB-INF/classes/"]
                    .iter()
                    .find_map(|prefix| name.strip_prefix(*prefix))
                    .unwrap_or(name);
                if let (Ok(at), Ok(len)) = (u32::try_from(part.0), u32::try_from(part.1))
                    && entry.len <= LONGEST_CLASS
                    && self.classes.len() < MOST_CLASSES
                {
                    classes.push((at, len));
                    self.classes.entry(key(name)).or_insert(Place {
                        archive,
                        at,
                        len,
                        hops: UNKNOWN,
                    });
                }
            } else if entry.name == b"META-INF/MANIFEST.MF" && entry.len <= LONGEST_CLASS && !has_manifest {
                has_manifest = true;
                self.waiting.wait(file, Step::Manifest(part), &[part], hops);
                self.wishes.push_all_front(planned(file, &[part], Reason::Archive));
            } else if entry.plain && begin == 0 && is_archive(entry.name) {
                inner.push(at);
            }
        }
        classes.sort_unstable();
        self.parsed.push(Archive { file, classes });
        self.known.entry(file.file).or_default().push(number);
        starts.push(ends);
        starts.sort_unstable();
        let mut wants = Vec::new();
        for at in inner.into_iter().take(MOST_ARCHIVES) {
            let next = starts.partition_point(|start| *start <= at);
            if let Some(end) = starts.get(next) {
                wants.extend(self.open_at(file, *end, INNER_TAIL, 1));
            }
        }
        self.wishes.push_all_front(wants);
    }

    /// A class will be loaded: `hops` others led to it.
    fn load(&mut self, name: &[u8], hops: u8) {
        let Some(place) = self.classes.get_mut(&key(name)).filter(|place| hops < place.hops) else {
            return;
        };
        let is_new = place.hops == UNKNOWN;
        place.hops = hops;
        let part = (u64::from(place.at), u64::from(place.len));
        let Some(file) = self
            .parsed
            .get(len_usize(u64::from(place.archive)))
            .map(|archive| archive.file)
        else {
            return;
        };
        self.waiting.wait(file, Step::Class(part), &[part], hops);
        if is_new {
            // The nearest first.
            for want in planned(file, &[part], Reason::Archive) {
                self.wishes.push_back(want);
            }
        }
    }
}

fn is_archive(path: &[u8]) -> bool {
    [&b".jar"[..], b".war"].iter().any(|ending| path.ends_with(ending))
}

fn key(name: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    hasher.finish()
}

/// The length of the index of `lib/modules` (`jimage`), with its header, in bytes: two tables of as many 4-byte words as there are
/// slots, the places of the resources, and the texts that they are named by.
fn image_index(header: &[u8]) -> Option<u64> {
    let word = |at: usize| Some(u32::from_le_bytes(header.get(at..at + 4)?.try_into().ok()?));
    if word(0)? != 0xcafe_dada {
        return None;
    }
    let (slots, places, texts) = (word(16)?, word(20)?, word(24)?);
    Some(len_u64(header.len()) + 8 * u64::from(slots) + u64::from(places) + u64::from(texts))
}

#[cfg(feature = "unstable-internals")]
pub(super) mod fuzzing {
    use super::jar;
    use crate::units::len_usize;

    /// See [`archive`](crate::prefetch::fuzzing::archive).
    pub(in crate::prefetch) fn read(file: &[u8]) -> (usize, usize, usize) {
        let count = |bytes: &[u8]| {
            let manifest = jar::manifest(bytes);
            jar::classes(bytes).len() + manifest.main.len() + manifest.class_path.len()
        };
        let mut found = (0, 0, count(file));
        let directory = jar::end(file).and_then(|end| {
            let from = end.at.checked_sub(end.directory_len)?;
            file.get(len_usize(from)..len_usize(end.at))
        });
        for entry in jar::entries(directory.unwrap_or(file)) {
            found.0 += 1;
            let from = file.get(len_usize(entry.at)..);
            let bytes = from.map(|from| &from[..from.len().min(len_usize(entry.len))]);
            if let Some(content) = bytes.and_then(jar::content) {
                found.1 = found.1.max(content.len());
                found.2 = found.2.max(count(&content));
            }
        }
        let _any = super::image_index(file);
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_of_a_runtime_is_measured() {
        let mut header = [0; 28];
        for (at, word) in [(0, 0xcafe_dada_u32), (16, 10), (20, 300), (24, 4000)] {
            header[at..at + 4].copy_from_slice(&word.to_le_bytes());
        }
        assert_eq!(image_index(&header), Some(28 + 80 + 300 + 4000));
        assert_eq!(image_index(&header[..27]), None);
        header[0] = 0;
        assert_eq!(image_index(&header), None);
    }
}
