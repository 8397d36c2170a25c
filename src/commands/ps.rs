//! `tarblk ps`: what is attached.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Session;
use super::attach::states;
use super::cli::PsArgs;
use super::output::{Table, print, println, write_out};
use crate::device::inventory::{self, Status};
use crate::fetch::trust;
use crate::quantity::{show_size, show_time};

/// `tarblk ps`.
pub(super) fn ps(args: &PsArgs, session: Session) -> anyhow::Result<()> {
    if args.images {
        return super::snapshotter::images(args, session);
    }
    let (listed, damaged) = inventory::list(&states())?;
    for error in damaged {
        log::warn!("{error}");
    }
    if args.json {
        return println(serde_json::to_string_pretty(&listed)?);
    }
    if args.names {
        return write_out(|out| {
            for line in &listed {
                writeln!(out, "{}", line.state.device.display())?;
                for dir in &line.mounts {
                    writeln!(out, "{}", dir.display())?;
                }
            }
            Ok(())
        });
    }
    if listed.is_empty() {
        session.talk.note("nothing is attached");
        return Ok(());
    }
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let mut table = Table::new(&[
        "DEVICE",
        "BACKEND",
        "STATUS",
        ">SIZE",
        ">UP",
        ">PID",
        "MOUNTED ON",
        "TRUST",
        "SOURCE",
        "LOG",
    ]);
    for line in &listed {
        let state = &line.state;
        let mounts: Vec<_> = line.mounts.iter().map(|path| path.display().to_string()).collect();
        table.row([
            state.device.display().to_string(),
            state.backend.to_string(),
            word(&line.status).into(),
            show_size(state.len),
            show_age(now.saturating_sub(state.since)),
            state.process.pid.to_string(),
            if mounts.is_empty() {
                "-".into()
            } else {
                mounts.join(", ")
            },
            match trust::in_short(&state.trust) {
                word if word.is_empty() => "-".into(),
                words => words,
            },
            state.source.clone(),
            state
                .log
                .as_ref()
                .map_or_else(|| "-".into(), |path| path.display().to_string()),
        ]);
    }
    print(table)?;
    for line in &listed {
        if let Some(why) = reason(&line.status) {
            session
                .talk
                .note(format_args!("{}: {why}", line.state.device.display()));
        }
    }
    Ok(())
}

/// How a device is, in the table's words.
pub(super) const fn word(status: &Status) -> &'static str {
    match status {
        Status::Serving => "serving",
        Status::Waiting { .. } => "waiting",
        Status::Degraded { .. } => "degraded",
        Status::Poisoned { .. } => "poisoned",
        Status::Silent => "not answering",
        Status::Dead => "dead",
    }
}

/// Why it is not well, in one line; none where the table's word says it.
fn reason(status: &Status) -> Option<String> {
    match status {
        Status::Waiting {
            why,
            waited_ms,
            left_ms,
        } => {
            let shown = |ms: &u64| show_time(Duration::from_millis(*ms));
            let next = match left_ms {
                0 => "a request is under way".to_owned(),
                left => format!("asking again in {}", shown(left)),
            };
            Some(format!("waiting for {}, {next}: {why}", shown(waited_ms)))
        }
        Status::Degraded { why } | Status::Poisoned { why } => Some(why.clone()),
        Status::Serving | Status::Silent | Status::Dead => None,
    }
}

/// An age in its biggest unit.
pub(super) fn show_age(secs: u64) -> String {
    match secs {
        0..60 => format!("{secs}s"),
        60..3600 => format!("{}m", secs / 60),
        3600..86_400 => format!("{}h", secs / 3600),
        _ => format!("{}d", secs / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_well_has_a_reason() {
        let waiting = |left_ms| Status::Waiting {
            why: "http://host/x: 503".to_owned(),
            waited_ms: 12_000,
            left_ms,
        };
        assert_eq!(
            reason(&waiting(30_000)).unwrap(),
            "waiting for 12.0 s, asking again in 30.0 s: http://host/x: 503"
        );
        assert!(reason(&waiting(0)).unwrap().contains("under way"));
        let degraded = Status::Degraded { why: "full".to_owned() };
        assert_eq!(
            (word(&degraded), reason(&degraded).as_deref()),
            ("degraded", Some("full"))
        );
        assert_eq!(reason(&Status::Serving), None);
    }

    #[test]
    fn ages() {
        assert_eq!(
            [0, 59, 60, 3599, 7200, 90_000].map(show_age),
            ["0s", "59s", "1m", "59m", "2h", "1d"]
        );
    }
}
