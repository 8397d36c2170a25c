//! The processes that serve devices, the service and its keepers, by where their states are; and their end.

#![allow(dead_code, clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

use std::fs;
use std::path::Path;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// Those whose directory of states is `dir`, or lies below it.
pub(crate) fn below(dir: &Path) -> Vec<i32> {
    let serves = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let mut words = line.split(|&byte| byte == 0).map(String::from_utf8_lossy);
        // It is followed by the word for a service or a keeper, and by the directory.
        words.any(|word| word == "serve-devices")
            && words.nth(1).is_some_and(|states| Path::new(&*states).starts_with(dir))
    };
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter(serves).collect()
}

/// Kills all of `pids` at once: none of them notices the others' end, and starts anything.
pub(crate) fn kill(pids: &[i32]) {
    for signal in [Signal::STOP, Signal::KILL] {
        for pid in pids.iter().filter_map(|pid| Pid::from_raw(*pid)) {
            let _ = kill_process(pid, signal);
        }
    }
}

/// Kills all of [`below`], until nothing is left to start another.
pub(crate) fn kill_below(dir: &Path) {
    for _ in 0..500 {
        let servers = below(dir);
        if servers.is_empty() {
            return;
        }
        kill(&servers);
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("something goes on serving");
}
