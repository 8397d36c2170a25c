//! The demo's layer: a tar with a small root filesystem of this machine's own programs, the libraries they need, and files
//! that the demo's command does not touch, because that is what layers are full of.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Write as _};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

use crate::interrupt::Interrupt;

/// How big the layer becomes, about, in bytes.
const BUDGET: u64 = 96 << 20;

/// Of that, what a language's library may take, so that there is room for things that are not touched.
const LIBRARY_BUDGET: u64 = 40 << 20;

/// Files longer than this are left out, unless a program needs them.
const MAX_FILE: u64 = 8 << 20;

/// Programs that a small root filesystem has; those that this machine lacks are left out.
const PROGRAMS: [&str; 12] = [
    "sh",
    "bash",
    "ls",
    "cat",
    "cp",
    "grep",
    "sed",
    "find",
    "sort",
    "wc",
    "sha256sum",
    "env",
];

/// Directories full of files that can fill the layer up.
const FILLERS: [&str; 8] = [
    "/usr/share/doc",
    "/usr/share/zoneinfo",
    "/usr/share/man",
    "/usr/share/perl",
    "/usr/share/locale",
    "/usr/share/i18n",
    "/usr/share",
    "/usr/lib",
];

/// Directories that are empty in the layer.
const EMPTY: [&str; 5] = ["dev", "proc", "root", "sys", "tmp"];

/// The layer as it became.
#[derive(Clone, Debug)]
pub(super) struct Made {
    /// Its length in bytes.
    pub(super) bytes: u64,
    /// Its entries that are files.
    pub(super) files: u64,
    /// The programs in it, for the person.
    pub(super) programs: Vec<String>,
    /// A command line for a shell that runs in it and touches a good part of it.
    pub(super) command: String,
    /// The same as words.
    pub(super) words: Vec<String>,
    /// A file in it that this machine has too.
    pub(super) sample: String,
}

/// Writes the layer to `path`.
pub(super) fn make(path: &Path, interrupt: &Interrupt) -> anyhow::Result<Made> {
    let mut root = Root {
        items: BTreeMap::new(),
        bytes: 0,
        interrupt,
    };
    let mut programs = Vec::new();
    let mut shell = None;
    for name in PROGRAMS {
        if let Some(program) = find_program(name) {
            root.add_program(&program)?;
            programs.push(name.to_owned());
            if name == "sh" {
                shell = Some(program);
            }
        }
    }
    let shell = shell.context("this machine has no sh, and the demo's layer cannot be without")?;
    let python = add_python(&mut root)?;
    programs.extend(python.iter().map(|_| "python3".to_owned()));
    for dir in FILLERS {
        root.add_tree(Path::new(dir), BUDGET)?;
    }
    let files = root
        .write(path)
        .with_context(|| format!("cannot write {}", path.display()))?;
    let words: Vec<String> = if python.is_some() {
        let script =
            "import json, decimal, email.mime.text, http.client, unittest; print(json.dumps({\"it\": \"runs\"}))";
        ["python3", "-c", script].map(str::to_owned).to_vec()
    } else {
        let script =
            "find /usr/share/doc -type f | sort | head -n 300 | while read -r f; do cat \"$f\"; done | sha256sum";
        ["sh", "-c", script].map(str::to_owned).to_vec()
    };
    Ok(Made {
        bytes: fs::metadata(path)?.len(),
        files,
        programs,
        command: format!("{} {} '{}'", words[0], words[1], words[2]),
        words,
        sample: fs::canonicalize(&shell)?.display().to_string(),
    })
}

/// Python and its library, if this machine has them in working order.
fn add_python(root: &mut Root<'_>) -> anyhow::Result<Option<PathBuf>> {
    let Some(python) = find_program("python3") else {
        return Ok(None);
    };
    let asked = Command::new(&python)
        .args(["-I", "-c", "import sysconfig; print(sysconfig.get_path('stdlib'))"])
        .output();
    let Ok(answer) = asked else { return Ok(None) };
    let library = PathBuf::from(String::from_utf8_lossy(&answer.stdout).trim());
    // Only where it is a system's: its files and Python's idea of where they are then agree in the layer too.
    if !answer.status.success() || !library.starts_with("/usr/lib") || !python.starts_with("/usr") {
        return Ok(None);
    }
    root.add_program(&python)?;
    root.add_tree(&library, LIBRARY_BUDGET)?;
    let extensions = fs::read_dir(library.join("lib-dynload"))
        .into_iter()
        .flatten()
        .flatten();
    for extension in extensions {
        root.add_libraries(&extension.path())?;
    }
    Ok(Some(python))
}

/// Where a program of this machine is.
fn find_program(name: &str) -> Option<PathBuf> {
    ["/usr/bin", "/bin", "/usr/local/bin"]
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.is_file())
}

/// What the layer will hold: paths on this machine, without the slash in front.
struct Root<'a> {
    items: BTreeMap<PathBuf, Metadata>,
    bytes: u64,
    interrupt: &'a Interrupt,
}

