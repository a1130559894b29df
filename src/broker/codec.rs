//! MQTT 3.1, 3.1.1 and 5 on the wire. The only file that names rmqtt-codec.
//!
//! A frame is handed to the codec only when it is here whole and below the limit, so an announced length reserves
//! nothing. What the codec lets through and the specification does not is refused here (ARCHITECTURE.md, "Codec"): bytes
//! behind a CONNECT, bodies of PINGREQ and DISCONNECT, reserved bits of a SUBSCRIBE, DUP with QoS 0.

use std::cell::Cell;
use std::num::{NonZeroU16, NonZeroU32};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use bytestring::ByteString;
use rmqtt_codec::error::{DecodeError, EncodeError};
use rmqtt_codec::types::QoS;
use rmqtt_codec::v5::ToReasonCode;
use rmqtt_codec::{v3, v5};
use tokio_util::codec::{Decoder, Encoder};

use super::properties;
use crate::message::{Message, Properties, Qos};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    V31,
    V311,
    V5,
}

impl Version {
    pub fn is_v5(self) -> bool {
        self == Version::V5
    }

    pub fn name(self) -> &'static str {
        match self {
            Version::V31 => "3.1",
            Version::V311 => "3.1.1",
            Version::V5 => "5",
        }
    }
}

/// MQTT 5 reason codes that we send (MQTT 5, 2.4).
pub mod reason {
    pub const SUCCESS: u8 = 0x00;
    pub const NO_MATCHING_SUBSCRIBERS: u8 = 0x10;
    pub const NO_SUBSCRIPTION_EXISTED: u8 = 0x11;
    pub const UNSPECIFIED: u8 = 0x80;
    pub const MALFORMED: u8 = 0x81;
    pub const PROTOCOL_ERROR: u8 = 0x82;
    pub const UNSUPPORTED_VERSION: u8 = 0x84;
    pub const CLIENT_ID_NOT_VALID: u8 = 0x85;
    pub const BAD_USER_OR_PASSWORD: u8 = 0x86;
    pub const NOT_AUTHORIZED: u8 = 0x87;
    pub const SERVER_BUSY: u8 = 0x89;
    pub const SERVER_SHUTTING_DOWN: u8 = 0x8b;
    pub const BAD_AUTHENTICATION_METHOD: u8 = 0x8c;
    pub const KEEP_ALIVE_TIMEOUT: u8 = 0x8d;
    pub const TAKEN_OVER: u8 = 0x8e;
    pub const TOPIC_NAME_INVALID: u8 = 0x90;
    pub const PACKET_ID_NOT_FOUND: u8 = 0x92;
    pub const RECEIVE_MAXIMUM_EXCEEDED: u8 = 0x93;
    pub const TOPIC_ALIAS_INVALID: u8 = 0x94;
    pub const PACKET_TOO_LARGE: u8 = 0x95;
    pub const QUOTA_EXCEEDED: u8 = 0x97;
    pub const ADMINISTRATIVE_ACTION: u8 = 0x98;
    pub const CONNECTION_RATE_EXCEEDED: u8 = 0x9f;
}

/// The identifier of the property that says a reason in words.
const REASON_STRING: u8 = 0x1f;

/// A packet that must not be: the MQTT 5 reason, and the cause in words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text} (reason 0x{reason:02x})")]
pub struct WireError {
    pub reason: u8,
    pub text: String,
}

impl WireError {
    pub fn new(reason: u8, text: impl Into<String>) -> WireError {
        WireError {
            reason,
            text: text.into(),
        }
    }
}

impl From<DecodeError> for WireError {
    fn from(e: DecodeError) -> Self {
        let reason = match e {
            DecodeError::InvalidClientId => reason::CLIENT_ID_NOT_VALID,
            // The codec's own choices (0x8f, 0x99, 0x83) are for packets that are well formed but not wanted.
            DecodeError::InvalidTopicFilter | DecodeError::Utf8Error | DecodeError::UnsupportedPacketType => {
                reason::MALFORMED
            }
            ref other => other.to_reason_code().into(),
        };
        WireError::new(reason, e.to_string())
    }
}

