//! A disk for the tests: a SQLite VFS over the system's own that records what would reach the disk (writes, truncations,
//! syncs, files made and removed), fails when told to, and [`Walk`], which rebuilds what a power cut leaves of a record.
//!
//! The files themselves lie in a folder that [`Disk::new`] names; whoever opens a database in it gets this VFS from
//! `store::connect`. A sync only marks a place in the record. The WAL index (`-shm`) is memory, not disk: its calls go
//! to the system's VFS as they are, and it is in no record.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rusqlite::ffi;

use super::super::store::Tuning;

const NAME: &CStr = c"tidegate-test";

/// What happened to the disk, in order.
#[derive(Debug)]
pub enum Op<M> {
    Create {
        name: String,
        file: usize,
    },
    Delete {
        name: String,
    },
    Write {
        file: usize,
        at: u64,
        data: Box<[u8]>,
    },
    Truncate {
        file: usize,
        to: u64,
    },
    /// Everything before place `since` is on the medium.
    Sync {
        file: usize,
        since: usize,
    },
    /// It failed: whether what was written before `since` is on the medium is open, and no later sync cares for it, as
    /// with Linux, which takes such pages for clean.
    SyncFailed {
        file: usize,
        since: usize,
    },
    SyncFolder,
    /// Something that happened outside.
    Mark(M),
}

/// What the disk does instead of its work.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Faults {
    /// ENOSPC where a file would grow beyond what all files have now.
    pub full: bool,
    /// EIO for each write.
    pub write: bool,
    /// EIO for each sync.
    pub sync: bool,
    /// EROFS.
    pub read_only: bool,
    /// Reads of the database give pages with a few bits turned.
    pub damage: bool,
}

pub struct Disk<M = ()> {
    pub folder: PathBuf,
    tuning: Tuning,
    state: Mutex<State<M>>,
}

struct State<M> {
    ops: Vec<Op<M>>,
    names: BTreeMap<String, usize>,
    files: usize,
    /// Failed syncs of each file: every handle is told of each once.
    failed: Vec<u64>,
    faults: Faults,
    /// False once the process has "died": what its remains do is no longer seen.
    records: bool,
}

/// What one handle talks to: a disk, whatever its marks are.
trait Below: Send + Sync {
    /// The file's number, and how many of its syncs have failed so far: of those a new handle is not told.
    fn opened(&self, name: &str, is_new: bool) -> (usize, u64);
    fn deleted(&self, name: &str, folder_synced: bool);
    fn written(&self, file: usize, at: u64, data: &[u8]);
    fn truncated(&self, file: usize, to: u64);
    fn synced(&self, file: usize, since: usize, with_folder: bool, seen: &mut u64) -> bool;
    fn place(&self) -> usize;
    fn faults(&self) -> Faults;
    fn tuning(&self) -> Tuning;
}

impl<M: Send> Disk<M> {
    /// A disk that holds these files. It is there until [`Disk::remove`].
    pub fn new(folder: &Path, tuning: Tuning, image: &[(String, Vec<u8>)]) -> Arc<Disk<M>>
    where
        M: 'static,
    {
        let mut ops = Vec::new();
        let mut names = BTreeMap::new();
        for (file, (name, data)) in image.iter().enumerate() {
            ops.push(Op::Create {
                name: name.clone(),
                file,
            });
            ops.push(Op::Write {
                file,
                at: 0,
                data: data.clone().into(),
            });
            let since = ops.len();
            ops.push(Op::Sync { file, since });
            names.insert(name.clone(), file);
        }
        ops.push(Op::SyncFolder);
        let files = image.len();
        Disk::register(
            folder,
            tuning,
            State {
                ops,
                names,
                files,
                failed: vec![0; files],
                faults: Faults::default(),
                records: true,
            },
        )
    }

    fn register(folder: &Path, tuning: Tuning, state: State<M>) -> Arc<Disk<M>>
    where
        M: 'static,
    {
        let disk = Arc::new(Disk {
            folder: folder.to_owned(),
            tuning,
            state: Mutex::new(state),
        });
        lock(&DISKS).insert(folder.to_owned(), Arc::clone(&disk) as Arc<dyn Below>);
        disk
    }

