//! The modules that a JavaScript file loads under Node.js. In: its path and bytes, and a function that tells which paths are files.
//! Out: the files that its `require` and `import` name.
//!
//! Only names that stand in the text as literals are seen, wherever they stand, and each is looked for as Node does
//! (`modules.md` of its documentation): beside the file, or in the `node_modules` of the directories above it; failing that
//! beside the package itself, which is how distributions lay packages out. A package's directory begins with its
//! `package.json`, whose `main` says which file is the package. Pure; what it returns only decides what is prefetched.

/// The most names that are taken from one file.
const MOST_NAMES: usize = 256;
/// The longest name that is read, in bytes.
const LONGEST_NAME: usize = 200;
/// The most directories above a file that are searched for a package.
const MOST_ABOVE: usize = 16;
/// Modules built into Node.js, which have no file.
const BUILT_IN: [&[u8]; 36] = [
    b"assert",
    b"async_hooks",
    b"buffer",
    b"child_process",
    b"cluster",
    b"console",
    b"constants",
    b"crypto",
    b"dgram",
    b"diagnostics_channel",
    b"dns",
    b"domain",
    b"events",
    b"fs",
    b"http",
    b"http2",
    b"https",
    b"inspector",
    b"module",
    b"net",
    b"os",
    b"path",
    b"perf_hooks",
    b"process",
    b"punycode",
    b"querystring",
    b"readline",
    b"stream",
    b"string_decoder",
    b"timers",
    b"tls",
    b"tty",
    b"url",
    b"util",
    b"v8",
    b"zlib",
];

/// Whether a file may load others, by its name: JavaScript, or a `package.json`.
pub(super) fn is_script(path: &[u8]) -> bool {
    [&b".js"[..], b".cjs", b".mjs"]
        .iter()
        .any(|ending| path.ends_with(ending))
        || is_package(path)
}

fn is_package(path: &[u8]) -> bool {
    path.ends_with(b"/package.json")
}

/// The files that the one at `path` loads, in the order in which it names them. `exists` returns the file at a path.
pub(super) fn loads<F>(path: &[u8], bytes: &[u8], exists: &dyn Fn(&[u8]) -> Option<F>) -> Vec<F> {
    let Some(slash) = path.iter().rposition(|&byte| byte == b'/') else {
        return Vec::new();
    };
    let directory = &path[..slash];
    let mut found = Vec::new();
    if is_package(path) {
        let main = main(bytes).unwrap_or(b"index.js");
        found.extend(file(&[directory, b"/", main].concat(), exists));
        return found;
    }
    for name in names(bytes).take(MOST_NAMES) {
        if name.starts_with(b"./") || name.starts_with(b"../") || name == b"." || name == b".." {
            found.extend(file(&[directory, b"/", name].concat(), exists));
        } else if !name.starts_with(b"/") && !name.starts_with(b"node:") && !BUILT_IN.contains(&name) {
            package(directory, name, exists, &mut found);
        }
    }
    found
}

/// Resolves a path as `require` does: the file itself, the file with one of the endings that Node.js tries, or a directory's
/// package or `index.js`.
fn file<F>(path: &[u8], exists: &dyn Fn(&[u8]) -> Option<F>) -> Option<F> {
    const ENDINGS: [&[u8]; 6] = [b"", b".js", b".json", b".node", b"/package.json", b"/index.js"];
    ENDINGS.iter().find_map(|ending| exists(&[path, ending].concat()))
}

/// Adds to `found` the `package.json` of the package `name` (and the file inside it, if it names one), looking upwards from
/// `directory`.
fn package<F>(directory: &[u8], name: &[u8], exists: &dyn Fn(&[u8]) -> Option<F>, found: &mut Vec<F>) {
    // `package/file`, or `@scope/package/file`.
    let parts = if name.starts_with(b"@") { 2 } else { 1 };
    let ends = name
        .iter()
        .enumerate()
        .filter(|(_, byte)| **byte == b'/')
        .map(|(at, _)| at);
    let end = ends.clone().nth(parts - 1).unwrap_or(name.len());
    let (package, inside) = name.split_at(end);
    let mut above = directory;
    for _ in 0..MOST_ABOVE {
        for between in [&b"/node_modules/"[..], b"/"] {
            let home = [above, between, package].concat();
            let Some(description) = exists(&[&home[..], b"/package.json"].concat()) else {
                continue;
            };
            // Its `main` is followed once its bytes are here.
            found.push(description);
            if !inside.is_empty() {
                found.extend(file(&[&home, inside].concat(), exists));
            }
            return;
        }
        match above.iter().rposition(|&byte| byte == b'/') {
            Some(slash) => above = &above[..slash],
            None => return,
        }
    }
}

