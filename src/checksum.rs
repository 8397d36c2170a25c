//! CRC-32C (Castagnoli's polynomial, as iSCSI and ext4 have it): what files of this program and of ext4 are checked by where a digest would be
//! too dear. In: bytes. Out: their checksum. Pure.
//!
//! What the disk cache hands out is checked each time by this, so its speed is the cache's.

use crc_fast::{CrcAlgorithm, Digest};

/// The checksum of `bytes`.
pub(crate) fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// The checksum of what has the checksum `sum` with `bytes` behind it.
pub(crate) fn crc32c_append(sum: u32, bytes: &[u8]) -> u32 {
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, u64::from(!sum));
    digest.update(bytes);
    // Checksums of every polynomial come in 64 bits; this one's are the lower half.
    let [a, b, c, d, ..] = digest.finalize().to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_what_another_implementation_says() {
        // From RFC 3720, appendix B.4.
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let bytes: Vec<u8> = (0..70_000_u32)
            .map(|at| at.wrapping_mul(2_654_435_761).to_le_bytes()[2])
            .collect();
        for len in (0..600).chain([4095, 4096, 4097, 32_768, 65_535, 70_000]) {
            let bytes = &bytes[..len];
            assert_eq!(crc32c(bytes), ::crc32c::crc32c(bytes), "{len} bytes");
            for cut in [0, 1, 7, len / 3, len.saturating_sub(1), len] {
                let cut = cut.min(len);
                let (before, after) = bytes.split_at(cut);
                assert_eq!(
                    crc32c_append(crc32c(before), after),
                    crc32c(bytes),
                    "{len} bytes cut at {cut}"
                );
            }
        }
    }
}
