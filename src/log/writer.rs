//! The one thread that writes: it commits whatever arrived while the last commit ran.
//!
//! Each round takes the open batch, adds what is due (cursors that moved, segments that every consumer passed, what a
//! limit drops together with its ledger entries), and makes one transaction of it. No linger: waiting costs rate and
//! latency both (measured). A failed commit is reported for its generation; nothing of it is acknowledged.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tracing::{error, info, warn};

use super::changes::{Changes, LossRow};
use super::segment::{Builder, Compressor, Header, Segment};
use super::store::{Commit, Delete, Flush, ReadStore, Store, StoreError, StreamRow};
use super::{CommitEvent, ConsumerState, DEAD_ROWS_MAX, EVENTS_MAX, Inner, StreamState, lock};
use crate::clock::{self, Instant};
use crate::config::WhenFull;
use crate::essential::Essential;
use crate::message::{Qos, TopicFilter};
use crate::status::Health;

/// Cursors are written with the next commit when the last flush is this old; an idle log flushes after a second.
const FLUSH_EVERY: Duration = Duration::from_millis(100);
const IDLE_EVERY: Duration = Duration::from_secs(1);
/// Between two commits that only delete.
const COLLECT_EVERY: Duration = Duration::from_millis(1);
/// After a failed commit the next one waits a little, so that a full disk is not asked thousands of times a second.
const RETRY_AFTER: Duration = Duration::from_millis(200);
/// Free pages given back to the file system in one idle step.
const SHRINK_PAGES: u32 = 256;
/// Segments that are looked through in one commit for what consumers have waiting beyond their limits.
const LIMITED_SEGMENTS_A_ROUND: usize = 16;
/// More sources than this lose messages in one commit: the rest is declared together.
const LOSS_SOURCES_MAX: usize = 256;

pub fn start(inner: &Arc<Inner>, store: Store) -> std::io::Result<JoinHandle<()>> {
    let (checkpoint, wanted) = sync_channel::<()>(1);
    let path = inner.path.clone();
    std::thread::Builder::new()
        .name("log-checkpoint".into())
        .stack_size(256 << 10)
        .spawn(move || {
            let mut store = None;
            while wanted.recv().is_ok() {
                if store.is_none() {
                    store = ReadStore::open(&path).ok();
                }
                // A busy or failing checkpoint is tried again with the next thousand pages, after an error on a new connection.
                if let Some(Err(e)) = store.as_ref().map(ReadStore::checkpoint) {
                    tracing::debug!(cause = %e, "checkpoint");
                    store = None;
                }
            }
        })?;
    let writer = Writer::new(inner, store, checkpoint);
    std::thread::Builder::new()
        .name("log-writer".into())
        .spawn(move || writer.run())
}

pub(super) struct Writer {
    inner: Arc<Inner>,
    store: Store,
    checkpoint: SyncSender<()>,
    checkpoint_asked: i32,
    flushed: Instant,
    /// Wall and monotonic time at start: ages are counted by the second, so that a clock set forward expires nothing.
    started: (i64, Instant),
    /// Up to where each stream is known to be free of segments that everybody passed.
    collected: HashMap<u16, u64>,
    /// There is more to delete than one commit takes.
    collecting: bool,
    failing: bool,
    shrinking: bool,
    compressor: Compressor,
}

/// A batch taken from the appenders.
struct Taken {
    generation: u64,
    segments: Vec<(Segment, Vec<u8>)>,
    changes: Changes,
    stop: bool,
}

/// Segments that leave a stream with this commit.
#[derive(Default)]
struct Removal<'a> {
    /// Held while something is dropped, until the commit has ended.
    exclusive: Option<MutexGuard<'a, ()>>,
    deletes: Vec<Delete>,
    totals: Vec<StreamRow>,
    losses: Vec<LossRow>,
    /// Cursors that are carried past what was dropped, some by a limit of their own: the segments may stay.
    carried: Vec<Carried>,
}

/// Consumer, stream, through which sequence, and how many messages and bytes of it were for the consumer.
type Carried = (Arc<ConsumerState>, u16, u64, u64, u64);

