//! `tarblk generate`: man pages and completions, made from the command definitions; units for systemd.

mod man;
mod systemd;

use std::path::Path;

use anyhow::{Context as _, bail};
use clap::builder::PossibleValuesParser;
use clap::{Command, CommandFactory};
use clap_complete::Shell;

use super::attach::from_anywhere;
use super::cli::{Cli, Generate};
use super::output::{print, write_out};
use crate::http::without_secrets;

/// What the shells are told besides the definitions: they cannot know what is attached.
const FOR_BASH: &str = include_str!("generate/complete.bash");
const FOR_ZSH: &str = include_str!("generate/complete.zsh");
const FOR_FISH: &str = include_str!("generate/complete.fish");

/// Arguments whose words a function of [`FOR_ZSH`] gives: command, argument, function.
const ZSH_WORDS: [(&str, &str, &str); 8] = [
    ("umount", "dir", "_tarblk_mounts"),
    ("detach", "devices", "_tarblk_names"),
    ("stats", "device", "_tarblk_names"),
    ("trace", "device", "_tarblk_names"),
    ("logs", "device", "_tarblk_names"),
    ("image", "index", "_tarblk_index"),
    ("attach", "index", "_tarblk_index"),
    ("mount", "index", "_tarblk_index"),
];

/// Writes what was asked for.
pub(super) fn run(what: &Generate) -> anyhow::Result<()> {
    match what {
        Generate::Man { dir } => write_pages(dir).with_context(|| format!("{}: cannot write man pages", dir.display())),
        Generate::Completions { shell } => {
            let script = completions(*shell);
            write_out(|out| out.write_all(script.as_bytes()))
        }
        Generate::Systemd(args) => {
            let program = std::env::current_exe().context("cannot find this program")?;
            // A unit can be read by everybody.
            if without_secrets(&args.source) != args.source {
                bail!(
                    "{}: a unit can be read by everybody, and the address holds secrets",
                    without_secrets(&args.source)
                );
            }
            print(systemd::unit(
                args,
                &from_anywhere(&args.source, &args.source),
                &program,
            )?)
        }
    }
}

/// The script that makes a shell complete tarblk's command lines.
pub(super) fn completions(shell: Shell) -> String {
    let generate = |mut command: Command| {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut command, "tarblk", &mut script);
        String::from_utf8_lossy(&script).into_owned()
    };
    match shell {
        Shell::Bash => generate(Cli::command()) + FOR_BASH,
        Shell::Fish => generate(Cli::command()) + FOR_FISH,
        Shell::Zsh => {
            // A single possible value stands in the script where the function's name has to be.
            let marked = ZSH_WORDS
                .iter()
                .fold(Cli::command(), |cli, (command, argument, function)| {
                    cli.mut_subcommand(*command, |command| {
                        command.mut_arg(*argument, |arg| {
                            arg.value_parser(PossibleValuesParser::new([*function]))
                        })
                    })
                });
            let script = ZSH_WORDS.iter().fold(generate(marked), |script, (_, _, function)| {
                script.replace(&format!("({function})"), function)
            });
            // Its first line says what the file is for.
            match script.split_once('\n') {
                Some((first, rest)) => format!("{first}\n\n{FOR_ZSH}{rest}"),
                None => script,
            }
        }
        other => {
            debug_assert!(
                matches!(other, Shell::Elvish | Shell::PowerShell),
                "{other} is not known"
            );
            generate(Cli::command())
        }
    }
}

fn write_pages(dir: &Path) -> std::io::Result<()> {
    for (name, page) in pages()? {
        std::fs::write(dir.join(name), page)?;
    }
    Ok(())
}

/// All man pages, `tarblk.1`, `tarblk-mount.1`, …: names and texts.
///
/// # Errors
/// None that is known.
pub(super) fn pages() -> std::io::Result<Vec<(String, String)>> {
    // `tarblk help` shows what the pages say.
    let mut tarblk = Cli::command().disable_help_subcommand(true);
    // Fills in what pages are named by.
    tarblk.build();
    man::pages(&tarblk)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_attached_is_completed_in_three_shells() {
        for (shell, words) in [
            (Shell::Bash, &["complete -F _tarblk_and_names"][..]),
            (
                Shell::Zsh,
                &[
                    "'--index=[",
                    ":FILE|URL|WORD:_tarblk_index'",
                    "Where it is mounted:_tarblk_mounts'",
                ],
            ),
            (Shell::Fish, &["-l index -r -F -a", "string match -v"]),
        ] {
            let script = completions(shell);
            for word in words {
                assert!(script.contains(word), "{shell}: {word}");
            }
        }
        assert!(completions(Shell::Zsh).starts_with("#compdef tarblk\n"));
    }
}
