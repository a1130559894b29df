//! One connector at work, whatever it speaks: polls on a grid, carries out commands, publishes values and health.
//!
//! The engine is one task and the driver's only caller. Polls start at points of a grid: a late one shifts no other, a
//! missed one is counted and left out. A device that is lost is asked ever less, and costs the others on its line no more
//! than its timeouts. Values wait in an [`Outbox`] while the broker commits, so polling goes on.
//!
//! A command is carried out once: that it begins is durable before the first byte goes to the machine, and its answer,
//! its acknowledgement and what is remembered of it are one commit.

use std::collections::VecDeque;
use std::time::Duration;

use futures_util::FutureExt;
use serde::Serialize;
use tokio::sync::watch;
use tracing::{info, warn};

use super::command::{self, Action, Answer, Changes, Command, Once, Outcome, Remembered, Target};
use super::driver::{Driver, Event, Fault, Raw, Sample};
use super::grid::Retry;
use super::outbox::Outbox;
use super::report::Group;
use super::scaling::{self, Scaling};
use super::values::{self, Quality, Reading, Writer};
use super::{Commands, Gateway, Setup};
use crate::broker::handle::PublishError;
use crate::clock::{self, Instant, Timestamp};
use crate::log::consumer::{Effects, Entry};
use crate::message::{Message, Source, Topic};
use crate::status::{Counter, Health, Part};

/// Once the task is asked to stop: for outputs to get safe, and for what is left to be published. Together they stay below
/// what the supervisor gives to connectors.
const SAFE_PATIENCE: Duration = Duration::from_millis(200);
const STOP_PATIENCE: Duration = Duration::from_millis(80);
/// Between two attempts at what the log or the broker refused.
const RETRY: Duration = Duration::from_secs(1);
/// Housekeeping: uplinks that outputs hang on, health.
const TICK: Duration = Duration::from_secs(1);
/// A connector that missed a poll is called late for so long.
const LATE_FOR: Duration = Duration::from_secs(60);
/// Events taken at once before polls have their turn.
const EVENTS_MAX: usize = 256;
/// Devices named in the text of a connector's health.
const NAMED_MAX: usize = 3;

pub(super) async fn run<D: Driver, G: Gateway>(
    setup: Setup,
    driver: D,
    gateway: G,
    part: Part,
    mut shutdown: watch::Receiver<bool>,
) {
    let outbox = Outbox::new(part.counter("messages"), part.counter("dropped"));
    let mut engine = Engine::new(setup, driver, part, &outbox);
    let sending = outbox.send(&gateway);
    tokio::pin!(sending);
    let is_broker_gone = tokio::select! {
        () = &mut sending => true,
        () = engine.serve(&gateway, &mut shutdown) => false,
    };
    // First what moves machines, then the words about it.
    match tokio::time::timeout(SAFE_PATIENCE, engine.driver.safe()).await {
        Ok(Ok(())) => {}
        Ok(Err(fault)) => warn!(connector = %engine.name, %fault, "outputs are not in their safe state"),
        Err(_) => warn!(connector = %engine.name, "outputs are not known to be in their safe state: no answer in time"),
    }
    if is_broker_gone {
        return;
    }
    engine.farewell();
    let told = async {
        while !outbox.is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        () = sending => {}
        // What the broker does not take by then is lost like all values of a gateway that is not running.
        _ = tokio::time::timeout(STOP_PATIENCE, told) => {}
    }
}

/// What is lost: a device, or the whole line.
#[derive(Debug, Default)]
struct Loss {
    why: String,
    since: Timestamp,
    retry: Retry,
}

struct Counters {
    polls: Counter,
    missed: Counter,
    /// Polls left out because the device is lost and its next attempt is not due.
    skipped: Counter,
    faults: Counter,
    commands: Counter,
    late_10ms: Counter,
    late_50ms: Counter,
    late_1s: Counter,
    late_max_ms: Counter,
}

