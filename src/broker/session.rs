//! What the broker keeps for a client: subscriptions, packet ids in both directions, what is in flight. Pure.
//!
//! A durable session (MQTT 5: session expiry above 0; 3.1.1: clean session 0) is a consumer of the log: its messages
//! at QoS 1 and 2 are not queued here but read from the log as its window allows. Each stream is a [`Lane`]: what is in
//! flight, in order of sequence, and how far was read. A session that ends with its connection has a bounded queue.

use std::collections::{HashMap, HashSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

use bytestring::ByteString;
use smallvec::SmallVec;

use super::core::GroupId;
use crate::clock::{Instant, Timestamp};
use crate::log::ConsumerState;
use crate::log::changes::SubscriptionRow;
use crate::message::{Message, Qos, Source, Topic, TopicFilter};

/// Messages in flight to one client, whatever more it would take.
pub const WINDOW_MAX: u16 = 100;
/// Packet ids kept for one client: those of QoS 2 messages that it took before an older one are kept until it takes that.
const SLOTS_MAX: usize = 10_000;
/// What waits in memory for a client whose session ends with its connection; beyond it, declared lost.
pub const QUEUE_MESSAGES_MAX: usize = 10_000;
pub const QUEUE_BYTES_MAX: usize = 1 << 20;

/// A subscription as the session keeps it; the router has what it needs of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// That of a shared subscription without its group.
    pub filter: TopicFilter,
    pub qos: Qos,
    pub no_local: bool,
    pub retain_as_published: bool,
    pub identifier: Option<u32>,
    /// It counts for messages after this sequence.
    pub since: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its packet id is not on disk yet (QoS 2), or one before it is not: it is sent after that commit.
    Claimed,
    Sent,
    /// QoS 2: PUBREC came; what is owed is PUBREL.
    Received,
    Done,
}

/// A message of the log in flight.
#[derive(Debug)]
pub struct Open {
    pub sequence: u64,
    pub bytes: u64,
    pub id: u16,
    pub qos: Qos,
    pub state: State,
    /// As it was sent, with what goes along with it; None: sent before a start.
    pub form: Option<Form>,
}

/// What a PUBLISH has of its subscriptions: it is sent again as it was, whatever becomes of them.
#[derive(Debug, Clone)]
pub struct Form {
    pub retain_as_published: bool,
    pub identifiers: SmallVec<[u32; 1]>,
}

#[derive(Debug, Default)]
pub struct Lane {
    /// Everything up to here was sent, or is not for this session.
    pub read: u64,
    pub open: VecDeque<Open>,
    /// There is more between `read` and the end of the stream than the window took.
    pub behind: bool,
    /// How many of `open` are claimed.
    pub claimed: usize,
    /// A read from disk is under way.
    pub reading: bool,
}

impl Lane {
    pub fn find(&mut self, sequence: u64) -> Option<&mut Open> {
        let index = self.open.binary_search_by_key(&sequence, |o| o.sequence).ok()?;
        self.open.get_mut(index)
    }

    /// Takes what is done off the front.
    pub fn settle(&mut self) -> Settled {
        let mut settled = Settled::default();
        while self.open.front().is_some_and(|o| o.state == State::Done) {
            let Some(open) = self.open.pop_front() else { break };
            settled.bytes += open.bytes;
            settled.messages += 1;
            if open.qos == Qos::ExactlyOnce {
                settled.released.push(open.id);
            }
        }
        settled.done = self.open.front().map_or(self.read, |o| o.sequence - 1);
        settled
    }
}

/// What left the front of a lane.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Settled {
    pub messages: u64,
    pub bytes: u64,
    /// Up to here everything is done.
    pub done: u64,
    /// QoS 2 ids that are free now: each was kept until the cursor could pass its message, since a crash would
    /// otherwise deliver it a second time.
    pub released: SmallVec<[u16; 2]>,
}

/// A message that is not of the log: to a session without durability, or a retained one.
#[derive(Debug, Clone)]
pub struct Queued {
    pub message: Rc<Message>,
    pub qos: Qos,
    pub retain: bool,
    pub identifiers: SmallVec<[u32; 1]>,
}

/// What a packet id in flight stands for.
#[derive(Debug)]
pub enum Slot {
    Log { stream: u16, sequence: u64 },
    Memory { queued: Queued, state: State, nth: u64 },
    Shared(Box<Held>),
}

/// A message of a shared subscription that this client was chosen for.
#[derive(Debug)]
pub struct Held {
    pub group: GroupId,
    pub stream: u16,
    pub sequence: u64,
    pub qos: Qos,
    pub state: State,
    pub retain: bool,
    pub identifiers: SmallVec<[u32; 1]>,
    /// None once it is done with, and after a start until it was read from the log.
    pub message: Option<Rc<Message>>,
    /// As [`Session::count_sent`] gave it.
    pub nth: u64,
}

