//! The way to the remote: TCP, TLS or WebSocket (plain or over TLS), read and written as plain bytes.
//!
//! Certificates and keys are read at each connect, so that a renewed one is used and a missing one is this uplink's
//! fault alone.

use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::rustls::pki_types::pem::{self, PemObject};
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio_rustls::rustls::{self, ClientConfig, RootCertStore};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite;
use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::protocol::{Message, WebSocketConfig};

use super::session::PACKET_IN_BYTES_MAX;
use crate::config::{ClientTls, MqttTransport, MqttUplink};
use crate::status::Counter;

/// Name, TCP, TLS and WebSocket together may take this long.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// One address of several gets this long.
const ADDRESS_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes taken from the system in one read.
const READ_BYTES: usize = 16 << 10;

#[derive(Debug, thiserror::Error)]
pub(super) enum Error {
    #[error("the name {host} does not resolve: {error}; is the network up, is the name right?")]
    Resolve { host: String, error: io::Error },
    #[error("{address} does not answer: {error}")]
    Connect { address: String, error: io::Error },
    #[error("no connection to {address} within {} s", CONNECT_TIMEOUT.as_secs())]
    Timeout { address: String },
    #[error("tls.{key}: {} cannot be read: {error}; put the file there or correct the path", path.display())]
    File {
        key: &'static str,
        path: PathBuf,
        error: String,
    },
    #[error("tls: the certificate and the key do not work: {0}")]
    Identity(rustls::Error),
    #[error("the system has no certificate authorities ({0}); install ca-certificates or set tls.ca")]
    NoAuthorities(String),
    #[error("tls: {0:?} is no server name")]
    ServerName(String),
    #[error("tls with {address}: {error}")]
    Tls { address: String, error: io::Error },
    #[error("WebSocket with {address}: {error}")]
    WebSocket {
        address: String,
        error: Box<tungstenite::Error>,
    },
}

impl Error {
    /// Mended by a file on this machine: worth looking again soon.
    pub(super) fn is_local(&self) -> bool {
        matches!(self, Error::File { .. } | Error::NoAuthorities(_))
    }
}

/// A byte stream of any sort.
trait Duplex: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Duplex for T {}

pub(super) struct Wire {
    line: Line,
    /// Something was handed on and not flushed.
    dirty: bool,
}

enum Line {
    Bytes(Box<dyn Duplex>),
    Frames(Box<WebSocketStream<Box<dyn Duplex>>>),
}

/// What one [`Wire::turn`] did.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// Bytes left the output, or bytes came in.
    Moved { read: bool, wrote: bool },
    /// The remote closed its side.
    Closed,
}

impl Wire {
    pub(super) async fn connect(to: &MqttUplink, bytes_out: Counter, bytes_in: Counter) -> Result<Wire, Error> {
        let address = format!("{}:{}", to.host, to.port);
        match tokio::time::timeout(
            CONNECT_TIMEOUT,
            Wire::connect_unbounded(to, &address, bytes_out, bytes_in),
        )
        .await
        {
            Ok(result) => result,
            Err(_) => Err(Error::Timeout { address }),
        }
    }

    async fn connect_unbounded(
        to: &MqttUplink,
        address: &str,
        bytes_out: Counter,
        bytes_in: Counter,
    ) -> Result<Wire, Error> {
        // Files first: they are this machine's fault and named even while the network is down.
        let tls = match to.transport {
            MqttTransport::Tls | MqttTransport::Wss => Some(tls_config(to.tls.clone().unwrap_or_default()).await?),
            MqttTransport::Tcp | MqttTransport::Ws => None,
        };
        let tcp = Counted {
            tcp: tcp(to, address).await?,
            bytes_out,
            bytes_in,
        };
        let stream: Box<dyn Duplex> = match tls {
            None => Box::new(tcp),
            Some(config) => Box::new(tls_stream(to, address, config, tcp).await?),
        };
        let line = match to.transport {
            MqttTransport::Tcp | MqttTransport::Tls => Line::Bytes(stream),
            MqttTransport::Ws | MqttTransport::Wss => Line::Frames(Box::new(web_socket(to, address, stream).await?)),
        };
        Ok(Wire { line, dirty: false })
    }

    /// Writes as much of `out` as goes, reads what is there into `inbox` (where `read` says so), and returns as soon as
    /// anything moved. Cancel-safe: what was taken from `out` is on its way, what came is in `inbox`.
    pub(super) async fn turn(&mut self, out: &mut BytesMut, inbox: &mut BytesMut, read: bool) -> io::Result<Turn> {
        std::future::poll_fn(|context| self.poll_turn(context, out, inbox, read)).await
    }

