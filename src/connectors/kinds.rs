//! The drivers there are, as one: the engine is compiled once, and not once a kind (80 kB each).

use super::driver::{Driver, Event, Fault, Raw, Sample};
use super::{Setup, gpio, i2c, modbus, pwm, simulator, spi};
use crate::config::ConnectorKind;
use crate::status::Part;

pub(super) enum AnyDriver {
    Simulator(simulator::Simulator),
    Modbus(Box<modbus::Modbus>),
    Gpio(gpio::Gpio),
    I2c(i2c::I2c),
    Spi(spi::Spi),
    Pwm(pwm::Pwm),
}

impl AnyDriver {
    /// To be called on the runtime that the driver runs on.
    pub fn new(setup: &Setup, part: &Part) -> AnyDriver {
        match &setup.connector.kind {
            ConnectorKind::Simulator => AnyDriver::Simulator(simulator::Simulator::new(setup)),
            ConnectorKind::Modbus(line) => AnyDriver::Modbus(Box::new(modbus::Modbus::new(setup, line, part))),
            ConnectorKind::Gpio(chip) => AnyDriver::Gpio(gpio::Gpio::new(setup, chip)),
            ConnectorKind::I2c(bus) => AnyDriver::I2c(i2c::I2c::new(setup, bus)),
            ConnectorKind::Spi(bus) => AnyDriver::Spi(spi::Spi::new(setup, bus)),
            ConnectorKind::Pwm(chip) => AnyDriver::Pwm(pwm::Pwm::new(setup, chip)),
        }
    }
}

impl Driver for AnyDriver {
    async fn read(&mut self, asset: usize, points: &[usize], samples: &mut Vec<Sample>) -> Result<(), Fault> {
        match self {
            AnyDriver::Simulator(driver) => driver.read(asset, points, samples).await,
            AnyDriver::Modbus(driver) => driver.read(asset, points, samples).await,
            AnyDriver::Gpio(driver) => driver.read(asset, points, samples).await,
            AnyDriver::I2c(driver) => driver.read(asset, points, samples).await,
            AnyDriver::Spi(driver) => driver.read(asset, points, samples).await,
            AnyDriver::Pwm(driver) => driver.read(asset, points, samples).await,
        }
    }

    async fn write(&mut self, asset: usize, point: usize, value: &Raw) -> Result<(), Fault> {
        match self {
            AnyDriver::Simulator(driver) => driver.write(asset, point, value).await,
            AnyDriver::Modbus(driver) => driver.write(asset, point, value).await,
            AnyDriver::Gpio(driver) => driver.write(asset, point, value).await,
            AnyDriver::I2c(driver) => driver.write(asset, point, value).await,
            AnyDriver::Spi(driver) => driver.write(asset, point, value).await,
            AnyDriver::Pwm(driver) => driver.write(asset, point, value).await,
        }
    }

    async fn event(&mut self) -> Event {
        match self {
            AnyDriver::Gpio(driver) => driver.event().await,
            AnyDriver::Simulator(_)
            | AnyDriver::Modbus(_)
            | AnyDriver::I2c(_)
            | AnyDriver::Spi(_)
            | AnyDriver::Pwm(_) => std::future::pending().await,
        }
    }

    async fn safe(&mut self) -> Result<(), Fault> {
        match self {
            AnyDriver::Simulator(driver) => driver.safe().await,
            AnyDriver::Modbus(driver) => driver.safe().await,
            AnyDriver::Gpio(driver) => driver.safe().await,
            AnyDriver::I2c(driver) => driver.safe().await,
            AnyDriver::Spi(driver) => driver.safe().await,
            AnyDriver::Pwm(driver) => driver.safe().await,
        }
    }
}
