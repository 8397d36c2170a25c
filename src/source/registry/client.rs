//! A repository to read from and write to, for callers that may wait (distribution specification 1.1). Every answer is
//! bounded, and what has a digest is checked against it before it is returned.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, LINK, LOCATION};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use url::Url;

use super::access::BlobAccess;
use super::answer::{BLOB_ABSENT, NAME_ABSENT, body, refusal};
use super::hosts;
use super::manifest::{DOCKER_LIST, DOCKER_MANIFEST, Descriptor, LONGEST_MANIFEST, OCI_INDEX, OCI_MANIFEST};
use super::reference::{Reference, Version, check_tag};
use super::session::{Effort, Need, RepositorySpec, Session};
use super::{PullPolicy, RegistryOptions, SmallBlobCache};
use crate::digest::{Algorithm, Digest};
use crate::http::{self, Backoff, Reach, runtime, shown_url};
use crate::source::error::{SourceError, wait_after};

/// So long an answer to what is optional is waited for: many round trips of a long way, and no more than a person takes for one
/// step of many.
const OPTIONAL_DEADLINE: Duration = Duration::from_secs(5);

/// A list of referrers in more pages is not read to its end.
const MOST_PAGES: usize = 64;

/// One repository of a registry. Cheap to clone. Its methods wait: they are not for threads that run a runtime.
#[derive(Clone)]
pub struct Registry {
    session: Arc<Session>,
    cache: Option<Arc<dyn SmallBlobCache>>,
    /// Why nothing is to be asked, if so.
    offline: Option<Arc<str>>,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Registry({})", self.session.name())
    }
}

/// A manifest as it was delivered.
#[derive(Clone, Debug)]
pub struct Fetched {
    /// Its JSON.
    pub bytes: Vec<u8>,
    /// What the registry calls it.
    pub media_type: String,
    /// Of the bytes, checked.
    pub digest: Digest,
}

/// What a registry says of a blob without sending it.
#[derive(Clone, Debug)]
pub struct BlobHead {
    /// Its length in bytes, if it is said.
    pub size: Option<u64>,
    /// All header fields.
    pub headers: HeaderMap,
}

impl BlobHead {
    /// A header field as text.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }
}

impl Registry {
    /// The repository of `reference`. Sends no request yet, but reads the files that say which servers to ask.
    ///
    /// # Errors
    /// [`SourceError::Hosts`].
    pub fn new(reference: &Reference, options: &RegistryOptions) -> Result<Self, SourceError> {
        let spec = RepositorySpec {
            host: reference.host.clone(),
            repository: reference.repository.clone(),
            endpoints: hosts::endpoints(&reference.host, &options.hosts_dir, options.plain_http)?,
            keyring: options.keyring.clone(),
            http: options.http,
        };
        Ok(Self {
            session: Session::shared(spec, None),
            cache: options.cache.clone(),
            offline: match options.pull {
                PullPolicy::Never => Some("and no server is to be asked (--pull never)".into()),
                PullPolicy::Always | PullPolicy::Newer | PullPolicy::Missing => None,
            },
        })
    }

    /// The same repository, of which nothing is asked any more, because of `why`.
    #[must_use]
    pub(super) fn offline(self, why: String) -> Self {
        Self {
            offline: Some(why.into()),
            ..self
        }
    }

    /// That something is not kept, and cannot be asked for.
    pub(super) fn is_offline_error(&self) -> SourceError {
        SourceError::Image {
            name: self.name(),
            why: format!(
                "what is needed of it is not kept here, {}",
                self.offline.as_deref().unwrap_or("and nothing may be asked")
            ),
        }
    }

    /// An error, if nothing is to be asked.
    fn check_online(&self) -> Result<(), SourceError> {
        match self.offline {
            Some(_) => Err(self.is_offline_error()),
            None => Ok(()),
        }
    }

