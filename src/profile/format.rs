//! A profile as a file. In: a [`Profile`]. Out: its bytes, and back. docs/profile-format.md has it in words.
//!
//! Invariant: what is parsed is no longer than [`MAX_PROFILE_BYTES`], and makes no more layers, entries and chunks than a profile has;
//! nothing is allocated by its say-so.

use super::ProfileKey;
use super::model::{MOST_CHUNKS, MOST_ENTRIES, MOST_LAYERS, Profile, ProfileEntry, ProfiledLayer, in_order};
use crate::checksum::crc32c;
use crate::index::varint::{self, Cursor};
use crate::prefetch::ChunkRange;
use crate::units::{CHUNK_BYTES, LayerId, len_u64};

/// Begins every profile.
const MAGIC: &[u8; 8] = b"TARBLKPR";
/// The version of the format that is written, and the only one that is read.
const VERSION: u8 = 1;
/// What comes before the part that the checksum is of: magic, version, chunk length, two bytes of zero, checksum.
const HEAD_BYTES: usize = 16;
/// No profile is longer, in bytes.
pub const MAX_PROFILE_BYTES: usize = 64 << 10;

/// Why bytes are no profile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileFault {
    /// They begin otherwise, or are too long to be one.
    #[error("it is no profile")]
    Foreign,
    /// Another version has written it.
    #[error("it is of version {0}, which this tarblk does not know")]
    Version(u8),
    /// It was damaged, or cut short.
    #[error("its checksum is wrong")]
    Checksum,
    /// It makes no sense, though its checksum is right.
    #[error("it makes no sense")]
    Malformed,
}

impl Profile {
    /// As a file. The same profile always makes the same bytes. What does not fit is left out: the unlikely first, then the latest.
    #[must_use]
    pub fn to_bytes(&self, most: usize) -> Vec<u8> {
        let most = most.min(MAX_PROFILE_BYTES);
        let bytes = self.write();
        if bytes.len() <= most || self.entries.is_empty() {
            return bytes;
        }
        let mut less = self.clone();
        let fits = self.entries.len() * most / bytes.len();
        less.limit_to(fits.min(self.entries.len() - 1));
        less.to_bytes(most)
    }

    fn write(&self) -> Vec<u8> {
        let mut body = Vec::new();
        varint::put(&mut body, self.runs.into());
        body.push(self.possible);
        varint::put(&mut body, len_u64(self.layers.len()));
        for layer in &self.layers {
            body.extend_from_slice(&layer.key.0);
            varint::put(&mut body, layer.size);
        }
        varint::put(&mut body, len_u64(self.entries.len()));
        let (mut time, mut ends) = (0, vec![0_u32; self.layers.len()]);
        for entry in &self.entries {
            let ChunkRange { layer, first, end } = entry.chunks;
            varint::put(&mut body, u64::from(entry.at_ms - time));
            time = entry.at_ms;
            varint::put(&mut body, layer.0.into());
            let before = end_of(&mut ends, layer);
            varint::put_signed(&mut body, i64::from(first) - i64::from(*before));
            *before = end;
            varint::put(&mut body, u64::from(end - first - 1));
            body.push(entry.score);
        }
        sealed(&body)
    }

    /// What [`to_bytes`](Self::to_bytes) made.
    ///
    /// # Errors
    /// [`ProfileFault`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ProfileFault> {
        let (head, body) = bytes.split_at_checked(HEAD_BYTES).ok_or(ProfileFault::Foreign)?;
        if !head.starts_with(MAGIC) || bytes.len() > MAX_PROFILE_BYTES {
            return Err(ProfileFault::Foreign);
        }
        if head[8] != VERSION {
            return Err(ProfileFault::Version(head[8]));
        }
        if crc32c(body).to_le_bytes() != head[12..] {
            return Err(ProfileFault::Checksum);
        }
        if head[9] != chunk_bits() || head[10..12] != [0, 0] {
            return Err(ProfileFault::Malformed);
        }
        parse_body(body).ok_or(ProfileFault::Malformed)
    }
}

/// A file with this body.
pub(super) fn sealed(body: &[u8]) -> Vec<u8> {
    let mut file = Vec::with_capacity(HEAD_BYTES + body.len());
    file.extend_from_slice(MAGIC);
    file.extend_from_slice(&[VERSION, chunk_bits(), 0, 0]);
    file.extend_from_slice(&crc32c(body).to_le_bytes());
    file.extend_from_slice(body);
    file
}

/// The chunk length as a power of two.
fn chunk_bits() -> u8 {
    u8::try_from(CHUNK_BYTES.ilog2()).unwrap_or(u8::MAX)
}

fn end_of(ends: &mut [u32], LayerId(layer): LayerId) -> &mut u32 {
    let at = usize::try_from(layer).unwrap_or(usize::MAX);
    debug_assert!(at < ends.len(), "an entry's layer is one of the profile's");
    &mut ends[at]
}

