//! The server's side of WebSocket (RFC 6455) as MQTT uses it: the request that opens it, frames in, headers out. Pure.
//!
//! Frames stream through: their content goes on as it arrives, whatever length was announced, so a connection holds no
//! more than a header and one control frame. What is gathered is MQTT packets, and their limits hold.

use std::ops::DerefMut;

use bytes::BufMut;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;

/// A longer request is refused.
pub const REQUEST_BYTES_MAX: usize = 8 << 10;
const HEADERS_MAX: usize = 64;
const CONTROL_BYTES_MAX: usize = 125;
const SUBPROTOCOLS: [&str; 2] = ["mqtt", "mqttv3.1"];

/// Close codes (RFC 6455, 7.4.1).
pub mod close {
    pub const NORMAL: u16 = 1000;
    pub const PROTOCOL: u16 = 1002;
    pub const NOT_ACCEPTABLE: u16 = 1003;
}

/// What of a listener decides about a request.
#[derive(Debug, Clone, Copy)]
pub struct Policy<'a> {
    /// A page could come in without knowing a password: where it is from must be known then.
    pub asks_no_password: bool,
    pub origins: &'a [String],
}

/// What became of the bytes so far.
#[derive(Debug, PartialEq, Eq)]
pub enum Request {
    Unfinished,
    /// The answer that opens it, and how many bytes the request took.
    Open {
        answer: String,
        bytes: usize,
    },
    /// The answer, and the reason for the log.
    Refused {
        answer: String,
        why: String,
    },
}

/// Reads a request that may not be here whole.
pub fn request(head: &[u8], policy: Policy<'_>) -> Request {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut parsed = httparse::Request::new(&mut headers);
    let bytes = match parsed.parse(head) {
        Ok(httparse::Status::Complete(bytes)) if bytes <= REQUEST_BYTES_MAX => bytes,
        Ok(httparse::Status::Partial) if head.len() < REQUEST_BYTES_MAX => return Request::Unfinished,
        Ok(_) => {
            return refused(
                "431 Request Header Fields Too Large",
                "",
                "its request is longer than 8 KiB",
            );
        }
        Err(httparse::Error::TooManyHeaders) => {
            return refused(
                "431 Request Header Fields Too Large",
                "",
                "its request has too many headers",
            );
        }
        Err(_) if head.first() == Some(&0x10) => {
            return refused(
                "400 Bad Request",
                "",
                "it spoke MQTT without WebSocket to a listener for WebSocket",
            );
        }
        Err(_) => {
            return refused(
                "400 Bad Request",
                "",
                "it sent no HTTP request to a listener for WebSocket",
            );
        }
    };
    match opening(&parsed, policy) {
        Ok(answer) => Request::Open { answer, bytes },
        Err(refusal) => refusal,
    }
}

fn opening(request: &httparse::Request<'_, '_>, policy: Policy<'_>) -> Result<String, Request> {
    let of = |name: &str| {
        let mut found = request.headers.iter().filter(|h| h.name.eq_ignore_ascii_case(name));
        let first = found
            .next()
            .and_then(|h| std::str::from_utf8(h.value).ok())
            .map(str::trim);
        (first, found.next().is_some())
    };
    let value = |name: &str| of(name).0;
    // A list may be in several headers of the same name.
    let has = |name: &str, wanted: &str| list(request, name).any(|item| item.eq_ignore_ascii_case(wanted));
    let path = request.path.unwrap_or_default().split('?').next().unwrap_or_default();
    if request.method != Some("GET") {
        return Err(refused(
            "405 Method Not Allowed",
            "Allow: GET\r\n",
            "its request is not a GET",
        ));
    }
    if path != "/" && path != "/mqtt" {
        let why = "it asked for another path than / and /mqtt";
        return Err(refused("404 Not Found", "", why));
    }
    if !has("upgrade", "websocket") {
        let why = "it asked for a web page where MQTT over WebSocket is spoken";
        return Err(refused("426 Upgrade Required", "Upgrade: websocket\r\n", why));
    }
    if request.version != Some(1) || !has("connection", "upgrade") {
        return Err(refused(
            "400 Bad Request",
            "",
            "its WebSocket request is not one of HTTP/1.1",
        ));
    }
    if value("sec-websocket-version") != Some("13") {
        let why = "it asked for another version of WebSocket than 13";
        return Err(refused("426 Upgrade Required", "Sec-WebSocket-Version: 13\r\n", why));
    }
    // Sixteen bytes in base64.
    let key = match of("sec-websocket-key") {
        (Some(key), false) if key.len() == 24 && data_encoding::BASE64.decode(key.as_bytes()).is_ok() => key,
        _ => {
            return Err(refused(
                "400 Bad Request",
                "",
                "its WebSocket request has no proper Sec-WebSocket-Key",
            ));
        }
    };
    let chosen = list(request, "sec-websocket-protocol").find_map(|offered| {
        let known = SUBPROTOCOLS.iter().find(|known| offered.eq_ignore_ascii_case(known));
        known.map(|_| offered)
    });
    let Some(chosen) = chosen else {
        let why = "its WebSocket request does not offer the subprotocol mqtt";
        return Err(refused("400 Bad Request", "Sec-WebSocket-Protocol: mqtt\r\n", why));
    };
    if let Some(origin) = value("origin")
        && !may_come_from(origin, value("host").unwrap_or_default(), policy)
    {
        let why = format!("a page of {origin:?} may not connect; origins of the listener names those that may");
        return Err(refused("403 Forbidden", "", &why));
    }
    let accept = derive_accept_key(key.as_bytes());
    Ok(format!(
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\
         Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: {chosen}\r\n\r\n"
    ))
}

