//! WASM modules: what lies in the modules folder runs, is swapped when its file is replaced and stops when it goes.
//!
//! # Layout
//! - [`host`]: wasmtime; one instance, its calls and its bounds
//! - [`mapping`]: machine code, mapped and never writable
//! - [`compile`]: from a dropped file to machine code, in a child process, and the cache of it
//! - [`precompiled`]: what root installed for a machine without a compiler
//! - [`runner`]: pure: what becomes of each message
//! - [`folder`]: which files are there and whole
//! - [`bench`]: what a call costs
//! - [`worker`]: one module at work: its task and its thread
//!
//! A module is a client of the broker with a durable consumer of its own (`module:NAME`). It sees no other module, and no
//! other part waits for one.

#[cfg(not(target_arch = "arm"))]
pub mod bench;
pub mod compile;
pub mod folder;
pub mod host;
mod mapping;
pub mod precompiled;
pub mod runner;
pub mod worker;

#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::broker::handle::BrokerHandle;
use crate::clock::{self, Instant};
use crate::config;
use crate::status::{Health, Part, Status};

use compile::{Cache, Maker};
use folder::{Change, Folder, Watcher};
use host::{Engine, Instance, Limits};
use worker::{BrokerLog, Candidate, Granted, Load, Log, Worker};

/// Modules that run at most; each has a thread.
const MODULES_MAX: usize = 64;
/// Where no event comes (a network share, a watch that was lost) the folder is looked at this often.
const LOOK_INTERVAL: Duration = Duration::from_secs(5);
/// The log keeps messages for a module whose file is gone so long: it may be on its way back, with `rm` and `cp` for one.
const RETIRE_AFTER: Duration = Duration::from_secs(600);
/// How long the modules may take to stop: one that is in a call is left to the end of the process.
const STOP_WITHIN: Duration = Duration::from_millis(1_500);

/// The module host of the daemon, until `stop`. `settings` may change: a module whose own have changed is swapped for
/// itself, another folder ends all and begins anew.
pub async fn run(
    settings: watch::Receiver<config::Modules>,
    data_dir: PathBuf,
    broker: BrokerHandle,
    status: Status,
    stop: watch::Receiver<bool>,
) {
    let mut gone = HashMap::new();
    while !*stop.borrow() {
        let maker = Maker::here();
        let host = ModuleHost::new(settings.clone(), &data_dir, broker.clone(), status.clone(), maker);
        match host {
            Ok(mut host) => {
                host.gone = gone;
                gone = host.run(stop.clone()).await;
            }
            Err(error) => return tracing::error!(%error, "no modules run: their loading thread could not be started"),
        }
    }
}

/// Gives each module its log.
pub trait Logs: Send + 'static {
    type Log: Log;
    fn log(&self, module: &str) -> Self::Log;
    /// Nothing new is for this module any more.
    fn retire(&self, module: String) -> impl Future<Output = ()> + Send;
}

impl Logs for BrokerHandle {
    type Log = BrokerLog;

    fn log(&self, module: &str) -> BrokerLog {
        BrokerLog::new(self.clone(), module)
    }

    async fn retire(&self, module: String) {
        // It has stopped otherwise, and is asked again after its next start.
        let _ = BrokerHandle::retire(self, &format!("module:{module}")).await;
    }
}

/// The task that watches the folder and keeps a [`Worker`] for each file.
pub struct ModuleHost<L = BrokerHandle> {
    dir: PathBuf,
    /// Those that the modules here run with, or are being loaded with.
    settings: config::Modules,
    /// Those that are wanted.
    wanted: watch::Receiver<config::Modules>,
    logs: L,
    status: Status,
    folder: Folder,
    workers: HashMap<String, Handle>,
    /// Workers of files that are gone, until they have ended: there is one consumer of a name at a time.
    ending: HashMap<String, JoinHandle<()>>,
    /// Since when the files of modules that ran are gone, until they are back or retired.
    gone: HashMap<String, Instant>,
    retire_after: Duration,
    loader: SyncSender<String>,
    loaded: mpsc::Receiver<(String, Load)>,
    /// Being loaded now.
    loading: HashSet<String>,
    /// Replaced again while being loaded.
    load_again: HashSet<String>,
    /// There while the folder cannot be read.
    trouble: Option<Part>,
}

struct Handle {
    /// The latest counts: a worker that is busy never sees those in between.
    loads: watch::Sender<Option<Load>>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
    /// It only shows why its file is not run.
    refused: bool,
}

