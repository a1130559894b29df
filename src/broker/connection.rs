//! One connection: a task that owns the socket and its timers, and nothing of the protocol.
//!
//! All connections read into one buffer of the thread (a buffer each would be 48 MB for 5,000 idle clients); only the
//! beginning of an unfinished packet is kept for a connection. A connection whose packet has to wait (a full stream
//! towards 3.1.1, a log that is behind) is not read from: back-pressure is TCP's.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::ops::DerefMut;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::AsyncReadExt;
use tokio::sync::Notify;
use tokio_util::io::poll_read_buf;
use tracing::{debug, info};

use super::aliases::Aliases;
use super::codec::{self, ConnAck, Version, Wire, WireError, reason};
use super::core::{OUT_BYTES_MAX_TO_READ, Outcome, TAKEN_OVER, granted_keep_alive, loss};
use super::listen::is_served;
use super::pace::Pace;
use super::router::SessionId;
use super::sys::{self, Tally};
use super::transport::{Accepted, Entrance, Layers, Peer, Sink, Source, odd_beginning, proxy};
use super::unauthenticated::Place;
use super::{Greeting, Shared, auth};
use crate::certificate::server::ServerConfig;
use crate::certificate::{self, NameKind, Validity};
use crate::clock::{self, Instant, Timestamp};
use crate::config::{Listener, SubscribeRefusal};
use crate::log::changes::LossRow;
use crate::message::Message;

/// What one read takes at most.
pub const READ_BYTES: usize = 64 << 10;
/// What one connection has done in a turn; then the others come, and it goes on. 64 KiB may be 32,768 packets.
const PACKETS_A_TURN: u64 = 512;
/// Before a client has said who it is.
const CONNECT_BYTES_MAX: u32 = 256 << 10;
/// For all that comes before a client is let in: PROXY header, TLS, WebSocket, CONNECT and the check of its password.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How long the last bytes to a client that is being closed may take.
const LAST_BYTES_DEADLINE: Duration = Duration::from_secs(1);

/// A connection as the core sees it.
pub struct Conn {
    sink: Sink,
    /// What lies over the socket; None for plain TCP.
    layers: Option<Box<RefCell<Layers>>>,
    pub peer: Peer,
    /// Which listener it belongs to.
    pub entrance: RefCell<Entrance>,
    pub wire: RefCell<Wire>,
    pub out: RefCell<BytesMut>,
    wake: Notify,
    pub is_dirty: Cell<bool>,
    /// Something was not put into `out` because it was full: its session is pumped once it is empty.
    pub wants_pump: Cell<bool>,
    /// Answers that wait for a commit.
    pub owed: Cell<u32>,
    /// PUBACKs among them.
    pub unacknowledged: Cell<u32>,
    /// QoS 1 and 2 messages that may be in flight to the client.
    pub window: Cell<u16>,
    pub packet_bytes_max: u32,
    pub session: Cell<SessionId>,
    pub since: Timestamp,
    pub dropped: Cell<u64>,
    /// How often it was made to wait by its rate.
    pub throttled: Cell<u64>,
    /// How fast it may send; None: as fast as it can.
    pace: RefCell<Option<Box<Pace>>>,
    /// What one read takes at most.
    read_bytes: Cell<usize>,
    tally: Rc<Tally>,
    pub lost: RefCell<Lost>,
    /// What the client's topic aliases stand for.
    pub aliases: RefCell<Vec<Option<bytestring::ByteString>>>,
    /// Ours towards the client.
    pub aliases_out: RefCell<Aliases>,
    /// The longest keep-alive that its listener takes.
    pub keep_alive_max_s: Option<u16>,
    /// A refused SUBSCRIBE is told why (MQTT 5).
    pub subscribe_refusal: SubscribeRefusal,
    closing: RefCell<Option<String>>,
}

impl Conn {
    pub fn version(&self) -> Version {
        self.wire.borrow().version()
    }

    pub fn set_pace(&self, pace: Option<Pace>) {
        let most = pace.as_ref().map_or(READ_BYTES, |p| p.read_bytes(READ_BYTES));
        self.read_bytes.set(most);
        *self.pace.borrow_mut() = pace.map(Box::new);
    }

