"""What went wrong for others between a gateway and its cloud does not go wrong here: cases UP-… and QU-…, against a scripted
upstream. Times are shortened by settings (keep_alive, ack_timeout)."""

import re
import socket
import threading
import time

import pytest

from rawmqtt import PUBACK, Raw, publish
from support import GUESTS, eventually, free_port, mqtt_uplink

FAST = 'keep_alive = "5 s"\nack_timeout = "2 s"'


def fill(gateway, count, topic="n", first=0, size=0):
    """`count` numbered messages, acknowledged."""
    with Raw(gateway.port).open("source") as source:
        for at in range(first, first + count, 1000):
            data = [
                publish(4, topic, b"%d" % n + b" " * max(0, size - 6), 1, n - at + 1)
                for n in range(at, min(at + 1000, first + count))
            ]
            source.send(b"".join(data))
            for _ in data:
                source.expect(PUBACK)


def numbers(upstream):
    """First arrivals."""
    return list(dict.fromkeys(int(m.payload) for m in upstream.accepted))


def test_never_more_in_flight_than_the_remote_grants(gateway, standin):
    """UP-01: it grants 10, then 3 on reconnect, then says nothing (65,535)."""
    upstream = standin()
    upstream.receive_maximum = [10, 3, None]
    upstream.ack_delay = 0.01
    made = gateway(mqtt_uplink(upstream.port, extra="window = 50\n" + FAST, topic="{topic}"))
    upstream.wait_for_connections(1, 10)
    fill(made, 1000)
    upstream.wait_until(lambda: upstream.distinct >= 100, 20, "some under the first grant")
    upstream.cut_all()
    upstream.wait_until(lambda: len(upstream.connections) > 1 and upstream.connections[1].publishes > 60, 20)
    upstream.cut_all()
    upstream.wait_for(1000, 30)
    used = [c.in_flight_max for c in upstream.connections]
    print(f"most in flight on each connection: {used}")
    assert upstream.violations == []
    assert used[0] <= 10 and used[1] <= 3 and used[0] > 3, "and what is granted is used"
    assert max(used[2:]) > 3
    assert numbers(upstream) == list(range(1000))


@pytest.mark.parametrize("version", ["3.1.1", "5"])
def test_commands_come_down_after_every_reconnect(gateway, standin, client, version):
    """UP-02: the stand-in comes back empty ten times; every command sent after the SUBACK is delivered locally."""
    upstream = standin()
    down = '[[route]]\nfrom_uplink = "cloud"\nfrom = ["plants/{gateway}/commands/#"]\ntopic = "commands/{rest}"\n'
    made = gateway(mqtt_uplink(upstream.port, version=version, route_from='["up/#"]', extra=FAST) + down)
    device = client(made.port, "device")
    device.subscribe("commands/#", 1)
    for n in range(10):
        upstream.wait_until(
            lambda: any("plants/line-4/commands/#" in c.subscriptions for c in upstream.connections[n:]), 20, "SUBSCRIBE"
        )
        assert upstream.publish("plants/line-4/commands/valve/open", f"{n}") == 1
        device.wait_for(n + 1)
        upstream.wait_until(lambda: len(upstream.commands_acknowledged) >= n + 1, 10, "its acknowledgement")
        upstream.cut_all()
    assert [(m.topic, m.payload) for m in device.messages] == [("commands/valve/open", b"%d" % n) for n in range(10)]
    assert upstream.violations == []


def test_a_connection_that_makes_no_progress_is_named_and_made_anew(gateway, standin):
    """UP-04: PINGREQs are answered, PUBLISHes are not. No restart needed."""
    upstream = standin()
    made = gateway(mqtt_uplink(upstream.port, extra=FAST, topic="{topic}"))
    fill(made, 10)
    upstream.wait_for(10, 10)
    upstream.ack = False
    fill(made, 200, first=10)
    began = time.monotonic()
    connections = len(upstream.connections)

    def named():
        part = made.part("uplink", "cloud")
        return part["health"] != "good" and re.search(r"not progressing since \S+", part["text"])

    eventually(named, 15, lambda: f"the status says so: {made.part('uplink', 'cloud')}", 0.05)
    upstream.wait_for_connections(connections + 1, 15)
    print(f"noticed and reconnected after {time.monotonic() - began:.1f} s with ack_timeout 2 s")
    upstream.ack = True
    upstream.wait_for(210, 60)
    assert numbers(upstream) == list(range(210))
    eventually(lambda: made.part("uplink", "cloud")["health"] == "good", 10, lambda: made.status())


