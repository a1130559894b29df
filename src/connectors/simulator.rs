//! A simulated boiler: live data without hardware.
//!
//! [`Boiler`] is the pure model: a seed and the time handed in decide everything. [`Simulator`] is the driver around it.
//! Its valve can be opened and its setpoint moved, so that commands can be tried as well.

use std::time::Duration;

use super::Setup;
use super::driver::{Driver, Fault, Raw, Sample};
use crate::clock::{self, Instant};
use crate::config::{self, Address, Signal};

/// The model goes in steps of this length, whatever the times it is asked for: asking more often changes nothing.
const STEP: Duration = Duration::from_millis(100);
const STEP_S: f64 = 0.1;
/// After a longer pause (a suspended machine) the model goes on from where it was instead of catching up.
const STEPS_MAX: u64 = 6_000;

const ROOM: f64 = 20.0;
const SETPOINT: f64 = 85.0;
/// The burner goes on so far below the setpoint, and off so far above it.
const HYSTERESIS: f64 = 7.0;
const VALVE_OPENS_ABOVE: f64 = 2.40;
const VALVE_CLOSES_BELOW: f64 = 2.25;
const FAULT_WHY: &str = "sensor wire broken (simulated)";

/// Temperature in °C, pressure in bar, safety valve, burner, and now and then a broken temperature sensor.
#[derive(Debug, Clone)]
pub struct Boiler {
    random: Random,
    /// Steps done since the start.
    steps: u64,
    /// Steps left out after pauses.
    steps_skipped: u64,
    temperature: f64,
    pressure: f64,
    burner: bool,
    valve: bool,
    /// Somebody holds the valve open.
    held_open: bool,
    setpoint: f64,
    /// Whether hot water is drawn, and the step at which that changes.
    drawing: bool,
    draw_changes: u64,
    fault: bool,
    fault_changes: u64,
    noise: f64,
}

impl Boiler {
    pub fn new(seed: u64) -> Boiler {
        let mut random = Random(seed);
        let fault_changes = random.steps(60, 180);
        Boiler {
            random,
            steps: 0,
            steps_skipped: 0,
            temperature: 70.0,
            pressure: pressure_at(70.0),
            burner: true,
            valve: false,
            held_open: false,
            setpoint: SETPOINT,
            drawing: false,
            draw_changes: 300,
            fault: false,
            fault_changes,
            noise: 0.0,
        }
    }

    /// Brings the model to this time after its start. Time never goes back: an earlier one changes nothing.
    pub fn advance(&mut self, since_start: Duration) {
        let wanted = u64::try_from(since_start.as_millis() / STEP.as_millis()).unwrap_or(u64::MAX);
        let missing = wanted.saturating_sub(self.steps + self.steps_skipped);
        if missing > STEPS_MAX {
            self.steps_skipped += missing - 1;
            self.step();
            return;
        }
        for _ in 0..missing {
            self.step();
        }
    }

    fn step(&mut self) {
        self.steps += 1;
        if self.steps >= self.draw_changes {
            self.drawing = !self.drawing;
            self.draw_changes = self.steps + self.random.steps(20, 60);
        }
        if self.steps >= self.fault_changes {
            self.fault = !self.fault;
            self.fault_changes = self.steps
                + if self.fault {
                    self.random.steps(5, 15)
                } else {
                    self.random.steps(120, 300)
                };
        }
        // The thermostat has its own sensor: it goes on working while the measured one is broken.
        if self.temperature < self.setpoint - HYSTERESIS {
            self.burner = true;
        } else if self.temperature > self.setpoint + HYSTERESIS {
            self.burner = false;
        }
        let heating = if self.burner { 0.9 } else { 0.0 };
        let loss = (self.temperature - ROOM) * if self.drawing { 0.008 } else { 0.004 };
        self.temperature += (heating - loss) * STEP_S;

        if self.held_open || self.pressure > VALVE_OPENS_ABOVE {
            self.valve = true;
        } else if self.pressure < VALVE_CLOSES_BELOW {
            self.valve = false;
        }
        let towards = (pressure_at(self.temperature) - self.pressure) / 4.0;
        let relief = if self.valve { 0.06 } else { 0.0 };
        self.pressure += (towards - relief) * STEP_S;
        self.noise = self.random.unit() - 0.5;
    }

