//! Walking a layer behind HTTP gives the entries that the file gives, whatever the server does, or one clear error.

#![cfg(feature = "command")]

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;
use std::time::Duration;

use tarblk::internals::bench::origin::{Fault, Link, Origin, Request, at_random};
use tarblk::internals::http::{self, HttpOptions, Kind, RetryPolicy, Timeouts};
use tarblk::internals::index::walk::Walked;
use tarblk::internals::index::{Collector, Entry, walk as local_walk};
use tarblk::internals::source::{self, Source, SourceError};
use tarblk::internals::units::TarOffset;
use tarblk::internals::walk::{Tap, WalkError, walk};

/// A length as a position.
fn bytes(len: usize) -> u64 {
    u64::try_from(len).unwrap()
}

/// Small numbers, so that faults cost milliseconds.
fn patience() -> HttpOptions {
    let second = Duration::from_secs(1);
    HttpOptions {
        timeouts: Timeouts {
            connect: 5 * second,
            head: 2 * second,
            stall: 2 * second,
        },
        ..tries(12)
    }
}

/// So many tries, with hardly a pause.
fn tries(tries: u32) -> HttpOptions {
    HttpOptions {
        retry: RetryPolicy {
            tries,
            wrong: tries,
            first_pause: Duration::from_millis(1),
            ..RetryPolicy::default()
        },
        ..HttpOptions::default()
    }
}

/// Deterministic noise.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit
    }
}

/// A tar of many small files, some big ones, long names, and a tar inside the tar.
fn mixed_tar(seed: u64, entries: u64) -> (tempfile::NamedTempFile, Vec<Entry>) {
    let mut dice = Dice(seed);
    let file = tempfile::NamedTempFile::new().unwrap();
    let mut tar = tar::Builder::new(std::io::BufWriter::new(file.reopen().unwrap()));
    let mut inner = tar::Builder::new(Vec::new());
    for number in 0..200 {
        let mut header = tar::Header::new_gnu();
        header.set_size(9000);
        inner
            .append_data(&mut header, format!("inner/{number}"), std::io::repeat(b'i').take(9000))
            .unwrap();
    }
    let inner = inner.into_inner().unwrap();
    for number in 0..entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_mtime(number);
        let long = "d".repeat(if dice.below(10) == 0 { 150 } else { 3 });
        let path = format!("{long}/{number}");
        if dice.below(40) == 0 {
            header.set_size(bytes(inner.len()));
            tar.append_data(&mut header, path, inner.as_slice()).unwrap();
            continue;
        }
        let size = match dice.below(20) {
            0 => dice.below(700_000),
            1..6 => dice.below(60_000),
            _ => dice.below(3_000),
        };
        header.set_size(size);
        // Not zeros: an explorer must look through it.
        tar.append_data(&mut header, path, std::io::repeat(0xa5).take(size))
            .unwrap();
    }
    tar.into_inner().unwrap().flush().unwrap();
    let entries = local(file.path());
    (file, entries)
}

fn local(path: &Path) -> Vec<Entry> {
    let mut all = Collector::default();
    let file = File::open(path).unwrap();
    local_walk::local(&file, file.metadata().unwrap().len(), &mut all, &mut |_, _| {}).unwrap();
    all.0
}

/// Keeps what passes and remembers where.
struct Keep(Vec<Option<u8>>);

impl Tap for Keep {
    fn bytes(&mut self, at: TarOffset, bytes: &[u8]) {
        let at = usize::try_from(at.0).unwrap();
        for (kept, byte) in self.0[at..].iter_mut().zip(bytes) {
            *kept = Some(*byte);
        }
    }
}

fn remote(url: &str, patience: &HttpOptions) -> Result<(Vec<Entry>, Walked), WalkError> {
    let blob = source::open(&Source::parse(url)?, patience)?;
    let mut all = Collector::default();
    let walked = walk(&blob, &mut all, None, patience, &mut |_, _| {})?;
    Ok((all.0, walked))
}

#[test]
fn a_walk_over_http_finds_what_the_file_holds() {
    let (file, entries) = mixed_tar(1, 1500);
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", file.path()).unwrap();
    for link in [
        Link::default(),
        Link {
            rtt: Duration::from_millis(5),
            rate: Some(40_000_000),
        },
    ] {
        origin.set_link(link);
        let (found, walked) = remote(&origin.url("/layer.tar"), &patience()).unwrap();
        assert!(found == entries, "{link:?}");
        assert!(walked.reads > 1 && walked.tar_len == file.path().metadata().unwrap().len());
    }
}

