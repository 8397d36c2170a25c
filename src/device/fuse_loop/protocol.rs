//! The part of the FUSE protocol that one read-only file needs. In: a request as `/dev/fuse` gives it. Out: what it asks for,
//! and the bytes of answers.
//!
//! Layouts, numbers and flags are those of the kernel's `include/uapi/linux/fuse.h`, protocol 7.23 and later, in the
//! machine's byte order. Requests come from the kernel, yet nothing here reads past their end or believes a length.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use rustix::io::Errno;

/// The protocol's major number.
pub(super) const MAJOR: u32 = 7;

/// The oldest minor number whose `fuse_init_out` is the one that is written here.
pub(super) const OLDEST_MINOR: u32 = 23;

/// The newest minor number that this file was compared with.
const NEWEST_MINOR: u32 = 44;

/// `FUSE_ROOT_ID`: the root directory's number.
pub(super) const ROOT: u64 = 1;

/// `sizeof(struct fuse_in_header)`.
pub(super) const IN_HEADER_BYTES: usize = 40;

/// `sizeof(struct fuse_out_header)`.
const OUT_HEADER_BYTES: usize = 16;

/// `FUSE_MIN_READ_BUFFER`: the least room that a read of `/dev/fuse` must offer; enough as long as [`MAX_WRITE`] is one page.
pub(super) const MIN_READ_BUFFER: usize = 8192;

/// The longest write that the kernel may send, in bytes: the least it knows. None ever comes, and every request is short.
const MAX_WRITE: u32 = 4096;

/// The longest read, in pages: 1 MiB where pages have 4 KiB. The kernel knows no longer ones without its administrator's help.
const MAX_PAGES: u16 = 256;

/// The longest read ahead of a reader of the file, in bytes. The loop device reads around the page cache and needs none.
const MAX_READAHEAD: u32 = 1 << 20;

/// Requests that the kernel may have in flight before it holds more back; reads through a loop device count as background.
pub(super) const MAX_BACKGROUND: u16 = 512;

/// `FUSE_ASYNC_READ`: several reads of the file at once.
const ASYNC_READ: u64 = 1 << 0;
/// `FUSE_ASYNC_DIO`: direct reads do not wait for each other.
const ASYNC_DIO: u64 = 1 << 15;
/// `FUSE_MAX_PAGES`: `max_pages` of the answer means something.
const WITH_MAX_PAGES: u64 = 1 << 22;
/// `FUSE_INIT_EXT`: there is a second word of flags.
const INIT_EXT: u64 = 1 << 30;
/// `FUSE_HAS_RESEND`: the kernel sends unanswered requests again when it is asked to (Linux 6.9).
pub(super) const HAS_RESEND: u64 = 1 << 39;

/// `FOPEN_KEEP_CACHE`: what the page cache holds of the file stays good.
const KEEP_CACHE: u32 = 1 << 1;

/// `FUSE_NOTIFY_RESEND`, in the place of an answer's error.
const NOTIFY_RESEND: i32 = 7;

/// How long the kernel may believe what it was told, in seconds: nothing about the file ever changes.
const FOR_EVER: u64 = 1 << 30;

mod opcode {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const FORGET: u32 = 2;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const STATFS: u32 = 17;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const INIT: u32 = 26;
    pub(super) const OPENDIR: u32 = 27;
    pub(super) const RELEASEDIR: u32 = 29;
    pub(super) const INTERRUPT: u32 = 36;
    pub(super) const DESTROY: u32 = 38;
    pub(super) const BATCH_FORGET: u32 = 42;
}

/// One request of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request<'a> {
    /// The number by which it is answered. Its highest bit is set when the request is sent again.
    pub(super) unique: u64,
    /// The file or directory that it is about.
    pub(super) node: u64,
    pub(super) operation: Operation<'a>,
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation<'a> {
    /// The first request of a connection: what do both sides know?
    Init(Init),
    /// The file called `name` in a directory.
    Lookup { name: &'a OsStr },
    /// Size, mode and times.
    GetAttr,
    /// A file is opened.
    Open,
    /// A directory is opened.
    OpenDir,
    /// `size` bytes from `offset` on.
    Read { offset: u64, size: u32 },
    /// An open file or directory is closed.
    Release,
    /// How large the filesystem is.
    StatFs,
    /// Nothing has to be kept for a file any more. Not answered.
    Forget,
    /// The process that waits for a request got a signal.
    Interrupt,
    /// The filesystem is unmounted.
    Destroy,
    /// Closing or synchronising a file that is never written. The kernel asks no more after it hears that nobody knows how.
    FlushOrSync,
    /// Anything else, by its number.
    Other(u32),
}

