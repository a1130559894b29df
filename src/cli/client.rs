//! The command line's side of the admin socket (see [`crate::admin`]).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use serde_json::Value;

use crate::admin;

/// For one line of an answer; a request may take as long as a slow disk's commit.
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);

/// Why there is no answer. Its own exit code, so that scripts can tell "not running" from "did not work".
#[derive(Debug, thiserror::Error)]
pub(super) enum NoGateway {
    #[error("no gateway runs with data_dir {data_dir}: start it with `tidegate run --config {config}`")]
    NotRunning { data_dir: String, config: String },
    #[error("{path}: permission denied: the admin socket is for the user of the gateway and its group (or root)")]
    NotAllowed { path: String },
}

/// The gateway carried the request out not, or not to its end.
#[derive(Debug, thiserror::Error)]
#[error("{error}\nhint: {next}")]
pub(super) struct Refused {
    pub error: String,
    pub next: String,
}

/// One request and the lines of its answer.
pub(super) struct Answer {
    lines: BufReader<UnixStream>,
    ended: bool,
}

/// Sends the request to the gateway of this configuration.
pub(super) fn ask(config: &Path, data_dir: &Path, request: &Value) -> anyhow::Result<Answer> {
    let path = admin::socket_path(data_dir);
    let mut stream = UnixStream::connect(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
            anyhow::Error::from(NoGateway::NotRunning {
                data_dir: data_dir.display().to_string(),
                config: config.display().to_string(),
            })
        }
        std::io::ErrorKind::PermissionDenied => NoGateway::NotAllowed {
            path: path.display().to_string(),
        }
        .into(),
        _ => anyhow::Error::from(error).context(format!("{}: cannot connect", path.display())),
    })?;
    let deadlines = stream
        .set_read_timeout(Some(ANSWER_DEADLINE))
        .and_then(|()| stream.set_write_timeout(Some(ANSWER_DEADLINE)));
    deadlines.context("the admin socket")?;
    let mut line = request.to_string();
    line.push('\n');
    match stream.write_all(line.as_bytes()) {
        // It may have been turned away with a reason, which is read below.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {}
        written => written.context("the request could not be sent to the gateway")?,
    }
    Ok(Answer {
        lines: BufReader::new(stream),
        ended: false,
    })
}

impl Answer {
    /// For requests that stream: silence is no fault.
    pub fn without_deadline(self) -> anyhow::Result<Answer> {
        self.lines
            .get_ref()
            .set_read_timeout(None)
            .context("the admin socket")?;
        Ok(self)
    }

    /// The next line, if it comes within so long; None also after the last.
    pub fn next_within(&mut self, patience: Duration) -> anyhow::Result<Option<Value>> {
        let socket = self.lines.get_ref();
        socket.set_read_timeout(Some(patience)).context("the admin socket")?;
        match self.lines.fill_buf() {
            Err(e) if matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => Ok(None),
            // What else is wrong is said by the reading below.
            Ok(_) | Err(_) => self.next(),
        }
    }

    /// The next line; None after the last.
    pub fn next(&mut self) -> anyhow::Result<Option<Value>> {
        if self.ended {
            return Ok(None);
        }
        let mut line = String::new();
        let read = self.lines.read_line(&mut line).map_err(|e| match e.kind() {
            std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
                let seconds = ANSWER_DEADLINE.as_secs();
                anyhow::anyhow!("the gateway did not answer within {seconds} s; `tidegate doctor` looks closer")
            }
            _ => anyhow::Error::from(e).context("the gateway's answer broke off"),
        })?;
        if read == 0 || !line.ends_with('\n') {
            anyhow::bail!("the gateway ended in the middle of its answer; has it been stopped?");
        }
        let value: Value = serde_json::from_str(&line).context("the gateway's answer is not understood")?;
        if value.get("done").is_some() {
            self.ended = true;
            return Ok(None);
        }
        let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
        if let (Some(error), Some(next)) = (text("error"), text("next")) {
            self.ended = true;
            return Err(Refused { error, next }.into());
        }
        Ok(Some(value))
    }

    /// The one line of an answer that has one.
    pub fn only(mut self) -> anyhow::Result<Value> {
        let first = self.next()?;
        while self.next()?.is_some() {}
        first.context("the gateway's answer is empty")
    }
}

/// Where the gateway of a configuration keeps its socket, also where the configuration has faults or is not to be read in
/// full by this user: a gateway that runs can always be asked.
pub(super) struct Place {
    pub config: PathBuf,
    pub data_dir: PathBuf,
}

impl Place {
    pub fn find(config: Option<&PathBuf>) -> anyhow::Result<Place> {
        let config = match config {
            Some(path) => path.clone(),
            None => super::files::find()?,
        };
        let data_dir = crate::config::data_dir(&config)?;
        Ok(Place { config, data_dir })
    }

    pub fn ask(&self, request: &Value) -> anyhow::Result<Answer> {
        ask(&self.config, &self.data_dir, request)
    }
}
