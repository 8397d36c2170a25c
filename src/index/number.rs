//! The ways a tar writes numbers: octal text, base-256, PAX decimals and PAX times.
//!
//! In: a field's bytes. Out: the number, or `None` when there is no number in it that fits. The accepted spellings are
//! those of Go's archive/tar, because container tools read layers with it.

use super::entry::Timestamp;

/// A numeric header field: octal text, or base-256 when the first byte's top bit is set. May be negative (base-256 only).
pub(super) fn field(bytes: &[u8]) -> Option<i64> {
    match bytes.first() {
        Some(first) if first & 0x80 != 0 => base256(bytes),
        _ => octal(bytes),
    }
}

/// Octal text, padded with spaces or NULs on either side. An empty field is zero, as old tars leave it.
pub(super) fn octal(bytes: &[u8]) -> Option<i64> {
    let padding = |b: &u8| *b == b' ' || *b == 0;
    let Some(start) = bytes.iter().position(|b| !padding(b)) else {
        return Some(0);
    };
    let digits = &bytes[start..];
    let end = digits.iter().position(|b| *b == 0).unwrap_or(digits.len());
    let digits = digits[..end].trim_ascii_end();
    let mut value = 0_u64;
    for digit in digits {
        if !(b'0'..=b'7').contains(digit) || value >> 61 != 0 {
            return None;
        }
        value = value << 3 | u64::from(digit - b'0');
    }
    i64::try_from(value).ok()
}

/// A big-endian two's complement number whose first byte has its top bit as a mark and the next one as the sign.
fn base256(bytes: &[u8]) -> Option<i64> {
    let (first, rest) = bytes.split_first()?;
    let negative = first & 0x40 != 0;
    let flip = if negative { 0xff } else { 0 };
    let mut magnitude = u64::from((first ^ flip) & 0x7f);
    for byte in rest {
        if magnitude >> 56 != 0 {
            return None;
        }
        magnitude = magnitude << 8 | u64::from(byte ^ flip);
    }
    let magnitude = i64::try_from(magnitude).ok()?;
    Some(if negative { !magnitude } else { magnitude })
}

/// A decimal number of a PAX record: an optional sign and digits.
pub(super) fn decimal(bytes: &[u8]) -> Option<i64> {
    // The standard parser accepts exactly this much: a sign, digits, nothing else.
    std::str::from_utf8(bytes).ok()?.parse().ok()
}

/// A PAX time: decimal seconds with an optional fraction, of which nine digits count. `-1.5` lies one and a half seconds
/// before 1970, so it is second -2 and 500,000,000 ns.
pub(super) fn pax_time(bytes: &[u8]) -> Option<Timestamp> {
    let (whole, fraction) = match bytes.iter().position(|b| *b == b'.') {
        Some(dot) => (&bytes[..dot], &bytes[dot + 1..]),
        None => (bytes, &[][..]),
    };
    let secs = decimal(whole)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let mut nanos = 0_u32;
    for place in 0..9 {
        nanos = nanos * 10 + fraction.get(place).map_or(0, |digit| u32::from(digit - b'0'));
    }
    if whole.first() == Some(&b'-') && nanos != 0 {
        return Some(Timestamp {
            secs: secs.checked_sub(1)?,
            nanos: 1_000_000_000 - nanos,
        });
    }
    Some(Timestamp { secs, nanos })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn octal_fields_are_padded_in_many_ways() {
        for (bytes, value) in [
            (&b"0000644\0"[..], 0o644),
            (b"   644 \0", 0o644),
            (b"644", 0o644),
            (b"\x00\x00\x00644\0", 0o644),
            (b"77777777777\0", 0o77_777_777_777),
            (b"777777777777", 0o777_777_777_777),
            (b"", 0),
            (b"\0\0\0\0\0\0\0\0", 0),
            (b"        ", 0),
            (b"12 \0junk", 0o12),
        ] {
            assert_eq!(field(bytes), Some(value), "{bytes:?}");
        }
        for bytes in [&b"0000648\0"[..], b"-1", b"0x10", b"1 2", b"7777777777777777777777777"] {
            assert_eq!(field(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn base256_is_signed() {
        assert_eq!(field(b"\x80\0\0\0\0\0\0\x01\0\0\0\0"), Some(1 << 32));
        assert_eq!(field(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), Some(-1));
        assert_eq!(field(b"\xff\xff\xff\xff\xff\xff\xff\xfe"), Some(-2));
        assert_eq!(field(b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff"), Some(i64::MAX));
        assert_eq!(field(b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0"), Some(i64::MIN));
        assert_eq!(field(b"\x80\0\0\0\x80\0\0\0\0\0\0\0"), None, "one too many");
        assert_eq!(field(b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), None);
        assert_eq!(field(b"\x80"), Some(0));
        assert_eq!(field(b"\xff"), Some(-1));
    }

    #[test]
    fn pax_times_round_towards_the_past() {
        let time = |text: &str| pax_time(text.as_bytes()).map(|t| (t.secs, t.nanos));
        assert_eq!(time("1350244992.023960108"), Some((1_350_244_992, 23_960_108)));
        assert_eq!(time("1.5"), Some((1, 500_000_000)));
        assert_eq!(time("1."), Some((1, 0)));
        assert_eq!(time("-1.5"), Some((-2, 500_000_000)));
        assert_eq!(time("-1"), Some((-1, 0)));
        assert_eq!(time("-0.25"), Some((-1, 750_000_000)));
        assert_eq!(time("1.1234567899999"), Some((1, 123_456_789)));
        for bad in [
            "",
            ".",
            ".5",
            "1.x",
            "1.-5",
            "x",
            "1e5",
            "99999999999999999999",
            "-9223372036854775808.5",
            "1_0",
        ] {
            assert_eq!(time(bad), None, "{bad}");
        }
    }
}
