//! A message as bytes: the record of a segment, of a retained message, of a dead letter. Pure.
//!
//! Layout, all integers LEB128: flags, sequence − previous, zigzag(received − previous), source (left out where it is
//! the previous record's), topic, properties (where flagged), payload. Strings and bytes carry their length first.
//! A lone record is one whose "previous" is zero and whose source is written.

use bytes::Bytes;
use bytestring::ByteString;

use crate::clock::Timestamp;
use crate::message::{Message, Properties, Qos, Sequence, Source, Topic};

const QOS_MASK: u8 = 0b0000_0011;
const RETAIN: u8 = 0b0000_0100;
const SAME_SOURCE: u8 = 0b0000_1000;
const PROPERTIES: u8 = 0b0001_0000;

const HAS_CONTENT_TYPE: u8 = 0b0000_0001;
const UTF8_PAYLOAD: u8 = 0b0000_0010;
const HAS_RESPONSE_TOPIC: u8 = 0b0000_0100;
const HAS_CORRELATION: u8 = 0b0000_1000;
const HAS_EXPIRY: u8 = 0b0001_0000;

/// A message whose parts are still borrowed from a read buffer: what the log copies from.
#[derive(Debug, Clone, Copy)]
pub struct MessageRef<'a> {
    pub topic: &'a str,
    pub payload: &'a [u8],
    pub qos: Qos,
    pub retain: bool,
    pub properties: Option<&'a Properties>,
    pub source: &'a Source,
    pub received: Timestamp,
}

impl<'a> From<&'a Message> for MessageRef<'a> {
    fn from(m: &'a Message) -> Self {
        MessageRef {
            topic: m.topic.as_str(),
            payload: &m.payload,
            qos: m.qos,
            retain: m.retain,
            properties: m.properties.as_deref(),
            source: &m.source,
            received: m.received,
        }
    }
}

/// What the next record is written, or read, against.
#[derive(Debug, Clone, Default)]
pub struct Previous {
    pub sequence: u64,
    pub received: i64,
    pub source: Option<Source>,
}

/// The stored bytes are not what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a stored record is damaged")]
pub struct Damaged;

pub fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push((value as u8) | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn zigzag(value: i64) -> u64 {
    ((value << 1) ^ (value >> 63)) as u64
}

fn unzigzag(value: u64) -> i64 {
    ((value >> 1) as i64) ^ -((value & 1) as i64)
}

pub fn encode(out: &mut Vec<u8>, previous: &mut Previous, sequence: Sequence, message: &MessageRef<'_>) {
    let same_source = previous
        .source
        .as_ref()
        .is_some_and(|s| std::sync::Arc::ptr_eq(s, message.source) || s == message.source);
    let mut flags = message.qos as u8;
    if message.retain {
        flags |= RETAIN;
    }
    if same_source {
        flags |= SAME_SOURCE;
    }
    if message.properties.is_some() {
        flags |= PROPERTIES;
    }
    out.push(flags);
    put_varint(out, sequence.0 - previous.sequence);
    put_varint(out, zigzag(message.received.millis().wrapping_sub(previous.received)));
    if !same_source {
        put_bytes(out, message.source.as_bytes());
        previous.source = Some(message.source.clone());
    }
    put_bytes(out, message.topic.as_bytes());
    if let Some(properties) = message.properties {
        encode_properties(out, properties);
    }
    put_bytes(out, message.payload);
    previous.sequence = sequence.0;
    previous.received = message.received.millis();
}

fn encode_properties(out: &mut Vec<u8>, p: &Properties) {
    let mut flags = 0;
    if p.content_type.is_some() {
        flags |= HAS_CONTENT_TYPE;
    }
    if p.payload_is_utf8 {
        flags |= UTF8_PAYLOAD;
    }
    if p.response_topic.is_some() {
        flags |= HAS_RESPONSE_TOPIC;
    }
    if p.correlation_data.is_some() {
        flags |= HAS_CORRELATION;
    }
    if p.expiry_s.is_some() {
        flags |= HAS_EXPIRY;
    }
    out.push(flags);
    if let Some(text) = &p.content_type {
        put_bytes(out, text.as_bytes());
    }
    if let Some(text) = &p.response_topic {
        put_bytes(out, text.as_bytes());
    }
    if let Some(bytes) = &p.correlation_data {
        put_bytes(out, bytes);
    }
    if let Some(seconds) = p.expiry_s {
        put_varint(out, u64::from(seconds));
    }
    put_varint(out, p.user.len() as u64);
    for (key, value) in &p.user {
        put_bytes(out, key.as_bytes());
        put_bytes(out, value.as_bytes());
    }
}

/// Reads records one after another out of one buffer, without copying: topics and payloads are slices of it.
pub struct Reader {
    bytes: Bytes,
    at: usize,
    previous: Previous,
}

impl Reader {
    pub fn new(bytes: Bytes) -> Reader {
        Reader {
            bytes,
            at: 0,
            previous: Previous::default(),
        }
    }

    /// None at the end.
    pub fn read(&mut self) -> Result<Option<Message>, Damaged> {
        if self.at == self.bytes.len() {
            return Ok(None);
        }
        let flags = self.byte()?;
        let qos = Qos::from_u8(flags & QOS_MASK).ok_or(Damaged)?;
        let sequence = self.previous.sequence.checked_add(self.varint()?).ok_or(Damaged)?;
        let received = self.previous.received.wrapping_add(unzigzag(self.varint()?));
        let source = if flags & SAME_SOURCE != 0 {
            self.previous.source.clone().ok_or(Damaged)?
        } else {
            let text = self.string()?;
            let source: Source = (&*text).into();
            self.previous.source = Some(source.clone());
            source
        };
        let topic = Topic::new(self.string()?).map_err(|_| Damaged)?;
        let properties = if flags & PROPERTIES != 0 {
            Some(Box::new(self.properties()?))
        } else {
            None
        };
        let payload = self.slice()?;
        self.previous.sequence = sequence;
        self.previous.received = received;
        Ok(Some(Message {
            topic,
            payload,
            qos,
            retain: flags & RETAIN != 0,
            properties,
            source,
            sequence: Sequence(sequence),
            received: Timestamp::from_millis(received),
        }))
    }

    fn properties(&mut self) -> Result<Properties, Damaged> {
        let flags = self.byte()?;
        let content_type = if flags & HAS_CONTENT_TYPE != 0 {
            Some(self.string()?)
        } else {
            None
        };
        let response_topic = if flags & HAS_RESPONSE_TOPIC != 0 {
            Some(self.string()?)
        } else {
            None
        };
        let correlation_data = if flags & HAS_CORRELATION != 0 {
            Some(self.slice()?)
        } else {
            None
        };
        let expiry_s = if flags & HAS_EXPIRY != 0 {
            Some(u32::try_from(self.varint()?).map_err(|_| Damaged)?)
        } else {
            None
        };
        let count = self.varint()?;
        let mut user = Vec::new();
        for _ in 0..count {
            user.push((self.string()?, self.string()?));
        }
        Ok(Properties {
            user,
            content_type,
            payload_is_utf8: flags & UTF8_PAYLOAD != 0,
            response_topic,
            correlation_data,
            expiry_s,
        })
    }

    fn byte(&mut self) -> Result<u8, Damaged> {
        let byte = *self.bytes.get(self.at).ok_or(Damaged)?;
        self.at += 1;
        Ok(byte)
    }

    fn varint(&mut self) -> Result<u64, Damaged> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(Damaged)
    }

    fn slice(&mut self) -> Result<Bytes, Damaged> {
        let length = usize::try_from(self.varint()?).map_err(|_| Damaged)?;
        let end = self
            .at
            .checked_add(length)
            .filter(|end| *end <= self.bytes.len())
            .ok_or(Damaged)?;
        let slice = self.bytes.slice(self.at..end);
        self.at = end;
        Ok(slice)
    }

    fn string(&mut self) -> Result<ByteString, Damaged> {
        ByteString::try_from(self.slice()?).map_err(|_| Damaged)
    }
}

