//! The durable log: streams of segments, consumers with cursors, one writer.
//!
//! Promise: when a commit's generation is reported done, everything in it is on disk; a consumer is given a message
//! again until it acknowledges it, or the loss is declared in the ledger in the same commit that drops it.
//!
//! Messages are appended to an open batch under one lock; the writer thread takes the whole batch, commits it, and
//! takes what arrived meanwhile: group commit without a linger. Bounds: the open batch [`OPEN_BYTES_MAX`] (then
//! appenders hold back), the segments kept in memory for consumers that keep up [`RING_BYTES_MAX`].

pub mod changes;
pub mod consumer;
mod cursor;
mod reader;
pub mod record;
mod recover;
mod ring;
pub mod segment;
pub mod store;
mod streams;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use crate::clock;
use crate::config::Stream;
use crate::message::{Sequence, TopicFilter};
use crate::status::{Health, Part, Status};
use changes::{Changes, LossRow, OutboundRow, SessionRow, WillRow};
pub use cursor::ConsumerState;
use cursor::Cursor;
use record::MessageRef;
use recover::{lock_folder, move_aside, recount, restore_consumers};
use ring::Ring;
use segment::{Builder, Segment};
use store::{Store, StoreError};
use streams::Streams;
pub use streams::{NoPlace, StreamState};

/// Appenders hold back while more than this waits for its commit.
pub const OPEN_BYTES_MAX: usize = 8 << 20;
/// Committed segments kept in memory: a consumer not further behind than this never touches the disk.
pub const RING_BYTES_MAX: usize = 4 << 20;
/// Commit results the network thread has not looked at yet; the writer waits beyond it.
const EVENTS_MAX: usize = 256;
/// Dead letters, and ledger entries that were sent, kept.
pub const DEAD_ROWS_MAX: u64 = 10_000;

#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    #[error("the log has stopped")]
    Stopped,
    #[error("the log could not be read: {0}")]
    Read(String),
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{path}: {cause}; choose another data_dir or make it writable for this user")]
    Folder { path: PathBuf, cause: std::io::Error },
    #[error("{0} is in use by another tidegate; stop that one, or give this one a data_dir of its own")]
    InUse(PathBuf),
    #[error("{path}: {cause}")]
    Database { path: PathBuf, cause: StoreError },
    #[error("{path} is damaged and could not be moved aside: {cause}")]
    SetAside { path: PathBuf, cause: std::io::Error },
    #[error("a thread could not be started: {0}")]
    Thread(std::io::Error),
}

/// What the broker takes over at start.
pub struct Startup {
    pub retained: Vec<Vec<u8>>,
    pub sessions: Vec<SessionRow>,
    pub wills: Vec<WillRow>,
    pub inbound: Vec<(String, u16)>,
    pub outbound: Vec<OutboundRow>,
}

/// The result of one commit, for the network thread: acknowledgements and deliveries follow it.
pub struct CommitEvent {
    pub generation: u64,
    pub result: Result<Vec<Arc<Segment>>, String>,
}

/// The batch being filled.
struct Open {
    generation: u64,
    next_sequence: u64,
    builders: Vec<Builder>,
    closed: Vec<(u16, Builder)>,
    bytes: usize,
    changes: Changes,
    /// A commit is owed even if nothing is in the batch: somebody holds a ticket for it.
    ticket: bool,
    writer_idle: bool,
    stop: bool,
}

impl Open {
    fn is_empty(&self) -> bool {
        !self.ticket && self.bytes == 0 && self.changes.is_empty()
    }
}

struct Inner {
    path: PathBuf,
    log_id: String,
    open: Mutex<Open>,
    wake: Condvar,
    /// Bytes in the open batch, to be looked at without the lock.
    open_bytes: AtomicUsize,
    wake_owed: AtomicBool,
    /// Taken by the writer while it drops, and by a consumer for the moment in which it takes hold of what it reads.
    dropping: Mutex<()>,
    streams: Streams,
    consumers: RwLock<changes::Map<i64, Arc<ConsumerState>>>,
    /// The next consumer's. None is given twice, so that the rows of one that went are never taken for those of a new one.
    consumer_ids: AtomicI64,
    ring: Mutex<Ring>,
    events: Mutex<VecDeque<CommitEvent>>,
    events_taken: Condvar,
    committed: Notify,
    losses_inside: AtomicU64,
    /// Rises when a limit dropped something: what was read before is not given out again.
    drops: AtomicU64,
    durable: watch::Sender<u64>,
    reads: tokio::sync::mpsc::Sender<reader::Request>,
    part: Part,
    /// What the log counts, for status.
    counters: Counters,
}

