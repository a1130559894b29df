//! Shared subscriptions (MQTT 5, 4.8.2): each message goes to one member of the group.
//!
//! A group is `$share/NAME/FILTER` and a consumer of the log from its first member at QoS 1 or 2 on, whether or not the
//! sessions of its members are durable: what was acknowledged to a publisher waits for whichever member has room, also
//! while all are away, and ends with the group's last subscription. Promises:
//! - in turn among the members that are connected, have room and may receive the topic; what no such member takes waits;
//! - at QoS 1, what a member has not acknowledged when its connection ends is given to another as soon as one has room,
//!   or to the same one, under the same packet id, where it is back first (4.8.2 lets us choose);
//! - at QoS 2 it waits for the member that it was sent to [MQTT-4.8.2-4]; where that member's session ends, it is given
//!   to nobody [MQTT-4.8.2-5] and declared lost, since nobody can say whether it arrived;
//! - PUBACK or PUBREC with an error is the end of the message [MQTT-4.8.2-6].
//!
//! Messages are given out in the order of the log; what comes back goes to its place in what waits. More than one
//! member, or one that comes back, may see a topic out of order: no order is promised through a shared subscription.
//!
//! Bounds: [`WAITING_MAX`] and [`WAITING_BYTES_MAX`] read ahead a group, the members' windows, [`AHEAD_MAX`] QoS 2 ids.

use std::collections::BTreeMap;

use super::*;
use crate::broker::session::Held;

/// A group's number, never given twice between two starts.
pub type GroupId = u32;

/// Read from the log and not yet given out.
const WAITING_MAX: usize = 256;
const WAITING_BYTES_MAX: usize = 256 << 10;
/// QoS 2 messages that were completed before an older one; beyond it the oldest id is forgotten, and a crash before the
/// older one is done may deliver that message again.
const AHEAD_MAX: usize = 1_000;
/// Between the oldest message that a member keeps and the newest; beyond it the older ones are not kept from a limit.
const HELD_SPAN_MAX: u64 = 65_536;

pub(super) struct Group {
    /// As subscribed.
    text: ByteString,
    filter: TopicFilter,
    /// From the first member at QoS 1 or 2 on; before, messages are only delivered live.
    consumer: Option<Arc<ConsumerState>>,
    members: Vec<Member>,
    /// Whose turn it is.
    turn: usize,
    lanes: Vec<GroupLane>,
    waiting: VecDeque<Waits>,
    waiting_bytes: usize,
    /// QoS 2 messages that are done while an older one is open: whose id stands for it.
    ahead: BTreeMap<(u16, u64), (SessionId, u16)>,
    is_due: bool,
}

struct Member {
    session: SessionId,
    qos: Qos,
    retain_as_published: bool,
    identifier: Option<u32>,
}

/// One stream as the group sees it.
#[derive(Default)]
struct GroupLane {
    /// Everything up to here was looked at.
    read: u64,
    /// Everything up to here was looked at once: of it only what is in `open` is not done.
    high: u64,
    open: BTreeMap<u64, OpenShared>,
    behind: bool,
    reading: bool,
    /// The commit that brings the newest message for it.
    expects: u64,
    /// Not for anybody, and not read since the start: sent at QoS 2 before a crash to sessions that ended with it, or
    /// completed by now.
    given_up: Vec<u64>,
}

struct OpenShared {
    bytes: u64,
    /// Who has it, under which packet id.
    holder: Option<(SessionId, u16)>,
}

struct Waits {
    stream: u16,
    message: Rc<Message>,
}

/// The filter of a shared subscription; None: the text is none. What begins with `$share/` must be one [MQTT-4.8.2-1, -2].
pub(super) fn shared_filter(text: &str) -> Option<Result<TopicFilter, TopicError>> {
    let rest = text.strip_prefix("$share/")?;
    Some(match rest.split_once('/') {
        Some((name, filter)) if !name.is_empty() && !name.contains(['+', '#']) => {
            TopicFilter::new(ByteString::from(filter))
        }
        _ => Err(TopicError::BadShare),
    })
}

pub(super) fn is_shared(text: &str) -> bool {
    text.starts_with("$share/")
}

fn consumer_name(text: &str) -> String {
    format!("share:{}", text.trim_start_matches("$share/"))
}

fn declare(name: &str, message: &Message, why: &str, now: Timestamp, batch: &mut Batch<'_>) {
    let mut row = loss(name, &message.source, why, message.size_bytes() as u64, now);
    (row.first, row.last) = (message.sequence.0, message.sequence.0);
    batch.changes().losses.push(row);
}

/// What became of a message that was to be given out.
enum Placed {
    With(SessionId, u16),
    Done,
    /// Only members that are away or busy may have it.
    Later,
    /// Nobody takes anything now.
    NoRoom,
}

impl Group {
    fn forget_waiting(&mut self, stream: u16, sequence: u64) {
        if let Some(at) = self
            .place_of(stream, sequence)
            .ok()
            .filter(|at| *at < self.waiting.len())
        {
            self.take_waiting(at);
        }
    }

    fn take_waiting(&mut self, at: usize) {
        if let Some(waits) = self.waiting.remove(at) {
            self.waiting_bytes -= waits.message.size_bytes();
        }
    }

