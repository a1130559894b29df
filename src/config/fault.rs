//! Mistakes in gateway.toml and how they are shown: file:line:column, the cause, the line with carets, a hint.
//!
//! A value that may be a secret is never shown, not even where the mistake stands on its line: [`mask`] blanks it in the
//! text that lines are taken from, without needing the file to parse.

use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::read::nearest;

/// More faults than this help nobody; the rest is counted.
const FAULTS_SHOWN_MAX: usize = 50;
/// A longer line is shown as a window around the fault.
const LINE_CHARS_MAX: usize = 140;

/// One mistake: what, where, what next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Bytes of the text; None where the file as a whole is meant.
    pub span: Option<Range<usize>>,
    pub message: String,
    pub hint: Option<String>,
    /// Found by comparing places of the file (a missing key, an unknown name). Not reported beside a syntax error, which
    /// may have hidden what seems to be missing.
    pub(super) dependent: bool,
    /// The line is no TOML: what stands in it is anybody's guess, a secret for one.
    pub(super) is_syntax: bool,
    /// Some where it is in another file than gateway.toml itself.
    pub(super) file: Option<Arc<OtherFile>>,
}

/// A file that gateway.toml names, with points for one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct OtherFile {
    pub path: PathBuf,
    pub page: Page,
}

impl Fault {
    pub(super) fn new(span: Range<usize>, message: impl Into<String>) -> Fault {
        Fault {
            span: Some(span),
            message: message.into(),
            hint: None,
            dependent: false,
            is_syntax: false,
            file: None,
        }
    }

    pub(super) fn of_file(message: impl Into<String>) -> Fault {
        Fault {
            span: None,
            message: message.into(),
            hint: None,
            dependent: false,
            is_syntax: false,
            file: None,
        }
    }

    /// The order in which faults are shown: gateway.toml itself first.
    pub(super) fn place(&self) -> (Option<PathBuf>, usize) {
        let path = self.file.as_ref().map(|f| f.path.clone());
        (path, self.span.as_ref().map_or(0, |s| s.start))
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Fault {
        self.hint = Some(hint.into());
        self
    }

    pub(super) fn syntax(mut self) -> Fault {
        self.is_syntax = true;
        self
    }

    pub(super) fn dependent(mut self) -> Fault {
        self.dependent = true;
        self
    }
}

/// Every mistake of one file, in the order of their places. Its `Display` is what the user reads.
#[derive(Debug, Clone)]
pub struct Faults {
    path: PathBuf,
    /// The text with its secrets blanked, and the text's own line starts.
    page: Page,
    pub faults: Vec<Fault>,
}

impl Faults {
    pub fn new(path: &Path, text: &str, mut faults: Vec<Fault>) -> Faults {
        faults.sort_by_key(Fault::place);
        Faults {
            path: path.to_owned(),
            page: Page::new(text),
            faults,
        }
    }
}

impl std::error::Error for Faults {}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        // The file itself is what is wrong: nothing to count.
        if let [
            fault @ Fault {
                span: None, file: None, ..
            },
        ] = self.faults.as_slice()
        {
            return f.write_str(&self.page.render(&self.path, fault, ""));
        }
        for fault in self.faults.iter().take(FAULTS_SHOWN_MAX) {
            writeln!(f, "{}\n", self.page.render(&self.path, fault, ""))?;
        }
        if self.faults.len() > FAULTS_SHOWN_MAX {
            writeln!(f, "… and {} more\n", self.faults.len() - FAULTS_SHOWN_MAX)?;
        }
        let others = match self.faults.iter().any(|f| f.file.is_some()) {
            true => " and the files it names",
            false => "",
        };
        match self.faults.len() {
            1 => write!(f, "1 fault in {path}{others}"),
            n => write!(f, "{n} faults in {path}{others}"),
        }
    }
}

/// A text that lines can be shown of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Page {
    masked: String,
    /// Chars of the original before each masked stretch differ from the masked text's where the secret is not ASCII; the
    /// column is counted in the original: (byte offset, columns to take off).
    shrunk: Vec<(usize, usize)>,
}

