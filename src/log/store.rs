//! The log on disk: one SQLite database in WAL mode. The only file that names rusqlite.
//!
//! Every commit is one transaction with synchronous=FULL: when [`Store::commit`] returns Ok, it is on disk. The WAL is
//! made large once at start and then written in place, since growing it costs a second metadata write on every sync
//! (figures: ARCHITECTURE.md). Segments are keyed by `stream << 48 | first sequence`, so that a stream is one range.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};
use std::time::Duration;

use rusqlite::{Connection, OpenFlags, OptionalExtension, params};

use super::changes::{Changes, ConsumerRow, DeadRow, LossRow, OutboundRow, SessionRow, WillRow};
use super::segment::{Header, Segment, Summary};
use crate::message::TopicFilter;

/// How the database is driven. Only the tests have another than [`SHIPPED`], and other files below it ([`connect`]).
#[derive(Debug, Clone, Copy)]
pub struct Tuning {
    pub synchronous: &'static str,
    /// The WAL's size from the start: no commit before a checkpoint has to make the file longer.
    pub wal_bytes: u64,
    /// At this many pages the writer itself checkpoints; the second connection alone never resets a busy WAL.
    pub wal_pages_writer: i32,
    /// At this many pages the checkpointer's connection is woken.
    pub wal_pages_background: i32,
}

pub const SHIPPED: Tuning = Tuning {
    synchronous: "FULL",
    wal_bytes: 16 << 20,
    wal_pages_writer: 4_000,
    wal_pages_background: 1_000,
};

/// Segments deleted by one transaction: one at a time costs as much as inserting, 33,000 at once stall 145 ms.
pub const DELETE_CHUNK: usize = 128;

const SEQUENCE_BITS: u32 = 48;
const SCHEMA_VERSION: i64 = 1;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{0}")]
    Sqlite(#[from] rusqlite::Error),
    #[error(
        "the database was written by a newer tidegate (schema {0}); install that version again, or move the file away"
    )]
    Newer(i64),
    #[error("a row of the database is damaged")]
    Damaged,
}

impl StoreError {
    pub fn is_full(&self) -> bool {
        matches!(self, StoreError::Sqlite(e) if e.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull))
    }

    /// The file is no database, or not a sound one: set it aside and begin anew. A full disk or a missing permission is not that.
    pub fn is_damage(&self) -> bool {
        use rusqlite::ErrorCode::{DatabaseCorrupt, NotADatabase};
        match self {
            StoreError::Sqlite(e) => matches!(e.sqlite_error_code(), Some(DatabaseCorrupt | NotADatabase)),
            StoreError::Damaged => true,
            StoreError::Newer(_) => false,
        }
    }
}

