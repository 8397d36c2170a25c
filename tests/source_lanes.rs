//! Blobs that are read from end to end over HTTP: every byte once and in order, by as many connections as bring more.

mod common;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::noise::noise;
use tarblk::internals::bench::origin::{Fault, Link, Origin, Request, at_random};
use tarblk::internals::http::HttpOptions;
use tarblk::internals::source::{self, Blob, Source, SourceError};

const LEN: usize = 48 << 20;
/// The longest piece that waits for its turn.
const PIECE: u64 = 4 << 20;

fn u(n: usize) -> u64 {
    n.try_into().unwrap()
}

fn blob(origin: &Origin) -> Blob {
    source::open(&Source::parse(&origin.url("/blob")).unwrap(), &HttpOptions::default()).unwrap()
}

/// Reads the blob from `from` on, and compares it.
fn read(origin: &Origin, blob: &Blob, content: &[u8], from: usize) -> u64 {
    let mut reached = from;
    let requests = source::stream_from::<SourceError>(blob, u(from), &HttpOptions::default(), &mut |bytes| {
        assert!(content[reached..].starts_with(bytes), "at byte {reached}");
        reached += bytes.len();
        Ok(())
    });
    assert_eq!(reached, content.len());
    origin.clear_faults();
    requests.unwrap()
}

/// The first byte and the one behind the last that a request asks for.
fn asked(request: &Request) -> Option<(u64, u64)> {
    let (from, last) = request.header("range")?.strip_prefix("bytes=")?.split_once('-')?;
    Some((from.parse().ok()?, last.parse::<u64>().ok()? + 1))
}

/// Notes what is asked for; every answer has these faults.
fn note(origin: &Origin, faults: fn() -> Vec<Fault>) -> Arc<Mutex<Vec<(u64, u64)>>> {
    let noted = Arc::new(Mutex::new(Vec::new()));
    let book = Arc::clone(&noted);
    origin.set_faults(move |request| {
        book.lock().unwrap().extend(asked(request));
        faults()
    });
    noted
}

/// They follow each other without a gap, and nothing is asked for twice.
fn assert_each_byte_once(asked: &[(u64, u64)], from: u64, end: u64) {
    let mut asked = asked.to_vec();
    asked.sort_unstable();
    let mut reached = from;
    for (start, stop) in &asked {
        assert_eq!(*start, reached, "{asked:?}");
        reached = *stop;
    }
    assert_eq!(reached, end, "{asked:?}");
}

#[test]
fn where_each_connection_is_slow_several_bring_more() {
    let content = noise(LEN, 1);
    let origin = Origin::start().unwrap();
    origin.serve_blob("/blob", content.clone());
    let blob = blob(&origin);
    let noted = note(&origin, || vec![Fault::SlowBody(8_000_000)]);
    let requests = read(&origin, &blob, &content, 0);
    let noted = noted.lock().unwrap();
    assert_each_byte_once(&noted, 0, u(LEN));
    assert_eq!(requests, u(noted.len()));
    let short = noted.iter().filter(|(start, end)| end - start <= PIECE).count();
    assert!(short >= 6, "one connection did it: {noted:?}");
}

#[test]
fn where_the_link_is_full_one_connection_is_enough() {
    let content = noise(LEN, 2);
    let origin = Origin::start().unwrap();
    origin.serve_blob("/blob", content.clone());
    origin.set_link(Link {
        rtt: Duration::from_millis(5),
        rate: Some(24_000_000),
    });
    let blob = blob(&origin);
    let noted = note(&origin, Vec::new);
    read(&origin, &blob, &content, 12_345);
    let noted = noted.lock().unwrap();
    assert_each_byte_once(&noted, 12_345, u(LEN));
    // A second one was tried.
    assert!(noted.len() <= 8, "{noted:?}");
}

#[test]
fn whatever_breaks_every_byte_comes_once_and_in_order() {
    let content = noise(20 << 20, 3);
    let origin = Origin::start().unwrap();
    origin.serve_blob("/blob", content.clone());
    let blob = blob(&origin);
    for (seed, from) in [(1, 0), (2, 1), (3, 7 << 20), (4, (20 << 20) - 1)] {
        let menu = vec![
            Fault::ResetBefore,
            Fault::ResetWithin(300_000),
            Fault::ShortBody(100_000),
            Fault::ShortRange(70_000),
            Fault::Status(503, Some(0)),
            Fault::SlowBody(6_000_000),
            Fault::Delay(Duration::from_millis(30)),
        ];
        origin.set_faults(at_random(seed, 600, menu));
        read(&origin, &blob, &content, from);
    }
    // At the end there is nothing to ask for.
    assert_eq!(read(&origin, &blob, &content, content.len()), 0);
}

#[test]
fn a_server_without_ranges_is_asked_once() {
    let content = noise(20 << 20, 4);
    let origin = Origin::start().unwrap();
    origin.serve_blob("/blob", content.clone());
    origin.set_ranges(false);
    let blob = blob(&origin);
    assert_eq!(read(&origin, &blob, &content, 5), 1);
}
