//! Messages and clients in JSON, and messages back: payload and correlation data as text where they are UTF-8, else as hexadecimal digits.

use std::collections::BTreeMap;

use bytes::Bytes;
use data_encoding::HEXLOWER_PERMISSIVE;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Failure;
use crate::broker::handle::{ClientDetail, ClientEntry};
use crate::clock::Timestamp;
use crate::message::{Message, Properties, Qos, Topic};

/// What a client wants published.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outgoing {
    pub topic: String,
    pub payload: Option<String>,
    pub payload_hex: Option<String>,
    #[serde(default = "at_least_once")]
    pub qos: u8,
    #[serde(default)]
    pub retain: bool,
    pub expiry_s: Option<u32>,
    #[serde(default)]
    pub user: Vec<(String, String)>,
    pub content_type: Option<String>,
    pub response_topic: Option<String>,
    pub correlation: Option<String>,
    pub correlation_hex: Option<String>,
}

fn at_least_once() -> u8 {
    1
}

/// Longer strings in properties cannot be sent on by MQTT.
const TEXT_BYTES_MAX: usize = 65_535;
/// User properties together; more is a mistake.
const PROPERTIES_BYTES_MAX: usize = 256 << 10;

impl Outgoing {
    pub fn message(self, source: &str, payload_bytes_max: usize, now: Timestamp) -> Result<Message, Failure> {
        let topic = Topic::new(self.topic.clone())
            .map_err(|e| Failure::new(format!("{:?} is not a topic: {e}", self.topic), "name a topic like a/b"))?;
        if topic.as_str().starts_with("$SYS") || topic.as_str().starts_with("$share") {
            let error = format!("{topic} is a topic of the broker's own");
            return Err(Failure::new(error, "publish to a topic without $ at its beginning"));
        }
        let payload = bytes_of("payload", self.payload, self.payload_hex)?.unwrap_or_default();
        if payload.len() > payload_bytes_max {
            let error = format!(
                "the payload has {} bytes, {payload_bytes_max} are the most",
                payload.len()
            );
            return Err(Failure::new(error, "send it in parts, or by an MQTT client"));
        }
        let qos = Qos::from_u8(self.qos)
            .ok_or_else(|| Failure::new(format!("there is no QoS {}", self.qos), "use 0, 1 or 2"))?;
        if let Some(response) = &self.response_topic {
            Topic::new(response.clone()).map_err(|e| {
                Failure::new(
                    format!("the response topic {response:?} is not a topic: {e}"),
                    "name a topic like a/b",
                )
            })?;
        }
        let correlation_data = bytes_of("correlation", self.correlation, self.correlation_hex)?;
        let texts = self.user.iter().flat_map(|(k, v)| [k.len(), v.len()]);
        let lengths: Vec<usize> = texts
            .chain(self.content_type.iter().map(String::len))
            .chain(correlation_data.iter().map(Bytes::len))
            .collect();
        if lengths.iter().any(|n| *n > TEXT_BYTES_MAX) || lengths.iter().sum::<usize>() > PROPERTIES_BYTES_MAX {
            let next = "65,535 bytes each and 256 KiB together are the most; put more into the payload";
            return Err(Failure::new("the properties are too long", next));
        }
        let properties = Properties {
            user: self.user.into_iter().map(|(k, v)| (k.into(), v.into())).collect(),
            content_type: self.content_type.map(Into::into),
            payload_is_utf8: false,
            response_topic: self.response_topic.map(Into::into),
            correlation_data,
            expiry_s: self.expiry_s,
        };
        let mut message = Message::new(topic, payload, source.into(), now);
        message.qos = qos;
        message.retain = self.retain;
        message.properties = (properties != Properties::default()).then(|| Box::new(properties));
        Ok(message)
    }
}

fn bytes_of(what: &str, text: Option<String>, hex: Option<String>) -> Result<Option<Bytes>, Failure> {
    match (text, hex) {
        (Some(_), Some(_)) => Err(Failure::new(
            format!("{what} is there twice"),
            format!("send {what} or {what}_hex"),
        )),
        (Some(text), None) => Ok(Some(text.into())),
        (None, Some(hex)) => match HEXLOWER_PERMISSIVE.decode(hex.as_bytes()) {
            Ok(bytes) => Ok(Some(bytes.into())),
            Err(_) => Err(Failure::new(
                format!("{what}_hex is not hexadecimal"),
                "send two digits a byte: 0a1b",
            )),
        },
        (None, None) => Ok(None),
    }
}

