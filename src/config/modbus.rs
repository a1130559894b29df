//! What Modbus alone knows of gateway.toml: the line of a `[[connector]]`, the unit of an `[[asset]]`, the address, the
//! byte order and the write function of a point.

use std::path::PathBuf;
use std::time::Duration;

use toml::de::DeValue;

use super::check::Checker;
use super::fault::Fault;
use super::machines::Place;
use super::read::{At, Section, integer, list, nearest};
use super::{Address, DataType, Device};

/// A connection to one address or serial port, with all the units behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModbusLine {
    pub wire: ModbusWire,
    /// For a connection, and for each answer; 1 s by default.
    pub timeout: Duration,
    /// Silence before each request. RTU: 3.5 characters by default, and never less.
    pub quiet: Duration,
    /// Registers (or bits) that may be read for nothing between two points, to save a request; 8 by default.
    pub gap: u16,
    /// The most registers that one request reads; 125 by default, the protocol's own limit.
    pub registers_max: u16,
    /// The most coils or discrete inputs that one request reads; 2,000 by default, the protocol's own limit.
    pub bits_max: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModbusWire {
    Tcp {
        host: String,
        port: u16,
    },
    /// Frames of a serial line, with their checksums, through a TCP connection.
    RtuTcp {
        host: String,
        port: u16,
    },
    Rtu(SerialLine),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SerialLine {
    pub device: PathBuf,
    pub baud: u32,
    pub parity: Parity,
    pub stop_bits: u8,
    pub data_bits: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parity {
    None,
    Even,
    Odd,
}

/// Where a point is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModbusAddress {
    pub table: Table,
    /// As on the wire: counted from 0.
    pub start: u16,
    /// Some bits of a register: the lowest of them and how many.
    pub bits: Option<(u8, u8)>,
    pub order: ByteOrder,
    pub write: WriteFunction,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    Coil,
    Discrete,
    Input,
    Holding,
}

/// How the bytes of a value lie in its registers, told by those of a 32-bit value, of which A is the highest. Values of
/// 16 and 64 bits and texts follow the same rule: whether words come lowest first, and whether bytes are swapped in them
/// (of a text only the bytes: its words always come in order).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ByteOrder {
    #[default]
    Abcd,
    Cdab,
    Badc,
    Dcba,
}

/// The function that a write uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteFunction {
    /// 5: one coil.
    Coil,
    /// 6: one register.
    Register,
    /// 15: coils.
    Coils,
    /// 16: registers.
    Registers,
    /// 22: bits of a register, and no other.
    Mask,
    /// 23: registers, which the same request reads again.
    ReadWrite,
    /// Bits of a register where the device knows no 22: what somebody else writes into the register meanwhile is lost.
    ReadModifyWrite,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ModbusKind {
    Tcp,
    Rtu,
    RtuTcp,
}

const PORT: u16 = 502;
const TCP_EXAMPLE: &str = "\"192.0.2.10:502\"";
const SERIAL_EXAMPLE: &str = "\"/dev/ttyUSB0\"";
const ADDRESS_EXAMPLE: &str = "\"holding:0\"";
const ORDERS: [(&str, ByteOrder); 4] = [
    ("ABCD", ByteOrder::Abcd),
    ("CDAB", ByteOrder::Cdab),
    ("BADC", ByteOrder::Badc),
    ("DCBA", ByteOrder::Dcba),
];
/// A write of registers has a longer head than a read: so many fit.
const WRITE_REGISTERS_MAX: u16 = 123;
const READ_WRITE_REGISTERS_MAX: u16 = 121;

impl Table {
    pub const NAMES: [(&str, Table); 4] = [
        ("coil", Table::Coil),
        ("discrete", Table::Discrete),
        ("input", Table::Input),
        ("holding", Table::Holding),
    ];

