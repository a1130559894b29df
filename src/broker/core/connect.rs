//! Clients come and go: CONNECT, takeover, wills, the end of a session.

use super::*;
use crate::broker::aliases::Aliases;
use crate::broker::pace::Pace;

/// Why a client may not come in, or stay.
pub(super) const UNFIT_ID: &str =
    "this client id cannot stand in the rules of its user: it is empty, begins with $, or has /, + or # in it";

/// The keep-alive that counts: the client's, unless its listener takes none so long (0 is for ever). Before MQTT 5 a
/// client cannot be told another, and would be cut in the middle of its own.
pub fn granted_keep_alive(connect: &codec::Connect, max_s: Option<u16>) -> u16 {
    let asked = connect.keep_alive_s;
    match max_s {
        Some(max) if connect.version.is_v5() && (asked == 0 || asked > max) => max,
        _ => asked,
    }
}

impl Core {
    /// A client whose name and password are in order. The CONNACK is written; what is owed follows it.
    pub fn connect(
        &mut self,
        conn: &Rc<Conn>,
        connect: codec::Connect,
        batch: &mut Batch<'_>,
    ) -> Result<SessionId, WireError> {
        let keep_alive_s = granted_keep_alive(&connect, conn.keep_alive_max_s);
        let codec::Connect {
            version,
            clean_start,
            client_id,
            username,
            will,
            ..
        } = connect;
        let user = username.as_ref().map(ToString::to_string);
        let assigned = client_id.is_empty();
        let client_id = if assigned {
            self.assign_id()
        } else {
            ByteString::from(&*client_id)
        };
        // A reload may have taken the user away since its password was checked: it may do nothing then.
        let grant = self.grant_of(user.as_deref());
        let limits = grant.map(|g| g.limits).unwrap_or_default();
        let rules = match grant.map(|g| g.rules(&client_id)) {
            Some(Ok(rules)) => rules,
            Some(Err(_)) => return Err(WireError::new(reason::CLIENT_ID_NOT_VALID, UNFIT_ID)),
            None => Rc::default(),
        };
        if let Some(will) = &will {
            Topic::new(will.topic.clone()).map_err(|e| topic_error("will topic", e))?;
            if let Some(answers) = will.properties.as_ref().and_then(|p| p.response_topic.as_ref()) {
                Topic::new(answers.clone()).map_err(|e| topic_error("the will's response topic", e))?;
            }
            if !rules.may_publish(&will.topic) {
                return Err(WireError::new(
                    reason::NOT_AUTHORIZED,
                    "may not publish to the will's topic",
                ));
            }
        }
        let existing = self.by_id.get(&client_id).copied();
        // One that takes its own connection over is no further one.
        let is_own = |c: &mut Client| c.conn.is_some() && c.session.user == user;
        let replaces = existing.and_then(|id| self.get(id)).is_some_and(is_own);
        let connected = self.connected_of(user.as_deref()).saturating_sub(u32::from(replaces));
        if limits.connections.is_some_and(|most| connected >= most) {
            let why = format!("too many clients of {}", who(user.as_deref()));
            return Err(WireError::new(reason::QUOTA_EXCEEDED, why));
        }
        let mut present = false;
        self.publish_orphans(|name, _| *name == client_id, batch);
        if let Some(id) = existing
            && self.client(id).session.is_over(clock::monotonic())
        {
            self.end_session(id, batch);
        }
        if let Some(id) = self.by_id.get(&client_id).copied() {
            let owner = self.client(id).session.user.clone();
            if owner != user {
                // Nobody reads another user's messages, and a user that is gone does not keep its client id for ever.
                if owner.as_ref().is_some_and(|o| self.users.contains_key(o)) {
                    return Err(WireError::new(
                        reason::NOT_AUTHORIZED,
                        "this client id belongs to another user's session",
                    ));
                }
                self.client(id).session.expiry_s = 0;
            }
            self.take_over(id, conn.peer, batch);
            if owner != user && self.by_id.contains_key(&client_id) {
                self.end_session(id, batch);
            }
            // The old session may have ended with its connection.
            match self.by_id.contains_key(&client_id) {
                true if clean_start => self.end_session(id, batch),
                still => present = still,
            }
        }
        if !present && self.by_id.len() >= SESSIONS_MAX {
            return Err(WireError::new(reason::QUOTA_EXCEEDED, "too many sessions"));
        }
        let existing = self.by_id.get(&client_id).copied();
        let id = match existing.filter(|_| present) {
            Some(id) => id,
            None => {
                let session = Session::new(client_id.clone(), user.clone(), 0);
                self.insert(Client {
                    session,
                    conn: None,
                    rules: Rc::clone(&rules),
                    will: None,
                    will_due: None,
                })
            }
        };
        let log = self.log.clone();
        let client = self.client(id);
        client.rules = rules;
        client.will = will.map(detach_will);
        client.will_due = None;
        if let Some(will) = &client.will {
            let row = will_row(will, &client.session.source);
            batch.changes().wills.insert(client_id.to_string(), Some(row));
        }
        client.conn = Some(Rc::clone(conn));
        client.session.expiry_s = connect.session_expiry_s;
        client.session.disconnected = None;
        let durable = connect.session_expiry_s > 0;
        if durable && client.session.consumer.is_none() {
            let consumer = log.consumer(batch, &format!("session:{client_id}"), &[]);
            client.session.lanes = lanes(&consumer, log.stream_places());
            client.session.consumer = Some(consumer);
        }
        client.session.limit_queue(limits.queued_bytes);
        conn.set_pace(Pace::new(&limits, clock::monotonic()));
        let window = if version.is_v5() {
            connect.receive_maximum.min(WINDOW_MAX)
        } else {
            WINDOW_MAX
        };
        conn.window.set(window);
        *conn.aliases_out.borrow_mut() = Aliases::new(connect.topic_alias_maximum);
        let ack = ConnAck {
            session_present: present,
            assigned_client_id: (assigned && version.is_v5()).then(|| client_id.clone()),
            receive_maximum: RECEIVE_MAXIMUM,
            topic_alias_maximum: TOPIC_ALIAS_MAX,
            packet_bytes_max: conn.packet_bytes_max,
            session_expiry_s: None,
            server_keep_alive_s: (keep_alive_s != connect.keep_alive_s).then_some(keep_alive_s),
            reason_string: None,
        };
        {
            let mut wire = conn.wire.borrow_mut();
            wire.set_limit(conn.packet_bytes_max);
            wire.connack(&mut conn.out.borrow_mut(), reason::SUCCESS, &ack);
        }
        self.touch(conn);
        if durable || present {
            self.save(id, batch);
        }
        if !durable && present {
            // A session that was durable and now ends with its connection: its place in the log goes with it at the end.
            debug!(client = %client_id, "session no longer durable");
        }
        self.counters.connections.add(1);
        *self.connected.entry(user.unwrap_or_default()).or_default() += 1;
        self.resume(id, batch);
        Ok(id)
    }