    pub fn read(&self, signal: Signal) -> Sample {
        let number = |value: f64, per_unit: f64| Sample::Good(Raw::Float((value * per_unit).round() / per_unit));
        match signal {
            Signal::Temperature if self.fault => Sample::Bad(FAULT_WHY.to_owned()),
            Signal::Temperature => number(self.temperature + 0.2 * self.noise, 10.0),
            Signal::Pressure => number(self.pressure + 0.01 * self.noise, 100.0),
            Signal::Valve => Sample::Good(Raw::Bool(self.valve)),
            Signal::Burner => Sample::Good(Raw::Bool(self.burner)),
            Signal::Fault => Sample::Good(Raw::Bool(self.fault)),
            Signal::Setpoint => Sample::Good(Raw::Float(self.setpoint)),
        }
    }

    /// The valve is held open, or left to itself again; the setpoint stays within what a boiler without steam can do.
    pub fn write(&mut self, signal: Signal, value: &Raw) -> Result<(), Fault> {
        match (signal, value) {
            (Signal::Valve, Raw::Bool(open)) => {
                self.held_open = *open;
                self.valve = *open;
            }
            (Signal::Setpoint, Raw::Float(setpoint)) if (40.0..=95.0).contains(setpoint) => self.setpoint = *setpoint,
            (Signal::Setpoint, Raw::Float(_)) => {
                return Err(Fault::Refused("the boiler takes setpoints from 40 to 95 °C".to_owned()));
            }
            _ => return Err(Fault::Refused("the boiler has nothing to set there".to_owned())),
        }
        Ok(())
    }
}

/// The pressure that a closed boiler settles at.
fn pressure_at(temperature: f64) -> f64 {
    1.0 + 0.02 * (temperature - ROOM)
}

/// splitmix64: small, and the same on every machine.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// 0 to 1.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A span between so many seconds, in steps.
    fn steps(&mut self, from_s: u64, to_s: u64) -> u64 {
        let (from, to) = (from_s * 10, to_s * 10);
        from + self.next() % (to - from)
    }
}

/// The driver: one boiler an asset.
pub struct Simulator {
    start: Instant,
    units: Vec<Unit>,
}

struct Unit {
    boiler: Boiler,
    signals: Vec<Signal>,
}

impl Simulator {
    pub fn new(setup: &Setup) -> Simulator {
        let unit = |asset: &config::Asset| Unit {
            boiler: Boiler::new(seed(&[&setup.connector.name, &asset.name])),
            signals: asset
                .points
                .iter()
                .filter_map(|point| match point.address {
                    Address::Simulator(signal) => Some(signal),
                    _ => None,
                })
                .collect(),
        };
        Simulator {
            start: clock::monotonic(),
            units: setup.assets.iter().map(unit).collect(),
        }
    }

    fn unit(&mut self, asset: usize) -> &mut Unit {
        let since_start = clock::monotonic().duration_since(self.start);
        let unit = &mut self.units[asset];
        unit.boiler.advance(since_start);
        unit
    }
}

impl Driver for Simulator {
    async fn read(&mut self, asset: usize, points: &[usize], samples: &mut Vec<Sample>) -> Result<(), Fault> {
        let unit = self.unit(asset);
        samples.extend(points.iter().map(|point| unit.boiler.read(unit.signals[*point])));
        Ok(())
    }

    async fn write(&mut self, asset: usize, point: usize, value: &Raw) -> Result<(), Fault> {
        let unit = self.unit(asset);
        unit.boiler.write(unit.signals[point], value)
    }
}

