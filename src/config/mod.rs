//! gateway.toml: the text becomes a checked [`Config`], or a list of [`Fault`]s that names every mistake at once.
//!
//! What was typed ([`raw`]) and what it means (the types here) are different types: a [`Config`] that exists is valid,
//! its relative paths are resolved against the file's folder and its defaults are filled in. No I/O but reading the
//! file itself and the secrets it points at.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::message::{Topic, TopicFilter};

/// The whole of gateway.toml, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The file it came from, absolute.
    pub path: PathBuf,
    pub gateway: Gateway,
    pub listeners: Vec<Listener>,
    pub anonymous: Access,
    pub users: Vec<User>,
    /// Never empty: without a `[[stream]]` there is one named "default" with the filter `#`, and one is appended where
    /// the declared ones do not end in a `#`.
    pub streams: Vec<Stream>,
    pub modules: Modules,
    pub uplinks: Vec<Uplink>,
    pub routes_up: Vec<RouteUp>,
    pub routes_down: Vec<RouteDown>,
    pub connectors: Vec<Connector>,
    pub assets: Vec<Asset>,
}

#[derive(Debug, Clone)]
pub struct Gateway {
    pub name: String,
    pub data_dir: PathBuf,
}

#[derive(Debug, Clone)]
pub struct Listener {
    pub bind: SocketAddr,
    /// Whether clients without a user may connect here: by default on loopback only.
    pub allow_anonymous: bool,
    /// A PUBLISH (or any other packet) above this size is refused; 1 MiB by default.
    pub packet_bytes_max: u32,
    pub connections_max: u32,
}

/// What a client may do: `deny_…` wins over the allowing lists.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Access {
    pub publish: Vec<TopicFilter>,
    pub subscribe: Vec<TopicFilter>,
    pub deny_publish: Vec<TopicFilter>,
    pub deny_subscribe: Vec<TopicFilter>,
}

#[derive(Debug, Clone)]
pub struct User {
    pub name: String,
    /// A PHC string, `$argon2id$…`.
    pub password_hash: Secret,
    pub access: Access,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    pub name: String,
    pub filter: Vec<TopicFilter>,
    pub bytes_max: u64,
    pub age_max: Option<Duration>,
    pub when_full: WhenFull,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenFull {
    DropOldest,
    Reject,
}

#[derive(Debug, Clone)]
pub struct Modules {
    pub dir: PathBuf,
    /// By the file's stem; a module without an entry runs with [`ModuleSettings::default`].
    pub settings: BTreeMap<String, ModuleSettings>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ModuleSettings {
    /// None: what `describe` asks for.
    pub subscribe: Option<Vec<TopicFilter>>,
    pub publish: Option<Vec<TopicFilter>>,
    /// Handed to `init` as JSON.
    pub config: serde_json::Value,
    pub memory_bytes_max: u64,
    pub deadline: Duration,
}

impl Default for ModuleSettings {
    fn default() -> Self {
        ModuleSettings {
            subscribe: None,
            publish: None,
            config: serde_json::Value::Object(serde_json::Map::new()),
            memory_bytes_max: 16 << 20,
            deadline: Duration::from_millis(50),
        }
    }
}

#[derive(Debug, Clone)]
pub struct Uplink {
    pub name: String,
    pub kind: UplinkKind,
}

#[derive(Debug, Clone)]
pub enum UplinkKind {
    File(FileUplink),
    Mqtt(Box<MqttUplink>),
}

#[derive(Debug, Clone)]
pub struct FileUplink {
    pub path: PathBuf,
    /// The current file is rotated when it reaches this size (`max_bytes`, 16 MiB by default) …
    pub bytes_max: u64,
    /// … and this many rotated files are kept (`keep`, 4 by default): archive.jsonl.1 is the newest of them.
    pub keep: u32,
}

#[derive(Debug, Clone)]
pub struct MqttUplink {
    pub transport: MqttTransport,
    pub host: String,
    pub port: u16,
    /// The path of a WebSocket URL, `/mqtt` where the URL has none; unused otherwise.
    pub ws_path: String,
    /// 4 (MQTT 3.1.1) or 5 (`version = "3.1.1" | "5"`, "5" by default).
    pub version: MqttVersion,
    /// `tidegate-{gateway}-{uplink}` by default.
    pub client_id: String,
    pub username: Option<String>,
    pub password: Option<Secret>,
    /// Keep-alive of the uplink's connection, 60 s by default.
    pub keep_alive: Duration,
    /// Messages sent and not yet acknowledged by the remote: `window`, 100 by default, 1 to 65,535.
    pub window: u16,
    /// The largest packet the remote takes (`max_packet`); a version 5 remote says so itself. None: the protocol's own limit.
    pub packet_bytes_max: Option<u32>,
    /// Without a PUBACK for this long while messages are in flight the connection is made anew (`ack_timeout`, 30 s by default).
    pub ack_timeout: Duration,
    pub tls: Option<ClientTls>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MqttTransport {
    Tcp,
    Tls,
    Ws,
    Wss,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MqttVersion {
    V311,
    V5,
}

/// `tls = { ca = "…", cert = "…", key = "…", server_name = "…" }`; the files are read at each connect, so that a renewed
/// certificate is used and a missing one is the uplink's fault alone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ClientTls {
    /// None: the system's certificate authorities.
    pub ca: Option<PathBuf>,
    pub cert: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub server_name: Option<String>,
}

/// Local messages to an uplink.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteUp {
    pub from: Vec<TopicFilter>,
    pub to: String,
    pub topic: Template,
}

/// Messages of an uplink to local topics.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RouteDown {
    pub from_uplink: String,
    /// Filters at the remote, with `{gateway}` already filled in.
    pub from: Vec<TopicFilter>,
    pub topic: Template,
}

/// A topic template: text with `{gateway}`, `{topic}` and `{rest}`. `{gateway}` is already filled in here.
/// `{topic}` is the whole topic; `{rest}` what the filter's `#` matched (or, without `#`, the whole topic).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template(pub(crate) Vec<TemplatePart>);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum TemplatePart {
    Text(String),
    Topic,
    Rest,
}

#[derive(Debug, Clone)]
pub struct Connector {
    pub name: String,
    pub kind: ConnectorKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectorKind {
    Simulator,
}

#[derive(Debug, Clone)]
pub struct Asset {
    pub name: String,
    /// `data/{name}`
    pub topic: Topic,
    pub connector: String,
    pub every: Duration,
    pub points: Vec<Point>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    pub name: String,
    /// What the connector kind understands; for the simulator the name of one of its signals.
    pub address: String,
    pub unit: Option<String>,
}

/// A value that is never shown: neither logged nor printed by Debug.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: String) -> Secret {
        Secret(text)
    }

    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[secret]")
    }
}
