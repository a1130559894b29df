//! The same thing again and again is one line a minute with a count, not a full disk. Pure.

use std::collections::HashMap;
use std::time::Duration;

use crate::clock::Instant;

/// A repeated line is logged this often at most.
const EVERY: Duration = Duration::from_secs(60);
/// Different lines that are remembered; beyond it all are forgotten.
const KEYS_MAX: usize = 1_000;

#[derive(Debug, Default)]
pub struct Repeats {
    seen: HashMap<String, (Instant, u64)>,
}

impl Repeats {
    /// Some(how many were left out since the last line): log it. None: leave it out.
    pub fn note(&mut self, key: &str, now: Instant) -> Option<u64> {
        if let Some((last, left_out)) = self.seen.get_mut(key) {
            if now.saturating_duration_since(*last) < EVERY {
                *left_out += 1;
                return None;
            }
            *last = now;
            return Some(std::mem::take(left_out));
        }
        if self.seen.len() >= KEYS_MAX {
            self.seen.clear();
        }
        self.seen.insert(key.to_owned(), (now, 0));
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repeats_are_counted_and_said_once_a_minute() {
        let mut repeats = Repeats::default();
        let start = crate::clock::monotonic();
        assert_eq!(repeats.note("a", start), Some(0));
        assert_eq!(repeats.note("b", start), Some(0));
        for s in 1..60 {
            assert_eq!(repeats.note("a", start + Duration::from_secs(s)), None);
        }
        assert_eq!(repeats.note("a", start + Duration::from_secs(60)), Some(59));
        assert_eq!(repeats.note("a", start + Duration::from_secs(61)), None);
    }
}