    /// Where it waits, or where it would have to.
    fn place_of(&self, stream: u16, sequence: u64) -> Result<usize, usize> {
        for (at, waits) in self.waiting.iter().enumerate() {
            if waits.stream == stream && waits.message.sequence.0 >= sequence {
                return if waits.message.sequence.0 == sequence {
                    Ok(at)
                } else {
                    Err(at)
                };
            }
        }
        Err(self.waiting.len())
    }

    /// Puts it to its place in what waits.
    fn wait(&mut self, stream: u16, message: Rc<Message>) {
        if let Err(at) = self.place_of(stream, message.sequence.0) {
            self.waiting_bytes += message.size_bytes();
            self.waiting.insert(at, Waits { stream, message });
        }
    }

    fn is_full(&self) -> bool {
        self.waiting.len() >= WAITING_MAX || self.waiting_bytes >= WAITING_BYTES_MAX
    }

    /// Up to where everything of a stream is done. What is not read yet is not, whatever is open behind it.
    fn cursor(&self, stream: u16) -> u64 {
        let lane = &self.lanes[usize::from(stream)];
        lane.open.keys().next().map_or(lane.read, |s| (s - 1).min(lane.read))
    }
}

impl Core {
    /// One more member, or other options of one. True where it was a member.
    pub(super) fn join_group(
        &mut self,
        id: SessionId,
        text: &ByteString,
        filter: &TopicFilter,
        kept: &Kept,
        batch: &mut Batch<'_>,
    ) -> bool {
        let found = self.group_names.get(text).copied();
        let group_id = found.unwrap_or_else(|| {
            self.next_group += 1;
            let group = Group {
                text: text.clone(),
                filter: filter.clone(),
                consumer: None,
                members: Vec::new(),
                turn: 0,
                lanes: Vec::new(),
                waiting: VecDeque::new(),
                waiting_bytes: 0,
                ahead: BTreeMap::new(),
                is_due: false,
            };
            self.groups.insert(self.next_group, group);
            self.group_names.insert(text.clone(), self.next_group);
            self.router.add_group(filter, self.next_group);
            self.next_group
        });
        let log = self.log.clone();
        let group = self.groups.get_mut(&group_id).expect("found or just made");
        if kept.qos > Qos::AtMostOnce && group.consumer.is_none() {
            let consumer = log.consumer(batch, &consumer_name(text), std::slice::from_ref(filter));
            group.lanes = (0..log.stream_places())
                .map(|stream| {
                    let done = consumer.done(stream as u16);
                    GroupLane {
                        read: done,
                        high: done,
                        behind: true,
                        ..GroupLane::default()
                    }
                })
                .collect();
            group.consumer = Some(consumer);
        }
        let member = Member {
            session: id,
            qos: kept.qos,
            retain_as_published: kept.retain_as_published,
            identifier: kept.identifier,
        };
        let was = match group.members.iter_mut().find(|m| m.session == id) {
            Some(old) => {
                *old = member;
                true
            }
            None => {
                group.members.push(member);
                false
            }
        };
        if !was {
            self.client(id).session.groups.push(group_id);
        }
        was
    }

    /// The member has unsubscribed or its session ends. What it has in its hands stays with it; the group ends with its
    /// last member, and what waited for it is given up.
    pub(super) fn leave_group(&mut self, id: SessionId, text: &str, batch: &mut Batch<'_>) {
        let Some(group_id) = self.group_names.get(text).copied() else {
            return;
        };
        if let Some(client) = self.get(id) {
            client.session.groups.retain(|g| *g != group_id);
        }
        let group = self.groups.get_mut(&group_id).expect("just found");
        if let Some(at) = group.members.iter().position(|m| m.session == id) {
            group.members.remove(at);
            group.turn -= usize::from(at < group.turn);
        }
        if !group.members.is_empty() {
            return;
        }
        let group = self.groups.remove(&group_id).expect("just found");
        self.group_names.remove(&group.text);
        self.router.remove_group(&group.filter, group_id);
        for ((stream, _), (session, packet_id)) in group.ahead {
            self.release(session, packet_id, group_id, stream, batch);
        }
        if let Some(consumer) = group.consumer {
            self.log.remove_consumer(batch, consumer.id());
        }
    }

    /// At the start: groups that no session came back for have ended with the sessions that they were of.
    pub(super) fn end_orphaned_groups(&mut self) {
        let log = self.log.clone();
        let kept: Vec<i64> = self
            .groups
            .values()
            .filter_map(|g| g.consumer.as_ref().map(|c| c.id()))
            .collect();
        for consumer in log.consumers() {
            if consumer.name().starts_with("share:") && !kept.contains(&consumer.id()) {
                log.remove_consumer(&mut log.batch(), consumer.id());
            }
        }
    }

