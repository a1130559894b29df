//! The reference of gateway.toml, and the test that holds it against the checker: `docs/reference.md` and
//! `man/gateway.toml.5` are made of [`ROWS`], of what the checker asks for while it reads [`samples`], and of nothing else.
//!
//! Whoever adds a key adds a row here; the test says which one is missing, one too many or wrong. Types and ranges are
//! those that the checker was seen to ask for; a default is parsed beside a file without the key, and both must be the
//! same configuration; an example must be valid. A new kind of uplink or connector adds a sample.
//! `TIDEGATE_GOLDEN=write cargo test --lib reference` writes the documents anew.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use super::read::asked;
use super::{Config, Fault, Faults, parse};

/// What a key is without being typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Without {
    Required,
    /// As if this stood there.
    Default(&'static str),
    /// In words, where no value says it.
    Said(&'static str),
}
use Without::{Default, Required, Said};

struct Row {
    /// Where a key is another thing in other kinds: those that this row is of. Empty: all that have the key.
    kinds: &'static [&'static str],
    section: &'static str,
    key: &'static str,
    without: Without,
    example: &'static str,
    text: &'static str,
}

const fn row(
    section: &'static str,
    key: &'static str,
    without: Without,
    example: &'static str,
    text: &'static str,
) -> Row {
    of(&[], section, key, without, example, text)
}

const fn of(
    kinds: &'static [&'static str],
    section: &'static str,
    key: &'static str,
    without: Without,
    example: &'static str,
    text: &'static str,
) -> Row {
    Row {
        kinds,
        section,
        key,
        without,
        example,
        text,
    }
}

impl Row {
    fn is_of(&self, section: &str, key: &str, kind: &str) -> bool {
        self.section == section && self.key == key && (self.kinds.is_empty() || self.kinds.contains(&kind))
    }
}

const TLS: &str = "tls of [[uplink]]";
const SERVER_TLS: &str = "tls of [[listener]]";
const MODBUS: &[&str] = &["modbus-tcp", "modbus-rtu", "modbus-rtu-tcp"];
const POINT: &str = "a point of [[asset]]";

/// The sections in the order of the document, and what each is.
const SECTIONS: &[(&str, &str)] = &[
    ("[gateway]", "The gateway itself. Once."),
    ("[broker]", "What holds for all MQTT clients. Once."),
    ("[[listener]]", "Where MQTT clients connect."),
    (
        SERVER_TLS,
        "Who the gateway is to its clients (mqtts, wss), and which certificates it asks them for. A file may also be \
         { credential = \"…\" }. The files are looked at every few seconds; a new pair is for whoever connects from then on.",
    ),
    (
        "[anonymous]",
        "What clients without a user may do. Once; without it they may do everything. {client_id} in a filter stands for the \
         client's own, as in [[user]].",
    ),
    (
        "[[user]]",
        "A client with a name and a password. Without publish and subscribe it may do neither. In the filters {user} and \
         {client_id} stand for the client's own; where a rule names {client_id}, a client whose id has /, + or # in it, or $ at \
         its beginning, is refused. max_connections holds for the clients of the user together, the other limits for each \
         of them; what is above a limit when it changes stays until it goes by itself.",
    ),
    (
        "[[stream]]",
        "A part of the durable log with limits of its own. A message enters the first stream that matches its topic; \
         without any there is one named \"default\" that takes all.",
    ),
    ("[modules]", "Where WebAssembly modules are dropped. Once."),
    (
        "[[module]]",
        "Settings of one module. Without it a module runs with the defaults.",
    ),
    ("[[uplink]]", "A way out. What a kind alone has says so."),
    (
        TLS,
        "How the remote of a mqtts:// or wss:// url is known, and what the gateway shows it.",
    ),
    (
        "[[route]]",
        "Which messages go where: up (from, to) or down (from_uplink, from).",
    ),
    ("[[connector]]", "A line to machines. What a kind alone has says so."),
    (
        "[[asset]]",
        "A machine on a connector: what is read from it, how often, and how it is published.",
    ),
    (
        POINT,
        "One value of an asset: an entry of points, or a row of the points_file, whose columns are these keys.",
    ),
    ("[metrics]", "Metrics for Prometheus. Once; without it there are none."),
];

/// Keys that are read to refuse them with a reason; by those kinds only, where a kind is named.
const REFUSED: &[(&str, &str, &str)] = &[("[[asset]]", "unit_id", "simulator")];

/// What keys take whose values are looked at by hand.
const BY_HAND: &[(&str, &str)] = &[
    ("points", "list of tables"),
    ("tls", "table"),
    ("config", "table"),
    ("bus", "integer, or /dev/i2c-N"),
    ("address", "text, or integer"),
    ("write_function", "5, 6, 15, 16, 22, 23 or \"read-modify-write\""),
];