impl Page {
    pub(super) fn new(text: &str) -> Page {
        let mut masked = text.to_owned();
        let mut shrunk = Vec::new();
        for range in mask(text) {
            let secret = &text[range.clone()];
            shrunk.push((range.end, secret.len() - secret.chars().count()));
            masked.replace_range(range.clone(), &"*".repeat(range.len()));
        }
        Page { masked, shrunk }
    }

    /// A text that has no secrets in it.
    pub(super) fn open(text: &str) -> Page {
        Page {
            masked: text.to_owned(),
            shrunk: Vec::new(),
        }
    }

    /// The fault without a final newline; `severity` is "" or "warning: ".
    pub(super) fn render(&self, path: &Path, fault: &Fault, severity: &str) -> String {
        match &fault.file {
            Some(file) => file.page.render_own(&file.path, fault, severity),
            None => self.render_own(path, fault, severity),
        }
    }

    fn render_own(&self, path: &Path, fault: &Fault, severity: &str) -> String {
        let path = path.display();
        let mut out = match &fault.span {
            None => format!("{path}: {severity}{}", fault.message),
            Some(span) => {
                let (line, column) = self.line_column(span.start);
                format!(
                    "{path}:{line}:{column}: {severity}{}\n{}",
                    fault.message,
                    self.excerpt(span, fault.is_syntax)
                )
            }
        };
        if let Some(hint) = &fault.hint {
            out.push_str("\nhint: ");
            out.push_str(hint);
        }
        out
    }

    fn line_start(&self, offset: usize) -> usize {
        self.masked[..offset].rfind('\n').map_or(0, |at| at + 1)
    }

    /// `offset` brought to a character's start within the text: spans come from a parser, but nothing here may panic.
    fn clamp(&self, offset: usize) -> usize {
        let mut offset = offset.min(self.masked.len());
        while !self.masked.is_char_boundary(offset) {
            offset -= 1;
        }
        offset
    }

    /// Both from 1; the column counts characters.
    fn line_column(&self, offset: usize) -> (usize, usize) {
        let offset = self.clamp(offset);
        let start = self.line_start(offset);
        let line = self.masked[..start].matches('\n').count() + 1;
        let off: usize = self
            .shrunk
            .iter()
            .filter(|(end, _)| (start..=offset).contains(end))
            .map(|(_, n)| n)
            .sum();
        (
            line,
            (self.masked[start..offset].chars().count() + 1).saturating_sub(off),
        )
    }

    fn excerpt(&self, span: &Range<usize>, is_syntax: bool) -> String {
        let from = self.clamp(span.start);
        let start = self.line_start(from);
        let end = self.masked[from..].find('\n').map_or(self.masked.len(), |at| from + at);
        let to = self.clamp(span.end).clamp(from, end);
        let line = self.masked[start..end].trim_end_matches('\r');
        // Only the shape of a line that may be anything.
        let shape = |c: char| if c.is_alphanumeric() { '*' } else { c };
        let line: &str = &match is_syntax && !is_harmless(line) {
            true => {
                let shown = line
                    .find('=')
                    .filter(|at| line[..*at].trim().chars().all(is_key_char))
                    .unwrap_or(0);
                line[..shown]
                    .chars()
                    .chain(line[shown..].chars().map(shape))
                    .collect::<String>()
            }
            false => line.to_owned(),
        };
        let before = self.masked[start..from].chars().count();
        let marked = self.masked[from..to].trim_end().chars().count().max(1);

        let length = line.chars().count();
        let first = if length > LINE_CHARS_MAX {
            before.saturating_sub(LINE_CHARS_MAX / 3)
        } else {
            0
        };
        let mut shown: String = line.chars().skip(first).take(LINE_CHARS_MAX).collect();
        let mut indent: String = line
            .chars()
            .skip(first)
            .take(before - first)
            .map(|c| if c == '\t' { '\t' } else { ' ' })
            .collect();
        if first > 0 {
            shown.insert(0, '…');
            indent.insert(0, ' ');
        }
        if first + LINE_CHARS_MAX < length {
            shown.push('…');
        }
        // A control character in the file must not reach the terminal.
        let shown: String = shown
            .chars()
            .map(|c| if c.is_control() && c != '\t' { '\u{fffd}' } else { c })
            .collect();
        let room = LINE_CHARS_MAX.saturating_sub(before - first).max(1);
        format!("    {shown}\n    {indent}{}", "^".repeat(marked.min(room)))
    }
}

