//! Who may publish and subscribe what: the rules of `[anonymous]` and `[[user]]`. Pure.
//!
//! Deny wins over allow. A SUBSCRIBE wholly inside a denied filter, or wholly outside the allowed ones, is refused; a
//! wider one is granted and each delivery is checked.

use crate::config;
use crate::message::TopicFilter;

#[derive(Debug, Clone, Default)]
pub struct Rules {
    access: config::Access,
    /// Everything is allowed and nothing denied: the common case asks nothing more.
    all_publish: bool,
    all_subscribe: bool,
}

impl Rules {
    pub fn new(access: config::Access) -> Rules {
        let all =
            |allow: &[TopicFilter], deny: &[TopicFilter]| deny.is_empty() && allow.iter().any(|f| f.as_str() == "#");
        Rules {
            all_publish: all(&access.publish, &access.deny_publish),
            all_subscribe: all(&access.subscribe, &access.deny_subscribe),
            access,
        }
    }

    /// `$SYS` is the broker's own and `$share` no topic; no rule opens them to writers.
    pub fn may_publish(&self, topic: &str) -> bool {
        !is_reserved(topic) && (self.all_publish || permits(&self.access.publish, &self.access.deny_publish, topic))
    }

    pub fn may_receive(&self, topic: &str) -> bool {
        self.all_subscribe || permits(&self.access.subscribe, &self.access.deny_subscribe, topic)
    }

    pub fn may_subscribe(&self, filter: &TopicFilter) -> bool {
        self.all_subscribe
            || !self.access.deny_subscribe.iter().any(|d| covers(d, filter))
                && self
                    .access
                    .subscribe
                    .iter()
                    .any(|a| a.as_str() == "#" || a.overlaps(filter))
    }
}

fn is_reserved(topic: &str) -> bool {
    let first = topic.split('/').next().unwrap_or_default();
    first == "$SYS" || first == "$share"
}

/// In a rule `#` means everything, the topics with `$` that a subscription to `#` would not bring included.
fn covers(rule: &TopicFilter, filter: &TopicFilter) -> bool {
    rule.as_str() == "#" || rule.covers(filter)
}

fn permits(allow: &[TopicFilter], deny: &[TopicFilter], topic: &str) -> bool {
    let matches = |f: &TopicFilter| f.as_str() == "#" || f.matches(topic);
    !deny.iter().any(matches) && allow.iter().any(matches)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filters(list: &[&str]) -> Vec<TopicFilter> {
        list.iter()
            .map(|t| TopicFilter::new((*t).to_owned()).expect(t))
            .collect()
    }

    fn rules(publish: &[&str], subscribe: &[&str], deny_publish: &[&str], deny_subscribe: &[&str]) -> Rules {
        Rules::new(config::Access {
            publish: filters(publish),
            subscribe: filters(subscribe),
            deny_publish: filters(deny_publish),
            deny_subscribe: filters(deny_subscribe),
        })
    }

    #[test]
    fn deny_wins_and_nothing_is_allowed_by_default() {
        let r = rules(&["a/#"], &["a/#"], &["a/secret/#"], &["a/secret/#"]);
        assert!(r.may_publish("a/x") && !r.may_publish("a/secret/x") && !r.may_publish("b"));
        assert!(r.may_receive("a/x") && !r.may_receive("a/secret") && !r.may_receive("b"));
        let none = rules(&[], &[], &[], &[]);
        assert!(!none.may_publish("a") && !none.may_receive("a") && !none.may_subscribe(&filters(&["#"])[0]));
    }

    #[test]
    fn a_subscription_is_refused_only_where_it_can_bring_nothing() {
        let r = rules(&["#"], &["a/#", "b/+/c"], &[], &["a/secret/#"]);
        let may = |f: &str| r.may_subscribe(&filters(&[f])[0]);
        assert!(may("#") && may("a/+") && may("b/#") && may("+/x/c") && may("a/+/x"));
        assert!(!may("a/secret/+") && !may("c/#") && !may("b/x/d") && !may("a/secret/#"));
    }

    #[test]
    fn nobody_writes_the_brokers_own_topics() {
        let r = rules(&["#", "$SYS/#", "$share/#"], &["#"], &[], &[]);
        assert!(!r.may_publish("$SYS/x") && !r.may_publish("$SYS") && !r.may_publish("$share/g/t"));
        assert!(r.may_publish("$priv/x") && r.may_receive("$SYS/x") && r.may_subscribe(&filters(&["$SYS/#"])[0]));
        assert!(
            !rules(&["#"], &["#"], &[], &["#"]).may_receive("$SYS/x"),
            "deny # denies everything"
        );
    }
}
