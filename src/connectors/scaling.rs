//! Raw values of machines and values in engineering units, in both directions; what may be written. Pure.

use super::driver::Raw;
use crate::config::{DataType, Point};

/// How a point's raw value becomes the published one.
#[derive(Debug, Clone)]
pub(super) struct Scaling {
    data: DataType,
    /// Scale and offset where they change anything.
    linear: Option<(f64, f64)>,
    /// An integer times a short decimal is a short decimal: 213 × 0.1 is 21.3, not 21.3 and fifteen digits of noise.
    /// Powers of ten to round by; None where scale or offset have more digits than that.
    per_unit: Option<f64>,
}

impl Scaling {
    pub fn new(point: &Point) -> Scaling {
        let changes = point.scale != 1.0 || point.offset != 0.0;
        let is_integer = point.data.range().is_some();
        let decimals = || decimals(point.scale).zip(decimals(point.offset)).map(|(s, o)| s.max(o));
        Scaling {
            data: point.data,
            linear: changes.then_some((point.scale, point.offset)),
            per_unit: (changes && is_integer).then(decimals).flatten().map(|d| 10f64.powi(d)),
        }
    }

    /// Whether a number is no more exact than 32 bits hold: it is written as short as that.
    pub fn is_narrow(&self) -> bool {
        self.data == DataType::Float32
    }

    /// The published value, or why there is none.
    pub fn published(&self, raw: Raw) -> Result<Raw, String> {
        let value = match (self.linear, &raw) {
            (None, Raw::Float(number)) => *number,
            (None, _) | (Some(_), Raw::Bool(_) | Raw::Text(_)) => return Ok(raw),
            (Some(linear), Raw::Int(n)) => self.scaled(*n as f64, linear),
            (Some(linear), Raw::Uint(n)) => self.scaled(*n as f64, linear),
            (Some((scale, offset)), Raw::Float(number)) => number * scale + offset,
        };
        if value.is_finite() {
            Ok(Raw::Float(value))
        } else {
            Err("the device's value is not a number".to_owned())
        }
    }

    fn scaled(&self, number: f64, (scale, offset): (f64, f64)) -> f64 {
        let value = number * scale + offset;
        match self.per_unit {
            // Beyond 2^53 there are no decimals left to round.
            Some(per_unit) if (value * per_unit).abs() < 9e15 => (value * per_unit).round() / per_unit,
            _ => value,
        }
    }

    /// The raw value of a JSON value that somebody wants to write.
    pub fn raw(&self, value: &serde_json::Value) -> Result<Raw, String> {
        let wanted = |what: &str| format!("the point is of type {}: write {what}", self.data.name());
        match self.data {
            DataType::Bool => value
                .as_bool()
                .or_else(|| match value.as_i64() {
                    Some(0) => Some(false),
                    Some(1) => Some(true),
                    _ => None,
                })
                .map(Raw::Bool)
                .ok_or_else(|| wanted("true or false")),
            DataType::Text { bytes } => match value.as_str() {
                Some(text) if text.len() <= usize::from(bytes) => Ok(Raw::Text(text.to_owned())),
                Some(text) => Err(format!("the text has {} bytes, the point holds {bytes}", text.len())),
                None => Err(wanted("a text")),
            },
            data => {
                let integer = integer(value).filter(|_| self.linear.is_none());
                match (data.range(), integer) {
                    (Some(range), Some(number)) => fit(number, range, data),
                    (Some(range), None) => {
                        let number = number(value).ok_or_else(|| wanted("a number"))?;
                        let raw = self.unscaled(number);
                        // A value between two steps of the machine becomes the nearer one; without a scale a fraction
                        // is a mistake.
                        if self.linear.is_none() && raw.fract() != 0.0 {
                            return Err(wanted("an integer"));
                        }
                        let rounded = raw.round();
                        if !(-1.8e19..=1.9e19).contains(&rounded) {
                            return Err(format!("{value} is outside of what {} holds", data.name()));
                        }
                        fit(rounded as i128, range, data)
                    }
                    (None, _) => {
                        let raw = self.unscaled(number(value).ok_or_else(|| wanted("a number"))?);
                        let is_held = match data {
                            DataType::Float32 => (raw as f32).is_finite(),
                            _ => raw.is_finite(),
                        };
                        match is_held {
                            true => Ok(Raw::Float(raw)),
                            false => Err(format!("{value} is outside of what {} holds", data.name())),
                        }
                    }
                }
            }
        }
    }

