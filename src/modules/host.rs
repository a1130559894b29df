//! The only file that names wasmtime: the engine, a compiled [`Program`], an [`Instance`] of it and what a call answers.
//!
//! Everything a guest can do is bounded here: memory, time (by epochs of 10 ms), what it publishes, logs and keeps. A call
//! either answers an [`Output`] or fails with a [`CallError`] and has done nothing; the instance is dead then, and
//! [`Instance::restart`] makes a new one that knows the durable state and nothing else.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::Thread;
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use wasmtime::component::{Component, HasSelf, Linker};
use wasmtime::{Config, ResourceLimiter, Store, StoreContextMut, Trap, UpdateDeadline};

use super::mapping::Mappings;
use crate::clock::{self, Instant, Timestamp};
use crate::message::{Message, Properties, Qos, Topic, TopicFilter};

mod bindings {
    wasmtime::component::bindgen!({
        path: "modules/wit",
        world: "module",
        ownership: Borrowing { duplicate_if_necessary: true },
    });
}

use bindings::tidegate::module::types as wit;

/// The contract's interfaces, as a component names them.
pub const HOST_INTERFACE: &str = "tidegate:module/host@0.1.0";
pub const HANDLER_INTERFACE: &str = "tidegate:module/handler@0.1.0";

/// How often a running guest is looked at.
const EPOCH: Duration = Duration::from_millis(10);
/// The ticker goes to sleep after so many epochs without a call; waking it costs a call some microseconds.
const IDLE_EPOCHS: u32 = 3;
/// A guest that hardly gets the processor is not stopped before this many times its deadline.
const STARVED_FACTOR: u32 = 20;
/// What `describe`, `init` and whatever runs before them may take, where the deadline of a call is less.
const START_DEADLINE: Duration = Duration::from_secs(1);
/// Bytes of topics, payloads and properties that one call may publish.
pub const PUBLISH_BYTES_MAX: usize = 4 << 20;
/// Messages that one call may publish.
pub const PUBLISH_MESSAGES_MAX: usize = 1_024;
/// What one answer or one call of an import may copy out of the guest, its lists included.
const COPY_BYTES_MAX: usize = 8 << 20;
pub const STATE_KEY_BYTES_MAX: usize = 256;
pub const STATE_VALUE_BYTES_MAX: usize = 256 << 10;
/// Keys and values together.
pub const STATE_BYTES_MAX: usize = 1 << 20;
/// A log line, a reason or a description's text is cut here.
pub const TEXT_BYTES_MAX: usize = 1_024;
/// Log lines that may come at once, and how many more each second.
const LOG_BURST: f64 = 20.0;
const LOG_PER_SECOND: f64 = 5.0;
/// A component of some core modules has some of each (those of Python about ten).
const INSTANCES_MAX: usize = 64;
const TABLE_ELEMENTS_MAX: usize = 200_000;
/// Stack of a guest; its thread needs that much and some more.
const STACK_BYTES_MAX: usize = 512 << 10;
pub const THREAD_STACK_BYTES: usize = STACK_BYTES_MAX + (512 << 10);

#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("the WebAssembly engine could not be started: {0}")]
    Engine(String),
    #[error("the compiled module could not be loaded: {0}")]
    Load(String),
    #[error("{path}: cannot be mapped as machine code: {cause}; is the file system of data_dir mounted noexec?", path = .0.display(), cause = .1)]
    Map(std::path::PathBuf, std::io::Error),
}

/// Why a call failed. The instance is dead; nothing of the call happened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    #[error("it ran longer than its deadline of {} (`deadline` of its [[module]])", humantime::format_duration(*.0))]
    Deadline(Duration),
    #[error("it needed more than its memory limit of {} (`memory` of its [[module]]): {trap}", bytesize::ByteSize(*limit).display().iec())]
    Memory { limit: u64, trap: String },
    #[error("{0}")]
    Trap(String),
    #[error("it answered more than the gateway copies at once (8 MiB)")]
    AnswerTooLarge,
    #[error("it published {0} messages in one call, 1,024 is the most")]
    TooManyMessages(usize),
    #[error("it published {} in one call, 4 MiB is the most", bytesize::ByteSize(*.0 as u64).display().iec())]
    TooManyBytes(usize),
    #[error("it answered {outcomes} outcomes for {messages} messages")]
    WrongCount { outcomes: usize, messages: usize },
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InitError {
    #[error("it refused its configuration: {0}")]
    Refused(String),
    #[error("its init failed: {0}")]
    Failed(#[from] CallError),
}

/// What `describe` answered, as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    pub name: String,
    pub version: String,
    pub subscribe: Vec<String>,
    pub publish: Vec<String>,
    pub timer: Option<Duration>,
    pub wants_properties: bool,
}

