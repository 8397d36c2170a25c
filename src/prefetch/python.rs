//! The modules that a compiled Python module imports. In: its path and bytes, and a function that tells which paths are files. Out:
//! the files of the modules that it imports.
//!
//! The statements come from the module's bytecode, or of a version that [`bytecode`] does not know from its short strings
//! (`marshal.c` of `CPython`: type `z` or `Z`, one byte of length, ASCII), among which are the names of what it imports: few
//! others are a file's. Pure; what it returns only decides what is prefetched.

mod bytecode;

use std::collections::HashSet;

/// The most directories with top-level packages that are searched.
const MOST_ROOTS: usize = 8;
/// The most names whose look-up is remembered; then all are forgotten.
const MOST_ASKED: usize = 1 << 16;
/// The directory of compiled modules, below that of their sources.
const CACHE: &[u8] = b"/__pycache__/";

/// When an import statement runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum When {
    /// When its module is imported.
    Imported,
    /// When one of its module's functions is called, if ever.
    Called,
}

/// Where a layer's Python modules are, learned from the paths of those that were read.
#[derive(Debug, Default)]
pub(super) struct Modules {
    /// Directories in which top-level modules and packages lie, without a slash at the end.
    roots: Vec<Vec<u8>>,
    /// How the names of extension modules end: `.cpython-311-x86_64-linux-gnu.so`.
    extension: Option<Vec<u8>>,
    /// How the names of compiled modules end: `.cpython-311.pyc`.
    ending: Option<Vec<u8>>,
    /// The paths, without their endings, that were looked up before.
    asked: HashSet<Vec<u8>>,
}

/// The path of a compiled module, split.
struct Place<'a> {
    /// The directory of its source, without a slash at the end.
    package: &'a [u8],
    /// What follows the module's name: `.cpython-311.pyc`.
    ending: &'a [u8],
}

fn place(path: &[u8]) -> Option<Place<'_>> {
    let at = path.windows(CACHE.len()).rposition(|window| window == CACHE)?;
    let name = &path[at + CACHE.len()..];
    let dot = name.iter().position(|&byte| byte == b'.')?;
    name.ends_with(b".pyc").then_some(Place {
        package: &path[..at],
        ending: &name[dot..],
    })
}

/// The package `level - 1` above `package`.
fn above(package: &[u8], level: u8) -> Option<&[u8]> {
    (1..level).try_fold(package, |package, _| {
        let slash = package.iter().rposition(|&byte| byte == b'/')?;
        package.get(..slash)
    })
}

/// Whether these are the first bytes of a compiled module: a version's number, then a line end that text transfers break.
pub(super) fn is_compiled(head: &[u8]) -> bool {
    head.get(2..4) == Some(b"\r\n")
}

/// The path of a compiled module's source.
pub(super) fn source_of(compiled: &[u8]) -> Option<Vec<u8>> {
    let Place { package, ending } = place(compiled)?;
    let name = compiled.get(package.len() + CACHE.len()..compiled.len() - ending.len())?;
    Some([package, b"/", name, b".py"].concat())
}

impl Modules {
    /// Learns from a touched file's path how the names of extension modules end.
    pub(super) fn saw(&mut self, path: &[u8]) {
        if self.extension.is_none()
            && path.ends_with(b".so")
            && let Some(at) = path.windows(9).rposition(|window| window == b".cpython-")
        {
            self.extension = Some(path[at..].to_vec());
        }
    }

    /// The path of the compiled module of a source, once it is known how those end.
    pub(super) fn compiled_of(&self, source: &[u8]) -> Option<Vec<u8>> {
        let slash = source.iter().rposition(|&byte| byte == b'/')?;
        let name = source[slash + 1..].strip_suffix(b".py")?;
        Some([&source[..slash], CACHE, name, self.ending.as_ref()?].concat())
    }

    /// The files that the compiled module `path` imports, each once for each likelihood; `exists` says which paths are files.
    pub(super) fn imports<F>(
        &mut self,
        path: &[u8],
        bytes: &[u8],
        exists: &dyn Fn(&[u8]) -> Option<F>,
    ) -> Vec<(F, When)> {
        let Some(Place { package, ending }) = place(path) else {
            return Vec::new();
        };
        self.add_root(package, ending, exists);
        self.ending.get_or_insert_with(|| ending.to_vec());
        if self.asked.len() > MOST_ASKED {
            self.asked.clear();
        }
        let mut found = Vec::new();
        if let Some(imports) = bytecode::imports(bytes) {
            for import in imports {
                let when = if import.late { When::Called } else { When::Imported };
                let bases = match import.level {
                    0 => self.roots.clone(),
                    level => above(package, level).map(<[u8]>::to_vec).into_iter().collect(),
                };
                // The name from the top, of what a name below a base means.
                let inside = bases
                    .first()
                    .filter(|_| import.level > 0)
                    .and_then(|base| self.inside(base));
                let frozen = |name: &[u8]| match &inside {
                    Some(package) => bytecode::is_frozen(bytes, &[package, &b"."[..], name].concat()),
                    None => bytecode::is_frozen(bytes, name),
                };
                let below = |name: &&[u8]| {
                    let dot: &[u8] = if import.module.is_empty() { b"" } else { b"." };
                    [import.module, dot, name].concat()
                };
                self.look_up(&bases, import.module, ending, when, &frozen, exists, &mut found);
                for name in import.names.iter().filter(|name| **name != b"*").map(below) {
                    self.look_up(&bases, &name, ending, when, &frozen, exists, &mut found);
                }
            }
        } else {
            let bases: Vec<Vec<u8>> = std::iter::once(package.to_vec())
                .chain(self.roots.iter().cloned())
                .collect();
            for name in names(bytes) {
                self.look_up(&bases, name, ending, When::Imported, &|_| false, exists, &mut found);
            }
        }
        found
    }

