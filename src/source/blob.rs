//! A layer's blob that was found: where its bytes are, how long it is, and how to tell that it is still the same.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use reqwest::header::HeaderValue;
use url::Url;

use super::Source;
use super::error::SourceError;
use super::registry::BlobAccess;
use crate::digest::Digest;
use crate::http::{Validator, shown_url};

/// A layer that was found.
#[derive(Debug)]
pub struct LayerBlob {
    /// What was named.
    pub source: Source,
    /// Its digest, if a manifest tells it.
    pub digest: Option<Digest>,
    /// Its length in bytes.
    pub len: u64,
    /// Where its bytes are.
    pub place: Place,
    /// The file that they are in, if they are in one; absolute.
    pub path: Option<PathBuf>,
}

/// Where a layer's bytes are.
#[derive(Debug)]
pub enum Place {
    /// In a local file, open for reading.
    File(File),
    /// On a web server.
    Http(Box<HttpBlob>),
}

impl LayerBlob {
    /// For messages: what was named, and which of its blobs this is.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.digest {
            Some(digest) => format!("{}, blob {digest}", self.source),
            None => self.source.to_string(),
        }
    }

    /// Tells one state of the layer from another: a server's validator, or for a file its inode, length and times. The time of
    /// change is among them, because anybody can set the time of the content.
    #[must_use]
    pub fn fingerprint(&self) -> Option<String> {
        match &self.place {
            Place::File(file) => {
                let meta = file.metadata().ok()?;
                Some(format!(
                    "file:{}:{}:{}:{}.{:09}:{}.{:09}",
                    meta.dev(),
                    meta.ino(),
                    meta.len(),
                    meta.mtime(),
                    meta.mtime_nsec(),
                    meta.ctime(),
                    meta.ctime_nsec()
                ))
            }
            // What has a digest cannot become something else.
            Place::Http(blob) => match &blob.access {
                Some(access) => Some(access.digest().to_string()),
                None => blob.validator.as_ref().map(ToString::to_string),
            },
        }
    }
}

/// A layer on a web server that was found there.
#[derive(Clone)]
pub struct HttpBlob {
    /// The URL that was named, without user and password.
    pub url: Url,
    /// Where redirects led in the end; may expire, which [`url`](Self::url) does not.
    pub resolved: Url,
    /// `Authorization`, made from the URL's user and password, for the host of [`url`](Self::url) and no other.
    pub authorization: Option<HeaderValue>,
    /// The layer's length in bytes.
    pub len: u64,
    /// Whether the server answers ranges. If not, the layer can only be streamed from its beginning.
    pub ranges: bool,
    /// Tells whether it is still the same, where the server says.
    pub validator: Option<Validator>,
    /// The `Content-Encoding` that the server gave it when it was found.
    pub encoding: Option<String>,
    /// How it is asked for, if it is a blob of a registry: then [`url`](Self::url) is only its name.
    pub access: Option<BlobAccess>,
}

impl fmt::Debug for HttpBlob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpBlob")
            .field("url", &self.name())
            .field("len", &self.len)
            .field("ranges", &self.ranges)
            .field("validator", &self.validator)
            .finish_non_exhaustive()
    }
}

impl HttpBlob {
    /// A blob of a registry. Registries that store blobs answer ranges; whether this one does shows when it is asked, and whoever
    /// asks has to be ready for the whole blob.
    pub(in crate::source) fn of_registry(access: &BlobAccess) -> Result<Self, SourceError> {
        let name = format!("https://{}", access.name());
        let url = Url::parse(&name).map_err(|error| SourceError::Unusable {
            source_name: access.name(),
            why: error.to_string(),
        })?;
        Ok(Self {
            resolved: url.clone(),
            url,
            authorization: None,
            len: access.size(),
            ranges: true,
            validator: None,
            encoding: None,
            access: Some(access.clone()),
        })
    }

    /// The URL for messages.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.access {
            Some(access) => access.name(),
            None => shown_url(&self.url),
        }
    }
}
