//! `tarblk install`: puts this program where a machine without a package for it looks for programs, with its units, settings, man pages and
//! completions; for machines whose packages are not Debian's, and for a container that installs onto its host. In: the machine's root
//! directory. Out: files below it; units that run, if asked.
//!
//! It never overwrites settings, and stops nothing that serves devices: those go over to the new program.

mod files;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use clap_complete::Shell;

use self::files::{Root, Written};
use super::Session;
use super::cli::InstallArgs;
use super::generate;
use crate::interrupt::Interrupt;

/// Where the units believe that the program is.
const PACKAGED: &str = "/usr/bin/tarblk";

/// Units by the names of their files.
const UNITS: [(&str, &str); 4] = [
    ("tarblk.service", include_str!("../../packaging/systemd/tarblk.service")),
    (
        "tarblk-snapshotter.service",
        include_str!("../../packaging/systemd/tarblk-snapshotter.service"),
    ),
    (
        "tarblk-snapshotter.socket",
        include_str!("../../packaging/systemd/tarblk-snapshotter.socket"),
    ),
    (
        "tarblk-podman.service",
        include_str!("../../packaging/systemd/tarblk-podman.service"),
    ),
];

/// Settings, in the machine's configuration directory; all lines of them are comments.
const SETTINGS: [(&str, &str); 3] = [
    ("tarblk.toml", include_str!("../../packaging/config/tarblk.toml")),
    (
        "snapshotter.toml",
        include_str!("../../packaging/config/snapshotter.toml"),
    ),
    ("keys.d/README", include_str!("../../packaging/config/keys.d/README")),
];

/// Where administrators' units are.
const UNIT_DIR: &str = "etc/systemd/system";

/// The name by which mount(8) calls the program.
const MOUNT_HELPER: &str = "sbin/mount.tarblk";

/// Where completions of each shell are, below the prefix.
const COMPLETIONS: [(Shell, &str); 3] = [
    (Shell::Bash, "share/bash-completion/completions/tarblk"),
    (Shell::Zsh, "share/zsh/site-functions/_tarblk"),
    (Shell::Fish, "share/fish/vendor_completions.d/tarblk.fish"),
];

/// `tarblk install`.
pub(super) fn run(args: &InstallArgs, session: Session) -> anyhow::Result<()> {
    if !args.prefix.is_absolute() {
        bail!("--prefix: {} is no absolute path", args.prefix.display());
    }
    if !rustix::process::geteuid().is_root() {
        bail!("only root can install; run it with sudo");
    }
    let interrupt = args
        .stay
        .then(Interrupt::catch)
        .transpose()
        .context("cannot catch signals")?;
    let root = Root::open(&args.root).with_context(|| format!("{}: cannot install there", args.root.display()))?;
    let program = args.prefix.join("bin/tarblk");
    if args.remove {
        return remove(args, &root, &program, session);
    }
    put_program(&root, &program)?;
    put_words(&root, &args.prefix)?;
    for (name, text) in UNITS {
        put(
            &root,
            &Path::new(UNIT_DIR).join(name),
            unit(text, &program)?.as_bytes(),
            0o644,
        )?;
    }
    for (name, text) in SETTINGS {
        let path = Path::new("etc/tarblk").join(name);
        match root.write_new(&path, text.as_bytes(), 0o644) {
            Ok(Written::New) => {}
            Ok(Written::WasThere) => log::info!("/{} is kept as it is", path.display()),
            Err(error) => return Err(error).with_context(|| cannot(&path)),
        }
    }
    let helper = Path::new(MOUNT_HELPER);
    root.link(helper, &program).with_context(|| cannot(helper))?;
    session.talk.note(format_args!(
        "{} {} is installed below {}",
        program.display(),
        env!("CARGO_PKG_VERSION"),
        args.root.display()
    ));
    if args.enable {
        enable(&args.root, session)?;
    } else {
        session
            .talk
            .note("to have it run: systemctl daemon-reload && systemctl enable --now tarblk tarblk-snapshotter");
    }
    if let Some(interrupt) = interrupt {
        session.talk.note("waiting to be ended; what was installed stays");
        interrupt.wait();
    }
    Ok(())
}

fn cannot(path: &Path) -> String {
    format!("cannot write /{}", path.display())
}

fn put(root: &Root, path: &Path, bytes: &[u8], mode: u32) -> anyhow::Result<()> {
    root.write(path, &mut &*bytes, mode).with_context(|| cannot(path))
}

/// This program itself, under its new name.
fn put_program(root: &Root, program: &Path) -> anyhow::Result<()> {
    let mut own = File::open("/proc/self/exe").context("cannot read this program")?;
    let path = below_root(program);
    root.write(path, &mut own, 0o755).with_context(|| cannot(path))
}

/// Man pages and completions.
fn put_words(root: &Root, prefix: &Path) -> anyhow::Result<()> {
    let prefix = below_root(prefix);
    for (name, page) in generate::pages().context("cannot make man pages")? {
        put(root, &prefix.join("share/man/man1").join(name), page.as_bytes(), 0o644)?;
    }
    for (shell, name) in COMPLETIONS {
        put(root, &prefix.join(name), generate::completions(shell).as_bytes(), 0o644)?;
    }
    Ok(())
}

