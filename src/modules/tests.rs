//! Modules against real guests, with a log in memory. The guests are built by `modules/build`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{Notify, watch};

use super::compile::{Cache, CompileError, Compiler, Maker, Origin, component};
use super::host::{CallError, Engine, InitError, Instance, Limits, Outcome, Output, Program};
use super::runner::BATCH_MESSAGES_MAX;
use super::worker::Log;
use super::{Logs, ModuleHost, config, host};
use crate::broker::handle::PublishError;
use crate::clock::{self, Timestamp};
use crate::config::ModuleSettings;
use crate::log::consumer::{Effects, Entry, Position};
use crate::message::{Message, Properties, Sequence, Topic, TopicFilter};
use crate::status::{Health, PartReport, Status};

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
const LIMITS: Limits = Limits {
    memory_bytes_max: 16 << 20,
    deadline: Duration::from_millis(50),
};

fn guest(name: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join(format!("modules/target/wasm32-unknown-unknown/release/{name}.wasm"));
    fs::read(&path).unwrap_or_else(|e| panic!("{path:?}: {e}; run modules/build first"))
}

fn filters(texts: &[&str]) -> Vec<TopicFilter> {
    texts
        .iter()
        .map(|text| TopicFilter::new((*text).to_owned()).expect(text))
        .collect()
}

fn message(topic: &str, payload: &str) -> Message {
    let topic = Topic::new(topic.to_owned()).expect("valid");
    Message::new(
        topic,
        payload.to_owned(),
        "client:c".into(),
        Timestamp::from_millis(1_000),
    )
}

struct Fixture {
    engine: Engine,
    program: Program,
}

impl Fixture {
    fn new(name: &str) -> Fixture {
        Fixture::of(&guest(name))
    }

    fn of(wasm: &[u8]) -> Fixture {
        let engine = Engine::new().expect("engine");
        let program = Program::compile(&engine, &component(wasm).expect("component")).expect("compiles");
        Fixture { engine, program }
    }

    fn instance_with(&self, limits: Limits, config: &str, state: Vec<(String, Vec<u8>)>) -> (Instance, Output) {
        let mut instance = Instance::start(&self.engine, &self.program, "m", limits, state).expect("starts");
        let description = instance.describe().expect("describes");
        let publish = description.publish.iter().map(String::as_str).collect::<Vec<_>>();
        instance.grant(filters(&publish), description.wants_properties);
        let output = instance.init(config).expect("init");
        (instance, output)
    }

    fn instance(&self, limits: Limits) -> Instance {
        self.instance_with(limits, "{}", Vec::new()).0
    }
}

fn send(instance: &mut Instance, payload: &str) -> Result<Output, CallError> {
    instance.on_batch([&message("do/it", payload)].into_iter())
}

/// The payloads of what an output publishes.
fn payloads(output: &Output) -> Vec<String> {
    let replaced = output.outcomes.iter().flat_map(|outcome| match outcome {
        Outcome::Replace(drafts) => drafts.as_slice(),
        _ => &[],
    });
    output
        .published
        .iter()
        .chain(replaced)
        .map(|d| String::from_utf8_lossy(&d.payload).into_owned())
        .collect()
}

#[test]
fn a_message_and_its_properties_go_there_and_back() {
    let mut echo = Fixture::new("echo").instance(LIMITS);
    let mut sent = message("a/b", "hello");
    sent.properties = Some(Box::new(Properties {
        user: vec![("k".into(), "v".into()), ("k".into(), "w".into())],
        content_type: Some("text/plain".into()),
        payload_is_utf8: true,
        response_topic: Some("r".into()),
        correlation_data: Some(vec![0, 255].into()),
        expiry_s: Some(7),
    }));
    let output = echo.on_batch([&sent, &message("c", "")].into_iter()).expect("good");
    let [Outcome::Replace(first), Outcome::Replace(second)] = output.outcomes.as_slice() else {
        panic!("{output:?}")
    };
    assert_eq!(
        (first[0].topic.as_str(), &first[0].payload[..]),
        ("echo/a/b", &b"hello"[..])
    );
    assert_eq!(first[0].properties, sent.properties);
    assert_eq!((second[0].topic.as_str(), second[0].payload.len()), ("echo/c", 0));
    assert_eq!(second[0].properties, None);
}

#[test]
fn each_misdeed_ends_the_call_with_its_reason() {
    let fixture = Fixture::new("misbehave");
    let fails = |limits, payload| send(&mut fixture.instance(limits), payload).expect_err(payload);
    let roomy = Limits {
        memory_bytes_max: 64 << 20,
        deadline: Duration::from_secs(10),
    };
    assert_eq!(fails(LIMITS, "loop"), CallError::Deadline(LIMITS.deadline));
    let panicked = fails(LIMITS, "panic").to_string();
    assert!(
        panicked.contains("the payload says panic") && panicked.contains("misbehave"),
        "{panicked}"
    );
    assert_eq!(
        fails(LIMITS, "trap").to_string(),
        "wasm trap: wasm `unreachable` instruction executed"
    );
    assert_eq!(fails(roomy, "recurse").to_string(), "wasm trap: call stack exhausted");
    let bomb = fails(
        Limits {
            deadline: roomy.deadline,
            ..LIMITS
        },
        "memory bomb",
    );
    assert!(matches!(bomb, CallError::Memory { limit: 16_777_216, .. }), "{bomb}");
    assert!(
        bomb.to_string()
            .contains("its memory limit of 16.0 MiB (`memory` of its [[module]])"),
        "{bomb}"
    );
    assert_eq!(fails(roomy, "huge output"), CallError::AnswerTooLarge);
    assert_eq!(fails(roomy, "many"), CallError::TooManyMessages(5_000));
    assert_eq!(
        fails(LIMITS, "too few outcomes"),
        CallError::WrongCount {
            outcomes: 0,
            messages: 1
        }
    );
}

#[test]
fn bounds_that_are_no_failure_are_told_to_the_guest() {
    let fixture = Fixture::new("misbehave");
    let limits = Limits {
        deadline: Duration::from_secs(10),
        ..LIMITS
    };
    let does = |payload| send(&mut fixture.instance(limits), payload).expect(payload);
    let many = does("publish many");
    assert_eq!(
        (payloads(&many).len(), &many.outcomes[0]),
        (1_024, &Outcome::Reject("3976 refused".to_owned()))
    );
    assert_eq!(many.refused.count, 3_976);
    assert!(payloads(&does("big state"))[0].contains("256 KiB"));
    let much = does("much state");
    assert!(payloads(&much)[0].contains("1 MiB"), "{:?}", payloads(&much));
    let kept: usize = much
        .state
        .iter()
        .map(|(k, v)| k.len() + v.as_ref().map_or(0, Vec::len))
        .sum();
    assert!((1_000_000..=1 << 20).contains(&kept), "{kept}");
    let chatter = does("chatter");
    assert!(
        (970..=980).contains(&chatter.lines_suppressed),
        "{}",
        chatter.lines_suppressed
    );
    let outside = does("outside");
    assert_eq!((payloads(&outside).len(), outside.refused.count), (0, 1));
    assert_eq!(outside.refused.first.as_deref(), Some("elsewhere/x"));
    let invalid = does("bad topic");
    assert_eq!(invalid.refused.count, 1);
    assert!(invalid.refused.first.expect("named").contains("not valid"));
}

