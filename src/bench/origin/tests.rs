use std::io::Write as _;
use std::process::Command;

use reqwest::{Client, RequestBuilder, Response};

use super::*;
use crate::http::{self, runtime};

/// Bytes that say where they are from.
fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| u8::try_from((i ^ (i >> 8) ^ (i >> 16)) & 0xff).expect("masked"))
        .collect()
}

fn client() -> Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .build()
        .expect("client")
}

/// Waits for one step of a request, on the network thread: only there is a connection back with the client before the next request.
fn wait<T: Send + 'static>(step: impl Future<Output = reqwest::Result<T>> + Send + 'static) -> reqwest::Result<T> {
    let done = runtime::wait(runtime::run(async { Ok::<_, http::Error>(step.await) }));
    done.expect("a network thread")
}

/// Sends a request and waits for the head of its answer.
fn send(request: RequestBuilder) -> reqwest::Result<Response> {
    wait(async { request.send().await })
}

/// Waits for all of an answer's body.
fn body(response: Response) -> reqwest::Result<bytes::Bytes> {
    wait(response.bytes())
}

fn get(origin: &Origin, path: &str, headers: &[(&str, &str)]) -> reqwest::Result<Response> {
    let mut request = client().get(origin.url(path));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(request)
}

fn header(response: &Response, name: &str) -> String {
    response
        .headers()
        .get(name)
        .map(|v| v.to_str().expect("text").to_owned())
        .unwrap_or_default()
}

#[test]
fn curl_gets_files_and_ranges() {
    let data = pattern(3_000_000);
    let mut file = tempfile::NamedTempFile::new().expect("file");
    file.write_all(&data).expect("write");
    let origin = Origin::start().expect("origin");
    origin.serve_file("/data", file.path()).expect("serve");
    let curl = |args: &[&str]| {
        Command::new("curl")
            .arg("-sS")
            .args(args)
            .arg(origin.url("/data"))
            .output()
    };
    let Ok(whole) = curl(&[]) else {
        eprintln!("SKIP: curl is not installed");
        return;
    };
    assert_eq!(whole.stdout, data);
    assert_eq!(
        curl(&["-r", "1000-1999999"]).expect("curl").stdout,
        &data[1000..2_000_000]
    );
    assert_eq!(curl(&["-r", "-7"]).expect("curl").stdout, &data[2_999_993..]);
    let head = String::from_utf8(curl(&["-I"]).expect("curl").stdout).expect("text");
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("Content-Length: 3000000\r\n"), "{head}");
    assert!(head.contains("Accept-Ranges: bytes\r\n"), "{head}");
    // Two URLs in one call go over one connection.
    let url = origin.url("/data");
    let twice = curl(&["-r", "0-9", &url]).expect("curl");
    assert_eq!(twice.stdout.len(), 20);
    origin.settle();
    assert_eq!(origin.counters().connections, 5);
    assert_eq!(origin.counters().requests, 6);
    assert_eq!(origin.counters().bytes, 3_000_000 + 1_999_000 + 7 + 20);
}

