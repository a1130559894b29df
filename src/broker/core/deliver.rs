//! What follows a commit, and what the log owes to durable sessions.

use super::*;

impl Core {
    /// A commit has ended: acknowledgements leave, and what was logged goes to the sessions that are owed it.
    pub fn commit_ended(&mut self, generation: u64, result: &Result<Vec<Arc<Segment>>, String>, batch: &mut Batch<'_>) {
        while self.waiting.front().is_some_and(|(g, _)| *g <= generation) {
            let (_, waiting) = self.waiting.pop_front().expect("just looked");
            match result {
                Ok(_) => self.go_on(waiting, batch),
                Err(why) => self.give_up(waiting, why),
            }
        }
    }

    pub(super) fn go_on(&mut self, waiting: Waiting, batch: &mut Batch<'_>) {
        match waiting {
            Waiting::Ack { conn, first, id } => {
                conn.owed.set(conn.owed.get() - 1);
                conn.unacknowledged
                    .set(conn.unacknowledged.get() - u32::from(first == 0x40));
                write_answer(&conn, first, id, 0);
                self.touch(&conn);
            }
            Waiting::Frame { conn, bytes } => {
                conn.owed.set(conn.owed.get() - 1);
                conn.out.borrow_mut().extend_from_slice(&bytes);
                self.touch(&conn);
            }
            Waiting::Deliver { stream, message, route } => {
                for r in &route.recipients {
                    if r.qos > Qos::AtMostOnce {
                        self.deliver_logged(r, stream, &message, batch);
                    }
                }
            }
            Waiting::Claimed {
                session,
                id,
                message,
                recipient,
            } => self.send_claimed(session, id, &message, &recipient, false),
            Waiting::Group { id, stream } => self.group_has_more(id, stream),
            Waiting::ClaimedShared {
                session,
                id,
                group,
                sequence,
            } => self.shared_claimed(session, id, group, sequence, true),
            Waiting::Release { session, id } => {
                if let Some(conn) = self.get(session).and_then(|c| c.conn.clone()) {
                    conn.wire.borrow_mut().pubrel(&mut conn.out.borrow_mut(), id);
                    self.touch(&conn);
                }
            }
            // Whoever asked may be gone.
            Waiting::Reply(reply) => drop(reply.send(Ok(()))),
        }
    }

    /// The commit failed: MQTT 5 is told, 3.1.1 is disconnected so that it comes again.
    pub(super) fn give_up(&mut self, waiting: Waiting, why: &str) {
        match waiting {
            Waiting::Ack { conn, first, id } => {
                conn.owed.set(conn.owed.get() - 1);
                conn.unacknowledged
                    .set(conn.unacknowledged.get() - u32::from(first == 0x40));
                if first != 0x40
                    && let Some(client) = self.get(conn.session.get())
                {
                    // The id is not taken: the same PUBLISH may come again. A PUBREL comes again as well.
                    if first == 0x50 {
                        client.session.inbound.remove(&id);
                    } else {
                        client.session.inbound.insert(id);
                    }
                }
                if conn.version().is_v5() && first != 0x70 {
                    write_answer(&conn, first, id, reason::QUOTA_EXCEEDED);
                    self.touch(&conn);
                } else {
                    conn.close("the log could not be written");
                }
            }
            Waiting::Frame { conn, .. } => {
                conn.owed.set(conn.owed.get() - 1);
                conn.close("the log could not be written");
            }
            Waiting::Reply(reply) => drop(reply.send(Err(PublishError::NotDurable(why.to_owned())))),
            // Never sent: it comes again from the log, or never was there.
            Waiting::Deliver { .. } | Waiting::Group { .. } => {}
            Waiting::ClaimedShared {
                session,
                id,
                group,
                sequence,
            } => {
                self.shared_claimed(session, id, group, sequence, false);
                self.close_session(session);
            }
            Waiting::Claimed {
                session, id, message, ..
            } => {
                // Its row goes into the next commit; it is sent when the client is back.
                if let Some(client) = self.get(session)
                    && let Some(Slot::Log { stream, .. }) = client.session.slots.get(&id)
                {
                    let lane = &mut client.session.lanes[usize::from(*stream)];
                    if let Some(open) = lane.find(message.sequence.0).filter(|o| o.state == State::Claimed) {
                        open.state = State::Sent;
                        lane.claimed -= 1;
                    }
                }
                self.close_session(session);
            }
            Waiting::Release { session, .. } => self.close_session(session),
        }
    }

