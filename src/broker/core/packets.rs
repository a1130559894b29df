//! What a connected client sends: PUBLISH and the acknowledgements in both directions.

use super::*;

impl Core {
    pub fn packet(&mut self, id: SessionId, conn: &Rc<Conn>, packet: codec::Packet, batch: &mut Batch<'_>) -> Outcome {
        if conn.owed.get() >= OWED_MAX {
            return Outcome::Hold(packet);
        }
        match packet {
            codec::Packet::Publish(p) => self.on_publish(id, conn, p, batch),
            codec::Packet::PubAck { id: packet_id, .. } => {
                self.on_puback(id, packet_id, batch);
                self.pump(id, batch);
                Outcome::Continue
            }
            codec::Packet::PubRec { id: packet_id, reason } => self.on_pubrec(id, conn, packet_id, reason, batch),
            codec::Packet::PubRel { id: packet_id } => self.on_pubrel(id, conn, packet_id, batch),
            codec::Packet::PubComp { id: packet_id } => {
                self.on_pubcomp(id, packet_id, batch);
                self.pump(id, batch);
                Outcome::Continue
            }
            codec::Packet::Subscribe(s) => self.on_subscribe(id, conn, s, batch),
            codec::Packet::Unsubscribe { id: packet_id, filters } => {
                self.on_unsubscribe(id, conn, packet_id, filters, batch)
            }
            codec::Packet::PingReq => {
                conn.wire.borrow_mut().pingresp(&mut conn.out.borrow_mut());
                self.touch(conn);
                Outcome::Continue
            }
            codec::Packet::Disconnect {
                reason: code,
                session_expiry_s,
            } => {
                let session = &mut self.client(id).session;
                if let Some(expiry_s) = session_expiry_s {
                    if session.expiry_s == 0 && expiry_s != 0 {
                        return Outcome::Close(WireError::new(
                            reason::PROTOCOL_ERROR,
                            "a session expiry of 0 cannot be raised by DISCONNECT",
                        ));
                    }
                    session.expiry_s = expiry_s;
                }
                if code != reason::SUCCESS {
                    // 0x04, or an error that the client names: only 0x00 takes the will back [MQTT-3.14.4-3].
                    return Outcome::Close(WireError::new(
                        reason::SUCCESS,
                        "the client disconnected and keeps its will",
                    ));
                }
                Outcome::Goodbye
            }
            codec::Packet::Auth => Outcome::Close(WireError::new(
                reason::PROTOCOL_ERROR,
                "no authentication method was agreed on",
            )),
            codec::Packet::Connect(_) => Outcome::Close(WireError::new(reason::PROTOCOL_ERROR, "a second CONNECT")),
        }
    }

