//! Images whose layers bring their own tables of contents (eStargz and zstd:chunked), mounted without anybody having indexed them:
//! the tree is what `umoci unpack` makes of them, no layer is read whole, and nothing that lies is served.

mod common;
mod registry;

use std::ffi::OsString;
use std::fs;
use std::path::Path;

use common::images::{compare, laboratory, none, nothing_left, refused};
use common::scratch;
use common::session::Session;
use common::unpacked::{self, umoci_unpack};
use registry::{Access, Registry};

/// The images of the laboratory that have such layers only, as far as they were made.
fn with_contents(images: &Path) -> Vec<(&'static str, &'static str)> {
    let all = [
        ("debian-python", "estargz"),
        ("debian-python", "zstdchunked"),
        ("npm", "estargz"),
        ("npm", "zstdchunked"),
        ("npm", "zstdchunked-skopeo"),
    ];
    let made = |(name, tag): &(&str, &str)| unpacked::tags_if_any(&images.join(name)).contains(&(*tag).to_owned());
    all.into_iter().filter(made).collect()
}

#[test]
fn layers_are_mounted_by_their_own_contents() {
    const NAME: &str = "layers_are_mounted_by_their_own_contents";
    let Some(images) = laboratory(NAME) else { return };
    let work = scratch("contents-");
    let mut complaints = Vec::new();
    for (name, tag) in with_contents(&images) {
        let image = format!("{name}:{tag}");
        let Some(registry) = Registry::with(NAME, Access::Anonymous, &images, &[&image]) else {
            return;
        };
        let expected = umoci_unpack(&images.join(name), tag, &work.path().join("unpacked"));
        let mut session = Session::new("loop");
        let source: OsString = registry.image(&image).into();
        // Who requires an index is content with these.
        let options = [registry.arguments(), vec!["--index".into(), "require".into()]].concat();
        session.mount_with(&source, &options);
        for digest in unpacked::layers(&images.join(name), tag) {
            let len = fs::metadata(unpacked::blob(&images.join(name), &digest)).unwrap().len();
            let sent = registry.sent(&digest);
            eprintln!("{image}: {sent} of {len} bytes until the mount was there");
            assert!(
                sent < len / 4 + (128 << 10),
                "{image}: {sent} of {len} bytes for a mount"
            );
        }
        session.umount();
        complaints.extend(compare(&mut session, &image, &source, &options, &expected));
        // Once more from what is kept: nothing of any layer is asked for again.
        let layers = unpacked::layers(&images.join(name), tag);
        let before: Vec<_> = layers.iter().map(|digest| registry.sent(digest)).collect();
        complaints.extend(compare(&mut session, &image, &source, &options, &expected));
        let again: Vec<_> = layers.iter().map(|digest| registry.sent(digest)).collect();
        eprintln!("{image}: {:?} bytes the first time, then {:?}", before, again);
        fs::remove_dir_all(work.path().join("unpacked")).unwrap();
        nothing_left(session);
    }
    none(&complaints);
}