    /// The process dies, the machine does not: the same files as they were written, in another folder, with nobody at them.
    pub fn survive(&self, folder: &Path) -> Arc<Disk<M>>
    where
        M: 'static,
    {
        std::fs::create_dir_all(folder).expect("made");
        let mut state = lock(&self.state);
        for name in state.names.keys() {
            std::fs::copy(self.folder.join(name), folder.join(name)).expect("copied");
        }
        state.records = false;
        let state = State {
            ops: std::mem::take(&mut state.ops),
            names: std::mem::take(&mut state.names),
            files: state.files,
            failed: std::mem::take(&mut state.failed),
            faults: state.faults,
            records: true,
        };
        Disk::register(folder, self.tuning, state)
    }

    pub fn mark(&self, mark: M) {
        lock(&self.state).ops.push(Op::Mark(mark));
    }

    pub fn set(&self, faults: Faults) {
        lock(&self.state).faults = faults;
    }

    pub fn ops(&self) -> usize {
        lock(&self.state).ops.len()
    }

    /// The end of the record.
    pub fn remove(&self) -> Vec<Op<M>> {
        lock(&DISKS).remove(&self.folder);
        let mut state = lock(&self.state);
        state.records = false;
        std::mem::take(&mut state.ops)
    }
}

impl<M: Send> Below for Disk<M> {
    fn opened(&self, name: &str, is_new: bool) -> (usize, u64) {
        let mut state = lock(&self.state);
        if let Some(file) = state.names.get(name)
            && !is_new
        {
            return (*file, state.failed.get(*file).copied().unwrap_or(0));
        }
        let file = state.files;
        state.files += 1;
        state.failed.push(0);
        state.names.insert(name.to_owned(), file);
        state.push(Op::Create {
            name: name.to_owned(),
            file,
        });
        (file, 0)
    }

    fn deleted(&self, name: &str, folder_synced: bool) {
        let mut state = lock(&self.state);
        state.names.remove(name);
        state.push(Op::Delete { name: name.to_owned() });
        if folder_synced {
            state.push(Op::SyncFolder);
        }
    }

    fn written(&self, file: usize, at: u64, data: &[u8]) {
        let data = data.into();
        lock(&self.state).push(Op::Write { file, at, data });
    }

    fn truncated(&self, file: usize, to: u64) {
        lock(&self.state).push(Op::Truncate { file, to });
    }

    fn synced(&self, file: usize, since: usize, with_folder: bool, seen: &mut u64) -> bool {
        let mut state = lock(&self.state);
        let Some(failed) = state.failed.get(file).copied() else {
            return true;
        };
        if state.faults.sync {
            state.failed[file] += 1;
            *seen = state.failed[file];
            state.push(Op::SyncFailed { file, since });
            return false;
        }
        // A failure that another handle met is told to this one once, too; what it wrote since is not synced then.
        if std::mem::replace(seen, failed) < failed {
            state.push(Op::SyncFailed { file, since });
            return false;
        }
        state.push(Op::Sync { file, since });
        if with_folder {
            state.push(Op::SyncFolder);
        }
        true
    }

    fn place(&self) -> usize {
        lock(&self.state).ops.len()
    }

    fn faults(&self) -> Faults {
        lock(&self.state).faults
    }

    fn tuning(&self) -> Tuning {
        self.tuning
    }
}

