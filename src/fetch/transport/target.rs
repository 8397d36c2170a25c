//! Where a layer is right now. In: a fixed URL, or a blob of a registry whose tokens and endpoints change. Out: the spot to
//! ask next, and names fit for messages and for the store.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use hyper::header::{AUTHORIZATION, HeaderName, HeaderValue};
use url::Url;

use super::pool::HostKey;
use crate::fetch::StartError;
use crate::http::tls::Trust;
use crate::http::{Encoding, Error, Validator, expiry};
use crate::source::SourceError;
use crate::source::registry::{BlobAccess, BlobLocation};
use crate::source::{self, Blob};

/// How long answers that were asked for before a place was distrusted may still come in.
const STRAGGLERS: Duration = Duration::from_secs(30);

/// A URL and what is sent there.
pub(crate) struct Spot {
    pub(crate) url: Url,
    /// For this URL's origin; credentials among them.
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
    pub(crate) trust: Trust,
    /// Where it came from, if it can be had anew.
    located: Option<BlobLocation>,
}

impl Spot {
    fn new(url: Url, headers: Vec<(HeaderName, HeaderValue)>) -> Result<Self, String> {
        HostKey::of(&url, &Trust::default()).ok_or("only http:// and https:// can be fetched")?;
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
    place: Place,
    /// Where the last redirect led, and until when that works.
    target: RefCell<Option<(Url, Option<SystemTime>)>>,
    /// When wrong bytes last came from it.
    distrusted: Cell<Option<Instant>>,
}

enum Place {
    Fixed {
        spot: Rc<Spot>,
        /// The `Content-Encoding` with which it was found.
        encoding: Option<String>,
    },
    Registry(Box<Moving>),
}

/// A place that has to be found again from time to time.
struct Moving {
    access: BlobAccess,
    spot: RefCell<Option<Rc<Spot>>>,
    /// Held by whoever finds it, so that the others wait for the answer.
    finding: tokio::sync::Mutex<()>,
}

impl RemoteLayer {
    /// A blob at a URL or in a registry.
    pub(crate) fn new(blob: &Blob) -> Result<Self, StartError> {
        let unusable = |why: &str| StartError::Url {
            url: blob.name.clone(),
            why: why.to_owned(),
        };
        let (place, validator) = match &blob.place {
            source::Place::Registry(access) => {
                let moving = Moving {
                    access: access.clone(),
                    spot: RefCell::default(),
                    finding: tokio::sync::Mutex::new(()),
                };
                (Place::Registry(Box::new(moving)), None)
            }
            source::Place::Url(at) => {
                let headers = at.authorization_header().map(|value| (AUTHORIZATION, value));
                let spot = Spot::new(at.url.clone(), headers.into_iter().collect()).map_err(|why| unusable(&why))?;
                let place = Place::Fixed {
                    spot: Rc::new(spot),
                    encoding: at.encoding.clone(),
                };
                (place, at.validator.clone())
            }
            source::Place::File(_) => return Err(unusable("a file is not fetched")),
        };
        Ok(Self {
            name: blob.name.clone(),
            size: blob.len,
            validator,
            place,
            target: RefCell::default(),
            distrusted: Cell::default(),
        })
    }

    /// For messages.
    pub(crate) fn name(&self) -> String {
        self.name.clone()
    }

    /// Whom the first request will go to, as far as that is known.
    pub(crate) fn first_host(&self) -> Option<(Url, Trust)> {
        match &self.place {
            Place::Fixed { spot, .. } => Some((spot.url.clone(), spot.trust.clone())),
            Place::Registry(moving) => moving.access.first_host(),
        }
    }

    /// Which `Content-Encoding` its bytes may have.
    pub(crate) fn encoding(&self) -> Encoding<'_> {
        match &self.place {
            Place::Fixed { encoding, .. } => Encoding::Same(encoding.as_deref()),
            // A digest decides.
            Place::Registry(_) => Encoding::Any,
        }
    }

    /// Whether a spot that refuses can be had anew.
    pub(crate) fn can_move(&self) -> bool {
        matches!(self.place, Place::Registry(_))
    }

    /// The spot to ask. `stale` is one that has just refused.
    pub(crate) async fn spot(&self, stale: Option<&Rc<Spot>>) -> Result<Rc<Spot>, Error> {
        let moving = match &self.place {
            Place::Fixed { spot, .. } => return Ok(spot.clone()),
            Place::Registry(moving) => moving,
        };
        if let Some(spot) = moving.current(stale) {
            return Ok(spot);
        }
        let _alone = moving.finding.lock().await;
        if let Some(spot) = moving.current(stale) {
            return Ok(spot);
        }
        let old = stale.and_then(|spot| spot.located.as_ref());
        let located = moving.access.locate(old).await;
        let located = located.map_err(|error| failure(&self.name, error))?;
        let spot = Rc::new(Spot::of(&located).map_err(|why| Error::setup("a request for a blob", why))?);
        *moving.spot.borrow_mut() = Some(spot.clone());
        Ok(spot)
    }

    /// The spot does not answer, or not now: next time another endpoint is asked, if there is one.
    pub(crate) fn doubt(&self, spot: &Rc<Spot>) {
        if let Place::Registry(moving) = &self.place
            && moving.access.has_alternatives()
            && let Some(located) = &spot.located
        {
            moving.access.avoid(located);
            moving.spot.borrow_mut().take_if(|kept| Rc::ptr_eq(kept, spot));
        }
    }

    /// What came from where it is now was wrong: next time it is asked anew where the bytes are, and another endpoint is asked,
    /// if there is one. Otherwise the second try would get the same bad copy. What else of that copy still comes in within the
    /// next moments must not speak against the place that was found instead.
    pub(crate) fn distrust(&self) {
        let now = Instant::now();
        let again = self.distrusted.get().is_some_and(|when| now - when < STRAGGLERS);
        if again {
            return;
        }
        self.distrusted.set(Some(now));
        self.target.borrow_mut().take();
        if let Place::Registry(moving) = &self.place {
            let spot = moving.spot.borrow().clone();
            if let Some(spot) = spot {
                self.doubt(&spot);
            }
        }
    }

    /// Where a redirect led before, if that should still work.
    pub(crate) fn target(&self) -> Option<Url> {
        let target = self.target.borrow();
        let (url, until) = target.as_ref()?;
        until.is_none_or(|until| SystemTime::now() < until).then(|| url.clone())
    }

    /// Keeps where a redirect led: for as long as it says, or until it fails.
    pub(crate) fn keep_target(&self, url: Url) {
        let until = expiry::of_url(&url, SystemTime::now());
        *self.target.borrow_mut() = Some((url, until));
    }

    /// Forgets it, if it is still this one. Others may have found a new one meanwhile.
    pub(crate) fn forget_target(&self, url: &Url) {
        self.target.borrow_mut().take_if(|(kept, _)| kept == url);
    }
}

impl Moving {
    fn current(&self, stale: Option<&Rc<Spot>>) -> Option<Rc<Spot>> {
        let spot = self.spot.borrow().clone()?;
        let known_bad = stale.is_some_and(|stale| Rc::ptr_eq(stale, &spot));
        (spot.holds() && !known_bad).then_some(spot)
    }
}

/// What a failure to find the blob means for those who want its bytes.
fn failure(name: &str, error: SourceError) -> Error {
    match error {
        SourceError::Http(error) => error,
        // A refusal as any other, whatever words the registry finds for it.
        other => Error::refused(name, other),
    }
}
