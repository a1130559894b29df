//! The thread that reads behind the writer: segments that have left memory, module state, the ledger.
//!
//! It holds no transaction between two requests, so the WAL can always be reset. The newest few segments read are kept,
//! since consumers that fell behind together read the same ones.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use tokio::sync::{mpsc, oneshot};
use tracing::warn;

use super::changes::LossRow;
use super::segment::{Header, Segment};
use super::store::{Found, ReadStore, StoreError};
use super::{Error, Inner};
use crate::message::TopicFilter;

/// Segments kept after reading, at most 256 KiB each (but for single large messages).
const CACHE_SEGMENTS: usize = 8;

/// What is behind a sequence.
#[derive(Debug, Clone)]
pub enum Read {
    Segment(Arc<Segment>),
    /// Nothing for the filters up to this sequence; ask again from there.
    Nothing(u64),
    /// This segment cannot be read any more.
    Damaged(Header),
    /// Nothing behind it yet.
    End,
}

/// A module's durable state, by key.
pub type ModuleState = Vec<(String, Vec<u8>)>;

pub enum Request {
    Segment {
        stream: u16,
        after: u64,
        filters: Arc<[TopicFilter]>,
        reply: oneshot::Sender<Result<Read, Error>>,
    },
    ModuleState {
        module: String,
        reply: oneshot::Sender<Result<ModuleState, Error>>,
    },
    Losses {
        consumer: String,
        reply: oneshot::Sender<Result<Vec<LossRow>, Error>>,
    },
}

pub fn start(inner: &Arc<Inner>, mut requests: mpsc::Receiver<Request>) -> std::io::Result<()> {
    let path = inner.path.clone();
    let weak = Arc::downgrade(inner);
    std::thread::Builder::new()
        .name("log-reader".into())
        .stack_size(512 << 10)
        .spawn(move || {
            let mut reader = Reader::new(path, weak);
            while let Some(request) = requests.blocking_recv() {
                reader.answer(request);
            }
        })?;
    Ok(())
}

pub(super) struct Reader {
    path: PathBuf,
    log: Weak<Inner>,
    store: Option<ReadStore>,
    cache: VecDeque<Arc<Segment>>,
    drops_seen: u64,
}

impl Reader {
    pub(super) fn new(path: PathBuf, log: Weak<Inner>) -> Reader {
        Reader {
            path,
            log,
            store: None,
            cache: VecDeque::new(),
            drops_seen: 0,
        }
    }

    pub(super) fn answer(&mut self, request: Request) {
        let drops = self.log.upgrade().map_or(0, |l| l.drops.load(Ordering::Acquire));
        if std::mem::replace(&mut self.drops_seen, drops) != drops {
            self.cache.clear();
        }
        if self.store.is_none() {
            self.store = ReadStore::open(&self.path)
                .inspect_err(|e| warn!(cause = %e, "the log cannot be opened for reading"))
                .ok();
        }
        let failed = serve(&self.path, self.store.as_ref(), request, &mut self.cache, || {
            self.log.upgrade().map(|i| {
                (0..i.streams.places())
                    .map(|s| i.streams.get(s).map_or(0, |s| s.last.load(Ordering::Acquire)))
                    .collect()
            })
        });
        if failed {
            // The connection may hold on to an error; the next request gets a new one.
            self.store = None;
        }
    }
}

fn serve(
    path: &Path,
    store: Option<&ReadStore>,
    request: Request,
    cache: &mut VecDeque<Arc<Segment>>,
    tails: impl Fn() -> Option<Vec<u64>>,
) -> bool {
    let closed = || Error::Read("the database cannot be opened".into());
    let told = |e: StoreError| Error::Read(e.to_string());
    match request {
        Request::Segment {
            stream,
            after,
            filters,
            reply,
        } => {
            if let Some(segment) = cache
                .iter()
                .find(|s| s.stream == stream && s.first <= after + 1 && after < s.last)
            {
                let _ = reply.send(Ok(Read::Segment(Arc::clone(segment))));
                return false;
            }
            let found = store
                .ok_or_else(closed)
                .and_then(|s| s.next(stream, after, &filters).map_err(told));
            // Declared lost is only what a second look, past every cache of the connection, finds damaged as well.
            let found = match found {
                Ok(Found::Damaged(_)) => ReadStore::open(path)
                    .and_then(|s| s.next(stream, after, &filters))
                    .map_err(told),
                found => found,
            };
            let read = found.map(|found| match found {
                Found::Segment(segment) => {
                    let segment = Arc::new(segment);
                    if cache.len() == CACHE_SEGMENTS {
                        cache.pop_front();
                    }
                    cache.push_back(Arc::clone(&segment));
                    Read::Segment(segment)
                }
                Found::Damaged(header) => Read::Damaged(header),
                Found::Skipped(to) => Read::Nothing(to),
                Found::End => Read::End,
            });
            if tails().is_none_or(|t| t.get(usize::from(stream)).is_some_and(|tail| after >= *tail)) {
                // Everybody has caught up: give the memory back.
                cache.clear();
            }
            let failed = read.is_err();
            // A consumer that went away no longer wants the answer.
            let _ = reply.send(read);
            failed
        }
        Request::ModuleState { module, reply } => {
            let state = store
                .ok_or_else(closed)
                .and_then(|s| s.module_state(&module).map_err(told));
            let failed = state.is_err();
            let _ = reply.send(state);
            failed
        }
        Request::Losses { consumer, reply } => {
            let losses = store
                .ok_or_else(closed)
                .and_then(|s| s.losses_unsent(&consumer).map_err(told));
            let failed = losses.is_err();
            let _ = reply.send(losses);
            failed
        }
    }
}
