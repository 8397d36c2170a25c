//! Indexes that a person names. In: a path or URL, and perhaps the digest that the index has to have. Out: the index, opened.

use std::fs::File;
use std::io::{self, Read};

use super::discover::{self, IndexChoice};
use super::{MAX_INDEX_BYTES, OpenError, OpenOptions};
use crate::fetch::IndexTrust;
use crate::http::{HttpOptions, without_secrets};
use crate::index::{Index, IndexFault, hot_len};
use crate::source::{self, Blob, Source};
use crate::units::{len_u64, len_usize};

/// So many bytes of an index on a server are asked for at once: all of most of them, because histories that come along cost less than those
/// that are waited for later, and the hot part of longer ones.
const FIRST_BYTES: u64 = 1536 << 10;

/// The bytes of the index file `name`, which was given where one of the words of [`IndexChoice`] could have been.
///
/// # Errors
/// [`OpenError::NoSuchIndex`], which names the words; else as [`load_index`].
pub(super) fn bytes_of_named(name: &str, http: &HttpOptions) -> Result<Vec<u8>, OpenError> {
    load_index(name, http).map_err(or_no_such)
}

/// As [`bytes_of_named`], but of an index on a server only the hot part if it has another one, and then where that is.
///
/// # Errors
/// As [`bytes_of_named`].
pub(super) fn hot_of_named(name: &str, http: &HttpOptions) -> Result<(Vec<u8>, Option<Blob>), OpenError> {
    let Source::Url(url) = Source::parse(name)? else {
        return Ok((bytes_of_named(name, http)?, None));
    };
    let (blob, mut bytes) = source::probe_with_beginning(&url, FIRST_BYTES, MAX_INDEX_BYTES, http)?;
    let here = len_u64(bytes.len());
    if here == blob.len {
        return Ok((bytes, None));
    }
    // What is no index is told by who opens it.
    let hot = hot_len(&bytes).ok().flatten().unwrap_or(here).min(blob.len);
    if hot > here {
        bytes.extend(source::read_range(&blob, here..hot, http)?);
    }
    bytes.truncate(len_usize(hot));
    Ok((bytes, Some(blob)))
}

/// A file that is not there was perhaps meant to be a word.
fn or_no_such(error: OpenError) -> OpenError {
    match error {
        OpenError::ReadIndex { name, cause } if cause.kind() == io::ErrorKind::NotFound => OpenError::NoSuchIndex {
            words: IndexChoice::WORDS.join(", "),
            meant: IndexChoice::nearest_word(&name)
                .map(|word| format!("; did you mean {word}?"))
                .unwrap_or_default(),
            name,
        },
        other => other,
    }
}

/// Reads and opens the index `name`, and checks that it is the one that was pinned.
///
/// # Errors
/// As [`bytes_of_named`], [`open_index`] and [`pinned`].
pub(super) fn named_index(name: &str, options: &OpenOptions) -> Result<Index<Vec<u8>>, OpenError> {
    pinned(open_index(bytes_of_named(name, &options.http)?, name)?, name, options)
}

/// The same index, if it is of a whole tar and the one whose digest was given, if one was.
///
/// # Errors
/// [`OpenError::Index`] for one that was made of a table of contents; [`OpenError::Digest`].
pub(super) fn pinned(index: Index<Vec<u8>>, name: &str, options: &OpenOptions) -> Result<Index<Vec<u8>>, OpenError> {
    if index.is_of_contents() {
        return Err(OpenError::Index {
            name: without_secrets(name),
            cause: IndexFault::MadeUp.into(),
        });
    }
    check_pin(&index, name, options).map(|()| index)
}

/// Compares an index with the digest that was given, if one was (`--index-digest`).
///
/// # Errors
/// [`OpenError::Digest`] when it is another index.
pub(super) fn check_pin(index: &Index<Vec<u8>>, name: &str, options: &OpenOptions) -> Result<(), OpenError> {
    match &options.index_digest {
        Some(pin) if !discover::is_pinned(index, pin) => Err(OpenError::Digest {
            source_name: without_secrets(name),
            what: "index",
            expected: pin.to_string(),
            found: discover::hot_digest(index).to_string(),
        }),
        _ => Ok(()),
    }
}

/// Why an index is believed that was named: it has the digest that was asked for, or else because it was named.
pub(super) fn named_trust(options: &OpenOptions) -> IndexTrust {
    if options.index_digest.is_some() {
        IndexTrust::Pin
    } else {
        IndexTrust::Given
    }
}

/// Reads an index file, whole, from a path or a URL.
///
/// # Errors
/// [`OpenError::ReadIndex`], [`OpenError::Source`].
pub fn load_index(name: &str, http: &HttpOptions) -> Result<Vec<u8>, OpenError> {
    let failed = |cause| OpenError::ReadIndex {
        name: without_secrets(name),
        cause,
    };
    match Source::parse(name)? {
        Source::Path(path) => {
            // Asked before opening: a pipe would be waited for.
            if !std::fs::metadata(&path).map_err(failed)?.is_file() {
                return Err(failed(io::Error::other("it is not a regular file")));
            }
            let file = File::open(&path).map_err(failed)?;
            let mut bytes = Vec::new();
            file.take(MAX_INDEX_BYTES).read_to_end(&mut bytes).map_err(failed)?;
            Ok(bytes)
        }
        Source::Url(url) => Ok(source::get_whole(&url, MAX_INDEX_BYTES, http)?),
        Source::Image(_) => Err(failed(io::Error::other("it is an image, not an index"))),
    }
}

/// Opens the bytes of an index file, or of its hot part alone. `name` is for messages.
///
/// # Errors
/// [`OpenError::Index`] when they are damaged.
pub(super) fn open_index(bytes: Vec<u8>, name: &str) -> Result<Index<Vec<u8>>, OpenError> {
    let is_hot = hot_len(&bytes).is_ok_and(|hot| hot == u64::try_from(bytes.len()).ok());
    let opened = if is_hot {
        Index::open_hot(bytes)
    } else {
        Index::open(bytes)
    };
    opened.map_err(|cause| OpenError::Index {
        name: without_secrets(name),
        cause,
    })
}
