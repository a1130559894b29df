//! Kind "gpio": inputs that are polled or tell of their edges, counters of edges, outputs with a safe state.
//!
//! [`line`] is what a chip does for us, [`kernel`] the one that does, [`edges`] the pure part. The lines live on a
//! [`BusThread`], since a line of an expander on I²C may block; their edges are waited for by a task of the runtime,
//! which counts them and keeps up to [`EVENTS_MAX`] changes for [`Driver::event`]. A change beyond that is dropped and
//! counted, and the point's next value is uncertain and says so. The kernel's own buffer does the same.
//!
//! All lines are opened with the first call and those that cannot be had are tried again every [`REOPEN`]; outputs are
//! in their safe state from the moment they are opened.

pub mod edges;
mod kernel;
pub mod line;
#[cfg(test)]
mod memory;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::Setup;
use super::bus::{BusThread, Hung};
use super::driver::{Driver, Event, Fault, Raw, Sample};
use crate::clock::{self, Instant};
use crate::config::Address;
use crate::config::gpio::{GpioChip, GpioPoint, Role};
use edges::{Change, Watch};
use line::{Chip, Direction, Edge, Line, Trouble, Want};

/// Changes that wait for the engine.
const EVENTS_MAX: usize = 1_024;
/// Reading or writing all lines of an asset takes microseconds, on an expander milliseconds each; opening a hundred lines by
/// name on a slow board takes longer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Between two attempts at a line that was refused.
const REOPEN: Duration = Duration::from_secs(1);

/// The driver of one chip.
pub struct Gpio {
    thread: BusThread<Lines>,
    /// By asset and point: the index of its line.
    places: Vec<Vec<usize>>,
    roles: Vec<Role>,
    edges: Arc<Edged>,
    watched: Vec<(usize, Arc<dyn Line>)>,
    watcher: Option<JoinHandle<()>>,
    /// A call was given up: what it opened is not known here.
    is_lost: bool,
}

/// The lines, on their thread.
struct Lines {
    chip: Box<dyn Chip>,
    points: Vec<GpioPoint>,
    lines: Vec<Slot>,
}

enum Slot {
    /// Not asked for yet, or refused: why, and when to ask again.
    Closed {
        why: String,
        again: Option<Instant>,
    },
    Open(Arc<dyn Line>),
}

/// A line that has just been opened and tells of its edges.
struct Opened {
    index: usize,
    line: Arc<dyn Line>,
    /// Some where the kernel has no debounce: the period, and the level now.
    debounce: Option<(Duration, bool)>,
}

/// What the task that waits for edges shares with the driver.
struct Edged {
    state: Mutex<EdgedState>,
    news: Notify,
}

struct EdgedState {
    lines: Vec<LineEdges>,
    /// Never above [`EVENTS_MAX`].
    queue: VecDeque<Event>,
    /// Edges of a line could not be read: the lines that tell of edges are to be opened anew.
    is_broken: bool,
}

/// The edges of one line; None on lines that have none.
struct LineEdges {
    place: (usize, usize),
    role: Role,
    watch: Option<Watch>,
    /// Changes that found the queue full since the last value.
    dropped: u64,
    /// What the next value has to say once.
    note: Option<String>,
}

impl Gpio {
    /// Lines of the kernel. To be called on the runtime that the driver runs on.
    pub fn new(setup: &Setup, chip: &GpioChip) -> Gpio {
        let (chip, runtime) = (chip.chip.clone(), tokio::runtime::Handle::current());
        let points = setup.addresses(|address| match address {
            Address::Gpio(point) => Some(point.clone()),
            _ => None,
        });
        Gpio::on(&setup.connector.name, points, move || {
            Box::new(kernel::KernelChip::new(&chip, runtime.clone()))
        })
    }

    fn on(connector: &str, points: Vec<Vec<GpioPoint>>, chip: impl Fn() -> Box<dyn Chip> + Send + 'static) -> Gpio {
        let mut places = Vec::new();
        let mut lines = Vec::new();
        for (asset, points) in points.iter().enumerate() {
            let first = lines.len();
            places.push((first..first + points.len()).collect());
            for (point, settings) in points.iter().enumerate() {
                lines.push(LineEdges::new((asset, point), settings.role));
            }
        }
        let points: Vec<GpioPoint> = points.into_iter().flatten().collect();
        let roles = points.iter().map(|p| p.role).collect();
        let thread = BusThread::new(connector, move || Lines::new(chip(), points.clone()));
        Gpio {
            thread,
            places,
            roles,
            edges: Arc::new(Edged {
                state: Mutex::new(EdgedState {
                    lines,
                    queue: VecDeque::new(),
                    is_broken: false,
                }),
                news: Notify::new(),
            }),
            watched: Vec::new(),
            watcher: None,
            is_lost: false,
        }
    }

