//! The listeners: sockets that take connections in, each a task, and which of them there are changes while running.
//!
//! A socket that systemd handed over is used in place of one that would be bound here: clients can connect while the
//! gateway is started anew. It is kept while the gateway runs, so that a listener that a reload takes out and another
//! brings back has it again. A certificate's files are looked at every [`LOOK_EVERY`]: a new pair is for who connects from then on,
//! one that cannot be used leaves the old in its place, and says so.

use std::cell::RefCell;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpSocket, UnixListener};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use super::connection::{self, Guest};
use super::transport::{Accepted, Entrance, Local, Peer};
use super::{Counted, Shared};
use crate::certificate::server::{self, ServerConfig};
use crate::certificate::{self, Validity};
use crate::clock::{self, Instant};
use crate::config::{Bind, Listener};
use crate::status::{Health, Part, Status};

/// Connections that the kernel holds until they are taken in: thousands may come back in one moment. It grants at most
/// net.core.somaxconn, 4,096 by default.
const BACKLOG: u32 = 4_096;

/// A listener that could not be opened is tried again this often.
const LISTEN_AGAIN: Duration = Duration::from_secs(5);
/// How often the files of a certificate are looked at. One that has changed is read when it was the same twice: who renews
/// writes two files.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often it is logged that a certificate ends soon.
const WARN_EVERY: Duration = Duration::from_secs(86_400);

/// A listener that is not up, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NotListening {
    pub bind: Bind,
    pub why: String,
}

/// A listener's settings, replaced as a whole: a connection has those it was accepted with.
type Settings = Rc<RefCell<Setup>>;

#[derive(Clone)]
struct Setup {
    listener: Rc<Listener>,
    tls: Option<Tls>,
}

/// A certificate that is in use.
#[derive(Clone)]
struct Tls {
    config: Arc<ServerConfig>,
    validity: Validity,
    /// As the files were when they were read.
    stamp: Vec<Stamp>,
}

/// What tells one state of a file from another, the one behind a symbolic link; None: it is not there.
type Stamp = Option<(u64, u64, i64, i64, i64, i64, u64)>;

/// The address, and whether it is the one that the configuration names (and not its other family's).
type Key = (Bind, bool);

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
                Ok(at)
                    if wanted
                        .iter()
                        .any(|l| l.bind == Bind::Address(at) || l.bind_also == Some(at)) =>
                {
                    kept.push((at, socket))
                }
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
            places.insert((listener.bind.clone(), true), Rc::clone(&listener));
            if let Some(also) = listener.bind_also {
                places.insert((Bind::Address(also), false), listener);
            }
        }
        // Closed before anything is opened: an address may be in both, once by itself and once as a part of 0.0.0.0.
        let gone: Vec<Key> = self
            .places
            .keys()
            .filter(|key| !places.contains_key(key))
            .cloned()
            .collect();
        for key in gone {
            self.close(&key).await;
            info!(bind = %key.0, "no longer listening");
        }
        let mut tried = Vec::new();
        for (key, listener) in places {
            if let Some(place) = self.places.get(&key) {
                let old = place.settings.borrow().clone();
                // One that waits for its certificate is begun anew, so that it does not wait longer than it has to.
                let is_waiting = old.listener.tls.is_some() && old.tls.is_none();
                let loaded = match (&listener.tls, &old.listener.tls) {
                    _ if is_waiting => None,
                    (Some(new), Some(before)) if new.files == before.files => Some(old.tls),
                    // Another certificate: with it the socket stays open, without it the listener fails as a new one does.
                    _ => load(&listener).await.ok(),
                };
                if let Some(tls) = loaded {
                    *place.settings.borrow_mut() = Setup { listener, tls };
                    continue;
                }
                self.close(&key).await;
            }
            let settings: Settings = Rc::new(RefCell::new(Setup { listener, tls: None }));
            let (told, outcome) = oneshot::channel();
            let ear = Ear {
                key: key.clone(),
                shared: Rc::clone(shared),
                settings: Rc::clone(&settings),
                handed: Rc::clone(&self.handed),
                status: self.status.clone(),
            };
            let task = tokio::task::spawn_local(ear.run(told));
            tried.push((key.0.clone(), outcome));
            self.places.insert(key, Place { settings, task });
        }
        let mut failed = Vec::new();
        for (bind, outcome) in tried {
            if let Ok(Err(why)) = outcome.await {
                failed.push(NotListening { bind, why });
            }
        }
        failed
    }

    async fn close(&mut self, key: &Key) {
        if let Some(place) = self.places.remove(key) {
            place.task.abort();
            // Its socket goes with the task, whatever the task says.
            let _ = place.task.await;
        }
    }
}

