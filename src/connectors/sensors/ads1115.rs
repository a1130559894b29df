//! Texas Instruments ADS1115 (4 inputs, 16 bits): single conversions, one input after the other.

use embedded_hal::delay::DelayNs;
use embedded_hal::i2c::I2c;

use super::{Measured, SensorError};
use crate::config::buses::{Gain, Input, RATES};

const CONVERSION: u8 = 0;
const CONFIG: u8 = 1;
/// Written: begin; read: done.
const OS: u16 = 1 << 15;
const SINGLE_SHOT: u16 = 1 << 8;
const COMPARATOR_OFF: u16 = 0b11;
const POLLS_MAX: u32 = 20;

fn gain_code(gain: Gain) -> u16 {
    match gain {
        Gain::TwoThirds => 0,
        Gain::One => 1,
        Gain::Two => 2,
        Gain::Four => 3,
        Gain::Eight => 4,
        Gain::Sixteen => 5,
    }
}

fn input_code(input: Input) -> u16 {
    match input {
        Input::Minus01 => 0,
        Input::Minus03 => 1,
        Input::Minus13 => 2,
        Input::Minus23 => 3,
        Input::Channel(channel) => 4 + u16::from(channel & 3),
    }
}

/// One input, in volts.
pub fn read<B: I2c, D: DelayNs>(
    bus: &mut B,
    delay: &mut D,
    address: u8,
    input: Input,
    gain: Gain,
    rate: u16,
) -> Result<Measured, SensorError<B::Error>> {
    let rate_code = RATES.iter().position(|r| *r == rate).unwrap_or(4) as u16;
    let config = OS | input_code(input) << 12 | gain_code(gain) << 9 | SINGLE_SHOT | rate_code << 5 | COMPARATOR_OFF;
    let [high, low] = config.to_be_bytes();
    bus.write(address, &[CONFIG, high, low])?;
    // The chip's clock is good to 10 %.
    let period_us = 1_100_000 / u32::from(RATES[usize::from(rate_code)]) + 50;
    delay.delay_us(period_us);
    let mut polls = 0;
    loop {
        let mut config = [0; 2];
        bus.write_read(address, &[CONFIG], &mut config)?;
        let read = u16::from_be_bytes(config);
        if read & !OS != u16::from_be_bytes([high, low]) & !OS {
            let message =
                format!("no ADS1115: its configuration was written as {high:02x}{low:02x} and reads {read:04x}");
            return Err(SensorError::Chip(message));
        }
        if read & OS != 0 {
            break;
        }
        polls += 1;
        if polls == POLLS_MAX {
            return Err(SensorError::Chip("its conversion does not end".to_owned()));
        }
        delay.delay_us(period_us / 10);
    }
    let mut data = [0; 2];
    bus.write_read(address, &[CONVERSION], &mut data)?;
    let raw = i16::from_be_bytes(data);
    let volts = f64::from(raw) * gain.full_scale() / 32_768.0;
    Ok(match raw {
        i16::MAX | i16::MIN => {
            let why = format!(
                "at the end of the range of ±{} V: the input may be beyond it",
                gain.full_scale()
            );
            Measured::Doubtful(volts, why)
        }
        _ => Measured::Good(volts),
    })
}

#[cfg(test)]
mod tests {
    use embedded_hal_mock::eh1::delay::NoopDelay;
    use embedded_hal_mock::eh1::i2c::{Mock, Transaction};

    use super::super::{Model, Quantity, Sensor};
    use super::*;

    /// `config` as the datasheet's table has it, with the begin bit.
    fn conversion(config: u16, raw: i16) -> Vec<Transaction> {
        let [high, low] = config.to_be_bytes();
        vec![
            Transaction::write(0x48, vec![CONFIG, high, low]),
            Transaction::write_read(0x48, vec![CONFIG], vec![high & 0x7f, low]),
            Transaction::write_read(0x48, vec![CONFIG], vec![high, low]),
            Transaction::write_read(0x48, vec![CONVERSION], raw.to_be_bytes().to_vec()),
        ]
    }

    #[test]
    fn channels_are_converted_one_after_the_other() {
        // AIN1 and AIN0 − AIN3, ±4.096 V, 128 samples a second.
        let steps = [conversion(0xd383, 16_384), conversion(0x9383, -8)].concat();
        let mut bus = Mock::new(&steps);
        let model = Model::Ads1115 {
            gain: Gain::One,
            rate: 128,
        };
        let mut sensor = Sensor::new(model, 0x48);
        let inputs = [Quantity::Voltage(Input::Channel(1)), Quantity::Voltage(Input::Minus03)];
        let read = sensor.read(&mut bus, &mut NoopDelay, &inputs);
        bus.done();
        assert_eq!(read, Ok(vec![Measured::Good(2.048), Measured::Good(-0.001)]));
    }

    #[test]
    fn gain_and_rate_are_in_the_configuration() {
        // AIN3, ±0.256 V, 860 and 8 samples a second; AIN0, ±6.144 V.
        for (input, gain, rate, config) in [
            (3, Gain::Sixteen, 860, 0xfbe3),
            (3, Gain::Sixteen, 8, 0xfb03),
            (0, Gain::TwoThirds, 475, 0xc1c3),
        ] {
            let mut bus = Mock::new(&conversion(config, 100));
            let read = read(&mut bus, &mut NoopDelay, 0x48, Input::Channel(input), gain, rate);
            bus.done();
            assert_eq!(read, Ok(Measured::Good(gain.full_scale() * 100.0 / 32_768.0)));
        }
    }

    #[test]
    fn a_saturated_input_is_doubtful_and_another_chip_is_none() {
        for raw in [i16::MAX, i16::MIN] {
            let mut bus = Mock::new(&conversion(0xc383, raw));
            let read = read(&mut bus, &mut NoopDelay, 0x48, Input::Channel(0), Gain::One, 128);
            bus.done();
            assert!(
                matches!(&read, Ok(Measured::Doubtful(_, why)) if why.contains("±4.096 V")),
                "{read:?}"
            );
        }
        let mut bus = Mock::new(&[
            Transaction::write(0x48, vec![CONFIG, 0xc3, 0x83]),
            Transaction::write_read(0x48, vec![CONFIG], vec![0xff, 0xff]),
        ]);
        let refused = read(&mut bus, &mut NoopDelay, 0x48, Input::Channel(0), Gain::One, 128);
        assert!(matches!(refused, Err(SensorError::Chip(_))), "{refused:?}");
        bus.done();
    }
}
