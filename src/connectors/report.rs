//! What is known of a poll group's points, and when it is worth a message. Pure.
//!
//! A point is good, uncertain, bad or stale. Lost values stay bad, with the time of the loss; what was not read for three
//! periods, for whatever reason, is stale. A message holds all points of the group and goes when one of them is news, or
//! nothing went for the longest silence.

use std::sync::Arc;
use std::time::Duration;

use super::driver::{Raw, Sample};
use super::grid::Grid;
use super::scaling::Scaling;
use super::values::{Quality, Reading};
use crate::clock::Timestamp;
use crate::config::{Asset, Point};

/// Periods without a word about a point after which its value is not current any more …
const STALE_PERIODS: u32 = 3;
/// … but not before: short periods have their jitter.
const STALE_MIN: Duration = Duration::from_secs(2);

/// The points of an asset with one period: read together, published together.
#[derive(Debug)]
pub(super) struct Group {
    pub asset: usize,
    /// Indices into the asset's points, rising.
    pub points: Vec<usize>,
    config: Arc<[Point]>,
    /// Points without a deadband are news where they change.
    on_change: bool,
    pub grid: Grid,
    states: Vec<PointState>,
    silence_max: Duration,
    /// When it was last heard of: read, or found to be lost.
    heard: Duration,
    published: Option<Duration>,
}

/// There are tens of thousands of them: what the configuration says of a point stays there.
#[derive(Debug, Default)]
struct PointState {
    current: Option<Reading>,
    told: Option<Told>,
    /// Since when there is no value.
    lost: Option<Timestamp>,
}

/// What was published last, as far as it decides what is news.
#[derive(Debug, PartialEq)]
struct Told {
    quality: Quality,
    /// A checksum of why.
    why: u32,
    /// Of points with a deadband.
    value: Option<Box<Raw>>,
}

impl Group {
    /// The poll groups of an asset, in the order of their first points.
    pub fn all(asset: usize, config: &Asset) -> Vec<Group> {
        let mut groups: Vec<Group> = Vec::new();
        for (nth, point) in config.points.iter().enumerate() {
            let at = match groups.iter().position(|g| g.grid.every() == point.every) {
                Some(at) => at,
                None => {
                    groups.push(Group {
                        asset,
                        points: Vec::new(),
                        config: Arc::clone(&config.points),
                        on_change: config.on_change,
                        grid: Grid::new(point.every),
                        states: Vec::new(),
                        silence_max: config.silence_max,
                        heard: Duration::ZERO,
                        published: None,
                    });
                    groups.len() - 1
                }
            };
            groups[at].points.push(nth);
            groups[at].states.push(PointState::default());
        }
        for group in &mut groups {
            group.points.shrink_to_fit();
            group.states.shrink_to_fit();
        }
        groups
    }

    /// What a read gave, one sample a point.
    pub fn read(&mut self, samples: impl Iterator<Item = Sample>, since_start: Duration, now: Timestamp) {
        self.heard = since_start;
        // A driver that gave too few must not leave an old value standing as if it were new.
        let missing = std::iter::repeat_with(|| Sample::Bad("the connector gave no value".to_owned()));
        let states = self.points.iter().zip(&mut self.states);
        for ((point, state), sample) in states.zip(samples.chain(missing)) {
            state.take(&self.config[*point], sample, now);
        }
    }

    /// One value by itself; `point` is an index into the asset's points.
    pub fn take_one(&mut self, point: usize, sample: Sample, at: Timestamp) {
        if let Ok(nth) = self.points.binary_search(&point) {
            self.states[nth].take(&self.config[point], sample, at);
        }
    }

    /// One value is published by itself.
    pub fn publish_one(&mut self, point: usize) {
        if let Ok(nth) = self.points.binary_search(&point) {
            let deadband = deadband(&self.config[point], self.on_change);
            self.states[nth].tell(deadband);
        }
    }

    /// Whether it was read, or found to be lost, at all.
    pub fn is_known(&self) -> bool {
        self.states.iter().any(|s| s.current.is_some())
    }

    /// Nothing of it can be read.
    pub fn lose(&mut self, why: &str, since_start: Duration, now: Timestamp) {
        self.heard = since_start;
        for (point, state) in self.points.iter().zip(&mut self.states) {
            state.take(&self.config[*point], Sample::Bad(why.to_owned()), now);
        }
    }

    /// When its values will be stale if nothing is heard of it; None where it has none that are current.
    pub fn stale_at(&self) -> Option<Duration> {
        let has_current = self.states.iter().any(PointState::is_current);
        has_current.then(|| self.heard + (self.grid.every() * STALE_PERIODS).max(STALE_MIN))
    }

    /// Makes values that nothing was heard of stale. `why` says what the line is busy with.
    pub fn age(&mut self, why: &str, since_start: Duration, now: Timestamp) {
        if self.stale_at().is_none_or(|at| since_start < at) {
            return;
        }
        for state in &mut self.states {
            state.stale(why, now);
        }
    }

