//! One runtime for everything that talks to registries. A connection belongs to the runtime that made it; here are callers
//! without one (commands), with one that ends soon (walks) and with one that must not be kept busy (the fetch thread). So
//! registries are talked to on a thread of their own, and everybody else waits for it in their own way.

use std::future::Future;
use std::sync::OnceLock;
use std::sync::mpsc;

use reqwest::{Client, redirect};
use tokio::runtime::Handle;

use super::SourceError;
use super::http::Patience;
use super::tls::{self, Trust};

fn handle() -> Result<Handle, SourceError> {
    static HANDLE: OnceLock<Result<Handle, String>> = OnceLock::new();
    HANDLE.get_or_init(start).clone().map_err(|why| SourceError::Setup {
        what: "the network thread",
        why,
    })
}

fn start() -> Result<Handle, String> {
    let (tell, told) = mpsc::channel();
    std::thread::Builder::new()
        .name("tarblk-registry".to_owned())
        .spawn(move || {
            let built = tokio::runtime::Builder::new_current_thread()
                .enable_io()
                .enable_time()
                .build();
            match built {
                Ok(runtime) => {
                    // Whoever started it waits for this.
                    let _ = tell.send(Ok(runtime.handle().clone()));
                    runtime.block_on(std::future::pending::<()>());
                }
                Err(error) => drop(tell.send(Err(error.to_string()))),
            }
        })
        .map_err(|error| error.to_string())?;
    told.recv().map_err(|error| error.to_string())?
}

/// Waits for `future` on the calling thread, which must not be in a runtime.
pub(super) fn wait<T>(future: impl Future<Output = Result<T, SourceError>>) -> Result<T, SourceError> {
    handle()?.block_on(future)
}

/// Lets `future` run on the registry thread, whatever comes of it.
pub(super) fn spawn<T: Send + 'static>(
    future: impl Future<Output = T> + Send + 'static,
) -> Result<tokio::task::JoinHandle<T>, SourceError> {
    Ok(handle()?.spawn(future))
}

/// Runs `future` on the registry thread and waits for it in whatever runtime the caller is in.
pub(super) async fn run<T, E>(future: impl Future<Output = Result<T, E>> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<SourceError> + Send + 'static,
{
    let ended = handle()?.spawn(future).await;
    ended.unwrap_or_else(|error| {
        Err(E::from(SourceError::Setup {
            what: "the network thread",
            why: error.to_string(),
        }))
    })
}

/// A client that follows no redirects by itself: where credentials go is decided here. Proxies are taken from the
/// environment, as everywhere.
pub(super) fn client(trust: &Trust, secure: bool, patience: &Patience) -> Result<Client, SourceError> {
    let config = match tls::client_config_for(trust) {
        Ok(config) => (*config).clone(),
        Err(error) if secure => return Err(error),
        Err(_) => tls::trusting_nobody()?,
    };
    Client::builder()
        .tls_backend_preconfigured(config)
        .http1_only()
        .tcp_nodelay(true)
        .redirect(redirect::Policy::none())
        .connect_timeout(patience.connect)
        .user_agent(concat!("tarblk/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|error| SourceError::Setup {
            what: "the HTTP client",
            why: super::http::cause(&error),
        })
}
