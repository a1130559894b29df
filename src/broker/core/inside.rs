//! Connectors, modules and uplinks: publishing with effects, durable consumers.

use super::*;
use crate::log::consumer::notice;

impl Core {
    /// Publishes for a connector, module or uplink; the answer comes with the commit.
    pub fn apply(
        &mut self,
        name: &str,
        effects: Effects,
        cursors: Vec<(i64, u16, u64)>,
        reply: oneshot::Sender<Result<(), PublishError>>,
        batch: &mut Batch<'_>,
    ) {
        let log = self.log.clone();
        // Nothing of it, or all of it: what would be refused is looked for first.
        for message in &effects.publish {
            let Ok(route) = self.router.route(message.topic.as_byte_string(), |t| log.stream_of(t)) else {
                continue;
            };
            if let Some(stream) = route.stream.filter(|_| !route.consumers.is_empty()) {
                let state = log.stream(stream);
                if state.when_full() == WhenFull::Reject && state.is_full() {
                    let _ = reply.send(Err(PublishError::Full(state.name.clone())));
                    return;
                }
            }
        }
        let mut durable = !cursors.is_empty() || !effects.dead.is_empty() || !effects.state.is_empty();
        for message in &effects.publish {
            self.counters.received.bump(1);
            self.counters.received_bytes.bump(message.payload.len() as u64);
            match self.publish(&Incoming::of(message), batch) {
                Ok(waits) => durable |= waits,
                // Only a retained message too many is left to be refused: it is delivered to nobody and said so.
                Err(_) => {
                    let mut row = loss(
                        "gateway",
                        &message.source,
                        "refused",
                        message.size_bytes() as u64,
                        clock::wall(),
                    );
                    row.count = 1;
                    batch.changes().losses.push(row);
                }
            }
        }
        let changes = batch.changes();
        for (consumer, stream, sequence) in cursors {
            changes.cursors.insert((consumer, stream), sequence);
        }
        changes.dead.extend(
            effects
                .dead
                .iter()
                .filter(|(e, _)| !e.notice)
                .map(|(entry, why)| dead_row(name, entry, why)),
        );
        let module = name.strip_prefix("module:").unwrap_or(name);
        for (key, value) in effects.state {
            changes.module_state.insert((module.to_owned(), key), value);
        }
        if durable {
            let ticket = batch.ticket();
            self.waiting.push_back((ticket, Waiting::Reply(reply)));
        } else {
            let _ = reply.send(Ok(()));
        }
    }

    /// Opens a durable consumer for an uplink or a module.
    pub fn open_consumer(&mut self, name: &str, filters: &[TopicFilter], batch: &mut Batch<'_>) -> Arc<ConsumerState> {
        if let Some(old) = self.log.find_consumer(name) {
            for (filter, _) in old.filters().iter() {
                self.router.remove_consumer(filter, old.id());
            }
        }
        let state = self.log.consumer(batch, name, filters);
        for filter in filters {
            self.router.add_consumer(filter, &state);
        }
        state
    }

    pub fn add_tap(&mut self, feed: Feed) {
        self.taps.push(feed);
    }

    /// Who would get a message of this topic and QoS now.
    pub fn audience(&mut self, topic: &Topic, qos: Qos) -> Audience {
        let mut audience = Audience {
            durable: Vec::new(),
            live: 0,
        };
        let log = self.log.clone();
        let Ok(route) = self.router.route(topic.as_byte_string(), |t| log.stream_of(t)) else {
            return audience;
        };
        audience
            .durable
            .extend(route.consumers.iter().map(|c| c.name().to_owned()));
        for id in &route.groups {
            match self.group_consumer(*id) {
                Some(name) if qos > Qos::AtMostOnce => audience.durable.push(name),
                _ => audience.live += 1,
            }
        }
        for r in &route.recipients {
            let Some(client) = self.get(r.session) else { continue };
            if !client.rules.may_receive(topic.as_str()) {
                continue;
            }
            match &client.session.consumer {
                Some(consumer) if qos.min(r.qos) > Qos::AtMostOnce => audience.durable.push(consumer.name().to_owned()),
                _ if client.conn.is_some() => audience.live += 1,
                _ => {}
            }
        }
        audience
    }

    /// Nothing new is for this consumer; its backlog stays.
    pub fn retire_consumer(&mut self, name: &str, batch: &mut Batch<'_>) {
        if let Some(state) = self.log.find_consumer(name) {
            for (filter, _) in state.filters().iter() {
                self.router.remove_consumer(filter, state.id());
            }
            self.log.retire(batch, &state);
        }
    }

    /// Publishes an entry of the ledger, in one commit with the mark that it was.
    pub fn tell_loss(&mut self, row: &LossRow, batch: &mut Batch<'_>) {
        let message = notice(self.log.log_id(), row, clock::wall());
        // A full stream refuses it: it comes again with the next entry.
        if self.publish(&Incoming::of(&message), batch).is_ok() {
            batch.changes().losses_sent.push((row.id, row.count));
        }
    }
}
