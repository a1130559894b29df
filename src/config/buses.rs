//! Kinds "i2c", "spi" and "pwm": sensors, registers and outputs on a bus of the board.

use std::time::Duration;

use toml::de::DeValue;

use super::check::Checker;
use super::fault::Fault;
use super::machines::Place;
use super::read::{At, Section, integer, list, nearest};
use super::{Address, DataType, Device};

const TIMEOUT: Duration = Duration::from_secs(1);
/// Others are reserved.
const ADDRESSES: std::ops::RangeInclusive<u8> = 0x08..=0x77;

/// The line of a `[[connector]]` of the kind "i2c".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct I2cBus {
    /// The N of /dev/i2c-N.
    pub bus: u8,
    /// A read of an asset or a write may take so long (`timeout`, 1 s by default).
    pub timeout: Duration,
}

/// The line of a `[[connector]]` of the kind "spi": /dev/spidevB.S.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpiBus {
    pub bus: u8,
    pub select: u8,
    /// Bits a second at most (`speed`, 1,000,000 by default).
    pub speed: u32,
    /// 0 to 3 (0 by default).
    pub mode: u8,
    pub timeout: Duration,
}

/// The line of a `[[connector]]` of the kind "pwm".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PwmChip {
    /// The N of /sys/class/pwm/pwmchipN; None: the Raspberry Pi's own, whichever model it is.
    pub chip: Option<u8>,
}

/// The device of an asset on I²C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct I2cDevice {
    pub address: u8,
    /// None: plain registers.
    pub model: Option<Model>,
}

/// A point of an asset on I²C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum I2cPoint {
    Quantity(Quantity),
    Register { register: u8, is_little_endian: bool },
}

/// A point on a PWM channel: its duty cycle in percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PwmPoint {
    pub channel: u8,
    pub period: Duration,
    /// The duty cycle at the start, at the stop and while the uplink it hangs on is lost.
    pub safe_percent: u8,
    pub inverted: bool,
}

/// A chip on I²C, as it is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    Bme280,
    Sht3x,
    Ads1115 { gain: Gain, rate: u16 },
}

/// What a point reads from a sensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// °C
    Temperature,
    /// % relative
    Humidity,
    /// hPa
    Pressure,
    /// V
    Voltage(Input),
}

/// Samples a second that the chip knows, in the order of their code.
pub const RATES: [u16; 8] = [8, 16, 32, 64, 128, 250, 475, 860];

/// How far the inputs are amplified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gain {
    TwoThirds,
    One,
    Two,
    Four,
    Eight,
    Sixteen,
}

impl Gain {
    pub const NAMES: [(&str, Gain); 6] = [
        ("2/3", Gain::TwoThirds),
        ("1", Gain::One),
        ("2", Gain::Two),
        ("4", Gain::Four),
        ("8", Gain::Eight),
        ("16", Gain::Sixteen),
    ];

    /// The voltage of the largest number.
    pub fn full_scale(self) -> f64 {
        match self {
            Gain::TwoThirds => 6.144,
            Gain::One => 4.096,
            Gain::Two => 2.048,
            Gain::Four => 1.024,
            Gain::Eight => 0.512,
            Gain::Sixteen => 0.256,
        }
    }
}

/// An input against ground, or one of the four pairs the chip can compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// 0 to 3.
    Channel(u8),
    Minus01,
    Minus03,
    Minus13,
    Minus23,
}

impl Input {
    const NAMES: [(&str, Input); 8] = [
        ("channel:0", Input::Channel(0)),
        ("channel:1", Input::Channel(1)),
        ("channel:2", Input::Channel(2)),
        ("channel:3", Input::Channel(3)),
        ("channel:0-1", Input::Minus01),
        ("channel:0-3", Input::Minus03),
        ("channel:1-3", Input::Minus13),
        ("channel:2-3", Input::Minus23),
    ];
}