    pub(super) fn close_session(&mut self, id: SessionId) {
        if let Some(conn) = self.get(id).and_then(|c| c.conn.clone()) {
            conn.close("the log could not be written");
        }
    }

    /// A message that has just been committed goes straight to a session that keeps up.
    pub(super) fn deliver_logged(&mut self, r: &Recipient, stream: u16, message: &Rc<Message>, batch: &mut Batch<'_>) {
        let log = self.log.clone();
        let sequence = message.sequence.0;
        let Some(client) = self.get(r.session) else { return };
        let (Some(consumer), Some(conn)) = (client.session.consumer.clone(), client.conn.clone()) else {
            return;
        };
        if r.no_local && message.source == client.session.source {
            return;
        }
        let room = has_room(&client.session, &conn);
        let Some(lane) = client.session.lanes.get_mut(usize::from(stream)) else {
            return;
        };
        if sequence <= lane.read || lane.behind {
            return;
        }
        // Where a limit is dropping just now, the pump comes back to it after that commit.
        let Some(after) = consumer.hold(&log, stream, lane.read.max(sequence - 1)) else {
            lane.behind = true;
            self.blocked.push(r.session);
            return;
        };
        if !room || after >= sequence {
            lane.behind = !room;
            hold_open(&consumer, stream, lane);
            return;
        }
        lane.read = sequence;
        self.send_logged(r, stream, message, batch);
        let lane = &self.client(r.session).session.lanes[usize::from(stream)];
        hold_open(&consumer, stream, lane);
    }

    /// Sends a message of the log to a session that has room; it is open from here on.
    pub(super) fn send_logged(&mut self, r: &Recipient, stream: u16, message: &Rc<Message>, batch: &mut Batch<'_>) {
        let now = clock::wall();
        let sequence = message.sequence.0;
        let client = self.client(r.session);
        let Some(conn) = client.conn.clone() else { return };
        let qos = message.qos.min(r.qos);
        let pass = if !client.rules.may_receive(message.topic.as_str()) {
            Some(None)
        } else if message.is_expired(now) {
            Some(Some("expired"))
        } else {
            let frame = encode(&conn, message, qos, r, now);
            if frame.bytes() > conn.wire.borrow().out_bytes_max() {
                Some(Some("too large"))
            } else if qos == Qos::AtLeastOnce && client.session.lanes[usize::from(stream)].claimed == 0 {
                let id = client.session.take_id().expect("the window is far below the ids");
                write(&conn, &frame, message.topic.as_str(), id, false);
                open(&mut client.session, stream, message, id, qos, State::Sent);
                self.counters.delivered.add(1);
                self.touch(&conn);
                None
            } else {
                let id = client.session.take_id().expect("the window is far below the ids");
                open(&mut client.session, stream, message, id, qos, State::Claimed);
                client.session.lanes[usize::from(stream)].claimed += 1;
                if qos == Qos::ExactlyOnce {
                    let client_id = client.session.client_id.to_string();
                    let row = OutboundRow {
                        client_id: client_id.clone(),
                        packet_id: id,
                        stream,
                        sequence,
                        received: false,
                        shared: None,
                    };
                    batch.changes().outbound.insert((client_id, id), Some(row));
                }
                let claimed = Waiting::Claimed {
                    session: r.session,
                    id,
                    message: Rc::clone(message),
                    recipient: r.clone(),
                };
                self.waiting.push_back((batch.ticket(), claimed));
                None
            }
        };
        let Some(why) = pass else { return };
        let session = &mut self.client(r.session).session;
        if let Some(why) = why {
            let name = format!("session:{}", session.client_id);
            let mut row = loss(&name, &message.source, why, message.size_bytes() as u64, now);
            (row.first, row.last) = (sequence, sequence);
            batch.changes().losses.push(row);
        }
        let lane = &mut session.lanes[usize::from(stream)];
        let settled = lane.settle();
        if let Some(consumer) = &session.consumer {
            consumer.advance(stream, settled.done, 1, message.size_bytes() as u64);
        }
    }

    pub(super) fn send_claimed(
        &mut self,
        id: SessionId,
        packet_id: u16,
        message: &Rc<Message>,
        r: &Recipient,
        dup: bool,
    ) {
        let Some(client) = self.get(id) else { return };
        let Some(Slot::Log { stream, sequence }) = client.session.slots.get(&packet_id) else {
            return;
        };
        let (stream, sequence) = (usize::from(*stream), *sequence);
        if sequence != message.sequence.0 {
            return;
        }
        let lane = &mut client.session.lanes[stream];
        let Some(open) = lane.find(sequence).filter(|o| o.state == State::Claimed) else {
            return;
        };
        open.state = State::Sent;
        let qos = open.qos;
        lane.claimed -= 1;
        let Some(conn) = client.conn.clone() else { return };
        let frame = encode(&conn, message, qos, r, clock::wall());
        write(&conn, &frame, message.topic.as_str(), packet_id, dup);
        self.counters.delivered.add(1);
        self.touch(&conn);
    }

