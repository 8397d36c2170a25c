//! What a PHP script loads. In: its path and text. Out: the files that it requires, those of the classes that it names, and the
//! libraries that PHP's settings name.
//!
//! A class is loaded by its name: `A\B\C` is `C.php` in the directory of the namespace `A\B` (PSR-4, PSR-0). Where that is, each
//! script says by its own namespace and directory, and all at once what Composer writes (`autoload_static.php`,
//! `autoload_psr4.php`).

use std::collections::HashMap;

use super::search::SearchPath;
use super::{LONGEST_NAME, MOST_NAMES, Named, after, lines, quoted};

/// The most namespaces whose directories are remembered; then all are forgotten.
const MOST_NAMESPACES: usize = 4096;
/// The longest statement that is understood, in bytes.
const LONGEST_STATEMENT: usize = 4096;
/// What an array of Composer names its always loaded files by: a digest in hexadecimal.
const DIGEST_LEN: usize = 32;

/// The directory of each namespace, without a slash at the end; see the module.
#[derive(Debug, Default)]
pub(super) struct Namespaces(HashMap<Vec<u8>, Vec<u8>>);

/// The libraries that a settings file names (`extension=`, `zend_extension=`); adds the directory that it says they are in.
pub(super) fn extensions(text: &[u8], search: &mut SearchPath) -> Vec<Named> {
    let mut names = Vec::new();
    for (_, line) in lines(text) {
        let value = |key: &[u8]| after(line, key)?.strip_prefix(b"=").map(<[u8]>::trim_ascii_start);
        let unquote = |text: &[u8]| {
            let ends = |byte: &u8| byte.is_ascii_whitespace() || *byte == b';';
            let bare = || text.split(ends).next().unwrap_or_default();
            quoted(text).unwrap_or_else(bare).to_vec()
        };
        if let Some(name) = value(b"extension").or_else(|| value(b"zend_extension")).map(unquote) {
            let ending: &[u8] = if name.ends_with(b".so") { b"" } else { b".so" };
            let name = [&name[..], ending].concat();
            names.push(if name.starts_with(b"/") {
                Named::Path(name)
            } else {
                Named::Sought(name)
            });
        } else if let Some(directory) = value(b"extension_dir")
            .map(unquote)
            .filter(|path| path.starts_with(b"/"))
        {
            search.add(directory.strip_suffix(b"/").unwrap_or(&directory));
        }
    }
    names
}

impl Namespaces {
    /// What the script at `path` names.
    pub(super) fn names(&mut self, path: &[u8], text: &[u8]) -> Vec<Named> {
        let slash = path.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
        let directory = &path[..slash];
        let by_composer = path[slash..].starts_with(b"/autoload_");
        let mut names = Vec::new();
        let mut inside: &[u8] = b"";
        let mut at = 0;
        while let Some(rest) = text
            .get(at..)
            .filter(|rest| !rest.is_empty() && names.len() < MOST_NAMES)
        {
            let len = rest
                .iter()
                .position(|&byte| byte == b'\n')
                .map_or(rest.len(), |end| end + 1);
            let from = at;
            at += len;
            let (line, rest) = (rest[..len].trim_ascii(), &rest[..rest.len().min(LONGEST_STATEMENT)]);
            if let Some(name) = after(line, b"namespace")
                .map(class_name)
                .filter(|name| !name.is_empty())
            {
                inside = name;
                self.learn(name, directory);
            } else if after(line, b"use").is_some() {
                let statement = rest.split(|&byte| byte == b';').next().unwrap_or_default();
                at = at.max(from + statement.len());
                let what = statement.trim_ascii_start().get(b"use".len()..);
                self.imports(inside, what.unwrap_or_default(), &mut names);
            } else if class_head(line).is_some() {
                let head = rest.split(|&byte| byte == b'{').next().unwrap_or_default();
                at = at.max(from + head.len());
                self.parents(
                    inside,
                    class_head(head.trim_ascii_start()).unwrap_or_default(),
                    &mut names,
                );
            } else if let Some(what) = required(line) {
                match place(what, directory) {
                    Some(Place::Known(path)) => names.push(Named::Path(path)),
                    Some(Place::Relative(name)) => {
                        names.push(Named::Path([directory, b"/", &name].concat()));
                        names.push(Named::Sought(name));
                    }
                    None => {}
                }
            } else if by_composer {
                self.entry(line, rest, directory, &mut names);
            }
        }
        names
    }

