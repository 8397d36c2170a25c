//! Which image of an index is for a machine. In: an index's descriptors, and the platform that is wanted. Out: the one to use, or
//! what there is instead.

use super::manifest::Descriptor;
use super::platform::Platform;
use crate::http::excerpt;

/// The platform that an image is wanted for.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) platform: Platform,
    /// Whether a person named it; else it is this machine's.
    pub(super) insisted: bool,
}

impl Wanted {
    /// The platform that a person named, or else this machine's.
    pub(super) fn of(platform: Option<&Platform>) -> Self {
        Self {
            platform: platform.cloned().unwrap_or_else(Platform::here),
            insisted: platform.is_some(),
        }
    }

    /// The manifest for it among an index's. Where there is none of the kind that is meant by default, one for just this
    /// processor is taken, unless a person said what to take.
    ///
    /// # Errors
    /// That there is none, and what there is.
    pub(super) fn choose<'a>(
        &self,
        manifests: impl IntoIterator<Item = &'a Descriptor, IntoIter: Clone>,
    ) -> Result<&'a Descriptor, String> {
        let manifests = manifests.into_iter();
        let chosen = choose(manifests.clone(), &self.platform);
        if chosen.is_err() && !self.insisted {
            return choose(manifests, &Platform::here_at_best()).or(chosen);
        }
        chosen
    }

    /// Whether an image for `offered` runs on it.
    pub(super) fn can_use(&self, offered: &Platform) -> bool {
        let at_best = || !self.insisted && Platform::here_at_best().distance(offered).is_some();
        offered.is_unsaid() || self.platform.distance(offered).is_some() || at_best()
    }
}

/// The manifest for `wanted` among an index's.
///
/// # Errors
/// That there is none, and what there is.
fn choose<'a>(
    manifests: impl IntoIterator<Item = &'a Descriptor, IntoIter: Clone>,
    wanted: &Platform,
) -> Result<&'a Descriptor, String> {
    let manifests = manifests.into_iter();
    let fitting = manifests.clone().filter_map(|descriptor| {
        let distance = wanted.distance(descriptor.platform.as_ref()?)?;
        Some((distance, descriptor))
    });
    // The first of the best: min_by_key keeps the order of equals.
    if let Some((_, best)) = fitting.min_by_key(|(distance, _)| *distance) {
        return Ok(best);
    }
    // A single manifest of which no platform is said: its configuration says it.
    let nameless = |descriptor: &&Descriptor| {
        let attestation = descriptor.annotations.contains_key("vnd.docker.reference.type");
        let unsaid = descriptor.platform.as_ref().is_none_or(Platform::is_unsaid);
        unsaid && descriptor.artifact_type.is_none() && !attestation
    };
    let mut unsaid = manifests.clone().filter(nameless);
    if let (Some(only), None) = (unsaid.next(), unsaid.next()) {
        return Ok(only);
    }
    let mut offered: Vec<String> = manifests
        .filter_map(|descriptor| descriptor.platform.as_ref())
        .filter(|platform| platform.os != "unknown" && !platform.is_unsaid())
        .map(ToString::to_string)
        .collect();
    offered.sort();
    offered.dedup();
    offered.truncate(20);
    Err(format!(
        "there is no image for {wanted} here, only for {}; choose with --platform",
        if offered.is_empty() {
            "none at all".to_owned()
        } else {
            excerpt(&offered.join(", "))
        }
    ))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::manifest::OCI_MANIFEST;
    use super::*;
    use crate::digest::{Algorithm, Digest};

    fn entry(platform: Option<&str>, digest_of: &str) -> Descriptor {
        Descriptor {
            media_type: OCI_MANIFEST.into(),
            digest: Digest::of(Algorithm::Sha256, digest_of.as_bytes()),
            size: 1,
            urls: Vec::new(),
            annotations: BTreeMap::new(),
            artifact_type: None,
            platform: platform.map(|platform| platform.parse().unwrap()),
        }
    }

    fn chosen(offered: &[Option<&str>], wanted: &str) -> Option<usize> {
        let manifests: Vec<_> = offered
            .iter()
            .enumerate()
            .map(|(n, platform)| entry(*platform, &n.to_string()))
            .collect();
        let best = choose(&manifests, &wanted.parse().unwrap()).ok()?;
        manifests.iter().position(|descriptor| descriptor == best)
    }

    #[test]
    fn the_best_platform_is_chosen() {
        let usual = [
            Some("linux/amd64"),
            Some("linux/arm/v5"),
            Some("linux/arm/v7"),
            Some("linux/arm64/v8"),
        ];
        assert_eq!(chosen(&usual, "linux/amd64"), Some(0));
        assert_eq!(chosen(&usual, "linux/x86_64"), Some(0));
        assert_eq!(chosen(&usual, "linux/arm"), Some(2));
        assert_eq!(chosen(&usual, "linux/arm/v6"), Some(1));
        assert_eq!(chosen(&usual, "linux/arm64"), Some(3));
        assert_eq!(chosen(&usual, "linux/s390x"), None);
        assert_eq!(chosen(&usual, "windows/amd64"), None);
        let levels = [Some("linux/amd64/v3"), Some("linux/amd64/v2"), Some("linux/amd64")];
        assert_eq!(chosen(&levels, "linux/amd64"), Some(2));
        assert_eq!(chosen(&levels, "linux/amd64/v3"), Some(0));
        assert_eq!(chosen(&levels[..2], "linux/amd64"), None);
        // Without a wish, what just this processor runs is better than nothing.
        let here = Platform::here_at_best();
        let only = entry(Some(&here.to_string()), "");
        assert_eq!(Wanted::of(None).choose([&only]), Ok(&only));
        assert!(Wanted::of(None).can_use(&here));
        if here.variant.is_some() {
            assert!(
                Wanted::of(Some(&Platform { variant: None, ..here }))
                    .choose([&only])
                    .is_err()
            );
        }
        assert_eq!(chosen(&[Some("unknown/unknown"), None], "linux/amd64"), Some(1));
        assert_eq!(chosen(&[None, None], "linux/amd64"), None);
        assert_eq!(chosen(&[], "linux/amd64"), None);
        // What a processor runs too, when there is nothing better (containerd's platforms package, "Only").
        let others = [Some("linux/386"), Some("linux/arm/v6"), Some("linux/arm/v7")];
        assert_eq!(chosen(&others, "linux/amd64"), Some(0));
        assert_eq!(chosen(&others, "linux/arm64"), Some(2));
        assert_eq!(chosen(&others, "linux/386"), Some(0));
        assert_eq!(
            chosen(&[Some("linux/386"), Some("linux/amd64")], "linux/amd64"),
            Some(1)
        );
        assert_eq!(chosen(&[Some("linux/amd64"), Some("linux/arm64")], "linux/386"), None);
        let odd = |os: &str, architecture: &str| {
            let mut odd = entry(None, "");
            odd.platform = Some(Platform {
                os: os.into(),
                architecture: architecture.into(),
                variant: Some(String::new()),
            });
            choose([&odd], &"linux/amd64".parse().unwrap()).is_ok()
        };
        for (os, architecture) in [
            ("", ""),
            ("linux", ""),
            ("", "amd64"),
            ("Linux", "X86_64"),
            ("linux", "x86-64"),
        ] {
            assert!(odd(os, architecture), "{os}/{architecture}");
        }
        for (os, architecture) in [("windows", "amd64"), ("linux", "aarch64"), ("unknown", "unknown")] {
            assert!(!odd(os, architecture), "{os}/{architecture}");
        }
    }
}
