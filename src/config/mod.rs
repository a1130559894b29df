//! gateway.toml: the text becomes a checked [`Config`], or a list of [`Fault`]s that names every mistake at once.
//!
//! What was typed (the TOML tree that [`read`] walks) and what it means (the types here) are different types: a
//! [`Config`] that exists is valid, its relative paths are resolved against the file's folder and its defaults are
//! filled in. No I/O but reading the file itself, the secrets and the files with points that it names.

pub mod buses;
mod check;
mod difference;
mod fault;
#[cfg(test)]
mod golden;
pub mod gpio;
mod links;
mod machines;
mod modbus;
mod pattern;
mod points_file;
mod read;
#[cfg(test)]
mod reference;
mod secret;
mod template;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

pub use difference::{Action, Change, Kind, difference};
pub use fault::{Fault, Faults};
pub use modbus::{
    ByteOrder, ModbusAddress, ModbusLine, ModbusWire, Parity, SerialLine, Table, WriteFunction, parse_host,
};
pub use pattern::{Pattern, Unfit};

use crate::certificate::{NameKind, server};
use crate::message::{Topic, TopicFilter};

/// A gateway.toml above this size is a mistake of its own.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Reads and checks a file, and the secrets it points at.
pub fn load(path: &Path) -> Result<Config, Faults> {
    let refuse = |message: String, hint: &str| Faults::new(path, "", vec![Fault::of_file(message).hint(hint)]);
    let metadata = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => refuse("there is no such file".to_owned(), "`tidegate init` writes one"),
        _ => refuse(format!("cannot be read: {error}"), "run as a user who may read it"),
    })?;
    if metadata.is_dir() {
        return Err(refuse(
            "is a folder, not a file".to_owned(),
            "name the gateway.toml in it",
        ));
    }
    if metadata.len() > FILE_BYTES_MAX {
        return Err(refuse("is larger than 4 MiB".to_owned(), "is this a gateway.toml?"));
    }
    let bytes =
        std::fs::read(path).map_err(|e| refuse(format!("cannot be read: {e}"), "run as a user who may read it"))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        let line = error.as_bytes()[..at].iter().filter(|b| **b == b'\n').count() + 1;
        refuse(format!("is not UTF-8 text (line {line})"), "save it as UTF-8")
    })?;
    let env = |name: &str| std::env::var(name).ok();
    let checked = check::check(&text, path, &env).map_err(|faults| Faults::new(path, &text, faults))?;
    let (mut config, secrets_typed) = (checked.config, checked.secrets_typed);
    // Certificates are the listener's fault alone: the rest starts without it.
    for (listener, place) in config.listeners.iter().zip(&checked.tls_typed) {
        let (Some(tls), Some(place)) = (&listener.tls, place) else {
            continue;
        };
        if let Err(e) = server::load(&tls.files) {
            let span = place.of(e.key());
            let fault = Fault::new(
                span,
                format!("nobody will be able to connect to {}: {e}", listener.bind),
            )
            .hint("both are PEM files, readable for the user that tidegate runs as");
            let page = fault::Page::new(&text);
            config.warnings.push(page.render(path, &fault, "warning: "));
            config.listeners_unusable += 1;
        }
    }
    if let Some(span) = secrets_typed
        .into_iter()
        .next()
        .filter(|_| secret::is_readable_by_all(&metadata))
    {
        let warning = Fault::new(span, "every user of this machine can read this secret")
            .hint("chmod 640 the file, or keep the secret in a file of its own: { file = \"…\" }");
        config
            .warnings
            .push(fault::Page::new(&text).render(path, &warning, "warning: "));
    }
    Ok(config)
}

/// The data directory of a file that need not be valid otherwise: a gateway that runs can be asked while its file is
/// being edited, and by users who may not read its secrets.
pub fn data_dir(path: &Path) -> Result<PathBuf, Faults> {
    let refuse = |message: String| {
        let hint = "--config FILE names the configuration of the gateway that you mean";
        Faults::new(path, "", vec![Fault::of_file(message).hint(hint)])
    };
    let text = std::fs::read_to_string(path).map_err(|e| refuse(format!("cannot be read: {e}")))?;
    let (root, _) = toml::de::DeTable::parse_recoverable(&text);
    let typed = root.get_ref().get("gateway").and_then(|g| g.get_ref().as_table());
    let typed = typed.and_then(|g| g.get("data_dir")).and_then(|d| d.get_ref().as_str());
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let folder = absolute.parent().unwrap_or(Path::new("/"));
    Ok(folder.join(typed.unwrap_or("data")))
}

