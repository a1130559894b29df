//! `tidegate status`: how the running gateway and each of its parts is.

use std::fmt::Write as _;

use anyhow::bail;
use serde_json::{Value, json};

use super::client::Place;
use super::terminal::{self, Colour, Look, tame};

/// The width of the first column.
const NAME_COLUMNS: usize = 26;

pub(super) fn ask(place: &Place, json: bool, look: Look) -> anyhow::Result<String> {
    let report = place.ask(&json!({ "request": "status" }))?.only()?;
    if json {
        return Ok(format!("{report}\n"));
    }
    draw(&report, look)
}

pub(super) fn text(value: &Value) -> String {
    tame(value.as_str().unwrap_or_default())
}

pub(super) fn list<'v>(report: &'v Value, key: &str) -> impl Iterator<Item = &'v Value> {
    report[key].as_array().into_iter().flatten()
}

pub(super) fn health_colour(health: &str) -> Colour {
    match health {
        "good" => Colour::Green,
        "failed" => Colour::Red,
        _ => Colour::Yellow,
    }
}

fn draw(report: &Value, look: Look) -> anyhow::Result<String> {
    if !report["parts"].is_array() {
        bail!("the gateway's answer is not understood; are both of one version?");
    }
    let mut out = format!(
        "{} · tidegate {} · up {}\n\n",
        text(&report["gateway"]),
        text(&report["version"]),
        terminal::duration(report["uptime_s"].as_u64().unwrap_or(0))
    );
    for part in list(report, "parts") {
        let name = format!("{} {}", text(&part["kind"]), text(&part["name"]));
        let health = text(&part["health"]);
        let said = match (health.as_str(), text(&part["text"])) {
            ("good" | "starting", said) => said,
            // When it began matters where something is wrong.
            (_, said) => format!("since {}: {said}", text(&part["since"])),
        };
        let painted = look.paint(health_colour(&health), &format!("{health:<9}"));
        line(&mut out, &name, &painted, 9, &said, look);
    }
    let mut began = false;
    for stream in list(report, "streams") {
        if !std::mem::replace(&mut began, true) {
            out.push('\n');
        }
        let mut said = format!(
            "{} messages, {} kept",
            stream["messages"],
            terminal::bytes(stream["bytes"].as_u64().unwrap_or(0))
        );
        if let Some(most) = stream["max_bytes"].as_u64() {
            let _ = write!(said, " of {}", terminal::bytes(most));
        }
        line(
            &mut out,
            &format!("stream {}", text(&stream["name"])),
            "",
            0,
            &said,
            look,
        );
    }
    for consumer in list(report, "consumers") {
        let said = format!(
            "{} messages, {} waiting",
            consumer["queued_messages"],
            terminal::bytes(consumer["queued_bytes"].as_u64().unwrap_or(0))
        );
        line(&mut out, &text(&consumer["name"]), "", 0, &said, look);
    }
    Ok(out)
}

/// A name, something painted of so many columns, and text that goes on below itself.
pub(super) fn line(out: &mut String, name: &str, painted: &str, painted_columns: usize, said: &str, look: Look) {
    let indent = NAME_COLUMNS + 1 + if painted_columns > 0 { painted_columns + 1 } else { 0 };
    let head = if painted_columns > 0 {
        format!("{painted} ")
    } else {
        String::new()
    };
    let _ = write!(out, "{:<NAME_COLUMNS$} {head}", terminal::cut(name, NAME_COLUMNS));
    let lines = terminal::wrap(said, look.columns.saturating_sub(indent).max(20));
    for (at, part) in lines.iter().enumerate() {
        if at > 0 {
            let _ = write!(out, "{:indent$}", "");
        }
        let _ = writeln!(out, "{part}");
    }
    // No spaces at a line's end.
    while out.ends_with(" \n") {
        out.truncate(out.trim_end_matches([' ', '\n']).len());
        out.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_fits_80_columns_and_paints_only_where_asked() {
        let long = "the name broker.example does not resolve: is the network up, is the name right? tried again in 4 s";
        let report = json!({
            "gateway": "line-4\u{1b}[2J", "version": "0.1.0", "uptime_s": 61,
            "parts": [
                {"kind": "uplink", "name": "a-name-that-is-much-longer-than-its-column", "health": "failed", "text": long, "since": "2026-11-24T23:40:03.120Z"},
                {"kind": "log", "name": "log", "health": "good", "text": "", "since": ""},
            ],
            "streams": [{"name": "default", "messages": 12, "bytes": 4096, "max_bytes": 1u64 << 30}],
            "consumers": [{"name": "uplink:cloud", "queued_messages": 1, "queued_bytes": 10}],
        });
        let plain = draw(&report, Look::PLAIN).expect("drawn");
        assert!(
            plain.lines().all(|l| l.chars().count() <= 80 && !l.ends_with(' ')),
            "{plain}"
        );
        assert!(!plain.contains('\x1b'), "{plain}");
        assert!(
            plain.contains("since 2026-11-24T23:40:03.120Z") && plain.contains("12 messages, 4.0 KiB kept of 1.0 GiB")
        );
        let colours = Look {
            colours: true,
            ..Look::PLAIN
        };
        assert!(
            draw(&report, colours)
                .expect("drawn")
                .contains("\x1b[31mfailed   \x1b[0m")
        );
        assert!(draw(&json!({}), Look::PLAIN).is_err());
    }
}
