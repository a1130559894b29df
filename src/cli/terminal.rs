//! How output looks: colour and redrawing on a terminal, plain text of 80 columns elsewhere. Text of others (topics,
//! payloads, names) never reaches a terminal with its control characters.

use std::io::IsTerminal;

/// Columns where the width is not known, as when piped.
pub(super) const COLUMNS: usize = 80;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colour {
    Green,
    Yellow,
    Red,
    Dim,
    Bold,
}

/// What stdout is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Look {
    pub is_terminal: bool,
    pub colours: bool,
    pub columns: usize,
    pub rows: usize,
}

impl Look {
    pub const PLAIN: Look = Look {
        is_terminal: false,
        colours: false,
        columns: COLUMNS,
        rows: usize::MAX,
    };

    /// Colour only on a terminal, and not where NO_COLOR says so (no-color.org) or the terminal is a dumb one.
    pub fn of_stdout() -> Look {
        if !std::io::stdout().is_terminal() {
            return Look::PLAIN;
        }
        let unwanted = std::env::var_os("NO_COLOR").is_some_and(|v| !v.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|v| v == "dumb");
        let (columns, rows) = size().unwrap_or((COLUMNS, 24));
        Look {
            is_terminal: true,
            colours: !unwanted && !dumb,
            columns,
            rows,
        }
    }

    pub fn paint(self, colour: Colour, text: &str) -> String {
        if !self.colours {
            return text.to_owned();
        }
        let code = match colour {
            Colour::Green => "32",
            Colour::Yellow => "33",
            Colour::Red => "31",
            Colour::Dim => "2",
            Colour::Bold => "1",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}

fn size() -> Option<(usize, usize)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the pointer is to a winsize of this frame, which the call fills in and does not keep.
    let failed = unsafe { libc::ioctl(libc::STDOUT_FILENO, libc::TIOCGWINSZ, &raw mut size) } != 0;
    (!failed && size.ws_col > 0).then(|| (usize::from(size.ws_col).max(40), usize::from(size.ws_row).max(5)))
}

/// The text without what a terminal would obey.
pub(super) fn tame(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

/// At most so many characters, the cut shown by an ellipsis.
pub(super) fn cut(text: &str, columns: usize) -> String {
    if text.chars().count() <= columns {
        return text.to_owned();
    }
    let mut short: String = text.chars().take(columns.saturating_sub(1)).collect();
    short.push('…');
    short
}

/// Words in lines of at most so many columns; a longer word has a line of its own.
pub(super) fn wrap(text: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in text.split_whitespace() {
        let line = lines.last_mut().expect("there is always one");
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > columns {
            lines.push(word.to_owned());
        } else {
            if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
        }
    }
    lines
}

/// `1234567` as `1.2 M`: for people.
pub(super) fn count(n: f64) -> String {
    match n {
        n if n >= 1e9 => format!("{:.1} G", n / 1e9),
        n if n >= 1e6 => format!("{:.1} M", n / 1e6),
        n if n >= 1e4 => format!("{:.1} k", n / 1e3),
        n if n >= 100.0 || n.fract() == 0.0 => format!("{n:.0}"),
        n => format!("{n:.1}"),
    }
}

/// Bytes in binary units: `1.5 MiB`.
pub(super) fn bytes(n: u64) -> String {
    let mut value = n as f64;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if value < 1024.0 {
            return if unit == "B" || value >= 100.0 {
                format!("{value:.0} {unit}")
            } else {
                format!("{value:.1} {unit}")
            };
        }
        value /= 1024.0;
    }
    format!("{value:.1} TiB")
}

/// `93784` as `1 d 2 h`.
pub(super) fn duration(seconds: u64) -> String {
    let (d, h, m, s) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    match (d, h, m) {
        (0, 0, 0) => format!("{s} s"),
        (0, 0, _) => format!("{m} min {s} s"),
        (0, _, _) => format!("{h} h {m} min"),
        _ => format!("{d} d {h} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_others_is_tamed() {
        assert_eq!(tame("a\x1b[2Jb\nc\u{9b}d"), "a\u{fffd}[2Jb\u{fffd}c\u{fffd}d");
        assert_eq!(Look::PLAIN.paint(Colour::Red, "x"), "x");
        assert_eq!(cut("abcdef", 4), "abc…");
        assert_eq!(cut("°°°°", 4), "°°°°");
        assert_eq!(wrap("a bb ccc dddddd", 5), ["a bb", "ccc", "dddddd"]);
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(
            [0.0, 0.25, 99.95, 12_345.0, 2e6].map(count),
            ["0", "0.2", "100.0", "12.3 k", "2.0 M"]
        );
        assert_eq!(
            [0, 1023, 1536, 5 << 30].map(bytes),
            ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]
        );
        assert_eq!(
            [59, 61, 3_700, 93_784].map(duration),
            ["59 s", "1 min 1 s", "1 h 1 min", "1 d 2 h"]
        );
    }
}
