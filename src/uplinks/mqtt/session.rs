//! One connection to a remote MQTT broker, client side, versions 3.1.1 and 5. Pure: bytes and time in, bytes and
//! events out.
//!
//! A `Session` lives as long as its connection and starts clean each time: the log is the session, nothing is ever
//! carried over, so a remote that forgot us (session present 0) and one that remembers us are the same to it. It never
//! has more in flight than its window and the remote's Receive Maximum allow, and never sends above the remote's
//! Maximum Packet Size. Loop: feed [`Session::input`] or [`Session::tick`], drain [`Session::event`], send, write
//! [`Session::output`], wait until [`Session::deadline`]. After an [`End`] it is of no further use.
//!
//! The codec is only ever given whole frames, so that an announced length reserves nothing.

use std::collections::{HashSet, VecDeque};
use std::num::{NonZeroU16, NonZeroU32};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use bytestring::ByteString;
use rmqtt_codec::types::{Protocol, Publish as CodecPublish};
use rmqtt_codec::v3::QoS;
use rmqtt_codec::{v3, v5};
use tokio_util::codec::{Decoder, Encoder};

use crate::clock::{Instant, Timestamp};
use crate::config::MqttVersion;
use crate::message::{Message, Properties, Qos, Topic, TopicFilter};

/// The remote must answer CONNECT within this time.
const CONNACK_TIMEOUT: Duration = Duration::from_secs(10);
/// A larger packet from the remote ends the connection; version 5 remotes are told.
pub(super) const PACKET_IN_BYTES_MAX: u32 = 1 << 20;
/// Messages taken from the remote and not yet settled. A version 5 remote is told by our Receive Maximum; from a 3.1.1
/// remote we stop reading.
pub(super) const INCOMING_MAX: usize = 32;
/// Filters in one SUBSCRIBE: AWS IoT takes no more than 8.
const SUBSCRIBE_FILTERS_MAX: usize = 8;
/// PUBLISH ids are 1 to this, in turn; the ids above are for SUBSCRIBE.
const PUBLISH_IDS: u32 = 65_000;
/// Where keep-alive is off: how long a write may make no progress.
const STALL_DEFAULT: Duration = Duration::from_secs(30);

#[derive(Debug, Clone)]
pub(super) struct Options {
    pub(super) version: MqttVersion,
    pub(super) client_id: String,
    pub(super) username: Option<String>,
    pub(super) password: Option<Vec<u8>>,
    /// Zero: none.
    pub(super) keep_alive: Duration,
    pub(super) window: u16,
    /// Our own limit for what is sent, beside the remote's.
    pub(super) packet_bytes_max: Option<u32>,
    pub(super) ack_timeout: Duration,
    pub(super) subscribe: Vec<TopicFilter>,
}

/// Given with a PUBLISH and given back with its answer.
pub(super) type Token = u64;

#[derive(Debug, PartialEq)]
pub(super) enum Event {
    /// CONNACK came, and the SUBSCRIBEs are on their way.
    Connected,
    /// The remote has the message.
    Acknowledged(Token),
    /// The remote answered with an error reason code.
    Refused(Token, u8),
    /// A message from the remote, to be settled in turn.
    Incoming(Incoming),
    Subscribed(TopicFilter),
    SubscribeRefused(TopicFilter, u8),
}

#[derive(Debug, PartialEq)]
pub(super) struct Incoming {
    pub(super) topic: Topic,
    pub(super) payload: Bytes,
    pub(super) qos: Qos,
    pub(super) retain: bool,
    pub(super) properties: Option<Box<Properties>>,
}

/// Why a message cannot be sent on this connection, now or ever.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unsendable {
    #[error("the packet of {size} bytes is above the remote's limit of {limit} bytes")]
    TooLarge { size: usize, limit: u32 },
    #[error("it cannot be encoded: {0}")]
    Encoding(String),
}

/// Why the connection is over. Texts complete "uplink NAME: …".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum End {
    #[error("no CONNACK within {} s: is this an MQTT port?", CONNACK_TIMEOUT.as_secs())]
    NoConnack,
    #[error("the remote refuses the connection: {text}")]
    ConnectRefused { text: String, lasting: bool },
    #[error("the remote ended the connection: {text}")]
    Disconnected { code: u8, text: String },
    #[error("the remote breaks the protocol: {0}")]
    Protocol(String),
    #[error("the remote is silent: no byte for {} s, not even after a PINGREQ", .0.as_secs())]
    Silent(Duration),
    #[error("the remote takes no more bytes: a write made no progress for {} s", .0.as_secs())]
    Stalled(Duration),
    #[error("no PUBACK for {} s while {in_flight} messages are in flight, though the connection stands", waited.as_secs())]
    NotProgressing { waited: Duration, in_flight: usize },
    #[error("the remote grants at most QoS 0, so it never acknowledges: nothing is sent to it")]
    NoAcknowledgements,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Connecting,
    Up,
}

#[derive(Debug)]
enum Codec {
    V3(v3::Codec),
    V5(v5::Codec),
}

/// What is owed to the remote for one incoming message once it is durable here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Owed {
    Nothing,
    Puback(u16),
    Pubrec(u16),
}

#[derive(Debug)]
pub(super) struct Session {
    options: Options,
    codec: Codec,
    state: State,
    started: Instant,
    inbox: BytesMut,
    out: BytesMut,
    events: VecDeque<Event>,

    // Sending. The ids in flight are a run of consecutive numbers: the n-th PUBLISH of the connection has the id
    // n % PUBLISH_IDS + 1, so a doubled or stray PUBACK can never name a younger message by accident.
    window: usize,
    packet_bytes_max: Option<u32>,
    retain_available: bool,
    sent: VecDeque<Option<Token>>,
    sent_first: u32,
    in_flight: usize,

    // Receiving.
    owed: VecDeque<Owed>,
    qos2: HashSet<u16>,
    subscribes: Vec<(u16, Vec<TopicFilter>)>,

    // Time.
    keep_alive: Duration,
    last_in: Instant,
    last_out: Instant,
    /// Since when the output waits without moving; of no meaning while there is none.
    waits: Instant,
    ping: Option<Ping>,
    acked: Instant,
}

/// A PINGREQ without an answer. Its patience begins when its bytes have left for the system.
#[derive(Debug, Clone, Copy)]
struct Ping {
    since: Instant,
    written: bool,
}

impl Session {
    /// A new connection: CONNECT is in the output.
    pub(super) fn new(options: Options, now: Instant) -> Result<Session, End> {
        let codec = match options.version {
            MqttVersion::V311 => Codec::V3(v3::Codec::new(0)),
            MqttVersion::V5 => Codec::V5(v5::Codec::new(0, 0)),
        };
        let mut session = Session {
            window: usize::from(options.window).clamp(1, PUBLISH_IDS as usize),
            packet_bytes_max: options.packet_bytes_max,
            keep_alive: options.keep_alive,
            options,
            codec,
            state: State::Connecting,
            started: now,
            inbox: BytesMut::new(),
            out: BytesMut::new(),
            events: VecDeque::new(),
            retain_available: true,
            sent: VecDeque::new(),
            sent_first: 0,
            in_flight: 0,
            owed: VecDeque::new(),
            qos2: HashSet::new(),
            subscribes: Vec::new(),
            last_in: now,
            last_out: now,
            waits: now,
            ping: None,
            acked: now,
        };
        session.connect()?;
        Ok(session)
    }

