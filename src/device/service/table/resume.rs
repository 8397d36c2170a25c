//! Devices of an earlier service. In: what it left in the state directory and with keepers. Out: the same devices, served again; those that
//! cannot be are set aside or buried.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use super::super::blame::Blame;
use super::super::client::{bury, end_reads};
use super::super::counts::CarriedCounts;
use super::super::held::{Holding, Kind};
use super::super::holders::Holders;
use super::super::record::{self, Record};
use super::super::{Builder, LISTENER_NAME, Served, ServiceError, nothing};
use super::{Entry, Table, lock, this_process, volume_of};
use crate::device::fuse_loop::HeldLoop;
use crate::device::state::{State, StateDir};
use crate::device::{Backend, Device, HeldDevice};

/// How often it is tried to go on with a device before it is set aside.
const RESUME_TRIES: u32 = 3;

/// The pause after the first try that failed; each one after that is twice as long.
const RESUME_PAUSE: Duration = Duration::from_millis(200);

impl<B: Builder> Table<B> {
    /// Goes on with every device that an earlier service left; returns when each is served or set aside. What cannot be gone on with
    /// because it is no longer there is cleaned up.
    pub(in crate::device::service) fn resume_all(&self) {
        let mut found = match self.holders.found() {
            Ok(found) => found,
            Err(error) => {
                log::error!("cannot take over what the last service left: {error}");
                return;
            }
        };
        found.remove(LISTENER_NAME);
        for name in record::names(&self.states) {
            found.entry(name).or_default();
        }
        if let Some(probation) = Blame::read(&self.states).probation() {
            log::warn!("the service crashes again and again: going on with one device after the other");
            for (name, holding) in found {
                Blame::suspect(&self.states, Some(&name));
                self.resume(&name, holding);
                thread::sleep(probation);
            }
            return Blame::suspect(&self.states, None);
        }
        thread::scope(|scope| {
            for (name, holding) in found {
                scope.spawn(move || self.resume(&name, holding));
            }
        });
    }

    /// Goes on with one device.
    pub(super) fn resume(&self, name: &str, holding: Holding) {
        let began = Instant::now();
        let mut held = Vec::new();
        let (mut files, mut spec) = (Vec::new(), None);
        for (kind, descriptor) in holding {
            match kind {
                Kind::File => files.push(descriptor),
                Kind::Spec => spec = Some(descriptor),
                Kind::Channel | Kind::Ledger | Kind::Device | Kind::Listener => held.push((kind, descriptor)),
            }
        }
        let in_memory = spec.map(|spec| record::from_memory::<B::Image>(&spec));
        let record = match in_memory {
            Some(Ok(record)) => record,
            other => {
                if let Some(Err(error)) = other {
                    log::error!("{name}: what the keepers hold is damaged: {error}");
                }
                match record::read::<B::Image>(&self.states, name) {
                    Ok(record) => record,
                    Err(error) => {
                        log::error!("{name} cannot be gone on with: {error}");
                        return self.forget(name);
                    }
                }
            }
        };
        let Some(held) = held_device(&record.state, held) else {
            log::warn!("{name} is gone; cleaning up");
            return self.forget(name);
        };
        match self.resume_with(&record, held, files) {
            Ok(()) => log::info!("going on with {name} after {:.0?}", began.elapsed()),
            // Its last user may have gone meanwhile, and taken it along.
            Err(_) if !record.state.device_exists() => {
                log::warn!("{name} is gone; cleaning up");
                self.forget(name);
            }
            Err(error) => {
                log::error!("{name} is lost, and its reads fail: {error}");
                self.forget(name);
            }
        }
    }

    /// Has whoever is at the other end of `stream` hold all devices too. What it holds from before and this process does not serve, though
    /// its state is there, is gone on with: a service that was started by another command may have known nothing of it.
    ///
    /// # Errors
    /// When it does not answer as it should.
    pub(in crate::device::service) fn store_with(&self, stream: UnixStream) -> io::Result<()> {
        let (store, found) = Holders::greet(stream)?;
        let names: Vec<String> = found.keys().cloned().collect();
        for (name, holding) in found {
            if self.entry(&name).is_some() || self.states.read(&name).is_err() {
                continue;
            }
            self.holders.hold(&name, holding)?;
            if let Some(holding) = self.holders.found()?.remove(&name) {
                self.resume(&name, holding);
            }
        }
        self.holders.adopt(store, &names);
        Ok(())
    }

