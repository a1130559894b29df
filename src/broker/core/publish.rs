//! A message comes in, from a client or from inside: retained, delivered to those who are here, appended for the others.

use super::*;

fn part(r: &Recipient, from: Option<SessionId>) -> Option<&Recipient> {
    r.part(from == Some(r.session))
}

impl Core {
    /// Takes a message in: retained, delivered to those who are here, appended for those who are owed it. True where
    /// its acknowledgement has to wait for the commit.
    pub fn publish(&mut self, incoming: &Incoming<'_>, batch: &mut Batch<'_>) -> Result<bool, Refused> {
        let log = self.log.clone();
        let route = self
            .router
            .route(incoming.topic, |t| log.stream_of(t))
            .map_err(Refused::InvalidTopic)?;
        let now = clock::wall();
        let mut durable_sessions = false;
        if incoming.qos > Qos::AtMostOnce {
            for r in &route.recipients {
                durable_sessions |=
                    part(r, incoming.from).is_some_and(|r| r.qos > Qos::AtMostOnce) && self.is_durable(r.session);
            }
        }
        let shared = incoming.qos > Qos::AtMostOnce && !route.groups.is_empty() && self.is_shared_durably(&route);
        self.for_nobody = route.recipients.is_empty() && route.groups.is_empty();
        let logged = !route.consumers.is_empty() || durable_sessions || shared;
        let stream = route.stream.filter(|_| logged);
        if let Some(stream) = stream {
            let state = self.log.stream(stream);
            if state.when_full() == WhenFull::Reject && state.is_full() {
                return Err(Refused::Full(state.name.clone()));
            }
        }
        let mut message = Message {
            topic: route.topic.clone(),
            payload: incoming.payload.clone(),
            qos: incoming.qos,
            retain: incoming.retain,
            properties: incoming.properties.map(|p| Box::new(p.clone())),
            source: Arc::clone(incoming.source),
            sequence: crate::message::Sequence(0),
            received: now,
        };
        let retained = match self.retain(&message, batch) {
            Ok(retained) => retained,
            Err(refused) if incoming.may_refuse => return Err(refused),
            // The client cannot be told, and what is due to others is theirs none the less.
            Err(_) => false,
        };
        self.deliver_live(&route, &message, incoming.from, now);
        if !route.groups.is_empty() {
            self.share_live(&route, &message, now);
        }
        for feed in &self.taps {
            feed.offer(&message, detach);
        }
        if let Some(stream) = stream {
            let bytes = message.size_bytes();
            message.sequence = batch.append(stream, &MessageRef::from(&message));
            for consumer in &route.consumers {
                consumer.matched(stream, message.sequence, bytes);
            }
            if shared {
                self.owe_groups(&route, stream, message.sequence, bytes, batch);
            }
            if durable_sessions {
                for r in &route.recipients {
                    if part(r, incoming.from).is_some_and(|r| r.qos > Qos::AtMostOnce)
                        && let Some(consumer) = self.get(r.session).and_then(|c| c.session.consumer.clone())
                    {
                        consumer.matched(stream, message.sequence, bytes);
                    }
                }
                let ticket = batch.ticket();
                let message = Rc::new(detach(&message));
                self.waiting
                    .push_back((ticket, Waiting::Deliver { stream, message, route }));
            }
        }
        Ok(stream.is_some() || retained)
    }

    pub(super) fn is_durable(&self, id: SessionId) -> bool {
        self.clients
            .get(id as usize)
            .and_then(Option::as_ref)
            .is_some_and(|c| c.session.consumer.is_some())
    }

    pub(super) fn retain(&mut self, message: &Message, batch: &mut Batch<'_>) -> Result<bool, Refused> {
        if !message.retain {
            return Ok(false);
        }
        let topic = message.topic.as_str().to_owned();
        if message.payload.is_empty() {
            let Some(old) = self.retained.remove(&message.topic) else {
                return Ok(false);
            };
            self.retained_bytes -= old.size_bytes();
            batch.changes().retained.insert(topic, None);
        } else {
            let old_bytes = self.retained.get(&message.topic).map(|m| m.size_bytes());
            let bytes = self.retained_bytes + message.size_bytes() - old_bytes.unwrap_or(0);
            if bytes > RETAINED_BYTES_MAX || old_bytes.is_none() && self.retained.len() >= RETAINED_MAX {
                if let Some(more) = self.too_many_retained.note("", clock::monotonic()) {
                    warn!(
                        topic,
                        more,
                        "too many retained messages; this one is refused, or where that cannot be said, not retained"
                    );
                }
                return Err(Refused::RetainedFull);
            }
            self.retained_bytes = bytes;
            batch
                .changes()
                .retained
                .insert(topic, Some(record::encode_one(message)));
            self.retained.insert(message.topic.clone(), Rc::new(detach(message)));
        }
        self.counters.retained.set(self.retained.len() as u64);
        Ok(true)
    }