#[rustfmt::skip] // A row a line: those who add keys at the same time do not meet.
const ROWS: &[Row] = &[
    row("[gateway]", "name", Required, "\"line-4\"", "Its name; {gateway} in topics."),
    row("[gateway]", "data_dir", Default("\"data\""), "\"/var/lib/tidegate\"", "Where everything is kept that must survive: the log, sessions, retained messages, and the admin socket."),
    row("[gateway]", "revert_after", Default("\"30 s\""), "\"2 min\"", "A reload whose listener or uplink is not up by then is taken back; 0 s: never."),
    row("[broker]", "refused_publish", Default("\"acknowledge\""), "\"disconnect\"", "What a client before MQTT 5, which cannot be told, gets for a message that it may not publish: an acknowledgement, and the message is dropped; or the end of its connection. MQTT 5 is told 0x87."),
    row("[broker]", "sys_interval", Default("\"10 s\""), "\"1 min\"", "How often $SYS topics are renewed, 1 s to 1 h; 0 s: there are none."),
    row("[broker]", "failed_logins_per_minute", Default("10"), "3", "How many wrong passwords an address (IPv6: a /64) may send; beyond it the address is refused with 0x9F, before MQTT 5 with 0x03, until a minute's share has come back. 0: without limit."),
    row("[[listener]]", "bind", Required, "\"127.0.0.1:1883\"", "An IP address and a port; \"localhost:1883\" is IPv4 and IPv6; \"unix:/run/tidegate/mqtt.sock\" is a Unix socket of mode 0660."),
    row("[[listener]]", "allow_anonymous", Said("true on loopback and Unix sockets, else false"), "true", "Whether clients without a user may connect here."),
    row("[[listener]]", "tls", Said("none"), "{ cert = \"server.pem\", key = \"server.key\" }", "TLS 1.2 and 1.3."),
    row("[[listener]]", "websocket", Default("false"), "true", "MQTT over WebSocket, at / and /mqtt, subprotocol mqtt."),
    row("[[listener]]", "origins", Default("[]"), "[\"https://dash.example\"]", "Web pages from elsewhere that may connect where no password is asked for; one from the gateway's own address always may."),
    row("[[listener]]", "proxy_protocol", Default("false"), "true", "Each connection begins with a PROXY protocol header, version 2, and others are refused; only the proxy may reach such a port."),
    row("[[listener]]", "max_packet", Default("\"1 MiB\""), "\"256 KiB\"", "A larger packet is refused."),
    row("[[listener]]", "max_connections", Default("10000"), "500", "Further clients are turned away."),
    row("[[listener]]", "max_keep_alive", Said("none"), "\"60 s\"", "The longest keep-alive: an MQTT 5 client that asks for more, or for none, is told this one. Older ones cannot be told and keep their own."),
    row("[[listener]]", "subscribe_refusal", Default("\"not-authorized\""), "\"unspecified\"", "What an MQTT 5 client is told whose SUBSCRIBE its rules refuse: 0x87, or 0x80, which tells nothing. Older ones always get 0x80."),
    row(SERVER_TLS, "cert", Required, "\"server.pem\"", "PEM; the certificate, then those between it and its authority."),
    row(SERVER_TLS, "key", Required, "\"server.key\"", "PEM, without a passphrase."),
    row(SERVER_TLS, "client_ca", Said("clients show none"), "\"clients-ca.pem\"", "PEM; the authorities that client certificates are from."),
    row(SERVER_TLS, "client_cert", Default("\"required\""), "\"optional\"", "Whether a client without a certificate is refused."),
    row(SERVER_TLS, "client_identity", Default("\"none\""), "\"cn\"", "What of its certificate is the client's user, instead of name and password: cn (the subject's), san-dns or san-uri (the first of them). There must be such a [[user]]."),
    row("[anonymous]", "publish", Default("[\"#\"]"), "[\"sensors/#\"]", "Topics that they may publish to."),
    row("[anonymous]", "subscribe", Default("[\"#\"]"), "[\"sensors/#\"]", "Topics that they may subscribe to."),
    row("[anonymous]", "deny_publish", Default("[]"), "[\"commands/#\"]", "Topics that they may not publish to; wins over publish."),
    row("[anonymous]", "deny_subscribe", Default("[]"), "[\"secret/#\"]", "Topics that they may not subscribe to; wins over subscribe."),
    row("[anonymous]", "max_connections", Said("none"), "20", "Further clients without a user are refused with 0x97, before MQTT 5 with 0x03."),
    row("[anonymous]", "max_messages_per_second", Said("none"), "100", "What a client may publish; above it the client is read from more slowly, and nothing is lost."),
    row("[anonymous]", "max_bytes_per_second", Said("none"), "\"64 KiB\"", "What a client may send; above it the client is read from more slowly, and nothing is lost."),
    row("[anonymous]", "max_subscriptions", Said("none"), "50", "Further subscriptions of a client are refused with 0x97, before MQTT 5 with 0x80."),
    row("[anonymous]", "max_queued_bytes", Said("none"), "\"10 MiB\"", "What waits for a client; beyond it the oldest go, and are written down as lost (without a durable session: the newest, and 1 MiB at most)."),
    row("[[user]]", "name", Required, "\"press-7\"", "The MQTT user name."),
    row("[[user]]", "password_hash", Said("required, unless client certificates name users"), "\"$argon2id$v=19$m=7168,t=5,p=1$c29tZXNhbHQxMjM0NTY3OA$1Rm3CmVYTC0zX7IyqBbqpnQ9VqK9kJYUMPYWbcWbqMc\"", "Made by tidegate passwd."),
    row("[[user]]", "publish", Default("[]"), "[\"sensors/{user}/#\"]", "Topics that it may publish to."),
    row("[[user]]", "subscribe", Default("[]"), "[\"commands/press-7/#\"]", "Topics that it may subscribe to."),
    row("[[user]]", "deny_publish", Default("[]"), "[\"sensors/press-7/raw\"]", "Topics that it may not publish to; wins over publish."),
    row("[[user]]", "deny_subscribe", Default("[]"), "[\"commands/press-7/x\"]", "Topics that it may not subscribe to; wins over subscribe."),
    row("[[user]]", "max_connections", Said("none"), "20", "Further clients of it are refused with 0x97, before MQTT 5 with 0x03."),
    row("[[user]]", "max_messages_per_second", Said("none"), "100", "What a client may publish; above it the client is read from more slowly, and nothing is lost."),
    row("[[user]]", "max_bytes_per_second", Said("none"), "\"64 KiB\"", "What a client may send; above it the client is read from more slowly, and nothing is lost."),
    row("[[user]]", "max_subscriptions", Said("none"), "50", "Further subscriptions of a client are refused with 0x97, before MQTT 5 with 0x80."),
    row("[[user]]", "max_queued_bytes", Said("none"), "\"10 MiB\"", "What waits for a client; beyond it the oldest go, and are written down as lost (without a durable session: the newest, and 1 MiB at most)."),
    row("[[stream]]", "name", Required, "\"alarms\"", "Its name."),
    row("[[stream]]", "filter", Required, "[\"alarms/#\"]", "Which topics it takes."),
    row("[[stream]]", "max_bytes", Default("\"1 GiB\""), "\"100 MiB\"", "How much is kept at most."),
    row("[[stream]]", "max_age", Said("without end"), "\"30 days\"", "How long a message is kept at most."),
    row("[[stream]]", "when_full", Default("\"drop-oldest\""), "\"reject\"", "The oldest go, and are written down as lost; or new ones are refused, and the publisher is told."),
    row("[modules]", "dir", Default("\"modules.d\""), "\"modules.d\"", "The folder: a .wasm file in it runs, is swapped when it changes, and stops when it goes."),
    row("[[module]]", "name", Required, "\"average\"", "The file's name without .wasm."),
    row("[[module]]", "subscribe", Said("what the module asks for"), "[\"data/boiler\"]", "The topics that it gets, instead of what it asks for."),
    row("[[module]]", "publish", Said("what the module declares"), "[\"derived/#\"]", "The topics that it may publish to."),
    row("[[module]]", "config", Default("{}"), "{ window = \"10 s\" }", "Handed to the module as JSON."),
    row("[[module]]", "memory", Default("\"16 MiB\""), "\"32 MiB\"", "The most memory that it gets."),
    row("[[module]]", "deadline", Default("\"50 ms\""), "\"200 ms\"", "A call that takes longer is ended."),
    row("[[uplink]]", "name", Required, "\"cloud\"", "Its name, for routes and status."),
    row("[[uplink]]", "kind", Required, "\"mqtt\"", "What is at the other end."),
    row("[[uplink]]", "path", Required, "\"data/archive.jsonl\"", "The file: JSON Lines, one message a line."),
    row("[[uplink]]", "max_bytes", Default("\"16 MiB\""), "\"1 MiB\"", "The file is rotated at this size."),
    row("[[uplink]]", "keep", Default("4"), "10", "How many rotated files are kept."),
    row("[[uplink]]", "url", Required, "\"mqtts://broker.example:8883\"", "The broker: mqtt://, mqtts://, ws:// or wss://, a host, and a port where it is not 1883, 8883, 80 or 443."),
    row("[[uplink]]", "version", Default("\"5\""), "\"3.1.1\"", "The version of MQTT."),
    row("[[uplink]]", "client_id", Said("tidegate-GATEWAY-UPLINK"), "\"line-4\"", "The client id at the remote."),
    row("[[uplink]]", "username", Said("none"), "\"line-4\"", "The user name at the remote."),
    row("[[uplink]]", "password", Said("none"), "{ file = \"cloud.password\" }", "The password; better from a file, an environment variable (env) or a systemd credential (credential) than typed here."),
    row("[[uplink]]", "keep_alive", Default("\"60 s\""), "\"30 s\"", "MQTT's keep-alive; 0 s is none, less than 5 s is refused."),
    row("[[uplink]]", "window", Default("100"), "50", "Messages sent and not yet acknowledged."),
    row("[[uplink]]", "max_packet", Said("what the remote says"), "\"128 KiB\"", "The largest packet that the remote takes."),
    row("[[uplink]]", "ack_timeout", Default("\"30 s\""), "\"1 min\"", "Without an acknowledgement for so long the connection is made anew."),
    row("[[uplink]]", "tls", Said("the system's authorities, no client certificate"), "{ ca = \"ca.pem\" }", "See below; its files are read at each connect."),
    row(TLS, "ca", Said("the system's authorities"), "\"ca.pem\"", "Whom to trust: PEM."),
    row(TLS, "cert", Said("none"), "\"client.pem\"", "The gateway's own certificate with its chain: PEM."),
    row(TLS, "key", Said("none"), "\"client.key\"", "Its private key: PEM."),
    row(TLS, "server_name", Said("the url's host"), "\"broker.example\"", "The name that the remote's certificate must have."),
    row("[[route]]", "from", Required, "[\"data/#\"]", "Which topics; {gateway} is filled in."),
    row("[[route]]", "to", Said("from_uplink instead"), "\"cloud\"", "The uplink that they go to."),
    row("[[route]]", "from_uplink", Said("to instead"), "\"cloud\"", "The uplink that they come from."),
    row("[[route]]", "topic", Default("\"{topic}\""), "\"plants/{gateway}/{topic}\"", "The topic at the other end: {gateway}, {topic} (the whole topic), {rest} (what the # matched)."),
    row("[[connector]]", "name", Required, "\"boiler-line\"", "Its name, for assets and status."),
    row("[[connector]]", "kind", Required, "\"simulator\"", "How it speaks to machines."),
    row("[[connector]]", "command_max_age", Default("\"60 s\""), "\"10 s\"", "A command that waited longer is refused."),
    row("[[connector]]", "safe_uplink", Said("none"), "\"cloud\"", "While this uplink is lost, outputs are in their safe state."),
    row("[[connector]]", "safe_after", Default("\"10 s\""), "\"30 s\"", "… after it was lost for so long."),
    of(&["modbus-tcp", "modbus-rtu-tcp"], "[[connector]]", "address", Required, "\"192.0.2.10:502\"", "The host of the device or of its gateway and, where it is not 502, the port."),
    row("[[connector]]", "device", Required, "\"/dev/ttyUSB0\"", "The serial line; its name under /dev/serial/by-id stays the same."),
    row("[[connector]]", "baud", Default("19200"), "9600", "Its speed."),
    row("[[connector]]", "parity", Default("\"even\""), "\"none\"", "Its parity."),
    row("[[connector]]", "stop_bits", Default("1"), "2", "Its stop bits."),
    row("[[connector]]", "data_bits", Default("8"), "8", "Modbus RTU knows no other than 8."),
    of(MODBUS, "[[connector]]", "timeout", Default("\"1 s\""), "\"500 ms\"", "For a connection, and for each answer."),
    row("[[connector]]", "quiet", Said("RTU: the time of 3.5 characters; else none"), "\"20 ms\"", "Silence before each request."),
    row("[[connector]]", "max_gap", Default("8"), "0", "Registers or bits that are read for nothing between two points, to save a request."),
    row("[[connector]]", "max_registers", Default("125"), "60", "The most registers of one request."),
    row("[[connector]]", "max_coils", Default("2000"), "800", "The most coils or discrete inputs of one request."),
    of(&["gpio"], "[[connector]]", "chip", Required, "\"gpiochip0\"", "The chip: gpiodetect shows those that there are."),
    of(&["pwm"], "[[connector]]", "chip", Said("the Raspberry Pi's own"), "0", "The N of /sys/class/pwm/pwmchipN."),
    of(&["i2c"], "[[connector]]", "bus", Required, "1", "The N of /dev/i2c-N."),
    of(&["spi"], "[[connector]]", "bus", Required, "0", "The B of /dev/spidevB.S."),
    row("[[connector]]", "select", Default("0"), "1", "The S of /dev/spidevB.S."),
    row("[[connector]]", "speed", Default("1000000"), "1350000", "Bits a second at most."),
    row("[[connector]]", "mode", Default("0"), "3", "The mode of SPI: clock polarity and phase."),
    of(&["i2c", "spi"], "[[connector]]", "timeout", Default("\"1 s\""), "\"500 ms\"", "For a read of an asset, and for a write."),
    row("[[asset]]", "name", Required, "\"boiler\"", "It publishes to data/NAME and takes commands on commands/NAME; levels with / are allowed."),
    row("[[asset]]", "connector", Required, "\"sim\"", "The connector that it is on."),
    row("[[asset]]", "every", Default("\"1 s\""), "\"500 ms\"", "How often its points are read; a point may have its own."),
    row("[[asset]]", "max_silence", Default("\"60 s\""), "\"10 min\"", "With report = \"change\": published anyway after so long."),
    row("[[asset]]", "report", Default("\"always\""), "\"change\"", "Every reading is published, or those in which something changed."),
    row("[[asset]]", "payload", Default("\"values\""), "\"aio\"", "The shape of messages: value, ts and q of each point; or that of Azure IoT Operations."),
    row("[[asset]]", "points", Said("points_file instead"), "[{ name = \"temperature\" }]", "Its points, in place."),
    row("[[asset]]", "points_file", Said("points instead"), "\"boiler.csv\"", "Its points as a table: a first row of keys, then a row a point."),
    of(MODBUS, "[[asset]]", "unit_id", Required, "1", "The unit on the line, also behind a gateway."),
    of(MODBUS, "[[asset]]", "order", Default("\"ABCD\""), "\"CDAB\"", "The order of bytes and words of its points: ABCD is the standard's."),
    of(&["i2c"], "[[asset]]", "sensor", Said("plain registers"), "\"sht3x\"", "The sensor on the bus."),
    of(&["spi"], "[[asset]]", "sensor", Required, "\"mcp3008\"", "The converter on the bus."),
    row("[[asset]]", "device_address", Required, "0x76", "The device on the bus: 7 bits, 0x08 to 0x77."),
    row("[[asset]]", "gain", Default("\"1\""), "\"2/3\"", "Of an ads1115: its amplifier."),
    row("[[asset]]", "data_rate", Default("128"), "8", "Of an ads1115: samples a second."),
    row(POINT, "name", Required, "\"temperature\"", "Its name in the message."),
    row(POINT, "type", Said("by the kind of connector"), "\"float64\"", "What the machine holds."),
    row(POINT, "length", Said("none"), "16", "Bytes of a text, which needs it."),
    of(&["simulator"], POINT, "address", Said("its name"), "\"temperature\"", "The signal of the boiler."),
    of(MODBUS, POINT, "address", Required, "\"holding:0\"", "Table and number from 0: coil, discrete, input, holding; holding:10.3 is a bit, holding:10.4-7 bits; 40001 and the like are understood."),
    row(POINT, "order", Said("the asset's"), "\"CDAB\"", "The order of its bytes and words."),
    row(POINT, "write_function", Said("the simplest that fits"), "16", "The function of Modbus that writes it."),
    of(&["gpio"], POINT, "address", Required, "\"17\"", "The line's number on the chip, or its name."),
    of(&["i2c"], POINT, "address", Said("its name"), "\"temperature\"", "What the sensor measures; of a plain device \"register:0x10\"."),
    of(&["spi", "pwm"], POINT, "address", Required, "\"channel:0\"", "The channel."),
    row(POINT, "direction", Default("\"in\""), "\"out\"", "Whether the line is an input or an output."),
    row(POINT, "active_low", Default("false"), "true", "The physical low is true."),
    row(POINT, "bias", Said("left as it is"), "\"pull-up\"", "The resistor inside the chip."),
    row(POINT, "edge", Said("the level is polled"), "\"both\"", "Edges that are published as they happen."),
    row(POINT, "count", Said("the level is told"), "\"rising\"", "Edges that are counted."),
    row(POINT, "debounce", Said("none"), "\"5 ms\"", "A level counts after so long without a change."),
    of(&["gpio"], POINT, "safe", Default("false"), "true", "The safe state of an output: at the start, at the end and without its safe_uplink."),
    of(&["pwm"], POINT, "safe", Default("0"), "30", "Its safe state, in percent."),
    row(POINT, "byte_order", Default("\"big\""), "\"little\"", "Of a register of several bytes."),
    row(POINT, "frequency", Required, "25000", "In Hz."),
    row(POINT, "inverted", Default("false"), "true", "Low is on."),
    row(POINT, "unit", Said("none"), "\"°C\"", "The unit of the published value."),
    row(POINT, "every", Said("the asset's"), "\"100 ms\"", "How often it is read; points of one period are published together."),
    row(POINT, "scale", Default("1"), "0.1", "Published value = raw value × scale + offset."),
    row(POINT, "offset", Default("0"), "-40", "See scale."),
    row(POINT, "deadband", Said("none"), "0.5", "A smaller change is no reason to publish."),
    row(POINT, "writable", Default("false"), "true", "Whether commands may write it."),
    row(POINT, "min", Said("no limit"), "40", "The least that commands may write, in the published unit."),
    row(POINT, "max", Said("no limit"), "95", "The most that commands may write."),
    row(POINT, "read_back", Default("false"), "true", "Read it after a write; the command failed where it is another value."),
    row("[metrics]", "bind", Required, "\"127.0.0.1:9464\"", "An IP address and a port; GET /metrics there."),
];

