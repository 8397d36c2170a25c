//! Where a layer is. In: what a person typed: a path, `file://`, `http(s)://`, or an image's name. Out: a [`Blob`]: how
//! long the layer is, how to tell that it is still the same, and its bytes, all of them or ranges. Images have several layers:
//! [`registry::resolve`] finds them, [`layer_blob`] tells where one is.
//!
//! This room must never keep a secret in anything that is printed: passwords and query strings (signatures live there) are
//! left out of every message and every `Debug`. It waits for nothing without a deadline.
//!
//! Parts: `blob` (what was found), `request` and `stream` (its bytes), `meant` (what an unusable name may have meant), `registry`.

mod blob;
mod error;
mod lanes;
mod layer_spec;
mod meant;
pub mod registry;
mod request;
mod stream;

use std::fmt;
use std::path::{Path, PathBuf};

use registry::{BlobPlace, ImageLayer, ImageName};
use url::Url;

pub use blob::{Blob, BlobSink, LocalFile, Place, UrlBlob};
pub use error::SourceError;
pub(crate) use error::wait_after;
pub use layer_spec::LayerSpec;
pub use meant::image_meant;
pub(crate) use request::Requests;
pub use request::{get_whole, has_ranges, probe, probe_with_beginning, server_clock};
pub use stream::{first_bytes, read_range, stream, stream_from};

use crate::http::{HttpOptions, shown_url, without_secrets};

/// What a person named as a layer.
#[derive(Clone, PartialEq, Eq)]
pub enum Source {
    /// A file on this machine.
    Path(PathBuf),
    /// A file on a web server, `http` or `https`.
    Url(Url),
    /// An image in a registry or a layout, `docker://` or `oci:`.
    Image(ImageName),
}

impl Source {
    /// Understands what a person typed: a URL where there is `scheme://` in front, else a path.
    ///
    /// # Errors
    /// [`SourceError::Unusable`] for other schemes and URLs that are none.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let unusable = |why: String| SourceError::Unusable {
            source_name: without_secrets(text),
            why,
        };
        if ImageName::is_meant(text) {
            if text.starts_with("oci://")
                && let Ok(ImageName::Layout(layout)) = ImageName::parse(text)
                && !layout.dir.exists()
                && let Some(meant) = meant::meant(text)
            {
                return Err(unusable(format!("there is no such directory; did you mean {meant}?")));
            }
            return ImageName::parse(text).map(Self::Image).map_err(unusable);
        }
        let Some((scheme, _)) = text.split_once("://").filter(|(scheme, _)| is_scheme(scheme)) else {
            return match text.split_once(':') {
                _ if text.is_empty() => Err(unusable("the name is empty".to_owned())),
                Some(("docker-archive" | "oci-archive" | "docker-daemon" | "containers-storage" | "dir", _))
                    if !Path::new(text).exists() =>
                {
                    Err(unusable(
                        "images are read from docker://host/repository:tag or oci:directory:tag; skopeo copies others there"
                            .to_owned(),
                    ))
                }
                _ => match meant::meant(text).filter(|_| !Path::new(text).exists()) {
                    Some(meant) => Err(unusable(format!("there is no such file; did you mean {meant}?"))),
                    None => Ok(Self::Path(PathBuf::from(text))),
                },
            };
        };
        match scheme.to_ascii_lowercase().as_str() {
            "http" | "https" => {
                let mut url = Url::parse(text).map_err(|error| unusable(format!("not a URL: {error}")))?;
                url.set_fragment(None);
                Ok(Self::Url(url))
            }
            "file" => {
                let url = Url::parse(text).map_err(|error| unusable(format!("not a URL: {error}")))?;
                let path = url
                    .to_file_path()
                    .map_err(|()| unusable("it names no file on this machine".to_owned()))?;
                Ok(Self::Path(path))
            }
            other => Err(unusable(match meant::meant(text) {
                Some(meant) => format!("{other}:// is not supported; did you mean {meant}?"),
                None => {
                    format!("{other}:// is not supported; use a path, file://, http://, https://, docker:// or oci:")
                }
            })),
        }
    }
}

impl fmt::Display for Source {
    /// For messages: without user, password and query.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Url(url) => f.write_str(&shown_url(url)),
            Self::Image(name) => name.fmt(f),
        }
    }
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Source({self})")
    }
}

fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'))
}

/// Finds the layer: opens the file, or asks the server how long it is and whether it answers ranges.
///
/// # Errors
/// [`SourceError`], each naming the source without secrets, the cause and what to do.
pub fn open(source: &Source, options: &HttpOptions) -> Result<Blob, SourceError> {
    match source {
        Source::Path(path) => local_blob(source, path),
        Source::Url(url) => probe(url, options),
        Source::Image(name) => Err(SourceError::Unusable {
            source_name: name.to_string(),
            why: "it is an image of several layers, and one layer is needed here".to_owned(),
        }),
    }
}

