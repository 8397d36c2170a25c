//! How a blob's bytes are asked for, now and later. In: where a blob is and what was known when it was found. Out: a URL and
//! headers that work now; again, when they no longer do.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use reqwest::header::{ACCEPT_ENCODING, AUTHORIZATION, HeaderValue, RANGE};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde::{Deserialize, Serialize};
use url::Url;

use super::answer::{BLOB_ABSENT, refusal};
use super::credentials::Keyring;
use super::session::{Effort, Grant, Need, RepositorySpec, Session, State, lock};
use crate::digest::Digest;
use crate::http::tls::Trust;
use crate::http::{ByteRange, Reach, expiry, runtime, without_secrets};
use crate::source::error::SourceError;

/// A blob in a registry, and all that is needed to ask for it for as long as a device lives: endpoints, credentials and where
/// they come from, tokens. It goes to another process through a pipe and never into a file; `Debug` shows no secrets.
/// Blobs of one repository share what they learn.
#[derive(Clone, Serialize, Deserialize)]
#[serde(from = "Packed", into = "Packed")]
pub struct BlobAccess {
    session: Arc<Session>,
    digest: Digest,
    size: u64,
    /// Where a redirect led to the last time.
    target: Arc<Mutex<Option<Target>>>,
}

#[derive(Clone)]
struct Target {
    at: usize,
    /// The URL that led there.
    from: Url,
    url: Url,
    reach: Reach,
    until: Option<SystemTime>,
}

/// On its way to another process.
#[derive(Clone, Serialize, Deserialize)]
struct Packed {
    spec: RepositorySpec,
    states: Vec<State>,
    digest: Digest,
    size: u64,
}

impl From<BlobAccess> for Packed {
    fn from(access: BlobAccess) -> Self {
        let mut spec = access.session.spec.clone();
        spec.keyring = spec.keyring.for_others();
        Self {
            spec,
            states: access.session.states(),
            digest: access.digest,
            size: access.size,
        }
    }
}

impl From<Packed> for BlobAccess {
    fn from(packed: Packed) -> Self {
        let session = Session::shared(packed.spec, Some(packed.states));
        Self::new(session, packed.digest, packed.size)
    }
}

impl fmt::Debug for BlobAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlobAccess({})", self.name())
    }
}

impl PartialEq for BlobAccess {
    /// Whether it is the same blob in the same repository.
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest && self.session.name() == other.session.name()
    }
}

/// A request for a blob that should work now.
#[derive(Clone, PartialEq, Eq)]
pub struct BlobLocation {
    /// Whom to ask. May answer with a redirect.
    pub url: String,
    /// What to send along, secrets among it; to this URL's host only.
    pub headers: Vec<(String, String)>,
    /// After this it should be asked for anew; no end is known if none.
    pub expires: Option<SystemTime>,
    /// Whom to believe that they are that host; what redirects lead to is believed as usual.
    pub trust: Trust,
    at: usize,
}

impl fmt::Debug for BlobLocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BlobLocation")
            .field("url", &without_secrets(&self.url))
            .field("expires", &self.expires)
            .field("trust", &self.trust)
            .finish_non_exhaustive()
    }
}

impl BlobLocation {
    fn authorization(&self) -> Option<HeaderValue> {
        let (_, value) = self
            .headers
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case("authorization"))?;
        HeaderValue::from_str(value).ok()
    }
}

impl BlobAccess {
    pub(super) fn new(session: Arc<Session>, digest: Digest, size: u64) -> Self {
        Self {
            session,
            digest,
            size,
            target: Arc::default(),
        }
    }

    /// The same without credentials and tokens: they are looked up where they come from.
    #[must_use]
    pub fn without_secrets(&self) -> Self {
        let mut spec = self.session.spec.clone();
        spec.keyring = spec.keyring.for_others();
        spec.keyring.given = None;
        for endpoint in &mut spec.endpoints {
            endpoint.headers.clear();
        }
        Self::new(Session::alone(spec), self.digest.clone(), self.size)
    }

    /// The blob's digest.
    #[must_use]
    pub const fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Its length in bytes, as its manifest has it.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Where credentials are looked up when those that are known no longer work.
    #[must_use]
    pub fn keyring(&self) -> &Keyring {
        &self.session.spec.keyring
    }

