//! What lies in the modules folder and when a file there is whole: [`Folder`] is pure and is shown listings, [`Watcher`] says
//! when to look.
//!
//! Events only say that something happened; what happened is always read from the folder, so that a lost event costs time
//! and nothing else. A file is taken at once when its writer closed it or renamed it here, otherwise when it has not changed
//! for a while.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode, EventKind, ModifyKind, RenameMode};
use notify::{RecursiveMode, Watcher as _};
use tokio::sync::Notify;

use crate::clock::Instant;

/// A file that nobody was seen closing is whole when it has not changed for this long.
const STABLE: Duration = Duration::from_millis(250);
/// Names remembered between two looks; more only cost a file the wait of [`STABLE`].
const NAMES_MAX: usize = 1_024;

/// What tells one content of a file from another without reading it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    pub bytes: u64,
    pub modified_ns: i128,
    pub inode: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// New or changed, and whole: load it.
    Take(String),
    Gone(String),
}

#[derive(Debug, Default)]
pub struct Folder {
    files: BTreeMap<String, File>,
    looked: bool,
}

#[derive(Debug)]
struct File {
    stamp: Stamp,
    since: Instant,
    taken: Option<Stamp>,
}

impl Folder {
    /// `listing`: the modules that lie there now, by name; `closed`: those that a writer was seen closing or renaming since
    /// the last look.
    pub fn look(&mut self, listing: BTreeMap<String, Stamp>, closed: &HashSet<String>, now: Instant) -> Vec<Change> {
        let mut changes = Vec::new();
        self.files.retain(|name, file| {
            let stays = listing.contains_key(name);
            if !stays && file.taken.is_some() {
                changes.push(Change::Gone(name.clone()));
            }
            stays
        });
        // What lay there before the gateway started is as whole as it will get.
        let first = !std::mem::replace(&mut self.looked, true);
        for (name, stamp) in listing {
            let file = self.files.entry(name.clone()).or_insert(File {
                stamp,
                since: now,
                taken: None,
            });
            if file.stamp != stamp {
                file.stamp = stamp;
                file.since = now;
            }
            if file.taken == Some(stamp) {
                continue;
            }
            if first || closed.contains(&name) || now.saturating_duration_since(file.since) >= STABLE {
                file.taken = Some(stamp);
                changes.push(Change::Take(name));
            }
        }
        changes
    }

    /// As if it had not been taken: it is, again, when it is stable.
    pub fn forget(&mut self, name: &str) {
        self.files.remove(name);
    }

    /// When to look again because a file may be whole by then.
    pub fn next_look(&self) -> Option<Instant> {
        self.files
            .values()
            .filter(|file| file.taken != Some(file.stamp))
            .map(|file| file.since + STABLE)
            .min()
    }
}

/// The module of a file's name: its stem, where it ends in .wasm and is not hidden (as half-written copies often are).
pub fn module_name(file: &OsStr) -> Option<String> {
    let stem = file.to_str()?.strip_suffix(".wasm")?;
    (!stem.is_empty() && !stem.starts_with('.')).then(|| stem.to_owned())
}

/// The modules in a folder that is made where it is missing.
pub fn list(dir: &Path) -> io::Result<BTreeMap<String, Stamp>> {
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::create_dir_all(dir)?;
            fs::read_dir(dir)?
        }
        entries => entries?,
    };
    let mut listing = BTreeMap::new();
    for entry in entries.flatten() {
        let Some(name) = module_name(&entry.file_name()) else {
            continue;
        };
        // A link counts as what it points at; what goes away between the two calls is not there.
        let Ok(metadata) = fs::metadata(entry.path()) else {
            continue;
        };
        if metadata.is_file() {
            let modified_ns = i128::from(metadata.mtime()) * 1_000_000_000 + i128::from(metadata.mtime_nsec());
            listing.insert(
                name,
                Stamp {
                    bytes: metadata.len(),
                    modified_ns,
                    inode: metadata.ino(),
                },
            );
        }
    }
    Ok(listing)
}

/// Wakes its owner when something happens in the folder.
pub struct Watcher {
    dir: PathBuf,
    inode: Option<u64>,
    inner: Option<notify::RecommendedWatcher>,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    happened: Notify,
    closed: Mutex<HashSet<String>>,
}

impl Watcher {
    pub fn new(dir: &Path) -> Watcher {
        let shared = Arc::new(Shared::default());
        let for_thread = Arc::clone(&shared);
        let inner = notify::recommended_watcher(move |event| for_thread.event(event));
        if let Err(error) = &inner {
            tracing::warn!(%error, "the modules folder is not watched, it is looked at every few seconds");
        }
        Watcher {
            dir: dir.to_owned(),
            inode: None,
            inner: inner.ok(),
            shared,
        }
    }

