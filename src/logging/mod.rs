//! What is logged and how it looks: coloured on a terminal, plain in a file, with its priority in the journal.
//!
//! One event is one line, whatever is in its fields. The same thing of the same part again and again becomes a count
//! (see [`repeats`]); `TIDEGATE_LOG` sets what is wanted (`debug`, `tidegate::uplinks=trace,info`).

mod repeats;

use std::fmt;
use std::io::IsTerminal;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Context, Filter};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;

use crate::clock;
use repeats::{LeftOut, Repeats};

/// Fields that say which part an event is of, the first that is there. An address of a peer is none: its port is new each
/// time.
const PART_FIELDS: [&str; 9] = [
    "uplink",
    "connector",
    "module",
    "asset",
    "client",
    "stream",
    "name",
    "user",
    "bind",
];
/// Lines of one part, and of all parts together, from one place in the source before they are counted.
const BURST: u64 = 10;
const BURST_OF_ALL: u64 = 100;
/// Of a field's text in a key.
const PART_BYTES_MAX: usize = 100;
/// Counts are said under this target, which is never itself held back.
const COUNTS: &str = "tidegate::repeats";
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub fn start() {
    let wanted = std::env::var("TIDEGATE_LOG").unwrap_or_default();
    let default = Targets::new().with_default(Level::INFO);
    let targets = if wanted.is_empty() {
        default
    } else {
        wanted.parse().unwrap_or(default)
    };
    let look = if is_journal() {
        Look::Journal
    } else if std::io::stderr().is_terminal() {
        Look::Terminal
    } else {
        Look::File
    };
    let held_back = Arc::new(HeldBack::default());
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(matches!(look, Look::Terminal))
        .event_format(OneLine(look))
        .with_filter(Wanted {
            targets,
            held_back: Arc::clone(&held_back),
        });
    // A second gateway in one process (tests) keeps the first one's subscriber.
    if tracing_subscriber::registry().with(layer).try_init().is_ok() {
        let counts = std::thread::Builder::new().name("log-counts".into());
        if let Err(e) = counts.spawn(move || held_back.say_counts()) {
            tracing::warn!(cause = %e, "repeated lines are left out without a count: no thread for it");
        }
    }
}

/// JOURNAL_STREAM names the device and inode of the stream that the service manager made: a daemon whose stderr was sent
/// elsewhere inherits the variable all the same.
fn is_journal() -> bool {
    let Ok(stream) = std::env::var("JOURNAL_STREAM") else {
        return false;
    };
    // SAFETY: stat is plain integers, for which all zeroes is a valid value.
    let mut stat: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a stat of this frame, which fstat fills in and does not keep.
    if unsafe { libc::fstat(libc::STDERR_FILENO, &raw mut stat) } != 0 {
        return false;
    }
    stream == format!("{}:{}", stat.st_dev, stat.st_ino)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Look {
    Terminal,
    File,
    /// Stamped by the journal itself; begins with a priority (sd-daemon(3)).
    Journal,
}

struct OneLine(Look);

impl<S, N> FormatEvent<S, N> for OneLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, ctx: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let format = tracing_subscriber::fmt::format().with_target(false);
        let mut line = String::new();
        match self.0 {
            Look::Terminal => format
                .with_ansi(true)
                .format_event(ctx, Writer::new(&mut line), event)?,
            Look::File => format
                .with_ansi(false)
                .format_event(ctx, Writer::new(&mut line), event)?,
            Look::Journal => {
                write!(writer, "<{}>", priority(event.metadata().level()))?;
                let format = format.with_ansi(false).without_time().with_level(false);
                format.format_event(ctx, Writer::new(&mut line), event)?;
            }
        }
        writer.write_str(&one_line(line.trim_end(), self.0))?;
        writer.write_char('\n')
    }
}

/// syslog's: 3 error, 4 warning, 6 informational, 7 debug.
fn priority(level: &Level) -> u8 {
    match *level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        _ => 7,
    }
}

/// A line break in a field would begin a line that looks like one of ours.
fn one_line(text: &str, look: Look) -> String {
    let keeps = |c: char| look == Look::Terminal && c == '\x1b';
    let shown = |c: char| match c {
        '\n' | '\r' => ' ',
        c if c.is_control() && !keeps(c) => '\u{fffd}',
        c => c,
    };
    text.chars().map(shown).collect()
}

/// A place in the source.
type Place = tracing::callsite::Identifier;

/// What a count says.
#[derive(Debug, Clone)]
struct What {
    level: Level,
    message: String,
    part: String,
}

struct HeldBack {
    counts: Mutex<Counts>,
    some: Condvar,
}

struct Counts {
    by_part: Repeats<(Place, String), What>,
    /// Bounded by the places there are.
    by_place: Repeats<Place, What>,
}

impl Counts {
    fn is_empty(&self) -> bool {
        self.by_part.is_empty() && self.by_place.is_empty()
    }

    fn ended(&mut self, now: clock::Instant) -> Vec<LeftOut<What>> {
        let mut ended = self.by_part.ended(now);
        ended.extend(self.by_place.ended(now));
        ended
    }
}

impl Default for HeldBack {
    fn default() -> Self {
        HeldBack {
            counts: Mutex::new(Counts {
                by_part: Repeats::new(BURST),
                by_place: Repeats::new(BURST_OF_ALL),
            }),
            some: Condvar::new(),
        }
    }
}

