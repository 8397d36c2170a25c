//! `tarblk profile`: what is known of how images start. In: an image or layer. Out: what starts of it read; the same beside the image in its
//! registry, or from there; or nothing known any more.

use std::path::Path;

use anyhow::{Context as _, bail};
use serde::Serialize;

use super::Session;
use super::cli::{ProfileAction, ProfileArgs, ProfileCopyArgs, ProfileRmArgs, ProfileShowArgs};
use super::layer::{cache_dir, options_for, prepare};
use super::output::{Table, print, println};
use super::publish::reference;
use crate::digest::Digest;
use crate::excerpt;
use crate::image::FileMap as _;
use crate::open::publish::push_profile;
use crate::open::{self, Cache, ImageProfiles, OpenOptions, Prepared, Profiles, Unwatched};
use crate::prefetch::ChunkRange;
use crate::profile::{MAX_PROFILE_BYTES, Profile};
use crate::quantity::{show_count, show_size};
use crate::units::{CHUNK_BYTES, TarOffset, len_u64};

/// `tarblk profile`.
pub(super) fn profile(args: &ProfileArgs, session: Session) -> anyhow::Result<()> {
    match &args.action {
        ProfileAction::Show(args) => show(args, session),
        ProfileAction::Rm(args) => rm(args, session),
        ProfileAction::Push(args) => push(args, session),
        ProfileAction::Pull(args) => pull(args, session),
    }
}

/// The profiles of what was prepared.
fn profiles(prepared: &Prepared) -> anyhow::Result<ImageProfiles> {
    let none = || {
        format!(
            "{}: nothing is kept of it, without a cache or without anything that tells the layer from others",
            prepared.name
        )
    };
    prepared.profiles().with_context(none)
}

/// What `show --json` says.
#[derive(Debug, Serialize)]
struct Shown {
    /// What was named.
    source: String,
    /// What starts on this machine read.
    learned: Option<Sum>,
    /// What is published of the image, as far as it was met.
    published: Option<Sum>,
    /// For each layer, the lowest first, what starts of any images read of it.
    layers: Vec<Option<Sum>>,
    /// What the next start fetches ahead, in bytes.
    ahead_bytes: u64,
    /// The files of which that is.
    files: Vec<AheadFile>,
}

/// A profile in numbers.
#[derive(Debug, Serialize)]
struct Sum {
    /// Starts that it was learned from.
    runs: u32,
    /// Ranges in it.
    ranges: u64,
    /// Bytes of tar in it, likely or not.
    bytes: u64,
    /// Its own length as a file.
    file_bytes: u64,
}

impl Sum {
    fn of(profile: &Profile) -> Self {
        Self {
            runs: profile.runs(),
            ranges: profile.count(),
            bytes: profile.bytes(),
            file_bytes: len_u64(profile.to_bytes(MAX_PROFILE_BYTES).len()),
        }
    }

    fn sentence(&self) -> String {
        let runs = match self.runs {
            1 => "1 start".to_owned(),
            runs => format!("{runs} starts"),
        };
        format!(
            "from {runs}: {} in {} ranges, a file of {}",
            show_size(self.bytes),
            show_count(self.ranges),
            show_size(self.file_bytes)
        )
    }
}

/// A file of which something is fetched ahead.
#[derive(Debug, Serialize)]
struct AheadFile {
    path: String,
    /// How much of it, in bytes.
    bytes: u64,
}

/// `tarblk profile show`.
fn show(args: &ProfileShowArgs, session: Session) -> anyhow::Result<()> {
    let prepared = prepare(&args.layer, session)?;
    let kept = profiles(&prepared)?;
    let likely = kept.likely();
    let files = if args.files || args.json {
        files_of(&prepared, &likely)?
    } else {
        Vec::new()
    };
    let published = kept.published().or_else(|| prepared.published_profile().cloned());
    let shown = Shown {
        source: prepared.name.clone(),
        learned: kept.own().as_ref().map(Sum::of),
        published: published.as_ref().map(Sum::of),
        layers: (0..kept.layers().len())
            .map(|number| kept.of_layer(number).as_ref().map(Sum::of))
            .collect(),
        ahead_bytes: likely.iter().map(|range| range.bytes()).sum(),
        files,
    };
    if args.json {
        return println(serde_json::to_string_pretty(&shown)?);
    }
    let sentence = |sum: &Option<Sum>| sum.as_ref().map_or_else(|| "nothing".to_owned(), Sum::sentence);
    let mut table = Table::plain();
    table.row(["image", &excerpt::of_line(&shown.source)]);
    table.row(["learned", &sentence(&shown.learned)]);
    table.row(["published", &sentence(&shown.published)]);
    if shown.layers.len() > 1 {
        for (number, layer) in (1..).zip(&shown.layers) {
            table.row([format!("layer {number}"), sentence(layer)]);
        }
    }
    table.row(["ahead", &show_size(shown.ahead_bytes)]);
    print(table)?;
    if args.files {
        let mut table = Table::new(&[">AHEAD", "FILE"]);
        for file in &shown.files {
            table.row([show_size(file.bytes), excerpt::of_line(&file.path)]);
        }
        print(table)?;
    }
    Ok(())
}

