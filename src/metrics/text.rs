//! The text format of Prometheus (version 0.0.4): families with HELP and TYPE, then their samples. Pure.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use super::table::{self, Kind};
use crate::status::{Health, PartReport};

/// What there is to say at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    pub gateway: String,
    pub version: &'static str,
    pub uptime_s: f64,
    pub parts: Vec<PartReport>,
    pub streams: Vec<Stream>,
    pub consumers: Vec<Consumer>,
    pub process: Process,
}

#[derive(Debug)]
pub struct Stream {
    pub name: String,
    pub messages: u64,
    pub bytes: u64,
    pub bytes_max: Option<u64>,
}

#[derive(Debug)]
pub struct Consumer {
    pub name: String,
    pub messages: u64,
    pub bytes: u64,
}

/// None where the system does not say it.
#[derive(Debug, Default)]
pub struct Process {
    pub cpu_s: Option<f64>,
    pub resident_bytes: Option<u64>,
    pub open_fds: Option<u64>,
    pub max_fds: Option<u64>,
    pub started_s: Option<f64>,
}

/// In the order in which families begin; the samples of one stand together, as the format demands.
#[derive(Default)]
struct Page {
    families: Vec<Family>,
    by_name: BTreeMap<String, usize>,
}

struct Family {
    name: String,
    counter: bool,
    help: &'static str,
    samples: String,
}

impl Page {
    fn put(&mut self, name: &str, counter: bool, help: &'static str, labels: &[(&str, &str)], value: f64) {
        let at = *self.by_name.entry(name.to_owned()).or_insert_with(|| {
            self.families.push(Family {
                name: name.to_owned(),
                counter,
                help,
                samples: String::new(),
            });
            self.families.len() - 1
        });
        let samples = &mut self.families[at].samples;
        samples.push_str(name);
        for (nth, (label, text)) in labels.iter().enumerate() {
            let _ = write!(
                samples,
                "{}{label}=\"{}\"",
                if nth == 0 { '{' } else { ',' },
                escaped(text)
            );
        }
        if !labels.is_empty() {
            samples.push('}');
        }
        let _ = writeln!(samples, " {value}");
    }

    fn text(&self) -> String {
        let mut out = String::new();
        for family in &self.families {
            let kind = if family.counter { "counter" } else { "gauge" };
            let _ = writeln!(out, "# HELP {} {}", family.name, family.help);
            let _ = writeln!(out, "# TYPE {} {kind}", family.name);
            out.push_str(&family.samples);
        }
        out
    }
}

/// Names come from gateway.toml, client ids from anybody.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    out
}

/// Sessions, and groups of shared subscriptions, are as many as clients make: together they are one sample, so that the
/// number of series is bounded by the configuration.
const SESSIONS: [&str; 2] = ["session:", "share:"];

