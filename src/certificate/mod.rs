//! Certificates in PEM files, read by the gateway itself: for how long they are valid, whom they name (RFC 5280, 4.1),
//! and whether a certificate and a key belong together. Whether one is trusted is rustls's to say ([`server`]).

pub mod server;

use data_encoding::BASE64;

use crate::clock::Timestamp;

/// Before this many days it is said that a certificate ends.
pub const SOON_DAYS: i64 = 30;
const DAY_MS: i64 = 86_400_000;

/// The DER of each certificate.
pub fn pem(text: &str) -> Vec<Vec<u8>> {
    let blocks = text.split("-----BEGIN CERTIFICATE-----").skip(1);
    blocks
        .filter_map(|block| {
            let body: String = block.split("-----END").next()?.split_whitespace().collect();
            BASE64.decode(body.as_bytes()).ok()
        })
        .collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    pub not_before: Timestamp,
    pub not_after: Timestamp,
}

impl Validity {
    /// None where it is no certificate.
    pub fn of(der: &[u8]) -> Option<Validity> {
        let (before, after) = Fields::of(der)?.validity;
        Some(Validity {
            not_before: time(before.0, before.1)?,
            not_after: time(after.0, after.1)?,
        })
    }

    /// What all of a chain have in common.
    pub fn of_chain<'d>(ders: impl IntoIterator<Item = &'d [u8]>) -> Option<Validity> {
        let all: Option<Vec<Validity>> = ders.into_iter().map(Validity::of).collect();
        all?.into_iter().reduce(|a, b| Validity {
            not_before: a.not_before.max(b.not_before),
            not_after: a.not_after.min(b.not_after),
        })
    }

    /// Whole days from `now` to its end; below zero: it has ended.
    pub fn days_left(&self, now: Timestamp) -> i64 {
        self.not_after.millis_since(now).div_euclid(DAY_MS)
    }

    /// "2056-07-08"
    pub fn last_day(&self) -> String {
        let date = self.not_after.to_string();
        date.split('T').next().unwrap_or_default().to_owned()
    }
}

/// Which name of a certificate is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NameKind {
    CommonName,
    SanDns,
    SanUri,
}

impl std::fmt::Display for NameKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            NameKind::CommonName => "CN, of which there must be one",
            NameKind::SanDns => "DNS name among its subject alternative names",
            NameKind::SanUri => "URI among its subject alternative names",
        })
    }
}

/// The names of that kind, in their order. One that is no plain text (another encoding, a control character) is left out:
/// nobody is to be taken for somebody else by a NUL in the middle.
pub fn names(der: &[u8], kind: NameKind) -> Vec<String> {
    let found = Fields::of(der).and_then(|fields| match kind {
        NameKind::CommonName => common_names(fields.subject),
        NameKind::SanDns => alternative_names(fields.extensions?, 0x82),
        NameKind::SanUri => alternative_names(fields.extensions?, 0x86),
    });
    found.unwrap_or_default()
}

/// Tag and content.
type Value<'d> = (u8, &'d [u8]);
/// Tag, content and what follows.
type Element<'d> = (u8, &'d [u8], &'d [u8]);

fn element(der: &[u8]) -> Option<Element<'_>> {
    let (&tag, rest) = der.split_first()?;
    let (&short, rest) = rest.split_first()?;
    let (length, rest) = match short {
        0..=0x7f => (usize::from(short), rest),
        0x81..=0x84 => {
            let digits = usize::from(short & 0x7f);
            let length = rest.get(..digits)?.iter().fold(0usize, |n, b| n << 8 | usize::from(*b));
            (length, &rest[digits..])
        }
        _ => return None,
    };
    Some((tag, rest.get(..length)?, &rest[length..]))
}

/// The elements of a sequence or set; ends at the first that is none.
fn elements(content: &[u8]) -> impl Iterator<Item = Value<'_>> {
    let mut rest = content;
    std::iter::from_fn(move || {
        let (tag, value, behind) = element(rest)?;
        rest = behind;
        Some((tag, value))
    })
}

/// What is looked at of a certificate.
struct Fields<'d> {
    validity: (Value<'d>, Value<'d>),
    subject: &'d [u8],
    extensions: Option<&'d [u8]>,
}

