//! `tarblk snapshotter setup`: what container engines have to be told, and whether they were. In: the engines that are installed here. Out:
//! fragments of configuration on standard output; with `--check` what was looked at, and failure if something is missing.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::bail;

use super::Session;
use super::cli::{EngineArg, SetupArgs};
use super::output::{print, println};
use super::snapshotter::config;
use crate::snapshotter::setup::{self, Engine, Finding, Places, Version};
use crate::snapshotter::{CONTAINERD, Config};

/// Where k3s has its containerd, and what it wrote for it.
const K3S_ADDRESS: &str = "/run/k3s/containerd/containerd.sock";
const K3S_CONFIG: &str = "/var/lib/rancher/k3s/agent/etc/containerd/config.toml";

const CONTAINERD_CONFIG: &str = "/etc/containerd/config.toml";

/// All that are looked for.
const ENGINES: [EngineArg; 4] = [
    EngineArg::Containerd,
    EngineArg::Docker,
    EngineArg::K3s,
    EngineArg::Podman,
];

impl EngineArg {
    const fn engine(self) -> Engine {
        match self {
            Self::Containerd => Engine::Containerd,
            Self::Docker => Engine::Docker,
            Self::K3s => Engine::K3s,
            Self::Podman => Engine::Podman,
        }
    }

    /// The program that says its version.
    const fn program(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Docker => "dockerd",
            Self::K3s => "k3s",
            Self::Podman => "podman",
        }
    }
}

/// What a program says; none if it is not there or fails.
fn said(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn version_of(engine: EngineArg) -> Option<Version> {
    Version::find(&said(engine.program(), &["--version"])?)
}

/// `tarblk snapshotter setup`.
pub(super) fn run(args: &SetupArgs, session: Session) -> anyhow::Result<()> {
    let config = config(args.config.as_deref())?;
    let named = if args.engines.is_empty() {
        &ENGINES[..]
    } else {
        &args.engines
    };
    let mut found = Vec::new();
    for engine in named {
        match version_of(*engine) {
            Some(version) => found.push((*engine, version)),
            None if args.engines.is_empty() => {}
            None => bail!("there is no {} here that says its version", engine.program()),
        }
    }
    if found.is_empty() {
        bail!("neither containerd nor Docker, k3s or podman is installed here");
    }
    if args.check {
        return check(&found, args, &config);
    }
    show(&found, &config, session)
}

fn show(found: &[(EngineArg, Version)], config: &Config, session: Session) -> anyhow::Result<()> {
    let places = Places {
        address: &config.address,
        root: &config.root,
        image_service: config.image_service.as_deref(),
        architecture: match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        },
    };
    let mut text = String::new();
    for (engine, version) in found {
        for step in setup::steps(engine.engine(), *version, &places) {
            let between = if text.is_empty() { "" } else { "\n" };
            text.extend([between, "# ", &step.what, ":\n", &step.text]);
        }
    }
    print(text)?;
    session
        .talk
        .note("nothing was written; afterwards `tarblk snapshotter setup --check` says whether it works");
    Ok(())
}

fn check(found: &[(EngineArg, Version)], args: &SetupArgs, config: &Config) -> anyhow::Result<()> {
    let has = |engine| found.iter().any(|(one, _)| *one == engine);
    let k3s = has(EngineArg::K3s) && !has(EngineArg::Containerd);
    let usual = |of_k3s: &str, other: &Path| if k3s { PathBuf::from(of_k3s) } else { other.to_owned() };
    let address = args.address.clone().unwrap_or_else(|| match &config.containerd {
        set if set != Path::new(CONTAINERD) => set.clone(),
        set => usual(K3S_ADDRESS, set),
    });
    let mut findings = vec![setup::check_snapshotter(&config.address)];
    if has(EngineArg::Containerd) || has(EngineArg::Docker) || k3s {
        let file = args.containerd_config.clone();
        let file = file.unwrap_or_else(|| usual(K3S_CONFIG, Path::new(CONTAINERD_CONFIG)));
        let file = file.display().to_string();
        let dumped = said("containerd", &["--config", &file, "config", "dump"]);
        findings.extend(setup::check_containerd(&address, dumped.as_deref()));
    }
    if has(EngineArg::Docker) {
        findings.push(docker());
    }
    let mut text = String::new();
    for Finding { good, text: seen } in &findings {
        text.extend([if *good { "ok   " } else { "NOT  " }, seen, "\n"]);
    }
    print(text)?;
    match findings.iter().filter(|finding| !finding.good).count() {
        0 => println("it works"),
        count => bail!("{count} of {} things are not as they have to be", findings.len()),
    }
}

/// Whether Docker keeps its images with the snapshotter.
fn docker() -> Finding {
    let driver = said("docker", &["info", "--format", "{{.Driver}}"]);
    let driver = driver.as_deref().map(str::trim).filter(|driver| !driver.is_empty());
    Finding {
        good: driver == Some(setup::PLUGIN),
        text: match driver {
            Some(setup::PLUGIN) => format!("Docker uses {}", setup::PLUGIN),
            Some(other) => {
                format!("Docker uses {other}: write what `tarblk snapshotter setup docker` prints, and restart it")
            }
            None => "Docker does not say what it uses: is it running?".to_owned(),
        },
    }
}
