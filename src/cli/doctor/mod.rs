//! `tidegate doctor`: looks for what is wrong with a gateway and its surroundings, whether it runs or not, and says how to
//! mend each thing. It changes nothing; what it writes to see whether it can, it removes.

mod certificate;
mod devices;
mod network;
mod storage;

use std::fmt::Write as _;
use std::path::Path;

use serde::Serialize;
use serde_json::{Value, json};

use super::client::{NoGateway, Place};
use super::status::{list, text};
use super::terminal::{Colour, Look, cut, tame, wrap};
use crate::clock;
use crate::config::{self, Config};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Verdict {
    Good,
    Warning,
    Failed,
}

#[derive(Debug, Clone, Serialize)]
pub(super) struct Finding {
    /// What was looked at: `uplink cloud`.
    pub subject: String,
    pub verdict: Verdict,
    pub text: String,
    /// What to do; empty where all is well.
    pub remedy: String,
}

impl Finding {
    fn good(subject: impl Into<String>, text: impl Into<String>) -> Finding {
        Finding::new(Verdict::Good, subject, text, "")
    }

    fn warning(subject: impl Into<String>, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding::new(Verdict::Warning, subject, text, remedy)
    }

    fn failed(subject: impl Into<String>, text: impl Into<String>, remedy: impl Into<String>) -> Finding {
        Finding::new(Verdict::Failed, subject, text, remedy)
    }

    fn new(
        verdict: Verdict,
        subject: impl Into<String>,
        text: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Finding {
        Finding {
            subject: subject.into(),
            verdict,
            text: text.into(),
            remedy: remedy.into(),
        }
    }
}

pub(super) fn failures(findings: &[Finding]) -> usize {
    findings.iter().filter(|f| f.verdict == Verdict::Failed).count()
}

/// Looks at everything. An error only where there is no file to begin with.
pub(super) fn examine(path: &Path, offline: bool) -> anyhow::Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let config = match config::load(path) {
        Ok(config) => {
            findings.push(Finding::good("configuration", format!("{} is valid", path.display())));
            for warning in &config.warnings {
                let first = warning.lines().next().unwrap_or_default();
                let remedy = warning
                    .lines()
                    .find_map(|l| l.strip_prefix("hint: "))
                    .unwrap_or("see `tidegate check`");
                findings.push(Finding::warning("configuration", first, remedy));
            }
            Some(config)
        }
        Err(faults) => {
            let said = faults.to_string();
            let first = said.lines().next().unwrap_or_default();
            let remedy = format!(
                "`tidegate check --config {}` shows all that is wrong with it",
                path.display()
            );
            findings.push(Finding::failed("configuration", first, remedy));
            None
        }
    };
    let place = Place {
        config: path.to_owned(),
        data_dir: match &config {
            Some(config) => config.gateway.data_dir.clone(),
            None => config::data_dir(path)?,
        },
    };
    let report = gateway(&place, &mut findings);
    findings.extend(storage::examine(&place.data_dir, config.as_ref(), report.as_ref()));
    findings.extend(time(&place.data_dir));
    if let Some(config) = &config {
        findings.extend(storage::secrets(path));
        findings.extend(modules(config));
        findings.extend(network::listeners(config, report.is_some()));
        findings.extend(certificate::examine(config));
        if !offline {
            findings.extend(network::uplinks(config)?);
        }
        findings.extend(devices::examine(config));
    }
    Ok(findings)
}

/// Asks the gateway; what it says of its parts are findings too.
fn gateway(place: &Place, findings: &mut Vec<Finding>) -> Option<Value> {
    let report = place
        .ask(&json!({ "request": "status" }))
        .and_then(super::client::Answer::only);
    let report = match report {
        Ok(report) => report,
        Err(e) => {
            let remedy = format!("start it: `tidegate run --config {}`", place.config.display());
            findings.push(match e.downcast_ref::<NoGateway>() {
                // One that is not meant to run is no fault.
                Some(NoGateway::NotRunning { .. }) => Finding::warning("gateway", "does not run", remedy),
                Some(NoGateway::NotAllowed { .. }) => Finding::failed(
                    "gateway",
                    format!("{e:#}"),
                    "run this as root, or join the gateway's group: usermod -aG tidegate USER",
                ),
                None => Finding::failed("gateway", format!("{e:#}"), "look at its log: journalctl -u tidegate"),
            });
            return None;
        }
    };
    let up = super::terminal::duration(report["uptime_s"].as_u64().unwrap_or(0));
    let own = env!("CARGO_PKG_VERSION");
    let running = text(&report["version"]);
    findings.push(match running == own {
        true => Finding::good("gateway", format!("runs, version {running}, up {up}")),
        false => Finding::warning(
            "gateway",
            format!("runs version {running}, this program is {own}"),
            "restart it: systemctl restart tidegate",
        ),
    });
    for part in list(&report, "parts") {
        let subject = format!("{} {}", text(&part["kind"]), text(&part["name"]));
        let said = format!("since {}: {}", text(&part["since"]), text(&part["text"]));
        match part["health"].as_str() {
            Some("failed") => findings.push(Finding::failed(
                subject,
                said,
                "as it says; more with `tidegate status`",
            )),
            Some("late") => findings.push(Finding::warning(
                subject,
                said,
                "as it says; more with `tidegate status`",
            )),
            _ => {}
        }
    }
    Some(report)
}

/// Years before which this program did not exist.
const EPOCH_MS: i64 = 1_764_547_200_000;