impl<'d> Fields<'d> {
    /// Certificate → tbsCertificate → [version], serial, signature, issuer, validity, subject, key, [ids], [extensions].
    fn of(der: &'d [u8]) -> Option<Fields<'d>> {
        let (0x30, certificate, _) = element(der)? else {
            return None;
        };
        let (0x30, content, _) = element(certificate)? else {
            return None;
        };
        let mut rest = elements(content).peekable();
        rest.next_if(|(tag, _)| *tag == 0xa0);
        let (0x30, validity) = rest.nth(3)? else {
            return None;
        };
        let mut times = elements(validity);
        let validity = (times.next()?, times.next()?);
        let (0x30, subject) = rest.next()? else {
            return None;
        };
        let _key = rest.next()?;
        let extensions = rest.find(|(tag, _)| *tag == 0xa3).and_then(|(_, wrapped)| {
            let (tag, list, _) = element(wrapped)?;
            (tag == 0x30).then_some(list)
        });
        Some(Fields {
            validity,
            subject,
            extensions,
        })
    }
}

/// A name is sets of pairs of what and value.
fn common_names(subject: &[u8]) -> Option<Vec<String>> {
    const COMMON_NAME: &[u8] = &[0x55, 0x04, 0x03];
    let mut found = Vec::new();
    for (_, set) in elements(subject) {
        for (_, pair) in elements(set) {
            let (0x06, what, value) = element(pair)? else {
                return None;
            };
            // UTF8String, PrintableString, IA5String
            if what == COMMON_NAME
                && let (0x0c | 0x13 | 0x16, text, _) = element(value)?
            {
                found.extend(plain(text));
            }
        }
    }
    Some(found)
}

/// The subject's alternative names with that tag.
fn alternative_names(extensions: &[u8], wanted: u8) -> Option<Vec<String>> {
    const ALTERNATIVE_NAME: &[u8] = &[0x55, 0x1d, 0x11];
    for (_, extension) in elements(extensions) {
        let mut parts = elements(extension);
        if parts.next()? == (0x06, ALTERNATIVE_NAME) {
            // Perhaps "critical", then the value in its own coat.
            let (_, coat) = parts.find(|(tag, _)| *tag == 0x04)?;
            let (0x30, list, _) = element(coat)? else {
                return None;
            };
            let texts = elements(list).filter(|(tag, _)| *tag == wanted);
            return Some(texts.filter_map(|(_, text)| plain(text)).collect());
        }
    }
    None
}

fn plain(text: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(text).ok()?;
    (!text.is_empty() && !text.chars().any(char::is_control)).then(|| text.to_owned())
}

/// UTCTime `YYMMDDhhmmssZ` or GeneralizedTime `YYYYMMDDhhmmssZ`.
fn time(tag: u8, text: &[u8]) -> Option<Timestamp> {
    let text = std::str::from_utf8(text).ok()?.strip_suffix('Z')?;
    if !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let (year, rest): (i64, &str) = match (tag, text.len()) {
        (0x17, 12) => {
            let year: i64 = text[..2].parse().ok()?;
            (if year >= 50 { 1900 + year } else { 2000 + year }, &text[2..])
        }
        (0x18, 14) => (text[..4].parse().ok()?, &text[4..]),
        _ => return None,
    };
    let pair = |at: usize| rest[at..at + 2].parse::<i64>().ok();
    let (month, day, hour, minute, second) = (pair(0)?, pair(2)?, pair(4)?, pair(6)?, pair(8)?);
    // Days since 1970 of a date of the Gregorian calendar, its year beginning in March.
    let (y, m) = if month <= 2 {
        (year - 1, month + 9)
    } else {
        (year, month - 3)
    };
    let days = 365 * y + y / 4 - y / 100 + y / 400 + (153 * m + 2) / 5 + day - 1 - 719_468;
    Some(Timestamp::from_millis(
        (((days * 24 + hour) * 60 + minute) * 60 + second) * 1000,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made by openssl ca -selfsign -startdate 20260102030405Z -enddate 20560708091011Z.
    const PEM: &str = include_str!("test.pem");

    #[test]
    fn the_validity_is_read_out() {
        let ders = pem(PEM);
        assert_eq!(ders.len(), 1);
        let validity = Validity::of(&ders[0]).expect("a certificate");
        assert_eq!(validity.not_before.to_string(), "2026-01-02T03:04:05.000Z");
        assert_eq!(validity.not_after.to_string(), "2056-07-08T09:10:11.000Z");
        for cut in 0..120 {
            assert_eq!(Validity::of(&ders[0][..cut]), None, "{cut}");
        }
        let mut damaged = ders[0].clone();
        for at in 0..damaged.len() {
            damaged[at] ^= 0xff;
            let _ = Validity::of(&damaged);
            damaged[at] ^= 0xff;
        }
    }

    #[test]
    fn dates_are_those_of_the_calendar() {
        let of = |tag, text: &str| time(tag, text.as_bytes()).map(|t| t.to_string());
        assert_eq!(of(0x17, "700101000000Z").as_deref(), Some("1970-01-01T00:00:00.000Z"));
        assert_eq!(of(0x17, "000229235959Z").as_deref(), Some("2000-02-29T23:59:59.000Z"));
        assert_eq!(of(0x18, "21000301000000Z").as_deref(), Some("2100-03-01T00:00:00.000Z"));
        assert_eq!(of(0x17, "7001010000Z"), None);
    }

    #[test]
    fn names_are_those_that_are_plain_text() {
        // Made by openssl: subject O=Plant, CN=press-7; SANs URI:urn:plant:press-7, DNS:press-7.example, IP.
        let der = &pem(include_str!("named.pem"))[0];
        assert_eq!(names(der, NameKind::CommonName), ["press-7"]);
        assert_eq!(names(der, NameKind::SanDns), ["press-7.example"]);
        assert_eq!(names(der, NameKind::SanUri), ["urn:plant:press-7"]);
        let without = &pem(PEM)[0];
        assert!(names(without, NameKind::SanUri).is_empty());
        // The NUL trick, and a control character.
        let mut damaged = der.clone();
        // The first is the issuer's.
        let mut places = (0..der.len() - 7).filter(|at| der[*at..].starts_with(b"press-7"));
        let at = places.nth(1).expect("the subject's name");
        damaged[at + 5] = 0;
        assert!(names(&damaged, NameKind::CommonName).is_empty());
        for at in 0..damaged.len() {
            damaged[at] ^= 0xff;
            for kind in [NameKind::CommonName, NameKind::SanDns, NameKind::SanUri] {
                let _ = names(&damaged, kind);
                let _ = names(&damaged[..at], kind);
            }
            damaged[at] ^= 0xff;
        }
    }

    #[test]
    fn days_are_counted_down_to_the_end() {
        let validity = Validity::of(&pem(PEM)[0]).expect("a certificate");
        let at = |days: i64| Timestamp::from_millis(validity.not_after.millis() + days * DAY_MS);
        assert_eq!([-31, -30, -1, 0].map(|d| validity.days_left(at(d))), [31, 30, 1, 0]);
        assert_eq!(validity.days_left(Timestamp::from_millis(at(0).millis() + 1)), -1);
        assert_eq!(validity.last_day(), "2056-07-08");
    }
}