    /// Runs `work` on the lines, all of them opened as far as they can be, and watches those that were opened for it.
    async fn call<R: Send + 'static>(
        &mut self,
        work: impl FnOnce(&mut Lines) -> Result<R, Trouble> + Send + 'static,
    ) -> Result<R, Fault> {
        let now = clock::monotonic();
        let is_broken = std::mem::take(&mut self.edges.lock().is_broken);
        let was_lost = std::mem::take(&mut self.is_lost) || is_broken;
        if was_lost {
            self.unwatch().await;
        }
        let called = self.thread.call(PATIENCE, move |lines| {
            if was_lost {
                lines.close_edged();
            }
            let mut opened = Vec::new();
            let result = lines.open(now, &mut opened).and_then(|()| work(lines));
            if let Err(Trouble::Chip(_)) = result {
                lines.close();
            }
            (result, opened)
        });
        let (result, opened) = match called.await {
            Ok(done) => done,
            Err(hung) => {
                // Lines that were opened meanwhile are known to nobody.
                self.is_lost = true;
                return Err(match hung {
                    Hung::Now(_) => Fault::Unknown(format!("the lines do not answer: {hung}")),
                    Hung::Before(_) | Hung::Ended => Fault::Line(format!("the lines do not answer: {hung}")),
                });
            }
        };
        match result {
            Ok(done) => {
                self.watch(opened);
                Ok(done)
            }
            Err(Trouble::Chip(why)) => {
                drop(opened);
                self.unwatch().await;
                Err(Fault::Line(why))
            }
            Err(Trouble::Line(why) | Trouble::Debounce(why)) => {
                self.watch(opened);
                Err(Fault::Device(why))
            }
        }
    }

    fn watch(&mut self, opened: Vec<Opened>) {
        if opened.is_empty() {
            return;
        }
        let mut state = self.edges.lock();
        for Opened { index, line, debounce } in opened {
            state.lines[index].opened(debounce);
            self.watched.retain(|(watched, _)| *watched != index);
            self.watched.push((index, line));
        }
        drop(state);
        if let Some(watcher) = self.watcher.take() {
            watcher.abort();
        }
        self.watcher = Some(tokio::spawn(watch(Arc::clone(&self.edges), self.watched.clone())));
    }

    /// Frees the lines whose edges are waited for, so that they can be opened anew.
    async fn unwatch(&mut self) {
        self.watched.clear();
        if let Some(watcher) = self.watcher.take() {
            watcher.abort();
            // It holds the lines until it is gone.
            let _ = watcher.await;
        }
    }
}

impl Drop for Gpio {
    fn drop(&mut self) {
        if let Some(watcher) = &self.watcher {
            watcher.abort();
        }
    }
}

impl Driver for Gpio {
    async fn read(&mut self, asset: usize, points: &[usize], samples: &mut Vec<Sample>) -> Result<(), Fault> {
        let lines: Vec<usize> = points.iter().map(|point| self.places[asset][*point]).collect();
        let indices = lines.clone();
        let levels = match self.call(move |lines| lines.levels(&indices)).await {
            Err(Fault::Unknown(why)) => return Err(Fault::Line(why)),
            other => other?,
        };
        let mut state = self.edges.lock();
        for (index, level) in lines.into_iter().zip(levels) {
            samples.push(match level {
                Err(why) => Sample::Bad(why),
                Ok(level) => state.lines[index].sample(level),
            });
        }
        Ok(())
    }

    async fn write(&mut self, asset: usize, point: usize, value: &Raw) -> Result<(), Fault> {
        let index = self.places[asset][point];
        let (Role::Output { .. }, Raw::Bool(level)) = (self.roles[index], value) else {
            return Err(Fault::Refused(
                "only a line with direction = \"out\" can be written".to_owned(),
            ));
        };
        let level = *level;
        self.call(move |lines| lines.set(index, level)).await
    }

    async fn event(&mut self) -> Event {
        loop {
            if let Some(event) = self.edges.lock().queue.pop_front() {
                return event;
            }
            self.edges.news.notified().await;
        }
    }

    async fn safe(&mut self) -> Result<(), Fault> {
        self.call(Lines::safe).await
    }
}

impl Lines {
    fn new(chip: Box<dyn Chip>, points: Vec<GpioPoint>) -> Lines {
        let closed = || Slot::Closed {
            why: String::new(),
            again: None,
        };
        Lines {
            chip,
            lines: points.iter().map(|_| closed()).collect(),
            points,
        }
    }

