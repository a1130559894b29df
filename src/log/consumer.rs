//! A consumer of the log: a filter and a cursor. Uplinks and modules read the log through one of these.
//!
//! Everything that [`Consumer::next`] gives is open until it is acknowledged, in whatever order; the cursor stands
//! before the first open entry. A crash, or [`Consumer::rewind`], gives everything open again, in order.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::watch;

use super::changes::{DeadRow, LossRow};
use super::reader::Read;
use super::{ConsumerState, Error, Log, record, writer};
use crate::clock::{self, Timestamp};
use crate::message::{Message, Sequence, Topic, TopicFilter};

/// The stream number of loss notices: they come from the ledger, not from a stream.
const NOTICES: u16 = u16::MAX;

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
    /// When the oldest unacknowledged message that was read was received.
    pub oldest: Option<Timestamp>,
}

/// An entry that `next` read; `handed` once it was given out, `done` once it was acknowledged.
#[derive(Debug)]
struct Open {
    sequence: u64,
    bytes: u64,
    received: Timestamp,
    done: bool,
    /// Taken when it is given out; None then.
    message: Option<Message>,
}

#[derive(Debug, Default)]
struct Lane {
    /// Everything up to here was read.
    read: u64,
    open: VecDeque<Open>,
    /// How many of `open`, from the back, were read and not given out yet, and their bytes.
    waiting: usize,
    waiting_bytes: usize,
}

pub struct Consumer {
    log: Log,
    state: Arc<ConsumerState>,
    lanes: Vec<Lane>,
    durable: watch::Receiver<u64>,
    /// Loss notices given out: ledger id and the count that was sent.
    notices: Vec<(i64, u64)>,
    losses_seen: u64,
    filters: Arc<[TopicFilter]>,
    /// Which stream is looked at first.
    turn: usize,
}

impl Consumer {
    pub(crate) fn new(log: Log, state: Arc<ConsumerState>) -> Consumer {
        let filters = state.filters().iter().map(|(f, _)| f.clone()).collect();
        let durable = log.durable();
        let mut consumer = Consumer {
            log,
            state,
            lanes: Vec::new(),
            durable,
            notices: Vec::new(),
            losses_seen: 0,
            filters,
            turn: 0,
        };
        consumer.rewind();
        consumer
    }

    /// `uplink:NAME` or `module:NAME`.
    pub fn name(&self) -> &str {
        &self.state.name
    }

    /// The next entries after the read position, at least one (waits for it), at most `messages_max` and about
    /// `bytes_max`; in order within each stream. Expired messages are skipped, and declared. Cancel-safe.
    pub async fn next(&mut self, messages_max: usize, bytes_max: usize) -> Result<Vec<Entry>, Error> {
        loop {
            // Seen before looking, so that what is committed while we look is not missed.
            self.durable.borrow_and_update();
            let notices = self.read_notices().await?;
            if !notices.is_empty() {
                return Ok(notices);
            }
            // Reading waits, so the call may be cancelled in it: what was read stays in its lane, and entries are given
            // out only behind the last wait. Each stream comes first in its turn, so that a busy one starves no other.
            self.turn = self.turn.wrapping_add(1);
            let mut blocked = false;
            for nth in 0..self.lanes.len() {
                let stream = (self.turn + nth) % self.lanes.len();
                while self.is_below(messages_max, bytes_max) {
                    match self.fill(stream).await? {
                        Filled::More => {}
                        Filled::End => break,
                        Filled::Blocked => {
                            blocked = true;
                            break;
                        }
                    }
                }
            }
            let mut entries = Vec::new();
            let mut bytes = 0;
            for nth in 0..self.lanes.len() {
                let stream = (self.turn + nth) % self.lanes.len();
                self.give_out(stream, messages_max, bytes_max, &mut entries, &mut bytes);
            }
            if !entries.is_empty() {
                return Ok(entries);
            }
            if blocked {
                // A limit drops just now; the commit that ends it wakes us.
                tokio::task::yield_now().await;
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            } else {
                self.durable.changed().await.map_err(|_| Error::Stopped)?;
            }
        }
    }

    /// Less is read and not given out than was asked for.
    fn is_below(&self, messages_max: usize, bytes_max: usize) -> bool {
        let (messages, bytes) = self
            .lanes
            .iter()
            .fold((0, 0), |(m, b), l| (m + l.waiting, b + l.waiting_bytes));
        messages < messages_max && bytes < bytes_max
    }

    fn give_out(
        &mut self,
        stream: usize,
        messages_max: usize,
        bytes_max: usize,
        out: &mut Vec<Entry>,
        bytes: &mut usize,
    ) {
        let lane = &mut self.lanes[stream];
        while lane.waiting > 0 && out.len() < messages_max && *bytes < bytes_max {
            let index = lane.open.len() - lane.waiting;
            let open = &mut lane.open[index];
            let message = open.message.take().expect("what waits was not given out");
            *bytes += open.bytes as usize;
            lane.waiting -= 1;
            lane.waiting_bytes -= open.bytes as usize;
            let position = Position {
                stream: stream as u16,
                sequence: Sequence(open.sequence),
            };
            out.push(Entry {
                position,
                message,
                notice: false,
            });
        }
    }

