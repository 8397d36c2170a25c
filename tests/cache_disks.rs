//! The disk cache of whole commands on disks that are small, full, read-only or without inodes, in directories of others, and in one
//! that is emptied under a device: what is read is right, and the cache keeps to its limit.

#![cfg(feature = "command")]
#![allow(clippy::unwrap_used, clippy::missing_panics_doc, clippy::panic)]

mod common;
mod lab;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use common::noise::noise;
use lab::{Lab, devices, root, text};
use tarblk::internals::bench::origin::Origin;

/// A tar of one file of `len` bytes.
fn tar_of(len: usize, seed: u64) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(u64::try_from(len).unwrap());
    tar.append_data(&mut header, "file", noise(len, seed).as_slice())
        .unwrap();
    tar.into_inner().unwrap()
}

/// A lab with an origin of layers `1.tar`, `2.tar`..., and what their images have to be in `1.ext4`, `2.ext4`...
fn lab_with(layers: u64, len: usize) -> (Lab, Origin) {
    let lab = Lab::new();
    let origin = Origin::start().unwrap();
    for n in 1..=layers {
        let tar = tar_of(len, n);
        fs::write(lab.path("local.tar"), &tar).unwrap();
        lab.good(&["image", "local.tar", "-o", &format!("{n}.ext4"), "--no-cache"]);
        origin.serve_blob(&format!("/{n}.tar"), tar);
    }
    (lab, origin)
}

/// Disk space of all below a directory, in bytes.
fn disk_bytes(dir: &Path) -> u64 {
    let mut sum = 0;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        // What goes while this looks takes nothing.
        let Ok(meta) = entry.path().symlink_metadata() else {
            continue;
        };
        sum += meta.blocks() * 512;
        if meta.is_dir() {
            sum += disk_bytes(&entry.path());
        }
    }
    sum
}

/// A filesystem in memory, until it is dropped.
struct Mounted(std::path::PathBuf);

impl Mounted {
    fn on(dir: &Path) -> Self {
        fs::create_dir(dir).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("none", dir, c"tmpfs", flags, c"size=99m,mode=700").unwrap();
        Self(dir.to_owned())
    }