#[test]
fn a_call_that_fails_has_done_nothing() {
    let fixture = Fixture::new("misbehave");
    let mut instance = fixture.instance(LIMITS);
    let good = send(&mut instance, "x").expect("good");
    assert_eq!(good.state, [("handled".to_owned(), Some(1u64.to_le_bytes().to_vec()))]);
    send(&mut instance, "publish then trap").expect_err("traps");
    assert!(
        matches!(send(&mut instance, "x"), Err(CallError::Trap(_))),
        "a dead instance stays dead"
    );
    let mut instance = instance.restart().expect("restarts");
    instance.init("{}").expect("init");
    let output = send(&mut instance, "x").expect("good");
    assert_eq!(payloads(&output), ["x"], "what the failed call published is forgotten");
    let expected = [("handled".to_owned(), Some(2u64.to_le_bytes().to_vec()))];
    assert_eq!(
        output.state, expected,
        "what it set as well, what was there before is not"
    );
}

#[test]
fn init_may_refuse_or_fail() {
    let fixture = Fixture::new("misbehave");
    let start = || Instance::start(&fixture.engine, &fixture.program, "m", LIMITS, Vec::new()).expect("starts");
    let refused = start().init(r#"{"a":"refuse"}"#).expect_err("refuses");
    assert_eq!(
        refused,
        InitError::Refused("the configuration says \"refuse\"".to_owned())
    );
    let failed = start().init(r#"{"a":"panic"}"#).expect_err("fails").to_string();
    assert!(
        failed.starts_with("its init failed") && failed.contains("says \"panic\""),
        "{failed}"
    );
}

#[test]
fn memory_at_the_start_is_limited_too() {
    let fixture = Fixture::new("echo");
    let limits = Limits {
        memory_bytes_max: 64 << 10,
        ..LIMITS
    };
    let error = Instance::start(&fixture.engine, &fixture.program, "m", limits, Vec::new())
        .err()
        .expect("too little");
    assert!(error.to_string().contains("memory limit of 64.0 KiB"), "{error}");
}

/// MO-05, in a process of its own: the memory of other tests must not count.
#[test]
fn a_hundred_thousand_traps_leak_nothing() {
    let test = "modules::tests::a_hundred_thousand_traps_in_this_process";
    let output = Command::new(std::env::current_exe().expect("this binary"))
        .args(["--exact", test, "--ignored", "--nocapture"])
        .output()
        .expect("runs");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("resident grew"),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
#[ignore = "run by a_hundred_thousand_traps_leak_nothing"]
fn a_hundred_thousand_traps_in_this_process() {
    let fixture = Fixture::new("misbehave");
    let trap = |times: usize| {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let mut instance = fixture.instance(LIMITS);
                    for n in 0..times / 4 {
                        let payload = ["publish then trap", "panic"][n % 2];
                        send(&mut instance, payload).expect_err("traps");
                        instance = instance.restart().expect("restarts");
                        instance.init("{}").expect("init");
                    }
                });
            }
        });
    };
    trap(4_000);
    let before = resident_kb();
    let began = clock::monotonic();
    trap(100_000);
    let grown = resident_kb() - before;
    println!(
        "resident grew by {grown} kB over 100,000 traps in {:?}",
        began.elapsed()
    );
    assert!(grown < 1_000, "{grown} kB");
}