    pub(super) fn assign_id(&self) -> ByteString {
        loop {
            let mut random = [0; 8];
            // Without randomness the clock names it; the loop takes care of a clash.
            if getrandom::fill(&mut random).is_err() {
                random = clock::wall().millis().to_le_bytes();
            }
            let id: ByteString = format!("auto-{:016x}", u64::from_le_bytes(random)).into();
            if !self.by_id.contains_key(&id) {
                return id;
            }
        }
    }

    /// Another connection comes for this client id: the old one is told and its will is due (MQTT 5, 3.1.4-3).
    pub(super) fn take_over(&mut self, id: SessionId, by: Peer, batch: &mut Batch<'_>) {
        let Some(old) = self.client(id).conn.clone() else {
            return;
        };
        old.wire
            .borrow_mut()
            .disconnect(&mut old.out.borrow_mut(), reason::TAKEN_OVER, TAKEN_OVER);
        old.close(TAKEN_OVER);
        self.touch(&old);
        let client_id = self.client(id).session.client_id.clone();
        if let Some(more) = self.takeovers.note(&client_id, clock::monotonic()) {
            info!(client = %client_id, from = %old.peer, to = %by, more, "a client id was taken over; if this goes on, two devices use it");
        }
        self.disconnected(id, &old, false, batch);
    }

