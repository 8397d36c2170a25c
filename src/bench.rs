//! The cold-start benchmark. In: a layer, a link and a command. Out: how long the command takes from nothing, here and by
//! the usual ways, as a table and a report.
//!
//! [`origin`] is the server all of it is measured against; tests and benchmarks of other rooms use it too. This room
//! measures and must not help: no run may profit from what an earlier one left in a cache.

pub mod origin;
