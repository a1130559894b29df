//! Publishes every message it gets again, below `echo/`: a module in the path from end to end. With the configuration
//! `{"tag":"…"}` the payload gets that tag in front, so that a test sees which version a message went through.

use tidegate_module::{Description, Message, Module, Outcome, description};

struct Echo {
    tag: Vec<u8>,
}

impl Module for Echo {
    fn describe() -> Description {
        Description {
            subscribe: vec!["#".into()],
            publish: vec!["echo/#".into()],
            wants_properties: true,
            ..description("echo", env!("CARGO_PKG_VERSION"))
        }
    }

    fn init(config: &str) -> Result<Echo, String> {
        let tag = config
            .strip_prefix(r#"{"tag":""#)
            .and_then(|rest| rest.strip_suffix(r#""}"#))
            .unwrap_or("");
        Ok(Echo {
            tag: tag.as_bytes().to_vec(),
        })
    }

    fn on_message(&mut self, message: Message) -> Outcome {
        let topic = format!("echo/{}", message.topic);
        let payload = if self.tag.is_empty() {
            message.payload
        } else {
            [&self.tag, &message.payload[..]].concat()
        };
        Outcome::Replace(vec![Message {
            topic,
            payload,
            ..message
        }])
    }
}

tidegate_module::export!(Echo);
