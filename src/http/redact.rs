//! URLs without what is secret in them: users, passwords, and query strings, where signatures are.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::header::HeaderValue;
use url::Url;

use crate::excerpt;

/// A URL as it may be printed: no user, no password, no query, no fragment.
#[must_use]
pub fn shown_url(url: &Url) -> String {
    let (has_query, shown) = (url.query().is_some(), bare(url.clone()));
    if has_query {
        format!("{shown}?…")
    } else {
        shown.into()
    }
}

/// Text that was typed or came from a server and may be a URL, as it may be printed. What cannot be parsed may still hold a
/// password: of such text only a part is shown that cannot be one.
#[must_use]
pub fn without_secrets(text: &str) -> String {
    match Url::parse(text) {
        // As it was typed, where it can be: a parser mends more than a message should.
        Ok(url) if url.has_host() && url.as_str() == bare(url.clone()).as_str() => return printable(text),
        Ok(url) if url.has_host() => return excerpt(&shown_url(&url)),
        _ => {}
    }
    let Some((scheme, rest)) = text.split_once("//").filter(|(scheme, _)| {
        // `http://`, or the `//` of a redirect that keeps the scheme.
        scheme.is_empty() || scheme.ends_with(':') && !scheme.contains('/')
    }) else {
        return text.to_owned();
    };
    // A user and a password reach to an `@`, to the last one for all that is known; and `?` or `#` may stand in them.
    let end = rest.find(['?', '#']).unwrap_or(rest.len());
    let shown = match rest.rfind('@') {
        Some(at) if at > end => "…",
        Some(at) => &rest[at + 1..end],
        None => &rest[..end],
    };
    let cut = if end < rest.len() && shown != "…" { "?…" } else { "" };
    printable(&format!("{scheme}//{shown}{cut}"))
}

/// Text that can only be meant as a URL, as it may be printed: of what is none, nothing in front of an `@` and nothing behind a `?`.
#[must_use]
pub fn meant_url(text: &str) -> String {
    let shown = without_secrets(text);
    if Url::parse(text).is_ok_and(|url| url.has_host()) {
        return shown;
    }
    let end = shown.find(['?', '#']).unwrap_or(shown.len());
    let behind = shown[..end].rsplit('@').next().unwrap_or_default();
    printable(behind)
}

/// A `Location` that leads nowhere, as it may be printed.
pub(super) fn shown_location(location: &str) -> String {
    if location.contains("//") {
        return without_secrets(location);
    }
    let end = location.find(['?', '#']).unwrap_or(location.len());
    printable(&location[..end])
}

/// What of it can be read; an address has no use for the rest.
fn printable(text: &str) -> String {
    let readable: String = text.chars().filter(|c| excerpt::is_printable(*c)).collect();
    excerpt::of_sentence(&readable)
}

/// Either end of a text that is a stranger's, or quotes one: what they say can be megabytes, and a message is a line.
#[must_use]
pub fn excerpt(text: &str) -> String {
    excerpt::of_sentence(text)
}

/// The URL without user, password, query and fragment.
fn bare(mut url: Url) -> Url {
    url.set_query(None);
    url.set_fragment(None);
    // These two only fail for URLs that cannot have a user, which then have none to hide.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url
}

/// What of a URL stays the same when passwords and signatures change: the name under which the disk cache keeps a layer that
/// has no digest. Everything else of the query stays, because it may be what tells one layer from another.
#[must_use]
pub fn stable_name(url: &str) -> String {
    const SIGNATURES: [&str; 17] = [
        "signature",
        "expires",
        "key-pair-id",
        "policy",
        "sig",
        "se",
        "sp",
        "st",
        "sv",
        "sr",
        "spr",
        "skoid",
        "sktid",
        "skt",
        "ske",
        "token",
        "access_token",
    ];
    let Ok(parsed) = Url::parse(url) else {
        return url.to_owned();
    };
    let passing = |name: &str| {
        let name = name.to_ascii_lowercase();
        name.starts_with("x-amz-") || name.starts_with("x-goog-") || SIGNATURES.contains(&name.as_str())
    };
    let kept: Vec<(String, String)> = parsed
        .query_pairs()
        .filter(|(name, _)| !passing(name))
        .map(|(a, b)| (a.into(), b.into()))
        .collect();
    let mut name = bare(parsed);
    if !kept.is_empty() {
        name.query_pairs_mut().extend_pairs(kept);
    }
    name.to_string()
}