    /// Reads the next segment of a stream into its lane.
    async fn fill(&mut self, stream: usize) -> Result<Filled, Error> {
        let id = stream as u16;
        if self.state.until.load(Ordering::Relaxed) <= self.lanes[stream].read {
            return Ok(Filled::End);
        }
        if self.lanes[stream].read >= self.log.tail(id) {
            self.settle(stream);
            return Ok(Filled::End);
        }
        let Some(after) = self.state.hold(&self.log, id, self.lanes[stream].read) else {
            return Ok(Filled::Blocked);
        };
        self.lanes[stream].read = after;
        let read = match self.log.read(id, after, Arc::clone(&self.filters)).await {
            Ok(read) => read,
            Err(e) => {
                self.settle(stream);
                return Err(e);
            }
        };
        let filled = match read {
            Read::Segment(segment) => {
                let now = clock::wall();
                let filters = self.state.filters();
                let until = self.state.until.load(Ordering::Relaxed);
                let (messages, end) = segment.messages_after(after);
                let mut losses = Vec::new();
                let (mut expired, mut expired_bytes) = (0, 0);
                let lane = &mut self.lanes[stream];
                for message in messages {
                    let sequence = message.sequence.0;
                    let is_ours =
                        |(f, since): &(TopicFilter, u64)| sequence > *since && f.matches(message.topic.as_str());
                    if sequence > until || !filters.iter().any(is_ours) {
                        continue;
                    }
                    let bytes = message.size_bytes() as u64;
                    if message.is_expired(now) {
                        writer::add_loss(
                            &mut losses,
                            &self.state.name,
                            &message.source,
                            "expired",
                            sequence,
                            bytes,
                            message.received.millis(),
                        );
                        expired += 1;
                        expired_bytes += bytes;
                        continue;
                    }
                    lane.open.push_back(Open {
                        sequence,
                        bytes,
                        received: message.received,
                        done: false,
                        message: Some(message),
                    });
                    lane.waiting += 1;
                    lane.waiting_bytes += bytes as usize;
                }
                lane.read = segment.last;
                if end.is_err() {
                    losses.push(damaged(
                        &self.state.name,
                        segment.first,
                        segment.last,
                        0,
                        0,
                        segment.oldest,
                        segment.newest,
                    ));
                }
                self.declare(losses);
                self.state.advance(id, 0, expired, expired_bytes);
                Filled::More
            }
            Read::Damaged(h) => {
                self.lanes[stream].read = h.last;
                self.declare(vec![damaged(
                    &self.state.name,
                    h.first,
                    h.last,
                    u64::from(h.count),
                    h.bytes,
                    h.oldest,
                    h.newest,
                )]);
                Filled::More
            }
            Read::Nothing(to) => {
                self.lanes[stream].read = to;
                Filled::More
            }
            Read::End => Filled::End,
        };
        self.settle(stream);
        Ok(filled)
    }

    fn declare(&self, losses: Vec<LossRow>) {
        if !losses.is_empty() {
            self.log.batch().changes().losses.extend(losses);
        }
    }

    /// Where nothing is open, the cursor moves to what was read; what is held is what is open.
    fn settle(&mut self, stream: usize) {
        let lane = &self.lanes[stream];
        let id = stream as u16;
        match (lane.open.front(), lane.open.back()) {
            (Some(front), Some(back)) => {
                self.state.advance(id, front.sequence - 1, 0, 0);
                self.state.holds(id, Some((front.sequence, back.sequence)));
            }
            _ => {
                self.state.advance(id, lane.read, 0, 0);
                self.state.holds(id, None);
            }
        }
    }

    async fn read_notices(&mut self) -> Result<Vec<Entry>, Error> {
        let losses = self.state.losses.load(Ordering::Acquire);
        // What sessions and modules lost is told by the broker as a message of its own.
        if losses == self.losses_seen || !self.state.name.starts_with("uplink:") {
            return Ok(Vec::new());
        }
        let rows = self.log.losses_unsent(&self.state.name).await?;
        self.losses_seen = losses;
        let now = clock::wall();
        let mut entries = Vec::new();
        for row in rows {
            if self.notices.contains(&(row.id, row.count)) {
                continue;
            }
            self.notices.push((row.id, row.count));
            entries.push(Entry {
                position: Position {
                    stream: NOTICES,
                    sequence: Sequence(row.id as u64),
                },
                message: notice(self.log.log_id(), &row, now),
                notice: true,
            });
        }
        Ok(entries)
    }

    /// Marks an entry that `next` gave as done. The cursor moves over everything up to the first entry still open, in
    /// whatever order they are acknowledged; it is on disk soon after (a crash before that gives some entries again).
    pub fn acknowledge(&mut self, position: Position) {
        if position.stream == NOTICES {
            let mut batch = self.log.batch();
            self.notices.retain(|(id, count)| {
                let this = *id == position.sequence.0 as i64;
                if this {
                    batch.changes().losses_sent.push((*id, *count));
                }
                !this
            });
            return;
        }
        let stream = usize::from(position.stream);
        if let Some((messages, bytes)) = self.mark(position)
            && messages > 0
        {
            self.state.advance(position.stream, 0, messages, bytes);
            self.settle(stream);
        }
    }

