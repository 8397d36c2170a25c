//! Where a layer is right now. In: a fixed URL, or a blob of a registry whose tokens and endpoints change. Out: the endpoint to
//! ask next, and names fit for messages and for the store.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, SystemTime};

use hyper::header::{AUTHORIZATION, HeaderName, HeaderValue};
use tokio::time::Instant;
use url::Url;

use super::pool::HostKey;
use crate::fetch::StartError;
use crate::http::tls::Trust;
use crate::http::{Encoding, Error, Reach, Validator, expiry};
use crate::source::SourceError;
use crate::source::registry::{BlobAccess, BlobLocation};
use crate::source::{self, Blob};

/// For so long after an endpoint was replaced, wrong bytes are taken for answers of the one before.
const STRAGGLERS: Duration = Duration::from_secs(30);

/// A URL and the headers that are sent there.
pub(crate) struct Endpoint {
    pub(crate) url: Url,
    /// Headers for this URL's origin alone, credentials among them.
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
    pub(crate) trust: Trust,
    /// The endpoint of the registry that it is, if there is a registry to renew it.
    located: Option<BlobLocation>,
}

impl Endpoint {
    fn new(url: Url, headers: Vec<(HeaderName, HeaderValue)>) -> Result<Self, String> {
        HostKey::of(&url, &Trust::default(), Reach::Anywhere).ok_or("only http:// and https:// can be fetched")?;
        Ok(Self {
            url,
            headers,
            trust: Trust::default(),
            located: None,
        })
    }

    fn of(located: &BlobLocation) -> Result<Self, String> {
        let url = Url::parse(&located.url).map_err(|error| error.to_string())?;
        let mut headers = Vec::new();
        for (name, value) in &located.headers {
            let name = HeaderName::from_bytes(name.as_bytes()).map_err(|e| format!("header {name:?}: {e}"))?;
            let mut value = HeaderValue::from_str(value).map_err(|e| format!("value of header {name}: {e}"))?;
            value.set_sensitive(true);
            headers.push((name, value));
        }
        Ok(Self {
            trust: located.trust.clone(),
            located: Some(located.clone()),
            ..Self::new(url, headers)?
        })
    }

    /// Whether all its headers are for its own origin only.
    pub(crate) fn is_of_registry(&self) -> bool {
        self.located.is_some()
    }

    fn holds(&self) -> bool {
        let until = self.located.as_ref().and_then(|located| located.expires);
        until.is_none_or(|until| SystemTime::now() < until)
    }
}

/// A layer on a server.
pub(crate) struct RemoteLayer {
    name: String,
    pub(crate) size: u64,
    pub(crate) validator: Option<Validator>,
    location: Location,
    /// Where the last redirect led.
    target: RefCell<Option<Target>>,
    /// When wrong bytes last came from it.
    distrusted: Cell<Option<Instant>>,
}

/// Where a redirect led.
struct Target {
    url: Url,
    /// How far it was allowed to lead.
    reach: Reach,
    /// Until when it works, where that is known.
    until: Option<SystemTime>,
}

enum Location {
    Url {
        endpoint: Rc<Endpoint>,
        /// The `Content-Encoding` with which it was found.
        encoding: Option<String>,
        private_redirects: bool,
    },
    Registry(Box<RegistryBlob>),
}

/// A blob whose endpoint has to be found again from time to time: tokens run out, endpoints fail.
struct RegistryBlob {
    access: BlobAccess,
    endpoint: RefCell<Option<Rc<Endpoint>>>,
    /// Held while it is found, so that other requests wait for the answer.
    finding: tokio::sync::Mutex<()>,
}

impl RemoteLayer {
    /// A blob at a URL or in a registry.
    pub(crate) fn new(blob: &Blob) -> Result<Self, StartError> {
        let unusable = |why: &str| StartError::Url {
            url: blob.name.clone(),
            why: why.to_owned(),
        };
        let (location, validator) = match &blob.place {
            source::Place::Registry(access) => {
                let in_registry = RegistryBlob {
                    access: access.clone(),
                    endpoint: RefCell::default(),
                    finding: tokio::sync::Mutex::new(()),
                };
                (Location::Registry(Box::new(in_registry)), None)
            }
            source::Place::Url(at) => {
                let headers = at.authorization_header().map(|value| (AUTHORIZATION, value));
                let endpoint =
                    Endpoint::new(at.url.clone(), headers.into_iter().collect()).map_err(|why| unusable(&why))?;
                let location = Location::Url {
                    endpoint: Rc::new(endpoint),
                    encoding: at.encoding.clone(),
                    private_redirects: at.private_redirects,
                };
                (location, at.validator.clone())
            }
            source::Place::File(_) => return Err(unusable("a file is not fetched")),
        };
        Ok(Self {
            name: blob.name.clone(),
            size: blob.len,
            validator,
            location,
            target: RefCell::default(),
            distrusted: Cell::default(),
        })
    }

    /// For messages.
    pub(crate) fn name(&self) -> String {
        self.name.clone()
    }

