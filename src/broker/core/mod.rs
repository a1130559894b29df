//! The broker's core: packets and commit results in, bytes for connections and batches for the log out.
//!
//! One thread owns it; no method waits. What has to wait for the disk stands in one queue in the order of commits, so
//! that acknowledgements leave in the order of their PUBLISHes (MQTT 5, 4.6). Bounds: in flight to a client
//! [`WINDOW_MAX`], queued for one without durability [`crate::broker::session::QUEUE_BYTES_MAX`], unsent bytes of a connection
//! [`OUT_BYTES_MAX`] for QoS 0 (then dropped and counted); what waits for a commit is bounded by the log's open batch.

mod clients;
mod configure;
mod connect;
mod deliver;
mod inside;
mod packets;
mod publish;
mod shared;
mod subscribe;
mod sys;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use smallvec::SmallVec;
use tokio::sync::oneshot;
use tracing::{debug, info, warn};

pub use self::connect::granted_keep_alive;
pub use self::shared::GroupId;
use self::shared::{Group, is_shared, shared_filter};
use crate::broker::access::{Grant, Rules};
use crate::broker::codec::{self, ConnAck, Delivery, PublishFrame, WireError, reason};
use crate::broker::connection::Conn;
use crate::broker::handle::{Audience, PublishError};
use crate::broker::repeats::Repeats;
use crate::broker::router::{Recipient, Route, Router, SessionId, Subscription, add};
use crate::broker::session::{Form, Kept, Lane, Open, Queued, RetainedWanted, Session, Slot, State, WINDOW_MAX};
use crate::broker::tap::Feed;
use crate::broker::transport::Peer;
use crate::clock::{self, Instant, Timestamp};
use crate::config::{BrokerSettings, RefusedPublish, WhenFull};
use crate::log::changes::{LossRow, OutboundRow, SessionRow, WillRow};
use crate::log::consumer::{Effects, dead_row};
use crate::log::record::{self, MessageRef};
use crate::log::segment::{Header, Segment};
use crate::log::{Batch, ConsumerState, Log, Read, Startup};
use crate::message::{Message, Properties, Qos, Source, Topic, TopicError, TopicFilter};
use crate::status::{Counter, Part};

pub use sys::Sys;

/// Unsent bytes of a connection above which its QoS 0 messages are dropped, and counted.
pub const OUT_BYTES_MAX: usize = 1 << 20;
/// Unsent bytes above which nothing more is taken from the log or the queue for it.
const OUT_BYTES_PAUSE: usize = 256 << 10;
/// Unsent bytes above which nothing more is read from the connection: answers that it does not read.
pub const OUT_BYTES_MAX_TO_READ: usize = 2 << 20;
/// Answers that may wait for a commit; beyond it the connection's next packet waits too. Whoever keeps to the receive
/// maximum does not come near it.
const OWED_MAX: u32 = 4_096;
/// Unsent bytes above which they are written before the turn ends.
const OUT_BYTES_AT_ONCE: usize = 64 << 10;
/// Retained topics that one client's subscriptions look at before others have their turn.
const RETAINED_LOOKS_A_TURN: usize = 4_096;
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
    Ack {
        conn: Rc<Conn>,
        first: u8,
        id: u16,
    },
    Frame {
        conn: Rc<Conn>,
        bytes: Bytes,
    },
    Deliver {
        stream: u16,
        message: Rc<Message>,
        route: Rc<Route>,
    },
    /// The id of an outbound QoS 2 message is on disk: it may be sent.
    Claimed {
        session: SessionId,
        id: u16,
        message: Rc<Message>,
        recipient: Recipient,
    },
    /// There is something new for a shared subscription.
    Group {
        id: GroupId,
        stream: u16,
    },
    /// As `Claimed`, of a shared subscription.
    ClaimedShared {
        session: SessionId,
        id: u16,
        group: GroupId,
        sequence: u64,
    },
    /// A PUBREC is on disk: PUBREL may be sent.
    Release {
        session: SessionId,
        id: u16,
    },
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
    /// Whoever published it can be told that it was not taken because too much is retained; for others it is passed on
    /// without being retained.
    pub may_refuse: bool,
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
            may_refuse: true,
        }
    }
}

