//! How container engines are told of the snapshotter, and whether they were. In: an engine and its version; containerd's answers and its
//! configuration. Out: what to write where, in the form that this version reads; what is missing. Nothing is written here.

use std::fmt;
use std::path::Path;

use super::content::messages::{INTROSPECTION, Plugin, PluginsRequest, PluginsResponse};
use super::grpc::client::{CallError, Connection, PATIENCE};
use super::messages::{ListRequest, ListResponse, SERVICE};

/// What the plug-in is called in containerd's configuration.
pub const PLUGIN: &str = "tarblk";

/// What containerd calls the kind of plug-in.
const SNAPSHOTTER_TYPE: &str = "io.containerd.snapshotter.v1";

/// What a plug-in exports when clients are to tell it of which image a layer is.
const ANNOTATIONS: &str = "enable_remote_snapshot_annotations";

/// containerd that reads `/etc/containerd/conf.d/*.toml` without being told to.
const READS_CONF_D: Version = Version(2, 4);

/// k3s whose containerd is a 2.x, with a template of its own.
const K3S_WITH_CONTAINERD_2: Version = Version(1, 32);

/// Docker that can leave images to containerd.
const DOCKER_WITH_CONTAINERD_STORE: Version = Version(24, 0);

/// A program's version, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32);

