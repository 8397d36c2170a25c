//! `tarblk index`: what a layer holds, as a file; and `index verify`, whether such a file says the truth.

use std::io::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde::Serialize;

use super::Session;
use super::cli::{IndexAction, IndexArgs, VerifyArgs};
use super::layer::{Bar, warn_of_archive};
use super::output::{Table, print, println};
use super::publish;
use super::replace::replace;
use crate::digest::{Digest, hexadecimal};
use crate::http::without_secrets;
use crate::index::build::Contents;
use crate::index::{ColdPart, EndOfArchive, Index, IndexError, IndexFault, Summary, first_difference};
use crate::layer::{Coding, SpanTable};
use crate::open::{self, IndexOrigin, OpenOptions, PreparedLayer, Recording, SizeLimit};
use crate::quantity::{show_count, show_size, show_time};
use crate::source::Source;

/// `tarblk index` and what is below it.
pub(super) fn run(args: &IndexArgs, session: Session) -> anyhow::Result<()> {
    match (&args.action, &args.source) {
        (Some(IndexAction::Verify(args)), _) => verify(args, session),
        (Some(IndexAction::Push(args)), _) => publish::push(args, session),
        (Some(IndexAction::Copy(args)), _) => publish::copy(args, session),
        (None, Some(source)) => index(source, args, session),
        // Invariant: the command line's parser requires a source where there is no subcommand.
        (None, None) => bail!("name a layer"),
    }
}

/// What `index --json` says.
#[derive(Debug, Serialize)]
struct Report<'a> {
    source: String,
    #[serde(flatten)]
    summary: &'a Summary,
    index_bytes: u64,
    hot_bytes: u64,
    requests: u64,
    bytes_fetched: u64,
    seconds: f64,
    /// The layer's blob and tar, when all of them was read.
    blob_digest: Option<&'a Digest>,
    diff_id: Option<&'a Digest>,
    chunk_digests: u64,
    payload_digests: bool,
    content_pieces: bool,
    header_bytes_kept: bool,
    content_sha256: String,
    hot_sha256: String,
}

/// Makes an index.
fn index(source: &str, args: &IndexArgs, session: Session) -> anyhow::Result<()> {
    let began = Instant::now();
    let mut bar = Bar::new(session.talk);
    let registry = args.registry.within(args.deadline);
    let size = registry.size();
    let options = OpenOptions {
        layer: args.layer.clone(),
        size,
        http: registry.http(),
        registry: registry.options()?,
        ..OpenOptions::default()
    };
    let prepared = match whole(source, args, &options)? {
        Some(contents) => {
            let spacing = args.spacing;
            let recording = Recording {
                contents,
                spacing,
                size,
            };
            open::record(source, &recording, &options, &mut bar)?
        }
        None => open::prepare(source, &options, &mut bar)?.into_only()?,
    };
    drop(bar);
    if !matches!(Source::parse(source)?, Source::Image(_)) {
        warn_of_archive(source, &prepared.index)?;
    }
    let took = began.elapsed();
    let bytes = prepared.index.as_bytes();
    if let Some(path) = &args.output {
        replace(path, |file| {
            let written = file.write_all(bytes);
            written.with_context(|| format!("cannot write {}", path.display()))
        })?;
    }
    let (requests, bytes_fetched) = match prepared.origin {
        IndexOrigin::Read { reads, bytes } | IndexOrigin::Contents { reads, bytes } => (reads, bytes),
        IndexOrigin::Given | IndexOrigin::Kept | IndexOrigin::Published { .. } => (0, 0),
    };
    let index = &prepared.index;
    let identity = index.identity();
    let report = Report {
        source: prepared.layer.blob.name.clone(),
        summary: index.summary(),
        index_bytes: index.file_len(),
        hot_bytes: index.hot_len(),
        requests,
        bytes_fetched,
        seconds: took.as_secs_f64(),
        blob_digest: identity.blob_digest.as_ref(),
        diff_id: identity.diff_id.as_ref(),
        chunk_digests: index.chunk_digests().map_or(0, crate::index::ChunkDigests::len),
        payload_digests: index.cold().has(ColdPart::PayloadDigests),
        content_pieces: index.cold().has(ColdPart::ContentPieces),
        header_bytes_kept: index.cold().has(ColdPart::Headers),
        content_sha256: hexadecimal(index.content_digest()),
        hot_sha256: hexadecimal(&index.hot_digest()),
    };
    if args.json {
        return println(serde_json::to_string_pretty(&report)?);
    }
    if session.talk.quiet {
        Ok(())
    } else {
        summarise(&report, &prepared, args.output.as_deref(), took)
    }
}

