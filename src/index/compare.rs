//! What an index says, compared with what another one of the same layer says. In: two indexes. Out: the first difference, named.

use std::fmt;

use super::cold::ColdPart;
use super::entry::Entry;
use super::error::{IndexError, Quoted};
use super::format;
use super::identity::LayerIdentity;
use super::len_u64;
use super::parser::{EndOfArchive, Parser};
use super::reader::{Entries, Index};
use super::sink::EntrySink;
use super::summary::Summary;
use crate::digest::{Digest, hexadecimal};
use crate::units::{CHUNK_BYTES, TarOffset};

/// Where an index is not what its layer makes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Which part of the index, and where in it.
    pub at: String,
    /// What the index says there.
    pub index: String,
    /// What the layer says.
    pub layer: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: {} in the index, {} in the layer",
            self.at, self.index, self.layer
        )
    }
}

/// Compares the entries of an index with those that a tar's headers make, while the tar passes from its beginning to its end. Payload
/// need not be brought.
#[derive(Debug)]
pub struct EntryCheck<'i> {
    parser: Parser,
    sink: EntryComparison<'i>,
    end: EndOfArchive,
    tar_len: u64,
}

/// Takes the entries of a layer and compares each with the next one of an index.
#[derive(Debug)]
struct EntryComparison<'i> {
    entries: Entries<'i>,
    /// How many have been compared.
    number: u64,
    /// Whether what is not said of images is as bad as what is said wrong.
    strict: bool,
    difference: Option<Difference>,
}

impl EntrySink for EntryComparison<'_> {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        if self.difference.is_some() {
            return Ok(());
        }
        self.difference = match self.entries.next_entry()? {
            Some(said) if says_the_same(said, entry, self.strict) => None,
            Some(said) => Some(of_entry(self.number, said, entry)),
            None => Some(one_has_more(self.number, None, Some(entry))),
        };
        self.number += 1;
        Ok(())
    }
}

/// Whether an index says of an entry what its headers say. An old one says nothing of what is different in images, which is no lie
/// unless `strict`.
pub(crate) fn says_the_same(said: &Entry, found: &Entry, strict: bool) -> bool {
    if !strict && said.in_image.is_none() && found.in_image.is_some() {
        let mut found = found.clone();
        found.in_image = None;
        return *said == found;
    }
    said == found
}

impl<'i> EntryCheck<'i> {
    /// At the tar's beginning. An index that says nothing of what is different in images differs from a layer that has something of
    /// that kind only if `strict`.
    ///
    /// # Errors
    /// [`IndexError::Index`] for an index whose entries cannot be read.
    pub fn new<B: AsRef<[u8]>>(index: &'i Index<B>, strict: bool) -> Result<Self, IndexError> {
        Ok(Self {
            parser: Parser::new(),
            sink: EntryComparison {
                entries: index.entries()?,
                number: 0,
                strict,
                difference: None,
            },
            end: index.end(),
            tar_len: index.tar_len(),
        })
    }

    /// Where the next byte of the tar lies that is needed; none when no more are.
    #[must_use]
    pub fn wants(&self) -> Option<TarOffset> {
        let wanted = self.parser.wants().filter(|wanted| wanted.0 < self.tar_len);
        wanted.filter(|_| self.sink.difference.is_none())
    }

    /// Takes the tar's bytes from `at` on, which must not lie behind what is wanted.
    ///
    /// # Errors
    /// What is wrong with the tar; [`IndexError::Index`] for an index whose entries cannot be read.
    pub fn feed(&mut self, at: TarOffset, bytes: &[u8]) -> Result<(), IndexError> {
        if self.sink.difference.is_some() {
            return Ok(());
        }
        self.parser.feed(at, bytes, &mut self.sink)
    }

    /// The first difference, when all of the tar has passed.
    ///
    /// # Errors
    /// As [`feed`](Self::feed).
    pub fn finish(mut self) -> Result<Option<Difference>, IndexError> {
        if let Some(difference) = self.sink.difference {
            return Ok(Some(difference));
        }
        let end = self.parser.finish(TarOffset(self.tar_len))?;
        if let Some(more) = self.sink.entries.next_entry()? {
            return Ok(Some(one_has_more(self.sink.number, Some(more), None)));
        }
        Ok((end != self.end).then(|| Difference {
            at: "the tar's end".to_owned(),
            index: format!("{:?}", self.end),
            layer: format!("{end:?}"),
        }))
    }
}

/// One of the two has an entry where the other ends.
fn one_has_more(number: u64, index: Option<&Entry>, layer: Option<&Entry>) -> Difference {
    let shown = |entry: Option<&Entry>| entry.map_or_else(|| "none".to_owned(), shown_name);
    Difference {
        at: format!("entry {number}"),
        index: shown(index),
        layer: shown(layer),
    }
}