    fn connect(&mut self) -> Result<(), End> {
        let options = &self.options;
        let keep_alive = u16::try_from(options.keep_alive.as_secs()).unwrap_or(u16::MAX);
        let client_id = ByteString::from(options.client_id.as_str());
        let username = options.username.as_deref().map(ByteString::from);
        let password = options.password.clone().map(Bytes::from);
        let encoded = match &mut self.codec {
            Codec::V3(codec) => {
                let connect = v3::Connect {
                    protocol: Protocol::default(),
                    clean_session: true,
                    keep_alive,
                    last_will: None,
                    client_id,
                    username,
                    password,
                    cert: None,
                };
                codec.encode(v3::Packet::from(connect), &mut self.out)
            }
            Codec::V5(codec) => {
                let connect = v5::Connect {
                    clean_start: true,
                    keep_alive,
                    receive_max: NonZeroU16::new(INCOMING_MAX as u16),
                    max_packet_size: NonZeroU32::new(PACKET_IN_BYTES_MAX),
                    client_id,
                    username,
                    password,
                    ..v5::Connect::default()
                };
                codec.encode(v5::Packet::from(connect), &mut self.out)
            }
        };
        encoded.map_err(|e| End::ConnectRefused {
            text: format!("CONNECT cannot be encoded: {e}"),
            lasting: true,
        })
    }