/// What an example or a default needs beside itself to be valid, in its own section; of one kind only, where it is named.
const NEEDS: &[(&str, &str, &str, &str)] = &[
    (TLS, "cert", "key = \"client.key\"", ""),
    (TLS, "key", "cert = \"client.pem\"", ""),
    ("[[listener]]", "origins", "websocket = true", ""),
    ("[[connector]]", "safe_after", "safe_uplink = \"cloud\"", ""),
    (POINT, "length", "type = \"text\"", ""),
    (POINT, "min", "writable = true", ""),
    (POINT, "max", "writable = true", ""),
    (POINT, "read_back", "writable = true", ""),
    (POINT, "safe", "direction = \"out\"", "gpio"),
];

/// Examples and defaults that are not tried, and why.
const UNTRIED: &[(&str, &str, &str)] = &[
    ("[[uplink]]", "kind", "the sample is of one kind"),
    ("[[connector]]", "kind", "the sample is of one kind"),
    ("[[uplink]]", "tls", "the sample has it"),
    ("[[listener]]", "tls", "the sample has it"),
    ("[[route]]", "from_uplink", "excludes to"),
    ("[[route]]", "to", "the sample has it by another name"),
    ("[[asset]]", "points", "the sample has it"),
    ("[[asset]]", "points_file", "excludes points"),
    ("[[asset]]", "connector", "the sample has it"),
    (POINT, "length", "the simulator has no texts"),
    (POINT, "address", "is the name's in the sample"),
    (POINT, "count", "needs a number's type"),
    ("[[asset]]", "sensor", "the sample has one"),
];

