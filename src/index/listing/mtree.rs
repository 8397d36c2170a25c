//! BSD mtree specifications, in the form with whole paths that libarchive writes and reads (mtree(5) and
//! libarchive's `archive_write_set_format_mtree`).
//!
//! mtree has no word for a hard link: each name of a file is listed with the file's own attributes, which is what comparing
//! with a directory needs. For that the targets of links are noted in a first pass; a link to what this layer does not have
//! is a file of unknown size.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::Write;

use super::text::Vis;
use super::{ListingError, Selection};
use crate::index::entry::{Entry, Kind};
use crate::index::reader::Index;

pub(super) fn write<B: AsRef<[u8]>>(
    index: &Index<B>,
    selection: &Selection,
    out: &mut dyn Write,
) -> Result<(), ListingError> {
    let mut targets = link_targets(index)?;
    let mut line = String::new();
    writeln!(out, "#mtree")?;
    let mut entries = index.entries()?;
    while let Some(entry) = entries.next_entry()? {
        let path = plain_path(&entry.path);
        line.clear();
        let linked = match entry.kind {
            Kind::Hardlink => targets.get(plain_path(&entry.link)).filter(|known| !known.is_empty()),
            _ => None,
        };
        match linked {
            Some(known) => line.push_str(known),
            None => attributes(entry, &mut line),
        }
        if selection.takes(path) {
            let name = if path.is_empty() { "." } else { "./" };
            writeln!(out, "{name}{}{line}", Vis(path))?;
        }
        if let Some(known) = targets.get_mut(path) {
            known.clone_from(&line);
        }
    }
    Ok(out.flush()?)
}

/// The names that hard links refer to, their attributes still unknown.
fn link_targets<B: AsRef<[u8]>>(index: &Index<B>) -> Result<HashMap<Vec<u8>, String>, ListingError> {
    let mut targets = HashMap::new();
    if index.summary().hardlinks > 0 {
        let mut entries = index.entries()?;
        while let Some(entry) = entries.next_entry()? {
            if entry.kind == Kind::Hardlink {
                targets.insert(plain_path(&entry.link).to_vec(), String::new());
            }
        }
    }
    Ok(targets)
}

/// A path without what does not matter at its ends.
fn plain_path(mut path: &[u8]) -> &[u8] {
    while let Some(rest) = path.strip_prefix(b"/").or_else(|| path.strip_prefix(b"./")) {
        path = rest;
    }
    while let Some(rest) = path.strip_suffix(b"/") {
        path = rest;
    }
    if path == b"." { b"" } else { path }
}

/// Appends an entry's attributes to a line.
pub(crate) fn attributes(entry: &Entry, line: &mut String) {
    let kind = match entry.kind {
        Kind::File | Kind::Hardlink => "file",
        Kind::Directory => "dir",
        Kind::Symlink => "link",
        Kind::CharDevice => "char",
        Kind::BlockDevice => "block",
        Kind::Fifo => "fifo",
    };
    // Writing to a string does not fail.
    let _ = write!(
        line,
        " type={kind} mode={:o} uid={} gid={}",
        entry.mode, entry.uid, entry.gid
    );
    if entry.kind == Kind::File {
        let _ = write!(line, " size={}", entry.size);
    }
    let _ = write!(line, " time={}.{:09}", entry.mtime.secs, entry.mtime.nanos);
    match entry.kind {
        Kind::Symlink => {
            let _ = write!(line, " link={}", Vis(&entry.link));
        }
        Kind::CharDevice | Kind::BlockDevice => {
            let _ = write!(line, " device=native,{},{}", entry.device_major, entry.device_minor);
        }
        _ => {}
    }
}
