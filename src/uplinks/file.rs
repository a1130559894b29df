//! Uplink kind `file`: JSON Lines, one message a line, rotated by size. The embedded "cloud", and an archive.
//!
//! A batch is one write and one fdatasync, and is confirmed to the log only after that. A crash in the middle of a
//! write leaves half a line: it is cut off at the next start, and the log gives that message again.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;

use super::backoff::{Backoff, Jitter};
use super::{Link, Stopped, Uplink, in_words, stopped};
use crate::clock;
use crate::config::FileUplink;

use crate::message::{Message, Topic};
use crate::status::Health;

/// Entries and bytes of one batch: a batch waits for one fdatasync.
const BATCH_ENTRIES_MAX: usize = 1_024;
const BATCH_BYTES_MAX: usize = 256 << 10;

pub(super) struct File {
    config: FileUplink,
}

impl File {
    pub(super) fn new(config: FileUplink) -> File {
        File { config }
    }
}

impl Uplink for File {
    async fn run(self, mut link: Link) -> Result<(), Stopped> {
        let path = self.config.path.display().to_string();
        let Some(mut consumer) = link.consumer.take() else {
            link.part.set(Health::Good, "no route leads to it");
            stopped(&mut link.shutdown).await;
            return Ok(());
        };
        let sent = link.part.counter("sent");
        let acknowledged = link.part.counter("acknowledged");
        let dead = link.part.counter("dead");
        let bytes_out = link.part.counter("bytes_out");
        let last = link.part.counter("acknowledged_last_ms");
        let batch_bytes_max = BATCH_BYTES_MAX
            .min(usize::try_from(self.config.bytes_max).unwrap_or(usize::MAX))
            .max(1);
        let mut backoff = Backoff::new(Duration::from_millis(500), Duration::from_secs(30));
        let mut jitter = Jitter::from_system();
        let mut archive = Some(Archive::new(self.config));
        let mut lines = Vec::new();
        // Opened before there is anything to write, so that a bad path shows at the start.
        let mut first = true;
        loop {
            let mut entries = Vec::new();
            if !std::mem::take(&mut first) {
                tokio::select! {
                    next = consumer.next(BATCH_ENTRIES_MAX, batch_bytes_max) => entries = next.map_err(|_| Stopped)?,
                    () = stopped(&mut link.shutdown) => return Ok(()),
                }
            }
            lines.clear();
            let mut written = 0;
            let mut refused = Vec::new();
            for (n, entry) in entries.iter().enumerate() {
                match link.routes.up(entry) {
                    Ok(topics) => {
                        for topic in &topics {
                            put_line(&mut lines, topic, &entry.message);
                            written += 1;
                        }
                    }
                    Err(error) => refused.push((n, format!("the topic its route makes is not valid: {error}"))),
                }
            }
            // Not cut short by a shutdown: a write that began is finished and confirmed.
            let Some(mut taken) = archive.take() else {
                return Err(Stopped);
            };
            let bytes = std::mem::take(&mut lines);
            let Ok((given_back, bytes, result)) = tokio::task::spawn_blocking(move || {
                let result = taken.append(&bytes);
                (taken, bytes, result)
            })
            .await
            else {
                return Err(Stopped);
            };
            archive = Some(given_back);
            lines = bytes;
            match result {
                Ok(()) => {
                    for (n, entry) in entries.iter().enumerate() {
                        match refused.iter().find(|(at, _)| *at == n) {
                            Some((_, reason)) => {
                                consumer.dead_letter(entry, reason);
                                dead.add(1);
                            }
                            None => consumer.acknowledge(entry.position),
                        }
                    }
                    backoff.succeeded();
                    sent.add(written);
                    acknowledged.add((entries.len() - refused.len()) as u64);
                    bytes_out.add(lines.len() as u64);
                    if !entries.is_empty() {
                        last.set(clock::wall().millis().unsigned_abs());
                    }
                    link.part.set(Health::Good, format!("writes {path}"));
                }
                Err(error) => {
                    consumer.rewind();
                    let delay = backoff.failed(jitter.draw());
                    let text = format!("{error}; nothing is lost, next try in {}", in_words(delay));
                    if link.part.set(Health::Failed, text) {
                        tracing::error!(uplink = %link.name, path, %error, "the file cannot be written");
                    }
                    first = entries.is_empty();
                    tokio::select! {
                        () = tokio::time::sleep(delay) => {}
                        () = stopped(&mut link.shutdown) => return Ok(()),
                    }
                }
            }
            if lines.capacity() > 4 * BATCH_BYTES_MAX {
                lines = Vec::new();
            }
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("the folder {} cannot be made: {error}", path.display())]
    Folder { path: PathBuf, error: io::Error },
    #[error("{} cannot be opened: {error}", path.display())]
    Open { path: PathBuf, error: io::Error },
    #[error("{} cannot be written: {error}{}", path.display(), hint(error))]
    Write { path: PathBuf, error: io::Error },
    #[error("{} cannot be rotated: {error}", path.display())]
    Rotate { path: PathBuf, error: io::Error },
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => "; make room on its disk",
        _ => "",
    }
}