struct Engine<'a, D> {
    name: String,
    source: Source,
    setup: Setup,
    driver: D,
    state: State<'a>,
    /// Commands taken from the log and not carried out yet.
    inbox: VecDeque<Entry>,
    /// What was done and could not be written down yet; no other command is carried out before it is.
    unfinished: Option<Effects>,
    commands_not_before: Duration,
    once: Once,
    /// Since when the uplink that outputs hang on is lost, and whether they are safe.
    uplink_lost: Option<Duration>,
    is_safe: bool,
    /// Why they are not, as it was said last.
    unsafe_told: String,
}

/// All but the driver, so that values can age while the driver reads.
struct State<'a> {
    start: Instant,
    groups: Vec<Group>,
    /// By asset: its writer, the number of its next message, and its loss.
    assets: Vec<AssetState>,
    line: Option<Loss>,
    missed_at: Option<Duration>,
    part: Part,
    counters: Counters,
    outbox: &'a Outbox,
    health_told: Option<(Health, String)>,
    health_not_before: Duration,
}

struct AssetState {
    name: String,
    topic: Topic,
    source: Source,
    writer: Writer,
    payload: crate::config::Payload,
    sequence: u64,
    loss: Option<Loss>,
}

/// What a wait ended with.
enum Woken {
    Stop,
    Due,
    Commands(Result<Vec<Entry>, PublishError>),
    Event(Event),
}

