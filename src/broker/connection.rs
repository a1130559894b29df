//! One connection: a task that owns the socket and its timers, and nothing of the protocol.
//!
//! All connections read into one buffer of the thread (a buffer each would be 48 MB for 5,000 idle clients); only the
//! beginning of an unfinished packet is kept for a connection. A connection whose packet has to wait (a full stream
//! towards 3.1.1, a log that is behind) is not read from: back-pressure is TCP's.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
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
use super::{Greeting, Shared, auth};
use crate::clock::{self, Instant, Timestamp};
use crate::config::{Listener, SubscribeRefusal};
use crate::log::changes::LossRow;
use crate::message::Message;

/// What one read takes at most.
pub const READ_BYTES: usize = 64 << 10;
/// Before a client has said who it is.
const CONNECT_BYTES_MAX: u32 = 256 << 10;
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// How long the last bytes to a client that is being closed may take.
const LAST_BYTES_DEADLINE: Duration = Duration::from_secs(1);

/// A connection as the core sees it.
pub struct Conn {
    writer: OwnedWriteHalf,
    pub peer: SocketAddr,
    /// Our end: which listener it belongs to.
    pub local: SocketAddr,
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
        while !out.is_empty() {
            match self.writer.try_write(&out) {
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

/// Serves one accepted connection to its end.
pub async fn run(shared: Rc<Shared>, stream: TcpStream, peer: SocketAddr, listener: Rc<Listener>) {
    // Acknowledgements and deliveries are gathered by us; waiting for more would only delay them.
    let _ = stream.set_nodelay(true);
    let local = stream.local_addr().unwrap_or(listener.bind);
    let (source, writer) = stream.into_split();
    let conn = Rc::new(Conn {
        writer,
        peer,
        local,
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
        last_read: 0,
        paused: None,
    };
    let end = match tokio::time::timeout(CONNECT_DEADLINE, reader.connect(&shared, &listener)).await {
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
            debug!(%peer, "no CONNECT in time");
            return;
        }
    };
    if let End::Refused(e) = &end {
        let mut wire = conn.wire.borrow_mut();
        wire.disconnect(&mut conn.out.borrow_mut(), e.reason, &e.text);
    }
    let _ = tokio::time::timeout(LAST_BYTES_DEADLINE, last_bytes(&conn, &mut reader.source)).await;
}

/// Sends what is left, then ends our side, so that the client reads it all before it sees the end.
async fn last_bytes(conn: &Conn, source: &mut OwnedReadHalf) {
    while let Ok(false) = conn.flush() {
        if conn.writer.writable().await.is_err() {
            return;
        }
    }
    let socket = socket2::SockRef::from(conn.writer.as_ref());
    let _ = socket.shutdown(std::net::Shutdown::Write);
    // What the client still sends is read and thrown away: closing over unread bytes would reset what it has not read.
    let mut scrap = [0; 4096];
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
    source: OwnedReadHalf,
    /// The beginning of a packet that is not here whole.
    rest: Vec<u8>,
    /// A packet that has to wait for a commit.
    held: Option<codec::Packet>,
    /// What the last read brought.
    last_read: usize,
    /// Its rate is used up: nothing more is taken from it until then.
    paused: Option<Instant>,
}

impl Reader {
    /// Reads once, behind what was left over, into the thread's buffer; false: the client has closed. Polling the socket
    /// itself spares a second system call a read: a read that does not fill the buffer has emptied the socket.
    fn poll_read(&mut self, cx: &mut Context<'_>, buffer: &mut BytesMut) -> Poll<std::io::Result<bool>> {
        let source = Pin::new(&mut self.source);
        let most = self.conn.read_bytes.get();
        let wanted = Wire::frame_bytes(&self.rest).unwrap_or(0);
        buffer.clear();
        if wanted > READ_BYTES && self.rest.len() < wanted {
            // A large packet grows in its own buffer, by what has really arrived.
            self.rest.reserve((wanted - self.rest.len()).min(READ_BYTES));
            let read = ready!(poll_read_buf(source, cx, &mut (&mut self.rest).limit(most)))?;
            self.last_read = read;
            if self.rest.len() >= wanted {
                buffer.extend_from_slice(&self.rest);
                self.rest = Vec::new();
            }
            return Poll::Ready(Ok(read > 0));
        }
        buffer.reserve(self.rest.len() + READ_BYTES + 16);
        buffer.extend_from_slice(&self.rest);
        let read = poll_read_buf(source, cx, &mut (&mut *buffer).limit(most));
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
        poll_fn(|cx| self.poll_read(cx, &mut shared.buffer.borrow_mut())).await
    }

    async fn connect(&mut self, shared: &Rc<Shared>, listener: &Listener) -> Result<(SessionId, u16, String), End> {
        let _greeting = Greeting::begin(shared);
        let connect = loop {
            match self.read(shared).await {
                Ok(true) => sys::add(&shared.tally.bytes_in, self.last_read as u64),
                Ok(false) => return Err(End::Gone("closed before a CONNECT".into())),
                Err(e) => return Err(End::Gone(e.to_string())),
            }
            let mut buffer = shared.buffer.borrow_mut();
            let decoded = self.conn.wire.borrow_mut().decode(&mut buffer);
            match decoded {
                Ok(Some(codec::Packet::Connect(connect))) => {
                    sys::add(&shared.tally.packets_in, 1);
                    sys::add(&shared.tally.connects, 1);
                    codec::keep_rest(&mut buffer, &mut self.rest);
                    break *connect;
                }
                Ok(Some(_)) => return Err(End::Gone("the first packet is not a CONNECT".into())),
                Ok(None) if buffer.is_empty() => {}
                Ok(None) => codec::keep_rest(&mut buffer, &mut self.rest),
                Err(e) => return Err(self.refuse(shared, e)),
            }
        };
        if let Err(e) = self.admit(shared, listener, &connect).await {
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

    async fn admit(&self, shared: &Rc<Shared>, listener: &Listener, connect: &codec::Connect) -> Result<(), WireError> {
        if shared.core.borrow().is_draining() {
            return Err(WireError::new(reason::SERVER_SHUTTING_DOWN, "the gateway stops"));
        }
        if shared.connections.get() > listener.connections_max {
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
        auth::check(shared, listener, self.conn.peer.ip(), connect).await?;
        // A reload may have come since it was accepted.
        if is_served(&shared.listeners.borrow(), self.conn.local, connect.username.is_none()) {
            return Ok(());
        }
        let why = "its listener takes such clients no longer";
        Err(WireError::new(reason::NOT_AUTHORIZED, why))
    }

    /// A CONNACK with the reason; the connection is closed after it.
    fn refuse(&self, shared: &Rc<Shared>, e: WireError) -> End {
        let conn = &self.conn;
        if e.reason == reason::MALFORMED && !conn.version().is_v5() {
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
        if !self.rest.is_empty() {
            let mut buffer = shared.buffer.borrow_mut();
            buffer.clear();
            buffer.extend_from_slice(&self.rest);
            self.rest.clear();
            if let Some(end) = self.packets(shared, id, &mut buffer) {
                return end;
            }
            drop(buffer);
            shared.after();
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
            let unsent = unsent_bytes > 0;
            let is_choked = unsent_bytes > OUT_BYTES_MAX_TO_READ;
            let waits = self.held.is_some() || self.paused.is_some() || shared.log.is_congested();
            tokio::select! {
                read = self.read(shared), if !waits && !is_choked => {
                    match read {
                        Ok(true) => heard = clock::monotonic(),
                        Ok(false) => return End::Gone("the client closed the connection".into()),
                        Err(e) => return End::Gone(e.to_string()),
                    }
                    if let Some(end) = self.arrived(shared, id, heard) {
                        return end;
                    }
                }
                () = shared.committed.notified(), if waits => {
                    heard = clock::monotonic();
                    if let Some(end) = self.try_held(shared, id) {
                        return end;
                    }
                }
                ready = conn.writer.writable(), if unsent => {
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
        if self.held.is_none() && self.paused.is_none() && !self.rest.is_empty() {
            let mut buffer = shared.buffer.borrow_mut();
            buffer.clear();
            buffer.extend_from_slice(&self.rest);
            end = self.packets(shared, id, &mut buffer);
        }
        shared.after();
        end
    }
}

/// A timer that is never due in practice (a day), re-armed.
const FOREVER: Duration = Duration::from_secs(86_400);