    /// What the clock of the endpoint says that is asked first; none if it does not answer or does not say.
    #[must_use]
    pub fn clock(&self) -> Option<SystemTime> {
        let at = *self.session.order(Need::Resolve).first()?;
        let url = self.session.known_base(at)?;
        let client = self.session.client(at, url.scheme() == "https").ok()?;
        let asked: Result<_, SourceError> = runtime::wait(async {
            Ok(http::send(&url, client.get(url.clone()), &self.session.spec.http.timeouts).await?)
        });
        http::date(asked.ok()?.headers())
    }

    /// Registry and repository, as [`Reference::repository_name`] has them.
    #[must_use]
    pub fn name(&self) -> String {
        self.session.name()
    }

    /// How to ask for one of its blobs later.
    #[must_use]
    pub fn blob(&self, digest: &Digest, size: u64) -> BlobAccess {
        BlobAccess::new(self.session.clone(), digest.clone(), size)
    }

    /// Opens `count` connections to the endpoint that will be asked first, in the background: by TCP and TLS, with
    /// nothing asked. Does nothing where it is not known whether that endpoint speaks TLS.
    pub fn warm_up(&self, count: usize) {
        let Some(&at) = self.session.order(Need::Pull).first() else {
            return;
        };
        for _ in 0..count {
            let session = self.session.clone();
            // Where there is no thread for it, the request that comes will say so.
            let _ = runtime::spawn(async move { session.warm_up(at).await });
        }
    }

    /// Asks one endpoint after the other, and all of them again where that may help.
    fn ask<T>(&self, need: Need, question: impl AsyncFn(usize) -> Result<T, SourceError>) -> Result<T, SourceError> {
        self.check_online()?;
        runtime::wait(self.ask_all(need, &question))
    }

    /// The same, for callers that bound how long it may take.
    async fn ask_all<T>(
        &self,
        need: Need,
        question: &impl AsyncFn(usize) -> Result<T, SourceError>,
    ) -> Result<T, SourceError> {
        let mut backoff = Backoff::new(self.session.spec.http.retry);
        loop {
            let mut last = None;
            for at in self.session.order(need) {
                match question(at).await {
                    Ok(answer) => return Ok(answer),
                    Err(failure) => {
                        self.session.set_down(at, &failure);
                        last = Some(failure);
                    }
                }
            }
            let failure = last.unwrap_or_else(|| self.no_endpoint());
            wait_after(&mut backoff, failure).await?;
        }
    }

    /// Asks one endpoint after the other for something optional, each once, and not for long. A failure is no reason to ask an
    /// endpoint less for what is not optional.
    async fn ask_once<T>(
        &self,
        need: Need,
        question: impl AsyncFn(usize) -> Result<T, SourceError>,
    ) -> Result<T, SourceError> {
        self.check_online()?;
        let asking = async {
            let mut last = None;
            for at in self.session.order(need) {
                match question(at).await {
                    Ok(answer) => return Ok(answer),
                    Err(failure) => last = Some(failure),
                }
            }
            Err(last.unwrap_or_else(|| self.no_endpoint()))
        };
        let asked = tokio::time::timeout(OPTIONAL_DEADLINE, asking).await;
        asked.unwrap_or_else(|_| Err(self.no_answer(need, OPTIONAL_DEADLINE)))
    }

    fn no_answer(&self, need: Need, within: Duration) -> SourceError {
        let at = self.session.order(need).first().copied().unwrap_or_default();
        let why = format!("no answer within {within:?}");
        http::Error::unreachable(&self.session.url(at, ""), why).into()
    }

    fn no_endpoint(&self) -> SourceError {
        SourceError::Unusable {
            source_name: self.name(),
            why: "none of the configured hosts may be asked for this".to_owned(),
        }
    }

    /// A GET or HEAD, with redirects followed.
    async fn get(
        &self,
        at: usize,
        need: Need,
        effort: Effort,
        what: &str,
        make: &(dyn Fn(&Client, Url) -> RequestBuilder + Send + Sync),
    ) -> Result<(Url, Response), SourceError> {
        let (url, response, grant) = self.session.ask(at, need, effort, what, None, make).await?;
        let (response, _) = self.session.follow_redirects(at, &url, response, &grant, make).await?;
        Ok((url, response))
    }

