//! `[[connector]]` and `[[asset]]`: what all kinds have in common. What a kind alone knows is asked of it by name.

use std::sync::Arc;
use std::time::Duration;

use toml::de::DeValue;

use super::buses::I2cDevice;
use super::check::{Checker, Names, line_starts};
use super::fault::{Fault, OtherFile, Page};
use super::modbus::{ByteOrder, ModbusKind};
use super::points_file;
use super::read::{At, Section, Span, kind_of, list, nearest};
use super::{Address, Asset, Connector, ConnectorKind, DataType, Device, Limits, Payload, Point, SafeUplink, Signal};
use crate::message::Topic;

/// The kinds there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Simulator,
    Modbus(ModbusKind),
    Gpio,
    I2c,
    Spi,
    Pwm,
}

const KINDS: [(&str, Kind); 8] = [
    ("simulator", Kind::Simulator),
    ("modbus-tcp", Kind::Modbus(ModbusKind::Tcp)),
    ("modbus-rtu", Kind::Modbus(ModbusKind::Rtu)),
    ("modbus-rtu-tcp", Kind::Modbus(ModbusKind::RtuTcp)),
    ("gpio", Kind::Gpio),
    ("i2c", Kind::I2c),
    ("spi", Kind::Spi),
    ("pwm", Kind::Pwm),
];
/// Kinds that are planned and named in the documentation, but not in this version.
const KINDS_LATER: [&str; 1] = ["http"];
const POINTS_EXAMPLE: &str = "[{ name = \"temperature\", unit = \"°C\" }]";
const POINTS_MAX: usize = 10_000;
const EVERY: Duration = Duration::from_secs(1);
const SILENCE_MAX: Duration = Duration::from_secs(60);
const COMMAND_AGE_MAX: Duration = Duration::from_secs(60);
const SAFE_AFTER: Duration = Duration::from_secs(10);
const DAY: Duration = Duration::from_secs(86_400);

/// The checked connectors and assets.
#[derive(Default)]
pub(super) struct Machines {
    pub connectors: Vec<Connector>,
    pub assets: Vec<Asset>,
}

/// A connector that is named in the file, be it right or wrong; the kind is None where it is unknown.
struct Named {
    name: String,
    kind: Option<Kind>,
}

/// Where a point is, what it holds, and why it cannot be written, where that is so.
pub(super) struct Place {
    pub address: Address,
    pub data: DataType,
    pub read_only: Option<String>,
}

/// What the points of an asset inherit.
#[derive(Clone, Copy)]
struct Parent {
    kind: Kind,
    every: Duration,
    i2c: Option<I2cDevice>,
    /// Of Modbus.
    order: ByteOrder,
}

impl Machines {
    pub fn check(checker: &mut Checker<'_>, root: &mut Section<'_, '_>, uplinks: &[&str]) -> Machines {
        let mut machines = Machines::default();
        let mut named = Vec::new();
        let mut headers = Vec::new();
        let mut names = Names::new("[[connector]]");
        for mut section in checker.tables(root, "connector") {
            let name = checker.name(&mut section, "\"boiler-sim\"");
            if let Some(name) = &name {
                names.add(checker, name.clone());
            }
            let kind = checker.kind(&mut section, &KINDS, &KINDS_LATER);
            let name = name.map_or_else(String::new, |n| n.value);
            named.push(Named {
                name: name.clone(),
                kind,
            });
            let Some(kind) = kind else { continue };
            let header = section.header.clone();
            headers.push((header.clone(), name.clone()));
            let connector = checker.connector(section, name, kind, uplinks);
            if let Some(connector) = &connector {
                checker.has_its_own_line(connector, &machines.connectors, header);
            }
            machines.connectors.extend(connector);
        }
        let mut names = Names::new("[[asset]]");
        for section in checker.tables(root, "asset") {
            machines.assets.extend(checker.asset(section, &named, &mut names));
        }
        for (header, name) in headers {
            if !machines.assets.iter().any(|a| a.connector == name) {
                let message = format!("[[connector]] {name:?} reads nothing: no [[asset]] names it");
                let hint = format!("add an [[asset]] with connector = {name:?}");
                checker.notes.warn(Fault::new(header, message).hint(hint));
            }
        }
        machines
    }
}

