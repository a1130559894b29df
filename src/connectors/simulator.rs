//! A simulated boiler: live data without hardware.
//!
//! [`Boiler`] is the pure model: a seed and the time handed in decide everything. [`Simulator`] is the task around it: it
//! samples each asset on a grid of its own, publishes the newest values and holds nothing back for later: a point of the
//! grid that passes while the broker is slow is skipped and counted.

use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;

use super::values::{self, PointValue, Reading, Value};
use super::{Connector, Publisher, Setup};
use crate::broker::handle::PublishError;
use crate::clock::{self, Instant, Timestamp};
use crate::config;
use crate::message::{Message, Source, Topic};
use crate::status::{Counter, Health, Part};

/// The model goes in steps of this length, whatever the times it is asked for: asking more often changes nothing.
const STEP: Duration = Duration::from_millis(100);
const STEP_S: f64 = 0.1;
/// After a longer pause (a suspended machine) the model goes on from where it was instead of catching up.
const STEPS_MAX: u64 = 6_000;

const ROOM: f64 = 20.0;
const BURNER_ON_BELOW: f64 = 78.0;
const BURNER_OFF_ABOVE: f64 = 92.0;
const VALVE_OPENS_ABOVE: f64 = 2.40;
const VALVE_CLOSES_BELOW: f64 = 2.25;
const FAULT_WHY: &str = "sensor wire broken (simulated)";

/// How long a publish may go on once the task is asked to stop.
const STOP_PATIENCE: Duration = Duration::from_millis(500);
/// Between two attempts at a publish that failed.
const RETRY: Duration = Duration::from_secs(1);

/// Temperature in °C, pressure in bar, safety valve, burner, and now and then a broken temperature sensor.
#[derive(Debug, Clone)]
pub struct Boiler {
    random: Random,
    /// Steps done since the start.
    steps: u64,
    /// Steps left out after pauses.
    steps_skipped: u64,
    temperature: f64,
    pressure: f64,
    burner: bool,
    valve: bool,
    /// Whether hot water is drawn, and the step at which that changes.
    drawing: bool,
    draw_changes: u64,
    fault: bool,
    fault_changes: u64,
    noise: f64,
}

impl Boiler {
    pub fn new(seed: u64) -> Boiler {
        let mut random = Random(seed);
        let fault_changes = random.steps(60, 180);
        Boiler {
            random,
            steps: 0,
            steps_skipped: 0,
            temperature: 70.0,
            pressure: pressure_at(70.0),
            burner: true,
            valve: false,
            drawing: false,
            draw_changes: 300,
            fault: false,
            fault_changes,
            noise: 0.0,
        }
    }

    /// Brings the model to this time after its start. Time never goes back: an earlier one changes nothing.
    pub fn advance(&mut self, since_start: Duration) {
        let wanted = u64::try_from(since_start.as_millis() / STEP.as_millis()).unwrap_or(u64::MAX);
        let missing = wanted.saturating_sub(self.steps + self.steps_skipped);
        if missing > STEPS_MAX {
            self.steps_skipped += missing - 1;
            self.step();
            return;
        }
        for _ in 0..missing {
            self.step();
        }
    }

    fn step(&mut self) {
        self.steps += 1;
        if self.steps >= self.draw_changes {
            self.drawing = !self.drawing;
            self.draw_changes = self.steps + self.random.steps(20, 60);
        }
        if self.steps >= self.fault_changes {
            self.fault = !self.fault;
            self.fault_changes = self.steps
                + if self.fault {
                    self.random.steps(5, 15)
                } else {
                    self.random.steps(120, 300)
                };
        }
        // The thermostat has its own sensor: it goes on working while the measured one is broken.
        if self.temperature < BURNER_ON_BELOW {
            self.burner = true;
        } else if self.temperature > BURNER_OFF_ABOVE {
            self.burner = false;
        }
        let heating = if self.burner { 0.9 } else { 0.0 };
        let loss = (self.temperature - ROOM) * if self.drawing { 0.008 } else { 0.004 };
        self.temperature += (heating - loss) * STEP_S;

        if self.pressure > VALVE_OPENS_ABOVE {
            self.valve = true;
        } else if self.pressure < VALVE_CLOSES_BELOW {
            self.valve = false;
        }
        let towards = (pressure_at(self.temperature) - self.pressure) / 4.0;
        let relief = if self.valve { 0.06 } else { 0.0 };
        self.pressure += (towards - relief) * STEP_S;
        self.noise = self.random.unit() - 0.5;
    }

