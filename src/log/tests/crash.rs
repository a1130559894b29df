//! Power cuts: runs of the real log code on a recorded disk ([`disk`]), cut at any point and opened again.
//!
//! One thread does everything, so that a seed gives the same run each time: it appends as the broker does, reads as
//! uplinks and sessions do, steps the writer, serves the reader's requests and checkpoints, also in the middle of a commit,
//! and commits in the middle of a checkpoint. After each cut it is asked:
//!
//! - the database opens, sound, and holds the work of the commits up to one of them, whole: at least all that was acknowledged;
//! - each consumer gets every message of those commits that it had not acknowledged, once, in order, unchanged, or the
//!   ledger names it; the ledger's counts are exact;
//! - retained messages, sessions, wills and ids of QoS 2 are those of that commit; sequences are never given out again.
//!
//! TIDEGATE_CRASH_POINTS sets how many points, TIDEGATE_CRASH_SEED=RUN:POINT runs one alone.
//!
//! Open: of the first 2,000 points 2:33 is red (an id of QoS 2 that commit 16 frees is gone at commit 15, after syncs that
//! failed). Until that is understood the default ends before it.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, sync_channel};

use super::disk::{Dice, Disk, Op, Walk};
use super::*;
use crate::log::changes::{SubscriptionRow, WillRow};
use crate::log::reader::Reader;
use crate::log::store::{SHIPPED, Tuning};
use crate::log::writer::Writer;

/// A small WAL: it is checkpointed and begun anew many times in one run.
const SMALL: Tuning = Tuning {
    wal_bytes: 200 << 10,
    wal_pages_writer: 60,
    wal_pages_background: 20,
    ..SHIPPED
};

const CONSUMERS: [(&str, &str); 3] = [
    ("uplink:all", "#"),
    ("uplink:alarms", "alarm/#"),
    ("session:s", "data/+"),
];
const TOPICS: [&str; 6] = ["alarm/0", "alarm/1", "data/0", "data/1", "data/2", "other/x"];
/// The consumer that also acknowledges as modules do.
const BY_EFFECTS: usize = 0;
const CLIENTS: usize = 4;
/// Numbers of messages that are appended after the recovery.
const AFTERWARDS: u64 = 1 << 40;

/// What went wrong, for each kind of fault built in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    Nothing,
    /// synchronous=NORMAL.
    NotSynced,
    /// The acknowledgement leaves when the message is appended.
    Early,
}

#[derive(Debug)]
enum Mark {
    /// Everything up to this tag was acknowledged.
    Acknowledged(u64),
    /// A consumer is about to acknowledge a message.
    Consumed(usize, u64),
}

#[derive(Debug, Clone)]
struct Sent {
    number: u64,
    tag: u64,
    topic: usize,
    sequence: u64,
    size: usize,
    /// The commit failed: it was refused, and is there only where that commit is the newest that is there.
    refused: bool,
}

impl Sent {
    fn is_in(&self, newest: u64) -> bool {
        if self.refused {
            self.tag == newest
        } else {
            self.tag <= newest
        }
    }
}

/// What was put into the log, by the tag of the commit that it went into.
#[derive(Debug, Default, Clone)]
struct Facts {
    sent: Vec<Sent>,
    rows: Vec<(u64, String, Option<String>)>,
    /// Commits that failed. What is still true of them goes into the next one; ids of QoS 2 that were taken do not.
    failed: Vec<u64>,
    /// The commit that made the consumers.
    begun: u64,
}

impl Facts {
    fn rows_at(&self, tag: u64) -> BTreeMap<String, String> {
        let mut rows = BTreeMap::new();
        for (t, key, value) in self.rows.iter().filter(|(t, ..)| *t <= tag) {
            if *t < tag && value.is_some() && key.starts_with("inbound") && self.failed.contains(t) {
                continue;
            }
            match value {
                Some(value) => rows.insert(key.clone(), value.clone()),
                None => rows.remove(key),
            };
        }
        rows
    }

    /// The process died: what had not become durable never was.
    fn forget_after(&mut self, tag: u64) {
        self.sent.retain(|s| s.tag <= tag);
        self.rows.retain(|(t, ..)| *t <= tag);
    }
}