    /// Ends the connection after the bytes that are still to go.
    pub fn close(&self, why: &str) {
        self.closing.borrow_mut().get_or_insert_with(|| why.to_owned());
        self.wake.notify_one();
    }

    fn is_closing(&self) -> bool {
        self.closing.borrow().is_some()
    }

    /// Writes what the socket takes. True where nothing is left.
    pub fn flush(&self) -> std::io::Result<bool> {
        self.is_dirty.set(false);
        sys::add(&self.tally.packets_out, u64::from(self.wire.borrow().take_sent()));
        let mut out = self.out.borrow_mut();
        if let Some(layers) = &self.layers {
            return layers.borrow_mut().flush(&self.sink, &mut out);
        }
        while !out.is_empty() {
            match self.sink.try_write(&out) {
                Ok(0) => return Err(std::io::ErrorKind::WriteZero.into()),
                Ok(n) => {
                    sys::add(&self.tally.bytes_out, n as u64);
                    out.advance(n);
                }
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        // An idle connection keeps no buffer.
        *out = BytesMut::new();
        Ok(true)
    }

    fn is_unsent(&self) -> bool {
        let out = self.out.borrow();
        match &self.layers {
            None => !out.is_empty(),
            Some(layers) => layers.borrow().is_unsent(&out),
        }
    }

    fn is_handshaking(&self) -> bool {
        self.layers.as_ref().is_some_and(|l| l.borrow().is_handshaking())
    }

    /// Flushes for the core; what the socket does not take, or an error, is the task's.
    pub fn flush_or_wake(&self) {
        if !matches!(self.flush(), Ok(true)) || self.is_closing() || self.wants_pump.get() {
            self.wake.notify_one();
        }
    }
}

/// What a client lost by reading too slowly, since the ledger was told last.
#[derive(Debug, Default)]
pub struct Lost {
    count: u64,
    bytes: u64,
    oldest: i64,
    newest: i64,
}

impl Lost {
    pub fn add(&mut self, message: &Message, now: Timestamp) {
        if self.count == 0 {
            self.oldest = now.millis();
        }
        self.newest = now.millis();
        self.count += 1;
        self.bytes += message.size_bytes() as u64;
    }

    /// One entry for all of it; the messages were never logged, so it names no sequence.
    pub fn row(&self, client_id: &str) -> Option<LossRow> {
        if self.count == 0 {
            return None;
        }
        let source = "(all)".into();
        let mut row = loss(
            &format!("session:{client_id}"),
            &source,
            "slow",
            self.bytes,
            Timestamp::from_millis(self.newest),
        );
        row.count = self.count;
        row.oldest = self.oldest;
        Some(row)
    }
}

/// Detaches the session however the task ends, a panic included.
struct Attached<'a> {
    shared: &'a Rc<Shared>,
    conn: Rc<Conn>,
    id: SessionId,
    clean: bool,
}

impl Drop for Attached<'_> {
    fn drop(&mut self) {
        let Ok(mut core) = self.shared.core.try_borrow_mut() else {
            return;
        };
        let mut batch = self.shared.log.turn();
        core.disconnected(self.id, &self.conn, self.clean, &mut batch);
        drop(batch);
        drop(core);
        self.shared.after();
    }
}

/// A connection that was taken in, and how its listener was set at that moment.
pub struct Guest {
    pub stream: Accepted,
    pub peer: Peer,
    pub listener: Rc<Listener>,
    pub tls: Option<Arc<ServerConfig>>,
    pub place: Place,
}