    pub fn name(self) -> &'static str {
        match self {
            Table::Coil => "coil",
            Table::Discrete => "discrete",
            Table::Input => "input",
            Table::Holding => "holding",
        }
    }

    /// Of single bits, not of registers.
    pub fn is_bits(self) -> bool {
        matches!(self, Table::Coil | Table::Discrete)
    }
}

impl ByteOrder {
    /// The lowest word comes first.
    pub fn words_are_reversed(self) -> bool {
        matches!(self, ByteOrder::Cdab | ByteOrder::Dcba)
    }

    /// The lower byte of a word comes first.
    pub fn bytes_are_swapped(self) -> bool {
        matches!(self, ByteOrder::Badc | ByteOrder::Dcba)
    }
}

impl ModbusAddress {
    /// Registers or bits that a value of this type takes.
    pub fn width(&self, data: DataType) -> u16 {
        match data {
            _ if self.table.is_bits() || self.bits.is_some() => 1,
            DataType::Bool | DataType::Int8 | DataType::Uint8 | DataType::Int16 | DataType::Uint16 => 1,
            DataType::Int32 | DataType::Uint32 | DataType::Float32 => 2,
            DataType::Int64 | DataType::Uint64 | DataType::Float64 => 4,
            DataType::Text { bytes } => bytes.div_ceil(2),
        }
    }
}

/// `holding:10.4-7`, as it is written in gateway.toml.
impl std::fmt::Display for ModbusAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.table.name(), self.start)?;
        match self.bits {
            None => Ok(()),
            Some((first, 1)) => write!(f, ".{first}"),
            Some((first, count)) => write!(f, ".{first}-{}", first + count - 1),
        }
    }
}

impl std::fmt::Display for ModbusWire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ModbusWire::Tcp { host, port } | ModbusWire::RtuTcp { host, port } if host.contains(':') => {
                write!(f, "[{host}]:{port}")
            }
            ModbusWire::Tcp { host, port } | ModbusWire::RtuTcp { host, port } => write!(f, "{host}:{port}"),
            ModbusWire::Rtu(serial) => serial.device.display().fmt(f),
        }
    }
}

impl ModbusWire {
    /// One answer at a time can be on its way, and nothing in it says which request it belongs to.
    pub fn is_serial(&self) -> bool {
        !matches!(self, ModbusWire::Tcp { .. })
    }
}

impl ModbusLine {
    pub const TIMEOUT: Duration = Duration::from_secs(1);
    pub const GAP: u16 = 8;
    pub const REGISTERS_MAX: u16 = 125;
    pub const BITS_MAX: u16 = 2_000;

    /// With nothing but defaults.
    pub fn new(wire: ModbusWire) -> ModbusLine {
        ModbusLine {
            quiet: quiet(&wire),
            wire,
            timeout: ModbusLine::TIMEOUT,
            gap: ModbusLine::GAP,
            registers_max: ModbusLine::REGISTERS_MAX,
            bits_max: ModbusLine::BITS_MAX,
        }
    }
}

impl SerialLine {
    /// 19,200 baud and even parity, as the standard of Modbus has it.
    pub fn new(device: PathBuf) -> SerialLine {
        SerialLine {
            device,
            baud: 19_200,
            parity: Parity::Even,
            stop_bits: 1,
            data_bits: 8,
        }
    }

    /// How long one character takes.
    pub fn character(&self) -> Duration {
        let bits = 1 + self.data_bits + u8::from(self.parity != Parity::None) + self.stop_bits;
        Duration::from_secs_f64(f64::from(bits) / f64::from(self.baud.max(1)))
    }
}

/// 3.5 characters, or 1.75 ms above 19,200 baud, as the standard has it.
fn quiet(wire: &ModbusWire) -> Duration {
    match wire {
        ModbusWire::Rtu(serial) if serial.baud <= 19_200 => serial.character().mul_f64(3.5),
        ModbusWire::Rtu(_) => Duration::from_micros(1_750),
        ModbusWire::Tcp { .. } | ModbusWire::RtuTcp { .. } => Duration::ZERO,
    }
}