/// A URL without its user and password, and these as the value of an `Authorization` header.
pub(crate) fn split_credentials(named: &Url) -> (Url, Option<HeaderValue>) {
    let mut url = named.clone();
    if named.username().is_empty() && named.password().is_none() {
        return (url, None);
    }
    // These only fail for URLs that cannot have a user.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    let mut pair = percent_decoded(named.username().as_bytes());
    pair.push(b':');
    pair.extend(percent_decoded(named.password().unwrap_or_default().as_bytes()));
    let mut value = HeaderValue::from_str(&format!("Basic {}", STANDARD.encode(&pair))).ok();
    if let Some(value) = &mut value {
        value.set_sensitive(true);
    }
    (url, value)
}

fn percent_decoded(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let pair = tail.get(..2).filter(|digits| digits.iter().all(u8::is_ascii_hexdigit));
        let pair = pair.and_then(|digits| std::str::from_utf8(digits).ok());
        match pair.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) if *first == b'%' => {
                out.push(byte);
                rest = &tail[2..];
            }
            _ => {
                out.push(*first);
                rest = tail;
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_hold_no_secrets() {
        for (text, shown) in [
            ("https://me:word@host/a/b?X-Amz-Signature=1#f", "https://host/a/b?…"),
            ("https://word@host:8443/a", "https://host:8443/a"),
            ("http://host:81/a", "http://host:81/a"),
            ("docker://me:word@host/a", "docker://host/a"),
            ("/a/plain path?x@y", "/a/plain path?x@y"),
            ("a:b", "a:b"),
            // Not mended: a message is about what was typed.
            ("http:/host/a", "http:/host/a"),
            ("HTTP://Host/a/../b", "HTTP://Host/a/../b"),
            ("http:\\\\me:word@host/a", "http://host/a"),
            ("http:/me:word@host/a", "http://host/a"),
            // Not URLs, but meant to be.
            ("http://[broken/?word=1", "http://[broken/?…"),
            ("http://me:word@[bad", "http://[bad"),
            ("http://me:word@[bad?sig=word", "http://[bad?…"),
            ("http://me:wo@word@[bad/x", "http://[bad/x"),
            ("http://me:a?word@[bad", "http://…"),
            ("http://me:a#word@[bad", "http://…"),
            ("http://me:a/word@[bad", "http://[bad"),
            ("http://me:word@:80:x/?word", "http://:80:x/?…"),
            ("http://a:word@h:99999/", "http://h:99999/"),
            ("//me:word@[bad/x", "//[bad/x"),
        ] {
            assert_eq!(without_secrets(text), shown, "{text}");
            assert!(!shown.contains("word"));
        }
        assert_eq!(shown_location("/a/b?sig=word"), "/a/b");
        assert_eq!(shown_location("//me:word@[bad/x?sig=word"), "//[bad/x?…");
        assert_eq!(shown_location("\u{9b}31m/x"), "31m/x");
    }

    #[test]
    fn a_name_survives_a_new_signature_and_nothing_else() {
        let name = stable_name("https://u:p@host/layer?blob=7&X-Amz-Signature=1&X-Amz-Date=2");
        assert_eq!(name, stable_name("https://host/layer?blob=7&X-Amz-Signature=3"));
        assert_eq!(name, "https://host/layer?blob=7");
        assert_ne!(name, stable_name("https://host/layer?blob=8&X-Amz-Signature=1"));
        assert_ne!(name, stable_name("https://host/layer2?blob=7"));
    }

    #[test]
    fn credentials_leave_the_url() {
        let (url, value) = split_credentials(&Url::parse("https://us%40er:p%3Aw@host/x?q=1").unwrap());
        assert_eq!(url.as_str(), "https://host/x?q=1");
        let value = value.unwrap();
        assert_eq!(value.to_str().unwrap(), "Basic dXNAZXI6cDp3");
        assert!(value.is_sensitive());
    }

    #[test]
    fn only_hexadecimal_digits_are_decoded() {
        assert_eq!(percent_decoded(b"%41%+f%-1%4"), b"A%+f%-1%4");
    }
}
