//! The engine with a machine and a gateway that the test plays.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use super::*;
use crate::config::{Address, Asset, ConnectorKind, DataType, Device, Limits, Payload, Point, SafeUplink, Signal};
use crate::log::consumer::Position;
use crate::message::{Properties, Sequence, TopicFilter};
use crate::status::Status;
use serde_json::{Value as Json, json};
use tokio::sync::{mpsc, oneshot};

/// What the driver was asked for.
#[derive(Debug, Clone, PartialEq)]
enum Asked {
    Read(usize),
    Write(usize, usize, Raw),
    Safe,
}

/// A machine that answers as the test said, asset by asset.
#[derive(Clone, Default)]
struct Machine(Arc<Mutex<Script>>);

#[derive(Default)]
struct Script {
    asked: Vec<(Duration, Asked)>,
    faults: HashMap<usize, Fault>,
    /// Reads of this asset take so long.
    slow: HashMap<usize, Duration>,
    written: HashMap<(usize, usize), Raw>,
    write_fault: Option<Fault>,
    /// Writes are confirmed and change nothing.
    deaf: bool,
    /// Writes end when the test says so.
    hold_writes: Option<oneshot::Receiver<()>>,
    start: Option<tokio::time::Instant>,
}

struct Played {
    machine: Machine,
    events: mpsc::UnboundedReceiver<Event>,
}

impl Machine {
    fn script(&self) -> std::sync::MutexGuard<'_, Script> {
        self.0.lock().expect("no test panics while it holds it")
    }

    fn note(&self, asked: Asked) {
        let mut script = self.script();
        let start = *script.start.get_or_insert_with(tokio::time::Instant::now);
        script.asked.push((start.elapsed(), asked));
    }

    fn reads(&self, asset: usize) -> Vec<u64> {
        let script = self.script();
        let of = script.asked.iter().filter(|(_, asked)| *asked == Asked::Read(asset));
        of.map(|(at, _)| at.as_millis() as u64).collect()
    }

    fn writes(&self) -> Vec<Asked> {
        let script = self.script();
        let writes = script.asked.iter().map(|(_, asked)| asked);
        writes.filter(|a| !matches!(a, Asked::Read(_))).cloned().collect()
    }
}

impl Driver for Played {
    async fn read(&mut self, asset: usize, points: &[usize], samples: &mut Vec<Sample>) -> Result<(), Fault> {
        self.machine.note(Asked::Read(asset));
        let (slow, fault) = {
            let script = self.machine.script();
            (script.slow.get(&asset).copied(), script.faults.get(&asset).cloned())
        };
        if let Some(slow) = slow {
            tokio::time::sleep(slow).await;
        }
        if let Some(fault) = fault {
            return Err(fault);
        }
        let script = self.machine.script();
        samples.extend(points.iter().map(|point| {
            let written = script.written.get(&(asset, *point));
            Sample::Good(written.cloned().unwrap_or(Raw::Float(*point as f64)))
        }));
        Ok(())
    }

    async fn write(&mut self, asset: usize, point: usize, value: &Raw) -> Result<(), Fault> {
        self.machine.note(Asked::Write(asset, point, value.clone()));
        let hold = self.machine.script().hold_writes.take();
        if let Some(hold) = hold {
            let _ = hold.await;
        }
        let mut script = self.machine.script();
        if let Some(fault) = script.write_fault.clone() {
            return Err(fault);
        }
        if !script.deaf {
            script.written.insert((asset, point), value.clone());
        }
        Ok(())
    }

    async fn event(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }

    async fn safe(&mut self) -> Result<(), Fault> {
        self.machine.note(Asked::Safe);
        Ok(())
    }
}

/// The gateway: keeps what is published and applied.
#[derive(Clone)]
struct PlayedGateway {
    published: mpsc::UnboundedSender<Message>,
    commands: Arc<Mutex<Option<mpsc::UnboundedReceiver<Entry>>>>,
    log: Arc<Mutex<PlayedLog>>,
}

