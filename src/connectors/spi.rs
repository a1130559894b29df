//! Kind "spi": converters on an SPI bus, one chip at each select line. The MCP3008's counts are the values.

use std::io;
use std::time::Duration;

use embedded_hal::spi::{ErrorKind, ErrorType, Operation, SpiDevice};
use rppal::spi::Segment;

use super::Setup;
use super::bus::{BusThread, Hung};
use super::driver::{Driver, Fault, Raw, Sample};
use super::sensors::{MCP3008_MAX, read_mcp3008};
use crate::config::Address;
use crate::config::buses::SpiBus;

/// The driver of one chip, over the kernel's or (in tests) another `W`.
pub struct Spi<W: Wire = KernelWire> {
    thread: BusThread<Bus<W>>,
    /// By asset and point: the channel.
    channels: Vec<Vec<u8>>,
    timeout: Duration,
}

/// The way to a chip.
pub trait Wire: Send + 'static {
    type Device: SpiDevice<Error: std::fmt::Display>;
    fn open(&mut self) -> Result<Self::Device, String>;
}

/// On the thread.
struct Bus<W: Wire> {
    wire: W,
    device: Option<W::Device>,
}

impl Spi {
    pub fn new(setup: &Setup, settings: &SpiBus) -> Spi {
        let channels = setup.addresses(|address| match address {
            Address::Channel(channel) => Some(*channel),
            _ => None,
        });
        Spi::of_kernel(&setup.connector.name, settings, channels)
    }

    fn of_kernel(connector: &str, settings: &SpiBus, channels: Vec<Vec<u8>>) -> Spi {
        let wire = settings.clone();
        Spi::on(connector, settings.timeout, channels, move || KernelWire(wire.clone()))
    }
}

impl<W: Wire> Spi<W> {
    fn on(connector: &str, timeout: Duration, channels: Vec<Vec<u8>>, wire: impl Fn() -> W + Send + 'static) -> Self
    where
        Bus<W>: Send,
    {
        let thread = BusThread::new(connector, move || Bus {
            wire: wire(),
            device: None,
        });
        Spi {
            thread,
            channels,
            timeout,
        }
    }
}

impl<W: Wire> Driver for Spi<W>
where
    Bus<W>: Send,
{
    async fn read(&mut self, asset: usize, points: &[usize], samples: &mut Vec<Sample>) -> Result<(), Fault> {
        let channels: Vec<u8> = points.iter().map(|p| self.channels[asset][*p]).collect();
        let read = self.thread.call(self.timeout, move |bus| bus.read(&channels)).await;
        match read {
            Ok(read) => samples.extend(read?),
            Err(hung @ Hung::Now(_)) => return Err(Fault::Device(hung.to_string())),
            Err(hung) => return Err(Fault::Line(hung.to_string())),
        }
        Ok(())
    }

    async fn write(&mut self, _asset: usize, _point: usize, _value: &Raw) -> Result<(), Fault> {
        Err(Fault::Refused("an input of a converter cannot be written".to_owned()))
    }
}

impl<W: Wire> Bus<W> {
    fn read(&mut self, channels: &[u8]) -> Result<Vec<Sample>, Fault> {
        let device = match self.device.take() {
            Some(device) => device,
            None => self.wire.open().map_err(Fault::Line)?,
        };
        let device = self.device.insert(device);
        let read: Result<Vec<Sample>, _> = channels
            .iter()
            .map(|channel| read_mcp3008(device, *channel).map(sample_of))
            .collect();
        read.map_err(|error| {
            let fault = Fault::Line(format!("the transfer failed: {error}"));
            self.device = None;
            fault
        })
    }
}

fn sample_of(count: Option<u16>) -> Sample {
    match count {
        Some(count @ MCP3008_MAX..) => {
            let why = "at the end of the range: the input may be beyond the reference voltage";
            Sample::Uncertain(Raw::Uint(count.into()), why.to_owned())
        }
        Some(count) => Sample::Good(Raw::Uint(count.into())),
        None => Sample::Bad("no chip answers: is it wired and powered, and is `select` its line?".to_owned()),
    }
}

/// /dev/spidevB.S, by rppal.
pub struct KernelWire(SpiBus);

pub struct KernelDevice(rppal::spi::Spi);

#[derive(Debug)]
pub struct KernelError(rppal::spi::Error);

impl Wire for KernelWire {
    type Device = KernelDevice;

