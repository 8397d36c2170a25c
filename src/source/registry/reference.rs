//! Names of images, as containers-transports(5) spells them. In: `docker://…` and `oci:…`. Out: where to look, and for what.

use std::fmt;
use std::path::PathBuf;

use crate::digest::Digest;

/// Names of repositories are not longer than this (the distribution specification's grammar as implemented everywhere).
const LONGEST_NAME: usize = 255;
const LONGEST_TAG: usize = 128;

/// An image, wherever it is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ImageName {
    /// `docker://`: in a registry.
    Registry(Reference),
    /// `oci:`: in a directory with the OCI image layout.
    Layout(LayoutName),
}

/// `[host[:port]/]repository[:tag][@digest]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    /// The registry's host as it was named, with its port: `docker.io`, `localhost:5000`.
    pub host: String,
    /// The repository: `library/debian`.
    pub repository: String,
    /// The tag or digest. A digest goes before a tag when both are there.
    pub version: Version,
}

/// Which manifest of a repository.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// Whatever has this tag now.
    Tag(String),
    /// Exactly this one.
    Digest(Digest),
}

/// `oci:dir[:tag|@digest]`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LayoutName {
    /// The directory.
    pub dir: PathBuf,
    /// Which of its manifests; the only one if none.
    pub version: Option<Version>,
}

impl ImageName {
    /// Whether `text` is meant to name an image: by its transport.
    #[must_use]
    pub fn is_meant(text: &str) -> bool {
        ["docker://", "oci:"]
            .iter()
            .any(|transport| text.starts_with(transport))
    }

    /// Understands a name.
    ///
    /// # Errors
    /// What is wrong with it, in words that fit behind "cannot use NAME: ".
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some(rest) = text.strip_prefix("docker://") {
            Reference::parse(rest).map(Self::Registry)
        } else if let Some(rest) = text.strip_prefix("oci:") {
            LayoutName::parse(rest).map(Self::Layout)
        } else {
            Err("images are named docker://host/repository:tag or oci:directory:tag".to_owned())
        }
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Registry(reference) => write!(f, "docker://{reference}"),
            Self::Layout(layout) => write!(f, "oci:{layout}"),
        }
    }
}

impl Reference {
    /// Registry and repository without tag or digest: `docker.io/library/debian`.
    #[must_use]
    pub fn repository_name(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }

    /// Understands what follows `docker://`. A first part with a dot, a colon or an upper-case letter, or `localhost`, is a
    /// host; without one it is Docker Hub, whose official images lie in `library/`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        if text.contains("://") || text.contains(['?', '#']) {
            return Err("what follows docker:// is a name, not a URL: host/repository:tag".to_owned());
        }
        let (rest, digest) = match text.split_once('@') {
            // No digest has a slash or another @ in it; a password may.
            Some((_, digest)) if !digest.contains(':') || digest.contains(['/', '@']) => {
                return Err("credentials do not belong into the name: use --creds or a credentials file".to_owned());
            }
            Some((rest, digest)) => (rest, Some(digest.parse::<Digest>().map_err(|error| error.to_string())?)),
            None => (text, None),
        };
        let (host, rest) = match rest.split_once('/') {
            Some((first, rest)) if is_host(first) => (first, rest),
            _ => ("docker.io", rest),
        };
        let (path, tag) = match rest.rsplit_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (rest, None),
        };
        let host = match host {
            "index.docker.io" | "registry-1.docker.io" => "docker.io",
            host => host,
        };
        let repository = if host == "docker.io" && !path.contains('/') {
            format!("library/{path}")
        } else {
            path.to_owned()
        };
        check_host(host)?;
        check_repository(&repository)?;
        if let Some(tag) = tag {
            check_tag(tag)?;
        }
        let version = match digest {
            Some(digest) => Version::Digest(digest),
            None => Version::Tag(tag.unwrap_or("latest").to_owned()),
        };
        Ok(Self {
            host: host.to_ascii_lowercase(),
            repository,
            version,
        })
    }
}

fn is_host(part: &str) -> bool {
    part == "localhost" || part.contains(['.', ':']) || part.contains(|c: char| c.is_ascii_uppercase())
}

fn check_host(host: &str) -> Result<(), String> {
    // The URL parser knows names, IPv4 and bracketed IPv6 addresses.
    let parsed = url::Url::parse(&format!("https://{host}/")).ok();
    let whole = parsed.is_some_and(|url| {
        url.username().is_empty() && url.password().is_none() && url.path() == "/" && url.has_host()
    });
    let usual = host
        .bytes()
        .all(|c| c.is_ascii_alphanumeric() || b"._-:[]".contains(&c));
    if whole && usual {
        Ok(())
    } else {
        Err(format!("{host:?} is not a registry's host"))
    }
}

