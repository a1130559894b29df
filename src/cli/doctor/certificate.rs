//! Certificates and keys of uplinks and listeners: readable, what they should be, and for how long. Whether an uplink's
//! is trusted is found out by connecting.

use std::path::Path;

use super::{Finding, storage};
use crate::certificate::{SOON_DAYS, Validity, pem, server};
use crate::clock::{self, Timestamp};
use crate::config::{Config, UplinkKind};

const FILE_BYTES_MAX: u64 = 4 << 20;
const RENEW_UPLINK: &str = "renew it; the file is read at each connect, so nothing has to be restarted";
const RENEW_LISTENER: &str = "renew it; the gateway looks at the file every few seconds and takes the new one over";

pub(super) fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    let now = clock::wall();
    for listener in &config.listeners {
        let Some(tls) = &listener.tls else { continue };
        let subject = |key: &str| format!("listener {} tls.{key}", listener.bind);
        findings.push(certificates(&subject("cert"), &tls.files.cert, now, RENEW_LISTENER));
        if let Some(path) = &tls.files.client_ca {
            findings.push(certificates(&subject("client_ca"), path, now, RENEW_LISTENER));
        }
        let key = key(&subject("key"), &tls.files.key);
        let is_key = key.verdict == super::Verdict::Good;
        findings.push(key);
        findings.extend(storage::too_open(&subject("key"), &tls.files.key));
        if let (true, Err(e @ server::Error::Mismatch { .. })) = (is_key, server::pair(&tls.files.cert, &tls.files.key))
        {
            let remedy = "put the two files there that were made together";
            findings.push(Finding::failed(subject("key"), e.to_string(), remedy));
        }
    }
    for uplink in &config.uplinks {
        let UplinkKind::Mqtt(mqtt) = &uplink.kind else { continue };
        let Some(tls) = &mqtt.tls else { continue };
        let subject = |key: &str| format!("{} tls.{key}", uplink.name);
        for (key, path) in [("ca", &tls.ca), ("cert", &tls.cert)] {
            if let Some(path) = path {
                findings.push(certificates(&subject(key), path, now, RENEW_UPLINK));
            }
        }
        if let Some(path) = &tls.key {
            findings.push(key(&subject("key"), path));
            findings.extend(storage::too_open(&subject("key"), path));
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

fn certificates(subject: &str, path: &Path, now: Timestamp, renew: &str) -> Finding {
    let shown = path.display();
    let text = match read(subject, path) {
        Ok(text) => text,
        Err(finding) => return finding,
    };
    // One of several that has ended ends the chain; of authorities it may be one that nobody needs.
    let Some(validity) = Validity::of_chain(pem(&text).iter().map(Vec::as_slice)) else {
        let remedy = "it begins with -----BEGIN CERTIFICATE-----; openssl x509 -inform DER -in FILE turns DER into PEM";
        return Finding::failed(subject, format!("{shown} is no certificate in PEM"), remedy);
    };
    let (date, days) = (validity.last_day(), validity.days_left(now));
    if now < validity.not_before {
        let remedy = "is the clock right? `timedatectl`";
        let from = validity.not_before;
        return Finding::failed(subject, format!("{shown} is valid only from {from} on"), remedy);
    }
    if validity.not_after < now {
        return Finding::failed(subject, format!("{shown} has expired on {date}"), renew);
    }
    if days < SOON_DAYS {
        return Finding::warning(subject, format!("{shown} expires on {date}, in {days} days"), renew);
    }
    Finding::good(subject, format!("{shown} is valid until {date}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Verdict;

    const PEM: &str = include_str!("../../certificate/test.pem");
    const DAY_MS: i64 = 86_400_000;

    #[test]
    fn a_certificate_that_ends_is_said_before_and_after() {
        let folder = std::env::temp_dir().join(format!("tidegate-certificate-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a temporary folder");
        let path = folder.join("c.pem");
        std::fs::write(&path, PEM).expect("writable");
        let end = Validity::of(&pem(PEM)[0]).expect("a certificate").not_after;
        let at = |days: i64| {
            let now = Timestamp::from_millis(end.millis() + days * DAY_MS);
            certificates("u", &path, now, RENEW_UPLINK).verdict
        };
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