fn resident_kb() -> i64 {
    let status = fs::read_to_string("/proc/self/status").expect("procfs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace()
        .nth(1)
        .and_then(|n| n.parse().ok())
        .expect("a number")
}

/// The figures of ARCHITECTURE.md: `cargo test --release --lib modules::tests::cost -- --ignored --nocapture`.
#[test]
#[ignore = "a measurement"]
fn cost() {
    let fixture = Fixture::new("passthrough");
    for batch in [1usize, 64] {
        let mut instance = fixture.instance(LIMITS);
        let topic = "sensors/press-7/temperature";
        let messages: Vec<Message> = (0..batch).map(|_| message(topic, &"x".repeat(256))).collect();
        let calls = 20_000 / batch;
        let best = (0..200)
            .map(|_| {
                let began = clock::monotonic();
                for _ in 0..calls {
                    instance.on_batch(messages.iter()).expect("good");
                }
                began.elapsed().as_nanos() as usize / (calls * batch)
            })
            .min();
        println!(
            "pass-through, 256 B, batch {batch}: {} ns a message",
            best.expect("some")
        );
    }
    let fixture = Fixture::new("misbehave");
    let mut stops: Vec<u128> = (0..20)
        .map(|_| {
            let mut instance = fixture.instance(LIMITS);
            let began = clock::monotonic();
            send(&mut instance, "loop").expect_err("stopped");
            began.elapsed().as_millis()
        })
        .collect();
    stops.sort_unstable();
    println!(
        "endless loop with a deadline of 50 ms stopped after {} to {} ms",
        stops[0], stops[19]
    );
    let began = clock::monotonic();
    let mut instance = fixture.instance(LIMITS);
    for _ in 0..10_000 {
        instance = instance.restart().expect("restarts");
    }
    println!("a new instance: {:?}", began.elapsed() / 10_000);
    run(async {
        let gateway = Gateway::start("cost", &[]);
        gateway.until("m", "nothing yet", |report| report.is_none()).await;
        let echo = guest("echo");
        for (what, version) in [
            ("compiled", 0u8),
            ("compiled", 1),
            ("compiled", 2),
            ("cached", 1),
            ("cached", 2),
        ] {
            let wasm = [&echo[..], &[0, 3, 1, b'v', version]].concat();
            let began = clock::monotonic();
            gateway.drop_in("m", &wasm);
            gateway.until_health("m", Health::Good, "echo").await;
            println!("dropped file to running, {what}: {:?}", began.elapsed());
            fs::remove_file(gateway.file("m")).expect("removed");
            gateway.until("m", "unloaded", |report| report.is_none()).await;
        }
        gateway.end().await;
    });
}

// ---- compile and cache

fn sentence(error: CompileError) -> String {
    error.to_string()
}

#[test]
fn files_that_are_no_module_are_named_for_what_they_are() {
    let echo = guest("echo");
    let whole = component(&echo).expect("component");
    let core = |sections: &[u8]| [b"\0asm\x01\0\0\0", sections].concat();
    // (import MODULE "f" (func)): a type section and an import section.
    let importing = |module: &str| {
        let mut import = vec![1, module.len() as u8];
        import.extend_from_slice(module.as_bytes());
        import.extend_from_slice(&[1, b'f', 0, 0]);
        let mut sections = vec![1, 4, 1, 0x60, 0, 0, 2, import.len() as u8];
        sections.extend_from_slice(&import);
        core(&sections)
    };
    let cases: [(&str, Vec<u8>, &[&str]); 10] = [
        (
            "text",
            b"hello\n".to_vec(),
            &["not WebAssembly", r#""hello\n""#, "put a .wasm"],
        ),
        ("empty", Vec::new(), &["empty", "copy it again"]),
        ("three bytes", b"\0as".to_vec(), &["not WebAssembly"]),
        (
            "cut short",
            echo[..echo.len() / 2].to_vec(),
            &["cut short", "copy it again"],
        ),
        (
            "component cut short",
            whole[..whole.len() / 2].to_vec(),
            &["cut short", "copy it again"],
        ),
        ("version", b"\0asm\x02\0\0\0".to_vec(), &["unknown version", "02"]),
        (
            "empty core module",
            core(&[]),
            &["does not export", "tidegate:module/handler@0.1.0", "build it against"],
        ),
        (
            "empty component",
            b"\0asm\x0d\0\x01\0".to_vec(),
            &["does not export", "tidegate:module/handler@0.1.0"],
        ),
        (
            "foreign import",
            importing("env"),
            &["core module", "env", "modules/sdk"],
        ),
        (
            "WASI",
            importing("wasi_snapshot_preview1"),
            &["core module", "wasi_snapshot_preview1", "modules/sdk"],
        ),
    ];
    for (name, wasm, parts) in cases {
        let text = sentence(super::compile::compile(&wasm).expect_err(name));
        println!("{name}: {text}");
        for part in parts {
            assert!(text.contains(part), "{name}: {text:?} lacks {part:?}");
        }
        assert!(!text.contains('\n'), "one sentence: {text}");
    }
}

/// The child of the cache's tests: this test binary again, asked for this test.
fn test_compiler() -> Maker {
    let arguments = ["--exact", "modules::tests::compiler_child", "--ignored", "--nocapture"];
    Maker::Compiler(Compiler {
        program: std::env::current_exe().expect("this binary"),
        arguments: arguments.into_iter().map(Into::into).collect(),
    })
}

#[test]
#[ignore = "run as a child by the tests of the cache"]
fn compiler_child() {
    let mut arguments = std::env::args().rev();
    let (output, input) = (arguments.next().expect("OUT"), arguments.next().expect("IN"));
    match super::compile::child(Path::new(&input), Path::new(&output)) {
        Ok(()) => std::process::exit(0),
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(1)
        }
    }
}

/// A folder of its own that goes with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("tidegate-modules-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("scratch");
        Scratch(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn cached(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir)
        .expect("cache")
        .map(|entry| entry.expect("entry").path())
        .collect()
}

#[test]
fn the_cache_compiles_once_and_never_runs_what_was_changed() {
    use std::os::unix::fs::PermissionsExt;
    let scratch = Scratch::new("cache");
    let dir = scratch.0.join("modules-cache");
    let engine = Engine::new().expect("engine");
    let open = || Cache::open(&dir, &engine, test_compiler()).expect("cache");
    let wasm = guest("echo");
    let load = |expected| {
        let (program, origin) = open().load(&wasm).expect("loads");
        assert_eq!(origin, expected);
        Instance::start(&engine, &program, "m", LIMITS, Vec::new())
            .expect("runs")
            .describe()
            .expect("describes");
    };
    load(Origin::Compiler);
    assert_eq!(fs::metadata(&dir).expect("made").permissions().mode() & 0o777, 0o700);
    load(Origin::Cache);
    let file = cached(&dir).pop().expect("one file");
    assert_eq!(fs::metadata(&file).expect("there").permissions().mode() & 0o777, 0o600);
    let good = fs::read(&file).expect("readable");
    for damage in [good.len() / 2, good.len() - 1, 0] {
        let mut bad = good.clone();
        bad[damage] ^= 1;
        // As a failing disk would: other content under the name, not written through what is mapped.
        fs::remove_file(&file).expect("removed");
        fs::write(&file, bad).expect("written");
        load(Origin::Compiler);
    }
    fs::write(&file, b"").expect("written");
    load(Origin::Compiler);
    load(Origin::Cache);
    fs::write(dir.join("77.0.part"), b"left").expect("written");
    fs::write(dir.join("aa-0000000000000000-bb.cwasm"), b"of another version").expect("written");
    load(Origin::Cache);
    assert_eq!(cached(&dir).len(), 1, "what cannot be used is removed");

    let error = sentence(open().load(b"hello").err().expect("refused"));
    assert!(error.contains("not WebAssembly"), "{error}");
    assert_eq!(cached(&dir).len(), 1, "nothing is left behind");
}

#[test]
fn what_is_precompiled_is_taken_from_where_root_alone_could_put_it() {
    use super::precompiled::Precompiled;
    use sha2::{Digest as _, Sha256};
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let scratch = Scratch::new("precompiled");
    let folder = scratch.0.join("installed");
    fs::create_dir(&folder).expect("folder");
    let me = fs::metadata(&folder).expect("there").uid();
    let engine = Engine::new().expect("engine");
    let wasm = guest("echo");
    // Code for this machine, so that it runs here.
    let code = super::compile::compile(&wasm).expect("compiles");
    let hex = super::compile::hex(&Sha256::digest(&wasm));
    let file = folder.join(format!("echo-{hex}-{}.pulley32", super::compile::checksum(&code)));
    let mode = |path: &Path, mode| fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("mode");
    let caches = std::cell::Cell::new(0);
    let load = |owner| {
        caches.set(caches.get() + 1);
        let maker = Maker::Precompiled(Precompiled::of(&folder, owner));
        let dir = scratch.0.join(format!("cache-{}", caches.get()));
        let cache = Cache::open(&dir, &engine, maker).expect("cache");
        let (program, origin) = cache.load(&wasm).map_err(sentence)?;
        Instance::start(&engine, &program, "m", LIMITS, Vec::new())
            .expect("runs")
            .describe()
            .expect("describes");
        assert_eq!(cache.load(&wasm).expect("again").1, Origin::Cache);
        Ok::<_, String>(origin)
    };
    let refused = |owner, part: &str| {
        let text = load(owner).expect_err(part);
        println!("{text}");
        assert!(text.contains(part), "{text:?} lacks {part:?}");
    };
    refused(me, "tidegate module precompile --target pulley32");
    fs::write(&file, &code).expect("written");
    mode(&file, 0o644);
    mode(&folder, 0o755);
    assert_eq!(load(me), Ok(Origin::Precompiled));
    mode(&file, 0o666);
    refused(me, "others may write to it (mode 0666)");
    mode(&file, 0o644);
    mode(&folder, 0o775);
    refused(me, "others may write to it (mode 0775)");
    mode(&folder, 0o755);
    if me == 0 {
        chown(&file, Some(65_534), None).expect("root gives away");
        refused(0, "it belongs to user 65534");
        chown(&file, Some(0), None).expect("and takes");
    } else {
        refused(0, &format!("it belongs to user {me}"));
    }
    let mut bad = code.clone();
    bad[code.len() / 2] ^= 1;
    fs::write(&file, bad).expect("written");
    refused(me, "is damaged");
    let cache = Cache::open(
        &scratch.0.join("c"),
        &engine,
        Maker::Precompiled(Precompiled::of(&folder, me)),
    );
    let error = sentence(cache.expect("cache").load(b"hello").err().expect("refused"));
    assert!(error.contains("not WebAssembly"), "{error}");
}

// ---- a log in memory

#[derive(Clone, Default)]
struct Broker(Arc<Shared>);

#[derive(Default)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Notify,
}

