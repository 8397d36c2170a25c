//! What the parser makes of a tar is what programs make of it that nobody here wrote: Python's tarfile, bsdtar, the tar crate,
//! and Go's archive/tar by its own test archives. The tars are made by GNU tar, bsdtar, Python and the tar crate, in every
//! dialect that they write.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256};
use tarblk::internals::index::{
    Collector, Entry, HeaderFault, Index, IndexBuilder, IndexError, Kind, Parser, Timestamp, listing, walk,
};
use tarblk::internals::units::TarOffset;

/// A length as a position.
fn bytes(len: usize) -> u64 {
    u64::try_from(len).unwrap()
}

fn parse(tar: &[u8]) -> Result<Vec<Entry>, IndexError> {
    let mut all = Collector::default();
    let mut parser = Parser::new();
    parser.feed(TarOffset(0), tar, &mut all)?;
    parser.finish(TarOffset(bytes(tar.len())))?;
    Ok(all.0)
}

fn content(tar: &[u8], entry: &Entry) -> Vec<u8> {
    let place = |at: u64| usize::try_from(at).unwrap();
    let mut content = vec![0; place(entry.size)];
    for segment in &entry.segments {
        let from = &tar[place(segment.tar_offset.0)..][..place(segment.len)];
        content[place(segment.file_offset)..][..from.len()].copy_from_slice(from);
    }
    content
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// Whether a program is installed; says so loudly if it is not.
fn have(program: &str) -> bool {
    let found = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let found = found.is_ok_and(|status| status.success());
    if !found {
        eprintln!("SKIP: {program} is not installed (tools/setup installs it)");
    }
    found
}

fn run(command: &mut Command) -> Vec<u8> {
    let output = command.env("LC_ALL", "C.UTF-8").output().unwrap();
    assert!(
        output.status.success(),
        "{command:?}: {}, {}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// A directory with one of everything that can be made here; devices only by root.
fn everything(dir: &Path) -> PathBuf {
    let root = dir.join("tree");
    fs::create_dir_all(root.join("sub/empty")).unwrap();
    fs::write(root.join("file"), b"hello").unwrap();
    fs::write(root.join("empty"), b"").unwrap();
    fs::write(root.join("block"), [7; 512]).unwrap();
    fs::write(root.join("sub/spaces and #=*?[\\"), b"odd name").unwrap();
    fs::write(root.join("sub/ünïcödé-日本"), b"utf-8").unwrap();
    let long = root.join("l".repeat(120));
    fs::create_dir(&long).unwrap();
    fs::write(long.join("n".repeat(200)), vec![1; 3000]).unwrap();
    fs::hard_link(root.join("file"), root.join("sub/hardlink")).unwrap();
    std::os::unix::fs::symlink("../file", root.join("sub/symlink")).unwrap();
    std::os::unix::fs::symlink("t".repeat(300), root.join("sub/longlink")).unwrap();
    run(Command::new("mkfifo").arg(root.join("fifo")));
    run(Command::new("chmod").arg("6755").arg(root.join("block")));
    run(Command::new("touch")
        .args(["-h", "-d", "1966-02-03 04:05:06.123456789Z"])
        .arg(root.join("sub/symlink")));
    run(Command::new("touch")
        .args(["-d", "2040-02-03 04:05:06.000000001Z"])
        .arg(root.join("empty")));
    let mut sparse = vec![0; 900_000];
    for at in (0..900_000).step_by(70_000) {
        sparse[at..at + 5].copy_from_slice(b"data!");
    }
    fs::write(root.join("plain-sparse"), &sparse).unwrap();
    run(Command::new("cp")
        .arg("--sparse=always")
        .arg(root.join("plain-sparse"))
        .arg(root.join("sparse")));
    if rustix::process::geteuid().is_root() {
        run(Command::new("mknod").arg(root.join("char")).args(["c", "5", "300"]));
        run(Command::new("mknod")
            .arg(root.join("block-device"))
            .args(["b", "259", "70000"]));
        run(Command::new("chown").args(["3000000000:70000"]).arg(root.join("empty")));
    } else {
        eprintln!("SKIP: no device nodes and foreign owners without root");
    }
    if rustix::fs::setxattr(
        root.join("file"),
        "user.mime",
        b"text/plain\0\n",
        rustix::fs::XattrFlags::empty(),
    )
    .is_err()
    {
        eprintln!("SKIP: no extended attributes on this file system");
    }
    root
}

/// Everything, by every writer in every dialect: a name for messages, and the tar.
fn tars(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let root = everything(dir);
    let parent = root.parent().unwrap();
    let mut tars = Vec::new();
    // v7 and ustar cannot hold the long names, the odd owner and the devices; GNU tar says so and goes on.
    for args in [
        &["--format=v7", "--ignore-failed-read"][..],
        &["--format=oldgnu"],
        &["--format=oldgnu", "--sparse"],
        &["--format=gnu"],
        &["--format=gnu", "--sparse"],
        &["--format=gnu", "--incremental"],
        &["--format=gnu", "--label=a-label"],
        &["--format=ustar"],
        &["--format=posix", "--xattrs", "--xattrs-include=*"],
        &["--format=posix", "--sparse", "--sparse-version=0.0"],
        &["--format=posix", "--sparse", "--sparse-version=0.1"],
        &["--format=posix", "--sparse", "--sparse-version=1.0"],
        &["--format=posix", "--pax-option=globexthdr.name=g,uid=77,mtime=1234.5"],
    ] {
        let mut command = Command::new("tar");
        command
            .arg("-C")
            .arg(parent)
            .args(args)
            .args(["-cf", "-", "tree"])
            .env("LC_ALL", "C.UTF-8");
        let output = command.stderr(Stdio::null()).output().unwrap();
        tars.push((format!("GNU tar {args:?}"), output.stdout));
    }
    if have("bsdtar") {
        for format in ["ustar", "pax", "gnutar", "v7"] {
            let mut command = Command::new("bsdtar");
            command
                .arg("-C")
                .arg(parent)
                .args(["--format", format, "-cf", "-", "tree"])
                .env("LC_ALL", "C.UTF-8");
            let output = command.stderr(Stdio::null()).output().unwrap();
            tars.push((format!("bsdtar {format}"), output.stdout));
        }
    }
    if have("python3") {
        for format in ["USTAR", "GNU", "PAX"] {
            let script = "import sys,tarfile
t = tarfile.open(fileobj=sys.stdout.buffer, mode='w|', format=getattr(tarfile, sys.argv[2] + '_FORMAT'), pax_headers={'comment': 'all'})
def add(i):
    try: i.tobuf(t.format, t.encoding, t.errors)
    except ValueError: return None
    return i
t.add(sys.argv[1], 'tree', filter=add)
t.close()";
            let tar = run(Command::new("python3").args(["-c", script]).arg(&root).arg(format));
            tars.push((format!("Python {format}"), tar));
        }
    }
    // The crate writes times before 1970 as times in the far future, which Go refuses as we do.
    run(Command::new("touch")
        .args(["-h", "-d", "2001-02-03Z"])
        .arg(root.join("sub/symlink")));
    let mut builder = tar::Builder::new(Vec::new());
    builder.follow_symlinks(false);
    builder.append_dir_all("tree", &root).unwrap();
    tars.push(("the tar crate".to_owned(), builder.into_inner().unwrap()));
    tars
}

/// Every tar of this test, test archives of others included.
fn corpus() -> Vec<(String, Vec<u8>)> {
    let dir = tempfile::tempdir().unwrap();
    let mut tars = tars(dir.path());
    match testtar() {
        Some(path) => tars.push((path.display().to_string(), fs::read(path).unwrap())),
        None => eprintln!("SKIP: CPython's testtar.tar is not here (it comes with Python's test package)"),
    }
    tars
}

fn testtar() -> Option<PathBuf> {
    let script = "import test,os;d=os.path.dirname(test.__file__)
for p in ('testtar.tar','archivetestdata/testtar.tar'):
    p=os.path.join(d,p)
    if os.path.exists(p): print(p); break";
    let output = Command::new("python3")
        .args(["-c", script])
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    path.is_file().then_some(path)
}

/// What readers agree on about an entry, in one form.
fn facts(tar: &[u8], entry: &Entry) -> String {
    let kind = match entry.kind {
        Kind::File => "file",
        Kind::Directory => "dir",
        Kind::Symlink => "sym",
        Kind::Hardlink => "link",
        Kind::CharDevice => "chr",
        Kind::BlockDevice => "blk",
        Kind::Fifo => "fifo",
    };
    let path = trimmed(&entry.path);
    let digest = match entry.kind {
        Kind::File => hex(&Sha256::digest(content(tar, entry))),
        _ => String::new(),
    };
    let xattrs: Vec<_> = entry
        .xattrs
        .iter()
        .map(|x| format!("{}={}", hex(&x.name), hex(&x.value)))
        .collect();
    format!(
        "{} {kind} {:o} {} {} {}.{:09} {} {} {},{} [{}] {digest}",
        hex(path),
        entry.mode,
        entry.uid,
        entry.gid,
        entry.mtime.secs,
        entry.mtime.nanos,
        entry.size,
        hex(trimmed(&entry.link)),
        entry.device_major,
        entry.device_minor,
        xattrs.join(",")
    )
}

fn trimmed(path: &[u8]) -> &[u8] {
    let end = path.iter().rposition(|b| *b != b'/').map_or(0, |last| last + 1);
    &path[..end]
}

const PYTHON_READER: &str = r"
import sys, tarfile, hashlib, decimal, os
kinds = {b'1': 'link', b'2': 'sym', b'3': 'chr', b'4': 'blk', b'5': 'dir', b'6': 'fifo', b'D': 'dir'}
t = tarfile.open(sys.argv[1], 'r:')
for m in t:
    if m.type == b'V': continue
    kind = kinds.get(m.type, 'file')
    enc = lambda s: os.fsencode(s) if isinstance(s, str) else s
    time = decimal.Decimal(m.pax_headers.get('mtime') or m.mtime)
    secs = int(time.to_integral_value(decimal.ROUND_FLOOR))
    nanos = int((time - secs) * 10**9)
    digest = hashlib.sha256(t.extractfile(m).read()).hexdigest() if kind == 'file' else ''
    raw = {k[13:]: v for k, v in m.pax_headers.items() if k.startswith('SCHILY.xattr.')}
    xattrs = sorted((k.encode('utf-8', 'surrogateescape').hex(), v.encode('utf-8', 'surrogateescape').hex()) for k, v in raw.items())
    dev = (m.devmajor, m.devminor) if kind in ('chr', 'blk') else (0, 0)
    link = m.linkname if kind in ('sym', 'link') else ''
    print('%s %s %o %d %d %d.%09d %d %s %d,%d [%s] %s' % (
        m.name.rstrip('/').encode('utf-8', 'surrogateescape').hex(), kind, m.mode & 0o7777, m.uid, m.gid, secs, nanos,
        m.size if kind == 'file' else 0, link.rstrip('/').encode('utf-8', 'surrogateescape').hex(), *dev,
        ','.join('%s=%s' % x for x in xattrs), digest))
";

#[test]
fn python_reads_the_same() {
    if !have("python3") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for (name, tar) in corpus() {
        // Python takes the times in such GNU headers for a prefix.
        if name.contains("--incremental") {
            continue;
        }
        let path = dir.path().join("x.tar");
        fs::write(&path, &tar).unwrap();
        let theirs = String::from_utf8(run(Command::new("python3").args(["-c", PYTHON_READER]).arg(&path))).unwrap();
        let entries = parse(&tar).unwrap_or_else(|error| panic!("{name}: {error}"));
        let ours: Vec<_> = entries.iter().map(|entry| facts(&tar, entry)).collect();
        let theirs: Vec<_> = theirs.lines().map(str::trim_end).collect();
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert_eq!(ours.trim_end(), *theirs, "{name}");
        }
        assert_eq!(ours.len(), theirs.len(), "{name}");
        assert!(ours.len() >= 8, "{name}: {} entries", ours.len());
    }
}

/// An mtree specification as name -> keyword -> value, names and links decoded.
fn mtree_facts(text: &str) -> BTreeMap<Vec<u8>, BTreeMap<String, String>> {
    let mut facts = BTreeMap::new();
    for line in text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()) {
        let mut words = line.split(' ');
        let name = unvis(words.next().unwrap());
        let pairs = words.filter_map(|word| word.split_once('='));
        let pairs = pairs.map(|(key, value)| match key {
            "link" => (key.to_owned(), hex(&unvis(value))),
            "time" => {
                // libarchive does not pad the nanoseconds.
                let (secs, nanos) = value.split_once('.').unwrap();
                (key.to_owned(), format!("{secs}.{}", nanos.parse::<u32>().unwrap()))
            }
            _ => (key.to_owned(), value.to_owned()),
        });
        facts.insert(name, pairs.collect());
    }
    facts
}

fn unvis(text: &str) -> Vec<u8> {
    let mut bytes = text.bytes();
    let mut out = Vec::new();
    while let Some(byte) = bytes.next() {
        if byte == b'\\' {
            let digits: Vec<u8> = bytes.by_ref().take(3).collect();
            out.push(u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 8).unwrap());
        } else {
            out.push(byte);
        }
    }
    out
}

