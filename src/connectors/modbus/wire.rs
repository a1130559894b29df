//! One connection or serial port, and the rules that keep tokio-modbus from taking one answer for another.
//!
//! What came before a request went out is thrown away; the length of every answer and the echo of every write are looked
//! at; any fault but an exception opens the connection anew (a serial port stays open over a mute unit: its line is left
//! quiet for a while instead). On serial lines the [`Guard`] makes stale answers show themselves by their length.
//!
//! This file alone names tokio-modbus and serial2.

use std::borrow::Cow;
use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::{Context as Waking, Poll, ready};
use std::time::Duration;

use serial2_tokio::SerialPort;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_modbus::client::{Client as _, Context, rtu, tcp};
use tokio_modbus::slave::{Slave, SlaveContext as _};
use tokio_modbus::{Error as Broken, Request, Response};

use super::guard::{Choice, Guard};
use super::plan::{Limits, Span};
use crate::clock::{self, Instant};
use crate::config::{ModbusLine, ModbusWire, Parity, SerialLine, Table};
use crate::status::Counter;

/// After a timeout, a serial line is left quiet for so long (or for the timeout, if that is shorter), so that an answer
/// which is late by less is thrown away.
const QUIET_AFTER_TIMEOUT: Duration = Duration::from_millis(200);
/// The same after an answer that was not the awaited one.
const QUIET_AFTER_WRONG: Duration = Duration::from_millis(50);
/// So many timeouts in a row, and a serial port is opened anew: an adapter may have lost its mind.
const TIMEOUTS_TO_REOPEN: u32 = 3;
/// A line that says more than this while nobody asks is not one that can be worked with.
const PENDING_MAX: u64 = 64 << 10;

/// What the wire counts.
#[derive(Clone, Default)]
pub struct Counters {
    pub requests: Counter,
    pub timeouts: Counter,
    pub exceptions: Counter,
    /// Connections made after the first one.
    pub reconnects: Counter,
    /// Input that came while none was awaited, and answers of another length, unit or function.
    pub stale: Counter,
    /// Reads on a serial line that could have taken a stale answer for theirs.
    pub unguarded: Counter,
}

/// An exchange that came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error("{}", exception(*.0))]
    Exception(u8),
    #[error("{0}")]
    Connect(String),
    #[error("no answer within {}", humantime::format_duration(*.0))]
    Timeout(Duration),
    /// `sent`: the request may have reached the device.
    #[error("{why}")]
    Closed { why: String, sent: bool },
    #[error("{0}")]
    Wrong(String),
}

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    Words(Vec<u16>),
    Bits(Vec<bool>),
}

/// What is to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    Coil(u16, bool),
    Coils(u16, Vec<bool>),
    Register(u16, u16),
    Registers(u16, Vec<u16>),
    Mask {
        start: u16,
        and: u16,
        or: u16,
    },
    /// Registers, which are read again by the same request.
    ReadWrite(u16, Vec<u16>),
}

pub struct Wire {
    line: ModbusLine,
    limits: Limits,
    context: Option<Context>,
    /// Of a serial port.
    lock: Option<File>,
    tapped: Arc<Tapped>,
    guard: Guard,
    counters: Counters,
    /// The line stays silent until then.
    quiet_until: Option<Instant>,
    timeouts_in_row: u32,
    connections: u16,
    was_connected: bool,
    is_down: bool,
    /// How often the line came back after it could not be opened.
    pub revivals: u64,
}

impl Wire {
    pub fn new(line: ModbusLine, counters: Counters) -> Wire {
        Wire {
            limits: Limits::of(&line),
            context: None,
            lock: None,
            tapped: Arc::default(),
            guard: Guard::new(line.timeout),
            line,
            counters,
            quiet_until: None,
            timeouts_in_row: 0,
            connections: 0,
            was_connected: false,
            is_down: false,
            revivals: 0,
        }
    }

    /// Reads once more where that is safe to hope for: a connection that had gone unnoticed, or a wrong answer.
    pub async fn read(&mut self, unit: u8, span: &Span) -> Result<Data, Failure> {
        match self.read_guarded(unit, span).await {
            Err(Failure::Closed { .. } | Failure::Wrong(_)) => self.read_guarded(unit, span).await,
            result => result,
        }
    }

