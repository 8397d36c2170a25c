//! Devices that have layers in common. In: chunks that one engine's requests bring, and what one has found out about a whole layer. Out:
//! the same to the engines of other devices that use the same content: a chunk that one of them brings is not asked for by another.
//!
//! Invariant: an engine's code runs among its own tasks only, so that its panics are its own: what one tells another lies in a
//! letter box until that one's main task looks. A follower never waits for a server that it would not ask itself, nor for one
//! that fails another device: at the first failure it is told to ask for itself.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::{Rc, Weak};
use std::sync::Arc;

use super::{Engine, Waiter};
use crate::cache::Slice;
use crate::cache::chunk::{Chunk, ChunkKey};
use crate::cache::early::FirstUse;
use crate::fetch::FetchError;
use crate::fetch::stats::add;
use crate::fetch::transport::HostKey;
use crate::http::WaitOwner;
use crate::prefetch::ChunkRange;
use crate::units::{LayerId, TarRange, len_u64};

/// A chunk of a content, whatever its devices call the layer: the content's number, and the chunk's.
type SharedKey = (u32, u32);

/// What one engine tells another.
pub(super) enum Letter {
    /// A chunk that another one brought is here.
    Arrived(ChunkKey, Arc<Chunk>),
    /// It does not come by the other one.
    NotComing(ChunkKey),
    /// The whole layer was found to be another one than it has to be.
    Poisoned(LayerId, FetchError),
}

/// A chunk that an engine's request brings.
struct Bringing {
    by: Weak<Engine>,
    /// From where.
    server: Option<Rc<HostKey>>,
    /// Who waits when the request waits: followers are among them.
    waits_for_it: WaitOwner,
    followers: Vec<Follower>,
}

/// An engine that waits for a chunk that another one brings.
struct Follower {
    engine: Weak<Engine>,
    /// What it calls the chunk.
    key: ChunkKey,
    owner: WaitOwner,
}

/// The engines of a pool and what they bring for each other. For one thread.
#[derive(Default)]
pub(super) struct Peers {
    engines: RefCell<Vec<Weak<Engine>>>,
    /// Chunks under way of contents that several devices use.
    bringing: RefCell<HashMap<SharedKey, Bringing>>,
}

impl Peers {
    pub(super) fn join(&self, engine: &Rc<Engine>) {
        let mut engines = self.engines.borrow_mut();
        engines.retain(|engine| engine.strong_count() > 0);
        engines.push(Rc::downgrade(engine));
    }
}

impl Engine {
    /// The chunk's key among devices, if others use its layer's content.
    fn shared_key(&self, key: ChunkKey) -> Option<SharedKey> {
        let content = &self.fetched(key.layer)?.content;
        content.is_shared().then(|| (content.memory.number(), key.index))
    }

    /// A request of this engine, whose waits are those of `request`, brings a chunk.
    pub(super) fn bring(self: &Rc<Self>, key: ChunkKey, request: &WaitOwner) {
        if let Some(shared) = self.shared_key(key) {
            let mut all = self.pool.peers.bringing.borrow_mut();
            if all.get(&shared).is_none_or(|bringing| bringing.by.strong_count() == 0) {
                let bringing = Bringing {
                    by: Rc::downgrade(self),
                    server: self.server_of(key.layer),
                    waits_for_it: request.clone(),
                    followers: Vec::new(),
                };
                all.insert(shared, bringing);
            }
        }
    }

    /// Whether a request of another engine brings a chunk.
    pub(super) fn is_brought(&self, key: ChunkKey) -> bool {
        if self.pool.peers.bringing.borrow().is_empty() {
            return false;
        }
        let bringing = self.pool.peers.bringing.borrow();
        self.shared_key(key)
            .and_then(|shared| bringing.get(&shared))
            .is_some_and(|bringing| bringing.is_for(self, key.layer))
    }

    fn server_of(&self, layer: LayerId) -> Option<Rc<HostKey>> {
        self.layer(layer)?.server.clone()
    }

    /// Waits for a chunk that another engine brings; says whether one does.
    pub(super) fn follow(self: &Rc<Self>, key: ChunkKey) -> bool {
        if self.pool.peers.bringing.borrow().is_empty() {
            return false;
        }
        let Some(shared) = self.shared_key(key) else {
            return false;
        };
        let mut all = self.pool.peers.bringing.borrow_mut();
        let Some(bringing) = all.get_mut(&shared).filter(|bringing| bringing.is_for(self, key.layer)) else {
            return false;
        };
        bringing.waits_for_it.join(&self.shared.owner);
        bringing.followers.push(Follower {
            engine: Rc::downgrade(self),
            key,
            owner: self.shared.owner.clone(),
        });
        self.in_flight.set_coming(key);
        true
    }

    /// A chunk that this engine was to bring is here, or does not come: whoever follows is told.
    pub(super) fn end_bringing(&self, key: ChunkKey, chunk: Option<&Arc<Chunk>>) {
        if self.pool.peers.bringing.borrow().is_empty() {
            return;
        }
        let Some(layer) = self.fetched(key.layer) else { return };
        let shared = (layer.content.memory.number(), key.index);
        let mut all = self.pool.peers.bringing.borrow_mut();
        if all.get(&shared).is_none_or(|bringing| bringing.is_by_another(self)) {
            return;
        }
        let ended = all.remove(&shared);
        drop(all);
        if let Some(bringing) = ended {
            bringing.end(chunk);
        }
    }

