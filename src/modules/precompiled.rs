//! Modules for a machine that cannot compile them: 32-bit ARM, for which Cranelift has no backend.
//!
//! A module is dropped there as everywhere, as WebAssembly. What is run is bytecode for wasmtime's interpreter, which
//! `tidegate module precompile` ([`write`]) made of that very file on a 64-bit machine and root installed in one of the
//! [`FOLDERS`]; the two are matched by the file's hash. Wasmtime trusts such bytecode as it does machine code, so
//! [`Precompiled`] takes it only from where nobody but root could have put it: root can replace the binary as well.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::compile;

/// Beside the binary's folder, as the package installs; and for what an administrator adds.
const FOLDERS: [&str; 2] = ["../lib/tidegate/precompiled", "/usr/local/lib/tidegate/precompiled"];
/// Files are STEM-SOURCE-CONTENT.pulley32: the module's name, the hash of its WebAssembly, and the bytecode's.
const SUFFIX: &str = ".pulley32";
/// Bytecode is about as large as machine code: a Python guest of 18 MB has 60 MB.
const CODE_BYTES_MAX: u64 = 256 << 20;
/// Names looked at in one folder; more are not found.
const FILES_MAX: usize = 4_096;

pub const NO_COMPILER: &str = "this processor has no compiler for modules; run `tidegate module precompile --target pulley32 NAME.wasm` on a 64-bit machine with the same version of tidegate";

#[derive(Debug, thiserror::Error)]
pub enum PrecompiledError {
    #[error(
        "{NO_COMPILER}, put the file that it writes into {} as root, and touch the .wasm here",
        FOLDERS[1]
    )]
    Missing,
    #[error(
        "{path:?} is not run, because {why}; it and the folders above must belong to root and be writable by no one else"
    )]
    Untrusted { path: PathBuf, why: String },
    #[error("{0:?} is damaged: its content is not what its name says; install it again and touch the .wasm here")]
    Damaged(PathBuf),
    #[error("cannot read {path:?}: {cause}")]
    File { path: PathBuf, cause: std::io::Error },
}

fn file_error(path: &Path) -> impl FnOnce(std::io::Error) -> PrecompiledError {
    let path = path.to_owned();
    move |cause| PrecompiledError::File { path, cause }
}

/// Where to look, and who must own what is found.
#[derive(Debug, Clone)]
pub struct Precompiled {
    folders: Vec<PathBuf>,
    owner: u32,
}

impl Precompiled {
    pub fn installed() -> Precompiled {
        let binary = std::env::current_exe().unwrap_or_default();
        let beside = binary.parent().unwrap_or(Path::new("/usr/bin"));
        Precompiled {
            folders: FOLDERS.iter().map(|folder| beside.join(folder)).collect(),
            owner: 0,
        }
    }

    #[cfg(test)]
    pub(super) fn of(folder: &Path, owner: u32) -> Precompiled {
        Precompiled {
            folders: vec![folder.to_owned()],
            owner,
        }
    }

    /// The program of the module whose WebAssembly has the hash `source`.
    pub fn find(&self, source: &str) -> Result<Vec<u8>, PrecompiledError> {
        let mut trouble = PrecompiledError::Missing;
        for folder in &self.folders {
            for path in files_of(folder, source) {
                match self.read(&path) {
                    Ok(code) => return Ok(code),
                    Err(error) => trouble = error,
                }
            }
        }
        Err(trouble)
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>, PrecompiledError> {
        let real = path.canonicalize().map_err(file_error(path))?;
        // Each folder above could be renamed away and replaced by who may write to the one above that.
        for above in real.ancestors().skip(1) {
            let metadata = fs::metadata(above).map_err(file_error(above))?;
            self.check(above, metadata.uid(), metadata.mode())?;
        }
        // What is checked is what is read: a name may point elsewhere a moment later.
        let mut file = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(&real)
            .map_err(file_error(&real))?;
        let metadata = file.metadata().map_err(file_error(&real))?;
        self.check(&real, metadata.uid(), metadata.mode())?;
        let mut code = Vec::new();
        (&mut file)
            .take(CODE_BYTES_MAX)
            .read_to_end(&mut code)
            .map_err(file_error(&real))?;
        let content = file_name(path).trim_end_matches(SUFFIX).rsplit('-').next();
        if content != Some(&compile::checksum(&code)) {
            return Err(PrecompiledError::Damaged(path.to_owned()));
        }
        Ok(code)
    }

    /// One entry of the way to a file.
    fn check(&self, path: &Path, owner: u32, mode: u32) -> Result<(), PrecompiledError> {
        let untrusted = |why| {
            Err(PrecompiledError::Untrusted {
                path: path.to_owned(),
                why,
            })
        };
        let kind = mode & libc::S_IFMT;
        // In a folder with the sticky bit, such as /tmp, nobody renames what is another's.
        let sticky = kind == libc::S_IFDIR && mode & libc::S_ISVTX != 0;
        if owner != 0 && owner != self.owner {
            untrusted(format!("it belongs to user {owner}"))
        } else if mode & 0o022 != 0 && !sticky {
            untrusted(format!("others may write to it (mode {:04o})", mode & 0o7777))
        } else if kind != libc::S_IFDIR && kind != libc::S_IFREG {
            untrusted("it is no regular file".to_owned())
        } else {
            Ok(())
        }
    }
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// A folder that is not there holds nothing.
fn files_of(folder: &Path, source: &str) -> Vec<PathBuf> {
    let mine = |path: &PathBuf| {
        let name = file_name(path).strip_suffix(SUFFIX);
        name.is_some_and(|name| name.rsplit('-').nth(1) == Some(source))
    };
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let paths = entries.flatten().take(FILES_MAX).map(|entry| entry.path());
    paths.filter(mine).collect()
}

/// `tidegate module precompile`: writes the bytecode of a module's file into `folder` and says where.
#[cfg(not(target_arch = "arm"))]
pub fn write(wasm_file: &Path, folder: &Path) -> Result<PathBuf, compile::CompileError> {
    use sha2::{Digest as _, Sha256};

    let wasm = compile::read_bounded(wasm_file)?;
    let code = compile::compile_for_pulley32(&wasm)?;
    let stem = wasm_file.file_stem().and_then(|stem| stem.to_str()).unwrap_or("module");
    let source = compile::hex(&Sha256::digest(&wasm));
    let name = format!("{stem}-{source}-{}{SUFFIX}", compile::checksum(&code));
    let path = folder.join(&name);
    let part = folder.join(format!(".{name}.part"));
    let write = || {
        fs::write(&part, &code)?;
        fs::rename(&part, &path)
    };
    write().map_err(file_error(&path))?;
    Ok(path)
}

#[cfg(target_arch = "arm")]
pub fn write(_wasm_file: &Path, _folder: &Path) -> Result<PathBuf, compile::CompileError> {
    Err(compile::CompileError::Child(NO_COMPILER.to_owned()))
}