/// A file of each kind of uplink and of connector, with every section and as few keys as there can be.
fn samples() -> Vec<(&'static str, &'static str, String)> {
    let head = "[gateway]\nname = \"g\"\n[broker]\n[[listener]]\nbind = \"127.0.0.1:1883\"\n\
        [listener.tls]\ncert = \"s.pem\"\nkey = \"s.key\"\nclient_ca = \"ca.pem\"\n[anonymous]\n[[user]]\nname = \"u\"\n\
        password_hash = \"$argon2id$v=19$m=7168,t=5,p=1$c29tZXNhbHQxMjM0NTY3OA$1Rm3CmVYTC0zX7IyqBbqpnQ9VqK9kJYUMPYWbcWbqMc\"\n\
        [[stream]]\nname = \"s\"\nfilter = [\"#\"]\n[modules]\n[[module]]\nname = \"m\"\n[metrics]\nbind = \"127.0.0.1:9464\"\n\
        [[route]]\nto = \"cloud\"\nfrom = [\"#\"]\n";
    let file = "[[uplink]]\nname = \"cloud\"\nkind = \"file\"\npath = \"x.jsonl\"\n";
    let mqtt = "[[uplink]]\nname = \"cloud\"\nkind = \"mqtt\"\nurl = \"mqtts://h\"\ntls = { }\n";
    let simulator = "[[connector]]\nname = \"sim\"\nkind = \"simulator\"\n\
        [[asset]]\nname = \"a\"\nconnector = \"sim\"\npoints = [{ name = \"setpoint\" }]\n";
    // A connector of a kind with an asset of one point.
    let line = |kind: &str, connector: &str, asset: &str, point: &str| {
        format!(
            "{head}{file}[[connector]]\nname = \"line\"\nkind = \"{kind}\"\n{connector}\
             [[asset]]\nname = \"a\"\nconnector = \"line\"\n{asset}points = [{{ name = \"p\", {point} }}]\n"
        )
    };
    vec![
        ("[[uplink]]", "file", format!("{head}{file}{simulator}")),
        ("[[uplink]]", "mqtt", format!("{head}{mqtt}{simulator}")),
        ("[[connector]]", "simulator", format!("{head}{file}{simulator}")),
        (
            "[[connector]]",
            "modbus-tcp",
            line(
                "modbus-tcp",
                "address = \"192.0.2.10\"\n",
                "unit_id = 1\n",
                "address = \"holding:0\"",
            ),
        ),
        (
            "[[connector]]",
            "modbus-rtu",
            line(
                "modbus-rtu",
                "device = \"/dev/ttyUSB0\"\n",
                "unit_id = 1\n",
                "address = \"holding:0\"",
            ),
        ),
        (
            "[[connector]]",
            "modbus-rtu-tcp",
            line(
                "modbus-rtu-tcp",
                "address = \"192.0.2.10:4001\"\n",
                "unit_id = 1\n",
                "address = \"holding:0\"",
            ),
        ),
        (
            "[[connector]]",
            "gpio",
            line("gpio", "chip = \"gpiochip0\"\n", "", "address = \"17\""),
        ),
        (
            "[[connector]]",
            "i2c",
            line(
                "i2c",
                "bus = 1\n",
                "device_address = 0x20\n",
                "address = \"register:0\", type = \"uint16\"",
            ),
        ),
        (
            "[[connector]]",
            "i2c",
            line(
                "i2c",
                "bus = 1\n",
                "device_address = 0x48\nsensor = \"ads1115\"\n",
                "address = \"channel:0\"",
            ),
        ),
        (
            "[[connector]]",
            "spi",
            line("spi", "bus = 0\n", "sensor = \"mcp3008\"\n", "address = \"channel:0\""),
        ),
        (
            "[[connector]]",
            "pwm",
            line("pwm", "", "", "address = \"channel:0\", frequency = 1000"),
        ),
    ]
}