impl<L: Logs> ModuleHost<L> {
    /// `maker`: [`Maker::here`], but in tests.
    pub fn new(
        mut wanted: watch::Receiver<config::Modules>,
        data_dir: &Path,
        logs: L,
        status: Status,
        maker: Maker,
    ) -> io::Result<ModuleHost<L>> {
        let settings = wanted.borrow_and_update().clone();
        let cache_dir = data_dir.join("modules-cache");
        let mut loader = Loader {
            cache_dir,
            maker,
            dir: settings.dir.clone(),
            wanted: wanted.clone(),
            opened: None,
        };
        // No name is queued twice; where names come and go faster than they load, they are taken at a later look.
        let (requests, inbox) = sync_channel::<String>(MODULES_MAX);
        let (done, loaded) = mpsc::channel(MODULES_MAX);
        let body = move || {
            while let Ok(name) = inbox.recv() {
                let answer = loader.load(&name);
                if done.blocking_send((name, answer)).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new()
            .name("module-loader".to_owned())
            .spawn(body)?;
        Ok(ModuleHost {
            dir: settings.dir.clone(),
            settings,
            wanted,
            logs,
            status,
            folder: Folder::default(),
            workers: HashMap::new(),
            ending: HashMap::new(),
            gone: HashMap::new(),
            retire_after: RETIRE_AFTER,
            loader: requests,
            loaded,
            loading: HashSet::new(),
            load_again: HashSet::new(),
            trouble: None,
        })
    }

    /// Until `stop`, or until another folder is wanted; returns when the modules have stopped, within two seconds, and
    /// whose files may have gone.
    pub async fn run(mut self, mut stop: watch::Receiver<bool>) -> HashMap<String, Instant> {
        let mut wanted = self.wanted.clone();
        let mut watcher = Watcher::new(&self.dir);
        loop {
            let next_look = self.look(&mut watcher);
            self.retire_gone(clock::monotonic()).await;
            loop {
                tokio::select! {
                    biased;
                    () = worker::stopped(&mut stop) => return self.stop().await,
                    () = changed(&mut wanted) => {
                        let settings = wanted.borrow_and_update().clone();
                        if settings.dir != self.dir {
                            return self.stop().await;
                        }
                        self.reconfigure(settings);
                    }
                    Some((name, answer)) = self.loaded.recv() => self.take_loaded(&name, answer),
                    () = watcher.happened() => break,
                    () = tokio::time::sleep_until(next_look.into()) => break,
                }
            }
        }
    }

    /// Acts on what lies in the folder now; returns when to look again where nothing happens.
    fn look(&mut self, watcher: &mut Watcher) -> Instant {
        // Taken before the listing: a file closed after it makes an event of its own.
        let closed = watcher.take_closed();
        let listing = match folder::list(&self.dir) {
            Ok(listing) => listing,
            Err(error) => {
                let text = format!(
                    "the modules folder {:?} cannot be read: {error}; what runs runs on",
                    self.dir
                );
                let part = self
                    .trouble
                    .get_or_insert_with(|| self.status.part("module", "(folder)"));
                if part.set(Health::Failed, text.clone()) {
                    tracing::error!(text, "modules folder");
                }
                return clock::monotonic() + LOOK_INTERVAL;
            }
        };
        self.trouble = None;
        // After the folder was made where it was missing; what came in between was listed or makes an event.
        watcher.watch();
        let now = clock::monotonic();
        for change in self.folder.look(listing, &closed, now) {
            match change {
                Change::Take(name) => self.take(name),
                Change::Gone(name) => self.remove(&name),
            }
        }
        self.ending.retain(|_, task| !task.is_finished());
        let latest = now + LOOK_INTERVAL;
        self.folder.next_look().map_or(latest, |next| next.min(latest))
    }

    async fn retire_gone(&mut self, now: Instant) {
        let over = |since: Instant| now.saturating_duration_since(since) >= self.retire_after;
        let gone: Vec<String> = self
            .gone
            .iter()
            .filter(|(_, since)| over(**since))
            .map(|(n, _)| n.clone())
            .collect();
        for module in gone {
            tracing::info!(
                module,
                "module's file did not come back: the log keeps nothing new for it"
            );
            self.gone.remove(&module);
            self.logs.retire(module).await;
        }
    }

    /// A file is there, new or changed, and whole.
    fn take(&mut self, name: String) {
        if self.workers.get(&name).is_some_and(|worker| worker.refused) {
            self.remove(&name);
        }
        self.gone.remove(&name);
        if !self.workers.contains_key(&name) {
            let running = self.workers.values().filter(|worker| !worker.refused).count();
            let refusal = check_name(&name, running).err();
            let refused = refusal.is_some();
            self.spawn(&name, refusal);
            if refused {
                return;
            }
        }
        if self.loading.contains(&name) {
            self.load_again.insert(name);
        } else if self.loader.try_send(name.clone()).is_ok() {
            self.loading.insert(name);
        } else {
            self.folder.forget(&name);
        }
    }

    /// Modules whose settings have changed are loaded again: swapped between two batches, or, where they cannot run with
    /// the new ones, left as they run.
    fn reconfigure(&mut self, settings: config::Modules) {
        let old = std::mem::replace(&mut self.settings, settings);
        let names: Vec<String> = self
            .workers
            .iter()
            .filter(|(name, worker)| !worker.refused && old.settings.get(*name) != self.settings.settings.get(*name))
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            tracing::info!(module = name, "module's settings have changed: loading it again");
            self.take(name);
        }
    }

    fn spawn(&mut self, name: &str, refusal: Option<String>) {
        let (loads, inbox) = watch::channel(None);
        let (stop, stopped) = watch::channel(false);
        let part = self.status.part("module", name);
        let refused = refusal.is_some();
        if let Some(why) = refusal {
            tracing::error!(module = name, why, "module not taken");
            part.set(Health::Failed, why);
        }
        let log = self.logs.log(name);
        let worker = Worker::new(name, part, log, inbox, stopped);
        let predecessor = self.ending.remove(name);
        let task = tokio::spawn(async move {
            if let Some(task) = predecessor {
                let _ = task.await;
            }
            worker.run().await;
        });
        self.workers.insert(
            name.to_owned(),
            Handle {
                loads,
                stop,
                task,
                refused,
            },
        );
    }

    fn remove(&mut self, name: &str) {
        self.load_again.remove(name);
        if let Some(handle) = self.workers.remove(name) {
            tracing::info!(
                module = name,
                "module's file is gone: unloading it, its place in the log stays for a while"
            );
            if !handle.refused {
                self.gone.insert(name.to_owned(), clock::monotonic());
            }
            let _ = handle.stop.send(true);
            self.ending.insert(name.to_owned(), handle.task);
        }
    }

    fn take_loaded(&mut self, name: &str, answer: Load) {
        self.loading.remove(name);
        if self.load_again.remove(name) {
            // What was loaded is no longer what lies there.
            self.take(name.to_owned());
        } else if let Some(worker) = self.workers.get(name) {
            worker.loads.send_replace(Some(answer));
        }
    }

    async fn stop(mut self) -> HashMap<String, Instant> {
        let now = clock::monotonic();
        let mut gone = std::mem::take(&mut self.gone);
        gone.extend(
            self.workers
                .iter()
                .filter(|(_, worker)| !worker.refused)
                .map(|(name, _)| (name.clone(), now)),
        );
        let mut tasks: Vec<JoinHandle<()>> = self.ending.drain().map(|(_, task)| task).collect();
        for (_, handle) in self.workers.drain() {
            let _ = handle.stop.send(true);
            tasks.push(handle.task);
        }
        let all = async {
            for task in tasks {
                let _ = task.await;
            }
        };
        if tokio::time::timeout(STOP_WITHIN, all).await.is_err() {
            tracing::warn!("a module did not stop in time; its messages stay queued");
        }
        gone
    }
}

/// Never, where nobody changes them.
async fn changed(settings: &mut watch::Receiver<config::Modules>) {
    if settings.changed().await.is_err() {
        std::future::pending().await
    }
}

/// A module's name goes into the consumer's name, sources and status.
fn check_name(name: &str, running: usize) -> Result<(), String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if name.len() > 64 || !name.bytes().all(plain) {
        return Err("a module's file is named by up to 64 of A-Z a-z 0-9 - _ . and .wasm; rename it".to_owned());
    }
    if running >= MODULES_MAX {
        return Err(format!(
            "{MODULES_MAX} modules are the most that run at once; remove one and drop this in again"
        ));
    }
    Ok(())
}

