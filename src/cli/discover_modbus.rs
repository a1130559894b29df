//! `tidegate discover serial` and `discover modbus`: what is there, as TOML to start from.
//!
//! Serial ports are listed and not opened. Units are asked only on the one line that is named, one after the other, for
//! one register: that any answer comes, be it an exception, means that somebody is there. On a line with a master of its
//! own this disturbs it, so nothing here happens unasked.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;

use crate::config::{Config, ConnectorKind, ModbusLine, ModbusWire, Parity, SerialLine, Table, parse_host};
use crate::connectors::modbus::Span;
use crate::connectors::modbus::wire::{Counters, Failure, Wire, exception};

/// One line, named in one of four ways, and the units to ask for.
#[derive(Debug, Args)]
pub struct ModbusArgs {
    /// The line of this [[connector]] of the configuration (stop the gateway first where it is a serial one)
    #[arg(long, group = "line")]
    connector: Option<String>,
    /// A Modbus TCP device or gateway, HOST:PORT
    #[arg(long, group = "line", value_name = "HOST:PORT")]
    tcp: Option<String>,
    /// A serial line behind TCP (RTU frames), HOST:PORT
    #[arg(long, group = "line", value_name = "HOST:PORT")]
    rtu_tcp: Option<String>,
    /// A serial port
    #[arg(long, group = "line", value_name = "PATH")]
    device: Option<PathBuf>,
    #[arg(long, default_value_t = 19_200, requires = "device")]
    baud: u32,
    #[arg(long, default_value = "even", value_parser = ["none", "even", "odd"], requires = "device")]
    parity: String,
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=2), requires = "device")]
    stop_bits: u8,
    /// Which units: 1-247, or 1,3,10-20
    #[arg(long, default_value = "1-247", value_parser = units)]
    units: Units,
    /// How long to wait for each; a serial line of 247 units needs four minutes at 1s
    #[arg(long, default_value = "1s", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

/// In their order, none twice.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Units(Vec<u8>);

fn units(text: &str) -> Result<Units, String> {
    let mut all = Vec::new();
    for part in text.split(',') {
        let (from, to) = part.split_once('-').unwrap_or((part, part));
        match (from.trim().parse::<u8>(), to.trim().parse::<u8>()) {
            (Ok(from), Ok(to)) if from <= to => all.extend(from..=to),
            _ => {
                return Err(format!(
                    "{part:?} is no unit and no range of them: write 1-247 or 1,3,10-20"
                ));
            }
        }
    }
    all.sort_unstable();
    all.dedup();
    Ok(Units(all))
}

impl ModbusArgs {
    /// Whether the configuration is needed.
    pub fn names_a_connector(&self) -> bool {
        self.connector.is_some()
    }

    fn line(&self, config: Option<&Config>) -> anyhow::Result<ModbusLine> {
        let host = |text: &String| parse_host(text).map_err(|why| anyhow::anyhow!("{text:?} is not an address: {why}"));
        let wire = if let Some(name) = &self.connector {
            let config = config.context("the configuration was not read")?;
            let connector = config.connectors.iter().find(|c| c.name == *name);
            return match connector.map(|c| &c.kind) {
                Some(ConnectorKind::Modbus(line)) => Ok((**line).clone()),
                Some(_) => bail!("[[connector]] {name:?} is not of Modbus"),
                None => bail!("there is no [[connector]] {name:?} in {}", config.path.display()),
            };
        } else if let Some(text) = &self.tcp {
            let (host, port) = host(text)?;
            ModbusWire::Tcp { host, port }
        } else if let Some(text) = &self.rtu_tcp {
            let (host, port) = host(text)?;
            ModbusWire::RtuTcp { host, port }
        } else if let Some(device) = &self.device {
            let mut serial = SerialLine::new(device.clone());
            (serial.baud, serial.stop_bits) = (self.baud, self.stop_bits);
            serial.parity = match self.parity.as_str() {
                "none" => Parity::None,
                "odd" => Parity::Odd,
                _ => Parity::Even,
            };
            ModbusWire::Rtu(serial)
        } else {
            bail!("which line? write --tcp HOST:PORT, --rtu-tcp HOST:PORT, --device PATH or --connector NAME");
        };
        Ok(ModbusLine::new(wire))
    }
}

/// Asks every unit once, in order. What is found is returned, how far it is goes to stderr.
pub fn modbus(args: &ModbusArgs, config: Option<&Config>) -> anyhow::Result<String> {
    let mut line = args.line(config)?;
    line.timeout = args.timeout;
    if line.wire.is_serial() {
        // No broadcast.
        if args.units.0 == [0] {
            bail!("unit 0 of a serial line means all devices, and none of them answers");
        }
    }
    let serial = line.wire.is_serial();
    let units: Vec<u8> = args.units.0.iter().copied().filter(|u| *u > 0 || !serial).collect();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let found = runtime.block_on(scan(&line, &units))?;
    Ok(report(&line.wire, args.connector.as_deref(), &found, units.len()))
}

