//! The import statements of a compiled Python module. In: the bytes of a `.pyc` file. Out: what its bytecode imports, and
//! whether as the module itself runs or only when one of its functions does; none, where the version is not known.
//!
//! A module's file is a header of 16 bytes and a marshalled code object (`marshal.c` of `CPython`), with the code of functions
//! and classes among its constants. `import a.b` compiles to two constants, the level (0, or how many packages up) and the
//! tuple of names that `from` takes, then `IMPORT_NAME` with the module's name. Only these three instructions are
//! understood, by the numbers that each version has for them.
//!
//! Must never follow more than the bytes say: every object takes at least one of them, and nesting ends at a depth that real
//! modules do not come near.

/// A code object in a tuple in a code object makes three; real modules stay under 30.
const DEEPEST: u32 = 100;
/// `co_flags`: locals lie in slots, which is what functions have and modules and classes have not.
const OPTIMIZED: i64 = 1;

/// An import statement.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Import<'a> {
    /// How many packages up the name begins, 1 being the module's own; 0 for a name from the top.
    pub(super) level: u8,
    /// The module, with dots; may be empty where the level is not 0.
    pub(super) module: &'a [u8],
    /// What is taken from it: modules below it, or names in it.
    pub(super) names: Vec<&'a [u8]>,
    /// Only a function does it: later than the module runs, or never.
    pub(super) late: bool,
}

/// How a version of `CPython` writes what is read here.
#[derive(Clone, Copy, Debug)]
struct Dialect {
    /// How many numbers stand in front of a code object's bytecode, the last being its flags.
    numbers: usize,
    /// How many objects follow constants and names, before and after the number of the first line.
    before_line: usize,
    after_line: usize,
    load_const: u8,
    load_name: u8,
    import_name: u8,
    extended_arg: u8,
    /// Whether `os` and its like are inside the interpreter.
    frozen: bool,
}

impl Dialect {
    /// By the number that releases put in front of what they compile (`importlib._bootstrap_external`).
    fn of(magic: u16) -> Option<Self> {
        let old = Self {
            numbers: 6,
            before_line: 5,
            after_line: 1,
            load_const: 100,
            load_name: 101,
            import_name: 108,
            extended_arg: 144,
            frozen: false,
        };
        let with_exception_table = Self {
            numbers: 5,
            after_line: 2,
            frozen: true,
            ..old
        };
        match magic {
            // 3.8, 3.9, 3.10.
            3413 | 3425 | 3439 => Some(old),
            // 3.11, 3.12.
            3495 | 3531 => Some(with_exception_table),
            // 3.13.
            3571 => Some(Self {
                load_const: 83,
                load_name: 92,
                import_name: 75,
                extended_arg: 71,
                ..with_exception_table
            }),
            _ => None,
        }
    }
}

/// Whether the interpreter that compiled a module with this beginning has `module` inside itself and never reads its file
/// (`Python/frozen.c`).
pub(super) fn is_frozen(head: &[u8], module: &[u8]) -> bool {
    const FROZEN: [&[u8]; 15] = [
        b"_collections_abc",
        b"_sitebuiltins",
        b"abc",
        b"codecs",
        b"genericpath",
        b"importlib._bootstrap",
        b"importlib._bootstrap_external",
        b"importlib.machinery",
        b"importlib.util",
        b"io",
        b"ntpath",
        b"os",
        b"posixpath",
        b"site",
        b"stat",
    ];
    dialect(head).is_some_and(|dialect| dialect.frozen) && FROZEN.contains(&module)
}

fn dialect(file: &[u8]) -> Option<Dialect> {
    Dialect::of(u16::from_le_bytes([*file.first()?, *file.get(1)?]))
}

/// The import statements of the module in `file`, inner code's before outer's. None when its version is not known or it
/// makes no sense.
pub(super) fn imports(file: &[u8]) -> Option<Vec<Import<'_>>> {
    let mut reader = Reader {
        rest: file.get(16..)?,
        dialect: dialect(file)?,
        objects: vec![Object::Other],
        seen: Vec::new(),
        functions: 0,
        imports: Vec::new(),
    };
    reader.object(0)?;
    Some(reader.imports)
}

