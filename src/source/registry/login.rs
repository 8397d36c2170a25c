//! How to log in at a registry. In: the fields of an entry of docker's and containers' files, or of what comes with a pull by the CRI. Out: a
//! [`Login`]; neither `Debug` nor a message shows what is secret in it.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::lenient::null_is_empty;
use crate::http::Secret;

/// A user name that says: the secret is an identity token.
const IS_TOKEN: &str = "<token>";

/// How to log in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Login {
    /// Not at all.
    #[default]
    Anonymous,
    /// With a user's name and password.
    Password {
        /// The user.
        user: String,
        /// The password.
        password: Secret,
    },
    /// With a token that a token server exchanges for others.
    Identity(Secret),
    /// With a token that the registry itself takes.
    Bearer(Secret),
}

/// The parts of a login as docker's files and the CRI's `AuthConfig` have them; those that are empty are not there.
#[derive(Clone, Default, Deserialize)]
#[serde(default)]
pub struct LoginParts {
    /// `user:password` in base 64.
    #[serde(rename = "auth", deserialize_with = "null_is_empty")]
    pub pair: String,
    /// The user.
    #[serde(deserialize_with = "null_is_empty")]
    pub username: String,
    /// The password.
    #[serde(deserialize_with = "null_is_empty")]
    pub password: String,
    /// A token that a token server exchanges for others.
    #[serde(rename = "identitytoken", deserialize_with = "null_is_empty")]
    pub identity_token: String,
    /// A token that the registry itself takes.
    #[serde(rename = "registrytoken", deserialize_with = "null_is_empty")]
    pub registry_token: String,
}

impl fmt::Debug for LoginParts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LoginParts")
    }
}

impl Login {
    /// `user:password` as it was typed.
    ///
    /// # Errors
    /// When there is no user. The message does not quote what there is.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim_end_matches(['\r', '\n']);
        match text.split_once(':') {
            Some((user, password)) if !user.is_empty() => Ok(Self::password(user, password)),
            _ => Err("credentials are written user:password".to_owned()),
        }
    }

    /// What the parts mean together; none if they are all empty.
    ///
    /// # Errors
    /// What is wrong with them. The message does not quote them.
    pub fn of_parts(parts: &LoginParts) -> Result<Option<Self>, String> {
        let secret = |text: &String| Secret::new(text.clone());
        if !parts.registry_token.is_empty() {
            return Ok(Some(Self::Bearer(secret(&parts.registry_token))));
        }
        if !parts.identity_token.is_empty() {
            return Ok(Some(Self::Identity(secret(&parts.identity_token))));
        }
        if !parts.pair.is_empty() {
            let bytes = STANDARD
                .decode(parts.pair.trim())
                .map_err(|_| "auth is not base64".to_owned())?;
            let text = String::from_utf8(bytes).map_err(|_| "auth is not text".to_owned())?;
            return Self::parse(text.trim_end_matches('\0')).map(Some);
        }
        if parts.username.is_empty() {
            return Ok(None);
        }
        Ok(Some(Self::password(&parts.username, &parts.password)))
    }

    pub(super) fn password(user: &str, password: &str) -> Self {
        if user == IS_TOKEN {
            return Self::Identity(Secret::new(password.to_owned()));
        }
        Self::Password {
            user: user.to_owned(),
            password: Secret::new(password.to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_a_login() {
        let parts = LoginParts::default;
        let user = Login::password("a", "b");
        assert_eq!(Login::of_parts(&parts()).unwrap(), None);
        let pair = LoginParts {
            pair: "YTpi".into(),
            ..parts()
        };
        assert_eq!(Login::of_parts(&pair).unwrap(), Some(user.clone()));
        let both = LoginParts {
            username: "a".into(),
            password: "b".into(),
            ..parts()
        };
        assert_eq!(Login::of_parts(&both).unwrap(), Some(user));
        let token = LoginParts {
            identity_token: "t".into(),
            ..both
        };
        let expected = Login::Identity(Secret::new("t".into()));
        assert_eq!(Login::of_parts(&token).unwrap(), Some(expected));
        let bad = LoginParts {
            pair: "not base 64".into(),
            ..parts()
        };
        assert!(!Login::of_parts(&bad).unwrap_err().contains("not base 64"));
    }
}
