//! Values as they lie in registers, in both directions. Pure.

use super::super::driver::{Raw, Sample};
use crate::config::{ByteOrder, DataType, ModbusAddress};

/// The value in these registers, which are those of the point and no more.
pub(super) fn decode(words: &[u16], address: &ModbusAddress, data: DataType) -> Sample {
    if let DataType::Text { bytes } = data {
        return text(words, usize::from(bytes), address.order);
    }
    let mut bits = number(words, address.order);
    let mut width = 16 * words.len();
    if let Some((first, count)) = address.bits {
        bits = (bits >> first) & mask(count);
        width = usize::from(count);
    }
    let signed = || {
        let unused = 64 - width;
        (bits << unused).cast_signed() >> unused
    };
    Sample::Good(match data {
        DataType::Bool => Raw::Bool(bits & 1 == 1),
        DataType::Int8 | DataType::Int16 | DataType::Int32 | DataType::Int64 => Raw::Int(signed()),
        DataType::Uint8 | DataType::Uint16 | DataType::Uint32 | DataType::Uint64 => Raw::Uint(bits),
        DataType::Float32 => Raw::Float(f64::from(f32::from_bits(bits as u32))),
        DataType::Float64 => Raw::Float(f64::from_bits(bits)),
        DataType::Text { .. } => unreachable!("a text returned above"),
    })
}

/// The registers of a value; or why they cannot hold it. Of bits: where they stand in the register, all others 0.
pub(super) fn encode(value: &Raw, address: &ModbusAddress, data: DataType) -> Result<Vec<u16>, String> {
    let words = usize::from(address.width(data));
    let bits = match value {
        Raw::Bool(on) => u64::from(*on),
        Raw::Uint(n) => *n,
        Raw::Int(n) => n.cast_unsigned(),
        Raw::Float(n) if data == DataType::Float32 => u64::from((*n as f32).to_bits()),
        Raw::Float(n) => n.to_bits(),
        Raw::Text(text) => return Ok(of_text(text, words, address.order)),
    };
    let Some((first, count)) = address.bits else {
        return Ok(of_number(bits, words, address.order));
    };
    let fits = match value {
        Raw::Int(n) if matches!(data.range(), Some((min, _)) if min < 0) => {
            let half = 1i64 << (count - 1);
            (-half..half).contains(n)
        }
        Raw::Int(n) => (0..=mask(count).cast_signed()).contains(n),
        _ => bits <= mask(count),
    };
    if !fits {
        return Err(format!("{count} bits do not hold this value"));
    }
    Ok(of_number((bits & mask(count)) << first, words, address.order))
}

/// The bits of a register that are the point's, as they lie in it.
pub(super) fn mask_of(address: &ModbusAddress) -> u16 {
    let (first, count) = address.bits.unwrap_or((0, 16));
    of_number(mask(count) << first, 1, address.order)[0]
}

fn mask(count: u8) -> u64 {
    (1 << count) - 1
}

fn number(words: &[u16], order: ByteOrder) -> u64 {
    let add = |number: u64, word: &u16| {
        let word = if order.bytes_are_swapped() {
            word.swap_bytes()
        } else {
            *word
        };
        number << 16 | u64::from(word)
    };
    if order.words_are_reversed() {
        words.iter().rev().fold(0, add)
    } else {
        words.iter().fold(0, add)
    }
}

fn of_number(number: u64, words: usize, order: ByteOrder) -> Vec<u16> {
    let mut out: Vec<u16> = (0..words).rev().map(|n| (number >> (16 * n)) as u16).collect();
    if order.words_are_reversed() {
        out.reverse();
    }
    if order.bytes_are_swapped() {
        out.iter_mut().for_each(|word| *word = word.swap_bytes());
    }
    out
}

/// Up to the first NUL, without the spaces at its end: devices pad with either.
fn text(words: &[u16], length: usize, order: ByteOrder) -> Sample {
    let bytes = |word: &u16| match order.bytes_are_swapped() {
        true => word.to_le_bytes(),
        false => word.to_be_bytes(),
    };
    let bytes: Vec<u8> = words
        .iter()
        .flat_map(bytes)
        .take(length)
        .take_while(|b| *b != 0)
        .collect();
    match std::str::from_utf8(&bytes) {
        Ok(text) => Sample::Good(Raw::Text(text.trim_end_matches(' ').to_owned())),
        Err(_) => Sample::Bad("the device's text is not UTF-8".to_owned()),
    }
}

