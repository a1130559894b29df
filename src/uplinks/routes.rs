//! Which messages an uplink takes and under which topic: the `[[route]]`s of one uplink, in both directions. Pure.

use smallvec::SmallVec;

use crate::config::{RouteDown, RouteUp, Template, TemplatePart};
use crate::log::consumer::Entry;
use crate::message::{Source, Topic, TopicError, TopicFilter};

/// Most messages go one way.
pub(crate) type Topics = SmallVec<[Topic; 1]>;

#[derive(Debug, Clone)]
pub(crate) struct Routes {
    pub(crate) up: Vec<RouteUp>,
    pub(crate) down: Vec<RouteDown>,
    /// `uplink:NAME`: the source of what comes down, and what is never sent back up.
    pub(crate) source: Source,
}

impl Routes {
    /// The remote topics under which an entry is sent, one for each matching route. None: it is not for this uplink
    /// (no route matches, or it came from this very remote) and is done without being sent.
    pub(crate) fn up(&self, entry: &Entry) -> Result<Topics, TopicError> {
        let mut topics = Topics::new();
        let topic = entry.message.topic.as_str();
        if entry.notice {
            // A loss notice goes up even where no route matches: by the first route's template.
            if let Some(route) = self.up.first() {
                topics.push(render(&route.topic, matching(&route.from, topic), topic)?);
            }
            return Ok(topics);
        }
        if entry.message.source == self.source {
            return Ok(topics);
        }
        for route in &self.up {
            if let Some(filter) = matching(&route.from, topic) {
                topics.push(render(&route.topic, Some(filter), topic)?);
            }
        }
        Ok(topics)
    }

    /// The local topics of a message that came from the remote.
    pub(crate) fn down(&self, topic: &str) -> Result<Topics, TopicError> {
        let mut topics = Topics::new();
        for route in &self.down {
            if let Some(filter) = matching(&route.from, topic) {
                topics.push(render(&route.topic, Some(filter), topic)?);
            }
        }
        Ok(topics)
    }

    /// What to read from the log: every filter of every route up, once.
    pub(crate) fn filters_up(&self) -> Vec<TopicFilter> {
        unique(self.up.iter().flat_map(|r| &r.from))
    }

    /// What to subscribe to at the remote.
    pub(crate) fn filters_down(&self) -> Vec<TopicFilter> {
        unique(self.down.iter().flat_map(|r| &r.from))
    }
}

fn unique<'a>(filters: impl Iterator<Item = &'a TopicFilter>) -> Vec<TopicFilter> {
    let mut unique: Vec<TopicFilter> = Vec::new();
    for filter in filters {
        if !unique.contains(filter) {
            unique.push(filter.clone());
        }
    }
    unique
}

fn matching<'a>(filters: &'a [TopicFilter], topic: &str) -> Option<&'a TopicFilter> {
    filters.iter().find(|f| f.matches(topic))
}

/// Fills in a template. Where `{rest}` is empty (`a/#` matched `a`), the slash before it goes too: `commands/{rest}`
/// becomes `commands`.
fn render(template: &Template, filter: Option<&TopicFilter>, topic: &str) -> Result<Topic, TopicError> {
    if let [TemplatePart::Topic] = template.0.as_slice() {
        return Topic::new(topic.to_owned());
    }
    let mut text = String::with_capacity(topic.len() + 32);
    for part in &template.0 {
        match part {
            TemplatePart::Text(t) => text.push_str(t),
            TemplatePart::Topic => text.push_str(topic),
            TemplatePart::Rest => {
                let rest = rest(filter, topic);
                if rest.is_empty() && text.ends_with('/') {
                    text.pop();
                }
                text.push_str(rest);
            }
        }
    }
    Topic::new(text)
}

