//! podman's own configuration of its storage, as far as it matters here. In: `storage.conf` (containers-storage.conf(5)). Out: whether
//! it names a store of ours, where podman's containers are, and which of them are made on a layer of ours.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

/// Where it is looked for, the first that is there.
const PLACES: [&str; 2] = ["/etc/containers/storage.conf", "/usr/share/containers/storage.conf"];

/// The variable that names it.
const VARIABLE: &str = "CONTAINERS_STORAGE_CONF";

const GRAPH_ROOT: &str = "/var/lib/containers/storage";

/// No file of podman's that is read here is longer, in bytes.
const LONGEST: u64 = 64 << 20;

/// Why it is not known what podman does.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {why}")]
pub struct StorageConfigError {
    /// The file.
    path: PathBuf,
    /// What is wrong with it.
    why: String,
}

/// What `storage.conf` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageConfig {
    /// The file; the one that would be read, if there is none.
    pub path: PathBuf,
    /// Whether it says how podman stores images and containers: without that podman does not start.
    pub has_driver: bool,
    /// Where podman keeps containers and what they write.
    pub graph_root: PathBuf,
    /// The additional image stores.
    pub stores: Vec<PathBuf>,
}

#[derive(Default, Deserialize)]
struct Document {
    #[serde(default)]
    storage: Storage,
}

#[derive(Default, Deserialize)]
struct Storage {
    driver: Option<String>,
    graphroot: Option<PathBuf>,
    #[serde(default)]
    options: Options,
}

#[derive(Default, Deserialize)]
struct Options {
    #[serde(default)]
    additionalimagestores: Vec<PathBuf>,
}

impl StorageConfig {
    /// This machine's.
    ///
    /// # Errors
    /// When it cannot be read or makes no sense.
    pub fn of_machine() -> Result<Self, StorageConfigError> {
        let named = std::env::var_os(VARIABLE)
            .filter(|path| !path.is_empty())
            .map(PathBuf::from);
        let usual = || PLACES.iter().map(PathBuf::from).find(|path| path.exists());
        let path = named.or_else(usual).unwrap_or_else(|| PathBuf::from(PLACES[0]));
        Self::read(path)
    }

    fn read(path: PathBuf) -> Result<Self, StorageConfigError> {
        let failed = |why: String| StorageConfigError {
            path: path.clone(),
            why,
        };
        let text = match fs::read_to_string(&path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(failed(error.to_string())),
        };
        let document = toml::from_str::<Document>(&text.unwrap_or_default());
        let Storage {
            driver,
            graphroot,
            options,
        } = document.map_err(|error| failed(error.message().to_owned()))?.storage;
        Ok(Self {
            has_driver: driver.is_some_and(|driver| !driver.is_empty()),
            graph_root: graphroot.unwrap_or_else(|| GRAPH_ROOT.into()),
            stores: options.additionalimagestores,
            path,
        })
    }

    /// Whether podman looks for images in `store`.
    #[must_use]
    pub fn names(&self, store: &Path) -> bool {
        let real = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        self.stores.iter().any(|named| real(named) == real(store))
    }

    /// What to write into the file so that podman looks into `store`: a part of it, or all of it where it says nothing yet.
    #[must_use]
    pub fn fragment(&self, store: &Path) -> String {
        let mut stores = self.stores.clone();
        if !self.names(store) {
            stores.push(store.to_owned());
        }
        let stores: Vec<_> = stores
            .iter()
            .map(|store| format!("{:?}", store.display().to_string()))
            .collect();
        let own = self.has_driver && !self.path.starts_with("/usr");
        let storage = if own {
            String::new()
        } else {
            format!(
                "[storage]\ndriver = \"overlay\"\nrunroot = \"/run/containers/storage\"\ngraphroot = {:?}\n\n",
                self.graph_root.display().to_string()
            )
        };
        format!(
            "{storage}[storage.options]\nadditionalimagestores = [{}]\n",
            stores.join(", ")
        )
    }

    /// The file that the fragment goes into: what a distribution brings is not for changing.
    #[must_use]
    pub fn file_to_change(&self) -> &Path {
        if self.path.starts_with("/usr") {
            Path::new(PLACES[0])
        } else {
            &self.path
        }
    }

