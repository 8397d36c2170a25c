//! Man pages. In: the command definitions. Out: pages for man(1), each with what a reader of man pages looks for: how it is
//! called with values, files, environment, exit status, other pages.

use std::fmt::Write as _;
use std::io;

use clap::{Arg, ArgAction, Command};
use clap_mangen::Man;

use crate::source::registry::DEFAULT_HOSTS_DIR;

/// The commands that deal with attached devices.
const DEVICE_COMMANDS: [&str; 10] = [
    "tarblk", "attach", "mount", "umount", "ps", "stats", "trace", "logs", "detach", "demo",
];

/// Pages of other programs, by command. Each command's page names the page above it and those beside it too.
const OTHER_PAGES: [(&str, &[&str]); 8] = [
    ("tarblk", &["mount(8)", "losetup(8)", "chroot(1)", "skopeo(1)"]),
    ("mount", &["mount(8)", "findmnt(8)", "chroot(1)"]),
    ("umount", &["umount(8)", "fuser(1)"]),
    ("attach", &["mount(8)", "losetup(8)"]),
    ("detach", &["losetup(8)"]),
    ("image", &["mount(8)", "e2fsck(8)"]),
    ("ls", &["tar(1)", "mtree(5)", "jq(1)"]),
    ("push", &["skopeo(1)"]),
];

/// All pages: file names and texts.
pub(super) fn pages(tarblk: &Command) -> io::Result<Vec<(String, String)>> {
    let mut pages = Vec::new();
    add(tarblk, None, &mut pages)?;
    Ok(pages)
}

fn add(command: &Command, above: Option<&Command>, pages: &mut Vec<(String, String)>) -> io::Result<()> {
    for below in shown(command) {
        add(below, Some(command), pages)?;
    }
    let name = format!("{}.1", page_name(command));
    pages.push((name, page(command, above)?));
    Ok(())
}

fn shown(command: &Command) -> impl Iterator<Item = &Command> {
    command.get_subcommands().filter(|below| !below.is_hide_set())
}

/// `tarblk-index-push`.
fn page_name(command: &Command) -> String {
    command
        .get_display_name()
        .unwrap_or_else(|| command.get_name())
        .to_owned()
}

fn page(command: &Command, above: Option<&Command>) -> io::Result<String> {
    let man = Man::new(command.clone().override_usage(synopsis(command)));
    let mut generated = Vec::new();
    man.render_title(&mut generated)?;
    // No words cut in two: names of options and files are to be read and copied whole.
    generated.extend_from_slice(b".nh\n.ad l\n");
    man.render_name_section(&mut generated)?;
    man.render_synopsis_section(&mut generated)?;
    man.render_description_section(&mut generated)?;
    man.render_options_section(&mut generated)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut generated)?;
    }
    let mut page = String::from_utf8_lossy(&generated).into_owned();
    let after = command.get_after_long_help().or_else(|| command.get_after_help());
    let after = after.map(ToString::to_string).unwrap_or_default();
    let (notes, examples) = split_examples(&after);
    if !notes.is_empty() {
        section(&mut page, "NOTES");
        page.push_str(&filled(notes));
    }
    if !examples.is_empty() {
        section(&mut page, "EXAMPLES");
        page.push_str(&verbatim(examples));
    }
    terms(&mut page, "FILES", &files(command));
    terms(&mut page, "ENVIRONMENT", &environment(command));
    terms(&mut page, "EXIT STATUS", &exit_status(command));
    section(&mut page, "SEE ALSO");
    page.push_str(&filled(&see_also(command, above)));
    if command.get_version().is_some() {
        let mut version = Vec::new();
        man.render_version_section(&mut version)?;
        page.push_str(&String::from_utf8_lossy(&version));
    }
    Ok(in_ascii(&page))
}

/// How the command is called, options with their values; a line for each form.
fn synopsis(command: &Command) -> String {
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
    let mut own = name.to_owned();
    let is_asked_for_help = |arg: &Arg| matches!(arg.get_id().as_str(), "help" | "version");
    let arguments = || {
        command
            .get_arguments()
            .filter(|arg| !arg.is_hide_set() && !is_asked_for_help(arg))
    };
    let mut written = 0;
    for arg in arguments().filter(|arg| !arg.is_positional()) {
        let _ = write!(own, " {}", option(arg));
        written += usize::from(!arg.is_global_set());
    }
    for arg in arguments().filter(|arg| arg.is_positional()) {
        let dashes = if arg.is_last_set() { "-- " } else { "" };
        let _ = write!(own, " {dashes}{arg}");
        written += 1;
    }
    if !command.has_subcommands() {
        return own;
    }
    let word = command.get_subcommand_value_name().unwrap_or("COMMAND");
    let further = format!("{name} <{word}> ...");
    if written == 0 {
        return further;
    }
    format!("{own}\n{further}")
}

