//! Checks of one entry by itself: names, links, segments and attributes within Linux's limits.

use crate::index::{Entry, Kind, Timestamp, Xattr};
use crate::tree::error::show;
use crate::tree::{LINK_TEXT_MAX, TreeError};

/// The longest value of an extended attribute, in bytes: the kernel's `XATTR_SIZE_MAX`.
const XATTR_VALUE_MAX: usize = 65_536;

pub(super) fn too_much(entry: &Entry) -> TreeError {
    TreeError::TooMuch {
        path: show(&entry.path),
    }
}

/// The attributes by name; where several have one name, the last of them.
pub(super) fn last_of_each(mut xattrs: Vec<Xattr>) -> Vec<Xattr> {
    xattrs.reverse();
    xattrs.sort_by(|a, b| a.name.cmp(&b.name));
    xattrs.dedup_by(|a, b| a.name == b.name);
    xattrs
}

pub(super) fn nanos(time: Timestamp) -> u32 {
    time.nanos.min(999_999_999)
}

/// Refuses what no tree can hold, whatever is in it.
pub(super) fn check(entry: &Entry) -> Result<(), TreeError> {
    let path = || show(&entry.path);
    if entry.path.contains(&0) {
        return Err(TreeError::Nul { path: path() });
    }
    match entry.kind {
        Kind::Symlink | Kind::Hardlink if entry.link.contains(&0) => return Err(TreeError::Nul { path: path() }),
        Kind::Hardlink if entry.link.is_empty() => return Err(TreeError::HardlinkToNothing { path: path() }),
        Kind::Symlink if entry.link.is_empty() || entry.link.len() > LINK_TEXT_MAX => {
            return Err(TreeError::LinkText {
                path: path(),
                len: entry.link.len(),
            });
        }
        Kind::File => {
            let mut end = 0;
            for segment in &entry.segments {
                let fits = segment.len > 0
                    && segment.file_offset >= end
                    && segment.tar_offset.0.checked_add(segment.len).is_some()
                    && segment
                        .file_offset
                        .checked_add(segment.len)
                        .is_some_and(|end| end <= entry.size);
                if !fits {
                    return Err(TreeError::Segments {
                        path: path(),
                        size: entry.size,
                    });
                }
                end = segment.file_offset + segment.len;
            }
        }
        _ => {}
    }
    for xattr in &entry.xattrs {
        let name_fits = (1..=255).contains(&xattr.name.len()) && !xattr.name.contains(&0);
        if !name_fits || xattr.value.len() > XATTR_VALUE_MAX {
            return Err(TreeError::Xattr {
                path: path(),
                name: show(&xattr.name),
                len: xattr.value.len(),
            });
        }
    }
    Ok(())
}
