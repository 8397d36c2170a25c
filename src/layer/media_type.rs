//! Media types of layers: OCI's, Docker's, and those that say nothing. In: what a manifest's descriptor says. Out: a
//! [`LayerType`], or why that is no layer of files.
//!
//! A media type is only a claim: builders and mirrors get the compression wrong, and container runtimes go by the blob's first
//! bytes ([`Coding::of_bytes`]). So does this program; the claim decides in which way a layer is read first.

use super::Coding;

/// What a layer's media type says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LayerType {
    /// How the blob is said to be compressed; none where nothing is said.
    pub coding: Option<Coding>,
    /// Whether registries need not hold it ("nondistributable" at OCI, "foreign" at Docker): its descriptor then says by URLs who
    /// does. The types are deprecated since image specification 1.1, and restrict pushing alone.
    pub foreign: bool,
}

/// The types of layers without what they say of compression, and whether they are foreign.
const BASES: [(&str, bool); 5] = [
    ("application/vnd.oci.image.layer.v1.tar", false),
    ("application/vnd.oci.image.layer.nondistributable.v1.tar", true),
    ("application/vnd.docker.image.rootfs.diff.tar", false),
    ("application/vnd.docker.image.rootfs.foreign.diff.tar", true),
    ("application/vnd.docker.container.image.rootfs.diff", false),
];

/// What servers and builders that do not know what they have call anything.
const ANYTHING: [&str; 9] = [
    "",
    "application/octet-stream",
    "binary/octet-stream",
    "application/x-tar",
    "application/tar",
    "application/gzip",
    "application/x-gzip",
    "application/tar+gzip",
    "application/zstd",
];

impl Coding {
    /// What a layer's media type says, if it says something ([`LayerType`]). What the blob is its first bytes tell.
    #[must_use]
    pub fn of_media_type(media_type: &str) -> Option<Self> {
        LayerType::parse(media_type).ok()?.coding
    }
}

impl LayerType {
    /// Reads a media type. Parameters and case do not count.
    ///
    /// # Errors
    /// What else it is, in words that fit behind "layer N ".
    pub fn parse(media_type: &str) -> Result<Self, String> {
        let essence = media_type.split(';').next().unwrap_or_default().trim();
        let essence = essence.to_ascii_lowercase();
        if ANYTHING.contains(&essence.as_str()) {
            return Ok(Self {
                coding: None,
                foreign: false,
            });
        }
        for (base, foreign) in BASES {
            if let Some(coding) = essence.strip_prefix(base).and_then(Coding::of_ending) {
                return Ok(Self {
                    coding: Some(coding),
                    foreign,
                });
            }
        }
        if essence.ends_with("+encrypted") {
            return Err(format!("is encrypted ({essence}); decrypt the image first"));
        }
        // A stranger's text, in one line of ours.
        let shown: String = essence.chars().take(200).collect();
        Err(format!(
            "is of type {shown:?}, which is not a tar layer; plain, gzip and zstd ones can be read"
        ))
    }
}