/// The files that samples and examples name.
fn folder() -> PathBuf {
    let folder = std::env::temp_dir().join(format!("tidegate-reference-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a temporary folder");
    std::fs::write(folder.join("cloud.password"), "secret\n").expect("writable");
    folder
}

fn read(text: &str) -> Result<Config, String> {
    let path = folder().join("gateway.toml");
    let config = parse(text, &path, &|_| None);
    // Warnings name lines, which a key more moves.
    let config = config.map(|config| Config {
        warnings: Vec::new(),
        fingerprint: String::new(),
        ..config
    });
    config.map_err(|faults: Vec<Fault>| Faults::new(&path, text, faults).to_string())
}

/// What one kind of checker said of a key: for which kinds, what it takes.
type Asked = BTreeMap<(String, String), BTreeMap<String, BTreeSet<&'static str>>>;

/// The kinds that stand in a sample.
fn samples_kind(text: &str) -> Vec<&str> {
    let kinds = text.split("kind = \"").skip(1);
    kinds.filter_map(|rest| rest.split('"').next()).collect()
}

fn ask_all() -> Asked {
    let mut all = Asked::new();
    for (_, kind, text) in samples() {
        let asked = asked::record(|| {
            read(&text).unwrap_or_else(|faults| panic!("the sample of {kind} is not valid: {faults}"));
        });
        for ((section, key), what) in asked {
            let of_file = samples_kind(&text);
            let refused = |(s, k, only): &(&str, &str, &str)| {
                *s == section && *k == key && (only.is_empty() || of_file.contains(only))
            };
            if section == "gateway.toml" || REFUSED.iter().any(refused) {
                continue;
            }
            let what = match BY_HAND.iter().find(|(k, _)| *k == key) {
                Some((_, by_hand)) if what == asked::ANYTHING => (*by_hand).to_owned(),
                _ => what,
            };
            all.entry((section, key))
                .or_default()
                .entry(what)
                .or_default()
                .insert(kind);
        }
    }
    all
}

/// The kinds whose sections these are.
fn kinds_of(section: &str) -> BTreeSet<&'static str> {
    let family = match section {
        "[[uplink]]" | TLS => "[[uplink]]",
        "[[connector]]" | "[[asset]]" | POINT => "[[connector]]",
        _ => return BTreeSet::new(),
    };
    samples()
        .into_iter()
        .filter(|(f, ..)| *f == family)
        .map(|(_, kind, _)| kind)
        .collect()
}