struct Counters {
    messages: crate::status::Counter,
    commits: crate::status::Counter,
    bytes: crate::status::Counter,
    lost: crate::status::Counter,
    dead: crate::status::Counter,
}

/// The log. Cheap to clone; every clone is the same log.
#[derive(Clone)]
pub struct Log {
    inner: Arc<Inner>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Ends the log in order: dropped last, it commits what is open and joins the threads.
pub struct LogThreads {
    inner: Arc<Inner>,
    writer: Option<std::thread::JoinHandle<()>>,
    _lock: std::fs::File,
}

/// A log that is open, and what its threads are made of.
struct Opened {
    inner: Arc<Inner>,
    store: Store,
    requests: tokio::sync::mpsc::Receiver<reader::Request>,
    lock: std::fs::File,
    startup: Startup,
}

impl Opened {
    fn open(data_dir: &Path, streams: &[Stream], status: &Status) -> Result<Opened, OpenError> {
        let folder = |cause| OpenError::Folder {
            path: data_dir.to_owned(),
            cause,
        };
        std::fs::create_dir_all(data_dir).map_err(folder)?;
        let lock_file = lock_folder(data_dir)?;
        let part = status.part("log", "log");
        let path = data_dir.join("log.db");
        let mut set_aside = None;
        let (mut store, mut recovered) = match Store::open(&path) {
            Ok(opened) => opened,
            Err(e) if e.is_damage() => {
                let aside = move_aside(&path, clock::wall()).map_err(|cause| OpenError::SetAside {
                    path: path.clone(),
                    cause,
                })?;
                warn!(cause = %e, aside = %aside.display(), "the log's database is damaged: set aside, a new one begins");
                set_aside = Some(aside);
                Store::open(&path).map_err(|cause| OpenError::Database {
                    path: path.clone(),
                    cause,
                })?
            }
            Err(cause) => return Err(OpenError::Database { path, cause }),
        };
        let mut first = Changes::default();
        if let Some(aside) = &set_aside {
            first.losses.push(LossRow {
                id: 0,
                consumer: "gateway".into(),
                source: aside.display().to_string(),
                reason: "damaged".into(),
                first: 0,
                last: 0,
                count: 0,
                bytes: 0,
                oldest: 0,
                newest: 0,
                at: clock::wall().millis(),
            });
        }
        let states = Streams::declare(&mut store, &mut recovered, streams).map_err(|cause| OpenError::Database {
            path: path.clone(),
            cause,
        })?;
        let consumers = restore_consumers(&recovered, &states);
        let read = |e| OpenError::Database {
            path: path.clone(),
            cause: e,
        };
        recount(&path, &recovered, &states, &consumers).map_err(read)?;
        let (reads, requests) = tokio::sync::mpsc::channel(64);
        let (durable, _) = watch::channel(recovered.sequence);
        let counters = Counters {
            messages: part.counter("messages"),
            commits: part.counter("commits"),
            bytes: part.counter("bytes"),
            lost: part.counter("lost"),
            dead: part.counter("dead"),
        };
        counters.dead.set(recovered.dead);
        let next_sequence = recovered.sequence + 1;
        let inner = Arc::new(Inner {
            log_id: recovered.log_id.clone(),
            open: Mutex::new(Open {
                generation: 1,
                next_sequence,
                builders: (0..states.places()).map(|_| Builder::default()).collect(),
                closed: Vec::new(),
                bytes: 0,
                changes: first,
                ticket: false,
                writer_idle: false,
                stop: false,
            }),
            wake: Condvar::new(),
            open_bytes: AtomicUsize::new(0),
            wake_owed: AtomicBool::new(false),
            dropping: Mutex::new(()),
            ring: Mutex::new(Ring::new(states.places())),
            streams: states,
            consumer_ids: (recovered.consumers.iter().map(|(id, ..)| *id).max().unwrap_or(0) + 1).into(),
            consumers: RwLock::new(consumers.into_iter().map(|c| (c.id, c)).collect()),
            events: Mutex::new(VecDeque::new()),
            events_taken: Condvar::new(),
            committed: Notify::new(),
            losses_inside: AtomicU64::new(1),
            drops: AtomicU64::new(0),
            durable,
            reads,
            part,
            counters,
            path: path.clone(),
        });
        let aside_text = set_aside.map(|p| format!("; a damaged database was set aside as {}", p.display()));
        inner
            .part
            .set(Health::Good, format!("writing{}", aside_text.unwrap_or_default()));
        let startup = Startup {
            retained: std::mem::take(&mut recovered.retained),
            sessions: std::mem::take(&mut recovered.sessions),
            wills: std::mem::take(&mut recovered.wills),
            inbound: std::mem::take(&mut recovered.inbound),
            outbound: std::mem::take(&mut recovered.outbound),
        };
        info!(path = %path.display(), sequence = next_sequence - 1, "log open");
        Ok(Opened {
            inner,
            store,
            requests,
            lock: lock_file,
            startup,
        })
    }
}

impl Log {
    pub fn open(data_dir: &Path, streams: &[Stream], status: &Status) -> Result<(Log, LogThreads, Startup), OpenError> {
        let Opened {
            inner,
            store,
            requests,
            lock,
            startup,
        } = Opened::open(data_dir, streams, status)?;
        reader::start(&inner, requests).map_err(OpenError::Thread)?;
        let writer = writer::start(&inner, store).map_err(OpenError::Thread)?;
        let threads = LogThreads {
            inner: Arc::clone(&inner),
            writer: Some(writer),
            _lock: lock,
        };
        Ok((Log { inner }, threads, startup))
    }

