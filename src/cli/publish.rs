//! `tidegate publish TOPIC [PAYLOAD]`: one message into the running gateway; returns when it is on disk.

use std::io::Read;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use data_encoding::HEXLOWER;
use serde_json::{Map, Value, json};

use super::client::Place;
use super::status::text;
use super::terminal::{tame, wrap};

/// The daemon's limit; a file is not read further.
const PAYLOAD_BYTES_MAX: u64 = crate::admin::PAYLOAD_BYTES_MAX as u64;

#[derive(Debug, clap::Args)]
pub(super) struct PublishArgs {
    topic: String,
    /// The payload, or - for stdin; empty without it
    #[arg(conflicts_with = "file", allow_hyphen_values = true)]
    payload: Option<String>,
    /// The payload from a file, as it is
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    #[arg(short, long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(0..=2))]
    qos: u8,
    /// Keep it as the topic's retained message; an empty payload removes that
    #[arg(short, long)]
    retain: bool,
    /// Worthless after this time: "60s", "2h"
    #[arg(long, value_name = "TIME", value_parser = super::period)]
    expiry: Option<Duration>,
    /// A user property; may be given several times
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = pair)]
    user_property: Vec<(String, String)>,
    /// Where an answer is to go
    #[arg(long, value_name = "TOPIC")]
    response_topic: Option<String>,
    /// Correlation data of the answer
    #[arg(long, value_name = "TEXT")]
    correlation: Option<String>,
    #[arg(long, value_name = "TYPE")]
    content_type: Option<String>,
    /// Who gets it, as JSON
    #[arg(long)]
    json: bool,
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("write it as KEY=VALUE".to_owned()),
    }
}

pub(super) fn run(place: &Place, args: &PublishArgs) -> anyhow::Result<String> {
    let payload = match (&args.file, args.payload.as_deref()) {
        (Some(path), _) => {
            let file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            read(file).with_context(|| path.display().to_string())?
        }
        (None, Some("-")) => read(std::io::stdin().lock()).context("stdin")?,
        (None, Some(text)) => text.as_bytes().to_vec(),
        (None, None) => Vec::new(),
    };
    let answer = place.ask(&request(args, &payload))?.only()?;
    if args.json {
        return Ok(format!("{answer}\n"));
    }
    Ok(said(&args.topic, &answer))
}

fn read(from: impl Read) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(PAYLOAD_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .context("cannot be read")?;
    if bytes.len() as u64 > PAYLOAD_BYTES_MAX {
        bail!(
            "more than {} KiB, which is the most here; larger messages come by MQTT",
            PAYLOAD_BYTES_MAX >> 10
        );
    }
    Ok(bytes)
}

fn request(args: &PublishArgs, payload: &[u8]) -> Value {
    let mut request = Map::new();
    let mut put = |key: &str, value: Value| request.insert(key.to_owned(), value);
    put("request", json!("publish"));
    put("topic", json!(args.topic));
    put("qos", json!(args.qos));
    put("retain", json!(args.retain));
    // Control characters are longer as JSON than as digits.
    match std::str::from_utf8(payload) {
        Ok(text) if !text.contains(|c: char| c.is_control() && !matches!(c, '\n' | '\t' | '\r')) => {
            put("payload", json!(text))
        }
        _ => put("payload_hex", json!(HEXLOWER.encode(payload))),
    };
    if let Some(expiry) = args.expiry {
        // Rounded up: less than a second is one.
        let seconds = u32::try_from(expiry.as_millis().div_ceil(1000)).unwrap_or(u32::MAX);
        put("expiry_s", json!(seconds));
    }
    if !args.user_property.is_empty() {
        put("user", json!(args.user_property));
    }
    let texts = [
        ("response_topic", &args.response_topic),
        ("correlation", &args.correlation),
        ("content_type", &args.content_type),
    ];
    for (key, text) in texts {
        if let Some(text) = text {
            put(key, json!(text));
        }
    }
    Value::Object(request)
}

fn said(topic: &str, answer: &Value) -> String {
    let durable: Vec<String> = answer["durable"].as_array().into_iter().flatten().map(text).collect();
    let live = match answer["live"].as_u64().unwrap_or(0) {
        0 => None,
        1 => Some("1 connected client".to_owned()),
        n => Some(format!("{n} connected clients")),
    };
    let sentence = match (durable.is_empty(), live) {
        (false, None) => format!("on disk for {}", durable.join(", ")),
        (false, Some(live)) => format!("on disk for {}; {live} got it", durable.join(", ")),
        (true, Some(live)) => format!("{live} got it; nothing durable consumes this topic, so it was not stored"),
        (true, None) => "nobody gets it: no route, module or subscription matches this topic".to_owned(),
    };
    let mut out = wrap(&format!("published to {}: {sentence}", tame(topic)), 80).join("\n");
    out.push('\n');
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Alone {
        #[command(flatten)]
        args: PublishArgs,
    }

    fn parsed(arguments: &[&str]) -> Result<PublishArgs, clap::Error> {
        Alone::try_parse_from(std::iter::once(&"publish").chain(arguments)).map(|a| a.args)
    }

    #[test]
    fn arguments_become_a_request() {
        let args = parsed(&[
            "a/b",
            "-1",
            "-q",
            "2",
            "-r",
            "--expiry",
            "1500ms",
            "-u",
            "k=v=w",
            "-u",
            "l=",
            "--response-topic",
            "r",
        ]);
        let args = args.expect("valid");
        let wanted = json!({"request": "publish", "topic": "a/b", "payload": "-1", "qos": 2, "retain": true, "expiry_s": 2,
            "user": [["k", "v=w"], ["l", ""]], "response_topic": "r"});
        assert_eq!(request(&args, b"-1"), wanted);
        assert_eq!(request(&args, b"\xff\0")["payload_hex"], "ff00");
        assert_eq!(request(&args, b"\0")["payload_hex"], "00");
        for bad in [
            &[][..],
            &["a", "b", "--file", "c"],
            &["a", "-q", "3"],
            &["a", "-u", "kv"],
            &["a", "--expiry", "x"],
        ] {
            assert!(parsed(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn it_says_who_gets_it() {
        let of = |durable: &[&str], live: u64| said("t", &json!({"durable": durable, "live": live}));
        assert_eq!(
            of(&["uplink:a", "session:b"], 0),
            "published to t: on disk for uplink:a, session:b\n"
        );
        assert!(of(&["uplink:a"], 1).contains("1 connected client got it"));
        assert!(of(&[], 2).contains("nothing durable"));
        assert!(of(&[], 0).contains("nobody"));
    }
}