/// What the kernel knows, in its first request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Init {
    pub(super) major: u32,
    pub(super) minor: u32,
    max_readahead: u32,
    flags: u64,
}

/// What both sides agreed on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Negotiated {
    /// The protocol's minor number.
    pub(super) minor: u32,
    /// The flags of `fuse_init_out`, both words.
    pub(super) flags: u64,
}

impl Negotiated {
    /// Whether the kernel sends unanswered requests again on demand.
    pub(super) const fn resends(self) -> bool {
        self.flags & HAS_RESEND != 0
    }
}

/// Why bytes are no request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum ParseError {
    /// Not even a header, so that there is nothing to answer to.
    #[error("{len} bytes are no request of FUSE, whose header says {says}")]
    Header {
        /// Bytes there are.
        len: usize,
        /// Bytes there should be.
        says: usize,
    },
    /// Too short for what its operation needs.
    #[error("request {unique:#x} of {len} bytes is too short for operation {opcode}")]
    Body {
        /// The number by which the request can be answered.
        unique: u64,
        /// The operation's number.
        opcode: u32,
        /// The length of the request, in bytes.
        len: usize,
    },
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().copied().map(u64::from_ne_bytes)
}

impl<'a> Request<'a> {
    /// Reads the request at the beginning of `bytes`, which may be longer than it.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let says = u32_at(bytes, 0).map_or(IN_HEADER_BYTES, |len| usize::try_from(len).unwrap_or(usize::MAX));
        let bad_header = ParseError::Header { len: bytes.len(), says };
        let whole = bytes.get(..says).ok_or(bad_header)?;
        let (header, body) = whole.split_at_checked(IN_HEADER_BYTES).ok_or(bad_header)?;
        let opcode = u32_at(header, 4).ok_or(bad_header)?;
        let unique = u64_at(header, 8).ok_or(bad_header)?;
        let node = u64_at(header, 16).ok_or(bad_header)?;
        let operation = Operation::parse(opcode, body).ok_or(ParseError::Body {
            unique,
            opcode,
            len: says,
        })?;
        Ok(Self {
            unique,
            node,
            operation,
        })
    }
}

impl<'a> Operation<'a> {
    /// The operation `opcode` with what follows the header; `None` when that is too short.
    fn parse(opcode: u32, body: &'a [u8]) -> Option<Self> {
        Some(match opcode {
            opcode::INIT => {
                let flags = u32_at(body, 12)?;
                let second = match u64::from(flags) & INIT_EXT {
                    0 => 0,
                    _ => u32_at(body, 16)?,
                };
                Self::Init(Init {
                    major: u32_at(body, 0)?,
                    minor: u32_at(body, 4)?,
                    max_readahead: u32_at(body, 8)?,
                    flags: u64::from(flags) | u64::from(second) << 32,
                })
            }
            opcode::LOOKUP => {
                let end = body.iter().position(|&byte| byte == 0)?;
                Self::Lookup {
                    name: OsStr::from_bytes(&body[..end]),
                }
            }
            // struct fuse_read_in: the file's handle, offset, size.
            opcode::READ => Self::Read {
                offset: u64_at(body, 8)?,
                size: u32_at(body, 16)?,
            },
            opcode::GETATTR => Self::GetAttr,
            opcode::OPEN => Self::Open,
            opcode::OPENDIR => Self::OpenDir,
            opcode::RELEASE | opcode::RELEASEDIR => Self::Release,
            opcode::STATFS => Self::StatFs,
            opcode::FORGET | opcode::BATCH_FORGET => Self::Forget,
            opcode::INTERRUPT => Self::Interrupt,
            opcode::DESTROY => Self::Destroy,
            opcode::FLUSH | opcode::FSYNC => Self::FlushOrSync,
            other => Self::Other(other),
        })
    }
}

