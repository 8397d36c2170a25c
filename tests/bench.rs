//! `tarblk bench`: every alternative of a layer and of an image, and nothing left behind.

mod lab;
mod layered;
mod scripted;

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use lab::{Lab, devices, mounts_below, skip, text};
use layered::{dir, file, symlink, tar_of, whiteout, write_oci_layout};

/// Adds a shell and its libraries to a directory of a new tar; false if this machine has no `ldd`.
fn layer_with_shell(path: &Path) -> bool {
    let shell = fs::canonicalize("/bin/sh").unwrap();
    let Ok(ldd) = Command::new("ldd").arg(&shell).output() else {
        return false;
    };
    let mut tar = tar::Builder::new(File::create(path).unwrap());
    for dir in ["dev/", "proc/", "tmp/"] {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(0o755);
        header.set_size(0);
        tar.append_data(&mut header, dir, &b""[..]).unwrap();
    }
    tar.append_path_with_name(&shell, "bin/sh").unwrap();
    for library in text(&ldd.stdout)
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let file = fs::canonicalize(library).unwrap();
        tar.append_path_with_name(file, library.trim_start_matches('/'))
            .unwrap();
    }
    tar.into_inner().unwrap();
    true
}

#[test]
fn bench_measures_every_alternative_and_cleans_up() {
    let Some(_alone) = devices("bench_measures_every_alternative_and_cleans_up") else {
        return;
    };
    let lab = Lab::new();
    if !layer_with_shell(&lab.path("shell.tar")) {
        skip("bench_measures_every_alternative_and_cleans_up", "ldd is not installed");
        return;
    }
    fs::create_dir(lab.path("scratch")).unwrap();
    let command = [
        "--",
        "sh",
        "-c",
        "test ! -e /tmp/answer && echo $(( 6 * 7 )) > /tmp/answer && test -c /dev/null && test -d /proc/self",
    ];
    let mut args = vec![
        "bench",
        "shell.tar",
        "--rtt",
        "2ms",
        "--rate",
        "800mbit",
        "--runs",
        "2",
        "--with",
        "walk",
    ];
    args.extend(["--scratch", "scratch", "--json", "--report", "report.html"]);
    args.extend(command);
    let outcome = lab.json(&args);
    let rows = outcome["rows"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["row"].as_str().unwrap()).collect();
    assert_eq!(names, ["empty", "walk", "full", "untar", "loop"]);
    let layer = fs::metadata(lab.path("shell.tar")).unwrap().len();
    for row in rows {
        let runs = row["runs"].as_array().unwrap();
        assert_eq!(runs.len(), 2);
        for run in runs {
            let total = run["seconds"].as_f64().unwrap();
            let phases: f64 = run["phases"]
                .as_object()
                .unwrap()
                .values()
                .map(|time| time.as_f64().unwrap())
                .sum();
            assert!(total > 0.0 && (total - phases).abs() < 1e-6, "{row}");
            assert!(run["requests"].as_u64().unwrap() >= 1, "{row}");
        }
    }
    let fetched = |row: usize| rows[row]["runs"][0]["fetched_bytes"].as_u64().unwrap();
    assert!(fetched(3) > layer / 2 && fetched(3) <= layer, "untar brings the layer");
    assert!(fetched(2) < 10_000, "a full cache brings nothing: {}", fetched(2));
    let touched = outcome["touched"]["bytes"].as_u64().unwrap();
    assert!(touched > 0 && touched <= layer, "{touched} of {layer}");
    assert_eq!(outcome["touched"]["link_bytes"], touched);
    assert!(outcome["floor_seconds"].as_f64().unwrap() >= 0.004);
    let page = fs::read_to_string(lab.path("report.html")).unwrap();
    assert_eq!(page.matches("<svg").count(), 2);
    assert_eq!(
        fs::read_dir(lab.path("scratch")).unwrap().count(),
        0,
        "the scratch directory is empty"
    );

    // A command that fails is named, with what it said.
    let said = lab.bad(
        &[
            "bench",
            "shell.tar",
            "--scratch",
            "scratch",
            "--runs",
            "1",
            "--",
            "sh",
            "-c",
            "echo no luck >&2; exit 3",
        ],
        1,
    );
    assert!(said.contains("exit status: 3") && said.contains("no luck"), "{said}");
    assert_eq!(fs::read_dir(lab.path("scratch")).unwrap().count(), 0);
    assert!(mounts_below(lab.dir.path()).is_empty());
    lab.assert_nothing_served();
}