    /// Builds the image of a device that there was before, several times if need be; or why not.
    fn build_again(&self, record: &Record<B::Image>, files: &[OwnedFd]) -> Result<Served, String> {
        if Blame::read(&self.states).is_set_aside(&record.state.name) {
            return Err("it took the service down again and again".to_owned());
        }
        let mut pause = RESUME_PAUSE;
        for _ in 1..RESUME_TRIES {
            match self.build(record.image.clone(), files) {
                Ok(served) => return Ok(served),
                Err(error) => log::error!("{}: {error}", record.state.name),
            }
            thread::sleep(pause);
            pause *= 2;
        }
        self.build(record.image.clone(), files)
            .map_err(|error| error.to_string())
    }

    fn resume_with(
        &self,
        record: &Record<B::Image>,
        held: HeldDevice,
        files: Vec<OwnedFd>,
    ) -> Result<(), ServiceError> {
        let _pending = self.begin()?;
        // Better errors than readers that wait for ever.
        let served = self.build_again(record, &files).unwrap_or_else(|why| {
            log::error!("{} is set aside: {why}", record.state.name);
            nothing::served(record.state.len, why)
        });
        let volume = Arc::new(volume_of(&served, &record.options));
        if volume.len() != record.state.len {
            return Err(ServiceError::Reported(format!(
                "its image has {} bytes now and had {}",
                volume.len(),
                record.state.len
            )));
        }
        let device = Device::resume(&volume, &record.options, record.state.number, held)?;
        let mut record = record.clone();
        record.state.process = this_process();
        let until_unused = record.until_unused;
        let name = record.state.name.clone();
        let state = record.state.clone();
        let entry = Entry {
            // It was in use when it was let go; it may have gone out of use since.
            was_used: AtomicBool::new(until_unused),
            counts: CarriedCounts::of_earlier(&self.states, &state),
            ..Entry::new(volume, served, device, record, files)
        };
        lock(&self.entries).by_name.insert(name, Arc::new(entry));
        // The keepers have everything; only the file tells another process's number.
        let _turn = self.states.turn();
        Ok(self.states.write(&state)?)
    }

    /// Removes what is left of a device that is gone, or that cannot be gone on with. What is in use stays until it is not.
    pub(super) fn forget(&self, name: &str) {
        Blame::clear(&self.states, name);
        record::remove(&self.states, name);
        self.holders.drop(name);
        lock(&self.lost).push(name.to_owned());
        self.bury_lost();
    }

    /// Cleans up after devices that were lost, as far as they are no longer in use.
    pub(super) fn bury_lost(&self) {
        let stays = |name: &String| {
            // Its name is another device's by now, which is well.
            if self.entry(name).is_some() {
                return false;
            }
            let Ok(state) = self.states.read(name) else {
                return false;
            };
            if !state.device_exists() {
                self.states.remove(&state);
                return false;
            }
            let _ = end_reads(&state);
            bury(&self.states, &state).is_err()
        };
        // The lock is not held meanwhile: this may take a while.
        let lost = lock(&self.lost).clone();
        let gone: Vec<String> = lost.into_iter().filter(|name| !stays(name)).collect();
        lock(&self.lost).retain(|name| !gone.contains(name));
    }
}

/// The directories that devices write to which an earlier service left.
pub(in crate::device::service) fn written_by_found<B: Builder>(states: &StateDir, holders: &Holders) -> Vec<PathBuf> {
    let found = holders.found().unwrap_or_default();
    let specs = found.values().flatten().filter(|(kind, _)| *kind == Kind::Spec);
    let in_memory = specs.filter_map(|(_, spec)| record::from_memory::<B::Image>(spec).ok());
    let in_files = record::names(states).into_iter();
    let in_files = in_files.filter_map(|name| record::read::<B::Image>(states, &name).ok());
    let records = in_memory.chain(in_files);
    records.flat_map(|record| B::writes(&record.image)).collect()
}

/// What there is of a device to go on with; none if the kernel does not have it any more.
fn held_device(state: &State, held: Holding) -> Option<HeldDevice> {
    if !state.device_exists() {
        return None;
    }
    match state.backend {
        // A number is given out again: after a boot, or when the device was deleted by another process.
        Backend::Ublk => state.process.is_of_this_boot().then_some(HeldDevice::Ublk),
        Backend::Loop => held_loop(held),
    }
}

/// The descriptors of a loop device; none if the connection or its notes are not among them.
fn held_loop(held: Holding) -> Option<HeldDevice> {
    let (mut channel, mut ledger, mut device) = (None, None, None);
    for (kind, descriptor) in held {
        match kind {
            Kind::Channel => channel = Some(descriptor),
            Kind::Ledger => ledger = Some(descriptor),
            Kind::Device => device = Some(descriptor),
            Kind::Listener | Kind::Spec | Kind::File => {}
        }
    }
    Some(HeldDevice::Loop(HeldLoop {
        channel: channel?,
        ledger: ledger?,
        device,
    }))
}
