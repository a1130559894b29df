//! What was committed last, kept in memory. Pure.

use std::collections::VecDeque;
use std::sync::Arc;

use super::RING_BYTES_MAX;
use super::segment::Segment;

/// Committed segments in memory, oldest first, one queue a stream.
#[derive(Default)]
pub struct Ring {
    segments: Vec<VecDeque<Arc<Segment>>>,
    order: VecDeque<u16>,
    bytes: usize,
}

impl Ring {
    pub fn new(streams: usize) -> Ring {
        Ring {
            segments: (0..streams).map(|_| VecDeque::new()).collect(),
            ..Ring::default()
        }
    }

    pub fn push(&mut self, segment: Arc<Segment>) {
        self.bytes += segment.memory_bytes();
        self.order.push_back(segment.stream);
        self.segments[usize::from(segment.stream)].push_back(segment);
        while self.bytes > RING_BYTES_MAX && self.order.len() > 1 {
            let stream = self.order.pop_front().expect("just looked");
            let old = self.segments[usize::from(stream)]
                .pop_front()
                .expect("one entry in the order a segment");
            self.bytes -= old.memory_bytes();
        }
    }

    /// The first segment that has something after the sequence; None where memory does not reach back that far.
    pub fn after(&self, stream: u16, sequence: u64) -> Option<Arc<Segment>> {
        let queue = &self.segments[usize::from(stream)];
        if queue.front()?.first > sequence + 1 {
            return None;
        }
        let index = queue.partition_point(|s| s.last <= sequence);
        queue.get(index).cloned()
    }
}
