//! What the runtime is told (OCI runtime specification, config.json). In: what the image says of itself, and what a person wants. Out: one
//! JSON document, with podman's defaults where nothing is said: eleven capabilities, its masked and read-only paths, no devices but the
//! usual ones, and a filter of system calls (`seccomp`).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rustix::process::Signal;
use serde::{Deserialize, Deserializer};
use serde_json::{Value, json};

use super::ContainerError;
use super::seccomp;
use super::user::{Root, User};

/// Where programs are, where the image does not say it.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// No argument or variable of a program may be as long, in bytes (Linux' `MAX_ARG_STRLEN`).
const LONGEST_STRING: usize = 128 << 10;

/// The longest name of a machine, in bytes.
const LONGEST_HOSTNAME: usize = 64;

/// What root may do in a container: podman's default.
const CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// What tells of the machine, and is not shown.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
];

/// What changes the machine, and cannot be written.
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// What an image's configuration says of its containers (OCI image specification, "config").
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageSettings {
    #[serde(deserialize_with = "null_is_nothing")]
    env: Vec<String>,
    #[serde(deserialize_with = "null_is_nothing")]
    entrypoint: Vec<String>,
    #[serde(deserialize_with = "null_is_nothing")]
    cmd: Vec<String>,
    #[serde(deserialize_with = "null_is_nothing")]
    user: String,
    #[serde(deserialize_with = "null_is_nothing")]
    working_dir: String,
    #[serde(deserialize_with = "null_is_nothing")]
    stop_signal: String,
    #[serde(deserialize_with = "null_is_nothing")]
    hostname: String,
}

fn null_is_nothing<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

impl ImageSettings {
    /// Reads an image's configuration.
    ///
    /// # Errors
    /// [`ContainerError::Settings`] when it makes no sense.
    pub fn parse(config: &[u8]) -> Result<Self, ContainerError> {
        #[derive(Deserialize)]
        struct Config {
            #[serde(default, deserialize_with = "null_is_nothing")]
            config: ImageSettings,
        }
        let parsed = serde_json::from_slice::<Config>(config);
        let parsed = parsed.map_err(|error| senseless(format!("the image's configuration makes no sense: {error}")))?;
        Ok(parsed.config)
    }

    /// What asks the container's program for an end.
    #[must_use]
    pub fn stop_signal(&self) -> Signal {
        let name = self.stop_signal.trim().to_ascii_uppercase();
        let name = name.strip_prefix("SIG").unwrap_or(&name);
        let known = [
            ("", Signal::TERM),
            ("TERM", Signal::TERM),
            ("INT", Signal::INT),
            ("QUIT", Signal::QUIT),
            ("HUP", Signal::HUP),
            ("KILL", Signal::KILL),
            ("USR1", Signal::USR1),
            ("USR2", Signal::USR2),
            ("WINCH", Signal::WINCH),
            ("PWR", Signal::POWER),
        ];
        let is_meant = |(known, number): &&(&str, Signal)| *known == name || number.as_raw().to_string() == name;
        known.iter().find(is_meant).map_or_else(
            || {
                log::warn!(
                    "the image's stop signal {} is not known; SIGTERM is sent instead",
                    self.stop_signal
                );
                Signal::TERM
            },
            |(_, number)| *number,
        )
    }
}

fn senseless(why: String) -> ContainerError {
    ContainerError::Settings(why)
}

/// Which network a container sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// None but its own loopback.
    #[default]
    None,
    /// The machine's.
    Host,
}

/// A directory or file of the machine that a container sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    host: PathBuf,
    container: String,
    read_only: bool,
}

impl std::str::FromStr for Volume {
    type Err = String;

    /// `HOST:CONTAINER[:ro|rw]`, both absolute paths.
    fn from_str(text: &str) -> Result<Self, String> {
        let parts: Vec<&str> = text.split(':').collect();
        let (host, container, read_only) = match parts[..] {
            [host, container] | [host, container, "rw"] => (host, container, false),
            [host, container, "ro"] => (host, container, true),
            _ => return Err("HOST:CONTAINER[:ro|rw]".to_owned()),
        };
        if !host.starts_with('/') || !container.starts_with('/') {
            return Err("both paths begin with /".to_owned());
        }
        let container = container.to_owned();
        let host = PathBuf::from(host);
        Ok(Self {
            host,
            container,
            read_only,
        })
    }
}

