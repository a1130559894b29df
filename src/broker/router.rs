//! Who gets a message: subscriptions of sessions and filters of durable consumers in one tree. Pure.
//!
//! The answer for a topic is kept until any subscription changes, since a gateway's topics repeat.

use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;

use bytestring::ByteString;
use smallvec::SmallVec;

use crate::log::ConsumerState;
use crate::message::{Qos, Topic, TopicError, TopicFilter};
use crate::trie::FilterTrie;

use super::core::GroupId;

pub type SessionId = u32;

/// Routes kept; beyond it all are forgotten and made anew as they are asked for.
const CACHE_MAX: usize = 4_096;
/// Recipients of all routes that are kept: a hundred thousand are about 10 MB.
const CACHED_RECIPIENTS_MAX: usize = 100_000;
/// Longer topics are routed without being kept, so that the cache stays small.
const CACHED_TOPIC_BYTES_MAX: usize = 256;

#[derive(Debug, Clone)]
pub struct Subscription {
    pub session: SessionId,
    pub qos: Qos,
    pub no_local: bool,
    pub retain_as_published: bool,
    pub identifier: Option<u32>,
}

#[derive(Debug)]
enum Target {
    Session(Subscription),
    Group(GroupId),
    Consumer(Arc<ConsumerState>),
}

/// One session's part in a topic: overlapping subscriptions deliver once, at the highest QoS, with every identifier.
#[derive(Debug, Clone)]
pub struct Recipient {
    pub session: SessionId,
    pub qos: Qos,
    pub retain_as_published: bool,
    /// Only where all its matching subscriptions say so: then its own messages do not come back.
    pub no_local: bool,
    pub identifiers: SmallVec<[u32; 1]>,
    /// Its part in its own messages, where only some of the subscriptions are no local.
    pub of_its_own: Option<Box<Recipient>>,
}

impl Recipient {
    fn of(s: &Subscription) -> Recipient {
        Recipient {
            session: s.session,
            qos: s.qos,
            retain_as_published: s.retain_as_published,
            no_local: s.no_local,
            identifiers: s.identifier.into_iter().collect(),
            of_its_own: None,
        }
    }

    /// What it gets of a message, which may be one of its own [MQTT-3.8.3-3].
    pub fn part(&self, is_its_own: bool) -> Option<&Recipient> {
        match &self.of_its_own {
            _ if !is_its_own => Some(self),
            Some(part) => Some(part),
            None => Some(self).filter(|r| !r.no_local),
        }
    }

    fn merge(&mut self, s: &Subscription) {
        match &mut self.of_its_own {
            Some(part) if !s.no_local => part.merge(s),
            None if self.no_local && !s.no_local => self.of_its_own = Some(Box::new(Recipient::of(s))),
            None if !self.no_local && s.no_local => self.of_its_own = Some(Box::new(self.clone())),
            Some(_) | None => {}
        }
        self.qos = self.qos.max(s.qos);
        self.retain_as_published |= s.retain_as_published;
        self.no_local &= s.no_local;
        self.identifiers.extend(s.identifier);
    }
}

#[derive(Debug)]
pub struct Route {
    pub topic: Topic,
    pub recipients: Vec<Recipient>,
    /// Shared subscriptions: one member of each gets it.
    pub groups: Vec<GroupId>,
    pub consumers: Vec<Arc<ConsumerState>>,
    pub stream: Option<u16>,
}

#[derive(Debug, Default)]
pub struct Router {
    trie: FilterTrie<Target>,
    cache: HashMap<ByteString, Rc<Route>>,
    /// Of all routes in it.
    cached_recipients: usize,
}

impl Router {
    /// True where the session had the filter before.
    pub fn subscribe(&mut self, filter: &TopicFilter, subscription: Subscription) -> bool {
        self.forget_routes();
        let session = subscription.session;
        self.trie
            .insert(filter, Target::Session(subscription), |t| is_session(t, session))
            .is_some()
    }

    pub fn unsubscribe(&mut self, filter: &TopicFilter, session: SessionId) -> bool {
        self.forget_routes();
        self.trie.remove(filter, |t| is_session(t, session)).is_some()
    }

    pub fn add_group(&mut self, filter: &TopicFilter, group: GroupId) {
        self.forget_routes();
        self.trie.insert(filter, Target::Group(group), |t| is_group(t, group));
    }

    pub fn remove_group(&mut self, filter: &TopicFilter, group: GroupId) {
        self.forget_routes();
        self.trie.remove(filter, |t| is_group(t, group));
    }

    pub fn add_consumer(&mut self, filter: &TopicFilter, consumer: &Arc<ConsumerState>) {
        self.forget_routes();
        self.trie.insert(filter, Target::Consumer(Arc::clone(consumer)), |t| {
            is_consumer(t, consumer.id())
        });
    }

    pub fn remove_consumer(&mut self, filter: &TopicFilter, id: i64) {
        self.forget_routes();
        self.trie.remove(filter, |t| is_consumer(t, id));
    }

    /// Whether any filter begins with this level.
    pub fn listens_below(&self, level: &str) -> bool {
        self.trie.begins_with(level)
    }

    /// Streams have changed: topics are routed anew.
    pub fn forget_routes(&mut self) {
        self.cache.clear();
        self.cached_recipients = 0;
    }

