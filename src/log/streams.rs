//! The streams as they are now: their totals, their limits and which topics they take. All of it changes while running.
//!
//! A stream has a number for good, and everything that is kept for each stream (cursors, lanes, the ring) has places for
//! [`SPARE`] more than there were at the start: a stream that a reload adds takes the next one. One that the
//! configuration no longer has takes nothing new and is read to its end.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{OnceLock, PoisonError, RwLock};
use std::time::Duration;

use super::store::{Recovered, Store, StoreError};
use crate::config::{Stream, WhenFull};
use crate::trie::FilterTrie;

/// Streams that can be added between two starts. A place costs 56 bytes a consumer and about 100 a durable session.
pub const SPARE: usize = 4;

/// There is no place left for a new stream until the next start.
#[derive(Debug, thiserror::Error)]
#[error("at most {SPARE} new streams can be added between two starts")]
pub struct NoPlace;

/// One stream, live.
#[derive(Debug)]
pub struct StreamState {
    pub id: u16,
    pub name: String,
    /// `u64::MAX`: none.
    bytes_max: AtomicU64,
    /// In milliseconds; `u64::MAX`: none.
    age_max: AtomicU64,
    rejects: AtomicBool,
    pub messages: AtomicU64,
    pub bytes: AtomicU64,
    /// The newest sequence on disk.
    pub last: AtomicU64,
    /// Bytes in batches that are not committed yet.
    pub open_bytes: AtomicU64,
}

impl StreamState {
    fn new(id: u16, name: &str, configured: Option<&Stream>) -> StreamState {
        let state = StreamState {
            id,
            name: name.to_owned(),
            bytes_max: u64::MAX.into(),
            age_max: u64::MAX.into(),
            rejects: false.into(),
            messages: 0.into(),
            bytes: 0.into(),
            last: 0.into(),
            open_bytes: 0.into(),
        };
        state.limit(configured);
        state
    }

    /// None: the configuration no longer has it, and what is in it stays until it was read.
    fn limit(&self, configured: Option<&Stream>) {
        let age = configured
            .and_then(|s| s.age_max)
            .map_or(u64::MAX, |age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX));
        let rejects = configured.is_some_and(|s| s.when_full == WhenFull::Reject);
        self.bytes_max
            .store(configured.map_or(u64::MAX, |s| s.bytes_max), Ordering::Relaxed);
        self.age_max.store(age, Ordering::Relaxed);
        self.rejects.store(rejects, Ordering::Relaxed);
    }

    pub fn bytes_max(&self) -> u64 {
        self.bytes_max.load(Ordering::Relaxed)
    }

    pub fn age_max(&self) -> Option<Duration> {
        let ms = self.age_max.load(Ordering::Relaxed);
        (ms != u64::MAX).then(|| Duration::from_millis(ms))
    }

    pub fn when_full(&self) -> WhenFull {
        match self.rejects.load(Ordering::Relaxed) {
            true => WhenFull::Reject,
            false => WhenFull::DropOldest,
        }
    }

    pub fn is_full(&self) -> bool {
        self.bytes.load(Ordering::Relaxed) + self.open_bytes.load(Ordering::Relaxed) > self.bytes_max()
    }
}

/// Which topics go where: the first declared stream whose filter matches.
#[derive(Debug, Default)]
struct Routing {
    trie: FilterTrie<(usize, u16)>,
    /// For topics that no filter matches: `#` does not match those that begin with `$`.
    fallback: Option<u16>,
}

#[derive(Debug)]
pub struct Streams {
    places: Box<[OnceLock<StreamState>]>,
    routing: RwLock<Routing>,
}

impl Streams {
    /// Makes sure that each configured stream has its row and its number; streams that were configured once stay readable.
    pub fn declare(store: &mut Store, recovered: &mut Recovered, configured: &[Stream]) -> Result<Streams, StoreError> {
        store.declare(recovered, configured.iter().map(|s| s.name.as_str()))?;
        let ids = recovered.streams.iter().map(|s| usize::from(s.id) + 1).max();
        let streams = Streams {
            places: (0..ids.unwrap_or(0) + SPARE).map(|_| OnceLock::new()).collect(),
            routing: RwLock::default(),
        };
        for row in &recovered.streams {
            let state = StreamState::new(row.id, &row.name, configured.iter().find(|s| s.name == row.name));
            state.messages.store(row.messages, Ordering::Relaxed);
            state.bytes.store(row.bytes, Ordering::Relaxed);
            state.last.store(row.last, Ordering::Relaxed);
            // Each row has a number of its own.
            let _ = streams.places[usize::from(row.id)].set(state);
        }
        streams.route(configured);
        Ok(streams)
    }

    pub fn iter(&self) -> impl Iterator<Item = &StreamState> {
        self.places.iter().filter_map(OnceLock::get)
    }

    pub fn get(&self, id: usize) -> Option<&StreamState> {
        self.places.get(id)?.get()
    }

    /// The number of places, those that no stream has taken yet included.
    pub fn places(&self) -> usize {
        self.places.len()
    }

    /// Whether [`Streams::set`] would find a place for each.
    pub fn have_room_for(&self, configured: &[Stream]) -> bool {
        let new = configured.iter().filter(|s| self.named(&s.name).is_none()).count();
        new <= self.places.iter().filter(|p| p.get().is_none()).count()
    }

    /// Takes over limits and filters as they are configured now; returns the streams that are new. Called by one thread.
    pub fn set(&self, configured: &[Stream]) -> Result<Vec<(u16, String)>, NoPlace> {
        if !self.have_room_for(configured) {
            return Err(NoPlace);
        }
        let mut new = Vec::new();
        for stream in configured.iter().filter(|s| self.named(&s.name).is_none()) {
            let id = self.places.iter().position(|p| p.get().is_none()).ok_or(NoPlace)?;
            let state = StreamState::new(id as u16, &stream.name, Some(stream));
            if self.places[id].set(state).is_ok() {
                new.push((id as u16, stream.name.clone()));
            }
        }
        for state in self.iter() {
            state.limit(configured.iter().find(|s| s.name == state.name));
        }
        self.route(configured);
        Ok(new)
    }

    /// The stream that a topic belongs to.
    pub fn of(&self, topic: &str) -> Option<u16> {
        let routing = self.routing.read().unwrap_or_else(PoisonError::into_inner);
        let mut first: Option<(usize, u16)> = None;
        routing.trie.for_each_match(topic, |found| {
            if first.is_none_or(|f| found.0 < f.0) {
                first = Some(*found);
            }
        });
        first.map(|(_, id)| id).or(routing.fallback)
    }

    fn named(&self, name: &str) -> Option<&StreamState> {
        self.iter().find(|s| s.name == name)
    }

    fn route(&self, configured: &[Stream]) {
        let mut routing = Routing::default();
        for (order, stream) in configured.iter().enumerate() {
            let Some(state) = self.named(&stream.name) else {
                continue;
            };
            for filter in &stream.filter {
                routing
                    .trie
                    .insert(filter, (order, state.id), |v| *v == (order, state.id));
            }
            if routing.fallback.is_none() && stream.filter.iter().any(|f| f.as_str() == "#") {
                routing.fallback = Some(state.id);
            }
        }
        *self.routing.write().unwrap_or_else(PoisonError::into_inner) = routing;
    }
}
