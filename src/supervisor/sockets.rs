//! Sockets that systemd opened for us (socket activation): clients can connect while the gateway is started anew.

use std::net::TcpListener;
use std::os::fd::{FromRawFd, OwnedFd};

use socket2::{Domain, Socket, Type};
use tracing::warn;

/// The first one, by the protocol.
const FIRST_FD: i32 = 3;
/// More than anybody configures.
const SOCKETS_MAX: i32 = 256;

/// Takes the sockets over. To be called once, before anything else opens a file.
pub fn handed_over() -> Vec<TcpListener> {
    let number = |name: &str| std::env::var(name).ok()?.parse::<i32>().ok();
    // Without our number they are meant for the process that started us.
    if number("LISTEN_PID").is_none_or(|pid| u32::try_from(pid) != Ok(std::process::id())) {
        return Vec::new();
    }
    let count = number("LISTEN_FDS").unwrap_or(0).clamp(0, SOCKETS_MAX);
    (FIRST_FD..FIRST_FD + count)
        .filter_map(|fd| {
            // SAFETY: LISTEN_PID names this very process, so these descriptors are open and meant for it, and nothing
            // else in it owns them: they are taken once, at the start. One that is closed is found out below.
            let socket = Socket::from(unsafe { OwnedFd::from_raw_fd(fd) });
            match adopt(&socket) {
                Ok(()) => Some(socket.into()),
                Err(why) => {
                    warn!(
                        fd,
                        why, "systemd handed over a socket that is of no use here: it is closed"
                    );
                    None
                }
            }
        })
        .collect()
}

fn adopt(socket: &Socket) -> Result<(), String> {
    let text = |e: std::io::Error| e.to_string();
    // A module's compiler must not hold it open.
    socket.set_cloexec(true).map_err(text)?;
    let domain = socket.domain().map_err(text)?;
    if socket.r#type().map_err(text)? != Type::STREAM || !matches!(domain, Domain::IPV4 | Domain::IPV6) {
        return Err("it is not for TCP".to_owned());
    }
    if !socket.is_listener().map_err(text)? {
        return Err("it does not listen (is Accept=yes set in the socket unit?)".to_owned());
    }
    socket.set_nonblocking(true).map_err(text)
}