    /// Bytes from the remote.
    pub(super) fn input(&mut self, bytes: &[u8], now: Instant) -> Result<(), End> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.last_in = now;
        self.ping = None;
        self.inbox.extend_from_slice(bytes);
        self.output_may_grow(now);
        self.process(now)
    }

    /// The next thing that happened.
    pub(super) fn event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// What is to be written; the caller takes from its front and says so by [`Session::wrote`].
    pub(super) fn output(&mut self) -> &mut BytesMut {
        &mut self.out
    }

    /// Bytes of the output have left for the system.
    pub(super) fn wrote(&mut self, now: Instant) {
        self.last_out = now;
        self.waits = now;
        if let Some(ping) = &mut self.ping
            && !ping.written
        {
            *ping = Ping {
                since: now,
                written: self.out.is_empty(),
            };
        }
        if !self.out.is_empty() {
            // A slow link with a full send buffer: what moves is alive, even while no PUBACK can be expected yet. (A
            // dead link takes what fits into the buffer and then nothing more; its output is empty or stalls.)
            self.acked = now;
        }
    }

    /// How many more PUBLISHes may be sent now.
    pub(super) fn capacity(&self) -> usize {
        match self.state {
            State::Connecting => 0,
            // A PUBACK that is long overdue must not let its id be taken twice.
            State::Up => (self.window.saturating_sub(self.in_flight)).min(PUBLISH_IDS as usize - 1 - self.sent.len()),
        }
    }

    pub(super) fn window(&self) -> usize {
        self.window
    }

    /// Messages sent and not yet answered.
    pub(super) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether the caller is to read from the remote. False while too many incoming messages wait to be settled.
    pub(super) fn wants_input(&self) -> bool {
        self.owed.len() < INCOMING_MAX
    }

    /// Sends a message at QoS 1 under `topic`; its answer comes with `token`. Only to be called while
    /// [`Session::capacity`] is not zero. DUP is never set: in a new session each PUBLISH is a first one.
    pub(super) fn publish(
        &mut self,
        token: Token,
        topic: &Topic,
        message: &Message,
        wall: Timestamp,
        now: Instant,
    ) -> Result<(), Unsendable> {
        debug_assert!(self.capacity() > 0, "a message beyond the window");
        let number = (self.sent_first + self.sent.len() as u32) % PUBLISH_IDS;
        let packet_id = NonZeroU16::new(number as u16 + 1);
        let properties = match self.codec {
            Codec::V3(_) => None,
            Codec::V5(_) => message
                .properties
                .as_deref()
                .map(|p| codec_properties(p, message.expires_in_s(wall))),
        };
        let publish = Box::new(CodecPublish {
            dup: false,
            retain: message.retain && self.retain_available,
            qos: QoS::AtLeastOnce,
            topic: topic.as_byte_string().clone(),
            packet_id,
            payload: message.payload.clone(),
            properties,
        });
        self.output_may_grow(now);
        let before = self.out.len();
        let encoded = match &mut self.codec {
            Codec::V3(codec) => codec.encode(v3::Packet::Publish(publish), &mut self.out),
            Codec::V5(codec) => codec.encode(v5::Packet::Publish(publish), &mut self.out),
        };
        let size = self.out.len() - before;
        let refused = match (encoded, self.packet_bytes_max) {
            (Err(error), _) => Some(Unsendable::Encoding(error.to_string())),
            (Ok(()), Some(limit)) if size > limit as usize => Some(Unsendable::TooLarge { size, limit }),
            (Ok(()), _) => None,
        };
        if let Some(refused) = refused {
            self.out.truncate(before);
            return Err(refused);
        }
        if self.in_flight == 0 {
            self.acked = now;
        }
        self.sent.push_back(Some(token));
        self.in_flight += 1;
        Ok(())
    }

    /// The oldest `count` incoming messages are durable here: the remote gets its acknowledgements.
    pub(super) fn settle(&mut self, count: usize, now: Instant) -> Result<(), End> {
        if !self.wants_input() {
            // The remote was not read meanwhile: its silence starts to count now.
            self.last_in = now;
            self.acked = now;
        }
        self.output_may_grow(now);
        for owed in self.owed.drain(..count.min(self.owed.len())) {
            match owed {
                Owed::Nothing => {}
                Owed::Puback(id) => put_ack(&mut self.out, 0x40, id),
                Owed::Pubrec(id) => put_ack(&mut self.out, 0x50, id),
            }
        }
        self.process(now)
    }

    /// Asks for an answer now, whatever the keep-alive: PINGRESP shows up as input.
    pub(super) fn ping(&mut self, now: Instant) {
        if self.ping.is_none() {
            self.output_may_grow(now);
            self.out.extend_from_slice(&[0xC0, 0]);
            self.ping = Some(Ping {
                since: now,
                written: false,
            });
        }
    }

    /// A PINGREQ of ours has no answer yet.
    pub(super) fn is_pinging(&self) -> bool {
        self.ping.is_some()
    }

    /// The polite end: DISCONNECT is in the output.
    pub(super) fn disconnect(&mut self) {
        if self.state == State::Up {
            self.out.extend_from_slice(&[0xE0, 0]);
        }
    }

    /// When [`Session::tick`] is to be called, at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.state {
            State::Connecting => Some(self.started + CONNACK_TIMEOUT),
            State::Up => {
                let stalled = (!self.out.is_empty()).then(|| self.waits + self.patience());
                earliest(stalled, earliest(self.keep_alive_deadline(), self.ack_deadline()))
            }
        }
    }

    /// Time passed.
    pub(super) fn tick(&mut self, now: Instant) -> Result<(), End> {
        if self.state == State::Connecting {
            return if now >= self.started + CONNACK_TIMEOUT {
                Err(End::NoConnack)
            } else {
                Ok(())
            };
        }
        if self.ack_deadline().is_some_and(|at| now >= at) {
            return Err(End::NotProgressing {
                waited: now - self.acked,
                in_flight: self.in_flight,
            });
        }
        if !self.out.is_empty() && now >= self.waits + self.patience() {
            return Err(End::Stalled(now - self.waits));
        }
        if self.keep_alive_deadline().is_some_and(|at| now >= at) {
            if self.ping.is_some() {
                return Err(End::Silent(now - self.last_in));
            }
            self.ping(now);
        }
        Ok(())
    }

    /// A dead link is noticed within 1.25 keep-alives: after three quarters of one without a byte either from us or
    /// from the remote we ask, and wait for half of one.
    fn keep_alive_deadline(&self) -> Option<Instant> {
        if self.keep_alive.is_zero() && self.ping.is_none() {
            return None;
        }
        match self.ping {
            Some(_) if !self.wants_input() => None,
            Some(ping) if ping.written => Some(ping.since + self.patience()),
            // Still in our own buffer: a stalled write is noticed by itself.
            Some(_) => None,
            None => Some(self.last_in.min(self.last_out) + self.keep_alive.mul_f64(0.75)),
        }
    }

    fn ack_deadline(&self) -> Option<Instant> {
        (self.in_flight > 0 && self.wants_input()).then(|| self.acked + self.options.ack_timeout)
    }

    fn output_may_grow(&mut self, now: Instant) {
        if self.out.is_empty() {
            self.waits = now;
        }
    }

    fn patience(&self) -> Duration {
        if self.keep_alive.is_zero() {
            STALL_DEFAULT
        } else {
            self.keep_alive / 2
        }
    }

    fn process(&mut self, now: Instant) -> Result<(), End> {
        while self.wants_input() {
            if self.state == State::Connecting && self.inbox.first().is_some_and(|b| *b != 0x20) {
                return Err(End::Protocol(
                    "its first packet is no CONNACK; is this an MQTT port?".into(),
                ));
            }
            let Some(length) = frame_length(&self.inbox)? else {
                break;
            };
            if self.state == State::Up && self.inbox[0] == 0x40 {
                // The most frequent packet by far, and one whose reason codes must never be a decoding error.
                let (id, code) = parse_ack(&self.inbox[..length])?;
                self.inbox.advance(length);
                self.puback(id, code, now);
                continue;
            }
            let frame = self.inbox.split_to(length);
            match self.state {
                State::Connecting => self.connack(frame, now)?,
                State::Up => self.packet(frame)?,
            }
        }
        if self.inbox.is_empty() && self.inbox.capacity() > 256 << 10 {
            self.inbox = BytesMut::new();
        }
        Ok(())
    }

    fn connack(&mut self, frame: BytesMut, now: Instant) -> Result<(), End> {
        let body = body(&frame);
        let &[_, code, ..] = body else {
            return Err(End::Protocol("its CONNACK is too short".into()));
        };
        match self.options.version {
            MqttVersion::V311 => {
                if code != 0 {
                    let text = match code {
                        1 => "it does not speak MQTT 3.1.1 (code 1); try version = \"5\"",
                        2 => "the client id is not allowed (code 2)",
                        3 => "the service is unavailable (code 3)",
                        4 => "bad user name or password (code 4)",
                        5 => "not authorized (code 5); look at user name and password",
                        other => {
                            return Err(End::ConnectRefused {
                                text: format!("unknown code {other}"),
                                lasting: false,
                            });
                        }
                    };
                    return Err(End::ConnectRefused {
                        text: text.into(),
                        lasting: code != 3,
                    });
                }
            }
            MqttVersion::V5 if body.len() == 2 => {
                return Err(End::ConnectRefused {
                    text: "it answers in MQTT 3.1.1, not 5; set version = \"3.1.1\"".into(),
                    lasting: true,
                });
            }
            MqttVersion::V5 => {
                let ack = self.decode_v5(frame.clone());
                if code != 0 {
                    let why = match &ack {
                        Ok(v5::Packet::ConnectAck(ack)) => ack.reason_string.clone(),
                        Ok(_) | Err(_) => None,
                    };
                    let lasting = !matches!(code, 0x80 | 0x83 | 0x88 | 0x89 | 0x97 | 0x9F);
                    let mut text = reason(code, why.as_deref());
                    if matches!(code, 0x86 | 0x87) {
                        // Many brokers, mosquitto among them, say 0x87 of a wrong password.
                        text.push_str("; look at user name and password");
                    }
                    return Err(End::ConnectRefused { text, lasting });
                }
                let v5::Packet::ConnectAck(ack) = ack? else {
                    return Err(End::Protocol("its CONNACK is not one".into()));
                };
                self.granted(&ack)?;
            }
        }
        self.state = State::Up;
        self.acked = now;
        self.subscribe()?;
        self.events.push_back(Event::Connected);
        Ok(())
    }

    fn granted(&mut self, ack: &v5::ConnectAck) -> Result<(), End> {
        if ack.max_qos == QoS::AtMostOnce {
            return Err(End::NoAcknowledgements);
        }
        self.window = self.window.min(usize::from(ack.receive_max.get()));
        self.packet_bytes_max = match (self.packet_bytes_max, ack.max_packet_size) {
            (Some(ours), Some(theirs)) => Some(ours.min(theirs)),
            (ours, theirs) => ours.or(theirs),
        };
        self.retain_available = ack.retain_available;
        if let Some(seconds) = ack.server_keepalive_sec {
            self.keep_alive = Duration::from_secs(u64::from(seconds));
        }
        Ok(())
    }

    fn subscribe(&mut self) -> Result<(), End> {
        for (n, filters) in self.options.subscribe.chunks(SUBSCRIBE_FILTERS_MAX).enumerate() {
            let id = u16::try_from(PUBLISH_IDS as usize + 1 + n)
                .ok()
                .and_then(NonZeroU16::new);
            let Some(packet_id) = id else {
                let text = "too many filters in the routes down".into();
                return Err(End::ConnectRefused { text, lasting: true });
            };
            let names = filters.iter().map(|f| ByteString::from(f.as_str()));
            let encoded = match &mut self.codec {
                Codec::V3(codec) => {
                    let topic_filters = names.map(|f| (f, QoS::AtLeastOnce)).collect();
                    codec.encode(
                        v3::Packet::Subscribe {
                            packet_id,
                            topic_filters,
                        },
                        &mut self.out,
                    )
                }
                Codec::V5(codec) => {
                    // no_local: what we send up never comes back down. Retain as published: a value that was
                    // published as retained is retained here too.
                    let options = v5::SubscriptionOptions {
                        qos: QoS::AtLeastOnce,
                        no_local: true,
                        retain_as_published: true,
                        retain_handling: v5::RetainHandling::AtSubscribe,
                    };
                    let options = |f: &ByteString| v5::SubscriptionOptions {
                        // A shared subscription must not be no-local (MQTT 5, 3.8.3-4).
                        no_local: !f.starts_with("$share/"),
                        ..options
                    };
                    let topic_filters = names
                        .map(|f| {
                            let o = options(&f);
                            (f, o)
                        })
                        .collect();
                    let subscribe = v5::Subscribe {
                        packet_id,
                        id: None,
                        user_properties: Vec::new(),
                        topic_filters,
                    };
                    codec.encode(v5::Packet::Subscribe(subscribe), &mut self.out)
                }
            };
            encoded.map_err(|e| End::ConnectRefused {
                text: format!("SUBSCRIBE: {e}"),
                lasting: true,
            })?;
            self.subscribes.push((packet_id.get(), filters.to_vec()));
        }
        Ok(())
    }

    fn puback(&mut self, id: u16, code: u8, now: Instant) {
        let token = if (1..=PUBLISH_IDS).contains(&u32::from(id)) {
            let index = (u32::from(id) - 1 + PUBLISH_IDS - self.sent_first) % PUBLISH_IDS;
            self.sent.get_mut(index as usize).and_then(Option::take)
        } else {
            None
        };
        let Some(token) = token else {
            // Doubled, or never sent: it confirms nothing.
            tracing::debug!(id, "PUBACK for a packet id that is not in flight");
            return;
        };
        self.in_flight -= 1;
        self.acked = now;
        while let Some(None) = self.sent.front() {
            self.sent.pop_front();
            self.sent_first = (self.sent_first + 1) % PUBLISH_IDS;
        }
        // 0x10: nobody is subscribed there, but the remote has it.
        self.events.push_back(match code {
            0x00 | 0x10 => Event::Acknowledged(token),
            code => Event::Refused(token, code),
        });
    }

    fn packet(&mut self, frame: BytesMut) -> Result<(), End> {
        match frame[0] {
            0x30..=0x3F => self.incoming_publish(frame),
            0x50 => Err(End::Protocol("a PUBREC for a QoS 1 message".into())),
            0x62 => {
                let (id, _) = parse_ack(&frame)?;
                self.qos2.remove(&id);
                put_ack(&mut self.out, 0x70, id);
                Ok(())
            }
            0x90 => self.suback(&frame),
            // UNSUBACK and PINGRESP: that they came is all they say.
            0xB0 | 0xD0 => Ok(()),
            0xE0 if self.options.version == MqttVersion::V5 => {
                let code = body(&frame).first().copied().unwrap_or(0);
                let why = match self.decode_v5(frame) {
                    Ok(v5::Packet::Disconnect(d)) => d.reason_string,
                    Ok(_) | Err(_) => None,
                };
                Err(End::Disconnected {
                    code,
                    text: reason(code, why.as_deref()),
                })
            }
            other => Err(End::Protocol(format!("a packet that no server sends ({other:#04x})"))),
        }
    }

    fn incoming_publish(&mut self, mut frame: BytesMut) -> Result<(), End> {
        let publish = match &mut self.codec {
            Codec::V3(codec) => match codec.decode(&mut frame) {
                Ok(Some((v3::Packet::Publish(publish), _))) => publish,
                Ok(_) => return Err(End::Protocol("a PUBLISH that is none".into())),
                Err(e) => return Err(End::Protocol(format!("a PUBLISH cannot be decoded: {e}"))),
            },
            Codec::V5(_) => match self.decode_v5(frame)? {
                v5::Packet::Publish(publish) => publish,
                _ => return Err(End::Protocol("a PUBLISH that is none".into())),
            },
        };
        let id = publish.packet_id.map_or(0, NonZeroU16::get);
        let (qos, owed) = match publish.qos {
            QoS::AtMostOnce => (Qos::AtMostOnce, Owed::Nothing),
            QoS::AtLeastOnce => (Qos::AtLeastOnce, Owed::Puback(id)),
            QoS::ExactlyOnce => (Qos::ExactlyOnce, Owed::Pubrec(id)),
        };
        if let Owed::Pubrec(id) = owed
            && !self.qos2.insert(id)
        {
            // Sent again: the first one either still waits here for its PUBREC, or has had it.
            if !self.owed.contains(&owed) {
                put_ack(&mut self.out, 0x50, id);
            }
            return Ok(());
        }
        let topic = Topic::new(ByteString::from(&*publish.topic))
            .map_err(|e| End::Protocol(format!("a PUBLISH whose topic is not valid: {e}")))?;
        self.owed.push_back(owed);
        self.events.push_back(Event::Incoming(Incoming {
            topic,
            // Of its own memory: a slice would keep the whole read buffer alive.
            payload: Bytes::copy_from_slice(&publish.payload),
            qos,
            retain: publish.retain,
            properties: publish.properties.and_then(own_properties),
        }));
        Ok(())
    }

    fn suback(&mut self, frame: &[u8]) -> Result<(), End> {
        let malformed = || End::Protocol("its SUBACK is malformed".into());
        let body = body(frame);
        let (&[high, low], mut codes) = body.split_first_chunk::<2>().ok_or_else(malformed)?;
        if self.options.version == MqttVersion::V5 {
            let (properties, digits) = variable_length(codes)?.ok_or_else(malformed)?;
            codes = codes.get(digits + properties..).ok_or_else(malformed)?;
        }
        let id = u16::from_be_bytes([high, low]);
        let at = self
            .subscribes
            .iter()
            .position(|(sent, _)| *sent == id)
            .ok_or_else(malformed)?;
        let (_, filters) = self.subscribes.swap_remove(at);
        if filters.len() != codes.len() {
            return Err(malformed());
        }
        for (filter, code) in filters.into_iter().zip(codes) {
            self.events.push_back(match *code {
                0..=2 => Event::Subscribed(filter),
                code => Event::SubscribeRefused(filter, code),
            });
        }
        Ok(())
    }

    fn decode_v5(&mut self, mut frame: BytesMut) -> Result<v5::Packet, End> {
        // A codec of its own: one that failed halfway remembers half a frame.
        match v5::Codec::new(0, 0).decode(&mut frame) {
            Ok(Some((packet, _))) => Ok(packet),
            Ok(None) => Err(End::Protocol("a packet whose length does not add up".into())),
            Err(e) => Err(End::Protocol(format!("a packet cannot be decoded: {e}"))),
        }
    }
}

