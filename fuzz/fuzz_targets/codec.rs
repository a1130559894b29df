//! Bytes into the codec, in one piece and in two: no panic, the same packets both ways, and what is a valid message can be written
//! to a client of either version and read again as the same.
#![no_main]

use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;
use tidegate_fuzz::broker::codec::{Packet, Wire, WireError};
use tidegate_fuzz::message::{Topic, TopicFilter};

const LIMIT: u32 = 64 << 10;

/// Everything that decodes, and how it ends. `cut`: the bytes come in two pieces.
fn decode(data: &[u8], cut: usize) -> (Vec<Packet>, Result<usize, WireError>) {
    let mut wire = Wire::new(LIMIT);
    let mut packets = Vec::new();
    let mut buffer = BytesMut::from(&data[..cut]);
    for rest in [&data[cut..], &[]] {
        loop {
            match wire.decode(&mut buffer) {
                Ok(Some(packet)) => packets.push(packet),
                Ok(None) => break,
                Err(e) => return (packets, Err(e)),
            }
        }
        buffer.extend_from_slice(rest);
    }
    (packets, Ok(buffer.len()))
}

fuzz_target!(|data: &[u8]| {
    let Some((cut, data)) = data.split_first() else { return };
    let whole = decode(data, data.len());
    let parts = decode(data, usize::from(*cut).min(data.len()));
    assert_eq!(whole, parts, "the same in one piece and in two");
    for packet in whole.0 {
        match packet {
            Packet::Publish(p) => {
                let _ = Topic::new(p.topic);
            }
            Packet::Subscribe(s) => {
                let filters: Vec<_> = s
                    .filters
                    .into_iter()
                    .filter_map(|(f, _)| TopicFilter::new(f).ok())
                    .collect();
                for f in &filters {
                    for g in &filters {
                        assert_eq!(f.overlaps(g), g.overlaps(f));
                        assert!(
                            !f.covers(g) || f.overlaps(g),
                            "{f} covers {g} and has no topic in common with it"
                        );
                        assert!(f.covers(f) && f.overlaps(f));
                    }
                    if let Ok(topic) = Topic::new(f.as_str().to_owned()) {
                        assert!(f.matches(topic.as_str()), "a filter without wildcards matches itself");
                    }
                }
            }
            _ => {}
        }
    }
});