    /// A signal by its name in the configuration; None where there is no such signal.
    pub fn read(&self, signal: &str) -> Option<Reading> {
        let number = |value: f64, per_unit: f64| Reading::Good(Value::Number((value * per_unit).round() / per_unit));
        Some(match signal {
            "temperature" if self.fault => Reading::Bad {
                why: FAULT_WHY.to_owned(),
            },
            "temperature" => number(self.temperature + 0.2 * self.noise, 10.0),
            "pressure" => number(self.pressure + 0.01 * self.noise, 100.0),
            "valve" => Reading::Good(Value::Bool(self.valve)),
            "burner" => Reading::Good(Value::Bool(self.burner)),
            "fault" => Reading::Good(Value::Bool(self.fault)),
            _ => return None,
        })
    }
}

/// The pressure that a closed boiler settles at.
fn pressure_at(temperature: f64) -> f64 {
    1.0 + 0.02 * (temperature - ROOM)
}

/// splitmix64: small, and the same on every machine.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A span between so many seconds, in steps.
    fn steps(&mut self, from_s: u64, to_s: u64) -> u64 {
        let (from, to) = (from_s * 10, to_s * 10);
        from + self.next() % (to - from)
    }
}

/// Points in time `every` apart, counted from the start: a late one does not shift the next, a missed one is left out.
#[derive(Debug, Clone)]
struct Grid {
    every: Duration,
    next: Duration,
}

impl Grid {
    fn new(every: Duration) -> Grid {
        Grid {
            every,
            next: Duration::ZERO,
        }
    }

    fn is_due(&self, since_start: Duration) -> bool {
        since_start >= self.next
    }

    /// Goes to the first point after `since_start`; returns how many were passed over beside the one just served.
    fn advance(&mut self, since_start: Duration) -> u64 {
        let behind = since_start.saturating_sub(self.next);
        let passed = u64::try_from(behind.as_nanos() / self.every.as_nanos().max(1)).unwrap_or(u64::MAX);
        let steps = u32::try_from(passed.saturating_add(1)).unwrap_or(u32::MAX);
        self.next = self.next.saturating_add(self.every.saturating_mul(steps));
        passed
    }
}

/// One asset: its boiler, its grid, and what was published last.
struct Unit {
    asset: config::Asset,
    boiler: Boiler,
    grid: Grid,
    published: Vec<Reading>,
    sequence: u64,
}

impl Unit {
    fn new(connector: &str, asset: config::Asset) -> Unit {
        let seed = seed(&[connector, &asset.name]);
        let grid = Grid::new(asset.every);
        Unit {
            asset,
            boiler: Boiler::new(seed),
            grid,
            published: Vec::new(),
            sequence: 0,
        }
    }

    /// The values of this moment, or None where every point is within its deadband.
    fn sample(&mut self, since_start: Duration, now: Timestamp) -> Option<Vec<PointValue>> {
        self.boiler.advance(since_start);
        let unknown = || Reading::Bad {
            why: "the simulator has no such signal".to_owned(),
        };
        let readings: Vec<Reading> = self
            .asset
            .points
            .iter()
            .map(|p| self.boiler.read(&p.address).unwrap_or_else(unknown))
            .collect();
        let is_news = self.published.len() != readings.len()
            || self
                .asset
                .points
                .iter()
                .zip(&readings)
                .zip(&self.published)
                .any(|((point, new), old)| {
                    let Some(deadband) = point.deadband else { return true };
                    match (new, old) {
                        (Reading::Good(Value::Number(new)), Reading::Good(Value::Number(old))) => {
                            new != old && (new - old).abs() >= deadband
                        }
                        (new, old) => new != old,
                    }
                });
        if !is_news {
            return None;
        }
        let named = self.asset.points.iter().zip(readings);
        Some(
            named
                .map(|(point, reading)| PointValue {
                    name: point.name.clone(),
                    reading,
                    at: now,
                })
                .collect(),
        )
    }

