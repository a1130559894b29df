//! Machine code mapped from its file: readable and executable, and never writable, at no moment.
//!
//! wasmtime by itself maps a file writable and makes it executable afterwards, which a hardened service
//! (MemoryDenyWriteExecute=, or the kernel's MDWE) refuses. A mapping that is executable from the start is what every
//! shared library is.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};
use std::sync::{Mutex, PoisonError};

/// The mappings of an engine, by where they are.
#[derive(Debug, Default)]
pub struct Mappings {
    mapped: Mutex<Vec<Mapping>>,
}

#[derive(Debug, Clone, Copy)]
struct Mapping {
    start: usize,
    bytes: usize,
}

impl Mapping {
    fn holds(&self, address: usize) -> bool {
        (self.start..self.start + self.bytes).contains(&address)
    }
}

impl Mappings {
    /// Maps a whole file. It stays mapped until [`Mappings::unmap`].
    pub fn map(&self, file: &File) -> io::Result<NonNull<[u8]>> {
        let bytes = usize::try_from(file.metadata()?.len()).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let protection = libc::PROT_READ | libc::PROT_EXEC;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that is there.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                bytes,
                protection,
                libc::MAP_PRIVATE,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast::<u8>()).ok_or(io::ErrorKind::InvalidData)?;
        self.lock().push(Mapping {
            start: start.addr().get(),
            bytes,
        });
        Ok(NonNull::slice_from_raw_parts(start, bytes))
    }

    pub fn holds(&self, at: *const u8) -> bool {
        self.lock().iter().any(|m| m.holds(at.addr()))
    }

    /// Takes away the mapping that holds the address; false where none does.
    ///
    /// # Safety
    /// Nothing may use the mapping any more.
    pub unsafe fn unmap(&self, at: *const u8) -> bool {
        let mut mapped = self.lock();
        let Some(index) = mapped.iter().position(|m| m.holds(at.addr())) else {
            return false;
        };
        let mapping = mapped.swap_remove(index);
        // SAFETY: the mapping is one of ours, whole, and by the caller's promise unused; it is off the list, so that it is
        // unmapped once.
        unsafe { libc::munmap(ptr::with_exposed_provenance_mut(mapping.start), mapping.bytes) };
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Mapping>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
