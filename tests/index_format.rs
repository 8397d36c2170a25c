//! docs/index-format.md is enough to implement from: `read_index.py` was written from that page alone, and reads every index of
//! the corpus as tarblk does, down to the last byte of the layer, plain, gzip and zstd.

mod common;

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::Command;

use common::{TARBLK, corpus, have, no_loop_mounts, output, scratch, skip, succeed};
use serde_json::Value;

const READER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/read_index.py");

fn lines(text: &[u8]) -> Vec<Value> {
    let line = |line: &str| serde_json::from_str(line).unwrap();
    std::str::from_utf8(text).unwrap().lines().map(line).collect()
}

/// Makes an index of `blob` with everything in it, and has both readers read it.
fn check(name: &str, blob: &Path, tar: &Path, dir: &Path) {
    let index = dir.join("index.tarblk");
    let (os, path) = (OsStr::new, Path::as_os_str);
    let made = output(
        TARBLK,
        &[os("index"), path(blob), os("-o"), path(&index), os("--full"), os("-q")],
    );
    assert!(
        made.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&made.stderr)
    );
    let ours = output(TARBLK, &[os("ls"), path(&index), os("--json")]);
    assert!(ours.status.success(), "{name}");
    let theirs = output("python3", &[os(READER), path(&index), path(blob), path(tar)]);
    assert!(
        theirs.status.success(),
        "{name}: {}",
        String::from_utf8_lossy(&theirs.stderr)
    );
    let (ours, theirs) = (lines(&ours.stdout), lines(&theirs.stdout));
    for (ours, theirs) in ours.iter().zip(&theirs) {
        assert_eq!(ours, theirs, "{name}");
    }
    assert_eq!(ours.len(), theirs.len(), "{name}");
}

/// Whether the second reader can run.
fn can_read(test: &str) -> bool {
    let lacking = ["python3", "zstd", "gzip"].into_iter().find(|program| !have(program));
    if let Some(program) = lacking {
        skip(test, &format!("no {program}"));
    }
    lacking.is_none()
}

/// `from` through a compressor, to `to`.
fn compress(script: &str, from: &Path, to: &Path) {
    let mut command = Command::new("sh");
    command.args(["-euc", script, "sh"]).arg(from).arg(to);
    succeed(&mut command);
}

#[test]
fn indexes_of_tars_made_by_hand() {
    if !can_read("indexes_of_tars_made_by_hand") {
        return;
    }
    let work = scratch("format-");
    for archive in corpus::by_hand(work.path()) {
        check(&archive.name, &archive.path, &archive.path, work.path());
    }
}

#[test]
fn indexes_of_tars_of_every_program_however_compressed() {
    const NAME: &str = "indexes_of_tars_of_every_program_however_compressed";
    if let Some(why) = no_loop_mounts() {
        return skip(NAME, why);
    }
    if !can_read(NAME) {
        return;
    }
    let work = scratch("format-programs-");
    let blob = work.path().join("blob");
    let codings = [
        ("gzip", "gzip -6n <\"$1\" >\"$2\""),
        (
            "two members",
            "(head -c 700000 \"$1\" | gzip; tail -c +700001 \"$1\" | gzip -1) >\"$2\"",
        ),
        ("zstd", "zstd -q -f \"$1\" -o \"$2\""),
        (
            "frames",
            "(head -c 900000 \"$1\" | zstd -q; tail -c +900001 \"$1\" | zstd -q) >\"$2\"",
        ),
    ];
    let mut codings = codings.iter().cycle();
    for archive in corpus::planted(work.path()) {
        check(&archive.name, &archive.path, &archive.path, work.path());
        // One coding an archive: there are more archives than codings.
        let (coding, script) = codings.next().unwrap();
        compress(script, &archive.path, &blob);
        check(
            &format!("{} in {coding}", archive.name),
            &blob,
            &archive.path,
            work.path(),
        );
        fs::remove_file(&archive.path).unwrap();
    }
}

#[test]
fn the_second_reader_notices_what_is_not_so() {
    if !can_read("the_second_reader_notices_what_is_not_so") {
        return;
    }
    let work = scratch("format-lies-");
    let archive = &corpus::by_hand(work.path())[0];
    check(&archive.name, &archive.path, &archive.path, work.path());
    let index = work.path().join("index.tarblk");
    let good = fs::read(&index).unwrap();
    let refuses = || {
        let files = [&index, &archive.path].map(|path| path.as_os_str());
        let read = output("python3", &[OsStr::new(READER), files[0], files[1]]);
        !read.status.success()
    };
    assert!(!refuses());
    for at in [0, 9, 13, 17, 30, 200, good.len() / 2, good.len() - 1] {
        let mut bad = good.clone();
        bad[at] ^= 1;
        fs::write(&index, bad).unwrap();
        assert!(refuses(), "byte {at}");
    }
    fs::write(&index, &good).unwrap();
    let mut layer = fs::read(&archive.path).unwrap();
    layer[0] ^= 1;
    fs::write(&archive.path, layer).unwrap();
    assert!(refuses(), "another layer");
}