/// What runs on the loading thread: one file after the other.
struct Loader {
    cache_dir: PathBuf,
    maker: Maker,
    dir: PathBuf,
    wanted: watch::Receiver<config::Modules>,
    /// From the first module on: a gateway without one does not pay for the engine.
    opened: Option<(Engine, Cache)>,
}

impl Loader {
    fn load(&mut self, name: &str) -> Load {
        let (engine, cache) = match &self.opened {
            Some(opened) => opened,
            None => {
                let engine = Engine::new().map_err(|e| e.to_string())?;
                let cache = Cache::open(&self.cache_dir, &engine, self.maker.clone())
                    .map_err(|e| format!("the cache of compiled modules: {e}"))?;
                self.opened.insert((engine, cache))
            }
        };
        let settings = self.wanted.borrow().settings.get(name).cloned().unwrap_or_default();
        let began = clock::monotonic();
        let wasm = compile::read_bounded(&self.dir.join(format!("{name}.wasm"))).map_err(|e| e.to_string())?;
        let (program, origin) = cache.load(&wasm).map_err(|e| e.to_string())?;
        // An instance for `describe` alone: the one that runs is made when its predecessor has ended its batch.
        let limits = Limits {
            memory_bytes_max: settings.memory_bytes_max,
            deadline: settings.deadline,
        };
        let description = Instance::start(engine, &program, name, limits, Vec::new())
            .and_then(|mut probe| probe.describe())
            .map_err(|e| format!("its describe failed: {e}"))?;
        let granted = Granted::new(description, &settings)?;
        let ms = clock::monotonic().saturating_duration_since(began).as_millis();
        tracing::debug!(module = name, ms, ?origin, "module loaded");
        Ok(Candidate {
            engine: engine.clone(),
            program,
            granted,
            settings,
        })
    }
}
