//! The end of readers' patience. In: who waits for which chunk, and since when. Out: readers told why their bytes did not come, as
//! soon as their deadline has passed, whatever the request that was to bring them is doing.
//!
//! All readers of an engine have the same deadline, so whoever waits longest is the next one to give up: one timer, set for that one,
//! is enough, and a read that is answered in time costs nothing here.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Engine;
use crate::cache::chunk::{ChunkKey, chunk_len};
use crate::fetch::FetchError;
use crate::fetch::runtime::sleep;
use crate::http::waiting_of;
use crate::units::{LayerId, TarRange};

/// Wakes the timer when readers wait and it is not set.
#[derive(Default)]
pub(super) struct Alarm {
    is_unset: Cell<bool>,
    set: Notify,
}

impl Alarm {
    /// A reader waits from now on.
    pub(super) fn reader_waits(&self) {
        if self.is_unset.replace(false) {
            self.set.notify_one();
        }
    }

    async fn until_a_reader_waits(&self) {
        self.is_unset.set(true);
        self.set.notified().await;
    }
}

impl Engine {
    /// Fails reads as their deadlines pass; as long as the engine lives. Without a deadline there is nothing to do.
    pub(super) async fn keep_deadlines(self: Rc<Self>) {
        while !self.stopping.get() {
            let oldest = self.in_flight.oldest(|layer| self.last_streamed(layer));
            let Some(since) = oldest else {
                self.alarm.until_a_reader_waits().await;
                continue;
            };
            let Some(left) = self.left(since) else { return };
            if left.is_zero() {
                self.end_late_readers();
            } else {
                sleep(left).await;
            }
        }
    }

    /// How much patience a reader has left that has waited since `since`; none if it has no deadline.
    fn left(&self, since: Instant) -> Option<Duration> {
        let deadline = since.checked_add(self.options.deadline)?;
        Some(deadline.saturating_duration_since(Instant::now()))
    }

    fn end_late_readers(&self) {
        let patience = |since| self.left(since).is_none_or(|left| !left.is_zero());
        for (key, waiter, trouble) in self.in_flight.take_ended(|layer| self.last_streamed(layer), patience) {
            let error = trouble.map_or_else(|| self.nothing_came(key), |error| (*error).clone());
            waiter.request.end(Err(error));
        }
    }

    /// When something of a layer last came, if it is being read from end to end: its readers wait for their turn as long as
    /// something comes.
    fn last_streamed(&self, layer: LayerId) -> Option<Instant> {
        let state = self.layer(layer).filter(|state| state.streaming.get())?;
        Some(state.streamed_at.get())
    }

    /// What a reader is told of a chunk whose request has neither failed nor brought it.
    fn nothing_came(&self, key: ChunkKey) -> FetchError {
        let waiting = waiting_of(&self.shared.owner).into_iter().next();
        let why = waiting.map(|wait| format!("{}: {}", wait.place, wait.why));
        let (url, size) = self
            .layer(key.layer)
            .map_or_else(Default::default, |state| (state.origin.name(), state.size));
        FetchError::Deadline {
            url,
            range: TarRange::new(key.start(), chunk_len(size, key.index)),
            after: self.options.deadline,
            why: why.unwrap_or_else(|| "they were asked for and are still on their way".to_owned()),
        }
    }
}