/// A message that a guest wants published; its topic is valid and allowed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Draft {
    pub topic: Topic,
    pub payload: Bytes,
    pub qos: Qos,
    pub retain: bool,
    pub properties: Option<Box<Properties>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Pass,
    Drop,
    Replace(Vec<Draft>),
    Reject(String),
}

/// All that one call did.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// One for each message of the batch; empty for the timer.
    pub outcomes: Vec<Outcome>,
    /// Published through the import, before what the outcomes replace.
    pub published: Vec<Draft>,
    pub state: Vec<(String, Option<Vec<u8>>)>,
    /// Messages that were not published, by why; the first such topic.
    pub refused: Refused,
    /// Log lines beyond the rate.
    pub lines_suppressed: u64,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Refused {
    pub count: u64,
    pub first: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub memory_bytes_max: u64,
    pub deadline: Duration,
}

impl Limits {
    fn start_deadline(self) -> Duration {
        self.deadline.max(START_DEADLINE)
    }
}

/// What a program is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// This processor, by Cranelift.
    Native,
    /// Wasmtime's bytecode for its interpreter on a 32-bit machine.
    Pulley32,
}

impl Target {
    /// What programs that run here are made for. Cranelift has no backend for 32-bit ARM.
    pub const HERE: Target = if cfg!(target_arch = "arm") {
        Target::Pulley32
    } else {
        Target::Native
    };

    fn has_64_bits(self) -> bool {
        match self {
            Target::Native => cfg!(target_pointer_width = "64"),
            Target::Pulley32 => false,
        }
    }
}

/// The settings that make a program what it is; who compiles and who runs must agree.
fn settings(target: Target) -> Config {
    let mut config = Config::new();
    config
        .epoch_interruption(true)
        .max_wasm_stack(STACK_BYTES_MAX)
        // Guests are stripped and their panics come as text through `log`: neither backtraces nor what they need.
        .wasm_backtrace_max_frames(None)
        .native_unwind_info(false)
        .generate_address_map(false);
    if target.has_64_bits() {
        // Address space, not memory: with 4 GiB reserved (and never committed) a guest's accesses need no bounds checks.
        config.memory_reservation(4 << 30);
    } else {
        config
            .memory_reservation(0)
            .memory_reservation_for_growth(1 << 20)
            .memory_guard_size(64 << 10);
    }
    config
}

/// Runs programs. Cheap to clone; one for the daemon.
#[derive(Clone)]
pub struct Engine {
    inner: wasmtime::Engine,
    linker: Arc<Linker<Guest>>,
    ticker: Arc<Ticker>,
    code: Arc<Code>,
}

impl Engine {
    pub fn new() -> Result<Engine, HostError> {
        let text = |e: wasmtime::Error| HostError::Engine(format!("{e:#}"));
        let code = Arc::new(Code::default());
        let mut settings = settings(Target::HERE);
        // Bytecode stays as it is loaded.
        if Target::HERE == Target::Native {
            let memory: Arc<dyn wasmtime::CustomCodeMemory> = Arc::clone(&code) as _;
            settings.with_custom_code_memory(Some(memory));
        }
        let inner = wasmtime::Engine::new(&settings).map_err(text)?;
        let linker = Arc::new(linker(&inner).map_err(text)?);
        let ticker = Arc::new(Ticker::start(&inner).map_err(|e| HostError::Engine(e.to_string()))?);
        Ok(Engine {
            inner,
            linker,
            ticker,
            code,
        })
    }

    /// Changes with whatever makes earlier machine code unusable: wasmtime's version, settings, the processor.
    #[cfg(not(target_arch = "arm"))]
    pub fn compatibility(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.inner.precompile_compatibility_hash().hash(&mut hasher);
        hasher.finish()
    }

    /// Without a compiler wasmtime has no such hash; what it refuses when loading is taken from where it came once more.
    #[cfg(target_arch = "arm")]
    pub fn compatibility(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        env!("CARGO_PKG_VERSION").hash(&mut hasher);
        hasher.finish()
    }
}

/// How machine code becomes executable: it is mapped so ([`Mappings`]), and wasmtime has nothing left to do.
#[derive(Debug, Default)]
struct Code {
    mappings: Mappings,
}

impl wasmtime::CustomCodeMemory for Code {
    fn required_alignment(&self) -> usize {
        page_bytes()
    }

    fn publish_executable(&self, at: *const u8, bytes: usize) -> wasmtime::Result<()> {
        match self.mappings.holds(at) {
            true => Ok(()),
            // Compiled in this process, by a test or a bench.
            false => protect(at, bytes, libc::PROT_READ | libc::PROT_EXEC),
        }
    }

    fn unpublish_executable(&self, at: *const u8, bytes: usize) -> wasmtime::Result<()> {
        // SAFETY: wasmtime says so as the last thing it does with the code, when nothing holds it any more (seen in
        // `CodeMemory::drop` of the version that Cargo.toml pins: what follows does not touch memory that is not its own).
        match unsafe { self.mappings.unmap(at) } {
            true => Ok(()),
            false => protect(at, bytes, libc::PROT_READ | libc::PROT_WRITE),
        }
    }
}