    fn unscaled(&self, number: f64) -> f64 {
        match self.linear {
            Some((scale, offset)) => (number - offset) / scale,
            None => number,
        }
    }
}

/// A number as JSON writes it, or, beyond 2^53, as the text that values are published as.
fn number(value: &serde_json::Value) -> Option<f64> {
    match value.as_str() {
        Some(text) => text.parse::<f64>().ok().filter(|n| n.is_finite()),
        None => value.as_f64(),
    }
}

fn integer(value: &serde_json::Value) -> Option<i128> {
    match value.as_str() {
        Some(text) => text.parse().ok(),
        None => value
            .as_i64()
            .map(i128::from)
            .or_else(|| value.as_u64().map(i128::from)),
    }
}

fn fit(number: i128, (min, max): (i128, i128), data: DataType) -> Result<Raw, String> {
    if !(min..=max).contains(&number) {
        return Err(format!(
            "{number} is outside of what {} holds ({min} to {max})",
            data.name()
        ));
    }
    Ok(match (u64::try_from(number), i64::try_from(number)) {
        (Ok(n), _) if min == 0 => Raw::Uint(n),
        (_, Ok(n)) => Raw::Int(n),
        // An unsigned number above i64::MAX in a signed range does not exist.
        (Ok(n), Err(_)) => Raw::Uint(n),
        (Err(_), Err(_)) => return Err(format!("{number} is outside of what {} holds", data.name())),
    })
}

/// Digits behind the point of a number with few of them.
fn decimals(number: f64) -> Option<i32> {
    (0..=9).find(|d| {
        let scaled = number * 10f64.powi(*d);
        (scaled - scaled.round()).abs() < 1e-9 * scaled.abs().max(1e-3)
    })
}

/// Whether a value that is to be written (in the published unit) is within the point's limits.
pub(super) fn within_limits(point: &Point, value: &serde_json::Value) -> Result<(), String> {
    let Some(limits) = point.writable else {
        return Err("the point is not writable".to_owned());
    };
    let Some(number) = number(value) else { return Ok(()) };
    let unit = point.unit.as_ref().map_or(String::new(), |u| format!(" {u}"));
    match (limits.min, limits.max) {
        (Some(min), _) if number < min => Err(format!("{number}{unit} is below the limit of {min}{unit}")),
        (_, Some(max)) if number > max => Err(format!("{number}{unit} is above the limit of {max}{unit}")),
        _ => Ok(()),
    }
}

