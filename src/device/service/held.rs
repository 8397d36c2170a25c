//! Descriptors that are held for the service, by the names of what they are of. In: what the service asks ([`Ask`]). Out: the same
//! descriptors, when it asks what is held.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;

use serde::{Deserialize, Serialize};

use super::message::{receive, send};

/// No message to or from a keeper is longer, in bytes: names and kinds only.
pub(super) const MAX_KEEPER_BYTES: u64 = 1 << 20;

/// What a held descriptor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Kind {
    /// The listening control socket of the service.
    Listener,
    /// A FUSE connection.
    Channel,
    /// The memory in which a FUSE session notes its requests.
    Ledger,
    /// The loop device, open so that it stays without a user.
    Device,
    /// The device's specification with its secrets, in memory.
    Spec,
    /// A file of this machine that the device's bytes or index lie in; in the specification's order.
    File,
}

impl Kind {
    /// All of them.
    const ALL: [Self; 6] = [
        Self::Listener,
        Self::Channel,
        Self::Ledger,
        Self::Device,
        Self::Spec,
        Self::File,
    ];

    /// What it is called where names are texts.
    const fn word(self) -> &'static str {
        match self {
            Self::Listener => "listener",
            Self::Channel => "channel",
            Self::Ledger => "ledger",
            Self::Device => "device",
            Self::Spec => "spec",
            Self::File => "file",
        }
    }

    /// The kind of that word.
    pub(super) fn of_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.word() == word)
    }
}

/// What is held of one device, or of the service itself.
pub(super) type Holding = Vec<(Kind, OwnedFd)>;

/// What the service asks of who holds descriptors for it. Each is answered by [`Said`].
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Ask {
    /// What it holds.
    List,
    /// To hold these descriptors under a name, in place of what it holds under it.
    Hold { name: String, kinds: Vec<Kind> },
    /// To hold nothing under this name any more.
    Drop { name: String },
    /// To leave it to a command to start the next service, for a while.
    StandBack,
    /// To end: there is nothing left to hold.
    Retire,
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Said {
    /// To [`Ask::List`]: as many [`Said::Held`] follow.
    Holding { count: usize, version: String, pid: u32 },
    /// What is held under one name, with its descriptors.
    Held { name: String, kinds: Vec<Kind> },
    /// Done.
    Done,
}

/// The version that one who holds descriptors says it is of.
pub(super) fn version() -> String {
    env!("CARGO_PKG_VERSION").to_owned()
}

/// All that is held.
#[derive(Debug, Default)]
pub(super) struct HeldSet(BTreeMap<String, Holding>);

impl HeldSet {
    /// What is held under `name`.
    pub(super) fn get(&self, name: &str) -> Option<&Holding> {
        self.0.get(name)
    }

    /// All names and what is held under them.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&String, &Holding)> {
        self.0.iter()
    }

    /// Adds a descriptor to what is held under `name`.
    pub(super) fn add(&mut self, name: &str, kind: Kind, descriptor: OwnedFd) {
        self.0.entry(name.to_owned()).or_default().push((kind, descriptor));
    }

    /// Holds `holding` under `name`, in place of what was.
    pub(super) fn hold(&mut self, name: String, holding: Holding) {
        self.0.insert(name, holding);
    }

    /// Holds nothing under `name` any more.
    pub(super) fn let_go(&mut self, name: &str) {
        self.0.remove(name);
    }

    /// Holds nothing any more.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }

    /// Answers [`Ask::List`].
    ///
    /// # Errors
    /// What the socket says.
    pub(super) fn tell(&self, link: &UnixStream) -> io::Result<()> {
        let holding = Said::Holding {
            count: self.0.len(),
            version: version(),
            pid: std::process::id(),
        };
        send(link, &holding, &[])?;
        for (name, holding) in &self.0 {
            let said = Said::Held {
                name: name.clone(),
                kinds: holding.iter().map(|(kind, _)| *kind).collect(),
            };
            let descriptors: Vec<_> = holding.iter().map(|(_, descriptor)| descriptor.as_fd()).collect();
            send(link, &said, &descriptors)?;
        }
        Ok(())
    }
}

/// Puts kinds and descriptors of one message together.
///
/// # Errors
/// When they are not as many.
pub(super) fn holding(kinds: Vec<Kind>, descriptors: Vec<OwnedFd>) -> io::Result<Holding> {
    if kinds.len() != descriptors.len() {
        let what = "kinds and descriptors differ";
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok(kinds.into_iter().zip(descriptors).collect())
}

/// Waits for what the service asks next, and the descriptors that came with it.
///
/// # Errors
/// What the socket says; [`io::ErrorKind::UnexpectedEof`] when the service has ended.
pub(super) fn hear(link: &UnixStream) -> io::Result<(Ask, Vec<OwnedFd>)> {
    receive::<Ask>(link, MAX_KEEPER_BYTES)?.ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Says that what was asked is done.
///
/// # Errors
/// What the socket says.
pub(super) fn done(link: &UnixStream) -> io::Result<()> {
    send(link, &Said::Done, &[])
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.word())
    }
}
