//! SUBSCRIBE and UNSUBSCRIBE.

use super::*;

impl Core {
    pub(super) fn on_subscribe(
        &mut self,
        id: SessionId,
        conn: &Rc<Conn>,
        s: codec::Subscribe,
        batch: &mut Batch<'_>,
    ) -> Outcome {
        if s.filters.is_empty() {
            return Outcome::Close(WireError::new(reason::PROTOCOL_ERROR, "a SUBSCRIBE without a filter"));
        }
        let since = batch.sequence();
        let mut codes = Vec::with_capacity(s.filters.len());
        for (text, options) in &s.filters {
            match self.subscribe_one(id, text, *options, s.identifier, since) {
                Ok(code) => codes.push(code),
                Err(e) => return Outcome::Close(e),
            }
        }
        let durable = self.client(id).session.consumer.is_some();
        if durable {
            self.save(id, batch);
        }
        let mut bytes = bytes::BytesMut::new();
        conn.wire.borrow_mut().suback(&mut bytes, s.id, &codes);
        self.answer(conn, bytes.freeze(), durable, batch);
        self.pump(id, batch);
        Outcome::Continue
    }

    /// An answer that follows the commit where the session is durable.
    pub(super) fn answer(&mut self, conn: &Rc<Conn>, bytes: Bytes, durable: bool, batch: &mut Batch<'_>) {
        if durable {
            conn.owed.set(conn.owed.get() + 1);
            let ticket = batch.ticket();
            self.waiting.push_back((
                ticket,
                Waiting::Frame {
                    conn: Rc::clone(conn),
                    bytes,
                },
            ));
        } else {
            conn.out.borrow_mut().extend_from_slice(&bytes);
            self.touch(conn);
        }
    }

    pub(super) fn subscribe_one(
        &mut self,
        id: SessionId,
        text: &ByteString,
        options: codec::SubscribeOptions,
        identifier: Option<u32>,
        since: u64,
    ) -> Result<u8, WireError> {
        if text.starts_with("$share/") {
            if options.no_local {
                return Err(WireError::new(
                    reason::PROTOCOL_ERROR,
                    "a shared subscription with no-local",
                ));
            }
            return Ok(reason::SHARED_NOT_SUPPORTED);
        }
        let filter = TopicFilter::new(ByteString::from(&**text))
            .map_err(|e| WireError::new(reason::MALFORMED, format!("topic filter: {e}")))?;
        let client = self.client(id);
        if !client.rules.may_subscribe(&filter) {
            debug!(client = %client.session.client_id, %filter, "subscribe refused by the rules");
            return Ok(match self.settings.hides_refused_subscribe {
                true => reason::UNSPECIFIED,
                false => reason::NOT_AUTHORIZED,
            });
        }
        let text = ByteString::from(filter.as_str());
        let old = client.session.subscriptions.get(&text).cloned();
        if old.is_none() {
            let (user, count) = (client.session.user.clone(), client.session.subscriptions.len());
            let most = self.grant_of(user.as_deref()).and_then(|g| g.limits.subscriptions);
            if most.is_some_and(|most| count >= most as usize) {
                debug!(client = %self.client(id).session.client_id, %filter, "too many subscriptions");
                return Ok(reason::QUOTA_EXCEEDED);
            }
        }
        let kept = Kept {
            qos: options.qos,
            no_local: options.no_local,
            retain_as_published: options.retain_as_published,
            identifier,
            // A subscription that is renewed keeps its place; one that could not be owed anything begins now.
            since: old
                .as_ref()
                .filter(|o| o.qos > Qos::AtMostOnce)
                .map_or(since, |o| o.since),
        };
        self.router.subscribe(&filter, subscription(id, &kept));
        self.client(id).session.subscriptions.insert(text, kept);
        if old.is_none() {
            self.counters.subscriptions.add(1);
        }
        let send_retained = match options.retain_handling {
            0 => true,
            1 => old.is_none(),
            _ => false,
        };
        if send_retained {
            self.queue_retained(id, &filter, options.qos, identifier);
        }
        Ok(options.qos as u8)
    }

    pub(super) fn queue_retained(&mut self, id: SessionId, filter: &TopicFilter, qos: Qos, identifier: Option<u32>) {
        let identifiers: SmallVec<[u32; 1]> = identifier.into_iter().collect();
        // What comes before the first wildcard bounds what has to be looked at.
        let literal = literal(filter);
        let mut found: Vec<_> = self
            .sys_topics(filter)
            .into_iter()
            .map(|t| (t, qos, identifiers.clone()))
            .collect();
        let from = (Bound::Included(literal.as_str()), Bound::Unbounded);
        for (topic, _) in self.retained.range::<str, _>(from) {
            if !topic.as_str().starts_with(&literal) {
                break;
            }
            if filter.matches(topic.as_str()) {
                found.push((topic.clone(), qos, identifiers.clone()));
            }
        }
        self.client(id).session.retained.extend(found);
    }

    pub(super) fn on_unsubscribe(
        &mut self,
        id: SessionId,
        conn: &Rc<Conn>,
        packet_id: u16,
        filters: Vec<ByteString>,
        batch: &mut Batch<'_>,
    ) -> Outcome {
        if filters.is_empty() {
            return Outcome::Close(WireError::new(
                reason::PROTOCOL_ERROR,
                "an UNSUBSCRIBE without a filter",
            ));
        }
        let mut codes = Vec::with_capacity(filters.len());
        for text in filters {
            let Ok(filter) = TopicFilter::new(text.clone()) else {
                codes.push(reason::TOPIC_FILTER_INVALID);
                continue;
            };
            if self.client(id).session.subscriptions.remove(&text).is_some() {
                self.router.unsubscribe(&filter, id);
                self.counters
                    .subscriptions
                    .set(self.counters.subscriptions.get().saturating_sub(1));
                codes.push(reason::SUCCESS);
            } else {
                codes.push(reason::NO_SUBSCRIPTION_EXISTED);
            }
        }
        let durable = self.client(id).session.consumer.is_some();
        if durable {
            self.save(id, batch);
        }
        let mut bytes = bytes::BytesMut::new();
        conn.wire.borrow_mut().unsuback(&mut bytes, packet_id, &codes);
        self.answer(conn, bytes.freeze(), durable, batch);
        Outcome::Continue
    }
}