#[derive(Default)]
struct Inner {
    messages: Vec<Message>,
    done: BTreeMap<String, BTreeSet<u64>>,
    dead: Vec<(u64, String)>,
    state: BTreeMap<(String, String), Vec<u8>>,
    applied: usize,
    refuse_applies: usize,
    open: BTreeSet<String>,
    retired: Vec<String>,
}

impl Broker {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.0.inner.lock().expect("no test panics with it")
    }

    fn publish(&self, messages: impl IntoIterator<Item = Message>) {
        let mut inner = self.lock();
        for mut message in messages {
            message.sequence = Sequence(inner.messages.len() as u64 + 1);
            inner.messages.push(message);
        }
        drop(inner);
        self.0.changed.notify_waiters();
    }

    /// Payloads of what the module published, in order.
    fn published_by(&self, module: &str) -> Vec<String> {
        let source = format!("module:{module}");
        let inner = self.lock();
        let own = inner.messages.iter().filter(|m| *m.source == *source);
        own.map(|m| String::from_utf8_lossy(&m.payload).into_owned()).collect()
    }

    async fn until(&self, what: &str, mut seen: impl FnMut(&Inner) -> bool) {
        let wait = async {
            loop {
                let changed = self.0.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if seen(&self.lock()) {
                    return;
                }
                changed.await;
            }
        };
        if tokio::time::timeout(PATIENCE, wait).await.is_err() {
            let inner = self.lock();
            panic!(
                "not within {PATIENCE:?}: {what}; {} messages, dead {:?}",
                inner.messages.len(),
                inner.dead
            );
        }
    }
}

struct MemoryLog {
    broker: Broker,
    module: String,
    filters: Vec<TopicFilter>,
    handed: usize,
}

impl Logs for Broker {
    type Log = MemoryLog;

    fn log(&self, module: &str) -> MemoryLog {
        MemoryLog {
            broker: self.clone(),
            module: module.to_owned(),
            filters: Vec::new(),
            handed: 0,
        }
    }

    async fn retire(&self, module: String) {
        self.lock().retired.push(module);
        self.0.changed.notify_waiters();
    }
}

impl Log for MemoryLog {
    async fn open(&mut self, filters: Vec<TopicFilter>) -> Result<(), PublishError> {
        self.close();
        assert!(
            self.broker.lock().open.insert(self.module.clone()),
            "one consumer of a name at a time"
        );
        self.filters = filters;
        self.handed = 0;
        Ok(())
    }

    async fn next(&mut self, messages_max: usize, _bytes_max: usize) -> Result<Vec<Entry>, PublishError> {
        loop {
            let broker = self.broker.clone();
            let changed = broker.0.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            let mut entries = Vec::new();
            {
                let inner = broker.lock();
                let done = inner.done.get(&self.module);
                while entries.len() < messages_max && self.handed < inner.messages.len() {
                    let message = inner.messages[self.handed].clone();
                    self.handed += 1;
                    let wanted = self.filters.iter().any(|filter| filter.matches(message.topic.as_str()));
                    if wanted && !done.is_some_and(|done| done.contains(&message.sequence.0)) {
                        let position = Position {
                            stream: 0,
                            sequence: message.sequence,
                        };
                        entries.push(Entry {
                            position,
                            message,
                            notice: false,
                        });
                    }
                }
            }
            if !entries.is_empty() {
                return Ok(entries);
            }
            changed.await;
        }
    }

    async fn apply(&mut self, effects: Effects) -> Result<(), PublishError> {
        {
            let mut inner = self.broker.lock();
            inner.applied += 1;
            if inner.refuse_applies > 0 {
                inner.refuse_applies -= 1;
                return Err(PublishError::Full("default".to_owned()));
            }
            let done = inner.done.entry(self.module.clone()).or_default();
            for position in &effects.acknowledge {
                assert!(done.insert(position.sequence.0), "{position:?} is done twice");
            }
            for (entry, _) in &effects.dead {
                assert!(
                    done.insert(entry.position.sequence.0),
                    "{:?} is done twice",
                    entry.position
                );
            }
            inner.dead.extend(
                effects
                    .dead
                    .into_iter()
                    .map(|(entry, why)| (entry.position.sequence.0, why)),
            );
            for (key, value) in effects.state {
                let key = (self.module.clone(), key);
                match value {
                    Some(value) => inner.state.insert(key, value),
                    None => inner.state.remove(&key),
                };
            }
        }
        self.broker.publish(effects.publish);
        Ok(())
    }

    async fn state(&mut self) -> Result<Vec<(String, Vec<u8>)>, PublishError> {
        let inner = self.broker.lock();
        let own = inner.state.iter().filter(|((module, _), _)| *module == self.module);
        Ok(own.map(|((_, key), value)| (key.clone(), value.clone())).collect())
    }

    fn close(&mut self) {
        self.broker.lock().open.remove(&self.module);
    }
}

/// A module host that runs, with a folder to drop files into.
struct Gateway {
    scratch: Scratch,
    broker: Broker,
    status: Status,
    stop: watch::Sender<bool>,
    task: tokio::task::JoinHandle<HashMap<String, clock::Instant>>,
    wanted: watch::Sender<config::Modules>,
}

