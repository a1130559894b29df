"""What the broker promises in either version: takeover, exactly once, acknowledgements in order, and all of it over restarts."""

import random
import time

import pytest

from rawmqtt import DISCONNECT, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, SUBACK, Closed, Raw, ack, connect, publish, subscribe
from support import new_seed

VERSIONS = [4, 5]


@pytest.fixture
def broker(gateway):
    return gateway()


def opened(broker, client_id, version=4, durable=False, **options):
    """`durable`: a session that outlives the connection."""
    if durable:
        options["clean"] = False
        if version == 5:
            options["props"] = {"session_expiry": 3600, **options.get("props", {})}
    return Raw(broker.port, version).open(client_id, **options)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_takeover_closes_the_old_connection_and_publishes_its_will_once(broker, version):
    """BR-03: [MQTT-3.1.4-2], [MQTT-3.1.2-8]"""
    with opened(broker, "watcher") as watcher:
        watcher.subscribe("wills/#", "marker")
        old = opened(broker, "twin", version, will=("wills/old", "old", 1, False))
        new = opened(broker, "twin", version, will=("wills/new", "new", 1, False))
        said = old.expect_closed(timeout=5)
        if version == 5:
            assert [p.code for p in said if p.kind == DISCONNECT] == [0x8E]
        new.before_pong()
        new.disconnect()
        with opened(broker, "pub") as pub:
            pub.publish_acked("marker", "")
        assert [m.payload for m in watcher.until("marker")] == [b"old"]


@pytest.mark.parametrize("version", VERSIONS)
def test_a_new_connection_does_not_wait_for_a_dead_one(broker, version):
    """BR-06: the old one reads no more and its buffers are full; keep-alive 600."""
    stuck = opened(broker, "dead", version, keep_alive=600)
    stuck.subscribe(("flood", 0))
    with opened(broker, "pub") as pub:
        for _ in range(400):
            pub.publish("flood", b"x" * 50_000)
        pub.before_pong()
    began = time.monotonic()
    with opened(broker, "dead", version) as again:
        took = time.monotonic() - began
        assert took < 1, f"CONNACK after {took:.2f} s"
        assert not again.connack.session_present
        assert again.before_pong() == [], "a clean session starts empty"
    stuck.close()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_repeated_qos_2_publish_is_answered_and_delivered_once(broker, version):
    """BR-08: [MQTT-4.3.3-2] and its kin"""
    with opened(broker, "sub") as sub, opened(broker, "pub", version) as pub:
        sub.subscribe(("twice", 2), ("marker", 1))
        for n in range(5):
            pub.publish("twice", "once", 2, packet_id=7, dup=n > 0)
        for _ in range(5):
            assert pub.expect(PUBREC, packet_id=7).code == 0
        pub.send(ack(PUBREL, 7))
        pub.expect(PUBCOMP, packet_id=7)
        # The id is free: the same packet is a new message now.
        pub.publish_acked("twice", "another", 2, packet_id=7)
        pub.publish_acked("marker", "")
        assert [m.payload for m in sub.until("marker")] == [b"once", b"another"]


