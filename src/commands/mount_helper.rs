//! `mount.tarblk`: what mount(8) runs for the filesystem type `tarblk`, so that layers can stand in fstab. In: the arguments
//! that mount(8) gives its helpers. Out: the same as arguments of `tarblk mount`.
//!
//! The program is the same under another name: a link to it in /sbin. Of the mount options, those that are called as an option
//! of `tarblk mount` are that one; all others are left to it as mount options.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::Path;

use clap::{ArgAction, CommandFactory as _};

use super::cli::Cli;

/// What the program is called when mount(8) runs it.
pub(super) const NAME: &str = "mount.tarblk";

/// How it is called.
const USAGE: &str = "usage: mount.tarblk SOURCE MOUNTPOINT [-sfnv] [-N NAMESPACE] [-o OPTIONS] [-t TYPE]";

/// mount(8)'s exit status for wrong usage.
pub(super) const USAGE_STATUS: u8 = 1;

/// mount(8)'s exit status for a mount that failed.
pub(super) const FAILED_STATUS: u8 = 32;

/// Options of `tarblk mount` that make no sense in fstab.
const NOT_IN_FSTAB: [&str; 4] = ["options", "foreground", "json", "help"];

/// Whether the program was called by that name.
pub(super) fn is_meant(program: Option<&OsStr>) -> bool {
    program.and_then(|program| Path::new(program).file_name()) == Some(OsStr::new(NAME))
}

/// What mount(8) wants.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Wanted {
    /// The arguments of `tarblk`, its name among them.
    pub(super) arguments: Vec<OsString>,
    /// Nothing is to be mounted, only looked at.
    pub(super) is_fake: bool,
}

/// Understands the arguments behind the program's name.
///
/// # Errors
/// In words for the person.
pub(super) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Wanted, String> {
    let mut arguments = arguments.into_iter();
    let (mut places, mut options, mut verbose, mut is_fake) = (Vec::new(), Vec::new(), false, false);
    while let Some(argument) = arguments.next() {
        let bytes = argument.as_bytes();
        let Some(flags) = bytes.strip_prefix(b"-").filter(|flags| !flags.is_empty()) else {
            places.push(argument);
            continue;
        };
        for (at, flag) in flags.iter().enumerate() {
            match flag {
                // Options that are not understood (sloppy) are ext4's business; there is no mtab any more.
                b's' | b'n' => {}
                b'f' => is_fake = true,
                b'v' => verbose = true,
                b'o' | b't' | b'N' => {
                    let attached = &flags[at + 1..];
                    let value = if attached.is_empty() {
                        arguments.next().ok_or(USAGE)?
                    } else {
                        OsStr::from_bytes(attached).to_owned()
                    };
                    match flag {
                        b'o' => options.push(value),
                        b'N' => return Err("-N: other mount namespaces are not supported; use nsenter(1)".to_owned()),
                        _ => {}
                    }
                    break;
                }
                _ => return Err(format!("-{}; {USAGE}", flag.escape_ascii())),
            }
        }
    }
    let [source, dir] = <[OsString; 2]>::try_from(places).map_err(|_| USAGE.to_owned())?;
    let mut out: Vec<OsString> = vec!["tarblk".into(), "mount".into()];
    if verbose {
        out.push("-v".into());
    }
    for option in options
        .iter()
        .flat_map(|list| list.as_bytes().split(|byte| *byte == b','))
    {
        out.extend(translated(option));
    }
    out.extend(["--".into(), source, dir]);
    Ok(Wanted {
        arguments: out,
        is_fake,
    })
}

/// One mount option as arguments of `tarblk mount`.
fn translated(option: &[u8]) -> Vec<OsString> {
    let own = |bytes: &[u8]| OsString::from_vec(bytes.to_vec());
    let (name, value) = match option.iter().position(|byte| *byte == b'=') {
        Some(at) => (&option[..at], Some(&option[at + 1..])),
        None => (option, None),
    };
    // mount(8) says it of whatever is not said to be read-only.
    if option == b"rw" || option.is_empty() {
        return Vec::new();
    }
    let mut mount = Cli::command();
    let mount = mount.find_subcommand_mut("mount").expect("there is a command mount");
    let known = mount.get_arguments().find(|argument| {
        argument
            .get_long()
            .is_some_and(|long| long.as_bytes() == name && !NOT_IN_FSTAB.contains(&long))
    });
    match (known.map(clap::Arg::get_action), value) {
        (Some(ArgAction::SetTrue), None) => vec![own(&[b"--", name].concat())],
        (Some(ArgAction::Set | ArgAction::Append), Some(_)) => vec![own(&[b"--", option].concat())],
        _ => vec!["-o".into(), own(option)],
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::cli::Command;
    use super::*;

    fn parsed(line: &str) -> Result<Wanted, String> {
        parse(line.split(' ').map(OsString::from))
    }

    #[test]
    fn it_is_known_by_its_name() {
        let meant = |name: &str| is_meant(Some(OsStr::new(name)));
        assert!(meant("/sbin/mount.tarblk") && meant("mount.tarblk"));
        assert!(!meant("/usr/bin/tarblk") && !meant("") && !is_meant(None));
    }

    #[test]
    fn what_mount_says_becomes_what_tarblk_takes() {
        let wanted = parsed(
            "docker://host/app:1 /mnt/app -sn -v -o rw,noexec,nofail,_netdev,cache=/var/c,index=require,fetch-all,deadline=30s \
             -obackend=loop,pull=missing,errors=continue,trust=registry,trust-key=/k/a.pub,trust-key=/k/b.pub -t tarblk",
        );
        let wanted = wanted.unwrap();
        assert!(!wanted.is_fake);
        let cli = Cli::try_parse_from(&wanted.arguments).unwrap();
        let Command::Mount(args) = cli.command else {
            panic!("a mount")
        };
        assert_eq!(
            (args.layer.source.as_str(), args.dir.to_str().unwrap()),
            ("docker://host/app:1", "/mnt/app")
        );
        assert_eq!(args.options, ["noexec", "nofail", "_netdev", "errors=continue"]);
        assert_eq!(args.layer.cache.unwrap().to_str(), Some("/var/c"));
        assert_eq!(args.layer.index, crate::open::IndexChoice::Require);
        assert_eq!(
            args.layer.registry.trust,
            Some(crate::commands::cli::TrustArg::Registry)
        );
        assert_eq!(args.layer.registry.trust_key.len(), 2);
        assert!(args.fetch_all && cli.talk.verbose == 1 && !args.foreground);
        assert_eq!(args.device.fetch.deadline, Some(std::time::Duration::from_secs(30)));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (line, word) in [
            ("x.tar", "usage"),
            ("x.tar /a /b", "usage"),
            ("x.tar /a -o", "usage"),
            ("x.tar /a -x", "-x"),
            ("x.tar /a -N /proc/1/ns/mnt", "-N"),
        ] {
            let said = parsed(line).unwrap_err();
            assert!(said.contains(word), "{line}: {said}");
        }
        assert!(parsed("x.tar /a -f").unwrap().is_fake);
        // What is not for fstab is a mount option like any other, which ext4 refuses.
        let json = parsed("x.tar /a -o json,foreground").unwrap().arguments;
        assert_eq!(json[2..6], ["-o", "json", "-o", "foreground"]);
    }
}
