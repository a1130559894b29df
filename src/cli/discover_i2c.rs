//! `tidegate discover i2c`: the buses of this host; with `--bus` the addresses that answer on one of them, as TOML to
//! copy from.
//!
//! A bus is scanned only when it is named: an address is probed as i2cdetect does it (a byte is read from where EEPROMs
//! and the like sit, elsewhere an empty write is sent), which disturbs few devices, but some. What a device is, its
//! address does not tell: what is printed of that is a guess, and says so.

use std::fmt::Write;
use std::io::{IsTerminal, Write as _};
use std::path::Path;

use anyhow::bail;
use rppal::i2c::{Error, I2c};

use crate::connectors::i2c::cannot_open;

const ADDRESSES: std::ops::RangeInclusive<u8> = 0x08..=0x77;
/// An adapter that does not move at so many addresses in a row will not at the others.
const TIMEOUTS_MAX: usize = 3;

/// What an address was probed with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Probe {
    ReadByte,
    QuickWrite,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Answers,
    /// A driver of the kernel has it: not probed.
    InUse,
}

/// Lists the buses, or scans the one that is named.
pub fn run(bus: Option<u8>) -> anyhow::Result<String> {
    match bus {
        None => buses(Path::new("/sys/class/i2c-dev")),
        Some(bus) => {
            let found = scan(bus)?;
            Ok(report(bus, &found))
        }
    }
}

/// `1` or `/dev/i2c-1`.
pub fn bus_number(text: &str) -> Result<u8, String> {
    let number = text.strip_prefix("/dev/i2c-").unwrap_or(text);
    number
        .parse()
        .map_err(|_| "a bus is a number from 0 to 255, or a path /dev/i2c-N".to_owned())
}

fn buses(folder: &Path) -> anyhow::Result<String> {
    let mut buses: Vec<(u32, String)> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix("i2c-")?.parse().ok()?;
            let name = std::fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            Some((number, name.trim().to_owned()))
        })
        .collect();
    buses.sort();
    let Some((first, _)) = buses.first() else {
        bail!(
            "no I²C bus on this host: enable one (on a Raspberry Pi dtparam=i2c_arm=on in config.txt) and load its \
             devices with `modprobe i2c-dev`"
        );
    };
    let mut text = String::new();
    for (number, name) in &buses {
        writeln!(text, "/dev/i2c-{number}  {name}")?;
    }
    writeln!(
        text,
        "next: `tidegate discover i2c --bus {first}` probes every address of that bus, which can disturb a device on it"
    )?;
    Ok(text)
}

fn scan(bus: u8) -> anyhow::Result<Vec<(u8, Found)>> {
    let mut i2c = match I2c::with_bus(bus) {
        Ok(i2c) => i2c,
        Err(error) => bail!("{}", cannot_open(bus, &error)),
    };
    let (can_quick, can_read) = {
        let can = i2c.capabilities();
        (can.smbus_quick_command(), can.smbus_receive_byte())
    };
    let mut found = Vec::new();
    let mut timeouts = 0;
    let mut progress = Progress::default();
    for address in ADDRESSES {
        progress.show(bus, address);
        let Some(probe) = probe(address, can_quick, can_read) else {
            bail!("/dev/i2c-{bus} can be probed neither with a read nor with an empty write: its adapter does neither");
        };
        let probed = i2c.set_slave_address(address.into()).and_then(|()| match probe {
            Probe::ReadByte => i2c.smbus_receive_byte().map(|_| ()),
            Probe::QuickWrite => i2c.smbus_quick_command(false),
        });
        let errno = match &probed {
            Err(Error::Io(error)) => error.raw_os_error(),
            Ok(()) | Err(_) => None,
        };
        timeouts = if errno == Some(libc::ETIMEDOUT) {
            timeouts + 1
        } else {
            0
        };
        if timeouts == TIMEOUTS_MAX {
            progress.end();
            bail!("nothing moves on /dev/i2c-{bus}: a wire is held low, or the pull-ups are missing");
        }
        match probed {
            Ok(()) => found.push((address, Found::Answers)),
            Err(_) if errno == Some(libc::EBUSY) => found.push((address, Found::InUse)),
            Err(_) => {}
        }
    }
    progress.end();
    Ok(found)
}