    async fn read_guarded(&mut self, unit: u8, span: &Span) -> Result<Data, Failure> {
        if !self.line.wire.is_serial() {
            return self.read_once(unit, span).await;
        }
        loop {
            let most = self.limits.max(span.table);
            match self.guard.choose(unit, span, most, self.limits.gap, clock::monotonic()) {
                Choice::Whole(wider) => match self.read_once(unit, &wider).await {
                    Err(Failure::Exception(2 | 3)) if wider != *span => self.guard.refused(unit, span, &wider),
                    Ok(data) if wider != *span => return Ok(data.part(span.start - wider.start, span.count)),
                    result => return result,
                },
                Choice::Parts(first, second) => {
                    let first = self.read_once(unit, &first).await?;
                    return Ok(first.with(self.read_once(unit, &second).await?));
                }
                Choice::Unguarded => {
                    self.counters.unguarded.add(1);
                    return self.read_once(unit, span).await;
                }
            }
        }
    }

    async fn read_once(&mut self, unit: u8, span: &Span) -> Result<Data, Failure> {
        let (start, count) = (span.start, span.count);
        let request = match span.table {
            Table::Coil => Request::ReadCoils(start, count),
            Table::Discrete => Request::ReadDiscreteInputs(start, count),
            Table::Input => Request::ReadInputRegisters(start, count),
            Table::Holding => Request::ReadHoldingRegisters(start, count),
        };
        let bytes = match span.table.is_bits() {
            true => usize::from(count.div_ceil(8)),
            false => 2 * usize::from(count),
        };
        let response = match self.exchange(unit, request, 8, 5 + bytes).await {
            Err(failure @ Failure::Timeout(_)) => {
                self.guard.timed_out(unit, span, clock::monotonic());
                return Err(failure);
            }
            result => result?,
        };
        let data = match response {
            Response::ReadCoils(bits) | Response::ReadDiscreteInputs(bits) if bits.len() == 8 * bytes => {
                Data::Bits(bits).part(0, count)
            }
            Response::ReadInputRegisters(words) | Response::ReadHoldingRegisters(words) if 2 * words.len() == bytes => {
                Data::Words(words)
            }
            _ => return Err(self.wrong(format!("an answer of another length than the {count} asked for"))),
        };
        self.guard.answered(unit, span, clock::monotonic());
        Ok(data)
    }

    /// Returns once the device has confirmed it; of a [`Write::ReadWrite`] what the registers hold now.
    pub async fn write(&mut self, unit: u8, write: &Write) -> Result<Vec<u16>, Failure> {
        match self.write_once(unit, write).await {
            // The connection had gone before anything was sent.
            Err(Failure::Closed { sent: false, .. }) => self.write_once(unit, write).await,
            result => result,
        }
    }

    async fn write_once(&mut self, unit: u8, write: &Write) -> Result<Vec<u16>, Failure> {
        let short = |n: usize| u16::try_from(n).unwrap_or(u16::MAX);
        let (request, sent, echo) = match write {
            Write::Coil(at, on) => (
                Request::WriteSingleCoil(*at, *on),
                8,
                Response::WriteSingleCoil(*at, *on),
            ),
            Write::Coils(at, bits) => (
                Request::WriteMultipleCoils(*at, Cow::Borrowed(bits)),
                9 + bits.len() / 8,
                Response::WriteMultipleCoils(*at, short(bits.len())),
            ),
            Write::Register(at, word) => (
                Request::WriteSingleRegister(*at, *word),
                8,
                Response::WriteSingleRegister(*at, *word),
            ),
            Write::Registers(at, words) => (
                Request::WriteMultipleRegisters(*at, Cow::Borrowed(words)),
                9 + 2 * words.len(),
                Response::WriteMultipleRegisters(*at, short(words.len())),
            ),
            Write::Mask { start, and, or } => (
                Request::MaskWriteRegister(*start, *and, *or),
                10,
                Response::MaskWriteRegister(*start, *and, *or),
            ),
            Write::ReadWrite(at, words) => {
                let count = short(words.len());
                let request = Request::ReadWriteMultipleRegisters(*at, count, *at, Cow::Borrowed(words));
                let characters = (13 + 2 * words.len(), 5 + 2 * words.len());
                return match self.exchange(unit, request, characters.0, characters.1).await? {
                    Response::ReadWriteMultipleRegisters(read) if read.len() == words.len() => Ok(read),
                    _ => Err(self.wrong("written, but the answer has another length".to_owned())),
                };
            }
        };
        let awaited = if matches!(write, Write::Mask { .. }) { 10 } else { 8 };
        let response = self.exchange(unit, request, sent, awaited).await?;
        if response == echo {
            return Ok(Vec::new());
        }
        Err(self.wrong("the device confirms another write than was sent".to_owned()))
    }

