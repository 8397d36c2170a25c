//! A small HTTP/1.1 server for what stands around a registry: on loopback, a thread for each connection, one function that
//! answers.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// The longest head and the longest body that are read, in bytes.
const MAX_HEAD: u64 = 64 * 1024;
const MAX_BODY: u64 = 64 * 1024 * 1024;
/// How long a connection may be silent.
const PATIENCE: Duration = Duration::from_secs(30);

/// Names and values, in the order in which they came.
pub(crate) type Headers = Vec<(String, String)>;

/// What was asked.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) method: String,
    /// Path and query.
    pub(crate) target: String,
    pub(crate) headers: Headers,
    pub(crate) body: Vec<u8>,
}

impl Request {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        find(&self.headers, name)
    }

    pub(crate) fn path(&self) -> &str {
        self.target.split('?').next().unwrap_or_default()
    }

    /// The values of a query's (or a form's) field, percent-decoded.
    pub(crate) fn query(&self, name: &str) -> Vec<String> {
        let text = self.target.split_once('?').map_or("", |(_, query)| query);
        field(text, name)
    }

    pub(crate) fn form(&self, name: &str) -> Option<String> {
        field(&String::from_utf8_lossy(&self.body), name).pop()
    }
}

fn field(text: &str, name: &str) -> Vec<String> {
    url::form_urlencoded::parse(text.as_bytes())
        .filter(|(key, _)| key == name)
        .map(|(_, value)| value.into_owned())
        .collect()
}

pub(crate) fn find<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let found = headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
    found.map(|(_, value)| value.as_str())
}

/// What is answered: a status, headers, and bytes or a part of a file.
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Headers,
    pub(crate) body: Body,
}

pub(crate) enum Body {
    Bytes(Vec<u8>),
    /// From an offset on, so many bytes.
    File(File, u64, u64),
    /// Whatever comes, of a length that the headers say.
    Stream(Box<dyn Read>),
}

impl Reply {
    pub(crate) fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: Body::Bytes(body.into()),
        }
    }

    pub(crate) fn with(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }
}

/// Stops when dropped; connections end with their clients.
#[derive(Debug)]
pub(crate) struct Server {
    port: u16,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub(crate) fn start(answer: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let stop = Arc::new(AtomicBool::new(false));
        let (answer, stopped) = (Arc::new(answer), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            for stream in listener.incoming() {
                if stopped.load(Ordering::SeqCst) {
                    return;
                }
                let (answer, stopped) = (Arc::clone(&answer), Arc::clone(&stopped));
                if let Ok(stream) = stream {
                    thread::spawn(move || serve(stream, &*answer, &stopped));
                }
            }
        });
        Self {
            port,
            stop,
            thread: Some(thread),
        }
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port));
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(stream: TcpStream, answer: &dyn Fn(&Request) -> Reply, stop: &AtomicBool) {
    let _ = stream.set_read_timeout(Some(PATIENCE));
    let _ = stream.set_nodelay(true);
    let Ok(mut writer) = stream.try_clone() else { return };
    let mut reader = BufReader::new(stream);
    while !stop.load(Ordering::SeqCst) {
        let Ok(Some(request)) = read_request(&mut reader) else {
            return;
        };
        let reply = answer(&request);
        if write_reply(&mut writer, &request, reply).is_err() {
            return;
        }
    }
}

/// Start line and headers of a request or a response; `None` at the end of the connection.
pub(crate) fn read_head(reader: &mut impl BufRead) -> io::Result<Option<(String, Headers)>> {
    let mut lines = Vec::new();
    let mut limited = reader.take(MAX_HEAD);
    loop {
        let mut line = String::new();
        if limited.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        lines.push(line.to_owned());
    }
    let mut lines = lines.into_iter();
    let Some(start) = lines.next() else { return Ok(None) };
    let headers = lines
        .filter_map(|line| {
            line.split_once(':')
                .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        })
        .collect();
    Ok(Some((start, headers)))
}

fn read_request(reader: &mut impl BufRead) -> io::Result<Option<Request>> {
    let Some((start, headers)) = read_head(reader)? else {
        return Ok(None);
    };
    let mut words = start.split(' ');
    let (Some(method), Some(target)) = (words.next(), words.next()) else {
        return Ok(None);
    };
    let mut body = Vec::new();
    if let Some(length) = find(&headers, "content-length") {
        let length = length.parse().unwrap_or(0);
        reader.take(u64::min(length, MAX_BODY)).read_to_end(&mut body)?;
    } else if find(&headers, "transfer-encoding").is_some() {
        read_chunks(reader, &mut body)?;
    }
    Ok(Some(Request {
        method: method.to_owned(),
        target: target.to_owned(),
        headers,
        body,
    }))
}

/// A body in chunks (RFC 9112, 7.1), without trailers.
pub(crate) fn read_chunks(reader: &mut impl BufRead, body: &mut Vec<u8>) -> io::Result<()> {
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        let length = u64::from_str_radix(line.trim().split(';').next().unwrap_or_default(), 16).unwrap_or(0);
        reader.take(u64::min(length, MAX_BODY)).read_to_end(body)?;
        reader.read_line(&mut String::new())?;
        if length == 0 {
            return Ok(());
        }
    }
}

fn write_reply(writer: &mut TcpStream, request: &Request, reply: Reply) -> io::Result<()> {
    let mut head = format!("HTTP/1.1 {} .\r\n", reply.status);
    for (name, value) in &reply.headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    if find(&reply.headers, "content-length").is_none() {
        let length = match &reply.body {
            Body::Bytes(bytes) => u64::try_from(bytes.len()).unwrap(),
            Body::File(_, _, length) => *length,
            Body::Stream(_) => panic!("a stream's reply says its length"),
        };
        let _ = write!(head, "Content-Length: {length}\r\n");
    }
    writer.write_all(format!("{head}\r\n").as_bytes())?;
    if request.method == "HEAD" {
        return Ok(());
    }
    match reply.body {
        Body::Bytes(bytes) => writer.write_all(&bytes),
        Body::File(mut file, from, length) => {
            file.seek(SeekFrom::Start(from))?;
            io::copy(&mut file.take(length), writer).map(|_| ())
        }
        Body::Stream(mut stream) => io::copy(&mut stream, writer).map(|_| ()),
    }
}

/// A file, or the part of it that a `Range` header asks for.
pub(crate) fn file_reply(request: &Request, file: File) -> Reply {
    let length = file.metadata().unwrap().len();
    let asked = request.header("range").and_then(|range| {
        let (from, to) = range.strip_prefix("bytes=")?.split_once('-')?;
        if from.is_empty() {
            return Some((length.saturating_sub(to.parse().ok()?), length));
        }
        let end = to.parse::<u64>().map_or(length, |last| length.min(last + 1));
        Some((from.parse().ok()?, end))
    });
    match asked {
        None => Reply {
            status: 200,
            headers: vec![("Accept-Ranges".to_owned(), "bytes".to_owned())],
            body: Body::File(file, 0, length),
        },
        Some((from, end)) if from < end => Reply {
            status: 206,
            headers: vec![("Content-Range".to_owned(), format!("bytes {from}-{}/{length}", end - 1))],
            body: Body::File(file, from, end - from),
        },
        Some(_) => Reply::new(416, "").with("Content-Range", format!("bytes */{length}")),
    }
}
