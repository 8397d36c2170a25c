//! A repository to read from and write to, for callers that may wait (distribution specification 1.1). Every answer is
//! bounded, and what has a digest is checked against it before it is returned.
//!
//! Parts: reading is here, `push` writes, `referrers` lists what names an image.

mod push;
mod referrers;

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use reqwest::header::{ACCEPT, CONTENT_LENGTH, HeaderMap};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use url::Url;

use super::access::BlobAccess;
use super::answer::{BLOB_ABSENT, NAME_ABSENT, body, refusal};
use super::hosts;
use super::manifest::{DOCKER_LIST, DOCKER_MANIFEST, LONGEST_MANIFEST, OCI_INDEX, OCI_MANIFEST};
use super::reference::{Reference, Version};
use super::session::{Effort, Need, RepositorySpec, Session};
use super::{PullPolicy, RegistryOptions, SmallBlobCache};
use crate::digest::{Algorithm, Digest};
use crate::http::{self, Backoff, runtime, shown_url};
use crate::source::error::{SourceError, wait_after};

/// So long an answer to what is optional is waited for: many round trips of a long way, and no more than a person takes for one
/// step of many.
const OPTIONAL_DEADLINE: Duration = Duration::from_secs(5);

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
}

fn wrong_digest(url: &Url, what: &'static str, expected: &Digest) -> SourceError {
    SourceError::Digest {
        name: shown_url(url),
        what,
        expected: expected.to_string(),
    }
}