/// The first sample of the row's kinds whose checker asks for its key.
fn sample_of(row: &Row) -> Option<String> {
    samples().into_iter().find_map(|(_, kind, text)| {
        let asked = asked::record(|| drop(read(&text)));
        let is_asked = asked.contains_key(&(row.section.to_owned(), row.key.to_owned()));
        (is_asked && (row.kinds.is_empty() || row.kinds.contains(&kind))).then_some(text)
    })
}

/// The sample with `key = value` in the first such section; None where it stands there already.
fn with_key(text: &str, section: &str, line: &str) -> Option<String> {
    let key = line.split(' ').next()?;
    let (marker, insert) = match section {
        TLS => ("tls = { ".to_owned(), format!("{line}, ")),
        SERVER_TLS => ("[listener.tls]\n".to_owned(), format!("{line}\n")),
        POINT => ("points = [{ ".to_owned(), format!("{line}, ")),
        header => (format!("{header}\n"), format!("{line}\n")),
    };
    let at = text.find(&marker)? + marker.len();
    let end = match section {
        TLS | POINT => text[at..].find('}')?,
        _ => text[at..].find("\n[").unwrap_or(text.len() - at),
    };
    let own = &text[at..at + end];
    let stands = own
        .split(['\n', ','])
        .any(|part| part.trim_start().starts_with(&format!("{key} = ")));
    let made = format!("{}{insert}{}", &text[..at], &text[at..]);
    // A list of tables ends without a comma.
    (!stands).then(|| made.replace(", }", " }"))
}

