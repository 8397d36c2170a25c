//! Formatting of single fields: permissions, dates, escaped names, base64.

use std::fmt;

use crate::index::entry::{Entry, Kind};

/// Type and permissions as ls(1) has them.
pub(super) struct Permissions<'a>(pub(super) &'a Entry);

impl fmt::Display for Permissions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.0.kind {
            Kind::File => '-',
            Kind::Directory => 'd',
            Kind::Symlink => 'l',
            Kind::Hardlink => 'h',
            Kind::CharDevice => 'c',
            Kind::BlockDevice => 'b',
            Kind::Fifo => 'p',
        };
        write!(f, "{kind}")?;
        for (shift, special, mark) in [(6, 0o4000, 's'), (3, 0o2000, 's'), (0, 0o1000, 't')] {
            let bits = self.0.mode >> shift;
            let execute = match (self.0.mode & special != 0, bits & 1 != 0) {
                (false, false) => '-',
                (false, true) => 'x',
                (true, true) => mark,
                (true, false) => mark.to_ascii_uppercase(),
            };
            let letter = |bit, letter| if bits & bit != 0 { letter } else { '-' };
            write!(f, "{}{}{execute}", letter(4, 'r'), letter(2, 'w'))?;
        }
        Ok(())
    }
}

/// Seconds since 1970 as a date and time of day, UTC.
pub(super) struct DateTime(pub(super) i64);

impl fmt::Display for DateTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (days, second) = (self.0.div_euclid(86_400), self.0.rem_euclid(86_400));
        // Days to a date of the Gregorian calendar: count from 0000-03-01, in eras of 400 years, so that leap days come last.
        let days = days + 719_468;
        let (era, day) = (days.div_euclid(146_097), days.rem_euclid(146_097));
        let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
        let day = day - (365 * year + year / 4 - year / 100);
        let month = (5 * day + 2) / 153;
        let day = day - (153 * month + 2) / 5 + 1;
        let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
        let year = era * 400 + year + carry;
        write!(
            f,
            "{year:04}-{month:02}-{day:02} {:02}:{:02}",
            second / 3_600,
            second / 60 % 60
        )
    }
}

/// A name for terminals: control characters, backslashes and what is not UTF-8 as escapes, the way GNU tar prints them.
pub(crate) struct Escaped<'a>(pub(crate) &'a [u8]);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for chunk in self.0.utf8_chunks() {
            for c in chunk.valid().chars() {
                match c {
                    '\\' => f.write_str("\\\\")?,
                    '\n' => f.write_str("\\n")?,
                    '\t' => f.write_str("\\t")?,
                    '\r' => f.write_str("\\r")?,
                    c if c.is_control() => {
                        for byte in c.encode_utf8(&mut [0; 4]).bytes() {
                            write!(f, "\\{byte:03o}")?;
                        }
                    }
                    c => write!(f, "{c}")?,
                }
            }
            for byte in chunk.invalid() {
                write!(f, "\\{byte:03o}")?;
            }
        }
        Ok(())
    }
}

/// A name for mtree files: vis(3) in octal for everything but plain visible ASCII, for the characters that mtree gives a
/// meaning (`#`, `=`, white space, `\`) and for those that its readers take for patterns (`*`, `?`, `[`).
pub(crate) struct Vis<'a>(pub(crate) &'a [u8]);

impl fmt::Display for Vis<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for &byte in self.0 {
            if byte.is_ascii_graphic() && !b"#=\\*?[".contains(&byte) {
                write!(f, "{}", char::from(byte))?;
            } else {
                write!(f, "\\{byte:03o}")?;
            }
        }
        Ok(())
    }
}

/// Bytes in base64, padded.
pub(super) struct Base64<'a>(pub(super) &'a [u8]);

impl fmt::Display for Base64<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        base64::display::Base64Display::new(self.0, &base64::engine::general_purpose::STANDARD).fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        for (secs, text) in [
            (0, "1970-01-01 00:00"),
            (-1, "1969-12-31 23:59"),
            (951_782_400, "2000-02-29 00:00"),
            (4_107_542_399, "2100-02-28 23:59"),
            (4_107_542_400, "2100-03-01 00:00"),
            (15_032_385_535, "2446-05-10 22:38"),
            (-2_147_483_648, "1901-12-13 20:45"),
        ] {
            assert_eq!(DateTime(secs).to_string(), text);
        }
        // The farthest times that a tar can hold have some date.
        assert!(!DateTime(i64::MAX).to_string().is_empty() && !DateTime(i64::MIN).to_string().is_empty());
    }

    #[test]
    fn base64_pads() {
        for (bytes, text) in [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
        ] {
            assert_eq!(Base64(bytes.as_bytes()).to_string(), text);
        }
    }
}
