//! Keeps a stale answer of a serial line from being taken for the awaited one. Pure.
//!
//! An RTU answer names its unit, its function and its length, and not its request. One that comes after its timeout, or
//! twice, fits the next request where all three are the same. So the next one asks for another length: some registers
//! more, which are thrown away, or in two parts. Where neither can be done the read goes out as it is, and is counted:
//! that is the one case which the protocol cannot tell apart.

use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

use super::plan::Span;
use crate::clock::Instant;
use crate::config::Table;

/// An answer may come so many timeouts after the unit answered something else, which most devices do in order; and never
/// is less waited for than a second.
const LATE_TIMEOUTS: u32 = 10;
const LATE_MIN: Duration = Duration::from_secs(1);
/// The second copy of an answer that came twice may be so late.
const TWIN_MAX: Duration = Duration::from_millis(200);
/// Answers waited for in vain at one time; the oldest is forgotten beyond.
const SUSPECTS_MAX: usize = 32;
/// Places that must not be read beyond; all are learned anew beyond.
const EDGES_MAX: usize = 4_096;
/// So many lengths are tried.
const STEPS: u16 = 8;

/// What an answer shows of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shape {
    unit: u8,
    table: Table,
    bytes: u16,
}

#[derive(Debug, Clone, Copy)]
struct Suspect {
    shape: Shape,
    /// None while nothing else was heard of the unit.
    until: Option<Instant>,
}

#[derive(Debug)]
pub(super) struct Guard {
    late_max: Duration,
    suspects: VecDeque<Suspect>,
    twin: Option<Suspect>,
    /// Where the unit refused a read that went beyond what was asked for.
    edges: BTreeSet<(u8, Table, u16)>,
}

/// How to read a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    /// By a request for this one, which covers it.
    Whole(Span),
    Parts(Span, Span),
    /// As it is: no other length can be asked for.
    Unguarded,
}

impl Shape {
    fn of(unit: u8, span: &Span) -> Shape {
        let bytes = match span.table.is_bits() {
            true => span.count.div_ceil(8),
            false => 2 * span.count,
        };
        Shape {
            unit,
            table: span.table,
            bytes,
        }
    }
}

impl Suspect {
    fn is_gone(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| until <= now)
    }
}

impl Guard {
    pub fn new(timeout: Duration) -> Guard {
        Guard {
            late_max: (timeout * LATE_TIMEOUTS).max(LATE_MIN),
            suspects: VecDeque::new(),
            twin: None,
            edges: BTreeSet::new(),
        }
    }

    /// `most` is what one request may read, `spare` what it may read for nothing.
    pub fn choose(&self, unit: u8, span: &Span, most: u16, spare: u16, now: Instant) -> Choice {
        if self.is_free(unit, span, now) {
            return Choice::Whole(*span);
        }
        // A length of bits shows in whole bytes only.
        let step = if span.table.is_bits() { 8 } else { 1 };
        for n in 1..=STEPS {
            let more = n * step;
            let count = span.count.saturating_add(more);
            if n > spare || count > most {
                break;
            }
            let after = Span { count, ..*span };
            let before = span.start.checked_sub(more).map(|start| Span { start, count, ..*span });
            let is_there = |wider: &Span| wider.end() <= 0x1_0000 && self.is_free(unit, wider, now);
            for wider in [Some(after), before].into_iter().flatten() {
                if is_there(&wider) && !self.has_edge(unit, span, &wider) {
                    return Choice::Whole(wider);
                }
            }
        }
        for n in 1..=STEPS {
            let rest = n * step;
            let Some(count) = span.count.checked_sub(rest).filter(|c| *c > 0 && *c != rest) else {
                break;
            };
            let first = Span { count, ..*span };
            let second = Span {
                start: span.start + count,
                count: rest,
                ..*span
            };
            if self.is_free(unit, &first, now) && self.is_free(unit, &second, now) {
                return Choice::Parts(first, second);
            }
        }
        Choice::Unguarded
    }

    fn is_free(&self, unit: u8, span: &Span, now: Instant) -> bool {
        let shape = Shape::of(unit, span);
        let all = self.suspects.iter().chain(&self.twin);
        !all.into_iter().any(|s| s.shape == shape && !s.is_gone(now))
    }

    fn has_edge(&self, unit: u8, span: &Span, wider: &Span) -> bool {
        let from = wider.start;
        let to = u16::try_from(wider.end() - 1).unwrap_or(u16::MAX);
        let inside = |at: u16| at >= span.start && u32::from(at) < span.end();
        let mut edges = self.edges.range((unit, span.table, from)..=(unit, span.table, to));
        edges.any(|(_, _, at)| !inside(*at))
    }