/// Serves one accepted connection to its end.
pub async fn run(shared: Rc<Shared>, guest: Guest) {
    let deadline = tokio::time::Instant::from_std(clock::monotonic() + CONNECT_DEADLINE);
    let Guest {
        stream,
        mut peer,
        listener,
        tls,
        place,
    } = guest;
    let entrance = Entrance {
        local: stream.local(&listener.bind),
        tls: tls.is_some(),
        websocket: listener.websocket,
        proxy_protocol: listener.proxy_protocol,
        has_certificate: false,
    };
    let (mut source, sink) = stream.split();
    if listener.proxy_protocol {
        // In a box: the others' tasks are no larger for it.
        match Box::pin(proxied(&mut source, &place, deadline)).await {
            Ok(from) => peer = from.map_or(peer, Peer::Address),
            Err(why) => return told(&shared, peer, &listener, why.as_deref()),
        }
    }
    let conn = Rc::new(Conn {
        sink,
        layers: Layers::of(&listener, tls),
        peer,
        entrance: RefCell::new(entrance),
        wire: RefCell::new(Wire::new(listener.packet_bytes_max.min(CONNECT_BYTES_MAX))),
        out: RefCell::new(BytesMut::new()),
        wake: Notify::new(),
        is_dirty: Cell::new(false),
        wants_pump: Cell::new(false),
        owed: Cell::new(0),
        unacknowledged: Cell::new(0),
        window: Cell::new(0),
        packet_bytes_max: listener.packet_bytes_max,
        session: Cell::new(0),
        since: clock::wall(),
        dropped: Cell::new(0),
        throttled: Cell::new(0),
        pace: RefCell::new(None),
        read_bytes: Cell::new(READ_BYTES),
        tally: Rc::clone(&shared.tally),
        lost: RefCell::default(),
        aliases: RefCell::default(),
        aliases_out: RefCell::default(),
        keep_alive_max_s: listener.keep_alive_max_s,
        subscribe_refusal: listener.subscribe_refusal,
        closing: RefCell::new(None),
    });
    sys::add(&shared.tally.sockets, 1);
    let mut reader = Reader {
        conn: Rc::clone(&conn),
        source,
        rest: Vec::new(),
        held: None,
        has_more: false,
        last_read: 0,
        paused: None,
    };
    // In a box that is given back once it is through: what stays for an idle client is what serves it.
    let connected = Box::pin(reader.connect(&shared, &listener, place));
    let end = match tokio::time::timeout_at(deadline, connected).await {
        Ok(Ok((id, keep_alive_s, client_id))) => {
            debug!(client = %client_id, %peer, "connected");
            conn.session.set(id);
            let mut attached = Attached {
                shared: &shared,
                conn: Rc::clone(&conn),
                id,
                clean: false,
            };
            let end = reader.serve(&shared, id, keep_alive_s).await;
            attached.clean = matches!(end, End::Goodbye);
            drop(attached);
            match &end {
                End::Goodbye => debug!(client = %client_id, %peer, "disconnected"),
                End::Gone(why) if why == TAKEN_OVER => debug!(client = %client_id, %peer, why, "connection ended"),
                End::Gone(why) | End::Refused(WireError { text: why, .. }) => {
                    let key = format!("{client_id}: {why}");
                    if let Some(more) = shared.repeats.borrow_mut().note(&key, clock::monotonic()) {
                        info!(client = %client_id, %peer, %why, more, "connection ended");
                    }
                }
            }
            end
        }
        Ok(Err(end)) => end,
        Err(_) => {
            let stage = conn.layers.as_ref().map_or("before CONNECT", |l| l.borrow().stage());
            let why = format!(
                "it was not through within {} s: it stopped {stage}",
                CONNECT_DEADLINE.as_secs()
            );
            return told(&shared, peer, &listener, Some(&why));
        }
    };
    if let End::Refused(e) = &end {
        let mut wire = conn.wire.borrow_mut();
        wire.disconnect(&mut conn.out.borrow_mut(), e.reason, &e.text);
    }
    let _ = tokio::time::timeout(LAST_BYTES_DEADLINE, last_bytes(&conn, &mut reader.source)).await;
}

/// Says once a minute why connections end before CONNECT; None: for no reason worth a line.
fn told(shared: &Shared, peer: Peer, listener: &Listener, why: Option<&str>) {
    let Some(why) = why else { return };
    let key = format!("{}: {why}", listener.bind);
    if let Some(more) = shared.repeats.borrow_mut().note(&key, clock::monotonic()) {
        info!(%peer, listener = %listener.bind, why, more, "connection refused");
    }
}