struct Wanted {
    targets: Targets,
    held_back: Arc<HeldBack>,
}

impl<S: Subscriber> Filter<S> for Wanted {
    fn enabled(&self, metadata: &Metadata<'_>, cx: &Context<'_, S>) -> bool {
        Filter::<S>::enabled(&self.targets, metadata, cx)
    }

    fn callsite_enabled(&self, metadata: &'static Metadata<'static>) -> tracing::subscriber::Interest {
        Filter::<S>::callsite_enabled(&self.targets, metadata)
    }

    fn max_level_hint(&self) -> Option<tracing_subscriber::filter::LevelFilter> {
        Filter::<S>::max_level_hint(&self.targets)
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        event.metadata().target() == COUNTS || self.held_back.may_pass(event)
    }
}

impl HeldBack {
    fn may_pass(&self, event: &Event<'_>) -> bool {
        // Who asks for details gets them all.
        if *event.metadata().level() > Level::INFO {
            return true;
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let part = fields.part.map(|(_, text)| text).unwrap_or_default();
        let (place, level, message) = (event.metadata().callsite(), *event.metadata().level(), fields.message);
        let what = |part: &str| What {
            level,
            message: message.clone(),
            part: part.to_owned(),
        };
        let now = clock::monotonic();
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let was_empty = counts.is_empty();
        let pass = counts.by_part.note((place.clone(), part.clone()), now, || what(&part))
            && counts.by_place.note(place, now, || what("several"));
        if was_empty {
            self.some.notify_one();
        }
        pass
    }

    /// The thread that says them: asleep while there is nothing to count.
    fn say_counts(&self) {
        loop {
            let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
            while counts.is_empty() {
                counts = self.some.wait(counts).unwrap_or_else(PoisonError::into_inner);
            }
            let ended = counts.ended(clock::monotonic());
            drop(counts);
            ended.into_iter().for_each(say);
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// The level of an event is part of its callsite, so there is one for each.
fn say(count: LeftOut<What>) {
    let (times, within_s) = (count.times, count.within.as_secs());
    let What { level, message, part } = count.what;
    match level {
        Level::ERROR => tracing::error!(target: COUNTS, part, times, within_s, "again and again: {message}"),
        Level::WARN => tracing::warn!(target: COUNTS, part, times, within_s, "again and again: {message}"),
        _ => tracing::info!(target: COUNTS, part, times, within_s, "again and again: {message}"),
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    /// The rank of the field, and its text.
    part: Option<(usize, String)>,
}

impl Fields {
    fn take(&mut self, field: &Field, text: impl FnOnce() -> String) {
        if field.name() == "message" {
            self.message = text();
            return;
        }
        let rank = PART_FIELDS.iter().position(|name| *name == field.name());
        if let Some(rank) = rank.filter(|rank| self.part.as_ref().is_none_or(|(other, _)| rank < other)) {
            let mut text = text();
            if text.len() > PART_BYTES_MAX {
                text.truncate(text.floor_char_boundary(PART_BYTES_MAX));
            }
            self.part = Some((rank, text));
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field, || value.to_owned());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.take(field, || format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_event_is_one_line() {
        let bad = "a\n<3>b\r\x1b[2J\u{9b}";
        assert_eq!(one_line(bad, Look::Journal), "a <3>b \u{fffd}[2J\u{fffd}");
        assert_eq!(one_line("\x1b[32mINFO", Look::Terminal), "\x1b[32mINFO");
        let levels = [Level::ERROR, Level::WARN, Level::INFO, Level::DEBUG, Level::TRACE];
        assert_eq!(levels.map(|l| priority(&l)), [3, 4, 6, 7, 7]);
    }

    /// Lines of one callsite are told apart by their part, whatever else is in them.
    #[test]
    fn repeats_are_left_out_by_part() {
        use std::sync::atomic::{AtomicU64, Ordering};
        #[derive(Default)]
        struct Lines(AtomicU64);
        impl<S: Subscriber> tracing_subscriber::Layer<S> for &'static Lines {
            fn on_event(&self, _: &Event<'_>, _: Context<'_, S>) {
                self.0.fetch_add(1, Ordering::Relaxed);
            }
        }
        let lines: &'static Lines = Box::leak(Box::default());
        let held_back = Arc::new(HeldBack::default());
        let wanted = Wanted {
            targets: Targets::new().with_default(Level::INFO),
            held_back: Arc::clone(&held_back),
        };
        let subscriber = tracing_subscriber::registry().with(lines.with_filter(wanted));
        tracing::subscriber::with_default(subscriber, || {
            for n in 0..100 {
                for uplink in ["a", "b"] {
                    tracing::warn!(uplink, n, "trying again");
                }
                tracing::debug!("not wanted");
            }
        });
        assert_eq!(lines.0.load(Ordering::Relaxed), 2 * BURST);
        let later = clock::monotonic() + Duration::from_secs(61);
        let counts = held_back.counts.lock().expect("no panic").ended(later);
        let mut parts: Vec<_> = counts.iter().map(|c| &c.what).collect();
        parts.sort_by_key(|w| w.part.clone());
        assert_eq!(parts.len(), 2);
        assert_eq!(
            (parts[0].part.as_str(), parts[0].message.as_str()),
            ("a", "trying again")
        );
        assert!(counts.iter().all(|c| c.times == 100 - BURST));
    }
}