impl<M> State<M> {
    fn push(&mut self, op: Op<M>) {
        if self.records {
            self.ops.push(op);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

static DISKS: Mutex<BTreeMap<PathBuf, Arc<dyn Below>>> = Mutex::new(BTreeMap::new());

/// What lies under a database, for `store::connect`.
pub struct Under {
    pub vfs: &'static CStr,
    pub tuning: Tuning,
}

pub fn under(path: &Path) -> Option<Under> {
    let disk = below(path)?;
    register_vfs();
    Some(Under {
        vfs: NAME,
        tuning: disk.tuning(),
    })
}

fn below(path: &Path) -> Option<Arc<dyn Below>> {
    lock(&DISKS).get(path.parent()?).cloned()
}

/// At which operation, and what happens then.
type Planned = (u32, Box<dyn FnOnce()>);

thread_local! {
    static AT: RefCell<Option<Planned>> = const { RefCell::new(None) };
}

/// Before the `nth` operation from now on that this thread does on a recorded disk, something else is done.
pub fn at(nth: u32, what: impl FnOnce() + 'static) {
    AT.set(Some((nth, Box::new(what))));
}

/// What was asked for with [`at`] and has not come to pass.
pub fn not_at() -> Option<Box<dyn FnOnce()>> {
    AT.take().map(|(_, what)| what)
}

fn tick() {
    let due = AT.with_borrow_mut(|at| match at {
        Some((0, _)) => at.take().map(|(_, what)| what),
        Some((left, _)) => {
            *left -= 1;
            None
        }
        None => None,
    });
    if let Some(due) = due {
        due();
    }
}

// -- The VFS ------------------------------------------------------------------------------------------------------------

/// A handle: ours, and behind it in the same allocation (SQLite's, of `szOsFile` bytes) the one of the system's VFS.
#[repr(C)]
struct Handle {
    base: ffi::sqlite3_file,
    /// From `Box::into_raw`; freed by `close`.
    ours: *mut Ours,
}

struct Ours {
    disk: Arc<dyn Below>,
    file: usize,
    is_database: bool,
    /// A new journal or WAL: its first sync syncs the folder too, as the system's VFS does.
    folder_owed: bool,
    failures_seen: u64,
}

/// SQLite aligns `sqlite3_file` at 8 bytes; the system's handle begins at a multiple of that.
const SYSTEM_AT: usize = size_of::<Handle>().next_multiple_of(16);

struct System(*mut ffi::sqlite3_vfs);
// SAFETY: the system's VFS is a static of the library, which only reads it once it is initialised.
unsafe impl Send for System {}
// SAFETY: as above.
unsafe impl Sync for System {}

static SYSTEM: OnceLock<System> = OnceLock::new();

fn system() -> *mut ffi::sqlite3_vfs {
    SYSTEM.get().expect("our VFS is used after its registration only").0
}

fn register_vfs() {
    SYSTEM.get_or_init(|| {
        // SAFETY: a null name asks for the default; the library initialises itself first.
        let system = unsafe { ffi::sqlite3_vfs_find(std::ptr::null()) };
        assert!(!system.is_null(), "there is a default VFS");
        // SAFETY: `system` is valid as long as the process lives (a static of the library); a copy of its table is ours.
        let mut ours = unsafe { *system };
        ours.szOsFile += SYSTEM_AT as c_int;
        ours.pNext = std::ptr::null_mut();
        ours.zName = NAME.as_ptr();
        ours.xOpen = Some(open);
        ours.xDelete = Some(delete);
        // The others (xAccess, xFullPathname, xRandomness, the clock) do not look at the table that they are called with:
        // the copies of the pointers do for ours.
        //
        // SAFETY: the table lives for ever (leaked), and its name too.
        let failed = unsafe { ffi::sqlite3_vfs_register(Box::leak(Box::new(ours)), 0) };
        assert_eq!(failed, ffi::SQLITE_OK);
        System(system)
    });
}

/// The system's handle behind ours.
fn system_file(file: *mut ffi::sqlite3_file) -> *mut ffi::sqlite3_file {
    // SAFETY: SQLite allocated `szOsFile` bytes for `file`, which are SYSTEM_AT more than the system's handle needs.
    unsafe { file.byte_add(SYSTEM_AT) }
}

/// Calls a method of the system's handle.
macro_rules! system {
    ($file:expr, $method:ident $(, $argument:expr)*) => {{
        let file = system_file($file);
        // SAFETY: `open` has filled in the system's handle, and its methods are there from version 2 of the interface on;
        // the arguments are SQLite's own.
        unsafe { (*(*file).pMethods).$method.expect("of version 2")(file $(, $argument)*) }
    }};
}

fn ours<'a>(file: *mut ffi::sqlite3_file) -> &'a mut Ours {
    // SAFETY: SQLite calls methods only on handles that `open` has filled in and `close` has not had, one call at a time.
    unsafe { &mut *(*file.cast::<Handle>()).ours }
}

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 2,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock_file),
    xUnlock: Some(unlock_file),
    xCheckReservedLock: Some(check_reserved_lock),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(device_characteristics),
    xShmMap: Some(shm_map),
    xShmLock: Some(shm_lock),
    xShmBarrier: Some(shm_barrier),
    xShmUnmap: Some(shm_unmap),
    xFetch: None,
    xUnfetch: None,
};

unsafe extern "C" fn open(
    _vfs: *mut ffi::sqlite3_vfs,
    name: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite hands over at least `szOsFile` bytes; without methods it takes the handle for not open.
    unsafe { (*file).pMethods = std::ptr::null() };
    if name.is_null() {
        // A temporary file: nothing here needs one.
        return ffi::SQLITE_CANTOPEN;
    }
    // SAFETY: not null, and SQLite's names end with a zero byte.
    let path = PathBuf::from(unsafe { CStr::from_ptr(name) }.to_str().expect("a test's own path"));
    let Some(disk) = below(&path) else {
        return ffi::SQLITE_CANTOPEN;
    };
    let mut flags = flags;
    if disk.faults().read_only {
        flags = flags & !(ffi::SQLITE_OPEN_READWRITE | ffi::SQLITE_OPEN_CREATE) | ffi::SQLITE_OPEN_READONLY;
    }
    let is_new = !path.exists();
    let below = system_file(file);
    // SAFETY: the system's own method with the arguments that SQLite gave; its handle is behind ours.
    let failed = unsafe { (*system()).xOpen.expect("always there")(system(), name, below, flags, out_flags) };
    if failed != ffi::SQLITE_OK {
        return failed;
    }
    let name = path.file_name().and_then(|n| n.to_str()).expect("a test's own path");
    let (number, failures_seen) = disk.opened(name, is_new);
    let opened = Ours {
        file: number,
        disk,
        is_database: flags & ffi::SQLITE_OPEN_MAIN_DB != 0,
        folder_owed: flags & ffi::SQLITE_OPEN_CREATE != 0
            && flags & (ffi::SQLITE_OPEN_MAIN_JOURNAL | ffi::SQLITE_OPEN_WAL) != 0,
        failures_seen,
    };
    let handle = file.cast::<Handle>();
    // SAFETY: as above; `close` takes the box back.
    unsafe {
        (*handle).ours = Box::into_raw(Box::new(opened));
        (*handle).base.pMethods = &raw const METHODS;
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn delete(_vfs: *mut ffi::sqlite3_vfs, name: *const c_char, folder_synced: c_int) -> c_int {
    // SAFETY: SQLite's names end with a zero byte.
    let path = PathBuf::from(unsafe { CStr::from_ptr(name) }.to_str().expect("a test's own path"));
    tick();
    if std::fs::remove_file(&path).is_err() {
        return ffi::SQLITE_IOERR_DELETE_NOENT;
    }
    if let Some(disk) = below(&path) {
        disk.deleted(
            path.file_name().expect("a file").to_str().expect("a test's own"),
            folder_synced & 1 != 0,
        );
    }
    ffi::SQLITE_OK
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    let closed = system!(file, xClose);
    // SAFETY: from `open`'s `Box::into_raw`, and this is the last call on the handle.
    drop(unsafe { Box::from_raw((*file.cast::<Handle>()).ours) });
    closed
}

unsafe extern "C" fn read(file: *mut ffi::sqlite3_file, to: *mut c_void, count: c_int, at: i64) -> c_int {
    let got = system!(file, xRead, to, count, at);
    let ours = ours(file);
    // The first page stays: it says that this is a database at all.
    if got == ffi::SQLITE_OK && ours.is_database && at >= 4_096 && count > 64 && ours.disk.faults().damage {
        // SAFETY: SQLite hands over `count` bytes to be filled, which the system's method has done.
        let bytes = unsafe { std::slice::from_raw_parts_mut(to.cast::<u8>(), count as usize) };
        bytes.iter_mut().step_by(16).for_each(|b| *b ^= 0x55);
    }
    got
}

unsafe extern "C" fn write(file: *mut ffi::sqlite3_file, from: *const c_void, count: c_int, at: i64) -> c_int {
    tick();
    let ours = ours(file);
    let faults = ours.disk.faults();
    if faults.write || faults.read_only {
        return ffi::SQLITE_IOERR_WRITE;
    }
    if faults.full {
        let mut size = 0;
        system!(file, xFileSize, &raw mut size);
        if at + i64::from(count) > size {
            return ffi::SQLITE_FULL;
        }
    }
    let written = system!(file, xWrite, from, count, at);
    if written == ffi::SQLITE_OK {
        // SAFETY: SQLite hands over `count` bytes to be written.
        let data = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), count as usize) };
        ours.disk.written(ours.file, at as u64, data);
    }
    written
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, to: i64) -> c_int {
    tick();
    let ours = ours(file);
    let faults = ours.disk.faults();
    if faults.write || faults.read_only {
        return ffi::SQLITE_IOERR_TRUNCATE;
    }
    let done = system!(file, xTruncate, to);
    if done == ffi::SQLITE_OK {
        ours.disk.truncated(ours.file, to as u64);
    }
    done
}

