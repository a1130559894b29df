//! `tidegate asset list|read|write|watch`: machines by hand, through the same commands that everybody sends.

use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::client::{Answer, Place};
use super::terminal::{Colour, Look, cut, tame};
use super::{ConfigArgs, load, say};
use crate::clock::{self, Instant};
use crate::config::{Asset, Config};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Name the assets of the configuration, or the points of one of them
    List {
        /// Its points, too
        name: Option<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Read points of an asset now, from the machine
    Read {
        name: String,
        /// Points; all of them where none is named
        points: Vec<String>,
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        wait: Wait,
    },
    /// Write points of an asset: setpoint=60.5 valve=true
    Write {
        name: String,
        #[arg(required = true, value_name = "POINT=VALUE")]
        values: Vec<String>,
        #[command(flatten)]
        common: Common,
        #[command(flatten)]
        wait: Wait,
    },
    /// Show values as they come, until Ctrl-C
    Watch {
        /// An asset; all of them where none is named
        name: Option<String>,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, Args)]
pub(super) struct Common {
    #[command(flatten)]
    config: ConfigArgs,
    /// As JSON, for programs
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct Wait {
    /// How long to wait for the answer
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    timeout: u64,
}

const NAME_COLUMNS: usize = 28;
/// `23:40:03.120 `
const TIME_COLUMNS: usize = 13;

pub(super) fn run(command: Command, look: Look) -> anyhow::Result<()> {
    match command {
        Command::List { name, common } => list(&load(&common.config)?, name.as_deref(), &common, look),
        Command::Read {
            name,
            points,
            common,
            wait,
        } => {
            let read = if points.is_empty() { json!("*") } else { json!(points) };
            command_asset(&name, &json!({ "read": read }), &common, &wait, look)
        }
        Command::Write {
            name,
            values,
            common,
            wait,
        } => {
            let write = values
                .iter()
                .map(|text| assignment(text))
                .collect::<Result<Map<_, _>, _>>()?;
            command_asset(&name, &json!({ "write": write }), &common, &wait, look)
        }
        Command::Watch { name, common } => watch(name.as_deref(), &common, look),
    }
}

/// `point=value`: what is no JSON is a text.
fn assignment(text: &str) -> anyhow::Result<(String, Value)> {
    let (point, value) = text
        .split_once('=')
        .with_context(|| format!("{text:?} is no assignment: write POINT=VALUE, setpoint=60.5 for one"))?;
    let value = serde_json::from_str(value).unwrap_or_else(|_| json!(value));
    Ok((point.to_owned(), value))
}

// -- list ------------------------------------------------------------------------------------------------------------

fn list(config: &Config, name: Option<&str>, common: &Common, look: Look) -> anyhow::Result<()> {
    let assets: Vec<&Asset> = config
        .assets
        .iter()
        .filter(|a| name.is_none_or(|name| a.name == name))
        .collect();
    if let (Some(name), true) = (name, assets.is_empty()) {
        return Err(no_such_asset(config, name));
    }
    if common.json {
        let shown: Vec<Value> = assets.iter().map(|asset| of_asset(asset)).collect();
        return say(&format!("{}\n", json!(shown)));
    }
    let mut out = String::new();
    for asset in &assets {
        let count = match asset.points.len() {
            1 => "1 point".to_owned(),
            n => format!("{n} points"),
        };
        let line = format!(
            "{:<NAME_COLUMNS$} {count:>11} by {}",
            cut(&asset.name, NAME_COLUMNS),
            asset.connector
        );
        out.push_str(&cut(&line, look.columns));
        out.push('\n');
        if name.is_some() {
            for point in asset.points.iter() {
                let unit = point.unit.as_deref().unwrap_or_default();
                let access = match point.writable {
                    None => String::new(),
                    Some(limits) => match (limits.min, limits.max) {
                        (None, None) => "writable".to_owned(),
                        (Some(min), None) => format!("writable, from {min}"),
                        (None, Some(max)) => format!("writable, up to {max}"),
                        (Some(min), Some(max)) => format!("writable, {min} to {max}"),
                    },
                };
                let period = humantime::format_duration(point.every);
                let line = format!(
                    "  {:<26} {:<8} {unit:<6} every {period:<8} {access}",
                    cut(&point.name, 26),
                    point.data.name()
                );
                out.push_str(cut(line.trim_end(), look.columns).trim_end());
                out.push('\n');
            }
        }
    }
    if assets.is_empty() {
        out.push_str("no assets are configured: an [[asset]] names a [[connector]] and its points\n");
    }
    say(&out)
}

fn no_such_asset(config: &Config, name: &str) -> anyhow::Error {
    const NAMED_MAX: usize = 20;
    let known: Vec<&str> = config.assets.iter().take(NAMED_MAX).map(|a| a.name.as_str()).collect();
    let more = if config.assets.len() > NAMED_MAX { ", …" } else { "" };
    anyhow::anyhow!("there is no asset {name:?}; there are {}{more}", known.join(", "))
}

fn of_asset(asset: &Asset) -> Value {
    let points: Vec<Value> = asset
        .points
        .iter()
        .map(|point| {
            json!({
                "name": point.name,
                "type": point.data.name(),
                "unit": point.unit,
                "every_ms": point.every.as_millis(),
                "writable": point.writable.is_some(),
                "min": point.writable.and_then(|l| l.min),
                "max": point.writable.and_then(|l| l.max),
            })
        })
        .collect();
    json!({ "name": asset.name, "connector": asset.connector, "topic": asset.topic.as_str(), "points": points })
}

// -- read and write --------------------------------------------------------------------------------------------------

fn command_asset(asset: &str, command: &Value, common: &Common, wait: &Wait, look: Look) -> anyhow::Result<()> {
    let place = common.config.place()?;
    // A configuration that cannot be read in full by this user says nothing; the answer will.
    if let Ok(config) = crate::config::load(&place.config)
        && !config.assets.iter().any(|a| a.name == asset)
    {
        return Err(no_such_asset(&config, asset));
    }
    let deadline = clock::monotonic() + Duration::from_secs(wait.timeout);
    let correlation = correlation();
    let response = format!("answers/{asset}/{correlation}");
    // Listening before asking: the answer may come at once.
    let mut answers = place.ask(&json!({ "request": "tail", "filter": response }))?;
    answers.next()?;
    place
        .ask(&json!({
            "request": "publish",
            "topic": format!("commands/{asset}"),
            "payload": command.to_string(),
            "content_type": "application/json",
            "response_topic": response,
            "correlation": correlation,
            "expiry_s": wait.timeout,
        }))?
        .only()?;
    let Some(message) = next_before(&mut answers, deadline)? else {
        bail!(
            "no answer from {asset:?} within {} s; the connector may be busy or stopped: `tidegate status` says more. The \
             command expires; if it was being carried out, its end is not known",
            wait.timeout
        );
    };
    let payload = message["payload"].as_str().unwrap_or_default();
    if common.json {
        say(&format!("{payload}\n"))?;
    }
    let answer: Value = serde_json::from_str(payload).context("the answer is not understood")?;
    if !common.json {
        let mut out = String::new();
        for (name, reading) in answer["points"].as_object().into_iter().flatten() {
            out.push_str(&point_line("", name, reading, look));
        }
        say(&out)?;
    }
    match answer["result"].as_str() {
        Some("done") => Ok(()),
        result => bail!(
            "{}: {}",
            result.unwrap_or("no result"),
            tame(answer["why"].as_str().unwrap_or("the answer does not say why"))
        ),
    }
}

/// The next message; None where none came in time.
fn next_before(answers: &mut Answer, deadline: Instant) -> anyhow::Result<Option<Value>> {
    loop {
        let left = deadline.saturating_duration_since(clock::monotonic());
        if left.is_zero() {
            return Ok(None);
        }
        match answers.next_within(left)? {
            None => return Ok(None),
            Some(line) if line.get("topic").is_some() => return Ok(Some(line)),
            Some(_) => {}
        }
    }
}

fn correlation() -> String {
    let mut bytes = [0; 8];
    // Without a random number two commands of one moment could be taken for one.
    if getrandom::fill(&mut bytes).is_err() {
        bytes.copy_from_slice(&u64::from(std::process::id()).to_be_bytes());
    }
    data_encoding::HEXLOWER.encode(&bytes)
}

// -- watch -----------------------------------------------------------------------------------------------------------

fn watch(name: Option<&str>, common: &Common, look: Look) -> anyhow::Result<()> {
    let place: Place = common.config.place()?;
    let filter = format!("data/{}", name.unwrap_or("#"));
    let mut values = place
        .ask(&json!({ "request": "tail", "filter": filter }))?
        .without_deadline()?;
    while let Some(line) = values.next()? {
        if let Some(lost) = line["lost"].as_u64() {
            eprintln!("{lost} messages were not shown: this terminal is slower than the values");
            continue;
        }
        let (Some(topic), Some(payload)) = (line["topic"].as_str(), line["payload"].as_str()) else {
            continue;
        };
        if common.json {
            say(&format!(
                "{}\n",
                json!({ "topic": topic, "values": serde_json::from_str::<Value>(payload).ok() })
            ))?;
            continue;
        }
        let asset = topic.strip_prefix("data/").unwrap_or(topic);
        let Ok(Value::Object(points)) = serde_json::from_str(payload) else {
            continue;
        };
        let mut out = String::new();
        for (point, reading) in &points {
            out.push_str(&point_line(
                if name.is_some() { "" } else { asset },
                point,
                reading,
                look,
            ));
        }
        say(&out)?;
    }
    Ok(())
}

/// `23:40:03.120 boiler temperature   21.5  good`
fn point_line(asset: &str, point: &str, reading: &Value, look: Look) -> String {
    let time = reading["ts"].as_str().unwrap_or_default();
    let time: String = time.chars().skip(11).take(12).collect();
    let name = match asset {
        "" => tame(point),
        asset => format!("{} {}", tame(asset), tame(point)),
    };
    let value = match &reading["value"] {
        Value::Null => "-".to_owned(),
        Value::String(text) => tame(text),
        value => value.to_string(),
    };
    let quality = reading["q"].as_str().unwrap_or_default();
    let colour = match quality {
        "good" => Colour::Green,
        "bad" => Colour::Red,
        _ => Colour::Yellow,
    };
    let why = reading["why"].as_str().map(tame).unwrap_or_default();
    let head = format!("{time} {:<NAME_COLUMNS$} {value:>14} ", cut(&name, NAME_COLUMNS));
    let painted = look.paint(colour, &format!("{quality:<9}"));
    let room = look.columns.saturating_sub(head.chars().count() + 10);
    let fits = why.chars().count() <= room;
    let line = format!("{head}{painted} {}", if fits { why.as_str() } else { "" });
    let mut out = format!("{}\n", line.trim_end());
    if !fits {
        let below = cut(&why, look.columns.saturating_sub(TIME_COLUMNS));
        out.push_str(&format!("{:TIME_COLUMNS$}{below}\n", ""));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assignments_are_json_or_text() {
        for (text, name, value) in [
            ("a=1.5", "a", json!(1.5)),
            ("valve=true", "valve", json!(true)),
            ("label=hello world", "label", json!("hello world")),
            ("n=\"5\"", "n", json!("5")),
            ("eq=a=b", "eq", json!("a=b")),
            ("empty=", "empty", json!("")),
        ] {
            assert_eq!(assignment(text).expect(text), (name.to_owned(), value));
        }
        assert!(assignment("a").is_err());
    }

    #[test]
    fn a_point_fits_its_line() {
        let reading =
            json!({ "value": null, "ts": "2026-11-24T23:40:03.120Z", "q": "bad", "why": "timeout ".repeat(30) });
        let line = point_line("line-4/boiler", "temperature", &reading, Look::PLAIN);
        assert!(line.starts_with("23:40:03.120 line-4/boiler temperature"), "{line}");
        assert!(
            line.lines().count() == 2 && line.lines().all(|l| l.chars().count() <= 80),
            "{line}"
        );
        let good = json!({ "value": 21.5, "ts": "2026-11-24T23:40:03.120Z", "q": "good" });
        let line = point_line("", "t\x1b[2J", &good, Look::PLAIN);
        assert!(line.ends_with("21.5 good\n") && !line.contains('\x1b'), "{line}");
    }

    #[test]
    fn the_configuration_may_stand_behind_each_of_them() {
        use clap::Parser;
        #[derive(Parser)]
        struct Cli {
            #[command(subcommand)]
            command: Command,
        }
        for arguments in [
            &["x", "list", "--config", "a.toml"][..],
            &["x", "read", "boiler", "t", "p", "--config", "a.toml"],
            &["x", "write", "boiler", "t=1", "--config", "a.toml", "--timeout", "3"],
            &["x", "watch", "boiler", "--config", "a.toml", "--json"],
        ] {
            let cli = Cli::try_parse_from(arguments).unwrap_or_else(|e| panic!("{e}"));
            let (Command::List { common, .. }
            | Command::Read { common, .. }
            | Command::Write { common, .. }
            | Command::Watch { common, .. }) = &cli.command;
            assert_eq!(common.config.config.as_ref(), Some(&std::path::PathBuf::from("a.toml")));
        }
        assert!(Cli::try_parse_from(["x", "write", "boiler"]).is_err());
    }
}
