//! The readers of programs, for fuzzing and tests.

use std::collections::HashSet;

use super::archives::fuzzing as archives;
use super::elf::loading::Relocated;
use super::elf::needs;
use super::node;
use super::python::Modules;
use super::scripts::{Language, Scripts};
use crate::units::{len_u64, len_usize};

/// What a program or a script names, and the parts of it (offset and length in bytes) that are fetched. Of the
/// file only what `here` says is in memory; the second list is what has to come first.
#[must_use]
#[allow(clippy::type_complexity)]
pub fn program(file: &[u8], here: &dyn Fn(u64) -> bool) -> (Vec<Vec<u8>>, Vec<(u64, u64)>, Vec<(u64, u64)>) {
    let needs = needs(len_u64(file.len()), &|at, len| {
        let bytes = file.get(len_usize(at)..len_usize(at.checked_add(len)?))?;
        here(at).then(|| bytes.to_vec())
    });
    let names = needs.interpreter.into_iter().chain(needs.libraries).chain(needs.search);
    let parts = needs.parts.into_iter().chain(needs.tables).collect();
    (names.collect(), parts, needs.lacking)
}

/// The parts of a program (offset and length in bytes) that its relocations write to, and that its initialisers are in or refer to.
#[must_use]
pub fn loaded(file: &[u8]) -> Vec<(u64, u64)> {
    let bytes = |at: u64, len: u64| Some(file.get(len_usize(at)..len_usize(at.checked_add(len)?))?.to_vec());
    let Some(loading) = needs(len_u64(file.len()), &bytes).loading else {
        return Vec::new();
    };
    let (mut relocated, mut parts) = (Relocated::default(), Vec::new());
    while let Some(table) = loading.needs(&relocated).and_then(|(at, len)| bytes(at, len)) {
        parts.extend(loading.relocate(&mut relocated, &table));
    }
    let array = loading.array_in_file().and_then(|(at, len)| bytes(at, len));
    for code in loading.initialisers(relocated, &array.unwrap_or_default()) {
        let (at, len) = code.part();
        parts.push((at, len));
        parts.extend(
            bytes(at, len)
                .map(|bytes| loading.references(&code, &bytes))
                .unwrap_or_default(),
        );
    }
    parts
}

/// The paths that are looked up for a compiled Python module at `path`; each of them is said to be a file or not by `exists`.
#[must_use]
pub fn python(path: &[u8], file: &[u8], exists: &dyn Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
    let mut modules = Modules::default();
    modules.saw(b"/usr/lib/python3/lib-dynload/a.cpython-311-x86_64-linux-gnu.so");
    let found = modules.imports(path, file, &|path| exists(path).then(|| path.to_vec()));
    found.into_iter().map(|(path, _)| path).collect()
}

/// The same for a JavaScript file or a `package.json`.
#[must_use]
pub fn node(path: &[u8], file: &[u8], exists: &dyn Fn(&[u8]) -> bool) -> HashSet<Vec<u8>> {
    let found = node::loads(path, file, &|path| exists(path).then(|| path.to_vec()));
    found.into_iter().collect()
}

/// The same for a script of Ruby, Perl or PHP, or settings of PHP, by the ending of its path, and then for what a reader turns to next,
/// which lies beside it.
#[must_use]
pub fn script(path: &[u8], file: &[u8], exists: &dyn Fn(&[u8]) -> bool) -> Vec<Vec<u8>> {
    let mut scripts = Scripts::default();
    let exists = |path: &[u8]| exists(path).then(|| path.to_vec());
    let Some(language) = Language::of(path, file) else {
        return Vec::new();
    };
    let mut found = scripts.loads(language, path, file, &exists);
    found.extend(scripts.loads(language, path, file, &exists));
    found.extend(scripts.saw(b"/lib/strict.pm", &exists));
    found
}

/// How many entries a Java archive has, the bytes of the longest that was unpacked, and how many names of other files and of classes are
/// in it, the file itself taken for a manifest and a class, too.
#[must_use]
pub fn archive(file: &[u8]) -> (usize, usize, usize) {
    archives::read(file)
}