/// Why a message was not taken.
pub enum Refused {
    InvalidTopic(TopicError),
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

/// Whose read from disk it is.
#[derive(Debug, Clone, Copy)]
pub enum Reading {
    Session(SessionId),
    Group(GroupId),
}

pub struct Core {
    log: Log,
    router: Router,
    clients: Vec<Option<Box<Client>>>,
    free: Vec<SessionId>,
    by_id: HashMap<ByteString, SessionId>,
    retained: BTreeMap<Topic, Rc<Message>>,
    retained_bytes: usize,
    waiting: VecDeque<(u64, Waiting)>,
    dirty: Vec<Rc<Conn>>,
    /// One of them has more than [`OUT_BYTES_AT_ONCE`].
    is_much: bool,
    /// Reads from disk that a behind session or group wants; the task around the core does them.
    reads: Vec<(Reading, u16, u64, Arc<[TopicFilter]>)>,
    /// Sessions that wait for a commit that drops.
    blocked: Vec<SessionId>,
    groups: HashMap<GroupId, Group>,
    group_names: HashMap<ByteString, GroupId>,
    next_group: GroupId,
    /// Groups that a commit brought something for, or that wait for one that drops.
    groups_due: Vec<GroupId>,
    anonymous: Grant,
    users: HashMap<String, Grant>,
    /// Clients that are connected, by their user ("": without one).
    connected: HashMap<String, u32>,
    settings: BrokerSettings,
    sys: Sys,
    pub counters: Counters,
    /// Nobody was there for the message that was taken last.
    for_nobody: bool,
    draining: bool,
    takeovers: Repeats,
    too_many_retained: Repeats,
    taps: Vec<Feed>,
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
    pub received_bytes: Counter,
    pub delivered_bytes: Counter,
    pub bytes_received: Counter,
    pub bytes_sent: Counter,
    pub throttled: Counter,
    pub logins_failed: Counter,
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
            received_bytes: part.counter("payload_bytes_received"),
            delivered_bytes: part.counter("payload_bytes_delivered"),
            bytes_received: part.counter("bytes_received"),
            bytes_sent: part.counter("bytes_sent"),
            throttled: part.counter("throttled"),
            logins_failed: part.counter("logins_failed"),
        }
    }
}

impl Core {
    pub fn new(
        log: Log,
        startup: Startup,
        (anonymous, users): (Grant, HashMap<String, Grant>),
        settings: &BrokerSettings,
        sys: Sys,
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
            is_much: false,
            reads: Vec::new(),
            blocked: Vec::new(),
            groups: HashMap::new(),
            group_names: HashMap::new(),
            next_group: 0,
            groups_due: Vec::new(),
            anonymous,
            users,
            connected: HashMap::new(),
            settings: settings.clone(),
            sys,
            counters,
            for_nobody: false,
            draining: false,
            takeovers: Repeats::default(),
            too_many_retained: Repeats::default(),
            taps: Vec::new(),
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
        // Uplinks and modules are owed what comes from the first connection on, also before their tasks have begun.
        for consumer in self.log.consumers() {
            if consumer.is_retired() || consumer.name().starts_with("session:") || consumer.name().starts_with("share:")
            {
                continue;
            }
            for (filter, _) in consumer.filters().iter() {
                self.router.add_consumer(filter, &consumer);
            }
        }
        let now = clock::wall();
        let consumers = self.log.consumers();
        let by_name: HashMap<&str, &Arc<ConsumerState>> = consumers.iter().map(|c| (c.name(), c)).collect();
        for row in startup.sessions {
            let consumer = by_name.get(format!("session:{}", row.client_id).as_str());
            if let Some(consumer) = consumer {
                self.restore_session(row, Arc::clone(consumer), now);
            }
        }
        self.end_orphaned_groups();
        for (client_id, packet_id) in startup.inbound {
            if let Some(client) = self.client_by_name(&client_id) {
                client.session.inbound.insert(packet_id);
            }
        }
        for row in startup.outbound {
            if let Some(consumer) = row.shared {
                self.restore_shared(&row, consumer);
                continue;
            }
            let Some(client) = self.client_by_name(&row.client_id) else {
                continue;
            };
            let Some(lane) = client.session.lanes.get_mut(usize::from(row.stream)) else {
                continue;
            };
            if row.sequence <= lane.read {
                continue;
            }
            let state = if row.received { State::Received } else { State::Sent };
            lane.open.push_back(Open {
                sequence: row.sequence,
                bytes: 0,
                id: row.packet_id,
                qos: Qos::ExactlyOnce,
                state,
                form: None,
            });
            client.session.slots.insert(
                row.packet_id,
                Slot::Log {
                    stream: row.stream,
                    sequence: row.sequence,
                },
            );
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
            None => self.orphans.push((
                clock::monotonic() + WILL_AFTER_START,
                row.client_id.as_str().into(),
                will,
            )),
        }
    }

