//! What /proc says of this process.

use super::text::Process;
use crate::clock;

pub fn read() -> Process {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    // Behind the name, which may have spaces in it.
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .map_or("", |(_, rest)| rest)
        .split_whitespace()
        .collect();
    let field = |n: usize| fields.get(n).and_then(|f| f.parse::<f64>().ok());
    let ticks = system(libc::_SC_CLK_TCK);
    let cpu_s = field(11).zip(field(12)).map(|(user, system)| (user + system) / ticks);
    let uptime = std::fs::read_to_string("/proc/uptime").unwrap_or_default();
    let uptime = uptime.split_whitespace().next().and_then(|s| s.parse::<f64>().ok());
    let now_s = clock::wall().millis() as f64 / 1000.0;
    let started_s = field(19)
        .zip(uptime)
        .map(|(start, uptime)| now_s - uptime + start / ticks);
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|s| s.parse::<f64>().ok());
    Process {
        cpu_s,
        resident_bytes: pages.map(|pages| (pages * system(libc::_SC_PAGESIZE)) as u64),
        // The folder is itself one while it is read.
        open_fds: std::fs::read_dir("/proc/self/fd")
            .ok()
            .map(|fds| (fds.count() as u64).saturating_sub(1)),
        max_fds: max_fds(),
        started_s,
    }
}

fn system(name: libc::c_int) -> f64 {
    // SAFETY: sysconf only reads its argument.
    let value = unsafe { libc::sysconf(name) };
    if value > 0 { value as f64 } else { 1.0 }
}

fn max_fds() -> Option<u64> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to a rlimit of this frame, which the call fills in and does not keep.
    let failed = unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } != 0;
    // 32-bit targets have a narrower type.
    #[allow(clippy::unnecessary_cast)]
    (!failed).then_some(limit.rlim_cur as u64)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_process_has_memory_descriptors_and_a_beginning() {
        let process = super::read();
        assert!(process.resident_bytes.is_some_and(|n| n > 1 << 20));
        assert!(
            process
                .open_fds
                .zip(process.max_fds)
                .is_some_and(|(open, max)| (3..=max).contains(&open))
        );
        let now_s = crate::clock::wall().millis() as f64 / 1000.0;
        assert!(
            process
                .started_s
                .is_some_and(|s| now_s - s > -1.0 && now_s - s < 86_400.0)
        );
        assert!(process.cpu_s.is_some_and(|s| s >= 0.0));
    }
}