    /// Gives a session what it is owed, as far as its window and its connection take it: retained messages, what waits
    /// in memory, then the log.
    pub fn pump(&mut self, id: SessionId, batch: &mut Batch<'_>) {
        let Some(client) = self.get(id) else { return };
        let Some(conn) = client.conn.clone() else { return };
        self.pump_retained(id, &conn);
        loop {
            let client = self.client(id);
            if client.session.queue.is_empty() || !has_room(&client.session, &conn) {
                break;
            }
            let queued = client.session.dequeue().expect("just looked");
            self.send_queued(id, &conn, queued);
        }
        let lanes = self.client(id).session.lanes.len();
        for stream in 0..lanes {
            self.pump_lane(id, &conn, stream as u16, batch);
        }
        self.pump_groups_of(id, batch);
    }

    pub(super) fn pump_retained(&mut self, id: SessionId, conn: &Rc<Conn>) {
        loop {
            let client = self.client(id);
            if client.session.retained.is_empty() || !has_room(&client.session, conn) {
                return;
            }
            let (topic, qos, identifiers) = client.session.retained.pop_front().expect("just looked");
            let Some(message) = self.retained.get(&topic).cloned() else {
                continue;
            };
            let client = self.client(id);
            if message.is_expired(clock::wall()) || !client.rules.may_receive(topic.as_str()) {
                continue;
            }
            let queued = Queued {
                qos: qos.min(message.qos),
                message,
                retain: true,
                identifiers,
            };
            self.send_queued(id, conn, queued);
        }
    }

    pub(super) fn send_queued(&mut self, id: SessionId, conn: &Rc<Conn>, queued: Queued) {
        let now = clock::wall();
        // The right to it may have been taken away while it waited.
        let may = self.client(id).rules.may_receive(queued.message.topic.as_str());
        if !may || queued.message.is_expired(now) {
            return;
        }
        let frame = encode_queued(conn, &queued, now);
        if frame.bytes() > conn.wire.borrow().out_bytes_max() {
            self.counters.dropped.add(1);
            return;
        }
        let topic = queued.message.topic.clone();
        let mut packet_id = 0;
        if queued.qos > Qos::AtMostOnce {
            let session = &mut self.client(id).session;
            packet_id = session.take_id().expect("the window is far below the ids");
            session.slots.insert(
                packet_id,
                Slot::Memory {
                    queued,
                    state: State::Sent,
                },
            );
        }
        write(conn, &frame, topic.as_str(), packet_id, false);
        self.counters.delivered.add(1);
        self.touch(conn);
    }

    pub(super) fn pump_lane(&mut self, id: SessionId, conn: &Rc<Conn>, stream: u16, batch: &mut Batch<'_>) {
        let log = self.log.clone();
        loop {
            let client = self.client(id);
            let room = has_room(&client.session, conn);
            let Some(consumer) = client.session.consumer.clone() else {
                return;
            };
            let lane = &mut client.session.lanes[usize::from(stream)];
            if !lane.behind || lane.reading || !room {
                return;
            }
            if lane.read >= log.tail(stream) || !consumer.has_backlog(stream) && lane.open.is_empty() {
                lane.behind = false;
                lane.read = lane.read.max(log.tail(stream));
                consumer.advance(stream, lane.open.front().map_or(lane.read, |o| o.sequence - 1), 0, 0);
                hold_open(&consumer, stream, lane);
                return;
            }
            let Some(after) = consumer.hold(&log, stream, lane.read) else {
                self.blocked.push(id);
                return;
            };
            lane.read = after;
            match log.segment_in_memory(stream, after) {
                Some(segment) => self.feed(id, stream, &segment, batch),
                None => {
                    lane.reading = true;
                    let filters: Arc<[TopicFilter]> = consumer.filters().iter().map(|(f, _)| f.clone()).collect();
                    self.reads.push((Reading::Session(id), stream, after, filters));
                    return;
                }
            }
        }
    }

