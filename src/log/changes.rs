//! What one commit changes beside the segments: plain rows, the newest of each key. Pure.
//!
//! A retained topic that changes a thousand times within one commit is one row here, not a thousand.

use serde::{Deserialize, Serialize};

#[cfg(not(test))]
pub type Map<K, V> = std::collections::HashMap<K, V>;
/// Under test in an order that is the same each time, so that a run can be repeated.
#[cfg(test)]
pub type Map<K, V> = std::collections::HashMap<K, V, std::hash::BuildHasherDefault<std::hash::DefaultHasher>>;

/// A filter of a consumer and the sequence from which it counts (exclusive).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterRow {
    pub filter: String,
    pub since: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConsumerRow {
    /// `uplink:NAME`, `module:NAME` or `session:CLIENT-ID`.
    pub name: String,
    pub filters: Vec<FilterRow>,
    /// Set where the configuration no longer has this consumer: nothing after this sequence is for it.
    pub until: Option<u64>,
}

/// A persistent MQTT session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SessionRow {
    pub client_id: String,
    /// MQTT 5 session expiry interval in seconds; `u32::MAX`: never.
    pub expiry_s: u32,
    /// Wall time of the disconnect; None while connected (or where the daemon was killed).
    pub disconnected: Option<i64>,
    /// Who it belongs to; another user may not take it over.
    pub user: Option<String>,
    pub subscriptions: Vec<SubscriptionRow>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubscriptionRow {
    /// As subscribed, `$share/…` included.
    pub filter: String,
    pub qos: u8,
    pub no_local: bool,
    pub retain_as_published: bool,
    pub identifier: Option<u32>,
    pub since: u64,
}

/// The will of a connection that is open: published after the next start where a kill of the daemon ended it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WillRow {
    /// Filled in when it is read; the key when it is written.
    pub client_id: String,
    /// The encoded message ([`super::record::encode_one`]).
    pub record: Vec<u8>,
    pub delay_s: u32,
}

/// An outbound QoS 2 message of a session whose packet id is spent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboundRow {
    pub client_id: String,
    pub packet_id: u16,
    pub stream: u16,
    pub sequence: u64,
    /// The client has it (PUBREC came): PUBREL is what is owed.
    pub received: bool,
    /// Of a shared subscription: the consumer that it was read for.
    pub shared: Option<i64>,
}

/// Messages that did not reach a consumer, declared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LossRow {
    #[serde(skip)]
    pub id: i64,
    pub consumer: String,
    pub source: String,
    /// `full`, `expired`, `refused`, `damaged`, `slow` …
    pub reason: String,
    pub first: u64,
    pub last: u64,
    pub count: u64,
    pub bytes: u64,
    pub oldest: i64,
    pub newest: i64,
    pub at: i64,
}

/// A message that a remote or a module refuses for good.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadRow {
    pub consumer: String,
    pub reason: String,
    pub at: i64,
    pub record: Vec<u8>,
}

#[derive(Debug, Default)]
pub struct Changes {
    /// Streams that are new.
    pub streams: Map<u16, String>,
    pub retained: Map<String, Option<Vec<u8>>>,
    pub sessions: Map<String, Option<SessionRow>>,
    /// Sessions that ended: their ids of QoS 2 go first, also where a new one of that name begins in the same commit.
    pub ended: Vec<String>,
    pub wills: Map<String, Option<WillRow>>,
    pub inbound: Map<(String, u16), bool>,
    pub outbound: Map<(String, u16), Option<OutboundRow>>,
    pub consumers: Map<i64, Option<ConsumerRow>>,
    /// Cursors that belong to this commit's effects; others are flushed when due.
    pub cursors: Map<(i64, u16), u64>,
    pub losses: Vec<LossRow>,
    /// Ledger entries that were sent, with the count that was sent.
    pub losses_sent: Vec<(i64, u64)>,
    pub dead: Vec<DeadRow>,
    pub module_state: Map<(String, String), Option<Vec<u8>>>,
    /// When the watchdog last had the writer prove that it writes: one row, written over.
    pub proof: Option<i64>,
    /// Tables bounded by the number of rows: (table, rows kept).
    pub trims: Vec<(&'static str, u64)>,
}

impl Changes {
    pub fn is_empty(&self) -> bool {
        self.streams.is_empty()
            && self.retained.is_empty()
            && self.sessions.is_empty()
            && self.ended.is_empty()
            && self.wills.is_empty()
            && self.inbound.is_empty()
            && self.outbound.is_empty()
            && self.consumers.is_empty()
            && self.cursors.is_empty()
            && self.losses.is_empty()
            && self.losses_sent.is_empty()
            && self.dead.is_empty()
            && self.module_state.is_empty()
            && self.proof.is_none()
    }

