//! `tarblk podman`: images for podman and CRI-O that are not pulled.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Parser;
use serde::Serialize;

use super::attach::{make_ready, mounter, states, upgrade_other};
use super::cli::{AddArgs, BackendArg, DeviceArgs, LayerArgs, PodmanAction, PodmanArgs, RmArgs, TrustArg};
use super::container_image::ContainerImage;
use super::output::{Table, print, println};
use super::ps::word;
use super::{Session, UsageError};
use crate::device::service::ServiceError;
use crate::http::without_secrets;
use crate::interrupt::Interrupt;
use crate::mount::MountOptions;
use crate::open::IndexChoice;
use crate::podman::{self, Listed, Record, Removed, StorageConfig, Store, podman_name};
use crate::quantity::show_size;
use crate::source::registry::DEFAULT_HOSTS_DIR;

/// An addition as it is kept: parsed again by `restore`.
#[derive(Debug, Parser)]
#[command(name = "add", no_binary_name = true)]
struct KeptAddition {
    #[command(flatten)]
    add: AddArgs,
}

/// `tarblk podman`.
pub(super) fn run(args: &PodmanArgs, session: Session) -> anyhow::Result<()> {
    match &args.action {
        PodmanAction::Add(add) => {
            let id = self::add(&args.store, add, &[name(add)?], session)?;
            println(id)?;
            hint(&args.store, session);
            Ok(())
        }
        PodmanAction::Rm(rm) => remove(&args.store, rm, session),
        PodmanAction::Ls { json } => list(&args.store, *json, session),
        PodmanAction::Restore => restore(&args.store, session),
        PodmanAction::Setup => setup(&args.store, session),
    }
}

/// What podman is to call an image.
fn name(args: &AddArgs) -> anyhow::Result<String> {
    let typed = without_secrets(&args.layer.source);
    let (name, why) = match &args.name {
        Some(name) => (
            podman_name(&format!("docker://{name}")),
            format!("--name {name}: not an image's name: HOST/REPOSITORY:TAG"),
        ),
        None => (
            podman_name(&args.layer.source),
            format!(
                "{typed}: podman cannot call an image so; docker://HOST/NAME[:TAG] or oci:DIR[:TAG] it can, or say --name NAME"
            ),
        ),
    };
    name.ok_or_else(|| UsageError(why).into())
}

/// Adds an image, which podman is to call `names`; returns its ID.
fn add(store: &Path, args: &AddArgs, names: &[String], session: Session) -> anyhow::Result<String> {
    make_ready(args.device.backend)?;
    let options = words(args)?;
    // What is wrong with the store is told before the network is asked anything.
    drop(Store::open(store, &states())?);
    let found = ContainerImage::find(&args.layer, "podman", session)?;
    let source = found.layer.source.clone();
    let mut record = Record::new(&found.image, source, names.to_vec(), options)?;
    let id = record.id.clone();
    if keep_served(&mut Store::open(store, &states())?, &record)? {
        return Ok(id);
    }
    let (prepared, request) = found.request(&args.device, args.fetch_all, session)?;
    record.bytes = prepared.payload_bytes();
    upgrade_other();
    let mounter = mounter()?;
    // A signal must not come between the device and what is known of it.
    let interrupt = Interrupt::catch().context("cannot catch signals")?;
    let mut store = Store::open(store, &states())?;
    interrupt.check()?;
    // Another command may have been faster.
    if keep_served(&mut store, &record)? {
        return Ok(id);
    }
    let attached = store.add(&record, &found.image, |dir| {
        mounter(&request.spec, dir, &MountOptions::default())
    })?;
    log::info!("{id} is {}", attached.state.device.display());
    if let Some(line) = &request.line {
        session.talk.note(format_args!("tarblk: {line}"));
    }
    Ok(id)
}

/// Whether the store has an image, served; then it has all names of `record` from now on.
fn keep_served(store: &mut Store, record: &Record) -> anyhow::Result<bool> {
    let Some(known) = store.find(&record.id)?.filter(Listed::is_served) else {
        return Ok(false);
    };
    store.keep(Record {
        names: record.names.clone(),
        ..known.record
    })?;
    Ok(true)
}

/// Says what is missing for podman to find the images, if anything is.
fn hint(store: &Path, session: Session) {
    match StorageConfig::of_machine() {
        Ok(config) if config.names(store) => {}
        Ok(config) => session.talk.note(format_args!(
            "tarblk: podman does not look into {} yet: {} has to name it; `tarblk podman setup` prints how",
            store.display(),
            config.file_to_change().display()
        )),
        Err(error) => log::warn!("{error}"),
    }
}