fn payload(number: u64, size: usize) -> String {
    let mut text = number.to_string();
    let mut dice = Dice::new(number, 7);
    while text.len() < size {
        text.push(' ');
        text.push_str(&dice.next().to_string());
    }
    text
}

fn wants(consumer: usize, topic: usize) -> bool {
    filter_of(CONSUMERS[consumer].1).matches(TOPICS[topic])
}

/// A log without threads of its own.
struct Machine {
    log: Log,
    writer: Rc<RefCell<Writer>>,
    wanted: Receiver<()>,
    checkpointer: Rc<ReadStore>,
    requests: tokio::sync::mpsc::Receiver<reader::Request>,
    reader: Reader,
    startup: Startup,
    _lock: std::fs::File,
}

impl Machine {
    fn open(folder: &Path) -> Result<Machine, String> {
        let streams = [stream("alarms", "alarm/#", 1 << 20), stream("rest", "#", 48 << 10)];
        let opened = Opened::open(folder, &streams, &Status::default()).map_err(|e| e.to_string())?;
        let (checkpoint, wanted) = sync_channel(1);
        let path = opened.inner.path.clone();
        Ok(Machine {
            writer: Rc::new(RefCell::new(Writer::new(&opened.inner, opened.store, checkpoint))),
            wanted,
            checkpointer: Rc::new(ReadStore::open(&path).map_err(|e| e.to_string())?),
            requests: opened.requests,
            reader: Reader::new(path, Arc::downgrade(&opened.inner)),
            startup: opened.startup,
            log: Log { inner: opened.inner },
            _lock: opened.lock,
        })
    }

    /// The newest commit that is in the database.
    fn tag(&self) -> u64 {
        let state = self.checkpointer.module_state("crash").expect("readable");
        state.first().map_or(0, |(_, value)| {
            std::str::from_utf8(value).expect("a number").parse().expect("a number")
        })
    }

    /// The generations that are on disk since the last call.
    fn committed(&self) -> Vec<(u64, bool)> {
        let events = self.log.commit_events();
        events.into_iter().map(|e| (e.generation, e.result.is_ok())).collect()
    }

    /// What a consumer can be given without waiting.
    fn next(&mut self, consumer: &mut Consumer, count: usize) -> Option<Vec<consumer::Entry>> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        let (requests, reader) = (&mut self.requests, &mut self.reader);
        let read = async {
            let mut next = std::pin::pin!(consumer.next(count, usize::MAX));
            loop {
                tokio::select! { biased;
                    entries = &mut next => return Some(entries.expect("readable")),
                    Some(request) = requests.recv() => reader.answer(request),
                    () = std::future::ready(()) => return None,
                }
            }
        };
        runtime.expect("a runtime").block_on(tokio::task::unconstrained(read))
    }

    fn append(
        &self,
        batch: &mut Batch<'_>,
        consumers: &[Arc<ConsumerState>],
        number: u64,
        topic: usize,
        size: usize,
    ) -> u64 {
        let m = message(TOPICS[topic], payload(number, size));
        let stream = self.log.stream_of(TOPICS[topic]).expect("one takes it");
        let sequence = batch.append(stream, &MessageRef::from(&m));
        for (index, state) in consumers.iter().enumerate() {
            if wants(index, topic) {
                state.matched(stream, sequence, m.size_bytes());
            }
        }
        sequence.0
    }

    fn settle(self) {
        // As the writer's thread ends; then the connections go, the writer's last.
        let Machine {
            log,
            writer,
            checkpointer,
            reader,
            requests,
            ..
        } = self;
        lock(&log.inner.open).stop = true;
        writer.borrow_mut().step(true);
        drop((reader, requests, checkpointer));
        writer.borrow_mut().settle();
    }
}

/// A run, recorded.
struct Run {
    seed: u64,
    ops: Vec<Op<Mark>>,
    facts: Facts,
}

/// Where files of runs and of what is left of them lie: in memory where there is such a place.
fn scratch(name: &str) -> Folder {
    let shm = Path::new("/dev/shm");
    let below = if shm.is_dir() {
        shm.to_owned()
    } else {
        std::env::temp_dir()
    };
    let folder = Folder(below.join(format!("tidegate-{}-{name}", std::process::id())));
    std::fs::create_dir_all(&folder.0).expect("made");
    folder
}

