//! Uplink kind `mqtt`: to any MQTT broker, 3.1.1 or 5, over TCP, TLS or WebSocket.
//!
//! One task owns the socket, the timer and the consumer; what to say is decided by the pure parts: `session` (one
//! connection), `outbox` (which entries are on their way and done), `suspect` (a message that kills connections).
//! The loop mutates, drains the events until there are none, and waits for the next thing to happen.
//!
//! - Everything goes up at QoS 1, whatever it came in with; RETAIN and the MQTT 5 properties travel as published
//!   (RETAIN is dropped only where a version 5 remote says that it cannot retain).
//! - A lost connection is forgotten whole: the log is read again from the first message that was not confirmed.
//! - A temporary refusal (error reason code) is waited out on the same connection; see [`Outbox::refused`].
//! - Connections that the remote drops without having confirmed anything count as failures of the back-off.
//! - Messages down are acknowledged to the remote in order, after they are durable here.

mod outbox;
mod session;
mod suspect;
mod wire;

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::{sleep_until, timeout};

use super::backoff::{Backoff, Jitter};
use super::{Link, Stopped, Uplink, in_words, stopped};
use crate::broker::handle::PublishError;
use crate::clock::{self, Instant, Timestamp};
use crate::config::MqttUplink;
use crate::log::consumer::{Consumer, Entry};
use crate::message::{Message, Sequence};
use crate::status::{Counter, Health};
use outbox::{Done, Outbox};
use session::{End, Event, Incoming, Options, Session};
use suspect::{Plan, Suspect};
use wire::{Turn, Wire};

/// Bytes of messages in flight, beside the window: large messages are sent a few at a time.
const IN_FLIGHT_BYTES_MAX: usize = 2 << 20;
/// Bytes read from the log in one go.
const READ_BYTES_MAX: usize = 256 << 10;
/// A connection that stood idle this long has proved that it works.
const STEADY: Duration = Duration::from_secs(30);
/// At shutdown the remote has this long for outstanding acknowledgements, then this long to take the DISCONNECT:
/// together within the second that the supervisor gives.
const FAREWELL: Duration = Duration::from_millis(700);
const GOODBYE: Duration = Duration::from_millis(200);
/// After a refusal that only a person can mend (bad password …) at least this long.
const LASTING_DELAY_MIN: Duration = Duration::from_secs(15);
/// A missing file is looked for again at least this often.
const FILE_DELAY_MAX: Duration = Duration::from_secs(5);
/// Dropped after CONNACK this often in a row: say what it looks like.
const DROPS_TO_GUESS: u32 = 3;
/// When messages from the remote could not be stored here, they are tried again after this time.
const STORE_AGAIN: Duration = Duration::from_secs(1);

/// Whether the remote can be reached and trusted: name, TCP, TLS, WebSocket. Nothing is said to it in MQTT.
pub async fn reach(to: &MqttUplink) -> Result<(), String> {
    let wire = Wire::connect(to, Counter::default(), Counter::default()).await;
    wire.map(|_| ()).map_err(|e| e.to_string())
}

pub(super) struct Mqtt {
    config: MqttUplink,
}

impl Mqtt {
    pub(super) fn new(config: MqttUplink) -> Mqtt {
        Mqtt { config }
    }
}

impl Uplink for Mqtt {
    async fn run(self, link: Link) -> Result<(), Stopped> {
        Runner::new(self.config, link).run().await
    }
}

/// Why an attempt is over.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Wire(#[from] wire::Error),
    #[error("the connection broke: {0}")]
    Broken(io::Error),
    #[error("the remote closed the connection")]
    Closed,
    #[error(
        "the remote closed the connection before CONNACK; does it want TLS, a client certificate, another version?"
    )]
    ClosedEarly,
    #[error(transparent)]
    End(#[from] End),
}

enum Outcome {
    Shutdown,
    Failed(Failure),
}

struct Counters {
    sent: Counter,
    acknowledged: Counter,
    resent: Counter,
    refused: Counter,
    dead: Counter,
    received: Counter,
    reconnects: Counter,
    in_flight: Counter,
    bytes_out: Counter,
    bytes_in: Counter,
    acknowledged_last_ms: Counter,
}

