//! Messages between tarblk's processes: a typed value as JSON, with descriptors beside it, over a Unix stream socket. In: a
//! value and descriptors. Out: the same in the other process.
//!
//! A frame is a head of twelve bytes (a mark, the text's length in bytes, the number of descriptors), then one byte for each further
//! batch of descriptors, then the text. The descriptors are attached to head and bytes (`SCM_RIGHTS`), as many as the kernel takes at once. Both ends are this program, run by root, but a frame is still refused when it is longer
//! than its reader allows or has other than the promised descriptors. Time limits are the socket's own.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Begins every frame; its last byte is the version of this form.
const MARK: [u8; 4] = *b"TBM1";

const HEAD_BYTES: usize = 12;

/// The kernel passes on no more descriptors at once (`SCM_MAX_FD`).
const BATCH: usize = 253;

/// No message has more: an image has at most some hundred layers.
const MOST_DESCRIPTORS: usize = 16 * BATCH;

/// Stands for a further batch of descriptors.
const MORE: [u8; 1] = [b'+'];

/// Sends `message` and duplicates of `descriptors`.
///
/// # Errors
/// What the socket says; [`io::ErrorKind::InvalidInput`] for more than [`MOST_DESCRIPTORS`].
pub(super) fn send(
    mut socket: &UnixStream,
    message: &impl Serialize,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    if descriptors.len() > MOST_DESCRIPTORS {
        let what = format!("{} files are too many to pass on", descriptors.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let text = serde_json::to_vec(message)?;
    let number = |n: usize| u32::try_from(n).map_err(io::Error::other);
    let mut head = [0; HEAD_BYTES];
    head[..4].copy_from_slice(&MARK);
    head[4..8].copy_from_slice(&number(text.len())?.to_le_bytes());
    head[8..].copy_from_slice(&number(descriptors.len())?.to_le_bytes());
    let (first, rest) = descriptors.split_at(descriptors.len().min(BATCH));
    let sent = send_with(socket, IoSlice::new(&head), first)?;
    socket.write_all(&head[sent..])?;
    for batch in rest.chunks(BATCH) {
        send_with(socket, IoSlice::new(&MORE), batch)?;
    }
    socket.write_all(&text)
}

/// Sends `bytes` with a batch of descriptors; returns how many of the bytes were sent, at least one.
pub(super) fn send_with(socket: impl AsFd, bytes: IoSlice<'_>, batch: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !batch.is_empty() && !control.push(SendAncillaryMessage::ScmRights(batch)) {
        return Err(io::Error::other("no room for descriptors"));
    }
    loop {
        match rustix::net::sendmsg(&socket, &[bytes], &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Receives a message whose text is at most `most` bytes long, and its descriptors. None when the other end has closed.
///
/// # Errors
/// What the socket says, or that it is no such message.
pub(super) fn receive<T: DeserializeOwned>(
    mut socket: &UnixStream,
    most: u64,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut head = [0; HEAD_BYTES];
    let mut descriptors = Vec::new();
    let got = receive_with(socket, &mut head, &mut descriptors)?;
    if got == 0 {
        return Ok(None);
    }
    socket.read_exact(&mut head[got..])?;
    let field = |at: usize| -> [u8; 4] { [head[at], head[at + 1], head[at + 2], head[at + 3]] };
    if field(0) != MARK {
        return Err(bad(
            "the other end speaks another language: is it of another version of tarblk?",
        ));
    }
    let len = u32::from_le_bytes(field(4));
    if u64::from(len) > most {
        return Err(bad("the message is too long"));
    }
    let promised = usize::try_from(u32::from_le_bytes(field(8))).unwrap_or(usize::MAX);
    if promised > MOST_DESCRIPTORS {
        return Err(bad("it has too many descriptors"));
    }
    for _ in 1..promised.div_ceil(BATCH) {
        let mut more = [0; MORE.len()];
        if receive_with(socket, &mut more, &mut descriptors)? == 0 || more != MORE {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    if promised != descriptors.len() {
        return Err(bad(
            "descriptors were lost on the way (is the limit on open files reached?)",
        ));
    }
    let mut text = Vec::new();
    // Grows with what comes, not with what is claimed.
    socket.take(u64::from(len)).read_to_end(&mut text)?;
    if text.len() != usize::try_from(len).unwrap_or(usize::MAX) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(Some((serde_json::from_slice(&text)?, descriptors)))
}

/// Receives some of `bytes`, and adds the descriptors that came with them. 0 when the other end has closed.
fn receive_with(socket: &UnixStream, bytes: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(BATCH))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        let mut target = [IoSliceMut::new(bytes)];
        match rustix::net::recvmsg(socket, &mut target, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?.bytes,
        }
    };
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    Ok(got)
}

/// The descriptors of `all` as [`send`] takes them.
pub(super) fn borrowed(all: &[OwnedFd]) -> Vec<BorrowedFd<'_>> {
    all.iter().map(AsFd::as_fd).collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn messages_and_descriptors_arrive_in_order() {
        let (here, there) = UnixStream::pair().unwrap();
        // More than one batch.
        let files: Vec<OwnedFd> = (0..=2 * BATCH).map(|_| tempfile::tempfile().unwrap().into()).collect();
        let big = "x".repeat(1 << 20);
        let sender = std::thread::spawn(move || {
            send(&here, &("first", 1), &[]).unwrap();
            send(&here, &(&big, 2), &borrowed(&files)).unwrap();
            send(&here, &("third", 3), &borrowed(&files[..1])).unwrap();
            files
        });
        let first: ((String, u32), _) = receive(&there, 100).unwrap().unwrap();
        assert_eq!((first.0.0.as_str(), first.0.1, first.1.len()), ("first", 1, 0));
        let second: ((String, u32), _) = receive(&there, 2 << 20).unwrap().unwrap();
        assert_eq!((second.0.0.len(), second.0.1), (1 << 20, 2));
        let third: ((String, u32), _) = receive(&there, 100).unwrap().unwrap();
        assert_eq!(third.0.0, "third");
        let files = sender.join().unwrap();
        let inode = |fd: &OwnedFd| File::from(fd.try_clone().unwrap()).metadata().unwrap().ino();
        let (sent, got): (Vec<_>, Vec<_>) = (files.iter().map(inode).collect(), second.1.iter().map(inode).collect());
        assert_eq!(sent, got);
        assert_eq!(inode(&third.1[0]), sent[0]);
        assert!(receive::<u32>(&there, 100).unwrap().is_none());
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for bytes in [
            &b"TBM1\xff\xff\xff\xff\0\0\0\0"[..],
            b"GET / HTTP/1.1\r\n\r\n",
            b"TBM1\x02\0\0\0\x01\0\0\0{}",
            b"TBM1\x02\0\0\0\0\0\0\0x}",
            b"TBM1\x09\0\0\0\0\0\0\0{}",
            b"TBM",
        ] {
            let (mut here, there) = UnixStream::pair().unwrap();
            here.write_all(bytes).unwrap();
            drop(here);
            assert!(receive::<serde_json::Value>(&there, 1000).is_err(), "{bytes:?}");
        }
    }
}
