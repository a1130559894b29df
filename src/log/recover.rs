//! The start: the folder's lock, a damaged database set aside, consumers as they were, what came after the last flush.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};

use super::OpenError;
use super::cursor::{ConsumerState, Cursor};
use super::store::{self, Recovered, StoreError};
use super::streams::Streams;
use crate::clock::Timestamp;
use crate::message::TopicFilter;
use crate::trie::FilterTrie;

pub fn lock_folder(data_dir: &Path) -> Result<std::fs::File, OpenError> {
    let path = data_dir.join("lock");
    let folder = |cause| OpenError::Folder {
        path: path.clone(),
        cause,
    };
    let file = std::fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(folder)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(OpenError::InUse(data_dir.to_owned())),
        Err(std::fs::TryLockError::Error(cause)) => Err(OpenError::Folder { path, cause }),
    }
}

/// Renames a database and its companions; nothing is ever deleted.
pub fn move_aside(path: &Path, now: Timestamp) -> std::io::Result<PathBuf> {
    let stamp = now.to_string().replace(':', "-");
    let mut aside = PathBuf::new();
    for suffix in ["", "-wal", "-shm"] {
        let from = PathBuf::from(format!("{}{suffix}", path.display()));
        let to = PathBuf::from(format!("{}.damaged-{stamp}{suffix}", path.display()));
        match std::fs::rename(&from, &to) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && !suffix.is_empty() => {}
            Err(e) => return Err(e),
        }
        if suffix.is_empty() {
            aside = to;
        }
    }
    Ok(aside)
}

pub fn restore_consumers(recovered: &Recovered, streams: &Streams) -> Vec<Arc<ConsumerState>> {
    recovered
        .consumers
        .iter()
        .map(|(id, row, cursors)| {
            let filters: Arc<[(TopicFilter, u64)]> = row
                .filters
                .iter()
                .filter_map(|f| Some((TopicFilter::new(f.filter.clone()).ok()?, f.since)))
                .collect();
            let earliest = row.filters.iter().map(|f| f.since).min().unwrap_or(recovered.sequence);
            let state = ConsumerState {
                id: *id,
                name: row.name.clone(),
                filters: RwLock::new(filters),
                cursors: (0..streams.places()).map(|_| Cursor::default()).collect(),
                until: AtomicU64::new(row.until.unwrap_or(u64::MAX)),
                dirty: false.into(),
                bytes_max: AtomicU64::new(u64::MAX),
                losses: AtomicU64::new(
                    recovered
                        .losses_unsent
                        .iter()
                        .filter(|l| l.consumer == row.name)
                        .count() as u64,
                ),
            };
            for (stream, cursor) in state.cursors.iter().enumerate() {
                // Without a cursor row nothing was flushed yet: it counts from where its filters do.
                let row = cursors.iter().find(|c| usize::from(c.stream) == stream);
                cursor
                    .done
                    .store(row.map_or(earliest, |r| r.sequence), Ordering::Relaxed);
                cursor
                    .matched
                    .store(row.map_or(earliest, |r| r.matched), Ordering::Relaxed);
                cursor.messages.store(row.map_or(0, |r| r.messages), Ordering::Relaxed);
                cursor.bytes.store(row.map_or(0, |r| r.bytes), Ordering::Relaxed);
            }
            Arc::new(state)
        })
        .collect()
}

/// Reads what was committed after the last flush of the cursors (less than a second of traffic) and counts it for
/// the consumers that it is for.
pub fn recount(
    path: &Path,
    recovered: &Recovered,
    streams: &Streams,
    consumers: &[Arc<ConsumerState>],
) -> Result<(), StoreError> {
    if consumers.is_empty() || recovered.sequence <= recovered.flushed {
        return Ok(());
    }
    let mut trie: FilterTrie<(usize, u64)> = FilterTrie::default();
    for (index, consumer) in consumers.iter().enumerate() {
        for (filter, since) in consumer.filters().iter() {
            trie.insert(filter, (index, *since), |v| v.0 == index);
        }
    }
    let store = store::ReadStore::open(path)?;
    let mut seen = vec![0u64; consumers.len()];
    for stream in streams.iter() {
        let mut after = recovered.flushed;
        loop {
            match store.next(stream.id, after, &[])? {
                store::Found::Segment(segment) => {
                    for message in segment.messages_after(after).0 {
                        let sequence = message.sequence.0;
                        trie.for_each_match(message.topic.as_str(), |(index, since)| {
                            // A consumer with two matching filters is owed the message once.
                            if sequence > *since && seen[*index] != sequence {
                                seen[*index] = sequence;
                                consumers[*index].matched(stream.id, message.sequence, message.size_bytes());
                            }
                        });
                    }
                    after = segment.last;
                }
                store::Found::Damaged(header) => after = header.last,
                store::Found::Skipped(to) => after = to,
                store::Found::End => break,
            }
        }
    }
    Ok(())
}
