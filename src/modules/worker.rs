//! One module at work: a task that reads its consumer, hands batches to the module's thread and applies what they did.
//!
//! The thread runs the guest and nothing else, one call at a time; the task decides (through [`Runner`]), writes and reports.
//! A swap happens between two batches: the new instance is made with the durable state as the last batch left it, and the
//! old one goes only when the new one's `init` went well.

use std::future::Future;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use crate::broker::handle::{BrokerHandle, PublishError};
use crate::clock::{self, Instant, Timestamp};
use crate::config::ModuleSettings;
use crate::log;
use crate::log::consumer::{Consumer, Effects, Entry};
use crate::message::TopicFilter;
use crate::status::{Counter, Health, Part};

use super::host::{CallError, Description, Engine, InitError, Instance, Limits, Output, Program, THREAD_STACK_BYTES};
use super::runner::{BATCH_BYTES_MAX, Counts, Notes, Runner, Verdict, append, is_empty};

/// The first and the longest wait before effects that could not be written are tried again.
const RETRY_FIRST: Duration = Duration::from_millis(20);
const RETRY_LONGEST: Duration = Duration::from_secs(2);
/// Effects of messages that are handled one by one are applied whenever they reach this.
const EFFECTS_MESSAGES_MAX: usize = 1_024;
const TIMER_SHORTEST: Duration = Duration::from_millis(10);
const FILTERS_MAX: usize = 64;
/// Modules yield the processor to the network and the log where they compete.
const THREAD_NICE: i32 = 5;

/// What the module gets from the log and gives to it.
pub trait Log: Send + 'static {
    /// Opens the durable consumer with these filters, at its place.
    fn open(&mut self, filters: Vec<TopicFilter>) -> impl Future<Output = Result<(), PublishError>> + Send;
    /// Cancel-safe.
    fn next(
        &mut self,
        messages_max: usize,
        bytes_max: usize,
    ) -> impl Future<Output = Result<Vec<Entry>, PublishError>> + Send;
    fn apply(&mut self, effects: Effects) -> impl Future<Output = Result<(), PublishError>> + Send;
    fn state(&mut self) -> impl Future<Output = Result<Vec<(String, Vec<u8>)>, PublishError>> + Send;
    /// Closes the consumer; its place stays.
    fn close(&mut self);
}

/// The log behind the broker.
pub struct BrokerLog {
    broker: BrokerHandle,
    module: String,
    consumer: Option<Consumer>,
}

impl BrokerLog {
    pub fn new(broker: BrokerHandle, module: &str) -> BrokerLog {
        BrokerLog {
            broker,
            module: module.to_owned(),
            consumer: None,
        }
    }
}

impl Log for BrokerLog {
    async fn open(&mut self, filters: Vec<TopicFilter>) -> Result<(), PublishError> {
        // There is one consumer of a name at a time.
        self.consumer = None;
        self.consumer = Some(
            self.broker
                .consumer(&format!("module:{}", self.module), filters)
                .await?,
        );
        Ok(())
    }

    async fn next(&mut self, messages_max: usize, bytes_max: usize) -> Result<Vec<Entry>, PublishError> {
        match &mut self.consumer {
            Some(consumer) => consumer
                .next(messages_max, bytes_max)
                .await
                .map_err(|error| match error {
                    log::Error::Stopped => PublishError::Stopped,
                    log::Error::Read(_) => PublishError::NotDurable(error.to_string()),
                }),
            None => std::future::pending().await,
        }
    }

    async fn apply(&mut self, effects: Effects) -> Result<(), PublishError> {
        match &mut self.consumer {
            Some(consumer) => self.broker.apply(consumer, effects).await,
            None => Err(PublishError::Stopped),
        }
    }

    async fn state(&mut self) -> Result<Vec<(String, Vec<u8>)>, PublishError> {
        self.broker.module_state(&self.module).await
    }

    fn close(&mut self) {
        self.consumer = None;
    }
}

/// What a module may do: what it asked for, as [[module]] narrows or widens it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// Name and version as it says them.
    pub title: String,
    pub subscribe: Vec<TopicFilter>,
    pub publish: Vec<TopicFilter>,
    pub timer: Option<Duration>,
    pub wants_properties: bool,
}

