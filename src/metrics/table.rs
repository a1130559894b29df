//! What each counter of a part is called for Prometheus. A test holds it against the source.

/// How a number behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only rises, from nothing at each start.
    Counter,
    Gauge,
    /// A gauge that the part keeps in milliseconds, shown in seconds.
    Millis,
}

use Kind::{Counter, Gauge, Millis};

/// The part's kind and counter, the metric, what it is.
pub const COUNTERS: &[(&str, &str, &str, Kind, &str)] = &[
    (
        "broker",
        "connections",
        "broker_connections",
        Gauge,
        "MQTT clients that are connected.",
    ),
    (
        "broker",
        "sessions",
        "broker_sessions",
        Gauge,
        "Sessions, connected or kept for clients that are away.",
    ),
    (
        "broker",
        "subscriptions",
        "broker_subscriptions",
        Gauge,
        "Subscriptions of all sessions.",
    ),
    (
        "broker",
        "retained",
        "broker_retained_messages",
        Gauge,
        "Retained messages.",
    ),
    (
        "broker",
        "messages_received",
        "broker_messages_received_total",
        Counter,
        "Messages published by clients and by parts of the gateway.",
    ),
    (
        "broker",
        "messages_delivered",
        "broker_messages_delivered_total",
        Counter,
        "Messages delivered to clients.",
    ),
    (
        "broker",
        "messages_dropped",
        "broker_messages_dropped_total",
        Counter,
        "Messages that a client was too slow for.",
    ),
    (
        "broker",
        "payload_bytes_received",
        "broker_payload_bytes_received_total",
        Counter,
        "Bytes of payload published by clients and by parts of the gateway.",
    ),
    (
        "broker",
        "payload_bytes_delivered",
        "broker_payload_bytes_delivered_total",
        Counter,
        "Bytes of payload delivered to clients.",
    ),
    (
        "broker",
        "bytes_received",
        "broker_bytes_received_total",
        Counter,
        "Bytes received from clients.",
    ),
    (
        "broker",
        "bytes_sent",
        "broker_bytes_sent_total",
        Counter,
        "Bytes sent to clients.",
    ),
    (
        "broker",
        "unauthenticated",
        "broker_unauthenticated_connections",
        Gauge,
        "Connections that have not said who they are yet.",
    ),
    (
        "broker",
        "turned_away",
        "broker_turned_away_total",
        Counter,
        "Connections that were closed because too many had not said who they are.",
    ),
    (
        "broker",
        "throttled",
        "broker_throttled_total",
        Counter,
        "How often a client was made to wait by its rate.",
    ),
    (
        "broker",
        "logins_failed",
        "broker_logins_failed_total",
        Counter,
        "Logins with a wrong user name or password.",
    ),
    (
        "log",
        "messages",
        "log_messages_stored_total",
        Counter,
        "Messages written to the durable log.",
    ),
    (
        "log",
        "bytes",
        "log_bytes_stored_total",
        Counter,
        "Bytes of those messages.",
    ),
    (
        "log",
        "commits",
        "log_commits_total",
        Counter,
        "Commits of the log, each synced to disk.",
    ),
    (
        "log",
        "lost",
        "log_messages_lost_total",
        Counter,
        "Messages in the loss ledger: full streams, age, slow sessions.",
    ),
    (
        "log",
        "dead",
        "log_dead_letters_total",
        Counter,
        "Messages set aside since their consumer refused them.",
    ),
    (
        "uplink",
        "sent",
        "uplink_messages_sent_total",
        Counter,
        "Messages handed to the remote, repeated ones included.",
    ),
    (
        "uplink",
        "acknowledged",
        "uplink_messages_acknowledged_total",
        Counter,
        "Messages that the remote confirmed.",
    ),
    (
        "uplink",
        "resent",
        "uplink_messages_resent_total",
        Counter,
        "Messages sent again after a cut or a refusal.",
    ),
    (
        "uplink",
        "refused",
        "uplink_messages_refused_total",
        Counter,
        "Refusals by the remote.",
    ),
    (
        "uplink",
        "dead",
        "uplink_dead_letters_total",
        Counter,
        "Messages set aside since the remote refuses them for good.",
    ),
    (
        "uplink",
        "received",
        "uplink_messages_received_total",
        Counter,
        "Messages that came down from the remote.",
    ),
    (
        "uplink",
        "reconnects",
        "uplink_reconnects_total",
        Counter,
        "Connections made anew.",
    ),
    (
        "uplink",
        "in_flight",
        "uplink_messages_in_flight",
        Gauge,
        "Messages sent and not yet confirmed.",
    ),
    (
        "uplink",
        "bytes_out",
        "uplink_sent_bytes_total",
        Counter,
        "Bytes written to the remote.",
    ),
    (
        "uplink",
        "bytes_in",
        "uplink_received_bytes_total",
        Counter,
        "Bytes read from the remote.",
    ),
    (
        "uplink",
        "acknowledged_last_ms",
        "uplink_last_acknowledged_timestamp_seconds",
        Millis,
        "When the remote last confirmed a message, by the gateway's clock; 0 for never.",
    ),
    (
        "connector",
        "messages",
        "connector_messages_published_total",
        Counter,
        "Messages with values that were published.",
    ),
    (
        "connector",
        "dropped",
        "connector_messages_dropped_total",
        Counter,
        "Messages given up since the log could not take them.",
    ),
    (
        "connector",
        "polls",
        "connector_polls_total",
        Counter,
        "Polls of devices.",
    ),
    (
        "connector",
        "missed",
        "connector_polls_missed_total",
        Counter,
        "Polls left out since the line was busy at their time.",
    ),
    (
        "connector",
        "skipped",
        "connector_polls_skipped_total",
        Counter,
        "Polls left out since the device is lost.",
    ),
    (
        "connector",
        "faults",
        "connector_faults_total",
        Counter,
        "Polls that failed.",
    ),
    (
        "connector",
        "commands",
        "connector_commands_total",
        Counter,
        "Commands that were taken.",
    ),
    (
        "connector",
        "late_10ms",
        "connector_polls_late_10ms_total",
        Counter,
        "Polls that began more than 10 ms after their time.",
    ),
    (
        "connector",
        "late_50ms",
        "connector_polls_late_50ms_total",
        Counter,
        "Polls that began more than 50 ms after their time.",
    ),
    (
        "connector",
        "late_1s",
        "connector_polls_late_1s_total",
        Counter,
        "Polls that began more than 1 s after their time.",
    ),
    (
        "connector",
        "late_max_ms",
        "connector_poll_lateness_max_seconds",
        Millis,
        "The latest beginning of a poll so far.",
    ),
    (
        "connector",
        "requests",
        "connector_requests_total",
        Counter,
        "Requests on the line.",
    ),
    (
        "connector",
        "timeouts",
        "connector_timeouts_total",
        Counter,
        "Requests without an answer in time.",
    ),
    (
        "connector",
        "exceptions",
        "connector_exceptions_total",
        Counter,
        "Answers of devices that are an exception.",
    ),
    (
        "connector",
        "reconnects",
        "connector_reconnects_total",
        Counter,
        "Times the line was opened again.",
    ),
    (
        "connector",
        "stale",
        "connector_stale_answers_total",
        Counter,
        "Answers thrown away since they belonged to an earlier request.",
    ),
    (
        "connector",
        "unguarded",
        "connector_unguarded_requests_total",
        Counter,
        "Requests whose stale answer could not have been told apart.",
    ),
    (
        "module",
        "received",
        "module_messages_received_total",
        Counter,
        "Messages handed to the module.",
    ),
    (
        "module",
        "published",
        "module_messages_published_total",
        Counter,
        "Messages that it published.",
    ),
    (
        "module",
        "dropped",
        "module_messages_dropped_total",
        Counter,
        "Messages that it dropped.",
    ),
    (
        "module",
        "rejected",
        "module_messages_rejected_total",
        Counter,
        "Messages that it rejected; they are dead letters.",
    ),
    (
        "module",
        "traps",
        "module_traps_total",
        Counter,
        "Calls that ended with a trap, at a limit or at the deadline.",
    ),
    (
        "module",
        "restarts",
        "module_restarts_total",
        Counter,
        "Times it was started anew.",
    ),
    (
        "module",
        "poisonous",
        "module_messages_poisonous_total",
        Counter,
        "Messages given up since it traps on them.",
    ),
    (
        "module",
        "refused",
        "module_publishes_refused_total",
        Counter,
        "Messages to topics that it did not declare.",
    ),
    (
        "module",
        "own",
        "module_messages_own_total",
        Counter,
        "Its own messages, which are not handed back to it.",
    ),
    (
        "module",
        "looped",
        "module_messages_looped_total",
        Counter,
        "Messages stopped since they went round.",
    ),
    (
        "module",
        "loss_notices",
        "module_loss_notices_total",
        Counter,
        "Notices of losses that it was not handed.",
    ),
    (
        "module",
        "log_lines_suppressed",
        "module_log_lines_suppressed_total",
        Counter,
        "Lines of its log that were too many.",
    ),
    (
        "reload",
        "applied",
        "reload_applied_total",
        Counter,
        "Configurations that were taken over while running.",
    ),
    (
        "reload",
        "reverted",
        "reload_reverted_total",
        Counter,
        "Configurations that were taken back.",
    ),
];