/// The file and its rotated predecessors: `archive.jsonl`, `archive.jsonl.1` (the newest), `archive.jsonl.2` …
#[derive(Debug)]
struct Archive {
    config: FileUplink,
    open: Option<Open>,
}

#[derive(Debug)]
struct Open {
    file: fs::File,
    inode: (u64, u64),
    /// Up to here the file holds whole, synced lines.
    size: u64,
}

impl Archive {
    fn new(config: FileUplink) -> Archive {
        Archive { config, open: None }
    }

    /// Appends whole lines, synced. On an error none of them counts, and the next call begins with a repair.
    fn append(&mut self, lines: &[u8]) -> Result<(), Error> {
        let mut open = match self.open.take() {
            // Somebody may have moved or deleted it: then a new one is begun.
            Some(open) if inode(&self.config.path) == Some(open.inode) => open,
            Some(_) | None => self.open_file()?,
        };
        if lines.is_empty() {
            self.open = Some(open);
            return Ok(());
        }
        if open.size > 0 && open.size.saturating_add(lines.len() as u64) > self.config.bytes_max {
            drop(open);
            self.rotate()?;
            open = self.open_file()?;
        }
        let written = open.file.write_all(lines).and_then(|()| open.file.sync_data());
        if let Err(error) = written {
            // Half a batch must not stay: it would be doubled, or be half a line. Where even this fails, the file is
            // repaired when it is opened again.
            let _ = open.file.set_len(open.size);
            return Err(Error::Write {
                path: self.config.path.clone(),
                error,
            });
        }
        open.size += lines.len() as u64;
        self.open = Some(open);
        Ok(())
    }

    fn open_file(&self) -> Result<Open, Error> {
        let path = &self.config.path;
        let folder = folder(path);
        fs::create_dir_all(folder).map_err(|error| Error::Folder {
            path: folder.to_owned(),
            error,
        })?;
        let failed = |error| Error::Open {
            path: path.clone(),
            error,
        };
        let existed = path.exists();
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(path)
            .map_err(failed)?;
        let size = whole_lines(&mut file).map_err(failed)?;
        let metadata = file.metadata().map_err(failed)?;
        if size < metadata.len() {
            let cut_bytes = metadata.len() - size;
            tracing::warn!(path = %path.display(), cut_bytes, "the last line was incomplete and is cut off");
            file.set_len(size).and_then(|()| file.sync_data()).map_err(failed)?;
        }
        if !existed {
            sync_folder(folder).map_err(failed)?;
        }
        Ok(Open {
            file,
            inode: (metadata.dev(), metadata.ino()),
            size,
        })
    }

    /// archive.jsonl becomes archive.jsonl.1, .1 becomes .2 and so on; what is beyond `keep` goes.
    fn rotate(&self) -> Result<(), Error> {
        let path = &self.config.path;
        let failed = |error| Error::Rotate {
            path: path.clone(),
            error,
        };
        let keep = self.config.keep;
        for n in rotated(path).map_err(failed)?.into_iter().filter(|n| *n >= keep.max(1)) {
            fs::remove_file(numbered(path, n)).map_err(failed)?;
        }
        if keep == 0 {
            fs::remove_file(path).map_err(failed)?;
        } else {
            for n in (1..keep).rev() {
                rename_existing(&numbered(path, n), &numbered(path, n + 1)).map_err(failed)?;
            }
            rename_existing(path, &numbered(path, 1)).map_err(failed)?;
        }
        sync_folder(folder(path)).map_err(failed)
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|m| (m.dev(), m.ino()))
}

fn folder(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        Some(_) | None => Path::new("."),
    }
}

fn numbered(path: &Path, n: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{n}"));
    PathBuf::from(name)
}

/// The numbers of the rotated files that exist.
fn rotated(path: &Path) -> io::Result<Vec<u32>> {
    let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
        return Ok(Vec::new());
    };
    let mut numbers = Vec::new();
    for file in fs::read_dir(folder(path))? {
        let file = file?.file_name();
        let number: Option<u32> = file
            .to_str()
            .and_then(|f| f.strip_prefix(name)?.strip_prefix('.')?.parse().ok());
        numbers.extend(number);
    }
    Ok(numbers)
}

