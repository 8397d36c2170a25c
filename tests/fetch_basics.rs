//! The fetcher on a quiet day: a local file and an honest server.

mod fetched;
#[path = "common/noise.rs"]
mod noise;

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;

use fetched::{blob_at, in_file, joined, range};
use noise::noise;
use tarblk::internals::fetch::{FetchError, FetchOptions, Fetcher, LayerSource, Located};

fn answer(mut stream: TcpStream, data: &[u8]) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    loop {
        let mut asked = None;
        let mut line = String::new();
        loop {
            line.clear();
            if reader.read_line(&mut line)? == 0 {
                return Ok(());
            }
            if line == "\r\n" {
                break;
            }
            if let Some(spec) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                let (first, last) = spec.trim().split_once('-').unwrap();
                asked = Some((first.parse::<usize>().unwrap(), last.parse::<usize>().unwrap()));
            }
        }
        let (first, last) = asked.expect("a request without a range");
        write!(
            stream,
            "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {first}-{last}/{}\r\n\r\n",
            last - first + 1,
            data.len()
        )?;
        stream.write_all(&data[first..=last])?;
    }
}

fn serve(data: Arc<Vec<u8>>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/layer.tar", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let data = data.clone();
            std::thread::spawn(move || answer(stream, &data));
        }
    });
    url
}

fn over_http(url: &str, size: usize) -> LayerSource {
    LayerSource::from(blob_at(url, u64::try_from(size).unwrap()))
}

#[test]
fn a_local_file_is_located_and_read() {
    let data = noise(3_000_001, 1);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &data).unwrap();
    let fetcher = Fetcher::start(vec![in_file(file.path()).into()], FetchOptions::default(), None).unwrap();
    assert!(matches!(fetcher.locate(range(4096, 10)), Located::File(_, 4096)));
    let slices = fetcher
        .read_blocking(vec![range(512, 2_500_000), range(0, 3), range(3_000_000, 1)])
        .unwrap();
    let expected = [&data[512..2_500_512], &data[..3], &data[3_000_000..]].concat();
    assert!(joined(&slices) == expected);
    assert!(matches!(
        fetcher.read_blocking(vec![range(3_000_000, 2)]),
        Err(FetchError::OutOfRange { .. })
    ));
    fetcher.shutdown();
    assert!(matches!(
        fetcher.read_blocking(vec![range(0, 1)]),
        Err(FetchError::Stopped)
    ));
}

#[test]
fn a_file_that_shrank_is_an_error() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [1; 200]).unwrap();
    let found = in_file(file.path());
    let fetcher = Fetcher::start(vec![found.clone().into()], FetchOptions::default(), None).unwrap();
    file.as_file().set_len(100).unwrap();
    // Nor is it the one that was found.
    assert!(Fetcher::start(vec![found.into()], FetchOptions::default(), None).is_err());
    assert!(matches!(
        fetcher.read_blocking(vec![range(50, 100)]),
        Err(FetchError::File { .. })
    ));
}

#[test]
fn ranges_come_over_http_and_stay_in_memory() {
    let data = Arc::new(noise(5_000_001, 1));
    let url = serve(data.clone());
    let fetcher = Fetcher::start(vec![over_http(&url, data.len())], FetchOptions::default(), None).unwrap();
    assert!(matches!(fetcher.locate(range(4096, 4096)), Located::Elsewhere));
    let slices = fetcher
        .read_blocking(vec![range(100, 4_000_000), range(5_000_000, 1)])
        .unwrap();
    assert!(joined(&slices) == [&data[100..4_000_100], &data[5_000_000..]].concat());
    let Located::Memory(slices) = fetcher.locate(range(32_000, 4096)) else {
        panic!("not in memory")
    };
    assert!(joined(&slices) == data[32_000..36_096]);
    let stats = fetcher.stats();
    assert_eq!(
        (stats.errors, stats.retries, stats.read_errors, stats.in_flight),
        (0, 0, 0, 0),
        "{stats:?}"
    );
    assert!(stats.bytes_fetched <= 5_100_000, "{stats:?}");
}

#[test]
fn nobody_there_is_an_error_after_the_deadline() {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let options = FetchOptions {
        deadline: std::time::Duration::from_millis(300),
        ..FetchOptions::default()
    };
    let source = over_http(&format!("http://{free}/layer.tar"), 1 << 20);
    let fetcher = Fetcher::start(vec![source], options, None).unwrap();
    let error = fetcher.read_blocking(vec![range(0, 4096)]).unwrap_err();
    assert!(matches!(error, FetchError::Deadline { .. }), "{error}");
}