impl Granted {
    pub fn new(description: Description, settings: &ModuleSettings) -> Result<Granted, String> {
        let filters = |what: &str, asked: Vec<String>, set: &Option<Vec<TopicFilter>>| match set {
            Some(set) => Ok(set.clone()),
            None if asked.len() > FILTERS_MAX => Err(format!(
                "it wants to {what} {} filters, {FILTERS_MAX} is the most",
                asked.len()
            )),
            None => asked
                .into_iter()
                .map(|text| match TopicFilter::new(text.clone()) {
                    Ok(_) if text.starts_with("$share/") => Err(format!(
                        "it wants to {what} {text:?}: a module's filters cannot be shared"
                    )),
                    Ok(filter) => Ok(filter),
                    Err(why) => Err(format!(
                        "it wants to {what} {text:?}, which is not a topic filter: {why}"
                    )),
                })
                .collect(),
        };
        Ok(Granted {
            title: format!("{} {}", description.name, description.version),
            subscribe: filters("subscribe to", description.subscribe, &settings.subscribe)?,
            publish: filters("publish to", description.publish, &settings.publish)?,
            timer: description.timer.map(|interval| interval.max(TIMER_SHORTEST)),
            wants_properties: description.wants_properties,
        })
    }

    fn text(&self) -> String {
        let list = |filters: &[TopicFilter]| match filters {
            [] => "nothing".to_owned(),
            some => some.iter().map(TopicFilter::as_str).collect::<Vec<_>>().join(", "),
        };
        format!(
            "{}: subscribes to {}; publishes {}",
            self.title,
            list(&self.subscribe),
            list(&self.publish)
        )
    }
}

/// A program that was compiled, described and found to fit.
#[derive(Clone)]
pub struct Candidate {
    pub engine: Engine,
    pub program: Program,
    pub granted: Granted,
    pub settings: ModuleSettings,
}

/// What was found in the module's file when it was last (re)placed: a candidate, or why it cannot be used.
pub type Load = Result<Candidate, String>;

/// The guest's thread. It ends when this is dropped, after the call that it is in.
struct GuestThread {
    jobs: SyncSender<Job>,
}

enum Job {
    Batch(Vec<Entry>, oneshot::Sender<(Vec<Entry>, Result<Output, CallError>)>),
    Timer(Timestamp, oneshot::Sender<Result<Output, CallError>>),
    Restart(oneshot::Sender<Result<Output, InitError>>),
}

/// The thread died: a defect of the gateway, never of a guest.
#[derive(Debug)]
struct ThreadDied;

#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error(transparent)]
    Init(InitError),
    #[error("its thread could not be started: {0}")]
    Thread(String),
}

struct Blueprint {
    engine: Engine,
    program: Program,
    name: String,
    limits: Limits,
    publish: Vec<TopicFilter>,
    wants_properties: bool,
    config: String,
}

impl Blueprint {
    fn start(&self, state: Vec<(String, Vec<u8>)>) -> Result<(Instance, Output), InitError> {
        let mut instance = Instance::start(&self.engine, &self.program, &self.name, self.limits, state)?;
        instance.grant(self.publish.clone(), self.wants_properties);
        let output = instance.init(&self.config)?;
        Ok((instance, output))
    }

    fn restart(&self, instance: Instance) -> Result<(Instance, Output), InitError> {
        let mut instance = instance.restart()?;
        let output = instance.init(&self.config)?;
        Ok((instance, output))
    }
}