    /// What is made on the layer with this ID: podman's containers by their names, and other layers by their IDs. What cannot be read is
    /// taken for nothing: the kernel knows of what runs.
    #[must_use]
    pub fn made_on(&self, layer: &str) -> Vec<String> {
        #[derive(Deserialize)]
        struct Layer {
            id: String,
            #[serde(default)]
            parent: String,
        }
        #[derive(Deserialize)]
        struct Container {
            #[serde(default)]
            names: Vec<String>,
            #[serde(default)]
            layer: String,
        }
        let read_both = |dir: &str, kind: &str| {
            let dir = self.graph_root.join(dir);
            [format!("{kind}.json"), format!("volatile-{kind}.json")].map(|name| dir.join(name))
        };
        let layers = read_both("overlay-layers", "layers");
        let above = layers.iter().flat_map(|path| read_list::<Layer>(path));
        let above: Vec<String> = above.filter(|it| it.parent == layer).map(|it| it.id).collect();
        let containers = read_both("overlay-containers", "containers");
        let containers = containers.iter().flat_map(|path| read_list::<Container>(path));
        let by_layer: BTreeMap<String, String> = containers
            .filter_map(|container| Some((container.layer, container.names.into_iter().next()?)))
            .collect();
        let told = |id: &String| match by_layer.get(id) {
            Some(name) => format!("container {name}"),
            None => format!("layer {}", id.chars().take(12).collect::<String>()),
        };
        above.iter().map(told).collect()
    }
}

/// A list of podman's, empty if there is none.
fn read_list<T: DeserializeOwned>(path: &Path) -> Vec<T> {
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(LONGEST).read_to_end(&mut text));
    if let Err(error) = &read
        && error.kind() != io::ErrorKind::NotFound
    {
        log::warn!("{}: {error}", path.display());
    }
    serde_json::from_slice(&text).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> (tempfile::TempDir, StorageConfig) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("storage.conf");
        fs::write(&path, text.replace("DIR", dir.path().to_str().unwrap())).unwrap();
        let config = StorageConfig::read(path).unwrap();
        (dir, config)
    }

    #[test]
    fn stores_are_found_and_added() {
        let (dir, config) =
            config("[storage]\ndriver='overlay'\n[storage.options]\nadditionalimagestores=['DIR/a/', '/nowhere/b']\n");
        fs::create_dir(dir.path().join("a")).unwrap();
        assert!(config.names(&dir.path().join("a")) && config.names(Path::new("/nowhere/b")));
        assert!(!config.names(Path::new("/c")));
        assert_eq!(config.graph_root, Path::new(GRAPH_ROOT));
        let fragment = config.fragment(Path::new("/c"));
        let added: Document = toml::from_str(&fragment).unwrap();
        assert_eq!(
            added.storage.options.additionalimagestores,
            [dir.path().join("a/"), "/nowhere/b".into(), "/c".into()]
        );
        assert_eq!(
            config.fragment(Path::new("/nowhere/b")).matches("/nowhere/b").count(),
            1
        );
        // Without a file it is a whole one.
        let none = StorageConfig::read(dir.path().join("none")).unwrap();
        assert!(!none.has_driver && none.stores.is_empty());
        assert!(
            none.fragment(Path::new("/c"))
                .starts_with("[storage]\ndriver = \"overlay\"")
        );
        fs::write(dir.path().join("bad"), "[storage\n").unwrap();
        assert!(StorageConfig::read(dir.path().join("bad")).is_err());
    }

    #[test]
    fn what_is_made_on_a_layer_is_told_by_name() {
        let (dir, config) = config("[storage]\ngraphroot='DIR'\n");
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        assert!(config.made_on("ours").is_empty());
        write(
            "overlay-layers/layers.json",
            r#"[{"id":"1","parent":"ours"},{"id":"22222222222222222","parent":"ours"},{"id":"3","parent":"1"},{"id":"4"}]"#,
        );
        write("overlay-layers/volatile-layers.json", r#"[{"id":"5","parent":"ours"}]"#);
        write(
            "overlay-containers/containers.json",
            r#"[{"id":"c","names":["web","w"],"layer":"1"},{"id":"d","layer":"3"}]"#,
        );
        assert_eq!(
            config.made_on("ours"),
            ["container web", "layer 222222222222", "layer 5"]
        );
        write("overlay-layers/layers.json", "not JSON");
        assert_eq!(config.made_on("ours"), ["layer 5"]);
    }
}