    fn client_by_name(&mut self, client_id: &str) -> Option<&mut Client> {
        let session = *self.by_id.get(client_id)?;
        self.clients[session as usize].as_deref_mut()
    }

    fn restore_session(&mut self, row: SessionRow, consumer: Arc<ConsumerState>, now: Timestamp) {
        let mut session = Session::new(row.client_id.as_str().into(), row.user.clone(), row.expiry_s);
        // Time without power counts towards the expiry, as far as the clock can be believed: never more than has passed
        // since the disconnect, never less than nothing.
        let gone = row
            .disconnected
            .map_or(0, |at| now.millis_since(Timestamp::from_millis(at)).max(0) as u64);
        let started = clock::monotonic();
        let since = started.checked_sub(Duration::from_millis(gone)).unwrap_or(started);
        session.disconnected = Some((since, row.disconnected.map_or(now, Timestamp::from_millis)));
        session.lanes = lanes(&consumer, self.log.stream_places());
        for s in &row.subscriptions {
            let text: ByteString = s.filter.as_str().into();
            let Ok(filter) = shared_filter(&text).unwrap_or_else(|| TopicFilter::new(text.clone())) else {
                continue;
            };
            let kept = Kept {
                filter,
                qos: Qos::from_u8(s.qos).unwrap_or(Qos::AtMostOnce),
                no_local: s.no_local,
                retain_as_published: s.retain_as_published,
                identifier: s.identifier,
                since: s.since,
            };
            session.newest_since = session.newest_since.max(kept.since);
            session.subscriptions.insert(text, kept);
        }
        session.consumer = Some(consumer);
        session.limit_queue(self.grant_of(row.user.as_deref()).and_then(|g| g.limits.queued_bytes));
        let rules = self.rules_of(row.user.as_deref(), &row.client_id);
        let id = self.insert(Client {
            session,
            conn: None,
            rules,
            will: None,
            will_due: None,
        });
        let filters: Vec<_> = self
            .client(id)
            .session
            .subscriptions
            .iter()
            .map(|(f, k)| (f.clone(), k.clone()))
            .collect();
        let log = self.log.clone();
        for (text, kept) in filters {
            if is_shared(&text) {
                self.join_group(id, &text, &kept.filter, &kept, &mut log.batch());
            } else {
                self.router.subscribe(&kept.filter, subscription(id, &kept));
            }
            self.counters.subscriptions.add(1);
        }
    }

    /// None: the configuration no longer has this user.
    fn grant_of(&self, user: Option<&str>) -> Option<&Grant> {
        match user {
            Some(user) => self.users.get(user),
            None => Some(&self.anonymous),
        }
    }

    /// A user that is gone may do nothing, and nor may a client whose id cannot stand in its rules.
    fn rules_of(&self, user: Option<&str>, client_id: &str) -> Rc<Rules> {
        let grant = self.grant_of(user);
        grant.and_then(|g| g.rules(client_id).ok()).unwrap_or_default()
    }

    /// How many clients of this user are connected.
    fn connected_of(&self, user: Option<&str>) -> u32 {
        self.connected.get(user.unwrap_or_default()).copied().unwrap_or(0)
    }