impl GuestThread {
    /// The thread, and what its `init` did.
    async fn start(blueprint: Blueprint, state: Vec<(String, Vec<u8>)>) -> Result<(GuestThread, Output), StartError> {
        // One job is under way at a time; there is never a second one to hold.
        let (jobs, inbox) = sync_channel::<Job>(1);
        let (started, answer) = oneshot::channel();
        let thread_name = format!("module {}", blueprint.name);
        let body = move || {
            // SAFETY: no pointer is passed; on Linux this changes the calling thread alone.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, THREAD_NICE) };
            let mut instance = match blueprint.start(state) {
                Ok((instance, output)) => {
                    let _ = started.send(Ok(output));
                    instance
                }
                Err(error) => {
                    let _ = started.send(Err(error));
                    return;
                }
            };
            while let Ok(job) = inbox.recv() {
                match job {
                    Job::Batch(entries, reply) => {
                        let answer = instance.on_batch(entries.iter().map(|entry| &entry.message));
                        let _ = reply.send((entries, answer));
                    }
                    Job::Timer(now, reply) => {
                        let _ = reply.send(instance.on_timer(now));
                    }
                    Job::Restart(reply) => match blueprint.restart(instance) {
                        Ok((fresh, output)) => {
                            instance = fresh;
                            let _ = reply.send(Ok(output));
                        }
                        Err(error) => {
                            let _ = reply.send(Err(error));
                            return;
                        }
                    },
                }
            }
        };
        std::thread::Builder::new()
            .name(thread_name)
            .stack_size(THREAD_STACK_BYTES)
            .spawn(body)
            .map_err(|e| StartError::Thread(e.to_string()))?;
        match answer.await {
            Ok(Ok(output)) => Ok((GuestThread { jobs }, output)),
            Ok(Err(error)) => Err(StartError::Init(error)),
            Err(_) => Err(StartError::Thread("it ended unexpectedly".to_owned())),
        }
    }

    async fn ask<T>(&self, job: impl FnOnce(oneshot::Sender<T>) -> Job) -> Result<T, ThreadDied> {
        let (reply, answer) = oneshot::channel();
        self.jobs.try_send(job(reply)).map_err(|_| ThreadDied)?;
        answer.await.map_err(|_| ThreadDied)
    }
}

struct Running {
    thread: GuestThread,
    granted: Granted,
    next_timer: Option<Instant>,
}

impl Running {
    fn arm_timer(&mut self) {
        self.next_timer = self.granted.timer.map(|interval| clock::monotonic() + interval);
    }
}

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    On,
    /// The gateway stops, or the file is gone.
    Stop,
    /// The module was set aside.
    Aside,
}

pub struct Worker<L> {
    name: String,
    part: Part,
    counters: [Counter; 12],
    log: L,
    loads: watch::Receiver<Option<Load>>,
    stop: watch::Receiver<bool>,
    running: Option<Running>,
    runner: Runner,
    /// Failures that cost the module its memory; finding the message at fault in a failed batch is part of the same one.
    restarts: u64,
    /// The last file that was dropped and not taken, why; the earlier version runs on.
    not_taken: Option<String>,
    /// The log could not be read the last time.
    unread: bool,
    /// What the status was last made of.
    shown: (Notes, usize),
}

impl<L: Log> Worker<L> {
    pub fn new(
        name: &str,
        part: Part,
        log: L,
        loads: watch::Receiver<Option<Load>>,
        stop: watch::Receiver<bool>,
    ) -> Worker<L> {
        let counters = counters(&Counts::default(), 0).map(|(name, _)| part.counter(name));
        Worker {
            name: name.to_owned(),
            counters,
            part,
            log,
            loads,
            stop,
            running: None,
            runner: Runner::new(name),
            restarts: 0,
            not_taken: None,
            unread: false,
            shown: (Notes::default(), 0),
        }
    }

    /// Until `stop`. Returns with the consumer closed.
    pub async fn run(mut self) {
        enum Event {
            Stop,
            Load(Result<(), watch::error::RecvError>),
            Timer,
            Entries(Result<Vec<Entry>, PublishError>),
        }
        let mut flow = Flow::On;
        while flow != Flow::Stop {
            self.count();
            let (log, stop, loads) = (&mut self.log, &mut self.stop, &mut self.loads);
            let running = self.running.as_ref();
            let batch_max = self.runner.batch_max();
            let event = tokio::select! {
                biased;
                () = stopped(stop) => Event::Stop,
                changed = loads.changed() => Event::Load(changed),
                () = until(running.and_then(|r| r.next_timer)) => Event::Timer,
                entries = log.next(batch_max, BATCH_BYTES_MAX), if running.is_some() => Event::Entries(entries),
            };
            flow = match event {
                Event::Stop | Event::Load(Err(_)) => Flow::Stop,
                Event::Load(Ok(())) => {
                    let load = self.loads.borrow_and_update().clone();
                    match load {
                        Some(Ok(candidate)) => self.load(candidate).await,
                        Some(Err(why)) => self.refuse(&why),
                        None => Flow::On,
                    }
                }
                Event::Timer => self.timer().await,
                Event::Entries(Ok(entries)) => self.batch(entries).await,
                Event::Entries(Err(PublishError::Stopped)) => Flow::Stop,
                Event::Entries(Err(error)) => self.unreadable(&error).await,
            };
        }
        self.count();
        self.log.close();
    }

