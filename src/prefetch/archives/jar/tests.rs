use std::process::Command;

use proptest::prelude::*;

use super::*;

/// A zip file with these entries, each packed if that is said.
fn zip(entries: &[(&str, &[u8], bool)]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, content, packed) in entries {
        let at = u32::try_from(file.len()).unwrap();
        let mut room = vec![0; zlib_rs::compress_bound(content.len()) + 100];
        let config = zlib_rs::DeflateConfig {
            window_bits: -15,
            ..zlib_rs::DeflateConfig::default()
        };
        let (stored, method) = if *packed {
            let (stored, _) = zlib_rs::compress_slice(&mut room, content, config);
            (&*stored, 8_u16)
        } else {
            (*content, 0)
        };
        // From the version on to the extra field's length, which is the same beside the entry and in the directory.
        let mut common = vec![20, 0, 0, 0];
        common.extend(method.to_le_bytes());
        common.extend([0; 4]);
        common.extend(zlib_rs::crc32::crc32(0, content).to_le_bytes());
        common.extend(u32::try_from(stored.len()).unwrap().to_le_bytes());
        common.extend(u32::try_from(content.len()).unwrap().to_le_bytes());
        common.extend(u16::try_from(name.len()).unwrap().to_le_bytes());
        common.extend([0; 2]);
        directory.extend(b"PK\x01\x02\x14\0");
        directory.extend(&common);
        directory.extend([0; 10]);
        directory.extend(at.to_le_bytes());
        directory.extend(name.as_bytes());
        file.extend(b"PK\x03\x04");
        file.extend(&common);
        file.extend(name.as_bytes());
        file.extend(stored);
    }
    let (at, len) = (
        u32::try_from(file.len()).unwrap(),
        u32::try_from(directory.len()).unwrap(),
    );
    let count = u16::try_from(entries.len()).unwrap().to_le_bytes();
    file.extend(directory);
    file.extend(b"PK\x05\x06\0\0\0\0");
    file.extend(count);
    file.extend(count);
    file.extend(len.to_le_bytes());
    file.extend(at.to_le_bytes());
    file.extend([0; 2]);
    file
}

/// A class that uses these, as far as its constants go.
fn class(uses: &[&str]) -> Vec<u8> {
    let mut bytes = b"\xca\xfe\xba\xbe\0\0\0\x3d".to_vec();
    // A long, which counts twice, in front of them.
    bytes.extend(u16::try_from(3 + 2 * uses.len()).unwrap().to_be_bytes());
    bytes.extend([5, 0, 0, 0, 0, 0, 0, 0, 0]);
    for (number, name) in uses.iter().enumerate() {
        bytes.push(1);
        bytes.extend(u16::try_from(name.len()).unwrap().to_be_bytes());
        bytes.extend(name.as_bytes());
        bytes.push(7);
        bytes.extend(u16::try_from(3 + 2 * number).unwrap().to_be_bytes());
    }
    bytes.extend([0, 0x21, 0, 4]);
    bytes
}

/// Entries by name, with their contents, as they are found from the end.
fn read(file: &[u8]) -> Vec<(String, Option<Vec<u8>>)> {
    let end = end(file).unwrap();
    let from = len_usize(end.at - end.directory_len);
    let text = |name: &[u8]| String::from_utf8(name.to_vec()).unwrap();
    entries(&file[from..])
        .map(|entry| {
            let from = len_usize(entry.at);
            let until = file.len().min(from + len_usize(entry.len));
            (text(entry.name), content(&file[from..until]))
        })
        .collect()
}