impl Gateway {
    fn start(name: &str, settings: &[(&str, ModuleSettings)]) -> Gateway {
        Gateway::start_with(name, settings, |_| ())
    }

    fn start_with(
        name: &str,
        settings: &[(&str, ModuleSettings)],
        change: impl FnOnce(&mut ModuleHost<Broker>),
    ) -> Gateway {
        let scratch = Scratch::new(name);
        let (broker, status) = (Broker::default(), Status::default());
        let settings = settings
            .iter()
            .map(|(name, settings)| ((*name).to_owned(), settings.clone()))
            .collect();
        let modules = config::Modules {
            dir: scratch.0.join("modules.d"),
            settings,
        };
        let (wanted, modules) = watch::channel(modules);
        let mut host =
            ModuleHost::new(modules, &scratch.0, broker.clone(), status.clone(), test_compiler()).expect("host");
        change(&mut host);
        let (stop, stopped) = watch::channel(false);
        let task = tokio::spawn(host.run(stopped));
        Gateway {
            wanted,
            scratch,
            broker,
            status,
            stop,
            task,
        }
    }

    /// As a careful user would: aside and renamed.
    fn drop_in(&self, name: &str, wasm: &[u8]) {
        let dir = self.scratch.0.join("modules.d");
        fs::create_dir_all(&dir).expect("folder");
        let aside = dir.join(format!("{name}.wasm.tmp"));
        fs::write(&aside, wasm).expect("written");
        fs::rename(aside, self.file(name)).expect("renamed");
    }

    fn file(&self, name: &str) -> PathBuf {
        self.scratch.0.join("modules.d").join(format!("{name}.wasm"))
    }

    fn report(&self, name: &str) -> Option<PartReport> {
        self.status
            .report()
            .into_iter()
            .find(|part| part.kind == "module" && part.name == name)
    }

    /// Status has no way to wait for a change: it is looked at every few milliseconds.
    async fn until(&self, name: &str, what: &str, seen: impl Fn(Option<&PartReport>) -> bool) -> Option<PartReport> {
        let deadline = clock::monotonic() + PATIENCE;
        loop {
            let report = self.report(name);
            if seen(report.as_ref()) {
                return report;
            }
            assert!(
                clock::monotonic() < deadline,
                "not within {PATIENCE:?}: {what}; {report:?}"
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn until_health(&self, name: &str, health: Health, part: &str) -> PartReport {
        let seen = |report: Option<&PartReport>| report.is_some_and(|r| r.health == health && r.text.contains(part));
        self.until(name, &format!("{name} {health:?} {part}"), seen)
            .await
            .expect("seen")
    }

    async fn end(self) {
        self.stop.send(true).expect("runs");
        tokio::time::timeout(Duration::from_secs(2), self.task)
            .await
            .expect("within two seconds")
            .expect("no panic");
    }
}

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime");
    runtime.block_on(test);
}

fn generous() -> ModuleSettings {
    ModuleSettings {
        deadline: Duration::from_secs(2),
        ..ModuleSettings::default()
    }
}

fn do_messages(range: std::ops::Range<usize>) -> impl Iterator<Item = Message> {
    range.map(|n| message("do/it", &n.to_string()))
}

fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|n| n.to_string()).collect()
}

/// MO-01.
#[test]
fn one_poisonous_message_goes_alone() {
    run(async {
        let gateway = Gateway::start("poison", &[("m", generous())]);
        gateway.drop_in("m", &guest("misbehave"));
        gateway.until_health("m", Health::Good, "misbehave").await;
        gateway.broker.publish(do_messages(0..1_000));
        gateway.broker.publish([message("do/it", "panic")]);
        gateway.broker.publish(do_messages(1_000..2_000));
        gateway
            .broker
            .until("2,000 answers", |inner| inner.messages.len() >= 4_001)
            .await;
        assert_eq!(without_timer(gateway.broker.published_by("m")), numbers(0..2_000));
        {
            let inner = gateway.broker.lock();
            assert_eq!(inner.dead.len(), 1);
            assert_eq!(inner.dead[0].0, 1_001);
            assert!(
                inner.dead[0].1.contains("the payload says panic"),
                "{}",
                inner.dead[0].1
            );
            assert_eq!(
                inner.state[&("m".to_owned(), "handled".to_owned())],
                2_000u64.to_le_bytes()
            );
        }
        let seen = |report: Option<&PartReport>| report.is_some_and(|r| r.counters["received"] == 2_000);
        let report = gateway.until("m", "counted", seen).await.expect("seen");
        assert_eq!(
            (report.counters["poisonous"], report.counters["restarts"]),
            (1, 1),
            "{report:?}"
        );
        assert_eq!(report.health, Health::Good, "{report:?}");
        gateway.end().await;
    });
}

/// misbehave's timer publishes too; its payloads are times.
fn without_timer(payloads: Vec<String>) -> Vec<String> {
    payloads.into_iter().filter(|payload| payload.len() < 13).collect()
}

/// A module that fails on everything is set aside with what it was sent, and a corrected file goes on from there.
#[test]
fn a_broken_module_is_set_aside_and_its_messages_wait_for_the_next() {
    run(async {
        let gateway = Gateway::start("aside", &[("m", generous())]);
        gateway.drop_in("m", &guest("misbehave"));
        gateway.until_health("m", Health::Good, "misbehave").await;
        gateway.broker.publish((0..20).map(|_| message("do/it", "panic")));
        let report = gateway.until_health("m", Health::Failed, "set aside").await;
        assert!(
            report.text.contains("5 messages in a row") && report.text.contains("says panic"),
            "{}",
            report.text
        );
        assert!(report.text.contains("drop in"), "{}", report.text);
        assert!(gateway.broker.lock().dead.is_empty());
        assert!(gateway.broker.lock().open.is_empty(), "its consumer is closed");

        gateway.drop_in("m", &guest("echo"));
        gateway
            .broker
            .until("all of them", |inner| {
                inner.done.get("m").is_some_and(|done| done.len() >= 20)
            })
            .await;
        gateway
            .until_health("m", Health::Late, "subscribes to what it publishes")
            .await;
        let echoes = gateway
            .broker
            .published_by("m")
            .into_iter()
            .filter(|p| p == "panic")
            .count();
        assert_eq!(echoes, 20);
        gateway.end().await;
    });
}

