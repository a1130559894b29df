//! The broker as the fuzz targets see it: the gateway's own files, by path, with everything above the broker left out. `crate::` in
//! them is this crate. Nothing of the gateway is copied or stubbed. Without the feature "broker" it is the codec alone.

#![allow(dead_code)]

#[cfg(feature = "broker")]
#[path = "../../src/broker/mod.rs"]
pub mod broker;
#[cfg(not(feature = "broker"))]
#[path = "../../src/broker"]
pub mod broker {
    pub mod codec;
    mod properties;
}
#[path = "../../src/clock.rs"]
pub mod clock;
#[cfg(feature = "broker")]
#[path = "../../src/config/mod.rs"]
pub mod config;
#[cfg(feature = "broker")]
#[path = "../../src/essential.rs"]
mod essential;
#[cfg(feature = "broker")]
#[path = "../../src/log/mod.rs"]
pub mod log;
#[path = "../../src/message.rs"]
pub mod message;
#[cfg(feature = "broker")]
#[path = "../../src/status.rs"]
pub mod status;
#[cfg(feature = "broker")]
#[path = "../../src/trie.rs"]
pub mod trie;
