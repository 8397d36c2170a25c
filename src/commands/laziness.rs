//! Whether a mount was lazy and what it has cost, for people and programs. In: what preparing the layers downloaded, and what
//! was fetched since. Out: two sentences and the same as JSON. Pure.

use serde::Serialize;

use crate::fetch::{BytesTrust, KnownBy, LayerCost, PrepareCost};
use crate::quantity::show_size;

/// Whether only what is read has to come, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Laziness {
    /// None: all layers are files of this machine, of which nothing has to come.
    pub(super) lazy: Option<bool>,
    /// In words.
    pub(super) why: String,
}

/// What was downloaded: bytes of HTTP bodies as they travel, which of compressed layers are compressed ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Downloaded {
    /// Everything, in bytes.
    pub(super) bytes: u64,
    /// What downloading all layers whole takes.
    pub(super) of_bytes: u64,
    /// Before the device was there.
    pub(super) to_mount: ToMount,
    /// By the device's fetcher.
    pub(super) since: u64,
}

/// What was downloaded before the device was there, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct ToMount {
    /// All of it.
    pub(super) bytes: u64,
    /// Manifests, configurations, lists, tokens.
    pub(super) manifests: u64,
    /// Indexes.
    pub(super) indexes: u64,
    /// Of the layers.
    pub(super) layers: u64,
}

impl Laziness {
    /// Of what was named `source`; none where nothing is known of the layers.
    pub(super) fn of(cost: &PrepareCost, source: &str) -> Option<Self> {
        let count = cost.layers.len();
        if count == 0 {
            return None;
        }
        let remote = cost.remote();
        let total = remote.clone().count();
        if total == 0 {
            let why = match count {
                1 => "the layer is a file of this machine".to_owned(),
                _ => format!("all {count} layers are files of this machine"),
            };
            return Some(Self { lazy: None, why });
        }
        let whole = remote.clone().filter(|layer| layer.known_by == KnownBy::WholeDownload);
        let streamed = remote.clone().filter(|layer| !layer.ranges).count();
        let (lazy, why) = if streamed > 0 {
            (false, without_ranges(streamed, total))
        } else if whole.clone().count() > 0 {
            (false, without_index(whole, total, source))
        } else {
            (true, known(&remote, total))
        };
        Some(Self { lazy: Some(lazy), why })
    }

    /// `yes: ...`, `no: ...`
    pub(super) fn sentence(&self) -> String {
        let word = match self.lazy {
            Some(true) => "yes",
            Some(false) => "no",
            None => "not needed",
        };
        format!("{word}: {}", self.why)
    }
}

/// `4 of 4 layers`, or `the layer` if it is the only one.
fn of_layers(count: usize, total: usize) -> String {
    match total {
        1 => "the layer".to_owned(),
        _ => format!("{count} of {total} layers"),
    }
}

fn without_ranges(count: usize, total: usize) -> String {
    format!(
        "the server does not answer ranges, so {} can only be downloaded from beginning to end",
        of_layers(count, total)
    )
}

fn without_index<'a>(whole: impl Iterator<Item = &'a LayerCost> + Clone, total: usize, source: &str) -> String {
    let bytes = whole.clone().map(|layer| layer.downloaded).fold(0, u64::saturating_add);
    let unbelieved = whole.clone().filter(|layer| layer.unbelieved_index).count();
    let missing = if unbelieved == 0 {
        format!("no index for {}", of_layers(whole.count(), total))
    } else {
        format!("no index that is believed for {}", of_layers(whole.count(), total))
    };
    let advice = if unbelieved > 0 {
        "--trust or --trust-key believes those beside the image".to_owned()
    } else if source.starts_with("docker://") {
        format!("`tarblk index push {source}` and --trust or --trust-key avoid that")
    } else {
        "an index made by `tarblk index` and named by --index avoids that".to_owned()
    };
    format!("{missing}, so {} were downloaded to mount; {advice}", show_size(bytes))
}