/// `[-n|--lines <N>]`.
fn option(arg: &Arg) -> String {
    let long = arg.get_long().map(|long| format!("--{long}"));
    let short = arg.get_short().map(|short| format!("-{short}"));
    let mut names: Vec<String> = short.into_iter().chain(long).collect();
    if arg.get_action().takes_values()
        && let Some(last) = names.last_mut()
    {
        for value in arg.get_value_names().unwrap_or_default() {
            let _ = write!(last, " <{value}>");
        }
    }
    let repeated = match arg.get_action() {
        ArgAction::Count | ArgAction::Append => "...",
        _ => "",
    };
    if arg.is_required_set() {
        format!("{}{repeated}", names.join("|"))
    } else {
        format!("[{}]{repeated}", names.join("|"))
    }
}

/// What a help text says at its end: notes, and examples behind them.
fn split_examples(after: &str) -> (&str, &str) {
    for heading in ["Examples:\n", "Example:\n"] {
        if let Some((notes, examples)) = after.split_once(heading) {
            return (notes.trim_end(), examples);
        }
    }
    (after.trim_end(), "")
}

fn section(page: &mut String, name: &str) {
    let _ = writeln!(page, ".SH \"{name}\"");
}

/// A section of terms and what they mean; nothing if there are none.
fn terms(page: &mut String, name: &str, terms: &[(&str, &str)]) {
    if terms.is_empty() {
        return;
    }
    section(page, name);
    for (term, meaning) in terms {
        let _ = write!(page, ".TP\n\\fB{}\\fR\n{}", escaped(term), filled(meaning));
    }
}

/// Text that roff may fill; an empty line begins a paragraph.
fn filled(text: &str) -> String {
    let mut out = String::new();
    for line in text.lines() {
        match line.trim_end() {
            "" => out.push_str(".PP\n"),
            line => {
                let _ = writeln!(out, "{}", escaped(line));
            }
        }
    }
    out
}

/// Lines that stay as they are: a command that was wrapped could not be copied.
fn verbatim(text: &str) -> String {
    let lines = text
        .lines()
        .map(|line| escaped(line.strip_prefix("  ").unwrap_or(line)));
    let mut out = String::from(".nf\n");
    for line in lines {
        let _ = writeln!(out, "{line}");
    }
    out.push_str(".fi\n");
    out
}

/// A line in which roff sees nothing but text, and which can be copied from the page: quotes, hyphens and backslashes as typed.
fn escaped(line: &str) -> String {
    let mut out = String::with_capacity(line.len());
    if line.starts_with(['.', '\'']) {
        out.push_str("\\&");
    }
    for c in line.chars() {
        match c {
            '\\' => out.push_str("\\e"),
            '-' => out.push_str("\\-"),
            '\'' => out.push_str("\\(aq"),
            '`' => out.push_str("\\(ga"),
            '^' => out.push_str("\\(ha"),
            '~' => out.push_str("\\(ti"),
            c => out.push(c),
        }
    }
    out
}

fn has(command: &Command, argument: &str) -> bool {
    command.get_arguments().any(|arg| arg.get_id() == argument)
}

/// Of all commands together, or of one that has `argument`.
fn concerns(command: &Command, argument: &str) -> bool {
    command.get_name() == "tarblk" || has(command, argument)
}

fn is_about_devices(command: &Command) -> bool {
    DEVICE_COMMANDS.contains(&command.get_name())
}

fn reads_registries(command: &Command) -> bool {
    concerns(command, "creds")
}

fn keeps(command: &Command) -> bool {
    concerns(command, "cache") || matches!(command.get_name(), "ls" | "diff")
}

fn files(command: &Command) -> Vec<(&'static str, &'static str)> {
    let mut files = Vec::new();
    if keeps(command) {
        files.push((
            "/var/cache/tarblk, ~/.cache/tarblk",
            "What is kept, root's and a user's: indexes and fetched bytes. All of it may be deleted at any time.",
        ));
    }
    if is_about_devices(command) {
        files.push((
            "/run/tarblk",
            "State, control socket and log of each device, NAME.json, NAME.sock and NAME.log; gone when the device is.",
        ));
    }
    if reads_registries(command) {
        files.push((
            DEFAULT_HOSTS_DIR,
            "Mirrors, certificates and headers of registries, as containerd's hosts.toml files have them.",
        ));
        files.push((
            "$XDG_RUNTIME_DIR/containers/auth.json, ~/.config/containers/auth.json, ~/.docker/config.json",
            "Where podman, skopeo and Docker keep credentials for registries.",
        ));
    }
    files
}

