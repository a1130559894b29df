//! Kind "i2c": sensors and registers of devices on an I²C bus.
//!
//! The bus lives on a [`BusThread`], since a transfer blocks, and may do so for long where a device holds the clock. The
//! kernel is told to give a transfer up after half of the connector's `timeout`; where it does not (some adapters ignore
//! that), the call is given up after the whole of it, and nothing more is sent until the transfer has come back.

use std::io;
use std::time::Duration;

use embedded_hal::delay::DelayNs;
use embedded_hal::i2c::{self, ErrorKind, ErrorType, NoAcknowledgeSource, Operation};

use super::Setup;
use super::bus::{BusThread, Hung};
use super::driver::{Driver, Fault, Raw, Sample};
use super::sensors::{Measured, Sensor, SensorError};
use crate::config::buses::{I2cBus, I2cDevice, I2cPoint};
use crate::config::{self, Address, Asset, DataType, Point};

/// An SMBus block.
const BLOCK_MAX: usize = 32;

/// The driver of one bus, over the kernel's or (in tests) another `W`.
pub struct I2c<W: Wire = KernelWire> {
    thread: BusThread<Bus<W>>,
    devices: Vec<Device>,
    timeout: Duration,
}

/// An asset.
#[derive(Debug, Clone)]
struct Device {
    device: I2cDevice,
    points: Vec<(I2cPoint, DataType)>,
}

/// The way to a bus.
pub trait Wire: Send + 'static {
    type Bus: i2c::I2c<Error: BusError>;
    /// Opens the bus; an error is the line's.
    fn open(&mut self) -> Result<Self::Bus, Fault>;
}

/// What an error of the bus means for the device at this address.
pub trait BusError {
    fn fault(&self, address: u8) -> Fault;
}

/// On the thread.
struct Bus<W: Wire> {
    wire: W,
    bus: Option<W::Bus>,
    sensors: Vec<Option<Sensor>>,
}

impl I2c {
    pub fn new(setup: &Setup, settings: &I2cBus) -> I2c {
        let (bus, timeout) = (settings.bus, settings.timeout);
        let devices = setup.assets.iter().filter_map(Device::of).collect();
        I2c::on(&setup.connector.name, timeout, devices, move || KernelWire {
            bus,
            timeout,
        })
    }
}

impl Device {
    fn of(asset: &Asset) -> Option<Device> {
        let config::Device::I2c(device) = asset.device else {
            return None;
        };
        let place = |point: &Point| match point.address {
            Address::I2c(place) => Some((place, point.data)),
            _ => None,
        };
        Some(Device {
            device,
            points: asset.points.iter().filter_map(place).collect(),
        })
    }
}