/// The PROXY header, and not a byte more. None: the proxy's own connection.
async fn proxied(
    source: &mut Source,
    place: &Place,
    deadline: tokio::time::Instant,
) -> Result<Option<SocketAddr>, Option<String>> {
    let read = async {
        let mut fixed = [0; proxy::FIXED_BYTES];
        // Whoever speaks something else may send less than a whole header, and wait.
        let (begin, more) = fixed.split_at_mut(proxy::BEGIN_BYTES);
        source.read_exact(begin).await.map_err(|_| None::<String>)?;
        proxy::begins(begin)?;
        source.read_exact(more).await.map_err(|_| None::<String>)?;
        let mut rest = vec![0; proxy::rest_bytes(&fixed)?];
        source.read_exact(&mut rest).await.map_err(|_| None::<String>)?;
        Ok(proxy::source(&fixed, &rest)?)
    };
    tokio::select! {
        read = tokio::time::timeout_at(deadline, read) => {
            read.unwrap_or_else(|_| Err(Some("it stopped in the PROXY protocol header".to_owned())))
        }
        () = place.lost() => Err(Some(TURNED_AWAY.to_owned())),
    }
}

const TURNED_AWAY: &str =
    "too many connections that have not said who they are, and nothing came from this one for the longest time";

/// Sends what is left, then ends our side, so that the client reads it all before it sees the end.
async fn last_bytes(conn: &Conn, source: &mut Source) {
    if let Some(layers) = &conn.layers {
        layers.borrow_mut().finish();
    }
    while let Ok(false) = conn.flush() {
        if conn.sink.writable().await.is_err() {
            return;
        }
    }
    conn.sink.end();
    // What the client still sends is read and thrown away: closing over unread bytes would reset what it has not read.
    // Not in the task itself: it would be the greater part of an idle connection.
    let mut scrap = vec![0; 4096];
    while matches!(source.read(&mut scrap).await, Ok(n) if n > 0) {}
}

enum End {
    /// DISCONNECT came: the will is not published.
    Goodbye,
    Gone(String),
    Refused(WireError),
}

struct Reader {
    conn: Rc<Conn>,
    source: Source,
    /// The beginning of a packet that is not here whole.
    rest: Vec<u8>,
    /// A packet that has to wait for a commit.
    held: Option<codec::Packet>,
    /// There may be whole packets in `rest`: the turn was over.
    has_more: bool,
    /// What the last read brought.
    last_read: usize,
    /// Its rate is used up: nothing more is taken from it until then.
    paused: Option<Instant>,
}

impl Reader {
    /// Reads once, behind what was left over, into the thread's buffer; false: the client has closed. Polling the socket
    /// itself spares a second system call a read: a read that does not fill the buffer has emptied the socket.
    fn poll_read(
        &mut self,
        cx: &mut Context<'_>,
        shared: &Shared,
        buffer: &mut BytesMut,
    ) -> Poll<std::io::Result<bool>> {
        let most = self.conn.read_bytes.get();
        let wanted = Wire::frame_bytes(&self.rest).unwrap_or(0);
        buffer.clear();
        if wanted > READ_BYTES && self.rest.len() < wanted {
            // A large packet grows in its own buffer, by what has really arrived.
            self.rest.reserve((wanted - self.rest.len()).min(READ_BYTES));
            let read = match &self.conn.layers {
                None => ready!(poll_read_buf(
                    Pin::new(&mut self.source),
                    cx,
                    &mut (&mut self.rest).limit(most)
                ))?,
                Some(layers) => ready!(poll_layers(
                    &self.conn,
                    layers,
                    &mut self.source,
                    cx,
                    shared,
                    &mut self.rest
                ))?,
            };
            self.last_read = read;
            if self.rest.len() >= wanted {
                buffer.extend_from_slice(&self.rest);
                self.rest = Vec::new();
            }
            return Poll::Ready(Ok(read > 0));
        }
        buffer.reserve(self.rest.len() + READ_BYTES + 16);
        buffer.extend_from_slice(&self.rest);
        let read = match &self.conn.layers {
            None => poll_read_buf(Pin::new(&mut self.source), cx, &mut (&mut *buffer).limit(most)),
            Some(layers) => poll_layers(&self.conn, layers, &mut self.source, cx, shared, buffer),
        };
        if let Poll::Ready(Ok(n @ 1..)) = read {
            self.last_read = n;
            self.rest.clear();
        } else {
            buffer.clear();
        }
        read.map_ok(|n| n > 0)
    }

    /// The bytes are in the thread's buffer when this returns, and are to be taken out of it before the next await.
    async fn read(&mut self, shared: &Shared) -> std::io::Result<bool> {
        poll_fn(|cx| self.poll_read(cx, shared, &mut shared.buffer.borrow_mut())).await
    }

