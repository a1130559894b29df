//! The one type that travels: a message, with the topic, filter and quality of service it goes by.
//!
//! Whatever enters the gateway (an MQTT PUBLISH, a connector's reading, a module's answer, a command
//! from a cloud) becomes a [`Message`] at the edge and stays one until it leaves. A [`Topic`] or
//! [`TopicFilter`] that exists is valid by MQTT 5 section 4.7; nothing behind the edge checks again.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use bytestring::ByteString;

use crate::clock::Timestamp;

/// A topic or a filter is a UTF-8 string of at most this many bytes (MQTT 5, 1.5.4).
pub const TOPIC_BYTES_MAX: usize = 65_535;
/// More levels than this serve no purpose but to make matching slow; such topics are refused.
pub const TOPIC_LEVELS_MAX: usize = 200;

/// Why a string is no topic or no filter. The text completes "topic is not valid: …".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    #[error("it is empty")]
    Empty,
    #[error("it is longer than 65,535 bytes")]
    TooLong,
    #[error("it has more than 200 levels")]
    TooManyLevels,
    #[error("it contains the character U+0000")]
    Nul,
    #[error("a topic to publish to must not contain + or #")]
    Wildcard,
    #[error("# must be the last level and stand alone in it")]
    MisplacedHash,
    #[error("+ must stand alone in its level")]
    MisplacedPlus,
    #[error("a shared subscription is $share/NAME/FILTER, its name without +, # and /")]
    BadShare,
}

fn check_common(text: &str) -> Result<(), TopicError> {
    if text.is_empty() {
        return Err(TopicError::Empty);
    }
    if text.len() > TOPIC_BYTES_MAX {
        return Err(TopicError::TooLong);
    }
    let mut slashes = 0;
    for byte in text.bytes() {
        match byte {
            0 => return Err(TopicError::Nul),
            b'/' => slashes += 1,
            _ => {}
        }
    }
    if slashes >= TOPIC_LEVELS_MAX {
        return Err(TopicError::TooManyLevels);
    }
    Ok(())
}

/// A topic name: no wildcards, no NUL, 1 to 65,535 bytes.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Topic(ByteString);

impl Topic {
    pub fn new(text: impl Into<ByteString>) -> Result<Topic, TopicError> {
        let text = text.into();
        check_common(&text)?;
        if text.bytes().any(|b| b == b'+' || b == b'#') {
            return Err(TopicError::Wildcard);
        }
        Ok(Topic(text))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn as_byte_string(&self) -> &ByteString {
        &self.0
    }

    pub fn levels(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }

    /// A topic of its own memory, so that it does not keep a whole read buffer alive.
    pub fn detach(&self) -> Topic {
        Topic(ByteString::from(self.as_str()))
    }
}

impl std::borrow::Borrow<str> for Topic {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

impl fmt::Display for Topic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A topic filter: a topic in which a level may be `+` and the last one `#`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TopicFilter(ByteString);

impl TopicFilter {
    pub fn new(text: impl Into<ByteString>) -> Result<TopicFilter, TopicError> {
        let text = text.into();
        check_common(&text)?;
        let mut levels = text.split('/').peekable();
        while let Some(level) = levels.next() {
            if level.contains('#') && (level != "#" || levels.peek().is_some()) {
                return Err(TopicError::MisplacedHash);
            }
            if level.contains('+') && level != "+" {
                return Err(TopicError::MisplacedPlus);
            }
        }
        Ok(TopicFilter(text))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub fn levels(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }

    pub fn has_wildcard(&self) -> bool {
        self.0.bytes().any(|b| b == b'+' || b == b'#')
    }

    /// MQTT 5, 4.7: `#` also matches its parent; neither wildcard at the first level matches a topic that begins with `$`.
    pub fn matches(&self, topic: &str) -> bool {
        if topic.starts_with('$') && (self.0.starts_with('+') || self.0.starts_with('#')) {
            return false;
        }
        let mut filter = self.0.split('/');
        let mut topic = topic.split('/');
        loop {
            match (filter.next(), topic.next()) {
                (Some("#"), _) => return true,
                (Some("+"), Some(_)) => {}
                (Some(f), Some(t)) if f == t => {}
                (None, None) => return true,
                (Some(_), Some(_)) | (Some(_), None) | (None, Some(_)) => return false,
            }
        }
    }

    /// True where every topic that `other` can match is matched by this filter too.
    pub fn covers(&self, other: &TopicFilter) -> bool {
        let hides_dollar = |f: &TopicFilter| f.0.starts_with('+') || f.0.starts_with('#');
        if other.0.starts_with('$') && hides_dollar(self) {
            return false;
        }
        let mut mine = self.0.split('/');
        let mut theirs = other.0.split('/');
        loop {
            match (mine.next(), theirs.next()) {
                (Some("#"), _) => return true,
                (_, Some("#")) => return false,
                (Some("+"), Some(_)) => {}
                (Some(a), Some(b)) if a == b => {}
                (None, None) => return true,
                (Some(_), Some(_)) | (Some(_), None) | (None, Some(_)) => return false,
            }
        }
    }
}

impl TopicFilter {
    /// True where some topic is matched by both.
    pub fn overlaps(&self, other: &TopicFilter) -> bool {
        let wild = |f: &TopicFilter| f.0.starts_with('+') || f.0.starts_with('#');
        if wild(self) && other.0.starts_with('$') || self.0.starts_with('$') && wild(other) {
            return false;
        }
        let (mut mine, mut theirs) = (self.levels(), other.levels());
        loop {
            match (mine.next(), theirs.next()) {
                (Some("#"), _) | (_, Some("#")) => return true,
                (Some("+"), Some(_)) | (Some(_), Some("+")) => {}
                (Some(x), Some(y)) if x == y => {}
                (None, None) => return true,
                (Some(_), Some(_)) | (Some(_), None) | (None, Some(_)) => return false,
            }
        }
    }
}

impl fmt::Debug for TopicFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.as_str())
    }
}

