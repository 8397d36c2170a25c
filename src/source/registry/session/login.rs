//! Logging in. In: an endpoint, what is to be done there, and how it refused. Out: what to send along, until when it is good.
//!
//! Credentials go to the endpoint that they belong to and to the token server it names, never to where a redirect leads.

use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Response, StatusCode};
use url::Url;

use super::super::answer::{LONGEST_ANSWER, body, explanation, refusal};
use super::super::challenge::{Challenge, Token, TokenAnswer};
use super::super::login::Login;
use super::{Grant, Need, Session, lock};
use crate::http::{self, Reach, Redirects, Secret, shown_url};
use crate::source::error::SourceError;

impl Session {
    pub(super) async fn denied(&self, at: usize, url: &Url, response: Response) -> SourceError {
        let status = response.status();
        let why = explanation(response, &self.spec.http).await;
        let why = why.unwrap_or_else(|| status.to_string());
        let basic = lock(&self.hosts[at].state).challenge == Some(Challenge::Basic);
        SourceError::Denied {
            name: shown_url(url),
            why: if basic && status == StatusCode::UNAUTHORIZED {
                format!("the registry does not take this user and password: {why}")
            } else {
                why
            },
        }
    }

    /// What a request has to show, from the cache if that is good enough. `refused` are logins that were shown in vain.
    pub(in crate::source::registry) async fn grant(
        &self,
        at: usize,
        need: Need,
        url: &Url,
        stale: Option<&HeaderValue>,
        refused: &[Login],
    ) -> Result<Grant, SourceError> {
        let host = &self.hosts[at];
        if let Some(grant) = self.cached(at, need, stale)? {
            return Ok(grant);
        }
        let _alone = host.entering.lock().await;
        // The request that held the lock before may have brought it.
        if let Some(grant) = self.cached(at, need, stale)? {
            return Ok(grant);
        }
        let known = lock(&host.state).login.clone().filter(|login| !refused.contains(login));
        let mut failure = None;
        if let Some(login) = &known {
            match self.enter(at, need, url, login, stale).await {
                Err(denied @ SourceError::Denied { .. }) => failure = Some(denied),
                other => return other,
            }
        }
        // Helpers hand out passwords that expire, and people change files.
        for login in self.look_up(at).await? {
            if refused.contains(&login) || known.as_ref() == Some(&login) {
                continue;
            }
            lock(&host.state).login = Some(login.clone());
            match self.enter(at, need, url, &login, stale).await {
                Err(denied @ SourceError::Denied { .. }) => failure = failure.or(Some(denied)),
                other => return other,
            }
        }
        Err(failure.unwrap_or_else(|| SourceError::Denied {
            name: shown_url(url),
            why: "no login that is known works".to_owned(),
        }))
    }

    /// The grant that is cached and not known to be stale. Where no challenge was seen, one without credentials.
    fn cached(&self, at: usize, need: Need, stale: Option<&HeaderValue>) -> Result<Option<Grant>, SourceError> {
        let known = lock(&self.hosts[at].state);
        let cached = match &known.challenge {
            None => Some(Grant::default()),
            Some(Challenge::Basic) => match &known.login {
                Some(login) => basic(login)?.map(|authorization| Grant {
                    authorization: Some(authorization),
                    ..Grant::default()
                }),
                None => None,
            },
            Some(Challenge::Bearer { .. }) => match known.tokens.get(&self.scope(need)) {
                Some(token) if SystemTime::now() < token.until => Some(Grant {
                    authorization: Some(bearer(&token.secret)?),
                    until: Some(token.until),
                    fresh: false,
                    login: None,
                }),
                _ => None,
            },
        };
        Ok(cached.filter(|grant| known.challenge.is_none() || grant.authorization.as_ref() != stale))
    }

    fn scope(&self, need: Need) -> String {
        let actions = match need {
            Need::Pull | Need::Resolve => "pull",
            Need::Push => "pull,push",
        };
        format!("repository:{}:{actions}", self.spec.repository)
    }

    /// Looks up how to log in, on a thread that may wait for helpers: what is to be tried, in this order.
    pub(super) async fn look_up(&self, at: usize) -> Result<Vec<Login>, SourceError> {
        let endpoint = &self.spec.endpoints[at];
        // What was given is for the registry that was named, not for a mirror that stands in for it.
        if let (Some(login), None) = (&self.spec.keyring.given, &endpoint.stands_for) {
            return Ok(vec![login.clone()]);
        }
        let host = if endpoint.stands_for.is_none() {
            self.spec.host.clone()
        } else {
            endpoint.host()
        };
        let (keyring, repository) = (self.spec.keyring.clone(), self.spec.repository.clone());
        let looking = tokio::task::spawn_blocking(move || keyring.logins(&host, &repository)).await;
        looking.map_err(|error| http::Error::setup("the search for credentials", error))?
    }

