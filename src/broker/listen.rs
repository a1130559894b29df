//! The listeners: sockets that take connections in, each a task, and which of them there are changes while running.
//!
//! A socket that systemd handed over is used in place of one that would be bound here: clients can connect while the
//! gateway is started anew. It is kept while the gateway runs, so that a listener that a reload takes out and another
//! brings back has it again.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use super::{Counted, Shared, connection};
use crate::config::Listener;
use crate::status::{Health, Status};

/// A listener that could not be opened is tried again this often.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);

/// A listener that is not up, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotListening {
    pub bind: SocketAddr,
    pub why: String,
}

/// A listener's settings, replaced as a whole: a connection has those it was accepted with.
type Settings = Rc<RefCell<Rc<Listener>>>;

/// The address, and whether it is the one that the configuration names (and not its other family's).
type Key = (SocketAddr, bool);

struct Place {
    settings: Settings,
    task: JoinHandle<()>,
}

pub struct Listeners {
    places: HashMap<Key, Place>,
    handed: Rc<Vec<(SocketAddr, std::net::TcpListener)>>,
    status: Status,
}

impl Listeners {
    /// `handed`: the sockets that systemd opened for us; those that no listener names are closed.
    pub fn new(wanted: &[Listener], handed: Vec<std::net::TcpListener>, status: &Status) -> Listeners {
        let mut kept = Vec::new();
        for socket in handed {
            match socket.local_addr() {
                Ok(at) if wanted.iter().any(|l| l.bind == at || l.bind_also == Some(at)) => kept.push((at, socket)),
                Ok(at) => {
                    warn!(%at, "systemd handed over a socket that no [[listener]] names as its bind: it is closed")
                }
                Err(e) => warn!(cause = %e, "systemd handed over a socket without an address: it is closed"),
            }
        }
        Listeners {
            places: HashMap::new(),
            handed: Rc::new(kept),
            status: status.clone(),
        }
    }

    /// Makes it so that exactly these listen; returns when each new one is open or has failed for the first time.
    pub async fn set(&mut self, shared: &Rc<Shared>, wanted: &[Listener]) -> Vec<NotListening> {
        let mut places: HashMap<Key, Rc<Listener>> = HashMap::new();
        for listener in wanted.iter().map(|l| Rc::new(l.clone())) {
            places.insert((listener.bind, true), Rc::clone(&listener));
            if let Some(also) = listener.bind_also {
                places.insert((also, false), listener);
            }
        }
        // Closed before anything is opened: an address may be in both, once by itself and once as a part of 0.0.0.0.
        let gone: Vec<Key> = self
            .places
            .keys()
            .filter(|key| !places.contains_key(key))
            .copied()
            .collect();
        for key in gone {
            if let Some(place) = self.places.remove(&key) {
                place.task.abort();
                // Its socket goes with the task, whatever the task says.
                let _ = place.task.await;
                info!(bind = %key.0, "no longer listening");
            }
        }
        let mut tried = Vec::new();
        for (key, listener) in places {
            if let Some(place) = self.places.get(&key) {
                *place.settings.borrow_mut() = listener;
                continue;
            }
            let settings: Settings = Rc::new(RefCell::new(listener));
            let (told, outcome) = oneshot::channel();
            let ear = Ear {
                key,
                shared: Rc::clone(shared),
                settings: Rc::clone(&settings),
                handed: Rc::clone(&self.handed),
                status: self.status.clone(),
            };
            let task = tokio::task::spawn_local(ear.run(told));
            self.places.insert(key, Place { settings, task });
            tried.push((key.0, outcome));
        }
        let mut failed = Vec::new();
        for (bind, outcome) in tried {
            if let Ok(Err(why)) = outcome.await {
                failed.push(NotListening { bind, why });
            }
        }
        failed
    }
}

/// One socket that accepts.
struct Ear {
    key: Key,
    shared: Rc<Shared>,
    settings: Settings,
    handed: Rc<Vec<(SocketAddr, std::net::TcpListener)>>,
    status: Status,
}

