//! Between the log and the connection: which entries are on their way, and which of them are done. Pure.
//!
//! Entries are confirmed to the log strictly in order, whatever the order of the remote's answers. So what a cut or a
//! refusal brings back is always a whole tail, and the last value the remote gets for a topic is the last one there
//! is: if 50 was refused and 51 taken, both are sent again, 50 first.

use std::collections::{HashMap, VecDeque};

use super::session::{Session, Token, Unsendable, reason};
use crate::clock::{Instant, Timestamp};
use crate::log::consumer::{Entry, Position};
use crate::message::{Sequence, Topic};
use crate::uplinks::routes::Routes;

#[derive(Debug)]
struct Item {
    entry: Entry,
    /// PUBLISHes of this entry that have no answer yet, sent or not.
    open: u32,
    publishes: u32,
    /// Refused for good, with the reason.
    dead: Option<String>,
}

/// What becomes of an entry that is done.
#[derive(Debug)]
pub(super) enum Done {
    /// `sent`: the remote confirmed it; else it was not for this remote.
    Acknowledge {
        position: Position,
        sent: bool,
    },
    Dead(Entry, String),
}

#[derive(Debug, Default)]
pub(super) struct Outbox {
    items: VecDeque<Item>,
    /// The token of the first item; tokens count on.
    first: Token,
    unsent: VecDeque<(Token, Topic)>,
    bytes: usize,
    /// Set by a temporary refusal: nothing from this item on is confirmed, all of it is read from the log again.
    refused: Option<Refusal>,
    /// The last sequence that was ever sent, by stream: what comes again at or below it is sent again.
    sent: HashMap<u16, Sequence>,
    pub(super) published: u64,
    pub(super) resent: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    token: Token,
    pub(super) code: u8,
}

impl Outbox {
    /// Takes an entry that the log gave. One that is not for this remote is done at once.
    pub(super) fn push(&mut self, entry: Entry, routes: &Routes) {
        let token = self.first + self.items.len() as Token;
        let mut item = Item {
            entry,
            open: 0,
            publishes: 0,
            dead: None,
        };
        match routes.up(&item.entry) {
            Ok(topics) => {
                item.publishes = topics.len() as u32;
                item.open = item.publishes;
                self.unsent.extend(topics.into_iter().map(|topic| (token, topic)));
            }
            Err(error) => item.dead = Some(format!("the topic its route makes is not valid: {error}")),
        }
        self.bytes += item.entry.message.size_bytes();
        self.items.push_back(item);
    }

    /// Sends what waits, as far as the window allows.
    pub(super) fn send(&mut self, session: &mut Session, wall: Timestamp, now: Instant) {
        if self.refused.is_some() {
            return;
        }
        while session.capacity() > 0 {
            let Some((token, topic)) = self.unsent.pop_front() else {
                break;
            };
            let Some(item) = self.items.get_mut((token - self.first) as usize) else {
                continue;
            };
            match session.publish(token, &topic, &item.entry.message, wall, now) {
                Ok(()) => {
                    self.published += 1;
                    let position = item.entry.position;
                    let sent = self.sent.entry(position.stream).or_default();
                    if position.sequence <= *sent {
                        self.resent += 1;
                    } else {
                        *sent = position.sequence;
                    }
                }
                Err(unsendable @ (Unsendable::TooLarge { .. } | Unsendable::Encoding(_))) => {
                    item.dead.get_or_insert_with(|| unsendable.to_string());
                    item.open -= 1;
                }
            }
        }
    }

    /// The remote has it.
    pub(super) fn acknowledged(&mut self, token: Token) {
        if let Some(item) = token
            .checked_sub(self.first)
            .and_then(|n| self.items.get_mut(n as usize))
        {
            item.open = item.open.saturating_sub(1);
        }
    }

    /// The remote refused it. Three reasons are about this very message and will never change: it goes to the dead
    /// letters. All others (quota, authorization, what the remote does not say) may be mended at the remote: it is
    /// kept, and sent again with all that follows it.
    pub(super) fn refused(&mut self, token: Token, code: u8) {
        if matches!(code, 0x90 | 0x95 | 0x99) {
            if let Some(item) = token
                .checked_sub(self.first)
                .and_then(|n| self.items.get_mut(n as usize))
            {
                item.dead
                    .get_or_insert_with(|| format!("the remote refused it: {}", reason(code, None)));
                item.open = item.open.saturating_sub(1);
            }
        } else if self.refused.as_ref().is_none_or(|r| token < r.token) {
            self.refused = Some(Refusal { token, code });
        }
    }

    /// The next entry, in order, that is done.
    pub(super) fn done(&mut self) -> Option<Done> {
        let item = self.items.pop_front_if(|item| item.open == 0)?;
        if self.refused.as_ref().is_some_and(|r| r.token <= self.first) {
            self.items.push_front(item);
            return None;
        }
        self.first += 1;
        self.bytes -= item.entry.message.size_bytes();
        Some(match item.dead {
            None => Done::Acknowledge {
                position: item.entry.position,
                sent: item.publishes > 0,
            },
            Some(reason) => Done::Dead(item.entry, reason),
        })
    }