    /// A step of a TLS handshake. One at a time, and the sockets are looked at between two: what others send is not kept
    /// waiting by thousands of signatures. True where nothing came, too.
    async fn read_in_turn(&mut self, shared: &Shared, place: &Place) -> std::io::Result<bool> {
        tokio::select! {
            ready = self.source.readable() => ready?,
            ready = self.conn.sink.writable(), if self.conn.is_unsent() => {
                ready?;
                self.conn.flush()?;
                return Ok(true);
            }
        }
        place.waits_for_us();
        let _turn = shared.handshakes.acquire().await;
        tokio::task::yield_now().await;
        poll_fn(|cx| {
            let read = self.poll_read(cx, shared, &mut shared.buffer.borrow_mut());
            Poll::Ready(match read {
                Poll::Ready(read) => read,
                Poll::Pending => Ok(true),
            })
        })
        .await
    }

    /// Reads until a CONNECT is here, or says why none comes.
    async fn greeting(
        &mut self,
        shared: &Rc<Shared>,
        listener: &Listener,
        place: &Place,
    ) -> Result<codec::Connect, End> {
        let mut is_first = true;
        loop {
            let read = match self.conn.is_handshaking() {
                true => self.read_in_turn(shared, place).await,
                false => self.read(shared).await,
            };
            let mut buffer = shared.buffer.borrow_mut();
            // What was left over is in the buffer again.
            let layered = self.conn.layers.as_ref().map_or(0, |l| l.borrow().received);
            place.heard(buffer.len().max(self.rest.len()).max(layered));
            match read {
                Ok(true) => sys::add(&shared.tally.bytes_in, std::mem::take(&mut self.last_read) as u64),
                Ok(false) => return Err(End::Gone("closed before a CONNECT".into())),
                Err(e) => {
                    if e.kind() == std::io::ErrorKind::InvalidData {
                        told(shared, self.conn.peer, listener, Some(&e.to_string()));
                    }
                    return Err(End::Gone(e.to_string()));
                }
            }
            if std::mem::replace(&mut is_first, buffer.is_empty())
                && self.conn.layers.is_none()
                && let Some(why) = odd_beginning(&buffer)
            {
                told(shared, self.conn.peer, listener, Some(why));
                return Err(End::Gone(why.into()));
            }
            let decoded = self.conn.wire.borrow_mut().decode(&mut buffer);
            match decoded {
                Ok(Some(codec::Packet::Connect(connect))) => {
                    sys::add(&shared.tally.packets_in, 1);
                    sys::add(&shared.tally.connects, 1);
                    codec::keep_rest(&mut buffer, &mut self.rest);
                    return Ok(*connect);
                }
                Ok(Some(_)) => return Err(End::Gone("the first packet is not a CONNECT".into())),
                Ok(None) if buffer.is_empty() => {}
                Ok(None) => codec::keep_rest(&mut buffer, &mut self.rest),
                Err(e) => return Err(self.refuse(shared, e)),
            }
        }
    }

    async fn connect(
        &mut self,
        shared: &Rc<Shared>,
        listener: &Listener,
        place: Place,
    ) -> Result<(SessionId, u16, String), End> {
        let _greeting = Greeting::begin(shared);
        let mut connect = tokio::select! {
            connect = self.greeting(shared, listener, &place) => connect?,
            () = place.lost() => {
                told(shared, self.conn.peer, listener, Some(TURNED_AWAY));
                return Err(End::Gone(TURNED_AWAY.into()));
            }
        };
        // What it waits for from now on is ours to do.
        drop(place);
        if let Err(e) = self.admit(shared, listener, &mut connect).await {
            return Err(self.refuse(shared, e));
        }
        let keep_alive_s = granted_keep_alive(&connect, listener.keep_alive_max_s);
        let client_id = connect.client_id.to_string();
        let mut core = shared.core.borrow_mut();
        let mut batch = shared.log.turn();
        let connected = core.connect(&self.conn, connect, &mut batch);
        drop(batch);
        drop(core);
        match connected {
            Ok(id) => {
                self.conn.session.set(id);
                shared.after();
                Ok((id, keep_alive_s, client_id))
            }
            Err(e) => Err(self.refuse(shared, e)),
        }
    }

