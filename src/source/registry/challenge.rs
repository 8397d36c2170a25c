//! What a registry that refuses says about how to be let in (RFC 9110, section 11.6.1; the distribution project's token
//! specification), and what a token server answers.

use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, WWW_AUTHENTICATE};
use serde::{Deserialize, Serialize};
use url::Url;

use super::manifest::null_is_empty;
use crate::http::Secret;

/// How long a token lasts when its server does not say (the token specification).
const USUAL_LIFE: u64 = 60;
/// What is said to last longer is asked for anew after this.
const LONGEST_LIFE: u64 = 24 * 60 * 60;
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
    /// The best of what the headers offer: a token before a password, because it is good for less.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut basic = None;
        for value in headers.get_all(WWW_AUTHENTICATE) {
            let Ok(text) = value.to_str() else { continue };
            let Ok(challenges) = http_auth::parse_challenges(text) else {
                continue;
            };
            for challenge in challenges {
                if challenge.scheme.eq_ignore_ascii_case("basic") {
                    basic = Some(Self::Basic);
                } else if challenge.scheme.eq_ignore_ascii_case("bearer") {
                    let parameter = |name: &str| {
                        let found = challenge.params.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                        found
                            .map(|(_, value)| value.to_unescaped())
                            .filter(|value| !value.is_empty())
                    };
                    if let Some(realm) = parameter("realm").and_then(|realm| Url::parse(&realm).ok()) {
                        let (service, scope) = (parameter("service"), parameter("scope"));
                        return Some(Self::Bearer { realm, service, scope });
                    }
                }
            }
        }
        basic
    }
}

/// A token server's answer.
#[derive(Deserialize)]
pub(super) struct TokenAnswer {
    #[serde(default, deserialize_with = "null_is_empty")]
    token: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    access_token: String,
    /// Seconds.
    expires_in: Option<u64>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) refresh_token: String,
}

/// A token and until when to use it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Token {
    pub(super) secret: Secret,
    pub(super) until: SystemTime,
}

impl TokenAnswer {
    /// The token, counted from `asked` on: its server's clock may be wrong, its count of seconds is not.
    pub(super) fn token(self, asked: SystemTime) -> Option<Token> {
        let text = if self.token.is_empty() {
            self.access_token
        } else {
            self.token
        };
        if text.is_empty() || !text.bytes().all(|c| c.is_ascii_graphic()) {
            return None;
        }
        let life = self.expires_in.filter(|life| *life > 0).unwrap_or(USUAL_LIFE);
        let life = Duration::from_secs(life.min(LONGEST_LIFE));
        Some(Token {
            secret: Secret::new(text),
            until: asked + life.saturating_sub((life / 10).min(MARGIN)),
        })
    }
}

#[cfg(test)]
mod tests {
    use reqwest::header::HeaderValue;

    use super::*;

    fn challenge(values: &[&str]) -> Option<Challenge> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(WWW_AUTHENTICATE, HeaderValue::from_str(value).unwrap());
        }
        Challenge::of(&headers)
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
            let answer: TokenAnswer = serde_json::from_str(json).unwrap();
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
            Some(Duration::from_secs(LONGEST_LIFE - MARGIN.as_secs()))
        );
        assert_eq!(
            life(r#"{"token":"a","access_token":null,"expires_in":null,"refresh_token":null}"#),
            Some(Duration::from_secs(54))
        );
        assert_eq!(life(r#"{"token":"a\nb"}"#), None);
        assert_eq!(life("{}"), None);
    }
}
