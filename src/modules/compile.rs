//! From a dropped .wasm to machine code that the daemon maps.
//!
//! The compiler takes tens to hundreds of megabytes for a moment and reads what strangers wrote, so it runs in a child
//! process of the same binary (`tidegate module compile IN OUT`: [`child_main`]) under limits of its own. The daemon keeps the
//! results in a [`Cache`] that nobody else may write: a file there is run as machine code. Nothing that a user drops is
//! ever loaded as such.
//!
//! Where there is no compiler (32-bit ARM) the cache is filled from what root installed: [`super::precompiled`].

#[cfg(not(target_arch = "arm"))]
use std::borrow::Cow;
use std::ffi::OsString;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use sha2::{Digest, Sha256};

#[cfg(not(target_arch = "arm"))]
use super::host;
use super::host::{ContractError, Engine, HostError, Program};
use super::precompiled::{Precompiled, PrecompiledError};

/// A dropped file above this is refused unread. JavaScript and Python guests come with their interpreter: 12 to 18 MB.
pub const WASM_BYTES_MAX: u64 = 64 << 20;
/// What the child may use. The compiler's own need was seen at 310 MB for a Python guest of 18 MB.
const CHILD_ADDRESS_BYTES_MAX: u64 = 2 << 30;
/// That guest took 13 s of processor time on a PC; a small board is ten to twenty times slower.
const CHILD_PROCESSOR_S_MAX: u32 = 600;
#[cfg(not(target_arch = "arm"))]
const CHILD_WALL_S_MAX: u32 = 3_600;
#[cfg(not(target_arch = "arm"))]
const CHILD_NICE: i32 = 10;
/// What the child says about a file is cut here.
const REASON_BYTES_MAX: u64 = 4_096;
/// The cache keeps the newest so many files and bytes.
const CACHE_FILES_MAX: usize = 64;
const CACHE_BYTES_MAX: u64 = 512 << 20;