/// What an index claims, compared with one that was just made from the layer and has at least the same parts. What the index
/// does not claim (digests that it does not have) is no difference. `None` when everything is the same.
///
/// # Errors
/// [`IndexError::Index`] when one of the two cannot be read.
pub fn first_difference<A: AsRef<[u8]>, B: AsRef<[u8]>>(
    index: &Index<A>,
    layer: &Index<B>,
) -> Result<Option<Difference>, IndexError> {
    if let Some(difference) = of_blob(index.identity(), layer.identity()) {
        return Ok(Some(difference));
    }
    if let Some(difference) = of_entries(index, layer)? {
        return Ok(Some(difference));
    }
    if let Some(difference) = of_counts(index.summary(), layer.summary())
        .or_else(|| of_chunks(index, layer))
        .or_else(|| of_spans(index, layer))
    {
        return Ok(Some(difference));
    }
    for part in ColdPart::ALL {
        if index.cold().has(part)
            && let Some(difference) = of_part(part, index, layer)?
        {
            return Ok(Some(difference));
        }
    }
    // These come last, because all that they say is that something differs.
    Ok(of_digests(index.identity(), layer.identity()))
}

fn differ<T: PartialEq + fmt::Display>(at: impl FnOnce() -> String, index: &T, layer: &T) -> Option<Difference> {
    (index != layer).then(|| Difference {
        at: at(),
        index: index.to_string(),
        layer: layer.to_string(),
    })
}

fn of_blob(index: &LayerIdentity, layer: &LayerIdentity) -> Option<Difference> {
    differ(|| "the blob's compression".to_owned(), &index.coding, &layer.coding)
        .or_else(|| differ(|| "the blob's length".to_owned(), &index.blob_len, &layer.blob_len))
}

fn of_digests(index: &LayerIdentity, layer: &LayerIdentity) -> Option<Difference> {
    let digest = |name: &str, index: &Option<Digest>, layer: &Option<Digest>| {
        let (index, layer) = (index.as_ref()?, layer.as_ref()?);
        // One of another algorithm cannot be compared.
        let comparable = index.algorithm() == layer.algorithm();
        comparable.then(|| differ(|| name.to_owned(), index, layer)).flatten()
    };
    digest("the blob's digest", &index.blob_digest, &layer.blob_digest)
        .or_else(|| digest("the tar's digest", &index.diff_id, &layer.diff_id))
}

fn of_counts(index: &Summary, layer: &Summary) -> Option<Difference> {
    let marked = |summary: &Summary| {
        match (summary.end_marked, summary.lone_zero_block) {
            (true, _) => "there",
            (false, true) => "a lone zero block",
            (false, false) => "missing",
        }
        .to_owned()
    };
    differ(|| "the tar's length".to_owned(), &index.tar_bytes, &layer.tar_bytes)
        .or_else(|| differ(|| "the tar's end mark".to_owned(), &marked(index), &marked(layer)))
        .or_else(|| {
            (index != layer).then(|| Difference {
                at: "the summary".to_owned(),
                index: format!("{index:?}"),
                layer: format!("{layer:?}"),
            })
        })
}

fn of_entries<A: AsRef<[u8]>, B: AsRef<[u8]>>(
    index: &Index<A>,
    layer: &Index<B>,
) -> Result<Option<Difference>, IndexError> {
    let (mut mine, mut theirs) = (index.entries()?, layer.entries()?);
    for number in 0_u64.. {
        match (mine.next_entry()?, theirs.next_entry()?) {
            (None, None) => break,
            (Some(mine), Some(theirs)) if mine == theirs => {}
            (Some(mine), Some(theirs)) => return Ok(Some(of_entry(number, mine, theirs))),
            (mine, theirs) => return Ok(Some(one_has_more(number, mine, theirs))),
        }
    }
    Ok(None)
}

fn shown_name(entry: &Entry) -> String {
    Quoted(&entry.path).to_string()
}

