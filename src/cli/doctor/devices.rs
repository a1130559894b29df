//! Devices of connectors: there, and open to this user.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Finding;
use crate::config::{Config, ConnectorKind, ModbusWire};

pub(super) fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = Vec::new();
    for connector in &config.connectors {
        for path in paths(&connector.kind) {
            findings.push(device(&format!("connector {}", connector.name), &path));
        }
    }
    findings
}

/// The device files that a kind opens.
fn paths(kind: &ConnectorKind) -> Vec<PathBuf> {
    match kind {
        ConnectorKind::Simulator => Vec::new(),
        ConnectorKind::Modbus(line) => match &line.wire {
            ModbusWire::Rtu(serial) => vec![serial.device.clone()],
            ModbusWire::Tcp { .. } | ModbusWire::RtuTcp { .. } => Vec::new(),
        },
        ConnectorKind::Gpio(gpio) => vec![Path::new("/dev").join(&gpio.chip)],
        ConnectorKind::I2c(i2c) => vec![format!("/dev/i2c-{}", i2c.bus).into()],
        ConnectorKind::Spi(spi) => vec![format!("/dev/spidev{}.{}", spi.bus, spi.select).into()],
        // None: the Raspberry Pi's own, which the connector finds.
        ConnectorKind::Pwm(pwm) => pwm
            .chip
            .map(|chip| format!("/sys/class/pwm/pwmchip{chip}").into())
            .into_iter()
            .collect(),
    }
}

fn device(subject: &str, path: &Path) -> Finding {
    let shown = path.display();
    let Ok(metadata) = std::fs::metadata(path) else {
        let remedy = match path.to_string_lossy() {
            p if p.contains("i2c") => {
                "switch it on: dtparam=i2c_arm=on in config.txt, modprobe i2c-dev; `ls /dev/i2c-*`"
            }
            p if p.contains("spi") => "switch it on: dtparam=spi=on in config.txt; `ls /dev/spidev*`",
            p if p.contains("gpio") => "`gpiodetect` shows the chips that there are",
            _ => "is it plugged in? `ls -l /dev/serial/by-id/` gives names that stay",
        };
        return Finding::failed(subject, format!("{shown} is not there"), remedy);
    };
    if may_write(path) {
        return Finding::good(subject, format!("{shown} is there and open to this user"));
    }
    let group = group_name(metadata.gid()).unwrap_or_else(|| metadata.gid().to_string());
    let remedy = format!("usermod -aG {group} USER of the gateway, then restart it");
    Finding::failed(subject, format!("{shown} is not open to this user"), remedy)
}

pub(super) fn may_write(path: &Path) -> bool {
    let Ok(path) = CString::new(path.as_os_str().as_bytes()) else {
        return false;
    };
    // SAFETY: the path is a C string, which the call only reads.
    unsafe { libc::access(path.as_ptr(), libc::R_OK | libc::W_OK) == 0 }
}

fn group_name(gid: u32) -> Option<String> {
    let groups = std::fs::read_to_string("/etc/group").ok()?;
    let of = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?.to_owned();
        (fields.nth(1)?.parse::<u32>().ok()? == gid).then_some(name)
    };
    groups.lines().find_map(of)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Verdict;

    #[test]
    fn a_device_that_is_missing_says_how_it_comes_to_be() {
        assert_eq!(device("c", Path::new("/dev/null")).verdict, Verdict::Good);
        let missing = device("c", Path::new("/dev/i2c-99"));
        assert_eq!(missing.verdict, Verdict::Failed);
        assert!(missing.remedy.contains("dtparam=i2c_arm"));
        assert_eq!(group_name(0).as_deref(), Some("root"));
    }
}
