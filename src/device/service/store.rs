//! `tarblk service` as one more place where what must outlive the service is held, and the descriptor store of the service manager
//! that runs it as yet another. In: what the service asks, as of a keeper. Out: descriptors stored by the manager, one after the other under names
//! of their own; and at the start, what it gave back.
//!
//! If service and keepers die at the same instant, the command gives new keepers what it holds and starts the service; if it dies along
//! with them, the manager starts it again, with its descriptors. Without a manager, the command holds them alone.
//!
//! A descriptor is stored as `DEVICE.KIND.NUMBER`, what comes later with a higher number: of each kind but files the last one counts.
//! Invariant: what is not held here any more is not stored any more when the service is told so: what a store holds keeps the kernel from
//! letting a device go. Invariant: there is no moment at which a device that is held is stored in part, whenever the command is
//! killed: what is stored stays where it is, and what changed is stored anew before the old one is given up.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::held::{Ask, HeldSet, Holding, Kind, done, hear, holding};
use super::holders::Holders;
use super::keeper::LINK_LIMIT;
use super::manager::{Manager, are_one_file, given};
use super::{Launcher, ServiceError, failed};
use crate::device::state::StateDir;

/// What a command holds for the service and has stored by the service manager that runs it, if one does.
#[derive(Debug)]
pub struct DescriptorStore {
    manager: Option<Manager>,
    stored: Mutex<Stored>,
}

/// What is held, and under what names it is stored.
#[derive(Debug, Default)]
struct Stored {
    held: HeldSet,
    /// Of each device the names of what is held of it, in the same order.
    names: BTreeMap<String, Vec<String>>,
}

impl DescriptorStore {
    /// With what an earlier run of this command had the service manager store. To be called once, before the process starts another.
    ///
    /// # Errors
    /// When there is a manager that cannot be told anything.
    pub fn of_this_process() -> Result<Self, ServiceError> {
        let manager = Manager::of_this_process().transpose();
        let manager = manager.map_err(failed("reach the service manager"))?;
        Ok(Self::with(manager, given()))
    }

    /// With what `manager` gave back.
    fn with(manager: Option<Manager>, mut given: Vec<(String, OwnedFd)>) -> Self {
        // Files come in the specification's order, which their numbers tell.
        given.sort_by_key(|(name, _)| numbered(name).map(|(_, _, number)| number));
        let all: Vec<String> = given.iter().map(|(name, _)| name.clone()).collect();
        let mut stored = Stored::default();
        for (name, descriptor) in given {
            // Others are not ours to keep.
            let Some((device, kind, number)) = numbered(&name) else {
                continue;
            };
            let comes_after = |other: &String| {
                numbered(other).is_some_and(|(of, its, later)| (of, its) == (device, kind) && later > number)
            };
            if kind != Kind::File && all.iter().any(comes_after) {
                remove(manager.as_ref(), &name);
                continue;
            }
            stored.held.add(device, kind, descriptor);
            stored.names.entry(device.to_owned()).or_default().push(name.clone());
        }
        for (name, holding) in stored.held.iter() {
            log::info!("the service manager kept {} descriptors of {name}", holding.len());
        }
        Self {
            manager,
            stored: Mutex::new(stored),
        }
    }

    fn stored(&self) -> MutexGuard<'_, Stored> {
        self.stored.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives keepers what they do not hold already: the service that is started next goes on with it. Only with the service's lock, so that
    /// they start none themselves.
    ///
    /// # Errors
    /// When there is no keeper to be had.
    pub(super) fn give_to_keepers(&self, states: &StateDir, launcher: &Launcher) -> io::Result<()> {
        let held = &self.stored().held;
        let holders = Holders::find(states, launcher.clone());
        let known = holders.found()?;
        for (name, holding) in held.iter().filter(|(name, _)| !known.contains_key(*name)) {
            log::warn!("no process holds {name} any more: going on with what was stored of it");
            let duplicate = |(kind, descriptor): &(Kind, _)| Ok((*kind, OwnedFd::try_clone(descriptor)?));
            holders.hold(name, holding.iter().map(duplicate).collect::<io::Result<Holding>>()?)?;
        }
        Ok(())
    }

