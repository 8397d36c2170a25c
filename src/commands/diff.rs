//! `tarblk diff`: what changed from one to the other, told from indexes alone.

use std::collections::HashSet;
use std::io::{self, Write};

use serde::Serialize;

use super::Session;
use super::cli::DiffArgs;
use super::layer::{Bar, options_for};
use super::output::{println, write_out};
use crate::diff::{Aspect, Difference, LayerFacts, LayerKnowledge, Side, Totals, compare};
use crate::index::listing::text::Escaped;
use crate::index::listing::{Line, json};
use crate::index::{Entry, Index};
use crate::open::{self, KnownPayloads};
use crate::quantity::{show_count, show_size};
use crate::source::Source;
use crate::tree::{NodeId, Tree, TreeBuilder};

/// One of the two, opened.
struct Opened {
    tree: Tree,
    /// By layer: what its index knows of it.
    layers: Vec<LayerKnowledge>,
    /// By layer: what may be fetched of it.
    fetched: Vec<Fetched>,
    is_image: bool,
}

/// What of a layer may be fetched.
struct Fetched {
    /// What it is known by.
    identities: Vec<String>,
    index: Index<Vec<u8>>,
    payloads: KnownPayloads,
}

impl Opened {
    /// The tree of an image, or of what may be a layer or an index of one.
    fn new(source: &str, args: &DiffArgs, session: Session) -> anyhow::Result<Self> {
        let bar = &mut Bar::new(session.talk);
        let options = options_for(source, &args.registry.within(args.deadline))?;
        if let Source::Image(_) = Source::parse(source)? {
            let prepared = open::prepare(source, &options, bar)?;
            let tree = prepared.tree()?;
            let (mut layers, mut fetched) = (Vec::new(), Vec::new());
            for layer in prepared.layers {
                let payloads = KnownPayloads::of_layer(&layer)?;
                let mut known = LayerKnowledge::of(&layer.index)?;
                known.learn(&payloads.payloads);
                for digest in layer.layer.digest.iter().chain(&layer.layer.diff_id) {
                    known.identify(digest.to_string());
                }
                fetched.push(Fetched {
                    identities: known.facts().identities.to_vec(),
                    index: layer.index,
                    payloads,
                });
                layers.push(known);
            }
            return Ok(Self {
                tree,
                layers,
                fetched,
                is_image: true,
            });
        }
        let index = open::index_of(source, &options, bar)?;
        let mut builder = TreeBuilder::new();
        index.replay(&mut builder)?;
        let known = LayerKnowledge::of(&index)?;
        let fetched = Fetched {
            identities: known.facts().identities.to_vec(),
            payloads: KnownPayloads::of(&index)?,
            index,
        };
        Ok(Self {
            tree: builder.finish(),
            layers: vec![known],
            fetched: vec![fetched],
            is_image: false,
        })
    }

    fn facts(&self) -> Vec<LayerFacts<'_>> {
        self.layers.iter().map(LayerKnowledge::facts).collect()
    }
}

/// A difference as JSON has it.
#[derive(Serialize)]
struct JsonDifference<'a> {
    change: &'static str,
    #[serde(skip_serializing_if = "<[Aspect]>::is_empty")]
    aspects: &'a [Aspect],
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<Line<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    after: Option<Line<'a>>,
}

/// What stands at the end, as JSON has it.
#[derive(Serialize)]
struct JsonTotals {
    totals: Totals,
    /// Of an image.
    #[serde(skip_serializing_if = "Option::is_none")]
    network: Option<Network>,
}

/// Bytes of the second one's layers, as they travel.
#[derive(Clone, Copy, Serialize)]
struct Network {
    /// Those that a machine which has the first one's layers fetches in the end, if all files are read.
    bytes: u64,
    /// All of them.
    of_bytes: u64,
}

/// What a machine that has the layers of `a` fetches of those of `b`.
fn network(a: Vec<Fetched>, b: &[Fetched]) -> Network {
    let is_here: HashSet<String> = a.iter().flat_map(|layer| layer.identities.iter().cloned()).collect();
    let mut donors: Vec<KnownPayloads> = a.into_iter().map(|layer| layer.payloads).collect();
    let mut sum = Network { bytes: 0, of_bytes: 0 };
    for layer in b {
        sum.of_bytes += layer.index.identity().blob_len;
        if !layer.identities.iter().any(|identity| is_here.contains(identity)) {
            sum.bytes += open::bytes_to_fetch(&layer.index, &layer.payloads, &donors);
        }
        donors.push(layer.payloads.clone());
    }
    sum
}

