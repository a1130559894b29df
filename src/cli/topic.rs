//! `tidegate topic list|clear`: the retained messages.

use clap::Subcommand;
use serde_json::{Value, json};

use super::status::text;
use super::terminal;
use super::{ConfigArgs, say, say_on};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Name the topics with a retained message: its time, its size, the topic
    List {
        /// Which topics, in quotes: 'sensors/#'. Topics that begin with $ are matched only by filters that do
        #[arg(default_value = "#")]
        filter: String,
        #[command(flatten)]
        config: ConfigArgs,
        /// With the payload and all else, one JSON object a line, for programs
        #[arg(long)]
        json: bool,
    },
    /// Remove the retained messages of topics
    ///
    /// As a client does it, by an empty retained message, which subscribers and routes get as well. Returns when that is on disk.
    Clear {
        /// Which topics, in quotes: 'sensors/#'; '#' for all that do not begin with $
        filter: String,
        #[command(flatten)]
        config: ConfigArgs,
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(command: Command) -> anyhow::Result<()> {
    match command {
        Command::List { filter, config, json } => {
            let mut answer = config
                .place()?
                .ask(&json!({ "request": "retained", "filter": filter }))?;
            while let Some(message) = answer.next()? {
                let out = match json {
                    true => format!("{message}\n"),
                    false => entry(&message),
                };
                if !say_on(&out)? {
                    return Ok(());
                }
            }
            Ok(())
        }
        Command::Clear { filter, config, json } => {
            let request = json!({ "request": "clear-retained", "filter": filter });
            // As long as it takes: a commit for each few hundred.
            let answer = config.place()?.ask(&request)?.without_deadline()?.only()?;
            match (json, answer["cleared"].as_u64().unwrap_or(0)) {
                (true, _) => say(&format!("{answer}\n")),
                (false, 0) => say("no retained message matches\n"),
                (false, 1) => say("1 retained message is removed\n"),
                (false, n) => say(&format!("{n} retained messages are removed\n")),
            }
        }
    }
}

/// The topic last and whole: it may be of any length.
fn entry(message: &Value) -> String {
    let bytes = match (message["payload"].as_str(), message["payload_hex"].as_str()) {
        (Some(text), _) => text.len(),
        (None, Some(hex)) => hex.len() / 2,
        (None, None) => 0,
    };
    let bytes = terminal::bytes(bytes as u64);
    format!("{} {bytes:>9} {}\n", text(&message["time"]), text(&message["topic"]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_is_a_line() {
        let message = json!({ "time": "2026-11-24T23:40:03.120Z", "topic": "a/b\n", "payload_hex": "00ff" });
        assert_eq!(entry(&message), "2026-11-24T23:40:03.120Z       2 B a/b\u{fffd}\n");
    }
}