fn list<'r>(request: &'r httparse::Request<'_, '_>, name: &'r str) -> impl Iterator<Item = &'r str> {
    let named = request
        .headers
        .iter()
        .filter(move |h| h.name.eq_ignore_ascii_case(name));
    named
        .filter_map(|h| std::str::from_utf8(h.value).ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
}

/// Browsers let any page open a WebSocket to any address, this machine's own included, and say only where the page is
/// from. Where no password is asked for, the page must be the gateway's own, by an address and not by a name that
/// whoever made the page could have pointed here.
fn may_come_from(origin: &str, host: &str, policy: Policy<'_>) -> bool {
    if !policy.asks_no_password || policy.origins.iter().any(|o| o.eq_ignore_ascii_case(origin)) {
        return true;
    }
    let bare = |authority: &str| {
        let host = match authority.rsplit_once(':') {
            Some((host, port)) if port.bytes().all(|b| b.is_ascii_digit()) => host,
            _ => authority,
        };
        host.trim_matches(['[', ']']).to_ascii_lowercase()
    };
    let from = bare(origin.split_once("://").map_or("", |(_, authority)| authority));
    (from == "localhost" || from.parse::<core::net::IpAddr>().is_ok()) && from == bare(host)
}

/// Short and clear for whoever looks with a browser; a page may come here later.
fn refused(status: &str, headers: &str, why: &str) -> Request {
    let body =
        format!("This is the MQTT broker of a gateway: connect an MQTT client over WebSocket.\nRefused: {why}.\n");
    let length = body.len();
    Request::Refused {
        answer: format!(
            "HTTP/1.1 {status}\r\n{headers}Content-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\n\
             Connection: close\r\n\r\n{body}"
        ),
        why: why.to_owned(),
    }
}

/// Why a connection ends, and the close code that says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Violation {
    pub code: u16,
    pub text: &'static str,
}

const fn violation(text: &'static str) -> Violation {
    Violation {
        code: close::PROTOCOL,
        text,
    }
}

/// What a client sends, frame by frame.
#[derive(Debug, Default)]
pub struct Frames {
    /// The beginning of a header.
    head: smallvec::SmallVec<[u8; 14]>,
    /// The frame whose content is arriving.
    frame: Option<Frame>,
    /// A message is begun and goes on in the next frame.
    in_message: bool,
    /// The content of a control frame.
    control: Vec<u8>,
    /// Owed: the content of the last ping. One answer is enough for several (5.5.3).
    pub pong: Option<Vec<u8>>,
    /// The client has closed, with this code.
    pub closed: Option<u16>,
}

#[derive(Debug)]
struct Frame {
    opcode: u8,
    mask: [u8; 4],
    left: u64,
}

