//! Which requests read the points of one poll, and what is learned where a device refuses one. Pure.
//!
//! Points that lie near each other are read in one request. A device that refuses a block (it has a register less than
//! its manual, or takes smaller blocks) is asked in ever smaller parts within the same poll, so that only a point that
//! is absent is bad; where to part is remembered, for [`FORGET_AFTER`], so that the next polls need no refusal.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use crate::clock::Instant;
use crate::config::{ModbusLine, Table};

/// A device that was mended or set up anew is read in whole blocks again after so long.
const FORGET_AFTER: Duration = Duration::from_secs(600);
/// Requests that one poll may spend on finding out what is refused; the rest waits for the next poll.
const PARTS_MAX: usize = 32;
/// Points that are known to be absent and asked for again in one poll.
const PROBES_MAX: usize = 4;
/// What is remembered of one unit; beyond, it is forgotten and learned anew.
const REMEMBERED_MAX: usize = 20_000;

/// Some registers or bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    pub table: Table,
    pub start: u16,
    pub count: u16,
}

#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub gap: u16,
    pub registers_max: u16,
    pub bits_max: u16,
    /// Full blocks that follow each other differ in length: on a serial line nothing else tells their answers apart.
    pub alternate: bool,
}

/// One request, and the points that it answers: those of [`Plan::points`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    pub span: Span,
    pub parts: std::ops::Range<usize>,
}

/// The requests of one poll.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// The different spans in the order of their addresses, and where in `points` those that lie there begin.
    spans: Vec<(Span, u32)>,
    /// Which points of the poll, by span: flat, because there are plans of thousands of points.
    points: Vec<u32>,
    pub blocks: Vec<Block>,
    /// Indices of spans that the device is known to refuse, and with which exception.
    pub absent: Vec<(usize, u8)>,
}

/// What a unit refused.
#[derive(Debug, Default)]
pub struct Memory {
    absent: BTreeMap<Span, u8>,
    /// A block ends before each of these spans.
    cuts: BTreeSet<Span>,
    learned: Option<Instant>,
    /// Changes with what is remembered.
    pub generation: u64,
    /// The absent span that was asked for last.
    probed: Option<Span>,
}

/// One poll at work: which request is next, as the answers come.
#[derive(Debug)]
pub struct Poll<'p> {
    plan: &'p Plan,
    queue: VecDeque<(Block, Option<usize>)>,
    /// Blocks that were refused: what is open of each, the cuts made for it, whether something absent was found.
    refused: Vec<Refused>,
    parts: usize,
}

#[derive(Debug)]
struct Refused {
    open: usize,
    cuts: Vec<Span>,
    found_absent: bool,
}

/// What a refused block comes to.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It, or its parts, are asked for next.
    Parted,
    /// It is one point, or several at the same place: it is absent.
    Absent,
    /// The poll has spent what it may; the next one goes on.
    Later,
}

impl Limits {
    pub fn of(line: &ModbusLine) -> Limits {
        Limits {
            gap: line.gap,
            registers_max: line.registers_max,
            bits_max: line.bits_max,
            alternate: line.wire.is_serial(),
        }
    }

    pub fn max(&self, table: Table) -> u16 {
        if table.is_bits() {
            self.bits_max
        } else {
            self.registers_max
        }
    }

    /// What the nth block of a plan may read.
    fn max_of(&self, table: Table, nth: usize) -> u16 {
        let (max, step) = (self.max(table), if table.is_bits() { 8 } else { 1 });
        match self.alternate && nth % 2 == 1 && max > 8 {
            true => max - step,
            false => max,
        }
    }
}

impl Span {
    pub fn end(&self) -> u32 {
        u32::from(self.start) + u32::from(self.count)
    }

    fn covers(&self, other: &Span) -> bool {
        self.table == other.table && self.start <= other.start && self.end() >= other.end()
    }

    /// From the start of one to the end of the other.
    fn with(&self, other: &Span) -> Span {
        let start = self.start.min(other.start);
        let count = self.end().max(other.end()) - u32::from(start);
        Span {
            table: self.table,
            start,
            count: u16::try_from(count).unwrap_or(u16::MAX),
        }
    }
}