/// Path parts of lower-case letters and digits, joined by `.`, `_`, `__` or dashes, separated by slashes.
fn check_repository(name: &str) -> Result<(), String> {
    let plain = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
    let part_is_good = |part: &str| {
        let bytes = part.as_bytes();
        let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else {
            return false;
        };
        plain(*first)
            && plain(*last)
            && part
                .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                .all(|joint| matches!(joint, "" | "." | "_" | "__") || joint.bytes().all(|c| c == b'-'))
    };
    if name.len() <= LONGEST_NAME && name.split('/').all(part_is_good) {
        Ok(())
    } else {
        Err(format!(
            "{name:?} is not a repository: lower-case letters, digits, and . _ - between them"
        ))
    }
}

/// Checks a tag against the distribution specification's grammar.
///
/// # Errors
/// That it is none.
pub(super) fn check_tag(tag: &str) -> Result<(), String> {
    let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
    let good = tag.len() <= LONGEST_TAG
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|c| word(c) || c == b'.' || c == b'-');
    if good {
        Ok(())
    } else {
        Err(format!("{tag:?} is not a tag: at most 128 letters, digits, and . _ -"))
    }
}

impl fmt::Display for Version {
    /// As it stands in a registry's URL.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tag(tag) => f.write_str(tag),
            Self::Digest(digest) => digest.fmt(f),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.version {
            Version::Tag(_) => ':',
            Version::Digest(_) => '@',
        };
        write!(f, "{}/{}{sign}{}", self.host, self.repository, self.version)
    }
}

impl LayoutName {
    fn parse(text: &str) -> Result<Self, String> {
        let (dir, version) = if let Some((dir, digest)) = text.rsplit_once('@')
            && let Ok(digest) = digest.parse()
        {
            (dir, Some(Version::Digest(digest)))
        } else if let Some((dir, tag)) = text.split_once(':') {
            // The first colon, as containers-transports(5) has it: tags in a layout may be whole references.
            if tag.is_empty() || tag.chars().any(char::is_control) {
                return Err("the tag behind the directory is empty".to_owned());
            }
            (dir, Some(Version::Tag(tag.to_owned())))
        } else {
            (text, None)
        };
        if dir.is_empty() {
            return Err("it names no directory: oci:directory:tag".to_owned());
        }
        Ok(Self {
            dir: dir.into(),
            version,
        })
    }
}

impl fmt::Display for LayoutName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.dir.display().fmt(f)?;
        match &self.version {
            Some(Version::Tag(tag)) => write!(f, ":{tag}"),
            Some(Version::Digest(digest)) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn names_are_understood_as_docker_does() {
        for (text, shown) in [
            ("docker://debian", "docker://docker.io/library/debian:latest"),
            ("docker://me/app:1", "docker://docker.io/me/app:1"),
            ("docker://index.docker.io/me/app", "docker://docker.io/me/app:latest"),
            ("docker://localhost/a/b:t", "docker://localhost/a/b:t"),
            ("docker://localhost:5000/a:T_1.x-y", "docker://localhost:5000/a:T_1.x-y"),
            ("docker://[::1]:5000/a", "docker://[::1]:5000/a:latest"),
            (
                "docker://quay.io/a/b__c/d--e.f",
                "docker://quay.io/a/b__c/d--e.f:latest",
            ),
            ("oci:some/dir", "oci:some/dir"),
            ("oci:/dir:tag", "oci:/dir:tag"),
            ("oci:dir:docker.io/library/a:1", "oci:dir:docker.io/library/a:1"),
        ] {
            assert_eq!(ImageName::parse(text).unwrap().to_string(), shown);
        }
        let both = ImageName::parse(&format!("docker://host:1/a:tag@{DIGEST}")).unwrap();
        assert_eq!(both.to_string(), format!("docker://host:1/a@{DIGEST}"));
        let layout = ImageName::parse(&format!("oci:a@b@{DIGEST}")).unwrap();
        assert_eq!(layout.to_string(), format!("oci:a@b@{DIGEST}"));
    }

    #[test]
    fn what_is_no_name_is_refused() {
        for bad in [
            "docker://",
            "docker://host.x/",
            "docker://host.x/UPPER",
            "docker://host.x/a//b",
            "docker://host.x/../b",
            "docker://host.x/a___b",
            "docker://host.x/a-",
            "docker://host.x/a:",
            "docker://host.x/a:-x",
            "docker://host.x/a@sha256:00",
            "docker://user:secret@host.x/a",
            "docker://user:se@secret@host.x:5000/a",
            "docker://user:se@secret:x@host.x/a",
            "docker://https://host.x/a",
            "docker://host.x:port/a",
            "docker://host.x/a?b",
            "oci:",
            "oci::tag",
            "oci:dir:",
            "docker:a",
        ] {
            let error = ImageName::parse(bad).unwrap_err();
            assert!(!error.contains("secret"), "{bad}: {error}");
        }
    }
}
