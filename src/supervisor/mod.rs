//! The one tree: starts the parts in order, keeps them running, takes over another configuration, stops them in order.
//!
//! Order of start: log, broker, uplinks, modules, connectors; of stop: the reverse, so that what is produced last is
//! still taken, delivered or kept.
//!
//! # Layout
//! - [`tree`]: the parts beside the network thread
//! - [`reload`]: another configuration while running, and back
//! - [`notify`], [`sockets`]: systemd

mod notify;
mod reload;
mod sockets;
mod tree;

use std::fmt::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tracing::info;

use self::notify::Notify;
use self::reload::Reloads;
use self::tree::Tree;
use crate::admin;
use crate::broker::Broker;
use crate::broker::handle::BrokerHandle;
use crate::clock;
use crate::config::{Config, Listener, UplinkKind};
use crate::control::{Control, ReloadOptions, ReloadRequest};
use crate::log::Log;
use crate::status::{Health, Status};

/// What is free between what is in use goes back to the system this often: 20,000 points touch 8 MB of the start's
/// leavings again within a minute. It takes 1 ms.
const TIDY_EVERY: Duration = Duration::from_secs(20);

/// Runs the gateway until SIGTERM or SIGINT ends it.
pub fn run(config: Config) -> anyhow::Result<()> {
    crate::logging::start();
    give_back_memory();
    let handed = sockets::handed_over();
    let notify = Arc::new(Notify::from_env());
    let status = Status::default();
    let (log, log_threads, startup) = Log::open(&config.gateway.data_dir, &config.streams, &status)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("edge")
        .max_blocking_threads(4)
        .build()
        .context("no runtime for the edge tasks")?;
    let (ready, listening) = oneshot::channel();
    let broker = Broker::start(&config, log.clone(), startup, &status, handed, ready).context("no network thread")?;
    let outcome = runtime.block_on(serve(&config, &broker.handle, &log, &status, listening, &notify));
    // Blocking work that outlives its task (a name lookup) must not hold up the end.
    runtime.shutdown_background();
    broker.join();
    drop(log);
    drop(log_threads);
    outcome
}

/// The tree of a large gateway.toml (22 MB for one of 20,000 points) lay between what is kept of it.
fn give_back_memory() {
    // SAFETY: glibc's own function; it takes no pointers and moves nothing that is in use.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::malloc_trim(0)
    };
}

async fn serve(
    config: &Config,
    broker: &BrokerHandle,
    log: &Log,
    status: &Status,
    listening: oneshot::Receiver<()>,
    notify: &Arc<Notify>,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be caught")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be caught")?;
    let mut hangup = signal(SignalKind::hangup()).context("SIGHUP cannot be caught")?;
    let tree = Tree::start(config, broker, log, status).await;
    let _ = broker.listen().await;
    let mut reloads = Reloads::new(tree, config, log, status);
    let (control, mut requests) = Control::new();
    let inside = admin::Inside {
        gateway: config.gateway.name.clone(),
        broker: broker.clone(),
        log: log.clone(),
        status: status.clone(),
        control,
        started: clock::monotonic(),
    };
    let admin = admin::start(&config.gateway.data_dir, inside);
    // A broker that failed at its very start has dropped the sender; its status says why.
    let _ = listening.await;
    println!("{}", banner(config, status));
    notify.ready();
    let tidied = tokio::spawn(async {
        loop {
            tokio::time::sleep(TIDY_EVERY).await;
            give_back_memory();
        }
    });
    // A task of its own: a reload that takes long must not starve the watchdog.
    let told = {
        let (notify, broker, status) = (Arc::clone(notify), broker.clone(), status.clone());
        tokio::spawn(async move { notify.run(broker, status).await })
    };

    loop {
        tokio::select! {
            _ = terminate.recv() => break info!("SIGTERM: stopping"),
            _ = interrupt.recv() => break info!("SIGINT: stopping"),
            _ = hangup.recv() => reloads.reload(ReloadOptions::default(), None, notify).await,
            Some(ReloadRequest { options, reply }) = requests.recv() => reloads.reload(options, Some(reply), notify).await,
            () = reloads.wait() => reloads.decide(notify).await,
        }
    }
    told.abort();
    tidied.abort();
    notify.stopping();
    let began = clock::monotonic();
    reloads.stop().await;
    broker.shut_down().await;
    drop(admin);
    info!(took_ms = began.elapsed().as_millis() as u64, "stopped");
    Ok(())
}

/// What a person at a terminal wants to know first.
fn banner(config: &Config, status: &Status) -> String {
    let mut out = format!(
        "tidegate {} runs as {:?}\n",
        env!("CARGO_PKG_VERSION"),
        config.gateway.name
    );
    let mut line = |label: &str, text: String| {
        let _ = writeln!(out, "  {label:<10} {text}");
    };
    let near = |path: &Path| {
        let here = std::env::current_dir().unwrap_or_default();
        path.strip_prefix(&here).unwrap_or(path).display().to_string()
    };
    let report = status.report();
    for l in &config.listeners {
        let failed = report
            .iter()
            .find(|p| p.kind == "listener" && p.name == l.bind.to_string() && p.health == Health::Failed);
        line(
            "listens",
            match failed {
                Some(part) => format!("NOT on {}: {}", l.bind, part.text),
                None => l.url(),
            },
        );
    }
    for c in &config.connectors {
        let topics: Vec<_> = config
            .assets
            .iter()
            .filter(|a| a.connector == c.name)
            .map(|a| a.topic.to_string())
            .collect();
        line("reads", format!("{} → {}", c.name, topics.join(", ")));
    }
    line(
        "modules",
        format!("{} (drop a .wasm file in)", near(&config.modules.dir)),
    );
    for u in &config.uplinks {
        line(
            "uplink",
            match &u.kind {
                UplinkKind::File(f) => format!("{} → {}", u.name, near(&f.path)),
                UplinkKind::Mqtt(m) => format!("{} → {}:{}", u.name, m.host, m.port),
            },
        );
    }
    line("log", near(&config.gateway.data_dir.join("log.db")));
    // One that needs nothing but an address.
    let plain = |l: &&Listener| l.tls.is_none() && !l.websocket && !l.proxy_protocol;
    if let Some(at) = config.listeners.iter().filter(plain).find_map(|l| l.bind.address()) {
        let host = if at.ip().is_unspecified() {
            "localhost".to_owned()
        } else {
            at.ip().to_string()
        };
        let port = at.port();
        let _ = writeln!(out, "\ntry:");
        let _ = writeln!(
            out,
            "  mosquitto_pub -h {host} -p {port} -q 1 -t sensors/demo -m '{{\"value\": 21.5}}'"
        );
        let _ = writeln!(out, "  mosquitto_sub -h {host} -p {port} -v -t '#'");
        if let Some(UplinkKind::File(f)) = config
            .uplinks
            .iter()
            .map(|u| &u.kind)
            .find(|k| matches!(k, UplinkKind::File(_)))
        {
            let _ = writeln!(out, "  tail -f {}", near(&f.path));
        }
        // As it was called: `cargo run` puts nothing into the PATH.
        let program = std::env::args().next().unwrap_or_else(|| "tidegate".to_owned());
        let _ = write!(
            out,
            "  {} status --config {}",
            near(Path::new(&program)),
            near(&config.path)
        );
    }
    out
}
