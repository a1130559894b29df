//! The message a connector publishes for a poll group: every point with its value, time, quality and, where it is not
//! good, why. Pure.
//!
//! ```json
//! {"temperature":{"value":81.3,"ts":"2026-11-24T23:40:03.120Z","q":"good"},
//!  "door":{"value":null,"ts":"2026-11-24T23:40:03.120Z","q":"bad","why":"timeout since 2026-11-24T23:39:58.001Z"},
//!  "level":{"value":null,"ts":"…","q":"stale","why":"…","last":4.2}}
//! ```
//! `value` is null unless the quality is good or uncertain; integers beyond 2^53 are texts, since JSON readers round them.

use bytestring::ByteString;

use super::driver::Raw;
use crate::clock::Timestamp;
use crate::config::Payload;
use crate::message::{Message, Properties, Source, Topic};

/// User property `schema`: the shape of the payload, with a number that goes up when it changes.
pub const SCHEMA: &str = "tidegate/values/1";
/// … and of `payload = "aio"`.
pub const SCHEMA_AIO: &str = "azure-iot-operations/values/1";
/// The largest integer up to which every one is a JSON number that every reader holds exactly.
const JSON_INTEGER_MAX: u64 = 1 << 53;

/// OPC UA Part 4, 7.39, as far as a gateway can know it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quality {
    Good,
    /// There is a value, but it is doubted.
    Uncertain,
    /// There is none.
    Bad,
    /// None has come for so long that the last one is not current any more.
    Stale,
}

impl Quality {
    pub fn name(self) -> &'static str {
        match self {
            Quality::Good => "good",
            Quality::Uncertain => "uncertain",
            Quality::Bad => "bad",
            Quality::Stale => "stale",
        }
    }
}

/// What is known of a point at a time.
#[derive(Debug, Clone, PartialEq)]
pub struct Reading {
    /// Some where the quality is good or uncertain; where it is stale the last one.
    pub value: Option<Raw>,
    pub quality: Quality,
    /// Empty where it is good.
    pub why: String,
    pub at: Timestamp,
}

/// Writes the payload of one message after the other.
#[derive(Debug)]
pub(super) struct Writer {
    payload: Payload,
    /// As long as the last one was.
    expected_bytes: usize,
    /// The points of one read have one time: its text is made once.
    time: (Timestamp, String),
}

impl Writer {
    pub fn new(payload: Payload) -> Writer {
        let epoch = Timestamp::default();
        Writer {
            payload,
            expected_bytes: 0,
            time: (epoch, epoch.to_string()),
        }
    }

    /// `points`: name, whether its numbers have 32 bits, what is known.
    pub fn write<'a>(&mut self, points: impl Iterator<Item = (&'a str, bool, &'a Reading)>) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.expected_bytes);
        out.push(b'{');
        for (nth, (name, narrow, reading)) in points.enumerate() {
            if nth > 0 {
                out.push(b',');
            }
            string(&mut out, name);
            out.push(b':');
            if self.time.0 != reading.at {
                self.time = (reading.at, reading.at.to_string());
            }
            match self.payload {
                Payload::Values => write_point(&mut out, narrow, reading, &self.time.1),
                Payload::Aio => write_aio(&mut out, narrow, reading, &self.time.1),
            }
        }
        out.push(b'}');
        // The numbers of the next one may have a digit more.
        self.expected_bytes = out.len() + out.len() / 32 + 16;
        out
    }
}

fn write_point(out: &mut Vec<u8>, narrow: bool, reading: &Reading, time: &str) {
    let is_current = matches!(reading.quality, Quality::Good | Quality::Uncertain);
    out.extend_from_slice(b"{\"value\":");
    match &reading.value {
        Some(value) if is_current => write_value(out, narrow, value),
        _ => out.extend_from_slice(b"null"),
    }
    out.extend_from_slice(b",\"ts\":\"");
    out.extend_from_slice(time.as_bytes());
    out.extend_from_slice(b"\",\"q\":\"");
    out.extend_from_slice(reading.quality.name().as_bytes());
    out.push(b'"');
    if !reading.why.is_empty() {
        out.extend_from_slice(b",\"why\":");
        string(out, &reading.why);
    }
    if let (Some(last), Quality::Stale) = (&reading.value, reading.quality) {
        out.extend_from_slice(b",\"last\":");
        write_value(out, narrow, last);
    }
    out.push(b'}');
}