/// What outlives the connections.
struct Runner {
    config: MqttUplink,
    link: Link,
    remote: String,
    counters: Counters,
    outbox: Outbox,
    suspect: Suspect,
    backoff: Backoff,
    /// Between two attempts on one connection that the remote refused for the time being.
    refusals: Backoff,
    jitter: Jitter,
    refused_since: Option<Timestamp>,
    stalled_since: Option<Timestamp>,
    /// Connections in a row that the remote accepted and dropped.
    drops: u32,
    suspected: Option<String>,
    last_failure: String,
    filters_refused: Vec<String>,
}

/// What belongs to one connection.
struct Connection {
    since: Instant,
    up: bool,
    /// The remote confirmed something: the connection is worth its name.
    progress: bool,
    /// The remote has answered since CONNACK.
    answered: bool,
    plan: Plan,
    /// By [`Plan::Careful`]: how many entries are sent together.
    together: usize,
    pause_until: Option<Instant>,
    incoming: VecDeque<Incoming>,
    storing: Option<Storing>,
    storing_failed: bool,
    closing: Option<Instant>,
}

/// Messages from the remote on their way into the log: how many of the remote's, what they became here, how it went.
type Stored = (usize, Vec<Message>, Result<(), PublishError>);
type Storing = Pin<Box<dyn Future<Output = Stored> + Send>>;

impl Runner {
    fn new(config: MqttUplink, link: Link) -> Runner {
        let part = &link.part;
        let counters = Counters {
            sent: part.counter("sent"),
            acknowledged: part.counter("acknowledged"),
            resent: part.counter("resent"),
            refused: part.counter("refused"),
            dead: part.counter("dead"),
            received: part.counter("received"),
            reconnects: part.counter("reconnects"),
            in_flight: part.counter("in_flight"),
            bytes_out: part.counter("bytes_out"),
            bytes_in: part.counter("bytes_in"),
            acknowledged_last_ms: part.counter("acknowledged_last_ms"),
        };
        Runner {
            remote: format!("{}:{}", config.host, config.port),
            config,
            link,
            counters,
            outbox: Outbox::default(),
            suspect: Suspect::default(),
            backoff: Backoff::for_connections(),
            refusals: Backoff::new(Duration::from_millis(100), Duration::from_secs(60)),
            jitter: Jitter::from_system(),
            refused_since: None,
            stalled_since: None,
            drops: 0,
            suspected: None,
            last_failure: String::new(),
            filters_refused: Vec::new(),
        }
    }

    async fn run(mut self) -> Result<(), Stopped> {
        self.link
            .part
            .set(Health::Starting, format!("connecting to {}", self.remote));
        loop {
            let failure = match self.attempt().await? {
                Outcome::Shutdown => return Ok(()),
                Outcome::Failed(failure) => failure,
            };
            self.counters.in_flight.set(0);
            let delay = self.delay(&failure);
            self.say_failure(&failure, delay);
            tokio::select! {
                () = tokio::time::sleep(delay) => {}
                () = stopped(&mut self.link.shutdown) => return Ok(()),
            }
            self.counters.reconnects.add(1);
        }
    }

    /// One connection, from the name to its end.
    async fn attempt(&mut self) -> Result<Outcome, Stopped> {
        let (bytes_out, bytes_in) = (self.counters.bytes_out.clone(), self.counters.bytes_in.clone());
        let wire = tokio::select! {
            wire = Wire::connect(&self.config, bytes_out, bytes_in) => wire,
            () = stopped(&mut self.link.shutdown) => return Ok(Outcome::Shutdown),
        };
        let mut wire = match wire {
            Ok(wire) => wire,
            Err(error) => return Ok(Outcome::Failed(error.into())),
        };
        let now = clock::monotonic();
        let mut session = match Session::new(self.options(), now) {
            Ok(session) => session,
            Err(end) => return Ok(Outcome::Failed(end.into())),
        };
        let mut connection = Connection {
            since: now,
            up: false,
            progress: false,
            answered: false,
            plan: self.suspect.plan(),
            together: 1,
            pause_until: None,
            incoming: VecDeque::new(),
            storing: None,
            storing_failed: false,
            closing: None,
        };
        self.filters_refused.clear();
        let outcome = self.converse(&mut wire, &mut session, &mut connection).await?;
        match &outcome {
            Outcome::Shutdown => {
                session.disconnect();
                let _ = timeout(GOODBYE, wire.finish(session.output())).await;
            }
            Outcome::Failed(failure) => self.forget(failure, &session, &connection),
        }
        Ok(outcome)
    }