/// Checks a text as if it were the content of `path`; `env` gives the variables that secrets are taken from.
/// The faults are in the order of their places; [`Faults`] prints them.
pub fn parse(text: &str, path: &Path, env: &dyn Fn(&str) -> Option<String>) -> Result<Config, Vec<Fault>> {
    check::check(text, path, env).map(|checked| checked.config)
}

/// The whole of gateway.toml, checked.
#[derive(Debug, Clone)]
pub struct Config {
    /// The file it came from, absolute.
    pub path: PathBuf,
    /// Names the file's content: the beginning of its SHA-256.
    pub fingerprint: String,
    pub gateway: Gateway,
    pub broker: BrokerSettings,
    pub listeners: Vec<Listener>,
    pub anonymous: Anonymous,
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
    /// Where metrics are served (`[metrics] bind`); None: nowhere.
    pub metrics: Option<SocketAddr>,
    /// What is legal but doubtful, ready to print.
    pub warnings: Vec<String>,
    /// Listeners whose certificate cannot be used as it lies there now; a warning says why.
    pub listeners_unusable: usize,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Gateway {
    pub name: String,
    pub data_dir: PathBuf,
    /// A listener or uplink that is not up this long after the reload that touched it: back to the configuration before
    /// (30 s by default; zero: never).
    pub revert_after: Duration,
}

/// A place to listen at.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Bind {
    Address(SocketAddr),
    /// The path of a Unix socket.
    Unix(PathBuf),
}

impl Bind {
    pub fn address(&self) -> Option<SocketAddr> {
        match self {
            Bind::Address(address) => Some(*address),
            Bind::Unix(_) => None,
        }
    }

    /// Only this machine reaches it.
    pub fn is_local(&self) -> bool {
        self.address().is_none_or(|a| a.ip().is_loopback())
    }
}

/// As it is written in gateway.toml.
impl std::fmt::Display for Bind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Bind::Address(address) => address.fmt(f),
            Bind::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Listener {
    pub bind: Bind,
    /// The same place in the other address family (`localhost` is 127.0.0.1 and ::1): bound too where the host has it,
    /// and no fault where it has not.
    pub bind_also: Option<SocketAddr>,
    /// Whether clients without a user may connect here: by default on loopback and Unix sockets only.
    pub allow_anonymous: bool,
    pub tls: Option<ServerTls>,
    /// MQTT over WebSocket, at `/` and `/mqtt`.
    pub websocket: bool,
    /// Pages of other sites that may connect by WebSocket (`origins`), where the listener asks for no password.
    pub origins: Vec<String>,
    /// Each connection begins with a PROXY protocol header, version 2, that says where it comes from.
    pub proxy_protocol: bool,
    /// A PUBLISH (or any other packet) above this size is refused; 1 MiB by default.
    pub packet_bytes_max: u32,
    /// Further clients are turned away; 10,000 by default.
    pub connections_max: u32,
    /// The longest keep-alive in seconds that an MQTT 5 client may have here; it is told it instead of its own.
    pub keep_alive_max_s: Option<u16>,
    pub subscribe_refusal: SubscribeRefusal,
}

/// What an MQTT 5 client is told whose SUBSCRIBE the rules refuse (3.1.1 has one answer for all, 0x80).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SubscribeRefusal {
    /// 0x87.
    NotAuthorized,
    /// 0x80: "the server does not wish to reveal the reason".
    Unspecified,
}

/// `[broker]`: what holds for all clients.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerSettings {
    pub refused_publish: RefusedPublish,
    /// How often `$SYS` topics are made (`sys_interval`, 10 s by default); zero: never.
    pub sys_interval: Duration,
    /// Beyond it an address waits (`failed_logins_per_minute`, 10 by default); zero: without limit.
    pub failed_logins_per_minute: u32,
}

