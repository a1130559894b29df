//! Sensors on I²C and SPI, over embedded-hal's traits: [`Sensor`] is a chip and what is known of it since it was last
//! asked who it is. Drivers of our own, since the kept ones do not bound their waits (bme280-rs 0.4 polls a status bit
//! for ever, which reads 1 for ever on a bus without its pull-up's device) or bring a tree of macros with them
//! (bme280 0.5), and there are none on embedded-hal 1.0 for the others.
//!
//! Calls block for as long as the chip measures, 1 s at most; a bus that does not answer is bounded by its own timeout.

mod ads1115;
mod bme280;
mod mcp3008;
mod sht3x;

use std::time::Duration;

use embedded_hal::delay::DelayNs;
use embedded_hal::i2c::I2c;

pub use crate::config::buses::{Model, Quantity};

pub use mcp3008::{MAX as MCP3008_MAX, read as read_mcp3008};

/// What is read for one quantity.
#[derive(Debug, Clone, PartialEq)]
pub enum Measured {
    Good(f64),
    /// There is a number, and why it is doubtful.
    Doubtful(f64, String),
    /// The chip answers, but not with this.
    Bad(String),
}

/// The chip as a whole gives nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SensorError<E> {
    Bus(E),
    /// It answers, but not as this chip does.
    Chip(String),
}

impl<E> From<E> for SensorError<E> {
    fn from(error: E) -> Self {
        SensorError::Bus(error)
    }
}

/// One chip at one address.
#[derive(Debug)]
pub struct Sensor {
    model: Model,
    address: u8,
    /// The BME280's; None until it has said who it is, and after any fault: another chip may be in its place.
    calibration: Option<bme280::Calibration>,
}

impl Sensor {
    pub fn new(model: Model, address: u8) -> Sensor {
        Sensor {
            model,
            address,
            calibration: None,
        }
    }

    /// How long a read of so many quantities takes at most, beside the transfers themselves.
    pub fn longest(&self, quantities: usize) -> Duration {
        match self.model {
            Model::Bme280 => Duration::from_millis(50),
            Model::Sht3x => Duration::from_millis(16),
            // Three of its nominal periods each.
            Model::Ads1115 { rate, .. } => Duration::from_secs_f64(3.3 / f64::from(rate.max(1))) * quantities as u32,
        }
    }

    /// Reads the quantities, one result each in their order.
    pub fn read<B: I2c, D: DelayNs>(
        &mut self,
        bus: &mut B,
        delay: &mut D,
        quantities: &[Quantity],
    ) -> Result<Vec<Measured>, SensorError<B::Error>> {
        let read = match self.model {
            Model::Bme280 => self.bme280(bus, delay, quantities),
            Model::Sht3x => {
                let [temperature, humidity] = sht3x::read(bus, delay, self.address)?;
                Ok(quantities
                    .iter()
                    .map(|quantity| match quantity {
                        Quantity::Temperature => temperature.clone(),
                        Quantity::Humidity => humidity.clone(),
                        Quantity::Pressure | Quantity::Voltage(_) => not_measured(),
                    })
                    .collect())
            }
            Model::Ads1115 { gain, rate } => quantities
                .iter()
                .map(|quantity| match quantity {
                    Quantity::Voltage(input) => ads1115::read(bus, delay, self.address, *input, gain, rate),
                    Quantity::Temperature | Quantity::Humidity | Quantity::Pressure => Ok(not_measured()),
                })
                .collect(),
        };
        if read.is_err() {
            self.calibration = None;
        }
        read
    }

    fn bme280<B: I2c, D: DelayNs>(
        &mut self,
        bus: &mut B,
        delay: &mut D,
        quantities: &[Quantity],
    ) -> Result<Vec<Measured>, SensorError<B::Error>> {
        let calibration = match self.calibration.take() {
            Some(calibration) => calibration,
            None => bme280::identify(bus, self.address)?,
        };
        let measured = bme280::read(bus, delay, self.address, &calibration)?;
        self.calibration = Some(calibration);
        Ok(quantities
            .iter()
            .map(|quantity| match quantity {
                Quantity::Temperature => measured.temperature.clone(),
                Quantity::Humidity => measured.humidity.clone(),
                Quantity::Pressure => measured.pressure.clone(),
                Quantity::Voltage(_) => not_measured(),
            })
            .collect())
    }
}

/// The configuration asks no chip for what it does not measure; said all the same, should it ever.
fn not_measured() -> Measured {
    Measured::Bad("this sensor does not measure that".to_owned())
}

/// A number inside of what the chip is specified for.
fn within(value: f64, range: std::ops::RangeInclusive<f64>, unit: &str) -> Measured {
    if range.contains(&value) {
        return Measured::Good(value);
    }
    let (min, max) = (range.start(), range.end());
    Measured::Doubtful(value, format!("outside of the sensor's range of {min} to {max} {unit}"))
}