    /// The connection is gone; `clean` where the client said goodbye (then its will is not published).
    pub fn disconnected(&mut self, id: SessionId, conn: &Rc<Conn>, clean: bool, batch: &mut Batch<'_>) {
        let Some(client) = self.get(id) else { return };
        if !client.conn.as_ref().is_some_and(|c| Rc::ptr_eq(c, conn)) {
            return;
        }
        client.conn = None;
        self.counters
            .connections
            .set(self.counters.connections.get().saturating_sub(1));
        let user = self.client(id).session.user.clone().unwrap_or_default();
        if let Some(count) = self.connected.get_mut(&user) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.connected.remove(&user);
            }
        }
        let now = clock::monotonic();
        let client = self.client(id);
        client.session.disconnected = Some((now, clock::wall()));
        let ends = client.session.expiry_s == 0;
        if clean && client.will.take().is_some() {
            batch.changes().wills.insert(client.session.client_id.to_string(), None);
        }
        let will_waits = client.will.as_ref().is_some_and(|w| w.delay_s > 0) && !ends;
        if will_waits {
            let delay = client.will.as_ref().map_or(0, |w| w.delay_s);
            client.will_due = Some(now + Duration::from_secs(u64::from(delay)));
        } else if let Some(will) = client.will.take() {
            self.publish_will(id, will, batch);
        }
        if ends {
            self.end_session(id, batch);
        } else {
            self.park(id);
            self.member_away(id, batch);
            self.save(id, batch);
        }
    }

    /// The client is away: what was in flight is given again when it comes back.
    pub(super) fn park(&mut self, id: SessionId) {
        let client = self.client(id);
        let session = &mut client.session;
        let Some(consumer) = session.consumer.clone() else {
            return;
        };
        for (stream, lane) in session.lanes.iter_mut().enumerate() {
            if !lane.open.is_empty() || lane.behind {
                lane.read = consumer.done(stream as u16);
                lane.behind = true;
            }
            lane.reading = false;
            consumer.holds(stream as u16, None);
        }
    }

    pub(super) fn publish_will(&mut self, id: SessionId, will: codec::Will, batch: &mut Batch<'_>) {
        let session = &self.client(id).session;
        let (source, client_id) = (Arc::clone(&session.source), session.client_id.to_string());
        // Allowed when the client connected; a reload or a restart may have brought other rules.
        if !self.client(id).rules.may_publish(&will.topic) {
            info!(client = %client_id, topic = %will.topic, "a will is not published: its client may no longer publish there");
            batch.changes().wills.insert(client_id, None);
            return;
        }
        self.publish_will_of(&client_id, &source, &will, batch);
    }

    /// In one commit with the row that would bring it back.
    pub(super) fn publish_will_of(
        &mut self,
        client_id: &str,
        source: &Source,
        will: &codec::Will,
        batch: &mut Batch<'_>,
    ) {
        batch.changes().wills.insert(client_id.to_owned(), None);
        let incoming = Incoming {
            topic: &will.topic,
            payload: &will.payload,
            qos: will.qos,
            retain: will.retain,
            properties: will.properties.as_deref(),
            source,
            from: None,
            may_refuse: false,
        };
        if let Err(refused) = self.publish(&incoming, batch) {
            let why = match refused {
                Refused::InvalidTopic(e) => format!("its topic is invalid: {e}"),
                Refused::Full(stream) => format!("the stream {stream:?} is full"),
                Refused::RetainedFull => "there are too many retained messages".to_owned(),
            };
            warn!(%source, why, "a will was not published");
        }
    }

    pub(super) fn publish_orphans(&mut self, which: impl Fn(&ByteString, Instant) -> bool, batch: &mut Batch<'_>) {
        if self.orphans.is_empty() {
            return;
        }
        let (now, later) = std::mem::take(&mut self.orphans)
            .into_iter()
            .partition(|(due, name, _)| which(name, *due));
        self.orphans = later;
        for (_, name, will) in now {
            self.publish_will_of(&name, &format!("client:{name}").into(), &will, batch);
        }
    }

    /// The session and everything of it ends.
    pub(super) fn end_session(&mut self, id: SessionId, batch: &mut Batch<'_>) {
        let client = self.client(id);
        client.will_due = None;
        if let Some(will) = client.will.take() {
            self.publish_will(id, will, batch);
        }
        self.member_gone(id, batch);
        let client = self.clients[id as usize].take().expect("a session ends once");
        for filter in client.session.subscriptions.keys().filter(|f| !is_shared(f)) {
            if let Ok(filter) = TopicFilter::new(filter.clone()) {
                self.router.unsubscribe(&filter, id);
            }
        }
        let subscriptions = client.session.subscriptions.len() as u64;
        self.counters
            .subscriptions
            .set(self.counters.subscriptions.get().saturating_sub(subscriptions));
        if let Some(consumer) = &client.session.consumer {
            self.log.remove_consumer(batch, consumer.id());
            batch.changes().end_session(&client.session.client_id);
        }
        self.by_id.remove(&client.session.client_id);
        self.free.push(id);
        self.counters.sessions.set(self.by_id.len() as u64);
    }

    /// Writes what a durable session consists of into the batch.
    pub(super) fn save(&mut self, id: SessionId, batch: &mut Batch<'_>) {
        let log = self.log.clone();
        let session = &self.client(id).session;
        let Some(consumer) = &session.consumer else { return };
        let row = SessionRow {
            client_id: session.client_id.to_string(),
            expiry_s: session.expiry_s,
            disconnected: session.disconnected.map(|(_, at)| at.millis()),
            user: session.user.clone(),
            subscriptions: session.subscription_rows(),
        };
        let filters = session
            .subscriptions
            .iter()
            .filter(|(f, k)| k.qos > Qos::AtMostOnce && !is_shared(f))
            .map(|(_, k)| (k.filter.clone(), k.since));
        log.session(batch, Some(consumer), consumer.name(), filters);
        batch.changes().sessions.insert(row.client_id.clone(), Some(row));
    }

    /// After a CONNACK: what was in flight first, in order, then what came meanwhile.
    pub(super) fn resume(&mut self, id: SessionId, batch: &mut Batch<'_>) {
        self.reclaim(id);
        let client = self.client(id);
        let Some(conn) = client.conn.clone() else { return };
        forget_dropped(&mut client.session, batch);
        for packet_id in client.session.begin_again() {
            conn.wire.borrow_mut().pubrel(&mut conn.out.borrow_mut(), packet_id);
        }
        self.touch(&conn);
        for lane in &mut self.client(id).session.lanes {
            lane.behind = true;
        }
        self.pump(id, batch);
    }
}

