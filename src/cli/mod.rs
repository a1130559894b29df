//! The command line: what was typed becomes one command, its outcome an exit code.
//!
//! Exit codes: see [`EXIT_CODES`].

mod asset;
mod client;
mod clients;
mod discover_i2c;
mod discover_modbus;
mod doctor;
mod files;
mod pages;
mod passwd;
mod publish;
mod reload;
mod status;
mod tail;
mod terminal;
mod top;
mod topic;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::{Args, Parser, Subcommand};

use crate::config::{self, Config, Faults};

/// IoT gateway: local MQTT broker, durable log, WASM modules and uplinks.
#[derive(Debug, Parser)]
#[command(name = "tidegate", version, args_conflicts_with_subcommands = true, after_help = EXIT_HELP)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    /// Without a command: `run`.
    #[command(flatten)]
    run: ConfigArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start the gateway and run until SIGTERM or Ctrl-C (the default)
    Run(ConfigArgs),
    /// Say everything that is wrong with the configuration
    Check(ConfigArgs),
    /// Write a commented gateway.toml to start from
    Init {
        /// A file that does not exist yet, or the folder to put gateway.toml in
        #[arg(default_value = ".")]
        path: PathBuf,
    },
    /// Ask for a password and print the password_hash of a [[user]]
    Passwd,
    /// Say how a running gateway and each of its parts is
    Status {
        #[command(flatten)]
        config: ConfigArgs,
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Show live rates, queues and parts
    Top {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        top: top::TopArgs,
    },
    /// Show live messages
    Tail {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        tail: tail::TailArgs,
    },
    /// Publish a message; returns when it is stored
    Publish {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        publish: publish::PublishArgs,
    },
    /// Look for what is wrong here, and say how to mend it
    ///
    /// The file, the disk, the clock, ports, names, certificates, devices and permissions, whether the gateway runs or not.
    /// Exit code 1 where something has failed.
    Doctor {
        #[command(flatten)]
        config: ConfigArgs,
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
        /// Leave out what reaches other machines
        #[arg(long)]
        offline: bool,
    },
    /// Print a completion script: source <(tidegate completions bash)
    Completions { shell: pages::Shell },
    /// Print tidegate(1), or write all man pages into a folder
    Man { dir: Option<PathBuf> },
    /// List, look at and disconnect MQTT clients
    #[command(subcommand)]
    Client(clients::Command),
    /// List and remove retained messages
    #[command(subcommand)]
    Topic(topic::Command),
    /// Name, read, write and watch the assets of the connectors
    #[command(subcommand)]
    Asset(asset::Command),
    /// Have the running gateway read its configuration again
    ///
    /// Waits for the outcome and prints what changes. Exit code 0: what the file says runs; 1: it was refused, taken back, or not all of it is up.
    Reload {
        #[command(flatten)]
        config: ConfigArgs,
        /// Say what would change, and change nothing
        #[arg(long)]
        check: bool,
        /// Do not go back to what ran before where a listener or an uplink does not come up
        #[arg(long)]
        no_revert: bool,
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Find what is connected, and print ready configuration
    ///
    /// Nothing is scanned that is not named.
    #[command(subcommand)]
    Discover(Discover),
    /// Print the version
    Version,
    /// Work with modules
    #[command(subcommand)]
    Module(Module),
}

#[derive(Debug, Subcommand)]
enum Discover {
    /// List the I²C buses of this host; with --bus probe the addresses of one
    I2c {
        /// Probe every address of this bus (N or /dev/i2c-N), which can disturb a device on it
        #[arg(long, value_parser = discover_i2c::bus_number)]
        bus: Option<u8>,
    },
    /// List the serial ports of this host; none is opened
    Serial,
    /// Ask units of one Modbus line whether they are there; say which line
    Modbus {
        #[command(flatten)]
        config: ConfigArgs,
        #[command(flatten)]
        line: discover_modbus::ModbusArgs,
    },
}

#[derive(Debug, Subcommand)]
enum Module {
    /// Compile modules for a machine that cannot: 32-bit ARM
    Precompile {
        /// What the machine runs
        #[arg(long, value_parser = ["pulley32"])]
        target: String,
        /// Where to write NAME-….pulley32 (on the machine: /usr/local/lib/tidegate/precompiled, owned by root)
        #[arg(long, value_name = "DIR", default_value = ".")]
        out: PathBuf,
        #[arg(required = true, value_name = "NAME.wasm")]
        files: Vec<PathBuf>,
    },
    /// Compile a module to machine code; what the daemon runs of itself in a process of its own
    #[command(hide = true)]
    Compile { input: PathBuf, output: PathBuf },
    /// Print what a call into a module costs, in nanoseconds a message
    #[command(hide = true)]
    #[cfg(not(target_arch = "arm"))]
    Bench { file: PathBuf },
}

#[derive(Debug, Clone, Default, Args)]
struct ConfigArgs {
    /// Instead of ./gateway.toml or /etc/tidegate/gateway.toml
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

/// Why has been said already, on stdout.
#[derive(Debug, thiserror::Error)]
#[error("not done")]
struct Silent;

const EXIT_NO_GATEWAY: u8 = 3;
/// In the manual and, as a sentence, in --help.
#[cfg(test)]
const EXIT_CODES: [(u8, &str); 4] = [
    (0, "Done; for doctor: nothing has failed"),
    (
        1,
        "It could not be done, which stderr says; for doctor: something has failed; for check: the file has faults",
    ),
    (2, "The arguments are wrong"),
    (
        EXIT_NO_GATEWAY,
        "No gateway runs with this configuration, or this user may not ask it",
    ),
];
const EXIT_HELP: &str = "Exit codes: 0 done; 1 it could not be done, or doctor found a failure;\n\
                         2 wrong arguments; 3 no gateway runs with this configuration";

impl ConfigArgs {
    fn place(&self) -> anyhow::Result<client::Place> {
        client::Place::find(self.config.as_ref())
    }
}

/// All of the program.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    if let Some(Command::Module(Module::Compile { input, output })) = &cli.command {
        return crate::modules::compile::child_main(input, output);
    }
    match run(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            match error.downcast_ref::<Faults>() {
                // Each begins with file:line:column, for people and editors alike.
                Some(faults) => eprintln!("{faults}"),
                None if error.is::<Silent>() => {}
                None => eprintln!("tidegate: {error:#}"),
            }
            match error.is::<client::NoGateway>() {
                true => ExitCode::from(EXIT_NO_GATEWAY),
                false => ExitCode::FAILURE,
            }
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command.unwrap_or(Command::Run(cli.run)) {
        Command::Run(args) => crate::supervisor::run(load(&args)?),
        Command::Check(args) => {
            let config = load(&args)?;
            anyhow::ensure!(
                config.listeners_unusable == 0,
                "a certificate that {} names cannot be used; its listener would fail, the rest would run",
                config.path.display()
            );
            say(&format!("{}\n", summary(&config)))
        }
        Command::Init { path } => {
            let path = files::init(&path)?;
            say(&format!("wrote {0}\nnext: tidegate run --config {0}\n", path.display()))
        }
        Command::Passwd => say(&format!("{}\n", passwd::ask_and_hash()?)),
        Command::Status { config, json } => say(&status::ask(&config.place()?, json, terminal::Look::of_stdout())?),
        Command::Top { config, top } => top::run(&config.place()?, &top, terminal::Look::of_stdout()),
        Command::Tail { config, tail } => tail::run(&config.place()?, &tail, terminal::Look::of_stdout()),
        Command::Publish { config, publish } => say(&publish::run(&config.place()?, &publish)?),
        Command::Doctor { config, json, offline } => doctor(&config, json, offline),
        Command::Completions { shell } => say(pages::completions(shell)),
        Command::Man { dir: Some(dir) } => say(&pages::write_man(&dir)?),
        Command::Man { dir: None } => say(pages::MAN[0].1),
        Command::Client(command) => clients::run(command, terminal::Look::of_stdout()),
        Command::Topic(command) => topic::run(command),
        Command::Asset(command) => asset::run(command, terminal::Look::of_stdout()),
        Command::Reload {
            config,
            check,
            no_revert,
            json,
        } => {
            let told = reload::ask(&config.place()?, check, no_revert, json)?;
            say(&told.text)?;
            match told.is_good {
                true => Ok(()),
                // Said above.
                false => Err(Silent.into()),
            }
        }
        Command::Module(Module::Compile { .. }) => unreachable!("handled before"),
        Command::Module(Module::Precompile { out, files, .. }) => {
            for file in files {
                let written = crate::modules::precompiled::write(&file, &out)
                    .with_context(|| format!("{} is not compiled", file.display()))?;
                say(&format!("wrote {}\n", written.display()))?;
            }
            Ok(())
        }
        #[cfg(not(target_arch = "arm"))]
        Command::Module(Module::Bench { file }) => say(&format!("{}\n", crate::modules::bench::run(&file)?)),
        Command::Discover(Discover::I2c { bus }) => say(&discover_i2c::run(bus)?),
        Command::Discover(Discover::Serial) => say(&discover_modbus::serial()?),
        Command::Discover(Discover::Modbus { config, line }) => {
            let config = line.names_a_connector().then(|| load(&config)).transpose()?;
            say(&discover_modbus::modbus(&line, config.as_ref())?)
        }
        Command::Version => say(&format!("tidegate {}\n", env!("CARGO_PKG_VERSION"))),
    }
}

/// Its findings go to stdout; what failed makes the exit code.
fn doctor(config: &ConfigArgs, json: bool, offline: bool) -> anyhow::Result<()> {
    let path = match &config.config {
        Some(path) => path.clone(),
        None => files::find()?,
    };
    let findings = doctor::examine(&path, offline)?;
    say(&doctor::draw(&findings, json, terminal::Look::of_stdout()))?;
    match doctor::failures(&findings) {
        0 => Ok(()),
        // Said above.
        _ => Err(Silent.into()),
    }
}

/// Prints to stdout; a reader that went away is no reason to fail.
fn say(text: &str) -> anyhow::Result<()> {
    say_on(text).map(|_| ())
}

/// The same for output that goes on: false where nobody reads any more.
fn say_on(text: &str) -> anyhow::Result<bool> {
    use std::io::Write;
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        Err(e) => Err(e).context("cannot write to stdout"),
    }
}

