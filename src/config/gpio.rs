//! Kind "gpio": lines of a chip.

use std::time::Duration;

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
    Counter { edges: Edges, debounce: Option<Duration> },
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
