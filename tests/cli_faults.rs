//! Whole commands where things go wrong: broken layers, indexes, servers, directories, disks and machines, signals, and
//! daemons that die. Each is one line that names the cause, exit 1, and nothing left behind.

mod lab;
#[path = "common/noise.rs"]
mod noise;
#[path = "common/wait.rs"]
mod wait;

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use lab::{Lab, devices, have, mounts_below, root, skip, text};
use noise::noise;
use rustix::process::{Pid, Signal, kill_process};
use tarblk::internals::bench::origin::{Fault, Link, Origin};
use wait::wait_until;

/// A header block with the given fields, its checksum right.
fn header(name: &str, size: &[u8], kind: u8, link: &str) -> Vec<u8> {
    let mut block = vec![0; 512];
    let mut put = |at: usize, bytes: &[u8]| block[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    put(100, b"0000644\0");
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    put(124, size);
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, &[kind]);
    put(157, link.as_bytes());
    put(257, b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

const EMPTY: &[u8] = b"00000000000\0";

/// A PAX header for what follows.
fn pax(key: &str, value: &str) -> Vec<u8> {
    let rest = format!(" {key}={value}\n");
    let mut len = rest.len();
    while format!("{len}{rest}").len() != len {
        len = format!("{len}{rest}").len();
    }
    let record = format!("{len}{rest}");
    let mut bytes = header("pax", format!("{:011o}\0", record.len()).as_bytes(), b'x', "");
    bytes.extend_from_slice(record.as_bytes());
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// These entries, then the end.
fn layer_of(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut tar = entries.concat();
    tar.extend([0; 1024]);
    tar
}

/// One good entry, then these, then the end.
fn layer(entries: &[Vec<u8>]) -> Vec<u8> {
    layer_of(&[&[header("good", EMPTY, b'0', "")][..], entries].concat())
}

fn base256(first: u8, rest: u8) -> Vec<u8> {
    let mut field = vec![rest; 12];
    field[0] = first;
    field
}

/// What is wrong, the tar, and what the message must say.
#[expect(clippy::too_many_lines, reason = "a list")]
fn broken_layers() -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let big = header("big", b"00000100000\0", b'0', "");
    let with_size = |size: &[u8]| layer(&[header("q", size, b'0', "")]);
    let mut corrupt = header("q", EMPTY, b'0', "");
    corrupt[150] ^= 1;
    let bomb = |number: i32| {
        [
            pax("path", &format!("{number}{}", "/a".repeat(2000))),
            header("q", EMPTY, b'0', ""),
        ]
        .concat()
    };
    vec![
        (
            "cut in a payload",
            [layer(&[])[..512].to_vec(), big, vec![1; 999]].concat(),
            "cut short",
        ),
        ("cut in a header", layer(&[])[..700].to_vec(), "cut short"),
        ("a wrong checksum", layer(&[corrupt]), "checksum"),
        ("a negative size", with_size(&base256(0xff, 0xff)), "negative"),
        ("a huge size", with_size(&base256(0x80, 0x7f)), "size"),
        ("a size past the end", with_size(b"777777777777"), "cut short"),
        ("no number as size", with_size(b"zz9000000000"), "size"),
        (
            "a negative PAX size",
            layer(&[pax("size", "-5"), header("q", EMPTY, b'0', "")]),
            "negative",
        ),
        (
            "an impossible PAX size",
            layer(&[pax("size", &"9".repeat(30)), header("q", EMPTY, b'0', "")]),
            "size",
        ),
        (
            "an endless long name",
            layer(&[header("q", b"77777777777\0", b'L', "")]),
            "extension header",
        ),
        (
            "an endless PAX header",
            layer(&[header("q", b"77777777777\0", b'x', "")]),
            "extension header",
        ),
        (
            "a path of 200,000 parts",
            layer(&[pax("path", &"d/".repeat(200_000)), header("q", EMPTY, b'5', "")]),
            "a path of 399999 bytes",
        ),
        (
            "a file from another volume",
            layer(&[header("q", EMPTY, b'M', "")]),
            "another volume",
        ),
        ("gzip", b"\x1f\x8b\x08 and so on".to_vec(), "gzip layer cannot be read"),
        ("lz4", b"\x04\x22\x4d\x18 and so on".repeat(99), "(`lz4 -d`)"),
        (
            "lz4 behind a skippable frame",
            [
                &b"\x50\x2a\x4d\x18\x04\0\0\0skip"[..],
                &b"\x04\x22\x4d\x18 and so on".repeat(99),
            ]
            .concat(),
            "compressed with lz4 (at byte 12)",
        ),
        ("xz", b"\xfd7zXZ\0 and so on".repeat(99), "(`xz -d`)"),
        (
            "a long path",
            layer(&[pax("path", &"d/".repeat(2049)), header("q", EMPTY, b'0', "")]),
            "a path of 4097 bytes",
        ),
        (
            "an archive of an image",
            layer_of(&[
                header("manifest.json", EMPTY, b'0', ""),
                header(&format!("{}.json", "0a".repeat(32)), EMPTY, b'0', ""),
                header(&format!("{}/layer.tar", "0b".repeat(32)), EMPTY, b'0', ""),
            ]),
            "skopeo copy docker-archive:",
        ),
        (
            "zstd",
            b"\x28\xb5\x2f\xfd and so on".repeat(99),
            "zstd layer is damaged",
        ),
        (
            "a long name",
            layer(&[pax("path", &"n".repeat(256)), header("q", EMPTY, b'0', "")]),
            "255",
        ),
        (
            "a bomb of paths",
            layer(&(0..800).map(bomb).collect::<Vec<_>>()),
            "bomb",
        ),
        (
            "a loop of symbolic links",
            layer(&[
                header("a", EMPTY, b'2', "b"),
                header("b", EMPTY, b'2', "a"),
                header("a/c", EMPTY, b'0', ""),
            ]),
            "loop",
        ),
        (
            "a loop of hard links",
            layer(&[header("a", EMPTY, b'1', "b"), header("b", EMPTY, b'1', "a")]),
            "hard link",
        ),
        (
            "a hard link out of the root",
            layer(&[header("a", EMPTY, b'1', "../../etc/passwd")]),
            "hard link",
        ),
        (
            "a file in the way",
            layer(&[header("good/q", EMPTY, b'0', "")]),
            "not a directory",
        ),
        (
            "control characters",
            layer(&[header("\u{1b}[31m\n", &base256(0xff, 0xff), b'0', "")]),
            "negative",
        ),
    ]
}

/// Who names an index by its digest gets that one or an error, wherever the index would come from.
#[test]
fn an_index_that_is_not_the_pinned_one_is_refused() {
    let lab = Lab::new();
    let mut tar = layer(&[header("a", EMPTY, b'0', "")]);
    tar.extend_from_slice(&[0; 1024]);
    fs::write(lab.path("layer.tar"), tar).unwrap();
    let other = format!("sha256:{}", "0".repeat(64));
    let made = ["image", "layer.tar", "-o", "out.ext4", "--no-cache", "--index-digest"];
    for index in ["auto", "ignore", "build"] {
        let said = lab.bad(&[&made[..], &[&other, "--index", index]].concat(), 1);
        assert!(said.contains("has to be sha256:0000"), "{index}: {said}");
        // What the message says it is, is what will do.
        let (_, rest) = said.split_once(" is sha256:").unwrap();
        let right = format!("sha256:{}", rest.split_once(' ').unwrap().0);
        lab.good(&[&made[..], &[&right, "--index", index]].concat());
    }
}

#[test]
fn broken_layers_are_named_and_leave_nothing() {
    let lab = Lab::new();
    for (what, tar, expected) in broken_layers() {
        fs::write(lab.path("broken.tar"), tar).unwrap();
        let before = lab.names();
        let said = lab.bad(&["image", "broken.tar", "-o", "out.ext4", "--no-cache"], 1);
        assert!(said.contains("broken.tar") && said.contains(expected), "{what}: {said}");
        assert!(!said.trim_end().contains(char::is_control), "{what}: {said:?}");
        assert!(said.len() < 1000 && !said.contains("panicked"), "{what}: {said}");
        assert_eq!(lab.names(), before, "{what}");
    }
}

#[test]
fn strange_layers_work() {
    let lab = Lab::new();
    let strange = [
        ("only an end", vec![0; 1024]),
        ("no end", header("good", EMPTY, b'0', "")),
        (
            "paths above the root",
            layer(&["../../x", "/y", "a/../../../z"].map(|path| header(path, EMPTY, b'0', ""))),
        ),
        // As GNU tar extracts them.
        ("a type that nobody knows", layer(&[header("q", EMPTY, b'Z', "")])),
        (
            "an owner nobody can have",
            layer(&[pax("uid", "99999999999"), header("q", EMPTY, b'0', "")]),
        ),
        (
            "a path of 2,000 parts",
            layer(&[pax("path", &"d/".repeat(2_000)), header("q", EMPTY, b'5', "")]),
        ),
    ];
    for (what, tar) in strange {
        fs::write(lab.path("strange.tar"), tar).unwrap();
        lab.good(&["image", "strange.tar", "-o", "out.ext4", "--no-cache"]);
        match Command::new("e2fsck").arg("-fn").arg(lab.path("out.ext4")).output() {
            Ok(checked) => assert!(checked.status.success(), "{what}: {}", text(&checked.stdout)),
            Err(_) => skip("strange_layers_work", "e2fsck is not installed"),
        }
    }
}

#[test]
fn every_flipped_bit_of_an_index_is_noticed() {
    let lab = Lab::new();
    lab.good(&["index", "layer.tar", "-o", "layer.tarblk"]);
    let index = fs::read(lab.path("layer.tarblk")).unwrap();
    for at in 0..index.len() {
        let mut flipped = index.clone();
        flipped[at] ^= 1 << (at % 8);
        fs::write(lab.path("flipped.tarblk"), flipped).unwrap();
        let said = lab.bad(
            &[
                "image",
                "layer.tar",
                "--index",
                "flipped.tarblk",
                "-o",
                "out.ext4",
                "--no-cache",
            ],
            1,
        );
        assert!(
            said.contains("flipped.tarblk") && said.contains("tarblk index"),
            "byte {at}: {said}"
        );
    }
    let mut other = index.clone();
    other[8] = 77;
    fs::write(lab.path("version.tarblk"), other).unwrap();
    assert!(lab.bad(&["ls", "version.tarblk"], 1).contains("version 77"));
    for len in [9, 40, index.len() / 2, index.len() - 1] {
        fs::write(lab.path("cut.tarblk"), &index[..len]).unwrap();
        assert!(lab.bad(&["ls", "cut.tarblk"], 1).contains("cut.tarblk"), "{len}");
    }
    for (name, expected) in [
        ("absent.tarblk", "No such file"),
        (".", "regular file"),
        ("layer.tar", "not a tarblk index"),
    ] {
        let said = lab.bad(&["image", "layer.tar", "--index", name, "-o", "out.ext4"], 1);
        assert!(said.contains(name) && said.contains(expected), "{said}");
    }
}

/// What is waited for, how long and why is said, and the deadline is the person's.
#[test]
fn a_busy_server_is_waited_for_or_not() {
    let lab = Lab::new();
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", &lab.path("layer.tar")).unwrap();
    let url = origin.url("/layer.tar");
    origin.set_faults(|_| vec![Fault::Status(429, Some(3600))]);
    let said = lab.bad(&["index", &url, "-o", "out.tarblk"], 1);
    assert!(
        said.contains("429 Too Many Requests") && said.contains("60min"),
        "{said}"
    );
    let busy_at_first = || {
        let asked = std::sync::atomic::AtomicBool::new(false);
        move |_: &_| {
            if asked.swap(true, std::sync::atomic::Ordering::Relaxed) {
                Vec::new()
            } else {
                vec![Fault::Status(503, Some(2))]
            }
        }
    };
    origin.set_faults(busy_at_first());
    let said = lab.bad(&["index", &url, "-o", "out.tarblk", "--retry-for", "1s"], 1);
    assert!(
        said.contains("503 Service Unavailable") && said.contains("2s"),
        "{said}"
    );
    origin.set_faults(busy_at_first());
    let output = lab.run(&["index", &url, "-o", "out.tarblk"]);
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("503 Service Unavailable") && said.contains("asking again in 2s"),
        "{said}"
    );
    assert!(!said.contains("(after"), "{said}");
}

#[test]
fn servers_that_are_not_there_or_refuse() {
    let lab = Lab::new();
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let said = lab.bad(&["index", &format!("http://127.0.0.1:{port}/layer.tar")], 1);
    assert!(
        said.contains("refused") && said.contains("is the address right"),
        "{said}"
    );
    assert!(lab.bad(&["index", "http://"], 1).contains("not a URL"));
    assert!(lab.bad(&["index", ""], 1).contains("empty"));
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", &lab.path("layer.tar")).unwrap();
    let url = origin.url("/layer.tar");
    let plain = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = plain.local_addr().unwrap();
    let answering = std::thread::spawn(move || {
        use std::io::{Read as _, Write as _};
        let (mut peer, _) = plain.accept().unwrap();
        // As servers answer what is no request.
        assert!(peer.read(&mut [0; 1024]).unwrap() > 0);
        peer.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").unwrap();
    });
    let said = lab.bad(&["index", &format!("https://{address}/layer.tar")], 1);
    answering.join().unwrap();
    assert!(
        said.contains("does not speak TLS") && said.contains("http://"),
        "{said}"
    );
    for status in [401, 403, 404, 410] {
        origin.set_faults(move |_| vec![Fault::Status(status, None)]);
        let said = lab.bad(&["index", &url, "-o", "out.tarblk"], 1);
        assert!(said.contains(&status.to_string()), "{said}");
    }
    origin.clear_faults();
    origin.serve_blob("/noise", vec![7; 100_000]);
    assert!(lab.bad(&["index", &origin.url("/noise")], 1).contains("not a tar"));
    assert!(!lab.path("out.tarblk").exists());
}

/// The lab's layer, compressed.
fn gzipped(lab: &Lab) -> PathBuf {
    let path = lab.path("layer.tar.gz");
    let (tar, gz) = (File::open(lab.path("layer.tar")).unwrap(), File::create(&path).unwrap());
    let status = Command::new("gzip").arg("-c").stdin(tar).stdout(gz).status();
    assert!(status.unwrap().success());
    path
}

#[test]
fn a_layer_of_no_bytes_is_refused() {
    let lab = Lab::new();
    fs::write(lab.path("empty.tar"), "").unwrap();
    lab.good(&["index", "layer.tar", "-o", "layer.tarblk"]);
    let origin = Origin::start().unwrap();
    origin.serve_blob("/empty.tar", Vec::new());
    let url = origin.url("/empty.tar");
    for ranges in [true, false] {
        origin.set_ranges(ranges);
        for name in ["empty.tar", &url] {
            for args in [
                &["ls", name][..],
                &["image", name, "-o", "out.ext4", "--no-cache"],
                &["image", name, "-o", "out.ext4", "--no-cache", "--index", "layer.tarblk"],
                &["index", name, "-o", "out.tarblk"],
                &["index", name, "--full"],
                &["index", "verify", "layer.tarblk", name],
                &["diff", "layer.tar", name],
            ] {
                let said = lab.bad(args, 1);
                assert!(said.contains("empty.tar is empty (0 bytes)"), "{args:?}: {said}");
            }
        }
    }
    // Nor is nothing, compressed: what made it failed.
    origin.set_ranges(true);
    for (program, name) in [("gzip", "empty.tar.gz"), ("zstd", "empty.tar.zst")] {
        if !have(program) {
            continue;
        }
        let input = Stdio::from(File::open(lab.path("empty.tar")).unwrap());
        let made = Command::new(program).arg("-c").stdin(input).output().unwrap();
        fs::write(lab.path(name), &made.stdout).unwrap();
        origin.serve_blob(&format!("/{name}"), made.stdout);
        let url = origin.url(&format!("/{name}"));
        // Cold, and again when its index could be in the cache.
        for name in [name, name, &url, &url] {
            for args in [
                &["ls", name][..],
                &["image", name, "-o", "out.ext4"],
                &["index", name, "-o", "out.tarblk"],
                &["diff", "layer.tar", name],
            ] {
                let said = lab.bad(args, 1);
                assert!(said.contains("is empty (0 bytes, decompressed)"), "{args:?}: {said}");
            }
        }
    }
    // A tar of no entries is one.
    fs::write(lab.path("end.tar"), [0; 1024]).unwrap();
    lab.good(&["image", "end.tar", "-o", "out.ext4"]);
}

#[test]
fn the_bar_says_what_is_done_and_how_fast() {
    if !have("script") {
        return skip("the_bar_says_what_is_done_and_how_fast", "script is not installed");
    }
    let lab = Lab::new();
    let origin = Origin::start().unwrap();
    fs::write(lab.path("noise"), noise(2_000_000, 1)).unwrap();
    let mut tar = tar::Builder::new(File::create(lab.path("layer.tar")).unwrap());
    tar.append_path_with_name(lab.path("noise"), "noise").unwrap();
    tar.into_inner().unwrap();
    origin.serve_file("/layer.tar.gz", &gzipped(&lab)).unwrap();
    origin.set_ranges(false);
    origin.set_link(Link {
        rtt: Duration::from_millis(1),
        rate: Some(1_000_000),
    });
    let mut command = Command::new("script");
    let line = format!(
        "{} image {} -o out.ext4 --no-cache",
        env!("CARGO_BIN_EXE_tarblk"),
        origin.url("/layer.tar.gz")
    );
    let output = command
        .args(["-qec", &line, "/dev/null"])
        .current_dir(lab.dir.path())
        .env("TERM", "xterm")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let drawn = text(&output.stdout);
    assert!(output.status.success(), "{drawn}");
    assert!(
        drawn.contains("downloading") && !drawn.contains("reading headers"),
        "{drawn}"
    );
    // A link of 1 MB/s never looks like a fast one.
    let before_writing = drawn.split("writing image").next().unwrap();
    assert!(before_writing.contains("KiB/s"), "{drawn}");
    assert!(
        !before_writing.contains("GiB/s") && !before_writing.contains("MiB/s"),
        "{drawn}"
    );
}

#[test]
fn a_server_without_ranges_is_read_once_with_a_warning() {
    let lab = Lab::new();
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", &lab.path("layer.tar")).unwrap();
    origin.serve_file("/layer.tar.gz", &gzipped(&lab)).unwrap();
    lab.good(&["index", "layer.tar", "-o", "layer.tarblk"]);
    origin.set_ranges(false);
    let (plain, gzip) = (origin.url("/layer.tar"), origin.url("/layer.tar.gz"));
    for args in [
        &["image", &plain, "-o", "remote.ext4"][..],
        &["image", &gzip, "-o", "remote.ext4"],
        // The second time too, with the index at hand: the layer itself still comes whole.
        &["image", &gzip, "-o", "remote.ext4"],
        &[
            "image",
            &plain,
            "-o",
            "remote.ext4",
            "--index",
            "layer.tarblk",
            "--no-cache",
        ],
        &["index", &gzip],
        &["index", &plain],
        &["index", &plain, "--full"],
        &["ls", &gzip],
    ] {
        let output = lab.run(args);
        let said = text(&output.stderr);
        assert!(output.status.success(), "{args:?}: {said}");
        assert_eq!(said.matches("does not answer ranges").count(), 1, "{args:?}: {said}");
    }
    lab.good(&["image", "layer.tar", "-o", "local.ext4"]);
    assert!(fs::read(lab.path("remote.ext4")).unwrap() == fs::read(lab.path("local.ext4")).unwrap());
}

/// A zstd frame of some 34 bytes for each mebibyte of zeros that it becomes, behind a header that says so.
fn bomb(file_len: u64) -> Vec<u8> {
    const BLOCK: u32 = 128 << 10;
    let head = header("zeros", format!("{file_len:011o}\0").as_bytes(), b'0', "");
    let len = u64::try_from(head.len()).unwrap() + file_len + 1024;
    let block = |kind: u32, len: u32, last: u32| ((len << 3) | (kind << 1) | last).to_le_bytes()[..3].to_vec();
    let mut frame = [&[0x28, 0xb5, 0x2f, 0xfd, 0xc0, 0x38][..], &len.to_le_bytes()].concat();
    frame.extend([block(0, u32::try_from(head.len()).unwrap(), 0), head].concat());
    let mut left = file_len + 1024;
    while left > 0 {
        let run = left.min(BLOCK.into());
        left -= run;
        frame.extend(block(1, u32::try_from(run).unwrap(), u32::from(left == 0)));
        frame.push(0);
    }
    frame
}

/// What decodes to more than layers do, and what is longer than a person allows, is refused in one line that says how to allow
/// it.
#[test]
fn layers_that_are_too_long_are_refused() {
    let lab = Lab::new();
    fs::write(lab.path("bomb.tar.zst"), bomb(20 << 30)).unwrap();
    fs::write(lab.path("some.tar.zst"), bomb(96 << 20)).unwrap();
    let gzipped = gzipped(&lab);
    let gzipped = gzipped.to_str().unwrap();
    let origin = Origin::start().unwrap();
    origin.serve_file("/some", &lab.path("some.tar.zst")).unwrap();
    let url = origin.url("/some");
    for (name, most) in [
        ("bomb.tar.zst", "64MiB"),
        ("some.tar.zst", "64MiB"),
        (gzipped, "1MiB"),
        ("layer.tar", "1MiB"),
        (&url, "64MiB"),
    ] {
        for command in [&["index", name][..], &["ls", name], &["image", name, "-o", "out"]] {
            let said = lab.bad(&[command, &["--max-layer-size", most]].concat(), 1);
            assert!(said.contains("too long") && said.contains("--max-layer-size"), "{said}");
            assert!(said.contains(&most.replace("MiB", " MiB")), "{said}");
        }
    }
    assert!(!lab.path("out").exists());
    for (name, most) in [("some.tar.zst", "97MiB"), (gzipped, "4MiB"), ("layer.tar", "4MiB")] {
        lab.good(&["index", name, "-o", "some.tarblk", "--max-layer-size", most]);
        // An index says how long the layer is, and is believed no more than the layer.
        let named = ["image", name, "--index", "some.tarblk", "-o", "out"];
        let said = lab.bad(&[&named[..], &["--max-layer-size", "1MiB"]].concat(), 1);
        assert!(said.contains("too long"), "{said}");
    }
}

#[test]
fn outputs_replace_files_and_nothing_else() {
    let lab = Lab::new();
    let before = lab.names();
    for (name, expected) in [
        (".", "directory"),
        ("/dev/full", "regular file"),
        ("no/such/out", "No such file"),
        ("layer.tar/x", "Not a directory"),
    ] {
        for command in ["image", "index"] {
            let said = lab.bad(&[command, "layer.tar", "-o", name], 1);
            assert!(said.contains(name) && said.contains(expected), "{said}");
        }
    }
    let kind = fs::metadata("/dev/full").unwrap().file_type();
    assert!(
        std::os::unix::fs::FileTypeExt::is_char_device(&kind),
        "the device is one no more"
    );
    let mut after = lab.names();
    after.retain(|name| name != "cache");
    assert_eq!(after, before);
}

#[test]
fn a_full_disk() {
    if !root("a_full_disk") {
        return;
    }
    let lab = Lab::new();
    fs::create_dir(lab.path("small")).unwrap();
    let output = lab.apart(
        "mount -t tmpfs -o size=1m none small
        $TARBLK image layer.tar -o small/out.ext4 && exit 9
        [ -z \"$(ls -A small)\" ]",
    );
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        said.contains("small/out.ext4") && said.contains("No space left"),
        "{said}"
    );

    // A cache on a full disk costs only what it would have saved.
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", &lab.path("layer.tar")).unwrap();
    let output = lab.apart(&format!(
        "mount -t tmpfs -o size=100k,mode=755 none small
            dd if=/dev/zero of=small/fill bs=1k count=200 2>/dev/null || true
            $TARBLK image {} -o out.ext4 --cache small",
        origin.url("/layer.tar")
    ));
    let said = text(&output.stderr);
    assert!(output.status.success(), "{said}");
    lab.good(&["image", "layer.tar", "-o", "local.ext4", "--no-cache"]);
    assert!(fs::read(lab.path("out.ext4")).unwrap() == fs::read(lab.path("local.ext4")).unwrap());
}

#[test]
fn a_cache_that_cannot_be_written() {
    let lab = Lab::new();
    fs::write(lab.path("file"), "").unwrap();
    for cache in ["file", "/proc/nowhere"] {
        let said = lab.bad(&["image", "layer.tar", "-o", "out.ext4", "--cache", cache], 1);
        assert!(said.contains("--no-cache") && said.contains(cache), "{said}");
    }
    assert!(!lab.path("out.ext4").exists());
}

#[test]
fn a_machine_without_any_driver() {
    if !root("a_machine_without_any_driver") {
        return;
    }
    let lab = Lab::new();
    fs::create_dir(lab.path("mnt")).unwrap();
    let missing = |arguments: &str| {
        // The modules may be there, but nobody makes their nodes in this /dev.
        let script = format!("mount -t tmpfs none /dev; mknod -m 666 /dev/null c 1 3; exec $TARBLK {arguments}");
        let output = lab.apart(&script);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments}: {said}");
        lab.assert_nothing_served();
        said
    };
    let said = missing("mount layer.tar mnt");
    assert!(said.contains("ublk_drv") && said.contains("/dev/fuse"), "{said}");
    assert!(missing("attach layer.tar --backend ublk").contains("/dev/ublk-control"));
    assert!(missing("attach layer.tar --backend loop").contains("/dev/fuse"));
    assert!(missing("bench layer.tar --scratch . --runs 1 -- true").contains("/dev/fuse"));
}

