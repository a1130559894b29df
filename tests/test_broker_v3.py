"""The broker keeps the promises of MQTT 3.1.1 that clients lean on, seen packet by packet and by paho.

The names follow the interoperability topics that brokers are usually measured by; the cases BR-… are in the comments.
"""

import time

import pytest

from rawmqtt import PINGREQ, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, SUBACK, Closed, Raw, ack, connect, packet, publish, text
from support import V3


@pytest.fixture
def broker(gateway):
    # "#" does not cover topics that begin with $, neither here nor in a subscription.
    everything = '["#", "$priv/#", "$dollar", "$a/#"]'
    return gateway(
        f'[anonymous]\npublish = {everything}\nsubscribe = {everything}\ndeny_subscribe = ["test/nosubscribe"]\n'
    )


def opened(broker, client_id, **options):
    return Raw(broker.port, 4).open(client_id, **options)


def test_retained_messages_come_to_new_subscribers_and_go_when_cleared(broker, client):
    publisher = client(broker.port, "retainer", version=V3)
    for qos in (0, 1, 2):
        publisher.publish(f"from/qos{qos}", f"qos {qos}", qos, retain=True)
    first = client(broker.port, "first")
    first.subscribe("from/+", 2)
    got = {m.topic: m for m in first.wait_for(3)}
    assert {t: (m.payload, m.qos, m.retain) for t, m in got.items()} == {
        f"from/qos{q}": (b"qos %d" % q, q, True) for q in (0, 1, 2)
    }
    # To one who is there already it is no retained message.
    publisher.publish("from/qos1", "changed", 1, retain=True)
    assert first.wait_for(4)[3].retain is False
    for qos in (0, 1, 2):
        publisher.publish(f"from/qos{qos}", "", qos, retain=True)
    publisher.publish("marker/m", "m", 1, retain=True)
    with opened(broker, "second") as second:
        second.subscribe("from/#")
        second.subscribe("marker/m")
        assert second.until("marker/m") == []


def test_retained_messages_come_again_at_each_subscribe(broker):
    """BR-12: [MQTT-3.8.4-3]"""
    with opened(broker, "c") as c:
        c.publish_acked("r/1", "v", retain=True)
        for _ in range(3):
            c.subscribe("r/#")
            assert c.message().retain


WILDCARDS = [
    ("sport/tennis/#", ["sport/tennis", "sport/tennis/a", "sport/tennis/a/b"], ["sport", "sport/tennisa", "Sport/tennis"]),
    ("#", ["a", "a/b", "/", " "], ["$priv/x"]),
    ("sport/+", ["sport/", "sport/x"], ["sport", "sport/x/y"]),
    ("+/+", ["/finance", "a/b", "/"], ["finance", "a/b/c"]),
    ("/+", ["/finance"], ["finance", "a/finance"]),
    ("+", ["finance"], ["/finance", "$dollar"]),
    ("a//b", ["a//b"], ["a/b", "a/x/b"]),
    ("$priv/#", ["$priv/x"], ["priv/x"]),
    ("+/priv/#", ["a/priv", "a/priv/b/c"], ["a/b/priv", "$a/priv"]),
]


@pytest.mark.parametrize("topic_filter,matching,others", WILDCARDS)
def test_wildcards_match_by_section_4_7(broker, topic_filter, matching, others):
    with opened(broker, "sub") as sub, opened(broker, "pub") as pub:
        assert sub.subscribe(topic_filter, "marker/end/of/it") == [1, 1]
        for topic in others + matching:
            pub.publish_acked(topic, topic)
        pub.publish_acked("marker/end/of/it", "")
        got = [m.topic for m in sub.until("marker/end/of/it")]
        assert got == matching


def test_an_offline_session_gets_what_was_queued_in_order(broker, client):
    sub = client(broker.port, "sleeper", clean=False)
    assert not sub.session_present
    sub.subscribe("q/#", 2)
    sub.disconnect()
    pub = client(broker.port, "pub")
    for n in range(100):
        pub.publish(f"q/{1 + n % 2}", f"{n}", 1 + n % 2)
    again = client(broker.port, "sleeper", clean=False)
    assert again.session_present
    # paho hands a QoS 2 message on at its PUBREL: order shows for each quality of its own.
    got = [(m.qos, int(m.payload)) for m in again.wait_for(100)]
    assert [n for qos, n in got if qos == 1] == list(range(0, 100, 2))
    assert [n for qos, n in got if qos == 2] == list(range(1, 100, 2))
    again.disconnect()
    # A clean connection ends the session.
    once = client(broker.port, "sleeper", clean=True)
    assert not once.session_present
    once.disconnect()
    assert not client(broker.port, "sleeper", clean=False).session_present