/// Whether what was read back is what was written; floats as exact as the machine holds them.
pub(super) fn is_same(data: DataType, written: &Raw, read: &Raw) -> bool {
    match (data, written, read) {
        (DataType::Float32, Raw::Float(a), Raw::Float(b)) => (*a as f32).to_bits() == (*b as f32).to_bits() || a == b,
        (_, Raw::Int(a), Raw::Uint(b)) | (_, Raw::Uint(b), Raw::Int(a)) => i128::from(*a) == i128::from(*b),
        _ => written == read,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Address, Limits, Signal};
    use serde_json::json;
    use std::time::Duration;

    fn point(data: DataType, scale: f64, offset: f64) -> Point {
        Point {
            name: "p".to_owned(),
            address: Address::Simulator(Signal::Temperature),
            data,
            unit: Some("°C".to_owned()),
            scale,
            offset,
            deadband: None,
            every: Duration::from_secs(1),
            writable: Some(Limits {
                min: Some(-10.0),
                max: Some(120.0),
                read_back: false,
            }),
        }
    }

    fn published(data: DataType, scale: f64, offset: f64, raw: Raw) -> Result<Raw, String> {
        Scaling::new(&point(data, scale, offset)).published(raw)
    }

    #[test]
    fn scaled_integers_are_short_decimals() {
        for n in -2_000..2_000i64 {
            let expected: f64 = format!("{}{}.{}", if n < 0 { "-" } else { "" }, n.abs() / 10, n.abs() % 10)
                .parse()
                .expect("a number");
            assert_eq!(
                published(DataType::Int16, 0.1, 0.0, Raw::Int(n)),
                Ok(Raw::Float(expected)),
                "{n}"
            );
        }
        assert_eq!(
            published(DataType::Uint16, 0.01, -40.0, Raw::Uint(6_550)),
            Ok(Raw::Float(25.5))
        );
        assert_eq!(published(DataType::Int32, 1.0, 0.0, Raw::Int(-7)), Ok(Raw::Int(-7)));
        let max = published(DataType::Uint64, 1.0, 0.0, Raw::Uint(u64::MAX));
        assert_eq!(max, Ok(Raw::Uint(u64::MAX)), "no detour by a float");
        assert_eq!(
            published(DataType::Int16, 1.0 / 3.0, 0.0, Raw::Int(3)),
            Ok(Raw::Float(1.0))
        );
    }

    #[test]
    fn what_is_no_number_is_no_value() {
        for number in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
            assert!(published(DataType::Float32, 1.0, 0.0, Raw::Float(number)).is_err());
            assert!(published(DataType::Float64, 2.0, 1.0, Raw::Float(number)).is_err());
        }
        assert!(published(DataType::Float64, 10.0, 0.0, Raw::Float(f64::MAX)).is_err());
    }

    #[test]
    fn what_is_written_is_what_is_read_then() {
        for (data, scale, offset, typed, raw) in [
            (DataType::Int16, 0.1, 0.0, json!(-21.3), Raw::Int(-213)),
            (DataType::Uint16, 0.01, -40.0, json!(25.5), Raw::Uint(6_550)),
            (DataType::Uint8, 1.0, 0.0, json!(255), Raw::Uint(255)),
            (DataType::Int8, 1.0, 0.0, json!(-128), Raw::Int(-128)),
            (
                DataType::Uint64,
                1.0,
                0.0,
                json!("18446744073709551615"),
                Raw::Uint(u64::MAX),
            ),
            (
                DataType::Int64,
                1.0,
                0.0,
                json!("-9223372036854775808"),
                Raw::Int(i64::MIN),
            ),
            (
                DataType::Uint64,
                1.0,
                0.0,
                json!(9_007_199_254_740_993u64),
                Raw::Uint(9_007_199_254_740_993),
            ),
            (DataType::Float64, 2.0, 1.0, json!(5), Raw::Float(2.0)),
            (DataType::Bool, 1.0, 0.0, json!(1), Raw::Bool(true)),
            (DataType::Int16, 1.0, 0.0, json!(5.0), Raw::Int(5)),
        ] {
            let scaling = Scaling::new(&point(data, scale, offset));
            assert_eq!(scaling.raw(&typed), Ok(raw.clone()), "{data:?} {typed}");
            assert!(raw.fits(data), "{raw:?} {data:?}");
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_in_words() {
        let refused = |data, scale, typed: serde_json::Value| {
            Scaling::new(&point(data, scale, 0.0))
                .raw(&typed)
                .expect_err(&typed.to_string())
        };
        assert_eq!(
            refused(DataType::Int16, 1.0, json!(40_000)),
            "40000 is outside of what int16 holds (-32768 to 32767)"
        );
        assert_eq!(
            refused(DataType::Uint16, 0.1, json!(-1)),
            "-10 is outside of what uint16 holds (0 to 65535)"
        );
        assert_eq!(
            refused(DataType::Int16, 1.0, json!(1.5)),
            "the point is of type int16: write an integer"
        );
        assert_eq!(
            refused(DataType::Int16, 1.0, json!(true)),
            "the point is of type int16: write a number"
        );
        assert_eq!(
            refused(DataType::Bool, 1.0, json!(2)),
            "the point is of type bool: write true or false"
        );
        assert_eq!(
            refused(DataType::Float32, 1.0, json!(1e39)),
            "1e+39 is outside of what float32 holds"
        );
        assert_eq!(
            refused(DataType::Uint64, 1.0, json!(1e300)),
            "1e+300 is outside of what uint64 holds"
        );
        assert_eq!(
            refused(DataType::Text { bytes: 3 }, 1.0, json!("ä1x")),
            "the text has 4 bytes, the point holds 3"
        );
        for value in [json!(null), json!([1]), json!({}), json!("x"), json!("NaN"), json!("")] {
            refused(DataType::Float64, 1.0, value);
        }
    }

    #[test]
    fn limits_are_in_the_published_unit() {
        let point = point(DataType::Int16, 0.1, 0.0);
        assert_eq!(within_limits(&point, &json!(120)), Ok(()));
        let above = within_limits(&point, &json!(120.1)).expect_err("above");
        assert_eq!(above, "120.1 °C is above the limit of 120 °C");
        let below = within_limits(&point, &json!("-11")).expect_err("below");
        assert_eq!(below, "-11 °C is below the limit of -10 °C");
        let fixed = Point {
            writable: None,
            ..point
        };
        assert!(within_limits(&fixed, &json!(1)).is_err());
    }
}