impl fmt::Display for TopicFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// MQTT quality of service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Qos {
    AtMostOnce = 0,
    AtLeastOnce = 1,
    ExactlyOnce = 2,
}

impl Qos {
    pub fn from_u8(value: u8) -> Option<Qos> {
        match value {
            0 => Some(Qos::AtMostOnce),
            1 => Some(Qos::AtLeastOnce),
            2 => Some(Qos::ExactlyOnce),
            _ => None,
        }
    }
}

/// The place of a message in the log: unique, rising, never reused, kept over restarts. 0: not logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Sequence(pub u64);

impl fmt::Display for Sequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Who handed a message in: `client:ID`, `module:NAME`, `connector:NAME`, `uplink:NAME` or `gateway`.
pub type Source = Arc<str>;

/// The MQTT 5 properties that travel with a message from publisher to consumer (MQTT 5, 3.3.2.3).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Properties {
    pub user: Vec<(ByteString, ByteString)>,
    pub content_type: Option<ByteString>,
    /// Payload format indicator 1: the payload is UTF-8 text.
    pub payload_is_utf8: bool,
    pub response_topic: Option<ByteString>,
    pub correlation_data: Option<Bytes>,
    /// Message expiry interval in seconds, counted from [`Message::received`].
    pub expiry_s: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub topic: Topic,
    pub payload: Bytes,
    pub qos: Qos,
    pub retain: bool,
    /// None where no property is set: the common case costs one word.
    pub properties: Option<Box<Properties>>,
    pub source: Source,
    pub sequence: Sequence,
    /// Wall time at which the gateway took the message.
    pub received: Timestamp,
}

impl Message {
    /// A QoS 1 message without properties, as connectors and modules make them.
    pub fn new(topic: Topic, payload: impl Into<Bytes>, source: Source, received: Timestamp) -> Message {
        Message {
            topic,
            payload: payload.into(),
            qos: Qos::AtLeastOnce,
            retain: false,
            properties: None,
            source,
            sequence: Sequence(0),
            received,
        }
    }

