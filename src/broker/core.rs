//! The broker's core: packets and commit results in, bytes for connections and batches for the log out.
//!
//! One thread owns it; no method waits. What has to wait for the disk stands in one queue in the order of commits, so
//! that acknowledgements leave in the order of their PUBLISHes (MQTT 5, 4.6). Bounds: in flight to a client
//! [`WINDOW_MAX`], queued for one without durability [`super::session::QUEUE_BYTES_MAX`], unsent bytes of a connection
//! [`OUT_BYTES_MAX`] for QoS 0 (then dropped and counted); what waits for a commit is bounded by the log's open batch.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::SocketAddr;
use std::ops::Bound;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use smallvec::SmallVec;
use tokio::sync::oneshot;
use tracing::{debug, info, warn};

use super::access::Rules;
use super::codec::{self, ConnAck, Delivery, PublishFrame, WireError, reason};
use super::connection::Conn;
use super::handle::PublishError;
use super::repeats::Repeats;
use super::router::{Recipient, Route, Router, SessionId, Subscription, add};
use super::session::{Kept, Lane, Open, Queued, Session, Slot, State, WINDOW_MAX};
use crate::clock::{self, Instant, Timestamp};
use crate::config::WhenFull;
use crate::log::changes::{LossRow, OutboundRow, SessionRow, WillRow};
use crate::log::consumer::{Effects, dead_row};
use crate::log::record::{self, MessageRef};
use crate::log::segment::Segment;
use crate::log::{Batch, ConsumerState, Log, Read, Startup};
use crate::message::{Message, Properties, Qos, Source, Topic, TopicFilter};
use crate::status::{Counter, Part};

/// Unsent bytes of a connection above which its QoS 0 messages are dropped, and counted.
pub const OUT_BYTES_MAX: usize = 1 << 20;
/// Unsent bytes above which nothing more is taken from the log or the queue for it.
const OUT_BYTES_PAUSE: usize = 256 << 10;
/// Retained topics, and their bytes, kept in memory; a new one beyond that is refused.
const RETAINED_MAX: usize = 200_000;
const RETAINED_BYTES_MAX: usize = 64 << 20;
/// Client aliases that we accept for topics, a connection.
pub const TOPIC_ALIAS_MAX: u16 = 16;
/// QoS 1 and 2 messages a client may have unacknowledged towards us.
pub const RECEIVE_MAXIMUM: u16 = 1_024;
/// A will that a kill left behind is published this long after the start at the earliest, when routes and modules are up.
const WILL_AFTER_START: Duration = Duration::from_secs(2);
/// Sessions, connected or not; a new one beyond it is refused.
const SESSIONS_MAX: usize = 100_000;

/// Why a connection ends that another one took the client id from.
pub const TAKEN_OVER: &str = "another connection took this client id";

/// A client that the broker knows: its session, and its connection while it has one.
struct Client {
    session: Session,
    conn: Option<Rc<Conn>>,
    rules: Rc<Rules>,
    will: Option<codec::Will>,
    /// When the will of a lost connection is due.
    will_due: Option<Instant>,
}

/// What goes on when a commit has ended.
enum Waiting {
    /// The acknowledgement of a PUBLISH (0x40, 0x50) or a PUBREL (0x70).
    Ack { conn: Rc<Conn>, first: u8, id: u16 },
    Frame { conn: Rc<Conn>, bytes: Bytes },
    Deliver { stream: u16, message: Rc<Message>, route: Rc<Route> },
    /// The id of an outbound QoS 2 message is on disk: it may be sent.
    Claimed { session: SessionId, id: u16, message: Rc<Message>, recipient: Recipient },
    /// A PUBREC is on disk: PUBREL may be sent.
    Release { session: SessionId, id: u16 },
    Reply(oneshot::Sender<Result<(), PublishError>>),
}

/// A message as it came in, its parts borrowed.
#[derive(Clone, Copy)]
pub struct Incoming<'a> {
    pub topic: &'a ByteString,
    pub payload: &'a Bytes,
    pub qos: Qos,
    pub retain: bool,
    pub properties: Option<&'a Properties>,
    pub source: &'a Source,
    pub from: Option<SessionId>,
}

impl<'a> Incoming<'a> {
    fn of(m: &'a Message) -> Incoming<'a> {
        Incoming {
            topic: m.topic.as_byte_string(),
            payload: &m.payload,
            qos: m.qos,
            retain: m.retain,
            properties: m.properties.as_deref(),
            source: &m.source,
            from: None,
        }
    }
}

/// Why a message was not taken.
pub enum Refused {
    InvalidTopic,
    /// A stream with `when_full = "reject"` is full.
    Full(String),
    RetainedFull,
}

/// What became of a packet.
pub enum Outcome {
    Continue,
    /// The packet cannot be taken yet; it is to be handed in again after a commit (3.1.1 has no other way to say so).
    Hold(codec::Packet),
    Close(WireError),
    /// The client said goodbye.
    Goodbye,
}

pub struct Core {
    log: Log,
    router: Router,
    clients: Vec<Option<Client>>,
    free: Vec<SessionId>,
    by_id: HashMap<ByteString, SessionId>,
    retained: BTreeMap<Topic, Rc<Message>>,
    retained_bytes: usize,
    waiting: VecDeque<(u64, Waiting)>,
    dirty: Vec<Rc<Conn>>,
    /// Reads from disk that a behind session wants; the task around the core does them.
    reads: Vec<(SessionId, u16, u64, Arc<[TopicFilter]>)>,
    /// Sessions that wait for a commit that drops.
    blocked: Vec<SessionId>,
    default_rules: Rc<Rules>,
    users: HashMap<String, Rc<Rules>>,
    pub counters: Counters,
    draining: bool,
    takeovers: Repeats,
    /// Wills of connections that a kill of the daemon ended, whose sessions ended with them.
    orphans: Vec<(Instant, ByteString, codec::Will)>,
}

pub struct Counters {
    pub connections: Counter,
    pub received: Counter,
    pub delivered: Counter,
    pub dropped: Counter,
    pub retained: Counter,
    pub sessions: Counter,
    pub subscriptions: Counter,
}

impl Counters {
    pub fn new(part: &Part) -> Counters {
        Counters {
            connections: part.counter("connections"),
            received: part.counter("messages_received"),
            delivered: part.counter("messages_delivered"),
            dropped: part.counter("messages_dropped"),
            retained: part.counter("retained"),
            sessions: part.counter("sessions"),
            subscriptions: part.counter("subscriptions"),
        }
    }
}

impl Core {
    pub fn new(
        log: Log,
        startup: Startup,
        anonymous: Rules,
        users: HashMap<String, Rules>,
        counters: Counters,
    ) -> Core {
        let mut core = Core {
            log,
            router: Router::default(),
            clients: Vec::new(),
            free: Vec::new(),
            by_id: HashMap::new(),
            retained: BTreeMap::new(),
            retained_bytes: 0,
            waiting: VecDeque::new(),
            dirty: Vec::new(),
            reads: Vec::new(),
            blocked: Vec::new(),
            default_rules: Rc::new(anonymous),
            users: users.into_iter().map(|(name, rules)| (name, Rc::new(rules))).collect(),
            counters,
            draining: false,
            takeovers: Repeats::default(),
            orphans: Vec::new(),
        };
        core.restore(startup);
        core
    }

    fn restore(&mut self, startup: Startup) {
        for record in startup.retained {
            match record::decode_one(record) {
                Ok(message) => {
                    self.retained_bytes += message.size_bytes();
                    self.retained.insert(message.topic.detach(), Rc::new(detach(&message)));
                }
                Err(_) => warn!("a retained message in the database is damaged; it is passed over"),
            }
        }
        let now = clock::wall();
        for row in startup.sessions {
            self.restore_session(row, now);
        }
        for (client_id, packet_id) in startup.inbound {
            if let Some(client) = self.client_by_name(&client_id) {
                client.session.inbound.insert(packet_id);
            }
        }
        for row in startup.outbound {
            let Some(client) = self.client_by_name(&row.client_id) else { continue };
            let Some(lane) = client.session.lanes.get_mut(usize::from(row.stream)) else { continue };
            if row.sequence <= lane.read {
                continue;
            }
            let state = if row.received { State::Received } else { State::Sent };
            lane.open.push_back(Open { sequence: row.sequence, bytes: 0, id: row.packet_id, qos: Qos::ExactlyOnce, state });
            client.session.slots.insert(row.packet_id, Slot::Log { stream: row.stream, sequence: row.sequence });
        }
        self.counters.retained.set(self.retained.len() as u64);
        for row in startup.wills {
            self.restore_will(&row);
        }
    }

    /// The will of a connection that was open when the daemon was killed: due after its delay, unless the client returns.
    fn restore_will(&mut self, row: &WillRow) {
        let Ok(message) = record::decode_one(row.record.clone()) else {
            return warn!(client = %row.client_id, "a will in the database is damaged; it is passed over");
        };
        let will = codec::Will {
            topic: message.topic.as_byte_string().clone(),
            payload: message.payload,
            qos: message.qos,
            retain: message.retain,
            delay_s: row.delay_s,
            properties: message.properties,
        };
        let delay = Duration::from_secs(u64::from(row.delay_s));
        match self.client_by_name(&row.client_id) {
            Some(client) => {
                client.will_due = Some(clock::monotonic() + delay.max(WILL_AFTER_START));
                client.will = Some(will);
            }
            None => self.orphans.push((clock::monotonic() + WILL_AFTER_START, row.client_id.as_str().into(), will)),
        }
    }

    fn client_by_name(&mut self, client_id: &str) -> Option<&mut Client> {
        let session = *self.by_id.get(client_id)?;
        self.clients[session as usize].as_mut()
    }

