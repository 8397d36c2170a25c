//! Numbers of few bytes: LEB128, seven bits a byte, the lowest first, and zigzag for signed ones.

use super::error::IndexFault;

/// Appends `value`, one to ten bytes.
pub(crate) fn put(out: &mut Vec<u8>, mut value: u64) {
    loop {
        let low = value.to_le_bytes()[0];
        value >>= 7;
        if value == 0 {
            out.push(low & 0x7f);
            return;
        }
        out.push(low | 0x80);
    }
}

/// Appends `value`, small when it is near zero on either side.
pub(crate) fn put_signed(out: &mut Vec<u8>, value: i64) {
    put(out, ((value << 1) ^ (value >> 63)).cast_unsigned());
}

/// The signed number that [`put_signed`] wrote as this one.
pub(crate) fn unzigzag(value: u64) -> i64 {
    (value >> 1).cast_signed() ^ -(value & 1).cast_signed()
}

/// A column of an index that is being read: bytes from the front, never past the end.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn byte(&mut self) -> Result<u8, IndexFault> {
        let (first, rest) = self.rest.split_first().ok_or(IndexFault::Malformed("entry table"))?;
        self.rest = rest;
        Ok(*first)
    }

    pub(crate) fn bytes(&mut self, len: u64) -> Result<&'a [u8], IndexFault> {
        let len = usize::try_from(len).map_err(|_| IndexFault::Malformed("entry table"))?;
        let (head, rest) = self
            .rest
            .split_at_checked(len)
            .ok_or(IndexFault::Malformed("entry table"))?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn number(&mut self) -> Result<u64, IndexFault> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                break;
            }
            value |= bits << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(IndexFault::Malformed("number"))
    }

    pub(crate) fn signed(&mut self) -> Result<i64, IndexFault> {
        let value = self.number()?;
        Ok(unzigzag(value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_back() {
        for value in [
            0,
            1,
            127,
            128,
            300,
            16_383,
            16_384,
            u64::from(u32::MAX),
            u64::MAX - 1,
            u64::MAX,
        ] {
            let mut bytes = Vec::new();
            put(&mut bytes, value);
            let mut cursor = Cursor::new(&bytes);
            assert_eq!(cursor.number(), Ok(value));
            assert_eq!(cursor.remaining(), 0);
        }
        for value in [0, -1, 1, -64, 63, i64::MIN, i64::MAX] {
            let mut bytes = Vec::new();
            put_signed(&mut bytes, value);
            assert_eq!(Cursor::new(&bytes).signed(), Ok(value));
        }
    }

    #[test]
    fn endless_and_cut_numbers_are_refused() {
        assert!(Cursor::new(&[0xff; 10]).number().is_err());
        assert!(
            Cursor::new(&[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02])
                .number()
                .is_err()
        );
        assert!(Cursor::new(&[0x80]).number().is_err());
        assert!(Cursor::new(&[]).number().is_err());
        assert!(Cursor::new(&[1, 2]).bytes(3).is_err());
    }
}