/// A unit that answered, and with what.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    unit: u8,
    said: String,
}

async fn scan(line: &ModbusLine, units: &[u8]) -> anyhow::Result<Vec<Found>> {
    let mut wire = Wire::new(line.clone(), Counters::default());
    let mut found = Vec::new();
    let mut progress = Progress::new(units.len());
    let span = Span {
        table: Table::Holding,
        start: 0,
        count: 1,
    };
    for (nth, unit) in units.iter().enumerate() {
        progress.at(nth, *unit, found.len());
        let said = match wire.read(*unit, &span).await {
            Ok(_) => "answers".to_owned(),
            // A gateway's own words about a unit that is not there.
            Err(Failure::Exception(10 | 11) | Failure::Timeout(_)) => continue,
            Err(Failure::Exception(code)) => format!("answers, holding:0 with {}", exception(code)),
            Err(failure @ Failure::Connect(_)) => bail!("{failure}"),
            Err(failure) => {
                progress.note(&format!("unit {unit}: {failure}"));
                continue;
            }
        };
        progress.note(&format!("unit {unit} {said}"));
        found.push(Found { unit: *unit, said });
    }
    progress.end();
    Ok(found)
}

/// How far it is: a line that is overwritten on a terminal, one every ten percent elsewhere.
struct Progress {
    total: usize,
    is_terminal: bool,
    told: usize,
}

impl Progress {
    fn new(total: usize) -> Progress {
        Progress {
            total,
            is_terminal: std::io::stderr().is_terminal(),
            told: 0,
        }
    }

    fn at(&mut self, nth: usize, unit: u8, found: usize) {
        let mut err = std::io::stderr().lock();
        if self.is_terminal {
            let _ = write!(
                err,
                "\r\x1b[Kunit {unit} ({} of {}), {found} found",
                nth + 1,
                self.total
            );
        } else if nth * 10 / self.total.max(1) > self.told {
            self.told = nth * 10 / self.total.max(1);
            let _ = writeln!(err, "{nth} of {} units asked, {found} found", self.total);
        }
        let _ = err.flush();
    }

    fn note(&self, text: &str) {
        let clear = if self.is_terminal { "\r\x1b[K" } else { "" };
        let _ = writeln!(std::io::stderr().lock(), "{clear}{text}");
    }

    fn end(&self) {
        if self.is_terminal {
            let _ = write!(std::io::stderr().lock(), "\r\x1b[K");
        }
    }
}

/// TOML to copy; of a connector that is configured already only the assets.
fn report(wire: &ModbusWire, connector: Option<&str>, found: &[Found], asked: usize) -> String {
    let mut out = String::new();
    if found.is_empty() {
        let _ = writeln!(out, "# {asked} units of {wire} were asked, none answered");
        return out;
    }
    let name = connector.unwrap_or("modbus");
    if connector.is_none() {
        let _ = writeln!(out, "[[connector]]\nname = {name:?}");
        let _ = match wire {
            ModbusWire::Tcp { .. } => writeln!(out, "kind = \"modbus-tcp\"\naddress = \"{wire}\""),
            ModbusWire::RtuTcp { .. } => writeln!(out, "kind = \"modbus-rtu-tcp\"\naddress = \"{wire}\""),
            ModbusWire::Rtu(serial) => {
                let parity = match serial.parity {
                    Parity::None => "none",
                    Parity::Even => "even",
                    Parity::Odd => "odd",
                };
                writeln!(
                    out,
                    "kind = \"modbus-rtu\"\ndevice = {:?}\nbaud = {}\nparity = {parity:?}\nstop_bits = {}",
                    serial.device.display().to_string(),
                    serial.baud,
                    serial.stop_bits
                )
            }
        };
        out.push('\n');
    }
    for Found { unit, said } in found {
        let _ = writeln!(
            out,
            "[[asset]] # {said}\nname = \"unit-{unit}\"\nconnector = {name:?}\nunit_id = {unit}\npoints = [\n  \
             # Which registers there are stands in the device's manual.\n  \
             {{ name = \"holding-0\", address = \"holding:0\" }},\n]\n"
        );
    }
    out
}

/// The serial ports of this host, by the names that stay with the adapter.
pub fn serial() -> anyhow::Result<String> {
    Ok(serial_report(&serial_ports(Path::new("/"))))
}

#[derive(Debug, PartialEq, Eq)]
struct Port {
    /// `/dev/serial/by-id/…` where there is one.
    path: String,
    device: String,
}