fn earliest(a: Option<Instant>, b: Option<Instant>) -> Option<Instant> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b)),
        (a, b) => a.or(b),
    }
}

/// The four acknowledgements have one shape; without a reason code they mean success in both versions.
fn put_ack(out: &mut BytesMut, first_byte: u8, id: u16) {
    let [high, low] = id.to_be_bytes();
    out.extend_from_slice(&[first_byte, 2, high, low]);
}

/// The value and the digits it took; None: more bytes are needed.
fn variable_length(bytes: &[u8]) -> Result<Option<(usize, usize)>, End> {
    let mut value = 0;
    for (n, byte) in bytes.iter().take(4).enumerate() {
        value |= usize::from(byte & 0x7F) << (7 * n);
        if byte & 0x80 == 0 {
            return Ok(Some((value, n + 1)));
        }
    }
    if bytes.len() >= 4 {
        Err(End::Protocol("a length of more than four bytes".into()))
    } else {
        Ok(None)
    }
}

/// The length of the first frame, header included; None: it is not all there.
fn frame_length(bytes: &[u8]) -> Result<Option<usize>, End> {
    let Some((remaining, digits)) = variable_length(bytes.get(1..).unwrap_or_default())? else {
        return Ok(None);
    };
    let length = 1 + digits + remaining;
    if length > PACKET_IN_BYTES_MAX as usize {
        return Err(End::Protocol(format!(
            "a packet of {length} bytes, above our limit of {PACKET_IN_BYTES_MAX}"
        )));
    }
    Ok((bytes.len() >= length).then_some(length))
}

/// What follows the fixed header of a whole frame.
fn body(frame: &[u8]) -> &[u8] {
    let header = 1 + frame.iter().skip(1).take(4).take_while(|b| **b & 0x80 != 0).count() + 1;
    frame.get(header..).unwrap_or_default()
}

