//! What a reload would change, as plain data: the old configuration beside the new one. Pure.

use serde::Serialize;

use super::{Access, ClientLimits, Config, FileUplink, Listener, ModuleSettings, MqttUplink, Stream, UplinkKind, User};

/// One thing that is another one, or in only one of the two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Change {
    pub action: Action,
    pub kind: Kind,
    /// Of the thing; empty where there is one only.
    pub name: String,
    /// Which of its keys; empty where it was added or removed.
    pub keys: Vec<&'static str>,
    /// It cannot be done while running.
    pub needs_restart: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    Added,
    Removed,
    Changed,
}

/// The sections of gateway.toml; routes count to their uplink, assets to their connector.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    Gateway,
    Broker,
    Listener,
    Anonymous,
    User,
    Stream,
    Modules,
    Module,
    Uplink,
    Connector,
    Metrics,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Gateway => "gateway",
            Kind::Broker => "broker",
            Kind::Listener => "listener",
            Kind::Anonymous => "anonymous",
            Kind::User => "user",
            Kind::Stream => "stream",
            Kind::Modules => "modules",
            Kind::Module => "module",
            Kind::Uplink => "uplink",
            Kind::Connector => "connector",
            Kind::Metrics => "metrics",
        }
    }
}

/// `~ uplink "cloud": url, window`
impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sign = match self.action {
            Action::Added => '+',
            Action::Removed => '-',
            Action::Changed => '~',
        };
        write!(f, "{sign} {}", self.kind.name())?;
        if !self.name.is_empty() {
            write!(f, " {:?}", self.name)?;
        }
        if !self.keys.is_empty() {
            write!(f, ": {}", self.keys.join(", "))?;
        }
        if self.needs_restart {
            f.write_str(" (needs a restart)")?;
        }
        Ok(())
    }
}

/// The keys whose fields differ; a difference in a field that is not listed is called "settings".
macro_rules! keys {
    ($old:expr, $new:expr, $($field:ident => $key:literal),+ $(,)?) => {{
        let mut keys: Vec<&'static str> = Vec::new();
        $(if $old.$field != $new.$field && !keys.contains(&$key) {
            keys.push($key);
        })+
        if keys.is_empty() && $old != $new {
            keys.push("settings");
        }
        keys
    }};
}