    /// The dotted name of the package in directory `base`.
    fn inside(&self, base: &[u8]) -> Option<Vec<u8>> {
        let below = |root: &Vec<u8>| base.strip_prefix(&root[..])?.strip_prefix(b"/").map(<[u8]>::to_vec);
        let mut name = self.roots.iter().find_map(below)?;
        name.iter_mut()
            .filter(|byte| **byte == b'/')
            .for_each(|byte| *byte = b'.');
        Some(name)
    }

    /// Adds the files of module `name` below the first of `bases` that has any, unless it was asked for before.
    #[expect(clippy::too_many_arguments, reason = "what a name is looked up with")]
    fn look_up<F>(
        &mut self,
        bases: &[Vec<u8>],
        name: &[u8],
        ending: &[u8],
        when: When,
        is_frozen: &dyn Fn(&[u8]) -> bool,
        exists: &dyn Fn(&[u8]) -> Option<F>,
        found: &mut Vec<(F, When)>,
    ) {
        let mark: &[u8] = if when == When::Called { b"?" } else { b"" };
        for base in bases {
            if !self.asked.insert([base, &b"/"[..], name, mark].concat()) {
                continue;
            }
            let before = found.len();
            self.modules(base, name, ending, is_frozen, exists, &mut |file| {
                found.push((file, when));
            });
            if found.len() > before {
                return;
            }
        }
    }

    /// The files of module `name` below `base`: those of the packages on the way, then its own.
    fn modules<F>(
        &self,
        base: &[u8],
        name: &[u8],
        ending: &[u8],
        is_frozen: &dyn Fn(&[u8]) -> bool,
        exists: &dyn Fn(&[u8]) -> Option<F>,
        found: &mut dyn FnMut(F),
    ) {
        let mut directory = base.to_vec();
        let mut so_far = 0;
        for part in name.split(|&byte| byte == b'.') {
            so_far += part.len();
            let inner = [&directory, &b"/"[..], part].concat();
            let package = || exists(&[&inner, CACHE, b"__init__", ending].concat());
            let module = || exists(&[&directory, CACHE, part, ending].concat());
            let extension = |place: &[u8]| {
                let at = |ending: &[u8]| exists(&[&directory, place, part, ending].concat());
                match &self.extension {
                    Some(ending) => at(ending),
                    None => usual_extensions(ending).iter().find_map(|ending| at(ending)),
                }
            };
            if part.is_empty() || is_frozen(&name[..so_far]) {
                return;
            }
            let file = package()
                .or_else(module)
                .or_else(|| extension(b"/"))
                .or_else(|| extension(b"/lib-dynload/"));
            let Some(file) = file else { return };
            found(file);
            directory = inner;
            so_far += 1;
        }
    }

    /// Learns where the top of a module's package lies: the first directory above it that is no package.
    fn add_root<F>(&mut self, package: &[u8], ending: &[u8], exists: &dyn Fn(&[u8]) -> Option<F>) {
        let mut root = package;
        while exists(&[root, CACHE, b"__init__", ending].concat()).is_some() {
            let Some(slash) = root.iter().rposition(|&byte| byte == b'/') else {
                return;
            };
            root = &root[..slash];
        }
        if self.roots.len() < MOST_ROOTS && !self.roots.iter().any(|known| known == root) {
            self.roots.push(root.to_vec());
        }
    }
}

/// How the names of extension modules end where compiled modules end with `compiled` (PEP 3149): until one was read, on the usual
/// platforms.
fn usual_extensions(compiled: &[u8]) -> Vec<Vec<u8>> {
    let Some(tag) = compiled.strip_suffix(b".pyc") else {
        return Vec::new();
    };
    let platforms: [&[u8]; 4] = [
        b"-x86_64-linux-gnu.so",
        b"-aarch64-linux-gnu.so",
        b"-x86_64-linux-musl.so",
        b"-aarch64-linux-musl.so",
    ];
    platforms.iter().map(|platform| [tag, platform].concat()).collect()
}