    pub(super) fn on_publish(
        &mut self,
        id: SessionId,
        conn: &Rc<Conn>,
        mut p: codec::Publish,
        batch: &mut Batch<'_>,
    ) -> Outcome {
        let v5 = conn.version().is_v5();
        if let Some(answers) = p.properties.as_ref().and_then(|p| p.response_topic.as_ref())
            && let Err(e) = Topic::new(answers.clone())
        {
            return Outcome::Close(topic_error("response topic", e));
        }
        if let Err(e) = resolve_alias(conn, &mut p) {
            return Outcome::Close(e);
        }
        let again = p.qos == Qos::ExactlyOnce && self.client(id).session.inbound.contains(&p.id);
        let unacknowledged = conn.unacknowledged.get() as usize + self.client(id).session.inbound.len();
        if p.qos > Qos::AtMostOnce && !again && unacknowledged >= usize::from(RECEIVE_MAXIMUM) {
            if v5 {
                return Outcome::Close(WireError::new(
                    reason::RECEIVE_MAXIMUM_EXCEEDED,
                    "more unacknowledged than granted",
                ));
            }
            // QoS 2 ids are freed by packets that would wait behind this one, so only PUBACKs hold 3.1.1 back.
            if conn.unacknowledged.get() > 0 {
                return Outcome::Hold(codec::Packet::Publish(p));
            }
        }
        let client = self.client(id);
        if again {
            // Seen already: the answer follows the first one's commit.
            self.owe(conn, 0x50, p.id, true, batch);
            return Outcome::Continue;
        }
        if !client.rules.may_publish(&p.topic) {
            if let Err(e) = Topic::new(p.topic.clone()) {
                return Outcome::Close(topic_error("topic", e));
            }
            debug!(client = %client.session.client_id, topic = %p.topic, "publish refused by the rules");
            // 3.1.1 cannot say no: it is acknowledged and dropped, or cut off.
            if !v5 && self.settings.refused_publish == RefusedPublish::Disconnect {
                let why = format!("may not publish to {:?}", &*p.topic);
                return Outcome::Close(WireError::new(reason::NOT_AUTHORIZED, why));
            }
            self.refuse(conn, &p, reason::NOT_AUTHORIZED, batch);
            return Outcome::Continue;
        }
        let source = Arc::clone(&client.session.source);
        let incoming = Incoming {
            topic: &p.topic,
            payload: &p.payload,
            qos: p.qos,
            retain: p.retain,
            properties: p.properties.as_deref(),
            source: &source,
            from: Some(id),
            may_refuse: v5 && p.qos > Qos::AtMostOnce,
        };
        self.counters.received.bump(1);
        self.counters.received_bytes.bump(p.payload.len() as u64);
        match self.publish(&incoming, batch) {
            Ok(durable) => {
                match p.qos {
                    Qos::AtMostOnce => {}
                    Qos::AtLeastOnce if v5 && self.for_nobody && !durable => {
                        let mut bytes = bytes::BytesMut::new();
                        conn.wire
                            .borrow()
                            .puback(&mut bytes, p.id, reason::NO_MATCHING_SUBSCRIBERS);
                        self.answer(conn, bytes.freeze(), conn.owed.get() > 0, batch);
                    }
                    Qos::AtLeastOnce => self.owe(conn, 0x40, p.id, durable, batch),
                    Qos::ExactlyOnce => {
                        let session = &mut self.client(id).session;
                        session.inbound.insert(p.id);
                        let kept = session.consumer.is_some();
                        if kept {
                            batch
                                .changes()
                                .inbound
                                .insert((session.client_id.to_string(), p.id), true);
                        }
                        self.owe(conn, 0x50, p.id, durable || kept, batch);
                    }
                }
                Outcome::Continue
            }
            Err(Refused::InvalidTopic(e)) => Outcome::Close(topic_error("topic", e)),
            Err(Refused::RetainedFull) => {
                self.refuse(conn, &p, reason::QUOTA_EXCEEDED, batch);
                Outcome::Continue
            }
            Err(Refused::Full(_)) if v5 && p.qos > Qos::AtMostOnce => {
                self.refuse(conn, &p, reason::QUOTA_EXCEEDED, batch);
                Outcome::Continue
            }
            Err(Refused::Full(_)) if p.qos == Qos::AtMostOnce => {
                self.declare_refused(&incoming, batch);
                Outcome::Continue
            }
            Err(Refused::Full(_)) => Outcome::Hold(codec::Packet::Publish(p)),
        }
    }

    /// Says no with a reason where the version can (QoS 0 and 3.1.1: acknowledged as if taken).
    pub(super) fn refuse(&mut self, conn: &Rc<Conn>, p: &codec::Publish, code: u8, batch: &mut Batch<'_>) {
        let first = match p.qos {
            Qos::AtMostOnce => return,
            Qos::AtLeastOnce => 0x40,
            Qos::ExactlyOnce => 0x50,
        };
        let why = match code {
            reason::NOT_AUTHORIZED => "the rules do not let this client publish to that topic",
            _ => "the log is full, or too much is retained",
        };
        let mut bytes = bytes::BytesMut::new();
        conn.wire.borrow().refusal(&mut bytes, first, p.id, code, why);
        self.answer(conn, bytes.freeze(), conn.owed.get() > 0, batch);
    }