    fn poll_turn(
        &mut self,
        context: &mut Context<'_>,
        out: &mut BytesMut,
        inbox: &mut BytesMut,
        read: bool,
    ) -> Poll<io::Result<Turn>> {
        let before = out.len();
        // Not ready to write is no reason not to read.
        let _ = self.poll_write(context, out)?;
        let wrote = out.len() < before;
        let mut got = false;
        if read {
            match self.poll_read(context, inbox)? {
                Poll::Ready(true) => got = true,
                Poll::Ready(false) => return Poll::Ready(Ok(Turn::Closed)),
                Poll::Pending => {}
            }
        }
        if wrote || got {
            Poll::Ready(Ok(Turn::Moved { read: got, wrote }))
        } else {
            Poll::Pending
        }
    }

    fn poll_write(&mut self, context: &mut Context<'_>, out: &mut BytesMut) -> Poll<io::Result<()>> {
        match &mut self.line {
            Line::Bytes(stream) => {
                while !out.is_empty() {
                    let n = ready!(Pin::new(&mut *stream).poll_write(context, out))?;
                    if n == 0 {
                        return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
                    }
                    out.advance(n);
                    self.dirty = true;
                }
                if self.dirty {
                    ready!(Pin::new(stream).poll_flush(context))?;
                    self.dirty = false;
                }
            }
            Line::Frames(socket) => {
                // One frame at a time: the next is not begun before the last has left.
                if self.dirty {
                    ready!(Pin::new(&mut *socket).poll_flush(context)).map_err(into_io)?;
                    self.dirty = false;
                }
                if !out.is_empty() {
                    ready!(Pin::new(&mut *socket).poll_ready(context)).map_err(into_io)?;
                    let frame = Message::Binary(out.split().freeze());
                    Pin::new(&mut *socket).start_send(frame).map_err(into_io)?;
                    self.dirty = true;
                    ready!(Pin::new(socket).poll_flush(context)).map_err(into_io)?;
                    self.dirty = false;
                }
            }
        }
        Poll::Ready(Ok(()))
    }

    /// True: bytes came. False: the end.
    fn poll_read(&mut self, context: &mut Context<'_>, inbox: &mut BytesMut) -> Poll<io::Result<bool>> {
        match &mut self.line {
            Line::Bytes(stream) => {
                let mut chunk = [std::mem::MaybeUninit::uninit(); READ_BYTES];
                let mut buffer = ReadBuf::uninit(&mut chunk);
                ready!(Pin::new(stream).poll_read(context, &mut buffer))?;
                inbox.extend_from_slice(buffer.filled());
                Poll::Ready(Ok(!buffer.filled().is_empty()))
            }
            Line::Frames(socket) => loop {
                match ready!(Pin::new(&mut *socket).poll_next(context)) {
                    Some(Ok(Message::Binary(bytes))) if bytes.is_empty() => {}
                    Some(Ok(Message::Binary(bytes))) => {
                        inbox.extend_from_slice(&bytes);
                        return Poll::Ready(Ok(true));
                    }
                    // The library has queued the pong; the next write or flush takes it along.
                    Some(Ok(Message::Ping(_))) => self.dirty = true,
                    Some(Ok(Message::Pong(_) | Message::Frame(_))) => {}
                    Some(Ok(Message::Text(_))) => {
                        return Poll::Ready(Err(io::Error::new(
                            io::ErrorKind::InvalidData,
                            "the remote sent a WebSocket text frame, where MQTT uses binary ones",
                        )));
                    }
                    Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(false)),
                    Some(Err(error)) => return Poll::Ready(Err(into_io(error))),
                }
            },
        }
    }

    /// Writes the rest of `out` and ends the connection in order; bounded by the caller.
    pub(super) async fn finish(mut self, out: &mut BytesMut) -> io::Result<()> {
        std::future::poll_fn(|context| self.poll_write(context, out)).await?;
        match &mut self.line {
            Line::Bytes(stream) => std::future::poll_fn(|c| Pin::new(&mut *stream).poll_shutdown(c)).await,
            Line::Frames(socket) => std::future::poll_fn(|c| Pin::new(&mut *socket).poll_close(c))
                .await
                .map_err(into_io),
        }
    }
}

fn into_io(error: tungstenite::Error) -> io::Error {
    match error {
        tungstenite::Error::Io(error) => error,
        other => io::Error::other(other),
    }
}