impl Init {
    /// What is agreed on with this kernel; `None` when its protocol is too old or too new. With `resend` unset the kernel is not asked for
    /// [`HAS_RESEND`].
    pub(super) fn negotiate(self, resend: bool) -> Option<Negotiated> {
        let known = self.major == MAJOR && self.minor >= OLDEST_MINOR;
        let mut wanted = ASYNC_READ | ASYNC_DIO | WITH_MAX_PAGES;
        if resend {
            wanted |= HAS_RESEND;
        }
        let flags = self.flags & wanted;
        // The second word counts only with the first word's last bit.
        let extended = if flags >> 32 == 0 { 0 } else { INIT_EXT };
        known.then_some(Negotiated {
            minor: self.minor.min(NEWEST_MINOR),
            flags: flags | extended,
        })
    }

    /// `struct fuse_init_out`.
    pub(super) fn answer(self, agreed: Negotiated) -> [u8; 64] {
        let mut out = Writer::new();
        out.u32(MAJOR);
        out.u32(agreed.minor);
        out.u32(self.max_readahead.min(MAX_READAHEAD));
        let [flags, second] = halves(agreed.flags);
        out.u32(flags);
        out.u16(MAX_BACKGROUND);
        out.u16(MAX_BACKGROUND / 4 * 3);
        out.u32(MAX_WRITE);
        // Times are whole seconds, but the kernel wants its finest grain here: nanoseconds.
        out.u32(1);
        out.u16(MAX_PAGES);
        out.u16(0);
        out.u32(second);
        out.done()
    }
}

/// The low and the high half of a word.
fn halves(word: u64) -> [u32; 2] {
    let half = |word: u64| u32::try_from(word & u64::from(u32::MAX)).unwrap_or(u32::MAX);
    [half(word), half(word >> 32)]
}

/// Writes a struct of `N` bytes field by field. What is not written is zero; what does not fit is left out, which tests notice.
struct Writer<const N: usize> {
    bytes: [u8; N],
    at: usize,
}

impl<const N: usize> Writer<N> {
    const fn new() -> Self {
        Self { bytes: [0; N], at: 0 }
    }

    fn put(&mut self, bytes: &[u8]) {
        let end = self.at + bytes.len();
        debug_assert!(end <= N, "a struct of {N} bytes has no room for {end}");
        if let Some(place) = self.bytes.get_mut(self.at..end) {
            place.copy_from_slice(bytes);
        }
        self.at = end;
    }

