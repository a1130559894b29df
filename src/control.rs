//! What the running gateway can be told to do: the way from the admin socket to the supervisor.

use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

use crate::config::Change;

/// Requests that wait for the supervisor; beyond it they are refused.
const REQUESTS_MAX: usize = 8;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ReloadOptions {
    /// Say what would change, and change nothing.
    pub check: bool,
    /// Do not go back, whatever does not come up.
    pub no_revert: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The file says what runs already.
    Unchanged,
    /// It is valid and could be applied; nothing was.
    Checked,
    Applied,
    /// Nothing was changed: the file has faults, or something of it needs a restart.
    Refused,
    /// It was applied, something did not come up, and the configuration before runs again.
    Reverted,
    /// Another reload came before it was known whether everything comes up.
    Superseded,
}

#[derive(Debug, Clone, Serialize)]
pub struct ReloadReport {
    pub outcome: Outcome,
    pub changes: Vec<Change>,
    /// Why it was refused or reverted, or what did not come up; may have several lines.
    pub why: String,
    /// What is legal but doubtful.
    pub warnings: Vec<String>,
}

impl ReloadReport {
    /// What the file says runs, whole (or would).
    pub fn is_good(&self) -> bool {
        match self.outcome {
            Outcome::Unchanged | Outcome::Checked | Outcome::Applied => self.why.is_empty(),
            Outcome::Refused | Outcome::Reverted | Outcome::Superseded => false,
        }
    }
}

pub struct ReloadRequest {
    pub options: ReloadOptions,
    pub reply: oneshot::Sender<ReloadReport>,
}

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    #[error("{REQUESTS_MAX} requests wait already; try again")]
    Busy,
    #[error("the gateway stops")]
    Stopped,
}

/// Cheap to clone, usable from any thread.
#[derive(Debug, Clone)]
pub struct Control {
    requests: mpsc::Sender<ReloadRequest>,
}

impl Control {
    pub fn new() -> (Control, mpsc::Receiver<ReloadRequest>) {
        let (requests, receiver) = mpsc::channel(REQUESTS_MAX);
        (Control { requests }, receiver)
    }

    /// Reads the configuration again; returns when its outcome is known.
    pub async fn reload(&self, options: ReloadOptions) -> Result<ReloadReport, ControlError> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .try_send(ReloadRequest { options, reply })
            .map_err(|e| match e {
                mpsc::error::TrySendError::Full(_) => ControlError::Busy,
                mpsc::error::TrySendError::Closed(_) => ControlError::Stopped,
            })?;
        answer.await.map_err(|_| ControlError::Stopped)
    }
}
