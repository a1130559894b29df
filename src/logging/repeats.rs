//! The same thing again and again becomes a count, so that the daemon's own lines never fill a disk. Pure.
//!
//! A key (what is said, of which part) has a burst of lines a window; what comes beyond that is counted and said once when
//! the window ends. While it goes on, windows get longer, from [`WINDOW`] to [`WINDOW_MAX`], and have no lines of their
//! own: a fault that lasts an hour is a burst and about ten counts. A window with no more than a burst ends it.
//! Bound: [`KEYS_MAX`] keys; lines of one more pass, so that a flood of keys hides nothing else. The caller counts them
//! by something that is bounded (see [`super`]).

use std::collections::HashMap;
use std::hash::Hash;
use std::time::Duration;

use crate::clock::Instant;

const WINDOW: Duration = Duration::from_secs(60);
const WINDOW_MAX: Duration = Duration::from_secs(600);
pub const KEYS_MAX: usize = 1_000;

#[derive(Debug)]
pub struct Repeats<K, W> {
    burst: u64,
    seen: HashMap<K, Seen<W>>,
}

#[derive(Debug)]
struct Seen<W> {
    what: Option<W>,
    since: Instant,
    window: Duration,
    lines: u64,
    left_out: u64,
}

/// Lines that were left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeftOut<W> {
    pub what: W,
    pub times: u64,
    pub within: Duration,
}

impl<K: Hash + Eq, W: Clone> Repeats<K, W> {
    pub fn new(burst: u64) -> Repeats<K, W> {
        Repeats {
            burst,
            seen: HashMap::new(),
        }
    }

    /// Whether this line is to be written. `what` is kept for the count, where there will be one.
    pub fn note(&mut self, key: K, now: Instant, what: impl FnOnce() -> W) -> bool {
        if let Some(seen) = self.seen.get_mut(&key) {
            if seen.lines < self.burst {
                seen.lines += 1;
                return true;
            }
            seen.left_out += 1;
            if seen.what.is_none() {
                seen.what = Some(what());
            }
            return false;
        }
        if self.seen.len() >= KEYS_MAX {
            return true;
        }
        let seen = Seen {
            what: None,
            since: now,
            window: WINDOW,
            lines: 1,
            left_out: 0,
        };
        self.seen.insert(key, seen);
        true
    }

    /// The counts of windows that have ended by now. To be called about once a second while [`Self::is_empty`] is false.
    pub fn ended(&mut self, now: Instant) -> Vec<LeftOut<W>> {
        let (mut out, burst) = (Vec::new(), self.burst);
        self.seen.retain(|_, seen| {
            let within = now.saturating_duration_since(seen.since);
            if within < seen.window {
                return true;
            }
            let Some(what) = seen.what.clone() else {
                return false;
            };
            let times = std::mem::take(&mut seen.left_out);
            // It goes on: no lines in the next window. It was little: the next one is as the first.
            (seen.lines, seen.window) = match times > burst {
                true => (burst, (seen.window * 2).min(WINDOW_MAX)),
                false => (0, WINDOW),
            };
            seen.what = None;
            seen.since = now;
            out.push(LeftOut { what, times, within });
            true
        });
        out
    }

    pub fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BURST: u64 = 10;

    /// Lines written, and counts, of one key that is said every `every` for an hour.
    fn hour(every: Duration) -> (u64, Vec<LeftOut<&'static str>>) {
        let mut repeats = Repeats::new(BURST);
        let start = crate::clock::monotonic();
        let (mut lines, mut counts, mut at, mut tick) = (0, Vec::new(), Duration::ZERO, Duration::ZERO);
        while at < Duration::from_secs(3600) {
            while tick <= at {
                counts.extend(repeats.ended(start + tick));
                tick += Duration::from_secs(1);
            }
            lines += u64::from(repeats.note("key", start + at, || "refused"));
            at += every;
        }
        (lines, counts)
    }

    #[test]
    fn an_hour_of_the_same_is_a_burst_and_counts_that_add_up() {
        let (lines, counts) = hour(Duration::from_millis(100));
        assert_eq!(lines, BURST);
        assert!(counts.len() <= 12, "{}", counts.len());
        assert_eq!(counts[0].times, 590);
        assert_eq!(counts[0].within, Duration::from_secs(60));
        assert!(counts.iter().all(|c| c.what == "refused"));
        let said = lines + counts.iter().map(|c| c.times).sum::<u64>();
        // The rest is in the window that has not ended.
        assert!((30_000..=36_000).contains(&said), "{said}");
    }

    #[test]
    fn what_is_said_now_and_then_is_always_said() {
        let (lines, counts) = hour(Duration::from_secs(10));
        assert_eq!((lines, counts), (360, Vec::new()));
    }

    #[test]
    fn it_ends_with_a_quiet_window_and_begins_anew() {
        let mut repeats = Repeats::new(BURST);
        let start = crate::clock::monotonic();
        let at = |s| start + Duration::from_secs(s);
        for _ in 0..100 {
            repeats.note("a", at(0), || "a");
        }
        assert_eq!(repeats.ended(at(59)), []);
        assert_eq!(repeats.ended(at(60)).len(), 1);
        assert!(!repeats.note("a", at(61), || "a"), "it goes on");
        assert_eq!(repeats.ended(at(180))[0].times, 1);
        assert!(repeats.note("a", at(181), || "a"), "one in two minutes is little");
        assert!(repeats.ended(at(300)).is_empty() && repeats.is_empty(), "forgotten");
    }

    #[test]
    fn memory_is_bounded() {
        let mut repeats = Repeats::new(BURST);
        let start = crate::clock::monotonic();
        let written = (0..5 * KEYS_MAX).filter(|n| repeats.note(*n, start, || *n)).count();
        assert_eq!((written, repeats.seen.len()), (5 * KEYS_MAX, KEYS_MAX));
        assert!(repeats.ended(start + WINDOW).is_empty() && repeats.is_empty());
    }
}