    /// A QoS 0 message for a full stream that rejects: nobody can be told, so the ledger is.
    pub(super) fn declare_refused(&mut self, incoming: &Incoming<'_>, batch: &mut Batch<'_>) {
        let log = self.log.clone();
        let Ok(route) = self.router.route(incoming.topic, |t| log.stream_of(t)) else {
            return;
        };
        let now = clock::wall();
        for consumer in &route.consumers {
            let bytes = (incoming.topic.len() + incoming.payload.len()) as u64;
            batch
                .changes()
                .losses
                .push(loss(consumer.name(), incoming.source, "refused", bytes, now));
        }
        self.counters.dropped.bump(1);
    }

    /// An acknowledgement: at once where nothing has to be on disk for it and nothing before it waits.
    pub(super) fn owe(&mut self, conn: &Rc<Conn>, first: u8, id: u16, durable: bool, batch: &mut Batch<'_>) {
        if !durable && conn.owed.get() == 0 {
            write_answer(conn, first, id, 0);
            self.touch(conn);
            return;
        }
        conn.owed.set(conn.owed.get() + 1);
        conn.unacknowledged
            .set(conn.unacknowledged.get() + u32::from(first == 0x40));
        let ticket = batch.ticket();
        self.waiting.push_back((
            ticket,
            Waiting::Ack {
                conn: Rc::clone(conn),
                first,
                id,
            },
        ));
    }

    pub(super) fn on_puback(&mut self, id: SessionId, packet_id: u16, batch: &mut Batch<'_>) {
        // Whoever answers what an earlier connection was sent need not be sent it again.
        self.client(id).session.again.remove(&packet_id);
        let Some(slot) = self.client(id).session.slots.get(&packet_id) else {
            return;
        };
        match slot {
            Slot::Log { stream, sequence } => {
                let (stream, sequence) = (*stream, *sequence);
                let is_qos1 = self.client(id).session.lanes[usize::from(stream)]
                    .find(sequence)
                    .is_some_and(|o| o.qos == Qos::AtLeastOnce);
                if is_qos1 {
                    self.finish(id, packet_id, stream, sequence, batch);
                }
            }
            Slot::Memory { queued, .. } if queued.qos == Qos::AtLeastOnce => {
                self.client(id).session.forget(packet_id);
            }
            Slot::Memory { .. } => {}
            Slot::Shared(held) if held.qos == Qos::AtLeastOnce => self.shared_done(id, packet_id, batch),
            Slot::Shared(_) => {}
        }
    }

    /// A message of the log is delivered: the cursor moves as far as nothing older is open. Its id is free; that of a QoS 2
    /// message once the cursor has passed it, in the commit that says so.
    pub(super) fn finish(&mut self, id: SessionId, packet_id: u16, stream: u16, sequence: u64, batch: &mut Batch<'_>) {
        let session = &mut self.client(id).session;
        let open = session.lanes[usize::from(stream)].find(sequence);
        let is_kept = open.as_ref().is_some_and(|o| o.qos == Qos::ExactlyOnce);
        if let Some(open) = open {
            open.state = State::Done;
        }
        if is_kept {
            session.again.remove(&packet_id);
            session.ended += 1;
        } else {
            session.forget(packet_id);
        }
        let lane = &mut session.lanes[usize::from(stream)];
        let settled = lane.settle();
        let Some(consumer) = session.consumer.clone().filter(|_| settled.messages > 0) else {
            return;
        };
        consumer.advance(stream, settled.done, settled.messages, settled.bytes);
        hold_open(&consumer, stream, lane);
        for packet_id in &settled.released {
            session.forget(*packet_id);
            session.ended -= 1;
            let key = (session.client_id.to_string(), *packet_id);
            batch.changes().outbound.insert(key, None);
        }
        if !settled.released.is_empty() {
            batch.changes().cursors.insert((consumer.id(), stream), settled.done);
        }
    }

