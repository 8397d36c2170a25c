//! What a registry that refuses says about how to be let in (RFC 9110, section 11.6.1; the distribution project's token
//! specification), and what a token server answers.
//!
//! Registries write challenges as they like: values without quotes, `;` between parameters, letters of no alphabet that a
//! header may hold. So this reads what can be read: a parameter that makes no sense is lost alone. Nothing here trusts what it
//! reads: where credentials may go is decided where they are sent.

use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};
use serde::{Deserialize, Serialize};
use url::Url;

use super::lenient::null_is_empty;
use crate::http::Secret;

/// How long a token lasts when its server does not say (the token specification).
const USUAL_LIFE: Duration = Duration::from_secs(60);
/// What is said to last longer is asked for anew after this.
const LONGEST_LIFE: Duration = Duration::from_secs(24 * 60 * 60);
/// A token is not used for the last tenth of its life, nor for this long before its end.
const MARGIN: Duration = Duration::from_secs(10);

/// How a registry wants to be asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Challenge {
    /// With a user and a password.
    Basic,
    /// With a token from another server.
    Bearer {
        realm: Url,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Challenge {
    /// The best of what the headers of an answer from `url` offer: a token before a password, because it is good for less.
    pub(super) fn of(headers: &HeaderMap, url: &Url) -> Option<Self> {
        let mut basic = None;
        for value in headers.get_all(WWW_AUTHENTICATE) {
            for offer in offers(&text_of(value.as_bytes())) {
                if offer.scheme.eq_ignore_ascii_case("basic") {
                    basic = Some(Self::Basic);
                } else if offer.scheme.eq_ignore_ascii_case("bearer")
                    && let Some(realm) = offer.parameter("realm").and_then(|realm| token_server(realm, url))
                {
                    let owned = |name| offer.parameter(name).map(str::to_owned);
                    return Some(Self::Bearer {
                        realm,
                        service: owned("service"),
                        scope: owned("scope"),
                    });
                }
            }
        }
        basic
    }
}

/// A token server's URL, which some registries write without their own host's name.
fn token_server(realm: &str, url: &Url) -> Option<Url> {
    let realm = if realm.starts_with('/') {
        url.join(realm).ok()?
    } else {
        Url::parse(realm).ok()?
    };
    (matches!(realm.scheme(), "http" | "https") && realm.has_host()).then_some(realm)
}

/// A header's bytes as text: UTF-8, or else what HTTP once meant by bytes beyond ASCII.
fn text_of(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().map(|byte| char::from(*byte)).collect(),
    }
}

/// A way to be let in that a header offers: `Bearer realm="…",service="…"`.
#[derive(Debug)]
struct Offer {
    scheme: String,
    /// In the order in which they stand; of two of one name the first counts.
    parameters: Vec<(String, String)>,
}

impl Offer {
    /// A parameter's value, unless it is empty.
    fn parameter(&self, name: &str) -> Option<&str> {
        let mut parameters = self.parameters.iter();
        let (_, value) = parameters.find(|(key, _)| key.eq_ignore_ascii_case(name))?;
        Some(value.as_str()).filter(|value| !value.is_empty())
    }
}

/// What stands between words.
fn is_separator(c: char) -> bool {
    c.is_whitespace() || c == ',' || c == ';'
}

/// Everything that a header's text offers. A word behind which no `=` stands is a scheme; a parameter belongs to the last
/// scheme that had one directly behind it, so that what is left over of a value that should have been in quotes takes no
/// parameters with it.
fn offers(text: &str) -> Vec<Offer> {
    let mut offers: Vec<Offer> = Vec::new();
    let mut current = None;
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches(is_separator);
        let end = rest
            .find(|c| is_separator(c) || c == '=' || c == '"')
            .unwrap_or(rest.len());
        let (word, behind) = rest.split_at(end);
        if behind.is_empty() && word.is_empty() {
            return offers;
        }
        let value = behind.trim_start().strip_prefix('=');
        let Some(value) = value.filter(|_| !word.is_empty()) else {
            // A scheme; or a stray quote or equals sign, which is passed over.
            if word.is_empty() {
                rest = behind.get(1..).unwrap_or_default();
                continue;
            }
            offers.push(Offer {
                scheme: word.to_owned(),
                parameters: Vec::new(),
            });
            let next = behind.trim_start();
            if current.is_none() || is_parameter(next) {
                current = Some(offers.len() - 1);
            }
            rest = behind;
            continue;
        };
        let value = value.trim_start();
        let (value, behind) = if let Some(quoted) = value.strip_prefix('"') {
            unquoted(quoted)
        } else {
            let end = value.find(is_separator).unwrap_or(value.len());
            (value[..end].to_owned(), &value[end..])
        };
        if let Some(offer) = current.and_then(|at: usize| offers.get_mut(at)) {
            offer.parameters.push((word.to_owned(), value));
        }
        rest = behind;
    }
}