unsafe extern "C" fn sync(file: *mut ffi::sqlite3_file, _flags: c_int) -> c_int {
    let ours = ours(file);
    let since = ours.disk.place();
    // Whatever comes in here came while the sync was under way: it is not in it.
    tick();
    if !ours
        .disk
        .synced(ours.file, since, ours.folder_owed, &mut ours.failures_seen)
    {
        return ffi::SQLITE_IOERR_FSYNC;
    }
    ours.folder_owed = false;
    ffi::SQLITE_OK
}

unsafe extern "C" fn file_size(file: *mut ffi::sqlite3_file, size: *mut i64) -> c_int {
    system!(file, xFileSize, size)
}

unsafe extern "C" fn lock_file(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    system!(file, xLock, level)
}

unsafe extern "C" fn unlock_file(file: *mut ffi::sqlite3_file, level: c_int) -> c_int {
    system!(file, xUnlock, level)
}

unsafe extern "C" fn check_reserved_lock(file: *mut ffi::sqlite3_file, result: *mut c_int) -> c_int {
    system!(file, xCheckReservedLock, result)
}

unsafe extern "C" fn file_control(file: *mut ffi::sqlite3_file, op: c_int, argument: *mut c_void) -> c_int {
    system!(file, xFileControl, op, argument)
}