/// How i2cdetect does it: an empty write could be taken for a command by some EEPROMs and by Ethernet and sensor hubs
/// in these two ranges, a read by what is elsewhere.
fn probe(address: u8, can_quick: bool, can_read: bool) -> Option<Probe> {
    let wants_read = matches!(address, 0x30..=0x37 | 0x50..=0x5f);
    match (wants_read, can_quick, can_read) {
        (true, _, true) | (false, false, true) => Some(Probe::ReadByte),
        (_, true, _) => Some(Probe::QuickWrite),
        (_, false, false) => None,
    }
}

/// On stderr: one line that is written over on a terminal, else one every 32 addresses.
#[derive(Default)]
struct Progress {
    is_shown: bool,
}

impl Progress {
    fn show(&mut self, bus: u8, address: u8) {
        let mut stderr = std::io::stderr();
        // A reader that went away is no reason to stop.
        if stderr.is_terminal() {
            let _ = write!(stderr, "\rprobing /dev/i2c-{bus}: {address:#04x} of 0x77");
            self.is_shown = true;
        } else if address % 32 == 8 {
            let _ = writeln!(stderr, "probing /dev/i2c-{bus} from {address:#04x}");
        }
        let _ = stderr.flush();
    }

    fn end(&mut self) {
        if std::mem::take(&mut self.is_shown) {
            let _ = writeln!(std::io::stderr());
        }
    }
}

/// What this version can read, by the addresses that the chips can have, and what else sits there often.
fn guess(address: u8) -> (Option<&'static str>, &'static str) {
    match address {
        0x76 | 0x77 => (Some("bme280"), "a BME280 or BMP280; an MS5611 has this address too"),
        0x44 | 0x45 => (
            Some("sht3x"),
            "an SHT30, SHT31 or SHT35; an SHT4x or an INA219 has this address too",
        ),
        0x48..=0x4b => (
            Some("ads1115"),
            "an ADS1115; a TMP102, LM75 or PCF8591 has this address too",
        ),
        0x20..=0x27 => (None, "an I/O expander (MCP23017, PCF8574)"),
        0x38..=0x3b => (None, "a PCF8574A, an AHT20 (0x38) or an FT6236"),
        0x3c | 0x3d => (None, "an OLED display (SSD1306)"),
        0x40..=0x43 => (None, "an INA219, an HTU21D (0x40) or a PCA9685 (0x40)"),
        0x50..=0x57 => (None, "an EEPROM (24Cxx)"),
        0x68 | 0x69 => (None, "a clock (DS3231, 0x68) or an MPU6050"),
        _ => (None, "unknown"),
    }
}

