//! Which repositories a setting is for. In: a pattern as a person writes it. Out: whether a repository is meant.

use serde::Deserialize;

/// `host/repository`, without tag or digest; `*` stands for any characters, also for none and for slashes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct RepositoryPattern(String);

impl RepositoryPattern {
    /// The pattern in this text; every text is one.
    #[must_use]
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Whether this repository is meant: its name with the host, as [`Reference::repository_name`](super::Reference::repository_name)
    /// has it.
    #[must_use]
    pub fn fits(&self, repository: &str) -> bool {
        fits(self.0.as_bytes(), repository.as_bytes())
    }
}

/// Whether a name fits a pattern in which `*` stands for any characters.
fn fits(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at, mut reached) = (0, 0);
    // Where to go on if what follows the last star does not fit: it takes one character more.
    let mut star = None;
    while reached < name.len() {
        match pattern.get(at) {
            Some(b'*') => {
                at += 1;
                star = Some((at, reached));
            }
            Some(letter) if *letter == name[reached] => (at, reached) = (at + 1, reached + 1),
            _ => match star {
                Some((behind, taken)) => {
                    star = Some((behind, taken + 1));
                    (at, reached) = (behind, taken + 1);
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|letter| *letter == b'*')
}

#[cfg(test)]
mod tests {
    use super::super::Reference;
    use super::*;

    #[test]
    fn patterns_have_stars() {
        for (pattern, name, expected) in [
            ("a", "a", true),
            ("a", "ab", false),
            ("*", "", true),
            ("*", "a/b", true),
            ("a*b*c", "abbbc", true),
            ("a*b*c", "abbbcd", false),
            ("*b", "aab", true),
            ("a**", "a", true),
            ("", "a", false),
        ] {
            assert_eq!(fits(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn repositories_are_meant_by_host_and_path_alone() {
        let name = |image: &str| Reference::parse(image).unwrap().repository_name();
        let fits = |pattern: &str, image: &str| RepositoryPattern::new(pattern).fits(&name(image));
        assert!(fits("docker.io/*", "debian:12"));
        assert!(fits("localhost:5000/team/app", "localhost:5000/team/app:1"));
        assert!(!fits("localhost:5000/team/app", "localhost:5000/team/app2"));
        assert!(!fits("registry.example.org/*", "registry.example.org.evil.example/x"));
        assert!(!fits("*:1", "localhost/team/app:1"));
    }
}
