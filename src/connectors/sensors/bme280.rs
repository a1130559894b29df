//! Bosch BME280 (temperature, humidity, pressure) and BMP280 (without humidity): forced mode, no oversampling, no filter;
//! the compensation of its datasheet's section 8.1, in floating point, where nothing can overflow.

use embedded_hal::delay::DelayNs;
use embedded_hal::i2c::I2c;

use super::{Measured, SensorError, within};

const ID: u8 = 0xd0;
const ID_BME280: u8 = 0x60;
const ID_BMP280: u8 = 0x58;
const CALIBRATION_1: u8 = 0x88;
const CALIBRATION_2: u8 = 0xe1;
const CTRL_HUM: u8 = 0xf2;
const STATUS: u8 = 0xf3;
const CTRL_MEAS: u8 = 0xf4;
const CONFIG: u8 = 0xf5;
const DATA: u8 = 0xf7;
/// Temperature and pressure once each, then asleep again.
const FORCED: u8 = 0b0010_0101;
const MEASURING: u8 = 0x08;
/// The longest such a measurement takes is 9.3 ms.
const MEASURES_MS: u32 = 10;
const POLLS_MAX: u32 = 20;

/// The constants of one chip, burnt in at the factory; named as in the datasheet.
#[derive(Debug, Clone)]
pub struct Calibration {
    t: [f64; 3],
    p: [f64; 9],
    /// None on a BMP280.
    h: Option<[f64; 6]>,
}

#[derive(Debug, Clone)]
pub struct All {
    pub temperature: Measured,
    pub humidity: Measured,
    pub pressure: Measured,
}

/// Asks the chip who it is and for its constants.
pub fn identify<B: I2c>(bus: &mut B, address: u8) -> Result<Calibration, SensorError<B::Error>> {
    let mut id = [0];
    bus.write_read(address, &[ID], &mut id)?;
    let has_humidity = match id[0] {
        ID_BME280 => true,
        ID_BMP280 => false,
        other => {
            let message =
                format!("no BME280: it says it is {other:#04x}, not {ID_BME280:#04x} (or {ID_BMP280:#04x}, a BMP280)");
            return Err(SensorError::Chip(message));
        }
    };
    let mut first = [0; 26];
    bus.write_read(address, &[CALIBRATION_1], &mut first)?;
    let mut second = [0; 7];
    if has_humidity {
        bus.write_read(address, &[CALIBRATION_2], &mut second)?;
    }
    Calibration::parse(&first, has_humidity.then_some(&second))
        .ok_or_else(|| SensorError::Chip("its calibration constants are empty".to_owned()))
}

/// Measures once.
pub fn read<B: I2c, D: DelayNs>(
    bus: &mut B,
    delay: &mut D,
    address: u8,
    calibration: &Calibration,
) -> Result<All, SensorError<B::Error>> {
    if calibration.h.is_some() {
        // Takes effect with the write to CTRL_MEAS.
        bus.write(address, &[CTRL_HUM, 0b001])?;
    }
    bus.write(address, &[CONFIG, 0])?;
    bus.write(address, &[CTRL_MEAS, FORCED])?;
    delay.delay_ms(MEASURES_MS);
    let mut polls = 0;
    loop {
        let mut status = [0];
        bus.write_read(address, &[STATUS], &mut status)?;
        if status[0] & MEASURING == 0 {
            break;
        }
        polls += 1;
        if polls == POLLS_MAX {
            return Err(SensorError::Chip("its measurement does not end".to_owned()));
        }
        delay.delay_ms(2);
    }
    let mut data = [0; 8];
    let data = match calibration.h {
        Some(_) => &mut data[..],
        None => &mut data[..6],
    };
    bus.write_read(address, &[DATA], data)?;
    let bits_20 = |at: usize| u32::from(data[at]) << 12 | u32::from(data[at + 1]) << 4 | u32::from(data[at + 2]) >> 4;
    let humidity = calibration.h.map(|_| u16::from_be_bytes([data[6], data[7]]));
    Ok(calibration.all(bits_20(3), bits_20(0), humidity))
}

