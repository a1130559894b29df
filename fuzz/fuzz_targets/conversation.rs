//! Conversations with a whole broker over loopback: up to three connections of two clients, bytes as they come, breaks in between;
//! log, sessions, retained messages and routing are the gateway's own. A panic anywhere ends the run; after each input a bystander
//! must have its own QoS 1 message back, and a connection that was closed by the client must be closed by the broker.
//!
//! An input is a list of steps: a byte that says what to do with which connection, and for bytes to send their number.
#![no_main]

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tidegate_fuzz::broker::Broker;
use tidegate_fuzz::config;
use tidegate_fuzz::log::Log;
use tidegate_fuzz::status::Status;

const PATIENCE: Duration = Duration::from_secs(10);
const CONNECTIONS: usize = 3;
const STEPS_MAX: usize = 24;

/// What may be sent by a step without spelling it out: what makes a session, so that the rest is reached.
const OPENINGS: [&[u8]; 8] = [
    b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x00\x00\x01a",
    b"\x10\x0d\x00\x04MQTT\x04\x00\x00\x00\x00\x01a",
    b"\x10\x0e\x00\x04MQTT\x05\x02\x00\x00\x00\x00\x01a",
    b"\x10\x13\x00\x04MQTT\x05\x00\x00\x00\x05\x11\x00\x00\x00\x3c\x00\x01a",
    b"\x10\x0d\x00\x04MQTT\x04\x00\x00\x00\x00\x01b",
    b"\x10\x16\x00\x04MQTT\x05\x00\x00\x00\x08\x11\x00\x00\x00\x3c\x21\x00\x02\x00\x01b",
    b"\x10\x15\x00\x04MQTT\x04\x04\x00\x00\x00\x01a\x00\x01w\x00\x03bye",
    b"\x82\x0a\x00\x01\x00\x01#\x01\x00\x01t\x02",
];

static BROKER: OnceLock<SocketAddr> = OnceLock::new();
static BYSTANDER: Mutex<Option<Bystander>> = Mutex::new(None);

fn start() -> SocketAddr {
    // Freed at once, and bound by the broker.
    let address = TcpListener::bind("127.0.0.1:0")
        .and_then(|l| l.local_addr())
        .expect("a port");
    let folder = std::env::var_os("TIDEGATE_FUZZ_DATA").map_or_else(std::env::temp_dir, PathBuf::from);
    let folder = folder.join(format!("tidegate-fuzz-{}", std::process::id()));
    let text = format!(
        "[gateway]\nname = \"fuzz\"\ndata_dir = {:?}\n[[listener]]\nbind = \"{address}\"\nmax_packet = \"64 KiB\"\n[[stream]]\nname = \"default\"\nfilter = [\"#\"]\nmax_bytes = \"1 MiB\"\n",
        folder.display().to_string()
    );
    let config = config::parse(&text, &folder.join("gateway.toml"), &|_| None).expect("a configuration without faults");
    let status = Status::default();
    let (log, threads, startup) = Log::open(&folder, &config.streams, &status).expect("a log");
    let (ready, listening) = tokio::sync::oneshot::channel();
    let broker = Broker::start(&config, log, startup, &status, Vec::new(), ready).expect("a broker");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        broker.handle.listen().await.expect("the broker runs");
        listening.await.expect("it listens");
    });
    // They live as long as the process.
    std::mem::forget((broker, threads, runtime, status));
    address
}

fn connection() -> TcpStream {
    let stream = TcpStream::connect(BROKER.get_or_init(start)).expect("the broker listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    stream.set_write_timeout(Some(PATIENCE)).expect("a timeout");
    stream.set_nodelay(true).expect("no delay");
    stream
}

/// Reads until the broker has closed too. It may reset: it may have refused before it read everything.
fn end(mut stream: TcpStream) {
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let mut scrap = [0; 4096];
    loop {
        match stream.read(&mut scrap) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                panic!("a connection that the client closed is open after {PATIENCE:?}")
            }
            Err(_) => return,
        }
    }
}

/// A clean client that gets its own message back, each time.
struct Bystander {
    stream: TcpStream,
    inbox: Vec<u8>,
}

impl Bystander {
    fn new() -> Bystander {
        let mut stream = connection();
        let hello = b"\x10\x0e\x00\x04MQTT\x04\x02\x00\x00\x00\x02by\x82\x0a\x00\x01\x00\x05$by/x\x01";
        stream.write_all(hello).expect("it is read");
        Bystander {
            stream,
            inbox: Vec::new(),
        }
    }

    fn turn(&mut self) {
        self.stream
            .write_all(b"\x32\x0c\x00\x05$by/x\x00\x02abc")
            .expect("it is read");
        let (mut delivered, mut acknowledged) = (false, false);
        while !(delivered && acknowledged) {
            let mut some = [0; 4096];
            let n = self.stream.read(&mut some).expect("its message comes back");
            assert!(n > 0, "the bystander was closed");
            self.inbox.extend_from_slice(&some[..n]);
            while self.inbox.len() >= 2 && self.inbox.len() >= 2 + usize::from(self.inbox[1]) {
                let frame: Vec<u8> = self.inbox.drain(..2 + usize::from(self.inbox[1])).collect();
                match frame[0] {
                    0x32 => {
                        assert_eq!((&frame[4..9], &frame[11..]), (&b"$by/x"[..], &b"abc"[..]));
                        self.stream
                            .write_all(&[0x40, 2, frame[9], frame[10]])
                            .expect("it is read");
                        delivered = true;
                    }
                    0x40 => acknowledged = true,
                    0x20 | 0x90 => {}
                    other => panic!("the bystander got {other:02x}"),
                }
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut streams: [Option<TcpStream>; CONNECTIONS] = Default::default();
    let mut rest = data;
    for _ in 0..STEPS_MAX {
        let Some((step, behind)) = rest.split_first() else {
            break;
        };
        rest = behind;
        let which = usize::from(step & 3) % CONNECTIONS;
        let stream = streams[which].get_or_insert_with(connection);
        // A write may meet a connection that was refused: that is no fault.
        match step >> 2 & 7 {
            0 | 1 => drop(stream.write_all(OPENINGS[usize::from(step >> 5)])),
            2..=5 => {
                let Some((count, behind)) = rest.split_first() else {
                    break;
                };
                let (some, behind) = behind.split_at(usize::from(*count).min(behind.len()));
                rest = behind;
                let _ = stream.write_all(some);
            }
            6 => {
                // Gone without a word.
                let stream = streams[which].take().expect("just opened");
                let _ = stream.set_linger_zero();
            }
            _ => end(streams[which].take().expect("just opened")),
        }
    }
    for stream in streams.into_iter().flatten() {
        end(stream);
    }
    let mut bystander = BYSTANDER.lock().expect("no panic is survived");
    bystander.get_or_insert_with(Bystander::new).turn();
});

trait LingerZero {
    fn set_linger_zero(self) -> std::io::Result<()>;
}

impl LingerZero for TcpStream {
    fn set_linger_zero(self) -> std::io::Result<()> {
        socket2::Socket::from(self).set_linger(Some(Duration::ZERO))
    }
}