/// The message as `tail` shows it.
pub fn of_message(message: &Message) -> Value {
    let mut out = Map::new();
    out.insert("time".into(), json!(message.received.to_string()));
    out.insert("topic".into(), json!(message.topic.as_str()));
    out.insert("qos".into(), json!(message.qos as u8));
    out.insert("retain".into(), json!(message.retain));
    out.insert("source".into(), json!(&*message.source));
    put(&mut out, "payload", &message.payload);
    if let Some(p) = &message.properties {
        if !p.user.is_empty() {
            let pairs: Vec<(&str, &str)> = p.user.iter().map(|(k, v)| (&**k, &**v)).collect();
            out.insert("user".into(), json!(pairs));
        }
        let texts: BTreeMap<&str, Option<&str>> = BTreeMap::from([
            ("content_type", p.content_type.as_deref()),
            ("response_topic", p.response_topic.as_deref()),
        ]);
        for (name, text) in texts {
            if let Some(text) = text {
                out.insert(name.into(), json!(text));
            }
        }
        if let Some(data) = &p.correlation_data {
            put(&mut out, "correlation", data);
        }
        if let Some(expiry_s) = p.expiry_s {
            out.insert("expiry_s".into(), json!(expiry_s));
        }
    }
    Value::Object(out)
}

/// A client as `client list` shows it.
pub fn of_client(client: &ClientEntry) -> Value {
    json!({
        "client_id": client.client_id,
        "user": client.user,
        "connected": client.peer.is_some(),
        "address": client.peer,
        "version": client.version,
        "since": client.since.map(|s| s.to_string()),
        // The largest number is without end.
        "session_expiry_s": (client.expiry_s != u32::MAX).then_some(client.expiry_s),
        "subscriptions": client.subscriptions,
        "queued_messages": client.queued_messages,
        "queued_bytes": client.queued_bytes,
    })
}

/// … and as `client show` does.
pub fn of_detail(client: &ClientDetail) -> Value {
    let mut out = of_client(&client.entry);
    out["listener"] = json!(client.listener);
    out["in_flight"] = client.in_flight.into();
    out["inbound"] = client.inbound.into();
    out["unsent_bytes"] = client.unsent_bytes.into();
    out["dropped"] = client.dropped.into();
    out["throttled"] = client.throttled.into();
    out["will_topic"] = json!(client.will_topic);
    out["clients_of_user"] = client.clients_of_user.into();
    out["limits"] = json!({
        "max_connections": client.limits.connections,
        "max_messages_per_second": client.limits.messages_per_second,
        "max_bytes_per_second": client.limits.bytes_per_second,
        "max_subscriptions": client.limits.subscriptions,
        "max_queued_bytes": client.limits.queued_bytes,
    });
    let shown = client
        .subscriptions
        .iter()
        .map(|s| json!({ "filter": s.filter, "qos": s.qos, "no_local": s.no_local, "identifier": s.identifier }));
    // The first of them; "subscriptions" is how many there are.
    out["filters"] = shown.collect();
    out
}

fn put(out: &mut Map<String, Value>, name: &str, bytes: &Bytes) {
    match std::str::from_utf8(bytes) {
        Ok(text) => out.insert(name.into(), json!(text)),
        Err(_) => out.insert(format!("{name}_hex"), json!(HEXLOWER_PERMISSIVE.encode(bytes))),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outgoing(text: &str) -> Result<Message, Failure> {
        let parsed: Outgoing = serde_json::from_str(text).expect(text);
        parsed.message("admin", 16, Timestamp::from_millis(0))
    }

    #[test]
    fn a_message_goes_there_and_back() {
        let text = r#"{"topic":"a/b","payload_hex":"00fF","qos":2,"retain":true,"expiry_s":9,"user":[["k","v"],["k","w"]],
            "response_topic":"r","correlation":"c","content_type":"t"}"#;
        let message = outgoing(text).expect("valid");
        assert_eq!(
            (&message.payload[..], message.qos, message.retain),
            (&b"\0\xff"[..], Qos::ExactlyOnce, true)
        );
        let shown = of_message(&message);
        let wanted = json!({
            "time": "1970-01-01T00:00:00.000Z", "topic": "a/b", "qos": 2, "retain": true, "source": "admin",
            "payload_hex": "00ff", "user": [["k", "v"], ["k", "w"]], "response_topic": "r", "correlation": "c",
            "content_type": "t", "expiry_s": 9,
        });
        assert_eq!(shown, wanted);
        let plain = outgoing(r#"{"topic":"a","payload":"x"}"#).expect("valid");
        assert!(plain.properties.is_none() && plain.qos == Qos::AtLeastOnce);
    }

    #[test]
    fn what_is_no_message_is_refused() {
        for (text, why) in [
            (r#"{"topic":"a/#"}"#, "not a topic"),
            (r#"{"topic":"$SYS/a"}"#, "broker's own"),
            (r#"{"topic":"a","qos":3}"#, "QoS 3"),
            (r#"{"topic":"a","payload":"12345678901234567"}"#, "17 bytes"),
            (r#"{"topic":"a","payload":"x","payload_hex":"00"}"#, "twice"),
            (r#"{"topic":"a","payload_hex":"0"}"#, "hexadecimal"),
            (r#"{"topic":"a","response_topic":"+"}"#, "response topic"),
        ] {
            let failure = outgoing(text).expect_err(text);
            assert!(
                failure.error.contains(why) && !failure.next.is_empty(),
                "{text}: {}",
                failure.error
            );
        }
    }
}
