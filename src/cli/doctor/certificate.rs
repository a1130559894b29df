//! Certificates and keys of uplinks: readable, what they should be, and for how long. Only the validity is read out of a
//! certificate (RFC 5280, 4.1); whether it is trusted is found out by connecting.

use std::path::Path;

use data_encoding::BASE64;

use super::{Finding, storage};
use crate::clock::{self, Timestamp};
use crate::config::{Config, UplinkKind};

const FILE_BYTES_MAX: u64 = 4 << 20;
const DAY_MS: i64 = 86_400_000;
/// Before this many days it is said.
const SOON_DAYS: i64 = 30;

pub(super) fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    for uplink in &config.uplinks {
        let UplinkKind::Mqtt(mqtt) = &uplink.kind else { continue };
        let Some(tls) = &mqtt.tls else { continue };
        for (key, path) in [("ca", &tls.ca), ("cert", &tls.cert)] {
            if let Some(path) = path {
                findings.push(certificates(&format!("{} tls.{key}", uplink.name), path, clock::wall()));
            }
        }
        if let Some(path) = &tls.key {
            findings.push(key(&format!("{} tls.key", uplink.name), path));
            findings.extend(storage::too_open(&format!("{} tls.key", uplink.name), path));
        }
    }
    findings
}

fn read(subject: &str, path: &Path) -> Result<String, Finding> {
    let shown = path.display();
    let failed = |why: String| {
        let remedy = "put it there, readable for the gateway's user: chgrp tidegate, chmod 640";
        Finding::failed(subject, format!("{shown} {why}"), remedy)
    };
    match std::fs::metadata(path) {
        Ok(m) if m.len() > FILE_BYTES_MAX => Err(failed("is too large for a PEM file".to_owned())),
        Ok(_) => std::fs::read_to_string(path).map_err(|e| failed(format!("cannot be read: {e}"))),
        Err(e) => Err(failed(format!("cannot be read: {e}"))),
    }
}

fn key(subject: &str, path: &Path) -> Finding {
    match read(subject, path) {
        Err(finding) => finding,
        Ok(text) if text.contains("PRIVATE KEY-----") && !text.contains("ENCRYPTED") => {
            Finding::good(subject, format!("{} is a private key", path.display()))
        }
        Ok(_) => Finding::failed(
            subject,
            format!("{} is no private key without a passphrase, in PEM", path.display()),
            "openssl pkey -in KEY -out KEY.plain takes the passphrase off",
        ),
    }
}

fn certificates(subject: &str, path: &Path, now: Timestamp) -> Finding {
    let shown = path.display();
    let text = match read(subject, path) {
        Ok(text) => text,
        Err(finding) => return finding,
    };
    let validities: Option<Vec<Validity>> = pem(&text).iter().map(|der| Validity::of(der)).collect();
    let Some(validities) = validities.filter(|v| !v.is_empty()) else {
        let remedy = "it begins with -----BEGIN CERTIFICATE-----; openssl x509 -inform DER -in FILE turns DER into PEM";
        return Finding::failed(subject, format!("{shown} is no certificate in PEM"), remedy);
    };
    // One of several that has ended ends the chain; of authorities it may be one that nobody needs.
    let first = validities.iter().map(|v| v.not_after).min().unwrap_or_default();
    let latest_start = validities.iter().map(|v| v.not_before).max().unwrap_or_default();
    let days = first.millis_since(now) / DAY_MS;
    let date = first.to_string();
    let date = date.split('T').next().unwrap_or_default();
    if now < latest_start {
        let remedy = "is the clock right? `timedatectl`";
        return Finding::failed(subject, format!("{shown} is valid only from {latest_start} on"), remedy);
    }
    if first < now {
        let remedy = "renew it; the file is read at each connect, so nothing has to be restarted";
        return Finding::failed(subject, format!("{shown} has expired on {date}"), remedy);
    }
    if days < SOON_DAYS {
        let remedy = "renew it; the file is read at each connect, so nothing has to be restarted";
        return Finding::warning(subject, format!("{shown} expires on {date}, in {days} days"), remedy);
    }
    Finding::good(subject, format!("{shown} is valid until {date}"))
}

/// The DER of each certificate.
fn pem(text: &str) -> Vec<Vec<u8>> {
    let blocks = text.split("-----BEGIN CERTIFICATE-----").skip(1);
    blocks
        .filter_map(|block| {
            let body: String = block.split("-----END").next()?.split_whitespace().collect();
            BASE64.decode(body.as_bytes()).ok()
        })
        .collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Validity {
    not_before: Timestamp,
    not_after: Timestamp,
}

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

impl Validity {
    /// Certificate → tbsCertificate → [version], serial, signature, issuer, validity.
    fn of(der: &[u8]) -> Option<Validity> {
        let (0x30, certificate, _) = element(der)? else {
            return None;
        };
        let (0x30, mut rest, _) = element(certificate)? else {
            return None;
        };
        let (tag, _, behind) = element(rest)?;
        if tag == 0xa0 {
            rest = behind;
        }
        for _ in 0..3 {
            rest = element(rest)?.2;
        }
        let (0x30, validity, _) = element(rest)? else {
            return None;
        };
        let (before, after) = (element(validity)?, element(element(validity)?.2)?);
        Some(Validity {
            not_before: time(before.0, before.1)?,
            not_after: time(after.0, after.1)?,
        })
    }
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
    use crate::cli::doctor::Verdict;

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
    fn a_certificate_that_ends_is_said_before_and_after() {
        let folder = std::env::temp_dir().join(format!("tidegate-certificate-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        let path = folder.join("c.pem");
        std::fs::write(&path, PEM).expect("writable");
        let end = Validity::of(&pem(PEM)[0]).expect("a certificate").not_after;
        let at = |days: i64| certificates("u", &path, Timestamp::from_millis(end.millis() + days * DAY_MS)).verdict;
        assert_eq!(
            [-100, -29, 1].map(at),
            [Verdict::Good, Verdict::Warning, Verdict::Failed]
        );
        assert_eq!(at(-40 * 366), Verdict::Failed, "not valid yet");
        std::fs::write(&path, "nothing").expect("writable");
        assert_eq!(at(-100), Verdict::Failed);
        assert_eq!(key("u", &path).verdict, Verdict::Failed);
        std::fs::remove_dir_all(&folder).expect("removable");
    }
}
