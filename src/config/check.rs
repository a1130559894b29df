//! The sections of gateway.toml, one method each: what they hold, their defaults and their limits.
//! Uplinks and routes are in [`super::links`], connectors and assets in [`super::machines`].

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use argon2::password_hash::phc::PasswordHash;
use sha2::{Digest, Sha256};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::fault::{Fault, Page};
use super::read::{At, Notes, Section, Span, filter, integer, kind_of};
use super::{
    Access, Anonymous, Bind, BrokerSettings, ClientLimits, Config, Gateway, Listener, ModuleSettings, Modules, Pattern,
    RefusedPublish, Secret, ServerTls, Stream, SubscribeRefusal, User, WhenFull, links::Links, machines::Machines,
    pattern,
};
use crate::certificate::{NameKind, server};
use crate::message::TopicFilter;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const YEAR: Duration = Duration::from_secs(31_557_600);
/// What four bytes of remaining length can say.
pub(super) const PACKET_BYTES_MAX: u64 = 256 * MIB;
/// `tidegate reload` waits for it, and so does whoever called that.
const REVERT_AFTER_MAX: Duration = Duration::from_secs(3600);
/// What the kernel's address of a Unix socket has room for.
const UNIX_PATH_BYTES_MAX: usize = 107;
/// Above this each login takes so much memory that a few at once hurt a small box.
const HASH_KIB_DOUBTFUL: u32 = 64 << 10;

/// The state of one check of one file.
pub(super) struct Checker<'e> {
    pub notes: Notes,
    pub folder: PathBuf,
    pub env: &'e dyn Fn(&str) -> Option<String>,
    /// Where secrets stand in the text itself.
    pub secrets_typed: Vec<Span>,
    pub tls_typed: Vec<Option<TlsTyped>>,
    /// Where each line of the text begins.
    pub line_starts: Vec<usize>,
}

/// The names of one kind of thing, to find the second of two.
pub(super) struct Names {
    label: &'static str,
    seen: Vec<At<String>>,
}

pub(super) struct Checked {
    pub config: Config,
    /// Where secrets stand in the text itself.
    pub secrets_typed: Vec<Span>,
    /// Where each listener's TLS files are named.
    pub tls_typed: Vec<Option<TlsTyped>>,
}