    /// A message with the values of this moment, or None where there is nothing new.
    fn message(&mut self, since_start: Duration, source: &Source, now: Timestamp) -> Option<Message> {
        let values = self.sample(since_start, now)?;
        let name = &self.asset.name;
        let message = values::message(
            self.asset.topic.clone(),
            name,
            &values,
            self.sequence,
            source.clone(),
            now,
        );
        match message {
            Ok(message) => {
                self.sequence += 1;
                self.published = values.into_iter().map(|v| v.reading).collect();
                Some(message)
            }
            Err(error) => {
                tracing::error!(asset = %name, %error, "values that cannot be written as JSON");
                None
            }
        }
    }
}

fn seed(parts: &[&str]) -> u64 {
    // FNV-1a
    parts
        .iter()
        .flat_map(|p| p.bytes().chain([0]))
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
}

/// What `status/connector/{name}` says.
#[derive(Serialize)]
struct HealthMessage<'a> {
    health: &'static str,
    text: &'a str,
    ts: String,
}

/// The task of one connector of kind `simulator`.
pub struct Simulator {
    name: String,
    source: Source,
    units: Vec<Unit>,
}

/// What a wait ended with.
enum Outcome {
    Done,
    /// Not published; it may work later.
    Failed,
    Stop,
}

/// The task's counters.
struct Counters {
    messages: Counter,
    skipped: Counter,
    failed: Counter,
}

impl Simulator {
    pub fn new(setup: Setup) -> Simulator {
        let name = setup.connector.name;
        let units = setup.assets.into_iter().map(|asset| Unit::new(&name, asset)).collect();
        Simulator {
            source: format!("connector:{name}").into(),
            units,
            name,
        }
    }

    /// The messages that are due, with the newest values.
    fn due(&mut self, since_start: Duration, now: Timestamp, skipped: &Counter) -> Vec<Message> {
        let mut messages = Vec::new();
        for unit in self.units.iter_mut().filter(|unit| unit.grid.is_due(since_start)) {
            skipped.add(unit.grid.advance(since_start));
            messages.extend(unit.message(since_start, &self.source, now));
        }
        messages
    }

    fn next_due(&self) -> Option<Duration> {
        self.units.iter().map(|unit| unit.grid.next).min()
    }

    fn health(&self, health: &'static str, text: &str, now: Timestamp) -> Vec<Message> {
        let topic = Topic::new(format!("status/connector/{}", self.name));
        let payload = serde_json::to_vec(&HealthMessage {
            health,
            text,
            ts: now.to_string(),
        });
        // A connector's name is checked to be one level of a topic.
        let (Ok(topic), Ok(payload)) = (topic, payload) else {
            return Vec::new();
        };
        let mut message = Message::new(topic, payload, self.source.clone(), now);
        message.retain = true;
        vec![message]
    }

