//! What refers to an image (distribution specification 1.1, "referrers"), by the API and by the fallback tag where there is none. In: a
//! subject. Out: descriptors of what names it; a list with one more, or another one.

use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, LINK};
use reqwest::{Client, StatusCode};
use url::Url;

use super::super::answer::body;
use super::super::manifest::{Descriptor, LONGEST_MANIFEST, OCI_INDEX};
use super::super::reference::Version;
use super::super::session::{Effort, Need};
use super::Registry;
use crate::digest::Digest;
use crate::http::{runtime, shown_url};
use crate::source::error::SourceError;

/// A list of referrers in more pages is not read to its end.
const MOST_PAGES: usize = 64;

impl Registry {
    /// The manifests that name `subject`, of this artifact type only if one is given: by the referrers API, or from the
    /// fallback tag where that has no good list. Both are asked at the same time, each once: a registry that has no referrers may
    /// answer anything.
    ///
    /// # Errors
    /// [`SourceError`] when neither has a list and one of them should be asked again.
    pub fn referrers(&self, subject: &Digest, artifact_type: Option<&str>) -> Result<Vec<Descriptor>, SourceError> {
        // Goes on by itself when the API answers, so that its connection can be used again.
        let (this, tag_of) = (self.clone(), subject.clone());
        let fallback = std::thread::spawn(move || this.fallback(&tag_of));
        let by_api = runtime::wait(self.ask_once(Need::Pull, async |at| {
            self.referrers_by_api(at, subject, artifact_type).await
        }));
        let listed = match by_api {
            Ok(listed) => listed,
            Err(why) => {
                log::debug!("{}: no list of referrers: {why}", self.name());
                let fallback = fallback.join();
                match fallback.unwrap_or_else(|panic| std::panic::resume_unwind(panic)) {
                    Ok(Some(listed)) => listed,
                    // What is wrong for now may hide something, and so may a list that has no end; nothing else does.
                    Err(error) if error.may_pass() => return Err(error),
                    Ok(None) | Err(_) if why.may_pass() || matches!(why, SourceError::Image { .. }) => return Err(why),
                    Ok(None) | Err(_) => Vec::new(),
                }
            }
        };
        Ok(listed
            .into_iter()
            .filter(|descriptor| artifact_type.is_none_or(|kind| descriptor.artifact_type.as_deref() == Some(kind)))
            .collect())
    }

    /// What the referrers API says; whatever is no good list is a failure.
    async fn referrers_by_api(
        &self,
        at: usize,
        subject: &Digest,
        artifact_type: Option<&str>,
    ) -> Result<Vec<Descriptor>, SourceError> {
        let make = |client: &Client, url: Url| client.get(url).header(ACCEPT, OCI_INDEX);
        let mut query = artifact_type.map(|kind| {
            let kind: String = url::form_urlencoded::byte_serialize(kind.as_bytes()).collect();
            format!("artifactType={kind}")
        });
        let mut all = Vec::new();
        for _ in 0..MOST_PAGES {
            let what = format!("referrers/{subject}");
            let what = query.map_or_else(|| what.clone(), |query| format!("{what}?{query}"));
            let (url, response) = self.get(at, Need::Pull, Effort::Once, &what, &make).await?;
            if response.status() != StatusCode::OK {
                return self.refused(&url, response).await;
            }
            let kind = response
                .headers()
                .get(CONTENT_TYPE)
                .and_then(|value| value.to_str().ok());
            let kind = kind.unwrap_or_default().split(';').next().unwrap_or_default().trim();
            if !kind.eq_ignore_ascii_case(OCI_INDEX) {
                return Err(SourceError::wrong(&url, format!("{kind:?} and no list of referrers")));
            }
            query = next_page(&url, response.headers());
            let bytes = body(&url, response, LONGEST_MANIFEST, &self.session.spec.http).await?;
            all.extend(listed(&bytes).map_err(|why| SourceError::wrong(&url, why))?);
            if query.is_none() {
                return Ok(all);
            }
        }
        let why = format!("a list of referrers without end (after {MOST_PAGES} pages)");
        Err(SourceError::Image {
            name: format!("{}@{subject}", self.name()),
            why,
        })
    }

    /// What the fallback tag of `subject` lists (distribution specification, "Referrers Tag Schema"); none if there is no such tag.
    fn fallback(&self, subject: &Digest) -> Result<Option<Vec<Descriptor>>, SourceError> {
        let tag = fallback_tag(subject);
        let Some(fetched) = self.optional_manifest(&tag)? else {
            return Ok(None);
        };
        let listed = listed(&fetched.bytes).map_err(|why| SourceError::Image {
            name: format!("{}:{tag}", self.name()),
            why,
        })?;
        Ok(Some(listed))
    }