#[test]
fn the_tap_gets_right_bytes_at_right_places() {
    let (file, _) = mixed_tar(2, 600);
    let content = std::fs::read(file.path()).unwrap();
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", file.path()).unwrap();
    for ranges in [true, false] {
        origin.set_ranges(ranges);
        let blob = source::open(&Source::parse(&origin.url("/layer.tar")).unwrap(), &patience()).unwrap();
        let mut keep = Keep(vec![None; content.len()]);
        let mut all = Collector::default();
        let walked = walk(&blob, &mut all, Some(&mut keep), &patience(), &mut |_, _| {}).unwrap();
        let kept = keep
            .0
            .iter()
            .zip(&content)
            .filter(|(kept, byte)| kept.is_some_and(|kept| kept == **byte))
            .count();
        let wrong = keep
            .0
            .iter()
            .zip(&content)
            .filter(|(kept, byte)| kept.is_some_and(|kept| kept != **byte))
            .count();
        assert_eq!(wrong, 0);
        assert!(bytes(kept) <= walked.bytes_read && kept > 600 * 512);
        if !ranges {
            assert_eq!(kept, content.len(), "a stream is kept whole");
        }
    }
}

#[test]
fn faults_are_overcome_and_never_believed() {
    let (file, entries) = mixed_tar(3, 1200);
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", file.path()).unwrap();
    for (seed, menu) in [
        (
            1,
            vec![Fault::ResetBefore, Fault::ResetWithin(3000), Fault::ShortBody(1000)],
        ),
        (
            2,
            vec![
                Fault::Status(500, None),
                Fault::Status(503, Some(0)),
                Fault::Status(429, None),
            ],
        ),
        (
            3,
            vec![Fault::WrongRange(512), Fault::ShortRange(100), Fault::WholeBody],
        ),
        (
            4,
            vec![Fault::Delay(Duration::from_millis(30)), Fault::SlowBody(2_000_000)],
        ),
    ] {
        origin.set_faults(at_random(seed, 300, menu.clone()));
        let (found, _) = remote(&origin.url("/layer.tar"), &patience()).unwrap_or_else(|e| panic!("{menu:?}: {e}"));
        assert!(found == entries, "{menu:?}");
    }
}

#[test]
fn a_server_without_ranges_is_read_as_one_stream() {
    let (file, entries) = mixed_tar(4, 300);
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", file.path()).unwrap();
    origin.set_ranges(false);
    let (found, walked) = remote(&origin.url("/layer.tar"), &patience()).unwrap();
    assert!(found == entries);
    assert_eq!(walked.reads, 1);
    origin.set_faults(|request| {
        if request.number < 6 {
            vec![Fault::ResetWithin(100_000)]
        } else {
            Vec::new()
        }
    });
    let (found, walked) = remote(&origin.url("/layer.tar"), &patience()).unwrap();
    assert!(
        found == entries && walked.reads > 1,
        "a stream that breaks is begun again"
    );
}

/// The bytes that a request names, if it names any: the first and the last.
fn named(request: &Request) -> Option<(u64, u64)> {
    let (first, last) = request.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}

#[test]
fn a_server_that_refuses_ranges_is_read_as_one_stream() {
    let (file, entries) = mixed_tar(8, 300);
    for status in [400, 501] {
        let origin = Origin::start().unwrap();
        origin.serve_file("/layer.tar", file.path()).unwrap();
        origin.set_faults(move |request| match named(request) {
            Some(_) => vec![Fault::Status(status, None)],
            None => Vec::new(),
        });
        let (found, walked) = remote(&origin.url("/layer.tar"), &patience()).unwrap();
        assert!(found == entries, "{status}");
        assert_eq!(walked.reads, 1, "{status}");
    }
}

#[test]
fn parts_shorter_than_asked_for_are_used() {
    let (file, entries) = mixed_tar(9, 800);
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", file.path()).unwrap();
    origin.set_faults(|request| match named(request) {
        Some((first, last)) if last - first >= 10_007 => vec![Fault::ShortRange(last + 1 - first - 10_007)],
        _ => Vec::new(),
    });
    // Not one of them is a failure.
    let (found, _) = remote(&origin.url("/layer.tar"), &tries(1)).unwrap();
    assert!(found == entries);
    let blob = source::open(&Source::parse(&origin.url("/layer.tar")).unwrap(), &tries(1)).unwrap();
    let content = std::fs::read(file.path()).unwrap();
    let mut all = Vec::new();
    source::stream::<SourceError>(&blob, &tries(1), &mut |bytes| {
        all.extend_from_slice(bytes);
        Ok(())
    })
    .unwrap();
    assert!(all == content);
    let middle = source::read_range(&blob, 5_000..205_000, &tries(1)).unwrap();
    assert!(middle == content[5_000..205_000]);
}