#[test]
fn without_root() {
    if !root("without_root") {
        return;
    }
    let lab = Lab::new();
    fs::set_permissions(lab.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // By another process: a program that this one has open for writing when another test forks cannot be run.
    let copied = Command::new("cp")
        .args([Path::new(env!("CARGO_BIN_EXE_tarblk")), &lab.path("tarblk")])
        .status();
    assert!(copied.unwrap().success());
    fs::create_dir(lab.path("mnt")).unwrap();
    fs::create_dir(lab.path("theirs")).unwrap();
    std::os::unix::fs::chown(lab.path("theirs"), Some(65534), Some(65534)).unwrap();
    fs::copy(lab.path("layer.tar"), lab.path("secret.tar")).unwrap();
    fs::set_permissions(lab.path("secret.tar"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir(lab.path("states")).unwrap();
    fs::set_permissions(lab.path("states"), fs::Permissions::from_mode(0o700)).unwrap();
    let nobody = |arguments: &str| {
        let mut command = Command::new(lab.path("tarblk"));
        command
            .current_dir(lab.dir.path())
            .args(arguments.split(' '))
            .uid(65534)
            .gid(65534);
        command
            .env("TARBLK_CACHE", lab.path("theirs/cache"))
            .env("TARBLK_STATE_DIR", lab.path("states"))
            .env("TARBLK_SERVICE_IDLE", "0");
        command.output().unwrap()
    };
    for good in [
        "index layer.tar -o theirs/index",
        "ls layer.tar",
        "image layer.tar -o theirs/image",
    ] {
        let output = nobody(good);
        assert!(output.status.success(), "{good}: {}", text(&output.stderr));
    }
    for (arguments, expected) in [
        ("index secret.tar", "secret.tar: Permission denied"),
        ("index layer.tar -o index", "Permission denied"),
        ("image layer.tar -o image", "Permission denied"),
        ("attach layer.tar", "sudo"),
        ("mount layer.tar mnt", "sudo"),
        ("umount mnt", "nothing that tarblk attached"),
        ("ps", "sudo"),
        ("stats loop0", "sudo"),
        ("detach loop0", "sudo"),
        ("bench layer.tar -- true", "root"),
    ] {
        let output = nobody(arguments);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments}: {said}");
        assert_eq!(said.lines().count(), 1, "{arguments}: {said}");
        assert!(said.contains(expected), "{arguments}: {said}");
    }
}

#[test]
fn directories_that_cannot_be_mounted_on() {
    if !root("directories_that_cannot_be_mounted_on") {
        return;
    }
    let lab = Lab::new();
    for (dir, expected) in [
        ("absent", "mkdir"),
        ("layer.tar", "not a directory"),
        (".", "not empty"),
        ("layer.tar/x", "not a directory"),
    ] {
        let said = lab.bad(&["mount", "layer.tar", dir], 1);
        assert!(said.contains(expected), "{said}");
    }
    assert!(lab.bad(&["umount", "absent"], 1).contains("absent"));
    assert!(
        !lab.path("states").exists() && !lab.path("cache").exists(),
        "nothing was begun"
    );
}

/// Starts a command, waits until `ready`, sends it SIGINT and returns what it left to say.
fn interrupted(lab: &Lab, args: &[&str], mut ready: impl FnMut() -> bool) -> Output {
    let mut command = lab.tarblk();
    let child = command
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let began = Instant::now();
    while !ready() {
        assert!(began.elapsed() < Duration::from_secs(60), "{args:?} did not get there");
        std::thread::sleep(Duration::from_millis(5));
    }
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn interrupted_commands_leave_nothing() {
    let lab = Lab::new();
    lab.good(&["index", "layer.tar", "-o", "layer.tarblk"]);
    fs::create_dir(lab.path("mnt")).unwrap();
    let before = lab.names();
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", &lab.path("layer.tar")).unwrap();
    let url = origin.url("/layer.tar");
    // A server that says how long the layer is, and then nothing.
    origin.set_faults(|request| {
        let first = request
            .header("range")
            .is_none_or(|range| range.starts_with("bytes=0-0"));
        if first { Vec::new() } else { vec![Fault::Silence] }
    });
    let image = ["image", &url, "--index", "layer.tarblk", "-o", "out.ext4", "--no-cache"];
    for args in [
        &["index", &url, "-o", "out.tarblk"][..],
        &image,
        &["mount", &url, "mnt"],
        &["attach", &url],
    ] {
        let asked = origin.counters().requests;
        let output = interrupted(&lab, args, || {
            origin.settle();
            origin.counters().requests > asked
        });
        assert!(!output.status.success(), "{args:?}");
        assert!(!text(&output.stderr).contains("panicked"), "{args:?}");
        let mut after = lab.names();
        after.retain(|name| name != "cache" && name != "states");
        assert_eq!(after, before, "{args:?}");
        lab.assert_nothing_served();
        origin.drop_connections();
    }
}

/// The daemon of a device.
fn daemon_of(lab: &Lab, device: &str) -> Pid {
    let listed = lab.json(&["ps", "--json"]);
    let listed = listed.as_array().unwrap().iter().find(|line| line["device"] == device);
    let pid = listed.expect("it is listed")["process"]["pid"].as_i64().unwrap();
    Pid::from_raw(i32::try_from(pid).unwrap()).unwrap()
}

fn kill_and_wait(pid: Pid, signal: Signal) {
    kill_process(pid, signal).unwrap();
    let entry = format!("/proc/{}/exe", pid.as_raw_nonzero());
    let began = Instant::now();
    while Path::new(&entry).exists() {
        assert!(began.elapsed() < Duration::from_secs(30), "the daemon does not die");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn all_devices_are_detached_and_those_in_use_by_force() {
    let Some(_alone) = devices("all_devices_are_detached_and_those_in_use_by_force") else {
        return;
    };
    let lab = Lab::new();
    fs::create_dir(lab.path("mnt")).unwrap();
    let mounted = lab.json(&["mount", "layer.tar", "mnt", "--json"])["device"]
        .as_str()
        .unwrap()
        .to_owned();
    let attach = || lab.good(&["attach", "layer.tar"]).trim().to_owned();
    let (first, second) = (attach(), attach());
    let names = || -> Vec<String> {
        let listed = lab.json(&["ps", "--json"]);
        let listed = listed.as_array().unwrap().iter();
        listed.map(|line| line["device"].as_str().unwrap().to_owned()).collect()
    };
    // What is in use stays, and keeps no other.
    let said = lab.bad(&["detach", &mounted, &first], 1);
    assert!(said.contains("in use") && said.contains(&mounted), "{said}");
    assert!(!names().contains(&first) && names().contains(&second));
    let said = lab.bad(&["detach", "--all"], 1);
    assert!(said.contains("in use") && said.contains(&mounted), "{said}");
    assert_eq!(names(), [mounted.as_str()]);
    assert!(lab.bad(&["detach"], 2).contains("DEVICE"));
    assert!(
        lab.bad(&["detach", "--all", &mounted], 2)
            .contains("cannot be used with")
    );

    // By force: nobody finds it by its name any more, and an open file is still read.
    let mut open = fs::File::open(lab.path("mnt/etc/big")).unwrap();
    lab.good(&["detach", "--all", "--force"]);
    assert!(mounts_below(lab.dir.path()).is_empty());
    assert!(!lab.path("mnt/etc/big").exists());
    let mut bytes = Vec::new();
    open.read_to_end(&mut bytes).unwrap();
    assert!(bytes == lab::pattern(3_000_001), "contents differ");
    drop(open);
    lab.assert_nothing_served();

    // Nothing is there: nothing to do.
    lab.good(&["detach", "--all"]);
    lab.good(&["detach", "--all", "--force"]);

    // Mounted where the service and its keepers are dead.
    lab.good(&["mount", "layer.tar", "mnt"]);
    lab.kill_all();
    lab.good(&["detach", "--all", "--force"]);
    assert!(mounts_below(lab.dir.path()).is_empty());
    lab.assert_nothing_served();
}

#[test]
fn dead_daemons_are_told_and_cleaned_up() {
    let Some(_alone) = devices("dead_daemons_are_told_and_cleaned_up") else {
        return;
    };
    let lab = Lab::new();
    fs::create_dir(lab.path("mnt")).unwrap();
    let attach = || {
        lab.good(&["attach", "layer.tar", "--backend", "loop", "--quiet"])
            .trim()
            .to_owned()
    };
    let mounted = lab.json(&["mount", "layer.tar", "mnt", "--backend", "loop", "--json"])["device"]
        .as_str()
        .unwrap()
        .to_owned();
    let other = attach();
    assert_ne!(mounted, other);
    assert_eq!(lab.json(&["ps", "--json"]).as_array().unwrap().len(), 2);

    // In use, by whatever name; the one beside it goes.
    for name in [&*mounted, "mnt"] {
        let said = lab.bad(&["detach", name], 1);
        assert!(said.contains("in use") && said.contains("mnt"), "{said}");
    }
    lab.good(&["detach", &other]);
    assert!(lab.bad(&["stats", &other], 1).contains("tarblk ps"));

    lab.kill_all();
    let listed = lab.good(&["ps"]);
    assert!(listed.contains("dead") && listed.contains("mnt"), "{listed}");
    assert!(lab.bad(&["stats", "mnt"], 1).contains("is dead"));
    assert!(lab.bad(&["detach", &mounted], 1).contains("in use"));
    assert!(fs::read(lab.path("mnt/etc/big")).is_err(), "nobody can answer the read");
    lab.good(&["umount", "mnt"]);
    assert!(mounts_below(lab.dir.path()).is_empty());
    lab.assert_nothing_served();

    // One that nobody uses: the next command that makes something cleans up, or `detach` does.
    let _first = attach();
    lab.kill_all();
    let second = attach();
    assert_eq!(lab.json(&["ps", "--json"]).as_array().unwrap().len(), 1);
    let state = fs::read_dir(lab.path("states"))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let state = state
        .into_iter()
        .find(|path| path.extension().is_some_and(|it| it == "json"))
        .unwrap();
    let text_of_state = fs::read(&state).unwrap();
    kill_and_wait(daemon_of(&lab, &second), Signal::TERM);
    // It detaches.
    lab.assert_nothing_served();
    fs::create_dir_all(lab.path("states")).unwrap();

    // A state without a device, a damaged one, and the leftovers of a command that was killed.
    fs::write(&state, text_of_state).unwrap();
    assert!(lab.good(&["ps"]).contains("dead"));
    lab.good(&["detach", &second]);
    fs::write(&state, "no state").unwrap();
    assert!(lab.bad(&["detach", &second], 1).contains("damaged"));
    fs::remove_file(&state).unwrap();
    let leftover = lab.path("states/index-abc.tarblk");
    File::create(&leftover)
        .unwrap()
        .set_modified(std::time::SystemTime::UNIX_EPOCH)
        .unwrap();
    lab.good(&["detach", &attach()]);
    assert!(!leftover.exists());
    lab.assert_nothing_served();
}

#[test]
fn stats_say_where_the_bytes_came_from() {
    let Some(_alone) = devices("stats_say_where_the_bytes_came_from") else {
        return;
    };
    let lab = Lab::new();
    fs::create_dir(lab.path("mnt")).unwrap();
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", &lab.path("layer.tar")).unwrap();
    lab.good(&["mount", &origin.url("/layer.tar"), "mnt", "--quiet", "--no-cache"]);
    fs::read(lab.path("mnt/etc/big")).unwrap();
    let counted = lab.json(&["stats", "mnt", "--json"])["counters"].take();
    let number = |path: &str| {
        counted
            .pointer(path)
            .and_then(serde_json::Value::as_u64)
            .unwrap_or_else(|| panic!("{path}: {counted}"))
    };
    assert!(number("/device/reads") > 0 && number("/device/bytes/metadata") > 0);
    assert!(number("/device/bytes/fetched") + number("/device/bytes/memory") >= 3_000_001);
    assert_eq!(number("/device/bytes/disk"), 0);
    assert!(number("/fetch/requests") > 0 && number("/fetch/bytes_fetched") >= 3_000_001);
    assert_eq!(number("/fetch/retries"), 0);
    assert!(number("/device/latency/p50_ns") <= number("/device/latency/p99_ns"));
    let shown = lab.good(&["stats", "mnt"]);
    for name in [
        "reads",
        "from metadata",
        "from memory",
        "from disk",
        "from network",
        "requests",
        "retries",
        "median",
        "99%",
    ] {
        assert!(shown.contains(name), "{name}: {shown}");
    }
    lab.good(&["umount", "mnt"]);
}

#[test]
fn a_device_that_has_everything_needs_no_server() {
    let Some(_alone) = devices("a_device_that_has_everything_needs_no_server") else {
        return;
    };
    let lab = Lab::new();
    fs::create_dir(lab.path("mnt")).unwrap();
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", &lab.path("layer.tar")).unwrap();
    let url = origin.url("/layer.tar");
    assert!(
        lab.bad(&["mount", &url, "mnt", "--fetch-all", "--no-cache"], 2)
            .contains("--no-cache")
    );
    lab.good(&["mount", &url, "mnt", "--quiet", "--fetch-all"]);
    let began = Instant::now();
    loop {
        let counted = lab.json(&["stats", "mnt", "--json"])["counters"]["fetch"].take();
        if counted["bytes_held"] == counted["bytes_layers"] {
            assert!(counted["bytes_layers"].as_u64().unwrap() > 3_000_001, "{counted}");
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{counted}");
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(origin);
    assert_eq!(fs::read(lab.path("mnt/etc/big")).unwrap().len(), 3_000_001);
    assert!(lab.good(&["stats", "mnt"]).contains("fetched while idle"));
    lab.good(&["umount", "mnt"]);
}

#[test]
fn a_layer_in_a_layer() {
    let Some(_alone) = devices("a_layer_in_a_layer") else {
        return;
    };
    let lab = Lab::new();
    let mut outer = tar::Builder::new(File::create(lab.path("outer.tar")).unwrap());
    outer.append_path_with_name(lab.path("layer.tar"), "layer.tar").unwrap();
    outer.into_inner().unwrap().flush().unwrap();
    for dir in ["outer", "inner"] {
        fs::create_dir(lab.path(dir)).unwrap();
    }
    lab.good(&["mount", "outer.tar", "outer", "--quiet"]);
    lab.good(&["mount", "outer/layer.tar", "inner", "--quiet"]);
    assert_eq!(fs::read(lab.path("inner/etc/hello")).unwrap(), b"hello, world\n");
    lab.good(&["umount", "inner"]);
    lab.good(&["umount", "outer"]);
    lab.assert_nothing_served();
}

#[test]
fn nobody_hears_which_device_it_is() {
    let Some(_alone) = devices("nobody_hears_which_device_it_is") else {
        return;
    };
    let lab = Lab::new();
    let mut command = lab.tarblk();
    command
        .args(["attach", "layer.tar", "--quiet"])
        .stdout(File::options().write(true).open("/dev/full").unwrap());
    let output = command.output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output.stderr).contains("standard output"),
        "{}",
        text(&output.stderr)
    );
    assert_eq!(lab.good(&["ps", "--quiet"]), "");
    lab.assert_nothing_served();
}

/// Whether standard error says how a command is used, and says it without what the environment brought.
fn usage(lab: &Lab, args: &[&str]) -> String {
    let output = lab
        .tarblk()
        .args(args)
        .env("TARBLK_CREDS", "me:secret")
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
    let usage = said.lines().find(|line| line.starts_with("Usage: "));
    assert!(!said.contains("secret"), "{said}");
    usage.unwrap_or_else(|| panic!("{args:?}: {said}")).to_owned()
}

#[test]
fn usage_lines_show_what_was_left_out_and_nothing_from_the_environment() {
    let lab = Lab::new();
    assert_eq!(usage(&lab, &["mount"]), "Usage: tarblk mount <SOURCE> <MOUNTPOINT>");
    assert_eq!(usage(&lab, &["attach"]), "Usage: tarblk attach <SOURCE>");
    assert_eq!(
        usage(&lab, &["image", "layer.tar"]),
        "Usage: tarblk image --output <FILE> <SOURCE>"
    );
    assert_eq!(usage(&lab, &["umount"]), "Usage: tarblk umount <MOUNTPOINT>");
    for command in ["ls", "diff"] {
        assert!(!usage(&lab, &[command]).contains("--"), "{command}");
    }
    // An option that does not exist is no file whose name begins with dashes, unless there is one.
    let tips = |args: &[&str]| text(&lab.run(args).stderr).matches("as a value").count();
    for args in [
        &["ls", "layer.tar", "--index", "auto"][..],
        &["umount", "mnt", "--lazy"],
        &["image", "layer.tar", "-o", "out", "-x"],
    ] {
        assert!(lab.bad(args, 2).contains("unexpected argument"), "{args:?}");
        assert_eq!(tips(args), 0, "{args:?}");
    }
    assert!(lab.bad(&["ls", "layer.tar", "--qiet"], 2).contains("--quiet"));
    fs::copy(lab.path("layer.tar"), lab.path("--x.tar")).unwrap();
    assert_eq!(tips(&["ls", "--x.tar"]), 1);
    lab.good(&["ls", "--", "--x.tar"]);
    // What the environment says still counts, and an empty variable is none.
    lab.good(&["image", "layer.tar", "-o", "out.ext4"]);
    assert!(lab.path("cache").exists());
    let output = lab
        .tarblk()
        .args(["ls", "docker://127.0.0.1:1/x", "--plain-http"])
        .env("TARBLK_CREDS", "secret")
        .output()
        .unwrap();
    assert!(text(&output.stderr).contains("--creds"), "{}", text(&output.stderr));
}

#[test]
fn messages_have_words_and_no_numbers_of_errors() {
    let lab = Lab::new();
    fs::write(lab.path("file"), "").unwrap();
    for args in [
        &["ls", "absent.tar"][..],
        &["ls", "file/x.tar"],
        &["index", "layer.tar", "-o", "no/such/dir"],
        &["image", "layer.tar", "--index", "absent", "-o", "out", "--no-cache"],
        &["image", "layer.tar", "-o", "out", "--cache", "file"],
        &["index", "verify", "absent", "layer.tar"],
        &["ls", "oci:absent:tag"],
        &["ls", "docker://127.0.0.1:1/x", "--plain-http"],
        &["ls", "http://127.0.0.1:1/x"],
        &["ls", "docker://127.0.0.1:1/x", "--creds", "@absent"],
        &["generate", "man", "absent"],
    ] {
        let said = lab.bad(args, 1);
        assert!(!said.contains("os error"), "{args:?}: {said}");
    }
    let said = lab.bad(&["ls", "absent.tar"], 1);
    assert_eq!(said, "tarblk: cannot open absent.tar: No such file or directory\n");
    // Warnings too, and with all that can be said.
    let output = lab.run(&["-vvv", "ls", "http://127.0.0.1:1/x"]);
    assert!(!text(&output.stderr).contains("os error"), "{}", text(&output.stderr));
}

#[test]
fn names_that_are_nearly_right_are_pointed_out() {
    let lab = Lab::new();
    for (name, meant) in [
        ("docker:127.0.0.1:5000/team/app:1", "docker://127.0.0.1:5000/team/app:1"),
        ("DOCKER://127.0.0.1:5000/app", "docker://127.0.0.1:5000/app"),
        ("registry://host/app", "docker://host/app"),
        ("oci://absent:tag", "oci:absent:tag"),
        ("https:/host.example/a.tar", "https://host.example/a.tar"),
        ("htps://host.example/a.tar", "https://host.example/a.tar"),
        ("file:absent.tar", "absent.tar"),
    ] {
        for command in [&["ls", name][..], &["image", name, "-o", "out"], &["index", name]] {
            let said = lab.bad(command, 1);
            assert!(said.contains(&format!("did you mean {meant}?")), "{command:?}: {said}");
            assert!(said.contains(&format!("cannot use {name}: ")), "{command:?}: {said}");
        }
    }
    for (name, meant) in [
        ("host.example/team/app:1", "docker://host.example/team/app:1"),
        ("docker:host.example/app", "docker://host.example/app"),
    ] {
        let said = lab.bad(&["index", "push", name], 1);
        assert!(said.contains(&format!("did you mean {meant}?")), "{said}");
    }
    // A file that is called so is a file.
    fs::copy(lab.path("layer.tar"), lab.path("docker:x")).unwrap();
    lab.good(&["ls", "docker:x"]);
}

#[test]
fn words_for_an_index_are_told_from_files() {
    let lab = Lab::new();
    let with = |index: &str| lab.bad(&["image", "layer.tar", "-o", "out", "--no-cache", "--index", index], 1);
    let said = with("autoo");
    assert!(
        said.contains("No such file") && said.contains("one of auto, require, ignore, build; did you mean auto?"),
        "{said}"
    );
    assert!(with("Require").contains("did you mean require?"));
    let said = with("layer.tarblk");
    assert!(
        said.contains("one of auto, require") && !said.contains("did you mean"),
        "{said}"
    );
    // Where no word is taken, none is proposed.
    let said = lab.bad(&["index", "verify", "autoo", "layer.tar"], 1);
    assert!(!said.contains("require"), "{said}");
}

#[test]
fn hints_about_directories_fit_the_command() {
    if !root("hints_about_directories_fit_the_command") {
        return;
    }
    let lab = Lab::new();
    assert_eq!(lab.bad(&["umount", "absent"], 1), "tarblk: absent does not exist\n");
    assert!(lab.bad(&["mount", "layer.tar", "absent"], 1).contains("mkdir absent"));
    fs::create_dir(lab.path("mnt")).unwrap();
    for options in ["rw", "ro,rw", "remount"] {
        let said = lab.bad(&["mount", "layer.tar", "mnt", "-o", options], 2);
        assert!(said.contains("-o ") && !said.contains("'-- -o'"), "{said}");
    }
    assert!(
        lab.bad(&["mount", "layer.tar", "mnt", "-o", "rw"], 2)
            .contains("overlay")
    );
}

/// The options that the kernel says a directory is mounted with.
fn options_of(dir: &Path) -> String {
    let dir = dir.to_str().unwrap();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let line = mounts.lines().rfind(|line| line.split(' ').nth(1) == Some(dir));
    line.and_then(|line| line.split(' ').nth(3)).unwrap().to_owned()
}

#[test]
fn mount_takes_the_options_of_mount() {
    let Some(_alone) = devices("mount_takes_the_options_of_mount") else {
        return;
    };
    let lab = Lab::new();
    fs::create_dir(lab.path("mnt")).unwrap();
    lab.good(&[
        "mount",
        "layer.tar",
        "mnt",
        "-q",
        "-o",
        "ro,nosuid,nofail,x-systemd.automount",
        "-o",
        "noexec",
    ]);
    let options = options_of(&lab.path("mnt"));
    let has = |option: &str| options.split(',').any(|it| it == option);
    assert!(has("ro") && has("nosuid") && has("noexec") && has("nodev"), "{options}");
    lab.good(&["umount", "mnt"]);
    // What ext4 does not know is refused by it, and nothing stays.
    let said = lab.bad(&["mount", "layer.tar", "mnt", "-q", "-o", "nonsense=7"], 1);
    assert!(said.contains("one of the options of -o"), "{said}");
    lab.assert_nothing_served();
}

/// A tar with a set-user-ID program of root's (`id`) and a device node that anybody may open (`null`).
fn layer_of_root(lab: &Lab) {
    let mut tar = tar::Builder::new(File::create(lab.path("root.tar")).unwrap());
    let program = fs::read("/usr/bin/id").unwrap();
    let mut entry = tar::Header::new_ustar();
    entry.set_mode(0o4755);
    entry.set_size(u64::try_from(program.len()).unwrap());
    tar.append_data(&mut entry, "id", &*program).unwrap();
    entry = tar::Header::new_ustar();
    entry.set_entry_type(tar::EntryType::Char);
    entry.set_device_major(1).unwrap();
    entry.set_device_minor(3).unwrap();
    entry.set_mode(0o666);
    entry.set_size(0);
    tar.append_data(&mut entry, "null", &[][..]).unwrap();
    tar.finish().unwrap();
}

#[test]
fn programs_and_devices_of_a_layer_have_no_power() {
    let Some(_alone) = devices("programs_and_devices_of_a_layer_have_no_power") else {
        return;
    };
    if !have("setpriv") {
        return skip("programs_and_devices_of_a_layer_have_no_power", "no setpriv");
    }
    let lab = Lab::new();
    layer_of_root(&lab);
    fs::create_dir(lab.path("mnt")).unwrap();
    let mut reachable = lab.path("mnt");
    while reachable.pop() && reachable != Path::new("/") {
        let mode = fs::metadata(&reachable).unwrap().permissions().mode();
        if mode & 1 == 0 && reachable.starts_with(lab.path("")) {
            fs::set_permissions(&reachable, fs::Permissions::from_mode(mode | 0o011)).unwrap();
        }
    }
    // Whom a program of the layer runs as, and whether its device opens, for a user that is not root.
    let powers = || {
        let other = |program: &Path, argument: &str| {
            Command::new("setpriv")
                .args(["--reuid=65534", "--regid=65534", "--clear-groups"])
                .arg(program)
                .arg(argument)
                .output()
                .unwrap()
        };
        let id = other(&lab.path("mnt/id"), "-u");
        assert!(id.status.success(), "{}", text(&id.stderr));
        let device = other(Path::new("/usr/bin/head"), lab.path("mnt/null").to_str().unwrap());
        (text(&id.stdout).trim().to_owned(), device.status.success())
    };
    for (options, expected) in [
        (&[][..], ("65534", false)),
        (&["-o", "defaults,noatime"], ("65534", false)),
        (&["-o", "suid"], ("0", false)),
        (&["-o", "dev"], ("65534", true)),
        (&["-o", "suid,dev"], ("0", true)),
    ] {
        lab.good(&[&["mount", "root.tar", "mnt", "-q"], options].concat());
        let (user, opens) = powers();
        lab.good(&["umount", "mnt"]);
        assert_eq!((user.as_str(), opens), expected, "{options:?}");
    }
}

/// A device of `lab` whose server died, and whose name a device has since that `neighbour` mounted on `mnt`.
fn dead_with_namesake(lab: &Lab, neighbour: &Lab) -> String {
    for _ in 0..20 {
        let dead = lab.good(&["attach", "layer.tar", "--backend", "loop", "-q"]);
        let name = dead.trim().trim_start_matches("/dev/");
        let disk = Path::new("/sys/block").join(name);
        let number = || fs::read(disk.join("diskseq")).ok();
        let then = number();
        lab.kill_all();
        wait_until("the end of the device", || {
            !disk.join("loop/backing_file").exists() || number() != then
        });
        neighbour.good(&["mount", "layer.tar", "mnt", "--backend", "loop"]);
        if neighbour.json(&["ps", "--json"])[0]["device"] == dead.trim() {
            return name.to_owned();
        }
        // Another test was faster.
        neighbour.good(&["umount", "mnt"]);
        lab.good(&["detach", name]);
    }
    panic!("the kernel does not give the lowest free number");
}

/// The kernel gives the number of a loop device out again as soon as what served it has died.
#[test]
fn a_dead_device_is_cleaned_up_while_another_has_its_name() {
    let Some(_alone) = devices("a_dead_device_is_cleaned_up_while_another_has_its_name") else {
        return;
    };
    if !Path::new("/sys/block/loop0/diskseq").exists() {
        return skip(
            "a_dead_device_is_cleaned_up_while_another_has_its_name",
            "disks have no numbers of their own",
        );
    }
    let (lab, neighbour) = (Lab::new(), Lab::new());
    fs::create_dir(neighbour.path("mnt")).unwrap();
    for detach in [&["detach"][..], &["detach", "--force"]] {
        let name = dead_with_namesake(&lab, &neighbour);
        lab.good(&[detach, &[&name]].concat());
        assert_eq!(lab.json(&["ps", "--json"]), serde_json::json!([]));
        lab.assert_nothing_served();
        // Nothing was done to its namesake.
        assert_eq!(fs::read(neighbour.path("mnt/etc/hello")).unwrap(), b"hello, world\n");
        neighbour.good(&["umount", "mnt"]);
    }
    neighbour.assert_nothing_served();
}

#[test]
fn a_directory_that_has_a_layer_is_told() {
    let Some(_alone) = devices("a_directory_that_has_a_layer_is_told") else {
        return;
    };
    let lab = Lab::new();
    fs::create_dir(lab.path("mnt")).unwrap();
    let mounted = lab.json(&["mount", "layer.tar", "mnt", "--backend", "loop", "--json"])["device"]
        .as_str()
        .unwrap()
        .to_owned();
    let said = lab.bad(&["mount", "layer.tar", "mnt"], 1);
    assert!(
        said.contains("mnt already has") && said.contains("layer.tar on it; first: tarblk umount mnt"),
        "{said}"
    );
    // Told by the daemon, in whose namespace nothing of this is mounted, as this process sees it.
    kill_process(daemon_of(&lab, &mounted), Signal::TERM).unwrap();
    let log = lab.path("states/service.log");
    let began = Instant::now();
    let line = loop {
        let log = fs::read_to_string(&log).unwrap();
        if let Some(line) = log.lines().find(|line| line.contains("SIGTERM")) {
            break line.to_owned();
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{log}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(line.contains("mnt") && !line.contains("namespace"), "{line}");
    lab.kill_all();
    let said = lab.bad(&["mount", "layer.tar", "mnt"], 1);
    assert!(
        said.contains("(its service is dead); first: tarblk umount mnt"),
        "{said}"
    );
    // What the hint names is what works.
    let said = lab.bad(&["stats", "mnt"], 1);
    let at = fs::canonicalize(lab.path("mnt")).unwrap();
    assert!(
        said.contains(&format!("`tarblk umount {}` cleans up", at.display())),
        "{said}"
    );
    lab.good(&["umount", "mnt"]);
    let other = lab
        .good(&["attach", "layer.tar", "--backend", "loop", "-q"])
        .trim()
        .to_owned();
    lab.kill_all();
    let said = lab.bad(&["stats", &other], 1);
    let name = other.trim_start_matches("/dev/");
    assert!(said.contains(&format!("`tarblk detach {name}` cleans up")), "{said}");
    lab.good(&["detach", name]);
}

#[test]
fn what_is_attached_is_called_after_its_layer() {
    let Some(_alone) = devices("what_is_attached_is_called_after_its_layer") else {
        return;
    };
    let lab = Lab::new();
    fs::create_dir(lab.path("mnt")).unwrap();
    lab.good(&["mount", "layer.tar", "mnt", "-q", "--backend", "loop"]);
    let listed = lab.json(&["ps", "--json"]);
    // A list is read in other directories than the one where the layer was named.
    let absolute = fs::canonicalize(lab.path("layer.tar")).unwrap();
    assert_eq!(listed[0]["source"], absolute.to_str().unwrap());
    let device = listed[0]["device"]
        .as_str()
        .unwrap()
        .trim_start_matches("/dev/")
        .to_owned();
    let backing = fs::read_to_string(format!("/sys/block/{device}/loop/backing_file")).unwrap();
    assert_eq!(backing.trim_end(), "/tarblk:layer.tar");
    // A dead daemon's device is still known by it.
    lab.kill_all();
    assert!(lab.bad(&["detach", "mnt"], 1).contains("in use"));
    lab.good(&["umount", "mnt"]);
    lab.assert_nothing_served();
}

#[test]
fn why_there_is_no_ublk_is_said_once() {
    let test = "why_there_is_no_ublk_is_said_once";
    let Some(_alone) = devices(test) else {
        return;
    };
    if Path::new("/dev/ublk-control").exists() {
        return skip(test, "there is ublk here");
    }
    let lab = Lab::new();
    let said = |more: &[&str]| {
        let output = lab.run(&[&["attach", "layer.tar"][..], more].concat());
        let said = text(&output.stderr);
        assert!(output.status.success(), "{said}");
        lab.good(&["detach", text(&output.stdout).trim()]);
        said.contains("no ublk")
    };
    assert!(!said(&["-q"]), "silence is no notice");
    assert!(said(&[]), "the first time");
    if rustix::fs::getxattr(lab.path("states"), "trusted.tarblk.no-ublk", &mut [0_u8; 64]).is_err() {
        return skip(test, "no trusted attributes here");
    }
    assert!(!said(&[]), "the second time");
    assert!(said(&["-v"]));
    // Another boot, another notice.
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(lab.path("states"), "trusted.tarblk.no-ublk", b"before", flags).unwrap();
    assert!(said(&[]));
}

#[test]
fn images_packed_into_a_tar_are_pointed_out() {
    let lab = Lab::new();
    let docker = layer(&[
        header("manifest.json", EMPTY, b'0', ""),
        header(&format!("{}.json", "0a".repeat(32)), EMPTY, b'0', ""),
        header(&format!("{}/layer.tar", "0b".repeat(32)), EMPTY, b'0', ""),
    ]);
    let oci = layer(&[
        header("oci-layout", EMPTY, b'0', ""),
        header("index.json", EMPTY, b'0', ""),
        header(&format!("blobs/sha256/{}", "0c".repeat(32)), EMPTY, b'0', ""),
    ]);
    // What surrounds them is theirs alone.
    let alone = |tar: Vec<u8>| tar[512..].to_vec();
    fs::write(lab.path("docker.tar"), alone(docker)).unwrap();
    fs::write(lab.path("oci.tar"), alone(oci)).unwrap();
    let gzip = Command::new("gzip")
        .args(["-k", "docker.tar"])
        .current_dir(lab.dir.path())
        .status();
    assert!(gzip.unwrap().success());
    let origin = Origin::start().unwrap();
    origin.serve_file("/a/docker.tar", &lab.path("docker.tar")).unwrap();
    let url = origin.url("/a/docker.tar");
    for (name, command) in [
        (
            "docker.tar",
            "unpack it first with `skopeo copy docker-archive:docker.tar oci:DIR:latest`",
        ),
        (
            "docker.tar.gz",
            "skopeo copy docker-archive:docker.tar.gz oci:DIR:latest`",
        ),
        ("oci.tar", "skopeo copy oci-archive:oci.tar oci:DIR:latest`"),
        (
            &url,
            "download it and unpack it with `skopeo copy docker-archive:docker.tar oci:DIR:latest`",
        ),
    ] {
        let said = lab.bad(&["image", name, "-o", "out.ext4"], 1);
        assert!(said.contains(command), "{said}");
        // Listing it is what tar would do too.
        for args in [
            &["ls", name][..],
            &["index", name],
            &["index", name, "-o", "out.tarblk"],
        ] {
            let output = lab.run(args);
            let said = text(&output.stderr);
            assert!(output.status.success() && said.contains(command), "{args:?}: {said}");
        }
    }
    // A layer that happens to hold such files among others is one.
    let mut layer = fs::read(lab.path("layer.tar")).unwrap();
    layer.truncate(layer.len() - 1024);
    layer.extend(fs::read(lab.path("docker.tar")).unwrap());
    fs::write(lab.path("both.tar"), layer).unwrap();
    let output = lab.run(&["ls", "both.tar"]);
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn a_packed_image_is_not_mounted() {
    let Some(_alone) = devices("a_packed_image_is_not_mounted") else {
        return;
    };
    let lab = Lab::new();
    let oci = [
        header("oci-layout", EMPTY, b'0', ""),
        header("index.json", EMPTY, b'0', ""),
        header(&format!("blobs/sha256/{}", "0c".repeat(32)), EMPTY, b'0', ""),
        vec![0; 1024],
    ];
    fs::write(lab.path("oci.tar"), oci.concat()).unwrap();
    fs::create_dir(lab.path("mnt")).unwrap();
    // The second time its index is in the cache.
    for _ in 0..2 {
        let said = lab.bad(&["mount", "oci.tar", "mnt"], 1);
        assert!(said.contains("skopeo copy oci-archive:"), "{said}");
        lab.assert_nothing_served();
    }
}

/// Runs a command, and says when it first said something that has `words` in it, and how it ended.
fn first_word(lab: &Lab, args: &[&str], words: &str) -> (Option<Duration>, Output, Duration) {
    use std::io::BufRead as _;
    let began = Instant::now();
    let mut command = lab.tarblk();
    command.args(args).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let lines = std::io::BufReader::new(child.stderr.take().unwrap()).lines();
    let (mut first, mut all) = (None, Vec::new());
    for line in lines {
        let line = line.unwrap();
        if first.is_none() && line.contains(words) {
            first = Some(began.elapsed());
        }
        all.extend(line.into_bytes());
        all.push(b'\n');
    }
    let mut output = child.wait_with_output().unwrap();
    output.stderr = all;
    (first, output, began.elapsed())
}

/// A server that does not answer, fails for ever, or sends a byte now and then: it is said soon what is waited for, also where there
/// is no terminal, and the wait ends when the person says.
#[test]
fn waits_are_told_and_end() {
    let lab = Lab::new();
    lab.good(&["index", "layer.tar", "-o", "layer.tarblk"]);
    let faults: [(&str, Fault); 4] = [
        ("has not answered yet", Fault::Silence),
        ("503 Service Unavailable", Fault::Status(503, None)),
        ("; waiting", Fault::WrongRange(512)),
        ("; waiting", Fault::ResetBefore),
    ];
    std::thread::scope(|scope| {
        for (words, fault) in faults {
            for command in ["ls", "index", "image"] {
                let (lab, fault) = (&lab, fault.clone());
                scope.spawn(move || {
                    let origin = Origin::start().unwrap();
                    origin.serve_file("/layer.tar", &lab.path("layer.tar")).unwrap();
                    origin.set_faults(move |_| vec![fault.clone()]);
                    let url = origin.url("/layer.tar");
                    let out = format!("{command}-{}", url.rsplit(':').next().unwrap().replace('/', "-"));
                    let args: &[&str] = match command {
                        "image" => &["image", &url, "-o", &out, "--no-cache", "--deadline", "4s"],
                        _ => &[command, &url, "--deadline", "4s"],
                    };
                    let (said, output, took) = first_word(lab, args, words);
                    let all = text(&output.stderr);
                    assert_eq!(output.status.code(), Some(1), "{args:?}: {all}");
                    let is_wait = |line: &&str| line.contains("; waiting") || line.contains("; asking again");
                    let waits: Vec<_> = all.lines().filter(is_wait).collect();
                    assert!(!waits.is_empty() && waits[0].contains(&url), "{args:?}: {all}");
                    assert!(said.is_some(), "{args:?}: no {words}: {all}");
                    // A deadline is no more than a few times itself, however busy the machine is.
                    assert!(took < Duration::from_secs(30), "{args:?}: {took:?}");
                    let last = all.lines().last().unwrap();
                    assert!(last.starts_with("tarblk: http") && !last.contains("waiting"), "{last}");
                });
            }
        }
    });
}

/// Bytes that trickle are no progress, whether of bodies or heads: a command ends.
#[test]
fn a_trickle_is_a_stall() {
    let lab = Lab::new();
    let layer = fs::read(lab.path("layer.tar")).unwrap();
    for head_trickles in [true, false] {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/layer.tar", listener.local_addr().unwrap());
        let len = layer.len();
        let whole = layer.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (mut stream, whole) = (stream.unwrap(), whole.clone());
                std::thread::spawn(move || {
                    use std::io::Read as _;
                    let mut asked = [0; 4096];
                    let got = stream.read(&mut asked).unwrap_or(0);
                    let asked = text(&asked[..got]).to_ascii_lowercase();
                    let range = asked
                        .split("range: bytes=")
                        .nth(1)
                        .and_then(|rest| rest.split("\r\n").next());
                    let Some((from, to)) = range.and_then(|range| range.split_once('-')) else {
                        return;
                    };
                    let (from, to): (usize, usize) = (from.parse().unwrap(), to.parse().unwrap());
                    let first = to == 0;
                    let head = format!(
                        "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{to}/{len}\r\nContent-Length: {}\r\n\r\n",
                        to + 1 - from
                    );
                    let quick = if head_trickles {
                        3
                    } else {
                        head.len() + usize::from(first)
                    };
                    let answer = [head.as_bytes(), &whole[from..=to]].concat();
                    let _ = stream.write_all(&answer[..quick]);
                    for byte in &answer[quick..] {
                        std::thread::sleep(Duration::from_millis(100));
                        if stream.write_all(&[*byte]).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        let (said, output, took) = first_word(&lab, &["ls", &url, "--deadline", "3s"], "; waiting");
        let all = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{all}");
        assert!(took < Duration::from_secs(30), "{took:?}: {all}");
        if head_trickles {
            assert!(said.is_some(), "{all}");
        } else {
            assert!(all.contains("bytes came in"), "{all}");
        }
    }
}

/// A device that would run out of descriptors is refused before it is there; a limit that may be raised is.
#[test]
fn too_few_descriptors_are_refused_at_once() {
    let Some(_alone) = devices("too_few_descriptors_are_refused_at_once") else {
        return;
    };
    let lab = Lab::new();
    fs::create_dir(lab.path("mnt")).unwrap();
    let limited = |limit: &str| {
        let program = lab.tarblk().get_program().to_owned();
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("ulimit {limit}; exec \"$@\""), "sh"])
            .arg(program)
            .args(["mount", "layer.tar", "mnt", "-q"])
            .current_dir(lab.dir.path())
            .env("TARBLK_CACHE", lab.path("cache"))
            .env("TARBLK_STATE_DIR", lab.path("states"))
            .env("TARBLK_SERVICE_IDLE", "0");
        command.output().unwrap()
    };
    let output = limited("-n 28");
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(
        said.contains("28 files may be open") && said.contains("ulimit -n"),
        "{said}"
    );
    // The service has the limit of whoever started it, as long as it lives.
    lab.assert_nothing_served();
    let output = limited("-Sn 28");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(fs::read(lab.path("mnt/etc/hello")).unwrap(), b"hello, world\n");
    lab.good(&["umount", "mnt"]);
}

/// Answers every request with this, and closes.
fn answering(answer: Vec<u8>) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let host = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, answer) = (stream.unwrap(), answer.clone());
            // A connection may be opened ahead, and nothing asked on it.
            std::thread::spawn(move || {
                use std::io::Read as _;
                let mut asked = [0; 4096];
                let _ = stream.read(&mut asked);
                let _ = stream.write_all(&answer);
            });
        }
    });
    host
}

/// Whatever a stranger wrote into a name, a header, a body or a document: messages are lines of a bounded length, and move no cursor.
#[test]
fn what_strangers_wrote_is_cut_in_messages() {
    let lab = Lab::new();
    let evil = format!("\u{1b}[2J\u{1b}]0;title\u{7}\u{202e}{}", "x".repeat(60_000));
    let plain = "y".repeat(30_000);
    let json = |text: &str| serde_json::to_string(text).unwrap();
    let with_body = |status: &str, headers: &str, body: &str| {
        let len = body.len();
        answering(
            format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {len}\r\nConnection: close\r\n\r\n{body}")
                .into_bytes(),
        )
    };
    let error = format!("{{\"errors\":[{{\"code\":{0},\"message\":{0}}}]}}", json(&evil));
    let refusing = with_body("403 Forbidden", "", &error);
    let absent = with_body("404 Not Found", "", &error);
    let manifest = with_body(
        "200 OK",
        "Content-Type: application/json\r\n",
        &format!("{{\"mediaType\":{}}}", json(&evil)),
    );
    let leading = with_body("302 Found", &format!("Location: ftp://{plain}/x\r\n"), "");
    let wrong = with_body("206 Partial Content", &format!("Content-Range: bytes {plain}\r\n"), "");
    let reason = with_body(&format!("418 {plain}"), "", &plain);
    let realm = with_body(
        "401 Unauthorized",
        &format!("WWW-Authenticate: Bearer realm=\"{plain}\"\r\n"),
        &error,
    );
    // A tar with a name of 60,000 bytes on what ends too early.
    let long = [
        pax("path", &evil[..4000]),
        header("q", b"00000100000\0", b'0', ""),
        vec![1; 700],
    ]
    .concat();
    fs::write(
        lab.path("cut.tar"),
        layer_of(&[])[..0].iter().copied().chain(long).collect::<Vec<_>>(),
    )
    .unwrap();
    let record = pax(&evil[..2000], "v");
    fs::write(lab.path("pax.tar"), [record, header("q", b"zz\0", b'0', "")].concat()).unwrap();
    // An image in a directory whose documents say such things.
    fs::create_dir_all(lab.path("oci/blobs/sha256")).unwrap();
    fs::write(lab.path("oci/oci-layout"), "{\"imageLayoutVersion\":\"1.0.0\"}").unwrap();
    let entry = format!(
        "{{\"schemaVersion\":2,\"manifests\":[{{\"mediaType\":{0},\"digest\":{0},\"size\":1,\"annotations\":{{\"org.opencontainers.image.ref.name\":{0}}}}}]}}",
        json(&evil)
    );
    fs::write(lab.path("oci/index.json"), entry).unwrap();
    let (http, docker) = (
        |host: &str| format!("http://{host}/l.tar"),
        |host: &str| format!("docker://{host}/i:1"),
    );
    for source in [
        docker(&refusing),
        docker(&absent),
        docker(&manifest),
        docker(&leading),
        docker(&realm),
        docker(&reason),
        http(&leading),
        http(&wrong),
        http(&reason),
        "cut.tar".to_owned(),
        "pax.tar".to_owned(),
        "oci:oci".to_owned(),
        "oci:oci:other".to_owned(),
    ] {
        let mut args = vec!["ls", &source, "-vv", "--retry-for", "0s"];
        if source.starts_with("docker") {
            args.push("--plain-http");
        }
        let output = lab.run(&args);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{source}: {said}");
        for line in said.lines() {
            assert!(
                line.chars().count() < 2200,
                "{source}: {} characters: {line}",
                line.chars().count()
            );
            let moves = |c: char| c.is_control() || c == '\u{202e}';
            assert!(!line.contains(moves), "{source}: {line:?}");
        }
        let last = said.lines().last().unwrap();
        assert!(
            last.starts_with("tarblk: ") && last.chars().count() < 1200,
            "{source}: {last}"
        );
    }
}
