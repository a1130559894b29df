//! One message outstanding: every broker and a raw append + fdatasync, each in its turn, a gap between them, so that all
//! of them see the same disk and the same neighbours.

use std::error::Error;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::args::Args;
use crate::conn::dial;
use crate::histogram::Histogram;
use crate::wire::{self, Noise, PublishTemplate};

/// The first rounds warm caches and branch predictors; they are not counted.
const WARMUP_ROUNDS: usize = 20;

struct Target {
    name: String,
    stream: TcpStream,
    histogram: Histogram,
}

pub fn run(mut args: Args) -> Result<String, Box<dyn Error>> {
    let targets: String = args.required("targets")?;
    let raw_dir: Option<PathBuf> = args.optional("raw-dir")?;
    let samples: usize = args.or("samples", 500)?;
    let gap = Duration::from_micros(args.or("gap-us", 1000)?);
    let size: usize = args.or("size", 256)?;
    let raw_bytes: usize = args.or("raw-bytes", size)?;
    let prefix: String = args.or("topic-prefix", "bench/log".to_owned())?;
    args.finish()?;

    let mut open = Vec::new();
    for target in targets.split(',') {
        let (name, port) = target.split_once('=').ok_or("--targets is NAME=PORT,…")?;
        let stream = dial(port.parse()?, &format!("latency-{}", std::process::id()), true)?;
        open.push(Target {
            name: name.to_owned(),
            stream,
            histogram: Histogram::new(),
        });
    }
    let mut raw = match &raw_dir {
        None => None,
        Some(dir) => Some((File::create(dir.join("latency.raw"))?, Histogram::new())),
    };
    let template = PublishTemplate::new(&format!("{prefix}/latency"), 1, size);
    let mut noise = Noise::new();
    let mut packet = Vec::new();
    for round in 0..WARMUP_ROUNDS + samples {
        for target in &mut open {
            std::thread::sleep(gap);
            packet.clear();
            template.put(&mut packet, 1, round as u64, noise.next(size - 8));
            let mut answer = [0; 4];
            let start = Instant::now();
            target.stream.write_all(&packet)?;
            target.stream.read_exact(&mut answer)?;
            let took = start.elapsed();
            if answer != [wire::PUBACK, 2, 0, 1] {
                return Err(format!("{}: PUBLISH was answered with {answer:02x?}", target.name).into());
            }
            if round >= WARMUP_ROUNDS {
                target.histogram.add(took.as_nanos() as u64);
            }
        }
        if let Some((file, histogram)) = &mut raw {
            std::thread::sleep(gap);
            let block = noise.next(raw_bytes);
            let start = Instant::now();
            file.write_all(block)?;
            file.sync_data()?;
            let took = start.elapsed();
            if round >= WARMUP_ROUNDS {
                histogram.add(took.as_nanos() as u64);
            }
        }
    }
    let mut fields: Vec<String> = open
        .iter()
        .map(|target| format!(r#""{}":{{{}}}"#, target.name, target.histogram.json()))
        .collect();
    if let (Some((_, histogram)), Some(dir)) = (&raw, &raw_dir) {
        fields.push(format!(r#""raw":{{{}}}"#, histogram.json()));
        fs::remove_file(dir.join("latency.raw"))?;
    }
    Ok(format!("{{{}}}", fields.join(",")))
}