pub fn find(kind: &str, counter: &str) -> Option<(&'static str, Kind, &'static str)> {
    COUNTERS
        .iter()
        .find(|(k, c, ..)| *k == kind && *c == counter)
        .map(|(_, _, metric, behaves, help)| (*metric, *behaves, *help))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    fn sources(folder: &Path, out: &mut Vec<(String, String)>) {
        for entry in std::fs::read_dir(folder).expect("the source is here") {
            let path = entry.expect("readable").path();
            if path.is_dir() {
                sources(&path, out);
            } else if path.extension().is_some_and(|e| e == "rs") && !path.ends_with("table.rs") {
                let text = std::fs::read_to_string(&path).expect("readable");
                let before_tests = text.split("#[cfg(test)]\nmod tests").next().unwrap_or("").to_owned();
                out.push((path.display().to_string(), before_tests));
            }
        }
    }

    #[test]
    fn every_counter_of_the_source_has_a_metric() {
        let mut files = Vec::new();
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut files);
        let mut missing = Vec::new();
        let mut seen = 0;
        for (path, text) in &files {
            if path.ends_with("tests.rs") {
                continue;
            }
            for piece in text.split("part.counter(\"").skip(1) {
                let name = piece.split('"').next().unwrap_or_default();
                seen += 1;
                if !COUNTERS.iter().any(|(_, counter, ..)| *counter == name) {
                    missing.push(format!("{name:?} of {path}"));
                }
            }
        }
        assert!(seen > 30, "the search finds the counters: {seen}");
        assert!(
            missing.is_empty(),
            "add a line to COUNTERS in src/metrics/table.rs for: {missing:#?}"
        );
    }

    #[test]
    fn names_follow_the_conventions_and_are_unique() {
        let mut names: Vec<&str> = COUNTERS.iter().map(|(_, _, metric, ..)| *metric).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        for (kind, _, metric, behaves, help) in COUNTERS {
            assert!(metric.starts_with(kind), "{metric}");
            assert_eq!(metric.ends_with("_total"), *behaves == Kind::Counter, "{metric}");
            assert_eq!(metric.ends_with("_seconds"), *behaves == Kind::Millis, "{metric}");
            assert!(
                metric
                    .bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_'),
                "{metric}"
            );
            assert!(help.ends_with('.') && !help.contains(['\n', '\\']), "{help}");
        }
    }
}
