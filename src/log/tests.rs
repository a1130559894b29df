//! The log by itself, on a real database in a folder of its own.

mod crash;
pub mod disk;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::consumer::Consumer;
use super::store::{Found, ReadStore};
use super::*;
use crate::clock::Timestamp;
use crate::config::WhenFull;
use crate::message::{Message, Qos, Topic};

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "tidegate-log-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        Folder(std::env::temp_dir().join(name))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn stream(name: &str, filter: &str, bytes_max: u64) -> Stream {
    Stream {
        name: name.into(),
        filter: vec![filter_of(filter)],
        bytes_max,
        age_max: None,
        when_full: WhenFull::DropOldest,
    }
}

fn filter_of(text: &str) -> TopicFilter {
    TopicFilter::new(text.to_owned()).expect(text)
}

fn message(topic: &str, payload: String) -> Message {
    let topic = Topic::new(topic.to_owned()).expect("valid");
    Message::new(topic, payload, "client:test".into(), clock::wall())
}

/// Appends as the router does: the consumers that match are told under the same lock.
fn append(log: &Log, consumers: &[&Arc<ConsumerState>], messages: &[Message]) -> u64 {
    let mut batch = log.batch();
    for m in messages {
        let stream = log.stream_of(m.topic.as_str()).expect("a stream takes everything");
        let sequence = batch.append(stream, &MessageRef::from(m));
        for c in consumers {
            if c.filters().iter().any(|(f, _)| f.matches(m.topic.as_str())) {
                c.matched(stream, sequence, m.size_bytes());
            }
        }
    }
    batch.ticket()
}

/// Waits until the commit of that generation has ended well.
async fn committed(log: &Log, generation: u64) {
    loop {
        for event in log.commit_events() {
            event.result.expect("the disk is sound");
            if event.generation >= generation {
                return;
            }
        }
        log.commit_ended().await;
    }
}

fn open(folder: &Folder, streams: &[Stream]) -> (Log, LogThreads) {
    let (log, threads, _) = Log::open(&folder.0, streams, &Status::default()).expect("opens");
    (log, threads)
}

fn consumer(log: &Log, name: &str, filter: &str) -> Arc<ConsumerState> {
    log.consumer(&mut log.batch(), name, &[filter_of(filter)])
}

fn run(test: impl Future<Output = ()>) {
    let limit = std::time::Duration::from_secs(60);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async { tokio::time::timeout(limit, test).await.expect("in time") });
}

#[test]
fn what_was_committed_is_read_in_order_also_after_a_restart() {
    let folder = Folder::new();
    run(async {
        let streams = [stream("all", "#", 1 << 30)];
        let (log, threads) = open(&folder, &streams);
        let state = consumer(&log, "uplink:a", "t/#");
        for n in 0..50 {
            let messages: Vec<_> = (0..20)
                .map(|i| message(if i % 4 == 0 { "other" } else { "t/x" }, format!("{n}/{i}")))
                .collect();
            let generation = append(&log, &[&state], &messages);
            committed(&log, generation).await;
        }
        let mut reader = Consumer::new(log.clone(), Arc::clone(&state));
        let first = reader.next(100, usize::MAX).await.expect("there");
        assert_eq!(first.len(), 100);
        assert_eq!(first[0].message.payload, "0/1");
        // Out of order: the cursor waits for the first.
        for e in first.iter().skip(1) {
            reader.acknowledge(e.position);
        }
        assert_eq!(state.done(0), first[0].position.sequence.0 - 1);
        reader.acknowledge(first[0].position);
        assert_eq!(state.queued().0, 650);
        drop((reader, state, log));
        drop(threads);

        let (log, _threads) = open(&folder, &streams);
        let state = consumer(&log, "uplink:a", "t/#");
        assert_eq!(state.queued().0, 650, "the backlog is known after a restart");
        let mut reader = Consumer::new(log.clone(), state);
        let mut seen = 0;
        while seen < 650 {
            for e in reader.next(64, usize::MAX).await.expect("there") {
                let n = 100 + seen;
                assert_eq!(
                    e.message.payload,
                    format!("{}/{}", n / 15, n % 15 + 1 + (n % 15) / 3),
                    "message {n}"
                );
                seen += 1;
            }
        }
        // Everything unacknowledged comes again.
        reader.rewind();
        assert_eq!(
            reader.next(1, usize::MAX).await.expect("there")[0].message.payload,
            "6/14"
        );
    });
}