#[derive(Default)]
struct PlayedLog {
    state: HashMap<String, Vec<u8>>,
    acknowledged: Vec<u64>,
    refuse: Option<fn() -> PublishError>,
    connected: bool,
}

struct PlayedCommands {
    gateway: PlayedGateway,
    entries: mpsc::UnboundedReceiver<Entry>,
}

impl Gateway for PlayedGateway {
    type Commands = PlayedCommands;

    async fn publish(&self, messages: Vec<Message>) -> Result<(), PublishError> {
        let refuse = self.log.lock().expect("sound").refuse;
        if let Some(refuse) = refuse {
            return Err(refuse());
        }
        for message in messages {
            self.published.send(message).map_err(|_| PublishError::Stopped)?;
        }
        Ok(())
    }

    async fn commands(
        &self,
        _: &str,
        _: Vec<TopicFilter>,
    ) -> Result<(PlayedCommands, super::super::State), PublishError> {
        let entries = self.commands.lock().expect("sound").take().expect("opened once");
        let state = self.log.lock().expect("sound").state.clone().into_iter().collect();
        let gateway = self.clone();
        Ok((PlayedCommands { gateway, entries }, state))
    }

    fn is_connected(&self, _: &str) -> bool {
        self.log.lock().expect("sound").connected
    }
}

impl Commands for PlayedCommands {
    async fn next(&mut self) -> Result<Vec<Entry>, PublishError> {
        match self.entries.recv().await {
            Some(entry) => Ok(vec![entry]),
            None => std::future::pending().await,
        }
    }

    async fn apply(&mut self, effects: Effects) -> Result<(), PublishError> {
        let mut log = self.gateway.log.lock().expect("sound");
        if let Some(refuse) = log.refuse {
            return Err(refuse());
        }
        for (key, value) in effects.state {
            match value {
                Some(value) => log.state.insert(key, value),
                None => log.state.remove(&key),
            };
        }
        log.acknowledged
            .extend(effects.acknowledge.iter().map(|p| p.sequence.0));
        for message in effects.publish {
            let _ = self.gateway.published.send(message);
        }
        Ok(())
    }
}

fn point(name: &str, writable: bool, every: Duration) -> Point {
    Point {
        name: name.to_owned(),
        address: Address::Simulator(Signal::Temperature),
        data: DataType::Float64,
        unit: None,
        scale: 1.0,
        offset: 0.0,
        deadband: None,
        every,
        writable: writable.then_some(Limits {
            min: None,
            max: Some(100.0),
            read_back: name == "checked",
        }),
    }
}

const MS: Duration = Duration::from_millis(1);

/// Assets a, b, c of the points p (read only), q and checked (writable), polled every 100 ms.
fn setup(assets: &[&str]) -> Setup {
    let every = 100 * MS;
    let asset = |name: &&str| Asset {
        name: (*name).to_owned(),
        topic: Topic::new(format!("data/{name}")).expect("valid"),
        connector: "bus".to_owned(),
        every,
        silence_max: Duration::from_secs(60),
        on_change: false,
        payload: Payload::Values,
        device: Device::Simulator,
        points: Arc::new([
            point("p", false, every),
            point("q", true, every),
            point("checked", true, every),
        ]),
    };
    Setup {
        connector: crate::config::Connector {
            name: "bus".to_owned(),
            kind: ConnectorKind::Simulator,
            command_age_max: Duration::from_secs(60),
            safe_uplink: None,
        },
        assets: assets.iter().map(asset).collect(),
        elsewhere: Vec::new(),
    }
}

struct Bench {
    machine: Machine,
    events: mpsc::UnboundedSender<Event>,
    published: mpsc::UnboundedReceiver<Message>,
    commands: mpsc::UnboundedSender<Entry>,
    log: Arc<Mutex<PlayedLog>>,
    status: Status,
    shutdown: watch::Sender<bool>,
    task: tokio::task::JoinHandle<()>,
    sequence: u64,
}