/// A reload: the module whose settings changed is swapped for itself, and one that cannot run with its new ones runs on.
#[test]
fn changed_settings_swap_their_module_alone() {
    run(async {
        let gateway = Gateway::start("settings", &[]);
        for name in ["m", "n"] {
            gateway.drop_in(name, &guest("misbehave"));
            gateway.until_health(name, Health::Good, "subscribes to do/#").await;
        }
        let set = |settings: ModuleSettings| {
            gateway
                .wanted
                .send_modify(|w| drop(w.settings.insert("m".to_owned(), settings)));
        };
        set(ModuleSettings {
            subscribe: Some(filters(&["other/#"])),
            ..generous()
        });
        gateway.until_health("m", Health::Good, "subscribes to other/#").await;
        let report = gateway.report("n").expect("it runs");
        assert!(report.text.contains("subscribes to do/#"), "{}", report.text);
        // What it cannot run with: 64 KiB are less than its own data.
        set(ModuleSettings {
            memory_bytes_max: 64 << 10,
            ..ModuleSettings::default()
        });
        gateway.until_health("m", Health::Late, "subscribes to other/#").await;
        gateway.broker.publish([message("other/it", "x")]);
        gateway
            .broker
            .until("it works on", |inner| {
                inner.done.get("m").is_some_and(|d| !d.is_empty())
            })
            .await;
        gateway.end().await;
    });
}

/// A run of bad messages longer than the bound: the module is right, and whoever drops it in again gets it past them.
#[test]
fn a_module_that_is_tried_again_gets_past_a_run_of_bad_messages() {
    run(async {
        let gateway = Gateway::start("again", &[("m", generous())]);
        gateway.drop_in("m", &guest("misbehave"));
        gateway.until_health("m", Health::Good, "misbehave").await;
        gateway.broker.publish((0..20).map(|_| message("do/it", "panic")));
        gateway.broker.publish([message("do/it", "good")]);
        gateway.until_health("m", Health::Failed, "set aside").await;
        assert!(gateway.broker.lock().dead.is_empty());
        gateway.drop_in("m", &guest("misbehave"));
        gateway.broker.until("past them", |inner| inner.dead.len() == 20).await;
        gateway
            .broker
            .until("the good one", |inner| {
                inner
                    .messages
                    .iter()
                    .any(|m| *m.source == *"module:m" && m.payload == "good")
            })
            .await;
        gateway.until_health("m", Health::Good, "misbehave").await;
        gateway.end().await;
    });
}

/// MO-03.
#[test]
fn modules_that_answer_each_other_are_stopped_and_named() {
    run(async {
        let gateway = Gateway::start("loop", &[]);
        gateway.drop_in("one", &guest("loop"));
        gateway.until_health("one", Health::Good, "loop").await;
        gateway.broker.publish([message("loop/self", "x")]);
        let report = gateway
            .until_health("one", Health::Late, "its own messages are not handed back")
            .await;
        assert!(report.text.contains("loop/self"), "{}", report.text);
        assert_eq!(
            gateway.broker.published_by("one").len(),
            2,
            "one answer to the client's, none to its own"
        );

        gateway.end().await;

        let gateway = Gateway::start("loops", &[]);
        gateway.drop_in("one", &guest("loop"));
        gateway.drop_in("two", &guest("loop"));
        gateway.until_health("one", Health::Good, "loop").await;
        gateway.until_health("two", Health::Good, "loop").await;
        gateway.broker.publish([message("loop/a", "x")]);
        // Both take it, so there are two chains, each of which comes round once.
        for module in ["one", "two"] {
            let report = gateway.until_health(module, Health::Late, "in a loop").await;
            assert_eq!(report.counters["looped"], 1, "{report:?}");
            assert!(
                report.text.contains("one>two>one>two") || report.text.contains("two>one>two>one"),
                "{report:?}"
            );
        }
        let published = gateway.broker.published_by("one").len() + gateway.broker.published_by("two").len();
        assert_eq!(published, 8);
        gateway.end().await;
    });
}

/// Swapped in the middle of the traffic: nothing is lost, doubled or overtaken.
#[test]
fn a_swap_loses_nothing() {
    run(async {
        let settings = ModuleSettings {
            subscribe: Some(filters(&["do/#"])),
            ..generous()
        };
        let gateway = Gateway::start("swap", &[("m", settings)]);
        let echo = guest("echo");
        gateway.drop_in("m", &echo);
        gateway.until_health("m", Health::Good, "echo").await;
        for version in 0u8..4 {
            let from = usize::from(version) * 500;
            gateway.broker.publish(do_messages(from..from + 250));
            // Another file of the same meaning: a custom section more.
            gateway.drop_in("m", &[&echo[..], &[0, 3, 1, b'v', version]].concat());
            gateway.broker.publish(do_messages(from + 250..from + 500));
            let expected = (from + 500) * 2;
            gateway
                .broker
                .until("all answered", |inner| inner.messages.len() >= expected)
                .await;
        }
        assert_eq!(gateway.broker.published_by("m"), numbers(0..2_000));
        gateway.end().await;
    });
}

#[test]
fn a_bad_file_leaves_the_module_that_runs_alone() {
    run(async {
        let settings = ModuleSettings {
            subscribe: Some(filters(&["do/#"])),
            ..generous()
        };
        let gateway = Gateway::start("bad", &[("m", settings)]);
        gateway.drop_in("m", b"hello");
        gateway.until_health("m", Health::Failed, "not WebAssembly").await;
        let echo = guest("echo");
        gateway.drop_in("m", &echo);
        gateway.until_health("m", Health::Good, "echo").await;
        gateway.drop_in("m", &echo[..1_000]);
        let report = gateway.until_health("m", Health::Late, "cut short").await;
        assert!(report.text.contains("version before runs on"), "{}", report.text);
        gateway.broker.publish(do_messages(0..3));
        gateway.broker.until("answers", |inner| inner.messages.len() == 6).await;
        // Written in place, not renamed: taken when it is closed.
        fs::write(gateway.file("m"), &echo).expect("written");
        gateway.until_health("m", Health::Good, "echo").await;

        fs::remove_file(gateway.file("m")).expect("removed");
        gateway.until("m", "unloaded", |report| report.is_none()).await;
        gateway.broker.publish(do_messages(3..5));
        gateway.drop_in("m", &echo);
        gateway
            .broker
            .until("answers to what came meanwhile", |inner| inner.messages.len() == 10)
            .await;
        assert_eq!(gateway.broker.published_by("m"), numbers(0..5));

        gateway.drop_in("not a name", &echo);
        gateway.until_health("not a name", Health::Failed, "rename it").await;
        gateway.end().await;
    });
}