const SCHEMA: &str = "
CREATE TABLE meta(key TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE stream(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE,
    messages INTEGER NOT NULL, bytes INTEGER NOT NULL, as_of INTEGER NOT NULL);
CREATE TABLE segment(id INTEGER PRIMARY KEY, last INTEGER NOT NULL, count INTEGER NOT NULL, bytes INTEGER NOT NULL,
    oldest INTEGER NOT NULL, newest INTEGER NOT NULL, summary BLOB NOT NULL, body BLOB NOT NULL);
CREATE TABLE consumer(id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, filters TEXT NOT NULL, until INTEGER);
CREATE TABLE cursor(consumer INTEGER NOT NULL, stream INTEGER NOT NULL, sequence INTEGER NOT NULL,
    matched INTEGER NOT NULL, messages INTEGER NOT NULL, bytes INTEGER NOT NULL,
    PRIMARY KEY(consumer, stream)) WITHOUT ROWID;
CREATE TABLE retained(topic TEXT PRIMARY KEY, record BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE session(client_id TEXT PRIMARY KEY, data TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE will(client_id TEXT PRIMARY KEY, record BLOB NOT NULL, delay_s INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE inbound(client_id TEXT NOT NULL, packet_id INTEGER NOT NULL, PRIMARY KEY(client_id, packet_id)) WITHOUT ROWID;
CREATE TABLE outbound(client_id TEXT NOT NULL, packet_id INTEGER NOT NULL, stream INTEGER NOT NULL, sequence INTEGER NOT NULL,
    received INTEGER NOT NULL, PRIMARY KEY(client_id, packet_id)) WITHOUT ROWID;
CREATE TABLE loss(id INTEGER PRIMARY KEY AUTOINCREMENT, consumer TEXT NOT NULL, source TEXT NOT NULL, reason TEXT NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL, count INTEGER NOT NULL, bytes INTEGER NOT NULL,
    oldest INTEGER NOT NULL, newest INTEGER NOT NULL, at INTEGER NOT NULL, sent INTEGER NOT NULL);
CREATE INDEX loss_open ON loss(consumer, source, reason) WHERE sent=0;
CREATE TABLE dead(id INTEGER PRIMARY KEY AUTOINCREMENT, consumer TEXT NOT NULL, reason TEXT NOT NULL, at INTEGER NOT NULL, record BLOB NOT NULL);
CREATE TABLE module_state(module TEXT NOT NULL, key TEXT NOT NULL, value BLOB NOT NULL, PRIMARY KEY(module, key)) WITHOUT ROWID;
";

/// A stream as the database knows it; one that the configuration no longer has keeps its messages.
#[derive(Debug, Clone)]
pub struct StreamRow {
    pub id: u16,
    pub name: String,
    pub messages: u64,
    pub bytes: u64,
    /// The newest sequence in it, 0 where it is empty.
    pub last: u64,
}

#[derive(Debug, Clone)]
pub struct CursorRow {
    pub stream: u16,
    pub sequence: u64,
    /// The newest sequence that the consumer's filters matched.
    pub matched: u64,
    pub messages: u64,
    pub bytes: u64,
}

/// Everything that is in memory while the daemon runs.
#[derive(Debug, Default)]
pub struct Recovered {
    pub log_id: String,
    pub streams: Vec<StreamRow>,
    pub sequence: u64,
    /// Cursor rows tell the truth up to here; what came later is counted again by reading it.
    pub flushed: u64,
    pub consumers: Vec<(i64, ConsumerRow, Vec<CursorRow>)>,
    pub retained: Vec<Vec<u8>>,
    pub sessions: Vec<SessionRow>,
    pub wills: Vec<WillRow>,
    pub inbound: Vec<(String, u16)>,
    pub outbound: Vec<OutboundRow>,
    pub losses_unsent: Vec<LossRow>,
    pub dead: u64,
}

pub struct Store {
    db: Connection,
    path: PathBuf,
    tuning: Tuning,
    wal_pages: Arc<AtomicI32>,
    /// The disk failed under the connection: nothing goes through it any more, the next commit opens another.
    distrusted: bool,
}

/// Every connection is opened here: a test lays a disk of its own under it (tests/disk.rs).
fn connect(path: &Path, flags: OpenFlags) -> Result<(Connection, Tuning), StoreError> {
    #[cfg(test)]
    if let Some(disk) = super::tests::disk::under(path) {
        let db = Connection::open_with_flags_and_vfs(path, flags, disk.vfs)?;
        configure(&db, &disk.tuning)?;
        return Ok((db, disk.tuning));
    }
    let db = Connection::open_with_flags(path, flags)?;
    configure(&db, &SHIPPED)?;
    Ok((db, SHIPPED))
}

fn segment_id(stream: u16, sequence: u64) -> i64 {
    assert!(
        sequence < 1 << SEQUENCE_BITS,
        "2^48 messages take 22 years at 400,000 a second"
    );
    (i64::from(stream) << SEQUENCE_BITS) | sequence as i64
}

fn stream_range(stream: u16) -> (i64, i64) {
    (
        i64::from(stream) << SEQUENCE_BITS,
        (i64::from(stream) + 1) << SEQUENCE_BITS,
    )
}

fn configure(db: &Connection, tuning: &Tuning) -> Result<(), StoreError> {
    db.busy_timeout(Duration::from_secs(5))?;
    db.set_prepared_statement_cache_capacity(64);
    // A small cache: larger ones gained no rate and cost resident memory (measured).
    db.execute_batch(&format!(
        "PRAGMA synchronous={}; PRAGMA cache_size=-1024; PRAGMA mmap_size=0; PRAGMA wal_autocheckpoint=0;",
        tuning.synchronous
    ))?;
    Ok(())
}

impl Store {
    pub fn open(path: &Path) -> Result<(Store, Recovered), StoreError> {
        let (mut db, tuning) = connect(path, OpenFlags::default())?;
        // Before the first table; without effect on a database that exists.
        db.execute_batch("PRAGMA page_size=4096; PRAGMA auto_vacuum=INCREMENTAL;")?;
        let mode: String = db.query_row("PRAGMA journal_mode=WAL", [], |r| r.get(0))?;
        if mode != "wal" {
            return Err(StoreError::Sqlite(rusqlite::Error::SqliteFailure(
                rusqlite::ffi::Error::new(rusqlite::ffi::SQLITE_CANTOPEN),
                Some(format!(
                    "the file system does not carry a write-ahead log (journal mode {mode})"
                )),
            )));
        }
        let version: i64 = db.query_row("PRAGMA user_version", [], |r| r.get(0))?;
        match version {
            0 => create(&mut db)?,
            SCHEMA_VERSION => {}
            newer => return Err(StoreError::Newer(newer)),
        }
        let recovered = recover(&db)?;
        presize_wal(&mut db, tuning.wal_bytes)?;
        let wal_pages = Arc::new(AtomicI32::new(0));
        let pages = Arc::clone(&wal_pages);
        db.wal_hook(Some(move |_: &'_ mut rusqlite::hooks::Wal, n| {
            pages.store(n, Ordering::Relaxed);
            Ok(())
        }))?;
        Ok((
            Store {
                db,
                path: path.to_owned(),
                tuning,
                wal_pages,
                distrusted: false,
            },
            recovered,
        ))
    }

    /// After an error of the disk the connection is not trusted again.
    ///
    /// What a failed commit left in the WAL is written over by the next one, and so becomes dirty anew: a kernel that took
    /// it for written after a failed sync does no harm. For that the WAL index must not be rebuilt from the file while the
    /// machine runs on, so the new connection is opened before the old one is closed. (A new process does rebuild it; it
    /// copies everything into the database and begins the WAL anew before its first commit.)
    pub fn distrust(&mut self) {
        self.distrusted = true;
    }

    fn reopen(&mut self) -> Result<(), StoreError> {
        let (mut db, _) = connect(&self.path, OpenFlags::default())?;
        db.query_row("PRAGMA user_version", [], |r| r.get::<_, i64>(0))?;
        let pages = Arc::clone(&self.wal_pages);
        db.wal_hook(Some(move |_: &'_ mut rusqlite::hooks::Wal, n| {
            pages.store(n, Ordering::Relaxed);
            Ok(())
        }))?;
        self.db = db;
        self.distrusted = false;
        Ok(())
    }

    pub fn tuning(&self) -> &Tuning {
        &self.tuning
    }

    pub fn wal_pages(&self) -> i32 {
        self.wal_pages.load(Ordering::Relaxed)
    }

    /// One transaction: all of it is on disk afterwards, or nothing.
    pub fn commit(&mut self, work: &Commit<'_>) -> Result<(), StoreError> {
        if self.distrusted {
            self.reopen()?;
        }
        let tx = self
            .db
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        {
            let mut insert = tx.prepare_cached("INSERT INTO segment VALUES(?1,?2,?3,?4,?5,?6,?7,?8)")?;
            for (s, body) in work.segments {
                insert.execute(params![
                    segment_id(s.stream, s.first),
                    s.last as i64,
                    s.count,
                    s.bytes as i64,
                    s.oldest,
                    s.newest,
                    s.summary.to_bytes(),
                    body
                ])?;
            }
        }
        apply(&tx, work.changes)?;
        if let Some(flush) = work.flush {
            let mut cursor = tx.prepare_cached(
                // A commit with a module's effects may have moved the cursor further than memory knows yet.
                "INSERT INTO cursor VALUES(?1,?2,?3,?4,?5,?6) ON CONFLICT DO UPDATE SET sequence=max(sequence, excluded.sequence),
                 matched=excluded.matched, messages=excluded.messages, bytes=excluded.bytes",
            )?;
            for (consumer, row) in &flush.cursors {
                cursor.execute(params![
                    consumer,
                    row.stream,
                    row.sequence as i64,
                    row.matched as i64,
                    row.messages as i64,
                    row.bytes as i64
                ])?;
            }
            tx.prepare_cached("INSERT OR REPLACE INTO meta VALUES('flushed', ?1)")?
                .execute([flush.sequence as i64])?;
        }
        {
            let mut delete = tx.prepare_cached("DELETE FROM segment WHERE id >= ?1 AND id <= ?2")?;
            for d in work.deletes {
                delete.execute([segment_id(d.stream, d.from), segment_id(d.stream, d.through)])?;
            }
            let mut totals = tx.prepare_cached("UPDATE stream SET messages=?2, bytes=?3, as_of=?4 WHERE id=?1")?;
            for t in work.totals {
                totals.execute(params![t.id, t.messages as i64, t.bytes as i64, t.last as i64])?;
            }
        }
        tx.commit()?;
        Ok(())
    }

    /// The oldest segments of a stream up to `through`, without their bodies, at most [`DELETE_CHUNK`].
    pub fn oldest(&self, stream: u16, through: u64) -> Result<Vec<Header>, StoreError> {
        let mut select = self.db.prepare_cached(
            "SELECT id,last,count,bytes,oldest,newest,summary FROM segment WHERE id >= ?1 AND id < ?2 AND last <= ?3 ORDER BY id LIMIT ?4",
        )?;
        let (from, to) = stream_range(stream);
        let rows = select.query_map(params![from, to, through as i64, DELETE_CHUNK as i64], header)?;
        rows.map(|r| r?.ok_or(StoreError::Damaged)).collect()
    }

    /// The segments of a stream behind `after`, without their bodies, at most [`DELETE_CHUNK`].
    pub fn oldest_after(&self, stream: u16, after: u64) -> Result<Vec<Header>, StoreError> {
        let mut select = self.db.prepare_cached(
            "SELECT id,last,count,bytes,oldest,newest,summary FROM segment WHERE id > ?1 AND id < ?2 ORDER BY id LIMIT ?3",
        )?;
        let (_, to) = stream_range(stream);
        let rows = select.query_map(params![segment_id(stream, after), to, DELETE_CHUNK as i64], |r| {
            header(r)
        })?;
        rows.map(|r| r?.ok_or(StoreError::Damaged)).collect()
    }

    /// The segments of a stream that hold something behind `after`, without their bodies, at most [`DELETE_CHUNK`].
    pub fn holding_after(&self, stream: u16, after: u64) -> Result<Vec<Header>, StoreError> {
        let mut select = self.db.prepare_cached(
            "SELECT id,last,count,bytes,oldest,newest,summary FROM segment
             WHERE id >= ifnull((SELECT max(id) FROM segment WHERE id BETWEEN ?1 AND ?2), ?1) AND id < ?3 AND last > ?4
             ORDER BY id LIMIT ?5",
        )?;
        let (from, to) = stream_range(stream);
        let values = params![from, segment_id(stream, after), to, after as i64, DELETE_CHUNK as i64];
        let rows = select.query_map(values, header)?;
        rows.map(|r| r?.ok_or(StoreError::Damaged)).collect()
    }

    /// Gives each named stream a row and an id, in the order of the names.
    pub fn declare<'a>(
        &mut self,
        recovered: &mut Recovered,
        names: impl Iterator<Item = &'a str>,
    ) -> Result<(), StoreError> {
        let tx = self.db.transaction()?;
        for name in names {
            if recovered.streams.iter().any(|s| s.name == name) {
                continue;
            }
            let id = recovered.streams.iter().map(|s| s.id + 1).max().unwrap_or(0);
            tx.execute("INSERT INTO stream VALUES(?1,?2,0,0,0)", params![id, name])?;
            recovered.streams.push(StreamRow {
                id,
                name: name.to_owned(),
                messages: 0,
                bytes: 0,
                last: 0,
            });
        }
        tx.commit()?;
        Ok(())
    }

    /// A segment with its body, for counting what is about to be dropped.
    pub fn segment(&self, header: Header) -> Result<Segment, StoreError> {
        let body: Vec<u8> = self
            .db
            .prepare_cached("SELECT body FROM segment WHERE id=?1")?
            .query_row([segment_id(header.stream, header.first)], |r| r.get(0))?;
        header.open(&body).map_err(|_| StoreError::Damaged)
    }

    /// Moves what it can from the WAL into the database without waiting for anybody.
    pub fn checkpoint(&mut self) -> Result<(), StoreError> {
        checkpoint(&self.db)
    }

    /// The end in order: everything is in the database file, the WAL is empty. (Only here: a WAL that is cut short while
    /// running has to grow again, which costs each commit.)
    pub fn settle(&mut self) -> Result<(), StoreError> {
        if self.distrusted {
            self.reopen()?;
        }
        self.db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()))?;
        Ok(())
    }

    /// Gives up to `pages` free pages back to the file system. True while there is more to give back.
    pub fn shrink(&mut self, pages: u32) -> Result<bool, StoreError> {
        let free: i64 = self.db.query_row("PRAGMA freelist_count", [], |r| r.get(0))?;
        if free <= FREE_PAGES_KEPT {
            return Ok(false);
        }
        let mut vacuum = self.db.prepare(&format!("PRAGMA incremental_vacuum({pages})"))?;
        let mut rows = vacuum.query([])?;
        while rows.next()?.is_some() {}
        Ok(true)
    }
}