pub fn render(now: &Snapshot) -> String {
    let mut page = Page::default();
    let info = [("version", now.version), ("gateway", now.gateway.as_str())];
    page.put("tidegate_build_info", false, "What runs here; always 1.", &info, 1.0);
    page.put(
        "tidegate_uptime_seconds",
        false,
        "Time since the gateway began to serve.",
        &[],
        now.uptime_s,
    );
    for part in &now.parts {
        for (health, word) in [
            (Health::Starting, "starting"),
            (Health::Good, "good"),
            (Health::Late, "late"),
            (Health::Failed, "failed"),
        ] {
            let labels = [("kind", part.kind), ("name", &part.name), ("health", word)];
            let is = if part.health == health { 1.0 } else { 0.0 };
            let help = "How each part is: 1 for the state that it is in.";
            page.put("tidegate_part_health", false, help, &labels, is);
        }
    }
    for part in &now.parts {
        // There is one log and one broker.
        let name = [("name", part.name.as_str())];
        let labels: &[(&str, &str)] = if part.kind == part.name { &[] } else { &name };
        for (counter, value) in &part.counters {
            let value = *value as f64;
            match table::find(part.kind, counter) {
                Some((metric, behaves, help)) => {
                    let value = if behaves == Kind::Millis { value / 1000.0 } else { value };
                    let metric = format!("tidegate_{metric}");
                    page.put(&metric, behaves == Kind::Counter, help, labels, value);
                }
                None => {
                    let metric = format!("tidegate_{}_{counter}", part.kind);
                    page.put(&metric, false, "A count of this part.", labels, value);
                }
            }
        }
    }
    for stream in &now.streams {
        let labels = [("stream", stream.name.as_str())];
        let help = "Messages kept in the stream.";
        page.put("tidegate_stream_messages", false, help, &labels, stream.messages as f64);
        let help = "Bytes of messages kept in the stream.";
        page.put("tidegate_stream_bytes", false, help, &labels, stream.bytes as f64);
        if let Some(most) = stream.bytes_max {
            let help = "The stream's limit (max_bytes).";
            page.put("tidegate_stream_limit_bytes", false, help, &labels, most as f64);
        }
    }
    let (mut sessions, mut session_messages, mut session_bytes) = (0u64, 0u64, 0u64);
    let (queued, queued_bytes) = (
        "Messages that wait for the consumer.",
        "Bytes that wait for the consumer.",
    );
    for consumer in &now.consumers {
        if SESSIONS.iter().any(|s| consumer.name.starts_with(s)) {
            sessions += 1;
            session_messages += consumer.messages;
            session_bytes += consumer.bytes;
            continue;
        }
        let labels = [("consumer", consumer.name.as_str())];
        page.put(
            "tidegate_consumer_queued_messages",
            false,
            queued,
            &labels,
            consumer.messages as f64,
        );
        page.put(
            "tidegate_consumer_queued_bytes",
            false,
            queued_bytes,
            &labels,
            consumer.bytes as f64,
        );
    }
    let help = "Durable sessions of clients.";
    page.put("tidegate_durable_sessions", false, help, &[], sessions as f64);
    let help = "Messages that wait for durable sessions, all together.";
    page.put(
        "tidegate_durable_sessions_queued_messages",
        false,
        help,
        &[],
        session_messages as f64,
    );
    let help = "Bytes that wait for durable sessions, all together.";
    page.put(
        "tidegate_durable_sessions_queued_bytes",
        false,
        help,
        &[],
        session_bytes as f64,
    );
    let p = &now.process;
    let values = [
        ("process_cpu_seconds_total", true, "User and system time.", p.cpu_s),
        (
            "process_resident_memory_bytes",
            false,
            "Resident memory.",
            p.resident_bytes.map(|n| n as f64),
        ),
        (
            "process_open_fds",
            false,
            "Open file descriptors.",
            p.open_fds.map(|n| n as f64),
        ),
        (
            "process_max_fds",
            false,
            "The most file descriptors.",
            p.max_fds.map(|n| n as f64),
        ),
        (
            "process_start_time_seconds",
            false,
            "When the process began, since 1970, by the clock of now.",
            p.started_s,
        ),
    ];
    for (name, counter, help, value) in values {
        if let Some(value) = value {
            page.put(name, counter, help, &[], value);
        }
    }
    page.text()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(kind: &'static str, name: &str, counters: &[(&'static str, u64)]) -> PartReport {
        PartReport {
            kind,
            name: name.to_owned(),
            health: Health::Late,
            text: String::new(),
            since: String::new(),
            counters: counters.iter().copied().collect(),
        }
    }

    #[test]
    fn families_stand_together_and_labels_are_escaped() {
        let consumer = |name: &str| Consumer {
            name: name.to_owned(),
            messages: 3,
            bytes: 9,
        };
        let now = Snapshot {
            gateway: "a\"b\\c\nd".to_owned(),
            version: "0.1.0",
            parts: vec![
                part("broker", "broker", &[("messages_received", 7)]),
                part("uplink", "a", &[("sent", 1), ("acknowledged_last_ms", 1500)]),
                part("uplink", "b", &[("sent", 2), ("something_new", 4)]),
            ],
            consumers: vec![consumer("uplink:a"), consumer("session:x"), consumer("session:y")],
            ..Snapshot::default()
        };
        let text = render(&now);
        for line in [
            r#"tidegate_build_info{version="0.1.0",gateway="a\"b\\c\nd"} 1"#,
            "tidegate_broker_messages_received_total 7",
            r#"tidegate_uplink_last_acknowledged_timestamp_seconds{name="a"} 1.5"#,
            r#"tidegate_part_health{kind="uplink",name="b",health="late"} 1"#,
            r#"tidegate_part_health{kind="uplink",name="b",health="good"} 0"#,
            r#"tidegate_uplink_something_new{name="b"} 4"#,
            r#"tidegate_consumer_queued_messages{consumer="uplink:a"} 3"#,
            "tidegate_durable_sessions 2",
            "tidegate_durable_sessions_queued_bytes 18",
            "# TYPE tidegate_uplink_messages_sent_total counter\ntidegate_uplink_messages_sent_total{name=\"a\"} 1\ntidegate_uplink_messages_sent_total{name=\"b\"} 2",
        ] {
            assert!(text.contains(&format!("{line}\n")), "{line} in\n{text}");
        }
        let mut families: Vec<&str> = text.lines().filter_map(|l| l.strip_prefix("# TYPE ")).collect();
        let count = families.len();
        families.sort_unstable();
        families.dedup();
        assert_eq!(families.len(), count, "each family once");
    }
}
