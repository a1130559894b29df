//! The physical limit: append a block, fdatasync, again. A block stands for one group commit of `block / size` messages.

use std::error::Error;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use crate::args::Args;
use crate::histogram::Histogram;
use crate::usage;
use crate::wire::Noise;

pub fn run(mut args: Args) -> Result<String, Box<dyn Error>> {
    let dir: PathBuf = args.required("dir")?;
    let seconds = Duration::from_secs_f64(args.or("seconds", 1.0)?);
    let block: usize = args.or("block", 64 << 10)?;
    let size: usize = args.or("size", 256)?;
    args.finish()?;

    let path = dir.join("append.raw");
    let mut file = File::create(&path)?;
    let mut noise = Noise::new();
    let mut histogram = Histogram::new();
    let cpu_before = usage::cpu_seconds();
    let start = Instant::now();
    let mut blocks = 0u64;
    while start.elapsed() < seconds {
        let bytes = noise.next(block);
        let before = Instant::now();
        file.write_all(bytes)?;
        file.sync_data()?;
        histogram.add(before.elapsed().as_nanos() as u64);
        blocks += 1;
    }
    let took = start.elapsed().as_secs_f64();
    let cpu = usage::cpu_seconds() - cpu_before;
    fs::remove_file(path)?;
    let messages = blocks as f64 * block as f64 / size as f64;
    Ok(format!(
        r#"{{"rate":{:.0},"messages":{messages:.0},"bytes":{},"seconds":{took:.3},"cpu_us_per_message":{:.3},{}}}"#,
        messages / took,
        blocks * block as u64,
        cpu * 1e6 / messages.max(1.0),
        histogram.json()
    ))
}
