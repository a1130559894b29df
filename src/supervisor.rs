//! The one tree: starts the parts in order, keeps them running, stops them in order.
//!
//! Order of start: log, broker, uplinks, modules, connectors; of stop: the reverse, so that what is produced last is
//! still taken, delivered or kept. A part that fails is started again with a growing pause and says so by its status;
//! it never takes another one along.

use std::fmt::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tracing::{error, info, warn};

use crate::broker::Broker;
use crate::broker::handle::BrokerHandle;
use crate::clock;
use crate::config::{Config, UplinkKind};
use crate::log::Log;
use crate::status::{Health, Status};
use crate::{admin, connectors, metrics, uplinks};

/// What a part gets to end in order; together they stay below the 2 s that a stop may take.
const STOP_CONNECTORS: Duration = Duration::from_millis(300);
const STOP_MODULES: Duration = Duration::from_millis(500);
const STOP_UPLINKS: Duration = Duration::from_millis(1_000);
/// The pause before a part that ended is started again: doubles from the first to the second, and begins anew after a
/// quarter of an hour without an end.
const RESTART_FIRST: Duration = Duration::from_millis(500);
const RESTART_LAST: Duration = Duration::from_secs(60);
const RESTART_FORGET: Duration = Duration::from_secs(900);

/// Runs the gateway until SIGTERM or SIGINT ends it.
pub fn run(config: Config) -> anyhow::Result<()> {
    crate::logging::start();
    let status = Status::default();
    let (log, log_threads, startup) = Log::open(&config.gateway.data_dir, &config.streams, &status)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_name("edge")
        .max_blocking_threads(4)
        .build()
        .context("no runtime for the edge tasks")?;
    let (ready, listening) = oneshot::channel();
    let broker = Broker::start(&config, log.clone(), startup, &status, ready).context("no network thread")?;
    let outcome = runtime.block_on(serve(&config, &broker.handle, &log, &status, listening));
    // Blocking work that outlives its task (a name lookup) must not hold up the end.
    runtime.shutdown_background();
    broker.join();
    drop(log);
    drop(log_threads);
    outcome
}

async fn serve(
    config: &Config,
    broker: &BrokerHandle,
    log: &Log,
    status: &Status,
    listening: oneshot::Receiver<()>,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be caught")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be caught")?;
    let mut hangup = signal(SignalKind::hangup()).context("SIGHUP cannot be caught")?;
    let (stop_uplinks, uplinks_stop) = watch::channel(false);
    let (stop_modules, modules_stop) = watch::channel(false);
    let (stop_connectors, connectors_stop) = watch::channel(false);

    retire_removed(config, broker, log).await;
    let mut up = Vec::new();
    for uplink in &config.uplinks {
        let (routes_up, routes_down) = (config.routes_up.clone(), config.routes_down.clone());
        let (uplink, broker, status, stop) = (uplink.clone(), broker.clone(), status.clone(), uplinks_stop.clone());
        up.push(supervise(
            "uplink",
            uplink.name.clone(),
            status.clone(),
            uplinks_stop.clone(),
            move || {
                uplinks::run(
                    uplink.clone(),
                    routes_up.clone(),
                    routes_down.clone(),
                    broker.clone(),
                    status.clone(),
                    stop.clone(),
                )
            },
        ));
    }
    let modules = {
        let (config, broker, status, stop) = (config.clone(), broker.clone(), status.clone(), modules_stop.clone());
        supervise(
            "modules",
            "modules".to_owned(),
            status.clone(),
            modules_stop,
            move || crate::modules::run(config.clone(), broker.clone(), status.clone(), stop.clone()),
        )
    };
    let mut machines = Vec::new();
    for setup in connectors::Setup::all(config) {
        let stop = connectors_stop.clone();
        let name = setup.connector.name.clone();
        let gateway = connectors::Running {
            broker: broker.clone(),
            status: status.clone(),
        };
        machines.push(supervise(
            "connector",
            name.clone(),
            status.clone(),
            connectors_stop.clone(),
            move || {
                let part = gateway.status.part("connector", &name);
                connectors::run(setup.clone(), gateway.clone(), part, stop.clone())
            },
        ));
    }
    let inside = admin::Inside {
        gateway: config.gateway.name.clone(),
        broker: broker.clone(),
        log: log.clone(),
        status: status.clone(),
        started: clock::monotonic(),
    };
    let admin = admin::start(&config.gateway.data_dir, inside);
    let metrics = config.metrics.map(|bind| {
        let sources = metrics::Sources {
            gateway: config.gateway.name.clone(),
            log: log.clone(),
            status: status.clone(),
            started: clock::monotonic(),
        };
        metrics::start(bind, sources)
    });
    // A broker that failed at its very start has dropped the sender; its status says why.
    let _ = listening.await;
    println!("{}", banner(config, status));

    loop {
        tokio::select! {
            _ = terminate.recv() => break info!("SIGTERM: stopping"),
            _ = interrupt.recv() => break info!("SIGINT: stopping"),
            _ = hangup.recv() => warn!("SIGHUP: this version does not read its configuration again; restart it instead"),
        }
    }
    let began = clock::monotonic();
    stop_connectors.send_replace(true);
    join("connectors", machines, STOP_CONNECTORS).await;
    stop_modules.send_replace(true);
    join("modules", vec![modules], STOP_MODULES).await;
    stop_uplinks.send_replace(true);
    join("uplinks", up, STOP_UPLINKS).await;
    broker.shut_down().await;
    drop((admin, metrics));
    info!(took_ms = began.elapsed().as_millis() as u64, "stopped");
    Ok(())
}

