//! Where each consumer stands: shared between the thread that appends for it, the task that reads for it and the writer.
//!
//! `done >= matched` means that nothing waits. `matched` is moved under the lock of the open batch, so that the writer
//! never takes a message away between its commit and its being owed to somebody.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use super::Log;
use super::changes::{ConsumerRow, FilterRow};
use super::store::CursorRow;
use crate::message::{Sequence, TopicFilter};

/// Where a consumer stands in one stream.
#[derive(Debug, Default)]
pub(crate) struct Cursor {
    /// Everything up to here is done.
    pub done: AtomicU64,
    /// The newest sequence that a filter of the consumer matched: `done >= matched` means that nothing waits.
    pub matched: AtomicU64,
    pub messages: AtomicU64,
    pub bytes: AtomicU64,
    /// What the consumer has in its hands (0, 0: nothing): not dropped by a limit meanwhile.
    pub held_from: AtomicU64,
    pub held_to: AtomicU64,
}

impl Cursor {
    /// What a flush that speaks of everything up to `through` writes; false where that is not all there is to say.
    ///
    /// A start counts anew only what came after the last flush. A message that was matched behind `through` and whose
    /// consumer no later flush mentions would be taken for done.
    pub fn row(&self, stream: u16, through: u64) -> (CursorRow, bool) {
        let matched = self.matched.load(Ordering::Acquire);
        let done = self.done.load(Ordering::Acquire);
        let row = CursorRow {
            stream,
            sequence: done.min(through),
            matched: matched.min(through),
            messages: self.messages.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
        };
        (row, matched.max(done) <= through)
    }
}

#[derive(Debug)]
pub struct ConsumerState {
    pub(crate) id: i64,
    pub(crate) name: String,
    pub(crate) filters: RwLock<Arc<[(TopicFilter, u64)]>>,
    pub(crate) cursors: Box<[Cursor]>,
    /// Nothing after this sequence is for it (`u64::MAX`: no such end).
    pub(crate) until: AtomicU64,
    pub(crate) dirty: AtomicBool,
    /// Rises when the ledger got an entry for this consumer.
    pub(crate) losses: AtomicU64,
    /// What may wait for it; beyond it the writer drops the oldest (`u64::MAX`: no limit of its own).
    pub(crate) bytes_max: AtomicU64,
}

impl ConsumerState {
    pub fn id(&self) -> i64 {
        self.id
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// From the next round of the writer on no more than this waits for it.
    pub fn limit(&self, bytes_max: Option<u64>) {
        self.bytes_max.store(bytes_max.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// The configuration no longer has it: nothing new is for it.
    pub fn is_retired(&self) -> bool {
        self.until.load(Ordering::Relaxed) != u64::MAX
    }

    /// The router matched a message that is being appended: called in the order of sequences, by one thread.
    pub fn matched(&self, stream: u16, sequence: Sequence, bytes: usize) {
        let cursor = &self.cursors[usize::from(stream)];
        if cursor.done.load(Ordering::Acquire) >= cursor.matched.load(Ordering::Relaxed) {
            // Nothing was waiting, so whatever lies between is not for this consumer.
            cursor.done.fetch_max(sequence.0 - 1, Ordering::AcqRel);
            cursor.messages.store(0, Ordering::Relaxed);
            cursor.bytes.store(0, Ordering::Relaxed);
        }
        cursor.matched.store(sequence.0, Ordering::Release);
        cursor.messages.fetch_add(1, Ordering::Relaxed);
        cursor.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.dirty.store(true, Ordering::Release);
    }

    /// Messages that were matched could not be written.
    pub(super) fn unmatched(&self, stream: u16, messages: u64, bytes: u64) {
        let cursor = &self.cursors[usize::from(stream)];
        for (n, by) in [(&cursor.messages, messages), (&cursor.bytes, bytes)] {
            let _ = n.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |v| Some(v.saturating_sub(by)));
        }
    }

    pub fn done(&self, stream: u16) -> u64 {
        self.cursors[usize::from(stream)].done.load(Ordering::Acquire)
    }

    pub fn has_backlog(&self, stream: u16) -> bool {
        let cursor = &self.cursors[usize::from(stream)];
        cursor.done.load(Ordering::Acquire) < cursor.matched.load(Ordering::Acquire)
    }

    /// Everything in the stream up to `sequence` is done, `messages` of them having been for this consumer.
    pub fn advance(&self, stream: u16, sequence: u64, messages: u64, bytes: u64) {
        let cursor = &self.cursors[usize::from(stream)];
        let before = cursor.done.fetch_max(sequence, Ordering::AcqRel);
        let less = |n: &AtomicU64, by: u64| {
            let _ = n.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |v| Some(v.saturating_sub(by)));
        };
        less(&cursor.messages, messages);
        less(&cursor.bytes, bytes);
        if cursor.done.load(Ordering::Acquire) >= cursor.matched.load(Ordering::Acquire) {
            cursor.messages.store(0, Ordering::Relaxed);
            cursor.bytes.store(0, Ordering::Relaxed);
        }
        // A commit wakes whoever reads, and who reads says again where it stands: that alone is no reason for a commit.
        if before < sequence || messages > 0 || bytes > 0 {
            self.dirty.store(true, Ordering::Release);
        }
    }

    /// `messages` of the backlog are done; which stream they were in is not told, so the first that has so many counts.
    pub(crate) fn count_down(&self, mut messages: u64) {
        for cursor in &self.cursors {
            let here = cursor.messages.load(Ordering::Relaxed).min(messages);
            let _ = cursor
                .messages
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |v| Some(v.saturating_sub(here)));
            messages -= here;
        }
    }

