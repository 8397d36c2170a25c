//! What registries and token servers answer: bodies that are not longer than they may be, and reasons for a refusal.

use reqwest::{Response, StatusCode};
use serde::Deserialize;
use url::Url;

use crate::excerpt;
use crate::http::{self, HttpOptions};
use crate::source::error::SourceError;

/// No token server's or error's answer is longer.
pub(super) const LONGEST_ANSWER: u64 = 256 << 10;

/// Reads a whole body that is not longer than `most`.
pub(super) async fn body(
    url: &Url,
    response: Response,
    most: u64,
    options: &HttpOptions,
) -> Result<Vec<u8>, SourceError> {
    Ok(http::receive(url, response, most, options.timeouts.stall).await?)
}

/// What a registry or token server says went wrong (distribution specification, "Error Codes"; RFC 6749, section 5.2).
pub(super) async fn explanation(response: Response, options: &HttpOptions) -> Option<String> {
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
    let bytes = body(&url, response, LONGEST_ANSWER, options).await.ok()?;
    let said: Said = serde_json::from_slice(&bytes).ok()?;
    let text = match said.errors.into_iter().next() {
        Some(error) if error.message.is_empty() => error.code,
        Some(error) => format!("{} ({})", error.message, error.code),
        None if said.error_description.is_empty() => said.details,
        None => said.error_description,
    };
    Some(excerpt::of_text(&text)).filter(|text| !text.is_empty())
}

/// What to do when a registry does not have what a person named: it may also be hidden from who has not logged in.
pub(super) const NAME_ABSENT: &str = "; check the name and the tag, and whether it is shown only to who has logged in";

/// What to do when a registry does not have a blob that the manifest it sent names.
pub(super) const BLOB_ABSENT: &str = "; its image is not complete there: push it again";

/// What an answer means that brings nothing. `absent` is what to do when it says that there is no such thing (404, 410), with its
/// separator in front.
pub(super) async fn refusal(url: &Url, response: Response, options: &HttpOptions, absent: &'static str) -> SourceError {
    let status = response.status();
    let wish = http::retry_after(response.headers());
    let said = explanation(response, options).await;
    let failure = http::Error::status(url, status, said.as_deref(), wish);
    match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => failure.advising(absent).into(),
        _ => failure.into(),
    }
}