#[derive(Debug, Clone, PartialEq)]
pub enum Packet {
    Connect(Box<Connect>),
    Publish(Publish),
    PubAck { id: u16, reason: u8 },
    PubRec { id: u16, reason: u8 },
    PubRel { id: u16 },
    PubComp { id: u16 },
    Subscribe(Subscribe),
    Unsubscribe { id: u16, filters: Vec<ByteString> },
    PingReq,
    Disconnect { reason: u8, session_expiry_s: Option<u32> },
    Auth,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Connect {
    pub version: Version,
    pub clean_start: bool,
    pub keep_alive_s: u16,
    pub client_id: ByteString,
    pub username: Option<ByteString>,
    pub password: Option<Bytes>,
    pub will: Option<Will>,
    pub session_expiry_s: u32,
    pub receive_maximum: u16,
    pub topic_alias_maximum: u16,
    pub packet_bytes_max: Option<u32>,
    pub request_problem_information: bool,
    pub has_authentication_method: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Will {
    pub topic: ByteString,
    pub payload: Bytes,
    pub qos: Qos,
    pub retain: bool,
    pub delay_s: u32,
    pub properties: Option<Box<Properties>>,
}

/// An inbound PUBLISH, its topic not yet checked.
#[derive(Debug, Clone, PartialEq)]
pub struct Publish {
    pub topic: ByteString,
    /// 0: none.
    pub alias: u16,
    pub payload: Bytes,
    pub qos: Qos,
    pub retain: bool,
    pub dup: bool,
    /// 0 at QoS 0.
    pub id: u16,
    pub properties: Option<Box<Properties>>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Subscribe {
    pub id: u16,
    pub identifier: Option<u32>,
    pub filters: Vec<(ByteString, SubscribeOptions)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SubscribeOptions {
    pub qos: Qos,
    pub no_local: bool,
    pub retain_as_published: bool,
    /// 0: send retained at subscribe, 1: only where the subscription is new, 2: never (MQTT 5, 3.8.3.1).
    pub retain_handling: u8,
}

/// What CONNACK tells a client beside the result.
#[derive(Debug, Clone, Default)]
pub struct ConnAck {
    pub session_present: bool,
    pub assigned_client_id: Option<ByteString>,
    pub receive_maximum: u16,
    pub topic_alias_maximum: u16,
    pub packet_bytes_max: u32,
    pub session_expiry_s: Option<u32>,
    pub server_keep_alive_s: Option<u16>,
    pub reason_string: Option<String>,
}

/// One connection's wire state: its version, and its limits in both directions.
#[derive(Debug)]
pub struct Wire {
    codec: Codec,
    in_bytes_max: u32,
    out_bytes_max: u32,
    /// Packets encoded since the last look, without PUBLISH.
    sent: Cell<u32>,
    /// The client wants reasons in words also outside of CONNACK and DISCONNECT (MQTT 5, 3.1.2.11.7).
    wants_reasons: bool,
}

#[derive(Debug)]
enum Codec {
    /// Before the CONNECT.
    None,
    V3(v3::Codec, Version),
    V5(Box<v5::Codec>),
}

/// A fixed header and the length of the whole frame.
fn frame(buf: &[u8]) -> Result<Option<(u8, usize, usize)>, WireError> {
    let Some(first) = buf.first() else { return Ok(None) };
    let mut length = 0usize;
    for (i, byte) in buf.iter().skip(1).take(4).enumerate() {
        length |= usize::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Ok(Some((*first, i + 2, i + 2 + length)));
        }
    }
    if buf.len() >= 5 {
        return Err(WireError::new(
            reason::MALFORMED,
            "the remaining length has more than four bytes",
        ));
    }
    Ok(None)
}

impl Wire {
    pub fn new(in_bytes_max: u32) -> Wire {
        Wire {
            codec: Codec::None,
            in_bytes_max,
            out_bytes_max: u32::MAX,
            sent: Cell::new(0),
            wants_reasons: false,
        }
    }

    /// How many packets that are no PUBLISH were encoded since the last call.
    pub fn take_sent(&self) -> u32 {
        self.sent.take()
    }

    pub fn version(&self) -> Version {
        match &self.codec {
            Codec::None => Version::V311,
            Codec::V3(_, version) => *version,
            Codec::V5(_) => Version::V5,
        }
    }

    /// A frame that begins in `buf` needs this many bytes in all (None: too little is here to tell).
    pub fn frame_bytes(buf: &[u8]) -> Option<usize> {
        frame(buf).ok().flatten().map(|(_, _, total)| total)
    }

    /// After the CONNECT; what the client takes was in it.
    pub fn set_limit(&mut self, in_bytes_max: u32) {
        self.in_bytes_max = in_bytes_max;
    }

    /// The largest packet the client takes.
    pub fn out_bytes_max(&self) -> usize {
        self.out_bytes_max as usize
    }

    /// The next packet, or None where its frame is not here whole.
    pub fn decode(&mut self, buf: &mut BytesMut) -> Result<Option<Packet>, WireError> {
        let Some((first, header, total)) = frame(buf)? else {
            return Ok(None);
        };
        if total > self.in_bytes_max as usize {
            return Err(WireError::new(
                reason::PACKET_TOO_LARGE,
                format!("a packet of {total} bytes is above the limit of {}", self.in_bytes_max),
            ));
        }
        if matches!(self.codec, Codec::None) && first != 0x10 {
            // Whoever it is gets no answer: that would have to be a CONNACK [MQTT-3.1.0-1].
            return Err(WireError::new(reason::MALFORMED, "the first packet is not a CONNECT"));
        }
        if buf.len() < total {
            return Ok(None);
        }
        let mut first = first;
        if self.version() == Version::V31 && matches!(first >> 4, 6 | 8 | 10) {
            // MQTT 3.1 sets DUP when it repeats a PUBREL, SUBSCRIBE or UNSUBSCRIBE; the versions after it reserve the bit.
            buf[0] &= !0b1000;
            first = buf[0];
        }
        let connecting = matches!(self.codec, Codec::None);
        if connecting {
            self.codec = detect(&buf[header..total])?;
            // The codec refuses an empty client id without clean start; MQTT 5 lets the server assign one (3.1.3-6), and a
            // session of that name cannot be there yet.
            if self.version().is_v5()
                && let Some(flags) = empty_client_id(&buf[header..total])
            {
                buf[header + flags] |= 0b10;
            }
        }
        check_frame(first, &buf[header..total], self.version(), connecting)?;
        let expires_at_once = self.version().is_v5() && properties::check(first, &mut buf[header..total])?;
        match &mut self.codec {
            Codec::V3(codec, version) => {
                let version = *version;
                match codec.decode(buf)? {
                    Some((packet, _)) => from_v3(packet, version).map(Some),
                    None => Err(WireError::new(reason::MALFORMED, "the frame is cut short")),
                }
            }
            Codec::V5(codec) => match codec.decode(buf)? {
                Some((packet, _)) => {
                    let mut packet = from_v5(packet)?;
                    if expires_at_once {
                        expire_at_once(&mut packet);
                    }
                    if let Packet::Connect(c) = &packet {
                        self.out_bytes_max = c.packet_bytes_max.unwrap_or(u32::MAX);
                        self.wants_reasons = c.request_problem_information;
                    }
                    Ok(Some(packet))
                }
                None => Err(WireError::new(reason::MALFORMED, "the frame is cut short")),
            },
            Codec::None => Err(WireError::new(
                reason::PROTOCOL_ERROR,
                "the first packet is not a CONNECT",
            )),
        }
    }

    fn put(&mut self, out: &mut BytesMut, v3: v3::Packet, v5: impl FnOnce() -> v5::Packet) -> Result<(), EncodeError> {
        self.sent.set(self.sent.get() + 1);
        match &mut self.codec {
            Codec::V5(codec) => codec.encode(v5(), out),
            Codec::V3(codec, _) => codec.encode(v3, out),
            Codec::None => v3::Codec::default().encode(v3, out),
        }
    }

    /// `return_code` is MQTT 5's; 3.1.1 gets the nearest of its own (3.1.1, 3.2.2.3).
    pub fn connack(&mut self, out: &mut BytesMut, reason_code: u8, ack: &ConnAck) {
        let start = out.len();
        self.put_connack(out, reason_code, ack);
        if out.len() - start > self.out_bytes_max as usize && ack.reason_string.is_some() {
            // The words are left out where the client would not take them [MQTT-3.2.2-19].
            out.truncate(start);
            let ack = ConnAck {
                reason_string: None,
                ..ack.clone()
            };
            self.put_connack(out, reason_code, &ack);
        }
    }

    fn put_connack(&mut self, out: &mut BytesMut, reason_code: u8, ack: &ConnAck) {
        let three = match reason_code {
            reason::SUCCESS => v3::ConnectAckReason::ConnectionAccepted,
            reason::UNSUPPORTED_VERSION => v3::ConnectAckReason::UnacceptableProtocolVersion,
            reason::CLIENT_ID_NOT_VALID => v3::ConnectAckReason::IdentifierRejected,
            reason::BAD_USER_OR_PASSWORD => v3::ConnectAckReason::BadUserNameOrPassword,
            reason::NOT_AUTHORIZED => v3::ConnectAckReason::NotAuthorized,
            _ => v3::ConnectAckReason::ServiceUnavailable,
        };
        let v3 = v3::Packet::ConnectAck(v3::ConnectAck {
            return_code: three,
            // 3.1 has no such flag; its byte is reserved.
            session_present: ack.session_present && self.version() != Version::V31,
        });
        let v5 = || {
            v5::Packet::ConnectAck(Box::new(v5::ConnectAck {
                session_present: ack.session_present,
                reason_code: v5::ConnectAckReason::try_from(reason_code)
                    .unwrap_or(v5::ConnectAckReason::UnspecifiedError),
                session_expiry_interval_secs: ack.session_expiry_s,
                receive_max: NonZeroU16::new(ack.receive_maximum).unwrap_or(NonZeroU16::MAX),
                max_packet_size: (reason_code == 0).then_some(ack.packet_bytes_max),
                assigned_client_id: ack.assigned_client_id.clone(),
                topic_alias_max: ack.topic_alias_maximum,
                server_keepalive_sec: ack.server_keep_alive_s,
                reason_string: ack.reason_string.clone().map(ByteString::from),
                ..v5::ConnectAck::default()
            }))
        };
        self.put(out, v3, v5).expect("a CONNACK fits every limit");
    }

    pub fn puback(&self, out: &mut BytesMut, id: u16, reason_code: u8) {
        self.pub_answer(out, 0x40, id, reason_code);
    }

    pub fn pubrec(&self, out: &mut BytesMut, id: u16, reason_code: u8) {
        self.pub_answer(out, 0x50, id, reason_code);
    }

    pub fn pubrel(&self, out: &mut BytesMut, id: u16) {
        self.pub_answer(out, 0x62, id, 0);
    }

    pub fn pubcomp(&self, out: &mut BytesMut, id: u16, reason_code: u8) {
        self.pub_answer(out, 0x70, id, reason_code);
    }

    /// PUBACK, PUBREC, PUBREL and PUBCOMP: four bytes, in MQTT 5 with a fifth where the reason is not success.
    fn pub_answer(&self, out: &mut BytesMut, first: u8, id: u16, reason_code: u8) {
        self.sent.set(self.sent.get() + 1);
        let [high, low] = id.to_be_bytes();
        if reason_code == 0 || !self.version().is_v5() {
            out.extend_from_slice(&[first, 2, high, low]);
        } else {
            out.extend_from_slice(&[first, 3, high, low, reason_code]);
        }
    }

    /// A PUBACK (0x40) or PUBREC (0x50) that refuses, with the reason in words where the client wants and takes them.
    pub fn refusal(&self, out: &mut BytesMut, first: u8, id: u16, reason_code: u8, why: &str) {
        // Below 128 bytes every length takes one byte.
        let remaining = 3 + 1 + 3 + why.len();
        if !self.has_room_for_reason(remaining + 2) || remaining > 127 {
            return self.pub_answer(out, first, id, reason_code);
        }
        self.sent.set(self.sent.get() + 1);
        let [high, low] = id.to_be_bytes();
        let property = (3 + why.len()) as u8;
        out.extend_from_slice(&[
            first,
            remaining as u8,
            high,
            low,
            reason_code,
            property,
            REASON_STRING,
            0,
        ]);
        out.extend_from_slice(&[why.len() as u8]);
        out.extend_from_slice(why.as_bytes());
    }

    fn has_room_for_reason(&self, bytes: usize) -> bool {
        self.wants_reasons && bytes <= self.out_bytes_max as usize
    }

    /// `codes` are granted QoS or MQTT 5 reasons; 3.1.1 knows only 0x80 for all refusals.
    pub fn suback(&mut self, out: &mut BytesMut, id: u16, codes: &[u8], why: Option<String>) {
        let packet_id = NonZeroU16::new(id).expect("a SUBSCRIBE's id is not 0");
        let v3 = v3::Packet::SubscribeAck {
            packet_id,
            status: codes
                .iter()
                .map(|c| match Qos::from_u8(*c) {
                    Some(qos) => v3::SubscribeReturnCode::Success(to_wire(qos)),
                    None => v3::SubscribeReturnCode::Failure,
                })
                .collect(),
        };
        let why = why.filter(|why| self.has_room_for_reason(16 + codes.len() + why.len()));
        let v5 = || {
            v5::Packet::SubscribeAck(v5::SubscribeAck {
                packet_id,
                properties: Vec::new(),
                reason_string: why.map(ByteString::from),
                status: codes
                    .iter()
                    .map(|c| v5::SubscribeAckReason::try_from(*c).unwrap_or(v5::SubscribeAckReason::UnspecifiedError))
                    .collect(),
            })
        };
        self.put(out, v3, v5).expect("a SUBACK is smaller than its SUBSCRIBE");
    }

    pub fn unsuback(&mut self, out: &mut BytesMut, id: u16, codes: &[u8]) {
        let packet_id = NonZeroU16::new(id).expect("an UNSUBSCRIBE's id is not 0");
        let v5 = || {
            v5::Packet::UnsubscribeAck(v5::UnsubscribeAck {
                packet_id,
                properties: Vec::new(),
                reason_string: None,
                status: codes
                    .iter()
                    .map(|c| {
                        v5::UnsubscribeAckReason::try_from(*c).unwrap_or(v5::UnsubscribeAckReason::UnspecifiedError)
                    })
                    .collect(),
            })
        };
        self.put(out, v3::Packet::UnsubscribeAck { packet_id }, v5)
            .expect("an UNSUBACK is smaller than its UNSUBSCRIBE");
    }

    pub fn pingresp(&mut self, out: &mut BytesMut) {
        self.sent.set(self.sent.get() + 1);
        out.extend_from_slice(&[0xd0, 0]);
    }

    /// Only MQTT 5 has a DISCONNECT from the server; before it the connection just closes.
    pub fn disconnect(&mut self, out: &mut BytesMut, reason_code: u8, text: &str) {
        if let Codec::V5(codec) = &mut self.codec {
            self.sent.set(self.sent.get() + 1);
            let packet = |reason_string| {
                v5::Packet::Disconnect(v5::Disconnect {
                    reason_code: v5::DisconnectReasonCode::try_from(reason_code)
                        .unwrap_or(v5::DisconnectReasonCode::UnspecifiedError),
                    session_expiry_interval_secs: None,
                    server_reference: None,
                    reason_string,
                    user_properties: Vec::new(),
                })
            };
            let text = (!text.is_empty()).then(|| ByteString::from(text));
            let start = out.len();
            // A client with a tiny maximum packet size gets it without the words [MQTT-3.14.2-3].
            if codec.encode(packet(text), out).is_err() || out.len() - start > self.out_bytes_max as usize {
                out.truncate(start);
                let _ = codec.encode(packet(None), out);
            }
        }
    }
}

/// An encoded PUBLISH whose packet id is still to be written: the same for every subscriber it fits.
#[derive(Debug, Clone)]
pub struct PublishFrame {
    bytes: BytesMut,
    id_at: usize,
    /// A topic alias that the client does not know before this frame.
    pub sets_alias: Option<u16>,
}

/// How one subscriber gets a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delivery<'a> {
    pub v5: bool,
    pub qos: Qos,
    pub retain: bool,
    pub identifiers: &'a [u32],
    /// Seconds until it expires, counted down.
    pub expiry_s: Option<u32>,
    /// A topic alias, and whether the topic goes along (the first time).
    pub alias: Option<(u16, bool)>,
}

impl PublishFrame {
    pub fn encode(message: &Message, how: &Delivery<'_>) -> PublishFrame {
        let bare = how.alias.is_none() && how.identifiers.is_empty() && how.expiry_s.is_none();
        if bare && (!how.v5 || message.properties.is_none()) {
            return PublishFrame::bare(message, how);
        }
        PublishFrame::by_codec(message, how)
    }

    /// The common form, a PUBLISH without properties: the codec takes three times as long for it.
    fn bare(message: &Message, how: &Delivery<'_>) -> PublishFrame {
        let topic = message.topic.as_str().as_bytes();
        let with_id = how.qos != Qos::AtMostOnce;
        let rest = 2 + topic.len() + 2 * usize::from(with_id) + usize::from(how.v5) + message.payload.len();
        let mut bytes = BytesMut::with_capacity(5 + rest);
        bytes.put_u8(0x30 | (how.qos as u8) << 1 | u8::from(how.retain));
        let mut length = rest;
        while length > 0x7f {
            bytes.put_u8(0x80 | (length & 0x7f) as u8);
            length >>= 7;
        }
        bytes.put_u8(length as u8);
        // A topic is at most 65,535 bytes long (MQTT 5, 1.5.4).
        bytes.put_u16(topic.len() as u16);
        bytes.put_slice(topic);
        let id_at = bytes.len();
        if with_id {
            bytes.put_u16(1);
        }
        if how.v5 {
            bytes.put_u8(0);
        }
        bytes.put_slice(&message.payload);
        PublishFrame {
            bytes,
            id_at,
            sets_alias: None,
        }
    }

    fn by_codec(message: &Message, how: &Delivery<'_>) -> PublishFrame {
        let topic = match how.alias {
            Some((_, false)) => ByteString::new(),
            _ => message.topic.as_byte_string().clone(),
        };
        let properties = how.v5.then(|| to_wire_properties(message.properties.as_deref(), how));
        let id_at_behind_header = 2 + topic.len();
        let publish = rmqtt_codec::types::Publish {
            dup: false,
            retain: how.retain,
            qos: to_wire(how.qos),
            topic,
            packet_id: (how.qos != Qos::AtMostOnce).then_some(NonZeroU16::MIN),
            payload: message.payload.clone(),
            properties,
        };
        let mut bytes = BytesMut::with_capacity(message.size_bytes() + 16);
        let encoded = if how.v5 {
            v5::Codec::default().encode(v5::Packet::Publish(Box::new(publish)), &mut bytes)
        } else {
            v3::Codec::default().encode(v3::Packet::Publish(Box::new(publish)), &mut bytes)
        };
        encoded.expect("a message that came in by a packet fits a packet");
        let (_, header, _) = frame(&bytes).ok().flatten().expect("an encoded frame has a header");
        PublishFrame {
            bytes,
            id_at: header + id_at_behind_header,
            sets_alias: how.alias.filter(|(_, is_new)| *is_new).map(|(alias, _)| alias),
        }
    }

    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Appends the frame. `id` is ignored at QoS 0 (pass 0).
    pub fn write(&self, out: &mut BytesMut, id: u16, dup: bool) {
        let start = out.len();
        out.extend_from_slice(&self.bytes);
        if id != 0 {
            out[start + self.id_at..start + self.id_at + 2].copy_from_slice(&id.to_be_bytes());
        }
        if dup {
            out[start] |= 0b1000;
        }
    }
}

fn to_wire(qos: Qos) -> QoS {
    match qos {
        Qos::AtMostOnce => QoS::AtMostOnce,
        Qos::AtLeastOnce => QoS::AtLeastOnce,
        Qos::ExactlyOnce => QoS::ExactlyOnce,
    }
}

fn from_wire(qos: QoS) -> Qos {
    match qos {
        QoS::AtMostOnce => Qos::AtMostOnce,
        QoS::AtLeastOnce => Qos::AtLeastOnce,
        QoS::ExactlyOnce => Qos::ExactlyOnce,
    }
}

fn to_wire_properties(p: Option<&Properties>, how: &Delivery<'_>) -> v5::PublishProperties {
    let mut out = v5::PublishProperties {
        topic_alias: how.alias.and_then(|(alias, _)| NonZeroU16::new(alias)),
        // 0 cannot be written by the codec and would mean "expired": what is about to expire gets its last second.
        message_expiry_interval: how.expiry_s.map(|s| NonZeroU32::new(s).unwrap_or(NonZeroU32::MIN)),
        subscription_ids: how.identifiers.iter().filter_map(|id| NonZeroU32::new(*id)).collect(),
        ..v5::PublishProperties::default()
    };
    if let Some(p) = p {
        out.correlation_data = p.correlation_data.clone();
        out.content_type = p.content_type.clone();
        out.user_properties = p.user.clone();
        out.is_utf8_payload = p.payload_is_utf8;
        out.response_topic = p.response_topic.clone();
    }
    out
}

/// The version that a CONNECT's variable header begins with.
fn detect(body: &[u8]) -> Result<Codec, WireError> {
    match body {
        [0, 4, b'M', b'Q', b'T', b'T', 4, ..] => Ok(Codec::V3(v3::Codec::default(), Version::V311)),
        [0, 4, b'M', b'Q', b'T', b'T', 5, ..] => Ok(Codec::V5(Box::default())),
        [0, 6, b'M', b'Q', b'I', b's', b'd', b'p', 3, ..] => Ok(Codec::V3(v3::Codec::default(), Version::V31)),
        [0, 4, b'M', b'Q', b'T', b'T', level, ..] | [0, 6, b'M', b'Q', b'I', b's', b'd', b'p', level, ..] => {
            Err(WireError::new(
                reason::UNSUPPORTED_VERSION,
                format!("MQTT protocol level {level} is not supported"),
            ))
        }
        _ => Err(WireError::new(
            reason::MALFORMED,
            "the CONNECT does not begin with a protocol name of MQTT",
        )),
    }
}

/// What the codec does not see, or sees too late.
fn check_frame(first: u8, body: &[u8], version: Version, connecting: bool) -> Result<(), WireError> {
    let malformed = |text: &str| Err(WireError::new(reason::MALFORMED, text));
    match first >> 4 {
        1 if !connecting => Err(WireError::new(reason::PROTOCOL_ERROR, "a second CONNECT")),
        1 if has_unsound_flags(body) => {
            malformed("the CONNECT's flags contradict each other, or a reserved one is set")
        }
        1 if connect_bytes(body).is_some_and(|n| n != body.len()) => malformed("bytes behind the end of the CONNECT"),
        3 if first & 0b0110 == 0 && first & 0b1000 != 0 => malformed("DUP is set at QoS 0"),
        3 if first & 0b0110 == 0b0110 => malformed("QoS 3"),
        8 if !version.is_v5() && !subscribe_bits_are_sound(body) => malformed("reserved bits are set in the SUBSCRIBE"),
        12 if !body.is_empty() => malformed("a PINGREQ has no body"),
        14 if !version.is_v5() && !body.is_empty() => malformed("a DISCONNECT has no body before MQTT 5"),
        _ => Ok(()),
    }
}

/// Where a string that begins at `at` ends.
fn string(at: usize, body: &[u8]) -> Option<usize> {
    let length = usize::from(u16::from_be_bytes([*body.get(at)?, *body.get(at + 1)?]));
    Some(at + 2 + length)
}

/// Where the properties that begin at `at` end.
fn behind_properties(at: usize, body: &[u8]) -> Option<usize> {
    let mut length = 0;
    for i in 0..4 {
        let byte = *body.get(at + i)?;
        length |= usize::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Some(at + i + 1 + length);
        }
    }
    None
}

/// In an MQTT 5 CONNECT with an empty client id: where its flags are.
fn empty_client_id(body: &[u8]) -> Option<usize> {
    let name = string(0, body)?;
    let id = behind_properties(name + 4, body)?;
    (string(id, body)? == id + 2).then_some(name + 1)
}

/// How long a CONNECT is by its own fields; None where they do not fit at all (the codec says so better).
/// The reserved flag, or a QoS or RETAIN of a will that is not there [MQTT-3.1.2-3, -11, -13, -15].
fn has_unsound_flags(body: &[u8]) -> bool {
    let flags = string(0, body)
        .and_then(|name| body.get(name + 1))
        .copied()
        .unwrap_or_default();
    flags & 1 != 0 || flags & 0b100 == 0 && flags & 0b11_1000 != 0
}

/// The codec has no word for a Message Expiry Interval of 0.
fn expire_at_once(packet: &mut Packet) {
    let properties = match packet {
        Packet::Publish(p) => p.properties.as_mut(),
        Packet::Connect(c) => c.will.as_mut().and_then(|w| w.properties.as_mut()),
        _ => None,
    };
    if let Some(properties) = properties {
        properties.expiry_s = Some(0);
    }
}

fn refuse_nul<'a>(texts: impl IntoIterator<Item = &'a ByteString>) -> Result<(), WireError> {
    match texts.into_iter().any(|t| t.as_bytes().contains(&0)) {
        true => Err(WireError::new(reason::MALFORMED, "U+0000 in a text")),
        false => Ok(()),
    }
}

