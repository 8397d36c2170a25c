//! Requests to one repository, wherever its registry's endpoints are. In: what to ask. Out: the answer, after whatever
//! logging in it took.
//!
//! A session knows how each endpoint wants to be asked and keeps the tokens, which all layers of a repository share: one
//! refresh, however many requests found out that it is needed. Credentials go to the endpoint they belong to and to the
//! token server it names, never to where a redirect leads.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde::{Deserialize, Serialize};
use url::Url;

use super::answer::{LONGEST_ANSWER, body, explanation, refusal};
use super::challenge::{Challenge, Token, TokenAnswer};
use super::credentials::Keyring;
use super::hosts::Endpoint;
use super::login::Login;
use crate::http::{self, HttpOptions, Kind, Opener, Reach, Redirects, Secret, shown_url};
use crate::source::error::SourceError;

/// An endpoint that failed is not asked first again for this long.
const DOWN: Duration = Duration::from_secs(60);

/// What a request needs to be allowed to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// Read by digest.
    Pull,
    /// Find out what a tag means.
    Resolve,
    /// Write.
    Push,
}

/// A repository and how it is talked to; goes to another process as it is. Two that are equal are one session.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct RepositorySpec {
    /// The registry as it was named.
    pub(super) host: String,
    pub(super) repository: String,
    pub(super) endpoints: Vec<Endpoint>,
    pub(super) keyring: Keyring,
    pub(super) http: HttpOptions,
}

/// See the module.
pub(super) struct Session {
    pub(super) spec: RepositorySpec,
    hosts: Vec<Host>,
}

#[derive(Default)]
struct Host {
    /// For itself alone, and what opens connections ahead.
    clients: OnceLock<(Client, Opener)>,
    state: Mutex<State>,
    /// Held while one request finds out how to log in, so that the others wait for it.
    entering: tokio::sync::Mutex<()>,
}

/// What is known of an endpoint.
#[derive(Clone, Default, Serialize, Deserialize)]
pub(super) struct State {
    /// Whether it was asked anything: then no challenge means that none is needed.
    asked: bool,
    /// Whether it has ever answered with what was asked for. Then an absence is one.
    admitted: bool,
    /// Whether it was asked what it wants, apart from all that is in it (`GET /v2/`).
    door_asked: bool,
    /// Its base, once it is known whether it speaks TLS.
    base: Option<Url>,
    challenge: Option<Challenge>,
    /// Where the token server that the challenge names may be.
    #[serde(default)]
    reach: Reach,
    login: Option<Login>,
    tokens: HashMap<String, Token>,
    #[serde(skip)]
    down: Option<Instant>,
}

/// How much is done to get an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effort {
    /// Logging in, trying again, asking others.
    Full,
    /// One request, for what is optional: whatever it is answered, nothing is learned from it about how to be let in, because a
    /// part of a registry that is not there may answer anything.
    Once,
}

/// Permission for a request.
#[derive(Clone, Default)]
pub(super) struct Grant {
    pub(super) authorization: Option<HeaderValue>,
    pub(super) until: Option<SystemTime>,
    /// Whether it was given just now.
    fresh: bool,
    /// The login that it was given for, if it was given just now.
    login: Option<Login>,
}

impl Session {
    /// The session of `spec`; the same one as long as it is held anywhere in this process.
    pub(super) fn shared(spec: RepositorySpec, states: Option<Vec<State>>) -> Arc<Self> {
        /// Few: one for each repository that is read from or written to now, and for each set of credentials.
        static SESSIONS: Mutex<Vec<Weak<Session>>> = Mutex::new(Vec::new());
        let mut sessions = lock(&SESSIONS);
        sessions.retain(|session| session.strong_count() > 0);
        let mut held = sessions.iter().filter_map(Weak::upgrade);
        if let Some(session) = held.find(|session| session.spec == spec) {
            return session;
        }
        let mut states = states.unwrap_or_default().into_iter();
        let hosts = spec.endpoints.iter().map(|_| Host {
            state: Mutex::new(states.next().unwrap_or_default()),
            ..Host::default()
        });
        let session = Arc::new(Self {
            hosts: hosts.collect(),
            spec,
        });
        sessions.push(Arc::downgrade(&session));
        session
    }

    /// One that shares nothing with others and knows of no token.
    pub(super) fn alone(spec: RepositorySpec) -> Arc<Self> {
        Arc::new(Self {
            hosts: spec.endpoints.iter().map(|_| Host::default()).collect(),
            spec,
        })
    }

