//! What the JSON reader makes of texts that no maker of layers writes.

use super::*;

fn entries(json: &str) -> Result<Vec<Entry>, String> {
    let mut all = Vec::new();
    let mut sink = |found: TocItem<'_>| {
        if let TocItem::Entry(entry) = found {
            all.push(entry.clone());
        }
        Ok(())
    };
    walk(json.as_bytes(), None, &mut sink).map_err(|error| error.to_string())?;
    Ok(all)
}

#[test]
fn times_are_read() {
    let time = |text| rfc3339(text).map(|time| (time.secs, time.nanos));
    assert_eq!(time(""), Some((0, 0)));
    assert_eq!(time("1970-01-01T00:00:00Z"), Some((0, 0)));
    assert_eq!(time("2000-02-29T23:59:59.5Z"), Some((951_868_799, 500_000_000)));
    assert_eq!(
        time("2000-03-01T00:00:00.123456789123Z"),
        Some((951_868_800, 123_456_789))
    );
    assert_eq!(time("1969-12-31T23:59:58.75Z"), Some((-2, 750_000_000)));
    assert_eq!(time("2024-01-01T01:30:00+01:30"), Some((1_704_067_200, 0)));
    assert_eq!(time("2023-12-31T22:30:00-01:30"), Some((1_704_067_200, 0)));
    assert_eq!(time("0001-01-01T00:00:00Z"), Some((-62_135_596_800, 0)));
    assert_eq!(time("9999-12-31T23:59:59Z"), Some((253_402_300_799, 0)));
    for wrong in [
        "2024",
        "2024-13-01T00:00:00Z",
        "2024-01-01T00:00:00",
        "2024-01-01T00:00:00.Z",
        "2024-01-01T00:00:00+1",
        "2024-01-01T24:00:00Z",
        "+024-01-01T00:00:00Z",
        "2024-01-01T00:00:00Zjunk",
        "2024-01-01T00:00:00é",
        "é024-01-01T00:00:00Z",
    ] {
        assert_eq!(time(wrong), None, "{wrong}");
    }
}

#[test]
fn digests_are_read() {
    assert_eq!(sha256(&format!("sha256:{}", "0f".repeat(32))), Some([15; 32]));
    for wrong in [
        "",
        "sha256:",
        "sha512:00",
        &format!("sha256:{}", "0".repeat(63)),
        &format!("sha256:{}", "g".repeat(64)),
    ] {
        assert_eq!(sha256(wrong), None);
    }
}

#[test]
fn depth_does_not_cost_stack() {
    let deep = format!(
        r#"{{"x":{}{},"version":1,"entries":[]}}"#,
        "[".repeat(1 << 20),
        "]".repeat(1 << 20)
    );
    assert_eq!(entries(&deep), Ok(Vec::new()));
    assert!(entries(&"[".repeat(1 << 20)).is_err());
    let deep = format!(
        r#"{{"entries":[{{"type":"dir","name":{}}}]}}"#,
        "{\"a\":".repeat(1 << 18)
    );
    assert!(entries(&deep).is_err());
}

#[test]
fn odd_documents() {
    assert_eq!(entries(r#"{"version":1,"entries":null}"#), Ok(Vec::new()));
    assert!(entries("").is_err());
    assert!(
        entries(r#"{"version":2,"entries":[]}"#)
            .unwrap_err()
            .contains("version 2")
    );
    assert!(
        entries(r#"{"entries":[],"entries":[]}"#)
            .unwrap_err()
            .contains("two lists")
    );
    assert!(entries(r#"{"entries":[]} x"#).is_err());
    let xattrs = (0..5000)
        .map(|n| format!(r#""user.{n}":"""#))
        .collect::<Vec<_>>()
        .join(",");
    assert!(
        entries(&format!(r#"{{"entries":[{{"type":"dir","xattrs":{{{xattrs}}}}}]}}"#))
            .unwrap_err()
            .contains("too many")
    );
}

#[test]
fn entries_become_what_a_tar_has() {
    let found = entries(
        r#"{"version":1,"entries":[
            {"name":"","type":"dir","mode":493},
            {"name":"d\u00e9\u0022","type":"dir","mode":17901,"uid":1,"gid":4294967295,"xattrs":{"user.b":"YQ==","user.a":"","user.b":"Yg"}},
            {"name":"f","type":"reg","size":700,"offset":10},
            {"name":"z","type":"reg","size":700,"chunkType":"zeros"},
            {"name":"g","type":"reg","size":1,"offset":20},
            {"name":"null","type":"char","devMajor":1,"devMinor":3,"size":5,"linkName":"x"}]}"#,
    )
    .unwrap();
    assert_eq!(found[0].path, b"./");
    assert_eq!(
        (found[1].path.as_slice(), found[1].mode, found[1].gid),
        ("dé\"".as_bytes(), 0o2755, 4_294_967_295)
    );
    let attributes: Vec<_> = found[1]
        .xattrs
        .iter()
        .map(|x| (x.name.as_slice(), x.value.as_slice()))
        .collect();
    assert_eq!(attributes, [(&b"user.a"[..], &b""[..]), (b"user.b", b"b")]);
    assert_eq!(found[2].segments[0].tar_offset, TarOffset(0));
    assert_eq!((found[3].size, found[3].segments.len()), (700, 0));
    assert_eq!(found[4].segments[0].tar_offset, TarOffset(1024));
    assert_eq!(
        (found[5].kind, found[5].device_minor, found[5].size, found[5].link.len()),
        (Kind::CharDevice, 3, 0, 0)
    );
}