/// A path without what makes it absolute.
fn below_root(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// A unit that runs the program from where it is.
fn unit(text: &str, program: &Path) -> anyhow::Result<String> {
    let program = program.to_str().filter(|path| {
        !path
            .chars()
            .any(|it| it.is_control() || it.is_whitespace() || "%$\"'\\".contains(it))
    });
    let program = program.context("--prefix: it has characters that a unit cannot name a program with")?;
    Ok(text.replace(PACKAGED, program))
}

/// Has the units run, by the systemd of the machine whose root directory it is; from then on that is this process's root directory, too.
fn enable(root: &Path, session: Session) -> anyhow::Result<()> {
    enter(root)?;
    if !has_systemd() {
        session
            .talk
            .note("no systemd runs there: have `tarblk service` and `tarblk snapshotter` started at boot by what does");
        return Ok(());
    }
    systemctl(&["daemon-reload"])?;
    systemctl(&[
        "enable",
        "tarblk.service",
        "tarblk-snapshotter.socket",
        "tarblk-snapshotter.service",
        "tarblk-podman.service",
    ])?;
    systemctl(&["start", "tarblk-snapshotter.socket"])?;
    // Both hand what is mounted over to the new program and end without touching it.
    systemctl(&["restart", "tarblk.service", "tarblk-snapshotter.service"])?;
    session
        .talk
        .note("its units run; `tarblk snapshotter setup` says what containerd needs to know");
    Ok(())
}

/// Whether the machine whose root directory this is, is started by systemd (`sd_booted(3)`).
fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Makes `root` this process's root directory.
fn enter(root: &Path) -> anyhow::Result<()> {
    let enter = || -> io::Result<()> {
        rustix::process::chroot(root)?;
        std::env::set_current_dir("/")
    };
    enter().with_context(|| format!("cannot change the root directory to {}", root.display()))
}

fn systemctl(arguments: &[&str]) -> anyhow::Result<()> {
    let done = Command::new("systemctl")
        .args(arguments)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .stdin(Stdio::null())
        .output()
        .context("cannot run systemctl")?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        bail!("systemctl {}: {}: {}", arguments.join(" "), done.status, said.trim());
    }
    Ok(())
}

/// Takes away what [`run`] put there, but for the settings.
fn remove(args: &InstallArgs, root: &Root, program: &Path, session: Session) -> anyhow::Result<()> {
    let mut all: Vec<PathBuf> = UNITS.iter().map(|(name, _)| Path::new(UNIT_DIR).join(name)).collect();
    let prefix = below_root(&args.prefix);
    all.extend(COMPLETIONS.iter().map(|(_, name)| prefix.join(name)));
    let pages = generate::pages().context("cannot make man pages")?;
    all.extend(pages.iter().map(|(name, _)| prefix.join("share/man/man1").join(name)));
    all.extend([MOUNT_HELPER.into(), below_root(program).to_owned()]);
    enter(&args.root)?;
    let systemd = has_systemd();
    if systemd {
        // What serves devices is no part of them, and stays until the last one is detached.
        let units = UNITS.map(|(name, _)| name);
        if let Err(error) = systemctl(&[&["disable", "--now"], &units[..]].concat()) {
            log::warn!("{error:#}");
        }
    }
    let mut gone = 0_usize;
    for path in all {
        let removed = root.remove(&path);
        gone += usize::from(removed.with_context(|| format!("cannot remove /{}", path.display()))?);
    }
    if systemd {
        systemctl(&["daemon-reload"])?;
    }
    session.talk.note(format_args!(
        "removed {gone} files; settings in /etc/tarblk, records and the cache stay"
    ));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshotter::Config;

    /// Lines of settings that show a default, without what makes them comments.
    fn shown(text: &str) -> String {
        let is_setting = |line: &&str| line.contains(" = ") || line.starts_with("[[");
        let lines = text.lines().filter_map(|line| line.strip_prefix("# "));
        lines.filter(is_setting).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn settings_show_what_can_be_set() {
        let [_, (_, text), _] = SETTINGS;
        let nothing: Config = toml::from_str(text).unwrap();
        assert_eq!(nothing, Config::default(), "all of it is comments");
        let shown: Config = toml::from_str(&shown(text)).unwrap();
        let same = Config {
            image_service: shown.image_service.clone(),
            cache: shown.cache.clone(),
            cache_size: shown.cache_size,
            memory: shown.memory,
            deadline: shown.deadline,
            authfile: shown.authfile.clone(),
            repository: shown.repository.clone(),
            ..Config::default()
        };
        assert_eq!(shown, same, "what has a default shows it");
        assert_eq!(shown.repository.len(), 1);
    }

    #[test]
    fn units_name_the_program_where_it_is() {
        for (name, text) in UNITS {
            let moved = unit(text, Path::new("/opt/tarblk/bin/tarblk")).unwrap();
            assert!(!moved.contains(PACKAGED), "{name}");
            let commands = |text: &str| text.lines().filter(|line| line.starts_with("Exec")).count();
            assert_eq!(
                moved.matches("/opt/tarblk/bin/tarblk").count(),
                commands(text),
                "{name}"
            );
        }
        for odd in ["/a b/tarblk", "/a%b", "/a\nb"] {
            unit(UNITS[0].1, Path::new(odd)).unwrap_err();
        }
    }
}