impl Plan {
    /// `places` are those of the poll's points.
    pub fn new(places: &[Span], memory: &Memory, limits: Limits) -> Plan {
        let mut sorted: Vec<(Span, u32)> = places.iter().copied().zip(0..).collect();
        sorted.sort_unstable();
        let mut plan = Plan {
            points: sorted.iter().map(|(_, point)| *point).collect(),
            ..Plan::default()
        };
        for ((span, _), at) in sorted.iter().zip(0..) {
            if plan.spans.last().is_none_or(|(last, _)| last != span) {
                plan.spans.push((*span, at));
            }
        }
        plan.spans.shrink_to_fit();
        let mut open: Option<Block> = None;
        for (nth, (span, _)) in plan.spans.iter().enumerate() {
            if let Some(code) = memory.absent.get(span) {
                plan.absent.push((nth, *code));
                plan.blocks.extend(open.take());
                continue;
            }
            let alone = Block {
                span: *span,
                parts: nth..nth + 1,
            };
            match &mut open {
                Some(block) if memory.allows(&block.span, span, limits, plan.blocks.len()) => {
                    block.span = block.span.with(span);
                    block.parts.end = nth + 1;
                }
                _ => plan.blocks.extend(open.replace(alone)),
            }
        }
        plan.blocks.extend(open);
        plan
    }

    /// The points that lie in these of its spans.
    pub fn points(&self, parts: std::ops::Range<usize>) -> impl Iterator<Item = usize> {
        let at = |part: usize| self.spans.get(part).map_or(self.points.len(), |(_, at)| *at as usize);
        self.points[at(parts.start)..at(parts.end)]
            .iter()
            .map(|point| *point as usize)
    }
}

impl Memory {
    /// Whether a block may grow to cover this span too.
    fn allows(&self, block: &Span, next: &Span, limits: Limits, nth: usize) -> bool {
        let merged = block.with(next);
        block.table == next.table
            && u32::from(next.start) <= block.end() + u32::from(limits.gap)
            && merged.end() - u32::from(merged.start) <= u32::from(limits.max_of(next.table, nth))
            && !self.cuts.contains(next)
            && !self.absent.keys().any(|absent| merged.covers(absent))
    }

    fn changed(&mut self, now: Instant) {
        self.generation += 1;
        self.learned.get_or_insert(now);
        if self.absent.len() + self.cuts.len() > REMEMBERED_MAX {
            self.forget();
        }
    }

    pub fn forget(&mut self) {
        if self.learned.take().is_some() {
            self.absent.clear();
            self.cuts.clear();
            self.generation += 1;
        }
    }

    /// To be called before a poll is planned.
    pub fn forget_old(&mut self, now: Instant) {
        if self.learned.is_some_and(|at| now.duration_since(at) >= FORGET_AFTER) {
            self.forget();
        }
    }

    /// Which of the absent spans are asked for again: a few in turn.
    pub fn probes(&mut self, plan: &Plan) -> Vec<usize> {
        let all = &plan.absent;
        let from = all.iter().position(|(nth, _)| Some(plan.spans[*nth].0) > self.probed);
        let from = from.unwrap_or(0);
        let chosen: Vec<usize> = (0..all.len().min(PROBES_MAX))
            .map(|n| all[(from + n) % all.len()].0)
            .collect();
        self.probed = chosen.last().map(|nth| plan.spans[*nth].0);
        chosen
    }
}

