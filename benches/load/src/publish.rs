//! QoS 1 in a closed loop: each connection keeps `outstanding` messages unacknowledged. A read takes every PUBACK that
//! has come, a write carries every message that they make room for.

use std::error::Error;
use std::time::{Duration, Instant};

use crate::args::Args;
use crate::conn::{Conn, READ_BYTES};
use crate::epoll::Epoll;
use crate::histogram::Histogram;
use crate::usage;
use crate::wire::{self, Noise, PublishTemplate};

/// After the last message: how long the acknowledgements may take before the rest counts as unacknowledged.
const DRAIN: Duration = Duration::from_secs(20);

struct Publisher {
    conn: Conn,
    template: PublishTemplate,
    sent: u64,
    acked: u64,
    /// When each unacknowledged message was encoded, by its packet id - 1.
    sent_at: Vec<u64>,
}

pub fn run(mut args: Args) -> Result<String, Box<dyn Error>> {
    let port: u16 = args.required("port")?;
    let connections: usize = args.or("connections", 16)?;
    let outstanding: u64 = args.or("outstanding", 16)?;
    let size: usize = args.or("size", 256)?;
    let seconds: f64 = args.or("seconds", 3.0)?;
    let count: Option<u64> = args.optional("count")?;
    let warmup_ms: u64 = args.or("warmup-ms", if count.is_some() { 0 } else { 300 })?;
    let prefix: String = args.or("topic-prefix", "bench/log".to_owned())?;
    args.finish()?;
    if size < 8 || !(1..=65_535).contains(&outstanding) || connections == 0 {
        return Err("--size is at least 8, --outstanding 1 to 65535, --connections at least 1".into());
    }

    let mut epoll = Epoll::new()?;
    let mut publishers = Vec::with_capacity(connections);
    for number in 0..connections {
        let conn = Conn::open(
            port,
            &format!("load-{}-{number}", std::process::id()),
            true,
            None,
            number,
        )?;
        epoll.add(conn.fd(), number)?;
        let template = PublishTemplate::new(&format!("{prefix}/{number}"), 1, size);
        publishers.push(Publisher {
            conn,
            template,
            sent: 0,
            acked: 0,
            sent_at: vec![0; outstanding as usize],
        });
    }

    let mut noise = Noise::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut histogram = Histogram::new();
    let mut stray = 0u64;
    let (mut sent, mut acked) = (0u64, 0u64);
    let cpu_before = usage::cpu_seconds();
    let start = Instant::now();
    let now_ns = || start.elapsed().as_nanos() as u64;
    let warm_ns = warmup_ms * 1_000_000;
    let end_ns = if count.is_some() {
        u64::MAX
    } else {
        (seconds * 1e9) as u64
    };
    let limit = count.unwrap_or(u64::MAX);
    let mut fill = |publisher: &mut Publisher, sent: &mut u64, now: u64| {
        while publisher.sent - publisher.acked < outstanding && *sent < limit {
            let slot = publisher.sent % outstanding;
            publisher.sent_at[slot as usize] = now;
            publisher
                .template
                .put(&mut publisher.conn.out, slot as u16 + 1, *sent, noise.next(size - 8));
            publisher.sent += 1;
            *sent += 1;
        }
    };
    for publisher in &mut publishers {
        fill(publisher, &mut sent, now_ns());
        publisher.conn.flush(&epoll)?;
    }
    let mut window: Option<(u64, u64)> = None;
    let mut window_end: Option<(u64, u64)> = None;
    let mut drain_until = None;
    let mut ready = Vec::new();
    while acked < sent || sent < limit && window_end.is_none() {
        ready.clear();
        ready.extend(epoll.wait(100)?);
        let now = now_ns();
        if window.is_none() && now >= warm_ns {
            window = Some((now, acked));
        }
        if window_end.is_none() && (now >= end_ns || sent >= limit && acked == sent) {
            window_end = Some((now, acked));
        }
        if window_end.is_some() || sent >= limit {
            let until = *drain_until.get_or_insert_with(|| Instant::now() + DRAIN);
            if Instant::now() > until {
                break;
            }
        }
        for &number in &ready {
            let publisher = &mut publishers[number];
            let Publisher {
                conn,
                acked: acked_here,
                sent: sent_here,
                sent_at,
                ..
            } = publisher;
            let alive = conn.read(&mut buffer, |first, body| {
                let slot = *acked_here % outstanding;
                // Acknowledgements come in the order of the PUBLISHes (MQTT-4.6.0-2).
                let expected = slot as u16 + 1;
                if first != wire::PUBACK || *acked_here == *sent_here || !body.starts_with(&expected.to_be_bytes()) {
                    stray += 1;
                    return;
                }
                if window.is_some() {
                    histogram.add(now - sent_at[slot as usize]);
                }
                *acked_here += 1;
                acked += 1;
            })?;
            if !alive {
                return Err(format!(
                    "connection {number} was closed after {} acknowledgements",
                    publisher.acked
                )
                .into());
            }
            if stray > 0 {
                return Err(format!("connection {number}: a packet that is not the next PUBACK").into());
            }
            if window_end.is_none() {
                fill(publisher, &mut sent, now);
            }
            publisher.conn.flush(&epoll)?;
        }
    }
    let cpu = usage::cpu_seconds() - cpu_before;
    let (from_ns, from) = window.unwrap_or((0, 0));
    let (to_ns, to) = window_end.unwrap_or_else(|| (now_ns(), acked));
    let rate = (to - from) as f64 / ((to_ns - from_ns).max(1) as f64 / 1e9);
    Ok(format!(
        r#"{{"rate":{rate:.0},"sent":{sent},"acked":{acked},"unacked":{},"seconds":{:.3},{},"load_cpu_s":{cpu:.3},"load_cpu_us_per_message":{:.3}}}"#,
        sent - acked,
        now_ns() as f64 / 1e9,
        histogram.json(),
        cpu * 1e6 / acked.max(1) as f64,
    ))
}