/// None where the listener is without TLS.
async fn load(listener: &Listener) -> Result<Option<Tls>, String> {
    let Some(tls) = &listener.tls else { return Ok(None) };
    let files = tls.files.clone();
    // The files may lie on a slow disk, and a key takes some arithmetic to check.
    let loaded = tokio::task::spawn_blocking(move || {
        let stamp = stamp(&files);
        let (config, validity) = server::load(&files)?;
        Ok::<_, server::Error>(Tls {
            config: Arc::new(config),
            validity,
            stamp,
        })
    });
    match loaded.await {
        Ok(loaded) => loaded.map(Some).map_err(|e| e.to_string()),
        Err(e) => Err(e.to_string()),
    }
}

fn stamp(files: &server::Files) -> Vec<Stamp> {
    let all = [Some(&files.cert), Some(&files.key), files.client_ca.as_ref()];
    let of = |path: &PathBuf| {
        let m = std::fs::metadata(path).ok()?;
        Some((
            m.dev(),
            m.ino(),
            m.mtime(),
            m.mtime_nsec(),
            m.ctime(),
            m.ctime_nsec(),
            m.len(),
        ))
    };
    all.into_iter().flatten().map(of).collect()
}

/// One socket that accepts.
struct Ear {
    key: Key,
    shared: Rc<Shared>,
    settings: Settings,
    handed: Rc<Vec<(SocketAddr, std::net::TcpListener)>>,
    status: Status,
}

enum Socket {
    Tcp(TcpListener),
    Unix {
        socket: UnixListener,
        /// The path is taken away with it.
        _path: Remove,
    },
}

/// Takes a Unix socket's path away, unless another has taken its place.
struct Remove {
    path: PathBuf,
    inode: u64,
}

