//! Kind "gpio": lines of a chip.

use std::time::Duration;

use super::check::Checker;
use super::fault::Fault;
use super::machines::Place;
use super::read::{At, Section};
use super::{Address, DataType};

const EDGES: [(&str, Edges); 3] = [
    ("rising", Edges::Rising),
    ("falling", Edges::Falling),
    ("both", Edges::Both),
];

/// The line of a `[[connector]]` of the kind "gpio": `chip` is a name (`gpiochip0`), a path or a label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpioChip {
    pub chip: String,
}

/// A point on a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpioPoint {
    pub line: LineId,
    /// The physical low is true.
    pub active_low: bool,
    /// None: as it is.
    pub bias: Option<Bias>,
    pub role: Role,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The level, and its edges at the moment they come, where any are asked for.
    Input {
        edges: Option<Edges>,
        debounce: Option<Duration>,
    },
    /// How many edges there were since the gateway opened the line.
    Counter {
        edges: Edges,
        debounce: Option<Duration>,
        /// Of type uint32: after its largest number it goes on with 0.
        is_32_bit: bool,
    },
    /// Its level at the start, at the stop and while the uplink it hangs on is lost.
    Output { safe: bool },
}

/// A line of a chip.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LineId {
    Offset(u32),
    Name(String),
}

impl std::fmt::Display for LineId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            LineId::Offset(offset) => write!(f, "line {offset}"),
            LineId::Name(name) => write!(f, "line {name:?}"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edges {
    Rising,
    Falling,
    Both,
}

impl Edges {
    pub fn includes(self, rising: bool) -> bool {
        match self {
            Edges::Rising => rising,
            Edges::Falling => !rising,
            Edges::Both => true,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    PullUp,
    PullDown,
    Disabled,
}

impl Checker<'_> {
    pub(super) fn gpio_chip(&mut self, section: &mut Section<'_, '_>) -> Option<GpioChip> {
        let chip = section.required_string(&mut self.notes, "chip", "\"gpiochip0\"")?;
        Some(GpioChip { chip: chip.value })
    }

    /// `address` is the line's number on the chip, or its name.
    pub(super) fn gpio_place(&mut self, point: &mut Section<'_, '_>, typed: Option<&At<DataType>>) -> Option<Place> {
        let address = point.required_string(&mut self.notes, "address", "\"17\"");
        let directions = [("in", false), ("out", true)];
        let is_output = point.choice(&mut self.notes, "direction", &directions).unwrap_or(false);
        let active_low = point.boolean(&mut self.notes, "active_low");
        let biases = [
            ("pull-up", Bias::PullUp),
            ("pull-down", Bias::PullDown),
            ("disabled", Bias::Disabled),
        ];
        let bias = point.choice(&mut self.notes, "bias", &biases);
        let edges = point.choice(&mut self.notes, "edge", &EDGES);
        let count = point.choice(&mut self.notes, "count", &EDGES);
        let range = Duration::from_micros(10)..=Duration::from_secs(60);
        let debounce = point.duration(&mut self.notes, "debounce", range).map(|d| d.value);
        let safe = point.boolean(&mut self.notes, "safe");
        let wrong: &[(&str, &str, &str)] = match (is_output, count) {
            (true, _) => &[
                (
                    "edge",
                    "an output has no edges to tell of",
                    "take it out, or write direction = \"in\"",
                ),
                (
                    "count",
                    "an output has no edges to count",
                    "take it out, or write direction = \"in\"",
                ),
                (
                    "debounce",
                    "an output has no debounce",
                    "take it out, or write direction = \"in\"",
                ),
            ],
            (false, Some(_)) => &[
                ("safe", "only an output has a safe state", "take it out"),
                ("edge", "count says which edges are counted", "take edge out"),
            ],
            (false, None) => &[(
                "safe",
                "only an output has a safe state",
                "add direction = \"out\", or take it out",
            )],
        };
        for (key, message, hint) in wrong {
            if let Some(span) = point.key_span(key) {
                self.notes.fault(Fault::new(span, *message).hint(*hint));
            }
        }
        let (data, types): (DataType, &[DataType]) = match count {
            Some(_) => (DataType::Uint64, &[DataType::Uint32, DataType::Uint64]),
            None => (DataType::Bool, &[DataType::Bool]),
        };
        let data = match typed {
            Some(typed) if types.contains(&typed.value) => typed.value,
            Some(typed) => {
                let (message, hint) = match count {
                    Some(_) => (
                        "a count is a uint32 or a uint64",
                        "write type = \"uint64\", or leave it out",
                    ),
                    None => (
                        "the level of a line is a bool",
                        "leave type out, or count edges with count = \"rising\"",
                    ),
                };
                self.notes.fault(Fault::new(typed.span.clone(), message).hint(hint));
                data
            }
            None => data,
        };
        let role = match (is_output, count) {
            (true, _) => Role::Output {
                safe: safe.is_some_and(|s| s.value),
            },
            (false, Some(edges)) => Role::Counter {
                edges,
                debounce,
                is_32_bit: data == DataType::Uint32,
            },
            (false, None) => Role::Input { edges, debounce },
        };
        let address = address?.value;
        let line = match address.parse::<u32>() {
            Ok(offset) if address.bytes().all(|b| b.is_ascii_digit()) => LineId::Offset(offset),
            _ => LineId::Name(address),
        };
        let why = "an input cannot be written; an output has direction = \"out\"";
        Some(Place {
            address: Address::Gpio(GpioPoint {
                line,
                active_low: active_low.is_some_and(|a| a.value),
                bias,
                role,
            }),
            data,
            read_only: (!is_output).then(|| why.to_owned()),
        })
    }
}
