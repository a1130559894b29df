//! Topic aliases towards a client (MQTT 5, 3.3.2.3.4): the first topics that a connection is sent have one. Pure.
//!
//! The table is filled until it is full and then stays as it is: a gateway's topics repeat, and a topic that comes once
//! costs its alias only once.

use std::collections::HashMap;

use bytestring::ByteString;

/// Whatever more the client would take: a table costs its topics' length, for each connection.
const ALIASES_MAX: u16 = 64;
/// An alias takes three bytes: a topic no longer than that gains nothing.
const TOPIC_BYTES_MIN: usize = 4;
/// Longer topics are sent as they are, so that the table stays small.
const TOPIC_BYTES_MAX: usize = 256;

#[derive(Debug, Default)]
pub struct Aliases {
    max: u16,
    known: HashMap<ByteString, u16>,
}

impl Aliases {
    /// `maximum` is the client's Topic Alias Maximum; 0: it takes none.
    pub fn new(maximum: u16) -> Aliases {
        Aliases {
            max: maximum.min(ALIASES_MAX),
            known: HashMap::new(),
        }
    }

    pub fn is_used(&self) -> bool {
        self.max > 0
    }

    /// The alias to send the topic by, and whether the topic goes along: the client does not know it yet.
    pub fn find(&self, topic: &str) -> Option<(u16, bool)> {
        if self.max == 0 {
            return None;
        }
        if let Some(alias) = self.known.get(topic) {
            return Some((*alias, false));
        }
        let is_fit = (TOPIC_BYTES_MIN..=TOPIC_BYTES_MAX).contains(&topic.len());
        (is_fit && self.known.len() < usize::from(self.max)).then(|| (self.known.len() as u16 + 1, true))
    }

    /// The client was sent the topic with this alias.
    pub fn sent(&mut self, topic: &str, alias: u16) {
        self.known.insert(topic.into(), alias);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_topics_have_aliases_and_the_others_none() {
        let mut aliases = Aliases::new(2);
        for (topic, alias) in [("a/one", 1), ("a/two", 2)] {
            assert_eq!(aliases.find(topic), Some((alias, true)));
            assert_eq!(
                aliases.find(topic),
                Some((alias, true)),
                "what was not sent is not known"
            );
            aliases.sent(topic, alias);
            assert_eq!(aliases.find(topic), Some((alias, false)));
        }
        assert_eq!(aliases.find("a/three"), None);
        assert_eq!(Aliases::new(0).find("a/one"), None);
        assert_eq!(Aliases::new(9).find("a"), None, "it would be longer");
    }
}