@pytest.mark.parametrize("qos,retain", [(0, False), (1, False), (2, True)])
def test_a_will_comes_when_the_client_vanishes_and_not_when_it_says_goodbye(broker, qos, retain):
    with opened(broker, "watcher") as watcher:
        watcher.subscribe(("wills/#", 2))
        polite = opened(broker, "polite", will=("wills/polite", "no", qos, retain))
        polite.disconnect()
        lost = opened(broker, "lost", will=("wills/lost", "gone", qos, retain))
        lost.reset()
        will = watcher.message()
        assert (will.topic, will.payload, will.qos, will.retain) == ("wills/lost", b"gone", qos, False)
    with opened(broker, "late") as late:
        late.subscribe(("wills/#", 2))
        assert [m.payload for m in late.before_pong()] == ([b"gone"] if retain else [])


def test_overlapping_subscriptions_keep_the_highest_qos(broker):
    with opened(broker, "over") as c:
        assert c.subscribe(("over/#", 2), ("over/+", 1)) == [2, 1]
        c.publish_acked("over/a", "x", 2)
        c.publish_acked("marker", "", 1)
        assert c.subscribe("marker") == [1]
        c.publish_acked("marker", "", 1)
        # One copy, or one for each subscription [MQTT-3.3.5-1].
        assert sorted(m.qos for m in c.until("marker")) in ([2], [1, 2])


def test_a_silent_client_is_cut_after_one_and_a_half_keep_alives(broker):
    """BR-26: only the client's own packets count, deliveries to it do not."""
    with opened(broker, "watcher") as watcher, opened(broker, "feeder") as feeder:
        watcher.subscribe("wills/#")
        began = time.monotonic()
        with opened(broker, "mute", keep_alive=1, will=("wills/mute", "gone", 1, False)) as mute:
            mute.subscribe(("feed", 0))
            began = time.monotonic()
            # Deliveries every 0.1 s or so, paced by waiting for the will.
            while True:
                feeder.publish("feed", "x")
                try:
                    will = watcher.message(timeout=0.1)
                    break
                except TimeoutError:
                    assert time.monotonic() - began < 5, "a mute client was kept"
            took = time.monotonic() - began
            assert will.topic == "wills/mute"
            assert 1.4 <= took <= 2.6, f"cut after {took:.2f} s with keep-alive 1 s"
            mute.expect_closed()


def test_pings_and_keep_alive_zero_hold_the_connection(broker):
    with opened(broker, "zero", keep_alive=0) as zero, opened(broker, "pinging", keep_alive=1) as pinging:
        until = time.monotonic() + 3.5
        while time.monotonic() < until:
            # Late, but within one and a half.
            with pytest.raises(TimeoutError):
                pinging.read(timeout=1.1)
            pinging.before_pong()
        assert zero.publish_acked("t", "still there") == 0
    with opened(broker, "longest", keep_alive=65535) as longest:
        longest.before_pong()


def test_what_was_not_acknowledged_comes_again_on_reconnect(broker):
    first = opened(broker, "again", clean=False)
    first.subscribe(("again/#", 2))
    with opened(broker, "pub") as pub:
        pub.publish_acked("again/1", "one", 1)
        pub.publish_acked("again/2", "two", 2)
        pub.publish_acked("again/3", "three", 2)
    got = {m.payload: m for m in [first.message(acknowledge=False) for _ in range(3)]}
    first.send(ack(PUBREC, got[b"three"].packet_id))
    first.expect(PUBREL, packet_id=got[b"three"].packet_id)
    first.reset()
    second = opened(broker, "again", clean=False)
    assert second.connack.session_present
    packets = [second.read() for _ in range(3)]
    publishes = {p.payload: p for p in packets if p.kind == PUBLISH}
    assert set(publishes) == {b"one", b"two"}
    for payload, p in publishes.items():
        assert p.dup and p.packet_id == got[payload].packet_id, p
        # [MQTT-4.4.0-1], [MQTT-4.6.0-1]
    assert [p.payload for p in packets if p.kind == PUBLISH] == [b"one", b"two"]
    releases = [p for p in packets if p.kind == PUBREL]
    assert [p.packet_id for p in releases] == [got[b"three"].packet_id]
    second.send(ack(PUBCOMP, releases[0].packet_id))
    for p in publishes.values():
        second.acknowledge(p)
    second.disconnect()
    with opened(broker, "again", clean=False) as third:
        assert third.nothing_but("again/end")


def test_a_client_id_of_no_length_needs_a_clean_session(broker):
    """BR-01: [MQTT-3.1.3-7], [MQTT-3.1.3-8]"""
    refused = Raw(broker.port, 4).open("", clean=False, expect_code=2)
    refused.expect_closed()
    one, two = opened(broker, ""), opened(broker, "")
    one.before_pong()
    two.before_pong()