    fn insert(&mut self, client: Client) -> SessionId {
        let id = self.free.pop().unwrap_or_else(|| {
            self.clients.push(None);
            (self.clients.len() - 1) as SessionId
        });
        self.by_id.insert(client.session.client_id.clone(), id);
        self.clients[id as usize] = Some(Box::new(client));
        self.counters.sessions.set(self.by_id.len() as u64);
        id
    }

    fn client(&mut self, id: SessionId) -> &mut Client {
        self.clients[id as usize]
            .as_mut()
            .expect("a session id is kept only while the session is")
    }

    fn get(&mut self, id: SessionId) -> Option<&mut Client> {
        self.clients.get_mut(id as usize)?.as_deref_mut()
    }

    fn touch(&mut self, conn: &Rc<Conn>) {
        self.is_much |= conn.out.borrow().len() > OUT_BYTES_AT_ONCE;
        if !conn.is_dirty.replace(true) {
            self.dirty.push(Rc::clone(conn));
        }
    }

    /// Whether connections have got bytes since they were taken, and whether one of them has so many that they should
    /// be written at once: beyond [`OUT_BYTES_MAX`] QoS 0 is dropped.
    pub fn has_dirty(&self) -> (bool, bool) {
        (!self.dirty.is_empty(), self.is_much)
    }

    /// The connections that got bytes since the last call.
    pub fn take_dirty(&mut self) -> Vec<Rc<Conn>> {
        self.is_much = false;
        std::mem::take(&mut self.dirty)
    }

    pub fn take_reads(&mut self) -> Vec<(Reading, u16, u64, Arc<[TopicFilter]>)> {
        std::mem::take(&mut self.reads)
    }

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
            if self.is_stuck(id, now) {
                self.send_away(
                    id,
                    reason::QUOTA_EXCEEDED,
                    "more waits for it than may, and it acknowledges nothing",
                );
            }
            if over {
                info!(client = %self.client(id).session.client_id, "session expired");
                self.sys.expired += 1;
                self.end_session(id, batch);
            }
        }
        self.taps.retain(|feed| !feed.is_closed());
        self.publish_orphans(|_, due| due <= now, batch);
        let wall = clock::wall();
        let expired: Vec<Topic> = self
            .retained
            .iter()
            .filter(|(_, m)| m.is_expired(wall))
            .map(|(t, _)| t.clone())
            .collect();
        for topic in expired {
            if let Some(old) = self.retained.remove(&topic) {
                self.retained_bytes -= old.size_bytes();
                batch.changes().retained.insert(topic.as_str().to_owned(), None);
            }
        }
        self.counters.retained.set(self.retained.len() as u64);
        self.tell_sys(now);
    }

    /// The end: clients are told, nothing new is taken.
    pub fn shut_down(&mut self) {
        self.draining = true;
        let conns: Vec<Rc<Conn>> = self.clients.iter().flatten().filter_map(|c| c.conn.clone()).collect();
        for conn in conns {
            conn.wire
                .borrow_mut()
                .disconnect(&mut conn.out.borrow_mut(), reason::SERVER_SHUTTING_DOWN, "");
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
        self.pump_due_groups(batch);
    }
}