@pytest.mark.parametrize("version,how", [("5", "announced"), ("3.1.1", "configured"), ("5", "configured"), ("3.1.1", "unknown")])
def test_an_oversized_message_goes_to_the_dead_letters_and_stops_nothing(gateway, standin, version, how):
    """UP-06: 128 KB at the remote, one message of 200 KB among 100: announced (5), from the configuration, or unknown to us."""
    upstream = standin()
    extra = FAST
    if how == "announced":
        upstream.maximum_packet_size = 128_000
    else:
        upstream.packet_limit = 128_000
    if how == "configured":
        extra += '\nmax_packet = "125 KiB"'
    made = gateway(mqtt_uplink(upstream.port, version=version, extra=extra, topic="{topic}"))
    upstream.wait_for_connections(1, 10)
    with Raw(made.port).open("source") as source:
        for n in range(100):
            source.publish_acked("n", b"%d" % n + b" " * (200_000 if n == 50 else 1))
    upstream.wait_for(99, 90)
    assert numbers(upstream) == [n for n in range(100) if n != 50]
    eventually(lambda: made.part("uplink", "cloud")["counters"]["dead"] == 1, 10, lambda: made.status())
    connections = len(upstream.connections)
    print(f"{how}, MQTT {version}: {connections} connections")
    assert connections == 1 if how != "unknown" else connections <= 12
    # And it goes on.
    fill(made, 1, first=100)
    upstream.wait_for(100, 10)
    assert len(upstream.connections) == connections, "no loop"
    assert upstream.violations == []


@pytest.mark.timeout(150)
def test_a_throttling_remote_is_left_in_peace_and_nothing_counts_as_sent(gateway, standin):
    """UP-08: the stand-in drops every connection after its CONNACK. First minute: the tries get rarer; what they lead to is that
    after it there is at most one in 30 s (the cap's arithmetic is a unit test; this looks at the first 45 s)."""
    upstream = standin()
    upstream.drop_after_connack = True
    made = gateway(mqtt_uplink(upstream.port, topic="{topic}"))
    fill(made, 500)

    def guessed():
        text = made.part("uplink", "cloud")["text"]
        return "quota" in text and "throttled" in text

    eventually(guessed, 45, lambda: f"the status guesses: {made.part('uplink', 'cloud')}", 0.25)
    upstream.wait_for_connections(6, 60)
    times = [c.at for c in upstream.connections]
    gaps = [b - a for a, b in zip(times, times[1:])]
    print("seconds between tries: " + ", ".join(f"{g:.1f}" for g in gaps))
    # Doubling with jitter between half and all.
    for index, gap in enumerate(gaps):
        assert gap >= 0.1 * 2**index * 0.95, f"gap {index} is {gap:.2f} s"
    assert upstream.distinct == 0 and made.part("uplink", "cloud")["counters"]["acknowledged"] == 0
    upstream.drop_after_connack = False
    upstream.wait_for(500, 60)
    assert numbers(upstream) == list(range(500))
    eventually(lambda: made.part("uplink", "cloud")["health"] == "good", 10, lambda: made.status())


@pytest.mark.timeout(120)
@pytest.mark.parametrize("version", ["3.1.1", "5"])
def test_what_is_sent_into_a_dead_link_is_not_lost(gateway, standin, version):
    """QU-01: the link freezes without a FIN while messages go on, and thaws into a reset. Detection within 1.5 × keep-alive."""
    upstream = standin()
    keep_alive = 5
    extra = f'keep_alive = "{keep_alive} s"\nack_timeout = "30 s"'
    made = gateway(mqtt_uplink(upstream.port, version=version, extra=extra, topic="{topic}"))
    fill(made, 10)
    upstream.wait_for(10, 10)
    upstream.freeze()
    began = time.monotonic()
    for n in range(10, 60):
        fill(made, 1, first=n)
    # Noticed: a connection to the frozen stand-in is tried anew, or the status says it is down.
    eventually(lambda: made.part("uplink", "cloud")["health"] != "good", 3 * keep_alive, lambda: made.status(), 0.05)
    detected = time.monotonic() - began
    fill(made, 60, first=60)
    upstream.thaw(reset=True)
    upstream.wait_for(120, 60)
    print(f"MQTT {version}: dead link noticed after {detected:.1f} s with keep-alive {keep_alive} s")
    assert detected <= 1.5 * keep_alive + 0.5
    assert numbers(upstream) == list(range(120))


@pytest.mark.timeout(120)
def test_started_without_a_network_it_recovers_by_itself(gateway, standin, tmp_path):
    """QU-03: the uplink's name does not resolve; 1,000 messages, restart, 1,000 more; then it resolves. The name is made to
    resolve in a mount namespace of the gateway's own, by a hosts file."""
    upstream = standin()
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost\n")
    made = gateway(mqtt_uplink(upstream.port, topic="{topic}").replace("127.0.0.1", "cloud.invalid"), start=False)
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'mount --bind "{hosts}" /etc/hosts && exec "$@"', "sh"]
    began = time.monotonic()
    made.start(prefix=prefix)
    assert made.ready_s < 1.5, "ready at once"
    fill(made, 1000)
    eventually(lambda: made.part("uplink", "cloud")["health"] not in ("good", "starting"), 15, lambda: made.status())
    text = made.part("uplink", "cloud")["text"]
    assert "cloud.invalid" in text, text
    made.stop()
    made.start(prefix=prefix)
    fill(made, 1000, first=1000)
    # The file is bound by its inode: written in place.
    with open(hosts, "a") as f:
        f.write("127.0.0.1 cloud.invalid\n")
    resolved = time.monotonic()
    upstream.wait_for(2000, 65)
    print(f"delivered {time.monotonic() - resolved:.1f} s after the name resolved, {time.monotonic() - began:.0f} s in all")
    assert numbers(upstream) == list(range(2000))