    /// Opens every line that is not open and may be asked for again. An error is the chip's.
    fn open(&mut self, now: Instant, opened: &mut Vec<Opened>) -> Result<(), Trouble> {
        for (index, (slot, point)) in self.lines.iter_mut().zip(&self.points).enumerate() {
            if self.points[..index].iter().any(|before| before.line == point.line) {
                *slot = Slot::Closed {
                    why: format!("{} is another point's already: a line is one point", point.line),
                    again: None,
                };
                continue;
            }
            match slot {
                Slot::Open(_) => continue,
                Slot::Closed { again: Some(again), .. } if *again > now => continue,
                Slot::Closed { .. } => {}
            }
            match request(&mut *self.chip, point) {
                Ok((line, debounce)) => {
                    if is_edged(point.role) {
                        opened.push(Opened {
                            index,
                            line: Arc::clone(&line),
                            debounce,
                        });
                    }
                    *slot = Slot::Open(line);
                }
                Err(Trouble::Chip(why)) => {
                    opened.clear();
                    return Err(Trouble::Chip(why));
                }
                Err(Trouble::Line(why) | Trouble::Debounce(why)) => {
                    *slot = Slot::Closed {
                        why,
                        again: Some(now + REOPEN),
                    };
                }
            }
        }
        Ok(())
    }

    fn close(&mut self) {
        for slot in &mut self.lines {
            *slot = Slot::Closed {
                why: "the chip was lost".to_owned(),
                again: None,
            };
        }
    }

    fn close_edged(&mut self) {
        for (slot, point) in self.lines.iter_mut().zip(&self.points) {
            if is_edged(point.role) {
                *slot = Slot::Closed {
                    why: String::new(),
                    again: None,
                };
            }
        }
    }

    fn levels(&mut self, indices: &[usize]) -> Result<Vec<Result<bool, String>>, Trouble> {
        let mut levels = Vec::with_capacity(indices.len());
        for index in indices {
            levels.push(match &self.lines[*index] {
                Slot::Closed { why, .. } => Err(why.clone()),
                // Of a counter too, to see that the line is still there; its number is the watcher's.
                Slot::Open(line) => match line.get() {
                    Ok(level) => Ok(level),
                    Err(Trouble::Chip(why)) => return Err(Trouble::Chip(why)),
                    Err(Trouble::Line(why) | Trouble::Debounce(why)) => Err(why),
                },
            });
        }
        Ok(levels)
    }

    fn set(&mut self, index: usize, level: bool) -> Result<(), Trouble> {
        match &self.lines[index] {
            Slot::Closed { why, .. } => Err(Trouble::Line(why.clone())),
            Slot::Open(line) => line.set(level),
        }
    }

    /// Every output that can be reached; the first error is told.
    fn safe(&mut self) -> Result<(), Trouble> {
        let mut result = Ok(());
        for index in 0..self.lines.len() {
            if let Role::Output { safe } = self.points[index].role {
                let set = self.set(index, safe);
                result = result.and(set);
            }
        }
        result
    }
}

/// Whoever lets go of the lines (a stop that was cut short, a panic) leaves them safe, as far as they can be reached.
impl Drop for Lines {
    fn drop(&mut self) {
        let _ = self.safe();
    }
}

fn is_edged(role: Role) -> bool {
    matches!(role, Role::Counter { .. } | Role::Input { edges: Some(_), .. })
}

/// The line, and the debounce that is left to us where the kernel has none.
#[allow(clippy::type_complexity)]
fn request(chip: &mut dyn Chip, point: &GpioPoint) -> Result<(Arc<dyn Line>, Option<(Duration, bool)>), Trouble> {
    let want = |direction| Want {
        line: point.line.clone(),
        direction,
        active_low: point.active_low,
        bias: point.bias,
    };
    let (edges, debounce) = match point.role {
        Role::Output { safe } => return Ok((chip.request(&want(Direction::Out { level: safe }))?, None)),
        Role::Input { edges, debounce } => (edges, debounce),
        Role::Counter { edges, debounce, .. } => (Some(edges), debounce),
    };
    match (chip.request(&want(Direction::In { edges, debounce })), debounce, edges) {
        // Our own debounce has to see every edge.
        (Err(Trouble::Debounce(_)), Some(period), Some(_)) => {
            let both = Direction::In {
                edges: Some(line::Edges::Both),
                debounce: None,
            };
            let line = chip.request(&want(both))?;
            let level = line.get()?;
            Ok((line, Some((period, level))))
        }
        (requested, ..) => Ok((requested?, None)),
    }
}

impl Edged {
    fn lock(&self) -> MutexGuard<'_, EdgedState> {
        // Plain data: a panic elsewhere leaves nothing half-written that matters here.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes edges of one line (there may be none) and settles what is due on it.
    fn take(&self, index: usize, edges: &[Edge], now: Instant) {
        let mut state = self.lock();
        let EdgedState { lines, queue, .. } = &mut *state;
        let line = &mut lines[index];
        let had = queue.len();
        for edge in edges {
            let change = line.watch.as_mut().and_then(|w| w.edge(*edge, now));
            line.changed(change, queue);
        }
        let settled = line.watch.as_mut().and_then(|w| w.settle(now));
        line.changed(settled, queue);
        if queue.len() > had {
            self.news.notify_one();
        }
    }
}