    /// Seconds until the message expires; None: never; Some(0): it has expired.
    pub fn expires_in_s(&self, now: Timestamp) -> Option<u32> {
        let expiry_s = self.properties.as_ref()?.expiry_s?;
        // A clock that was set back must not prolong a message's life, nor one set forward by years end it unnoticed:
        // the age counted is never negative.
        let age_s = now.millis_since(self.received).max(0) / 1000;
        Some(u32::try_from(i64::from(expiry_s) - age_s).unwrap_or(0))
    }

    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.expires_in_s(now) == Some(0)
    }

    /// Bytes this message counts for in limits and totals: topic, payload and the properties' content.
    pub fn size_bytes(&self) -> usize {
        let properties = self.properties.as_ref().map_or(0, |p| {
            p.user.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>()
                + p.content_type.as_ref().map_or(0, |s| s.len())
                + p.response_topic.as_ref().map_or(0, |s| s.len())
                + p.correlation_data.as_ref().map_or(0, |b| b.len())
        });
        self.topic.as_str().len() + self.payload.len() + properties
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(text: &str) -> TopicFilter {
        TopicFilter::new(text.to_owned()).expect(text)
    }

    #[test]
    fn topics_refuse_wildcards_nul_and_length() {
        let topic = |t: &str| Topic::new(t.to_owned()).map(|_| ());
        assert_eq!(topic("a/b"), Ok(()));
        assert_eq!(topic("/"), Ok(()));
        assert_eq!(topic(" "), Ok(()));
        assert_eq!(topic(""), Err(TopicError::Empty));
        assert_eq!(topic("a/+"), Err(TopicError::Wildcard));
        assert_eq!(topic("a/b#"), Err(TopicError::Wildcard));
        assert_eq!(topic("a\0"), Err(TopicError::Nul));
        assert_eq!(topic(&"x".repeat(65_535)), Ok(()));
        assert_eq!(topic(&"x".repeat(65_536)), Err(TopicError::TooLong));
        assert_eq!(topic(&"/".repeat(199)), Ok(()));
        assert_eq!(topic(&"/".repeat(200)), Err(TopicError::TooManyLevels));
    }

    #[test]
    fn filters_place_their_wildcards() {
        let parse = |t: &str| TopicFilter::new(t.to_owned()).map(|_| ());
        for good in ["#", "+", "a/#", "+/b/#", "/", "a//b", "+/+"] {
            assert_eq!(parse(good), Ok(()), "{good}");
        }
        assert_eq!(parse("a/#/b"), Err(TopicError::MisplacedHash));
        assert_eq!(parse("a#"), Err(TopicError::MisplacedHash));
        assert_eq!(parse("a+/b"), Err(TopicError::MisplacedPlus));
    }

    #[test]
    fn filters_match_by_section_4_7() {
        let table = [
            ("#", "a/b", true),
            ("a/#", "a", true),
            ("a/#", "ab", false),
            ("a/+", "a", false),
            ("a/+", "a/", true),
            ("+/+", "/", true),
            ("/+", "/finance", true),
            ("+", "/finance", false),
            ("#", "$SYS/x", false),
            ("+/x", "$SYS/x", false),
            ("$SYS/#", "$SYS/x", true),
            ("a//b", "a//b", true),
            ("a/b", "a/b/c", false),
        ];
        for (f, t, expected) in table {
            assert_eq!(filter(f).matches(t), expected, "{f} against {t}");
        }
    }

    #[test]
    fn covers_is_containment() {
        let table = [
            ("#", "a/b", true),
            ("#", "#", true),
            ("a/#", "a/+/c", true),
            ("a/+", "a/#", false),
            ("a/+", "a/b", true),
            ("a/#", "a", true),
            ("#", "$SYS/#", false),
            ("+", "#", false),
            ("a/b", "a/+", false),
        ];
        for (f, g, expected) in table {
            assert_eq!(filter(f).covers(&filter(g)), expected, "{f} covers {g}");
        }
    }

    #[test]
    fn overlap_is_a_common_topic() {
        let table = [
            ("a/#", "+/b", true),
            ("a/+", "+/b", true),
            ("a/#", "a", true),
            ("a/b", "a/c", false),
            ("a", "a/+", false),
            ("#", "$SYS/x", false),
            ("$SYS/#", "$SYS/+", true),
        ];
        for (f, g, expected) in table {
            assert_eq!(filter(f).overlaps(&filter(g)), expected, "{f} and {g}");
            assert_eq!(filter(g).overlaps(&filter(f)), expected, "{g} and {f}");
        }
    }

    #[test]
    fn expiry_counts_down_and_ignores_a_clock_set_back() {
        let topic = Topic::new("t").expect("valid");
        let mut message = Message::new(topic, "x", "gateway".into(), Timestamp::from_millis(1_000_000));
        assert_eq!(message.expires_in_s(Timestamp::from_millis(9_000_000)), None);
        message.properties = Some(Box::new(Properties {
            expiry_s: Some(120),
            ..Properties::default()
        }));
        assert_eq!(message.expires_in_s(Timestamp::from_millis(1_030_000)), Some(90));
        assert_eq!(message.expires_in_s(Timestamp::from_millis(900_000)), Some(120));
        assert!(message.is_expired(Timestamp::from_millis(1_120_000)));
    }
}
