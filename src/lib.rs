//! A container layer attached as a Linux block device before it has been downloaded.
//!
//! A tar layer's headers say where every byte of its files lies. From the headers alone this crate computes a read-only
//! filesystem image whose data extents are byte ranges of the layer, offers it to the kernel as a block device, and
//! fetches ranges of the layer only when the kernel reads them.
//!
//! The rooms, in the order data walks through them (docs/ARCHITECTURE.md is the tour):
//! `source` → [`layer`] → [`index`] → [`tree`] → [`image`] → [`fetch`] → `device` → mount, bench and the command.

pub mod diff;
pub mod digest;
pub mod image;
pub mod index;
pub mod layer;
pub mod tree;
pub mod units;

#[cfg(feature = "command")]
pub mod bench;
#[cfg(feature = "command")]
pub mod cache;
#[cfg(feature = "command")]
pub mod commands;
#[cfg(feature = "command")]
pub mod device;
#[cfg(feature = "command")]
pub mod fetch;
#[cfg(feature = "command")]
pub mod interrupt;
#[cfg(feature = "command")]
pub mod mount;
#[cfg(feature = "command")]
pub mod open;
#[cfg(feature = "command")]
pub mod prefetch;
#[cfg(feature = "command")]
pub mod quantity;
#[cfg(feature = "command")]
pub mod source;
