//! Answers each message on `loop/a` with one on `loop/b` and the other way round, and each on `loop/self` with two on
//! `loop/self`: without a guard in the gateway these never end.

use tidegate_module::{Description, Message, Module, Outcome, description};

struct Loop;

impl Module for Loop {
    fn describe() -> Description {
        Description {
            subscribe: vec!["loop/+".into()],
            publish: vec!["loop/+".into()],
            ..description("loop", env!("CARGO_PKG_VERSION"))
        }
    }

    fn init(_config: &str) -> Result<Loop, String> {
        Ok(Loop)
    }

    fn on_message(&mut self, message: Message) -> Outcome {
        match message.topic.as_str() {
            "loop/a" => Outcome::Replace(vec![Message {
                topic: "loop/b".into(),
                ..message
            }]),
            "loop/b" => Outcome::Replace(vec![Message {
                topic: "loop/a".into(),
                ..message
            }]),
            _ => Outcome::Replace(vec![message.clone(), message]),
        }
    }
}

tidegate_module::export!(Loop);