impl State<'_> {
    fn now(&self) -> Duration {
        clock::monotonic().duration_since(self.start)
    }

    /// The group that has waited longest.
    fn due(&self, now: Duration) -> Option<usize> {
        let earliest = (0..self.groups.len()).min_by_key(|g| self.groups[*g].grid.next())?;
        (self.groups[earliest].grid.next() <= now).then_some(earliest)
    }

    fn next_due(&self) -> Option<Duration> {
        self.groups.iter().map(|g| g.grid.next()).min()
    }

    fn next_stale(&self) -> Option<Duration> {
        self.groups.iter().filter_map(Group::stale_at).min()
    }

    fn measure_start(&mut self, group: usize, now: Duration) {
        let late = now.saturating_sub(self.groups[group].grid.next());
        for (limit, counter) in [
            (10, &self.counters.late_10ms),
            (50, &self.counters.late_50ms),
            (1_000, &self.counters.late_1s),
        ] {
            if late > Duration::from_millis(limit) {
                counter.add(1);
            }
        }
        let late_ms = u64::try_from(late.as_millis()).unwrap_or(u64::MAX);
        if late_ms > self.counters.late_max_ms.get() {
            self.counters.late_max_ms.set(late_ms);
        }
    }

    /// Ages what nobody reads while the line is busy.
    fn age(&mut self, busy_with: &str, wall: Timestamp) {
        let now = self.now();
        for nth in 0..self.groups.len() {
            self.groups[nth].age(busy_with, now, wall);
            self.tell(nth, now, wall);
        }
    }

    /// Publishes a group where it has news.
    fn tell(&mut self, group: usize, now: Duration, wall: Timestamp) {
        let group = &mut self.groups[group];
        if group.is_news(now) {
            group.publish(now);
            let asset = &mut self.assets[group.asset];
            asset.send(self.outbox, group.readings(), wall);
        }
    }

    fn lost(&mut self, asset: usize, fault: &Fault, every: Duration, now: Duration, wall: Timestamp) {
        self.counters.faults.add(1);
        let is_line = matches!(fault, Fault::Line(_));
        let place = if is_line {
            &mut self.line
        } else {
            &mut self.assets[asset].loss
        };
        let is_new = place.is_none();
        let loss = place.get_or_insert_with(|| Loss {
            since: wall,
            ..Loss::default()
        });
        loss.why = fault.to_string();
        loss.retry.failed(now, every);
        let why = loss.why.clone();
        if is_new && !is_line {
            warn!(asset = %self.assets[asset].name, why, "device lost");
        }
        for group in &mut self.groups {
            if is_line || group.asset == asset {
                group.lose(&why, now, wall);
            }
        }
        for nth in 0..self.groups.len() {
            if is_line || self.groups[nth].asset == asset {
                self.tell(nth, now, wall);
            }
        }
    }

    fn found(&mut self, asset: usize) {
        self.line = None;
        if let Some(loss) = self.assets[asset].loss.take() {
            info!(asset = %self.assets[asset].name, lost_since = %loss.since, "device answers again");
        }
    }

    /// Why a poll of this asset is not worth an attempt now.
    fn hold_back(&self, asset: usize, now: Duration) -> Option<String> {
        [&self.line, &self.assets[asset].loss]
            .into_iter()
            .flatten()
            .find(|loss| !loss.retry.is_due(now))
            .map(|loss| loss.why.clone())
    }

    fn health(&self, now: Duration) -> (Health, String) {
        if let Some(trouble) = self.outbox.trouble() {
            return (
                Health::Late,
                format!("values are not taken: {trouble}; they wait, the oldest give way"),
            );
        }
        if let Some(line) = &self.line {
            return (
                Health::Failed,
                format!("{} since {}; trying again", line.why, line.since),
            );
        }
        let count = self.assets.len();
        if !self.groups.iter().all(Group::is_known) {
            return (Health::Starting, String::new());
        }
        let lost: Vec<_> = self
            .assets
            .iter()
            .filter_map(|a| a.loss.as_ref().map(|l| (&a.name, l)))
            .collect();
        if lost.is_empty() {
            let text = match count {
                1 => "reads 1 asset".to_owned(),
                n => format!("reads {n} assets"),
            };
            return match self.missed_at {
                Some(at) if now.saturating_sub(at) < LATE_FOR => (
                    Health::Late,
                    format!(
                        "{text}, but polls were missed in the last minute: the line is slower than the periods ask"
                    ),
                ),
                _ => (Health::Good, text),
            };
        }
        let mut named: Vec<String> = lost
            .iter()
            .take(NAMED_MAX)
            .map(|(name, loss)| format!("{name}: {} since {}", loss.why, loss.since))
            .collect();
        if lost.len() > NAMED_MAX {
            named.push(format!("and {} more", lost.len() - NAMED_MAX));
        }
        let health = if lost.len() == count {
            Health::Failed
        } else {
            Health::Late
        };
        let verb = if lost.len() == 1 { "does" } else { "do" };
        (
            health,
            format!(
                "{} of {count} assets {verb} not answer: {}",
                lost.len(),
                named.join("; ")
            ),
        )
    }

    /// Says how the connector is, where that changed; at most once a tick.
    fn tell_health(&mut self, name: &str, source: &Source, wall: Timestamp) {
        let now = self.now();
        if now < self.health_not_before {
            return;
        }
        let (health, text) = self.health(now);
        if health == Health::Starting {
            return;
        }
        if self.part.set(health, text.clone()) {
            match health {
                Health::Good | Health::Starting => info!(connector = name, text, "connector is good"),
                Health::Late => warn!(connector = name, text, "connector is late"),
                Health::Failed => warn!(connector = name, text, "connector fails"),
            }
        }
        if self.health_told.as_ref() != Some(&(health, text.clone())) {
            self.outbox
                .push(health_message(name, health_name(health), &text, source, wall));
            self.health_told = Some((health, text));
            self.health_not_before = now + TICK;
        }
    }
}

impl AssetState {
    fn send<'r>(
        &mut self,
        outbox: &Outbox,
        readings: impl Iterator<Item = (&'r str, bool, &'r Reading)>,
        wall: Timestamp,
    ) {
        let payload = self.writer.write(readings);
        let (topic, source) = (self.topic.clone(), self.source.clone());
        outbox.push(values::message(
            topic,
            &self.name,
            payload,
            self.payload,
            self.sequence,
            source,
            wall,
        ));
        self.sequence += 1;
    }
}