    /// Puts a manifest that has a `subject` under its digest, and into the fallback tag's list where the registry has no
    /// referrers API. `entry` describes it there. Returns that tag, if it was needed.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn push_referrer(
        &self,
        subject: &Digest,
        entry: &Descriptor,
        bytes: &[u8],
    ) -> Result<Option<Version>, SourceError> {
        self.replace_referrer(subject, None, entry, bytes)
    }

    /// The same in place of the manifest with the digest `before`, which leaves the fallback tag's list, or is removed, as far as the
    /// registry removes manifests.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn replace_referrer(
        &self,
        subject: &Digest,
        before: Option<&Digest>,
        entry: &Descriptor,
        bytes: &[u8],
    ) -> Result<Option<Version>, SourceError> {
        let before = before.filter(|before| **before != entry.digest);
        let version = Version::Digest(entry.digest.clone());
        if self.push_manifest(&version, &entry.media_type, bytes)? {
            if let Some(before) = before
                && let Err(error) = self.remove_manifest(before)
            {
                log::info!(
                    "{}@{before} stays beside the one that takes its place: {error}",
                    self.name()
                );
            }
            return Ok(None);
        }
        let tag = fallback_tag(subject);
        let mut entries = match self.manifest(&tag) {
            Ok(fetched) => entries_of(&fetched.bytes).unwrap_or_else(|why| {
                log::warn!("{}:{tag}: {why}; putting a new list in its place", self.name());
                Vec::new()
            }),
            // Others' entries would be lost if it is there after all.
            Err(error) if error.may_pass() => return Err(error),
            Err(_) => Vec::new(),
        };
        if let Some(before) = before.map(ToString::to_string) {
            entries.retain(|known| known["digest"] != before);
        }
        let named = entry.digest.to_string();
        if before.is_none() && entries.iter().any(|known| known["digest"] == named) {
            return Ok(Some(tag));
        }
        // Entries of others stay as they are, whatever is in them.
        entries.retain(|known| known["digest"] != named);
        entries.push(serde_json::to_value(entry).unwrap_or_default());
        let index = serde_json::json!({ "schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries });
        let index = index.to_string().into_bytes();
        self.push_manifest(&tag, OCI_INDEX, &index)?;
        Ok(Some(tag))
    }
}

/// The query of a list's next page (distribution specification, "Listing Referrers"; RFC 8288). Only the query is taken: it is
/// asked of the same place, wherever the link leads.
fn next_page(url: &Url, headers: &HeaderMap) -> Option<String> {
    for value in headers.get_all(LINK) {
        let mut rest = value.to_str().unwrap_or_default();
        while let Some((target, behind)) = rest.split_once('<').and_then(|(_, link)| link.split_once('>')) {
            let parameters = behind.split('<').next().unwrap_or_default().to_ascii_lowercase();
            let is_next = parameters.split([';', ',']).any(|parameter| {
                let parameter = parameter.trim();
                parameter == "rel=next" || parameter == "rel=\"next\""
            });
            if is_next && let Ok(next) = url.join(target) {
                if next.path() == url.path() {
                    return next.query().map(str::to_owned);
                }
                log::warn!("{}: the list's next page is elsewhere, and not read", shown_url(url));
            }
            rest = behind;
        }
    }
    None
}

fn fallback_tag(subject: &Digest) -> Version {
    // The specification cuts the digits here, so that every algorithm makes a tag.
    let digits: String = subject.hex().chars().take(64).collect();
    Version::Tag(format!("{}-{digits}", subject.algorithm().name()))
}

/// The entries of a list of referrers as they are.
///
/// # Errors
/// That it is no such list.
fn entries_of(bytes: &[u8]) -> Result<Vec<serde_json::Value>, String> {
    let list: serde_json::Value =
        serde_json::from_slice(bytes).map_err(|error| format!("a list that makes no sense: {error}"))?;
    match list.get("manifests") {
        Some(serde_json::Value::Array(entries)) => Ok(entries.clone()),
        // What Go writes for an empty list.
        Some(serde_json::Value::Null) => Ok(Vec::new()),
        Some(_) | None => Err("a list of referrers without a list".to_owned()),
    }
}

/// The entries of a list of referrers, without those that make no sense.
///
/// # Errors
/// That it is no such list, or that nothing in it makes sense.
fn listed(bytes: &[u8]) -> Result<Vec<Descriptor>, String> {
    let entries = entries_of(bytes)?;
    let readable: Vec<_> = entries
        .iter()
        .filter_map(|entry| serde_json::from_value(entry.clone()).ok())
        .collect();
    if readable.is_empty() && !entries.is_empty() {
        return Err("a list of referrers in which nothing makes sense".to_owned());
    }
    Ok(readable)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;

    #[test]
    fn fallback_tags_are_those_of_the_specification() {
        let tag = |algorithm| match fallback_tag(&Digest::of(algorithm, b"")) {
            Version::Tag(tag) => tag,
            Version::Digest(digest) => panic!("{digest}"),
        };
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(tag(Algorithm::Sha256), format!("sha256-{hex}"));
        let hex = "cf83e1357eefb8bdf1542850d66d8007d620e4050b5715dc83f4a921d36ce9ce";
        assert_eq!(tag(Algorithm::Sha512), format!("sha512-{hex}"));
    }
}
