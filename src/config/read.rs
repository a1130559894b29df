//! Reads typed values out of the parsed TOML and notes every mistake on the way, so that one run shows them all.
//!
//! A [`Section`] is one table. Each key is asked for once; what was asked for is what the section knows, and
//! [`Section::finish`] reports the rest. A reading method gives None both where a key is absent and where its value is
//! wrong (then a fault is noted): the caller goes on with a default, and no config comes out in the end.

use std::ops::Range;
use std::time::Duration;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::fault::Fault;
use crate::message::TopicFilter;

pub(super) type Span = Range<usize>;

/// The faults and warnings found so far.
#[derive(Debug, Default)]
pub(super) struct Notes {
    pub faults: Vec<Fault>,
    pub warnings: Vec<Fault>,
}

/// A value and where it stands.
#[derive(Debug, Clone)]
pub(super) struct At<T> {
    pub value: T,
    pub span: Span,
}

pub(super) struct Section<'a, 'i> {
    /// As the user writes it: `[[uplink]]`.
    pub label: String,
    /// Where the table is opened.
    pub header: Span,
    table: &'a DeTable<'i>,
    asked: Vec<&'static str>,
}

/// The known name that was most likely meant.
pub(super) fn nearest<'n>(name: &str, known: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    let name = name.to_lowercase();
    let likely = |candidate: &'n str| {
        let lower = candidate.to_lowercase();
        let length = name.chars().count().min(lower.chars().count());
        let distance = strsim::osa_distance(&name, &lower);
        let is_part = length >= 3 && (lower.starts_with(&name) || name.starts_with(&lower));
        let is_near = length >= 3 && distance <= 1 + length / 3;
        (is_near || is_part).then_some((distance, candidate))
    };
    known
        .into_iter()
        .filter_map(likely)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// `"a", "b" and "c"`
pub(super) fn list<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    let quoted: Vec<String> = names.into_iter().map(|n| format!("{n:?}")).collect();
    match quoted.split_last() {
        None => String::new(),
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} and {last}", others.join(", ")),
    }
}

