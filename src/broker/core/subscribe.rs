//! SUBSCRIBE and UNSUBSCRIBE.

use super::*;
use crate::config::SubscribeRefusal;

/// Characters of a refused filter that go into a reason.
const FILTER_SHOWN_MAX: usize = 200;

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
            match self.subscribe_one(id, text, *options, s.identifier, since, batch) {
                Ok(code) => codes.push(code),
                Err(e) => return Outcome::Close(e),
            }
        }
        let durable = self.client(id).session.consumer.is_some();
        if durable {
            self.save(id, batch);
        }
        let mut bytes = bytes::BytesMut::new();
        let refused = s
            .filters
            .iter()
            .zip(&codes)
            .find(|(_, c)| **c == reason::NOT_AUTHORIZED);
        let why = refused.map(|((filter, _), _)| {
            let shown: String = filter.chars().take(FILTER_SHOWN_MAX).collect();
            format!("the rules do not let this client subscribe to {shown:?}")
        });
        conn.wire.borrow_mut().suback(&mut bytes, s.id, &codes, why);
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
        batch: &mut Batch<'_>,
    ) -> Result<u8, WireError> {
        let text = ByteString::from(&**text);
        let filter = shared_filter(&text)
            .unwrap_or_else(|| TopicFilter::new(text.clone()))
            .map_err(|e| WireError::new(reason::MALFORMED, format!("topic filter: {e}")))?;
        if is_shared(&text) && options.no_local {
            return Err(WireError::new(
                reason::PROTOCOL_ERROR,
                "a shared subscription with no-local",
            ));
        }
        let client = self.client(id);
        if !client.rules.may_subscribe(&filter) {
            debug!(client = %client.session.client_id, %filter, "subscribe refused by the rules");
            return Ok(match client.conn.as_ref().map(|c| c.subscribe_refusal) {
                Some(SubscribeRefusal::Unspecified) => reason::UNSPECIFIED,
                Some(SubscribeRefusal::NotAuthorized) | None => reason::NOT_AUTHORIZED,
            });
        }
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
            filter: filter.clone(),
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
        if is_shared(&text) {
            self.join_group(id, &text, &filter, &kept, batch);
        } else {
            self.router.subscribe(&filter, subscription(id, &kept));
        }
        let is_group = is_shared(&text);
        let session = &mut self.client(id).session;
        session.newest_since = session.newest_since.max(kept.since);
        session.subscriptions.insert(text, kept);
        if old.is_none() {
            self.counters.subscriptions.add(1);
        }
        if is_group {
            // Retained messages are not for groups (MQTT 5, 4.8.2).
            return Ok(options.qos as u8);
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
        self.freshen_sys(filter);
        let wanted = RetainedWanted {
            // What comes before the first wildcard bounds what has to be looked at.
            literal: literal(filter),
            filter: filter.clone(),
            qos,
            identifiers: identifier.into_iter().collect(),
            after: None,
        };
        let waiting = &mut self.client(id).session.retained;
        // One that is asked for again begins anew; what waits is bounded by the number of subscriptions.
        waiting.retain(|w| w.filter != *filter);
        waiting.push_back(wanted);
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
            let filter = match shared_filter(&text).unwrap_or_else(|| TopicFilter::new(text.clone())) {
                Ok(filter) => filter,
                Err(e) => {
                    return Outcome::Close(WireError::new(reason::MALFORMED, format!("topic filter: {e}")));
                }
            };
            self.client(id).session.retained.retain(|w| w.filter != filter);
            if self.client(id).session.subscriptions.remove(&text).is_some() {
                if is_shared(&text) {
                    self.leave_group(id, &text, batch);
                } else {
                    self.router.unsubscribe(&filter, id);
                }
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