    fn restore_session(&mut self, row: SessionRow, now: Timestamp) {
        let name = format!("session:{}", row.client_id);
        let Some(consumer) = self.log.find_consumer(&name) else { return };
        let mut session = Session::new(row.client_id.as_str().into(), row.user.clone(), row.expiry_s);
        // Time without power counts towards the expiry, as far as the clock can be believed: never more than has passed
        // since the disconnect, never less than nothing.
        let gone = row.disconnected.map_or(0, |at| now.millis_since(Timestamp::from_millis(at)).max(0) as u64);
        let started = clock::monotonic();
        let since = started.checked_sub(Duration::from_millis(gone)).unwrap_or(started);
        session.disconnected = Some((since, row.disconnected.map_or(now, Timestamp::from_millis)));
        session.lanes = lanes(&consumer, self.log.streams().map(|s| s.id));
        for s in &row.subscriptions {
            let kept = Kept {
                qos: Qos::from_u8(s.qos).unwrap_or(Qos::AtMostOnce),
                no_local: s.no_local,
                retain_as_published: s.retain_as_published,
                identifier: s.identifier,
                since: s.since,
            };
            session.subscriptions.insert(s.filter.as_str().into(), kept);
        }
        session.consumer = Some(consumer);
        let rules = self.rules_of(row.user.as_deref());
        let id = self.insert(Client { session, conn: None, rules, will: None, will_due: None });
        let filters: Vec<_> = self.client(id).session.subscriptions.iter().map(|(f, k)| (f.clone(), k.clone())).collect();
        for (filter, kept) in filters {
            if let Ok(filter) = TopicFilter::new(filter) {
                self.router.subscribe(&filter, subscription(id, &kept));
                self.counters.subscriptions.add(1);
            }
        }
    }

    fn rules_of(&self, user: Option<&str>) -> Rc<Rules> {
        match user {
            // A user that is gone from the configuration may do nothing.
            Some(user) => self.users.get(user).cloned().unwrap_or_default(),
            None => Rc::clone(&self.default_rules),
        }
    }

    fn insert(&mut self, client: Client) -> SessionId {
        let id = self.free.pop().unwrap_or_else(|| {
            self.clients.push(None);
            (self.clients.len() - 1) as SessionId
        });
        self.by_id.insert(client.session.client_id.clone(), id);
        self.clients[id as usize] = Some(client);
        self.counters.sessions.set(self.by_id.len() as u64);
        id
    }

    fn client(&mut self, id: SessionId) -> &mut Client {
        self.clients[id as usize].as_mut().expect("a session id is kept only while the session is")
    }

    fn get(&mut self, id: SessionId) -> Option<&mut Client> {
        self.clients.get_mut(id as usize)?.as_mut()
    }

    fn touch(&mut self, conn: &Rc<Conn>) {
        if !conn.is_dirty.replace(true) {
            self.dirty.push(Rc::clone(conn));
        }
    }

    /// The connections that got bytes since the last call.
    pub fn take_dirty(&mut self) -> Vec<Rc<Conn>> {
        std::mem::take(&mut self.dirty)
    }

    pub fn take_reads(&mut self) -> Vec<(SessionId, u16, u64, Arc<[TopicFilter]>)> {
        std::mem::take(&mut self.reads)
    }

    // ---- connect and disconnect ----------------------------------------------------------------------------------

    /// A client whose name and password are in order. The CONNACK is written; what is owed follows it.
    pub fn connect(&mut self, conn: &Rc<Conn>, connect: codec::Connect, batch: &mut Batch<'_>) -> Result<SessionId, WireError> {
        let codec::Connect { version, clean_start, client_id, username, will, .. } = connect;
        let user = username.as_ref().map(ToString::to_string);
        let rules = self.rules_of(user.as_deref());
        if let Some(will) = &will {
            Topic::new(will.topic.clone()).map_err(|e| WireError::new(reason::TOPIC_NAME_INVALID, format!("will topic: {e}")))?;
            if !rules.may_publish(&will.topic) {
                return Err(WireError::new(reason::NOT_AUTHORIZED, "may not publish to the will's topic"));
            }
        }
        let assigned = client_id.is_empty();
        let client_id = if assigned { self.assign_id() } else { ByteString::from(&*client_id) };
        let mut present = false;
        let existing = self.by_id.get(&client_id).copied();
        self.publish_orphans(|name, _| *name == client_id, batch);
        if let Some(id) = existing
            && self.client(id).session.is_over(clock::monotonic())
        {
            self.end_session(id, batch);
        }
        if let Some(id) = self.by_id.get(&client_id).copied() {
            let owner = self.client(id).session.user.clone();
            if owner != user {
                // Nobody reads another user's messages, and a user that is gone does not keep its client id for ever.
                if owner.as_ref().is_some_and(|o| self.users.contains_key(o)) {
                    return Err(WireError::new(reason::NOT_AUTHORIZED, "this client id belongs to another user's session"));
                }
                self.client(id).session.expiry_s = 0;
            }
            self.take_over(id, conn.peer, batch);
            if owner != user && self.by_id.contains_key(&client_id) {
                self.end_session(id, batch);
            }
            // The old session may have ended with its connection.
            match self.by_id.contains_key(&client_id) {
                true if clean_start => self.end_session(id, batch),
                still => present = still,
            }
        }
        if !present && self.by_id.len() >= SESSIONS_MAX {
            return Err(WireError::new(reason::QUOTA_EXCEEDED, "too many sessions"));
        }
        let existing = self.by_id.get(&client_id).copied();
        let id = match existing.filter(|_| present) {
            Some(id) => id,
            None => {
                let session = Session::new(client_id.clone(), user, 0);
                self.insert(Client { session, conn: None, rules: Rc::clone(&rules), will: None, will_due: None })
            }
        };
        let streams: Vec<u16> = self.log.streams().map(|s| s.id).collect();
        let log = self.log.clone();
        let client = self.client(id);
        client.rules = rules;
        client.will = will.map(detach_will);
        client.will_due = None;
        if let Some(will) = &client.will {
            let row = will_row(will, &client.session.source);
            batch.changes().wills.insert(client_id.to_string(), Some(row));
        }
        client.conn = Some(Rc::clone(conn));
        client.session.expiry_s = connect.session_expiry_s;
        client.session.disconnected = None;
        let durable = connect.session_expiry_s > 0;
        if durable && client.session.consumer.is_none() {
            let consumer = log.consumer(batch, &format!("session:{client_id}"), &[]);
            client.session.lanes = lanes(&consumer, streams.into_iter());
            client.session.consumer = Some(consumer);
        }
        let window = if version.is_v5() { connect.receive_maximum.min(WINDOW_MAX) } else { WINDOW_MAX };
        conn.window.set(window);
        let ack = ConnAck {
            session_present: present,
            assigned_client_id: (assigned && version.is_v5()).then(|| client_id.clone()),
            receive_maximum: RECEIVE_MAXIMUM,
            topic_alias_maximum: TOPIC_ALIAS_MAX,
            packet_bytes_max: conn.packet_bytes_max,
            session_expiry_s: None,
            reason_string: None,
        };
        {
            let mut wire = conn.wire.borrow_mut();
            wire.set_limits(conn.packet_bytes_max, connect.packet_bytes_max);
            wire.connack(&mut conn.out.borrow_mut(), reason::SUCCESS, &ack);
        }
        self.touch(conn);
        if durable || present {
            self.save(id, batch);
        }
        if !durable && present {
            // A session that was durable and now ends with its connection: its place in the log goes with it at the end.
            debug!(client = %client_id, "session no longer durable");
        }
        self.counters.connections.add(1);
        self.resume(id, batch);
        Ok(id)
    }

    fn assign_id(&self) -> ByteString {
        loop {
            let mut random = [0; 8];
            // Without randomness the clock names it; the loop takes care of a clash.
            if getrandom::fill(&mut random).is_err() {
                random = clock::wall().millis().to_le_bytes();
            }
            let id: ByteString = format!("auto-{:016x}", u64::from_le_bytes(random)).into();
            if !self.by_id.contains_key(&id) {
                return id;
            }
        }
    }

    /// Another connection comes for this client id: the old one is told and its will is due (MQTT 5, 3.1.4-3).
    fn take_over(&mut self, id: SessionId, by: SocketAddr, batch: &mut Batch<'_>) {
        let Some(old) = self.client(id).conn.clone() else { return };
        old.wire.borrow_mut().disconnect(&mut old.out.borrow_mut(), reason::TAKEN_OVER, TAKEN_OVER);
        old.close(TAKEN_OVER);
        self.touch(&old);
        let client_id = self.client(id).session.client_id.clone();
        if let Some(more) = self.takeovers.note(&client_id, clock::monotonic()) {
            info!(client = %client_id, from = %old.peer, to = %by, more, "a client id was taken over; if this goes on, two devices use it");
        }
        self.disconnected(id, &old, false, batch);
    }

    /// The connection is gone; `clean` where the client said goodbye (then its will is not published).
    pub fn disconnected(&mut self, id: SessionId, conn: &Rc<Conn>, clean: bool, batch: &mut Batch<'_>) {
        let Some(client) = self.get(id) else { return };
        if !client.conn.as_ref().is_some_and(|c| Rc::ptr_eq(c, conn)) {
            return;
        }
        client.conn = None;
        self.counters.connections.set(self.counters.connections.get().saturating_sub(1));
        let now = clock::monotonic();
        let client = self.client(id);
        client.session.disconnected = Some((now, clock::wall()));
        let ends = client.session.expiry_s == 0;
        if clean && client.will.take().is_some() {
            batch.changes().wills.insert(client.session.client_id.to_string(), None);
        }
        let will_waits = client.will.as_ref().is_some_and(|w| w.delay_s > 0) && !ends;
        if will_waits {
            let delay = client.will.as_ref().map_or(0, |w| w.delay_s);
            client.will_due = Some(now + Duration::from_secs(u64::from(delay)));
        } else if let Some(will) = client.will.take() {
            self.publish_will(id, will, batch);
        }
        if ends {
            self.end_session(id, batch);
        } else {
            self.park(id);
            self.save(id, batch);
        }
    }

