//! Commands to an asset, as they come on topics, and their answers. Pure.
//!
//! On `commands/{asset}`: `{"write":{"setpoint":80.5,"valve":true}}` or `{"read":["temperature"]}` (`"*"`: all points), with
//! an optional `"id"`. On `commands/{asset}/{point}` the payload is the value itself. The answer goes to the response topic
//! (MQTT 5, 4.10) with the correlation data, else to `answers/{asset}`:
//! `{"id":"7","result":"done","asset":"boiler","ts":"…","points":{"setpoint":{"value":80.5,…}}}`. `result` is one of
//! `done`, `refused` (nothing was written), `expired`, `failed` (see `why` and the points) and `unknown` (the gateway was
//! stopped while it was carried out: it may or may not have been, and is not carried out again).

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use super::driver::Raw;
use super::scaling::{Scaling, within_limits};
use crate::clock::Timestamp;
use crate::config::Asset;
use crate::message::{Message, Properties, Topic, TopicFilter};

const PAYLOAD_BYTES_MAX: usize = 64 << 10;
const POINTS_MAX: usize = 1_000;
/// Ids are remembered this long, and this many of them: after that one may be used again.
const REMEMBERED_MS: i64 = 3_600_000;
const REMEMBERED_MAX: usize = 1_000;
/// Where answers may not be sent to: it would let whoever may command also command others, or forge values and health.
const NO_ANSWERS: [&str; 4] = ["commands/", "data/", "status/", "$"];

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Command {
    pub asset: usize,
    /// As the sender wrote it.
    pub id: Option<String>,
    pub action: Action,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) enum Action {
    Read(Vec<usize>),
    Write(Vec<(usize, Raw)>),
}

/// Which asset a command is for, and which of its points where the topic names one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Target {
    pub asset: usize,
    pub point: Option<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    Done,
    Refused,
    Expired,
    Failed,
    Unknown,
}

impl Outcome {
    fn name(self) -> &'static str {
        match self {
            Outcome::Done => "done",
            Outcome::Refused => "refused",
            Outcome::Expired => "expired",
            Outcome::Failed => "failed",
            Outcome::Unknown => "unknown",
        }
    }
}

/// The filters of all commands to these assets.
pub(super) fn filters(assets: &[Asset]) -> Vec<TopicFilter> {
    let filter = |text: String| TopicFilter::new(text).expect("an asset's name is a part of a topic");
    assets
        .iter()
        .flat_map(|a| {
            [
                filter(format!("commands/{}", a.name)),
                filter(format!("commands/{}/+", a.name)),
            ]
        })
        .collect()
}

/// An asset of exactly that name, else one whose point is the last level; None where it is another connector's.
pub(super) fn target(topic: &str, assets: &[Asset]) -> Option<Target> {
    let name = topic.strip_prefix("commands/")?;
    if let Some(asset) = assets.iter().position(|a| a.name == name) {
        return Some(Target { asset, point: None });
    }
    let (name, last) = name.rsplit_once('/')?;
    let asset = assets.iter().position(|a| a.name == name)?;
    let point = assets[asset].points.iter().position(|p| p.name == last)?;
    Some(Target {
        asset,
        point: Some(point),
    })
}

/// Where the answer goes.
pub(super) fn answer_topic(command: &Message, asset: &Asset) -> Topic {
    command
        .properties
        .as_ref()
        .and_then(|p| p.response_topic.clone())
        .filter(|t| !NO_ANSWERS.iter().any(|prefix| t.starts_with(prefix)))
        .and_then(|t| Topic::new(t).ok())
        .unwrap_or_else(|| Topic::new(format!("answers/{}", asset.name)).expect("an asset's name is a part of a topic"))
}

