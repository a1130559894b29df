//! `$SYS`: values to those who listen, and at once to those who begin to. Nothing of it is logged or kept as retained.

use super::*;
use crate::broker::sys::{self, Counts, Loads, State as SysState, Tally};
use crate::status::{Health, Status};

/// What the broker tells of itself.
pub struct Sys {
    /// Zero: nothing.
    every: Duration,
    gateway: String,
    status: Status,
    tally: Rc<Tally>,
    started: Instant,
    loads: Loads,
    /// When the loads were advanced last.
    advanced: Instant,
    /// When the topics were made last.
    made: Option<Instant>,
    topics: BTreeMap<Topic, Rc<Message>>,
    pub sessions_maximum: u64,
    pub expired: u64,
    source: Source,
}

impl Sys {
    pub fn new(gateway: &str, every: Duration, status: Status, tally: Rc<Tally>) -> Sys {
        let now = clock::monotonic();
        Sys {
            every,
            gateway: gateway.to_owned(),
            status,
            tally,
            started: now,
            loads: Loads::default(),
            advanced: now,
            made: None,
            topics: BTreeMap::new(),
            sessions_maximum: 0,
            expired: 0,
            source: "gateway".into(),
        }
    }

    /// What a new subscription gets, as it gets retained messages elsewhere.
    pub(super) fn topics(&self) -> &BTreeMap<Topic, Rc<Message>> {
        &self.topics
    }

    pub fn set_every(&mut self, every: Duration) {
        self.every = every;
        self.topics.clear();
        self.made = None;
    }
}

/// Only such a filter matches topics of `$SYS`.
pub(super) fn is_sys(filter: &TopicFilter) -> bool {
    filter.levels().next() == Some("$SYS")
}

impl Core {
    /// Once a second, behind everything else: numbers for status, and `$SYS` where it is due and somebody listens.
    pub(super) fn tell_sys(&mut self, now: Instant) {
        let tally = Rc::clone(&self.sys.tally);
        self.counters.bytes_received.set(tally.bytes_in.get());
        self.counters.bytes_sent.set(tally.bytes_out.get());
        self.counters.throttled.set(tally.throttled.get());
        self.counters.logins_failed.set(tally.logins_failed.get());
        self.sys.sessions_maximum = self.sys.sessions_maximum.max(self.by_id.len() as u64);
        let passed = now.saturating_duration_since(self.sys.advanced);
        // The tick may come some milliseconds early.
        if self.sys.every.is_zero() || passed + Duration::from_millis(100) < self.sys.every {
            return;
        }
        let counts = self.counts();
        self.sys.loads.advance(&counts, passed);
        self.sys.advanced = now;
        if !self.router.listens_below("$SYS") && self.taps.is_empty() {
            return;
        }
        let wall = clock::wall();
        for message in self.make_sys(now) {
            let log = self.log.clone();
            if let Ok(route) = self.router.route(message.topic.as_byte_string(), |t| log.stream_of(t)) {
                self.deliver_live(&route, &message, None, wall);
            }
            for feed in &self.taps {
                feed.offer(&message, detach);
            }
        }
    }

    /// Before a new subscription to `$SYS`: it gets the values of the last round, or of now where nobody listened to that.
    pub(super) fn freshen_sys(&mut self, filter: &TopicFilter) {
        if self.sys.every.is_zero() || !is_sys(filter) {
            return;
        }
        let now = clock::monotonic();
        let is_fresh = |made: Instant| now.saturating_duration_since(made) < self.sys.every + Duration::from_secs(1);
        if !self.sys.made.is_some_and(is_fresh) {
            self.make_sys(now);
        }
    }

    /// Makes every value; returns those that are other ones than before.
    fn make_sys(&mut self, now: Instant) -> Vec<Rc<Message>> {
        let (state, counts) = (self.sys_state(now), self.counts());
        let wall = clock::wall();
        let mut changed = Vec::new();
        for (topic, value) in sys::topics(&state, &counts, &self.sys.loads) {
            let Ok(topic) = Topic::new(topic) else { continue };
            if self
                .sys
                .topics
                .get(&topic)
                .is_some_and(|m| m.payload == value.as_bytes())
            {
                continue;
            }
            let mut message = Message::new(topic.clone(), value, Arc::clone(&self.sys.source), wall);
            (message.qos, message.retain) = (Qos::AtMostOnce, true);
            let message = Rc::new(message);
            self.sys.topics.insert(topic, Rc::clone(&message));
            changed.push(message);
        }
        self.sys.made = Some(now);
        changed
    }

    fn counts(&self) -> Counts {
        let (tally, counters) = (&self.sys.tally, &self.counters);
        let publish_sent = counters.delivered.get();
        Counts {
            messages_received: tally.packets_in.get(),
            messages_sent: tally.packets_out.get() + publish_sent,
            publish_received: counters.received.get(),
            publish_sent,
            publish_dropped: counters.dropped.get(),
            publish_bytes_received: counters.received_bytes.get(),
            publish_bytes_sent: counters.delivered_bytes.get(),
            bytes_received: tally.bytes_in.get(),
            bytes_sent: tally.bytes_out.get(),
            sockets: tally.sockets.get(),
            connections: tally.connects.get(),
        }
    }

    fn sys_state(&self, now: Instant) -> SysState {
        let (mut stored, mut stored_bytes) = (0, 0);
        for stream in self.log.streams() {
            stored += stream.messages.load(std::sync::atomic::Ordering::Relaxed);
            stored_bytes += stream.bytes.load(std::sync::atomic::Ordering::Relaxed);
        }
        let mut parts = [0; 4];
        let mut lost = 0;
        for part in self.sys.status.report() {
            let at = match part.health {
                Health::Good => 0,
                Health::Starting => 1,
                Health::Late => 2,
                Health::Failed => 3,
            };
            parts[at] += 1;
            if part.kind == "log" {
                lost += part.counters.get("lost").copied().unwrap_or(0);
            }
        }
        SysState {
            uptime_s: now.saturating_duration_since(self.sys.started).as_secs(),
            connected: self.counters.connections.get(),
            sessions: self.by_id.len() as u64,
            sessions_maximum: self.sys.sessions_maximum.max(self.by_id.len() as u64),
            expired: self.sys.expired,
            subscriptions: self.counters.subscriptions.get(),
            retained: self.retained.len() as u64,
            retained_bytes: self.retained_bytes as u64,
            stored,
            stored_bytes,
            gateway: self.sys.gateway.clone(),
            lost,
            throttled: self.sys.tally.throttled.get(),
            logins_failed: self.sys.tally.logins_failed.get(),
            parts,
        }
    }
}