fn index_of(tar: &[u8]) -> Index<Vec<u8>> {
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, tar).unwrap();
    let mut builder = IndexBuilder::new();
    let walked = walk::local(&file, bytes(tar.len()), &mut builder, &mut |_, _| {}).unwrap();
    Index::open(builder.finish(bytes(tar.len()), walked.end)).unwrap()
}

fn mtree(tar: &[u8]) -> String {
    let mut out = Vec::new();
    listing::write(&index_of(tar), listing::Format::Mtree, &mut out).unwrap();
    String::from_utf8(out).unwrap()
}

#[test]
fn bsdtar_lists_the_same() {
    if !have("bsdtar") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let keywords = "mtree:!all,mode,uid,gid,type,size,time,link,device";
    for (name, tar) in tars(dir.path()) {
        // bsdtar ignores global headers, on purpose (see the parser's documentation), and version 3.6 crashes while it turns
        // what the tar crate writes into mtree.
        if name.contains("globexthdr") || name == "the tar crate" {
            continue;
        }
        let path = dir.path().join("x.tar");
        fs::write(&path, &tar).unwrap();
        let source = [b"@".as_slice(), path.as_os_str().as_bytes()].concat();
        let source = std::ffi::OsStr::from_bytes(&source);
        let theirs = run(Command::new("bsdtar")
            .args(["-cf", "-", "--format=mtree", "--options", keywords])
            .arg(source));
        let theirs = mtree_facts(&String::from_utf8(theirs).unwrap());
        let ours = mtree(&tar);
        let hardlinks: Vec<_> = parse(&tar)
            .unwrap()
            .into_iter()
            .filter(|e| e.kind == Kind::Hardlink)
            .map(|e| e.path)
            .collect();
        let mut checked = 0;
        for (path, mut ours) in mtree_facts(&ours) {
            let mut theirs = theirs.get(&path).unwrap_or_else(|| panic!("{name}: {path:?}")).clone();
            if hardlinks.iter().any(|link| path.ends_with(link)) {
                // From an archive libarchive lists a further name of a file with size 0; we with the file's own.
                theirs.remove("size");
                ours.remove("size");
            }
            if ours["time"].starts_with('-') {
                // libarchive takes -1.5 for half a second after -1, others for half a second before.
                theirs.remove("time");
                ours.remove("time");
            }
            assert_eq!(ours, theirs, "{name}: {}", String::from_utf8_lossy(&path));
            checked += 1;
        }
        assert_eq!(checked, theirs.len(), "{name}");
        // And it reads what we write.
        let spec = dir.path().join("ours.mtree");
        fs::write(&spec, &ours).unwrap();
        let listed = run(Command::new("bsdtar").arg("-tf").arg(&spec));
        assert_eq!(
            listed.split(|b| *b == b'\n').filter(|line| !line.is_empty()).count(),
            checked,
            "{name}"
        );
    }
}