/// How it became known what the layers hold.
fn known<'a>(layers: &(impl Iterator<Item = &'a LayerCost> + Clone), total: usize) -> String {
    let phrase = |kind: KnownBy| {
        let count = layers.clone().filter(|layer| layer.known_by == kind).count();
        let of = match (count, total) {
            (0, _) => return None,
            (_, 1) => "of the layer".to_owned(),
            (count, total) if count == total => format!("of all {total} layers"),
            (count, total) => format!("of {count} of {total} layers"),
        };
        let (one, index, were) = match total {
            1 => (true, "the index", "was"),
            _ => (false, "indexes", "were"),
        };
        Some(match kind {
            KnownBy::PublishedIndex => format!("{index} {of} {were} published beside the image"),
            KnownBy::CachedIndex => format!("{index} {of} {were} kept here"),
            KnownBy::NamedIndex => format!("{index} {of} {were} named"),
            KnownBy::TableOfContents if one => "the layer's own table of contents serves as its index".to_owned(),
            KnownBy::TableOfContents => format!("tables of contents {of} serve as indexes"),
            KnownBy::Headers => format!("headers {of} were read, and what lies between them passed over"),
            KnownBy::LocalFile | KnownBy::WholeDownload => return None,
        })
    };
    let kinds = [
        KnownBy::PublishedIndex,
        KnownBy::CachedIndex,
        KnownBy::NamedIndex,
        KnownBy::TableOfContents,
        KnownBy::Headers,
    ];
    let phrases: Vec<String> = kinds.into_iter().filter_map(phrase).collect();
    phrases.join("; ")
}

impl Downloaded {
    /// What preparing cost, and what a fetcher brought since.
    pub(super) fn of(cost: &PrepareCost, since: u64) -> Self {
        Self {
            bytes: cost.downloaded().saturating_add(since),
            of_bytes: cost.remote_bytes(),
            to_mount: ToMount {
                bytes: cost.downloaded(),
                manifests: cost.bytes_manifests,
                indexes: cost.bytes_indexes,
                layers: cost.bytes_layers,
            },
            since,
        }
    }

    /// `31.4 MiB of 95.7 MiB (33%)`
    fn share(&self) -> String {
        let (bytes, of) = (show_size(self.bytes), show_size(self.of_bytes));
        let percent = u128::from(self.bytes) * 100 + u128::from(self.of_bytes) / 2;
        match percent.checked_div(u128::from(self.of_bytes)) {
            Some(percent) => format!("{bytes} of {of} ({percent}%)"),
            None => bytes,
        }
    }

    /// `31.4 MiB of 95.7 MiB (33%): 307 KiB to mount, 31.1 MiB since`
    pub(super) fn sentence(&self) -> String {
        let (before, since) = (show_size(self.to_mount.bytes), show_size(self.since));
        format!("{}: {before} to mount, {since} since", self.share())
    }
}

/// One line for the person who has just mounted something: how lazily, unless all of it was here, and whether nothing vouches for its
/// bytes.
pub(super) fn line_of_mount(cost: &PrepareCost, source: &str) -> Option<String> {
    let laziness = Laziness::of(cost, source);
    let downloaded = Downloaded::of(cost, 0);
    let lazy = laziness.and_then(|laziness| match laziness.lazy {
        None => None,
        // Says how much it was already.
        Some(false) => Some(format!("lazy {}", laziness.sentence())),
        Some(true) => Some(format!(
            "lazy {}; downloaded {} to mount",
            laziness.sentence(),
            downloaded.share()
        )),
    });
    let said: Vec<String> = lazy.into_iter().chain(unchecked(cost)).collect();
    (!said.is_empty()).then(|| said.join("; "))
}