/// The compiling child's: the code is looked at and written out, and is never run there.
struct NeverRun;

impl wasmtime::CustomCodeMemory for NeverRun {
    fn required_alignment(&self) -> usize {
        page_bytes()
    }

    fn publish_executable(&self, _: *const u8, _: usize) -> wasmtime::Result<()> {
        Ok(())
    }

    fn unpublish_executable(&self, at: *const u8, bytes: usize) -> wasmtime::Result<()> {
        protect(at, bytes, libc::PROT_READ | libc::PROT_WRITE)
    }
}

fn protect(at: *const u8, bytes: usize, protection: i32) -> wasmtime::Result<()> {
    // SAFETY: the range is wasmtime's own memory, page by page, and it asks for exactly this.
    match unsafe { libc::mprotect(at.cast_mut().cast(), bytes, protection) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().into()),
    }
}

fn page_bytes() -> usize {
    // SAFETY: no pointer is passed; it only reads a constant of the system.
    usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4_096)
}

fn linker(engine: &wasmtime::Engine) -> wasmtime::Result<Linker<Guest>> {
    let mut linker = Linker::new(engine);
    bindings::Module::add_to_linker::<_, HasSelf<_>>(&mut linker, |guest| guest)?;
    Ok(linker)
}

/// Advances the epoch while any guest runs and sleeps otherwise.
struct Ticker {
    shared: Arc<Ticking>,
    thread: Thread,
}

#[derive(Default)]
struct Ticking {
    running: AtomicU32,
    asleep: AtomicBool,
    ended: AtomicBool,
}

impl Ticker {
    fn start(engine: &wasmtime::Engine) -> std::io::Result<Ticker> {
        let shared = Arc::new(Ticking::default());
        let engine = engine.clone();
        let for_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("module-epochs".to_owned())
            .stack_size(64 << 10)
            .spawn(move || for_thread.run(&engine))?;
        Ok(Ticker {
            shared,
            thread: thread.thread().clone(),
        })
    }

    fn begin(&self) {
        self.shared.running.fetch_add(1, Ordering::SeqCst);
        if self.shared.asleep.load(Ordering::SeqCst) {
            self.thread.unpark();
        }
    }

    fn end(&self) {
        self.shared.running.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Ticking {
    fn run(&self, engine: &wasmtime::Engine) {
        let mut idle = 0;
        while !self.ended.load(Ordering::SeqCst) {
            if self.running.load(Ordering::SeqCst) > 0 {
                idle = 0;
            } else {
                idle += 1;
            }
            if idle > IDLE_EPOCHS {
                // Said before the last look at `running`: a call that begins now either sees it or is seen.
                self.asleep.store(true, Ordering::SeqCst);
                while self.running.load(Ordering::SeqCst) == 0 && !self.ended.load(Ordering::SeqCst) {
                    std::thread::park();
                }
                self.asleep.store(false, Ordering::SeqCst);
                idle = 0;
            }
            std::thread::sleep(EPOCH);
            engine.increment_epoch();
        }
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        self.thread.unpark();
    }
}

/// Machine code, ready to be instantiated.
#[derive(Clone)]
pub struct Program {
    pre: bindings::ModulePre<Guest>,
}

impl Program {
    /// Maps a file that [`compile`] made.
    ///
    /// # Safety
    /// The file must be the unchanged output of [`compile`], and must not be changed while the program lives (it may be
    /// renamed or removed): it is run as machine code.
    pub unsafe fn load(engine: &Engine, file: &Path) -> Result<Program, HostError> {
        let text = |e: wasmtime::Error| HostError::Load(format!("{e:#}"));
        if cfg!(target_arch = "arm") {
            // Bytecode there, which is only read.
            // SAFETY: that it is wasmtime's own output is the caller's promise; other versions and settings are refused.
            let component = unsafe { Component::deserialize_file(&engine.inner, file) }.map_err(text)?;
            return Program::new(engine, &component);
        }
        let mappings = &engine.code.mappings;
        let failed = |e: std::io::Error| HostError::Map(file.to_owned(), e);
        let memory = std::fs::File::open(file)
            .and_then(|f| mappings.map(&f))
            .map_err(failed)?;
        // SAFETY: as above; the memory is unmapped when wasmtime has let go of it (`Code`) and is never written to.
        match unsafe { Component::deserialize_raw(&engine.inner, memory) } {
            Ok(component) => Program::new(engine, &component),
            Err(e) => {
                // SAFETY: nothing came of it. Where it was refused late, it has been unmapped already.
                unsafe { mappings.unmap(memory.as_ptr().cast()) };
                Err(text(e))
            }
        }
    }

    /// Compiles here and now, in this process: for the benches and tests.
    #[cfg(not(target_arch = "arm"))]
    pub fn compile(engine: &Engine, component: &[u8]) -> Result<Program, HostError> {
        let text = |e: wasmtime::Error| HostError::Load(format!("{e:#}"));
        let component = Component::from_binary(&engine.inner, component).map_err(text)?;
        Program::new(engine, &component)
    }

    fn new(engine: &Engine, component: &Component) -> Result<Program, HostError> {
        let text = |e: wasmtime::Error| HostError::Load(format!("{e:#}"));
        let pre = engine.linker.instantiate_pre(component).map_err(text)?;
        Ok(Program {
            pre: bindings::ModulePre::new(pre).map_err(text)?,
        })
    }
}

/// Why a component cannot be run, found while compiling it.
#[derive(Debug, thiserror::Error)]
pub enum ContractError {
    #[error("{0}")]
    Invalid(String),
    #[error("it imports {0:?}, which tidegate does not offer{hint}", hint = import_hint(.0))]
    Import(String),
    #[error(
        "it does not export {HANDLER_INTERFACE:?}{found}; build it against modules/wit/module.wit of this version",
        found = .0.as_ref().map_or(String::new(), |n| format!(" but {n:?}"))
    )]
    NoHandler(Option<String>),
    #[error(
        "it does not fit the contract of this tidegate ({0}); build it against modules/wit/module.wit of this version"
    )]
    Mismatch(String),
}

