//! What a connector has to publish and the broker has not taken yet: bounded, in order, tried again.
//!
//! The engine goes on polling while a commit lasts. Where the broker takes nothing for long (a full disk, a full stream)
//! the oldest messages give way, are counted as `dropped` and leave a gap in the user property `seq`.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::Gateway;
use crate::broker::handle::PublishError;
use crate::message::Message;
use crate::status::Counter;

/// Of one connector: with 200 of them, and nothing taken, it is 13 MB. One message is held whatever its size.
const BYTES_MAX: usize = 64 << 10;
const MESSAGES_MAX: usize = 256;
/// Between two attempts at a publish that failed.
const RETRY: Duration = Duration::from_secs(1);

#[derive(Default)]
pub(super) struct Outbox {
    state: Mutex<State>,
    news: Notify,
    published: Counter,
    dropped: Counter,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<Message>,
    bytes: usize,
    /// Why the broker does not take messages.
    trouble: Option<String>,
    /// Whether a publish is under way.
    busy: bool,
}

impl Outbox {
    pub fn new(published: Counter, dropped: Counter) -> Outbox {
        Outbox {
            published,
            dropped,
            ..Outbox::default()
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn push(&self, message: Message) {
        let mut state = self.state();
        state.bytes += message.size_bytes();
        state.waiting.push_back(message);
        while state.waiting.len() > 1 && (state.bytes > BYTES_MAX || state.waiting.len() > MESSAGES_MAX) {
            if let Some(oldest) = state.waiting.pop_front() {
                state.bytes -= oldest.size_bytes();
                self.dropped.add(1);
            }
        }
        drop(state);
        self.news.notify_one();
    }

    /// Why nothing is taken, where that is so.
    pub fn trouble(&self) -> Option<String> {
        self.state().trouble.clone()
    }

    pub fn is_empty(&self) -> bool {
        let state = self.state();
        state.waiting.is_empty() && !state.busy
    }

    /// Publishes what is pushed until the broker has stopped. Dropped in the middle it may leave messages unsent.
    pub async fn send<G: Gateway>(&self, gateway: &G) {
        loop {
            let batch: Vec<Message> = {
                let mut state = self.state();
                state.bytes = 0;
                state.busy = !state.waiting.is_empty();
                state.waiting.drain(..).collect()
            };
            if batch.is_empty() {
                self.news.notified().await;
                continue;
            }
            let count = batch.len() as u64;
            match gateway.publish(batch.clone()).await {
                Ok(()) => {
                    self.published.add(count);
                    let mut state = self.state();
                    state.busy = false;
                    state.trouble = None;
                }
                Err(PublishError::Stopped) => {
                    self.state().busy = false;
                    return;
                }
                Err(error @ (PublishError::Full(_) | PublishError::NotDurable(_))) => {
                    self.state().trouble = Some(error.to_string());
                    self.put_back(batch);
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Before what came meanwhile, as far as there is room: the oldest give way.
    fn put_back(&self, batch: Vec<Message>) {
        let mut state = self.state();
        let newer: Vec<Message> = state.waiting.drain(..).collect();
        state.bytes = 0;
        state.busy = false;
        drop(state);
        for message in batch.into_iter().chain(newer) {
            self.push(message);
        }
    }
}
