//! `tidegate top`: rates, queues and parts of the running gateway, once a period.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use anyhow::Context;
use serde_json::{Value, json};

use super::client::Place;
use super::status::{health_colour, list, text};
use super::terminal::{self, Colour, Look, cut};

#[derive(Debug, clap::Args)]
pub(super) struct TopArgs {
    /// The time between two looks
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = super::period)]
    every: Duration,
    /// One table after one period, then the end
    #[arg(long)]
    once: bool,
    /// One JSON object a line, for programs
    #[arg(long)]
    json: bool,
}

pub(super) fn run(place: &Place, args: &TopArgs, look: Look) -> anyhow::Result<()> {
    let every_ms = args.every.as_millis() as u64;
    let request = json!({ "request": "status", "every_ms": every_ms });
    let mut answer = place.ask(&request)?.without_deadline()?;
    let mut before = answer.next()?.context("the gateway's answer is empty")?;
    let mut first = true;
    while let Some(now) = answer.next()? {
        let rates = rates(&before, &now);
        let out = if args.json {
            format!("{}\n", as_json(&now, &rates))
        } else {
            let table = draw(&now, &rates, look);
            match (look.is_terminal && !args.once, first) {
                // Home, draw over, clear the rest: no flicker.
                (true, _) => {
                    let shown: String = table
                        .lines()
                        .take(look.rows.saturating_sub(1))
                        .map(|line| format!("{line}\x1b[K\n"))
                        .collect();
                    format!("{}\x1b[H{shown}\x1b[J", if first { "\x1b[2J" } else { "" })
                }
                (false, true) => table,
                (false, false) => format!("\n{table}"),
            }
        };
        if !super::say_on(&out)? || args.once {
            return Ok(());
        }
        before = now;
        first = false;
    }
    Ok(())
}

type PartKey = (String, String);

/// What changed in a second.
#[derive(Debug, Default, PartialEq)]
struct Rates {
    /// By kind and name of the part, then by counter; those that changed.
    parts: BTreeMap<PartKey, BTreeMap<String, f64>>,
    /// By consumer: messages that wait.
    queues: BTreeMap<String, f64>,
}

impl Rates {
    fn of(&self, kind: &str, counter: &str) -> f64 {
        let of_kind = self.parts.iter().filter(|((k, _), _)| k == kind);
        of_kind.filter_map(|(_, rates)| rates.get(counter)).sum::<f64>() + 0.0
    }
}

fn rates(before: &Value, now: &Value) -> Rates {
    let at = |report: &Value| report["uptime_ms"].as_f64().unwrap_or(0.0);
    let seconds = ((at(now) - at(before)) / 1000.0).max(0.001);
    let key = |part: &Value| (text(&part["kind"]), text(&part["name"]));
    let mut rates = Rates::default();
    for part in list(now, "parts") {
        let Some(old) = list(before, "parts").find(|old| key(old) == key(part)) else {
            continue;
        };
        for (name, value) in part["counters"].as_object().into_iter().flatten() {
            let change = value.as_f64().unwrap_or(0.0) - old["counters"][name].as_f64().unwrap_or(0.0);
            // A part that was started anew counts from nothing; times are no rates.
            if change > 0.0 && !name.ends_with("_ms") {
                rates
                    .parts
                    .entry(key(part))
                    .or_default()
                    .insert(name.clone(), change / seconds);
            }
        }
    }
    for consumer in list(now, "consumers") {
        if let Some(old) = list(before, "consumers").find(|old| old["name"] == consumer["name"]) {
            let waiting = |c: &Value| c["queued_messages"].as_f64().unwrap_or(0.0);
            let change = (waiting(consumer) - waiting(old)) / seconds;
            rates.queues.insert(text(&consumer["name"]), change);
        }
    }
    rates
}

fn as_json(report: &Value, rates: &Rates) -> Value {
    let mut out = report.clone();
    for part in out["parts"].as_array_mut().into_iter().flatten() {
        let key = (text(&part["kind"]), text(&part["name"]));
        part["rates_per_s"] = json!(rates.parts.get(&key).cloned().unwrap_or_default());
    }
    for consumer in out["consumers"].as_array_mut().into_iter().flatten() {
        let name = text(&consumer["name"]);
        consumer["change_per_s"] = json!(rates.queues.get(&name).copied().unwrap_or(0.0));
    }
    out["messages_in_per_s"] = json!(rates.of("broker", "messages_received"));
    out["messages_out_per_s"] = json!(rates.of("broker", "messages_delivered"));
    out
}

/// Queues that are shown; the longest first.
const QUEUES_MAX: usize = 12;

