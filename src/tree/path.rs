//! Paths as tars record them, taken apart.

use std::ops::Range;

/// The parts of a path after Go's `filepath.Clean`: no empty parts, no `.`, and `..` takes the part before it away.
/// A `..` with nothing before it stays when `keep_leading_up` is set (a relative link text) and is dropped otherwise (a
/// path that starts at the root). Parts are appended to `out` as ranges of `path`.
pub(super) fn clean(path: &[u8], keep_leading_up: bool, out: &mut Vec<Range<usize>>) {
    let first = out.len();
    let mut start = 0;
    while start <= path.len() {
        let end = path[start..]
            .iter()
            .position(|&byte| byte == b'/')
            .map_or(path.len(), |len| start + len);
        match &path[start..end] {
            b"" | b"." => {}
            b".." => match out.last() {
                Some(last) if out.len() > first && &path[last.clone()] != b".." => {
                    out.pop();
                }
                _ if keep_leading_up => out.push(start..end),
                _ => {}
            },
            _ => out.push(start..end),
        }
        start = end + 1;
    }
}

/// Splits `path` into what stands before its last part and that part, when this needs no cleaning: the last part is an
/// ordinary name. `None` otherwise.
pub(super) fn split_plain(path: &[u8]) -> Option<(&[u8], &[u8])> {
    let end = path.iter().rposition(|&byte| byte != b'/')? + 1;
    let start = path[..end]
        .iter()
        .rposition(|&byte| byte == b'/')
        .map_or(0, |slash| slash + 1);
    let name = &path[start..end];
    (name != b"." && name != b"..").then_some((&path[..start], name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cleaned(path: &str, keep: bool) -> Vec<&str> {
        let mut parts = Vec::new();
        clean(path.as_bytes(), keep, &mut parts);
        parts.into_iter().map(|part| &path[part]).collect()
    }

    #[test]
    fn cleans_as_go_does() {
        assert_eq!(cleaned("./a//b/./c/", false), ["a", "b", "c"]);
        assert_eq!(cleaned("/a/../../b", false), ["b"]);
        assert_eq!(cleaned("../../a/..", false), [""; 0]);
        assert_eq!(cleaned("../x/../../y", true), ["..", "..", "y"]);
        assert_eq!(cleaned("..a/...", false), ["..a", "..."]);
        assert_eq!(cleaned("", false), [""; 0]);
    }

    #[test]
    fn splits_only_plain_names() {
        assert_eq!(split_plain(b"./a/b//"), Some((&b"./a/"[..], &b"b"[..])));
        assert_eq!(split_plain(b"b"), Some((&b""[..], &b"b"[..])));
        assert_eq!(split_plain(b"a/.."), None);
        assert_eq!(split_plain(b"./"), None);
        assert_eq!(split_plain(b"//"), None);
        assert_eq!(split_plain(b""), None);
    }
}