impl Calibration {
    /// From the registers 0x88 to 0xa1 and 0xe1 to 0xe7; None where nothing was ever burnt in.
    fn parse(first: &[u8; 26], second: Option<&[u8; 7]>) -> Option<Calibration> {
        let unsigned = |at: usize| f64::from(u16::from_le_bytes([first[at], first[at + 1]]));
        let signed = |at: usize| f64::from(i16::from_le_bytes([first[at], first[at + 1]]));
        let t = [unsigned(0), signed(2), signed(4)];
        let mut p = [unsigned(6); 9];
        for (i, p) in p.iter_mut().enumerate().skip(1) {
            *p = signed(6 + 2 * i);
        }
        let h = second.map(|s| {
            // Two numbers of 12 bits share the byte 0xe5.
            let nibbles = |high: u8, low: u8| f64::from(i16::from(high as i8) * 16 + i16::from(low));
            [
                f64::from(first[25]),
                f64::from(i16::from_le_bytes([s[0], s[1]])),
                f64::from(s[2]),
                nibbles(s[3], s[4] & 0x0f),
                nibbles(s[5], s[4] >> 4),
                f64::from(s[6] as i8),
            ]
        });
        let is_empty = |value: f64| value == 0.0 || value == f64::from(u16::MAX);
        (!is_empty(t[0]) && !is_empty(p[0])).then_some(Calibration { t, p, h })
    }

    fn all(&self, temperature: u32, pressure: u32, humidity: Option<u16>) -> All {
        let skipped = || Measured::Bad("the sensor did not measure it".to_owned());
        if temperature == 0x8_0000 {
            return All {
                temperature: skipped(),
                humidity: skipped(),
                pressure: skipped(),
            };
        }
        let fine = self.fine(f64::from(temperature));
        All {
            temperature: within(fine / 5_120.0, -40.0..=85.0, "°C"),
            pressure: match self.pascal(fine, f64::from(pressure)) {
                Some(pascal) if pressure != 0x8_0000 => within(pascal / 100.0, 300.0..=1_100.0, "hPa"),
                Some(_) | None => skipped(),
            },
            humidity: match (humidity, self.h) {
                (Some(0x8000), _) => skipped(),
                (Some(raw), Some(h)) => Measured::Good(relative(h, fine, f64::from(raw))),
                (None, _) | (_, None) => Measured::Bad("the chip is a BMP280, which measures no humidity".to_owned()),
            },
        }
    }

    /// t_fine: the temperature in 1/5120 °C.
    fn fine(&self, raw: f64) -> f64 {
        let [t1, t2, t3] = self.t;
        let linear = (raw / 16_384.0 - t1 / 1_024.0) * t2;
        let offset = raw / 131_072.0 - t1 / 8_192.0;
        linear + offset * offset * t3
    }

    fn pascal(&self, fine: f64, raw: f64) -> Option<f64> {
        let [p1, p2, p3, p4, p5, p6, p7, p8, p9] = self.p;
        let a = fine / 2.0 - 64_000.0;
        let b = (a * a * p6 / 32_768.0 + a * p5 * 2.0) / 4.0 + p4 * 65_536.0;
        let a = (p3 * a * a / 524_288.0 + p2 * a) / 524_288.0;
        let a = (1.0 + a / 32_768.0) * p1;
        if a == 0.0 {
            return None;
        }
        let p = (1_048_576.0 - raw - b / 4_096.0) * 6_250.0 / a;
        Some(p + (p9 * p * p / 2_147_483_648.0 + p * p8 / 32_768.0 + p7) / 16.0)
    }
}

fn relative([h1, h2, h3, h4, h5, h6]: [f64; 6], fine: f64, raw: f64) -> f64 {
    let v = fine - 76_800.0;
    let scale = h2 / 65_536.0 * (1.0 + h6 / 67_108_864.0 * v * (1.0 + h3 / 67_108_864.0 * v));
    let v = (raw - (h4 * 64.0 + h5 / 16_384.0 * v)) * scale;
    (v * (1.0 - h1 * v / 524_288.0)).clamp(0.0, 100.0)
}

#[cfg(test)]
mod tests {
    use embedded_hal_mock::eh1::delay::NoopDelay;
    use embedded_hal_mock::eh1::i2c::{Mock, Transaction};

    use super::super::{Model, Quantity, Sensor};
    use super::*;

    const ADDRESS: u8 = 0x76;