/// Keys whose values are secret, and what people write when they mean one of them.
fn is_secret_key(key: &str) -> bool {
    let key = key.to_lowercase();
    [
        "pass",
        "auth",
        "pwd",
        "secret",
        "token",
        "sas",
        "connection_string",
        "_key",
    ]
    .iter()
    .any(|part| key.contains(part))
        || strsim::osa_distance(&key, "password") <= 3
        || strsim::osa_distance(&key, "password_hash") <= 4
}

/// Keys whose values are shown, in a line that is broken elsewhere too. What is neither one of them nor looks like a slip
/// of one may be a secret.
#[rustfmt::skip]
const HARMLESS: &[&str] = &[
    "name", "data_dir", "revert_after", "refused_publish", "sys_interval", "failed_logins_per_minute", "bind", "allow_anonymous", "max_packet", "max_connections", "max_keep_alive", "subscribe_refusal", "websocket", "proxy_protocol", "tls",
    "max_messages_per_second", "max_bytes_per_second", "max_subscriptions", "max_queued_bytes",
    "client_ca", "client_cert", "client_identity", "origins",
    "publish", "subscribe", "deny_publish", "deny_subscribe", "filter", "max_bytes", "max_age", "when_full", "dir",
    "config", "memory", "deadline", "kind", "url", "path", "keep", "version", "client_id", "username", "keep_alive",
    "window", "ack_timeout", "ca", "cert", "key", "server_name", "file", "env", "credential", "from", "to", "from_uplink",
    "topic", "connector", "every", "points", "points_file", "address", "type", "unit", "unit_id", "deadband", "writable",
    "scale", "offset", "min", "max", "read_back", "length", "report", "max_silence", "payload", "command_max_age",
    "safe_uplink", "safe_after", "order", "timeout", "device", "chip", "bus", "select", "speed", "mode", "sensor",
    "device_address", "gain", "data_rate", "byte_order", "direction", "active_low", "bias", "edge", "count", "debounce",
    "safe", "frequency", "inverted",
    "baud", "parity", "stop_bits", "data_bits", "quiet", "max_gap", "max_registers", "max_coils", "write_function",
];

fn is_key_char(c: char) -> bool {
    c.is_alphanumeric() || c == '_' || c == '-'
}

/// A section's header, or a line that begins with a harmless key.
fn is_harmless(line: &str) -> bool {
    let line = line.trim_start();
    let after = line.trim_start_matches(|c: char| c.is_ascii_lowercase() || c == '_');
    line.starts_with('[')
        || (after.trim_start().starts_with('=') && HARMLESS.contains(&&line[..line.len() - after.len()]))
}

/// The stretches of the text that may hold a secret, in order. Works on text that is no TOML at all.
fn mask(text: &str) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    for (from, to) in words(text) {
        let blank = |at: usize| at + text[at..].len() - text[at..].trim_start_matches([' ', '\t']).len();
        let after = blank(to + text[to..].len() - text[to..].trim_start_matches(['"', '\'']).len());
        let is_assigned = text[after..].starts_with('=');
        let value = if is_assigned { blank(after + 1) } else { after };
        let before = text[..from].trim_end_matches([' ', '\t', '"', '\'']);
        // The = may be what is missing.
        if !is_assigned && !before.is_empty() && !before.ends_with(['\n', '{', ',']) {
            continue;
        }
        let word = &text[from..to];
        if !is_secret_key(word) {
            // A number or a boolean is no secret, unless the key says so.
            let is_number = !text[value..].starts_with(['"', '\'', '{', '[']);
            if !is_assigned
                || is_number
                || HARMLESS.contains(&word)
                || nearest(word, HARMLESS.iter().copied()).is_some()
            {
                continue;
            }
        }
        if text[value..].starts_with('{') {
            mask_reference(text, value, &mut ranges);
        } else {
            ranges.push(value_range(text, value));
        }
    }
    for (at, _) in text.match_indices(['@', ':']) {
        ranges.extend(url_range(text, at));
    }
    ranges.retain(|r| !r.is_empty());
    ranges.sort_by_key(|r| (r.start, r.end));
    ranges.dedup_by(|next, kept| {
        let overlaps = next.start < kept.end;
        if overlaps {
            kept.end = kept.end.max(next.end);
        }
        overlaps
    });
    ranges
}

