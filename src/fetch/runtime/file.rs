//! Files on the fetch thread's ring: reads and writes at a position, with buffers that the ring owns until they are done.

use std::io;

/// An open file. The descriptor is its own, and is closed with it.
pub(crate) enum File {
    Ring(tokio_uring::fs::File),
    #[cfg(feature = "unstable-internals")]
    Simulated(super::simulated::SlowFile),
}

impl From<std::fs::File> for File {
    fn from(file: std::fs::File) -> Self {
        #[cfg(feature = "unstable-internals")]
        if super::simulated::is_entered() {
            return Self::Simulated(file.into());
        }
        Self::Ring(tokio_uring::fs::File::from_std(file))
    }
}

impl File {
    /// Reads `len` bytes from byte `at` on.
    ///
    /// # Errors
    /// What the kernel says; [`io::ErrorKind::UnexpectedEof`] when the file ends before.
    pub(crate) async fn read_exact_at(&self, at: u64, len: usize) -> io::Result<Vec<u8>> {
        let file = match self {
            Self::Ring(file) => file,
            #[cfg(feature = "unstable-internals")]
            Self::Simulated(file) => return file.read_exact_at(at, len).await,
        };
        let (result, buffer) = file.read_exact_at(Vec::with_capacity(len), at).await;
        result?;
        if buffer.len() == len {
            Ok(buffer)
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    /// Writes `bytes` from byte `at` on.
    ///
    /// # Errors
    /// What the kernel says; then some of them may have been written.
    pub(crate) async fn write_all_at(&self, at: u64, bytes: Vec<u8>) -> io::Result<()> {
        match self {
            Self::Ring(file) => file.write_all_at(bytes, at).await.0,
            #[cfg(feature = "unstable-internals")]
            Self::Simulated(file) => file.write_all_at(at, &bytes).await,
        }
    }
}