fn parse_body(body: &[u8]) -> Option<Profile> {
    let mut rest = Cursor::new(body);
    let runs = u32::try_from(rest.number().ok()?).ok()?;
    let possible = rest.byte().ok()?;
    let count = rest.number().ok()?;
    if count > len_u64(MOST_LAYERS) {
        return None;
    }
    let mut layers = Vec::new();
    for _ in 0..count {
        let key = ProfileKey(rest.bytes(32).ok()?.try_into().ok()?);
        let size = rest.number().ok()?;
        layers.push(ProfiledLayer { key, size });
    }
    let count = rest.number().ok()?;
    if count > len_u64(MOST_ENTRIES) {
        return None;
    }
    let (mut time, mut ends) = (0_u32, vec![0_u32; layers.len()]);
    let mut entries = Vec::new();
    for _ in 0..count {
        time = time.checked_add(u32::try_from(rest.number().ok()?).ok()?)?;
        let layer = u32::try_from(rest.number().ok()?).ok()?;
        let before = ends.get_mut(usize::try_from(layer).ok()?)?;
        let first = i64::from(*before).checked_add(rest.signed().ok()?)?;
        let first = u32::try_from(first).ok()?;
        let more = u32::try_from(rest.number().ok()?).ok()?;
        let end = first.checked_add(more)?.checked_add(1)?;
        *before = end;
        entries.push(ProfileEntry {
            at_ms: time,
            chunks: ChunkRange {
                layer: LayerId(layer),
                first,
                end,
            },
            score: rest.byte().ok()?,
        });
    }
    let is_canonical = rest.remaining() == 0 && entries.is_sorted_by_key(in_order);
    let profile = Profile {
        layers,
        runs,
        possible,
        entries,
    };
    (is_canonical && profile.chunks() <= MOST_CHUNKS).then_some(profile)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::profile::model::tests::any_profile;

    proptest! {
        #[test]
        fn a_profile_comes_back(profile in any_profile()) {
            let bytes = profile.to_bytes(MAX_PROFILE_BYTES);
            prop_assert_eq!(Profile::parse(&bytes).unwrap(), profile);
        }

        #[test]
        fn what_does_not_fit_is_left_out(profile in any_profile(), most in 100_usize..3000) {
            let bytes = profile.to_bytes(most);
            let less = Profile::parse(&bytes).unwrap();
            prop_assert!(bytes.len() <= most || less.entries.is_empty());
            prop_assert!(less.entries.iter().all(|entry| profile.entries.contains(entry)));
            let least = less.entries.iter().map(|entry| entry.score).min().unwrap_or(0);
            let lost = profile.entries.iter().filter(|entry| !less.entries.contains(entry));
            prop_assert!(lost.map(|entry| entry.score).all(|score| less.entries.is_empty() || score <= least));
        }

        #[test]
        fn any_damage_is_noticed(profile in any_profile(), at in any::<prop::sample::Index>(), flip in 1_u8..) {
            let mut bytes = profile.to_bytes(MAX_PROFILE_BYTES);
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(Profile::parse(&bytes).is_err());
            bytes[at] ^= flip;
            prop_assert!(Profile::parse(&bytes[..at]).is_err());
        }

        #[test]
        fn anything_with_a_right_checksum_is_bounded(body in prop::collection::vec(any::<u8>(), 0..400)) {
            if let Ok(profile) = Profile::parse(&sealed(&body)) {
                prop_assert!(profile.entries.len() <= body.len() && profile.chunks() <= MOST_CHUNKS);
                let again = profile.to_bytes(MAX_PROFILE_BYTES);
                prop_assert_eq!(Profile::parse(&again).unwrap(), profile);
            }
        }
    }

    /// The body of a profile of one layer of 2^30 bytes, with these varints behind the number of entries.
    fn body(entries: u64, numbers: &[u64]) -> Vec<u8> {
        let mut body = vec![1, 64, 1];
        body.extend([7; 32]);
        varint::put(&mut body, 1 << 30);
        varint::put(&mut body, entries);
        for number in numbers {
            varint::put(&mut body, *number);
        }
        body
    }

    #[test]
    fn hostile_numbers_are_refused() {
        let good = Profile::parse(&sealed(&body(1, &[5, 0, 4, 2, 64]))).unwrap();
        assert_eq!((good.entries[0].chunks.first, good.entries[0].chunks.end), (2, 5));
        for (what, body) in [
            ("an entry of no layer", body(1, &[5, 1, 4, 2, 64])),
            ("before the layer", body(1, &[5, 0, 3, 2, 64])),
            (
                "longer than chunks are counted",
                body(1, &[5, 0, 4, u64::from(u32::MAX), 64]),
            ),
            ("more than a profile has", body(1, &[5, 0, 4, MOST_CHUNKS, 64])),
            ("a number over 64 bits", body(1, &[5, 0, u64::MAX, 2, 64])),
            (
                "time that passes its end",
                body(2, &[u64::from(u32::MAX), 0, 4, 2, 64, 1, 0, 0, 0, 64]),
            ),
            ("fewer entries than it says", body(2, &[5, 0, 4, 2, 64])),
            ("more than it says", body(1, &[5, 0, 4, 2, 64, 0])),
            ("more than are read", body(u64::MAX, &[5, 0, 4, 2, 64])),
            ("the later place first", body(2, &[5, 0, 4, 2, 64, 0, 0, 9, 0, 64])),
            ("more layers than there are", vec![1, 64, 255, 255, 255, 255, 15]),
            ("nothing", Vec::new()),
        ] {
            assert_eq!(Profile::parse(&sealed(&body)), Err(ProfileFault::Malformed), "{what}");
        }
        let long = vec![0; MAX_PROFILE_BYTES];
        assert_eq!(Profile::parse(&sealed(&long)), Err(ProfileFault::Foreign));
        assert_eq!(Profile::parse(b"TARBLKPR"), Err(ProfileFault::Foreign));
        let mut newer = sealed(&body(0, &[]));
        newer[8] = 2;
        assert_eq!(Profile::parse(&newer), Err(ProfileFault::Version(2)));
    }
}