fn parse_ack(frame: &[u8]) -> Result<(u16, u8), End> {
    match body(frame) {
        [0, 0, ..] | [] | [_] => Err(End::Protocol("an acknowledgement without a packet id".into())),
        [high, low] => Ok((u16::from_be_bytes([*high, *low]), 0)),
        [high, low, code, ..] => Ok((u16::from_be_bytes([*high, *low]), *code)),
    }
}

fn codec_properties(properties: &Properties, expires_in_s: Option<u32>) -> v5::PublishProperties {
    v5::PublishProperties {
        topic_alias: None,
        correlation_data: properties.correlation_data.clone(),
        // Its type has no zero; what expires this very second may live one more.
        message_expiry_interval: expires_in_s.map(|s| NonZeroU32::new(s).unwrap_or(NonZeroU32::MIN)),
        content_type: properties.content_type.clone(),
        user_properties: properties.user.clone(),
        is_utf8_payload: properties.payload_is_utf8,
        response_topic: properties.response_topic.clone(),
        subscription_ids: Vec::new(),
    }
}

/// Copies: the decoded strings are slices of the read buffer.
fn own_properties(properties: v5::PublishProperties) -> Option<Box<Properties>> {
    let own = |s: ByteString| ByteString::from(&*s);
    let own = Properties {
        user: properties
            .user_properties
            .into_iter()
            .map(|(k, v)| (own(k), own(v)))
            .collect(),
        content_type: properties.content_type.map(own),
        payload_is_utf8: properties.is_utf8_payload,
        response_topic: properties.response_topic.map(own),
        correlation_data: properties.correlation_data.map(|b| Bytes::copy_from_slice(&b)),
        expiry_s: properties.message_expiry_interval.map(NonZeroU32::get),
    };
    (own != Properties::default()).then(|| Box::new(own))
}

