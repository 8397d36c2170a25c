//! Read-ahead that knows programs: when a program's first bytes come, its interpreter and libraries are asked for before
//! any reader gets to them; when a Python module comes, so are the modules that it imports, and when a script or a Java archive
//! comes, so are the files and classes that it names. On layers made of this machine's own files.

#![cfg(feature = "command")]

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use tarblk::internals::cache::ChunkKey;
use tarblk::internals::image::ext4::{Ext4Image, Ext4Options};
use tarblk::internals::image::{DirectoryId, FileMap, StoredFile};
use tarblk::internals::index::walk;
use tarblk::internals::prefetch::{HintCounts, PlanOptions, Planner, Presence};
use tarblk::internals::tree::TreeBuilder;
use tarblk::internals::units::CHUNK_BYTES;
use tarblk::internals::units::TarRange;

/// A layer whose every wish comes true at once, and the chunks that came.
struct World {
    tar: File,
    image: Arc<Ext4Image>,
    planner: Planner,
    here: RefCell<BTreeSet<ChunkKey>>,
}

impl World {
    fn new(path: &Path) -> Self {
        let tar = File::open(path).unwrap();
        let size = tar.metadata().unwrap().len();
        let mut tree = TreeBuilder::new();
        walk::local(&tar, size, &mut tree, &mut |_, _| ()).unwrap();
        let image = Arc::new(Ext4Image::plan(tree.finish(), &Ext4Options::default()).unwrap());
        // Directory neighbours would come whether anybody names them or not.
        let options = PlanOptions {
            neighbour_bytes: 0,
            neighbour_percent: 0,
            ..PlanOptions::default()
        };
        let planner = Planner::new(Some(image.clone()), vec![size], options, Arc::new(HintCounts::new(1)));
        Self {
            tar,
            image,
            planner,
            here: RefCell::default(),
        }
    }

    fn file(&self, path: &str) -> StoredFile {
        let found = self.image.resolve(DirectoryId(0), path.as_bytes());
        found.unwrap_or_else(|| panic!("{path} is not in the layer"))
    }

    /// A reader reads the file's first page, and nothing else ever. Lets everything come that is asked for.
    fn touch(&mut self, path: &str) {
        let file = self.file(path);
        let Self { tar, planner, here, .. } = self;
        let look = |key| {
            if here.borrow().contains(&key) {
                Presence::Here
            } else {
                Presence::Absent
            }
        };
        let peek = |key: ChunkKey, show: &mut dyn FnMut(&[u8])| {
            let mut chunk = vec![0; usize::try_from(CHUNK_BYTES).unwrap()];
            let len = tar.read_at(&mut chunk, u64::from(key.index) * CHUNK_BYTES).unwrap();
            let is_here = here.borrow().contains(&key);
            if is_here {
                show(&chunk[..len]);
            }
            is_here
        };
        let mut now = Vec::new();
        let range = TarRange::new(file.range.start, file.range.len.min(4096));
        planner.miss(file.layer, range, &look, &mut now);
        for _ in 0..10_000 {
            let Some(want) = now.pop().or_else(|| planner.next(1 << 20, &look)) else {
                return;
            };
            for key in want.chunks.keys() {
                if here.borrow_mut().insert(key) {
                    planner.arrived(key, &peek, &mut now);
                }
            }
        }
        panic!("the planner asks without end");
    }

    /// Whether the file's first and last bytes have come.
    fn has(&self, path: &str) -> bool {
        self.has_byte(path, 0) && self.has_byte(path, self.file(path).range.len - 1)
    }

    /// Whether the file's byte at this offset has come.
    fn has_byte(&self, path: &str, offset: u64) -> bool {
        let file = self.file(path);
        self.here.borrow().contains(&ChunkKey {
            layer: file.layer,
            index: u32::try_from((file.range.start.0 + offset) / CHUNK_BYTES).unwrap(),
        })
    }
}

/// What `ldd` says that a program loads, by the names it loads them by, beside what they lead to.
fn libraries(program: &Path) -> Vec<PathBuf> {
    let output = Command::new("ldd").arg(program).output().unwrap();
    String::from_utf8_lossy(&output.stdout)
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
        .map(|path| {
            fs::canonicalize(path)
                .unwrap()
                .with_file_name(Path::new(path).file_name().unwrap())
        })
        .collect()
}

/// The program's own name for its interpreter is a path, which the layer must have.
fn add_interpreter(tar: &mut tar::Builder<File>) {
    for path in ["/lib64/ld-linux-x86-64.so.2", "/lib/ld-linux-aarch64.so.1"] {
        if let Ok(real) = fs::canonicalize(path) {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_size(0);
            tar.append_link(&mut header, &path[1..], &real).unwrap();
        }
    }
}

