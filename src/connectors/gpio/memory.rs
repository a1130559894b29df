//! A GPIO chip in memory, for tests: lines whose levels and edges the test makes, which the kernel's buffer limits too.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use super::line::{Bias, Chip, Direction, Edge, KERNEL_EDGES_MAX, Line, LineId, Trouble, Want};

/// What the test holds; clones are the same chip.
#[derive(Clone, Default)]
pub struct Memory(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    is_absent: bool,
    /// As before Linux 5.10.
    has_no_debounce: bool,
    lines: BTreeMap<u32, MemoryLine>,
    /// Every level that an output was driven to, in order.
    driven: Vec<(u32, bool)>,
}

#[derive(Default)]
struct MemoryLine {
    /// Physical.
    level: bool,
    is_busy: bool,
    /// Its edges cannot be read, its level can.
    is_deaf: bool,
    owner: Option<Owner>,
}

struct Owner {
    want: Want,
    edges: VecDeque<Edge>,
    sequence: u32,
    waker: Option<Waker>,
}

struct Held {
    chip: Memory,
    offset: u32,
}

impl Memory {
    /// A chip with the lines 0 to 31; line n is named "GPIOn".
    pub fn new() -> Memory {
        let memory = Memory::default();
        memory.state().lines = (0..32).map(|offset| (offset, MemoryLine::default())).collect();
        memory
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().expect("no panic while it is held")
    }

    pub fn without_debounce(self) -> Memory {
        self.state().has_no_debounce = true;
        self
    }

    pub fn set_absent(&self, is_absent: bool) {
        self.state().is_absent = is_absent;
        for line in self.state().lines.values() {
            if let Some(waker) = line.owner.as_ref().and_then(|o| o.waker.as_ref()) {
                waker.wake_by_ref();
            }
        }
    }

    pub fn set_busy(&self, offset: u32, is_busy: bool) {
        self.state().lines.get_mut(&offset).expect("a line").is_busy = is_busy;
    }

    pub fn set_deaf(&self, offset: u32, is_deaf: bool) {
        let mut state = self.state();
        let line = state.lines.get_mut(&offset).expect("a line");
        line.is_deaf = is_deaf;
        if let Some(waker) = line.owner.as_mut().and_then(|o| o.waker.take()) {
            waker.wake();
        }
    }

    pub fn is_owned(&self, offset: u32) -> bool {
        self.state().lines[&offset].owner.is_some()
    }

    pub fn bias(&self, offset: u32) -> Option<Bias> {
        self.state().lines[&offset].owner.as_ref().and_then(|o| o.want.bias)
    }

    /// The physical level.
    pub fn level(&self, offset: u32) -> bool {
        self.state().lines[&offset].level
    }

    pub fn driven(&self) -> Vec<(u32, bool)> {
        self.state().driven.clone()
    }

    /// The outside changes the physical level, at this monotonic time.
    pub fn change(&self, offset: u32, level: bool, at_ns: u64) {
        let mut state = self.state();
        let line = state.lines.get_mut(&offset).expect("a line");
        if std::mem::replace(&mut line.level, level) == level {
            return;
        }
        let Some(owner) = &mut line.owner else { return };
        let rising = level != owner.want.active_low;
        let Direction::In { edges: Some(edges), .. } = owner.want.direction else {
            return;
        };
        if !edges.includes(rising) {
            return;
        }
        owner.sequence += 1;
        if owner.edges.len() == KERNEL_EDGES_MAX as usize {
            owner.edges.pop_front();
        }
        owner.edges.push_back(Edge {
            rising,
            at_ns,
            sequence: owner.sequence,
        });
        if let Some(waker) = owner.waker.take() {
            waker.wake();
        }
    }
}

fn absent() -> Trouble {
    Trouble::Chip("no chip in memory".to_owned())
}

impl Chip for Memory {
    fn request(&mut self, want: &Want) -> Result<Arc<dyn Line>, Trouble> {
        let mut state = self.state();
        if state.is_absent {
            return Err(absent());
        }
        let offset = match &want.line {
            LineId::Offset(offset) => Some(*offset),
            LineId::Name(name) => name.strip_prefix("GPIO").and_then(|n| n.parse().ok()),
        };
        if let (true, Direction::In { debounce: Some(_), .. }) = (state.has_no_debounce, want.direction) {
            return Err(Trouble::Debounce("no debounce in memory".to_owned()));
        }
        let State { lines, driven, .. } = &mut *state;
        let Some((offset, line)) = offset.and_then(|o| Some((o, lines.get_mut(&o)?))) else {
            return Err(Trouble::Line(format!("there is no {}", want.line)));
        };
        if line.is_busy || line.owner.is_some() {
            return Err(Trouble::Line(format!("{} is in use", want.line)));
        }
        if let Direction::Out { level } = want.direction {
            line.level = level != want.active_low;
            driven.push((offset, line.level));
        }
        line.owner = Some(Owner {
            want: want.clone(),
            edges: VecDeque::new(),
            sequence: 0,
            waker: None,
        });
        Ok(Arc::new(Held {
            chip: self.clone(),
            offset,
        }))
    }
}

impl Held {
    fn with<R>(&self, work: impl FnOnce(&mut bool, &mut Owner) -> R) -> Result<R, Trouble> {
        let mut state = self.chip.state();
        if state.is_absent {
            return Err(absent());
        }
        let line = state.lines.get_mut(&self.offset).expect("a line");
        let owner = line.owner.as_mut().expect("it is held");
        Ok(work(&mut line.level, owner))
    }
}

impl Line for Held {
    fn get(&self) -> Result<bool, Trouble> {
        self.with(|level, owner| *level != owner.want.active_low)
    }

    fn set(&self, level: bool) -> Result<(), Trouble> {
        let physical = self.with(|physical, owner| {
            *physical = level != owner.want.active_low;
            *physical
        })?;
        self.chip.state().driven.push((self.offset, physical));
        Ok(())
    }

    fn poll_edges(&self, cx: &mut Context<'_>, edges: &mut Vec<Edge>) -> Poll<Result<(), Trouble>> {
        if self.chip.state().lines[&self.offset].is_deaf {
            return Poll::Ready(Err(Trouble::Line("deaf".to_owned())));
        }
        let polled = self.with(|_, owner| {
            if owner.edges.is_empty() {
                owner.waker = Some(cx.waker().clone());
                return false;
            }
            edges.extend(owner.edges.drain(..));
            true
        });
        match polled {
            Ok(true) => Poll::Ready(Ok(())),
            Ok(false) => Poll::Pending,
            Err(trouble) => Poll::Ready(Err(trouble)),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.chip.state().lines.get_mut(&self.offset).expect("a line").owner = None;
    }
}