impl<W: Wire> I2c<W> {
    fn on(connector: &str, timeout: Duration, devices: Vec<Device>, wire: impl Fn() -> W + Send + 'static) -> Self
    where
        Bus<W>: Send,
    {
        let known: Vec<I2cDevice> = devices.iter().map(|d| d.device).collect();
        let thread = BusThread::new(connector, move || Bus {
            wire: wire(),
            bus: None,
            sensors: known
                .iter()
                .map(|d| d.model.map(|model| Sensor::new(model, d.address)))
                .collect(),
        });
        I2c {
            thread,
            devices,
            timeout,
        }
    }
}

impl<W: Wire> Driver for I2c<W>
where
    Bus<W>: Send,
{
    async fn read(&mut self, asset: usize, points: &[usize], samples: &mut Vec<Sample>) -> Result<(), Fault> {
        let Device { device, points: all } = &self.devices[asset];
        let address = device.address;
        let wanted: Vec<(I2cPoint, DataType)> = points.iter().map(|p| all[*p]).collect();
        let measuring = device.model.map_or(Duration::ZERO, |model| {
            Sensor::new(model, address).longest(wanted.len())
        });
        let read = self.thread.call(self.timeout + measuring, move |bus| {
            bus.using(|bus, sensors| match &mut sensors[asset] {
                Some(sensor) => measure(bus, sensor, address, &wanted),
                None => registers(bus, address, &wanted),
            })
        });
        match read.await {
            Ok(read) => samples.extend(read?),
            Err(hung @ Hung::Now(_)) => {
                let why = format!("{hung} with the device at {address:#04x}: does it hold the clock?");
                return Err(Fault::Device(why));
            }
            Err(hung) => return Err(Fault::Line(hung.to_string())),
        }
        Ok(())
    }

    async fn write(&mut self, asset: usize, point: usize, value: &Raw) -> Result<(), Fault> {
        let Device { device, points } = &self.devices[asset];
        let (
            I2cPoint::Register {
                register,
                is_little_endian,
            },
            data,
        ) = points[point]
        else {
            return Err(Fault::Refused("a sensor's quantity cannot be written".to_owned()));
        };
        let address = device.address;
        let Some(mut bytes) = encode(value, data, is_little_endian) else {
            return Err(Fault::Refused(format!("the value is no {}", data.name())));
        };
        bytes.insert(0, register);
        let written = self.thread.call(self.timeout, move |bus| {
            bus.using(|bus, _| i2c::I2c::write(bus, address, &bytes).map_err(|e| e.fault(address)))
        });
        match written.await {
            Ok(written) => written,
            Err(hung @ Hung::Now(_)) => Err(Fault::Unknown(format!("{hung} with the device at {address:#04x}"))),
            Err(hung) => Err(Fault::Line(hung.to_string())),
        }
    }
}

impl<W: Wire> Bus<W> {
    /// Works on the bus, opened if it is not; after a fault of the line it is opened anew the next time.
    fn using<R>(
        &mut self,
        work: impl FnOnce(&mut W::Bus, &mut [Option<Sensor>]) -> Result<R, Fault>,
    ) -> Result<R, Fault> {
        let bus = match self.bus.take() {
            Some(bus) => bus,
            None => self.wire.open()?,
        };
        let result = work(self.bus.insert(bus), &mut self.sensors);
        if let Err(Fault::Line(_)) = result {
            self.bus = None;
        }
        result
    }
}

fn measure<B: i2c::I2c<Error: BusError>>(
    bus: &mut B,
    sensor: &mut Sensor,
    address: u8,
    wanted: &[(I2cPoint, DataType)],
) -> Result<Vec<Sample>, Fault> {
    let quantities: Vec<_> = wanted
        .iter()
        .filter_map(|(point, _)| match point {
            I2cPoint::Quantity(quantity) => Some(*quantity),
            I2cPoint::Register { .. } => None,
        })
        .collect();
    let measured = sensor.read(bus, &mut Sleep, &quantities);
    let mut measured = match measured {
        Ok(measured) => measured.into_iter(),
        Err(SensorError::Bus(error)) => return Err(error.fault(address)),
        Err(SensorError::Chip(why)) => return Err(Fault::Device(format!("the device at {address:#04x}: {why}"))),
    };
    let sample = |(point, _): &(I2cPoint, DataType)| match point {
        I2cPoint::Quantity(_) => measured.next().map_or(no_sample(), sample_of),
        I2cPoint::Register { .. } => no_sample(),
    };
    Ok(wanted.iter().map(sample).collect())
}

fn sample_of(measured: Measured) -> Sample {
    match measured {
        Measured::Good(value) => Sample::Good(Raw::Float(value)),
        Measured::Doubtful(value, why) => Sample::Uncertain(Raw::Float(value), why),
        Measured::Bad(why) => Sample::Bad(why),
    }
}

/// The configuration gives a sensor quantities and nothing else.
fn no_sample() -> Sample {
    Sample::Bad("the sensor does not give this".to_owned())
}

/// Each register by itself; where none of them can be read the device is at fault.
fn registers<B: i2c::I2c<Error: BusError>>(
    bus: &mut B,
    address: u8,
    wanted: &[(I2cPoint, DataType)],
) -> Result<Vec<Sample>, Fault> {
    let mut samples = Vec::with_capacity(wanted.len());
    let mut fault = None;
    for (point, data) in wanted {
        let I2cPoint::Register {
            register,
            is_little_endian,
        } = *point
        else {
            samples.push(no_sample());
            continue;
        };
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..width(*data)];
        match bus.write_read(address, &[register], bytes) {
            Ok(()) => samples.push(Sample::Good(decode(bytes, *data, is_little_endian))),
            Err(error) => match error.fault(address) {
                Fault::Device(why) | Fault::Refused(why) | Fault::Unknown(why) => {
                    fault.get_or_insert(Fault::Device(why.clone()));
                    samples.push(Sample::Bad(why));
                }
                line @ Fault::Line(_) => return Err(line),
            },
        }
    }
    let is_bad = |sample: &Sample| matches!(sample, Sample::Bad(_));
    match fault {
        Some(fault) if samples.iter().all(is_bad) => Err(fault),
        Some(_) | None => Ok(samples),
    }
}