/// The short strings of a marshalled module that could be the name of a module.
fn names(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    // Types, each with and without the flag that the object is referred to.
    let starts = |byte: u8| matches!(byte & 0x7f, b'z' | b'Z');
    let mut at = 0;
    std::iter::from_fn(move || {
        while let [kind, len, rest @ ..] = &bytes[at.min(bytes.len())..] {
            let len = usize::from(*len);
            match rest.get(..len) {
                Some(name) if starts(*kind) && is_name(name) => {
                    at += 2 + len;
                    return Some(name);
                }
                _ => at += 1,
            }
        }
        None
    })
}

fn is_name(text: &[u8]) -> bool {
    let starts_well = text
        .first()
        .is_some_and(|first| first.is_ascii_alphabetic() || *first == b'_');
    starts_well
        && text
            .iter()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sources_and_compiled_modules_lie_beside_each_other() {
        let (compiled, source) = (b"/lib/a/__pycache__/b.cpython-311.pyc", b"/lib/a/b.py");
        assert_eq!(source_of(compiled).as_deref(), Some(&source[..]));
        assert_eq!(source_of(source), None);
        let mut modules = Modules::default();
        assert_eq!(modules.compiled_of(source), None, "no compiled module was seen");
        modules.imports(compiled, &[], &|_| None::<()>);
        assert_eq!(modules.compiled_of(source).as_deref(), Some(&compiled[..]));
        assert_eq!(modules.compiled_of(b"/lib/a/b.txt"), None);
    }

    #[test]
    fn places_are_taken_apart() {
        let found = place(b"/usr/lib/python3.11/json/__pycache__/decoder.cpython-311.pyc").unwrap();
        assert_eq!(
            (found.package, found.ending),
            (&b"/usr/lib/python3.11/json"[..], &b".cpython-311.pyc"[..])
        );
        assert!(place(b"/usr/lib/x.pyc").is_none());
        assert!(place(b"/usr/__pycache__/x.py").is_none());
    }

    /// A module that the machine's own Python compiled: everything that it imports is found, by every spelling.
    #[test]
    fn what_a_real_module_imports_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let source = "import json.decoder, zlib\nfrom . import sibling as other\nfrom .sub.deep import x\ndef f():\n import late\n";
        std::fs::write(dir.path().join("m.py"), source).unwrap();
        let compiled = dir.path().join("m.pyc");
        let script = "import py_compile, sys; py_compile.compile(sys.argv[1], sys.argv[2], doraise=True)";
        let made = Command::new("python3")
            .args(["-c", script])
            .arg(dir.path().join("m.py"))
            .arg(&compiled)
            .status();
        if !made.is_ok_and(|status| status.success()) {
            eprintln!("SKIP: what_a_real_module_imports_is_found: no python3");
            return;
        }
        let bytes = std::fs::read(compiled).unwrap();
        assert!(is_compiled(&bytes));
        let layer: BTreeSet<&str> = [
            "/p/app/__pycache__/__init__.c.pyc",
            "/p/app/__pycache__/sibling.c.pyc",
            "/p/app/sub/__pycache__/__init__.c.pyc",
            "/p/app/sub/__pycache__/deep.c.pyc",
            "/std/__pycache__/late.c.pyc",
            "/std/json/__pycache__/__init__.c.pyc",
            "/std/json/__pycache__/decoder.c.pyc",
            "/std/lib-dynload/zlib.cpython-3.so",
            "/std/__pycache__/unrelated.c.pyc",
        ]
        .into();
        let exists = |path: &[u8]| layer.get(std::str::from_utf8(path).ok()?).copied();
        let mut modules = Modules::default();
        modules.saw(b"/std/lib-dynload/_json.cpython-3.so");
        assert_eq!(
            modules.imports(b"/std/__pycache__/unrelated.c.pyc", b"", &exists).len(),
            0
        );
        let found = modules.imports(b"/p/app/__pycache__/m.c.pyc", &bytes, &exists);
        let called: Vec<&str> = found
            .iter()
            .filter(|(_, when)| *when == When::Called)
            .map(|(path, _)| *path)
            .collect();
        assert!(
            called.is_empty() || called == ["/std/__pycache__/late.c.pyc"],
            "{called:?}"
        );
        let found: BTreeSet<&str> = found.into_iter().map(|(path, _)| path).collect();
        let expected = layer
            .iter()
            .filter(|path| !path.contains("unrelated") && !path.ends_with("app/__pycache__/__init__.c.pyc"));
        assert_eq!(found, expected.copied().collect());
        assert_eq!(modules.roots, [b"/std".to_vec(), b"/p".to_vec()]);
    }

    proptest! {
        #[test]
        fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
            for name in names(&bytes) {
                prop_assert!(is_name(name));
            }
        }
    }
}
