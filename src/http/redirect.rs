//! Where a server sends those who ask (RFC 9110, section 15.4). One set of rules for both clients, which send the next request
//! themselves and keep credentials to the origin they are for.

use std::net::IpAddr;

use hyper::StatusCode;
use hyper::header::{HeaderMap, HeaderValue, LOCATION};
use url::Url;

use super::error::Error;
use super::reach::{InsideAddress, Reach};
use super::redact::shown_location;

/// Registry, storage, region, object: four hops are seen in the wild. More than these are a loop; Go and reqwest give up there
/// too.
pub const MOST_REDIRECTS: usize = 10;

/// A chain of redirects, from the URL that was asked first.
#[derive(Debug)]
pub(crate) struct Redirects {
    /// The URL that was named.
    first: Url,
    url: Url,
    hops: usize,
    /// Where redirects may lead; none until the server that was named has answered.
    reach: Option<Reach>,
}

/// Whether an answer with this status sends the client elsewhere. 300, 304, 305 and 306 do not.
pub(crate) fn follows(status: StatusCode) -> bool {
    matches!(
        status,
        StatusCode::MOVED_PERMANENTLY
            | StatusCode::FOUND
            | StatusCode::SEE_OTHER
            | StatusCode::TEMPORARY_REDIRECT
            | StatusCode::PERMANENT_REDIRECT
    )
}

impl Redirects {
    /// The chain that begins with a request to `url`.
    pub(crate) fn from(url: Url) -> Self {
        Self {
            first: url.clone(),
            url,
            hops: 0,
            reach: None,
        }
    }

    /// The rest of a chain that began with `first` and led to `url` before, as far as `reach`.
    pub(crate) const fn resumed(first: Url, url: Url, reach: Reach) -> Self {
        Self {
            first,
            url,
            hops: 0,
            reach: Some(reach),
        }
    }

    /// Where the request for the URL asked now may go: anywhere, if a person named it.
    pub(crate) fn reach(&self) -> Reach {
        self.reach.unwrap_or_default()
    }

    /// The URL asked now has answered from `peer`, none if that was a proxy. What the first answer of all comes from decides
    /// where redirects may lead; `allowed` is whether a person lets them lead anywhere.
    pub(crate) fn answered(&mut self, peer: Option<IpAddr>, allowed: bool) {
        if self.reach.is_none() {
            self.reach = Some(Reach::of_server(&self.url, peer, allowed));
        }
    }

    /// A failure to ask the URL asked now, with who led there if it must not be asked.
    pub(crate) fn explain(&self, failure: Error) -> Error {
        match InsideAddress::behind(&failure) {
            Some(inside) => inside.refused(&self.first, &self.url),
            None => failure,
        }
    }

    /// The URL that is asked now.
    pub(crate) const fn url(&self) -> &Url {
        &self.url
    }