/// What a person wants of a container.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The program's arguments, instead of the image's command.
    pub command: Vec<String>,
    /// The program, instead of the image's entry point; none at all if it is empty.
    pub entrypoint: Option<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// What of the machine it sees.
    pub volumes: Vec<Volume>,
    /// `USER[:GROUP]`, names of the image or numbers.
    pub user: Option<String>,
    /// Where it begins.
    pub workdir: Option<String>,
    /// What it takes itself for.
    pub hostname: Option<String>,
    /// Its network.
    pub network: Network,
    /// Whether it has a terminal, which is this process's.
    pub tty: bool,
    /// Whether it reads this process's standard input.
    pub interactive: bool,
    /// Whether it can write nothing.
    pub read_only: bool,
    /// Which system calls are its to make.
    pub calls: SystemCalls,
}

/// Which system calls the programs of a container may make.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SystemCalls {
    /// All but those that run the machine.
    #[default]
    Filtered,
    /// All that their capabilities allow.
    All,
}

/// The whole document, for the image that is mounted on `root`.
///
/// # Errors
/// [`ContainerError`].
pub(super) fn spec(image: &ImageSettings, wanted: &Wanted, root: &Path, id: &str) -> Result<Value, ContainerError> {
    let root = Root::open(root)?;
    let args = arguments(image, wanted)?;
    let user = User::find(&root, wanted.user.as_deref().unwrap_or(&image.user))?;
    let hostname = hostname(image, wanted, id);
    let env = environment(image, wanted, &user, &hostname)?;
    let workdir = wanted.workdir.as_deref().unwrap_or(&image.working_dir);
    let workdir = format!("/{}", workdir.trim_start_matches('/'));
    check_strings(args.iter().chain(&env))?;
    if wanted.volumes.is_empty() {
        // What volumes bring is not seen yet.
        let path = env.iter().find_map(|line| line.strip_prefix("PATH=")).unwrap_or(PATH);
        root.check_program(&args[0], path, &workdir)?;
    }
    // Its own among them, so that a program cannot leave a group that is shut out (CVE-2022-36109).
    let groups: Vec<u32> = [user.gid].into_iter().chain(user.groups.iter().copied()).collect();
    let of_root: &[&str] = if user.uid == 0 { &CAPABILITIES } else { &[] };
    let mut namespaces = vec!["pid", "ipc", "uts", "mount"];
    if wanted.network == Network::None {
        namespaces.push("network");
    }
    // With the older control groups engines do without.
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        namespaces.push("cgroup");
    }
    let namespaces: Vec<Value> = namespaces.into_iter().map(|kind| json!({"type": kind})).collect();
    let mut document = json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": wanted.tty,
            "user": {"uid": user.uid, "gid": user.gid, "additionalGids": groups, "umask": 0o022},
            "args": args,
            "env": env,
            "cwd": workdir,
            "capabilities": {"bounding": CAPABILITIES, "effective": of_root, "permitted": of_root},
        },
        "root": {"path": "rootfs", "readonly": wanted.read_only},
        "hostname": hostname,
        "mounts": mounts(wanted)?,
        "linux": {
            "namespaces": namespaces,
            "cgroupsPath": format!("/tarblk-{id}"),
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    });
    if wanted.calls == SystemCalls::Filtered {
        document["linux"]["seccomp"] = seccomp::filter();
    }
    Ok(document)
}

/// The program and its arguments.
fn arguments(image: &ImageSettings, wanted: &Wanted) -> Result<Vec<String>, ContainerError> {
    let (entrypoint, cmd) = match &wanted.entrypoint {
        // The image's command is for the image's own program.
        Some(program) => (
            Some(program.clone())
                .filter(|program| !program.is_empty())
                .into_iter()
                .collect(),
            &[][..],
        ),
        None => (image.entrypoint.clone(), &image.cmd[..]),
    };
    let command = if wanted.command.is_empty() {
        cmd
    } else {
        &wanted.command
    };
    let args: Vec<String> = entrypoint.into_iter().chain(command.iter().cloned()).collect();
    if args.first().is_none_or(String::is_empty) {
        return Err(senseless(
            "the image says no command; say one behind its name".to_owned(),
        ));
    }
    Ok(args)
}

