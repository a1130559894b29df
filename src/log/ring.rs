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

    /// What a limit dropped is given to nobody any more.
    pub fn forget(&mut self, stream: u16, from: u64, through: u64) {
        let queue = &mut self.segments[usize::from(stream)];
        let bytes = &mut self.bytes;
        let order = &mut self.order;
        queue.retain(|s| {
            let stays = s.first < from || s.first > through;
            if !stays {
                *bytes -= s.memory_bytes();
                // One entry in the order a segment; which of the stream's goes does not matter.
                if let Some(at) = order.iter().position(|o| *o == stream) {
                    order.remove(at);
                }
            }
            stays
        });
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