    /// The client is away: what was in flight is given again when it comes back.
    fn park(&mut self, id: SessionId) {
        let client = self.client(id);
        let session = &mut client.session;
        let Some(consumer) = session.consumer.clone() else { return };
        for (stream, lane) in session.lanes.iter_mut().enumerate() {
            if !lane.open.is_empty() || lane.behind {
                lane.read = consumer.done(stream as u16);
                lane.behind = true;
            }
            lane.reading = false;
            consumer.holds(stream as u16, None);
        }
    }

    fn publish_will(&mut self, id: SessionId, will: codec::Will, batch: &mut Batch<'_>) {
        let session = &self.client(id).session;
        let (source, client_id) = (Arc::clone(&session.source), session.client_id.to_string());
        self.publish_will_of(&client_id, &source, &will, batch);
    }

    /// In one commit with the row that would bring it back.
    fn publish_will_of(&mut self, client_id: &str, source: &Source, will: &codec::Will, batch: &mut Batch<'_>) {
        batch.changes().wills.insert(client_id.to_owned(), None);
        let incoming = Incoming {
            topic: &will.topic,
            payload: &will.payload,
            qos: will.qos,
            retain: will.retain,
            properties: will.properties.as_deref(),
            source,
            from: None,
        };
        if let Err(refused) = self.publish(&incoming, batch) {
            let why = match refused {
                Refused::InvalidTopic => "its topic is invalid".to_owned(),
                Refused::Full(stream) => format!("the stream {stream:?} is full"),
                Refused::RetainedFull => "there are too many retained messages".to_owned(),
            };
            warn!(%source, why, "a will was not published");
        }
    }

    fn publish_orphans(&mut self, which: impl Fn(&ByteString, Instant) -> bool, batch: &mut Batch<'_>) {
        if self.orphans.is_empty() {
            return;
        }
        let (now, later) = std::mem::take(&mut self.orphans).into_iter().partition(|(due, name, _)| which(name, *due));
        self.orphans = later;
        for (_, name, will) in now {
            self.publish_will_of(&name, &format!("client:{name}").into(), &will, batch);
        }
    }

    /// The session and everything of it ends.
    fn end_session(&mut self, id: SessionId, batch: &mut Batch<'_>) {
        let client = self.client(id);
        client.will_due = None;
        if let Some(will) = client.will.take() {
            self.publish_will(id, will, batch);
        }
        let client = self.clients[id as usize].take().expect("a session ends once");
        for filter in client.session.subscriptions.keys() {
            if let Ok(filter) = TopicFilter::new(filter.clone()) {
                self.router.unsubscribe(&filter, id);
            }
        }
        let subscriptions = client.session.subscriptions.len() as u64;
        self.counters.subscriptions.set(self.counters.subscriptions.get().saturating_sub(subscriptions));
        if let Some(consumer) = &client.session.consumer {
            self.log.remove_consumer(batch, consumer.id());
            batch.changes().sessions.insert(client.session.client_id.to_string(), None);
        }
        self.by_id.remove(&client.session.client_id);
        self.free.push(id);
        self.counters.sessions.set(self.by_id.len() as u64);
    }

    /// Writes what a durable session consists of into the batch.
    fn save(&mut self, id: SessionId, batch: &mut Batch<'_>) {
        let session = &self.client(id).session;
        let Some(consumer) = &session.consumer else { return };
        let row = SessionRow {
            client_id: session.client_id.to_string(),
            expiry_s: session.expiry_s,
            disconnected: session.disconnected.map(|(_, at)| at.millis()),
            user: session.user.clone(),
            subscriptions: session.subscription_rows(),
        };
        let filters: Vec<TopicFilter> = session
            .subscriptions
            .iter()
            .filter(|(_, k)| k.qos > Qos::AtMostOnce)
            .filter_map(|(f, _)| TopicFilter::new(f.clone()).ok())
            .collect();
        let name = consumer.name().to_owned();
        self.log.consumer(batch, &name, &filters);
        batch.changes().sessions.insert(row.client_id.clone(), Some(row));
    }

    /// After a CONNACK: what was in flight first, in order, then what came meanwhile.
    fn resume(&mut self, id: SessionId, batch: &mut Batch<'_>) {
        let client = self.client(id);
        let Some(conn) = client.conn.clone() else { return };
        let mut again: Vec<(u16, Option<Queued>, State)> = Vec::new();
        for (packet_id, slot) in &client.session.slots {
            if let Slot::Memory { queued, state } = slot {
                again.push((*packet_id, Some(queued.clone()), *state));
            }
        }
        again.sort_by_key(|(id, _, _)| *id);
        for (packet_id, queued, state) in again {
            match (state, queued) {
                (State::Received, _) => conn.wire.borrow_mut().pubrel(&mut conn.out.borrow_mut(), packet_id),
                (_, Some(q)) => {
                    let frame = encode_queued(&conn, &q, clock::wall());
                    frame.write(&mut conn.out.borrow_mut(), packet_id, true);
                }
                (_, None) => {}
            }
        }
        self.touch(&conn);
        for lane in &mut self.client(id).session.lanes {
            lane.behind = true;
        }
        self.pump(id, batch);
    }

    // ---- packets ------------------------------------------------------------------------------------------------

    pub fn packet(&mut self, id: SessionId, conn: &Rc<Conn>, packet: codec::Packet, batch: &mut Batch<'_>) -> Outcome {
        match packet {
            codec::Packet::Publish(p) => self.on_publish(id, conn, p, batch),
            codec::Packet::PubAck { id: packet_id, .. } => {
                self.on_puback(id, packet_id);
                self.pump(id, batch);
                Outcome::Continue
            }
            codec::Packet::PubRec { id: packet_id, reason } => self.on_pubrec(id, conn, packet_id, reason, batch),
            codec::Packet::PubRel { id: packet_id } => self.on_pubrel(id, conn, packet_id, batch),
            codec::Packet::PubComp { id: packet_id } => {
                self.on_pubcomp(id, packet_id, batch);
                self.pump(id, batch);
                Outcome::Continue
            }
            codec::Packet::Subscribe(s) => self.on_subscribe(id, conn, s, batch),
            codec::Packet::Unsubscribe { id: packet_id, filters } => self.on_unsubscribe(id, conn, packet_id, filters, batch),
            codec::Packet::PingReq => {
                conn.wire.borrow_mut().pingresp(&mut conn.out.borrow_mut());
                self.touch(conn);
                Outcome::Continue
            }
            codec::Packet::Disconnect { reason: code, session_expiry_s } => {
                let session = &mut self.client(id).session;
                if let Some(expiry_s) = session_expiry_s {
                    if session.expiry_s == 0 && expiry_s != 0 {
                        return Outcome::Close(WireError::new(
                            reason::PROTOCOL_ERROR,
                            "a session expiry of 0 cannot be raised by DISCONNECT",
                        ));
                    }
                    session.expiry_s = expiry_s;
                }
                if code == reason::DISCONNECT_WITH_WILL {
                    return Outcome::Close(WireError::new(reason::SUCCESS, "the client asked for its will"));
                }
                Outcome::Goodbye
            }
            codec::Packet::Auth => {
                Outcome::Close(WireError::new(reason::PROTOCOL_ERROR, "no authentication method was agreed on"))
            }
            codec::Packet::Connect(_) => Outcome::Close(WireError::new(reason::PROTOCOL_ERROR, "a second CONNECT")),
        }
    }

    fn on_publish(&mut self, id: SessionId, conn: &Rc<Conn>, mut p: codec::Publish, batch: &mut Batch<'_>) -> Outcome {
        let v5 = conn.version().is_v5();
        if let Some(answers) = p.properties.as_ref().and_then(|p| p.response_topic.as_ref())
            && let Err(e) = Topic::new(answers.clone())
        {
            return Outcome::Close(WireError::new(reason::TOPIC_NAME_INVALID, format!("response topic: {e}")));
        }
        if let Err(e) = resolve_alias(conn, &mut p) {
            return Outcome::Close(e);
        }
        let again = p.qos == Qos::ExactlyOnce && self.client(id).session.inbound.contains(&p.id);
        let unacknowledged = conn.unacknowledged.get() as usize + self.client(id).session.inbound.len();
        if p.qos > Qos::AtMostOnce && !again && unacknowledged >= usize::from(RECEIVE_MAXIMUM) {
            if v5 {
                return Outcome::Close(WireError::new(reason::RECEIVE_MAXIMUM_EXCEEDED, "more unacknowledged than granted"));
            }
            // QoS 2 ids are freed by packets that would wait behind this one, so only PUBACKs hold 3.1.1 back.
            if conn.unacknowledged.get() > 0 {
                return Outcome::Hold(codec::Packet::Publish(p));
            }
        }
        let client = self.client(id);
        if again {
            // Seen already: the answer follows the first one's commit.
            self.owe(conn, 0x50, p.id, true, batch);
            return Outcome::Continue;
        }
        if !client.rules.may_publish(&p.topic) {
            if Topic::new(p.topic.clone()).is_err() {
                return Outcome::Close(WireError::new(reason::TOPIC_NAME_INVALID, "the topic is not valid"));
            }
            debug!(client = %client.session.client_id, topic = %p.topic, "publish refused by the rules");
            // 3.1.1 cannot say no: it is acknowledged and dropped.
            self.refuse(conn, &p, reason::NOT_AUTHORIZED, batch);
            return Outcome::Continue;
        }
        let source = Arc::clone(&client.session.source);
        let incoming = Incoming {
            topic: &p.topic,
            payload: &p.payload,
            qos: p.qos,
            retain: p.retain,
            properties: p.properties.as_deref(),
            source: &source,
            from: Some(id),
        };
        self.counters.received.add(1);
        match self.publish(&incoming, batch) {
            Ok(durable) => {
                match p.qos {
                    Qos::AtMostOnce => {}
                    Qos::AtLeastOnce => self.owe(conn, 0x40, p.id, durable, batch),
                    Qos::ExactlyOnce => {
                        let session = &mut self.client(id).session;
                        session.inbound.insert(p.id);
                        let kept = session.consumer.is_some();
                        if kept {
                            batch.changes().inbound.insert((session.client_id.to_string(), p.id), true);
                        }
                        self.owe(conn, 0x50, p.id, durable || kept, batch);
                    }
                }
                Outcome::Continue
            }
            Err(Refused::InvalidTopic) => Outcome::Close(WireError::new(reason::TOPIC_NAME_INVALID, "the topic is not valid")),
            Err(Refused::RetainedFull) if v5 => {
                self.refuse(conn, &p, reason::QUOTA_EXCEEDED, batch);
                Outcome::Continue
            }
            Err(Refused::Full(_)) if v5 && p.qos > Qos::AtMostOnce => {
                self.refuse(conn, &p, reason::QUOTA_EXCEEDED, batch);
                Outcome::Continue
            }
            Err(Refused::Full(_)) if p.qos == Qos::AtMostOnce => {
                self.declare_refused(&incoming, batch);
                Outcome::Continue
            }
            Err(Refused::Full(_) | Refused::RetainedFull) => Outcome::Hold(codec::Packet::Publish(p)),
        }
    }