#[test]
fn an_interrupted_bench_leaves_nothing() {
    let Some(_alone) = devices("an_interrupted_bench_leaves_nothing") else {
        return;
    };
    let lab = Lab::new();
    if !layer_with_shell(&lab.path("shell.tar")) {
        skip("an_interrupted_bench_leaves_nothing", "ldd is not installed");
        return;
    }
    fs::create_dir(lab.path("scratch")).unwrap();
    let mut bench = lab.tarblk();
    bench.args([
        "bench",
        "shell.tar",
        "--scratch",
        "scratch",
        "--",
        "sh",
        "-c",
        "while :; do :; done",
    ]);
    let mut child = bench.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    // The command runs for ever; wait until it does.
    let began = Instant::now();
    while !mounts_below(lab.dir.path()).iter().any(|line| line.contains(" proc ")) {
        assert!(began.elapsed() < Duration::from_secs(120), "the command did not start");
        assert!(
            child.try_wait().unwrap().is_none(),
            "it ended before it was interrupted"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stderr).lines().last(), Some("tarblk: interrupted"));
    assert!(
        mounts_below(lab.dir.path()).is_empty(),
        "{:?}",
        mounts_below(lab.dir.path())
    );
    assert_eq!(fs::read_dir(lab.path("scratch")).unwrap().count(), 0);
    lab.assert_nothing_served();
}

#[test]
fn the_floor_of_a_compressed_layer_is_what_travels() {
    const NAME: &str = "the_floor_of_a_compressed_layer_is_what_travels";
    let Some(_alone) = devices(NAME) else { return };
    let lab = Lab::new();
    if !layer_with_shell(&lab.path("shell.tar")) {
        return skip(NAME, "ldd is not installed");
    }
    let gzip = Command::new("gzip")
        .args(["-k", "shell.tar"])
        .current_dir(lab.dir.path())
        .status();
    assert!(gzip.unwrap().success());
    let outcome = lab.json(&[
        "bench",
        "shell.tar.gz",
        "--rate",
        "10mbit",
        "--runs",
        "1",
        "--without",
        "full,untar,loop",
        "--scratch",
        ".",
        "--json",
        "--",
        "sh",
        "-c",
        ":",
    ]);
    let len = |name: &str| fs::metadata(lab.path(name)).unwrap().len();
    let (blob, tar) = (len("shell.tar.gz"), len("shell.tar"));
    let number = |name: &str| outcome["touched"][name].as_u64().unwrap();
    let (touched, travels) = (number("bytes"), number("link_bytes"));
    assert!(
        blob < tar && travels == touched * blob / tar,
        "{touched} {travels} of {blob} {tar}"
    );
    // 10 Mbit/s are 1.25 MB/s.
    let carried = f64::from(u32::try_from(travels).unwrap()) / 1_250_000.0;
    let floor = outcome["floor_seconds"].as_f64().unwrap() - outcome["local_run_seconds"].as_f64().unwrap();
    assert!((floor - carried).abs() < 0.001, "{floor} {carried}");
}

/// Whether this kernel stacks directories.
fn has_overlayfs() -> bool {
    let known = || fs::read_to_string("/proc/filesystems").is_ok_and(|names| names.contains("\toverlay\n"));
    known() || (Command::new("modprobe").arg("overlay").status().is_ok() && known())
}