/// `user "press-7"`
fn who(user: Option<&str>) -> String {
    match user {
        Some(user) => format!("user {user:?}"),
        None => "those without a user".to_owned(),
    }
}

/// What was in flight when the client left, and was dropped by a limit since: it is done, as the ledger says, and its id is
/// free. At QoS 2 the client may hold that id: PUBREL ends it there before it stands for another message.
fn forget_dropped(session: &mut Session, batch: &mut Batch<'_>) {
    let Some(consumer) = session.consumer.clone() else {
        return;
    };
    for (stream, lane) in session.lanes.iter_mut().enumerate() {
        let done = consumer.done(stream as u16);
        while let Some(open) = lane.open.pop_front_if(|o| o.sequence <= done) {
            if open.state == State::Claimed {
                lane.claimed = lane.claimed.saturating_sub(1);
            }
            let held = matches!(
                session.slots.get(&open.id),
                Some(Slot::Log { sequence, .. }) if *sequence == open.sequence
            );
            if !held {
                continue;
            }
            session.slots.remove(&open.id);
            if open.qos == Qos::ExactlyOnce {
                let row = (session.client_id.to_string(), open.id);
                batch.changes().outbound.insert(row, None);
                if open.state == State::Done {
                    session.ended -= 1;
                } else {
                    session.slots.insert(open.id, released());
                }
            }
        }
    }
}

/// A packet id that waits for PUBCOMP and stands for nothing else.
fn released() -> Slot {
    let topic = Topic::new("dropped").expect("it is a topic");
    let message = Message::new(topic, Bytes::new(), "gateway".into(), Timestamp::from_millis(0));
    let queued = Queued {
        message: Rc::new(message),
        qos: Qos::ExactlyOnce,
        retain: false,
        identifiers: SmallVec::new(),
    };
    Slot::Memory {
        queued,
        state: State::Received,
        nth: 0,
    }
}
