//! A segment: the messages of one group commit in one stream, as one blob. Pure.
//!
//! Its summary is a Bloom filter over the levels of its topics, so that a consumer with a narrow filter passes over a
//! segment without reading the body. The stored body begins with a header that is checked on the way in and out:
//! format (1 byte), codec (1 byte), raw length (u32), CRC-32 of the raw bytes (u32), little endian.

use std::hash::{Hash, Hasher};

use bytes::Bytes;

use super::record::{self, Damaged, MessageRef, Previous};
use crate::message::{Message, Sequence, TopicFilter};

/// A segment is closed when it reaches this size; one larger message has a segment for itself.
pub const SEGMENT_BYTES_MAX: usize = 256 * 1024;
/// Below this many messages compression gains nothing (measured: ARCHITECTURE.md, "Segments").
const COMPRESS_FROM: u32 = 16;
/// What a segment costs on disk beside its records: row header, summary, body header.
pub const SEGMENT_OVERHEAD_BYTES: u64 = 64;

const FORMAT: u8 = 1;
const RAW: u8 = 0;
const LZ4: u8 = 1;
const HEADER_BYTES: usize = 10;

/// The segment being filled.
#[derive(Debug, Default)]
pub struct Builder {
    raw: Vec<u8>,
    previous: Previous,
    pub first: u64,
    pub last: u64,
    pub count: u32,
    pub oldest: i64,
    pub newest: i64,
    summary: Summary,
}

impl Builder {
    pub fn with_buffer(mut buffer: Vec<u8>) -> Builder {
        buffer.clear();
        Builder {
            raw: buffer,
            ..Builder::default()
        }
    }

    pub fn push(&mut self, sequence: Sequence, message: &MessageRef<'_>) {
        debug_assert!(sequence.0 > self.last, "sequences rise");
        let received = message.received.millis();
        if self.count == 0 {
            self.first = sequence.0;
            self.oldest = received;
            self.newest = received;
        }
        self.last = sequence.0;
        self.count += 1;
        self.oldest = self.oldest.min(received);
        self.newest = self.newest.max(received);
        self.summary.add(message.topic);
        record::encode(&mut self.raw, &mut self.previous, sequence, message);
    }

    pub fn is_full(&self) -> bool {
        self.raw.len() >= SEGMENT_BYTES_MAX
    }

    pub fn bytes(&self) -> usize {
        self.raw.len()
    }

    /// The stored body, and the segment to keep in memory.
    pub fn finish(mut self, stream: u16, compressor: &mut Compressor) -> (Segment, Vec<u8>) {
        assert!(self.count > 0, "an empty segment is never stored");
        let body = encode_body(&self.raw, self.count, compressor);
        self.raw.shrink_to_fit();
        let segment = Segment {
            stream,
            first: self.first,
            last: self.last,
            count: self.count,
            bytes: self.raw.len() as u64 + SEGMENT_OVERHEAD_BYTES,
            oldest: self.oldest,
            newest: self.newest,
            summary: self.summary,
            raw: self.raw.into(),
        };
        (segment, body)
    }
}

/// LZ4 with a buffer that is made once, and with the memory of what did not compress: data that saves less than an eighth
/// (already compressed, encrypted, random) is stored as it is, and only each thirty-second segment after it is tried.
#[derive(Debug, Default)]
pub struct Compressor {
    out: Vec<u8>,
    pass_over: u32,
}

const TRY_AGAIN_AFTER: u32 = 31;

impl Compressor {
    fn compress(&mut self, raw: &[u8], count: u32) -> Option<&[u8]> {
        if count < COMPRESS_FROM {
            return None;
        }
        if self.pass_over > 0 {
            self.pass_over -= 1;
            return None;
        }
        let most = lz4_flex::block::get_maximum_output_size(raw.len());
        if self.out.len() < most {
            self.out.resize(most, 0);
        }
        // The buffer has the size that the library asks for, so this cannot fail; if it did, raw is right too.
        let written = lz4_flex::block::compress_into(raw, &mut self.out).ok()?;
        if written > raw.len() - raw.len() / 8 {
            self.pass_over = TRY_AGAIN_AFTER;
            return None;
        }
        Some(&self.out[..written])
    }
}