impl Root<'_> {
    /// Adds a file with everything on the way to it: directories, and links with what they lead to.
    fn add(&mut self, path: &Path) -> anyhow::Result<()> {
        // As many links as the kernel follows.
        let mut left = 40;
        let mut here = PathBuf::from("/");
        let mut rest: Vec<OsString> = path
            .components()
            .rev()
            .map(|part| part.as_os_str().to_owned())
            .collect();
        while let Some(name) = rest.pop() {
            match Path::new(&name).components().next() {
                None | Some(Component::CurDir) => continue,
                Some(Component::RootDir) => {
                    here = PathBuf::from("/");
                    continue;
                }
                Some(Component::ParentDir) => {
                    here.pop();
                    continue;
                }
                Some(_) => {}
            }
            here.push(&name);
            // Gone since a moment ago, or a link that leads nowhere: the layer has one file less.
            let Ok(meta) = here.symlink_metadata() else {
                return Ok(());
            };
            let is_link = meta.is_symlink();
            self.put(&here, meta);
            if is_link {
                left -= 1;
                anyhow::ensure!(left > 0, "{}: too many links", path.display());
                let target = fs::read_link(&here)?;
                here.pop();
                rest.extend(target.components().rev().map(|part| part.as_os_str().to_owned()));
            }
        }
        Ok(())
    }

    fn put(&mut self, path: &Path, meta: Metadata) {
        let name = path.strip_prefix("/").unwrap_or(path).to_owned();
        if name.as_os_str().is_empty() {
            return;
        }
        let len = if meta.is_file() { meta.len() } else { 0 };
        if self.items.insert(name, meta).is_none() {
            // A header and the padding.
            self.bytes += 512 + len.next_multiple_of(512);
        }
    }

    /// Adds a program and the libraries that it needs.
    fn add_program(&mut self, path: &Path) -> anyhow::Result<()> {
        self.add(path)?;
        self.add_libraries(path)
    }

    /// Adds the libraries that an ELF file needs, as the dynamic loader finds them. Scripts and static programs need none.
    fn add_libraries(&mut self, path: &Path) -> anyhow::Result<()> {
        self.interrupt.check()?;
        let Ok(answer) = Command::new("ldd").arg(path).output() else {
            return Ok(());
        };
        for line in String::from_utf8_lossy(&answer.stdout).lines() {
            // `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)` and `/lib64/ld-linux-x86-64.so.2 (0x…)`
            let library = line.split_whitespace().find(|word| word.starts_with('/'));
            if let Some(library) = library {
                self.add(Path::new(library))?;
            }
        }
        Ok(())
    }

    /// Adds the files below a directory until the layer is `budget` bytes long.
    fn add_tree(&mut self, dir: &Path, budget: u64) -> anyhow::Result<()> {
        let mut dirs = vec![dir.to_owned()];
        while let Some(dir) = dirs.pop() {
            self.interrupt.check()?;
            let Ok(entries) = fs::read_dir(&dir) else { continue };
            let mut entries: Vec<_> = entries.flatten().collect();
            entries.sort_by_key(fs::DirEntry::file_name);
            for entry in entries {
                if self.bytes >= budget {
                    return Ok(());
                }
                let Ok(meta) = entry.metadata() else { continue };
                if meta.is_dir() {
                    dirs.push(entry.path());
                } else if (meta.is_file() && meta.len() <= MAX_FILE) || meta.is_symlink() {
                    // A link as it is: what it leads to may be anywhere.
                    if let Some(parent) = entry.path().parent() {
                        self.add(parent)?;
                    }
                    self.put(&entry.path(), meta);
                }
            }
        }
        Ok(())
    }

    /// Writes the tar; returns how many files it has.
    fn write(&self, path: &Path) -> anyhow::Result<u64> {
        let mut tar = tar::Builder::new(BufWriter::with_capacity(1 << 20, File::create(path)?));
        tar.follow_symlinks(false);
        let mut files = 0;
        for name in EMPTY {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(if name == "tmp" { 0o1777 } else { 0o755 });
            header.set_size(0);
            tar.append_data(&mut header, format!("{name}/"), io::empty())?;
        }
        for (name, meta) in &self.items {
            self.interrupt.check()?;
            let source = Path::new("/").join(name);
            if meta.is_file() {
                // What cannot be read is left out: this machine has other work, too.
                let Ok(mut file) = File::open(&source) else { continue };
                tar.append_file(name, &mut file)?;
                files += 1;
            } else {
                tar.append_path_with_name(&source, name)?;
            }
        }
        tar.into_inner()?.flush()?;
        Ok(files)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_has_what_its_command_needs() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer.tar");
        let made = make(&path, &Interrupt::default()).unwrap();
        assert!(made.bytes < BUDGET + (64 << 20), "{}", made.bytes);
        let mut tar = tar::Archive::new(File::open(&path).unwrap());
        let names: Vec<PathBuf> = tar
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap().path().unwrap().into_owned())
            .collect();
        assert!(
            names.contains(&PathBuf::from(made.sample.trim_start_matches('/'))),
            "{}",
            made.sample
        );
        for name in EMPTY {
            assert!(names.contains(&PathBuf::from(format!("{name}/"))), "{name}");
        }
        let mut once = names.clone();
        once.sort();
        once.dedup();
        assert_eq!(once.len(), names.len(), "every name once");
    }
}