    /// Whether there is something to tell.
    pub fn is_news(&self, since_start: Duration) -> bool {
        let is_silent = self
            .published
            .is_none_or(|at| since_start.saturating_sub(at) >= self.silence_max);
        let mut states = self.points.iter().zip(&self.states);
        let is_news =
            |(point, state): (&usize, &PointState)| state.is_news(deadband(&self.config[*point], self.on_change));
        self.is_known() && (is_silent || states.any(is_news))
    }

    /// What is to be published now is taken as published.
    pub fn publish(&mut self, since_start: Duration) {
        self.published = Some(since_start);
        for (point, state) in self.points.iter().zip(&mut self.states) {
            state.tell(deadband(&self.config[*point], self.on_change));
        }
    }

    pub fn readings(&self) -> impl Iterator<Item = (&str, bool, &Reading)> {
        let named = self.points.iter().zip(&self.states);
        named.filter_map(|(point, state)| state.shown(&self.config[*point]))
    }

    /// The reading of one of the asset's points.
    pub fn reading(&self, point: usize) -> Option<(&str, bool, &Reading)> {
        let nth = self.points.binary_search(&point).ok()?;
        self.states[nth].shown(&self.config[point])
    }
}

/// None: every reading is news.
fn deadband(point: &Point, on_change: bool) -> Option<f64> {
    point.deadband.or(on_change.then_some(0.0))
}

impl PointState {
    fn shown<'a>(&'a self, point: &'a Point) -> Option<(&'a str, bool, &'a Reading)> {
        let reading = self.current.as_ref()?;
        Some((&point.name, Scaling::new(point).is_narrow(), reading))
    }

    fn take(&mut self, point: &Point, sample: Sample, at: Timestamp) {
        let scaling = Scaling::new(point);
        let (value, quality, why) = match sample {
            Sample::Good(raw) => (scaling.published(raw), Quality::Good, String::new()),
            Sample::Uncertain(raw, why) => (scaling.published(raw), Quality::Uncertain, why),
            Sample::Bad(why) => (Err(why), Quality::Bad, String::new()),
        };
        self.current = Some(match value {
            Ok(value) => {
                self.lost = None;
                Reading {
                    value: Some(value),
                    quality,
                    why,
                    at,
                }
            }
            Err(why) => {
                let since = *self.lost.get_or_insert(at);
                Reading {
                    value: None,
                    quality: Quality::Bad,
                    why: format!("{why} since {since}"),
                    at,
                }
            }
        });
    }

    fn is_current(&self) -> bool {
        let quality = self.current.as_ref().map(|c| c.quality);
        matches!(quality, Some(Quality::Good | Quality::Uncertain))
    }

    fn stale(&mut self, why: &str, now: Timestamp) {
        let Some(current) = &mut self.current else { return };
        if matches!(current.quality, Quality::Good | Quality::Uncertain) {
            current.quality = Quality::Stale;
            current.why = format!("not read since {}: {why}", current.at);
            current.at = now;
        }
    }

    fn tell(&mut self, deadband: Option<f64>) {
        self.told = self.current.as_ref().map(|current| Told {
            quality: current.quality,
            why: crc32fast::hash(current.why.as_bytes()),
            value: deadband.and(current.value.clone()).map(Box::new),
        });
    }

    fn is_news(&self, deadband: Option<f64>) -> bool {
        let (Some(new), Some(old)) = (&self.current, &self.told) else {
            return self.current.is_some();
        };
        if new.quality != old.quality || crc32fast::hash(new.why.as_bytes()) != old.why {
            return true;
        }
        let is_current = matches!(new.quality, Quality::Good | Quality::Uncertain);
        // A loss is told once, and again by the longest silence.
        let (true, Some(new)) = (is_current, &new.value) else {
            return false;
        };
        let (Some(deadband), Some(old)) = (deadband, old.value.as_deref()) else {
            return true;
        };
        match (number(new), number(old)) {
            (Some(a), Some(b)) => new != old && (a - b).abs() >= deadband,
            _ => new != old,
        }
    }
}

