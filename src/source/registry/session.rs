//! Requests to one repository, wherever its registry's endpoints are. In: what to ask. Out: the answer, after whatever
//! logging in it took.
//!
//! A session knows how each endpoint wants to be asked and keeps the tokens, which all layers of a repository share: one
//! refresh, however many requests found out that it is needed. Credentials go to the endpoint they belong to and to the
//! token server it names, never to where a redirect leads (`login`).

mod login;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant, SystemTime};

use reqwest::header::{AUTHORIZATION, HeaderValue};
use reqwest::{Client, RequestBuilder, Response, StatusCode};
use serde::{Deserialize, Serialize};
use url::Url;

use super::challenge::{Challenge, Token};
use super::credentials::Keyring;
use super::hosts::Endpoint;
use super::login::Login;
use crate::http::{self, HttpOptions, Kind, Opener, Reach, shown_url};
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
