//! What registries and token servers answer: bodies that are not longer than they may be, and reasons for a refusal.

use std::time::Duration;

use reqwest::header::RETRY_AFTER;
use reqwest::{Response, StatusCode};
use serde::Deserialize;
use url::Url;

use crate::source::http::{Failure, Patience, classify};
use crate::source::{SourceError, shown_url};

/// No token server's or error's answer is longer.
pub(super) const LONGEST_ANSWER: u64 = 256 << 10;

/// Reads a whole body that is not longer than `most`.
pub(super) async fn body(
    url: &Url,
    mut response: Response,
    most: u64,
    patience: &Patience,
) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    let too_long = || Failure::wrong(url, format!("more than {most} bytes"));
    if response.content_length().is_some_and(|len| len > most) {
        return Err(too_long());
    }
    loop {
        let piece = tokio::time::timeout(patience.stall, response.chunk()).await;
        let piece = piece.map_err(|_| Failure::passing(url, "the server stopped sending"))?;
        match piece.map_err(|error| classify(url, &error))? {
            Some(piece) => bytes.extend_from_slice(&piece),
            None => return Ok(bytes),
        }
        if u64::try_from(bytes.len()).is_ok_and(|len| len > most) {
            return Err(too_long());
        }
    }
}

/// What a registry or token server says went wrong (distribution specification, "Error Codes"; RFC 6749, section 5.2).
pub(super) async fn explanation(response: Response, patience: &Patience) -> Option<String> {
    #[derive(Deserialize)]
    struct Said {
        #[serde(default)]
        errors: Vec<Error>,
        #[serde(default)]
        details: String,
        #[serde(default)]
        error_description: String,
    }
    #[derive(Deserialize)]
    struct Error {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let url = response.url().clone();
    let bytes = body(&url, response, LONGEST_ANSWER, patience).await.ok()?;
    let said: Said = serde_json::from_slice(&bytes).ok()?;
    let text = match said.errors.into_iter().next() {
        Some(error) if error.message.is_empty() => error.code,
        Some(error) => format!("{} ({})", error.message, error.code),
        None if said.error_description.is_empty() => said.details,
        None => said.error_description,
    };
    // A stranger's text, in one line of ours.
    let text: String = text.chars().filter(|c| !c.is_control()).take(200).collect();
    Some(text).filter(|text| !text.is_empty())
}

/// What an answer means that brings nothing.
pub(super) async fn refusal(url: &Url, response: Response, patience: &Patience) -> Failure {
    let status = response.status();
    let retry_after = response
        .headers()
        .get(RETRY_AFTER)
        .and_then(|value| value.to_str().ok()?.trim().parse().ok());
    let passing = status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED
        || matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT | StatusCode::TOO_EARLY
        );
    let said = explanation(response, patience).await;
    let said = said.map_or_else(|| status.to_string(), |said| format!("{status}: {said}"));
    if passing {
        return Failure::passing(url, format!("the server says {said}")).after(retry_after.map(Duration::from_secs));
    }
    let advice = match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => "; check the name and the tag",
        _ => "",
    };
    Failure::lasting(SourceError::Status {
        url: shown_url(url),
        status: said,
        advice,
    })
}
