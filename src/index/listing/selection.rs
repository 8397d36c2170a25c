//! Which entries of a listing are wanted. In: paths. Out: whether an entry is one of them or below one.

/// Paths of files and directories; a directory stands for all that is below it too. Without any, everything is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// By their parts, without what [`parts`] leaves out.
    paths: Vec<Vec<Vec<u8>>>,
}

/// A path's parts as a tree of directories has them: nothing empty, no `.`, and `..` undone as far as the root.
fn parts(path: &[u8]) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    for part in path.split(|&byte| byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()),
            name => parts.push(name),
        }
    }
    parts
}

impl Selection {
    /// Everything.
    #[must_use]
    pub fn everything() -> Self {
        Self::default()
    }

    /// Wants `path` and what is below it, besides what was wanted before.
    pub fn add(&mut self, path: &[u8]) {
        self.paths.push(parts(path).into_iter().map(<[u8]>::to_vec).collect());
    }

    /// Whether an entry of this path is wanted.
    #[must_use]
    pub fn takes(&self, path: &[u8]) -> bool {
        if self.paths.is_empty() {
            return true;
        }
        let parts = parts(path);
        self.paths
            .iter()
            .any(|wanted| parts.len() >= wanted.len() && wanted.iter().zip(&parts).all(|(wanted, part)| wanted == part))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_and_what_is_below() {
        assert!(Selection::everything().takes(b"anything"));
        let mut some = Selection::everything();
        some.add(b"/usr/lib/");
        some.add(b"./etc/hello");
        for wanted in [
            "usr/lib",
            "./usr/lib/x",
            "/usr//lib/a/b/",
            "etc/hello",
            "a/../etc/hello",
        ] {
            assert!(some.takes(wanted.as_bytes()), "{wanted}");
        }
        for other in ["usr", "usr/lib64", "usr/libx/y", "etc", "etc/hello2", "x/usr/lib", ""] {
            assert!(!some.takes(other.as_bytes()), "{other}");
        }
        let mut root = Selection::everything();
        root.add(b"/");
        assert!(root.takes(b"./x") && root.takes(b"./"));
    }
}