impl Model {
    fn name(self) -> &'static str {
        match self {
            Model::Bme280 => "bme280",
            Model::Sht3x => "sht3x",
            Model::Ads1115 { .. } => "ads1115",
        }
    }

    /// The addresses that the chip's pins can give it.
    fn addresses(self) -> std::ops::RangeInclusive<u8> {
        match self {
            Model::Bme280 => 0x76..=0x77,
            Model::Sht3x => 0x44..=0x45,
            Model::Ads1115 { .. } => 0x48..=0x4b,
        }
    }

    /// What it measures, by the address of a point.
    fn quantities(self) -> Vec<(&'static str, Quantity)> {
        let temperature = ("temperature", Quantity::Temperature);
        let humidity = ("humidity", Quantity::Humidity);
        match self {
            Model::Bme280 => vec![temperature, humidity, ("pressure", Quantity::Pressure)],
            Model::Sht3x => vec![temperature, humidity],
            Model::Ads1115 { .. } => Input::NAMES
                .map(|(name, input)| (name, Quantity::Voltage(input)))
                .to_vec(),
        }
    }
}

impl Checker<'_> {
    pub(super) fn i2c_bus(&mut self, section: &mut Section<'_, '_>) -> Option<I2cBus> {
        let bus = self.i2c_number(section);
        Some(I2cBus {
            timeout: self.bus_timeout(section),
            bus: bus?,
        })
    }

    /// `bus = 1` or `"/dev/i2c-1"`.
    fn i2c_number(&mut self, section: &mut Section<'_, '_>) -> Option<u8> {
        if !section.has("bus") {
            section.missing(&mut self.notes, "bus", "1");
        }
        let value = section.take("bus")?;
        let number = match value.get_ref() {
            DeValue::Integer(_) => integer(value.get_ref()).and_then(|n| u8::try_from(n).ok()),
            DeValue::String(path) => path.strip_prefix("/dev/i2c-").and_then(|n| n.parse().ok()),
            _ => None,
        };
        if number.is_none() {
            let message = format!(
                "bus in {} must be a number from 0 to 255, or a path /dev/i2c-N",
                section.label
            );
            let hint = "write bus = 1 (`tidegate discover i2c` lists the buses)";
            self.notes.fault(Fault::new(value.span(), message).hint(hint));
        }
        number
    }

    fn bus_timeout(&mut self, section: &mut Section<'_, '_>) -> Duration {
        let range = Duration::from_millis(20)..=Duration::from_secs(60);
        let timeout = section.duration(&mut self.notes, "timeout", range);
        timeout.map_or(TIMEOUT, |t| t.value)
    }

    pub(super) fn i2c_device(&mut self, section: &mut Section<'_, '_>) -> Option<Device> {
        let default = Model::Ads1115 {
            gain: Gain::One,
            rate: 128,
        };
        let models = [
            ("bme280", Some(Model::Bme280)),
            ("sht3x", Some(Model::Sht3x)),
            ("ads1115", Some(default)),
            ("mcp3008", None),
        ];
        let mut model = section.choice(&mut self.notes, "sensor", &models);
        if model == Some(None) {
            let span = section.key_span("sensor").unwrap_or(section.header.clone());
            let fault = Fault::new(span, "the mcp3008 is a chip on SPI, not on I²C");
            self.notes.fault(fault.hint("name a [[connector]] of kind = \"spi\""));
        }
        if model == Some(Some(default)) {
            let gain = section.choice(&mut self.notes, "gain", &Gain::NAMES);
            let rate = self.data_rate(section);
            model = Some(Some(Model::Ads1115 {
                gain: gain.unwrap_or(Gain::One),
                rate,
            }));
        }
        let example = match model {
            Some(Some(model)) => format!("{:#04x}", model.addresses().start()),
            Some(None) | None => "0x20".to_owned(),
        };
        if !section.has("device_address") {
            section.missing(&mut self.notes, "device_address", &example);
        }
        let typed = section.integer(&mut self.notes, "device_address", i64::MIN..=i64::MAX)?;
        let Some(address) = u8::try_from(typed).ok().filter(|a| ADDRESSES.contains(a)) else {
            let span = section.key_span("device_address").unwrap_or(section.header.clone());
            let message = format!("device_address in {} must be 0x08 to 0x77", section.label);
            let hint = "7 bits, without the bit for read or write";
            self.notes.fault(Fault::new(span, message).hint(hint));
            return None;
        };
        if let Some(Some(model)) = model
            && !model.addresses().contains(&address)
        {
            let span = section.key_span("device_address").unwrap_or(section.header.clone());
            let (first, last) = (*model.addresses().start(), *model.addresses().end());
            let message = format!(
                "the sensor {} has an address from {first:#04x} to {last:#04x}, not {address:#04x}",
                model.name()
            );
            let hint = "its datasheet says which pin sets it (`tidegate discover i2c --bus N` shows who answers)";
            self.notes.fault(Fault::new(span, message).hint(hint));
        }
        if section.has("sensor") && model.is_none() {
            return None;
        }
        Some(Device::I2c(I2cDevice {
            address,
            model: model.flatten(),
        }))
    }

    fn data_rate(&mut self, section: &mut Section<'_, '_>) -> u16 {
        let rate = section.integer(&mut self.notes, "data_rate", 1..=100_000);
        let found = rate.map(|rate| RATES.iter().copied().find(|r| i64::from(*r) == rate));
        if found == Some(None) {
            let span = section.key_span("data_rate").unwrap_or(section.header.clone());
            let message = format!("data_rate in {} is none that the chip has", section.label);
            let rates = RATES.map(|r| r.to_string()).join(", ");
            self.notes
                .fault(Fault::new(span, message).hint(format!("samples a second: write one of {rates}")));
        }
        found.flatten().unwrap_or(128)
    }

    /// A sensor's quantity (without an address the name says which), or `register:0x10`.
    pub(super) fn i2c_place(
        &mut self,
        point: &mut Section<'_, '_>,
        name: Option<&At<String>>,
        typed: Option<&At<DataType>>,
        device: Option<I2cDevice>,
    ) -> Option<Place> {
        let address = point.string(&mut self.notes, "address", "\"temperature\"");
        let orders = [("big", false), ("little", true)];
        let order = point.choice(&mut self.notes, "byte_order", &orders);
        let Some(model) = device?.model else {
            if !point.has("address") {
                point.missing(&mut self.notes, "address", "\"register:0x10\"");
            }
            return self.register_place(&address?, typed, order.unwrap_or(false));
        };
        if let Some(span) = point.key_span("byte_order") {
            let fault = Fault::new(span, "only a register has a byte_order");
            self.notes.fault(fault.hint("take it out"));
        }
        let wanted = if point.has("address") { address } else { name.cloned() }?;
        let quantities = model.quantities();
        let found = quantities.iter().find(|(known, _)| *known == wanted.value);
        let Some((_, quantity)) = found else {
            let known = || quantities.iter().map(|(known, _)| *known);
            let hint = match nearest(&wanted.value, known()) {
                Some(near) => format!("did you mean address = {near:?}?"),
                None => format!("write address = one of {}", list(known())),
            };
            let message = format!("the sensor {} has no {:?}", model.name(), wanted.value);
            self.notes.fault(Fault::new(wanted.span, message).hint(hint));
            return None;
        };
        let data = self.fixed_type(typed, &[DataType::Float64, DataType::Float32]);
        Some(Place {
            address: Address::I2c(I2cPoint::Quantity(*quantity)),
            data,
            read_only: Some("what a sensor measures cannot be written".to_owned()),
        })
    }

    fn register_place(
        &mut self,
        address: &At<String>,
        typed: Option<&At<DataType>>,
        is_little_endian: bool,
    ) -> Option<Place> {
        let number = address
            .value
            .strip_prefix("register:")
            .and_then(|n| match n.strip_prefix("0x") {
                Some(hex) => u8::from_str_radix(hex, 16).ok(),
                None => n.parse().ok(),
            });
        let Some(register) = number else {
            let message = format!("{:?} is no register of a device on I²C", address.value);
            let hint = "write address = \"register:0x10\" (0 to 0xff), or say which sensor the [[asset]] is";
            self.notes.fault(Fault::new(address.span.clone(), message).hint(hint));
            return None;
        };
        if let Some(At {
            value: DataType::Text { .. },
            span,
        }) = typed
        {
            let fault = Fault::new(span.clone(), "a register of a device on I²C holds no text");
            self.notes.fault(fault.hint("write type = \"uint8\""));
        }
        Some(Place {
            address: Address::I2c(I2cPoint::Register {
                register,
                is_little_endian,
            }),
            data: typed.map_or(DataType::Uint8, |t| t.value),
            read_only: None,
        })
    }

    pub(super) fn spi_bus(&mut self, section: &mut Section<'_, '_>) -> Option<SpiBus> {
        if !section.has("bus") {
            section.missing(&mut self.notes, "bus", "0");
        }
        let mut number = |key, range, default: i64| section.integer(&mut self.notes, key, range).unwrap_or(default);
        let (bus, select) = (number("bus", 0..=6, 0), number("select", 0..=7, 0));
        let (speed, mode) = (
            number("speed", 1_000..=100_000_000, 1_000_000),
            number("mode", 0..=3, 0),
        );
        Some(SpiBus {
            bus: u8::try_from(bus).ok()?,
            select: u8::try_from(select).ok()?,
            speed: u32::try_from(speed).ok()?,
            mode: u8::try_from(mode).ok()?,
            timeout: self.bus_timeout(section),
        })
    }

    pub(super) fn spi_device(&mut self, section: &mut Section<'_, '_>) -> Option<Device> {
        if !section.has("sensor") {
            section.missing(&mut self.notes, "sensor", "\"mcp3008\"");
        }
        section
            .choice(&mut self.notes, "sensor", &[("mcp3008", ())])
            .map(|()| Device::Mcp3008)
    }

    pub(super) fn spi_place(&mut self, point: &mut Section<'_, '_>, typed: Option<&At<DataType>>) -> Option<Place> {
        let channel = self.channel(point, 7);
        let data = self.fixed_type(typed, &[DataType::Uint16]);
        Some(Place {
            address: Address::Channel(channel?),
            data,
            read_only: Some("an input of a converter cannot be written".to_owned()),
        })
    }

    pub(super) fn pwm_chip(&mut self, section: &mut Section<'_, '_>) -> PwmChip {
        let chip = section.integer(&mut self.notes, "chip", 0..=255);
        PwmChip {
            chip: chip.and_then(|c| u8::try_from(c).ok()),
        }
    }

    pub(super) fn pwm_place(&mut self, point: &mut Section<'_, '_>, typed: Option<&At<DataType>>) -> Option<Place> {
        let channel = self.channel(point, 255);
        if !point.has("frequency") {
            point.missing(&mut self.notes, "frequency", "1000");
        }
        let frequency = point.number(&mut self.notes, "frequency", "1000");
        let frequency = frequency.and_then(|frequency| {
            let is_known = (0.1..=10_000_000.0).contains(&frequency.value);
            if !is_known {
                let message = format!("frequency in {} must be 0.1 to 10000000 (Hz)", point.label);
                self.notes.fault(Fault::new(frequency.span, message));
            }
            is_known.then_some(frequency.value)
        });
        let safe = point.integer(&mut self.notes, "safe", 0..=100);
        let inverted = point.boolean(&mut self.notes, "inverted");
        let data = self.fixed_type(typed, &[DataType::Float64, DataType::Float32]);
        Some(Place {
            address: Address::Pwm(PwmPoint {
                channel: channel?,
                period: Duration::from_secs_f64(1.0 / frequency?),
                safe_percent: safe.and_then(|s| u8::try_from(s).ok()).unwrap_or(0),
                inverted: inverted.is_some_and(|i| i.value),
            }),
            data,
            read_only: None,
        })
    }

    /// `address = "channel:N"`.
    fn channel(&mut self, point: &mut Section<'_, '_>, last: u8) -> Option<u8> {
        let address = point.required_string(&mut self.notes, "address", "\"channel:0\"")?;
        let number = address.value.strip_prefix("channel:").and_then(|n| n.parse().ok());
        if let Some(channel) = number.filter(|n| *n <= last) {
            return Some(channel);
        }
        let message = format!("{:?} is no channel", address.value);
        let hint = format!("write address = \"channel:0\" to \"channel:{last}\"");
        self.notes.fault(Fault::new(address.span, message).hint(hint));
        None
    }

    /// The type that was written where it is one of these, else the first.
    fn fixed_type(&mut self, typed: Option<&At<DataType>>, types: &[DataType]) -> DataType {
        match typed {
            Some(typed) if types.contains(&typed.value) => typed.value,
            Some(typed) => {
                let message = format!("the value is a {}, not a {}", types[0].name(), typed.value.name());
                let hint = format!("write type = {:?}, or leave it out", types[0].name());
                self.notes.fault(Fault::new(typed.span.clone(), message).hint(hint));
                types[0]
            }
            None => types[0],
        }
    }
}
