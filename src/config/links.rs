//! `[[uplink]]` and `[[route]]`.

use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::time::Duration;

use super::check::{Checker, Names, PACKET_BYTES_MAX};
use super::fault::Fault;
use super::read::{At, Section, filter, list, nearest};
use super::template::{PLACEHOLDERS, TemplateError};
use super::{
    ClientTls, FileUplink, MqttTransport, MqttUplink, MqttVersion, RouteDown, RouteUp, Template, Uplink, UplinkKind,
};
use crate::message::{TopicError, TopicFilter};

const KINDS: [(&str, Kind); 2] = [("file", Kind::File), ("mqtt", Kind::Mqtt)];
/// Kinds that are planned and named in the documentation, but not in this version.
const KINDS_LATER: [&str; 6] = ["azure-iot-hub", "aws-iot", "kafka", "nats", "http", "blob"];
/// What each scheme of a url means.
const SCHEMES: [(&str, MqttTransport, u16); 4] = [
    ("mqtt", MqttTransport::Tcp, 1883),
    ("mqtts", MqttTransport::Tls, 8883),
    ("ws", MqttTransport::Ws, 80),
    ("wss", MqttTransport::Wss, 443),
];
const URL_EXAMPLE: &str = "\"mqtts://broker.example:8883\"";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    File,
    Mqtt,
}

/// The checked uplinks and routes.
#[derive(Default)]
pub(super) struct Links {
    pub uplinks: Vec<Uplink>,
    pub up: Vec<RouteUp>,
    pub down: Vec<RouteDown>,
}

/// An uplink that is named in the file, be it right or wrong; the kind is None where it is unknown.
struct Named {
    name: String,
    kind: Option<Kind>,
}

impl Links {
    pub fn check(checker: &mut Checker<'_>, root: &mut Section<'_, '_>, gateway: &str) -> Links {
        let mut links = Links::default();
        let mut named = Vec::new();
        let mut names = Names::new("[[uplink]]");
        let mut files: Vec<At<PathBuf>> = Vec::new();
        for mut section in checker.tables(root, "uplink") {
            let name = checker.name(&mut section, "\"cloud\"");
            if let Some(name) = &name {
                names.add(checker, name.clone());
            }
            let kind = checker.kind(&mut section, &KINDS, &KINDS_LATER);
            let plain = name.map_or_else(String::new, |n| n.value);
            named.push(Named {
                name: plain.clone(),
                kind,
            });
            let checked = match kind {
                // Which keys there are is not known: what is said about the kind is enough.
                None => continue,
                Some(Kind::File) => checker.file_uplink(&mut section, &mut files).map(UplinkKind::File),
                Some(Kind::Mqtt) => {
                    let client_id = format!("tidegate-{gateway}-{plain}");
                    checker
                        .mqtt_uplink(&mut section, client_id)
                        .map(|m| UplinkKind::Mqtt(Box::new(m)))
                }
            };
            section.finish(&mut checker.notes);
            if let Some(kind) = checked {
                links.uplinks.push(Uplink { name: plain, kind });
            }
        }
        for section in checker.tables(root, "route") {
            links.route(checker, section, &named, gateway);
        }
        links
    }

    fn route(&mut self, checker: &mut Checker<'_>, mut section: Section<'_, '_>, named: &[Named], gateway: &str) {
        let to = section.string(&mut checker.notes, "to", "\"cloud\"");
        let from_uplink = section.string(&mut checker.notes, "from_uplink", "\"cloud\"");
        match (section.has("to"), section.has("from_uplink")) {
            (true, true) => {
                let span = section.key_span("from_uplink").unwrap_or(section.header.clone());
                let hint = "up: from and to; down: from_uplink and from. Make two routes of it";
                let message = "a [[route]] goes one way: it has either \"to\" or \"from_uplink\"";
                checker.notes.fault(Fault::new(span, message).hint(hint));
            }
            (false, false) => {
                let message = "[[route]] has neither \"to\" nor \"from_uplink\"";
                let hint = "add to = \"an uplink\" to send up, or from_uplink = \"an uplink\" to take commands down";
                checker
                    .notes
                    .fault(Fault::new(section.header.clone(), message).hint(hint).dependent());
            }
            (true, false) | (false, true) => {}
        }
        let from = checker.route_filters(&mut section, gateway);
        let topic = checker
            .template(&mut section, gateway)
            .unwrap_or_else(Template::whole_topic);
        for uplink in to.iter().chain(&from_uplink) {
            checker.is_uplink(uplink, named);
        }
        let from_file = from_uplink
            .as_ref()
            .filter(|u| named.iter().any(|n| n.name == u.value && n.kind == Some(Kind::File)));
        if let Some(uplink) = from_file {
            let message = format!(
                "nothing comes down from {:?}: it is an uplink of kind file",
                uplink.value
            );
            checker
                .notes
                .fault(Fault::new(uplink.span.clone(), message).hint("name an uplink of kind mqtt"));
        }
        section.finish(&mut checker.notes);
        match (to, from_uplink) {
            (Some(to), None) => self.up.push(RouteUp {
                from,
                to: to.value,
                topic,
            }),
            (None, Some(uplink)) => self.down.push(RouteDown {
                from_uplink: uplink.value,
                from,
                topic,
            }),
            (Some(_), Some(_)) | (None, None) => {}
        }
    }
}

