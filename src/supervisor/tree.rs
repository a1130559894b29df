//! The parts that run beside the network thread: started, kept running, exchanged by a reload, stopped in order.
//!
//! A part that ends before it was told to is started again with a growing pause and says so by its status; it never takes
//! another one along. A reload stops and starts only the parts that it touches.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tracing::{error, info, warn};

use crate::broker::handle::BrokerHandle;
use crate::broker::{Configuration, NotListening};
use crate::clock;
use crate::config::{self, Config, RouteDown, RouteUp, Uplink};
use crate::connectors::{self, Setup};
use crate::log::Log;
use crate::metrics::{self, Metrics};
use crate::status::{Health, Status};
use crate::uplinks;

/// What a part gets to end in order; together they stay below the 2 s that a stop may take.
const STOP_CONNECTORS: Duration = Duration::from_millis(300);
const STOP_MODULES: Duration = Duration::from_millis(500);
const STOP_UPLINKS: Duration = Duration::from_millis(1_000);
/// The pause before a part that ended is started again: doubles from the first to the second, and begins anew after a
/// quarter of an hour without an end.
const RESTART_FIRST: Duration = Duration::from_millis(500);
const RESTART_LAST: Duration = Duration::from_secs(60);
const RESTART_FORGET: Duration = Duration::from_secs(900);

pub struct Tree {
    broker: BrokerHandle,
    status: Status,
    uplinks: BTreeMap<String, Running>,
    connectors: BTreeMap<String, Running>,
    modules: Running,
    module_settings: watch::Sender<config::Modules>,
    metrics: Option<Metrics>,
    metrics_sources: metrics::Sources,
}

/// An uplink with what leads to and from it: another one where any of it is.
#[derive(Clone, PartialEq)]
struct UplinkSetup {
    uplink: Uplink,
    up: Vec<RouteUp>,
    down: Vec<RouteDown>,
}

impl UplinkSetup {
    fn all(config: &Config) -> Vec<UplinkSetup> {
        let setup = |uplink: &Uplink| UplinkSetup {
            uplink: uplink.clone(),
            up: config
                .routes_up
                .iter()
                .filter(|r| r.to == uplink.name)
                .cloned()
                .collect(),
            down: config
                .routes_down
                .iter()
                .filter(|r| r.from_uplink == uplink.name)
                .cloned()
                .collect(),
        };
        config.uplinks.iter().map(setup).collect()
    }
}

impl Tree {
    pub async fn start(config: &Config, broker: &BrokerHandle, log: &Log, status: &Status) -> Tree {
        retire_removed(config, broker, log).await;
        keep_places(config, broker).await;
        let (module_settings, settings) = watch::channel(config.modules.clone());
        let modules = {
            let (broker, made) = (broker.clone(), status.clone());
            let data_dir = config.gateway.data_dir.clone();
            Running::start("modules", "modules", status, move |stop| {
                crate::modules::run(settings.clone(), data_dir.clone(), broker.clone(), made.clone(), stop)
            })
        };
        let mut tree = Tree {
            broker: broker.clone(),
            status: status.clone(),
            uplinks: BTreeMap::new(),
            connectors: BTreeMap::new(),
            modules,
            module_settings,
            metrics: None,
            metrics_sources: metrics::Sources {
                gateway: config.gateway.name.clone(),
                log: log.clone(),
                status: status.clone(),
                started: clock::monotonic(),
            },
        };
        tree.start_metrics(config);
        UplinkSetup::all(config).into_iter().for_each(|s| tree.start_uplink(s));
        Setup::all(config).into_iter().for_each(|s| tree.start_connector(s));
        tree
    }

    fn start_metrics(&mut self, config: &Config) {
        let start = |bind| metrics::start(bind, self.metrics_sources.clone());
        self.metrics = config.metrics.map(start);
    }

    fn start_uplink(&mut self, setup: UplinkSetup) {
        let name = setup.uplink.name.clone();
        let (broker, status) = (self.broker.clone(), self.status.clone());
        let running = Running::start("uplink", &name, &self.status, move |stop| {
            let UplinkSetup { uplink, up, down } = setup.clone();
            uplinks::run(uplink, up, down, broker.clone(), status.clone(), stop)
        });
        self.uplinks.insert(name, running);
    }

    fn start_connector(&mut self, setup: Setup) {
        let name = setup.connector.name.clone();
        let gateway = connectors::Running {
            broker: self.broker.clone(),
            status: self.status.clone(),
        };
        let kept = name.clone();
        let running = Running::start("connector", &name, &self.status, move |stop| {
            let part = gateway.status.part("connector", &kept);
            connectors::run(setup.clone(), gateway.clone(), part, stop)
        });
        self.connectors.insert(name, running);
    }

    /// Exchanges what is different in `new`, and nothing else; returns the listeners that are not up.
    pub async fn apply(&mut self, old: &Config, new: &Config) -> Vec<NotListening> {
        let mut not_listening = Vec::new();
        let wanted = Configuration::of(new);
        if wanted != Configuration::of(old) {
            match self.broker.configure(wanted).await {
                Ok(failed) => not_listening = failed,
                Err(error) => error!(%error, "the broker does not take the configuration over"),
            }
        }
        self.module_settings.send_if_modified(|settings| {
            let is_other = *settings != new.modules;
            if is_other {
                settings.clone_from(&new.modules);
            }
            is_other
        });
        if old.metrics != new.metrics {
            self.metrics = None;
            self.start_metrics(new);
        }
        self.exchange_uplinks(UplinkSetup::all(old), UplinkSetup::all(new))
            .await;
        self.exchange_connectors(Setup::all(old), Setup::all(new)).await;
        not_listening
    }