/// `tarblk diff`.
pub(super) fn diff(args: &DiffArgs, session: Session) -> anyhow::Result<()> {
    let mut a = Opened::new(&args.a, args, session)?;
    let b = Opened::new(&args.b, args, session)?;
    let donors = std::mem::take(&mut a.fetched);
    let network = b.is_image.then(|| network(donors, &b.fetched));
    let (facts_a, facts_b) = (a.facts(), b.facts());
    let a = Side {
        tree: &a.tree,
        layers: &facts_a,
    };
    let b = Side {
        tree: &b.tree,
        layers: &facts_b,
    };
    let mut totals = Totals::default();
    write_out(|out| {
        let (mut before, mut after) = (Entry::default(), Entry::default());
        totals = compare(a, b, &mut |path, difference| {
            let (old, new) = sides_of(difference);
            fill(&mut before, a.tree, old, path);
            fill(&mut after, b.tree, new, path);
            if args.json {
                let line = |entry, tree: &Tree, id: Option<NodeId>| {
                    id.map(|id| Line::in_layer(entry, tree.node(id).layer().0))
                };
                let object = JsonDifference {
                    change: match difference {
                        Difference::Added(_) => "added",
                        Difference::Removed(_) => "removed",
                        Difference::Changed { .. } => "changed",
                    },
                    aspects: aspects_of(difference),
                    before: line(&before, a.tree, old),
                    after: line(&after, b.tree, new),
                };
                return json(&object, out);
            }
            tell(difference, &before, &after, args.uncertain, out)
        })?;
        Ok(())
    })?;
    if args.json {
        return println(serde_json::to_string(&JsonTotals { totals, network })?);
    }
    summarise(&totals, network, args.uncertain)
}

fn sides_of(difference: Difference<'_>) -> (Option<NodeId>, Option<NodeId>) {
    match difference {
        Difference::Added(after) => (None, Some(after)),
        Difference::Removed(before) => (Some(before), None),
        Difference::Changed { before, after, .. } => (Some(before), Some(after)),
    }
}

fn aspects_of(difference: Difference<'_>) -> &[Aspect] {
    match difference {
        Difference::Changed { aspects, .. } => aspects,
        _ => &[],
    }
}

/// Fills an entry with what a tree has under a path.
fn fill(entry: &mut Entry, tree: &Tree, node: Option<NodeId>, path: &[u8]) {
    let Some(node) = node else { return };
    tree.describe(node, entry);
    entry.path.clear();
    entry.path.extend_from_slice(if path.is_empty() { b"." } else { path });
    if tree.node(node).is_directory() {
        entry.path.push(b'/');
    }
}

/// A line for a person.
fn tell(
    difference: Difference<'_>,
    before: &Entry,
    after: &Entry,
    uncertain: bool,
    out: &mut dyn Write,
) -> io::Result<()> {
    match difference {
        Difference::Added(_) => writeln!(out, "+ {}", Escaped(&after.path)),
        Difference::Removed(_) => writeln!(out, "- {}", Escaped(&before.path)),
        Difference::Changed { aspects, .. } => {
            if aspects == [Aspect::MaybeContent] && !uncertain {
                return Ok(());
            }
            let what: Vec<_> = aspects.iter().map(|aspect| phrase(*aspect, before, after)).collect();
            writeln!(out, "~ {}  {}", Escaped(&after.path), what.join(", "))
        }
    }
}

fn phrase(aspect: Aspect, before: &Entry, after: &Entry) -> String {
    let device = |entry: &Entry| format!("{}:{}", entry.device_major, entry.device_minor);
    match aspect {
        Aspect::Type => format!("{:?} becomes {:?}", before.kind, after.kind).to_lowercase(),
        Aspect::Mode => format!("mode {:04o} to {:04o}", before.mode, after.mode),
        Aspect::Owner => format!("owner {}:{} to {}:{}", before.uid, before.gid, after.uid, after.gid),
        Aspect::Time => "time".into(),
        Aspect::Size => format!("{} to {} bytes", before.size, after.size),
        Aspect::Content => "content".into(),
        Aspect::MaybeContent => "content?".into(),
        Aspect::Link => format!("link to {} to {}", Escaped(&before.link), Escaped(&after.link)),
        Aspect::Names => "hard links".into(),
        Aspect::Device => format!("device {} to {}", device(before), device(after)),
        Aspect::Xattrs => "extended attributes".into(),
    }
}

fn summarise(totals: &Totals, network: Option<Network>, uncertain: bool) -> anyhow::Result<()> {
    let doubt = match totals.uncertain {
        0 => String::new(),
        many => format!(
            "; {} of the same size may differ in content, which the indexes do not tell{}",
            show_count(many),
            if uncertain { "" } else { " (--uncertain lists them)" }
        ),
    };
    println(format_args!(
        "{} added, {} removed, {} changed{doubt}\n{} of files; a machine that has the first would fetch at most {}",
        show_count(totals.added),
        show_count(totals.removed),
        show_count(totals.changed),
        show_size(totals.payload_bytes),
        show_size(totals.fetch_bytes)
    ))?;
    let Some(network) = network else { return Ok(()) };
    println(format_args!(
        "of its layers as they travel, {} of {}",
        show_size(network.bytes),
        show_size(network.of_bytes)
    ))
}