/// Pages the file keeps for the next messages: 4 MiB.
const FREE_PAGES_KEPT: i64 = 1_024;

/// What one commit writes.
pub struct Commit<'a> {
    pub segments: &'a [(Segment, Vec<u8>)],
    pub changes: &'a Changes,
    pub flush: Option<&'a Flush>,
    pub deletes: &'a [Delete],
    /// Totals of the streams that `deletes` touch, as they are after this commit.
    pub totals: &'a [StreamRow],
}

/// The cursors that moved since the last flush.
#[derive(Debug)]
pub struct Flush {
    pub cursors: Vec<(i64, CursorRow)>,
    pub sequence: u64,
}

#[derive(Debug, Clone, Copy)]
pub struct Delete {
    pub stream: u16,
    /// Segments that begin at or after this sequence …
    pub from: u64,
    /// … and at or before this one.
    pub through: u64,
}

fn create(db: &mut Connection) -> Result<(), StoreError> {
    let tx = db.transaction()?;
    tx.execute_batch(SCHEMA)?;
    let mut id = [0; 4];
    // Names this database, so that a sequence of a set-aside one is never taken for one of its successor.
    getrandom::fill(&mut id).map_err(|_| StoreError::Damaged)?;
    let id = id.map(|b| format!("{b:02x}")).concat();
    tx.execute("INSERT INTO meta VALUES('log_id', ?1)", [id])?;
    tx.pragma_update(None, "user_version", SCHEMA_VERSION)?;
    tx.commit()?;
    Ok(())
}