    async fn load(&mut self, candidate: Candidate) -> Flow {
        let state = match self.log.state().await {
            Ok(state) => state,
            Err(PublishError::Stopped) => return Flow::Stop,
            Err(error) => {
                return self.refuse(&format!(
                    "its state could not be read: {error}; drop it again to try once more"
                ));
            }
        };
        let Candidate {
            engine,
            program,
            granted,
            settings,
        } = candidate;
        let blueprint = Blueprint {
            engine,
            program,
            name: self.name.clone(),
            limits: Limits {
                memory_bytes_max: settings.memory_bytes_max,
                deadline: settings.deadline,
            },
            publish: granted.publish.clone(),
            wants_properties: granted.wants_properties,
            config: settings.config.to_string(),
        };
        let (thread, output) = match GuestThread::start(blueprint, state).await {
            Ok(started) => started,
            Err(error) => return self.refuse(&error.to_string()),
        };
        // The consumer is opened anew: it gives again what the version before did not finish.
        if let Err(error) = self.log.open(granted.subscribe.clone()).await {
            self.running = None;
            self.set_aside(&format!("its place in the log could not be opened: {error}"));
            return if matches!(error, PublishError::Stopped) {
                Flow::Stop
            } else {
                Flow::Aside
            };
        }
        let mut running = Running {
            thread,
            granted,
            next_timer: None,
        };
        running.arm_timer();
        let text = running.granted.text();
        let swapped = self.running.replace(running).is_some();
        self.runner = self.runner.successor();
        self.not_taken = None;
        self.shown = (Notes::default(), 0);
        self.part.set(Health::Good, text.clone());
        tracing::info!(module = self.name, swapped, description = text, "module runs");
        let effects = self.runner.accept_init(output, clock::wall());
        self.apply(effects).await
    }

    /// A dropped file that cannot be used: what runs runs on.
    fn refuse(&mut self, why: &str) -> Flow {
        tracing::error!(module = self.name, why, "module not taken");
        if self.running.is_some() {
            self.not_taken = Some(why.to_owned());
            self.report();
        } else {
            self.part.set(Health::Failed, why);
        }
        Flow::On
    }

    /// The log cannot be read: again in a while.
    async fn unreadable(&mut self, error: &PublishError) -> Flow {
        self.unread = true;
        if self.part.set(
            Health::Late,
            format!("waits: {error}; it goes on by itself when the log can be read"),
        ) {
            tracing::warn!(module = self.name, %error, "module waits");
        }
        tokio::select! {
            () = stopped(&mut self.stop) => Flow::Stop,
            () = tokio::time::sleep(RETRY_LONGEST) => Flow::On,
        }
    }

    async fn batch(&mut self, entries: Vec<Entry>) -> Flow {
        if std::mem::take(&mut self.unread) {
            self.report();
        }
        let (entries, effects) = self.runner.select(entries);
        if self.apply(effects).await == Flow::Stop {
            return Flow::Stop;
        }
        if entries.is_empty() {
            self.report_changes();
            return Flow::On;
        }
        let count = entries.len();
        let (entries, answer) = match self.call(entries).await {
            Ok(answered) => answered,
            Err(ThreadDied) => return self.died(),
        };
        let flow = match answer {
            Ok(output) => {
                let effects = self.runner.accept(entries, output, clock::wall());
                self.runner.batch_went_well();
                self.apply(effects).await
            }
            Err(error) if count == 1 => self.failed_alone(entries, &error, true).await,
            Err(error) => {
                self.runner.batch_failed();
                self.restarts += 1;
                tracing::warn!(module = self.name, %error, messages = count, "a call failed: trying message by message");
                match self.restart(&error).await {
                    Flow::On => self.one_by_one(entries).await,
                    other => other,
                }
            }
        };
        self.report_changes();
        flow
    }