    /// Publishes; after `shutdown` a publish under way gets a little longer.
    async fn publish<P: Publisher>(
        &self,
        publisher: &P,
        messages: Vec<Message>,
        part: &Part,
        shutdown: &mut watch::Receiver<bool>,
    ) -> Outcome {
        let publish = publisher.publish(messages);
        tokio::pin!(publish);
        let result = tokio::select! {
            result = &mut publish => result,
            () = stopped(shutdown) => {
                let _ = tokio::time::timeout(STOP_PATIENCE, publish).await;
                return Outcome::Stop;
            }
        };
        match result {
            Ok(()) => Outcome::Done,
            Err(PublishError::Stopped) => Outcome::Stop,
            Err(error @ (PublishError::Full(_) | PublishError::NotDurable(_))) => {
                let text = format!("values are not taken: {error}; the newest ones are tried again every second");
                if part.set(Health::Late, text) {
                    tracing::warn!(connector = %self.name, %error, "values are not taken, trying again");
                }
                Outcome::Failed
            }
        }
    }

    /// Until asked to stop: waits for the grid, publishes what is due.
    async fn serve<P: Publisher>(
        &mut self,
        publisher: &P,
        part: &Part,
        shutdown: &mut watch::Receiver<bool>,
        text: &str,
    ) {
        let counters = Counters {
            messages: part.counter("messages"),
            skipped: part.counter("skipped"),
            failed: part.counter("failed"),
        };
        let start = clock::monotonic();
        let mut told = false;
        loop {
            let now = clock::wall();
            let mut messages = self.due(clock::monotonic().duration_since(start), now, &counters.skipped);
            let count = messages.len() as u64;
            if !told {
                messages.splice(0..0, self.health("good", text, now));
            }
            if !messages.is_empty() {
                match self.publish(publisher, messages, part, shutdown).await {
                    Outcome::Stop => return,
                    Outcome::Done => {
                        told = true;
                        counters.messages.add(count);
                        if part.set(Health::Good, text) {
                            tracing::info!(connector = %self.name, "publishing");
                        }
                    }
                    Outcome::Failed => {
                        counters.failed.add(count);
                        // Nobody has these values: the next ones are news, whatever the deadbands say.
                        self.units.iter_mut().for_each(|unit| unit.published.clear());
                        if is_stopped_within(RETRY, shutdown).await {
                            return;
                        }
                        continue;
                    }
                }
            }
            let wait = match self.next_due() {
                Some(next) => next.saturating_sub(clock::monotonic().duration_since(start)),
                // Nothing to do, but the health stands.
                None => Duration::from_secs(3600),
            };
            if is_stopped_within(wait, shutdown).await {
                return;
            }
        }
    }
}

impl Connector for Simulator {
    async fn run<P: Publisher>(mut self, publisher: P, part: Part, mut shutdown: watch::Receiver<bool>) {
        let text = match self.units.len() {
            1 => "simulating 1 asset".to_owned(),
            n => format!("simulating {n} assets"),
        };
        self.serve(&publisher, &part, &mut shutdown, &text).await;
        // The last word, where the broker still listens.
        let farewell = self.health("stopped", "the connector was stopped", clock::wall());
        let _ = tokio::time::timeout(STOP_PATIENCE, publisher.publish(farewell)).await;
    }
}

/// Ends when `shutdown` is true or nobody is left who could say so.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|stop| *stop).await;
}

