//! What a client can ask for. To add a request: a variant of [`Request`], an arm in [`serve`], a function.

use std::time::Duration;

use serde::Deserialize;
use serde_json::json;

use super::encoding::{Outgoing, of_client, of_detail, of_message};
use super::{Answer, End, Failure, Inside, report};
use crate::broker::handle::ClientEntry;
use crate::clock;
use crate::control::ReloadOptions;
use crate::message::TopicFilter;

/// The largest payload to publish; larger ones come by MQTT.
pub const PAYLOAD_BYTES_MAX: usize = 512 << 10;
/// The shortest period of a watched status.
const PERIOD_MIN: Duration = Duration::from_millis(100);
/// A tail says what it lost this often at the latest.
const LOST_SAID: Duration = Duration::from_secs(1);

#[derive(Debug, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// One line with everything; with a period one line each, until the client hangs up.
    Status { every_ms: Option<u64> },
    /// Live messages that match, a line each, until the client hangs up. `{"lost":n}` stands for those that it was too
    /// slow for.
    Tail { filter: String },
    /// Reads the configuration again; one line with the outcome, when it is known.
    Reload {
        #[serde(default)]
        check: bool,
        #[serde(default)]
        no_revert: bool,
    },
    /// The sessions, a line each, in no order.
    Clients {
        #[serde(default)]
        connected: bool,
        user: Option<String>,
    },
    /// One client; one line.
    Client { client_id: String },
    /// Ends a client's connection, and with `end_session` what is kept of it; one line when that is on disk.
    Kick {
        client_id: String,
        #[serde(default)]
        end_session: bool,
    },
    /// The retained messages that match, a line each, by their topics.
    Retained { filter: Option<String> },
    /// Removes the retained messages that match; one line with their number when that is on disk.
    ClearRetained { filter: String },
    /// Publishes one message; returns when it is committed, with who is going to get it.
    Publish(Outgoing),
}

pub fn parse(line: &[u8]) -> Result<Request, Failure> {
    serde_json::from_slice(line).map_err(|e| {
        Failure::new(
            // serde names the known requests where this one is unknown.
            format!("the request is not understood: {e}"),
            "send one line of JSON: {\"request\":\"status\"}; this gateway may be older than the program that asks",
        )
    })
}

pub(super) async fn serve(inside: &Inside, request: Request, answer: &mut Answer) -> Result<(), End> {
    match request {
        Request::Status { every_ms: None } => Ok(answer.line(&report(inside)).await?),
        Request::Status { every_ms: Some(ms) } => watch(inside, Duration::from_millis(ms), answer).await,
        Request::Tail { filter } => tail(inside, filter, answer).await,
        Request::Reload { check, no_revert } => reload(inside, ReloadOptions { check, no_revert }, answer).await,
        Request::Clients { connected, user } => clients(inside, connected, user.as_deref(), answer).await,
        Request::Client { client_id } => client(inside, &client_id, answer).await,
        Request::Kick { client_id, end_session } => kick(inside, &client_id, end_session, answer).await,
        Request::Retained { filter } => retained(inside, filter.unwrap_or_else(|| "#".to_owned()), answer).await,
        Request::ClearRetained { filter } => clear_retained(inside, filter, answer).await,
        Request::Publish(outgoing) => publish(inside, outgoing, answer).await,
    }
}

async fn watch(inside: &Inside, period: Duration, answer: &mut Answer) -> Result<(), End> {
    let mut ticks = tokio::time::interval(period.max(PERIOD_MIN));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            _ = ticks.tick() => answer.line(&report(inside)).await?,
            () = answer.hung_up() => return Err(End::Gone),
        }
    }
}

async fn tail(inside: &Inside, filter: String, answer: &mut Answer) -> Result<(), End> {
    let filter = filter_of(filter)?;
    let mut tap = inside.broker.tap(filter).await.map_err(stopped)?;
    let mut look = tokio::time::interval(LOST_SAID);
    // The client knows from here on that nothing is missed.
    answer.line(&json!({ "listening": true })).await?;
    loop {
        let message = tokio::select! {
            message = tap.recv() => Some(message.ok_or(End::Done)?),
            _ = look.tick() => None,
            () = answer.hung_up() => return Err(End::Gone),
        };
        if let Some(message) = message {
            answer.line(&of_message(&message)).await?;
        }
        let lost = tap.take_lost();
        if lost > 0 {
            answer.line(&json!({ "lost": lost })).await?;
        }
    }
}