    /// The batch failed: each message goes alone, so that only those at fault are taken out.
    async fn one_by_one(&mut self, entries: Vec<Entry>) -> Flow {
        // The restart after the failed batch is already counted; the first message found at fault is why it failed.
        let mut all_well = true;
        let mut gathered = Effects::default();
        for entry in entries {
            if *self.stop.borrow() {
                // What is not done yet stays in the log.
                break;
            }
            let Ok((entries, answer)) = self.call(vec![entry]).await else {
                return self.died();
            };
            match answer {
                Ok(output) => {
                    append(&mut gathered, self.runner.accept(entries, output, clock::wall()));
                    if gathered.publish.len() >= EFFECTS_MESSAGES_MAX {
                        match self.apply(std::mem::take(&mut gathered)).await {
                            Flow::On => {}
                            other => return other,
                        }
                    }
                }
                Err(error) => {
                    let another = !std::mem::replace(&mut all_well, false);
                    match self.apply(std::mem::take(&mut gathered)).await {
                        Flow::On => {}
                        other => return other,
                    }
                    match self.failed_alone(entries, &error, another).await {
                        Flow::On => {}
                        other => return other,
                    }
                }
            }
        }
        if all_well {
            self.runner.batch_was_too_large();
        }
        self.apply(gathered).await
    }

    async fn failed_alone(&mut self, mut entries: Vec<Entry>, error: &CallError, counted: bool) -> Flow {
        let Some(entry) = entries.pop() else { return Flow::On };
        let position = entry.position;
        let topic = entry.message.topic.clone();
        self.restarts += u64::from(counted);
        match self.runner.failed(entry, &error.to_string(), clock::monotonic()) {
            Verdict::Dead(effects) => {
                tracing::warn!(module = self.name, %topic, sequence = %position.sequence, %error, "message given up");
                match self.apply(effects).await {
                    Flow::On => self.restart(error).await,
                    other => other,
                }
            }
            Verdict::Held => self.restart(error).await,
            Verdict::SetAside(why) => self.set_aside(&why),
        }
    }

    /// A new instance after a call that failed.
    async fn restart(&mut self, error: &CallError) -> Flow {
        let Some(running) = &mut self.running else {
            return Flow::Aside;
        };
        match running.thread.ask(Job::Restart).await {
            Ok(Ok(output)) => {
                running.arm_timer();
                let effects = self.runner.accept_init(output, clock::wall());
                self.apply(effects).await
            }
            Ok(Err(init)) => self.set_aside(&format!(
                "after a failure ({error}) it could not be started again: {init}"
            )),
            Err(ThreadDied) => self.died(),
        }
    }

    async fn timer(&mut self) -> Flow {
        let Some(running) = &mut self.running else {
            return Flow::On;
        };
        let now = clock::wall();
        let answer = running.thread.ask(|reply| Job::Timer(now, reply)).await;
        // Counted from here: a timer call that takes longer than its interval leaves room for messages.
        running.arm_timer();
        let flow = match answer {
            Ok(Ok(output)) => {
                let effects = self.runner.accept_timer(output, now);
                self.apply(effects).await
            }
            Ok(Err(error)) => {
                tracing::warn!(module = self.name, %error, "the timer call failed");
                match self.runner.timer_failed(&error.to_string()) {
                    Some(why) => self.set_aside(&why),
                    None => {
                        self.restarts += 1;
                        self.restart(&error).await
                    }
                }
            }
            Err(ThreadDied) => self.died(),
        };
        self.report_changes();
        flow
    }

    async fn call(&mut self, entries: Vec<Entry>) -> Result<(Vec<Entry>, Result<Output, CallError>), ThreadDied> {
        match &self.running {
            Some(running) => running.thread.ask(|reply| Job::Batch(entries, reply)).await,
            None => Err(ThreadDied),
        }
    }