/// Adds a file under its real path and a link to it under its own, with 3 MiB that nobody reads behind it.
fn add(tar: &mut tar::Builder<File>, path: &Path) {
    let real = fs::canonicalize(path).unwrap();
    let inside = |path: &Path| path.strip_prefix("/").unwrap().to_owned();
    tar.append_path_with_name(&real, inside(&real)).unwrap();
    if real != path {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, inside(path), &real).unwrap();
    }
    let mut header = tar::Header::new_gnu();
    header.set_size(3 << 20);
    let name = format!("padding/{}", inside(&real).display());
    tar.append_data(&mut header, name, &vec![b'x'; 3 << 20][..]).unwrap();
}

#[test]
fn a_programs_libraries_come_with_its_first_bytes() {
    let program = fs::canonicalize("/usr/bin/tar").unwrap();
    let libraries = libraries(&program);
    assert!(libraries.len() > 2, "tar is not a dynamic program here");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.tar");
    let mut tar = tar::Builder::new(File::create(&path).unwrap());
    add(&mut tar, &program);
    for library in &libraries {
        add(&mut tar, library);
    }
    add_interpreter(&mut tar);
    let mut script = tar::Header::new_gnu();
    script.set_size(40);
    let text = format!("{:<40}", format!("#!{}\n", program.display()));
    tar.append_data(&mut script, "bin/script", text.as_bytes()).unwrap();
    tar.finish().unwrap();
    drop(tar);

    for start in [program.to_str().unwrap(), "/bin/script"] {
        let mut world = World::new(&path);
        world.touch(start);
        let missing: Vec<&PathBuf> = libraries
            .iter()
            .filter(|library| !world.has(library.to_str().unwrap()))
            .collect();
        assert!(missing.is_empty(), "{start}: {missing:?} did not come");
        let padding = world.file(&format!("/padding{}", program.display()));
        let here = world.here.borrow();
        let came = here.iter().filter(|key| {
            let at = u64::from(key.index) * CHUNK_BYTES;
            (padding.range.start.0 + CHUNK_BYTES..padding.range.end().0 - CHUNK_BYTES).contains(&at)
        });
        assert!(came.count() < 20, "what nobody names came too");
    }
}

#[test]
fn a_python_modules_imports_come_with_it() {
    let script = "import sysconfig; print(sysconfig.get_paths()['stdlib'])";
    let Ok(output) = Command::new("python3").args(["-c", script]).output() else {
        eprintln!("SKIP: a_python_modules_imports_come_with_it: no python3");
        return;
    };
    let stdlib = String::from_utf8(output.stdout).unwrap().trim().to_owned();
    let dir = tempfile::tempdir().unwrap();
    let compiled = dir.path().join("lib/__pycache__");
    fs::create_dir_all(&compiled).unwrap();
    let compile = "import py_compile, sys\nfor i in range(1, len(sys.argv), 2): py_compile.compile(sys.argv[i], sys.argv[i + 1], doraise=True)";
    let names = [
        "shutil",
        "fnmatch",
        "zipfile",
        "gettext",
        "antigravity",
        "this",
        "webbrowser",
    ];
    let mut command = Command::new("python3");
    command.args(["-c", compile]);
    for name in names {
        // zipfile is a package in newer versions.
        let source = [format!("{stdlib}/{name}.py"), format!("{stdlib}/{name}/__init__.py")];
        let source = source.iter().find(|path| Path::new(path).exists()).unwrap();
        command.arg(source).arg(compiled.join(format!("{name}.c.pyc")));
    }
    assert!(command.status().unwrap().success());
    let path = dir.path().join("layer.tar");
    let mut tar = tar::Builder::new(File::create(&path).unwrap());
    for name in names {
        add(&mut tar, &compiled.join(format!("{name}.c.pyc")));
    }
    tar.finish().unwrap();
    drop(tar);

    let mut world = World::new(&path);
    let module = |name: &str| format!("{}/{name}.c.pyc", compiled.display());
    world.touch(&module("shutil"));
    assert!(world.has(&module("fnmatch")), "shutil imports fnmatch");
    assert!(!world.has(&module("this")), "shutil does not import this");
    world.touch(&module("antigravity"));
    assert!(world.has(&module("webbrowser")), "antigravity imports webbrowser");
}

