//! `rumqttc-peer SCHEME PORT VERSION [CA CERT KEY]`: publishes three messages and prints "ok" when they came back.

use std::time::Duration;

use rumqttc::{MqttOptions, QoS, Transport, v5};

const PAYLOADS: [usize; 3] = [5, 200_000, 7];

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [scheme, port, version, files @ ..] = arguments.as_slice() else {
        panic!("SCHEME PORT VERSION [CA CERT KEY]");
    };
    rustls::crypto::ring::default_provider()
        .install_default()
        .expect("the first");
    let port: u16 = port.parse().expect("a port");
    let read = |path: &String| std::fs::read(path).unwrap_or_else(|e| panic!("{path}: {e}"));
    let tls = || match files {
        [ca, cert, key] => (read(ca), Some((read(cert), read(key)))),
        _ => panic!("CA CERT KEY"),
    };
    let transport = match scheme.as_str() {
        "mqtt" => Transport::Tcp,
        "ws" => Transport::Ws,
        "mqtts" => Transport::tls(tls().0, tls().1, None),
        "wss" => Transport::wss(tls().0, tls().1, None),
        other => panic!("scheme {other}"),
    };
    let host = match scheme.as_str() {
        "ws" | "wss" => format!("{scheme}://localhost:{port}/mqtt"),
        _ => "localhost".to_owned(),
    };
    let run = async {
        match version.as_str() {
            "5" => newer(host, port, transport).await,
            _ => older(host, port, transport).await,
        }
    };
    tokio::time::timeout(Duration::from_secs(20), run)
        .await
        .expect("in time");
    println!("ok");
}

async fn older(host: String, port: u16, transport: Transport) {
    let mut options = MqttOptions::new("rumqttc-4", host, port);
    options.set_transport(transport).set_max_packet_size(1 << 20, 1 << 20);
    let (client, mut events) = rumqttc::AsyncClient::new(options, 10);
    client.subscribe("rumqttc/4", QoS::ExactlyOnce).await.expect("queued");
    let mut got = Vec::new();
    while got.len() < PAYLOADS.len() {
        match events.poll().await.expect("connected") {
            rumqttc::Event::Incoming(rumqttc::Packet::SubAck(_)) => {
                for (i, length) in PAYLOADS.into_iter().enumerate() {
                    let qos = rumqttc::qos(i as u8).expect("0 to 2");
                    client
                        .try_publish("rumqttc/4", qos, false, vec![7; length])
                        .expect("queued");
                }
            }
            rumqttc::Event::Incoming(rumqttc::Packet::Publish(publish)) => got.push(publish.payload.len()),
            _ => {}
        }
    }
    check(got);
}

async fn newer(host: String, port: u16, transport: Transport) {
    let mut options = v5::MqttOptions::new("rumqttc-5", host, port);
    options.set_transport(transport);
    options.set_max_packet_size(Some(1 << 20));
    let (client, mut events) = v5::AsyncClient::new(options, 10);
    let qos = [
        v5::mqttbytes::QoS::AtMostOnce,
        v5::mqttbytes::QoS::AtLeastOnce,
        v5::mqttbytes::QoS::ExactlyOnce,
    ];
    client.subscribe("rumqttc/5", qos[2]).await.expect("queued");
    let mut got = Vec::new();
    while got.len() < PAYLOADS.len() {
        match events.poll().await.expect("connected") {
            v5::Event::Incoming(v5::Incoming::SubAck(_)) => {
                for (qos, length) in qos.into_iter().zip(PAYLOADS) {
                    client
                        .try_publish("rumqttc/5", qos, false, vec![7; length])
                        .expect("queued");
                }
            }
            v5::Event::Incoming(v5::Incoming::Publish(publish)) => got.push(publish.payload.len()),
            _ => {}
        }
    }
    check(got);
}

fn check(mut got: Vec<usize>) {
    let mut sent = PAYLOADS;
    got.sort_unstable();
    sent.sort_unstable();
    assert_eq!(got, sent);
}
