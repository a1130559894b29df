//! Uplinks: the ways to elsewhere. Each reads the log through a consumer of its own, delivers, and confirms to the log
//! only what the other side has confirmed. The log is the session: nothing is ever re-sent from anywhere else, so cuts,
//! restarts and remotes that forget cost duplicates at most.
//!
//! An uplink keeps the order of the log for each topic, holds a bounded number of messages at a time, and says by its
//! status how it really is: good means that the other side confirmed, not that a socket is open.
//!
//! # Layout
//! - [`Uplink`]: what every kind is; a file a kind: `file`, `mqtt`
//! - `routes`: which messages, under which topics, in both directions (pure)
//! - `backoff`: how long to wait before trying again (pure)

mod backoff;
mod file;
mod mqtt;
mod routes;

use std::time::Duration;

use tokio::sync::watch;

pub use mqtt::reach;

use crate::broker::handle::{BrokerHandle, PublishError};
use crate::config;
use crate::log::consumer::Consumer;
use crate::message::TopicFilter;
use crate::status::{Health, Part, Status};
use backoff::{Backoff, Jitter};
use routes::Routes;

/// What every kind of uplink is given.
pub(crate) struct Link {
    pub(crate) name: String,
    pub(crate) routes: Routes,
    /// None: no route leads up.
    pub(crate) consumer: Option<Consumer>,
    pub(crate) broker: BrokerHandle,
    pub(crate) part: Part,
    pub(crate) shutdown: watch::Receiver<bool>,
}

/// A kind of uplink.
pub(crate) trait Uplink {
    /// Delivers until shutdown. Whatever fails is said by the status and tried again inside; an error means that the
    /// gateway itself is going down.
    fn run(self, link: Link) -> impl Future<Output = Result<(), Stopped>> + Send;
}

/// The log or the broker has stopped: there is nothing left to deliver from.
#[derive(Debug, thiserror::Error)]
#[error("the log or the broker has stopped")]
pub(crate) struct Stopped;

/// The durable consumer of an uplink: its name and what the routes bring to it. None where no route leads there.
pub fn place(uplink: &str, routes_up: &[config::RouteUp]) -> Option<(String, Vec<TopicFilter>)> {
    let routes = Routes {
        up: routes_up.iter().filter(|r| r.to == uplink).cloned().collect(),
        down: Vec::new(),
        source: format!("uplink:{uplink}").into(),
    };
    let filters = routes.filters_up();
    (!filters.is_empty()).then(|| (routes.source.to_string(), filters))
}

/// Runs one uplink until `shutdown` turns true (or its sender is gone).
pub async fn run(
    uplink: config::Uplink,
    routes_up: Vec<config::RouteUp>,
    routes_down: Vec<config::RouteDown>,
    broker: BrokerHandle,
    status: Status,
    mut shutdown: watch::Receiver<bool>,
) {
    let name = uplink.name;
    let part = status.part("uplink", &name);
    let routes = Routes {
        up: routes_up.into_iter().filter(|r| r.to == name).collect(),
        down: routes_down.into_iter().filter(|r| r.from_uplink == name).collect(),
        source: format!("uplink:{name}").into(),
    };
    let consumer = tokio::select! {
        consumer = open_consumer(&routes, &broker, &part) => consumer,
        () = stopped(&mut shutdown) => return,
    };
    let Ok(consumer) = consumer else { return };
    let link = Link {
        name: name.clone(),
        routes,
        consumer,
        broker,
        part,
        shutdown,
    };
    let result = match uplink.kind {
        config::UplinkKind::File(config) => file::File::new(config).run(link).await,
        config::UplinkKind::Mqtt(config) => mqtt::Mqtt::new(*config).run(link).await,
    };
    if let Err(error) = result {
        tracing::debug!(uplink = %name, %error, "uplink ends");
    }
}

async fn open_consumer(routes: &Routes, broker: &BrokerHandle, part: &Part) -> Result<Option<Consumer>, Stopped> {
    let filters = routes.filters_up();
    if filters.is_empty() {
        return Ok(None);
    }
    let mut backoff = Backoff::for_connections();
    let mut jitter = Jitter::from_system();
    loop {
        match broker.consumer(&routes.source, filters.clone()).await {
            Ok(consumer) => return Ok(Some(consumer)),
            Err(PublishError::Stopped) => return Err(Stopped),
            Err(error @ (PublishError::Full(_) | PublishError::NotDurable(_))) => {
                let delay = backoff.failed(jitter.draw());
                let text = format!(
                    "its place in the log cannot be opened: {error}; next try in {}",
                    in_words(delay)
                );
                if part.set(Health::Failed, text) {
                    tracing::error!(uplink = %routes.source, %error, "the uplink's place in the log cannot be opened");
                }
                tokio::time::sleep(delay).await;
            }
        }
    }
}

/// Returns once `shutdown` is true or can never become so.
async fn stopped(shutdown: &mut watch::Receiver<bool>) {
    let _ = shutdown.wait_for(|stop| *stop).await;
}

/// `0.5 s`, `32 s`
fn in_words(delay: Duration) -> String {
    if delay < Duration::from_secs(10) {
        format!("{:.1} s", delay.as_secs_f64())
    } else {
        format!("{} s", delay.as_secs())
    }
}
