//! `tarblk cache`: what is kept on disk, for people. In: the cache directory, which a service may be using. Out: lists, sums, checks;
//! pins, and room.
//!
//! The service is not asked, and need not run: a layer's files are locked by the process that has the layer open, and whoever has not
//! got that lock only reads them. So a layer in use is refused to who wants to remove it, in one line, and a damaged chunk of it is told of
//! and left to the service, which checks whatever it reads. A pin is a file beside the others, which every process looks for before it
//! gives something up.

use std::path::Path;
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::bail;
use serde::Serialize;

use super::Session;
use super::cli::{CacheAction, CacheArgs};
use super::layer::cache_dir;
use super::output::{Table, print, println};
use super::ps::show_age;
use crate::cache::disk::{DiskCache, KeptLayer, Removed, Verified};
use crate::excerpt;
use crate::open::{Beside, Cache, recalled_digests};
use crate::quantity::show_size;

/// `tarblk cache`.
pub(super) fn cache(args: &CacheArgs, session: Session) -> anyhow::Result<()> {
    let cache = Cache::new(&args.cache.clone().unwrap_or_else(cache_dir))?;
    let kept = Kept {
        store: cache.existing_store()?,
        cache,
        session,
        json: args.json,
    };
    match &args.action {
        CacheAction::Ls => kept.list(),
        CacheAction::Du => kept.usage(),
        CacheAction::Verify { layers } => kept.verify(layers),
        CacheAction::Gc { to } => kept.give_up(*to),
        CacheAction::Pin(chosen) => kept.pin(&chosen.layers, true),
        CacheAction::Unpin(chosen) => kept.pin(&chosen.layers, false),
        CacheAction::Rm { layers, all: false } => kept.remove(layers),
        CacheAction::Rm { all: true, .. } => kept.remove_all(),
    }
}

/// A cache directory, and how its contents are told of.
struct Kept {
    cache: Cache,
    /// None where nothing was ever kept.
    store: Option<Arc<DiskCache>>,
    session: Session,
    json: bool,
}

/// What `cache du --json` says; all in bytes of disk.
#[derive(Debug, Serialize)]
struct Usage {
    /// How many layers something is kept of.
    layers: usize,
    /// What those take.
    layer_bytes: u64,
    /// How much of that is pinned.
    pinned_bytes: u64,
    /// How much of it is of layers that a process has open.
    in_use_bytes: u64,
    /// What else there is.
    beside: Vec<Beside>,
    /// All together, with the directories themselves and with files that have lost their names.
    total: u64,
    /// The most that it may be unless a device was told otherwise.
    limit: u64,
}

/// What `cache verify --json` says of a layer.
#[derive(Debug, Serialize)]
struct Checked<'a> {
    key: &'a str,
    name: &'a str,
    digest: &'a str,
    #[serde(flatten)]
    found: Verified,
}

/// What `cache gc --json` says; bytes of disk.
#[derive(Debug, Serialize)]
struct Collected {
    freed: u64,
    left: u64,
    limit: u64,
}

/// What became of a layer, for `--json`.
#[derive(Debug, Serialize)]
struct Changed<'a> {
    key: &'a str,
    name: &'a str,
    digest: &'a str,
    /// Whether it is pinned now.
    pinned: bool,
    /// Bytes of disk that were given back.
    freed: u64,
}

impl<'a> Changed<'a> {
    fn new(layer: &'a KeptLayer, pinned: bool, freed: u64) -> Self {
        Self {
            key: &layer.key,
            name: &layer.name,
            digest: &layer.digest,
            pinned,
            freed,
        }
    }
}

impl Kept {
    fn dir(&self) -> &Path {
        self.cache.dir()
    }

    fn note_empty(&self) {
        let dir = self.dir().display();
        self.session.talk.note(format_args!("nothing is kept in {dir}"));
    }

    /// The layers of which something is kept. Those that a process has just begun, and of which no map speaks yet, are none.
    fn layers(&self) -> anyhow::Result<Vec<KeptLayer>> {
        let Some(store) = &self.store else {
            return Ok(Vec::new());
        };
        let mut layers = store.list()?;
        layers.retain(|layer| layer.usable || !layer.in_use);
        Ok(layers)
    }