/// Bytes of a register of this type.
fn width(data: DataType) -> usize {
    match data {
        DataType::Bool | DataType::Int8 | DataType::Uint8 => 1,
        DataType::Int16 | DataType::Uint16 => 2,
        DataType::Int32 | DataType::Uint32 | DataType::Float32 => 4,
        DataType::Int64 | DataType::Uint64 | DataType::Float64 => 8,
        // Not to be had for registers.
        DataType::Text { .. } => 1,
    }
}

fn decode(bytes: &[u8], data: DataType, is_little_endian: bool) -> Raw {
    let next = |n: u64, byte: &u8| n << 8 | u64::from(*byte);
    let bits = match is_little_endian {
        true => bytes.iter().rev().fold(0, next),
        false => bytes.iter().fold(0, next),
    };
    let unused = 64 - 8 * bytes.len() as u32;
    let signed = (bits << unused) as i64 >> unused;
    match data {
        DataType::Bool => Raw::Bool(bits != 0),
        DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64 => Raw::Int(signed),
        DataType::Float32 => Raw::Float(f32::from_bits(bits as u32).into()),
        DataType::Float64 => Raw::Float(f64::from_bits(bits)),
        DataType::Uint8 | DataType::Uint16 | DataType::Uint32 | DataType::Uint64 | DataType::Text { .. } => {
            Raw::Uint(bits)
        }
    }
}

/// None where the value does not fit the type.
fn encode(value: &Raw, data: DataType, is_little_endian: bool) -> Option<Vec<u8>> {
    if !value.fits(data) {
        return None;
    }
    let bits = match (value, data) {
        (Raw::Bool(flag), _) => u64::from(*flag),
        (Raw::Int(n), _) => *n as u64,
        (Raw::Uint(n), _) => *n,
        (Raw::Float(n), DataType::Float32) => u64::from((*n as f32).to_bits()),
        (Raw::Float(n), _) => n.to_bits(),
        (Raw::Text(_), _) => return None,
    };
    let mut bytes = bits.to_be_bytes()[8 - width(data)..].to_vec();
    if is_little_endian {
        bytes.reverse();
    }
    Some(bytes)
}

/// The sensors' waits, on the bus's thread.
struct Sleep;

impl DelayNs for Sleep {
    fn delay_ns(&mut self, ns: u32) {
        std::thread::sleep(Duration::from_nanos(ns.into()));
    }
}

/// /dev/i2c-N, by rppal.
pub struct KernelWire {
    bus: u8,
    timeout: Duration,
}

pub struct KernelBus {
    bus: u8,
    i2c: rppal::i2c::I2c,
}

/// An error of the kernel on this bus.
#[derive(Debug)]
pub struct KernelError {
    bus: u8,
    error: rppal::i2c::Error,
}

impl Wire for KernelWire {
    type Bus = KernelBus;

    fn open(&mut self) -> Result<KernelBus, Fault> {
        let bus = self.bus;
        let failed = |error: rppal::i2c::Error| {
            let mut why = cannot_open(bus, &error);
            if errno(&error) == Some(libc::ENOENT) {
                why.push_str(", let the service see it (its drop-in i2c-spi.conf), or take this [[connector]] out");
            }
            Fault::Line(why)
        };
        let i2c = rppal::i2c::I2c::with_bus(bus).map_err(failed)?;
        let millis = u32::try_from(self.timeout.as_millis() / 2).unwrap_or(u32::MAX);
        i2c.set_timeout(millis.max(10)).map_err(failed)?;
        Ok(KernelBus { bus, i2c })
    }
}