impl Writer {
    pub(super) fn new(inner: &Arc<Inner>, store: Store, checkpoint: SyncSender<()>) -> Writer {
        Writer {
            inner: Arc::clone(inner),
            store,
            checkpoint,
            checkpoint_asked: 0,
            flushed: clock::monotonic(),
            started: (clock::wall().millis(), clock::monotonic()),
            collected: HashMap::new(),
            collecting: false,
            failing: false,
            shrinking: true,
            compressor: Compressor::default(),
        }
    }

    fn run(mut self) {
        let _essential = Essential("log-writer");
        loop {
            self.wait();
            let due = self.flushed.elapsed() >= FLUSH_EVERY;
            if self.step(due) {
                self.step(true);
                self.settle();
                return;
            }
            if self.failing {
                std::thread::sleep(RETRY_AFTER);
            }
        }
    }

    /// Writes what is open now, with the cursors where that is due; true at the end.
    pub(super) fn step(&mut self, due: bool) -> bool {
        let taken = self.take();
        let stop = taken.stop;
        self.round(taken, due || stop);
        stop
    }

    pub(super) fn settle(&mut self) {
        if let Err(e) = self.store.settle() {
            warn!(cause = %e, "the last checkpoint failed; the next start does it");
        }
        info!("log closed");
    }