#[test]
fn conditions_and_what_cannot_be_satisfied() {
    let origin = Origin::start().expect("origin");
    origin.serve_blob("/data", pattern(1000));
    let tag = header(&get(&origin, "/data", &[]).expect("get"), "etag");
    assert!(tag.starts_with('"'), "a strong tag: {tag}");
    let part = get(&origin, "/data", &[("range", "bytes=10-19"), ("if-range", &tag)]).expect("get");
    assert_eq!(
        (part.status().as_u16(), header(&part, "content-range").as_str()),
        (206, "bytes 10-19/1000")
    );
    assert_eq!(&body(part).expect("body")[..], &pattern(1000)[10..20]);
    let stale = get(&origin, "/data", &[("range", "bytes=10-19"), ("if-range", "\"old\"")]).expect("get");
    assert_eq!((stale.status().as_u16(), body(stale).expect("body").len()), (200, 1000));
    let beyond = get(&origin, "/data", &[("range", "bytes=1000-")]).expect("get");
    assert_eq!(
        (beyond.status().as_u16(), header(&beyond, "content-range").as_str()),
        (416, "bytes */1000")
    );
    assert_eq!(
        get(&origin, "/data", &[("if-match", "\"old\"")])
            .expect("get")
            .status()
            .as_u16(),
        412
    );
    assert_eq!(
        get(&origin, "/data", &[("if-none-match", &tag)])
            .expect("get")
            .status()
            .as_u16(),
        304
    );
    assert_eq!(get(&origin, "/other", &[]).expect("get").status().as_u16(), 404);
    assert_eq!(
        send(client().post(origin.url("/data")))
            .expect("post")
            .status()
            .as_u16(),
        405
    );
    origin.set_ranges(false);
    let whole = get(&origin, "/data", &[("range", "bytes=10-19")]).expect("get");
    assert_eq!(
        (whole.status().as_u16(), header(&whole, "accept-ranges").as_str()),
        (200, "")
    );
}

#[test]
fn each_fault_is_what_it_says() {
    let origin = Origin::start().expect("origin");
    let data = pattern(100_000);
    origin.serve_blob("/data", data.clone());
    let with = |fault: Fault| {
        origin.set_faults(move |_| vec![fault.clone()]);
        get(&origin, "/data", &[("range", "bytes=1000-50999")])
    };
    assert!(with(Fault::ResetBefore).is_err());
    assert!(with(Fault::ResetWithin(10)).and_then(body).is_err());
    assert!(with(Fault::ShortBody(1)).and_then(body).is_err());
    let busy = with(Fault::Status(429, Some(7))).expect("answer");
    assert_eq!(
        (busy.status().as_u16(), header(&busy, "retry-after").as_str()),
        (429, "7")
    );
    let wrong = with(Fault::WrongRange(512)).expect("answer");
    assert_eq!(header(&wrong, "content-range"), "bytes 1512-50999/100000");
    assert_eq!(&body(wrong).expect("body")[..], &data[1512..51_000]);
    let short = with(Fault::ShortRange(100)).expect("answer");
    assert_eq!(header(&short, "content-range"), "bytes 1000-50899/100000");
    assert_eq!(&body(short).expect("body")[..], &data[1000..50_900]);
    let whole = with(Fault::WholeBody).expect("answer");
    assert_eq!(
        (whole.status().as_u16(), body(whole).expect("body").len()),
        (200, 100_000)
    );
    assert_eq!(with(Fault::LongBody(99)).and_then(body).expect("body").len(), 50_000);
    assert!(header(&with(Fault::ChangedTag).expect("answer"), "etag").starts_with("\"changed-"));
    let elsewhere = with(Fault::Redirect("/there".into())).expect("answer");
    assert_eq!(
        (elsewhere.status().as_u16(), header(&elsewhere, "location").as_str()),
        (307, "/there")
    );
    let began = Instant::now();
    assert_eq!(
        with(Fault::Delay(Duration::from_millis(80)))
            .expect("answer")
            .status()
            .as_u16(),
        206
    );
    assert!(began.elapsed() >= Duration::from_millis(80));
    let began = Instant::now();
    assert_eq!(
        with(Fault::SlowBody(500_000)).and_then(body).expect("body").len(),
        50_000
    );
    assert!(began.elapsed() >= Duration::from_millis(99));
    origin.clear_faults();
    assert_eq!(get(&origin, "/data", &[]).and_then(body).expect("body").len(), 100_000);
}

#[test]
fn silence_ends_with_the_client_or_the_origin() {
    let origin = Origin::start().expect("origin");
    origin.set_faults(|_| vec![Fault::Silence]);
    let short = Duration::from_millis(50);
    assert!(
        send(client().get(origin.url("/")).timeout(short))
            .expect_err("silence")
            .is_timeout()
    );
    drop(origin);
}

