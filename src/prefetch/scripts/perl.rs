//! What a Perl script uses. In: its text. Out: the files of the modules behind `use`, `no` and `require`, base classes included, and of
//! the library of a module that has one (`XSLoader`). A `require` inside of a `sub` is left alone, which may never be called.
//!
//! A `sub` is told by its indentation: one ends with the brace that begins where it does.

use super::{LONGEST_NAME, Named, after, lines, quoted};

/// The most lines of one `use`.
const MOST_LINES: usize = 32;

pub(super) fn names(text: &[u8]) -> Vec<Named> {
    let mut names = Vec::new();
    let mut package: Option<&[u8]> = None;
    // How far the sub that a line is in was indented.
    let mut sub = None;
    let mut is_documentation = false;
    let mut all = lines(text);
    while let Some((indent, line)) = all.next() {
        if line == b"__END__" || line == b"__DATA__" {
            break;
        }
        if indent == 0 && line.starts_with(b"=") && line.get(1).is_some_and(u8::is_ascii_alphabetic) {
            is_documentation = !line.starts_with(b"=cut");
            continue;
        }
        if is_documentation || line.starts_with(b"#") {
            continue;
        }
        if sub.is_some_and(|begin| indent == begin && line.starts_with(b"}")) {
            sub = None;
        }
        let line = line.strip_prefix(b"BEGIN {").map_or(line, <[u8]>::trim_ascii_start);
        if let Some(rest) = after(line, b"package") {
            package = package.or_else(|| module(rest));
        } else if let Some(rest) = after(line, b"use").or_else(|| after(line, b"no")) {
            let Some(name) = module(rest) else { continue };
            names.extend(file_of(name));
            // These load what is named behind them.
            if matches!(name, b"parent" | b"base" | b"if" | b"aliased" | b"ok") {
                let mut rest = rest.get(name.len()..).unwrap_or_default();
                for _ in 0..MOST_LINES {
                    bases(rest, &mut names);
                    if rest.contains(&b';') {
                        break;
                    }
                    let Some((_, next)) = all.next() else { break };
                    rest = next;
                }
            }
        } else if sub.is_none() {
            let line = line.strip_prefix(b"eval {").map_or(line, <[u8]>::trim_ascii_start);
            if let Some(rest) = after(line, b"require") {
                match quoted(rest) {
                    Some(path) if path.starts_with(b"/") => names.push(Named::Path(path.to_vec())),
                    Some(path) => names.push(Named::Sought(path.to_vec())),
                    None => names.extend(module(rest).and_then(file_of)),
                }
            }
        }
        let loads_library = |word: &[u8]| line.windows(word.len()).any(|window| window == word);
        if (loads_library(b"XSLoader::load") || after(line, b"bootstrap").is_some())
            && let Some(Named::Sought(file)) = package.and_then(file_of)
        {
            let path = file.strip_suffix(b".pm").unwrap_or(&file);
            let last = path.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
            names.push(Named::Sought([b"auto/", path, b"/", last, b".so"].concat()));
        }
        if after(line, b"sub").is_some() && !line.ends_with(b"}") && !line.ends_with(b";") {
            sub = sub.or(Some(indent));
        }
    }
    names
}

/// The name of a module that a text begins with.
fn module(text: &[u8]) -> Option<&[u8]> {
    let fits = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b':');
    let end = text
        .iter()
        .take(LONGEST_NAME)
        .position(|byte| !fits(byte))
        .unwrap_or(text.len().min(LONGEST_NAME));
    let name = &text[..end];
    // `use v5.20` and `use 5.004` name a version.
    let is_version = name
        .strip_prefix(b"v")
        .is_some_and(|rest| rest.first().is_some_and(u8::is_ascii_digit));
    (name.first().is_some_and(u8::is_ascii_alphabetic) && !is_version).then_some(name)
}

/// `A::B` is looked for as `A/B.pm`.
fn file_of(module: &[u8]) -> Option<Named> {
    let mut path = Vec::with_capacity(module.len() + 3);
    for (at, part) in module
        .split(|&byte| byte == b':')
        .filter(|part| !part.is_empty())
        .enumerate()
    {
        if at > 0 {
            path.push(b'/');
        }
        path.extend_from_slice(part);
    }
    (!path.is_empty()).then(|| Named::Sought([&path[..], b".pm"].concat()))
}

/// Adds the modules that a text names in quotes or in a list of words, `qw(A B)`.
fn bases(text: &[u8], names: &mut Vec<Named>) {
    let text = text.split(|&byte| byte == b';').next().unwrap_or_default();
    if text.windows(10).any(|window| window == b"-norequire") {
        return;
    }
    let words = text.split(|byte| !(byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b':')));
    let words = words.filter(|word| *word != b"qw" && word.len() <= LONGEST_NAME);
    names.extend(words.filter_map(module).filter_map(file_of));
}