impl Checker<'_> {
    /// `kind = "…"`; None where it is missing, unknown or of a later version (a fault then).
    pub(super) fn kind<K: Copy>(
        &mut self,
        section: &mut Section<'_, '_>,
        kinds: &[(&'static str, K)],
        later: &[&str],
    ) -> Option<K> {
        let names = || kinds.iter().map(|(name, _)| *name);
        let example = names().map(|n| format!("{n:?}")).collect::<Vec<_>>().join(" or ");
        let kind = section.required_string(&mut self.notes, "kind", &example)?;
        let found = kinds.iter().find(|(name, _)| *name == kind.value).map(|(_, k)| *k);
        if found.is_none() {
            let these = format!("this version has {}", list(names()));
            let (message, hint) = if later.contains(&kind.value.as_str()) {
                (
                    format!("this version of tidegate does not have the kind {:?} yet", kind.value),
                    these,
                )
            } else {
                let all = names().chain(later.iter().copied());
                let hint = match nearest(&kind.value, all) {
                    Some(near) => format!("did you mean {near:?}? {these}"),
                    None => these,
                };
                (format!("unknown kind {:?} in {}", kind.value, section.label), hint)
            };
            self.notes.fault(Fault::new(kind.span, message).hint(hint));
        }
        found
    }

    fn file_uplink(&mut self, section: &mut Section<'_, '_>, files: &mut Vec<At<PathBuf>>) -> Option<FileUplink> {
        let example = "\"data/archive.jsonl\"";
        if !section.has("path") {
            section.missing(&mut self.notes, "path", example);
        }
        let path = self.path(section, "path", example);
        let bytes_max = section
            .size(&mut self.notes, "max_bytes", 4096..=1 << 40)
            .unwrap_or(16 << 20);
        let keep = section.integer(&mut self.notes, "keep", 0..=9999).unwrap_or(4);
        let path = path?;
        if let Some(first) = files.iter().find(|f| f.value == path.value) {
            let message = "two uplinks would write this file";
            let hint = format!(
                "the other is in line {}; give each its own path",
                self.line_of(first.span.start)
            );
            self.notes.fault(Fault::new(path.span.clone(), message).hint(hint));
        }
        files.push(path.clone());
        Some(FileUplink {
            path: path.value,
            bytes_max,
            keep: keep as u32,
        })
    }

    fn mqtt_uplink(&mut self, section: &mut Section<'_, '_>, client_id: String) -> Option<MqttUplink> {
        let url = section.required_string(&mut self.notes, "url", URL_EXAMPLE);
        let url = url.and_then(|url| match parse_url(&url.value) {
            Ok(parsed) => Some(parsed),
            Err((message, hint)) => {
                self.notes.fault(Fault::new(url.span, message).hint(hint));
                None
            }
        });
        let seconds = Duration::from_secs;
        let versions = [("5", MqttVersion::V5), ("3.1.1", MqttVersion::V311)];
        let version = section
            .choice(&mut self.notes, "version", &versions)
            .unwrap_or(MqttVersion::V5);
        let client_id = match section.string(&mut self.notes, "client_id", "\"line-4\"") {
            None => client_id,
            Some(id) => {
                if id.value.len() > 65_535 {
                    let message = "a client_id has at most 65,535 bytes";
                    self.notes.fault(Fault::new(id.span, message));
                }
                id.value
            }
        };
        let username = section.string(&mut self.notes, "username", "\"line-4\"");
        let password = self.secret(section, "password");
        if section.has("password") && !section.has("username") && version == MqttVersion::V311 {
            let span = section.key_span("password").unwrap_or(section.header.clone());
            let fault = Fault::new(span, "MQTT 3.1.1 has no password without a username");
            self.notes.fault(fault.hint("add username = \"…\", or version = \"5\""));
        }
        let keep_alive = section.duration(&mut self.notes, "keep_alive", seconds(0)..=seconds(65_535));
        if let Some(at) = keep_alive
            .as_ref()
            .filter(|at| at.value > seconds(0) && at.value < seconds(5))
        {
            let fault = Fault::new(at.span.clone(), "a keep_alive under 5 s cuts slow links");
            self.notes
                .fault(fault.hint("write \"5 s\" or more, or \"0 s\" for none"));
        }
        let window = section.integer(&mut self.notes, "window", 1..=65_535).unwrap_or(100);
        let packet = section.size(&mut self.notes, "max_packet", 128..=PACKET_BYTES_MAX);
        let ack_timeout = section.duration(&mut self.notes, "ack_timeout", seconds(1)..=seconds(3600));
        let tls = self.client_tls(section);
        let Url {
            transport,
            host,
            port,
            path,
        } = url?;
        let is_tls = matches!(transport, MqttTransport::Tls | MqttTransport::Wss);
        if !is_tls && section.has("tls") {
            let span = section.key_span("tls").unwrap_or(section.header.clone());
            let hint = "write mqtts:// or wss:// in the url, or take tls out";
            self.notes
                .fault(Fault::new(span, "tls is set, but the url is without TLS").hint(hint));
        }
        Some(MqttUplink {
            transport,
            host,
            port,
            ws_path: path,
            version,
            client_id,
            username: username.map(|u| u.value),
            password: password.map(|p| p.value),
            // The protocol counts whole seconds.
            keep_alive: keep_alive.map_or(seconds(60), |k| seconds(k.value.as_secs())),
            window: window as u16,
            packet_bytes_max: packet.map(|bytes| bytes as u32),
            ack_timeout: ack_timeout.map_or(seconds(30), |a| a.value),
            tls: is_tls.then(|| tls.unwrap_or_default()),
        })
    }

    fn client_tls(&mut self, section: &mut Section<'_, '_>) -> Option<ClientTls> {
        let value = section.take("tls")?;
        let Some(table) = value.get_ref().as_table() else {
            section.wrong(&mut self.notes, "tls", value, "a table", "{ ca = \"ca.pem\" }");
            return None;
        };
        let mut tls = Section::new(format!("tls of {}", section.label), value.span(), table);
        let ca = self.path(&mut tls, "ca", "\"ca.pem\"");
        let cert = self.path(&mut tls, "cert", "\"client.pem\"");
        let key = self.path(&mut tls, "key", "\"client.key\"");
        let server_name = tls.string(&mut self.notes, "server_name", "\"broker.example\"");
        for (one, other) in [("cert", "key"), ("key", "cert")] {
            if tls.has(one) && !tls.has(other) {
                let message = format!("{} has {one:?} without {other:?}", tls.label);
                let fault = Fault::new(value.span(), message).hint("a client certificate needs both");
                self.notes.fault(fault);
            }
        }
        tls.finish(&mut self.notes);
        let path = |at: Option<At<PathBuf>>| at.map(|p| p.value);
        Some(ClientTls {
            ca: path(ca),
            cert: path(cert),
            key: path(key),
            server_name: server_name.map(|s| s.value),
        })
    }

    /// `from` of a route: filters in which `{gateway}` is filled in.
    fn route_filters(&mut self, section: &mut Section<'_, '_>, gateway: &str) -> Vec<TopicFilter> {
        if !section.has("from") {
            section.missing(&mut self.notes, "from", "[\"sensors/#\"]");
        }
        let Some(texts) = section.texts(&mut self.notes, "from") else {
            return Vec::new();
        };
        if texts.is_empty() {
            let span = section.key_span("from").unwrap_or(section.header.clone());
            let fault = Fault::new(span, "from in [[route]] is an empty list: nothing goes this way");
            self.notes.fault(fault.hint("write from = [\"#\"] for everything"));
        }
        let mut filters = Vec::with_capacity(texts.len());
        for typed in texts {
            let text = typed.value.replace("{gateway}", gateway);
            if text.contains('{') {
                let message = format!("{:?}: a filter can have the placeholder {{gateway}} only", typed.value);
                self.notes
                    .fault(Fault::new(typed.span, message).hint("use + for a level and # for the rest"));
                continue;
            }
            filters.extend(filter(&mut self.notes, &typed, &text));
        }
        filters
    }

    fn template(&mut self, section: &mut Section<'_, '_>, gateway: &str) -> Option<Template> {
        let typed = section.string(&mut self.notes, "topic", "\"plants/{gateway}/{topic}\"")?;
        let error = match Template::parse(&typed.value, gateway) {
            Ok(template) => return Some(template),
            Err(error) => error,
        };
        let text = &typed.value;
        let (message, hint) = match error {
            TemplateError::Empty => (
                format!("{text:?} is empty"),
                "write \"{topic}\" for the same topic".to_owned(),
            ),
            TemplateError::Unknown { name } => {
                let hint = match nearest(&name, PLACEHOLDERS) {
                    Some(near) => format!("did you mean {{{near}}}?"),
                    None => "there are {gateway}, {topic} and {rest}".to_owned(),
                };
                (format!("unknown placeholder {{{name}}}"), hint)
            }
            TemplateError::Unclosed => (
                format!("{text:?} has a {{ without its }}"),
                "write \"{topic}\"".to_owned(),
            ),
            TemplateError::StrayBrace => (
                format!("{text:?} has a }} without its {{"),
                "write \"{topic}\"".to_owned(),
            ),
            TemplateError::Text(TopicError::Wildcard) => (
                format!("{text:?} is a topic to publish to, which has no + and no #"),
                "write {topic} for the whole topic or {rest} for what # matched".to_owned(),
            ),
            TemplateError::Text(error) => (format!("{text:?} gives no topic: {error}"), String::new()),
        };
        let fault = Fault::new(typed.span, message);
        self.notes.fault(if hint.is_empty() { fault } else { fault.hint(hint) });
        None
    }

    fn is_uplink(&mut self, uplink: &At<String>, named: &[Named]) {
        if named.iter().any(|n| n.name == uplink.value) {
            return;
        }
        let names = || named.iter().map(|n| n.name.as_str()).filter(|n| !n.is_empty());
        let hint = match nearest(&uplink.value, names()) {
            Some(near) => format!("did you mean {near:?}?"),
            None if names().next().is_none() => format!("add an [[uplink]] with name = {:?}", uplink.value),
            None => format!("there are {}", list(names())),
        };
        let message = format!("there is no [[uplink]] {:?}", uplink.value);
        self.notes
            .fault(Fault::new(uplink.span.clone(), message).hint(hint).dependent());
    }
}

#[derive(Debug, PartialEq, Eq)]
struct Url {
    transport: MqttTransport,
    host: String,
    port: u16,
    path: String,
}

/// `mqtt(s)://host[:port]`, `ws(s)://host[:port][/path]`; or what is wrong and what to write.
fn parse_url(text: &str) -> Result<Url, (String, String)> {
    let refuse = |what: &str, hint: &str| (what.to_owned(), hint.to_owned());
    let Some((scheme, rest)) = text.split_once("://") else {
        return Err(refuse(
            "the url has no scheme",
            &format!("write mqtt:// or, with TLS, mqtts:// before it: {URL_EXAMPLE}"),
        ));
    };
    let lower = scheme.to_ascii_lowercase();
    let Some((_, transport, port_default)) = SCHEMES.iter().find(|(name, _, _)| *name == lower) else {
        let hint = match lower.as_str() {
            "tcp" => "write mqtt://".to_owned(),
            "ssl" | "tls" | "mqtt+ssl" => "write mqtts://".to_owned(),
            "http" => "write ws:// for MQTT over WebSocket".to_owned(),
            "https" => "write wss:// for MQTT over WebSocket with TLS".to_owned(),
            other => match nearest(other, SCHEMES.iter().map(|(name, _, _)| *name)) {
                Some(near) => format!("did you mean {near}://?"),
                None => format!("there are mqtt, mqtts, ws and wss: {URL_EXAMPLE}"),
            },
        };
        return Err((format!("the url's scheme {scheme:?} is not known"), hint));
    };
    // Before anything of it is quoted: it may hold a password.
    if rest.contains('@') {
        let hint = "take it out of the url and write username = \"…\" and password = { file = \"…\" }";
        return Err(refuse("the url has a user name in it", hint));
    }
    if let Some(odd) = text.chars().find(|c| c.is_whitespace() || c.is_control() || *c == '\\') {
        return Err((
            format!("the url has the character {odd:?} in it"),
            format!("write it like {URL_EXAMPLE}"),
        ));
    }
    let (authority, path) = rest.split_at(rest.find(['/', '?', '#']).unwrap_or(rest.len()));
    let (host, port) = match authority.strip_prefix('[') {
        Some(inner) => {
            let Some((host, after)) = inner.split_once(']') else {
                return Err(refuse(
                    "the url has a [ without its ]",
                    "an IPv6 address is written [2001:db8::1]",
                ));
            };
            if host.parse::<Ipv6Addr>().is_err() {
                return Err((
                    format!("{host:?} is not an IPv6 address"),
                    "write it like [2001:db8::1]".to_owned(),
                ));
            }
            match after.strip_prefix(':') {
                Some(port) => (host, Some(port)),
                None if after.is_empty() => (host, None),
                None => return Err(refuse("the url has text after the ]", "write [2001:db8::1]:8883")),
            }
        }
        None if authority.matches(':').count() > 1 => {
            let hint = "an IPv6 address stands in brackets: mqtts://[2001:db8::1]:8883";
            return Err(refuse("the url has more than one port", hint));
        }
        None => match authority.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (authority, None),
        },
    };
    if host.is_empty() {
        return Err(refuse("the url has no host", &format!("write it like {URL_EXAMPLE}")));
    }
    let port = match port {
        None => *port_default,
        Some(port) => match port.parse::<u16>() {
            Ok(port) if port > 0 => port,
            _ => {
                let hint = format!("a port is 1 to 65535; without one it is {port_default}");
                // Not quoted: it may be a password whose @ is missing.
                return Err(("what follows the url's host is not a port".to_owned(), hint));
            }
        },
    };
    let is_websocket = matches!(transport, MqttTransport::Ws | MqttTransport::Wss);
    let path = match path {
        "" => "/mqtt".to_owned(),
        path if path.contains('#') => return Err(refuse("the url has a # in it", "take out the # and what follows")),
        path if is_websocket && path.starts_with('/') => path.to_owned(),
        path if is_websocket => format!("/{path}"),
        "/" => "/mqtt".to_owned(),
        _ => {
            let hint = "only ws:// and wss:// have a path; topics are set by [[route]]";
            return Err((format!("a {lower}:// url has no path"), hint.to_owned()));
        }
    };
    Ok(Url {
        transport: *transport,
        host: host.to_owned(),
        port,
        path,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_have_a_host_a_port_and_a_path() {
        use MqttTransport::{Tcp, Tls, Ws, Wss};
        let table = [
            ("mqtt://broker", Tcp, "broker", 1883, "/mqtt"),
            ("mqtt://broker/", Tcp, "broker", 1883, "/mqtt"),
            ("MQTTS://Broker.Example", Tls, "Broker.Example", 8883, "/mqtt"),
            ("mqtt://10.0.0.1:1884", Tcp, "10.0.0.1", 1884, "/mqtt"),
            ("mqtts://[2001:db8::1]:884", Tls, "2001:db8::1", 884, "/mqtt"),
            ("mqtt://[::1]", Tcp, "::1", 1883, "/mqtt"),
            ("ws://broker", Ws, "broker", 80, "/mqtt"),
            ("wss://broker/", Wss, "broker", 443, "/"),
            ("wss://broker:9001/a/b?x=1", Wss, "broker", 9001, "/a/b?x=1"),
        ];
        for (text, transport, host, port, path) in table {
            let expected = Url {
                transport,
                host: host.to_owned(),
                port,
                path: path.to_owned(),
            };
            assert_eq!(parse_url(text), Ok(expected), "{text}");
        }
    }

    #[test]
    fn a_bad_url_says_why_and_shows_no_password() {
        let table = [
            ("broker:1883", "no scheme"),
            ("tcp://broker", "\"tcp\" is not known"),
            ("mqtt://me:hunter2@broker", "user name"),
            ("mqtt://me:hun/ter2@broker", "user name"),
            ("mqtt://", "no host"),
            ("mqtt://:1883", "no host"),
            ("mqtt://me:hunter2broker", "not a port"),
            ("mqtt://broker:0", "not a port"),
            ("mqtt://broker:70000", "not a port"),
            ("mqtt://::1:1883", "more than one port"),
            ("mqtt://[::1", "without its ]"),
            ("mqtt://[nonsense]", "not an IPv6 address"),
            ("mqtt://[::1]x", "after the ]"),
            ("mqtt://bro ker", "character ' '"),
            ("mqtt://broker/topic", "no path"),
            ("ws://broker/a#b", "# in it"),
        ];
        for (text, expected) in table {
            let (message, hint) = parse_url(text).expect_err(text);
            assert!(message.contains(expected), "{text}: {message}");
            assert!(
                !hint.is_empty() && !format!("{message}{hint}").contains("ter2"),
                "{text}: {message}: {hint}"
            );
        }
    }
}
