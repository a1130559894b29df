//! Threads and tasks without which nothing works: the log's writer, the follower of its commits, the broker's clock.
//!
//! If one of them panics the process must not live on as if it served: it ends at once with exit code 70, and whoever
//! started it (systemd) starts it anew. Everything acknowledged is on disk by then; that is the promise.

use tracing::error;

/// Dropped by a panic, it ends the process.
pub struct Essential(pub &'static str);

impl Drop for Essential {
    fn drop(&mut self) {
        if std::thread::panicking() {
            error!(
                part = self.0,
                "a fault in the program stopped an essential part: ending, to be started anew"
            );
            std::process::exit(70);
        }
    }
}
