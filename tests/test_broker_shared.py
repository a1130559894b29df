"""Shared subscriptions: they work, or the CONNACK says that they do not and a SUBSCRIBE is told the same."""

import pytest

from rawmqtt import DISCONNECT, PUBACK, Raw, publish, subscribe
from support import eventually


@pytest.fixture
def broker(gateway):
    return gateway()


def opened(broker, client_id, **options):
    return Raw(broker.port, 5).open(client_id, **options)


def absent(broker):
    """Announced as absent: then it is refused with 0x9E and nothing else."""
    with opened(broker, "asker") as c:
        if c.connack.properties.get("shared_available", 1) == 1:
            return False
        assert c.subscribe("$share/group/t/#", "plain") == [0x9E, 1]
        assert Raw(broker.port, 4).open("v4").subscribe("$share/group/t/#") == [0x80]
        return True


def test_a_shared_subscription_hands_each_message_to_one(broker):
    if absent(broker):
        return
    members = [opened(broker, f"m{n}") for n in range(3)]
    with opened(broker, "plain") as plain, opened(broker, "pub") as pub:
        for m in members:
            assert m.subscribe("$share/group/t/#") == [1]
        plain.subscribe("t/#")
        for n in range(300):
            pub.publish_acked("t/x", f"{n}")
        got = []

        def collect():
            for m in members:
                got.append([int(p.payload) for p in m.before_pong()])
            return sum(len(g) for g in got) >= 300

        eventually(collect, 10, "300 among the three")
        assert sorted(n for g in got for n in g) == list(range(300))
        assert all(sum(len(g) for g in got[i::3]) > 0 for i in range(3)), "each had a share"
        assert [int(m.payload) for m in plain.messages(300)] == list(range(300))


def test_what_a_leaving_member_held_goes_to_another(broker):
    """BR-17: [4.8.2]; three clean members, one is cut while it holds unacknowledged messages."""
    if absent(broker):
        return
    members = [opened(broker, f"m{n}", props={"receive_maximum": 10}) for n in range(3)]
    for m in members:
        m.subscribe("$share/g/t")
    done = set()
    with opened(broker, "pub") as pub:
        pub.send(b"".join(publish(5, "t", f"{n}", 1, n + 1) for n in range(500)))
        held = [members[0].message(acknowledge=False) for _ in range(10)]
        assert len(held) == 10
        members[0].reset()
        for n in range(500):
            assert pub.expect(PUBACK).code in (0, 0x10)

        def collect():
            for m in members[1:]:
                done.update(int(p.payload) for p in m.before_pong())
            return len(done) == 500

        eventually(collect, 10, lambda: f"500 processed by somebody; missing {sorted(set(range(500)) - done)[:20]}")


def test_a_retained_message_does_not_come_through_a_shared_subscription(broker):
    if absent(broker):
        return
    with opened(broker, "c") as c:
        c.publish_acked("t/r", "v", retain=True)
        c.subscribe("$share/g/t/#")
        assert c.before_pong() == []


def test_a_shared_subscription_with_no_local_is_a_protocol_error(broker):
    """BR-25: [MQTT-3.8.3-4]"""
    with opened(broker, "c") as c:
        c.send(subscribe(5, 1, [("$share/g/t", 1 | 4)]))
        answer = c.read()
        assert (answer.kind, answer.code) == (DISCONNECT, 0x82) or answer.codes == [0x9E]