    /// Says no with a reason where the version can (QoS 0 and 3.1.1: acknowledged as if taken).
    fn refuse(&mut self, conn: &Rc<Conn>, p: &codec::Publish, code: u8, batch: &mut Batch<'_>) {
        let first = match p.qos {
            Qos::AtMostOnce => return,
            Qos::AtLeastOnce => 0x40,
            Qos::ExactlyOnce => 0x50,
        };
        if conn.owed.get() == 0 {
            write_answer(conn, first, p.id, code);
            self.touch(conn);
        } else {
            let mut bytes = bytes::BytesMut::new();
            let wire = conn.wire.borrow();
            match first {
                0x40 => wire.puback(&mut bytes, p.id, code),
                _ => wire.pubrec(&mut bytes, p.id, code),
            }
            drop(wire);
            conn.owed.set(conn.owed.get() + 1);
            let ticket = batch.ticket();
            self.waiting.push_back((ticket, Waiting::Frame { conn: Rc::clone(conn), bytes: bytes.freeze() }));
        }
    }

    /// A QoS 0 message for a full stream that rejects: nobody can be told, so the ledger is.
    fn declare_refused(&mut self, incoming: &Incoming<'_>, batch: &mut Batch<'_>) {
        let log = self.log.clone();
        let Ok(route) = self.router.route(incoming.topic, |t| log.stream_of(t)) else { return };
        let now = clock::wall();
        for consumer in &route.consumers {
            let bytes = (incoming.topic.len() + incoming.payload.len()) as u64;
            batch.changes().losses.push(loss(consumer.name(), incoming.source, "refused", bytes, now));
        }
        self.counters.dropped.add(1);
    }

    /// An acknowledgement: at once where nothing has to be on disk for it and nothing before it waits.
    fn owe(&mut self, conn: &Rc<Conn>, first: u8, id: u16, durable: bool, batch: &mut Batch<'_>) {
        if !durable && conn.owed.get() == 0 {
            write_answer(conn, first, id, 0);
            self.touch(conn);
            return;
        }
        conn.owed.set(conn.owed.get() + 1);
        conn.unacknowledged.set(conn.unacknowledged.get() + u32::from(first == 0x40));
        let ticket = batch.ticket();
        self.waiting.push_back((ticket, Waiting::Ack { conn: Rc::clone(conn), first, id }));
    }

    fn on_puback(&mut self, id: SessionId, packet_id: u16) {
        let Some(slot) = self.client(id).session.slots.get(&packet_id) else { return };
        match slot {
            Slot::Log { stream, sequence } => {
                let (stream, sequence) = (*stream, *sequence);
                let is_qos1 = self.client(id).session.lanes[usize::from(stream)]
                    .find(sequence)
                    .is_some_and(|o| o.qos == Qos::AtLeastOnce);
                if is_qos1 {
                    self.finish(id, packet_id, stream, sequence);
                }
            }
            Slot::Memory { queued, .. } if queued.qos == Qos::AtLeastOnce => {
                self.client(id).session.slots.remove(&packet_id);
            }
            Slot::Memory { .. } => {}
        }
    }

    /// A message of the log is delivered: its id is free, the cursor moves.
    fn finish(&mut self, id: SessionId, packet_id: u16, stream: u16, sequence: u64) {
        let session = &mut self.client(id).session;
        session.slots.remove(&packet_id);
        let lane = &mut session.lanes[usize::from(stream)];
        if let Some(open) = lane.find(sequence) {
            open.state = State::Done;
        }
        let (messages, bytes, done) = lane.settle();
        if messages > 0
            && let Some(consumer) = &session.consumer
        {
            consumer.advance(stream, done, messages, bytes);
            hold_open(consumer, stream, lane);
        }
    }

    fn on_pubrec(&mut self, id: SessionId, conn: &Rc<Conn>, packet_id: u16, code: u8, batch: &mut Batch<'_>) -> Outcome {
        let v5 = conn.version().is_v5();
        let session = &mut self.client(id).session;
        match session.slots.get_mut(&packet_id) {
            None => {
                // MQTT 5, 4.3.3: PUBREL with "not found"; 3.1.1 has no reasons.
                if v5 {
                    let [high, low] = packet_id.to_be_bytes();
                    conn.out.borrow_mut().extend_from_slice(&[0x62, 3, high, low, reason::PACKET_ID_NOT_FOUND]);
                } else {
                    conn.wire.borrow_mut().pubrel(&mut conn.out.borrow_mut(), packet_id);
                }
                self.touch(conn);
            }
            Some(Slot::Memory { queued, state }) if queued.qos == Qos::ExactlyOnce => {
                if code >= 0x80 {
                    session.slots.remove(&packet_id);
                    self.pump(id, batch);
                } else {
                    *state = State::Received;
                    conn.wire.borrow_mut().pubrel(&mut conn.out.borrow_mut(), packet_id);
                    self.touch(conn);
                }
            }
            Some(Slot::Memory { .. }) => {}
            Some(Slot::Log { stream, sequence }) => {
                let (stream, sequence) = (*stream, *sequence);
                let client_id = session.client_id.to_string();
                let Some(open) = session.lanes[usize::from(stream)].find(sequence).filter(|o| o.qos == Qos::ExactlyOnce) else {
                    return Outcome::Continue;
                };
                if code >= 0x80 {
                    batch.changes().outbound.insert((client_id, packet_id), None);
                    self.finish(id, packet_id, stream, sequence);
                    self.pump(id, batch);
                    return Outcome::Continue;
                }
                open.state = State::Received;
                let row = OutboundRow { client_id: client_id.clone(), packet_id, stream, sequence, received: true };
                batch.changes().outbound.insert((client_id, packet_id), Some(row));
                let ticket = batch.ticket();
                self.waiting.push_back((ticket, Waiting::Release { session: id, id: packet_id }));
            }
        }
        Outcome::Continue
    }

    fn on_pubcomp(&mut self, id: SessionId, packet_id: u16, batch: &mut Batch<'_>) {
        let session = &mut self.client(id).session;
        match session.slots.get(&packet_id) {
            Some(Slot::Memory { queued, .. }) if queued.qos == Qos::ExactlyOnce => {
                session.slots.remove(&packet_id);
            }
            Some(Slot::Log { stream, sequence }) => {
                let (stream, sequence) = (*stream, *sequence);
                if session.lanes[usize::from(stream)].find(sequence).is_some_and(|o| o.qos == Qos::ExactlyOnce) {
                    batch.changes().outbound.insert((session.client_id.to_string(), packet_id), None);
                    self.finish(id, packet_id, stream, sequence);
                }
            }
            Some(Slot::Memory { .. }) | None => {}
        }
    }

    /// The id is free once that is on disk: a PUBCOMP that a crash forgets would let a new message pass for the old.
    fn on_pubrel(&mut self, id: SessionId, conn: &Rc<Conn>, packet_id: u16, batch: &mut Batch<'_>) -> Outcome {
        let session = &mut self.client(id).session;
        let known = session.inbound.remove(&packet_id);
        let kept = known && session.consumer.is_some();
        if kept {
            batch.changes().inbound.insert((session.client_id.to_string(), packet_id), false);
        }
        if known {
            self.owe(conn, 0x70, packet_id, kept, batch);
        } else {
            let code = if conn.version().is_v5() { reason::PACKET_ID_NOT_FOUND } else { 0 };
            conn.wire.borrow().pubcomp(&mut conn.out.borrow_mut(), packet_id, code);
            self.touch(conn);
        }
        Outcome::Continue
    }

    // ---- subscriptions --------------------------------------------------------------------------------------------

    fn on_subscribe(&mut self, id: SessionId, conn: &Rc<Conn>, s: codec::Subscribe, batch: &mut Batch<'_>) -> Outcome {
        if s.filters.is_empty() {
            return Outcome::Close(WireError::new(reason::PROTOCOL_ERROR, "a SUBSCRIBE without a filter"));
        }
        let since = batch.sequence();
        let mut codes = Vec::with_capacity(s.filters.len());
        for (text, options) in &s.filters {
            match self.subscribe_one(id, text, *options, s.identifier, since) {
                Ok(code) => codes.push(code),
                Err(e) => return Outcome::Close(e),
            }
        }
        let durable = self.client(id).session.consumer.is_some();
        if durable {
            self.save(id, batch);
        }
        let mut bytes = bytes::BytesMut::new();
        conn.wire.borrow_mut().suback(&mut bytes, s.id, &codes);
        self.answer(conn, bytes.freeze(), durable, batch);
        self.pump(id, batch);
        Outcome::Continue
    }

