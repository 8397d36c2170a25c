//! What a client says of a layer that it wants. In: the labels of `Prepare`. Out: which layer of which image, as far as they say it.
//!
//! Two families: `containerd.io/snapshot/cri.*` (the CRI plug-in, the transfer service, Docker, nerdctl) and
//! `containerd.io/snapshot/remote/stargz.*` (`ctr-remote`). Either comes beside `containerd.io/snapshot.ref`, which says what is
//! wanted: a chain ID. What both say of the image is a client's word; whoever claims a layer compares it with the image.

use super::messages::Labels;
use crate::digest::Digest;

/// The chain ID of the snapshot that is wanted.
pub(super) const SNAPSHOT_REF: &str = "containerd.io/snapshot.ref";

const CRI_REFERENCE: &str = "containerd.io/snapshot/cri.image-ref";
const CRI_MANIFEST: &str = "containerd.io/snapshot/cri.manifest-digest";
const CRI_LAYER: &str = "containerd.io/snapshot/cri.layer-digest";
const STARGZ_REFERENCE: &str = "containerd.io/snapshot/remote/stargz.reference";
const STARGZ_LAYER: &str = "containerd.io/snapshot/remote/stargz.digest";

/// A layer that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WantedLayer {
    /// What the snapshot is to be called: the chain ID of the layer and all below it.
    pub(super) chain: Digest,
    /// Of which image; none of a client that says nothing of images.
    pub(super) image: Option<WantedImage>,
}

/// The image of a layer that is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct WantedImage {
    /// Its name as it was pulled.
    pub(super) reference: String,
    /// Its manifest, not the index that this was chosen from; none of clients that do not say.
    pub(super) manifest: Option<Digest>,
    /// The layer's blob.
    pub(super) layer: Digest,
    /// containerd's namespace in which it is pulled; none of clients that do not say.
    pub(super) namespace: Option<String>,
}

impl WantedLayer {
    /// Understands labels, which come with a call for `namespace`; none if no layer is wanted.
    #[must_use]
    pub(super) fn of(labels: &Labels, namespace: Option<&str>) -> Option<Self> {
        let digest = |key: &str| labels.get(key)?.parse::<Digest>().ok();
        let chain = digest(SNAPSHOT_REF)?;
        let image = |reference: &str, layer: &str, manifest: Option<&str>| {
            Some(WantedImage {
                reference: labels.get(reference).filter(|text| !text.is_empty())?.clone(),
                layer: digest(layer)?,
                manifest: manifest.and_then(digest),
                namespace: namespace.map(str::to_owned),
            })
        };
        Some(Self {
            chain,
            image: image(CRI_REFERENCE, CRI_LAYER, Some(CRI_MANIFEST))
                .or_else(|| image(STARGZ_REFERENCE, STARGZ_LAYER, None)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::digest::Algorithm;

    #[test]
    fn both_families_are_understood() {
        let [chain, layer, manifest] = [b"chain", b"layer", b"manif"].map(|text| Digest::of(Algorithm::Sha256, text));
        let labels = |more: &[(&str, &str)]| {
            more.iter()
                .chain(&[(SNAPSHOT_REF, chain.to_string().as_str()), ("other", "x")])
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect::<Labels>()
        };
        let (layer_text, manifest_text) = (layer.to_string(), manifest.to_string());
        let cri = [
            (CRI_REFERENCE, "host/a:b"),
            (CRI_LAYER, layer_text.as_str()),
            (CRI_MANIFEST, manifest_text.as_str()),
        ];
        let wanted = |manifest| WantedLayer {
            chain: chain.clone(),
            image: Some(WantedImage {
                reference: "host/a:b".to_owned(),
                manifest,
                layer: layer.clone(),
                namespace: Some("n".to_owned()),
            }),
        };
        assert_eq!(
            WantedLayer::of(&labels(&cri), Some("n")),
            Some(wanted(Some(manifest.clone())))
        );
        let stargz = [(STARGZ_REFERENCE, "host/a:b"), (STARGZ_LAYER, layer_text.as_str())];
        assert_eq!(WantedLayer::of(&labels(&stargz), Some("n")), Some(wanted(None)));
        // Half of it is nothing; nonsense neither.
        for bad in [
            &cri[..1],
            &cri[1..],
            &[(CRI_REFERENCE, ""), cri[1]],
            &[cri[0], (CRI_LAYER, "sha256:0")],
        ] {
            assert_eq!(WantedLayer::of(&labels(bad), None).unwrap().image, None);
        }
        assert_eq!(WantedLayer::of(&Labels::new(), None), None);
        assert_eq!(
            WantedLayer::of(&Labels::from([(SNAPSHOT_REF.to_owned(), "x".to_owned())]), None),
            None
        );
    }
}