    async fn admit(
        &self,
        shared: &Rc<Shared>,
        listener: &Listener,
        connect: &mut codec::Connect,
    ) -> Result<(), WireError> {
        if shared.core.borrow().is_draining() {
            return Err(WireError::new(reason::SERVER_SHUTTING_DOWN, "the gateway stops"));
        }
        // Those that have not said who they are have a bound of their own.
        let known = (shared.connections.get() as usize).saturating_sub(shared.unauthenticated.count());
        if known > listener.connections_max as usize {
            return Err(WireError::new(
                reason::SERVER_BUSY,
                "too many connections; raise max_connections of the listener",
            ));
        }
        if connect.has_authentication_method {
            return Err(WireError::new(
                reason::BAD_AUTHENTICATION_METHOD,
                "extended authentication is not supported",
            ));
        }
        match self.certificate_user(shared, listener)? {
            Some(user) => connect.username = Some(user.into()),
            None => auth::check(shared, listener, self.conn.peer.ip(), connect).await?,
        }
        // A reload may have come since it was accepted.
        let is_anonymous = connect.username.is_none();
        if is_served(&shared.listeners.borrow(), &self.conn.entrance.borrow(), is_anonymous) {
            return Ok(());
        }
        let why = "its listener takes such clients no longer";
        Err(WireError::new(reason::NOT_AUTHORIZED, why))
    }

    /// The user that the client's certificate names, where the listener takes it from there. What CONNECT says of a user is
    /// passed over then.
    fn certificate_user(&self, shared: &Shared, listener: &Listener) -> Result<Option<String>, WireError> {
        let Some(layers) = self.conn.layers.as_ref().map(|l| l.borrow()) else {
            return Ok(None);
        };
        let Some(certificate) = layers.certificate() else {
            return Ok(None);
        };
        self.conn.entrance.borrow_mut().has_certificate = true;
        let not_authorized = |why: String| WireError::new(reason::NOT_AUTHORIZED, why);
        // One that comes back by a ticket has shown its certificate hours ago.
        if Validity::of(certificate).is_some_and(|v| v.not_after < clock::wall()) {
            return Err(not_authorized("the client certificate has expired".to_owned()));
        }
        let Some(kind) = listener.tls.as_ref().and_then(|tls| tls.identity) else {
            return Ok(None);
        };
        let mut names = certificate::names(certificate, kind);
        let user = match kind {
            NameKind::CommonName if names.len() == 1 => names.pop(),
            NameKind::CommonName => None,
            NameKind::SanDns | NameKind::SanUri => names.into_iter().next(),
        };
        let Some(user) = user else {
            return Err(not_authorized(format!("the client certificate has no usable {kind}")));
        };
        if !shared.passwords.knows(&user) {
            let why = format!("the client certificate names {user:?}, and there is no [[user]] of that name");
            return Err(not_authorized(why));
        }
        Ok(Some(user))
    }

    /// A CONNACK with the reason; the connection is closed after it.
    fn refuse(&self, shared: &Rc<Shared>, e: WireError) -> End {
        let conn = &self.conn;
        // 3.1.1 has no code for these, and its code 3 would have the client try again for ever.
        let is_unnamed = matches!(
            e.reason,
            reason::MALFORMED | reason::PROTOCOL_ERROR | reason::TOPIC_NAME_INVALID
        );
        if is_unnamed && !conn.version().is_v5() {
            return End::Gone(e.text);
        }
        let ack = ConnAck {
            reason_string: Some(e.text.clone()),
            ..ConnAck::default()
        };
        conn.wire
            .borrow_mut()
            .connack(&mut conn.out.borrow_mut(), e.reason, &ack);
        if let Some(more) = shared.repeats.borrow_mut().note(&e.text, clock::monotonic()) {
            info!(peer = %conn.peer, why = %e.text, more, "connection refused");
        }
        End::Gone(e.text)
    }

