//! Where a registry sends one for a blob's bytes. In: an answer that may be a redirect. Out: the answer at its end. What is
//! secret stays with the endpoint's own origin.

use std::sync::OnceLock;

use reqwest::header::{AUTHORIZATION, LOCATION};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use url::Url;

use super::session::{Grant, Session};
use crate::source::http::Failure;
use crate::source::tls::Trust;
use crate::source::{SourceError, net};

/// Registry, storage, region, object: four hops are seen in the wild.
const MOST_REDIRECTS: usize = 8;

impl Session {
    /// Follows the redirects of an answer to a GET. `Authorization` and the endpoint's headers stay with its own origin.
    /// Also returns where it ended, if that is elsewhere.
    pub(super) async fn chase(
        &self,
        at: usize,
        from: &Url,
        mut response: Response,
        grant: &Grant,
        make: &(dyn Fn(&Client, Url) -> RequestBuilder + Send + Sync),
    ) -> Result<(Response, Option<Url>), Failure> {
        let mut url = from.clone();
        for _ in 0..MOST_REDIRECTS {
            if !response.status().is_redirection() || response.status() == StatusCode::NOT_MODIFIED {
                return Ok((response, Some(url).filter(|url| url != from)));
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next = location.and_then(|location| url.join(location).ok());
            let next = next.ok_or_else(|| Failure::wrong(&url, "a redirect that leads nowhere"))?;
            if url.scheme() == "https" && next.scheme() != "https" {
                return Err(Failure::wrong(&url, "a redirect from https to plain http"));
            }
            url = next;
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
        Err(Failure::wrong(from, "redirects without end"))
    }

    /// The endpoint's client for its own origin, and one that shows nothing to others.
    fn client_for(&self, at: usize, own: bool, url: &Url) -> Result<Client, SourceError> {
        static STRANGERS: OnceLock<Client> = OnceLock::new();
        let secure = url.scheme() == "https";
        if own {
            return self.client(at, secure);
        }
        let trust = self.spec.endpoints[at].trust.elsewhere();
        let kept = if trust == Trust::default() {
            &STRANGERS
        } else {
            self.strangers(at)
        };
        if let Some(client) = kept.get() {
            return Ok(client.clone());
        }
        let client = net::client(&trust, secure, &self.spec.patience)?;
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
    ) -> Result<Response, Failure> {
        self.exchange(url, make(&self.client_for(at, false, url)?, url.clone()))
            .await
    }
}
