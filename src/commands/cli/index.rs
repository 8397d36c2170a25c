//! What can be typed of `tarblk index`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueHint};

use super::RegistryArgs;
use crate::open::LayerChoice;
use crate::quantity::{parse_size, parse_time};

/// Arguments of `tarblk index`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    subcommand_value_name = "ACTION",
    disable_help_subcommand = true,
    after_help = "Of a local layer whose index is written everything is read, so that the index can check every byte; of a layer
on a server only headers are, because everything else costs a download.

Examples:
  tarblk index layer.tar                     summary only
  tarblk index layer.tar -o layer.tarblk
  tarblk index https://example.org/layer.tar -o layer.tarblk --json
  tarblk index verify layer.tarblk https://example.org/layer.tar
  tarblk index push docker://registry.example.org/team/app:1.2"
)]
pub struct IndexArgs {
    /// The layer: a path, a `file://` URL, or an `http(s)://` URL of a server that answers Range.
    #[arg(value_name = "SOURCE", value_hint = ValueHint::FilePath, required = true)]
    pub source: Option<String>,
    /// Write the index to this file.
    #[arg(short, long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub output: Option<PathBuf>,
    /// Read everything, and put all into the index that it can hold: digests of chunks, of files and of pieces of long files, and the
    /// header bytes, with which the exact tar can be rebuilt.
    #[arg(long)]
    pub full: bool,
    /// Read headers only: no digests.
    #[arg(long, conflicts_with = "full")]
    pub no_digests: bool,
    /// How far apart the places lie from which a compressed layer can be decoded, in bytes of the tar: closer ones take more room
    /// and save reading [default: 512KiB in gzip, 2MiB in zstd].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub spacing: Option<u64>,
    /// The summary as JSON.
    #[arg(long)]
    pub json: bool,
    /// Which layer of an image: by its digest, or its number, the lowest being 1.
    #[arg(long, value_name = "DIGEST|N")]
    pub layer: Option<LayerChoice>,
    /// Fail when nothing has come from a server for this long, whatever it says or does not say [default: 6 tries within 1min, of
    /// some 30s each].
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub deadline: Option<Duration>,
    /// The registry.
    #[command(flatten)]
    pub registry: RegistryArgs,
    /// What else can be done with indexes.
    #[command(subcommand)]
    pub action: Option<IndexAction>,
}

/// What can be done with indexes besides making them.
#[derive(Debug, Subcommand)]
pub enum IndexAction {
    /// Make an index again from the layer and compare: the first difference is named.
    Verify(VerifyArgs),
    /// Publish indexes of an image's layers beside it, for everybody who pulls it.
    Push(PushArgs),
    /// Publish for an image the indexes that another repository has of its layers.
    Copy(CopyArgs),
}

/// Arguments of `tarblk index push`.
#[derive(Debug, Args)]
#[command(
    after_help = "Every layer is read once, whole. The image itself is not changed: its digest stays what it is.

An index says what a layer's files are, and whoever may write to the repository can put one there. So nobody believes it for lying
there: readers want it signed (--sign), named by the image that they mount (--into), or pinned (mount --index-digest), or they say
that they believe the registry (mount --trust registry). An index that is there already is signed or named only if it was signed
by the same key or one that is trusted here; else it is made anew.

The repository gets, besides the indexes: a tag for each layer, sha256-DIGEST.tarblk-v1, by which a layer that several images
share is found; an artifact that refers to the image; and, where the registry has no referrers API, the tag sha256-DIGEST of
the image, whose list names the artifact. All are told at the end (`tags` in the JSON). To take the indexes back, delete
these tags and the artifact.

The hot part of an index is what every mount needs: names, attributes, where content lies and how to check it. It comes in
one or two requests. The rest (places to decode from, header bytes) is fetched when something is read that needs it.

Examples:
  openssl genpkey -algorithm ed25519 -out sign.pem
  openssl pkey -in sign.pem -pubout -out team.pub
  tarblk index push docker://registry.example.org/app:1.2 --sign sign.pem
  tarblk mount docker://registry.example.org/app:1.2 /mnt --trust-key team.pub

  tarblk index push docker://registry.example.org/team/app:1.2 --into 1.2-lazy
  tarblk mount docker://registry.example.org/team/app:1.2-lazy /mnt

  # With what a start of it reads.
  tarblk index push docker://localhost:5000/app --run 'app --version'

  tarblk index push docker://localhost:5000/app --json | jq -r .artifact"
)]
pub struct PushArgs {
    /// The image, `docker://host/repository:tag`; its repository has to be writable.
    #[arg(value_name = "IMAGE")]
    pub image: String,
    /// How far apart the places lie from which a compressed layer can be decoded, in bytes of the tar [default: 512KiB in gzip,
    /// 2MiB in zstd].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub spacing: Option<u64>,
    /// Make indexes also of layers that have one.
    #[arg(long)]
    pub anew: bool,
    /// Sign the indexes with the private key in this file: Ed25519 or ECDSA P-256, PKCS#8 in PEM without a password, as `openssl
    /// genpkey -algorithm ed25519` makes it, or as `cosign generate-key-pair` does, whose password is `COSIGN_PASSWORD` or asked for.
    /// Who has the public half in /etc/tarblk/keys.d or names it with --trust-key believes them.
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub sign: Option<PathBuf>,
    /// Write another manifest of the image, under this tag of its repository: the same layers and configuration, and an annotation
    /// that names the indexes. Who mounts that one believes them as the image itself, without a key.
    #[arg(long, value_name = "TAG")]
    pub into: Option<String>,
    /// Run this line of a shell in a container of the image, by runc and without a network, and publish beside the indexes what it read:
    /// who mounts the image then has that before a program asks for it. It has to end by itself, and well.
    #[arg(long, value_name = "COMMAND", value_hint = ValueHint::CommandString)]
    pub run: Option<String>,
    /// What was published as JSON.
    #[arg(long)]
    pub json: bool,
    /// The registry.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// Arguments of `tarblk index copy`.
#[derive(Debug, Args)]
#[command(
    after_help = "Copies indexes, not images: copy those first, with skopeo for example, which leaves indexes behind.

Examples:
  skopeo copy docker://registry.example.org/app:1.2 \\
      docker://mirror.example.org/app:1.2
  tarblk index copy docker://registry.example.org/app:1.2 \\
      docker://mirror.example.org/app:1.2"
)]
pub struct CopyArgs {
    /// An image whose layers have indexes, `docker://host/repository:tag`.
    #[arg(value_name = "FROM")]
    pub from: String,
    /// The image that they are for; it may share all of its layers with the other one, or some.
    #[arg(value_name = "TO")]
    pub to: String,
    /// What was published as JSON.
    #[arg(long)]
    pub json: bool,
    /// The registry.
    #[command(flatten)]
    pub registry: RegistryArgs,
}

/// Arguments of `tarblk index verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The index: a path or a URL.
    #[arg(value_name = "INDEX", value_hint = ValueHint::FilePath)]
    pub index: String,
    /// The layer that it is said to be of.
    #[arg(value_name = "SOURCE", value_hint = ValueHint::FilePath)]
    pub source: String,
    /// The outcome as JSON.
    #[arg(long)]
    pub json: bool,
}
