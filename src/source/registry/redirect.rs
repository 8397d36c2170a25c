//! Where a registry sends one for a blob's bytes. In: an answer that may be a redirect. Out: the answer at its end. What is
//! secret stays with the endpoint's own origin.

use std::sync::OnceLock;

use reqwest::header::AUTHORIZATION;
use reqwest::{Client, RequestBuilder, Response};
use url::Url;

use super::session::{Grant, Session};
use crate::http::tls::Trust;
use crate::http::{self, Redirects};
use crate::source::error::SourceError;

impl Session {
    /// Follows the redirects of an answer to a GET. `Authorization` and the endpoint's headers stay with its own origin.
    /// Also returns where it ended, if that is elsewhere.
    pub(super) async fn follow_redirects(
        &self,
        at: usize,
        from: &Url,
        mut response: Response,
        grant: &Grant,
        make: &(dyn Fn(&Client, Url) -> RequestBuilder + Send + Sync),
    ) -> Result<(Response, Option<Url>), SourceError> {
        let mut chain = Redirects::from(from.clone());
        while let Some(url) = chain.next(response.status(), response.headers())?.cloned() {
            let own = url.origin() == from.origin();
            let mut request = make(&self.client_for(at, own, &url)?, url.clone());
            if own {
                for (name, value) in self.spec.endpoints[at].headers() {
                    request = request.header(name, value);
                }
                if let Some(value) = &grant.authorization {
                    request = request.header(AUTHORIZATION, value.clone());
                }
            }
            response = self.exchange(&url, request).await?;
        }
        let url = chain.url().clone();
        Ok((response, Some(url).filter(|url| url != from)))
    }

    /// The endpoint's client for its own origin, and one that shows nothing to others.
    fn client_for(&self, at: usize, own: bool, url: &Url) -> Result<Client, SourceError> {
        static REDIRECT_CLIENT: OnceLock<Client> = OnceLock::new();
        let secure = url.scheme() == "https";
        if own {
            return self.client(at, secure);
        }
        let trust = self.spec.endpoints[at].trust.for_redirects();
        let kept = if trust == Trust::default() {
            &REDIRECT_CLIENT
        } else {
            self.redirect_client(at)
        };
        if let Some(client) = kept.get() {
            return Ok(client.clone());
        }
        let client = http::build(&trust, secure, &self.spec.http.timeouts)?;
        if secure {
            return Ok(kept.get_or_init(|| client).clone());
        }
        Ok(client)
    }

    /// Asks where a redirect has led before.
    pub(super) async fn ask_target(
        &self,
        at: usize,
        url: &Url,
        make: &(dyn Fn(&Client, Url) -> RequestBuilder + Send + Sync),
    ) -> Result<Response, SourceError> {
        self.exchange(url, make(&self.client_for(at, false, url)?, url.clone()))
            .await
    }
}