fn import_hint(name: &str) -> &'static str {
    if name.starts_with("wasi:") || name.starts_with("wasi_") {
        ": a module has no files, sockets or clock; build it for wasm32-unknown-unknown, not for a WASI target"
    } else if name.starts_with("tidegate:module/") {
        ": it was built for another version of the contract; build it against modules/wit/module.wit of this version"
    } else {
        ": a module may import nothing but the functions of tidegate:module/host; remove that import"
    }
}

/// Machine code of a component, once it is seen to fit the contract. Needs tens of megabytes for a moment: run it in a process
/// of its own.
#[cfg(not(target_arch = "arm"))]
pub fn compile(component: &[u8]) -> Result<Vec<u8>, ContractError> {
    let invalid = |e: wasmtime::Error| ContractError::Invalid(format!("{e:#}"));
    let engine = wasmtime::Engine::new(settings(Target::Native).with_custom_code_memory(Some(Arc::new(NeverRun))))
        .map_err(invalid)?;
    let compiled = Component::from_binary(&engine, component).map_err(invalid)?;
    let offered = |name: &str| name == HOST_INTERFACE || name.starts_with("tidegate:module/types@0.1.");
    let ty = compiled.component_type();
    if let Some((name, _)) = ty.imports(&engine).find(|(name, _)| !offered(name)) {
        return Err(ContractError::Import(name.to_owned()));
    }
    if !ty.exports(&engine).any(|(name, _)| name == HANDLER_INTERFACE) {
        let close = ty
            .exports(&engine)
            .find(|(name, _)| name.starts_with("tidegate:module/handler"));
        return Err(ContractError::NoHandler(close.map(|(name, _)| name.to_owned())));
    }
    let mismatch = |e: wasmtime::Error| ContractError::Mismatch(format!("{e:#}"));
    let pre = linker(&engine)
        .and_then(|linker| linker.instantiate_pre(&compiled))
        .map_err(mismatch)?;
    bindings::ModulePre::new(pre).map_err(mismatch)?;
    compiled.serialize().map_err(invalid)
}

/// Bytecode of a component that [`compile`] took, for a machine that has no compiler.
#[cfg(not(target_arch = "arm"))]
pub fn compile_for_pulley32(component: &[u8]) -> Result<Vec<u8>, ContractError> {
    let invalid = |e: wasmtime::Error| ContractError::Invalid(format!("{e:#}"));
    let mut config = settings(Target::Pulley32);
    config.target("pulley32").map_err(invalid)?;
    let engine = wasmtime::Engine::new(&config).map_err(invalid)?;
    engine.precompile_component(component).map_err(invalid)
}

/// Says where a core module is cut short or not valid.
#[cfg(not(target_arch = "arm"))]
pub fn validate_core(wasm: &[u8]) -> Result<(), String> {
    let engine = wasmtime::Engine::new(&settings(Target::HERE)).map_err(|e| format!("{e:#}"))?;
    wasmtime::Module::validate(&engine, wasm).map_err(|e| format!("{e:#}"))
}

/// What the host keeps for one instance.
struct Guest {
    memory: MemoryLimit,
    clock: CallClock,
    name: String,
    publish: Vec<TopicFilter>,
    published: Vec<Draft>,
    published_bytes: usize,
    refused: Refused,
    state: BTreeMap<String, Vec<u8>>,
    state_bytes: usize,
    /// Of the call that runs.
    changes: BTreeMap<String, Option<Vec<u8>>>,
    changes_bytes: isize,
    log: LogLimit,
    /// The last line of level error in the call that runs: a panic's text.
    last_error: Option<String>,
}