impl Checker<'_> {
    fn connector(
        &mut self,
        mut section: Section<'_, '_>,
        name: String,
        kind: Kind,
        uplinks: &[&str],
    ) -> Option<Connector> {
        let second = Duration::from_secs(1);
        let age = section.duration(&mut self.notes, "command_max_age", second..=30 * DAY);
        let safe_uplink = section.string(&mut self.notes, "safe_uplink", "\"cloud\"");
        let safe_after = section.duration(&mut self.notes, "safe_after", second..=DAY);
        if let Some(uplink) = &safe_uplink
            && !uplinks.contains(&uplink.value.as_str())
        {
            let hint = match nearest(&uplink.value, uplinks.iter().copied()) {
                Some(near) => format!("did you mean {near:?}?"),
                None if uplinks.is_empty() => format!("add an [[uplink]] with name = {:?}", uplink.value),
                None => format!("there are {}", list(uplinks.iter().copied())),
            };
            let message = format!("there is no [[uplink]] {:?}", uplink.value);
            self.notes
                .fault(Fault::new(uplink.span.clone(), message).hint(hint).dependent());
        }
        if let (Some(after), false) = (&safe_after, section.has("safe_uplink")) {
            let fault = Fault::new(after.span.clone(), "safe_after needs a safe_uplink");
            self.notes
                .fault(fault.hint("add safe_uplink = \"NAME\" of the [[uplink]] that outputs hang on"));
        }
        // Which other keys there are depends on the kind.
        let kind = match kind {
            Kind::Simulator => Some(ConnectorKind::Simulator),
            Kind::Gpio => self.gpio_chip(&mut section).map(ConnectorKind::Gpio),
            Kind::I2c => self.i2c_bus(&mut section).map(ConnectorKind::I2c),
            Kind::Spi => self.spi_bus(&mut section).map(ConnectorKind::Spi),
            Kind::Pwm => Some(ConnectorKind::Pwm(self.pwm_chip(&mut section))),
            Kind::Modbus(kind) => {
                (self.modbus_line(&mut section, kind)).map(|line| ConnectorKind::Modbus(Box::new(line)))
            }
        };
        section.finish(&mut self.notes);
        Some(Connector {
            name,
            kind: kind?,
            command_age_max: age.map_or(COMMAND_AGE_MAX, |a| a.value),
            safe_uplink: safe_uplink.map(|uplink| SafeUplink {
                name: uplink.value,
                after: safe_after.map_or(SAFE_AFTER, |a| a.value),
            }),
        })
    }

    /// Two connectors of one address or port would talk into each other.
    fn has_its_own_line(&mut self, connector: &Connector, others: &[Connector], header: Span) {
        let line = |c: &Connector| match &c.kind {
            ConnectorKind::Modbus(line) => Some(line.wire.to_string()),
            // The kernel shares out the lines of a chip and the transfers of a bus.
            ConnectorKind::Simulator
            | ConnectorKind::Gpio(_)
            | ConnectorKind::I2c(_)
            | ConnectorKind::Spi(_)
            | ConnectorKind::Pwm(_) => None,
        };
        let Some(ours) = line(connector) else { return };
        if let Some(other) = others.iter().find(|c| line(c).as_ref() == Some(&ours)) {
            let message = format!("{ours} is that of [[connector]] {:?} as well", other.name);
            let hint = format!("one connector a line: let the assets name connector = {:?}", other.name);
            self.notes.fault(Fault::new(header, message).hint(hint));
        }
    }

    fn asset(&mut self, mut section: Section<'_, '_>, named: &[Named], names: &mut Names) -> Option<Asset> {
        let name = section.required_string(&mut self.notes, "name", "\"line-4/boiler\"");
        let mut topic = None;
        if let Some(name) = &name {
            section.label = format!("[[asset]] {:?}", name.value);
            let levels_are_full = name.value.split('/').all(|level| !level.is_empty());
            let hint = "the name is the topic after data/: levels with a / between them, without + and #";
            match Topic::new(format!("data/{}", name.value)) {
                Ok(valid) if levels_are_full => topic = Some(valid),
                Ok(_) => {
                    let message = format!("{:?} cannot be an asset's name: it has an empty level", name.value);
                    self.notes.fault(Fault::new(name.span.clone(), message).hint(hint));
                }
                Err(error) => {
                    let message = format!("{:?} cannot be an asset's name: {error}", name.value);
                    self.notes.fault(Fault::new(name.span.clone(), message).hint(hint));
                }
            }
            names.add(self, name.clone());
        }
        let connector = section.required_string(&mut self.notes, "connector", "\"boiler-sim\"");
        let found = connector
            .as_ref()
            .and_then(|c| named.iter().find(|n| n.name == c.value));
        if let (Some(connector), None) = (&connector, found) {
            let known = || named.iter().map(|n| n.name.as_str()).filter(|n| !n.is_empty());
            let hint = match nearest(&connector.value, known()) {
                Some(near) => format!("did you mean {near:?}?"),
                None if known().next().is_none() => format!("add a [[connector]] with name = {:?}", connector.value),
                None => format!("there are {}", list(known())),
            };
            let message = format!("there is no [[connector]] {:?}", connector.value);
            self.notes
                .fault(Fault::new(connector.span.clone(), message).hint(hint).dependent());
        }
        let millis = Duration::from_millis;
        let every = section.duration(&mut self.notes, "every", millis(10)..=DAY);
        let every = every.map_or(EVERY, |e| e.value);
        let silence = section.duration(&mut self.notes, "max_silence", millis(100)..=30 * DAY);
        let report = section.choice(&mut self.notes, "report", &[("always", false), ("change", true)]);
        let shapes = [("values", Payload::Values), ("aio", Payload::Aio)];
        let payload = section.choice(&mut self.notes, "payload", &shapes);
        // Which other keys there are depends on the connector's kind.
        let kind = found?.kind?;
        let mut order = ByteOrder::default();
        let device = match kind {
            Kind::Simulator => self.simulator_device(&mut section),
            Kind::Modbus(kind) => {
                let (device, typed) = self.modbus_device(&mut section, kind);
                order = typed;
                device
            }
            Kind::Gpio | Kind::Pwm => Some(Device::Pins),
            Kind::I2c => self.i2c_device(&mut section),
            Kind::Spi => self.spi_device(&mut section),
        };
        let i2c = match &device {
            Some(Device::I2c(device)) => Some(*device),
            _ => None,
        };
        // Points are looked at even where the device is wrong, so that all faults come at once.
        let parent = Parent {
            kind,
            every,
            i2c,
            order,
        };
        let points = self.points(&mut section, parent);
        section.finish(&mut self.notes);
        Some(Asset {
            name: name?.value,
            topic: topic?,
            connector: connector?.value,
            every,
            silence_max: silence.map_or(SILENCE_MAX, |s| s.value),
            on_change: report.unwrap_or(false),
            payload: payload.unwrap_or(Payload::Values),
            device: device?,
            points: points.into(),
        })
    }

    fn simulator_device(&mut self, section: &mut Section<'_, '_>) -> Option<Device> {
        if section.take("unit_id").is_some() {
            let span = section.key_span("unit_id").unwrap_or_default();
            self.notes
                .fault(Fault::new(span, "a simulator has no unit_id").hint("take it out"));
        }
        Some(Device::Simulator)
    }

    /// `points` in place or `points_file`.
    fn points(&mut self, section: &mut Section<'_, '_>, parent: Parent) -> Vec<Point> {
        let path = self.path(section, "points_file", "\"boiler.csv\"");
        let value = section.take("points");
        if let (Some(value), true) = (value, section.has("points_file")) {
            let message = format!("{} has both points and a points_file", section.label);
            self.notes
                .fault(Fault::new(value.span(), message).hint("take one of them out"));
            return Vec::new();
        }
        if let Some(path) = path {
            return self.points_of_file(section, &path, parent);
        }
        let Some(value) = value else {
            if !section.has("points_file") {
                section.missing(&mut self.notes, "points", POINTS_EXAMPLE);
            }
            return Vec::new();
        };
        let DeValue::Array(items) = value.get_ref() else {
            section.wrong(&mut self.notes, "points", value, "a list", POINTS_EXAMPLE);
            return Vec::new();
        };
        if items.is_empty() || items.len() > POINTS_MAX {
            let fault = match items.len() {
                0 => Fault::new(value.span(), format!("{} has no points", section.label))
                    .hint(format!("write points = {POINTS_EXAMPLE}")),
                n => Fault::new(
                    value.span(),
                    format!("{} has {n} points, {POINTS_MAX} are the most", section.label),
                ),
            };
            self.notes.fault(fault);
            return Vec::new();
        }
        let mut names = Names::new("points of one asset");
        let mut points = Vec::with_capacity(items.len());
        for item in items.iter() {
            let Some(table) = item.get_ref().as_table() else {
                let message = format!("a point must be a table, not {}", kind_of(item.get_ref()));
                self.notes
                    .fault(Fault::new(item.span(), message).hint("write { name = \"temperature\" }"));
                continue;
            };
            let label = format!("a point of {}", section.label);
            points.extend(self.point(Section::new(label, item.span(), table), parent, &mut names));
        }
        points
    }

    fn points_of_file(
        &mut self,
        section: &Section<'_, '_>,
        path: &At<std::path::PathBuf>,
        parent: Parent,
    ) -> Vec<Point> {
        let here = path.value.strip_prefix(&self.folder).unwrap_or(&path.value).to_owned();
        let text = match points_file::text_of(&path.value) {
            Ok(text) => text,
            Err(why) => {
                let message = format!("{} cannot be read: {why}", here.display());
                let hint = "a table with a first row of names: name,address,type,unit";
                self.notes.fault(Fault::new(path.span.clone(), message).hint(hint));
                return Vec::new();
            }
        };
        let (rows, faults) = points_file::rows(&text);
        let (faults_before, warnings_before) = (self.notes.faults.len(), self.notes.warnings.len());
        self.notes.faults.extend(faults);
        // Lines that hints name are those of the table.
        let own_lines = std::mem::replace(&mut self.line_starts, line_starts(&text));
        let mut names = Names::new("points of one asset");
        let mut points = Vec::with_capacity(rows.len().min(POINTS_MAX));
        for row in rows.iter().take(POINTS_MAX) {
            let label = format!("a point of {}", section.label);
            points.extend(self.point(Section::new(label, row.span.clone(), &row.table), parent, &mut names));
        }
        self.line_starts = own_lines;
        // A column that nobody knows is said once, not in every row.
        let mut unknown = std::collections::HashSet::new();
        let mut nth = 0;
        self.notes.faults.retain(|fault| {
            nth += 1;
            nth <= faults_before || !fault.message.starts_with("unknown key") || unknown.insert(fault.message.clone())
        });
        let file = Arc::new(OtherFile {
            path: here.clone(),
            page: Page::open(&text),
        });
        let faults = self.notes.faults[faults_before..].iter_mut();
        for fault in faults.chain(&mut self.notes.warnings[warnings_before..]) {
            fault.file = Some(Arc::clone(&file));
        }
        if rows.is_empty() || rows.len() > POINTS_MAX {
            let message = match rows.len() {
                0 => format!("{} has no points", here.display()),
                n => format!("{} has {n} points, {POINTS_MAX} are the most", here.display()),
            };
            let fault = Fault::new(path.span.clone(), message);
            self.notes
                .fault(fault.hint("a row a point, below a first row of names: name,address,type,unit"));
        }
        points
    }

    fn point(&mut self, mut point: Section<'_, '_>, parent: Parent, names: &mut Names) -> Option<Point> {
        let name = self.point_name(&mut point, names);
        let data = self.data_type(&mut point);
        let place = match parent.kind {
            Kind::Simulator => self.simulator_place(&mut point, name.as_ref(), data.as_ref()),
            Kind::Gpio => self.gpio_place(&mut point, data.as_ref()),
            Kind::I2c => self.i2c_place(&mut point, name.as_ref(), data.as_ref(), parent.i2c),
            Kind::Spi => self.spi_place(&mut point, data.as_ref()),
            Kind::Pwm => self.pwm_place(&mut point, data.as_ref()),
            Kind::Modbus(_) => self.modbus_place(&mut point, data.as_ref(), parent.order),
        };
        let unit = point.string(&mut self.notes, "unit", "\"°C\"");
        let every = point.duration(&mut self.notes, "every", Duration::from_millis(10)..=DAY);
        let is_number = place.as_ref().is_none_or(|p| p.data.is_number());
        let scale = self.of_number(&mut point, "scale", "0.1", is_number);
        let offset = self.of_number(&mut point, "offset", "-40", is_number);
        let deadband = self.of_number(&mut point, "deadband", "0.1", is_number);
        if let Some(scale) = scale.as_ref().filter(|s| s.value == 0.0) {
            self.notes.fault(Fault::new(
                scale.span.clone(),
                "a scale of 0 makes every value the same",
            ));
        }
        if let Some(deadband) = deadband.as_ref().filter(|d| d.value < 0.0) {
            self.notes
                .fault(Fault::new(deadband.span.clone(), "a deadband is a number of 0 or more"));
        }
        let is_output = place.as_ref().is_some_and(|p| p.address.is_output()) && !point.has("writable");
        let writable = match self.writable(&mut point, place.as_ref(), is_number) {
            None if is_output => Some(Limits::NONE),
            other => other,
        };
        point.finish(&mut self.notes);
        let place = place?;
        Some(Point {
            name: name?.value,
            address: place.address,
            data: place.data,
            unit: unit.map(|u| u.value),
            scale: scale.map_or(1.0, |s| s.value),
            offset: offset.map_or(0.0, |o| o.value),
            deadband: deadband.map(|d| d.value),
            every: every.map_or(parent.every, |e| e.value),
            writable,
        })
    }

    fn point_name(&mut self, point: &mut Section<'_, '_>, names: &mut Names) -> Option<At<String>> {
        let name = point.required_string(&mut self.notes, "name", "\"temperature\"")?;
        names.add(self, name.clone());
        // It may be the last level of a command's topic.
        if name.value.contains(['/', '+', '#']) {
            let message = format!("{:?} cannot be a point's name", name.value);
            let hint = "a point's name may be a level of a topic: without /, + and #";
            self.notes.fault(Fault::new(name.span, message).hint(hint));
            return None;
        }
        Some(name)
    }

    /// `type` and, of a text, its `length` in bytes.
    fn data_type(&mut self, point: &mut Section<'_, '_>) -> Option<At<DataType>> {
        let data = point.choice(&mut self.notes, "type", &DataType::NAMES);
        let length = point.integer(&mut self.notes, "length", 1..=1_000);
        let span = point.key_span("type").unwrap_or(point.header.clone());
        let at = |value| {
            Some(At {
                value,
                span: span.clone(),
            })
        };
        match (data?, length) {
            (DataType::Text { .. }, Some(length)) => at(DataType::Text {
                bytes: u16::try_from(length).unwrap_or(u16::MAX),
            }),
            (DataType::Text { .. }, None) => {
                if !point.has("length") {
                    let fault = Fault::new(span, "a text needs its length in bytes");
                    self.notes.fault(fault.hint("add length = 16"));
                }
                None
            }
            (other, None) => at(other),
            (other, Some(_)) => {
                let span = point.key_span("length").unwrap_or(point.header.clone());
                let fault = Fault::new(span, format!("a point of type {} has no length", other.name()));
                self.notes.fault(fault.hint("take it out"));
                at(other)
            }
        }
    }

    /// A key that only numbers have.
    fn of_number(
        &mut self,
        point: &mut Section<'_, '_>,
        key: &'static str,
        example: &str,
        is_number: bool,
    ) -> Option<At<f64>> {
        let number = point.number(&mut self.notes, key, example)?;
        if !is_number {
            let span = point.key_span(key).unwrap_or(number.span);
            let message = format!("a point that is no number has no {key}");
            self.notes.fault(Fault::new(span, message).hint("take it out"));
            return None;
        }
        Some(number)
    }

    fn writable(&mut self, point: &mut Section<'_, '_>, place: Option<&Place>, is_number: bool) -> Option<Limits> {
        let writable = point.boolean(&mut self.notes, "writable");
        let min = self.of_number(point, "min", "0", is_number);
        let max = self.of_number(point, "max", "100", is_number);
        let read_back = point.boolean(&mut self.notes, "read_back");
        let Some(writable) = writable.filter(|w| w.value) else {
            for key in ["min", "max", "read_back"] {
                if let Some(span) = point.key_span(key) {
                    let fault = Fault::new(
                        span,
                        format!("{key} is a limit of writes, and the point is not writable"),
                    );
                    self.notes.fault(fault.hint("add writable = true, or take it out"));
                }
            }
            return None;
        };
        if let Some(why) = place.and_then(|p| p.read_only.as_ref()) {
            self.notes
                .fault(Fault::new(writable.span, why.clone()).hint("take writable out, or write false"));
            return None;
        }
        if let (Some(min), Some(max)) = (&min, &max)
            && min.value > max.value
        {
            let message = format!("min is {}, but max is {}", min.value, max.value);
            self.notes.fault(Fault::new(max.span.clone(), message));
        }
        Some(Limits {
            min: min.map(|m| m.value),
            max: max.map(|m| m.value),
            read_back: read_back.is_some_and(|r| r.value),
        })
    }

    /// Without an address the name says which signal it is.
    fn simulator_place(
        &mut self,
        point: &mut Section<'_, '_>,
        name: Option<&At<String>>,
        typed: Option<&At<DataType>>,
    ) -> Option<Place> {
        let address = point.string(&mut self.notes, "address", "\"temperature\"");
        let signal = if point.has("address") { address } else { name.cloned() }?;
        let found = Signal::NAMES.iter().find(|(known, _)| *known == signal.value);
        let Some((_, found)) = found else {
            let known = || Signal::NAMES.iter().map(|(known, _)| *known);
            let hint = match nearest(&signal.value, known()) {
                Some(near) => format!("did you mean address = {near:?}?"),
                None => format!("write address = one of {}", list(known())),
            };
            let message = format!("the simulator has no signal {:?}", signal.value);
            self.notes.fault(Fault::new(signal.span, message).hint(hint));
            return None;
        };
        let data = found.data();
        if let Some(typed) = typed
            && typed.value.is_number() != data.is_number()
        {
            let fault = Fault::new(typed.span.clone(), "the simulator's signal has another type");
            self.notes
                .fault(fault.hint(format!("write type = {:?}, or leave it out", data.name())));
        }
        Some(Place {
            address: Address::Simulator(*found),
            data,
            read_only: (!found.is_writable()).then(|| format!("the signal {:?} cannot be written to", signal.value)),
        })
    }
}
