//! Files that decide what is believed. In: a path. Out: its bytes, if nobody could have written them but root and this process's user.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use super::TrustError;

/// No file with keys or settings is longer, in bytes.
const LONGEST: u64 = 1 << 20;

/// Reads a file that decides what is believed.
///
/// # Errors
/// [`TrustError::Read`]; [`TrustError::Unsafe`] when another user could have written it.
pub(super) fn read_owned(path: &Path) -> Result<Vec<u8>, TrustError> {
    let failed = |cause| TrustError::Read {
        path: path.to_owned(),
        cause,
    };
    // A pipe would be waited for.
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits();
    let flags = i32::try_from(nonblocking).map_err(|_| failed(io::ErrorKind::InvalidInput.into()))?;
    let file: File = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(failed)?;
    // Asked of what was opened: its name may lead elsewhere a moment later.
    let meta = file.metadata().map_err(failed)?;
    if !meta.is_file() {
        return Err(failed(io::Error::other("it is not a regular file")));
    }
    check_owner(path, &meta)?;
    let mut bytes = Vec::new();
    file.take(LONGEST + 1).read_to_end(&mut bytes).map_err(failed)?;
    if u64::try_from(bytes.len()).is_ok_and(|len| len > LONGEST) {
        return Err(failed(io::Error::other("it is too long for what it should hold")));
    }
    Ok(bytes)
}

/// Whether nobody could have written it but root and this process's user.
///
/// # Errors
/// [`TrustError::Unsafe`].
pub(super) fn check_owner(path: &Path, meta: &Metadata) -> Result<(), TrustError> {
    let refused = |why: String| TrustError::Unsafe {
        path: path.to_owned(),
        why,
    };
    let own = rustix::process::geteuid().as_raw();
    if meta.uid() != 0 && meta.uid() != own {
        return Err(refused(format!("it belongs to user {}", meta.uid())));
    }
    if meta.mode() & 0o022 != 0 {
        return Err(refused(format!(
            "others can write to it (mode {:o})",
            meta.mode() & 0o7777
        )));
    }
    Ok(())
}
