//! The decisions of one module, pure: what becomes of a batch's messages, given what the call said. No I/O, no wasm.
//!
//! Promises: each message that is handed in ends acknowledged together with its effects, or in the dead letters with a reason,
//! or stays in the log; a message that the module fails on takes no other message along; a module that fails on
//! everything is set aside before it sends a backlog to the dead letters; what modules publish to each other ends.

use std::collections::VecDeque;
use std::time::Duration;

use crate::clock::{Instant, Timestamp};
use crate::log::consumer::{Effects, Entry};
use crate::message::{Message, Properties, Sequence, Source};

use super::host::{Draft, Outcome, Output, Refused};

/// Messages handed over in one call at most.
pub const BATCH_MESSAGES_MAX: usize = 64;
/// Bytes of a batch, about.
pub const BATCH_BYTES_MAX: usize = 1 << 20;
/// Messages that fail in a row, no good one among them, before the module is set aside.
const FAILURES_IN_ROW_MAX: usize = 5;
/// Messages that fail within [`FAILURES_WINDOW`], good ones among them, before the module is set aside.
const FAILURES_IN_WINDOW_MAX: usize = 100;
/// Both bounds times this each time that the module is tried again after it was set aside: whoever drops it in again holds
/// the messages to be at fault, and a run of bad ones must not stand in its way for ever.
const PATIENCE_GROWTH: usize = 10;
const PATIENCE_MAX: usize = 100;
/// Bytes of messages that wait for the next to show whether they are at fault.
const HELD_BYTES_MAX: usize = 8 << 20;
const FAILURES_WINDOW: Duration = Duration::from_secs(60);
/// Good batches before a batch limit that was lowered is doubled again.
const BATCHES_TO_RECOVER: u32 = 64;
/// A module gets what came of its own messages back this often (it may ask another one and be answered), then no more.
const VISITS_MAX: usize = 2;
/// A message that went through so many modules goes through no other.
const PATH_MAX: usize = 8;
/// User property of a message that a module made of a module's message: those that it went through before, oldest first.
/// The last one is its source.
pub const PATH_PROPERTY: &str = "tidegate-path";
const PATH_SEPARATOR: char = '>';

/// What happened so far, for the status.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Counts {
    pub received: u64,
    pub published: u64,
    pub dropped: u64,
    pub rejected: u64,
    /// Calls that failed.
    pub traps: u64,
    /// Messages that the module failed on, in the dead letters.
    pub poisonous: u64,
    /// Messages outside the publish filters or beyond a bound, not published.
    pub refused: u64,
    /// The module's own messages, not handed back to it.
    pub own: u64,
    /// Messages that went round between modules, not handed to it again.
    pub looped: u64,
    /// Loss notices: messages that were lost before this module got them.
    pub loss_notices: u64,
    pub lines_suppressed: u64,
}

/// What people should know, until the module is loaded anew.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Notes {
    pub refused_topic: Option<String>,
    pub own_topic: Option<String>,
    /// Topic and path of the first one.
    pub looped: Option<(String, String)>,
}

/// What becomes of a message that the module failed on.
#[derive(Debug)]
pub enum Verdict {
    /// To be applied; the rest goes on.
    Dead(Effects),
    /// It stays in the log until the next message shows whether it is the message or the module.
    Held,
    /// The module is set aside, for this reason. Held messages stay in the log.
    SetAside(String),
}

#[derive(Debug)]
pub struct Runner {
    source: Source,
    batch_max: usize,
    good_batches: u32,
    /// Whether the last message that was handled alone or in a batch went well.
    last_was_good: bool,
    held: Vec<(Entry, String)>,
    failures: VecDeque<Instant>,
    failures_in_row: usize,
    /// Factor of the bounds of failures: above 1 when the module is tried again, until a message goes well.
    patience: usize,
    was_set_aside: bool,
    timer_failures_in_row: usize,
    counts: Counts,
    notes: Notes,
}

impl Runner {
    pub fn new(module: &str) -> Runner {
        Runner {
            source: format!("module:{module}").into(),
            batch_max: BATCH_MESSAGES_MAX,
            good_batches: 0,
            last_was_good: false,
            held: Vec::new(),
            failures: VecDeque::new(),
            failures_in_row: 0,
            patience: 1,
            was_set_aside: false,
            timer_failures_in_row: 0,
            counts: Counts::default(),
            notes: Notes::default(),
        }
    }

