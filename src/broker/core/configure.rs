//! Rights change while clients are connected: at once for what they publish, what is delivered and what is queued.

use std::collections::HashSet;

use super::connect::UNFIT_ID;
use super::*;
use crate::broker::listen::is_served;
use crate::broker::pace::Pace;
use crate::config::{BrokerSettings, Listener, Stream};
use crate::log::NoPlace;

/// A client over its limit that acknowledges nothing for so long is sent away.
const STUCK_AFTER: Duration = Duration::from_secs(10);

impl Core {
    /// `gone`: users that are no longer there or have another password; their clients are disconnected, and those whose
    /// client id cannot stand in their new rules; nobody else is. Rates and what may wait hold at once; connections and
    /// subscriptions that are there stay.
    pub fn set_grants(&mut self, anonymous: Grant, users: HashMap<String, Grant>, gone: &HashSet<String>) {
        self.anonymous = anonymous;
        self.users = users;
        let now = clock::monotonic();
        for id in 0..self.clients.len() as SessionId {
            let Some(session) = self.get(id).map(|c| &c.session) else {
                continue;
            };
            let (user, client_id) = (session.user.clone(), session.client_id.clone());
            let limits = self.grant_of(user.as_deref()).map(|g| g.limits).unwrap_or_default();
            let rules = self.grant_of(user.as_deref()).map(|g| g.rules(&client_id));
            let is_unfit = matches!(rules, Some(Err(_)));
            let client = self.client(id);
            client.rules = rules.and_then(Result::ok).unwrap_or_default();
            client.session.limit_queue(limits.queued_bytes);
            if let Some(conn) = &client.conn {
                conn.set_pace(Pace::new(&limits, now));
            }
            if is_unfit {
                self.send_away(id, reason::NOT_AUTHORIZED, UNFIT_ID);
            }
            if user.is_some_and(|user| gone.contains(&user)) {
                self.send_away(
                    id,
                    reason::NOT_AUTHORIZED,
                    "its user was removed or has another password",
                );
            }
        }
    }

    /// Clients that could not have come through any of these listeners are disconnected.
    pub fn set_listeners(&mut self, listeners: &[Listener]) {
        for id in 0..self.clients.len() as SessionId {
            let Some(client) = self.get(id) else { continue };
            let Some(conn) = &client.conn else { continue };
            if !is_served(listeners, &conn.entrance.borrow(), client.session.user.is_none()) {
                self.send_away(
                    id,
                    reason::ADMINISTRATIVE_ACTION,
                    "its listener takes such clients no longer",
                );
            }
        }
    }

    pub fn set_streams(&mut self, streams: &[Stream], batch: &mut Batch<'_>) -> Result<(), NoPlace> {
        self.log.set_streams(batch, streams)?;
        self.router.forget_routes();
        Ok(())
    }

    pub fn set_settings(&mut self, settings: &BrokerSettings) {
        self.settings = settings.clone();
        self.sys.set_every(settings.sys_interval);
    }

    /// A client that has more waiting in the log than may, and acknowledges nothing: nothing can be dropped behind what it
    /// holds while it is here.
    pub(super) fn is_stuck(&mut self, id: SessionId, now: Instant) -> bool {
        let Some(session) = self.get(id).map(|c| &mut c.session) else {
            return false;
        };
        if !session.is_over_limit() || session.slots.is_empty() || session.disconnected.is_some() {
            session.stuck = None;
            return false;
        }
        let consumer = session.consumer.as_ref();
        let done = consumer.map_or(0, |c| (0..session.lanes.len()).map(|s| c.done(s as u16)).sum());
        match session.stuck {
            Some((at, since)) if at == done => now.saturating_duration_since(since) >= STUCK_AFTER,
            _ => {
                session.stuck = Some((done, now));
                false
            }
        }
    }

    pub(super) fn send_away(&mut self, id: SessionId, code: u8, why: &str) {
        let client = self.client(id);
        let Some(conn) = client.conn.clone() else { return };
        info!(client = %client.session.client_id, why, "disconnected by the gateway");
        conn.wire.borrow_mut().disconnect(&mut conn.out.borrow_mut(), code, why);
        conn.close(why);
        self.touch(&conn);
    }

    /// Whether a commit still goes through everything: the answer comes with one.
    pub fn prove(&mut self, reply: oneshot::Sender<Result<(), PublishError>>, batch: &mut Batch<'_>) {
        batch.changes().proof = Some(clock::wall().millis());
        let ticket = batch.ticket();
        self.waiting.push_back((ticket, Waiting::Reply(reply)));
    }
}
