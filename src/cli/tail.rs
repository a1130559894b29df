//! `tidegate tail FILTER`: live messages as they pass the broker.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::client::Place;
use super::status::text;
use super::terminal::{Colour, Look, tame};

#[derive(Debug, clap::Args)]
pub(super) struct TailArgs {
    /// Which topics, in quotes: 'sensors/#'. Topics that begin with $ are matched only by filters that do
    filter: String,
    /// Also QoS, source and properties
    #[arg(short, long)]
    verbose: bool,
    /// End after so many messages
    #[arg(short = 'n', long, value_name = "COUNT")]
    count: Option<u64>,
    /// One JSON object a line, for programs
    #[arg(long)]
    json: bool,
}

pub(super) fn run(place: &Place, args: &TailArgs, look: Look) -> anyhow::Result<()> {
    let request = json!({ "request": "tail", "filter": args.filter });
    let mut answer = place.ask(&request)?.without_deadline()?;
    let mut shown = 0;
    while args.count.is_none_or(|count| shown < count) {
        let Some(line) = answer.next()? else { return Ok(()) };
        if line.get("listening").is_some() {
            // On stderr, so that stdout has messages alone.
            eprintln!("listening to {}", tame(&args.filter));
            continue;
        }
        let out = match (args.json, line["lost"].as_u64()) {
            (true, _) => format!("{line}\n"),
            (false, Some(lost)) => format!("… {lost} messages were too fast to be shown\n"),
            (false, None) => draw(&line, args.verbose, look),
        };
        if line.get("lost").is_none() {
            shown += 1;
        }
        if !super::say_on(&out)? {
            return Ok(());
        }
    }
    Ok(())
}

/// `text` where there is one, else its bytes as digits.
fn bytes_of(message: &Value, name: &str) -> Option<String> {
    let hex = || message[format!("{name}_hex")].as_str().map(|hex| format!("hex {hex}"));
    message[name].as_str().map(tame).or_else(hex)
}

fn draw(message: &Value, verbose: bool, look: Look) -> String {
    let time = text(&message["time"]);
    // The day is known to who looks at it live.
    let time = time.split_once('T').map_or(time.as_str(), |(_, time)| time);
    let payload = bytes_of(message, "payload").unwrap_or_default();
    let mut out = format!(
        "{} {} {payload}",
        look.paint(Colour::Dim, time.trim_end_matches('Z')),
        look.paint(Colour::Bold, &text(&message["topic"])),
    );
    out.truncate(out.trim_end().len());
    out.push('\n');
    if !verbose {
        return out;
    }
    let retain = if message["retain"] == true { ", retain" } else { "" };
    let _ = writeln!(
        out,
        "    qos {}{retain}, from {}",
        message["qos"],
        text(&message["source"])
    );
    for (name, label) in [("content_type", "content type"), ("response_topic", "response topic")] {
        if let Some(value) = message[name].as_str() {
            let _ = writeln!(out, "    {label}: {}", tame(value));
        }
    }
    if let Some(data) = bytes_of(message, "correlation") {
        let _ = writeln!(out, "    correlation: {data}");
    }
    if let Some(expiry_s) = message["expiry_s"].as_u64() {
        let _ = writeln!(out, "    expires {expiry_s} s after its time");
    }
    for pair in message["user"].as_array().into_iter().flatten() {
        let _ = writeln!(out, "    {} = {}", text(&pair[0]), text(&pair[1]));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_a_line_and_its_properties_follow_where_asked() {
        let message = json!({"time": "2026-11-24T23:40:03.120Z", "topic": "a/b", "payload": "x\n\u{1b}[2J", "qos": 1,
            "retain": true, "source": "client:c", "user": [["k", "v"]], "correlation_hex": "00ff", "expiry_s": 3});
        assert_eq!(
            draw(&message, false, Look::PLAIN),
            "23:40:03.120 a/b x\u{fffd}\u{fffd}[2J\n"
        );
        let verbose = draw(&message, true, Look::PLAIN);
        for part in [
            "qos 1, retain, from client:c",
            "k = v",
            "correlation: hex 00ff",
            "expires 3 s",
        ] {
            assert!(verbose.contains(part), "{verbose}");
        }
        let binary = json!({"time": "T1Z", "topic": "a", "payload_hex": "fe"});
        assert_eq!(draw(&binary, false, Look::PLAIN), "1 a hex fe\n");
    }
}