    /// For the next version of the same module: the counts go on, everything else begins anew.
    pub fn successor(&self) -> Runner {
        let patience = if self.was_set_aside {
            self.patience * PATIENCE_GROWTH
        } else {
            1
        };
        Runner {
            source: self.source.clone(),
            counts: self.counts.clone(),
            patience: patience.min(PATIENCE_MAX),
            ..Runner::new("")
        }
    }

    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    pub fn notes(&self) -> &Notes {
        &self.notes
    }

    /// How many messages wait for the next one to show whether they or the module are at fault.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    pub fn batch_max(&self) -> usize {
        self.batch_max
    }

    /// Takes out of a batch what the module is not to see: its own messages, those that went round and loss notices.
    pub fn select(&mut self, entries: Vec<Entry>) -> (Vec<Entry>, Effects) {
        let mut effects = Effects::default();
        let mut selected = Vec::with_capacity(entries.len());
        for entry in entries {
            let topic = entry.message.topic.as_str();
            if entry.notice {
                self.counts.loss_notices += 1;
                effects.acknowledge.push(entry.position);
            } else if entry.message.source == self.source {
                // As MQTT's "no local": a module that subscribes to what it publishes does not answer itself for ever.
                self.counts.own += 1;
                self.notes.own_topic.get_or_insert_with(|| topic.to_owned());
                effects.acknowledge.push(entry.position);
            } else if let Some(path) = self.went_round(&entry.message) {
                self.counts.looped += 1;
                self.notes.looped.get_or_insert_with(|| (topic.to_owned(), path));
                effects.acknowledge.push(entry.position);
            } else {
                selected.push(entry);
            }
        }
        (selected, effects)
    }

    /// Its path, where the message came round to this module too often.
    fn went_round(&self, message: &Message) -> Option<String> {
        let path = path(message)?;
        let own = self.source.strip_prefix("module:");
        let visits = path.split(PATH_SEPARATOR).filter(|module| Some(*module) == own).count();
        (visits >= VISITS_MAX || path.split(PATH_SEPARATOR).count() >= PATH_MAX).then_some(path)
    }

    /// What a call that went well does to the log. `output` has an outcome for each entry.
    pub fn accept(&mut self, entries: Vec<Entry>, output: Output, now: Timestamp) -> Effects {
        assert_eq!(
            entries.len(),
            output.outcomes.len(),
            "the host checks the number of outcomes"
        );
        self.counts.received += entries.len() as u64;
        // What is published through the import may come of any of them: of that with the longest path, then.
        let longest = entries
            .iter()
            .filter_map(|entry| path(&entry.message))
            .max_by_key(String::len);
        let mut effects = self.effects_of(output.published, output.state, &output.refused, longest.as_deref(), now);
        self.counts.lines_suppressed += output.lines_suppressed;
        if !entries.is_empty() {
            self.last_was_good = true;
            self.failures_in_row = 0;
            if self.patience > 1 {
                self.patience = 1;
                self.failures.clear();
            }
            // The module works: what it failed on before is at fault.
            for (entry, reason) in std::mem::take(&mut self.held) {
                self.counts.poisonous += 1;
                effects.dead.push((entry, reason));
            }
        }
        for (entry, outcome) in entries.into_iter().zip(output.outcomes) {
            match outcome {
                Outcome::Pass => effects.acknowledge.push(entry.position),
                Outcome::Drop => {
                    self.counts.dropped += 1;
                    effects.acknowledge.push(entry.position);
                }
                Outcome::Replace(drafts) => {
                    let path = path(&entry.message);
                    let path = path.as_deref();
                    effects
                        .publish
                        .extend(drafts.into_iter().map(|draft| self.message(draft, path, now)));
                    effects.acknowledge.push(entry.position);
                }
                Outcome::Reject(reason) => {
                    self.counts.rejected += 1;
                    effects
                        .dead
                        .push((entry, format!("rejected by {}: {reason}", self.source)));
                }
            }
        }
        self.counts.published += effects.publish.len() as u64;
        effects
    }

    /// A batch went well.
    pub fn batch_went_well(&mut self) {
        self.good_batches += 1;
        if self.good_batches >= BATCHES_TO_RECOVER && self.batch_max < BATCH_MESSAGES_MAX {
            self.good_batches = 0;
            self.batch_max = (self.batch_max * 2).min(BATCH_MESSAGES_MAX);
        }
    }

    /// A call with more than one message failed; it is now made message by message.
    pub fn batch_failed(&mut self) {
        self.counts.traps += 1;
    }

    /// A batch failed and none of its messages did alone: it was too much at once.
    pub fn batch_was_too_large(&mut self) {
        self.good_batches = 0;
        self.batch_max = (self.batch_max / 2).max(1);
    }

    /// A call with this message alone failed.
    pub fn failed(&mut self, entry: Entry, error: &str, now: Instant) -> Verdict {
        self.counts.traps += 1;
        self.failures_in_row += 1;
        self.failures.push_back(now);
        while self
            .failures
            .front()
            .is_some_and(|first| now.saturating_duration_since(*first) > FAILURES_WINDOW)
        {
            self.failures.pop_front();
        }
        let last_was_good = std::mem::replace(&mut self.last_was_good, false);
        let reason = format!("{} failed on it: {error}", self.source);
        let held_bytes: usize = self.held.iter().map(|(entry, _)| entry.message.size_bytes()).sum();
        let why = if self.failures_in_row >= FAILURES_IN_ROW_MAX * self.patience || held_bytes > HELD_BYTES_MAX {
            Some(format!("it failed on {} messages in a row", self.failures_in_row))
        } else if self.failures.len() > FAILURES_IN_WINDOW_MAX * self.patience {
            Some(format!("it failed on {} messages within a minute", self.failures.len()))
        } else {
            None
        };
        if let Some(why) = why {
            self.was_set_aside = true;
            return Verdict::SetAside(format!(
                "{why}, the last on {:?}: {error}",
                entry.message.topic.as_str()
            ));
        }
        if !last_was_good {
            self.held.push((entry, reason));
            return Verdict::Held;
        }
        // The message before it went well: the module works, so it is the message.
        self.counts.poisonous += 1;
        Verdict::Dead(Effects {
            dead: vec![(entry, reason)],
            ..Effects::default()
        })
    }

    /// What an `init` that went well does.
    pub fn accept_init(&mut self, output: Output, now: Timestamp) -> Effects {
        self.accept(Vec::new(), output, now)
    }

    /// What a timer call that went well does.
    pub fn accept_timer(&mut self, output: Output, now: Timestamp) -> Effects {
        self.timer_failures_in_row = 0;
        self.accept(Vec::new(), output, now)
    }

    /// A timer call failed. Some: the module is set aside, for this reason.
    pub fn timer_failed(&mut self, error: &str) -> Option<String> {
        self.counts.traps += 1;
        self.timer_failures_in_row += 1;
        (self.timer_failures_in_row >= FAILURES_IN_ROW_MAX)
            .then(|| format!("its timer failed {FAILURES_IN_ROW_MAX} times in a row, the last time: {error}"))
    }

    fn effects_of(
        &mut self,
        published: Vec<Draft>,
        state: Vec<(String, Option<Vec<u8>>)>,
        refused: &Refused,
        path: Option<&str>,
        now: Timestamp,
    ) -> Effects {
        self.counts.refused += refused.count;
        if self.notes.refused_topic.is_none() {
            self.notes.refused_topic.clone_from(&refused.first);
        }
        let publish = published
            .into_iter()
            .map(|draft| self.message(draft, path, now))
            .collect();
        Effects {
            publish,
            state,
            ..Effects::default()
        }
    }

    fn message(&self, draft: Draft, path: Option<&str>, now: Timestamp) -> Message {
        let Draft {
            topic,
            payload,
            qos,
            retain,
            mut properties,
        } = draft;
        if let Some(properties) = &mut properties {
            properties.user.retain(|(key, _)| key != PATH_PROPERTY);
        }
        if let Some(path) = path {
            let user = (PATH_PROPERTY.into(), path.to_owned().into());
            properties
                .get_or_insert_with(|| Box::new(Properties::default()))
                .user
                .push(user);
        }
        Message {
            topic,
            payload,
            qos,
            retain,
            properties,
            source: self.source.clone(),
            sequence: Sequence(0),
            received: now,
        }
    }
}