/// Where the keys of a listener's `tls` stand.
#[derive(Debug, Clone)]
pub(super) struct TlsTyped {
    whole: Span,
    keys: Vec<(&'static str, Span)>,
}

impl TlsTyped {
    pub fn of(&self, key: &str) -> Span {
        let found = self.keys.iter().find(|(name, _)| *name == key);
        found.map_or(self.whole.clone(), |(_, span)| span.clone())
    }
}

pub(super) fn check(text: &str, path: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Checked, Vec<Fault>> {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let mut checker = Checker {
        notes: Notes::default(),
        folder: absolute.parent().map(Path::to_owned).unwrap_or_default(),
        env,
        secrets_typed: Vec::new(),
        tls_typed: Vec::new(),
        line_starts: line_starts(text),
    };
    let (root, errors) = DeTable::parse_recoverable(text);
    let mut faults = checker.syntax(errors);
    let mut config = checker.config(absolute, Section::new("gateway.toml", 0..0, root.get_ref()));

    // Beside a syntax error only what is wrong in itself is reported, and nothing more on its line.
    let broken: Vec<usize> = faults
        .iter()
        .filter_map(|f| f.span.as_ref())
        .map(|s| checker.line_of(s.start))
        .collect();
    faults.extend(
        checker
            .notes
            .faults
            .iter()
            .filter(|fault| {
                let own = fault.span.as_ref().filter(|_| fault.file.is_none());
                let line = own.map(|s| checker.line_of(s.start));
                broken.is_empty() || !(fault.dependent || line.is_some_and(|line| broken.contains(&line)))
            })
            .cloned(),
    );
    if !faults.is_empty() {
        faults.sort_by_key(Fault::place);
        return Err(faults);
    }
    config.fingerprint = data_encoding::HEXLOWER.encode(&Sha256::digest(text.as_bytes())[..6]);
    let page = Page::new(text);
    checker.notes.warnings.sort_by_key(Fault::place);
    config.warnings = checker
        .notes
        .warnings
        .iter()
        .map(|w| page.render(path, w, "warning: "))
        .collect();
    Ok(Checked {
        config,
        secrets_typed: checker.secrets_typed,
        tls_typed: checker.tls_typed,
    })
}

pub(super) fn line_starts(text: &str) -> Vec<usize> {
    std::iter::once(0)
        .chain(text.match_indices('\n').map(|(at, _)| at + 1))
        .collect()
}

impl Names {
    pub fn new(label: &'static str) -> Names {
        Names {
            label,
            seen: Vec::new(),
        }
    }

    pub fn add(&mut self, checker: &mut Checker<'_>, name: At<String>) {
        if let Some(first) = self.seen.iter().find(|s| s.value == name.value) {
            let message = format!("there are two {} with the name {:?}", self.label, name.value);
            let hint = format!(
                "the first is in line {}; give each its own name",
                checker.line_of(first.span.start)
            );
            checker.notes.fault(Fault::new(name.span.clone(), message).hint(hint));
        }
        self.seen.push(name);
    }
}

impl<'e> Checker<'e> {
    pub fn line_of(&self, offset: usize) -> usize {
        self.line_starts.partition_point(|start| *start <= offset)
    }

    /// One fault a line: what the parser says after the first is mostly the echo of it.
    fn syntax(&self, errors: Vec<toml::de::Error>) -> Vec<Fault> {
        let mut faults: Vec<Fault> = Vec::new();
        for error in errors {
            let span = error.span().unwrap_or(0..0);
            let line = self.line_of(span.start);
            let told = faults
                .iter()
                .filter_map(|f| f.span.as_ref())
                .any(|s| self.line_of(s.start) == line);
            if !told {
                let message = error.message().trim_end_matches(", expected nothing");
                let fault = Fault::new(span, message.replace("`\"`", "'\"'").replace('`', "\"")).syntax();
                let is_value = ["must be quoted", "invalid float", "invalid integer", "invalid date"];
                let quotes = is_value.iter().any(|part| message.contains(part));
                faults.push(if quotes {
                    fault.hint("text stands in quotes: \"…\"")
                } else {
                    fault
                });
            }
        }
        faults
    }

    fn config(&mut self, path: PathBuf, mut root: Section<'_, '_>) -> Config {
        let gateway = self.gateway(&mut root);
        let broker = self.broker(&mut root);
        let anonymous_typed = root.has("anonymous");
        let anonymous = self.anonymous(&mut root);
        let users_typed = root.has("user");
        let listeners = self.listeners(&mut root, users_typed, anonymous_typed);
        let by_certificate = |l: &Listener| l.tls.as_ref().is_some_and(|tls| tls.identity.is_some());
        let users = self.users(&mut root, listeners.iter().any(by_certificate));
        let streams = self.streams(&mut root);
        let modules = self.modules(&mut root);
        let links = Links::check(self, &mut root, &gateway.name);
        let uplinks: Vec<&str> = links.uplinks.iter().map(|u| u.name.as_str()).collect();
        let machines = Machines::check(self, &mut root, &uplinks);
        let metrics = self.metrics(&mut root, &listeners);
        root.finish(&mut self.notes);
        if !root_has_any(&listeners, &machines) && self.notes.faults.is_empty() {
            let warning = Fault::of_file("there is neither a [[listener]] nor a [[connector]]: no data can come in");
            self.notes.warn(warning);
        }
        Config {
            path,
            fingerprint: String::new(),
            gateway,
            broker,
            listeners,
            anonymous,
            users,
            streams,
            modules,
            uplinks: links.uplinks,
            routes_up: links.up,
            routes_down: links.down,
            connectors: machines.connectors,
            assets: machines.assets,
            metrics,
            warnings: Vec::new(),
            listeners_unusable: 0,
        }
    }

    /// A `[name]` table.
    fn table<'a, 'i>(&mut self, root: &mut Section<'a, 'i>, name: &'static str) -> Option<Section<'a, 'i>> {
        let value = root.take(name)?;
        let label = format!("[{name}]");
        if let Some(table) = value.get_ref().as_table() {
            return Some(Section::new(label, header(root, name, value), table));
        }
        let span = root.key_span(name).unwrap_or(value.span());
        let message = match value.get_ref().as_array() {
            Some(_) => format!("there is one [{name}] only"),
            None => format!("{name} must be a section, not {}", kind_of(value.get_ref())),
        };
        self.notes
            .fault(Fault::new(span, message).hint(format!("write [{name}] on a line of its own, once")));
        None
    }

    /// All `[[name]]` tables.
    pub fn tables<'a, 'i>(&mut self, root: &mut Section<'a, 'i>, name: &'static str) -> Vec<Section<'a, 'i>> {
        let Some(value) = root.take(name) else {
            return Vec::new();
        };
        let label = format!("[[{name}]]");
        let mut wrong = |span: Span, message: String| {
            self.notes
                .fault(Fault::new(span, message).hint(format!("write [[{name}]] on a line of its own")));
        };
        match value.get_ref() {
            DeValue::Array(items) => {
                let mut sections = Vec::with_capacity(items.len());
                for item in items.iter() {
                    match item.get_ref().as_table() {
                        Some(table) => sections.push(Section::new(label.clone(), item.span(), table)),
                        None => wrong(
                            item.span(),
                            format!("{name} must be sections, not {}", kind_of(item.get_ref())),
                        ),
                    }
                }
                sections
            }
            DeValue::Table(table) => {
                wrong(
                    header(root, name, value),
                    format!("there may be several of {name}: it has double brackets"),
                );
                vec![Section::new(label, header(root, name, value), table)]
            }
            other => {
                let message = format!("{name} must be sections, not {}", kind_of(other));
                wrong(root.key_span(name).unwrap_or(value.span()), message);
                Vec::new()
            }
        }
    }

    /// `name = "…"`: letters, digits, `.`, `_` and `-`, since it becomes a part of topics, of files and of log lines.
    /// The section is called by it from here on.
    pub fn name(&mut self, section: &mut Section<'_, '_>, example: &str) -> Option<At<String>> {
        let name = section.required_string(&mut self.notes, "name", example)?;
        let allowed = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-');
        if name.value.chars().count() > 64 || !name.value.chars().all(allowed) {
            let message = format!("{:?} cannot be a name", name.value);
            let hint = "a name is at most 64 letters, digits, \".\", \"_\" and \"-\"";
            self.notes.fault(Fault::new(name.span, message).hint(hint));
            return None;
        }
        section.label = format!("{} {:?}", section.label, name.value);
        Some(name)
    }

    /// A path, made absolute by the file's folder.
    pub fn path(&mut self, section: &mut Section<'_, '_>, key: &'static str, example: &str) -> Option<At<PathBuf>> {
        let typed = section.string(&mut self.notes, key, example);
        section.takes(key, || "path".to_owned());
        let typed = typed?;
        if typed.value.starts_with('~') || typed.value.contains('\0') {
            let message = format!("{key} in {} is not a usable path", section.label);
            let hint = "~ is not expanded here: write the path in full, or relative to the folder of this file";
            self.notes.fault(Fault::new(typed.span, message).hint(hint));
            return None;
        }
        Some(At {
            value: self.folder.join(&typed.value),
            span: typed.span,
        })
    }

    fn gateway(&mut self, root: &mut Section<'_, '_>) -> Gateway {
        let mut gateway = Gateway {
            name: "gateway".to_owned(),
            data_dir: self.folder.join("data"),
            revert_after: Duration::from_secs(30),
        };
        if !root.has("gateway") {
            let fault = Fault::of_file("there is no [gateway] section").hint("add [gateway] with name = \"line-4\"");
            self.notes.fault(fault.dependent());
        }
        let Some(mut section) = self.table(root, "gateway") else {
            return gateway;
        };
        let name = self.name(&mut section, "\"line-4\"");
        section.label = "[gateway]".to_owned();
        if let Some(name) = name {
            gateway.name = name.value;
        }
        if let Some(path) = self.path(&mut section, "data_dir", "\"data\"") {
            gateway.data_dir = path.value;
        }
        if let Some(time) = section.duration(&mut self.notes, "revert_after", Duration::ZERO..=REVERT_AFTER_MAX) {
            gateway.revert_after = time.value;
        }
        section.finish(&mut self.notes);
        gateway
    }

    fn listeners(&mut self, root: &mut Section<'_, '_>, users_typed: bool, anonymous_typed: bool) -> Vec<Listener> {
        let mut listeners: Vec<Listener> = Vec::new();
        let mut places: Vec<(Bind, usize)> = Vec::new();
        for mut section in self.tables(root, "listener") {
            let bind = section.required_string(&mut self.notes, "bind", "\"127.0.0.1:1883\"");
            let anonymous = section.boolean(&mut self.notes, "allow_anonymous");
            let packet = section.size(&mut self.notes, "max_packet", KIB..=PACKET_BYTES_MAX);
            let connections = section.integer(&mut self.notes, "max_connections", 1..=1_000_000);
            let (tls, tls_typed) = self.server_tls(&mut section);
            let websocket = section.boolean(&mut self.notes, "websocket").is_some_and(|w| w.value);
            let origins = self.origins(&mut section, websocket);
            let proxy_protocol = section.boolean(&mut self.notes, "proxy_protocol");
            let keep_alives = Duration::from_secs(1)..=Duration::from_secs(u16::MAX.into());
            let keep_alive = section.duration(&mut self.notes, "max_keep_alive", keep_alives);
            let refusals = [
                ("not-authorized", SubscribeRefusal::NotAuthorized),
                ("unspecified", SubscribeRefusal::Unspecified),
            ];
            let refusal = section.choice(&mut self.notes, "subscribe_refusal", &refusals);
            let header = section.header.clone();
            section.finish(&mut self.notes);

            let Some(bind) = bind else { continue };
            let found = match bind.value.strip_prefix("unix:") {
                Some(path) => self.parse_unix(path).map(|path| (Bind::Unix(path), None)),
                None => parse_bind(&bind.value).map(|(addr, also)| (Bind::Address(addr), also)),
            };
            let (at, also) = match found {
                Ok(found) => found,
                Err((message, hint)) => {
                    self.notes.fault(Fault::new(bind.span, message).hint(hint));
                    continue;
                }
            };
            let of_this = || std::iter::once(at.clone()).chain(also.map(Bind::Address));
            for place in of_this() {
                let is_same = |other: &Bind| match (other, &place) {
                    (Bind::Address(a), Bind::Address(b)) => is_same_place(*a, *b),
                    (a, b) => a == b,
                };
                if let Some((first, line)) = places.iter().find(|(other, _)| is_same(other)) {
                    let message = format!("{place} is taken by another [[listener]]");
                    let own = match place {
                        Bind::Address(_) => "port",
                        Bind::Unix(_) => "path",
                    };
                    let hint = format!("line {line} binds {first}; give each listener its own {own}");
                    self.notes.fault(Fault::new(bind.span.clone(), message).hint(hint));
                    break;
                }
            }
            let line = self.line_of(header.start);
            places.extend(of_this().map(|place| (place, line)));

            let allow_anonymous = anonymous.as_ref().map_or(at.is_local(), |a| a.value);
            if !allow_anonymous && !users_typed {
                let message = format!("nobody could connect to {}: there is no [[user]]", bind.value);
                let hint = "add a [[user]] (`tidegate passwd` makes its password_hash), or allow_anonymous = true here";
                self.notes
                    .fault(Fault::new(bind.span.clone(), message).hint(hint).dependent());
            }
            let asks_for_certificate = tls
                .as_ref()
                .is_some_and(|t| t.files.client_ca.is_some() && !t.files.client_cert_is_optional);
            if allow_anonymous && !at.is_local() && !anonymous_typed && !asks_for_certificate {
                let message = format!("whoever reaches {} may publish and subscribe to everything", bind.value);
                let span = anonymous.map_or(bind.span, |a| a.span);
                self.notes
                    .warn(Fault::new(span, message).hint("[anonymous] says what they may do"));
            }
            self.tls_typed.push(tls_typed);
            listeners.push(Listener {
                bind: at,
                bind_also: also,
                allow_anonymous,
                tls,
                websocket,
                origins,
                proxy_protocol: proxy_protocol.is_some_and(|p| p.value),
                packet_bytes_max: packet.map_or(MIB as u32, |bytes| bytes as u32),
                connections_max: connections.map_or(10_000, |n| n as u32),
                keep_alive_max_s: keep_alive.map(|k| u16::try_from(k.value.as_secs()).unwrap_or(u16::MAX)),
                subscribe_refusal: refusal.unwrap_or(SubscribeRefusal::NotAuthorized),
            });
        }
        listeners
    }

    /// `tls` of a listener.
    fn server_tls(&mut self, section: &mut Section<'_, '_>) -> (Option<ServerTls>, Option<TlsTyped>) {
        let example = "{ cert = \"server.pem\", key = \"server.key\" }";
        let Some(value) = section.take("tls") else {
            return (None, None);
        };
        let Some(table) = value.get_ref().as_table() else {
            section.wrong(&mut self.notes, "tls", value, "a table", example);
            return (None, None);
        };
        let mut tls = Section::new(format!("tls of {}", section.label), value.span(), table);
        let cert = self.file(&mut tls, "cert", "\"server.pem\"");
        let key = self.file(&mut tls, "key", "\"server.key\"");
        let client_ca = self.file(&mut tls, "client_ca", "\"clients-ca.pem\"");
        let choices = [("required", false), ("optional", true)];
        let is_optional = tls.choice(&mut self.notes, "client_cert", &choices);
        let choices = [
            ("none", None),
            ("cn", Some(NameKind::CommonName)),
            ("san-dns", Some(NameKind::SanDns)),
            ("san-uri", Some(NameKind::SanUri)),
        ];
        let identity = tls.choice(&mut self.notes, "client_identity", &choices);
        for required in ["cert", "key"] {
            if !tls.has(required) {
                let name = format!("\"server.{}\"", if required == "cert" { "pem" } else { "key" });
                tls.missing(&mut self.notes, required, &name);
            }
        }
        if !tls.has("client_ca") {
            for dependent in ["client_cert", "client_identity"] {
                if let Some(span) = tls.key_span(dependent) {
                    let message = format!("{} has {dependent:?} without \"client_ca\"", tls.label);
                    let hint = "client_ca names the PEM file of the authority that client certificates are from";
                    self.notes.fault(Fault::new(span, message).hint(hint));
                }
            }
        }
        tls.finish(&mut self.notes);
        let (Some(cert), Some(key)) = (cert, key) else {
            return (None, None);
        };
        let mut keys = vec![("cert", cert.span), ("key", key.span)];
        keys.extend(client_ca.as_ref().map(|ca| ("client_ca", ca.span.clone())));
        let files = server::Files {
            cert: cert.value,
            key: key.value,
            client_ca: client_ca.map(|ca| ca.value),
            client_cert_is_optional: is_optional.unwrap_or(false),
        };
        let identity = identity.flatten();
        let whole = value.span();
        (Some(ServerTls { files, identity }), Some(TlsTyped { whole, keys }))
    }

    /// `origins = ["https://dash.example"]`
    fn origins(&mut self, section: &mut Section<'_, '_>, websocket: bool) -> Vec<String> {
        let texts = section.texts(&mut self.notes, "origins");
        if let (Some(span), false) = (section.key_span("origins"), websocket) {
            let fault = Fault::new(span, "origins is set, but the listener is not one for WebSocket");
            self.notes.fault(fault.hint("write websocket = true, or take it out"));
        }
        let mut origins = Vec::new();
        for text in texts.unwrap_or_default() {
            let host = ["https://", "http://"].iter().find_map(|s| text.value.strip_prefix(s));
            if host.is_none_or(|host| host.is_empty() || host.contains('/')) {
                let message = format!("{:?} is not the origin of a page", text.value);
                let hint = "write it as browsers do: \"https://dash.example\" or \"http://192.0.2.1:8080\"";
                self.notes.fault(Fault::new(text.span, message).hint(hint));
                continue;
            }
            origins.push(text.value.to_ascii_lowercase());
        }
        origins
    }

    fn parse_unix(&self, typed: &str) -> Result<PathBuf, (String, String)> {
        let refuse = |hint: &str| (format!("\"unix:{typed}\" is not a place to listen at"), hint.to_owned());
        if typed.is_empty() || typed.ends_with('/') || typed.starts_with('~') || typed.contains('\0') {
            return Err(refuse("write the path of the socket: \"unix:/run/tidegate/mqtt.sock\""));
        }
        let path = self.folder.join(typed);
        if path.as_os_str().len() > UNIX_PATH_BYTES_MAX {
            return Err(refuse("the path of a Unix socket has at most 107 bytes"));
        }
        Ok(path)
    }

    fn broker(&mut self, root: &mut Section<'_, '_>) -> BrokerSettings {
        let mut broker = BrokerSettings::default();
        let Some(mut section) = self.table(root, "broker") else {
            return broker;
        };
        let choices = [
            ("acknowledge", RefusedPublish::Acknowledge),
            ("disconnect", RefusedPublish::Disconnect),
        ];
        if let Some(choice) = section.choice(&mut self.notes, "refused_publish", &choices) {
            broker.refused_publish = choice;
        }
        let times = Duration::ZERO..=Duration::from_secs(3_600);
        if let Some(time) = section.duration(&mut self.notes, "sys_interval", times) {
            broker.sys_interval = time.value;
            if !time.value.is_zero() && time.value < Duration::from_secs(1) {
                let message = "sys_interval in [broker] must be 1s to 1h";
                let fault = Fault::new(time.span, message).hint("or \"0 s\": no $SYS topics at all");
                self.notes.fault(fault);
            }
        }
        if let Some(n) = section.integer(&mut self.notes, "failed_logins_per_minute", 0..=60_000) {
            broker.failed_logins_per_minute = n as u32;
        }
        section.finish(&mut self.notes);
        broker
    }

    /// `user`: whose rules these are; None: nobody's by name.
    fn access(&mut self, section: &mut Section<'_, '_>, user: Option<&str>, default: &[Pattern]) -> Access {
        let mut list = |key| self.patterns(section, key, user);
        Access {
            publish: list("publish").unwrap_or_else(|| default.to_vec()),
            subscribe: list("subscribe").unwrap_or_else(|| default.to_vec()),
            deny_publish: list("deny_publish").unwrap_or_default(),
            deny_subscribe: list("deny_subscribe").unwrap_or_default(),
        }
    }

    fn patterns(
        &mut self,
        section: &mut Section<'_, '_>,
        key: &'static str,
        user: Option<&str>,
    ) -> Option<Vec<Pattern>> {
        let texts = section.texts(&mut self.notes, key);
        section.takes(key, || "list of topic filters".to_owned());
        let mut patterns = Vec::new();
        for typed in texts? {
            // Only its faults are asked for: with a plain name in each place it is a filter like any other.
            let plain = typed.value.replace("{user}", "x").replace("{client_id}", "x");
            if filter(&mut self.notes, &typed, &plain).is_none() {
                continue;
            }
            let Ok(pattern) = Pattern::parse(&typed.value) else {
                continue;
            };
            if pattern.names_user() {
                let fault = match user {
                    None => Some((
                        format!(
                            "{{user}} stands for nothing in {}: such clients have no user name",
                            section.label
                        ),
                        "write {client_id}, or put the rule into a [[user]]",
                    )),
                    Some(name) if !pattern::fits(name) => Some((
                        format!(
                            "the name {name:?} cannot stand for {{user}}: it would be more than one level, or a wildcard"
                        ),
                        "write the topic out, or give the user a name without /, + and #, and without $ at its beginning",
                    )),
                    Some(_) => None,
                };
                if let Some((message, hint)) = fault {
                    self.notes.fault(Fault::new(typed.span, message).hint(hint));
                    continue;
                }
            }
            patterns.push(pattern);
        }
        Some(patterns)
    }

    fn limits(&mut self, section: &mut Section<'_, '_>) -> ClientLimits {
        let mut number = |key| section.integer(&mut self.notes, key, 1..=1_000_000).map(|n| n as u32);
        ClientLimits {
            connections: number("max_connections"),
            messages_per_second: number("max_messages_per_second"),
            subscriptions: number("max_subscriptions"),
            bytes_per_second: section.size(&mut self.notes, "max_bytes_per_second", KIB..=1024 * GIB),
            queued_bytes: section.size(&mut self.notes, "max_queued_bytes", KIB..=1024 * GIB),
        }
    }

    fn anonymous(&mut self, root: &mut Section<'_, '_>) -> Anonymous {
        let everything = vec![Pattern::parse("#").expect("# is a filter")];
        match self.table(root, "anonymous") {
            Some(mut section) => {
                let access = self.access(&mut section, None, &everything);
                let limits = self.limits(&mut section);
                section.finish(&mut self.notes);
                Anonymous { access, limits }
            }
            None => Anonymous {
                access: Access {
                    publish: everything.clone(),
                    subscribe: everything,
                    ..Access::default()
                },
                limits: ClientLimits::default(),
            },
        }
    }

    /// The users, and whether any is typed (rightly or not).
    /// `by_certificate`: client certificates name users, so that one needs no password.
    fn users(&mut self, root: &mut Section<'_, '_>, by_certificate: bool) -> Vec<User> {
        let mut users = Vec::new();
        let mut names = Names::new("[[user]]");
        for mut section in self.tables(root, "user") {
            let name = section.required_string(&mut self.notes, "name", "\"press-7\"");
            if let Some(name) = &name {
                section.label = format!("[[user]] {:?}", name.value);
                names.add(self, name.clone());
            }
            if !section.has("password_hash") && !by_certificate {
                section.missing(&mut self.notes, "password_hash", "\"…\", which `tidegate passwd` makes");
            }
            let hash = self.secret(&mut section, "password_hash");
            if let Some(hash) = &hash {
                self.password_hash(hash);
            }
            let user = name.as_ref().map_or("x", |n| n.value.as_str());
            let access = self.access(&mut section, Some(user), &[]);
            let limits = self.limits(&mut section);
            if access.publish.is_empty() && access.subscribe.is_empty() {
                let message = format!("{} may neither publish nor subscribe to anything", section.label);
                let warning = Fault::new(section.header.clone(), message);
                self.notes
                    .warn(warning.hint("add publish = [\"…\"] or subscribe = [\"…\"]"));
            }
            section.finish(&mut self.notes);
            if let Some(name) = name {
                users.push(User {
                    name: name.value,
                    password_hash: hash.map(|hash| hash.value),
                    access,
                    limits,
                });
            }
        }
        users
    }

    fn password_hash(&mut self, hash: &At<Secret>) {
        let refuse = |why: &str| {
            Fault::new(
                hash.span.clone(),
                format!("password_hash is not an argon2id hash: {why}"),
            )
            .hint("`tidegate passwd` asks for a password and prints its hash")
        };
        let phc = match PasswordHash::new(hash.value.reveal()) {
            Ok(phc) => phc,
            Err(_) => {
                return self
                    .notes
                    .fault(refuse("it does not read $argon2id$v=19$m=…,t=…,p=…$salt$hash"));
            }
        };
        if phc.algorithm.as_str() != "argon2id" {
            return self.notes.fault(refuse("it is made by another algorithm"));
        }
        let Ok(params) = argon2::Params::try_from(&phc) else {
            return self.notes.fault(refuse("its parameters are out of range"));
        };
        if phc.salt.is_none() || phc.hash.is_none() {
            return self.notes.fault(refuse("it is cut short"));
        }
        if params.m_cost() > HASH_KIB_DOUBTFUL {
            let message = format!(
                "each login of this user takes {} MiB of memory for a moment",
                params.m_cost() >> 10
            );
            let hint = "`tidegate passwd` makes a hash that takes 7 MiB";
            self.notes.warn(Fault::new(hash.span.clone(), message).hint(hint));
        }
    }

    fn streams(&mut self, root: &mut Section<'_, '_>) -> Vec<Stream> {
        let mut streams: Vec<Stream> = Vec::new();
        let mut names = Names::new("[[stream]]");
        for mut section in self.tables(root, "stream") {
            let name = self.name(&mut section, "\"alarms\"");
            if let Some(name) = &name {
                names.add(self, name.clone());
            }
            let filter = self.required_filters(&mut section, "filter");
            let bytes_max = section
                .size(&mut self.notes, "max_bytes", 64 * KIB..=1024 * GIB)
                .unwrap_or(GIB);
            let ages = Duration::from_secs(1)..=YEAR * 100;
            let age_max = section.duration(&mut self.notes, "max_age", ages);
            let choices = [("drop-oldest", WhenFull::DropOldest), ("reject", WhenFull::Reject)];
            let when_full = section
                .choice(&mut self.notes, "when_full", &choices)
                .unwrap_or(WhenFull::DropOldest);
            let is_shadowed = |f: &TopicFilter| streams.iter().any(|s| s.filter.iter().any(|e| e.covers(f)));
            if !filter.is_empty() && filter.iter().all(is_shadowed) {
                let message = format!(
                    "{} never gets a message: the streams before it take them all",
                    section.label
                );
                let hint = "a message enters the first stream that matches; put the narrow ones first";
                self.notes.warn(Fault::new(section.header.clone(), message).hint(hint));
            }
            section.finish(&mut self.notes);
            let name = name.map_or_else(String::new, |n| n.value);
            streams.push(Stream {
                name,
                filter,
                bytes_max,
                age_max: age_max.map(|a| a.value),
                when_full,
            });
        }
        // Whatever a durable consumer wants must have a stream.
        if !streams.iter().any(|s| s.filter.iter().any(|f| f.as_str() == "#")) {
            let free = |name: &String| !streams.iter().any(|s| s.name == *name);
            let name = ["default", "rest"]
                .map(str::to_owned)
                .into_iter()
                .chain((2..).map(|n| format!("rest-{n}")))
                .find(free);
            streams.push(Stream {
                name: name.unwrap_or_default(),
                filter: vec![everything()],
                bytes_max: GIB,
                age_max: None,
                when_full: WhenFull::DropOldest,
            });
        }
        streams
    }

    pub fn required_filters(&mut self, section: &mut Section<'_, '_>, key: &'static str) -> Vec<TopicFilter> {
        if !section.has(key) {
            section.missing(&mut self.notes, key, "[\"#\"]");
        }
        let faults = self.notes.faults.len();
        let filters = section.filters(&mut self.notes, key).unwrap_or_default();
        if filters.is_empty() && section.has(key) && self.notes.faults.len() == faults {
            let span = section.key_span(key).unwrap_or(section.header.clone());
            let message = format!("{key} in {} is an empty list", section.label);
            self.notes
                .fault(Fault::new(span, message).hint(format!("write {key} = [\"#\"] for everything")));
        }
        filters
    }

    fn modules(&mut self, root: &mut Section<'_, '_>) -> Modules {
        let mut modules = Modules {
            dir: self.folder.join("modules.d"),
            settings: BTreeMap::new(),
        };
        if let Some(mut section) = self.table(root, "modules") {
            if let Some(dir) = self.path(&mut section, "dir", "\"modules.d\"") {
                modules.dir = dir.value;
            }
            section.finish(&mut self.notes);
        }
        let mut names = Names::new("[[module]]");
        for mut section in self.tables(root, "module") {
            let name = section.required_string(&mut self.notes, "name", "\"average\"");
            if let Some(name) = &name {
                section.label = format!("[[module]] {:?}", name.value);
                if name.value.ends_with(".wasm") || name.value.contains('/') {
                    let hint = format!("write {:?}", module_stem(&name.value));
                    let message = "a module is named by its file without folder and .wasm";
                    self.notes.fault(Fault::new(name.span.clone(), message).hint(hint));
                }
                names.add(self, name.clone());
            }
            let default = ModuleSettings::default();
            let millis = Duration::from_millis;
            let settings = ModuleSettings {
                subscribe: section.filters(&mut self.notes, "subscribe"),
                publish: section.filters(&mut self.notes, "publish"),
                config: self.module_config(&mut section).unwrap_or(default.config),
                memory_bytes_max: section
                    .size(&mut self.notes, "memory", 64 * KIB..=4 * GIB)
                    .unwrap_or(default.memory_bytes_max),
                deadline: section
                    .duration(&mut self.notes, "deadline", millis(1)..=millis(600_000))
                    .map_or(default.deadline, |d| d.value),
            };
            section.finish(&mut self.notes);
            if let Some(name) = name {
                modules.settings.insert(name.value, settings);
            }
        }
        modules
    }

    /// `[metrics] bind = "127.0.0.1:9464"`
    fn metrics(&mut self, root: &mut Section<'_, '_>, listeners: &[Listener]) -> Option<SocketAddr> {
        let mut section = self.table(root, "metrics")?;
        let bind = section.required_string(&mut self.notes, "bind", "\"127.0.0.1:9464\"");
        section.finish(&mut self.notes);
        let bind = bind?;
        let addr = match parse_bind(&bind.value) {
            Ok((addr, _)) => addr,
            Err((message, hint)) => {
                let hint = hint.replace("1883", "9464");
                self.notes.fault(Fault::new(bind.span, message).hint(hint));
                return None;
            }
        };
        let is_taken = |l: &&Listener| l.bind.address().is_some_and(|at| is_same_place(at, addr));
        if let Some(taken) = listeners.iter().find(is_taken) {
            let message = format!("{addr} is taken by the [[listener]] on {}", taken.bind);
            let fault = Fault::new(bind.span.clone(), message);
            self.notes
                .fault(fault.hint("give the metrics a port of their own, for example 9464"));
        }
        if !addr.ip().is_loopback() {
            let message = "whoever reaches this address can read the metrics: names of uplinks, connectors and modules";
            let hint = "bind to 127.0.0.1 and let a proxy with authentication stand before it, or close the port";
            self.notes.warn(Fault::new(bind.span, message).hint(hint));
        }
        Some(addr)
    }

    fn module_config(&mut self, section: &mut Section<'_, '_>) -> Option<serde_json::Value> {
        let value = section.take("config")?;
        if !value.get_ref().is_table() {
            section.wrong(&mut self.notes, "config", value, "a table", "{ window = \"10 s\" }");
            return None;
        }
        json(&mut self.notes, value)
    }
}

fn root_has_any(listeners: &[Listener], machines: &Machines) -> bool {
    !listeners.is_empty() || !machines.connectors.is_empty()
}

fn everything() -> TopicFilter {
    TopicFilter::new("#").expect("# is a filter")
}

fn header(root: &Section<'_, '_>, name: &str, value: &Spanned<DeValue<'_>>) -> Span {
    root.key_span(name).unwrap_or(value.span())
}

fn module_stem(name: &str) -> &str {
    let file = name.rsplit('/').next().unwrap_or(name);
    file.strip_suffix(".wasm").unwrap_or(file)
}

/// What `init` gets: dates as text; numbers that JSON cannot say are faults.
fn json(notes: &mut Notes, value: &Spanned<DeValue<'_>>) -> Option<serde_json::Value> {
    Some(match value.get_ref() {
        DeValue::String(text) => text.as_ref().into(),
        DeValue::Boolean(flag) => (*flag).into(),
        DeValue::Datetime(date) => date.to_string().into(),
        DeValue::Integer(_) => match integer(value.get_ref()) {
            Some(n) => n.into(),
            None => {
                notes.fault(Fault::new(value.span(), "the integer is outside of 64 bits"));
                return None;
            }
        },
        DeValue::Float(float) => match float
            .as_str()
            .parse::<f64>()
            .ok()
            .and_then(serde_json::Number::from_f64)
        {
            Some(number) => serde_json::Value::Number(number),
            None => {
                notes.fault(Fault::new(
                    value.span(),
                    "JSON, which the module gets, has no such number",
                ));
                return None;
            }
        },
        DeValue::Array(items) => items
            .iter()
            .map(|item| json(notes, item))
            .collect::<Option<Vec<_>>>()
            .map(serde_json::Value::Array)?,
        DeValue::Table(table) => {
            let mut object = serde_json::Map::new();
            for (key, value) in table {
                object.insert(key.get_ref().to_string(), json(notes, value)?);
            }
            serde_json::Value::Object(object)
        }
    })
}

/// An address and, for `localhost`, the same in the other family; or what is wrong and what to write.
fn parse_bind(text: &str) -> Result<(SocketAddr, Option<SocketAddr>), (String, String)> {
    if let Ok(addr) = text.parse::<SocketAddr>() {
        return Ok((addr, None));
    }
    let refuse = |hint: &str| (format!("{text:?} is not an address to listen on"), hint.to_owned());
    if text.parse::<u16>().is_ok() {
        return Err(refuse(&format!(
            "write \"127.0.0.1:{text}\", or \"0.0.0.0:{text}\" for all interfaces"
        )));
    }
    match text.trim_matches(['[', ']']).parse::<IpAddr>() {
        Ok(IpAddr::V4(ip)) => return Err(refuse(&format!("the port is missing: write \"{ip}:1883\""))),
        Ok(IpAddr::V6(ip)) => return Err(refuse(&format!("the port is missing: write \"[{ip}]:1883\""))),
        Err(_) => {}
    }
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(refuse("write an IP address and a port: \"127.0.0.1:1883\""));
    };
    let Ok(port) = port.parse::<u16>() else {
        return Err(refuse("the port is a number from 1 to 65535: \"127.0.0.1:1883\""));
    };
    match host {
        "localhost" => {
            let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
            // Port 0 would be two different ports.
            Ok((SocketAddr::from((Ipv4Addr::LOCALHOST, port)), (port != 0).then_some(v6)))
        }
        "" | "*" => Err(refuse(&format!(
            "write \"0.0.0.0:{port}\" for all IPv4 interfaces, \"[::]:{port}\" for IPv6 too"
        ))),
        _ => Err(refuse(&format!(
            "a listener takes an IP address or localhost: \"0.0.0.0:{port}\" is all interfaces"
        ))),
    }
}

/// Whether the second of the two could not be bound.
fn is_same_place(a: SocketAddr, b: SocketAddr) -> bool {
    let any_of_family = a.is_ipv4() == b.is_ipv4() && (a.ip().is_unspecified() || b.ip().is_unspecified());
    a.port() == b.port() && a.port() != 0 && (a.ip() == b.ip() || any_of_family)
}
