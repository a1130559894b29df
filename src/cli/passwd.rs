//! `tidegate passwd`: a password in, its argon2id hash out. The password is never an argument, where `ps` shows it.

use std::io::{BufRead, IsTerminal, Read, Write};

use anyhow::{Context, bail};
use argon2::password_hash::PasswordHasher;
use argon2::{Algorithm, Argon2, Params, Version};

/// OWASP's list of argon2id settings of equal strength has this one for little memory: a gateway with 512 MB can take
/// several logins at once.
const MEMORY_KIB: u32 = 7168;
const ROUNDS: u32 = 5;
const LANES: u32 = 1;

/// MQTT's own limit of a password.
const PASSWORD_BYTES_MAX: usize = 65_535;

/// Asks twice at a terminal, else takes one line from stdin.
pub(super) fn ask_and_hash() -> anyhow::Result<String> {
    let stdin = std::io::stdin();
    let password = if stdin.is_terminal() {
        let echo_off = EchoOff::new().context("cannot turn the terminal's echo off")?;
        let password = prompt("password: ")?;
        if password != prompt("again: ")? {
            bail!("the two are not the same; nothing is made");
        }
        drop(echo_off);
        password
    } else {
        read_line(&mut stdin.lock())?
    };
    hash(&password)
}

pub(super) fn hash(password: &str) -> anyhow::Result<String> {
    if password.is_empty() {
        bail!("the password is empty");
    }
    let params = Params::new(MEMORY_KIB, ROUNDS, LANES, None).context("argon2 parameters")?;
    let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
    let hash = argon2
        .hash_password(password.as_bytes())
        .context("cannot hash the password")?;
    Ok(hash.to_string())
}

fn prompt(text: &str) -> anyhow::Result<String> {
    // stdout may be a file that is to get the hash alone.
    let mut stderr = std::io::stderr();
    stderr
        .write_all(text.as_bytes())
        .and_then(|()| stderr.flush())
        .context("cannot write to the terminal")?;
    let line = read_line(&mut std::io::stdin().lock());
    if line.is_err() {
        eprintln!();
    }
    line
}

/// One line without its end.
fn read_line(input: &mut impl BufRead) -> anyhow::Result<String> {
    let mut line = Vec::new();
    let end = |byte: u8| byte == b'\n' || byte == INTERRUPT;
    let mut limited = input.take(PASSWORD_BYTES_MAX as u64 + 2);
    loop {
        let available = limited.fill_buf().context("cannot read the password")?;
        if available.is_empty() {
            break;
        }
        let taken = available
            .iter()
            .position(|b| end(*b))
            .map_or(available.len(), |at| at + 1);
        line.extend_from_slice(&available[..taken]);
        limited.consume(taken);
        if line.last().is_some_and(|b| end(*b)) {
            break;
        }
    }
    if line.last() == Some(&INTERRUPT) {
        bail!("interrupted; nothing is made");
    }
    if line.last() == Some(&b'\n') {
        line.pop();
        if line.last() == Some(&b'\r') {
            line.pop();
        }
    }
    if line.len() > PASSWORD_BYTES_MAX {
        bail!("the password is longer than 65,535 bytes");
    }
    String::from_utf8(line).context("the password is not UTF-8 text")
}

/// Ctrl-C while the echo is off: it comes as a byte that ends the line (see [`EchoOff`]).
const INTERRUPT: u8 = 3;

/// The terminal without echo until this is dropped. Ctrl-C ends the line instead of the process, which would leave the
/// user's shell without echo.
struct EchoOff {
    before: libc::termios,
}

impl EchoOff {
    fn new() -> std::io::Result<EchoOff> {
        // SAFETY: termios is plain integers, for which all zeroes is a valid value.
        let mut before: libc::termios = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer is to a termios of this frame, which tcgetattr fills in and does not keep.
        if unsafe { libc::tcgetattr(libc::STDIN_FILENO, &mut before) } != 0 {
            return Err(std::io::Error::last_os_error());
        }
        let mut silent = before;
        silent.c_lflag &= !(libc::ECHO | libc::ISIG);
        silent.c_lflag |= libc::ECHONL | libc::ICANON;
        silent.c_cc[libc::VEOL] = INTERRUPT;
        set(&silent)?;
        Ok(EchoOff { before })
    }
}

impl Drop for EchoOff {
    fn drop(&mut self) {
        // Nothing is left to do where the terminal has gone away.
        let _ = set(&self.before);
    }
}

fn set(termios: &libc::termios) -> std::io::Result<()> {
    // SAFETY: the pointer is to a valid termios, which tcsetattr only reads during the call.
    match unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSAFLUSH, termios) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use argon2::password_hash::PasswordVerifier;
    use argon2::password_hash::phc::PasswordHash;

    #[test]
    fn a_hash_verifies_its_password_only_and_is_taken_by_the_config() {
        let made = hash("pass word").expect("made");
        assert!(made.starts_with("$argon2id$v=19$m=7168,t=5,p=1$"), "{made}");
        assert_ne!(made, hash("pass word").expect("made"), "the salt is not random");
        let phc = PasswordHash::new(&made).expect("a PHC string");
        assert!(Argon2::default().verify_password(b"pass word", &phc).is_ok());
        assert!(Argon2::default().verify_password(b"password", &phc).is_err());
        let text = format!("[gateway]\nname='g'\n[[user]]\nname='u'\npublish=['#']\npassword_hash='{made}'\n");
        let config = crate::config::parse(&text, std::path::Path::new("gateway.toml"), &|_| None);
        assert!(config.is_ok_and(|c| {
            c.users[0]
                .password_hash
                .as_ref()
                .is_some_and(|hash| hash.reveal() == made)
        }));
        assert!(hash("").is_err());
    }

    #[test]
    fn a_line_is_read_without_its_end() {
        let read = |mut bytes: &[u8]| read_line(&mut bytes).map_err(|e| e.to_string());
        assert_eq!(read(b"a b \nnext").as_deref(), Ok("a b "));
        assert_eq!(read(b"a\r\n").as_deref(), Ok("a"));
        assert_eq!(read(b"a").as_deref(), Ok("a"));
        assert_eq!(read(b"").as_deref(), Ok(""));
        assert!(read(b"ab\x03cd\n").is_err_and(|e| e.contains("interrupted")));
        assert!(read(&vec![b'x'; 70_000]).is_err_and(|e| e.contains("65,535")));
        assert!(read(b"\xff\n").is_err_and(|e| e.contains("UTF-8")));
    }
}