fn connect_bytes(body: &[u8]) -> Option<usize> {
    let name = string(0, body)?;
    let (level, flags) = (*body.get(name)?, *body.get(name + 1)?);
    let mut at = name + 4;
    if level == 5 {
        at = behind_properties(at, body)?;
    }
    at = string(at, body)?;
    if flags & 0b100 != 0 {
        if level == 5 {
            at = behind_properties(at, body)?;
        }
        at = string(string(at, body)?, body)?;
    }
    if flags & 0x80 != 0 {
        at = string(at, body)?;
    }
    if flags & 0x40 != 0 {
        at = string(at, body)?;
    }
    Some(at)
}

fn subscribe_bits_are_sound(body: &[u8]) -> bool {
    let mut rest = body.get(2..).unwrap_or_default();
    while rest.len() >= 2 {
        let length = usize::from(u16::from_be_bytes([rest[0], rest[1]]));
        match rest.get(2 + length) {
            Some(options) if options & 0xfc == 0 => rest = &rest[3 + length..],
            // Too short is the codec's to refuse.
            Some(_) => return false,
            None => return true,
        }
    }
    true
}

fn from_v3(packet: v3::Packet, version: Version) -> Result<Packet, WireError> {
    Ok(match packet {
        v3::Packet::Connect(c) => {
            let v3::Connect {
                clean_session,
                keep_alive,
                last_will,
                client_id,
                username,
                password,
                ..
            } = *c;
            refuse_nul([&client_id].into_iter().chain(&username))?;
            if version == Version::V31 && client_id.is_empty() {
                return Err(WireError::new(
                    reason::CLIENT_ID_NOT_VALID,
                    "MQTT 3.1 needs a client id",
                ));
            }
            if version != Version::V31 && password.is_some() && username.is_none() {
                return Err(WireError::new(reason::PROTOCOL_ERROR, "a password without a user name"));
            }
            Packet::Connect(Box::new(Connect {
                version,
                clean_start: clean_session,
                keep_alive_s: keep_alive,
                client_id,
                username,
                password,
                will: last_will.map(|w| Will {
                    topic: w.topic,
                    payload: w.message,
                    qos: from_wire(w.qos),
                    retain: w.retain,
                    delay_s: 0,
                    properties: None,
                }),
                session_expiry_s: if clean_session { 0 } else { u32::MAX },
                receive_maximum: u16::MAX,
                topic_alias_maximum: 0,
                packet_bytes_max: None,
                request_problem_information: false,
                has_authentication_method: false,
            }))
        }
        v3::Packet::Publish(p) => Packet::Publish(publish(*p, None)),
        v3::Packet::PublishAck { packet_id } => Packet::PubAck {
            id: packet_id.get(),
            reason: 0,
        },
        v3::Packet::PublishReceived { packet_id } => Packet::PubRec {
            id: packet_id.get(),
            reason: 0,
        },
        v3::Packet::PublishRelease { packet_id } => Packet::PubRel { id: packet_id.get() },
        v3::Packet::PublishComplete { packet_id } => Packet::PubComp { id: packet_id.get() },
        v3::Packet::Subscribe {
            packet_id,
            topic_filters,
        } => Packet::Subscribe(Subscribe {
            id: packet_id.get(),
            identifier: None,
            filters: topic_filters
                .into_iter()
                .map(|(filter, qos)| {
                    let qos = from_wire(qos);
                    (
                        filter,
                        SubscribeOptions {
                            qos,
                            no_local: false,
                            retain_as_published: false,
                            retain_handling: 0,
                        },
                    )
                })
                .collect(),
        }),
        v3::Packet::Unsubscribe {
            packet_id,
            topic_filters,
        } => {
            refuse_nul(&topic_filters)?;
            Packet::Unsubscribe {
                id: packet_id.get(),
                filters: topic_filters,
            }
        }
        v3::Packet::PingRequest => Packet::PingReq,
        v3::Packet::Disconnect => Packet::Disconnect {
            reason: 0,
            session_expiry_s: None,
        },
        v3::Packet::ConnectAck(_)
        | v3::Packet::SubscribeAck { .. }
        | v3::Packet::UnsubscribeAck { .. }
        | v3::Packet::PingResponse => return Err(server_packet()),
    })
}