impl Version {
    /// Finds the version in what a program says of itself: the first word with two numbers in it and a dot between.
    #[must_use]
    pub fn find(text: &str) -> Option<Self> {
        text.split_whitespace().find_map(|word| {
            let word = word.trim_start_matches('v');
            let mut numbers = word.split(|c: char| !c.is_ascii_digit());
            let starts = word.starts_with(|c: char| c.is_ascii_digit());
            let (major, minor) = (numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?);
            let dotted = word
                .split_once('.')
                .is_some_and(|(first, _)| first.bytes().all(|c| c.is_ascii_digit()));
            (starts && dotted).then_some(Self(major, minor))
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// Something that starts containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// containerd, by itself or under Kubernetes.
    Containerd,
    /// Docker, whose images containerd has.
    Docker,
    /// k3s and RKE2, which write containerd's configuration themselves.
    K3s,
    /// podman, which takes images from a store of tarblk's instead of a snapshotter.
    Podman,
}

/// Where the snapshotter is.
#[derive(Clone, Copy, Debug)]
pub struct Places<'a> {
    /// Its socket.
    pub address: &'a Path,
    /// Its root: the disk that containerd tells a kubelet about.
    pub root: &'a Path,
    /// The socket for a kubelet's pulls, if there is one.
    pub image_service: Option<&'a Path>,
    /// This machine's architecture as image platforms name it.
    pub architecture: &'a str,
}

/// One thing to write, or to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where to write it, or why it is done, in a sentence.
    pub what: String,
    /// What to write or to type.
    pub text: String,
}

fn step(what: impl Into<String>, text: impl Into<String>) -> Step {
    Step {
        what: what.into(),
        text: text.into(),
    }
}

/// What to do so that an engine uses the snapshotter.
#[must_use]
pub fn steps(engine: Engine, version: Version, places: &Places<'_>) -> Vec<Step> {
    match engine {
        Engine::Containerd => {
            let file = if version >= READS_CONF_D {
                "/etc/containerd/conf.d/tarblk.toml"
            } else {
                "/etc/containerd/config.toml, into the tables of the same names if they are there"
            };
            let mut steps = vec![
                step(
                    format!("for containerd {version}, in {file}"),
                    containerd(version, places),
                ),
                step("afterwards", "systemctl restart containerd\n"),
            ];
            steps.extend(kubelet(places));
            steps
        }
        Engine::Docker if version < DOCKER_WITH_CONTAINERD_STORE => vec![step(
            format!("Docker {version} keeps images itself: plug-ins of containerd are used from Docker 24 on"),
            "",
        )],
        Engine::Docker => vec![
            step(
                format!("for Docker {version}, in /etc/docker/daemon.json, besides what containerd is told"),
                "{\n  \"features\": { \"containerd-snapshotter\": true },\n  \"storage-driver\": \"tarblk\"\n}\n",
            ),
            step(
                "afterwards; images that were pulled before are not seen until this is undone",
                "systemctl restart docker\n",
            ),
        ],
        Engine::K3s => {
            let (template, of_containerd) = if version >= K3S_WITH_CONTAINERD_2 {
                ("config-v3.toml.tmpl", Version(2, 0))
            } else {
                ("config.toml.tmpl", Version(1, 7))
            };
            let dir = "/var/lib/rancher/k3s/agent/etc/containerd";
            let mut steps = vec![
                step(
                    format!(
                        "for k3s {version}, in /etc/rancher/k3s/config.yaml; then restart it, so that it writes containerd's configuration"
                    ),
                    "snapshotter: tarblk\n",
                ),
                step(
                    format!(
                        "k3s says to containerd that layers come without names; its template {template} says otherwise"
                    ),
                    format!(
                        "sed 's/disable_snapshot_annotations = true/disable_snapshot_annotations = false/' \\\n    {dir}/config.toml >{dir}/{template}\n"
                    ),
                ),
                step(format!("at the end of {dir}/{template}"), proxy(of_containerd, places)),
                step("afterwards", "systemctl restart k3s\n"),
            ];
            steps.extend(kubelet(places));
            steps
        }
        Engine::Podman => vec![step(
            format!("podman {version} has no snapshotters; images are announced to it"),
            "tarblk podman add IMAGE\n",
        )],
    }
}

/// The plug-in itself.
fn proxy(version: Version, places: &Places<'_>) -> String {
    let address = places.address.display();
    let mut text = format!("[proxy_plugins.{PLUGIN}]\n  type = \"snapshot\"\n  address = \"{address}\"\n");
    if version.0 >= 2 {
        let root = places.root.display();
        let exports = format!("    root = \"{root}\"\n    {ANNOTATIONS} = \"true\"\n");
        text.extend(["  [proxy_plugins.", PLUGIN, ".exports]\n", &exports]);
    }
    text
}

/// All of containerd's fragment.
fn containerd(version: Version, places: &Places<'_>) -> String {
    let proxy = proxy(version, places);
    if version.0 < 2 {
        return format!(
            "version = 2\n{proxy}\n# For Kubernetes.\n[plugins.\"io.containerd.grpc.v1.cri\".containerd]\n  snapshotter = \"{PLUGIN}\"\n  disable_snapshot_annotations = false\n"
        );
    }
    let platform = format!("linux/{}", places.architecture);
    let unpack = |snapshotter: &str| {
        format!(
            "[[plugins.\"io.containerd.transfer.v1.local\".unpack_config]]\n  platform = \"{platform}\"\n  snapshotter = \"{snapshotter}\"\n"
        )
    };
    format!(
        "version = 3\n{proxy}\n{}{}\n# For Kubernetes.\n[plugins.\"io.containerd.cri.v1.images\"]\n  snapshotter = \"{PLUGIN}\"\n",
        unpack(PLUGIN),
        unpack("overlayfs")
    )
}

/// What a kubelet is told.
fn kubelet(places: &Places<'_>) -> Option<Step> {
    let socket = places.image_service?.display();
    Some(step(
        "for private images: the kubelet pulls by this socket, so that its logins are there when layers are read",
        format!("--image-service-endpoint=unix://{socket}\n"),
    ))
}

/// Something that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether it is as it has to be.
    pub good: bool,
    /// What was seen; if it is not good, what to do.
    pub text: String,
}

fn good(text: impl Into<String>) -> Finding {
    Finding {
        good: true,
        text: text.into(),
    }
}

fn bad(text: impl Into<String>) -> Finding {
    Finding {
        good: false,
        text: text.into(),
    }
}

/// Whether the snapshotter answers.
#[must_use]
pub fn check_snapshotter(address: &Path) -> Finding {
    let ask = || -> Result<usize, CallError> {
        let connection = Connection::open(address, "default", PATIENCE)?;
        let mut count = 0;
        connection.call_for_all(
            &format!("{SERVICE}List"),
            &ListRequest::default(),
            |part: ListResponse| {
                count += part.info.len();
            },
        )?;
        Ok(count)
    };
    match ask() {
        Ok(count) => good(format!(
            "the snapshotter answers on {}: {count} snapshots",
            address.display()
        )),
        Err(error) => bad(format!("{error}: start it (`systemctl start tarblk-snapshotter`)")),
    }
}