    async fn exchange_uplinks(&mut self, old: Vec<UplinkSetup>, new: Vec<UplinkSetup>) {
        for setup in old.iter().filter(|s| !new.contains(s)) {
            let name = &setup.uplink.name;
            if let Some(running) = self.uplinks.remove(name) {
                // There is one reader of a name at a time.
                running.end("uplink", name, STOP_UPLINKS).await;
            }
            if !new.iter().any(|s| s.uplink.name == *name && !s.up.is_empty()) {
                // Its backlog stays; only a stopped broker refuses.
                let _ = self.broker.retire(&format!("uplink:{name}")).await;
            }
        }
        for setup in new.into_iter().filter(|s| !old.contains(s)) {
            info!(uplink = setup.uplink.name, "started by a reload");
            self.start_uplink(setup);
        }
    }

    async fn exchange_connectors(&mut self, old: Vec<Setup>, new: Vec<Setup>) {
        for setup in old.iter().filter(|s| !new.contains(s)) {
            let name = &setup.connector.name;
            if let Some(running) = self.connectors.remove(name) {
                running.end("connector", name, STOP_CONNECTORS).await;
            }
            if !new.iter().any(|s| s.connector.name == *name) {
                let _ = self.broker.retire(&format!("connector:{name}")).await;
            }
        }
        for setup in new.into_iter().filter(|s| !old.contains(s)) {
            info!(connector = setup.connector.name, "started by a reload");
            self.start_connector(setup);
        }
    }

    /// Producers first, so that what they still bring is taken.
    pub async fn stop(self) {
        end_all("connectors", self.connectors.into_values(), STOP_CONNECTORS).await;
        end_all("modules", [self.modules], STOP_MODULES).await;
        end_all("uplinks", self.uplinks.into_values(), STOP_UPLINKS).await;
    }
}

/// Before anybody is listened to: what a client is acknowledged in the first moment waits for those that it is for, though
/// their tasks have not come to it yet. Only a stopped broker refuses.
async fn keep_places(config: &Config, broker: &BrokerHandle) {
    let uplinks = config
        .uplinks
        .iter()
        .filter_map(|u| uplinks::place(&u.name, &config.routes_up));
    let connectors = Setup::all(config);
    for (name, filters) in uplinks.chain(connectors.iter().map(connectors::place)) {
        let _ = broker.reserve(&name, filters).await;
    }
}

/// Consumers that the configuration no longer has keep their backlog and get nothing new.
async fn retire_removed(config: &Config, broker: &BrokerHandle, log: &Log) {
    for consumer in log.consumers() {
        let is_wanted = match consumer.name().split_once(':') {
            Some(("uplink", name)) => config.routes_up.iter().any(|route| route.to == name),
            Some(("connector", name)) => config.connectors.iter().any(|c| c.name == name),
            // Sessions and modules come and go by themselves.
            _ => true,
        };
        if is_wanted {
            continue;
        }
        let (messages, _) = consumer.queued();
        if messages > 0 {
            warn!(
                consumer = consumer.name(),
                messages, "nothing leads to it any more; its backlog is kept until that comes back or a limit drops it"
            );
        }
        // Only a stopped broker refuses, and then nothing more happens anyway.
        let _ = broker.retire(consumer.name()).await;
    }
}

/// A part that is kept running until it is told to end.
struct Running {
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl Running {
    /// Runs the part again whenever it ends before it was told to, a panic included.
    fn start<F, T>(kind: &'static str, name: &str, status: &Status, make: F) -> Running
    where
        F: Fn(watch::Receiver<bool>) -> T + Send + 'static,
        T: Future<Output = ()> + Send + 'static,
    {
        let (stop, mut stopped) = watch::channel(false);
        let (name, status) = (name.to_owned(), status.clone());
        let task = tokio::spawn(async move {
            let mut pause = RESTART_FIRST;
            loop {
                let began = clock::monotonic();
                // Where this task is aborted the part ends with it.
                let mut part = JoinSet::new();
                part.spawn(make(stopped.clone()));
                let ended = part.join_next().await;
                if *stopped.borrow() {
                    return;
                }
                if began.elapsed() > RESTART_FORGET {
                    pause = RESTART_FIRST;
                }
                let why = match ended {
                    Some(Err(e)) => format!("a fault in the program: {e}"),
                    Some(Ok(())) | None => "ended by itself".to_owned(),
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
                    _ = stopped.wait_for(|stop| *stop) => return,
                }
                pause = (pause * 2).min(RESTART_LAST);
            }
        });
        Running { stop, task }
    }

    /// Returns when it has ended, in order or by force.
    async fn end(mut self, kind: &str, name: &str, limit: Duration) {
        self.stop.send_replace(true);
        if tokio::time::timeout(limit, &mut self.task).await.is_err() {
            warn!(
                kind,
                name, "did not end in time; what it had not confirmed is delivered again"
            );
            self.task.abort();
            let _ = self.task.await;
            // The part itself is dropped when its turn comes.
            tokio::task::yield_now().await;
        }
    }
}

async fn end_all(what: &str, parts: impl IntoIterator<Item = Running>, limit: Duration) {
    let parts: Vec<Running> = parts.into_iter().collect();
    for part in &parts {
        part.stop.send_replace(true);
    }
    let aborts: Vec<_> = parts.iter().map(|p| p.task.abort_handle()).collect();
    let all = async {
        for part in parts {
            // A panic was said when it happened.
            let _ = part.task.await;
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