    /// One request and its answer. `sent` and `awaited` are their characters on a serial line.
    async fn exchange(
        &mut self,
        unit: u8,
        request: Request<'_>,
        sent: usize,
        awaited: usize,
    ) -> Result<Response, Failure> {
        let mut context = match self.context.take() {
            Some(context) => context,
            None => self.connect().await?,
        };
        self.settle().await;
        let mut timeout = self.line.timeout;
        if let ModbusWire::Rtu(serial) = &self.line.wire {
            // What the characters themselves take does not count.
            timeout += serial.character() * u32::try_from(sent + awaited).unwrap_or(512);
        }
        context.set_slave(Slave(unit));
        self.tapped.begin();
        self.counters.requests.add(1);
        let result = tokio::time::timeout(timeout, context.call(request)).await;
        if self.tapped.pending.swap(0, Ordering::Relaxed) > 0 {
            self.counters.stale.add(1);
        }
        if self.line.wire.is_serial() && !self.line.quiet.is_zero() {
            self.stay_quiet(self.line.quiet);
        }
        match result {
            Ok(Ok(result)) if !self.line.wire.is_serial() && !self.came_alone(&result, awaited) => {
                drop(context);
                Err(self.wrong("an answer of another length, or with other bytes around it".to_owned()))
            }
            Ok(Ok(result)) => {
                self.timeouts_in_row = 0;
                self.context = Some(context);
                result.map_err(|code| {
                    self.counters.exceptions.add(1);
                    Failure::Exception(code.into())
                })
            }
            Ok(Err(Broken::Protocol(error))) => {
                drop(context);
                Err(self.wrong(match error {
                    tokio_modbus::ProtocolError::HeaderMismatch { .. } => "an answer to another request".to_owned(),
                    tokio_modbus::ProtocolError::FunctionCodeMismatch { .. } => {
                        "an answer of another function".to_owned()
                    }
                }))
            }
            Ok(Err(Broken::Transport(error))) if error.kind() == io::ErrorKind::InvalidData => {
                drop(context);
                Err(self.wrong(format!("an answer that cannot be read: {}", lower(&error))))
            }
            Ok(Err(Broken::Transport(error))) => Err(Failure::Closed {
                // At the end of input tokio-modbus gives whatever error was the last of the thread.
                why: match self.tapped.ended.load(Ordering::Relaxed) {
                    true if matches!(self.line.wire, ModbusWire::Rtu(_)) => "the device is gone".to_owned(),
                    true => "the other side closed the connection".to_owned(),
                    false => lower(&error),
                },
                sent: self.tapped.sent.load(Ordering::Relaxed) > 0,
            }),
            Err(_) => {
                self.counters.timeouts.add(1);
                self.timeouts_in_row += 1;
                if self.line.wire.is_serial() {
                    self.stay_quiet(QUIET_AFTER_TIMEOUT.min(self.line.timeout));
                }
                // A request that went out whole leaves nothing behind in tokio-modbus, and a port that is closed lets its
                // lines drop, which resets some adapters.
                let is_port = matches!(self.line.wire, ModbusWire::Rtu(_));
                if is_port
                    && !self.timeouts_in_row.is_multiple_of(TIMEOUTS_TO_REOPEN)
                    && self.tapped.sent.load(Ordering::Relaxed) > 0
                {
                    self.context = Some(context);
                }
                Err(Failure::Timeout(self.line.timeout))
            }
        }
    }

    /// Whether nothing came but this answer. TCP frames have no checksum: one that breaks off and is filled up by the next
    /// one's bytes would pass, but for the rest of those.
    fn came_alone<E>(&self, result: &Result<Response, E>, awaited: usize) -> bool {
        // Seven bytes before function and data, instead of a unit and a checksum of two.
        let length = if result.is_ok() { awaited + 4 } else { 9 };
        self.tapped.came.load(Ordering::Relaxed) == length as u64
    }