def test_level_3_and_odd_but_legal_things_are_answered(broker):
    """BR-23: never a silent close; the next client connects."""
    old = Raw(broker.port, 4)
    old.send(connect(4, "x" * 40, name="MQIsdp", level=3))
    assert old.read().code in (0, 2)
    old_empty = Raw(broker.port, 4)
    old_empty.send(connect(4, "", name="MQIsdp", level=3, clean=True))
    assert old_empty.read().code == 2
    unknown = Raw(broker.port, 4)
    unknown.send(connect(4, "nine", level=9))
    assert unknown.read().code in (1, 0x84)
    unknown.expect_closed()
    long_id = Raw(broker.port, 4)
    long_id.send(connect(4, "i" * 65_535))
    assert long_id.read().code in (0, 2)
    with opened(broker, "odd") as odd:
        odd.subscribe("#")
        for topic in ("/", "a//b", " ", "t" * 65_535):
            odd.publish_acked(topic, "x")
            assert odd.message().topic == topic


def test_a_denied_filter_fails_alone_in_the_suback(broker):
    with opened(broker, "denied") as c:
        assert c.subscribe(("fine/#", 0), ("test/nosubscribe", 2), ("also/fine", 2)) == [0, 0x80, 2]


@pytest.mark.parametrize("topic_filter", ["a/#/b", "a#", "a+/b", ""])
def test_a_filter_that_is_none_is_refused(broker, topic_filter):
    with opened(broker, "c") as c:
        c.send(packet(8, 2, b"\0\1" + text(topic_filter) + b"\1"))
        try:
            answer = c.read(timeout=5)
            assert answer.kind == SUBACK and answer.codes == [0x80]
        except Closed:
            pass


def test_unsubscribe_stops_deliveries_and_is_always_answered(broker):
    with opened(broker, "c") as c:
        c.subscribe("a/#", "b/#", "marker")
        c.unsubscribe("a/#", "never/subscribed")
        for topic in ("a/1", "b/1", "marker"):
            c.publish_acked(topic, "x")
        assert [m.topic for m in c.until("marker")] == ["b/1"]


def test_qos_of_a_delivery_is_the_lower_of_both(broker):
    with opened(broker, "c") as c:
        for granted in (0, 1, 2):
            c.subscribe((f"grant/{granted}", granted))
        for granted in (0, 1, 2):
            for qos in (0, 1, 2):
                c.publish_acked(f"grant/{granted}", f"{qos}", qos)
                m = c.message()
                assert (m.payload, m.qos) == (b"%d" % qos, min(granted, qos))


INVALID = {
    "publish before connect": (False, publish(4, "a", "x")),
    "a second connect": (True, connect(4, "again")),
    "qos 3": (True, packet(PUBLISH, 6, text("a") + b"\0\1x")),
    "dup with qos 0": (True, packet(PUBLISH, 8, text("a") + b"x")),
    "a wildcard in a topic": (True, publish(4, "a/+", "x", 1, 1)),
    "an empty topic": (True, publish(4, "", "x", 1, 1)),
    "packet id 0": (True, packet(PUBLISH, 2, text("a") + b"\0\0x")),
    "U+0000 in a topic": (True, publish(4, b"a\0b", "x", 1, 1)),
    "a topic that is not UTF-8": (True, publish(4, b"a\xff", "x", 1, 1)),
    "subscribe with reserved flags": (True, packet(8, 0, b"\0\1" + text("a") + b"\1")),
    "subscribe without filters": (True, packet(8, 2, b"\0\1")),
    "subscribe with qos 3": (True, packet(8, 2, b"\0\1" + text("a") + b"\3")),
    "packet type 0": (True, b"\0\0"),
    "auth in 3.1.1": (True, b"\xf0\0"),
    "a remaining length of five bytes": (True, b"\x30\xff\xff\xff\xff\x01"),
    "connack from a client": (True, b"\x20\x02\0\0"),
    "pingreq with a body": (True, packet(PINGREQ, 0, b"x")),
}


@pytest.mark.parametrize("what", INVALID)
def test_an_invalid_packet_ends_that_connection_only(broker, what):
    after_connect, data = INVALID[what]
    with opened(broker, "bystander") as bystander:
        bystander.subscribe("#")
        bad = Raw(broker.port, 4)
        if after_connect:
            bad.open("bad")
        try:
            bad.send(data)
            said = bad.expect_closed(timeout=5)
        except Closed:
            said = []
        assert [p for p in said if p.kind in (PUBACK, PUBREC)] == [], "an invalid PUBLISH was acknowledged"
        assert bystander.before_pong() == [], "something of it was forwarded"
    with opened(broker, "next"):
        pass


def test_a_packet_above_the_limit_is_refused_before_it_is_read(broker):
    with opened(broker, "big") as big, opened(broker, "other") as other:
        # 256 MiB are announced, and never sent.
        big.send(b"\x32\xff\xff\xff\x7f" + text("a"))
        big.expect_closed(timeout=5)
        other.before_pong()
    assert broker.memory_kb() < 60_000