/// A time in an argument: "1s", "500ms", "2h".
fn period(text: &str) -> Result<std::time::Duration, String> {
    match humantime::parse_duration(text) {
        Ok(time) if !time.is_zero() => Ok(time),
        Ok(_) => Err("a time above 0".to_owned()),
        Err(_) => Err("write a number and a unit: 500ms, 10s, 2h".to_owned()),
    }
}

/// The configuration; its warnings go to stderr.
fn load(args: &ConfigArgs) -> anyhow::Result<Config> {
    let path = match &args.config {
        Some(path) => path.clone(),
        None => files::find()?,
    };
    let config = config::load(&path)?;
    for warning in &config.warnings {
        eprintln!("{warning}\n");
    }
    Ok(config)
}

/// "gateway.toml is valid: 1 listener, 2 uplinks, …"
fn summary(config: &Config) -> String {
    let counts = [
        (config.listeners.len(), "listener"),
        (config.users.len(), "user"),
        (config.connectors.len(), "connector"),
        (config.assets.len(), "asset"),
        (config.streams.len(), "stream"),
        (config.uplinks.len(), "uplink"),
        (config.routes_up.len() + config.routes_down.len(), "route"),
    ];
    let counts: Vec<String> = counts
        .iter()
        .filter(|(n, _)| *n > 0)
        .map(|(n, what)| format!("{n} {what}{}", if *n == 1 { "" } else { "s" }))
        .collect();
    let name = config
        .path
        .file_name()
        .unwrap_or(config.path.as_os_str())
        .to_string_lossy();
    format!("{name} is valid: {}", counts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn no_command_is_run() {
        let cli = Cli::try_parse_from(["tidegate", "--config", "a.toml"]).expect("valid");
        assert!(cli.command.is_none() && cli.run.config == Some(PathBuf::from("a.toml")));
        let cli = Cli::try_parse_from(["tidegate", "check", "--config", "b.toml"]).expect("valid");
        assert!(matches!(cli.command, Some(Command::Check(args)) if args.config == Some(PathBuf::from("b.toml"))));
        assert!(
            Cli::try_parse_from(["tidegate", "passwd", "hunter2"]).is_err(),
            "no password on the command line"
        );
        assert!(Cli::try_parse_from(["tidegate", "chek"]).is_err());
    }

    #[test]
    fn the_template_is_valid_and_says_so() {
        let text = files::TEMPLATE;
        let path = std::path::Path::new("/somewhere/gateway.toml");
        let config = config::parse(text, path, &|_| None).expect("valid");
        assert!(config.warnings.is_empty(), "{:?}", config.warnings);
        let expected = "gateway.toml is valid: 1 listener, 1 connector, 1 asset, 1 stream, 1 uplink, 1 route";
        assert_eq!(summary(&config), expected);
    }

    /// Each commented example of the template is valid as well once its # is taken off.
    #[test]
    fn the_templates_examples_are_valid() {
        let uncommented: Vec<&str> = files::TEMPLATE
            .lines()
            .map(|line| match line.strip_prefix("# ") {
                Some(rest) if rest.starts_with("[[") || rest.starts_with('[') || is_setting(rest) => rest,
                _ => line,
            })
            .collect();
        let hash = passwd::hash("x").expect("hashes");
        let text = uncommented
            .join("\n")
            .replace("$argon2id$…", &hash)
            .replace("{ file = \"cloud.password\" }", "\"x\"");
        let path = std::path::Path::new("/somewhere/gateway.toml");
        match config::parse(&text, path, &|_| None) {
            Ok(config) => {
                assert_eq!(
                    (config.listeners.len(), config.users.len(), config.streams.len()),
                    (3, 1, 2)
                );
                assert_eq!(
                    (config.uplinks.len(), config.routes_up.len(), config.routes_down.len()),
                    (2, 2, 1)
                );
                assert_eq!(config.modules.settings.len(), 1);
            }
            Err(faults) => panic!("{}", config::Faults::new(path, &text, faults)),
        }
    }

    fn is_setting(line: &str) -> bool {
        line.split_once(" = ")
            .is_some_and(|(key, _)| key.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
    }
}