/// "an integer", "a table", …
pub(super) fn kind_of(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "an integer",
        DeValue::Float(_) => "a float",
        DeValue::Boolean(_) => "a boolean",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

pub(super) fn integer(value: &DeValue<'_>) -> Option<i64> {
    value
        .as_integer()
        .and_then(|i| i64::from_str_radix(i.as_str(), i.radix()).ok())
}

pub(super) fn size_text(bytes: u64) -> String {
    match bytes {
        b if b >= 1 << 40 && b % (1 << 40) == 0 => format!("{} TiB", b >> 40),
        b if b >= 1 << 30 && b % (1 << 30) == 0 => format!("{} GiB", b >> 30),
        b if b >= 1 << 20 && b % (1 << 20) == 0 => format!("{} MiB", b >> 20),
        b if b >= 1 << 10 && b % (1 << 10) == 0 => format!("{} KiB", b >> 10),
        b => format!("{b} B"),
    }
}

fn integer_text(range: &std::ops::RangeInclusive<i64>) -> String {
    match (*range.start(), *range.end()) {
        (i64::MIN, i64::MAX) => "integer".to_owned(),
        (min, max) => format!("integer, {min} to {max}"),
    }
}

fn duration_text(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

impl Notes {
    pub fn fault(&mut self, fault: Fault) {
        self.faults.push(fault);
    }

    pub fn warn(&mut self, warning: Fault) {
        self.warnings.push(warning);
    }
}

impl Notes {
    /// Whether the text is of one line, which all are but secrets and a module's config. Others are not quoted in
    /// faults either: a stray `"""` makes half of the file, with its secrets, a value.
    pub fn is_one_line(&mut self, text: &str, span: Span) -> bool {
        let is = !text.chars().any(char::is_control);
        if !is {
            let fault = Fault::new(span, "the text has a line break or another control character in it");
            self.fault(fault.hint("write it on one line, in plain quotes: \"…\""));
        }
        is
    }
}

impl<'a, 'i> Section<'a, 'i> {
    pub fn new(label: impl Into<String>, header: Span, table: &'a DeTable<'i>) -> Section<'a, 'i> {
        Section {
            label: label.into(),
            header,
            table,
            asked: Vec::new(),
        }
    }

    /// The raw value. Every other method goes through here.
    pub fn take(&mut self, key: &'static str) -> Option<&'a Spanned<DeValue<'i>>> {
        debug_assert!(!self.asked.contains(&key), "{key} is asked for twice");
        self.asked.push(key);
        self.takes(key, String::new);
        self.table.get(key)
    }

    /// Looked at before it is decided who takes it.
    pub fn peek(&self, key: &str) -> Option<&'a Spanned<DeValue<'i>>> {
        self.table.get(key)
    }

    /// The same, of a key that takes this.
    fn take_a(&mut self, key: &'static str, what: impl FnOnce() -> String) -> Option<&'a Spanned<DeValue<'i>>> {
        let value = self.take(key);
        self.takes(key, what);
        value
    }

    /// What a key takes, in words: the reference is made of it.
    pub fn takes(&self, key: &str, what: impl FnOnce() -> String) {
        #[cfg(test)]
        asked::note(&self.label, key, what);
        #[cfg(not(test))]
        let _ = (key, what);
    }

    pub fn key_span(&self, key: &str) -> Option<Span> {
        self.table.get_key_value(key).map(|(k, _)| k.span())
    }

    pub fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    pub fn wrong(&self, notes: &mut Notes, key: &str, value: &Spanned<DeValue<'_>>, wanted: &str, example: &str) {
        let found = kind_of(value.get_ref());
        let message = format!("{key} in {} must be {wanted}, not {found}", self.label);
        notes.fault(Fault::new(value.span(), message).hint(format!("write {key} = {example}")));
    }

    pub fn missing(&self, notes: &mut Notes, key: &str, example: &str) {
        let message = format!("{} has no {key:?}", self.label);
        notes.fault(
            Fault::new(self.header.clone(), message)
                .hint(format!("add {key} = {example}"))
                .dependent(),
        );
    }

    /// Reports every key that was not asked for.
    pub fn finish(self, notes: &mut Notes) {
        for key in self.table.keys() {
            let name: &str = key.get_ref();
            if self.asked.contains(&name) {
                continue;
            }
            let hint = match nearest(name, self.asked.iter().copied()) {
                Some(near) => format!("did you mean {near:?}?"),
                None => format!("the keys known here are {}", list(self.asked.iter().copied())),
            };
            let fault = Fault::new(key.span(), format!("unknown key {name:?} in {}", self.label)).hint(hint);
            // What follows a broken [header] ends up at the top level, through no fault of its own.
            notes.fault(if self.header.is_empty() {
                fault.dependent()
            } else {
                fault
            });
        }
    }

    pub fn string(&mut self, notes: &mut Notes, key: &'static str, example: &str) -> Option<At<String>> {
        let value = self.take_a(key, || "text".to_owned())?;
        match value.get_ref().as_str() {
            Some("") => {
                let message = format!("{key} in {} is empty", self.label);
                notes
                    .fault(Fault::new(value.span(), message).hint(format!("write {key} = {example}, or leave it out")));
                None
            }
            Some(text) if !notes.is_one_line(text, value.span()) => None,
            Some(text) => Some(At {
                value: text.to_owned(),
                span: value.span(),
            }),
            None => {
                self.wrong(notes, key, value, "a string", example);
                None
            }
        }
    }

    pub fn required_string(&mut self, notes: &mut Notes, key: &'static str, example: &str) -> Option<At<String>> {
        if !self.has(key) {
            self.missing(notes, key, example);
        }
        self.string(notes, key, example)
    }

    pub fn boolean(&mut self, notes: &mut Notes, key: &'static str) -> Option<At<bool>> {
        let value = self.take_a(key, || "true or false".to_owned())?;
        let Some(flag) = value.get_ref().as_bool() else {
            self.wrong(notes, key, value, "true or false", "true");
            return None;
        };
        Some(At {
            value: flag,
            span: value.span(),
        })
    }

    pub fn integer(
        &mut self,
        notes: &mut Notes,
        key: &'static str,
        range: std::ops::RangeInclusive<i64>,
    ) -> Option<i64> {
        let value = self.take_a(key, || integer_text(&range))?;
        if value.get_ref().as_integer().is_none() {
            self.wrong(notes, key, value, "an integer", &range.start().to_string());
            return None;
        }
        match integer(value.get_ref()) {
            Some(n) if range.contains(&n) => Some(n),
            _ => {
                let message = format!("{key} in {} must be {} to {}", self.label, range.start(), range.end());
                notes.fault(Fault::new(value.span(), message));
                None
            }
        }
    }

    /// A finite number, whole or not.
    pub fn number(&mut self, notes: &mut Notes, key: &'static str, example: &str) -> Option<At<f64>> {
        let value = self.take_a(key, || "number".to_owned())?;
        let number = match value.get_ref() {
            DeValue::Float(float) => float.as_str().replace('_', "").parse::<f64>().ok(),
            DeValue::Integer(_) => integer(value.get_ref()).map(|n| n as f64),
            _ => {
                self.wrong(notes, key, value, "a number", example);
                return None;
            }
        };
        let Some(number) = number.filter(|n| n.is_finite()) else {
            let message = format!("{key} in {} must be a finite number", self.label);
            notes.fault(Fault::new(value.span(), message).hint(format!("write {key} = {example}")));
            return None;
        };
        Some(At {
            value: number,
            span: value.span(),
        })
    }

    /// `"16 MiB"`, or an integer: bytes.
    pub fn size(&mut self, notes: &mut Notes, key: &'static str, range: std::ops::RangeInclusive<u64>) -> Option<u64> {
        let value = self.take_a(key, || {
            format!("size, {} to {}", size_text(*range.start()), size_text(*range.end()))
        })?;
        let example = "\"16 MiB\"";
        let bytes = match value.get_ref() {
            DeValue::String(text) if !notes.is_one_line(text, value.span()) => return None,
            DeValue::String(text) => match text.trim().parse::<bytesize::ByteSize>() {
                Ok(size) => Some(size.as_u64()),
                Err(_) => {
                    let message = format!("{text:?} is not a size");
                    let hint = format!("write a number and a unit (B, KiB, MiB, GiB, kB, MB, GB): {key} = {example}");
                    notes.fault(Fault::new(value.span(), message).hint(hint));
                    return None;
                }
            },
            DeValue::Integer(_) => integer(value.get_ref()).and_then(|n| u64::try_from(n).ok()),
            _ => {
                self.wrong(notes, key, value, "a size", example);
                return None;
            }
        };
        if let Some(bytes) = bytes.filter(|b| range.contains(b)) {
            return Some(bytes);
        }
        let (min, max) = (size_text(*range.start()), size_text(*range.end()));
        notes.fault(Fault::new(
            value.span(),
            format!("{key} in {} must be {min} to {max}", self.label),
        ));
        None
    }

    /// `"10 s"`, `"30 days"`, `"1h 30m"`.
    pub fn duration(
        &mut self,
        notes: &mut Notes,
        key: &'static str,
        range: std::ops::RangeInclusive<Duration>,
    ) -> Option<At<Duration>> {
        let value = self.take_a(key, || {
            format!(
                "duration, {} to {}",
                duration_text(*range.start()),
                duration_text(*range.end())
            )
        })?;
        let DeValue::String(text) = value.get_ref() else {
            let example = match integer(value.get_ref()) {
                Some(n) if n > 0 => format!("\"{n} s\""),
                _ => "\"10 s\"".to_owned(),
            };
            self.wrong(notes, key, value, "a duration as text", &example);
            return None;
        };
        if !notes.is_one_line(text, value.span()) {
            return None;
        }
        match humantime::parse_duration(text.trim()) {
            Ok(duration) if range.contains(&duration) => Some(At {
                value: duration,
                span: value.span(),
            }),
            Ok(_) => {
                let min = humantime::format_duration(*range.start());
                let max = humantime::format_duration(*range.end());
                notes.fault(Fault::new(
                    value.span(),
                    format!("{key} in {} must be {min} to {max}", self.label),
                ));
                None
            }
            Err(_) => {
                let hint = format!("write a number and a unit (ms, s, min, h, days): {key} = \"10 s\"");
                notes.fault(Fault::new(value.span(), format!("{text:?} is not a duration")).hint(hint));
                None
            }
        }
    }

    /// One of a few words.
    pub fn choice<T: Copy>(&mut self, notes: &mut Notes, key: &'static str, choices: &[(&str, T)]) -> Option<T> {
        let names = || choices.iter().map(|(name, _)| *name);
        let example = format!("{:?}", names().next().unwrap_or(""));
        let word = self.string(notes, key, &example);
        self.takes(key, || list(names()).replace(" and ", " or "));
        let word = word?;
        let found = choices
            .iter()
            .find(|(name, _)| *name == word.value)
            .map(|(_, value)| *value);
        if found.is_none() {
            let hint = match nearest(&word.value, names()) {
                Some(near) => format!("did you mean {near:?}?"),
                None => format!("write {}", list(names()).replace(" and ", " or ")),
            };
            let message = format!("{key} in {} cannot be {:?}", self.label, word.value);
            notes.fault(Fault::new(word.span, message).hint(hint));
        }
        found
    }

    pub fn filters(&mut self, notes: &mut Notes, key: &'static str) -> Option<Vec<TopicFilter>> {
        let texts = self.texts(notes, key);
        self.takes(key, || "list of topic filters".to_owned());
        let texts = texts?;
        let mut filters = Vec::with_capacity(texts.len());
        for text in texts {
            if let Some(filter) = filter(notes, &text, &text.value) {
                filters.push(filter);
            }
        }
        Some(filters)
    }

    /// A list of strings.
    pub fn texts(&mut self, notes: &mut Notes, key: &'static str) -> Option<Vec<At<String>>> {
        let value = self.take_a(key, || "list of texts".to_owned())?;
        let items = match value.get_ref() {
            DeValue::Array(items) => items,
            other => {
                let example = match other {
                    DeValue::String(text) if !text.contains('\n') => format!("[{text:?}]"),
                    _ => "[\"sensors/#\"]".to_owned(),
                };
                self.wrong(notes, key, value, "a list of topic filters", &example);
                return None;
            }
        };
        let mut texts = Vec::with_capacity(items.len());
        for item in items.iter() {
            match item.get_ref().as_str() {
                Some(text) if !notes.is_one_line(text, item.span()) => {}
                Some(text) => texts.push(At {
                    value: text.to_owned(),
                    span: item.span(),
                }),
                None => self.wrong(notes, key, item, "a list of strings", "[\"sensors/#\"]"),
            }
        }
        Some(texts)
    }
}

/// `text` is what `typed` means; they differ where a placeholder was filled in.
pub(super) fn filter(notes: &mut Notes, typed: &At<String>, text: &str) -> Option<TopicFilter> {
    if text.starts_with("$share/") {
        let message = format!("{text:?} is a shared subscription, which only clients make");
        notes.fault(Fault::new(typed.span.clone(), message).hint("write the filter without $share/NAME/"));
        return None;
    }
    match TopicFilter::new(text.to_owned()) {
        Ok(filter) => Some(filter),
        Err(error) => {
            let message = format!("{:?} is not a topic filter: {error}", typed.value);
            notes.fault(Fault::new(typed.span.clone(), message));
            None
        }
    }
}

/// Tests look at what the checker asks for.
#[cfg(test)]
pub(super) mod asked {
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    /// By section and key.
    type Asked = BTreeMap<(String, String), String>;

    /// Of keys whose value is looked at by hand.
    pub const ANYTHING: &str = "";

    thread_local! {
        static ASKED: RefCell<Option<Asked>> = const { RefCell::new(None) };
    }

    pub fn note(label: &str, key: &str, what: impl FnOnce() -> String) {
        ASKED.with_borrow_mut(|asked| {
            if let Some(asked) = asked {
                // Sections are called by their name: `[[uplink]] "cloud"`.
                let section = label.split(" \"").next().unwrap_or(label);
                asked.insert((section.to_owned(), key.to_owned()), what());
            }
        });
    }

    pub fn record(run: impl FnOnce()) -> Asked {
        ASKED.with_borrow_mut(|asked| *asked = Some(Asked::new()));
        run();
        ASKED.with_borrow_mut(Option::take).unwrap_or_default()
    }
}
