//! A token server as the distribution project's authentication documents have it (token.md and oauth.md): GET with Basic
//! credentials or none, POST with a password or a refresh token. Its tokens are good for as many seconds as it is told.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use super::http::{Reply, Request, Server};
use super::keys::Signer;
use super::{PASSWORD, USER};

pub(crate) const ISSUER: &str = "token server of a test";
pub(crate) const SERVICE: &str = "registry of a test";
/// What stands for user and password in a `docker login` to a server that gives identity tokens.
pub(crate) const IDENTITY_TOKEN: &str = "identity-token-4711";

/// How far a registry (distribution 2.8, registry/auth/token) lets clocks be wrong: for so many seconds after it has ended
/// a token is good. Tokens that are to die in time are dated back by them.
const LEEWAY: u64 = 60;

#[derive(Debug, Default)]
struct State {
    /// In seconds.
    lifetime: AtomicU64,
    issued: AtomicU64,
    refused: AtomicU64,
}

/// Ends when dropped.
#[derive(Debug)]
pub(crate) struct TokenServer {
    server: Server,
    state: Arc<State>,
    root: String,
}

impl TokenServer {
    /// `anonymous`: whether who gives no credentials may pull.
    pub(crate) fn start(anonymous: bool) -> Self {
        let signer = Signer::new();
        let root = signer.root();
        let state = Arc::new(State::default());
        let shared = Arc::clone(&state);
        let server = Server::start(move |request| answer(request, &signer, &shared, anonymous));
        Self { server, state, root }
    }

    /// For tokens issued from now on.
    pub(crate) fn set_lifetime(&self, seconds: u64) {
        self.state.lifetime.store(seconds, Ordering::SeqCst);
    }

    pub(crate) fn realm(&self) -> String {
        format!("http://{}/token", self.server.host())
    }

    /// The certificate that a registry has to trust, as PEM.
    pub(crate) fn root(&self) -> &str {
        &self.root
    }

    /// How many tokens it gave out, and how often it refused to.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let load = |count: &AtomicU64| count.load(Ordering::SeqCst);
        (load(&self.state.issued), load(&self.state.refused))
    }
}

fn answer(request: &Request, signer: &Signer, state: &State, anonymous: bool) -> Reply {
    let basic = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
    let (known, service, scopes) = match request.method.as_str() {
        "GET" => {
            let known = match request.header("authorization") {
                Some(given) if given == basic => Some(true),
                Some(_) => None,
                None => anonymous.then_some(false),
            };
            (known, request.query("service").pop(), request.query("scope"))
        }
        "POST" => {
            let given = |name: &str, value: &str| request.form(name).as_deref() == Some(value);
            let by_password = given("grant_type", "password") && given("username", USER) && given("password", PASSWORD);
            let by_token = given("grant_type", "refresh_token") && given("refresh_token", IDENTITY_TOKEN);
            let scopes = request.form("scope").unwrap_or_default();
            let scopes = scopes.split(' ').map(str::to_owned).collect();
            (
                (by_password || by_token).then_some(true),
                request.form("service"),
                scopes,
            )
        }
        _ => return Reply::new(405, ""),
    };
    let Some(known) = known.filter(|_| request.path() == "/token" && service.as_deref() == Some(SERVICE)) else {
        state.refused.fetch_add(1, Ordering::SeqCst);
        return Reply::new(401, r#"{"errors":[{"code":"UNAUTHORIZED","message":"who is that?"}]}"#)
            .with("Content-Type", "application/json")
            .with("WWW-Authenticate", "Basic realm=\"token server\"");
    };
    let lifetime = state.lifetime.load(Ordering::SeqCst);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
    let number = state.issued.fetch_add(1, Ordering::SeqCst);
    let access: Vec<Value> = scopes.iter().filter_map(|scope| grant(scope, known)).collect();
    let token = signer.sign(&json!({
        "iss": ISSUER,
        "sub": if known { USER } else { "" },
        "aud": SERVICE,
        "iat": now,
        "nbf": now - 2 * LEEWAY,
        "exp": now + lifetime - LEEWAY,
        "jti": number.to_string(),
        "access": access,
    }));
    let mut body = json!({ "token": token, "access_token": token, "expires_in": lifetime });
    if request.query("offline_token").pop().as_deref() == Some("true") {
        body["refresh_token"] = IDENTITY_TOKEN.into();
    }
    Reply::new(200, body.to_string()).with("Content-Type", "application/json")
}

/// What of a scope (`repository:NAME:ACTION,ACTION`) is granted: everything to who is known, else reading.
fn grant(scope: &str, known: bool) -> Option<Value> {
    let (kind, rest) = scope.split_once(':')?;
    let (name, actions) = rest.rsplit_once(':')?;
    let actions: Vec<_> = actions.split(',').filter(|&action| known || action == "pull").collect();
    Some(json!({ "type": kind, "name": name, "actions": actions }))
}