/// Where one layer of a resolved image is. The blob is as the registry holds it: compressed, as its first bytes say. No server
/// is asked.
///
/// # Errors
/// [`SourceError::File`] for a layer of a layout that cannot be opened.
pub fn layer_blob(image: &ImageName, layer: &ImageLayer) -> Result<Blob, SourceError> {
    let blob = match &layer.place {
        BlobPlace::File(path) => local_blob(&Source::Image(image.clone()), path)?,
        BlobPlace::Registry(access) => Blob::of_registry(access.clone()),
    };
    Ok(blob.named(image, &layer.descriptor.digest))
}

fn local_blob(source: &Source, path: &Path) -> Result<Blob, SourceError> {
    let failed = |error: std::io::Error| {
        let missing = matches!(source, Source::Path(_)) && error.kind() == std::io::ErrorKind::NotFound;
        match image_meant(path).filter(|_| missing) {
            Some(meant) => SourceError::Unusable {
                source_name: path.display().to_string(),
                why: format!("there is no such file; an image in a registry is {meant}"),
            },
            None => SourceError::File {
                path: path.to_owned(),
                source: error,
            },
        }
    };
    let meta = std::fs::metadata(path).map_err(failed)?;
    if !meta.is_file() {
        let why = if path.join("oci-layout").is_file() {
            "it is a directory of images; name one of them as oci:DIRECTORY:TAG"
        } else if meta.is_dir() {
            "it is a directory; name a tar file"
        } else {
            "it is not a regular file"
        };
        return Err(SourceError::Unusable {
            source_name: path.display().to_string(),
            why: why.to_owned(),
        });
    }
    Blob::of_file(source.to_string(), path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> String {
        Source::parse(text).unwrap().to_string()
    }

    #[test]
    fn images_without_a_scheme_are_pointed_out() {
        let said = |text: &str| {
            let source = Source::parse(text).unwrap();
            open(&source, &HttpOptions::default()).unwrap_err().to_string()
        };
        for name in [
            "debian:12",
            "localhost:5000/x",
            "ghcr.io/team/x",
            "localhost/x",
            "team/x:y",
        ] {
            let meant = format!("docker://{name}");
            assert!(said(name).ends_with(&meant), "{}", said(name));
        }
        for name in ["nothere.tar", "dir/nothere.tar", "./a:b", "/a:b", "a b:c"] {
            assert!(said(name).starts_with("cannot open"), "{}", said(name));
        }
        let dir = tempfile::tempdir().unwrap();
        assert!(said(dir.path().to_str().unwrap()).ends_with("name a tar file"));
        std::fs::write(dir.path().join("oci-layout"), "{}").unwrap();
        assert!(said(dir.path().to_str().unwrap()).contains("oci:DIRECTORY:TAG"));
    }

    #[test]
    fn sources_are_understood() {
        assert_eq!(Source::parse("/a/b.tar").unwrap(), Source::Path("/a/b.tar".into()));
        assert_eq!(Source::parse("b c:d.tar").unwrap(), Source::Path("b c:d.tar".into()));
        assert_eq!(
            Source::parse("file:///a/b%20c.tar").unwrap(),
            Source::Path("/a/b c.tar".into())
        );
        assert!(matches!(Source::parse("HTTP://host/x").unwrap(), Source::Url(_)));
        assert_eq!(shown("docker://alpine"), "docker://docker.io/library/alpine:latest");
        assert_eq!(shown("oci:dir:tag"), "oci:dir:tag");
        for bad in [
            "",
            "ftp://host/x",
            "docker://UPPER",
            "oci:",
            "oci-archive:a.tar",
            "http://",
            "file://host/x",
        ] {
            assert!(matches!(Source::parse(bad), Err(SourceError::Unusable { .. })), "{bad}");
        }
    }

    #[test]
    fn secrets_are_not_shown() {
        assert_eq!(
            shown("https://me:secret@host:8443/a.tar?sig=secret#secret"),
            "https://host:8443/a.tar?…"
        );
        assert_eq!(shown("http://host/a.tar"), "http://host/a.tar");
        for text in [
            "ftp://me:secret@host/x?sig=secret",
            "http://me:secret@:80:x/?secret",
            "http://a:secret@h:99999/",
        ] {
            let error = Source::parse(text).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("secret"), "{error}");
        }
        assert!(!format!("{:?}", Source::parse("http://me:secret@host/").unwrap()).contains("secret"));
    }

    #[test]
    fn odd_files_are_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &Path| open(&Source::Path(path.to_owned()), &HttpOptions::default());
        let message = open(dir.path()).unwrap_err().to_string();
        assert!(message.contains("is a directory"), "{message}");
        let message = open(&dir.path().join("absent")).unwrap_err().to_string();
        assert!(
            message.contains("absent") && message.contains("No such file"),
            "{message}"
        );
        assert!(
            open(Path::new("/dev/zero"))
                .unwrap_err()
                .to_string()
                .contains("not a regular file")
        );
    }
}
