//! Whole commands, as a person types them: results, exit codes, one-line errors, and nothing left behind.

mod lab;

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Stdio};

use lab::{Lab, devices, mounts_below, pattern, skip, text};
use serde_json::Value;
use tarblk::internals::bench::origin::Origin;

#[test]
fn usage_is_told_from_failure() {
    let lab = Lab::new();
    assert!(lab.good(&["--help"]).contains("tarblk mount https://"));
    assert_eq!(
        lab.good(&["--version"]),
        format!("tarblk {}\n", env!("CARGO_PKG_VERSION"))
    );
    assert!(lab.bad(&[], 2).contains("Usage: tarblk"));
    lab.bad(&["frobnicate"], 2);
    lab.bad(&["ls"], 2);
    lab.bad(&["image", "layer.tar"], 2);
    assert!(
        lab.bad(&["bench", "layer.tar", "--rate", "200mbps", "--", "true"], 2)
            .contains("200mbit or 25MB/s")
    );
    assert!(
        lab.bad(&["bench", "layer.tar", "--rtt", "20", "--", "true"], 2)
            .contains("20ms")
    );
    lab.bad(
        &["bench", "layer.tar", "--without", "empty,full,untar,loop", "--", "true"],
        2,
    );
    lab.bad(&["bench", "http://127.0.0.1:1/x", "--rtt", "1ms", "--", "true"], 2);
    lab.bad(&["bench", "layer.tar"], 2);
    lab.bad(&["attach", "layer.tar", "--backend", "nbd"], 2);
    lab.bad(&["-q", "-v", "ps"], 2);
    for command in [
        "index", "ls", "diff", "image", "attach", "mount", "umount", "ps", "stats", "detach", "bench", "demo",
    ] {
        assert!(lab.good(&[command, "--help"]).contains("Usage: tarblk"), "{command}");
    }
}

#[test]
fn index_counts_and_writes() {
    let lab = Lab::new();
    let summary = lab.good(&["index", "layer.tar", "-o", "layer.tarblk", "--no-digests"]);
    assert!(summary.contains("6: 2 files, 3 directories, 1 symlinks"), "{summary}");
    let json = lab.json(&["index", "layer.tar", "--json"]);
    assert_eq!((json["entries"].as_u64(), json["files"].as_u64()), (Some(6), Some(2)));
    assert_eq!(json["payload_bytes"], 13 + 3_000_001);
    assert_eq!(
        json["index_bytes"],
        fs::metadata(lab.path("layer.tarblk")).unwrap().len()
    );
    assert!(
        json["bytes_fetched"].as_u64().unwrap() < 100_000,
        "payload is passed over"
    );
    assert_eq!(lab.good(&["index", "layer.tar", "--quiet"]), "");
    // The same every time, and from a server too.
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", &lab.path("layer.tar")).unwrap();
    lab.good(&["index", &origin.url("/layer.tar"), "-o", "remote.tarblk"]);
    assert_eq!(
        fs::read(lab.path("remote.tarblk")).unwrap(),
        fs::read(lab.path("layer.tarblk")).unwrap()
    );
    assert!(!lab.path("cache").exists(), "index keeps nothing");
}