#[test]
fn random_faults_repeat_with_their_seed() {
    let request = |number| Request {
        number,
        connection: 0,
        method: "GET".into(),
        path: "/".into(),
        query: String::new(),
        headers: Vec::new(),
    };
    let menu = vec![Fault::ResetBefore, Fault::WholeBody];
    let (a, b) = (at_random(7, 300, menu.clone()), at_random(7, 300, menu));
    let picks: Vec<_> = (0..1000).map(|n| a(&request(n))).collect();
    assert_eq!(picks, (0..1000).map(|n| b(&request(n))).collect::<Vec<_>>());
    let faulty = picks.iter().filter(|p| !p.is_empty()).count();
    assert!((230..370).contains(&faulty), "{faulty} of 1000");
}

#[test]
fn redirects_hand_out_tokens_that_expire() {
    let origin = Origin::start().expect("origin");
    origin.serve_blob("/cdn/data", pattern(10));
    origin.serve_redirect("/data", "/cdn/data", Duration::from_secs(3600));
    let to = header(&get(&origin, "/data", &[]).expect("get"), "location");
    assert!(to.starts_with("/cdn/data?token="), "{to}");
    assert_eq!(get(&origin, &to, &[]).expect("get").status().as_u16(), 200);
    assert_eq!(get(&origin, "/cdn/data", &[]).expect("get").status().as_u16(), 403);
    origin.expire_redirects();
    assert_eq!(get(&origin, &to, &[]).expect("get").status().as_u16(), 403);
}

#[test]
fn the_link_charges_round_trips_and_is_shared() {
    let origin = Origin::start().expect("origin");
    origin.serve_blob("/data", pattern(400_000));
    origin.set_link(Link {
        rtt: Duration::from_millis(20),
        rate: Some(4_000_000),
    });
    let client = client();
    let fetch = |range: &str| {
        let answer = send(client.get(origin.url("/data")).header("range", range));
        answer.and_then(body).expect("body").len()
    };
    // Connecting and asking: two round trips. Asking again on the same connection: one.
    let began = Instant::now();
    assert_eq!(fetch("bytes=0-0"), 1);
    assert!(began.elapsed() >= Duration::from_millis(40), "{:?}", began.elapsed());
    let began = Instant::now();
    assert_eq!(fetch("bytes=0-0"), 1);
    assert!(began.elapsed() >= Duration::from_millis(20), "{:?}", began.elapsed());
    origin.settle();
    assert_eq!(origin.counters().connections, 1);
    // Two at once need as long as both one after the other: 2 x 100 ms of link.
    let began = Instant::now();
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| fetch("bytes=0-399999"));
        }
    });
    assert!(began.elapsed() >= Duration::from_millis(200), "{:?}", began.elapsed());
    let log = origin.take_log();
    assert_eq!((log.events.len(), log.arrived), (4, 4));
    assert_eq!(log.timeline.last().map(|point| point.1), Some(800_002));
    assert!(log.timeline.windows(2).all(|w| w[0].0 <= w[1].0 && w[0].1 < w[1].1));
    assert!(origin.take_log().events.is_empty());
}

#[test]
fn a_dropped_body_frees_the_link() {
    let origin = Origin::start().expect("origin");
    origin.serve_blob("/data", pattern(20_000_000));
    origin.serve_blob("/small", pattern(1));
    origin.set_link(Link {
        rtt: Duration::from_millis(10),
        rate: Some(1_000_000),
    });
    let mut response = get(&origin, "/data", &[]).expect("get");
    let first = wait(async move { response.chunk().await });
    assert!(first.expect("body").is_some());
    assert_eq!(get(&origin, "/small", &[]).and_then(body).expect("body").len(), 1);
    // 20 MB would have kept the link busy for 20 seconds; what was under way is a round trip's worth and some pieces.
    assert!(origin.counters().bytes < 1_000_000, "{:?}", origin.counters());
}