fn encode_body(raw: &[u8], count: u32, compressor: &mut Compressor) -> Vec<u8> {
    let (codec, stored) = match compressor.compress(raw, count) {
        Some(stored) => (LZ4, stored),
        None => (RAW, raw),
    };
    let mut body = Vec::with_capacity(HEADER_BYTES + stored.len());
    body.push(FORMAT);
    body.push(codec);
    body.extend_from_slice(
        &u32::try_from(raw.len())
            .expect("a packet is at most 256 MiB")
            .to_le_bytes(),
    );
    body.extend_from_slice(&crc32fast::hash(raw).to_le_bytes());
    body.extend_from_slice(stored);
    body
}

/// A segment that is on disk, its records in memory.
#[derive(Debug, Clone)]
pub struct Segment {
    pub stream: u16,
    pub first: u64,
    pub last: u64,
    pub count: u32,
    /// What it counts for in the stream's limit.
    pub bytes: u64,
    pub oldest: i64,
    pub newest: i64,
    pub summary: Summary,
    raw: Bytes,
}

impl Segment {
    pub fn records(&self) -> record::Reader {
        record::Reader::new(self.raw.clone())
    }

    /// The messages after a sequence, decoded; damage inside ends the segment early and is said so.
    pub fn messages_after(&self, after: u64) -> (Vec<Message>, Result<(), Damaged>) {
        let mut reader = self.records();
        let mut messages = Vec::new();
        loop {
            match reader.read() {
                Ok(Some(m)) if m.sequence.0 > after => messages.push(m),
                Ok(Some(_)) => {}
                Ok(None) => return (messages, Ok(())),
                Err(damaged) => return (messages, Err(damaged)),
            }
        }
    }

    pub fn memory_bytes(&self) -> usize {
        self.raw.len() + self.summary.0.len() * 8 + 128
    }
}

/// The columns of a stored segment but its body.
#[derive(Debug, Clone)]
pub struct Header {
    pub stream: u16,
    pub first: u64,
    pub last: u64,
    pub count: u32,
    pub bytes: u64,
    pub oldest: i64,
    pub newest: i64,
    pub summary: Summary,
}

impl Header {
    pub fn open(self, body: &[u8]) -> Result<Segment, Damaged> {
        let (header, stored) = body.split_at_checked(HEADER_BYTES).ok_or(Damaged)?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (raw_bytes, crc) = (word(2) as usize, word(6));
        if header[0] != FORMAT || raw_bytes as u64 + SEGMENT_OVERHEAD_BYTES != self.bytes {
            return Err(Damaged);
        }
        let raw = match header[1] {
            RAW => stored.to_vec(),
            LZ4 => lz4_flex::block::decompress(stored, raw_bytes).map_err(|_| Damaged)?,
            _ => return Err(Damaged),
        };
        if raw.len() != raw_bytes || crc32fast::hash(&raw) != crc {
            return Err(Damaged);
        }
        Ok(Segment {
            stream: self.stream,
            first: self.first,
            last: self.last,
            count: self.count,
            bytes: self.bytes,
            oldest: self.oldest,
            newest: self.newest,
            summary: self.summary,
            raw: raw.into(),
        })
    }
}

/// Which topics are in a segment: a Bloom filter over (place, level) of each topic. False positives only.
///
/// It grows by doubling up to 512 bytes; while it is small it keeps the distinct hashes themselves, which makes the
/// common segment (a few topics) exact and a few dozen bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary(Vec<u64>, LastTopic);

/// The topic added last, by hash: the same topic again costs one comparison.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct LastTopic(u64);