    /// `stream` says which stream the topic belongs to; it is asked only where the answer is not kept.
    pub fn route(
        &mut self,
        topic: &ByteString,
        stream: impl FnOnce(&str) -> Option<u16>,
    ) -> Result<Rc<Route>, TopicError> {
        if let Some(route) = self.cache.get(&**topic) {
            return Ok(Rc::clone(route));
        }
        let topic = Topic::new(topic.clone())?.detach();
        let mut route = Route {
            recipients: Vec::new(),
            groups: Vec::new(),
            consumers: Vec::new(),
            stream: stream(topic.as_str()),
            topic,
        };
        self.trie.for_each_match(route.topic.as_str(), |target| match target {
            Target::Session(s) => add(&mut route.recipients, s),
            // A group has one filter, so it is met once.
            Target::Group(group) => route.groups.push(*group),
            Target::Consumer(c) => {
                if !route.consumers.iter().any(|k| k.id() == c.id()) {
                    route.consumers.push(Arc::clone(c));
                }
            }
        });
        let route = Rc::new(route);
        if route.topic.as_str().len() <= CACHED_TOPIC_BYTES_MAX {
            let recipients = route.recipients.len();
            if self.cache.len() >= CACHE_MAX || self.cached_recipients + recipients > CACHED_RECIPIENTS_MAX {
                self.forget_routes();
            }
            self.cached_recipients += recipients;
            self.cache
                .insert(route.topic.as_byte_string().clone(), Rc::clone(&route));
        }
        Ok(route)
    }
}

fn is_session(target: &Target, session: SessionId) -> bool {
    matches!(target, Target::Session(s) if s.session == session)
}

fn is_group(target: &Target, group: GroupId) -> bool {
    matches!(target, Target::Group(g) if *g == group)
}

fn is_consumer(target: &Target, id: i64) -> bool {
    matches!(target, Target::Consumer(c) if c.id() == id)
}

/// Puts one more matching subscription into a session's part.
pub fn add(recipients: &mut Vec<Recipient>, s: &Subscription) {
    match recipients.iter_mut().find(|r| r.session == s.session) {
        Some(r) => r.merge(s),
        None => recipients.push(Recipient::of(s)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subscription(session: SessionId, qos: Qos, identifier: Option<u32>) -> Subscription {
        Subscription {
            session,
            qos,
            no_local: false,
            retain_as_published: false,
            identifier,
        }
    }

    fn filter(t: &str) -> TopicFilter {
        TopicFilter::new(t.to_owned()).expect(t)
    }

    #[test]
    fn overlapping_subscriptions_deliver_once_at_the_highest_qos() {
        let mut router = Router::default();
        assert!(!router.subscribe(&filter("a/#"), subscription(1, Qos::AtMostOnce, Some(7))));
        assert!(!router.subscribe(&filter("a/+"), subscription(1, Qos::ExactlyOnce, Some(9))));
        assert!(!router.subscribe(&filter("a/b"), subscription(2, Qos::AtLeastOnce, None)));
        let route = router.route(&"a/b".into(), |_| Some(0)).expect("valid");
        assert_eq!(route.recipients.len(), 2);
        let one = route.recipients.iter().find(|r| r.session == 1).expect("matched");
        assert_eq!(one.qos, Qos::ExactlyOnce);
        let mut identifiers = one.identifiers.to_vec();
        identifiers.sort_unstable();
        assert_eq!(identifiers, [7, 9]);
    }

    #[test]
    fn its_own_messages_come_through_what_is_not_no_local_alone() {
        let no_local = Subscription {
            no_local: true,
            ..subscription(1, Qos::ExactlyOnce, Some(1))
        };
        let (plain, more) = (
            subscription(1, Qos::AtMostOnce, Some(2)),
            subscription(1, Qos::AtLeastOnce, Some(3)),
        );
        for order in [
            [&no_local, &plain, &more],
            [&plain, &no_local, &more],
            [&plain, &more, &no_local],
        ] {
            let mut found = Vec::new();
            order.iter().for_each(|s| add(&mut found, s));
            let all = found[0].part(false).expect("of others");
            assert_eq!((all.qos, all.identifiers.len()), (Qos::ExactlyOnce, 3));
            let own = found[0].part(true).expect("two of three");
            let mut identifiers = own.identifiers.to_vec();
            identifiers.sort_unstable();
            assert_eq!((own.qos, identifiers), (Qos::AtLeastOnce, vec![2, 3]));
        }
        let mut found = Vec::new();
        add(&mut found, &no_local);
        add(&mut found, &no_local);
        assert!(found[0].part(true).is_none());
    }

    #[test]
    fn a_kept_route_follows_every_change() {
        let mut router = Router::default();
        let count = |router: &mut Router| router.route(&"t".into(), |_| None).expect("valid").recipients.len();
        assert_eq!(count(&mut router), 0);
        router.subscribe(&filter("#"), subscription(1, Qos::AtMostOnce, None));
        assert_eq!(count(&mut router), 1);
        assert!(router.subscribe(&filter("#"), subscription(1, Qos::AtLeastOnce, None)));
        assert_eq!(
            router.route(&"t".into(), |_| None).expect("valid").recipients[0].qos,
            Qos::AtLeastOnce
        );
        assert!(router.unsubscribe(&filter("#"), 1));
        assert!(!router.unsubscribe(&filter("#"), 1));
        assert_eq!(count(&mut router), 0);
    }
}