impl Ear {
    /// `told` gets the outcome of the first try.
    async fn run(self, told: oneshot::Sender<Result<(), String>>) {
        let (bind, is_named) = self.key;
        if !is_named {
            // A host without the other family is no fault.
            let opened = self.open().await;
            let _ = told.send(Ok(()));
            match opened {
                Ok(socket) => self.accept(socket).await,
                Err(e) => info!(%bind, cause = %e, "not listening there as well"),
            }
            return;
        }
        let mut told = Some(told);
        let part = self.status.part("listener", &bind.to_string());
        loop {
            match self.open().await {
                Ok(socket) => {
                    part.set(Health::Good, "listening");
                    info!(%bind, "listening for MQTT");
                    if let Some(told) = told.take() {
                        let _ = told.send(Ok(()));
                    }
                    self.accept(socket).await;
                }
                Err(e) => {
                    let why = in_words(bind, &e);
                    let text = format!("{why}; tried again every {} s", LISTEN_AGAIN.as_secs());
                    if part.set(Health::Failed, text) {
                        error!(%why, "listener failed; the rest runs on");
                    }
                    if let Some(told) = told.take() {
                        let _ = told.send(Err(why));
                    }
                    tokio::time::sleep(LISTEN_AGAIN).await;
                }
            }
        }
    }

    async fn open(&self) -> std::io::Result<TcpListener> {
        let (bind, _) = self.key;
        match self.handed.iter().find(|(at, _)| *at == bind) {
            Some((_, socket)) => {
                let socket = socket.try_clone()?;
                socket.set_nonblocking(true)?;
                TcpListener::from_std(socket)
            }
            None => TcpListener::bind(bind).await,
        }
    }

    async fn accept(&self, socket: TcpListener) {
        loop {
            match socket.accept().await {
                Ok((stream, peer)) => {
                    let shared = Rc::clone(&self.shared);
                    shared.connections.set(shared.connections.get() + 1);
                    let listener = Rc::clone(&self.settings.borrow());
                    tokio::task::spawn_local(async move {
                        let _count = Counted(Rc::clone(&shared));
                        connection::run(shared, stream, peer, listener).await;
                    });
                }
                Err(e) => {
                    // Out of descriptors, mostly: those who are here go on, the next is taken when one has left.
                    warn!(cause = %e, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }
}

fn in_words(bind: SocketAddr, e: &std::io::Error) -> String {
    match e.kind() {
        std::io::ErrorKind::AddrInUse => {
            let port = bind.port();
            format!("{bind} is in use by another program (find it with: ss -ltnp 'sport = :{port}')")
        }
        std::io::ErrorKind::AddrNotAvailable => format!("{bind} is no address of this machine"),
        std::io::ErrorKind::PermissionDenied => {
            format!("no permission to listen on {bind}; ports below 1024 need CAP_NET_BIND_SERVICE")
        }
        _ => format!("cannot listen on {bind}: {e}"),
    }
}

/// Whether a client that is connected to `local` could have come through one of these.
pub fn is_served(listeners: &[Listener], local: SocketAddr, is_anonymous: bool) -> bool {
    let local = SocketAddr::new(local.ip().to_canonical(), local.port());
    let serves = |at: SocketAddr| {
        at.port() == local.port()
            && (at.ip().to_canonical() == local.ip()
                // Linux takes IPv4 in on the IPv6 wildcard as well.
                || at.ip().is_unspecified() && (at.is_ipv6() || local.is_ipv4()))
    };
    listeners
        .iter()
        .any(|l| (serves(l.bind) || l.bind_also.is_some_and(serves)) && (l.allow_anonymous || !is_anonymous))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(bind: &str, allow_anonymous: bool) -> Listener {
        Listener {
            bind: bind.parse().expect(bind),
            bind_also: None,
            allow_anonymous,
            packet_bytes_max: 1,
            connections_max: 1,
            keep_alive_max_s: None,
            subscribe_refusal: crate::config::SubscribeRefusal::NotAuthorized,
        }
    }

    #[test]
    fn a_connection_belongs_to_whoever_listens_at_its_address() {
        let table = [
            ("127.0.0.1:1883", "127.0.0.1:1883", true),
            ("127.0.0.1:1883", "127.0.0.1:1884", false),
            ("127.0.0.1:1883", "192.0.2.1:1883", false),
            ("0.0.0.0:1883", "192.0.2.1:1883", true),
            ("0.0.0.0:1883", "[2001:db8::1]:1883", false),
            ("[::]:1883", "[2001:db8::1]:1883", true),
            ("[::]:1883", "[::ffff:192.0.2.1]:1883", true),
            ("192.0.2.1:1883", "[::ffff:192.0.2.1]:1883", true),
        ];
        for (bind, local, expected) in table {
            let local = local.parse().expect(local);
            assert_eq!(
                is_served(&[listener(bind, true)], local, true),
                expected,
                "{bind} {local}"
            );
            assert!(!is_served(&[listener(bind, false)], local, true));
            assert_eq!(
                is_served(&[listener(bind, false)], local, false),
                expected,
                "{bind} {local}"
            );
        }
    }
}
