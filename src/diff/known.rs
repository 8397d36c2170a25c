//! What an index says of its layer's bytes.

use sha2::{Digest as _, Sha256};

use super::{LayerFacts, PayloadDigests};
use crate::digest::hexadecimal;
use crate::index::{ColdPart, Index, IndexError, Payloads};
use crate::units::TarRange;

/// What identifies a layer, and its files' payload digests, read from an index. Takes 48 bytes a file where there are
/// digests.
#[derive(Clone, Debug, Default)]
pub struct LayerKnowledge {
    identities: Vec<String>,
    /// Sorted by place. None when the index has no digests here.
    payloads: Option<Vec<(TarRange, [u8; 32])>>,
}

impl LayerKnowledge {
    /// Reads what an index knows. Payload digests are in its cold part: without that there are none.
    ///
    /// # Errors
    /// A damaged index.
    pub fn of<B: AsRef<[u8]>>(index: &Index<B>) -> Result<Self, IndexError> {
        let identity = index.identity();
        let mut identities: Vec<String> = identity
            .diff_id
            .iter()
            .chain(&identity.blob_digest)
            .map(ToString::to_string)
            .collect();
        if let Some(chunks) = index.chunk_digests() {
            let mut all = Sha256::new();
            all.update(chunks.tar_len().to_le_bytes());
            (0..chunks.len())
                .filter_map(|chunk| chunks.digest(chunk))
                .for_each(|digest| all.update(digest));
            identities.push(format!("chunks:{}", hexadecimal(&all.finalize())));
        }
        let mut known = Self {
            identities,
            payloads: None,
        };
        if index.is_whole() && index.cold().has(ColdPart::PayloadDigests) {
            known.learn(&Payloads::with_digests(index)?);
        }
        Ok(known)
    }

    /// Takes in payload digests, as far as they are here.
    pub fn learn(&mut self, payloads: &Payloads) {
        self.payloads = Some(by_place(payloads)).filter(|known| !known.is_empty());
    }

    /// Adds what is known from elsewhere (a manifest, a configuration): a digest of the blob or the tar.
    pub fn identify(&mut self, digest: impl Into<String>) {
        self.identities.push(digest.into());
    }

    /// The same for [`compare`](super::compare()).
    #[must_use]
    pub fn facts(&self) -> LayerFacts<'_> {
        LayerFacts {
            identities: &self.identities,
            payloads: self.payloads.is_some().then_some(self),
        }
    }
}

impl PayloadDigests for LayerKnowledge {
    fn payload_digest(&self, range: TarRange) -> Option<[u8; 32]> {
        let payloads = self.payloads.as_ref()?;
        let at = payloads
            .binary_search_by_key(&range.start, |(known, _)| known.start)
            .ok()?;
        (payloads[at].0 == range).then_some(payloads[at].1)
    }
}

/// Ranges and digests of all payloads, sorted by place.
fn by_place(payloads: &Payloads) -> Vec<(TarRange, [u8; 32])> {
    let ranges = payloads.ranges().iter().enumerate();
    let mut known: Vec<_> = ranges
        .filter_map(|(number, range)| Some((*range, payloads.digest(number)?)))
        .collect();
    known.sort_unstable_by_key(|(range, _)| range.start);
    known
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diff::{Difference, Side, Totals, compare};
    use crate::index::LayerIdentity;
    use crate::index::build::{Contents, Recorder};
    use crate::tree::{Tree, TreeBuilder};
    use crate::units::TarOffset;

    fn tar(files: &[(&str, &str)]) -> Vec<u8> {
        let mut tar = tar::Builder::new(Vec::new());
        for (name, content) in files {
            let mut header = tar::Header::new_gnu();
            header.set_size(u64::try_from(content.len()).unwrap());
            header.set_mode(0o644);
            tar.append_data(&mut header, name, content.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap()
    }

    fn indexed(tar: &[u8], contents: Contents) -> (Tree, LayerKnowledge) {
        let mut recorder = Recorder::new(contents);
        let mut builder = TreeBuilder::new();
        recorder.feed_into(tar, &mut builder).unwrap();
        let made = recorder.finish().unwrap();
        let index = Index::open(made.into_index(LayerIdentity::default())).unwrap();
        (builder.finish(), LayerKnowledge::of(&index).unwrap())
    }

    fn told(a: &(Tree, LayerKnowledge), b: &(Tree, LayerKnowledge)) -> (Vec<String>, Totals) {
        let (known_a, known_b) = ([a.1.facts()], [b.1.facts()]);
        let side = |tree, layers| Side { tree, layers };
        let mut lines = Vec::new();
        let totals = compare::<()>(side(&a.0, &known_a), side(&b.0, &known_b), &mut |path, found| {
            if let Difference::Changed { aspects, .. } = found {
                lines.push(format!("{} {aspects:?}", String::from_utf8_lossy(path)));
            }
            Ok(())
        });
        (lines, totals.unwrap())
    }

    #[test]
    fn whole_indexes_tell_equal_content_from_other() {
        let old = tar(&[("a", "same"), ("b", "this"), ("c", "")]);
        let new = tar(&[("0", "shifts"), ("a", "same"), ("b", "that"), ("c", ""), ("d", "same")]);
        let whole = |tar: &[u8]| indexed(tar, Contents::FULL);
        let (lines, totals) = told(&whole(&old), &whole(&new));
        assert_eq!(lines, ["b [Content]"]);
        assert_eq!((totals.payload_bytes, totals.fetch_bytes), (6 + 4 + 4 + 4, 6 + 4));
        let (_, known) = whole(&new);
        assert_eq!(known.payload_digest(TarRange::new(TarOffset(1), 4)), None);
    }

    #[test]
    fn equal_chunks_are_equal_layers() {
        let same = tar(&[("a", "same"), ("b", "this")]);
        let contents = Contents::CHECKED;
        let (lines, totals) = told(&indexed(&same, contents), &indexed(&same, contents));
        assert_eq!((lines.len(), totals.fetch_bytes), (0, 0));
        let other = tar(&[("a", "some"), ("b", "this")]);
        let (lines, totals) = told(&indexed(&same, contents), &indexed(&other, contents));
        assert_eq!((lines.len(), totals.uncertain, totals.fetch_bytes), (2, 2, 8));
    }
}