    async fn refused<T>(&self, url: &Url, response: Response) -> Result<T, SourceError> {
        Err(refusal(url, response, &self.session.spec.http, NAME_ABSENT).await)
    }

    /// Brings a manifest or an index, checked against its digest.
    ///
    /// # Errors
    /// [`SourceError`]; of a refused request when there is none.
    pub fn manifest(&self, version: &Version) -> Result<Fetched, SourceError> {
        let need = match version {
            Version::Tag(_) => Need::Resolve,
            Version::Digest(digest) => {
                if let Some(cached) = self.cached_manifest(digest) {
                    return Ok(cached);
                }
                Need::Pull
            }
        };
        let fetched = self.ask(need, async |at| {
            self.manifest_from(at, need, Effort::Full, version).await
        })?;
        self.keep(&fetched);
        Ok(fetched)
    }

    /// The same of a registry that can be done without: it is not waited for longer than `patience`.
    pub(super) fn manifest_within(&self, version: &Version, patience: Duration) -> Result<Fetched, SourceError> {
        self.check_online()?;
        let question = async |at| self.manifest_from(at, Need::Resolve, Effort::Full, version).await;
        let fetched = runtime::wait(async {
            let asked = tokio::time::timeout(patience, self.ask_all(Need::Resolve, &question)).await;
            asked.unwrap_or_else(|_| Err(self.no_answer(Need::Resolve, patience)))
        })?;
        self.keep(&fetched);
        Ok(fetched)
    }

    /// A manifest from the cache.
    pub(super) fn cached_manifest(&self, digest: &Digest) -> Option<Fetched> {
        let (media_type, bytes) = self.cached(digest)?;
        Some(Fetched {
            bytes,
            media_type,
            digest: digest.clone(),
        })
    }

    fn keep(&self, fetched: &Fetched) {
        if let Some(cache) = &self.cache {
            cache.put(&fetched.digest, &fetched.media_type, &fetched.bytes);
        }
    }

