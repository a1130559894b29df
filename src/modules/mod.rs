//! Placeholder until the module host lands.
pub async fn run(
    _config: crate::config::Config,
    _broker: crate::broker::handle::BrokerHandle,
    _status: crate::status::Status,
    mut stop: tokio::sync::watch::Receiver<bool>,
) {
    let _ = stop.wait_for(|s| *s).await;
}