    async fn serve(&mut self, shared: &Rc<Shared>, id: SessionId, keep_alive_s: u16) -> End {
        let conn = Rc::clone(&self.conn);
        let allowed = Duration::from_millis(u64::from(keep_alive_s) * 1_500);
        let mut heard = clock::monotonic();
        let alarm = tokio::time::sleep(if keep_alive_s == 0 { FOREVER } else { allowed });
        tokio::pin!(alarm);
        // What came behind the CONNECT in the same read.
        if !self.rest.is_empty()
            && let Some(end) = self.go_on(shared, id)
        {
            return end;
        }
        loop {
            if conn.is_closing() {
                let why = conn.closing.borrow().clone().unwrap_or_default();
                return End::Gone(why);
            }
            if let Some(until) = self.paused {
                alarm.as_mut().reset(until.into());
            }
            let unsent_bytes = conn.out.borrow().len();
            let unsent = conn.is_unsent();
            let is_choked = unsent_bytes > OUT_BYTES_MAX_TO_READ;
            let waits = self.held.is_some() || self.paused.is_some() || shared.log.is_congested();
            tokio::select! {
                read = self.read(shared), if !waits && !is_choked && !self.has_more => {
                    match read {
                        Ok(true) => heard = clock::monotonic(),
                        Ok(false) => return End::Gone("the client closed the connection".into()),
                        Err(e) => return End::Gone(e.to_string()),
                    }
                    if let Some(end) = self.arrived(shared, id, heard) {
                        return end;
                    }
                }
                () = tokio::task::yield_now(), if !waits && !is_choked && self.has_more => {
                    if let Some(end) = self.go_on(shared, id) {
                        return end;
                    }
                }
                () = shared.committed.notified(), if waits => {
                    heard = clock::monotonic();
                    if let Some(end) = self.try_held(shared, id) {
                        return end;
                    }
                }
                ready = conn.sink.writable(), if unsent => {
                    if let Err(e) = ready.and_then(|()| conn.flush()) {
                        return End::Gone(e.to_string());
                    }
                    if is_choked {
                        // It takes what it is sent, so it is there; what it says is not read just now.
                        heard = clock::monotonic();
                    }
                    conn.wants_pump.set(false);
                    shared.pump(id);
                }
                () = conn.wake.notified() => {
                    if conn.out.borrow().is_empty() && conn.wants_pump.replace(false) {
                        shared.pump(id);
                    }
                }
                () = &mut alarm => {
                    let now = clock::monotonic();
                    if self.paused.is_some_and(|until| until <= now) {
                        // It was not listened to, so it was not silent.
                        (self.paused, heard) = (None, now);
                        if let Some(end) = self.go_on(shared, id) {
                            return end;
                        }
                    }
                    let silent = now.saturating_duration_since(heard);
                    if self.paused.is_some() {
                        // The alarm is set to its end.
                    } else if keep_alive_s == 0 || self.held.is_some() {
                        alarm.as_mut().reset(tokio::time::Instant::from_std(clock::monotonic() + FOREVER.min(allowed.max(Duration::from_secs(1)))));
                    } else if silent >= allowed {
                        return End::Refused(WireError::new(reason::KEEP_ALIVE_TIMEOUT, "nothing came for 1.5 times the keep-alive"));
                    } else {
                        alarm.as_mut().reset(tokio::time::Instant::from_std(heard + allowed));
                    }
                }
            }
        }
    }

    fn arrived(&mut self, shared: &Rc<Shared>, id: SessionId, now: Instant) -> Option<End> {
        let end = {
            let mut buffer = shared.buffer.borrow_mut();
            self.packets(shared, id, &mut buffer)
        };
        shared.after();
        sys::add(&shared.tally.bytes_in, self.last_read as u64);
        let mut pace = self.conn.pace.borrow_mut();
        let until = pace.as_mut().and_then(|p| p.bytes(self.last_read, now));
        drop(pace);
        self.pause(until);
        end
    }

    /// Nothing is taken from it until then, at least.
    fn pause(&mut self, until: Option<Instant>) {
        if until.is_none() {
            return;
        }
        if self.paused.is_none() {
            sys::add(&self.conn.throttled, 1);
            sys::add(&self.conn.tally.throttled, 1);
        }
        self.paused = self.paused.max(until);
    }

