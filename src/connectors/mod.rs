//! Connectors: tasks that talk to machines and publish their values like any client of the broker.
//!
//! A connector reads the assets that name it and publishes one message a poll group on `data/{asset}`; see [`values`]
//! for its shape. How the connector itself is stands retained on `status/connector/{name}`.
//! Connectors know the broker through [`Publisher`] alone.

pub mod bus;
pub mod gpio;
pub mod sensors;
pub mod simulator;
pub mod values;

use tokio::sync::watch;

use crate::broker::handle::{BrokerHandle, PublishError};
use crate::config::{self, ConnectorKind};
use crate::message::Message;
use crate::status::Part;

/// The way to the broker. Returns when the messages are durable, where anything durable consumes them.
// The futures are awaited where they are made; whether they are Send is seen at the concrete type when it is spawned.
#[allow(async_fn_in_trait)]
pub trait Publisher {
    async fn publish(&self, messages: Vec<Message>) -> Result<(), PublishError>;
}

impl Publisher for BrokerHandle {
    async fn publish(&self, messages: Vec<Message>) -> Result<(), PublishError> {
        BrokerHandle::publish(self, messages).await
    }
}

/// One connector and the assets that it reads.
#[derive(Debug, Clone)]
pub struct Setup {
    pub connector: config::Connector,
    pub assets: Vec<config::Asset>,
}

impl Setup {
    /// Every connector of a configuration.
    pub fn all(config: &config::Config) -> Vec<Setup> {
        let assets = |connector: &config::Connector| {
            config
                .assets
                .iter()
                .filter(|asset| asset.connector == connector.name)
                .cloned()
                .collect()
        };
        config
            .connectors
            .iter()
            .map(|c| Setup {
                connector: c.clone(),
                assets: assets(c),
            })
            .collect()
    }
}

/// What a kind of connector is: a task that runs until `shutdown` is true (or its sender is gone) or the broker has
/// stopped. What goes wrong on the way is said in `part` and tried again.
#[allow(async_fn_in_trait)]
pub trait Connector {
    async fn run<P: Publisher>(self, publisher: P, part: Part, shutdown: watch::Receiver<bool>);
}

/// Runs a connector of whatever kind it is.
pub async fn run<P: Publisher>(setup: Setup, publisher: P, part: Part, shutdown: watch::Receiver<bool>) {
    match setup.connector.kind {
        ConnectorKind::Simulator => simulator::Simulator::new(setup).run(publisher, part, shutdown).await,
    }
}
