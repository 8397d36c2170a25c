//! Why a layer or an image cannot be opened. In: failures of the rooms before this one. Out: one line for the person, with its cause.

use std::io;
use std::path::PathBuf;

use super::trust::TrustError;
use crate::cache::disk::DiskCacheError;
use crate::fetch;
use crate::http::without_secrets;
use crate::image::ImageError;
use crate::index::{ImageArchiveProbe, Index, IndexError};
use crate::quantity::show_size;
use crate::source::SourceError;
use crate::walk::WalkError;

fn more_than(bytes: u64) -> String {
    format!("more than {}", show_size(bytes))
}

/// What makes an index believed that lies beside an image, in words for messages.
pub(super) const HOW_TO_BELIEVE: &str = "--trust registry believes whoever may write there, --trust-key FILE who signed them, --index-digest \
     DIGEST one of them; `tarblk index push --help` says how to sign them or to name them in the image";

/// Why a layer or an image cannot be opened. Each message is one line that names the layer and says what to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The layer cannot be found or its headers not read.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The tar itself is bad, or its compression, or it holds what no index can.
    #[error("{name}: {source}")]
    Tar {
        /// The layer.
        name: String,
        /// What is wrong.
        source: IndexError,
    },
    /// A layer is longer than layers are, or than a person allows.
    #[error(
        "{name} is too long: {} of it would be read or decoded, from {}; if that is right, --max-layer-size SIZE allows it",
        more_than(*most), show_size(*blob_len)
    )]
    TooLong {
        /// The layer.
        name: String,
        /// The most that is accepted, in bytes of the tar.
        most: u64,
        /// The blob's length in bytes.
        blob_len: u64,
    },
    /// A layer by itself has no bytes, or none when its compression is undone.
    #[error(
        "{name} is empty ({len}): no tar is, whose end alone takes 1,024 bytes; was it written and downloaded to its end?"
    )]
    Empty {
        /// The layer.
        name: String,
        /// Its length of 0 bytes, and where that is.
        len: &'static str,
    },
    /// The index that was named cannot be used.
    #[error("{name}: {cause}")]
    Index {
        /// The index, without secrets.
        name: String,
        /// What is wrong with it.
        #[source]
        cause: IndexError,
    },
    /// The index that was named cannot be read.
    #[error("cannot read index {name}: {cause}")]
    ReadIndex {
        /// The index, without secrets.
        name: String,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// What was named as an index is neither a file nor one of the words.
    #[error("cannot read index {name}: No such file or directory; name a file, a URL, or one of {words}{meant}")]
    NoSuchIndex {
        /// What was named.
        name: String,
        /// The words that mean a choice.
        words: String,
        /// The word that is nearest, with a separator in front, or nothing.
        meant: String,
    },
    /// The index that was named is another layer's.
    #[error("index {name} is of a tar of {expected} bytes, but {source_name} has {found}: it belongs to another layer")]
    OtherLayer {
        /// The index, without secrets.
        name: String,
        /// The length in bytes of the blob that it was made of.
        expected: u64,
        /// The layer.
        source_name: String,
        /// The length of its blob in bytes.
        found: u64,
    },
    /// What was named as a layer is a whole image, packed.
    #[error("{0}")]
    ImageArchive(PackedImage),
    /// The layer holds something that no filesystem image can.
    #[error("{name}: {cause}")]
    Tree {
        /// The layer.
        name: String,
        /// The entry, and what is wrong with it.
        #[source]
        cause: IndexError,
    },
    /// The layer holds something that ext4 cannot.
    #[error("{name}: {cause}")]
    Image {
        /// The layer.
        name: String,
        /// The file, and the limit that it exceeds.
        #[source]
        cause: ImageError,
    },
    /// A layer's bytes are not those that its image means.
    #[error("{source_name}: the {what} of a layer is {found} and has to be {expected}: it was damaged or exchanged")]
    Digest {
        /// The image or layer.
        source_name: String,
        /// Which digest: of the blob, or of the tar in it.
        what: &'static str,
        /// The digest that it has to have.
        expected: String,
        /// The digest of what came.
        found: String,
    },
    /// The image has no such layer.
    #[error("{name} has no layer {wanted}: {has}")]
    NoSuchLayer {
        /// The image.
        name: String,
        /// The number or digest that was asked for.
        wanted: String,
        /// How many it has, in words.
        has: String,
    },
    /// One layer is wanted of an image that has several.
    #[error("{0} has several layers, and an index is of one; choose it with --layer")]
    OneIndex(String),
    /// Published indexes of an image are required, and there are none.
    #[error(
        "{name} has no published indexes, nor tables of contents in all layers that its manifest vouches for; `tarblk index push` makes indexes"
    )]
    NoIndexes {
        /// The image.
        name: String,
    },
    /// Published indexes of an image are required, and nothing vouches for those that are there.
    #[error("{name} has an index beside it that nothing vouches for; {HOW_TO_BELIEVE}")]
    Unbelieved {
        /// The layer or image.
        name: String,
    },
    /// An index cannot be signed.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// A local layer is not what it was when its index was read.
    #[error("{0} changed while it was being attached; try again")]
    Changed(String),
    /// Nothing may be asked, and what the layer holds is not known here.
    #[error("{name}: {what} is not kept here, and its server cannot be reached or is not to be asked")]
    NotKept {
        /// The layer, or the URL.
        name: String,
        /// What is missing, as the subject of the sentence.
        what: &'static str,
    },
    /// The fetcher could not start.
    #[error(transparent)]
    Fetch(#[from] fetch::StartError),
    /// The store of fetched bytes cannot be used.
    #[error(transparent)]
    DiskCache(#[from] DiskCacheError),
    /// Something cannot be kept or read in the cache directory.
    #[error("cache {path}: {cause}; name another one with --cache, or use --no-cache")]
    Cache {
        /// The file or directory in it.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
}

impl OpenError {
    /// Whether another try would bring the same: it is the layer or the image itself that cannot be opened.
    #[must_use]
    pub const fn is_lasting(&self) -> bool {
        matches!(
            self,
            Self::Tar { .. }
                | Self::TooLong { .. }
                | Self::Empty { .. }
                | Self::Index { .. }
                | Self::OtherLayer { .. }
                | Self::ImageArchive(_)
                | Self::Tree { .. }
                | Self::Image { .. }
                | Self::Digest { .. }
        )
    }
}

impl From<WalkError> for OpenError {
    fn from(error: WalkError) -> Self {
        match error {
            WalkError::Source(error) => Self::Source(error),
            WalkError::Tar { name, source } => Self::Tar { name, source },
        }
    }
}

/// A tar that holds an image in place of a layer's files: what `docker save` or `skopeo copy … oci-archive:` writes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackedImage {
    /// The tar, as it was named, without secrets.
    pub(super) name: String,
    /// What skopeo calls such an archive.
    pub(super) transport: &'static str,
}

impl PackedImage {
    /// No archive of an image has more entries: three for each of at most some hundred layers.
    const MOST_ENTRIES: u64 = 10_000;

    /// Whether a tar's index is that of an archive; for commands that show what a tar holds, whatever it is.
    ///
    /// # Errors
    /// When the index cannot be read.
    pub fn find<B: AsRef<[u8]>>(name: &str, index: &Index<B>) -> Result<Option<Self>, IndexError> {
        if index.summary().entries > Self::MOST_ENTRIES {
            return Ok(None);
        }
        let mut probe = ImageArchiveProbe::default();
        index.replay(&mut probe)?;
        Ok(probe.found().map(|archive| Self {
            name: without_secrets(name),
            transport: archive.transport(),
        }))
    }
}

impl std::fmt::Display for PackedImage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, transport } = self;
        // skopeo reads such archives from files alone.
        let (first, file) = match name.rsplit_once('/') {
            Some((_, last)) if name.contains("://") => ("download it and unpack it", last.trim_end_matches("?…")),
            _ => ("unpack it first", name.as_str()),
        };
        write!(
            f,
            "{name} is an image packed into a tar ({transport}), not a layer: {first} with `skopeo copy {transport}:{file} \
             oci:DIR:latest`, then use oci:DIR:latest"
        )
    }
}