    /// The loop: everything that happened is worked off, then the next thing is waited for.
    async fn converse(
        &mut self,
        wire: &mut Wire,
        session: &mut Session,
        connection: &mut Connection,
    ) -> Result<Outcome, Stopped> {
        let mut chunk = BytesMut::new();
        loop {
            self.work_off(session, connection);
            if let Some(until) = connection.closing
                && (session.in_flight() == 0 || clock::monotonic() >= until)
            {
                return Ok(Outcome::Shutdown);
            }
            let steady = (connection.up && !connection.progress).then(|| connection.since + STEADY);
            let wake = [
                session.deadline(),
                connection.pause_until,
                connection.closing,
                steady.filter(|_| session.in_flight() == 0),
            ];
            let wake = wake.into_iter().flatten().min();
            let (entries_max, bytes_max) = self.appetite(session, connection);
            let read = session.wants_input();
            let step = tokio::select! {
                turn = wire.turn(session.output(), &mut chunk, read) => Step::Turn(turn),
                entries = next_entries(&mut self.link.consumer, entries_max, bytes_max) => Step::Entries(entries?),
                stored = stored(&mut connection.storing) => Step::Stored(stored),
                () = sleep_to(wake) => Step::Tick,
                () = stopped(&mut self.link.shutdown), if connection.closing.is_none() => Step::Shutdown,
            };
            let now = clock::monotonic();
            let result = match step {
                Step::Turn(Ok(Turn::Moved { read, wrote })) => {
                    if wrote {
                        session.wrote(now);
                    }
                    let result = if read { session.input(&chunk, now) } else { Ok(()) };
                    chunk.clear();
                    result.and_then(|()| session.tick(now))
                }
                Step::Turn(Ok(Turn::Closed)) => return Ok(Outcome::Failed(Failure::closed(connection))),
                Step::Turn(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    return Ok(Outcome::Failed(Failure::closed(connection)));
                }
                Step::Turn(Err(error)) => return Ok(Outcome::Failed(Failure::Broken(error))),
                Step::Entries(entries) => {
                    for entry in entries {
                        self.outbox.push(entry, &self.link.routes);
                    }
                    Ok(())
                }
                Step::Stored(stored) => self.stored(stored, session, connection, now)?,
                Step::Tick => {
                    if connection.pause_until.is_some_and(|until| now >= until) {
                        connection.pause_until = None;
                    }
                    session.tick(now)
                }
                Step::Shutdown => {
                    if !connection.up {
                        return Ok(Outcome::Shutdown);
                    }
                    connection.closing = Some(now + FAREWELL);
                    Ok(())
                }
            };
            if let Err(end) = result {
                // What the same bytes acknowledged before they ended the connection counts.
                self.work_off(session, connection);
                return Ok(Outcome::Failed(end.into()));
            }
        }
    }

    /// Events, confirmations to the log, and what may be sent now.
    fn work_off(&mut self, session: &mut Session, connection: &mut Connection) {
        let now = clock::monotonic();
        while let Some(event) = session.event() {
            match event {
                Event::Connected => self.connected(session, connection, now),
                Event::Acknowledged(token) => {
                    self.outbox.acknowledged(token);
                    if !connection.progress {
                        connection.progress = true;
                        self.progressed();
                    }
                }
                Event::Refused(token, code) => {
                    self.counters.refused.add(1);
                    self.outbox.refused(token, code);
                }
                Event::Incoming(incoming) => connection.incoming.push_back(incoming),
                Event::Subscribed(_) => {}
                Event::SubscribeRefused(filter, code) => {
                    let why = session::reason(code, None);
                    tracing::warn!(uplink = %self.link.name, %filter, why, "the remote refuses a subscription");
                    self.filters_refused.push(format!("{filter} ({why})"));
                    self.say_good();
                }
            }
        }
        if connection.up && !session.is_pinging() {
            connection.answered = true;
        }
        if connection.is_steady(session, now) {
            connection.progress = true;
            self.progressed();
        }
        self.confirm();
        if connection.plan == Plan::Careful && connection.progress && self.outbox.is_empty() {
            connection.together = connection.together.saturating_mul(2);
            if connection.together > session.window() {
                connection.plan = Plan::Normal;
            }
        }
        self.wait_out_refusal(session, connection, now);
        if connection.closing.is_none() {
            let published = self.outbox.published;
            let resent = self.outbox.resent;
            self.outbox.send(session, clock::wall(), now);
            self.counters.sent.add(self.outbox.published - published);
            self.counters.resent.add(self.outbox.resent - resent);
            // What could not be sent at all (too large) is done without any answer.
            self.confirm();
        }
        self.counters.in_flight.set(session.in_flight() as u64);
        self.store(connection);
    }