impl Bench {
    fn start(setup: Setup) -> Bench {
        Bench::with(setup, Machine::default(), PlayedLog::default())
    }

    fn with(setup: Setup, machine: Machine, log: PlayedLog) -> Bench {
        let (events, events_out) = mpsc::unbounded_channel();
        let (published_in, published) = mpsc::unbounded_channel();
        let (commands, commands_out) = mpsc::unbounded_channel();
        let (shutdown, shutdown_out) = watch::channel(false);
        let log = Arc::new(Mutex::new(log));
        let gateway = PlayedGateway {
            published: published_in,
            commands: Arc::new(Mutex::new(Some(commands_out))),
            log: Arc::clone(&log),
        };
        let driver = Played {
            machine: machine.clone(),
            events: events_out,
        };
        let status = Status::default();
        let part = status.part("connector", "bus");
        let task = tokio::spawn(run(setup, driver, gateway, part, shutdown_out));
        Bench {
            machine,
            events,
            published,
            commands,
            log,
            status,
            shutdown,
            task,
            sequence: 0,
        }
    }

    async fn next(&mut self, topic: &str) -> (Message, Json) {
        loop {
            let message = tokio::time::timeout(Duration::from_secs(600), self.published.recv()).await;
            let message = message.expect("a message in time").expect("the task lives");
            if message.topic.as_str() == topic {
                let json = serde_json::from_slice(&message.payload).expect("JSON");
                return (message, json);
            }
        }
    }

    /// The first message on the topic for which it is true.
    async fn wait_for(&mut self, topic: &str, is_it: impl Fn(&Json) -> bool) -> Json {
        loop {
            let (_, json) = self.next(topic).await;
            if is_it(&json) {
                return json;
            }
        }
    }

    fn command(&mut self, topic: &str, payload: &str, change: impl FnOnce(&mut Message)) -> Entry {
        self.sequence += 1;
        let topic = Topic::new(topic.to_owned()).expect("valid");
        let mut message = Message::new(topic, payload.to_owned(), "client:a".into(), clock::wall());
        message.sequence = Sequence(self.sequence);
        message.properties = Some(Box::<Properties>::default());
        change(&mut message);
        let entry = Entry {
            position: Position {
                stream: 0,
                sequence: Sequence(self.sequence),
            },
            message,
            notice: false,
        };
        self.commands.send(entry.clone()).expect("the task lives");
        entry
    }

    async fn ask(&mut self, payload: &str) -> Json {
        self.command("commands/a", payload, |_| {});
        self.next("answers/a").await.1
    }

    fn counter(&self, name: &str) -> u64 {
        self.status.report()[0].counters.get(name).copied().unwrap_or(0)
    }

    async fn stop(self) -> (Machine, PlayedLog, Vec<Message>) {
        self.shutdown.send(true).expect("the task lives");
        self.task.await.expect("ends without a panic");
        let mut published = self.published;
        let mut rest = Vec::new();
        while let Ok(message) = published.try_recv() {
            rest.push(message);
        }
        let log = std::mem::take(&mut *self.log.lock().expect("sound"));
        (self.machine, log, rest)
    }
}

fn block_on(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .expect("a runtime");
    runtime.block_on(test);
}