impl Default for BrokerSettings {
    fn default() -> Self {
        BrokerSettings {
            refused_publish: RefusedPublish::Acknowledge,
            sys_interval: Duration::from_secs(10),
            failed_logins_per_minute: 10,
        }
    }
}

impl Listener {
    /// "mqtts://127.0.0.1:8883"; a Unix socket is "unix:/run/…" whatever is spoken there.
    pub fn url(&self) -> String {
        let scheme = match (self.websocket, self.tls.is_some()) {
            (false, false) => "mqtt",
            (false, true) => "mqtts",
            (true, false) => "ws",
            (true, true) => "wss",
        };
        match &self.bind {
            Bind::Address(address) => format!("{scheme}://{address}"),
            Bind::Unix(_) => self.bind.to_string(),
        }
    }
}

/// What a client of MQTT 3.1.1, which cannot be told, gets for a PUBLISH that the rules refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusedPublish {
    Acknowledge,
    Disconnect,
}

/// `tls = { cert = "…", key = "…", client_ca = "…", client_cert = "required", client_identity = "cn" }`
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTls {
    pub files: server::Files,
    /// Which name in a client's certificate is its user; None: it says its user as everywhere else.
    pub identity: Option<NameKind>,
}

/// What a client may do: `deny_…` wins over the allowing lists.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Access {
    pub publish: Vec<Pattern>,
    pub subscribe: Vec<Pattern>,
    pub deny_publish: Vec<Pattern>,
    pub deny_subscribe: Vec<Pattern>,
}

/// How much the clients of a user may; None: without a limit of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClientLimits {
    /// Of all its clients together (`max_connections`); the others hold for each of them.
    pub connections: Option<u32>,
    pub messages_per_second: Option<u32>,
    pub bytes_per_second: Option<u64>,
    pub subscriptions: Option<u32>,
    pub queued_bytes: Option<u64>,
}

/// Clients without a user.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Anonymous {
    pub access: Access,
    pub limits: ClientLimits,
}

#[derive(Debug, Clone, PartialEq)]
pub struct User {
    pub name: String,
    /// A PHC string, `$argon2id$…`; None: only a client certificate makes a client this user.
    pub password_hash: Option<Secret>,
    pub access: Access,
    pub limits: ClientLimits,
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

#[derive(Debug, Clone, PartialEq)]
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

#[derive(Debug, Clone, PartialEq)]
pub struct Uplink {
    pub name: String,
    pub kind: UplinkKind,
}

#[derive(Debug, Clone, PartialEq)]
pub enum UplinkKind {
    File(FileUplink),
    Mqtt(Box<MqttUplink>),
}

#[derive(Debug, Clone, PartialEq)]
pub struct FileUplink {
    pub path: PathBuf,
    /// The current file is rotated when it reaches this size (`max_bytes`, 16 MiB by default) …
    pub bytes_max: u64,
    /// … and this many rotated files are kept (`keep`, 4 by default): archive.jsonl.1 is the newest of them.
    pub keep: u32,
}

#[derive(Debug, Clone, PartialEq)]
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
    /// Some where the transport is `Tls` or `Wss`, and only there.
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

#[derive(Debug, Clone, PartialEq)]
pub struct Connector {
    pub name: String,
    pub kind: ConnectorKind,
    /// A command that waited longer than this is refused, not executed (`command_max_age`, 60 s by default).
    pub command_age_max: Duration,
    /// While this uplink is not connected for longer than `safe_after`, outputs are in their safe state.
    pub safe_uplink: Option<SafeUplink>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SafeUplink {
    pub name: String,
    pub after: Duration,
}

/// What a kind of connector needs to know of its line.
#[derive(Debug, Clone, PartialEq)]
pub enum ConnectorKind {
    Simulator,
    Gpio(gpio::GpioChip),
    I2c(buses::I2cBus),
    Spi(buses::SpiBus),
    Pwm(buses::PwmChip),
    Modbus(Box<ModbusLine>),
}

#[derive(Debug, Clone, PartialEq)]
pub struct Asset {
    pub name: String,
    /// `data/{name}`
    pub topic: Topic,
    pub connector: String,
    /// The period of the points that have none of their own.
    pub every: Duration,
    /// Without news a poll group is published anyway after this long (`max_silence`, 60 s by default).
    pub silence_max: Duration,
    /// Points without a deadband are news where they change, not at every poll (`report = "change"`).
    pub on_change: bool,
    pub payload: Payload,
    /// What the connector's kind needs to know of the device.
    pub device: Device,
    /// Shared: thousands of points are in the configuration, in the connector's setup and in its engine.
    pub points: Arc<[Point]>,
}

/// The shape of an asset's messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Payload {
    /// `{"temperature":{"value":21.5,"ts":"…","q":"good"}}`
    Values,
    /// Azure IoT Operations: `{"temperature":{"SourceTimestamp":"…","Value":21.5}}`, with a StatusCode unless good.
    Aio,
}

/// What the connector's kind needs to know of an asset's device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Device {
    Simulator,
    /// A chip of lines or of PWM channels.
    Pins,
    I2c(buses::I2cDevice),
    Mcp3008,
    Modbus {
        unit: u8,
    },
}