    fn connected(&mut self, session: &mut Session, connection: &mut Connection, now: Instant) {
        connection.up = true;
        tracing::info!(uplink = %self.link.name, remote = %self.remote, "connected");
        if connection.plan == Plan::Careful {
            session.ping(now);
        }
        if self.backoff.failures() == 0 {
            self.say_good();
        } else {
            let text = format!(
                "{}connected to {}, not proved yet; before: {}",
                self.stalled_text(),
                self.remote,
                self.last_failure
            );
            self.link.part.set(Health::Late, text);
        }
    }

    /// The first confirmation of a connection, from either side.
    fn progressed(&mut self) {
        self.backoff.succeeded();
        self.drops = 0;
        self.stalled_since = None;
        self.suspect.progress();
        self.say_good();
    }

    /// Tells the log what is done, in order.
    fn confirm(&mut self) {
        let mut confirmed = 0;
        while let Some(done) = self.outbox.done() {
            let Some(consumer) = &mut self.link.consumer else {
                return;
            };
            match done {
                Done::Acknowledge { position, sent } => {
                    consumer.acknowledge(position);
                    confirmed += u64::from(sent);
                }
                Done::Dead(entry, reason) => self.dead_letter(&entry, &reason),
            }
        }
        if confirmed == 0 {
            return;
        }
        self.counters.acknowledged.add(confirmed);
        self.counters
            .acknowledged_last_ms
            .set(clock::wall().millis().unsigned_abs());
        self.refusals.succeeded();
        if self.refused_since.take().is_some() {
            self.say_good();
        }
    }

    fn dead_letter(&mut self, entry: &Entry, reason: &str) {
        if let Some(consumer) = &mut self.link.consumer {
            consumer.dead_letter(entry, reason);
        }
        self.counters.dead.add(1);
        let (sequence, topic) = (entry.position.sequence, &entry.message.topic);
        tracing::warn!(uplink = %self.link.name, %sequence, %topic, reason, "message set aside as a dead letter");
    }

    /// A temporary refusal: once the rest of the window is answered, everything from the refused message on is read
    /// again, after a pause that grows while nothing gets through.
    fn wait_out_refusal(&mut self, session: &Session, connection: &mut Connection, now: Instant) {
        let Some(refusal) = self.outbox.refusal() else { return };
        if session.in_flight() > 0 {
            return;
        }
        let since = *self.refused_since.get_or_insert_with(clock::wall);
        let delay = self.refusals.failed(self.jitter.draw());
        // One refusal among many messages that get through is no news.
        if self.refusals.failures() > 1 {
            let topic = self.outbox.head().map_or("?", |e| e.message.topic.as_str());
            let text = format!(
                "the remote refuses messages since {since}, now one of {topic}: {}; they are kept, next try in {}",
                session::reason(refusal.code, None),
                in_words(delay)
            );
            if self.link.part.set(Health::Late, text) {
                tracing::warn!(uplink = %self.link.name, topic, code = refusal.code, "the remote refuses messages");
            }
        }
        self.outbox.clear();
        if let Some(consumer) = &mut self.link.consumer {
            consumer.rewind();
        }
        connection.pause_until = Some(now + delay);
    }

    /// How many entries and bytes to read from the log now; 0: none.
    fn appetite(&self, session: &Session, connection: &Connection) -> (usize, usize) {
        let ready = connection.up
            && connection.closing.is_none()
            && connection.pause_until.is_none()
            && self.outbox.refusal().is_none()
            && !self.outbox.has_unsent()
            && self.outbox.bytes() < IN_FLIGHT_BYTES_MAX;
        let capacity = session.capacity();
        match connection.plan {
            Plan::Careful if ready && connection.answered && self.outbox.is_empty() => {
                (connection.together.min(capacity), READ_BYTES_MAX)
            }
            // A quarter of the window at a time: fewer and larger writes when the remote acknowledges one by one.
            Plan::Normal if ready && capacity >= (session.window() / 4).max(1) => {
                (capacity, READ_BYTES_MAX.min(IN_FLIGHT_BYTES_MAX - self.outbox.bytes()))
            }
            Plan::Careful | Plan::Normal => (0, 0),
        }
    }