/// The string literals behind `require(`, `import(`, `import` and `from`.
fn names(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        loop {
            // Each literal begins with a quote, and few quotes follow these words.
            let quote = rest.iter().position(|byte| matches!(byte, b'\'' | b'"'))?;
            let (before, literal) = (rest[..quote].trim_ascii_end(), &rest[quote + 1..]);
            let mark = rest[quote];
            rest = literal;
            let called = before.strip_suffix(b"(").map(<[u8]>::trim_ascii_end);
            let named = match called {
                Some(before) => before.ends_with(b"require") || before.ends_with(b"import"),
                None => before.ends_with(b"from") || before.ends_with(b"import"),
            };
            if !named {
                continue;
            }
            let end = literal.iter().take(LONGEST_NAME + 1).position(|&byte| byte == mark);
            if let Some(name) = end.and_then(|end| literal.get(..end))
                && is_name(name)
            {
                rest = &literal[name.len() + 1..];
                return Some(name);
            }
        }
    })
}

/// Whether a literal can be the name of a module.
fn is_name(text: &[u8]) -> bool {
    let fits = |byte: &u8| byte.is_ascii_alphanumeric() || b"@._-/:".contains(byte);
    !text.is_empty() && text.iter().all(fits)
}

/// The value of `"main"` in a `package.json`: the file that stands for the package.
fn main(bytes: &[u8]) -> Option<&[u8]> {
    const KEY: &[u8] = b"\"main\"";
    let at = bytes.windows(KEY.len()).position(|window| window == KEY)?;
    let rest = bytes.get(at + KEY.len()..)?.trim_ascii_start();
    let rest = rest.strip_prefix(b":")?.trim_ascii_start().strip_prefix(b"\"")?;
    let end = rest.iter().take(LONGEST_NAME).position(|&byte| byte == b'"')?;
    rest.get(..end).filter(|name| is_name(name))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn literals_are_found_whatever_their_quotes() {
        let text = br#"var a = require('./a') , b=require( "b" ); import c from "c/d.js"; import 'e';
            x = import("f"); require(g); from "not a name"; s = 'require'; require('unterminated"#;
        let found: Vec<&str> = names(text).map(|name| std::str::from_utf8(name).unwrap()).collect();
        assert_eq!(found, ["./a", "b", "c/d.js", "e", "f"]);
        assert_eq!(main(b"{\"name\": \"x\", \"main\" : \"lib/x\"}"), Some(&b"lib/x"[..]));
        assert_eq!(main(b"{\"main\": {}}"), None);
    }

    /// A tree of packages on disk: what is followed from the first file is what the machine's own Node loads.
    #[test]
    fn what_node_loads_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        let files = [
            (
                "app/start.js",
                "require('fs'); require('./lib'); require('one'); require('@s/two/part'); require('../other.json')",
            ),
            (
                "app/lib/index.js",
                "exports.x = require('./deep/er.js'); if (0) require('missing')",
            ),
            ("app/lib/deep/er.js", "require('one')"),
            ("app/node_modules/one/package.json", "{\"main\": \"./main\"}"),
            ("app/node_modules/one/main.js", "require('three')"),
            ("app/node_modules/one/index.js", "not this"),
            ("node_modules/@s/two/package.json", "{}"),
            ("node_modules/@s/two/part.js", "require('.')"),
            ("node_modules/@s/two/index.js", ""),
            ("node_modules/three/package.json", "{}"),
            ("node_modules/three/index.js", "module.exports = 3"),
            ("other.json", "{}"),
            ("app/lib/unrelated.js", ""),
        ];
        for (name, content) in files {
            let path = root.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        let exists = |path: &[u8]| {
            let path = std::str::from_utf8(path).ok()?;
            std::fs::canonicalize(path).ok().filter(|path| path.is_file())
        };
        let mut found = vec![root.join("app/start.js")];
        let mut next = 0;
        while let Some(path) = found.get(next).cloned() {
            next += 1;
            let text = path.to_str().unwrap().as_bytes();
            if is_script(text) {
                for path in loads(text, &std::fs::read(&path).unwrap(), &exists) {
                    if !found.contains(&path) {
                        found.push(path);
                    }
                }
            }
        }
        found.retain(|path| !path.ends_with("package.json"));
        found.sort();
        let script = "require(process.argv[1]); console.log(Object.keys(require.cache).sort().join('\\n'))";
        let output = Command::new("node")
            .args(["-e", script])
            .arg(root.join("app/start.js"))
            .output();
        let Some(output) = output.ok().filter(|output| output.status.success()) else {
            eprintln!("SKIP: what_node_loads_is_found: no node");
            return;
        };
        let loaded = String::from_utf8(output.stdout).unwrap();
        let loaded: Vec<&str> = loaded.lines().collect();
        assert!(loaded.len() > 7, "{loaded:?}");
        assert_eq!(
            found.iter().map(|path| path.to_str().unwrap()).collect::<Vec<_>>(),
            loaded
        );
    }

    proptest! {
        #[test]
        fn no_text_does_harm(text in "(require\\(|from |import|['\"./@a-z ]){0,200}", tail in proptest::collection::vec(any::<u8>(), 0..300)) {
            let bytes = [text.as_bytes(), &tail].concat();
            for name in names(&bytes) {
                prop_assert!(is_name(name) && name.len() <= LONGEST_NAME);
            }
            let _any = (main(&bytes), loads(b"/a/b.js", &bytes, &|_| Some(())));
        }
    }
}