    /// An answer that follows the commit where the session is durable.
    fn answer(&mut self, conn: &Rc<Conn>, bytes: Bytes, durable: bool, batch: &mut Batch<'_>) {
        if durable {
            conn.owed.set(conn.owed.get() + 1);
            let ticket = batch.ticket();
            self.waiting.push_back((ticket, Waiting::Frame { conn: Rc::clone(conn), bytes }));
        } else {
            conn.out.borrow_mut().extend_from_slice(&bytes);
            self.touch(conn);
        }
    }

    fn subscribe_one(
        &mut self,
        id: SessionId,
        text: &ByteString,
        options: codec::SubscribeOptions,
        identifier: Option<u32>,
        since: u64,
    ) -> Result<u8, WireError> {
        if text.starts_with("$share/") {
            if options.no_local {
                return Err(WireError::new(reason::PROTOCOL_ERROR, "a shared subscription with no-local"));
            }
            return Ok(reason::SHARED_NOT_SUPPORTED);
        }
        let filter = TopicFilter::new(ByteString::from(&**text))
            .map_err(|e| WireError::new(reason::MALFORMED, format!("topic filter: {e}")))?;
        let client = self.client(id);
        if !client.rules.may_subscribe(&filter) {
            debug!(client = %client.session.client_id, %filter, "subscribe refused by the rules");
            return Ok(reason::NOT_AUTHORIZED);
        }
        let text = ByteString::from(filter.as_str());
        let old = client.session.subscriptions.get(&text).cloned();
        let kept = Kept {
            qos: options.qos,
            no_local: options.no_local,
            retain_as_published: options.retain_as_published,
            identifier,
            // A subscription that is renewed keeps its place; one that could not be owed anything begins now.
            since: old.as_ref().filter(|o| o.qos > Qos::AtMostOnce).map_or(since, |o| o.since),
        };
        self.router.subscribe(&filter, subscription(id, &kept));
        self.client(id).session.subscriptions.insert(text, kept);
        if old.is_none() {
            self.counters.subscriptions.add(1);
        }
        let send_retained = match options.retain_handling {
            0 => true,
            1 => old.is_none(),
            _ => false,
        };
        if send_retained {
            self.queue_retained(id, &filter, options.qos, identifier);
        }
        Ok(options.qos as u8)
    }

    fn queue_retained(&mut self, id: SessionId, filter: &TopicFilter, qos: Qos, identifier: Option<u32>) {
        let identifiers: SmallVec<[u32; 1]> = identifier.into_iter().collect();
        // The levels before the first wildcard bound what has to be looked at.
        let literal: String =
            filter.levels().take_while(|l| *l != "+" && *l != "#").collect::<Vec<_>>().join("/");
        let mut found = Vec::new();
        let from = (Bound::Included(literal.as_str()), Bound::Unbounded);
        for (topic, _) in self.retained.range::<str, _>(from) {
            if !topic.as_str().starts_with(&literal) {
                break;
            }
            if filter.matches(topic.as_str()) {
                found.push((topic.clone(), qos, identifiers.clone()));
            }
        }
        self.client(id).session.retained.extend(found);
    }

    fn on_unsubscribe(
        &mut self,
        id: SessionId,
        conn: &Rc<Conn>,
        packet_id: u16,
        filters: Vec<ByteString>,
        batch: &mut Batch<'_>,
    ) -> Outcome {
        if filters.is_empty() {
            return Outcome::Close(WireError::new(reason::PROTOCOL_ERROR, "an UNSUBSCRIBE without a filter"));
        }
        let mut codes = Vec::with_capacity(filters.len());
        for text in filters {
            let Ok(filter) = TopicFilter::new(text.clone()) else {
                codes.push(reason::TOPIC_FILTER_INVALID);
                continue;
            };
            if self.client(id).session.subscriptions.remove(&text).is_some() {
                self.router.unsubscribe(&filter, id);
                self.counters.subscriptions.set(self.counters.subscriptions.get().saturating_sub(1));
                codes.push(reason::SUCCESS);
            } else {
                codes.push(reason::NO_SUBSCRIPTION_EXISTED);
            }
        }
        let durable = self.client(id).session.consumer.is_some();
        if durable {
            self.save(id, batch);
        }
        let mut bytes = bytes::BytesMut::new();
        conn.wire.borrow_mut().unsuback(&mut bytes, packet_id, &codes);
        self.answer(conn, bytes.freeze(), durable, batch);
        Outcome::Continue
    }

    // ---- publish --------------------------------------------------------------------------------------------------

    /// Takes a message in: retained, delivered to those who are here, appended for those who are owed it. True where
    /// its acknowledgement has to wait for the commit.
    pub fn publish(&mut self, incoming: &Incoming<'_>, batch: &mut Batch<'_>) -> Result<bool, Refused> {
        let log = self.log.clone();
        let route = self.router.route(incoming.topic, |t| log.stream_of(t)).map_err(|_| Refused::InvalidTopic)?;
        let now = clock::wall();
        let mut durable_sessions = false;
        if incoming.qos > Qos::AtMostOnce {
            for r in &route.recipients {
                durable_sessions |= r.qos > Qos::AtMostOnce && self.is_durable(r.session) && !self.is_own(r, incoming.from);
            }
        }
        let logged = !route.consumers.is_empty() || durable_sessions;
        let stream = route.stream.filter(|_| logged);
        if let Some(stream) = stream {
            let state = self.log.stream(stream);
            if state.when_full == WhenFull::Reject && state.is_full() {
                return Err(Refused::Full(state.name.clone()));
            }
        }
        let mut message = Message {
            topic: route.topic.clone(),
            payload: incoming.payload.clone(),
            qos: incoming.qos,
            retain: incoming.retain,
            properties: incoming.properties.map(|p| Box::new(p.clone())),
            source: Arc::clone(incoming.source),
            sequence: crate::message::Sequence(0),
            received: now,
        };
        let retained = incoming.retain && self.retain(&message, batch)?;
        self.deliver_live(&route, &message, incoming.from, now);
        if let Some(stream) = stream {
            let bytes = message.size_bytes();
            message.sequence = batch.append(stream, &MessageRef::from(&message));
            for consumer in &route.consumers {
                consumer.matched(stream, message.sequence, bytes);
            }
            if durable_sessions {
                for r in &route.recipients {
                    if r.qos > Qos::AtMostOnce
                        && !self.is_own(r, incoming.from)
                        && let Some(consumer) = self.get(r.session).and_then(|c| c.session.consumer.clone())
                    {
                        consumer.matched(stream, message.sequence, bytes);
                    }
                }
                let ticket = batch.ticket();
                let message = Rc::new(detach(&message));
                self.waiting.push_back((ticket, Waiting::Deliver { stream, message, route }));
            }
        }
        Ok(stream.is_some() || retained)
    }

    fn is_durable(&self, id: SessionId) -> bool {
        self.clients.get(id as usize).and_then(Option::as_ref).is_some_and(|c| c.session.consumer.is_some())
    }

    fn is_own(&self, r: &Recipient, from: Option<SessionId>) -> bool {
        r.no_local && from == Some(r.session)
    }

    fn retain(&mut self, message: &Message, batch: &mut Batch<'_>) -> Result<bool, Refused> {
        let topic = message.topic.as_str().to_owned();
        if message.payload.is_empty() {
            let Some(old) = self.retained.remove(&message.topic) else { return Ok(false) };
            self.retained_bytes -= old.size_bytes();
            batch.changes().retained.insert(topic, None);
        } else {
            let old_bytes = self.retained.get(&message.topic).map(|m| m.size_bytes());
            let bytes = self.retained_bytes + message.size_bytes() - old_bytes.unwrap_or(0);
            if bytes > RETAINED_BYTES_MAX || old_bytes.is_none() && self.retained.len() >= RETAINED_MAX {
                warn!(topic, "too many retained messages; this one is refused");
                return Err(Refused::RetainedFull);
            }
            self.retained_bytes = bytes;
            batch.changes().retained.insert(topic, Some(record::encode_one(message)));
            self.retained.insert(message.topic.clone(), Rc::new(detach(message)));
        }
        self.counters.retained.set(self.retained.len() as u64);
        Ok(true)
    }

    /// To sessions that get it from memory: those that are not durable, and QoS 0 deliveries of those that are.
    fn deliver_live(&mut self, route: &Rc<Route>, message: &Message, from: Option<SessionId>, now: Timestamp) {
        let mut frames: SmallVec<[((bool, Qos, bool), PublishFrame); 2]> = SmallVec::new();
        let mut kept: Option<Rc<Message>> = None;
        let mut lost: Vec<SessionId> = Vec::new();
        for r in &route.recipients {
            let qos = message.qos.min(r.qos);
            let own = self.is_own(r, from);
            let Some(client) = self.clients.get_mut(r.session as usize).and_then(Option::as_mut) else { continue };
            if own || qos > Qos::AtMostOnce && client.session.consumer.is_some() {
                continue;
            }
            let Some(conn) = client.conn.clone() else { continue };
            if !client.rules.may_receive(message.topic.as_str()) {
                continue;
            }
            let retain = message.retain && r.retain_as_published;
            let v5 = conn.version().is_v5();
            if qos > Qos::AtMostOnce && !has_room(&client.session, &conn) {
                let message = Rc::clone(kept.get_or_insert_with(|| Rc::new(detach(message))));
                let queued = Queued { message, qos, retain, identifiers: r.identifiers.clone() };
                if !client.session.enqueue(queued) {
                    lost.push(r.session);
                }
                continue;
            }
            if qos == Qos::AtMostOnce && conn.out.borrow().len() > OUT_BYTES_MAX {
                conn.dropped.set(conn.dropped.get() + 1);
                self.counters.dropped.add(1);
                continue;
            }
            let encode = |identifiers: &[u32]| {
                let how = Delivery { v5, qos, retain, identifiers, expiry_s: message.expires_in_s(now), alias: None };
                PublishFrame::encode(message, &how)
            };
            let own_frame;
            let frame = if r.identifiers.is_empty() {
                match frames.iter().position(|(key, _)| *key == (v5, qos, retain)) {
                    Some(at) => &frames[at].1,
                    None => {
                        frames.push(((v5, qos, retain), encode(&[])));
                        &frames[frames.len() - 1].1
                    }
                }
            } else {
                own_frame = encode(&r.identifiers);
                &own_frame
            };
            if frame.bytes() > conn.wire.borrow().out_bytes_max() {
                // MQTT 5, 3.1.2-25: what the client cannot take is treated as if it had been sent.
                self.counters.dropped.add(1);
                continue;
            }
            let mut packet_id = 0;
            if qos > Qos::AtMostOnce {
                packet_id = client.session.take_id().expect("the window is far below the ids");
                let message = Rc::clone(kept.get_or_insert_with(|| Rc::new(detach(message))));
                let queued = Queued { message, qos, retain, identifiers: r.identifiers.clone() };
                client.session.slots.insert(packet_id, Slot::Memory { queued, state: State::Sent });
            }
            frame.write(&mut conn.out.borrow_mut(), packet_id, false);
            self.counters.delivered.add(1);
            self.touch(&conn);
        }
        for id in lost {
            self.declare_slow(id, message, now);
        }
    }