/// A command that waited for longer than its sender or the configuration allows.
pub(super) fn is_expired(command: &Message, age_max: Duration, now: Timestamp) -> bool {
    let age_max = i64::try_from(age_max.as_millis()).unwrap_or(i64::MAX);
    command.is_expired(now) || now.millis_since(command.received) > age_max
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Typed {
    id: Option<Json>,
    write: Option<serde_json::Map<String, Json>>,
    read: Option<Json>,
}

const FORM: &str = r#"write {"write":{"POINT":VALUE}} or {"read":["POINT"]}, with an "id" if you like"#;

/// The id that the payload carries, where it can be made out: an answer names it even where the rest is wrong.
pub(super) fn id_of(payload: &[u8]) -> Option<String> {
    let value: Json = serde_json::from_slice(payload).ok()?;
    id_text(value.get("id")?)
}

fn id_text(id: &Json) -> Option<String> {
    match id {
        Json::String(text) => Some(text.clone()),
        Json::Number(number) => Some(number.to_string()),
        _ => None,
    }
}

/// The command, checked whole: either all of its writes may be done, or why none is.
pub(super) fn parse(target: Target, payload: &[u8], asset: &Asset) -> Result<Command, String> {
    if payload.len() > PAYLOAD_BYTES_MAX {
        return Err(format!(
            "the command has {} bytes, {PAYLOAD_BYTES_MAX} are the most",
            payload.len()
        ));
    }
    let command = |id, action| Command {
        asset: target.asset,
        id,
        action,
    };
    if let Some(point) = target.point {
        // A text may stand there without its quotes.
        let value = serde_json::from_slice(payload)
            .ok()
            .or_else(|| {
                std::str::from_utf8(payload)
                    .ok()
                    .map(|t| Json::String(t.trim().to_owned()))
            })
            .ok_or_else(|| "the payload is neither JSON nor text".to_owned())?;
        return Ok(command(None, Action::Write(vec![checked(asset, point, &value)?])));
    }
    let typed: Typed = serde_json::from_slice(payload).map_err(|error| format!("no command: {error}; {FORM}"))?;
    let id = match &typed.id {
        None | Some(Json::Null) => None,
        Some(id) => Some(id_text(id).ok_or("\"id\" must be a text or a number")?),
    };
    let action = match (typed.write, typed.read) {
        (Some(writes), None) if !writes.is_empty() => {
            let mut values = Vec::with_capacity(writes.len().min(POINTS_MAX));
            for (name, value) in &writes {
                values.push(checked(asset, point_named(asset, name)?, value)?);
            }
            Action::Write(values)
        }
        (None, Some(Json::String(all))) if all == "*" => Action::Read((0..asset.points.len()).collect()),
        (None, Some(Json::Array(names))) if !names.is_empty() && names.len() <= POINTS_MAX => {
            let point = |name: &Json| {
                let name = name
                    .as_str()
                    .ok_or_else(|| "the names of points are texts".to_owned())?;
                point_named(asset, name)
            };
            let mut points = names.iter().map(point).collect::<Result<Vec<_>, _>>()?;
            points.sort_unstable();
            points.dedup();
            Action::Read(points)
        }
        _ => return Err(FORM.to_owned()),
    };
    Ok(command(id, action))
}

fn point_named(asset: &Asset, name: &str) -> Result<usize, String> {
    asset.points.iter().position(|p| p.name == name).ok_or_else(|| {
        let known: Vec<&str> = asset.points.iter().take(20).map(|p| p.name.as_str()).collect();
        format!("{} has no point {name:?}; it has {}", asset.name, known.join(", "))
    })
}

fn checked(asset: &Asset, point: usize, value: &Json) -> Result<(usize, Raw), String> {
    let config = &asset.points[point];
    let refused = |why: String| format!("{}: {why}", config.name);
    if config.writable.is_none() {
        return Err(refused("the point is not writable".to_owned()));
    }
    let raw = Scaling::new(config).raw(value).map_err(refused)?;
    within_limits(config, value).map_err(refused)?;
    Ok((point, raw))
}

/// What an answer says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Answer<'a> {
    pub id: Option<&'a str>,
    pub outcome: Outcome,
    pub asset: &'a str,
    pub why: &'a str,
    /// The points' values as JSON, written by [`super::values::Writer`]; empty: none.
    pub points: &'a [u8],
}