/// What the filter's `#` matched; the whole topic where the filter has none.
fn rest<'a>(filter: Option<&TopicFilter>, topic: &'a str) -> &'a str {
    let Some(prefix) = filter.and_then(|f| f.as_str().strip_suffix('#')) else {
        return topic;
    };
    let levels = prefix.matches('/').count();
    if levels == 0 {
        return topic;
    }
    match topic.match_indices('/').nth(levels - 1) {
        Some((at, _)) => &topic[at + 1..],
        None => "",
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::log::consumer::Position;
    use crate::message::{Message, Sequence};

    pub(crate) fn filter(text: &str) -> TopicFilter {
        TopicFilter::new(text.to_owned()).expect(text)
    }

    /// `plants/{topic}` as the config parser makes it.
    pub(crate) fn template(text: &str) -> Template {
        let mut parts = Vec::new();
        let mut left = text;
        while let Some(at) = left.find('{') {
            if at > 0 {
                parts.push(TemplatePart::Text(left[..at].to_owned()));
            }
            let end = left.find('}').expect("closed");
            parts.push(match &left[at..=end] {
                "{topic}" => TemplatePart::Topic,
                "{rest}" => TemplatePart::Rest,
                other => panic!("{other}"),
            });
            left = &left[end + 1..];
        }
        if !left.is_empty() {
            parts.push(TemplatePart::Text(left.to_owned()));
        }
        Template(parts)
    }

    pub(crate) fn up(from: &[&str], to: &str) -> RouteUp {
        RouteUp {
            from: from.iter().map(|f| filter(f)).collect(),
            to: "cloud".into(),
            topic: template(to),
        }
    }

    pub(crate) fn entry(sequence: u64, topic: &str, payload: impl Into<bytes::Bytes>) -> Entry {
        let topic = Topic::new(topic.to_owned()).expect("valid");
        let mut message = Message::new(
            topic,
            payload,
            "client:a".into(),
            Timestamp::from_millis(1_700_000_000_000),
        );
        message.sequence = Sequence(sequence);
        Entry {
            position: Position {
                stream: 0,
                sequence: Sequence(sequence),
            },
            message,
            notice: false,
        }
    }

    fn routes(up: Vec<RouteUp>) -> Routes {
        Routes {
            up,
            down: Vec::new(),
            source: "uplink:cloud".into(),
        }
    }

    #[test]
    fn templates_fill_in_topic_and_rest() {
        let table = [
            ("plants/x/{topic}", "sensors/#", "sensors/a/b", "plants/x/sensors/a/b"),
            (
                "commands/{rest}",
                "plants/x/commands/#",
                "plants/x/commands/a/b",
                "commands/a/b",
            ),
            (
                "commands/{rest}",
                "plants/x/commands/#",
                "plants/x/commands",
                "commands",
            ),
            ("c/{rest}", "+/in/#", "dev/in/a", "c/a"),
            ("c/{rest}", "#", "a/b", "c/a/b"),
            ("c/{rest}", "a/+", "a/b", "c/a/b"),
            ("{rest}/done", "a/#", "a/b", "b/done"),
            ("{topic}", "#", "a//b", "a//b"),
        ];
        for (text, from, topic, expected) in table {
            let rendered = render(&template(text), Some(&filter(from)), topic).expect("valid");
            assert_eq!(rendered.as_str(), expected, "{text} by {from} of {topic}");
        }
        assert_eq!(
            render(&template("{rest}"), Some(&filter("a/#")), "a"),
            Err(TopicError::Empty)
        );
    }

    #[test]
    fn every_matching_route_sends_once_each() {
        let routes = routes(vec![
            up(&["a/#", "a/b"], "one/{topic}"),
            up(&["a/+"], "two/{topic}"),
            up(&["z"], "three"),
        ]);
        let topics = routes.up(&entry(1, "a/b", "x")).expect("valid");
        assert_eq!(
            topics.iter().map(|t| t.as_str()).collect::<Vec<_>>(),
            ["one/a/b", "two/a/b"]
        );
        assert!(routes.up(&entry(1, "b", "x")).expect("valid").is_empty());
        assert_eq!(routes.filters_up().len(), 4);
    }

    #[test]
    fn what_came_from_the_remote_is_not_sent_back() {
        let routes = routes(vec![up(&["#"], "{topic}")]);
        let mut own = entry(1, "commands/x", "x");
        own.message.source = "uplink:cloud".into();
        assert!(routes.up(&own).expect("valid").is_empty());
        own.message.source = "uplink:other".into();
        assert_eq!(routes.up(&own).expect("valid").len(), 1);
    }

    #[test]
    fn a_loss_notice_goes_by_the_first_route() {
        let routes = routes(vec![up(&["sensors/#"], "p/{topic}"), up(&["#"], "q/{topic}")]);
        let mut notice = entry(1, "status/loss/client", "{}");
        notice.notice = true;
        let topics = routes.up(&notice).expect("valid");
        assert_eq!(
            topics.iter().map(|t| t.as_str()).collect::<Vec<_>>(),
            ["p/status/loss/client"]
        );
    }
}