    /// Everything that one read brought, under one lock of the log.
    fn packets(&mut self, shared: &Rc<Shared>, id: SessionId, buffer: &mut BytesMut) -> Option<End> {
        self.has_more = false;
        if buffer.is_empty() {
            // A large packet is still growing in its own buffer.
            return None;
        }
        let mut core = shared.core.borrow_mut();
        let mut batch = shared.log.turn();
        let mut end = None;
        let mut packets = 0;
        let is_paced = self.conn.pace.borrow().is_some();
        while end.is_none() && self.held.is_none() && self.paused.is_none() {
            if packets == PACKETS_A_TURN {
                self.has_more = true;
                break;
            }
            let decoded = self.conn.wire.borrow_mut().decode(buffer);
            end = match decoded {
                Ok(Some(packet)) => {
                    packets += 1;
                    if is_paced && matches!(packet, codec::Packet::Publish(_)) {
                        self.charge_message();
                    }
                    self.handled(core.packet(id, &self.conn, packet, &mut batch))
                }
                Ok(None) => break,
                Err(e) => Some(End::Refused(e)),
            };
        }
        sys::add(&shared.tally.packets_in, packets);
        codec::keep_rest(buffer, &mut self.rest);
        end
    }

    fn charge_message(&mut self) {
        let mut pace = self.conn.pace.borrow_mut();
        let until = pace.as_mut().and_then(|p| p.message(clock::monotonic()));
        drop(pace);
        self.pause(until);
    }

    fn handled(&mut self, outcome: Outcome) -> Option<End> {
        match outcome {
            Outcome::Continue => None,
            Outcome::Hold(packet) => {
                self.held = Some(packet);
                None
            }
            Outcome::Close(e) if e.reason == reason::SUCCESS => Some(End::Gone(e.text)),
            Outcome::Close(e) => Some(End::Refused(e)),
            Outcome::Goodbye => Some(End::Goodbye),
        }
    }

    /// After a commit: the packet that waited, and what came behind it.
    fn try_held(&mut self, shared: &Rc<Shared>, id: SessionId) -> Option<End> {
        let packet = self.held.take()?;
        let outcome = {
            let mut core = shared.core.borrow_mut();
            let mut batch = shared.log.turn();
            core.packet(id, &self.conn, packet, &mut batch)
        };
        let end = self.handled(outcome);
        if end.is_none() {
            return self.go_on(shared, id);
        }
        shared.after();
        end
    }

    /// What came behind a packet that waited, or behind the one that used a rate up.
    fn go_on(&mut self, shared: &Rc<Shared>, id: SessionId) -> Option<End> {
        let mut end = None;
        if self.held.is_none() && self.paused.is_none() {
            let mut buffer = shared.buffer.borrow_mut();
            buffer.clear();
            buffer.extend_from_slice(&self.rest);
            end = self.packets(shared, id, &mut buffer);
        }
        shared.after();
        end
    }
}

/// Reads what the layers make of the socket's bytes, to the end of `to`, and sends what they answer. Ready with 0: the end.
fn poll_layers<D>(
    conn: &Conn,
    layers: &RefCell<Layers>,
    source: &mut Source,
    cx: &mut Context<'_>,
    shared: &Shared,
    to: &mut D,
) -> Poll<std::io::Result<usize>>
where
    D: BufMut + DerefMut<Target = [u8]>,
{
    let before = to.len();
    loop {
        if layers.borrow().is_ended() {
            return Poll::Ready(Ok(0));
        }
        let mut raw = shared.raw.borrow_mut();
        raw.clear();
        raw.reserve(READ_BYTES);
        match poll_read_buf(Pin::new(&mut *source), cx, &mut (&mut *raw).limit(READ_BYTES))? {
            Poll::Pending => return Poll::Pending,
            Poll::Ready(0) => return Poll::Ready(Ok(0)),
            Poll::Ready(_) => {}
        }
        let taken = layers.borrow_mut().take_in(&raw, to);
        let has_answer = layers.borrow().has_answer();
        let flushed = if has_answer { conn.flush() } else { Ok(true) };
        // First what is wrong with it: a client that was refused may be gone before its answer.
        taken.map_err(|why| std::io::Error::new(std::io::ErrorKind::InvalidData, why))?;
        if !flushed? {
            // The rest goes when the socket takes it.
            conn.wake.notify_one();
        }
        if to.len() > before {
            return Poll::Ready(Ok(to.len() - before));
        }
    }
}

/// A timer that is never due in practice (a day), re-armed.
const FOREVER: Duration = Duration::from_secs(86_400);