impl Held {
    pub fn queued(&self) -> Option<Queued> {
        Some(Queued {
            message: Rc::clone(self.message.as_ref()?),
            qos: self.qos,
            retain: self.retain,
            identifiers: self.identifiers.clone(),
        })
    }
}

/// A subscription's way through the retained messages.
#[derive(Debug)]
pub struct RetainedWanted {
    pub filter: TopicFilter,
    /// What every topic that matches begins with.
    pub literal: String,
    pub qos: Qos,
    pub identifiers: SmallVec<[u32; 1]>,
    /// Up to here they were looked at.
    pub after: Option<Topic>,
}

#[derive(Debug)]
pub struct Session {
    pub client_id: ByteString,
    pub source: Source,
    pub user: Option<String>,
    pub expiry_s: u32,
    /// None while connected.
    pub disconnected: Option<(Instant, Timestamp)>,
    pub subscriptions: HashMap<ByteString, Kept>,
    /// Every subscription counts for messages after this sequence.
    pub newest_since: u64,
    pub consumer: Option<Arc<ConsumerState>>,
    pub lanes: Vec<Lane>,
    /// Inbound QoS 2 ids between PUBLISH and PUBREL.
    pub inbound: HashSet<u16>,
    pub slots: HashMap<u16, Slot>,
    /// How many of `slots` are done and kept for their id alone.
    pub ended: usize,
    /// Those of `slots` that an earlier connection was sent and this one was not yet: they take no part of its window.
    pub again: HashSet<u16>,
    /// Those of `again` that are not read from the log, in the order in which they were sent.
    pub again_in_order: VecDeque<u16>,
    sent: u64,
    /// The groups of its shared subscriptions.
    pub groups: SmallVec<[GroupId; 1]>,
    pub queue: VecDeque<Queued>,
    pub queue_bytes: usize,
    /// While it has more waiting than may: where its cursors stood, and since when.
    pub stuck: Option<(u64, Instant)>,
    /// What may wait for it, by the limits of its user (`u64::MAX`: no such limit).
    pub queued_bytes_max: u64,
    /// Subscriptions whose retained messages are still to be sent.
    pub retained: VecDeque<RetainedWanted>,
    next_id: u16,
}

impl Session {
    pub fn new(client_id: ByteString, user: Option<String>, expiry_s: u32) -> Session {
        Session {
            source: format!("client:{client_id}").into(),
            client_id,
            user,
            expiry_s,
            disconnected: None,
            subscriptions: HashMap::new(),
            newest_since: 0,
            consumer: None,
            lanes: Vec::new(),
            inbound: HashSet::new(),
            slots: HashMap::new(),
            ended: 0,
            again: HashSet::new(),
            again_in_order: VecDeque::new(),
            sent: 0,
            groups: SmallVec::new(),
            queue: VecDeque::new(),
            queue_bytes: 0,
            stuck: None,
            queued_bytes_max: u64::MAX,
            retained: VecDeque::new(),
            next_id: 0,
        }
    }

    /// A packet id that is not in use; None where all are (never with a bounded window).
    pub fn take_id(&mut self) -> Option<u16> {
        for _ in 0..=u16::MAX {
            self.next_id = self.next_id.wrapping_add(1);
            if self.next_id != 0 && !self.slots.contains_key(&self.next_id) {
                return Some(self.next_id);
            }
        }
        None
    }

    pub fn in_flight(&self) -> usize {
        self.slots.len() - self.ended - self.again.len()
    }

    /// A number above that of every message that was sent before.
    pub fn count_sent(&mut self) -> u64 {
        self.sent += 1;
        self.sent
    }

    /// What the id stood for is over.
    pub fn forget(&mut self, packet_id: u16) -> Option<Slot> {
        self.again.remove(&packet_id);
        self.slots.remove(&packet_id)
    }

    /// A new connection: what was in flight is to be sent again, as its window allows (MQTT 5, 4.4). Returns the ids whose
    /// PUBREL is to be sent again, except those of the log.
    pub fn begin_again(&mut self) -> Vec<u16> {
        let mut releases = Vec::new();
        let mut in_order = Vec::new();
        self.again.clear();
        for (packet_id, slot) in &self.slots {
            let (state, nth) = match slot {
                Slot::Log { stream, sequence } => {
                    let lane = &self.lanes[usize::from(*stream)];
                    let open = lane.open.binary_search_by_key(sequence, |o| o.sequence);
                    if open.is_ok_and(|at| matches!(lane.open[at].state, State::Sent | State::Received)) {
                        self.again.insert(*packet_id);
                    }
                    continue;
                }
                Slot::Memory { state, nth, .. } => (*state, *nth),
                // Known by its id alone since a start: reading the log brings the rest of it, and sends it.
                Slot::Shared(held) if held.state == State::Sent && held.message.is_none() => continue,
                Slot::Shared(held) => (held.state, held.nth),
            };
            match state {
                State::Sent => {
                    self.again.insert(*packet_id);
                    in_order.push((nth, *packet_id));
                }
                State::Received => releases.push((nth, *packet_id)),
                // Its commit sends it; what is done is done.
                State::Claimed | State::Done => {}
            }
        }
        in_order.sort_unstable();
        releases.sort_unstable();
        self.again_in_order = in_order.into_iter().map(|(_, id)| id).collect();
        releases.into_iter().map(|(_, id)| id).collect()
    }