    /// Starts to store what came from the remote, unless some is being stored.
    fn store(&mut self, connection: &mut Connection) {
        if connection.storing.is_some() || connection.incoming.is_empty() {
            return;
        }
        let count = connection.incoming.len();
        let wall = clock::wall();
        let mut messages = Vec::with_capacity(count);
        for incoming in connection.incoming.drain(..) {
            match self.link.routes.down(incoming.topic.as_str()) {
                Ok(topics) => messages.extend(topics.into_iter().map(|topic| Message {
                    topic,
                    payload: incoming.payload.clone(),
                    qos: incoming.qos,
                    retain: incoming.retain,
                    properties: incoming.properties.clone(),
                    source: self.link.routes.source.clone(),
                    sequence: Sequence(0),
                    received: wall,
                })),
                // Its sender can do nothing about it and would only send it again.
                Err(error) => {
                    let (uplink, topic) = (&self.link.name, &incoming.topic);
                    tracing::warn!(%uplink, %topic, %error, "a message from the remote has no valid local topic");
                }
            }
        }
        let broker = self.link.broker.clone();
        connection.storing = Some(Box::pin(async move {
            let result = if messages.is_empty() {
                Ok(())
            } else {
                broker.publish(messages.clone()).await
            };
            (count, messages, result)
        }));
    }

    fn stored(
        &mut self,
        (count, messages, result): Stored,
        session: &mut Session,
        connection: &mut Connection,
        now: Instant,
    ) -> Result<Result<(), End>, Stopped> {
        connection.storing = None;
        match result {
            Ok(()) => {
                self.counters.received.add(count as u64);
                if !connection.progress {
                    connection.progress = true;
                    self.progressed();
                } else if std::mem::take(&mut connection.storing_failed) {
                    self.say_good();
                }
                Ok(session.settle(count, now))
            }
            Err(PublishError::Stopped) => Err(Stopped),
            Err(error @ (PublishError::Full(_) | PublishError::NotDurable(_))) => {
                let text = format!("messages from {} cannot be stored: {error}; they wait", self.remote);
                if self.link.part.set(Health::Late, text) {
                    tracing::warn!(uplink = %self.link.name, %error, "messages from the remote cannot be stored");
                }
                connection.storing_failed = true;
                let broker = self.link.broker.clone();
                connection.storing = Some(Box::pin(async move {
                    tokio::time::sleep(STORE_AGAIN).await;
                    let result = broker.publish(messages.clone()).await;
                    (count, messages, result)
                }));
                Ok(Ok(()))
            }
        }
    }

    /// The connection is over: what it proved, whom it convicts, and back to the log's cursor.
    fn forget(&mut self, failure: &Failure, session: &Session, connection: &Connection) {
        let by_remote = match failure {
            Failure::Closed | Failure::Broken(_) | Failure::End(End::Disconnected { .. }) => true,
            Failure::ClosedEarly | Failure::Wire(_) | Failure::End(_) => false,
        };
        let too_large = matches!(failure, Failure::End(End::Disconnected { code: 0x95, .. }));
        if connection.up && !connection.progress {
            if by_remote {
                self.drops += 1;
            }
            if by_remote
                && session.in_flight() > 0
                && let Some(head) = self.outbox.head().cloned()
                && self.suspect.closed(
                    &head,
                    connection.plan == Plan::Careful && self.outbox.len() == 1,
                    too_large,
                )
            {
                self.dead_letter(
                    &head,
                    "the remote closes each connection on which this large message is sent alone",
                );
                self.suspect.progress();
            }
        }
        self.suspected = self
            .outbox
            .head()
            .filter(|head| self.suspect.suspects(head))
            .map(|head| {
                let (bytes, topic) = (head.message.size_bytes(), &head.message.topic);
                format!("each time it is sent the message of {bytes} bytes of {topic}; too large for it? (max_packet)")
            });
        if let Failure::End(End::NotProgressing { waited, .. }) = failure
            && self.stalled_since.is_none()
        {
            let waited_ms = i64::try_from(waited.as_millis()).unwrap_or(i64::MAX);
            self.stalled_since = Some(Timestamp::from_millis(clock::wall().millis() - waited_ms));
        }
        self.outbox.clear();
        if let Some(consumer) = &mut self.link.consumer {
            consumer.rewind();
        }
    }