fn time(data_dir: &Path) -> Vec<Finding> {
    let mut findings = Vec::new();
    let now = clock::wall();
    let remedy = "timedatectl set-ntp true; a board without a battery has no time before the network is up";
    if now.millis() < EPOCH_MS {
        findings.push(Finding::failed(
            "clock",
            format!("{now} is in the past: TLS will not work"),
            remedy,
        ));
        return findings;
    }
    let newest = std::fs::metadata(data_dir.join("log.db"))
        .and_then(|m| m.modified())
        .ok();
    let ahead = newest.and_then(|at| at.duration_since(clock::file_time()).ok());
    if let Some(ahead) = ahead.filter(|a| a.as_secs() > 3600) {
        let ahead = super::terminal::duration(ahead.as_secs());
        let text = format!("{now} is {ahead} before the last message was stored: it was set back");
        findings.push(Finding::warning("clock", text, remedy));
        return findings;
    }
    findings.push(match is_synchronised() {
        Some(false) => Finding::warning("clock", format!("{now}, not synchronised"), remedy),
        Some(true) => Finding::good("clock", format!("{now}, synchronised")),
        None => Finding::good(
            "clock",
            format!("{now}; the system does not say whether it is synchronised"),
        ),
    });
    findings
}

/// What the kernel knows of it from the NTP daemon, whichever that is.
fn is_synchronised() -> Option<bool> {
    // SAFETY: timex is plain integers, for which all zeroes is a valid value; no mode bit is set, so nothing is changed.
    let mut timex: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the pointer is to a timex of this frame, which the call fills in and does not keep.
    let state = unsafe { libc::adjtimex(&raw mut timex) };
    (state >= 0).then_some(state != libc::TIME_ERROR && timex.status & libc::STA_UNSYNC == 0)
}

fn modules(config: &Config) -> Vec<Finding> {
    let dir = &config.modules.dir;
    let subject = "modules";
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            let text = format!("{} is not there: no modules run", dir.display());
            return match config.modules.settings.is_empty() {
                true => vec![Finding::good(subject, text)],
                false => vec![Finding::warning(subject, text, format!("mkdir {}", dir.display()))],
            };
        }
        Err(e) => {
            let remedy = "the user of the gateway must be able to list it: chmod o+rx, or chgrp and g+rx";
            return vec![Finding::failed(subject, format!("{}: {e}", dir.display()), remedy)];
        }
    };
    let stems: Vec<String> = entries
        .flatten()
        .map(|e| e.path())
        .filter(|p| p.extension().is_some_and(|e| e == "wasm"))
        .filter_map(|p| p.file_stem().map(|s| s.to_string_lossy().into_owned()))
        .collect();
    let mut findings = vec![Finding::good(subject, format!("{} in {}", stems.len(), dir.display()))];
    for name in config.modules.settings.keys().filter(|n| !stems.contains(n)) {
        let text = format!("[[module]] {name:?} has no file {name}.wasm in {}", dir.display());
        findings.push(Finding::warning(subject, text, "put it there, or take the section out"));
    }
    findings
}

const SUBJECT_COLUMNS: usize = 20;

pub(super) fn draw(findings: &[Finding], json: bool, look: Look) -> String {
    let warnings = findings.iter().filter(|f| f.verdict == Verdict::Warning).count();
    let failed = failures(findings);
    if json {
        return format!(
            "{}\n",
            json!({ "findings": findings, "failed": failed, "warnings": warnings })
        );
    }
    let mut out = String::new();
    for finding in findings {
        let (word, colour) = match finding.verdict {
            Verdict::Good => ("good", Colour::Green),
            Verdict::Warning => ("warning", Colour::Yellow),
            Verdict::Failed => ("failed", Colour::Red),
        };
        let indent = 9 + SUBJECT_COLUMNS + 1;
        let width = look.columns.saturating_sub(indent).max(30);
        let subject = cut(&tame(&finding.subject), SUBJECT_COLUMNS);
        let mut lines = wrap(&tame(&finding.text.replace('\n', " ")), width).into_iter();
        let first = lines.next().unwrap_or_default();
        let _ = writeln!(
            out,
            "{} {subject:<SUBJECT_COLUMNS$} {first}",
            look.paint(colour, &format!("{word:<8}"))
        );
        for line in lines {
            let _ = writeln!(out, "{:indent$}{line}", "");
        }
        if !finding.remedy.is_empty() {
            for (nth, line) in wrap(&tame(&finding.remedy), width.saturating_sub(2))
                .into_iter()
                .enumerate()
            {
                let sign = if nth == 0 { "→ " } else { "  " };
                let _ = writeln!(out, "{:indent$}{sign}{line}", "");
            }
        }
    }
    let good = findings.len() - warnings - failed;
    let _ = writeln!(out, "\n{good} good, {warnings} to look at, {failed} failed");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_fit_80_columns_and_say_what_to_do() {
        let findings = [
            Finding::good("clock", "fine"),
            Finding::failed(
                "uplink a-very-long-name-indeed",
                "word ".repeat(40),
                "do this and that and that and that and that too",
            ),
        ];
        let plain = draw(&findings, false, Look::PLAIN);
        assert!(plain.lines().all(|l| l.chars().count() <= 80), "{plain}");
        assert!(
            plain.contains("→ do this") && plain.contains("1 good, 0 to look at, 1 failed"),
            "{plain}"
        );
        assert_eq!(failures(&findings), 1);
        let json: Value = serde_json::from_str(&draw(&findings, true, Look::PLAIN)).expect("JSON");
        assert_eq!(
            (&json["failed"], &json["findings"][1]["verdict"]),
            (&json!(1), &json!("failed"))
        );
    }
}