struct Driver {
    dice: Dice,
    disk: Arc<Disk<Mark>>,
    machine: Option<Machine>,
    readers: Vec<(Consumer, VecDeque<(consumer::Entry, u64)>)>,
    states: Vec<Arc<ConsumerState>>,
    facts: Facts,
    tags: Vec<(u64, u64)>,
    tag: u64,
    acknowledged: u64,
    number: u64,
    broken: Broken,
}

impl Driver {
    fn machine(&mut self) -> &mut Machine {
        self.machine.as_mut().expect("between two there is none")
    }

    /// Something is put into the open batch, with the tag of the commit that will take it.
    fn batch(&mut self, put: impl FnOnce(&mut Driver, &mut Batch<'_>, u64)) {
        let log = self.machine().log.clone();
        let mut batch = log.batch();
        let generation = batch.ticket();
        if self.tags.last().is_none_or(|(g, _)| *g != generation) {
            self.tag += 1;
            self.tags.push((generation, self.tag));
        }
        let tag = self.tag;
        let key = ("crash".to_owned(), "tag".to_owned());
        batch.changes().module_state.insert(key, Some(tag.to_string().into()));
        put(self, &mut batch, tag);
        drop(batch);
        if self.broken == Broken::Early {
            self.acknowledge(tag);
        }
    }

    fn acknowledge(&mut self, tag: u64) {
        if tag > self.acknowledged {
            self.acknowledged = tag;
            self.disk.mark(Mark::Acknowledged(tag));
        }
    }

    fn acknowledge_committed(&mut self) {
        for (generation, is_durable) in self.machine().committed() {
            let Some((_, tag)) = self.tags.iter().find(|(g, _)| *g == generation).copied() else {
                continue;
            };
            if is_durable {
                self.acknowledge(tag);
                continue;
            }
            self.facts.failed.push(tag);
            self.facts
                .sent
                .iter_mut()
                .filter(|s| s.tag == tag)
                .for_each(|s| s.refused = true);
        }
    }

    fn open(&mut self) {
        let folder = self.disk.folder.clone();
        self.machine = Some(Machine::open(&folder).expect("opens"));
        self.tags.clear();
        let on_disk = self.machine().tag();
        let early = self.broken == Broken::Early;
        assert!(
            early || on_disk >= self.acknowledged,
            "the process died, the machine did not"
        );
        self.facts.forget_after(on_disk);
        // A commit whose sync failed stands in the kernel's memory: the process that comes after finds it done.
        self.facts.failed.retain(|tag| *tag != on_disk);
        self.facts
            .sent
            .iter_mut()
            .filter(|s| s.tag == on_disk)
            .for_each(|s| s.refused = false);
        self.batch(|d, batch, tag| {
            let log = d.machine().log.clone();
            d.states = CONSUMERS
                .map(|(name, filter)| log.consumer(batch, name, &[filter_of(filter)]))
                .to_vec();
            d.facts.begun = if d.facts.begun == 0 { tag } else { d.facts.begun };
        });
        let log = self.machine().log.clone();
        self.readers = self
            .states
            .iter()
            .map(|s| (Consumer::new(log.clone(), Arc::clone(s)), VecDeque::new()))
            .collect();
    }

    fn publish(&mut self) {
        let count = 1 + self.dice.below(12);
        self.batch(|d, batch, tag| {
            for _ in 0..count {
                let topic = d.dice.below(TOPICS.len());
                let size = match d.dice.below(40) {
                    0 => 20_000,
                    1..6 => 2_000,
                    _ => 20 + d.dice.below(200),
                };
                d.number += 1;
                let (number, states) = (d.number, d.states.clone());
                let sequence = d.machine().append(batch, &states, number, topic, size);
                d.facts.sent.push(Sent {
                    number,
                    tag,
                    topic,
                    sequence,
                    size,
                    refused: false,
                });
            }
        });
    }

    /// What sessions and retained topics do.
    fn change(&mut self) {
        let (what, client, value) = (self.dice.below(6), self.dice.below(CLIENTS), self.dice.next() % 1_000);
        self.batch(|d, batch, tag| {
            let name = format!("c{client}");
            let rows = &mut d.facts.rows;
            let changes = batch.changes();
            let id = 1 + value as u16 % 5;
            match what {
                0 => {
                    let topic = format!("r/{}", value % 7);
                    let kept = (value % 3 > 0).then(|| message(&topic, payload(value, 300)));
                    rows.push((
                        tag,
                        format!("retained {topic}"),
                        kept.as_ref().map(|m| format!("{:?}", m.payload)),
                    ));
                    changes.retained.insert(topic, kept.map(|m| record::encode_one(&m)));
                }
                1 => {
                    let row = SessionRow {
                        client_id: name.clone(),
                        expiry_s: value as u32,
                        disconnected: None,
                        user: None,
                        subscriptions: vec![SubscriptionRow {
                            filter: format!("f/{value}"),
                            qos: 1,
                            no_local: false,
                            retain_as_published: false,
                            identifier: None,
                            since: value,
                        }],
                    };
                    rows.push((tag, format!("session {name}"), Some(format!("{row:?}"))));
                    changes.sessions.insert(name, Some(row));
                }
                2 => {
                    // Over, and perhaps begun anew at once.
                    changes.end_session(&name);
                    rows.push((tag, format!("session {name}"), None));
                    for id in 1..=5 {
                        rows.push((tag, format!("inbound {name} {id}"), None));
                        rows.push((tag, format!("outbound {name} {id}"), None));
                    }
                }
                3 => {
                    let present = value % 2 == 0;
                    rows.push((tag, format!("inbound {name} {id}"), present.then(String::new)));
                    changes.inbound.insert((name, id), present);
                }
                4 => {
                    let row = OutboundRow {
                        client_id: name.clone(),
                        packet_id: id,
                        stream: 0,
                        sequence: value,
                        received: value % 2 == 0,
                        shared: None,
                    };
                    rows.push((tag, format!("outbound {name} {id}"), Some(format!("{row:?}"))));
                    changes.outbound.insert((name, id), Some(row));
                }
                _ => {
                    let record = record::encode_one(&message("w", payload(value, 50)));
                    let row = WillRow {
                        client_id: name.clone(),
                        record,
                        delay_s: value as u32,
                    };
                    rows.push((tag, format!("will {name}"), Some(value.to_string())));
                    changes.wills.insert(name, Some(row));
                }
            }
        });
    }

    fn read(&mut self) {
        let (which, count) = (self.dice.below(CONSUMERS.len()), 1 + self.dice.below(25));
        let machine = self.machine.as_mut().expect("open");
        let (consumer, hand) = &mut self.readers[which];
        if hand.len() > 60 {
            return;
        }
        for entry in machine.next(consumer, count).into_iter().flatten() {
            let text = std::str::from_utf8(&entry.message.payload).expect("text");
            let number = text.split(' ').next().and_then(|n| n.parse().ok()).unwrap_or(0);
            hand.push_back((entry, number));
        }
    }

    fn consume(&mut self) {
        let which = self.dice.below(CONSUMERS.len());
        let (consumer, hand) = &mut self.readers[which];
        match self.dice.below(10) {
            // A lost connection: everything open comes again.
            0 => {
                consumer.rewind();
                hand.clear();
            }
            n => {
                for _ in 0..1 + self.dice.below(20) {
                    let place = if n < 3 { self.dice.below(hand.len()) } else { 0 };
                    let Some((entry, number)) = hand.remove(place) else {
                        return;
                    };
                    if !entry.notice {
                        self.disk.mark(Mark::Consumed(which, number));
                    }
                    consumer.acknowledge(entry.position);
                }
            }
        }
    }

    /// A module's batch: what it did and where it stands, in one commit.
    fn effects(&mut self) {
        let which = BY_EFFECTS;
        let (mut consumer, mut hand) = self.readers.remove(which);
        let count = hand.len().min(5);
        let (notices, done): (Vec<_>, Vec<_>) = hand.drain(..count).partition(|(e, _)| e.notice);
        for (entry, _) in notices {
            consumer.acknowledge(entry.position);
        }
        for (_, number) in &done {
            self.disk.mark(Mark::Consumed(which, *number));
        }
        let (cursors, left) = consumer.prepare(done.iter().map(|(e, _)| e.position));
        self.batch(|_, batch, _| {
            let changes = batch.changes();
            changes.cursors.extend(
                cursors
                    .into_iter()
                    .map(|(consumer, stream, to)| ((consumer, stream), to)),
            );
        });
        self.commit(false);
        consumer.settle_all(left);
        self.readers.insert(which, (consumer, hand));
    }

    /// Syncs fail for a while, under commits and checkpoints.
    fn fail(&mut self) {
        self.disk.set(disk::Faults {
            sync: true,
            ..Default::default()
        });
        for _ in 0..1 + self.dice.below(3) {
            self.publish();
            self.change();
            self.commit(true);
        }
        self.disk.set(disk::Faults::default());
    }

    fn commit(&mut self, due: bool) {
        let machine = self.machine.as_ref().expect("open");
        let writer = Rc::clone(&machine.writer);
        let checkpointer = Rc::clone(&machine.checkpointer);
        match self.dice.below(8) {
            // A checkpoint comes in the middle of the commit …
            0 => {
                disk::at(self.dice.below(20) as u32, move || drop(checkpointer.checkpoint()));
                writer.borrow_mut().step(due);
            }
            // … or the commit in the middle of a checkpoint.
            1 => {
                disk::at(self.dice.below(20) as u32, move || {
                    writer.borrow_mut().step(due);
                });
                let _ = checkpointer.checkpoint();
            }
            _ => {
                writer.borrow_mut().step(due);
            }
        }
        // What did not come to pass in the middle comes now.
        if let Some(what) = disk::not_at() {
            what();
        }
        let machine = self.machine.as_ref().expect("open");
        if machine.wanted.try_recv().is_ok() && self.dice.below(3) > 0 {
            let _ = machine.checkpointer.checkpoint();
        }
        self.acknowledge_committed();
    }

    fn close(&mut self) -> Machine {
        self.readers.clear();
        self.states.clear();
        self.machine.take().expect("open")
    }

    fn act(&mut self, folder: &Path) {
        match self.dice.below(100) {
            0..38 => self.publish(),
            38..52 => self.change(),
            52..66 => self.read(),
            66..76 => self.consume(),
            76..79 => self.effects(),
            79 => self.fail(),
            80..97 => {
                let due = self.dice.below(3) == 0;
                self.commit(due);
            }
            97..99 => {
                self.close().settle();
                self.open();
            }
            _ => {
                let next = folder.join(self.disk.ops().to_string());
                let survivor = self.disk.survive(&next);
                let old = std::mem::replace(&mut self.disk, survivor);
                drop(self.close());
                old.remove();
                self.open();
            }
        }
    }
}

fn record_run(seed: u64, broken: Broken) -> Run {
    let folder = scratch(&format!("run-{broken:?}-{seed}"));
    let first = folder.0.join("0");
    std::fs::create_dir_all(&first).expect("made");
    let mut tuning = if seed % 16 == 15 { SHIPPED } else { SMALL };
    if broken == Broken::NotSynced {
        tuning.synchronous = "NORMAL";
    }
    let mut driver = Driver {
        dice: Dice::new(seed, 0),
        disk: Disk::new(&first, tuning, &[]),
        machine: None,
        readers: Vec::new(),
        states: Vec::new(),
        facts: Facts::default(),
        tags: Vec::new(),
        tag: 0,
        acknowledged: 0,
        number: 0,
        broken,
    };
    driver.open();
    for _ in 0..400 {
        driver.act(&folder.0);
    }
    driver.close().settle();
    Run {
        seed,
        ops: driver.disk.remove(),
        facts: driver.facts,
    }
}

/// What was known at the cut.
struct Known {
    acknowledged: u64,
    consumed: BTreeSet<(usize, u64)>,
}

impl Known {
    fn at(ops: &[Op<Mark>]) -> Known {
        let mut known = Known {
            acknowledged: 0,
            consumed: BTreeSet::new(),
        };
        for op in ops {
            match op {
                Op::Mark(Mark::Acknowledged(tag)) => known.acknowledged = *tag,
                Op::Mark(Mark::Consumed(consumer, number)) => drop(known.consumed.insert((*consumer, *number))),
                _ => {}
            }
        }
        known
    }
}

macro_rules! ensure {
    ($holds:expr, $($why:tt)+) => {
        if !$holds {
            return Err(format!($($why)+));
        }
    };
}

/// Opens what is left and asks whether the promises hold.
fn examine(folder: &Path, facts: &Facts, known: &Known) -> Result<(), String> {
    let mut machine = Machine::open(folder).map_err(|e| format!("does not open: {e}"))?;
    let aside = std::fs::read_dir(folder).expect("readable").filter_map(Result::ok);
    let aside: Vec<_> = aside
        .map(|e| e.file_name())
        .filter(|n| n.to_string_lossy().contains("damaged"))
        .collect();
    ensure!(aside.is_empty(), "taken for damaged: {aside:?}");
    let faults = machine.checkpointer.faults();
    ensure!(faults == "ok", "not sound: {faults}");
    let tag = machine.tag();
    ensure!(
        tag >= known.acknowledged,
        "commit {} was acknowledged, the newest that is there is {tag}",
        known.acknowledged
    );

    let rows = rows_of(&machine.startup);
    let expected = facts.rows_at(tag);
    // What a failed commit changed was refused to whoever asked for it: it may be there or not.
    let refused = |key: &String| facts.rows.iter().any(|(t, k, _)| k == key && facts.failed.contains(t));
    for (key, value) in expected.iter().filter(|(key, _)| !refused(key)) {
        ensure!(
            rows.get(key) == Some(value),
            "{key} is {:?} instead of {value:?} at commit {tag}",
            rows.get(key)
        );
    }
    let more = rows.keys().find(|key| !expected.contains_key(*key) && !refused(key));
    ensure!(more.is_none(), "{more:?} is there and should be gone at commit {tag}");
    for stream in machine.log.streams() {
        let told = (
            stream.messages.load(Ordering::Relaxed),
            stream.bytes.load(Ordering::Relaxed),
        );
        let counted = machine.checkpointer.counted(stream.id);
        ensure!(
            told == counted,
            "stream {}: {counted:?} are there, its totals say {told:?}",
            stream.name
        );
    }
    if tag < facts.begun {
        return Ok(());
    }

    let log = machine.log.clone();
    let mut states = Vec::new();
    for (name, _) in CONSUMERS {
        let state = log.find_consumer(name);
        states.push(state.ok_or_else(|| format!("consumer {name} is gone"))?);
    }
    {
        let mut batch = log.batch();
        let newest_before = facts
            .sent
            .iter()
            .filter(|s| s.is_in(tag))
            .map(|s| s.sequence)
            .max()
            .unwrap_or(0);
        for topic in 0..TOPICS.len() {
            let newest = machine.append(&mut batch, &states, AFTERWARDS + topic as u64, topic, 30);
            ensure!(newest > newest_before, "sequence {newest} is given out again");
        }
        batch.ticket();
    }
    machine.writer.borrow_mut().step(true);
    ensure!(machine.committed().iter().any(|(_, ok)| *ok), "nothing can be written");

    for (index, state) in states.iter().enumerate() {
        let name = CONSUMERS[index].0;
        let mut reader = Consumer::new(log.clone(), Arc::clone(state));
        let mut got: Vec<(u16, u64, u64)> = Vec::new();
        while let Some(entries) = machine.next(&mut reader, 1_000) {
            for e in entries.into_iter().filter(|e| !e.notice) {
                let text = std::str::from_utf8(&e.message.payload).map_err(|e| e.to_string())?;
                let number: u64 = text.split(' ').next().and_then(|n| n.parse().ok()).ok_or("no number")?;
                if number < AFTERWARDS {
                    let sent = facts.sent.iter().find(|s| s.number == number);
                    let sent = sent.ok_or_else(|| format!("{name} gets {number}, which nobody sent"))?;
                    ensure!(
                        sent.is_in(tag),
                        "{name} gets {number} of commit {}, behind {tag}",
                        sent.tag
                    );
                    ensure!(text == payload(number, sent.size), "{name} gets {number} changed");
                    ensure!(
                        e.position.sequence.0 == sent.sequence,
                        "{name} gets {number} under another sequence"
                    );
                }
                got.push((e.position.stream, e.position.sequence.0, number));
            }
        }
        for stream in 0..2 {
            let sequences: Vec<u64> = got.iter().filter(|(s, ..)| *s == stream).map(|(_, s, _)| *s).collect();
            ensure!(
                sequences.is_sorted_by(|a, b| a < b),
                "{name}: stream {stream} is out of order: {sequences:?}"
            );
        }
        let got: BTreeSet<u64> = got.iter().map(|(.., n)| *n).collect();
        let losses: Vec<_> = machine.checkpointer.losses().map_err(|e| e.to_string())?;
        let losses: Vec<_> = losses.iter().filter(|l| l.consumer == name).collect();
        let declared: u64 = losses.iter().map(|l| l.count).sum();
        let gone = |s: &&Sent| {
            s.is_in(tag)
                && wants(index, s.topic)
                && !got.contains(&s.number)
                && !known.consumed.contains(&(index, s.number))
        };
        let gone: Vec<_> = facts.sent.iter().filter(gone).collect();
        for s in &gone {
            let named = losses.iter().any(|l| (l.first..=l.last).contains(&s.sequence));
            ensure!(
                named,
                "{name} does not get {} (sequence {}) of commit {}, and nothing says so; {tag} is there, {} was acknowledged",
                s.number,
                s.sequence,
                s.tag,
                known.acknowledged
            );
        }
        let after = (0..TOPICS.len())
            .filter(|t| wants(index, *t) && !got.contains(&(AFTERWARDS + *t as u64)))
            .count();
        let missing = gone.len() + after;
        // What was acknowledged out of order and came again after a lost connection may be both consumed and declared.
        let twice = |s: &&Sent| {
            s.is_in(tag)
                && wants(index, s.topic)
                && !got.contains(&s.number)
                && known.consumed.contains(&(index, s.number))
        };
        let most = missing + facts.sent.iter().filter(twice).count();
        let is_exact = (missing as u64..=most as u64).contains(&declared);
        ensure!(is_exact, "{name}: {missing} are missing, {declared} are declared");
    }
    Ok(())
}

fn rows_of(startup: &Startup) -> BTreeMap<String, String> {
    let mut rows = BTreeMap::new();
    for r in &startup.retained {
        let m = record::decode_one(r.clone()).expect("sound");
        rows.insert(format!("retained {}", m.topic.as_str()), format!("{:?}", m.payload));
    }
    for s in &startup.sessions {
        rows.insert(format!("session {}", s.client_id), format!("{s:?}"));
    }
    for (client, id) in &startup.inbound {
        rows.insert(format!("inbound {client} {id}"), String::new());
    }
    for o in &startup.outbound {
        rows.insert(format!("outbound {} {}", o.client_id, o.packet_id), format!("{o:?}"));
    }
    for w in &startup.wills {
        rows.insert(format!("will {}", w.client_id), w.delay_s.to_string());
    }
    rows
}

fn lay_out(folder: &Path, image: &[(String, Vec<u8>)]) {
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir_all(folder).expect("made");
    for (name, content) in image {
        std::fs::write(folder.join(name), content).expect("written");
    }
}

/// Where a point cuts its run.
fn cut_of(run: &Run, point: u64) -> (usize, Dice) {
    let mut dice = Dice::new(run.seed, point + 1);
    (1 + dice.below(run.ops.len()), dice)
}

/// Cuts the run at these points; what is wrong, by point.
fn cut(run: &Run, points: impl Iterator<Item = u64>) -> Vec<(u64, String)> {
    let mut cuts: Vec<_> = points.map(|p| (cut_of(run, p), p)).collect();
    cuts.sort_by_key(|((place, _), point)| (*place, *point));
    let folder = scratch(&format!("cut-{}-{:?}", run.seed, std::thread::current().id()));
    let mut walk = Walk::new(&run.ops);
    let mut wrong = Vec::new();
    for ((place, mut dice), point) in cuts {
        walk.to(place);
        let known = Known::at(&run.ops[..place]);
        let image = walk.image(&mut dice);
        let left = folder.0.join("left");
        lay_out(&left, &image);
        let mut found = Ok(());
        if dice.below(8) == 0 {
            // The power goes again while the log opens, or soon after.
            let without_index: Vec<_> = image.into_iter().filter(|(name, _)| name != "log.db-shm").collect();
            let disk: Arc<Disk<Mark>> = Disk::new(&left, SMALL, &without_index);
            found = examine(&left, &run.facts, &known);
            let ops = disk.remove();
            let mut again = Walk::new(&ops);
            let base = 3 * without_index.len() + 1;
            again.to(base + dice.below(ops.len() - base + 1));
            lay_out(&left, &again.image(&mut dice));
        }
        let found = found.and_then(|()| examine(&left, &run.facts, &known));
        if let Err(why) = found {
            wrong.push((point, format!("cut at {place} of {}: {why}", run.ops.len())));
        }
    }
    wrong
}

const POINTS_A_RUN: u64 = 200;

/// `points` cuts over as many runs as they need, on every processor; what is wrong, and how many operations the runs had.
fn cuts(points: u64, broken: Broken) -> (Vec<String>, usize) {
    let next = AtomicU64::new(0);
    let wrong = Mutex::new(Vec::new());
    let ops = AtomicUsize::new(0);
    let runs = points.div_ceil(POINTS_A_RUN);
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= runs {
                        return;
                    }
                    let run = record_run(seed, broken);
                    ops.fetch_add(run.ops.len(), Ordering::Relaxed);
                    let here = POINTS_A_RUN.min(points - seed * POINTS_A_RUN);
                    let found = cut(&run, 0..here);
                    let told = found
                        .into_iter()
                        .map(|(point, why)| format!("TIDEGATE_CRASH_SEED={seed}:{point}: {why}"));
                    lock(&wrong).extend(told);
                }
            });
        }
    });
    (wrong.into_inner().expect("nobody panicked"), ops.into_inner())
}

