//! On whose word a layer is what it is shown as. In: how its index came to be believed, and what its bytes are compared with. Out: the
//! same for programs (JSON) and in a few words for people (`tarblk ps`), and whether the layer's headers are read again once all of
//! it is here.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::digest::hexadecimal;

/// On whose word a layer is what it is shown as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerTrust {
    /// Why its index is believed: names, modes, owners, and which bytes are which file's.
    pub index: IndexTrust,
    /// What its bytes are compared with.
    pub bytes: BytesTrust,
}

/// Why a layer's index is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "by", rename_all = "kebab-case")]
pub enum IndexTrust {
    /// It was made here from all of the layer, or from the headers of a file of this machine.
    Made,
    /// It was made here from headers, or from a table of contents, as a server sent them.
    Headers,
    /// The image's manifest names its digest, or that of the table of contents that it is made of.
    Manifest,
    /// It is signed by a key that is trusted here.
    Key {
        /// Which key.
        key: KeyId,
    },
    /// It has the digest that was asked for (`--index-digest`).
    Pin,
    /// It was named (`--index`).
    Given,
    /// It lay beside the image, and whoever may write there is believed (`--trust registry`).
    Registry,
}

/// What a layer's bytes are compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BytesTrust {
    /// Each chunk with its digest in the index before it is read; all of them with the layer's digest at the end.
    EachChunk,
    /// All of them with the layer's digest once they are here; until then with nothing.
    Whole,
    /// With nothing: the layer is a file of this machine, read as it is.
    File,
    /// With nothing: there is no digest.
    Unchecked,
}

/// A public key: SHA-256 of its `SubjectPublicKeyInfo` in DER.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Deserialize)]
#[serde(try_from = "String")]
pub struct KeyId(pub [u8; 32]);

impl KeyId {
    /// So many hexadecimal digits tell keys apart for people.
    const SHOWN: usize = 16;

    /// All 64 hexadecimal digits.
    #[must_use]
    pub fn hex(self) -> String {
        hexadecimal(&self.0)
    }
}

impl fmt::Display for KeyId {
    /// The first digits of it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = self.hex();
        f.write_str(all.get(..Self::SHOWN).unwrap_or(&all))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

impl Serialize for KeyId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.hex())
    }
}

impl TryFrom<String> for KeyId {
    type Error = &'static str;

    /// All 64 hexadecimal digits, small ones.
    fn try_from(text: String) -> Result<Self, Self::Error> {
        const WRONG: &str = "a key is named by 64 hexadecimal digits";
        if text.len() != 64 || !text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(WRONG);
        }
        let mut id = [0; 32];
        for (byte, at) in id.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| WRONG)?;
        }
        Ok(Self(id))
    }
}

impl IndexTrust {
    /// Whether nothing but the word of a server, or of who named it, says that the index is the layer's: then the layer's headers
    /// are read again when all of it is here, and compared with it.
    #[must_use]
    pub const fn is_to_be_compared(self) -> bool {
        match self {
            Self::Headers | Self::Given | Self::Registry => true,
            Self::Made | Self::Manifest | Self::Key { .. } | Self::Pin => false,
        }
    }
}

impl fmt::Display for IndexTrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Made => f.write_str("made here"),
            Self::Headers => f.write_str("headers"),
            Self::Manifest => f.write_str("manifest"),
            Self::Key { key } => write!(f, "key {key}"),
            Self::Pin => f.write_str("pinned"),
            Self::Given => f.write_str("named"),
            Self::Registry => f.write_str("registry"),
        }
    }
}

/// On whose word the layers of one device are what they are shown as: each word once, in the layers' order; then what nothing is
/// compared with, if there is such.
#[must_use]
pub fn in_short(layers: &[LayerTrust]) -> String {
    let mut words: Vec<String> = Vec::new();
    let mut say = |word: String| {
        if !words.contains(&word) {
            words.push(word);
        }
    };
    for layer in layers {
        say(layer.index.to_string());
    }
    if layers.iter().any(|layer| layer.bytes == BytesTrust::Unchecked) {
        say("unchecked".to_owned());
    } else if layers.iter().any(|layer| layer.bytes == BytesTrust::Whole) {
        say("unchecked until whole".to_owned());
    }
    words.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_come_once_and_what_is_unchecked_last() {
        let layer = |index, bytes| LayerTrust { index, bytes };
        let manifest = layer(IndexTrust::Manifest, BytesTrust::EachChunk);
        let headers = layer(IndexTrust::Headers, BytesTrust::Whole);
        assert_eq!(in_short(&[]), "");
        assert_eq!(in_short(&[manifest; 3]), "manifest");
        assert_eq!(
            in_short(&[headers, manifest, headers]),
            "headers, manifest, unchecked until whole"
        );
        let unchecked = layer(IndexTrust::Headers, BytesTrust::Unchecked);
        assert_eq!(in_short(&[unchecked]), "headers, unchecked");
    }

    #[test]
    fn json_comes_back() {
        let key = KeyId([0xab; 32]);
        let trust = LayerTrust {
            index: IndexTrust::Key { key },
            bytes: BytesTrust::EachChunk,
        };
        let json = serde_json::to_string(&trust).unwrap();
        let hex = "ab".repeat(32);
        assert_eq!(
            json,
            format!(r#"{{"index":{{"by":"key","key":"{hex}"}},"bytes":"each-chunk"}}"#)
        );
        assert_eq!(serde_json::from_str::<LayerTrust>(&json).unwrap(), trust);
        for wrong in [&hex[1..], &hex.to_uppercase(), &format!("{hex}0"), "é"] {
            assert!(KeyId::try_from((*wrong).to_owned()).is_err(), "{wrong}");
        }
    }
}