impl<'a, D: Driver> Engine<'a, D> {
    fn new(setup: Setup, driver: D, part: Part, outbox: &'a Outbox) -> Engine<'a, D> {
        let name = setup.connector.name.clone();
        let source: Source = format!("connector:{name}").into();
        let groups = setup
            .assets
            .iter()
            .enumerate()
            .flat_map(|(nth, asset)| Group::all(nth, asset))
            .collect();
        let assets = setup
            .assets
            .iter()
            .map(|asset| AssetState {
                name: asset.name.clone(),
                topic: asset.topic.clone(),
                source: source.clone(),
                writer: Writer::new(asset.payload),
                payload: asset.payload,
                sequence: 0,
                loss: None,
            })
            .collect();
        let counters = Counters {
            polls: part.counter("polls"),
            missed: part.counter("missed"),
            skipped: part.counter("skipped"),
            faults: part.counter("faults"),
            commands: part.counter("commands"),
            late_10ms: part.counter("late_10ms"),
            late_50ms: part.counter("late_50ms"),
            late_1s: part.counter("late_1s"),
            late_max_ms: part.counter("late_max_ms"),
        };
        Engine {
            name,
            source,
            driver,
            state: State {
                start: clock::monotonic(),
                groups,
                assets,
                line: None,
                missed_at: None,
                part,
                counters,
                outbox,
                health_told: None,
                health_not_before: Duration::ZERO,
            },
            setup,
            inbox: VecDeque::new(),
            unfinished: None,
            commands_not_before: Duration::ZERO,
            once: Once::default(),
            uplink_lost: None,
            is_safe: false,
            unsafe_told: String::new(),
        }
    }

    /// Until asked to stop.
    async fn serve<G: Gateway>(&mut self, gateway: &G, shutdown: &mut watch::Receiver<bool>) {
        let filters = command::filters(&self.setup.assets);
        let mut commands = loop {
            match gateway.commands(&self.name, filters.clone()).await {
                Ok((commands, state)) => {
                    let (once, broken) = Once::restore(state);
                    self.once = once;
                    if !broken.is_empty() {
                        warn!(connector = %self.name, count = broken.len(), "remembered commands that cannot be read are forgotten");
                        self.unfinished = Some(effects(broken));
                    }
                    break commands;
                }
                Err(PublishError::Stopped) => return,
                Err(error) => {
                    self.state.part.set(
                        Health::Failed,
                        format!("commands cannot be read: {error}; trying again"),
                    );
                    if is_stopped_within(RETRY, shutdown).await {
                        return;
                    }
                }
            }
        };
        self.state.start = clock::monotonic();
        loop {
            if *shutdown.borrow() {
                return;
            }
            let now = self.state.now();
            self.watch_uplink(gateway, now).await;
            if now >= self.commands_not_before {
                if let Some(effects) = self.unfinished.take() {
                    self.finish(&mut commands, effects).await;
                } else if let Some(entry) = self.inbox.pop_front() {
                    tokio::select! {
                        () = self.carry_out(&mut commands, entry) => {}
                        // What was begun and not finished is answered with `unknown` by the next run.
                        () = stopped(shutdown) => return,
                    }
                }
            }
            if self.state.next_stale().is_some_and(|at| at <= now) {
                self.state.age("the line is slower than the periods ask", clock::wall());
            }
            if let Some(group) = self.state.due(self.state.now()) {
                tokio::select! {
                    () = self.poll(group) => {}
                    () = stopped(shutdown) => return,
                }
            }
            for _ in 0..EVENTS_MAX {
                match self.driver.event().now_or_never() {
                    Some(event) => self.take_event(event),
                    None => break,
                }
            }
            self.state.tell_health(&self.name, &self.source, clock::wall());
            match self.wait(&mut commands, shutdown).await {
                Woken::Stop => return,
                Woken::Due => {}
                Woken::Event(event) => self.take_event(event),
                Woken::Commands(Ok(entries)) => self.inbox.extend(entries),
                Woken::Commands(Err(PublishError::Stopped)) => return,
                Woken::Commands(Err(error)) => {
                    warn!(connector = %self.name, %error, "commands cannot be read, trying again");
                    self.commands_not_before = self.state.now() + RETRY;
                }
            }
        }
    }

    /// Until something is to be done. Looks for commands in any case, so that a busy line gets them too.
    async fn wait<C: Commands>(&mut self, commands: &mut C, shutdown: &mut watch::Receiver<bool>) -> Woken {
        let now = self.state.now();
        let has_commands = self.unfinished.is_some() || !self.inbox.is_empty();
        let mut until = self.state.next_due().unwrap_or(Duration::MAX).min(now + TICK);
        if has_commands {
            until = until.min(self.commands_not_before);
        }
        let takes_commands = !has_commands && now >= self.commands_not_before;
        let until = self.state.start + until;
        tokio::select! {
            biased;
            () = stopped(shutdown) => Woken::Stop,
            next = commands.next(), if takes_commands => Woken::Commands(next),
            event = self.driver.event() => Woken::Event(event),
            () = tokio::time::sleep_until(until.into()) => Woken::Due,
        }
    }

    async fn poll(&mut self, nth: usize) {
        let now = self.state.now();
        let asset = self.state.groups[nth].asset;
        let every = self.state.groups[nth].grid.every();
        if let Some(why) = self.state.hold_back(asset, now) {
            self.state.groups[nth].grid.advance(now);
            self.state.counters.skipped.add(1);
            let wall = clock::wall();
            self.state.groups[nth].lose(&why, now, wall);
            self.state.tell(nth, now, wall);
            return;
        }
        self.state.measure_start(nth, now);
        self.state.counters.polls.add(1);
        let passed = self.state.groups[nth].grid.advance(now);
        if passed > 0 {
            self.state.counters.missed.add(passed);
            self.state.missed_at = Some(now);
        }
        let points = std::mem::take(&mut self.state.groups[nth].points);
        let mut samples = Vec::with_capacity(points.len());
        let result = {
            let read = self.driver.read(asset, &points, &mut samples);
            tokio::pin!(read);
            loop {
                let hour = now + Duration::from_secs(3_600);
                let stale = self.state.start + self.state.next_stale().map_or(hour, |at| at.min(hour));
                tokio::select! {
                    biased;
                    result = &mut read => break result,
                    () = tokio::time::sleep_until(stale.into()) => {
                        let text = format!("the line is busy with {}", self.state.assets[asset].name);
                        self.state.age(&text, clock::wall());
                    }
                }
            }
        };
        self.state.groups[nth].points = points;
        let (now, wall) = (self.state.now(), clock::wall());
        match result {
            Ok(()) => {
                self.state.found(asset);
                self.state.groups[nth].read(samples.into_iter(), now, wall);
                self.state.tell(nth, now, wall);
            }
            Err(fault) => self.state.lost(asset, &fault, every, now, wall),
        }
    }

    fn take_event(&mut self, event: Event) {
        let wall = clock::wall();
        let at = event.at.unwrap_or(wall);
        let group = (self.state.groups.iter_mut()).find(|g| g.asset == event.asset && g.points.contains(&event.point));
        let Some(group) = group else { return };
        group.take_one(event.point, event.sample, at);
        // Each edge is told, also one that the next reverses at once.
        let asset = &mut self.state.assets[event.asset];
        asset.send(self.state.outbox, group.reading(event.point).into_iter(), wall);
        group.publish_one(event.point);
    }

    /// Brings outputs into their safe state when the uplink that they hang on is lost for too long.
    async fn watch_uplink<G: Gateway>(&mut self, gateway: &G, now: Duration) {
        let Some(safe) = &self.setup.connector.safe_uplink else {
            return;
        };
        if gateway.is_connected(&safe.name) {
            if self.is_safe {
                info!(connector = %self.name, uplink = safe.name, "uplink is back; outputs stay until they are written");
            }
            (self.uplink_lost, self.is_safe) = (None, false);
            self.unsafe_told.clear();
            return;
        }
        let lost = *self.uplink_lost.get_or_insert(now);
        if self.is_safe || now.saturating_sub(lost) < safe.after {
            return;
        }
        match self.driver.safe().await {
            Ok(()) => {
                warn!(connector = %self.name, uplink = safe.name, "uplink is lost: outputs are in their safe state");
                self.is_safe = true;
            }
            Err(fault) => {
                let why = fault.to_string();
                if why != self.unsafe_told {
                    warn!(connector = %self.name, why, "outputs cannot be brought into their safe state, trying again");
                    self.unsafe_told = why;
                }
                self.uplink_lost = Some(now.saturating_sub(safe.after) + RETRY);
            }
        }
    }

    /// Writes effects down; where that fails they are kept for the next attempt.
    async fn finish<C: Commands>(&mut self, commands: &mut C, effects: Effects) -> bool {
        match commands.apply(effects.clone()).await {
            Ok(()) => true,
            Err(error) => {
                let mut effects = effects;
                if let PublishError::Full(stream) = &error
                    && !effects.publish.is_empty()
                {
                    // The machine has done it: that nobody hears of it must not keep it from being written down.
                    warn!(connector = %self.name, stream, "an answer is not taken, its stream is full");
                    effects.publish.clear();
                } else {
                    warn!(connector = %self.name, %error, "a command's end cannot be written down, trying again");
                    self.commands_not_before = self.state.now() + RETRY;
                }
                self.unfinished = Some(effects);
                false
            }
        }
    }

    async fn carry_out<C: Commands>(&mut self, commands: &mut C, entry: Entry) {
        let wall = clock::wall();
        let message = &entry.message;
        let Some(target) = self.target(message.topic.as_str()) else {
            // Another connector's.
            let done = Effects {
                acknowledge: vec![entry.position],
                ..Effects::default()
            };
            self.finish(commands, done).await;
            return;
        };
        self.state.counters.commands.add(1);
        let (target, parsed) = match target {
            Ok(target) => (
                target,
                command::parse(target, &message.payload, &self.setup.assets[target.asset]),
            ),
            Err((asset, why)) => (Target { asset, point: None }, Err(why)),
        };
        let id = match &parsed {
            Ok(command) => command.id.clone(),
            Err(_) => command::id_of(&message.payload),
        };
        let key = command::key(message, id.as_deref(), entry.position.stream);
        let sum = command::sum(message);
        if let Some(known) = self.once.find(&key) {
            let (outcome, why, stored) = match known {
                Remembered { sum: s, .. } if *s != sum => (
                    Outcome::Refused,
                    "another command with this id was carried out in the last hour: give each its own",
                    None,
                ),
                Remembered { answer: None, .. } => (
                    Outcome::Unknown,
                    "the gateway was stopped while it was carried out: it may or may not have been",
                    None,
                ),
                Remembered {
                    answer: Some(answer), ..
                } => (Outcome::Done, "", Some(answer.clone())),
            };
            let payload = stored.map_or_else(
                || self.answer(target.asset, id.as_deref(), outcome, why, b"", wall),
                String::into_bytes,
            );
            let is_unknown = outcome == Outcome::Unknown;
            let changes = match is_unknown {
                true => self.once.remember(&key, remembered(wall, sum, Some(&payload))),
                false => Changes::new(),
            };
            self.end(commands, &entry, target.asset, payload, changes, wall).await;
            return;
        }
        let is_expired = command::is_expired(message, self.setup.connector.command_age_max, wall);
        let refused = match &parsed {
            Err(why) => Some((Outcome::Refused, why.clone())),
            Ok(_) if is_expired => Some((
                Outcome::Expired,
                format!("it came at {} and waited too long", message.received),
            )),
            Ok(_) => None,
        };
        if let Some((outcome, why)) = refused {
            let payload = self.answer(target.asset, id.as_deref(), outcome, &why, b"", wall);
            self.end(commands, &entry, target.asset, payload, Changes::new(), wall)
                .await;
            return;
        }
        let Ok(command) = parsed else { return };
        if matches!(command.action, Action::Write(_)) {
            // From here on a crash means "unknown", never "again".
            let begin = effects(self.once.remember(&key, remembered(wall, sum, None)));
            if let Err(error) = commands.apply(begin).await {
                warn!(connector = %self.name, %error, "a command waits: it cannot be written down");
                self.once.forget(&key);
                self.inbox.push_front(entry);
                self.commands_not_before = self.state.now() + RETRY;
                return;
            }
        }
        let (outcome, why, points) = self.execute(&command).await;
        let wall = clock::wall();
        let payload = self.answer(target.asset, id.as_deref(), outcome, &why, &points, wall);
        let changes = match command.action {
            Action::Write(_) => self.once.remember(&key, remembered(wall, sum, Some(&payload))),
            Action::Read(_) => Changes::new(),
        };
        self.end(commands, &entry, target.asset, payload, changes, wall).await;
    }

    /// None: not ours; an error: our asset, but nothing of it.
    fn target(&self, topic: &str) -> Option<Result<Target, (usize, String)>> {
        if let Some(target) = command::target(topic, &self.setup.assets) {
            return Some(Ok(target));
        }
        let name = topic.strip_prefix("commands/")?;
        if self.setup.elsewhere.iter().any(|e| e == name) {
            return None;
        }
        let (parent, last) = name.rsplit_once('/')?;
        let asset = self.setup.assets.iter().position(|a| a.name == parent)?;
        Some(Err((asset, format!("{parent} has no point {last:?}"))))
    }

    fn answer(
        &self,
        asset: usize,
        id: Option<&str>,
        outcome: Outcome,
        why: &str,
        points: &[u8],
        wall: Timestamp,
    ) -> Vec<u8> {
        let asset = &self.setup.assets[asset].name;
        Answer {
            id,
            outcome,
            asset,
            why,
            points,
        }
        .payload(wall)
    }

    async fn end<C: Commands>(
        &mut self,
        commands: &mut C,
        entry: &Entry,
        asset: usize,
        payload: Vec<u8>,
        changes: Changes,
        wall: Timestamp,
    ) {
        let answer = command::answer(&entry.message, &self.setup.assets[asset], &self.source, payload, wall);
        let done = Effects {
            publish: vec![answer],
            acknowledge: vec![entry.position],
            state: changes,
            ..Effects::default()
        };
        self.finish(commands, done).await;
    }

    async fn execute(&mut self, command: &Command) -> (Outcome, String, Vec<u8>) {
        match &command.action {
            Action::Read(points) => self.read_now(command.asset, points).await,
            Action::Write(values) => {
                let mut written: Vec<(usize, Raw)> = Vec::new();
                for (point, raw) in values {
                    if let Err((outcome, why)) = self.write_one(command.asset, *point, raw).await {
                        let name = &self.setup.assets[command.asset].points[*point].name;
                        let mut why = format!("{name}: {why}");
                        for (point, _) in &written {
                            let name = &self.setup.assets[command.asset].points[*point].name;
                            why.push_str(&format!("; {name} was written"));
                        }
                        return (outcome, why, self.written(command.asset, &written));
                    }
                    written.push((*point, raw.clone()));
                }
                (Outcome::Done, String::new(), self.written(command.asset, &written))
            }
        }
    }

    async fn read_now(&mut self, asset: usize, points: &[usize]) -> (Outcome, String, Vec<u8>) {
        let mut samples = Vec::with_capacity(points.len());
        let result = self.driver.read(asset, points, &mut samples).await;
        let (now, wall) = (self.state.now(), clock::wall());
        if let Err(fault) = result {
            let every = self.setup.assets[asset].every;
            self.state.lost(asset, &fault, every, now, wall);
            return (Outcome::Failed, fault.to_string(), Vec::new());
        }
        self.state.found(asset);
        for (point, sample) in points.iter().zip(samples) {
            self.take_sample(asset, *point, sample, wall);
        }
        let readings = points.iter().filter_map(|point| {
            let mut groups = self.state.groups.iter().filter(|g| g.asset == asset);
            groups.find_map(|g| g.reading(*point))
        });
        let json = Writer::new(crate::config::Payload::Values).write(readings);
        (Outcome::Done, String::new(), json)
    }

    fn take_sample(&mut self, asset: usize, point: usize, sample: Sample, wall: Timestamp) {
        for group in &mut self.state.groups {
            if group.asset == asset {
                group.take_one(point, sample.clone(), wall);
            }
        }
    }

    async fn write_one(&mut self, asset: usize, point: usize, raw: &Raw) -> Result<(), (Outcome, String)> {
        self.driver.write(asset, point, raw).await.map_err(|fault| {
            let outcome = match fault {
                Fault::Unknown(_) => Outcome::Unknown,
                Fault::Device(_) | Fault::Line(_) | Fault::Refused(_) => Outcome::Failed,
            };
            (outcome, fault.to_string())
        })?;
        let config = &self.setup.assets[asset].points[point];
        if !config.writable.is_some_and(|limits| limits.read_back) {
            return Ok(());
        }
        let mut samples = Vec::with_capacity(1);
        let read = self.driver.read(asset, &[point], &mut samples).await;
        let sample = match (read, samples.pop()) {
            (Err(fault), _) => return Err((Outcome::Unknown, format!("written, but reading back failed: {fault}"))),
            (Ok(()), None) => return Err((Outcome::Unknown, "written, but nothing was read back".to_owned())),
            (Ok(()), Some(sample)) => sample,
        };
        self.take_sample(asset, point, sample.clone(), clock::wall());
        let config = &self.setup.assets[asset].points[point];
        match sample {
            Sample::Good(read) | Sample::Uncertain(read, _) if scaling::is_same(config.data, raw, &read) => Ok(()),
            Sample::Good(read) | Sample::Uncertain(read, _) => Err((
                Outcome::Failed,
                format!("written, but the device holds {read:?} instead of {raw:?}"),
            )),
            Sample::Bad(why) => Err((Outcome::Unknown, format!("written, but reading back failed: {why}"))),
        }
    }

    /// What was written, in the shape of values.
    fn written(&self, asset: usize, written: &[(usize, Raw)]) -> Vec<u8> {
        if written.is_empty() {
            return Vec::new();
        }
        let at = clock::wall();
        let readings: Vec<(&str, bool, Reading)> = written
            .iter()
            .map(|(point, raw)| {
                let config = &self.setup.assets[asset].points[*point];
                let scaling = Scaling::new(config);
                let reading = Reading {
                    value: scaling.published(raw.clone()).ok(),
                    quality: Quality::Good,
                    why: String::new(),
                    at,
                };
                (config.name.as_str(), scaling.is_narrow(), reading)
            })
            .collect();
        let shown = readings.iter().map(|(name, narrow, reading)| (*name, *narrow, reading));
        Writer::new(crate::config::Payload::Values).write(shown)
    }

    /// The last word, where the broker still listens.
    fn farewell(&self) {
        let text = "the connector was stopped";
        let message = health_message(&self.name, "stopped", text, &self.source, clock::wall());
        self.state.outbox.push(message);
    }
}

fn effects(state: Changes) -> Effects {
    Effects {
        state,
        ..Effects::default()
    }
}

fn remembered(now: Timestamp, sum: u32, answer: Option<&[u8]>) -> Remembered {
    Remembered {
        at: now.millis(),
        sum,
        answer: answer.map(|a| String::from_utf8_lossy(a).into_owned()),
    }
}

fn health_name(health: Health) -> &'static str {
    match health {
        Health::Starting => "starting",
        Health::Good => "good",
        Health::Late => "late",
        Health::Failed => "failed",
    }
}

/// What `status/connector/{name}` says.
fn health_message(name: &str, health: &str, text: &str, source: &Source, now: Timestamp) -> Message {
    #[derive(Serialize)]
    struct Shape<'a> {
        health: &'a str,
        text: &'a str,
        ts: String,
    }
    let shape = Shape {
        health,
        text,
        ts: now.to_string(),
    };
    let payload = serde_json::to_vec(&shape).expect("texts are written to memory");
    let topic = Topic::new(format!("status/connector/{name}")).expect("a connector's name is one level of a topic");
    let mut message = Message::new(topic, payload, source.clone(), now);
    message.retain = true;
    message
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
#[path = "engine_tests.rs"]
mod tests;