/// Memory of all the linear memories of an instance together, and whether it was ever refused more.
struct MemoryLimit {
    bytes_max: usize,
    bytes: usize,
    refused: bool,
}

impl ResourceLimiter for MemoryLimit {
    fn memory_growing(&mut self, current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        let bytes = self.bytes.saturating_add(desired.saturating_sub(current));
        let granted = bytes <= self.bytes_max;
        if granted {
            self.bytes = bytes;
        } else {
            self.refused = true;
        }
        Ok(granted)
    }

    fn table_growing(&mut self, _current: usize, desired: usize, _maximum: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= TABLE_ELEMENTS_MAX)
    }

    fn instances(&self) -> usize {
        INSTANCES_MAX
    }

    fn tables(&self) -> usize {
        INSTANCES_MAX
    }

    fn memories(&self) -> usize {
        INSTANCES_MAX
    }
}

/// Decides at each epoch whether the call that runs is stopped. It counts from the first epoch it sees (up to 10 ms after
/// the call began), so that a call needs no reading of a clock.
struct CallClock {
    deadline: Duration,
    first: Option<(Instant, Duration)>,
}

impl CallClock {
    fn tick(&mut self, now: Instant, processor: Duration) -> bool {
        let (began, processor_began) = *self.first.get_or_insert((now, processor));
        overran(
            self.deadline,
            now.saturating_duration_since(began),
            processor.saturating_sub(processor_began),
        )
    }
}

/// A guest is answerable for the processor time it takes, not for a box that is busy with other things: at its deadline it
/// is stopped if it had the processor for a quarter of the time, and in any case when it is very late.
fn overran(deadline: Duration, elapsed: Duration, processor: Duration) -> bool {
    elapsed >= deadline && (processor >= deadline / 4 || elapsed >= deadline * STARVED_FACTOR)
}

/// A token bucket.
struct LogLimit {
    tokens: f64,
    last: Option<Instant>,
    suppressed: u64,
}

impl LogLimit {
    fn admit(&mut self, now: Instant) -> bool {
        let since = self
            .last
            .map_or(Duration::ZERO, |last| now.saturating_duration_since(last));
        self.last = Some(now);
        self.tokens = (self.tokens + since.as_secs_f64() * LOG_PER_SECOND).min(LOG_BURST);
        if self.tokens < 1.0 {
            self.suppressed += 1;
            return false;
        }
        self.tokens -= 1.0;
        true
    }
}

impl Guest {
    fn admit(&mut self, message: wit::MessageResult) -> Result<Draft, String> {
        let topic = match Topic::new(message.topic) {
            Ok(topic) => topic,
            Err(why) => {
                self.refuse(&format!("a topic that is not valid ({why})"));
                return Err(format!("topic is not valid: {why}"));
            }
        };
        if !self.publish.iter().any(|filter| filter.matches(topic.as_str())) {
            self.refuse(topic.as_str());
            return Err(format!(
                "the topic {:?} is outside this module's publish filters",
                cut(topic.as_str())
            ));
        }
        let properties = message.properties.map(|p| {
            Box::new(Properties {
                user: p.user.into_iter().map(|(k, v)| (k.into(), v.into())).collect(),
                content_type: p.content_type.map(ByteString::from),
                payload_is_utf8: p.payload_is_utf8,
                response_topic: p.response_topic.map(ByteString::from),
                correlation_data: p.correlation_data.map(Bytes::from),
                expiry_s: p.expiry_s,
            })
        });
        let qos = match message.qos {
            wit::Qos::AtMostOnce => Qos::AtMostOnce,
            wit::Qos::AtLeastOnce => Qos::AtLeastOnce,
            wit::Qos::ExactlyOnce => Qos::ExactlyOnce,
        };
        Ok(Draft {
            topic,
            payload: message.payload.into(),
            qos,
            retain: message.retain,
            properties,
        })
    }

    fn refuse(&mut self, topic: &str) {
        self.refused.count += 1;
        self.refused.first.get_or_insert_with(|| cut(topic).to_owned());
    }

    /// Forgets what a call that failed did.
    fn forget(&mut self) {
        self.published.clear();
        self.published_bytes = 0;
        self.refused = Refused::default();
        self.changes.clear();
        self.changes_bytes = 0;
        self.last_error = None;
    }
}

impl wit::Host for Guest {}

impl bindings::tidegate::module::host::Host for Guest {
    fn log(&mut self, level: wit::Level, text: String) {
        let text = cut(&text);
        if level == wit::Level::Error {
            self.last_error = Some(text.to_owned());
        }
        if !self.log.admit(clock::monotonic()) {
            return;
        }
        let module = self.name.as_str();
        match level {
            wit::Level::Debug => tracing::debug!(module, text, "module says"),
            wit::Level::Info => tracing::info!(module, text, "module says"),
            wit::Level::Warn => tracing::warn!(module, text, "module says"),
            wit::Level::Error => tracing::error!(module, text, "module says"),
        }
    }

