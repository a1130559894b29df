//! The driver on a chip in memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{mpsc, watch};

use super::line::{Bias, Edges, LineId};
use super::memory::Memory;
use super::*;
use crate::broker::handle::PublishError;
use crate::clock::Timestamp;
use crate::connectors::{Commands, Gateway, State};
use crate::log::consumer::{Effects, Entry, Position};
use crate::message::{Message, Sequence, Topic, TopicFilter};

const LONG: Duration = Duration::from_secs(30);

fn point(offset: u32, role: Role) -> GpioPoint {
    GpioPoint {
        line: LineId::Offset(offset),
        active_low: false,
        bias: None,
        role,
    }
}

fn input(edges: Option<Edges>) -> Role {
    Role::Input { edges, debounce: None }
}

fn counter(edges: Edges) -> Role {
    Role::Counter {
        edges,
        debounce: None,
        is_32_bit: false,
    }
}

fn output(safe: bool) -> Role {
    Role::Output { safe }
}

fn gpio(memory: &Memory, points: Vec<Vec<GpioPoint>>) -> Gpio {
    let memory = memory.clone();
    Gpio::on("gpio", points, move || Box::new(memory.clone()))
}

async fn read(gpio: &mut Gpio, asset: usize, points: &[usize]) -> Result<Vec<Sample>, Fault> {
    let mut samples = Vec::new();
    gpio.read(asset, points, &mut samples).await.map(|()| samples)
}

async fn event(gpio: &mut Gpio) -> Event {
    tokio::time::timeout(LONG, gpio.event())
        .await
        .expect("an event within 30 s")
}

/// Waits until it is true: the edges are taken by another task.
async fn wait(what: &str, is_it: impl Fn() -> bool) {
    let deadline = clock::monotonic() + LONG;
    while !is_it() {
        assert!(clock::monotonic() < deadline, "not within 30 s: {what}");
        tokio::task::yield_now().await;
    }
}