/// Spills a large blob into the WAL and rolls back: the file has its size, the next commit writes over it in place.
fn presize_wal(db: &mut Connection, bytes: u64) -> Result<(), StoreError> {
    checkpoint(db)?;
    let tx = db.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    tx.execute("INSERT INTO meta VALUES('presize', zeroblob(?1))", [bytes as i64])?;
    tx.rollback()?;
    Ok(())
}

fn checkpoint(db: &Connection) -> Result<(), StoreError> {
    db.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))?;
    Ok(())
}

macro_rules! loss_params {
    ($row:expr) => {
        params![
            $row.consumer,
            $row.source,
            $row.reason,
            $row.first as i64,
            $row.last as i64,
            $row.count as i64,
            $row.bytes as i64,
            $row.oldest,
            $row.newest,
            $row.at
        ]
    };
}

/// The column `received`: bit 0 is what it says; above it the consumer of a shared subscription (ids begin at 1), 0: none.
fn outbound_state(row: &OutboundRow) -> i64 {
    i64::from(row.received) | row.shared.unwrap_or(0) << 1
}

fn apply(tx: &rusqlite::Transaction<'_>, changes: &Changes) -> Result<(), StoreError> {
    for (id, name) in &changes.streams {
        tx.prepare_cached("INSERT OR IGNORE INTO stream VALUES(?1,?2,0,0,0)")?
            .execute(params![id, name])?;
    }
    if let Some(at) = changes.proof {
        tx.prepare_cached("INSERT OR REPLACE INTO meta VALUES('proof', ?1)")?
            .execute([at])?;
    }
    for (topic, record) in &changes.retained {
        match record {
            Some(record) => tx
                .prepare_cached("INSERT OR REPLACE INTO retained VALUES(?1,?2)")?
                .execute(params![topic, record])?,
            None => tx
                .prepare_cached("DELETE FROM retained WHERE topic=?1")?
                .execute([topic])?,
        };
    }
    for client_id in &changes.ended {
        for sql in [
            "DELETE FROM session WHERE client_id=?1",
            "DELETE FROM inbound WHERE client_id=?1",
            "DELETE FROM outbound WHERE client_id=?1",
        ] {
            tx.prepare_cached(sql)?.execute([client_id])?;
        }
    }
    for (client_id, row) in &changes.sessions {
        match row {
            Some(row) => {
                let data = serde_json::to_string(row).expect("a session row is plain data");
                let mut insert = tx.prepare_cached("INSERT OR REPLACE INTO session VALUES(?1,?2)")?;
                insert.execute(params![client_id, data])?;
            }
            None => drop(
                tx.prepare_cached("DELETE FROM session WHERE client_id=?1")?
                    .execute([client_id])?,
            ),
        }
    }
    for (client_id, row) in &changes.wills {
        match row {
            Some(row) => tx
                .prepare_cached("INSERT OR REPLACE INTO will VALUES(?1,?2,?3)")?
                .execute(params![client_id, row.record, row.delay_s])?,
            None => tx
                .prepare_cached("DELETE FROM will WHERE client_id=?1")?
                .execute([client_id])?,
        };
    }
    for ((client_id, packet_id), present) in &changes.inbound {
        let sql = if *present {
            "INSERT OR IGNORE INTO inbound VALUES(?1,?2)"
        } else {
            "DELETE FROM inbound WHERE client_id=?1 AND packet_id=?2"
        };
        tx.prepare_cached(sql)?.execute(params![client_id, packet_id])?;
    }
    for ((client_id, packet_id), row) in &changes.outbound {
        match row {
            Some(o) => tx
                .prepare_cached("INSERT OR REPLACE INTO outbound VALUES(?1,?2,?3,?4,?5)")?
                .execute(params![
                    client_id,
                    packet_id,
                    o.stream,
                    o.sequence as i64,
                    outbound_state(o)
                ])?,
            None => tx
                .prepare_cached("DELETE FROM outbound WHERE client_id=?1 AND packet_id=?2")?
                .execute(params![client_id, packet_id])?,
        };
    }
    for (id, row) in &changes.consumers {
        match row {
            Some(row) => {
                let filters = serde_json::to_string(&row.filters).expect("filters are plain data");
                tx.prepare_cached("INSERT OR REPLACE INTO consumer VALUES(?1,?2,?3,?4)")?
                    .execute(params![id, row.name, filters, row.until.map(|u| u as i64)])?;
            }
            None => {
                tx.prepare_cached("DELETE FROM consumer WHERE id=?1")?.execute([id])?;
                tx.prepare_cached("DELETE FROM cursor WHERE consumer=?1")?
                    .execute([id])?;
            }
        }
    }
    for ((consumer, stream), sequence) in &changes.cursors {
        tx.prepare_cached(
            "INSERT INTO cursor VALUES(?1,?2,?3,?3,0,0) ON CONFLICT DO UPDATE SET sequence=max(sequence, excluded.sequence)",
        )?
        .execute(params![consumer, stream, *sequence as i64])?;
    }
    for row in &changes.losses {
        // An entry that was not sent yet grows; one that was sent is closed.
        let grown = tx
            .prepare_cached(
                "UPDATE loss SET first=min(first,?4), last=max(last,?5), count=count+?6, bytes=bytes+?7, oldest=min(oldest,?8),
                 newest=max(newest,?9), at=?10 WHERE sent=0 AND consumer=?1 AND source=?2 AND reason=?3",
            )?
            .execute(loss_params!(row))?;
        if grown > 0 {
            continue;
        }
        tx.prepare_cached(
            "INSERT INTO loss(consumer,source,reason,first,last,count,bytes,oldest,newest,at,sent) VALUES(?1,?2,?3,?4,?5,?6,?7,?8,?9,?10,0)",
        )?
        .execute(loss_params!(row))?;
    }
    for (id, count) in &changes.losses_sent {
        // One that grew while it was on its way is sent again, with its new count.
        tx.prepare_cached("UPDATE loss SET sent=1 WHERE id=?1 AND count=?2")?
            .execute([*id, *count as i64])?;
    }
    if !changes.losses_sent.is_empty() {
        tx.prepare_cached("DELETE FROM loss WHERE sent=1 AND id <= (SELECT max(id) FROM loss) - ?1")?
            .execute([super::DEAD_ROWS_MAX as i64])?;
    }
    for DeadRow {
        consumer,
        reason,
        at,
        record,
    } in &changes.dead
    {
        tx.prepare_cached("INSERT INTO dead(consumer,reason,at,record) VALUES(?1,?2,?3,?4)")?
            .execute(params![consumer, reason, at, record])?;
    }
    for ((module, key), value) in &changes.module_state {
        match value {
            Some(value) => tx
                .prepare_cached("INSERT OR REPLACE INTO module_state VALUES(?1,?2,?3)")?
                .execute(params![module, key, value])?,
            None => tx
                .prepare_cached("DELETE FROM module_state WHERE module=?1 AND key=?2")?
                .execute(params![module, key])?,
        };
    }
    for (table, keep) in &changes.trims {
        tx.prepare_cached(&format!(
            "DELETE FROM {table} WHERE id <= (SELECT max(id) FROM {table}) - ?1"
        ))?
        .execute([*keep as i64])?;
    }
    Ok(())
}

