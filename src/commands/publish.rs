//! `tarblk index push` and `tarblk index copy`: indexes in registries, for everybody who pulls the image.

use anyhow::{Context as _, bail};
use serde::Serialize;

use std::env::{self, VarError};
use std::path::Path;
use std::sync::Arc;

use super::Session;
use super::attach::states;
use super::cli::{CopyArgs, DeviceArgs, LayerArgs, PushArgs, RegistryArgs, TrustArg};
use super::container_image::ContainerImage;
use super::layer::Bar;
use super::output::{Table, print, println};
use super::run::ContainerRun;
use crate::device::service;
use crate::digest::Digest;
use crate::fetch::KeyId;
use crate::http::Secret;
use crate::open::IndexChoice;
use crate::open::publish::{self, Publication, PublishWatch, Published, PushOptions};
use crate::open::trust::{SigningKey, TrustError};
use crate::profile::{Profile, StartRun};
use crate::quantity::show_size;
use crate::source::registry::{ImageName, Reference, Version};
use crate::source::{Source, image_meant};

/// Where cosign looks for a key's password.
const PASSWORD_VARIABLE: &str = "COSIGN_PASSWORD";

/// One bar for all layers.
impl PublishWatch for Bar {
    fn layer(&mut self, number: usize, of: usize, layer: &Digest) {
        log::info!("layer {} of {of}: {layer}", number + 1);
    }
}

/// Parses the name of an image in a registry, as typed.
pub(super) fn reference(text: &str) -> anyhow::Result<Reference> {
    match Source::parse(text)? {
        Source::Image(ImageName::Registry(reference)) => Ok(reference),
        _ => match image_meant(Path::new(text)) {
            Some(meant) => bail!("{text} is no image in a registry; did you mean {meant}?"),
            None => bail!("{text} is no image in a registry; name it docker://host/repository:tag"),
        },
    }
}

/// The key in a file. Where it takes a password, that is cosign's variable or typed.
fn signing_key(path: &Path) -> Result<SigningKey, TrustError> {
    SigningKey::of_file(path, || match env::var(PASSWORD_VARIABLE) {
        Ok(password) => Ok(Secret::new(password)),
        Err(VarError::NotUnicode(_)) => Err(format!("that in {PASSWORD_VARIABLE} is not UTF-8")),
        Err(VarError::NotPresent) => rpassword::prompt_password(format!("password of {}: ", path.display()))
            .map(Secret::new)
            .map_err(|error| format!("set {PASSWORD_VARIABLE}, or call from a terminal ({error})")),
    })
}

/// `tarblk index push`.
pub(super) fn push(args: &PushArgs, session: Session) -> anyhow::Result<()> {
    let image = reference(&args.image)?;
    let options = args.registry.options()?;
    let how = PushOptions {
        spacing: args.spacing,
        anew: args.anew,
        size: args.registry.size(),
        sign: args.sign.as_deref().map(signing_key).transpose()?.map(Arc::new),
        into: args.into.as_deref().map(|tag| check_tag(&image, tag)).transpose()?,
        trust: args.registry.trust()?,
    };
    let signed = how.sign.as_ref().map(|key| key.public().id());
    // What is wrong with it is told before layers are read.
    let container = args.run.as_deref().map(ContainerRun::of_shell).transpose()?;
    let mut bar = Bar::new(session.talk);
    let pushed = publish::push_indexes(&image, &options, &how, &mut bar)?;
    drop(bar);
    let profile = match container {
        Some(container) => Some(learned_by_running(container, args, session)?),
        None => None,
    };
    let publication = pushed.publish(profile.as_ref())?;
    if let Some(profile) = &profile {
        log::info!(
            "the profile has {} ranges of {} bytes",
            profile.count(),
            profile.bytes()
        );
    }
    report(
        &ImageName::Registry(image).to_string(),
        &publication,
        signed,
        args.json,
        session,
    )
}

/// Runs a container of the image by the indexes that were pushed, and returns what it read.
fn learned_by_running(container: ContainerRun, args: &PushArgs, session: Session) -> anyhow::Result<Profile> {
    let layer = LayerArgs {
        source: args.image.clone(),
        index: IndexChoice::Auto,
        index_digest: None,
        layer: None,
        cache: None,
        no_cache: false,
        cache_size: None,
        registry: RegistryArgs {
            // This command has just put them there.
            trust: Some(TrustArg::Registry),
            ..args.registry.clone()
        },
    };
    let found = ContainerImage::find(&layer, "index push --run", session)?;
    let mut read = None;
    let status = container.run(&found, &DeviceArgs::default(), session, &mut |prepared, device| {
        read = Some((prepared.profiles(), service::trace(&states(), device)));
    })?;
    if status != 0 {
        bail!(
            "--run: the command ended with status {status}, so the indexes are in the repository but nothing refers to them yet"
        );
    }
    let (profiles, trace) = read.context("--run: there was no device")?;
    let reads = trace?.recorded();
    let profiles = profiles.context("--run: nothing tells the image's layers from others")?;
    let mut profile = Profile::new(profiles.layers().to_vec());
    profile.learn(&StartRun::of(&reads));
    if profile.count() == 0 {
        bail!("--run: the command read nothing of the image");
    }
    Ok(profile)
}

