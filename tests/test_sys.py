"""$SYS: the topics that mosquitto's users know. Values at once for who begins to listen, never in the log, never for '#'."""

import json
import re
import subprocess

import pytest

from rawmqtt import PUBLISH, Raw
from support import eventually
from test_reload import change

FAST = '[broker]\nsys_interval = "1 s"\n'
# What mosquitto 2.0 publishes, but for its heap.
KNOWN = """version uptime clients/total clients/maximum clients/connected clients/active clients/disconnected clients/inactive clients/expired
messages/received messages/sent messages/stored store/messages/count store/messages/bytes subscriptions/count
publish/messages/received publish/messages/sent publish/messages/dropped publish/bytes/received publish/bytes/sent
bytes/received bytes/sent load/messages/received/1min load/messages/sent/5min load/publish/received/15min load/publish/sent/1min
load/publish/dropped/1min load/bytes/received/1min load/bytes/sent/1min load/sockets/1min load/connections/1min""".split()


def values(raw, *filters):
    raw.subscribe(*(filters or ("$SYS/#",)))
    return {p.topic: p for p in raw.before_pong() if p.kind == PUBLISH}


def test_every_known_topic_comes_at_once(gateway):
    made = gateway('[broker]\nsys_interval = "1 h"\n')
    with Raw(made.port, 5).open("c") as c:
        got = values(c)
        for topic in KNOWN + ["retained messages/count"]:
            assert f"$SYS/broker/{topic}" in got, topic
        assert all(p.retain and p.qos == 0 for p in got.values())
        assert got["$SYS/broker/version"].payload.startswith(b"tidegate version ")
        assert re.fullmatch(rb"\d+ seconds", got["$SYS/broker/uptime"].payload)
        assert got["$SYS/broker/clients/connected"].payload == b"1" and got["$SYS/tidegate/gateway"].payload == b"line-4"


def test_stock_clients_see_them(gateway):
    made = gateway(FAST)
    done = subprocess.run(
        ["mosquitto_sub", "-p", str(made.port), "-t", "$SYS/broker/version", "-C", "1", "-W", "10"], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0 and done.stdout.startswith("tidegate version"), done


def test_the_numbers_are_right_and_go_on(gateway):
    made = gateway(FAST)
    with Raw(made.port, 5).open("sub") as sub, Raw(made.port, 4).open("away", clean=False) as away, Raw(made.port, 5).open("c") as c:
        sub.subscribe("t")
        away.subscribe("q")
        away.disconnect()
        for _ in range(10):
            c.publish_acked("t", "12345")
        assert len(sub.messages(10)) == 10
        c.publish_acked("r", "123", retain=True)
        c.publish_acked("q", "waits")
        seen = {}
        assert c.subscribe("$SYS/#") == [1]

        def right():
            for p in c.before_pong():
                seen[p.topic.removeprefix("$SYS/broker/")] = p.payload.decode()
            wanted = {
                "clients/connected": "2", "clients/total": "3", "clients/disconnected": "1", "clients/maximum": "3", "subscriptions/count": "3",
                "publish/messages/received": "12", "publish/bytes/received": "58", "retained messages/count": "1",
            }
            load = float(seen["load/publish/received/1min"])
            return load > 0 and {k: seen.get(k) for k in wanted} == wanted and int(seen["publish/messages/sent"]) >= 10 and int(seen["bytes/received"]) > 100

        eventually(right, 10, lambda: str(seen), 0.1)
        # 12 PUBLISH, 3 CONNECT, 4 SUBSCRIBE, 10 PUBACK, a DISCONNECT and pings.
        assert int(seen["messages/received"]) >= 20 and int(seen["messages/sent"]) >= 20


def test_changes_come_without_retain_and_only_changes(gateway):
    made = gateway(FAST)
    with Raw(made.port, 5).open("c") as c:
        values(c)
        uptime = [p for p in (c.message(timeout=10) for _ in range(20)) if p.topic == "$SYS/broker/uptime"]
        assert uptime and all(not p.retain for p in uptime)
        assert "$SYS/broker/version" not in {p.topic for p in c.before_pong()}


def test_a_wildcard_at_the_beginning_does_not_match_and_nobody_writes(gateway):
    made = gateway(FAST)
    with Raw(made.port, 5).open("all") as everything, Raw(made.port, 5).open("c") as c:
        everything.subscribe("#", "+/broker/#")
        c.subscribe("$SYS/broker/uptime")
        assert c.message(timeout=10) and c.message(timeout=10), "two rounds passed"
        assert c.publish_acked("$SYS/broker/uptime", "x", retain=True) == 0x87
        assert everything.before_pong() == []


def test_rules_hold_for_them(gateway):
    made = gateway(FAST + '[anonymous]\ndeny_subscribe = ["$SYS/broker/bytes/#"]\n')
    with Raw(made.port, 5).open("c") as c:
        got = values(c, "$SYS/broker/#")
        assert "$SYS/broker/uptime" in got and "$SYS/broker/bytes/sent" not in got
        assert c.subscribe("$SYS/broker/bytes/sent") == [0x87]


def test_a_session_on_sys_survives_and_logs_nothing(gateway):
    """BR-24: a persistent session on $SYS/# at QoS 2 and on '#', 20 s of it, stops and kills."""
    made = gateway(FAST)
    kept = {"session_expiry": 3600}
    with Raw(made.port, 5).open("sub", clean=False, props=kept) as sub:
        sub.subscribe(("$SYS/#", 2), "#")
        sub.message(timeout=10)
        sub.disconnect()
    with Raw(made.port, 5).open("clock") as clock:
        clock.subscribe("$SYS/broker/uptime")
        clock.messages(3, timeout=10)
    assert made.status_all()["streams"][0]["messages"] == 0 and made.part("broker", "broker")["counters"]["retained"] == 0
    made.restart()
    made.kill9()
    made.start()
    with Raw(made.port, 5).open("sub", clean=False, props=kept) as sub:
        assert sub.connack.session_present
        assert sub.message(timeout=10).topic.startswith("$SYS/")


def test_the_interval_follows_a_reload_and_zero_is_none(gateway):
    made = gateway('[broker]\nsys_interval = "0 s"\n')
    with Raw(made.port, 5).open("c") as c:
        assert values(c) == {}
        change(made, made.path.read_text().replace('"0 s"', '"1 s"'))
        assert c.message(timeout=10).topic.startswith("$SYS/")
        change(made, made.path.read_text().replace('"1 s"', '"0 s"'))
        c.before_pong()
        assert values(c) == {}


def test_tail_shows_them(gateway):
    from test_cli import cli

    made = gateway(FAST)
    code, out, _ = cli(made, "tail", "$SYS/broker/uptime", "-n", "1", "--json")
    assert code == 0 and json.loads(out)["topic"] == "$SYS/broker/uptime"