fn seed(parts: &[&str]) -> u64 {
    // FNV-1a
    parts
        .iter()
        .flat_map(|p| p.bytes().chain([0]))
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flag(boiler: &Boiler, signal: Signal) -> bool {
        boiler.read(signal) == Sample::Good(Raw::Bool(true))
    }

    #[test]
    fn every_signal_is_of_its_type() {
        let boiler = Boiler::new(1);
        for (name, signal) in Signal::NAMES {
            match boiler.read(signal) {
                Sample::Good(raw) => assert!(raw.fits(signal.data()), "{name}: {raw:?}"),
                other => panic!("{name}: {other:?}"),
            }
        }
    }

    #[test]
    fn it_does_as_it_is_told() {
        let mut boiler = Boiler::new(7);
        boiler.advance(Duration::from_secs(60));
        let before = boiler.pressure;
        assert_eq!(boiler.write(Signal::Valve, &Raw::Bool(true)), Ok(()));
        boiler.advance(Duration::from_secs(80));
        assert!(flag(&boiler, Signal::Valve) && boiler.pressure < before);
        assert_eq!(boiler.write(Signal::Valve, &Raw::Bool(false)), Ok(()));
        assert!(!flag(&boiler, Signal::Valve));
        assert_eq!(boiler.write(Signal::Setpoint, &Raw::Float(50.0)), Ok(()));
        boiler.advance(Duration::from_secs(500));
        boiler.advance(Duration::from_secs(1_000));
        assert!((40.0..60.0).contains(&boiler.temperature), "{}", boiler.temperature);
        assert!(boiler.write(Signal::Setpoint, &Raw::Float(96.0)).is_err());
        assert!(boiler.write(Signal::Burner, &Raw::Bool(true)).is_err());
    }

    #[test]
    fn how_often_it_is_asked_changes_nothing() {
        let mut often = Boiler::new(42);
        let mut seldom = Boiler::new(42);
        for quarter in 0..=2_400 {
            often.advance(Duration::from_millis(250 * quarter));
        }
        seldom.advance(Duration::from_secs(300));
        seldom.advance(Duration::from_secs(600));
        seldom.advance(Duration::from_secs(10));
        for (name, signal) in Signal::NAMES {
            assert_eq!(often.read(signal), seldom.read(signal), "{name}");
        }
        let mut other = Boiler::new(43);
        other.advance(Duration::from_secs(600));
        assert_ne!(other.temperature, often.temperature, "the seed decides nothing");
    }

    /// Two hours of ten boilers: what a heating engineer would expect of them.
    #[test]
    fn it_behaves_like_a_boiler() {
        for seed in 0..10 {
            let mut boiler = Boiler::new(seed);
            let (mut switched, mut opened, mut faults, mut fault_s, mut fault_s_max) = (0, 0, 0, 0, 0);
            let mut before = boiler.clone();
            for second in 1..=7_200 {
                boiler.advance(Duration::from_secs(second));
                let (t, p) = (boiler.temperature, boiler.pressure);
                assert!((60.0..=95.0).contains(&t), "seed {seed}, {second} s: {t} °C");
                assert!((1.5..=2.6).contains(&p), "seed {seed}, {second} s: {p} bar");
                assert!((t - before.temperature).abs() < 1.5, "a jump: seed {seed}, {second} s");
                if boiler.burner != before.burner {
                    switched += 1;
                    assert!(
                        if boiler.burner { t < 79.5 } else { t > 90.5 },
                        "seed {seed}: switched at {t} °C"
                    );
                } else if boiler.burner {
                    assert!(t > before.temperature, "it heats: seed {seed}, {second} s");
                } else {
                    assert!(t < before.temperature, "it cools: seed {seed}, {second} s");
                }
                if boiler.valve && !before.valve {
                    opened += 1;
                    assert!(p > VALVE_OPENS_ABOVE - 0.1, "seed {seed}: opened at {p} bar");
                }
                match (boiler.read(Signal::Temperature), flag(&boiler, Signal::Fault)) {
                    (Sample::Bad(why), true) => {
                        assert_eq!(why, FAULT_WHY);
                        fault_s += 1;
                        fault_s_max = fault_s_max.max(fault_s);
                    }
                    (Sample::Good(_), false) => {
                        faults += usize::from(fault_s > 0);
                        fault_s = 0;
                    }
                    other => panic!("{other:?}"),
                }
                before = boiler.clone();
            }
            assert!(switched > 60, "seed {seed}: the burner switched {switched} times");
            assert!(opened > 5, "seed {seed}: the valve opened {opened} times");
            assert!((20..=60).contains(&faults), "seed {seed}: {faults} faults");
            assert!(
                (5..=16).contains(&fault_s_max),
                "seed {seed}: a fault of {fault_s_max} s"
            );
        }
    }

    #[test]
    fn a_long_pause_is_not_caught_up() {
        let mut boiler = Boiler::new(1);
        boiler.advance(Duration::from_secs(10));
        boiler.advance(Duration::from_secs(400 * 86_400));
        let steps = boiler.steps;
        assert!(steps < 200, "{steps}");
        boiler.advance(Duration::from_secs(400 * 86_400 + 1));
        assert_eq!(boiler.steps, steps + 10);
    }
}