/// Why a file does not become a module. The text completes "modules.d/NAME.wasm: …".
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    #[error("it is not WebAssembly (it begins with {begin}); put a .wasm component or core module here")]
    NotWasm { begin: String },
    #[error("it is empty; copy it again, best under another name and then renamed to .wasm")]
    Empty,
    #[error("it is WebAssembly of an unknown version (bytes 4 to 7 are {0:02x?}); build it with a current toolchain")]
    UnknownVersion([u8; 4]),
    #[error(
        "it is cut short, damaged or not valid ({0}); copy it again, best under another name and then renamed to .wasm"
    )]
    Damaged(String),
    #[error("it is larger than {} MiB, the most that is taken", WASM_BYTES_MAX >> 20)]
    TooLarge,
    #[error(
        "it is a core module that does not fit the contract ({0}); build it with modules/sdk, or make it a component"
    )]
    Core(String),
    #[error(transparent)]
    Contract(ContractError),
    #[error("{0}")]
    Child(String),
    #[error("compiling it took more than {CHILD_PROCESSOR_S_MAX} s of processor time; make the module smaller")]
    Processor,
    #[error("compiling it needed more than {} MiB of memory; make the module smaller", CHILD_ADDRESS_BYTES_MAX >> 20)]
    Memory,
    #[error(
        "compiling it was ended from outside (signal 9), most likely because the machine ran out of memory; drop it again to try once more"
    )]
    Killed,
    #[error("compiling it was ended by signal {0}; drop it again to try once more")]
    Signal(i32),
    #[error("{what} {path:?}: {cause}")]
    File {
        what: &'static str,
        path: PathBuf,
        cause: std::io::Error,
    },
    #[error(transparent)]
    Precompiled(#[from] PrecompiledError),
    #[error(transparent)]
    Host(#[from] HostError),
}

fn file_error(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> CompileError {
    let path = path.to_owned();
    move |cause| CompileError::File { what, path, cause }
}

/// A component out of what was dropped: one already, or the core module that a linker made, with the contract embedded.
#[cfg(not(target_arch = "arm"))]
pub fn component(wasm: &[u8]) -> Result<Cow<'_, [u8]>, CompileError> {
    let Some((magic, rest)) = wasm.split_first_chunk::<4>() else {
        return Err(if wasm.is_empty() {
            CompileError::Empty
        } else {
            not_wasm(wasm)
        });
    };
    if magic != b"\0asm" {
        return Err(not_wasm(wasm));
    }
    match rest.first_chunk::<4>() {
        None => Err(CompileError::Damaged("it ends after 4 bytes".to_owned())),
        // Version 13 of layer 1: a component.
        Some([0x0d, 0, 1, 0]) => Ok(Cow::Borrowed(wasm)),
        Some([1, 0, 0, 0]) => {
            host::validate_core(wasm).map_err(CompileError::Damaged)?;
            let core = |e| CompileError::Core(format!("{e:#}"));
            let mut encoder = wit_component::ComponentEncoder::default()
                .validate(true)
                .module(wasm)
                .map_err(core)?;
            Ok(Cow::Owned(encoder.encode().map_err(core)?))
        }
        Some(version) => Err(CompileError::UnknownVersion(*version)),
    }
}

fn not_wasm(bytes: &[u8]) -> CompileError {
    let begin = &bytes[..bytes.len().min(8)];
    CompileError::NotWasm {
        begin: format!("\"{}\"", begin.escape_ascii()),
    }
}

/// Machine code out of what was dropped.
#[cfg(not(target_arch = "arm"))]
pub fn compile(wasm: &[u8]) -> Result<Vec<u8>, CompileError> {
    host::compile(&component(wasm)?).map_err(contract_error)
}

#[cfg(target_arch = "arm")]
pub fn child_main(_input: &Path, _output: &Path) -> ExitCode {
    eprintln!("{}", super::precompiled::NO_COMPILER);
    ExitCode::FAILURE
}

/// Bytecode for 32-bit machines out of what would be dropped there.
#[cfg(not(target_arch = "arm"))]
pub(super) fn compile_for_pulley32(wasm: &[u8]) -> Result<Vec<u8>, CompileError> {
    let component = component(wasm)?;
    // Whether it fits the contract can be asked only of a program for this machine.
    host::compile(&component)
        .and_then(|_| host::compile_for_pulley32(&component))
        .map_err(contract_error)
}

#[cfg(not(target_arch = "arm"))]
fn contract_error(error: ContractError) -> CompileError {
    match error {
        ContractError::Invalid(why) => CompileError::Damaged(why),
        other => CompileError::Contract(other),
    }
}

/// `tidegate module compile IN OUT`: one sentence on stderr and exit code 1 where it cannot be done.
///
/// It ends when its standard input does, so that it never outlives the daemon that started it.
#[cfg(not(target_arch = "arm"))]
pub fn child_main(input: &Path, output: &Path) -> ExitCode {
    match child(input, output) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(not(target_arch = "arm"))]
pub(super) fn child(input: &Path, output: &Path) -> Result<(), CompileError> {
    limit_this_process();
    let end_with_parent = || {
        // Whatever it reads: the daemon writes nothing and closes it only by ending.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(1);
    };
    std::thread::Builder::new()
        .stack_size(64 << 10)
        .spawn(end_with_parent)
        .map_err(file_error("cannot start a thread for", input))?;
    let wasm = read_bounded(input)?;
    let code = compile(&wasm)?;
    let aside = output.with_extension("part");
    write_durably(&aside, &code)
        .and_then(|()| fs::rename(&aside, output))
        .map_err(file_error("cannot write", output))
}

/// A file that a power cut left half empty must not be mapped as code later; its checksum says so too.
fn write_durably(path: &Path, code: &[u8]) -> std::io::Result<()> {
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(code)?;
    file.sync_all()
}

#[cfg(not(target_arch = "arm"))]
fn limit_this_process() {
    // Where memory runs out all the same, this process goes and not the daemon. Not everywhere allowed, nowhere needed.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    let limit = |resource, value: u64| {
        // The hard limit of processor time ends a process by SIGKILL: it comes a little later than the telling signal.
        let limit = libc::rlimit {
            rlim_cur: value,
            rlim_max: value.saturating_add(10),
        };
        // SAFETY: the pointer is to a rlimit that lives through the call, which only reads it. A limit that cannot be set
        // (a lower one is there already) leaves the process as limited as it was.
        unsafe { libc::setrlimit(resource, &raw const limit) };
    };
    if cfg!(target_pointer_width = "64") {
        limit(libc::RLIMIT_AS, CHILD_ADDRESS_BYTES_MAX);
    }
    limit(libc::RLIMIT_CPU, u64::from(CHILD_PROCESSOR_S_MAX));
    limit(libc::RLIMIT_CORE, 0);
    // SAFETY: neither call takes a pointer; both act on this process alone.
    unsafe {
        libc::setpriority(libc::PRIO_PROCESS, 0, CHILD_NICE);
        libc::alarm(CHILD_WALL_S_MAX);
    }
}