    fn delay(&mut self, failure: &Failure) -> Duration {
        let delay = self.backoff.failed(self.jitter.draw());
        match failure {
            Failure::Wire(error) if error.is_local() => delay.min(FILE_DELAY_MAX),
            failure if failure.is_lasting() => delay.max(LASTING_DELAY_MIN),
            _ => delay,
        }
    }

    fn say_failure(&mut self, failure: &Failure, delay: Duration) {
        self.last_failure = match (&self.suspected, failure) {
            (Some(suspected), _) => format!("the remote drops the connection {suspected}"),
            _ if self.drops >= DROPS_TO_GUESS => format!(
                "the remote accepts the connection and drops it ({} times in a row; {failure}): over quota or throttled?",
                self.drops
            ),
            (None, failure) => failure.to_string(),
        };
        let health = if failure.is_lasting() {
            Health::Failed
        } else {
            Health::Late
        };
        let text = format!(
            "{}{}; next try in {}",
            self.stalled_text(),
            self.last_failure,
            in_words(delay)
        );
        let changed = self.link.part.set(health, text);
        let (uplink, failure) = (&self.link.name, &self.last_failure);
        if changed {
            tracing::warn!(%uplink, remote = %self.remote, failure, "uplink is down, trying again");
        } else {
            tracing::debug!(%uplink, remote = %self.remote, failure, "uplink is still down");
        }
    }

    fn say_good(&mut self) {
        let mut text = format!("connected to {}", self.remote);
        let health = if self.filters_refused.is_empty() {
            Health::Good
        } else {
            text = format!(
                "{text}; the remote refuses the subscription to {}",
                self.filters_refused.join(", ")
            );
            Health::Late
        };
        if self.link.part.set(health, text) && health == Health::Good {
            tracing::info!(uplink = %self.link.name, remote = %self.remote, "uplink works");
        }
    }

    fn stalled_text(&self) -> String {
        self.stalled_since
            .map_or_else(String::new, |since| format!("not progressing since {since}; "))
    }

    fn options(&self) -> Options {
        Options {
            version: self.config.version,
            client_id: self.config.client_id.clone(),
            username: self.config.username.clone(),
            password: self.config.password.as_ref().map(|p| p.reveal().as_bytes().to_vec()),
            keep_alive: self.config.keep_alive,
            window: self.config.window,
            packet_bytes_max: self.config.packet_bytes_max,
            ack_timeout: self.config.ack_timeout,
            subscribe: self.link.routes.filters_down(),
        }
    }
}

impl Connection {
    /// It stood for a while with nothing to deliver: as good as a confirmation.
    fn is_steady(&self, session: &Session, now: Instant) -> bool {
        self.up && !self.progress && session.in_flight() == 0 && now - self.since >= STEADY
    }
}

impl Failure {
    fn closed(connection: &Connection) -> Failure {
        if connection.up {
            Failure::Closed
        } else {
            Failure::ClosedEarly
        }
    }

    /// Nothing gets better by itself: a person must change something, here or there.
    fn is_lasting(&self) -> bool {
        match self {
            Failure::End(End::ConnectRefused { lasting, .. }) => *lasting,
            Failure::End(End::NoAcknowledgements) => true,
            Failure::Wire(wire::Error::File { .. } | wire::Error::NoAuthorities(_)) => true,
            Failure::Wire(wire::Error::Identity(_) | wire::Error::ServerName(_) | wire::Error::Untrusted { .. }) => {
                true
            }
            Failure::Wire(_) | Failure::End(_) | Failure::Broken(_) | Failure::Closed | Failure::ClosedEarly => false,
        }
    }
}

enum Step {
    Turn(io::Result<Turn>),
    Entries(Vec<Entry>),
    Stored(Stored),
    Tick,
    Shutdown,
}

async fn next_entries(consumer: &mut Option<Consumer>, count: usize, bytes: usize) -> Result<Vec<Entry>, Stopped> {
    match consumer {
        Some(consumer) if count > 0 => consumer.next(count, bytes).await.map_err(|_| Stopped),
        Some(_) | None => std::future::pending().await,
    }
}

async fn stored(storing: &mut Option<Storing>) -> Stored {
    match storing {
        Some(storing) => storing.await,
        None => std::future::pending().await,
    }
}

async fn sleep_to(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}
