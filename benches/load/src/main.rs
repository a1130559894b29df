//! Load generator of `benches/run`. One thread, epoll, MQTT 3.1.1 encoded by hand: many messages a system call, so that
//! on a shared machine it costs a fraction of what the broker under test costs. Each mode prints one JSON line.
//!
//! - [`publish`] durable QoS 1 in a closed loop: rate and acknowledgement latency
//! - [`latency`] one message at a time, several brokers and a raw fdatasync in turn
//! - [`fanout`]  paced publishers to subscribers, QoS 0 or 1
//! - [`sink`]    an upstream that acknowledges everything (3.1.1 and 5)
//! - [`idle`]    connected, subscribed, silent clients
//! - [`raw`]     append + fdatasync: what the disk alone does

mod args;
mod conn;
mod epoll;
mod fanout;
mod histogram;
mod idle;
mod latency;
mod publish;
mod raw;
mod sink;
mod usage;
mod wire;

use std::process::ExitCode;

const USAGE: &str = "usage: load MODE [--key value …]
  publish  --port P [--connections 16] [--outstanding 16] [--size 256] [--seconds 3 | --count N] [--warmup-ms 300]
           [--topic-prefix bench/log]
  latency  --targets NAME=PORT,… [--raw-dir D] [--samples 500] [--gap-us 1000] [--size 256] [--raw-bytes SIZE]
           [--topic-prefix bench/log]
  fanout   --port P --rate R [--publishers 1] [--subscribers 1] [--qos 0] [--size 256] [--seconds 3]
           [--topic-prefix bench/live]
  sink     --port P [--expect N]             until its stdin ends
  idle     --port P [--connections 1000]     until its stdin ends
  raw      --dir D [--seconds 1] [--block 65536] [--size 256]";

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let mode = words.next().unwrap_or_default();
    let result = args::Args::parse(words).and_then(|args| match mode.as_str() {
        "publish" => publish::run(args),
        "latency" => latency::run(args),
        "fanout" => fanout::run(args),
        "sink" => sink::run(args),
        "idle" => idle::run(args),
        "raw" => raw::run(args),
        _ => Err(USAGE.into()),
    });
    match result {
        Ok(json) => {
            println!("{json}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("load {mode}: {error}");
            ExitCode::FAILURE
        }
    }
}
