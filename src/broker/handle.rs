//! The in-process way to the broker: connectors, modules and uplinks publish through it by the clients' rules.

use crate::log::consumer::{Consumer, Effects};
use crate::message::{Message, TopicFilter};

#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A stream with `when_full = "reject"` is full; try again later.
    #[error("the stream {0:?} is full")]
    Full(String),
    /// The commit failed (disk full, I/O error): nothing of the call is durable; try again later.
    #[error("the log could not be written: {0}")]
    NotDurable(String),
    #[error("the broker has stopped")]
    Stopped,
}

/// Cheap to clone, usable from any thread. Its queue is bounded: `publish` waits while it is full.
#[derive(Clone)]
pub struct BrokerHandle {}

impl BrokerHandle {
    /// Publishes in order; returns when everything that anything durable consumes is on disk.
    pub async fn publish(&self, _messages: Vec<Message>) -> Result<(), PublishError> {
        todo!()
    }

    /// Opens (or makes) the durable consumer of that name with those filters. A filter that is new counts from now;
    /// one that stays keeps its place. One [`Consumer`] a name at a time.
    pub async fn consumer(&self, _name: &str, _filters: Vec<TopicFilter>) -> Result<Consumer, PublishError> {
        todo!()
    }

    /// Applies the effects in one commit. On an error nothing of it happened and it may be tried again.
    pub async fn apply(&self, _consumer: &mut Consumer, _effects: Effects) -> Result<(), PublishError> {
        todo!()
    }

    /// The durable state of a module, as its `Effects` left it.
    pub async fn module_state(&self, _module: &str) -> Result<Vec<(String, Vec<u8>)>, PublishError> {
        todo!()
    }
}