#[test]
fn the_tar_crate_reads_the_same_where_it_can() {
    let dir = tempfile::tempdir().unwrap();
    let mut compared = 0;
    for (name, tar) in tars(dir.path()) {
        // It knows no PAX sparse maps and no v7 directories, and hands global headers, labels and dump directories out as entries.
        if [
            "--sparse-version",
            "globexthdr",
            "--label",
            "--incremental",
            "Python PAX",
            "bsdtar pax",
            "v7",
        ]
        .iter()
        .any(|no| name.contains(no))
        {
            continue;
        }
        let ours = parse(&tar).unwrap();
        let mut archive = tar::Archive::new(tar.as_slice());
        let theirs = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let size = entry.size();
            let header = entry.header();
            let facts = (
                entry.path_bytes().into_owned(),
                entry
                    .link_name_bytes()
                    .map(std::borrow::Cow::into_owned)
                    .unwrap_or_default(),
                header.mode().unwrap() & 0o7777,
                header.entry_type().is_file() || header.entry_type().is_gnu_sparse(),
            );
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
            (facts, size, bytes)
        });
        for (ours, ((path, link, mode, is_file), _, bytes)) in ours.iter().zip(theirs) {
            assert_eq!(ours.path, path, "{name}");
            assert_eq!(u32::from(ours.mode), mode, "{name}");
            assert_eq!(ours.kind == Kind::File, is_file, "{name}");
            if matches!(ours.kind, Kind::Symlink | Kind::Hardlink) {
                assert_eq!(ours.link, link, "{name}");
            }
            if is_file {
                assert!(
                    content(&tar, ours) == bytes,
                    "{name}: content of {}",
                    String::from_utf8_lossy(&path)
                );
            }
            compared += 1;
        }
    }
    assert!(compared > 100, "{compared}");
}

