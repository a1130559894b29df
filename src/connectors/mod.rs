//! Connectors: tasks that talk to machines and publish their values like any client of the broker.
//!
//! A connector reads the assets that name it and publishes one message a poll group on `data/{asset}`; see [`values`]
//! for its shape. Commands come on `commands/{asset}`; see [`command`]. How the connector itself is stands retained on
//! `status/connector/{name}`. What differs between protocols is a [`driver::Driver`]; all else is the [`engine`]'s.
//! Connectors know the broker through [`Gateway`] alone.

pub mod bus;
mod command;
pub mod driver;
mod engine;
pub mod gpio;
mod grid;
pub mod i2c;
mod kinds;
pub mod modbus;
mod outbox;
pub mod pwm;
mod report;
mod scaling;
pub mod sensors;
pub mod simulator;
pub mod spi;
pub mod values;

use tokio::sync::watch;

use crate::broker::handle::{BrokerHandle, PublishError};
use crate::config;
use crate::log::consumer::{Consumer, Effects, Entry};
use crate::message::{Message, TopicFilter};
use crate::status::{Health, Part, Status};

/// The way to the rest of the gateway.
// The futures are awaited where they are made; whether they are Send is seen at the concrete type when it is spawned.
#[allow(async_fn_in_trait)]
pub trait Gateway {
    type Commands: Commands;

    /// Returns when the messages are durable, where anything durable consumes them.
    async fn publish(&self, messages: Vec<Message>) -> Result<(), PublishError>;

    /// Opens the durable consumer of a connector's commands, and the state that its last run left.
    async fn commands(
        &self,
        connector: &str,
        filters: Vec<TopicFilter>,
    ) -> Result<(Self::Commands, State), PublishError>;

    /// Whether an uplink is connected.
    fn is_connected(&self, uplink: &str) -> bool;
}

pub type State = Vec<(String, Vec<u8>)>;

/// Commands, as the log gives them.
#[allow(async_fn_in_trait)]
pub trait Commands {
    /// The next ones; waits for at least one. Cancel-safe.
    async fn next(&mut self) -> Result<Vec<Entry>, PublishError>;

    /// Answers, acknowledgements and state in one commit.
    async fn apply(&mut self, effects: Effects) -> Result<(), PublishError>;
}

/// The gateway as it runs.
#[derive(Clone)]
pub struct Running {
    pub broker: BrokerHandle,
    pub status: Status,
}

pub struct BrokerCommands {
    broker: BrokerHandle,
    consumer: Consumer,
}

/// Commands taken from the log at once.
const COMMANDS_MAX: usize = 16;
const COMMANDS_BYTES_MAX: usize = 256 << 10;

impl Gateway for Running {
    type Commands = BrokerCommands;

    async fn publish(&self, messages: Vec<Message>) -> Result<(), PublishError> {
        self.broker.publish(messages).await
    }

    async fn commands(
        &self,
        connector: &str,
        filters: Vec<TopicFilter>,
    ) -> Result<(BrokerCommands, State), PublishError> {
        let name = format!("connector:{connector}");
        let state = self.broker.module_state(&name).await?;
        let consumer = self.broker.consumer(&name, filters).await?;
        let broker = self.broker.clone();
        Ok((BrokerCommands { broker, consumer }, state))
    }

    fn is_connected(&self, uplink: &str) -> bool {
        self.status.health("uplink", uplink) == Some(Health::Good)
    }
}

impl Commands for BrokerCommands {
    async fn next(&mut self) -> Result<Vec<Entry>, PublishError> {
        let next = self.consumer.next(COMMANDS_MAX, COMMANDS_BYTES_MAX).await;
        next.map_err(|error| match error {
            crate::log::Error::Stopped => PublishError::Stopped,
            crate::log::Error::Read(_) => PublishError::NotDurable(error.to_string()),
        })
    }

    async fn apply(&mut self, effects: Effects) -> Result<(), PublishError> {
        self.broker.apply(&mut self.consumer, effects).await
    }
}

/// One connector and the assets that it reads. Two that are equal need no restart.
#[derive(Debug, Clone, PartialEq)]
pub struct Setup {
    pub connector: config::Connector,
    pub assets: Vec<config::Asset>,
    /// Assets of other connectors that a topic of ours could mean as well.
    pub elsewhere: Vec<String>,
}

impl Setup {
    /// Every connector of a configuration.
    pub fn all(config: &config::Config) -> Vec<Setup> {
        let of = |connector: &config::Connector| {
            let (ours, others): (Vec<_>, Vec<_>) = config
                .assets
                .iter()
                .partition(|asset| asset.connector == connector.name);
            let is_below = |name: &str| {
                ours.iter().any(|a| {
                    name.strip_prefix(a.name.as_str())
                        .is_some_and(|rest| rest.starts_with('/'))
                })
            };
            Setup {
                connector: connector.clone(),
                assets: ours.iter().copied().cloned().collect(),
                elsewhere: others
                    .iter()
                    .filter(|a| is_below(&a.name))
                    .map(|a| a.name.clone())
                    .collect(),
            }
        };
        config.connectors.iter().map(of).collect()
    }

    /// By asset and point, what a kind of connector knows of an address.
    fn addresses<T>(&self, of: impl Fn(&config::Address) -> Option<T>) -> Vec<Vec<T>> {
        let points = |asset: &config::Asset| asset.points.iter().filter_map(|p| of(&p.address)).collect();
        self.assets.iter().map(points).collect()
    }
}

/// The durable consumer of a connector's commands: its name and filters.
pub fn place(setup: &Setup) -> (String, Vec<TopicFilter>) {
    let name = format!("connector:{}", setup.connector.name);
    (name, command::filters(&setup.assets))
}

/// Runs a connector of whatever kind it is until `shutdown` is true (or its sender is gone) or the broker has stopped.
/// What goes wrong on the way is said in `part` and tried again.
pub async fn run<G: Gateway>(setup: Setup, gateway: G, part: Part, shutdown: watch::Receiver<bool>) {
    let driver = kinds::AnyDriver::new(&setup, &part);
    engine::run(setup, driver, gateway, part, shutdown).await;
}