/// A marshalled object, as far as import statements need it.
#[derive(Debug)]
enum Object<'a> {
    /// A value that imports have no use for.
    Other,
    Number(i64),
    Text(&'a [u8]),
    Bytes(&'a [u8]),
    Tuple(Vec<Handle>),
}

/// The number of an object among those that were read.
type Handle = usize;
const OTHER: Handle = 0;

#[derive(Debug)]
struct Reader<'a> {
    rest: &'a [u8],
    dialect: Dialect,
    objects: Vec<Object<'a>>,
    /// Objects that may be referred to, in the order of their beginnings.
    seen: Vec<Handle>,
    /// How many functions the code that is being read lies in.
    functions: u32,
    imports: Vec<Import<'a>>,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(len)?;
        self.rest = rest;
        Some(taken)
    }

    fn byte(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    fn number(&mut self) -> Option<i32> {
        Some(i32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn len(&mut self) -> Option<usize> {
        usize::try_from(self.number()?).ok()
    }

    fn short_len(&mut self) -> Option<usize> {
        self.byte().map(usize::from)
    }

    fn keep(&mut self, object: Object<'a>) -> Handle {
        self.objects.push(object);
        self.objects.len() - 1
    }

    /// Reads an object, of which none may lie deeper than [`DEEPEST`].
    fn object(&mut self, depth: u32) -> Option<Handle> {
        if depth > DEEPEST {
            return None;
        }
        let kind = self.byte()?;
        let reserved = (kind & 0x80 != 0).then(|| {
            self.seen.push(OTHER);
            self.seen.len() - 1
        });
        let handle = match kind & 0x7f {
            b'N' | b'F' | b'T' | b'S' | b'.' | b'0' => OTHER,
            b'i' => {
                let number = i64::from(self.number()?);
                self.keep(Object::Number(number))
            }
            b'I' | b'g' => self.skip(8)?,
            b'y' => self.skip(16)?,
            b'f' => {
                let len = self.short_len()?;
                self.skip(len)?
            }
            b'x' => {
                for _ in 0..2 {
                    let len = self.short_len()?;
                    self.skip(len)?;
                }
                OTHER
            }
            b'l' => {
                let digits = usize::try_from(self.number()?.unsigned_abs()).ok()?;
                self.skip(digits.checked_mul(2)?)?
            }
            b's' => {
                let len = self.len()?;
                let bytes = self.take(len)?;
                self.keep(Object::Bytes(bytes))
            }
            b'a' | b'A' | b'u' | b't' => {
                let len = self.len()?;
                let text = self.take(len)?;
                self.keep(Object::Text(text))
            }
            b'z' | b'Z' => {
                let len = self.short_len()?;
                let text = self.take(len)?;
                self.keep(Object::Text(text))
            }
            b'r' => {
                let which = self.len()?;
                *self.seen.get(which)?
            }
            b')' => {
                let len = self.short_len()?;
                self.tuple(len, depth)?
            }
            b'(' => {
                let len = self.len()?;
                self.tuple(len, depth)?
            }
            b'[' | b'<' | b'>' => {
                for _ in 0..self.len()? {
                    self.object(depth + 1)?;
                }
                OTHER
            }
            b'{' => {
                while self.rest.first() != Some(&b'0') {
                    self.object(depth + 1)?;
                    self.object(depth + 1)?;
                }
                self.skip(1)?
            }
            b'c' => self.code(depth)?,
            _ => return None,
        };
        if let Some(reserved) = reserved {
            self.seen[reserved] = handle;
        }
        Some(handle)
    }

    fn skip(&mut self, len: usize) -> Option<Handle> {
        self.take(len).map(|_| OTHER)
    }

    fn tuple(&mut self, len: usize, depth: u32) -> Option<Handle> {
        // An item takes a byte at least.
        let mut items = Vec::with_capacity(len.min(self.rest.len()).min(1 << 10));
        for _ in 0..len {
            items.push(self.object(depth + 1)?);
        }
        Some(self.keep(Object::Tuple(items)))
    }

    fn code(&mut self, depth: u32) -> Option<Handle> {
        let dialect = self.dialect;
        let mut flags = 0;
        for _ in 0..dialect.numbers {
            flags = i64::from(self.number()?);
        }
        let inside = u32::from(flags & OPTIMIZED != 0);
        self.functions += inside;
        let [code, constants, names] = [
            self.object(depth + 1)?,
            self.object(depth + 1)?,
            self.object(depth + 1)?,
        ];
        for _ in 0..dialect.before_line {
            self.object(depth + 1)?;
        }
        self.number()?;
        for _ in 1..dialect.after_line {
            self.object(depth + 1)?;
        }
        self.object(depth + 1)?;
        self.statements(code, constants, names);
        self.functions -= inside;
        Some(OTHER)
    }

    /// Finds the import statements in bytecode: pairs of an instruction and an argument of a byte, which others in front of
    /// it extend.
    fn statements(&mut self, code: Handle, constants: Handle, names: Handle) {
        let late = self.functions > 0;
        let (Object::Bytes(code), Object::Tuple(constants), Object::Tuple(names)) =
            (&self.objects[code], &self.objects[constants], &self.objects[names])
        else {
            return;
        };
        let item = |tuple: &[Handle], at: usize| tuple.get(at).and_then(|handle| self.objects.get(*handle));
        let text = |handle: &Handle| match self.objects.get(*handle) {
            Some(Object::Text(text)) => Some(*text),
            _ => None,
        };
        // The two constants loaded last, the latest second.
        let mut loaded = [None, None];
        let mut higher = 0usize;
        let mut about_own_name = false;
        let mut found = Vec::new();
        for pair in code.chunks_exact(2) {
            let (instruction, argument) = (pair[0], higher << 8 | usize::from(pair[1]));
            higher = 0;
            if instruction == self.dialect.extended_arg {
                higher = argument & 0x00ff_ffff;
            } else if instruction == self.dialect.load_const {
                let constant = item(constants, argument);
                if about_own_name && !late && matches!(constant, Some(Object::Text(b"__main__"))) {
                    // What follows `if __name__ == "__main__"` is for scripts; almost always it is the end.
                    break;
                }
                loaded = [loaded[1], constant];
            } else if instruction == self.dialect.load_name {
                about_own_name = matches!(item(names, argument), Some(Object::Text(b"__name__")));
            } else if instruction == self.dialect.import_name {
                if let ([Some(Object::Number(level)), from], Some(Object::Text(module))) =
                    (loaded, item(names, argument))
                    && let Ok(level) = u8::try_from(*level)
                {
                    let names = match from {
                        Some(Object::Tuple(names)) => names.iter().filter_map(text).collect(),
                        _ => Vec::new(),
                    };
                    found.push(Import {
                        level,
                        module,
                        names,
                        late,
                    });
                }
                loaded = [None, None];
            }
        }
        self.imports.extend(found);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    /// Compiles the standard library and writes, for each module, `N.pyc`, and to its output what the interpreter's own
    /// disassembler says of imports.
    const DISASSEMBLE: &str = r"
import dis, importlib.util, marshal, os, sys, sysconfig
out = sys.argv[1]
n = 0
def walk(code, late, found):
    late = late or bool(code.co_flags & 1)
    for const in code.co_consts:
        if hasattr(const, 'co_code'):
            walk(const, late, found)
    loaded = [None, None]
    own = False
    for op in dis.get_instructions(code):
        if op.opname == 'LOAD_CONST':
            if own and not late and op.argval == '__main__':
                break
            loaded = [loaded[1], op.argval]
        elif op.opname == 'LOAD_NAME':
            own = op.argval == '__name__'
        elif op.opname == 'IMPORT_NAME':
            level, names = loaded
            found.append('%d %d %s %s' % (late, level, op.argval, ','.join(names or ())))
for top, dirs, files in os.walk(sysconfig.get_paths()['stdlib']):
    dirs[:] = sorted(d for d in dirs if d not in ('test', 'tests', 'site-packages', 'dist-packages', 'idlelib', 'lib2to3'))
    for name in sorted(files):
        if not name.endswith('.py'):
            continue
        try:
            code = compile(open(os.path.join(top, name), 'rb').read(), name, 'exec', dont_inherit=True)
        except SyntaxError:
            continue
        found = []
        walk(code, False, found)
        with open(os.path.join(out, '%d.pyc' % n), 'wb') as file:
            file.write(importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code))
        print('\n'.join(['module %d' % n] + found))
        n += 1
";

    /// The imports found in `file`, as the script above writes them.
    fn said(file: &Path) -> Vec<String> {
        let bytes = std::fs::read(file).unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let line = |import: &Import<'_>| {
            let names: Vec<String> = import.names.iter().map(|name| text(name)).collect();
            let (late, level, module) = (u8::from(import.late), import.level, text(import.module));
            format!("{late} {level} {module} {}", names.join(","))
        };
        let found = imports(&bytes).expect("a module of a version that is known");
        found.iter().map(line).collect()
    }

    /// Compares all of the standard library's modules of an interpreter; returns how many statements they have, or None
    /// when there is no such interpreter or it is of a version that is not known.
    fn agrees_with(python: &str) -> Option<usize> {
        let dir = tempfile::tempdir().unwrap();
        let script = dir.path().join("disassemble.py");
        std::fs::write(&script, DISASSEMBLE).unwrap();
        let output = Command::new(python)
            .arg("-I")
            .arg(&script)
            .arg(dir.path())
            .output()
            .ok()?;
        if !output.status.success() {
            return None;
        }
        let head = std::fs::read(dir.path().join("0.pyc")).ok()?;
        dialect(&head)?;
        let (mut modules, mut statements) = (0, 0);
        let expected = String::from_utf8(output.stdout).unwrap();
        for module in expected.split("module ").skip(1) {
            let mut lines = module.lines();
            let number = lines.next().unwrap();
            let expected: Vec<&str> = lines.collect();
            assert_eq!(
                said(&dir.path().join(format!("{number}.pyc"))),
                expected,
                "{python}: module {number}"
            );
            (modules, statements) = (modules + 1, statements + expected.len());
        }
        assert!(modules > 100, "{python}: only {modules} modules");
        Some(statements)
    }

    /// Of each interpreter that this machine has; `TARBLK_TEST_PYTHONS` names more, separated by colons.
    #[test]
    fn every_import_is_what_the_disassembler_says() {
        let more = std::env::var("TARBLK_TEST_PYTHONS").unwrap_or_default();
        let pythons = std::iter::once("python3").chain(more.split(':'));
        let mut compared = 0;
        for python in pythons.filter(|python| !python.is_empty()) {
            match agrees_with(python) {
                Some(statements) => {
                    assert!(statements > 1000, "{python}: only {statements} statements");
                    compared += 1;
                }
                None => eprintln!("SKIP: every_import_is_what_the_disassembler_says: no {python} of 3.8 to 3.13"),
            }
        }
        eprintln!("compared with {compared} interpreters");
    }

    /// A module of 3.11 by hand: `from ..a import b` in the module, its strings given once and referred to.
    fn by_hand() -> Vec<u8> {
        let mut bytes = 3495u16.to_le_bytes().to_vec();
        bytes.extend(b"\r\n");
        bytes.extend([0; 12]);
        bytes.push(b'c' | 0x80);
        bytes.extend([0; 20]);
        // RESUME, LOAD_CONST 0, LOAD_CONST 1, IMPORT_NAME 0.
        bytes.extend(b"s\x08\0\0\0\x97\0\x64\0\x64\x01\x6c\0");
        // Constants: 2, ("b",). Names: "a".
        bytes.extend(b")\x02i\x02\0\0\0)\x01\xda\x01b)\x01\xda\x01a");
        bytes.extend(b"r\x01\0\0\0s\0\0\0\0z\x01mz\x01mz\x01m");
        bytes.extend([0; 4]);
        bytes.extend(b"s\0\0\0\0s\0\0\0\0");
        bytes
    }

    #[test]
    fn relative_imports_keep_their_level() {
        let expected = Import {
            level: 2,
            module: b"a",
            names: vec![&b"b"[..]],
            late: false,
        };
        assert_eq!(imports(&by_hand()), Some(vec![expected]));
        let mut unknown = by_hand();
        unknown[0] ^= 1;
        assert_eq!(imports(&unknown), None);
        let nested = [&by_hand()[..16], &[b')', 1].repeat(100_000)].concat();
        assert_eq!(imports(&nested), None);
    }

    proptest! {
        #[test]
        fn no_module_does_harm(tail in proptest::collection::vec(any::<u8>(), 0..2000), keep in 0usize..100) {
            let whole = by_hand();
            let bytes = [&whole[..whole.len().min(16 + keep)], &tail].concat();
            for import in imports(&bytes).unwrap_or_default() {
                prop_assert!(import.module.len() <= bytes.len());
            }
        }

        #[test]
        fn no_damaged_module_does_harm(flips in proptest::collection::vec((16usize..90, any::<u8>()), 1..8)) {
            let mut bytes = by_hand();
            for (at, value) in flips {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            let _whatever = imports(&bytes);
        }
    }
}