    /// What another process has to know.
    pub(super) fn states(&self) -> Vec<State> {
        self.hosts.iter().map(|host| lock(&host.state).clone()).collect()
    }

    /// For messages.
    pub(super) fn name(&self) -> String {
        format!("{}/{}", self.spec.host, self.spec.repository)
    }

    /// The endpoints that may be asked for this, those that failed lately last.
    pub(super) fn order(&self, need: Need) -> Vec<usize> {
        let able = |endpoint: &Endpoint| match need {
            Need::Pull => endpoint.pull,
            Need::Resolve => endpoint.resolve,
            Need::Push => endpoint.push,
        };
        let able = self
            .spec
            .endpoints
            .iter()
            .enumerate()
            .filter(|(_, endpoint)| able(endpoint));
        let (up, down): (Vec<_>, Vec<_>) = able.map(|(at, _)| at).partition(|at| !self.is_down(*at));
        up.into_iter().chain(down).collect()
    }

    fn is_down(&self, at: usize) -> bool {
        lock(&self.hosts[at].state)
            .down
            .is_some_and(|since| since.elapsed() < DOWN)
    }

    /// Whether it is known how to ask this endpoint.
    pub(super) fn is_known(&self, at: usize) -> bool {
        lock(&self.hosts[at].state).asked
    }

    /// An endpoint's base, if it is known without asking.
    pub(super) fn known_base(&self, at: usize) -> Option<Url> {
        let endpoint = self.spec.endpoints.get(at)?;
        if endpoint.scheme_unknown {
            return lock(&self.hosts[at].state).base.clone();
        }
        Some(endpoint.base.clone())
    }

    pub(super) fn set_down(&self, at: usize, failure: &SourceError) {
        if self.spec.endpoints.len() > 1 {
            let name = shown_url(&self.spec.endpoints[at].base);
            log::info!("{name}: {failure}; asking others for {DOWN:?}");
            self.avoid(at);
        }
    }

    /// Others are asked first for a while.
    pub(super) fn avoid(&self, at: usize) {
        lock(&self.hosts[at].state).down = Some(Instant::now());
    }

    /// The client for an endpoint's own origin.
    pub(super) fn client(&self, at: usize, secure: bool) -> Result<Client, SourceError> {
        Ok(self.clients(at, secure)?.0)
    }

    fn clients(&self, at: usize, secure: bool) -> Result<(Client, Opener), SourceError> {
        if let Some(clients) = self.hosts[at].clients.get() {
            return Ok(clients.clone());
        }
        let clients = http::build_with_opener(&self.spec.endpoints[at].trust, secure, &self.spec.http.timeouts)?;
        Ok(self.hosts[at].clients.get_or_init(|| clients).clone())
    }

    /// The client for the token server that an endpoint names, which is trusted like the endpoint itself, and may be where that
    /// may lead.
    fn token_client(&self, at: usize, realm: &Url, reach: Reach) -> Result<Client, SourceError> {
        let (endpoint, secure) = (&self.spec.endpoints[at], realm.scheme() == "https");
        let base = lock(&self.hosts[at].state).base.clone();
        let own = base.as_ref().unwrap_or(&endpoint.base).origin() == realm.origin();
        let reach = reach.unless_proxied(realm);
        if own && reach == Reach::Anywhere {
            return self.client(at, secure);
        }
        let client = http::client_within(reach, &endpoint.trust, secure, &self.spec.http.timeouts)?;
        Ok(client)
    }

    /// Where the server that gave this answer to a request to `url` may lead.
    pub(super) fn reach_of(&self, url: &Url, response: &Response) -> Reach {
        Reach::of_server(url, http::peer(url, response), self.spec.http.private_redirects)
    }

