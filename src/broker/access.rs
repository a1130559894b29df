//! Who may publish and subscribe what, and how much: what `[anonymous]` and `[[user]]` say. Pure.
//!
//! Deny wins over allow. A SUBSCRIBE wholly inside a denied filter, or wholly outside the allowed ones, is refused; a
//! wider one is granted and each delivery is checked.

use std::rc::Rc;

use crate::config::{Access, ClientLimits, Pattern, Unfit};
use crate::message::TopicFilter;

/// What holds for the clients of a user, or for those without one.
#[derive(Debug)]
pub struct Grant {
    user: Option<String>,
    access: Access,
    pub limits: ClientLimits,
    /// Where no rule names the client id: the same for all.
    shared: Option<Rc<Rules>>,
}

impl Grant {
    pub fn new(user: Option<&str>, access: &Access, limits: ClientLimits) -> Grant {
        let lists = [
            &access.publish,
            &access.subscribe,
            &access.deny_publish,
            &access.deny_subscribe,
        ];
        let names_client = lists.iter().any(|list| list.iter().any(Pattern::names_client));
        let mut grant = Grant {
            user: user.map(str::to_owned),
            access: access.clone(),
            limits,
            shared: None,
        };
        if !names_client {
            // A user whose name does not fit its own rules is refused by the configuration; here it may do nothing.
            grant.shared = Some(grant.filled("").unwrap_or_default());
        }
        grant
    }

    /// The rules for one client. An error where a rule names the client id and this one cannot stand in a filter: leaving
    /// the rule out would make wider what it denies.
    pub fn rules(&self, client_id: &str) -> Result<Rc<Rules>, Unfit> {
        match &self.shared {
            Some(shared) => Ok(Rc::clone(shared)),
            None => self.filled(client_id),
        }
    }

    fn filled(&self, client_id: &str) -> Result<Rc<Rules>, Unfit> {
        let fill = |list: &[Pattern]| {
            let filters = list.iter().map(|p| p.fill(self.user.as_deref(), client_id));
            filters.collect::<Result<Box<[TopicFilter]>, Unfit>>()
        };
        Ok(Rc::new(Rules::new(
            fill(&self.access.publish)?,
            fill(&self.access.subscribe)?,
            fill(&self.access.deny_publish)?,
            fill(&self.access.deny_subscribe)?,
        )))
    }
}

/// The rules for one client, or for all of a user. By default nothing is allowed.
#[derive(Debug, Clone, Default)]
pub struct Rules {
    publish: Box<[TopicFilter]>,
    subscribe: Box<[TopicFilter]>,
    deny_publish: Box<[TopicFilter]>,
    deny_subscribe: Box<[TopicFilter]>,
    /// Everything is allowed and nothing denied: the common case asks nothing more.
    all_publish: bool,
    all_subscribe: bool,
}

impl Rules {
    fn new(
        publish: Box<[TopicFilter]>,
        subscribe: Box<[TopicFilter]>,
        deny_publish: Box<[TopicFilter]>,
        deny_subscribe: Box<[TopicFilter]>,
    ) -> Rules {
        let all =
            |allow: &[TopicFilter], deny: &[TopicFilter]| deny.is_empty() && allow.iter().any(|f| f.as_str() == "#");
        Rules {
            all_publish: all(&publish, &deny_publish),
            all_subscribe: all(&subscribe, &deny_subscribe),
            publish,
            subscribe,
            deny_publish,
            deny_subscribe,
        }
    }

    /// `$SYS` is the broker's own and `$share` no topic; no rule opens them to writers.
    pub fn may_publish(&self, topic: &str) -> bool {
        !is_reserved(topic) && (self.all_publish || permits(&self.publish, &self.deny_publish, topic))
    }

    pub fn may_receive(&self, topic: &str) -> bool {
        self.all_subscribe || permits(&self.subscribe, &self.deny_subscribe, topic)
    }

    pub fn may_subscribe(&self, filter: &TopicFilter) -> bool {
        self.all_subscribe
            || !self.deny_subscribe.iter().any(|d| covers(d, filter))
                && self.subscribe.iter().any(|a| a.as_str() == "#" || a.overlaps(filter))
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

    fn grant(lists: [&[&str]; 4]) -> Grant {
        let patterns = |list: &[&str]| list.iter().map(|t| Pattern::parse(t).expect(t)).collect();
        let access = Access {
            publish: patterns(lists[0]),
            subscribe: patterns(lists[1]),
            deny_publish: patterns(lists[2]),
            deny_subscribe: patterns(lists[3]),
        };
        Grant::new(Some("u"), &access, ClientLimits::default())
    }

    fn rules(publish: &[&str], subscribe: &[&str], deny_publish: &[&str], deny_subscribe: &[&str]) -> Rc<Rules> {
        let grant = grant([publish, subscribe, deny_publish, deny_subscribe]);
        grant.rules("c").expect("the id fits")
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

    #[test]
    fn each_client_has_its_own_part() {
        let grant = grant([
            &["data/{user}/{client_id}/#"],
            &["{client_id}"],
            &["data/u/{client_id}/raw"],
            &[],
        ]);
        let r = grant.rules("c").expect("the id fits");
        assert!(r.may_publish("data/u/c/x") && !r.may_publish("data/u/d/x") && !r.may_publish("data/u/c/raw"));
        assert!(r.may_receive("c") && !r.may_receive("d"));
        for id in ["+", "#", "c/#", "$SYS", ""] {
            assert!(grant.rules(id).is_err(), "{id:?}");
        }
    }

    #[test]
    fn rules_that_name_no_client_are_one_for_all() {
        let grant = grant([&["data/{user}/#"], &["#"], &[], &[]]);
        let (one, other) = (grant.rules("a"), grant.rules("+/#"));
        assert!(Rc::ptr_eq(&one.expect("any id"), &other.expect("any id")));
    }
}
