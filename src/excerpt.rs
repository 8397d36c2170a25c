//! What strangers wrote, as part of a message of ours. In: names from layers, headers and bodies of servers, annotations, values of
//! documents. Out: at most a line of it, in which nothing moves the cursor, colours the screen or turns the direction of writing.
//!
//! A ground room: it imports no other.

/// How much is shown of either end of a name or a value, in characters.
const NAME: usize = 100;
/// The same for a sentence of ours that has such parts.
#[cfg(feature = "command")]
const SENTENCE: usize = 250;
/// The same for a whole message, whatever its parts are.
#[cfg(feature = "command")]
const LINE: usize = 1000;

/// Bytes that should be text, as part of a one-line message: what is not printable escaped, the middle of long ones left out.
pub(crate) fn of_bytes(bytes: &[u8]) -> String {
    // Only the ends are looked at, with room for characters of several bytes, of which the first may be cut.
    const LOOKED_AT: usize = 4 * (NAME + 1);
    if bytes.len() <= 2 * LOOKED_AT {
        return of_text(&String::from_utf8_lossy(bytes));
    }
    let (first, last) = (&bytes[..LOOKED_AT], &bytes[bytes.len() - LOOKED_AT..]);
    let both = format!("{}{}", String::from_utf8_lossy(first), String::from_utf8_lossy(last));
    cut(&both, NAME)
}

/// Text, as part of a one-line message: what is not printable escaped, the middle of long ones left out.
pub(crate) fn of_text(text: &str) -> String {
    cut(text, NAME)
}

/// A sentence that has strangers' text in it, of which only the worst is left out.
#[cfg(feature = "command")]
pub(crate) fn of_sentence(text: &str) -> String {
    cut(text, SENTENCE)
}

/// A whole message: what was not cut where it was put together is cut here.
#[cfg(feature = "command")]
pub(crate) fn of_line(text: &str) -> String {
    cut(text, LINE)
}

/// Text as HTML, which it is not taken for.
#[cfg(feature = "command")]
pub(crate) fn escaped_html(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
        .replace('\'', "&#39;")
}

/// `half` characters of either end of what is longer than both.
fn cut(text: &str, half: usize) -> String {
    let mut shown = String::new();
    let long = text.char_indices().nth(2 * half).is_some();
    if long {
        text.chars()
            .take(half)
            .for_each(|character| push(&mut shown, character));
        shown.push('…');
        let from = text.char_indices().rev().nth(half - 1).map_or(0, |(at, _)| at);
        text[from..].chars().for_each(|character| push(&mut shown, character));
    } else {
        text.chars().for_each(|character| push(&mut shown, character));
    }
    shown
}

fn push(shown: &mut String, character: char) {
    if is_printable(character) {
        shown.push(character);
    } else {
        shown.extend(character.escape_default());
    }
}

/// Whether a character may stand in a message as it is.
pub(crate) fn is_printable(character: char) -> bool {
    !character.is_control() && !is_invisible(character)
}

/// What makes text look like another: separators of lines, marks that turn the direction of writing, and what has no width.
fn is_invisible(character: char) -> bool {
    matches!(
        character,
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{061c}' | '\u{00ad}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_moves_the_cursor_and_nothing_is_long() {
        assert_eq!(of_text("a name, ünïcode 日本"), "a name, ünïcode 日本");
        assert_eq!(of_text("\u{1b}[31mred\r\n"), "\\u{1b}[31mred\\r\\n");
        assert_eq!(of_text("a\u{202e}gpj.exe"), "a\\u{202e}gpj.exe");
        assert_eq!(of_bytes(b"\xff\x1b"), "\u{fffd}\\u{1b}");
        let (fits, long) = ("é".repeat(200), "é".repeat(201));
        assert_eq!(of_text(&fits), fits);
        assert_eq!(of_text(&long), format!("{0}…{0}", "é".repeat(100)));
        let bytes = ["a".repeat(1 << 20), "z".repeat(1 << 20)].concat();
        let expected = format!("{}…{}", "a".repeat(100), "z".repeat(100));
        assert_eq!(of_bytes(bytes.as_bytes()), expected);
        assert_eq!(of_text(&bytes), expected);
        // The end may begin in the middle of a character.
        assert!(of_bytes("日".repeat(10_000).as_bytes()).chars().count() <= 2 * NAME + 1);
        assert_eq!(of_text(""), "");
    }
}