    /// The URL of something in the repository: `manifests/latest`.
    pub(super) fn url(&self, at: usize, what: &str) -> Url {
        let endpoint = &self.spec.endpoints[at];
        let mut url = lock(&self.hosts[at].state)
            .base
            .clone()
            .unwrap_or_else(|| endpoint.base.clone());
        let (what, query) = what
            .split_once('?')
            .map_or((what, None), |(what, query)| (what, Some(query)));
        url.set_path(&format!("{}{}/{what}", url.path(), self.spec.repository));
        url.set_query(query);
        if let Some(registry) = &endpoint.stands_for {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        url
    }

    /// Asks an endpoint for something in the repository; see [`send`](Self::send). Also returns the URL that was asked.
    ///
    /// On this machine registries with and without TLS are found at the same kind of address. The first request tells which it
    /// is: it holds no credentials, because no challenge has asked for them yet.
    pub(super) async fn ask(
        &self,
        at: usize,
        need: Need,
        effort: Effort,
        what: &str,
        stale: Option<HeaderValue>,
        make: &(dyn Fn(&Client, Url) -> RequestBuilder + Send + Sync),
    ) -> Result<(Url, Response, Grant), SourceError> {
        // What is the first question of all has to find out how to ask.
        if effort == Effort::Once && self.is_known(at) {
            let url = self.url(at, what);
            let (response, grant) = self.send_once(at, need, &url, make).await?;
            return Ok((url, response, grant));
        }
        let mut guessed = false;
        loop {
            let url = self.url(at, what);
            let unsure = self.spec.endpoints[at].scheme_unknown && lock(&self.hosts[at].state).base.is_none();
            let answer = self.send(at, need, &url, stale.clone(), make).await;
            if unsure {
                let speaks_tls = match &answer {
                    // What servers answer to plain HTTP on their TLS port.
                    Ok((response, _)) => response.status() == StatusCode::BAD_REQUEST,
                    Err(failure) => failure.http().is_some_and(|error| error.kind() == Kind::NotHttp),
                };
                let mut base = self.spec.endpoints[at].base.clone();
                if speaks_tls && base.set_scheme("https").is_ok() {
                    lock(&self.hosts[at].state).base = Some(base);
                    guessed = true;
                    continue;
                }
                if answer.is_ok() {
                    lock(&self.hosts[at].state).base = Some(base);
                }
            }
            if guessed
                && matches!(&answer, Err(failure) if failure.http().is_some_and(|error| matches!(error.kind(), Kind::Unreachable | Kind::NotHttp)))
            {
                // Perhaps it only hung up the first time: the next request finds out anew.
                lock(&self.hosts[at].state).base = None;
            }
            return answer.map(|(response, grant)| (url, response, grant));
        }
    }

    /// Opens a connection to an endpoint, for a request to come. Does nothing where it is not known whether that speaks TLS.
    pub(super) async fn warm_up(&self, at: usize) {
        let Some(base) = self.known_base(at) else { return };
        if let Ok((_, opener)) = self.clients(at, base.scheme() == "https") {
            opener.open(base).await;
        }
    }

    /// Asks an endpoint how it wants to be asked ("Determining Support"), where there are credentials that were never shown: some
    /// registries hide what is in them from strangers, with a 403 or 404 and no word on how to be let in. Whether that is known
    /// now and was not before.
    async fn ask_at_the_door(&self, at: usize, status: StatusCode) -> bool {
        let host = &self.hosts[at];
        let is_known = || {
            let state = lock(&host.state);
            (state.challenge.is_some(), state.door_asked, state.admitted)
        };
        let _alone = host.entering.lock().await;
        match is_known() {
            // The request that held the lock before found out.
            (true, ..) => return true,
            (_, true, _) => return false,
            (.., true) if status == StatusCode::NOT_FOUND => return false,
            _ => {}
        }
        let known = lock(&host.state).login.clone();
        let logins = match known {
            Some(login) => Ok(vec![login]),
            None => self.look_up(at).await,
        };
        let logins = logins.unwrap_or_default();
        if logins.iter().all(|login| *login == Login::Anonymous) {
            return false;
        }
        {
            let mut state = lock(&host.state);
            state.door_asked = true;
            if let [only] = &logins[..] {
                state.login = Some(only.clone());
            }
        }
        let endpoint = &self.spec.endpoints[at];
        let base = lock(&host.state).base.clone();
        let mut url = base.unwrap_or_else(|| endpoint.base.clone());
        if let Some(registry) = &endpoint.stands_for {
            url.query_pairs_mut().append_pair("ns", registry);
        }
        let Ok(request) = self.request(at, &url, None, &|client, url| client.get(url)) else {
            return false;
        };
        let Ok(response) = self.exchange(&url, request).await else {
            return false;
        };
        self.learn(at, &url, &response);
        let mut state = lock(&host.state);
        if let Some(Challenge::Bearer { scope, .. }) = &mut state.challenge {
            // Whatever it is for, it is not for this repository.
            *scope = None;
        }
        state.challenge.is_some()
    }

    /// Notes what an answer says about how to be let in.
    fn learn(&self, at: usize, url: &Url, response: &Response) {
        let status = response.status();
        let mut state = lock(&self.hosts[at].state);
        state.asked = true;
        state.admitted |= status.is_success() || status.is_redirection();
        if status == StatusCode::UNAUTHORIZED
            && let Some(challenge) = Challenge::of(response.headers(), url)
        {
            state.challenge = Some(challenge);
            state.reach = self.reach_of(url, response);
        }
    }

    /// Sends a request with a deadline. `shown` is for messages.
    pub(super) async fn exchange(&self, shown: &Url, request: RequestBuilder) -> Result<Response, SourceError> {
        Ok(http::send(shown, request, &self.spec.http.timeouts).await?)
    }

    /// Sends a request to an endpoint, logging in as far as it asks for that. Any status that is not a refusal comes back;
    /// redirects are not followed. `stale` is an `Authorization` that is known not to work any more.
    pub(super) async fn send(
        &self,
        at: usize,
        need: Need,
        url: &Url,
        stale: Option<HeaderValue>,
        make: &(dyn Fn(&Client, Url) -> RequestBuilder + Send + Sync),
    ) -> Result<(Response, Grant), SourceError> {
        let mut stale = stale;
        // Where several logins are known, all are shown before a refusal is the answer.
        let mut refused_logins = Vec::new();
        let mut refusal = None;
        loop {
            let granted = self.grant(at, need, url, stale.as_ref(), &refused_logins).await;
            // What the registry itself said tells more than that there is nothing left to show.
            let grant = match (granted, refusal.take()) {
                (Err(SourceError::Denied { .. }), Some(said)) => return Err(said),
                (granted, _) => granted?,
            };
            let request = self.request(at, url, grant.authorization.as_ref(), make)?;
            let response = self.exchange(url, request).await?;
            let status = response.status();
            self.learn(at, url, &response);
            let refused = status == StatusCode::UNAUTHORIZED || status == StatusCode::FORBIDDEN;
            let hidden = (refused || status == StatusCode::NOT_FOUND)
                && grant.authorization.is_none()
                && lock(&self.hosts[at].state).challenge.is_none();
            if hidden && self.ask_at_the_door(at, status).await {
                continue;
            }
            if !refused {
                return Ok((response, grant));
            }
            // Refused without having shown anything: show what there is. Refused what was kept: get it anew. Refused what is
            // new: that is the answer.
            if let (Some(login), Some(_)) = (&grant.login, &self.spec.keyring.kept) {
                refused_logins.push(login.clone());
                lock(&self.hosts[at].state).login.take_if(|known| known == login);
                stale = grant.authorization;
                refusal = Some(self.denied(at, url, response).await);
                continue;
            }
            let next = match grant.authorization {
                Some(_) if grant.fresh => None,
                None if status == StatusCode::FORBIDDEN || lock(&self.hosts[at].state).challenge.is_none() => None,
                None if stale.is_some() => None,
                authorization => Some(authorization),
            };
            match next {
                Some(authorization) => stale = authorization.or(Some(HeaderValue::from_static(""))),
                None => return Err(self.denied(at, url, response).await),
            }
        }
    }

    /// Sends one request to an endpoint with what is known of how to be let in, and nothing more. Any status comes back.
    pub(super) async fn send_once(
        &self,
        at: usize,
        need: Need,
        url: &Url,
        make: &(dyn Fn(&Client, Url) -> RequestBuilder + Send + Sync),
    ) -> Result<(Response, Grant), SourceError> {
        let grant = self.grant(at, need, url, None, &[]).await?;
        let request = self.request(at, url, grant.authorization.as_ref(), make)?;
        Ok((self.exchange(url, request).await?, grant))
    }

    /// A request to an endpoint, with the headers that it is to have.
    fn request(
        &self,
        at: usize,
        url: &Url,
        authorization: Option<&HeaderValue>,
        make: &(dyn Fn(&Client, Url) -> RequestBuilder + Send + Sync),
    ) -> Result<RequestBuilder, SourceError> {
        let mut request = make(&self.client(at, url.scheme() == "https")?, url.clone());
        for (name, value) in self.spec.endpoints[at].headers() {
            request = request.header(name, value);
        }
        if let Some(value) = authorization {
            request = request.header(AUTHORIZATION, value.clone());
        }
        Ok(request)
    }

    async fn denied(&self, at: usize, url: &Url, response: Response) -> SourceError {
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
    pub(super) async fn grant(
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
    async fn look_up(&self, at: usize) -> Result<Vec<Login>, SourceError> {
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

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Session({})", self.name())
    }
}

/// A lock that outlives a panicking holder: what is behind these locks is valid at every step.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