/// Whether a running containerd has the plug-in, and tells it of which image a layer is. `dumped` is what `containerd config dump` says,
/// if it says anything.
#[must_use]
pub fn check_containerd(address: &Path, dumped: Option<&str>) -> Vec<Finding> {
    let ask = || -> Result<Vec<Plugin>, CallError> {
        let connection = Connection::open(address, "default", PATIENCE)?;
        let all: PluginsResponse = connection.call(&format!("{INTROSPECTION}Plugins"), &PluginsRequest::default())?;
        Ok(all.plugins)
    };
    let plugins = match ask() {
        Ok(plugins) => plugins,
        Err(error) => return vec![bad(format!("{error}: is containerd running, and is that its socket?"))],
    };
    let mut findings = vec![good(format!("containerd answers on {}", address.display()))];
    let Some(plugin) = plugins
        .iter()
        .find(|plugin| plugin.r#type == SNAPSHOTTER_TYPE && plugin.id == PLUGIN)
    else {
        findings.push(bad(format!(
            "containerd has no plug-in {PLUGIN}: write what `tarblk snapshotter setup` prints, and restart containerd"
        )));
        return findings;
    };
    if let Some(error) = &plugin.init_err {
        findings.push(bad(format!(
            "containerd's plug-in {PLUGIN} did not start: {}",
            error.message
        )));
        return findings;
    }
    findings.push(good(format!("containerd has the plug-in {PLUGIN}")));
    findings.extend(check_annotations(plugin, dumped));
    findings
}

/// Whether clients tell the plug-in of which image a layer is; otherwise everything is pulled as usual.
fn check_annotations(plugin: &Plugin, dumped: Option<&str>) -> Vec<Finding> {
    let exported = plugin.exports.get(ANNOTATIONS).is_some_and(|value| value == "true");
    let cri = dumped.and_then(CriConfig::find);
    let told = match (exported, &cri) {
        (true, _) => good("clients say of which image a layer is (exports)"),
        (false, Some(cri)) if cri.annotations => good("the CRI says of which image a layer is"),
        (false, Some(_)) => bad(
            "clients do not say of which image a layer is, so that nothing is lazy: disable_snapshot_annotations = false, or with \
             containerd 2.x the exports that `tarblk snapshotter setup` prints",
        ),
        (false, None) => {
            bad("whether clients say of which image a layer is cannot be seen: `containerd config dump` says nothing")
        }
    };
    let snapshotter = cri.map(|cri| {
        if cri.snapshotter == PLUGIN {
            good(format!("the CRI uses {PLUGIN}"))
        } else {
            bad(format!(
                "the CRI uses {}, not {PLUGIN}: for Kubernetes, write snapshotter = \"{PLUGIN}\" (without Kubernetes this does not matter)",
                cri.snapshotter
            ))
        }
    });
    [told].into_iter().chain(snapshotter).collect()
}

/// What the CRI's plug-in is set to.
#[derive(Debug, PartialEq, Eq)]
struct CriConfig {
    snapshotter: String,
    annotations: bool,
}

impl CriConfig {
    /// Finds it in containerd's whole configuration, of either version.
    fn find(dumped: &str) -> Option<Self> {
        let all: toml::Table = toml::from_str(dumped).ok()?;
        let plugins = all.get("plugins")?.as_table()?;
        let of_1 = || plugins.get("io.containerd.grpc.v1.cri")?.get("containerd");
        let found = plugins.get("io.containerd.cri.v1.images").or_else(of_1)?;
        Some(Self {
            snapshotter: found.get("snapshotter")?.as_str()?.to_owned(),
            annotations: !found.get("disable_snapshot_annotations")?.as_bool()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn places() -> Places<'static> {
        Places {
            address: Path::new("/run/tarblk/snapshotter.sock"),
            root: Path::new("/var/lib/tarblk/snapshotter"),
            image_service: Some(Path::new("/run/tarblk/images.sock")),
            architecture: "amd64",
        }
    }

    #[test]
    fn versions_are_found_in_what_programs_say() {
        for (text, version) in [
            (
                "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3",
                Version(1, 6),
            ),
            (
                "containerd github.com/containerd/containerd/v2 v2.1.9 0fd0ab",
                Version(2, 1),
            ),
            ("Docker version 28.5.2+dfsg3, build 89c5e8f", Version(28, 5)),
            (
                "k3s version v1.32.1+k3s1 (6a322f12)\ngo version go1.23.4",
                Version(1, 32),
            ),
            ("podman version 5.8.6", Version(5, 8)),
        ] {
            assert_eq!(Version::find(text), Some(version), "{text}");
        }
        assert_eq!(Version::find("nothing of the kind v2 2024-01"), None);
        assert!(Version(1, 7) < Version(2, 0) && Version(2, 0) < Version(2, 10));
    }

    #[test]
    fn containerd_understands_what_it_is_told() {
        for version in [Version(1, 6), Version(2, 1), Version(2, 4)] {
            let steps = steps(Engine::Containerd, version, &places());
            let table: toml::Table = toml::from_str(&steps[0].text).unwrap();
            assert_eq!(table["version"].as_integer(), Some(if version.0 == 1 { 2 } else { 3 }));
            let plugin = &table["proxy_plugins"][PLUGIN];
            assert_eq!(plugin["address"].as_str(), Some("/run/tarblk/snapshotter.sock"));
            // A configuration like that is what is looked for afterwards.
            let dumped = steps[0].text.replace(
                "snapshotter = \"tarblk\"\n",
                "snapshotter = \"tarblk\"\ndisable_snapshot_annotations = false\n",
            );
            let dumped = if version.0 == 1 { steps[0].text.clone() } else { dumped };
            let cri = CriConfig::find(&dumped).unwrap();
            assert_eq!((cri.snapshotter.as_str(), cri.annotations), (PLUGIN, true));
            assert_eq!(steps[0].what.contains("conf.d"), version == Version(2, 4));
            assert!(
                steps
                    .iter()
                    .any(|step| step.text.contains("unix:///run/tarblk/images.sock"))
            );
        }
        let daemon: serde_json::Value =
            serde_json::from_str(&steps(Engine::Docker, Version(28, 5), &places())[0].text).unwrap();
        assert_eq!(daemon["storage-driver"], PLUGIN);
        assert!(steps(Engine::Docker, Version(20, 10), &places())[0].text.is_empty());
        for (version, template) in [
            (Version(1, 30), "config.toml.tmpl"),
            (Version(1, 33), "config-v3.toml.tmpl"),
        ] {
            let steps = steps(Engine::K3s, version, &places());
            assert!(steps[2].what.ends_with(template));
            toml::from_str::<toml::Table>(&steps[2].text).unwrap();
        }
    }

    #[test]
    fn what_is_missing_is_said() {
        let plugin = |exports: &[(&str, &str)]| Plugin {
            exports: exports
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            ..Plugin::default()
        };
        let dumped = |snapshotter: &str, disabled: bool| {
            format!(
                "[plugins.\"io.containerd.grpc.v1.cri\".containerd]\nsnapshotter = \"{snapshotter}\"\ndisable_snapshot_annotations = {disabled}\n"
            )
        };
        let seen = |exports: &[(&str, &str)], dumped: Option<&str>| -> Vec<bool> {
            check_annotations(&plugin(exports), dumped)
                .iter()
                .map(|finding| finding.good)
                .collect()
        };
        assert_eq!(seen(&[(ANNOTATIONS, "true")], None), [true]);
        assert_eq!(seen(&[], None), [false]);
        assert_eq!(seen(&[], Some("no configuration")), [false]);
        assert_eq!(seen(&[], Some(&dumped(PLUGIN, false))), [true, true]);
        assert_eq!(seen(&[], Some(&dumped(PLUGIN, true))), [false, true]);
        assert_eq!(
            seen(&[(ANNOTATIONS, "true")], Some(&dumped("overlayfs", true))),
            [true, false]
        );
        let nowhere = Path::new("/nonexistent/socket");
        assert!(!check_snapshotter(nowhere).good);
        assert!(check_containerd(nowhere, None).iter().all(|finding| !finding.good));
    }
}
