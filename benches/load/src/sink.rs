//! An upstream that acknowledges everything, in batches: one read, one write. It understands CONNECT of 3.1.1 and 5,
//! PUBLISH at any QoS, SUBSCRIBE and PINGREQ. The first eight bytes of a payload are its sequence number (as `publish`
//! writes them): with `--expect N` it counts the distinct ones below N, and says so when all have come.
//!
//! Lines on stdout: `listening`, then `connected` at each CONNECT, then `complete`, and a summary when stdin ends.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsRawFd;
use std::time::Instant;

use crate::args::Args;
use crate::conn::{Conn, READ_BYTES};
use crate::epoll::Epoll;
use crate::usage;
use crate::wire;

const LISTENER: usize = 0;
const STDIN: usize = 1;

struct Counters {
    messages: u64,
    distinct: u64,
    duplicates: u64,
    seen: Vec<u64>,
    expected: u64,
    /// Distinct sequence numbers that came after a higher one of their topic had come.
    out_of_order: u64,
    highest: BTreeMap<Vec<u8>, u64>,
}

impl Counters {
    fn count(&mut self, topic: &[u8], stamp: Option<u64>) {
        self.messages += 1;
        let Some(stamp) = stamp.filter(|&stamp| stamp < self.expected) else {
            return;
        };
        let (word, bit) = ((stamp / 64) as usize, 1u64 << (stamp % 64));
        if self.seen[word] & bit != 0 {
            self.duplicates += 1;
            return;
        }
        self.seen[word] |= bit;
        self.distinct += 1;
        match self.highest.get_mut(topic) {
            Some(highest) if *highest > stamp => self.out_of_order += 1,
            Some(highest) => *highest = stamp,
            None => {
                self.highest.insert(topic.to_vec(), stamp);
            }
        }
    }
}

