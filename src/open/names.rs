//! What names meant when their servers were last asked. In: a tag or a URL, and what was found under it. Out: the same later, when
//! the server cannot be asked, or is not to be.
//!
//! A tag is remembered as the digest of its manifest, whose bytes are kept under that digest; a URL as the length and the
//! validator of what lies there, by which its kept chunks are recognised. Entries are checksummed together with their name,
//! hold no secrets (a URL shows only as a hash in a file's name), and can be deleted at any time.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use url::Url;

use super::Cache;
use crate::digest::Digest;
use crate::http::Validator;
use crate::source::registry::KnownTag;
use crate::source::{Blob, UrlBlob};

/// A tag, as it is remembered.
#[derive(Serialize, Deserialize)]
struct TagEntry {
    digest: Digest,
    /// When the registry said so, in seconds since 1970.
    at: u64,
}

/// What lies at a URL, as it is remembered.
#[derive(Serialize, Deserialize)]
struct UrlEntry {
    len: u64,
    ranges: bool,
    validator: Validator,
    encoding: Option<String>,
    /// When the server said so, in seconds since 1970.
    at: u64,
}

fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

fn time(secs: u64) -> SystemTime {
    UNIX_EPOCH.checked_add(Duration::from_secs(secs)).unwrap_or(UNIX_EPOCH)
}

impl Cache {
    /// What a tag meant.
    pub(super) fn known_tag(&self, name: &str) -> Option<KnownTag> {
        let entry: TagEntry = self.recall(&format!("tag\n{name}"))?;
        Some(KnownTag {
            digest: entry.digest,
            at: time(entry.at),
        })
    }

    /// Notes what a tag means now.
    pub(super) fn know_tag(&self, name: &str, digest: &Digest) {
        let entry = TagEntry {
            digest: digest.clone(),
            at: now(),
        };
        self.remember(&format!("tag\n{name}"), &entry);
    }

    /// What lay at a URL, and when.
    pub(super) fn known_url(&self, url: &Url) -> Option<(Blob, SystemTime)> {
        let entry: UrlEntry = self.recall(&url_key(url))?;
        let at = UrlBlob {
            ranges: entry.ranges,
            validator: Some(entry.validator),
            encoding: entry.encoding,
            ..UrlBlob::new(url)
        };
        Some((Blob::of_url(at, entry.len), time(entry.at)))
    }

    /// Notes what lies at a URL now, where its server says by what it can be recognised.
    pub(super) fn know_url(&self, url: &Url, at: &UrlBlob, len: u64) {
        let Some(validator) = at.validator.clone() else { return };
        let entry = UrlEntry {
            len,
            ranges: at.ranges,
            validator,
            encoding: at.encoding.clone(),
            at: now(),
        };
        self.remember(&url_key(url), &entry);
    }
}

/// With user and password: others may be shown something else.
fn url_key(url: &Url) -> String {
    format!("url\n{url}")
}

/// A time for people: `2026-11-28 02:05 UTC, 3h ago`.
pub(super) fn show_time(at: SystemTime) -> String {
    let ago = SystemTime::now().duration_since(at).unwrap_or_default().as_secs();
    let ago = match ago {
        0..60 => format!("{ago}s"),
        60..3600 => format!("{}min", ago / 60),
        3600..172_800 => format!("{}h", ago / 3600),
        _ => format!("{} days", ago / 86_400),
    };
    match Timestamp::try_from(at) {
        Ok(at) => format!("{}, {ago} ago", at.strftime("%Y-%m-%d %H:%M UTC")),
        Err(_) => format!("{ago} ago"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_remembered_until_they_are_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path()).unwrap();
        let digest = Digest::of(crate::digest::Algorithm::Sha256, b"manifest");
        assert!(cache.known_tag("docker://host/a:1").is_none());
        cache.know_tag("docker://host/a:1", &digest);
        let known = cache.known_tag("docker://host/a:1").unwrap();
        assert_eq!(known.digest, digest);
        assert!(known.at.elapsed().unwrap() < Duration::from_secs(60));
        assert!(cache.known_tag("docker://host/a:2").is_none());
        // Under another name, or changed in any byte, it counts for nothing.
        let names = dir.path().join("names");
        let path = std::fs::read_dir(&names).unwrap().next().unwrap().unwrap().path();
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            assert!(cache.known_tag("docker://host/a:1").is_none(), "byte {at}");
        }
        cache.know_tag("docker://host/b:1", &digest);
        let other = std::fs::read_dir(&names)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .find(|entry| *entry != path)
            .unwrap();
        std::fs::copy(other, &path).unwrap();
        assert!(cache.known_tag("docker://host/a:1").is_none());
        std::fs::write(&path, good).unwrap();
        assert!(cache.known_tag("docker://host/a:1").is_some());
    }

    #[test]
    fn urls_are_remembered_with_what_recognises_them_alone() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path()).unwrap();
        let url = Url::parse("https://me:word@host/layer.tar?sig=word").unwrap();
        let mut at = UrlBlob::new(&url);
        cache.know_url(&url, &at, 7);
        assert!(cache.known_url(&url).is_none(), "it could become something else");
        at.validator = Some(Validator::ETag("\"1\"".to_owned()));
        at.ranges = false;
        cache.know_url(&url, &at, 7);
        let (blob, _) = cache.known_url(&url).unwrap();
        assert_eq!((blob.len, blob.answers_ranges()), (7, false));
        assert_eq!(blob.cache_name(), Blob::of_url(at, 7).cache_name());
        for entry in std::fs::read_dir(dir.path().join("names")).unwrap() {
            let path = entry.unwrap().path();
            let text = std::fs::read_to_string(&path).unwrap();
            assert!(!text.contains("word") && !path.to_string_lossy().contains("word"));
        }
    }

    #[test]
    fn times_are_said_with_their_age() {
        let at = UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        assert!(show_time(at).starts_with("2023-11-14 22:13 UTC, "), "{}", show_time(at));
        assert!(show_time(SystemTime::now()).ends_with(" ago"));
    }
}