    fn state_get(&mut self, key: String) -> Option<Vec<u8>> {
        match self.changes.get(&key) {
            Some(change) => change.clone(),
            None => self.state.get(&key).cloned(),
        }
    }

    fn state_set(&mut self, key: String, value: Option<Vec<u8>>) -> Result<(), String> {
        if key.is_empty() || key.len() > STATE_KEY_BYTES_MAX {
            return Err(format!(
                "a key has 1 to {STATE_KEY_BYTES_MAX} bytes, this one has {}",
                key.len()
            ));
        }
        let size = |value: Option<&Vec<u8>>| value.map_or(0, |v| (key.len() + v.len()).cast_signed());
        if value.as_ref().is_some_and(|v| v.len() > STATE_VALUE_BYTES_MAX) {
            return Err(format!("a value has up to 256 KiB, that of {key:?} is larger"));
        }
        let before = match self.changes.get(&key) {
            Some(change) => change.as_ref(),
            None => self.state.get(&key),
        };
        let changes_bytes = self.changes_bytes + size(value.as_ref()) - size(before);
        if changes_bytes > 0 && self.state_bytes.saturating_add_signed(changes_bytes) > STATE_BYTES_MAX {
            return Err(format!("a module keeps up to 1 MiB of state, {key:?} would exceed it"));
        }
        self.changes_bytes = changes_bytes;
        self.changes.insert(key, value);
        Ok(())
    }

    fn publish(&mut self, message: wit::MessageResult) -> Result<(), String> {
        if self.published.len() >= PUBLISH_MESSAGES_MAX {
            self.refuse(&message.topic);
            return Err("a call publishes up to 1,024 messages".to_owned());
        }
        let draft = self.admit(message)?;
        let bytes = self.published_bytes.saturating_add(draft.size_bytes());
        if bytes > PUBLISH_BYTES_MAX {
            self.refuse(draft.topic.as_str());
            return Err("a call publishes up to 4 MiB".to_owned());
        }
        self.published_bytes = bytes;
        self.published.push(draft);
        Ok(())
    }
}

impl Draft {
    fn size_bytes(&self) -> usize {
        let properties = self.properties.as_ref().map_or(0, |p| {
            p.user.iter().map(|(k, v)| k.len() + v.len()).sum::<usize>()
                + p.content_type.as_ref().map_or(0, |s| s.len())
                + p.response_topic.as_ref().map_or(0, |s| s.len())
                + p.correlation_data.as_ref().map_or(0, |b| b.len())
        });
        self.topic.as_str().len() + self.payload.len() + properties
    }
}

/// At most [`TEXT_BYTES_MAX`] bytes of it.
fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_BYTES_MAX)]
}

/// One life of a module. Its calls block: it belongs on a thread of its own.
pub struct Instance {
    engine: Engine,
    program: Program,
    limits: Limits,
    wants_properties: bool,
    store: Store<Guest>,
    handles: bindings::Module,
}

impl Instance {
    /// `state`: what the module's durable state holds.
    pub fn start(
        engine: &Engine,
        program: &Program,
        name: &str,
        limits: Limits,
        state: Vec<(String, Vec<u8>)>,
    ) -> Result<Instance, CallError> {
        let state_bytes = state.iter().map(|(k, v)| k.len() + v.len()).sum();
        let guest = Guest {
            memory: MemoryLimit {
                bytes_max: usize::try_from(limits.memory_bytes_max).unwrap_or(usize::MAX),
                bytes: 0,
                refused: false,
            },
            clock: CallClock {
                deadline: limits.deadline,
                first: None,
            },
            name: name.to_owned(),
            publish: Vec::new(),
            published: Vec::new(),
            published_bytes: 0,
            refused: Refused::default(),
            state: state.into_iter().collect(),
            state_bytes,
            changes: BTreeMap::new(),
            changes_bytes: 0,
            log: LogLimit {
                tokens: LOG_BURST,
                last: None,
                suppressed: 0,
            },
            last_error: None,
        };
        let (store, handles) = instantiate(engine, program, limits, guest)?;
        Ok(Instance {
            engine: engine.clone(),
            program: program.clone(),
            limits,
            wants_properties: false,
            store,
            handles,
        })
    }

    pub fn describe(&mut self) -> Result<Description, CallError> {
        let within = self.limits.start_deadline();
        let answer = self.call(within, |handles, store| {
            handles.tidegate_module_handler().call_describe(store)
        })?;
        self.settle();
        Ok(Description {
            name: cut(&answer.name).to_owned(),
            version: cut(&answer.version).to_owned(),
            subscribe: answer.subscribe,
            publish: answer.publish,
            timer: answer.timer_ms.map(|ms| Duration::from_millis(u64::from(ms))),
            wants_properties: answer.wants_properties,
        })
    }