    /// A temporary refusal that is to be answered by reading the log again, once nothing is in flight any more.
    pub(super) fn refusal(&self) -> Option<&Refusal> {
        self.refused.as_ref()
    }

    /// Everything that is not done is forgotten: the log gives it again.
    pub(super) fn clear(&mut self) {
        // Tokens are never used twice, so that nothing late can name a new item.
        self.first += self.items.len() as Token;
        self.items.clear();
        self.unsent.clear();
        self.bytes = 0;
        self.refused = None;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.items.len()
    }

    /// The oldest entry that is not done.
    pub(super) fn head(&self) -> Option<&Entry> {
        self.items.front().map(|i| &i.entry)
    }

    /// Entries that were read and not sent wait.
    pub(super) fn has_unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    /// Bytes of all entries that are not done.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::super::session::tests::{Remote, Seen, options, puback};
    use super::super::session::{Event, Options};
    use super::*;
    use crate::config::MqttVersion;
    use crate::uplinks::backoff::Jitter;
    use crate::uplinks::routes::tests::{entry, up};

    fn routes() -> Routes {
        Routes {
            up: vec![up(&["#"], "p/{topic}")],
            down: Vec::new(),
            source: "uplink:cloud".into(),
        }
    }

    fn connect(options: Options, connack: Option<&[u8]>, now: Instant) -> (Session, Remote) {
        let mut remote = Remote::new(options.version);
        let mut session = Session::new(options, now).expect("encodes");
        remote.take(&mut session, now);
        session
            .input(connack.unwrap_or(remote.connack()), now)
            .expect("accepted");
        assert_eq!(session.event(), Some(Event::Connected));
        (session, remote)
    }

    fn work_off(outbox: &mut Outbox, session: &mut Session) {
        while let Some(event) = session.event() {
            match event {
                Event::Acknowledged(token) => outbox.acknowledged(token),
                Event::Refused(token, code) => outbox.refused(token, code),
                other => panic!("{other:?}"),
            }
        }
    }

    fn done(outbox: &mut Outbox) -> Vec<(u64, bool)> {
        std::iter::from_fn(|| outbox.done())
            .map(|done| match done {
                Done::Acknowledge { position, .. } => (position.sequence.0, true),
                Done::Dead(entry, _) => (entry.position.sequence.0, false),
            })
            .collect()
    }

    #[test]
    fn confirmed_in_order_whatever_the_order_of_the_answers() {
        let now = crate::clock::monotonic();
        let wall = crate::clock::wall();
        let (mut session, _) = connect(options(MqttVersion::V5), None, now);
        let mut outbox = Outbox::default();
        (1..=4).for_each(|n| outbox.push(entry(n, "a", "x"), &routes()));
        outbox.send(&mut session, wall, now);
        session
            .input(&[puback(2, 0), puback(3, 0)].concat(), now)
            .expect("valid");
        work_off(&mut outbox, &mut session);
        assert_eq!(done(&mut outbox), []);
        session.input(&puback(1, 0), now).expect("valid");
        work_off(&mut outbox, &mut session);
        assert_eq!(done(&mut outbox), [(1, true), (2, true), (3, true)]);
        assert!(!outbox.is_empty());
    }

    #[test]
    fn refused_for_good_is_dead_and_nothing_waits_for_it() {
        let now = crate::clock::monotonic();
        let (mut session, _) = connect(options(MqttVersion::V5), None, now);
        let mut outbox = Outbox::default();
        (1..=3).for_each(|n| outbox.push(entry(n, "a", "x"), &routes()));
        outbox.send(&mut session, crate::clock::wall(), now);
        session
            .input(&[puback(1, 0), puback(2, 0x90), puback(3, 0)].concat(), now)
            .expect("valid");
        work_off(&mut outbox, &mut session);
        assert_eq!(done(&mut outbox), [(1, true), (2, false), (3, true)]);
        assert!(outbox.refusal().is_none());
    }

    #[test]
    fn refused_for_now_brings_back_the_whole_tail() {
        let now = crate::clock::monotonic();
        let (mut session, _) = connect(options(MqttVersion::V5), None, now);
        let mut outbox = Outbox::default();
        (1..=4).for_each(|n| outbox.push(entry(n, "a", "x"), &routes()));
        outbox.send(&mut session, crate::clock::wall(), now);
        session
            .input(
                &[puback(1, 0), puback(2, 0x97), puback(3, 0), puback(4, 0)].concat(),
                now,
            )
            .expect("valid");
        work_off(&mut outbox, &mut session);
        assert_eq!(
            done(&mut outbox),
            [(1, true)],
            "3 and 4 are taken, but must come again after 2"
        );
        assert_eq!(outbox.refusal().map(|r| r.code), Some(0x97));
        outbox.clear();
        (2..=4).for_each(|n| outbox.push(entry(n, "a", "x"), &routes()));
        outbox.send(&mut session, crate::clock::wall(), now);
        assert_eq!(outbox.resent, 3);
        session
            .input(&[puback(5, 0), puback(6, 0), puback(7, 0)].concat(), now)
            .expect("valid");
        work_off(&mut outbox, &mut session);
        assert_eq!(done(&mut outbox), [(2, true), (3, true), (4, true)]);
    }