/// The stretches that could be keys.
fn words(text: &str) -> impl Iterator<Item = (usize, usize)> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let from = at + text[at..].find(is_key_char)?;
        at = text[from..].find(|c| !is_key_char(c)).map_or(text.len(), |n| from + n);
        Some((from, at))
    })
}

/// What is inside a string that begins at `at`, or everything to the line's end where it is no string.
fn value_range(text: &str, at: usize) -> Range<usize> {
    let rest = &text[at..];
    for triple in ["\"\"\"", "'''"] {
        if rest.starts_with(triple) {
            let from = at + 3;
            return from..text[from..].find(triple).map_or(text.len(), |n| from + n);
        }
    }
    let line_end = at + rest.find('\n').unwrap_or(rest.len());
    let Some(quote) = rest.chars().next().filter(|c| *c == '"' || *c == '\'') else {
        return at..line_end;
    };
    let mut escaped = false;
    for (n, c) in text[at + 1..line_end].char_indices() {
        if c == quote && !escaped {
            return at + 1..at + 1 + n;
        }
        escaped = quote == '"' && c == '\\' && !escaped;
    }
    at + 1..line_end
}

/// The `user:password` of a URL, given the `@` after it; or, where that is missing, what follows the host's `:` and is
/// no port.
fn url_range(text: &str, at: usize) -> Option<Range<usize>> {
    let ends = ['"', '\'', '\n'];
    if text[at..].starts_with('@') {
        let line = text[..at].rfind('\n').map_or(0, |n| n + 1);
        let start = text[line..at].find(['"', '\'']).map_or(line, |n| line + n + 1);
        let before = &text[start..at];
        let after = |mark: &str| before.find(mark).map(|n| n + 2);
        return after("//")
            .or(after(":/"))
            .or(before.find(':').map(|_| 0))
            .map(|from| start + from..at);
    }
    let start = text[..at].rfind(ends).map_or(0, |n| n + 1);
    let before = &text[start..at];
    let host = &before[before.find("//")? + 2..];
    let end = text[at..].find(ends).map_or(text.len(), |n| at + n);
    if host.contains(['/', '[']) || text[at..end].contains('@') {
        return None;
    }
    let port = text[at + 1..end].split('/').next().unwrap_or("");
    (!port.bytes().all(|b| b.is_ascii_digit())).then_some(at + 1..end)
}

