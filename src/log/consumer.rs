//! A consumer of the log: a filter and a cursor. Uplinks and modules read the log through one of these.

use crate::clock::Timestamp;
use crate::message::{Message, Sequence};

/// A place in the log: cursors are kept for each stream, order holds within a stream (and so for each topic).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Position {
    pub stream: u16,
    pub sequence: Sequence,
}

#[derive(Debug, Clone)]
pub struct Entry {
    pub position: Position,
    pub message: Message,
    /// A loss notice (topic `status/loss/…`), made from the ledger: it is not in the log, but is read, sent and
    /// acknowledged like any other entry, and must be sent even where no route's filter matches it.
    pub notice: bool,
}

/// What one processed batch does to the log, in one commit: all of it or nothing.
#[derive(Debug, Clone, Default)]
pub struct Effects {
    /// Messages to publish (a module's output). They go through the router like anybody's.
    pub publish: Vec<Message>,
    /// Entries that are done.
    pub acknowledge: Vec<Position>,
    /// Entries that are refused for good, with the reason; they are done as well.
    pub dead: Vec<(Entry, String)>,
    /// Durable state of the module, by key; None deletes.
    pub state: Vec<(String, Option<Vec<u8>>)>,
}

#[derive(Debug, Clone, Copy, Default)]
pub struct Backlog {
    pub messages: u64,
    pub bytes: u64,
    /// When the oldest unacknowledged message was received.
    pub oldest: Option<Timestamp>,
}

pub struct Consumer {}

impl Consumer {
    /// `uplink:NAME` or `module:NAME`.
    pub fn name(&self) -> &str {
        todo!()
    }

    /// The next entries after the read position, at least one (waits for it), at most `messages_max` and about
    /// `bytes_max`; in order within each stream. Expired messages are skipped (and counted). Cancel-safe.
    pub async fn next(&mut self, _messages_max: usize, _bytes_max: usize) -> Result<Vec<Entry>, super::Error> {
        todo!()
    }

    /// Marks an entry that `next` gave as done. The cursor moves over everything up to the first entry still open, in
    /// whatever order they are acknowledged; it is on disk soon after (a crash before that gives some entries again).
    pub fn acknowledge(&mut self, _position: Position) {
        todo!()
    }

    /// Refused for good: goes to the dead letters with the reason, durably, and is acknowledged.
    pub fn dead_letter(&mut self, _entry: &Entry, _reason: &str) {
        todo!()
    }

    /// The read position goes back to the cursor: the next `next` gives everything unacknowledged again, in order.
    pub fn rewind(&mut self) {
        todo!()
    }

    pub fn backlog(&self) -> Backlog {
        todo!()
    }
}