#[test]
fn an_index_of_everything_is_verified_against_its_layer() {
    let lab = Lab::new();
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", &lab.path("layer.tar")).unwrap();
    let url = origin.url("/layer.tar");
    // Digests by default of what is here, and of what is far away when that is wanted; the same from both places.
    let checked = lab.good(&["index", "layer.tar", "-o", "checked.tarblk"]);
    assert!(checked.contains("digests of 92 chunks"), "{checked}");
    let full = lab.good(&["index", "layer.tar", "-o", "full.tarblk", "--full"]);
    assert!(full.contains("of every file") && full.contains("exact tar"), "{full}");
    lab.good(&["index", &url, "-o", "far.tarblk", "--full"]);
    assert_eq!(
        fs::read(lab.path("far.tarblk")).unwrap(),
        fs::read(lab.path("full.tarblk")).unwrap()
    );
    let headers = lab.good(&["index", &url, "-o", "headers.tarblk"]);
    assert!(headers.contains("no digests"), "{headers}");
    for index in ["checked.tarblk", "full.tarblk", "headers.tarblk"] {
        for layer in ["layer.tar", &url] {
            let said = lab.good(&["index", "verify", index, layer]);
            assert!(said.contains("the same to the last bit"), "{said}");
            assert_eq!(said.contains("no digests"), index == "headers.tarblk", "{said}");
        }
    }
    // A byte of content, a byte of a header, a byte that nobody reads.
    let tar = fs::read(lab.path("layer.tar")).unwrap();
    let change = |at: usize, to: u8| {
        let mut other = tar.clone();
        assert_ne!(other[at], to);
        other[at] = to;
        fs::write(lab.path("other.tar"), other).unwrap();
    };
    let content = tar.windows(13).position(|bytes| bytes == b"hello, world\n").unwrap();
    change(content, b'J');
    let said = lab.bad(&["index", "verify", "full.tarblk", "other.tar"], 1);
    assert!(said.contains("the digest of chunk 0 (byte 0 of the tar)"), "{said}");
    lab.good(&["index", "verify", "headers.tarblk", "other.tar"]);
    let json = lab.json(&["index", "verify", "headers.tarblk", "other.tar", "--json"]);
    assert_eq!((&json["equal"], &json["chunk_digests"]), (&true.into(), &0.into()));
    change(tar.len() - 1024 - 512 - 1, 1);
    let said = lab.bad(&["index", "verify", "checked.tarblk", "other.tar"], 1);
    assert!(
        said.contains("the digest of chunk 91 (byte 2981888 of the tar)"),
        "{said}"
    );
    // An entry of another name, and of another mode.
    let header = tar.windows(9).position(|bytes| bytes == b"etc/hello").unwrap();
    let with_checksum = |at: usize, to: u8| {
        let mut other = tar.clone();
        other[at] = to;
        other[header + 148..header + 156].fill(b' ');
        let sum: u32 = other[header..header + 512].iter().map(|byte| u32::from(*byte)).sum();
        other[header + 148..header + 155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        fs::write(lab.path("other.tar"), other).unwrap();
        lab.bad(&["index", "verify", "headers.tarblk", "other.tar"], 1)
    };
    let said = with_checksum(header + 4, b'j');
    let name = "entry 3, its name: 'etc/hello' in the index, 'etc/jello' in the layer";
    assert!(said.contains(name), "{said}");
    let said = with_checksum(header + 104, b'7');
    assert!(
        said.contains("entry 3 ('etc/hello'), its mode: 644 in the index, 744 in the layer"),
        "{said}"
    );
    let said = lab.bad(&["index", "verify", "layer.tar", "layer.tar"], 1);
    assert!(said.contains("not a tarblk index"), "{said}");
    assert!(lab.bad(&["index", "verify", "full.tarblk"], 2).contains("SOURCE"));
    assert!(lab.bad(&["index"], 2).contains("SOURCE"));
}

#[test]
fn ls_lists_layers_and_indexes_alike() {
    let lab = Lab::new();
    lab.good(&["index", "layer.tar", "-o", "layer.tarblk"]);
    for form in [None, Some("--json"), Some("--mtree")] {
        let args = |name: &'static str| ["ls", name].into_iter().chain(form).collect::<Vec<_>>();
        assert_eq!(
            lab.good(&args("layer.tar")),
            lab.good(&args("layer.tarblk")),
            "{form:?}"
        );
    }
    let listed = lab.good(&["ls", "layer.tar"]);
    assert_eq!(listed.lines().count(), 6);
    assert!(listed.contains("etc/link -> hello"), "{listed}");
    let lines = lab.good(&["ls", "layer.tar", "--json"]);
    let entries: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let hello = entries.iter().find(|entry| entry["path"] == "etc/hello").unwrap();
    assert_eq!(
        (&hello["size"], &hello["mode"], &hello["mtime"]),
        (&13.into(), &"0644".into(), &1_700_000_000.into())
    );
    assert!(lab.good(&["ls", "layer.tar", "--mtree"]).starts_with("#mtree\n"));
    lab.bad(&["ls", "layer.tar", "--mtree", "--json"], 2);
}

#[test]
fn diff_tells_what_changed() {
    let lab = Lab::new();
    let write = |name: &str, mode, entries: &[(&str, &str)]| {
        let mut tar = tar::Builder::new(File::create(lab.path(name)).unwrap());
        for (path, content) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_size(u64::try_from(content.len()).unwrap());
            header.set_mode(mode);
            header.set_mtime(7);
            tar.append_data(&mut header, path, content.as_bytes()).unwrap();
        }
        tar.into_inner().unwrap();
    };
    write("old.tar", 0o644, &[("a", "1"), ("d/gone", "x"), ("same-size", "old")]);
    write("new.tar", 0o600, &[("a", "22"), ("d/new", "yyy"), ("same-size", "new")]);
    write("newer.tar", 0o644, &[("a", "1"), ("d/gone", "x"), ("same-size", "new")]);
    lab.good(&["index", "new.tar", "-o", "new.tarblk"]);
    for new in ["new.tar", "new.tarblk"] {
        let told = lab.good(&["diff", "old.tar", new]);
        let lines: Vec<_> = told.lines().collect();
        assert_eq!(lines[0], "~ a  mode 0644 to 0600, 1 to 2 bytes");
        assert_eq!((lines[1], lines[2]), ("- d/gone", "+ d/new"));
        assert_eq!(lines[3], "~ same-size  mode 0644 to 0600, content?");
        assert_eq!(lines[4], "1 added, 1 removed, 2 changed");
        assert!(lines[5].starts_with("8 B of files") && lines.len() == 6, "{told}");
    }
    let told = lab.good(&["diff", "old.tar", "newer.tar"]);
    assert!(
        told.starts_with("0 added, 0 removed, 0 changed; 3 of the same size may"),
        "{told}"
    );
    let told = lab.good(&["diff", "old.tar", "newer.tar", "--uncertain"]);
    assert!(told.starts_with("~ a  content?\n~ d/gone  content?\n"), "{told}");
    // Full indexes know contents.
    for name in ["old", "newer"] {
        lab.good(&["index", &format!("{name}.tar"), "--full", "-o", &format!("{name}.full")]);
    }
    let told = lab.good(&["diff", "old.full", "newer.full"]);
    let totals = "0 added, 0 removed, 1 changed\n5 B of files; a machine that has the first would fetch at most 3 B\n";
    assert_eq!(told, format!("~ same-size  content\n{totals}"));
    let json = lab.good(&["diff", "old.tar", "new.tar", "--json"]);
    let lines: Vec<Value> = json.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["aspects"], serde_json::json!(["mode", "size"]));
    assert_eq!(
        (&lines[0]["before"]["size"], &lines[0]["after"]["size"]),
        (&1.into(), &2.into())
    );
    assert_eq!(
        (&lines[1]["change"], &lines[1]["before"]["path"]),
        (&"removed".into(), &"d/gone".into())
    );
    assert_eq!(lines[4]["totals"]["fetch_bytes"], 8);
    lab.bad(&["diff", "old.tar"], 2);
    assert!(lab.bad(&["diff", "old.tar", "missing.tar"], 1).contains("missing.tar"));
}

