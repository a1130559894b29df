//! Metrics for Prometheus on a listener of their own (`[metrics] bind`), off unless configured.
//!
//! HTTP/1.1 by hand, since it is one page: GET and HEAD of `/metrics`, one request a connection. Bounds:
//! [`CONNECTIONS_MAX`] at once (more wait in the system's queue), a request head of [`HEAD_BYTES_MAX`], all of it within
//! [`DEADLINE`].

mod process;
mod table;
mod text;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::{info, warn};

use crate::clock;
use crate::log::Log;
use crate::status::{Health, Status};
use text::{Consumer, Snapshot, Stream};

const CONNECTIONS_MAX: usize = 8;
const HEAD_BYTES_MAX: usize = 8 << 10;
const DEADLINE: Duration = Duration::from_secs(5);
/// A listener that could not be opened is tried again this often.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);

/// What the page is made of.
#[derive(Clone)]
pub struct Sources {
    /// The gateway's name.
    pub gateway: String,
    pub log: Log,
    pub status: Status,
    pub started: clock::Instant,
}

/// Serves until it is dropped.
pub struct Metrics(tokio::task::JoinHandle<()>);

impl Drop for Metrics {
    fn drop(&mut self) {
        self.0.abort();
    }
}

pub fn start(bind: SocketAddr, sources: Sources) -> Metrics {
    Metrics(tokio::spawn(run(bind, sources)))
}

async fn run(bind: SocketAddr, sources: Sources) {
    let part = sources.status.part("metrics", &bind.to_string());
    let listener = loop {
        match TcpListener::bind(bind).await {
            Ok(listener) => break listener,
            Err(e) => {
                let text = format!(
                    "cannot listen on {bind}: {e}; tried again every {} s",
                    LISTEN_AGAIN.as_secs()
                );
                if part.set(Health::Failed, text) {
                    warn!(%bind, cause = %e, "no metrics: the listener failed; the rest runs on");
                }
                tokio::time::sleep(LISTEN_AGAIN).await;
            }
        }
    };
    part.set(Health::Good, format!("http://{bind}/metrics"));
    info!(%bind, "serving metrics");
    let sources = Arc::new(sources);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut tasks = tokio::task::JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return;
        };
        while tasks.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else {
            // Out of descriptors, mostly.
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let sources = Arc::clone(&sources);
        tasks.spawn(async move {
            // One that is slow or hangs up is no fault of ours.
            let _ = tokio::time::timeout(DEADLINE, serve(stream, &sources)).await;
            drop(place);
        });
    }
}

async fn serve(mut stream: TcpStream, sources: &Sources) -> std::io::Result<()> {
    let mut head = Vec::new();
    let answer = loop {
        if let Some(end) = head.windows(4).position(|w| w == b"\r\n\r\n") {
            break answer(&head[..end], || text::render(&snapshot(sources)));
        }
        if head.len() >= HEAD_BYTES_MAX {
            break page("431 Request Header Fields Too Large", "the request is too long\n", true);
        }
        if stream.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    };
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

/// The whole response to a request's head. Pure.
fn answer(head: &[u8], render: impl FnOnce() -> String) -> String {
    let line = head.split(|b| *b == b'\r').next().unwrap_or_default();
    let mut words = line.split(|b| *b == b' ');
    let (method, target, version) = (words.next(), words.next(), words.next());
    let is_http = version.is_some_and(|v| v.starts_with(b"HTTP/1."));
    let path = target.map(|t| t.split(|b| *b == b'?').next().unwrap_or_default());
    let with_body = method != Some(b"HEAD");
    match (method, path) {
        _ if !is_http || words.next().is_some() => page("400 Bad Request", "this is no HTTP/1.1 request\n", true),
        (Some(b"GET" | b"HEAD"), Some(b"/metrics")) => page("200 OK", &render(), with_body),
        (Some(b"GET" | b"HEAD"), _) => page("404 Not Found", "the metrics are at /metrics\n", with_body),
        _ => page("405 Method Not Allowed", "GET /metrics\n", true),
    }
}

fn page(status: &str, body: &str, with_body: bool) -> String {
    let kind = match status.starts_with("200") {
        true => "text/plain; version=0.0.4; charset=utf-8",
        false => "text/plain; charset=utf-8",
    };
    let allow = if status.starts_with("405") {
        "Allow: GET, HEAD\r\n"
    } else {
        ""
    };
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{allow}Connection: close\r\n\r\n{}",
        if with_body { body } else { "" }
    )
}

fn snapshot(sources: &Sources) -> Snapshot {
    let streams = sources.log.streams().map(|s| Stream {
        name: s.name.clone(),
        messages: s.messages.load(Relaxed),
        bytes: s.bytes.load(Relaxed),
        bytes_max: (s.bytes_max() != u64::MAX).then(|| s.bytes_max()),
    });
    let consumers = sources.log.consumers();
    let consumers = consumers.iter().map(|c| {
        let (messages, bytes) = c.queued();
        Consumer {
            name: c.name().to_owned(),
            messages,
            bytes,
        }
    });
    Snapshot {
        gateway: sources.gateway.clone(),
        version: env!("CARGO_PKG_VERSION"),
        uptime_s: clock::monotonic()
            .saturating_duration_since(sources.started)
            .as_secs_f64(),
        parts: sources.status.report(),
        streams: streams.collect(),
        consumers: consumers.collect(),
        process: process::read(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status_of(head: &str) -> String {
        let answer = answer(head.as_bytes(), || "page\n".to_owned());
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        format!("{} {}", head.split(' ').nth(1).expect("a status"), body.trim_end())
    }

    #[test]
    fn one_page_and_nothing_else() {
        assert_eq!(status_of("GET /metrics HTTP/1.1\r\nHost: x"), "200 page");
        assert_eq!(status_of("GET /metrics?x=1 HTTP/1.0"), "200 page");
        assert_eq!(status_of("HEAD /metrics HTTP/1.1"), "200 ");
        assert!(status_of("GET / HTTP/1.1").starts_with("404 "));
        assert!(status_of("POST /metrics HTTP/1.1").starts_with("405 "));
        for bad in [
            "",
            "GET",
            "GET /metrics",
            "\x16\x03\x01",
            "GET /metrics HTTP/1.1 x",
            "GET /metrics HTTP/2",
        ] {
            assert!(status_of(bad).starts_with("400 "), "{bad:?}");
        }
    }
}