    /// The constants of the worked example in the BMP280's datasheet (section 3.12), and plausible ones for humidity.
    fn registers() -> ([u8; 26], [u8; 7]) {
        let words: [i32; 12] = [
            27_504, 26_435, -1_000, 36_477, -10_685, 3_024, 2_855, 140, -7, 15_500, -14_600, 6_000,
        ];
        let mut first = [0; 26];
        for (i, word) in words.into_iter().enumerate() {
            first[2 * i..2 * i + 2].copy_from_slice(&(word as u16).to_le_bytes());
        }
        first[25] = 75;
        // H2 = 362, H3 = 0, H4 = 315, H5 = 50, H6 = 30
        (first, [0x6a, 0x01, 0, 0x13, 0x2b, 0x03, 30])
    }

    fn data(temperature: u32, pressure: u32, humidity: u16) -> Vec<u8> {
        let bits_20 = |raw: u32| [(raw >> 12) as u8, (raw >> 4) as u8, (raw << 4) as u8];
        let [h, l] = humidity.to_be_bytes();
        [&bits_20(pressure)[..], &bits_20(temperature), &[h, l]].concat()
    }

    fn identification() -> Vec<Transaction> {
        let (first, second) = registers();
        vec![
            Transaction::write_read(ADDRESS, vec![ID], vec![ID_BME280]),
            Transaction::write_read(ADDRESS, vec![CALIBRATION_1], first.to_vec()),
            Transaction::write_read(ADDRESS, vec![CALIBRATION_2], second.to_vec()),
        ]
    }

    fn measurement(data: Vec<u8>) -> Vec<Transaction> {
        vec![
            Transaction::write(ADDRESS, vec![CTRL_HUM, 1]),
            Transaction::write(ADDRESS, vec![CONFIG, 0]),
            Transaction::write(ADDRESS, vec![CTRL_MEAS, 0x25]),
            Transaction::write_read(ADDRESS, vec![STATUS], vec![MEASURING]),
            Transaction::write_read(ADDRESS, vec![STATUS], vec![0]),
            Transaction::write_read(ADDRESS, vec![DATA], data),
        ]
    }

    fn number(measured: &Measured) -> f64 {
        match measured {
            Measured::Good(value) | Measured::Doubtful(value, _) => *value,
            Measured::Bad(why) => panic!("{why}"),
        }
    }

    #[test]
    fn the_datasheets_example_comes_out() {
        let steps = [identification(), measurement(data(519_888, 415_148, 30_000))].concat();
        let mut bus = Mock::new(&steps);
        let mut sensor = Sensor::new(Model::Bme280, ADDRESS);
        let all = [Quantity::Pressure, Quantity::Temperature];
        let read = sensor.read(&mut bus, &mut NoopDelay, &all).expect("a measurement");
        bus.done();
        // 100,653.27 Pa and 25.08 °C.
        assert!((number(&read[0]) - 1_006.532_7).abs() < 0.0001, "{read:?}");
        assert!((number(&read[1]) - 25.08).abs() < 0.005, "{read:?}");
    }

    /// bme280-rs computes in integers, after the datasheet's other section.
    #[test]
    fn another_driver_computes_the_same() {
        let (first, second) = registers();
        let calibration = Calibration::parse(&first, Some(&second)).expect("constants");
        for step in 0..60u32 {
            let (t, p) = (400_000 + step * 4_000, 280_000 + step * 5_000);
            let h = 20_000 + (step * 400) as u16;
            let raw = data(t, p, h);
            let steps = [
                vec![
                    Transaction::write(ADDRESS, vec![0xe0, 0xb6]),
                    Transaction::write_read(ADDRESS, vec![STATUS], vec![0]),
                    Transaction::write_read(ADDRESS, vec![CALIBRATION_1], first.to_vec()),
                    Transaction::write_read(ADDRESS, vec![CALIBRATION_2], second.to_vec()),
                    Transaction::write(ADDRESS, vec![CTRL_MEAS, 0]),
                    Transaction::write(ADDRESS, vec![CTRL_HUM, 0]),
                    Transaction::write(ADDRESS, vec![CONFIG, 0]),
                    Transaction::write(ADDRESS, vec![CTRL_MEAS, 0]),
                ],
                vec![Transaction::write_read(ADDRESS, vec![DATA], raw)],
            ]
            .concat();
            let mut bus = Mock::new(&steps);
            let mut other = bme280_rs::Bme280::new_with_address(bus.clone(), ADDRESS, NoopDelay);
            other.init().expect("the mock answers");
            let theirs = other.read_sample().expect("the mock answers");
            bus.done();
            let ours = calibration.all(t, p, Some(h));
            let pairs = [
                (&ours.temperature, theirs.temperature, 1.0, 0.011),
                (&ours.pressure, theirs.pressure, 100.0, 0.5),
                (&ours.humidity, theirs.humidity, 1.0, 0.03),
            ];
            for (ours, theirs, per_unit, tolerance) in pairs {
                let theirs = f64::from(theirs.expect("measured"));
                let difference = number(ours) * per_unit - theirs;
                assert!(difference.abs() < tolerance, "step {step}: {ours:?} and {theirs}");
            }
        }
    }

