//! `tidegate reload`: the running gateway reads its configuration again, and this waits for the outcome.

use std::fmt::Write as _;

use anyhow::Context;
use serde_json::{Value, json};

use super::client::Place;

/// What to print, and whether what the file says runs.
pub(super) struct Told {
    pub text: String,
    pub is_good: bool,
}

pub(super) fn ask(place: &Place, check: bool, no_revert: bool, as_json: bool) -> anyhow::Result<Told> {
    let request = json!({ "request": "reload", "check": check, "no_revert": no_revert });
    // As long as revert_after, which the gateway knows.
    let report = place.ask(&request)?.without_deadline()?.only()?;
    let is_good = report["good"]
        .as_bool()
        .context("the gateway's answer is not understood")?;
    let text = match as_json {
        true => format!("{report}\n"),
        false => in_words(&report),
    };
    Ok(Told { text, is_good })
}

fn in_words(report: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let mut out = String::new();
    for warning in report["warnings"].as_array().into_iter().flatten() {
        let _ = writeln!(out, "{}\n", text(warning));
    }
    for change in report["changes"].as_array().into_iter().flatten() {
        let _ = writeln!(out, "{}", change_in_words(change));
    }
    let outcome = match report["outcome"].as_str().unwrap_or_default() {
        "unchanged" => "nothing has changed",
        "checked" => "valid: a reload would do this",
        "applied" if text(&report["why"]).is_empty() => "done",
        "applied" => "done, but not everything is up",
        "refused" => "refused, nothing was changed",
        "reverted" => "taken back",
        "superseded" => "given up",
        other => other,
    };
    let _ = writeln!(out, "{outcome}");
    let why = text(&report["why"]);
    if !why.is_empty() {
        let _ = writeln!(out, "{why}");
    }
    out
}

/// `~ uplink "cloud": url, window`
fn change_in_words(change: &Value) -> String {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let sign = match change["action"].as_str().unwrap_or_default() {
        "added" => '+',
        "removed" => '-',
        _ => '~',
    };
    let mut out = format!("{sign} {}", text(&change["kind"]));
    if !text(&change["name"]).is_empty() {
        let _ = write!(out, " {:?}", text(&change["name"]));
    }
    let keys: Vec<String> = change["keys"].as_array().into_iter().flatten().map(text).collect();
    if !keys.is_empty() {
        let _ = write!(out, ": {}", keys.join(", "));
    }
    if change["needs_restart"] == true {
        out.push_str(" (needs a restart)");
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Action, Change, Kind};

    #[test]
    fn a_change_reads_as_in_the_log() {
        let change = |name: &str, keys: &[&'static str], needs_restart| Change {
            action: Action::Changed,
            kind: Kind::Uplink,
            name: name.to_owned(),
            keys: keys.to_vec(),
            needs_restart,
        };
        for change in [change("cloud", &["url", "window"], false), change("", &[], true)] {
            assert_eq!(change_in_words(&json!(change)), change.to_string());
        }
        let added = Change {
            action: Action::Added,
            ..change("a", &[], false)
        };
        assert_eq!(change_in_words(&json!(added)), added.to_string());
    }
}
