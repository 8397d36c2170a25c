//! Which addresses a request may be sent to. In: what a stranger's text names (a redirect, a token server, a place to upload to),
//! and the address that the stranger has. Out: whether the request may go there.
//!
//! A server out on the internet must not be able to have requests sent to this machine or to the network it is in: there are
//! services that answer whoever reaches them (metadata of clouds, administration of routers). What a person names may lie
//! anywhere; a server that itself lies inside may name others inside.
//!
//! Invariant: a name is resolved once, and the addresses that were looked at are those that are connected to: what the name
//! means a moment later ("DNS rebinding") does not matter.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use serde::{Deserialize, Serialize};
use url::{Host, Url};

use super::error::Error;
use super::proxy::Proxies;
use super::redact::shown_url;

/// Which addresses a request may be sent to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reach {
    /// All: a person named it, or a server inside did.
    #[default]
    Anywhere,
    /// Those that anybody can reach.
    Public,
}

impl Reach {
    /// What may be named by the server that answered a request to `url`. `peer` is the address that was connected to; none where
    /// that was a proxy. `allowed` is what the person says.
    pub(crate) fn of_server(url: &Url, peer: Option<IpAddr>, allowed: bool) -> Self {
        let inside = match (peer, url.host()) {
            (Some(peer), _) => is_inside(peer),
            (None, Some(Host::Domain(name))) => is_local_name(name),
            (None, Some(Host::Ipv4(address))) => is_inside(address.into()),
            (None, Some(Host::Ipv6(address))) => is_inside(address.into()),
            (None, None) => false,
        };
        if allowed || inside {
            Self::Anywhere
        } else {
            Self::Public
        }
    }

    /// Refuses a URL that `from` names and that says by itself that it lies inside.
    ///
    /// # Errors
    /// [`Error`] with both hosts and what to do.
    pub(crate) fn check(self, from: &Url, to: &Url) -> Result<(), Error> {
        let inside = match to.host() {
            _ if self == Self::Anywhere => None,
            Some(Host::Domain(name)) => is_local_name(name).then(|| InsideAddress(Ipv4Addr::LOCALHOST.into())),
            Some(Host::Ipv4(address)) => InsideAddress::of(address.into()),
            Some(Host::Ipv6(address)) => InsideAddress::of(address.into()),
            None => None,
        };
        inside.map_or(Ok(()), |inside| Err(inside.refused(from, to)))
    }

    /// What of a name's addresses may be connected to.
    ///
    /// # Errors
    /// [`InsideAddress`] when all of them lie inside; nothing is said of a name without any.
    pub(crate) fn filter(self, found: impl Iterator<Item = SocketAddr>) -> Result<Vec<SocketAddr>, InsideAddress> {
        let (inside, open): (Vec<_>, Vec<_>) =
            found.partition(|address| self == Self::Public && is_inside(address.ip()));
        match inside.first() {
            Some(address) if open.is_empty() => Err(InsideAddress(address.ip())),
            _ => Ok(open),
        }
    }

    /// The same for a request that may go through a proxy: there the proxy looks the name up, and nothing can be said of its
    /// address here.
    pub(crate) fn unless_proxied(self, url: &Url) -> Self {
        match Proxies::of_environment().of(url) {
            Ok(None) => self,
            Ok(Some(_)) | Err(_) => Self::Anywhere,
        }
    }
}

/// An address inside, where one outside had to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct InsideAddress(pub(crate) IpAddr);

impl InsideAddress {
    fn of(address: IpAddr) -> Option<Self> {
        is_inside(address).then_some(Self(address))
    }