/// That nothing vouches for the bytes of some layers, and what would.
fn unchecked(cost: &PrepareCost) -> Option<String> {
    let is_unchecked = |layer: &&LayerCost| layer.trust.is_some_and(|trust| trust.bytes == BytesTrust::Unchecked);
    match cost.layers.iter().filter(is_unchecked).count() {
        0 => None,
        count if count == cost.layers.len() => {
            Some("unchecked: without a digest or an index made of it what its server sends is believed".to_owned())
        }
        count => Some(format!(
            "unchecked: what the server sends of {count} of {} layers is believed, because nothing has their digests",
            cost.layers.len()
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fetch::{IndexTrust, LayerTrust};

    fn layer(known_by: KnownBy, downloaded: u64) -> LayerCost {
        LayerCost {
            blob_bytes: 10 << 20,
            downloaded,
            known_by,
            ranges: true,
            unbelieved_index: false,
            trust: None,
        }
    }

    #[test]
    fn what_nothing_vouches_for_is_said() {
        let of = |bytes: &[BytesTrust]| {
            let layers = bytes.iter().map(|bytes| LayerCost {
                trust: Some(LayerTrust {
                    index: IndexTrust::Headers,
                    bytes: *bytes,
                }),
                ..layer(KnownBy::Headers, 0)
            });
            let cost = PrepareCost {
                layers: layers.collect(),
                ..PrepareCost::default()
            };
            line_of_mount(&cost, "http://host/x.tar").unwrap_or_default()
        };
        for well in [BytesTrust::EachChunk, BytesTrust::Whole, BytesTrust::File] {
            assert!(!of(&[well]).contains("unchecked"));
        }
        assert!(of(&[BytesTrust::Unchecked]).contains("; unchecked: without a digest"));
        let some = of(&[BytesTrust::EachChunk, BytesTrust::Unchecked]);
        assert!(some.contains("1 of 2 layers"), "{some}");
    }

    fn said(layers: &[LayerCost]) -> String {
        let cost = PrepareCost {
            layers: layers.to_vec(),
            ..PrepareCost::default()
        };
        Laziness::of(&cost, "docker://host/app:1").map_or_else(String::new, |laziness| laziness.sentence())
    }

    #[test]
    fn why_it_was_lazy_or_not() {
        let published = layer(KnownBy::PublishedIndex, 0);
        let whole = layer(KnownBy::WholeDownload, 10 << 20);
        let local = layer(KnownBy::LocalFile, 0);
        let streamed = LayerCost {
            ranges: false,
            ..layer(KnownBy::NamedIndex, 0)
        };
        for (layers, sentence) in [
            (&[][..], ""),
            (
                &[published; 4],
                "yes: indexes of all 4 layers were published beside the image",
            ),
            (
                &[published],
                "yes: the index of the layer was published beside the image",
            ),
            (
                &[published, layer(KnownBy::CachedIndex, 0), published],
                "yes: indexes of 2 of 3 layers were published beside the image; indexes of 1 of 3 layers were kept here",
            ),
            (
                &[layer(KnownBy::TableOfContents, 9)],
                "yes: the layer's own table of contents serves as its index",
            ),
            (
                &[layer(KnownBy::Headers, 9); 2],
                "yes: headers of all 2 layers were read, and what lies between them passed over",
            ),
            (
                &[whole, published],
                "no: no index for 1 of 2 layers, so 10 MiB were downloaded to mount; \
                 `tarblk index push docker://host/app:1` and --trust or --trust-key avoid that",
            ),
            (
                &[streamed],
                "no: the server does not answer ranges, so the layer can only be downloaded from beginning to end",
            ),
            (&[local], "not needed: the layer is a file of this machine"),
            (&[local; 2], "not needed: all 2 layers are files of this machine"),
        ] {
            assert_eq!(said(layers), sentence);
        }
    }

    #[test]
    fn the_line_of_mount_says_what_it_took() {
        let mut cost = PrepareCost {
            bytes_manifests: 1 << 10,
            bytes_indexes: 1 << 20,
            bytes_layers: 0,
            layers: vec![layer(KnownBy::PublishedIndex, 0)],
        };
        assert_eq!(
            line_of_mount(&cost, "docker://host/app:1").unwrap(),
            "lazy yes: the index of the layer was published beside the image; downloaded 1 MiB of 10 MiB (10%) to mount"
        );
        let downloaded = Downloaded::of(&cost, 2 << 20);
        assert_eq!(downloaded.bytes, (3 << 20) + (1 << 10));
        assert_eq!(
            downloaded.sentence(),
            "3 MiB of 10 MiB (30%): 1 MiB to mount, 2 MiB since"
        );
        cost.layers = vec![layer(KnownBy::WholeDownload, 10 << 20)];
        assert_eq!(
            line_of_mount(&cost, "http://host/x.tar").unwrap(),
            "lazy no: no index for the layer, so 10 MiB were downloaded to mount; an index made by `tarblk index` and named by \
             --index avoids that"
        );
        cost.layers = vec![layer(KnownBy::LocalFile, 0)];
        assert_eq!(line_of_mount(&cost, "x.tar"), None);
    }
}