/// Reads the one point until it is what is waited for: the edges are taken by another task.
async fn until(gpio: &mut Gpio, asset: usize, point: usize, is_it: impl Fn(&Sample) -> bool) -> Sample {
    let deadline = clock::monotonic() + LONG;
    loop {
        let sample = read(gpio, asset, &[point]).await.expect("readable").remove(0);
        if is_it(&sample) {
            return sample;
        }
        assert!(clock::monotonic() < deadline, "still {sample:?}");
        tokio::task::yield_now().await;
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(future)
}

#[test]
fn levels_are_read_with_active_low_bias_and_names() {
    block_on(async {
        let memory = Memory::new();
        memory.change(4, true, 1);
        let named = GpioPoint {
            line: LineId::Name("GPIO5".to_owned()),
            active_low: true,
            bias: Some(Bias::PullUp),
            role: input(None),
        };
        let mut gpio = gpio(&memory, vec![vec![point(4, input(None)), named]]);
        let both = read(&mut gpio, 0, &[0, 1]).await;
        assert_eq!(
            both,
            Ok(vec![Sample::Good(Raw::Bool(true)), Sample::Good(Raw::Bool(true))])
        );
        assert_eq!((memory.bias(5), memory.bias(4)), (Some(Bias::PullUp), None));
        memory.change(5, true, 2);
        assert_eq!(read(&mut gpio, 0, &[1]).await, Ok(vec![Sample::Good(Raw::Bool(false))]));
        let refused = gpio.write(0, 0, &Raw::Bool(true)).await;
        assert!(matches!(refused, Err(Fault::Refused(_))), "{refused:?}");
    });
}

#[test]
fn edges_come_by_themselves_in_order_with_the_kernels_time() {
    block_on(async {
        let memory = Memory::new();
        let mut gpio = gpio(
            &memory,
            vec![
                vec![point(1, input(Some(Edges::Both)))],
                vec![point(2, input(Some(Edges::Falling)))],
            ],
        );
        read(&mut gpio, 0, &[0]).await.expect("opens both");
        let at = clock::kernel_ns();
        memory.change(1, true, at - 5_000_000_000);
        memory.change(1, false, at - 4_000_000_000);
        let first = event(&mut gpio).await;
        let second = event(&mut gpio).await;
        assert_eq!(
            (first.asset, first.point, &first.sample),
            (0, 0, &Sample::Good(Raw::Bool(true)))
        );
        assert_eq!(second.sample, Sample::Good(Raw::Bool(false)));
        let stamp = |event: &Event| event.at.map(Timestamp::millis).expect("a time");
        assert_eq!(stamp(&second) - stamp(&first), 1_000);
        let ago = clock::wall().millis() - stamp(&first);
        assert!((4_990..60_000).contains(&ago), "{ago} ms ago");
        // Line 2 tells of falling edges only.
        memory.change(2, true, at);
        memory.change(2, false, at);
        let third = event(&mut gpio).await;
        assert_eq!((third.asset, third.sample), (1, Sample::Good(Raw::Bool(false))));
        // A stamp of another clock is no time.
        memory.change(1, true, u64::MAX / 2);
        assert_eq!(event(&mut gpio).await.at, None);
    });
}

#[test]
fn a_counter_says_that_it_began_and_counts_what_the_kernel_dropped() {
    block_on(async {
        let memory = Memory::new();
        let mut gpio = gpio(&memory, vec![vec![point(7, counter(Edges::Rising))]]);
        match &read(&mut gpio, 0, &[0]).await.expect("readable")[..] {
            [Sample::Uncertain(Raw::Uint(0), why)] => assert!(why.contains("counted from 0"), "{why}"),
            other => panic!("{other:?}"),
        }
        let pulse = || {
            memory.change(7, true, 1);
            memory.change(7, false, 1);
        };
        (0..3).for_each(|_| pulse());
        until(&mut gpio, 0, 0, |s| *s == Sample::Good(Raw::Uint(3))).await;
        // More at once than the kernel keeps: the first ones are dropped, their number is known.
        (0..KERNEL + 500).for_each(|_| pulse());
        let total = 3 + KERNEL + 500;
        let doubtful = until(&mut gpio, 0, 0, |s| !matches!(s, Sample::Good(Raw::Uint(3)))).await;
        match doubtful {
            Sample::Uncertain(Raw::Uint(count), why) => {
                assert_eq!(count, total);
                assert!(why.starts_with("500 edges"), "{why}");
            }
            other => panic!("{other:?}"),
        }
        let next = read(&mut gpio, 0, &[0]).await;
        assert_eq!(next, Ok(vec![Sample::Good(Raw::Uint(total))]), "told once");
    });
}

const KERNEL: u64 = line::KERNEL_EDGES_MAX as u64;

#[test]
fn changes_that_find_the_queue_full_are_counted_and_told() {
    block_on(async {
        let memory = Memory::new();
        let mut gpio = gpio(&memory, vec![vec![point(3, input(Some(Edges::Both)))]]);
        read(&mut gpio, 0, &[0]).await.expect("opens it");
        let queued = |gpio: &Gpio| gpio.edges.lock().queue.len();
        // Nobody asks for events; each batch is taken before the next, so the kernel drops none.
        let mut level = false;
        let mut flip = |times: usize| {
            for _ in 0..times {
                level = !level;
                memory.change(3, level, 1);
            }
        };
        flip(1_000);
        wait("1,000 changes are queued", || queued(&gpio) >= 1_000).await;
        flip(100);
        wait("76 are dropped", || gpio.edges.lock().lines[0].dropped >= 76).await;
        assert_eq!(queued(&gpio), EVENTS_MAX);
        for n in 0..EVENTS_MAX {
            let told = event(&mut gpio).await;
            assert!(matches!(told.sample, Sample::Good(_)), "event {n}: {told:?}");
        }
        // The next value says it, be it of a poll or of an edge.
        flip(1);
        match event(&mut gpio).await.sample {
            Sample::Uncertain(Raw::Bool(_), why) => assert!(why.starts_with("76 changes"), "{why}"),
            other => panic!("{other:?}"),
        }
        let polled = read(&mut gpio, 0, &[0]).await.expect("readable");
        assert!(matches!(polled[..], [Sample::Good(_)]), "{polled:?}");
    });
}

#[test]
fn debounce_is_ours_where_the_kernel_has_none() {
    block_on(async {
        let memory = Memory::new().without_debounce();
        let debounced = Role::Counter {
            edges: Edges::Rising,
            debounce: Some(Duration::from_millis(5)),
            is_32_bit: true,
        };
        let polled = Role::Input {
            edges: None,
            debounce: Some(Duration::from_millis(5)),
        };
        let mut gpio = gpio(&memory, vec![vec![point(9, debounced), point(10, polled)]]);
        let first = read(&mut gpio, 0, &[0, 1]).await.expect("readable");
        assert!(
            matches!(&first[1], Sample::Bad(why) if why.contains("no debounce")),
            "a level that is only polled cannot be debounced here: {first:?}"
        );
        // A contact that bounces ten times in 4 ms, held, and released with bounces.
        for press in 0..3u64 {
            let at = press * 1_000_000_000;
            for bounce in 0..10 {
                memory.change(9, bounce % 2 == 0, at + bounce * 400_000);
            }
            memory.change(9, true, at + 4_000_000);
            for bounce in 0..10 {
                memory.change(9, bounce % 2 == 1, at + 500_000_000 + bounce * 400_000);
            }
            memory.change(9, false, at + 504_000_000);
        }
        until(&mut gpio, 0, 0, |s| *s == Sample::Good(Raw::Uint(3))).await;
        // The kernel's debounce is asked for where it has one.
        let memory = Memory::new();
        let mut gpio = Gpio::on("gpio", vec![vec![point(9, debounced)]], {
            let memory = memory.clone();
            move || Box::new(memory.clone())
        });
        read(&mut gpio, 0, &[0]).await.expect("readable");
        memory.change(9, true, 1);
        until(&mut gpio, 0, 0, |s| *s == Sample::Good(Raw::Uint(1))).await;
    });
}

#[test]
fn outputs_are_safe_from_the_first_moment_and_again_when_asked() {
    block_on(async {
        let memory = Memory::new();
        let valve = GpioPoint {
            active_low: true,
            ..point(20, output(false))
        };
        let mut gpio = gpio(
            &memory,
            vec![vec![point(1, input(None))], vec![point(21, output(true)), valve]],
        );
        // Another asset is read first.
        read(&mut gpio, 0, &[0]).await.expect("opens all");
        assert_eq!(memory.driven(), [(21, true), (20, true)], "never at another level");
        gpio.write(1, 0, &Raw::Bool(false)).await.expect("writable");
        gpio.write(1, 1, &Raw::Bool(true)).await.expect("writable");
        let both = read(&mut gpio, 1, &[0, 1]).await;
        assert_eq!(
            both,
            Ok(vec![Sample::Good(Raw::Bool(false)), Sample::Good(Raw::Bool(true))])
        );
        assert_eq!((memory.level(21), memory.level(20)), (false, false));
        gpio.safe().await.expect("reachable");
        assert_eq!((memory.level(21), memory.level(20)), (true, true));
        assert_eq!(memory.driven().len(), 6);
        drop(gpio);
    });
}

#[test]
fn a_line_in_use_is_the_fault_of_its_point_alone() {
    block_on(async {
        let memory = Memory::new();
        memory.set_busy(2, true);
        let mut gpio = gpio(
            &memory,
            vec![vec![
                point(1, input(None)),
                point(2, output(false)),
                point(99, input(None)),
            ]],
        );
        let samples = read(&mut gpio, 0, &[0, 1, 2]).await.expect("the chip is there");
        match &samples[..] {
            [Sample::Good(_), Sample::Bad(busy), Sample::Bad(none)] => {
                assert!(busy.contains("line 2 is in use") && none.contains("no line 99"));
            }
            other => panic!("{other:?}"),
        }
        let refused = gpio.write(0, 1, &Raw::Bool(true)).await;
        assert!(
            matches!(&refused, Err(Fault::Device(why)) if why.contains("in use")),
            "{refused:?}"
        );
        assert!(gpio.safe().await.is_err(), "an output that cannot be made safe is said");
    });
}

#[test]
fn a_chip_that_goes_and_comes_back_is_found_again_and_its_counters_say_so() {
    block_on(async {
        let memory = Memory::new();
        memory.set_absent(true);
        let points = vec![vec![point(1, counter(Edges::Both)), point(2, output(true))]];
        let mut gpio = gpio(&memory, points);
        for _ in 0..2 {
            let refused = read(&mut gpio, 0, &[0]).await;
            assert_eq!(refused, Err(Fault::Line("no chip in memory".to_owned())));
        }
        memory.set_absent(false);
        read(&mut gpio, 0, &[0]).await.expect("it is there now");
        memory.change(1, true, 1);
        memory.change(1, false, 1);
        until(&mut gpio, 0, 0, |s| *s == Sample::Good(Raw::Uint(2))).await;
        gpio.write(0, 1, &Raw::Bool(false)).await.expect("writable");

        memory.set_absent(true);
        assert!(matches!(read(&mut gpio, 0, &[0, 1]).await, Err(Fault::Line(_))));
        assert!(!memory.is_owned(1) && !memory.is_owned(2), "nothing holds the lines");
        memory.set_absent(false);
        let back = read(&mut gpio, 0, &[0, 1]).await.expect("it is back");
        match &back[..] {
            [Sample::Uncertain(Raw::Uint(2), why), Sample::Good(Raw::Bool(true))] => {
                assert!(why.contains("the line was away"), "{why}");
            }
            other => panic!("the count goes on, the output is safe: {other:?}"),
        }
        memory.change(1, true, 1);
        until(&mut gpio, 0, 0, |s| *s == Sample::Good(Raw::Uint(3))).await;
        // Dropped, it frees its lines.
        drop(gpio);
        wait("the lines are free", || !memory.is_owned(1) && !memory.is_owned(2)).await;
    });
}

#[test]
fn a_line_whose_edges_cannot_be_read_is_opened_anew() {
    block_on(async {
        let memory = Memory::new();
        let mut gpio = gpio(
            &memory,
            vec![vec![point(1, counter(Edges::Rising)), point(2, output(false))]],
        );
        read(&mut gpio, 0, &[0]).await.expect("opens it");
        gpio.write(0, 1, &Raw::Bool(true)).await.expect("writable");
        memory.set_deaf(1, true);
        wait("it is noticed", || gpio.edges.lock().is_broken).await;
        memory.set_deaf(1, false);
        let away = |s: &Sample| matches!(s, Sample::Uncertain(Raw::Uint(0), why) if why.contains("was away"));
        until(&mut gpio, 0, 0, away).await;
        memory.change(1, true, 1);
        until(&mut gpio, 0, 0, |s| *s == Sample::Good(Raw::Uint(1))).await;
        assert!(memory.level(2), "an output is not touched for it");
    });
}

/// The gateway around the engine: what is published, commands, and whether the uplink is connected.
#[derive(Clone)]
struct Played {
    published: mpsc::UnboundedSender<Message>,
    commands: Arc<Mutex<Option<mpsc::UnboundedReceiver<Entry>>>>,
    is_connected: Arc<AtomicBool>,
}

struct PlayedCommands {
    entries: mpsc::UnboundedReceiver<Entry>,
    published: mpsc::UnboundedSender<Message>,
}

impl Gateway for Played {
    type Commands = PlayedCommands;

    async fn publish(&self, messages: Vec<Message>) -> Result<(), PublishError> {
        for message in messages {
            self.published.send(message).map_err(|_| PublishError::Stopped)?;
        }
        Ok(())
    }

    async fn commands(&self, _: &str, _: Vec<TopicFilter>) -> Result<(PlayedCommands, State), PublishError> {
        let entries = self.commands.lock().expect("sound").take().expect("opened once");
        let published = self.published.clone();
        Ok((PlayedCommands { entries, published }, Vec::new()))
    }

    fn is_connected(&self, _: &str) -> bool {
        self.is_connected.load(Ordering::Relaxed)
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
        for message in effects.publish {
            let _ = self.published.send(message);
        }
        Ok(())
    }
}

/// The first message on the topic whose payload has all these parts.
async fn told(published: &mut mpsc::UnboundedReceiver<Message>, topic: &str, parts: &[&str]) -> String {
    loop {
        let message = tokio::time::timeout(LONG, published.recv()).await;
        let message = message.expect("within 30 s").expect("the engine lives");
        let payload = String::from_utf8_lossy(&message.payload).into_owned();
        if message.topic.as_str() == topic && parts.iter().all(|part| payload.contains(part)) {
            return payload;
        }
    }
}

/// From gateway.toml through the engine: safe at the start, commands, edges, safe without the uplink and at the stop.
#[test]
fn a_connector_at_work() {
    let text = "[gateway]\nname = 'g'\n[[uplink]]\nname = 'cloud'\nkind = 'file'\npath = 'a.jsonl'\n\
                [[connector]]\nname = 'pins'\nkind = 'gpio'\nchip = 'memory'\nsafe_uplink = 'cloud'\nsafe_after = '1 s'\n\
                [[asset]]\nname = 'door'\nconnector = 'pins'\nevery = '20 ms'\nmax_silence = '1 day'\nreport = 'change'\n\
                points = [{ name = 'open', address = 'GPIO4', edge = 'both' },\n\
                { name = 'lock', address = '5', direction = 'out', safe = true },\n\
                { name = 'lamp', address = '6', direction = 'out' }]\n";
    let config = crate::config::parse(text, std::path::Path::new("gateway.toml"), &|_| None).expect("valid");
    let setup = Setup::all(&config).remove(0);
    block_on(async {
        let memory = Memory::new();
        memory.change(6, true, 1);
        let points = setup.addresses(|address| match address {
            Address::Gpio(point) => Some(point.clone()),
            _ => None,
        });
        let driver = gpio(&memory, points);
        let (published_in, mut published) = mpsc::unbounded_channel();
        let (commands, commands_out) = mpsc::unbounded_channel();
        let (shutdown, shutdown_out) = watch::channel(false);
        let gateway = Played {
            published: published_in,
            commands: Arc::new(Mutex::new(Some(commands_out))),
            is_connected: Arc::new(AtomicBool::new(true)),
        };
        let connected = Arc::clone(&gateway.is_connected);
        let part = crate::status::Status::default().part("connector", "pins");
        let task = tokio::spawn(crate::connectors::engine::run(
            setup,
            driver,
            gateway,
            part,
            shutdown_out,
        ));

        told(
            &mut published,
            "data/door",
            &[r#""lock":{"value":true"#, r#""lamp":{"value":false"#],
        )
        .await;
        assert_eq!(memory.driven(), [(5, true), (6, false)]);
        told(&mut published, "status/connector/pins", &[r#""health":"good""#]).await;

        let command = |payload: &str, sequence| {
            let topic = Topic::new("commands/door".to_owned()).expect("valid");
            let mut message = Message::new(topic, payload.to_owned(), "client:a".into(), clock::wall());
            message.sequence = Sequence(sequence);
            let position = Position {
                stream: 0,
                sequence: Sequence(sequence),
            };
            Entry {
                position,
                message,
                notice: false,
            }
        };
        let write = r#"{"id":"1","write":{"lock":false,"lamp":true}}"#;
        commands.send(command(write, 1)).expect("the engine lives");
        told(&mut published, "answers/door", &["done"]).await;
        assert_eq!((memory.level(5), memory.level(6)), (false, true));
        commands
            .send(command(r#"{"id":"2","write":{"open":true}}"#, 2))
            .expect("the engine lives");
        told(&mut published, "answers/door", &["refused"]).await;

        let pulse = clock::kernel_ns();
        memory.change(4, true, pulse);
        memory.change(4, false, pulse);
        // A pulse that no poll would see.
        told(&mut published, "data/door", &[r#""open":{"value":true"#]).await;
        told(&mut published, "data/door", &[r#""open":{"value":false"#]).await;

        connected.store(false, Ordering::Relaxed);
        told(&mut published, "data/door", &[r#""lock":{"value":true"#]).await;
        assert_eq!((memory.level(5), memory.level(6)), (true, false));
        connected.store(true, Ordering::Relaxed);
        let write = r#"{"id":"3","write":{"lock":false,"lamp":true}}"#;
        commands.send(command(write, 3)).expect("the engine lives");
        told(&mut published, "answers/door", &["done"]).await;
        assert_eq!((memory.level(5), memory.level(6)), (false, true));

        shutdown.send(true).expect("the engine lives");
        task.await.expect("it ends without a panic");
        assert_eq!((memory.level(5), memory.level(6)), (true, false));
        wait("the lines are free", || !memory.is_owned(4) && !memory.is_owned(5)).await;
    });
}

/// The driver that holds its lines dies without a stop: they are left safe.
#[test]
fn a_driver_that_is_dropped_leaves_its_outputs_safe() {
    block_on(async {
        let memory = Memory::new();
        let mut gpio = gpio(&memory, vec![vec![point(1, output(false))]]);
        gpio.write(0, 0, &Raw::Bool(true)).await.expect("writable");
        assert!(memory.level(1));
        drop(gpio);
        wait("the line is free", || !memory.is_owned(1)).await;
        assert!(!memory.level(1));
    });
}

#[test]
fn two_points_of_one_line_are_said_as_what_they_are() {
    block_on(async {
        let memory = Memory::new();
        let mut gpio = gpio(
            &memory,
            vec![vec![point(1, input(None))], vec![point(1, counter(Edges::Both))]],
        );
        let second = read(&mut gpio, 1, &[0]).await.expect("the chip is there");
        assert!(
            matches!(&second[..], [Sample::Bad(why)] if why.contains("another point's")),
            "{second:?}"
        );
        assert_eq!(read(&mut gpio, 0, &[0]).await, Ok(vec![Sample::Good(Raw::Bool(false))]));
    });
}
