//! tidegate: an IoT gateway daemon that never loses a message in silence.

pub mod clock;
pub mod message;
pub mod config;
pub mod status;
pub mod log;
pub mod broker;
pub mod modules;