/// `{"SourceTimestamp":"…","Value":21.5}`; a `StatusCode` says what is not good (OPC UA Part 6, 5.4.2.11).
fn write_aio(out: &mut Vec<u8>, narrow: bool, reading: &Reading, time: &str) {
    out.extend_from_slice(b"{\"SourceTimestamp\":\"");
    out.extend_from_slice(time.as_bytes());
    out.extend_from_slice(b"\",\"Value\":");
    let is_current = matches!(reading.quality, Quality::Good | Quality::Uncertain);
    match &reading.value {
        Some(value) if is_current => write_value(out, narrow, value),
        _ => out.extend_from_slice(b"null"),
    }
    let status: &[u8] = match reading.quality {
        Quality::Good => b"",
        Quality::Uncertain => b",\"StatusCode\":{\"Code\":1073741824,\"Symbol\":\"Uncertain\"}",
        Quality::Bad => b",\"StatusCode\":{\"Code\":2147483648,\"Symbol\":\"Bad\"}",
        Quality::Stale => b",\"StatusCode\":{\"Code\":2150694912,\"Symbol\":\"BadNoCommunication\"}",
    };
    out.extend_from_slice(status);
    out.push(b'}');
}

pub(super) fn write_value(out: &mut Vec<u8>, narrow: bool, value: &Raw) {
    match value {
        Raw::Bool(flag) => out.extend_from_slice(if *flag { b"true" } else { b"false" }),
        Raw::Int(n) if n.unsigned_abs() <= JSON_INTEGER_MAX => json(out, n),
        Raw::Int(n) => json(out, &n.to_string()),
        Raw::Uint(n) if *n <= JSON_INTEGER_MAX => json(out, n),
        Raw::Uint(n) => json(out, &n.to_string()),
        Raw::Float(number) if narrow => json(out, &(*number as f32)),
        Raw::Float(number) => json(out, number),
        Raw::Text(text) => string(out, text),
    }
}

fn string(out: &mut Vec<u8>, text: &str) {
    json(out, text);
}

fn json<T: serde::Serialize + ?Sized>(out: &mut Vec<u8>, value: &T) {
    serde_json::to_writer(out, value).expect("numbers and texts are written to memory");
}

