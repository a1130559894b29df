//! Between the socket and MQTT's bytes: TCP or a Unix socket, and over it what a listener asks for: TLS, WebSocket, both.
//!
//! [`Layers`] does no I/O of its own and never waits: bytes of the socket in, bytes of MQTT out, and what has to be sent
//! goes out with the next flush. So the core writes to a TLS client as it does to any other. A plain TCP connection has
//! no layers and pays one look at an Option. Bounds: rustls holds at most one flight of a handshake (64 KiB) or one
//! chunk to send; WebSocket a request (8 KiB) or one control frame.

pub mod proxy;
pub mod websocket;

use std::cell::RefCell;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::DerefMut;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::{Buf, BufMut, BytesMut};
use smallvec::SmallVec;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::net::{TcpStream, UnixStream, tcp, unix};
use tokio_rustls::rustls::{self, ServerConfig, ServerConnection};

use self::websocket::{Frames, Policy, Request, close};
use crate::config::Listener;

/// One WebSocket frame, and what is handed to TLS at once.
const CHUNK_BYTES: usize = 64 << 10;

/// Who is at the other end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    Address(SocketAddr),
    /// A process of this machine, by the Unix socket.
    Unix {
        user_id: Option<u32>,
    },
}

impl Peer {
    /// For limits by address: a Unix socket's peers are this machine.
    pub fn ip(&self) -> IpAddr {
        match self {
            Peer::Address(address) => address.ip().to_canonical(),
            Peer::Unix { .. } => Ipv4Addr::LOCALHOST.into(),
        }
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Peer::Address(address) => address.fmt(f),
            Peer::Unix { user_id: Some(id) } => write!(f, "unix, user id {id}"),
            Peer::Unix { user_id: None } => f.write_str("unix"),
        }
    }
}

/// Our end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Local {
    Address(SocketAddr),
    Unix(Rc<Path>),
}

/// By which sort of listener a connection came, and where: another configuration may no longer have one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entrance {
    pub local: Local,
    pub tls: bool,
    pub websocket: bool,
    pub proxy_protocol: bool,
    /// It has shown a certificate.
    pub has_certificate: bool,
}

impl std::fmt::Display for Entrance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let scheme = match (self.websocket, self.tls) {
            (false, false) => "mqtt",
            (false, true) => "mqtts",
            (true, false) => "ws",
            (true, true) => "wss",
        };
        match &self.local {
            Local::Address(address) => write!(f, "{scheme}://{address}"),
            Local::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A connection that was just taken in.
pub enum Accepted {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Accepted {
    /// `bind`: where the listener is, for a socket that cannot say.
    pub fn local(&self, bind: &crate::config::Bind) -> Local {
        let configured = || match bind {
            crate::config::Bind::Address(address) => Local::Address(*address),
            crate::config::Bind::Unix(path) => Local::Unix(PathBuf::as_path(path).into()),
        };
        match self {
            Accepted::Tcp(stream) => stream.local_addr().map_or_else(|_| configured(), Local::Address),
            Accepted::Unix(_) => configured(),
        }
    }

    pub fn split(self) -> (Source, Sink) {
        match self {
            Accepted::Tcp(stream) => {
                // Acknowledgements and deliveries are gathered by us; waiting for more would only delay them.
                let _ = stream.set_nodelay(true);
                let (read, write) = stream.into_split();
                (Source::Tcp(read), Sink::Tcp(write))
            }
            Accepted::Unix(stream) => {
                let (read, write) = stream.into_split();
                (Source::Unix(read), Sink::Unix(write))
            }
        }
    }
}

pub enum Source {
    Tcp(tcp::OwnedReadHalf),
    Unix(unix::OwnedReadHalf),
}

impl Source {
    pub async fn readable(&self) -> io::Result<()> {
        match self {
            Source::Tcp(half) => half.readable().await,
            Source::Unix(half) => half.readable().await,
        }
    }
}

impl AsyncRead for Source {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Source::Tcp(half) => Pin::new(half).poll_read(cx, into),
            Source::Unix(half) => Pin::new(half).poll_read(cx, into),
        }
    }
}

pub enum Sink {
    Tcp(tcp::OwnedWriteHalf),
    Unix(unix::OwnedWriteHalf),
}