    /// What is taken of it, in bytes, files without names included, and all of it at one moment: files that are looked at one after
    /// the other change meanwhile.
    fn taken(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.0).unwrap();
        (stat.f_blocks - stat.f_bfree) * stat.f_frsize
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

#[test]
fn the_limit_holds_at_every_moment() {
    const LIMIT: u64 = 10 << 20;
    if !root("a cache on a filesystem of its own") {
        return;
    }
    let (lab, origin) = lab_with(2, 24 << 20);
    let (stop, disk) = (AtomicBool::new(false), Mounted::on(&lab.path("cache")));
    let read = |n: u64| {
        let url = origin.url(&format!("/{n}.tar"));
        let output = lab.run(&["image", &url, "-o", "out", "--cache-size", "10MiB"]);
        let is_right = || fs::read(lab.path("out")).unwrap() == fs::read(lab.path(&format!("{n}.ext4"))).unwrap();
        if output.status.success() && is_right() {
            Ok(())
        } else {
            Err(text(&output.stderr))
        }
    };
    let (most, outcome) = std::thread::scope(|scope| {
        let sampler = scope.spawn(|| {
            let mut most = 0;
            while !stop.load(Ordering::Relaxed) {
                most = most.max(disk.taken());
            }
            most
        });
        let outcome = [1, 2, 1].into_iter().try_for_each(read);
        stop.store(true, Ordering::Relaxed);
        (sampler.join().unwrap(), outcome)
    });
    outcome.unwrap();
    assert!(most <= LIMIT, "{most} bytes were on disk");
    // And something is kept.
    assert!(most > LIMIT / 2, "at most {most} bytes were on disk");
    let usage = lab.json(&["cache", "du", "--json"]);
    assert!(usage["total"].as_u64().unwrap() <= LIMIT, "{usage}");
}

#[test]
fn a_disk_that_takes_little_or_nothing_costs_the_cache_alone() {
    if !root("a disk that takes nothing") {
        return;
    }
    let (lab, origin) = lab_with(1, 9 << 20);
    let url = origin.url("/1.tar");
    fs::create_dir(lab.path("small")).unwrap();
    for (what, prepared) in [
        ("small", "mount -t tmpfs -o size=3m,mode=700 none small"),
        (
            "full",
            "mount -t tmpfs -o size=1m,mode=700 none small; dd if=/dev/zero of=small/fill bs=64k count=99 2>/dev/null || true",
        ),
        (
            "few inodes",
            "mount -t tmpfs -o size=99m,nr_inodes=6,mode=700 none small",
        ),
        (
            "no inodes",
            "mount -t tmpfs -o size=99m,nr_inodes=2,mode=700 none small",
        ),
        ("read-only", "mount -t tmpfs -o mode=700,ro none small"),
        (
            "read-only, with an index",
            "mount -t tmpfs -o mode=700 none small; $TARBLK ls URL >/dev/null; mount -o remount,ro small",
        ),
    ] {
        let prepared = prepared.replace("URL", &url);
        // Twice: the second time there may be something there.
        let script = format!(
            "{prepared}
            $TARBLK image {url} -o out --cache small/cache; cmp out 1.ext4; rm out
            $TARBLK image {url} -o out --cache small/cache; cmp out 1.ext4; rm out
            $TARBLK cache ls --cache small/cache >/dev/null"
        );
        let output = lab.apart(&script);
        assert!(output.status.success(), "{what}: {}", text(&output.stderr));
    }
    // What a disk has that became read-only is used.
    origin.settle();
    let before = origin.counters().bytes;
    let output = lab.apart(&format!(
        "mount -t tmpfs -o mode=700 none small
        $TARBLK image {url} -o out --cache small/cache; rm out
        mount -o remount,ro small
        $TARBLK image {url} -o out --cache small/cache; cmp out 1.ext4"
    ));
    assert!(output.status.success(), "{}", text(&output.stderr));
    origin.settle();
    let sent = origin.counters().bytes - before;
    assert!(
        sent < 10 << 20,
        "{sent} bytes were sent for one layer of 9 MiB, read twice"
    );
}

#[test]
fn a_large_disk_with_little_room_keeps_what_it_has_room_for() {
    if !root("a filesystem of its own") {
        return;
    }
    if let Some(why) = common::no_loop_mounts() {
        return common::skip("a_large_disk_with_little_room_keeps_what_it_has_room_for", why);
    }
    let (lab, origin) = lab_with(1, 9 << 20);
    let url = origin.url("/1.tar");
    // Of 64 GiB, 2 are left: less than a twentieth, and more than anyone needs. Then half of one is.
    for (left, is_kept) in [("2G", true), ("512M", false)] {
        origin.settle();
        let before = origin.counters().bytes;
        let output = lab.apart(&format!(
            "truncate -s 64G disk; mkfs.ext4 -q -m 0 -O ^has_journal -T largefile4 disk; mkdir -p large; mount -o loop disk large
            left() {{ echo $(($(stat -f -c '%a * %S' large))); }}
            fallocate -l $(($(left) - $(numfmt --from=iec {left}))) large/others || {{ echo others >&2; exit 1; }}
            $TARBLK image {url} -o out --cache large/cache; cmp out 1.ext4; rm out
            $TARBLK image {url} -o out --cache large/cache; cmp out 1.ext4; rm out
            umount large; rm disk"
        ));
        assert!(output.status.success(), "{left}: {}", text(&output.stderr));
        origin.settle();
        let sent = origin.counters().bytes - before;
        assert_eq!(
            sent < 10 << 20,
            is_kept,
            "{left}: {sent} bytes were sent for 9 MiB, read twice"
        );
    }
}

/// The user who has nothing.
const NOBODY: u32 = 65534;

#[test]
fn directories_of_other_users_are_refused() {
    if !root("directories of others") {
        return;
    }
    let (lab, origin) = lab_with(1, 1 << 20);
    let url = origin.url("/1.tar");
    let victim = lab.path("victim");
    fs::write(&victim, "precious").unwrap();
    let cache = lab.path("evil");
    for theirs in ["", "layers", "index", "hot", "small", "names"] {
        let dir = cache.join(theirs);
        fs::create_dir_all(&dir).unwrap();
        for n in 0..50 {
            symlink(&victim, dir.join(format!("{n:064x}.map"))).unwrap();
            symlink(lab.path("made-by-root"), dir.join(format!("{n:064x}.data"))).unwrap();
        }
        std::os::unix::fs::chown(&dir, Some(NOBODY), None).unwrap();
        for command in [
            &["image", &url, "-o", "out", "--cache", "evil"][..],
            &["cache", "gc", "--cache", "evil"],
        ] {
            let said = lab.bad(command, 1);
            assert!(said.contains("belongs to user 65534"), "{theirs}: {said}");
        }
        assert_eq!(fs::read(&victim).unwrap(), b"precious", "{theirs}");
        assert!(
            !lab.path("made-by-root").exists() && !lab.path("out").exists(),
            "{theirs}"
        );
        fs::remove_dir_all(&cache).unwrap();
    }
    // Planted in one's own directory, as by an older, worse version: a file of another user is not believed, and a link not followed.
    lab.good(&["image", &url, "-o", "out", "--cache", "evil"]);
    for kind in ["data", "map"] {
        for entry in fs::read_dir(cache.join("layers")).unwrap().flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|it| it == kind) {
                std::os::unix::fs::chown(&path, Some(NOBODY), None).unwrap();
            }
        }
        fs::remove_file(lab.path("out")).unwrap();
        lab.good(&["image", &url, "-o", "out", "--cache", "evil"]);
        assert!(
            fs::read(lab.path("out")).unwrap() == fs::read(lab.path("1.ext4")).unwrap(),
            "{kind}"
        );
    }
}