    /// The manifest that a tag names, if there is one that can be had by asking once: for what is optional.
    ///
    /// # Errors
    /// [`SourceError`]: why not, if it is not just absent.
    pub fn optional_manifest(&self, version: &Version) -> Result<Option<Fetched>, SourceError> {
        let asked = self.ask_once(Need::Resolve, async |at| {
            self.manifest_from(at, Need::Resolve, Effort::Once, version).await
        });
        match runtime::wait(asked) {
            Ok(fetched) => Ok(Some(fetched)),
            Err(error) if error.is_absence() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// What is cached under a digest and has it.
    fn cached(&self, digest: &Digest) -> Option<(String, Vec<u8>)> {
        let found = self.cache.as_ref()?.get(digest)?;
        digest.matches(&found.1).then_some(found)
    }

    async fn manifest_from(
        &self,
        at: usize,
        need: Need,
        effort: Effort,
        version: &Version,
    ) -> Result<Fetched, SourceError> {
        let kinds = [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST].join(", ");
        let make = move |client: &Client, url: Url| client.get(url).header(ACCEPT, &kinds);
        let (url, response) = self
            .get(at, need, effort, &format!("manifests/{version}"), &make)
            .await?;
        if response.status() != StatusCode::OK {
            return self.refused(&url, response).await;
        }
        let text = |name: &str| {
            response
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned)
        };
        let media_type = text("content-type").unwrap_or_default();
        let stated = text("docker-content-digest").and_then(|digest| digest.parse::<Digest>().ok());
        let bytes = body(&url, response, LONGEST_MANIFEST, &self.session.spec.http).await?;
        let expected = match version {
            Version::Digest(digest) => Some(digest.clone()),
            Version::Tag(_) => stated,
        };
        let algorithm = expected.as_ref().map_or(Algorithm::Sha256, Digest::algorithm);
        let digest = Digest::of(algorithm, &bytes);
        match expected {
            Some(expected) if expected != digest => Err(wrong_digest(&url, "manifest", &expected)),
            _ => Ok(Fetched {
                bytes,
                media_type,
                digest,
            }),
        }
    }

    /// Brings a small blob, whole, of exactly this size, checked against its digest.
    ///
    /// # Errors
    /// [`SourceError`]; also when `size` is more than `most` bytes.
    pub fn small_blob(&self, digest: &Digest, size: u64, most: u64) -> Result<Vec<u8>, SourceError> {
        if size > most {
            return Err(SourceError::Image {
                name: format!("{}@{digest}", self.name()),
                why: format!("it is {size} bytes long, and no more than {most} can be used"),
            });
        }
        if let Some((_, bytes)) = self.cached(digest)
            && u64::try_from(bytes.len()).is_ok_and(|len| len == size)
        {
            return Ok(bytes);
        }
        let bytes = self.ask(Need::Pull, async |at| {
            let make = |client: &Client, url: Url| client.get(url);
            let (url, response) = self
                .get(at, Need::Pull, Effort::Full, &format!("blobs/{digest}"), &make)
                .await?;
            if response.status() != StatusCode::OK {
                return Err(refusal(&url, response, &self.session.spec.http, BLOB_ABSENT).await);
            }
            let bytes = body(&url, response, size, &self.session.spec.http).await?;
            if !u64::try_from(bytes.len()).is_ok_and(|len| len == size) || !digest.matches(&bytes) {
                return Err(wrong_digest(&url, "blob", digest));
            }
            Ok(bytes)
        })?;
        if let Some(cache) = &self.cache {
            cache.put(digest, "", &bytes);
        }
        Ok(bytes)
    }

    /// What the registry says of a blob: its length, and headers such as `LazyPull-Digest`. None if it is not there. Asked once,
    /// because every caller can do without.
    ///
    /// # Errors
    /// [`SourceError`].
    pub fn head_blob(&self, digest: &Digest) -> Result<Option<BlobHead>, SourceError> {
        runtime::wait(self.head_blob_as(Need::Pull, Effort::Once, digest))
    }

    async fn head_blob_as(&self, need: Need, effort: Effort, digest: &Digest) -> Result<Option<BlobHead>, SourceError> {
        let asked = self.ask_once(need, async |at| {
            let make = |client: &Client, url: Url| client.head(url);
            let what = format!("blobs/{digest}");
            let (url, first, grant) = self.session.ask(at, need, effort, &what, None, &make).await?;
            // What the registry itself says counts too, when it sends us elsewhere for the bytes.
            let mut headers = first.headers().clone();
            let (response, _) = self.session.follow_redirects(at, &url, first, &grant, &make).await?;
            match response.status() {
                StatusCode::OK => {}
                StatusCode::NOT_FOUND => return Ok(None),
                _ => return self.refused(&url, response).await,
            }
            // A server need not say it (RFC 9110, section 8.6).
            let size = response.headers().get(CONTENT_LENGTH);
            let size = size.and_then(|value| value.to_str().ok()?.trim().parse().ok());
            for (name, value) in response.headers() {
                headers.insert(name.clone(), value.clone());
            }
            Ok(Some(BlobHead { size, headers }))
        });
        asked.await
    }

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

    /// Removes a manifest.
    ///
    /// # Errors
    /// [`SourceError`]; many registries remove nothing for anybody.
    fn remove_manifest(&self, digest: &Digest) -> Result<(), SourceError> {
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

fn upload_place(url: &Url, headers: &HeaderMap) -> Result<Url, SourceError> {
    let location = headers.get(LOCATION).and_then(|value| value.to_str().ok());
    let place = location.and_then(|location| url.join(location).ok());
    let place = place.ok_or_else(|| SourceError::wrong(url, "no place to upload to"))?;
    if url.scheme() == "https" && place.scheme() != "https" {
        return Err(SourceError::wrong(url, "a place to upload to without TLS"));
    }
    Ok(place)
}

fn wrong_digest(url: &Url, what: &'static str, expected: &Digest) -> SourceError {
    SourceError::Digest {
        name: shown_url(url),
        what,
        expected: expected.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