/// The whole of a dropped file, where it is not too large.
pub fn read_bounded(path: &Path) -> Result<Vec<u8>, CompileError> {
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(file_error("cannot open", path))?;
    file.take(WASM_BYTES_MAX + 1)
        .read_to_end(&mut bytes)
        .map_err(file_error("cannot read", path))?;
    if bytes.len() as u64 > WASM_BYTES_MAX {
        return Err(CompileError::TooLarge);
    }
    Ok(bytes)
}

/// Machine code by what it was made from and for. Its folder belongs to the daemon alone.
pub struct Cache {
    dir: PathBuf,
    engine: Engine,
    maker: Maker,
    runs: AtomicU64,
}

/// Where a program comes from that is not in the cache.
#[derive(Debug, Clone)]
pub enum Maker {
    Compiler(Compiler),
    Precompiled(Precompiled),
}

impl Maker {
    /// Where there is a compiler, nothing precompiled is ever looked for.
    pub fn here() -> Maker {
        if cfg!(target_arch = "arm") {
            Maker::Precompiled(Precompiled::installed())
        } else {
            Maker::Compiler(Compiler::this_binary())
        }
    }
}

/// The command that compiles; IN and OUT are appended.
#[derive(Debug, Clone)]
pub struct Compiler {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
}

impl Compiler {
    /// This binary, as it runs: also where an upgrade has replaced the file.
    pub fn this_binary() -> Compiler {
        Compiler {
            program: "/proc/self/exe".into(),
            arguments: vec!["module".into(), "compile".into()],
        }
    }
}

/// Where a program came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    Cache,
    Compiler,
    Precompiled,
}