/// Filled up with NULs.
fn of_text(text: &str, words: usize, order: ByteOrder) -> Vec<u16> {
    let bytes = text.as_bytes();
    let at = |n: usize| bytes.get(n).copied().unwrap_or(0);
    let word = |n: usize| match order.bytes_are_swapped() {
        true => u16::from_le_bytes([at(2 * n), at(2 * n + 1)]),
        false => u16::from_be_bytes([at(2 * n), at(2 * n + 1)]),
    };
    (0..words).map(word).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Table, WriteFunction};

    const ORDERS: [ByteOrder; 4] = [ByteOrder::Abcd, ByteOrder::Cdab, ByteOrder::Badc, ByteOrder::Dcba];

    fn at(order: ByteOrder, bits: Option<(u8, u8)>) -> ModbusAddress {
        ModbusAddress {
            table: Table::Holding,
            start: 0,
            bits,
            order,
            write: WriteFunction::Registers,
        }
    }

    #[test]
    fn the_orders_are_what_their_names_say() {
        let of = |value: Raw, data| ORDERS.map(|order| encode(&value, &at(order, None), data).expect("fits"));
        assert_eq!(
            of(Raw::Uint(0x0A0B_0C0D), DataType::Uint32),
            [[0x0A0B, 0x0C0D], [0x0C0D, 0x0A0B], [0x0B0A, 0x0D0C], [0x0D0C, 0x0B0A]]
        );
        assert_eq!(
            of(Raw::Uint(0x0102_0304_0506_0708), DataType::Uint64)[1],
            [0x0708, 0x0506, 0x0304, 0x0102]
        );
        assert_eq!(
            of(Raw::Uint(0x0102_0304_0506_0708), DataType::Uint64)[3],
            [0x0807, 0x0605, 0x0403, 0x0201]
        );
        assert_eq!(
            of(Raw::Uint(0x0102), DataType::Uint16),
            [[0x0102], [0x0102], [0x0201], [0x0201]]
        );
        assert_eq!(
            of(Raw::Text("abc".to_owned()), DataType::Text { bytes: 4 }),
            [[0x6162, 0x6300], [0x6162, 0x6300], [0x6261, 0x0063], [0x6261, 0x0063]]
        );
        // 21.5 as an independent source has it.
        assert_eq!(of(Raw::Float(21.5), DataType::Float32)[0], [0x41AC, 0x0000]);
    }

    #[test]
    fn what_is_written_is_read() {
        let wide = [
            (DataType::Int16, vec![Raw::Int(-2), Raw::Int(32_767), Raw::Int(-32_768)]),
            (DataType::Uint16, vec![Raw::Uint(0), Raw::Uint(65_535)]),
            (
                DataType::Int32,
                vec![Raw::Int(i64::from(i32::MIN)), Raw::Int(-1), Raw::Int(7)],
            ),
            (DataType::Uint32, vec![Raw::Uint(u64::from(u32::MAX))]),
            (
                DataType::Int64,
                vec![Raw::Int(i64::MIN), Raw::Int(-1), Raw::Int(1 << 53)],
            ),
            (DataType::Uint64, vec![Raw::Uint(u64::MAX)]),
            (
                DataType::Float32,
                vec![Raw::Float(-1.5), Raw::Float(f64::from(f32::MAX))],
            ),
            (DataType::Float64, vec![Raw::Float(-1.1), Raw::Float(f64::MIN_POSITIVE)]),
            (
                DataType::Text { bytes: 5 },
                vec![Raw::Text("äöx".to_owned()), Raw::Text(String::new())],
            ),
        ];
        for order in ORDERS {
            for (data, values) in &wide {
                for value in values {
                    let words = encode(value, &at(order, None), *data).expect("fits");
                    assert_eq!(
                        decode(&words, &at(order, None), *data),
                        Sample::Good(value.clone()),
                        "{order:?}"
                    );
                }
            }
            for first in 0..16u8 {
                for count in 1..=16 - first {
                    let address = at(order, Some((first, count)));
                    let most = Raw::Uint(mask(count));
                    let words = encode(&most, &address, DataType::Uint16).expect("fits");
                    assert_eq!(words, [mask_of(&address)]);
                    assert_eq!(decode(&words, &address, DataType::Uint16), Sample::Good(most));
                    assert!(encode(&Raw::Uint(mask(count) + 1), &address, DataType::Uint16).is_err());
                    let least = Raw::Int(-(1 << (count - 1)));
                    let words = encode(&least, &address, DataType::Int16).expect("fits");
                    assert_eq!(words[0] & !mask_of(&address), 0);
                    assert_eq!(decode(&words, &address, DataType::Int16), Sample::Good(least));
                    assert!(encode(&Raw::Int(1 << (count - 1)), &address, DataType::Int16).is_err());
                }
            }
        }
    }

    #[test]
    fn texts_end_where_the_device_pads_them() {
        let of = |words: &[u16]| decode(words, &at(ByteOrder::Abcd, None), DataType::Text { bytes: 4 });
        assert_eq!(of(&[0x4142, 0x2020]), Sample::Good(Raw::Text("AB".to_owned())));
        assert_eq!(of(&[0x4100, 0x4243]), Sample::Good(Raw::Text("A".to_owned())));
        assert_eq!(of(&[0x2041, 0x0000]), Sample::Good(Raw::Text(" A".to_owned())));
        assert!(matches!(of(&[0xFFFF, 0xFFFF]), Sample::Bad(_)));
    }
}
