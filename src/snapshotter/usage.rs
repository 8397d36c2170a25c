//! What a directory takes on disk. In: a directory. Out: bytes of whole blocks and inodes, as containerd counts them. Never asks a
//! network, and looks at no file's content.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::records::Usage;

/// Bytes in a block of `st_blocks`.
const BLOCK: u64 = 512;

/// Counts what lies below `dir`, and `dir`. Files with several names count once; what goes away meanwhile is not counted.
///
/// # Errors
/// When a directory cannot be read.
pub(super) fn of(dir: &Path) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut seen = HashSet::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(path) = pending.pop() {
        let meta = match fs::symlink_metadata(&path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        if meta.is_dir() || meta.nlink() <= 1 || seen.insert((meta.dev(), meta.ino())) {
            usage.inodes += 1;
            usage.bytes += meta.blocks() * BLOCK;
        }
        if meta.is_dir() {
            match fs::read_dir(&path) {
                Ok(entries) => {
                    for entry in entries {
                        pending.push(entry?.path());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hard_links_count_once() {
        let dir = tempfile::tempdir().unwrap();
        let empty = of(dir.path()).unwrap();
        assert_eq!(empty.inodes, 1);
        fs::create_dir(dir.path().join("sub")).unwrap();
        fs::write(dir.path().join("sub/file"), vec![1; 10_000]).unwrap();
        let with_one = of(dir.path()).unwrap();
        assert_eq!(with_one.inodes, 3);
        assert!(with_one.bytes >= empty.bytes + 10_000);
        fs::hard_link(dir.path().join("sub/file"), dir.path().join("again")).unwrap();
        std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
        let linked = of(dir.path()).unwrap();
        assert_eq!(linked.inodes, 4);
        assert!(linked.bytes < with_one.bytes + 10_000);
        assert!(of(&dir.path().join("none")).is_ok_and(|usage| usage == Usage::default()));
    }
}