/// Whether a text begins with `word =`.
fn is_parameter(text: &str) -> bool {
    let end = text
        .find(|c| is_separator(c) || c == '=' || c == '"')
        .unwrap_or(text.len());
    end > 0 && text[end..].trim_start().starts_with('=')
}

/// A quoted string behind its first quote, and what follows it. One that does not end goes to the end.
fn unquoted(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '"' => return (value, &text[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, c)| c)),
            c => value.push(c),
        }
    }
    (value, "")
}

/// A token server's answer.
#[derive(Deserialize)]
pub(super) struct TokenAnswer {
    #[serde(default, deserialize_with = "null_is_empty")]
    token: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    access_token: String,
    /// Seconds, which some servers write as text or with a fraction.
    #[serde(default)]
    expires_in: serde_json::Value,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) refresh_token: String,
}

/// A token and until when to use it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Token {
    pub(super) secret: Secret,
    pub(super) until: SystemTime,
}

/// How long a token is said to last; none of what is no time at all.
fn life(expires_in: &serde_json::Value) -> Option<Duration> {
    let seconds = match expires_in {
        serde_json::Value::String(text) => text.trim().parse().ok()?,
        other => other.as_f64()?,
    };
    if seconds.is_nan() || seconds <= 0.0 {
        return None;
    }
    let life = Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST_LIFE);
    Some(life.min(LONGEST_LIFE))
}