/// What is to be read of all of a layer; nothing when its headers are enough.
fn whole(source: &str, args: &IndexArgs, options: &OpenOptions) -> anyhow::Result<Option<Contents>> {
    let named = Source::parse(source)?;
    let near = matches!(named, Source::Path(_));
    if args.full {
        return Ok(Some(Contents::FULL));
    }
    // Only a plain tar can be read at its headers alone.
    let plain = open::coding_of(source, options)? == Coding::Plain;
    Ok(match (plain, args.no_digests) {
        (true, true) => None,
        (true, false) => (near && args.output.is_some()).then_some(Contents::CHECKED),
        (false, true) => Some(Contents::ENTRIES),
        (false, false) => Some(Contents::CHECKED),
    })
}

/// The kinds of entries that there are, and how many.
fn kinds(summary: &Summary) -> String {
    let kinds = [
        (summary.files, "files"),
        (summary.directories, "directories"),
        (summary.symlinks, "symlinks"),
        (summary.hardlinks, "hard links"),
        (summary.devices, "devices"),
        (summary.fifos, "fifos"),
    ];
    let kinds: Vec<_> = kinds
        .iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, kind)| format!("{} {kind}", show_count(*n)))
        .collect();
    kinds.join(", ")
}

/// The summary for a person.
fn summarise(
    report: &Report<'_>,
    prepared: &PreparedLayer,
    output: Option<&Path>,
    took: Duration,
) -> anyhow::Result<()> {
    let summary = report.summary;
    let whats = if prepared.layer.blob.is_remote() {
        "requests"
    } else {
        "reads"
    };
    let mut table = Table::plain();
    let identity = prepared.index.identity();
    let unpacked = match identity.coding {
        Coding::Plain => String::new(),
        coding => format!(" of {coding}, {}", show_size(summary.tar_bytes)),
    };
    let len = show_size(identity.blob_len);
    table.row(["layer", &format!("{}, {len}{unpacked}", report.source)]);
    if let Some(digest) = report.blob_digest {
        table.row(["digest", &digest.to_string()]);
    }
    table.row([
        "entries",
        &format!("{}: {}", show_count(summary.entries), kinds(summary)),
    ]);
    table.row([
        "payload",
        &format!(
            "{} stored for {} of files",
            show_size(summary.payload_bytes),
            show_size(summary.file_bytes)
        ),
    ]);
    let place = output.map_or_else(
        || "not written (-o FILE writes it)".to_owned(),
        |path| format!("written to {}", path.display()),
    );
    let per_entry = report.hot_bytes.checked_div(summary.entries).unwrap_or(0);
    let cold = match report.index_bytes - report.hot_bytes {
        0 => String::new(),
        cold => format!(" and {} read when needed", show_size(cold)),
    };
    let hot = show_size(report.hot_bytes);
    table.row(["index", &format!("{hot}{cold}, {per_entry} bytes an entry, {place}")]);
    table.row(["holds", &holds(report)]);
    if let Some(spans) = prepared.index.spans() {
        table.row(["entered at", &show_entries(&prepared.index, spans)?]);
    }
    table.row(["its digest", &format!("sha256:{}", report.hot_sha256)]);
    table.row([
        "cost",
        &format!(
            "{} {whats}, {} read, {}",
            show_count(report.requests),
            show_size(report.bytes_fetched),
            show_time(took)
        ),
    ]);
    if prepared.index.end() == EndOfArchive::Missing {
        table.row(["warning", "the tar's end is not marked: it may be cut short"]);
    }
    print(table)
}