fn header(r: &rusqlite::Row<'_>) -> rusqlite::Result<Option<Header>> {
    let id: i64 = r.get(0)?;
    let number = |at: usize| -> rusqlite::Result<Option<u64>> { Ok(u64::try_from(r.get::<_, i64>(at)?).ok()) };
    let summary = Summary::from_bytes(r.get_ref(6)?.as_blob().unwrap_or(&[1])).ok();
    let (Some(last), Some(bytes), Some(summary)) = (number(1)?, number(3)?, summary) else {
        return Ok(None);
    };
    Ok(Some(Header {
        stream: u16::try_from(id >> SEQUENCE_BITS).unwrap_or(u16::MAX),
        first: (id & ((1 << SEQUENCE_BITS) - 1)) as u64,
        last,
        count: r.get(2)?,
        bytes,
        oldest: r.get(4)?,
        newest: r.get(5)?,
        summary,
    }))
}

fn recover(db: &Connection) -> Result<Recovered, StoreError> {
    let mut out = Recovered {
        log_id: db.query_row("SELECT value FROM meta WHERE key='log_id'", [], |r| r.get(0))?,
        flushed: db
            .query_row("SELECT value FROM meta WHERE key='flushed'", [], |r| r.get::<_, i64>(0))
            .optional()?
            .map_or(0, |v| v as u64),
        ..Recovered::default()
    };
    out.sequence = out.flushed;
    let mut streams = db.prepare("SELECT id,name,messages,bytes,as_of FROM stream")?;
    let rows = streams.query_map([], |r| {
        Ok((
            r.get::<_, u16>(0)?,
            r.get::<_, String>(1)?,
            r.get::<_, i64>(2)?,
            r.get::<_, i64>(3)?,
            r.get::<_, i64>(4)?,
        ))
    })?;
    for row in rows {
        let (id, name, messages, bytes, as_of) = row?;
        let (_, end) = stream_range(id);
        // The totals are right as of a sequence; since then segments were only added.
        let (more, more_bytes): (i64, i64) = db.query_row(
            "SELECT coalesce(sum(count),0), coalesce(sum(bytes),0) FROM segment WHERE id > ?1 AND id < ?2",
            [segment_id(id, as_of as u64), end],
            |r| Ok((r.get(0)?, r.get(1)?)),
        )?;
        let last: i64 = db
            .query_row(
                "SELECT last FROM segment WHERE id >= ?1 AND id < ?2 ORDER BY id DESC LIMIT 1",
                [segment_id(id, 0), end],
                |r| r.get(0),
            )
            .optional()?
            .unwrap_or(0);
        out.sequence = out.sequence.max(last as u64).max(as_of as u64);
        out.streams.push(StreamRow {
            id,
            name,
            messages: (messages + more) as u64,
            bytes: (bytes + more_bytes) as u64,
            last: last as u64,
        });
    }
    let mut cursors: HashMap<i64, Vec<CursorRow>> = HashMap::new();
    let mut select = db.prepare("SELECT consumer,stream,sequence,matched,messages,bytes FROM cursor")?;
    let rows = select.query_map([], |r| {
        Ok((
            r.get::<_, i64>(0)?,
            CursorRow {
                stream: r.get(1)?,
                sequence: r.get::<_, i64>(2)? as u64,
                matched: r.get::<_, i64>(3)? as u64,
                messages: r.get::<_, i64>(4)? as u64,
                bytes: r.get::<_, i64>(5)? as u64,
            },
        ))
    })?;
    for row in rows {
        let (consumer, cursor) = row?;
        out.sequence = out.sequence.max(cursor.sequence);
        cursors.entry(consumer).or_default().push(cursor);
    }
    let mut select = db.prepare("SELECT id,name,filters,until FROM consumer")?;
    let rows = select.query_map([], |r| {
        Ok((
            r.get::<_, i64>(0)?,
            r.get::<_, String>(1)?,
            r.get::<_, String>(2)?,
            r.get::<_, Option<i64>>(3)?,
        ))
    })?;
    for row in rows {
        let (id, name, filters, until) = row?;
        let filters = serde_json::from_str(&filters).map_err(|_| StoreError::Damaged)?;
        let row = ConsumerRow {
            name,
            filters,
            until: until.map(|u| u as u64),
        };
        out.consumers.push((id, row, cursors.remove(&id).unwrap_or_default()));
    }
    out.retained = db
        .prepare("SELECT record FROM retained")?
        .query_map([], |r| r.get(0))?
        .collect::<Result<_, _>>()?;
    let mut select = db.prepare("SELECT data FROM session")?;
    let rows = select.query_map([], |r| r.get::<_, String>(0))?;
    for row in rows {
        out.sessions
            .push(serde_json::from_str(&row?).map_err(|_| StoreError::Damaged)?);
    }
    out.wills = db
        .prepare("SELECT client_id,record,delay_s FROM will")?
        .query_map([], |r| {
            Ok(WillRow {
                client_id: r.get(0)?,
                record: r.get(1)?,
                delay_s: r.get(2)?,
            })
        })?
        .collect::<Result<_, _>>()?;
    out.inbound = db
        .prepare("SELECT client_id,packet_id FROM inbound")?
        .query_map([], |r| Ok((r.get(0)?, r.get(1)?)))?
        .collect::<Result<_, _>>()?;
    out.outbound = db
        .prepare("SELECT client_id,packet_id,stream,sequence,received FROM outbound ORDER BY sequence")?
        .query_map([], |r| {
            let state: i64 = r.get(4)?;
            Ok(OutboundRow {
                client_id: r.get(0)?,
                packet_id: r.get(1)?,
                stream: r.get(2)?,
                sequence: r.get::<_, i64>(3)? as u64,
                received: state & 1 != 0,
                shared: Some(state >> 1).filter(|id| *id != 0),
            })
        })?
        .collect::<Result<_, _>>()?;
    out.losses_unsent = losses(db, "WHERE sent=0 ORDER BY id LIMIT 10000")?;
    out.dead = db.query_row("SELECT count(*) FROM dead", [], |r| r.get::<_, i64>(0))? as u64;
    Ok(out)
}