impl Frames {
    /// Takes all of `bytes`; the content of messages goes to the end of `to`.
    pub fn take_in<D>(&mut self, mut bytes: &[u8], to: &mut D) -> Result<(), Violation>
    where
        D: BufMut + DerefMut<Target = [u8]>,
    {
        // What follows a close is not looked at.
        while self.closed.is_none() {
            let Some(frame) = &mut self.frame else {
                let Some((&byte, rest)) = bytes.split_first() else {
                    break;
                };
                self.head.push(byte);
                bytes = rest;
                self.frame = self.header()?;
                continue;
            };
            let n = usize::try_from(frame.left).unwrap_or(usize::MAX).min(bytes.len());
            let (part, rest) = bytes.split_at(n);
            bytes = rest;
            frame.left -= n as u64;
            if frame.opcode < 8 {
                let from = to.len();
                to.put_slice(part);
                unmask(&mut to[from..], frame.mask);
            } else {
                let from = self.control.len();
                self.control.extend_from_slice(part);
                unmask(&mut self.control[from..], frame.mask);
            }
            // The next byte's mask comes first.
            frame.mask.rotate_left(n % 4);
            if frame.left > 0 {
                break;
            }
            let opcode = frame.opcode;
            self.frame = None;
            if opcode >= 8 {
                self.control_frame(opcode)?;
            }
        }
        Ok(())
    }

    /// Some as soon as the header is whole.
    fn header(&mut self) -> Result<Option<Frame>, Violation> {
        let &[first, second, ..] = self.head.as_slice() else {
            return Ok(None);
        };
        let (is_last, opcode) = (first & 0x80 != 0, first & 0x0f);
        let (is_masked, short) = (second & 0x80 != 0, second & 0x7f);
        if first & 0x70 != 0 {
            return Err(violation("a WebSocket frame with reserved bits"));
        }
        if !is_masked {
            return Err(violation("a WebSocket frame without a mask"));
        }
        match opcode {
            0 if self.in_message => {}
            0 => return Err(violation("a WebSocket frame that continues nothing")),
            1 => {
                return Err(Violation {
                    code: close::NOT_ACCEPTABLE,
                    text: "a WebSocket text frame, where MQTT uses binary ones",
                });
            }
            2 if !self.in_message => {}
            2 => return Err(violation("a WebSocket message inside another")),
            8..=10 if is_last && usize::from(short) <= CONTROL_BYTES_MAX => {}
            8..=10 => return Err(violation("a WebSocket control frame that is too long or in parts")),
            _ => return Err(violation("a WebSocket frame of an unknown kind")),
        }
        let extended = match short {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        if self.head.len() < 2 + extended + 4 {
            return Ok(None);
        }
        let (length, mask) = self.head[2..].split_at(extended);
        let left = match extended {
            0 => u64::from(short),
            _ => length.iter().fold(0, |n, b| n << 8 | u64::from(*b)),
        };
        if left >> 63 != 0 {
            return Err(violation("a WebSocket frame of an impossible length"));
        }
        let mask = [mask[0], mask[1], mask[2], mask[3]];
        self.head.clear();
        if opcode < 8 {
            self.in_message = !is_last;
        }
        Ok(Some(Frame { opcode, mask, left }))
    }

    fn control_frame(&mut self, opcode: u8) -> Result<(), Violation> {
        let content = std::mem::take(&mut self.control);
        match opcode {
            8 => {
                self.closed = Some(match content.as_slice() {
                    [] => close::NORMAL,
                    &[high, low, ..] => u16::from_be_bytes([high, low]),
                    [_] => return Err(violation("a WebSocket close frame with half a code")),
                });
            }
            9 => self.pong = Some(content),
            _ => {}
        }
        Ok(())
    }
}

fn unmask(bytes: &mut [u8], mask: [u8; 4]) {
    let wide = u32::from_ne_bytes(mask);
    let mut chunks = bytes.chunks_exact_mut(4);
    for chunk in &mut chunks {
        let word = u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]) ^ wide;
        chunk.copy_from_slice(&word.to_ne_bytes());
    }
    for (byte, mask) in chunks.into_remainder().iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

/// The header of a whole binary message of that length.
pub fn binary(length: usize, to: &mut impl Extend<u8>) {
    header(0x82, length, to);
}

pub fn pong(content: &[u8], to: &mut impl Extend<u8>) {
    header(0x8a, content.len(), to);
    to.extend(content.iter().copied());
}

pub fn closing(code: u16, to: &mut impl Extend<u8>) {
    header(0x88, 2, to);
    to.extend(code.to_be_bytes());
}

