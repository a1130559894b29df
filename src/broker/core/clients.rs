//! What `tidegate client` and `tidegate topic` ask for: pages of sessions and of retained messages, one client whole, a kick.
//!
//! A page looks at a bounded number of entries and says where the next one begins, so that a hundred thousand of them hold
//! nobody up and fill no memory. What comes or goes between two pages may be in one, in none, or gone when it is shown.

use super::*;
use crate::broker::handle::{ClientDetail, ClientEntry, ClientsPage, RetainedPage, Subscribed};

/// Entries that one page looks at.
const CLIENTS_A_PAGE: usize = 512;
const RETAINED_A_PAGE: usize = 2_048;
/// What a page of retained messages holds at most; one larger message has a page for itself.
const RETAINED_PAGE_BYTES: usize = 256 << 10;
/// Retained messages that one step of `topic clear` removes.
const CLEARED_A_PAGE: usize = 256;
/// Subscriptions that are shown of one client; the rest is a number.
const SUBSCRIPTIONS_SHOWN: usize = 1_000;

impl Core {
    /// Sessions from a place on. The order is that of their places, which a session keeps as long as it lives.
    pub fn clients_page(&mut self, from: SessionId) -> ClientsPage {
        let from = from as usize;
        let to = (from + CLIENTS_A_PAGE).min(self.clients.len());
        let clients = self.clients.get(from..to).unwrap_or_default().iter().flatten();
        ClientsPage {
            clients: clients.map(|c| entry(c)).collect(),
            next: (to < self.clients.len()).then_some(to as SessionId),
        }
    }

    pub fn client_detail(&mut self, client_id: &str) -> Option<ClientDetail> {
        let id = *self.by_id.get(client_id)?;
        let client = self.clients.get(id as usize)?.as_ref()?;
        let session = &client.session;
        let subscriptions = session.subscriptions.iter().take(SUBSCRIPTIONS_SHOWN);
        let mut subscriptions: Vec<Subscribed> = subscriptions
            .map(|(filter, kept)| Subscribed {
                filter: filter.to_string(),
                qos: kept.qos as u8,
                no_local: kept.no_local,
                identifier: kept.identifier,
            })
            .collect();
        subscriptions.sort_by(|a, b| a.filter.cmp(&b.filter));
        let conn = client.conn.as_ref();
        Some(ClientDetail {
            entry: entry(client),
            subscriptions,
            in_flight: session.in_flight() as u64,
            inbound: session.inbound.len() as u64,
            unsent_bytes: conn.map_or(0, |c| c.out.borrow().len() as u64),
            dropped: conn.map_or(0, |c| c.dropped.get()),
            throttled: conn.map_or(0, |c| c.throttled.get()),
            listener: conn.map(|c| c.entrance.borrow().to_string()),
            will_topic: client.will.as_ref().map(|w| w.topic.to_string()),
            limits: self
                .grant_of(session.user.as_deref())
                .map(|g| g.limits)
                .unwrap_or_default(),
            clients_of_user: self.connected_of(session.user.as_deref()),
        })
    }

    /// Ends a client's connection, and with `end_session` what is kept of it. None: no such client. Some(false): it was away
    /// and nothing was to be done. Otherwise the answer comes by `reply`, when it is on disk.
    pub fn kick(
        &mut self,
        client_id: &str,
        end_session: bool,
        reply: oneshot::Sender<Result<(), PublishError>>,
        batch: &mut Batch<'_>,
    ) -> Option<bool> {
        let id = *self.by_id.get(client_id)?;
        let conn = self.client(id).conn.clone();
        if conn.is_none() && !end_session {
            return Some(false);
        }
        if let Some(conn) = conn {
            const WHY: &str = "the administrator ended the connection";
            info!(client = client_id, end_session, "kicked");
            conn.wire
                .borrow_mut()
                .disconnect(&mut conn.out.borrow_mut(), reason::ADMINISTRATIVE_ACTION, WHY);
            conn.close(WHY);
            self.touch(&conn);
            self.disconnected(id, &conn, false, batch);
        }
        if end_session && let Some(id) = self.by_id.get(client_id).copied() {
            self.end_session(id, batch);
        }
        let ticket = batch.ticket();
        self.waiting.push_back((ticket, Waiting::Reply(reply)));
        Some(true)
    }