    /// `namespace` is in `directory`, and those above it are above that as long as they have the same name.
    fn learn(&mut self, namespace: &[u8], directory: &[u8]) {
        if self.0.len() >= MOST_NAMESPACES {
            self.0.clear();
        }
        let (mut namespace, mut directory) = (namespace, directory);
        loop {
            self.0.entry(namespace.to_vec()).or_insert_with(|| directory.to_vec());
            let (outer, last) = split(namespace);
            let Some(above) = directory.strip_suffix(last).and_then(|above| above.strip_suffix(b"/")) else {
                return;
            };
            if last.is_empty() {
                return;
            }
            (namespace, directory) = (outer, above);
        }
    }

    /// The file of a class by its full name.
    fn file_of(&self, class: &[u8]) -> Option<Named> {
        if class.is_empty() || class.len() > LONGEST_NAME {
            return None;
        }
        let path = |name: &[u8]| {
            let mut path = [name, b".php"].concat();
            path.iter_mut()
                .filter(|byte| **byte == b'\\')
                .for_each(|byte| *byte = b'/');
            path
        };
        let mut namespace = split(class).0;
        loop {
            if let Some(directory) = self.0.get(namespace) {
                let inside = class.get(namespace.len()..).unwrap_or_default();
                let inside = inside.strip_prefix(b"\\").unwrap_or(inside);
                return Some(Named::Path([directory, &b"/"[..], &path(inside)].concat()));
            }
            if namespace.is_empty() {
                return Some(Named::Sought(path(class)));
            }
            namespace = split(namespace).0;
        }
    }

    /// `use A\B, C as D`, `use A\{B, C}`; inside of a class the names are those of traits.
    fn imports(&self, inside: &[u8], what: &[u8], names: &mut Vec<Named>) {
        let what = what.trim_ascii();
        if after(what, b"function").is_some() || after(what, b"const").is_some() || what.starts_with(b"(") {
            return;
        }
        let (before, list) = match what.iter().position(|&byte| byte == b'{') {
            Some(open) => (what[..open].trim_ascii(), &what[open + 1..]),
            None => (&b""[..], what),
        };
        for name in list.split(|byte| matches!(byte, b',' | b'}')) {
            let name = class_name(name.trim_ascii());
            if name.is_empty() {
                continue;
            }
            let full = [before, name].concat();
            let is_trait = before.is_empty() && !name.contains(&b'\\') && !inside.is_empty();
            names.extend(self.file_of(&if is_trait { [inside, b"\\", name].concat() } else { full }));
        }
    }

    /// `class A extends B implements C, D`: those that are in the same namespace; the others are imported.
    fn parents(&self, inside: &[u8], head: &[u8], names: &mut Vec<Named>) {
        let words = head.split(|byte| byte.is_ascii_whitespace() || *byte == b',');
        let mut of_parents = false;
        for word in words.filter(|word| !word.is_empty()) {
            if word == b"extends" || word == b"implements" {
                of_parents = true;
            } else if of_parents && !word.contains(&b'\\') && !class_name(word).is_empty() {
                let separator: &[u8] = if inside.is_empty() { b"" } else { b"\\" };
                names.extend(self.file_of(&[inside, separator, class_name(word)].concat()));
            }
        }
    }

