//! The durable log (interface first; the body follows).
pub mod consumer;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the log has stopped")]
    Stopped,
}
