//! Sizes, rates and times as people write them, in both directions.
//!
//! In: `64MiB`, `200mbit`, `20ms`. Out: bytes, bytes per second, a [`Duration`]; and back again for tables. What could mean
//! two things is refused with a sentence that says what to write instead.

use std::time::Duration;

/// Splits `text` into a number and its unit, in lower case.
fn split(text: &str) -> Result<(f64, String), String> {
    let text = text.trim();
    let end = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: f64 = number
        .parse()
        .map_err(|_| format!("`{text}` does not begin with a number"))?;
    Ok((number, unit.trim().to_owned()))
}

/// `number` times `unit` as a whole number.
#[allow(clippy::as_conversions, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
fn whole(number: f64, unit: f64) -> Result<u64, String> {
    let product = (number * unit).round();
    // Just below 2^63: far above anything meant.
    if product.is_finite() && (0.0..9.2e18).contains(&product) {
        Ok(product as u64)
    } else {
        Err(format!("{number} is too big"))
    }
}

/// Binary and decimal prefixes of bytes; a lone letter is binary, as with most tools that count memory.
fn bytes_per_unit(unit: &str) -> Option<f64> {
    let unit = unit.to_ascii_lowercase();
    let power = |base: f64, letter: &str| {
        ["", "k", "m", "g", "t"]
            .iter()
            .zip(0..)
            .find(|(l, _)| **l == letter)
            .map(|(_, n)| base.powi(n))
    };
    match unit.as_str() {
        "" | "b" => Some(1.0),
        _ => match unit.strip_suffix("ib") {
            Some(letter) => power(1024.0, letter),
            None => match unit.strip_suffix('b') {
                Some(letter) => power(1000.0, letter),
                None => power(1024.0, &unit),
            },
        },
    }
}

/// Parses a size: `4096`, `64k` and `64KiB` (both times 1024), `64MB` (times 1000 squared), `1.5GiB`.
///
/// # Errors
/// A sentence for the person who typed it.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let unit =
        bytes_per_unit(&unit).ok_or_else(|| format!("unknown unit `{unit}`: write for example 64MiB, 64MB or 64M"))?;
    whole(number, unit)
}

/// Parses a rate into bytes per second: `200mbit` and `200Mbit/s` count bits (times 1000), `25MB/s` and `16MiB/s` bytes.
///
/// # Errors
/// A sentence for the person who typed it; `200mbps` is refused because some mean bits by it and some bytes.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    let (number, unit) = split(text)?;
    let lower = unit.to_ascii_lowercase();
    let ambiguous = || format!("`{text}` may mean bits or bytes: write for example 200mbit or 25MB/s");
    let bits = match lower.strip_suffix("/s").unwrap_or(&lower) {
        "bit" => Some(1.0),
        "kbit" => Some(1e3),
        "mbit" => Some(1e6),
        "gbit" => Some(1e9),
        _ => None,
    };
    let rate = match (bits, lower.strip_suffix("/s")) {
        (Some(bits), _) => whole(number, bits / 8.0)?,
        (None, Some(bytes)) if bytes.ends_with('b') => whole(number, bytes_per_unit(bytes).ok_or_else(ambiguous)?)?,
        _ => return Err(ambiguous()),
    };
    if rate == 0 {
        Err("a link that carries nothing brings nothing: give a rate above 0".into())
    } else {
        Ok(rate)
    }
}

/// Parses a time: `20ms`, `1.5s`, `500us`, `2m`, `1h`.
///
/// # Errors
/// A sentence for the person who typed it.
pub fn parse_time(text: &str) -> Result<Duration, String> {
    let (number, unit) = split(text)?;
    let nanos = match unit.to_ascii_lowercase().as_str() {
        "" if number == 0.0 => 0.0,
        "ns" => 1.0,
        "us" | "µs" => 1e3,
        "ms" => 1e6,
        "s" | "sec" => 1e9,
        "m" | "min" => 6e10,
        "h" => 3.6e12,
        _ => return Err(format!("`{text}` is not a time: write for example 20ms, 1.5s or 2m")),
    };
    Ok(Duration::from_nanos(whole(number, nanos)?))
}

/// A size in at most four digits and its unit: `17.4 MiB`.
#[must_use]
pub fn show_size(bytes: u64) -> String {
    scaled(bytes, 1024, &["B", "KiB", "MiB", "GiB", "TiB", "PiB"])
}

