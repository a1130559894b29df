//! A thread for a bus whose calls block: I²C, SPI, PWM's files, and GPIO lines, which may hang on an I²C expander.
//!
//! One job at a time, and none is piled up behind one that hangs: [`BusThread::call`] gives up after its patience, and
//! as long as the job it gave up on has not come back every further call is refused at once. A job's late result is
//! dropped. The thread ends when its [`BusThread`] is dropped and its job is done; nobody waits for it, since a transfer
//! that hangs in the kernel cannot be ended from here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use tokio::sync::oneshot;

use crate::clock::{self, Instant};

type Job<B> = Box<dyn FnOnce(&mut B) + Send>;

/// Why a call has no result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Hung {
    /// This call took longer than it may.
    #[error("no end of the transfer within {}", humantime::format_duration(*.0))]
    Now(Duration),
    /// A call before it did, and still goes on.
    #[error("a transfer that began {} ago still hangs", humantime::format_duration(Duration::from_secs(.0.as_secs())))]
    Before(Duration),
    /// The thread could not be started or has panicked; the next call starts it anew.
    #[error("the thread of the bus has ended")]
    Ended,
}

/// The bus's thread and the way to it; `B` lives on the thread and is made anew with it.
pub struct BusThread<B> {
    name: String,
    make: Box<dyn Fn() -> B + Send>,
    running: Option<Running<B>>,
}

struct Running<B> {
    /// Holds one job; another is never sent before that one is done.
    jobs: SyncSender<Job<B>>,
    is_busy: Arc<AtomicBool>,
    since: Instant,
}

impl<B: Send + 'static> BusThread<B> {
    /// The thread starts with the first call, under this name (of which the kernel shows 15 bytes).
    pub fn new(name: &str, make: impl Fn() -> B + Send + 'static) -> BusThread<B> {
        BusThread {
            name: name.to_owned(),
            make: Box::new(make),
            running: None,
        }
    }

    /// Runs `work` on the thread and waits for it, for so long.
    pub async fn call<R: Send + 'static>(
        &mut self,
        patience: Duration,
        work: impl FnOnce(&mut B) -> R + Send + 'static,
    ) -> Result<R, Hung> {
        let now = clock::monotonic();
        let running = match self.running.take() {
            Some(running) => running,
            None => self.start(now)?,
        };
        let running = self.running.insert(running);
        if running.is_busy.swap(true, Ordering::AcqRel) {
            return Err(Hung::Before(now.saturating_duration_since(running.since)));
        }
        running.since = now;
        let (answer, answered) = oneshot::channel();
        let is_busy = Arc::clone(&running.is_busy);
        let job: Job<B> = Box::new(move |bus| {
            let result = work(bus);
            // Before the answer, or the next call would find the bus busy.
            is_busy.store(false, Ordering::Release);
            let _ = answer.send(result);
        });
        if running.jobs.try_send(job).is_err() {
            self.running = None;
            return Err(Hung::Ended);
        }
        match tokio::time::timeout(patience, answered).await {
            Ok(Ok(result)) => Ok(result),
            Ok(Err(_)) => {
                self.running = None;
                Err(Hung::Ended)
            }
            Err(_) => Err(Hung::Now(patience)),
        }
    }

    fn start(&self, now: Instant) -> Result<Running<B>, Hung> {
        let (jobs, work): (SyncSender<Job<B>>, Receiver<Job<B>>) = sync_channel(1);
        let mut bus = (self.make)();
        std::thread::Builder::new()
            .name(self.name.clone())
            .spawn(move || {
                for job in work {
                    job(&mut bus);
                }
            })
            .map_err(|_| Hung::Ended)?;
        Ok(Running {
            jobs,
            is_busy: Arc::new(AtomicBool::new(false)),
            since: now,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(30);
    const SHORT: Duration = Duration::from_millis(20);

    fn block_on<F: Future>(future: F) -> F::Output {
        tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .expect("a runtime")
            .block_on(future)
    }

    #[test]
    fn jobs_run_in_turn_on_one_thread_with_one_state() {
        block_on(async {
            let mut bus = BusThread::new("test", || 0u32);
            for expected in 1..=3 {
                let count = bus.call(LONG, |n| {
                    *n += 1;
                    (*n, std::thread::current().name().map(str::to_owned))
                });
                assert_eq!(count.await, Ok((expected, Some("test".to_owned()))));
            }
        });
    }

    #[test]
    fn a_hanging_transfer_is_given_up_and_nothing_piles_up_behind_it() {
        block_on(async {
            let mut bus = BusThread::new("test", || 0u32);
            let (release, released) = sync_channel::<()>(0);
            let hung = bus.call(SHORT, move |n| {
                let _ = released.recv();
                *n += 1;
            });
            assert_eq!(hung.await, Err(Hung::Now(SHORT)));
            for _ in 0..100 {
                let refused = bus.call(LONG, |n| *n += 100).await;
                assert!(matches!(refused, Err(Hung::Before(_))), "{refused:?}");
            }
            release.send(()).expect("the job waits");
            // It comes back some time; what it gave is dropped, and the bus serves again.
            let deadline = clock::monotonic() + LONG;
            loop {
                match bus.call(LONG, |n| *n).await {
                    Ok(n) => break assert_eq!(n, 1, "the refused calls were never run"),
                    Err(Hung::Before(_)) => assert!(clock::monotonic() < deadline, "the bus stays busy"),
                    Err(other) => panic!("{other:?}"),
                }
                tokio::task::yield_now().await;
            }
        });
    }

    #[test]
    fn a_panic_costs_one_call() {
        block_on(async {
            let mut bus = BusThread::new("test", || 7u32);
            let ended = bus.call(LONG, |_| assert_eq!(1, 2, "this panic is the test's")).await;
            assert_eq!(ended, Err(Hung::Ended));
            assert_eq!(bus.call(LONG, |n| *n).await, Ok(7));
        });
    }
}
