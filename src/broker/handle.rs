//! The in-process way to the broker: connectors, modules and uplinks publish through it by the clients' rules.

use tokio::sync::{mpsc, oneshot};

use super::tap::{Feed, Tap, tap};
use super::{Configuration, NotListening};
use crate::clock::Timestamp;
use crate::config::ClientLimits;
use crate::log::consumer::{Consumer, Effects};
use crate::log::{ConsumerState, Log, NoPlace};
use crate::message::{Message, Qos, Topic, TopicFilter};

#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A stream with `when_full = "reject"` is full; try again later.
    #[error("the stream {0:?} is full")]
    Full(String),
    /// The commit failed (disk full, I/O error): nothing of the call is durable; try again later.
    #[error("the log could not be written: {0}")]
    NotDurable(String),
    #[error("the broker has stopped")]
    Stopped,
}

#[derive(Debug, thiserror::Error)]
pub enum ConfigureError {
    #[error(transparent)]
    Streams(#[from] NoPlace),
    #[error("the broker has stopped")]
    Stopped,
}

/// Who would get a message of a topic now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Audience {
    /// Names of those for whom it waits on disk.
    pub durable: Vec<String>,
    /// How many others are connected and get it from memory.
    pub live: usize,
}

/// A session, and its connection while it has one.
#[derive(Debug, Clone)]
pub struct ClientEntry {
    pub client_id: String,
    pub user: Option<String>,
    /// Some while it is connected.
    pub peer: Option<String>,
    /// `3.1`, `3.1.1` or `5`.
    pub version: Option<&'static str>,
    /// Of its connection, or of the end of the last one.
    pub since: Option<Timestamp>,
    pub expiry_s: u32,
    pub subscriptions: u64,
    pub queued_messages: u64,
    pub queued_bytes: u64,
}

/// More of one client.
#[derive(Debug, Clone)]
pub struct ClientDetail {
    pub entry: ClientEntry,
    /// The first of them, by their filters.
    pub subscriptions: Vec<Subscribed>,
    pub in_flight: u64,
    /// QoS 2 messages from it that wait for PUBREL.
    pub inbound: u64,
    pub unsent_bytes: u64,
    pub dropped: u64,
    pub throttled: u64,
    /// "mqtts://192.0.2.1:8883"
    pub listener: Option<String>,
    pub will_topic: Option<String>,
    pub limits: ClientLimits,
    /// Clients of its user that are connected, itself included.
    pub clients_of_user: u32,
}

#[derive(Debug, Clone)]
pub struct Subscribed {
    pub filter: String,
    pub qos: u8,
    pub no_local: bool,
    pub identifier: Option<u32>,
}

#[derive(Debug, Clone, Default)]
pub struct ClientsPage {
    pub clients: Vec<ClientEntry>,
    /// Where the next page begins.
    pub next: Option<u32>,
}

#[derive(Debug, Clone, Default)]
pub struct RetainedPage {
    pub messages: Vec<Message>,
    /// The last topic that was looked at.
    pub looked_to: Option<String>,
    pub more: bool,
}

/// Calls waiting for the network thread; beyond it callers wait.
const QUEUE_MAX: usize = 64;

pub(super) enum Request {
    Apply {
        name: String,
        effects: Effects,
        cursors: Vec<(i64, u16, u64)>,
        reply: oneshot::Sender<Result<(), PublishError>>,
    },
    Consumer {
        name: String,
        filters: Vec<TopicFilter>,
        reply: oneshot::Sender<std::sync::Arc<ConsumerState>>,
    },
    Retire {
        name: String,
    },
    Configure {
        configuration: Box<Configuration>,
        reply: oneshot::Sender<Result<Vec<NotListening>, ConfigureError>>,
    },
    Listen,
    Prove {
        reply: oneshot::Sender<Result<(), PublishError>>,
    },
    Tap {
        feed: Feed,
    },
    Audience {
        topic: Topic,
        qos: Qos,
        reply: oneshot::Sender<Audience>,
    },
    Clients {
        from: u32,
        reply: oneshot::Sender<ClientsPage>,
    },
    Client {
        client_id: String,
        reply: oneshot::Sender<Option<ClientDetail>>,
    },
    Kick {
        client_id: String,
        end_session: bool,
        found: oneshot::Sender<Option<bool>>,
        reply: oneshot::Sender<Result<(), PublishError>>,
    },
    Retained {
        filter: TopicFilter,
        after: Option<String>,
        reply: oneshot::Sender<RetainedPage>,
    },
    ClearRetained {
        filter: TopicFilter,
        after: Option<String>,
        found: oneshot::Sender<(u64, Option<String>)>,
        reply: oneshot::Sender<Result<(), PublishError>>,
    },
    ShutDown {
        reply: oneshot::Sender<()>,
    },
}