    pub(super) fn on_pubrec(
        &mut self,
        id: SessionId,
        conn: &Rc<Conn>,
        packet_id: u16,
        code: u8,
        batch: &mut Batch<'_>,
    ) -> Outcome {
        let v5 = conn.version().is_v5();
        let session = &mut self.client(id).session;
        session.again.remove(&packet_id);
        match session.slots.get_mut(&packet_id) {
            None => {
                // MQTT 5, 4.3.3: PUBREL with "not found"; 3.1.1 has no reasons.
                if v5 {
                    let [high, low] = packet_id.to_be_bytes();
                    conn.out
                        .borrow_mut()
                        .extend_from_slice(&[0x62, 3, high, low, reason::PACKET_ID_NOT_FOUND]);
                } else {
                    conn.wire.borrow_mut().pubrel(&mut conn.out.borrow_mut(), packet_id);
                }
                self.touch(conn);
            }
            Some(Slot::Memory { queued, state, .. }) if queued.qos == Qos::ExactlyOnce => {
                if code >= 0x80 {
                    session.forget(packet_id);
                    self.pump(id, batch);
                } else {
                    *state = State::Received;
                    conn.wire.borrow_mut().pubrel(&mut conn.out.borrow_mut(), packet_id);
                    self.touch(conn);
                }
            }
            Some(Slot::Memory { .. }) => {}
            Some(Slot::Shared(_)) => self.shared_received(id, conn, packet_id, code, batch),
            Some(Slot::Log { stream, sequence }) => {
                let (stream, sequence) = (*stream, *sequence);
                let client_id = session.client_id.to_string();
                let Some(open) = session.lanes[usize::from(stream)]
                    .find(sequence)
                    .filter(|o| o.qos == Qos::ExactlyOnce)
                else {
                    return Outcome::Continue;
                };
                let row = OutboundRow {
                    client_id: client_id.clone(),
                    packet_id,
                    stream,
                    sequence,
                    received: true,
                    shared: None,
                };
                if open.state == State::Done {
                    // Done with, and its id is kept for a while: what a client asks that has forgotten is answered.
                    conn.wire.borrow_mut().pubrel(&mut conn.out.borrow_mut(), packet_id);
                    self.touch(conn);
                    return Outcome::Continue;
                }
                batch.changes().outbound.insert((client_id, packet_id), Some(row));
                if code >= 0x80 {
                    self.finish(id, packet_id, stream, sequence, batch);
                    self.pump(id, batch);
                    return Outcome::Continue;
                }
                open.state = State::Received;
                let ticket = batch.ticket();
                self.waiting.push_back((
                    ticket,
                    Waiting::Release {
                        session: id,
                        id: packet_id,
                    },
                ));
            }
        }
        Outcome::Continue
    }

    pub(super) fn on_pubcomp(&mut self, id: SessionId, packet_id: u16, batch: &mut Batch<'_>) {
        let session = &mut self.client(id).session;
        session.again.remove(&packet_id);
        match session.slots.get(&packet_id) {
            Some(Slot::Memory { queued, .. }) if queued.qos == Qos::ExactlyOnce => {
                session.forget(packet_id);
            }
            Some(Slot::Log { stream, sequence }) => {
                let (stream, sequence) = (*stream, *sequence);
                if session.lanes[usize::from(stream)]
                    .find(sequence)
                    .is_some_and(|o| o.qos == Qos::ExactlyOnce && o.state != State::Done)
                {
                    self.finish(id, packet_id, stream, sequence, batch);
                }
            }
            Some(Slot::Shared(held)) if held.qos == Qos::ExactlyOnce => self.shared_done(id, packet_id, batch),
            Some(Slot::Memory { .. } | Slot::Shared(_)) | None => {}
        }
    }

    /// The id is free once that is on disk: a PUBCOMP that a crash forgets would let a new message pass for the old.
    pub(super) fn on_pubrel(
        &mut self,
        id: SessionId,
        conn: &Rc<Conn>,
        packet_id: u16,
        batch: &mut Batch<'_>,
    ) -> Outcome {
        let session = &mut self.client(id).session;
        let known = session.inbound.remove(&packet_id);
        let kept = known && session.consumer.is_some();
        if kept {
            batch
                .changes()
                .inbound
                .insert((session.client_id.to_string(), packet_id), false);
        }
        if known {
            self.owe(conn, 0x70, packet_id, kept, batch);
        } else {
            // Mostly one that is repeated because our PUBCOMP was lost: the exchange is over, and 0x92 would make an error
            // of it in clients (MQTT 5, 3.7.2.1 calls it none during recovery).
            conn.wire.borrow().pubcomp(&mut conn.out.borrow_mut(), packet_id, 0);
            self.touch(conn);
        }
        Outcome::Continue
    }
}