fn draw(report: &Value, rates: &Rates, look: Look) -> String {
    let number = |kind: &str, counter: &str| -> f64 {
        let parts = list(report, "parts").filter(|p| p["kind"] == kind);
        parts.filter_map(|p| p["counters"][counter].as_f64()).sum::<f64>() + 0.0
    };
    let mut out = String::new();
    let title = format!(
        "{} · tidegate {} · up {}",
        text(&report["gateway"]),
        text(&report["version"]),
        terminal::duration(report["uptime_s"].as_u64().unwrap_or(0))
    );
    let _ = writeln!(out, "{}", look.paint(Colour::Bold, &cut(&title, look.columns)));
    let count = terminal::count;
    let _ = writeln!(
        out,
        "in {}/s · out {}/s · stored {}/s · dropped {}/s",
        count(rates.of("broker", "messages_received")),
        count(rates.of("broker", "messages_delivered")),
        count(rates.of("log", "messages")),
        count(rates.of("broker", "messages_dropped")),
    );
    let _ = writeln!(
        out,
        "clients {} · sessions {} · subscriptions {} · retained {}",
        count(number("broker", "connections")),
        count(number("broker", "sessions")),
        count(number("broker", "subscriptions")),
        count(number("broker", "retained")),
    );
    let mut queues: Vec<&Value> = list(report, "consumers").collect();
    queues.sort_by_key(|c| std::cmp::Reverse(c["queued_messages"].as_u64()));
    if !queues.is_empty() {
        let header = format!("{:<36} {:>12} {:>12} {:>12}", "QUEUE", "WAITING", "BYTES", "CHANGE");
        let _ = writeln!(out, "\n{}", look.paint(Colour::Dim, &header));
    }
    for queue in queues.iter().take(QUEUES_MAX) {
        let name = text(&queue["name"]);
        let change = rates.queues.get(&name).copied().unwrap_or(0.0);
        let sign = match change {
            c if c > 0.0 => "+",
            c if c < 0.0 => "-",
            _ => "",
        };
        let change = format!("{sign}{}/s", count(change.abs()));
        let _ = writeln!(
            out,
            "{:<36} {:>12} {:>12} {:>12}",
            cut(&name, 36),
            count(queue["queued_messages"].as_f64().unwrap_or(0.0)),
            terminal::bytes(queue["queued_bytes"].as_u64().unwrap_or(0)),
            change,
        );
    }
    if queues.len() > QUEUES_MAX {
        let _ = writeln!(out, "… and {} more", queues.len() - QUEUES_MAX);
    }
    let header = format!("{:<28} {:<9} {}", "PART", "HEALTH", "RATES");
    let _ = writeln!(out, "\n{}", look.paint(Colour::Dim, &header));
    for part in list(report, "parts") {
        let key = (text(&part["kind"]), text(&part["name"]));
        let name = cut(&format!("{} {}", key.0, key.1), 28);
        let health = text(&part["health"]);
        let said = match (rates.parts.get(&key), health.as_str()) {
            (_, "failed" | "late") => text(&part["text"]),
            (Some(rates), _) => {
                let rates: Vec<String> = rates
                    .iter()
                    .map(|(name, rate)| match name.starts_with("bytes") {
                        true => format!("{name} {}/s", terminal::bytes(*rate as u64)),
                        false => format!("{name} {}/s", count(*rate)),
                    })
                    .collect();
                rates.join(", ")
            }
            (None, _) => String::new(),
        };
        let painted = look.paint(health_colour(&health), &format!("{health:<9}"));
        let said = cut(&said, look.columns.saturating_sub(39));
        let _ = writeln!(out, "{}", format!("{name:<28} {painted} {said}").trim_end());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(uptime_ms: u64, received: u64, waiting: u64) -> Value {
        json!({
            "gateway": "line-4", "version": "0.1.0", "uptime_s": uptime_ms / 1000, "uptime_ms": uptime_ms,
            "parts": [
                {"kind": "broker", "name": "broker", "health": "good", "text": "",
                 "counters": {"messages_received": received, "connections": 3, "messages_delivered": 0}},
                {"kind": "uplink", "name": "cloud", "health": "failed", "text": "x".repeat(200), "counters": {"sent": 5, "acknowledged_last_ms": uptime_ms}},
            ],
            "streams": [],
            "consumers": [{"name": "uplink:cloud", "queued_messages": waiting, "queued_bytes": waiting * 10}],
        })
    }

    #[test]
    fn rates_are_by_the_gateways_own_clock() {
        let (before, now) = (report(1_000, 100, 50), report(3_000, 400, 40));
        let rates = rates(&before, &now);
        assert_eq!(rates.of("broker", "messages_received"), 150.0);
        assert_eq!(rates.queues["uplink:cloud"], -5.0);
        assert_eq!(
            rates.parts.len(),
            1,
            "what did not change, and times, are left out: {rates:?}"
        );
        let json = as_json(&now, &rates);
        assert_eq!(json["messages_in_per_s"], 150.0);
        assert_eq!(json["consumers"][0]["change_per_s"], -5.0);
        assert_eq!(json["parts"][0]["rates_per_s"]["messages_received"], 150.0);
        let table = draw(&now, &rates, Look::PLAIN);
        assert!(
            table.lines().all(|l| l.chars().count() <= 80 && !l.ends_with(' ')),
            "{table}"
        );
        assert!(
            table.contains("in 150/s") && table.contains("clients 3") && table.contains("-5/s"),
            "{table}"
        );
    }

    #[test]
    fn a_part_that_began_anew_has_no_rate() {
        let (before, now) = (report(1_000, 100, 0), report(2_000, 5, 0));
        assert_eq!(rates(&before, &now).of("broker", "messages_received"), 0.0);
    }
}
