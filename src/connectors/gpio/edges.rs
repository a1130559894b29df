//! What becomes of the edges of one line: a count, or changes of level to publish; with a debounce of our own where the
//! kernel has none. Pure: the time comes with the edges and as a parameter.

use std::time::Duration;

use super::line::{Edge, Edges};
use crate::clock::Instant;

/// A level that was reached, and when (monotonic nanoseconds of the kernel).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change {
    pub level: bool,
    pub at_ns: u64,
}

/// The edges of one line.
#[derive(Debug)]
pub struct Watch {
    /// Which edges are counted or told.
    edges: Edges,
    debounce: Option<Debounce>,
    /// The last sequence number of the kernel; None before the first.
    sequence: Option<u32>,
    count: u64,
    /// Edges that were not told one by one since this was last asked for.
    lost: u64,
}

/// A level counts once it has stood for the period.
#[derive(Debug)]
struct Debounce {
    period: Duration,
    stable: bool,
    pending: Option<(Change, Instant)>,
}

impl Watch {
    /// `debounce` is the period of a debounce by this watch and the level that the line has now.
    pub fn new(edges: Edges, debounce: Option<(Duration, bool)>) -> Watch {
        Watch {
            edges,
            debounce: debounce.map(|(period, stable)| Debounce {
                period,
                stable,
                pending: None,
            }),
            sequence: None,
            count: 0,
            lost: 0,
        }
    }

    /// The line was opened anew: the kernel counts from 1 again. The count goes on.
    pub fn reopened(&mut self, debounce: Option<(Duration, bool)>) {
        let fresh = Watch::new(self.edges, debounce);
        *self = Watch {
            count: self.count,
            lost: self.lost,
            ..fresh
        };
    }

    /// Takes an edge; gives the change to tell of: this one, or with a debounce of ours the one before, which has stood.
    pub fn edge(&mut self, edge: Edge, now: Instant) -> Option<Change> {
        let gap = self.gap(edge.sequence);
        self.lost = self.lost.saturating_add(gap);
        let change = Change {
            level: edge.rising,
            at_ns: edge.at_ns,
        };
        let Some(debounce) = &mut self.debounce else {
            // The kernel counts the edges that were asked for and no others, so those it dropped are counted as well.
            return self.take(change, gap);
        };
        // By the kernel's times: an edge that is taken late does not make the level before it a short one.
        let period_ns = u64::try_from(debounce.period.as_nanos()).unwrap_or(u64::MAX);
        let stood = |(before, _): &(Change, Instant)| change.at_ns.saturating_sub(before.at_ns) >= period_ns;
        let settled = debounce.pending.take().filter(stood).map(|(before, _)| before);
        if let Some(before) = settled {
            debounce.stable = before.level;
        }
        debounce.pending = (change.level != debounce.stable).then_some((change, now + debounce.period));
        settled.and_then(|before| self.take(before, 0))
    }

    /// When [`Watch::settle`] is to be called.
    pub fn due(&self) -> Option<Instant> {
        self.debounce.as_ref()?.pending.map(|(_, due)| due)
    }

    /// The level that has stood for long enough, if one has by now.
    pub fn settle(&mut self, now: Instant) -> Option<Change> {
        let debounce = self.debounce.as_mut()?;
        let (change, _) = debounce.pending.filter(|(_, due)| *due <= now)?;
        debounce.pending = None;
        debounce.stable = change.level;
        self.take(change, 0)
    }

    /// Edges since the line was opened for the first time.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// How many edges were not told one by one since the last call.
    pub fn take_lost(&mut self) -> u64 {
        std::mem::take(&mut self.lost)
    }

    fn take(&mut self, change: Change, gap: u64) -> Option<Change> {
        if !self.edges.includes(change.level) {
            return None;
        }
        self.count = self.count.wrapping_add(1 + gap);
        Some(change)
    }