    /// What it may publish, and whether it is handed properties: from then on.
    pub fn grant(&mut self, publish: Vec<TopicFilter>, wants_properties: bool) {
        self.store.data_mut().publish = publish;
        self.wants_properties = wants_properties;
    }

    /// What `init` publishes or sets counts like any call's.
    pub fn init(&mut self, config: &str) -> Result<Output, InitError> {
        let within = self.limits.start_deadline();
        match self.call(within, |handles, store| {
            handles.tidegate_module_handler().call_init(store, config)
        })? {
            Ok(()) => Ok(self.settle()),
            Err(reason) => Err(InitError::Refused(cut(&reason).to_owned())),
        }
    }

    pub fn on_batch<'a>(
        &mut self,
        messages: impl ExactSizeIterator<Item = &'a Message> + Clone,
    ) -> Result<Output, CallError> {
        let wants_properties = self.wants_properties;
        // The pairs need a place that outlives the call; without properties nothing is allocated for them.
        let users: Vec<Vec<(&str, &str)>> = if wants_properties {
            let user = |m: &'a Message| {
                m.properties
                    .iter()
                    .flat_map(|p| &p.user)
                    .map(|(k, v)| (&**k, &**v))
                    .collect()
            };
            messages.clone().map(user).collect()
        } else {
            Vec::new()
        };
        let batch: Vec<wit::MessageParam<'_>> = messages
            .enumerate()
            .map(|(n, message)| wit::MessageParam {
                topic: message.topic.as_str(),
                payload: &message.payload,
                qos: match message.qos {
                    Qos::AtMostOnce => wit::Qos::AtMostOnce,
                    Qos::AtLeastOnce => wit::Qos::AtLeastOnce,
                    Qos::ExactlyOnce => wit::Qos::ExactlyOnce,
                },
                retain: message.retain,
                received_ms: message.received.millis(),
                sequence: message.sequence.0,
                properties: match &message.properties {
                    Some(p) if wants_properties => Some(wit::PropertiesParam {
                        user: &users[n],
                        content_type: p.content_type.as_deref(),
                        response_topic: p.response_topic.as_deref(),
                        correlation_data: p.correlation_data.as_deref(),
                        payload_is_utf8: p.payload_is_utf8,
                        expiry_s: p.expiry_s,
                    }),
                    _ => None,
                },
            })
            .collect();
        let within = self.limits.deadline;
        let answer = self.call(within, |handles, store| {
            handles.tidegate_module_handler().call_on_batch(store, &batch)
        })?;
        if answer.len() != batch.len() {
            let error = CallError::WrongCount {
                outcomes: answer.len(),
                messages: batch.len(),
            };
            self.store.data_mut().forget();
            return Err(error);
        }
        self.outcomes(answer).inspect_err(|_| self.store.data_mut().forget())
    }

    pub fn on_timer(&mut self, now: Timestamp) -> Result<Output, CallError> {
        let within = self.limits.deadline;
        self.call(within, |handles, store| {
            handles.tidegate_module_handler().call_on_timer(store, now.millis())
        })?;
        Ok(self.settle())
    }

    /// A new life with the same rights and the state as the last good call left it; `init` must be called.
    pub fn restart(self) -> Result<Instance, CallError> {
        let Instance {
            engine,
            program,
            limits,
            wants_properties,
            store,
            ..
        } = self;
        let mut guest = store.into_data();
        guest.forget();
        guest.memory.bytes = 0;
        guest.memory.refused = false;
        let (store, handles) = instantiate(&engine, &program, limits, guest)?;
        Ok(Instance {
            engine,
            program,
            limits,
            wants_properties,
            store,
            handles,
        })
    }

    /// Bytes of linear memory that it holds now.
    pub fn memory_bytes(&self) -> usize {
        self.store.data().memory.bytes
    }

    fn call<T>(
        &mut self,
        within: Duration,
        call: impl FnOnce(&bindings::Module, &mut Store<Guest>) -> wasmtime::Result<T>,
    ) -> Result<T, CallError> {
        self.store.data_mut().clock = CallClock {
            deadline: within,
            first: None,
        };
        self.store.set_epoch_deadline(1);
        self.engine.ticker.begin();
        let answer = call(&self.handles, &mut self.store);
        self.engine.ticker.end();
        answer.map_err(|e| {
            let guest = self.store.data_mut();
            let error = call_error(&e, self.limits, guest);
            guest.forget();
            error
        })
    }

    /// Takes what a good call did.
    fn settle(&mut self) -> Output {
        let guest = self.store.data_mut();
        let mut output = Output {
            published: std::mem::take(&mut guest.published),
            refused: std::mem::take(&mut guest.refused),
            lines_suppressed: std::mem::take(&mut guest.log.suppressed),
            ..Output::default()
        };
        guest.published_bytes = 0;
        guest.last_error = None;
        guest.state_bytes = guest.state_bytes.saturating_add_signed(guest.changes_bytes);
        guest.changes_bytes = 0;
        for (key, change) in std::mem::take(&mut guest.changes) {
            match &change {
                Some(value) => guest.state.insert(key.clone(), value.clone()),
                None => guest.state.remove(&key),
            };
            output.state.push((key, change));
        }
        output
    }

    fn outcomes(&mut self, answer: Vec<wit::Outcome>) -> Result<Output, CallError> {
        let guest = self.store.data_mut();
        let mut count = guest.published.len();
        let mut bytes = guest.published_bytes;
        let mut outcomes = Vec::with_capacity(answer.len());
        for outcome in answer {
            outcomes.push(match outcome {
                wit::Outcome::Pass => Outcome::Pass,
                wit::Outcome::Drop => Outcome::Drop,
                wit::Outcome::Reject(reason) => Outcome::Reject(cut(&reason).to_owned()),
                wit::Outcome::Replace(messages) => {
                    let mut drafts = Vec::with_capacity(messages.len());
                    for message in messages {
                        if let Ok(draft) = guest.admit(message) {
                            bytes = bytes.saturating_add(draft.size_bytes());
                            drafts.push(draft);
                        }
                    }
                    count += drafts.len();
                    Outcome::Replace(drafts)
                }
            });
        }
        if count > PUBLISH_MESSAGES_MAX {
            return Err(CallError::TooManyMessages(count));
        }
        if bytes > PUBLISH_BYTES_MAX {
            return Err(CallError::TooManyBytes(bytes));
        }
        Ok(Output {
            outcomes,
            ..self.settle()
        })
    }
}

