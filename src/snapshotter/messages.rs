//! The messages of containerd's snapshots service, version 1, as protocol buffers: names, numbers and types of fields are those of
//! `api/services/snapshots/v1/snapshots.proto`, `api/types/mount.proto` (containerd, Apache-2.0) and protobuf's well-known
//! `Timestamp`, `FieldMask` and `Empty`. Fields are only ever added there; what is not known here is passed over.
//!
//! What a protobuf compiler would write is these structures and nothing else, so no compiler is needed to build.

use std::collections::BTreeMap;

/// Where the service's calls are: `SERVICE/Prepare`.
pub const SERVICE: &str = "/containerd.services.snapshots.v1.Snapshots/";

/// Labels of a snapshot.
pub type Labels = BTreeMap<String, String>;

/// One mount that makes a snapshot's directory, as mount(2) takes it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Mount {
    /// The file system's type, or `bind`.
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// A directory for `bind`, a word for others.
    #[prost(string, tag = "2")]
    pub source: String,
    /// Below the directory that is mounted on; empty for itself.
    #[prost(string, tag = "3")]
    pub target: String,
    /// As of fstab.
    #[prost(string, repeated, tag = "4")]
    pub options: Vec<String>,
}

/// A moment, since 1970 UTC.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Timestamp {
    /// Whole seconds.
    #[prost(int64, tag = "1")]
    pub seconds: i64,
    /// The rest, in nanoseconds.
    #[prost(int32, tag = "2")]
    pub nanos: i32,
}

/// Which fields are meant.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct FieldMask {
    /// Paths of fields.
    #[prost(string, repeated, tag = "1")]
    pub paths: Vec<String>,
}

/// What a snapshot is.
// Conversions that are derived for it make it reachable.
#[allow(unnameable_types)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
pub enum Kind {
    /// No snapshot has it.
    Unknown = 0,
    /// Read-only, above a committed one.
    View = 1,
    /// Being written.
    Active = 2,
    /// Finished; others may be above it.
    Committed = 3,
}

/// What is told of a snapshot.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Info {
    /// Its name; the key under which it was made, until it is committed.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The snapshot below it, or empty.
    #[prost(string, tag = "2")]
    pub parent: String,
    /// What it is.
    #[prost(enumeration = "Kind", tag = "3")]
    pub kind: i32,
    /// When it was made, or committed.
    #[prost(message, optional, tag = "4")]
    pub created_at: Option<Timestamp>,
    /// When it was changed the last time.
    #[prost(message, optional, tag = "5")]
    pub updated_at: Option<Timestamp>,
    /// What clients noted.
    #[prost(btree_map = "string, string", tag = "6")]
    pub labels: Labels,
}

/// Of `Prepare` and `View`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PrepareRequest {
    /// Which plug-in is meant; there is one.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// What the snapshot is to be called.
    #[prost(string, tag = "2")]
    pub key: String,
    /// The one below it, or empty.
    #[prost(string, tag = "3")]
    pub parent: String,
    /// What is noted with it.
    #[prost(btree_map = "string, string", tag = "4")]
    pub labels: Labels,
}

/// The answer to `Prepare`, `View` and `Mounts`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct MountsResponse {
    /// To be done in this order.
    #[prost(message, repeated, tag = "1")]
    pub mounts: Vec<Mount>,
}

/// Of `Mounts`, `Remove`, `Stat` and `Usage`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct KeyRequest {
    /// Which plug-in is meant.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Which snapshot.
    #[prost(string, tag = "2")]
    pub key: String,
}

/// Of `Commit`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct CommitRequest {
    /// Which plug-in is meant.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// What the snapshot is called from now on.
    #[prost(string, tag = "2")]
    pub name: String,
    /// What it was called.
    #[prost(string, tag = "3")]
    pub key: String,
    /// What is noted with it.
    #[prost(btree_map = "string, string", tag = "4")]
    pub labels: Labels,
    /// What is to be below it, of snapshotters that can move one; empty elsewhere.
    #[prost(string, tag = "5")]
    pub parent: String,
}

/// The answer to `Stat` and `Update`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct InfoResponse {
    /// The snapshot.
    #[prost(message, optional, tag = "1")]
    pub info: Option<Info>,
}

/// Of `Update`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct UpdateRequest {
    /// Which plug-in is meant.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// The snapshot as it is to be.
    #[prost(message, optional, tag = "2")]
    pub info: Option<Info>,
    /// What of it is meant; everything that can be changed, if nothing is named.
    #[prost(message, optional, tag = "3")]
    pub update_mask: Option<FieldMask>,
}

/// Of `List`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ListRequest {
    /// Which plug-in is meant.
    #[prost(string, tag = "1")]
    pub snapshotter: String,
    /// Which snapshots are meant: those that any of these fits, or all.
    #[prost(string, repeated, tag = "2")]
    pub filters: Vec<String>,
}

/// A part of the answer to `List`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ListResponse {
    /// Some snapshots.
    #[prost(message, repeated, tag = "1")]
    pub info: Vec<Info>,
}

/// The answer to `Usage`.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct UsageResponse {
    /// Bytes on disk, without those below it.
    #[prost(int64, tag = "1")]
    pub size: i64,
    /// Files and directories.
    #[prost(int64, tag = "2")]
    pub inodes: i64,
}

/// Nothing.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct Empty {}
