//! Access control lists: tars hold what the system call takes (version 2), ext4 stores its own form (version 1), in which
//! only named users and groups have an id.

const SYSTEM_CALL_VERSION: u32 = 2;
const STORED_VERSION: u32 = 1;
const NAMED_USER: u16 = 0x02;
const NAMED_GROUP: u16 = 0x08;
const TAGS: [u16; 6] = [0x01, NAMED_USER, 0x04, NAMED_GROUP, 0x10, 0x20];

/// The stored form of `value`; `None` for one without entries, which means no list, and for what is no list: the tree lets
/// no such ones through.
pub(super) fn stored(value: &[u8]) -> Option<Vec<u8>> {
    let (version, entries) = value.split_first_chunk::<4>()?;
    if u32::from_le_bytes(*version) != SYSTEM_CALL_VERSION || !entries.len().is_multiple_of(8) {
        return None;
    }
    let mut stored = STORED_VERSION.to_le_bytes().to_vec();
    for entry in entries.chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        if !TAGS.contains(&tag) {
            return None;
        }
        let is_named = tag == NAMED_USER || tag == NAMED_GROUP;
        stored.extend_from_slice(if is_named { entry } else { &entry[..4] });
    }
    (!entries.is_empty()).then_some(stored)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_stay_only_where_they_mean_something() {
        let list = [
            2, 0, 0, 0, 1, 0, 6, 0, 255, 255, 255, 255, 2, 0, 7, 0, 0xe8, 3, 0, 0, 0x20, 0, 4, 0, 255, 255, 255, 255,
        ];
        let converted = [1, 0, 0, 0, 1, 0, 6, 0, 2, 0, 7, 0, 0xe8, 3, 0, 0, 0x20, 0, 4, 0];
        assert_eq!(stored(&list), Some(converted.to_vec()));
        assert_eq!(stored(&list[..4]), None);
        assert_eq!(stored(&list[..27]), None);
        assert_eq!(stored(&[3, 0, 0, 0]), None);
        assert_eq!(stored(&[2, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]), None);
        assert_eq!(stored(b""), None);
    }
}