#[test]
fn effects_wait_while_the_log_is_full() {
    run(async {
        let settings = ModuleSettings {
            subscribe: Some(filters(&["do/#"])),
            ..generous()
        };
        let gateway = Gateway::start("full", &[("m", settings)]);
        gateway.drop_in("m", &guest("echo"));
        gateway.until_health("m", Health::Good, "echo").await;
        gateway.broker.lock().refuse_applies = 4;
        gateway.broker.publish(do_messages(0..10));
        gateway.until_health("m", Health::Late, "is full").await;
        gateway
            .broker
            .until("answers", |inner| inner.messages.len() == 20)
            .await;
        assert_eq!(gateway.broker.published_by("m"), numbers(0..10));
        gateway.until_health("m", Health::Good, "echo").await;
        // A stop while it waits is a stop.
        gateway.broker.lock().refuse_applies = usize::MAX;
        gateway.broker.publish(do_messages(10..11));
        gateway.until_health("m", Health::Late, "is full").await;
        gateway.end().await;
    });
}

#[test]
fn a_batch_that_is_too_slow_as_a_whole_goes_in_smaller_ones() {
    run(async {
        // Sixty-four slow messages take far longer than this together, and far less each.
        let settings = ModuleSettings {
            deadline: Duration::from_millis(200),
            ..ModuleSettings::default()
        };
        let gateway = Gateway::start("slow", &[("m", settings)]);
        gateway
            .broker
            .publish((0..2 * BATCH_MESSAGES_MAX).map(|_| message("do/it", "slow")));
        gateway.drop_in("m", &guest("misbehave"));
        let all = 2 * BATCH_MESSAGES_MAX;
        // The consumer of a module that is new sees what is there: this log keeps everything.
        gateway
            .broker
            .until("all", |inner| inner.done.get("m").is_some_and(|done| done.len() == all))
            .await;
        assert!(
            gateway.broker.lock().dead.is_empty(),
            "{:?}",
            gateway.broker.lock().dead
        );
        gateway.end().await;
    });
}

#[test]
fn timers_run_and_their_failures_set_aside() {
    run(async {
        let gateway = Gateway::start("timer", &[("m", generous())]);
        gateway.drop_in("m", &guest("misbehave"));
        gateway
            .broker
            .until("three ticks", |inner| inner.messages.len() >= 3)
            .await;
        fs::remove_file(gateway.file("m")).expect("removed");
        gateway.until("m", "unloaded", |report| report.is_none()).await;
        gateway.broker.until("closed", |inner| inner.open.is_empty()).await;
        gateway
            .broker
            .lock()
            .state
            .insert(("m".to_owned(), "timer".to_owned()), b"panic".to_vec());
        gateway.drop_in("m", &guest("misbehave"));
        let report = gateway
            .until_health("m", Health::Failed, "its timer failed 5 times in a row")
            .await;
        assert!(report.text.contains("the state says panic"), "{}", report.text);
        gateway.end().await;
    });
}

#[test]
fn nothing_is_kept_for_a_module_that_stays_away() {
    run(async {
        let gateway = Gateway::start_with("retire", &[], |host| host.retire_after = Duration::from_millis(300));
        gateway.drop_in("stays", &guest("echo"));
        gateway.drop_in("back", &guest("echo"));
        gateway.drop_in("away", &guest("echo"));
        for module in ["stays", "back", "away"] {
            gateway.until_health(module, Health::Good, "echo").await;
        }
        fs::remove_file(gateway.file("away")).expect("removed");
        fs::remove_file(gateway.file("back")).expect("removed");
        gateway.until("back", "unloaded", |report| report.is_none()).await;
        gateway.drop_in("back", &guest("echo"));
        gateway.broker.until("retired", |inner| !inner.retired.is_empty()).await;
        assert_eq!(gateway.broker.lock().retired, ["away"]);
        gateway.end().await;
    });
}

/// Best of some: what the machine is busy with is not the gateway's.
#[test]
fn an_endless_loop_is_stopped_within_fifty_ms_of_its_deadline() {
    let fixture = Fixture::new("misbehave");
    let stopped = |_| {
        let mut instance = fixture.instance(LIMITS);
        let began = clock::monotonic();
        send(&mut instance, "loop").expect_err("stopped");
        began.elapsed()
    };
    let best = (0..10).map(stopped).min().expect("some");
    assert!(
        (LIMITS.deadline..LIMITS.deadline + Duration::from_millis(50)).contains(&best),
        "{best:?}"
    );
}

// ---- the sample

