//! Connections opened ahead: by TCP and TLS alone, before there is anything to ask. In: where to. Out: a client whose next new
//! connections are those.
//!
//! reqwest opens a connection only for a request. So there are two clients with one store between them: of the one that opens,
//! every connection goes to the store and its request ends unsent; the one that asks takes from the store before it opens
//! another. Both are for one server: what lies in the store is not looked at again.

use std::any::Any;
use std::future::{Future, ready};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use reqwest::Client;
use tower_layer::Layer;
use tower_service::Service;
use url::Url;

use super::client::builder;
use super::error::Error;
use super::retry::Timeouts;
use super::tls::Trust;

/// A connection that was not used for this long is closed: servers close what they hear nothing of.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Opens connections for a [`Client`] to use.
#[derive(Clone, Debug)]
pub(crate) struct Opener(Client);

impl Opener {
    /// Opens a connection to the server of `url`. Whatever goes wrong with that is left to the request that will need it.
    pub(crate) async fn open(&self, url: Url) {
        // Ends with an error also when the connection was opened.
        drop(self.0.get(url).send().await);
    }
}

/// A client for one server, as [`super::build`] makes it, and what opens connections ahead for it.
///
/// # Errors
/// [`Kind::Setup`](super::Kind::Setup).
pub(crate) fn build_with_opener(trust: &Trust, secure: bool, timeouts: &Timeouts) -> Result<(Client, Opener), Error> {
    let opened = Opened::default();
    let asking = builder(trust, secure, timeouts)?.connector_layer(WithStore(opened.clone(), Role::Take));
    let opening = builder(trust, secure, timeouts)?.connector_layer(WithStore(opened, Role::Put));
    Ok((super::client::finish(asking)?, Opener(super::client::finish(opening)?)))
}

/// A connection, whose type reqwest keeps to itself.
type Connection = Box<dyn Any + Send>;

/// Connections that were opened and not used yet, and since when.
#[derive(Clone, Default)]
struct Opened(Arc<Mutex<Vec<(Instant, Connection)>>>);

impl Opened {
    fn put(&self, connection: Connection) {
        let mut opened = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        opened.push((Instant::now(), connection));
    }

    /// The newest of those that are good.
    fn take(&self) -> Option<Connection> {
        let mut opened = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        opened.retain(|(since, _)| since.elapsed() < LONGEST_WAIT);
        opened.pop().map(|(_, connection)| connection)
    }
}

type BoxError = Box<dyn std::error::Error + Send + Sync>;
type Connecting<C> = Pin<Box<dyn Future<Output = Result<C, BoxError>> + Send>>;

/// What a connector does with the store.
#[derive(Clone, Copy, Debug)]
enum Role {
    /// All that it opens goes there.
    Put,
    /// It opens another connection only when there is none.
    Take,
}

/// Gives a connector the store.
#[derive(Clone)]
struct WithStore(Opened, Role);

/// A connector with the store.
#[derive(Clone)]
struct Connector<S> {
    inner: S,
    opened: Opened,
    role: Role,
}

impl<S> Layer<S> for WithStore {
    type Service = Connector<S>;

    fn layer(&self, inner: S) -> Connector<S> {
        Connector {
            inner,
            opened: self.0.clone(),
            role: self.1,
        }
    }
}

impl<S, R> Service<R> for Connector<S>
where
    S: Service<R, Error = BoxError>,
    S::Response: Send + 'static,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = Connecting<S::Response>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, target: R) -> Self::Future {
        match self.role {
            Role::Put => {
                let (connecting, opened) = (self.inner.call(target), self.opened.clone());
                Box::pin(async move {
                    opened.put(Box::new(connecting.await?));
                    Err("the connection was opened for another request".into())
                })
            }
            Role::Take => match self.opened.take().map(Connection::downcast::<S::Response>) {
                Some(Ok(connection)) => Box::pin(ready(Ok(*connection))),
                Some(Err(_)) | None => Box::pin(self.inner.call(target)),
            },
        }
    }
}
