//! Which layer an index was made from.

use super::error::IndexFault;
use super::varint::{self, Cursor};
use super::{format, len_u64};
use crate::digest::Digest;
use crate::layer::Coding;

/// The layer that an index was made from, as far as its maker knew it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerIdentity {
    /// How the blob holds the tar.
    pub coding: Coding,
    /// The blob's length in bytes; the tar's own when it is plain.
    pub blob_len: u64,
    /// The blob's digest. Unknown when only headers were read and no manifest named it.
    pub blob_digest: Option<Digest>,
    /// The tar's digest, which image configurations call diff ID. Unknown like the blob's.
    pub diff_id: Option<Digest>,
    /// The distance of entry points into a compressed blob that was aimed at, in bytes of the tar; 0 when there are none.
    pub spacing: u64,
}

impl Default for LayerIdentity {
    /// A plain layer of which nothing is known.
    fn default() -> Self {
        Self {
            coding: Coding::Plain,
            blob_len: 0,
            blob_digest: None,
            diff_id: None,
            spacing: 0,
        }
    }
}

impl LayerIdentity {
    /// The section of an index.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        varint::put(&mut out, self.coding.number().into());
        varint::put(&mut out, self.blob_len);
        for digest in [&self.blob_digest, &self.diff_id] {
            let text = digest.as_ref().map(ToString::to_string).unwrap_or_default();
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
        let coding = cursor.number().ok().and_then(|number| u8::try_from(number).ok());
        let coding = coding.and_then(Coding::from_number).ok_or(fault)?;
        let blob_len = cursor.number().map_err(|_| fault)?;
        let mut digest = || {
            let len = cursor.number().ok().filter(|len| *len <= format::MAX_TEXT)?;
            let text = std::str::from_utf8(cursor.bytes(len).ok()?).ok()?;
            if text.is_empty() {
                return Some(None);
            }
            // What else may stand there would end up in messages and names.
            text.parse().ok().map(Some)
        };
        let (blob_digest, diff_id) = (digest().ok_or(fault)?, digest().ok_or(fault)?);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::hexadecimal;

    fn sha256(digest: &[u8; 32]) -> Option<Digest> {
        format!("sha256:{}", hexadecimal(digest)).parse().ok()
    }

    #[test]
    fn an_identity_comes_back() {
        let all = LayerIdentity {
            coding: Coding::Gzip,
            blob_len: 1 << 40,
            blob_digest: sha256(&[7; 32]),
            diff_id: sha256(&[8; 32]),
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
        for text in [
            "sha256",
            "sha256:",
            "sha256:a b",
            "md5:d41d8cd98f00b204e9800998ecf8427e",
            "\n",
        ] {
            let mut section = vec![0, 0, u8::try_from(text.len()).unwrap()];
            section.extend_from_slice(text.as_bytes());
            section.extend([0, 0]);
            assert!(LayerIdentity::decode(&section).is_err(), "{text}");
        }
        assert!(LayerIdentity::decode(&[3, 0, 0, 0, 0]).is_err());
    }
}