/// From where a compressed layer is decoded.
fn show_entries(index: &Index<Vec<u8>>, spans: &SpanTable) -> anyhow::Result<String> {
    let points = u64::try_from(spans.len())?;
    if !spans.seekable() {
        return Ok(match (spans.coding(), index.chunk_digests().is_some()) {
            (Coding::Zstd, false) => {
                "its beginning only: without digests nothing would tell what decodes wrong inside of a zstd frame"
            }
            _ => "its beginning only: it was compressed in one piece",
        }
        .to_owned());
    }
    let distance = show_size(index.tar_len() / points.max(1));
    let places = format!("{} places, about every {distance}", show_count(points));
    let windows = index.cold().range(ColdPart::windows_of(spans.coding()));
    let Some(windows) = windows.map(|windows| windows.end - windows.start) else {
        return Ok(places);
    };
    let share = windows.saturating_mul(1000) / index.identity().blob_len.max(1);
    let (percent, tenths) = (share / 10, share % 10);
    Ok(format!(
        "{places}, which takes {} beside it, {percent}.{tenths}% of the layer",
        show_size(windows)
    ))
}

/// What an index holds besides entries, or why it does not.
fn holds(report: &Report<'_>) -> String {
    if report.chunk_digests == 0 {
        return "no digests; without --no-digests and from a file, or with --full, everything is read".to_owned();
    }
    let mut holds = format!("digests of {} chunks", show_count(report.chunk_digests));
    for (has, what) in [
        (report.payload_digests, ", of every file"),
        (report.content_pieces, ", of pieces of long files"),
        (report.header_bytes_kept, ", and all that the exact tar takes"),
    ] {
        if has {
            holds.push_str(what);
        }
    }
    holds
}

/// What `index verify --json` says.
#[derive(Debug, Serialize)]
struct Verdict<'a> {
    index: String,
    source: String,
    equal: bool,
    identical: bool,
    difference: Option<String>,
    chunk_digests: u64,
    diff_id: Option<&'a Digest>,
}

/// Makes the index of a layer again and compares.
fn verify(args: &VerifyArgs, session: Session) -> anyhow::Result<()> {
    let options = OpenOptions::default();
    let name = without_secrets(&args.index);
    let index = Index::open(open::load_index(&args.index, &options.http)?).with_context(|| name.clone())?;
    index.verify().with_context(|| name.clone())?;
    if index.is_of_contents() {
        return Err(anyhow::Error::new(IndexError::from(IndexFault::MadeUp)).context(name));
    }
    let mut bar = Bar::new(session.talk);
    let contents = contents_of(&index);
    let identity = index.identity();
    let prepared = if contents == Contents::ENTRIES && identity.coding == Coding::Plain {
        open::prepare(&args.source, &options, &mut bar)?.into_only()?
    } else {
        let recording = Recording {
            contents,
            spacing: Some(identity.spacing),
            size: SizeLimit::at_least(index.summary().tar_bytes),
        };
        open::record(&args.source, &recording, &options, &mut bar)?
    };
    drop(bar);
    let difference = first_difference(&index, &prepared.index)?;
    let verdict = Verdict {
        index: name.clone(),
        source: prepared.layer.blob.name.clone(),
        equal: difference.is_none(),
        identical: index.as_bytes() == prepared.index.as_bytes(),
        difference: difference.as_ref().map(ToString::to_string),
        chunk_digests: index.chunk_digests().map_or(0, crate::index::ChunkDigests::len),
        diff_id: prepared.index.identity().diff_id.as_ref(),
    };
    if args.json {
        println(serde_json::to_string_pretty(&verdict)?)?;
    }
    if let Some(difference) = difference {
        bail!("{name} is not the index of {}: {difference}", verdict.source);
    }
    if !args.json && !session.talk.quiet {
        let how = match (verdict.identical, verdict.chunk_digests > 0) {
            (true, true) => "made again, it is the same to the last bit",
            (true, false) => {
                "made again from the headers, it is the same to the last bit; it has no digests of content"
            }
            (false, true) => "made again, it holds the same, compressed otherwise or by another version",
            (false, false) => "what it holds is what the headers say; it has no digests of content",
        };
        println(format!("{name} is the index of {}: {how}", verdict.source))?;
    }
    Ok(())
}

/// What an index holds, so that the same can be made again.
fn contents_of(index: &Index<Vec<u8>>) -> Contents {
    Contents {
        chunk_digests: index.chunk_digests().is_some(),
        diff_id: index.identity().diff_id.is_some(),
        payload_digests: index.cold().has(ColdPart::PayloadDigests),
        headers: index.cold().has(ColdPart::Headers),
        content_pieces: index.cold().has(ColdPart::ContentPieces),
    }
}