    /// The layers that were typed, each once, the last used first. What means none is an error, so that nothing is done by half.
    fn chosen(&self, typed: &[String]) -> anyhow::Result<Vec<KeptLayer>> {
        let all = self.layers()?;
        let mut chosen = vec![false; all.len()];
        for what in typed {
            let meant = self.meant(what, &all)?;
            if !meant.contains(&true) {
                bail!("{what}: nothing is kept of it in {}", self.dir().display());
            }
            chosen
                .iter_mut()
                .zip(meant)
                .for_each(|(chosen, meant)| *chosen |= meant);
        }
        let chosen = all.into_iter().zip(chosen);
        Ok(chosen.filter_map(|(layer, chosen)| chosen.then_some(layer)).collect())
    }

    /// Which of `all` the words `what` mean.
    fn meant(&self, what: &str, all: &[KeptLayer]) -> anyhow::Result<Vec<bool>> {
        let by_itself: Vec<bool> = all.iter().map(|layer| layer.is_meant(what)).collect();
        if by_itself.contains(&true) {
            let mut digests: Vec<_> = all.iter().zip(&by_itself).filter(|(_, meant)| **meant).collect();
            digests.dedup_by_key(|(layer, _)| (&layer.digest, &layer.name));
            if digests.len() > 1 {
                bail!("{what}: {} layers begin like this; type more of it", digests.len());
            }
            return Ok(by_itself);
        }
        let digests = if what.contains(':') {
            recalled_digests(what, &self.cache)?
        } else {
            Vec::new()
        };
        let digests: Vec<String> = digests.iter().map(ToString::to_string).collect();
        Ok(all.iter().map(|layer| digests.contains(&layer.digest)).collect())
    }

