//! Little-endian fields of on-disk records.

/// Writes a 16-bit field.
pub(super) fn put_u16(record: &mut [u8], at: usize, value: u16) {
    record[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

/// Writes a 32-bit field.
pub(super) fn put_u32(record: &mut [u8], at: usize, value: u32) {
    record[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// The low 16 bits and the 16 above them: how ext4 splits its wider fields.
pub(super) fn halves(value: u32) -> (u16, u16) {
    let [a, b, c, d] = value.to_le_bytes();
    (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]))
}

/// The low 32 bits and the 32 above them.
pub(super) fn words(value: u64) -> (u32, u32) {
    let word = |value: u64| u32::try_from(value & 0xffff_ffff).expect("masked to 32 bits");
    (word(value), word(value >> 32))
}

/// `len` rounded up to ext4's four-byte grain.
pub(super) const fn pad4(len: usize) -> usize {
    len.next_multiple_of(4)
}
