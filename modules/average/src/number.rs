//! Numbers of JSON, read and written with 15 significant digits. std reads and writes the last bit as well, with tables and
//! code that would be three quarters of this module.

/// The digits that a f64 holds exactly.
const DIGITS: u32 = 15;

/// A JSON number; None where it is none.
pub fn parse(text: &[u8]) -> Option<f64> {
    let (negative, mut rest) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let (mut mantissa, mut exponent, mut digits) = (0u64, 0i32, 0u32);
    let mut point = false;
    let mut any = false;
    while let Some((byte, after)) = rest.split_first() {
        match byte {
            b'0'..=b'9' => {
                any = true;
                if digits < 18 {
                    mantissa = mantissa * 10 + u64::from(byte - b'0');
                    digits += u32::from(mantissa > 0);
                    exponent = exponent.saturating_sub(i32::from(point));
                } else {
                    // Below what is kept: only its size counts.
                    exponent = exponent.saturating_add(i32::from(!point));
                }
            }
            b'.' if any && !point => {
                point = true;
                any = false;
            }
            _ => break,
        }
        rest = after;
    }
    if !any {
        return None;
    }
    if let Some((b'e' | b'E', after)) = rest.split_first() {
        let (down, after) = match after.split_first()? {
            (b'-', after) => (true, after),
            (b'+', after) => (false, after),
            _ => (false, after),
        };
        let written = after.iter().try_fold(0i32, |sum, byte| {
            byte.is_ascii_digit()
                .then(|| sum.saturating_mul(10).saturating_add(i32::from(byte - b'0')))
        });
        let written = written.filter(|_| !after.is_empty())?;
        exponent = exponent.saturating_add(if down { -written } else { written });
    } else if !rest.is_empty() {
        return None;
    }
    let value = scale(mantissa as f64, exponent);
    value.is_finite().then_some(if negative { -value } else { value })
}

/// `value * 10^exponent`. One division or multiplication by an exact power where the exponent is small: the usual case, and
/// then correct to the last bit.
fn scale(mut value: f64, mut exponent: i32) -> f64 {
    while exponent < 0 && value != 0.0 {
        let step = exponent.max(-22);
        value /= power(-step);
        exponent -= step;
    }
    while exponent > 0 && value != 0.0 && value.is_finite() {
        let step = exponent.min(22);
        value *= power(step);
        exponent -= step;
    }
    value
}

/// 10^n, exact for n up to 22.
fn power(n: i32) -> f64 {
    (0..n).fold(1.0, |power, _| power * 10.0)
}

/// Finite numbers only: JSON has no others.
pub fn write(out: &mut String, value: f64) {
    let size = value.abs();
    if size == 0.0 || !size.is_finite() {
        out.push('0');
        return;
    }
    if value < 0.0 {
        out.push('-');
    }
    // size = digits * 10^exponent, with DIGITS digits.
    let (low, high) = (power(DIGITS as i32 - 1), power(DIGITS as i32));
    let mut exponent = 0;
    while scale(size, -exponent) >= high {
        exponent += 1;
    }
    while scale(size, -exponent) < low {
        exponent -= 1;
    }
    let mut digits = (scale(size, -exponent) + 0.5) as u64;
    while digits % 10 == 0 {
        digits /= 10;
        exponent += 1;
    }
    let mut text = [b'0'; 24];
    let mut length = 0;
    while digits > 0 {
        text[length] = b'0' + (digits % 10) as u8;
        digits /= 10;
        length += 1;
    }
    let mut figures = text[..length].iter().rev().map(|byte| char::from(*byte));
    let whole = length as i32 + exponent;
    match whole {
        // All of it before the point.
        _ if exponent >= 0 && whole <= 21 => {
            out.extend(figures);
            out.extend((0..exponent).map(|_| '0'));
        }
        1..=21 => {
            out.extend(figures.by_ref().take(whole as usize));
            out.push('.');
            out.extend(figures);
        }
        -5..=0 => {
            out.push_str("0.");
            out.extend((whole..0).map(|_| '0'));
            out.extend(figures);
        }
        _ => {
            out.extend(figures.by_ref().take(1));
            if length > 1 {
                out.push('.');
                out.extend(figures);
            }
            out.push('e');
            let exponent = whole - 1;
            if exponent < 0 {
                out.push('-');
            }
            let exponent = exponent.unsigned_abs();
            for divisor in [100, 10, 1] {
                if exponent >= divisor {
                    out.push(char::from(b'0' + (exponent / divisor % 10) as u8));
                }
            }
        }
    }
}