    /// For messages: registry, repository, digest.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}@{}", self.session.name(), self.digest)
    }

    /// Whom the first request will go to, as a URL that tells only hosts apart: connections can be opened ahead of it.
    #[must_use]
    pub fn first_host(&self) -> Option<(Url, Trust)> {
        let at = *self.session.order(Need::Pull).first()?;
        Some((
            self.session.known_base(at)?,
            self.session.spec.endpoints[at].trust.clone(),
        ))
    }

    /// Whether redirects to addresses inside are followed, whoever sends them.
    #[must_use]
    pub fn allows_private_redirects(&self) -> bool {
        self.session.spec.http.private_redirects
    }

    /// Whether more than one endpoint may have it.
    #[must_use]
    pub fn has_alternatives(&self) -> bool {
        self.session.order(Need::Pull).len() > 1
    }

    /// Notes that the endpoint which `failed` leads to is down or too busy: if there are others, they are asked first for a
    /// while.
    pub fn avoid(&self, failed: &BlobLocation) {
        if self.has_alternatives() {
            self.session.avoid(failed.at);
        }
    }

    /// A request that should work, on any runtime. `stale` is what was given before and no longer works: then it is found out
    /// by asking whether its credentials or its endpoint are at fault, and the answer has been seen to work. Without `stale`
    /// nothing is asked as long as what is known holds.
    ///
    /// # Errors
    /// [`SourceError`]: no endpoint can be reached, or none gives the blob.
    pub async fn locate(&self, stale: Option<&BlobLocation>) -> Result<BlobLocation, SourceError> {
        let (this, stale) = (self.clone(), stale.cloned());
        runtime::run(async move { this.find(stale).await }).await
    }

    async fn find(&self, stale: Option<BlobLocation>) -> Result<BlobLocation, SourceError> {
        let order = self.session.order(Need::Pull);
        if stale.is_none()
            && let Some(&at) = order.first()
            && self.session.is_known(at)
        {
            let url = self.session.url(at, &self.what());
            match self.session.grant(at, Need::Pull, &url, None, &[]).await {
                Ok(grant) => return Ok(self.located(at, &url, &grant)),
                Err(failure) if order.len() == 1 => return Err(failure),
                Err(failure) => self.session.set_down(at, &failure),
            }
        }
        let mut last = None;
        for at in order {
            let old = stale
                .as_ref()
                .filter(|stale| stale.at == at)
                .and_then(BlobLocation::authorization);
            match self.first_byte(at, old).await {
                Ok(located) => return Ok(located),
                Err(failure) => {
                    self.session.set_down(at, &failure);
                    last = Some(failure);
                }
            }
        }
        Err(last.unwrap_or_else(|| self.no_endpoint()))
    }

    fn no_endpoint(&self) -> SourceError {
        SourceError::Unusable {
            source_name: self.name(),
            why: "none of the configured hosts may be asked for blobs".to_owned(),
        }
    }

    /// What to ask an endpoint for.
    fn what(&self) -> String {
        format!("blobs/{}", self.digest)
    }

    /// Asks an endpoint for one byte: the cheapest request that means the same as the ones to come.
    async fn first_byte(&self, at: usize, stale: Option<HeaderValue>) -> Result<BlobLocation, SourceError> {
        let make = ranged(Some(ByteRange { start: 0, len: 1 }));
        let (url, response, grant) = self
            .session
            .ask(at, Need::Pull, Effort::Full, &self.what(), stale, &make)
            .await?;
        let status = response.status();
        if status.is_success() || status.is_redirection() || status == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(self.located(at, &url, &grant));
        }
        Err(refusal(&url, response, &self.session.spec.http, BLOB_ABSENT).await)
    }

    fn located(&self, at: usize, url: &Url, grant: &Grant) -> BlobLocation {
        let endpoint = &self.session.spec.endpoints[at];
        let mut headers = endpoint.headers().to_vec();
        if let Some(value) = grant.authorization.as_ref().and_then(|value| value.to_str().ok()) {
            headers.push((AUTHORIZATION.to_string(), value.to_owned()));
        }
        BlobLocation {
            url: url.to_string(),
            headers,
            expires: grant.until,
            trust: endpoint.trust.clone(),
            at,
        }
    }

    /// Asks for a range, or for all of it, following redirects, logging in, and going on to the next endpoint as far as it takes.
    /// What comes back is a success or a 416.
    pub(in crate::source) async fn get(&self, range: Option<ByteRange>) -> Result<Response, SourceError> {
        let this = self.clone();
        runtime::run(async move { this.fetch(range).await }).await
    }

    async fn fetch(&self, range: Option<ByteRange>) -> Result<Response, SourceError> {
        let make = ranged(range);
        let kept = lock(&self.target).clone();
        if let Some(target) = kept.filter(|target| target.until.is_none_or(|until| SystemTime::now() < until)) {
            match self
                .session
                .ask_target(target.at, &target.from, (&target.url, target.reach), &make)
                .await
            {
                Ok(response) if usable(response.status()) => return Ok(response),
                // Expired, or gone: the registry that redirected there gives a new one.
                Ok(_) | Err(_) => *lock(&self.target) = None,
            }
        }
        let mut last = None;
        for at in self.session.order(Need::Pull) {
            match self.fetch_from(at, &make).await {
                Ok(response) => return Ok(response),
                Err(failure) => {
                    self.session.set_down(at, &failure);
                    last = Some(failure);
                }
            }
        }
        Err(last.unwrap_or_else(|| self.no_endpoint()))
    }

    async fn fetch_from(
        &self,
        at: usize,
        make: &(dyn Fn(&Client, Url) -> RequestBuilder + Send + Sync),
    ) -> Result<Response, SourceError> {
        let (url, response, grant) = self
            .session
            .ask(at, Need::Pull, Effort::Full, &self.what(), None, make)
            .await?;
        let (response, led_to) = self.session.follow_redirects(at, &url, response, &grant, make).await?;
        if !usable(response.status()) {
            let place = led_to.map_or(url, |(place, _)| place);
            return Err(refusal(&place, response, &self.session.spec.http, BLOB_ABSENT).await);
        }
        *lock(&self.target) = led_to.map(|(target, reach)| Target {
            at,
            from: url,
            until: expiry::of_url(&target, SystemTime::now()),
            url: target,
            reach,
        });
        Ok(response)
    }
}

fn usable(status: StatusCode) -> bool {
    status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE
}

fn ranged(range: Option<ByteRange>) -> impl Fn(&Client, Url) -> RequestBuilder + Send + Sync + 'static {
    move |client, url| {
        let request = client.get(url).header(ACCEPT_ENCODING, "identity");
        match range {
            Some(range) => request.header(RANGE, range.to_string()),
            None => request,
        }
    }
}