/// Walks by small reads, by one piece and through the index file give the same entries.
#[test]
fn all_ways_lead_to_the_same_entries() {
    for (name, tar) in corpus() {
        let whole = parse(&tar).unwrap();
        let mut replayed = Collector::default();
        let index = index_of(&tar);
        index.verify().unwrap();
        index.replay(&mut replayed).unwrap();
        assert!(replayed.0 == whole, "{name}");
        assert_eq!(index.summary().entries, bytes(whole.len()));
        assert_eq!(index.as_bytes(), index_of(&tar).as_bytes(), "{name}: not deterministic");
    }
}

/// Go's own test archives: what archive/tar makes of them, from its documentation and tests.
#[test]
#[allow(clippy::too_many_lines)] // A table.
fn gos_test_archives_mean_what_go_says() {
    let places = [
        "/usr/share/go-1.19/src/archive/tar/testdata",
        "/usr/share/go/src/archive/tar/testdata",
    ];
    let Some(dir) = places.iter().map(Path::new).find(|dir| dir.is_dir()) else {
        eprintln!("SKIP: Go's test archives are not here (package golang-1.19-src)");
        return;
    };
    let read = |name: &str| fs::read(dir.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let long_path = "a/".to_owned() + &(1..=100).map(|n| n.to_string()).collect::<String>();
    let smileys = "☺☻☹".repeat(18);
    let trailing = "123456789/".repeat(30);
    for (name, entries) in [
        ("gnu.tar", &[("small.txt", 5_u64), ("small2.txt", 11)][..]),
        (
            "sparse-formats.tar",
            &[
                ("sparse-gnu", 200),
                ("sparse-posix-0.0", 200),
                ("sparse-posix-0.1", 200),
                ("sparse-posix-1.0", 200),
                ("end", 4),
            ],
        ),
        ("star.tar", &[("small.txt", 5), ("small2.txt", 11)]),
        ("v7.tar", &[("small.txt", 5), ("small2.txt", 11)]),
        ("pax.tar", &[(&long_path, 7), ("a/b", 0)]),
        ("pax-pos-size-file.tar", &[("foo", 999)]),
        ("pax-records.tar", &[("file", 0)]),
        (
            "pax-global-records.tar",
            &[("file1", 0), ("file2", 0), ("file3", 0), ("file4", 0)],
        ),
        ("nil-uid.tar", &[("P1050238.JPG.log", 14)]),
        ("xattrs.tar", &[("small.txt", 5), ("small2.txt", 11)]),
        ("gnu-multi-hdrs.tar", &[("GNU2/GNU2/long-path-name", 0)]),
        (
            "gnu-incremental.tar",
            &[("test2/", 0), ("test2/foo", 64), ("test2/sparse", 536_870_912)],
        ),
        ("pax-multi-hdrs.tar", &[("bar", 0)]),
        ("gnu-long-nul.tar", &[("0123456789", 0)]),
        ("gnu-utf8.tar", &[(&smileys, 0)]),
        ("ustar-file-devs.tar", &[("file", 0)]),
        ("gnu-nil-sparse-data.tar", &[("sparse.db", 1000)]),
        ("gnu-nil-sparse-hole.tar", &[("sparse.db", 1000)]),
        ("pax-nil-sparse-data.tar", &[("sparse.db", 1000)]),
        ("pax-nil-sparse-hole.tar", &[("sparse.db", 1000)]),
        ("trailing-slash.tar", &[(&trailing, 0)]),
        ("hardlink.tar", &[("file.txt", 15), ("hard.txt", 0)]),
        ("file-and-dir.tar", &[("small.txt", 5), ("dir/", 0)]),
    ] {
        let tar = read(name);
        let found = parse(&tar).unwrap_or_else(|error| panic!("{name}: {error}"));
        let found: Vec<_> = found
            .iter()
            .map(|e| (String::from_utf8_lossy(&e.path).into_owned(), e.size))
            .collect();
        let entries: Vec<_> = entries.iter().map(|(path, size)| ((*path).to_owned(), *size)).collect();
        assert_eq!(found, entries, "{name}");
    }
    for name in [
        "pax-bad-hdr-file.tar",
        "pax-bad-mtime-file.tar",
        "pax-nul-xattrs.tar",
        "pax-nul-path.tar",
        "neg-size.tar",
        "issue10968.tar",
        "issue11169.tar",
        "issue12435.tar",
    ] {
        let outcome = parse(&read(name));
        assert!(outcome.is_err(), "{name}: {outcome:?}");
    }
    // The four sparse files hold the same.
    let tar = read("sparse-formats.tar");
    let entries = parse(&tar).unwrap();
    assert!(
        entries[..4]
            .iter()
            .all(|e| content(&tar, e) == content(&tar, &entries[0]) && e.stored_bytes() == 95)
    );
    // The name after a prefix that Go itself once put where GNU has times.
    let path = parse(&read("invalid-go17.tar")).unwrap().remove(0).path;
    assert!(
        path.ends_with(b"aaa/foo") && path[..path.len() - 4].iter().all(|b| *b == b'a'),
        "{path:?}"
    );
    assert_eq!(
        parse(&read("gnu-not-utf8.tar")).unwrap()[0].path,
        b"hi\x80\x81\x82\x83bye"
    );
    let linked = &parse(&read("pax-multi-hdrs.tar")).unwrap()[0];
    assert_eq!(
        (linked.kind, &linked.link[..]),
        (Kind::Symlink, &b"PAX4/PAX4/long-linkpath-name"[..])
    );
    let owned = &parse(&read("xattrs.tar")).unwrap()[0];
    let xattrs: Vec<_> = owned.xattrs.iter().map(|x| (&x.name[..], &x.value[..])).collect();
    assert_eq!(
        xattrs,
        [
            (&b"security.selinux"[..], &b"unconfined_u:object_r:default_t:s0\0"[..]),
            (b"user.key", b"value"),
            (b"user.key2", b"value2")
        ]
    );
    assert_eq!(
        owned.mtime,
        Timestamp {
            secs: 1_386_065_770,
            nanos: 448_252_320
        }
    );
    // Here we differ from Go: global times apply.
    let globals = parse(&read("pax-global-records.tar")).unwrap();
    let times: Vec<_> = globals.iter().map(|e| e.mtime.secs).collect();
    assert_eq!(times, [1_500_000_000, 1_500_000_000, 1_500_000_000, 1_400_000_000]);
    if have("bzip2") {
        let tar = run(Command::new("bzip2")
            .arg("-dc")
            .arg(dir.join("pax-bad-hdr-large.tar.bz2")));
        let outcome = parse(&tar);
        assert!(
            matches!(
                outcome,
                Err(IndexError::Header {
                    fault: HeaderFault::ExtensionTooLong { .. },
                    ..
                })
            ),
            "{outcome:?}"
        );
    }
}