    /// Locks the open batch. Hold it for a short time: one lock for everything that one read brought.
    pub fn batch(&self) -> Batch<'_> {
        Batch {
            inner: &self.inner,
            open: Some(lock(&self.inner.open)),
            touched: false,
            later: false,
        }
    }

    /// As [`Log::batch`], for the network thread: an idle writer is woken by [`Log::wake_writer`] at the end of the turn,
    /// so that one commit takes what all connections brought in it.
    pub fn turn(&self) -> Batch<'_> {
        let mut batch = self.batch();
        batch.later = true;
        batch
    }

    /// True where a [`Log::turn`] left an idle writer to be woken.
    pub fn owes_wake(&self) -> bool {
        self.inner.wake_owed.load(Ordering::Relaxed)
    }

    pub fn wake_writer(&self) {
        if self.inner.wake_owed.swap(false, Ordering::Relaxed) {
            lock(&self.inner.open).writer_idle = false;
            self.inner.wake.notify_all();
        }
    }

    /// Appenders should wait for the next commit before they take more in.
    pub fn is_congested(&self) -> bool {
        self.inner.open_bytes.load(Ordering::Relaxed) > OPEN_BYTES_MAX
    }

    /// The stream that a topic belongs to: the first declared one whose filter matches.
    pub fn stream_of(&self, topic: &str) -> Option<u16> {
        self.inner.streams.of(topic)
    }

    pub fn stream(&self, id: u16) -> &StreamState {
        self.inner
            .streams
            .get(usize::from(id))
            .expect("stream ids come from this log")
    }

    pub fn streams(&self) -> impl Iterator<Item = &StreamState> {
        self.inner.streams.iter()
    }

    /// Places for streams, those that none has taken yet included: what is kept for each stream has so many.
    pub fn stream_places(&self) -> usize {
        self.inner.streams.places()
    }

    /// Whether these streams can be taken over while running.
    pub fn has_room_for(&self, streams: &[Stream]) -> bool {
        self.inner.streams.have_room_for(streams)
    }

    /// Limits and filters as they are configured now. What asks [`Log::stream_of`] and remembers the answer asks again.
    pub fn set_streams(&self, batch: &mut Batch<'_>, streams: &[Stream]) -> Result<(), NoPlace> {
        let new = self.inner.streams.set(streams)?;
        batch.changes().streams.extend(new);
        Ok(())
    }

    /// The results of the commits since the last call, oldest first.
    pub fn commit_events(&self) -> VecDeque<CommitEvent> {
        let events = std::mem::take(&mut *lock(&self.inner.events));
        if events.len() >= EVENTS_MAX {
            self.inner.events_taken.notify_all();
        }
        events
    }

    /// Completes when a commit ended since the last completion.
    pub async fn commit_ended(&self) {
        self.inner.committed.notified().await;
    }

    /// Rises with every commit; for those who wait for messages.
    pub fn durable(&self) -> watch::Receiver<u64> {
        self.inner.durable.subscribe()
    }

    /// The consumer of that name, made where it is not there yet. A filter that stays, or overlaps with one that was there,
    /// keeps its place; others count from now.
    pub fn consumer(&self, batch: &mut Batch<'_>, name: &str, filters: &[TopicFilter]) -> Arc<ConsumerState> {
        let since = batch.sequence();
        let existing = self.find_consumer(name);
        let state = existing.unwrap_or_else(|| {
            let mut consumers = self.inner.consumers.write().unwrap_or_else(PoisonError::into_inner);
            let id = self.inner.consumer_ids.fetch_add(1, Ordering::Relaxed);
            let state = Arc::new(ConsumerState {
                id,
                name: name.to_owned(),
                filters: RwLock::new(Arc::new([])),
                cursors: (0..self.stream_places()).map(|_| Cursor::default()).collect(),
                until: AtomicU64::new(u64::MAX),
                dirty: true.into(),
                losses: AtomicU64::new(0),
                bytes_max: AtomicU64::new(u64::MAX),
            });
            for cursor in &state.cursors {
                cursor.done.store(since, Ordering::Relaxed);
                cursor.matched.store(since, Ordering::Relaxed);
            }
            consumers.insert(id, Arc::clone(&state));
            state
        });
        state.until.store(u64::MAX, Ordering::Relaxed);
        let old = state.filters();
        let new: Arc<[(TopicFilter, u64)]> = filters
            .iter()
            .map(|f| {
                // One that is changed to a wider or narrower one keeps the place: what is queued under it stays owed.
                let place = old.iter().filter(|(o, _)| o.overlaps(f)).map(|(_, s)| *s).min();
                (f.clone(), place.unwrap_or(since))
            })
            .collect();
        *state.filters.write().unwrap_or_else(PoisonError::into_inner) = new;
        batch.changes().consumers.insert(state.id, Some(state.row()));
        state
    }

    /// A session's consumer: each filter counts from the sequence that is given with it, whatever filters there were.
    pub fn session(
        &self,
        batch: &mut Batch<'_>,
        existing: Option<&Arc<ConsumerState>>,
        name: &str,
        filters: impl Iterator<Item = (TopicFilter, u64)>,
    ) -> Arc<ConsumerState> {
        let state = match existing {
            Some(state) => Arc::clone(state),
            None => self.consumer(batch, name, &[]),
        };
        *state.filters.write().unwrap_or_else(PoisonError::into_inner) = filters.collect();
        batch.changes().consumers.insert(state.id, Some(state.row()));
        state
    }

    pub fn find_consumer(&self, name: &str) -> Option<Arc<ConsumerState>> {
        self.inner
            .consumers
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .find(|c| c.name == name)
            .cloned()
    }

    pub fn consumers(&self) -> Vec<Arc<ConsumerState>> {
        self.inner
            .consumers
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    /// Forgets a consumer (a session that ended); what it had not read is no loss, it gave up its claim.
    pub fn remove_consumer(&self, batch: &mut Batch<'_>, id: i64) {
        self.inner
            .consumers
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&id);
        batch.changes().consumers.insert(id, None);
    }

    /// A consumer that the configuration no longer has keeps its backlog, and nothing new is for it.
    pub fn retire(&self, batch: &mut Batch<'_>, consumer: &ConsumerState) {
        if consumer.until.load(Ordering::Relaxed) == u64::MAX {
            consumer.until.store(batch.sequence(), Ordering::Relaxed);
            batch.changes().consumers.insert(consumer.id, Some(consumer.row()));
        }
    }

    /// The next segment of a stream after a sequence, from memory if it is there.
    pub fn segment_in_memory(&self, stream: u16, after: u64) -> Option<Arc<Segment>> {
        lock(&self.inner.ring).after(stream, after)
    }

    /// The next segment after a sequence that may have something for the filters (none: any).
    pub async fn read(&self, stream: u16, after: u64, filters: Arc<[TopicFilter]>) -> Result<reader::Read, Error> {
        if let Some(segment) = self.segment_in_memory(stream, after) {
            return Ok(reader::Read::Segment(segment));
        }
        let (reply, answer) = tokio::sync::oneshot::channel();
        let request = reader::Request::Segment {
            stream,
            after,
            filters,
            reply,
        };
        self.inner.reads.send(request).await.map_err(|_| Error::Stopped)?;
        answer.await.map_err(|_| Error::Stopped)?
    }

    /// The newest sequence of a stream that is on disk.
    pub fn tail(&self, stream: u16) -> u64 {
        self.inner
            .streams
            .get(usize::from(stream))
            .map_or(0, |s| s.last.load(Ordering::Acquire))
    }

    pub async fn module_state(&self, module: &str) -> Result<reader::ModuleState, Error> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let request = reader::Request::ModuleState {
            module: module.to_owned(),
            reply,
        };
        self.inner.reads.send(request).await.map_err(|_| Error::Stopped)?;
        answer.await.map_err(|_| Error::Stopped)?
    }

    /// Rises when the ledger got an entry that no uplink tells of.
    pub(crate) fn losses_inside(&self) -> u64 {
        self.inner.losses_inside.load(Ordering::Acquire)
    }

    /// Entries of the ledger that were not sent: of an uplink by its name, of everybody else with "".
    pub(crate) async fn losses_unsent(&self, consumer: &str) -> Result<Vec<LossRow>, Error> {
        let (reply, answer) = tokio::sync::oneshot::channel();
        let request = reader::Request::Losses {
            consumer: consumer.to_owned(),
            reply,
        };
        self.inner.reads.send(request).await.map_err(|_| Error::Stopped)?;
        answer.await.map_err(|_| Error::Stopped)?
    }

    pub fn path(&self) -> &Path {
        &self.inner.path
    }

    pub fn log_id(&self) -> &str {
        &self.inner.log_id
    }
}