impl LineEdges {
    fn new(place: (usize, usize), role: Role) -> LineEdges {
        LineEdges {
            place,
            role,
            watch: None,
            dropped: 0,
            note: None,
        }
    }

    fn opened(&mut self, debounce: Option<(Duration, bool)>) {
        let edges = match self.role {
            Role::Counter { edges, .. } => edges,
            Role::Input { edges: Some(edges), .. } => edges,
            Role::Input { edges: None, .. } | Role::Output { .. } => return,
        };
        match &mut self.watch {
            Some(watch) => {
                watch.reopened(debounce);
                self.note = Some("the line was away: edges in the meantime are not known".to_owned());
            }
            None => {
                self.watch = Some(Watch::new(edges, debounce));
                if let Role::Counter { .. } = self.role {
                    self.note = Some("counted from 0, since the gateway has just opened the line".to_owned());
                }
            }
        }
    }

    /// The value of a poll.
    fn sample(&mut self, level: bool) -> Sample {
        let raw = match (self.role, &self.watch) {
            (Role::Counter { is_32_bit, .. }, Some(watch)) => Raw::Uint(match is_32_bit {
                true => watch.count() & u64::from(u32::MAX),
                false => watch.count(),
            }),
            (Role::Counter { .. }, None) => return Sample::Bad("the line is not open".to_owned()),
            (Role::Input { .. } | Role::Output { .. }, _) => Raw::Bool(level),
        };
        match self.doubt() {
            Some(why) => Sample::Uncertain(raw, why),
            None => Sample::Good(raw),
        }
    }

    /// A change of an input becomes an event; that of a counter is in its count.
    fn changed(&mut self, change: Option<Change>, queue: &mut VecDeque<Event>) {
        let (Some(change), Role::Input { .. }) = (change, self.role) else {
            return;
        };
        if queue.len() >= EVENTS_MAX {
            self.dropped += 1;
            return;
        }
        let raw = Raw::Bool(change.level);
        queue.push_back(Event {
            asset: self.place.0,
            point: self.place.1,
            sample: match self.doubt() {
                Some(why) => Sample::Uncertain(raw, why),
                None => Sample::Good(raw),
            },
            at: clock::wall_at(change.at_ns),
        });
    }

    /// What makes the next value of this line doubtful; told once.
    fn doubt(&mut self) -> Option<String> {
        let lost = self.watch.as_mut().map_or(0, Watch::take_lost);
        let dropped = std::mem::take(&mut self.dropped);
        let mut whys: Vec<String> = self.note.take().into_iter().collect();
        let is_counter = matches!(self.role, Role::Counter { .. });
        if lost > 0 && is_counter {
            whys.push(format!(
                "{lost} edges came faster than they were taken; their number is the kernel's"
            ));
        } else if lost > 0 {
            whys.push(format!(
                "{lost} edges before this were lost in the kernel: more came than were taken"
            ));
        }
        if dropped > 0 {
            whys.push(format!(
                "{dropped} changes before this were dropped: more came than were published"
            ));
        }
        (!whys.is_empty()).then(|| whys.join("; "))
    }
}

/// Waits for the edges of these lines until it is aborted. A line that fails is left out, and opened anew with the next call.
async fn watch(edged: Arc<Edged>, mut lines: Vec<(usize, Arc<dyn Line>)>) {
    loop {
        let due = edged.lock().lines.iter().filter_map(|l| l.watch.as_ref()?.due()).min();
        let mut got: Vec<(usize, Vec<Edge>)> = Vec::new();
        let mut is_broken = false;
        let edges = std::future::poll_fn(|cx| {
            lines.retain(|(index, line)| {
                let mut edges = Vec::new();
                match line.poll_edges(cx, &mut edges) {
                    Poll::Pending => true,
                    Poll::Ready(Ok(())) => {
                        got.push((*index, edges));
                        true
                    }
                    Poll::Ready(Err(_)) => {
                        is_broken = true;
                        false
                    }
                }
            });
            if got.is_empty() && !is_broken {
                Poll::Pending
            } else {
                Poll::Ready(())
            }
        });
        match due {
            None => edges.await,
            Some(due) => {
                let _ = tokio::time::timeout_at(due.into(), edges).await;
            }
        }
        if is_broken {
            edged.lock().is_broken = true;
        }
        let now = clock::monotonic();
        if got.is_empty() {
            let count = edged.lock().lines.len();
            (0..count).for_each(|index| edged.take(index, &[], now));
        }
        for (index, edges) in got {
            edged.take(index, &edges, now);
        }
        // A line that never rests must not keep the runtime from others.
        tokio::task::yield_now().await;
    }
}
