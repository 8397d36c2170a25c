//! Signatures of indexes as they are written down. In: an annotation of a manifest. Out: signatures, there and back; whether they are
//! right says [`trust`](super::trust). docs/index-format.md has it in words.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use crate::fetch::KeyId;

/// No signature of an algorithm that is known here is longer, in bytes.
const LONGEST: usize = 128;
/// So many signatures of one index are looked at.
const MOST: usize = 16;

/// A signature, and whose it says that it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    /// The key that is said to have made it.
    pub key: KeyId,
    /// As the algorithm has it: 64 bytes of Ed25519, or ECDSA's two numbers in DER.
    pub bytes: Vec<u8>,
}

impl Signature {
    /// The signatures of an annotation, in its order; none where it makes no sense.
    #[must_use]
    pub fn parse_all(text: &str) -> Vec<Self> {
        let all: Option<Vec<Self>> = text.split(';').take(MOST + 1).map(Self::parse).collect();
        all.filter(|all| all.len() <= MOST).unwrap_or_default()
    }

    fn parse(text: &str) -> Option<Self> {
        let (key, bytes) = text.split_once(':')?;
        // Base64 is four digits for three bytes.
        if bytes.len() > LONGEST.div_ceil(3) * 4 {
            return None;
        }
        let key = KeyId::try_from(key.to_owned()).ok()?;
        let bytes = STANDARD.decode(bytes).ok()?;
        Some(Self { key, bytes })
    }

    /// The annotation that has these signatures.
    #[must_use]
    pub fn all_to_text(signatures: &[Self]) -> String {
        let words: Vec<String> = signatures.iter().map(ToString::to_string).collect();
        words.join(";")
    }
}

impl fmt::Display for Signature {
    /// `KEY:SIGNATURE`, hexadecimal and base64.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.key.hex(), STANDARD.encode(&self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn annotations_come_back_or_are_none() {
        let one = |n: u8| Signature {
            key: KeyId([n; 32]),
            bytes: vec![n; 64],
        };
        let all = [one(1), one(2)];
        let text = Signature::all_to_text(&all);
        assert_eq!(Signature::parse_all(&text), all);
        assert!(!text.contains([' ', ',']), "{text}: it is one word of a list");
        let many = vec![one(3); MOST + 1];
        for wrong in [
            String::new(),
            ";".to_owned(),
            format!("{text};"),
            text.replace(':', " "),
            text[1..].to_owned(),
            text.to_uppercase(),
            format!("{}=", Signature::all_to_text(&all[..1])),
            Signature::all_to_text(&many),
            Signature::all_to_text(&[Signature {
                key: KeyId([0; 32]),
                bytes: vec![0; LONGEST + 3],
            }]),
        ] {
            assert_eq!(Signature::parse_all(&wrong), [], "{wrong}");
        }
    }
}
