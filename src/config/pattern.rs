//! The filters of `[anonymous]` and `[[user]]`: topic filters in which `{user}` and `{client_id}` stand for the client's own. Pure.
//!
//! A name is put in only where it cannot change what the filter means: one with `/`, `+`, `#` or U+0000 in it, or with `$` at
//! its beginning, is refused ([`Unfit`]), so that no client makes a rule wider by what it calls itself.

use crate::message::{TopicError, TopicFilter};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(Vec<Part>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    User,
    ClientId,
}

/// This name cannot stand in a filter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unfit;

impl Pattern {
    /// Braces around anything else are text.
    pub fn parse(text: &str) -> Result<Pattern, TopicError> {
        let mut parts = Vec::new();
        let mut rest = text;
        let places = |text: &str| {
            let user = text.find("{user}").map(|at| (at, "{user}".len(), Part::User));
            let client = text
                .find("{client_id}")
                .map(|at| (at, "{client_id}".len(), Part::ClientId));
            user.into_iter().chain(client).min_by_key(|(at, ..)| *at)
        };
        while let Some((at, length, part)) = places(rest) {
            if at > 0 {
                parts.push(Part::Text(rest[..at].to_owned()));
            }
            parts.push(part);
            rest = &rest[at + length..];
        }
        if !rest.is_empty() {
            parts.push(Part::Text(rest.to_owned()));
        }
        let pattern = Pattern(parts);
        // What is no filter with a plain name in it is none with any.
        TopicFilter::new(pattern.with(Some("x"), "x")).map(|_| pattern)
    }

    pub fn names_user(&self) -> bool {
        self.0.contains(&Part::User)
    }

    pub fn names_client(&self) -> bool {
        self.0.contains(&Part::ClientId)
    }

    /// The filter for one client.
    pub fn fill(&self, user: Option<&str>, client_id: &str) -> Result<TopicFilter, Unfit> {
        let user_fits = !self.names_user() || user.is_some_and(fits);
        if !user_fits || self.names_client() && !fits(client_id) {
            return Err(Unfit);
        }
        TopicFilter::new(self.with(user, client_id)).map_err(|_| Unfit)
    }

    fn with(&self, user: Option<&str>, client_id: &str) -> String {
        let part = |part: &Part| match part {
            Part::Text(text) => text.clone(),
            Part::User => user.unwrap_or_default().to_owned(),
            Part::ClientId => client_id.to_owned(),
        };
        self.0.iter().map(part).collect()
    }
}

/// Whether a name can stand in a filter without changing what the filter means.
pub fn fits(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('$') && !name.contains(['/', '+', '#', '\0'])
}

impl std::fmt::Display for Pattern {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.with(Some("{user}"), "{client_id}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(pattern: &str, user: Option<&str>, client_id: &str) -> Result<String, Unfit> {
        let pattern = Pattern::parse(pattern).expect(pattern);
        pattern.fill(user, client_id).map(|f| f.as_str().to_owned())
    }

    #[test]
    fn a_name_stands_where_the_placeholder_stood() {
        let table = [
            ("a/{user}/#", "a/u/#"),
            ("{client_id}", "c"),
            ("a/{user}-{client_id}/+", "a/u-c/+"),
            ("a/{other}/{user", "a/{other}/{user"),
            ("a/#", "a/#"),
        ];
        for (pattern, wanted) in table {
            assert_eq!(filled(pattern, Some("u"), "c").as_deref(), Ok(wanted), "{pattern}");
            assert_eq!(Pattern::parse(pattern).expect(pattern).to_string(), pattern);
        }
        // What was put in is no pattern.
        assert_eq!(
            filled("{user}/{client_id}", Some("{client_id}"), "c").as_deref(),
            Ok("{client_id}/c")
        );
    }

    #[test]
    fn a_name_never_makes_a_filter_wider() {
        for name in ["a/b", "+", "#", "a+", "", "$SYS", "a\0"] {
            assert_eq!(filled("t/{client_id}/#", Some("u"), name), Err(Unfit), "{name:?}");
            assert_eq!(filled("t/{user}/#", Some(name), "c"), Err(Unfit), "{name:?}");
            assert!(
                filled("t/#", Some(name), name).is_ok(),
                "a rule without placeholders asks nothing"
            );
        }
        assert_eq!(filled("t/{user}", None, "c"), Err(Unfit), "nobody's name");
        assert_eq!(
            filled("t/{client_id}", None, &"x".repeat(65_535)),
            Err(Unfit),
            "too long to be a filter"
        );
    }

    #[test]
    fn what_is_no_filter_is_no_pattern() {
        for text in ["", "a/{user}#", "{client_id}+", "#/{user}"] {
            assert!(Pattern::parse(text).is_err(), "{text:?}");
        }
    }
}