#[test]
fn a_reader_that_leaves_ends_the_command_quietly() {
    let lab = Lab::new();
    // More than a pipe holds.
    let mut tar = tar::Builder::new(File::create(lab.path("many.tar")).unwrap());
    for i in 0..20_000 {
        let mut header = tar::Header::new_gnu();
        header.set_size(0);
        tar.append_data(&mut header, format!("a/rather/long/name/{i}"), &b""[..])
            .unwrap();
    }
    tar.into_inner().unwrap();
    let mut child = lab
        .tarblk()
        .args(["ls", "many.tar"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut some = [0; 100];
    child.stdout.take().unwrap().read_exact(&mut some).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), text(&output.stderr).as_str()), (Some(0), ""));
}

#[test]
fn image_is_whole_or_not_there() {
    let lab = Lab::new();
    lab.good(&["image", "layer.tar", "-o", "layer.ext4"]);
    let image = fs::read(lab.path("layer.ext4")).unwrap();
    assert_eq!(&image[1024 + 56..1024 + 58], [0x53, 0xef], "ext4's magic number");
    match Command::new("e2fsck").arg("-fn").arg(lab.path("layer.ext4")).output() {
        Ok(checked) => assert!(checked.status.success(), "{}", text(&checked.stdout)),
        Err(_) => skip("image_is_whole_or_not_there", "e2fsck is not installed"),
    }
    // From a server, with the index from there too, it is the same to the last bit.
    lab.good(&["index", "layer.tar", "-o", "layer.tarblk"]);
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", &lab.path("layer.tar")).unwrap();
    origin.serve_file("/layer.tarblk", &lab.path("layer.tarblk")).unwrap();
    let (url, index) = (origin.url("/layer.tar"), origin.url("/layer.tarblk"));
    lab.good(&["image", &url, "--index", &index, "-o", "remote.ext4", "--no-cache"]);
    assert!(fs::read(lab.path("remote.ext4")).unwrap() == image, "the images differ");

    let before = lab.names();
    fs::write(
        lab.path("cut.tar"),
        &fs::read(lab.path("layer.tar")).unwrap()[..1_000_000],
    )
    .unwrap();
    assert!(lab.bad(&["image", "cut.tar", "-o", "cut.ext4"], 1).contains("cut.tar"));
    assert!(
        lab.bad(&["image", "layer.tar", "-o", "no/such/dir"], 1)
            .contains("no/such/dir")
    );
    assert!(lab.bad(&["image", "layer.tar", "-o", "."], 1).contains("directory"));
    fs::remove_file(lab.path("cut.tar")).unwrap();
    assert_eq!(lab.names(), before, "nothing is left of what failed");
}

