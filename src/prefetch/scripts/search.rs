//! A search path that is learned. In: names that scripts look for, the directories that these lie in, and files as they are
//! read. Out: the files that the names mean.
//!
//! Two things tell where a directory of the search path is. A script names modules of its own package from the top of it, and so
//! some directory above it has them. And a name that is nowhere known is looked for by the interpreter next: the file that a
//! reader then turns to ends with that name, and what is in front of it is a directory of the search path, in which the other
//! names that were looked for in vain are as likely.

use std::collections::BTreeSet;

use super::LONGEST_NAME;

/// The most directories that are searched.
const MOST_ROOTS: usize = 24;
/// The most names that are remembered as looked for in vain; then all are forgotten.
const MOST_MISSING: usize = 2048;
/// The most directories above a script that are searched.
const MOST_ABOVE: usize = 12;

/// The directories below which a language's modules are looked for; see the module.
#[derive(Debug, Default)]
pub(super) struct SearchPath {
    /// Without a slash at the end, in the order in which they were found.
    roots: Vec<Vec<u8>>,
    /// Paths below a directory of the search path that were looked for in vain.
    missing: BTreeSet<Vec<u8>>,
}

impl SearchPath {
    /// The file that `name` with the first fitting one of `endings` means to a script in `directory`.
    pub(super) fn find<F>(
        &mut self,
        directory: &[u8],
        name: &[u8],
        endings: &[&[u8]],
        exists: &dyn Fn(&[u8]) -> Option<F>,
    ) -> Option<F> {
        if name.is_empty() || name.len() > LONGEST_NAME {
            return None;
        }
        let below = |root: &[u8]| {
            let at = |ending: &&[u8]| exists(&[root, b"/", name, ending].concat());
            endings.iter().find_map(at)
        };
        if let Some(file) = self.roots.iter().find_map(|root| below(root)) {
            return Some(file);
        }
        // From the top, because packages have directories of their own with the same names in them. Programs have their modules
        // in `lib` beside the directory that they are in.
        let ends = directory
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == b'/')
            .map(|(at, _)| at);
        let above = ends
            .chain([directory.len()])
            .map(|end| &directory[..end])
            .take(MOST_ABOVE);
        for above in above {
            for root in [above.to_vec(), [above, b"/lib"].concat()] {
                if let Some(file) = below(&root) {
                    self.add(&root);
                    return Some(file);
                }
            }
        }
        if self.missing.len() >= MOST_MISSING {
            self.missing.clear();
        }
        for ending in endings {
            self.missing.insert([name, ending].concat());
        }
        None
    }

    /// Searches `root` as well.
    pub(super) fn add(&mut self, root: &[u8]) -> bool {
        let is_new = self.roots.len() < MOST_ROOTS && !self.roots.iter().any(|known| known == root);
        if is_new {
            self.roots.push(root.to_vec());
        }
        is_new
    }

    /// A reader turned to the file at `path`: returns what else was looked for in vain and lies where that file was looked for.
    pub(super) fn saw<F>(&mut self, path: &[u8], exists: &dyn Fn(&[u8]) -> Option<F>) -> Vec<F> {
        let slashes = || {
            path.iter()
                .enumerate()
                .filter(|(_, byte)| **byte == b'/')
                .map(|(at, _)| at)
        };
        let ends_missing = |at: &usize| self.missing.contains(&path[at + 1..]);
        let Some(slash) = slashes().find(ends_missing).filter(|_| !self.missing.is_empty()) else {
            return Vec::new();
        };
        let root = &path[..slash];
        self.missing.remove(&path[slash + 1..]);
        if !self.add(root) {
            return Vec::new();
        }
        let mut found = Vec::new();
        self.missing.retain(|name| {
            let file = exists(&[root, b"/", name].concat());
            let is_missing = file.is_none();
            found.extend(file);
            is_missing
        });
        found
    }
}
