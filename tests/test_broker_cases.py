"""What went wrong for people who run brokers, where no other file has it: many retained messages, births and deaths in turn, long
outages, hosts without IPv6, a storm of takeovers in the log, a subscription that is replaced.

TIDEGATE_LONG makes the long ones as long as they were reported.
"""

import os
import re
import subprocess

import pytest

from rawmqtt import SUBACK, Raw, publish, subscribe
from support import eventually, mqtt_uplink, numbered, number
from test_mutations import Bystander

LONG = os.environ.get("TIDEGATE_LONG")
MIB = 1024


# -- BR-14 --------------------------------------------------------------------------------------------------------------


def test_a_slow_subscriber_gets_every_retained_message(gateway):
    """BR-14: a stock client, then one that takes 200 at a time; neither misses one, the others do not notice."""
    count = 100_000 if LONG else 20_000
    made = gateway()
    with Raw(made.port, 4, timeout=60).open("keeper") as p:
        for first in range(0, count, 1000):
            p.send(b"".join(publish(4, f"kept/{n % 50}/{n}", b"%d" % n, 0, retain=True) for n in range(first, first + 1000)))
            p.before_pong()
    before = made.memory_kb()
    bystander = Bystander(made.port)
    bystander.start()
    stock = subprocess.run(
        ["mosquitto_sub", "-p", str(made.port), "-t", "#", "-q", "1", "-C", str(count), "-W", "60", "-F", "%t %r"],
        capture_output=True,
        timeout=90,
    )
    lines = stock.stdout.decode().split("\n")[:-1]
    assert len(set(lines)) == count and all(line.endswith(" 1") for line in lines), f"{len(set(lines))} of {count}: {stock.stderr}"
    with Raw(made.port, 5, timeout=30).open("slow", props={"receive_maximum": 200}) as slow:
        slow.subscribe(("kept/#", 1))
        seen = set()
        while len(seen) < count:
            some = [slow.message(acknowledge=False) for _ in range(min(200, count - len(seen)))]
            seen.update(m.topic for m in some)
            for m in some:
                slow.acknowledge(m)
        assert slow.before_pong() == []
    print(f"{count} retained, {before} kB resident, {made.memory_kb()} kB behind two that read them all; bystander {bystander.finish()}")
    assert made.memory_kb() - before < 8 * MIB


# -- BR-28 --------------------------------------------------------------------------------------------------------------


def test_deaths_and_births_never_cross(gateway, upstream, recorder):
    """BR-28 ×100: will n, birth n, a reset, and at once the same client with n + 1. A live observer, a session and the route see
    DEATH n once, its bytes unchanged, before BIRTH n + 1."""
    made = gateway(mqtt_uplink(upstream.port, route_from='["spBv1.0/#"]', topic="{topic}"))
    far = recorder(upstream.port, "spBv1.0/#")
    live = Raw(made.port, 4, timeout=20).open("live")
    live.subscribe("spBv1.0/#")
    with Raw(made.port, 4).open("session", clean=False) as session:
        session.subscribe("spBv1.0/#")
    wanted = []
    for n in range(100):
        death = ("spBv1.0/plant/NDEATH/node", b"\x08\x00\xff%d" % n)
        birth = ("spBv1.0/plant/NBIRTH/node", b"\x08\x01\xff%d" % n)
        node = Raw(made.port, 4).open("node", will=(*death, 1, False))
        node.publish_acked(*birth, qos=1)
        node.reset()
        wanted += [birth, death]
    with Raw(made.port, 4, timeout=20).open("session", clean=False) as session:
        for who in (live, session):
            got = [(m.topic, m.payload) for m in who.messages(200)]
            assert got == wanted, next((n, a, b) for n, (a, b) in enumerate(zip(got, wanted)) if a != b)
    eventually(lambda: len(far.arrivals) >= 200, 20, lambda: f"{len(far.arrivals)} upstream")
    assert far.arrivals == wanted


def test_a_hosts_retained_state_and_its_will_survive_a_restart(gateway):
    """BR-28: STATE online is retained, its will says offline; the broker is killed while the host is connected."""
    made = gateway()
    host = Raw(made.port, 5).open("host", will=("STATE/scada", b"offline", 1, True))
    host.publish_acked("STATE/scada", b"online", 1, retain=True)
    made.kill9()
    made.start()
    observer = Raw(made.port, 5, timeout=20).open("observer")
    observer.subscribe("STATE/#")
    first = observer.message()
    assert (first.payload, first.retain) == (b"online", True), "as it was until the will is due"
    assert observer.message().payload == b"offline"
    # The host returns and says so.
    Raw(made.port, 5).open("host", will=("STATE/scada", b"offline", 1, True)).publish_acked("STATE/scada", b"online", 1, retain=True)
    assert observer.message().payload == b"online"


# -- ME-01 --------------------------------------------------------------------------------------------------------------