/// Of an index on a server the decoders' histories stay there until they are needed.
#[test]
fn only_the_hot_part_of_a_served_index_is_fetched() {
    let lab = Lab::new();
    // Words at random: a history of each place has much that is needed.
    let words: Vec<String> = (0..5000_u64).map(|n| format!("{:x} ", n * n * n)).collect();
    let (mut state, mut content) = (7_u64, String::new());
    while content.len() < 44_000_000 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        content.push_str(&words[usize::try_from((state >> 33) % 5000).unwrap()]);
    }
    fs::write(lab.path("words"), &content).unwrap();
    let tar = Command::new("tar")
        .args(["-I", "zstd -q", "-cf", "words.tar.zst", "words"])
        .current_dir(lab.dir.path())
        .status();
    assert!(tar.unwrap().success());
    lab.good(&["index", "words.tar.zst", "-o", "words.tarblk", "--spacing", "256KiB"]);
    let index_len = fs::metadata(lab.path("words.tarblk")).unwrap().len();
    assert!(index_len > 1_900_000, "{index_len}");
    let origin = Origin::start().unwrap();
    for name in ["words.tar.zst", "words.tarblk"] {
        origin.serve_file(&format!("/{name}"), &lab.path(name)).unwrap();
    }
    let (url, index) = (origin.url("/words.tar.zst"), origin.url("/words.tarblk"));
    lab.good(&["image", "words.tar.zst", "-o", "local.ext4", "--no-cache"]);
    let remote = ["image", &url, "--index", &index, "-o", "remote.ext4", "--no-cache"];
    // How much of the index the first request for it brought.
    let first_brought = || {
        lab.good(&remote);
        assert!(fs::read(lab.path("remote.ext4")).unwrap() == fs::read(lab.path("local.ext4")).unwrap());
        let events = origin.take_log().events;
        let first = events.iter().find(|event| event.path == "/words.tarblk");
        first.unwrap().bytes
    };
    assert_eq!(first_brought(), 1536 << 10);
    // Where it cannot be asked for in parts all of it comes.
    origin.set_ranges(false);
    assert_eq!(first_brought(), index_len);
    // And what is no index is told, however long it is.
    fs::write(lab.path("words.tarblk"), vec![1; 2_000_000]).unwrap();
    origin.serve_file("/words.tarblk", &lab.path("words.tarblk")).unwrap();
    origin.set_ranges(true);
    assert!(lab.bad(&remote, 1).contains("not a tarblk index"));
}

