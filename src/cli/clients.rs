//! `tidegate client list|show|kick`: who is connected, and who has a session.

use std::fmt::Write as _;

use clap::Subcommand;
use serde_json::{Value, json};

use super::client::Place;
use super::status::{line, text};
use super::terminal::{self, Colour, Look, tame};
use super::{ConfigArgs, say, say_on};

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Name the clients that are connected or have a session
    List {
        /// Only those that are connected
        #[arg(long)]
        connected: bool,
        /// Only those of this user
        #[arg(long, value_name = "NAME")]
        user: Option<String>,
        #[command(flatten)]
        common: Common,
    },
    /// Say everything about one client: connection, session, subscriptions, limits
    Show {
        #[arg(value_name = "CLIENT-ID")]
        client_id: String,
        #[command(flatten)]
        common: Common,
    },
    /// End a client's connection; it may connect again
    ///
    /// Its session is kept. MQTT 5 is told 0x98, administrative action. Returns when that is on disk.
    Kick {
        #[arg(value_name = "CLIENT-ID")]
        client_id: String,
        /// Also end its session, with its subscriptions and what waits for it
        #[arg(long)]
        end_session: bool,
        #[command(flatten)]
        common: Common,
    },
}

#[derive(Debug, clap::Args)]
pub(super) struct Common {
    #[command(flatten)]
    config: ConfigArgs,
    /// As JSON, for programs
    #[arg(long)]
    json: bool,
}

pub(super) fn run(command: Command, look: Look) -> anyhow::Result<()> {
    match command {
        Command::List {
            connected,
            user,
            common,
        } => list(&common.config.place()?, connected, user.as_deref(), common.json, look),
        Command::Show { client_id, common } => {
            let request = json!({ "request": "client", "client_id": client_id });
            let client = common.config.place()?.ask(&request)?.only()?;
            match common.json {
                true => say(&format!("{client}\n")),
                false => say(&draw(&client, look)),
            }
        }
        Command::Kick {
            client_id,
            end_session,
            common,
        } => {
            let request = json!({ "request": "kick", "client_id": client_id, "end_session": end_session });
            let answer = common.config.place()?.ask(&request)?.only()?;
            let client = tame(&client_id);
            match (common.json, end_session) {
                (true, _) => say(&format!("{answer}\n")),
                (false, true) => say(&format!("{client} is disconnected, and its session has ended\n")),
                (false, false) => say(&format!("{client} is disconnected; its session is kept\n")),
            }
        }
    }
}

/// Each as it comes: nothing is gathered, so there may be any number.
fn list(place: &Place, connected: bool, user: Option<&str>, json: bool, look: Look) -> anyhow::Result<()> {
    let request = json!({ "request": "clients", "connected": connected, "user": user });
    let mut answer = place.ask(&request)?;
    while let Some(client) = answer.next()? {
        let out = match json {
            true => format!("{client}\n"),
            false => entry(&client, look),
        };
        if !say_on(&out)? {
            return Ok(());
        }
    }
    Ok(())
}

fn entry(client: &Value, look: Look) -> String {
    let mut said = whence(client);
    if let Some(user) = client["user"].as_str() {
        let _ = write!(said, ", user {}", tame(user));
    }
    if client["queued_messages"].as_u64() > Some(0) {
        let _ = write!(said, ", {}", waiting(client));
    }
    let (state, colour) = match client["connected"] == true {
        true => ("connected", Colour::Green),
        false => ("away", Colour::Dim),
    };
    let painted = look.paint(colour, &format!("{state:<9}"));
    let mut out = String::new();
    line(&mut out, &text(&client["client_id"]), &painted, 9, &said, look);
    out
}

/// `192.0.2.7:51234, MQTT 5`, or since when it is away.
fn whence(client: &Value) -> String {
    match client["address"].as_str() {
        Some(address) => format!("{}, MQTT {}", tame(address), text(&client["version"])),
        None => format!("since {}", text(&client["since"])),
    }
}

fn waiting(client: &Value) -> String {
    let bytes = terminal::bytes(client["queued_bytes"].as_u64().unwrap_or(0));
    format!("{} messages, {bytes} waiting", client["queued_messages"])
}

