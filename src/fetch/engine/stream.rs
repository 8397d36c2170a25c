//! A layer read from end to end: because its server knows no ranges, or because its blob can only be decoded from the
//! beginning. In: the blob, as it comes. Out: all chunks, to the readers that wait for them and to the disk cache.
//!
//! Readers of what the stream has not passed wait for it; what it has passed lies in the disk cache, or in a file without a name
//! where there is none. A broken connection is resumed where it broke, with the decoder as it was.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::flight::{Backoff, LOOK_AT_READERS};
use super::origin::{Body, Trouble};
use super::pipeline::{ChunkOut, Chunker, DecodePipeline};
use super::{Engine, LayerState};
use crate::cache::chunk::ChunkKey;
use crate::cache::disk::LayerCache;
use crate::fetch::FetchError;
use crate::fetch::runtime::{self, sleep};
use crate::fetch::stats::add;
use crate::layer::Decoder;
use crate::prefetch::{ChunkRange, Planned};
use crate::units::{LayerId, TarOffset, TarRange, len_u64, len_usize};

impl Engine {
    /// Starts reading a layer from end to end, unless that is under way. `first` is an answer that has the whole blob.
    pub(super) fn start_stream(self: &Rc<Self>, state: &Rc<LayerState>, layer: LayerId, first: Option<Body>) {
        struct Streaming(Rc<Engine>, Rc<LayerState>, LayerId);
        impl Drop for Streaming {
            fn drop(&mut self) {
                self.1.streaming.set(false);
                self.0.after_stream(&self.1, self.2);
            }
        }
        if state.streaming.replace(true) {
            return;
        }
        state.streamed_at.set(Instant::now());
        state.streamed_to.set(0);
        self.make_room_for_stream(state, layer);
        let guard = Streaming(self.clone(), state.clone(), layer);
        self.spawn(async move {
            let Streaming(engine, state, layer) = &guard;
            if let Err(error) = engine.stream(state, *layer, first).await {
                if !matches!(error, FetchError::Stopped) {
                    log::warn!("{error}");
                }
                engine.give_up(state.all(*layer), &error);
            }
        });
    }

    async fn stream(
        self: &Rc<Self>,
        state: &Rc<LayerState>,
        layer: LayerId,
        mut first: Option<Body>,
    ) -> Result<(), FetchError> {
        let mut backoff = Backoff::new(self.options.wrong_for);
        let mut pipeline = None;
        let wrong = Cell::new(None);
        loop {
            let before = pipeline
                .as_ref()
                .map_or(0, |pipeline: &DecodePipeline| pipeline.blob_at);
            let trouble = match self.stream_on(state, layer, &mut pipeline, &wrong, first.take()).await {
                Ok(()) => {
                    state.mismatched.borrow_mut().clear();
                    if let Some((blob, tar)) = pipeline.and_then(DecodePipeline::digests) {
                        self.verify_whole(state, layer, Some(blob), tar);
                        self.verify_if_complete(state, layer);
                    }
                    return Ok(());
                }
                Err(_) if self.stopping.get() => return Err(FetchError::Stopped),
                Err(trouble) => trouble,
            };
            add(&self.counters.errors, 1);
            if pipeline.as_ref().map_or(0, |pipeline| pipeline.blob_at) > before {
                backoff.reset();
            }
            let range = TarRange::new(TarOffset(0), state.size);
            let pause = match &trouble {
                Trouble::Wrong(why) => {
                    // From the beginning, once more.
                    pipeline = None;
                    let index = wrong.take().unwrap_or(0);
                    self.digest_mismatched(state, ChunkKey { layer, index }, Instant::now(), why)?
                }
                Trouble::Net(failure) => backoff.pause(failure, state, range)?,
                Trouble::File(error) => Self::pause_for_file(error, state, range)?,
            };
            let name = state.origin.name();
            let why = trouble.why(&name);
            let late = self.late(state, range, &trouble);
            log::warn!("{name}: {why}; reading on in {pause:.1?}");
            backoff.note(&name, &why, pause);
            self.in_flight.note_trouble(state.all(layer), &late);
            let until = Instant::now().checked_add(pause);
            loop {
                let left = until.map_or(Duration::MAX, |until| until.saturating_duration_since(Instant::now()));
                // As long as something comes, a reader waits for its turn; when nothing does, for as long as it has not waited yet.
                if state.streamed_at.get().elapsed().saturating_add(left) > self.options.deadline {
                    self.expire(state.all(layer), left, &late);
                }
                if left.is_zero() || self.stopping.get() {
                    break;
                }
                sleep(left.min(LOOK_AT_READERS)).await;
            }
            add(&self.counters.retries, 1);
        }
    }