/// A QoS 1 message; `sequence` counts the asset's messages since the connector started.
pub fn message(
    topic: Topic,
    asset: &str,
    payload: Vec<u8>,
    shape: Payload,
    sequence: u64,
    source: Source,
    now: Timestamp,
) -> Message {
    let mut message = Message::new(topic, payload, source, now);
    let schema = match shape {
        Payload::Values => SCHEMA,
        Payload::Aio => SCHEMA_AIO,
    };
    let user = [
        ("seq", sequence.to_string().into()),
        ("asset", asset.into()),
        ("schema", schema.into()),
    ];
    message.properties = Some(Box::new(Properties {
        user: user
            .into_iter()
            .map(|(k, v): (&str, ByteString)| (k.into(), v))
            .collect(),
        content_type: Some(ByteString::from_static("application/json")),
        payload_is_utf8: true,
        ..Properties::default()
    }));
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(payload: Payload, narrow: bool, readings: &[(&str, Reading)]) -> String {
        let mut writer = Writer::new(payload);
        let points = readings.iter().map(|(name, reading)| (*name, narrow, reading));
        String::from_utf8(writer.write(points)).expect("JSON is UTF-8")
    }

    fn reading(value: Option<Raw>, quality: Quality, why: &str) -> Reading {
        Reading {
            value,
            quality,
            why: why.to_owned(),
            at: Timestamp::from_millis(1_000),
        }
    }

    #[test]
    fn the_payload_has_the_documented_shape() {
        let readings = [
            ("temperature", reading(Some(Raw::Float(21.5)), Quality::Good, "")),
            ("burner", reading(Some(Raw::Bool(true)), Quality::Good, "")),
            ("door", reading(None, Quality::Bad, "timeout \"x\"")),
            ("flow", reading(Some(Raw::Uint(7)), Quality::Uncertain, "saturated")),
            ("level", reading(Some(Raw::Int(-4)), Quality::Stale, "not read")),
            ("big", reading(Some(Raw::Uint(u64::MAX)), Quality::Good, "")),
            (
                "name \"q\"",
                reading(Some(Raw::Text("ä\n".to_owned())), Quality::Good, ""),
            ),
        ];
        let expected = concat!(
            r#"{"temperature":{"value":21.5,"ts":"1970-01-01T00:00:01.000Z","q":"good"},"#,
            r#""burner":{"value":true,"ts":"1970-01-01T00:00:01.000Z","q":"good"},"#,
            r#""door":{"value":null,"ts":"1970-01-01T00:00:01.000Z","q":"bad","why":"timeout \"x\""},"#,
            r#""flow":{"value":7,"ts":"1970-01-01T00:00:01.000Z","q":"uncertain","why":"saturated"},"#,
            r#""level":{"value":null,"ts":"1970-01-01T00:00:01.000Z","q":"stale","why":"not read","last":-4},"#,
            r#""big":{"value":"18446744073709551615","ts":"1970-01-01T00:00:01.000Z","q":"good"},"#,
            r#""name \"q\"":{"value":"ä\n","ts":"1970-01-01T00:00:01.000Z","q":"good"}}"#
        );
        assert_eq!(written(Payload::Values, false, &readings), expected);
    }

    #[test]
    fn a_value_that_is_not_current_never_looks_like_one() {
        for quality in [Quality::Bad, Quality::Stale] {
            for payload in [Payload::Values, Payload::Aio] {
                let text = written(payload, false, &[("p", reading(Some(Raw::Int(5)), quality, "lost"))]);
                let json: serde_json::Value = serde_json::from_str(&text).expect("JSON");
                let point = &json["p"];
                assert!(point["value"].is_null() && point["Value"].is_null(), "{text}");
            }
        }
    }

    #[test]
    fn numbers_of_32_bits_are_written_as_short_as_they_are() {
        let value = f64::from(0.1f32);
        let good = |value| [("p", reading(Some(Raw::Float(value)), Quality::Good, ""))];
        assert!(written(Payload::Values, true, &good(value)).contains("\"value\":0.1,"));
        assert!(written(Payload::Values, false, &good(value)).contains("\"value\":0.10000000149011612,"));
        assert!(written(Payload::Values, true, &good(1e30)).contains("\"value\":1e+30,"));
    }

    #[test]
    fn the_shape_of_azure_iot_operations() {
        let readings = [
            ("a", reading(Some(Raw::Float(21.5)), Quality::Good, "")),
            ("b", reading(None, Quality::Bad, "timeout")),
        ];
        let expected = concat!(
            r#"{"a":{"SourceTimestamp":"1970-01-01T00:00:01.000Z","Value":21.5},"#,
            r#""b":{"SourceTimestamp":"1970-01-01T00:00:01.000Z","Value":null,"#,
            r#""StatusCode":{"Code":2147483648,"Symbol":"Bad"}}}"#
        );
        assert_eq!(written(Payload::Aio, false, &readings), expected);
    }

    #[test]
    fn the_properties_travel_along() {
        let topic = Topic::new("data/a").expect("valid");
        let at = Timestamp::from_millis(1_000);
        let message = message(topic, "a", b"{}".to_vec(), Payload::Values, 7, "connector:c".into(), at);
        assert_eq!(message.qos, crate::message::Qos::AtLeastOnce);
        let properties = message.properties.expect("set");
        assert_eq!(properties.content_type.as_deref(), Some("application/json"));
        let user: Vec<(&str, &str)> = properties.user.iter().map(|(k, v)| (&**k, &**v)).collect();
        assert_eq!(user, [("seq", "7"), ("asset", "a"), ("schema", SCHEMA)]);
    }
}