/// `tarblk podman rm`.
fn remove(dir: &Path, args: &RmArgs, session: Session) -> anyhow::Result<()> {
    need_root()?;
    let mut store = Store::open(dir, &states())?;
    let config = StorageConfig::of_machine()?;
    let wanted: Vec<String> = if args.all {
        store.records().iter().map(|record| record.id.clone()).collect()
    } else {
        args.images.clone()
    };
    let mut one = |wanted: &str| -> anyhow::Result<()> {
        let removed = store.remove(wanted, args.force, |layer| config.made_on(layer))?;
        if let Removed::ImageInUse(users) = removed {
            session.talk.note(format_args!(
                "{wanted} is removed; its device is {users}, and goes when that is over"
            ));
        }
        Ok(())
    };
    all_of(&wanted, |wanted| one(wanted), session)
}

/// Does something with each of `wanted`: one that fails keeps no other. Errors but the last are told at once.
fn all_of<T>(wanted: &[T], mut one: impl FnMut(&T) -> anyhow::Result<()>, session: Session) -> anyhow::Result<()> {
    let mut failed: Vec<_> = wanted.iter().filter_map(|wanted| one(wanted).err()).collect();
    let Some(last) = failed.pop() else { return Ok(()) };
    for error in &failed {
        session.talk.note(format_args!("tarblk: {error:#}"));
    }
    Err(last)
}

/// An image of `ls --json`.
#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    listed: &'a Listed,
    /// Whether podman can use it.
    ready: bool,
}

/// `tarblk podman ls`.
fn list(store: &Path, json: bool, session: Session) -> anyhow::Result<()> {
    need_root()?;
    let listed = podman::list(store, &states())?;
    if json {
        let lines: Vec<_> = listed
            .iter()
            .map(|listed| Line {
                ready: listed.is_served(),
                listed,
            })
            .collect();
        return println(serde_json::to_string_pretty(&lines)?);
    }
    if listed.is_empty() {
        session.talk.note(format_args!("{} holds no images", store.display()));
        return Ok(());
    }
    let mut table = Table::new(&["IMAGE", "ID", "STATUS", ">SIZE", "DEVICE", "SOURCE"]);
    for line in &listed {
        let record = &line.record;
        let names = if record.names.is_empty() {
            "<none>".to_owned()
        } else {
            record.names.join(", ")
        };
        table.row([
            names,
            record.id.chars().take(12).collect(),
            line.status.as_ref().map_or("not mounted", word).to_owned(),
            show_size(record.bytes),
            line.device
                .as_ref()
                .map_or_else(|| "-".to_owned(), |path| path.display().to_string()),
            record.source.clone(),
        ]);
    }
    print(table)
}

/// `tarblk podman restore`.
fn restore(dir: &Path, session: Session) -> anyhow::Result<()> {
    need_root()?;
    let lost: Vec<Listed> = podman::list(dir, &states())?
        .into_iter()
        .filter(|listed| !listed.is_served())
        .collect();
    let one = |listed: &Listed| -> anyhow::Result<()> {
        let record = &listed.record;
        let told = || record.names.first().unwrap_or(&record.id).clone();
        let args = parse(record).with_context(told)?;
        add(dir, &args, &record.names, session).with_context(told)?;
        Ok(())
    };
    all_of(&lost, one, session)
}

/// `tarblk podman setup`.
fn setup(store: &Path, session: Session) -> anyhow::Result<()> {
    let config = StorageConfig::of_machine()?;
    if rustix::process::geteuid().is_root() {
        // podman does not start when a store is named that is not there.
        drop(Store::open(store, &states())?);
    }
    let full = std::path::absolute(store)?;
    if config.names(&full) {
        session.talk.note(format_args!(
            "{} names {} already; nothing is to be done",
            config.path.display(),
            full.display()
        ));
        return Ok(());
    }
    session.talk.note(format_args!(
        "# this belongs into {}:",
        config.file_to_change().display()
    ));
    print(config.fragment(&full))
}

fn need_root() -> anyhow::Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(ServiceError::NotRoot.into())
}

/// The arguments by which a record was made.
fn parse(record: &Record) -> anyhow::Result<AddArgs> {
    let words = record.options.iter().chain([&record.source]);
    let parsed = KeptAddition::try_parse_from(words);
    let parsed = parsed.map_err(|error| anyhow::anyhow!("its options make no sense: {}", error.kind()))?;
    Ok(parsed.add)
}