#[test]
fn received_and_declared_lost_make_up_what_was_produced() {
    let folder = Folder::new();
    run(async {
        let (log, _threads) = open(&folder, &[stream("all", "#", 64 << 10)]);
        let state = consumer(&log, "uplink:a", "#");
        let mut reader = Consumer::new(log.clone(), Arc::clone(&state));
        let mut produced = 0u64;
        let mut received = 0u64;
        // An entry that grew comes again under its id, with the whole count.
        let mut lost: HashMap<String, u64> = HashMap::new();
        let mut last = 0;
        let mut take = |e: consumer::Entry, reader: &mut Consumer| {
            if e.notice {
                let notice: serde_json::Value = serde_json::from_slice(&e.message.payload).expect("JSON");
                assert_eq!(notice["reason"], "full");
                lost.insert(notice["id"].to_string(), notice["count"].as_u64().expect("a number"));
            } else {
                assert!(e.position.sequence.0 > last, "in order");
                last = e.position.sequence.0;
                received += 1;
            }
            reader.acknowledge(e.position);
            received + lost.values().sum::<u64>()
        };
        for round in 0..200u64 {
            let messages: Vec<_> = (0..17)
                .map(|i| message("t", format!("{round} {i} {}", "x".repeat(200))))
                .collect();
            produced += messages.len() as u64;
            let generation = append(&log, &[&state], &messages);
            committed(&log, generation).await;
            // Now and then a few are taken, as over a slow link.
            if round % 9 == 0 {
                for e in reader.next(5, usize::MAX).await.expect("there") {
                    take(e, &mut reader);
                }
            }
        }
        let mut known = 0;
        while known < produced {
            for e in reader.next(100, usize::MAX).await.expect("there") {
                known = take(e, &mut reader);
            }
        }
        let lost: u64 = lost.values().sum();
        assert_eq!(received + lost, produced);
        assert!(lost > 1_000, "the stream was far too small: {lost} lost");
        assert_eq!(state.queued(), (0, 0));
    });
}

