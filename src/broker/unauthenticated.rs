//! Connections that have not said who they are: their number and what they have sent is bounded, whoever they are.
//!
//! Where there are [`COUNT_MAX`], the one from which nothing came for the longest time gives its place to the next. One
//! is not turned away while it waits for us, nor before it was silent for [`SILENT_FOR`]: where nobody is, as when all
//! devices come back at once, the next waits in the socket's queue until somebody is through. What they have sent is an upper
//! bound of what is kept for them; beyond [`BYTES_MAX`] the one that sent most is turned away.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::Notify;

use crate::clock::{self, Instant};
use crate::status::Counter;

pub const COUNT_MAX: usize = 2_000;
pub const BYTES_MAX: usize = 32 << 20;
/// A device behind a slow link takes as long for a step.
const SILENT_FOR: Duration = Duration::from_millis(500);
/// How often it is looked whether somebody has been silent for long enough.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

pub struct Unauthenticated {
    waiting: RefCell<Waiting>,
    /// Wakes those who want a place.
    left: Notify,
    now: Counter,
    turned_away: Counter,
}

#[derive(Default)]
struct Waiting {
    entries: HashMap<u64, Entry>,
    bytes: usize,
    next: u64,
}

struct Entry {
    heard: Instant,
    bytes: usize,
    /// It waits for us, not we for it.
    is_ours: bool,
    turned_away: Rc<TurnedAway>,
}

#[derive(Default)]
struct TurnedAway {
    is_so: Cell<bool>,
    told: Notify,
}

impl Waiting {
    fn remove(&mut self, id: u64) -> Option<Entry> {
        let entry = self.entries.remove(&id)?;
        self.bytes -= entry.bytes;
        Some(entry)
    }

    fn most_silent(&self, now: Instant) -> Option<u64> {
        let silent = |e: &Entry| !e.is_ours && now.saturating_duration_since(e.heard) >= SILENT_FOR;
        let candidates = self.entries.iter().filter(|(_, e)| silent(e));
        candidates.min_by_key(|(_, e)| e.heard).map(|(id, _)| *id)
    }

    fn largest(&self) -> Option<u64> {
        self.entries.iter().max_by_key(|(_, e)| e.bytes).map(|(id, _)| *id)
    }
}

impl Unauthenticated {
    pub fn new(now: Counter, turned_away: Counter) -> Unauthenticated {
        Unauthenticated {
            waiting: RefCell::default(),
            left: Notify::new(),
            now,
            turned_away,
        }
    }

    pub fn count(&self) -> usize {
        self.waiting.borrow().entries.len()
    }

    /// A place for one more; waits where nobody can be turned away.
    pub async fn enter(self: &Rc<Self>) -> Place {
        loop {
            if let Some(place) = self.try_enter(clock::monotonic()) {
                return place;
            }
            let _ = tokio::time::timeout(LOOK_AGAIN, self.left.notified()).await;
        }
    }

    fn try_enter(self: &Rc<Self>, now: Instant) -> Option<Place> {
        if self.count() >= COUNT_MAX {
            let victim = self.waiting.borrow().most_silent(now)?;
            self.turn_away(victim);
        }
        let mut waiting = self.waiting.borrow_mut();
        let id = waiting.next;
        waiting.next += 1;
        let turned_away = Rc::new(TurnedAway::default());
        let entry = Entry {
            heard: now,
            bytes: 0,
            is_ours: false,
            turned_away: Rc::clone(&turned_away),
        };
        waiting.entries.insert(id, entry);
        self.now.set(waiting.entries.len() as u64);
        Some(Place {
            of: Rc::clone(self),
            id,
            turned_away,
        })
    }

    fn turn_away(&self, id: u64) {
        let removed = self.waiting.borrow_mut().remove(id);
        if let Some(entry) = removed {
            entry.turned_away.is_so.set(true);
            entry.turned_away.told.notify_one();
            self.turned_away.add(1);
        }
        self.now.set(self.count() as u64);
    }

    /// In all so many bytes came from it.
    fn heard(&self, id: u64, bytes: usize, now: Instant) {
        let mut waiting = self.waiting.borrow_mut();
        let Some(entry) = waiting.entries.get_mut(&id) else {
            return;
        };
        let more = bytes.saturating_sub(entry.bytes);
        (entry.bytes, entry.heard, entry.is_ours) = (entry.bytes + more, now, false);
        waiting.bytes += more;
        let largest = (waiting.bytes > BYTES_MAX).then(|| waiting.largest()).flatten();
        drop(waiting);
        if let Some(largest) = largest {
            self.turn_away(largest);
        }
    }
}

/// The place of one; it is free again when this is dropped.
pub struct Place {
    of: Rc<Unauthenticated>,
    id: u64,
    turned_away: Rc<TurnedAway>,
}

impl Place {
    pub fn heard(&self, bytes: usize) {
        self.of.heard(self.id, bytes, clock::monotonic());
    }

    /// Something came that we have no time for yet.
    pub fn waits_for_us(&self) {
        if let Some(entry) = self.of.waiting.borrow_mut().entries.get_mut(&self.id) {
            entry.is_ours = true;
        }
    }

    /// Returns when it is turned away.
    pub async fn lost(&self) {
        while !self.turned_away.is_so.get() {
            self.turned_away.told.notified().await;
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.of.waiting.borrow_mut().remove(self.id);
        self.of.now.set(self.of.count() as u64);
        self.of.left.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room() -> Rc<Unauthenticated> {
        Rc::new(Unauthenticated::new(Counter::default(), Counter::default()))
    }

    fn fill(room: &Rc<Unauthenticated>, now: Instant) -> Vec<Place> {
        (0..COUNT_MAX)
            .map(|_| room.try_enter(now).expect("there is room"))
            .collect()
    }

    #[test]
    fn the_most_silent_gives_its_place_and_nobody_else() {
        let (room, start) = (room(), clock::monotonic());
        let later = start + SILENT_FOR;
        let places = fill(&room, start);
        assert!(room.try_enter(start).is_none(), "nobody was silent for long");
        room.heard(places[0].id, 10, later);
        places[1].waits_for_us();
        let next = room.try_enter(later).expect("somebody was silent");
        assert_eq!((room.count(), room.turned_away.get()), (COUNT_MAX, 1));
        assert!(!places[0].turned_away.is_so.get() && !places[1].turned_away.is_so.get());
        assert_eq!(places.iter().filter(|p| p.turned_away.is_so.get()).count(), 1);
        drop(places);
        assert_eq!((room.count(), room.now.get()), (1, 1));
        drop(next);
        assert_eq!(room.count(), 0);
    }

    #[test]
    fn what_all_have_sent_is_bounded() {
        let (room, now) = (room(), clock::monotonic());
        let places: Vec<Place> = (0..3).map(|_| room.try_enter(now).expect("room")).collect();
        room.heard(places[0].id, BYTES_MAX / 2, now);
        room.heard(places[1].id, BYTES_MAX / 4, now);
        room.heard(places[2].id, BYTES_MAX / 4, now);
        assert!(!places[0].turned_away.is_so.get());
        // The sum so far, not the last read.
        room.heard(places[2].id, BYTES_MAX / 4 + 1, now);
        assert!(places[0].turned_away.is_so.get() && !places[2].turned_away.is_so.get());
        drop(places);
        assert_eq!(room.waiting.borrow().bytes, 0);
    }
}
