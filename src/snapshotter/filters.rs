//! Which snapshots a client means. In: filters as containerd writes them. Out: whether a snapshot fits.
//!
//! `name==x,labels."a.b"!="c d"`: of each filter all conditions hold, and of several filters one. Fields are `name`, `parent`,
//! `kind` and `labels.KEY`; a part of a path or a value stands in quotes where it holds other than letters, digits, `-`, `_` and,
//! in values, what is no comma. A field alone asks whether it is there. (containerd's package `filters`; its regular expressions
//! (`~=`) are not understood, and no client sends any to a snapshotter.)

use super::messages::{Info, Kind};

/// Conditions, of which all hold.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Filter(Vec<Condition>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Condition {
    path: Vec<String>,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    Present,
    Equal(String),
    Different(String),
}

/// Filters, of which one is enough; all snapshots fit if there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Filters(Vec<Filter>);

impl Filters {
    /// Understands filters.
    ///
    /// # Errors
    /// What is not understood, for the client.
    pub(super) fn parse(texts: &[String]) -> Result<Self, String> {
        let one = |text: &String| {
            let mut reader = Reader { rest: text.trim() };
            let mut conditions = Vec::new();
            // An empty filter fits everything.
            while !reader.rest.is_empty() {
                conditions.push(
                    reader
                        .condition()
                        .map_err(|why| format!("filter {text:?} is not understood: {why}"))?,
                );
            }
            Ok(Filter(conditions))
        };
        texts.iter().map(one).collect::<Result<_, _>>().map(Self)
    }

    /// Whether a snapshot is meant.
    #[must_use]
    pub(super) fn fit(&self, info: &Info) -> bool {
        let holds = |condition: &Condition| {
            let value = field(info, &condition.path);
            match &condition.test {
                Test::Present => value.is_some(),
                Test::Equal(wanted) => value == Some(wanted.as_str()),
                // Also of what is not there, as containerd has it.
                Test::Different(unwanted) => value.unwrap_or_default() != unwanted,
            }
        };
        self.0.is_empty() || self.0.iter().any(|filter| filter.0.iter().all(holds))
    }
}

fn field<'a>(info: &'a Info, path: &[String]) -> Option<&'a str> {
    match path {
        [only] if only == "name" => Some(&info.name),
        // Always there: a lowest layer is looked for by `parent==""`.
        [only] if only == "parent" => Some(&info.parent),
        [only] if only == "kind" => match info.kind() {
            Kind::Unknown => None,
            Kind::View => Some("view"),
            Kind::Active => Some("active"),
            Kind::Committed => Some("committed"),
        },
        // A label's key that was not quoted fell into parts.
        [first, key @ ..] if first == "labels" => info.labels.get(&key.join(".")).map(String::as_str),
        _ => None,
    }
}

struct Reader<'a> {
    rest: &'a str,
}

impl Reader<'_> {
    /// A condition and the comma behind it.
    fn condition(&mut self) -> Result<Condition, String> {
        let mut path = vec![self.part()?];
        while self.takes(".") {
            path.push(self.part()?);
        }
        let test = if self.takes("==") {
            Test::Equal(self.value()?)
        } else if self.takes("!=") {
            Test::Different(self.value()?)
        } else if self.rest.starts_with("~=") {
            return Err("there are no regular expressions here".to_owned());
        } else {
            Test::Present
        };
        if !self.takes(",") && !self.rest.is_empty() {
            return Err(format!("{:?} is too much", self.rest));
        }
        Ok(Condition { path, test })
    }

    fn takes(&mut self, what: &str) -> bool {
        match self.rest.strip_prefix(what) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// Takes as long as characters are of a kind.
    fn while_of(&mut self, kind: impl Fn(char) -> bool) -> String {
        let end = self.rest.find(|c| !kind(c)).unwrap_or(self.rest.len());
        let (taken, rest) = self.rest.split_at(end);
        self.rest = rest;
        taken.to_owned()
    }

    fn part(&mut self) -> Result<String, String> {
        if self.rest.starts_with('"') {
            return self.quoted();
        }
        let part = self.while_of(|c| c.is_alphanumeric() || matches!(c, '_' | '-' | '/'));
        if part.is_empty() {
            return Err("a field's name is missing".to_owned());
        }
        Ok(part)
    }

    fn value(&mut self) -> Result<String, String> {
        if self.rest.starts_with('"') {
            return self.quoted();
        }
        Ok(self.while_of(|c| c != ',' && !c.is_whitespace()))
    }

    /// A string as Go quotes it.
    fn quoted(&mut self) -> Result<String, String> {
        let mut text = String::new();
        let mut letters = self.rest.char_indices().skip(1);
        loop {
            let open = || "a quote is not closed".to_owned();
            match letters.next().ok_or_else(open)? {
                (at, '"') => {
                    self.rest = &self.rest[at + 1..];
                    return Ok(text);
                }
                (_, '\\') => match letters.next().ok_or_else(open)?.1 {
                    letter @ ('\\' | '"' | '\'') => text.push(letter),
                    'n' => text.push('\n'),
                    't' => text.push('\t'),
                    other => return Err(format!("\\{other} is not understood")),
                },
                (_, letter) => text.push(letter),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info() -> Info {
        Info {
            name: "sha256:ab".to_owned(),
            kind: Kind::Committed.into(),
            labels: [
                ("containerd.io/snapshot.ref", "sha256:ab"),
                ("plain", "a b"),
                ("x.y", "z"),
            ]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
            ..Info::default()
        }
    }

    fn fits(filters: &[&str]) -> Result<bool, String> {
        let texts: Vec<_> = filters.iter().map(|text| (*text).to_owned()).collect();
        Ok(Filters::parse(&texts)?.fit(&info()))
    }

    #[test]
    fn filters_are_containerds() {
        for yes in [
            &[][..],
            &[""],
            &["name==sha256:ab"],
            &["name==other", "kind==committed"],
            &["labels.\"containerd.io/snapshot.ref\"==sha256:ab,parent!=\"x\""],
            &["labels.\"containerd.io/snapshot.ref\"==\"sha256:ab\",parent==\"\""],
            &["labels.plain==\"a b\""],
            &["labels.x.y==z"],
            &["labels.\"x.y\""],
            &["labels.none!=x"],
        ] {
            assert_eq!(fits(yes), Ok(true), "{yes:?}");
        }
        for no in [
            "name==sha256:abc",
            "labels.none",
            "parent==\"x\"",
            "kind==active",
            "size==1",
            "labels.plain==a",
            "name==sha256:ab,labels.plain==x",
        ] {
            assert_eq!(fits(&[no]), Ok(false), "{no}");
        }
        for bad in [
            "name~=x",
            "==x",
            "name==\"x",
            "name==x y",
            "labels.\"a\\q\"==x",
            "name,,kind",
        ] {
            assert!(fits(&[bad]).is_err(), "{bad}");
        }
    }
}