    /// Does what the service asks, until it ends.
    pub(super) fn serve(&self, link: &UnixStream) {
        let limits = link
            .set_read_timeout(None)
            .and_then(|()| link.set_write_timeout(Some(LINK_LIMIT)));
        let served = limits.and_then(|()| {
            loop {
                self.answer(link)?;
            }
        });
        if let Err::<(), _>(error) = served
            && error.kind() != io::ErrorKind::UnexpectedEof
        {
            log::warn!("devices are not stored any more: {error}");
        }
    }

    fn answer(&self, link: &UnixStream) -> io::Result<()> {
        let (ask, descriptors) = hear(link)?;
        let mut stored = self.stored();
        match ask {
            Ask::List => return stored.held.tell(link),
            Ask::Hold { name, kinds } => stored.hold(self.manager.as_ref(), name, holding(kinds, descriptors)?),
            Ask::Drop { name } => {
                stored.let_go(self.manager.as_ref(), &name);
                self.settle();
            }
            Ask::Retire => {
                let names: Vec<String> = stored.names.keys().cloned().collect();
                for name in names {
                    stored.let_go(self.manager.as_ref(), &name);
                }
                self.settle();
            }
            // It starts no service while there is one that can be called, and the keepers hold its socket.
            Ask::StandBack => {}
        }
        done(link)
    }

    /// Waits until the manager holds nothing any more that it was to give up.
    fn settle(&self) {
        if let Some(manager) = &self.manager
            && let Err(error) = manager.wait_until_done()
        {
            log::warn!("the service manager takes its time: {error}");
        }
    }
}

impl Stored {
    /// Holds `holding` under `name` and has it stored, in place of what was; see the module's second invariant. That it cannot be stored
    /// is no reason to refuse it: it is held here.
    fn hold(&mut self, manager: Option<&Manager>, name: String, holding: Holding) {
        let old = self.names.remove(&name).unwrap_or_default();
        let was: Vec<_> = old.iter().zip(self.held.get(&name).into_iter().flatten()).collect();
        let kept: io::Result<Vec<Option<&String>>> = holding.iter().map(|new| known(&was, new)).collect();
        // Where the kernel does not tell what is one file, what is stored again might be taken for the old one and given up with it.
        let is_told = kept.is_ok();
        if !is_told {
            for stored in &old {
                remove(manager, stored);
            }
        }
        let kept = kept.unwrap_or_else(|error| {
            log::warn!(
                "what is stored of {name} is stored anew, because the kernel does not tell files apart: {error}"
            );
            vec![None; holding.len()]
        });
        let last = old
            .iter()
            .filter_map(|stored| numbered(stored))
            .map(|(_, _, number)| number)
            .max();
        let mut number = last.map_or(0, |last| last.saturating_add(1));
        let mut names = Vec::with_capacity(holding.len());
        for ((kind, descriptor), kept) in holding.iter().zip(kept) {
            names.push(kept.cloned().unwrap_or_else(|| {
                let stored = format!("{name}.{kind}.{number}");
                number = number.saturating_add(1);
                if let Some(manager) = manager
                    && let Err(error) = manager.keep(&stored, descriptor.as_fd())
                {
                    log::warn!("the service manager does not keep {stored}: {error}");
                }
                stored
            }));
        }
        if is_told {
            for stored in old.iter().filter(|stored| !names.contains(stored)) {
                remove(manager, stored);
            }
        }
        self.held.hold(name.clone(), holding);
        self.names.insert(name, names);
    }

    /// Holds nothing under `name` any more, nor is anything of it stored.
    fn let_go(&mut self, manager: Option<&Manager>, name: &str) {
        for stored in self.names.remove(name).unwrap_or_default() {
            remove(manager, &stored);
        }
        self.held.let_go(name);
    }
}

/// Under what name `new` is stored already among what was, if it is.
fn known<'a>(was: &[(&'a String, &(Kind, OwnedFd))], new: &(Kind, OwnedFd)) -> io::Result<Option<&'a String>> {
    for (stored, old) in was.iter().filter(|(_, old)| old.0 == new.0) {
        if are_one_file(old.1.as_fd(), new.1.as_fd())? {
            return Ok(Some(stored));
        }
    }
    Ok(None)
}

/// Has what is stored under a name closed.
fn remove(manager: Option<&Manager>, stored: &str) {
    if let Some(manager) = manager
        && let Err(error) = manager.drop(stored)
    {
        log::warn!("the service manager keeps {stored} although it is not to: {error}");
    }
}