pub use reader::Read;

/// The open batch, locked. Dropping it wakes the writer where there is something to write.
pub struct Batch<'a> {
    inner: &'a Inner,
    /// Some until the drop.
    open: Option<MutexGuard<'a, Open>>,
    touched: bool,
    later: bool,
}

impl Batch<'_> {
    fn open(&mut self) -> &mut Open {
        self.open.as_deref_mut().expect("held until the drop")
    }

    /// Copies the message into the stream's open segment.
    pub fn append(&mut self, stream: u16, message: &MessageRef<'_>) -> Sequence {
        self.touched = true;
        let index = usize::from(stream);
        let open = self.open();
        let sequence = Sequence(open.next_sequence);
        open.next_sequence += 1;
        let builder = &mut open.builders[index];
        let before = builder.bytes();
        builder.push(sequence, message);
        let grown = builder.bytes() - before;
        if builder.is_full() {
            let full = std::mem::take(builder);
            open.closed.push((stream, full));
        }
        open.bytes += grown;
        let state = self.inner.streams.get(index).expect("stream ids come from this log");
        state.open_bytes.fetch_add(grown as u64, Ordering::Relaxed);
        sequence
    }

    pub fn changes(&mut self) -> &mut Changes {
        self.touched = true;
        &mut self.open().changes
    }

    /// The commit that will hold what was put in so far. Asking makes sure that there will be one.
    pub fn ticket(&mut self) -> u64 {
        self.touched = true;
        let open = self.open();
        open.ticket = true;
        open.generation
    }

    /// The newest sequence given out.
    pub fn sequence(&self) -> u64 {
        self.open.as_ref().expect("held until the drop").next_sequence - 1
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        let Some(mut open) = self.open.take() else { return };
        self.inner.open_bytes.store(open.bytes, Ordering::Relaxed);
        let wake = self.touched && open.writer_idle;
        if wake && self.later {
            self.inner.wake_owed.store(true, Ordering::Relaxed);
            return;
        }
        open.writer_idle &= !wake;
        // The writer must not be woken into a lock that is still held.
        drop(open);
        if wake {
            self.inner.wake.notify_all();
        }
    }
}

impl Drop for LogThreads {
    fn drop(&mut self) {
        lock(&self.inner.open).stop = true;
        self.inner.wake.notify_all();
        if let Some(writer) = self.writer.take()
            && writer.join().is_err()
        {
            warn!("the log's writer ended with a panic");
        }
    }
}
