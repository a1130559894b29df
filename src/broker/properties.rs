//! What the codec lets pass in a frame of MQTT 5, or would refuse with another reason than the specification names:
//! properties that are there twice or have a value that is none, U+0000 in texts, options of a SUBSCRIBE. Pure.
//!
//! What is cut short or of an unknown kind is left to the codec, which calls it malformed.

use super::codec::{WireError, reason};

const MESSAGE_EXPIRY_INTERVAL: u8 = 0x02;
const SUBSCRIPTION_IDENTIFIER: u8 = 0x0b;
const AUTHENTICATION_METHOD: u8 = 0x15;
const AUTHENTICATION_DATA: u8 = 0x16;
const REQUEST_PROBLEM_INFORMATION: u8 = 0x17;
const REQUEST_RESPONSE_INFORMATION: u8 = 0x19;
const RECEIVE_MAXIMUM: u8 = 0x21;
const USER_PROPERTY: u8 = 0x26;
const MAXIMUM_PACKET_SIZE: u8 = 0x27;

/// The shapes of MQTT 5, 2.2.2.2.
enum Shape {
    Byte,
    TwoBytes,
    FourBytes,
    Variable,
    Text,
    Binary,
    Pair,
}

fn shape(id: u8) -> Option<Shape> {
    Some(match id {
        0x01 | 0x17 | 0x19 | 0x24 | 0x25 | 0x28..=0x2a => Shape::Byte,
        0x13 | 0x21..=0x23 => Shape::TwoBytes,
        0x02 | 0x11 | 0x18 | 0x27 => Shape::FourBytes,
        SUBSCRIPTION_IDENTIFIER => Shape::Variable,
        0x03 | 0x08 | 0x12 | 0x15 | 0x1a | 0x1c | 0x1f => Shape::Text,
        0x09 | 0x16 => Shape::Binary,
        USER_PROPERTY => Shape::Pair,
        _ => return None,
    })
}

fn protocol(text: &str) -> WireError {
    WireError::new(reason::PROTOCOL_ERROR, text)
}

/// A text or binary field: its bytes, and where it ends.
fn field(at: usize, body: &[u8]) -> Option<(&[u8], usize)> {
    let length = usize::from(u16::from_be_bytes([*body.get(at)?, *body.get(at + 1)?]));
    Some((body.get(at + 2..at + 2 + length)?, at + 2 + length))
}

fn variable(at: usize, body: &[u8]) -> Option<(usize, usize)> {
    let mut value = 0;
    for i in 0..4 {
        let byte = *body.get(at + i)?;
        value |= usize::from(byte & 0x7f) << (7 * i);
        if byte & 0x80 == 0 {
            return Some((value, at + i + 1));
        }
    }
    None
}

fn refuse_nul(text: &[u8]) -> Result<(), WireError> {
    if text.contains(&0) {
        // [MQTT-1.5.4-2]
        return Err(WireError::new(reason::MALFORMED, "U+0000 in a text"));
    }
    Ok(())
}

/// What was found in the properties at a place.
#[derive(Default)]
struct Found {
    /// Where they end; None: cut short, or one of them is not known.
    end: Option<usize>,
    /// Where a Message Expiry Interval of 0 has its last byte.
    expiry_zero: Option<usize>,
}