    /// A QoS 2 message of a group whose id was spent before the start.
    pub(super) fn restore_shared(&mut self, row: &OutboundRow, consumer_id: i64) {
        let log = self.log.clone();
        let found = self
            .groups
            .iter()
            .find(|(_, g)| g.consumer.as_ref().is_some_and(|c| c.id() == consumer_id));
        let group_id = found.map(|(id, _)| *id);
        let session = self.by_id.get(row.client_id.as_str()).copied();
        let is_owed = group_id.is_some_and(|g| row.sequence > self.groups[&g].lanes[usize::from(row.stream)].read);
        if session.is_none() || !is_owed && !row.received {
            // Its session ended with the connection, or its group is gone: there is nobody to complete it with.
            let key = (row.client_id.clone(), row.packet_id);
            log.batch().changes().outbound.insert(key, None);
        }
        if let (Some(group_id), true) = (group_id, is_owed) {
            let group = self.groups.get_mut(&group_id).expect("just found");
            let lane = &mut group.lanes[usize::from(row.stream)];
            match session {
                Some(id) => {
                    let holder = Some((id, row.packet_id));
                    lane.open.insert(row.sequence, OpenShared { bytes: 0, holder });
                }
                None => {
                    lane.given_up.push(row.sequence);
                    if !row.received {
                        let source = "(unknown)".into();
                        let mut lost = loss(&consumer_name(&group.text), &source, "session ended", 0, clock::wall());
                        (lost.first, lost.last) = (row.sequence, row.sequence);
                        log.batch().changes().losses.push(lost);
                    }
                }
            }
        }
        if let Some(client) = session.and_then(|id| self.get(id))
            && (is_owed || row.received)
        {
            let held = Held {
                group: group_id.unwrap_or_default(),
                stream: row.stream,
                sequence: row.sequence,
                qos: Qos::ExactlyOnce,
                state: if row.received { State::Received } else { State::Sent },
                retain: false,
                identifiers: SmallVec::new(),
                message: None,
                nth: 0,
            };
            client.session.slots.insert(row.packet_id, Slot::Shared(Box::new(held)));
        }
    }

    // -- A message comes in.

    /// Whether some group of the route keeps it in the log.
    pub(super) fn is_shared_durably(&self, route: &Route) -> bool {
        route.groups.iter().any(|id| self.is_durable_group(*id))
    }

    pub(super) fn group_consumer(&self, id: GroupId) -> Option<String> {
        Some(self.groups.get(&id)?.consumer.as_ref()?.name().to_owned())
    }

    fn is_durable_group(&self, id: GroupId) -> bool {
        self.groups.get(&id).is_some_and(|g| g.consumer.is_some())
    }

    /// The message was appended: the groups look for it after its commit.
    pub(super) fn owe_groups(
        &mut self,
        route: &Route,
        stream: u16,
        sequence: crate::message::Sequence,
        bytes: usize,
        batch: &mut Batch<'_>,
    ) {
        let ticket = batch.ticket();
        for id in &route.groups {
            let Some(group) = self.groups.get_mut(id) else { continue };
            let Some(consumer) = &group.consumer else { continue };
            consumer.matched(stream, sequence, bytes);
            let lane = &mut group.lanes[usize::from(stream)];
            if lane.expects != ticket {
                lane.expects = ticket;
                self.waiting.push_back((ticket, Waiting::Group { id: *id, stream }));
            }
        }
    }