#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    pub name: String,
    pub address: Address,
    pub data: DataType,
    pub unit: Option<String>,
    /// Published value = raw value × scale + offset.
    pub scale: f64,
    pub offset: f64,
    /// A change smaller than this since the last published value is no reason to publish.
    pub deadband: Option<f64>,
    /// Its own period; points of an asset with the same period are a poll group: read together, published in one message.
    pub every: Duration,
    /// Some where commands may write it.
    pub writable: Option<Limits>,
}

/// What commands may write, in the published unit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Limits {
    pub min: Option<f64>,
    pub max: Option<f64>,
    /// The point is read again after the write, and the command failed where the value is another one.
    pub read_back: bool,
}

impl Limits {
    pub const NONE: Limits = Limits {
        min: None,
        max: None,
        read_back: false,
    };
}

/// Where a point is, in the words of the connector's kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Simulator(Signal),
    Modbus(ModbusAddress),
    Gpio(gpio::GpioPoint),
    I2c(buses::I2cPoint),
    /// An input of a converter on SPI.
    Channel(u8),
    Pwm(buses::PwmPoint),
}

impl Address {
    /// What exists to be written needs no `writable = true`.
    fn is_output(&self) -> bool {
        match self {
            Address::Gpio(point) => matches!(point.role, gpio::Role::Output { .. }),
            Address::Pwm(_) => true,
            Address::Simulator(_) | Address::Modbus(_) | Address::I2c(_) | Address::Channel(_) => false,
        }
    }
}

/// The type of a value as the machine holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataType {
    Bool,
    Int8,
    Int16,
    Int32,
    Int64,
    Uint8,
    Uint16,
    Uint32,
    Uint64,
    Float32,
    Float64,
    /// UTF-8 of at most so many bytes.
    Text {
        bytes: u16,
    },
}

impl DataType {
    /// Names of the types in gateway.toml; the length of a text is a key of its own.
    pub const NAMES: [(&str, DataType); 12] = [
        ("bool", DataType::Bool),
        ("int8", DataType::Int8),
        ("int16", DataType::Int16),
        ("int32", DataType::Int32),
        ("int64", DataType::Int64),
        ("uint8", DataType::Uint8),
        ("uint16", DataType::Uint16),
        ("uint32", DataType::Uint32),
        ("uint64", DataType::Uint64),
        ("float32", DataType::Float32),
        ("float64", DataType::Float64),
        ("text", DataType::Text { bytes: 0 }),
    ];

    /// Of an integer type.
    pub fn range(self) -> Option<(i128, i128)> {
        Some(match self {
            DataType::Int8 => (i8::MIN.into(), i8::MAX.into()),
            DataType::Int16 => (i16::MIN.into(), i16::MAX.into()),
            DataType::Int32 => (i32::MIN.into(), i32::MAX.into()),
            DataType::Int64 => (i64::MIN.into(), i64::MAX.into()),
            DataType::Uint8 => (0, u8::MAX.into()),
            DataType::Uint16 => (0, u16::MAX.into()),
            DataType::Uint32 => (0, u32::MAX.into()),
            DataType::Uint64 => (0, u64::MAX.into()),
            DataType::Bool | DataType::Float32 | DataType::Float64 | DataType::Text { .. } => return None,
        })
    }

