//! Units for systemd that mount a layer. In: what to mount, where, with which options. Out: a unit's text and the name that its
//! file has to have.

use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, bail};

use crate::commands::cli::{SystemdArgs, UnitKind};

/// The unit as it is printed: its first line names its file.
pub(super) fn unit(args: &SystemdArgs, source: &str, program: &Path) -> anyhow::Result<String> {
    let dir = std::path::absolute(&args.dir).context("the current directory is unknown")?;
    let dir = text("the directory", dir.to_str())?;
    let program = text("this program's path", program.to_str())?;
    let source = text("the source", Some(source))?;
    for option in &args.options {
        text("an option", Some(option))?;
    }
    let name = escaped_path(dir);
    let remote = source.contains("://");
    let (file, body) = match args.kind {
        UnitKind::Service => (
            format!("tarblk-{name}.service"),
            service(source, dir, program, &args.options),
        ),
        UnitKind::Mount => (format!("{name}.mount"), mount(source, dir, &args.options)),
    };
    let network = if remote {
        "Wants=network-online.target\nAfter=network-online.target\n"
    } else {
        ""
    };
    // The unit has no right to load modules.
    let drivers = ["fuse", "loop", "ublk_drv"]
        .map(|module| format!("modprobe@{module}.service"))
        .join(" ");
    let description = specifiers(source);
    let wanted_by = match args.kind {
        UnitKind::Mount if remote => "remote-fs.target",
        UnitKind::Mount => "local-fs.target",
        UnitKind::Service => "multi-user.target",
    };
    Ok(format!(
        "# /etc/systemd/system/{file}\n[Unit]\nDescription={description}\n{network}Wants={drivers}\nAfter={drivers}\n\n{body}{RIGHTS}\n[Install]\nWantedBy={wanted_by}\n"
    ))
}

/// What a unit's command and the service that it starts may do; the service keeps fewer capabilities. Nothing here gives the unit a
/// mount namespace of its own (as `ProtectSystem=` and `PrivateTmp=` do), in which alone its mount would be seen.
const RIGHTS: &str = "NoNewPrivileges=yes
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_SYS_RESOURCE CAP_IPC_LOCK CAP_DAC_READ_SEARCH CAP_SYS_PTRACE CAP_SETPCAP
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=mnt
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
";

/// What stands in a unit as it is: without control characters, which would end a line.
fn text<'t>(what: &str, text: Option<&'t str>) -> anyhow::Result<&'t str> {
    match text {
        Some(text) if !text.chars().any(char::is_control) => Ok(text),
        _ => bail!("{what} has characters that no unit can hold"),
    }
}

/// The mount stays as long as the service runs; stopping it unmounts.
fn service(source: &str, dir: &str, program: &str, options: &[String]) -> String {
    let mut line = quoted(program);
    let words = ["mount", "--foreground"].into_iter().map(str::to_owned);
    let options = options.iter().flat_map(|option| ["-o".to_owned(), option.clone()]);
    for word in words
        .chain(options)
        .chain(["--".to_owned(), source.to_owned(), dir.to_owned()])
    {
        let _infallible = write!(line, " {}", quoted(&word));
    }
    // Only the command itself is to be stopped: it unmounts, and what serves the device ends when that is gone. How long the
    // first mount takes only the network knows.
    format!(
        "[Service]\nType=notify\nExecStart={line}\nKillMode=process\nTimeoutStartSec=infinity\nRestart=on-failure\nRestartSec=5s\n"
    )
}

/// By mount(8), which runs `mount.tarblk`.
fn mount(source: &str, dir: &str, options: &[String]) -> String {
    let mut all = vec!["ro"];
    if source.contains("://") {
        all.push("_netdev");
    }
    all.extend(options.iter().map(String::as_str));
    // The first mount starts the service, which serves other devices too: it must not end with this unit.
    format!(
        "# Needs the link /sbin/mount.tarblk -> tarblk.\n[Mount]\nWhat={}\nWhere={}\nType=tarblk\nOptions={}\nTimeoutSec=infinity\nKillMode=process\n",
        specifiers(source),
        specifiers(dir),
        specifiers(&all.join(","))
    )
}

/// `%` begins a specifier.
fn specifiers(text: &str) -> String {
    text.replace('%', "%%")
}

/// A word of a command line in a unit (systemd.service(5), "Command lines").
fn quoted(word: &str) -> String {
    let word = specifiers(word).replace('$', "$$");
    let is_plain = |character: char| character.is_ascii_alphanumeric() || "/.:_-@%$=,+?&~!".contains(character);
    if !word.is_empty() && word.chars().all(is_plain) {
        return word;
    }
    format!("\"{}\"", word.replace('\\', "\\\\").replace('"', "\\\""))
}

/// A path as units are named after it (systemd-escape(1), `--path`).
fn escaped_path(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    if parts.is_empty() {
        return "-".to_owned();
    }
    let mut name = String::new();
    for (at, byte) in parts.join("/").bytes().enumerate() {
        match byte {
            b'/' => name.push('-'),
            b'.' if at == 0 => name.push_str("\\x2e"),
            byte if byte.is_ascii_alphanumeric() || b":_.".contains(&byte) => name.push(char::from(byte)),
            byte => {
                let _infallible = write!(name, "\\x{byte:02x}");
            }
        }
    }
    name
}

#[cfg(test)]
mod tests {
    use super::*;

    fn args(kind: UnitKind, dir: &str, options: &[&str]) -> SystemdArgs {
        SystemdArgs {
            source: String::new(),
            dir: dir.into(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            kind,
        }
    }

    #[test]
    fn units_are_named_as_systemd_names_them() {
        for (path, name) in [
            ("/", "-"),
            ("/mnt/app", "mnt-app"),
            ("//mnt//app/", "mnt-app"),
            ("/.hidden/a.b", "\\x2ehidden-a.b"),
            ("/mnt/my-app ü", "mnt-my\\x2dapp\\x20\\xc3\\xbc"),
        ] {
            assert_eq!(escaped_path(path), name);
        }
    }

    #[test]
    fn words_are_quoted_as_units_want_them() {
        for (word, unit) in [
            ("docker://host/app:1.2", "docker://host/app:1.2"),
            ("a b", "\"a b\""),
            ("100%", "100%%"),
            ("$HOME", "$$HOME"),
            ("say \"\\\"", "\"say \\\"\\\\\\\"\""),
            ("", "\"\""),
        ] {
            assert_eq!(quoted(word), unit);
        }
        let program = Path::new("/usr/bin/tarblk");
        let unit = |source: &str| unit(&args(UnitKind::Service, "/mnt/a b", &["noexec"]), source, program);
        let text = unit("docker://host/app:1").unwrap();
        assert!(
            text.starts_with("# /etc/systemd/system/tarblk-mnt-a\\x20b.service\n"),
            "{text}"
        );
        let line = "ExecStart=/usr/bin/tarblk mount --foreground -o noexec -- docker://host/app:1 \"/mnt/a b\"\n";
        assert!(text.contains(line), "{text}");
        assert!(unit("a\nExecStart=/bin/sh").is_err());
    }
}