/// What a script names comes with it; what it names in vain comes when a reader turns to something that tells where such files lie.
#[test]
fn what_scripts_name_comes_with_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let files = [
        (
            "lib/ruby/json.rb",
            "require 'json/common'\ndef late\n  require 'json/late'\nend\n",
        ),
        ("lib/ruby/json/common.rb", "require 'strscan'\nrequire 'json/ext'\n"),
        ("lib/ruby/json/late.rb", ""),
        ("arch/strscan.so", ""),
        ("arch/json/ext.so", ""),
        ("perl/A.pm", "package A;\nuse parent qw(B::C);\n"),
        ("perl/B/C.pm", "1;\n"),
        ("perl/D.pm", "1;\n"),
        (
            "php/Y/A.php",
            "<?php\nnamespace X\\Y;\nclass A extends B {}\nrequire __DIR__ . '/../c.php';\n",
        ),
        ("php/Y/B.php", "<?php\n"),
        ("php/c.php", "<?php\n"),
        ("php/Y/D.php", "<?php\n"),
    ];
    let layer = dir.path().join("layer.tar");
    let mut tar = tar::Builder::new(File::create(&layer).unwrap());
    for (name, text) in files {
        let file = dir.path().join(name);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, format!("{text:<100}")).unwrap();
        add(&mut tar, &file);
    }
    tar.finish().unwrap();
    drop(tar);

    let mut world = World::new(&layer);
    let came = |world: &World| {
        files
            .map(|(name, _)| name)
            .into_iter()
            .filter(|name| world.has(&path(name)))
            .collect::<Vec<_>>()
    };
    world.touch(&path("lib/ruby/json.rb"));
    assert_eq!(came(&world), ["lib/ruby/json.rb", "lib/ruby/json/common.rb"]);
    world.touch(&path("arch/strscan.so"));
    assert!(world.has(&path("arch/json/ext.so")), "the directory is known now");
    world.touch(&path("perl/A.pm"));
    assert!(world.has(&path("perl/B/C.pm")) && !world.has(&path("perl/D.pm")));
    world.touch(&path("php/Y/A.php"));
    assert!(world.has(&path("php/Y/B.php")) && world.has(&path("php/c.php")));
    assert!(!world.has(&path("php/Y/D.php")) && !world.has(&path("lib/ruby/json/late.rb")));
}

/// With a Java archive's first bytes come its end, its directory, the class that runs and those that this one uses, out of the middle of it,
/// and those of the archives that it needs, also of one that lies in it.
#[test]
fn a_java_archives_classes_come_with_it() {
    let dir = tempfile::tempdir().unwrap();
    // Entries with 2 MiB between them, and where each lies.
    let script = "
import io, struct, sys, zipfile
def klass(*uses):
    pool = b''.join(struct.pack('>BH', 1, len(name)) + name.encode() + struct.pack('>BH', 7, 2 * n + 1) for n, name in enumerate(uses))
    return struct.pack('>IIH', 0xcafebabe, 61, 2 * len(uses) + 1) + pool + bytes(50)
def jar(file, path, *entries):
    with zipfile.ZipFile(file, 'w') as made:
        for n, (name, content) in enumerate(entries):
            made.writestr(zipfile.ZipInfo(f'padding{n}'), b'x' * (2 << 20))
            info = zipfile.ZipInfo(name)
            made.writestr(info, content, zipfile.ZIP_STORED if name.endswith('.jar') else zipfile.ZIP_DEFLATED)
            print(path + name, made.getinfo(name).header_offset)
        made.writestr(zipfile.ZipInfo('padding'), b'x' * (2 << 20))
inner = io.BytesIO()
jar(inner, 'lib/inner.jar:', ('r/In.class', klass('java/lang/Object')))
jar(sys.argv[1] + '/a.jar', 'a.jar:', ('META-INF/MANIFEST.MF', b'Main-Class: p.Main\\r\\nClass-Path: b.jar\\r\\n'), ('lib/inner.jar', inner.getvalue()),
    ('p/Main.class', klass('p/Used', 'q/Other', 'r/In')), ('p/Not.class', klass()), ('p/Used.class', klass()))
jar(sys.argv[1] + '/b.jar', 'b.jar:', ('META-INF/MANIFEST.MF', b''), ('q/Other.class', klass()), ('q/Not.class', klass()))
";
    let output = Command::new("python3").args(["-c", script]).arg(dir.path()).output();
    let Some(output) = output.ok().filter(|output| output.status.success()) else {
        eprintln!("SKIP: a_java_archives_classes_come_with_it: no python3");
        return;
    };
    let layer = dir.path().join("layer.tar");
    let mut tar = tar::Builder::new(File::create(&layer).unwrap());
    for name in ["a.jar", "b.jar"] {
        add(&mut tar, &dir.path().join(name));
    }
    tar.finish().unwrap();
    drop(tar);

    let mut world = World::new(&layer);
    world.touch(&dir.path().join("a.jar").display().to_string());
    let text = String::from_utf8(output.stdout).unwrap();
    let mut inner = 0;
    let mut came = Vec::new();
    for line in text.lines().rev() {
        let (place, offset) = line.split_once(' ').unwrap();
        let offset: u64 = offset.parse().unwrap();
        if place == "a.jar:lib/inner.jar" {
            inner = offset + 30 + 13;
        }
        let (archive, name) = place.split_once(':').unwrap();
        let (archive, offset) = if archive == "lib/inner.jar" {
            ("a.jar", inner + offset)
        } else {
            (archive, offset)
        };
        if world.has_byte(&dir.path().join(archive).display().to_string(), offset) {
            came.push(name);
        }
    }
    came.sort_unstable();
    let expected = [
        "META-INF/MANIFEST.MF",
        "META-INF/MANIFEST.MF",
        "p/Main.class",
        "p/Used.class",
        "q/Other.class",
        "r/In.class",
    ];
    assert_eq!(came, expected, "{text}");
}
