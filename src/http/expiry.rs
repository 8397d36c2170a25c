//! When a signed URL stops working, as far as it says so itself. In: the URL a redirect led to. Out: a time, or nothing.

use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use jiff::civil::DateTime;
use url::Url;

/// Asked for again so long before its end, or a tenth of what is left: a request takes time to arrive.
const MARGIN: Duration = Duration::from_secs(5);

/// Until when to use `url`, to which a redirect led just `now`.
///
/// Known are AWS's and Google's signatures (`X-Amz-Date` with `X-Amz-Expires`, the same with `X-Goog-`), the older form of
/// both and `CloudFront`'s (`Expires`, seconds since 1970), and Azure's (`se`, a time). A time that is over already means that
/// one of the clocks is wrong; then nothing is known.
#[must_use]
pub fn of_url(url: &Url, now: SystemTime) -> Option<SystemTime> {
    let value = |wanted: &str| {
        let mut pairs = url.query_pairs();
        pairs
            .find(|(name, _)| name.eq_ignore_ascii_case(wanted))
            .map(|(_, value)| value)
    };
    let signed = |date: &str, life: &str| {
        let begin = DateTime::strptime("%Y%m%dT%H%M%SZ", value(date)?.as_ref()).ok()?;
        let begin = begin.to_zoned(jiff::tz::TimeZone::UTC).ok()?.timestamp();
        let life = value(life)?.parse().ok()?;
        SystemTime::from(begin).checked_add(Duration::from_secs(life))
    };
    let end = signed("X-Amz-Date", "X-Amz-Expires")
        .or_else(|| signed("X-Goog-Date", "X-Goog-Expires"))
        .or_else(|| SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(value("Expires")?.parse().ok()?)))
        .or_else(|| Some(value("se")?.parse::<Timestamp>().ok()?.into()))?;
    let left = end.duration_since(now).ok().filter(|left| !left.is_zero())?;
    now.checked_add(left.saturating_sub((left / 10).min(MARGIN)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_say_until_when_they_hold() {
        // 2026-01-15 10:11:12 UTC.
        let begin = SystemTime::UNIX_EPOCH + Duration::from_secs(1_768_471_872);
        let left = |query: &str, after: u64| {
            let now = begin + Duration::from_secs(after);
            let url = Url::parse(&format!("https://host/blob?{query}")).unwrap();
            of_url(&url, now).map(|until| until.duration_since(now).unwrap().as_millis())
        };
        let amazon = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20260115T101112Z&X-Amz-Expires=1200";
        assert_eq!(left(amazon, 0), Some(1_195_000));
        assert_eq!(left(&amazon.replace("Amz", "Goog"), 1180), Some(18_000));
        assert_eq!(left(amazon, 1200), None);
        assert_eq!(left("Expires=1768471874&Signature=x", 0), Some(1800));
        assert_eq!(left("sv=2020&se=2026-01-15T10%3A11%3A14Z&sig=x", 0), Some(1800));
        for nothing in [
            "",
            "X-Amz-Date=20260115T101112Z",
            "X-Amz-Date=2026&X-Amz-Expires=1",
            "X-Amz-Date=20260115T101112Z&X-Amz-Expires=-1",
            "X-Amz-Date=20260115T101112Z&X-Amz-Expires=18446744073709551615",
            "Expires=18446744073709551615",
            "Expires=x",
            "se=never",
        ] {
            assert_eq!(left(nothing, 0), None, "{nothing}");
        }
    }
}