/// `{ file = "…" }` names a place and is shown; whatever else stands in the braces may be anything and is not.
fn mask_reference(text: &str, at: usize, ranges: &mut Vec<Range<usize>>) {
    let end = text[at..].find(['}', '\n']).map_or(text.len(), |n| at + n);
    let inner = text[at + 1..end].trim();
    let is_place = ["file", "env", "credential"].iter().any(|source| {
        let value = inner
            .strip_prefix(source)
            .and_then(|rest| rest.trim_start().strip_prefix('='));
        value.map(str::trim).is_some_and(|value| {
            value.len() >= 2 && value.starts_with(['"', '\'']) && value_range(value, 0) == (1..value.len() - 1)
        })
    });
    if !(is_place && text[end..].starts_with('}')) {
        ranges.push(at + 1..end);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masked(text: &str) -> String {
        Page::new(text).masked
    }

    #[test]
    fn secrets_are_blanked_and_references_are_shown() {
        assert_eq!(masked("password = \"hunter2\" # x"), "password = \"*******\" # x");
        assert_eq!(masked("pasword = 'hunter2'"), "pasword = '*******'");
        assert_eq!(masked("\"password\" = \"a\\\"b\""), "\"password\" = \"****\"");
        assert_eq!(masked("password = hunter2\nx = 1"), "password = *******\nx = 1");
        assert_eq!(masked("password = \"hunter2\nx = 1"), "password = \"*******\nx = 1");
        assert_eq!(
            masked("password = \"\"\"hun\nter\"\"\""),
            "password = \"\"\"*******\"\"\""
        );
        assert_eq!(
            masked("password = { file = \"p.txt\" }"),
            "password = { file = \"p.txt\" }"
        );
        assert_eq!(
            masked("password = { value = \"hunter2\" }"),
            "password = {*******************}"
        );
        assert_eq!(
            masked("{ name = \"n\", password = \"s\", x = 1 }"),
            "{ name = \"n\", password = \"*\", x = 1 }"
        );
        assert_eq!(
            masked("url = \"mqtt://me:s/e@c@host:1\""),
            "url = \"mqtt://********@host:1\""
        );
        assert_eq!(masked("url = \"mqtt:/me:se@host:1\""), "url = \"mqtt:/*****@host:1\"");
        assert_eq!(masked("url = \"mqtt://me:secret"), "url = \"mqtt://me:******");
        assert_eq!(masked("url = \"ws://host:80/a:b\""), "url = \"ws://host:80/a:b\"");
        assert_eq!(
            masked("keep = 1\n  password \"hunter2\""),
            "keep = 1\n  password \"*******\""
        );
        assert_eq!(
            masked("tls = { file = \"my.password\" }"),
            "tls = { file = \"my.password\" }"
        );
        assert_eq!(masked("auth = \"abc\"\nto = \"x\""), "auth = \"***\"\nto = \"x\"");
        assert_eq!(masked("bnid = \"abc\"\nscale = 10"), "bnid = \"abc\"\nscale = 10");
        assert_eq!(masked("api_token=\"abc\""), "api_token=\"***\"");
        assert_eq!(masked("bind = \"[::1]:1883\""), "bind = \"[::1]:1883\"");
    }

    #[test]
    fn columns_count_characters_of_the_original() {
        let text = "äö = \"é\"\npassword = \"ééé\" x\n";
        let page = Page::new(text);
        assert_eq!(page.line_column(text.find('=').expect("there")), (1, 4));
        assert_eq!(page.line_column(text.find('x').expect("there")), (2, 18));
        assert_eq!(page.line_column(text.len()), (3, 1));
    }

    #[test]
    fn an_excerpt_survives_any_span() {
        let text = "a = 'ä'\r\n\tb = 2\n";
        let page = Page::new(text);
        for start in 0..=text.len() + 2 {
            for end in 0..=text.len() + 2 {
                let excerpt = page.excerpt(&Range { start, end }, false);
                assert_eq!(excerpt.lines().count(), 2, "{start}..{end}: {excerpt:?}");
            }
        }
        assert_eq!(page.excerpt(&(11..12), false), "    \tb = 2\n    \t^");
    }

    #[test]
    fn a_long_line_is_cut_around_the_fault() {
        let text = format!("points = [{}]", "\"abcdefgh\", ".repeat(100));
        let excerpt = Page::new(&text).excerpt(&(605..615), false);
        let lines: Vec<&str> = excerpt.lines().collect();
        assert!(lines[0].chars().count() < 160 && lines[0].contains('…'), "{excerpt}");
        let caret = lines[1].chars().position(|c| c == '^').expect("a caret");
        let shown: String = lines[0].chars().skip(caret).take(10).collect();
        assert_eq!(shown, text[605..615]);
    }

    #[test]
    fn a_flood_of_faults_is_cut_and_counted() {
        let text = "x\n".repeat(60);
        let faults = (0..60)
            .rev()
            .map(|n| Fault::new(n * 2..n * 2 + 1, format!("fault {n}.")))
            .collect();
        let shown = Faults::new(Path::new("gateway.toml"), &text, faults).to_string();
        assert!(
            shown.starts_with("gateway.toml:1:1: fault 0.") && shown.contains("fault 49."),
            "{shown}"
        );
        assert!(
            !shown.contains("fault 50.") && shown.ends_with("… and 10 more\n\n60 faults in gateway.toml"),
            "{shown}"
        );
    }
}