/// The component that is kept in the repository and the one just built from source.
fn averages() -> [(&'static str, Fixture); 2] {
    let kept = Path::new(env!("CARGO_MANIFEST_DIR")).join("modules.d/average.wasm");
    let kept = fs::read(&kept).unwrap_or_else(|e| panic!("{kept:?}: {e}"));
    [("kept", Fixture::of(&kept)), ("built", Fixture::new("average"))]
}

fn at(received_ms: i64, topic: &str, payload: &str) -> Message {
    Message {
        received: Timestamp::from_millis(received_ms),
        ..message(topic, payload)
    }
}

fn drafts(output: &Output) -> Vec<(String, String, bool)> {
    let text = |d: &host::Draft| String::from_utf8_lossy(&d.payload).into_owned();
    output
        .published
        .iter()
        .map(|d| (d.topic.to_string(), text(d), d.retain))
        .collect()
}

fn temperature(value: &str) -> String {
    format!(r#"{{"temperature":{{"value":{value},"ts":"2026-11-24T23:40:03.120Z","q":"good"}}}}"#)
}

const T0: i64 = 1_764_027_603_120;

#[test]
fn the_sample_averages_what_is_good() {
    for (which, fixture) in averages() {
        let (mut average, _) = fixture.instance_with(LIMITS, r#"{"window":"10 s"}"#, Vec::new());
        let burner = r#"{"temperature":{"value":22.5,"q":"good"},"pressure":{"value":1e-3,"q":"good"},
            "burner":{"value":true,"q":"good"},"valve":{"value":null,"q":"bad","why":"timeout"},"flow":{"value":9,"q":"uncertain"}}"#;
        let batch = [
            at(T0, "data/line-4/boiler", &temperature("21.5")),
            at(T0 + 9_999, "data/line-4/boiler", burner),
            at(T0 + 20_000, "data/line-4/boiler", &temperature("-40")),
        ];
        let output = average.on_batch(batch.iter()).expect("good");
        assert_eq!(
            output.outcomes,
            [Outcome::Pass, Outcome::Pass, Outcome::Pass],
            "{which}"
        );
        let expected = concat!(
            r#"{"temperature":{"value":22,"ts":"2025-11-24T23:40:13.119Z","q":"good","min":21.5,"max":22.5,"count":2},"#,
            r#""pressure":{"value":0.001,"ts":"2025-11-24T23:40:13.119Z","q":"good","min":0.001,"max":0.001,"count":1}}"#
        );
        assert_eq!(
            drafts(&output),
            [("derived/line-4/boiler/average".to_owned(), expected.to_owned(), false)],
            "{which}"
        );
        // The other window is ended by the timer, once.
        assert_eq!(
            drafts(&average.on_timer(Timestamp::from_millis(T0 + 29_999)).expect("good")),
            [],
            "{which}"
        );
        let ended = average.on_timer(Timestamp::from_millis(T0 + 30_000)).expect("good");
        assert!(drafts(&ended)[0].1.contains(r#""value":-40,"#), "{which}: {ended:?}");
        assert_eq!(
            drafts(&average.on_timer(Timestamp::from_millis(T0 + 90_000)).expect("good")),
            [],
            "{which}"
        );
    }
}

#[test]
fn the_sample_alarms_once_a_crossing_with_hysteresis() {
    for (which, fixture) in averages() {
        let config = r#"{"window":"1 s","point":"temperature","threshold":90,"hysteresis":2}"#;
        let (mut average, _) = fixture.instance_with(LIMITS, config, Vec::new());
        let mut alarms = Vec::new();
        for (n, value) in ["80", "90", "95", "89", "88.1", "88", "89.9", "90.5"]
            .iter()
            .enumerate()
        {
            let received = T0 + n as i64 * 1_000;
            let mut output = average
                .on_batch([&at(received, "data/b", &temperature(value))].into_iter())
                .expect("good");
            alarms.append(&mut drafts(&output));
            output = average
                .on_timer(Timestamp::from_millis(received + 1_000))
                .expect("good");
            alarms.append(&mut drafts(&output));
        }
        alarms.retain(|(topic, _, _)| topic.starts_with("alarm/"));
        let states: Vec<(&str, bool, bool)> = alarms
            .iter()
            .map(|(topic, text, retain)| (topic.as_str(), text.contains(r#""state":"on""#), *retain))
            .collect();
        let topic = "alarm/b/temperature";
        assert_eq!(
            states,
            [(topic, true, true), (topic, false, true), (topic, true, true)],
            "{which}: {alarms:?}"
        );
        assert_eq!(
            alarms[0].1,
            r#"{"point":"temperature","state":"on","average":90,"threshold":90,"ts":"2025-11-24T23:40:04.120Z"}"#,
            "{which}"
        );
    }
}

#[test]
fn the_sample_goes_on_after_a_restart_where_it_was() {
    for (which, fixture) in averages() {
        let config = r#"{"window":"10 s","point":"temperature","threshold":50}"#;
        let mut state: BTreeMap<String, Vec<u8>> = BTreeMap::new();
        let mut published = Vec::new();
        for (n, value) in ["60", "70", "20", "90"].iter().enumerate() {
            // A new life for each message, with nothing but the state.
            let (mut average, _) = fixture.instance_with(LIMITS, config, state.clone().into_iter().collect());
            let received = T0 + n as i64 * 4_000;
            let output = average
                .on_batch([&at(received, "data/b", &temperature(value))].into_iter())
                .expect("good");
            published.append(&mut drafts(&output));
            for (key, value) in output.state {
                match value {
                    Some(value) => state.insert(key, value),
                    None => state.remove(&key),
                };
            }
        }
        assert_eq!(published.len(), 2, "{which}: {published:?}");
        assert!(
            published[0].1.contains(r#""value":50,"#) && published[0].1.contains(r#""count":3"#),
            "{which}: {published:?}"
        );
        assert_eq!(published[1].0, "alarm/b/temperature", "{which}");
    }
}

#[test]
fn the_sample_refuses_what_it_cannot_read() {
    for (which, fixture) in averages() {
        let (mut average, _) = fixture.instance_with(LIMITS, "{}", Vec::new());
        let bad = [
            "",
            "21.5",
            "{",
            r#"{"a":}"#,
            r#"{"a":{"value":1}} x"#,
            "{\"a\":\"\u{1}\"}",
            &"[".repeat(10_000),
        ];
        for payload in bad {
            let output = average
                .on_batch([&at(T0, "data/b", payload)].into_iter())
                .expect("never traps");
            assert!(
                matches!(output.outcomes[0], Outcome::Reject(_)),
                "{which}: {payload:.20}"
            );
        }
        let harmless = [
            "{}",
            r#"{"a":7}"#,
            r#"{"a":{"value":"9007199254740993","q":"good"}}"#,
            r#"{"\u00e9\ud83d\ude00":{}}"#,
        ];
        for payload in harmless {
            let output = average
                .on_batch([&at(T0, "data/b", payload)].into_iter())
                .expect("never traps");
            assert_eq!(output.outcomes, [Outcome::Pass], "{which}: {payload}");
        }
        let start = |config: &str| {
            let mut instance =
                Instance::start(&fixture.engine, &fixture.program, "m", LIMITS, Vec::new()).expect("starts");
            instance.init(config).expect_err(config).to_string()
        };
        assert!(
            start(r#"{"windows":"10 s"}"#).contains(r#"unknown key "windows""#),
            "{which}"
        );
        assert!(start(r#"{"window":"10 parsecs"}"#).contains("10 parsecs"), "{which}");
        assert!(start(r#"{"threshold":1}"#).contains("point"), "{which}");
        assert!(start(r#"{"hysteresis":-1}"#).contains("hysteresis"), "{which}");
    }
}

/// Its own reading and writing of numbers, against std's.
#[test]
fn the_sample_reads_and_writes_numbers() {
    let numbers = [
        "0",
        "-0.0",
        "1",
        "-1.5",
        "21.5",
        "0.1",
        "0.30000000000000004",
        "123456.789",
        "1e3",
        "1E-3",
        "2.5e+10",
        "1e300",
        "1e-300",
        "4.9e-320",
        "9007199254740991",
        "123456789012345678901234567890",
        "0.000001",
        "0.0000001",
        "99999999999999.9",
        "3.14159265358979",
    ];
    for (which, fixture) in averages() {
        for number in numbers {
            let (mut average, _) = fixture.instance_with(LIMITS, "{}", Vec::new());
            average
                .on_batch([&at(T0, "data/b", &temperature(number))].into_iter())
                .expect("good");
            let output = average.on_timer(Timestamp::from_millis(T0 + 10_000)).expect("good");
            let json: serde_json::Value = serde_json::from_str(&drafts(&output)[0].1).expect("JSON");
            let back = json["temperature"]["max"].as_f64().expect("a number");
            let expected: f64 = number.parse().expect("a number");
            let error = (back - expected).abs();
            assert!(
                error <= expected.abs() * 4e-15 || expected.abs() < 1e-300,
                "{which}: {number} came back as {back}"
            );
        }
    }
}