async fn reload(inside: &Inside, options: ReloadOptions, answer: &mut Answer) -> Result<(), End> {
    let report = inside.control.reload(options).await.map_err(|e| {
        let next = "try again, or restart the gateway";
        Failure::new(e.to_string(), next)
    })?;
    let mut line = json!(report);
    line["good"] = report.is_good().into();
    Ok(answer.line(&line).await?)
}

async fn publish(inside: &Inside, outgoing: Outgoing, answer: &mut Answer) -> Result<(), End> {
    let message = outgoing.message("admin", PAYLOAD_BYTES_MAX, clock::wall())?;
    let audience = inside
        .broker
        .audience(message.topic.clone(), message.qos)
        .await
        .map_err(stopped)?;
    inside.broker.publish(vec![message]).await.map_err(|e| {
        Failure::new(
            e.to_string(),
            "`tidegate status` and `tidegate doctor` say more; nothing was published",
        )
    })?;
    let line = json!({ "published": true, "durable": audience.durable, "live": audience.live });
    Ok(answer.line(&line).await?)
}

fn filter_of(text: String) -> Result<TopicFilter, Failure> {
    TopicFilter::new(text.clone()).map_err(|e| {
        Failure::new(
            format!("{text:?} is not a topic filter: {e}"),
            "use + for a level and # for the rest: 'sensors/#'",
        )
    })
}

/// Page by page: what waits for the client of the socket is one page.
async fn clients(inside: &Inside, connected: bool, user: Option<&str>, answer: &mut Answer) -> Result<(), End> {
    let mut from = Some(0);
    while let Some(place) = from {
        let page = inside.broker.clients(place).await.map_err(stopped)?;
        let wanted = |c: &&ClientEntry| {
            (!connected || c.peer.is_some()) && user.is_none_or(|user| c.user.as_deref() == Some(user))
        };
        for client in page.clients.iter().filter(wanted) {
            answer.line(&of_client(client)).await?;
        }
        from = page.next;
    }
    Ok(())
}

async fn client(inside: &Inside, client_id: &str, answer: &mut Answer) -> Result<(), End> {
    let client = inside.broker.client(client_id).await.map_err(stopped)?;
    let client = client.ok_or_else(|| no_such_client(client_id))?;
    Ok(answer.line(&of_detail(&client)).await?)
}

async fn kick(inside: &Inside, client_id: &str, end_session: bool, answer: &mut Answer) -> Result<(), End> {
    let kicked = inside.broker.kick(client_id, end_session).await.map_err(not_durable)?;
    match kicked {
        None => Err(no_such_client(client_id).into()),
        Some(false) => {
            let error = format!("the client {client_id:?} is not connected");
            Err(Failure::new(error, "--end-session removes what is kept of it").into())
        }
        Some(true) => Ok(answer
            .line(&json!({ "kicked": client_id, "session_ended": end_session }))
            .await?),
    }
}

async fn retained(inside: &Inside, filter: String, answer: &mut Answer) -> Result<(), End> {
    let filter = filter_of(filter)?;
    let mut after = None;
    loop {
        let page = inside.broker.retained(filter.clone(), after).await.map_err(stopped)?;
        for message in &page.messages {
            answer.line(&of_message(message)).await?;
        }
        if !page.more {
            return Ok(());
        }
        after = page.looked_to;
    }
}

async fn clear_retained(inside: &Inside, filter: String, answer: &mut Answer) -> Result<(), End> {
    let filter = filter_of(filter)?;
    let (mut after, mut cleared) = (None, 0);
    loop {
        let step = inside.broker.clear_retained(filter.clone(), after).await;
        let (count, next) = step.map_err(|e| {
            let next = format!("{cleared} were removed before; `tidegate status` and `tidegate doctor` say more");
            Failure::new(e.to_string(), next)
        })?;
        cleared += count;
        if next.is_none() {
            return Ok(answer.line(&json!({ "cleared": cleared })).await?);
        }
        after = next;
    }
}

fn no_such_client(client_id: &str) -> Failure {
    Failure::new(
        format!("there is no client {client_id:?}, connected or with a session"),
        "`tidegate client list` names them",
    )
}

fn not_durable(e: crate::broker::handle::PublishError) -> Failure {
    Failure::new(e.to_string(), "`tidegate status` and `tidegate doctor` say more")
}

fn stopped(e: crate::broker::handle::PublishError) -> Failure {
    Failure::new(e.to_string(), "start the gateway again")
}