    fn u16(&mut self, value: u16) {
        self.put(&value.to_ne_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.put(&value.to_ne_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.put(&value.to_ne_bytes());
    }

    /// `struct fuse_attr`.
    fn attributes(&mut self, of: Attributes) {
        let Attributes { node, mode, len } = of;
        self.u64(node);
        self.u64(len);
        self.u64(len.div_ceil(512));
        for _seconds in ["atime", "mtime", "ctime"] {
            self.u64(0);
        }
        for _nanoseconds in ["atime", "mtime", "ctime"] {
            self.u32(0);
        }
        self.u32(mode);
        self.u32(1);
        for _zero in ["uid", "gid", "rdev"] {
            self.u32(0);
        }
        self.u32(4096);
        self.u32(0);
    }

    const fn done(self) -> [u8; N] {
        self.bytes
    }
}

/// What there is to know of a file or directory. Everything has the epoch as its time and belongs to root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Attributes {
    pub(super) node: u64,
    /// Type and permissions, as stat(2) has them.
    pub(super) mode: u32,
    /// The length in bytes.
    pub(super) len: u64,
}

/// `struct fuse_entry_out`: the answer to [`Operation::Lookup`].
pub(super) fn entry(of: Attributes) -> [u8; 128] {
    let mut out = Writer::new();
    out.u64(of.node);
    out.u64(0);
    out.u64(FOR_EVER);
    out.u64(FOR_EVER);
    out.u32(0);
    out.u32(0);
    out.attributes(of);
    out.done()
}

/// `struct fuse_attr_out`: the answer to [`Operation::GetAttr`].
pub(super) fn attributes(of: Attributes) -> [u8; 104] {
    let mut out = Writer::new();
    out.u64(FOR_EVER);
    out.u32(0);
    out.u32(0);
    out.attributes(of);
    out.done()
}

/// `struct fuse_open_out`: the answer to [`Operation::Open`] and [`Operation::OpenDir`].
pub(super) fn opened() -> [u8; 16] {
    let mut out = Writer::new();
    out.u64(0);
    out.u32(KEEP_CACHE);
    out.done()
}

/// `struct fuse_statfs_out`: the answer to [`Operation::StatFs`], for a filesystem of one file of `len` bytes.
pub(super) fn statfs(len: u64) -> [u8; 80] {
    const BLOCK: u32 = 4096;
    let mut out = Writer::new();
    out.u64(len.div_ceil(u64::from(BLOCK)));
    out.u64(0);
    out.u64(0);
    out.u64(1);
    out.u64(0);
    out.u32(BLOCK);
    out.u32(255);
    out.u32(BLOCK);
    out.done()
}

/// `struct fuse_out_header` of an answer with `len` bytes behind it, or of an error.
pub(super) fn out_header(unique: u64, len: usize, error: Option<Errno>) -> [u8; OUT_HEADER_BYTES] {
    let mut out = Writer::new();
    // Answers are at most as long as reads; a length that is not would be refused by the kernel.
    out.u32(u32::try_from(OUT_HEADER_BYTES + len).unwrap_or(u32::MAX));
    out.put(&error.map_or(0, |error| -error.raw_os_error()).to_ne_bytes());
    out.u64(unique);
    out.done()
}

/// The message that makes the kernel send every unanswered request again.
pub(super) fn resend() -> [u8; OUT_HEADER_BYTES] {
    let mut out = Writer::new();
    out.u32(16);
    out.put(&NOTIFY_RESEND.to_ne_bytes());
    out.u64(0);
    out.done()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A request of `opcode` with `body`, as the kernel writes it.
    fn request(opcode: u32, body: &[u8]) -> Vec<u8> {
        let len = u32::try_from(IN_HEADER_BYTES + body.len()).unwrap();
        let mut bytes = [len, opcode].map(u32::to_ne_bytes).concat();
        bytes.extend([0x8000_0000_0000_0006u64, 2].map(u64::to_ne_bytes).concat());
        bytes.resize(IN_HEADER_BYTES, 0);
        bytes.extend(body);
        bytes
    }

    fn init(minor: u32, flags: u32, second: u32) -> Vec<u8> {
        let mut body = [MAJOR, minor, 128 << 10, flags, second].map(u32::to_ne_bytes).concat();
        body.resize(64, 0);
        request(opcode::INIT, &body)
    }

    fn parse_init(bytes: &[u8]) -> Init {
        match Request::parse(bytes).unwrap().operation {
            Operation::Init(init) => init,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn requests_are_what_they_say() {
        let mut read = [0u64, 1 << 40, 4096].map(u64::to_ne_bytes).concat();
        read.resize(40, 0);
        let cases = [
            (
                request(opcode::READ, &read),
                Operation::Read {
                    offset: 1 << 40,
                    size: 4096,
                },
            ),
            (
                request(opcode::LOOKUP, b"tarblk:a\0rest"),
                Operation::Lookup {
                    name: OsStr::new("tarblk:a"),
                },
            ),
            (request(opcode::GETATTR, &[0; 16]), Operation::GetAttr),
            (request(opcode::FLUSH, &[]), Operation::FlushOrSync),
            (request(opcode::BATCH_FORGET, &[0; 8]), Operation::Forget),
            (request(9999, &[1; 100]), Operation::Other(9999)),
        ];
        for (mut bytes, operation) in cases {
            // A slot is longer than what was read into it.
            bytes.resize(MIN_READ_BUFFER, 0xff);
            let expected = Request {
                unique: 0x8000_0000_0000_0006,
                node: 2,
                operation,
            };
            assert_eq!(Request::parse(&bytes), Ok(expected));
        }
    }

    #[test]
    fn short_requests_are_refused() {
        for (opcode, body) in [
            (opcode::READ, &[0u8; 19][..]),
            (opcode::LOOKUP, b"no end"),
            (opcode::INIT, &[0; 15]),
        ] {
            let bytes = request(opcode, body);
            assert_eq!(
                Request::parse(&bytes),
                Err(ParseError::Body {
                    unique: 0x8000_0000_0000_0006,
                    opcode,
                    len: bytes.len()
                })
            );
        }
        let whole = request(opcode::GETATTR, &[0; 16]);
        for len in 0..whole.len() {
            assert!(
                matches!(Request::parse(&whole[..len]), Err(ParseError::Header { .. })),
                "{len}"
            );
        }
        let mut short = whole;
        short[0] = 39;
        assert!(matches!(
            Request::parse(&short),
            Err(ParseError::Header { says: 39, .. })
        ));
    }

    #[test]
    fn only_what_the_kernel_offers_is_agreed_on() {
        let old = parse_init(&init(31, !(1 << 30), 0xffff_ffff));
        let agreed = old.negotiate(true).unwrap();
        assert_eq!(
            (agreed.minor, agreed.flags, agreed.resends()),
            (31, ASYNC_READ | ASYNC_DIO | WITH_MAX_PAGES, false)
        );

        let new = parse_init(&init(999, 0xffff_ffff, 1 << 7));
        let agreed = new.negotiate(true).unwrap();
        assert_eq!(agreed.minor, NEWEST_MINOR);
        assert!(agreed.resends() && agreed.flags & INIT_EXT != 0);
        let out = new.answer(agreed);
        assert_eq!(u32_at(&out, 0), Some(MAJOR));
        assert_eq!(u32_at(&out, 8), Some(128 << 10));
        assert_eq!(u32_at(&out, 12).map(u64::from), Some(agreed.flags & 0xffff_ffff));
        assert_eq!(out[16..20], [512u16, 384].map(u16::to_ne_bytes).concat());
        assert_eq!(u32_at(&out, 20), Some(4096));
        assert_eq!(out[28..30], 256u16.to_ne_bytes());
        assert_eq!(u32_at(&out, 32), Some(1 << 7));
        assert_eq!(
            new.negotiate(false).unwrap().flags,
            ASYNC_READ | ASYNC_DIO | WITH_MAX_PAGES
        );

        assert_eq!(parse_init(&init(22, 0, 0)).negotiate(true), None);
        let mut next = new;
        next.major = 8;
        assert_eq!(next.negotiate(true), None);
    }

    /// Compared with what gcc makes of the kernel's header: `offsetof` of the last field that is set.
    #[test]
    fn answers_are_laid_out_as_in_fuse_h() {
        let of = Attributes {
            node: 2,
            mode: 0o100_400,
            len: 8193,
        };
        let entry = entry(of);
        assert_eq!(u64_at(&entry, 40), Some(2));
        assert_eq!(u64_at(&entry, 48), Some(8193));
        assert_eq!(u64_at(&entry, 56), Some(17));
        assert_eq!(u32_at(&entry, 40 + 60), Some(0o100_400));
        assert_eq!(u32_at(&entry, 40 + 64), Some(1));
        assert_eq!(u32_at(&entry, 40 + 80), Some(4096));
        assert_eq!(attributes(of)[16..], entry[40..]);
        assert_eq!(u32_at(&opened(), 8), Some(2));
        assert_eq!(u64_at(&statfs(8193), 0), Some(3));
        assert_eq!(u32_at(&statfs(8193), 44), Some(255));
        let header = out_header(6, 100, None);
        assert_eq!((u32_at(&header, 0), u64_at(&header, 8)), (Some(116), Some(6)));
        assert_eq!(out_header(6, 0, Some(Errno::IO))[4..8], (-5i32).to_ne_bytes());
        assert_eq!(resend()[4..8], 7i32.to_ne_bytes());
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_request_or_an_error(mut bytes in prop::collection::vec(any::<u8>(), 0..200), opcode in 0u32..60, cut in any::<bool>()) {
            if bytes.len() >= 8 {
                bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
                if !cut {
                    let len = u32::try_from(bytes.len()).unwrap();
                    bytes[..4].copy_from_slice(&len.to_ne_bytes());
                }
            }
            match Request::parse(&bytes) {
                Ok(request) => prop_assert_eq!(request.unique, u64_at(&bytes, 8).unwrap()),
                Err(ParseError::Header { says, .. }) => prop_assert!(says < IN_HEADER_BYTES || says > bytes.len()),
                Err(ParseError::Body { unique, .. }) => prop_assert_eq!(unique, u64_at(&bytes, 8).unwrap()),
            }
        }
    }
}