def test_a_burst_stops_nobody(gateway, standin, client):
    """QU-06: 5,000 QoS 1 messages in one write, with a module and the uplink in the path and a receive maximum of 10 upstream."""
    upstream = standin()
    upstream.receive_maximum = 10
    config = mqtt_uplink(upstream.port, route_from='["echo/#"]', topic="{topic}")
    config += '[[module]]\nname = "echo"\nsubscribe = ["burst"]\npublish = ["echo/#"]\n'
    made = gateway(config, start=False)
    made.drop_module(GUESTS / "echo.wasm")
    made.start()
    made.wait_for_module("echo")
    with Raw(made.port).open("burst") as source:
        source.send(b"".join(publish(4, "burst", b"%d" % n, 1, n + 1) for n in range(5000)))
        assert [source.expect(PUBACK).packet_id for _ in range(5000)] == list(range(1, 5001))
    upstream.wait_for(5000, 60)
    assert numbers(upstream) == list(range(5000))
    assert upstream.violations == []
    parts = made.status()
    assert {key: part["health"] for key, part in parts.items() if part["health"] != "good"} == {}
    assert parts["module", "echo"]["counters"]["restarts"] == 0


def test_an_error_reason_code_is_no_delivery(gateway, standin):
    """The cursor never moves on a refusal that may pass (0x97), and one for good (0x99, payload format) is a dead letter."""
    upstream = standin()
    refusals = {b"3": 2, b"7": 1}

    def refuse(message):
        if message.payload == b"5":
            return 0x99
        if refusals.get(message.payload, 0) > 0:
            refusals[message.payload] -= 1
            return 0x97
        return 0

    upstream.refuse = refuse
    made = gateway(mqtt_uplink(upstream.port, extra="window = 1", topic="{topic}"))
    fill(made, 10)
    upstream.wait_for(9, 30)
    assert numbers(upstream) == [0, 1, 2, 3, 4, 6, 7, 8, 9]
    eventually(lambda: made.part("uplink", "cloud")["counters"]["dead"] == 1, 10, lambda: made.status())
    assert upstream.refused == 4


def test_user_and_password_are_sent_and_a_refusal_is_said(gateway, standin):
    upstream = standin()
    upstream.connack_code = 0x86
    extra = 'username = "line-4"\npassword = "not to be seen"'
    made = gateway(mqtt_uplink(upstream.port, extra=extra, topic="{topic}"))
    eventually(lambda: made.part("uplink", "cloud")["health"] == "failed", 15, lambda: made.status())
    assert (upstream.connections[0].username, upstream.connections[0].password) == ("line-4", b"not to be seen")
    assert "not to be seen" not in made.log + str(made.status())
    upstream.connack_code = 0
    # Another's fault is not for ever.
    fill(made, 1)
    upstream.wait_for(1, 65)


def test_properties_and_topics_are_carried_up(gateway, standin):
    upstream = standin()
    made = gateway(mqtt_uplink(upstream.port, route_from='["a/#"]', topic="plants/{gateway}/x/{rest}"))
    upstream.wait_for_connections(1, 10)
    with Raw(made.port, 5).open("source") as source:
        source.publish_acked("a/b/c", "x", props={"content_type": "text/plain", "user": [("k", "v")], "payload_format": 1})
        source.publish_acked("not/routed", "x")
    upstream.wait_for(1, 10)
    message = upstream.accepted[0]
    assert (message.topic, message.payload, message.qos) == ("plants/line-4/x/b/c", b"x", 1)
    assert ("k", "v") in message.properties["user"]
    assert message.properties["content_type"] == "text/plain"
    assert len(upstream.messages) == 1


def test_one_dead_upstream_costs_only_itself(gateway, standin):
    """A port where nobody listens, one that accepts and says nothing, and one that works: the last one is not held up."""
    silent = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=lambda: [silent.accept() for _ in range(100)], daemon=True).start()
    works = standin()
    config = mqtt_uplink(free_port(), "nobody", topic="{topic}") + mqtt_uplink(silent.getsockname()[1], "silent", topic="{topic}")
    made = gateway(config + mqtt_uplink(works.port, "works", topic="{topic}"))
    assert made.ready_s < 1.5
    fill(made, 1000)
    works.wait_for(1000, 15)
    assert made.part("uplink", "works")["health"] == "good"
    eventually(lambda: made.part("uplink", "nobody")["health"] != "good", 10, lambda: made.status())
    cpu, began = made.cpu_s(), time.monotonic()
    eventually(lambda: time.monotonic() - began > 2, 5)
    assert made.cpu_s() - cpu < 0.2, "waiting for dead upstreams costs no CPU"
