//! Writing to a repository (distribution specification 1.1, "push"). In: blobs and manifests. Out: that the registry has them.

use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, LOCATION};
use reqwest::{Client, Response, StatusCode};
use url::Url;

use super::super::reference::{Reference, Version, check_tag};
use super::super::session::{Effort, Need};
use super::{Registry, wrong_digest};
use crate::digest::Digest;
use crate::http::{Reach, runtime};
use crate::source::error::SourceError;

impl Registry {
    /// Puts a blob into the repository, unless it is there.
    ///
    /// # Errors
    /// [`SourceError`]; [`SourceError::Digest`] when the registry took it under another digest.
    pub fn push_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<(), SourceError> {
        // A login may be allowed to write and not to read. Whatever goes wrong here, sending the blob again is right as well.
        if let Ok(Some(_)) = runtime::wait(self.head_blob_as(Need::Push, Effort::Full, digest)) {
            return Ok(());
        }
        let bytes = bytes::Bytes::copy_from_slice(bytes);
        self.ask(Need::Push, async |at| {
            let (url, response) = self.post(at, "blobs/uploads/").await?;
            if !response.status().is_success() {
                return self.refused(&url, response).await;
            }
            let place = upload_place(&url, response.headers())?;
            let reach = self.session.reach_of(&url, &response);
            self.put_blob(at, &url, (place, reach), digest, bytes.clone()).await
        })
    }

    async fn post(&self, at: usize, what: &str) -> Result<(Url, Response), SourceError> {
        let make = |client: &Client, url: Url| client.post(url).header(CONTENT_LENGTH, 0);
        let (url, response, _) = self
            .session
            .ask(at, Need::Push, Effort::Full, what, None, &make)
            .await?;
        Ok((url, response))
    }

    /// Sends the bytes to where an upload was opened. Credentials go along only if that is the registry itself.
    async fn put_blob(
        &self,
        at: usize,
        own: &Url,
        (mut place, reach): (Url, Reach),
        digest: &Digest,
        bytes: bytes::Bytes,
    ) -> Result<(), SourceError> {
        place.set_fragment(None);
        place.query_pairs_mut().append_pair("digest", &digest.to_string());
        let make = move |client: &Client, url: Url| {
            client
                .put(url)
                .header(CONTENT_TYPE, "application/octet-stream")
                .body(bytes.clone())
        };
        let response = if place.origin() == own.origin() {
            self.session.send(at, Need::Push, &place, None, &make).await?.0
        } else {
            self.session.ask_target(at, own, (&place, reach), &make).await?
        };
        self.taken(&place, response, "blob that was pushed", |taken| taken == digest)
            .await
            .map(drop)
    }

    /// The headers of a registry's answer to what was put there: any success will do, if the digest that it names, if it names
    /// one, is right.
    async fn taken(
        &self,
        url: &Url,
        response: Response,
        what: &'static str,
        is_right: impl Fn(&Digest) -> bool,
    ) -> Result<HeaderMap, SourceError> {
        if !response.status().is_success() {
            return self.refused(url, response).await;
        }
        let headers = response.headers();
        let taken = headers
            .get("docker-content-digest")
            .and_then(|value| value.to_str().ok()?.trim().parse::<Digest>().ok());
        match taken {
            Some(taken) if !is_right(&taken) => Err(wrong_digest(url, what, &taken)),
            _ => Ok(headers.clone()),
        }
    }

    /// Takes a blob over from another repository of the same registry, without moving bytes. False where the registry does
    /// not do that.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn mount_blob(&self, digest: &Digest, from: &Reference) -> Result<bool, SourceError> {
        self.ask(Need::Push, async |at| {
            let mut query = url::form_urlencoded::Serializer::new(String::new());
            query
                .append_pair("mount", &digest.to_string())
                .append_pair("from", &from.repository);
            let (url, response) = self.post(at, &format!("blobs/uploads/?{}", query.finish())).await?;
            match response.status() {
                StatusCode::CREATED => Ok(true),
                // An upload was opened instead; it is left to the registry to forget it. Or it knows of no such thing.
                status if status.is_success() || status == StatusCode::NOT_FOUND => Ok(false),
                StatusCode::BAD_REQUEST | StatusCode::METHOD_NOT_ALLOWED => Ok(false),
                _ => self.refused(&url, response).await,
            }
        })
    }

    /// Puts a manifest under a tag or its digest. Returns whether the registry took note of its `subject`: if not, it has no
    /// referrers API, and the fallback tag is needed ([`push_referrer`](Self::push_referrer) does both).
    ///
    /// # Errors
    /// [`SourceError`]; [`SourceError::Digest`] when the registry took it under another digest.
    pub fn push_manifest(&self, version: &Version, media_type: &str, bytes: &[u8]) -> Result<bool, SourceError> {
        if let Version::Tag(tag) = version {
            check_tag(tag).map_err(|why| SourceError::Unusable {
                source_name: self.name(),
                why,
            })?;
        }
        let body = bytes::Bytes::copy_from_slice(bytes);
        self.ask(Need::Push, async |at| {
            let (media_type, body) = (media_type.to_owned(), body.clone());
            let make =
                move |client: &Client, url: Url| client.put(url).header(CONTENT_TYPE, &media_type).body(body.clone());
            let what = format!("manifests/{version}");
            let (url, response, _) = self
                .session
                .ask(at, Need::Push, Effort::Full, &what, None, &make)
                .await?;
            let headers = self
                .taken(&url, response, "manifest that was pushed", |taken| taken.matches(bytes))
                .await?;
            Ok(headers.contains_key("oci-subject"))
        })
    }

    /// Removes a manifest.
    ///
    /// # Errors
    /// [`SourceError`]; many registries remove nothing for anybody.
    pub(super) fn remove_manifest(&self, digest: &Digest) -> Result<(), SourceError> {
        runtime::wait(self.ask_once(Need::Push, async |at| {
            let make = |client: &Client, url: Url| client.delete(url);
            let what = format!("manifests/{digest}");
            let asked = self.session.ask(at, Need::Push, Effort::Once, &what, None, &make);
            let (url, response, _) = asked.await?;
            match response.status() {
                status if status.is_success() || status == StatusCode::NOT_FOUND => Ok(()),
                _ => self.refused(&url, response).await,
            }
        }))
    }
}

fn upload_place(url: &Url, headers: &HeaderMap) -> Result<Url, SourceError> {
    let location = headers.get(LOCATION).and_then(|value| value.to_str().ok());
    let place = location.and_then(|location| url.join(location).ok());
    let place = place.ok_or_else(|| SourceError::wrong(url, "no place to upload to"))?;
    if url.scheme() == "https" && place.scheme() != "https" {
        return Err(SourceError::wrong(url, "a place to upload to without TLS"));
    }
    Ok(place)
}
