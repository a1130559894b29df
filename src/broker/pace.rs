//! How fast a client may send: `max_messages_per_second` and `max_bytes_per_second`. Pure, time as a parameter.
//!
//! What is over the rate is taken and then paid for by waiting: the connection is not read from until then, so nothing is
//! lost and TCP holds the client back. A second's worth may come at once.

use std::time::Duration;

use crate::clock::Instant;
use crate::config::ClientLimits;

const BURST: Duration = Duration::from_secs(1);
const NANOS: u128 = 1_000_000_000;
/// A connection with a rate of bytes takes at least this much with one read.
const READ_BYTES_MIN: u64 = 1 << 10;

/// The generic cell rate algorithm: one time says it all.
#[derive(Debug)]
pub struct Bucket {
    per_second: u64,
    /// When what was taken so far would have come, had it come evenly.
    due: Instant,
}

impl Bucket {
    pub fn new(per_second: u64, now: Instant) -> Bucket {
        Bucket {
            per_second,
            due: now.checked_sub(BURST).unwrap_or(now),
        }
    }

    /// Takes `n`. Some: until when nothing more may be taken.
    pub fn take(&mut self, n: u64, now: Instant) -> Option<Instant> {
        let cost = u128::from(n) * NANOS / u128::from(self.per_second.max(1));
        let cost = Duration::from_nanos(u64::try_from(cost).unwrap_or(u64::MAX));
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        self.due = self.due.max(earliest).checked_add(cost).unwrap_or(self.due);
        (self.due > now).then_some(self.due)
    }
}

#[derive(Debug)]
pub struct Pace {
    messages: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Pace {
    /// None where neither rate has a limit.
    pub fn new(limits: &ClientLimits, now: Instant) -> Option<Pace> {
        let messages = limits.messages_per_second.map(|n| Bucket::new(u64::from(n), now));
        let bytes = limits.bytes_per_second.map(|n| Bucket::new(n, now));
        (messages.is_some() || bytes.is_some()).then_some(Pace { messages, bytes })
    }

    pub fn message(&mut self, now: Instant) -> Option<Instant> {
        self.messages.as_mut()?.take(1, now)
    }

    pub fn bytes(&mut self, n: usize, now: Instant) -> Option<Instant> {
        self.bytes.as_mut()?.take(n as u64, now)
    }

    /// What one read takes at most, so that it is never owed for much longer than a second.
    pub fn read_bytes(&self, most: usize) -> usize {
        let rate = self
            .bytes
            .as_ref()
            .map_or(u64::MAX, |b| b.per_second.max(READ_BYTES_MIN));
        usize::try_from(rate).unwrap_or(most).min(most)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    #[test]
    fn over_a_minute_the_rate_holds_whatever_the_steps() {
        for (per_second, step) in [(1, 1), (10, 1), (1_000, 1), (1_000, 700), (65_536, 4_096), (100, 900)] {
            let start = clock::monotonic();
            let (mut bucket, mut now, mut taken) = (Bucket::new(per_second, start), start, 0);
            while now < start + Duration::from_secs(60) {
                taken += step;
                now = bucket.take(step, now).unwrap_or(now);
            }
            let (least, most) = (per_second * 60, per_second * 61 + 2 * step);
            assert!((least..=most).contains(&taken), "{per_second}/s by {step}: {taken}");
        }
    }

    #[test]
    fn a_seconds_worth_comes_at_once_and_silence_saves_no_more() {
        let start = clock::monotonic();
        let mut bucket = Bucket::new(10, start);
        let at_once = |bucket: &mut Bucket, now| (1..).take_while(|_| bucket.take(1, now).is_none()).count();
        assert_eq!(at_once(&mut bucket, start), 10);
        assert_eq!(at_once(&mut bucket, start + Duration::from_secs(3_600)), 10);
        let owed = bucket
            .take(1, start + Duration::from_secs(3_600))
            .expect("over the rate");
        assert_eq!(owed, start + Duration::from_millis(3_600_200));
    }

    #[test]
    fn without_a_limit_there_is_no_pace() {
        let now = clock::monotonic();
        assert!(Pace::new(&ClientLimits::default(), now).is_none());
        let limits = ClientLimits {
            bytes_per_second: Some(2_000),
            ..ClientLimits::default()
        };
        let mut pace = Pace::new(&limits, now).expect("there is a limit");
        assert_eq!((pace.read_bytes(65_536), pace.message(now)), (2_000, None));
        assert_eq!((pace.bytes(2_000, now), pace.bytes(1, now).is_some()), (None, true));
    }
}
