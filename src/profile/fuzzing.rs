//! For the fuzz target `profile`, which would not get past a checksum by chance.

/// A profile's file with any body, and the checksum that it has to have.
#[must_use]
pub fn sealed(body: &[u8]) -> Vec<u8> {
    super::format::sealed(body)
}