impl Answer<'_> {
    pub fn payload(&self, now: Timestamp) -> Vec<u8> {
        #[derive(Serialize)]
        struct Shape<'a> {
            #[serde(skip_serializing_if = "Option::is_none")]
            id: Option<&'a str>,
            result: &'static str,
            asset: &'a str,
            #[serde(skip_serializing_if = "str::is_empty")]
            why: &'a str,
            ts: String,
            #[serde(skip_serializing_if = "Option::is_none")]
            points: Option<&'a serde_json::value::RawValue>,
        }
        let shape = Shape {
            id: self.id,
            result: self.outcome.name(),
            asset: self.asset,
            why: self.why,
            ts: now.to_string(),
            points: serde_json::from_slice(self.points).ok(),
        };
        serde_json::to_vec(&shape).expect("texts are written to memory")
    }
}

/// The message of an answer.
pub(super) fn answer(
    command: &Message,
    asset: &Asset,
    source: &crate::message::Source,
    payload: Vec<u8>,
    now: Timestamp,
) -> Message {
    let mut message = Message::new(answer_topic(command, asset), payload, source.clone(), now);
    message.properties = Some(Box::new(Properties {
        content_type: Some("application/json".into()),
        payload_is_utf8: true,
        correlation_data: command.properties.as_ref().and_then(|p| p.correlation_data.clone()),
        ..Properties::default()
    }));
    message
}

/// What makes two messages the same command: who sent it, where the answer goes, its id. Without an id it is the place in
/// the log, so that a command is carried out once even where the gateway dies before it is acknowledged.
pub(super) fn key(command: &Message, id: Option<&str>, stream: u16) -> String {
    use data_encoding::HEXLOWER;
    let properties = command.properties.as_deref();
    let correlation = properties.and_then(|p| p.correlation_data.as_deref());
    let response = properties.and_then(|p| p.response_topic.as_deref()).unwrap_or_default();
    let text = match (correlation, id) {
        (Some(data), _) => format!("c/{}/{response}/{}", command.source, HEXLOWER.encode(data)),
        (None, Some(id)) => format!("i/{}/{response}/{id}", command.source),
        (None, None) => return format!("s/{stream}/{}", command.sequence),
    };
    // Its length is bounded, whatever the sender wrote.
    use sha2::Digest;
    HEXLOWER.encode(&sha2::Sha256::digest(text.as_bytes())[..16])
}

/// A command that is or was carried out, as it is kept in the log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Remembered {
    /// When it came, in milliseconds since 1970.
    pub at: i64,
    /// Checksum of topic and payload: another command with the same id is a mistake of its sender.
    pub sum: u32,
    /// None while it is carried out.
    pub answer: Option<String>,
}

pub(super) fn sum(command: &Message) -> u32 {
    let mut sum = crc32fast::Hasher::new();
    sum.update(command.topic.as_str().as_bytes());
    sum.update(&[0]);
    sum.update(&command.payload);
    sum.finalize()
}

/// The commands of the last hour by their keys, so that none is carried out twice.
#[derive(Debug, Default)]
pub(super) struct Once {
    known: HashMap<String, Remembered>,
    /// Oldest first.
    order: VecDeque<String>,
}

/// Changes of the durable state: None deletes.
pub(super) type Changes = Vec<(String, Option<Vec<u8>>)>;