fn from_v5(packet: v5::Packet) -> Result<Packet, WireError> {
    Ok(match packet {
        v5::Packet::Connect(c) => {
            let c = *c;
            refuse_nul([&c.client_id].into_iter().chain(&c.username))?;
            Packet::Connect(Box::new(Connect {
                version: Version::V5,
                clean_start: c.clean_start,
                keep_alive_s: c.keep_alive,
                client_id: c.client_id,
                username: c.username,
                password: c.password,
                will: c.last_will.map(|w| Will {
                    topic: w.topic,
                    payload: w.message,
                    qos: from_wire(w.qos),
                    retain: w.retain,
                    delay_s: w.will_delay_interval_sec.unwrap_or(0),
                    properties: boxed(Properties {
                        user: w.user_properties,
                        content_type: w.content_type,
                        payload_is_utf8: w.is_utf8_payload.unwrap_or(false),
                        response_topic: w.response_topic,
                        correlation_data: w.correlation_data,
                        expiry_s: w.message_expiry_interval.map(NonZeroU32::get),
                    }),
                }),
                session_expiry_s: c.session_expiry_interval_secs,
                receive_maximum: c.receive_max.map_or(u16::MAX, NonZeroU16::get),
                topic_alias_maximum: c.topic_alias_max,
                packet_bytes_max: c.max_packet_size.map(NonZeroU32::get),
                request_problem_information: c.request_problem_info,
                has_authentication_method: c.auth_method.is_some(),
            }))
        }
        v5::Packet::Publish(mut p) => {
            let properties = p.properties.take();
            if properties.as_ref().is_some_and(|p| !p.subscription_ids.is_empty()) {
                return Err(WireError::new(
                    reason::PROTOCOL_ERROR,
                    "a client's PUBLISH carries a subscription identifier",
                ));
            }
            Packet::Publish(publish(*p, properties))
        }
        v5::Packet::PublishAck(a) => Packet::PubAck {
            id: a.packet_id.get(),
            reason: a.reason_code.into(),
        },
        v5::Packet::PublishReceived(a) => Packet::PubRec {
            id: a.packet_id.get(),
            reason: a.reason_code.into(),
        },
        v5::Packet::PublishRelease(a) => Packet::PubRel { id: a.packet_id.get() },
        v5::Packet::PublishComplete(a) => Packet::PubComp { id: a.packet_id.get() },
        v5::Packet::Subscribe(s) => Packet::Subscribe(Subscribe {
            id: s.packet_id.get(),
            identifier: s.id.map(NonZeroU32::get),
            filters: s
                .topic_filters
                .into_iter()
                .map(|(filter, o)| {
                    let options = SubscribeOptions {
                        qos: from_wire(o.qos),
                        no_local: o.no_local,
                        retain_as_published: o.retain_as_published,
                        retain_handling: o.retain_handling.into(),
                    };
                    (filter, options)
                })
                .collect(),
        }),
        v5::Packet::Unsubscribe(u) => {
            refuse_nul(&u.topic_filters)?;
            Packet::Unsubscribe {
                id: u.packet_id.get(),
                filters: u.topic_filters,
            }
        }
        v5::Packet::PingRequest => Packet::PingReq,
        v5::Packet::Disconnect(d) => Packet::Disconnect {
            reason: d.reason_code.into(),
            session_expiry_s: d.session_expiry_interval_secs,
        },
        v5::Packet::Auth(_) => Packet::Auth,
        v5::Packet::ConnectAck(_)
        | v5::Packet::SubscribeAck(_)
        | v5::Packet::UnsubscribeAck(_)
        | v5::Packet::PingResponse => {
            return Err(server_packet());
        }
    })
}

