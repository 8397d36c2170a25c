//! Images of several layers: random ones and made ones, as tars, as an OCI layout for programs that unpack such, and as
//! the trees and filesystem images that this crate makes of them.

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    missing_docs,
    unreachable_pub
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};

use sha2::{Digest as _, Sha256};
use tarblk::internals::image::export::export;
use tarblk::internals::image::ext4::{Ext4Image, Ext4Options};
use tarblk::internals::index::walk;
use tarblk::internals::tree::{Tree, TreeBuilder, TreeMode};
use tarblk::internals::units::LayerId;

/// One entry of a layer.
#[derive(Clone, Debug)]
pub struct Made {
    pub path: String,
    pub what: What,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (u64, u32),
    pub xattrs: BTreeMap<String, Vec<u8>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    File(Vec<u8>),
    Directory,
    Symlink(String),
    Hardlink(String),
    Fifo,
    Char(u32, u32),
    Block(u32, u32),
}

impl Made {
    /// An entry whose attributes follow from its path and `what`, so that no two are alike.
    pub fn new(path: &str, what: What) -> Self {
        let digest = Sha256::digest(format!("{path} {what:?}"));
        Self {
            path: path.into(),
            mode: if what == What::Directory { 0o755 } else { 0o644 },
            what,
            owner: (digest[0].into(), digest[1].into()),
            mtime: (
                1_600_000_000 + u64::from(digest[2]) * 1000,
                u32::from(digest[3]) * 1_000_001,
            ),
            xattrs: BTreeMap::new(),
        }
    }

    pub fn with_xattr(mut self, name: &str, value: &str) -> Self {
        self.xattrs.insert(name.into(), value.into());
        self
    }
}

pub fn dir(path: &str) -> Made {
    Made::new(path, What::Directory)
}

pub fn file(path: &str, content: &str) -> Made {
    Made::new(path, What::File(content.into()))
}

pub fn symlink(path: &str, to: &str) -> Made {
    Made::new(path, What::Symlink(to.into()))
}

pub fn hardlink(path: &str, to: &str) -> Made {
    Made::new(path, What::Hardlink(to.into()))
}

pub fn whiteout(path: &str) -> Made {
    file(path, "")
}

/// Writes a layer's tar; all that may be long goes into extension headers.
pub fn tar_of(layer: &[Made]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for made in layer {
        use tar::EntryType as Type;
        let (kind, link, content, device) = match &made.what {
            What::File(content) => (Type::Regular, None, &content[..], (0, 0)),
            What::Directory => (Type::Directory, None, &[][..], (0, 0)),
            What::Symlink(to) => (Type::Symlink, Some(to), &[][..], (0, 0)),
            What::Hardlink(to) => (Type::Link, Some(to), &[][..], (0, 0)),
            What::Fifo => (Type::Fifo, None, &[][..], (0, 0)),
            What::Char(major, minor) => (Type::Char, None, &[][..], (*major, *minor)),
            What::Block(major, minor) => (Type::Block, None, &[][..], (*major, *minor)),
        };
        let mtime = format!("{}.{:09}", made.mtime.0, made.mtime.1);
        let mut records: Vec<(String, Vec<u8>)> = vec![
            ("mtime".into(), mtime.into_bytes()),
            ("path".into(), made.path.clone().into_bytes()),
        ];
        if let Some(link) = link {
            records.push(("linkpath".into(), link.clone().into_bytes()));
        }
        for (name, value) in &made.xattrs {
            records.push((format!("SCHILY.xattr.{name}"), value.clone()));
        }
        builder
            .append_pax_extensions(records.iter().map(|(key, value)| (key.as_str(), value.as_slice())))
            .unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_path("x").unwrap();
        header.set_entry_type(kind);
        header.set_mode(made.mode);
        header.set_uid(made.owner.0.into());
        header.set_gid(made.owner.1.into());
        header.set_mtime(made.mtime.0);
        header.set_device_major(device.0).unwrap();
        header.set_device_minor(device.1).unwrap();
        header.set_size(u64::try_from(content.len()).unwrap());
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }
    builder.into_inner().unwrap()
}

/// The tree of these tars, the lowest layer first.
pub fn tree_of(mode: TreeMode, tars: &[Vec<u8>]) -> Tree {
    let mut builder = TreeBuilder::with_mode(mode);
    for (number, tar) in (0..).zip(tars) {
        builder.begin_layer(LayerId(number)).unwrap();
        feed(tar, &mut builder).unwrap();
    }
    builder.finish()
}

/// Hands the entries of a tar in memory to a builder.
pub fn feed(tar: &[u8], builder: &mut TreeBuilder) -> Result<(), Box<dyn std::error::Error>> {
    let file = tempfile::tempfile()?;
    io::Write::write_all(&mut &file, tar)?;
    walk::local(&file, u64::try_from(tar.len())?, builder, &mut |_, _| {})?;
    Ok(())
}