    /// Gets what the endpoint's challenge asks for.
    async fn enter(
        &self,
        at: usize,
        need: Need,
        url: &Url,
        login: &Login,
        stale: Option<&HeaderValue>,
    ) -> Result<Grant, SourceError> {
        let denied = |why: &str| SourceError::Denied {
            name: shown_url(url),
            why: why.to_owned(),
        };
        let (challenge, reach) = {
            let known = lock(&self.hosts[at].state);
            (known.challenge.clone(), known.reach)
        };
        let granted = |authorization, until| Grant {
            authorization: Some(authorization),
            until,
            fresh: true,
            login: Some(login.clone()),
        };
        match (challenge, login) {
            (None, _) => Ok(Grant::default()),
            (Some(_), Login::Bearer(token)) => match bearer(token)? {
                same if Some(&same) == stale => Err(denied("the token from the credentials file does not work")),
                authorization => Ok(granted(authorization, None)),
            },
            (Some(Challenge::Basic), Login::Password { .. }) => match basic(login)? {
                Some(authorization) if Some(&authorization) != stale => Ok(granted(authorization, None)),
                _ => Err(denied("the registry does not take this user and password")),
            },
            (Some(Challenge::Basic), _) => Err(denied("the registry wants a user and a password")),
            (Some(Challenge::Bearer { realm, service, scope }), login) => {
                if url.scheme() == "https" && realm.scheme() != "https" {
                    return Err(denied("its token server does not speak TLS"));
                }
                let wanted = self.scope(need);
                // A mirror may call the repository by another name than we do; only for pulling is its word enough.
                let scope = scope.filter(|scope| {
                    need != Need::Push || scope.rsplit(':').next().is_some_and(|actions| actions.contains("push"))
                });
                let scope = scope.unwrap_or_else(|| wanted.clone());
                reach.check(url, &realm)?;
                let token = self.token(at, &realm, reach, service.as_deref(), &scope, login).await;
                let token = token.map_err(|failure| match failure {
                    SourceError::Http(failure) => Redirects::resumed(url.clone(), realm.clone(), reach)
                        .explain(failure)
                        .into(),
                    other => other,
                })?;
                let authorization = bearer(&token.secret)?;
                let until = Some(token.until);
                lock(&self.hosts[at].state).tokens.insert(wanted, token);
                Ok(granted(authorization, until))
            }
        }
    }

    /// Asks a token server: by GET with a password or without, by POST with an identity token.
    async fn token(
        &self,
        at: usize,
        realm: &Url,
        reach: Reach,
        service: Option<&str>,
        scope: &str,
        login: &Login,
    ) -> Result<Token, SourceError> {
        let client = self.token_client(at, realm, reach)?;
        let asked = SystemTime::now();
        let mut pairs: Vec<(&str, &str)> = service.map(|service| ("service", service)).into_iter().collect();
        let request = if let Login::Identity(secret) = login {
            pairs.extend([
                ("scope", scope),
                ("grant_type", "refresh_token"),
                ("client_id", "tarblk"),
                ("refresh_token", secret.reveal()),
            ]);
            let form = url::form_urlencoded::Serializer::new(String::new())
                .extend_pairs(pairs)
                .finish();
            client
                .post(realm.clone())
                .header(reqwest::header::CONTENT_TYPE, "application/x-www-form-urlencoded")
                .body(form)
        } else {
            let mut url = realm.clone();
            pairs.extend(scope.split(' ').map(|one| ("scope", one)));
            url.query_pairs_mut().extend_pairs(pairs);
            if let Login::Password { user, .. } = login {
                url.query_pairs_mut().append_pair("account", user);
            }
            let request = client.get(url);
            match basic(login)? {
                Some(value) => request.header(AUTHORIZATION, value),
                None => request,
            }
        };
        let response = self.exchange(realm, request).await?;
        let status = response.status();
        if !status.is_success() {
            if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS {
                // Neither 404 nor 410: see above.
                return Err(refusal(realm, response, &self.spec.http, "").await);
            }
            let why = explanation(response, &self.spec.http).await;
            let why = why.unwrap_or_else(|| format!("the token server says {status}"));
            return Err(SourceError::Denied {
                name: shown_url(realm),
                why,
            });
        }
        let bytes = body(realm, response, LONGEST_ANSWER, &self.spec.http).await?;
        let answer =
            TokenAnswer::parse(&bytes).ok_or_else(|| SourceError::wrong(realm, "an answer with no token in it"))?;
        if !answer.refresh_token.is_empty() && matches!(login, Login::Identity(_)) {
            let login = Login::Identity(Secret::new(answer.refresh_token.clone()));
            lock(&self.hosts[at].state).login = Some(login);
        }
        answer
            .token(asked)
            .ok_or_else(|| SourceError::wrong(realm, "an answer with no token in it"))
    }
}

fn basic(login: &Login) -> Result<Option<HeaderValue>, SourceError> {
    let Login::Password { user, password } = login else {
        return Ok(None);
    };
    let pair = STANDARD.encode(format!("{user}:{}", password.reveal()));
    sensitive(&format!("Basic {pair}")).map(Some)
}

fn bearer(token: &Secret) -> Result<HeaderValue, SourceError> {
    sensitive(&format!("Bearer {}", token.reveal()))
}

fn sensitive(text: &str) -> Result<HeaderValue, SourceError> {
    let mut value = HeaderValue::from_str(text).map_err(|_| SourceError::Credentials {
        place: "the credentials".to_owned(),
        why: "they hold characters that cannot be sent".to_owned(),
    })?;
    value.set_sensitive(true);
    Ok(value)
}