/// `host`, `host:port`, `[::1]:port`; or why not.
pub fn parse_host(text: &str) -> Result<(String, u16), String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, rest) = rest.split_once(']').ok_or("the [ has no ]")?;
            if host.parse::<std::net::Ipv6Addr>().is_err() {
                return Err(format!("{host:?} is not an IPv6 address"));
            }
            match rest.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if rest.is_empty() => (host, None),
                None => return Err(format!("{rest:?} stands after the ]")),
            }
        }
        None if text.parse::<std::net::Ipv6Addr>().is_ok() => (text, None),
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    if host.is_empty() {
        return Err("it has no host".to_owned());
    }
    let odd = |c: char| !(c.is_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%'));
    if let Some(odd) = host.chars().find(|c| odd(*c)) {
        return Err(format!("it has the character {odd:?} in its host"));
    }
    let port = match port.map(str::parse::<u16>) {
        None => PORT,
        Some(Ok(port)) if port > 0 => port,
        Some(_) => return Err("its port is not a number from 1 to 65535".to_owned()),
    };
    Ok((host.to_owned(), port))
}

/// The table, the address in it from 0 and, of a bit field, its first and last bit.
type Parsed = (Table, u16, Option<(u8, u8)>);

/// `holding:10`, `input:0x1F`, `holding:10.3`, `holding:10.4-7`; or five or six digits in the way of the manuals, which
/// count from 1: 40011 (or 400011) is holding:10, and 40011.3 its bit 3.
fn parse_address(text: &str) -> Result<Parsed, String> {
    let (place, bits) = match text.split_once('.') {
        Some((place, bits)) => (place, Some(bits)),
        None => (text, None),
    };
    let number = |text: &str| match text.strip_prefix("0x") {
        Some(hex) if !hex.starts_with('+') => u16::from_str_radix(hex, 16).ok(),
        None if text.chars().all(|c| c.is_ascii_digit()) => text.parse::<u16>().ok(),
        _ => None,
    };
    let (table, start) = match place.split_once(':') {
        Some((table, start)) => {
            let names = || Table::NAMES.iter().map(|(name, _)| *name);
            let Some((_, table)) = Table::NAMES.iter().find(|(name, _)| *name == table) else {
                return Err(match nearest(table, names()) {
                    Some(near) => format!("did you mean {near:?}?"),
                    None => format!("there are {}", list(names())),
                });
            };
            let start = number(start).ok_or("the number behind the : is 0 to 65535, counted from 0")?;
            (*table, start)
        }
        None => {
            let classic = "write holding:0, input:0, coil:0 or discrete:0, counted from 0; or five or six digits, \
                           counted from 1: 40001 is holding:0";
            if !matches!(place.len(), 5 | 6) || !place.chars().all(|c| c.is_ascii_digit()) {
                return Err(classic.to_owned());
            }
            let (table, number) = place.split_at(1);
            let table = match table {
                "0" => Table::Coil,
                "1" => Table::Discrete,
                "3" => Table::Input,
                "4" => Table::Holding,
                _ => return Err(classic.to_owned()),
            };
            let number = number.parse::<u32>().ok().and_then(|n| n.checked_sub(1));
            let start = number.and_then(|n| u16::try_from(n).ok());
            (table, start.ok_or("such numbers count from 1 to 65536")?)
        }
    };
    let Some(bits) = bits else {
        return Ok((table, start, None));
    };
    if table.is_bits() {
        return Err(format!(
            "a {} is a bit already: write {}:{start}",
            table.name(),
            table.name()
        ));
    }
    let bit = |text: &str| number(text).and_then(|n| u8::try_from(n).ok()).filter(|b| *b < 16);
    let range = match bits.split_once('-') {
        Some((first, last)) => bit(first).zip(bit(last)).filter(|(first, last)| first <= last),
        None => bit(bits).map(|b| (b, b)),
    };
    let (first, last) = range.ok_or("bits are counted from 0, the lowest, to 15: holding:10.3 or holding:10.4-7")?;
    Ok((table, start, Some((first, last - first + 1))))
}