unsafe extern "C" fn sector_size(file: *mut ffi::sqlite3_file) -> c_int {
    system!(file, xSectorSize)
}

unsafe extern "C" fn device_characteristics(file: *mut ffi::sqlite3_file) -> c_int {
    system!(file, xDeviceCharacteristics)
}

unsafe extern "C" fn shm_map(
    file: *mut ffi::sqlite3_file,
    page: c_int,
    size: c_int,
    extend: c_int,
    to: *mut *mut c_void,
) -> c_int {
    system!(file, xShmMap, page, size, extend, to)
}

unsafe extern "C" fn shm_lock(file: *mut ffi::sqlite3_file, offset: c_int, count: c_int, flags: c_int) -> c_int {
    system!(file, xShmLock, offset, count, flags)
}

unsafe extern "C" fn shm_barrier(file: *mut ffi::sqlite3_file) {
    system!(file, xShmBarrier);
}

unsafe extern "C" fn shm_unmap(file: *mut ffi::sqlite3_file, delete: c_int) -> c_int {
    system!(file, xShmUnmap, delete)
}

// -- The power cut ------------------------------------------------------------------------------------------------------

/// SplitMix64: everything that a test throws dice for comes from one number.
#[derive(Debug, Clone)]
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64, part: u64) -> Dice {
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ part.wrapping_mul(0xd1b5_4a32_d192_ed03))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n.max(1) as u64) as usize
    }

    pub fn in_100(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// A change of a file that is not known to be on the medium, or that came behind such a one.
#[derive(Debug, Clone, Copy)]
struct Later {
    op: usize,
    state: Fate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Unsynced,
    /// A sync failed: open for ever.
    Doomed,
    Synced,
}

/// Goes through a record and knows at each place what is surely on the medium and what may be.
pub struct Walk<'a, M> {
    ops: &'a [Op<M>],
    at: usize,
    sure: Vec<Vec<u8>>,
    later: Vec<Vec<Later>>,
    names: BTreeMap<String, usize>,
    names_later: Vec<usize>,
}