    /// How many edges the kernel dropped before this one.
    fn gap(&mut self, sequence: u32) -> u64 {
        // 0 is a kernel that does not number its edges, or the counter's wrap.
        if sequence == 0 && self.sequence != Some(u32::MAX) {
            return 0;
        }
        // The first is 1, or what was before it is lost.
        let last = self.sequence.replace(sequence).unwrap_or(0);
        u64::from(sequence.wrapping_sub(last).saturating_sub(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const MS: Duration = Duration::from_millis(1);

    fn edge(rising: bool, at_ns: u64, sequence: u32) -> Edge {
        Edge {
            rising,
            at_ns,
            sequence,
        }
    }

    #[test]
    fn edges_are_counted_with_those_the_kernel_dropped() {
        let now = clock::monotonic();
        let mut watch = Watch::new(Edges::Rising, None);
        for sequence in 1..=3 {
            assert!(watch.edge(edge(true, 5, sequence), now).is_some());
        }
        assert_eq!((watch.count(), watch.take_lost()), (3, 0));
        // 4 to 13 never came.
        assert!(watch.edge(edge(true, 9, 14), now).is_some());
        assert_eq!((watch.count(), watch.take_lost()), (14, 10));
        assert_eq!(watch.take_lost(), 0, "told once");
        // A kernel that does not number its edges.
        watch.edge(edge(true, 9, 0), now);
        assert_eq!((watch.count(), watch.take_lost()), (15, 0));
        // Opened anew: the count goes on, the kernel's numbers start again.
        watch.reopened(None);
        watch.edge(edge(true, 9, 1), now);
        assert_eq!((watch.count(), watch.take_lost()), (16, 0));
    }

    #[test]
    fn the_kernels_numbers_may_wrap() {
        let now = clock::monotonic();
        let mut watch = Watch::new(Edges::Both, None);
        watch.sequence = Some(u32::MAX - 1);
        for sequence in [u32::MAX, 0, 1] {
            watch.edge(edge(true, 1, sequence), now);
        }
        assert_eq!((watch.count(), watch.take_lost()), (3, 0));
        watch.sequence = Some(u32::MAX);
        watch.edge(edge(false, 2, 1), now);
        assert_eq!((watch.count(), watch.take_lost()), (5, 1), "the one numbered 0 is lost");
    }

    #[test]
    fn a_bouncing_contact_is_one_change_at_the_time_of_its_last_edge() {
        let start = clock::monotonic();
        let mut watch = Watch::new(Edges::Both, Some((5 * MS, false)));
        // It bounces for 4 ms: up, down, up, down, up.
        for (i, rising) in [true, false, true, false, true].into_iter().enumerate() {
            let at = start + MS * i as u32;
            assert_eq!(
                watch.edge(edge(rising, (100 + i as u64) * 1_000_000, 1 + i as u32), at),
                None
            );
        }
        let due = watch.due().expect("an edge is pending");
        assert_eq!(due, start + 9 * MS);
        assert_eq!(watch.settle(due - MS), None);
        let expected = Change {
            level: true,
            at_ns: 104_000_000,
        };
        assert_eq!(watch.settle(due), Some(expected));
        assert_eq!((watch.count(), watch.due()), (1, None));
        // A spike that falls back is none.
        assert_eq!(watch.edge(edge(false, 200_000_000, 6), start + 20 * MS), None);
        assert_eq!(watch.edge(edge(true, 201_000_000, 7), start + 21 * MS), None);
        assert_eq!(
            (watch.due(), watch.settle(start + 60 * MS), watch.count()),
            (None, None, 1)
        );
    }

    #[test]
    fn a_level_that_stood_counts_though_its_edges_are_taken_late() {
        let late = clock::monotonic();
        let mut watch = Watch::new(Edges::Both, Some((5 * MS, false)));
        // Up for 7 ms, down for 2, up: all taken in one go.
        let times = [(true, 100), (false, 107), (true, 109)];
        let told: Vec<Option<Change>> = (1..)
            .zip(times)
            .map(|(n, (rising, ms))| watch.edge(edge(rising, ms * 1_000_000, n), late))
            .collect();
        let first = Change {
            level: true,
            at_ns: 100_000_000,
        };
        assert_eq!(told, [None, Some(first), None]);
        assert_eq!((watch.due(), watch.count()), (None, 1), "the 2 ms were a spike");
    }

    #[test]
    fn only_the_edges_asked_for_are_told_after_the_debounce() {
        let start = clock::monotonic();
        let mut watch = Watch::new(Edges::Falling, Some((MS, false)));
        watch.edge(edge(true, 1, 1), start);
        assert_eq!(watch.settle(start + MS), None, "a rising edge");
        watch.edge(edge(false, 2, 2), start + 2 * MS);
        assert!(watch.settle(start + 3 * MS).is_some());
        assert_eq!(watch.count(), 1);
    }
}
