//! What systemd is told (sd_notify): ready, reloading, stopping, how it goes, and that it is alive.
//!
//! A watchdog proves only what was tested: it is fed after a commit went through the network thread, the log's writer and
//! back ([`BrokerHandle::prove`]), which is what a PUBACK waits for. A commit that failed and said so (a full disk) is an
//! answer too: starting anew would not make room, and would cost every client its connection. Only silence starves it.
//!
//! Plain datagrams, so no crate: sd-notify 0.5 would add a crate for these lines, and listenfd as well.

use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use tracing::{info, warn};

use crate::broker::handle::{BrokerHandle, PublishError};
use crate::clock;
use crate::status::{Health, Status};

/// The status text is sent at most this often.
const STATUS_EVERY: Duration = Duration::from_secs(1);

/// The way to systemd; without one every message goes nowhere.
#[derive(Debug)]
pub struct Notify {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl Notify {
    pub fn from_env() -> Notify {
        let number = |name: &str| std::env::var(name).ok()?.parse::<u64>().ok();
        let is_ours = number("WATCHDOG_PID").is_none_or(|pid| pid == u64::from(std::process::id()));
        Notify {
            socket: std::env::var_os("NOTIFY_SOCKET").and_then(|path| match open(path.as_bytes()) {
                Ok(socket) => Some(socket),
                Err(e) => {
                    warn!(cause = %e, "NOTIFY_SOCKET cannot be used: systemd is told nothing");
                    None
                }
            }),
            watchdog: number("WATCHDOG_USEC")
                .filter(|us| is_ours && *us > 0)
                .map(Duration::from_micros),
        }
    }

    fn send(&self, text: &str) {
        let Some((socket, address)) = &self.socket else { return };
        // A manager that is busy or gone must not hold up or end the gateway.
        if let Err(e) = socket.send_to_addr(text.as_bytes(), address) {
            tracing::debug!(cause = %e, text, "systemd could not be told");
        }
    }

    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// Until [`Notify::ready`].
    pub fn reloading(&self) {
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", clock::monotonic_us()));
    }

    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    /// Keeps systemd told how it goes, and that the gateway lives. Runs until it is dropped.
    pub async fn run(&self, broker: BrokerHandle, status: Status) {
        if self.socket.is_none() {
            return;
        }
        tokio::join!(self.feed(broker), self.tell(status));
    }

    async fn feed(&self, broker: BrokerHandle) {
        let Some(watchdog) = self.watchdog else { return };
        info!(after_s = watchdog.as_secs_f64(), "watched by systemd");
        loop {
            match broker.prove().await {
                Ok(()) | Err(PublishError::NotDurable(_) | PublishError::Full(_)) => self.send("WATCHDOG=1"),
                Err(PublishError::Stopped) => return,
            }
            tokio::time::sleep(watchdog / 2).await;
        }
    }

    async fn tell(&self, status: Status) {
        let mut changes = status.changes();
        let mut told = String::new();
        loop {
            changes.borrow_and_update();
            let text = in_words(&status);
            if text != told {
                self.send(&format!("STATUS={text}"));
                told = text;
            }
            tokio::time::sleep(STATUS_EVERY).await;
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}

fn open(path: &[u8]) -> std::io::Result<(UnixDatagram, SocketAddr)> {
    let address = match path.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(std::ffi::OsStr::from_bytes(path))?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}

/// `serving; uplink cloud late: …`, on one line.
fn in_words(status: &Status) -> String {
    let troubled: Vec<String> = status
        .report()
        .into_iter()
        .filter_map(|part| {
            let how = match part.health {
                Health::Good => return None,
                Health::Starting => "is starting",
                Health::Late => "is late",
                Health::Failed => "has failed",
            };
            Some(format!("{} {} {how}: {}", part.kind, part.name, part.text))
        })
        .collect();
    let text = match troubled.as_slice() {
        [] => "serving; everything is good".to_owned(),
        [one] => format!("serving; {one}"),
        [first, rest @ ..] => format!("serving; {first} (and {} more: tidegate status)", rest.len()),
    };
    text.replace(['\n', '\r'], " ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_says_how_it_goes() {
        let status = Status::default();
        let a = status.part("uplink", "a");
        a.set(Health::Good, "connected");
        assert_eq!(in_words(&status), "serving; everything is good");
        a.set(Health::Late, "refused\nWATCHDOG=1");
        assert_eq!(in_words(&status), "serving; uplink a is late: refused WATCHDOG=1");
        let _b = status.part("uplink", "b");
        assert!(in_words(&status).ends_with("(and 1 more: tidegate status)"));
    }
}
