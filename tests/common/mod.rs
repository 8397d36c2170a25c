//! What the tests of whole commands share: running programs, skipping aloud, comparing trees, and a corpus of tars.

#![allow(dead_code, clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

pub(crate) mod anonymous;
pub(crate) mod chunked;
pub(crate) mod corpus;
pub(crate) mod images;
pub(crate) mod noise;
pub(crate) mod packed;
pub(crate) mod rawtar;
pub(crate) mod servers;
pub(crate) mod session;
pub(crate) mod tree;
pub(crate) mod unpacked;
pub(crate) mod unzstd;
pub(crate) mod wait;

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tarblk::internals::digest::{Algorithm, Digest};

/// The SHA-256 of bytes, as manifests name them.
pub(crate) fn sha256(bytes: &[u8]) -> Digest {
    Digest::of(Algorithm::Sha256, bytes)
}

/// The command under test.
pub(crate) const TARBLK: &str = env!("CARGO_BIN_EXE_tarblk");

/// Says that a test, or a part of it, cannot run here and why: on standard error and in the file that `TARBLK_SKIP_LOG`
/// names, which the test runner prints. With `TARBLK_TEST_STRICT` set it is a failure.
pub(crate) fn skip(test: &str, why: &str) {
    let line = format!("SKIP: {test}: {why}");
    assert!(std::env::var_os("TARBLK_TEST_STRICT").is_none(), "{line}");
    eprintln!("{line}");
    if let Some(log) = std::env::var_os("TARBLK_SKIP_LOG") {
        let mut log = fs::OpenOptions::new().append(true).create(true).open(log).unwrap();
        writeln!(log, "{line}").unwrap();
    }
}

/// Whether a program can be found.
pub(crate) fn have(program: &str) -> bool {
    let directories = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&directories).any(|dir| dir.join(program).is_file())
}

/// Why nothing can be attached and mounted here through the loop back end, if so.
pub(crate) fn no_loop_mounts() -> Option<&'static str> {
    if !rustix::process::geteuid().is_root() {
        return Some("mounting needs root");
    }
    if !Path::new("/dev/fuse").exists() || !Path::new("/dev/loop-control").exists() {
        return Some("no /dev/fuse or no /dev/loop-control");
    }
    None
}

/// The same, or why no directories can be stacked on that.
pub(crate) fn no_overlays() -> Option<&'static str> {
    no_loop_mounts().or((!unpacked::has_overlayfs()).then_some("this kernel has no overlayfs"))
}

/// Runs a program to its end and returns what it said, whether it succeeded or not.
pub(crate) fn output(program: impl AsRef<OsStr>, arguments: &[&OsStr]) -> Output {
    let program = program.as_ref();
    Command::new(program)
        .args(arguments)
        .env("LC_ALL", "C.UTF-8")
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}", program.display()))
}

/// Runs a program that has to succeed and returns its standard output.
pub(crate) fn succeed(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// Extracts a tar as root would: everything it records, and nothing of this machine's users. ACLs come as container tools
/// have them, as `SCHILY.xattr.system.posix_acl_*`; the text form `SCHILY.acl.*` is left alone on purpose. Directory
/// times are set at the end, because not every program writes a tar depth first.
pub(crate) fn gnu_tar_extract(tar: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    let mut command = Command::new("tar");
    command
        .env("LC_ALL", "C")
        .args([
            "--xattrs",
            "--xattrs-include=*",
            "--numeric-owner",
            "--same-owner",
            "-p",
            "--delay-directory-restore",
        ])
        .args(["--warning=no-unknown-keyword", "--warning=no-timestamp"])
        .arg("-C")
        .arg(to)
        .arg("-xf")
        .arg(tar);
    succeed(&mut command);
}

/// A scratch directory under the target directory, which the guest sees too; removed when dropped.
pub(crate) fn scratch(prefix: &str) -> tempfile::TempDir {
    tempfile::Builder::new()
        .prefix(prefix)
        .tempdir_in(env!("CARGO_TARGET_TMPDIR"))
        .unwrap()
}

/// A path's parts joined, for messages and arguments.
pub(crate) fn within(dir: &Path, name: &str) -> PathBuf {
    dir.join(name)
}
