//! Topic templates of routes: `plants/{gateway}/{topic}`, `commands/{rest}`. Pure.

use super::{Template, TemplatePart};
use crate::message::{Topic, TopicError, TopicFilter};

/// The placeholders there are.
pub(super) const PLACEHOLDERS: [&str; 3] = ["gateway", "topic", "rest"];

/// Why a text is no template; `at` is the byte range within the text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TemplateError {
    Empty,
    Unknown { name: String },
    Unclosed,
    StrayBrace,
    Text(TopicError),
}

impl Template {
    /// The topic as it came: what a route without `topic` does.
    pub fn whole_topic() -> Template {
        Template(vec![TemplatePart::Topic])
    }

    pub(super) fn parse(text: &str, gateway: &str) -> Result<Template, TemplateError> {
        let mut parts: Vec<TemplatePart> = Vec::new();
        let push_text = |parts: &mut Vec<TemplatePart>, text: &str| match parts.last_mut() {
            Some(TemplatePart::Text(last)) => last.push_str(text),
            _ if text.is_empty() => {}
            _ => parts.push(TemplatePart::Text(text.to_owned())),
        };
        let mut rest = text;
        while let Some(at) = rest.find(['{', '}']) {
            let (before, from) = rest.split_at(at);
            push_text(&mut parts, before);
            if from.starts_with('}') {
                return Err(TemplateError::StrayBrace);
            }
            let close = from.find('}').ok_or(TemplateError::Unclosed)?;
            match &from[1..close] {
                "gateway" => push_text(&mut parts, gateway),
                "topic" => parts.push(TemplatePart::Topic),
                "rest" => parts.push(TemplatePart::Rest),
                other => return Err(TemplateError::Unknown { name: other.to_owned() }),
            }
            rest = &from[close + 1..];
        }
        push_text(&mut parts, rest);
        if parts.is_empty() {
            return Err(TemplateError::Empty);
        }
        // Placeholders stand for what matched, which holds no wildcard and no NUL: the text alone can be wrong.
        for part in &parts {
            if let TemplatePart::Text(text) = part {
                Topic::new(text.as_str()).map_err(TemplateError::Text)?;
            }
        }
        Ok(Template(parts))
    }

    /// The topic a message goes by that came on `topic` and was taken for `matched`.
    ///
    /// `{rest}` is what the trailing `#` matched; without one it is the whole topic. Where `#` matched nothing (`a/#`
    /// also matches `a`), the slash before `{rest}` goes too: `commands/{rest}` gives `commands`, not `commands/`.
    /// An error where the result is too long, too deep or empty.
    pub fn render(&self, topic: &Topic, matched: &TopicFilter) -> Result<Topic, TopicError> {
        let mut out = String::with_capacity(topic.as_str().len() + 32);
        for part in &self.0 {
            match part {
                TemplatePart::Text(text) => out.push_str(text),
                TemplatePart::Topic => out.push_str(topic.as_str()),
                TemplatePart::Rest => match rest(topic.as_str(), matched) {
                    Some(rest) => out.push_str(rest),
                    None => {
                        if out.ends_with('/') {
                            out.pop();
                        }
                    }
                },
            }
        }
        Topic::new(out)
    }
}

/// The levels that a trailing `#` stands for; None where it stands for none.
fn rest<'t>(topic: &'t str, matched: &TopicFilter) -> Option<&'t str> {
    let Some(prefix) = matched.as_str().strip_suffix('#') else {
        return Some(topic);
    };
    let levels_before = prefix.matches('/').count();
    if levels_before == 0 {
        return Some(topic);
    }
    topic
        .match_indices('/')
        .nth(levels_before - 1)
        .map(|(at, _)| &topic[at + 1..])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str, topic: &str, filter: &str) -> Result<String, TopicError> {
        let template = Template::parse(template, "line-4").expect(template);
        let topic = Topic::new(topic.to_owned()).expect(topic);
        let filter = TopicFilter::new(filter.to_owned()).expect(filter);
        assert!(
            filter.matches(topic.as_str()),
            "the case itself is wrong: {filter} does not match {topic}"
        );
        template.render(&topic, &filter).map(|t| t.as_str().to_owned())
    }

    #[test]
    fn placeholders_are_filled_in() {
        let table = [
            (
                "plants/{gateway}/{topic}",
                "sensors/a/b",
                "sensors/#",
                "plants/line-4/sensors/a/b",
            ),
            (
                "commands/{rest}",
                "plants/line-4/commands/x/y",
                "plants/line-4/commands/#",
                "commands/x/y",
            ),
            ("{rest}", "a/b", "a/#", "b"),
            ("{rest}", "a/b", "#", "a/b"),
            ("{rest}", "a/b", "a/+", "a/b"),
            ("{rest}", "a/b/c/d", "+/b/#", "c/d"),
            ("{rest}", "/a", "/#", "a"),
            ("c/{rest}", "a//b", "a/#", "c//b"),
            ("c/{rest}", "a", "a/#", "c"),
            ("c/{rest}/d", "a", "a/#", "c/d"),
            ("fixed", "a", "#", "fixed"),
            ("{gateway}-{topic}-x", "a", "#", "line-4-a-x"),
            ("{topic}/{topic}", "a", "a", "a/a"),
        ];
        for (template, topic, filter, expected) in table {
            assert_eq!(
                render(template, topic, filter).as_deref(),
                Ok(expected),
                "{template} of {topic} by {filter}"
            );
        }
    }

    #[test]
    fn a_result_that_is_no_topic_is_an_error() {
        assert_eq!(render("{rest}", "a", "a/#"), Err(TopicError::Empty));
        assert_eq!(render("x/{topic}", &"y".repeat(65_534), "#"), Err(TopicError::TooLong));
        assert_eq!(
            render("x/{topic}", &"/".repeat(199), "#"),
            Err(TopicError::TooManyLevels)
        );
    }

    #[test]
    fn what_is_no_template_is_refused() {
        let error = |text: &str| Template::parse(text, "g").expect_err(text);
        assert_eq!(error(""), TemplateError::Empty);
        assert_eq!(
            error("a/{device}"),
            TemplateError::Unknown {
                name: "device".to_owned()
            }
        );
        assert_eq!(error("a/{topic"), TemplateError::Unclosed);
        assert_eq!(error("a/topic}"), TemplateError::StrayBrace);
        assert_eq!(error("a/+/{topic}"), TemplateError::Text(TopicError::Wildcard));
        assert_eq!(error("{topic}/#"), TemplateError::Text(TopicError::Wildcard));
    }
}