fn lanes(consumer: &Arc<ConsumerState>, streams: usize) -> Vec<Lane> {
    (0..streams)
        .map(|s| Lane {
            read: consumer.done(s as u16),
            behind: true,
            ..Lane::default()
        })
        .collect()
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

fn has_room(session: &Session, conn: &Conn) -> bool {
    let is_full = conn.out.borrow().len() >= OUT_BYTES_PAUSE;
    if is_full {
        conn.wants_pump.set(true);
    }
    !is_full && session.in_flight() < usize::from(conn.window.get()) && !session.is_out_of_ids()
}

fn open(session: &mut Session, stream: u16, message: &Message, id: u16, r: &Recipient, state: State) {
    let sequence = message.sequence.0;
    let lane = &mut session.lanes[usize::from(stream)];
    // Mostly the last; behind a restored QoS 2 message it may not be.
    let at = lane.open.partition_point(|o| o.sequence < sequence);
    lane.open.insert(
        at,
        Open {
            sequence,
            bytes: message.size_bytes() as u64,
            id,
            qos: message.qos.min(r.qos),
            state,
            form: Some(Form {
                retain_as_published: r.retain_as_published,
                identifiers: r.identifiers.clone(),
            }),
        },
    );
    session.slots.insert(id, Slot::Log { stream, sequence });
}

/// The levels of a filter before its first wildcard: what every topic that it matches begins with.
fn literal(filter: &TopicFilter) -> String {
    let levels = filter.levels().take_while(|l| *l != "+" && *l != "#");
    levels.collect::<Vec<_>>().join("/")
}

/// What is open is in the session's hands and not dropped by a limit.
fn hold_open(consumer: &ConsumerState, stream: u16, lane: &Lane) {
    let range = lane
        .open
        .front()
        .zip(lane.open.back())
        .map(|(f, b)| (f.sequence, b.sequence));
    consumer.holds(stream, range);
}

fn encode(conn: &Conn, message: &Message, qos: Qos, r: &Recipient, now: Timestamp) -> PublishFrame {
    let how = Delivery {
        v5: conn.version().is_v5(),
        qos,
        retain: message.retain && r.retain_as_published,
        identifiers: &r.identifiers,
        expiry_s: message.expires_in_s(now),
        alias: conn.aliases_out.borrow().find(message.topic.as_str()),
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
        alias: conn.aliases_out.borrow().find(q.message.topic.as_str()),
    };
    PublishFrame::encode(&q.message, &how)
}

/// Puts a frame out that [`encode`] made for this connection: from here on the client knows the alias in it.
fn write(conn: &Conn, frame: &PublishFrame, topic: &str, packet_id: u16, dup: bool) {
    frame.write(&mut conn.out.borrow_mut(), packet_id, dup);
    if let Some(alias) = frame.sets_alias {
        conn.aliases_out.borrow_mut().sent(topic, alias);
    }
}

/// What a PUBLISH, a will or a response topic is refused with: a string with U+0000 is malformed, another topic that is
/// none is well formed and not accepted.
fn topic_error(what: &str, e: TopicError) -> WireError {
    let reason = match e {
        TopicError::Nul => reason::MALFORMED,
        _ => reason::TOPIC_NAME_INVALID,
    };
    WireError::new(reason, format!("{what}: {e}"))
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
            return Err(WireError::new(
                reason::PROTOCOL_ERROR,
                "neither a topic nor a topic alias",
            ));
        }
        return Ok(());
    }
    if p.alias > TOPIC_ALIAS_MAX {
        return Err(WireError::new(
            reason::TOPIC_ALIAS_INVALID,
            "a topic alias above the maximum",
        ));
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
    Message {
        payload: Bytes::copy_from_slice(&m.payload),
        properties,
        ..m.clone()
    }
}

fn will_row(will: &codec::Will, source: &Source) -> WillRow {
    // The topic was checked with the CONNECT.
    let record = Topic::new(will.topic.clone()).map(|topic| {
        let mut message = Message::new(topic, will.payload.clone(), Arc::clone(source), clock::wall());
        (message.qos, message.retain, message.properties) = (will.qos, will.retain, will.properties.clone());
        record::encode_one(&message)
    });
    WillRow {
        client_id: String::new(),
        record: record.unwrap_or_default(),
        delay_s: will.delay_s,
    }
}

fn detach_will(w: codec::Will) -> codec::Will {
    codec::Will {
        topic: ByteString::from(&*w.topic),
        payload: Bytes::copy_from_slice(&w.payload),
        ..w
    }
}

/// A segment that cannot be read: whose messages they were is not known.
fn damaged(consumer: &str, h: &Header) -> LossRow {
    let mut row = loss(consumer, &"(unknown)".into(), "damaged", h.bytes, clock::wall());
    (row.first, row.last, row.count) = (h.first, h.last, u64::from(h.count));
    row
}

pub(in crate::broker) fn loss(consumer: &str, source: &Source, reason: &str, bytes: u64, now: Timestamp) -> LossRow {
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