impl Once {
    /// As the log kept it; what cannot be read is deleted.
    pub fn restore(state: Vec<(String, Vec<u8>)>) -> (Once, Changes) {
        let mut once = Once::default();
        let mut broken = Changes::new();
        let mut entries = Vec::new();
        for (key, value) in state {
            match serde_json::from_slice::<Remembered>(&value) {
                Ok(entry) => entries.push((key, entry)),
                Err(_) => broken.push((key, None)),
            }
        }
        entries.sort_by_key(|(_, entry)| entry.at);
        for (key, entry) in entries {
            once.order.push_back(key.clone());
            once.known.insert(key, entry);
        }
        (once, broken)
    }

    pub fn find(&self, key: &str) -> Option<&Remembered> {
        self.known.get(key)
    }

    /// It did not begin after all.
    pub fn forget(&mut self, key: &str) {
        self.known.remove(key);
        self.order.retain(|k| k != key);
    }

    /// Remembers a command that begins (without an answer) or is done.
    pub fn remember(&mut self, key: &str, entry: Remembered) -> Changes {
        let mut changes = vec![(
            key.to_owned(),
            Some(serde_json::to_vec(&entry).expect("texts are written to memory")),
        )];
        let now = entry.at;
        if self.known.insert(key.to_owned(), entry).is_none() {
            self.order.push_back(key.to_owned());
        }
        while let Some(oldest) = self.order.front() {
            let is_old = self
                .known
                .get(oldest)
                .is_none_or(|e| now.saturating_sub(e.at) > REMEMBERED_MS);
            if (!is_old && self.order.len() <= REMEMBERED_MAX) || oldest == key {
                break;
            }
            self.known.remove(oldest);
            changes.extend(self.order.pop_front().map(|key| (key, None)));
        }
        changes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Address, DataType, Device, Limits, Payload, Point, Signal};
    use crate::message::Source;
    use bytes::Bytes;
    use std::sync::Arc;

    fn point(name: &str, data: DataType, writable: bool) -> Point {
        Point {
            name: name.to_owned(),
            address: Address::Simulator(Signal::Setpoint),
            data,
            unit: None,
            scale: 1.0,
            offset: 0.0,
            deadband: None,
            every: Duration::from_secs(1),
            writable: writable.then_some(Limits {
                min: Some(0.0),
                max: Some(100.0),
                read_back: false,
            }),
        }
    }

    fn asset(name: &str) -> Asset {
        Asset {
            name: name.to_owned(),
            topic: Topic::new(format!("data/{name}")).expect("valid"),
            connector: "c".to_owned(),
            every: Duration::from_secs(1),
            silence_max: Duration::from_secs(60),
            on_change: false,
            payload: Payload::Values,
            device: Device::Simulator,
            points: Arc::new([
                point("setpoint", DataType::Float64, true),
                point("valve", DataType::Bool, true),
                point("temperature", DataType::Float64, false),
                point("label", DataType::Text { bytes: 8 }, true),
            ]),
        }
    }

    fn assets() -> Vec<Asset> {
        vec![asset("line-4/boiler"), asset("line-4"), asset("line-4/boiler/valve")]
    }

    fn message(topic: &str, payload: &str) -> Message {
        let source: Source = "client:a".into();
        let mut message = Message::new(
            Topic::new(topic.to_owned()).expect("valid"),
            payload.to_owned(),
            source,
            Timestamp::from_millis(1_000),
        );
        message.properties = Some(Box::default());
        message
    }

    fn to_boiler(payload: &str) -> Result<Action, String> {
        let target = Target { asset: 0, point: None };
        parse(target, payload.as_bytes(), &assets()[0]).map(|c| c.action)
    }

    #[test]
    fn the_topic_names_the_asset_or_a_point_of_it() {
        let assets = assets();
        let at = |asset, point| Some(Target { asset, point });
        assert_eq!(target("commands/line-4/boiler", &assets), at(0, None));
        assert_eq!(target("commands/line-4/boiler/setpoint", &assets), at(0, Some(0)));
        // An asset's own name wins.
        assert_eq!(target("commands/line-4/boiler/valve", &assets), at(2, None));
        assert_eq!(target("commands/line-4", &assets), at(1, None));
        assert_eq!(target("commands/line-4/other", &assets), None);
        assert_eq!(target("commands/other", &assets), None);
        let filters = filters(&assets);
        assert!(filters.iter().any(|f| f.matches("commands/line-4/boiler/setpoint")));
    }