/// Small files lie behind each other with a header between them, at multiples of its length.
const HEADER_BYTES: u64 = 512;

/// The files that have bytes in these ranges, in the order of the ranges.
fn files_of(prepared: &Prepared, ranges: &[ChunkRange]) -> anyhow::Result<Vec<AheadFile>> {
    let image = prepared.image()?;
    let mut files: Vec<AheadFile> = Vec::new();
    let mut places = std::collections::HashMap::new();
    for range in ranges {
        let (start, end) = (u64::from(range.first) * CHUNK_BYTES, u64::from(range.end) * CHUNK_BYTES);
        let mut at = start;
        while at < end {
            let Some(file) = image.file_at(range.layer, TarOffset(at)) else {
                at += HEADER_BYTES;
                continue;
            };
            let until = file.range.end().0.min(end);
            let place = *places.entry(file.file).or_insert_with(|| {
                let path = image.path(file.file).unwrap_or_default();
                files.push(AheadFile {
                    path: String::from_utf8_lossy(&path).into_owned(),
                    bytes: 0,
                });
                files.len() - 1
            });
            files[place].bytes += until - at;
            at = until.max(at + 1).next_multiple_of(HEADER_BYTES);
        }
    }
    Ok(files)
}

/// `tarblk profile rm`.
fn rm(args: &ProfileRmArgs, session: Session) -> anyhow::Result<()> {
    let dir = args.cache.clone().unwrap_or_else(cache_dir);
    let gone = match &args.source {
        None => Profiles::new(&dir, None).forget_all(),
        Some(source) => {
            let options = OpenOptions {
                cache: Some(Cache::new(&dir)?),
                ..options_for(source, &args.registry)?
            };
            profiles(&open::prepare(source, &options, &mut Unwatched)?)?.forget()
        }
    };
    let gone = gone.with_context(|| format!("cannot remove what is in {}", dir.display()))?;
    session.talk.note(match gone {
        0 => "nothing was known".to_owned(),
        1 => "1 profile is forgotten".to_owned(),
        gone => format!("{gone} profiles are forgotten"),
    });
    Ok(())
}

/// What `push --json` and `pull --json` say.
#[derive(Debug, Serialize)]
struct Copied<'a> {
    image: &'a str,
    /// The artifact that holds the profile, of one that was published.
    #[serde(skip_serializing_if = "Option::is_none")]
    artifact: Option<&'a Digest>,
    #[serde(flatten)]
    profile: Sum,
}

/// `tarblk profile push`.
fn push(args: &ProfileCopyArgs, session: Session) -> anyhow::Result<()> {
    let image = reference(&args.layer.source)?;
    let prepared = prepare(&args.layer, session)?;
    let Some(own) = profiles(&prepared)?.own() else {
        bail!(
            "{}: no start of it was recorded on this machine; mount it and run something",
            prepared.name
        );
    };
    let done = push_profile(&image, &args.layer.registry.options()?, &own)?;
    let profile = Sum::of(&own);
    if args.json {
        let copied = Copied {
            image: &prepared.name,
            artifact: Some(&done.artifact),
            profile,
        };
        return println(serde_json::to_string_pretty(&copied)?);
    }
    if session.talk.quiet {
        return Ok(());
    }
    let mut table = Table::plain();
    table.row(["image", &prepared.name]);
    table.row(["manifest", &done.image.to_string()]);
    table.row(["profile", &profile.sentence()]);
    let with = match done.indexes {
        0 => "without indexes: `tarblk index push` makes them".to_owned(),
        1 => "with 1 index".to_owned(),
        many => format!("with {many} indexes"),
    };
    table.row(["artifact", &format!("{}, {with}", done.artifact)]);
    if let Some(tag) = &done.tag {
        table.row(["tag", tag]);
    }
    print(table)
}

/// `tarblk profile pull`.
fn pull(args: &ProfileCopyArgs, session: Session) -> anyhow::Result<()> {
    let image = reference(&args.layer.source)?;
    let prepared = prepare(&args.layer, session)?;
    let kept = profiles(&prepared)?;
    let Some(found) = open::publish::published_profile(&image, &args.layer.registry.options()?)? else {
        bail!("{}: no profile is published beside it", prepared.name);
    };
    let dir = args.layer.cache.clone().unwrap_or_else(cache_dir);
    if !keep(&kept, &found, &dir)? {
        bail!("{}: the profile beside it is of other layers", prepared.name);
    }
    let profile = Sum::of(&found);
    if args.json {
        let copied = Copied {
            image: &prepared.name,
            artifact: None,
            profile,
        };
        return println(serde_json::to_string_pretty(&copied)?);
    }
    session
        .talk
        .note(format_args!("{}: {}", prepared.name, profile.sentence()));
    Ok(())
}

fn keep(kept: &ImageProfiles, found: &Profile, dir: &Path) -> anyhow::Result<bool> {
    kept.keep_published(found)
        .with_context(|| format!("cannot keep it in {}", dir.display()))
}