    /// The unit refused what was read beyond the span.
    pub fn refused(&mut self, unit: u8, span: &Span, wider: &Span) {
        if self.edges.len() >= EDGES_MAX {
            self.edges.clear();
        }
        let at = match wider.start < span.start {
            true => Some(span.start - 1),
            false => u16::try_from(span.end()).ok(),
        };
        self.edges.extend(at.map(|at| (unit, span.table, at)));
    }

    /// No answer within the timeout.
    pub fn timed_out(&mut self, unit: u8, span: &Span, now: Instant) {
        self.suspects.retain(|s| !s.is_gone(now));
        if self.suspects.len() >= SUSPECTS_MAX {
            self.suspects.pop_front();
        }
        self.suspects.push_back(Suspect {
            shape: Shape::of(unit, span),
            until: None,
        });
    }

    pub fn answered(&mut self, unit: u8, span: &Span, now: Instant) {
        for suspect in &mut self.suspects {
            if suspect.shape.unit == unit {
                suspect.until.get_or_insert(now + self.late_max);
            }
        }
        self.twin = Some(Suspect {
            shape: Shape::of(unit, span),
            until: Some(now + TWIN_MAX),
        });
    }

    pub fn forget_edges(&mut self) {
        self.edges.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    fn span(table: Table, start: u16, count: u16) -> Span {
        Span { table, start, count }
    }

    #[test]
    fn a_read_that_may_meet_a_stale_answer_has_another_length() {
        let now = clock::monotonic();
        let mut guard = Guard::new(Duration::from_secs(1));
        let ten = span(Table::Holding, 0, 10);
        assert_eq!(guard.choose(1, &ten, 125, 8, now), Choice::Whole(ten));
        guard.timed_out(1, &ten, now);
        let eleven = Choice::Whole(span(Table::Holding, 0, 11));
        assert_eq!(guard.choose(1, &ten, 125, 8, now), eleven);
        assert_eq!(guard.choose(2, &ten, 125, 8, now), Choice::Whole(ten), "another unit");
        let input = span(Table::Input, 0, 10);
        assert_eq!(guard.choose(1, &input, 125, 8, now), Choice::Whole(input));
        let elsewhere = span(Table::Holding, 500, 10);
        assert_eq!(
            guard.choose(1, &elsewhere, 125, 8, now),
            Choice::Whole(span(Table::Holding, 500, 11))
        );
        let year = Duration::from_secs(365 * 86_400);
        assert_eq!(
            guard.choose(1, &ten, 125, 8, now + year),
            eleven,
            "nothing was heard of it since"
        );
        // That one is late, too.
        guard.timed_out(1, &span(Table::Holding, 0, 11), now);
        assert_eq!(
            guard.choose(1, &ten, 125, 8, now),
            Choice::Whole(span(Table::Holding, 0, 12))
        );
    }

    #[test]
    fn what_cannot_be_read_beyond_is_read_in_parts_or_counted() {
        let now = clock::monotonic();
        let mut guard = Guard::new(Duration::from_secs(1));
        let ten = span(Table::Holding, 5, 10);
        guard.timed_out(1, &ten, now);
        guard.refused(1, &ten, &span(Table::Holding, 5, 11));
        assert_eq!(
            guard.choose(1, &ten, 125, 8, now),
            Choice::Whole(span(Table::Holding, 4, 11))
        );
        guard.refused(1, &ten, &span(Table::Holding, 4, 11));
        let parts = Choice::Parts(span(Table::Holding, 5, 9), span(Table::Holding, 14, 1));
        assert_eq!(guard.choose(1, &ten, 125, 8, now), parts);
        let full = span(Table::Holding, 0, 10);
        assert_eq!(
            guard.choose(1, &full, 10, 8, now),
            Choice::Parts(span(Table::Holding, 0, 9), span(Table::Holding, 9, 1))
        );
        assert_eq!(
            guard.choose(1, &ten, 125, 0, now),
            parts,
            "nothing may be read for nothing"
        );
        let one = span(Table::Holding, 5, 1);
        guard.timed_out(1, &one, now);
        assert_eq!(guard.choose(1, &one, 125, 0, now), Choice::Unguarded);
        assert_ne!(guard.choose(1, &one, 125, 8, now), Choice::Unguarded);
    }

    #[test]
    fn bits_show_their_length_in_bytes() {
        let now = clock::monotonic();
        let mut guard = Guard::new(Duration::from_secs(1));
        let three = span(Table::Coil, 4, 3);
        guard.answered(1, &three, now);
        assert_eq!(
            guard.choose(1, &three, 2_000, 8, now),
            Choice::Whole(span(Table::Coil, 4, 11))
        );
        assert_eq!(guard.choose(1, &three, 2_000, 8, now + TWIN_MAX), Choice::Whole(three));
        let last = span(Table::Coil, 65_530, 6);
        assert_eq!(
            guard.choose(1, &last, 2_000, 8, now),
            Choice::Whole(span(Table::Coil, 65_522, 14))
        );
    }
}
