//! The local MQTT broker: MQTT 3.1, 3.1.1 and 5 over TCP, TLS, WebSocket and Unix sockets.
//!
//! One thread runs it all: connections, sessions, routing. Promise: a QoS 1 PUBLISH on a topic that anything durable
//! consumes gets its PUBACK (QoS 2: its PUBREC) after the commit that holds it, in the order of the PUBLISHes.

pub mod access;
mod aliases;
mod auth;
pub mod codec;
mod connection;
mod core;
pub mod handle;
mod listen;
mod logins;
mod pace;
mod properties;
mod repeats;
mod router;
mod session;
mod sys;
pub mod tap;
mod transport;
mod unauthenticated;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::sync::{Notify, Semaphore, mpsc};
use tracing::{error, warn};

use self::access::Grant;
use self::core::{Core, Counters, Sys};
use self::handle::{BrokerHandle, ConfigureError, Request};
use self::listen::Listeners;
pub use self::listen::NotListening;
use self::repeats::Repeats;
use self::router::SessionId;
use self::unauthenticated::Unauthenticated;
use crate::clock;
use crate::config::{Anonymous, BrokerSettings, Config, Listener, Stream, User};
use crate::essential::Essential;
use crate::log::{Log, Startup};
use crate::status::{Health, Status};

/// Requests of in-process clients served under one lock of the log.
const REQUESTS_A_TURN: usize = 32;

/// What the tasks of the network thread share.
pub struct Shared {
    pub(self) core: RefCell<Core>,
    pub log: Log,
    /// The read buffer of the thread.
    pub(self) buffer: RefCell<BytesMut>,
    /// What a socket brought, before TLS and WebSocket are taken off.
    pub(self) raw: RefCell<BytesMut>,
    /// Taken by who does the next step of a TLS handshake.
    pub(self) handshakes: Semaphore,
    pub(self) unauthenticated: Rc<Unauthenticated>,
    pub(self) passwords: auth::Passwords,
    /// What passes the sockets.
    pub(self) tally: Rc<sys::Tally>,
    pub connections: Cell<u32>,
    /// Those of them that have not said CONNECT yet.
    pub(self) greeting: Cell<u32>,
    /// Wakes who waits for that to be none.
    pub(self) greeted: Notify,
    /// As they are configured now.
    pub(self) listeners: RefCell<Vec<Listener>>,
    /// What was logged already.
    pub(self) repeats: RefCell<Repeats>,
    /// Wakes the task that ends a turn: it runs behind the connections that are ready now.
    pub(self) turn_ends: Notify,
    /// Wakes those who wait for a commit.
    pub(self) committed: Notify,
}

impl Shared {
    /// Writes out what the core has put into connections' buffers.
    fn flush(&self) {
        let dirty = self.core.borrow_mut().take_dirty();
        for conn in dirty {
            conn.flush_or_wake();
        }
    }

    /// After the core was given something: reads that it wants are started; bytes are written when the turn ends, so
    /// that what several connections have for one is one write.
    fn after(self: &Rc<Self>) {
        let reads = self.core.borrow_mut().take_reads();
        for (reading, stream, after, filters) in reads {
            let shared = Rc::clone(self);
            tokio::task::spawn_local(async move {
                let read = match shared.log.read(stream, after, filters).await {
                    Ok(read) => read,
                    Err(e) => {
                        warn!(cause = %e, ?reading, "a session's messages cannot be read; tried again");
                        tokio::time::sleep(Duration::from_secs(1)).await;
                        crate::log::Read::Nothing(after)
                    }
                };
                {
                    let mut core = shared.core.borrow_mut();
                    let mut batch = shared.log.turn();
                    core.read_ended(reading, stream, after, read, &mut batch);
                }
                shared.after();
            });
        }
        let (is_dirty, is_much) = self.core.borrow().has_dirty();
        if is_much {
            self.flush();
        }
        if is_dirty || self.log.owes_wake() {
            self.turn_ends.notify_one();
        }
    }

