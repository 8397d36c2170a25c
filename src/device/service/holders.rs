//! The service's side of its keepers: what is to outlive the service is with each of them before it is used. In: descriptors to
//! hold or to drop. Out: nothing but that it was done; and at the start, what an earlier service left.
//!
//! A keeper that dies is replaced, and gets everything again. Beside the keepers stand those that [`adopt`](Holders::adopt) was given:
//! the link of a command that has descriptors stored by the service manager. They are not replaced. Invariant: while the service lives, this has a duplicate of every
//! descriptor that the keepers hold.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::held::{Ask, Holding, MAX_KEEPER_BYTES, Said, holding};
use super::keeper::{self, KEEPERS, LINK_LIMIT, is_root, open_log};
use super::message::{receive, send};
use super::{LISTENER_NAME, Launcher, Role};
use crate::device::state::StateDir;
use crate::device::wait_until;

/// How long a new keeper may take to open its socket.
const START_LIMIT: Duration = Duration::from_secs(5);

/// All keepers of the service.
pub(super) struct Holders {
    states: StateDir,
    launcher: Launcher,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    all: BTreeMap<String, Holding>,
    links: Vec<Option<Link>>,
    /// Those that hold devices beside the keepers.
    stores: Vec<Link>,
}

/// Who holds what it is asked to: a keeper, or a store.
pub(super) struct Link {
    stream: UnixStream,
    pid: u32,
    version: String,
    /// Whether an earlier service started it.
    inherited: bool,
}

impl Holders {
    /// Calls the keepers that an earlier service left, and takes duplicates of what they hold. Starts none.
    pub(super) fn find(states: &StateDir, launcher: Launcher) -> Self {
        let mut inner = Inner::default();
        for number in 0..KEEPERS {
            let link = call(states, number).and_then(|stream| list(stream, &mut inner.all));
            inner.links.push(link.ok().map(|link| Link {
                inherited: true,
                ..link
            }));
        }
        Self {
            states: states.clone(),
            launcher,
            inner: Mutex::new(inner),
        }
    }

    /// The directories beneath which the services that keepers start may write.
    pub(super) fn writable(&self) -> &[PathBuf] {
        &self.launcher.writable
    }

