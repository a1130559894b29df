//! The status as JSON: what `tidegate status --json` prints, and what `top` and the metrics are made of.

use std::sync::atomic::Ordering::Relaxed;

use serde_json::{Value, json};

use super::Inside;
use crate::clock;

pub fn report(inside: &Inside) -> Value {
    let streams: Vec<Value> = inside
        .log
        .streams()
        .map(|s| {
            json!({
                "name": s.name,
                "messages": s.messages.load(Relaxed),
                "bytes": s.bytes.load(Relaxed),
                "max_bytes": (s.bytes_max() != u64::MAX).then(|| s.bytes_max()),
            })
        })
        .collect();
    let consumers: Vec<Value> = inside
        .log
        .consumers()
        .iter()
        .map(|c| {
            let (messages, bytes) = c.queued();
            json!({ "name": c.name(), "queued_messages": messages, "queued_bytes": bytes })
        })
        .collect();
    let uptime = clock::monotonic().saturating_duration_since(inside.started);
    json!({
        "gateway": inside.gateway,
        "version": env!("CARGO_PKG_VERSION"),
        "log_id": inside.log.log_id(),
        "uptime_s": uptime.as_secs(),
        "uptime_ms": uptime.as_millis() as u64,
        "parts": inside.status.report(),
        "streams": streams,
        "consumers": consumers,
    })
}
