//! Files that the kernel keeps from being changed and compares with one digest (fs-verity), where the filesystem has that. In: an open
//! file that nobody writes to. Out: whether it is protected now, and by what digest. Never asks for anything but that: what the digest stands
//! for, and whether to believe it, is the caller's.
//!
//! Source: Documentation/filesystems/fsverity.rst of the kernel. The digest is a SHA-256 over a tree of SHA-256 of blocks of 4 KiB, without
//! salt; every page is compared with the tree when it is read from the disk, and a read of one that differs fails.

use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};

/// `FS_VERITY_HASH_ALG_SHA256`.
const SHA256: u16 = 1;
/// Bytes of the blocks that are digested one by one.
const BLOCK: u32 = 4096;

/// `struct fsverity_enable_arg`, for a file without salt and signature.
#[derive(Default)]
#[repr(C)]
struct Enable {
    version: u32,
    hash_algorithm: u32,
    block_size: u32,
    salt_size: u32,
    salt: u64,
    signature_size: u32,
    reserved: u32,
    signature: u64,
    also_reserved: [u64; 11],
}

/// `struct fsverity_digest` with room for a SHA-256.
#[repr(C)]
struct Measured {
    algorithm: u16,
    size: u16,
    digest: [u8; 32],
}

const ENABLE: Opcode = opcode::write::<Enable>(b'f', 133);
/// The kernel's structure ends where the digest begins.
const MEASURE: Opcode = opcode::read_write::<[u16; 2]>(b'f', 134);

/// Makes `file`, which is open for reading alone, what it is for ever: no one can write to it any more, only remove it. Reads all of it.
///
/// # Errors
/// What the kernel says: that it cannot ([`is_unsupported`]), or that somebody has it open for writing (`ETXTBSY`).
pub(super) fn protect(file: impl AsFd) -> io::Result<()> {
    let how = Enable {
        version: 1,
        hash_algorithm: SHA256.into(),
        block_size: BLOCK,
        ..Enable::default()
    };
    // SAFETY: the request reads one `fsverity_enable_arg`, which `Enable` is, and no memory that this points to: all lengths are 0.
    #[allow(unsafe_code)]
    let done = unsafe { ioctl(file, Setter::<ENABLE, Enable>::new(how)) };
    Ok(done?)
}

/// The digest that the kernel compares `file` with; none if it is not protected, or by another kind of digest.
///
/// # Errors
/// What the kernel says; that it cannot tell ([`is_unsupported`]).
pub(super) fn measure(file: impl AsFd) -> io::Result<Option<[u8; 32]>> {
    let mut measured = Measured {
        algorithm: 0,
        size: 32,
        digest: [0; 32],
    };
    // SAFETY: the request reads and writes one `fsverity_digest` with as many bytes behind it as `size` says, which `Measured` is.
    #[allow(unsafe_code)]
    let done = unsafe { ioctl(file, Updater::<MEASURE, Measured>::new(&mut measured)) };
    match done {
        Ok(()) => Ok((measured.algorithm == SHA256 && measured.size == 32).then_some(measured.digest)),
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OVERFLOW) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether an error says that the filesystem, or the kernel, has no such thing.
pub(super) fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOTTY))
}

/// A directory on a filesystem that protects files, and the file that this filesystem lies in; none where there is no such thing, which is
/// said. `tools/test guest` runs the tests that ask for it where there is.
#[cfg(test)]
pub(crate) fn test_dir() -> Option<(tempfile::TempDir, std::path::PathBuf)> {
    let Some(dir) = std::env::var_os("TARBLK_TEST_VERITY_DIR") else {
        eprintln!("SKIP: fs-verity: TARBLK_TEST_VERITY_DIR names no directory");
        return None;
    };
    let image = std::path::Path::new(&dir).with_extension("img");
    Some((tempfile::tempdir_in(dir).unwrap(), image))
}