pub fn run(mut args: Args) -> Result<String, Box<dyn Error>> {
    let port: u16 = args.required("port")?;
    let expected: u64 = args.or("expect", 0)?;
    args.finish()?;

    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
    let mut epoll = Epoll::new()?;
    epoll.add(listener.as_raw_fd(), LISTENER)?;
    epoll.add(std::io::stdin().as_raw_fd(), STDIN)?;
    say(r#"{"event":"listening"}"#)?;

    let mut conns: BTreeMap<usize, (Conn, bool)> = BTreeMap::new();
    let mut next_number = STDIN + 1;
    let mut buffer = vec![0; READ_BYTES];
    let mut counters = Counters {
        messages: 0,
        distinct: 0,
        duplicates: 0,
        seen: vec![0; expected.div_ceil(64) as usize],
        expected,
        out_of_order: 0,
        highest: BTreeMap::new(),
    };
    let mut connected_at = None;
    let mut first_at = None;
    let mut complete = false;
    let mut ready = Vec::new();
    loop {
        ready.clear();
        ready.extend(epoll.wait(-1)?);
        for &number in &ready {
            match number {
                LISTENER => {
                    let (stream, _) = listener.accept()?;
                    let conn = Conn::new(stream, next_number)?;
                    epoll.add(conn.fd(), next_number)?;
                    conns.insert(next_number, (conn, false));
                    next_number += 1;
                }
                STDIN => {
                    if std::io::stdin().read(&mut [0; 64])? == 0 {
                        return Ok(format!(r#"{{"event":"end",{}}}"#, summary(&counters)));
                    }
                }
                _ => {
                    let Some((conn, v5)) = conns.get_mut(&number) else {
                        continue;
                    };
                    let mut answers = Vec::new();
                    let mut connected = false;
                    let mut leaves = false;
                    let alive = conn.read(&mut buffer, |first, body| match first & 0xf0 {
                        wire::PUBLISH => {
                            if let Some(message) = wire::received(first, body, *v5) {
                                let topic_bytes = usize::from(u16::from_be_bytes([body[0], body[1]]));
                                counters.count(&body[2..2 + topic_bytes], message.stamp);
                                match message.qos {
                                    0 => {}
                                    1 => put_answer(&mut answers, wire::PUBACK, message.id),
                                    _ => put_answer(&mut answers, wire::PUBREC, message.id),
                                }
                            }
                        }
                        wire::PUBREL => answer(&mut answers, wire::PUBCOMP, body),
                        wire::CONNECT => {
                            *v5 = body.get(6) == Some(&5);
                            answers.extend_from_slice(if *v5 { &[0x20, 3, 0, 0, 0] } else { &[0x20, 2, 0, 0] });
                            connected = true;
                        }
                        wire::SUBSCRIBE => {
                            let filters = count_filters(body, *v5);
                            answers.extend_from_slice(&[wire::SUBACK, (2 + usize::from(*v5) + filters) as u8]);
                            answers.extend_from_slice(&body[..2]);
                            answers.extend(std::iter::repeat_n(0, usize::from(*v5)));
                            answers.extend(std::iter::repeat_n(1, filters));
                        }
                        wire::UNSUBSCRIBE => {
                            answers.extend_from_slice(if *v5 {
                                &[wire::UNSUBACK, 4]
                            } else {
                                &[wire::UNSUBACK, 2]
                            });
                            answers.extend_from_slice(&body[..2]);
                            answers.extend_from_slice(if *v5 { &[0, 0] } else { &[] });
                        }
                        wire::PINGREQ => answers.extend_from_slice(&[wire::PINGRESP, 0]),
                        wire::DISCONNECT => leaves = true,
                        _ => {}
                    });
                    conn.out.extend_from_slice(&answers);
                    let lives = matches!(alive, Ok(true)) && !leaves && conn.flush(&epoll).is_ok();
                    if !lives {
                        conns.remove(&number);
                    }
                    if connected {
                        connected_at.get_or_insert_with(|| (Instant::now(), usage::cpu_seconds()));
                        say(r#"{"event":"connected"}"#)?;
                    }
                    if counters.messages > 0 {
                        first_at.get_or_insert_with(Instant::now);
                    }
                    if !complete && expected > 0 && counters.distinct == expected {
                        complete = true;
                        let (connected_at, cpu) = connected_at.unwrap_or((Instant::now(), 0.0));
                        let seconds = connected_at.elapsed().as_secs_f64();
                        say(&format!(
                            r#"{{"event":"complete","seconds":{seconds:.4},"seconds_from_first":{:.4},"rate":{:.0},"sink_cpu_s":{:.3},{}}}"#,
                            first_at.map_or(0.0, |at| at.elapsed().as_secs_f64()),
                            expected as f64 / seconds,
                            usage::cpu_seconds() - cpu,
                            summary(&counters)
                        ))?;
                    }
                }
            }
        }
    }
}

fn summary(counters: &Counters) -> String {
    format!(
        r#""messages":{},"distinct":{},"duplicates":{},"out_of_order":{}"#,
        counters.messages, counters.distinct, counters.duplicates, counters.out_of_order
    )
}

fn put_answer(out: &mut Vec<u8>, kind: u8, id: u16) {
    out.extend_from_slice(&[kind, 2]);
    out.extend_from_slice(&id.to_be_bytes());
}

fn answer(out: &mut Vec<u8>, kind: u8, body: &[u8]) {
    if let Some(id) = body.first_chunk::<2>() {
        put_answer(out, kind, u16::from_be_bytes(*id));
    }
}

/// A SUBSCRIBE's filters, each with its options byte; a property length of one byte is enough for what uplinks send.
fn count_filters(body: &[u8], v5: bool) -> usize {
    let mut at = 2;
    if v5 {
        at += 1 + usize::from(*body.get(at).unwrap_or(&0));
    }
    let mut filters = 0;
    while let Some(&[high, low]) = body.get(at..).and_then(|rest| rest.first_chunk::<2>()) {
        at += 2 + usize::from(u16::from_be_bytes([high, low])) + 1;
        filters += 1;
    }
    filters
}

/// A line on stdout, at once: `benches/run` reads it through a pipe.
fn say(line: &str) -> std::io::Result<()> {
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{line}")?;
    stdout.flush()
}
