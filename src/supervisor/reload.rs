//! The configuration is read again: planned, checked, applied to the parts that it touches, and taken back where a
//! listener or an uplink does not come up with it.
//!
//! What is decided here: [`Reloads::reload`] begins one, [`Reloads::wait`] and [`Reloads::decide`] see it through. One is
//! under way at a time; a later one takes its place, and goes back, if it must, to the configuration that was good before
//! both. A file with faults changes nothing. What the file says after a revert is left to whoever wrote it.

use tokio::sync::{oneshot, watch};
use tracing::{error, info, warn};

use super::notify::Notify;
use super::tree::Tree;
use crate::broker::NotListening;
use crate::clock::{self, Instant};
use crate::config::{self, Action, Change, Config, Kind, difference};
use crate::control::{Outcome, ReloadOptions, ReloadReport};
use crate::log::Log;
use crate::status::{Counter, Health, Part, Status};

/// Of the faults of a file so much is logged; `tidegate check` says all.
const FAULTS_LOGGED_BYTES: usize = 4 << 10;
/// Of the faults of a file so much is answered.
const FAULTS_ANSWERED_BYTES: usize = 64 << 10;

type Reply = oneshot::Sender<ReloadReport>;

pub struct Reloads {
    tree: Tree,
    log: Log,
    status: Status,
    changes: watch::Receiver<u64>,
    part: Part,
    counters: Counters,
    running: Config,
    pending: Option<Pending>,
}

struct Counters {
    applied: Counter,
    refused: Counter,
    reverted: Counter,
}

/// A reload that was applied, and of which it is not known yet whether everything comes up.
struct Pending {
    /// What to go back to.
    before: Config,
    /// Uplinks that have to be good by then.
    uplinks: Vec<String>,
    deadline: Instant,
    report: ReloadReport,
    replies: Vec<Reply>,
}

impl Reloads {
    pub fn new(tree: Tree, config: &Config, log: &Log, status: &Status) -> Reloads {
        let part = status.part("config", "gateway.toml");
        let reloads = Reloads {
            tree,
            log: log.clone(),
            status: status.clone(),
            changes: status.changes(),
            counters: Counters {
                applied: part.counter("applied"),
                refused: part.counter("refused"),
                reverted: part.counter("reverted"),
            },
            part,
            running: config.clone(),
            pending: None,
        };
        reloads.say_good();
        reloads
    }

    pub async fn stop(self) {
        self.tree.stop().await;
    }

    /// Begins a reload. `reply` is told when its outcome is known.
    pub async fn reload(&mut self, options: ReloadOptions, reply: Option<Reply>, notify: &Notify) {
        let loaded = config::load(&self.running.path);
        super::give_back_memory();
        let new = match loaded {
            Ok(new) => new,
            Err(faults) => {
                let mut text = faults.to_string();
                truncate(&mut text, FAULTS_ANSWERED_BYTES);
                return self.refuse(options, Vec::new(), text, reply);
            }
        };
        let changes = self.plan(&new);
        let warnings = new.warnings.clone();
        let report = |outcome| ReloadReport {
            outcome,
            changes: changes.clone(),
            why: String::new(),
            warnings: warnings.clone(),
        };
        if changes.iter().any(|c| c.needs_restart) {
            let these: Vec<String> = changes
                .iter()
                .filter(|c| c.needs_restart)
                .map(ToString::to_string)
                .collect();
            let text = format!(
                "{}: nothing was changed; `systemctl restart tidegate`, or take it back",
                these.join("; ")
            );
            return self.refuse(options, changes, text, reply);
        }
        if options.check {
            return answer(reply, report(Outcome::Checked));
        }
        for warning in &warnings {
            warn!("{warning}");
        }
        if changes.is_empty() {
            // Another text that means the same.
            self.running = new;
            match &mut self.pending {
                Some(pending) => pending.replies.extend(reply),
                None => {
                    info!("reload: nothing has changed");
                    self.say_good();
                    answer(reply, report(Outcome::Unchanged));
                }
            }
            return;
        }
        for change in &changes {
            info!(%change, "reload");
        }
        let report = report(Outcome::Applied);
        self.apply(new, options, report, reply, notify).await;
    }

    fn plan(&self, new: &Config) -> Vec<Change> {
        let mut changes = difference(&self.running, new);
        if !self.log.has_room_for(&new.streams) {
            for change in &mut changes {
                change.needs_restart |= change.kind == Kind::Stream && change.action == Action::Added;
            }
        }
        changes
    }

    async fn apply(
        &mut self,
        new: Config,
        options: ReloadOptions,
        report: ReloadReport,
        reply: Option<Reply>,
        notify: &Notify,
    ) {
        let uplinks = self.to_come_up(&report.changes);
        let not_listening = self.exchange(&new, notify).await;
        let old = std::mem::replace(&mut self.running, new);
        let before = match self.pending.take() {
            Some(earlier) => earlier.end(Outcome::Superseded, "another reload came before everything was up"),
            None => old,
        };
        let revert_after = self.running.gateway.revert_after;
        let may_revert =
            !options.no_revert && !revert_after.is_zero() && !difference(&before, &self.running).is_empty();
        let mut pending = Pending {
            before,
            uplinks,
            deadline: clock::monotonic() + revert_after,
            report,
            replies: reply.into_iter().collect(),
        };
        if !not_listening.is_empty() {
            let why = in_words(&not_listening);
            if may_revert {
                return self.revert(pending, why, notify).await;
            }
            pending.report.why = why;
        }
        if may_revert && !pending.uplinks.is_empty() {
            self.part.set(
                Health::Starting,
                format!(
                    "applied; waits up to {} s for {}",
                    revert_after.as_secs_f32(),
                    pending.uplinks.join(", ")
                ),
            );
            self.pending = Some(pending);
            // They may be up already.
            return self.decide(notify).await;
        }
        self.confirm(pending);
    }