/// The image's variables and those that are wanted, each once, the last of a name.
fn environment(
    image: &ImageSettings,
    wanted: &Wanted,
    user: &User,
    hostname: &str,
) -> Result<Vec<String>, ContainerError> {
    let mut env = BTreeMap::from([("PATH", PATH), ("HOME", &user.home), ("HOSTNAME", hostname)]);
    if wanted.tty {
        env.insert("TERM", "xterm");
    }
    for line in image.env.iter().chain(&wanted.env) {
        match line.split_once('=') {
            Some((name, value)) if !name.is_empty() => _ = env.insert(name, value),
            // Programs that build images pass over it too.
            _ => log::warn!("the image's environment has a line without a name"),
        }
    }
    if env
        .iter()
        .any(|(name, value)| name.contains('\0') || value.contains('\0'))
    {
        return Err(senseless("the image's environment has a zero byte in it".to_owned()));
    }
    Ok(env.into_iter().map(|(name, value)| format!("{name}={value}")).collect())
}

/// Refuses what the kernel passes to no program.
fn check_strings<'a>(strings: impl Iterator<Item = &'a String>) -> Result<(), ContainerError> {
    for text in strings {
        if text.len() >= LONGEST_STRING {
            let name: String = text.chars().take(40).collect();
            let why = format!(
                "an argument or variable is too long for a program, {name}…: {} bytes",
                text.len()
            );
            return Err(senseless(why));
        }
        if text.contains('\0') {
            return Err(senseless("an argument has a zero byte in it".to_owned()));
        }
    }
    Ok(())
}

/// What the container takes itself for: what is wanted, what the image says, or the container's name.
fn hostname(image: &ImageSettings, wanted: &Wanted, id: &str) -> String {
    let is_name = |name: &&str| {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._".contains(&byte);
        !name.is_empty() && name.len() <= LONGEST_HOSTNAME && name.bytes().all(plain)
    };
    let said = wanted.hostname.as_deref().or(Some(image.hostname.as_str()));
    said.filter(is_name).unwrap_or(id).to_owned()
}