def test_an_outage_costs_disk_and_no_memory(gateway):
    """ME-01: QoS 2 into a dead uplink and to a session that is away, a kill in the middle; memory flat, ready at once, all there."""
    count = 3_000 * 600 if LONG else 60_000
    made = gateway(mqtt_uplink(1, "dead", topic="{topic}"))
    with Raw(made.port, 4).open("away", clean=False) as away:
        away.subscribe(("out/#", 2))
    figures = []

    def publish_some(first, last):
        p = Raw(made.port, 5, timeout=60).open("producer")
        for at in range(first, last, 500):
            ids = range(1, 501)
            p.send(b"".join(publish(5, "out/x", numbered(at + i - 1, 200), 2, i) for i in ids))
            for i in ids:
                p.expect(5, packet_id=i)
            p.send(b"".join(b"\x62\x02" + i.to_bytes(2, "big") for i in ids))
            for i in ids:
                p.expect(7, packet_id=i)
            if at % 5000 == 0:
                figures.append(made.memory_kb())
        p.close()

    publish_some(0, count // 2)
    made.kill9()
    made.start()
    assert made.ready_s < 1.5, f"ready after {made.ready_s:.2f} s"
    publish_some(count // 2, count)
    third = len(figures) // 3
    print(f"{count} messages: resident {figures[0]} … {figures[-1]} kB, at most {max(figures)}; ready after {made.ready_s * 1000:.0f} ms")
    assert max(figures) < 40 * MIB
    assert max(figures[-third:]) - max(figures[third:-third]) < 4 * MIB
    with Raw(made.port, 4, timeout=30).open("away", clean=False) as away:
        for n in range(2_000):
            m = away.message()
            assert number(m.payload) == n, f"{m.payload[:10]} where {n} was due"


# -- ME-05 --------------------------------------------------------------------------------------------------------------


def test_a_host_without_ipv6_is_served_on_ipv4(gateway):
    """ME-05, in a network namespace of the gateway's own: "localhost" and "0.0.0.0" bind what there is; [::1] says what is missing."""
    made = gateway(start=False)
    text = made.path.read_text().replace(f"127.0.0.1:{made.port}", f"localhost:{made.port}")
    made.write_config(text + f'[[listener]]\nbind = "[::1]:{made.port + 1}"\n')
    script = 'echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6 && ip link set lo up && exec "$0" "$@"'
    env = {"PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    made.spawn(prefix=("unshare", "--map-root-user", "--net", "sh", "-c", script), env=env)

    def parts():
        assert made.process.poll() is None, made.log
        try:
            return {name: p for (kind, name), p in made.status().items() if kind == "listener"}
        except AssertionError:
            return None

    listeners = eventually(lambda: (p := parts()) and "failed" in {x["health"] for x in p.values()} and p, 15, lambda: made.log)
    good = [name for name, p in listeners.items() if p["health"] == "good"]
    bad = [name for name, p in listeners.items() if p["health"] == "failed"]
    assert len(bad) == 1 and str(made.port + 1) in bad[0] and good, listeners
    inside = ["nsenter", "--user", "--net", "--preserve-credentials", "-t", str(made.pid)]
    done = subprocess.run([*inside, "mosquitto_pub", "-h", "127.0.0.1", "-p", str(made.port), "-q", "1", "-t", "t", "-m", "x"], capture_output=True, timeout=20)
    assert done.returncode == 0, done.stderr


# -- BR-19 --------------------------------------------------------------------------------------------------------------


def test_a_storm_of_takeovers_is_a_few_lines_that_name_both_addresses(gateway):
    made = gateway()
    last = None
    for _ in range(300):
        following = Raw(made.port, 4).open("twin")
        if last:
            last.close()
        last = following
    lines = [line for line in made.log.splitlines() if "twin" in line]
    assert 1 <= len(lines) < 20, lines[:30]
    assert any(len(set(re.findall(r"127\.0\.0\.1:\d+", line))) == 2 for line in lines), lines


# -- What a SUBSCRIBE replaces ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True], ids=["clean", "durable"])
def test_a_renewed_subscription_replaces_every_option(gateway, durable):
    """[MQTT-3.8.4-3]: QoS, no local, retain as published and the identifier; live and from the log."""
    made = gateway()
    with Raw(made.port, 5).open("c", props={"session_expiry": 60} if durable else {}) as c:
        def renew(bits, identifier):
            c.send(subscribe(5, c.new_id(), [("r/#", bits)], {"subscription_id": identifier}))
            c.expect(SUBACK)

        def own():
            c.publish_acked("r/x", b"x", 1, retain=True)
            return [(m.qos, m.retain, m.properties["subscription_id"]) for m in (c.message(),)]

        handling_2 = 0x20
        renew(1 | handling_2, 1)
        assert own() == [(1, False, [1])]
        renew(1 | 4 | handling_2, 2)
        c.publish_acked("r/x", b"not to itself", 1)
        renew(0 | 8 | handling_2, 3)
        assert own() == [(0, True, [3])]
        renew(2 | handling_2, 4)
        assert own() == [(1, False, [4])]