/// Why /dev/i2c-N cannot be opened, and what to do.
pub fn cannot_open(bus: u8, error: &rppal::i2c::Error) -> String {
    let kind = match error {
        rppal::i2c::Error::Io(error) => error.kind(),
        _ => io::ErrorKind::Other,
    };
    match kind {
        io::ErrorKind::NotFound => format!(
            "no /dev/i2c-{bus} on this host: enable the bus (on a Raspberry Pi dtparam=i2c_arm=on in config.txt, and \
             the module i2c-dev; `tidegate discover i2c` lists the buses)"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "no permission for /dev/i2c-{bus}: put the user that tidegate runs as into the group i2c (or the one that \
             `ls -l /dev/i2c-{bus}` shows)"
        ),
        _ => format!("/dev/i2c-{bus} cannot be opened: {error}"),
    }
}

impl BusError for KernelError {
    fn fault(&self, address: u8) -> Fault {
        let path = format!("/dev/i2c-{}", self.bus);
        let at = format!("{address:#04x} on {path}");
        let errno = errno(&self.error);
        // ENODEV is the adapter's end; there are adapters that say it where nobody answers.
        if errno == Some(libc::ENODEV) && !std::path::Path::new(&path).exists() {
            return Fault::Line(format!("{path} is gone: {}", self.error));
        }
        Fault::Device(match errno {
            Some(libc::ENXIO | libc::EREMOTEIO | libc::ENODEV) => {
                format!("nobody answers at {at}: is it wired, powered, and the address right?")
            }
            Some(libc::ETIMEDOUT) => {
                format!("timeout at {at}: the device holds the clock, or the wires have no pull-ups")
            }
            Some(libc::EBUSY) => format!("{at} is in use by a driver of the kernel"),
            Some(libc::EOPNOTSUPP | libc::EINVAL) => {
                format!("this bus (SMBus only?) cannot do the transfer that {at} needs")
            }
            _ => format!("{at}: {}", self.error),
        })
    }
}

impl i2c::Error for KernelError {
    fn kind(&self) -> ErrorKind {
        match errno(&self.error) {
            Some(libc::ENXIO | libc::EREMOTEIO | libc::ENODEV) => {
                ErrorKind::NoAcknowledge(NoAcknowledgeSource::Unknown)
            }
            Some(libc::EAGAIN) => ErrorKind::ArbitrationLoss,
            Some(libc::EIO | libc::ETIMEDOUT) => ErrorKind::Bus,
            _ => ErrorKind::Other,
        }
    }
}

fn errno(error: &rppal::i2c::Error) -> Option<i32> {
    match error {
        rppal::i2c::Error::Io(error) => error.raw_os_error(),
        rppal::i2c::Error::FeatureNotSupported => Some(libc::EOPNOTSUPP),
        rppal::i2c::Error::InvalidSlaveAddress(_) | rppal::i2c::Error::UnknownModel => None,
    }
}

impl ErrorType for KernelBus {
    type Error = KernelError;
}