    pub fn is_number(self) -> bool {
        !matches!(self, DataType::Bool | DataType::Text { .. })
    }

    pub fn name(self) -> &'static str {
        DataType::NAMES
            .iter()
            .find(|(_, d)| std::mem::discriminant(d) == std::mem::discriminant(&self))
            .map_or("", |(name, _)| name)
    }
}

/// The signals of the simulated boiler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    Temperature,
    Pressure,
    Valve,
    Burner,
    Fault,
    /// The temperature at which the burner goes on; can be written.
    Setpoint,
}

impl Signal {
    pub const NAMES: [(&str, Signal); 6] = [
        ("temperature", Signal::Temperature),
        ("pressure", Signal::Pressure),
        ("valve", Signal::Valve),
        ("burner", Signal::Burner),
        ("fault", Signal::Fault),
        ("setpoint", Signal::Setpoint),
    ];

    pub fn data(self) -> DataType {
        match self {
            Signal::Temperature | Signal::Pressure | Signal::Setpoint => DataType::Float64,
            Signal::Valve | Signal::Burner | Signal::Fault => DataType::Bool,
        }
    }

    /// The valve can be held open, the setpoint moved.
    pub fn is_writable(self) -> bool {
        matches!(self, Signal::Valve | Signal::Setpoint)
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder of its own for a test, gone afterwards.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("tidegate-config-{}-{name}", std::process::id()));
            std::fs::create_dir_all(&path).expect("a temporary folder");
            Folder(path)
        }

        fn write(&self, name: &str, content: &[u8]) -> PathBuf {
            let path = self.0.join(name);
            std::fs::write(&path, content).expect("writable");
            path
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn valid(text: &str) -> Config {
        let path = Path::new("/etc/tidegate/gateway.toml");
        match parse(text, path, &|_| None) {
            Ok(config) => config,
            Err(faults) => panic!("{}", Faults::new(path, text, faults)),
        }
    }

    fn mqtt(config: &Config, index: usize) -> &MqttUplink {
        match &config.uplinks[index].kind {
            UplinkKind::Mqtt(mqtt) => mqtt,
            UplinkKind::File(_) => panic!("a file uplink"),
        }
    }

    #[test]
    fn defaults_are_filled_in() {
        let config = valid(
            "[gateway]\nname = 'g'\n[[listener]]\nbind = '127.0.0.1:1883'\n\
             [[uplink]]\nname = 'c'\nkind = 'mqtt'\nurl = 'mqtts://b'\n\
             [[uplink]]\nname = 'f'\nkind = 'file'\npath = 'a.jsonl'\n\
             [[route]]\nfrom = ['{gateway}/#']\nto = 'c'\n",
        );
        assert_eq!(config.path, Path::new("/etc/tidegate/gateway.toml"));
        assert_eq!(config.gateway.data_dir, Path::new("/etc/tidegate/data"));
        assert_eq!(config.modules.dir, Path::new("/etc/tidegate/modules.d"));
        let listener = &config.listeners[0];
        assert_eq!((listener.packet_bytes_max, listener.connections_max), (1 << 20, 10_000));
        assert!(listener.allow_anonymous && listener.bind_also.is_none());
        assert_eq!(config.anonymous.access.publish[0].to_string(), "#");
        assert_eq!(config.streams.len(), 1);
        assert_eq!(
            (config.streams[0].name.as_str(), config.streams[0].bytes_max),
            ("default", 1 << 30)
        );
        let mqtt = mqtt(&config, 0);
        assert_eq!(
            (mqtt.host.as_str(), mqtt.port, mqtt.client_id.as_str()),
            ("b", 8883, "tidegate-g-c")
        );
        assert_eq!(
            (mqtt.version, mqtt.window, mqtt.packet_bytes_max),
            (MqttVersion::V5, 100, None)
        );
        assert_eq!(
            (mqtt.keep_alive, mqtt.ack_timeout),
            (Duration::from_secs(60), Duration::from_secs(30))
        );
        assert_eq!(mqtt.tls, Some(ClientTls::default()));
        match &config.uplinks[1].kind {
            UplinkKind::File(file) => {
                assert_eq!(file.path, Path::new("/etc/tidegate/a.jsonl"));
                assert_eq!((file.bytes_max, file.keep), (16 << 20, 4));
            }
            UplinkKind::Mqtt(_) => panic!("an mqtt uplink"),
        }
        assert_eq!(config.routes_up[0].from[0].as_str(), "g/#");
        assert_eq!(config.routes_up[0].topic, Template::whole_topic());
    }

    #[test]
    fn what_is_typed_arrives() {
        let text = include_str!("golden/valid_full.toml");
        let path = Path::new("/etc/tidegate/gateway.toml");
        let config = parse(text, path, &|name| (name == "SET").then(|| " spaces kept ".to_owned())).expect("valid");
        let listener = &config.listeners[0];
        assert_eq!(listener.bind.to_string(), "127.0.0.1:1883");
        assert_eq!(listener.bind_also.map(|a| a.to_string()).as_deref(), Some("[::1]:1883"));
        assert!(listener.allow_anonymous && !config.listeners[1].allow_anonymous);
        let tls = config.listeners[2].tls.as_ref().expect("TLS");
        assert_eq!(tls.identity, Some(NameKind::SanUri));
        assert_eq!(tls.files.key, Path::new("/etc/tidegate/server.key"));
        assert!(tls.files.client_cert_is_optional && tls.files.client_ca.is_some());
        assert!(config.listeners[2].proxy_protocol && !config.listeners[2].allow_anonymous);
        assert_eq!(config.listeners[2].url(), "mqtts://0.0.0.0:8883");
        let unix = &config.listeners[3];
        assert_eq!(unix.bind.to_string(), "unix:/etc/tidegate/run/mqtt.sock");
        assert!(unix.websocket && unix.allow_anonymous && unix.origins == ["https://dash.example"]);
        assert!(config.users[0].password_hash.is_some() && config.users[1].password_hash.is_none());
        assert_eq!(
            (
                config.listeners[1].packet_bytes_max,
                config.listeners[1].connections_max
            ),
            (256 << 10, 500)
        );
        assert_eq!(config.anonymous.access.deny_publish[0].to_string(), "commands/#");
        assert_eq!(config.users[0].access.subscribe[0].to_string(), "commands/press-7/#");
        assert_eq!(config.streams[0].when_full, WhenFull::Reject);
        assert_eq!(config.streams[1].age_max, Some(Duration::from_secs(30 * 86_400)));
        let module = &config.modules.settings["average"];
        let expected = serde_json::json!({
            "window": "10 s", "limit": 2.5, "since": "2026-11-24T23:40:03Z", "list": [1, true]
        });
        assert_eq!(module.config, expected);
        assert_eq!(
            (module.memory_bytes_max, module.deadline),
            (16 << 20, Duration::from_millis(50))
        );
        let mqtt = mqtt(&config, 0);
        assert_eq!(mqtt.version, MqttVersion::V311);
        assert_eq!(mqtt.password.as_ref().map(Secret::reveal), Some(" spaces kept "));
        assert_eq!(mqtt.packet_bytes_max, Some(128_000));
        assert_eq!(
            mqtt.tls.as_ref().and_then(|t| t.ca.clone()),
            Some(PathBuf::from("/etc/tidegate/ca.pem"))
        );
        assert_eq!(config.routes_down[0].from[0].as_str(), "plants/line-4/commands/#");
        assert_eq!(config.assets[0].topic.as_str(), "data/line-4/boiler");
        assert_eq!(config.assets[0].points[1].address, Address::Simulator(Signal::Valve));
        assert!(!format!("{config:?}").contains("spaces kept"), "Debug shows a secret");
    }

    #[test]
    fn a_last_stream_takes_what_is_left() {
        let stream = |name: &str, filter: &str| format!("[[stream]]\nname = '{name}'\nfilter = ['{filter}']\n");
        let names = |text: String| {
            let config = valid(&format!("[gateway]\nname = 'g'\n{text}"));
            config.streams.iter().map(|s| s.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(stream("a", "a/#")), ["a", "default"]);
        assert_eq!(names(stream("default", "a/#")), ["default", "rest"]);
        assert_eq!(names(stream("a", "a/#") + &stream("all", "#")), ["a", "all"]);
    }

    #[test]
    fn a_secret_file_loses_one_newline_and_keeps_its_spaces() {
        let folder = Folder::new("secrets");
        let credentials = folder.0.to_string_lossy().into_owned();
        let cases: [(&[u8], &str); 5] = [
            (b"hunter 2", "hunter 2"),
            (b"hunter 2\n", "hunter 2"),
            (b"hunter 2\r\n", "hunter 2"),
            (b" hunter 2 \n\n", " hunter 2 \n"),
            (b"x\r", "x\r"),
        ];
        for (content, expected) in cases {
            folder.write("p", content);
            for source in ["file", "credential"] {
                let text = format!(
                    "[gateway]\nname = 'g'\n[[uplink]]\nname = 'c'\nkind = 'mqtt'\nurl = 'mqtt://b'\n\
                     password = {{ {source} = 'p' }}\n"
                );
                let env = |name: &str| (name == "CREDENTIALS_DIRECTORY").then(|| credentials.clone());
                let config = parse(&text, &folder.0.join("gateway.toml"), &env).expect("valid");
                assert_eq!(
                    mqtt(&config, 0).password.as_ref().map(Secret::reveal),
                    Some(expected),
                    "{content:?}"
                );
            }
        }
        for (content, expected) in [
            (&b"\n"[..], "is empty"),
            (&b"\xff\xfe"[..], "not UTF-8"),
            (&[b'x'; 70_000], "64 KiB"),
        ] {
            folder.write("p", content);
            let text = "[gateway]\nname = 'g'\n[[uplink]]\nname = 'c'\nkind = 'mqtt'\nurl = 'mqtt://b'\n\
                        password = { file = 'p' }\n";
            let faults = parse(text, &folder.0.join("gateway.toml"), &|_| None).expect_err(expected);
            assert!(faults.len() == 1 && faults[0].message.contains(expected), "{faults:?}");
        }
    }

    #[test]
    fn a_file_that_is_no_text_is_one_clear_fault() {
        let folder = Folder::new("load");
        let said = |path: &Path| load(path).map(|_| ()).expect_err("a fault").to_string();
        assert!(said(&folder.0.join("none.toml")).contains("there is no such file\nhint: `tidegate init`"));
        assert!(said(&folder.0).contains("is a folder, not a file"));
        let path = folder.write("gateway.toml", b"[gateway]\nname = \"\xff\"\n");
        assert!(said(&path).contains("is not UTF-8 text (line 2)"));
        let path = folder.write("gateway.toml", &vec![b'#'; 5 << 20]);
        assert!(said(&path).contains("larger than 4 MiB"));
    }

    #[test]
    fn a_secret_in_a_file_that_all_can_read_is_a_warning() {
        use std::os::unix::fs::PermissionsExt;
        let folder = Folder::new("modes");
        let text = "[gateway]\nname = 'g'\n[[listener]]\nbind = '127.0.0.1:0'\n[[uplink]]\nname = 'c'\n\
                    kind = 'mqtt'\nurl = 'mqtt://b'\npassword = 'hunter2'\n";
        let path = folder.write("gateway.toml", text.as_bytes());
        for (mode, warnings) in [(0o644, 1), (0o640, 0)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).expect("own file");
            let config = load(&path).expect("valid");
            assert_eq!(config.warnings.len(), warnings, "{mode:o}: {:?}", config.warnings);
            assert!(!config.warnings.concat().contains("hunter2"));
        }
    }

    #[test]
    fn windows_line_ends_and_a_byte_order_mark_are_no_faults() {
        let config = valid("\u{feff}[gateway]\r\nname = 'g'\r\n");
        assert_eq!(config.gateway.name, "g");
    }
}
