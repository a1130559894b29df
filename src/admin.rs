//! The local admin socket: `admin.sock` in the data directory answers a connection with the status as JSON.
//!
//! Who may open the data directory may read it; it takes no commands yet.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tracing::warn;

use crate::clock;
use crate::config::Config;
use crate::log::Log;
use crate::status::Status;

/// A reader that takes longer is cut off.
const ANSWER_DEADLINE: Duration = Duration::from_secs(2);

pub fn socket_path(data_dir: &Path) -> PathBuf {
    data_dir.join("admin.sock")
}

/// Serves until it is dropped.
pub struct Admin {
    task: tokio::task::JoinHandle<()>,
    path: PathBuf,
}

impl Drop for Admin {
    fn drop(&mut self) {
        self.task.abort();
        // The next start removes what a killed one left; here it is ours.
        let _ = std::fs::remove_file(&self.path);
    }
}

pub fn start(config: &Config, log: &Log, status: &Status) -> Option<Admin> {
    let path = socket_path(&config.gateway.data_dir);
    // The data directory's lock is ours, so a socket that lies here is nobody's.
    let _ = std::fs::remove_file(&path);
    let listener = match UnixListener::bind(&path) {
        Ok(listener) => listener,
        Err(e) => {
            warn!(path = %path.display(), cause = %e, "no admin socket: `tidegate status` will not work; the rest runs on");
            return None;
        }
    };
    let (log, status) = (log.clone(), status.clone());
    let gateway = config.gateway.name.clone();
    let started = clock::monotonic();
    let task = tokio::spawn(async move {
        loop {
            let Ok((mut stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let answer = report(&gateway, &log, &status, started.elapsed()).to_string();
            // One that hangs up early has its reasons.
            let _ = tokio::time::timeout(ANSWER_DEADLINE, stream.write_all(answer.as_bytes())).await;
        }
    });
    Some(Admin { task, path })
}

fn report(gateway: &str, log: &Log, status: &Status, uptime: Duration) -> Value {
    let load = std::sync::atomic::Ordering::Relaxed;
    let streams: Vec<Value> = log
        .streams()
        .map(|s| {
            json!({
                "name": s.name,
                "messages": s.messages.load(load),
                "bytes": s.bytes.load(load),
                "max_bytes": (s.bytes_max() != u64::MAX).then(|| s.bytes_max()),
            })
        })
        .collect();
    let consumers: Vec<Value> = log
        .consumers()
        .iter()
        .map(|c| {
            let (messages, bytes) = c.queued();
            json!({ "name": c.name(), "queued_messages": messages, "queued_bytes": bytes })
        })
        .collect();
    json!({
        "gateway": gateway,
        "version": env!("CARGO_PKG_VERSION"),
        "log_id": log.log_id(),
        "uptime_s": uptime.as_secs(),
        "parts": status.report(),
        "streams": streams,
        "consumers": consumers,
    })
}