/// Up to this many distinct (place, level) hashes are kept as they are; from there on a Bloom filter of 64 words.
const EXACT_MAX: usize = 24;
const BLOOM_WORDS: usize = 64;

fn hash_level(place: usize, level: &str) -> u64 {
    let mut hasher = Fnv(0xcbf2_9ce4_8422_2325 ^ (place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    level.hash(&mut hasher);
    // Never 0, so that an empty slot cannot be taken for a level.
    hasher.finish() | 1
}

/// FNV-1a: stored on disk, so it must not change between versions as the standard library's hasher may.
struct Fnv(u64);

impl Hasher for Fnv {
    fn finish(&self) -> u64 {
        let mut h = self.0;
        h ^= h >> 32;
        h = h.wrapping_mul(0xd6e8_feb8_6659_fd93);
        h ^ (h >> 32)
    }

    fn write(&mut self, bytes: &[u8]) {
        for b in bytes {
            self.0 = (self.0 ^ u64::from(*b)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
}

impl Summary {
    fn add(&mut self, topic: &str) {
        let mut whole = Fnv(0xcbf2_9ce4_8422_2325);
        whole.write(topic.as_bytes());
        let whole = LastTopic(whole.finish() | 1);
        if whole == self.1 {
            return;
        }
        self.1 = whole;
        for (place, level) in topic.split('/').enumerate() {
            self.insert(hash_level(place, level));
        }
    }

    fn is_bloom(&self) -> bool {
        self.0.len() == BLOOM_WORDS
    }

    fn insert(&mut self, hash: u64) {
        if self.is_bloom() {
            self.set(hash);
        } else if !self.0.contains(&hash) {
            if self.0.len() < EXACT_MAX {
                self.0.push(hash);
            } else {
                let exact = std::mem::replace(&mut self.0, vec![0; BLOOM_WORDS]);
                exact.into_iter().for_each(|h| self.set(h));
                self.set(hash);
            }
        }
    }

    fn bits(hash: u64) -> [(usize, u64); 3] {
        [0, 16, 32].map(|shift| {
            let bit = (hash >> shift) as usize % (BLOOM_WORDS * 64);
            (bit / 64, 1 << (bit % 64))
        })
    }

    fn set(&mut self, hash: u64) {
        for (word, bit) in Self::bits(hash) {
            self.0[word] |= bit;
        }
    }

    fn contains(&self, hash: u64) -> bool {
        if self.is_bloom() {
            Self::bits(hash).iter().all(|(word, bit)| self.0[*word] & bit != 0)
        } else {
            self.0.contains(&hash)
        }
    }

    /// False where no topic in the segment can match the filter.
    pub fn may_match(&self, filter: &TopicFilter) -> bool {
        filter
            .levels()
            .enumerate()
            .filter(|(_, level)| *level != "+" && *level != "#")
            .all(|(place, level)| self.contains(hash_level(place, level)))
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Summary, Damaged> {
        let (words, rest) = bytes.as_chunks::<8>();
        if !rest.is_empty() || words.len() > BLOOM_WORDS {
            return Err(Damaged);
        }
        Ok(Summary(
            words.iter().map(|w| u64::from_le_bytes(*w)).collect(),
            LastTopic::default(),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::message::{Qos, Source};

    fn build(topics: &[String]) -> (Segment, Vec<u8>) {
        let source: Source = "client:a".into();
        let mut builder = Builder::default();
        for (i, topic) in topics.iter().enumerate() {
            builder.push(
                Sequence(100 + i as u64),
                &MessageRef {
                    topic,
                    payload: format!("payload {i}").as_bytes(),
                    qos: Qos::AtLeastOnce,
                    retain: false,
                    properties: None,
                    source: &source,
                    received: Timestamp::from_millis(5_000 - i as i64),
                },
            );
        }
        builder.finish(3, &mut Compressor::default())
    }

    fn header(s: &Segment) -> Header {
        Header {
            stream: s.stream,
            first: s.first,
            last: s.last,
            count: s.count,
            bytes: s.bytes,
            oldest: s.oldest,
            newest: s.newest,
            summary: Summary::from_bytes(&s.summary.to_bytes()).expect("sound"),
        }
    }

    #[test]
    fn small_and_compressed_segments_come_back_whole() {
        for count in [1, 15, 16, 500] {
            let topics: Vec<String> = (0..count).map(|i| format!("plant/line-{}/t", i % 7)).collect();
            let (segment, body) = build(&topics);
            assert_eq!(
                (segment.first, segment.last, segment.count),
                (100, 99 + count, count as u32)
            );
            assert_eq!((segment.oldest, segment.newest), (5_001 - count as i64, 5_000));
            let opened = header(&segment).open(&body).expect("sound");
            let (messages, end) = opened.messages_after(0);
            assert_eq!(end, Ok(()));
            assert_eq!(messages.iter().map(|m| m.topic.as_str()).collect::<Vec<_>>(), topics);
            assert_eq!(opened.messages_after(98 + count).0.len(), 1);
            if count == 500 {
                assert!(body.len() < opened.raw.len() / 2, "lz4 halves ordinary telemetry");
            }
        }
    }

    #[test]
    fn what_does_not_compress_is_stored_as_it_is_and_seldom_tried() {
        let mut noise = 1u64;
        let random: Vec<u8> = (0..40_000)
            .map(|_| {
                noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (noise >> 33) as u8
            })
            .collect();
        let text = b"temperature ".repeat(1_000);
        let mut compressor = Compressor::default();
        assert_eq!(encode_body(&random, 100, &mut compressor)[1], RAW);
        for _ in 0..TRY_AGAIN_AFTER {
            assert_eq!(encode_body(&text, 100, &mut compressor)[1], RAW, "passed over");
        }
        let body = encode_body(&text, 100, &mut compressor);
        assert_eq!((body[1], body.len() < text.len() / 10), (LZ4, true));
        assert_eq!(
            encode_body(&text, COMPRESS_FROM - 1, &mut compressor)[1],
            RAW,
            "too few messages"
        );
    }

    #[test]
    fn every_flipped_bit_of_the_body_is_found() {
        for count in [1, 40] {
            let topics: Vec<String> = (0..count).map(|i| format!("t/{i}")).collect();
            let (segment, body) = build(&topics);
            for at in 0..body.len() {
                let mut bad = body.clone();
                bad[at] ^= 0x10;
                match header(&segment).open(&bad) {
                    Err(Damaged) => {}
                    Ok(opened) => assert_eq!(
                        opened.raw, segment.raw,
                        "a bit that decompression ignores changes nothing"
                    ),
                }
            }
        }
    }

    #[test]
    fn the_summary_never_denies_what_is_there() {
        for distinct in [1, 8, 30, 2_000] {
            let topics: Vec<String> = (0..distinct).map(|i| format!("plant/line-{i}/temperature")).collect();
            let (segment, _) = build(&topics);
            let filter = |t: String| TopicFilter::new(t).expect("valid");
            for i in 0..distinct {
                assert!(segment.summary.may_match(&filter(format!("plant/line-{i}/#"))));
                assert!(segment.summary.may_match(&filter(format!("+/line-{i}/temperature"))));
            }
            assert!(segment.summary.may_match(&filter("#".into())));
            assert!(!segment.summary.may_match(&filter("factory/#".into())));
            let wrong = (0..1_000)
                .filter(|i| segment.summary.may_match(&filter(format!("plant/other-{i}/#"))))
                .count();
            // Exact while small; a full filter (2,000 topics in 4,096 bits) tells little and may.
            assert!(wrong == 0 || distinct == 2_000, "{wrong} of 1,000 at {distinct} topics");
        }
    }
}
