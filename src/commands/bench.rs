//! `tarblk bench`: the benchmark of the bench room, from arguments to report.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use indicatif::ProgressBar;

use super::cli::{BackendArg, BenchArgs, DeviceArgs, RowArg};
use super::output::{print, println};
use super::{Session, UsageError};
use crate::bench::origin::Link;
use crate::bench::{self, BenchOptions, BenchSource, Outcome, Row, Watch};
use crate::interrupt::Interrupt;
use crate::source::Source;
use crate::source::registry::ImageName;

/// What is measured without `--with` and `--without`, in the order of the results.
const USUAL: [Row; 4] = [Row::Empty, Row::Full, Row::Untar, Row::Loop];

/// All there is, in the order of the results.
const ALL: [Row; 6] = [Row::Empty, Row::Learned, Row::Walk, Row::Full, Row::Untar, Row::Loop];

/// `tarblk bench`.
pub(super) fn run(args: &BenchArgs, session: Session) -> anyhow::Result<()> {
    let options = options(args)?;
    let interrupt = Interrupt::catch().context("cannot catch signals")?;
    let outcome = measure(&options, &interrupt, session)?;
    if let Some(path) = &args.report {
        write_report(path, &outcome)?;
    }
    if args.json {
        println(serde_json::to_string_pretty(&outcome)?)
    } else {
        print(&outcome)
    }?;
    if let Some(path) = &args.report {
        session.talk.note(format_args!("report: {}", path.display()));
    }
    Ok(())
}

/// Runs the benchmark with its progress shown.
pub(super) fn measure(options: &BenchOptions, interrupt: &Interrupt, session: Session) -> anyhow::Result<Outcome> {
    let mut steps = Steps(session.talk.spinner("setting up"));
    let outcome = bench::run(options, interrupt, &mut steps);
    steps.0.finish_and_clear();
    Ok(outcome?)
}

/// Writes the report.
pub(super) fn write_report(path: &Path, outcome: &Outcome) -> anyhow::Result<()> {
    std::fs::write(path, bench::html(outcome)).with_context(|| format!("cannot write {}", path.display()))
}

struct Steps(ProgressBar);

impl Watch for Steps {
    fn step(&mut self, what: &str, done: u32, all: u32) {
        let counted = if all > 0 {
            format!("run {} of {all}: ", (done + 1).min(all))
        } else {
            String::new()
        };
        self.0.set_message(format!("{counted}{what}"));
    }
}

/// What the arguments mean together.
pub(super) fn options(args: &BenchArgs) -> anyhow::Result<BenchOptions> {
    let link = Link {
        rtt: args.rtt.unwrap_or(Duration::ZERO),
        rate: args.rate,
    };
    let parsed = Source::parse(&args.source)?;
    if args.index.is_some() && !matches!(parsed, Source::Url(_)) {
        return Err(UsageError("--index is for a URL; of what is here the indexes are made".into()).into());
    }
    let source = match parsed {
        Source::Path(path) => BenchSource::Local { path, link },
        Source::Image(ImageName::Layout(layout)) => BenchSource::Image { layout, link },
        Source::Image(ImageName::Registry(reference)) => BenchSource::Registry {
            reference,
            options: Box::new(args.registry.options()?),
            link,
        },
        Source::Url(_) => {
            if args.rtt.is_some() || args.rate.is_some() {
                return Err(
                    UsageError("--rtt and --rate simulate a link to a local layer; a URL has its own".into()).into(),
                );
            }
            BenchSource::Url {
                url: args.source.clone(),
                index: args.index.clone(),
            }
        }
    };
    let wanted = |row: &Row| {
        let named = |list: &[RowArg]| list.iter().any(|arg| Row::from(*arg) == *row);
        (USUAL.contains(row) || named(&args.with)) && !named(&args.without)
    };
    let rows: Vec<Row> = ALL.into_iter().filter(wanted).collect();
    if rows.is_empty() {
        return Err(UsageError("nothing is left to measure".into()).into());
    }
    Ok(BenchOptions {
        program: this_program()?,
        source,
        rows,
        runs: args.runs,
        mount_options: mount_options(&args.device),
        spacing: args.spacing,
        scratch: args.scratch.clone().unwrap_or_else(default_scratch),
        command: args.command.clone(),
    })
}

/// This very program, also when its file has been replaced since.
pub(super) fn this_program() -> anyhow::Result<PathBuf> {
    std::env::current_exe().context("cannot find this program")
}

/// On a disk, where a tmpfs would make the downloads look better than they are.
pub(super) fn default_scratch() -> PathBuf {
    std::env::var_os("TMPDIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

impl From<RowArg> for Row {
    fn from(row: RowArg) -> Self {
        match row {
            RowArg::Empty => Self::Empty,
            RowArg::Learned => Self::Learned,
            RowArg::Walk => Self::Walk,
            RowArg::Full => Self::Full,
            RowArg::Untar => Self::Untar,
            RowArg::Loop => Self::Loop,
        }
    }
}

/// The device's options as `tarblk mount` takes them.
fn mount_options(device: &DeviceArgs) -> Vec<OsString> {
    let backend = match device.backend {
        BackendArg::Auto => "auto",
        BackendArg::Ublk => "ublk",
        BackendArg::Loop => "loop",
    };
    let mut words = vec![
        format!("--backend={backend}"),
        format!("--connections={}", device.fetch.connections),
    ];
    words.extend(device.fetch.memory.map(|bytes| format!("--memory={bytes}")));
    words.extend(device.queues.map(|queues| format!("--queues={queues}")));
    words.extend(
        device
            .fetch
            .deadline
            .map(|deadline| format!("--deadline={}ns", deadline.as_nanos())),
    );
    words.into_iter().map(Into::into).collect()
}
