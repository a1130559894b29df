//! The message a connector publishes for an asset: every point with its value, time, quality and, where it is bad, why.
//! Pure.
//!
//! ```json
//! {"temperature":{"value":81.3,"ts":"2026-11-24T23:40:03.120Z","q":"good"},
//!  "door":{"value":null,"ts":"2026-11-24T23:40:03.120Z","q":"bad","why":"timeout since 23:39:58"}}
//! ```

use bytestring::ByteString;
use serde::ser::{Serialize, SerializeMap, Serializer};

use crate::clock::Timestamp;
use crate::message::{Message, Properties, Source, Topic};

/// User property `schema`: the shape of the payload, with a number that goes up when it changes.
pub const SCHEMA: &str = "tidegate/values/1";

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value {
    Number(f64),
    Bool(bool),
}

/// A reading, or why there is none.
#[derive(Debug, Clone, PartialEq)]
pub enum Reading {
    Good(Value),
    Bad { why: String },
}

#[derive(Debug, Clone, PartialEq)]
pub struct PointValue {
    pub name: String,
    pub reading: Reading,
    pub at: Timestamp,
}

struct Payload<'a>(&'a [PointValue]);

impl Serialize for Payload<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // In the order of the configuration, not of the alphabet.
        serializer.collect_map(self.0.iter().map(|point| (&point.name, point)))
    }
}

impl Serialize for PointValue {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        match &self.reading {
            Reading::Good(Value::Number(number)) => map.serialize_entry("value", number)?,
            Reading::Good(Value::Bool(flag)) => map.serialize_entry("value", flag)?,
            Reading::Bad { .. } => map.serialize_entry("value", &())?,
        }
        map.serialize_entry("ts", &self.at.to_string())?;
        match &self.reading {
            Reading::Good(_) => map.serialize_entry("q", "good")?,
            Reading::Bad { why } => {
                map.serialize_entry("q", "bad")?;
                map.serialize_entry("why", why)?;
            }
        }
        map.end()
    }
}

/// A QoS 1 message; `sequence` counts the asset's messages since the connector started.
pub fn message(
    topic: Topic,
    asset: &str,
    points: &[PointValue],
    sequence: u64,
    source: Source,
    now: Timestamp,
) -> Result<Message, serde_json::Error> {
    let payload = serde_json::to_vec(&Payload(points))?;
    let mut message = Message::new(topic, payload, source, now);
    let user = [
        ("seq", sequence.to_string().into()),
        ("asset", asset.into()),
        ("schema", SCHEMA.into()),
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
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_has_the_documented_shape() {
        let at = Timestamp::from_millis(1_000);
        let point = |name: &str, reading| PointValue {
            name: name.to_owned(),
            reading,
            at,
        };
        let points = [
            point("temperature", Reading::Good(Value::Number(21.5))),
            point("burner", Reading::Good(Value::Bool(true))),
            point(
                "door",
                Reading::Bad {
                    why: "timeout \"x\"".to_owned(),
                },
            ),
        ];
        let topic = Topic::new("data/a").expect("valid");
        let message = message(topic, "a", &points, 7, "connector:c".into(), at).expect("plain values");
        let expected = concat!(
            r#"{"temperature":{"value":21.5,"ts":"1970-01-01T00:00:01.000Z","q":"good"},"#,
            r#""burner":{"value":true,"ts":"1970-01-01T00:00:01.000Z","q":"good"},"#,
            r#""door":{"value":null,"ts":"1970-01-01T00:00:01.000Z","q":"bad","why":"timeout \"x\""}}"#
        );
        assert_eq!(message.payload, expected);
        assert_eq!(message.qos, crate::message::Qos::AtLeastOnce);
        let properties = message.properties.expect("set");
        assert_eq!(properties.content_type.as_deref(), Some("application/json"));
        let user: Vec<(&str, &str)> = properties.user.iter().map(|(k, v)| (&**k, &**v)).collect();
        assert_eq!(user, [("seq", "7"), ("asset", "a"), ("schema", SCHEMA)]);
    }
}