    /// Until it is written: nothing of a batch is ever applied by halves or left out.
    async fn apply(&mut self, effects: Effects) -> Flow {
        if is_empty(&effects) {
            return Flow::On;
        }
        // Told first: whoever sees what a module published finds it in the status too.
        self.count();
        self.report_changes();
        let mut wait = RETRY_FIRST;
        let mut stalled = false;
        loop {
            match self.log.apply(effects.clone()).await {
                Ok(()) => {
                    if stalled {
                        tracing::info!(module = self.name, "module goes on");
                        self.report();
                    }
                    return Flow::On;
                }
                Err(PublishError::Stopped) => return Flow::Stop,
                Err(error) => {
                    let text = format!("waits: {error}; it goes on by itself when there is room");
                    if self.part.set(Health::Late, text) {
                        tracing::warn!(module = self.name, %error, "module waits");
                    }
                    stalled = true;
                }
            }
            tokio::select! {
                () = stopped(&mut self.stop) => return Flow::Stop,
                () = tokio::time::sleep(wait) => wait = (wait * 2).min(RETRY_LONGEST),
            }
        }
    }

    /// Not run any more until a file is dropped again; its place in the log stays, and so do its messages.
    fn set_aside(&mut self, why: &str) -> Flow {
        self.running = None;
        self.log.close();
        let text = format!(
            "set aside: {why}; its messages stay queued; drop in a corrected file, or the same one again to try it with more patience"
        );
        tracing::error!(module = self.name, why, "module set aside");
        self.part.set(Health::Failed, text);
        Flow::Aside
    }

    fn died(&mut self) -> Flow {
        self.set_aside("its thread ended unexpectedly, which is a defect of tidegate; please report it")
    }

    fn report_changes(&mut self) {
        let now = (self.runner.notes().clone(), self.runner.held());
        if now != self.shown {
            self.shown = now;
            self.report();
        }
    }

    /// Says how a running module is.
    fn report(&mut self) {
        let Some(running) = &self.running else { return };
        let notes = self.runner.notes();
        let mut problems = Vec::new();
        if let Some(why) = &self.not_taken {
            problems.push(format!(
                "the file dropped last was not taken, the version before runs on: {why}"
            ));
        }
        if let Some((topic, path)) = &notes.looped {
            problems.push(format!(
                "modules publish to each other in a loop ({path}, {topic:?}): what came round is not handed to it again; \
                 change what one of them subscribes to"
            ));
        }
        if let Some(topic) = &notes.own_topic {
            problems.push(format!(
                "it subscribes to what it publishes ({topic:?}): its own messages are not handed back to it"
            ));
        }
        if let Some(topic) = &notes.refused_topic {
            problems.push(format!(
                "not published, outside its publish filters or beyond a bound: messages on {topic:?}; \
                 `publish` of its [[module]] can allow the topic"
            ));
        }
        if self.runner.held() > 0 {
            problems.push(format!(
                "it failed on {} message(s), which stay queued until the next shows whether they or the module are at fault",
                self.runner.held()
            ));
        }
        let health = if problems.is_empty() {
            Health::Good
        } else {
            Health::Late
        };
        problems.insert(0, running.granted.text());
        let text = problems.join(". ");
        if self.part.set(health, text.clone()) && health == Health::Late {
            tracing::warn!(module = self.name, text, "module has a problem");
        }
    }

    fn count(&self) {
        for ((_, value), counter) in counters(self.runner.counts(), self.restarts).iter().zip(&self.counters) {
            counter.set(*value);
        }
    }
}

fn counters(counts: &Counts, restarts: u64) -> [(&'static str, u64); 12] {
    [
        ("received", counts.received),
        ("published", counts.published),
        ("dropped", counts.dropped),
        ("rejected", counts.rejected),
        ("traps", counts.traps),
        ("restarts", restarts),
        ("poisonous", counts.poisonous),
        ("refused", counts.refused),
        ("own", counts.own),
        ("looped", counts.looped),
        ("loss_notices", counts.loss_notices),
        ("log_lines_suppressed", counts.lines_suppressed),
    ]
}

/// Returns when it says so, or when nobody is left who could.
pub(super) async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

async fn until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when.into()).await,
        None => std::future::pending().await,
    }
}