fn losses(db: &Connection, tail: &str) -> Result<Vec<LossRow>, StoreError> {
    let mut select = db.prepare_cached(&format!(
        "SELECT id,consumer,source,reason,first,last,count,bytes,oldest,newest,at FROM loss {tail}"
    ))?;
    let rows = select.query_map([], |r| {
        Ok(LossRow {
            id: r.get(0)?,
            consumer: r.get(1)?,
            source: r.get(2)?,
            reason: r.get(3)?,
            first: r.get::<_, i64>(4)? as u64,
            last: r.get::<_, i64>(5)? as u64,
            count: r.get::<_, i64>(6)? as u64,
            bytes: r.get::<_, i64>(7)? as u64,
            oldest: r.get(8)?,
            newest: r.get(9)?,
            at: r.get(10)?,
        })
    })?;
    Ok(rows.collect::<Result<_, _>>()?)
}

/// A connection that reads beside the writer. It holds no transaction between two calls.
pub struct ReadStore {
    db: Connection,
}

/// What a read found: a segment, or how far there is nothing for these filters.
pub enum Found {
    Segment(Segment),
    /// The stream has no segment after the given sequence.
    End,
    /// A segment could not be read; the sequences it covers are lost.
    Damaged(Header),
    /// Nothing for these filters up to this sequence; there may be more behind it.
    Skipped(u64),
}

