//! Microchip MCP3008 (8 inputs, 10 bits, SPI): one transfer an input, the count 0 to 1,023.

use embedded_hal::spi::SpiDevice;

/// The largest count.
pub const MAX: u16 = 1_023;

/// The count of one input against ground, 0 to 7; None where no chip drives the line: it holds it low for one bit
/// before the number.
pub fn read<S: SpiDevice>(spi: &mut S, channel: u8) -> Result<Option<u16>, S::Error> {
    let mut data = [1, 0x80 | (channel & 7) << 4, 0];
    spi.transfer_in_place(&mut data)?;
    let has_null_bit = data[1] & 0x04 == 0;
    Ok(has_null_bit.then(|| u16::from_be_bytes([data[1] & 0x03, data[2]])))
}

#[cfg(test)]
mod tests {
    use embedded_hal_mock::eh1::spi::{Mock, Transaction};

    use super::*;

    fn read_of(channel: u8, sent: [u8; 3], answer: [u8; 3]) -> Option<u16> {
        let mut spi = Mock::new(&[
            Transaction::transaction_start(),
            Transaction::transfer_in_place(sent.to_vec(), answer.to_vec()),
            Transaction::transaction_end(),
        ]);
        let read = read(&mut spi, channel).expect("the mock answers");
        spi.done();
        read
    }

    #[test]
    fn the_channel_is_asked_for_and_the_count_is_cut_out() {
        assert_eq!(read_of(0, [1, 0x80, 0], [0xff, 0xf9, 0x23]), Some(0x123));
        assert_eq!(read_of(7, [1, 0xf0, 0], [0, 0x03, 0xff]), Some(MAX));
        assert_eq!(read_of(5, [1, 0xd0, 0], [0, 0, 0]), Some(0));
        assert_eq!(read_of(1, [1, 0x90, 0], [0xff; 3]), None, "nobody drives the line");
    }
}
