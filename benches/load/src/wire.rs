//! The little of MQTT that a load generator needs, as bytes.

pub const CONNECT: u8 = 0x10;
pub const CONNACK: u8 = 0x20;
pub const PUBLISH: u8 = 0x30;
pub const PUBACK: u8 = 0x40;
pub const PUBREC: u8 = 0x50;
pub const PUBREL: u8 = 0x60;
pub const PUBCOMP: u8 = 0x70;
pub const SUBSCRIBE: u8 = 0x80;
pub const SUBACK: u8 = 0x90;
pub const UNSUBSCRIBE: u8 = 0xa0;
pub const UNSUBACK: u8 = 0xb0;
pub const PINGREQ: u8 = 0xc0;
pub const PINGRESP: u8 = 0xd0;
pub const DISCONNECT: u8 = 0xe0;

/// Long enough that no run needs a PINGREQ; rumqttd refuses 0.
const KEEP_ALIVE_S: u16 = 600;

fn put_length(out: &mut Vec<u8>, mut length: usize) {
    loop {
        let byte = (length & 0x7f) as u8;
        length >>= 7;
        if length == 0 {
            out.push(byte);
            return;
        }
        out.push(byte | 0x80);
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// CONNECT of version 3.1.1.
pub fn connect(client_id: &str, clean_session: bool) -> Vec<u8> {
    let mut out = vec![CONNECT];
    put_length(&mut out, 10 + 2 + client_id.len());
    put_text(&mut out, "MQTT");
    out.extend_from_slice(&[4, 2 * u8::from(clean_session)]);
    out.extend_from_slice(&KEEP_ALIVE_S.to_be_bytes());
    put_text(&mut out, client_id);
    out
}

pub fn subscribe(id: u16, filter: &str, qos: u8) -> Vec<u8> {
    let mut out = vec![SUBSCRIBE | 2];
    put_length(&mut out, 2 + 2 + filter.len() + 1);
    out.extend_from_slice(&id.to_be_bytes());
    put_text(&mut out, filter);
    out.push(qos);
    out
}

/// A PUBLISH whose length never changes: only the packet id and the payload are filled in for each message.
pub struct PublishTemplate {
    head: Vec<u8>,
    has_id: bool,
}

impl PublishTemplate {
    pub fn new(topic: &str, qos: u8, payload_bytes: usize) -> PublishTemplate {
        let has_id = qos > 0;
        let mut head = vec![PUBLISH | (qos << 1)];
        put_length(&mut head, 2 + topic.len() + if has_id { 2 } else { 0 } + payload_bytes);
        put_text(&mut head, topic);
        PublishTemplate { head, has_id }
    }

    /// The payload is `stamp` followed by `rest`.
    pub fn put(&self, out: &mut Vec<u8>, id: u16, stamp: u64, rest: &[u8]) {
        out.extend_from_slice(&self.head);
        if self.has_id {
            out.extend_from_slice(&id.to_be_bytes());
        }
        out.extend_from_slice(&stamp.to_le_bytes());
        out.extend_from_slice(rest);
    }
}

/// Calls `each` with the first byte and the body of every whole packet in `bytes`; returns how many bytes that was.
pub fn packets(bytes: &[u8], mut each: impl FnMut(u8, &[u8])) -> usize {
    let mut at = 0;
    loop {
        let rest = &bytes[at..];
        let mut length = 0usize;
        let mut head = 1;
        loop {
            let Some(&byte) = rest.get(head) else { return at };
            length |= usize::from(byte & 0x7f) << (7 * (head - 1));
            head += 1;
            if byte & 0x80 == 0 || head > 4 {
                break;
            }
        }
        let Some(body) = rest.get(head..head + length) else {
            return at;
        };
        each(rest[0], body);
        at += head + length;
    }
}

/// A received PUBLISH: quality of service, packet id (0 at QoS 0) and the first 8 bytes of its payload.
pub struct Received {
    pub qos: u8,
    pub id: u16,
    pub stamp: Option<u64>,
}

/// None: the packet is shorter than its own lengths say. `v5`: properties stand before the payload.
pub fn received(first: u8, body: &[u8], v5: bool) -> Option<Received> {
    let qos = (first >> 1) & 3;
    let topic_bytes = usize::from(u16::from_be_bytes([*body.first()?, *body.get(1)?]));
    let mut at = 2 + topic_bytes;
    let mut id = 0;
    if qos > 0 {
        id = u16::from_be_bytes([*body.get(at)?, *body.get(at + 1)?]);
        at += 2;
    }
    if v5 {
        let (mut length, mut shift) = (0usize, 0);
        loop {
            let byte = *body.get(at)?;
            at += 1;
            length |= usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 == 0 || shift > 21 {
                break;
            }
        }
        at += length;
    }
    let payload = body.get(at..)?;
    let stamp = payload.first_chunk::<8>().map(|bytes| u64::from_le_bytes(*bytes));
    Some(Received { qos, id, stamp })
}

/// Payload bytes that no compressor shrinks: a window that moves on by more than a message each time.
pub struct Noise {
    bytes: Vec<u8>,
    at: usize,
}

impl Noise {
    const POOL_BYTES: usize = 1 << 20;

    pub fn new() -> Noise {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let bytes = (0..Self::POOL_BYTES / 8)
            .flat_map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
            })
            .collect();
        Noise { bytes, at: 0 }
    }

    pub fn next(&mut self, length: usize) -> &[u8] {
        if self.at + length > self.bytes.len() {
            // Not 0: the second turn must not repeat the first one's windows.
            self.at = (self.at + length) % 61;
        }
        let from = self.at;
        self.at += length + 1;
        &self.bytes[from..from + length]
    }
}
