//! The state of the pool on the fetch thread: what the engines of all devices share.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::time::Instant;

use super::budget::PoolBudget;
use super::peers::Peers;
use crate::fetch::options::PoolOptions;
use crate::fetch::runtime::{self, Spawner};
use crate::fetch::stats::PoolGauges;
use crate::fetch::transport::Connections;

/// What the engines of all devices share. Lives on the fetch thread.
pub(crate) struct PoolState {
    pub(super) options: PoolOptions,
    pub(super) connections: Rc<Connections>,
    pub(super) budget: Rc<PoolBudget>,
    pub(super) peers: Peers,
    /// When a reader of any device last had to wait.
    pub(super) last_read: Cell<Instant>,
    /// Who may decode or digest: as many at once as there are CPUs.
    pub(super) workers: Arc<Semaphore>,
    pub(super) gauges: Arc<PoolGauges>,
}

impl PoolState {
    /// For `options`; connections belong to the tasks that `spawner` spawns, not to the device that opens them.
    pub(crate) fn new(options: &PoolOptions, gauges: Arc<PoolGauges>, spawner: Spawner) -> Self {
        Self {
            connections: Connections::new(options, spawner, gauges.clone()),
            budget: PoolBudget::new(options.connections, gauges.clone()),
            peers: Peers::default(),
            last_read: Cell::new(Instant::now()),
            workers: Arc::new(Semaphore::new(runtime::workers())),
            options: options.clone(),
            gauges,
        }
    }
}