    fn open(&mut self) -> Result<KernelDevice, String> {
        use rppal::spi::{Bus, Error, Mode, SlaveSelect};
        let SpiBus {
            bus,
            select,
            speed,
            mode,
            ..
        } = self.0;
        let path = format!("/dev/spidev{bus}.{select}");
        let buses = [
            Bus::Spi0,
            Bus::Spi1,
            Bus::Spi2,
            Bus::Spi3,
            Bus::Spi4,
            Bus::Spi5,
            Bus::Spi6,
        ];
        let selects = [
            SlaveSelect::Ss0,
            SlaveSelect::Ss1,
            SlaveSelect::Ss2,
            SlaveSelect::Ss3,
            SlaveSelect::Ss4,
            SlaveSelect::Ss5,
            SlaveSelect::Ss6,
            SlaveSelect::Ss7,
        ];
        let modes = [Mode::Mode0, Mode::Mode1, Mode::Mode2, Mode::Mode3];
        let of = |n: u8| usize::from(n);
        let (Some(bus), Some(select), Some(mode)) = (buses.get(of(bus)), selects.get(of(select)), modes.get(of(mode)))
        else {
            return Err(format!(
                "{path} is beyond what can be opened: buses 0 to 6, selects 0 to 7, modes 0 to 3"
            ));
        };
        rppal::spi::Spi::new(*bus, *select, speed, *mode)
            .map(KernelDevice)
            .map_err(|error| match error {
                Error::Io(error) if error.kind() == io::ErrorKind::NotFound => format!(
                    "no {path} on this host: enable the bus (on a Raspberry Pi dtparam=spi=on in config.txt), let the \
                     service see it (its drop-in i2c-spi.conf), or take this [[connector]] out"
                ),
                Error::Io(error) if error.kind() == io::ErrorKind::PermissionDenied => format!(
                    "no permission for {path}: put the user that tidegate runs as into the group spi (or the one that \
                     `ls -l {path}` shows)"
                ),
                other => format!("{path} cannot be opened: {other}"),
            })
    }
}

impl std::fmt::Display for KernelError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl embedded_hal::spi::Error for KernelError {
    fn kind(&self) -> ErrorKind {
        ErrorKind::Other
    }
}

impl ErrorType for KernelDevice {
    type Error = KernelError;
}

impl SpiDevice for KernelDevice {
    /// One message: the chip stays selected from the first operation to the last.
    fn transaction(&mut self, operations: &mut [Operation<'_, u8>]) -> Result<(), KernelError> {
        let sent: Vec<Vec<u8>> = operations
            .iter()
            .map(|operation| match operation {
                Operation::TransferInPlace(data) => data.to_vec(),
                _ => Vec::new(),
            })
            .collect();
        let segments: Vec<Segment<'_, '_>> = operations
            .iter_mut()
            .zip(&sent)
            .map(|(operation, sent)| match operation {
                Operation::Read(data) => Segment::with_read(data),
                Operation::Write(data) => Segment::with_write(data),
                Operation::Transfer(read, write) => Segment::new(read, write),
                Operation::TransferInPlace(data) => Segment::new(data, sent),
                Operation::DelayNs(ns) => {
                    let us = u16::try_from(ns.div_ceil(1_000)).unwrap_or(u16::MAX);
                    Segment::with_settings(None, None, 0, us, 0, false)
                }
            })
            .collect();
        self.0.transfer_segments(&segments).map_err(KernelError)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chips in memory: for each opening the answers it gives, and what was sent to it.
    struct Chips(Vec<Result<Chip, String>>);

    #[derive(Clone)]
    struct Chip {
        answers: Vec<[u8; 3]>,
    }

    impl Wire for Chips {
        type Device = Chip;

        fn open(&mut self) -> Result<Chip, String> {
            self.0.remove(0)
        }
    }

    impl ErrorType for Chip {
        type Error = KernelError;
    }

    impl SpiDevice for Chip {
        fn transaction(&mut self, operations: &mut [Operation<'_, u8>]) -> Result<(), KernelError> {
            let [Operation::TransferInPlace(data)] = operations else {
                panic!("{} operations", operations.len());
            };
            let broken = || KernelError(rppal::spi::Error::Io(io::ErrorKind::BrokenPipe.into()));
            if self.answers.is_empty() {
                return Err(broken());
            }
            // The channel comes back in bits that the driver does not look at.
            let mut answer = self.answers.remove(0);
            answer[1] |= data[1] & 0x70;
            data.copy_from_slice(&answer);
            Ok(())
        }
    }

    fn block_on<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime")
            .block_on(future)
    }

    const LONG: Duration = Duration::from_secs(30);

    #[test]
    fn channels_are_read_once_the_chip_is_there() {
        block_on(async {
            let first = Chip {
                answers: vec![[0, 0x01, 0x02], [0, 0x03, 0xff], [0xff; 3]],
            };
            let second = Chip {
                answers: vec![[0, 0x00, 0x07]],
            };
            let chips = move || Chips(vec![Err("not yet".to_owned()), Ok(first.clone()), Ok(second.clone())]);
            let mut spi = Spi::on("spi", LONG, vec![vec![0, 3]], chips);
            let mut samples = Vec::new();
            let refused = spi.read(0, &[0], &mut samples).await;
            assert_eq!(refused, Err(Fault::Line("not yet".to_owned())));
            spi.read(0, &[1, 0, 1], &mut samples).await.expect("it is there now");
            match &samples[..] {
                [
                    Sample::Good(Raw::Uint(0x102)),
                    Sample::Uncertain(Raw::Uint(1_023), end),
                    Sample::Bad(nobody),
                ] => assert!(end.contains("end of the range") && nobody.contains("no chip answers")),
                other => panic!("{other:?}"),
            }
            assert!(matches!(
                spi.write(0, 0, &Raw::Bool(true)).await,
                Err(Fault::Refused(_))
            ));
        });
    }

    #[test]
    fn a_host_without_the_bus_says_so() {
        let settings = |bus, select| SpiBus {
            bus,
            select,
            speed: 1_000_000,
            mode: 0,
            timeout: LONG,
        };
        block_on(async {
            for (bus, select, expected) in [
                (6, 7, "no /dev/spidev6.7 on this host: enable"),
                (7, 0, "beyond what can be opened"),
            ] {
                let mut spi = Spi::of_kernel("spi", &settings(bus, select), vec![vec![0]]);
                let refused = spi.read(0, &[0], &mut Vec::new()).await;
                assert!(
                    matches!(&refused, Err(Fault::Line(why)) if why.contains(expected)),
                    "{refused:?}"
                );
            }
        });
    }
}
