//! Publishers at a fixed rate, subscribers that count: what a delivered message costs the broker. The payload carries
//! the time at which it was encoded.

use std::error::Error;
use std::time::{Duration, Instant};

use crate::args::Args;
use crate::conn::{Conn, READ_BYTES, dial};
use crate::epoll::Epoll;
use crate::histogram::Histogram;
use crate::usage;
use crate::wire::{self, Noise, PublishTemplate};

/// After the last message: a delivery that has not come by then is missing.
const DRAIN: Duration = Duration::from_secs(5);

pub fn run(mut args: Args) -> Result<String, Box<dyn Error>> {
    let port: u16 = args.required("port")?;
    let rate: f64 = args.required("rate")?;
    let publishers: usize = args.or("publishers", 1)?;
    let subscribers: usize = args.or("subscribers", 1)?;
    let qos: u8 = args.or("qos", 0)?;
    let size: usize = args.or("size", 256)?;
    let seconds: f64 = args.or("seconds", 3.0)?;
    let persistent = args.or("persistent", 0u8)? != 0;
    let prefix: String = args.or("topic-prefix", "bench/live".to_owned())?;
    args.finish()?;
    if size < 8 || qos > 1 || publishers == 0 {
        return Err("--size is at least 8, --qos 0 or 1, --publishers at least 1".into());
    }

    let client_id = |number: usize| format!("fanout-{}-{number}", std::process::id());
    let mut epoll = Epoll::new()?;
    let mut conns = Vec::new();
    // Subscribers come first: number < subscribers means one of them.
    for number in 0..subscribers + publishers {
        let subscribe = (number < subscribers).then_some((format!("{prefix}/#"), qos));
        let subscribe = subscribe.as_ref().map(|(filter, qos)| (filter.as_str(), *qos));
        let clean_session = number >= subscribers || !persistent;
        let conn = Conn::open(port, &client_id(number), clean_session, subscribe, number)?;
        epoll.add(conn.fd(), number)?;
        conns.push(conn);
    }
    let templates: Vec<PublishTemplate> = (0..publishers)
        .map(|n| PublishTemplate::new(&format!("{prefix}/{n}"), qos, size))
        .collect();

    let mut noise = Noise::new();
    let mut buffer = vec![0; READ_BYTES];
    let mut histogram = Histogram::new();
    let (mut sent, mut acked, mut delivered, mut bad) = (0u64, 0u64, 0u64, 0u64);
    let cpu_before = usage::cpu_seconds();
    let start = Instant::now();
    let total = (rate * seconds) as u64;
    let mut deadline = None;
    let mut acks = Vec::new();
    let mut ready = Vec::new();
    while sent < total || delivered < total * subscribers as u64 || (qos > 0 && acked < total) {
        let due = ((start.elapsed().as_secs_f64() * rate) as u64).min(total);
        while sent < due {
            let publisher = (sent % publishers as u64) as usize;
            // Ids count up for each publisher: none is in use again within 65,535 of its messages.
            let id = (sent / publishers as u64 % 65_535) as u16 + 1;
            let stamp = start.elapsed().as_nanos() as u64;
            templates[publisher].put(&mut conns[subscribers + publisher].out, id, stamp, noise.next(size - 8));
            sent += 1;
        }
        for conn in &mut conns[subscribers..] {
            conn.flush(&epoll)?;
        }
        if sent == total && Instant::now() > *deadline.get_or_insert_with(|| Instant::now() + DRAIN) {
            break;
        }
        ready.clear();
        ready.extend(epoll.wait(1)?);
        for &number in &ready {
            let now = start.elapsed().as_nanos() as u64;
            acks.clear();
            let alive = conns[number].read(&mut buffer, |first, body| match first & 0xf0 {
                wire::PUBLISH => match wire::received(first, body, false) {
                    Some(message) => {
                        delivered += 1;
                        histogram.add(now.saturating_sub(message.stamp.unwrap_or(now)));
                        if message.qos == 1 {
                            acks.extend_from_slice(&[wire::PUBACK, 2]);
                            acks.extend_from_slice(&message.id.to_be_bytes());
                        }
                    }
                    None => bad += 1,
                },
                wire::PUBACK => acked += 1,
                _ => bad += 1,
            })?;
            if !alive || bad > 0 {
                return Err(
                    format!("connection {number} was closed or sent a packet that does not belong here").into(),
                );
            }
            conns[number].out.extend_from_slice(&acks);
            conns[number].flush(&epoll)?;
        }
    }
    let cpu = usage::cpu_seconds() - cpu_before;
    let seconds = start.elapsed().as_secs_f64();
    if persistent {
        // The sessions end with a clean one each.
        for number in 0..subscribers {
            drop(dial(port, &client_id(number), true)?);
        }
    }
    Ok(format!(
        r#"{{"sent":{sent},"acked":{acked},"delivered":{delivered},"missing":{},"seconds":{:.3},{},"load_cpu_s":{cpu:.3},"load_cpu_us_per_message":{:.3}}}"#,
        (sent * subscribers as u64).saturating_sub(delivered),
        seconds,
        histogram.json(),
        cpu * 1e6 / sent.max(1) as f64,
    ))
}