/// Writes the filesystem image of these tars to a file; returns what it was planned from.
pub fn write_image(mode: TreeMode, tars: &[Vec<u8>], path: &Path) -> Ext4Image {
    let image = Ext4Image::plan(tree_of(mode, tars), &Ext4Options::default()).unwrap();
    let out = File::create(path).unwrap();
    export(&image, &out, &mut |layer, at, buffer| {
        let tar = &tars[usize::try_from(layer.0).unwrap()];
        let at = usize::try_from(at.0).unwrap();
        buffer.copy_from_slice(&tar[at..at + buffer.len()]);
        Ok(())
    })
    .unwrap();
    image
}

/// Makes an OCI image layout with one image, tagged `test`, of these layers: every other one compressed with gzip(1).
pub fn write_oci_layout(tars: &[Vec<u8>], dir: &Path) {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8]| {
        let digest = hexadecimal(&Sha256::digest(bytes));
        fs::write(blobs.join(&digest), bytes).unwrap();
        (format!("sha256:{digest}"), bytes.len())
    };
    let descriptor = |kind: &str, (digest, size): (String, usize)| {
        serde_json::json!({
            "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": digest, "size": size,
        })
    };
    let layers: Vec<_> = tars
        .iter()
        .enumerate()
        .map(|(number, tar)| {
            if number % 2 == 0 {
                descriptor("layer.v1.tar+gzip", put(&gzip(tar)))
            } else {
                descriptor("layer.v1.tar", put(tar))
            }
        })
        .collect();
    let diff_ids: Vec<_> = tars
        .iter()
        .map(|tar| format!("sha256:{}", hexadecimal(&Sha256::digest(tar))))
        .collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    });
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("config.v1+json", put(config.to_string().as_bytes())),
        "layers": layers,
    });
    let mut manifest = descriptor("manifest.v1+json", put(manifest.to_string().as_bytes()));
    manifest["annotations"] = serde_json::json!({ "org.opencontainers.image.ref.name": "test" });
    let index = serde_json::json!({ "schemaVersion": 2, "manifests": [manifest] });
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    let output = Command::new("gzip")
        .args(["-nc"])
        .arg(file.path())
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(output.status.success());
    output.stdout
}

/// Numbers that look random, the same for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % limit
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        if from.is_empty() {
            None
        } else {
            Some(&from[self.below(from.len())])
        }
    }
}

/// How random layers are made.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    /// Every directory on the way to anything has an entry, as programs write them that make layers for overlayfs.
    pub all_parents: bool,
    /// Hard links to what lower layers have.
    pub links_across: bool,
}

fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

fn is_below(path: &str, directory: &str) -> bool {
    directory.is_empty() && !path.is_empty() || path.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'))
}

/// Moves what `which` says from one map to another.
fn take_out(from: &mut BTreeMap<String, Made>, to: &mut BTreeMap<String, Made>, which: impl Fn(&String) -> bool) {
    let paths: Vec<_> = from.keys().filter(|path| which(path)).cloned().collect();
    to.extend(paths.iter().filter_map(|path| from.remove_entry(path)));
}

/// Random layers, the lowest first. No path leads through a link, and nothing is in a layer that programs understand in
/// different ways (the module `tree::builder::whiteout` tells which).
pub fn random_layers(seed: u64, style: Style) -> Vec<Vec<Made>> {
    let mut random = Random::new(seed);
    let mut state = BTreeMap::from([(String::new(), dir(""))]);
    let count = 2 + random.below(4);
    (0..count)
        .map(|number| random_layer(&mut random, number, &mut state, style))
        .collect()
}