    /// The session's connection has taken bytes, or it was acknowledged something.
    fn pump(self: &Rc<Self>, id: SessionId) {
        {
            let mut core = self.core.borrow_mut();
            let mut batch = self.log.turn();
            core.pump(id, &mut batch);
        }
        self.after();
    }
}

/// What of a configuration is the broker's.
#[derive(Debug, Clone, PartialEq)]
pub struct Configuration {
    pub settings: BrokerSettings,
    pub listeners: Vec<Listener>,
    pub anonymous: Anonymous,
    pub users: Vec<User>,
    pub streams: Vec<Stream>,
}

impl Configuration {
    pub fn of(config: &Config) -> Configuration {
        Configuration {
            settings: config.broker.clone(),
            listeners: config.listeners.clone(),
            anonymous: config.anonymous.clone(),
            users: config.users.clone(),
            streams: config.streams.clone(),
        }
    }

    fn grants(&self) -> (Grant, HashMap<String, Grant>) {
        let of = |u: &User| (u.name.clone(), Grant::new(Some(&u.name), &u.access, u.limits));
        let anonymous = Grant::new(None, &self.anonymous.access, self.anonymous.limits);
        (anonymous, self.users.iter().map(of).collect())
    }
}

/// The network thread. Dropped or told to shut down, it ends.
pub struct Broker {
    pub handle: BrokerHandle,
    thread: std::thread::JoinHandle<()>,
}

impl Broker {
    /// Starts the thread. `handed`: sockets that systemd opened for us. Nobody is listened to before
    /// [`BrokerHandle::listen`]; `ready` is told once, when every listener is open or has failed for the first time.
    pub fn start(
        config: &Config,
        log: Log,
        startup: Startup,
        status: &Status,
        handed: Vec<std::net::TcpListener>,
        ready: tokio::sync::oneshot::Sender<()>,
    ) -> std::io::Result<Broker> {
        let (handle, requests) = BrokerHandle::new(log.clone());
        let configuration = Configuration::of(config);
        let gateway = config.gateway.name.clone();
        let status = status.clone();
        let thread = std::thread::Builder::new().name("network".into()).spawn(move || {
            let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
                Ok(runtime) => runtime,
                Err(e) => return error!(cause = %e, "the network thread has no runtime"),
            };
            let part = status.part("broker", "broker");
            part.set(Health::Good, "serving");
            let (settings, tally) = (&configuration.settings, Rc::<sys::Tally>::default());
            let sys = Sys::new(&gateway, settings.sys_interval, status.clone(), Rc::clone(&tally));
            let grants = configuration.grants();
            let core = Core::new(log.clone(), startup, grants, settings, sys, Counters::new(&part));
            let shared = Rc::new(Shared {
                core: RefCell::new(core),
                log,
                buffer: RefCell::new(BytesMut::new()),
                raw: RefCell::new(BytesMut::new()),
                handshakes: Semaphore::new(1),
                unauthenticated: Rc::new(Unauthenticated::new(
                    part.counter("unauthenticated"),
                    part.counter("turned_away"),
                )),
                passwords: auth::Passwords::new(&configuration.users, settings.failed_logins_per_minute),
                tally,
                connections: Cell::new(0),
                greeting: Cell::new(0),
                greeted: Notify::new(),
                listeners: RefCell::new(configuration.listeners.clone()),
                repeats: RefCell::default(),
                turn_ends: Notify::new(),
                committed: Notify::new(),
            });
            let local = tokio::task::LocalSet::new();
            let listeners = Listeners::new(&configuration.listeners, handed, &status);
            local.block_on(&runtime, run(shared, listeners, requests, ready));
        })?;
        Ok(Broker { handle, thread })
    }

    /// Waits for the thread, which ends when told to by [`BrokerHandle::shut_down`].
    pub fn join(self) {
        drop(self.handle);
        if self.thread.join().is_err() {
            error!("the network thread ended with a panic");
        }
    }
}