impl i2c::I2c for KernelBus {
    fn transaction(&mut self, address: u8, operations: &mut [Operation<'_>]) -> Result<(), KernelError> {
        let done = self
            .i2c
            .set_slave_address(address.into())
            .and_then(|()| match operations {
                [Operation::Write(command), Operation::Read(data)] => self.write_read(command, data),
                // What the drivers use; each of several would be a transfer of its own here, which is not what is asked for.
                [Operation::Write(data)] => self.write(data),
                [Operation::Read(data)] => self.read(data),
                _ => Err(rppal::i2c::Error::FeatureNotSupported),
            });
        done.map_err(|error| KernelError { bus: self.bus, error })
    }
}

/// Plain I²C where the adapter does it, else (the SMBus of a PC) the same bytes as SMBus transfers.
impl KernelBus {
    fn write_read(&mut self, command: &[u8], data: &mut [u8]) -> rppal::i2c::Result<()> {
        match self.i2c.write_read(command, data) {
            Err(error) if is_unsupported(&error) => {}
            other => return other,
        }
        match (command, data) {
            ([register], [byte]) => *byte = self.i2c.smbus_read_byte(*register)?,
            ([register], [first, second]) => {
                [*first, *second] = self.i2c.smbus_read_word(*register)?.to_le_bytes();
            }
            ([register], data) if data.len() <= BLOCK_MAX && self.i2c.capabilities().i2c_block_read() => {
                self.i2c.block_read(*register, data)?;
            }
            _ => return Err(rppal::i2c::Error::FeatureNotSupported),
        }
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> rppal::i2c::Result<()> {
        match self.i2c.write(data) {
            Ok(n) if n == data.len() => return Ok(()),
            Ok(_) => return Err(rppal::i2c::Error::Io(io::ErrorKind::WriteZero.into())),
            Err(error) if is_unsupported(&error) => {}
            Err(error) => return Err(error),
        }
        match data {
            [byte] => self.i2c.smbus_send_byte(*byte),
            [register, byte] => self.i2c.smbus_write_byte(*register, *byte),
            [register, first, second] => self
                .i2c
                .smbus_write_word(*register, u16::from_le_bytes([*first, *second])),
            [register, data @ ..] if data.len() <= BLOCK_MAX && self.i2c.capabilities().i2c_block_write() => {
                self.i2c.block_write(*register, data)
            }
            _ => Err(rppal::i2c::Error::FeatureNotSupported),
        }
    }

    fn read(&mut self, data: &mut [u8]) -> rppal::i2c::Result<()> {
        match (self.i2c.read(data), data) {
            (Ok(n), data) if n == data.len() => Ok(()),
            (Ok(_), _) => Err(rppal::i2c::Error::Io(io::ErrorKind::UnexpectedEof.into())),
            (Err(error), [byte]) if is_unsupported(&error) => {
                *byte = self.i2c.smbus_receive_byte()?;
                Ok(())
            }
            (Err(error), _) => Err(error),
        }
    }
}

fn is_unsupported(error: &rppal::i2c::Error) -> bool {
    matches!(errno(error), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOTTY))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::config::buses::{Model, Quantity};

    /// A bus in memory: devices are maps of registers.
    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<State>>);

    #[derive(Default)]
    struct State {
        is_absent: bool,
        opened: usize,
        devices: BTreeMap<u8, BTreeMap<u8, u8>>,
        /// The device at this address holds the clock until the test lets go.
        holds: Option<(u8, Receiver<()>)>,
    }

    #[derive(Debug)]
    enum Trouble {
        Nobody,
        Gone,
    }

    impl BusError for Trouble {
        fn fault(&self, address: u8) -> Fault {
            match self {
                Trouble::Nobody => Fault::Device(format!("nobody at {address:#04x}")),
                Trouble::Gone => Fault::Line("gone".to_owned()),
            }
        }
    }

    impl i2c::Error for Trouble {
        fn kind(&self) -> ErrorKind {
            ErrorKind::Other
        }
    }

    impl ErrorType for Memory {
        type Error = Trouble;
    }

    impl Wire for Memory {
        type Bus = Memory;

        fn open(&mut self) -> Result<Memory, Fault> {
            let mut state = self.0.lock().expect("no panic");
            state.opened += 1;
            match state.is_absent {
                true => Err(Fault::Line("no bus".to_owned())),
                false => Ok(self.clone()),
            }
        }
    }

