//! What tells one state of a blob on a server from another (RFC 9110, section 8.8).

use std::fmt;

use hyper::header::{ETAG, HeaderMap, HeaderName, LAST_MODIFIED};
use serde::{Deserialize, Serialize};

/// A server's mark of a blob's state, kept from the answer in which the blob was found.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Validator {
    /// The `ETag` header's value, quotes and `W/` included.
    ETag(String),
    /// The `Last-Modified` header's value.
    LastModified(String),
}

impl Validator {
    /// The better one of an answer's validators: its tag, else its date.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        let text = |name| Some(headers.get(name)?.to_str().ok()?.to_owned());
        text(ETAG)
            .map(Self::ETag)
            .or_else(|| text(LAST_MODIFIED).map(Self::LastModified))
    }

    /// The header that carries it.
    #[must_use]
    pub fn header(&self) -> HeaderName {
        match self {
            Self::ETag(_) => ETAG,
            Self::LastModified(_) => LAST_MODIFIED,
        }
    }

    /// The header's value.
    #[must_use]
    pub fn value(&self) -> &str {
        match self {
            Self::ETag(value) | Self::LastModified(value) => value,
        }
    }

    /// Whether it may stand in an `If-Range`: weak tags may not (section 13.1.5).
    #[must_use]
    pub fn is_strong(&self) -> bool {
        !matches!(self, Self::ETag(tag) if tag.starts_with("W/"))
    }

    /// What a later answer says in its place, if that is something else. An answer without this header says nothing: some
    /// servers leave it out of partial answers. A tag's weakness does not count: proxies that recompress weaken tags of bytes
    /// that did not change.
    #[must_use]
    pub fn contradicted_by<'a>(&self, headers: &'a HeaderMap) -> Option<&'a str> {
        let now = headers.get(self.header())?.to_str().ok()?;
        let weakly = |tag: &'a str| tag.strip_prefix("W/").unwrap_or(tag);
        let before = self.value();
        (weakly(now) != before.strip_prefix("W/").unwrap_or(before)).then_some(now)
    }
}

impl fmt::Display for Validator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ETag(tag) => write!(f, "etag:{tag}"),
            Self::LastModified(date) => write!(f, "last-modified:{date}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()));
        pairs.collect()
    }

    #[test]
    fn the_tag_is_preferred() {
        let both = headers(&[("etag", "\"a\""), ("last-modified", "Thu, 15 Jan 2026 10:11:12 GMT")]);
        assert_eq!(Validator::of(&both), Some(Validator::ETag("\"a\"".to_owned())));
        let date = headers(&[("last-modified", "x")]);
        assert_eq!(Validator::of(&date), Some(Validator::LastModified("x".to_owned())));
        assert_eq!(Validator::of(&headers(&[])), None);
    }

    #[test]
    fn only_another_value_of_the_same_kind_contradicts() {
        for (before, now, contradicts) in [
            ("\"a\"", &[("etag", "\"a\"")][..], false),
            ("\"a\"", &[("etag", "W/\"a\"")], false),
            ("W/\"a\"", &[("etag", "\"a\"")], false),
            ("\"a\"", &[("etag", "\"b\"")], true),
            ("W/\"a\"", &[("etag", "W/\"b\"")], true),
            ("\"a\"", &[("last-modified", "x")], false),
            ("\"a\"", &[], false),
        ] {
            let before = Validator::ETag(before.to_owned());
            assert_eq!(
                before.contradicted_by(&headers(now)).is_some(),
                contradicts,
                "{before} {now:?}"
            );
        }
        let date = Validator::LastModified("x".to_owned());
        assert!(date.contradicted_by(&headers(&[("last-modified", "y")])).is_some());
        assert!(date.contradicted_by(&headers(&[("etag", "\"y\"")])).is_none());
        assert!(date.is_strong() && !Validator::ETag("W/\"a\"".to_owned()).is_strong());
    }
}
