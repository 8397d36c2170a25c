//! A tar becomes the file of an ext4 filesystem: `cargo run --no-default-features --example tar_to_ext4 -- TAR IMAGE`.
//!
//! Only headers are read to lay the filesystem out; payload is read once, when it is copied. The image can be mounted by
//! `mount -t ext4 -o loop,ro,noload IMAGE DIR`, or looked at by debugfs.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use tarblk::{BlockImage as _, Ext4Image, Ext4Options, TreeBuilder, export, walk_headers};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args_os().skip(1);
    let (Some(tar), Some(image)) = (args.next(), args.next()) else {
        return Err("usage: tar_to_ext4 TAR IMAGE".into());
    };
    let tar = File::open(tar)?;

    let mut builder = TreeBuilder::new();
    let walked = walk_headers(&tar, tar.metadata()?.len(), &mut builder, &mut |_, _| ())?;
    let layout = Ext4Image::plan(builder.finish(), &Ext4Options::default())?;

    let file = File::create(image)?;
    let written = export(&layout, &file, &mut |_layer, at, out| tar.read_exact_at(out, at.0))?;
    println!(
        "{} bytes of the tar read for an image of {}, {written} of them not zero",
        walked.bytes_read,
        layout.len()
    );
    Ok(())
}