#[test]
fn segments_go_when_every_consumer_has_passed_them() {
    let folder = Folder::new();
    run(async {
        let (log, _threads) = open(
            &folder,
            &[stream("alarms", "alarm/#", 1 << 20), stream("rest", "#", 1 << 20)],
        );
        let fast = consumer(&log, "uplink:fast", "#");
        let slow = consumer(&log, "uplink:slow", "data/#");
        for n in 0..40 {
            let generation = append(
                &log,
                &[&fast, &slow],
                &[message("alarm/x", n.to_string()), message("data/x", n.to_string())],
            );
            committed(&log, generation).await;
        }
        let kept = |name: &str| {
            log.streams()
                .find(|s| s.name == name)
                .expect("there")
                .messages
                .load(Ordering::Relaxed)
        };
        assert_eq!((kept("alarms"), kept("rest")), (40, 40));
        let drain = async |state: &Arc<ConsumerState>, count: usize| {
            let mut reader = Consumer::new(log.clone(), Arc::clone(state));
            let mut seen = 0;
            while seen < count {
                for e in reader.next(100, usize::MAX).await.expect("there") {
                    reader.acknowledge(e.position);
                    seen += 1;
                }
            }
        };
        drain(&fast, 80).await;
        // The writer takes them away with its next flush.
        let mut durable = log.durable();
        while kept("alarms") > 0 {
            let generation = append(&log, &[], &[]);
            committed(&log, generation).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(kept("rest"), 40, "the slow one is owed these");
        drain(&slow, 40).await;
        while kept("rest") > 0 {
            let generation = append(&log, &[], &[]);
            committed(&log, generation).await;
            tokio::task::yield_now().await;
        }
        durable.borrow_and_update();
    });
}

#[test]
fn a_damaged_database_is_set_aside_and_never_deleted() {
    for garbage in [
        vec![0u8; 20_000],
        b"not a database at all, but long enough to have a page".repeat(200),
        Vec::new(),
    ] {
        let folder = Folder::new();
        std::fs::create_dir_all(&folder.0).expect("made");
        std::fs::write(folder.0.join("log.db"), &garbage).expect("written");
        run(async {
            let (log, _threads) = open(&folder, &[stream("all", "#", 1 << 20)]);
            let state = consumer(&log, "uplink:a", "#");
            let generation = append(&log, &[&state], &[message("t", "x".into())]);
            committed(&log, generation).await;
        });
        let aside: Vec<_> = std::fs::read_dir(&folder.0)
            .expect("readable")
            .filter_map(|e| e.ok())
            .filter(|e| e.file_name().to_string_lossy().starts_with("log.db.damaged-"))
            .collect();
        if garbage.is_empty() {
            // An empty file is an empty database: nothing is lost by using it.
            assert!(aside.is_empty());
        } else {
            assert_eq!(aside.len(), 1);
            assert_eq!(std::fs::read(aside[0].path()).expect("kept"), garbage);
        }
    }
}

#[test]
fn a_second_gateway_does_not_get_the_same_folder() {
    let folder = Folder::new();
    let streams = [stream("all", "#", 1 << 20)];
    let (_log, _threads) = open(&folder, &streams);
    assert!(matches!(
        Log::open(&folder.0, &streams, &Status::default()),
        Err(OpenError::InUse(_))
    ));
}

#[test]
fn an_expired_message_is_skipped_and_declared() {
    let folder = Folder::new();
    run(async {
        let (log, _threads) = open(&folder, &[stream("all", "#", 1 << 20)]);
        let state = consumer(&log, "uplink:a", "#");
        let mut old = message("t", "old".into());
        old.received = Timestamp::from_millis(clock::wall().millis() - 10_000);
        old.properties = Some(Box::new(crate::message::Properties {
            expiry_s: Some(5),
            ..Default::default()
        }));
        old.qos = Qos::AtLeastOnce;
        let generation = append(&log, &[&state], &[old, message("t", "new".into())]);
        committed(&log, generation).await;
        let mut reader = Consumer::new(log.clone(), state);
        let first = reader.next(10, usize::MAX).await.expect("there");
        assert_eq!(first.len(), 1);
        assert_eq!(first[0].message.payload, "new");
        reader.acknowledge(first[0].position);
        let notice = &reader.next(10, usize::MAX).await.expect("there")[0];
        assert!(notice.notice);
        let text: serde_json::Value = serde_json::from_slice(&notice.message.payload).expect("JSON");
        assert_eq!((&text["reason"], &text["count"]), (&"expired".into(), &1.into()));
    });
}

/// An uplink waits for the log and for its socket at once: whatever wins, the other wait is dropped in the middle.
#[test]
fn a_read_that_is_cancelled_loses_nothing() {
    let folder = Folder::new();
    run(async {
        let (log, _threads) = open(&folder, &[stream("all", "#", 1 << 30)]);
        let state = consumer(&log, "uplink:a", "#");
        // More than memory keeps, so that reading has to wait for the disk.
        let count = 6 * RING_BYTES_MAX / (100 * 1000);
        for n in 0..count {
            let generation = append(&log, &[&state], &[message("t", format!("{n} {}", "x".repeat(100_000)))]);
            committed(&log, generation).await;
        }
        let mut reader = Consumer::new(log.clone(), Arc::clone(&state));
        let mut seen = 0;
        let mut polls = 0u32;
        while seen < count {
            let entries = {
                let mut next = std::pin::pin!(reader.next(7, usize::MAX));
                // Given up after a varying number of polls.
                let mut left = polls % 4;
                polls += 1;
                std::future::poll_fn(|cx| match next.as_mut().poll(cx) {
                    std::task::Poll::Ready(entries) => std::task::Poll::Ready(Some(entries.expect("there"))),
                    std::task::Poll::Pending if left == 0 => std::task::Poll::Ready(None),
                    std::task::Poll::Pending => {
                        left -= 1;
                        std::task::Poll::Pending
                    }
                })
                .await
            };
            for e in entries.into_iter().flatten() {
                assert!(
                    e.message.payload.starts_with(format!("{seen} ").as_bytes()),
                    "message {seen}"
                );
                reader.acknowledge(e.position);
                seen += 1;
            }
        }
        assert_eq!(state.queued(), (0, 0));
    });
}

/// Commits come at any moment of a read, also while it looks for its place in a segment that is not there yet.
#[test]
fn a_read_sees_a_commit_that_falls_into_it_whole_or_not_at_all() {
    let folder = Folder::new();
    let (log, _threads) = open(&folder, &[stream("all", "#", 1 << 30)]);
    let keeper = consumer(&log, "uplink:keeper", "#");
    let commit = {
        let (log, keeper) = (log.clone(), Arc::clone(&keeper));
        move |topics: &[&str]| {
            let messages: Vec<_> = topics.iter().map(|t| message(t, "x".into())).collect();
            let until = log.tail(0) + topics.len() as u64;
            append(&log, &[&keeper], &messages);
            while log.tail(0) < until {
                std::thread::yield_now();
            }
        }
    };
    commit(&["other"]);
    let mut seen_whole = 0;
    for nth in 1.. {
        let before = log.tail(0);
        let mut read = ReadStore::open(&log.inner.path).expect("opens");
        let (commit, mut instructions) = (commit.clone(), 0);
        read.at_each_instruction(move || {
            instructions += 1;
            if instructions == nth {
                commit(&["other", "wanted"]);
                commit(&["other"]);
            }
        });
        let found = read.next(0, before + 1, &[filter_of("wanted")]).expect("reads");
        if log.tail(0) == before {
            break;
        }
        match found {
            Found::Segment(segment) => {
                assert_eq!((segment.first, segment.last), (before + 1, before + 2), "at {nth}");
                seen_whole += 1;
            }
            Found::End => {}
            Found::Skipped(to) => panic!("what is wanted was skipped, up to {to}, at instruction {nth}"),
            Found::Damaged(header) => panic!("damaged: {header:?}"),
        }
    }
    assert!(seen_whole > 0, "no commit fell into the first half of a read");
}

#[test]
fn every_topic_has_a_stream_and_the_first_that_matches_takes_it() {
    let folder = Folder::new();
    let (log, _threads) = open(
        &folder,
        &[stream("alarms", "alarm/#", 1 << 20), stream("rest", "#", 1 << 20)],
    );
    let name = |topic: &str| log.stream(log.stream_of(topic).expect("a stream")).name.clone();
    assert_eq!((name("alarm/x"), name("data/x")), ("alarms".into(), "rest".into()));
    assert_eq!(
        name("$priv/x"),
        "rest",
        "# does not match it, but it may be routed all the same"
    );
}

#[test]
fn streams_change_while_running() {
    let folder = Folder::new();
    run(async {
        let (log, threads) = open(&folder, &[stream("rest", "#", 1 << 20)]);
        let state = consumer(&log, "uplink:a", "#");
        append(&log, &[&state], &[message("alarm/1", "one".into())]);
        let now = [stream("alarms", "alarm/#", 1 << 16), stream("rest", "#", 1 << 21)];
        log.set_streams(&mut log.batch(), &now).expect("there is a place");
        let messages = [message("alarm/2", "two".into()), message("x", "three".into())];
        let generation = append(&log, &[&state], &messages);
        let limits = |log: &Log| -> Vec<_> { log.streams().map(|s| (s.name.clone(), s.bytes_max())).collect() };
        assert_eq!(limits(&log), [("rest".into(), 1 << 21), ("alarms".into(), 1 << 16)]);
        committed(&log, generation).await;
        // It is taken out again: what is in it stays, whatever its limit was.
        log.set_streams(&mut log.batch(), &now[1..]).expect("nothing new");
        assert_eq!(limits(&log)[1], ("alarms".into(), u64::MAX));
        assert_eq!(log.stream(log.stream_of("alarm/3").expect("one")).name, "rest");
        let many: Vec<Stream> = (0..streams::SPARE)
            .map(|n| stream(&format!("s{n}"), "s/#", 1 << 20))
            .collect();
        assert!(!log.has_room_for(&many) && log.set_streams(&mut log.batch(), &many).is_err());
        assert_eq!(limits(&log).len(), 2, "nothing of what was refused");
        drop((state, log));
        drop(threads);

        let (log, _threads) = open(&folder, &now);
        let state = consumer(&log, "uplink:a", "#");
        assert_eq!(state.queued().0, 3);
        let mut reader = Consumer::new(log.clone(), state);
        let mut texts = Vec::new();
        while texts.len() < 3 {
            let entries = reader.next(10, usize::MAX).await.expect("there");
            texts.extend(entries.iter().map(|e| e.message.payload.clone()));
        }
        texts.sort();
        assert_eq!(texts, ["one", "three", "two"]);
    });
}
