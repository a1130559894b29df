//! What a GPIO chip does for the driver, whoever does it: the [kernel](super::kernel), or a chip in memory in the tests.
//!
//! Levels are logical: true is active, after `active_low`. Calls may block (an expander on a slow bus) but for
//! [`Line::poll_edges`].

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

pub use crate::config::gpio::{Bias, Edges, LineId};

/// Edges that a line tells of and the driver has not yet taken: the kernel's own limit for a line. When it is full the
/// kernel drops the oldest; the sequence numbers tell how many.
pub const KERNEL_EDGES_MAX: u32 = 1_024;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    In {
        edges: Option<Edges>,
        debounce: Option<Duration>,
    },
    /// Driven to this level with the request itself: there is no moment at another one.
    Out { level: bool },
}

/// How a line is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    pub line: LineId,
    pub direction: Direction,
    pub active_low: bool,
    /// None: as it is.
    pub bias: Option<Bias>,
}

/// A change of level, as the kernel told it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edge {
    pub rising: bool,
    /// On the monotonic clock, in nanoseconds.
    pub at_ns: u64,
    /// Counts the line's edges from 1, those that were dropped too; 0 where the kernel (before 5.10) does not tell.
    pub sequence: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// The chip is not there (any more): no line of it can be used.
    #[error("{0}")]
    Chip(String),
    /// This line alone.
    #[error("{0}")]
    Line(String),
    /// This line, for the debounce: without it the line may be had.
    #[error("{0}")]
    Debounce(String),
}

pub trait Chip: Send {
    /// Takes the line for this process. It is freed when the last clone is dropped.
    fn request(&mut self, want: &Want) -> Result<Arc<dyn Line>, Trouble>;
}

pub trait Line: Send + Sync {
    fn get(&self) -> Result<bool, Trouble>;
    fn set(&self, level: bool) -> Result<(), Trouble>;
    /// Appends the edges that have come, at least one; pending while there is none. Never blocks.
    fn poll_edges(&self, cx: &mut Context<'_>, edges: &mut Vec<Edge>) -> Poll<Result<(), Trouble>>;
}
