//! Devices that take the service down again and again are found out; the others go on.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use tarblk::internals::device::inventory::{self, Status};
use tarblk::internals::device::service::{self, Attached};
use tarblk::internals::device::volume::BlobReader;
use tarblk::internals::fetch::{LayerRange, Located, ReadCallback};

use super::device_cases::{Images, Lab, kill_and_wait, launcher, read_and_compare, service_pid_of, wait_until};
use super::read_all;

/// Aborts the process at a read of bytes that are far away, as long as there is a certain file.
#[derive(Debug)]
pub(crate) struct Treacherous {
    pub(crate) bytes: Arc<dyn BlobReader>,
    pub(crate) sign: PathBuf,
}

impl BlobReader for Treacherous {
    fn locate(&self, range: LayerRange) -> Located<'_> {
        self.bytes.locate(range)
    }

    fn read(&self, ranges: Vec<LayerRange>, waiter: Box<dyn ReadCallback>) {
        if self.sign.exists() {
            std::process::abort();
        }
        self.bytes.read(ranges, waiter);
    }
}

/// What is said of a device that was set aside.
fn verdict(lab: &Lab, device: &Attached) -> Option<String> {
    let (listed, _) = inventory::list(&lab.states()).unwrap();
    let line = listed.into_iter().find(|line| line.state.name == device.state.name)?;
    match line.status {
        Status::Poisoned { why } => Some(why),
        _ => None,
    }
}

/// Has `bad` take the service down with `begin`, beside a good device under a reader, until it is set aside.
fn is_found_out(lab: &Lab, good: &Attached, bad: &Attached, begin: impl FnOnce()) {
    let content = read_all(&lab.image());
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_and_compare(&good.state.device, &content, 7, &stop));
        begin();
        let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            wait_until("a verdict", || {
                verdict(lab, bad).is_some_and(|why| why.contains("again and again"))
            });
        }));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        found.unwrap();
        assert!(reader.join().expect("the good device's reader failed") > 0);
    });
    assert_eq!(verdict(lab, good), None);
    let device = File::open(&bad.state.device).unwrap();
    rustix::fs::fadvise(&device, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let read = device.read_exact_at(&mut [0; 4096], 8 << 20);
    assert_eq!(read.unwrap_err().raw_os_error(), Some(5), "EIO");
    drop(device);
    // Also after another death, of which it is innocent.
    kill_and_wait(service_pid_of(lab, good));
    assert!(read_all(&good.state.device) == content);
    wait_until("the same verdict", || verdict(lab, bad).is_some());
    for device in [bad, good] {
        inventory::detach(&lab.states(), &device.state.device).unwrap();
    }
    lab.assert_clean();
}

pub(crate) fn a_device_whose_image_crashes_the_service_is_set_aside() {
    let lab = Lab::new();
    let good = lab.attach();
    let bad = service::launch::<Images>(&launcher(), &lab.spec(Some(1), Some("abort-again"))).unwrap();
    // The first service was a command's child, whose end nobody looked at; from the next one on it is a crash.
    is_found_out(&lab, &good, &bad, || kill_and_wait(service_pid_of(&lab, &good)));
}

pub(crate) fn a_device_whose_reads_crash_the_service_is_set_aside() {
    let lab = Lab::new();
    let good = lab.attach();
    let bad = service::launch::<Images>(&launcher(), &lab.spec(Some(1), Some("abort-on-read"))).unwrap();
    let path = bad.state.device.clone();
    let mut reader = None;
    is_found_out(&lab, &good, &bad, || {
        fs::write(lab.image().with_extension("sign"), "").unwrap();
        // Ends with an error when the device is set aside.
        reader = Some(std::thread::spawn(move || fs::read(path).map(|bytes| bytes.len())));
    });
    assert!(reader.unwrap().join().unwrap().is_err());
}
