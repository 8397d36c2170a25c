//! A TCP connection over `io_uring` that hyper and rustls can poll. In: their borrowed buffers. Out: owned buffers for the
//! ring, one copy each way.
//!
//! The ring needs buffers that stay put until the kernel is done with them, whatever happens to the future that waits, so
//! the adapter owns one for each direction and copies. It must never hand the kernel a borrowed buffer.

use std::future::Future;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_uring::BufResult;
use tokio_uring::net::TcpStream as Socket;

/// What a quiet connection holds: room for a response head and a chunk, so that a lone chunk comes with one read.
const SMALLEST_READ: usize = 64 << 10;
/// What a busy one grows to: big enough that the ring's cost per read vanishes, small enough to stay in the L2 cache
/// between the kernel's copy and ours.
const LARGEST_READ: usize = 256 << 10;
/// Requests are heads; TLS records are at most this long.
const LARGEST_WRITE: usize = 16 << 10;

type Operation<T> = Pin<Box<dyn Future<Output = BufResult<T, Vec<u8>>>>>;

enum Reading {
    /// Bytes of the buffer from the position on are not handed out yet.
    Holding(Vec<u8>, usize),
    Waiting(Operation<usize>),
}

enum Writing {
    Ready(Vec<u8>),
    Waiting(Operation<()>),
}

/// A connection; see the module.
pub(crate) enum TcpStream {
    Ring(RingStream),
    #[cfg(feature = "unstable-internals")]
    Simulated(Box<dyn super::simulated::Stream>),
}

impl TcpStream {
    /// Connects; no deadline of its own.
    pub(crate) async fn connect(address: SocketAddr) -> io::Result<Self> {
        #[cfg(feature = "unstable-internals")]
        if let Some(connecting) = super::simulated::connect(address) {
            return connecting.await.map(Self::Simulated);
        }
        RingStream::connect(address).await.map(Self::Ring)
    }
}

/// Hands a call on to whichever kind of stream it is.
macro_rules! forward {
    ($stream:expr, $poll:ident, $($argument:expr),*) => {
        match $stream.get_mut() {
            TcpStream::Ring(stream) => Pin::new(stream).$poll($($argument),*),
            #[cfg(feature = "unstable-internals")]
            TcpStream::Simulated(stream) => Pin::new(stream).$poll($($argument),*),
        }
    };
}

impl AsyncRead for TcpStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        forward!(self, poll_read, cx, out)
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        forward!(self, poll_write, cx, data)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, poll_flush, cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        forward!(self, poll_shutdown, cx)
    }
}

/// A connection through the ring.
pub(crate) struct RingStream {
    socket: Rc<Socket>,
    reading: Reading,
    writing: Writing,
    next_read: usize,
}

impl RingStream {
    async fn connect(address: SocketAddr) -> io::Result<Self> {
        let socket = Socket::connect(address).await?;
        socket.set_nodelay(true)?;
        Ok(Self {
            socket: Rc::new(socket),
            reading: Reading::Holding(Vec::new(), 0),
            writing: Writing::Ready(Vec::new()),
            next_read: SMALLEST_READ,
        })
    }

    fn start_read(&self, mut buffer: Vec<u8>) -> Operation<usize> {
        buffer.clear();
        if buffer.capacity() != self.next_read {
            buffer = Vec::with_capacity(self.next_read);
        }
        let socket = self.socket.clone();
        Box::pin(async move { socket.read(buffer).await })
    }

    fn poll_written(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if let Writing::Waiting(operation) = &mut self.writing {
            let (result, buffer) = ready!(operation.as_mut().poll(cx));
            self.writing = Writing::Ready(buffer);
            return Poll::Ready(result);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for RingStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            match &mut self.reading {
                Reading::Holding(buffer, position) if *position < buffer.len() => {
                    let held = &buffer[*position..];
                    let len = held.len().min(out.remaining());
                    out.put_slice(&held[..len]);
                    *position += len;
                    return Poll::Ready(Ok(()));
                }
                Reading::Holding(buffer, _) => {
                    let buffer = std::mem::take(buffer);
                    self.reading = Reading::Waiting(self.start_read(buffer));
                }
                Reading::Waiting(operation) => {
                    let (result, buffer) = ready!(operation.as_mut().poll(cx));
                    let got = result.as_ref().copied().unwrap_or(0);
                    if got == self.next_read {
                        self.next_read = (self.next_read * 2).min(LARGEST_READ);
                    } else if got < self.next_read / 4 {
                        self.next_read = (self.next_read / 2).max(SMALLEST_READ);
                    }
                    self.reading = Reading::Holding(buffer, 0);
                    match result {
                        Ok(0) => return Poll::Ready(Ok(())),
                        Ok(_) => {}
                        Err(error) => return Poll::Ready(Err(error)),
                    }
                }
            }
        }
    }
}

impl AsyncWrite for RingStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_written(cx))?;
        if let Writing::Ready(buffer) = &mut self.writing {
            let len = data.len().min(LARGEST_WRITE);
            if len > 0 {
                let mut buffer = std::mem::take(buffer);
                buffer.clear();
                buffer.extend_from_slice(&data[..len]);
                let socket = self.socket.clone();
                let mut operation: Operation<()> = Box::pin(async move { socket.write_all(buffer).await });
                // Polled once so that the request is on the ring now and not at the next flush.
                match operation.as_mut().poll(cx) {
                    Poll::Ready((result, buffer)) => {
                        self.writing = Writing::Ready(buffer);
                        result?;
                    }
                    Poll::Pending => self.writing = Writing::Waiting(operation),
                }
            }
            return Poll::Ready(Ok(len));
        }
        Poll::Pending
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_written(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_written(cx))?;
        match self.socket.shutdown(Shutdown::Write) {
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(())),
        }
    }
}

impl Drop for RingStream {
    /// A read that is on the ring keeps the socket open after its future is gone; this ends it.
    fn drop(&mut self) {
        // It may be closed already; then there is nothing to end.
        let _already_closed = self.socket.shutdown(Shutdown::Both);
    }
}
