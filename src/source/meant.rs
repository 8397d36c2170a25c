//! What a person perhaps meant by a name that means nothing here. In: the text as typed. Out: a name that would be understood.
//!
//! Only ever shown, never used in place of what was typed. What is proposed holds no password and no query string.

use std::path::Path;

use super::registry::ImageName;
use crate::http::without_secrets;

/// What is put in front of names here, and what people also write for it.
const TRANSPORTS: [(&str, &[&str]); 5] = [
    (
        "docker://",
        &[
            "docker",
            "registry",
            "docker-image",
            "image",
            "podman",
            "containerd",
            "ghcr",
            "quay",
        ],
    ),
    ("oci:", &["oci", "oci-layout", "layout", "oci-dir"]),
    ("https://", &["https", "s3", "gs", "ftp", "ftps", "sftp"]),
    ("http://", &["http"]),
    ("file://", &["file"]),
];

/// So many letters may be wrong in a transport: added, left out, changed or exchanged.
const MOST_WRONG: usize = 2;

/// What `text` may have meant, if it begins with something like a transport. Asks the file system for nothing.
pub(super) fn meant(text: &str) -> Option<String> {
    let (scheme, rest) = text.split_once(':')?;
    let bare = rest.trim_start_matches('/');
    if bare.is_empty() || !super::is_scheme(scheme) {
        return None;
    }
    let scheme = scheme.to_ascii_lowercase();
    let exact = TRANSPORTS.iter().find(|(_, words)| words.contains(&&*scheme));
    let near = || {
        let distance = |word: &str| strsim::damerau_levenshtein(&scheme, word);
        let candidates = TRANSPORTS.iter().filter_map(|entry| {
            let own = entry.1.first()?;
            // A short word is near to everything.
            (scheme.len() > MOST_WRONG + 1).then(|| (distance(own), entry))
        });
        let (distance, entry) = candidates.min_by_key(|(distance, _)| *distance)?;
        (distance <= MOST_WRONG).then_some(entry)
    };
    let (transport, _) = exact.or_else(near)?;
    let meant = match *transport {
        "docker://" => format!("docker://{bare}"),
        // Others write so for a registry.
        "oci:" if rest.starts_with("//") && names_a_host(bare) => format!("docker://{bare}"),
        "oci:" => format!("oci:{}", rest.strip_prefix("//").unwrap_or(rest)),
        "file://" => rest.strip_prefix("//").unwrap_or(rest).to_owned(),
        // A word without a dot or a slash is a file whose name has a colon in it.
        http if bare.contains(['.', '/']) || names_a_host(bare) => format!("{http}{bare}"),
        _ => return None,
    };
    let is_image = ImageName::is_meant(&meant);
    if is_image && ImageName::parse(&meant).is_err() {
        return None;
    }
    let meant = without_secrets(&meant);
    (meant != text).then_some(meant)
}

/// An image in a registry that was named without its transport.
#[must_use]
pub fn image_meant(path: &Path) -> Option<String> {
    let name = path.to_str().filter(|name| !name.starts_with(['/', '.', '~']))?;
    let last = name.rsplit('/').next().unwrap_or(name);
    let named = last.contains([':', '@']) || names_a_host(name);
    let meant = format!("docker://{name}");
    (named && ImageName::parse(&meant).is_ok()).then_some(meant)
}

fn names_a_host(name: &str) -> bool {
    name.split_once('/').is_some_and(|(host, _)| is_host(host))
}

fn is_host(word: &str) -> bool {
    word.contains(['.', ':']) || word == "localhost"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_nearly_right() {
        for (text, right) in [
            (
                "docker:127.0.0.1:5000/team/app:1",
                Some("docker://127.0.0.1:5000/team/app:1"),
            ),
            ("docker:alpine", Some("docker://alpine")),
            ("docker:/host/x", Some("docker://host/x")),
            ("Docker://host/x", Some("docker://host/x")),
            ("dokcer://host/x", Some("docker://host/x")),
            ("registry://host:5000/x", Some("docker://host:5000/x")),
            ("docker-image://host/x:y", Some("docker://host/x:y")),
            ("oci://dir:tag", Some("oci:dir:tag")),
            ("oci:///abs/dir", Some("oci:/abs/dir")),
            ("oci://ghcr.io/team/app:1", Some("docker://ghcr.io/team/app:1")),
            ("OCI:dir", Some("oci:dir")),
            ("oci-layout:dir", Some("oci:dir")),
            ("http:/example.org/a.tar", Some("http://example.org/a.tar")),
            ("https:example.org/a.tar", Some("https://example.org/a.tar")),
            ("htpps://example.org/a.tar", Some("https://example.org/a.tar")),
            (
                "hhtp://me:secret@example.org/a.tar?secret",
                Some("http://example.org/a.tar?…"),
            ),
            ("file:a.tar", Some("a.tar")),
            ("file:/a.tar", Some("/a.tar")),
            (
                "s3://bucket.example.org/a.tar",
                Some("https://bucket.example.org/a.tar"),
            ),
            // Files whose names have a colon in them, and what is like nothing.
            ("a:b", None),
            ("dir/docker:x", None),
            ("backup:monday", None),
            ("docker://UPPER CASE", None),
            ("docker:", None),
            ("gopher://example.org/x", None),
        ] {
            assert_eq!(meant(text).as_deref(), right, "{text}");
        }
    }

    #[test]
    fn what_is_right_is_not_corrected() {
        for text in [
            "docker://host/x",
            "oci:dir:tag",
            "http://host/x",
            "https://host/x",
            "file:///x",
        ] {
            assert!(meant(text).is_none_or(|meant| meant != text), "{text}");
        }
    }
}