impl Checker<'_> {
    pub(super) fn modbus_line(&mut self, section: &mut Section<'_, '_>, kind: ModbusKind) -> Option<ModbusLine> {
        let wire = match kind {
            ModbusKind::Tcp => self
                .modbus_host(section)
                .map(|(host, port)| ModbusWire::Tcp { host, port }),
            ModbusKind::RtuTcp => self
                .modbus_host(section)
                .map(|(host, port)| ModbusWire::RtuTcp { host, port }),
            ModbusKind::Rtu => self.serial_line(section).map(ModbusWire::Rtu),
        };
        let millis = Duration::from_millis;
        let notes = &mut self.notes;
        let timeout = section.duration(notes, "timeout", millis(10)..=millis(60_000));
        let quiet = section.duration(notes, "quiet", Duration::ZERO..=millis(10_000));
        let gap = section.integer(notes, "max_gap", 0..=124);
        let registers_max = section.integer(notes, "max_registers", 1..=i64::from(ModbusLine::REGISTERS_MAX));
        let bits_max = section.integer(notes, "max_coils", 1..=i64::from(ModbusLine::BITS_MAX));
        let mut line = ModbusLine::new(wire?);
        let small = |n: Option<i64>, default| n.and_then(|n| u16::try_from(n).ok()).unwrap_or(default);
        line.timeout = timeout.map_or(line.timeout, |t| t.value);
        line.quiet = quiet.map_or(line.quiet, |q| q.value.max(line.quiet));
        line.gap = small(gap, line.gap);
        line.registers_max = small(registers_max, line.registers_max);
        line.bits_max = small(bits_max, line.bits_max);
        Some(line)
    }

    fn modbus_host(&mut self, section: &mut Section<'_, '_>) -> Option<(String, u16)> {
        let address = section.required_string(&mut self.notes, "address", TCP_EXAMPLE)?;
        match parse_host(&address.value) {
            Ok(found) => Some(found),
            Err(why) => {
                let message = format!("{:?} is not an address: {why}", address.value);
                let hint = format!("write a host and, where it is not 502, a port: {TCP_EXAMPLE}");
                self.notes.fault(Fault::new(address.span, message).hint(hint));
                None
            }
        }
    }

    fn serial_line(&mut self, section: &mut Section<'_, '_>) -> Option<SerialLine> {
        if !section.has("device") {
            section.missing(&mut self.notes, "device", SERIAL_EXAMPLE);
        }
        let device = self.path(section, "device", SERIAL_EXAMPLE);
        let notes = &mut self.notes;
        let baud = section.integer(notes, "baud", 50..=4_000_000);
        let parities = [("none", Parity::None), ("even", Parity::Even), ("odd", Parity::Odd)];
        let parity = section.choice(notes, "parity", &parities);
        let stop_bits = section.integer(notes, "stop_bits", 1..=2);
        let data_bits = section.integer(notes, "data_bits", 7..=8);
        if data_bits == Some(7) {
            let span = section.key_span("data_bits").unwrap_or_default();
            let fault = Fault::new(
                span,
                "Modbus RTU needs 8 data bits; 7 are of Modbus ASCII, which is not spoken here",
            );
            notes.fault(fault.hint("take data_bits out"));
        }
        let mut line = SerialLine::new(device?.value);
        let small = |n: Option<i64>, default| n.and_then(|n| u8::try_from(n).ok()).unwrap_or(default);
        line.baud = baud.and_then(|b| u32::try_from(b).ok()).unwrap_or(line.baud);
        line.parity = parity.unwrap_or(line.parity);
        line.stop_bits = small(stop_bits, 1);
        Some(line)
    }

    /// `unit_id`, and the `order` that points have where they say nothing else.
    pub(super) fn modbus_device(
        &mut self,
        section: &mut Section<'_, '_>,
        kind: ModbusKind,
    ) -> (Option<Device>, ByteOrder) {
        let order = section.choice(&mut self.notes, "order", &ORDERS).unwrap_or_default();
        if !section.has("unit_id") {
            section.missing(&mut self.notes, "unit_id", "1");
        }
        let unit = section.integer(&mut self.notes, "unit_id", 0..=255);
        if unit == Some(0) && kind != ModbusKind::Tcp {
            let span = section.key_span("unit_id").unwrap_or_default();
            let fault = Fault::new(
                span,
                "unit 0 of a serial line means all devices, and none of them answers",
            );
            self.notes.fault(fault.hint("write the unit's own number, 1 to 247"));
            return (None, order);
        }
        let unit = unit.and_then(|u| u8::try_from(u).ok());
        (unit.map(|unit| Device::Modbus { unit }), order)
    }

    pub(super) fn modbus_place(
        &mut self,
        point: &mut Section<'_, '_>,
        typed: Option<&At<DataType>>,
        order: ByteOrder,
    ) -> Option<Place> {
        let address = self.modbus_address(point);
        let write = self.write_function(point);
        let order_typed = point.choice(&mut self.notes, "order", &ORDERS);
        let has_type = point.has("type");
        let (address, at) = address?;
        let (table, start, bits) = address;
        let data = match typed {
            Some(typed) => typed.value,
            // Wrong, and said already.
            None if has_type => return None,
            None if table.is_bits() || bits.is_some_and(|(_, count)| count == 1) => DataType::Bool,
            None => DataType::Uint16,
        };
        let type_span = typed.map_or(at.span.clone(), |t| t.span.clone());
        let mut refuse = |message: String, hint: String| {
            self.notes.fault(Fault::new(type_span.clone(), message).hint(hint));
            None
        };
        let is_small = matches!(data, DataType::Int8 | DataType::Uint8);
        match bits {
            _ if table.is_bits() && data != DataType::Bool => {
                let message = format!("a {} is a bit, and no {}", table.name(), data.name());
                return refuse(message, "write type = \"bool\", or leave it out".to_owned());
            }
            Some((_, count)) if data == DataType::Bool && count != 1 => {
                let message = format!("{count} bits are no bool");
                return refuse(message, "name one bit, or write type = \"uint16\"".to_owned());
            }
            Some((_, count)) if !(data == DataType::Bool || data.range().is_some()) || (is_small && count > 8) => {
                let message = format!("{count} bits of a register are no {}", data.name());
                return refuse(message, "bits are bool (one of them) or of an integer type".to_owned());
            }
            None if !table.is_bits() && data == DataType::Bool => {
                let message = "a register has 16 bits: the address does not say which of them".to_owned();
                return refuse(
                    message,
                    format!("write address = \"{}:{start}.0\" for the lowest", table.name()),
                );
            }
            None if is_small => {
                let message = format!("a register has 16 bits, {} has 8", data.name());
                let name = table.name();
                let hint = format!("write type = \"int16\", or address = \"{name}:{start}.0-7\" for the lower byte");
                return refuse(message, hint);
            }
            _ => {}
        }
        let mut address = ModbusAddress {
            table,
            start,
            bits,
            order: order_typed.unwrap_or(order),
            write: WriteFunction::Register,
        };
        let width = address.width(data);
        if !table.is_bits() && width > ModbusLine::REGISTERS_MAX {
            let message = format!("a text of {} registers does not fit into one request", width);
            return refuse(message, "250 bytes are the most: length = 250".to_owned());
        }
        if u32::from(start) + u32::from(width) > 0x1_0000 {
            return refuse(
                format!("{address} and what follows goes beyond 65535"),
                "look at the number again".to_owned(),
            );
        }
        if table.is_bits() && order_typed.is_some() {
            let span = point.key_span("order").unwrap_or(at.span.clone());
            self.notes
                .fault(Fault::new(span, format!("a {} is a bit and has no order", table.name())).hint("take it out"));
        }
        let read_only = match table {
            Table::Discrete | Table::Input => {
                Some(format!("{address} can only be read: writable are coil and holding"))
            }
            Table::Coil | Table::Holding => None,
        };
        address.write = self.write_function_of(&address, width, data, write, &at);
        Some(Place {
            address: Address::Modbus(address),
            data,
            read_only,
        })
    }

    #[allow(clippy::type_complexity)]
    fn modbus_address(&mut self, point: &mut Section<'_, '_>) -> Option<((Table, u16, Option<(u8, u8)>), At<()>)> {
        let Some(value) = point.take("address") else {
            point.missing(&mut self.notes, "address", ADDRESS_EXAMPLE);
            return None;
        };
        let text = match value.get_ref() {
            DeValue::String(text) if !self.notes.is_one_line(text, value.span()) => return None,
            DeValue::String(text) => text.clone().into_owned(),
            // 40001 without quotes.
            DeValue::Integer(number) if number.radix() == 10 => number.as_str().to_owned(),
            _ => {
                point.wrong(&mut self.notes, "address", value, "a string", ADDRESS_EXAMPLE);
                return None;
            }
        };
        match parse_address(&text) {
            Ok(found) => Some((
                found,
                At {
                    value: (),
                    span: value.span(),
                },
            )),
            Err(hint) => {
                let message = format!("{text:?} is not an address of Modbus");
                self.notes.fault(Fault::new(value.span(), message).hint(hint));
                None
            }
        }
    }

    /// `write_function = 16`, or a text of it, as cells of a table are; or `"read-modify-write"`.
    fn write_function(&mut self, point: &mut Section<'_, '_>) -> Option<At<WriteFunction>> {
        let value = point.take("write_function")?;
        let number = match value.get_ref() {
            DeValue::String(text) if text == "read-modify-write" => {
                return Some(At {
                    value: WriteFunction::ReadModifyWrite,
                    span: value.span(),
                });
            }
            DeValue::String(text) => text.parse().ok(),
            other => integer(other),
        };
        let function = match number {
            Some(5) => WriteFunction::Coil,
            Some(6) => WriteFunction::Register,
            Some(15) => WriteFunction::Coils,
            Some(16) => WriteFunction::Registers,
            Some(22) => WriteFunction::Mask,
            Some(23) => WriteFunction::ReadWrite,
            _ => {
                let message = format!("write_function in {} is not one that writes", point.label);
                let hint =
                    "write 5 or 15 (coils), 6, 16 or 23 (registers), 22 or \"read-modify-write\" (bits of a register)";
                self.notes.fault(Fault::new(value.span(), message).hint(hint));
                return None;
            }
        };
        Some(At {
            value: function,
            span: value.span(),
        })
    }

    fn write_function_of(
        &mut self,
        address: &ModbusAddress,
        width: u16,
        data: DataType,
        typed: Option<At<WriteFunction>>,
        at: &At<()>,
    ) -> WriteFunction {
        use WriteFunction::{Coil, Coils, Mask, ReadModifyWrite, ReadWrite, Register, Registers};
        let fitting: &[(WriteFunction, &str)] = match (address.table.is_bits(), address.bits, width) {
            (true, _, _) => &[(Coil, "5"), (Coils, "15")],
            (false, Some(_), _) => &[(Mask, "22"), (ReadModifyWrite, "\"read-modify-write\"")],
            (false, None, 1) => &[(Register, "6"), (Registers, "16"), (ReadWrite, "23")],
            (false, None, _) => &[(Registers, "16"), (ReadWrite, "23")],
        };
        let default = fitting[0].0;
        let Some(typed) = typed else { return default };
        if !fitting.iter().any(|(function, _)| *function == typed.value) {
            let names: Vec<&str> = fitting.iter().map(|(_, name)| *name).collect();
            let message = format!("this function cannot write {address} as {}", data.name());
            let fault = Fault::new(typed.span, message).hint(format!("write {}, or leave it out", names.join(" or ")));
            self.notes.fault(fault);
            return default;
        }
        let most = match typed.value {
            ReadWrite => READ_WRITE_REGISTERS_MAX,
            Registers => WRITE_REGISTERS_MAX,
            Coil | Register | Coils | Mask | ReadModifyWrite => u16::MAX,
        };
        if width > most {
            let message = format!("one request writes {most} registers, {address} has {width}");
            self.notes
                .fault(Fault::new(at.span.clone(), message).hint("make the text shorter"));
        }
        typed.value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_meant() {
        use Table::{Coil, Discrete, Holding, Input};
        let table = [
            ("holding:0", (Holding, 0, None)),
            ("input:65535", (Input, 65_535, None)),
            ("coil:3", (Coil, 3, None)),
            ("discrete:7", (Discrete, 7, None)),
            ("holding:0x1F", (Holding, 31, None)),
            ("holding:10.3", (Holding, 10, Some((3, 1)))),
            ("holding:10.4-7", (Holding, 10, Some((4, 4)))),
            ("holding:10.0-15", (Holding, 10, Some((0, 16)))),
            ("00001", (Coil, 0, None)),
            ("10008", (Discrete, 7, None)),
            ("30004", (Input, 3, None)),
            ("40001", (Holding, 0, None)),
            ("400001", (Holding, 0, None)),
            ("465536", (Holding, 65_535, None)),
            ("40011.3", (Holding, 10, Some((3, 1)))),
        ];
        for (text, expected) in table {
            assert_eq!(parse_address(text), Ok(expected), "{text}");
        }
        for text in [
            "",
            "holding",
            "holding:",
            "holding:65536",
            "holding:-1",
            "holding:+1",
            "holding:0x",
            "holding:0x+1",
            "hold:1",
            "40000",
            "465537",
            "4001",
            "20001",
            "4000001",
            "holding:1.16",
            "holding:1.",
            "holding:1.7-4",
            "holding:1.3-",
            "coil:1.0",
            "holdíng:1",
            "é0001",
            "holding 1",
        ] {
            assert!(parse_address(text).is_err(), "{text}");
        }
    }

    #[test]
    fn hosts_have_a_port() {
        let table = [
            ("192.0.2.1", ("192.0.2.1", 502)),
            ("plc.example:1502", ("plc.example", 1502)),
            ("[::1]:5020", ("::1", 5020)),
            ("::1", ("::1", 502)),
            ("[::1]", ("::1", 502)),
        ];
        for (text, (host, port)) in table {
            assert_eq!(parse_host(text), Ok((host.to_owned(), port)), "{text}");
        }
        for text in [
            "", ":502", "a:0", "a:70000", "a:b", "[::1", "[x]:1", "[::1]1", "tcp://a", "a b", "a:1:2",
        ] {
            assert!(parse_host(text).is_err(), "{text}");
        }
    }

    #[test]
    fn silence_follows_the_baud_rate() {
        let mut serial = SerialLine::new("/dev/x".into());
        assert_eq!(serial.character(), Duration::from_secs_f64(11.0 / 19_200.0));
        serial.baud = 9_600;
        serial.parity = Parity::None;
        let line = ModbusLine::new(ModbusWire::Rtu(serial.clone()));
        assert_eq!(line.quiet.as_micros(), 3_645);
        serial.baud = 115_200;
        assert_eq!(
            ModbusLine::new(ModbusWire::Rtu(serial)).quiet,
            Duration::from_micros(1_750)
        );
    }
}
