//! Proxies as the environment names them: `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY`, `NO_PROXY`, in either case, by the same
//! rules as everywhere else in this program. In: a URL. Out: the proxy to connect to instead, and how to get through it
//! (RFC 9110, section 9.3.6).

use std::fmt;
use std::io;

use hyper::Uri;
use hyper::header::HeaderValue;
use hyper_util::client::proxy::matcher::Matcher;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::client::TlsStream;
use url::Url;

use super::tls;
use crate::excerpt;

/// No proxy says more before the tunnel is open.
const LONGEST_HEAD: usize = 16 << 10;

/// What the environment said when the first of these was made.
pub(crate) struct Proxies(Matcher);

impl Default for Proxies {
    fn default() -> Self {
        Self(Matcher::from_env())
    }
}

impl fmt::Debug for Proxies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Proxies")
    }
}

/// A proxy.
pub(crate) struct Proxy {
    /// Whether it is itself spoken to by TLS.
    pub(crate) tls: bool,
    pub(crate) host: String,
    pub(crate) port: u16,
    /// `Proxy-Authorization`.
    pub(crate) authorization: Option<HeaderValue>,
}

impl Proxies {
    /// The environment's, as it was when they were first asked for.
    pub(crate) fn of_environment() -> &'static Self {
        static PROXIES: std::sync::OnceLock<Proxies> = std::sync::OnceLock::new();
        PROXIES.get_or_init(Self::default)
    }

    /// The proxy for `url`, if it is to be reached through one.
    pub(crate) fn of(&self, url: &Url) -> Result<Option<Proxy>, String> {
        // Only scheme and host matter, and what else there is may be secret.
        let Ok(place) = url[..url::Position::AfterPort].parse::<Uri>() else {
            return Ok(None);
        };
        let Some(found) = self.0.intercept(&place) else {
            return Ok(None);
        };
        let uri = found.uri();
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            other => {
                return Err(format!(
                    "the environment names a proxy of kind {:?}; http and https proxies can be used",
                    other.unwrap_or_default()
                ));
            }
        };
        let host = uri
            .host()
            .ok_or("the environment names a proxy without a host")?
            .to_owned();
        Ok(Some(Proxy {
            tls,
            host,
            port: uri.port_u16().unwrap_or(if tls { 443 } else { 80 }),
            authorization: found.basic_auth().cloned(),
        }))
    }
}

impl Proxy {
    /// Speaks TLS with the proxy itself.
    pub(crate) async fn secured<S>(&self, stream: S) -> io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let config = tls::client_config().map_err(io::Error::other)?;
        let name = ServerName::try_from(self.host.trim_matches(['[', ']']).to_owned()).map_err(io::Error::other)?;
        tokio_rustls::TlsConnector::from(config).connect(name, stream).await
    }

    /// Has the proxy connect `stream` to `host`. The caller has a deadline.
    pub(crate) async fn tunnel<S>(&self, stream: &mut S, host: &str, port: u16) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut request = format!("CONNECT {host}:{port} HTTP/1.1\r\nHost: {host}:{port}\r\n").into_bytes();
        if let Some(value) = &self.authorization {
            request.extend_from_slice(b"Proxy-Authorization: ");
            request.extend_from_slice(value.as_bytes());
            request.extend_from_slice(b"\r\n");
        }
        request.extend_from_slice(b"\r\n");
        stream.write_all(&request).await?;
        stream.flush().await?;
        // Byte by byte: what follows the head belongs to the tunnel.
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            if head.len() >= LONGEST_HEAD {
                return Err(io::Error::other("the proxy's answer has no end"));
            }
            head.push(stream.read_u8().await?);
        }
        let line = head.split(|byte| *byte == b'\r').next().unwrap_or_default();
        let line = String::from_utf8_lossy(line);
        let status = line.split(' ').nth(1).unwrap_or_default();
        if line.starts_with("HTTP/1.") && status.len() == 3 && status.starts_with('2') {
            return Ok(());
        }
        let said = excerpt::of_text(&line);
        Err(io::Error::other(format!(
            "the proxy {}:{} says: {said}",
            self.host, self.port
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies() -> Proxies {
        Proxies(
            Matcher::builder()
                .http("http://forward.example:3128")
                .https("http://us%20er:pw@tunnel.example")
                .no("direct.example,127.0.0.0/8")
                .build(),
        )
    }

    #[test]
    fn the_environments_rules_hold() {
        let of = |url: &str| proxies().of(&Url::parse(url).unwrap()).unwrap();
        let tunnel = of("https://a.example/x?secret").unwrap();
        assert_eq!(
            (tunnel.host.as_str(), tunnel.port, tunnel.tls),
            ("tunnel.example", 80, false)
        );
        assert!(tunnel.authorization.unwrap().to_str().unwrap().starts_with("Basic "));
        assert_eq!(of("http://a.example:5000/x").unwrap().port, 3128);
        for direct in [
            "https://direct.example/",
            "https://sub.direct.example/",
            "http://127.0.0.1:5000/",
        ] {
            assert!(of(direct).is_none(), "{direct}");
        }
    }

    #[test]
    fn a_tunnel_is_opened_or_not() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let try_with = |answer: &'static [u8]| {
            runtime.block_on(async {
                let (mut here, mut there) = tokio::io::duplex(4096);
                there.write_all(answer).await.unwrap();
                let proxy = proxies()
                    .of(&Url::parse("https://a.example").unwrap())
                    .unwrap()
                    .unwrap();
                let outcome = proxy.tunnel(&mut here, "a.example", 443).await;
                let mut asked = vec![0; 33];
                there.read_exact(&mut asked).await.unwrap();
                assert_eq!(asked, b"CONNECT a.example:443 HTTP/1.1\r\nH");
                drop(there);
                let mut rest = Vec::new();
                here.read_to_end(&mut rest).await.unwrap();
                outcome.map(|()| rest)
            })
        };
        let open = try_with(b"HTTP/1.1 200 Connection established\r\nVia: x\r\n\r\nTLS").unwrap();
        assert_eq!(open, b"TLS");
        let refused = try_with(b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n").unwrap_err();
        assert!(
            refused.to_string().contains("tunnel.example:80 says: HTTP/1.1 407"),
            "{refused}"
        );
        assert!(try_with(b"nonsense\r\n\r\n").is_err());
    }
}