async fn tcp(to: &MqttUplink, address: &str) -> Result<TcpStream, Error> {
    let resolve = |error| Error::Resolve {
        host: to.host.clone(),
        error,
    };
    let mut last = None;
    for socket_address in tokio::net::lookup_host((to.host.as_str(), to.port))
        .await
        .map_err(resolve)?
    {
        match tokio::time::timeout(ADDRESS_TIMEOUT, TcpStream::connect(socket_address)).await {
            Ok(Ok(stream)) => {
                // Everything is written in as few writes as possible anyway.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Ok(Err(error)) => last = Some(error),
            Err(_) => last = Some(io::ErrorKind::TimedOut.into()),
        }
    }
    match last {
        Some(error) => Err(Error::Connect {
            address: address.to_owned(),
            error,
        }),
        None => Err(resolve(io::Error::other("it has no address"))),
    }
}

async fn tls_stream(
    to: &MqttUplink,
    address: &str,
    config: Arc<ClientConfig>,
    tcp: Counted,
) -> Result<TlsStream<Counted>, Error> {
    let name = to
        .tls
        .as_ref()
        .and_then(|t| t.server_name.clone())
        .unwrap_or_else(|| to.host.clone());
    let server = ServerName::try_from(name.clone()).map_err(|_| Error::ServerName(name))?;
    let failed = |error| Error::Tls {
        address: address.to_owned(),
        error,
    };
    TlsConnector::from(config).connect(server, tcp).await.map_err(failed)
}

async fn web_socket(
    to: &MqttUplink,
    address: &str,
    stream: Box<dyn Duplex>,
) -> Result<WebSocketStream<Box<dyn Duplex>>, Error> {
    let failed = |error| Error::WebSocket {
        address: address.to_owned(),
        error: Box::new(error),
    };
    let scheme = if to.transport == MqttTransport::Wss {
        "wss"
    } else {
        "ws"
    };
    let host = if to.host.contains(':') {
        format!("[{}]", to.host)
    } else {
        to.host.clone()
    };
    let url = format!("{scheme}://{host}:{}{}", to.port, to.ws_path);
    let mut request = url.into_client_request().map_err(failed)?;
    request
        .headers_mut()
        .insert("Sec-WebSocket-Protocol", HeaderValue::from_static("mqtt"));
    let mut config = WebSocketConfig::default();
    // A packet may span frames and a frame hold many packets; either way what is held is bounded.
    config.max_message_size = Some(2 * PACKET_IN_BYTES_MAX as usize);
    config.max_frame_size = config.max_message_size;
    config.read_buffer_size = READ_BYTES;
    let connected = tokio_tungstenite::client_async_with_config(request, stream, Some(config)).await;
    connected.map(|(socket, _)| socket).map_err(failed)
}

/// Reads the files; they may lie on a slow disk, so not on the network's thread.
async fn tls_config(tls: ClientTls) -> Result<Arc<ClientConfig>, Error> {
    match tokio::task::spawn_blocking(move || build_tls_config(&tls)).await {
        Ok(result) => result.map(Arc::new),
        Err(error) => Err(Error::NoAuthorities(error.to_string())),
    }
}

fn build_tls_config(tls: &ClientTls) -> Result<ClientConfig, Error> {
    let mut roots = RootCertStore::empty();
    match &tls.ca {
        Some(path) => {
            let certificates = certificates("ca", path)?;
            let (added, _) = roots.add_parsable_certificates(certificates);
            if added == 0 {
                return Err(file_error("ca", path, "none of its certificates can be used"));
            }
        }
        None => {
            let found = rustls_native_certs::load_native_certs();
            let (added, _) = roots.add_parsable_certificates(found.certs);
            if added == 0 {
                let why = found
                    .errors
                    .first()
                    .map_or_else(|| "none found".to_owned(), ToString::to_string);
                return Err(Error::NoAuthorities(why));
            }
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(Error::Identity)?
        .with_root_certificates(roots);
    match (&tls.cert, &tls.key) {
        (Some(cert), Some(key)) => {
            let chain = certificates("cert", cert)?;
            let key = PrivateKeyDer::from_pem_file(key).map_err(|e| pem_error("key", key, e, "private key"))?;
            builder.with_client_auth_cert(chain, key).map_err(Error::Identity)
        }
        (Some(path), None) => Err(file_error("key", path, "tls.cert needs a tls.key beside it")),
        (None, _) => Ok(builder.with_no_client_auth()),
    }
}

fn certificates(key: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let certificates: Vec<_> = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|e| pem_error(key, path, e, "certificate"))?;
    if certificates.is_empty() {
        return Err(file_error(key, path, "it contains no PEM certificate"));
    }
    Ok(certificates)
}

fn pem_error(key: &'static str, path: &Path, error: pem::Error, wanted: &str) -> Error {
    match error {
        pem::Error::Io(error) => file_error(key, path, &error.to_string()),
        pem::Error::NoItemsFound => file_error(key, path, &format!("it contains no PEM {wanted}")),
        other => file_error(key, path, &other.to_string()),
    }
}

fn file_error(key: &'static str, path: &Path, error: &str) -> Error {
    Error::File {
        key,
        path: path.to_owned(),
        error: error.to_owned(),
    }
}

/// TCP that counts its payload.
struct Counted {
    tcp: TcpStream,
    bytes_out: Counter,
    bytes_in: Counter,
}

impl AsyncRead for Counted {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = into.filled().len();
        ready!(Pin::new(&mut this.tcp).poll_read(context, into))?;
        this.bytes_in.add((into.filled().len() - before) as u64);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let n = ready!(Pin::new(&mut this.tcp).poll_write(context, bytes))?;
        this.bytes_out.add(n as u64);
        Poll::Ready(Ok(n))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().tcp).poll_shutdown(context)
    }
}