/// An MQTT 5 reason code in words, with the remote's own words where it gave any.
pub(super) fn reason(code: u8, own_words: Option<&str>) -> String {
    let words = match code {
        0x00 => "without an error",
        0x80 => "unspecified error",
        0x81 => "malformed packet",
        0x82 => "protocol error",
        0x83 => "implementation specific error",
        0x84 => "it does not speak MQTT 5; try version = \"3.1.1\"",
        0x85 => "the client id is not allowed",
        0x86 => "bad user name or password",
        0x87 => "not authorized",
        0x88 => "the server is unavailable",
        0x89 => "the server is busy",
        0x8A => "this client is banned",
        0x8B => "the server is shutting down",
        0x8C => "bad authentication method",
        0x8D => "keep-alive timeout",
        0x8E => "session taken over: another client uses the same client id",
        0x8F => "topic filter invalid",
        0x90 => "topic name invalid",
        0x91 => "packet id in use",
        0x93 => "receive maximum exceeded",
        0x94 => "topic alias invalid",
        0x95 => "packet too large",
        0x96 => "message rate too high",
        0x97 => "quota exceeded",
        0x98 => "administrative action",
        0x99 => "payload format invalid",
        0x9A => "retain not supported",
        0x9B => "QoS not supported",
        0x9C => "use another server",
        0x9D => "the server has moved",
        0x9E => "shared subscriptions not supported",
        0x9F => "connection rate exceeded",
        0xA0 => "maximum connect time",
        0xA2 => "wildcard subscriptions not supported",
        _ => "unknown reason",
    };
    match own_words {
        Some(own) if !own.is_empty() => format!("{words} (code {code:#04x}): {own}"),
        _ => format!("{words} (code {code:#04x})"),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::uplinks::routes::tests::entry;

    const WALL: Timestamp = Timestamp::from_millis(1_700_000_000_000);

    pub(in crate::uplinks::mqtt) fn options(version: MqttVersion) -> Options {
        Options {
            version,
            client_id: "tidegate-line-4-cloud".into(),
            username: Some("u".into()),
            password: Some(b"p".to_vec()),
            keep_alive: Duration::from_secs(60),
            window: 10,
            packet_bytes_max: None,
            ack_timeout: Duration::from_secs(30),
            subscribe: Vec::new(),
        }
    }

    /// The other end: decodes what the session writes, with the same codec in the server's role.
    pub(in crate::uplinks::mqtt) struct Remote {
        version: MqttVersion,
        codec: Codec,
        inbox: BytesMut,
    }

    /// What a remote sees, whatever the version.
    #[derive(Debug, Clone, PartialEq)]
    pub(in crate::uplinks::mqtt) enum Seen {
        Connect { clean: bool, keep_alive: u16 },
        Publish(u16, String, Bytes, Option<v5::PublishProperties>),
        Subscribe(u16, Vec<String>),
        Ack(u8, u16),
        Ping,
        Disconnect,
    }

    impl Remote {
        pub(in crate::uplinks::mqtt) fn new(version: MqttVersion) -> Remote {
            let codec = match version {
                MqttVersion::V311 => Codec::V3(v3::Codec::new(0)),
                MqttVersion::V5 => Codec::V5(v5::Codec::new(0, 0)),
            };
            Remote {
                version,
                codec,
                inbox: BytesMut::new(),
            }
        }

        pub(in crate::uplinks::mqtt) fn take(&mut self, session: &mut Session, now: Instant) -> Vec<Seen> {
            let out = session.output().split();
            if !out.is_empty() {
                session.wrote(now);
            }
            self.inbox.extend_from_slice(&out);
            let mut seen = Vec::new();
            loop {
                let packet = match &mut self.codec {
                    Codec::V3(codec) => codec.decode(&mut self.inbox).expect("valid").map(|(p, _)| match p {
                        v3::Packet::Connect(c) => Seen::Connect {
                            clean: c.clean_session,
                            keep_alive: c.keep_alive,
                        },
                        v3::Packet::Publish(p) => publish(*p),
                        v3::Packet::Subscribe {
                            packet_id,
                            topic_filters,
                        } => Seen::Subscribe(
                            packet_id.get(),
                            topic_filters.iter().map(|(f, _)| f.to_string()).collect(),
                        ),
                        v3::Packet::PublishAck { packet_id } => Seen::Ack(0x40, packet_id.get()),
                        v3::Packet::PublishReceived { packet_id } => Seen::Ack(0x50, packet_id.get()),
                        v3::Packet::PublishComplete { packet_id } => Seen::Ack(0x70, packet_id.get()),
                        v3::Packet::PingRequest => Seen::Ping,
                        v3::Packet::Disconnect => Seen::Disconnect,
                        other => panic!("a client must not send {other:?}"),
                    }),
                    Codec::V5(codec) => codec.decode(&mut self.inbox).expect("valid").map(|(p, _)| match p {
                        v5::Packet::Connect(c) => {
                            assert_eq!(c.session_expiry_interval_secs, 0);
                            assert_eq!(c.receive_max.map(NonZeroU16::get), Some(INCOMING_MAX as u16));
                            Seen::Connect {
                                clean: c.clean_start,
                                keep_alive: c.keep_alive,
                            }
                        }
                        v5::Packet::Publish(p) => publish(*p),
                        v5::Packet::Subscribe(s) => {
                            assert!(
                                s.topic_filters
                                    .iter()
                                    .all(|(_, o)| o.no_local && o.qos == QoS::AtLeastOnce)
                            );
                            let filters = s.topic_filters.iter().map(|(f, _)| f.to_string()).collect();
                            Seen::Subscribe(s.packet_id.get(), filters)
                        }
                        v5::Packet::PublishAck(a) => Seen::Ack(0x40, a.packet_id.get()),
                        v5::Packet::PublishReceived(a) => Seen::Ack(0x50, a.packet_id.get()),
                        v5::Packet::PublishComplete(a) => Seen::Ack(0x70, a.packet_id.get()),
                        v5::Packet::PingRequest => Seen::Ping,
                        v5::Packet::Disconnect(_) => Seen::Disconnect,
                        other => panic!("a client must not send {other:?}"),
                    }),
                };
                match packet {
                    Some(packet) => seen.push(packet),
                    None => return seen,
                }
            }
        }

        /// CONNACK without anything.
        pub(in crate::uplinks::mqtt) fn connack(&self) -> &'static [u8] {
            match self.version {
                MqttVersion::V311 => &[0x20, 2, 1, 0],
                MqttVersion::V5 => &[0x20, 3, 1, 0, 0],
            }
        }
    }

    fn publish(p: CodecPublish) -> Seen {
        assert!(!p.dup && p.qos == QoS::AtLeastOnce);
        Seen::Publish(
            p.packet_id.expect("QoS 1").get(),
            p.topic.to_string(),
            p.payload,
            p.properties,
        )
    }

    pub(in crate::uplinks::mqtt) fn puback(id: u16, code: u8) -> Vec<u8> {
        let [high, low] = id.to_be_bytes();
        if code == 0 {
            vec![0x40, 2, high, low]
        } else {
            vec![0x40, 3, high, low, code]
        }
    }

    fn up(options: Options, now: Instant) -> (Session, Remote) {
        let keep_alive = options.keep_alive.as_secs() as u16;
        let mut remote = Remote::new(options.version);
        let mut session = Session::new(options, now).expect("encodes");
        let seen = remote.take(&mut session, now);
        assert_eq!(
            seen,
            [Seen::Connect {
                clean: true,
                keep_alive
            }]
        );
        assert_eq!(session.capacity(), 0, "nothing before CONNACK");
        session.input(remote.connack(), now).expect("accepted");
        assert_eq!(session.event(), Some(Event::Connected));
        (session, remote)
    }

    fn send(session: &mut Session, token: Token, payload: impl Into<Bytes>, now: Instant) -> Result<(), Unsendable> {
        let message = entry(token, "a/b", payload).message;
        session.publish(token, &message.topic, &message, WALL, now)
    }

    fn acknowledged(session: &mut Session) -> Vec<Token> {
        std::iter::from_fn(|| session.event())
            .map(|e| match e {
                Event::Acknowledged(token) => token,
                other => panic!("{other:?}"),
            })
            .collect()
    }

    const BOTH: [MqttVersion; 2] = [MqttVersion::V311, MqttVersion::V5];

    #[test]
    fn acknowledgements_come_in_any_order_and_cut_anywhere() {
        for version in BOTH {
            let now = clock_start();
            let (mut session, mut remote) = up(options(version), now);
            for token in 0..10 {
                send(&mut session, token, "x", now).expect("small");
            }
            assert_eq!((session.capacity(), session.in_flight()), (0, 10));
            let ids: Vec<u16> = remote
                .take(&mut session, now)
                .into_iter()
                .map(|seen| match seen {
                    Seen::Publish(id, topic, payload, _) if topic == "a/b" && payload == "x" => id,
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(ids, (1..=10).collect::<Vec<u16>>());
            let mut bytes = Vec::new();
            for index in [3, 0, 9, 1, 2] {
                bytes.extend(puback(ids[index], 0));
            }
            for byte in bytes {
                session.input(&[byte], now).expect("valid");
            }
            assert_eq!(acknowledged(&mut session), [3, 0, 9, 1, 2]);
            assert_eq!((session.capacity(), session.in_flight()), (5, 5));
        }
    }

    #[test]
    fn ids_go_round_and_a_doubled_puback_confirms_nothing() {
        let now = clock_start();
        let (mut session, mut remote) = up(options(MqttVersion::V311), now);
        let mut last = 0;
        for token in 0..140_000u64 {
            send(&mut session, token, "x", now).expect("small");
            let Some(Seen::Publish(id, ..)) = remote.take(&mut session, now).pop() else {
                panic!("a PUBLISH")
            };
            assert!(id != last && (1..=65_000).contains(&id));
            session.input(&puback(last.max(1), 0), now).expect("ignored");
            if last != 0 {
                assert_eq!(session.event(), None, "{token}: the PUBACK of {last} again");
            } else {
                assert_eq!(session.event(), Some(Event::Acknowledged(0)));
                last = id;
                continue;
            }
            session.input(&puback(id, 0), now).expect("valid");
            assert_eq!(session.event(), Some(Event::Acknowledged(token)));
            last = id;
        }
        for id in [0xFFFF, 65_001, 40_000] {
            session.input(&puback(id, 0), now).expect("ignored");
            assert_eq!(session.event(), None);
        }
    }

    /// UP-01.
    #[test]
    fn never_more_in_flight_than_the_remote_grants() {
        let now = clock_start();
        for (connack, expected) in [
            (&[0x20u8, 6, 0, 0, 3, 0x21, 0, 3][..], 3),
            (&[0x20, 6, 0, 0, 3, 0x21, 0, 200], 10),
            (&[0x20, 3, 0, 0, 0], 10),
        ] {
            let mut session = Session::new(options(MqttVersion::V5), now).expect("encodes");
            session.input(connack, now).expect("accepted");
            assert_eq!((session.capacity(), session.window()), (expected, expected));
        }
    }

    #[test]
    fn reason_codes_tell_delivery_from_refusal() {
        let now = clock_start();
        let (mut session, _) = up(options(MqttVersion::V5), now);
        for (token, code) in [0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x95, 0x97, 0x99, 0xFE]
            .into_iter()
            .enumerate()
        {
            let token = token as Token;
            send(&mut session, token, "x", now).expect("small");
            session
                .input(&puback(token as u16 + 1, code), now)
                .expect("a reason is no decoding error");
            let expected = if code < 0x80 {
                Event::Acknowledged(token)
            } else {
                Event::Refused(token, code)
            };
            assert_eq!(session.event(), Some(expected));
        }
        // With properties behind the code.
        send(&mut session, 77, "x", now).expect("small");
        session
            .input(&[0x40, 8, 0, 11, 0x97, 4, 0x1F, 0, 1, b'q'], now)
            .expect("valid");
        assert_eq!(session.event(), Some(Event::Refused(77, 0x97)));
    }

    /// UP-06: never sent, nothing else disturbed.
    #[test]
    fn what_is_too_large_is_not_sent() {
        let now = clock_start();
        let mut announced = Session::new(options(MqttVersion::V5), now).expect("encodes");
        announced
            .input(&[0x20, 8, 0, 0, 5, 0x27, 0, 2, 0, 0], now)
            .expect("accepted");
        let (configured, _) = up(
            Options {
                packet_bytes_max: Some(128 << 10),
                ..options(MqttVersion::V311)
            },
            now,
        );
        for mut session in [announced, configured] {
            let mut remote = Remote::new(session.options.version);
            remote.take(&mut session, now);
            while session.event().is_some() {}
            send(&mut session, 1, "before", now).expect("small");
            let error = send(&mut session, 2, vec![0; 200 << 10], now).expect_err("too large");
            assert!(
                matches!(error, Unsendable::TooLarge { size, limit: 131_072 } if size > 200 << 10),
                "{error}"
            );
            send(&mut session, 3, "after", now).expect("small");
            // Exactly at the limit.
            let room = (128 << 10) - (1 + 3 + 2 + 3 + 2) - usize::from(session.options.version == MqttVersion::V5);
            send(&mut session, 4, vec![0; room], now).expect("fits");
            send(&mut session, 5, vec![0; room + 1], now).expect_err("one byte too many");
            assert_eq!(remote.take(&mut session, now).len(), 3);
            assert_eq!(session.in_flight(), 3);
            session
                .input(&[puback(1, 0), puback(2, 0), puback(3, 0)].concat(), now)
                .expect("valid");
            assert_eq!(acknowledged(&mut session), [1, 3, 4]);
        }
    }

    #[test]
    fn properties_travel_in_version_5_and_expiry_counts_down() {
        let now = clock_start();
        let (mut session, mut remote) = up(options(MqttVersion::V5), now);
        let mut message = entry(1, "a", "x").message;
        message.properties = Some(Box::new(Properties {
            user: vec![("k".into(), "v".into())],
            content_type: Some("text/plain".into()),
            payload_is_utf8: true,
            response_topic: Some("r".into()),
            correlation_data: Some(Bytes::from_static(b"c")),
            expiry_s: Some(60),
        }));
        let wall = Timestamp::from_millis(message.received.millis() + 20_000);
        session.publish(1, &message.topic, &message, wall, now).expect("small");
        let Some(Seen::Publish(_, _, _, Some(p))) = remote.take(&mut session, now).pop() else {
            panic!("a PUBLISH")
        };
        assert_eq!(p.message_expiry_interval.map(NonZeroU32::get), Some(40));
        assert_eq!(
            own_properties(p).map(|p| Properties {
                expiry_s: Some(60),
                ..*p
            }),
            message.properties.map(|p| *p)
        );
    }

    #[test]
    fn connection_refusals_are_said_in_words() {
        let now = clock_start();
        let table: [(MqttVersion, &[u8], &str, bool); 7] = [
            (MqttVersion::V311, &[0x20, 2, 0, 5], "not authorized", true),
            (MqttVersion::V311, &[0x20, 2, 0, 3], "unavailable", false),
            (MqttVersion::V311, &[0x20, 2, 0, 1], "version = \"5\"", true),
            (MqttVersion::V5, &[0x20, 2, 0, 1], "version = \"3.1.1\"", true),
            (
                MqttVersion::V5,
                &[0x20, 3, 0, 0x86, 0],
                "bad user name or password",
                true,
            ),
            (
                MqttVersion::V5,
                &[0x20, 8, 0, 0x97, 5, 0x1F, 0, 2, b'4', b'2'],
                "quota exceeded (code 0x97): 42",
                false,
            ),
            (MqttVersion::V5, &[0x20, 3, 0, 0xFE, 0], "unknown reason", true),
        ];
        for (version, connack, words, expected) in table {
            let mut session = Session::new(options(version), now).expect("encodes");
            match session.input(connack, now) {
                Err(End::ConnectRefused { text, lasting }) => {
                    assert!(text.contains(words) && lasting == expected, "{text} {lasting}");
                }
                other => panic!("{connack:?}: {other:?}"),
            }
        }
        let mut session = Session::new(options(MqttVersion::V5), now).expect("encodes");
        assert_eq!(
            session.input(&[0x20, 5, 0, 0, 2, 0x24, 0], now),
            Err(End::NoAcknowledgements)
        );
        let mut session = Session::new(options(MqttVersion::V5), now).expect("encodes");
        assert!(matches!(session.input(b"HTTP/1.1 400 Bad", now), Err(End::Protocol(_))));
    }

    /// UP-02: each connection subscribes anew, in packets that every remote takes.
    #[test]
    fn subscribes_after_connack_and_names_what_is_refused() {
        for version in BOTH {
            let now = clock_start();
            let filters: Vec<TopicFilter> = (0..10)
                .map(|n| TopicFilter::new(format!("c/{n}/#")).expect("valid"))
                .collect();
            let (mut session, mut remote) = up(
                Options {
                    subscribe: filters.clone(),
                    ..options(version)
                },
                now,
            );
            let seen = remote.take(&mut session, now);
            let [Seen::Subscribe(first, a), Seen::Subscribe(second, b)] = seen.as_slice() else {
                panic!("{seen:?}")
            };
            assert_eq!((a.len(), b.len()), (8, 2));
            assert!(*first > 65_000 && *second > 65_000 && first != second);
            let mut suback = vec![0x90, 4, second.to_be_bytes()[0], second.to_be_bytes()[1]];
            if version == MqttVersion::V5 {
                suback[1] += 1;
                suback.push(0);
            }
            suback.extend([1, if version == MqttVersion::V5 { 0x87 } else { 0x80 }]);
            session.input(&suback, now).expect("valid");
            assert_eq!(session.event(), Some(Event::Subscribed(filters[8].clone())));
            let Some(Event::SubscribeRefused(filter, _)) = session.event() else {
                panic!("a refusal")
            };
            assert_eq!(filter, filters[9]);
            session.input(&suback, now).expect_err("a SUBACK twice");
        }
    }

    fn incoming_publish(qos: u8, id: u16, version: MqttVersion) -> Vec<u8> {
        let mut body = vec![0, 1, b'c'];
        if qos > 0 {
            body.extend(id.to_be_bytes());
        }
        if version == MqttVersion::V5 {
            body.push(0);
        }
        body.push(b'!');
        [vec![0x30 | qos << 1, body.len() as u8], body].concat()
    }

    #[test]
    fn incoming_messages_are_acknowledged_in_order_and_only_when_settled() {
        for version in BOTH {
            let now = clock_start();
            let (mut session, mut remote) = up(options(version), now);
            for (qos, id) in [(1, 7), (0, 0), (2, 9), (1, 8), (2, 9)] {
                session.input(&incoming_publish(qos, id, version), now).expect("valid");
            }
            let events: Vec<_> = std::iter::from_fn(|| session.event()).collect();
            assert_eq!(events.len(), 4, "the QoS 2 message that came twice is one: {events:?}");
            assert!(
                remote.take(&mut session, now).is_empty(),
                "nothing before it is durable"
            );
            session.settle(2, now).expect("settled");
            assert_eq!(remote.take(&mut session, now), [Seen::Ack(0x40, 7)]);
            session.settle(2, now).expect("settled");
            assert_eq!(remote.take(&mut session, now), [Seen::Ack(0x50, 9), Seen::Ack(0x40, 8)]);
            // Again after its PUBREC: the PUBREC was lost, the message is not new.
            session.input(&incoming_publish(2, 9, version), now).expect("valid");
            assert_eq!(
                (session.event(), remote.take(&mut session, now)),
                (None, vec![Seen::Ack(0x50, 9)])
            );
            session.input(&[0x62, 2, 0, 9], now).expect("PUBREL");
            assert_eq!(remote.take(&mut session, now), [Seen::Ack(0x70, 9)]);
            session.input(&incoming_publish(2, 9, version), now).expect("valid");
            assert!(
                matches!(session.event(), Some(Event::Incoming(_))),
                "the id is free again"
            );
        }
    }

    #[test]
    fn a_flood_from_the_remote_is_held_back() {
        let now = clock_start();
        let (mut session, _) = up(options(MqttVersion::V311), now);
        let flood: Vec<u8> = (1..=100)
            .flat_map(|id| incoming_publish(1, id, MqttVersion::V311))
            .collect();
        session.input(&flood, now).expect("valid");
        assert!(!session.wants_input());
        let mut count = 0;
        while !session.wants_input() {
            let arrived = std::iter::from_fn(|| session.event()).count();
            assert!(arrived <= INCOMING_MAX);
            count += arrived;
            session.settle(arrived, now).expect("settled");
        }
        assert_eq!(count + std::iter::from_fn(|| session.event()).count(), 100);
    }

    fn clock_start() -> Instant {
        crate::clock::monotonic()
    }

    fn seconds(n: f64) -> Duration {
        Duration::from_secs_f64(n)
    }

    /// Runs the clock to each deadline until the session ends; what it wrote goes nowhere, or a remote answers pings.
    fn run_down(
        session: &mut Session,
        mut now: Instant,
        mut answer: impl FnMut(&mut Session, Instant),
    ) -> (End, Instant) {
        for _ in 0..10_000 {
            answer(session, now);
            now = session.deadline().expect("something is always waited for");
            if let Err(end) = session.tick(now) {
                return (end, now);
            }
        }
        panic!("it never ends");
    }

    /// QU-01: a frozen link is noticed within 1.5 keep-alives, whether we send or not.
    #[test]
    fn silence_is_noticed_in_time() {
        let start = clock_start();
        let (mut session, mut remote) = up(options(MqttVersion::V5), start);
        let (end, at) = run_down(&mut session, start, |s, now| drop(remote.take(s, now)));
        assert!(
            matches!(end, End::Silent(_)) && at - start <= seconds(90.0),
            "{end} after {:?}",
            at - start
        );

        // One message a second goes into the dead link.
        let (mut session, mut remote) = up(
            Options {
                window: 1_000,
                ack_timeout: seconds(600.0),
                ..options(MqttVersion::V5)
            },
            start,
        );
        let mut now = start;
        let end = (0..)
            .find_map(|n| {
                now += seconds(1.0);
                send(&mut session, n, "x", now).expect("small");
                remote.take(&mut session, now);
                session.tick(now).err()
            })
            .expect("ends");
        assert!(
            matches!(end, End::Silent(_)) && now - start <= seconds(90.0),
            "{end} after {:?}",
            now - start
        );
    }

    #[test]
    fn an_idle_connection_lives_on_pings() {
        let start = clock_start();
        let (mut session, mut remote) = up(options(MqttVersion::V311), start);
        let mut now = start;
        let mut pings = 0;
        while now < start + seconds(3_600.0) {
            now = session.deadline().expect("the next ping");
            session.tick(now).expect("alive");
            for seen in remote.take(&mut session, now) {
                assert_eq!(seen, Seen::Ping);
                pings += 1;
                now += seconds(0.2);
                session.input(&[0xD0, 0], now).expect("PINGRESP");
            }
        }
        assert!((60..=90).contains(&pings), "{pings}");
    }

    /// UP-04: PINGRESPs come, PUBACKs do not.
    #[test]
    fn not_progressing_is_noticed_though_the_remote_answers_pings() {
        let start = clock_start();
        let (mut session, mut remote) = up(
            Options {
                keep_alive: seconds(10.0),
                ..options(MqttVersion::V5)
            },
            start,
        );
        send(&mut session, 1, "x", start).expect("small");
        let (end, at) = run_down(&mut session, start, |s, now| {
            if remote.take(s, now).contains(&Seen::Ping) {
                s.input(&[0xD0, 0], now).expect("PINGRESP");
            }
        });
        assert_eq!(
            end,
            End::NotProgressing {
                waited: seconds(30.0),
                in_flight: 1
            }
        );
        assert_eq!(at - start, seconds(30.0));
    }

    /// The patience for a write begins when there is something to write, not with the last write before.
    #[test]
    fn a_ping_after_a_quiet_time_is_not_a_stalled_write() {
        let start = clock_start();
        let (mut session, mut remote) = up(options(MqttVersion::V5), start);
        let now = session.deadline().expect("a ping is due");
        session.tick(now).expect("asks");
        assert!(session.deadline().expect("waits") > now + seconds(29.0));
        session.tick(now).expect("still asking");
        assert_eq!(remote.take(&mut session, now), [Seen::Ping]);
    }

    #[test]
    fn a_remote_that_takes_no_bytes_is_noticed() {
        let start = clock_start();
        let (mut session, _) = up(
            Options {
                ack_timeout: seconds(600.0),
                ..options(MqttVersion::V5)
            },
            start,
        );
        send(&mut session, 1, "x", start).expect("small");
        let (end, at) = run_down(&mut session, start, |_, _| {});
        assert!(matches!(end, End::Stalled(_)) && at - start <= seconds(60.0), "{end}");
    }

    #[test]
    fn a_slow_link_that_moves_is_not_dead() {
        let start = clock_start();
        let (mut session, _) = up(options(MqttVersion::V311), start);
        let mut now = start;
        send(&mut session, 1, vec![0; 100_000], now).expect("no limit");
        // 100 bytes a second: a thousand seconds for one message, and no byte comes back meanwhile.
        while session.output().len() > 100 {
            now += seconds(1.0);
            session.output().advance(100);
            session.wrote(now);
            session.tick(now).expect("it moves");
        }
    }

    #[test]
    fn no_connack_ends_it() {
        let start = clock_start();
        let mut session = Session::new(options(MqttVersion::V5), start).expect("encodes");
        let (end, at) = run_down(&mut session, start, |s, now| {
            s.output().clear();
            s.wrote(now);
        });
        assert_eq!((end, at - start), (End::NoConnack, CONNACK_TIMEOUT));
    }

    /// Whatever a remote sends: an end or events, no panic, and no memory reserved for what was only announced.
    #[test]
    fn garbage_never_panics() {
        let mut random = crate::uplinks::backoff::Jitter::seeded(7);
        let now = clock_start();
        for version in BOTH {
            for _ in 0..20_000 {
                let (mut session, remote) = up(options(version), now);
                send(&mut session, 1, "x", now).expect("small");
                let mut bytes = match random.draw() % 4 {
                    0 => incoming_publish((random.draw() % 3) as u8, 5, version),
                    1 => puback(1, random.draw() as u8),
                    2 => remote.connack().to_vec(),
                    _ => (0..random.draw() % 40).map(|_| random.draw() as u8).collect(),
                };
                for _ in 0..random.draw() % 4 {
                    if !bytes.is_empty() {
                        let at = random.draw() as usize % bytes.len();
                        bytes[at] = random.draw() as u8;
                    }
                }
                let _ = session.input(&bytes, now);
                while session.event().is_some() {}
                let _ = session.settle(1, now);
                assert!(session.inbox.capacity() < 64 << 10);
            }
        }
        let (mut session, _) = up(options(MqttVersion::V5), now);
        assert!(matches!(
            session.input(&[0x30, 0xFF, 0xFF, 0xFF, 0x7F], now),
            Err(End::Protocol(_))
        ));
    }
}
