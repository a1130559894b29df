//! Sensirion SHT30, SHT31, SHT35 (temperature, humidity): single shot at high repeatability, without clock stretching,
//! which many adapters do badly. Each of the two numbers carries a CRC and stands for itself.

use embedded_hal::delay::DelayNs;
use embedded_hal::i2c::I2c;

use super::{Measured, SensorError, within};

const MEASURE: [u8; 2] = [0x24, 0x00];
/// 15.5 ms at most.
const MEASURES_MS: u32 = 16;

/// Temperature and humidity.
pub fn read<B: I2c, D: DelayNs>(
    bus: &mut B,
    delay: &mut D,
    address: u8,
) -> Result<[Measured; 2], SensorError<B::Error>> {
    bus.write(address, &MEASURE)?;
    delay.delay_ms(MEASURES_MS);
    let mut data = [0; 6];
    bus.read(address, &mut data)?;
    let part = |at: usize| {
        let bytes = [data[at], data[at + 1]];
        (crc(bytes) == data[at + 2]).then(|| f64::from(u16::from_be_bytes(bytes)) / 65_535.0)
    };
    let damaged = || Measured::Bad("the checksum is wrong: disturbed on the way, or no SHT3x".to_owned());
    let temperature = part(0).map_or_else(damaged, |part| within(175.0 * part - 45.0, -40.0..=125.0, "°C"));
    let humidity = part(3).map_or_else(damaged, |part| Measured::Good(100.0 * part));
    Ok([temperature, humidity])
}

/// CRC-8 with the polynomial 0x31, from 0xff.
fn crc(bytes: [u8; 2]) -> u8 {
    bytes.into_iter().fold(0xff, |crc, byte| {
        (0..8).fold(
            crc ^ byte,
            |crc, _| if crc & 0x80 == 0 { crc << 1 } else { crc << 1 ^ 0x31 },
        )
    })
}

#[cfg(test)]
mod tests {
    use embedded_hal::i2c::{ErrorKind, NoAcknowledgeSource};
    use embedded_hal_mock::eh1::delay::NoopDelay;
    use embedded_hal_mock::eh1::i2c::{Mock, Transaction};

    use super::super::{Model, Quantity, Sensor};
    use super::*;

    fn read_of(data: [u8; 6]) -> Vec<Measured> {
        let mut bus = Mock::new(&[
            Transaction::write(0x44, MEASURE.to_vec()),
            Transaction::read(0x44, data.to_vec()),
        ]);
        let mut sensor = Sensor::new(Model::Sht3x, 0x44);
        let both = [Quantity::Humidity, Quantity::Temperature];
        let read = sensor.read(&mut bus, &mut NoopDelay, &both);
        bus.done();
        read.expect("the mock answers")
    }

    #[test]
    fn the_checksum_is_the_datasheets() {
        assert_eq!(crc([0xbe, 0xef]), 0x92);
    }

    #[test]
    fn each_number_is_read_and_checked_for_itself() {
        let whole = [0x66, 0x66, crc([0x66, 0x66]), 0x80, 0x00, crc([0x80, 0x00])];
        match &read_of(whole)[..] {
            [Measured::Good(humidity), Measured::Good(temperature)] => {
                assert!((temperature - 25.0).abs() < 0.01 && (humidity - 50.0).abs() < 0.01);
            }
            other => panic!("{other:?}"),
        }
        // Every single wrong bit is found, and costs its own number only.
        for bit in 0..48 {
            let mut damaged = whole;
            damaged[bit / 8] ^= 1 << (bit % 8);
            let read = read_of(damaged);
            let is_bad = |m: &Measured| matches!(m, Measured::Bad(why) if why.contains("checksum"));
            assert_eq!((is_bad(&read[1]), is_bad(&read[0])), (bit < 24, bit >= 24), "bit {bit}");
        }
    }

    #[test]
    fn nobody_there_is_the_buss_fault() {
        let nobody = ErrorKind::NoAcknowledge(NoAcknowledgeSource::Address);
        let mut bus = Mock::new(&[Transaction::write(0x44, MEASURE.to_vec()).with_error(nobody)]);
        let refused = read(&mut bus, &mut NoopDelay, 0x44);
        assert_eq!(refused, Err(SensorError::Bus(nobody)));
        bus.done();
    }
}