async fn run(
    shared: Rc<Shared>,
    mut listeners: Listeners,
    mut requests: mpsc::Receiver<Request>,
    ready: tokio::sync::oneshot::Sender<()>,
) {
    tokio::task::spawn_local(follow_commits(Rc::clone(&shared)));
    tokio::task::spawn_local(keep_time(Rc::clone(&shared)));
    tokio::task::spawn_local(end_turns(Rc::clone(&shared)));
    serve_requests(&shared, &mut listeners, &mut requests, ready).await;
}

/// How long a stop waits for connections that were just taken in; all of a stop has 5 s.
const GREETING_AT_THE_END: Duration = Duration::from_millis(100);

/// Counts a connection until its task ends, however it ends.
struct Counted(Rc<Shared>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.connections.set(self.0.connections.get().saturating_sub(1));
    }
}

/// Counts a connection until it has said CONNECT and was answered.
struct Greeting(Rc<Shared>);

impl Greeting {
    fn begin(shared: &Rc<Shared>) -> Greeting {
        shared.greeting.set(shared.greeting.get() + 1);
        Greeting(Rc::clone(shared))
    }
}

impl Drop for Greeting {
    fn drop(&mut self) {
        self.0.greeting.set(self.0.greeting.get().saturating_sub(1));
        self.0.greeted.notify_waiters();
    }
}

async fn follow_commits(shared: Rc<Shared>) {
    let _essential = Essential("follow-commits");
    loop {
        shared.log.commit_ended().await;
        let events = shared.log.commit_events();
        {
            let mut core = shared.core.borrow_mut();
            let mut batch = shared.log.turn();
            for event in events {
                core.commit_ended(event.generation, &event.result, &mut batch);
            }
            core.retry(&mut batch);
        }
        shared.after();
        shared.committed.notify_waiters();
    }
}

async fn end_turns(shared: Rc<Shared>) {
    let _essential = Essential("end-turns");
    loop {
        shared.turn_ends.notified().await;
        if shared.log.owes_wake() {
            shared.log.wake_writer();
        }
        shared.flush();
    }
}

async fn keep_time(shared: Rc<Shared>) {
    let _essential = Essential("keep-time");
    let mut losses_told = 0;
    let mut every = tokio::time::interval(Duration::from_secs(1));
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        {
            let mut core = shared.core.borrow_mut();
            let mut batch = shared.log.turn();
            core.tick(clock::monotonic(), &mut batch);
        }
        shared.after();
        let losses = shared.log.losses_inside();
        if losses != losses_told && tell_losses(&shared).await {
            losses_told = losses;
        }
    }
}

/// What sessions and modules lost is published, and so goes up by the routes; uplinks tell of their own losses themselves.
async fn tell_losses(shared: &Rc<Shared>) -> bool {
    let rows = match shared.log.losses_unsent("").await {
        Ok(rows) => rows,
        Err(e) => {
            warn!(cause = %e, "the loss ledger cannot be read; tried again");
            return false;
        }
    };
    {
        let mut core = shared.core.borrow_mut();
        let mut batch = shared.log.turn();
        for row in &rows {
            core.tell_loss(row, &mut batch);
        }
    }
    shared.after();
    true
}