    /// Waits until there is something to write, a flush is due, or the end has come.
    fn wait(&mut self) {
        let mut open = lock(&self.inner.open);
        while open.is_empty() && !open.stop {
            open.writer_idle = true;
            let wait = match (self.collecting, self.shrinking) {
                (true, _) => COLLECT_EVERY,
                (false, true) => FLUSH_EVERY,
                (false, false) => IDLE_EVERY,
            };
            let waited = self.inner.wake.wait_timeout(open, wait);
            let (guard, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            open = guard;
            if timeout.timed_out() {
                break;
            }
        }
        open.writer_idle = false;
    }

    fn take(&mut self) -> Taken {
        let inner = Arc::clone(&self.inner);
        let mut open = lock(&inner.open);
        let generation = open.generation;
        open.generation += 1;
        open.ticket = false;
        open.bytes = 0;
        inner.open_bytes.store(0, Ordering::Relaxed);
        let changes = std::mem::take(&mut open.changes);
        let mut builders: Vec<(u16, Builder)> = std::mem::take(&mut open.closed);
        for (stream, builder) in open.builders.iter_mut().enumerate().filter(|(_, b)| b.count > 0) {
            builders.push((stream as u16, std::mem::take(builder)));
        }
        let stop = open.stop;
        drop(open);
        for (stream, builder) in &builders {
            self.stream(*stream)
                .open_bytes
                .fetch_sub(builder.bytes() as u64, Ordering::Relaxed);
        }
        let compressor = &mut self.compressor;
        let segments = builders
            .into_iter()
            .map(|(stream, builder)| builder.finish(stream, compressor))
            .collect();
        Taken {
            generation,
            segments,
            changes,
            stop,
        }
    }

    fn stream(&self, id: u16) -> &StreamState {
        self.inner
            .streams
            .get(usize::from(id))
            .expect("segments are of known streams")
    }

    fn round(&mut self, mut taken: Taken, due: bool) {
        let idle = taken.segments.is_empty() && taken.changes.is_empty();
        let inner = Arc::clone(&self.inner);
        let removal = if due || self.collecting || self.over_limit(&taken) {
            self.removal(&inner, &taken)
        } else {
            Removal::default()
        };
        let declared_before = taken.changes.losses.len();
        taken.changes.losses.extend(removal.losses.iter().cloned());
        if !taken.changes.dead.is_empty() {
            taken.changes.trims.push(("dead", DEAD_ROWS_MAX));
        }
        // What is dropped leaves the cursors in the same commit: else a start after a power cut would count it still.
        let due = due || !removal.carried.is_empty();
        let flush = if due {
            self.dirty_cursors(&taken, &removal)
        } else {
            None
        };
        if idle && flush.is_none() && removal.deletes.is_empty() && taken.changes.is_empty() {
            if due {
                self.flushed = clock::monotonic();
                self.idle_step();
            }
            self.report(taken.generation, Ok(Vec::new()));
            return;
        }
        let commit = Commit {
            segments: &taken.segments,
            changes: &taken.changes,
            flush: flush.as_ref(),
            deletes: &removal.deletes,
            totals: &removal.totals,
        };
        match self.store.commit(&commit) {
            Ok(()) => {
                if due {
                    self.flushed = clock::monotonic();
                }
                self.succeeded(taken, removal);
            }
            Err(e) => {
                // The removal is computed anew by the next round, and its ledger entries with it.
                taken.changes.losses.truncate(declared_before);
                return self.failed(taken, flush, &e);
            }
        }
        self.checkpoint_if_due();
    }

    fn succeeded(&mut self, taken: Taken, removal: Removal<'_>) {
        if std::mem::take(&mut self.failing) {
            self.inner.part.set(Health::Good, "writing again");
            info!("the log can be written again");
        }
        for row in &removal.totals {
            let stream = self.stream(row.id);
            stream.messages.store(row.messages, Ordering::Relaxed);
            stream.bytes.store(row.bytes, Ordering::Relaxed);
        }
        self.shrinking |= !removal.deletes.is_empty();
        if !removal.carried.is_empty() {
            for d in &removal.deletes {
                lock(&self.inner.ring).forget(d.stream, d.from, d.through);
            }
            self.inner.drops.fetch_add(1, Ordering::Release);
        }
        for (consumer, stream, through, messages, bytes) in &removal.carried {
            consumer.advance(*stream, *through, *messages, *bytes);
        }
        for loss in &taken.changes.losses {
            self.inner.counters.lost.add(loss.count);
            if !loss.consumer.starts_with("uplink:") {
                self.inner.losses_inside.fetch_add(1, Ordering::Release);
            }
            if let Some(consumer) = self.consumers().into_iter().find(|c| c.name == loss.consumer) {
                consumer.losses.fetch_add(1, Ordering::Release);
            }
        }
        self.inner.counters.dead.add(taken.changes.dead.len() as u64);
        self.inner.counters.commits.add(1);
        let mut newest = *self.inner.durable.borrow();
        let mut segments = Vec::with_capacity(taken.segments.len());
        let totalled = |stream: u16| removal.totals.iter().any(|t| t.id == stream);
        for (segment, body) in taken.segments {
            let stream = self.stream(segment.stream);
            if !totalled(segment.stream) {
                stream.messages.fetch_add(u64::from(segment.count), Ordering::Relaxed);
                stream.bytes.fetch_add(segment.bytes, Ordering::Relaxed);
            }
            stream.last.store(segment.last, Ordering::Release);
            newest = newest.max(segment.last);
            self.inner.counters.messages.add(u64::from(segment.count));
            self.inner.counters.bytes.add(body.len() as u64);
            let segment = Arc::new(segment);
            lock(&self.inner.ring).push(Arc::clone(&segment));
            segments.push(segment);
        }
        self.inner.durable.send_replace(newest);
        self.report(taken.generation, Ok(segments));
    }

    fn failed(&mut self, taken: Taken, flush: Option<Flush>, cause: &StoreError) {
        if !std::mem::replace(&mut self.failing, true) {
            error!(cause = %cause, "the log cannot be written: nothing is acknowledged until it can");
        }
        let remedy = if cause.is_full() {
            "make room on the disk of data_dir"
        } else {
            "look at the disk of data_dir and its messages in the kernel's log"
        };
        self.inner
            .part
            .set(Health::Failed, format!("cannot write: {cause}; {remedy}"));
        for (consumer, _) in flush.iter().flat_map(|f| &f.cursors) {
            if let Some(consumer) = self.consumers().into_iter().find(|c| c.id == *consumer) {
                consumer.dirty.store(true, Ordering::Release);
            }
        }
        let mut changes = taken.changes;
        for (segment, _) in &taken.segments {
            self.give_up(segment, &mut changes);
        }
        changes.carry_into(&mut lock(&self.inner.open).changes);
        self.report(taken.generation, Err(cause.to_string()));
        self.store.distrust();
    }

    /// A segment that could not be written: its publishers are told, but for QoS 0, where there is nobody to tell. That is
    /// declared to whom it was for.
    fn give_up(&self, segment: &Segment, changes: &mut Changes) {
        let messages = segment.messages_after(0).0;
        for consumer in self.consumers() {
            let filters = consumer.filters();
            let until = consumer.until.load(Ordering::Relaxed);
            let (mut count, mut bytes) = (0, 0);
            for m in &messages {
                let sequence = m.sequence.0;
                let is_for = |(f, since): &(TopicFilter, u64)| sequence > *since && f.matches(m.topic.as_str());
                if sequence > until || !filters.iter().any(is_for) {
                    continue;
                }
                let size = m.size_bytes() as u64;
                count += 1;
                bytes += size;
                if m.qos == Qos::AtMostOnce {
                    let received = m.received.millis();
                    let losses = &mut changes.losses;
                    add_loss(losses, &consumer.name, &m.source, "unwritten", sequence, size, received);
                }
            }
            consumer.unmatched(segment.stream, count, bytes);
        }
    }

    fn report(&self, generation: u64, result: Result<Vec<Arc<Segment>>, String>) {
        let mut events = lock(&self.inner.events);
        // The network thread is busy, and the batch that grows meanwhile is bounded. At the end it may be gone already.
        while events.len() >= EVENTS_MAX && !lock(&self.inner.open).stop {
            let waited = self.inner.events_taken.wait_timeout(events, FLUSH_EVERY);
            events = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        events.push_back(CommitEvent { generation, result });
        drop(events);
        self.inner.committed.notify_one();
    }

    fn consumers(&self) -> Vec<Arc<ConsumerState>> {
        self.inner
            .consumers
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect()
    }

    fn dirty_cursors(&self, taken: &Taken, removal: &Removal<'_>) -> Option<Flush> {
        let mut cursors = Vec::new();
        for (consumer, ..) in &removal.carried {
            consumer.dirty.store(true, Ordering::Release);
        }
        // What this batch holds is on disk with it, so the cursors may speak of it, but of nothing later.
        let sequence = taken
            .segments
            .iter()
            .map(|(s, _)| s.last)
            .max()
            .unwrap_or(*self.inner.durable.borrow());
        for consumer in self.consumers() {
            if !consumer.dirty.swap(false, Ordering::AcqRel) {
                continue;
            }
            for (stream, cursor) in consumer.cursors.iter().enumerate() {
                if self.inner.streams.get(stream).is_none() {
                    continue;
                }
                let (row, is_whole) = cursor.row(stream as u16, sequence);
                if !is_whole {
                    // What the row could not say yet is said by the next flush, also if nothing happens until then.
                    consumer.dirty.store(true, Ordering::Release);
                }
                cursors.push((consumer.id, row));
            }
        }
        for (consumer, stream, through, messages, bytes) in &removal.carried {
            let row = cursors
                .iter_mut()
                .find(|(id, row)| *id == consumer.id && row.stream == *stream);
            if let Some((_, row)) = row {
                row.sequence = row.sequence.max(*through);
                row.messages = row.messages.saturating_sub(*messages);
                row.bytes = row.bytes.saturating_sub(*bytes);
            }
        }
        (!cursors.is_empty()).then_some(Flush { cursors, sequence })
    }

    /// The sequence up to which everybody is done with a stream, as far as what is on disk is concerned.
    fn passed(&self, stream: &StreamState) -> u64 {
        let tail = stream.last.load(Ordering::Acquire);
        self.consumers()
            .iter()
            .map(|consumer| {
                let cursor = &consumer.cursors[usize::from(stream.id)];
                let done = cursor.done.load(Ordering::Acquire);
                let idle = done >= cursor.matched.load(Ordering::Acquire);
                if idle || done >= consumer.until.load(Ordering::Relaxed) {
                    tail
                } else {
                    done.min(tail)
                }
            })
            .min()
            .unwrap_or(tail)
    }

    fn over_limit(&self, taken: &Taken) -> bool {
        taken.segments.iter().any(|(s, _)| {
            let stream = self.stream(s.stream);
            stream.when_full() == WhenFull::DropOldest
                && stream.bytes.load(Ordering::Relaxed) + s.bytes > stream.bytes_max()
        })
    }

    /// What leaves with this commit: what everybody passed, and what the limits drop.
    fn removal<'a>(&mut self, inner: &'a Inner, taken: &Taken) -> Removal<'a> {
        let mut removal = Removal::default();
        self.collecting = false;
        for stream in inner.streams.iter() {
            if let Err(e) = self.remove_from(inner, stream, taken, &mut removal) {
                warn!(stream = %stream.name, cause = %e, "old segments could not be looked through; tried again");
            }
        }
        if let Err(e) = self.limit_consumers(inner, &mut removal) {
            warn!(cause = %e, "what waits beyond a limit could not be looked through; tried again");
        }
        removal
    }