fn walk(at: usize, body: &[u8], many_identifiers: bool) -> Result<Found, WireError> {
    let mut found = Found::default();
    let Some((length, mut at)) = variable(at, body) else {
        return Ok(found);
    };
    let end = at + length;
    if end > body.len() {
        return Ok(found);
    }
    let mut seen = 0u64;
    while at < end {
        let id = body[at];
        let Some(shape) = shape(id) else { return Ok(found) };
        let is_repeatable = id == USER_PROPERTY || many_identifiers && id == SUBSCRIPTION_IDENTIFIER;
        if seen & 1 << id != 0 && !is_repeatable {
            return Err(protocol("a property is there twice"));
        }
        seen |= 1 << id;
        at += 1;
        let (value, next) = match shape {
            Shape::Byte => (body.get(at).map(|b| usize::from(*b)), Some(at + 1)),
            Shape::TwoBytes => (number(at, 2, body), Some(at + 2)),
            Shape::FourBytes => (number(at, 4, body), Some(at + 4)),
            Shape::Variable => variable(at, body).map_or((None, None), |(v, n)| (Some(v), Some(n))),
            Shape::Text | Shape::Binary | Shape::Pair => {
                let Some((bytes, mut next)) = field(at, body) else {
                    return Ok(found);
                };
                if !matches!(shape, Shape::Binary) {
                    refuse_nul(bytes)?;
                }
                if matches!(shape, Shape::Pair) {
                    let Some((bytes, behind)) = field(next, body) else {
                        return Ok(found);
                    };
                    refuse_nul(bytes)?;
                    next = behind;
                }
                (None, Some(next))
            }
        };
        match (id, value) {
            (RECEIVE_MAXIMUM, Some(0)) => return Err(protocol("a Receive Maximum of 0")),
            (MAXIMUM_PACKET_SIZE, Some(0)) => return Err(protocol("a Maximum Packet Size of 0")),
            (SUBSCRIPTION_IDENTIFIER, Some(0)) => return Err(protocol("a Subscription Identifier of 0")),
            (REQUEST_PROBLEM_INFORMATION | REQUEST_RESPONSE_INFORMATION, Some(2..)) => {
                return Err(protocol("a Request Information that is neither 0 nor 1"));
            }
            (MESSAGE_EXPIRY_INTERVAL, Some(0)) => found.expiry_zero = Some(at + 3),
            _ => {}
        }
        let Some(next) = next.filter(|n| *n <= end) else {
            return Ok(found);
        };
        at = next;
    }
    if seen & 1 << AUTHENTICATION_DATA != 0 && seen & 1 << AUTHENTICATION_METHOD == 0 {
        return Err(protocol("Authentication Data without an Authentication Method"));
    }
    found.end = Some(end);
    Ok(found)
}

fn number(at: usize, bytes: usize, body: &[u8]) -> Option<usize> {
    let bytes = body.get(at..at + bytes)?;
    Some(bytes.iter().fold(0, |n, b| n << 8 | usize::from(*b)))
}

/// Looks at a frame of a client. True: its message has an expiry interval of 0, which the codec knows no way to say;
/// it was written over with 1.
pub fn check(first: u8, body: &mut [u8]) -> Result<bool, WireError> {
    let mut expiry_zero = None;
    match first >> 4 {
        1 => {
            let Some((_, name)) = field(0, body) else {
                return Ok(false);
            };
            let flags = body.get(name + 1).copied().unwrap_or_default();
            let Some(at) = walk(name + 4, body, false)?.end else {
                return Ok(false);
            };
            if flags & 0b100 != 0
                && let Some((_, will)) = field(at, body)
            {
                expiry_zero = walk(will, body, false)?.expiry_zero;
            }
        }
        3 => {
            let Some((_, mut at)) = field(0, body) else {
                return Ok(false);
            };
            if first & 0b110 != 0 {
                at += 2;
            }
            // Most have none.
            if body.get(at).is_some_and(|length| *length != 0) {
                expiry_zero = walk(at, body, true)?.expiry_zero;
            }
        }
        4..=7 if body.len() > 3 => _ = walk(3, body, false)?,
        8 => {
            if let Some(at) = walk(2, body, false)?.end {
                check_options(at, body)?;
            }
        }
        10 => {
            let end = walk(2, body, false)?.end;
            if end == Some(body.len()) {
                return Err(protocol("an UNSUBSCRIBE without a filter"));
            }
        }
        14 | 15 if body.len() > 1 => _ = walk(1, body, false)?,
        _ => {}
    }
    if let Some(at) = expiry_zero {
        body[at] = 1;
    }
    Ok(expiry_zero.is_some())
}