impl<'p> Poll<'p> {
    pub fn new(plan: &'p Plan, probes: &[usize]) -> Poll<'p> {
        let probe = |nth: &usize| Block {
            span: plan.spans[*nth].0,
            parts: *nth..nth + 1,
        };
        let blocks = plan.blocks.iter().cloned().chain(probes.iter().map(probe));
        Poll {
            plan,
            queue: blocks.map(|block| (block, None)).collect(),
            refused: Vec::new(),
            parts: 0,
        }
    }

    /// The next request, with a number to tell of its outcome.
    pub fn next(&mut self) -> Option<(Block, Option<usize>)> {
        self.queue.pop_front()
    }

    pub fn answered(&mut self, block: &Block, of: Option<usize>, memory: &mut Memory, now: Instant) {
        if block.parts.len() == 1 && memory.absent.remove(&self.plan.spans[block.parts.start].0).is_some() {
            memory.changed(now);
        }
        self.closed(of, memory, now);
    }

    /// The device refused the block for its address or its length.
    pub fn refused(
        &mut self,
        block: &Block,
        of: Option<usize>,
        code: u8,
        memory: &mut Memory,
        now: Instant,
    ) -> Verdict {
        if block.parts.len() == 1 {
            let span = self.plan.spans[block.parts.start].0;
            if memory.absent.insert(span, code) != Some(code) {
                memory.changed(now);
            }
            if let Some(of) = of {
                self.refused[of].found_absent = true;
            }
            self.closed(of, memory, now);
            return Verdict::Absent;
        }
        if self.parts >= PARTS_MAX {
            // Cuts stay, so that the next poll begins with smaller blocks.
            if let Some(of) = of {
                self.refused[of].cuts.clear();
            }
            self.closed(of, memory, now);
            return Verdict::Later;
        }
        let Some(of) = of else {
            // Once more as a whole: what a disturbed device says once is nothing to learn from.
            self.refused.push(Refused {
                open: 1,
                cuts: Vec::new(),
                found_absent: false,
            });
            self.queue.push_front((block.clone(), Some(self.refused.len() - 1)));
            return Verdict::Parted;
        };
        let parts = self.parted(block);
        for part in &parts[1..] {
            let first = self.plan.spans[part.parts.start].0;
            let is_gap = u32::from(first.start) > self.end_before(block.parts.start..part.parts.start);
            // What is read for nothing is the first suspect and stays unread; a cut between neighbours is only kept
            // where nothing absent explains the refusal.
            if memory.cuts.insert(first) && !is_gap {
                self.refused[of].cuts.push(first);
            }
        }
        memory.changed(now);
        self.parts += parts.len();
        self.refused[of].open += parts.len();
        for part in parts.into_iter().rev() {
            self.queue.push_front((part, Some(of)));
        }
        self.closed(Some(of), memory, now);
        Verdict::Parted
    }

    /// Neither answered nor refused for its address: nothing is learned.
    pub fn failed(&mut self, of: Option<usize>, memory: &mut Memory, now: Instant) {
        self.closed(of, memory, now);
    }

    fn closed(&mut self, of: Option<usize>, memory: &mut Memory, now: Instant) {
        let Some(refused) = of.map(|of| &mut self.refused[of]) else {
            return;
        };
        refused.open -= 1;
        if refused.open == 0 && refused.found_absent && !refused.cuts.is_empty() {
            for cut in refused.cuts.drain(..) {
                memory.cuts.remove(&cut);
            }
            memory.changed(now);
        }
    }

    fn end_before(&self, parts: std::ops::Range<usize>) -> u32 {
        self.plan.spans[parts].iter().map(|(s, _)| s.end()).max().unwrap_or(0)
    }

    /// At its gaps, or, where it has none, in the middle.
    fn parted(&self, block: &Block) -> Vec<Block> {
        let spans = &self.plan.spans;
        let mut starts = vec![block.parts.start];
        for (nth, (span, _)) in spans
            .iter()
            .enumerate()
            .take(block.parts.end)
            .skip(block.parts.start + 1)
        {
            if u32::from(span.start) > self.end_before(block.parts.start..nth) {
                starts.push(nth);
            }
        }
        if starts.len() == 1 {
            starts.push(block.parts.start + block.parts.len() / 2);
        }
        let ends = starts.iter().skip(1).copied().chain([block.parts.end]);
        let part = |(from, to): (usize, usize)| {
            let first = spans[from].0;
            Block {
                span: spans[from..to].iter().fold(first, |span, (next, _)| span.with(next)),
                parts: from..to,
            }
        };
        starts.iter().copied().zip(ends).map(part).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    const LIMITS: Limits = Limits {
        gap: 8,
        registers_max: 125,
        bits_max: 2_000,
        alternate: false,
    };

    fn holding(start: u16, count: u16) -> Span {
        Span {
            table: Table::Holding,
            start,
            count,
        }
    }

    /// A device that has some registers and takes blocks of some length.
    struct Device {
        absent: Vec<(Table, u16)>,
        max: u16,
        requests: Vec<Span>,
    }

    impl Device {
        fn without(absent: &[u16]) -> Device {
            Device {
                absent: absent.iter().map(|a| (Table::Holding, *a)).collect(),
                max: 2_000,
                requests: Vec::new(),
            }
        }

        fn answers(&self, span: &Span) -> bool {
            let has =
                |(table, at): &(Table, u16)| *table == span.table && *at >= span.start && u32::from(*at) < span.end();
            span.count <= self.max && !self.absent.iter().any(has)
        }

        /// Which points were read, were absent, or have to wait.
        fn poll(&mut self, places: &[Span], memory: &mut Memory, now: Instant) -> Vec<Option<Verdict>> {
            self.requests.clear();
            memory.forget_old(now);
            let plan = Plan::new(places, memory, LIMITS);
            let probes = memory.probes(&plan);
            let mut outcome: Vec<Option<Verdict>> = places.iter().map(|_| Some(Verdict::Absent)).collect();
            let mut poll = Poll::new(&plan, &probes);
            while let Some((block, of)) = poll.next() {
                self.requests.push(block.span);
                assert!(block.span.count <= LIMITS.max(block.span.table) || block.parts.len() == 1);
                assert!(self.requests.len() <= places.len() + 2 * PARTS_MAX + PROBES_MAX + 64);
                let points = plan.points(block.parts.clone());
                if self.answers(&block.span) {
                    poll.answered(&block, of, memory, now);
                    points.for_each(|p| outcome[p] = None);
                    continue;
                }
                match poll.refused(&block, of, 2, memory, now) {
                    Verdict::Parted => {}
                    verdict @ (Verdict::Absent | Verdict::Later) => {
                        let later = verdict == Verdict::Later;
                        points.for_each(|p| outcome[p] = Some(if later { Verdict::Later } else { Verdict::Absent }));
                    }
                }
            }
            outcome
        }
    }

    #[test]
    fn neighbours_are_read_together() {
        let plan = |places: &[Span]| {
            let plan = Plan::new(places, &Memory::default(), LIMITS);
            plan.blocks.iter().map(|b| b.span).collect::<Vec<_>>()
        };
        let contiguous: Vec<_> = (0..300).map(|n| holding(n, 1)).collect();
        assert_eq!(
            plan(&contiguous),
            [holding(0, 125), holding(125, 125), holding(250, 50)]
        );
        let alternate = Limits {
            alternate: true,
            ..LIMITS
        };
        let serial = Plan::new(&contiguous, &Memory::default(), alternate);
        let spans: Vec<_> = serial.blocks.iter().map(|b| b.span).collect();
        assert_eq!(spans, [holding(0, 125), holding(125, 124), holding(249, 51)]);
        // The gap, just and just not.
        assert_eq!(plan(&[holding(0, 2), holding(10, 1)]), [holding(0, 11)]);
        assert_eq!(plan(&[holding(0, 2), holding(11, 1)]), [holding(0, 2), holding(11, 1)]);
        // A value is never torn apart.
        let wide: Vec<_> = (0..40).map(|n| holding(n * 4, 4)).collect();
        assert_eq!(plan(&wide), [holding(0, 124), holding(124, 36)]);
        // Places that overlap, in any order, and other tables.
        let coil = Span {
            table: Table::Coil,
            start: 4,
            count: 1,
        };
        let mixed = [holding(6, 1), coil, holding(4, 4), holding(65_535, 1), holding(4, 1)];
        assert_eq!(plan(&mixed), [coil, holding(4, 4), holding(65_535, 1)]);
    }

    /// MB-03
    #[test]
    fn only_what_is_absent_is_bad_and_the_rest_is_read_in_blocks_again() {
        let now = clock::monotonic();
        let places: Vec<_> = [10, 11, 12, 13].map(|n| holding(n, 1)).to_vec();
        let mut device = Device::without(&[11]);
        let mut memory = Memory::default();
        let good = |outcome: &[Option<Verdict>]| outcome.iter().map(Option::is_none).collect::<Vec<_>>();
        assert_eq!(good(&device.poll(&places, &mut memory, now)), [true, false, true, true]);
        assert_eq!(device.requests.len(), 6, "{:?}", device.requests);
        assert_eq!(good(&device.poll(&places, &mut memory, now)), [true, false, true, true]);
        assert_eq!(device.requests, [holding(10, 1), holding(12, 2), holding(11, 1)]);
        // It is there now.
        device.absent.clear();
        assert_eq!(good(&device.poll(&places, &mut memory, now)), [true; 4]);
        device.poll(&places, &mut memory, now);
        assert_eq!(device.requests, [holding(10, 4)]);
    }

    #[test]
    fn what_is_read_for_nothing_is_the_first_suspect() {
        let now = clock::monotonic();
        let places = [holding(10, 1), holding(12, 1), holding(13, 1)];
        let mut device = Device::without(&[11]);
        let mut memory = Memory::default();
        assert_eq!(device.poll(&places, &mut memory, now), [None, None, None]);
        let parted = [holding(10, 4), holding(10, 4), holding(10, 1), holding(12, 2)];
        assert_eq!(device.requests, parted);
        device.poll(&places, &mut memory, now);
        assert_eq!(device.requests, [holding(10, 1), holding(12, 2)], "kept");
        device.poll(&places, &mut memory, now + FORGET_AFTER);
        assert_eq!(device.requests.len(), 4, "tried again after a while");
    }

    #[test]
    fn what_is_refused_once_is_nothing_to_learn_from() {
        let now = clock::monotonic();
        let mut memory = Memory::default();
        let plan = Plan::new(&[holding(0, 1), holding(1, 1)], &memory, LIMITS);
        let mut poll = Poll::new(&plan, &[]);
        let (block, of) = poll.next().expect("one block");
        assert_eq!(poll.refused(&block, of, 2, &mut memory, now), Verdict::Parted);
        let (block, of) = poll.next().expect("the same again");
        assert_eq!(block, plan.blocks[0]);
        poll.answered(&block, of, &mut memory, now);
        assert!(poll.next().is_none() && memory.generation == 0);
    }

    #[test]
    fn a_device_that_takes_small_blocks_gets_small_blocks() {
        let now = clock::monotonic();
        let places: Vec<_> = (0..125).map(|n| holding(n, 1)).collect();
        let mut device = Device::without(&[]);
        device.max = 40;
        let mut memory = Memory::default();
        assert!(device.poll(&places, &mut memory, now).iter().all(Option::is_none));
        assert_eq!(device.requests.len(), 8);
        device.poll(&places, &mut memory, now);
        assert_eq!(device.requests.len(), 4, "{:?}", device.requests);
    }

    #[test]
    fn a_device_that_has_nothing_costs_a_bounded_number_of_requests() {
        let now = clock::monotonic();
        let places: Vec<_> = (0..2_000).map(|n| holding(n, 1)).collect();
        let mut device = Device::without(&(0..2_000).collect::<Vec<_>>());
        let mut memory = Memory::default();
        let mut polls = 0;
        while memory.absent.len() < places.len() {
            device.poll(&places, &mut memory, now);
            assert!(
                device.requests.len() <= 16 + 2 * PARTS_MAX + 64,
                "{}",
                device.requests.len()
            );
            polls += 1;
            assert!(polls < 400);
        }
        device.poll(&places, &mut memory, now);
        assert_eq!(device.requests.len(), PROBES_MAX);
        // All come back, in turn.
        device.absent.clear();
        for _ in 0..places.len() / PROBES_MAX {
            device.poll(&places, &mut memory, now);
        }
        assert!(device.poll(&places, &mut memory, now).iter().all(Option::is_none));
    }

    /// Random points of random devices: each point is read where the device has it, no request is above the limits, and
    /// after some polls none is refused but those that look for what was absent.
    #[test]
    fn whatever_the_device_has_is_read() {
        let mut seed = 0x1234_5678_9abc_def0u64;
        let mut random = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for round in 0..400 {
            let now = clock::monotonic();
            let tables = [Table::Holding, Table::Input, Table::Coil];
            let mut places: Vec<Span> = (0..1 + random(150))
                .map(|_| {
                    let table = tables[random(3) as usize];
                    Span {
                        table,
                        start: random(400) as u16,
                        count: if table.is_bits() {
                            1
                        } else {
                            [1, 1, 2, 4][random(4) as usize]
                        },
                    }
                })
                .collect();
            if round % 3 == 0 {
                places.sort();
            }
            let mut device = Device::without(&[]);
            device.absent = (0..random(12))
                .map(|_| (tables[random(3) as usize], random(400) as u16))
                .collect();
            device.max = [4, 10, 60, 2_000][random(4) as usize];
            let mut memory = Memory::default();
            let has: Vec<bool> = places.iter().map(|span| device.answers(span)).collect();
            let mut outcome = Vec::new();
            for _ in 0..40 {
                outcome = device.poll(&places, &mut memory, now);
                for (n, outcome) in outcome.iter().enumerate() {
                    assert!(outcome.is_some() || has[n], "round {round}: read what is not there");
                }
            }
            for (n, outcome) in outcome.iter().enumerate() {
                assert_eq!(outcome.is_none(), has[n], "round {round}: {:?}", places[n]);
            }
            let refused: Vec<_> = device.requests.iter().filter(|r| !device.answers(r)).collect();
            assert!(refused.len() <= PROBES_MAX, "round {round}: {refused:?}");
        }
    }
}