/// The tag, if it is one.
fn check_tag(image: &Reference, tag: &str) -> anyhow::Result<String> {
    let name = format!("{}/{}:{tag}", image.host, image.repository);
    match Reference::parse(&name) {
        Ok(Reference {
            version: Version::Tag(parsed),
            ..
        }) if parsed == tag => Ok(parsed),
        _ => bail!("--into {tag:?}: that is no tag; it is one word for the same repository, as in --into 1.2-lazy"),
    }
}

/// `tarblk index copy`.
pub(super) fn copy(args: &CopyArgs, session: Session) -> anyhow::Result<()> {
    let (from, to) = (reference(&args.from)?, reference(&args.to)?);
    let options = args.registry.options()?;
    let mut bar = Bar::new(session.talk);
    let publication = publish::copy(&from, &to, &options, &mut bar)?;
    drop(bar);
    report(
        &ImageName::Registry(to).to_string(),
        &publication,
        None,
        args.json,
        session,
    )
}

/// What `--json` says.
#[derive(Debug, Serialize)]
struct Report<'a> {
    image: &'a str,
    manifest: &'a Digest,
    artifact: Option<&'a Digest>,
    /// The manifest that names the indexes.
    into: Option<Named<'a>>,
    /// The key that has signed them.
    signed: Option<KeyId>,
    layers: Vec<LayerReport<'a>>,
    tags: &'a [String],
}

/// A manifest of the image that names its indexes.
#[derive(Debug, Serialize)]
struct Named<'a> {
    tag: &'a str,
    manifest: &'a Digest,
}

#[derive(Debug, Serialize)]
struct LayerReport<'a> {
    layer: &'a Digest,
    layer_bytes: u64,
    published: Published,
    index: Option<&'a Digest>,
    index_bytes: Option<u64>,
    hot_bytes: Option<u64>,
    hot_digest: Option<&'a Digest>,
}

fn report(
    image: &str,
    publication: &Publication,
    signed: Option<KeyId>,
    json: bool,
    session: Session,
) -> anyhow::Result<()> {
    if json {
        let layers = publication.layers.iter().map(|(layer, published, listed)| {
            let hot = listed.as_ref().and_then(|listed| listed.hot.as_ref());
            LayerReport {
                layer: &layer.descriptor.digest,
                layer_bytes: layer.descriptor.size,
                published: *published,
                index: listed.as_ref().map(|listed| &listed.digest),
                index_bytes: listed.as_ref().map(|listed| listed.size),
                hot_bytes: hot.map(|(len, _)| *len),
                hot_digest: hot.map(|(_, digest)| digest),
            }
        });
        let report = Report {
            image,
            manifest: &publication.image,
            artifact: publication.artifact.as_ref(),
            into: publication.into.as_ref().map(|(tag, manifest)| Named { tag, manifest }),
            signed,
            layers: layers.collect(),
            tags: &publication.tags,
        };
        return println(serde_json::to_string_pretty(&report)?);
    }
    if session.talk.quiet {
        return Ok(());
    }
    let mut table = Table::plain();
    table.row(["image", image]);
    table.row(["manifest", &publication.image.to_string()]);
    for (layer, published, listed) in &publication.layers {
        let what = match (published, listed) {
            (Published::Missing, _) | (_, None) => "no index".to_owned(),
            (published, Some(listed)) => {
                let how = match published {
                    Published::Made => "made",
                    Published::Copied => "copied",
                    Published::Kept | Published::Missing => "was there",
                };
                let hot = listed.hot.as_ref().map_or(0, |(len, _)| *len);
                format!("index {how}, {}, {} of it hot", show_size(listed.size), show_size(hot))
            }
        };
        let size = show_size(layer.descriptor.size);
        table.row(["layer", &format!("{}, {size}: {what}", layer.descriptor.digest)]);
    }
    let artifact = match &publication.artifact {
        Some(digest) => format!("{digest} (--index-digest pins it)"),
        None => "none, because not every layer has an index".to_owned(),
    };
    table.row(["artifact", &artifact]);
    if let Some(key) = signed {
        table.row(["signed", &format!("by key {key}")]);
    }
    if let Some((tag, manifest)) = &publication.into {
        table.row(["named in", &format!("{tag}, {manifest}")]);
    }
    for tag in &publication.tags {
        table.row(["tag", tag]);
    }
    print(table)?;
    session.talk.note(format_args!(
        "{} beside the image's own keep this in the repository; the image itself is unchanged",
        match publication.tags.len() {
            1 => "1 tag".to_owned(),
            tags => format!("{tags} tags"),
        }
    ));
    if signed.is_none() && publication.into.is_none() {
        session.talk.note(
            "nothing vouches for them: they are used where they are pinned (--index-digest) or the registry is believed (--trust \
             registry); --sign and --into change that",
        );
    }
    Ok(())
}