/// One message by itself.
pub fn encode_one(message: &Message) -> Vec<u8> {
    let mut out = Vec::with_capacity(message.size_bytes() + 32);
    encode(
        &mut out,
        &mut Previous::default(),
        message.sequence,
        &MessageRef::from(message),
    );
    out
}

pub fn decode_one(bytes: impl Into<Bytes>) -> Result<Message, Damaged> {
    Reader::new(bytes.into()).read()?.ok_or(Damaged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(topic: &str, source: &str, received: i64) -> Message {
        Message::new(
            Topic::new(topic.to_owned()).expect("valid"),
            topic.to_uppercase(),
            source.into(),
            Timestamp::from_millis(received),
        )
    }

    #[test]
    fn what_is_written_is_read_back() {
        let mut messages = vec![
            message("a/b", "client:x", 1_000),
            message("a/b", "client:x", 900),
            message("c", "module:y", -5),
        ];
        messages[1].retain = true;
        messages[1].qos = Qos::ExactlyOnce;
        messages[2].properties = Some(Box::new(Properties {
            user: vec![("k".into(), "v".into()), ("k".into(), "".into())],
            content_type: Some("application/json".into()),
            payload_is_utf8: true,
            response_topic: Some("answers".into()),
            correlation_data: Some(Bytes::from_static(b"\0\xff")),
            expiry_s: Some(u32::MAX),
        }));
        let mut out = Vec::new();
        let mut previous = Previous::default();
        for (i, m) in messages.iter_mut().enumerate() {
            m.sequence = Sequence(1_000_000 + 7 * i as u64);
            encode(&mut out, &mut previous, m.sequence, &MessageRef::from(&*m));
        }
        let mut reader = Reader::new(out.into());
        for m in &messages {
            assert_eq!(reader.read().expect("sound").as_ref(), Some(m));
        }
        assert_eq!(reader.read(), Ok(None));
    }

    #[test]
    fn no_damage_panics_or_passes_the_end() {
        let mut m = message("some/topic", "client:abc", 1_700_000_000_000);
        m.properties = Some(Box::new(Properties {
            user: vec![("a".into(), "b".into())],
            ..Properties::default()
        }));
        let good = encode_one(&m);
        for cut in 0..good.len() {
            let mut reader = Reader::new(Bytes::copy_from_slice(&good[..cut]));
            assert!(matches!(reader.read(), Ok(None) | Err(Damaged)));
        }
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                let mut reader = Reader::new(bad.into());
                while let Ok(Some(_)) = reader.read() {}
            }
        }
    }
}