/// The options of `args` as they are typed, of those that tell one image from another or are to be the same after a restart: no secret
/// among them, and files by their full paths.
///
/// # Errors
/// [`UsageError`] for what cannot be kept.
fn words(args: &AddArgs) -> anyhow::Result<Vec<String>> {
    let mut words = Vec::new();
    let mut option = |name: &str, value: Option<String>| {
        if let Some(value) = value {
            words.push(format!("--{name}={value}"));
        }
    };
    let full = |path: &PathBuf| -> anyhow::Result<String> {
        let full = std::path::absolute(path)?.into_os_string().into_string();
        full.map_err(|path| UsageError(format!("{}: not UTF-8", path.display())).into())
    };
    let full_if_any = |path: &Option<PathBuf>| path.as_ref().map(full).transpose();
    let LayerArgs {
        source: _,
        index,
        index_digest,
        layer: _,
        cache,
        no_cache,
        cache_size,
        registry,
    } = &args.layer;
    let word = match index {
        IndexChoice::Auto => None,
        IndexChoice::Require => Some("require".to_owned()),
        // What was built is cached.
        IndexChoice::Ignore | IndexChoice::Build => Some("ignore".to_owned()),
        IndexChoice::Named(name) if without_secrets(name) != *name => {
            return Err(
                UsageError("--index: a URL with secrets in it cannot be kept for the next start".to_owned()).into(),
            );
        }
        IndexChoice::Named(name) if name.contains("://") => Some(name.clone()),
        IndexChoice::Named(name) => Some(full(&PathBuf::from(name))?),
    };
    option("index", word);
    option("index-digest", index_digest.as_ref().map(ToString::to_string));
    option("cache", full_if_any(cache)?);
    option("cache-size", cache_size.map(|bytes| bytes.to_string()));
    option("platform", registry.platform.as_ref().map(ToString::to_string));
    option("authfile", full_if_any(&registry.authfile)?);
    if registry.hosts_dir != Path::new(DEFAULT_HOSTS_DIR) {
        option("hosts-dir", Some(full(&registry.hosts_dir)?));
    }
    option("max-layer-size", registry.max_layer_size.map(|bytes| bytes.to_string()));
    option(
        "trust",
        registry.trust.map(|word| {
            match word {
                TrustArg::Verified => "verified",
                TrustArg::Registry => "registry",
            }
            .to_owned()
        }),
    );
    for key in &registry.trust_key {
        option("trust-key", Some(full(key)?));
    }
    let DeviceArgs { backend, queues, fetch } = &args.device;
    option(
        "backend",
        match backend {
            BackendArg::Auto => None,
            BackendArg::Ublk => Some("ublk".to_owned()),
            BackendArg::Loop => Some("loop".to_owned()),
        },
    );
    option("queues", queues.map(|count| count.to_string()));
    option("memory", fetch.memory.map(|bytes| bytes.to_string()));
    option("deadline", fetch.deadline.map(|time| format!("{}ns", time.as_nanos())));
    option("connections", Some(fetch.connections.to_string()));
    for (name, is_set) in [
        ("no-cache", *no_cache),
        ("plain-http", registry.plain_http),
        ("allow-private-redirects", registry.allow_private_redirects),
        ("fetch-all", args.fetch_all),
    ] {
        if is_set {
            words.push(format!("--{name}"));
        }
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(words: &[&str]) -> AddArgs {
        KeptAddition::try_parse_from(words).unwrap().add
    }

    #[test]
    fn kept_options_mean_what_was_typed() {
        let digest = format!("sha256:{}", "0".repeat(64));
        let all = [
            "docker://host/a",
            "--index=require",
            &format!("--index-digest={digest}"),
            "--cache=/c",
            "--cache-size=16GiB",
            "--platform=linux/arm/v7",
            "--authfile=/a b",
            "--plain-http",
            "--hosts-dir=/h",
            "--max-layer-size=1GiB",
            "--allow-private-redirects",
            "--trust=registry",
            "--trust-key=/k1",
            "--trust-key=/k2",
            "--backend=loop",
            "--queues=2",
            "--memory=64MiB",
            "--deadline=1.5s",
            "--connections=3",
            "--fetch-all",
        ];
        for given in [&all[..], &all[..1], &["oci:dir:tag", "--no-cache", "--index=ignore"]] {
            let first = typed(given);
            let words = words(&first).unwrap();
            let again: Vec<&str> = words.iter().map(String::as_str).chain([given[0]]).collect();
            assert_eq!(format!("{:?}", typed(&again)), format!("{first:?}"), "{words:?}");
        }
    }

    #[test]
    fn kept_options_have_no_secrets_and_full_paths() {
        let words = words(&typed(&[
            "docker://host/a",
            "--creds=me:word",
            "--authfile=a.json",
            "--index=i.tarblk",
            "--pull=always",
        ]));
        let words = words.unwrap();
        let here = std::env::current_dir().unwrap().display().to_string();
        assert_eq!(
            words,
            [
                format!("--index={here}/i.tarblk"),
                format!("--authfile={here}/a.json"),
                "--connections=16".to_owned()
            ]
        );
        let secret = typed(&["docker://host/a", "--index=https://me:word@host/i"]);
        assert!(!self::words(&secret).unwrap_err().to_string().contains("word"));
    }
}