fn random_layer(random: &mut Random, number: usize, state: &mut BTreeMap<String, Made>, style: Style) -> Vec<Made> {
    // First what is hidden, then what is added to the rest.
    let mut hidden: Vec<Made> = Vec::new();
    let mut roots: Vec<String> = Vec::new();
    let mut holders = BTreeSet::new();
    let mut gone: BTreeMap<String, Made> = BTreeMap::new();
    for _ in 0..random.below(6) {
        let paths: Vec<_> = state.keys().filter(|path| !path.is_empty()).cloned().collect();
        let Some(path) = random.pick(&paths) else { continue };
        if roots
            .iter()
            .any(|root| root == path || is_below(path, root) || is_below(root, path))
        {
            continue;
        }
        let below = |other: &String| is_below(other, path);
        if state[path].what == What::Directory && random.below(2) == 0 {
            hidden.push(whiteout(&format!("{path}/.wh..wh..opq")));
            holders.insert(path.clone());
            take_out(state, &mut gone, below);
        } else {
            let (parent, name) = (parent(path), path.rsplit('/').next().unwrap());
            let slash = if parent.is_empty() { "" } else { "/" };
            hidden.push(whiteout(&format!("{parent}{slash}.wh.{name}")));
            holders.insert(parent.to_owned());
            take_out(state, &mut gone, |other| other == path || below(other));
        }
        roots.push(path.clone());
    }
    let mut added: BTreeMap<String, Made> = BTreeMap::new();
    // Hidden directories that are there again are what is easiest to get wrong.
    for (path, made) in gone {
        let there = state
            .get(parent(&path))
            .is_some_and(|made| made.what == What::Directory);
        if made.what == What::Directory && there && random.below(2) == 0 {
            let again = dir(&path).with_xattr("user.again", &number.to_string());
            added.insert(path.clone(), again.clone());
            state.insert(path, again);
        }
    }
    let mut links: Vec<Made> = Vec::new();
    let mut targets = BTreeSet::new();
    for turn in 0..4 + random.below(14) {
        let directories: Vec<_> = state
            .iter()
            .filter(|(_, made)| made.what == What::Directory)
            .map(|(path, _)| path.clone())
            .collect();
        let parent = random.pick(&directories).unwrap().clone();
        let name = ["a", "b", "c", "d", "e", "a name with spaces", "\u{e9}t\u{e9}"][random.below(7)];
        let slash = if parent.is_empty() { "" } else { "/" };
        let path = format!("{parent}{slash}{name}");
        let what = random_what(random, number, turn);
        let pinned = |other: &String| *other == path || is_below(other, &path);
        let clashes = added.contains_key(&path)
            || links.iter().any(|link| pinned(&link.path))
            || targets.iter().any(pinned)
            || what != What::Directory && (added.keys().any(pinned) || holders.iter().any(pinned));
        if clashes {
            continue;
        }
        let mut made = Made {
            mode: u32::try_from(random.below(0o10000)).unwrap(),
            mtime: (
                1_500_000_000 + u64::try_from(random.below(1 << 28)).unwrap(),
                u32::try_from(random.below(1_000_000_000)).unwrap(),
            ),
            ..Made::new(&path, what)
        };
        if matches!(made.what, What::File(_) | What::Directory) && random.below(3) == 0 {
            made = made.with_xattr(["user.a", "user.b"][random.below(2)], &format!("{number}-{turn}"));
        }
        if let What::Hardlink(_) = made.what {
            let within = |path: &String| added.contains_key(path) || links.iter().any(|link| link.path == *path);
            let candidates: Vec<_> = state
                .iter()
                .filter(|(to, made)| made.what != What::Directory && **to != path)
                .filter(|(to, _)| style.links_across || within(to))
                .map(|(to, _)| to.clone())
                .collect();
            let Some(to) = random.pick(&candidates) else { continue };
            // A link clears its own name first, and with a directory what it holds.
            if is_below(to, &path) {
                continue;
            }
            made.what = What::Hardlink(to.clone());
            targets.insert(to.clone());
            links.push(made.clone());
        } else {
            added.insert(path.clone(), made.clone());
        }
        if made.what != What::Directory {
            state.retain(|other, _| !is_below(other, &path));
        }
        state.insert(path, made);
    }
    in_order(random, number, state, style, added, links, hidden)
}

fn random_what(random: &mut Random, number: usize, turn: usize) -> What {
    match random.below(12) {
        0..5 => {
            let len = [0, 10, 4096, 5000, 20_000][random.below(5)];
            let seed = format!("{number} {turn} ");
            What::File(seed.bytes().cycle().take(len).collect())
        }
        5..8 => What::Directory,
        8 => What::Symlink("somewhere/else".repeat(1 + random.below(6))),
        9 => What::Fifo,
        10 => What::Char(u32::try_from(1 + random.below(200)).unwrap(), 300),
        _ => What::Hardlink(String::new()),
    }
}

/// A layer's entries, directories before what they hold, links behind what they name, whiteouts anywhere.
fn in_order(
    random: &mut Random,
    number: usize,
    state: &BTreeMap<String, Made>,
    style: Style,
    mut added: BTreeMap<String, Made>,
    links: Vec<Made>,
    hidden: Vec<Made>,
) -> Vec<Made> {
    if number == 0 || style.all_parents {
        let mut parents = BTreeSet::from([String::new()]);
        for made in added.values().chain(&links).chain(&hidden) {
            let mut at = parent(&made.path);
            while !at.is_empty() {
                parents.insert(at.to_owned());
                at = parent(at);
            }
        }
        for path in parents {
            added.entry(path.clone()).or_insert_with(|| state[&path].clone());
        }
    }
    let (mut entries, mut others): (Vec<_>, Vec<_>) =
        added.into_values().partition(|made| made.what == What::Directory);
    for at in (1..others.len()).rev() {
        others.swap(at, random.below(at + 1));
    }
    entries.extend(others);
    entries.extend(links);
    for whiteout in hidden {
        let at = random.below(entries.len() + 1);
        entries.insert(at, whiteout);
    }
    for made in &mut entries {
        if made.path.is_empty() {
            made.path.push_str("./");
        }
    }
    entries
}
