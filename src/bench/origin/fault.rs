//! What an origin can do wrong, on purpose.

use std::sync::Arc;
use std::time::Duration;

use super::Request;

/// One way to answer badly. Several may be given for one request, as far as they make sense together.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fault {
    /// The answer begins this much later.
    Delay(Duration),
    /// No answer ever: the connection stays open and silent until the client or the origin gives up.
    Silence,
    /// The connection is reset before the first byte of an answer.
    ResetBefore,
    /// The connection is reset after this many bytes of the body.
    ResetWithin(u64),
    /// This status instead of the content, with `Retry-After` in seconds if given.
    Status(u16, Option<u64>),
    /// A 206 whose `Content-Range` and body begin this many bytes behind what was asked.
    WrongRange(u64),
    /// A 206 that is consistent but ends this many bytes before what was asked.
    ShortRange(u64),
    /// The body ends this many bytes before its `Content-Length`, by an orderly close.
    ShortBody(u64),
    /// This many bytes more than `Content-Length` says, then a close.
    LongBody(u64),
    /// The answer is right, and says that the connection ends behind it.
    Close,
    /// One bit of the content's byte at this position is another than it should be; of blobs only, not of files.
    Damage(u64),
    /// A 200 with the whole content, whatever range was asked.
    WholeBody,
    /// The body at this many bytes per second.
    SlowBody(u64),
    /// Another entity tag than before, with the same bytes; an `If-Range` or `If-Match` of the old tag fails.
    ChangedTag,
    /// A 307 to this path, once.
    Redirect(String),
}

/// Decides for each request what goes wrong with it; nothing, if empty.
pub type FaultScript = Arc<dyn Fn(&Request) -> Vec<Fault> + Send + Sync>;

/// A script that picks from `menu` for `per_mille` out of a thousand requests. Which requests and which faults depends only
/// on `seed` and the request's number. An empty menu means no faults.
pub fn at_random(
    seed: u64,
    per_mille: u64,
    menu: Vec<Fault>,
) -> impl Fn(&Request) -> Vec<Fault> + Send + Sync + 'static {
    move |request| {
        let dice = mix(seed ^ mix(request.number));
        let len = u64::try_from(menu.len()).unwrap_or(u64::MAX);
        if len == 0 || dice % 1000 >= per_mille {
            return Vec::new();
        }
        let pick = usize::try_from((dice >> 32) % len).unwrap_or(0);
        vec![menu[pick].clone()]
    }
}

/// The finaliser of splitmix64: spreads small numbers over all 64 bits.
const fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