@pytest.mark.parametrize("version", VERSIONS)
def test_acknowledgements_leave_in_the_order_of_the_publishes(broker, version):
    """[MQTT-4.6.0-2]: one that needs no commit still waits behind one that does."""
    with opened(broker, "durable", 4, durable=True) as sub:
        sub.subscribe(("stored/#", 2))
    rng = random.Random(new_seed("acknowledgement order"))
    with opened(broker, "pub", version) as pub:
        # QoS 2 ids stay in use until PUBCOMP, and count against what the broker grants.
        count = min(400, pub.connack.properties.get("receive_maximum", 65535))
        sent, data = [], b""
        for n in range(1, count + 1):
            qos = rng.choice((1, 1, 2))
            topic = rng.choice(("stored/x", "nobody/wants"))
            data += publish(version, topic, f"{n}", qos, n)
            sent.append((PUBACK if qos == 1 else PUBREC, n))
        pub.send(data)
        got = [pub.read() for _ in sent]
        assert [(p.kind, p.packet_id) for p in got] == sent


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("how", ["restart", "kill"])
def test_qos_2_ids_survive_a_restart(broker, version, how):
    """A message whose PUBREC is out is not delivered again when its publisher repeats it after the restart."""
    sub = opened(broker, "sub", 4, durable=True)
    sub.subscribe(("exactly", 2))
    sub.disconnect()
    pub = opened(broker, "pub", version, durable=True)
    pub.publish("exactly", "one", 2, packet_id=9)
    pub.expect(PUBREC, packet_id=9)
    if how == "restart":
        broker.restart()
    else:
        broker.kill9()
        broker.start()
    with opened(broker, "pub", version, durable=True) as pub:
        assert pub.connack.session_present, "the publisher's session survived"
        pub.publish("exactly", "one", 2, packet_id=9, dup=True)
        assert pub.expect(PUBREC, packet_id=9).code == 0
        pub.send(ack(PUBREL, 9))
        pub.expect(PUBCOMP, packet_id=9)
        pub.publish_acked("exactly", "two", 2)
    with opened(broker, "sub", 4, durable=True) as sub:
        assert sub.connack.session_present
        assert [m.payload for m in sub.messages(2)] == [b"one", b"two"]
        assert sub.nothing_but("exactly")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_pubrel_for_an_unknown_id_is_answered(broker, version):
    """After a restart in between, the client only has the PUBREL left [MQTT-4.3.3]."""
    with opened(broker, "pub", version) as pub:
        pub.send(ack(PUBREL, 77))
        answer = pub.expect(PUBCOMP, packet_id=77)
        assert answer.code == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_a_subscriber_that_breaks_off_at_any_step_gets_every_message(broker, version):
    """BR-15: 100 cycles of connect, one QoS 2 message, drop at a random step. Nothing lost, nothing twice, nothing stuck."""
    rng = random.Random(new_seed("drop at a random step"))
    opened(broker, "deaf", version, durable=True).subscribe(("cycle", 2))
    got = []
    with opened(broker, "pub") as pub:
        for n in range(100):
            sub = opened(broker, "deaf", version, durable=True)
            assert sub.connack.session_present
            pub.publish_acked("cycle", f"{n}", 2)
            self_drop(sub, rng.choice(("at once", "after publish", "after pubrec", "after pubrel", "done")), got)
    with opened(broker, "deaf", version, durable=True) as sub:
        self_drop(sub, "drain", got, keep=True)
        assert sub.nothing_but("cycle")
    numbers = [int(p) for p in got]
    assert sorted(set(numbers)) == list(range(100)), f"missing {set(range(100)) - set(numbers)}"
    assert len(numbers) == len(set(numbers)), "one was taken twice at QoS 2"


def self_drop(sub, step, got, keep=False):
    """Handles what comes, up to `step` of the newest message, then resets. `got` holds what this client has taken: at its
    PUBREC, as a client does; `sub.known` are ids it has taken and not completed."""
    try:
        if step == "at once":
            return
        while True:
            p = sub.read(timeout=2)
            if p.kind == PUBLISH:
                if step == "after publish":
                    return
                if (p.packet_id, p.payload) not in _taken or not p.dup:
                    _taken.add((p.packet_id, p.payload))
                    got.append(p.payload)
                sub.send(ack(PUBREC, p.packet_id))
                if step == "after pubrec":
                    return
            elif p.kind == PUBREL:
                if step == "after pubrel":
                    return
                _taken.difference_update({t for t in _taken if t[0] == p.packet_id})
                sub.send(ack(PUBCOMP, p.packet_id))
                if step == "done":
                    return
    except TimeoutError:
        assert step == "drain", f"nothing came at step {step!r}"
    finally:
        if not keep:
            sub.reset()


_taken = set()


@pytest.fixture(autouse=True)
def _forget_taken():
    _taken.clear()


@pytest.mark.parametrize("version", VERSIONS)
def test_a_client_publishes_on_while_earlier_messages_await_their_commit(broker, version):
    """1,000 QoS 1 messages in one write: all acknowledged, in order, and sooner than a commit each would take."""
    with opened(broker, "durable", 4, durable=True) as sub:
        sub.subscribe("stored")
    with opened(broker, "pub", version) as pub:
        began = time.monotonic()
        assert pub.connack.properties.get("receive_maximum", 65535) >= 1000, "less would hold a fast client back"
        pub.send(b"".join(publish(version, "stored", f"{n}", 1, n) for n in range(1, 1001)))
        assert [pub.expect(PUBACK).packet_id for _ in range(1000)] == list(range(1, 1001))
        took = time.monotonic() - began
        print(f"1,000 outstanding acknowledged in {took * 1000:.0f} ms")
        assert took < 2
    with opened(broker, "durable", 4, durable=True) as sub:
        assert [int(m.payload) for m in sub.messages(1000)] == list(range(1, 1001))


def test_what_comes_in_pieces_or_in_one_write_is_the_same(broker):
    with opened(broker, "pieces") as c:
        data = subscribe(4, 1, [("a", 1)]) + publish(4, "a", "x" * 300, 1, 2) + publish(4, "a", "y", 1, 3)
        for index in range(len(data)):
            c.send(data[index : index + 1])
        assert c.expect(SUBACK).codes == [1]
        assert [m.payload for m in c.messages(2)] == [b"x" * 300, b"y"]


