//! Names: how they lie in the text arena, and how a directory's are sorted.

use crate::units::to_usize;

/// A name in a finished tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dirent {
    /// Where its text starts: one byte of length, then the name.
    pub(super) text: u32,
    /// The node that it names.
    pub(super) node: u32,
}

/// The name whose length byte is at `at`.
pub(super) fn name(text: &[u8], at: u32) -> &[u8] {
    let at = to_usize(at);
    let len = usize::from(text[at]);
    &text[at + 1..=at + len]
}

/// From how many names on sorting by key pays.
const KEYED_FROM: usize = 48;

/// Sorts one directory's names bytewise. Names of a big directory mostly differ behind a common beginning, so there the
/// eight bytes behind it are sorted as numbers, and texts (each a cache miss) are compared only where these are equal.
pub(super) fn sort(dirents: &mut [Dirent], text: &[u8], keyed: &mut Vec<(u64, Dirent)>) {
    let by_name = |a: &Dirent, b: &Dirent| name(text, a.text).cmp(name(text, b.text));
    if dirents.len() < KEYED_FROM {
        dirents.sort_unstable_by(by_name);
        return;
    }
    let first = name(text, dirents[0].text);
    let common = dirents[1..].iter().fold(first.len(), |common, dirent| {
        let other = name(text, dirent.text);
        first[..common].iter().zip(other).take_while(|(a, b)| a == b).count()
    });
    keyed.clear();
    keyed.extend(
        dirents
            .iter()
            .map(|&dirent| (key(&name(text, dirent.text)[common..]), dirent)),
    );
    keyed.sort_unstable_by(|(key, a), (other, b)| key.cmp(other).then_with(|| by_name(a, b)));
    for (dirent, (_, sorted)) in dirents.iter_mut().zip(keyed) {
        *dirent = *sorted;
    }
}

/// The first eight bytes as a number that sorts like them; shorter names sort before longer ones or equal.
fn key(name: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let len = name.len().min(8);
    bytes[..len].copy_from_slice(&name[..len]);
    u64::from_be_bytes(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keyed_sort_is_the_plain_sort() {
        let mut names: Vec<Vec<u8>> = Vec::new();
        for i in 0..500_u32 {
            let n = i.wrapping_mul(2_654_435_761) % 1000;
            names.push(format!("common-{n}").into_bytes());
            names.push(format!("common-{n}-and-a-long-tail-{i}").into_bytes());
        }
        names.push(b"common-".to_vec());
        names.push(b"common-\0".to_vec());
        names.push(b"common-\xff".to_vec());
        let mut text = Vec::new();
        let mut dirents = Vec::new();
        for name in &names {
            dirents.push(Dirent {
                text: u32::try_from(text.len()).unwrap(),
                node: 0,
            });
            text.push(u8::try_from(name.len()).unwrap());
            text.extend_from_slice(name);
        }
        sort(&mut dirents, &text, &mut Vec::new());
        names.sort();
        let sorted: Vec<_> = dirents.iter().map(|dirent| name(&text, dirent.text).to_vec()).collect();
        assert_eq!(sorted, names);
    }
}
