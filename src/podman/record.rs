//! What is kept of an image that was added: enough to add it again after the machine was started anew. In and out: one file for each
//! image, written whole, without secrets.

use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{PodmanError, unusable};
use crate::device::state::write_whole;
use crate::digest::{Algorithm, Digest};
use crate::source::registry::{Image, ImageName, Version};

const VERSION: u32 = 1;

/// No record's file is longer, in bytes.
const LONGEST: u64 = 1 << 20;

/// So many characters of a layer's short name: the kernel takes one page for all lower directories of an overlay.
const LINK_LEN: usize = 26;

/// An image of the store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// podman's ID of it: the hexadecimal digits of its configuration's SHA-256.
    pub id: String,
    /// Of its own manifest.
    pub manifest: Digest,
    /// As podman knows it, without transport: `host/repository:tag`. None if another image has taken all of them.
    pub names: Vec<String>,
    /// The image as `tarblk mount` takes it, by its manifest's digest.
    pub source: String,
    /// The options of `tarblk podman add` with which it was added, none of them secret.
    pub options: Vec<String>,
    /// Of the files in it.
    pub bytes: u64,
    /// When the image was made, as RFC 3339 has it.
    pub created: String,
    /// The lengths of its manifest and its configuration.
    pub lengths: [u64; 2],
}

/// The file's form.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecordFile {
    version: u32,
    image: Record,
}

impl Record {
    /// What is kept of `image`, before it is known how many bytes its files have; `names` is what podman is to call it.
    ///
    /// # Errors
    /// [`PodmanError::NoId`].
    pub fn new(image: &Image, source: String, names: Vec<String>, options: Vec<String>) -> Result<Self, PodmanError> {
        let config = &image.config;
        if config.digest.algorithm() != Algorithm::Sha256 {
            return Err(PodmanError::NoId(image.name.clone()));
        }
        let len = |bytes: &[u8]| u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        Ok(Self {
            id: config.digest.hex().to_owned(),
            manifest: image.manifest_digest.clone(),
            names,
            source,
            options,
            bytes: 0,
            created: created(&config.json),
            lengths: [len(&image.manifest), len(&config.json)],
        })
    }

    /// The ID of the one layer that stands for all of the image's. It is made up: a real one would make podman take the whole tree for
    /// a layer of other images. The same each time, so that containers find it again.
    #[must_use]
    pub fn layer(&self) -> String {
        let layer = Digest::of(
            Algorithm::Sha256,
            format!("tarblk's merged layers of {}", self.id).as_bytes(),
        );
        layer.hex().to_owned()
    }

    /// The layer's short name.
    #[must_use]
    pub fn link(&self) -> String {
        let mut link = self.layer().to_ascii_uppercase();
        link.truncate(LINK_LEN);
        link
    }

    /// The names under which podman looks for the manifest (two) and the configuration, in that order.
    #[must_use]
    pub(super) fn data_names(&self) -> [String; 3] {
        [
            "manifest".to_owned(),
            format!("manifest-{}", self.manifest),
            format!("sha256:{}", self.id),
        ]
    }

    /// What is under these names.
    pub(super) fn data<'a>(&self, image: &'a Image) -> impl Iterator<Item = (String, &'a [u8])> {
        let bytes = [&image.manifest[..], &image.manifest, &image.config.json];
        self.data_names().into_iter().zip(bytes)
    }

    /// Writes the record to `dir`, on disk when this returns.
    ///
    /// # Errors
    /// [`PodmanError::Io`].
    pub(super) fn write(&self, dir: &Path) -> Result<(), PodmanError> {
        let path = self.file(dir);
        let file = RecordFile {
            version: VERSION,
            image: self.clone(),
        };
        let bytes = serde_json::to_vec(&file).map_err(io::Error::from);
        bytes
            .and_then(|bytes| write_whole(&path, &bytes, true))
            .map_err(unusable(&path))
    }

    /// Where the record is in `dir`.
    pub(super) fn file(&self, dir: &Path) -> PathBuf {
        dir.join(format!("{}.json", self.id))
    }
}

/// The records in `dir`, by ID. One that makes no sense is told of and left alone.
///
/// # Errors
/// [`PodmanError::Io`] when the directory cannot be read, or a record was written by a later version.
pub(super) fn read_all(dir: &Path) -> Result<Vec<Record>, PodmanError> {
    let mut records = Vec::new();
    for name in super::names_in(dir)? {
        let Some(id) = name.strip_suffix(".json").filter(|id| is_id(id)) else {
            continue;
        };
        let path = dir.join(&name);
        match read(&path, id) {
            Ok(record) => records.push(record),
            // Removed since the directory was read.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                log::warn!("{}: not a record of an image: {error}", path.display());
            }
            Err(error) => return Err(unusable(&path)(error)),
        }
    }
    records.sort_by(|a: &Record, b| a.id.cmp(&b.id));
    Ok(records)
}

fn read(path: &Path, id: &str) -> io::Result<Record> {
    #[derive(Deserialize)]
    struct AnyVersion {
        version: u32,
    }
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)?;
    let mut bytes = Vec::new();
    file.take(LONGEST).read_to_end(&mut bytes)?;
    let senseless = |error: serde_json::Error| io::Error::new(io::ErrorKind::InvalidData, error);
    let AnyVersion { version } = serde_json::from_slice(&bytes).map_err(senseless)?;
    if version > VERSION {
        let why = format!("it is of version {version}, and this tarblk knows {VERSION}: run the newer one");
        return Err(io::Error::new(io::ErrorKind::Unsupported, why));
    }
    let RecordFile { image, .. } = serde_json::from_slice(&bytes).map_err(senseless)?;
    if image.id != id {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it does not fit its name"));
    }
    Ok(image)
}

