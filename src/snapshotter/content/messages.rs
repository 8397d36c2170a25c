//! The messages of containerd's content, images and introspection services, version 1, as far as they are used here: names, numbers and
//! types of fields are those of `api/services/{content,images,introspection}/v1/*.proto` and `api/types/descriptor.proto`
//! (containerd, Apache-2.0).

use crate::snapshotter::messages::{FieldMask, Labels};

/// Where the content service's calls are.
pub const CONTENT: &str = "/containerd.services.content.v1.Content/";
/// Where the images service's calls are.
pub const IMAGES: &str = "/containerd.services.images.v1.Images/";

/// Where the introspection service's calls are.
pub const INTROSPECTION: &str = "/containerd.services.introspection.v1.Introspection/";

/// What an image's name stands for.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Target {
    /// What it is.
    #[prost(string, tag = "1")]
    pub media_type: String,
    /// Of its bytes.
    #[prost(string, tag = "2")]
    pub digest: String,
    /// In bytes.
    #[prost(int64, tag = "3")]
    pub size: i64,
}

/// An image's name and what it stands for.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Image {
    /// Its name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Its manifest, or an index.
    #[prost(message, optional, tag = "3")]
    pub target: Option<Target>,
}

/// Of `Images/Get`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct GetImageRequest {
    /// Which.
    #[prost(string, tag = "1")]
    pub name: String,
}

/// The answer to `Images/Get`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct GetImageResponse {
    /// The image.
    #[prost(message, optional, tag = "1")]
    pub image: Option<Image>,
}

/// What is told of content.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ContentInfo {
    /// Of its bytes.
    #[prost(string, tag = "1")]
    pub digest: String,
    /// In bytes.
    #[prost(int64, tag = "2")]
    pub size: i64,
    /// What is noted with it: what it refers to, and where it is from.
    #[prost(btree_map = "string, string", tag = "5")]
    pub labels: Labels,
}

/// Of `Content/Info`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct InfoRequest {
    /// Which.
    #[prost(string, tag = "1")]
    pub digest: String,
}

/// The answer to `Content/Info` and `Content/Update`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct InfoResponse {
    /// The content.
    #[prost(message, optional, tag = "1")]
    pub info: Option<ContentInfo>,
}

/// Of `Content/Update`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct UpdateRequest {
    /// What is to be noted.
    #[prost(message, optional, tag = "1")]
    pub info: Option<ContentInfo>,
    /// Which of it: `labels.KEY`.
    #[prost(message, optional, tag = "2")]
    pub update_mask: Option<FieldMask>,
}

/// Of `Content/Read`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ReadRequest {
    /// Which.
    #[prost(string, tag = "1")]
    pub digest: String,
}

/// A part of the answer to `Content/Read`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct ReadResponse {
    /// The next bytes.
    #[prost(bytes = "vec", tag = "2")]
    pub data: Vec<u8>,
}

/// What a message of `Content/Write` asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
#[allow(unnameable_types)]
pub enum WriteAction {
    /// Where the write is.
    Stat = 0,
    /// More bytes.
    Write = 1,
    /// The last message: the content is to be what was expected.
    Commit = 2,
}

/// A message of `Content/Write`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WriteRequest {
    /// What is asked for.
    #[prost(enumeration = "WriteAction", tag = "1")]
    pub action: i32,
    /// What the write is called; it can be continued by that.
    #[prost(string, tag = "2")]
    pub r#ref: String,
    /// The length of the whole, in bytes.
    #[prost(int64, tag = "3")]
    pub total: i64,
    /// The digest of the whole.
    #[prost(string, tag = "4")]
    pub expected: String,
    /// Where the bytes belong.
    #[prost(int64, tag = "5")]
    pub offset: i64,
    /// The bytes.
    #[prost(bytes = "vec", tag = "6")]
    pub data: Vec<u8>,
    /// What is noted with the content, of `Commit`.
    #[prost(btree_map = "string, string", tag = "7")]
    pub labels: Labels,
}

/// The answer to each message of `Content/Write`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct WriteResponse {
    /// How many bytes are there.
    #[prost(int64, tag = "4")]
    pub offset: i64,
}

/// Of `Content/Abort`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct AbortRequest {
    /// What the write is called.
    #[prost(string, tag = "1")]
    pub r#ref: String,
}

/// Of `Introspection/Plugins`: all of them.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PluginsRequest {
    /// Which plug-ins are meant; all, if nothing is named.
    #[prost(string, repeated, tag = "1")]
    pub filters: Vec<String>,
}

/// A part of containerd.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Plugin {
    /// The kind of it.
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// Its name among those of its kind.
    #[prost(string, tag = "2")]
    pub id: String,
    /// What it tells clients of itself.
    #[prost(btree_map = "string, string", tag = "5")]
    pub exports: Labels,
    /// Why it did not start, if it did not.
    #[prost(message, optional, tag = "7")]
    pub init_err: Option<PluginError>,
}

/// `google.rpc.Status`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PluginError {
    /// In words.
    #[prost(string, tag = "2")]
    pub message: String,
}

/// The answer to `Introspection/Plugins`.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct PluginsResponse {
    /// The plug-ins.
    #[prost(message, repeated, tag = "1")]
    pub plugins: Vec<Plugin>,
}