    /// What waits for a consumer beyond a limit of its own goes, the oldest first, to the message. Not while it has
    /// something of the stream in its hands: it takes that in hand itself then (`Session::is_over_limit`).
    fn limit_consumers<'a>(&mut self, inner: &'a Inner, removal: &mut Removal<'a>) -> Result<(), StoreError> {
        let mut looked = 0;
        for consumer in self.consumers() {
            let bytes_max = consumer.bytes_max.load(Ordering::Relaxed);
            if bytes_max == u64::MAX {
                continue;
            }
            let own = |(c, ..): &&Carried| c.id == consumer.id;
            let gone: u64 = removal.carried.iter().filter(own).map(|(.., bytes)| *bytes).sum();
            let mut excess = consumer.queued().1.saturating_sub(gone).saturating_sub(bytes_max);
            let filters = consumer.filters();
            for stream in inner.streams.iter() {
                if excess == 0 {
                    break;
                }
                removal.exclusive.get_or_insert_with(|| lock(&inner.dropping));
                let cursor = &consumer.cursors[usize::from(stream.id)];
                if cursor.held_from.load(Ordering::Acquire) != 0 {
                    continue;
                }
                let carried = removal.carried.iter().filter(own).filter(|(_, s, ..)| *s == stream.id);
                if carried.clone().any(|(_, _, through, ..)| *through == 0) {
                    // What this commit deletes behind a held segment is still in the database: the next round looks.
                    continue;
                }
                let carried = carried.map(|(_, _, through, ..)| *through).max().unwrap_or(0);
                let begin = cursor.done.load(Ordering::Acquire).max(carried);
                let (mut done, mut count, mut bytes) = (begin, 0, 0);
                for header in self.store.holding_after(stream.id, begin)? {
                    if excess == 0 {
                        break;
                    }
                    if looked >= LIMITED_SEGMENTS_A_ROUND {
                        self.collecting = true;
                        break;
                    }
                    looked += 1;
                    let last = header.last;
                    // A damaged one is its reader's to declare.
                    let Ok(segment) = self.store.segment(header) else { break };
                    for m in segment.messages_after(done).0 {
                        if excess == 0 {
                            break;
                        }
                        let (s, size) = (m.sequence.0, m.size_bytes() as u64);
                        done = s;
                        if !filters
                            .iter()
                            .any(|(f, since)| s > *since && f.matches(m.topic.as_str()))
                        {
                            continue;
                        }
                        (count, bytes, excess) = (count + 1, bytes + size, excess.saturating_sub(size));
                        let at = m.received.millis();
                        add_loss(
                            &mut removal.losses,
                            &consumer.name,
                            &m.source,
                            "queue full",
                            s,
                            size,
                            at,
                        );
                    }
                    if excess > 0 {
                        done = last;
                    }
                }
                if count == 0 {
                    // Nothing of it was for this consumer.
                    consumer.advance(stream.id, done, 0, 0);
                } else {
                    removal
                        .carried
                        .push((Arc::clone(&consumer), stream.id, done, count, bytes));
                }
            }
        }
        Ok(())
    }

    fn remove_from<'a>(
        &mut self,
        inner: &'a Inner,
        stream: &StreamState,
        taken: &Taken,
        removal: &mut Removal<'a>,
    ) -> Result<(), StoreError> {
        let mut messages = stream.messages.load(Ordering::Relaxed);
        let mut bytes = stream.bytes.load(Ordering::Relaxed);
        let incoming = taken.segments.iter().filter(|(s, _)| s.stream == stream.id);
        let (in_messages, in_bytes, in_last) = incoming.fold((0, 0, 0), |(m, b, l), (s, _)| {
            (m + u64::from(s.count), b + s.bytes, l.max(s.last))
        });
        let mut deletes: Vec<Delete> = Vec::new();
        let passed = self.passed(stream);
        let mut looked = 0;
        if messages > 0 && self.collected.get(&stream.id).is_none_or(|c| *c < passed) {
            let headers = self.store.oldest(stream.id, passed)?;
            for h in &headers {
                messages = messages.saturating_sub(u64::from(h.count));
                bytes = bytes.saturating_sub(h.bytes);
                looked = h.last;
            }
            if headers.len() < super::store::DELETE_CHUNK {
                self.collected.insert(stream.id, passed);
            } else {
                self.collecting = true;
            }
            if looked > 0 {
                deletes.push(Delete {
                    stream: stream.id,
                    from: 0,
                    through: looked,
                });
            }
        }
        let drop_to = match stream.when_full() {
            WhenFull::DropOldest => stream.bytes_max().saturating_sub(in_bytes),
            WhenFull::Reject => u64::MAX,
        };
        let now = self.started.0 + i64::try_from(self.started.1.elapsed().as_millis()).unwrap_or(i64::MAX);
        let too_old = stream
            .age_max()
            .map(|age| now - i64::try_from(age.as_millis()).unwrap_or(i64::MAX));
        let reason = |bytes: u64, h: &Header| match () {
            () if bytes > drop_to => Some("full"),
            () if too_old.is_some_and(|t| h.newest < t) => Some("expired"),
            () => None,
        };
        // A segment that somebody holds stays. Cursors are not carried past it then: what lies in it is still owed, to the
        // holder until it acknowledges, and to everybody else.
        let mut kept = false;
        'looking: while messages > 0 && (bytes > drop_to || too_old.is_some()) {
            let headers = self.store.oldest_after(stream.id, looked)?;
            if headers.is_empty() {
                break;
            }
            for header in headers {
                let Some(reason) = reason(bytes, &header) else {
                    break 'looking;
                };
                // From here to the end of the commit no consumer may begin to read what is dropped.
                removal.exclusive.get_or_insert_with(|| lock(&inner.dropping));
                let skipped = looked;
                looked = header.last;
                if self.is_held(stream.id, &header) {
                    kept = true;
                    continue;
                }
                messages = messages.saturating_sub(u64::from(header.count));
                bytes = bytes.saturating_sub(header.bytes);
                match deletes.last_mut() {
                    Some(d) if d.through == skipped => d.through = header.last,
                    _ => deletes.push(Delete {
                        stream: stream.id,
                        from: header.first,
                        through: header.last,
                    }),
                }
                self.declare(stream, header, reason, kept, removal)?;
            }
        }
        if !deletes.is_empty() {
            removal.deletes.append(&mut deletes);
            removal.totals.push(StreamRow {
                id: stream.id,
                name: stream.name.clone(),
                messages: messages + in_messages,
                bytes: bytes + in_bytes,
                last: in_last.max(stream.last.load(Ordering::Relaxed)),
            });
        }
        Ok(())
    }

    /// True while a consumer has messages of the segment in its hands: they are on their way and are not dropped, so
    /// that nothing is both delivered and declared lost.
    fn is_held(&self, stream: u16, header: &Header) -> bool {
        self.consumers().iter().any(|c| {
            let cursor = &c.cursors[usize::from(stream)];
            let from = cursor.held_from.load(Ordering::Acquire);
            from != 0 && from <= header.last && header.first <= cursor.held_to.load(Ordering::Acquire)
        })
    }

    /// Counts, to the message, what a dropped segment means for each consumer that had not passed it.
    fn declare(
        &self,
        stream: &StreamState,
        header: Header,
        reason: &str,
        kept: bool,
        removal: &mut Removal<'_>,
    ) -> Result<(), StoreError> {
        let index = usize::from(stream.id);
        let waiting: Vec<_> = self
            .consumers()
            .into_iter()
            .filter(|c| {
                let done = c.cursors[index].done.load(Ordering::Acquire);
                done < header.last && done < c.cursors[index].matched.load(Ordering::Acquire)
            })
            .collect();
        if waiting.is_empty() {
            return Ok(());
        }
        let (last, damaged) = (header.last, header.clone());
        let (messages, reason) = match self.store.segment(header) {
            Ok(segment) => (segment.messages_after(0).0, reason),
            Err(StoreError::Damaged) => (Vec::new(), "damaged"),
            Err(e) => return Err(e),
        };
        for consumer in waiting {
            let filters = consumer.filters();
            let done = consumer.cursors[index].done.load(Ordering::Acquire);
            let until = consumer.until.load(Ordering::Relaxed);
            let (mut count, mut bytes) = (0, 0);
            for m in &messages {
                let s = m.sequence.0;
                if s <= done
                    || s > until
                    || !filters
                        .iter()
                        .any(|(f, since)| s > *since && f.matches(m.topic.as_str()))
                {
                    continue;
                }
                count += 1;
                bytes += m.size_bytes() as u64;
                add_loss(
                    &mut removal.losses,
                    &consumer.name,
                    &m.source,
                    reason,
                    s,
                    m.size_bytes() as u64,
                    m.received.millis(),
                );
            }
            if reason == "damaged" {
                // What was inside cannot be known; the whole segment is named.
                let at = clock::wall().millis();
                removal.losses.push(LossRow {
                    id: 0,
                    consumer: consumer.name.clone(),
                    source: "(unknown)".into(),
                    reason: "damaged".into(),
                    first: damaged.first,
                    last,
                    count: u64::from(damaged.count),
                    bytes: damaged.bytes,
                    oldest: damaged.oldest,
                    newest: damaged.newest,
                    at,
                });
            }
            let through = if kept { 0 } else { last };
            removal.carried.push((consumer, stream.id, through, count, bytes));
        }
        Ok(())
    }

    fn checkpoint_if_due(&mut self) {
        let pages = self.store.wal_pages();
        if pages >= self.store.tuning().wal_pages_writer {
            if let Err(e) = self.store.checkpoint() {
                tracing::debug!(cause = %e, "checkpoint");
                self.store.distrust();
            }
            self.checkpoint_asked = 0;
        } else if pages - self.checkpoint_asked >= self.store.tuning().wal_pages_background {
            self.checkpoint_asked = pages;
            // A full channel means that one is asked for already.
            let _ = self.checkpoint.try_send(());
        } else if pages < self.checkpoint_asked {
            self.checkpoint_asked = 0;
        }
    }

    fn idle_step(&mut self) {
        if self.shrinking {
            self.shrinking = match self.store.shrink(SHRINK_PAGES) {
                Ok(more) => more,
                Err(e) => {
                    tracing::debug!(cause = %e, "shrinking the database");
                    false
                }
            };
            self.checkpoint_if_due();
        }
    }
}