    /// Retained messages behind a topic that match, in their order.
    pub fn retained_page(&mut self, filter: &TopicFilter, after: Option<&str>) -> RetainedPage {
        let now = clock::wall();
        let mut page = RetainedPage::default();
        let mut bytes = 0;
        for (looked, (topic, message)) in self.retained_behind(filter, after).enumerate() {
            if looked >= RETAINED_A_PAGE || bytes > RETAINED_PAGE_BYTES {
                page.more = true;
                break;
            }
            page.looked_to = Some(topic.as_str().to_owned());
            if filter.matches(topic.as_str()) && !message.is_expired(now) {
                bytes += message.size_bytes() + 64;
                page.messages.push(Message::clone(message));
            }
        }
        page
    }

    /// Takes away some retained messages behind a topic that match, as a client does: by an empty retained message, which
    /// subscribers and routes get as well. Returns how many, and where to go on; the answer comes by `reply`.
    pub fn clear_retained(
        &mut self,
        filter: &TopicFilter,
        after: Option<&str>,
        reply: oneshot::Sender<Result<(), PublishError>>,
        batch: &mut Batch<'_>,
    ) -> (u64, Option<String>) {
        let mut found: Vec<Topic> = Vec::new();
        let mut looked_to = None;
        let mut more = false;
        for (looked, (topic, _)) in self.retained_behind(filter, after).enumerate() {
            if looked >= RETAINED_A_PAGE || found.len() >= CLEARED_A_PAGE {
                more = true;
                break;
            }
            looked_to = Some(topic.as_str().to_owned());
            if filter.matches(topic.as_str()) {
                found.push(topic.clone());
            }
        }
        let (now, source): (_, Source) = (clock::wall(), "admin".into());
        let mut cleared = 0;
        for topic in found {
            let mut message = Message::new(topic, Bytes::new(), Arc::clone(&source), now);
            message.retain = true;
            if let Err(refused) = self.publish(&Incoming::of(&message), batch) {
                let why = match refused {
                    Refused::Full(stream) => PublishError::Full(stream),
                    Refused::InvalidTopic(_) | Refused::RetainedFull => continue,
                };
                let _ = reply.send(Err(why));
                return (cleared, None);
            }
            cleared += 1;
        }
        if cleared == 0 {
            let _ = reply.send(Ok(()));
        } else {
            let ticket = batch.ticket();
            self.waiting.push_back((ticket, Waiting::Reply(reply)));
        }
        (cleared, looked_to.filter(|_| more))
    }

    /// In order, only where the filter's first levels allow for a match.
    fn retained_behind<'c>(
        &'c self,
        filter: &TopicFilter,
        after: Option<&str>,
    ) -> impl Iterator<Item = (&'c Topic, &'c Rc<Message>)> + use<'c> {
        let literal = literal(filter);
        let from = match after {
            Some(after) if after >= literal.as_str() => Bound::Excluded(after.to_owned()),
            _ => Bound::Included(literal.clone()),
        };
        let range = (from.as_ref().map(String::as_str), Bound::Unbounded);
        self.retained
            .range::<str, _>(range)
            .take_while(move |(topic, _)| topic.as_str().starts_with(&literal))
    }
}

fn entry(client: &Client) -> ClientEntry {
    let (session, conn) = (&client.session, client.conn.as_ref());
    let (logged_messages, logged_bytes) = session.consumer.as_ref().map_or((0, 0), |c| c.queued());
    ClientEntry {
        client_id: session.client_id.to_string(),
        user: session.user.clone(),
        peer: conn.map(|c| c.peer.to_string()),
        version: conn.map(|c| c.version().name()),
        since: conn.map(|c| c.since).or(session.disconnected.map(|(_, at)| at)),
        expiry_s: session.expiry_s,
        subscriptions: session.subscriptions.len() as u64,
        queued_messages: logged_messages + session.queue.len() as u64,
        queued_bytes: logged_bytes + session.queue_bytes as u64,
    }
}
