//! What a Ruby script requires as it is loaded. In: its text. Out: the names behind `require`, `require_relative` and `load`, but not
//! those inside of methods, which may never be called, nor those that `autoload` promises.
//!
//! Methods are told by their indentation: one ends with the `end` that begins where its `def` does.

use super::{Named, after, lines, quoted};

pub(super) fn names(text: &[u8]) -> Vec<Named> {
    let mut names = Vec::new();
    // How far the method that a line is in was indented.
    let mut method = None;
    let mut is_comment = false;
    for (indent, line) in lines(text) {
        if line == b"__END__" {
            break;
        }
        if is_comment {
            is_comment = !line.starts_with(b"=end");
            continue;
        }
        if indent == 0 && line.starts_with(b"=begin") {
            is_comment = true;
            continue;
        }
        if let Some(begin) = method {
            if indent == begin && after(line, b"end").is_some() {
                method = None;
            }
            continue;
        }
        if let Some(rest) = after(line, b"def") {
            // `def a; b; end`, `def a = b`, `def a(b) = c`.
            let sign: &[u8] = if rest.contains(&b'(') { b") = " } else { b" = " };
            let ends = rest.ends_with(b"end") || rest.windows(sign.len()).any(|window| window == sign);
            method = (!ends).then_some(indent);
            continue;
        }
        let call =
            |word: &[u8]| after(line, word).map(|rest| rest.strip_prefix(b"(").unwrap_or(rest).trim_ascii_start());
        if let Some(name) = call(b"require").or_else(|| call(b"load")).and_then(quoted) {
            names.push(if name.starts_with(b"/") || name.starts_with(b".") {
                Named::Path(name.to_vec())
            } else {
                Named::Sought(name.to_vec())
            });
        } else if let Some(name) = call(b"require_relative").and_then(quoted) {
            names.push(Named::Path([b"./", name].concat()));
        }
    }
    names
}