    /// The host that the first request will go to, as far as that is known.
    pub(crate) fn first_host(&self) -> Option<(Url, Trust)> {
        match &self.location {
            Location::Url { endpoint, .. } => Some((endpoint.url.clone(), endpoint.trust.clone())),
            Location::Registry(in_registry) => in_registry.access.first_host(),
        }
    }

    /// Which `Content-Encoding` its bytes may have.
    pub(crate) fn encoding(&self) -> Encoding<'_> {
        match &self.location {
            Location::Url { encoding, .. } => Encoding::Same(encoding.as_deref()),
            // A digest decides.
            Location::Registry(_) => Encoding::Any,
        }
    }

    /// Whether redirects to addresses inside are followed, whoever sends them.
    pub(crate) fn allows_private_redirects(&self) -> bool {
        match &self.location {
            Location::Url { private_redirects, .. } => *private_redirects,
            Location::Registry(in_registry) => in_registry.access.allows_private_redirects(),
        }
    }

    /// Whether an endpoint that refuses can be renewed or replaced.
    pub(crate) fn can_move(&self) -> bool {
        matches!(self.location, Location::Registry(_))
    }

    /// The endpoint to ask. `stale` is one that has just refused.
    pub(crate) async fn endpoint(&self, stale: Option<&Rc<Endpoint>>) -> Result<Rc<Endpoint>, Error> {
        let in_registry = match &self.location {
            Location::Url { endpoint, .. } => return Ok(endpoint.clone()),
            Location::Registry(in_registry) => in_registry,
        };
        if let Some(endpoint) = in_registry.current(stale) {
            return Ok(endpoint);
        }
        let _alone = in_registry.finding.lock().await;
        if let Some(endpoint) = in_registry.current(stale) {
            return Ok(endpoint);
        }
        let old = stale.and_then(|endpoint| endpoint.located.as_ref());
        let located = in_registry.access.locate(old).await;
        let located = located.map_err(|error| failure(&self.name, error))?;
        let endpoint = Rc::new(Endpoint::of(&located).map_err(|why| Error::setup("a request for a blob", why))?);
        *in_registry.endpoint.borrow_mut() = Some(endpoint.clone());
        Ok(endpoint)
    }

    /// The endpoint does not answer, or not now: next time another endpoint is asked, if there is one.
    pub(crate) fn doubt(&self, endpoint: &Rc<Endpoint>) {
        if let Location::Registry(in_registry) = &self.location
            && in_registry.access.has_alternatives()
            && let Some(located) = &endpoint.located
        {
            in_registry.access.avoid(located);
            in_registry
                .endpoint
                .borrow_mut()
                .take_if(|kept| Rc::ptr_eq(kept, endpoint));
        }
    }

    /// Notes that wrong bytes came from the current endpoint: next time the redirect is asked for anew, and of another endpoint
    /// if there is one, because another try would get the same bad copy. Wrong bytes that still arrive from requests made
    /// before do not count against the new endpoint.
    pub(crate) fn distrust(&self) {
        self.target.borrow_mut().take();
        let now = Instant::now();
        let again = self.distrusted.get().is_some_and(|when| now - when < STRAGGLERS);
        if again {
            return;
        }
        self.distrusted.set(Some(now));
        if let Location::Registry(in_registry) = &self.location {
            let endpoint = in_registry.endpoint.borrow().clone();
            if let Some(endpoint) = endpoint {
                self.doubt(&endpoint);
            }
        }
    }

    /// Where a redirect led before, if that should still work, and how far it may lead.
    pub(crate) fn target(&self) -> Option<(Url, Reach)> {
        let target = self.target.borrow();
        let Target { url, reach, until } = target.as_ref()?;
        until
            .is_none_or(|until| SystemTime::now() < until)
            .then(|| (url.clone(), *reach))
    }

    /// Remembers where a redirect led, for as long as its URL is valid or until it fails.
    pub(crate) fn keep_target(&self, url: Url, reach: Reach) {
        let until = expiry::of_url(&url, SystemTime::now());
        *self.target.borrow_mut() = Some(Target { url, reach, until });
    }

    /// Forgets a redirect, unless another request has replaced it meanwhile.
    pub(crate) fn forget_target(&self, url: &Url) {
        self.target.borrow_mut().take_if(|kept| kept.url == *url);
    }
}

impl RegistryBlob {
    fn current(&self, stale: Option<&Rc<Endpoint>>) -> Option<Rc<Endpoint>> {
        let endpoint = self.endpoint.borrow().clone()?;
        let known_bad = stale.is_some_and(|stale| Rc::ptr_eq(stale, &endpoint));
        (endpoint.holds() && !known_bad).then_some(endpoint)
    }
}

/// A failure to find the blob as a failure of the request for its bytes.
fn failure(name: &str, error: SourceError) -> Error {
    match error {
        SourceError::Http(error) => error,
        // Whatever the registry says, it is a refusal like any other.
        other => Error::refused(name, other),
    }
}