    /// A client that reads too slowly loses messages: never in silence.
    fn declare_slow(&mut self, id: SessionId, message: &Message, now: Timestamp) {
        self.counters.dropped.add(1);
        let client = self.client(id);
        let name = client.session.client_id.clone();
        if let Some(conn) = &client.conn {
            if conn.dropped.replace(conn.dropped.get() + 1) == 0 {
                warn!(client = %name, "reads too slowly: messages to it are lost from here on, and counted");
            }
            conn.lost.borrow_mut().add(message, now);
        }
    }

    // ---- the log's deliveries ---------------------------------------------------------------------------------------

    /// A commit has ended: acknowledgements leave, and what was logged goes to the sessions that are owed it.
    pub fn commit_ended(&mut self, generation: u64, result: &Result<Vec<Arc<Segment>>, String>, batch: &mut Batch<'_>) {
        while self.waiting.front().is_some_and(|(g, _)| *g <= generation) {
            let (_, waiting) = self.waiting.pop_front().expect("just looked");
            match result {
                Ok(_) => self.go_on(waiting, batch),
                Err(why) => self.give_up(waiting, why),
            }
        }
    }

    fn go_on(&mut self, waiting: Waiting, batch: &mut Batch<'_>) {
        match waiting {
            Waiting::Ack { conn, first, id } => {
                conn.owed.set(conn.owed.get() - 1);
                conn.unacknowledged.set(conn.unacknowledged.get() - u32::from(first == 0x40));
                write_answer(&conn, first, id, 0);
                self.touch(&conn);
            }
            Waiting::Frame { conn, bytes } => {
                conn.owed.set(conn.owed.get() - 1);
                conn.out.borrow_mut().extend_from_slice(&bytes);
                self.touch(&conn);
            }
            Waiting::Deliver { stream, message, route } => {
                for r in &route.recipients {
                    if r.qos > Qos::AtMostOnce {
                        self.deliver_logged(r, stream, &message, batch);
                    }
                }
            }
            Waiting::Claimed { session, id, message, recipient } => self.send_claimed(session, id, &message, &recipient, false),
            Waiting::Release { session, id } => {
                if let Some(conn) = self.get(session).and_then(|c| c.conn.clone()) {
                    conn.wire.borrow_mut().pubrel(&mut conn.out.borrow_mut(), id);
                    self.touch(&conn);
                }
            }
            // Whoever asked may be gone.
            Waiting::Reply(reply) => drop(reply.send(Ok(()))),
        }
    }

    /// The commit failed: MQTT 5 is told, 3.1.1 is disconnected so that it comes again.
    fn give_up(&mut self, waiting: Waiting, why: &str) {
        match waiting {
            Waiting::Ack { conn, first, id } => {
                conn.owed.set(conn.owed.get() - 1);
                conn.unacknowledged.set(conn.unacknowledged.get() - u32::from(first == 0x40));
                if first != 0x40
                    && let Some(client) = self.get(conn.session.get())
                {
                    // The id is not taken: the same PUBLISH may come again. A PUBREL comes again as well.
                    if first == 0x50 {
                        client.session.inbound.remove(&id);
                    } else {
                        client.session.inbound.insert(id);
                    }
                }
                if conn.version().is_v5() && first != 0x70 {
                    write_answer(&conn, first, id, reason::QUOTA_EXCEEDED);
                    self.touch(&conn);
                } else {
                    conn.close("the log could not be written");
                }
            }
            Waiting::Frame { conn, .. } => {
                conn.owed.set(conn.owed.get() - 1);
                conn.close("the log could not be written");
            }
            Waiting::Reply(reply) => drop(reply.send(Err(PublishError::NotDurable(why.to_owned())))),
            // Never sent: it comes again from the log, or never was there.
            Waiting::Deliver { .. } => {}
            Waiting::Claimed { session, id, message, .. } => {
                // Its row goes into the next commit; it is sent when the client is back.
                if let Some(client) = self.get(session)
                    && let Some(Slot::Log { stream, .. }) = client.session.slots.get(&id)
                {
                    let lane = &mut client.session.lanes[usize::from(*stream)];
                    if let Some(open) = lane.find(message.sequence.0).filter(|o| o.state == State::Claimed) {
                        open.state = State::Sent;
                        lane.claimed -= 1;
                    }
                }
                self.close_session(session);
            }
            Waiting::Release { session, .. } => self.close_session(session),
        }
    }

    fn close_session(&mut self, id: SessionId) {
        if let Some(conn) = self.get(id).and_then(|c| c.conn.clone()) {
            conn.close("the log could not be written");
        }
    }

    /// A message that has just been committed goes straight to a session that keeps up.
    fn deliver_logged(&mut self, r: &Recipient, stream: u16, message: &Rc<Message>, batch: &mut Batch<'_>) {
        let log = self.log.clone();
        let sequence = message.sequence.0;
        let Some(client) = self.get(r.session) else { return };
        let (Some(consumer), Some(conn)) = (client.session.consumer.clone(), client.conn.clone()) else { return };
        if r.no_local && message.source == client.session.source {
            return;
        }
        let room = has_room(&client.session, &conn);
        let Some(lane) = client.session.lanes.get_mut(usize::from(stream)) else { return };
        if sequence <= lane.read || lane.behind {
            return;
        }
        // Where a limit is dropping just now, the pump comes back to it after that commit.
        let Some(after) = consumer.hold(&log, stream, lane.read.max(sequence - 1)) else {
            lane.behind = true;
            self.blocked.push(r.session);
            return;
        };
        if !room || after >= sequence {
            lane.behind = !room;
            hold_open(&consumer, stream, lane);
            return;
        }
        lane.read = sequence;
        self.send_logged(r, stream, message, batch);
        let lane = &self.client(r.session).session.lanes[usize::from(stream)];
        hold_open(&consumer, stream, lane);
    }

    /// Sends a message of the log to a session that has room; it is open from here on.
    fn send_logged(&mut self, r: &Recipient, stream: u16, message: &Rc<Message>, batch: &mut Batch<'_>) {
        let now = clock::wall();
        let sequence = message.sequence.0;
        let client = self.client(r.session);
        let Some(conn) = client.conn.clone() else { return };
        let qos = message.qos.min(r.qos);
        let pass = if !client.rules.may_receive(message.topic.as_str()) {
            Some(None)
        } else if message.is_expired(now) {
            Some(Some("expired"))
        } else {
            let frame = encode(&conn, message, qos, r, now);
            if frame.bytes() > conn.wire.borrow().out_bytes_max() {
                Some(Some("too large"))
            } else if qos == Qos::AtLeastOnce && client.session.lanes[usize::from(stream)].claimed == 0 {
                let id = client.session.take_id().expect("the window is far below the ids");
                frame.write(&mut conn.out.borrow_mut(), id, false);
                open(&mut client.session, stream, message, id, qos, State::Sent);
                self.counters.delivered.add(1);
                self.touch(&conn);
                None
            } else {
                let id = client.session.take_id().expect("the window is far below the ids");
                open(&mut client.session, stream, message, id, qos, State::Claimed);
                client.session.lanes[usize::from(stream)].claimed += 1;
                if qos == Qos::ExactlyOnce {
                    let client_id = client.session.client_id.to_string();
                    let row = OutboundRow { client_id: client_id.clone(), packet_id: id, stream, sequence, received: false };
                    batch.changes().outbound.insert((client_id, id), Some(row));
                }
                let claimed = Waiting::Claimed { session: r.session, id, message: Rc::clone(message), recipient: r.clone() };
                self.waiting.push_back((batch.ticket(), claimed));
                None
            }
        };
        let Some(why) = pass else { return };
        let session = &mut self.client(r.session).session;
        if let Some(why) = why {
            let name = format!("session:{}", session.client_id);
            let mut row = loss(&name, &message.source, why, message.size_bytes() as u64, now);
            (row.first, row.last) = (sequence, sequence);
            batch.changes().losses.push(row);
        }
        let lane = &mut session.lanes[usize::from(stream)];
        let (_, _, done) = lane.settle();
        if let Some(consumer) = &session.consumer {
            consumer.advance(stream, done, 1, message.size_bytes() as u64);
        }
    }

    fn send_claimed(&mut self, id: SessionId, packet_id: u16, message: &Rc<Message>, r: &Recipient, dup: bool) {
        let Some(client) = self.get(id) else { return };
        let Some(Slot::Log { stream, sequence }) = client.session.slots.get(&packet_id) else { return };
        let (stream, sequence) = (usize::from(*stream), *sequence);
        if sequence != message.sequence.0 {
            return;
        }
        let lane = &mut client.session.lanes[stream];
        let Some(open) = lane.find(sequence).filter(|o| o.state == State::Claimed) else { return };
        open.state = State::Sent;
        let qos = open.qos;
        lane.claimed -= 1;
        let Some(conn) = client.conn.clone() else { return };
        let frame = encode(&conn, message, qos, r, clock::wall());
        frame.write(&mut conn.out.borrow_mut(), packet_id, dup);
        self.counters.delivered.add(1);
        self.touch(&conn);
    }