    /// Takes hold of everything behind `after` in a stream, so that no limit drops it under the reader; returns from
    /// where to read (further on where a limit came first). None: something is being dropped just now; after the
    /// next commit it can be had.
    pub fn hold(&self, log: &Log, stream: u16, after: u64) -> Option<u64> {
        let _not_dropping = log.inner.dropping.try_lock().ok()?;
        let cursor = &self.cursors[usize::from(stream)];
        if cursor.held_from.load(Ordering::Relaxed) == 0 {
            cursor.held_from.store(after + 1, Ordering::Release);
        }
        cursor.held_to.store(u64::MAX, Ordering::Release);
        Some(after.max(cursor.done.load(Ordering::Acquire)))
    }

    /// What of a stream is in the consumer's hands from now on; None: nothing.
    pub fn holds(&self, stream: u16, range: Option<(u64, u64)>) {
        let cursor = &self.cursors[usize::from(stream)];
        let (from, to) = range.unwrap_or((0, 0));
        if from == 0 {
            cursor.held_from.store(0, Ordering::Release);
            cursor.held_to.store(0, Ordering::Release);
        } else {
            cursor.held_to.store(to, Ordering::Release);
            cursor.held_from.store(from, Ordering::Release);
        }
    }

    pub fn queued(&self) -> (u64, u64) {
        self.cursors
            .iter()
            .filter(|c| c.done.load(Ordering::Relaxed) < c.matched.load(Ordering::Relaxed))
            .fold((0, 0), |(m, b), c| {
                (
                    m + c.messages.load(Ordering::Relaxed),
                    b + c.bytes.load(Ordering::Relaxed),
                )
            })
    }

    pub(crate) fn filters(&self) -> Arc<[(TopicFilter, u64)]> {
        Arc::clone(&self.filters.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn row(&self) -> ConsumerRow {
        let until = self.until.load(Ordering::Relaxed);
        ConsumerRow {
            name: self.name.clone(),
            filters: self
                .filters()
                .iter()
                .map(|(f, since)| FilterRow {
                    filter: f.as_str().to_owned(),
                    since: *since,
                })
                .collect(),
            until: (until != u64::MAX).then_some(until),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cursor(done: u64, matched: u64) -> Cursor {
        Cursor {
            done: done.into(),
            matched: matched.into(),
            ..Cursor::default()
        }
    }

    /// Such a flush, and then another that no longer mentions the consumer, would lose what was matched in between.
    #[test]
    fn a_flush_that_cannot_say_everything_says_so() {
        let told = |c: Cursor| {
            let (row, is_whole) = c.row(0, 100);
            (row.sequence, row.matched, is_whole)
        };
        assert_eq!(told(cursor(90, 100)), (90, 100, true));
        assert_eq!(
            told(cursor(100, 101)),
            (100, 100, false),
            "matched behind what is on disk"
        );
        assert_eq!(told(cursor(110, 111)), (100, 100, false));
    }
}