#[test]
fn entries_are_found_from_the_end_and_unpacked() {
    let one = class(&["a/B", "[[Lc/D;", "[I"]);
    let file = zip(&[
        ("META-INF/MANIFEST.MF", b"Main-Class: a.B\n", true),
        ("a/B.class", &one, true),
        ("e", b"plain", false),
    ]);
    let found = read(&file);
    assert_eq!(found.len(), 3);
    assert_eq!(
        found[0],
        ("META-INF/MANIFEST.MF".to_owned(), Some(b"Main-Class: a.B\n".to_vec()))
    );
    assert_eq!(found[1], ("a/B.class".to_owned(), Some(one.clone())));
    // Nothing but the next entry tells where one ends that is stored as it is.
    assert!(found[2].1.as_ref().unwrap().starts_with(b"plain"));
    assert_eq!(classes(&one), [&b"a/B"[..], b"c/D", b""]);
    assert!(end(b"PK\x05\x06").is_none());
    assert!(end(&file[..file.len() - 1]).is_none(), "cut off");
    assert!(content(b"PK\x03\x04").is_none());
}

#[test]
fn manifests_are_parsed() {
    let text = b"Manifest-Version: 1.0\r\nClass-Path: a.jar lib/b-\r\n 1.jar  c.jar\r\nMain-Class: x.y.Z \r\nStart-Class: s.T\r\n\r\nName: q\r\n";
    let found = manifest(text);
    assert_eq!(found.main, [&b"x/y/Z"[..], b"s/T"]);
    assert_eq!(found.class_path, [&b"a.jar"[..], b"lib/b-1.jar", b"c.jar"]);
    assert_eq!(manifest(b""), Manifest::default());
}

/// What the machine's own Java tools say of an archive and of its classes is what is found in them.
#[test]
fn a_real_archive_is_read_as_java_does() {
    let dir = tempfile::tempdir().unwrap();
    let source = "package p; public class Main { static java.util.ArrayDeque<Other[]> d; public static void main(String[] a) { System.out.println(new Other()); } } class Other {}";
    std::fs::write(dir.path().join("Main.java"), source).unwrap();
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).current_dir(dir.path()).output();
        output.is_ok_and(|output| output.status.success())
    };
    if !run("javac", &["-d", "out", "Main.java"]) || !run("jar", &["cfe", "x.jar", "p.Main", "-C", "out", "."]) {
        eprintln!("SKIP: a_real_archive_is_read_as_java_does: no javac and jar");
        return;
    }
    let found = read(&std::fs::read(dir.path().join("x.jar")).unwrap());
    let content = |name: &str| {
        found
            .iter()
            .find(|(found, _)| found == name)
            .unwrap()
            .1
            .clone()
            .unwrap()
    };
    assert_eq!(manifest(&content("META-INF/MANIFEST.MF")).main, [b"p/Main"]);
    let main = content("p/Main.class");
    assert_eq!(main, std::fs::read(dir.path().join("out/p/Main.class")).unwrap());
    let used = classes(&main);
    for name in [&b"p/Main"[..], b"p/Other", b"java/lang/System", b"java/lang/Object"] {
        assert!(used.contains(&name), "{used:?}");
    }
}

proptest! {
    #[test]
    fn no_damaged_archive_does_harm(flips in proptest::collection::vec((0usize..2000, any::<u8>()), 0..20), cut in 0usize..2000) {
        let one = class(&["a/B", "[[Lc/D;"]);
        let mut file = zip(&[("META-INF/MANIFEST.MF", b"Main-Class: a.B\n", true), ("a/B.class", &one, true), ("e", b"plain", false)]);
        for (at, value) in flips {
            let at = at % file.len();
            file[at] = value;
        }
        file.truncate(cut.max(30));
        let _any = end(&file);
        for from in 0..file.len() {
            prop_assert!(entries(&file[from..]).count() <= file.len() / ENTRY_LEN);
            if let Some(content) = content(&file[from..]) {
                prop_assert!(content.len() <= MOST_UNPACKED);
            }
        }
    }

    #[test]
    fn no_class_and_no_manifest_does_harm(mut bytes in proptest::collection::vec(any::<u8>(), 0..2000), real: bool) {
        if real {
            bytes.splice(0..0, class(&["a/B", "c/D"]));
        }
        prop_assert!(classes(&bytes).len() <= bytes.len() / 3);
        prop_assert!(manifest(&bytes).class_path.len() <= bytes.len());
    }
}
