//! Which layer an index was made from.

use super::error::IndexFault;
use super::varint::{self, Cursor};
use super::{format, len_u64};

/// How a layer's blob holds the tar.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Coding {
    /// As it is.
    #[default]
    Plain,
    /// Compressed with gzip, in one member or many.
    Gzip,
    /// Compressed with zstd, in one frame or many.
    Zstd,
}

impl std::fmt::Display for Coding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Plain => "plain",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}

/// The layer that an index was made from, as far as its maker knew it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerIdentity {
    /// How the blob holds the tar.
    pub coding: Coding,
    /// The blob's length in bytes; the tar's own when it is plain.
    pub blob_len: u64,
    /// The blob's digest (`sha256:…`). Unknown when only headers were read and nobody told it.
    pub blob_digest: Option<String>,
    /// The tar's digest (`sha256:…`), which image configurations call diff ID. Unknown like the blob's.
    pub diff_id: Option<String>,
    /// The distance of entry points into a compressed blob that was aimed at, in bytes of the tar; 0 when there are none.
    pub spacing: u64,
}

impl LayerIdentity {
    /// The section of an index.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        varint::put(
            &mut out,
            match self.coding {
                Coding::Plain => 0,
                Coding::Gzip => 1,
                Coding::Zstd => 2,
            },
        );
        varint::put(&mut out, self.blob_len);
        for text in [&self.blob_digest, &self.diff_id] {
            let text = text.as_deref().unwrap_or_default();
            varint::put(&mut out, len_u64(text.len()));
            out.extend_from_slice(text.as_bytes());
        }
        varint::put(&mut out, self.spacing);
        out
    }

    /// Reads the section; later versions may append to it.
    pub(super) fn decode(section: &[u8]) -> Result<Self, IndexFault> {
        let fault = IndexFault::Malformed("layer section");
        let mut cursor = Cursor::new(section);
        let coding = match cursor.number() {
            Ok(0) => Coding::Plain,
            Ok(1) => Coding::Gzip,
            Ok(2) => Coding::Zstd,
            _ => return Err(fault),
        };
        let blob_len = cursor.number().map_err(|_| fault)?;
        let mut text = || {
            let len = cursor.number().ok().filter(|len| *len <= format::MAX_TEXT)?;
            let text = std::str::from_utf8(cursor.bytes(len).ok()?).ok()?;
            (text.is_empty() || is_digest(text)).then(|| (!text.is_empty()).then(|| text.to_owned()))
        };
        let (blob_digest, diff_id) = (text().ok_or(fault)?, text().ok_or(fault)?);
        let spacing = cursor.number().map_err(|_| fault)?;
        Ok(Self {
            coding,
            blob_len,
            blob_digest,
            diff_id,
            spacing,
        })
    }
}

/// `algorithm:encoded`, as OCI writes digests. What else may stand in a text would end up in messages and names.
fn is_digest(text: &str) -> bool {
    text.split_once(':').is_some_and(|(algorithm, encoded)| {
        let algorithm_char =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'+' | b'.' | b'_' | b'-');
        let encoded_char = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'=' | b'_' | b'-');
        !algorithm.is_empty()
            && !encoded.is_empty()
            && algorithm.bytes().all(algorithm_char)
            && encoded.bytes().all(encoded_char)
    })
}

/// The text of a SHA-256, as OCI writes it.
pub(crate) fn sha256_text(digest: &[u8; 32]) -> String {
    format!("sha256:{}", hexadecimal(digest))
}

/// Bytes as digests are written.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_comes_back() {
        let all = LayerIdentity {
            coding: Coding::Gzip,
            blob_len: 1 << 40,
            blob_digest: Some(sha256_text(&[7; 32])),
            diff_id: Some(sha256_text(&[8; 32])),
            spacing: 2 << 20,
        };
        for identity in [LayerIdentity::default(), all] {
            assert_eq!(LayerIdentity::decode(&identity.encode()), Ok(identity.clone()));
            let longer = [identity.encode(), b"of a later version".to_vec()].concat();
            assert_eq!(LayerIdentity::decode(&longer), Ok(identity.clone()));
            let whole = identity.encode();
            for len in 0..whole.len() {
                assert!(LayerIdentity::decode(&whole[..len]).is_err());
            }
        }
        for text in ["sha256", "sha256:", ":x", "sha256:a b", "sha256:\n", "SHA:x", "a/b:c"] {
            let odd = LayerIdentity {
                diff_id: Some(text.to_owned()),
                ..LayerIdentity::default()
            };
            assert!(LayerIdentity::decode(&odd.encode()).is_err(), "{text}");
        }
        assert!(LayerIdentity::decode(&[3, 0, 0, 0, 0]).is_err());
    }
}