    fn list(&self) -> anyhow::Result<()> {
        let layers = self.layers()?;
        if self.json {
            return println(serde_json::to_string_pretty(&layers)?);
        }
        if layers.is_empty() {
            self.note_empty();
            return Ok(());
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let mut table = Table::new(&["LAYER", ">KEPT", ">OF", ">ON DISK", ">UNUSED", "STATE", "SOURCE"]);
        for layer in &layers {
            table.row([
                short_name(layer),
                show_size(layer.held),
                if layer.usable {
                    show_size(layer.bytes)
                } else {
                    "-".into()
                },
                show_size(layer.disk),
                show_age(now.saturating_sub(layer.used)),
                state(layer),
                shown_source(layer),
            ]);
        }
        print(table)
    }

    fn usage(&self) -> anyhow::Result<()> {
        let layers = self.layers()?;
        let beside = self.cache.beside();
        let sum = |of: fn(&KeptLayer) -> bool| layers.iter().filter(|layer| of(layer)).map(|layer| layer.disk).sum();
        let usage = Usage {
            layers: layers.len(),
            layer_bytes: sum(|_| true),
            pinned_bytes: sum(|layer| layer.pinned),
            in_use_bytes: sum(|layer| layer.in_use),
            total: self.disk_bytes(),
            limit: self.limit(),
            beside,
        };
        if self.json {
            return println(serde_json::to_string_pretty(&usage)?);
        }
        if self.store.is_none() {
            self.note_empty();
            return Ok(());
        }
        let mut table = Table::new(&["WHAT", ">FILES", ">ON DISK"]);
        table.row(["layers", &usage.layers.to_string(), &show_size(usage.layer_bytes)]);
        table.row(["  pinned", "", &show_size(usage.pinned_bytes)]);
        table.row(["  in use", "", &show_size(usage.in_use_bytes)]);
        for part in &usage.beside {
            let what = match part.name {
                "index" => "indexes made here",
                "hot" => "published indexes",
                "small" => "manifests",
                other => other,
            };
            table.row([what, &part.files.to_string(), &show_size(part.bytes)]);
        }
        table.row(["all", "", &show_size(usage.total)]);
        table.row(["at most, a tenth of the disk", "", &show_size(usage.limit)]);
        print(table)
    }

    /// Bytes of disk that all of the cache takes.
    fn disk_bytes(&self) -> u64 {
        self.store.as_ref().map_or(0, |store| store.disk_bytes())
    }

    fn limit(&self) -> u64 {
        self.store.as_ref().map_or(0, |store| store.limit())
    }

    fn verify(&self, typed: &[String]) -> anyhow::Result<()> {
        let layers = if typed.is_empty() {
            self.layers()?
        } else {
            self.chosen(typed)?
        };
        let all = layers.iter().map(|layer| layer.held).sum();
        let bar = self.session.talk.bar("verifying", all, Instant::now().elapsed());
        let mut found = Vec::new();
        for layer in &layers {
            let Some(store) = &self.store else { break };
            found.push(store.verify(layer, &mut |read| bar.inc(read))?);
        }
        bar.finish_and_clear();
        if self.json {
            let checked: Vec<_> = layers
                .iter()
                .zip(&found)
                .map(|(layer, found)| Checked {
                    key: &layer.key,
                    name: &layer.name,
                    digest: &layer.digest,
                    found: *found,
                })
                .collect();
            println(serde_json::to_string_pretty(&checked)?)?;
        } else {
            let mut table = Table::new(&["LAYER", ">CHUNKS", ">DAMAGED", "SOURCE"]);
            for (layer, found) in layers.iter().zip(&found) {
                table.row([
                    short_name(layer),
                    found.chunks.to_string(),
                    found.damaged.to_string(),
                    shown_source(layer),
                ]);
            }
            if !layers.is_empty() {
                print(table)?;
            }
        }
        let unusable = layers.iter().filter(|layer| !layer.usable).count();
        if unusable > 0 {
            self.session.talk.note(format!(
                "{unusable} without a map that fits: nothing of them is used, and `tarblk cache gc` removes them"
            ));
        }
        let damaged: u64 = found.iter().map(|found| found.damaged).sum();
        let left = found.iter().any(|found| found.damaged > 0 && !found.dropped);
        match (damaged, left) {
            (0, _) => Ok(()),
            (_, false) => {
                bail!("{damaged} damaged chunks, which are forgotten now, and fetched again when they are wanted")
            }
            (_, true) => bail!(
                "{damaged} damaged chunks; those of layers in use are found out and fetched again when they are read"
            ),
        }
    }

    fn give_up(&self, to: Option<u64>) -> anyhow::Result<()> {
        let limit = to.unwrap_or_else(|| self.limit());
        let freed = match &self.store {
            Some(store) => {
                let spinner = self.session.talk.spinner("giving up what was unused longest");
                let freed = store.remove_unusable().and_then(|freed| Ok(freed + store.trim(limit)?));
                spinner.finish_and_clear();
                freed?
            }
            None => 0,
        };
        let left = self.disk_bytes();
        if self.json {
            println(serde_json::to_string_pretty(&Collected { freed, left, limit })?)?;
        } else {
            println(format_args!("{} freed, {} left", show_size(freed), show_size(left)))?;
        }
        if left > limit {
            bail!(
                "{}: {} are left, more than {}: the rest is pinned, in use, or indexes",
                self.dir().display(),
                show_size(left),
                show_size(limit)
            );
        }
        Ok(())
    }

    fn pin(&self, typed: &[String], pinned: bool) -> anyhow::Result<()> {
        let layers = self.chosen(typed)?;
        let Some(store) = &self.store else { return Ok(()) };
        for layer in &layers {
            store.set_pinned(layer, pinned)?;
        }
        self.tell(
            &layers,
            |layer| Changed::new(layer, pinned, 0),
            |layer| {
                let kept = if layer.held < layer.bytes {
                    format!(
                        ", of which {} of {} are kept",
                        show_size(layer.held),
                        show_size(layer.bytes)
                    )
                } else {
                    String::new()
                };
                let done = if pinned { "pinned" } else { "unpinned" };
                format!("{done} {}{kept}", full_name(layer))
            },
        )
    }

    fn remove(&self, typed: &[String]) -> anyhow::Result<()> {
        let layers = self.chosen(typed)?;
        let Some(store) = &self.store else { return Ok(()) };
        // Looked at first, so that nothing is done by half.
        for layer in &layers {
            if layer.pinned {
                bail!("{}: it is pinned; `tarblk cache unpin` it first", full_name(layer));
            }
            if layer.in_use {
                return Err(in_use(layer));
            }
        }
        let mut removed = Vec::new();
        for layer in layers {
            match store.remove(&layer)? {
                Removed::Freed(bytes) => removed.push((layer, bytes)),
                Removed::Pinned => bail!("{}: it was pinned meanwhile", full_name(&layer)),
                Removed::InUse => return Err(in_use(&layer)),
            }
        }
        self.tell(
            &removed,
            |(layer, bytes)| Changed::new(layer, false, *bytes),
            |(layer, bytes)| format!("removed {}, {}", full_name(layer), show_size(*bytes)),
        )
    }

    fn remove_all(&self) -> anyhow::Result<()> {
        let mut freed = 0;
        let mut stay = 0;
        for layer in self.layers()? {
            match self.store.as_ref().map(|store| store.remove(&layer)).transpose()? {
                Some(Removed::Freed(bytes)) => freed += bytes,
                Some(Removed::Pinned | Removed::InUse) => stay += 1,
                None => {}
            }
        }
        freed += self.cache.forget_beside()?;
        let left = self.disk_bytes();
        if self.json {
            let limit = self.limit();
            println(serde_json::to_string_pretty(&Collected { freed, left, limit })?)?;
        } else {
            println(format_args!("{} freed, {} left", show_size(freed), show_size(left)))?;
        }
        if stay > 0 {
            self.session
                .talk
                .note(format!("{stay} layers stay: they are pinned or in use"));
        }
        Ok(())
    }

    /// Tells of each thing that was done, as JSON or a line each.
    fn tell<'a, T>(
        &self,
        done: &'a [T],
        json: impl Fn(&'a T) -> Changed<'a>,
        line: impl Fn(&'a T) -> String,
    ) -> anyhow::Result<()> {
        if self.json {
            let all: Vec<_> = done.iter().map(json).collect();
            return println(serde_json::to_string_pretty(&all)?);
        }
        done.iter().try_for_each(|one| println(line(one)))
    }
}

fn in_use(layer: &KeptLayer) -> anyhow::Error {
    anyhow::anyhow!(
        "{}: an attached device or another command uses it; `tarblk ps` lists devices",
        full_name(layer)
    )
}

/// What a person types to mean a layer: how its digest begins, or the name of its files.
fn short_name(layer: &KeptLayer) -> String {
    const DIGITS: usize = 12;
    let hex = layer.digest.split_once(':').map_or(layer.key.as_str(), |(_, hex)| hex);
    excerpt::of_line(hex.get(..DIGITS).unwrap_or(hex))
}

/// Where a layer was read from, without its digest.
fn shown_source(layer: &KeptLayer) -> String {
    let name = layer.name.strip_suffix(layer.digest.as_str()).unwrap_or(&layer.name);
    excerpt::of_line(name.strip_suffix(", blob ").unwrap_or(name))
}

/// A layer for a sentence.
fn full_name(layer: &KeptLayer) -> String {
    let of = shown_source(layer);
    let separator = if of.is_empty() { "" } else { " of " };
    format!("{}{separator}{of}", short_name(layer))
}

/// What else there is to say of a layer.
fn state(layer: &KeptLayer) -> String {
    let words = [
        (!layer.usable, "damaged"),
        (layer.pinned, "pinned"),
        (layer.in_use, "in use"),
        (layer.usable && layer.held == layer.bytes, "whole"),
        (layer.protected, "protected"),
    ];
    let words: Vec<_> = words
        .iter()
        .filter_map(|(is_so, word)| is_so.then_some(*word))
        .collect();
    if words.is_empty() { "-".into() } else { words.join(", ") }
}