#[test]
fn bench_measures_images_by_their_names_in_a_registry() {
    const NAME: &str = "bench_measures_images_by_their_names_in_a_registry";
    let Some(_alone) = devices(NAME) else { return };
    let lab = Lab::new();
    if !layer_with_shell(&lab.path("shell.tar")) {
        return skip(NAME, "ldd is not installed");
    }
    if !has_overlayfs() {
        return skip(NAME, "this kernel has no overlayfs");
    }
    fs::create_dir(lab.path("scratch")).unwrap();
    let layers = [
        fs::read(lab.path("shell.tar")).unwrap(),
        // The second is compressed, and so is the fourth.
        tar_of(&[
            file("gone", "of the second"),
            dir("old"),
            file("old/file", "x"),
            file("word", "two"),
            dir("place"),
            symlink("link", "place"),
        ]),
        tar_of(&[
            whiteout(".wh.gone"),
            dir("old"),
            whiteout("old/.wh..wh..opq"),
            file("old/new", "y"),
            file("link/through", "z"),
        ]),
        tar_of(&[whiteout("place/.wh.nothing"), file("word", "four")]),
    ];
    write_oci_layout(&layers, &lab.path("image"));
    let command = "test ! -e gone && test ! -e old/file && test -e old/new && read word <word; test \"$word\" = four && \
                   echo fine > /tmp/fine && test -c /dev/null";
    let outcome = lab.json(&[
        "bench",
        "oci:image:test",
        "--rtt",
        "2ms",
        "--rate",
        "800mbit",
        "--runs",
        "1",
        "--with",
        "walk",
        "--scratch",
        "scratch",
        "--json",
        "--report",
        "report.html",
        "--",
        "sh",
        "-c",
        command,
    ]);
    let rows = outcome["rows"].as_array().unwrap();
    let names: Vec<_> = rows.iter().map(|row| row["row"].as_str().unwrap()).collect();
    assert_eq!(names, ["empty", "walk", "full", "untar", "loop"]);
    assert_eq!(outcome["layers"], 4);
    let blobs = outcome["layer_bytes"].as_u64().unwrap();
    let figure = |row: usize, what: &str| rows[row]["runs"][0][what].as_u64().unwrap();
    assert!(
        figure(3, "fetched_bytes") > blobs / 2,
        "untar brings the blobs: {outcome}"
    );
    assert_eq!(figure(3, "requests"), 4, "a request for each blob");
    assert!(
        figure(2, "fetched_bytes") < 10_000,
        "a full cache brings nothing: {outcome}"
    );
    // Manifest, configuration, referrers, artifact, an index for each layer.
    assert!(
        figure(0, "requests") >= 8,
        "the indexes come from the registry: {outcome}"
    );
    let touched = outcome["touched"]["bytes"].as_u64().unwrap();
    assert!(touched > 0 && outcome["floor_seconds"].as_f64().unwrap() >= 0.004);
    assert!(
        fs::read_to_string(lab.path("report.html"))
            .unwrap()
            .contains("Image <code>oci:image:test")
    );
    assert_eq!(fs::read_dir(lab.path("scratch")).unwrap().count(), 0);
    assert!(mounts_below(lab.dir.path()).is_empty());
    lab.assert_nothing_served();

    let said = lab.bad(
        &["bench", "docker://127.0.0.1:1/image", "--retry-for", "1s", "--", "true"],
        1,
    );
    assert!(said.contains("127.0.0.1:1"), "{said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    lab.bad(&["bench", "oci:image:test", "--index", "x", "--", "true"], 2);
}

#[test]
fn bench_brings_an_image_from_a_registry_first() {
    const NAME: &str = "bench_brings_an_image_from_a_registry_first";
    let Some(_alone) = devices(NAME) else { return };
    let lab = Lab::new();
    if !layer_with_shell(&lab.path("shell.tar")) {
        return skip(NAME, "ldd is not installed");
    }
    let layer = fs::read(lab.path("shell.tar")).unwrap();
    let registry = scripted::TestRegistry::start();
    let digest = registry.put_blob(&layer);
    let rootfs = serde_json::json!({ "type": "layers", "diff_ids": [digest] });
    let config = serde_json::json!({ "architecture": "amd64", "os": "linux", "rootfs": rootfs }).to_string();
    let config_digest = registry.put_blob(config.as_bytes());
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": kind,
        "config": { "mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config.len() },
        "layers": [{ "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": layer.len() }],
    });
    registry.put_manifest("some/image", "latest", kind, manifest.to_string().as_bytes());
    let name = registry.name("some/image:latest");
    let usual = [
        "--runs",
        "1",
        "--scratch",
        ".",
        "--hosts-dir",
        "/nonexistent",
        "--platform",
        "linux/amd64",
    ];
    let rest = [
        "--without",
        "full,untar,loop",
        "--rtt",
        "1ms",
        "--json",
        "--",
        "sh",
        "-c",
        "echo > /tmp/x",
    ];
    let outcome = lab.json(&[&["bench", &name][..], &usual, &rest].concat());
    assert_eq!(outcome["layers"], 1);
    assert!(
        outcome["source"].as_str().unwrap().starts_with("docker://"),
        "{outcome}"
    );
    let asked = registry.take_log();
    let blob = format!("/v2/some/image/blobs/{digest}");
    assert_eq!(
        asked.iter().filter(|asked| asked.path == blob).count(),
        1,
        "brought once: {asked:?}"
    );
    // What does not have its digest is not measured.
    registry.put_blob_as(&digest, &vec![0; layer.len()]);
    let said = lab.bad(&[&["bench", &name][..], &usual, &rest].concat(), 1);
    assert!(said.contains("its digest is"), "{said}");
    lab.assert_nothing_served();
}