/// What is different in `new`, in the order of the sections of gateway.toml.
pub fn difference(old: &Config, new: &Config) -> Vec<Change> {
    // Whoever adds a section says here what a reload does with it.
    let Config {
        path: _,
        fingerprint: _,
        warnings: _,
        listeners_unusable: _,
        gateway,
        broker,
        listeners,
        anonymous,
        users,
        streams,
        modules,
        uplinks,
        routes_up,
        routes_down,
        connectors,
        assets,
        metrics,
    } = new;
    let mut changes = Vec::new();
    let changed = |kind, keys: Vec<&'static str>, needs_restart| Change {
        action: Action::Changed,
        kind,
        name: String::new(),
        keys,
        needs_restart,
    };
    for key in keys!(&old.gateway, gateway, name => "name", data_dir => "data_dir", revert_after => "revert_after") {
        changes.push(changed(Kind::Gateway, vec![key], key != "revert_after"));
    }
    if old.broker != *broker {
        let keys = keys!(&old.broker, broker, refused_publish => "refused_publish",
            sys_interval => "sys_interval",
            failed_logins_per_minute => "failed_logins_per_minute");
        changes.push(changed(Kind::Broker, keys, false));
    }
    each(&mut changes, Kind::Listener, &old.listeners, listeners, listener_keys);
    if old.anonymous != *anonymous {
        let mut keys = access_keys(&old.anonymous.access, &anonymous.access);
        keys.extend(limit_keys(&old.anonymous.limits, &anonymous.limits));
        changes.push(changed(Kind::Anonymous, keys, false));
    }
    each(&mut changes, Kind::User, &old.users, users, user_keys);
    each(&mut changes, Kind::Stream, &old.streams, streams, stream_keys);
    if order(&old.streams, streams) != order(streams, &old.streams) {
        changes.push(changed(Kind::Stream, vec!["order"], false));
    }
    if old.modules.dir != modules.dir {
        changes.push(changed(Kind::Modules, vec!["dir"], false));
    }
    let settings = |of: &Config| -> Vec<(String, ModuleSettings)> {
        let all = of.modules.settings.iter();
        all.map(|(name, settings)| (name.clone(), settings.clone())).collect()
    };
    each(&mut changes, Kind::Module, &settings(old), &settings(new), module_keys);
    if old.metrics != *metrics {
        changes.push(Change {
            action: match (old.metrics, metrics) {
                (None, _) => Action::Added,
                (_, None) => Action::Removed,
                _ => Action::Changed,
            },
            ..changed(Kind::Metrics, vec!["bind"], false)
        });
    }
    let routes = |of: &Config, uplink: &str| {
        let up: Vec<_> = of.routes_up.iter().filter(|r| r.to == uplink).cloned().collect();
        let down = of.routes_down.iter().filter(|r| r.from_uplink == uplink);
        (up, down.cloned().collect::<Vec<_>>())
    };
    each(&mut changes, Kind::Uplink, &old.uplinks, uplinks, |before, after| {
        let mut keys = uplink_keys(&before.kind, &after.kind);
        if routes(old, &before.name) != routes(new, &after.name) {
            keys.push("routes");
        }
        keys
    });
    debug_assert!(
        routes_up.iter().all(|r| uplinks.iter().any(|u| u.name == r.to))
            && routes_down
                .iter()
                .all(|r| uplinks.iter().any(|u| u.name == r.from_uplink)),
        "each route belongs to an uplink"
    );
    each(
        &mut changes,
        Kind::Connector,
        &old.connectors,
        connectors,
        |before, after| {
            let mut keys = if before == after { Vec::new() } else { vec!["settings"] };
            let of = |c: &Config| -> Vec<_> {
                c.assets
                    .iter()
                    .filter(|a| a.connector == before.name)
                    .cloned()
                    .collect()
            };
            if of(old) != of(new) {
                keys.push("assets");
            }
            keys
        },
    );
    debug_assert!(assets.iter().all(|a| connectors.iter().any(|c| c.name == a.connector)));
    changes
}

/// Things that are told apart by a name.
trait Named {
    fn name(&self) -> String;
}

/// Removed, changed and added ones of a list.
fn each<T: Named>(
    changes: &mut Vec<Change>,
    kind: Kind,
    old: &[T],
    new: &[T],
    keys: impl Fn(&T, &T) -> Vec<&'static str>,
) {
    let mut push = |action, name, keys| {
        changes.push(Change {
            action,
            kind,
            name,
            keys,
            needs_restart: false,
        });
    };
    for before in old {
        match new.iter().find(|after| after.name() == before.name()) {
            None => push(Action::Removed, before.name(), Vec::new()),
            Some(after) => {
                let keys = keys(before, after);
                if !keys.is_empty() {
                    push(Action::Changed, before.name(), keys);
                }
            }
        }
    }
    for after in new.iter().filter(|a| !old.iter().any(|b| b.name() == a.name())) {
        push(Action::Added, after.name(), Vec::new());
    }
}

/// The names that are in both, as they stand in the first.
fn order(of: &[Stream], and: &[Stream]) -> Vec<String> {
    let both = of.iter().filter(|s| and.iter().any(|o| o.name == s.name));
    both.map(|s| s.name.clone()).collect()
}

macro_rules! named {
    ($($type:ty => |$it:ident| $name:expr),+ $(,)?) => {
        $(impl Named for $type {
            fn name(&self) -> String {
                let $it = self;
                $name
            }
        })+
    };
}

named! {
    Listener => |l| l.bind.to_string(),
    User => |u| u.name.clone(),
    Stream => |s| s.name.clone(),
    (String, ModuleSettings) => |m| m.0.clone(),
    super::Uplink => |u| u.name.clone(),
    super::Connector => |c| c.name.clone(),
}