    /// The same for all that it was to bring of `chunks`, none of which comes now.
    pub(super) fn end_bringing_of(&self, chunks: ChunkRange) {
        if self.pool.peers.bringing.borrow().is_empty() {
            return;
        }
        chunks.keys().for_each(|key| self.end_bringing(key, None));
    }

    /// The same for everything.
    pub(super) fn end_bringing_all(&self) {
        let ended: Vec<_> = {
            let mut all = self.pool.peers.bringing.borrow_mut();
            let own = all.extract_if(|_, bringing| !bringing.is_by_another(self));
            own.map(|(_, bringing)| bringing).collect()
        };
        for bringing in ended {
            bringing.end(None);
        }
    }

    fn post(&self, letter: Letter) {
        self.letters.borrow_mut().push(letter);
        self.shared.nudge.notify_one();
    }

    /// Does what other engines' letters ask for.
    pub(super) fn read_letters(self: &Rc<Self>) {
        if self.letters.borrow().is_empty() {
            return;
        }
        let letters = self.letters.take();
        for letter in letters {
            match letter {
                Letter::Arrived(key, chunk) => self.arrived_by_another(key, &chunk),
                Letter::NotComing(key) if self.in_flight.contains(key) => self.fetch_again(key),
                Letter::NotComing(_) => {}
                Letter::Poisoned(layer, error) => {
                    self.poison_as(layer, error);
                }
            }
        }
    }

    /// A chunk that another engine brought: it lies in memory, or did, and goes to all readers that wait for it.
    fn arrived_by_another(self: &Rc<Self>, key: ChunkKey, chunk: &Arc<Chunk>) {
        if self.poison_of(key.layer).is_some() {
            return;
        }
        let Some(pending) = self.in_flight.take(key) else {
            return;
        };
        self.planner.borrow_mut().not_fetched(key);
        if !pending.waiters.is_empty() {
            self.used_first(key, chunk);
        }
        for Waiter {
            request,
            slot,
            from,
            len,
        } in pending.waiters
        {
            request.note_another_device();
            request.fill(slot, Slice::new(chunk.clone(), from, len));
        }
        let mut now = Vec::new();
        self.planner
            .borrow_mut()
            .arrived(key, &|key, show| self.peek(key, show), &mut now);
        self.launch(&now);
    }

    /// A chunk is used here that another engine may have prefetched.
    fn used_first(&self, key: ChunkKey, chunk: &Chunk) {
        chunk.touch();
        if matches!(self.first_use(key), FirstUse::Yes { prefetched: true, .. }) {
            let bytes = len_u64(chunk.bytes().len());
            add(&self.counters.prefetched_used, bytes);
            self.read_by_us(key.layer, TarRange::new(key.start(), bytes));
        }
    }

    /// A range of a layer, prefetched by whatever engine, was read here for the first time: no other one has it unread any more.
    pub(super) fn read_by_us(&self, layer: LayerId, range: TarRange) {
        for (engine, layer) in self.sharing(layer) {
            for key in ChunkRange::of(layer, range).keys() {
                engine.planner.borrow_mut().not_fetched(key);
            }
        }
    }

    /// The whole layer was found to be another one: so it is for the other devices that use its content.
    pub(super) fn tell_of_poison(&self, layer: LayerId, error: &FetchError) {
        for (engine, layer) in self.sharing(layer) {
            engine.post(Letter::Poisoned(layer, error.clone()));
        }
    }

    /// The other engines that use the content of a layer, and what they call it.
    fn sharing(&self, layer: LayerId) -> Vec<(Rc<Engine>, LayerId)> {
        let Some(own) = self.fetched(layer).filter(|layer| layer.content.is_shared()) else {
            return Vec::new();
        };
        let engines = self.pool.peers.engines.borrow();
        let others = engines
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|engine| !std::ptr::eq(&raw const **engine, self));
        let mut found = Vec::new();
        for engine in others {
            let layers = (0..).map(LayerId).take(engine.layers.len());
            let same = layers.filter(|layer| {
                engine
                    .fetched(*layer)
                    .is_some_and(|layer| layer.content.is(&own.content))
            });
            found.extend(same.map(|layer| (engine.clone(), layer)));
        }
        found
    }
}

impl Bringing {
    /// Tells the followers that the chunk is here, or that it does not come.
    fn end(self, chunk: Option<&Arc<Chunk>>) {
        for Follower { engine, key, owner } in self.followers {
            self.waits_for_it.leave(&owner);
            if let Some(engine) = engine.upgrade() {
                engine.post(match chunk {
                    Some(chunk) => Letter::Arrived(key, chunk.clone()),
                    None => Letter::NotComing(key),
                });
            }
        }
    }

    /// Whether it is as good as a request of `engine`'s own for its `layer`.
    fn is_for(&self, engine: &Engine, layer: LayerId) -> bool {
        self.is_by_another(engine) && self.by.strong_count() > 0 && self.server == engine.server_of(layer)
    }

    fn is_by_another(&self, engine: &Engine) -> bool {
        !std::ptr::eq(self.by.as_ptr(), engine)
    }
}
