//! epoll, level-triggered, each descriptor known by a number.

use std::io;
use std::os::fd::RawFd;

pub struct Epoll {
    fd: RawFd,
    events: Vec<libc::epoll_event>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    Read,
    ReadWrite,
}

impl Epoll {
    pub fn new() -> io::Result<Epoll> {
        // SAFETY: takes no pointer.
        let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Epoll {
            fd,
            events: vec![libc::epoll_event { events: 0, u64: 0 }; 1024],
        })
    }

    pub fn add(&self, fd: RawFd, number: usize) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, fd, number, Interest::Read)
    }

    pub fn modify(&self, fd: RawFd, number: usize, interest: Interest) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, fd, number, interest)
    }

    fn control(&self, operation: i32, fd: RawFd, number: usize, interest: Interest) -> io::Result<()> {
        let flags = match interest {
            Interest::Read => libc::EPOLLIN,
            Interest::ReadWrite => libc::EPOLLIN | libc::EPOLLOUT,
        };
        let mut event = libc::epoll_event {
            events: flags as u32,
            u64: number as u64,
        };
        // SAFETY: `event` lives through the call and the kernel copies it.
        if unsafe { libc::epoll_ctl(self.fd, operation, fd, &mut event) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The numbers of the descriptors that are ready.
    pub fn wait(&mut self, timeout_ms: i32) -> io::Result<impl Iterator<Item = usize> + '_> {
        // SAFETY: the pointer and the count describe `self.events`, which lives through the call.
        let ready =
            unsafe { libc::epoll_wait(self.fd, self.events.as_mut_ptr(), self.events.len() as i32, timeout_ms) };
        let ready = match ready {
            n if n >= 0 => n as usize,
            _ => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => 0,
                error => return Err(error),
            },
        };
        Ok(self.events[..ready].iter().map(|event| event.u64 as usize))
    }
}

impl Drop for Epoll {
    fn drop(&mut self) {
        // SAFETY: the descriptor is ours and is not used again.
        unsafe { libc::close(self.fd) };
    }
}