fn check_options(mut at: usize, body: &[u8]) -> Result<(), WireError> {
    if at == body.len() {
        return Err(protocol("a SUBSCRIBE without a filter"));
    }
    while let Some((_, end)) = field(at, body) {
        let Some(options) = body.get(end) else { return Ok(()) };
        if options & 0b1100_0000 != 0 {
            return Err(WireError::new(
                reason::MALFORMED,
                "reserved bits are set in the SUBSCRIBE",
            ));
        }
        if options & 0b11 == 3 {
            return Err(protocol("a SUBSCRIBE with QoS 3"));
        }
        if options & 0b11_0000 == 0b11_0000 {
            return Err(protocol("a SUBSCRIBE with Retain Handling 3"));
        }
        at = end + 1;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publish(properties: &[u8]) -> Vec<u8> {
        [&[0, 1, b't', properties.len() as u8], properties, b"payload"].concat()
    }

    #[test]
    fn each_wrong_property_has_the_specifications_reason() {
        let reason_of = |first: u8, mut body: Vec<u8>| check(first, &mut body).map_err(|e| e.reason);
        let connect = |properties: &[u8]| {
            let head = [0, 4, b'M', b'Q', b'T', b'T', 5, 2, 0, 60, properties.len() as u8];
            [&head, properties, &[0, 1, b'x']].concat()
        };
        let protocol = Err(reason::PROTOCOL_ERROR);
        for (properties, expected) in [
            (&[0x21, 0, 0][..], protocol),
            (&[0x27, 0, 0, 0, 0], protocol),
            (&[0x17, 2], protocol),
            (&[0x19, 2], protocol),
            (&[0x19, 1, 0x19, 1], protocol),
            (&[0x16, 0, 1, 7], protocol),
            (&[0x15, 0, 1, b'm', 0x16, 0, 1, 7], Ok(false)),
            (&[0x26, 0, 1, 0, 0, 1, b'v'], Err(reason::MALFORMED)),
            (&[0x26, 0, 1, b'k', 0, 1, b'v', 0x26, 0, 1, b'k', 0, 1, b'v'], Ok(false)),
            (&[0x21, 0, 1, 0x27, 0, 0, 0, 9, 0x17, 1], Ok(false)),
        ] {
            assert_eq!(reason_of(0x10, connect(properties)), expected, "{properties:02x?}");
        }
        assert_eq!(reason_of(0x30, publish(&[0x03, 0, 1, 0])), Err(reason::MALFORMED));
        assert_eq!(reason_of(0x30, publish(&[0x01, 1, 0x01, 1])), protocol);
        for (options, expected) in [
            (0x03, protocol),
            (0x30, protocol),
            (0x40, Err(reason::MALFORMED)),
            (0x2e, Ok(false)),
        ] {
            assert_eq!(
                reason_of(0x82, vec![0, 1, 0, 0, 1, b'a', options]),
                expected,
                "{options:02x}"
            );
        }
        assert_eq!(reason_of(0x82, vec![0, 1, 0]), protocol);
        assert_eq!(reason_of(0xa2, vec![0, 1, 0]), protocol);
        assert_eq!(reason_of(0x82, vec![0, 1, 2, 0x0b, 0, 0, 1, b'a', 0]), protocol);
    }

    #[test]
    fn an_expiry_of_zero_is_seen_and_written_over() {
        let mut body = publish(&[0x02, 0, 0, 0, 0]);
        assert_eq!(check(0x30, &mut body), Ok(true));
        assert_eq!(body, publish(&[0x02, 0, 0, 0, 1]));
        assert_eq!(check(0x30, &mut body), Ok(false));
    }

    #[test]
    fn nothing_that_is_cut_short_is_read_beyond_its_end() {
        let whole = publish(&[
            0x02, 0, 0, 0, 9, 0x26, 0, 1, b'k', 0, 1, b'v', 0x08, 0, 1, b'r', 0x09, 0, 1, 0,
        ]);
        for first in (0x10..=0xf0).step_by(0x10) {
            for end in 0..whole.len() {
                let _ = check(first, &mut whole[..end].to_vec());
            }
        }
    }
}
