//! `tarblk service` as one more place where what must outlive the service is held, and the descriptor store of the service manager
//! that runs it as yet another. In: what the service asks, as of a keeper. Out: descriptors stored by the manager, one after the other under names
//! of their own; and at the start, what it gave back.
//!
//! If service and keepers die at the same instant, the command gives new keepers what it holds and starts the service; if it dies along
//! with them, the manager starts it again, with its descriptors. Without a manager, the command holds them alone.
//!
//! A descriptor is stored as `DEVICE.KIND.NUMBER`. Invariant: what is not held here any more is not stored any more when the service
//! is told so: what a store holds keeps the kernel from letting a device go.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::held::{Ask, HeldSet, Holding, Kind, done, hear, holding};
use super::holders::Holders;
use super::keeper::LINK_LIMIT;
use super::manager::{Manager, given};
use super::{Launcher, ServiceError, failed};
use crate::device::state::StateDir;

/// What a command holds for the service and has stored by the service manager that runs it, if one does.
#[derive(Debug)]
pub struct DescriptorStore {
    manager: Option<Manager>,
    held: Mutex<HeldSet>,
}

impl DescriptorStore {
    /// With what an earlier run of this command had the service manager store. To be called once, before the process starts another.
    ///
    /// # Errors
    /// When there is a manager that cannot be told anything.
    pub fn of_this_process() -> Result<Self, ServiceError> {
        let manager = Manager::of_this_process().transpose();
        let manager = manager.map_err(failed("reach the service manager"))?;
        let mut held = HeldSet::default();
        let mut given = given();
        // Files come in the specification's order, which their numbers tell.
        given.sort_by_key(|(name, _)| numbered(name).map(|(_, _, number)| number));
        for (name, descriptor) in given {
            // Others are not ours to keep.
            if let Some((device, kind, _)) = numbered(&name) {
                held.add(device, kind, descriptor);
            }
        }
        for (name, holding) in held.iter() {
            log::info!("the service manager kept {} descriptors of {name}", holding.len());
        }
        Ok(Self {
            manager,
            held: Mutex::new(held),
        })
    }

    fn held(&self) -> MutexGuard<'_, HeldSet> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives keepers what they do not hold already: the service that is started next goes on with it. Only with the service's lock, so that
    /// they start none themselves.
    ///
    /// # Errors
    /// When there is no keeper to be had.
    pub(super) fn give_to_keepers(&self, states: &StateDir, launcher: &Launcher) -> io::Result<()> {
        let held = self.held();
        let holders = Holders::find(states, launcher.clone());
        let known = holders.found()?;
        for (name, holding) in held.iter().filter(|(name, _)| !known.contains_key(*name)) {
            log::warn!("no process holds {name} any more: going on with what was stored of it");
            let duplicate = |(kind, descriptor): &(Kind, _)| Ok((*kind, std::os::fd::OwnedFd::try_clone(descriptor)?));
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
        let mut held = self.held();
        match ask {
            Ask::List => return held.tell(link),
            Ask::Hold { name, kinds } => {
                let holding = holding(kinds, descriptors)?;
                self.remove(&held, &name);
                self.store(&name, &holding);
                held.hold(name, holding);
            }
            Ask::Drop { name } => {
                self.remove(&held, &name);
                held.let_go(&name);
                self.settle();
            }
            Ask::Retire => {
                for (name, _) in held.iter() {
                    self.remove(&held, name);
                }
                held.clear();
                self.settle();
            }
            // It starts no service while there is one that can be called, and the keepers hold its socket.
            Ask::StandBack => {}
        }
        done(link)
    }

    /// Has what is held under `name` stored. That it cannot be is no reason to refuse it: it is held here.
    fn store(&self, name: &str, holding: &Holding) {
        let Some(manager) = &self.manager else { return };
        for (stored, descriptor) in names(name, holding).zip(holding.iter().map(|(_, descriptor)| descriptor)) {
            if let Err(error) = manager.keep(&stored, descriptor.as_fd()) {
                log::warn!("the service manager does not keep {stored}: {error}");
            }
        }
    }

    /// Has what is stored of `name` closed.
    fn remove(&self, held: &HeldSet, name: &str) {
        let Some(manager) = &self.manager else { return };
        for stored in held.get(name).into_iter().flat_map(|holding| names(name, holding)) {
            if let Err(error) = manager.drop(&stored) {
                log::warn!("the service manager keeps {stored} although it is not to: {error}");
            }
        }
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

/// Under what names the descriptors of device `name` are stored, in their order.
fn names<'a>(name: &'a str, holding: &'a Holding) -> impl Iterator<Item = String> + 'a {
    let number = move |(number, (kind, _)): (usize, &(Kind, _))| format!("{name}.{kind}.{number}");
    holding.iter().enumerate().map(number)
}

/// The device, kind and number in a name.
fn numbered(stored: &str) -> Option<(&str, Kind, usize)> {
    let (rest, number) = stored.rsplit_once('.')?;
    let (device, kind) = rest.rsplit_once('.')?;
    Some((device, Kind::of_word(kind)?, number.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_what_they_are_of() {
        let holding: Holding = [Kind::Spec, Kind::Channel, Kind::File, Kind::File]
            .map(|kind| (kind, tempfile::tempfile().unwrap().into()))
            .into();
        let names: Vec<String> = names("loop12", &holding).collect();
        assert_eq!(
            names,
            ["loop12.spec.0", "loop12.channel.1", "loop12.file.2", "loop12.file.3"]
        );
        let read: Vec<_> = names.iter().map(|name| numbered(name).unwrap()).collect();
        assert_eq!(read[3], ("loop12", Kind::File, 3));
        assert_eq!(read[0].1, Kind::Spec);
        for other in ["stored", "connection", "loop1.cat.0", "loop1.spec.x", ""] {
            assert_eq!(numbered(other), None, "{other:?}");
        }
    }
}
