//! Whether a tar is a whole image packed into one: what `docker save`, `podman save` and `skopeo copy … oci-archive:` write. In:
//! a tar's entries. Out: which of the two it is. A layer that merely holds such a file among others is none of them.

use super::entry::{Entry, Kind};
use super::error::IndexError;
use super::sink::EntrySink;

/// An image packed into a tar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageArchive {
    /// `docker save`: `manifest.json`, configurations and `layer.tar` files.
    Docker,
    /// A directory with the OCI image layout, packed.
    Oci,
}

impl ImageArchive {
    /// What skopeo and podman call it (containers-transports(5)).
    #[must_use]
    pub const fn transport(self) -> &'static str {
        match self {
            Self::Docker => "docker-archive",
            Self::Oci => "oci-archive",
        }
    }
}

/// Looks at a tar's entries for [`ImageArchive`].
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is something seen or not")]
pub struct ImageArchiveProbe {
    manifest: bool,
    oci_layout: bool,
    oci_index: bool,
    blobs: bool,
    /// Something was there that no such archive has.
    other: bool,
}

impl ImageArchiveProbe {
    /// What the entries so far make.
    #[must_use]
    pub fn found(&self) -> Option<ImageArchive> {
        if self.other || !self.blobs {
            None
        } else if self.manifest {
            // Newer versions of docker write both: its own archive is what older readers know as well.
            Some(ImageArchive::Docker)
        } else if self.oci_layout && self.oci_index {
            Some(ImageArchive::Oci)
        } else {
            None
        }
    }
}

impl EntrySink for ImageArchiveProbe {
    fn entry(&mut self, entry: &Entry) -> Result<(), IndexError> {
        if self.other || entry.kind == Kind::Directory {
            return Ok(());
        }
        let mut path = &entry.path[..];
        while let Some(rest) = path.strip_prefix(b"./").or_else(|| path.strip_prefix(b"/")) {
            path = rest;
        }
        match path {
            b"manifest.json" => self.manifest = true,
            b"oci-layout" => self.oci_layout = true,
            b"index.json" => self.oci_index = true,
            b"repositories" => {}
            path if is_blob(path) => self.blobs = true,
            path => self.other = !is_of_docker(path),
        }
        Ok(())
    }
}

fn is_hex(name: &[u8]) -> bool {
    (64..=128).contains(&name.len()) && name.iter().all(u8::is_ascii_hexdigit)
}

/// `blobs/sha256/HEX`, `HEX/layer.tar`, `HEX.tar`: where layers are.
fn is_blob(path: &[u8]) -> bool {
    let mut parts = path.split(|byte| *byte == b'/');
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(b"blobs"), Some(_), Some(name), None) | (Some(name), Some(b"layer.tar"), None, None) => is_hex(name),
        (Some(name), None, None, None) => name.strip_suffix(b".tar").is_some_and(is_hex),
        _ => false,
    }
}

/// `HEX.json`, `HEX/json`, `HEX/VERSION`: what else docker writes.
fn is_of_docker(path: &[u8]) -> bool {
    let mut parts = path.split(|byte| *byte == b'/');
    match (parts.next(), parts.next(), parts.next()) {
        (Some(name), None, None) => name.strip_suffix(b".json").is_some_and(is_hex),
        (Some(name), Some(b"json" | b"VERSION"), None) => is_hex(name),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(names: &[&str]) -> Option<ImageArchive> {
        let mut probe = ImageArchiveProbe::default();
        for name in names {
            let entry = Entry {
                path: name.as_bytes().to_vec(),
                kind: if name.ends_with('/') {
                    Kind::Directory
                } else {
                    Kind::File
                },
                ..Entry::default()
            };
            probe.entry(&entry).unwrap();
        }
        probe.found()
    }

    #[test]
    fn archives_of_images_are_told_from_layers() {
        let hex = "0123456789abcdef".repeat(4);
        let (layer, config, blob) = (
            format!("{hex}/layer.tar"),
            format!("{hex}.json"),
            format!("blobs/sha256/{hex}"),
        );
        let (version, json, podman) = (format!("{hex}/VERSION"), format!("{hex}/json"), format!("{hex}.tar"));
        let old = [&config, "manifest.json", "repositories", &layer, &version, &json];
        assert_eq!(found(&old), Some(ImageArchive::Docker));
        assert_eq!(found(&[&podman, &config, "manifest.json"]), Some(ImageArchive::Docker));
        let new = ["./blobs/", &blob, "./index.json", "manifest.json", "oci-layout"];
        assert_eq!(found(&new), Some(ImageArchive::Docker));
        assert_eq!(found(&["oci-layout", "index.json", &blob]), Some(ImageArchive::Oci));
        assert_eq!(found(&["oci-layout", "index.json"]), None);
        assert_eq!(found(&["manifest.json"]), None);
        assert_eq!(
            found(&[&old[..], &["etc/passwd"]].concat()),
            None,
            "a layer that holds one"
        );
        assert_eq!(found(&["usr/manifest.json", &blob]), None);
        assert_eq!(found(&[]), None);
    }
}