    async fn connect(&mut self) -> Result<Context, Failure> {
        // Before the port is opened anew: our own lock would keep us out.
        self.lock = None;
        let opened = match &self.line.wire {
            ModbusWire::Tcp { host, port } | ModbusWire::RtuTcp { host, port } => {
                match tokio::time::timeout(self.line.timeout, TcpStream::connect((host.as_str(), *port))).await {
                    Ok(Ok(stream)) => {
                        // It only costs time where it fails.
                        let _ = stream.set_nodelay(true);
                        let is_tcp = matches!(self.line.wire, ModbusWire::Tcp { .. });
                        self.connections = self.connections.wrapping_add(1);
                        let tap = Tap {
                            io: stream,
                            tapped: Arc::clone(&self.tapped),
                            // Far from that of the last connection, and never 0.
                            salt: match is_tcp {
                                true => self.connections.wrapping_mul(0x9E37).max(1).to_be_bytes(),
                                false => [0, 0],
                            },
                        };
                        Ok(match &self.line.wire {
                            ModbusWire::Tcp { .. } => tcp::attach(tap),
                            ModbusWire::RtuTcp { .. } | ModbusWire::Rtu(_) => rtu::attach(tap),
                        })
                    }
                    Ok(Err(error)) => Err(lower(&error)),
                    Err(_) => Err(format!(
                        "no connection within {}",
                        humantime::format_duration(self.line.timeout)
                    )),
                }
            }
            ModbusWire::Rtu(serial) => match open(serial) {
                Ok((port, lock)) => {
                    self.lock = Some(lock);
                    Ok(rtu::attach(Tap {
                        io: port,
                        salt: [0, 0],
                        tapped: Arc::clone(&self.tapped),
                    }))
                }
                Err(error) => Err(lower(&error)),
            },
        };
        match opened {
            Ok(context) => {
                if self.was_connected {
                    self.counters.reconnects.add(1);
                }
                if self.is_down {
                    self.revivals += 1;
                    self.guard.forget_edges();
                }
                (self.was_connected, self.is_down) = (true, false);
                Ok(context)
            }
            Err(why) => {
                self.is_down = true;
                Err(Failure::Connect(format!("cannot open {}: {why}", self.line.wire)))
            }
        }
    }

    async fn settle(&mut self) {
        if let Some(until) = self.quiet_until.take() {
            tokio::time::sleep_until(until.into()).await;
        }
    }

    fn stay_quiet(&mut self, wait: Duration) {
        self.quiet_until = self.quiet_until.max(Some(clock::monotonic() + wait));
    }

    fn wrong(&mut self, why: String) -> Failure {
        self.counters.stale.add(1);
        self.context = None;
        if self.line.wire.is_serial() {
            self.stay_quiet(QUIET_AFTER_WRONG.min(self.line.timeout));
        }
        Failure::Wrong(why)
    }
}

impl Data {
    fn part(mut self, from: u16, count: u16) -> Data {
        let (from, to) = (usize::from(from), usize::from(from) + usize::from(count));
        match &mut self {
            Data::Words(words) => {
                words.truncate(to);
                words.drain(..from);
            }
            Data::Bits(bits) => {
                bits.truncate(to);
                bits.drain(..from);
            }
        }
        self
    }

    fn with(self, other: Data) -> Data {
        match (self, other) {
            (Data::Words(mut words), Data::Words(more)) => {
                words.extend(more);
                Data::Words(words)
            }
            (Data::Bits(mut bits), Data::Bits(more)) => {
                bits.extend(more);
                Data::Bits(bits)
            }
            (ours, _) => ours,
        }
    }
}

impl fmt::Display for Write {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Write::Coil(at, _) | Write::Coils(at, _) => write!(f, "coil:{at}"),
            Write::Register(at, _) | Write::Registers(at, _) | Write::ReadWrite(at, _) => write!(f, "holding:{at}"),
            Write::Mask { start, .. } => write!(f, "holding:{start}"),
        }
    }
}

/// `illegal data address (exception 2)`
pub fn exception(code: u8) -> String {
    let words = match code {
        1 => "illegal function",
        2 => "illegal data address",
        3 => "illegal data value",
        4 => "server device failure",
        5 => "acknowledged, but still at work",
        6 => "server device busy",
        7 => "negative acknowledge",
        8 => "memory parity error",
        10 => "gateway path unavailable",
        11 => "gateway target device failed to respond",
        _ => "unknown exception",
    };
    format!("{words} (exception {code})")
}

/// The system's words begin with a capital.
fn lower(error: &io::Error) -> String {
    let text = error.to_string();
    let mut letters = text.chars();
    match letters.next() {
        Some(first) => first.to_lowercase().chain(letters).collect(),
        None => text,
    }
}