impl Cache {
    /// Makes the folder where it is missing, and clears it of what cannot be used (again).
    pub fn open(dir: &Path, engine: &Engine, maker: Maker) -> Result<Cache, CompileError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(file_error("cannot create", dir))?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700)).map_err(file_error("cannot protect", dir))?;
        let cache = Cache {
            dir: dir.to_owned(),
            engine: engine.clone(),
            maker,
            runs: AtomicU64::new(0),
        };
        let current = cache.compatibility();
        for entry in cache.files() {
            // Names are SOURCE-COMPATIBILITY-CONTENT.cwasm; everything else was left half done.
            let usable = entry.name.ends_with(".cwasm") && entry.name.split('-').nth(1) == Some(&current);
            if !usable {
                let _ = fs::remove_file(&entry.path);
            }
        }
        cache.prune();
        Ok(cache)
    }

    /// The program of what was dropped. Blocks, up to minutes: it belongs on a thread of its own.
    pub fn load(&self, wasm: &[u8]) -> Result<(Program, Origin), CompileError> {
        let source = hex(&Sha256::digest(wasm));
        let key = format!("{source}-{}", self.compatibility());
        if let Some(program) = self.find(&key) {
            return Ok((program, Origin::Cache));
        }
        let (path, origin) = match &self.maker {
            Maker::Compiler(compiler) => (self.compile(compiler, &key, wasm)?, Origin::Compiler),
            Maker::Precompiled(_) if !wasm.starts_with(b"\0asm") => return Err(not_wasm(wasm)),
            Maker::Precompiled(folders) => (self.keep(&key, &folders.find(&source)?)?, Origin::Precompiled),
        };
        // SAFETY: the child has just made it from this binary's own `host::compile`, or root has installed it as it has
        // this binary; it lies in a folder that only this user may enter; files there are only ever replaced by rename.
        let program = unsafe { Program::load(&self.engine, &path) }?;
        self.prune();
        Ok((program, origin))
    }

    fn compatibility(&self) -> String {
        format!("{:016x}", self.engine.compatibility())
    }

    fn find(&self, key: &str) -> Option<Program> {
        for entry in self.files() {
            let Some(sum) = entry.name.strip_prefix(key).and_then(|rest| rest.strip_prefix('-')) else {
                continue;
            };
            // Power cuts and failing flash change files that nobody wrote to: only what is as it was is run.
            let intact = fs::read(&entry.path).is_ok_and(|code| sum.strip_suffix(".cwasm") == Some(&checksum(&code)));
            if intact {
                // SAFETY: the content is what `compile` below wrote under this name, in a folder of this user alone.
                match unsafe { Program::load(&self.engine, &entry.path) } {
                    Ok(program) => {
                        if let Ok(file) = fs::File::open(&entry.path) {
                            let _ = file.set_modified(crate::clock::file_time());
                        }
                        return Some(program);
                    }
                    Err(error) => tracing::debug!(%error, file = entry.name, "cached module refused"),
                }
            }
            let _ = fs::remove_file(&entry.path);
        }
        None
    }

    fn run(&self) -> String {
        format!("{}.{}", std::process::id(), self.runs.fetch_add(1, Ordering::Relaxed))
    }

    /// A copy of what was installed: a file that is mapped must not change, whatever root does with the original.
    fn keep(&self, key: &str, code: &[u8]) -> Result<PathBuf, CompileError> {
        let part = Removed(self.dir.join(format!("{}.part", self.run())));
        write_durably(&part.0, code).map_err(file_error("cannot write", &part.0))?;
        let path = self.dir.join(format!("{key}-{}.cwasm", checksum(code)));
        fs::rename(&part.0, &path).map_err(file_error("cannot write", &path))?;
        Ok(path)
    }

    fn compile(&self, compiler: &Compiler, key: &str, wasm: &[u8]) -> Result<PathBuf, CompileError> {
        let run = self.run();
        let input = Removed(self.dir.join(format!("{run}.in")));
        let output = Removed(self.dir.join(format!("{run}.out")));
        let _part = Removed(self.dir.join(format!("{run}.part")));
        let write = || {
            let mut file = fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&input.0)?;
            file.write_all(wasm)
        };
        write().map_err(file_error("cannot write", &input.0))?;
        let mut child = Command::new(&compiler.program)
            .args(&compiler.arguments)
            .arg(&input.0)
            .arg(&output.0)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(file_error("cannot start the compiler", &compiler.program))?;
        // Held open until the child has ended: it takes the end of its input for the daemon's.
        let input_of_child = child.stdin.take();
        let mut reason = Vec::new();
        if let Some(stderr) = child.stderr.take() {
            let mut bounded = stderr.take(REASON_BYTES_MAX);
            let _ = bounded.read_to_end(&mut reason);
            let _ = std::io::copy(&mut bounded.into_inner(), &mut std::io::sink());
        }
        let status = child.wait().map_err(file_error("cannot wait for", &compiler.program))?;
        drop(input_of_child);
        if !status.success() {
            return Err(child_error(status, &String::from_utf8_lossy(&reason)));
        }
        let code = fs::read(&output.0).map_err(file_error("cannot read", &output.0))?;
        let path = self.dir.join(format!("{key}-{}.cwasm", checksum(&code)));
        fs::rename(&output.0, &path).map_err(file_error("cannot write", &path))?;
        Ok(path)
    }

    /// Removes the oldest beyond the bounds. Programs that run keep their (unnamed) file.
    fn prune(&self) {
        let mut files = self.files();
        files.sort_by_key(|entry| std::cmp::Reverse(entry.modified));
        let mut bytes = 0;
        for (n, entry) in files.iter().enumerate() {
            bytes += entry.bytes;
            if n >= CACHE_FILES_MAX || bytes > CACHE_BYTES_MAX {
                let _ = fs::remove_file(&entry.path);
            }
        }
    }

    fn files(&self) -> Vec<CacheFile> {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| {
                let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
                let name = entry.file_name().into_string().ok()?;
                let modified = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                Some(CacheFile {
                    path: entry.path(),
                    name,
                    bytes: metadata.len(),
                    modified,
                })
            })
            .collect()
    }
}

struct CacheFile {
    path: PathBuf,
    name: String,
    bytes: u64,
    modified: SystemTime,
}

/// A file that goes with its owner, where it is (still) there.
struct Removed(PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn child_error(status: ExitStatus, stderr: &str) -> CompileError {
    match status.signal() {
        Some(libc::SIGXCPU | libc::SIGALRM) => CompileError::Processor,
        Some(libc::SIGKILL) => CompileError::Killed,
        // What Rust does where memory cannot be had.
        Some(libc::SIGABRT) => CompileError::Memory,
        Some(signal) => CompileError::Signal(signal),
        None => match stderr.trim() {
            "" => CompileError::Child(
                "the compiler ended without a word; drop the file again to try once more".to_owned(),
            ),
            text => CompileError::Child(text.lines().last().unwrap_or(text).to_owned()),
        },
    }
}

pub(super) fn checksum(code: &[u8]) -> String {
    hex(&Sha256::digest(code)[..16])
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        })
}