impl TokenAnswer {
    /// Reads an answer, whatever it is called and whatever marks its beginning.
    pub(super) fn parse(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)).ok()
    }

    /// The token, counted from `asked` on: its server's clock may be wrong, its count of seconds is not.
    pub(super) fn token(self, asked: SystemTime) -> Option<Token> {
        let text = [&self.token, &self.access_token]
            .map(|text| text.trim())
            .into_iter()
            .find(|text| !text.is_empty())?;
        if !text.bytes().all(|c| c.is_ascii_graphic()) {
            return None;
        }
        let life = life(&self.expires_in).unwrap_or(USUAL_LIFE);
        Some(Token {
            secret: Secret::new(text.to_owned()),
            until: asked + life.saturating_sub((life / 10).min(MARGIN)),
        })
    }
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn challenge(values: &[&str]) -> Option<Challenge> {
        let bytes: Vec<_> = values.iter().map(|value| value.as_bytes()).collect();
        challenge_of(&bytes)
    }

    fn challenge_of(values: &[&[u8]]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_bytes(value).unwrap());
        }
        Challenge::of(
            &headers,
            &Url::parse("https://registry.example:5000/v2/x/y/manifests/t").unwrap(),
        )
    }

    fn bearer(realm: &str, service: Option<&str>, scope: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: Url::parse(realm).unwrap(),
            service: service.map(str::to_owned),
            scope: scope.map(str::to_owned),
        }
    }

    /// As registries were seen to write them.
    #[test]
    fn a_bad_parameter_costs_that_parameter_alone() {
        let realm = "https://auth.example/token";
        let r = format!("realm=\"{realm}\"");
        for (text, service, scope) in [
            (
                format!("Bearer {r},service=foobar.com:443,scope=\"\""),
                Some("foobar.com:443"),
                None,
            ),
            (
                format!("Bearer {r},service=\"s\",scope=repository:x/y:pull"),
                Some("s"),
                Some("repository:x/y:pull"),
            ),
            // Without quotes a comma ends the value, and what is left of it is no scheme that takes the next parameter.
            (
                format!("Bearer {r},scope=repository:x/y:pull,push,service=\"s\""),
                Some("s"),
                Some("repository:x/y:pull"),
            ),
            (format!("Bearer realm={realm},service=\"s\""), Some("s"), None),
            (format!("Bearer realm = \"{realm}\" , service = \"s\""), Some("s"), None),
            (format!("Bearer {r};service=\"s\""), Some("s"), None),
            (format!("Bearer {r},service=\"s\","), Some("s"), None),
            (format!("bearer Realm=\"{realm}\",Service=\"s\""), Some("s"), None),
            (format!("Bearer service=,{r}"), None, None),
            (format!("Bearer {r},=,\"stray,service=s"), Some("s"), None),
            (
                format!("Bearer {r},service=\"s\",error_description=\"it's, \\\"old\\\"\""),
                Some("s"),
                None,
            ),
            (
                format!("Negotiate, NTLM TlRM==, Basic realm=My Registry, Bearer {r},service=\"s\""),
                Some("s"),
                None,
            ),
            (format!("Bearer {r},service=\"no end"), Some("no end"), None),
        ] {
            assert_eq!(challenge(&[&text]), Some(bearer(realm, service, scope)), "{text}");
        }
        for text in [
            "Basic realm=/",
            "Basic",
            "Basic realm=Artifactory Realm",
            "BASIC realm=\"x\"",
            "Negotiate, Basic",
        ] {
            assert_eq!(challenge(&[text]), Some(Challenge::Basic), "{text}");
        }
        assert_eq!(challenge_of(&[b"Basic realm=\"R\xe9gistre\""]), Some(Challenge::Basic));
        let mixed = [format!("Bearer {r},service=\"").as_bytes(), b"\xe9\xff\",scope=\"z\""].concat();
        assert_eq!(challenge_of(&[&mixed]), Some(bearer(realm, Some("éÿ"), Some("z"))));
        assert_eq!(
            challenge(&["Bearer realm=\"/token?a=b\",service=s"]),
            Some(bearer("https://registry.example:5000/token?a=b", Some("s"), None))
        );
        // No place for credentials.
        for none in [
            "Bearer realm=\"ftp://x/y\"",
            "Bearer realm=\"file:///etc\"",
            "Bearer service=\"s\"",
        ] {
            assert_eq!(challenge(&[none]), None, "{none}");
        }
    }

    #[test]
    fn challenges_are_understood() {
        let bearer = r#"Bearer realm="https://auth.example/token",service="a, \"b\"",scope="repository:x/y:pull,push""#;
        let expected = Challenge::Bearer {
            realm: Url::parse("https://auth.example/token").unwrap(),
            service: Some("a, \"b\"".into()),
            scope: Some("repository:x/y:pull,push".into()),
        };
        assert_eq!(challenge(&[bearer]), Some(expected.clone()));
        assert_eq!(challenge(&["Basic realm=\"x\"", bearer]), Some(expected.clone()));
        assert_eq!(challenge(&[&format!("basic realm=x, {bearer}")]), Some(expected));
        assert_eq!(challenge(&["BASIC realm=\"x\""]), Some(Challenge::Basic));
        for none in [
            "",
            "Bearer",
            "Bearer realm=\"no url\"",
            "Negotiate abc",
            "\"",
            "Bearer realm=",
        ] {
            assert_eq!(challenge(&[none]), None, "{none}");
        }
    }

    #[test]
    fn tokens_are_used_for_most_of_their_life() {
        let now = SystemTime::now();
        let life = |json: &str| {
            let answer = TokenAnswer::parse(json.as_bytes()).unwrap();
            answer.token(now).map(|token| token.until.duration_since(now).unwrap())
        };
        assert_eq!(
            life(r#"{"token":"a","expires_in":2}"#),
            Some(Duration::from_millis(1800))
        );
        assert_eq!(
            life(r#"{"access_token":"a","expires_in":300}"#),
            Some(Duration::from_secs(290))
        );
        assert_eq!(life(r#"{"token":"a"}"#), Some(Duration::from_secs(54)));
        assert_eq!(life(r#"{"token":"a","expires_in":0}"#), Some(Duration::from_secs(54)));
        assert_eq!(
            life(r#"{"token":"a","expires_in":18446744073709551615}"#),
            LONGEST_LIFE.checked_sub(MARGIN)
        );
        assert_eq!(
            life(r#"{"token":"a","access_token":null,"expires_in":null,"refresh_token":null}"#),
            Some(Duration::from_secs(54))
        );
        for (said, seconds) in [
            ("\"300\"", 290),
            ("300.0", 290),
            ("3e2", 290),
            ("-1", 54),
            ("\"-1\"", 54),
            ("\"soon\"", 54),
            ("\"NaN\"", 54),
            ("[]", 54),
            ("1e300", LONGEST_LIFE.as_secs() - MARGIN.as_secs()),
        ] {
            let json = format!("\u{feff}{{\"token\":\" a\\n\",\"expires_in\":{said},\"issued_at\":7}}");
            assert_eq!(life(&json), Some(Duration::from_secs(seconds)), "{said}");
        }
        assert_eq!(life(r#"{"token":"a\nb"}"#), None);
        assert_eq!(life("{}"), None);
    }
}