fn number(value: &Raw) -> Option<f64> {
    match value {
        Raw::Int(n) => Some(*n as f64),
        Raw::Uint(n) => Some(*n as f64),
        Raw::Float(n) => Some(*n),
        Raw::Bool(_) | Raw::Text(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Address, DataType, Device, Payload, Signal};
    use crate::message::Topic;

    const fn s(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_millis(seconds * 1_000)
    }

    fn point(name: &str, deadband: Option<f64>, every: Duration) -> Point {
        Point {
            name: name.to_owned(),
            address: Address::Simulator(Signal::Temperature),
            data: DataType::Float64,
            unit: None,
            scale: 1.0,
            offset: 0.0,
            deadband,
            every,
            writable: None,
        }
    }

    fn asset(points: Vec<Point>, on_change: bool) -> Asset {
        Asset {
            name: "a".to_owned(),
            topic: Topic::new("data/a").expect("valid"),
            connector: "c".to_owned(),
            every: s(1),
            silence_max: s(60),
            on_change,
            payload: Payload::Values,
            device: Device::Simulator,
            points: points.into(),
        }
    }

    fn group(deadband: Option<f64>) -> Group {
        Group::all(0, &asset(vec![point("p", deadband, s(1))], false)).remove(0)
    }

    fn good(value: f64) -> std::iter::Once<Sample> {
        std::iter::once(Sample::Good(Raw::Float(value)))
    }

    fn only(group: &Group) -> Reading {
        group.readings().next().expect("known").2.clone()
    }

    #[test]
    fn points_of_one_period_are_one_group() {
        let points = vec![point("a", None, s(1)), point("b", None, s(5)), point("c", None, s(1))];
        let groups = Group::all(3, &asset(points, false));
        let shape: Vec<_> = groups
            .iter()
            .map(|g| (g.asset, g.points.clone(), g.grid.every()))
            .collect();
        assert_eq!(shape, [(3, vec![0, 2], s(1)), (3, vec![1], s(5))]);
    }

    #[test]
    fn a_deadband_keeps_small_changes_back_and_silence_ends() {
        let mut group = group(Some(2.0));
        let mut told = Vec::new();
        for second in 0..=130 {
            // Rises by 0.1 a second.
            group.read(good(second as f64 / 10.0), s(second), at(second as i64));
            if group.is_news(s(second)) {
                group.publish(s(second));
                told.push(second);
            }
        }
        assert_eq!(told, [0, 20, 40, 60, 80, 100, 120]);
        for second in 131..=260 {
            group.read(good(13.0), s(second), at(second as i64));
            if group.is_news(s(second)) {
                group.publish(s(second));
                told.push(second);
            }
        }
        assert_eq!(told[7..], [180, 240], "the longest silence");
    }

    #[test]
    fn on_change_needs_no_deadband() {
        let mut group = Group::all(0, &asset(vec![point("p", None, s(1))], true)).remove(0);
        let mut told = Vec::new();
        for (second, value) in [1.0, 1.0, 1.5, 1.5, 1.0].into_iter().enumerate() {
            let second = second as u64;
            group.read(good(value), s(second), at(second as i64));
            if group.is_news(s(second)) {
                group.publish(s(second));
                told.push(second);
            }
        }
        assert_eq!(told, [0, 2, 4]);
    }

    #[test]
    fn a_loss_is_bad_at_once_and_says_since_when() {
        let mut group = group(None);
        group.read(good(5.0), s(0), at(0));
        group.publish(s(0));
        group.lose("timeout", s(1), at(1));
        assert!(group.is_news(s(1)));
        let first = only(&group);
        assert_eq!((first.value.clone(), first.quality), (None, Quality::Bad));
        assert_eq!(first.why, "timeout since 1970-01-01T00:00:01.000Z");
        group.publish(s(1));
        group.lose("timeout", s(2), at(2));
        assert_eq!(only(&group).why, first.why, "the time of the loss stays");
        assert!(!group.is_news(s(2)), "told once");
        group.lose("connection refused", s(3), at(3));
        assert_eq!(only(&group).why, "connection refused since 1970-01-01T00:00:01.000Z");
        assert!(group.is_news(s(3)));
        assert!(group.is_news(s(61)), "told again by the longest silence");
        group.read(good(5.0), s(4), at(4));
        assert!(group.is_news(s(4)));
        assert_eq!((only(&group).quality, only(&group).why), (Quality::Good, String::new()));
        group.lose("timeout", s(9), at(9));
        assert_eq!(only(&group).why, "timeout since 1970-01-01T00:00:09.000Z", "a new loss");
    }

    #[test]
    fn what_nobody_reads_gets_stale_and_keeps_its_last_value_apart() {
        let mut group = group(None);
        group.read(good(5.0), s(10), at(10));
        group.publish(s(10));
        group.age("the line is busy", s(12), at(12));
        assert_eq!(only(&group).quality, Quality::Good);
        assert_eq!(group.stale_at(), Some(s(13)));
        group.age("the line is busy", s(13), at(13));
        let stale = only(&group);
        assert_eq!(
            (stale.quality, stale.value.clone()),
            (Quality::Stale, Some(Raw::Float(5.0)))
        );
        assert_eq!(stale.why, "not read since 1970-01-01T00:00:10.000Z: the line is busy");
        assert!(group.is_news(s(13)));
        group.publish(s(13));
        group.age("the line is busy", s(14), at(14));
        assert!(!group.is_news(s(14)));
        assert_eq!(group.stale_at(), None);
        group.lose("timeout", s(15), at(15));
        assert_eq!(only(&group).value, None);
        group.age("the line is busy", s(30), at(30));
        assert_eq!(only(&group).quality, Quality::Bad, "what is lost does not get stale");
    }

    #[test]
    fn a_value_that_is_not_a_number_is_bad() {
        let mut group = group(None);
        group.read(good(f64::NAN), s(0), at(0));
        assert_eq!(only(&group).quality, Quality::Bad);
        let doubted = std::iter::once(Sample::Uncertain(Raw::Float(1.0), "saturated".to_owned()));
        group.read(doubted, s(1), at(1));
        assert_eq!(
            (only(&group).quality, only(&group).value, only(&group).why),
            (Quality::Uncertain, Some(Raw::Float(1.0)), "saturated".to_owned())
        );
    }
}
