//! `tidegate status`: asks the running gateway by its admin socket.

use std::fmt::Write as _;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::Value;

use crate::admin;
use crate::config::Config;

const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

pub fn ask(config: &Config, json: bool) -> anyhow::Result<String> {
    let path = admin::socket_path(&config.gateway.data_dir);
    let mut stream = UnixStream::connect(&path).with_context(|| {
        format!(
            "no gateway answers at {}; is it running with this configuration?",
            path.display()
        )
    })?;
    stream
        .set_read_timeout(Some(ANSWER_DEADLINE))
        .context("the admin socket")?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .context("the gateway does not answer")?;
    if json {
        return Ok(format!("{answer}\n"));
    }
    let report: Value = serde_json::from_str(&answer).context("the gateway's answer is not understood")?;
    let Some(parts) = report["parts"].as_array() else {
        bail!("the gateway's answer is not understood")
    };
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let mut out = format!(
        "{} · tidegate {} · up {} s\n\n",
        text(&report["gateway"]),
        text(&report["version"]),
        report["uptime_s"]
    );
    for part in parts {
        let name = format!("{} {}", text(&part["kind"]), text(&part["name"]));
        let _ = writeln!(out, "{name:<28} {:<9} {}", text(&part["health"]), text(&part["text"]));
    }
    let _ = writeln!(out);
    for stream in report["streams"].as_array().into_iter().flatten() {
        let name = format!("stream {}", text(&stream["name"]));
        let _ = writeln!(
            out,
            "{name:<28} {} messages, {} bytes kept",
            stream["messages"], stream["bytes"]
        );
    }
    for consumer in report["consumers"].as_array().into_iter().flatten() {
        let _ = writeln!(
            out,
            "{:<28} {} messages waiting",
            text(&consumer["name"]),
            consumer["queued_messages"]
        );
    }
    Ok(out)
}
