//! Images mounted by the command and compared with what umoci made of them.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Output;

use super::session::{Session, leftovers};
use super::unpacked::{self, Unpacked, images};
use super::{no_loop_mounts, skip, tree};

/// The images, if everything is here to mount and unpack them.
pub(crate) fn laboratory(test: &str) -> Option<PathBuf> {
    if let Some(why) = no_loop_mounts().or_else(unpacked::no_unpacking) {
        skip(test, why);
        return None;
    }
    images(test)
}

/// How `tarblk` and skopeo write an image of a layout.
pub(crate) fn oci(images: &Path, layout: &str, tag: &str) -> OsString {
    format!("oci:{}:{tag}", images.join(layout).display()).into()
}

/// Mounts an image and compares it with what umoci unpacked; each difference with the image's name before it.
pub(crate) fn compare(
    session: &mut Session,
    what: &str,
    source: &OsString,
    options: &[OsString],
    expected: &Unpacked,
) -> Vec<String> {
    let mounted = match session.try_mount(source, options) {
        Ok(mounted) => mounted,
        Err(output) => return vec![format!("{what}: {}", String::from_utf8_lossy(&output.stderr).trim())],
    };
    let differences = tree::differences(&expected.root, &mounted, &expected.implied);
    eprintln!(
        "{what}: {} names, {} differences",
        tree::count(&mounted),
        differences.len()
    );
    session.umount();
    differences
        .into_iter()
        .filter(|line| !unpacked::is_known(what, line))
        .map(|line| format!("{what}: {line}"))
        .collect()
}

/// No complaints.
pub(crate) fn none(complaints: &[String]) {
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// Ends a session: nothing that it made is left.
pub(crate) fn nothing_left(session: Session) {
    let dir = session.dir().to_owned();
    drop(session);
    assert_eq!(leftovers(&dir), Vec::<String>::new());
}

/// A mount that has to fail as a person should see it fail: its one line.
pub(crate) fn refused(session: &mut Session, source: &OsString, options: &[OsString]) -> String {
    match session.try_mount(source, options) {
        Ok(_) => panic!("{} was mounted", source.display()),
        Err(output) => one_line(&source.display().to_string(), &output),
    }
}

/// A failure as a person should see it: one line, exit 1.
pub(crate) fn one_line(what: &str, output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{what}: {said}");
    assert!(
        said.starts_with("tarblk: ") && said.lines().count() == 1,
        "{what}: {said}"
    );
    said
}