    /// Where the answer of the URL asked now leads; none when it is no redirect. That URL is the one asked now, from here on.
    ///
    /// # Errors
    /// [`Kind::WrongAnswer`](super::Kind::WrongAnswer): a redirect that leads nowhere, that leaves TLS (what was asked for by
    /// TLS is not taken from whoever can meddle with plain HTTP) or HTTP, that leads out of its [`Reach`], or one too many.
    pub(crate) fn next(&mut self, status: StatusCode, headers: &HeaderMap) -> Result<Option<&Url>, Error> {
        if !follows(status) {
            return Ok(None);
        }
        let wrong = |why: String| Error::wrong(&self.url, why);
        let location = headers.get(LOCATION).map(HeaderValue::as_bytes).unwrap_or_default();
        if location.is_empty() {
            return Err(wrong(format!("{status} without a Location")));
        }
        // Some servers send bytes that should have been escaped; joining escapes them.
        let location = String::from_utf8_lossy(location);
        let next = self.url.join(&location).map_err(|error| {
            let shown = shown_location(&location);
            wrong(format!("a redirect to {shown:?}: {error}")).caused_by(error)
        })?;
        match (self.url.scheme(), next.scheme()) {
            (_, "https") | ("http", "http") => {}
            ("https", "http") => return Err(wrong("a redirect from https to plain http".to_owned()).lasting()),
            (_, other) => return Err(wrong(format!("a redirect to {other}, which is no HTTP")).lasting()),
        }
        if self.hops == MOST_REDIRECTS {
            return Err(wrong(format!("more than {MOST_REDIRECTS} redirects")).lasting());
        }
        self.reach().check(&self.first, &next)?;
        self.hops += 1;
        self.url = next;
        Ok(Some(&self.url))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(from: &str, status: u16, location: Option<&[u8]>) -> Result<Option<String>, Error> {
        let mut headers = HeaderMap::new();
        if let Some(location) = location {
            headers.insert(LOCATION, HeaderValue::from_bytes(location).unwrap());
        }
        let mut chain = Redirects::from(Url::parse(from).unwrap());
        let next = chain.next(StatusCode::from_u16(status).unwrap(), &headers)?;
        Ok(next.map(ToString::to_string))
    }

    #[test]
    fn locations_are_followed() {
        for (from, to, reached) in [
            ("https://a/x", "https://b/y", Some("https://b/y")),
            ("http://a/x", "https://a/x", Some("https://a/x")),
            ("http://a/x", "http://b/x?s=1", Some("http://b/x?s=1")),
            ("http://a/d/x", "y", Some("http://a/d/y")),
            ("http://a/d/x", "//b/y", Some("http://b/y")),
            ("http://a/d/x", "/ä", Some("http://a/%C3%A4")),
            ("https://a/x", "http://a/x", None),
            ("https://a/x", "ftp://a/x", None),
            ("http://a/x", "file:///etc/passwd", None),
            ("http://a/x", "http://me:word@[bad", None),
            ("http://a/x", "//me:word@[bad?word", None),
            ("http://a/x", "", None),
        ] {
            match (step(from, 307, Some(to.as_bytes())), reached) {
                (Ok(Some(found)), Some(reached)) => assert_eq!(found, reached),
                (Err(error), None) => assert!(!format!("{error} {error:?}").contains("word@"), "{error}"),
                (found, _) => panic!("{from} {to}: {found:?}"),
            }
        }
        assert!(step("http://a/x", 302, None).is_err());
    }

    #[test]
    fn who_is_outside_leads_nowhere_inside() {
        let mut headers = HeaderMap::new();
        headers.insert(LOCATION, "http://10.0.0.1/x".parse().unwrap());
        let next = |peer: &str, allowed: bool| {
            let mut chain = Redirects::from(Url::parse("http://a.example/x").unwrap());
            assert_eq!(chain.reach(), Reach::Anywhere, "a person named it");
            chain.answered(Some(peer.parse().unwrap()), allowed);
            chain.next(StatusCode::FOUND, &headers).map(|next| next.is_some())
        };
        assert!(next("10.0.0.7", false).unwrap() && next("1.1.1.1", true).unwrap());
        let error = next("1.1.1.1", false).unwrap_err();
        assert!(error.is_lasting(), "{error}");
        // Over another one outside, it is still the first that counts.
        headers.insert(LOCATION, "http://b.example/x".parse().unwrap());
        let mut chain = Redirects::from(Url::parse("http://a.example/x").unwrap());
        chain.answered(Some("1.1.1.1".parse().unwrap()), false);
        assert!(chain.next(StatusCode::FOUND, &headers).unwrap().is_some());
        chain.answered(Some("10.0.0.1".parse().unwrap()), false);
        assert_eq!(chain.reach(), Reach::Public);
    }

    #[test]
    fn not_every_3xx_leads_elsewhere() {
        for status in [200, 206, 300, 304, 305, 404] {
            assert_eq!(step("http://a/x", status, Some(b"/y")).unwrap(), None, "{status}");
        }
        for status in [301, 302, 303, 307, 308] {
            assert!(step("http://a/x", status, Some(b"/y")).unwrap().is_some(), "{status}");
        }
    }

    #[test]
    fn a_loop_ends_and_the_last_answer_is_looked_at() {
        let mut headers = HeaderMap::new();
        headers.insert(LOCATION, "/x".parse().unwrap());
        let mut chain = Redirects::from(Url::parse("http://a/x").unwrap());
        for _ in 0..MOST_REDIRECTS {
            assert!(chain.next(StatusCode::FOUND, &headers).unwrap().is_some());
        }
        assert!(chain.next(StatusCode::PARTIAL_CONTENT, &headers).unwrap().is_none());
        let error = chain.next(StatusCode::FOUND, &headers).unwrap_err();
        assert!(error.to_string().contains("more than 10 redirects"), "{error}");
    }
}