/// The device, kind and number in a name.
fn numbered(stored: &str) -> Option<(&str, Kind, usize)> {
    let (rest, number) = stored.rsplit_once('.')?;
    let (device, kind) = rest.rsplit_once('.')?;
    Some((device, Kind::of_word(kind)?, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    use super::*;

    #[test]
    fn names_tell_what_they_are_of() {
        assert_eq!(numbered("loop12.spec.0"), Some(("loop12", Kind::Spec, 0)));
        assert_eq!(numbered("loop12.file.37"), Some(("loop12", Kind::File, 37)));
        for other in ["stored", "connection", "loop1.cat.0", "loop1.spec.x", ""] {
            assert_eq!(numbered(other), None, "{other:?}");
        }
    }

    /// What a manager was told, a line each.
    struct Told(UnixDatagram);

    impl Told {
        fn new(name: &str) -> (Self, Manager) {
            let name = format!("tarblk-{name}-{}", std::process::id());
            let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(&name).unwrap()).unwrap();
            socket.set_nonblocking(true).unwrap();
            (Self(socket), Manager::at(format!("@{name}").as_bytes()).unwrap())
        }

        fn take(&self) -> Vec<String> {
            let mut all = Vec::new();
            let mut text = [0; 256];
            while let Ok(len) = self.0.recv(&mut text) {
                let text = str::from_utf8(&text[..len]).unwrap();
                let word = if text.starts_with("FDSTORE=1") { "keep" } else { "drop" };
                all.push(format!("{word} {}", text.rsplit_once('=').unwrap().1));
            }
            all
        }
    }

    fn file() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    /// Wherever the command is killed, what is stored is a whole device: nothing is given up that is not stored again by then.
    #[test]
    fn what_is_stored_stays_and_what_changed_is_stored_before_the_old_one_goes() {
        let (told, manager) = Told::new("hold");
        let (channel, files) = (file(), [file(), file()]);
        let holding = || -> Holding {
            let mut holding = vec![(Kind::Spec, file()), (Kind::Channel, channel.try_clone().unwrap())];
            holding.extend(files.iter().map(|file| (Kind::File, file.try_clone().unwrap())));
            holding
        };
        let mut stored = Stored::default();
        stored.hold(Some(&manager), "loop3".to_owned(), holding());
        let first = ["spec.0", "channel.1", "file.2", "file.3"].map(|name| format!("keep loop3.{name}"));
        assert_eq!(told.take(), first);
        for (new, old) in [(4, 0), (5, 4)] {
            stored.hold(Some(&manager), "loop3".to_owned(), holding());
            let changes = [format!("keep loop3.spec.{new}"), format!("drop loop3.spec.{old}")];
            assert_eq!(told.take(), changes);
        }
        stored.let_go(Some(&manager), "loop3");
        let last = ["spec.5", "channel.1", "file.2", "file.3"].map(|name| format!("drop loop3.{name}"));
        assert_eq!(told.take(), last);
        assert!(stored.held.get("loop3").is_none());
    }

    #[test]
    fn of_what_is_given_back_the_last_one_counts() {
        let (told, manager) = Told::new("given");
        let names = [
            "spec.7",
            "file.10",
            "channel.1",
            "spec.0",
            "file.9",
            "device.3",
            "device.8",
        ];
        let given = names.map(|name| (format!("loop3.{name}"), file()));
        let channel = given[2].1.try_clone().unwrap();
        let store = DescriptorStore::with(Some(manager.clone()), given.into());
        assert_eq!(told.take(), ["drop loop3.spec.0", "drop loop3.device.3"]);
        let mut stored = store.stored();
        let kinds = |stored: &Stored| -> Vec<Kind> {
            let held = stored.held.get("loop3").unwrap();
            held.iter().map(|(kind, _)| *kind).collect()
        };
        let all = [Kind::Channel, Kind::Spec, Kind::Device, Kind::File, Kind::File];
        assert_eq!(kinds(&stored), all);
        // It goes on behind the last number, and what it has is as good as what the service brings again.
        stored.hold(
            Some(&manager),
            "loop3".to_owned(),
            vec![(Kind::Spec, file()), (Kind::Channel, channel)],
        );
        let changes = [
            "keep spec.11",
            "drop spec.7",
            "drop device.8",
            "drop file.9",
            "drop file.10",
        ];
        let changes = changes.map(|change| change.replace(' ', " loop3."));
        assert_eq!(told.take(), changes);
    }
}
