//! Kinds "i2c", "spi" and "pwm": sensors, registers and outputs on a bus of the board.

use std::time::Duration;

/// The line of a `[[connector]]` of the kind "i2c".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct I2cBus {
    /// The N of /dev/i2c-N.
    pub bus: u8,
    /// A read of an asset or a write may take so long (`timeout`, 1 s by default).
    pub timeout: Duration,
}

/// The line of a `[[connector]]` of the kind "spi": /dev/spidevB.S.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpiBus {
    pub bus: u8,
    pub select: u8,
    /// Bits a second at most (`speed`, 1,000,000 by default).
    pub speed: u32,
    /// 0 to 3 (0 by default).
    pub mode: u8,
    pub timeout: Duration,
}

/// The line of a `[[connector]]` of the kind "pwm".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PwmChip {
    /// The N of /sys/class/pwm/pwmchipN; None: the Raspberry Pi's own, whichever model it is.
    pub chip: Option<u8>,
}

/// The device of an asset on I²C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct I2cDevice {
    pub address: u8,
    /// None: plain registers.
    pub model: Option<Model>,
}

/// A point of an asset on I²C.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum I2cPoint {
    Quantity(Quantity),
    Register { register: u8, is_little_endian: bool },
}

/// A point on a PWM channel: its duty cycle in percent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PwmPoint {
    pub channel: u8,
    pub period: Duration,
    /// The duty cycle at the start, at the stop and while the uplink it hangs on is lost.
    pub safe_percent: u8,
    pub inverted: bool,
}

/// A chip on I²C, as it is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    Bme280,
    Sht3x,
    Ads1115 { gain: Gain, rate: u16 },
}

/// What a point reads from a sensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// °C
    Temperature,
    /// % relative
    Humidity,
    /// hPa
    Pressure,
    /// V
    Voltage(Input),
}

/// Samples a second that the chip knows, in the order of their code.
pub const RATES: [u16; 8] = [8, 16, 32, 64, 128, 250, 475, 860];

/// How far the inputs are amplified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gain {
    TwoThirds,
    One,
    Two,
    Four,
    Eight,
    Sixteen,
}

impl Gain {
    pub const NAMES: [(&str, Gain); 6] = [
        ("2/3", Gain::TwoThirds),
        ("1", Gain::One),
        ("2", Gain::Two),
        ("4", Gain::Four),
        ("8", Gain::Eight),
        ("16", Gain::Sixteen),
    ];

    /// The voltage of the largest number.
    pub fn full_scale(self) -> f64 {
        match self {
            Gain::TwoThirds => 6.144,
            Gain::One => 4.096,
            Gain::Two => 2.048,
            Gain::Four => 1.024,
            Gain::Eight => 0.512,
            Gain::Sixteen => 0.256,
        }
    }
}

/// An input against ground, or one of the four pairs the chip can compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Input {
    /// 0 to 3.
    Channel(u8),
    Minus01,
    Minus03,
    Minus13,
    Minus23,
}