fn rename_existing(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn sync_folder(folder: &Path) -> io::Result<()> {
    fs::File::open(folder)?.sync_all()
}

/// The length of the file up to and with its last newline.
fn whole_lines(file: &mut fs::File) -> io::Result<u64> {
    let mut end = file.metadata()?.len();
    let mut block = [0; 4096];
    while end > 0 {
        let start = end.saturating_sub(block.len() as u64);
        let part = &mut block[..(end - start) as usize];
        file.seek(SeekFrom::Start(start))?;
        file.read_exact(part)?;
        if let Some(at) = part.iter().rposition(|b| *b == b'\n') {
            return Ok(start + at as u64 + 1);
        }
        end = start;
    }
    Ok(0)
}

/// One line. The payload is always a JSON string, even where it is JSON itself: so it comes back byte by byte.
#[derive(Serialize)]
struct Line<'a> {
    seq: u64,
    ts: String,
    topic: &'a str,
    qos: u8,
    #[serde(skip_serializing_if = "is_false")]
    retain: bool,
    /// null where the payload is not UTF-8.
    payload: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content_type: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    properties: Option<LineProperties<'a>>,
    source: &'a str,
}

/// User properties as pairs: their order counts and a key may come twice.
#[derive(Serialize)]
struct LineProperties<'a> {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    user: Vec<(&'a str, &'a str)>,
    #[serde(skip_serializing_if = "is_false")]
    payload_is_utf8: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    response_topic: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    correlation_data_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    expiry_s: Option<u32>,
}

fn is_false(value: &bool) -> bool {
    !value
}

