//! `[[connector]]` and `[[asset]]`.

use std::time::Duration;

use toml::de::DeValue;

use super::check::{Checker, Names};
use super::fault::Fault;
use super::read::{Section, kind_of, list, nearest};
use super::{Asset, Connector, ConnectorKind, Point, SIMULATOR_SIGNALS};
use crate::message::Topic;

const KINDS: [(&str, ConnectorKind); 1] = [("simulator", ConnectorKind::Simulator)];
/// Kinds that are planned and named in the documentation, but not in this version.
const KINDS_LATER: [&str; 7] = [
    "modbus-tcp",
    "modbus-rtu",
    "modbus-rtu-tcp",
    "gpio",
    "i2c",
    "spi",
    "http",
];
const POINTS_EXAMPLE: &str = "[{ name = \"temperature\", unit = \"°C\" }]";

/// The checked connectors and assets.
#[derive(Default)]
pub(super) struct Machines {
    pub connectors: Vec<Connector>,
    pub assets: Vec<Asset>,
}

/// A connector that is named in the file, be it right or wrong; the kind is None where it is unknown.
struct Named {
    name: String,
    kind: Option<ConnectorKind>,
}

impl Machines {
    pub fn check(checker: &mut Checker<'_>, root: &mut Section<'_, '_>) -> Machines {
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
            headers.push((section.header.clone(), name.clone()));
            section.finish(&mut checker.notes);
            machines.connectors.push(Connector { name, kind });
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
        let every = section.duration(&mut self.notes, "every", millis(10)..=millis(86_400_000));
        // Which other keys there are depends on the connector's kind.
        let kind = found?.kind?;
        let points = match kind {
            ConnectorKind::Simulator => self.simulator_points(&mut section),
        };
        section.finish(&mut self.notes);
        Some(Asset {
            name: name?.value,
            topic: topic?,
            connector: connector?.value,
            every: every.map_or(Duration::from_secs(1), |e| e.value),
            points,
        })
    }

    fn simulator_points(&mut self, section: &mut Section<'_, '_>) -> Vec<Point> {
        if section.take("points_file").is_some() {
            let span = section.key_span("points_file").unwrap_or_default();
            let fault = Fault::new(span, "this version of tidegate cannot read points from a file yet");
            self.notes.fault(fault.hint(format!("write points = {POINTS_EXAMPLE}")));
        }
        if section.take("unit_id").is_some() {
            let span = section.key_span("unit_id").unwrap_or_default();
            self.notes
                .fault(Fault::new(span, "a simulator has no unit_id").hint("take it out"));
        }
        if !section.has("points") && !section.has("points_file") {
            section.missing(&mut self.notes, "points", POINTS_EXAMPLE);
        }
        let Some(value) = section.take("points") else {
            return Vec::new();
        };
        let DeValue::Array(items) = value.get_ref() else {
            section.wrong(&mut self.notes, "points", value, "a list", POINTS_EXAMPLE);
            return Vec::new();
        };
        if items.is_empty() {
            let message = format!("{} has no points", section.label);
            let fault = Fault::new(value.span(), message).hint(format!("write points = {POINTS_EXAMPLE}"));
            self.notes.fault(fault);
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
            points.extend(self.simulator_point(Section::new(label, item.span(), table), &mut names));
        }
        points
    }

    fn simulator_point(&mut self, mut point: Section<'_, '_>, names: &mut Names) -> Option<Point> {
        let name = point.required_string(&mut self.notes, "name", "\"temperature\"");
        if let Some(name) = &name {
            names.add(self, name.clone());
        }
        let address = point.string(&mut self.notes, "address", "\"temperature\"");
        let unit = point.string(&mut self.notes, "unit", "\"°C\"");
        // Without an address the name says which signal it is.
        let signal = if point.has("address") { address } else { name.clone() };
        let is_number = signal.as_ref().and_then(|signal| {
            let found = SIMULATOR_SIGNALS.iter().find(|(known, _)| *known == signal.value);
            if found.is_none() {
                let known = || SIMULATOR_SIGNALS.iter().map(|(known, _)| *known);
                let hint = match nearest(&signal.value, known()) {
                    Some(near) => format!("did you mean address = {near:?}?"),
                    None => format!("write address = one of {}", list(known())),
                };
                let message = format!("the simulator has no signal {:?}", signal.value);
                self.notes.fault(Fault::new(signal.span.clone(), message).hint(hint));
            }
            found.map(|(_, is_number)| *is_number)
        });
        let types = [("float32", true), ("float64", true), ("bool", false)];
        let typed = point.choice(&mut self.notes, "type", &types);
        if let (Some(typed), Some(is_number)) = (typed, is_number)
            && typed != is_number
        {
            let wanted = if is_number { "float64" } else { "bool" };
            let span = point.key_span("type").unwrap_or(point.header.clone());
            let fault = Fault::new(span, "the simulator's signal has another type");
            self.notes
                .fault(fault.hint(format!("write type = {wanted:?}, or leave it out")));
        }
        let deadband = self.deadband(&mut point);
        if deadband.is_some() && is_number == Some(false) {
            let span = point.key_span("deadband").unwrap_or(point.header.clone());
            self.notes
                .fault(Fault::new(span, "a boolean signal has no deadband").hint("take it out"));
        }
        if let Some(writable) = point.boolean(&mut self.notes, "writable").filter(|w| w.value) {
            let fault = Fault::new(writable.span, "this version's simulator cannot be written to");
            self.notes.fault(fault.hint("take writable out, or write false"));
        }
        point.finish(&mut self.notes);
        Some(Point {
            name: name?.value,
            address: signal?.value,
            unit: unit.map(|u| u.value),
            deadband,
        })
    }

    fn deadband(&mut self, point: &mut Section<'_, '_>) -> Option<f64> {
        let value = point.take("deadband")?;
        let number = match value.get_ref() {
            DeValue::Float(float) => float.as_str().parse::<f64>().ok(),
            DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix())
                .ok()
                .map(|n| n as f64),
            _ => {
                point.wrong(&mut self.notes, "deadband", value, "a number", "0.1");
                return None;
            }
        };
        let valid = number.filter(|n| n.is_finite() && *n >= 0.0);
        if valid.is_none() {
            self.notes
                .fault(Fault::new(value.span(), "a deadband is a number of 0 or more"));
        }
        valid
    }
}