fn environment(command: &Command) -> Vec<(&'static str, &'static str)> {
    let mut variables = Vec::new();
    if keeps(command) {
        variables.push(("TARBLK_CACHE", "The cache directory, where --cache names none."));
    }
    if reads_registries(command) {
        variables.push((
            "TARBLK_CREDS",
            "Credentials for the registry, where --creds gives none: USER:PASSWORD or @FILE.",
        ));
        variables.push((
            "TARBLK_ALLOW_PRIVATE_REDIRECTS",
            "When it is 1, servers on the internet may lead to addresses of private networks, as with --allow-private-redirects.",
        ));
        variables.push((
            "REGISTRY_AUTH_FILE",
            "The only file with credentials to look into, where --authfile names none.",
        ));
        variables.push((
            "DOCKER_CONFIG, XDG_RUNTIME_DIR, XDG_CONFIG_HOME",
            "Where other programs keep credentials.",
        ));
    }
    if is_about_devices(command) {
        variables.push((
            "TARBLK_STATE_DIR",
            "Where the state of devices is, in place of /run/tarblk.",
        ));
    }
    if reads_registries(command) || concerns(command, "source") {
        variables.push((
            "http_proxy, https_proxy, all_proxy, no_proxy",
            "Proxies, and hosts that are asked without one; in capitals too.",
        ));
        variables.push((
            "SSL_CERT_FILE, SSL_CERT_DIR",
            "Authorities that are believed, in place of the system's.",
        ));
    }
    if concerns(command, "scratch") {
        variables.push(("TMPDIR", "Where --scratch is, if nothing else is named; else /var/tmp."));
    }
    variables.push((
        "TARBLK_LOG_FORMAT",
        "json: each line of the log is a JSON object, of devices attached from then on too.",
    ));
    variables.push((
        "RUST_LOG",
        "What is logged, in the form of Rust's env_logger; --verbose is simpler.",
    ));
    variables
}

fn exit_status(command: &Command) -> Vec<(&'static str, &'static str)> {
    let success = match command.get_name() {
        "diff" => "It worked, whether there are differences or not.",
        "verify" => "The index is the layer's.",
        "bench" => "It worked; the command that was measured always ended with 0.",
        _ => "It worked, or whoever read the output had seen enough.",
    };
    vec![
        ("0", success),
        (
            "1",
            "It did not work; one line on standard error says what, where and what to do.",
        ),
        ("2", "It was not called in a way that makes sense."),
    ]
}

fn see_also(command: &Command, above: Option<&Command>) -> String {
    let mut pages: Vec<String> = Vec::new();
    let mut add = |page: &Command| pages.push(format!("{}(1)", page_name(page)));
    shown(command).for_each(&mut add);
    if let Some(above) = above {
        add(above);
        shown(above)
            .filter(|beside| beside.get_name() != command.get_name())
            .for_each(&mut add);
    }
    let name = command.get_name();
    let others = OTHER_PAGES
        .iter()
        .find(|(of, _)| *of == name)
        .map_or(&[][..], |(_, pages)| pages);
    pages.extend(others.iter().map(|page| (*page).to_owned()));
    pages.join(", ")
}

/// roff's input is ASCII; every other character has a name, and only those that read it through a converter (as `man` does)
/// do without.
fn in_ascii(page: &str) -> String {
    page.chars().fold(String::with_capacity(page.len()), |mut out, c| {
        if c.is_ascii() {
            out.push(c);
        } else {
            let _ = write!(out, "\\[u{:04X}]", u32::from(c));
        }
        out
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;
    use crate::commands::cli::Cli;

    #[test]
    fn pages_are_ascii_whatever_help_says() {
        assert_eq!(in_ascii("a … \u{1F600}\n"), "a \\[u2026] \\[u1F600]\n");
    }

    #[test]
    fn what_roff_would_take_for_its_own_is_text() {
        assert_eq!(escaped(".SH 'x' a-b\\"), "\\&.SH \\(aqx\\(aq a\\-b\\e");
        assert_eq!(verbatim("  one \\\n      two\n"), ".nf\none \\e\n    two\n.fi\n");
    }

    fn all(command: &Command, visit: &mut dyn FnMut(&Command)) {
        visit(command);
        command.get_subcommands().for_each(|below| all(below, visit));
    }

    #[test]
    fn calls_are_shown_with_values() {
        let mut cli = Cli::command();
        cli.build();
        let find = |name: &str| cli.find_subcommand(name).unwrap();
        let mount = synopsis(find("mount"));
        assert!(mount.starts_with("tarblk mount [--index <FILE|URL|WORD>]"), "{mount}");
        assert!(mount.ends_with(" <SOURCE> <MOUNTPOINT>"), "{mount}");
        assert!(synopsis(find("image")).contains(" -o|--output <FILE> "));
        assert!(synopsis(find("bench")).ends_with(" <SOURCE> -- <COMMAND>..."));
        let index = synopsis(find("index"));
        assert!(index.ends_with("\ntarblk index <ACTION> ..."), "{index}");
        assert_eq!(synopsis(find("generate")), "tarblk generate <COMMAND> ...");
    }

    #[test]
    fn examples_fit_a_terminal_of_80_columns() {
        all(&Cli::command(), &mut |command| {
            for help in [command.get_after_help(), command.get_after_long_help()]
                .into_iter()
                .flatten()
            {
                let help = help.to_string();
                for line in split_examples(&help).1.lines() {
                    assert!(line.chars().count() <= 80, "{}: {line}", command.get_name());
                }
            }
        });
    }
}
