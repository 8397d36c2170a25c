//! The bytes that compressed streams begin with.

/// A gzip member (RFC 1952, section 2.3.1).
pub(super) const GZIP: [u8; 2] = [0x1f, 0x8b];
/// A zstd frame (RFC 8878, section 3.1.1).
pub(super) const ZSTD: [u8; 4] = 0xfd2f_b528_u32.to_le_bytes();
/// A skippable frame, of zstd and of LZ4 alike (RFC 8878, section 3.1.2); the low four bits of the first byte are free.
pub(crate) const SKIPPABLE: [u8; 4] = 0x184d_2a50_u32.to_le_bytes();

/// Whether `bytes` begin a skippable frame.
pub(super) fn is_skippable(bytes: &[u8]) -> bool {
    bytes.first().is_some_and(|byte| byte & 0xf0 == SKIPPABLE[0]) && bytes.get(1..4) == Some(&SKIPPABLE[1..])
}