/// A rate given in bytes per second, in bits: `200 Mbit/s`.
#[must_use]
pub fn show_rate(bytes_per_second: u64) -> String {
    scaled(
        bytes_per_second.saturating_mul(8),
        1000,
        &["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"],
    )
}

/// `value` in the biggest unit of which there is at least one.
fn scaled(value: u64, step: u64, units: &[&str]) -> String {
    let mut unit = 0;
    let mut one = 1_u64;
    while unit + 1 < units.len() && value / one >= step {
        one = one.saturating_mul(step);
        unit += 1;
    }
    let tenths = u128::from(value) * 10 / u128::from(one);
    if unit == 0 || tenths >= 1000 || tenths % 10 == 0 {
        format!("{} {}", u128::from(value) / u128::from(one), units[unit])
    } else {
        format!("{}.{} {}", tenths / 10, tenths % 10, units[unit])
    }
}

/// A time in about three digits: `412 µs`, `20.4 ms`, `1.93 s`, `2 m 05 s`.
#[must_use]
pub fn show_time(time: Duration) -> String {
    let nanos = time.as_nanos();
    let secs = time.as_secs();
    if secs >= 60 {
        return format!("{} m {:02} s", secs / 60, secs % 60);
    }
    let (unit, name) = match nanos {
        0..1_000_000 => (1_000, "µs"),
        1_000_000..1_000_000_000 => (1_000_000, "ms"),
        _ => (1_000_000_000, "s"),
    };
    let hundredths = nanos * 100 / unit;
    if hundredths >= 10_000 {
        format!("{} {name}", hundredths / 100)
    } else if hundredths >= 1_000 {
        format!("{}.{} {name}", hundredths / 100, hundredths / 10 % 10)
    } else {
        format!("{}.{:02} {name}", hundredths / 100, hundredths % 100)
    }
}

/// A count with its thousands apart: `13,544`.
#[must_use]
pub fn show_count(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::with_capacity(digits.len() + digits.len() / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("4096"), Ok(4096));
        assert_eq!(parse_size("64k"), Ok(65_536));
        assert_eq!(parse_size("64 KiB"), Ok(65_536));
        assert_eq!(parse_size("64kB"), Ok(64_000));
        assert_eq!(parse_size("1.5GiB"), Ok(1_610_612_736));
        assert_eq!(parse_size("2T"), Ok(2 << 40));
        for bad in ["", "MiB", "1 potato", "-5", "1e999", "99999999T", "1..5", "kib1"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rates() {
        assert_eq!(parse_rate("200mbit"), Ok(25_000_000));
        assert_eq!(parse_rate("1Gbit/s"), Ok(125_000_000));
        assert_eq!(parse_rate("25MB/s"), Ok(25_000_000));
        assert_eq!(parse_rate("1MiB/s"), Ok(1 << 20));
        for bad in ["200mbps", "200", "200M", "0mbit", "fast"] {
            assert!(parse_rate(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn times() {
        assert_eq!(parse_time("20ms"), Ok(Duration::from_millis(20)));
        assert_eq!(parse_time("1.5s"), Ok(Duration::from_millis(1500)));
        assert_eq!(parse_time("0"), Ok(Duration::ZERO));
        assert_eq!(parse_time("2m"), Ok(Duration::from_secs(120)));
        for bad in ["20", "ms", "1 fortnight"] {
            assert!(parse_time(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn shown() {
        assert_eq!(show_size(0), "0 B");
        assert_eq!(show_size(1023), "1023 B");
        assert_eq!(show_size(1024), "1 KiB");
        assert_eq!(show_size(286_543_360), "273 MiB");
        assert_eq!(show_size(18_245_000), "17.3 MiB");
        assert_eq!(show_size(u64::MAX), "16383 PiB");
        assert_eq!(show_rate(25_000_000), "200 Mbit/s");
        assert_eq!(show_rate(1_250), "10 kbit/s");
        assert_eq!(show_time(Duration::from_micros(412)), "412 µs");
        assert_eq!(show_time(Duration::from_micros(20_440)), "20.4 ms");
        assert_eq!(show_time(Duration::from_millis(1_934)), "1.93 s");
        assert_eq!(show_time(Duration::from_secs(125)), "2 m 05 s");
        assert_eq!(show_count(13_544), "13,544");
        assert_eq!(show_count(100), "100");
        assert_eq!(show_count(1_000_000), "1,000,000");
    }
}