fn put_line(lines: &mut Vec<u8>, topic: &Topic, message: &Message) {
    let base64 = |bytes: &[u8]| data_encoding::BASE64.encode(bytes);
    let text = std::str::from_utf8(&message.payload).ok();
    let properties = message.properties.as_deref();
    let line = Line {
        seq: message.sequence.0,
        ts: message.received.to_string(),
        topic: topic.as_str(),
        qos: message.qos as u8,
        retain: message.retain,
        payload: text,
        payload_base64: text.is_none().then(|| base64(&message.payload)),
        content_type: properties.and_then(|p| p.content_type.as_deref()),
        properties: properties.map(|p| LineProperties {
            user: p.user.iter().map(|(k, v)| (&**k, &**v)).collect(),
            payload_is_utf8: p.payload_is_utf8,
            response_topic: p.response_topic.as_deref(),
            correlation_data_base64: p.correlation_data.as_deref().map(base64),
            expiry_s: p.expiry_s,
        }),
        source: &message.source,
    };
    serde_json::to_writer(&mut *lines, &line).expect("strings and numbers into memory cannot fail");
    lines.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::Properties;
    use crate::uplinks::routes::tests::entry;

    /// A folder of its own, gone when dropped.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("tidegate-file-{name}-{}", std::process::id()));
            let _ = fs::remove_dir_all(&path);
            Folder(path)
        }

        fn archive(&self, bytes_max: u64, keep: u32) -> Archive {
            Archive::new(FileUplink {
                path: self.0.join("deep/archive.jsonl"),
                bytes_max,
                keep,
            })
        }

        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.0.join("deep").join(name)).unwrap_or_else(|e| panic!("{name}: {e}"))
        }

        fn names(&self) -> Vec<String> {
            let mut names: Vec<_> = fs::read_dir(self.0.join("deep"))
                .expect("there")
                .map(|f| f.expect("readable").file_name().into_string().expect("utf-8"))
                .collect();
            names.sort();
            names
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn rotates_by_size_and_keeps_the_newest() {
        let folder = Folder::new("rotate");
        let mut archive = folder.archive(25, 2);
        for n in 0..10 {
            archive.append(format!("line {n:04}\n").as_bytes()).expect("written");
        }
        // Two lines of ten bytes fit into 25.
        assert_eq!(folder.names(), ["archive.jsonl", "archive.jsonl.1", "archive.jsonl.2"]);
        assert_eq!(folder.read("archive.jsonl"), "line 0008\nline 0009\n");
        assert_eq!(folder.read("archive.jsonl.1"), "line 0006\nline 0007\n");
        assert_eq!(folder.read("archive.jsonl.2"), "line 0004\nline 0005\n");
    }

    #[test]
    fn keep_may_shrink_to_nothing() {
        let folder = Folder::new("keep");
        let mut archive = folder.archive(10, 4);
        for n in 0..8 {
            archive.append(format!("line {n:04}\n").as_bytes()).expect("written");
        }
        assert_eq!(folder.names().len(), 5);
        drop(archive);
        let mut archive = folder.archive(10, 0);
        archive.append(b"new\n").expect("written");
        assert_eq!(folder.names(), ["archive.jsonl"]);
        assert_eq!(folder.read("archive.jsonl"), "new\n");
    }

    #[test]
    fn half_a_line_is_cut_off_at_the_start() {
        let folder = Folder::new("repair");
        folder
            .archive(1 << 20, 2)
            .append(b"{\"seq\":1}\n{\"seq\":2}\n")
            .expect("written");
        let path = folder.0.join("deep/archive.jsonl");
        for (tail, kept) in [("{\"se", 20), (&"x".repeat(10_000), 20), ("", 20)] {
            let mut file = OpenOptions::new().append(true).open(&path).expect("there");
            file.write_all(tail.as_bytes()).expect("written");
            folder.archive(1 << 20, 2).append(b"").expect("repaired");
            assert_eq!(fs::metadata(&path).expect("there").len(), kept);
        }
        fs::write(&path, "no newline at all").expect("written");
        folder.archive(1 << 20, 2).append(b"whole\n").expect("repaired");
        assert_eq!(folder.read("archive.jsonl"), "whole\n");
    }

    #[test]
    fn a_file_that_was_taken_away_is_begun_anew() {
        let folder = Folder::new("moved");
        let mut archive = folder.archive(1 << 20, 2);
        archive.append(b"one\n").expect("written");
        fs::rename(folder.0.join("deep/archive.jsonl"), folder.0.join("deep/elsewhere")).expect("moved");
        archive.append(b"two\n").expect("written");
        assert_eq!(
            (folder.read("elsewhere").as_str(), folder.read("archive.jsonl").as_str()),
            ("one\n", "two\n")
        );
    }

    #[test]
    fn what_cannot_be_written_is_said_and_works_again_later() {
        let folder = Folder::new("blocked");
        fs::create_dir_all(folder.0.join("deep/archive.jsonl")).expect("a folder where the file should be");
        let mut archive = folder.archive(1 << 20, 2);
        let error = archive.append(b"one\n").expect_err("a folder is no file").to_string();
        assert!(error.contains("archive.jsonl cannot be opened"), "{error}");
        fs::remove_dir(folder.0.join("deep/archive.jsonl")).expect("empty");
        archive.append(b"one\n").expect("works now");
        assert_eq!(folder.read("archive.jsonl"), "one\n");
    }

    #[test]
    fn a_full_device_writes_nothing_half() {
        let mut archive = Archive::new(FileUplink {
            path: "/dev/full".into(),
            bytes_max: 1 << 20,
            keep: 1,
        });
        let file = OpenOptions::new().append(true).open("/dev/full").expect("Linux has it");
        archive.open = Some(Open {
            file,
            inode: inode(Path::new("/dev/full")).expect("there"),
            size: 0,
        });
        let error = archive.append(b"one\n").expect_err("it is full").to_string();
        assert!(error.contains("make room on its disk"), "{error}");
        assert!(archive.open.is_none(), "opened and repaired before the next write");
    }

    fn line(message: &Message) -> serde_json::Value {
        let mut lines = Vec::new();
        put_line(&mut lines, &message.topic, message);
        assert_eq!(lines.iter().filter(|b| **b == b'\n').count(), 1);
        serde_json::from_slice(&lines).expect("JSON")
    }

    #[test]
    fn a_line_holds_the_whole_message() {
        let plain = entry(42, "sensors/a", "{\"t\": 21.5}\n").message;
        assert_eq!(
            line(&plain),
            serde_json::json!({
                "seq": 42, "ts": "2023-11-14T22:13:20.000Z", "topic": "sensors/a", "qos": 1,
                "payload": "{\"t\": 21.5}\n", "source": "client:a",
            })
        );
        let mut rich = entry(43, "a", vec![0xFF, 0x00]).message;
        rich.retain = true;
        rich.properties = Some(Box::new(Properties {
            user: vec![("k".into(), "1".into()), ("k".into(), "2".into())],
            content_type: Some("application/cbor".into()),
            correlation_data: Some(bytes::Bytes::from_static(b"\x01")),
            expiry_s: Some(60),
            ..Properties::default()
        }));
        assert_eq!(
            line(&rich),
            serde_json::json!({
                "seq": 43, "ts": "2023-11-14T22:13:20.000Z", "topic": "a", "qos": 1, "retain": true,
                "payload": null, "payload_base64": "/wA=", "content_type": "application/cbor",
                "properties": {"user": [["k", "1"], ["k", "2"]], "correlation_data_base64": "AQ==", "expiry_s": 60},
                "source": "client:a",
            })
        );
    }
}