#[test]
fn values_come_on_the_grid_and_health_before_them_once_all_are_known() {
    block_on(async {
        let mut bench = Bench::start(setup(&["a", "b"]));
        let (message, json) = bench.next("data/a").await;
        assert_eq!(
            (&*message.source, json["q"]["value"].as_f64()),
            ("connector:bus", Some(1.0))
        );
        assert_eq!(json["p"]["q"], "good");
        let (health, json) = bench.next("status/connector/bus").await;
        assert!(health.retain);
        assert_eq!(
            (json["health"].as_str(), json["text"].as_str()),
            (Some("good"), Some("reads 2 assets"))
        );
        for _ in 0..4 {
            bench.next("data/b").await;
        }
        let (_, _, rest) = bench.stop().await;
        let last = rest.last().expect("a farewell");
        assert!(
            last.retain && last.payload.starts_with(br#"{"health":"stopped""#),
            "{last:?}"
        );
    });
}

#[test]
fn a_dead_device_costs_the_others_nothing_and_is_asked_ever_less() {
    block_on(async {
        let machine = Machine::default();
        machine
            .script()
            .faults
            .insert(1, Fault::Device("no answer within 1 s".to_owned()));
        let mut bench = Bench::with(setup(&["a", "b", "c"]), machine, PlayedLog::default());
        let bad = bench.wait_for("data/b", |j| j["p"]["q"] == "bad").await;
        assert!(bad["p"]["value"].is_null());
        assert!(
            bad["q"]["why"]
                .as_str()
                .expect("said")
                .starts_with("no answer within 1 s since 2")
        );
        let health = bench.wait_for("status/connector/bus", |j| j["health"] == "late").await;
        let text = health["text"].as_str().expect("said").to_owned();
        assert!(
            text.starts_with("1 of 3 assets does not answer: b: no answer within 1 s since "),
            "{text}"
        );
        while bench.machine.reads(0).len() < 20 {
            bench.next("data/a").await;
        }
        let (dead, others) = (bench.machine.reads(1).len(), bench.machine.reads(2).len());
        assert!(others >= 19, "{others}");
        assert!((2..=5).contains(&dead), "{dead} attempts at the dead one in 2 s");
        bench.machine.script().faults.clear();
        let good = bench.wait_for("data/b", |j| j["p"]["q"] == "good").await;
        assert_eq!(good["p"]["value"], 0.0);
        bench.wait_for("status/connector/bus", |j| j["health"] == "good").await;
        bench.stop().await;
    });
}

#[test]
fn one_fault_costs_one_poll() {
    block_on(async {
        let mut bench = Bench::start(setup(&["a"]));
        bench.next("data/a").await;
        let fault = Fault::Device("half a frame".to_owned());
        bench.machine.script().faults.insert(0, fault);
        bench.wait_for("data/a", |j| j["p"]["q"] == "bad").await;
        bench.machine.script().faults.clear();
        let polls = bench.counter("polls");
        bench.wait_for("data/a", |j| j["p"]["q"] == "good").await;
        assert!(bench.counter("polls") <= polls + 1, "good again with the next poll");
        assert_eq!(bench.counter("skipped"), 0);
        bench.stop().await;
    });
}

#[test]
fn a_lost_line_is_bad_for_all_and_asked_once_a_pause() {
    block_on(async {
        let machine = Machine::default();
        for asset in 0..3 {
            let fault = Fault::Line("connection refused".to_owned());
            machine.script().faults.insert(asset, fault);
        }
        let mut bench = Bench::with(setup(&["a", "b", "c"]), machine, PlayedLog::default());
        for topic in ["data/a", "data/b", "data/c"] {
            let bad = bench.wait_for(topic, |_| true).await;
            assert_eq!(bad["p"]["q"], "bad", "{topic}");
        }
        let health = bench.wait_for("status/connector/bus", |_| true).await;
        assert_eq!(health["health"], "failed");
        while bench.counter("skipped") < 30 {
            tokio::time::sleep(10 * MS).await;
        }
        let attempts: usize = (0..3).map(|asset| bench.machine.reads(asset).len()).sum();
        assert!((2..=5).contains(&attempts), "{attempts} attempts in a second");
        bench.machine.script().faults.clear();
        for topic in ["data/a", "data/b", "data/c"] {
            bench.wait_for(topic, |j| j["p"]["q"] == "good").await;
        }
        bench.stop().await;
    });
}

#[test]
fn missed_polls_are_counted_not_caught_up_and_the_rest_gets_stale() {
    block_on(async {
        let machine = Machine::default();
        machine.script().slow.insert(0, Duration::from_millis(2_600));
        let mut bench = Bench::with(setup(&["b", "a"]), machine.clone(), PlayedLog::default());
        // The first asset is slow from its second read on.
        machine.script().slow.clear();
        bench.wait_for("data/a", |j| j["p"]["q"] == "good").await;
        machine.script().slow.insert(0, Duration::from_millis(2_600));
        let stale = bench.wait_for("data/a", |j| j["p"]["q"] == "stale").await;
        assert!(stale["p"]["value"].is_null() && stale["p"]["last"] == 0.0, "{stale}");
        let why = stale["p"]["why"].as_str().expect("said");
        assert!(why.contains("the line is busy with b"), "{why}");
        machine.script().slow.clear();
        bench.wait_for("data/a", |j| j["p"]["q"] == "good").await;
        assert!(bench.counter("missed") >= 20, "{}", bench.counter("missed"));
        assert!(bench.counter("late_1s") >= 1);
        let health = bench.wait_for("status/connector/bus", |j| j["health"] == "late").await;
        assert!(
            health["text"].as_str().expect("said").contains("polls were missed"),
            "{health}"
        );
        bench.stop().await;
    });
}

#[test]
fn commands_are_carried_out_and_answered() {
    block_on(async {
        let mut bench = Bench::start(setup(&["a"]));
        let answer = bench.ask(r#"{"id":7,"write":{"q":5}}"#).await;
        assert_eq!(
            (&answer["result"], &answer["id"], &answer["asset"]),
            (&json!("done"), &json!("7"), &json!("a"))
        );
        assert_eq!(answer["points"]["q"]["value"], 5.0);
        let answer = bench.ask(r#"{"read":["q","p"]}"#).await;
        assert_eq!(answer["result"], "done");
        assert_eq!(
            (&answer["points"]["q"]["value"], &answer["points"]["p"]["value"]),
            (&json!(5.0), &json!(0.0))
        );
        bench.command("commands/a/q", "6", |m| {
            let properties = m.properties.as_mut().expect("set");
            properties.response_topic = Some("my/answers".into());
            properties.correlation_data = Some(bytes::Bytes::from_static(b"x"));
        });
        let (message, answer) = bench.next("my/answers").await;
        assert_eq!(answer["result"], "done");
        let correlation = message.properties.expect("set").correlation_data;
        assert_eq!(correlation.as_deref(), Some(&b"x"[..]));
        for (topic, payload, why) in [
            (
                "commands/a",
                r#"{"write":{"q":101}}"#,
                "q: 101 is above the limit of 100",
            ),
            ("commands/a", r#"{"write":{"p":1}}"#, "p: the point is not writable"),
            ("commands/a/x", "1", "a has no point \"x\""),
            ("commands/a", "nonsense", "no command: "),
        ] {
            bench.command(topic, payload, |_| {});
            let answer = bench.next("answers/a").await.1;
            assert_eq!(answer["result"], "refused", "{payload}");
            assert!(
                answer["why"].as_str().expect("said").starts_with(why),
                "{payload}: {answer}"
            );
        }
        let (machine, log, _) = bench.stop().await;
        assert_eq!(
            machine.writes(),
            [
                Asked::Write(0, 1, Raw::Float(5.0)),
                Asked::Write(0, 1, Raw::Float(6.0)),
                Asked::Safe,
            ]
        );
        assert_eq!(log.acknowledged, (1..=7).collect::<Vec<_>>());
    });
}

#[test]
fn a_write_that_does_not_hold_is_no_success() {
    block_on(async {
        let mut bench = Bench::start(setup(&["a"]));
        let answer = bench.ask(r#"{"write":{"checked":5}}"#).await;
        assert_eq!(answer["result"], "done");
        for (fault, result) in [
            (Fault::Refused("illegal data value".to_owned()), "failed"),
            (Fault::Device("no answer".to_owned()), "failed"),
            (Fault::Unknown("no answer to the write".to_owned()), "unknown"),
        ] {
            bench.machine.script().write_fault = Some(fault.clone());
            let answer = bench.ask(r#"{"write":{"q":5}}"#).await;
            assert_eq!(
                (&answer["result"], &answer["why"]),
                (&json!(result), &json!(format!("q: {fault}")))
            );
        }
        // The device says yes and does nothing.
        bench.machine.script().write_fault = None;
        bench.machine.script().deaf = true;
        let answer = bench.ask(r#"{"write":{"checked":9}}"#).await;
        assert_eq!(answer["result"], "failed");
        assert!(
            answer["why"].as_str().expect("said").contains("the device holds"),
            "{answer}"
        );
        bench.stop().await;
    });
}

#[test]
fn an_id_is_carried_out_once() {
    block_on(async {
        let mut bench = Bench::start(setup(&["a"]));
        let first = bench.ask(r#"{"id":"x","write":{"q":5}}"#).await;
        let again = bench.ask(r#"{"id":"x","write":{"q":5}}"#).await;
        assert_eq!(first, again, "the same answer");
        let other = bench.ask(r#"{"id":"x","write":{"q":6}}"#).await;
        assert_eq!(other["result"], "refused");
        let (machine, log, _) = bench.stop().await;
        assert_eq!(machine.writes(), [Asked::Write(0, 1, Raw::Float(5.0)), Asked::Safe]);

        // It is remembered over a restart.
        let mut bench = Bench::with(setup(&["a"]), Machine::default(), log);
        assert_eq!(bench.ask(r#"{"id":"x","write":{"q":5}}"#).await, first);
        let (machine, _, _) = bench.stop().await;
        assert_eq!(machine.writes(), [Asked::Safe]);
    });
}

#[test]
fn what_a_crash_interrupted_is_unknown_and_not_done_again() {
    block_on(async {
        let mut bench = Bench::start(setup(&["a"]));
        bench.next("data/a").await;
        let (_release, hold) = oneshot::channel();
        bench.machine.script().hold_writes = Some(hold);
        let entry = bench.command("commands/a", r#"{"write":{"q":5}}"#, |_| {});
        while bench.machine.writes().is_empty() {
            tokio::time::sleep(MS).await;
        }
        // The process dies here: what the log has is all that is left.
        bench.task.abort();
        let log = std::mem::take(&mut *bench.log.lock().expect("sound"));
        assert!(log.acknowledged.is_empty());

        let mut bench = Bench::with(setup(&["a"]), Machine::default(), log);
        bench.commands.send(entry).expect("the task lives");
        let answer = bench.next("answers/a").await.1;
        assert_eq!(answer["result"], "unknown");
        let (machine, log, _) = bench.stop().await;
        assert_eq!(machine.writes(), [Asked::Safe]);
        assert_eq!(log.acknowledged, [1]);
    });
}

#[test]
fn what_waited_too_long_is_not_done() {
    block_on(async {
        let mut bench = Bench::start(setup(&["a"]));
        bench.command("commands/a", r#"{"id":"old","write":{"q":5}}"#, |m| {
            m.received = Timestamp::from_millis(m.received.millis() - 61_000);
        });
        let answer = bench.next("answers/a").await.1;
        assert_eq!((&answer["result"], &answer["id"]), (&json!("expired"), &json!("old")));
        let (machine, _, _) = bench.stop().await;
        assert_eq!(machine.writes(), [Asked::Safe]);
    });
}

#[test]
fn nothing_is_written_to_a_machine_while_the_log_cannot_be() {
    block_on(async {
        let mut bench = Bench::start(setup(&["a"]));
        bench.next("data/a").await;
        bench.log.lock().expect("sound").refuse = Some(|| PublishError::NotDurable("disk full".to_owned()));
        bench.command("commands/a", r#"{"write":{"q":5}}"#, |_| {});
        let polls = bench.counter("polls");
        while bench.counter("polls") < polls + 5 {
            tokio::time::sleep(10 * MS).await;
        }
        assert_eq!(bench.machine.writes(), [], "polls go on, the command waits");
        while bench.status.report()[0].health != Health::Late {
            tokio::time::sleep(10 * MS).await;
        }
        bench.log.lock().expect("sound").refuse = None;
        let answer = bench.next("answers/a").await.1;
        assert_eq!(answer["result"], "done");
        assert_eq!(bench.machine.writes(), [Asked::Write(0, 1, Raw::Float(5.0))]);
        bench.wait_for("status/connector/bus", |j| j["health"] == "good").await;
        bench.stop().await;
    });
}

#[test]
fn values_that_are_not_taken_wait_in_order_and_the_oldest_give_way() {
    block_on(async {
        let mut bench = Bench::start(setup(&["a"]));
        bench.next("data/a").await;
        bench.log.lock().expect("sound").refuse = Some(|| PublishError::Full("default".to_owned()));
        while bench.counter("polls") < 8 {
            tokio::time::sleep(10 * MS).await;
        }
        bench.log.lock().expect("sound").refuse = None;
        let mut sequences = Vec::new();
        for _ in 0..8 {
            let (message, _) = bench.next("data/a").await;
            let properties = message.properties.expect("set");
            sequences.push(properties.user[0].1.parse::<u64>().expect("a number"));
        }
        let expected: Vec<u64> = (sequences[0]..sequences[0] + 8).collect();
        assert_eq!(sequences, expected);
        assert!(sequences[0] <= 2 && bench.counter("dropped") == 0);
        bench.stop().await;
    });
}

#[test]
fn every_edge_is_told() {
    block_on(async {
        let mut bench = Bench::start(setup(&["a"]));
        bench.next("data/a").await;
        let at = Timestamp::from_millis(1_000);
        for n in 0..50 {
            let event = Event {
                asset: 0,
                point: 0,
                sample: Sample::Good(Raw::Float(f64::from(n))),
                at: Some(at),
            };
            bench.events.send(event).expect("the task lives");
        }
        for n in 0..50 {
            let json = bench.wait_for("data/a", |j| j["q"].is_null()).await;
            assert_eq!(json["p"]["value"], f64::from(n));
            assert_eq!(json["p"]["ts"], "1970-01-01T00:00:01.000Z");
        }
        bench.stop().await;
    });
}

#[test]
fn outputs_are_safe_when_their_uplink_is_lost() {
    block_on(async {
        let mut setup = setup(&["a"]);
        setup.connector.safe_uplink = Some(SafeUplink {
            name: "cloud".to_owned(),
            after: 300 * MS,
        });
        let log = PlayedLog {
            connected: true,
            ..PlayedLog::default()
        };
        let mut bench = Bench::with(setup, Machine::default(), log);
        while bench.machine.reads(0).len() < 6 {
            bench.next("data/a").await;
        }
        assert_eq!(bench.machine.writes(), []);
        bench.log.lock().expect("sound").connected = false;
        while bench.machine.writes().is_empty() {
            bench.next("data/a").await;
        }
        let (machine, _, _) = bench.stop().await;
        assert_eq!(
            machine.writes(),
            [Asked::Safe, Asked::Safe],
            "once when it was lost, once at the stop"
        );
    });
}

#[test]
fn it_ends_with_the_broker() {
    block_on(async {
        let bench = Bench::start(setup(&["a"]));
        bench.log.lock().expect("sound").refuse = Some(|| PublishError::Stopped);
        let ended = tokio::time::timeout(Duration::from_secs(60), bench.task).await;
        ended.expect("in time").expect("without a panic");
    });
}