/// A server that makes its answers as it goes says neither how long they are nor gives parts of them.
#[test]
fn an_index_of_untold_length_comes_whole() {
    let lab = Lab::new();
    lab.good(&["index", "layer.tar", "-o", "layer.tarblk"]);
    lab.good(&["image", "layer.tar", "-o", "layer.ext4"]);
    let index = fs::read(lab.path("layer.tarblk")).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/layer.tarblk", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().take(10) {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            let _head = stream.read(&mut request).unwrap();
            let answer = [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", index.as_slice()].concat();
            stream.write_all(&answer).unwrap();
        }
    });
    lab.good(&["image", "layer.tar", "--index", &url, "-o", "other.ext4", "--no-cache"]);
    assert!(fs::read(lab.path("other.ext4")).unwrap() == fs::read(lab.path("layer.ext4")).unwrap());
}

#[test]
fn errors_name_the_cause_in_one_line() {
    let lab = Lab::new();
    let origin = Origin::start().unwrap();
    let absent = origin.url("/absent.tar");
    assert!(lab.bad(&["index", "absent.tar"], 1).contains("absent.tar"));
    assert!(lab.bad(&["index", "."], 1).contains("directory"));
    assert!(lab.bad(&["index", "ftp://host/x.tar"], 1).contains("ftp"));
    assert!(lab.bad(&["index", &absent], 1).contains("404"));
    let secret = absent.replace("http://", "http://me:secret@") + "?sig=secret";
    assert!(!lab.bad(&["index", &secret], 1).contains("secret"));
    fs::write(lab.path("noise"), pattern(5000)).unwrap();
    lab.bad(&["index", "noise"], 1);
    // An index with a flipped bit, and one of another layer.
    lab.good(&["index", "layer.tar", "-o", "layer.tarblk"]);
    let mut index = fs::read(lab.path("layer.tarblk")).unwrap();
    let middle = index.len() / 2;
    index[middle] ^= 4;
    fs::write(lab.path("flipped.tarblk"), index).unwrap();
    assert!(lab.bad(&["ls", "flipped.tarblk"], 1).contains("flipped.tarblk"));
    let mut longer = fs::read(lab.path("layer.tar")).unwrap();
    longer.extend([0; 10_240]);
    fs::write(lab.path("other.tar"), longer).unwrap();
    let said = lab.bad(
        &["image", "other.tar", "--index", "layer.tarblk", "-o", "other.ext4"],
        1,
    );
    assert!(said.contains("another layer"), "{said}");
    assert!(lab.bad(&["stats", "/dev/loop99"], 1).contains("tarblk ps"));
    assert!(lab.bad(&["umount", "/"], 1).contains("nothing that tarblk attached"));
}

#[test]
fn man_pages_and_completions_come_from_the_definitions() {
    let lab = Lab::new();
    fs::create_dir(lab.path("man")).unwrap();
    lab.good(&["generate", "man", "man"]);
    let page = fs::read_to_string(lab.path("man/tarblk-mount.1")).unwrap();
    assert!(
        page.contains(".TH tarblk-mount 1") && page.contains("\\-\\-index"),
        "{page}"
    );
    // How it is called with values, and what a reader of man pages looks for.
    assert!(
        page.contains("[\\-\\-cache <DIR>]") && page.contains("<SOURCE> <MOUNTPOINT>"),
        "{page}"
    );
    for section in ["FILES", "ENVIRONMENT", "EXIT STATUS", "SEE ALSO"] {
        assert!(page.contains(&format!(".SH \"{section}\"\n")), "{section}: {page}");
    }
    for name in ["tarblk-attach.1", "tarblk-bench.1", "tarblk.1"] {
        let page = fs::read_to_string(lab.path("man").join(name)).unwrap();
        assert!(
            page.contains(".SH \"EXAMPLES\"\n.nf\n") && !page.contains("EXTRA"),
            "{page}"
        );
        assert!(page.is_ascii(), "{name} is not what roff reads");
    }
    assert!(
        !lab.path("man/tarblk-serve-device.1").exists(),
        "hidden commands have no page"
    );
    for shell in ["bash", "zsh", "fish"] {
        let script = lab.good(&["generate", "completions", shell]);
        assert!(script.contains("umount") && script.contains("backend"), "{shell}");
    }
    assert!(lab.bad(&["generate", "man", "absent"], 1).contains("absent"));
}