    pub(super) fn group_has_more(&mut self, id: GroupId, stream: u16) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        group.lanes[usize::from(stream)].behind = true;
        if !std::mem::replace(&mut group.is_due, true) {
            self.groups_due.push(id);
        }
    }

    /// QoS 0, or a group whose members all are: to one that is here, in turn.
    pub(super) fn share_live(&mut self, route: &Rc<Route>, message: &Message, now: Timestamp) {
        for id in &route.groups {
            let Some(group) = self.groups.get(id) else { continue };
            if message.qos > Qos::AtMostOnce && group.consumer.is_some() {
                continue;
            }
            let count = group.members.len();
            let mut is_somebody_here = false;
            let mut given = None;
            for nth in 0..count {
                let at = (group.turn + nth) % count;
                let member = &group.members[at];
                let Some(client) = self.clients.get(member.session as usize).and_then(Option::as_ref) else {
                    continue;
                };
                let Some(conn) = &client.conn else { continue };
                if !client.rules.may_receive(message.topic.as_str()) {
                    continue;
                }
                is_somebody_here = true;
                if conn.out.borrow().len() > OUT_BYTES_MAX {
                    continue;
                }
                let frame = encode(conn, message, Qos::AtMostOnce, &member.recipient(), now);
                if frame.bytes() <= conn.wire.borrow().out_bytes_max() {
                    write(conn, &frame, message.topic.as_str(), 0, false);
                    given = Some((at, Rc::clone(conn)));
                    break;
                }
            }
            match given {
                Some((at, conn)) => {
                    self.groups.get_mut(id).expect("just seen").turn = (at + 1) % count;
                    self.counters.delivered.bump(1);
                    self.counters.delivered_bytes.bump(message.payload.len() as u64);
                    self.touch(&conn);
                }
                None if is_somebody_here => self.counters.dropped.bump(1),
                None => {}
            }
        }
    }

    // -- The log gives, members take.

    /// After a commit: groups that it brought something for, or that a limit kept from reading.
    pub(super) fn pump_due_groups(&mut self, batch: &mut Batch<'_>) {
        for id in std::mem::take(&mut self.groups_due) {
            if let Some(group) = self.groups.get_mut(&id) {
                group.is_due = false;
                self.pump_group(id, batch);
            }
        }
    }

    /// A member can take more.
    pub(super) fn pump_groups_of(&mut self, id: SessionId, batch: &mut Batch<'_>) {
        let Some(client) = self.get(id) else { return };
        for group in client.session.groups.clone() {
            self.pump_group(group, batch);
        }
    }

    fn pump_group(&mut self, id: GroupId, batch: &mut Batch<'_>) {
        if !self.is_anybody_here(id) || !self.is_durable_group(id) {
            return;
        }
        loop {
            if !self.give_out(id, batch) || self.groups.get(&id).is_none_or(Group::is_full) {
                return;
            }
            let lanes = self.groups[&id].lanes.len();
            let mut has_more = false;
            for stream in 0..lanes {
                has_more |= self.refill(id, stream as u16, batch);
            }
            if !has_more {
                return;
            }
        }
    }

    fn is_anybody_here(&self, id: GroupId) -> bool {
        self.groups.get(&id).is_some_and(|g| {
            g.members.iter().any(|m| {
                self.clients[m.session as usize]
                    .as_ref()
                    .is_some_and(|c| c.conn.is_some())
            })
        })
    }

    /// Gives out what waits, in order, as far as there is room. False where nobody has any.
    fn give_out(&mut self, id: GroupId, batch: &mut Batch<'_>) -> bool {
        let mut at = 0;
        loop {
            let Some(group) = self.groups.get(&id) else {
                return false;
            };
            let Some(waits) = group.waiting.get(at) else {
                return true;
            };
            let (stream, message) = (waits.stream, Rc::clone(&waits.message));
            let placed = self.place(id, stream, &message, batch);
            let group = self.groups.get_mut(&id).expect("placing ends no group");
            let sequence = message.sequence.0;
            match placed {
                Placed::NoRoom => return false,
                Placed::Later => at += 1,
                Placed::With(session, packet_id) => {
                    group.take_waiting(at);
                    let open = group.lanes[usize::from(stream)].open.get_mut(&sequence);
                    let before = open.and_then(|o| o.holder.replace((session, packet_id)));
                    if let Some((old, packet_id)) = before {
                        self.take_from(old, packet_id, id, sequence);
                    }
                }
                Placed::Done => {
                    group.take_waiting(at);
                    let open = group.lanes[usize::from(stream)].open.get_mut(&sequence);
                    let before = open.and_then(|o| o.holder.take());
                    if let Some((old, packet_id)) = before {
                        self.take_from(old, packet_id, id, sequence);
                    }
                    self.settle_group(id, stream, sequence, batch);
                }
            }
        }
    }

    /// Another member has what this one, that is away, was sent at QoS 1.
    fn take_from(&mut self, session: SessionId, packet_id: u16, group: GroupId, sequence: u64) {
        if let Some(client) = self.get(session)
            && matches!(client.session.slots.get(&packet_id), Some(Slot::Shared(h)) if h.group == group && h.sequence == sequence)
        {
            client.session.forget(packet_id);
        }
    }

    fn place(&mut self, id: GroupId, stream: u16, message: &Rc<Message>, batch: &mut Batch<'_>) -> Placed {
        let now = clock::wall();
        let group = &self.groups[&id];
        let name = consumer_name(&group.text);
        let topic = message.topic.as_str();
        if message.is_expired(now) {
            declare(&name, message, "expired", now, batch);
            return Placed::Done;
        }
        let count = group.members.len();
        let (mut may_anybody, mut has_anybody_room, mut is_too_large) = (false, false, false);
        for nth in 0..count {
            let at = (group.turn + nth) % count;
            let member = &group.members[at];
            let Some(client) = self.clients[member.session as usize].as_ref() else {
                continue;
            };
            let may = client.rules.may_receive(topic);
            may_anybody |= may;
            let Some(conn) = client.conn.clone().filter(|c| has_room(&client.session, c)) else {
                continue;
            };
            has_anybody_room = true;
            if !may {
                continue;
            }
            let qos = message.qos.min(member.qos);
            let recipient = member.recipient();
            let frame = encode(&conn, message, qos, &recipient, now);
            if frame.bytes() > conn.wire.borrow().out_bytes_max() {
                is_too_large = true;
                continue;
            }
            let session = member.session;
            self.groups.get_mut(&id).expect("just looked").turn = (at + 1) % count;
            self.counters.delivered.bump(1);
            self.counters.delivered_bytes.bump(message.payload.len() as u64);
            if qos == Qos::AtMostOnce {
                write(&conn, &frame, topic, 0, false);
                self.touch(&conn);
                return Placed::Done;
            }
            let packet_id = self
                .client(session)
                .session
                .take_id()
                .expect("the window is far below the ids");
            let mut held = Held {
                group: id,
                stream,
                sequence: message.sequence.0,
                qos,
                state: State::Sent,
                retain: message.retain && recipient.retain_as_published,
                identifiers: recipient.identifiers,
                message: Some(Rc::clone(message)),
                nth: self.client(session).session.count_sent(),
            };
            if qos == Qos::AtLeastOnce {
                write(&conn, &frame, topic, packet_id, false);
                self.touch(&conn);
            } else {
                // Its id is on disk before it is sent, also that of a session that ends with its connection: after a
                // crash nobody else may have the message.
                held.state = State::Claimed;
                self.put_outbound(session, packet_id, &held, false, batch);
                let waiting = Waiting::ClaimedShared {
                    session,
                    id: packet_id,
                    group: id,
                    sequence: held.sequence,
                };
                self.waiting.push_back((batch.ticket(), waiting));
            }
            let slots = &mut self.client(session).session.slots;
            slots.insert(packet_id, Slot::Shared(Box::new(held)));
            return Placed::With(session, packet_id);
        }
        if !may_anybody {
            return Placed::Done;
        }
        if is_too_large {
            declare(&name, message, "too large", now, batch);
            return Placed::Done;
        }
        match has_anybody_room {
            true => Placed::Later,
            false => Placed::NoRoom,
        }
    }

    fn put_outbound(&mut self, id: SessionId, packet_id: u16, held: &Held, received: bool, batch: &mut Batch<'_>) {
        let consumer = self.groups.get(&held.group).and_then(|g| g.consumer.as_ref());
        let Some(shared) = consumer.map(|c| c.id()) else { return };
        let client_id = self.client(id).session.client_id.to_string();
        let row = OutboundRow {
            client_id: client_id.clone(),
            packet_id,
            stream: held.stream,
            sequence: held.sequence,
            received,
            shared: Some(shared),
        };
        batch.changes().outbound.insert((client_id, packet_id), Some(row));
    }

    /// Reads on in one stream. True where it looked at something, so that there may be more.
    fn refill(&mut self, id: GroupId, stream: u16, batch: &mut Batch<'_>) -> bool {
        let log = self.log.clone();
        let Some(group) = self.groups.get_mut(&id) else {
            return false;
        };
        let Some(consumer) = group.consumer.clone() else {
            return false;
        };
        let lane = &mut group.lanes[usize::from(stream)];
        if !lane.behind || lane.reading {
            return false;
        }
        let tail = log.tail(stream);
        if lane.read >= tail || !consumer.has_backlog(stream) && lane.open.is_empty() {
            lane.behind = false;
            lane.read = lane.read.max(tail);
            lane.high = lane.high.max(lane.read);
            self.hold_group(id, stream, 0, 0);
            return false;
        }
        let Some(after) = consumer.hold(&log, stream, lane.read) else {
            self.group_has_more(id, stream);
            return false;
        };
        if after > lane.read {
            // A limit dropped what lies between, declared.
            lane.read = after;
            lane.high = lane.high.max(after);
            lane.open = lane.open.split_off(&(after + 1));
            group
                .waiting
                .retain(|w| w.stream != stream || w.message.sequence.0 > after);
            group.waiting_bytes = group.waiting.iter().map(|w| w.message.size_bytes()).sum();
        }
        match log.segment_in_memory(stream, after) {
            Some(segment) => {
                self.take_segment(id, stream, &segment, batch);
                true
            }
            None => {
                let lane = &mut self.groups.get_mut(&id).expect("just looked").lanes[usize::from(stream)];
                lane.reading = true;
                let filters: Arc<[TopicFilter]> = consumer.filters().iter().map(|(f, _)| f.clone()).collect();
                self.reads.push((Reading::Group(id), stream, after, filters));
                false
            }
        }
    }

    /// A read that `refill` asked for has come back.
    pub(super) fn group_read_ended(&mut self, id: GroupId, stream: u16, after: u64, read: Read, batch: &mut Batch<'_>) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        let name = consumer_name(&group.text);
        let lane = &mut group.lanes[usize::from(stream)];
        if !std::mem::take(&mut lane.reading) || lane.read != after {
            return;
        }
        match read {
            Read::Segment(segment) => self.take_segment(id, stream, &segment, batch),
            Read::Nothing(to) => self.skip_group_to(id, stream, to),
            Read::Damaged(h) => {
                batch.changes().losses.push(damaged(&name, &h));
                self.skip_group_to(id, stream, h.last);
            }
            Read::End => self.skip_group_to(id, stream, after),
        }
        self.pump_group(id, batch);
    }

    fn skip_group_to(&mut self, id: GroupId, stream: u16, to: u64) {
        let tail = self.log.tail(stream);
        let Some(group) = self.groups.get_mut(&id) else { return };
        let lane = &mut group.lanes[usize::from(stream)];
        lane.read = lane.read.max(to);
        lane.high = lane.high.max(lane.read);
        if lane.read >= tail {
            lane.behind = false;
        }
        self.hold_group(id, stream, 0, 0);
    }

    /// Takes what a segment has for the group into what waits, until that is full.
    fn take_segment(&mut self, id: GroupId, stream: u16, segment: &Segment, batch: &mut Batch<'_>) {
        let Some(group) = self.groups.get(&id) else { return };
        let Some(consumer) = group.consumer.clone() else { return };
        let name = consumer_name(&group.text);
        let filters = consumer.filters();
        let after = group.lanes[usize::from(stream)].read;
        let mut records = segment.records();
        loop {
            let message = match records.read() {
                Ok(Some(message)) if message.sequence.0 <= after => continue,
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(_) => {
                    let mut row = loss(&name, &"(unknown)".into(), "damaged", 0, clock::wall());
                    (row.first, row.last, row.count) = (segment.first, segment.last, 0);
                    batch.changes().losses.push(row);
                    break;
                }
            };
            if self.groups[&id].is_full() {
                self.hold_group(id, stream, 0, 0);
                return;
            }
            let sequence = message.sequence.0;
            // QoS 0 has gone live.
            let is_ours = message.qos > Qos::AtMostOnce
                && filters
                    .iter()
                    .any(|(f, since)| sequence > *since && f.matches(message.topic.as_str()));
            if is_ours {
                self.take_message(id, stream, Rc::new(detach(&message)));
            }
            let lane = &mut self.groups.get_mut(&id).expect("taking ends no group").lanes[usize::from(stream)];
            lane.read = sequence;
            lane.high = lane.high.max(sequence);
        }
        self.skip_group_to(id, stream, segment.last);
    }

    fn take_message(&mut self, id: GroupId, stream: u16, message: Rc<Message>) {
        let group = self.groups.get_mut(&id).expect("the caller has just looked");
        let lane = &mut group.lanes[usize::from(stream)];
        let (sequence, bytes) = (message.sequence.0, message.size_bytes() as u64);
        if let Some(at) = lane.given_up.iter().position(|s| *s == sequence) {
            lane.given_up.swap_remove(at);
            self.hold_group(id, stream, 1, bytes);
            return;
        }
        let holder = match lane.open.get_mut(&sequence) {
            // Read before and done since.
            None if sequence <= lane.high => return,
            None => {
                lane.open.insert(sequence, OpenShared { bytes, holder: None });
                None
            }
            Some(open) => {
                open.bytes = bytes;
                open.holder
            }
        };
        let Some((session, packet_id)) = holder else {
            group.wait(stream, message);
            return;
        };
        let Some(client) = self.clients.get_mut(session as usize).and_then(Option::as_mut) else {
            return;
        };
        let conn = client.conn.clone();
        let Some(Slot::Shared(held)) = client.session.slots.get_mut(&packet_id) else {
            return;
        };
        let is_new = held.message.is_none() && held.state == State::Sent;
        if is_new {
            // Known by its id alone since the start: the text of it has come.
            held.message = Some(Rc::clone(&message));
        }
        match (conn, held.qos) {
            (Some(conn), _) if is_new => {
                if let Some(queued) = held.queued() {
                    let frame = encode_queued(&conn, &queued, clock::wall());
                    write(&conn, &frame, message.topic.as_str(), packet_id, true);
                    self.touch(&conn);
                }
            }
            (None, Qos::AtLeastOnce) => group.wait(stream, message),
            _ => {}
        }
    }

    /// The cursor moves as far as it can, and what is open is kept from the limits while somebody is here.
    fn hold_group(&mut self, id: GroupId, stream: u16, messages: u64, bytes: u64) {
        let is_anybody_here = self.is_anybody_here(id);
        let Some(group) = self.groups.get(&id) else { return };
        let Some(consumer) = &group.consumer else { return };
        consumer.advance(stream, group.cursor(stream), messages, bytes);
        let lane = &group.lanes[usize::from(stream)];
        let open = &lane.open;
        if lane.reading {
            // What is being read is in our hands as well.
            let first = open.keys().next().copied().unwrap_or(u64::MAX);
            return consumer.holds(stream, Some((first.min(lane.read + 1), u64::MAX)));
        }
        let ends = open.keys().next().copied().zip(open.keys().next_back().copied());
        let range = ends.filter(|_| is_anybody_here).map(|(first, last)| {
            if last - first <= HELD_SPAN_MAX {
                return (first, last);
            }
            let waiting = group.waiting.iter().find(|w| w.stream == stream);
            (waiting.map_or(last, |w| w.message.sequence.0), last)
        });
        consumer.holds(stream, range);
    }

    // -- A member is done with a message, or gone.

    /// PUBACK, PUBCOMP, or an error in their place [MQTT-4.8.2-6].
    pub(super) fn shared_done(&mut self, id: SessionId, packet_id: u16, batch: &mut Batch<'_>) {
        let session = &mut self.client(id).session;
        let Some(Slot::Shared(held)) = session.slots.get_mut(&packet_id) else {
            return;
        };
        if held.state == State::Done {
            return;
        }
        let (group_id, stream, sequence, qos) = (held.group, held.stream, held.sequence, held.qos);
        held.state = State::Done;
        held.message = None;
        let is_open = self
            .groups
            .get(&group_id)
            .and_then(|g| g.lanes.get(usize::from(stream)))
            .and_then(|l| l.open.get(&sequence))
            .is_some_and(|o| o.holder == Some((id, packet_id)));
        let session = &mut self.client(id).session;
        session.again.remove(&packet_id);
        session.ended += 1;
        if qos == Qos::AtLeastOnce || !is_open {
            self.release(id, packet_id, group_id, stream, batch);
        } else {
            let group = self.groups.get_mut(&group_id).expect("just seen");
            group.ahead.insert((stream, sequence), (id, packet_id));
        }
        if is_open {
            self.settle_group(group_id, stream, sequence, batch);
        }
    }

    /// The message is no longer the group's; ids that waited for the cursor are free.
    fn settle_group(&mut self, id: GroupId, stream: u16, sequence: u64, batch: &mut Batch<'_>) {
        let Some(group) = self.groups.get_mut(&id) else { return };
        let lane = &mut group.lanes[usize::from(stream)];
        let Some(open) = lane.open.remove(&sequence) else {
            return;
        };
        if sequence > lane.high {
            // Known by its id since the start, and not read again yet: it is counted when it is.
            lane.given_up.push(sequence);
            return;
        }
        self.hold_group(id, stream, 1, open.bytes);
        let group = self.groups.get_mut(&id).expect("just seen");
        let cursor = group.cursor(stream);
        let mut released: Vec<((u16, u64), (SessionId, u16))> = group
            .ahead
            .range((stream, 0)..=(stream, cursor))
            .map(|(k, v)| (*k, *v))
            .collect();
        if let Some(consumer) = group.consumer.as_ref().filter(|_| !released.is_empty()) {
            batch.changes().cursors.insert((consumer.id(), stream), cursor);
        }
        if group.ahead.len() - released.len() > AHEAD_MAX {
            let oldest = group.ahead.range((stream, cursor + 1)..).next();
            released.extend(oldest.map(|(k, v)| (*k, *v)));
        }
        for (key, (session, packet_id)) in released {
            if let Some(group) = self.groups.get_mut(&id) {
                group.ahead.remove(&key);
            }
            self.release(session, packet_id, id, stream, batch);
        }
    }

    /// An id that was kept for a message that is done is free.
    fn release(&mut self, id: SessionId, packet_id: u16, group: GroupId, stream: u16, batch: &mut Batch<'_>) {
        let Some(client) = self.get(id) else { return };
        let session = &mut client.session;
        let Some(Slot::Shared(held)) = session.slots.get(&packet_id) else {
            return;
        };
        if held.state != State::Done || held.group != group || held.stream != stream {
            return;
        }
        if held.qos == Qos::ExactlyOnce {
            let key = (session.client_id.to_string(), packet_id);
            batch.changes().outbound.insert(key, None);
        }
        session.forget(packet_id);
        session.ended -= 1;
    }

    /// PUBREC: the member has it; PUBREL follows the commit that says so.
    pub(super) fn shared_received(
        &mut self,
        id: SessionId,
        conn: &Rc<Conn>,
        packet_id: u16,
        code: u8,
        batch: &mut Batch<'_>,
    ) {
        let Some(Slot::Shared(held)) = self.client(id).session.slots.get_mut(&packet_id) else {
            return;
        };
        if held.qos != Qos::ExactlyOnce {
            return;
        }
        if held.state == State::Done {
            conn.wire.borrow_mut().pubrel(&mut conn.out.borrow_mut(), packet_id);
            self.touch(conn);
            return;
        }
        held.state = State::Received;
        held.message = None;
        let now = Held {
            identifiers: SmallVec::new(),
            message: None,
            ..**held
        };
        self.put_outbound(id, packet_id, &now, true, batch);
        if code >= 0x80 {
            self.shared_done(id, packet_id, batch);
            self.pump(id, batch);
            return;
        }
        self.waiting.push_back((
            batch.ticket(),
            Waiting::Release {
                session: id,
                id: packet_id,
            },
        ));
    }

    /// The id of a QoS 2 message is on disk (or its commit failed, and the client is sent away).
    pub(super) fn shared_claimed(&mut self, id: SessionId, packet_id: u16, group: GroupId, sequence: u64, send: bool) {
        let Some(client) = self.get(id) else { return };
        let conn = client.conn.clone();
        let Some(Slot::Shared(held)) = client.session.slots.get_mut(&packet_id) else {
            return;
        };
        if held.group != group || held.sequence != sequence || held.state != State::Claimed {
            return;
        }
        held.state = State::Sent;
        if let (true, Some(conn), Some(queued)) = (send, conn, held.queued()) {
            let frame = encode_queued(&conn, &queued, clock::wall());
            write(&conn, &frame, queued.message.topic.as_str(), packet_id, false);
            self.touch(&conn);
        }
    }

    /// The member is back: what it was sent and nobody else got is its own again.
    pub(super) fn reclaim(&mut self, id: SessionId) {
        let mine = self.shared_slots(id);
        for (_, group, stream, sequence, qos, _) in mine {
            if qos == Qos::AtLeastOnce
                && let Some(group) = self.groups.get_mut(&group)
            {
                group.forget_waiting(stream, sequence);
            }
        }
    }

    #[allow(clippy::type_complexity)] // What the two that use it take apart.
    fn shared_slots(&mut self, id: SessionId) -> Vec<(u16, GroupId, u16, u64, Qos, State)> {
        let slots = &self.client(id).session.slots;
        let shared = slots.iter().filter_map(|(packet_id, slot)| match slot {
            Slot::Shared(h) => Some((*packet_id, h.group, h.stream, h.sequence, h.qos, h.state)),
            Slot::Log { .. } | Slot::Memory { .. } => None,
        });
        shared.collect()
    }

    /// The member's connection has ended and its session lives on.
    pub(super) fn member_away(&mut self, id: SessionId, batch: &mut Batch<'_>) {
        let mut groups = self.client(id).session.groups.clone();
        for (packet_id, group_id, stream, sequence, qos, _) in self.shared_slots(id) {
            if qos != Qos::AtLeastOnce {
                continue;
            }
            let Some(Slot::Shared(held)) = self.client(id).session.slots.get(&packet_id) else {
                continue;
            };
            let message = held.message.clone();
            let Some(group) = self.groups.get_mut(&group_id) else {
                continue;
            };
            let is_its = group.lanes[usize::from(stream)]
                .open
                .get(&sequence)
                .is_some_and(|o| o.holder == Some((id, packet_id)));
            if let Some(message) = message.filter(|_| is_its) {
                group.wait(stream, message);
                if !groups.contains(&group_id) {
                    groups.push(group_id);
                }
            }
        }
        for group in groups {
            self.after_leaving(group, batch);
        }
    }

    /// The session has ended: what it had goes to others, but for QoS 2 that was sent [MQTT-4.8.2-5].
    pub(super) fn member_gone(&mut self, id: SessionId, batch: &mut Batch<'_>) {
        let mut groups = self.client(id).session.groups.clone();
        for (packet_id, group_id, stream, sequence, qos, state) in self.shared_slots(id) {
            let slot = self.client(id).session.forget(packet_id);
            let Some(Slot::Shared(held)) = slot else { continue };
            if qos == Qos::ExactlyOnce {
                let key = (self.client(id).session.client_id.to_string(), packet_id);
                batch.changes().outbound.insert(key, None);
            }
            let Some(group) = self.groups.get_mut(&group_id) else {
                continue;
            };
            let Some(open) = group.lanes[usize::from(stream)]
                .open
                .get_mut(&sequence)
                .filter(|o| o.holder == Some((id, packet_id)))
            else {
                group.ahead.retain(|_, holder| *holder != (id, packet_id));
                continue;
            };
            if !groups.contains(&group_id) {
                groups.push(group_id);
            }
            if qos == Qos::AtLeastOnce || state == State::Claimed {
                open.holder = None;
                if let Some(message) = held.message {
                    group.wait(stream, message);
                }
                continue;
            }
            if state == State::Sent {
                let (bytes, name) = (open.bytes, consumer_name(&group.text));
                let mut row = loss(&name, &"(unknown)".into(), "session ended", bytes, clock::wall());
                (row.first, row.last) = (sequence, sequence);
                if let Some(message) = held.message {
                    row.source = message.source.to_string();
                }
                batch.changes().losses.push(row);
            }
            self.settle_group(group_id, stream, sequence, batch);
        }
        let subscriptions: Vec<ByteString> = self.client(id).session.subscriptions.keys().cloned().collect();
        for text in subscriptions.iter().filter(|t| is_shared(t)) {
            self.leave_group(id, text, batch);
        }
        for group in groups {
            self.after_leaving(group, batch);
        }
    }

    /// What came back goes to the others; where nobody is here, it is left to the log until somebody is.
    fn after_leaving(&mut self, id: GroupId, batch: &mut Batch<'_>) {
        if self.is_anybody_here(id) {
            self.pump_group(id, batch);
            return;
        }
        let Some(group) = self.groups.get_mut(&id) else { return };
        let waiting = std::mem::take(&mut group.waiting);
        group.waiting_bytes = 0;
        for waits in waiting {
            let lane = &mut group.lanes[usize::from(waits.stream)];
            lane.read = lane.read.min(waits.message.sequence.0 - 1);
        }
        for stream in 0..group.lanes.len() {
            let lane = &mut self.groups.get_mut(&id).expect("just seen").lanes[stream];
            lane.behind = true;
            lane.reading = false;
            self.hold_group(id, stream as u16, 0, 0);
        }
    }
}

impl Member {
    fn recipient(&self) -> Recipient {
        Recipient {
            session: self.session,
            qos: self.qos,
            retain_as_published: self.retain_as_published,
            no_local: false,
            of_its_own: None,
            identifiers: self.identifier.into_iter().collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_begins_with_share_is_a_shared_subscription_or_an_error() {
        let filter = |t: &str| shared_filter(t).map(|f| f.map(|f| f.as_str().to_owned()));
        assert_eq!(filter("a/b"), None);
        assert_eq!(filter("$share"), None);
        assert_eq!(filter("$shared/x"), None);
        assert_eq!(filter("$share/g/a/#"), Some(Ok("a/#".to_owned())));
        assert_eq!(filter("$share/g//"), Some(Ok("/".to_owned())));
        for bad in ["$share/", "$share/g", "$share//t", "$share/+/t", "$share/g#/t"] {
            assert_eq!(filter(bad), Some(Err(TopicError::BadShare)), "{bad}");
        }
        assert_eq!(filter("$share/g/"), Some(Err(TopicError::Empty)));
        assert_eq!(filter("$share/g/a#"), Some(Err(TopicError::MisplacedHash)));
    }
}
