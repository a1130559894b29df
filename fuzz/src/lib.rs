//! The codec as the fuzz target sees it: the gateway's own files, by path, with everything else left out. `crate::` in them is this
//! crate. Nothing of the gateway is copied or stubbed.

#![allow(dead_code)]

#[path = "../../src/broker"]
pub mod broker {
    pub mod codec;
    mod properties;
}
#[path = "../../src/clock.rs"]
pub mod clock;
#[path = "../../src/message.rs"]
pub mod message;