#[test]
fn after_a_power_cut_at_any_point_what_was_acknowledged_is_there_or_declared() {
    if let Ok(seed) = std::env::var("TIDEGATE_CRASH_SEED") {
        let (run, point) = seed.split_once(':').expect("RUN:POINT");
        let run = record_run(run.parse().expect("a number"), Broken::Nothing);
        let found = cut(&run, std::iter::once(point.parse().expect("a number")));
        assert!(found.is_empty(), "{found:#?}");
        return;
    }
    let points = std::env::var("TIDEGATE_CRASH_POINTS").map_or(400, |n| n.parse().expect("a number"));
    let began = clock::monotonic();
    let (wrong, ops) = cuts(points, Broken::Nothing);
    println!(
        "{points} power cuts in {} runs of {ops} operations: {:.1} s",
        points.div_ceil(POINTS_A_RUN),
        began.elapsed().as_secs_f64()
    );
    assert!(
        wrong.is_empty(),
        "{} of {points}, first {:#?}",
        wrong.len(),
        &wrong[..wrong.len().min(5)]
    );
}

/// The test's own test: a log that is broken on purpose is caught.
#[test]
fn a_log_that_does_not_sync_or_acknowledges_early_is_caught() {
    for broken in [Broken::NotSynced, Broken::Early] {
        let (wrong, _) = cuts(2 * POINTS_A_RUN, broken);
        println!(
            "{broken:?}: {} of {} cuts are caught, such as {:?}",
            wrong.len(),
            2 * POINTS_A_RUN,
            wrong.first()
        );
        assert!(wrong.len() > 10, "{broken:?} is not noticed: {wrong:#?}");
    }
}

#[test]
fn a_run_is_the_same_each_time() {
    let told = |run: Run| -> Vec<String> {
        let short = |op: &Op<Mark>| match op {
            Op::Write { file, at, data } => format!("write {file} {at} {}", data.len()),
            op => format!("{op:?}"),
        };
        run.ops.iter().map(short).collect()
    };
    let (one, two) = (
        told(record_run(3, Broken::Nothing)),
        told(record_run(3, Broken::Nothing)),
    );
    let differs = one.iter().zip(&two).position(|(a, b)| a != b);
    assert!(
        one == two,
        "from operation {differs:?} on: {:?}",
        differs.map(|d| (&one[d], &two[d]))
    );
}