/// TOML to copy from: valid as it stands, and every guess called one.
fn report(bus: u8, found: &[(u8, Found)]) -> String {
    let count = ADDRESSES.count();
    if found.is_empty() {
        return format!(
            "# /dev/i2c-{bus}: {count} addresses were probed and nobody answered. Is the device wired and powered?\n"
        );
    }
    let mut text = format!(
        "# /dev/i2c-{bus}: {count} addresses were probed, {} answered or are taken. An address does not tell what a device\n\
         # is: what follows are guesses by the address. Take out what is wrong.\n",
        found.len()
    );
    if found.len() == count {
        text.push_str("# Every address answers, which no bus does: the data line is held low.\n");
        return text;
    }
    text.push_str(&format!(
        "\n[[connector]]\nname = \"i2c-{bus}\"\nkind = \"i2c\"\nbus = {bus}\n"
    ));
    for (address, found) in found {
        let (sensor, what) = guess(*address);
        if *found == Found::InUse {
            text.push_str(&format!(
                "\n# {address:#04x}: a driver of the kernel has it; it cannot be read from here.\n"
            ));
            continue;
        }
        text.push_str(&format!("\n# {address:#04x}: a guess: {what}.\n"));
        let points: &[&str] = match sensor {
            Some("bme280") => &[
                "{ name = \"temperature\", unit = \"°C\" }",
                "{ name = \"humidity\", unit = \"%\" }",
                "{ name = \"pressure\", unit = \"hPa\" }",
            ],
            Some("sht3x") => &[
                "{ name = \"temperature\", unit = \"°C\" }",
                "{ name = \"humidity\", unit = \"%\" }",
            ],
            Some(_) => &["{ name = \"input-0\", address = \"channel:0\", unit = \"V\" }"],
            None => &["{ name = \"register-0\", address = \"register:0x00\", type = \"uint8\" }"],
        };
        // What no driver is known for is left to the reader of its datasheet.
        let comment = if sensor.is_some() { "" } else { "# " };
        let sensor = sensor.map(|s| format!("sensor = {s:?}\n")).unwrap_or_default();
        let asset = format!(
            "[[asset]]\nname = \"i2c-{bus}/{address:#04x}\"\nconnector = \"i2c-{bus}\"\n{sensor}\
             device_address = {address:#04x}\npoints = [{}]\n",
            points.join(", ")
        );
        for line in asset.lines() {
            text.push_str(&format!("{comment}{line}\n"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;

    #[test]
    fn addresses_are_probed_as_i2cdetect_does() {
        for address in ADDRESSES {
            let reads = (0x30..=0x37).contains(&address) || (0x50..=0x5f).contains(&address);
            let expected = if reads { Probe::ReadByte } else { Probe::QuickWrite };
            assert_eq!(probe(address, true, true), Some(expected), "{address:#04x}");
            assert_eq!(probe(address, false, true), Some(Probe::ReadByte));
            assert_eq!(probe(address, true, false), Some(Probe::QuickWrite));
            assert_eq!(probe(address, false, false), None);
        }
    }

    fn checked(text: &str) -> config::Config {
        let text = format!("[gateway]\nname = \"g\"\n{text}");
        let path = std::path::Path::new("gateway.toml");
        match config::parse(&text, path, &|_| None) {
            Ok(config) => config,
            Err(faults) => panic!("{}", config::Faults::new(path, &text, faults)),
        }
    }

    #[test]
    fn what_is_printed_is_a_valid_configuration_with_its_guesses_called_so() {
        // Every address alone (as a scan would print it), and with the comments of the unknown ones taken off.
        for address in ADDRESSES {
            let text = report(1, &[(address, Found::Answers)]);
            let config = checked(&text);
            assert_eq!(config.connectors.len(), 1);
            assert_eq!(
                config.assets.len(),
                usize::from(guess(address).0.is_some()),
                "{address:#04x}"
            );
            assert!(text.contains("a guess: "), "{text}");
            let uncommented: Vec<&str> = text
                .lines()
                .map(|line| match line.strip_prefix("# ") {
                    Some(rest) if rest.contains(" = ") || rest.starts_with('[') => rest,
                    _ => line,
                })
                .collect();
            assert_eq!(checked(&uncommented.join("\n")).assets.len(), 1, "{address:#04x}");
        }
        let several = [
            (0x20, Found::Answers),
            (0x44, Found::Answers),
            (0x68, Found::InUse),
            (0x76, Found::Answers),
        ];
        let text = report(1, &several);
        assert_eq!(checked(&text).assets.len(), 2);
        assert!(text.contains("# 0x68: a driver of the kernel has it"), "{text}");
        let all: Vec<(u8, Found)> = ADDRESSES.map(|a| (a, Found::Answers)).collect();
        assert!(report(1, &all).contains("held low") && report(1, &[]).contains("nobody answered"));
        assert_eq!(checked(&report(1, &all)).connectors.len(), 0);
    }

    #[test]
    fn buses_are_listed_by_number_and_their_absence_is_said() {
        let folder = std::env::temp_dir().join(format!("tidegate-i2c-{}", std::process::id()));
        for (number, name) in [(10, "second\n"), (2, "bcm2835 (i2c@7e804000)\n")] {
            let bus = folder.join(format!("i2c-{number}"));
            std::fs::create_dir_all(&bus).expect("a temporary folder");
            std::fs::write(bus.join("name"), name).expect("writable");
        }
        let text = buses(&folder).expect("two buses");
        std::fs::remove_dir_all(&folder).expect("own folder");
        assert!(
            text.starts_with("/dev/i2c-2  bcm2835 (i2c@7e804000)\n/dev/i2c-10  second\nnext: "),
            "{text}"
        );
        assert!(text.contains("--bus 2"), "{text}");
        let none = buses(&folder).expect_err("no such folder").to_string();
        assert!(none.contains("no I²C bus on this host: enable one"), "{none}");
        assert_eq!((bus_number("1"), bus_number("/dev/i2c-10")), (Ok(1), Ok(10)));
        assert!(bus_number("256").is_err() && bus_number("i2c").is_err());
    }
}