/// Consumers that the configuration no longer has keep their backlog and get nothing new.
async fn retire_removed(config: &Config, broker: &BrokerHandle, log: &Log) {
    for consumer in log.consumers() {
        let Some(name) = consumer.name().strip_prefix("uplink:") else {
            continue;
        };
        if config.uplinks.iter().any(|u| u.name == name) {
            continue;
        }
        let (messages, _) = consumer.queued();
        if messages > 0 {
            warn!(
                uplink = name,
                messages,
                "not in the configuration any more; its backlog is kept until it comes back or a limit drops it"
            );
        }
        // Only a stopped broker refuses, and then nothing more happens anyway.
        let _ = broker.retire(consumer.name()).await;
    }
}

/// Runs a part again whenever it ends before it was told to, a panic included.
fn supervise<F, T>(
    kind: &'static str,
    name: String,
    status: Status,
    mut stop: watch::Receiver<bool>,
    make: F,
) -> JoinHandle<()>
where
    F: Fn() -> T + Send + 'static,
    T: Future<Output = ()> + Send + 'static,
{
    tokio::spawn(async move {
        let mut pause = RESTART_FIRST;
        loop {
            let began = clock::monotonic();
            let ended = tokio::spawn(make()).await;
            if *stop.borrow() {
                return;
            }
            if began.elapsed() > RESTART_FORGET {
                pause = RESTART_FIRST;
            }
            let why = match ended {
                Ok(()) => "ended by itself".to_owned(),
                Err(e) => format!("a fault in the program: {e}"),
            };
            // Kept until the next start replaces it.
            let part = status.part(kind, &name);
            part.set(
                Health::Failed,
                format!("{why}; starting again in {} s", pause.as_secs_f32()),
            );
            error!(kind, name, why, "part ended; started again");
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = stop.wait_for(|stop| *stop) => return,
            }
            pause = (pause * 2).min(RESTART_LAST);
        }
    })
}

async fn join(what: &str, tasks: Vec<JoinHandle<()>>, limit: Duration) {
    let aborts: Vec<_> = tasks.iter().map(JoinHandle::abort_handle).collect();
    let all = async {
        for task in tasks {
            // A panic was said when it happened.
            let _ = task.await;
        }
    };
    if tokio::time::timeout(limit, all).await.is_err() {
        warn!(
            what,
            "did not end in time; what they had not confirmed is delivered after the next start"
        );
        aborts.iter().for_each(tokio::task::AbortHandle::abort);
    }
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
                None => format!("mqtt://{}", l.bind),
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
    if let Some(l) = config.listeners.first() {
        let host = if l.bind.ip().is_unspecified() {
            "localhost".to_owned()
        } else {
            l.bind.ip().to_string()
        };
        let port = l.bind.port();
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