/// Adds one lost message to the entry of its consumer, source and reason.
pub(super) fn add_loss(
    losses: &mut Vec<LossRow>,
    consumer: &str,
    source: &str,
    reason: &str,
    sequence: u64,
    bytes: u64,
    received: i64,
) {
    let same = |l: &&mut LossRow| l.consumer == consumer && l.reason == reason && l.source == source;
    if let Some(row) = losses.iter_mut().rev().find(same) {
        row.first = row.first.min(sequence);
        row.last = row.last.max(sequence);
        row.count += 1;
        row.bytes += bytes;
        row.oldest = row.oldest.min(received);
        row.newest = row.newest.max(received);
        return;
    }
    let source = if losses.len() < LOSS_SOURCES_MAX || source == OTHERS {
        source
    } else {
        OTHERS
    };
    if source == OTHERS
        && losses
            .iter()
            .any(|l| l.consumer == consumer && l.reason == reason && l.source == OTHERS)
    {
        return add_loss(losses, consumer, OTHERS, reason, sequence, bytes, received);
    }
    losses.push(LossRow {
        id: 0,
        consumer: consumer.to_owned(),
        source: source.to_owned(),
        reason: reason.to_owned(),
        first: sequence,
        last: sequence,
        count: 1,
        bytes,
        oldest: received,
        newest: received,
        at: clock::wall().millis(),
    });
}

const OTHERS: &str = "(others)";