impl Drop for Remove {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|m| m.ino() == self.inode) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Ear {
    /// `told` gets the outcome of the first try.
    async fn run(self, told: oneshot::Sender<Result<(), String>>) {
        let (bind, is_named) = self.key.clone();
        if !is_named {
            // A host without the other family is no fault.
            let opened = self.open().await;
            let _ = told.send(Ok(()));
            match opened {
                Ok(socket) => tokio::join!(self.accept(&socket), self.renew(None)).0,
                Err(cause) => info!(%bind, cause, "not listening there as well"),
            }
            return;
        }
        let mut told = Some(told);
        let part = self.status.part("listener", &bind.to_string());
        loop {
            match self.open().await {
                Ok(socket) => {
                    part.set(Health::Good, "listening");
                    let url = self.settings.borrow().listener.url();
                    info!(%url, "listening for MQTT");
                    if let Some(told) = told.take() {
                        let _ = told.send(Ok(()));
                    }
                    tokio::join!(self.accept(&socket), self.renew(Some(&part)));
                }
                Err(why) => {
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

    async fn open(&self) -> Result<Socket, String> {
        let (bind, _) = &self.key;
        let listener = Rc::clone(&self.settings.borrow().listener);
        let tls = load(&listener)
            .await
            .map_err(|e| format!("{bind} is not listened to: {e}"))?;
        self.settings.borrow_mut().tls = tls;
        match bind {
            Bind::Address(address) => self.open_tcp(*address).await.map_err(|e| in_words(*address, &e)),
            Bind::Unix(path) => open_unix(path).map_err(|e| match e.kind() {
                std::io::ErrorKind::PermissionDenied => format!("no permission to make {bind}"),
                std::io::ErrorKind::NotFound => format!("{bind} cannot be made: its folder does not exist"),
                _ => format!("cannot listen on {bind}: {e}"),
            }),
        }
    }

    async fn open_tcp(&self, address: SocketAddr) -> std::io::Result<Socket> {
        match self.handed.iter().find(|(at, _)| *at == address) {
            Some((_, socket)) => {
                let socket = socket.try_clone()?;
                socket.set_nonblocking(true)?;
                TcpListener::from_std(socket).map(Socket::Tcp)
            }
            None => {
                let socket = match address {
                    SocketAddr::V4(_) => TcpSocket::new_v4()?,
                    SocketAddr::V6(_) => TcpSocket::new_v6()?,
                };
                socket.set_reuseaddr(true)?;
                socket.bind(address)?;
                socket.listen(BACKLOG).map(Socket::Tcp)
            }
        }
    }

    async fn accept(&self, socket: &Socket) {
        loop {
            let accepted = match socket {
                Socket::Tcp(socket) => socket
                    .accept()
                    .await
                    .map(|(stream, peer)| (Accepted::Tcp(stream), Peer::Address(peer))),
                Socket::Unix { socket, .. } => socket.accept().await.map(|(stream, _)| {
                    let user_id = stream.peer_cred().ok().map(|c| c.uid());
                    (Accepted::Unix(stream), Peer::Unix { user_id })
                }),
            };
            match accepted {
                Ok((stream, peer)) => {
                    let shared = Rc::clone(&self.shared);
                    let place = shared.unauthenticated.enter().await;
                    shared.connections.set(shared.connections.get() + 1);
                    let Setup { listener, tls } = self.settings.borrow().clone();
                    let guest = Guest {
                        stream,
                        peer,
                        listener,
                        tls: tls.map(|tls| tls.config),
                        place,
                    };
                    tokio::task::spawn_local(async move {
                        let _count = Counted(Rc::clone(&shared));
                        connection::run(shared, guest).await;
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

    /// Looks at the certificate's files for as long as the socket is open.
    async fn renew(&self, part: Option<&Part>) {
        let mut watch = Watch::default();
        loop {
            self.look(part, &mut watch).await;
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    async fn look(&self, part: Option<&Part>, watch: &mut Watch) {
        let Setup { listener, tls } = self.settings.borrow().clone();
        let (Some(tls), Some(configured)) = (tls, &listener.tls) else {
            if let Some(part) = part {
                part.set(Health::Good, "listening");
            }
            return;
        };
        // Three questions to the kernel, less than handing them to a thread would take.
        let now = stamp(&configured.files);
        if now == tls.stamp {
            // As it is in use; also where a change was taken back.
            (watch.seen, watch.refused) = (None, None);
        } else if watch.seen.as_ref() != Some(&now) {
            watch.seen = Some(now);
        } else if watch.refused.as_ref().is_none_or(|(stamp, _)| *stamp != now) {
            let loaded = load(&listener).await;
            // A reload may have come meanwhile.
            if !Rc::ptr_eq(&listener, &self.settings.borrow().listener) {
                return;
            }
            match loaded {
                Ok(Some(new)) => {
                    let until = new.validity.last_day();
                    self.settings.borrow_mut().tls = Some(new);
                    if part.is_some() {
                        info!(bind = %self.key.0, until, "the certificate was renewed; who is connected stays");
                    }
                    *watch = Watch::default();
                }
                Ok(None) => {}
                Err(why) => {
                    if part.is_some() {
                        warn!(bind = %self.key.0, why, "the new certificate cannot be used; the old one stays in use");
                    }
                    watch.refused = Some((now, why));
                }
            }
        }
        if let Some(part) = part {
            self.say(part, watch);
        }
    }

    /// How the certificate in use is.
    fn say(&self, part: &Part, watch: &mut Watch) {
        let Some(validity) = self.settings.borrow().tls.as_ref().map(|t| t.validity) else {
            return;
        };
        let (date, days) = (validity.last_day(), validity.days_left(clock::wall()));
        let ends = match days {
            ..0 => Some(format!("its certificate has expired on {date}: clients refuse it")),
            days if days < certificate::SOON_DAYS => Some(format!("its certificate expires on {date}, in {days} days")),
            _ => None,
        };
        if let Some(text) = &ends {
            let now = clock::monotonic();
            let is_due = watch
                .warned
                .is_none_or(|at| now.saturating_duration_since(at) >= WARN_EVERY);
            if is_due {
                watch.warned = Some(now);
                warn!(bind = %self.key.0, "{text}; renew the files, they are taken over by themselves");
            }
        }
        let refused = watch
            .refused
            .as_ref()
            .map(|(_, why)| format!("the new certificate cannot be used, the old one stays in use: {why}"));
        let problems: Vec<String> = refused.into_iter().chain(ends).collect();
        match problems.is_empty() {
            true => part.set(Health::Good, "listening"),
            false => part.set(Health::Late, format!("listening; {}", problems.join("; "))),
        };
    }
}

/// What is known of the files beside what is in use.
#[derive(Default)]
struct Watch {
    /// As they were at the last look, where they are not those in use.
    seen: Option<Vec<Stamp>>,
    /// In this state they cannot be used, and why.
    refused: Option<(Vec<Stamp>, String)>,
    warned: Option<Instant>,
}

/// For the owner and the group from the first moment: on Linux a socket's file gets the mode of its descriptor, less the
/// umask. What another gateway left behind is replaced; where somebody answers, it is his.
fn open_unix(path: &Path) -> std::io::Result<Socket> {
    if let Ok(found) = std::fs::symlink_metadata(path) {
        let taken = |why: &str| Err(std::io::Error::new(std::io::ErrorKind::AddrInUse, why.to_owned()));
        if !found.file_type().is_socket() {
            return taken("there is a file there that is no socket; take it away or choose another path");
        }
        let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        match socket.connect(&socket2::SockAddr::unix(path)?) {
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => std::fs::remove_file(path)?,
            // Its queue is full: somebody is there.
            Ok(()) | Err(_) => return taken("another program listens there"),
        }
    }
    let mode = std::fs::Permissions::from_mode(0o660);
    let socket = socket2::Socket::new(socket2::Domain::UNIX, socket2::Type::STREAM, None)?;
    let file = std::fs::File::from(std::os::fd::OwnedFd::from(socket));
    file.set_permissions(mode.clone())?;
    let socket = socket2::Socket::from(std::os::fd::OwnedFd::from(file));
    socket.bind(&socket2::SockAddr::unix(path)?)?;
    let _path = Remove {
        path: path.to_owned(),
        inode: std::fs::symlink_metadata(path)?.ino(),
    };
    // The umask may have taken the group's part away.
    std::fs::set_permissions(path, mode)?;
    socket.listen(1_024)?;
    socket.set_nonblocking(true)?;
    let socket = UnixListener::from_std(std::os::fd::OwnedFd::from(socket).into())?;
    Ok(Socket::Unix { socket, _path })
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

/// Whether a client that came in like this could have come through one of these.
pub fn is_served(listeners: &[Listener], entrance: &Entrance, is_anonymous: bool) -> bool {
    let is_there = |l: &Listener| match (&entrance.local, &l.bind) {
        (Local::Unix(at), Bind::Unix(path)) => **at == **path,
        (Local::Address(local), Bind::Address(bind)) => {
            let also = l.bind_also.is_some_and(|also| serves(also, *local));
            serves(*bind, *local) || also
        }
        (Local::Unix(_), Bind::Address(_)) | (Local::Address(_), Bind::Unix(_)) => false,
    };
    let speaks = |l: &Listener| {
        let needs_certificate = l
            .tls
            .as_ref()
            .is_some_and(|t| t.files.client_ca.is_some() && !t.files.client_cert_is_optional);
        l.tls.is_some() == entrance.tls
            && l.websocket == entrance.websocket
            && l.proxy_protocol == entrance.proxy_protocol
            && (entrance.has_certificate || !needs_certificate)
    };
    listeners
        .iter()
        .any(|l| is_there(l) && speaks(l) && (l.allow_anonymous || !is_anonymous))
}

fn serves(at: SocketAddr, local: SocketAddr) -> bool {
    let local = SocketAddr::new(local.ip().to_canonical(), local.port());
    at.port() == local.port()
        && (at.ip().to_canonical() == local.ip()
            // Linux takes IPv4 in on the IPv6 wildcard as well.
            || at.ip().is_unspecified() && (at.is_ipv6() || local.is_ipv4()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(bind: &str, allow_anonymous: bool) -> Listener {
        let bind = match bind.strip_prefix("unix:") {
            Some(path) => Bind::Unix(path.into()),
            None => Bind::Address(bind.parse().expect(bind)),
        };
        Listener {
            bind,
            bind_also: None,
            allow_anonymous,
            tls: None,
            websocket: false,
            origins: Vec::new(),
            proxy_protocol: false,
            packet_bytes_max: 1,
            connections_max: 1,
            keep_alive_max_s: None,
            subscribe_refusal: crate::config::SubscribeRefusal::NotAuthorized,
        }
    }

    fn entrance(local: &str) -> Entrance {
        Entrance {
            local: match local.strip_prefix("unix:") {
                Some(path) => Local::Unix(Path::new(path).into()),
                None => Local::Address(local.parse().expect(local)),
            },
            tls: false,
            websocket: false,
            proxy_protocol: false,
            has_certificate: false,
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
            ("unix:/run/a", "unix:/run/a", true),
            ("unix:/run/a", "unix:/run/b", false),
            ("unix:/run/a", "127.0.0.1:1883", false),
        ];
        for (bind, local, expected) in table {
            let entrance = entrance(local);
            let served = |listener, is_anonymous| is_served(&[listener], &entrance, is_anonymous);
            assert_eq!(served(listener(bind, true), true), expected, "{bind} {local}");
            assert!(!served(listener(bind, false), true));
            assert_eq!(served(listener(bind, false), false), expected, "{bind} {local}");
        }
    }

    #[test]
    fn a_connection_belongs_to_who_speaks_as_it_does() {
        let bind = "127.0.0.1:8883";
        let by = |tls, websocket, proxy_protocol, has_certificate| Entrance {
            tls,
            websocket,
            proxy_protocol,
            has_certificate,
            ..entrance(bind)
        };
        let files = server::Files {
            cert: "c".into(),
            key: "k".into(),
            client_ca: None,
            client_cert_is_optional: false,
        };
        let tls = |files| Listener {
            tls: Some(crate::config::ServerTls { files, identity: None }),
            ..listener(bind, true)
        };
        let asking = server::Files {
            client_ca: Some("ca".into()),
            ..files.clone()
        };
        let optional = server::Files {
            client_cert_is_optional: true,
            ..asking.clone()
        };
        let (plain, secret) = (by(false, false, false, false), by(true, false, false, false));
        let shown = by(true, false, false, true);
        assert!(is_served(&[tls(files.clone())], &secret, true) && !is_served(&[tls(files)], &plain, true));
        assert!(!is_served(&[listener(bind, true)], &secret, true));
        assert!(is_served(&[tls(asking.clone())], &shown, true) && !is_served(&[tls(asking)], &secret, true));
        assert!(is_served(&[tls(optional)], &secret, true));
        assert!(!is_served(
            &[listener(bind, true)],
            &by(false, true, false, false),
            true
        ));
        assert!(!is_served(
            &[listener(bind, true)],
            &by(false, false, true, false),
            true
        ));
    }
}