fn header(first: u8, length: usize, to: &mut impl Extend<u8>) {
    to.extend([first]);
    match length {
        0..=125 => to.extend([length as u8]),
        126..=0xffff => {
            to.extend([126]);
            to.extend((length as u16).to_be_bytes());
        }
        _ => {
            to.extend([127]);
            to.extend((length as u64).to_be_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Cursor, Read, Write};

    use tokio_tungstenite::tungstenite::protocol::{Message, Role, WebSocket};

    use super::*;

    const ANYBODY: Policy<'_> = Policy {
        asks_no_password: false,
        origins: &[],
    };
    const GOOD: &str = "GET /mqtt HTTP/1.1\r\nHost: 127.0.0.1:9001\r\nConnection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n\
        Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: mqttv3.1, mqtt\r\n";

    fn status(text: &str, policy: Policy<'_>) -> String {
        match request(format!("{text}\r\n").as_bytes(), policy) {
            Request::Unfinished => "unfinished".to_owned(),
            Request::Open { answer, .. } | Request::Refused { answer, .. } => {
                answer.split(' ').nth(1).expect("a status").to_owned()
            }
        }
    }

    #[test]
    fn a_request_opens_or_says_why_not() {
        let whole = format!("{GOOD}\r\n?");
        for cut in 0..whole.len() - 1 {
            assert_eq!(request(&whole.as_bytes()[..cut], ANYBODY), Request::Unfinished, "{cut}");
        }
        let Request::Open { answer, bytes } = request(whole.as_bytes(), ANYBODY) else {
            panic!("it is a good one");
        };
        assert_eq!(bytes, whole.len() - 1, "what follows is a frame");
        // The example of RFC 6455, 1.3.
        assert!(answer.contains("Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"));
        assert!(
            answer.contains("Sec-WebSocket-Protocol: mqttv3.1\r\n"),
            "the client's order"
        );
        let with = |from: &str, to: &str| status(&GOOD.replace(from, to), ANYBODY);
        assert_eq!(with("/mqtt ", "/ "), "101");
        assert_eq!(with("/mqtt ", "/mqtt?x=1 "), "101");
        assert_eq!(with("/mqtt ", "/mqtt/x "), "404");
        assert_eq!(with("GET", "POST"), "405");
        assert_eq!(with("Upgrade: WebSocket", "X: y"), "426");
        assert_eq!(with("Version: 13", "Version: 8"), "426");
        assert_eq!(with("HTTP/1.1", "HTTP/1.0"), "400");
        assert_eq!(with("dGhlIHNhbXBsZSBub25jZQ==", "short"), "400");
        assert_eq!(with("mqttv3.1, mqtt", "chat"), "400");
        assert_eq!(with("keep-alive, Upgrade", "close"), "400");
        assert_eq!(status("\x10\x0e\0\x04MQTT\x04", ANYBODY), "400");
        let long = format!("{GOOD}X: {}\r\n", "y".repeat(REQUEST_BYTES_MAX));
        assert_eq!(status(&long, ANYBODY), "431");
        assert_eq!(
            request(&long.as_bytes()[..REQUEST_BYTES_MAX - 1], ANYBODY),
            Request::Unfinished
        );
        let many = format!("{GOOD}{}", "X: y\r\n".repeat(HEADERS_MAX));
        assert_eq!(status(&many, ANYBODY), "431");
    }

    #[test]
    fn pages_from_elsewhere_need_a_password_or_a_word() {
        let named = ["https://dash.example".to_owned()];
        let open = Policy {
            asks_no_password: true,
            origins: &named,
        };
        let from = |origin: &str, host: &str, policy| {
            let text = GOOD.replace("127.0.0.1:9001", host);
            status(&format!("{text}Origin: {origin}\r\n"), policy)
        };
        let table = [
            ("http://127.0.0.1:8080", "127.0.0.1:9001", "101"),
            ("http://localhost", "localhost:9001", "101"),
            ("http://[::1]:80", "[::1]:9001", "101"),
            ("https://dash.example", "127.0.0.1:9001", "101"),
            ("https://evil.example", "127.0.0.1:9001", "403"),
            ("https://dash.example.evil.example", "127.0.0.1:9001", "403"),
            ("null", "127.0.0.1:9001", "403"),
            // A name that was pointed here.
            ("http://evil.example", "evil.example:9001", "403"),
        ];
        for (origin, host, expected) in table {
            assert_eq!(from(origin, host, open), expected, "{origin} {host}");
            assert_eq!(
                from(origin, host, ANYBODY),
                "101",
                "{origin}: it has to know a password"
            );
        }
    }

    /// A stream in memory: what is written is kept.
    struct Pipe(Cursor<Vec<u8>>, Vec<u8>);
    impl Read for Pipe {
        fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(into)
        }
    }
    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.1.write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// What a client made by tungstenite sends comes out, however it is cut.
    #[test]
    fn frames_of_another_maker_are_read() {
        let mut client = WebSocket::from_raw_socket(Pipe(Cursor::default(), Vec::new()), Role::Client, None);
        let mut expected = Vec::new();
        for length in [0, 1, 3, 4, 5, 125, 126, 127, 65_535, 65_536, 300_000] {
            let content: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
            expected.extend_from_slice(&content);
            client.send(Message::Binary(content.into())).expect("in memory");
            client
                .send(Message::Ping(vec![length as u8; 5].into()))
                .expect("in memory");
        }
        let sent = client.get_mut().1.clone();
        for step in [1, 2, 7, 4_096, sent.len()] {
            let (mut frames, mut got) = (Frames::default(), Vec::new());
            for part in sent.chunks(step) {
                frames.take_in(part, &mut got).expect("valid");
            }
            assert!(got == expected, "in steps of {step}");
            assert_eq!(frames.pong.as_deref(), Some(&[300_000u32 as u8; 5][..]));
            assert!(frames.closed.is_none());
        }
        client.get_mut().1.clear();
        client.close(None).expect("in memory");
        let (mut frames, mut got) = (Frames::default(), Vec::new());
        frames.take_in(&client.get_mut().1.clone(), &mut got).expect("valid");
        assert_eq!(frames.closed, Some(close::NORMAL));
    }

    #[test]
    fn another_maker_reads_what_is_written() {
        let mut bytes = Vec::new();
        for length in [1, 125, 126, 65_535, 65_536] {
            binary(length, &mut bytes);
            bytes.extend(std::iter::repeat_n(7, length));
            pong(b"back", &mut bytes);
        }
        closing(close::NOT_ACCEPTABLE, &mut bytes);
        let mut client = WebSocket::from_raw_socket(Pipe(Cursor::new(bytes), Vec::new()), Role::Client, None);
        for length in [1, 125, 126, 65_535, 65_536] {
            assert_eq!(client.read().expect("valid"), Message::Binary(vec![7; length].into()));
            assert_eq!(client.read().expect("valid"), Message::Pong(b"back".as_slice().into()));
        }
        assert!(matches!(client.read().expect("valid"), Message::Close(Some(frame)) if u16::from(frame.code) == 1003));
    }

    /// Two parts with a ping between them are one message.
    #[test]
    fn a_message_in_parts_is_put_together() {
        let mask = [1, 2, 3, 4];
        let masked = |first: u8, content: &[u8]| {
            let mut content = content.to_vec();
            let length = content.len() as u8;
            unmask(&mut content, mask);
            [&[first, 0x80 | length][..], &mask[..], &content[..]].concat()
        };
        let sent = [
            masked(0x02, b"he"),
            masked(0x89, b"?"),
            masked(0x00, b"ll"),
            masked(0x80, b"o"),
        ]
        .concat();
        let (mut frames, mut got) = (Frames::default(), Vec::new());
        frames.take_in(&sent, &mut got).expect("valid");
        assert_eq!(
            (got.as_slice(), frames.pong.as_deref()),
            (&b"hello"[..], Some(&b"?"[..]))
        );
        let refused = |sent: &[u8]| Frames::default().take_in(sent, &mut Vec::new()).expect_err("no frame");
        assert_eq!(refused(&masked(0x81, b"text")).code, close::NOT_ACCEPTABLE);
        let (in_part, text) = (masked(0x02, b"a"), "a WebSocket message inside another");
        assert_eq!(refused(&[in_part.clone(), masked(0x82, b"b")].concat()).text, text);
        for bad in [
            masked(0x80, b"continues nothing"),
            masked(0xc2, b"reserved"),
            masked(0x83, b"unknown"),
            masked(0x09, b"ping in parts"),
            masked(0x88, b"?"),
            vec![0x82, 0x01, b'x'],
            vec![0x89, 0xfe, 0, 126, 1, 2, 3, 4],
            vec![0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4],
        ] {
            assert_eq!(refused(&bad).code, close::PROTOCOL, "{bad:02x?}");
        }
    }
}
