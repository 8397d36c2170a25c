//! A pod by the CRI, as a kubelet makes one: a sandbox, a container in it, its end and what it wrote. Of the messages of `runtime.v1`
//! here is what this takes.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use prost::Message;

use super::client::Client;
use super::containerd::ImageSpec;

/// How long a container may run.
const PATIENCE: Duration = Duration::from_secs(60);

/// `NamespaceMode.NODE`: no network of the pod's own, which would take plug-ins.
const NODE: i32 = 2;

/// `ContainerState.CONTAINER_EXITED`.
const EXITED: i32 = 2;

#[derive(Clone, PartialEq, Eq, Message)]
struct SandboxMetadata {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "2")]
    uid: String,
    #[prost(string, tag = "3")]
    namespace: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct NamespaceOption {
    #[prost(int32, tag = "1")]
    network: i32,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct SecurityContext {
    #[prost(message, optional, tag = "1")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct LinuxSandbox {
    #[prost(message, optional, tag = "2")]
    security_context: Option<SecurityContext>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct SandboxConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<SandboxMetadata>,
    #[prost(string, tag = "3")]
    log_directory: String,
    #[prost(message, optional, tag = "8")]
    linux: Option<LinuxSandbox>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct RunSandbox {
    #[prost(message, optional, tag = "1")]
    config: Option<SandboxConfig>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct ContainerMetadata {
    #[prost(string, tag = "1")]
    name: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct LinuxContainer {
    #[prost(message, optional, tag = "2")]
    security_context: Option<ContainerSecurity>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct ContainerSecurity {
    #[prost(message, optional, tag = "3")]
    namespace_options: Option<NamespaceOption>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    command: Vec<String>,
    #[prost(string, tag = "11")]
    log_path: String,
    #[prost(message, optional, tag = "15")]
    linux: Option<LinuxContainer>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct CreateContainer {
    #[prost(string, tag = "1")]
    sandbox: String,
    #[prost(message, optional, tag = "2")]
    config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    sandbox_config: Option<SandboxConfig>,
}

/// Requests that name a sandbox or container, and answers that do.
#[derive(Clone, PartialEq, Eq, Message)]
struct Id {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct Nothing {}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct Status {
    #[prost(int32, tag = "3")]
    state: i32,
    #[prost(int32, tag = "7")]
    exit_code: i32,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
struct ContainerStatus {
    #[prost(message, optional, tag = "1")]
    status: Option<Status>,
}

fn call<A: Message + Default>(client: &Client, method: &str, request: &impl Message) -> A {
    let answers = client.call(&format!("/runtime.v1.RuntimeService/{method}"), request);
    answers
        .unwrap_or_else(|failed| panic!("{method}: {failed:?}"))
        .remove(0)
}

/// Runs a command in a pod of its own to its end; what it wrote. `logs` is a directory for that.
pub(crate) fn run(address: &Path, logs: &Path, image: &str, command: &[&str]) -> String {
    fs::create_dir_all(logs).unwrap();
    let client = Client::new(address);
    let options = Some(NamespaceOption { network: NODE });
    let sandbox_config = SandboxConfig {
        metadata: Some(SandboxMetadata {
            name: "pod".to_owned(),
            uid: "uid".to_owned(),
            namespace: "default".to_owned(),
        }),
        log_directory: logs.display().to_string(),
        linux: Some(LinuxSandbox {
            security_context: Some(SecurityContext {
                namespace_options: options,
            }),
        }),
    };
    let run = RunSandbox {
        config: Some(sandbox_config.clone()),
    };
    let sandbox: Id = call(&client, "RunPodSandbox", &run);
    let create = CreateContainer {
        sandbox: sandbox.id.clone(),
        config: Some(ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: "main".to_owned(),
            }),
            image: Some(ImageSpec {
                image: image.to_owned(),
            }),
            command: command.iter().map(|word| (*word).to_owned()).collect(),
            log_path: "log".to_owned(),
            linux: Some(LinuxContainer {
                security_context: Some(ContainerSecurity {
                    namespace_options: options,
                }),
            }),
        }),
        sandbox_config: Some(sandbox_config),
    };
    let container: Id = call(&client, "CreateContainer", &create);
    let _: Nothing = call(&client, "StartContainer", &container);
    let deadline = Instant::now() + PATIENCE;
    let exit_code = loop {
        let status: ContainerStatus = call(&client, "ContainerStatus", &container);
        match status.status {
            Some(status) if status.state == EXITED => break status.exit_code,
            _ => assert!(Instant::now() < deadline, "the container does not end"),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let log = fs::read_to_string(logs.join("log")).unwrap();
    assert_eq!(exit_code, 0, "{log}");
    let _: Nothing = call(&client, "StopPodSandbox", &sandbox);
    let _: Nothing = call(&client, "RemovePodSandbox", &sandbox);
    // `TIME stdout F LINE`, each.
    let lines = log.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
    lines.flat_map(|line| [line, "\n"]).collect()
}