    #[test]
    fn several_routes_count_as_one_entry_and_foreign_ones_are_done_at_once() {
        let now = crate::clock::monotonic();
        let (mut session, _) = connect(options(MqttVersion::V311), None, now);
        let routes = Routes {
            up: vec![up(&["a"], "x"), up(&["a"], "y")],
            down: Vec::new(),
            source: "uplink:cloud".into(),
        };
        let mut outbox = Outbox::default();
        outbox.push(entry(1, "other", "x"), &routes);
        assert_eq!(done(&mut outbox), [(1, true)]);
        outbox.push(entry(2, "a", "x"), &routes);
        outbox.send(&mut session, crate::clock::wall(), now);
        assert_eq!(session.in_flight(), 2);
        session.input(&puback(2, 0), now).expect("valid");
        work_off(&mut outbox, &mut session);
        assert_eq!(done(&mut outbox), []);
        session.input(&puback(1, 0), now).expect("valid");
        work_off(&mut outbox, &mut session);
        assert_eq!(done(&mut outbox), [(2, true)]);
    }

    /// The whole promise in memory: cuts at any byte in both directions, grants that change, answers in any order,
    /// every 50th refused. Nothing is lost, and each topic's arrivals, refused ones included, never skip ahead.
    #[test]
    fn nothing_lost_and_nothing_skipped_over_many_cuts() {
        for seed in 1..=30u64 {
            let mut random = Jitter::seeded(seed * 977);
            let version = if seed % 2 == 0 {
                MqttVersion::V5
            } else {
                MqttVersion::V311
            };
            let (total, topics) = (3_000u64, 7u64);
            let topic = |n: u64| format!("t/{}", n % topics);
            let log: Vec<Entry> = (1..=total).map(|n| entry(n, &topic(n), n.to_string())).collect();
            let mut outbox = Outbox::default();
            let mut cursor = 0u64;
            let mut arrived = vec![0u64; topics as usize];
            let mut taken = vec![false; total as usize + 1];
            let (mut cuts, mut count) = (0, 0u64);
            while cursor < total {
                let now = crate::clock::monotonic();
                let grant = 1 + random.draw() % 20;
                let connack = [0x20, 6, (random.draw() % 2) as u8, 0, 3, 0x21, 0, grant as u8];
                let connack = (version == MqttVersion::V5).then_some(&connack[..]);
                let (mut session, mut remote) = connect(options(version), connack, now);
                let mut read = cursor;
                let mut budget = random.draw() % 30;
                outbox.clear();
                while budget > 0 && cursor < total {
                    budget -= 1;
                    while outbox.refusal().is_none() && !outbox.has_unsent() && session.capacity() > 0 && read < total {
                        outbox.push(log[read as usize].clone(), &routes());
                        read += 1;
                        outbox.send(&mut session, crate::clock::wall(), now);
                    }
                    assert!(session.in_flight() <= 10.min(if connack.is_some() { grant as usize } else { 10 }));
                    // The cut may take part of what was written with it.
                    if random.draw().is_multiple_of(40) {
                        let some = random.draw() as usize % (session.output().len() + 1);
                        session.output().truncate(some);
                        budget = 0;
                    }
                    let mut answers = Vec::new();
                    for seen in remote.take(&mut session, now) {
                        let Seen::Publish(id, name, payload, _) = seen else {
                            panic!("{seen:?}")
                        };
                        let n: u64 = String::from_utf8_lossy(&payload).parse().expect("a number");
                        assert_eq!(name, format!("p/{}", topic(n)));
                        let last = &mut arrived[(n % topics) as usize];
                        assert!(
                            n <= *last + topics || *last == 0 && n <= topics,
                            "{n} after {last} skips ahead"
                        );
                        *last = n;
                        count += 1;
                        let refuse = version == MqttVersion::V5 && count % 50 == 0;
                        taken[n as usize] |= !refuse;
                        answers.push(puback(id, if refuse { 0x97 } else { 0 }));
                    }
                    if random.draw().is_multiple_of(3) && answers.len() > 1 {
                        answers.reverse();
                    }
                    let mut bytes = answers.concat();
                    if budget == 0 {
                        bytes.truncate(random.draw() as usize % (bytes.len() + 1));
                    }
                    session.input(&bytes, now).expect("valid");
                    work_off(&mut outbox, &mut session);
                    for (n, delivered) in done(&mut outbox) {
                        assert!(delivered && taken[n as usize], "{n} confirmed and not delivered");
                        assert_eq!(n, cursor + 1);
                        cursor = n;
                    }
                    if outbox.refusal().is_some() && session.in_flight() == 0 {
                        outbox.clear();
                        read = cursor;
                    }
                }
                cuts += 1;
            }
            assert!(taken[1..].iter().all(|t| *t));
            assert!(cuts > 20, "seed {seed}: only {cuts} cuts");
        }
    }
}