#[test]
fn a_layer_is_mounted_from_a_server_and_leaves_nothing() {
    let Some(_alone) = devices("a_layer_is_mounted_from_a_server_and_leaves_nothing") else {
        return;
    };
    let lab = Lab::new();
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", &lab.path("layer.tar")).unwrap();
    let url = origin.url("/layer.tar");
    fs::create_dir(lab.path("mnt")).unwrap();
    let said = lab.json(&["mount", &url, "mnt", "--json"]);
    assert_eq!(fs::read(lab.path("mnt/etc/hello")).unwrap(), b"hello, world\n");
    assert!(fs::read(lab.path("mnt/etc/link")).unwrap() == b"hello, world\n");
    assert!(
        fs::read(lab.path("mnt/etc/big")).unwrap() == pattern(3_000_001),
        "contents differ"
    );
    let device = said["device"].as_str().unwrap();
    let listed = lab.json(&["ps", "--json"]);
    assert_eq!(listed[0]["device"], device);
    assert!(lab.good(&["ps"]).contains(device));
    let counted = lab.json(&["stats", device, "--json"]);
    assert!(counted["counters"]["device"]["reads"].as_u64().unwrap() > 0);
    assert!(lab.good(&["stats", "mnt"]).contains("from network"));
    assert!(lab.bad(&["detach", device], 1).contains("in use"));
    assert!(lab.bad(&["mount", "layer.tar", "mnt"], 1).contains("already has"));
    lab.good(&["umount", "mnt"]);
    assert_eq!(lab.good(&["ps", "--quiet"]), "");
    lab.assert_nothing_served();
    assert!(mounts_below(lab.dir.path()).is_empty());

    // The second time the index is in the cache: one question whether the layer is still the same.
    origin.settle();
    let before = origin.counters().requests;
    let device = lab.good(&["attach", &url]);
    origin.settle();
    assert!(
        origin.counters().requests - before <= 2,
        "{} requests",
        origin.counters().requests - before
    );
    lab.good(&["detach", device.trim()]);
    assert!(
        !Path::new(&format!(
            "/sys/block/{}/loop",
            device.trim().trim_start_matches("/dev/")
        ))
        .exists()
    );
    assert!(lab.bad(&["mount", &origin.url("/gone"), "mnt"], 1).contains("404"));
    lab.assert_nothing_served();
}

#[test]
fn help_and_other_names_of_commands() {
    let lab = Lab::new();
    for command in ["mount", "umount", "ps", "logs", "index"] {
        assert_eq!(
            lab.good(&["help", command]),
            lab.good(&[command, "--help"]),
            "{command}"
        );
    }
    assert_eq!(lab.good(&["help"]), lab.good(&["--help"]));
    assert!(lab.bad(&["help", "frobnicate"], 2).contains("frobnicate"));
    for (alias, command) in [("unmount", "umount"), ("list", "ps")] {
        let of = |name: &str| lab.good(&[name, "-h"]).lines().next().map(str::to_owned);
        assert_eq!(of(alias), of(command));
        assert!(lab.good(&["--help"]).contains(&format!("[alias: {alias}]")), "{alias}");
    }
    assert_eq!(lab.good(&["list", "--quiet"]), "");
    let help = lab.good(&["bench", "--help"]);
    assert!(help.contains("docker://") && help.contains("oci:DIR"), "{help}");
    assert!(lab.good(&["index", "push", "--help"]).contains("hot part"));
}