    /// The uplinks that have to come up with these changes: those that are new or set up anew, and those whose routes
    /// changed if they were up. One that was down before, for reasons of its own, and only got another route, is not one.
    fn to_come_up(&self, changes: &[Change]) -> Vec<String> {
        let was_good = |name: &str| matches!(self.status.health("uplink", name), Some(Health::Good));
        changes
            .iter()
            .filter(|c| c.kind == Kind::Uplink)
            .filter(|c| match c.action {
                Action::Added => true,
                Action::Removed => false,
                Action::Changed => c.keys != ["routes"] || was_good(&c.name),
            })
            .map(|c| c.name.clone())
            .collect()
    }

    async fn exchange(&mut self, new: &Config, notify: &Notify) -> Vec<NotListening> {
        notify.reloading();
        let not_listening = self.tree.apply(&self.running, new).await;
        notify.ready();
        not_listening
    }

    /// Returns when [`Reloads::decide`] may have something to decide. Cancel-safe.
    pub async fn wait(&mut self) {
        match &self.pending {
            None => std::future::pending().await,
            Some(pending) => {
                tokio::select! {
                    _ = self.changes.changed() => {}
                    () = tokio::time::sleep_until(pending.deadline.into()) => {}
                }
            }
        }
    }

    /// Ends the reload under way where everything is up, or the time for it is over.
    pub async fn decide(&mut self, notify: &Notify) {
        let Some(pending) = self.pending.take() else { return };
        let down: Vec<String> = pending
            .uplinks
            .iter()
            .filter_map(|name| match self.status.health_and_text("uplink", name) {
                Some((Health::Good, _)) => None,
                Some((_, text)) => Some(format!("uplink {name}: {text}")),
                None => Some(format!("uplink {name} has not begun")),
            })
            .collect();
        if down.is_empty() {
            self.confirm(pending);
        } else if clock::monotonic() < pending.deadline {
            self.pending = Some(pending);
        } else {
            self.revert(pending, down.join("; "), notify).await;
        }
    }

    fn confirm(&mut self, pending: Pending) {
        self.counters.applied.add(1);
        if pending.report.why.is_empty() {
            self.say_good();
            info!(fingerprint = self.running.fingerprint, "reload: done");
        } else {
            self.part
                .set(Health::Late, format!("applied, but {}", pending.report.why));
            warn!(why = pending.report.why, "reload: done, but not everything is up");
        }
        let (outcome, why) = (Outcome::Applied, pending.report.why.clone());
        pending.end(outcome, &why);
    }

    /// Back to what ran before. `why` says what did not come up.
    async fn revert(&mut self, pending: Pending, why: String, notify: &Notify) {
        error!(why, "reload: taken back, the configuration before runs again");
        let not_listening = self.exchange(&pending.before.clone(), notify).await;
        self.running = pending.before.clone();
        self.counters.reverted.add(1);
        let mut why = format!("{why}; the configuration before runs again, and the file is left as it is");
        if !not_listening.is_empty() {
            why = format!("{why}; of that, {}", in_words(&not_listening));
            error!(why, "reload: not everything of the configuration before is up");
        }
        self.part
            .set(Health::Late, format!("taken back at {}: {why}", clock::wall()));
        pending.end(Outcome::Reverted, &why);
    }

    fn refuse(&mut self, options: ReloadOptions, changes: Vec<Change>, why: String, reply: Option<Reply>) {
        if !options.check {
            self.counters.refused.add(1);
            let mut logged = why.clone();
            truncate(&mut logged, FAULTS_LOGGED_BYTES);
            error!("reload: refused, nothing was changed\n{logged}");
            let first = why.lines().next().unwrap_or_default();
            let text = format!("refused at {}: {first}; what ran before runs on", clock::wall());
            self.part.set(Health::Late, text);
        }
        let report = ReloadReport {
            outcome: Outcome::Refused,
            changes,
            why,
            warnings: Vec::new(),
        };
        answer(reply, report);
    }

    fn say_good(&self) {
        let text = format!("{} of {}", self.running.fingerprint, clock::wall());
        self.part.set(Health::Good, text);
    }
}

impl Pending {
    /// Tells everybody who asked; returns what was good before.
    fn end(self, outcome: Outcome, why: &str) -> Config {
        let report = ReloadReport {
            outcome,
            why: why.to_owned(),
            ..self.report
        };
        for reply in self.replies {
            answer(Some(reply), report.clone());
        }
        self.before
    }
}

/// Whoever asked may be gone.
fn answer(reply: Option<Reply>, report: ReloadReport) {
    if let Some(reply) = reply {
        let _ = reply.send(report);
    }
}

fn in_words(not_listening: &[NotListening]) -> String {
    let all: Vec<&str> = not_listening.iter().map(|n| n.why.as_str()).collect();
    format!("not listening: {}", all.join("; "))
}

fn truncate(text: &mut String, bytes: usize) {
    if text.len() > bytes {
        text.truncate(text.floor_char_boundary(bytes));
        text.push_str("\n… (`tidegate check` says all)");
    }
}