/// Whether a file's name is an image's or a layer's ID.
pub(super) fn is_id(name: &str) -> bool {
    format!("sha256:{name}").parse::<Digest>().is_ok()
}

/// When a configuration says that its image was made; the beginning of time if it says nothing that podman would understand,
/// which would then understand none of the store.
fn created(config: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Config {
        created: String,
    }
    let said = serde_json::from_slice(config).map(|config: Config| config.created);
    let parsed = said.ok().and_then(|said| said.parse::<jiff::Timestamp>().ok());
    // Years of four digits, which is all that Go reads.
    let fits = parsed.filter(|at| at.as_second() >= 0);
    fits.unwrap_or(jiff::Timestamp::UNIX_EPOCH).to_string()
}

/// What podman calls an image that tarblk calls `name`: without the transport, or of a layout, as podman would call it that had pulled
/// from there; `None` for what names no image.
#[must_use]
pub fn podman_name(name: &str) -> Option<String> {
    match ImageName::parse(name).ok()? {
        ImageName::Registry(reference) => Some(reference.to_string()),
        ImageName::Layout(layout) => {
            let tag = match &layout.version {
                // A tag in a layout may be a whole reference.
                Some(Version::Tag(tag)) if tag.contains(['/', ':']) => {
                    return podman_name(&format!("docker://{tag}"));
                }
                Some(Version::Tag(tag)) => tag.clone(),
                Some(Version::Digest(_)) | None => "latest".to_owned(),
            };
            let dir = std::path::absolute(&layout.dir).ok()?;
            let dir = dir.file_name()?.to_str()?.to_ascii_lowercase();
            podman_name(&format!("docker://localhost/{dir}:{tag}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn record(id: &str) -> Record {
        let id = Digest::of(Algorithm::Sha256, id.as_bytes());
        Record {
            id: id.hex().to_owned(),
            manifest: id.clone(),
            names: vec!["host/a:1".to_owned()],
            source: format!("docker://host/a@{id}"),
            options: vec!["--fetch-all".to_owned()],
            bytes: 7,
            created: "1970-01-01T00:00:00Z".to_owned(),
            lengths: [1, 2],
        }
    }

    #[test]
    fn what_is_written_is_read_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (record("a"), record("b"));
        a.write(dir.path()).unwrap();
        b.write(dir.path()).unwrap();
        let mut both = vec![a.clone(), b.clone()];
        both.sort_by(|a, b| a.id.cmp(&b.id));
        assert_eq!(read_all(dir.path()).unwrap(), both);
        // Another's name, no JSON, a link, not an ID.
        let other = dir.path().join(format!("{}.json", record("c").id));
        fs::copy(dir.path().join(format!("{}.json", a.id)), &other).unwrap();
        fs::write(dir.path().join(format!("{}.json", record("d").id)), "{").unwrap();
        fs::write(dir.path().join("x.json"), "{").unwrap();
        assert_eq!(read_all(dir.path()).unwrap(), both);
        fs::remove_file(b.file(dir.path())).unwrap();
        assert_eq!(read_all(dir.path()).unwrap(), [a]);
        fs::write(&other, "{\"version\":2}").unwrap();
        assert!(read_all(dir.path()).unwrap_err().to_string().contains("version 2"));
        assert_eq!(read_all(&dir.path().join("absent")).unwrap(), []);
    }

    #[test]
    fn layers_are_made_up_and_stay_the_same() {
        let (a, b) = (record("a"), record("b"));
        assert!(is_id(&a.layer()) && a.layer() != a.id && a.layer() != b.layer());
        assert_eq!(a.layer(), record("a").layer());
        assert!(a.link().len() == LINK_LEN && a.link() != b.link());
    }

    #[test]
    fn times_that_podman_would_not_read_are_the_first() {
        let epoch = "1970-01-01T00:00:00Z";
        for (config, expected) in [
            (
                r#"{"created":"2024-05-06T07:08:09.123+02:00"}"#,
                "2024-05-06T05:08:09.123Z",
            ),
            (r#"{"created":"yesterday"}"#, epoch),
            (r#"{"created":"-000004-01-01T00:00:00Z"}"#, epoch),
            (r#"{"created":null}"#, epoch),
            ("{}", epoch),
            ("", epoch),
        ] {
            assert_eq!(created(config.as_bytes()), expected, "{config}");
        }
    }

    #[test]
    fn names_are_those_that_podman_gives() {
        for (typed, name) in [
            ("docker://debian", Some("docker.io/library/debian:latest")),
            ("docker://localhost:5000/a/b:t", Some("localhost:5000/a/b:t")),
            ("oci:/x/Images/App:1.2", Some("localhost/app:1.2")),
            ("oci:/x/app", Some("localhost/app:latest")),
            (
                "oci:/x/app:registry.example.org/team/app:2",
                Some("registry.example.org/team/app:2"),
            ),
            ("oci:/x/a b:1", None),
            ("layer.tar", None),
        ] {
            assert_eq!(podman_name(typed).as_deref(), name, "{typed}");
        }
    }
}
