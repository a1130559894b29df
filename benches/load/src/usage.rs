//! What this process itself has cost.

/// User and system time of this process so far, in seconds.
pub fn cpu_seconds() -> f64 {
    // SAFETY: rusage is plain numbers, for which zero is valid; the kernel fills it in.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_SELF, &mut usage);
        usage
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
