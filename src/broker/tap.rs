//! A tap: somebody looks at live messages as they pass (`tidegate tail`), without a session and without durability.
//!
//! It never holds anything up: what does not fit into its bounds is counted as lost for it. Without taps a message costs
//! one look at an empty list.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use tokio::sync::mpsc;

use crate::message::{Message, TopicFilter};

/// Messages, and their bytes, that wait for a slow reader.
const MESSAGES_MAX: usize = 1_024;
const BYTES_MAX: usize = 4 << 20;

#[derive(Debug, Default)]
struct Counts {
    queued_bytes: AtomicUsize,
    lost: AtomicU64,
}

/// The broker's end.
#[derive(Debug)]
pub struct Feed {
    filter: TopicFilter,
    messages: mpsc::Sender<Message>,
    counts: Arc<Counts>,
}

/// The reader's end. The broker forgets a tap that was dropped.
#[derive(Debug)]
pub struct Tap {
    messages: mpsc::Receiver<Message>,
    counts: Arc<Counts>,
}

pub fn tap(filter: TopicFilter) -> (Feed, Tap) {
    let (sender, receiver) = mpsc::channel(MESSAGES_MAX);
    let counts = Arc::new(Counts::default());
    let feed = Feed {
        filter,
        messages: sender,
        counts: Arc::clone(&counts),
    };
    let tap = Tap {
        messages: receiver,
        counts,
    };
    (feed, tap)
}

impl Feed {
    /// `copy` makes a message of its own memory; it is called where the message is wanted.
    pub fn offer(&self, message: &Message, copy: impl FnOnce(&Message) -> Message) {
        if !self.filter.matches(message.topic.as_str()) {
            return;
        }
        let bytes = message.size_bytes();
        let queued = self.counts.queued_bytes.load(Relaxed);
        // One that is larger than the bound by itself passes where it is alone.
        let fits = queued == 0 || queued + bytes <= BYTES_MAX;
        if !fits || self.messages.capacity() == 0 {
            self.counts.lost.fetch_add(1, Relaxed);
            return;
        }
        self.counts.queued_bytes.fetch_add(bytes, Relaxed);
        if self.messages.try_send(copy(message)).is_err() {
            self.counts.queued_bytes.fetch_sub(bytes, Relaxed);
            self.counts.lost.fetch_add(1, Relaxed);
        }
    }

    pub fn is_closed(&self) -> bool {
        self.messages.is_closed()
    }
}

impl Tap {
    /// None where the broker has stopped.
    pub async fn recv(&mut self) -> Option<Message> {
        let message = self.messages.recv().await?;
        self.counts.queued_bytes.fetch_sub(message.size_bytes(), Relaxed);
        Some(message)
    }

    /// How many were lost since the last call.
    pub fn take_lost(&self) -> u64 {
        self.counts.lost.swap(0, Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::message::Topic;

    fn message(topic: &str, bytes: usize) -> Message {
        let topic = Topic::new(topic.to_owned()).expect("valid");
        Message::new(topic, vec![b'x'; bytes], "test".into(), Timestamp::from_millis(0))
    }

    fn made(filter: &str) -> (Feed, Tap) {
        tap(TopicFilter::new(filter.to_owned()).expect("valid"))
    }

    fn receive(tap: &mut Tap) -> Option<Message> {
        let message = tap.messages.try_recv().ok()?;
        tap.counts.queued_bytes.fetch_sub(message.size_bytes(), Relaxed);
        Some(message)
    }

    #[test]
    fn it_gets_what_matches_and_counts_what_does_not_fit() {
        let (feed, mut tap) = made("#");
        feed.offer(&message("$SYS/x", 1), Message::clone);
        assert!(receive(&mut tap).is_none(), "# does not match $…");
        for _ in 0..MESSAGES_MAX + 5 {
            feed.offer(&message("a", 1), Message::clone);
        }
        assert_eq!(tap.take_lost(), 5);
        assert_eq!(tap.take_lost(), 0);
        let mut got = 0;
        while receive(&mut tap).is_some() {
            got += 1;
        }
        assert_eq!(got, MESSAGES_MAX);
    }

    #[test]
    fn its_bytes_are_bounded_too() {
        let (feed, mut tap) = made("a");
        feed.offer(&message("a", BYTES_MAX + 1), Message::clone);
        feed.offer(&message("a", 1), Message::clone);
        assert_eq!(tap.take_lost(), 1);
        assert!(receive(&mut tap).is_some());
        feed.offer(&message("a", 1), Message::clone);
        assert_eq!(tap.take_lost(), 0);
        assert!(receive(&mut tap).is_some());
        assert!(!feed.is_closed());
        drop(tap);
        assert!(feed.is_closed());
    }
}