    /// To sessions that get it from memory: those that are not durable, and QoS 0 deliveries of those that are.
    pub(super) fn deliver_live(
        &mut self,
        route: &Rc<Route>,
        message: &Message,
        from: Option<SessionId>,
        now: Timestamp,
    ) {
        // One a form: MQTT 5 or not, QoS, RETAIN.
        let mut frames: Vec<((bool, Qos, bool), PublishFrame)> = Vec::new();
        let mut kept: Option<Rc<Message>> = None;
        let mut lost: Vec<SessionId> = Vec::new();
        for r in &route.recipients {
            let Some(r) = part(r, from) else { continue };
            let qos = message.qos.min(r.qos);
            let Some(client) = self.clients.get_mut(r.session as usize).and_then(Option::as_mut) else {
                continue;
            };
            if qos > Qos::AtMostOnce && client.session.consumer.is_some() {
                continue;
            }
            let Some(conn) = client.conn.clone() else { continue };
            if !client.rules.may_receive(message.topic.as_str()) {
                continue;
            }
            let retain = message.retain && r.retain_as_published;
            let v5 = conn.version().is_v5();
            if qos > Qos::AtMostOnce && !has_room(&client.session, &conn) {
                let message = Rc::clone(kept.get_or_insert_with(|| Rc::new(detach(message))));
                let queued = Queued {
                    message,
                    qos,
                    retain,
                    identifiers: r.identifiers.clone(),
                };
                if !client.session.enqueue(queued) {
                    lost.push(r.session);
                }
                continue;
            }
            if qos == Qos::AtMostOnce && conn.out.borrow().len() > OUT_BYTES_MAX {
                conn.dropped.set(conn.dropped.get() + 1);
                self.counters.dropped.bump(1);
                continue;
            }
            let encode_for = |identifiers: &[u32]| {
                let how = Delivery {
                    v5,
                    qos,
                    retain,
                    identifiers,
                    expiry_s: message.expires_in_s(now),
                    alias: None,
                };
                PublishFrame::encode(message, &how)
            };
            let own_frame;
            let frame = if conn.aliases_out.borrow().is_used() {
                own_frame = encode(&conn, message, qos, r, now);
                &own_frame
            } else if r.identifiers.is_empty() {
                match frames.iter().position(|(key, _)| *key == (v5, qos, retain)) {
                    Some(at) => &frames[at].1,
                    None => {
                        frames.push(((v5, qos, retain), encode_for(&[])));
                        &frames[frames.len() - 1].1
                    }
                }
            } else {
                own_frame = encode_for(&r.identifiers);
                &own_frame
            };
            if frame.bytes() > conn.wire.borrow().out_bytes_max() {
                // MQTT 5, 3.1.2-25: what the client cannot take is treated as if it had been sent.
                self.counters.dropped.bump(1);
                continue;
            }
            let mut packet_id = 0;
            if qos > Qos::AtMostOnce {
                packet_id = client.session.take_id().expect("the window is far below the ids");
                let message = Rc::clone(kept.get_or_insert_with(|| Rc::new(detach(message))));
                let queued = Queued {
                    message,
                    qos,
                    retain,
                    identifiers: r.identifiers.clone(),
                };
                let nth = client.session.count_sent();
                client.session.slots.insert(
                    packet_id,
                    Slot::Memory {
                        queued,
                        state: State::Sent,
                        nth,
                    },
                );
            }
            write(&conn, frame, message.topic.as_str(), packet_id, false);
            self.counters.delivered.bump(1);
            self.counters.delivered_bytes.bump(message.payload.len() as u64);
            self.touch(&conn);
        }
        for id in lost {
            self.declare_slow(id, message, now);
        }
    }

    /// A client that reads too slowly loses messages: never in silence.
    pub(super) fn declare_slow(&mut self, id: SessionId, message: &Message, now: Timestamp) {
        self.counters.dropped.bump(1);
        if message.topic.as_str().starts_with("status/loss/") {
            // The notice of a loss is not itself declared lost: that would never end.
            return;
        }
        let client = self.client(id);
        let name = client.session.client_id.clone();
        if let Some(conn) = &client.conn {
            if conn.dropped.replace(conn.dropped.get() + 1) == 0 {
                warn!(client = %name, "reads too slowly: messages to it are lost from here on, and counted");
            }
            conn.lost.borrow_mut().add(message, now);
        }
    }
}