    /// Watches the folder, also one that was removed and made anew.
    pub fn watch(&mut self) {
        let Some(inner) = &mut self.inner else { return };
        let inode = fs::metadata(&self.dir).ok().map(|m| m.ino());
        if inode.is_none() || inode == self.inode {
            return;
        }
        if self.inode.take().is_some() {
            let _ = inner.unwatch(&self.dir);
        }
        match inner.watch(&self.dir, RecursiveMode::NonRecursive) {
            Ok(()) => self.inode = inode,
            Err(error) => {
                tracing::warn!(%error, "the modules folder is not watched, it is looked at every few seconds");
                self.inner = None;
            }
        }
    }

    pub async fn happened(&self) {
        self.shared.happened.notified().await;
    }

    /// The modules whose files a writer closed or renamed since the last call.
    pub fn take_closed(&self) -> HashSet<String> {
        std::mem::take(&mut *self.shared.closed.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Shared {
    fn event(&self, event: notify::Result<notify::Event>) {
        if let Ok(event) = event {
            let whole = match event.kind {
                EventKind::Access(AccessKind::Close(AccessMode::Write))
                | EventKind::Modify(ModifyKind::Name(RenameMode::To | RenameMode::Both)) => true,
                // Reading the folder makes events of its own.
                EventKind::Access(_) => return,
                _ => false,
            };
            if whole {
                let names = event.paths.iter().filter_map(|path| module_name(path.file_name()?));
                let mut closed = self.closed.lock().unwrap_or_else(PoisonError::into_inner);
                let room = NAMES_MAX.saturating_sub(closed.len());
                closed.extend(names.take(room));
            }
        }
        self.happened.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(files: &[(&str, u64)]) -> BTreeMap<String, Stamp> {
        let stamp = |&(name, version): &(&str, u64)| {
            (
                name.to_owned(),
                Stamp {
                    bytes: version,
                    modified_ns: i128::from(version),
                    inode: 1,
                },
            )
        };
        files.iter().map(stamp).collect()
    }

    fn take(name: &str) -> Vec<Change> {
        vec![Change::Take(name.to_owned())]
    }

    #[test]
    fn names_are_those_of_wasm_files() {
        let name = |file: &str| module_name(OsStr::new(file));
        assert_eq!(name("average.wasm").as_deref(), Some("average"));
        for other in [
            "average.wasm~",
            ".average.wasm",
            ".average.wasm.swp",
            "average.wasm.part",
            ".wasm",
            "average",
            "4913",
        ] {
            assert_eq!(name(other), None, "{other}");
        }
    }

    #[test]
    fn a_file_being_written_is_taken_when_closed_or_stable() {
        let mut folder = Folder::default();
        let t = crate::clock::monotonic();
        let none = HashSet::new();
        assert!(folder.look(BTreeMap::new(), &none, t).is_empty());
        assert!(folder.look(listing(&[("a", 1)]), &none, t).is_empty(), "just appeared");
        assert_eq!(folder.next_look(), Some(t + STABLE));
        let later = t + STABLE - Duration::from_millis(1);
        assert!(
            folder.look(listing(&[("a", 2)]), &none, later).is_empty(),
            "still grows"
        );
        assert!(
            folder.look(listing(&[("a", 2)]), &none, t + STABLE).is_empty(),
            "not stable for long enough"
        );
        assert_eq!(folder.look(listing(&[("a", 2)]), &none, later + STABLE), take("a"));
        assert_eq!(folder.next_look(), None);
        assert!(
            folder.look(listing(&[("a", 2)]), &none, later + STABLE * 2).is_empty(),
            "taken once"
        );

        let closed = HashSet::from(["b".to_owned()]);
        assert_eq!(
            folder.look(listing(&[("a", 2), ("b", 1)]), &closed, later),
            take("b"),
            "closed: at once"
        );
    }

    #[test]
    fn changes_and_removals_are_seen() {
        let mut folder = Folder::default();
        let t = crate::clock::monotonic();
        let none = HashSet::new();
        assert_eq!(
            folder.look(listing(&[("a", 1)]), &none, t),
            take("a"),
            "there at the start: at once"
        );
        assert!(folder.look(listing(&[("a", 2)]), &none, t).is_empty());
        assert_eq!(folder.look(listing(&[("a", 2)]), &none, t + STABLE), take("a"));
        assert_eq!(
            folder.look(listing(&[]), &none, t + STABLE),
            vec![Change::Gone("a".to_owned())]
        );
        assert!(folder.look(listing(&[("b", 1)]), &none, t).is_empty());
        assert!(
            folder.look(listing(&[]), &none, t).is_empty(),
            "never taken, so never gone"
        );
    }
}
