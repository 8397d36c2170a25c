//! The start of one device. In: what its volume's recorder has. Out: the trace of it, for who asks and for later; and once it is over, the
//! same to whoever learns from it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{Served, StartLearner};
use crate::device::state::State;
use crate::device::trace::Trace;
use crate::image::FileMap;
use crate::profile::{RecorderLimits, StartRecorder};

/// The start of a device that this process made.
pub(super) struct DeviceStart {
    recorder: Arc<StartRecorder>,
    files: Option<Arc<dyn FileMap>>,
    learner: Option<Box<dyn StartLearner>>,
    /// Whether what was read is kept.
    is_kept: AtomicBool,
}

impl DeviceStart {
    /// Of a device that is about to be made of `served`: from now on what earlier starts read is fetched ahead.
    pub(super) fn begin(served: &mut Served) -> Self {
        let learner = served.learner.take();
        if let Some(learner) = &learner {
            learner.begin();
        }
        Self {
            recorder: Arc::new(StartRecorder::new(RecorderLimits::default())),
            files: served.files.take(),
            learner,
            is_kept: AtomicBool::new(false),
        }
    }

    /// Notes the reads of the device's volume.
    pub(super) fn recorder(&self) -> Arc<StartRecorder> {
        Arc::clone(&self.recorder)
    }

    /// What was read until now.
    pub(super) fn trace(&self, state: &State) -> Trace {
        let reads = self.recorder.reads();
        Trace::new(state, &reads, self.files.as_deref(), self.recorder.look())
    }

    /// Keeps what was read, if the start is over by now.
    pub(super) fn glance(&self, state: &State) {
        if self.recorder.look() {
            self.keep(state);
        }
    }

    /// Ends the start, and keeps what was read; once.
    pub(super) fn keep(&self, state: &State) {
        self.recorder.end();
        if self.is_kept.swap(true, Ordering::Relaxed) {
            return;
        }
        let reads = self.recorder.reads();
        if reads.is_empty() {
            return;
        }
        if let Some(learner) = &self.learner {
            let trace = Trace::new(state, &reads, self.files.as_deref(), true);
            learner.learn(&reads, &trace);
        }
    }
}
