//! What strangers and files say to the registry client, for fuzzing and tests. Each function hands back what would be printed.

use std::path::Path;
use std::time::{Duration, SystemTime};

use reqwest::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use url::Url;

use super::challenge::{Challenge, TokenAnswer};
use super::choice::Wanted;
use super::credentials;
use super::hosts;
use super::login::Login;
use super::manifest::{ImageConfig, Manifest};
use crate::digest::{Algorithm, Digest};

/// A challenge of a registry at `https://registry.example:5000`: the token server, or an empty text for a password; none where
/// nothing makes sense.
#[must_use]
pub fn challenge(value: &[u8]) -> Option<String> {
    let mut headers = HeaderMap::new();
    headers.append(WWW_AUTHENTICATE, HeaderValue::from_bytes(value).ok()?);
    let url = Url::parse("https://registry.example:5000/v2/x/y/manifests/t").ok()?;
    Some(match Challenge::of(&headers, &url)? {
        Challenge::Basic => String::new(),
        Challenge::Bearer { realm, .. } => realm.into(),
    })
}

/// A token server's answer: the token, how it is shown, and for how long it is used.
#[must_use]
pub fn token(answer: &[u8]) -> Option<(String, String, Duration)> {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
    let token = TokenAnswer::parse(answer)?.token(now)?;
    let life = token.until.duration_since(now).ok()?;
    Some((token.secret.reveal().to_owned(), format!("{token:?}"), life))
}

/// A credentials file, asked for `host` and `repository`: how the login is shown, with its secret; or what is wrong. A file that
/// names helpers is only read: nothing is run.
///
/// # Errors
/// The message.
pub fn login(file: &[u8], host: &str, repository: &str) -> Result<Option<(String, String)>, String> {
    let login = credentials::login_of_file(file, host, repository)?;
    Ok(login.map(|login| {
        let secret = match &login {
            Login::Anonymous => String::new(),
            Login::Password { password, .. } => password.reveal().to_owned(),
            Login::Identity(token) | Login::Bearer(token) => token.reveal().to_owned(),
        };
        (format!("{login:?}"), secret)
    }))
}

/// A `hosts.toml` for `registry.example`: its endpoints as they are shown, and as they would be without their headers.
///
/// # Errors
/// The message.
pub fn hosts(text: &str) -> Result<Vec<(String, String)>, String> {
    let endpoints = hosts::of_text(text, "registry.example", Path::new("/nowhere"))?;
    let shown = endpoints.into_iter().map(|mut endpoint| {
        let with_headers = format!("{endpoint:?}");
        endpoint.headers.clear();
        (with_headers, format!("{endpoint:?}"))
    });
    Ok(shown.collect())
}

/// A manifest or an index: what each of its layers or manifests would be called in a message.
///
/// # Errors
/// The message.
pub fn manifest(json: &[u8], media_type: &str) -> Result<Vec<String>, String> {
    match Manifest::parse(json, media_type)? {
        Manifest::Image { layers, .. } => Ok(layers.iter().filter_map(super::Descriptor::foreign).collect()),
        Manifest::Index(manifests) => match Wanted::of(None).choose(&manifests) {
            Ok(chosen) => Ok(vec![chosen.digest.to_string()]),
            Err(why) => Err(why),
        },
    }
}

/// A configuration of an image of `layers` layers: the platform, and how it is shown.
///
/// # Errors
/// The message.
pub fn config(json: &[u8], layers: usize) -> Result<String, String> {
    let digest = Digest::of(Algorithm::Sha256, json);
    let config = ImageConfig::parse(json.to_vec(), digest, layers)?;
    Ok(format!("{config:?}"))
}
