//! What follows a commit, and what the log owes to durable sessions.

use super::sys::is_sys;
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
            } => self.send_claimed(session, id, &message, &recipient, batch),
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
        let is_its_own = message.source == client.session.source;
        let Some(r) = r.part(is_its_own).filter(|r| r.qos > Qos::AtMostOnce) else {
            return;
        };
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
        } else if client.session.is_over_limit() {
            Some(Some("queue full"))
        } else {
            let frame = encode(&conn, message, qos, r, now);
            if frame.bytes() > conn.wire.borrow().out_bytes_max() {
                Some(Some("too large"))
            } else if qos == Qos::AtLeastOnce && client.session.lanes[usize::from(stream)].claimed == 0 {
                let id = client.session.take_id().expect("the window is far below the ids");
                write(&conn, &frame, message.topic.as_str(), id, false);
                open(&mut client.session, stream, message, id, r, State::Sent);
                self.counters.delivered.bump(1);
                self.counters.delivered_bytes.bump(message.payload.len() as u64);
                self.touch(&conn);
                None
            } else {
                let id = client.session.take_id().expect("the window is far below the ids");
                open(&mut client.session, stream, message, id, r, State::Claimed);
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

    /// The session's own part in a message read from the log: its subscriptions as they are now.
    fn recipient(&mut self, id: SessionId, message: &Message) -> Option<Recipient> {
        let log = self.log.clone();
        let session = &self.client(id).session;
        let is_its_own = message.source == session.source;
        let found = if message.sequence.0 > session.newest_since {
            let topic = message.topic.as_byte_string();
            let route = self.router.route(topic, |t| log.stream_of(t)).ok()?;
            let found = route.recipients.iter().find(|r| r.session == id);
            found.and_then(|r| r.part(is_its_own)).cloned()
        } else {
            // Some subscriptions are younger than the message.
            let mut found = Vec::with_capacity(1);
            for (text, kept) in &session.subscriptions {
                let counts = message.sequence.0 > kept.since && !(is_its_own && kept.no_local) && !is_shared(text);
                if counts && kept.filter.matches(message.topic.as_str()) {
                    add(&mut found, &subscription(id, kept));
                }
            }
            found.pop()
        };
        found.filter(|r| message.qos.min(r.qos) > Qos::AtMostOnce)
    }

    pub(super) fn send_claimed(
        &mut self,
        session: SessionId,
        packet_id: u16,
        message: &Rc<Message>,
        r: &Recipient,
        batch: &mut Batch<'_>,
    ) {
        let Some(client) = self.get(session) else { return };
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
        // It may be another connection than the one that it was measured for.
        if frame.bytes() > conn.wire.borrow().out_bytes_max() {
            return self.pass_over(session, packet_id, message, batch);
        }
        write(&conn, &frame, message.topic.as_str(), packet_id, false);
        self.counters.delivered.bump(1);
        self.counters.delivered_bytes.bump(message.payload.len() as u64);
        self.touch(&conn);
    }

    /// Gives a session what it is owed, as far as its window and its connection take it: retained messages, what waits
    /// in memory, then the log.
    pub fn pump(&mut self, id: SessionId, batch: &mut Batch<'_>) {
        let Some(client) = self.get(id) else { return };
        let Some(conn) = client.conn.clone() else { return };
        self.pump_again(id, &conn, batch);
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

    /// Goes on through the retained messages; after some time others have their turn.
    pub(super) fn pump_retained(&mut self, id: SessionId, conn: &Rc<Conn>) {
        let mut looks = 0;
        loop {
            let session = &mut self.clients[id as usize].as_mut().expect("it is being served").session;
            if session.retained.is_empty() || !has_room(session, conn) {
                return;
            }
            let wanted = session.retained.front_mut().expect("just looked");
            let from = match &wanted.after {
                Some(topic) => Bound::Excluded(topic.as_str()),
                None => Bound::Included(wanted.literal.as_str()),
            };
            let mut next = None;
            let table = match is_sys(&wanted.filter) {
                true => self.sys.topics(),
                false => &self.retained,
            };
            for (topic, message) in table.range::<str, _>((from, Bound::Unbounded)) {
                if !topic.as_str().starts_with(&wanted.literal) {
                    break;
                }
                looks += 1;
                let is_it = wanted.filter.matches(topic.as_str());
                if is_it || looks >= RETAINED_LOOKS_A_TURN {
                    next = Some((topic.clone(), Rc::clone(message), is_it));
                    break;
                }
            }
            let Some((topic, message, is_it)) = next else {
                session.retained.pop_front();
                if session.retained.is_empty() {
                    session.retained = VecDeque::new();
                }
                continue;
            };
            wanted.after = Some(topic.clone());
            let (qos, identifiers) = (wanted.qos.min(message.qos), wanted.identifiers.clone());
            // `send_queued` looks at rights and expiry.
            if is_it {
                let queued = Queued {
                    message,
                    qos,
                    retain: true,
                    identifiers,
                };
                self.send_queued(id, conn, queued);
            }
            if looks >= RETAINED_LOOKS_A_TURN {
                conn.wants_pump.set(true);
                return self.touch(conn);
            }
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
            self.counters.dropped.bump(1);
            return;
        }
        let topic = queued.message.topic.clone();
        let payload_bytes = queued.message.payload.len() as u64;
        let mut packet_id = 0;
        if queued.qos > Qos::AtMostOnce {
            let session = &mut self.client(id).session;
            packet_id = session.take_id().expect("the window is far below the ids");
            let nth = session.count_sent();
            session.slots.insert(
                packet_id,
                Slot::Memory {
                    queued,
                    state: State::Sent,
                    nth,
                },
            );
        }
        write(conn, &frame, topic.as_str(), packet_id, false);
        self.counters.delivered.bump(1);
        self.counters.delivered_bytes.bump(payload_bytes);
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
                    batch.changes().losses.push(damaged(&name, &h));
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
                .map(|o| (o.id, o.qos, o.state, o.form.clone()));
            let takes_room = match again {
                None => true,
                Some((packet_id, _, state, _)) => state == State::Sent && client.session.again.contains(&packet_id),
            };
            if takes_room && !has_room(&client.session, &conn) {
                let consumer = client.session.consumer.clone();
                let lane = &client.session.lanes[usize::from(stream)];
                if let Some(consumer) = consumer {
                    hold_open(&consumer, stream, lane);
                }
                return;
            }
            client.session.lanes[usize::from(stream)].read = sequence;
            let recipient = self.recipient(id, &message);
            match (again, recipient) {
                (Some((packet_id, qos, state, form)), recipient) => {
                    let form = form.or(recipient.map(|r| Form {
                        retain_as_published: r.retain_as_published,
                        identifiers: r.identifiers,
                    }));
                    self.send_again(id, packet_id, (qos, state), &message, form, batch)
                }
                (None, Some(r)) => self.send_logged(&r, stream, &Rc::new(message), batch),
                (None, None) => {}
            }
        }
        self.skip_to(id, stream, segment.last);
    }

    /// Something of the log that was in flight before the client went away (MQTT 5, 4.4): under the same id, as it was sent.
    /// `form` is None where that is not known and its subscription is gone; it is still owed to its end.
    pub(super) fn send_again(
        &mut self,
        id: SessionId,
        packet_id: u16,
        (qos, state): (Qos, State),
        message: &Message,
        form: Option<Form>,
        batch: &mut Batch<'_>,
    ) {
        let client = self.client(id);
        let Some(conn) = client.conn.clone() else { return };
        if !client.session.again.remove(&packet_id) {
            // Answered meanwhile; or its commit is still to come, and sends it.
            return;
        }
        if state == State::Received {
            conn.wire.borrow_mut().pubrel(&mut conn.out.borrow_mut(), packet_id);
            return self.touch(&conn);
        }
        let (retain_as_published, identifiers) =
            form.map_or_else(Default::default, |f| (f.retain_as_published, f.identifiers));
        let r = Recipient {
            session: id,
            qos,
            retain_as_published,
            no_local: false,
            identifiers,
            of_its_own: None,
        };
        let frame = encode(&conn, message, qos, &r, clock::wall());
        if frame.bytes() > conn.wire.borrow().out_bytes_max() {
            return self.pass_over(id, packet_id, message, batch);
        }
        write(&conn, &frame, message.topic.as_str(), packet_id, true);
        self.touch(&conn);
    }

    /// What is not of the log and an earlier connection had in flight, in that order, as the window takes it.
    pub(super) fn pump_again(&mut self, id: SessionId, conn: &Rc<Conn>, batch: &mut Batch<'_>) {
        loop {
            let session = &mut self.client(id).session;
            let Some(packet_id) = session.again_in_order.front().copied() else {
                return;
            };
            if session.again.contains(&packet_id) && !has_room(session, conn) {
                return;
            }
            session.again_in_order.pop_front();
            if !session.again.remove(&packet_id) {
                continue;
            }
            let queued = match session.slots.get(&packet_id) {
                Some(Slot::Memory { queued, .. }) => Some(queued.clone()),
                Some(Slot::Shared(held)) => held.queued(),
                Some(Slot::Log { .. }) | None => None,
            };
            let Some(queued) = queued else { continue };
            let frame = encode_queued(conn, &queued, clock::wall());
            if frame.bytes() > conn.wire.borrow().out_bytes_max() {
                self.pass_over(id, packet_id, &queued.message, batch);
                continue;
            }
            write(conn, &frame, queued.message.topic.as_str(), packet_id, true);
            self.touch(conn);
        }
    }

    /// What this connection cannot take, though an earlier one could, is over, as if it had been sent [MQTT-3.1.2-25]; it
    /// is declared lost.
    fn pass_over(&mut self, id: SessionId, packet_id: u16, message: &Message, batch: &mut Batch<'_>) {
        let session = &mut self.client(id).session;
        let name = format!("session:{}", session.client_id);
        let mut row = loss(
            &name,
            &message.source,
            "too large",
            message.size_bytes() as u64,
            clock::wall(),
        );
        (row.first, row.last) = (message.sequence.0, message.sequence.0);
        batch.changes().losses.push(row);
        self.counters.dropped.add(1);
        match self.client(id).session.slots.get(&packet_id) {
            Some(Slot::Log { stream, sequence }) => {
                let (stream, sequence) = (*stream, *sequence);
                self.finish(id, packet_id, stream, sequence, batch);
            }
            Some(Slot::Shared(_)) => self.shared_done(id, packet_id, batch),
            Some(Slot::Memory { .. }) | None => drop(self.client(id).session.forget(packet_id)),
        }
    }
}