async fn serve_requests(
    shared: &Rc<Shared>,
    listeners: &mut Listeners,
    requests: &mut mpsc::Receiver<Request>,
    ready: tokio::sync::oneshot::Sender<()>,
) {
    let _essential = Essential("requests");
    let mut ready = Some(ready);
    while let Some(first) = requests.recv().await {
        let mut next = Some(first);
        let mut served = 0;
        while shared.log.is_congested() {
            shared.committed.notified().await;
        }
        let mut wanted = None;
        let mut ending = None;
        let mut listening = false;
        {
            let mut core = shared.core.borrow_mut();
            let mut batch = shared.log.turn();
            while let Some(request) = next.take() {
                match request {
                    Request::Apply {
                        name,
                        effects,
                        cursors,
                        reply,
                    } => core.apply(&name, effects, cursors, reply, &mut batch),
                    Request::Consumer { name, filters, reply } => {
                        let _ = reply.send(core.open_consumer(&name, &filters, &mut batch));
                    }
                    Request::Configure { configuration, reply } => {
                        wanted = Some((configuration, reply));
                        break;
                    }
                    Request::Listen => {
                        listening = true;
                        break;
                    }
                    Request::Prove { reply } => core.prove(reply, &mut batch),
                    Request::Tap { feed } => core.add_tap(feed),
                    Request::Audience { topic, qos, reply } => {
                        let _ = reply.send(core.audience(&topic, qos));
                    }
                    Request::Clients { from, reply } => {
                        let _ = reply.send(core.clients_page(from));
                    }
                    Request::Client { client_id, reply } => {
                        let _ = reply.send(core.client_detail(&client_id));
                    }
                    Request::Kick {
                        client_id,
                        end_session,
                        found,
                        reply,
                    } => {
                        let _ = found.send(core.kick(&client_id, end_session, reply, &mut batch));
                    }
                    Request::Retained { filter, after, reply } => {
                        let _ = reply.send(core.retained_page(&filter, after.as_deref()));
                    }
                    Request::ClearRetained {
                        filter,
                        after,
                        found,
                        reply,
                    } => {
                        let _ = found.send(core.clear_retained(&filter, after.as_deref(), reply, &mut batch));
                    }
                    Request::Retire { name } => core.retire_consumer(&name, &mut batch),
                    Request::ShutDown { reply } => {
                        ending = Some(reply);
                        break;
                    }
                }
                served += 1;
                if served < REQUESTS_A_TURN {
                    next = requests.try_recv().ok();
                }
            }
        }
        shared.after();
        if listening {
            let wanted = shared.listeners.borrow().clone();
            // Those that failed say so by their status, and try again.
            listeners.set(shared, &wanted).await;
            if let Some(ready) = ready.take() {
                let _ = ready.send(());
            }
        }
        if let Some(reply) = ending {
            take_nobody_in(shared, listeners).await;
            shared.core.borrow_mut().shut_down();
            shared.after();
            // Who asked ends the thread, and the turn may have no end.
            shared.flush();
            let _ = reply.send(());
        }
        if let Some((configuration, reply)) = wanted {
            // Whoever asked may be gone.
            let _ = reply.send(configure(shared, listeners, *configuration).await);
        }
    }
}

/// Who comes from now on waits in the queue of a socket that systemd holds, for the gateway that is started next, instead of
/// being taken in and refused. Who was taken in already may finish saying CONNECT.
async fn take_nobody_in(shared: &Rc<Shared>, listeners: &mut Listeners) {
    listeners.set(shared, &[]).await;
    let greeted = async {
        while shared.greeting.get() > 0 {
            shared.greeted.notified().await;
        }
    };
    let _ = tokio::time::timeout(GREETING_AT_THE_END, greeted).await;
}

/// Takes over another configuration while clients are connected: all of it, or nothing.
async fn configure(
    shared: &Rc<Shared>,
    listeners: &mut Listeners,
    new: Configuration,
) -> Result<Vec<NotListening>, ConfigureError> {
    {
        let mut core = shared.core.borrow_mut();
        let mut batch = shared.log.turn();
        core.set_streams(&new.streams, &mut batch)?;
        let gone: HashSet<String> = shared.passwords.set(&new.users);
        shared
            .passwords
            .set_failed_logins(new.settings.failed_logins_per_minute);
        let (anonymous, users) = new.grants();
        core.set_grants(anonymous, users, &gone);
        core.set_settings(&new.settings);
        core.set_listeners(&new.listeners);
    }
    *shared.listeners.borrow_mut() = new.listeners.clone();
    shared.after();
    Ok(listeners.set(shared, &new.listeners).await)
}