    /// More ids are kept than any client needs that acknowledges in order.
    pub fn is_out_of_ids(&self) -> bool {
        self.slots.len() >= SLOTS_MAX
    }

    /// False where it does not fit: the message is lost to this session, and is declared so.
    pub fn enqueue(&mut self, queued: Queued) -> bool {
        let bytes = queued.message.size_bytes();
        let bytes_max = usize::try_from(self.queued_bytes_max)
            .unwrap_or(usize::MAX)
            .min(QUEUE_BYTES_MAX);
        if self.queue.len() >= QUEUE_MESSAGES_MAX || self.queue_bytes + bytes > bytes_max && !self.queue.is_empty() {
            return false;
        }
        self.queue_bytes += bytes;
        self.queue.push_back(queued);
        true
    }

    pub fn dequeue(&mut self) -> Option<Queued> {
        let queued = self.queue.pop_front()?;
        self.queue_bytes -= queued.message.size_bytes();
        if self.queue.is_empty() {
            self.queue.shrink_to(16);
        }
        Some(queued)
    }

    /// Another limit to what may wait; the log drops by it for a durable session.
    pub fn limit_queue(&mut self, bytes_max: Option<u64>) {
        self.queued_bytes_max = bytes_max.unwrap_or(u64::MAX);
        if let Some(consumer) = &self.consumer {
            consumer.limit(bytes_max);
        }
    }

    /// More waits in the log for it than may, without what is in flight.
    pub fn is_over_limit(&self) -> bool {
        if self.queued_bytes_max == u64::MAX {
            return false;
        }
        let queued = self.consumer.as_ref().map_or(0, |c| c.queued().1);
        let open = self
            .lanes
            .iter()
            .flat_map(|lane| &lane.open)
            .filter(|o| o.state != State::Done);
        let in_flight: u64 = open.map(|o| o.bytes).sum();
        queued.saturating_sub(in_flight) > self.queued_bytes_max
    }

    /// True where the session has ended for lack of its client.
    pub fn is_over(&self, now: Instant) -> bool {
        match self.disconnected {
            Some((since, _)) => {
                self.expiry_s != u32::MAX && now.saturating_duration_since(since).as_secs() >= u64::from(self.expiry_s)
            }
            None => false,
        }
    }

    pub fn subscription_rows(&self) -> Vec<SubscriptionRow> {
        self.subscriptions
            .iter()
            .map(|(filter, k)| SubscriptionRow {
                filter: filter.to_string(),
                qos: k.qos as u8,
                no_local: k.no_local,
                retain_as_published: k.retain_as_published,
                identifier: k.identifier,
                since: k.since,
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_go_round_and_pass_over_those_in_use() {
        let mut s = Session::new("c".into(), None, 0);
        s.slots.insert(2, Slot::Log { stream: 0, sequence: 1 });
        assert_eq!((s.take_id(), s.take_id()), (Some(1), Some(3)));
        s.next_id = u16::MAX;
        assert_eq!(s.take_id(), Some(1), "0 is no packet id");
        for id in 1..=u16::MAX {
            s.slots.insert(id, Slot::Log { stream: 0, sequence: 1 });
        }
        assert_eq!(s.take_id(), None);
    }

    #[test]
    fn the_cursor_stands_before_the_first_open_message() {
        let mut lane = Lane {
            read: 30,
            ..Lane::default()
        };
        for sequence in [10, 20, 30] {
            lane.open.push_back(Open {
                sequence,
                bytes: 5,
                id: 1,
                qos: Qos::AtLeastOnce,
                state: State::Sent,
                form: None,
            });
        }
        let settled = |lane: &mut Lane| {
            let s = lane.settle();
            (s.messages, s.bytes, s.done)
        };
        lane.find(20).expect("open").state = State::Done;
        assert_eq!(settled(&mut lane), (0, 0, 9), "an earlier one is open");
        lane.find(10).expect("open").state = State::Done;
        assert_eq!(settled(&mut lane), (2, 10, 29));
        lane.find(30).expect("open").state = State::Done;
        assert_eq!(settled(&mut lane), (1, 5, 30));
    }
}
