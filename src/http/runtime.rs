//! One runtime for everything that talks to registries. A connection belongs to the runtime that made it; here are callers
//! without one (commands), with one that ends soon (walks) and with one that must not be kept busy (the fetch thread). So
//! registries are talked to on a thread of their own, and callers wait for it each in their own way.

use std::future::Future;
use std::sync::OnceLock;
use std::sync::mpsc;

use tokio::runtime::{Handle, Runtime};

use super::error::Error;
use super::waits::WaitOwner;

/// A runtime for one piece of waiting, on the calling thread.
pub(crate) fn runtime() -> Result<Runtime, Error> {
    let mut builder = tokio::runtime::Builder::new_current_thread();
    let built = builder.enable_io().enable_time().build();
    built.map_err(|error| Error::setup("the network runtime", error))
}

fn handle() -> Result<Handle, Error> {
    static HANDLE: OnceLock<Result<Handle, String>> = OnceLock::new();
    let handle = HANDLE.get_or_init(start).clone();
    handle.map_err(|why| Error::setup("the network thread", why))
}

fn start() -> Result<Handle, String> {
    let (tell, told) = mpsc::channel();
    std::thread::Builder::new()
        .name("tarblk-registry".to_owned())
        .spawn(move || {
            match runtime() {
                Ok(runtime) => {
                    // The thread that starts this one waits for it.
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
pub(crate) fn wait<T, E: From<Error>>(future: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    handle()?.block_on(future)
}

/// Lets `future` run on the registry thread, whatever comes of it, for whomever the caller works.
pub(crate) fn spawn<T: Send + 'static>(
    future: impl Future<Output = T> + Send + 'static,
) -> Result<tokio::task::JoinHandle<T>, Error> {
    Ok(handle()?.spawn(WaitOwner::current().scope(future)))
}

/// Runs `future` on the registry thread and waits for it in whatever runtime the caller is in.
pub(crate) async fn run<T, E>(future: impl Future<Output = Result<T, E>> + Send + 'static) -> Result<T, E>
where
    T: Send + 'static,
    E: From<Error> + Send + 'static,
{
    let ended = spawn(future)?.await;
    ended.unwrap_or_else(|error| Err(E::from(Error::setup("the network thread", error))))
}