    #[test]
    fn another_chip_is_named_and_asked_again() {
        let mut sensor = Sensor::new(Model::Bme280, ADDRESS);
        let mut bus = Mock::new(&[Transaction::write_read(ADDRESS, vec![ID], vec![0xff])]);
        let refused = sensor.read(&mut bus, &mut NoopDelay, &[Quantity::Temperature]);
        assert!(
            matches!(&refused, Err(SensorError::Chip(why)) if why.contains("it says it is 0xff")),
            "{refused:?}"
        );
        bus.done();
        // Empty constants.
        let mut bus = Mock::new(&[
            Transaction::write_read(ADDRESS, vec![ID], vec![ID_BMP280]),
            Transaction::write_read(ADDRESS, vec![CALIBRATION_1], vec![0; 26]),
        ]);
        let refused = sensor.read(&mut bus, &mut NoopDelay, &[Quantity::Temperature]);
        assert!(
            matches!(&refused, Err(SensorError::Chip(why)) if why.contains("empty")),
            "{refused:?}"
        );
        bus.done();
    }

    #[test]
    fn what_was_not_measured_is_bad_and_what_is_out_of_range_doubtful() {
        let (first, second) = registers();
        let bme = Calibration::parse(&first, Some(&second)).expect("constants");
        let none = bme.all(0x8_0000, 415_148, Some(30_000));
        assert!(matches!(none.pressure, Measured::Bad(_)), "it needs the temperature");
        let some = bme.all(519_888, 0x8_0000, Some(0x8000));
        assert!(matches!(some.temperature, Measured::Good(_)));
        assert!(matches!(
            (some.pressure, some.humidity),
            (Measured::Bad(_), Measured::Bad(_))
        ));
        assert!(matches!(
            bme.all(0xf_ffff, 415_148, None).temperature,
            Measured::Doubtful(..)
        ));
        let bmp = Calibration::parse(&first, None).expect("constants");
        let why = bmp.all(519_888, 415_148, None).humidity;
        assert!(matches!(&why, Measured::Bad(why) if why.contains("BMP280")), "{why:?}");
    }

    #[test]
    fn a_measurement_that_does_not_end_is_given_up_and_no_number_panics() {
        let busy = Transaction::write_read(ADDRESS, vec![STATUS], vec![0xff]);
        let mut steps = identification();
        steps.extend(measurement(Vec::new()).into_iter().take(3));
        steps.extend(std::iter::repeat_n(busy, POLLS_MAX as usize));
        let mut bus = Mock::new(&steps);
        let mut sensor = Sensor::new(Model::Bme280, ADDRESS);
        let refused = sensor.read(&mut bus, &mut NoopDelay, &[Quantity::Temperature]);
        assert!(matches!(&refused, Err(SensorError::Chip(_))), "{refused:?}");
        bus.done();
        for bytes in [0x00u8, 0x7f, 0x80, 0xfe, 0xff] {
            let mut first = [bytes; 26];
            first[0] = 1;
            first[6] = 1;
            if let Some(odd) = Calibration::parse(&first, Some(&[bytes; 7])) {
                for raw in [0, 1, 0x7_ffff, 0xf_ffff] {
                    odd.all(raw, raw, Some(raw as u16));
                }
            }
        }
    }
}
