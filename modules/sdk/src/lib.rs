//! A tidegate module in Rust: implement [`Module`], name it in [`export!`], build it as a `cdylib` for
//! wasm32-unknown-unknown and drop the .wasm into the gateway's modules folder.
//!
//! ```ignore
//! use tidegate_module::{Description, Message, Module, Outcome, description};
//!
//! struct Hot;
//!
//! impl Module for Hot {
//!     fn describe() -> Description {
//!         Description { subscribe: vec!["data/#".into()], ..description("hot", "1.0.0") }
//!     }
//!     fn init(_config: &str) -> Result<Hot, String> {
//!         Ok(Hot)
//!     }
//!     fn on_message(&mut self, message: Message) -> Outcome {
//!         if message.payload.is_empty() { Outcome::Reject("the payload is empty".into()) } else { Outcome::Pass }
//!     }
//! }
//! tidegate_module::export!(Hot);
//! ```
//!
//! A panic ends the instance; its text is the reason that the gateway shows.

#[doc(hidden)]
pub mod bindings {
    wit_bindgen::generate!({
        path: "../wit",
        world: "module",
        pub_export_macro: true,
        default_bindings_module: "tidegate_module::bindings",
    });
}

pub use bindings::tidegate::module::host::{log, publish, state_get, state_set};
pub use bindings::tidegate::module::types::{Description, Level, Message, Outcome, Properties, Qos};

/// The contract's texts (modules/wit/module.wit) say what each call means.
pub trait Module: Sized {
    fn describe() -> Description;
    fn init(config: &str) -> Result<Self, String>;
    fn on_message(&mut self, message: Message) -> Outcome;
    fn on_batch(&mut self, batch: Vec<Message>) -> Vec<Outcome> {
        batch.into_iter().map(|message| self.on_message(message)).collect()
    }
    fn on_timer(&mut self, _now_ms: i64) {}
}

/// A description that subscribes to and publishes nothing yet.
pub fn description(name: &str, version: &str) -> Description {
    Description {
        name: name.into(),
        version: version.into(),
        subscribe: Vec::new(),
        publish: Vec::new(),
        timer_ms: None,
        wants_properties: false,
    }
}

/// A QoS 1 message without properties.
pub fn message(topic: impl Into<String>, payload: impl Into<Vec<u8>>) -> Message {
    Message {
        topic: topic.into(),
        payload: payload.into(),
        qos: Qos::AtLeastOnce,
        retain: false,
        received_ms: 0,
        sequence: 0,
        properties: None,
    }
}

/// Sends a panic's text to the gateway before the trap.
#[doc(hidden)]
pub fn report_panics() {
    std::panic::set_hook(Box::new(|panic| log(Level::Error, &panic.to_string())));
}

/// Makes `$module`, a [`Module`], what this component exports.
#[macro_export]
macro_rules! export {
    ($module:ty) => {
        const _: () = {
            use std::cell::RefCell;
            use $crate::bindings::exports::tidegate::module::handler::Guest;

            thread_local! {
                static MODULE: RefCell<Option<$module>> = const { RefCell::new(None) };
            }

            struct Component;

            impl Guest for Component {
                fn describe() -> $crate::Description {
                    $crate::report_panics();
                    <$module as $crate::Module>::describe()
                }

                fn init(config: String) -> Result<(), String> {
                    $crate::report_panics();
                    let module = <$module as $crate::Module>::init(&config)?;
                    MODULE.with_borrow_mut(|m| *m = Some(module));
                    Ok(())
                }

                fn on_batch(batch: Vec<$crate::Message>) -> Vec<$crate::Outcome> {
                    MODULE.with_borrow_mut(|m| {
                        let module = m.as_mut().expect("the gateway calls init first");
                        <$module as $crate::Module>::on_batch(module, batch)
                    })
                }

                fn on_timer(now_ms: i64) {
                    MODULE.with_borrow_mut(|m| {
                        let module = m.as_mut().expect("the gateway calls init first");
                        <$module as $crate::Module>::on_timer(module, now_ms)
                    })
                }
            }

    $crate::bindings::export!(Component with_types_in $crate::bindings);
        };
    };
}
