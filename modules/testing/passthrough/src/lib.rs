//! Takes everything under `#` and does nothing with it: what a call costs.

use tidegate_module::{Description, Message, Module, Outcome, description};

struct Passthrough;

impl Module for Passthrough {
    fn describe() -> Description {
        Description {
            subscribe: vec!["#".into()],
            ..description("passthrough", env!("CARGO_PKG_VERSION"))
        }
    }

    fn init(_config: &str) -> Result<Passthrough, String> {
        Ok(Passthrough)
    }

    fn on_message(&mut self, _message: Message) -> Outcome {
        Outcome::Pass
    }
}

tidegate_module::export!(Passthrough);
