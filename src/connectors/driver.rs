//! What a protocol has to do: read points of an asset, write one, tell of what comes by itself. All else (the grid,
//! scaling, quality, reports, commands, back-off) is the [engine](super::engine)'s, the same for every kind.
//!
//! A driver is built from the checked configuration of one `[[connector]]` and its assets; assets and points are named by
//! their index there. It owns the connection: it opens it when it is first needed, bounds every wait with a timeout of
//! its own and opens it anew after a fault. The engine makes one call at a time and gives none of them up half-way, but
//! for [`Driver::event`] and, where the gateway stops, the last one.

use crate::config::DataType;

/// A value as the machine holds it, before scale and offset.
#[derive(Debug, Clone, PartialEq)]
pub enum Raw {
    Bool(bool),
    Int(i64),
    Uint(u64),
    Float(f64),
    Text(String),
}

/// What a read gives for one point.
#[derive(Debug, Clone, PartialEq)]
pub enum Sample {
    Good(Raw),
    /// There is a value, but the machine or the driver doubts it.
    Uncertain(Raw, String),
    /// There is none, and why.
    Bad(String),
}

/// A read or a write that came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The one device (asset, unit id, address on the bus) does not answer as it should; others on the line may.
    #[error("{0}")]
    Device(String),
    /// Nothing on this line can be reached: no connection, no such file, cable pulled.
    #[error("{0}")]
    Line(String),
    /// The device understood and refused (an exception of Modbus), or the driver cannot do this to this point: the
    /// device is well, and the same call would be refused again.
    #[error("{0}")]
    Refused(String),
    /// A write was sent and what became of it is not known.
    #[error("{0}")]
    Unknown(String),
}

/// A value that came by itself (an edge of a line).
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    pub asset: usize,
    pub point: usize,
    pub sample: Sample,
    /// When it happened, where the source says so; else now.
    pub at: Option<crate::clock::Timestamp>,
}

// The futures are awaited where they are made; whether they are Send is seen at the concrete type when it is spawned.
#[allow(async_fn_in_trait)]
pub trait Driver {
    /// Reads these points of an asset and appends one sample for each of them to `samples` (which is empty), in their
    /// order. A fault of single points is their sample's; an error means that nothing of the asset can be read.
    async fn read(&mut self, asset: usize, points: &[usize], samples: &mut Vec<Sample>) -> Result<(), Fault>;

    /// Writes a value of the point's [`DataType`]; returns once the machine has confirmed it.
    async fn write(&mut self, asset: usize, point: usize, value: &Raw) -> Result<(), Fault>;

    /// The next value that comes by itself. Cancel-safe. Kinds without such values never return.
    async fn event(&mut self) -> Event {
        std::future::pending().await
    }

    /// Brings outputs into their safe state: at the stop, and when the uplink they hang on is lost.
    async fn safe(&mut self) -> Result<(), Fault> {
        Ok(())
    }
}

impl Raw {
    /// Whether the value is one that a point of this type can hold.
    pub fn fits(&self, data: DataType) -> bool {
        match (self, data.range()) {
            (Raw::Bool(_), None) => data == DataType::Bool,
            (Raw::Int(n), Some((min, max))) => (min..=max).contains(&i128::from(*n)),
            (Raw::Uint(n), Some((min, max))) => (min..=max).contains(&i128::from(*n)),
            (Raw::Float(_), None) => matches!(data, DataType::Float32 | DataType::Float64),
            (Raw::Text(text), None) => matches!(data, DataType::Text { bytes } if text.len() <= usize::from(bytes)),
            _ => false,
        }
    }
}