pub fn is_empty(effects: &Effects) -> bool {
    let Effects {
        publish,
        acknowledge,
        dead,
        state,
    } = effects;
    publish.is_empty() && acknowledge.is_empty() && dead.is_empty() && state.is_empty()
}

/// Both in one commit, in this order.
pub fn append(effects: &mut Effects, more: Effects) {
    effects.publish.extend(more.publish);
    effects.acknowledge.extend(more.acknowledge);
    effects.dead.extend(more.dead);
    effects.state.extend(more.state);
}

/// The modules that a message went through. One that a client sent went through none, whatever its properties say.
fn path(message: &Message) -> Option<String> {
    let last = message.source.strip_prefix("module:")?;
    let before = message
        .properties
        .iter()
        .flat_map(|p| &p.user)
        .find(|(key, _)| key == PATH_PROPERTY);
    Some(match before {
        Some((_, before)) => format!("{before}{PATH_SEPARATOR}{last}"),
        None => last.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::consumer::Position;
    use crate::message::{Qos, Topic};

    fn entry(sequence: u64, topic: &str, source: &str) -> Entry {
        let topic = Topic::new(topic.to_owned()).expect("valid");
        let mut message = Message::new(topic, "x", source.into(), Timestamp::from_millis(5));
        message.sequence = Sequence(sequence);
        Entry {
            position: Position {
                stream: 0,
                sequence: Sequence(sequence),
            },
            message,
            notice: false,
        }
    }

    fn draft(topic: &str) -> Draft {
        let topic = Topic::new(topic.to_owned()).expect("valid");
        Draft {
            topic,
            payload: "y".into(),
            qos: Qos::AtLeastOnce,
            retain: false,
            properties: None,
        }
    }

    fn output(outcomes: Vec<Outcome>) -> Output {
        Output {
            outcomes,
            ..Output::default()
        }
    }

    fn sequences(effects: &Effects) -> Vec<u64> {
        effects.acknowledge.iter().map(|p| p.sequence.0).collect()
    }

    const NOW: Timestamp = Timestamp::from_millis(1_000);

    #[test]
    fn outcomes_become_effects_in_order() {
        let mut runner = Runner::new("m");
        let entries = (1..=4).map(|n| entry(n, "a", "client:c")).collect();
        let outcomes = vec![
            Outcome::Pass,
            Outcome::Drop,
            Outcome::Replace(vec![draft("b/1"), draft("b/2")]),
            Outcome::Reject("no unit".to_owned()),
        ];
        let call = Output {
            published: vec![draft("b/0")],
            state: vec![("k".to_owned(), None)],
            refused: Refused {
                count: 2,
                first: Some("c".to_owned()),
            },
            ..output(outcomes)
        };
        let effects = runner.accept(entries, call, NOW);
        assert_eq!(sequences(&effects), [1, 2, 3]);
        let topics: Vec<&str> = effects.publish.iter().map(|m| m.topic.as_str()).collect();
        assert_eq!(topics, ["b/0", "b/1", "b/2"]);
        assert!(
            effects
                .publish
                .iter()
                .all(|m| &*m.source == "module:m" && m.received == NOW && m.properties.is_none())
        );
        assert_eq!(effects.dead[0].0.position.sequence, Sequence(4));
        assert_eq!(effects.dead[0].1, "rejected by module:m: no unit");
        assert_eq!(effects.state, [("k".to_owned(), None)]);
        let counts = runner.counts();
        assert_eq!(
            (counts.received, counts.published, counts.dropped, counts.rejected),
            (4, 3, 1, 1)
        );
        assert_eq!(
            (counts.refused, runner.notes().refused_topic.as_deref()),
            (2, Some("c"))
        );
    }

    #[test]
    fn own_messages_are_not_handed_back() {
        let mut runner = Runner::new("m");
        let (selected, effects) = runner.select(vec![
            entry(1, "a", "client:c"),
            entry(2, "a", "module:m"),
            entry(3, "a", "module:other"),
        ]);
        assert_eq!(
            selected.iter().map(|e| e.position.sequence.0).collect::<Vec<_>>(),
            [1, 3]
        );
        assert_eq!(sequences(&effects), [2]);
        assert_eq!(runner.counts().own, 1);
        assert_eq!(runner.notes().own_topic.as_deref(), Some("a"));
    }

    /// Hands a message round until a runner takes it no more; the names of those that took it.
    fn hand_round(runners: &mut [(&str, Runner)]) -> Vec<String> {
        let mut message = entry(1, "loop/b", "client:c").message;
        let mut taken = Vec::new();
        for step in 0..100 {
            let n = step % runners.len();
            let (name, runner) = &mut runners[n];
            let logged = Entry {
                message: message.clone(),
                ..entry(step as u64, "x", "x")
            };
            let (selected, effects) = runner.select(vec![logged]);
            if selected.is_empty() {
                assert_eq!((effects.acknowledge.len(), runner.counts().looped), (1, 1));
                return taken;
            }
            taken.push((*name).to_owned());
            let mut effects = runner.accept(selected, output(vec![Outcome::Replace(vec![draft("loop/b")])]), NOW);
            message = effects.publish.remove(0);
        }
        panic!("it goes round for ever");
    }

    #[test]
    fn what_goes_round_between_modules_ends() {
        let mut two = ["a", "b"].map(|name| (name, Runner::new(name)));
        assert_eq!(
            hand_round(&mut two),
            ["a", "b", "a", "b"],
            "an answer gets through, a loop does not"
        );
        assert_eq!(
            two[0].1.notes().looped,
            Some(("loop/b".to_owned(), "a>b>a>b".to_owned()))
        );
        let mut ten = ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"].map(|name| (name, Runner::new(name)));
        assert_eq!(hand_round(&mut ten).len(), PATH_MAX);
    }

    #[test]
    fn the_path_cannot_be_forged() {
        let mut from_client = entry(1, "a", "client:c");
        let forged = Properties {
            user: vec![(PATH_PROPERTY.into(), "m>m>m".into())],
            ..Properties::default()
        };
        from_client.message.properties = Some(Box::new(forged));
        let mut runner = Runner::new("m");
        let (selected, _) = runner.select(vec![from_client]);
        assert_eq!(selected.len(), 1, "a client's message is taken whatever it says");
        let emptied = Properties {
            user: vec![(PATH_PROPERTY.into(), "".into())],
            ..Properties::default()
        };
        let resetting = Draft {
            properties: Some(Box::new(emptied)),
            ..draft("b")
        };
        let effects = runner.accept(
            vec![entry(2, "a", "module:other")],
            output(vec![Outcome::Replace(vec![resetting])]),
            NOW,
        );
        let user = &effects.publish[0].properties.as_ref().expect("path").user;
        assert_eq!(user[..], [(PATH_PROPERTY.into(), "other".into())]);
    }

    #[test]
    fn a_message_that_fails_after_a_good_one_is_at_fault() {
        let mut runner = Runner::new("m");
        let now = crate::clock::monotonic();
        runner.accept(vec![entry(1, "a", "client:c")], output(vec![Outcome::Pass]), NOW);
        match runner.failed(entry(2, "a", "client:c"), "unreachable", now) {
            Verdict::Dead(effects) => {
                assert_eq!(effects.dead[0].0.position.sequence, Sequence(2));
                assert_eq!(effects.dead[0].1, "module:m failed on it: unreachable");
                assert!(effects.acknowledge.is_empty());
            }
            verdict => panic!("{verdict:?}"),
        }
    }

    #[test]
    fn a_module_that_fails_on_everything_is_set_aside_and_loses_nothing() {
        let mut runner = Runner::new("m");
        let now = crate::clock::monotonic();
        for n in 1..=4 {
            assert!(
                matches!(runner.failed(entry(n, "a", "client:c"), "boom", now), Verdict::Held),
                "{n}"
            );
        }
        match runner.failed(entry(5, "a", "client:c"), "boom", now) {
            Verdict::SetAside(why) => assert!(why.contains("5 messages in a row") && why.contains("boom"), "{why}"),
            verdict => panic!("{verdict:?}"),
        }
        assert_eq!((runner.counts().poisonous, runner.held()), (0, 4));
    }

    #[test]
    fn what_was_held_is_at_fault_once_another_message_goes_well() {
        let mut runner = Runner::new("m");
        let now = crate::clock::monotonic();
        assert!(matches!(
            runner.failed(entry(1, "a", "client:c"), "boom", now),
            Verdict::Held
        ));
        assert!(matches!(
            runner.failed(entry(2, "a", "client:c"), "boom", now),
            Verdict::Held
        ));
        let effects = runner.accept(vec![entry(3, "a", "client:c")], output(vec![Outcome::Pass]), NOW);
        assert_eq!(
            effects
                .dead
                .iter()
                .map(|(e, _)| e.position.sequence.0)
                .collect::<Vec<_>>(),
            [1, 2]
        );
        assert_eq!(sequences(&effects), [3]);
        assert_eq!(runner.held(), 0);
        for n in 0..FAILURES_IN_ROW_MAX - 1 {
            let verdict = runner.failed(entry(4, "a", "client:c"), "boom", now);
            assert!(!matches!(verdict, Verdict::SetAside(_)), "the row begins anew: {n}");
        }
    }

    #[test]
    fn a_run_of_bad_messages_gives_way_when_the_module_is_tried_again() {
        let now = crate::clock::monotonic();
        let fails_until_set_aside = |runner: &mut Runner| {
            (1..10_000).find(|n| {
                matches!(
                    runner.failed(entry(*n, "a", "client:c"), "boom", now),
                    Verdict::SetAside(_)
                )
            })
        };
        let mut runner = Runner::new("m");
        let mut bounds = Vec::new();
        for _ in 0..4 {
            bounds.push(fails_until_set_aside(&mut runner));
            runner = runner.successor();
        }
        assert_eq!(bounds, [Some(5), Some(50), Some(500), Some(500)]);
        for n in 1..=60 {
            assert!(
                matches!(runner.failed(entry(n, "a", "client:c"), "boom", now), Verdict::Held),
                "{n}"
            );
        }
        let effects = runner.accept(vec![entry(61, "a", "client:c")], output(vec![Outcome::Pass]), NOW);
        assert_eq!(
            (effects.dead.len(), sequences(&effects)),
            (60, vec![61]),
            "they were at fault after all"
        );
        assert!(matches!(
            runner.failed(entry(62, "a", "client:c"), "boom", now),
            Verdict::Dead(_)
        ));
        assert_eq!(fails_until_set_aside(&mut runner), Some(4), "patience is as at first");
        let replaced_while_good = Runner::new("m").successor();
        assert_eq!(replaced_while_good.patience, 1);
    }

    #[test]
    fn many_poisonous_messages_within_a_minute_set_the_module_aside_and_a_few_an_hour_do_not() {
        let began = crate::clock::monotonic();
        let failures_until_set_aside = |seconds_between: u64| {
            let mut runner = Runner::new("m");
            (0..1_000u64).find(|n| {
                runner.accept(vec![entry(1, "a", "client:c")], output(vec![Outcome::Pass]), NOW);
                let now = began + Duration::from_secs(n * seconds_between);
                matches!(
                    runner.failed(entry(2, "a", "client:c"), "boom", now),
                    Verdict::SetAside(_)
                )
            })
        };
        assert_eq!(failures_until_set_aside(0), Some(100));
        assert_eq!(failures_until_set_aside(1), None);
    }

    #[test]
    fn a_timer_that_keeps_failing_sets_the_module_aside() {
        let mut runner = Runner::new("m");
        for _ in 0..4 {
            assert_eq!(runner.timer_failed("boom"), None);
        }
        runner.accept_timer(Output::default(), NOW);
        for _ in 0..4 {
            assert_eq!(runner.timer_failed("boom"), None);
        }
        assert!(
            runner
                .timer_failed("boom")
                .is_some_and(|why| why.contains("timer") && why.contains("boom"))
        );
    }

    #[test]
    fn batches_shrink_where_only_whole_ones_fail_and_grow_again() {
        let mut runner = Runner::new("m");
        for expected in [32, 16, 8, 4, 2, 1, 1] {
            runner.batch_was_too_large();
            assert_eq!(runner.batch_max(), expected);
        }
        for _ in 0..BATCHES_TO_RECOVER * 10 {
            runner.batch_went_well();
        }
        assert_eq!(runner.batch_max(), BATCH_MESSAGES_MAX);
    }
}