/// Two entries that are not the same: the first thing that differs.
fn of_entry(number: u64, index: &Entry, layer: &Entry) -> Difference {
    let at = |what: &str| format!("entry {number} ({}), its {what}", Quoted(&layer.path));
    let debug = |what: &str, index: &dyn fmt::Debug, layer: &dyn fmt::Debug| {
        differ(|| at(what), &format!("{index:?}"), &format!("{layer:?}"))
    };
    differ(
        || format!("entry {number}, its name"),
        &shown_name(index),
        &shown_name(layer),
    )
    .or_else(|| differ(|| at("kind"), &index.kind, &layer.kind))
    .or_else(|| {
        differ(
            || at("mode"),
            &format!("{:o}", index.mode),
            &format!("{:o}", layer.mode),
        )
    })
    .or_else(|| differ(|| at("uid"), &index.uid, &layer.uid))
    .or_else(|| differ(|| at("gid"), &index.gid, &layer.gid))
    .or_else(|| debug("time", &index.mtime, &layer.mtime))
    .or_else(|| differ(|| at("size"), &index.size, &layer.size))
    .or_else(|| {
        differ(
            || at("target"),
            &Quoted(&index.link).to_string(),
            &Quoted(&layer.link).to_string(),
        )
    })
    .or_else(|| differ(|| at("headers' place"), &index.headers, &layer.headers))
    .or_else(|| debug("attributes", &index.xattrs, &layer.xattrs))
    .or_else(|| debug("segments", &index.segments, &layer.segments))
    .or_else(|| debug("reading in images", &index.in_image, &layer.in_image))
    .unwrap_or_else(|| Difference {
        at: at("device numbers"),
        index: format!("{}/{}", index.device_major, index.device_minor),
        layer: format!("{}/{}", layer.device_major, layer.device_minor),
    })
}

fn of_chunks<A: AsRef<[u8]>, B: AsRef<[u8]>>(index: &Index<A>, layer: &Index<B>) -> Option<Difference> {
    let (mine, theirs) = (index.chunk_digests()?, layer.chunk_digests()?);
    let shown = |digest: Option<&[u8; 20]>| digest.map_or_else(|| "none".to_owned(), |digest| hexadecimal(digest));
    (0..mine.len().max(theirs.len())).find_map(|number| {
        let at = || {
            format!(
                "the digest of chunk {number} (byte {} of the tar)",
                number * CHUNK_BYTES
            )
        };
        (mine.digest(number) != theirs.digest(number)).then(|| Difference {
            at: at(),
            index: shown(mine.digest(number)),
            layer: shown(theirs.digest(number)),
        })
    })
}

fn of_spans<A: AsRef<[u8]>, B: AsRef<[u8]>>(index: &Index<A>, layer: &Index<B>) -> Option<Difference> {
    let claimed = index.spans()?;
    let Some(theirs) = layer.spans() else {
        return Some(Difference {
            at: "the span table".to_owned(),
            index: "there".to_owned(),
            layer: "none".to_owned(),
        });
    };
    // One that tells no blocks claims nothing of them.
    let (mine, theirs) = if claimed.has_blocks() {
        (claimed.clone(), theirs.clone())
    } else {
        (claimed.without_blocks(), theirs.without_blocks())
    };
    if mine == theirs {
        return None;
    }
    // What is written in a table besides its spans was compared before.
    let number = (0..mine.len().max(theirs.len())).find(|number| mine.span(*number) != theirs.span(*number));
    let number = number.unwrap_or(mine.len());
    Some(Difference {
        at: format!("the span table, span {number} of {}", theirs.len()),
        index: format!("{:?}", mine.span(number)),
        layer: format!("{:?}", theirs.span(number)),
    })
}

/// The first byte that is another one.
fn first_byte(name: &str, before: u64, index: &[u8], layer: &[u8]) -> Option<Difference> {
    if index == layer {
        return None;
    }
    let same = index.iter().zip(layer).take_while(|(a, b)| a == b).count();
    let shown = |bytes: &[u8]| {
        bytes
            .get(same)
            .map_or_else(|| "its end".to_owned(), |byte| format!("{byte:#04x}"))
    };
    Some(Difference {
        at: format!("{name}, byte {}", before.saturating_add(len_u64(same))),
        index: shown(index),
        layer: shown(layer),
    })
}

fn of_part<A: AsRef<[u8]>, B: AsRef<[u8]>>(
    part: ColdPart,
    index: &Index<A>,
    layer: &Index<B>,
) -> Result<Option<Difference>, IndexError> {
    let name = format::section_name(part.kind());
    let mut before = 0;
    for number in 0..index.cold().pieces(part).max(layer.cold().pieces(part)) {
        let mine = index.cold_piece(part, number)?.unwrap_or_default();
        let theirs = layer.cold_piece(part, number)?.unwrap_or_default();
        let difference = if matches!(part, ColdPart::Windows | ColdPart::BlockWindows) {
            first_byte(&format!("the window of span {number}"), 0, &mine, &theirs)
        } else {
            first_byte(&format!("the {name}"), before, &mine, &theirs)
        };
        if difference.is_some() {
            return Ok(difference);
        }
        before = before.saturating_add(len_u64(mine.len()));
    }
    Ok(None)
}
