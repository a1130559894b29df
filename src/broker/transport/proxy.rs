//! The PROXY protocol, version 2: who a connection is from, said by the proxy before it. Pure.
//!
//! Only the address is read; what the proxy adds (TLVs) is passed over. A header of LOCAL (the proxy's own check) or
//! of a family that is no address leaves the connection the proxy's own.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// What every header has; the length of the rest is in it.
pub const FIXED_BYTES: usize = 16;
/// Beyond it the header is refused: addresses take 216 bytes, and what proxies add some hundred.
const REST_BYTES_MAX: usize = 2_048;

const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// Whether it is none is seen by the first of them: no other protocol's first packet is shorter.
pub const BEGIN_BYTES: usize = 6;

/// Looks at the first bytes, however many.
pub fn begins(bytes: &[u8]) -> Result<(), String> {
    if SIGNATURE.starts_with(bytes) {
        return Ok(());
    }
    Err(match bytes {
        [b'P', b'R', b'O', b'X', b'Y', b' ', ..] => {
            "it sent a PROXY protocol header of version 1; set the proxy to version 2 (haproxy: send-proxy-v2)"
                .to_owned()
        }
        _ => "it sent no PROXY protocol header, which this listener needs (proxy_protocol = true)".to_owned(),
    })
}

/// How many bytes follow the fixed part, or why it is none.
pub fn rest_bytes(fixed: &[u8; FIXED_BYTES]) -> Result<usize, String> {
    begins(&fixed[..SIGNATURE.len()])?;
    if fixed[12] >> 4 != 2 {
        return Err(format!("its PROXY protocol header is of version {}", fixed[12] >> 4));
    }
    let rest = usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    if rest > REST_BYTES_MAX {
        return Err(format!(
            "its PROXY protocol header is longer than {REST_BYTES_MAX} bytes"
        ));
    }
    Ok(rest)
}

/// Whom the connection is from; None: from the proxy itself.
pub fn source(fixed: &[u8; FIXED_BYTES], rest: &[u8]) -> Result<Option<SocketAddr>, String> {
    match fixed[12] & 0x0f {
        0 => return Ok(None),
        1 => {}
        other => return Err(format!("its PROXY protocol header has the unknown command {other}")),
    }
    let short = || "its PROXY protocol header ends in the middle of an address".to_owned();
    match fixed[13] >> 4 {
        1 => {
            let part: &[u8; 12] = rest.first_chunk().ok_or_else(short)?;
            let ip = Ipv4Addr::new(part[0], part[1], part[2], part[3]);
            Ok(Some(SocketAddr::new(ip.into(), u16::from_be_bytes([part[8], part[9]]))))
        }
        2 => {
            let part: &[u8; 36] = rest.first_chunk().ok_or_else(short)?;
            let ip: [u8; 16] = *part.first_chunk().ok_or_else(short)?;
            let ip = IpAddr::from(Ipv6Addr::from(ip)).to_canonical();
            Ok(Some(SocketAddr::new(ip, u16::from_be_bytes([part[32], part[33]]))))
        }
        // No address, or a Unix socket's.
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(command: u8, family: u8, rest: &[u8]) -> ([u8; FIXED_BYTES], Vec<u8>) {
        let mut fixed = [0; FIXED_BYTES];
        fixed[..12].copy_from_slice(SIGNATURE);
        (fixed[12], fixed[13]) = (0x20 | command, family);
        fixed[14..].copy_from_slice(&(rest.len() as u16).to_be_bytes());
        (fixed, rest.to_vec())
    }

    fn said(command: u8, family: u8, rest: &[u8]) -> Result<Option<String>, String> {
        let (fixed, rest) = header(command, family, rest);
        assert_eq!(rest_bytes(&fixed), Ok(rest.len()));
        source(&fixed, &rest).map(|found| found.map(|a| a.to_string()))
    }

    #[test]
    fn the_address_is_the_clients() {
        let v4 = [192, 0, 2, 7, 10, 0, 0, 1, 0xc3, 0x50, 0x07, 0x5b];
        assert_eq!(said(1, 0x11, &v4), Ok(Some("192.0.2.7:50000".into())));
        let with_more = [&v4[..], &[0x04, 0, 2, 1, 2]].concat();
        assert_eq!(said(1, 0x11, &with_more), Ok(Some("192.0.2.7:50000".into())));
        let mut v6 = [0; 36];
        v6[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
        (v6[15], v6[33]) = (1, 9);
        assert_eq!(said(1, 0x21, &v6), Ok(Some("[2001:db8::1]:9".into())));
        assert_eq!(said(0, 0x00, &[]), Ok(None), "LOCAL");
        assert_eq!(said(1, 0x00, &[1, 2, 3]), Ok(None), "UNSPEC");
        assert_eq!(said(1, 0x31, &[0; 216]), Ok(None), "a Unix socket");
    }

    #[test]
    fn anything_else_is_refused_in_words() {
        assert!(said(1, 0x11, &[1; 11]).is_err_and(|e| e.contains("middle")));
        assert!(said(1, 0x21, &[1; 35]).is_err());
        assert!(said(2, 0x11, &[1; 12]).is_err_and(|e| e.contains("command")));
        let refused = |bytes: &[u8; FIXED_BYTES]| rest_bytes(bytes).expect_err("no header");
        assert!(refused(b"PROXY TCP4 192.0").contains("version 1"));
        assert!(refused(b"\x10\x10\0\x04MQTT\x04\x02\0\x3c\0\x02ab").contains("no PROXY protocol header"));
        let (mut fixed, _) = header(1, 0x11, &[]);
        fixed[14] = 0xff;
        assert!(refused(&fixed).contains("longer"));
        (fixed[14], fixed[12]) = (0, 0x31);
        assert!(refused(&fixed).contains("version 3"));
    }
}
