//! Rights change while clients are connected: at once for what they publish, what is delivered and what is queued.

use std::collections::HashSet;

use super::*;
use crate::broker::listen::is_served;
use crate::config::{Listener, Stream};
use crate::log::NoPlace;

impl Core {
    /// `gone`: users that are no longer there or have another password; their clients are disconnected, nobody else is.
    pub fn set_rules(&mut self, anonymous: Rules, users: HashMap<String, Rules>, gone: &HashSet<String>) {
        self.default_rules = Rc::new(anonymous);
        self.users = users.into_iter().map(|(name, rules)| (name, Rc::new(rules))).collect();
        for id in 0..self.clients.len() as SessionId {
            let Some(user) = self.get(id).map(|c| c.session.user.clone()) else {
                continue;
            };
            let rules = self.rules_of(user.as_deref());
            self.client(id).rules = rules;
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

    fn send_away(&mut self, id: SessionId, code: u8, why: &str) {
        let client = self.client(id);
        let Some(conn) = client.conn.clone() else { return };
        info!(client = %client.session.client_id, why, "disconnected by a reload");
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