fn draw(client: &Value, look: Look) -> String {
    let mut out = format!("{}\n", look.paint(Colour::Bold, &text(&client["client_id"])));
    let mut put = |name: &str, said: String| line(&mut out, &format!("  {name}"), "", 0, &said, look);
    let limits = &client["limits"];
    let of = |key: &str| limits[key].as_u64().map(|n| format!(" of {n}")).unwrap_or_default();
    if client["connected"] == true {
        let (at, since) = (text(&client["listener"]), text(&client["since"]));
        put("connected", format!("since {since} from {} to {at}", whence(client)));
    } else {
        put("away", whence(client));
    }
    if let Some(user) = client["user"].as_str() {
        let clients = &client["clients_of_user"];
        put(
            "user",
            format!("{} ({clients}{} connected)", tame(user), of("max_connections")),
        );
    }
    let expiry = match client["session_expiry_s"].as_u64() {
        None => "kept without end".to_owned(),
        Some(0) => "ends with the connection".to_owned(),
        Some(s) => format!("kept for {} after the connection", terminal::duration(s)),
    };
    put("session", expiry);
    let most = limits["max_queued_bytes"].as_u64();
    let most = most.map(|n| format!(" of {}", terminal::bytes(n))).unwrap_or_default();
    put("queue", format!("{}{most}", waiting(client)));
    put(
        "in flight",
        format!("{} to it, {} from it (QoS 2)", client["in_flight"], client["inbound"]),
    );
    if client["connected"] == true {
        let unsent = terminal::bytes(client["unsent_bytes"].as_u64().unwrap_or(0));
        put("unsent", unsent);
        put("lost", format!("{} messages, read too slowly", client["dropped"]));
    }
    let rates = [
        limits["max_messages_per_second"]
            .as_u64()
            .map(|n| format!("{n} messages/s")),
        limits["max_bytes_per_second"]
            .as_u64()
            .map(|n| format!("{}/s", terminal::bytes(n))),
    ];
    let rates: Vec<String> = rates.into_iter().flatten().collect();
    if !rates.is_empty() {
        put(
            "may send",
            format!("{}; made to wait {} times", rates.join(", "), client["throttled"]),
        );
    }
    if let Some(topic) = client["will_topic"].as_str() {
        put("will", format!("to {}", tame(topic)));
    }
    let count = client["subscriptions"].as_u64().unwrap_or(0);
    put("subscriptions", format!("{count}{}", of("max_subscriptions")));
    let filters = client["filters"].as_array().map(Vec::as_slice).unwrap_or_default();
    for filter in filters {
        let _ = writeln!(out, "    qos {} {}", filter["qos"], text(&filter["filter"]));
    }
    if count > filters.len() as u64 {
        let _ = writeln!(out, "    … and {} more", count - filters.len() as u64);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_fits_80_columns_and_is_tamed() {
        let mut client = json!({
            "client_id": "press-7\u{1b}[2J", "user": "press", "connected": true, "address": "[2001:db8::1]:49152",
            "version": "5", "since": "2026-11-24T23:40:03.120Z", "session_expiry_s": null, "subscriptions": 3,
            "queued_messages": 12, "queued_bytes": 3_500, "listener": "0.0.0.0:1883", "in_flight": 4, "inbound": 0,
            "unsent_bytes": 0, "dropped": 0, "throttled": 17, "will_topic": "a/will", "clients_of_user": 2,
            "limits": { "max_connections": 5, "max_messages_per_second": 50, "max_bytes_per_second": 65_536,
                        "max_subscriptions": 20, "max_queued_bytes": 10 << 20 },
            "filters": [{ "filter": "a/#", "qos": 1 }, { "filter": "b", "qos": 0 }],
        });
        let (short, long) = (entry(&client, Look::PLAIN), draw(&client, Look::PLAIN));
        for out in [&short, &long] {
            assert!(
                !out.contains('\x1b') && out.lines().all(|l| l.chars().count() <= 80),
                "{out}"
            );
        }
        for part in ["user press, 12 messages, 3.4 KiB waiting", "connected", "MQTT 5"] {
            let joined = short.split_whitespace().collect::<Vec<_>>().join(" ");
            assert!(joined.contains(part), "{short}");
        }
        for part in [
            "2 of 5",
            "kept without end",
            "3 of 20",
            "… and 1 more",
            "qos 1 a/#",
            "made to wait 17 times",
            "of 10.0 MiB",
        ] {
            assert!(long.contains(part), "{long}");
        }
        (client["connected"], client["address"]) = (json!(false), json!(null));
        assert!(entry(&client, Look::PLAIN).contains("away") && draw(&client, Look::PLAIN).contains("away"));
    }
}