def test_retained_messages_sessions_and_wills_survive_a_restart(broker):
    """BR-24 and the retained part of wish 4: also a session on $SYS/# and on '#'."""
    with opened(broker, "keeper") as c:
        c.publish_acked("keep/1", "retained", retain=True)
    for name, topic_filter in (("sys", "$SYS/#"), ("all", "#")):
        opened(broker, name, 4, durable=True).subscribe((topic_filter, 2))
    for how in ("stop", "kill"):
        broker.stop() if how == "stop" else broker.kill9()
        broker.start()
        with opened(broker, "all", 4, durable=True) as c:
            assert c.connack.session_present
            with opened(broker, "pub") as pub:
                pub.publish_acked("x", how)
            got = []
            while not got or got[-1].topic != "x":
                got.append(c.message())
            assert [m for m in got if m.topic.startswith("$")] == [], "# never carries $-topics [MQTT-4.7.2-1]"
        with opened(broker, "reader") as c:
            c.subscribe("keep/#")
            assert c.message().payload == b"retained"


def test_what_a_subscriber_acknowledged_does_not_come_again_after_a_stop(broker):
    sub = opened(broker, "sub", 4, durable=True)
    sub.subscribe("t")
    with opened(broker, "pub") as pub:
        for n in range(50):
            pub.publish_acked("t", f"{n}")
    assert [int(m.payload) for m in sub.messages(50)] == list(range(50))
    # The acknowledgements are in the broker's hands once it has answered a ping behind them.
    assert sub.before_pong() == []
    sub.disconnect()
    broker.stop()
    broker.start()
    with opened(broker, "sub", 4, durable=True) as sub:
        assert sub.nothing_but("t"), "after an orderly stop nothing acknowledged comes again"


@pytest.mark.parametrize("version", VERSIONS)
def test_two_devices_with_one_id_do_not_disturb_others(broker, version):
    """BR-19, 3 s of it: the newest wins each time, others are served."""
    until = time.monotonic() + 3
    count = 0
    with opened(broker, "bystander", version) as other:
        last = None
        slowest = 0.0
        while time.monotonic() < until:
            current = opened(broker, "twin", version)
            count += 1
            if last:
                last.expect_closed(timeout=2)
            last = current
            began = time.monotonic()
            other.publish_acked("t", "x")
            slowest = max(slowest, time.monotonic() - began)
        last.close()
    print(f"{count} takeovers, slowest PUBACK of the bystander {slowest * 1000:.1f} ms")
    assert count > 20 and slowest < 0.5
    assert "twin" in broker.log, "the id is named"


def test_garbage_and_half_packets_leave_the_broker_as_it_was(broker):
    """Random bytes, and valid streams with random bytes changed, cut off anywhere."""
    rng = random.Random(new_seed("garbage"))
    valid = connect(4, "g") + subscribe(4, 1, [("#", 1)]) + publish(4, "a/b", "x" * 30, 1, 2) + b"\xc0\0"
    with opened(broker, "bystander") as other:
        for n in range(300):
            raw = Raw(broker.port)
            data = bytearray(rng.randbytes(rng.randrange(1, 200)) if n % 3 == 0 else valid)
            if n % 3:
                for _ in range(rng.randrange(1, 4)):
                    data[rng.randrange(len(data))] = rng.randrange(256)
                data = data[: rng.randrange(1, len(data) + 1)]
            try:
                raw.send(bytes(data))
            except Closed:
                pass
            raw.reset()
        other.before_pong()
    assert broker.alive()
    assert "panicked" not in broker.log


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("an_older_one_is_open", [False, True])
def test_a_qos_2_message_that_was_completed_does_not_come_again_after_a_kill(broker, version, an_older_one_is_open):
    """Its id is free only in the commit in which the session's place in the log passes it."""

    def back():
        props = {"session_expiry": 3600} if version == 5 else None
        return Raw(broker.port, version).open("sub", clean=False, props=props)

    sub = back()
    sub.subscribe(("t", 2))
    with Raw(broker.port, version).open("pub") as pub:
        if an_older_one_is_open:
            pub.publish_acked("t", "old", 1)
            old = sub.message(acknowledge=False)
        pub.publish_acked("t", "new", 2)
        assert sub.message().payload == b"new"
        assert sub.before_pong() == []
        # It is on disk with the commit of what came after it.
        pub.publish_acked("other", "x", 1, retain=True)
        broker.kill9()
        broker.start()
        sub = back()
        if an_older_one_is_open:
            assert (sub.message().payload, old.payload) == (b"old", b"old")
    with Raw(broker.port, version).open("pub") as pub:
        pub.publish_acked("t", "end", 2)
        assert sub.message().payload == b"end"
