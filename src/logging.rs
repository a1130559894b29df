//! What is logged and how it looks: on a terminal, in a file, in the journal.

pub fn start() {
    use tracing_subscriber::prelude::*;
    let wanted = std::env::var("TIDEGATE_LOG").unwrap_or_default();
    let default = tracing_subscriber::filter::Targets::new().with_default(tracing::Level::INFO);
    let filter = if wanted.is_empty() {
        default
    } else {
        wanted.parse().unwrap_or(default)
    };
    // The journal stamps its lines itself.
    let in_journal = std::env::var_os("JOURNAL_STREAM").is_some();
    let layer = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false);
    let registry = tracing_subscriber::registry();
    // A second gateway in one process (tests) keeps the first one's subscriber.
    let _ = if in_journal {
        registry.with(layer.without_time().with_filter(filter)).try_init()
    } else {
        registry.with(layer.with_filter(filter)).try_init()
    };
}