    /// Gives a session what it is owed, as far as its window and its connection take it: retained messages, what waits
    /// in memory, then the log.
    pub fn pump(&mut self, id: SessionId, batch: &mut Batch<'_>) {
        let Some(client) = self.get(id) else { return };
        let Some(conn) = client.conn.clone() else { return };
        self.pump_retained(id, &conn);
        loop {
            let client = self.client(id);
            if client.session.queue.is_empty() || !has_room(&client.session, &conn) {
                break;
            }
            let queued = client.session.dequeue().expect("just looked");
            self.send_queued(id, &conn, queued);
        }
        let lanes = self.client(id).session.lanes.len();
        for stream in 0..lanes {
            self.pump_lane(id, &conn, stream as u16, batch);
        }
    }

    fn pump_retained(&mut self, id: SessionId, conn: &Rc<Conn>) {
        loop {
            let client = self.client(id);
            if client.session.retained.is_empty() || !has_room(&client.session, conn) {
                return;
            }
            let (topic, qos, identifiers) = client.session.retained.pop_front().expect("just looked");
            let Some(message) = self.retained.get(&topic).cloned() else { continue };
            let client = self.client(id);
            if message.is_expired(clock::wall()) || !client.rules.may_receive(topic.as_str()) {
                continue;
            }
            let queued = Queued { qos: qos.min(message.qos), message, retain: true, identifiers };
            self.send_queued(id, conn, queued);
        }
    }

    fn send_queued(&mut self, id: SessionId, conn: &Rc<Conn>, queued: Queued) {
        let now = clock::wall();
        if queued.message.is_expired(now) {
            return;
        }
        let frame = encode_queued(conn, &queued, now);
        if frame.bytes() > conn.wire.borrow().out_bytes_max() {
            self.counters.dropped.add(1);
            return;
        }
        let mut packet_id = 0;
        if queued.qos > Qos::AtMostOnce {
            let session = &mut self.client(id).session;
            packet_id = session.take_id().expect("the window is far below the ids");
            session.slots.insert(packet_id, Slot::Memory { queued, state: State::Sent });
        }
        frame.write(&mut conn.out.borrow_mut(), packet_id, false);
        self.counters.delivered.add(1);
        self.touch(conn);
    }

    fn pump_lane(&mut self, id: SessionId, conn: &Rc<Conn>, stream: u16, batch: &mut Batch<'_>) {
        let log = self.log.clone();
        loop {
            let client = self.client(id);
            let room = has_room(&client.session, conn);
            let Some(consumer) = client.session.consumer.clone() else { return };
            let lane = &mut client.session.lanes[usize::from(stream)];
            if !lane.behind || lane.reading || !room {
                return;
            }
            if lane.read >= log.tail(stream) || !consumer.has_backlog(stream) && lane.open.is_empty() {
                lane.behind = false;
                lane.read = lane.read.max(log.tail(stream));
                consumer.advance(stream, lane.open.front().map_or(lane.read, |o| o.sequence - 1), 0, 0);
                hold_open(&consumer, stream, lane);
                return;
            }
            let Some(after) = consumer.hold(&log, stream, lane.read) else {
                self.blocked.push(id);
                return;
            };
            lane.read = after;
            match log.segment_in_memory(stream, after) {
                Some(segment) => self.feed(id, stream, &segment, batch),
                None => {
                    lane.reading = true;
                    let filters: Arc<[TopicFilter]> = consumer.filters().iter().map(|(f, _)| f.clone()).collect();
                    self.reads.push((id, stream, after, filters));
                    return;
                }
            }
        }
    }

    /// A read that `pump_lane` asked for has come back.
    pub fn read_ended(&mut self, id: SessionId, stream: u16, after: u64, read: Read, batch: &mut Batch<'_>) {
        let Some(client) = self.get(id) else { return };
        let Some(lane) = client.session.lanes.get_mut(usize::from(stream)) else { return };
        if !lane.reading {
            return;
        }
        lane.reading = false;
        if lane.read == after && client.conn.is_some() {
            match read {
                Read::Segment(segment) => self.feed(id, stream, &segment, batch),
                Read::Nothing(to) => self.skip_to(id, stream, to),
                Read::Damaged(h) => {
                    let name = format!("session:{}", self.client(id).session.client_id);
                    let mut row = loss(&name, &"(unknown)".into(), "damaged", h.bytes, clock::wall());
                    (row.first, row.last, row.count) = (h.first, h.last, u64::from(h.count));
                    batch.changes().losses.push(row);
                    self.skip_to(id, stream, h.last);
                }
                Read::End => self.skip_to(id, stream, after),
            }
        }
        self.pump(id, batch);
    }

    fn skip_to(&mut self, id: SessionId, stream: u16, to: u64) {
        let tail = self.log.tail(stream);
        let session = &mut self.client(id).session;
        let lane = &mut session.lanes[usize::from(stream)];
        lane.read = lane.read.max(to);
        if lane.read >= tail {
            lane.behind = false;
        }
        if let Some(consumer) = &session.consumer {
            consumer.advance(stream, lane.open.front().map_or(lane.read, |o| o.sequence - 1), 0, 0);
            hold_open(consumer, stream, lane);
        }
    }

    /// Sends what a segment has for a session, in order, until its window is full.
    fn feed(&mut self, id: SessionId, stream: u16, segment: &Segment, batch: &mut Batch<'_>) {
        let after = self.client(id).session.lanes[usize::from(stream)].read;
        let mut records = segment.records();
        loop {
            let message = match records.next() {
                Ok(Some(message)) if message.sequence.0 <= after => continue,
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(_) => {
                    let name = format!("session:{}", self.client(id).session.client_id);
                    let mut row = loss(&name, &"(unknown)".into(), "damaged", 0, clock::wall());
                    (row.first, row.last, row.count) = (segment.first, segment.last, 0);
                    batch.changes().losses.push(row);
                    break;
                }
            };
            let client = self.client(id);
            let Some(conn) = client.conn.clone() else { return };
            let sequence = message.sequence.0;
            let again = client.session.lanes[usize::from(stream)].find(sequence).map(|o| (o.id, o.qos, o.state));
            if again.is_none() && !has_room(&client.session, &conn) {
                let consumer = client.session.consumer.clone();
                let lane = &client.session.lanes[usize::from(stream)];
                if let Some(consumer) = consumer {
                    hold_open(&consumer, stream, lane);
                }
                return;
            }
            client.session.lanes[usize::from(stream)].read = sequence;
            let recipient = recipient(id, &client.session, &message);
            match (again, recipient) {
                (Some((packet_id, qos, state)), recipient) => self.send_again(id, packet_id, qos, state, message, recipient),
                (None, Some(r)) => self.send_logged(&r, stream, &Rc::new(message), batch),
                (None, None) => {}
            }
        }
        self.skip_to(id, stream, segment.last);
    }

    /// Something that was in flight before the client went away (MQTT 5, 4.4): under the same id.
    fn send_again(&mut self, id: SessionId, packet_id: u16, qos: Qos, state: State, message: Message, r: Option<Recipient>) {
        let client = self.client(id);
        let Some(conn) = client.conn.clone() else { return };
        match state {
            State::Received => conn.wire.borrow_mut().pubrel(&mut conn.out.borrow_mut(), packet_id),
            State::Sent => {
                // The subscription may be gone; what was sent once is still owed to its end.
                let r = r.unwrap_or(Recipient {
                    session: id,
                    qos,
                    retain_as_published: false,
                    no_local: false,
                    identifiers: SmallVec::new(),
                });
                let frame = encode(&conn, &message, qos, &r, clock::wall());
                frame.write(&mut conn.out.borrow_mut(), packet_id, true);
            }
            // Its commit is still to come and sends it; what is done is done.
            State::Claimed | State::Done => {}
        }
        self.touch(&conn);
    }

    // ---- in-process clients ---------------------------------------------------------------------------------------

    /// Publishes for a connector, module or uplink; the answer comes with the commit.
    pub fn apply(
        &mut self,
        name: &str,
        effects: Effects,
        cursors: Vec<(i64, u16, u64)>,
        reply: oneshot::Sender<Result<(), PublishError>>,
        batch: &mut Batch<'_>,
    ) {
        let log = self.log.clone();
        // Nothing of it, or all of it: what would be refused is looked for first.
        for message in &effects.publish {
            let Ok(route) = self.router.route(message.topic.as_byte_string(), |t| log.stream_of(t)) else { continue };
            if let Some(stream) = route.stream.filter(|_| !route.consumers.is_empty()) {
                let state = log.stream(stream);
                if state.when_full == WhenFull::Reject && state.is_full() {
                    let _ = reply.send(Err(PublishError::Full(state.name.clone())));
                    return;
                }
            }
        }
        let mut durable = !cursors.is_empty() || !effects.dead.is_empty() || !effects.state.is_empty();
        for message in &effects.publish {
            self.counters.received.add(1);
            match self.publish(&Incoming::of(message), batch) {
                Ok(waits) => durable |= waits,
                // Only a retained message too many is left to be refused: it is delivered to nobody and said so.
                Err(_) => {
                    let mut row = loss("gateway", &message.source, "refused", message.size_bytes() as u64, clock::wall());
                    row.count = 1;
                    batch.changes().losses.push(row);
                }
            }
        }
        let changes = batch.changes();
        for (consumer, stream, sequence) in cursors {
            changes.cursors.insert((consumer, stream), sequence);
        }
        changes.dead.extend(effects.dead.iter().filter(|(e, _)| !e.notice).map(|(entry, why)| dead_row(name, entry, why)));
        let module = name.strip_prefix("module:").unwrap_or(name);
        for (key, value) in effects.state {
            changes.module_state.insert((module.to_owned(), key), value);
        }
        if durable {
            let ticket = batch.ticket();
            self.waiting.push_back((ticket, Waiting::Reply(reply)));
        } else {
            let _ = reply.send(Ok(()));
        }
    }

