//! tidegate: an IoT gateway daemon that never loses a message in silence.

pub mod admin;
pub mod broker;
pub mod certificate;
pub mod cli;
pub mod clock;
pub mod config;
pub mod connectors;
pub mod control;
mod essential;
pub mod log;
mod logging;
pub mod message;
mod metrics;
pub mod modules;
pub mod status;
pub mod supervisor;
pub mod trie;
pub mod uplinks;