    /// A read that `pump_lane` asked for has come back.
    pub fn read_ended(&mut self, reading: Reading, stream: u16, after: u64, read: Read, batch: &mut Batch<'_>) {
        let id = match reading {
            Reading::Session(id) => id,
            Reading::Group(id) => return self.group_read_ended(id, stream, after, read, batch),
        };
        let Some(client) = self.get(id) else { return };
        let Some(lane) = client.session.lanes.get_mut(usize::from(stream)) else {
            return;
        };
        if !lane.reading {
            return;
        }
        lane.reading = false;
        if lane.read == after && client.conn.is_some() {
            match read {
                Read::Segment(segment) => self.feed(id, stream, &segment, batch),
                Read::Nothing(to) => self.skip_to(id, stream, to),
                Read::Damaged(h) => {
                    let name = format!("session:{}", self.client(id).session.client_id);
                    let mut row = loss(&name, &"(unknown)".into(), "damaged", h.bytes, clock::wall());
                    (row.first, row.last, row.count) = (h.first, h.last, u64::from(h.count));
                    batch.changes().losses.push(row);
                    self.skip_to(id, stream, h.last);
                }
                Read::End => self.skip_to(id, stream, after),
            }
        }
        self.pump(id, batch);
    }

    pub(super) fn skip_to(&mut self, id: SessionId, stream: u16, to: u64) {
        let tail = self.log.tail(stream);
        let session = &mut self.client(id).session;
        let lane = &mut session.lanes[usize::from(stream)];
        lane.read = lane.read.max(to);
        if lane.read >= tail {
            lane.behind = false;
        }
        if let Some(consumer) = &session.consumer {
            consumer.advance(stream, lane.open.front().map_or(lane.read, |o| o.sequence - 1), 0, 0);
            hold_open(consumer, stream, lane);
        }
    }

    /// Sends what a segment has for a session, in order, until its window is full.
    pub(super) fn feed(&mut self, id: SessionId, stream: u16, segment: &Segment, batch: &mut Batch<'_>) {
        let after = self.client(id).session.lanes[usize::from(stream)].read;
        let mut records = segment.records();
        loop {
            let message = match records.read() {
                Ok(Some(message)) if message.sequence.0 <= after => continue,
                Ok(Some(message)) => message,
                Ok(None) => break,
                Err(_) => {
                    let name = format!("session:{}", self.client(id).session.client_id);
                    let mut row = loss(&name, &"(unknown)".into(), "damaged", 0, clock::wall());
                    (row.first, row.last, row.count) = (segment.first, segment.last, 0);
                    batch.changes().losses.push(row);
                    break;
                }
            };
            let client = self.client(id);
            let Some(conn) = client.conn.clone() else { return };
            let sequence = message.sequence.0;
            let again = client.session.lanes[usize::from(stream)]
                .find(sequence)
                .map(|o| (o.id, o.qos, o.state));
            if again.is_none() && !has_room(&client.session, &conn) {
                let consumer = client.session.consumer.clone();
                let lane = &client.session.lanes[usize::from(stream)];
                if let Some(consumer) = consumer {
                    hold_open(&consumer, stream, lane);
                }
                return;
            }
            client.session.lanes[usize::from(stream)].read = sequence;
            let recipient = recipient(id, &client.session, &message);
            match (again, recipient) {
                (Some((packet_id, qos, state)), recipient) => {
                    self.send_again(id, packet_id, qos, state, message, recipient)
                }
                (None, Some(r)) => self.send_logged(&r, stream, &Rc::new(message), batch),
                (None, None) => {}
            }
        }
        self.skip_to(id, stream, segment.last);
    }

    /// Something that was in flight before the client went away (MQTT 5, 4.4): under the same id.
    pub(super) fn send_again(
        &mut self,
        id: SessionId,
        packet_id: u16,
        qos: Qos,
        state: State,
        message: Message,
        r: Option<Recipient>,
    ) {
        let client = self.client(id);
        let Some(conn) = client.conn.clone() else { return };
        match state {
            State::Received => conn.wire.borrow_mut().pubrel(&mut conn.out.borrow_mut(), packet_id),
            State::Sent => {
                // The subscription may be gone; what was sent once is still owed to its end.
                let r = r.unwrap_or(Recipient {
                    session: id,
                    qos,
                    retain_as_published: false,
                    no_local: false,
                    identifiers: SmallVec::new(),
                });
                let frame = encode(&conn, &message, qos, &r, clock::wall());
                write(&conn, &frame, message.topic.as_str(), packet_id, true);
            }
            // Its commit is still to come and sends it; what is done is done.
            State::Claimed | State::Done => {}
        }
        self.touch(&conn);
    }
}
