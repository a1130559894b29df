//! The only reader of wall and monotonic time; everything else is handed `now`.
//!
//! [`Timestamp`] is wall time: shown to people and stored, and wrong on a box that booted without a clock.
//! Timeouts use [`Instant`], which only goes forward. The two never mix.

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use std::time::Instant;

/// Wall time in milliseconds since 1970-01-01 UTC. May jump in either direction between two readings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Timestamp(i64);

impl Timestamp {
    pub const fn from_millis(millis: i64) -> Timestamp {
        Timestamp(millis)
    }

    pub const fn millis(self) -> i64 {
        self.0
    }

    /// Milliseconds from `earlier` to `self`; negative where the clock was set back in between.
    pub const fn millis_since(self, earlier: Timestamp) -> i64 {
        self.0.saturating_sub(earlier.0)
    }
}

/// RFC 3339 in UTC with milliseconds: `2026-11-24T23:40:03.120Z`.
impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // humantime writes years 1970 to 9999; what lies outside comes from a broken clock and is shown at the border.
        let millis = u64::try_from(self.0).unwrap_or(0).min(253_402_300_799_999);
        humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(millis)).fmt(f)
    }
}

/// Wall time now.
pub fn wall() -> Timestamp {
    let millis = match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_millis()).unwrap_or(i64::MAX),
        Err(before) => -i64::try_from(before.duration().as_millis()).unwrap_or(i64::MAX),
    };
    Timestamp(millis)
}

/// Now, as files are stamped.
pub fn file_time() -> SystemTime {
    SystemTime::now()
}

/// Monotonic time now.
pub fn monotonic() -> Instant {
    Instant::now()
}

/// Monotonic time now in microseconds, as systemd counts it (CLOCK_MONOTONIC).
pub fn monotonic_us() -> u64 {
    kernel_ns() / 1_000
}

/// The kernel's monotonic clock, in nanoseconds: what it stamps events with.
pub fn kernel_ns() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec that lives through the call, which writes it or fails.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) } != 0;
    if failed {
        return 0;
    }
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000) + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// The wall time of a moment that the kernel stamped, by how long ago it is; None where it lies ahead (an old kernel's
/// stamp of another clock).
pub fn wall_at(kernel_moment_ns: u64) -> Option<Timestamp> {
    let ago = kernel_ns().checked_sub(kernel_moment_ns)? / 1_000_000;
    Some(Timestamp(wall().0.saturating_sub(i64::try_from(ago).ok()?)))
}

/// Processor time that the calling thread has used.
pub fn thread_processor_time() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec that lives through the call, which writes it or fails.
    let failed = unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) } != 0;
    if failed {
        return Duration::ZERO;
    }
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}