    /// An entry of an array that Composer wrote: the directory of a namespace, or a file that is always loaded.
    fn entry(&mut self, line: &[u8], rest: &[u8], directory: &[u8], names: &mut Vec<Named>) {
        let Some(mark) = line.first().filter(|mark| matches!(mark, b'\'' | b'"')) else {
            return;
        };
        let Some(end) = line.iter().skip(1).position(|byte| byte == mark) else {
            return;
        };
        let key = &line[1..=end];
        if let Some(namespace) = key.strip_suffix(b"\\\\") {
            let Some(arrow) = rest.windows(2).take(LONGEST_NAME).position(|window| window == b"=>") else {
                return;
            };
            let value = &rest[arrow + 2..];
            // Of several directories the first.
            let first = value
                .iter()
                .take(LONGEST_NAME)
                .position(|byte| matches!(byte, b'_' | b'$'));
            if let Some(Place::Known(directory)) = first.and_then(|first| place(&value[first..], directory))
                && self.0.len() < MOST_NAMESPACES
            {
                // A backslash is written as two.
                let mut parts = namespace.split(|&byte| byte == b'\\').filter(|part| !part.is_empty());
                let first = parts.next().unwrap_or_default().to_vec();
                let namespace = parts.fold(first, |namespace, part| [&namespace, &b"\\"[..], part].concat());
                self.0.insert(namespace, directory);
            }
        } else if key.len() == DIGEST_LEN && key.iter().all(u8::is_ascii_hexdigit) {
            let value = line.get(end + 2..).unwrap_or_default().trim_ascii_start();
            let value = value.strip_prefix(b"=>").map(<[u8]>::trim_ascii_start);
            if let Some(Place::Known(path)) = value.and_then(|value| place(value, directory)) {
                names.push(Named::Path(path));
            }
        }
    }
}

/// Splits a name at its last backslash.
fn split(name: &[u8]) -> (&[u8], &[u8]) {
    match name.iter().rposition(|&byte| byte == b'\\') {
        Some(at) => (&name[..at], &name[at + 1..]),
        None => (b"", name),
    }
}

/// The name of a class that a text begins with, without a backslash in front.
fn class_name(text: &[u8]) -> &[u8] {
    let fits = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'\\');
    let text = text.strip_prefix(b"\\").unwrap_or(text);
    let end = text.iter().take(LONGEST_NAME).position(|byte| !fits(byte));
    &text[..end.unwrap_or(text.len().min(LONGEST_NAME))]
}

/// What follows `class` and its like in the line that declares one.
fn class_head(line: &[u8]) -> Option<&[u8]> {
    let mut rest = line;
    while let Some(next) = [&b"abstract"[..], b"final", b"readonly"]
        .iter()
        .find_map(|word| after(rest, word))
    {
        rest = next;
    }
    let kinds: [&[u8]; 4] = [b"class", b"interface", b"trait", b"enum"];
    kinds.iter().find_map(|kind| after(rest, kind))
}

/// What a line requires.
fn required(line: &[u8]) -> Option<&[u8]> {
    let line = after(line, b"return").unwrap_or(line);
    let words: [&[u8]; 4] = [b"require_once", b"require", b"include_once", b"include"];
    let rest = words.iter().find_map(|word| after(line, word))?;
    Some(rest.strip_prefix(b"(").map_or(rest, <[u8]>::trim_ascii_start))
}

/// Where an expression says that a file is.
enum Place {
    /// By a path that begins in the script's directory, or at the root.
    Known(Vec<u8>),
    /// By a path that may begin in the script's directory or in one of the search path.
    Relative(Vec<u8>),
}

/// The path that an expression like `__DIR__ . '/..' . '/a.php'` is for a script in `directory`.
fn place(text: &[u8], directory: &[u8]) -> Option<Place> {
    // Composer's names for the directories above its own, and what everybody writes; `dirname(__FILE__)` is the directory itself.
    const ROOTS: [(&[u8], &[u8]); 5] = [
        (b"__DIR__", b""),
        (b"dirname(__FILE__)", b""),
        (b"dirname(__DIR__)", b"/.."),
        (b"$vendorDir", b"/.."),
        (b"$baseDir", b"/../.."),
    ];
    let text = &text[..text.len().min(2 * LONGEST_NAME)];
    let above = |&(word, up): &(&[u8], &[u8])| Some(([directory, up].concat(), text.strip_prefix(word)?, true));
    let plain = || {
        let name = quoted(text)?;
        Some((name.to_vec(), text.get(name.len() + 2..)?, name.starts_with(b"/")))
    };
    let (mut path, mut rest, rooted) = ROOTS.iter().find_map(above).or_else(plain)?;
    while let Some(next) = rest.trim_ascii_start().strip_prefix(b".").map(<[u8]>::trim_ascii_start) {
        let name = quoted(next)?;
        path.extend_from_slice(name);
        rest = next.get(name.len() + 2..)?;
    }
    Some(if rooted {
        Place::Known(path)
    } else {
        Place::Relative(path)
    })
}