/// Segments whose summary rules them out are passed over up to this many a call, so that one call stays short.
const SKIP_MAX: usize = 4_096;

impl ReadStore {
    pub fn open(path: &Path) -> Result<ReadStore, StoreError> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        Ok(ReadStore {
            db: connect(path, flags)?.0,
        })
    }

    /// Messages and bytes of a stream, counted.
    #[cfg(test)]
    pub fn counted(&self, stream: u16) -> (u64, u64) {
        let (from, to) = stream_range(stream);
        let sql = "SELECT coalesce(sum(count),0), coalesce(sum(bytes),0) FROM segment WHERE id >= ?1 AND id < ?2";
        let sums = |r: &rusqlite::Row<'_>| Ok((r.get::<_, i64>(0)? as u64, r.get::<_, i64>(1)? as u64));
        self.db.query_row(sql, [from, to], sums).expect("readable")
    }

    /// What SQLite itself finds wrong.
    #[cfg(test)]
    pub fn faults(&self) -> String {
        self.db
            .query_row("PRAGMA integrity_check", [], |r| r.get(0))
            .unwrap_or_else(|e| e.to_string())
    }

    /// Calls back at each instruction of SQLite's machine, so that a test can do something in the middle of a read.
    #[cfg(test)]
    pub fn at_each_instruction(&mut self, mut call: impl FnMut() + Send + 'static) {
        let handler = move || {
            call();
            false
        };
        self.db.progress_handler(1, Some(handler)).expect("accepted");
    }

    /// The first segment of a stream that has something after `after` and may have something for one of the filters.
    pub fn next(&self, stream: u16, after: u64, filters: &[TopicFilter]) -> Result<Found, StoreError> {
        let (start, end) = stream_range(stream);
        // The segment that `after` lies in may have more behind it; it is the last one that begins at or before it. In one
        // statement, so of one state of the database: `after` may lie in a segment that is being committed just now,
        // and one asked for its place before the commit and for what follows after it would miss that segment.
        let mut select = self.db.prepare_cached(
            "SELECT id,last,count,bytes,oldest,newest,summary,body FROM segment
             WHERE id >= ifnull((SELECT max(id) FROM segment WHERE id BETWEEN ?1 AND ?2), ?1) AND id < ?3 AND last > ?4
             ORDER BY id",
        )?;
        let mut rows = select.query([start, segment_id(stream, after), end, after as i64])?;
        let mut skipped = None;
        let mut looked = 0;
        while let Some(row) = rows.next()? {
            let header = header(row)?.ok_or(StoreError::Damaged)?;
            if !filters.is_empty() && !filters.iter().any(|f| header.summary.may_match(f)) {
                skipped = Some(header.last);
                looked += 1;
                if looked == SKIP_MAX {
                    break;
                }
                continue;
            }
            let opened = match row.get_ref(7)?.as_blob() {
                Ok(body) => header.clone().open(body).ok(),
                Err(_) => None,
            };
            return Ok(opened.map_or(Found::Damaged(header), Found::Segment));
        }
        Ok(skipped.map_or(Found::End, Found::Skipped))
    }

    pub fn module_state(&self, module: &str) -> Result<Vec<(String, Vec<u8>)>, StoreError> {
        let mut select = self
            .db
            .prepare_cached("SELECT key,value FROM module_state WHERE module=?1")?;
        let rows = select.query_map([module], |r| Ok((r.get(0)?, r.get(1)?)))?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    /// Losses that were not sent yet, oldest first: of one uplink, or with "" of all who are none.
    pub fn losses_unsent(&self, consumer: &str) -> Result<Vec<LossRow>, StoreError> {
        let all = losses(&self.db, "WHERE sent=0 ORDER BY id LIMIT 10000")?;
        let is_asked = |l: &LossRow| match consumer {
            "" => !l.consumer.starts_with("uplink:"),
            name => l.consumer == name,
        };
        Ok(all.into_iter().filter(is_asked).collect())
    }

    pub fn losses(&self) -> Result<Vec<LossRow>, StoreError> {
        losses(&self.db, "ORDER BY id DESC LIMIT 1000")
    }

    pub fn dead(&self) -> Result<Vec<DeadRow>, StoreError> {
        let mut select = self
            .db
            .prepare_cached("SELECT consumer,reason,at,record FROM dead ORDER BY id DESC LIMIT 1000")?;
        let rows = select.query_map([], |r| {
            Ok(DeadRow {
                consumer: r.get(0)?,
                reason: r.get(1)?,
                at: r.get(2)?,
                record: r.get(3)?,
            })
        })?;
        Ok(rows.collect::<Result<_, _>>()?)
    }

    pub fn checkpoint(&self) -> Result<(), StoreError> {
        checkpoint(&self.db)
    }
}