    /// One request for what is left of the blob.
    async fn stream_on(
        self: &Rc<Self>,
        state: &Rc<LayerState>,
        layer: LayerId,
        kept: &mut Option<DecodePipeline>,
        wrong: &Cell<Option<u32>>,
        first: Option<Body>,
    ) -> Result<(), Trouble> {
        let mut pipeline = match kept.take() {
            Some(pipeline) => pipeline,
            None => Self::course_of_all(state)?,
        };
        let (start, blob_len) = (pipeline.blob_at, state.blob_size());
        let asked = match first {
            Some(body) => Ok(body),
            None if start == blob_len => {
                let short = pipeline.tar_at() < state.size;
                *kept = Some(pipeline);
                return if short { Err(holds_less()) } else { Ok(()) };
            }
            None => state.origin.get(&self.client, start, blob_len - start, true).await,
        };
        let mut body = match asked {
            Ok(body) => body,
            Err(trouble) => {
                *kept = Some(pipeline);
                return Err(trouble);
            }
        };
        self.note_head(&body);
        // A server that knows no ranges begins at the beginning.
        let mut skip = if body.is_whole() { start } else { 0 };
        let mut next = body.next().await;
        loop {
            let mut piece = match next {
                Ok(Some(piece)) => piece,
                ended => {
                    let short = pipeline.tar_at() < state.size;
                    *kept = Some(pipeline);
                    ended?;
                    return if short { Err(holds_less()) } else { Ok(()) };
                }
            };
            if self.stopping.get() {
                return Err(Trouble::Wrong("the fetcher was shut down".to_owned()));
            }
            self.note_arrival(state, len_u64(piece.len()));
            let skipped = len_usize(skip).min(piece.len());
            skip -= len_u64(skipped);
            state.note_streamed(pipeline.blob_at + len_u64(piece.len() - skipped));
            let feeding = self.feed(pipeline, piece.split_off(skipped), async |cut| match cut {
                ChunkOut::Whole {
                    index, right: false, ..
                } => {
                    wrong.set(wrong.take().or(Some(index)));
                }
                ChunkOut::Wrong { index } => wrong.set(wrong.take().or(Some(index))),
                ChunkOut::Whole { index, bytes, .. } if wrong.get().is_none() => {
                    self.deliver_streamed(state, ChunkKey { layer, index }, bytes);
                    // The stream is as fast as the disk: what is not kept would have to be streamed again.
                    while self.budget.is_disk_behind() && !state.writer.is_idle() {
                        state.writer.progress().await;
                    }
                }
                _ => {}
            });
            let (fed, following) = tokio::join!(feeding, body.next());
            pipeline = fed.map_err(Trouble::Wrong)?;
            if let Some(index) = wrong.get() {
                return Err(Trouble::Wrong(format!("chunk {index} is not what the index says")));
            }
            next = following;
        }
    }

    /// From the first byte to the last.
    fn course_of_all(state: &LayerState) -> Result<DecodePipeline, Trouble> {
        let decoder = match &state.coded {
            Some(coded) => {
                Some(Decoder::start(&coded.table, 0, &[]).map_err(|error| Trouble::Wrong(error.to_string()))?)
            }
            None => None,
        };
        let chunker = Chunker::new(state.size, 0, 0, state.size);
        // A table of contents begins with the first file's content, and the blob with its headers.
        let begins = state.coded.as_ref().map_or(0, |coded| coded.table.span(0).blob.start);
        let pipeline = DecodePipeline::new(decoder, begins, chunker, state.verifier.clone()).fed_from_the_first_byte();
        Ok(if state.whole.is_empty() {
            pipeline
        } else {
            pipeline.hashing()
        })
    }

    /// Leaves `chunks` to the stream: it brings them, or has brought them already.
    pub(super) fn leave_to_stream(self: &Rc<Self>, chunks: ChunkRange) {
        self.end_bringing_of(chunks);
        let mut cached = Vec::new();
        for key in self.in_flight.keys_in(chunks) {
            self.in_flight.set_coming(key);
            if self.is_stored(key) {
                cached.push(key);
            }
        }
        self.read_cached(&cached);
    }

    /// The stream is at an end: a reader that came too late finds its chunk in the cache, or makes the layer be read again.
    fn after_stream(self: &Rc<Self>, state: &LayerState, layer: LayerId) {
        if self.stopping.get() {
            return;
        }
        let (mut cached, mut again) = (Vec::new(), Vec::new());
        for key in self.in_flight.keys_in(state.all(layer)) {
            if self.is_stored(key) {
                cached.push(key);
            } else if self.release(key) {
                again.push(Planned::from(key));
            }
        }
        self.read_cached(&cached);
        self.launch(&again);
    }

    fn make_room_for_stream(&self, state: &LayerState, layer: LayerId) {
        let name = state.origin.name();
        if let Some(cache) = self.cache(layer) {
            cache.mark_costly();
        }
        if state.can_seek() && !state.warned.replace(true) {
            log::warn!(
                "{name}: the server answers 200 to a Range: reading all {} bytes once, in order",
                state.blob_size()
            );
        }
        if let Some(shared) = self.fetched(layer)
            && shared.content.cache.get().is_none()
        {
            match LayerCache::temporary(&runtime::temporary_dir(), shared.size) {
                // It is not set yet: only this thread sets it.
                Ok(temporary) => drop(shared.content.cache.set(Arc::new(temporary))),
                Err(error) => log::warn!("{name}: no place to keep what is streamed: {error}"),
            }
        }
    }
}

fn holds_less() -> Trouble {
    Trouble::Wrong("the blob holds less than its index says".to_owned())
}