    /// The one that is behind a failure, if it is one.
    pub(crate) fn behind(error: &(dyn std::error::Error + 'static)) -> Option<Self> {
        let mut cause = Some(error);
        while let Some(error) = cause {
            if let Some(found) = error.downcast_ref::<Self>() {
                return Some(*found);
            }
            // An `io::Error` that was made of one has not it but its source as its source.
            let shared = error.downcast_ref::<Arc<io::Error>>().map(AsRef::as_ref);
            let inner = error
                .downcast_ref::<io::Error>()
                .or(shared)
                .and_then(io::Error::get_ref);
            if let Some(found) = inner.and_then(|inner| inner.downcast_ref::<Self>()) {
                return Some(*found);
            }
            cause = error.source();
        }
        None
    }

    /// The error of a request to `to`, which `from` named.
    pub(crate) fn refused(self, from: &Url, to: &Url) -> Error {
        let why = format!("it leads to {}, which is {self}", shown_url(to));
        Error::wrong(from, why)
            .lasting()
            .advising("; where that is meant, use --allow-private-redirects")
            .caused_by(self)
    }
}

/// `169.254.169.254, a link-local address`.
impl fmt::Display for InsideAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.0, kind(self.0).unwrap_or("a public address"))
    }
}

impl std::error::Error for InsideAddress {}

/// What reqwest resolves names by where only public addresses will do.
#[derive(Clone, Copy, Debug)]
pub(super) struct PublicNames;

impl Resolve for PublicNames {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            let host = name.as_str().to_owned();
            // The port is set by whoever connects.
            let looking = tokio::task::spawn_blocking(move || (host.as_str(), 0).to_socket_addrs());
            let open = Reach::Public.filter(looking.await??)?;
            let open: Addrs = Box::new(open.into_iter());
            Ok(open)
        })
    }
}

impl PublicNames {
    pub(super) fn shared() -> Arc<Self> {
        Arc::new(Self)
    }
}

fn is_inside(address: IpAddr) -> bool {
    kind(address).is_some()
}

/// `localhost` and what is below it mean this machine, whatever resolves them (RFC 6761, section 6.3).
fn is_local_name(name: &str) -> bool {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost")
}

/// What an address is that not anybody can reach (the registries of RFC 6890); none of a public one. Addresses of documents are
/// taken for public: nothing answers there.
fn kind(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => kind_v4(address),
        IpAddr::V6(address) => kind_v6(address),
    }
}

fn kind_v4(address: Ipv4Addr) -> Option<&'static str> {
    match address.octets() {
        [0, ..] => Some("an address of this machine"),
        [127, ..] => Some("a loopback address"),
        [10, ..] | [172, 16..=31, ..] | [192, 168, ..] => Some("an address of a private network"),
        [169, 254, ..] => Some("a link-local address"),
        [100, 64..=127, ..] => Some("an address of a carrier's network"),
        [192, 0, 0, _] | [198, 18..=19, ..] => Some("an address for special purposes"),
        [224..=239, ..] => Some("a multicast address"),
        [240..=255, ..] => Some("a reserved address"),
        _ => None,
    }
}