fn open(serial: &SerialLine) -> io::Result<(SerialPort, File)> {
    let port = SerialPort::open(&serial.device, |mut settings: serial2_tokio::Settings| {
        settings.set_raw();
        settings.set_baud_rate(serial.baud)?;
        settings.set_char_size(match serial.data_bits {
            7 => serial2_tokio::CharSize::Bits7,
            _ => serial2_tokio::CharSize::Bits8,
        });
        settings.set_parity(match serial.parity {
            Parity::None => serial2_tokio::Parity::None,
            Parity::Even => serial2_tokio::Parity::Even,
            Parity::Odd => serial2_tokio::Parity::Odd,
        });
        settings.set_stop_bits(match serial.stop_bits {
            2 => serial2_tokio::StopBits::Two,
            _ => serial2_tokio::StopBits::One,
        });
        Ok(settings)
    })?;
    Ok((port, lock(&serial.device)?))
}

/// Two programs on one line take each other's answers.
fn lock(device: &Path) -> io::Result<File> {
    // The port is opened a second time for it; neither waits for a carrier nor becomes the terminal of the process.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(device)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(io::Error::other("another program has locked it")),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// What the transport and its owner, which tokio-modbus stands between, tell each other.
#[derive(Debug, Default)]
struct Tapped {
    /// The next write begins a request.
    begins: AtomicBool,
    /// Bytes of the request that went out.
    sent: AtomicU64,
    /// The other side will say no more.
    ended: AtomicBool,
    /// Bytes thrown away before the request.
    pending: AtomicU64,
    /// Bytes that came since.
    came: AtomicU64,
}

impl Tapped {
    fn begin(&self) {
        self.begins.store(true, Ordering::Relaxed);
        self.sent.store(0, Ordering::Relaxed);
        self.ended.store(false, Ordering::Relaxed);
        self.came.store(0, Ordering::Relaxed);
    }
}

/// The transport. Throws away what lies in it before a request goes out.
#[derive(Debug)]
struct Tap<T> {
    io: T,
    tapped: Arc<Tapped>,
    /// Of TCP: what the transaction ids on the wire are apart from tokio-modbus's, which begin anew at 0 with each
    /// connection. A gateway that delivers the answer to a question of the last connection on the next one would be believed.
    salt: [u8; 2],
}

impl<T: AsyncRead + Unpin> Tap<T> {
    fn drain(&mut self, waking: &mut Waking<'_>) -> io::Result<()> {
        let mut room = [0u8; 512];
        let mut thrown = 0;
        loop {
            let mut buffer = ReadBuf::new(&mut room);
            match Pin::new(&mut self.io).poll_read(waking, &mut buffer) {
                Poll::Pending => break,
                Poll::Ready(result) => result?,
            }
            let count = buffer.filled().len();
            if count == 0 {
                self.tapped.ended.store(true, Ordering::Relaxed);
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            thrown += count as u64;
            if thrown > PENDING_MAX {
                return Err(io::Error::other("the line never falls silent"));
            }
        }
        self.tapped.pending.fetch_add(thrown, Ordering::Relaxed);
        Ok(())
    }
}

/// `bytes` begin at this place of a frame, whose first two are the transaction id.
fn salted(bytes: &mut [u8], at: u64, salt: [u8; 2]) {
    let skipped = usize::try_from(at).unwrap_or(usize::MAX);
    for (byte, salt) in bytes.iter_mut().zip(salt.iter().skip(skipped)) {
        *byte ^= salt;
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Tap<T> {
    fn poll_read(mut self: Pin<&mut Self>, waking: &mut Waking<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(waking, buffer))?;
        let salt = self.salt;
        match &mut buffer.filled_mut()[before..] {
            [] => self.tapped.ended.store(true, Ordering::Relaxed),
            fresh => {
                let at = self.tapped.came.fetch_add(fresh.len() as u64, Ordering::Relaxed);
                salted(fresh, at, salt);
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Tap<T> {
    fn poll_write(mut self: Pin<&mut Self>, waking: &mut Waking<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.tapped.begins.swap(false, Ordering::Relaxed) {
            self.drain(waking)?;
        }
        let at = self.tapped.sent.load(Ordering::Relaxed);
        let count = if at < 2 && self.salt != [0, 0] {
            let mut bytes = bytes.to_vec();
            salted(&mut bytes, at, self.salt);
            ready!(Pin::new(&mut self.io).poll_write(waking, &bytes))?
        } else {
            ready!(Pin::new(&mut self.io).poll_write(waking, bytes))?
        };
        self.tapped.sent.fetch_add(count as u64, Ordering::Relaxed);
        Poll::Ready(Ok(count))
    }

    fn poll_flush(mut self: Pin<&mut Self>, waking: &mut Waking<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(waking)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, waking: &mut Waking<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(waking)
    }
}
