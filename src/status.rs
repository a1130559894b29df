//! Counters and health of every part: plain data that all may write and that the command line, the page and `$SYS` read.
//!
//! A part (a listener, an uplink, a module, a connector, the log) holds a [`Part`] and says how it is. Nothing here
//! decides anything; a part that vanishes takes its entry along.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;
use tokio::sync::watch;

use crate::clock;

/// How a part is. `Late` and `Failed` come with a text that says why and what next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    Starting,
    Good,
    /// Works, but not as it should: behind, throttled, trying again.
    Late,
    /// Does not work until something changes.
    Failed,
}

/// Kind and name.
type Key = (&'static str, String);

#[derive(Debug, Clone, Default)]
pub struct Status {
    changes: Changes,
    parts: Arc<Mutex<BTreeMap<Key, Arc<Entry>>>>,
}

/// Rises when a part comes, goes, or its health changes.
#[derive(Debug, Clone)]
struct Changes(Arc<watch::Sender<u64>>);

impl Default for Changes {
    fn default() -> Changes {
        Changes(Arc::new(watch::channel(0).0))
    }
}

impl Changes {
    fn rise(&self) {
        self.0.send_modify(|n| *n += 1);
    }
}

#[derive(Debug)]
struct Entry {
    state: Mutex<State>,
    counters: Mutex<BTreeMap<&'static str, Counter>>,
}

#[derive(Debug, Clone)]
struct State {
    health: Health,
    text: String,
    since: clock::Timestamp,
}

/// A number that only its part changes. Cheap to clone and to add to.
#[derive(Debug, Clone, Default)]
pub struct Counter(Arc<AtomicU64>);

impl Counter {
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// As [`Counter::add`], where one thread alone writes: without a locked instruction.
    pub fn bump(&self, n: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    pub fn set(&self, n: u64) {
        self.0.store(n, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One part's view of its own entry; the entry goes when this is dropped.
#[derive(Debug)]
pub struct Part {
    status: Status,
    key: Key,
    entry: Arc<Entry>,
}

#[derive(Debug, Clone, Serialize)]
pub struct PartReport {
    pub kind: &'static str,
    pub name: String,
    pub health: Health,
    pub text: String,
    pub since: String,
    pub counters: BTreeMap<&'static str, u64>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Plain data: a panic elsewhere leaves nothing half-written that matters here.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Status {
    /// `kind` is one of `log`, `listener`, `broker`, `uplink`, `module`, `connector`, `config`.
    pub fn part(&self, kind: &'static str, name: &str) -> Part {
        let entry = Arc::new(Entry {
            state: Mutex::new(State {
                health: Health::Starting,
                text: String::new(),
                since: clock::wall(),
            }),
            counters: Mutex::new(BTreeMap::new()),
        });
        let key = (kind, name.to_owned());
        lock(&self.parts).insert(key.clone(), Arc::clone(&entry));
        self.changes.rise();
        Part {
            status: self.clone(),
            key,
            entry,
        }
    }

    /// For those who wait for a part to come, to go, or to be in another health.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.0.subscribe()
    }

    /// How a part is and why; None where there is no such part.
    pub fn health_and_text(&self, kind: &str, name: &str) -> Option<(Health, String)> {
        let parts = lock(&self.parts);
        let (_, entry) = parts.iter().find(|((k, n), _)| *k == kind && n == name)?;
        let state = lock(&entry.state);
        Some((state.health, state.text.clone()))
    }

    /// How one part is; None where there is none of that name.
    pub fn health(&self, kind: &'static str, name: &str) -> Option<Health> {
        let parts = lock(&self.parts);
        let entry = parts.get(&(kind, name.to_owned()))?;
        Some(lock(&entry.state).health)
    }

    pub fn report(&self) -> Vec<PartReport> {
        let parts = lock(&self.parts);
        parts
            .iter()
            .map(|((kind, name), entry)| {
                let state = lock(&entry.state).clone();
                PartReport {
                    kind,
                    name: name.clone(),
                    health: state.health,
                    text: state.text,
                    since: state.since.to_string(),
                    counters: lock(&entry.counters).iter().map(|(k, v)| (*k, v.get())).collect(),
                }
            })
            .collect()
    }
}

impl Part {
    /// Says how the part is. Returns true where health changed, so that the caller logs each change once.
    pub fn set(&self, health: Health, text: impl Into<String>) -> bool {
        let mut state = lock(&self.entry.state);
        let changed = state.health != health;
        if changed {
            state.since = clock::wall();
        }
        state.health = health;
        state.text = text.into();
        drop(state);
        if changed {
            self.status.changes.rise();
        }
        changed
    }

    pub fn counter(&self, name: &'static str) -> Counter {
        lock(&self.entry.counters).entry(name).or_default().clone()
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        let mut parts = lock(&self.status.parts);
        // A successor of the same name may have taken the place already.
        if parts.get(&self.key).is_some_and(|e| Arc::ptr_eq(e, &self.entry)) {
            parts.remove(&self.key);
            drop(parts);
            self.status.changes.rise();
        }
    }
}