    /// Adds `more` to [`writable`](Self::writable), as far as it is there: what is not cannot be named to the kernel.
    pub(super) fn widen(&mut self, more: Vec<PathBuf>) {
        let all = self.launcher.writable.drain(..).chain(more);
        let all: BTreeSet<PathBuf> = all.filter_map(|dir| dir.canonicalize().ok()).collect();
        self.launcher.writable = all.into_iter().collect();
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        // What a panicking holder left is looked at anew by `mend`.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an earlier service left, under the names that it was given; stays held.
    ///
    /// # Errors
    /// When descriptors cannot be duplicated.
    pub(super) fn found(&self) -> io::Result<BTreeMap<String, Holding>> {
        let inner = self.inner();
        let duplicate = |holding: &Holding| -> io::Result<Holding> {
            holding.iter().map(|(kind, fd)| Ok((*kind, fd.try_clone()?))).collect()
        };
        inner
            .all
            .iter()
            .map(|(name, holding)| Ok((name.clone(), duplicate(holding)?)))
            .collect()
    }

    /// Gives `holding` to every keeper under `name`, in place of what they have under it. When this returns it outlives this process.
    ///
    /// # Errors
    /// When there is no keeper at all, not even a new one.
    pub(super) fn hold(&self, name: &str, holding: Holding) -> io::Result<()> {
        let mut inner = self.inner();
        inner.all.insert(name.to_owned(), holding);
        let Inner { all, links, stores } = &mut *inner;
        let Some(holding) = all.get(name) else { return Ok(()) };
        for link in links.iter_mut() {
            if let Some(known) = link
                && let Err(error) = known.hold(name, holding)
            {
                log::warn!("keeper {} is lost: {error}", known.pid);
                *link = None;
            }
        }
        if name != LISTENER_NAME {
            stores_do(stores, |store| store.hold(name, holding));
        }
        self.mend_all(&mut inner)
    }

    /// Makes every keeper give up what it has under `name`.
    pub(super) fn drop(&self, name: &str) {
        let mut inner = self.inner();
        if inner.all.remove(name).is_none() {
            return;
        }
        for link in &mut inner.links {
            if let Some(known) = link
                && let Err(error) = known.ask(&Ask::Drop { name: name.to_owned() }, &[])
            {
                log::warn!("keeper {} is lost: {error}", known.pid);
                *link = None;
            }
        }
        stores_do(&mut inner.stores, |store| {
            store.ask(&Ask::Drop { name: name.to_owned() }, &[])
        });
    }

    /// Asks what the store at the other end of `stream` holds from before: what is to be gone on with should not be left to it alone.
    /// Then it can be [`adopt`](Self::adopt)ed.
    ///
    /// # Errors
    /// When it does not answer as it should.
    pub(super) fn greet(stream: UnixStream) -> io::Result<(Link, BTreeMap<String, Holding>)> {
        stream.set_read_timeout(Some(LINK_LIMIT))?;
        stream.set_write_timeout(Some(LINK_LIMIT))?;
        let mut found = BTreeMap::new();
        let link = list(stream, &mut found)?;
        Ok((link, found))
    }

    /// Has `store` hold all devices from now on, and nothing else of `names`, which it held before.
    pub(super) fn adopt(&self, store: Link, names: &[String]) {
        let mut inner = self.inner();
        let Inner { all, stores, .. } = &mut *inner;
        let mut added = vec![store];
        stores_do(&mut added, |store| {
            for name in names.iter().filter(|name| !all.contains_key(*name)) {
                store.ask(&Ask::Drop { name: name.clone() }, &[])?;
            }
            for (name, holding) in all.iter().filter(|(name, _)| *name != LISTENER_NAME) {
                store.hold(name, holding)?;
            }
            Ok(())
        });
        stores.append(&mut added);
    }

    /// Puts new keepers in the place of those that are gone. Called now and then.
    pub(super) fn mend(&self) {
        let mut inner = self.inner();
        for link in &mut inner.links {
            if link.as_ref().is_some_and(|known| !known.is_there()) {
                *link = None;
            }
        }
        inner.stores.retain(Link::is_there);
        if let Err(error) = self.mend_all(&mut inner) {
            log::error!("{error}");
        }
    }

    fn mend_all(&self, inner: &mut Inner) -> io::Result<()> {
        inner.links.resize_with(KEEPERS, || None);
        let missing: Vec<usize> = (0..KEEPERS).filter(|number| inner.links[*number].is_none()).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let started: Vec<_> = missing.iter().map(|number| (*number, self.start(*number))).collect();
        let mut failure = None;
        for (number, started) in started {
            let ready = started.and_then(|()| self.connect(number, &inner.all));
            match ready {
                Ok(link) => inner.links[number] = Some(link),
                Err(error) => failure = Some(error),
            }
        }
        match failure {
            Some(error) if inner.links.iter().all(Option::is_none) => {
                Err(io::Error::new(error.kind(), format!("there is no keeper: {error}")))
            }
            Some(error) => {
                log::warn!("cannot start a keeper: {error}");
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Starts a keeper.
    fn start(&self, number: usize) -> io::Result<()> {
        // A dead one's, which would refuse the call until the new one has put its own there.
        let _ = std::fs::remove_file(keeper::socket(&self.states, number));
        let mut command = self
            .launcher
            .command(Role::Keeper, &self.states, &number.to_string(), None);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(open_log(&self.states)?)
            .spawn()?;
        // Its entry in the process table must go when it dies before the service.
        std::thread::Builder::new()
            .name("keeper-end".to_owned())
            .stack_size(32 << 10)
            .spawn(move || child.wait())?;
        Ok(())
    }

    /// Calls a keeper that was just started, and gives it everything.
    fn connect(&self, number: usize, all: &BTreeMap<String, Holding>) -> io::Result<Link> {
        let mut called = Err(io::ErrorKind::NotFound.into());
        wait_until(START_LIMIT, || {
            called = call(&self.states, number);
            called.is_ok()
        });
        let mut link = list(called?, &mut BTreeMap::new())?;
        for (name, holding) in all {
            link.hold(name, holding)?;
        }
        Ok(link)
    }

    /// Ends all keepers: there is nothing to hold any more.
    pub(super) fn retire(&self) {
        let mut inner = self.inner();
        inner.all.clear();
        for link in inner.links.drain(..).flatten() {
            let mut link = link;
            if link.ask(&Ask::Retire, &[]).is_ok() {
                // Its end closes the link.
                let _ = receive::<Said>(&link.stream, MAX_KEEPER_BYTES);
            }
        }
        stores_do(&mut inner.stores, |store| store.ask(&Ask::Retire, &[]));
        // Those of keepers that died; one that lives after all sees that it is not known any more, and ends.
        for number in 0..KEEPERS {
            let _ = std::fs::remove_file(keeper::socket(&self.states, number));
        }
    }

    /// Makes the keepers leave the next start to a command.
    ///
    /// # Errors
    /// When one of them might start the service itself.
    pub(super) fn stand_back(&self) -> io::Result<()> {
        let mut inner = self.inner();
        for link in inner.links.iter_mut().flatten() {
            link.ask(&Ask::StandBack, &[])?;
        }
        Ok(())
    }

    /// Replaces the keepers that an earlier service started, one after the other.
    pub(super) fn renew(&self) {
        let mut inner = self.inner();
        for number in 0..inner.links.len() {
            let other = inner.links[number].take_if(|link| link.inherited);
            if let Some(mut old) = other {
                let retired = old.ask(&Ask::Retire, &[]);
                let _ = receive::<Said>(&old.stream, MAX_KEEPER_BYTES);
                log::info!(
                    "keeper {} of version {} is replaced ({retired:?})",
                    old.pid,
                    old.version
                );
                if let Err(error) = self.mend_all(&mut inner) {
                    log::error!("{error}");
                }
            }
        }
    }
}

/// Asks something of all `stores`; those that fail are let go of: what they hold the keepers hold too.
fn stores_do(stores: &mut Vec<Link>, mut what: impl FnMut(&mut Link) -> io::Result<()>) {
    stores.retain_mut(|store| match what(store) {
        Ok(()) => true,
        Err(error) => {
            log::warn!("process {} has descriptors stored no longer: {error}", store.pid);
            false
        }
    });
}

fn call(states: &StateDir, number: usize) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(keeper::socket(states, number))?;
    stream.set_read_timeout(Some(LINK_LIMIT))?;
    stream.set_write_timeout(Some(LINK_LIMIT))?;
    if is_root(&stream) {
        Ok(stream)
    } else {
        Err(io::Error::other("the keeper is not root's"))
    }
}

/// Asks a keeper what it holds, and adds to `all` what is not there yet.
fn list(stream: UnixStream, all: &mut BTreeMap<String, Holding>) -> io::Result<Link> {
    let odd = || io::Error::new(io::ErrorKind::InvalidData, "a keeper answered something else");
    send(&stream, &Ask::List, &[])?;
    let next = || -> io::Result<(Said, Vec<OwnedFd>)> {
        receive(&stream, MAX_KEEPER_BYTES)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    };
    let (Said::Holding { count, version, pid }, _) = next()? else {
        return Err(odd());
    };
    for _ in 0..count {
        let (Said::Held { name, kinds }, descriptors) = next()? else {
            return Err(odd());
        };
        let holding = holding(kinds, descriptors)?;
        all.entry(name).or_insert(holding);
    }
    Ok(Link {
        stream,
        pid,
        version,
        inherited: false,
    })
}

impl Link {
    fn ask(&mut self, ask: &Ask, descriptors: &[std::os::fd::BorrowedFd<'_>]) -> io::Result<()> {
        send(&self.stream, ask, descriptors)?;
        match receive::<Said>(&self.stream, MAX_KEEPER_BYTES)? {
            Some((Said::Done, _)) => Ok(()),
            Some(_) => Err(io::Error::new(io::ErrorKind::InvalidData, "it answered something else")),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn hold(&mut self, name: &str, holding: &Holding) -> io::Result<()> {
        let (kinds, descriptors): (Vec<_>, Vec<_>) = holding
            .iter()
            .map(|(kind, fd)| (*kind, std::os::fd::AsFd::as_fd(fd)))
            .unzip();
        let ask = Ask::Hold {
            name: name.to_owned(),
            kinds,
        };
        self.ask(&ask, &descriptors)
    }

    /// Whether its process lives: a keeper says nothing unasked, so anything to read is its end.
    fn is_there(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut waiting = [PollFd::new(&self.stream, PollFlags::IN)];
        matches!(poll(&mut waiting, Some(&now)), Ok(0))
    }
}