fn kind_v6(address: Ipv6Addr) -> Option<&'static str> {
    let v4 = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        kind_v4(Ipv4Addr::new(a, b, c, d))
    };
    match address.segments() {
        [0, 0, 0, 0, 0, 0, 0, 0] => Some("an address of this machine"),
        [0, 0, 0, 0, 0, 0, 0, 1] => Some("a loopback address"),
        // Mapped, compatible, translated (RFC 6052 and 8215) and 6to4: what counts is the IPv4 address within.
        [0, 0, 0, 0, 0, 0 | 0xffff, high, low]
        | [0, 0, 0, 0, 0xffff, 0, high, low]
        | [0x64, 0xff9b, 0, 0, 0, 0, high, low]
        | [0x2002, high, low, ..] => v4(high, low),
        [0x64, 0xff9b, 1, ..] | [0xfc00..=0xfdff | 0xfec0..=0xfeff, ..] => Some("an address of a private network"),
        [0xfe80..=0xfebf, ..] => Some("a link-local address"),
        [0xff00..=0xffff, ..] => Some("a multicast address"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_not_anybody_can_reach_are_known() {
        for inside in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.9.9.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.168.1.1",
            "198.18.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:10.1.2.3",
            "::ffff:169.254.169.254",
            "::ffff:0:10.0.0.1",
            "64:ff9b::a00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(is_inside(inside.parse().unwrap()), "{inside}");
        }
        for public in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.1",
            "100.63.255.255",
            "100.128.0.1",
            "126.255.255.255",
            "128.0.0.1",
            "169.253.0.1",
            "172.15.0.1",
            "172.32.0.1",
            "192.0.1.1",
            "192.167.0.1",
            "192.169.0.1",
            "198.20.0.1",
            "203.0.113.7",
            "223.255.255.255",
            "::ffff:1.1.1.1",
            "64:ff9b::808:808",
            "2001:db8::1",
            "2002:808:808::1",
            "2606:4700::1111",
            "fbff::1",
        ] {
            assert!(!is_inside(public.parse().unwrap()), "{public}");
        }
    }

    #[test]
    fn who_is_inside_may_name_whom_it_likes() {
        let url = |text: &str| Url::parse(text).unwrap();
        let of = |text: &str, peer: Option<&str>| {
            Reach::of_server(&url(text), peer.map(|peer| peer.parse().unwrap()), false)
        };
        assert_eq!(of("http://a.example/", Some("1.1.1.1")), Reach::Public);
        assert_eq!(of("http://a.example/", Some("10.0.0.7")), Reach::Anywhere);
        // Of whom a proxy asks only the name is known.
        assert_eq!(of("http://a.example/", None), Reach::Public);
        assert_eq!(of("http://localhost:5000/", None), Reach::Anywhere);
        assert_eq!(of("http://[::1]/", None), Reach::Anywhere);
        assert_eq!(of("http://10.0.0.7/", None), Reach::Anywhere);
        let peer = Some("1.1.1.1".parse().unwrap());
        assert_eq!(Reach::of_server(&url("http://a.example/"), peer, true), Reach::Anywhere);
    }

    #[test]
    fn what_is_named_in_figures_is_refused_in_all_spellings() {
        let from = Url::parse("https://public.example/layer?sig=word").unwrap();
        for to in [
            "http://169.254.169.254/latest/meta-data?x=word",
            "http://2852039166/",
            "http://0xa9fea9fe/",
            "http://127.1/",
            "http://[::ffff:127.0.0.1]/",
            "http://localhost/",
            "http://Registry.LOCALHOST./",
        ] {
            let to = Url::parse(to).unwrap();
            let said = Reach::Public.check(&from, &to).unwrap_err().to_string();
            assert!(
                said.contains("public.example") && said.contains(to.host_str().unwrap()),
                "{said}"
            );
            assert!(
                said.contains("--allow-private-redirects") && !said.contains("word"),
                "{said}"
            );
            assert!(Reach::Anywhere.check(&from, &to).is_ok());
        }
        assert!(
            Reach::Public
                .check(&from, &Url::parse("http://1.1.1.1/").unwrap())
                .is_ok()
        );
    }

    #[test]
    fn only_public_addresses_of_a_name_are_connected_to() {
        let addresses = |all: &[&str]| -> Vec<SocketAddr> {
            all.iter().map(|ip| SocketAddr::new(ip.parse().unwrap(), 80)).collect()
        };
        let both = addresses(&["10.0.0.1", "1.1.1.1"]);
        assert_eq!(
            Reach::Public.filter(both.iter().copied()).unwrap(),
            addresses(&["1.1.1.1"])
        );
        assert_eq!(Reach::Anywhere.filter(both.iter().copied()).unwrap(), both);
        let inside = addresses(&["10.0.0.1", "127.0.0.1"]);
        let refused = Reach::Public.filter(inside.into_iter()).unwrap_err();
        assert_eq!(refused.to_string(), "10.0.0.1, an address of a private network");
        let wrapped = io::Error::other(refused);
        assert_eq!(InsideAddress::behind(&wrapped), Some(refused));
        assert_eq!(InsideAddress::behind(&io::Error::other("else")), None);
        assert!(Reach::Public.filter(std::iter::empty()).unwrap().is_empty());
    }
}