    impl i2c::I2c for Memory {
        fn transaction(&mut self, address: u8, operations: &mut [Operation<'_>]) -> Result<(), Trouble> {
            let held = {
                let mut state = self.0.lock().expect("no panic");
                state.holds.take_if(|(held, _)| *held == address)
            };
            if let Some((_, released)) = held {
                let _ = released.recv();
            }
            let mut state = self.0.lock().expect("no panic");
            if state.is_absent {
                return Err(Trouble::Gone);
            }
            let device = state.devices.get_mut(&address).ok_or(Trouble::Nobody)?;
            match operations {
                [Operation::Write([register]), Operation::Read(data)] => {
                    for (offset, byte) in (0..).zip(data.iter_mut()) {
                        *byte = *device.get(&(*register + offset)).ok_or(Trouble::Nobody)?;
                    }
                }
                [Operation::Write([register, data @ ..])] => {
                    for (offset, byte) in (0..).zip(data.iter()) {
                        device.insert(*register + offset, *byte);
                    }
                }
                other => panic!("{} operations", other.len()),
            }
            Ok(())
        }
    }

    const LONG: Duration = Duration::from_secs(30);

    fn registers(address: u8, points: &[(u8, DataType, bool)]) -> Device {
        Device {
            device: I2cDevice { address, model: None },
            points: points
                .iter()
                .map(|(register, data, is_little_endian)| {
                    let point = I2cPoint::Register {
                        register: *register,
                        is_little_endian: *is_little_endian,
                    };
                    (point, *data)
                })
                .collect(),
        }
    }

    fn driver(memory: &Memory, timeout: Duration, devices: Vec<Device>) -> I2c<Memory> {
        let memory = memory.clone();
        I2c::on("i2c", timeout, devices, move || memory.clone())
    }

    fn device(memory: &Memory, address: u8, registers: &[(u8, u8)]) {
        let registers = registers.iter().copied().collect();
        memory.0.lock().expect("no panic").devices.insert(address, registers);
    }

    async fn read(driver: &mut I2c<Memory>, asset: usize, points: &[usize]) -> Result<Vec<Sample>, Fault> {
        let mut samples = Vec::new();
        driver.read(asset, points, &mut samples).await.map(|()| samples)
    }

    fn block_on<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime")
            .block_on(future)
    }

    #[test]
    fn every_type_is_written_and_read_in_both_byte_orders() {
        let cases = [
            (DataType::Bool, Raw::Bool(true)),
            (DataType::Int8, Raw::Int(-2)),
            (DataType::Uint8, Raw::Uint(254)),
            (DataType::Int16, Raw::Int(-2_000)),
            (DataType::Uint16, Raw::Uint(0x1234)),
            (DataType::Int32, Raw::Int(-2_000_000)),
            (DataType::Uint32, Raw::Uint(0x1234_5678)),
            (DataType::Int64, Raw::Int(i64::MIN + 1)),
            (DataType::Uint64, Raw::Uint(u64::MAX - 1)),
            (DataType::Float32, Raw::Float(-1.5)),
            (DataType::Float64, Raw::Float(1.0e-300)),
        ];
        block_on(async {
            for (data, value) in cases {
                for is_little_endian in [false, true] {
                    let memory = Memory::default();
                    device(&memory, 0x20, &[]);
                    let devices = vec![registers(0x20, &[(0x10, data, is_little_endian)])];
                    let mut driver = driver(&memory, LONG, devices);
                    driver.write(0, 0, &value).await.expect("writable");
                    assert_eq!(read(&mut driver, 0, &[0]).await, Ok(vec![Sample::Good(value.clone())]));
                }
            }
            // The order is what it is called.
            let memory = Memory::default();
            device(&memory, 0x20, &[(1, 0x12), (2, 0x34)]);
            let both = [(1, DataType::Uint16, false), (1, DataType::Uint16, true)];
            let mut driver = driver(&memory, LONG, vec![registers(0x20, &both)]);
            let numbers = vec![Sample::Good(Raw::Uint(0x1234)), Sample::Good(Raw::Uint(0x3412))];
            assert_eq!(read(&mut driver, 0, &[0, 1]).await, Ok(numbers));
            let refused = driver.write(0, 0, &Raw::Uint(70_000)).await;
            assert!(matches!(refused, Err(Fault::Refused(_))), "{refused:?}");
        });
    }