/// Ports with hardware behind them: the kernel also lists those of a board that has none.
fn serial_ports(root: &Path) -> Vec<Port> {
    let names = |folder: &str| -> Vec<String> {
        let entries = std::fs::read_dir(root.join(folder)).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    };
    let by_id: Vec<(String, Option<PathBuf>)> = names("dev/serial/by-id")
        .into_iter()
        .map(|name| {
            let target = std::fs::read_link(root.join("dev/serial/by-id").join(&name)).ok();
            (name, target)
        })
        .collect();
    let has_hardware = |name: &String| {
        let device = root.join("sys/class/tty").join(name).join("device");
        let uart = std::fs::read_to_string(root.join("sys/class/tty").join(name).join("type"));
        // A port of the old PC kind without a chip has the type 0.
        device.exists() && uart.map_or(true, |t| t.trim() != "0")
    };
    let port = |name: String| {
        let same = |(_, target): &&(String, Option<PathBuf>)| {
            target
                .as_ref()
                .and_then(|t| t.file_name())
                .is_some_and(|file| *file == *name)
        };
        let device = format!("/dev/{name}");
        Port {
            path: match by_id.iter().find(same) {
                Some((id, _)) => format!("/dev/serial/by-id/{id}"),
                None => device.clone(),
            },
            device,
        }
    };
    names("sys/class/tty")
        .into_iter()
        .filter(has_hardware)
        .map(port)
        .collect()
}

fn serial_report(ports: &[Port]) -> String {
    let mut out = String::new();
    if ports.is_empty() {
        out.push_str("# no serial port: is the adapter plugged in?\n");
    }
    for (nth, Port { path, device }) in ports.iter().enumerate() {
        if path != device {
            let _ = writeln!(out, "# now {device}");
        }
        let _ = writeln!(
            out,
            "[[connector]]\nname = \"serial-{}\"\nkind = \"modbus-rtu\"\ndevice = {path:?}\nbaud = 19200\nparity = \"even\"\n",
            nth + 1
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_are_numbers_and_ranges() {
        assert_eq!(units("3,1,10-12,11"), Ok(Units(vec![1, 3, 10, 11, 12])));
        assert_eq!(units("1-247").map(|u| u.0.len()), Ok(247));
        for text in ["", "a", "3-1", "256", "1,,2", "1-"] {
            assert!(units(text).is_err(), "{text}");
        }
    }

    #[test]
    fn what_is_found_is_a_configuration() {
        let found = [
            Found {
                unit: 1,
                said: "answers".to_owned(),
            },
            Found {
                unit: 9,
                said: format!("answers, holding:0 with {}", exception(2)),
            },
        ];
        let wires = [
            ModbusWire::Tcp {
                host: "::1".to_owned(),
                port: 1502,
            },
            ModbusWire::RtuTcp {
                host: "gateway.example".to_owned(),
                port: 4001,
            },
            ModbusWire::Rtu(SerialLine::new("/dev/ttyUSB0".into())),
        ];
        for wire in wires {
            let text = format!("[gateway]\nname = 'g'\n{}", report(&wire, None, &found, 247));
            let config = crate::config::parse(&text, Path::new("/gateway.toml"), &|_| None).expect("valid");
            assert_eq!(config.assets.len(), 2);
            let ConnectorKind::Modbus(line) = &config.connectors[0].kind else {
                panic!("of Modbus")
            };
            assert_eq!(line.wire, wire);
        }
        assert!(report(&ModbusWire::Rtu(SerialLine::new("/x".into())), None, &[], 3).starts_with("# 3 units of /x"));
    }

    #[test]
    fn ports_have_the_names_that_stay() {
        let root = std::env::temp_dir().join(format!("tidegate-serial-{}", std::process::id()));
        let make = |path: &str| std::fs::create_dir_all(root.join(path)).expect("a folder");
        make("dev/serial/by-id");
        for name in ["ttyUSB0", "ttyS0", "ttyS1", "ttyAMA0"] {
            make(&format!("sys/class/tty/{name}/device"));
        }
        make("sys/class/tty/tty1");
        std::fs::write(root.join("sys/class/tty/ttyS0/type"), "4\n").expect("writable");
        std::fs::write(root.join("sys/class/tty/ttyS1/type"), "0\n").expect("writable");
        let id = root.join("dev/serial/by-id/usb-FTDI_FT232R-if00-port0");
        std::os::unix::fs::symlink("../../ttyUSB0", id).expect("a link");
        let ports = serial_ports(&root);
        let _ = std::fs::remove_dir_all(&root);
        let paths: Vec<&str> = ports.iter().map(|p| p.path.as_str()).collect();
        assert_eq!(
            paths,
            [
                "/dev/ttyAMA0",
                "/dev/ttyS0",
                "/dev/serial/by-id/usb-FTDI_FT232R-if00-port0"
            ]
        );
        let text = format!("[gateway]\nname = 'g'\n{}", serial_report(&ports));
        assert!(
            crate::config::parse(&text, Path::new("/gateway.toml"), &|_| None).is_ok(),
            "{text}"
        );
        assert!(serial_report(&[]).starts_with("# no serial port"));
    }
}