fn instantiate(
    engine: &Engine,
    program: &Program,
    limits: Limits,
    guest: Guest,
) -> Result<(Store<Guest>, bindings::Module), CallError> {
    let mut store = Store::new(&engine.inner, guest);
    store.data_mut().clock = CallClock {
        deadline: limits.start_deadline(),
        first: None,
    };
    store.limiter(|guest| &mut guest.memory);
    store.set_hostcall_fuel(COPY_BYTES_MAX);
    store.epoch_deadline_callback(|mut context: StoreContextMut<'_, Guest>| {
        let late = context
            .data_mut()
            .clock
            .tick(clock::monotonic(), clock::thread_processor_time());
        Ok(if late {
            UpdateDeadline::Interrupt
        } else {
            UpdateDeadline::Continue(1)
        })
    });
    store.set_epoch_deadline(1);
    engine.ticker.begin();
    let handles = program.pre.instantiate(&mut store);
    engine.ticker.end();
    match handles {
        Ok(handles) => Ok((store, handles)),
        Err(e) => Err(call_error(&e, limits, store.data())),
    }
}

fn call_error(error: &wasmtime::Error, limits: Limits, guest: &Guest) -> CallError {
    let said = |text: &str| match &guest.last_error {
        Some(line) => line.clone(),
        None => text.to_owned(),
    };
    match error.downcast_ref::<Trap>() {
        Some(Trap::Interrupt) => CallError::Deadline(guest.clock.deadline),
        _ if guest.memory.refused => CallError::Memory {
            limit: limits.memory_bytes_max,
            trap: said(&format!("{:#}", error.root_cause())),
        },
        Some(trap) => CallError::Trap(said(&trap.to_string())),
        // The type of this one is wasmtime's secret.
        None if format!("{error:#}").contains("fuel allocated for hostcalls") => CallError::AnswerTooLarge,
        None => CallError::Trap(said(&format!("{error:#}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deadline_is_for_those_who_had_the_processor() {
        let ms = Duration::from_millis;
        assert!(!overran(ms(50), ms(49), ms(49)));
        assert!(overran(ms(50), ms(50), ms(50)));
        assert!(!overran(ms(50), ms(50), ms(12)), "it was not its turn");
        assert!(overran(ms(50), ms(90), ms(13)));
        assert!(overran(ms(50), ms(1_000), ms(0)), "not for ever");
    }

    #[test]
    fn log_lines_come_in_a_burst_and_then_slowly() {
        let mut limit = LogLimit {
            tokens: LOG_BURST,
            last: None,
            suppressed: 0,
        };
        let began = clock::monotonic();
        let admitted = |limit: &mut LogLimit, now| (0..100).filter(|_| limit.admit(now)).count();
        assert_eq!(admitted(&mut limit, began), 20);
        assert_eq!(limit.suppressed, 80);
        assert_eq!(admitted(&mut limit, began + Duration::from_secs(1)), 5);
        assert_eq!(admitted(&mut limit, began + Duration::from_secs(3_600)), 20);
    }

    #[test]
    fn text_is_cut_between_characters() {
        let text = "é".repeat(TEXT_BYTES_MAX);
        assert_eq!(cut(&text).len(), TEXT_BYTES_MAX);
        assert_eq!(cut(&format!("a{text}")).len(), TEXT_BYTES_MAX - 1);
        assert_eq!(cut("short"), "short");
    }
}
