//! How long to wait before trying again: doubling, with jitter, capped. Pure: the caller brings the random number.

use std::time::Duration;

#[derive(Debug, Clone)]
pub(crate) struct Backoff {
    base: Duration,
    max: Duration,
    failures: u32,
}

impl Backoff {
    /// For connections: 0.2 s to 60 s. At the cap the jittered delay is never below 30 s. The first is short because
    /// most cuts are single ones: a link that flaps hundreds of times must not spend its life waiting.
    pub(crate) fn for_connections() -> Backoff {
        Backoff::new(Duration::from_millis(200), Duration::from_secs(60))
    }

    pub(crate) fn new(base: Duration, max: Duration) -> Backoff {
        Backoff { base, max, failures: 0 }
    }

    /// The delay after one more failure: between half and all of base × 2^failures, so that a thousand gateways whose
    /// remote came back do not all knock at once. `random` is any uniformly drawn number.
    pub(crate) fn failed(&mut self, random: u64) -> Duration {
        let full = self
            .base
            .saturating_mul(1u32.checked_shl(self.failures).unwrap_or(u32::MAX))
            .min(self.max);
        self.failures = (self.failures + 1).min(31);
        // 53 bits make an exact fraction in [0, 1).
        let fraction = (random >> 11) as f64 / (1u64 << 53) as f64;
        full.mul_f64(0.5 + fraction / 2.0)
    }

    pub(crate) fn succeeded(&mut self) {
        self.failures = 0;
    }

    pub(crate) fn failures(&self) -> u32 {
        self.failures
    }
}

/// xorshift64*: enough for jitter, never for secrets.
#[derive(Debug)]
pub(crate) struct Jitter(u64);

impl Jitter {
    /// Seeded from the process's hash keys, which the operating system made random.
    pub(crate) fn from_system() -> Jitter {
        use std::hash::{BuildHasher, Hasher, RandomState};
        Jitter::seeded(RandomState::new().build_hasher().finish())
    }

    pub(crate) fn seeded(seed: u64) -> Jitter {
        Jitter(seed | 1)
    }

    pub(crate) fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_to_the_cap_and_starts_again() {
        let mut longest = Backoff::for_connections();
        let mut shortest = Backoff::for_connections();
        let seconds = |d: Duration| d.as_secs_f64();
        for full in [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 51.2, 60.0, 60.0] {
            assert!((seconds(longest.failed(u64::MAX)) - full).abs() < 0.001);
            assert!((seconds(shortest.failed(0)) - full / 2.0).abs() < 0.001);
        }
        for _ in 0..100 {
            assert_eq!(shortest.failed(0), Duration::from_secs(30));
        }
        longest.succeeded();
        assert!(longest.failed(u64::MAX) <= Duration::from_millis(200));
        assert_eq!(longest.failures(), 1);
    }

    /// UP-08: whatever the dice say, after the first minute at most one try in 30 s.
    #[test]
    fn after_a_minute_at_most_one_try_in_30_s() {
        for seed in 0..2_000 {
            let mut jitter = Jitter::seeded(seed * 7_919);
            let mut backoff = Backoff::for_connections();
            let mut at = Duration::ZERO;
            let mut tries = Vec::new();
            while at < Duration::from_secs(600) {
                at += backoff.failed(jitter.draw());
                if at > Duration::from_secs(60) {
                    tries.push(at);
                }
            }
            assert!(tries.len() >= 9, "it must not give up");
            assert!(
                tries.windows(2).all(|w| w[1] - w[0] >= Duration::from_secs(30)),
                "seed {seed}"
            );
        }
    }

    #[test]
    fn jitter_spreads() {
        let mut jitter = Jitter::seeded(42);
        let mut backoffs: Vec<Duration> = (0..1_000)
            .map(|_| Backoff::new(Duration::from_secs(10), Duration::from_secs(10)).failed(jitter.draw()))
            .collect();
        backoffs.sort();
        assert!(backoffs[0] < Duration::from_millis(5_100) && backoffs[999] > Duration::from_millis(9_900));
        assert!((backoffs[500].as_secs_f64() - 7.5).abs() < 0.4);
    }
}