#[test]
fn ls_of_some_paths() {
    use tar::EntryType::{Directory, Regular, Symlink};

    let lab = Lab::new();
    let mut tar = tar::Builder::new(File::create(lab.path("tree.tar")).unwrap());
    let mut add = |path: &str, kind: tar::EntryType, link: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(0);
        header.set_mode(0o755);
        if link.is_empty() {
            tar.append_data(&mut header, path, &b""[..]).unwrap();
        } else {
            tar.append_link(&mut header, path, link).unwrap();
        }
    };
    for (path, kind, link) in [
        ("usr/", Directory, ""),
        ("usr/lib/", Directory, ""),
        ("usr/lib/a", Regular, ""),
        ("usr/lib/b", Regular, ""),
        ("usr/lib64/c", Regular, ""),
        ("lib", Symlink, "usr/lib"),
        ("loop", Symlink, "loop"),
    ] {
        add(path, kind, link);
    }
    tar.into_inner().unwrap();
    lab.good(&["index", "tree.tar", "-o", "tree.tarblk"]);
    let names = |args: &[&str]| -> Vec<String> {
        let listed = lab.good(&[&["ls"][..], args, &["--json"]].concat());
        let name = |line: &str| {
            serde_json::from_str::<Value>(line).unwrap()["path"]
                .as_str()
                .unwrap()
                .to_owned()
        };
        listed.lines().map(name).collect()
    };
    for source in ["tree.tar", "tree.tarblk"] {
        assert_eq!(names(&[source]).len(), 7);
        assert_eq!(names(&[source, "/usr/lib"]), ["usr/lib/", "usr/lib/a", "usr/lib/b"]);
        assert_eq!(
            names(&[source, "usr/lib/a", "usr/lib64/"]),
            ["usr/lib/a", "usr/lib64/c"]
        );
        // Links are followed on the way; a last one is what was asked for, unless it has to be a directory.
        assert_eq!(names(&[source, "lib/b"]), ["usr/lib/b"]);
        assert_eq!(names(&[source, "lib"]), ["lib"]);
        assert_eq!(names(&[source, "lib/"]), ["usr/lib/", "usr/lib/a", "usr/lib/b", "lib"]);
        assert_eq!(names(&[source, "/"]).len(), 7);
        for absent in ["usr/li", "lib/c", "usr/lib/a/x", "loop/x"] {
            let said = lab.bad(&["ls", source, "usr", absent], 1);
            assert!(said.contains(&format!("{source} has no {absent}")), "{said}");
        }
        let mtree = lab.good(&["ls", source, "usr/lib/a", "--mtree"]);
        assert_eq!(mtree.lines().count(), 2, "{mtree}");
        assert!(mtree.contains("\n./usr/lib/a "), "{mtree}");
    }
}

#[test]
fn logs_of_a_device() {
    let Some(_alone) = devices("logs_of_a_device") else {
        return;
    };
    let lab = Lab::new();
    fs::create_dir(lab.path("mnt")).unwrap();
    assert!(lab.bad(&["logs", "mnt"], 1).contains("tarblk ps"));
    lab.good(&["mount", "layer.tar", "mnt", "-q"]);
    let device = lab.json(&["ps", "--json"])[0]["device"].as_str().unwrap().to_owned();
    let mounted = fs::canonicalize(lab.path("mnt")).unwrap();
    assert_eq!(
        lab.good(&["ps", "--names"]),
        format!("{device}\n{}\n", mounted.display())
    );
    let log = lab.good(&["logs", "mnt"]);
    assert!(log.contains("serving ") && log.contains("layer.tar"), "{log}");
    assert_eq!(lab.good(&["logs", &device]), log);
    let last = lab.good(&["logs", "-n", "1", "mnt"]);
    assert!(log.ends_with(&last) && last.lines().count() == 1, "{last}");
    assert_eq!(lab.good(&["logs", "-n", "0", "mnt"]), "");
    // Followed until the device is gone; what a name in it holds moves no cursor.
    let file = lab.path("states/service.log");
    let mut command = lab.tarblk();
    command.args(["logs", "--follow", "mnt"]).stdout(Stdio::piped());
    let mut following = command.spawn().unwrap();
    let mut out = following.stdout.take().unwrap();
    let mut start = vec![0; log.len()];
    out.read_exact(&mut start).unwrap();
    assert_eq!(text(&start), log);
    let mut append = File::options().append(true).open(&file).unwrap();
    std::io::Write::write_all(&mut append, b"added \x1b[31m\n").unwrap();
    let mut added = [0; 12];
    out.read_exact(&mut added).unwrap();
    assert_eq!(text(&added), "added ?[31m\n");
    lab.good(&["umount", "mnt"]);
    let mut rest = String::new();
    out.read_to_string(&mut rest).unwrap();
    assert!(following.wait().unwrap().success());
}
