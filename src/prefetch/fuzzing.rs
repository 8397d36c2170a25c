//! The readers of programs, for fuzzing and tests.

use std::collections::HashSet;

use super::elf::needs;
use super::node;
use super::python::Modules;
use crate::units::{len_u64, len_usize};

/// What a program or a script names: how many names, and the parts of it (offset and length in bytes) that are fetched. Of the
/// file only what `here` says is in memory; the second list is what has to come first.
#[must_use]
#[allow(clippy::type_complexity)]
pub fn program(file: &[u8], here: &dyn Fn(u64) -> bool) -> (Vec<Vec<u8>>, Vec<(u64, u64)>, Vec<(u64, u64)>) {
    let needs = needs(len_u64(file.len()), &|at, len| {
        let bytes = file.get(len_usize(at)..len_usize(at.checked_add(len)?))?;
        here(at).then(|| bytes.to_vec())
    });
    let names = needs.interpreter.into_iter().chain(needs.libraries).chain(needs.search);
    (names.collect(), needs.parts, needs.lacking)
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