#[test]
fn servers_that_will_not_are_one_line() {
    let origin = Origin::start().unwrap();
    let content = vec![0_u8; 1 << 20];
    origin.serve_blob("/layer.tar", content);
    let message = |patience: &HttpOptions| {
        remote(&origin.url("/layer.tar?sig=secret"), patience)
            .unwrap_err()
            .to_string()
    };
    for (fault, words) in [
        (Fault::Status(404, None), "404 Not Found; check the address"),
        (Fault::Status(401, None), "user:password@"),
        (Fault::Status(403, None), "signature"),
        (Fault::Status(500, None), "(after 3 tries)"),
        (Fault::ResetBefore, "(after 3 tries)"),
        (Fault::Silence, "does not answer"),
    ] {
        origin.set_faults(move |_| vec![fault.clone()]);
        let patience = HttpOptions {
            timeouts: Timeouts {
                connect: Duration::from_millis(200),
                head: Duration::from_millis(50),
                stall: Duration::from_millis(50),
            },
            ..tries(3)
        };
        let message = message(&patience);
        assert!(message.contains(words), "{message}");
        assert!(message.lines().count() == 1 && !message.contains("secret"), "{message}");
    }
    drop(origin);
    let closed = remote("http://127.0.0.1:1/layer.tar", &tries(2))
        .unwrap_err()
        .to_string();
    assert!(
        closed.contains("cannot connect") && closed.contains("refused"),
        "{closed}"
    );
    let unknown = remote("http://no-such-host.invalid/l.tar", &tries(1)).unwrap_err();
    assert!(unknown.to_string().contains("no-such-host.invalid"), "{unknown}");
}

#[test]
fn a_layer_that_changes_while_it_is_read_is_an_error() {
    let (file, _) = mixed_tar(5, 500);
    let origin = Origin::start().unwrap();
    origin.serve_file("/layer.tar", file.path()).unwrap();
    origin.set_faults(|request| {
        if request.number > 3 {
            vec![Fault::ChangedTag]
        } else {
            Vec::new()
        }
    });
    let error = remote(&origin.url("/layer.tar"), &patience()).unwrap_err();
    let WalkError::Source(error) = error else {
        panic!("{error}")
    };
    assert_eq!(error.http().map(http::Error::kind), Some(Kind::Changed), "{error}");
}

#[test]
fn bad_tars_are_errors_with_the_place() {
    let (file, _) = mixed_tar(6, 1000);
    let origin = Origin::start().unwrap();
    let mut content = std::fs::read(file.path()).unwrap();
    let headers = local(file.path())[700].headers;
    content[usize::try_from(headers.start.0).unwrap() + 5] ^= 0x40;
    origin.serve_blob("/bad.tar", content.clone());
    let message = remote(&origin.url("/bad.tar"), &patience()).unwrap_err().to_string();
    assert!(
        message.contains(&format!("bad tar header at byte {}", headers.start)),
        "{message}"
    );
    content.truncate(usize::try_from(headers.start.0).unwrap() - 600);
    origin.serve_blob("/cut.tar", content);
    let message = remote(&origin.url("/cut.tar"), &patience()).unwrap_err().to_string();
    assert!(message.contains("cut short"), "{message}");
    origin.serve_blob("/page.html", vec![b'<'; 3000]);
    let message = remote(&origin.url("/page.html"), &patience()).unwrap_err().to_string();
    assert!(message.contains("not a tar"), "{message}");
    origin.serve_blob("/empty.tar", Vec::new());
    assert_eq!(remote(&origin.url("/empty.tar"), &patience()).unwrap().0.len(), 0);
}

#[test]
fn redirects_are_followed_and_may_expire() {
    let (file, entries) = mixed_tar(7, 800);
    let origin = Origin::start().unwrap();
    origin.serve_file("/blob", file.path()).unwrap();
    origin.serve_redirect("/layer.tar", "/blob", Duration::from_secs(60));
    let blob = source::open(&Source::parse(&origin.url("/layer.tar")).unwrap(), &patience()).unwrap();
    origin.expire_redirects();
    let mut all = Collector::default();
    walk(&blob, &mut all, None, &patience(), &mut |_, _| {}).unwrap();
    assert!(all.0 == entries);
}

#[test]
fn a_huge_file_is_jumped_over() {
    // 3 GB of nothing between two small files, sparse on disk.
    let mut file = tempfile::tempfile().unwrap();
    let size = 3_u64 << 30;
    let mut header = tar::Header::new_gnu();
    header.set_path("huge").unwrap();
    header.set_size(size);
    header.set_cksum();
    file.write_all(header.as_bytes()).unwrap();
    file.seek(std::io::SeekFrom::Start(512 + size)).unwrap();
    let mut header = tar::Header::new_gnu();
    header.set_path("last").unwrap();
    header.set_size(0);
    header.set_cksum();
    file.write_all(header.as_bytes()).unwrap();
    file.write_all(&[0; 1024]).unwrap();
    let origin = Origin::start().unwrap();
    origin.serve_open_file("/huge.tar", file).unwrap();
    origin.set_link(Link {
        rtt: Duration::from_millis(2),
        rate: Some(100_000_000),
    });
    let (found, walked) = remote(&origin.url("/huge.tar"), &patience()).unwrap();
    assert_eq!(
        found.iter().map(|e| e.path.as_slice()).collect::<Vec<_>>(),
        [&b"huge"[..], b"last"]
    );
    assert!(walked.bytes_read < size / 10, "{} bytes", walked.bytes_read);
}
