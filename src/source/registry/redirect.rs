//! Where a registry sends one for a blob's bytes. In: an answer that may be a redirect. Out: the answer at its end. What is
//! secret stays with the endpoint's own origin.

use reqwest::header::AUTHORIZATION;
use reqwest::{Client, RequestBuilder, Response};
use url::Url;

use super::session::{Grant, Session};
use crate::http::{self, Reach, Redirects};
use crate::source::error::SourceError;

impl Session {
    /// Follows the redirects of an answer to a GET. `Authorization` and the endpoint's headers stay with its own origin.
    /// Also returns where it ended, if that is elsewhere, and how far it was allowed to lead.
    pub(super) async fn follow_redirects(
        &self,
        at: usize,
        from: &Url,
        mut response: Response,
        grant: &Grant,
        make: &(dyn Fn(&Client, Url) -> RequestBuilder + Send + Sync),
    ) -> Result<(Response, Option<(Url, Reach)>), SourceError> {
        let mut chain = Redirects::from(from.clone());
        chain.answered(http::peer(from, &response), self.spec.http.private_redirects);
        while let Some(url) = chain.next(response.status(), response.headers())?.cloned() {
            let own = url.origin() == from.origin();
            let mut request = make(&self.client_for(at, own, &url, chain.reach())?, url.clone());
            if own {
                for (name, value) in self.spec.endpoints[at].headers() {
                    request = request.header(name, value);
                }
                if let Some(value) = &grant.authorization {
                    request = request.header(AUTHORIZATION, value.clone());
                }
            }
            let sent = http::send(&url, request, &self.spec.http.timeouts).await;
            response = sent.map_err(|failure| chain.explain(failure))?;
        }
        let (url, reach) = (chain.url().clone(), chain.reach());
        Ok((response, Some((url, reach)).filter(|(url, _)| url != from)))
    }

    /// The endpoint's client for its own origin, and one that shows nothing to others; none goes further than `reach`.
    fn client_for(&self, at: usize, own: bool, url: &Url, reach: Reach) -> Result<Client, SourceError> {
        let (secure, reach) = (url.scheme() == "https", reach.unless_proxied(url));
        let endpoint = &self.spec.endpoints[at];
        Ok(match (own, reach) {
            (true, Reach::Anywhere) => self.client(at, secure)?,
            (true, Reach::Public) => http::client_within(reach, &endpoint.trust, secure, &self.spec.http.timeouts)?,
            (false, _) => {
                http::client_within(reach, &endpoint.trust.for_redirects(), secure, &self.spec.http.timeouts)?
            }
        })
    }

    /// Asks another place that an answer of the endpoint at `from` has named, as far as `reach`.
    pub(super) async fn ask_target(
        &self,
        at: usize,
        from: &Url,
        (url, reach): (&Url, Reach),
        make: &(dyn Fn(&Client, Url) -> RequestBuilder + Send + Sync),
    ) -> Result<Response, SourceError> {
        reach.check(from, url)?;
        let request = make(&self.client_for(at, false, url, reach)?, url.clone());
        let sent = http::send(url, request, &self.spec.http.timeouts).await;
        let chain = Redirects::resumed(from.clone(), url.clone(), reach);
        Ok(sent.map_err(|failure| chain.explain(failure))?)
    }
}