#[test]
fn the_reference_has_every_key_and_no_other() {
    let asked = ask_all();
    let mut wrong = Vec::new();
    for ((section, key), what) in &asked {
        let family = kinds_of(section);
        for (what, kinds) in what {
            // Samples of the other family have this section too.
            let own = kinds.iter().filter(|kind| family.is_empty() || family.contains(*kind));
            for kind in own.filter(|kind| !ROWS.iter().any(|row| row.is_of(section, key, kind))) {
                wrong.push(format!(
                    "add to ROWS in src/config/reference.rs: row({section:?}, {key:?}, Default(…), \"an example\", \
                     \"One sentence.\"),  // {what}, kind {kind}"
                ));
            }
        }
        if !SECTIONS.iter().any(|(s, _)| s == section) {
            wrong.push(format!("add {section:?} to SECTIONS"));
        }
    }
    for row in ROWS {
        if !asked.contains_key(&(row.section.to_owned(), row.key.to_owned())) {
            wrong.push(format!(
                "{} {} is in ROWS, but nothing asks for it",
                row.section, row.key
            ));
        }
        if !row.text.ends_with('.') {
            wrong.push(format!("{} {}: a sentence ends with a full stop", row.section, row.key));
        }
    }
    let names: BTreeSet<_> = ROWS.iter().map(|row| (row.section, row.key, row.kinds)).collect();
    assert_eq!(names.len(), ROWS.len(), "a key has one row");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// The kinds that the checker names are those that have a sample.
#[test]
fn every_kind_has_a_sample() {
    for section in ["uplink", "connector"] {
        let text = format!("[gateway]\nname = \"g\"\n[[{section}]]\nname = \"x\"\nkind = \"?\"\n");
        let faults = read(&text).expect_err("there is no kind ?");
        let known = faults
            .split("this version has ")
            .nth(1)
            .expect("the hint names the kinds");
        let known = known.lines().next().unwrap_or_default();
        let known: BTreeSet<&str> = known.split('"').skip(1).step_by(2).collect();
        let header = format!("[[{section}]]");
        assert_eq!(
            known,
            kinds_of(&header),
            "add a sample of each kind to samples() in src/config/reference.rs"
        );
    }
}

#[test]
fn defaults_and_examples_are_what_the_checker_makes_of_them() {
    let mut wrong = Vec::new();
    for row in ROWS {
        let (section, key) = (row.section, row.key);
        if UNTRIED.iter().any(|(s, k, _)| (*s, *k) == (section, key)) {
            continue;
        }
        let Some(sample) = sample_of(row) else {
            continue;
        };
        let is_needed = |(s, k, _, kind): &&(&str, &str, &str, &str)| {
            (*s, *k) == (section, key) && (kind.is_empty() || row.kinds.contains(kind))
        };
        let sample = match NEEDS.iter().find(is_needed) {
            Some((_, _, need, _)) => with_key(&sample, section, need).unwrap_or(sample),
            None => sample,
        };
        if let Some(text) = with_key(&sample, section, &format!("{key} = {}", row.example))
            && let Err(faults) = read(&text)
        {
            wrong.push(format!("{section} {key}: its example is not valid: {faults}"));
        }
        if let Default(value) = row.without {
            let text = with_key(&sample, section, &format!("{key} = {value}"));
            match (text.as_deref().map(read), read(&sample)) {
                (Some(Ok(with)), Ok(without)) => {
                    if format!("{with:?}") != format!("{without:?}") {
                        wrong.push(format!("{section} {key}: {value} is not its default"));
                    }
                }
                (None, _) => wrong.push(format!("{section} {key}: the sample must leave out what has a default")),
                (Some(Err(faults)), _) | (_, Err(faults)) => wrong.push(format!("{section} {key}: {faults}")),
            }
        }
        if row.without == Required && section.starts_with('[') {
            let stands = format!("\n{key} = ");
            let header = sample
                .find(&format!("{section}\n"))
                .expect("each section is in the samples");
            if let Some(at) = sample[header..].find(&stands) {
                let end = sample[header + at + 1..].find('\n').expect("a line has an end");
                let without = format!("{}{}", &sample[..header + at], &sample[header + at + 1 + end..]);
                if read(&without).is_ok() {
                    wrong.push(format!("{section} {key} is not required"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// What a key takes, and for which kinds where it is not for all.
fn takes(asked: &Asked, row: &Row) -> Vec<(String, String)> {
    let Some(what) = asked.get(&(row.section.to_owned(), row.key.to_owned())) else {
        return Vec::new();
    };
    let all = kinds_of(row.section);
    what.iter()
        .filter(|(_, kinds)| row.kinds.is_empty() || kinds.iter().any(|kind| row.kinds.contains(kind)))
        .map(|(what, kinds)| {
            let is_own = |kind: &&str| all.contains(*kind) && (row.kinds.is_empty() || row.kinds.contains(kind));
            let kinds: BTreeSet<&str> = kinds.iter().copied().filter(is_own).collect();
            let only = if kinds == all {
                String::new()
            } else {
                kinds.into_iter().collect::<Vec<_>>().join(", ")
            };
            (what.clone(), only)
        })
        .collect()
}

fn without_words(without: Without) -> String {
    match without {
        Required => "required".to_owned(),
        Default(value) => format!("default {value}"),
        Said(words) => format!("without it: {words}"),
    }
}

const INTRO: &str = "The whole of a gateway is in one file, gateway.toml, in TOML. `tidegate check` says everything that is \
    wrong with it, with line, column and a hint; `tidegate init` writes one to start from.";
const UNITS: &str = "Relative paths are relative to the file's folder. Sizes are text with a unit (B, KiB, MiB, GiB, kB, MB, \
    GB) or bytes as an integer; durations are text with units: \"50 ms\", \"10 s\", \"1h 30m\", \"30 days\". A name is at most \
    64 letters, digits, \".\", \"_\" and \"-\".";

fn markdown(asked: &Asked) -> String {
    let mut out = format!(
        "<!-- Made by the tests from src/config/reference.rs; see there. -->\n# gateway.toml\n\n{INTRO}\n\n{UNITS}\n"
    );
    let cell = |text: &str| text.replace('|', "\\|");
    for (section, what) in SECTIONS {
        let title = section
            .replace("tls of ", "`tls` of ")
            .replace("a point of ", "points of ");
        let _ = write!(
            out,
            "\n## {title}\n{what}\n\n| key | takes | without it | example | |\n|---|---|---|---|---|\n"
        );
        for row in ROWS.iter().filter(|row| row.section == *section) {
            let takes: Vec<String> = takes(asked, row)
                .into_iter()
                .map(|(what, only)| {
                    if only.is_empty() {
                        what
                    } else {
                        format!("{what} (kind {only})")
                    }
                })
                .collect();
            let without = match row.without {
                Required => "required".to_owned(),
                Default(value) => format!("`{value}`"),
                Said(words) => words.to_owned(),
            };
            let example = match row.example.len() {
                0..=60 => row.example.to_owned(),
                // A hash, cut at a place that all have.
                _ => format!("{}…\"", &row.example[..11]),
            };
            let cells = [takes.join("; "), without, format!("`{example}`"), row.text.to_owned()].map(|c| cell(&c));
            let _ = writeln!(out, "| `{}` | {} |", row.key, cells.join(" | "));
        }
    }
    out
}

/// For roff: backslashes, and what would be a request at a line's beginning.
fn roff(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    match text.starts_with(['.', '\'']) {
        true => format!("\\&{text}"),
        false => text,
    }
}

fn man(asked: &Asked) -> String {
    let version = env!("CARGO_PKG_VERSION");
    let mut out = format!(
        ".\\\" Made by the tests from src/config/reference.rs; see there.\n.TH gateway.toml 5 \"\" \"tidegate {version}\"\n\
         .SH NAME\ngateway.toml \\- configuration of tidegate, an IoT gateway\n.SH DESCRIPTION\n{}\n.PP\n{}\n",
        roff(&INTRO.replace('`', "")),
        roff(UNITS)
    );
    for (section, what) in SECTIONS {
        let _ = write!(out, ".SH \"{}\"\n{}\n", roff(&section.to_uppercase()), roff(what));
        for row in ROWS.iter().filter(|row| row.section == *section) {
            let _ = write!(out, ".TP\n.B {} = {}\n", roff(row.key), roff(row.example));
            let _ = writeln!(out, "{}", roff(row.text));
            for (what, only) in takes(asked, row) {
                let only = if only.is_empty() {
                    String::new()
                } else {
                    format!("Kind {only}: ")
                };
                let _ = write!(
                    out,
                    ".br\n{}\n",
                    roff(&format!("{only}{what}; {}.", without_words(row.without)))
                );
            }
        }
    }
    let _ = write!(
        out,
        ".SH FILES\n.TP\n.I ./gateway.toml\nLooked for first.\n.TP\n.I /etc/tidegate/gateway.toml\nLooked for next.\n\
         .SH \"SEE ALSO\"\n.BR tidegate (1)\n"
    );
    out
}

#[test]
fn the_documents_are_current() {
    let asked = ask_all();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (path, made) in [
        ("docs/reference.md", markdown(&asked)),
        ("man/gateway.toml.5", man(&asked)),
    ] {
        let path = root.join(path);
        if std::env::var("TIDEGATE_GOLDEN").is_ok_and(|v| v == "write") {
            std::fs::create_dir_all(path.parent().expect("it is in a folder")).expect("writable");
            std::fs::write(&path, &made).expect("writable");
        }
        let stands = std::fs::read_to_string(&path).unwrap_or_default();
        let hint = "run TIDEGATE_GOLDEN=write cargo test --lib reference, and look at the difference";
        assert!(stands == made, "{} is not current: {hint}", path.display());
    }
}
