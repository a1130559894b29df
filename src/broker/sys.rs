//! `$SYS`: the topics that mosquitto's users know, and a few of ours, made of plain numbers. Pure, time as a parameter.
//!
//! What the connections count is counted here too: cells of the one thread, so a count costs an addition.

use std::cell::Cell;
use std::time::Duration;

/// What passes the sockets, since the start.
#[derive(Debug, Default)]
pub struct Tally {
    pub bytes_in: Cell<u64>,
    pub bytes_out: Cell<u64>,
    /// Packets of all kinds; those out without PUBLISH, which the core counts.
    pub packets_in: Cell<u64>,
    pub packets_out: Cell<u64>,
    pub sockets: Cell<u64>,
    pub connects: Cell<u64>,
    pub logins_failed: Cell<u64>,
    /// How often a client was made to wait by its rate.
    pub throttled: Cell<u64>,
}

pub fn add(cell: &Cell<u64>, n: u64) {
    cell.set(cell.get().wrapping_add(n));
}

/// What is counted up, and shown as a load: so many a minute.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Counts {
    pub messages_received: u64,
    pub messages_sent: u64,
    pub publish_received: u64,
    pub publish_sent: u64,
    pub publish_dropped: u64,
    pub publish_bytes_received: u64,
    pub publish_bytes_sent: u64,
    pub bytes_received: u64,
    pub bytes_sent: u64,
    pub sockets: u64,
    pub connections: u64,
}

const LOADS: usize = 9;
const LOAD_NAMES: [&str; LOADS] = [
    "messages/received",
    "messages/sent",
    "publish/received",
    "publish/sent",
    "publish/dropped",
    "bytes/received",
    "bytes/sent",
    "sockets",
    "connections",
];

impl Counts {
    fn loads(&self) -> [u64; LOADS] {
        [
            self.messages_received,
            self.messages_sent,
            self.publish_received,
            self.publish_sent,
            self.publish_dropped,
            self.bytes_received,
            self.bytes_sent,
            self.sockets,
            self.connections,
        ]
    }
}

/// Moving averages of 1, 5 and 15 minutes, by the formula of mosquitto (and of Unix' load).
#[derive(Debug, Default)]
pub struct Loads {
    before: [u64; LOADS],
    averages: [[f64; 3]; LOADS],
}

impl Loads {
    pub fn advance(&mut self, counts: &Counts, passed: Duration) {
        let seconds = passed.as_secs_f64();
        if seconds <= 0.0 {
            return;
        }
        let now = counts.loads();
        for ((averages, now), before) in self.averages.iter_mut().zip(now).zip(self.before) {
            let per_minute = now.saturating_sub(before) as f64 / seconds * 60.0;
            for (average, minutes) in averages.iter_mut().zip([1.0, 5.0, 15.0]) {
                let kept = (-seconds / (minutes * 60.0)).exp();
                *average = per_minute + kept * (*average - per_minute);
            }
        }
        self.before = now;
    }
}

/// What is as it is now.
#[derive(Debug, Clone, Default)]
pub struct State {
    pub uptime_s: u64,
    pub connected: u64,
    pub sessions: u64,
    pub sessions_maximum: u64,
    pub expired: u64,
    pub subscriptions: u64,
    pub retained: u64,
    pub retained_bytes: u64,
    pub stored: u64,
    pub stored_bytes: u64,
    pub gateway: String,
    pub lost: u64,
    pub throttled: u64,
    pub logins_failed: u64,
    /// Parts by their health: good, starting, late, failed.
    pub parts: [u64; 4],
}

/// Every topic and its value.
pub fn topics(state: &State, counts: &Counts, loads: &Loads) -> Vec<(String, String)> {
    let mut out = Vec::with_capacity(80);
    let mut put = |topic: &str, value: String| out.push((format!("$SYS/{topic}"), value));
    put(
        "broker/version",
        format!("tidegate version {}", env!("CARGO_PKG_VERSION")),
    );
    put("broker/uptime", format!("{} seconds", state.uptime_s));
    let away = state.sessions.saturating_sub(state.connected);
    let numbers = [
        ("broker/clients/total", state.sessions),
        ("broker/clients/maximum", state.sessions_maximum),
        ("broker/clients/connected", state.connected),
        ("broker/clients/active", state.connected),
        ("broker/clients/disconnected", away),
        ("broker/clients/inactive", away),
        ("broker/clients/expired", state.expired),
        ("broker/messages/received", counts.messages_received),
        ("broker/messages/sent", counts.messages_sent),
        ("broker/messages/stored", state.stored + state.retained),
        ("broker/store/messages/count", state.stored + state.retained),
        ("broker/store/messages/bytes", state.stored_bytes + state.retained_bytes),
        ("broker/retained messages/count", state.retained),
        ("broker/subscriptions/count", state.subscriptions),
        ("broker/publish/messages/received", counts.publish_received),
        ("broker/publish/messages/sent", counts.publish_sent),
        ("broker/publish/messages/dropped", counts.publish_dropped),
        ("broker/publish/bytes/received", counts.publish_bytes_received),
        ("broker/publish/bytes/sent", counts.publish_bytes_sent),
        ("broker/bytes/received", counts.bytes_received),
        ("broker/bytes/sent", counts.bytes_sent),
        ("tidegate/log/messages", state.stored),
        ("tidegate/log/bytes", state.stored_bytes),
        ("tidegate/log/lost", state.lost),
        ("tidegate/clients/throttled", state.throttled),
        ("tidegate/logins/failed", state.logins_failed),
        ("tidegate/parts/good", state.parts[0]),
        ("tidegate/parts/starting", state.parts[1]),
        ("tidegate/parts/late", state.parts[2]),
        ("tidegate/parts/failed", state.parts[3]),
    ];
    for (topic, number) in numbers {
        put(topic, number.to_string());
    }
    put("tidegate/gateway", state.gateway.clone());
    for (name, averages) in LOAD_NAMES.iter().zip(loads.averages) {
        for (minutes, average) in ["1min", "5min", "15min"].iter().zip(averages) {
            put(&format!("broker/load/{name}/{minutes}"), format!("{average:.2}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_steady_rate_is_its_own_average_and_silence_fades() {
        let mut loads = Loads::default();
        let mut counts = Counts::default();
        for _ in 0..3_000 {
            counts.publish_received += 50;
            loads.advance(&counts, Duration::from_secs(10));
        }
        let of = |loads: &Loads| loads.averages[2].map(|a| a.round());
        assert_eq!(of(&loads), [300.0, 300.0, 300.0]);
        for _ in 0..6 {
            loads.advance(&counts, Duration::from_secs(10));
        }
        let expected = [1.0f64, 5.0, 15.0].map(|m| (300.0 * (-1.0 / m).exp()).round());
        assert_eq!(of(&loads), expected, "a minute of silence");
        loads.advance(&counts, Duration::ZERO);
        assert_eq!(of(&loads), expected, "no time, no change");
    }

    #[test]
    fn every_topic_is_one_once() {
        let all = topics(&State::default(), &Counts::default(), &Loads::default());
        let mut names: Vec<&str> = all.iter().map(|(t, _)| t.as_str()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), all.len());
        for (topic, value) in &all {
            assert!(
                crate::message::Topic::new(topic.as_str()).is_ok() && topic.starts_with("$SYS/"),
                "{topic}"
            );
            assert!(!value.is_empty() || topic == "$SYS/tidegate/gateway", "{topic}");
        }
    }
}
