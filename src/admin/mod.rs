//! The local admin socket: `admin.sock` in the data directory, for the owner and the group of the daemon's user.
//!
//! The protocol is JSON, one object a line. A client sends one request, `{"request":"status"}`, and reads lines until the
//! last one: `{"done":true}` where it was done, `{"error":"what","next":"what to do"}` where not. A request that streams
//! goes on until the client hangs up (or closes its side for writing). After the last line the daemon closes.
//!
//! Bounds: [`CLIENTS_MAX`] clients at once, one more is told so; a request of [`REQUEST_BYTES_MAX`], all of it within
//! [`REQUEST_DEADLINE`]; a client that does not take a line within [`LINE_DEADLINE`] is cut off.
//!
//! A new request is a variant of [`requests::Request`] and an arm of [`requests::serve`].

mod encoding;
mod report;
mod requests;

use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tracing::warn;

use crate::broker::handle::BrokerHandle;
use crate::clock::Instant;
use crate::control::Control;
use crate::log::Log;
use crate::status::Status;

pub use report::report;
pub use requests::PAYLOAD_BYTES_MAX;

const CLIENTS_MAX: usize = 16;
/// Room for a payload of [`requests::PAYLOAD_BYTES_MAX`] as text.
const REQUEST_BYTES_MAX: u64 = 2 << 20;
const REQUEST_DEADLINE: Duration = Duration::from_secs(5);
const LINE_DEADLINE: Duration = Duration::from_secs(5);

pub fn socket_path(data_dir: &Path) -> PathBuf {
    data_dir.join("admin.sock")
}

/// What requests are answered from.
pub struct Inside {
    /// The gateway's name.
    pub gateway: String,
    pub broker: BrokerHandle,
    pub log: Log,
    pub status: Status,
    pub control: Control,
    pub started: Instant,
}

/// Why a request was not carried out, and what to do about it.
#[derive(Debug)]
pub struct Failure {
    pub error: String,
    pub next: String,
}

impl Failure {
    pub fn new(error: impl Into<String>, next: impl Into<String>) -> Failure {
        Failure {
            error: error.into(),
            next: next.into(),
        }
    }
}

/// The way back to the client.
pub struct Answer {
    stream: OwnedWriteHalf,
    client: BufReader<OwnedReadHalf>,
}

/// The client hung up, or does not read: nothing more can be told to it.
#[derive(Debug)]
pub struct Gone;

/// How serving a request ends: done, or with what is said last. Gone clients are told nothing.
pub enum End {
    Done,
    Failed(Failure),
    Gone,
}

impl From<Gone> for End {
    fn from(_: Gone) -> End {
        End::Gone
    }
}

impl From<Failure> for End {
    fn from(failure: Failure) -> End {
        End::Failed(failure)
    }
}

impl Answer {
    pub async fn line(&mut self, value: &Value) -> Result<(), Gone> {
        let mut line = value.to_string();
        line.push('\n');
        match tokio::time::timeout(LINE_DEADLINE, self.stream.write_all(line.as_bytes())).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) | Err(_) => Err(Gone),
        }
    }

    /// Returns when the client of a streaming request wants no more. What else it sends is read and thrown away.
    pub async fn hung_up(&mut self) {
        let mut bytes = [0; 256];
        while self.client.read(&mut bytes).await.is_ok_and(|n| n > 0) {}
    }
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

pub fn start(data_dir: &Path, inside: Inside) -> Option<Admin> {
    let path = socket_path(data_dir);
    // The data directory's lock is ours, so a socket that lies here is nobody's.
    let _ = std::fs::remove_file(&path);
    let listener = match listen(&path) {
        Ok(listener) => listener,
        Err(e) => {
            warn!(path = %path.display(), cause = %e, "no admin socket: `tidegate status` will not work; the rest runs on");
            return None;
        }
    };
    let inside = Arc::new(inside);
    let places = Arc::new(Semaphore::new(CLIENTS_MAX));
    let task = tokio::spawn(async move {
        let mut clients = tokio::task::JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = clients.join_next() => continue,
            };
            let Ok((stream, _)) = accepted else {
                // Out of descriptors, mostly.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            match Arc::clone(&places).try_acquire_owned() {
                Ok(place) => {
                    let inside = Arc::clone(&inside);
                    clients.spawn(async move {
                        client(&inside, stream).await;
                        drop(place);
                    });
                }
                Err(_) => turn_away(&stream),
            }
        }
    });
    Some(Admin { task, path })
}

