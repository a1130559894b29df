//! One connection: what was read and is no whole packet yet, what is encoded and not yet written.

use std::error::Error;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use crate::epoll::{Epoll, Interest};
use crate::wire;

/// One buffer for all connections: one read takes what the socket holds.
pub const READ_BYTES: usize = 256 << 10;

pub struct Conn {
    stream: TcpStream,
    number: usize,
    carry: Vec<u8>,
    pub out: Vec<u8>,
    written: usize,
    waits_to_write: bool,
}

impl Conn {
    pub fn new(stream: TcpStream, number: usize) -> std::io::Result<Conn> {
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Conn {
            stream,
            number,
            carry: Vec::new(),
            out: Vec::new(),
            written: 0,
            waits_to_write: false,
        })
    }

    /// Connected, accepted and, with a filter, subscribed.
    pub fn open(
        port: u16,
        client_id: &str,
        clean_session: bool,
        subscribe: Option<(&str, u8)>,
        number: usize,
    ) -> Result<Conn, Box<dyn Error>> {
        let stream = dial(port, client_id, clean_session)?;
        if let Some((filter, qos)) = subscribe {
            (&stream).write_all(&wire::subscribe(1, filter, qos))?;
            let mut answer = [0; 5];
            (&stream).read_exact(&mut answer)?;
            if answer[0] != wire::SUBACK || answer[4] & 0x80 != 0 {
                return Err(format!("{client_id}: SUBSCRIBE {filter} was answered with {answer:02x?}").into());
            }
        }
        Ok(Conn::new(stream, number)?)
    }

    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// One read; `each` gets every whole packet. False: the peer closed the connection.
    pub fn read(&mut self, buffer: &mut [u8], each: impl FnMut(u8, &[u8])) -> std::io::Result<bool> {
        let kept = self.carry.len();
        buffer[..kept].copy_from_slice(&self.carry);
        let got = match self.stream.read(&mut buffer[kept..]) {
            Ok(0) => return Ok(false),
            Ok(got) => got,
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(true),
            Err(error) => return Err(error),
        };
        let bytes = &buffer[..kept + got];
        let used = wire::packets(bytes, each);
        self.carry.clear();
        self.carry.extend_from_slice(&bytes[used..]);
        if self.carry.len() >= buffer.len() {
            return Err(std::io::Error::other("a packet is larger than the read buffer"));
        }
        Ok(true)
    }

    /// Writes what the socket takes; asks epoll for the rest.
    pub fn flush(&mut self, epoll: &Epoll) -> std::io::Result<()> {
        while self.written < self.out.len() {
            match self.stream.write(&self.out[self.written..]) {
                Ok(n) => self.written += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if !self.waits_to_write {
                        epoll.modify(self.fd(), self.number, Interest::ReadWrite)?;
                        self.waits_to_write = true;
                    }
                    return Ok(());
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.written = 0;
        if self.waits_to_write {
            epoll.modify(self.fd(), self.number, Interest::Read)?;
            self.waits_to_write = false;
        }
        Ok(())
    }
}

/// A blocking connection with its CONNACK read.
pub fn dial(port: u16, client_id: &str, clean_session: bool) -> Result<TcpStream, Box<dyn Error>> {
    let mut stream =
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).map_err(|error| format!("port {port}: {error}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(&wire::connect(client_id, clean_session))?;
    let mut answer = [0; 4];
    stream
        .read_exact(&mut answer)
        .map_err(|error| format!("port {port}: no CONNACK: {error}"))?;
    if answer != [wire::CONNACK, 2, 0, 0] {
        return Err(format!("{client_id}: CONNECT was answered with {answer:02x?}").into());
    }
    Ok(stream)
}