fn listener_keys(old: &Listener, new: &Listener) -> Vec<&'static str> {
    keys!(old, new, bind_also => "bind", allow_anonymous => "allow_anonymous", tls => "tls", websocket => "websocket",
        origins => "origins", proxy_protocol => "proxy_protocol",
        packet_bytes_max => "max_packet", connections_max => "max_connections",
        keep_alive_max_s => "max_keep_alive", subscribe_refusal => "subscribe_refusal")
}

fn access_keys(old: &Access, new: &Access) -> Vec<&'static str> {
    keys!(old, new,
        publish => "publish", subscribe => "subscribe", deny_publish => "deny_publish", deny_subscribe => "deny_subscribe")
}

fn limit_keys(old: &ClientLimits, new: &ClientLimits) -> Vec<&'static str> {
    keys!(old, new, connections => "max_connections", messages_per_second => "max_messages_per_second",
        bytes_per_second => "max_bytes_per_second", subscriptions => "max_subscriptions", queued_bytes => "max_queued_bytes")
}

fn user_keys(old: &User, new: &User) -> Vec<&'static str> {
    let mut keys = access_keys(&old.access, &new.access);
    keys.extend(limit_keys(&old.limits, &new.limits));
    if old.password_hash != new.password_hash {
        keys.insert(0, "password_hash");
    }
    keys
}

fn stream_keys(old: &Stream, new: &Stream) -> Vec<&'static str> {
    keys!(old, new, filter => "filter", bytes_max => "max_bytes", age_max => "max_age", when_full => "when_full")
}

fn module_keys(old: &(String, ModuleSettings), new: &(String, ModuleSettings)) -> Vec<&'static str> {
    let (old, new) = (&old.1, &new.1);
    keys!(old, new, subscribe => "subscribe", publish => "publish", config => "config",
        memory_bytes_max => "memory", deadline => "deadline")
}

fn uplink_keys(old: &UplinkKind, new: &UplinkKind) -> Vec<&'static str> {
    match (old, new) {
        (UplinkKind::File(old), UplinkKind::File(new)) => file_keys(old, new),
        (UplinkKind::Mqtt(old), UplinkKind::Mqtt(new)) => mqtt_keys(old, new),
        _ => vec!["kind"],
    }
}

fn file_keys(old: &FileUplink, new: &FileUplink) -> Vec<&'static str> {
    keys!(old, new, path => "path", bytes_max => "max_bytes", keep => "keep")
}

