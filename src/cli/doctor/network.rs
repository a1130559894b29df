//! Ports here and remotes elsewhere.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use super::Finding;
use crate::config::{Bind, Config, MqttUplink, UplinkKind};

const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// Ports that the gateway listens on, or is going to.
pub(super) fn listeners(config: &Config, runs: bool) -> Vec<Finding> {
    let of_mqtt = config.listeners.iter().map(|l| match &l.bind {
        Bind::Address(bind) => listener("listener", *bind, runs),
        Bind::Unix(path) => unix(path, runs),
    });
    let of_metrics = config.metrics.iter().map(|bind| listener("metrics", *bind, runs));
    of_mqtt.chain(of_metrics).collect()
}

fn unix(path: &Path, runs: bool) -> Finding {
    let subject = format!("listener unix:{}", path.display());
    let answers = UnixStream::connect(path);
    match (runs, answers) {
        (true, Ok(_)) => Finding::good(subject, "takes connections"),
        (true, Err(e)) => Finding::failed(
            subject,
            format!("the gateway runs, but its socket does not answer: {e}"),
            "the socket is for its owner and group (mode 0660); `tidegate status` says whether it could be made",
        ),
        (false, Ok(_)) => Finding::failed(
            subject,
            "another program listens there",
            format!("find it with: ss -lxp src {}", path.display()),
        ),
        (false, Err(_)) => match path.parent().is_some_and(super::devices::may_write) {
            true => Finding::good(subject, "free for the gateway"),
            false => Finding::failed(
                subject,
                "its folder is not there, or this user may not write to it",
                "make it, for the gateway's user; under systemd RuntimeDirectory=tidegate makes /run/tidegate",
            ),
        },
    }
}

fn listener(kind: &str, bind: SocketAddr, runs: bool) -> Finding {
    let subject = format!("{kind} {bind}");
    if runs {
        let at = SocketAddr::new(reachable(bind.ip()), bind.port());
        return match TcpStream::connect_timeout(&at, CONNECT_DEADLINE) {
            Ok(_) => Finding::good(subject, "takes connections"),
            Err(e) => Finding::failed(
                subject,
                format!("the gateway runs, but {at} does not answer: {e}"),
                "`tidegate status` says why; a configuration that was changed needs `tidegate reload` or a restart",
            ),
        };
    }
    match TcpListener::bind(bind) {
        Ok(_) => Finding::good(subject, "free for the gateway"),
        Err(e) => match e.kind() {
            std::io::ErrorKind::AddrInUse => Finding::failed(
                subject,
                "in use by another program",
                format!(
                    "find it with: ss -ltnp 'sport = :{}' (systemd itself where tidegate.socket is active, which is well)",
                    bind.port()
                ),
            ),
            std::io::ErrorKind::AddrNotAvailable => Finding::failed(
                subject,
                "no address of this machine",
                "`ip address` shows those it has; 0.0.0.0 is all of them",
            ),
            std::io::ErrorKind::PermissionDenied => Finding::failed(
                subject,
                "this user may not listen on it",
                "ports below 1024 need CAP_NET_BIND_SERVICE, or take a higher one",
            ),
            _ => Finding::failed(subject, e.to_string(), "choose another address or port"),
        },
    }
}

/// All interfaces are reached by loopback.
fn reachable(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        other => other,
    }
}

/// All at once, since each may take its ten seconds.
pub(super) fn uplinks(config: &Config) -> anyhow::Result<Vec<Finding>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(16)
        .build()
        .context("no runtime")?;
    let findings = runtime.block_on(async {
        let mut tasks = Vec::new();
        let mut findings = Vec::new();
        for uplink in &config.uplinks {
            let subject = format!("uplink {}", uplink.name);
            match &uplink.kind {
                UplinkKind::Mqtt(mqtt) => tasks.push(tokio::spawn(remote(subject, (**mqtt).clone()))),
                UplinkKind::File(file) => {
                    let folder = file.path.parent().unwrap_or(&file.path);
                    let text = format!("writes {}", file.path.display());
                    findings.push(match super::devices::may_write(folder) || !folder.exists() {
                        true => Finding::good(subject, text),
                        false => Finding::failed(
                            subject,
                            format!("{text}, but this user may not write to the folder"),
                            format!("chown it to the gateway's user: {}", folder.display()),
                        ),
                    });
                }
            }
        }
        for task in tasks {
            findings.extend(task.await.ok());
        }
        findings
    });
    // A name lookup that still hangs must not hold up the end.
    runtime.shutdown_background();
    Ok(findings)
}

async fn remote(subject: String, mqtt: MqttUplink) -> Finding {
    let address = format!("{}:{}", mqtt.host, mqtt.port);
    let is_secure = mqtt.tls.is_some();
    match crate::uplinks::reach(&mqtt).await {
        Ok(()) if is_secure => Finding::good(subject, format!("{address} is reached, its certificate is trusted")),
        Ok(()) => Finding::good(subject, format!("{address} is reached")),
        Err(why) => {
            let remedy = match () {
                () if why.contains("does not resolve") => format!("`getent hosts {}` must give an address: name servers are in /etc/resolv.conf", mqtt.host),
                () if why.contains("not trusted") => "compare with: openssl s_client -connect HOST:PORT; a clock that is wrong makes every certificate wrong".to_owned(),
                () if why.contains("refused") => "is a broker running there, and is it this port? A firewall may refuse too".to_owned(),
                () if why.contains("cannot be read") => "as it says".to_owned(),
                () => format!("a firewall, a route or the url is wrong: try `nc -vz {} {}`", mqtt.host, mqtt.port),
            };
            Finding::failed(subject, why, remedy)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::doctor::Verdict;

    #[test]
    fn a_port_is_free_taken_or_answering() {
        let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
        let bind = taken.local_addr().expect("an address");
        let finding = listener("listener", bind, false);
        assert_eq!(finding.verdict, Verdict::Failed);
        assert!(finding.remedy.contains(&format!("ss -ltnp 'sport = :{}'", bind.port())));
        let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), bind.port());
        assert_eq!(listener("listener", any, true).verdict, Verdict::Good);
        drop(taken);
        assert_eq!(listener("listener", bind, false).verdict, Verdict::Good);
        assert_eq!(listener("listener", bind, true).verdict, Verdict::Failed);
    }
}