/// Cheap to clone, usable from any thread. Its queue is bounded: calls wait while it is full.
#[derive(Clone)]
pub struct BrokerHandle {
    requests: mpsc::Sender<Request>,
    log: Log,
}

impl BrokerHandle {
    pub(super) fn new(log: Log) -> (BrokerHandle, mpsc::Receiver<Request>) {
        let (requests, receiver) = mpsc::channel(QUEUE_MAX);
        (BrokerHandle { requests, log }, receiver)
    }

    /// Publishes in order; returns when everything that anything durable consumes is on disk.
    pub async fn publish(&self, messages: Vec<Message>) -> Result<(), PublishError> {
        let effects = Effects {
            publish: messages,
            ..Effects::default()
        };
        self.call("gateway".to_owned(), effects, Vec::new()).await
    }

    async fn call(&self, name: String, effects: Effects, cursors: Vec<(i64, u16, u64)>) -> Result<(), PublishError> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Apply {
            name,
            effects,
            cursors,
            reply,
        };
        self.requests.send(request).await.map_err(|_| PublishError::Stopped)?;
        answer.await.map_err(|_| PublishError::Stopped)?
    }

    /// Opens (or makes) the durable consumer of that name with those filters. A filter that is new counts from now;
    /// one that stays keeps its place. One [`Consumer`] a name at a time.
    pub async fn consumer(&self, name: &str, filters: Vec<TopicFilter>) -> Result<Consumer, PublishError> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Consumer {
            name: name.to_owned(),
            filters,
            reply,
        };
        self.requests.send(request).await.map_err(|_| PublishError::Stopped)?;
        let state = answer.await.map_err(|_| PublishError::Stopped)?;
        Ok(Consumer::new(self.log.clone(), state))
    }

    /// Makes (or keeps) the place of a durable consumer that is opened later: what is published from now on waits for it.
    pub async fn reserve(&self, name: &str, filters: Vec<TopicFilter>) -> Result<(), PublishError> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Consumer {
            name: name.to_owned(),
            filters,
            reply,
        };
        self.requests.send(request).await.map_err(|_| PublishError::Stopped)?;
        answer.await.map(|_| ()).map_err(|_| PublishError::Stopped)
    }

    /// Opens the listeners, once everybody who must not miss a message has a place.
    pub async fn listen(&self) -> Result<(), PublishError> {
        self.requests
            .send(Request::Listen)
            .await
            .map_err(|_| PublishError::Stopped)
    }

    /// From now on nothing new is for this consumer; what it was owed stays owed.
    pub async fn retire(&self, name: &str) -> Result<(), PublishError> {
        self.requests
            .send(Request::Retire { name: name.to_owned() })
            .await
            .map_err(|_| PublishError::Stopped)
    }

    /// Takes over another configuration; returns the listeners that are not up. On an error nothing has changed.
    pub async fn configure(&self, configuration: Configuration) -> Result<Vec<NotListening>, ConfigureError> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Configure {
            configuration: Box::new(configuration),
            reply,
        };
        let stopped = |_| ConfigureError::Stopped;
        self.requests.send(request).await.map_err(|_| ConfigureError::Stopped)?;
        answer.await.map_err(stopped)?
    }

    /// Returns when a commit that was asked for by this call went through the network thread, the log's writer and back:
    /// what a PUBACK would have waited for. It writes one row of its own over, and nobody sees it.
    pub async fn prove(&self) -> Result<(), PublishError> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(Request::Prove { reply })
            .await
            .map_err(|_| PublishError::Stopped)?;
        answer.await.map_err(|_| PublishError::Stopped)?
    }

    /// Applies the effects in one commit. On an error nothing of it happened and it may be tried again.
    pub async fn apply(&self, consumer: &mut Consumer, effects: Effects) -> Result<(), PublishError> {
        let done = effects
            .acknowledge
            .iter()
            .copied()
            .chain(effects.dead.iter().map(|(e, _)| e.position));
        let (cursors, messages) = consumer.prepare(done);
        self.call(consumer.name().to_owned(), effects, cursors).await?;
        consumer.settle_all(messages);
        Ok(())
    }

    /// A look at live messages as they pass, of those topics; ends when the tap is dropped.
    pub async fn tap(&self, filter: TopicFilter) -> Result<Tap, PublishError> {
        let (feed, tap) = tap(filter);
        let sent = self.requests.send(Request::Tap { feed }).await;
        sent.map_err(|_| PublishError::Stopped)?;
        // Answered behind the request before it: the feed is in place.
        let topic = Topic::new("tap").expect("it is a topic");
        self.audience(topic, Qos::AtMostOnce).await?;
        Ok(tap)
    }

    /// Who would get a message of this topic and QoS now.
    pub async fn audience(&self, topic: Topic, qos: Qos) -> Result<Audience, PublishError> {
        let (reply, answer) = oneshot::channel();
        let request = Request::Audience { topic, qos, reply };
        self.requests.send(request).await.map_err(|_| PublishError::Stopped)?;
        answer.await.map_err(|_| PublishError::Stopped)
    }

    /// The durable state of a module, as its `Effects` left it.
    pub async fn module_state(&self, module: &str) -> Result<Vec<(String, Vec<u8>)>, PublishError> {
        self.log
            .module_state(module)
            .await
            .map_err(|e| PublishError::NotDurable(e.to_string()))
    }

    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Request) -> Result<T, PublishError> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(make(reply))
            .await
            .map_err(|_| PublishError::Stopped)?;
        answer.await.map_err(|_| PublishError::Stopped)
    }

    /// A page of the sessions, from where the last one ended (0: the first).
    pub async fn clients(&self, from: u32) -> Result<ClientsPage, PublishError> {
        self.ask(|reply| Request::Clients { from, reply }).await
    }

    pub async fn client(&self, client_id: &str) -> Result<Option<ClientDetail>, PublishError> {
        let client_id = client_id.to_owned();
        self.ask(|reply| Request::Client { client_id, reply }).await
    }

    /// Ends a client's connection (and its session); returns when that is on disk. None: there is no such client;
    /// Some(false): it is not connected.
    pub async fn kick(&self, client_id: &str, end_session: bool) -> Result<Option<bool>, PublishError> {
        let client_id = client_id.to_owned();
        let (reply, committed) = oneshot::channel();
        let kick = |found| Request::Kick {
            client_id,
            end_session,
            found,
            reply,
        };
        let found = self.ask(kick).await?;
        if found == Some(true) {
            committed.await.map_err(|_| PublishError::Stopped)??;
        }
        Ok(found)
    }

    /// A page of the retained messages that match, behind the topic that the last page looked at.
    pub async fn retained(&self, filter: TopicFilter, after: Option<String>) -> Result<RetainedPage, PublishError> {
        self.ask(|reply| Request::Retained { filter, after, reply }).await
    }

    /// Removes some retained messages that match; returns, when that is on disk, how many, and where to go on.
    pub async fn clear_retained(
        &self,
        filter: TopicFilter,
        after: Option<String>,
    ) -> Result<(u64, Option<String>), PublishError> {
        let (reply, committed) = oneshot::channel();
        let clear = |found| Request::ClearRetained {
            filter,
            after,
            found,
            reply,
        };
        let found = self.ask(clear).await?;
        committed.await.map_err(|_| PublishError::Stopped)??;
        Ok(found)
    }

    /// Tells every client goodbye and takes nothing new.
    pub async fn shut_down(&self) {
        let (reply, answer) = oneshot::channel();
        if self.requests.send(Request::ShutDown { reply }).await.is_ok() {
            let _ = answer.await;
        }
    }
}