impl Sink {
    pub fn try_write(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Sink::Tcp(half) => half.try_write(bytes),
            Sink::Unix(half) => half.try_write(bytes),
        }
    }

    fn try_write_vectored(&self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Sink::Tcp(half) => half.try_write_vectored(parts),
            Sink::Unix(half) => half.try_write_vectored(parts),
        }
    }

    pub async fn writable(&self) -> io::Result<()> {
        match self {
            Sink::Tcp(half) => half.writable().await,
            Sink::Unix(half) => half.writable().await,
        }
    }

    /// The other side sees the end after the last byte.
    pub fn end(&self) {
        let how = std::net::Shutdown::Write;
        let _ = match self {
            Sink::Tcp(half) => socket2::SockRef::from(half.as_ref()).shutdown(how),
            Sink::Unix(half) => socket2::SockRef::from(half.as_ref()).shutdown(how),
        };
    }
}

/// For rustls, which writes as if to a stream.
struct Writing<'s>(&'s Sink);

impl io::Write for Writing<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.try_write(bytes)
    }

    fn write_vectored(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_write_vectored(parts)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Tls {
    /// Nothing has come yet: no memory before the first byte.
    Awaited(Arc<ServerConfig>),
    On(Box<ServerConnection>),
}

enum Web {
    Asked(Vec<u8>, Rc<Listener>),
    Open(Box<Frames>),
    /// The request was refused, or a close is on its way: nothing more goes out.
    Over,
}

/// What lies over the socket of one connection.
pub struct Layers {
    tls: Option<Tls>,
    web: Option<Web>,
    /// Our own bytes (the answer to the request, a frame's header, a control frame) that go before MQTT's, and how many
    /// of them are gone.
    head: SmallVec<[u8; 16]>,
    head_gone: usize,
    /// MQTT bytes that the last frame's header announced and that have not gone out.
    announced: usize,
    /// What came from the socket.
    pub received: usize,
    /// The client has ended its side in the layer's own way.
    ended: bool,
    finishing: bool,
    notified: bool,
}

impl Layers {
    /// None where the listener is for plain MQTT.
    pub fn of(listener: &Rc<Listener>, tls: Option<Arc<ServerConfig>>) -> Option<Box<RefCell<Layers>>> {
        if tls.is_none() && !listener.websocket {
            return None;
        }
        Some(Box::new(RefCell::new(Layers {
            tls: tls.map(Tls::Awaited),
            web: listener.websocket.then(|| Web::Asked(Vec::new(), Rc::clone(listener))),
            head: SmallVec::new(),
            head_gone: 0,
            announced: 0,
            received: 0,
            ended: false,
            finishing: false,
            notified: false,
        })))
    }

    pub fn is_ended(&self) -> bool {
        self.ended
    }

    /// Work with keys is still to be done.
    pub fn is_handshaking(&self) -> bool {
        match &self.tls {
            None => false,
            Some(Tls::Awaited(_)) => true,
            Some(Tls::On(tls)) => tls.is_handshaking(),
        }
    }

    /// Where a client stopped, for the log.
    pub fn stage(&self) -> &'static str {
        match (&self.tls, &self.web) {
            _ if self.is_handshaking() => "in the TLS handshake",
            (_, Some(Web::Asked(..))) => "in the WebSocket request",
            _ => "before CONNECT",
        }
    }

    /// The client's own certificate, in DER.
    pub fn certificate(&self) -> Option<&[u8]> {
        match &self.tls {
            Some(Tls::On(tls)) => tls.peer_certificates()?.first().map(AsRef::as_ref),
            Some(Tls::Awaited(_)) | None => None,
        }
    }

    /// Takes what the socket brought; MQTT's bytes go to the end of `to`. An error ends the connection, after what it has
    /// left to be sent.
    pub fn take_in<D>(&mut self, raw: &[u8], to: &mut D) -> Result<(), String>
    where
        D: BufMut + DerefMut<Target = [u8]>,
    {
        self.received += raw.len();
        if let Some(Tls::Awaited(config)) = &self.tls {
            if raw.first() != Some(&0x16) {
                return Err(not_tls(raw));
            }
            let tls = ServerConnection::new(Arc::clone(config)).map_err(|e| format!("TLS could not begin: {e}"))?;
            self.tls = Some(Tls::On(Box::new(tls)));
        }
        let Some(Tls::On(tls)) = &mut self.tls else {
            return web_in(&mut self.web, &mut self.head, &mut self.ended, raw, to);
        };
        let mut raw = raw;
        while !raw.is_empty() {
            match tls.read_tls(&mut raw) {
                Ok(0) => break,
                Ok(_) => {}
                Err(e) => return Err(format!("TLS: {e}")),
            }
            let state = tls.process_new_packets().map_err(|e| in_words(&e))?;
            // Read from a stack of its own: what came lies in rustls in pieces.
            loop {
                let mut reader = tls.reader();
                let piece = match io::BufRead::fill_buf(&mut reader) {
                    Ok(piece) if !piece.is_empty() => piece,
                    Ok(_) | Err(_) => break,
                };
                let n = piece.len();
                web_in(&mut self.web, &mut self.head, &mut self.ended, piece, to)?;
                io::BufRead::consume(&mut tls.reader(), n);
            }
            if state.peer_has_closed() {
                self.ended = true;
                break;
            }
        }
        Ok(())
    }

    /// An answer of the layers themselves waits: a flight of the handshake, a pong.
    pub fn has_answer(&self) -> bool {
        let tls = matches!(&self.tls, Some(Tls::On(tls)) if tls.wants_write());
        tls || self.may_send() && (self.head_gone < self.head.len() || self.owes_control())
    }

    /// Something waits to be sent, `out` included.
    pub fn is_unsent(&self, out: &BytesMut) -> bool {
        self.has_answer() || (self.may_send() && self.is_open() && !out.is_empty())
    }

    /// MQTT's bytes may go out.
    fn is_open(&self) -> bool {
        matches!(self.web, None | Some(Web::Open(_)))
    }

    fn may_send(&self) -> bool {
        match &self.tls {
            None => true,
            Some(Tls::Awaited(_)) => false,
            Some(Tls::On(tls)) => !tls.is_handshaking(),
        }
    }

    fn owes_control(&self) -> bool {
        matches!(&self.web, Some(Web::Open(frames)) if frames.pong.is_some() || frames.closed.is_some())
    }

    /// Writes what the socket takes. True where nothing is left that could go.
    pub fn flush(&mut self, sink: &Sink, out: &mut BytesMut) -> io::Result<bool> {
        loop {
            if let Some(Tls::On(tls)) = &mut self.tls {
                while tls.wants_write() {
                    match tls.write_tls(&mut Writing(sink)) {
                        Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                        Ok(_) => {}
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                        Err(e) => return Err(e),
                    }
                }
            }
            if !self.may_send() {
                return Ok(true);
            }
            self.begin_frame(out.len());
            let head = &self.head[self.head_gone..];
            let body = match &self.web {
                None => &out[..out.len().min(CHUNK_BYTES)],
                Some(Web::Open(_)) => &out[..self.announced],
                Some(Web::Asked(..) | Web::Over) => &[][..],
            };
            if head.is_empty() && body.is_empty() {
                if self.is_open() {
                    debug_assert!(out.is_empty(), "nothing is left behind");
                }
                if self.finishing && !self.notified {
                    self.notified = true;
                    if let Some(Tls::On(tls)) = &mut self.tls {
                        tls.send_close_notify();
                        continue;
                    }
                }
                // An idle connection keeps no buffer.
                *out = BytesMut::new();
                return Ok(true);
            }
            let parts = [io::IoSlice::new(head), io::IoSlice::new(body)];
            let written = match &mut self.tls {
                Some(Tls::On(tls)) if head.is_empty() => io::Write::write(&mut tls.writer(), body),
                Some(Tls::On(tls)) => io::Write::write_vectored(&mut tls.writer(), &parts),
                Some(Tls::Awaited(_)) | None if head.is_empty() => sink.try_write(body),
                Some(Tls::Awaited(_)) | None => sink.try_write_vectored(&parts),
            };
            let n = match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            };
            let of_head = n.min(head.len());
            self.head_gone += of_head;
            self.announced = self.announced.saturating_sub(n - of_head);
            out.advance(n - of_head);
            if self.head_gone == self.head.len() {
                // What was long (an answer to a request) is given back.
                self.head = SmallVec::new();
                self.head_gone = 0;
            }
        }
    }

    /// Where the last frame is out: control frames that are owed, and the next frame's header.
    fn begin_frame(&mut self, unsent: usize) {
        if self.announced > 0 || self.head_gone < self.head.len() {
            return;
        }
        let Some(Web::Open(frames)) = &mut self.web else { return };
        if let Some(content) = frames.pong.take() {
            websocket::pong(&content, &mut self.head);
        }
        let closed = frames.closed;
        if unsent > 0 && closed.is_none() {
            self.announced = unsent.min(CHUNK_BYTES);
            websocket::binary(self.announced, &mut self.head);
        } else if let Some(code) = closed.or(self.finishing.then_some(close::NORMAL)) {
            websocket::closing(code, &mut self.head);
            self.web = Some(Web::Over);
        }
    }

    /// After what is still to go, the layers say goodbye.
    pub fn finish(&mut self) {
        self.finishing = true;
    }
}

