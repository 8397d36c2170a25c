//! `tarblk content push`: layers of lazily pulled images for those who want them whole.

use std::env;
use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::anyhow;
use serde::Serialize;

use super::Session;
use super::cli::{ContentCommand, ContentPushArgs};
use super::layer::Bar;
use super::output::{Table, print, println};
use super::snapshotter::config;
use crate::digest::Digest;
use crate::open::{Reading, Watch};
use crate::quantity::show_size;
use crate::snapshotter::content::{PushWatch, PushedLayer, Pusher};

/// As `ctr` has it.
const DEFAULT_NAMESPACE: &str = "default";

/// One bar for all layers.
impl PushWatch for Bar {
    fn written(&mut self, _layer: &Digest, at: u64, of: u64) {
        self.reading(Reading::Download, at, of);
    }
}

/// What `--json` says of a layer.
#[derive(Debug, Serialize)]
struct LayerReport<'a> {
    image: &'a str,
    layer: &'a Digest,
    bytes: u64,
    /// The repository that it came from; null if it was there.
    from: Option<&'a str>,
    /// So many bytes of it were there.
    resumed: u64,
}

/// `tarblk content`.
pub(super) fn run(what: &ContentCommand, session: Session) -> anyhow::Result<()> {
    match what {
        ContentCommand::Push(args) => push(args, session),
    }
}

fn push(args: &ContentPushArgs, session: Session) -> anyhow::Result<()> {
    let config = config(args.config.as_deref())?;
    let set = |name| env::var_os(name).filter(|value: &OsString| !value.is_empty());
    let address = args
        .address
        .clone()
        .or_else(|| set("CONTAINERD_ADDRESS").map(PathBuf::from));
    let namespace = match (&args.namespace, set("CONTAINERD_NAMESPACE")) {
        (Some(typed), _) => typed.clone(),
        (None, Some(name)) => name
            .into_string()
            .map_err(|_| anyhow!("CONTAINERD_NAMESPACE is not text"))?,
        (None, None) => DEFAULT_NAMESPACE.to_owned(),
    };
    let pusher = Pusher::new(&config, address.as_ref().unwrap_or(&config.containerd), &namespace)?;
    let mut done: Vec<(&str, PushedLayer)> = Vec::new();
    for image in &args.images {
        let mut bar = Bar::new(session.talk);
        let layers = pusher.push(image, &mut bar)?;
        drop(bar);
        done.extend(layers.into_iter().map(|layer| (image.as_str(), layer)));
    }
    if args.json {
        let reports: Vec<_> = done
            .iter()
            .map(|(image, layer)| LayerReport {
                image,
                layer: &layer.digest,
                bytes: layer.bytes,
                from: layer.from.as_deref(),
                resumed: layer.resumed,
            })
            .collect();
        return println(serde_json::to_string_pretty(&reports)?);
    }
    let mut table = Table::new(&["IMAGE", "LAYER", "SIZE", "FROM"]);
    for (image, layer) in done {
        table.row([
            image.to_owned(),
            layer.digest.to_string(),
            show_size(layer.bytes),
            layer.from.unwrap_or_else(|| "was there".to_owned()),
        ]);
    }
    print(table)
}