async fn is_stopped_within(wait: Duration, shutdown: &mut watch::Receiver<bool>) -> bool {
    let until: Instant = clock::monotonic() + wait;
    tokio::select! {
        () = stopped(shutdown) => true,
        () = tokio::time::sleep_until(until.into()) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Asset, ConnectorKind, Point, SIMULATOR_SIGNALS};
    use crate::status::Status;
    use std::sync::Arc;
    use tokio::sync::{Mutex, mpsc};

    fn number(boiler: &Boiler, signal: &str) -> Option<f64> {
        match boiler.read(signal) {
            Some(Reading::Good(Value::Number(number))) => Some(number),
            _ => None,
        }
    }

    fn flag(boiler: &Boiler, signal: &str) -> bool {
        matches!(boiler.read(signal), Some(Reading::Good(Value::Bool(true))))
    }

    #[test]
    fn every_signal_of_the_configuration_is_there_and_of_its_type() {
        let boiler = Boiler::new(1);
        for (signal, is_number) in SIMULATOR_SIGNALS {
            match boiler.read(signal) {
                Some(Reading::Good(Value::Number(_))) => assert!(is_number, "{signal}"),
                Some(Reading::Good(Value::Bool(_))) => assert!(!is_number, "{signal}"),
                other => panic!("{signal}: {other:?}"),
            }
        }
        assert_eq!(boiler.read("flux"), None);
    }

    #[test]
    fn how_often_it_is_asked_changes_nothing() {
        let mut often = Boiler::new(42);
        let mut seldom = Boiler::new(42);
        for quarter in 0..=2_400 {
            often.advance(Duration::from_millis(250 * quarter));
        }
        seldom.advance(Duration::from_secs(300));
        seldom.advance(Duration::from_secs(600));
        seldom.advance(Duration::from_secs(10));
        for (signal, _) in SIMULATOR_SIGNALS {
            assert_eq!(often.read(signal), seldom.read(signal), "{signal}");
        }
        let mut other = Boiler::new(43);
        other.advance(Duration::from_secs(600));
        assert_ne!(other.temperature, often.temperature, "the seed decides nothing");
    }

    /// Two hours of ten boilers: what a heating engineer would expect of them.
    #[test]
    fn it_behaves_like_a_boiler() {
        for seed in 0..10 {
            let mut boiler = Boiler::new(seed);
            let (mut switched, mut opened, mut faults, mut fault_s, mut fault_s_max) = (0, 0, 0, 0, 0);
            let mut before = boiler.clone();
            for second in 1..=7_200 {
                boiler.advance(Duration::from_secs(second));
                let (t, p) = (boiler.temperature, boiler.pressure);
                assert!((60.0..=95.0).contains(&t), "seed {seed}, {second} s: {t} °C");
                assert!((1.5..=2.6).contains(&p), "seed {seed}, {second} s: {p} bar");
                assert!((t - before.temperature).abs() < 1.5, "a jump: seed {seed}, {second} s");
                if boiler.burner != before.burner {
                    switched += 1;
                    assert!(
                        if boiler.burner { t < 79.5 } else { t > 90.5 },
                        "seed {seed}: switched at {t} °C"
                    );
                } else if boiler.burner {
                    assert!(t > before.temperature, "it heats: seed {seed}, {second} s");
                } else {
                    assert!(t < before.temperature, "it cools: seed {seed}, {second} s");
                }
                if boiler.valve && !before.valve {
                    opened += 1;
                    assert!(p > VALVE_OPENS_ABOVE - 0.1, "seed {seed}: opened at {p} bar");
                }
                match (boiler.read("temperature"), flag(&boiler, "fault")) {
                    (Some(Reading::Bad { why }), true) => {
                        assert_eq!(why, FAULT_WHY);
                        fault_s += 1;
                        fault_s_max = fault_s_max.max(fault_s);
                    }
                    (Some(Reading::Good(_)), false) => {
                        faults += usize::from(fault_s > 0);
                        fault_s = 0;
                    }
                    other => panic!("{other:?}"),
                }
                before = boiler.clone();
            }
            assert!(switched > 60, "seed {seed}: the burner switched {switched} times");
            assert!(opened > 5, "seed {seed}: the valve opened {opened} times");
            assert!((20..=60).contains(&faults), "seed {seed}: {faults} faults");
            assert!(
                (5..=16).contains(&fault_s_max),
                "seed {seed}: a fault of {fault_s_max} s"
            );
        }
    }

    #[test]
    fn a_long_pause_is_not_caught_up() {
        let mut boiler = Boiler::new(1);
        boiler.advance(Duration::from_secs(10));
        boiler.advance(Duration::from_secs(400 * 86_400));
        let steps = boiler.steps;
        assert!(steps < 200, "{steps}");
        boiler.advance(Duration::from_secs(400 * 86_400 + 1));
        assert_eq!(boiler.steps, steps + 10);
    }

    #[test]
    fn the_grid_neither_drifts_nor_piles_up() {
        let ms = Duration::from_millis;
        let mut grid = Grid::new(ms(100));
        assert!(grid.is_due(ms(0)));
        assert_eq!(grid.advance(ms(3)), 0);
        assert_eq!(grid.next, ms(100));
        assert!(!grid.is_due(ms(99)) && grid.is_due(ms(100)));
        assert_eq!(grid.advance(ms(140)), 0);
        assert_eq!(grid.next, ms(200));
        assert_eq!(grid.advance(ms(730)), 5);
        assert_eq!(grid.next, ms(800));
        assert_eq!(grid.advance(ms(800)), 0);
        assert_eq!(grid.next, ms(900));
    }

    fn setup(every_ms: u64, deadband: Option<f64>) -> Setup {
        let point = |name: &str| Point {
            name: name.to_owned(),
            address: name.to_owned(),
            unit: None,
            deadband,
        };
        Setup {
            connector: config::Connector {
                name: "sim".to_owned(),
                kind: ConnectorKind::Simulator,
            },
            assets: vec![Asset {
                name: "boiler".to_owned(),
                topic: Topic::new("data/boiler").expect("valid"),
                connector: "sim".to_owned(),
                every: Duration::from_millis(every_ms),
                points: vec![point("temperature"), point("pressure")],
            }],
        }
    }

    #[test]
    fn a_deadband_keeps_small_changes_back() {
        let setup = setup(1000, Some(2.0));
        let mut unit = Unit::new("sim", setup.assets[0].clone());
        let source: Source = "connector:sim".into();
        let mut published = Vec::new();
        for second in 0..60 {
            let since = Duration::from_secs(second);
            if unit.message(since, &source, Timestamp::default()).is_some() {
                published.push(number(&unit.boiler, "temperature").expect("no fault in the first minute"));
            }
        }
        assert!((3..30).contains(&published.len()), "{published:?}");
        assert!(
            published.windows(2).all(|w| (w[1] - w[0]).abs() >= 2.0),
            "{published:?}"
        );
    }

    /// A broker that takes a call only when the test says so.
    struct Gate {
        calls: mpsc::UnboundedSender<Vec<Message>>,
        answers: Arc<Mutex<mpsc::UnboundedReceiver<Result<(), PublishError>>>>,
    }

    impl Publisher for Gate {
        async fn publish(&self, messages: Vec<Message>) -> Result<(), PublishError> {
            self.calls.send(messages).map_err(|_| PublishError::Stopped)?;
            self.answers
                .lock()
                .await
                .recv()
                .await
                .unwrap_or(Err(PublishError::Stopped))
        }
    }

    struct Bench {
        calls: mpsc::UnboundedReceiver<Vec<Message>>,
        answers: mpsc::UnboundedSender<Result<(), PublishError>>,
        shutdown: watch::Sender<bool>,
        status: Status,
        task: tokio::task::JoinHandle<()>,
    }

    impl Bench {
        fn start(every_ms: u64) -> Bench {
            let (calls_in, calls) = mpsc::unbounded_channel();
            let (answers, answers_out) = mpsc::unbounded_channel();
            let (shutdown, shutdown_out) = watch::channel(false);
            let status = Status::default();
            let gate = Gate {
                calls: calls_in,
                answers: Arc::new(Mutex::new(answers_out)),
            };
            let part = status.part("connector", "sim");
            let task = tokio::spawn(crate::connectors::run(setup(every_ms, None), gate, part, shutdown_out));
            Bench {
                calls,
                answers,
                shutdown,
                status,
                task,
            }
        }

        async fn call(&mut self) -> Vec<Message> {
            let call = tokio::time::timeout(Duration::from_secs(10), self.calls.recv()).await;
            call.expect("a publish within 10 s").expect("the task lives")
        }

        fn answer(&self, answer: Result<(), PublishError>) {
            self.answers.send(answer).expect("the task lives");
        }

        fn counter(&self, name: &str) -> u64 {
            self.status.report()[0].counters.get(name).copied().unwrap_or(0)
        }

        async fn stop(mut self) -> Vec<Message> {
            self.shutdown.send(true).expect("the task lives");
            let last = self.call().await;
            self.answer(Ok(()));
            let ended = tokio::time::timeout(Duration::from_secs(10), self.task).await;
            ended.expect("the task ends within 10 s").expect("without a panic");
            last
        }
    }

    fn sequence(message: &Message) -> u64 {
        let properties = message.properties.as_ref().expect("set");
        properties.user[0].1.parse().expect("a number")
    }

    fn test_runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime")
    }

    #[test]
    fn it_says_how_it_is_and_publishes_on_its_grid() {
        test_runtime().block_on(async {
            let mut bench = Bench::start(5);
            let first = bench.call().await;
            assert_eq!(first[0].topic.as_str(), "status/connector/sim");
            assert!(
                first[0].retain && first[0].payload.starts_with(br#"{"health":"good","#),
                "{first:?}"
            );
            assert_eq!(
                (first[1].topic.as_str(), &*first[1].source),
                ("data/boiler", "connector:sim")
            );
            bench.answer(Ok(()));
            for expected in 1..=5 {
                let messages = bench.call().await;
                assert_eq!((messages.len(), sequence(&messages[0])), (1, expected));
                bench.answer(Ok(()));
            }
            let last = bench.stop().await;
            assert!(
                last[0].retain && last[0].payload.starts_with(br#"{"health":"stopped","#),
                "{last:?}"
            );
        });
    }

    #[test]
    fn a_slow_broker_gets_the_newest_values_and_no_pile() {
        test_runtime().block_on(async {
            let mut bench = Bench::start(20);
            let first = bench.call().await;
            // While the broker is silent the grid goes on: at least 10 points pass.
            let until = clock::monotonic() + Duration::from_millis(230);
            tokio::time::sleep_until(until.into()).await;
            assert!(bench.calls.try_recv().is_err(), "one publish at a time");
            let released = clock::wall();
            bench.answer(Ok(()));
            let next = bench.call().await;
            assert_eq!((next.len(), sequence(&next[0])), (1, 1));
            assert!(
                next[0].received >= released,
                "old values: {} and {released}",
                next[0].received
            );
            assert!(next[0].received.millis_since(first[1].received) >= 200);
            assert!(bench.counter("skipped") >= 9, "{}", bench.counter("skipped"));
            bench.answer(Ok(()));
            bench.stop().await;
        });
    }

    #[test]
    fn a_refusal_is_said_and_tried_again_with_new_values() {
        test_runtime().block_on(async {
            let mut bench = Bench::start(20);
            let first = bench.call().await;
            bench.answer(Err(PublishError::Full("default".to_owned())));
            let second = bench.call().await;
            let report = bench.status.report();
            assert_eq!(report[0].health, Health::Late);
            assert!(
                report[0].text.contains("the stream \"default\" is full"),
                "{}",
                report[0].text
            );
            assert_eq!((bench.counter("messages"), bench.counter("failed")), (0, 1));
            assert_eq!(second[0].topic.as_str(), "status/connector/sim");
            assert!(second[1].received > first[1].received);
            bench.answer(Ok(()));
            bench.call().await;
            assert_eq!(bench.status.report()[0].health, Health::Good);
            assert_eq!(bench.counter("messages"), 1);
            bench.answer(Ok(()));
            bench.stop().await;
        });
    }

    #[test]
    fn it_ends_with_the_broker() {
        test_runtime().block_on(async {
            let mut bench = Bench::start(20);
            bench.call().await;
            bench.answer(Err(PublishError::Stopped));
            bench.call().await;
            bench.answer(Err(PublishError::Stopped));
            let ended = tokio::time::timeout(Duration::from_secs(10), bench.task).await;
            ended.expect("the task ends within 10 s").expect("without a panic");
        });
    }
}