fn web_in<D>(
    web: &mut Option<Web>,
    head: &mut SmallVec<[u8; 16]>,
    ended: &mut bool,
    bytes: &[u8],
    to: &mut D,
) -> Result<(), String>
where
    D: BufMut + DerefMut<Target = [u8]>,
{
    let rest;
    let mut bytes = bytes;
    if let Some(Web::Asked(gathered, listener)) = web {
        let room = websocket::REQUEST_BYTES_MAX.saturating_sub(gathered.len());
        let before = gathered.len();
        gathered.extend_from_slice(&bytes[..bytes.len().min(room)]);
        let policy = Policy {
            asks_no_password: listener.allow_anonymous || listener.tls.as_ref().is_some_and(|t| t.identity.is_some()),
            origins: &listener.origins,
        };
        match websocket::request(gathered, policy) {
            Request::Unfinished => return Ok(()),
            Request::Refused { answer, why } => {
                head.extend_from_slice(answer.as_bytes());
                *web = Some(Web::Over);
                return Err(why);
            }
            Request::Open { answer, bytes: used } => {
                head.extend_from_slice(answer.as_bytes());
                rest = bytes[used - before..].to_vec();
                bytes = &rest;
                *web = Some(Web::Open(Box::default()));
            }
        }
    }
    match web {
        None => to.put_slice(bytes),
        Some(Web::Open(frames)) => {
            let taken = frames.take_in(bytes, to);
            if let Err(violation) = taken {
                frames.closed = Some(violation.code);
                return Err(violation.text.to_owned());
            }
            *ended |= frames.closed.is_some();
        }
        Some(Web::Asked(..) | Web::Over) => {}
    }
    Ok(())
}