fn server_packet() -> WireError {
    WireError::new(reason::PROTOCOL_ERROR, "a packet that only a server may send")
}

fn publish(p: rmqtt_codec::types::Publish, properties: Option<v5::PublishProperties>) -> Publish {
    let alias = properties
        .as_ref()
        .and_then(|p| p.topic_alias)
        .map_or(0, NonZeroU16::get);
    Publish {
        topic: p.topic,
        alias,
        payload: p.payload,
        qos: from_wire(p.qos),
        retain: p.retain,
        dup: p.dup,
        id: p.packet_id.map_or(0, NonZeroU16::get),
        properties: properties.and_then(|p| {
            boxed(Properties {
                user: p.user_properties,
                content_type: p.content_type,
                payload_is_utf8: p.is_utf8_payload,
                response_topic: p.response_topic,
                correlation_data: p.correlation_data,
                expiry_s: p.message_expiry_interval.map(NonZeroU32::get),
            })
        }),
    }
}

fn boxed(p: Properties) -> Option<Box<Properties>> {
    (p != Properties::default()).then(|| Box::new(p))
}

/// Keeps unread bytes of a frame without the memory of the read buffer.
pub fn keep_rest(buf: &mut BytesMut, rest: &mut Vec<u8>) {
    rest.clear();
    rest.extend_from_slice(buf);
    buf.advance(buf.len());
    if rest.is_empty() && rest.capacity() > 0 {
        *rest = Vec::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::message::{Sequence, Topic};

    #[test]
    fn a_publish_written_by_hand_is_the_codecs_byte_for_byte() {
        for payload in [
            0, 1, 117, 118, 119, 120, 16_373, 16_374, 16_375, 16_376, 2_097_141, 2_097_145,
        ] {
            for qos in [Qos::AtMostOnce, Qos::AtLeastOnce, Qos::ExactlyOnce] {
                for (v5, retain) in [(false, false), (false, true), (true, false), (true, true)] {
                    let message = Message {
                        topic: Topic::new("a/é/c".to_owned()).expect("valid"),
                        payload: vec![7; payload].into(),
                        qos,
                        retain,
                        properties: None,
                        source: "client:x".into(),
                        sequence: Sequence(0),
                        received: Timestamp::from_millis(0),
                    };
                    let how = Delivery {
                        v5,
                        qos,
                        retain,
                        identifiers: &[],
                        expiry_s: None,
                        alias: None,
                    };
                    let bare = PublishFrame::encode(&message, &how);
                    let by_codec = PublishFrame::by_codec(&message, &how);
                    assert!(bare.bytes == by_codec.bytes, "{payload} {qos:?} {v5} {retain}");
                    assert_eq!(bare.id_at, by_codec.id_at);
                }
            }
        }
    }
}