fn mounts(wanted: &Wanted) -> Result<Vec<Value>, ContainerError> {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    let bind = |destination: &str, source: &Path, read_only: bool| {
        let access = if read_only { "ro" } else { "rw" };
        json!({"destination": destination, "type": "bind", "source": source, "options": ["rbind", "rprivate", access]})
    };
    let mut mounts = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            &["nosuid", "noexec", "nodev", "relatime", "ro"],
        ),
    ];
    if wanted.network == Network::Host {
        for file in ["/etc/resolv.conf", "/etc/hosts"].map(Path::new) {
            if file.exists() {
                mounts.push(bind(&file.to_string_lossy(), file, true));
            }
        }
    }
    for volume in &wanted.volumes {
        if !volume.host.exists() {
            return Err(senseless(format!("--volume: {} does not exist", volume.host.display())));
        }
        mounts.push(bind(&volume.container, &volume.host, volume.read_only));
    }
    Ok(mounts)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn settings(config: &Value) -> ImageSettings {
        ImageSettings::parse(json!({"config": config}).to_string().as_bytes()).unwrap()
    }

    fn command(image: &Value, wanted: &Wanted) -> Result<Vec<String>, String> {
        arguments(&settings(image), wanted).map_err(|error| error.to_string())
    }

    #[test]
    fn entry_point_and_command_are_put_together_as_docker_does() {
        let image = json!({"Entrypoint": ["/e", "-a"], "Cmd": ["c", "d"]});
        let wanted = |command: &[&str], entrypoint: Option<&str>| Wanted {
            command: command.iter().map(|&word| word.to_owned()).collect(),
            entrypoint: entrypoint.map(str::to_owned),
            ..Wanted::default()
        };
        let both = |command: &[&str], entrypoint| {
            self::command(&image, &wanted(command, entrypoint)).map(|args| args.join(" "))
        };
        assert_eq!(both(&[], None).unwrap(), "/e -a c d");
        assert_eq!(both(&["x"], None).unwrap(), "/e -a x");
        assert_eq!(both(&["x"], Some("/f")).unwrap(), "/f x");
        assert_eq!(both(&[], Some("/f")).unwrap(), "/f");
        assert_eq!(both(&["x"], Some("")).unwrap(), "x");
        assert!(both(&[], Some("")).unwrap_err().contains("no command"));
        for nothing in [
            json!({}),
            json!({"Cmd": null, "Entrypoint": null}),
            json!({"Cmd": [""]}),
        ] {
            assert!(
                self::command(&nothing, &Wanted::default())
                    .unwrap_err()
                    .contains("no command")
            );
        }
    }

    #[test]
    fn configurations_that_make_no_sense_are_refused_and_nulls_are_not() {
        assert_eq!(ImageSettings::parse(b"{}").unwrap(), ImageSettings::default());
        assert_eq!(
            ImageSettings::parse(b"{\"config\":null}").unwrap(),
            ImageSettings::default()
        );
        for bad in [
            "",
            r#"{"config":{"Env":"x"}}"#,
            r#"{"config":{"Cmd":[1]}}"#,
            r#"{"config":{"User":{}}}"#,
        ] {
            let error = ImageSettings::parse(bad.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("makes no sense"), "{bad}: {error}");
        }
    }

    #[test]
    fn the_last_variable_of_a_name_counts() {
        let image = settings(&json!({"Env": ["A=1", "PATH=/x", "nonsense", "=y", "A=2"]}));
        let wanted = Wanted {
            env: vec!["A=3=4".to_owned(), "HOME=/h".to_owned()],
            tty: true,
            ..Wanted::default()
        };
        let user = User {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
            home: "/root".to_owned(),
        };
        let env = environment(&image, &wanted, &user, "host").unwrap();
        assert_eq!(env, ["A=3=4", "HOME=/h", "HOSTNAME=host", "PATH=/x", "TERM=xterm"]);
        let long = format!("A={}", "x".repeat(LONGEST_STRING));
        assert!(
            check_strings([&long].into_iter())
                .unwrap_err()
                .to_string()
                .contains("too long")
        );
    }

    #[test]
    fn signals_are_known_by_names_and_numbers() {
        for (said, number) in [
            ("", Signal::TERM),
            ("SIGQUIT", Signal::QUIT),
            ("quit", Signal::QUIT),
            ("3", Signal::QUIT),
            ("SIGRTMIN+3", Signal::TERM),
            ("\u{1b}", Signal::TERM),
        ] {
            assert_eq!(settings(&json!({"StopSignal": said})).stop_signal(), number, "{said}");
        }
    }

    #[test]
    fn volumes_are_two_paths() {
        let volume: Volume = "/a:/b:ro".parse().unwrap();
        assert_eq!(
            (volume.host.to_str(), volume.container.as_str(), volume.read_only),
            (Some("/a"), "/b", true)
        );
        for bad in ["", "/a", "a:/b", "/a:b", "/a:/b:x", "/a:/b:ro:z"] {
            assert!(bad.parse::<Volume>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_user_has_no_capabilities() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("bin")).unwrap();
        fs::copy("/bin/sh", dir.path().join("bin/sh")).unwrap();
        let image = settings(&json!({"Cmd": ["sh"], "WorkingDir": "srv", "Hostname": "not a name"}));
        let spec = |user: &str| {
            let wanted = Wanted {
                user: Some(user.to_owned()),
                ..Wanted::default()
            };
            spec(&image, &wanted, dir.path(), "0123456789ab").unwrap()
        };
        let root = spec("0");
        assert_eq!(
            root["process"]["capabilities"]["effective"].as_array().unwrap().len(),
            CAPABILITIES.len()
        );
        assert_eq!(
            (&root["process"]["cwd"], &root["hostname"]),
            (&json!("/srv"), &json!("0123456789ab"))
        );
        let user = spec("1000:5");
        assert_eq!(user["process"]["capabilities"]["effective"], json!([]));
        assert_eq!(
            (&user["process"]["user"]["uid"], &user["process"]["user"]["gid"]),
            (&json!(1000), &json!(5))
        );
    }
}