/// What came where a TLS handshake was due.
fn not_tls(raw: &[u8]) -> String {
    let what = match raw {
        [0x10, ..] => "it spoke plain MQTT to a listener with TLS; the client's TLS is off, or it means another port",
        [b'G' | b'P' | b'H' | b'O' | b'D', b'A'..=b'Z', ..] => "it spoke plain HTTP to a listener with TLS",
        _ => "it did not begin with a TLS handshake",
    };
    what.to_owned()
}

fn in_words(e: &rustls::Error) -> String {
    match e {
        rustls::Error::NoCertificatesPresented => {
            "it has shown no client certificate, which this listener needs".to_owned()
        }
        rustls::Error::InvalidCertificate(why) => format!("its client certificate is not accepted: {why}"),
        rustls::Error::AlertReceived(alert) => format!("it refuses this gateway's TLS: alert {alert:?}"),
        other => format!("the TLS handshake failed: {other}"),
    }
}

/// What a client that opened the wrong port began with; for listeners without TLS.
pub fn odd_beginning(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [0x16, 0x03, ..] => Some("it began a TLS handshake on a listener without TLS"),
        [b'G', b'E', b'T', b' ', ..] => {
            Some("it sent an HTTP request to a listener for plain MQTT (websocket = true is for that)")
        }
        [b'P', b'R', b'O', b'X', b'Y', b' ', ..] | [b'\r', b'\n', b'\r', b'\n', 0, ..] => {
            Some("it sent a PROXY protocol header to a listener without proxy_protocol = true")
        }
        _ => None,
    }
}