    #[test]
    fn a_dead_device_is_its_own_fault_and_a_missing_register_its_points() {
        block_on(async {
            let memory = Memory::default();
            device(&memory, 0x20, &[(1, 5)]);
            let sensor = Device {
                device: I2cDevice {
                    address: 0x76,
                    model: Some(Model::Bme280),
                },
                points: vec![(I2cPoint::Quantity(Quantity::Temperature), DataType::Float64)],
            };
            let byte = DataType::Uint8;
            let mut driver = driver(
                &memory,
                LONG,
                vec![registers(0x20, &[(1, byte, false), (2, byte, false)]), sensor],
            );
            let nobody = |address: &str| Err(Fault::Device(format!("nobody at {address}")));
            assert_eq!(read(&mut driver, 1, &[0]).await, nobody("0x76"));
            let samples = read(&mut driver, 0, &[0, 1]).await.expect("one of them");
            assert!(
                matches!(samples[..], [Sample::Good(Raw::Uint(5)), Sample::Bad(_)]),
                "{samples:?}"
            );
            assert_eq!(read(&mut driver, 0, &[1]).await, nobody("0x20"));
            let refused = driver.write(1, 0, &Raw::Float(1.0)).await;
            assert!(matches!(refused, Err(Fault::Refused(_))), "{refused:?}");
        });
    }

    #[test]
    fn a_bus_that_comes_and_goes_is_opened_anew() {
        block_on(async {
            let memory = Memory::default();
            device(&memory, 0x20, &[(1, 5)]);
            let absent = |is: bool| memory.0.lock().expect("no panic").is_absent = is;
            let mut driver = driver(&memory, LONG, vec![registers(0x20, &[(1, DataType::Uint8, false)])]);
            absent(true);
            assert_eq!(read(&mut driver, 0, &[0]).await, Err(Fault::Line("no bus".to_owned())));
            absent(false);
            read(&mut driver, 0, &[0]).await.expect("it is there");
            absent(true);
            assert_eq!(read(&mut driver, 0, &[0]).await, Err(Fault::Line("gone".to_owned())));
            absent(false);
            read(&mut driver, 0, &[0]).await.expect("it is back");
            assert_eq!(memory.0.lock().expect("no panic").opened, 3);
        });
    }

    #[test]
    fn a_device_that_holds_the_clock_costs_its_timeout_once_and_nothing_piles_up() {
        block_on(async {
            let memory = Memory::default();
            device(&memory, 0x20, &[(1, 5)]);
            device(&memory, 0x21, &[(1, 6)]);
            let (release, released): (SyncSender<()>, _) = sync_channel(0);
            memory.0.lock().expect("no panic").holds = Some((0x20, released));
            let point = [(1, DataType::Uint8, false)];
            let devices = vec![registers(0x20, &point), registers(0x21, &point)];
            let mut driver = driver(&memory, Duration::from_millis(30), devices);
            match read(&mut driver, 0, &[0]).await {
                Err(Fault::Device(why)) => assert!(why.contains("at 0x20: does it hold the clock"), "{why}"),
                other => panic!("{other:?}"),
            }
            for _ in 0..50 {
                match read(&mut driver, 1, &[0]).await {
                    Err(Fault::Line(why)) => assert!(why.contains("still hangs"), "{why}"),
                    other => panic!("{other:?}"),
                }
            }
            release.send(()).expect("the device waits");
            let deadline = crate::clock::monotonic() + LONG;
            while read(&mut driver, 1, &[0]).await != Ok(vec![Sample::Good(Raw::Uint(6))]) {
                assert!(crate::clock::monotonic() < deadline, "the bus does not serve again");
                tokio::task::yield_now().await;
            }
        });
    }

    #[test]
    fn a_host_without_the_bus_says_so() {
        let failed = KernelWire {
            bus: 250,
            timeout: LONG,
        };
        match { failed }.open().map(|_| ()) {
            Err(Fault::Line(why)) => assert!(why.contains("no /dev/i2c-250 on this host: enable"), "{why}"),
            other => panic!("{other:?}"),
        }
    }
}