fn mqtt_keys(old: &MqttUplink, new: &MqttUplink) -> Vec<&'static str> {
    keys!(old, new, transport => "url", host => "url", port => "url", ws_path => "url", version => "version",
        client_id => "client_id", username => "username", password => "password", keep_alive => "keep_alive",
        window => "window", packet_bytes_max => "max_packet", ack_timeout => "ack_timeout", tls => "tls")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::{Faults, parse};

    fn config(text: &str) -> Config {
        let path = Path::new("/etc/tidegate/gateway.toml");
        parse(text, path, &|_| None).unwrap_or_else(|faults| panic!("{}", Faults::new(path, text, faults)))
    }

    fn said(old: &str, new: &str) -> Vec<String> {
        difference(&config(old), &config(new))
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    const BASE: &str = include_str!("golden/valid_full.toml");

    fn base() -> String {
        BASE.replace("{ env = \"SET\" }", "\"x\"")
    }

    #[test]
    fn nothing_changes_nothing() {
        let text = base();
        assert_eq!(said(&text, &text), [""; 0]);
        assert_eq!(said(&text, &format!("# a comment\n{text}\n\n")), [""; 0]);
    }

    #[test]
    fn each_thing_is_told_by_its_name() {
        let text = base();
        let hash = "password_hash = \"$argon2id$";
        assert!(text.contains(hash), "the example has a user");
        let table: &[(&str, &str, &[&str])] = &[
            (
                "name = \"line-4\"\n",
                "name = \"line-5\"\n",
                &["~ gateway: name (needs a restart)"],
            ),
            (
                "revert_after = \"0 s\"",
                "revert_after = \"5 s\"",
                &["~ gateway: revert_after"],
            ),
            (
                "bind = \"0.0.0.0:1884\"",
                "bind = \"0.0.0.0:1885\"",
                &["- listener \"0.0.0.0:1884\"", "+ listener \"0.0.0.0:1885\""],
            ),
            (
                "max_connections = 500",
                "max_connections = 501",
                &["~ listener \"0.0.0.0:1884\": max_connections"],
            ),
            (
                "cert = \"server.pem\"",
                "cert = \"new.pem\"",
                &["~ listener \"0.0.0.0:8883\": tls"],
            ),
            (
                "deny_publish = [\"commands/#\"]",
                "deny_publish = []",
                &["~ anonymous: deny_publish"],
            ),
        ];
        for (from, to, expected) in table {
            let new = text.replacen(from, to, 1);
            assert_ne!(new, text, "{from} is not in the example");
            let said = said(&text, &new);
            for line in *expected {
                assert!(said.iter().any(|s| s == line), "{line} is not in {said:?}");
            }
        }
    }

    const SMALL: &str = "[gateway]\nname = 'g'\n[[listener]]\nbind = '127.0.0.1:1883'\n";

    #[test]
    fn an_uplink_is_its_section_and_its_routes() {
        let uplink = "[[uplink]]\nname = 'c'\nkind = 'mqtt'\nurl = 'mqtt://a'\n";
        let route = "[[route]]\nfrom = ['a/#']\nto = 'c'\n";
        let with = format!("{SMALL}{uplink}");
        assert_eq!(said(SMALL, &with), ["+ uplink \"c\""]);
        assert_eq!(said(&with, SMALL), ["- uplink \"c\""]);
        assert_eq!(said(&with, &format!("{with}{route}")), ["~ uplink \"c\": routes"]);
        let other = with.replace("mqtt://a", "mqtts://b:1") + "password = 'hunter2'\nusername = 'u'\n";
        assert_eq!(said(&with, &other), ["~ uplink \"c\": url, username, password, tls"]);
        let file = format!("{SMALL}[[uplink]]\nname = 'c'\nkind = 'file'\npath = 'x'\n");
        assert_eq!(said(&with, &file), ["~ uplink \"c\": kind"]);
    }

    #[test]
    fn streams_have_an_order() {
        let stream = |n: &str, more: &str| format!("[[stream]]\nname = '{n}'\nfilter = ['{n}/#']\n{more}");
        let old = format!("{SMALL}{}{}", stream("a", ""), stream("b", ""));
        let new = format!("{SMALL}{}{}", stream("b", "max_bytes = '1 MiB'\n"), stream("a", ""));
        assert_eq!(said(&old, &new), ["~ stream \"b\": max_bytes", "~ stream: order"]);
        let more = format!("{SMALL}{}{}{}", stream("c", ""), stream("a", ""), stream("b", ""));
        assert_eq!(said(&old, &more), ["+ stream \"c\""]);
    }

    #[test]
    fn a_connector_is_its_section_and_its_assets() {
        let machine = "[[connector]]\nname = 'sim'\nkind = 'simulator'\n[[connector]]\nname = 'b'\nkind = 'simulator'\n\
                       [[asset]]\nname = 'boiler'\nconnector = 'sim'\nevery = '1 s'\npoints = [{ name = 'temperature' }]\n";
        let old = format!("{SMALL}{machine}");
        assert_eq!(
            said(&old, &old.replace("'1 s'", "'2 s'")),
            ["~ connector \"sim\": assets"]
        );
        assert_eq!(
            said(&old, &old.replace("connector = 'sim'", "connector = 'b'")),
            ["~ connector \"sim\": assets", "~ connector \"b\": assets"]
        );
    }

    #[test]
    fn a_changed_secret_is_named_and_not_shown() {
        let uplink = |p: &str| {
            format!(
                "{SMALL}[[uplink]]\nname = 'c'\nkind = 'mqtt'\nurl = 'mqtt://a'\nusername = 'u'\npassword = '{p}'\n"
            )
        };
        let changes = difference(&config(&uplink("hunter2")), &config(&uplink("hunter3")));
        assert_eq!(changes[0].to_string(), "~ uplink \"c\": password");
        assert!(!format!("{changes:?}").contains("hunter"));
    }
}