    /// Marks it done and takes what is done off the front; how many messages and bytes left.
    fn mark(&mut self, position: Position) -> Option<(u64, u64)> {
        let lane = self.lanes.get_mut(usize::from(position.stream))?;
        let index = lane
            .open
            .binary_search_by_key(&position.sequence.0, |o| o.sequence)
            .ok()?;
        lane.open[index].done = true;
        let (mut messages, mut bytes) = (0, 0);
        while lane.open.front().is_some_and(|o| o.done) {
            bytes += lane.open.pop_front().map_or(0, |o| o.bytes);
            messages += 1;
        }
        Some((messages, bytes))
    }

    /// For one commit with other effects: marks the entries and says which cursors the commit has to carry, and how many
    /// entries leave. The cursors in memory move with [`Consumer::settle_all`], when it has succeeded.
    pub(crate) fn prepare(&mut self, done: impl Iterator<Item = Position>) -> (Vec<(i64, u16, u64)>, u64) {
        let mut touched = Vec::new();
        let mut left = 0;
        for position in done.filter(|p| p.stream != NOTICES) {
            left += self.mark(position).map_or(0, |(messages, _)| messages);
            if !touched.contains(&position.stream) {
                touched.push(position.stream);
            }
        }
        let cursors = touched
            .into_iter()
            .map(|stream| {
                let lane = &self.lanes[usize::from(stream)];
                (
                    self.state.id,
                    stream,
                    lane.open.front().map_or(lane.read, |o| o.sequence - 1),
                )
            })
            .collect();
        (cursors, left)
    }

    pub(crate) fn settle_all(&mut self, messages: u64) {
        for stream in 0..self.lanes.len() {
            self.settle(stream);
        }
        self.state.count_down(messages);
    }

    /// Refused for good: goes to the dead letters with the reason, durably, and is acknowledged.
    pub fn dead_letter(&mut self, entry: &Entry, reason: &str) {
        if !entry.notice {
            self.log
                .batch()
                .changes()
                .dead
                .push(dead_row(&self.state.name, entry, reason));
        }
        self.acknowledge(entry.position);
    }

    /// The read position goes back to the cursor: the next `next` gives everything unacknowledged again, in order.
    pub fn rewind(&mut self) {
        self.lanes = (0..self.state.cursors.len())
            .map(|stream| {
                self.state.holds(stream as u16, None);
                Lane {
                    read: self.state.done(stream as u16),
                    ..Lane::default()
                }
            })
            .collect();
        self.notices.clear();
        self.losses_seen = 0;
    }

    pub fn backlog(&self) -> Backlog {
        let (messages, bytes) = self.state.queued();
        let oldest = self
            .lanes
            .iter()
            .filter_map(|l| l.open.front())
            .map(|o| o.received)
            .min();
        Backlog {
            messages,
            bytes,
            oldest,
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        for stream in 0..self.state.cursors.len() {
            self.state.holds(stream as u16, None);
        }
    }
}

enum Filled {
    More,
    End,
    Blocked,
}

pub(crate) fn dead_row(consumer: &str, entry: &Entry, reason: &str) -> DeadRow {
    DeadRow {
        consumer: consumer.to_owned(),
        reason: reason.to_owned(),
        at: clock::wall().millis(),
        record: record::encode_one(&entry.message),
    }
}

fn damaged(consumer: &str, first: u64, last: u64, count: u64, bytes: u64, oldest: i64, newest: i64) -> LossRow {
    LossRow {
        id: 0,
        consumer: consumer.to_owned(),
        source: "(unknown)".into(),
        reason: "damaged".into(),
        first,
        last,
        count,
        bytes,
        oldest,
        newest,
        at: clock::wall().millis(),
    }
}

/// What tells the remote of a gap: one entry of the ledger as JSON. An entry may grow while it is being sent; it then
/// comes again under the same `id`, with the whole count.
pub(crate) fn notice(log_id: &str, row: &LossRow, now: Timestamp) -> Message {
    let text = serde_json::json!({
        "id": format!("{log_id}-{}", row.id),
        "consumer": row.consumer,
        "source": row.source,
        "reason": row.reason,
        "count": row.count,
        "bytes": row.bytes,
        "first": row.first,
        "last": row.last,
        "oldest": Timestamp::from_millis(row.oldest).to_string(),
        "newest": Timestamp::from_millis(row.newest).to_string(),
        "declared": Timestamp::from_millis(row.at).to_string(),
    })
    .to_string();
    let name = row.consumer.replace([':', '+', '#', '\0'], "/");
    let topic =
        Topic::new(format!("status/loss/{name}")).unwrap_or_else(|_| Topic::new("status/loss").expect("a plain topic"));
    Message::new(topic, text, "gateway".into(), now)
}