impl<'a, M> Walk<'a, M> {
    pub fn new(ops: &'a [Op<M>]) -> Walk<'a, M> {
        Walk {
            ops,
            at: 0,
            sure: Vec::new(),
            later: Vec::new(),
            names: BTreeMap::new(),
            names_later: Vec::new(),
        }
    }

    /// Goes on to a place, which lies ahead.
    pub fn to(&mut self, place: usize) {
        while self.at < place {
            match &self.ops[self.at] {
                Op::Create { file, .. } => {
                    while self.sure.len() <= *file {
                        self.sure.push(Vec::new());
                        self.later.push(Vec::new());
                    }
                    self.names_later.push(self.at);
                }
                Op::Delete { .. } => self.names_later.push(self.at),
                Op::Write { file, .. } | Op::Truncate { file, .. } => self.later[*file].push(Later {
                    op: self.at,
                    state: Fate::Unsynced,
                }),
                Op::Sync { file, since } => self.settle(*file, *since, Fate::Synced),
                Op::SyncFailed { file, since } => self.settle(*file, *since, Fate::Doomed),
                Op::SyncFolder => {
                    for op in std::mem::take(&mut self.names_later) {
                        rename(&mut self.names, &self.ops[op]);
                    }
                }
                Op::Mark(_) => {}
            }
            self.at += 1;
        }
    }

    fn settle(&mut self, file: usize, since: usize, fate: Fate) {
        let later = &mut self.later[file];
        for l in later.iter_mut().filter(|l| l.op < since && l.state == Fate::Unsynced) {
            l.state = fate;
        }
        // What is sure and has nothing unsure before it is simply so.
        let sure = later.iter().take_while(|l| l.state == Fate::Synced).count();
        for l in later.drain(..sure) {
            write_whole(&mut self.sure[file], &self.ops[l.op]);
        }
    }

    /// The files as a cut at this place may leave them: of what was not synced any part, whole or torn, in any order.
    pub fn image(&self, dice: &mut Dice) -> Vec<(String, Vec<u8>)> {
        let mode = dice.below(6);
        let sector = if dice.below(2) == 0 { 512 } else { 4_096 };
        let percent = [15, 50, 85, 97][dice.below(4)];
        let mut names = self.names.clone();
        for op in &self.names_later {
            if mode == 1 || mode != 0 && dice.in_100(50) {
                rename(&mut names, &self.ops[*op]);
            }
        }
        let unsynced = self.later.iter().flatten().filter(|l| l.state != Fate::Synced);
        let prefix = unsynced.clone().nth(dice.below(unsynced.count())).map_or(0, |l| l.op);
        let mut image = Vec::new();
        for (name, file) in names {
            let mut content = self.sure[file].clone();
            let mut later = self.later[file].clone();
            if mode == 5 && later.iter().all(|l| l.state == Fate::Unsynced) {
                for i in (1..later.len()).rev() {
                    later.swap(i, dice.below(i + 1));
                }
            }
            for l in later {
                let op = &self.ops[l.op];
                match (l.state, mode) {
                    (Fate::Synced, _) | (_, 1) => write_whole(&mut content, op),
                    (_, 0) => {}
                    (_, 2) if l.op < prefix => write_whole(&mut content, op),
                    (_, 2) if l.op > prefix => {}
                    (_, 3) if dice.in_100(percent) => write_whole(&mut content, op),
                    (_, 3) => {}
                    _ => write_torn(&mut content, op, sector, percent, dice),
                }
            }
            image.push((name, content));
        }
        if dice.in_100(25) {
            // The WAL index is a file too, and may be left with anything in it.
            let junk = (0..32 << 10).map(|_| dice.next() as u8).collect();
            image.push(("log.db-shm".into(), junk));
        }
        image
    }
}

fn rename<M>(names: &mut BTreeMap<String, usize>, op: &Op<M>) {
    match op {
        Op::Create { name, file } => drop(names.insert(name.clone(), *file)),
        Op::Delete { name } => drop(names.remove(name)),
        _ => unreachable!("only these are kept for names"),
    }
}

fn write_whole<M>(content: &mut Vec<u8>, op: &Op<M>) {
    match op {
        Op::Write { at, data, .. } => write_at(content, *at as usize, data),
        Op::Truncate { to, .. } => content.resize(*to as usize, 0),
        _ => unreachable!("only these are kept for files"),
    }
}

fn write_at(content: &mut Vec<u8>, at: usize, data: &[u8]) {
    if content.len() < at + data.len() {
        content.resize(at + data.len(), 0);
    }
    content[at..at + data.len()].copy_from_slice(data);
}

fn write_torn<M>(content: &mut Vec<u8>, op: &Op<M>, sector: usize, percent: usize, dice: &mut Dice) {
    let Op::Write { at, data, .. } = op else {
        if dice.in_100(percent) {
            write_whole(content, op);
        }
        return;
    };
    let (mut from, end) = (*at as usize, *at as usize + data.len());
    while from < end {
        let to = ((from / sector + 1) * sector).min(end);
        if dice.in_100(percent) {
            write_at(content, from, &data[from - *at as usize..to - *at as usize]);
        } else if content.len() < to && dice.in_100(50) {
            // The file's new length is there, its content is not: zeros.
            content.resize(to, 0);
        }
        from = to;
    }
}
