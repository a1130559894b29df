//! When things are due: the grid of polls, and the growing pauses of what is lost. Pure.

use std::time::Duration;

/// Points in time `every` apart, counted from the start: a late one does not shift the next, a missed one is left out.
#[derive(Debug, Clone)]
pub(super) struct Grid {
    every: Duration,
    next: Duration,
}

impl Grid {
    pub fn new(every: Duration) -> Grid {
        Grid {
            every,
            next: Duration::ZERO,
        }
    }

    pub fn every(&self) -> Duration {
        self.every
    }

    pub fn next(&self) -> Duration {
        self.next
    }

    /// Goes to the first point after `since_start`; returns how many were passed over beside the one just served.
    pub fn advance(&mut self, since_start: Duration) -> u64 {
        let behind = since_start.saturating_sub(self.next);
        let passed = u64::try_from(behind.as_nanos() / self.every.as_nanos().max(1)).unwrap_or(u64::MAX);
        let steps = u32::try_from(passed.saturating_add(1)).unwrap_or(u32::MAX);
        self.next = self.next.saturating_add(self.every.saturating_mul(steps));
        passed
    }
}

/// The longest pause between two attempts at a lost device or line; a longer period is kept as it is.
const PAUSE_MAX: Duration = Duration::from_secs(30);
/// A line that is lost is tried this often at first: a device with a short period waits no longer than it.
const PAUSE_FIRST: Duration = Duration::from_millis(500);

/// Attempts at something that is lost: the first comes with the next poll, so that one fault costs one poll; then the
/// pauses double, up to half a minute.
#[derive(Debug, Clone, Default)]
pub(super) struct Retry {
    failures: u32,
    not_before: Duration,
}

impl Retry {
    pub fn failed(&mut self, since_start: Duration, every: Duration) {
        self.failures = self.failures.saturating_add(1);
        self.not_before = match self.failures {
            1 => Duration::ZERO,
            n => {
                let pause = PAUSE_FIRST.saturating_mul(1u32.checked_shl(n - 2).unwrap_or(u32::MAX));
                // A hair less, so that a poll on the grid is not passed over for being early by a microsecond.
                since_start + pause.min(PAUSE_MAX.max(every)).mul_f64(0.95)
            }
        };
    }

    pub fn is_due(&self, since_start: Duration) -> bool {
        since_start >= self.not_before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn the_grid_neither_drifts_nor_piles_up() {
        let mut grid = Grid::new(ms(100));
        assert_eq!(grid.next(), ms(0));
        assert_eq!(grid.advance(ms(3)), 0);
        assert_eq!(grid.next(), ms(100));
        assert_eq!(grid.advance(ms(140)), 0);
        assert_eq!(grid.next(), ms(200));
        assert_eq!(grid.advance(ms(730)), 5);
        assert_eq!(grid.next(), ms(800));
        assert_eq!(grid.advance(ms(800)), 0);
        assert_eq!(grid.next(), ms(900));
    }

    #[test]
    fn one_fault_costs_one_poll_and_the_dead_are_asked_ever_less() {
        let mut retry = Retry::default();
        retry.failed(ms(1_000), ms(100));
        assert!(retry.is_due(ms(1_100)));
        let mut attempts = Vec::new();
        let mut at = ms(1_100);
        while at < ms(200_000) {
            if retry.is_due(at) {
                attempts.push(at);
                retry.failed(at, ms(100));
            }
            at += ms(100);
        }
        let pauses: Vec<u64> = attempts.windows(2).map(|w| (w[1] - w[0]).as_millis() as u64).collect();
        assert_eq!(pauses[..4], [500, 1_000, 1_900, 3_800]);
        assert!(pauses.iter().all(|p| *p <= 30_000), "{pauses:?}");
        assert!(pauses.iter().rev().take(3).all(|p| *p >= 28_000), "{pauses:?}");
    }

    #[test]
    fn a_long_period_is_kept() {
        let mut retry = Retry::default();
        for n in 0..10 {
            let at = ms(n * 60_000);
            assert!(retry.is_due(at), "poll {n}");
            retry.failed(at, ms(60_000));
        }
    }
}