/// Made for the group and nobody else from the first moment: on Linux a socket's file gets the mode of its descriptor,
/// less the umask.
fn listen(path: &Path) -> std::io::Result<UnixListener> {
    let mode = std::fs::Permissions::from_mode(0o660);
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
    let file = std::fs::File::from(OwnedFd::from(socket));
    file.set_permissions(mode.clone())?;
    let socket = socket2::Socket::from(OwnedFd::from(file));
    socket.bind(&socket2::SockAddr::unix(path)?)?;
    // The umask may have taken the group's part away.
    std::fs::set_permissions(path, mode)?;
    socket.listen(64)?;
    socket.set_nonblocking(true)?;
    UnixListener::from_std(OwnedFd::from(socket).into())
}

/// Into an empty socket buffer, so without waiting.
fn turn_away(stream: &UnixStream) {
    let failure = Failure::new(
        format!("{CLIENTS_MAX} clients are here already"),
        "end one of them, for example a `tidegate tail`",
    );
    let _ = stream.try_write(format!("{}\n", last_line(&Err(failure))).as_bytes());
}

fn last_line(result: &Result<(), Failure>) -> Value {
    match result {
        Ok(()) => json!({ "done": true }),
        Err(failure) => json!({ "error": failure.error, "next": failure.next }),
    }
}

async fn client(inside: &Inside, stream: UnixStream) {
    let (reader, writer) = stream.into_split();
    let mut answer = Answer {
        stream: writer,
        client: BufReader::new(reader),
    };
    let end = match tokio::time::timeout(REQUEST_DEADLINE, read_request(&mut answer.client)).await {
        Ok(Ok(Some(request))) => requests::serve(inside, request, &mut answer).await,
        Ok(Ok(None)) => return,
        Ok(Err(failure)) => Err(End::Failed(failure)),
        Err(_) => Err(End::Failed(Failure::new(
            format!("no request came within {} s", REQUEST_DEADLINE.as_secs()),
            "send one line: {\"request\":\"status\"}",
        ))),
    };
    let last = match end {
        Ok(()) | Err(End::Done) => Ok(()),
        Err(End::Failed(failure)) => Err(failure),
        Err(End::Gone) => return,
    };
    // One that hung up early has its reasons.
    let _ = answer.line(&last_line(&last)).await;
}

/// None where the client sent nothing at all.
async fn read_request(client: &mut BufReader<OwnedReadHalf>) -> Result<Option<requests::Request>, Failure> {
    let mut line = Vec::new();
    let read = client.take(REQUEST_BYTES_MAX).read_until(b'\n', &mut line).await;
    match read {
        Ok(0) | Err(_) => return Ok(None),
        Ok(_) if line.len() as u64 == REQUEST_BYTES_MAX && line.last() != Some(&b'\n') => {
            return Err(Failure::new("the request is longer than 2 MiB", "send a smaller one"));
        }
        Ok(_) => {}
    }
    requests::parse(&line).map(Some)
}

/// For tests of this module's parts and of clients.
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_is_told_apart() {
        assert_eq!(last_line(&Ok(())).to_string(), r#"{"done":true}"#);
        let failure = Failure::new("no such asset", "`tidegate asset list` shows them");
        assert_eq!(
            last_line(&Err(failure)).to_string(),
            r#"{"error":"no such asset","next":"`tidegate asset list` shows them"}"#
        );
    }

    #[test]
    fn an_unknown_request_names_the_known_ones() {
        let failure = requests::parse(br#"{"request":"statuss"}"#).expect_err("unknown");
        for name in ["statuss", "status", "tail", "publish"] {
            assert!(failure.error.contains(name), "{}", failure.error);
        }
        for bad in [
            &b""[..],
            b"status\n",
            b"[]",
            b"{}",
            b"{\"request\":1}",
            b"\xff\n",
            b"{\"request\":\"tail\"}",
        ] {
            assert!(requests::parse(bad).is_err(), "{bad:?}");
        }
        assert!(requests::parse(b"{\"request\":\"status\"}\n").is_ok());
    }
}