#[test]
fn a_directory_that_is_emptied_or_deleted_under_a_device_is_filled_again() {
    let Some(_devices) = devices("an emptied cache") else {
        return;
    };
    let (lab, origin) = lab_with(1, 12 << 20);
    let url = origin.url("/1.tar");
    let device = lab.good(&["attach", &url, "--memory", "1MiB"]);
    let device = device.trim();
    let read = |what: &str| {
        let output = lab.apart(&format!("dd if={device} iflag=direct bs=1M status=none | cmp - 1.ext4"));
        assert!(output.status.success(), "{what}: {}", text(&output.stderr));
    };
    let held = || {
        let stats = lab.json(&["stats", device, "--json"]);
        stats["counters"]["fetch"]["bytes_held"].as_u64().unwrap()
    };
    read("at first");
    for (what, script) in [
        ("emptied", "rm -f cache/layers/*"),
        ("deleted", "rm -rf cache/layers"),
        ("cut", "truncate -s 1M cache/layers/*.data"),
        ("moved away and back", "mv cache elsewhere; sleep 1; mv elsewhere cache"),
    ] {
        assert!(lab.apart(script).status.success(), "{what}");
        read(what);
        // Some is in memory, and what was lost is found out when the map is written next.
        let mut files = 0;
        for _ in 0..600 {
            read(what);
            files = disk_bytes(&lab.path("cache"));
            if held() > 6 << 20 && files > 6 << 20 {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        assert!(
            held() > 6 << 20 && files > 6 << 20,
            "{what}: {} held, {files} on disk",
            held()
        );
    }
    // All of it: where the service is confined to the directory that was there, it makes no other, and says so.
    // What is lost is fetched and written again, which is when it shows.
    assert!(
        lab.apart("truncate -s 1M cache/layers/*.data; rm -rf cache")
            .status
            .success()
    );
    let trouble = || {
        let stats = lab.json(&["stats", device, "--json"]);
        !stats["counters"]["fetch"]["cache_trouble"].is_null() || disk_bytes(&lab.path("cache")) > 6 << 20
    };
    for _ in 0..600 {
        read("all deleted");
        if trouble() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(trouble());
    // For the next device the service is started anew, and may write to the directory that is there then.
    let other = lab.good(&["attach", &url, "--memory", "1MiB"]);
    let kept = || disk_bytes(&lab.path("cache")) > 6 << 20;
    for _ in 0..600 {
        read("attached once more");
        if kept() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(kept());
    lab.good(&["detach", device, other.trim()]);
    lab.assert_nothing_served();
    lab.good(&["cache", "verify"]);
}
