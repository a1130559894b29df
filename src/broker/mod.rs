//! The local MQTT broker (interface first; the body follows).
pub mod handle;