    /// A session is over: nothing of it stays, and nothing of it that is in this commit is written.
    pub fn end_session(&mut self, client_id: &str) {
        self.inbound.retain(|(client, _), _| client != client_id);
        self.outbound.retain(|(client, _), _| client != client_id);
        self.sessions.insert(client_id.to_owned(), None);
        self.ended.push(client_id.to_owned());
    }

    /// After a failed commit: what is still true goes into the next one, where nothing newer stands there. What was
    /// refused to its caller (effects, dead letters, QoS 2 ids) is not repeated: the caller comes again.
    pub fn carry_into(self, next: &mut Changes) {
        fn older<K: std::hash::Hash + Eq, V>(from: Map<K, V>, into: &mut Map<K, V>) {
            for (key, value) in from {
                into.entry(key).or_insert(value);
            }
        }
        older(self.streams, &mut next.streams);
        older(self.retained, &mut next.retained);
        older(self.sessions, &mut next.sessions);
        // Those that end first: what stands in the next commit came after them.
        next.ended.splice(0..0, self.ended);
        older(self.wills, &mut next.wills);
        older(self.consumers, &mut next.consumers);
        // Ids that were given free stay free; ids that were taken were refused with their message.
        older(
            self.inbound.into_iter().filter(|(_, present)| !present).collect(),
            &mut next.inbound,
        );
        older(self.outbound, &mut next.outbound);
        for row in self.losses {
            merge(&mut next.losses, row);
        }
        next.losses_sent.extend(self.losses_sent);
    }
}

/// More entries than this wait for a disk that works again: what else is lost is declared without its source.
const LOSSES_WAITING_MAX: usize = 4_096;

/// Adds to the entry of the same consumer, source and reason, so that a long failure needs no memory without end.
fn merge(losses: &mut Vec<LossRow>, mut row: LossRow) {
    if losses.len() >= LOSSES_WAITING_MAX {
        row.source = "(others)".into();
    }
    let same = |l: &&mut LossRow| l.consumer == row.consumer && l.source == row.source && l.reason == row.reason;
    let Some(entry) = losses.iter_mut().find(same) else {
        return losses.push(row);
    };
    entry.first = entry.first.min(row.first);
    entry.last = entry.last.max(row.last);
    entry.count += row.count;
    entry.bytes += row.bytes;
    entry.oldest = entry.oldest.min(row.oldest);
    entry.newest = entry.newest.max(row.newest);
    entry.at = entry.at.max(row.at);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_commit_carries_what_is_still_true() {
        let mut failed = Changes::default();
        failed.retained.insert("a".into(), Some(vec![1]));
        failed.retained.insert("b".into(), Some(vec![1]));
        failed.inbound.insert(("c".into(), 1), true);
        failed.inbound.insert(("c".into(), 2), false);
        failed.cursors.insert((1, 0), 5);
        let mut next = Changes::default();
        next.retained.insert("b".into(), None);
        failed.carry_into(&mut next);
        assert_eq!(next.retained["a"], Some(vec![1]));
        assert_eq!(next.retained["b"], None, "the newer one stands");
        assert_eq!(next.inbound, Map::from_iter([(("c".into(), 2), false)]));
        assert!(
            next.cursors.is_empty(),
            "effects that were refused are not applied later"
        );
    }
}