    /// Opens a durable consumer for an uplink or a module.
    pub fn open_consumer(&mut self, name: &str, filters: &[TopicFilter], batch: &mut Batch<'_>) -> Arc<ConsumerState> {
        if let Some(old) = self.log.find_consumer(name) {
            for (filter, _) in old.filters().iter() {
                self.router.remove_consumer(filter, old.id());
            }
        }
        let state = self.log.consumer(batch, name, filters);
        for filter in filters {
            self.router.add_consumer(filter, &state);
        }
        state
    }

    /// Nothing new is for this consumer; its backlog stays.
    pub fn retire_consumer(&mut self, name: &str, batch: &mut Batch<'_>) {
        if let Some(state) = self.log.find_consumer(name) {
            for (filter, _) in state.filters().iter() {
                self.router.remove_consumer(filter, state.id());
            }
            self.log.retire(batch, &state);
        }
    }

    // ---- time -----------------------------------------------------------------------------------------------------

    /// Once a second: wills that are due, sessions that are over, retained messages that have expired, losses to tell.
    pub fn tick(&mut self, now: Instant, batch: &mut Batch<'_>) {
        for id in 0..self.clients.len() as SessionId {
            let Some(client) = self.get(id) else { continue };
            let due = client.will_due.is_some_and(|due| due <= now);
            let over = client.session.is_over(now);
            if let Some(conn) = &client.conn {
                let lost = std::mem::take(&mut *conn.lost.borrow_mut());
                if let Some(row) = lost.row(&client.session.client_id) {
                    batch.changes().losses.push(row);
                }
            }
            if due {
                let client = self.client(id);
                client.will_due = None;
                if let Some(will) = client.will.take() {
                    self.publish_will(id, will, batch);
                }
            }
            if over {
                info!(client = %self.client(id).session.client_id, "session expired");
                self.end_session(id, batch);
            }
        }
        self.publish_orphans(|_, due| due <= now, batch);
        let wall = clock::wall();
        let expired: Vec<Topic> =
            self.retained.iter().filter(|(_, m)| m.is_expired(wall)).map(|(t, _)| t.clone()).collect();
        for topic in expired {
            if let Some(old) = self.retained.remove(&topic) {
                self.retained_bytes -= old.size_bytes();
                batch.changes().retained.insert(topic.as_str().to_owned(), None);
            }
        }
        self.counters.retained.set(self.retained.len() as u64);
    }

    /// The end: clients are told, nothing new is taken.
    pub fn shut_down(&mut self) {
        self.draining = true;
        let conns: Vec<Rc<Conn>> = self.clients.iter().flatten().filter_map(|c| c.conn.clone()).collect();
        for conn in conns {
            conn.wire.borrow_mut().disconnect(&mut conn.out.borrow_mut(), reason::SERVER_SHUTTING_DOWN, "");
            self.touch(&conn);
            conn.close("the gateway stops");
        }
    }

    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// After a commit: sessions that could not read because a limit was dropping.
    pub fn retry(&mut self, batch: &mut Batch<'_>) {
        for id in std::mem::take(&mut self.blocked) {
            self.pump(id, batch);
        }
    }
}

fn lanes(consumer: &Arc<ConsumerState>, streams: impl Iterator<Item = u16>) -> Vec<Lane> {
    let count = streams.map(|s| usize::from(s) + 1).max().unwrap_or(0);
    (0..count).map(|s| Lane { read: consumer.done(s as u16), behind: true, ..Lane::default() }).collect()
}

fn subscription(session: SessionId, kept: &Kept) -> Subscription {
    Subscription {
        session,
        qos: kept.qos,
        no_local: kept.no_local,
        retain_as_published: kept.retain_as_published,
        identifier: kept.identifier,
    }
}

/// The session's own part in a message read from the log: its subscriptions as they are now.
fn recipient(id: SessionId, session: &Session, message: &Message) -> Option<Recipient> {
    let mut found = Vec::with_capacity(1);
    let own = message.source == session.source;
    for (filter, kept) in &session.subscriptions {
        if kept.qos == Qos::AtMostOnce || message.sequence.0 <= kept.since || own && kept.no_local {
            continue;
        }
        if TopicFilter::new(filter.clone()).is_ok_and(|f| f.matches(message.topic.as_str())) {
            add(&mut found, &subscription(id, kept));
        }
    }
    found.pop().filter(|r| message.qos.min(r.qos) > Qos::AtMostOnce)
}

fn has_room(session: &Session, conn: &Conn) -> bool {
    session.in_flight() < usize::from(conn.window.get()) && conn.out.borrow().len() < OUT_BYTES_PAUSE
}

fn open(session: &mut Session, stream: u16, message: &Message, id: u16, qos: Qos, state: State) {
    let sequence = message.sequence.0;
    let lane = &mut session.lanes[usize::from(stream)];
    // Mostly the last; behind a restored QoS 2 message it may not be.
    let at = lane.open.partition_point(|o| o.sequence < sequence);
    lane.open.insert(at, Open { sequence, bytes: message.size_bytes() as u64, id, qos, state });
    session.slots.insert(id, Slot::Log { stream, sequence });
}

/// What is open is in the session's hands and not dropped by a limit.
fn hold_open(consumer: &ConsumerState, stream: u16, lane: &Lane) {
    let range = lane.open.front().zip(lane.open.back()).map(|(f, b)| (f.sequence, b.sequence));
    consumer.holds(stream, range);
}

fn encode(conn: &Conn, message: &Message, qos: Qos, r: &Recipient, now: Timestamp) -> PublishFrame {
    let how = Delivery {
        v5: conn.version().is_v5(),
        qos,
        retain: message.retain && r.retain_as_published,
        identifiers: &r.identifiers,
        expiry_s: message.expires_in_s(now),
        alias: None,
    };
    PublishFrame::encode(message, &how)
}

fn encode_queued(conn: &Conn, q: &Queued, now: Timestamp) -> PublishFrame {
    let how = Delivery {
        v5: conn.version().is_v5(),
        qos: q.qos,
        retain: q.retain,
        identifiers: &q.identifiers,
        expiry_s: q.message.expires_in_s(now),
        alias: None,
    };
    PublishFrame::encode(&q.message, &how)
}

fn write_answer(conn: &Conn, first: u8, id: u16, code: u8) {
    let wire = conn.wire.borrow();
    let mut out = conn.out.borrow_mut();
    match first {
        0x40 => wire.puback(&mut out, id, code),
        0x50 => wire.pubrec(&mut out, id, code),
        _ => wire.pubcomp(&mut out, id, code),
    }
}

/// Replaces an alias by its topic, and keeps a new one (MQTT 5, 3.3.2.3.4).
fn resolve_alias(conn: &Conn, p: &mut codec::Publish) -> Result<(), WireError> {
    if p.alias == 0 {
        if p.topic.is_empty() {
            return Err(WireError::new(reason::PROTOCOL_ERROR, "neither a topic nor a topic alias"));
        }
        return Ok(());
    }
    if p.alias > TOPIC_ALIAS_MAX {
        return Err(WireError::new(reason::TOPIC_ALIAS_INVALID, "a topic alias above the maximum"));
    }
    let mut aliases = conn.aliases.borrow_mut();
    let index = usize::from(p.alias);
    if p.topic.is_empty() {
        p.topic = aliases
            .get(index)
            .cloned()
            .flatten()
            .ok_or_else(|| WireError::new(reason::PROTOCOL_ERROR, "a topic alias that was not set"))?;
    } else {
        if aliases.len() <= index {
            aliases.resize(index + 1, None);
        }
        aliases[index] = Some(ByteString::from(&*p.topic));
    }
    Ok(())
}

/// A copy with memory of its own, so that it does not keep a read buffer or a segment alive.
fn detach(m: &Message) -> Message {
    let properties = m.properties.as_ref().map(|p| {
        let own = |s: &ByteString| ByteString::from(&**s);
        Box::new(Properties {
            user: p.user.iter().map(|(k, v)| (own(k), own(v))).collect(),
            content_type: p.content_type.as_ref().map(own),
            payload_is_utf8: p.payload_is_utf8,
            response_topic: p.response_topic.as_ref().map(own),
            correlation_data: p.correlation_data.as_ref().map(|b| Bytes::copy_from_slice(b)),
            expiry_s: p.expiry_s,
        })
    });
    Message { payload: Bytes::copy_from_slice(&m.payload), properties, ..m.clone() }
}

fn will_row(will: &codec::Will, source: &Source) -> WillRow {
    // The topic was checked with the CONNECT.
    let record = Topic::new(will.topic.clone()).map(|topic| {
        let mut message = Message::new(topic, will.payload.clone(), Arc::clone(source), clock::wall());
        (message.qos, message.retain, message.properties) = (will.qos, will.retain, will.properties.clone());
        record::encode_one(&message)
    });
    WillRow { client_id: String::new(), record: record.unwrap_or_default(), delay_s: will.delay_s }
}

fn detach_will(w: codec::Will) -> codec::Will {
    codec::Will { topic: ByteString::from(&*w.topic), payload: Bytes::copy_from_slice(&w.payload), ..w }
}

pub(super) fn loss(consumer: &str, source: &Source, reason: &str, bytes: u64, now: Timestamp) -> LossRow {
    LossRow {
        id: 0,
        consumer: consumer.to_owned(),
        source: source.to_string(),
        reason: reason.to_owned(),
        first: 0,
        last: 0,
        count: 1,
        bytes,
        oldest: now.millis(),
        newest: now.millis(),
        at: now.millis(),
    }
}
