//! The files that a script of Ruby, Perl or PHP loads. In: its path and text, paths of files as they are read, and a function that
//! tells which paths are files. Out: the files that it names.
//!
//! These languages look for a name below the directories of a search path that only the interpreter knows. It is learned
//! ([`search`]): from the directories above the scripts that name something, and from what readers turn to after a name was
//! looked for in vain. Pure; what it returns only decides what is prefetched.

mod perl;
mod php;
mod ruby;
mod search;

use self::php::Namespaces;
use self::search::SearchPath;

/// The most names that are taken from one script.
const MOST_NAMES: usize = 256;
/// The longest name that is read, in bytes.
const LONGEST_NAME: usize = 200;

/// A language whose scripts are understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Language {
    Ruby,
    Perl,
    Php,
    /// Not PHP itself, but the settings that name its extensions.
    PhpSettings,
}

impl Language {
    /// By the ending of its path, or the interpreter in its first line.
    pub(super) fn of(path: &[u8], head: &[u8]) -> Option<Self> {
        const ENDINGS: [(&[u8], Language); 6] = [
            (b".rb", Language::Ruby),
            (b".pm", Language::Perl),
            (b".pl", Language::Perl),
            (b".php", Language::Php),
            (b".inc", Language::Php),
            (b".ini", Language::PhpSettings),
        ];
        let is_php = || path.windows(3).any(|window| window == b"php");
        if let Some((_, language)) = ENDINGS.iter().find(|(ending, _)| path.ends_with(ending)) {
            return Some(*language).filter(|language| *language != Self::PhpSettings || is_php());
        }
        let line = head.strip_prefix(b"#!")?.split(|&byte| byte == b'\n').next()?;
        let names = |name: &[u8]| line.windows(name.len()).any(|window| window == name);
        let by_name: [(&[u8], Language); 3] = [(b"ruby", Self::Ruby), (b"perl", Self::Perl), (b"php", Self::Php)];
        by_name
            .iter()
            .find(|(name, _)| names(name))
            .map(|(_, language)| *language)
    }
}

/// What a script names.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Named {
    /// A file by its whole path, or by one relative to the script's directory (which begins with `.`). It may lack its ending.
    Path(Vec<u8>),
    /// A path below some directory of the search path. It may lack its ending.
    Sought(Vec<u8>),
}

/// Where the modules of each language lie in a layer, as far as that is known.
#[derive(Debug, Default)]
pub(super) struct Scripts {
    ruby: SearchPath,
    perl: SearchPath,
    php: SearchPath,
    namespaces: Namespaces,
}

impl Scripts {
    /// The files that the script at `path` loads before it does anything else, in the order in which it names them. `exists` returns
    /// the file at a path.
    pub(super) fn loads<F>(
        &mut self,
        language: Language,
        path: &[u8],
        bytes: &[u8],
        exists: &dyn Fn(&[u8]) -> Option<F>,
    ) -> Vec<F> {
        let Some(slash) = path.iter().rposition(|&byte| byte == b'/') else {
            return Vec::new();
        };
        let directory = &path[..slash];
        let (names, search, endings): (_, _, &[&[u8]]) = match language {
            Language::Ruby => (ruby::names(bytes), &mut self.ruby, &[b".rb", b".so", b""]),
            Language::Perl => (perl::names(bytes), &mut self.perl, &[b""]),
            Language::Php => {
                let names = self.namespaces.names(path, bytes);
                (names, &mut self.php, &[b""])
            }
            Language::PhpSettings => (php::extensions(bytes, &mut self.php), &mut self.php, &[b""]),
        };
        let find = |name| match name {
            Named::Path(path) => {
                let path = if path.starts_with(b"/") {
                    path
                } else {
                    [directory, b"/", &path].concat()
                };
                endings.iter().find_map(|ending| exists(&[&path[..], ending].concat()))
            }
            Named::Sought(name) => search.find(directory, &name, endings, exists),
        };
        names.into_iter().take(MOST_NAMES).filter_map(find).collect()
    }

    /// A reader turned to the file at `path`: returns files that were looked for in vain and lie beside it, if it tells where they do.
    pub(super) fn saw<F>(&mut self, path: &[u8], exists: &dyn Fn(&[u8]) -> Option<F>) -> Vec<F> {
        let all = [&mut self.ruby, &mut self.perl, &mut self.php];
        all.into_iter().flat_map(|search| search.saw(path, exists)).collect()
    }
}

/// The lines of a text, each with the number of blanks that it begins with, and without them.
fn lines(text: &[u8]) -> impl Iterator<Item = (usize, &[u8])> {
    text.split(|&byte| byte == b'\n').map(|line| {
        let rest = line.trim_ascii();
        (
            line.iter().position(|byte| !byte.is_ascii_whitespace()).unwrap_or(0),
            rest,
        )
    })
}

/// The text between a quote at the beginning and the next one like it; none if there is none, or it is no name.
fn quoted(text: &[u8]) -> Option<&[u8]> {
    let mark = *text.first().filter(|mark| matches!(mark, b'\'' | b'"'))?;
    let end = text
        .iter()
        .skip(1)
        .take(LONGEST_NAME + 1)
        .position(|byte| *byte == mark)?;
    text.get(1..=end).filter(|name| is_name(name))
}

/// Whether a literal can be the name of a file.
fn is_name(text: &[u8]) -> bool {
    let fits = |byte: &u8| byte.is_ascii_alphanumeric() || b"@._-/+".contains(byte);
    !text.is_empty() && text.iter().all(fits)
}

/// What follows `word` in a text that begins with it, if the word ends there.
fn after<'a>(text: &'a [u8], word: &[u8]) -> Option<&'a [u8]> {
    let rest = text.strip_prefix(word)?;
    let goes_on = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_';
    (!rest.first().is_some_and(goes_on)).then_some(rest.trim_ascii_start())
}

#[cfg(test)]
mod tests;