    #[test]
    fn commands_are_understood() {
        // Points are written in the order in which they stand.
        assert_eq!(
            to_boiler(r#"{"write":{"label":"x","setpoint":80.5,"valve":true}}"#),
            Ok(Action::Write(vec![
                (3, Raw::Text("x".to_owned())),
                (0, Raw::Float(80.5)),
                (1, Raw::Bool(true)),
            ]))
        );
        assert_eq!(
            to_boiler(r#"{"read":["temperature","setpoint","setpoint"]}"#),
            Ok(Action::Read(vec![0, 2]))
        );
        assert_eq!(to_boiler(r#"{"read":"*"}"#), Ok(Action::Read(vec![0, 1, 2, 3])));
        let plain = |point, payload: &str| {
            let target = Target {
                asset: 0,
                point: Some(point),
            };
            parse(target, payload.as_bytes(), &assets()[0]).map(|c| c.action)
        };
        assert_eq!(plain(0, " 80.5 "), Ok(Action::Write(vec![(0, Raw::Float(80.5))])));
        assert_eq!(plain(1, "true"), Ok(Action::Write(vec![(1, Raw::Bool(true))])));
        assert_eq!(
            plain(3, "hello"),
            Ok(Action::Write(vec![(3, Raw::Text("hello".to_owned()))]))
        );
        assert_eq!(plain(2, "1"), Err("temperature: the point is not writable".to_owned()));
    }

    #[test]
    fn one_wrong_write_refuses_all_and_says_why() {
        for (payload, why) in [
            (
                r#"{"write":{"setpoint":80,"temperature":1}}"#,
                "temperature: the point is not writable",
            ),
            (
                r#"{"write":{"setpoint":101}}"#,
                "setpoint: 101 is above the limit of 100",
            ),
            (r#"{"write":{"setpoint":-1}}"#, "setpoint: -1 is below the limit of 0"),
            (
                r#"{"write":{"setpoint":"hot"}}"#,
                "setpoint: the point is of type float64: write a number",
            ),
            (r#"{"write":{"sepoint":1}}"#, "no point \"sepoint\""),
            (r#"{"write":{}}"#, "write {\"write\""),
            (r#"{"write":{"setpoint":1},"read":"*"}"#, "write {\"write\""),
            (r#"{"read":[]}"#, "write {\"write\""),
            (r#"{"set":{"setpoint":1}}"#, "unknown field `set`"),
            (r#"{"id":[],"read":"*"}"#, "\"id\" must be"),
            ("on", "no command: "),
            ("", "no command: "),
        ] {
            let error = to_boiler(payload).expect_err(payload);
            assert!(error.contains(why), "{payload}: {error}");
        }
    }

    #[test]
    fn answers_go_where_they_were_asked_to_but_command_nobody() {
        let asset = &assets()[0];
        let mut command = message("commands/line-4/boiler", "{}");
        let set = |command: &mut Message, topic: &str| {
            command.properties.as_mut().expect("set").response_topic = Some(topic.to_owned().into());
        };
        assert_eq!(answer_topic(&command, asset).as_str(), "answers/line-4/boiler");
        set(&mut command, "my/answers");
        assert_eq!(answer_topic(&command, asset).as_str(), "my/answers");
        for forbidden in [
            "commands/line-4/pump",
            "data/line-4/boiler",
            "status/connector/x",
            "$SYS/x",
        ] {
            set(&mut command, forbidden);
            assert_eq!(
                answer_topic(&command, asset).as_str(),
                "answers/line-4/boiler",
                "{forbidden}"
            );
        }
        command.properties.as_mut().expect("set").correlation_data = Some(Bytes::from_static(b"\x00\xff"));
        let payload = Answer {
            id: Some("7"),
            outcome: Outcome::Failed,
            asset: "line-4/boiler",
            why: "timeout",
            points: br#"{"setpoint":{"value":null}}"#,
        }
        .payload(Timestamp::from_millis(1_000));
        assert_eq!(
            String::from_utf8_lossy(&payload),
            concat!(
                r#"{"id":"7","result":"failed","asset":"line-4/boiler","why":"timeout","#,
                r#""ts":"1970-01-01T00:00:01.000Z","points":{"setpoint":{"value":null}}}"#
            )
        );
        let answer = answer(
            &command,
            asset,
            &"connector:c".into(),
            payload,
            Timestamp::from_millis(2_000),
        );
        let properties = answer.properties.expect("set");
        assert_eq!(properties.correlation_data.as_deref(), Some(&b"\x00\xff"[..]));
    }

    #[test]
    fn old_commands_are_refused() {
        let mut command = message("commands/x", "");
        let at = |s: i64| Timestamp::from_millis(1_000 + s * 1_000);
        let minute = Duration::from_secs(60);
        assert!(!is_expired(&command, minute, at(60)));
        assert!(is_expired(&command, minute, at(61)));
        command.properties.as_mut().expect("set").expiry_s = Some(5);
        assert!(!is_expired(&command, minute, at(4)));
        assert!(is_expired(&command, minute, at(5)));
    }

    #[test]
    fn keys_are_of_the_sender_and_bounded() {
        let mut a = message("commands/x", "");
        a.sequence = crate::message::Sequence(7);
        assert_eq!(key(&a, None, 2), "s/2/7");
        let by_id = key(&a, Some(&"1".repeat(10_000)), 0);
        assert_eq!(by_id.len(), 32);
        assert_eq!(key(&a, Some("1"), 0), key(&a, Some("1"), 5));
        let mut other = a.clone();
        other.source = "client:b".into();
        assert_ne!(
            key(&a, Some("1"), 0),
            key(&other, Some("1"), 0),
            "another client's 1 is another command"
        );
        a.properties.as_mut().expect("set").correlation_data = Some(Bytes::from_static(b"1"));
        assert_ne!(key(&a, Some("1"), 0), key(&other, Some("1"), 0));
    }

    #[test]
    fn what_was_carried_out_is_remembered_for_an_hour() {
        let entry = |at, answer: Option<&str>| Remembered {
            at,
            sum: 1,
            answer: answer.map(str::to_owned),
        };
        let mut once = Once::default();
        let mut kept: HashMap<String, Vec<u8>> = HashMap::new();
        let mut apply = |changes: Changes| {
            for (key, value) in changes {
                match value {
                    Some(value) => kept.insert(key, value),
                    None => kept.remove(&key),
                };
            }
            kept.len()
        };
        apply(once.remember("a", entry(0, None)));
        apply(once.remember("a", entry(0, Some("done"))));
        apply(once.remember("b", entry(REMEMBERED_MS, None)));
        assert_eq!(once.find("a"), Some(&entry(0, Some("done"))));
        apply(once.remember("c", entry(REMEMBERED_MS + 1, None)));
        assert_eq!(once.find("a"), None, "an hour has passed");
        for n in 0..2 * REMEMBERED_MAX as i64 {
            let kept = apply(once.remember(&format!("n{n}"), entry(REMEMBERED_MS + 2 + n, None)));
            assert!(kept <= REMEMBERED_MAX, "{kept}");
        }
        let mut state: Vec<_> = kept.into_iter().collect();
        state.push(("broken".to_owned(), b"{".to_vec()));
        let (restored, broken) = Once::restore(state);
        assert_eq!(broken, [("broken".to_owned(), None)]);
        assert_eq!(restored.known, once.known);
        assert_eq!(restored.order, once.order);
    }
}
