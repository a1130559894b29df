"""Packet by packet: what the public conformance reports of 2026 found in other brokers, what mosquitto's own test scripts
promise, and what our codec lets through and we must not. docs/conformance.md says where each comes from."""

import struct
import time

import pytest

from rawmqtt import CONNACK, DISCONNECT, PINGREQ, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, SUBACK, UNSUBACK, Raw, ack, connect, packet, properties, publish, subscribe, text, unsubscribe
from support import eventually

VERSIONS = [4, 5]
AS_PUBLISHED = 8


@pytest.fixture
def broker(gateway):
    return gateway()


def opened(broker, client_id, version=5, **options):
    return Raw(broker.port, version).open(client_id, **options)


def lasting(broker, client_id, version=5, **options):
    props = {"session_expiry": 3600, **options.pop("props", {})}
    return Raw(broker.port, version).open(client_id, clean=False, props=props if version == 5 else None, **options)


def again(broker, how):
    if how == "restart":
        broker.restart()
    elif how == "kill":
        broker.kill9()
        broker.start()


# -- Sessions that are resumed: bifromq#281, rmqtt#456 #513, nanomq#2412, vernemq#2551 #2552, mosquitto#1454.


@pytest.mark.parametrize("how", ["reconnect", "kill"])
@pytest.mark.parametrize("version", VERSIONS)
def test_an_owed_pubrel_comes_again_and_the_message_does_not(broker, version, how):
    sub = lasting(broker, "sub", version)
    sub.subscribe(("t", 2))
    with opened(broker, "pub", version) as pub:
        pub.publish_acked("t", "x", 2)
    first = sub.message(acknowledge=False)
    sub.send(ack(PUBREC, first.packet_id))
    sub.expect(PUBREL)
    sub.reset()
    again(broker, how)
    sub = lasting(broker, "sub", version)
    owed = sub.read()
    assert (owed.kind, owed.packet_id, owed.flags) == (PUBREL, first.packet_id, 2)
    sub.send(ack(PUBCOMP, first.packet_id))
    assert sub.nothing_but("t")


@pytest.mark.parametrize("how", ["reconnect", "kill"])
@pytest.mark.parametrize("received", [False, True])
def test_expiry_does_not_end_a_qos_2_exchange_that_has_begun(broker, how, received):
    """It is session state by then, not a message that waits."""
    sub = lasting(broker, "sub")
    sub.subscribe(("t", 2))
    with opened(broker, "pub") as pub:
        pub.publish_acked("t", "x", 2, props={"message_expiry": 1})
    first = sub.message(acknowledge=False)
    if received:
        sub.send(ack(PUBREC, first.packet_id))
        sub.expect(PUBREL)
    sub.reset()
    began = time.monotonic()
    again(broker, how)
    eventually(lambda: time.monotonic() - began > 2.1, 5)
    sub = lasting(broker, "sub")
    owed = sub.read()
    assert (owed.kind, owed.packet_id) == (PUBREL if received else PUBLISH, first.packet_id)
    if not received:
        assert (owed.dup, owed.payload) == (True, b"x")


@pytest.mark.parametrize("how", ["reconnect", "kill"])
@pytest.mark.parametrize("version", VERSIONS)
def test_a_repeated_pubrel_is_answered_as_the_first(broker, version, how):
    pub = lasting(broker, "pub", version)
    pub.publish_acked("t", "x", 2, packet_id=7)
    pub.reset()
    again(broker, how)
    pub = lasting(broker, "pub", version)
    pub.send(ack(PUBREL, 7))
    assert pub.expect(PUBCOMP, packet_id=7).code == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_an_unfinished_publish_is_delivered_once_over_a_reconnect(broker, version):
    with opened(broker, "sub", version) as sub:
        sub.subscribe(("t", 2))
        pub = lasting(broker, "pub", version)
        pub.publish("t", "x", 2, packet_id=7)
        pub.expect(PUBREC)
        pub.reset()
        pub = lasting(broker, "pub", version)
        assert pub.connack.session_present
        for _ in range(5):
            # mosquitto#3599 #3602 #3699: each repeat has its PUBREC.
            pub.publish("t", "x", 2, packet_id=7, dup=True)
            assert pub.expect(PUBREC, packet_id=7).code == 0
        pub.send(ack(PUBREL, 7))
        pub.expect(PUBCOMP, packet_id=7)
        assert sub.message().payload == b"x"
        assert sub.nothing_but("t")


def test_a_publish_with_dup_that_was_never_seen_is_delivered(broker):
    """emqx#18441"""
    with opened(broker, "sub") as sub, opened(broker, "pub") as pub:
        sub.subscribe(("t", 2))
        for qos in (1, 2):
            pub.publish_acked("t", f"{qos}", qos, dup=True)
        got = sub.messages(2)
        assert [(m.payload, m.dup) for m in got] == [(b"1", False), (b"2", False)], "DUP is not passed on [MQTT-3.3.1-3]"


@pytest.mark.parametrize("how", ["reconnect", "kill"])
def test_retain_as_published_holds_for_what_was_queued(broker, how):
    """vernemq#2551"""
    c = lasting(broker, "c")
    c.subscribe(("kept", 1 | AS_PUBLISHED), ("plain", 1))
    c.disconnect()
    with opened(broker, "pub") as pub:
        for topic in ("kept", "plain"):
            pub.publish_acked(topic, "x", 1, retain=True)
    again(broker, how)
    got = lasting(broker, "c").messages(2)
    assert {m.topic: m.retain for m in got} == {"kept": True, "plain": False}


@pytest.mark.parametrize("how", ["reset", "0x04", "0x80"])
def test_only_a_normal_disconnect_deletes_the_will(broker, how):
    """nanomq#2412 [MQTT-3.14.4-3]: 0x04 asks for it, and so does an error that the client names."""
    with opened(broker, "watcher") as watcher:
        watcher.subscribe("wills/#")
        c = lasting(broker, "c", will=("wills/c", "gone", 1, False, {"will_delay": 0}))
        if how == "reset":
            c.reset()
        else:
            c.disconnect(code=int(how, 16))
        assert watcher.message().payload == b"gone"
        lasting(broker, "d", will=("wills/d", "gone", 1, False)).disconnect()
        assert watcher.nothing_but("wills/end")


# -- Strings and topics.

NUL = b"a\0b"
STRINGS = {
    # name: (packets, where the connection is opened before)
    "client id": ([connect(5, NUL)], False),
    "user name": ([connect(5, "x", user=NUL, password="p")], False),
    "will topic": ([connect(5, "x", will=(NUL, "x", 0, False))], False),
    "topic": ([publish(5, NUL, "x", 1, 1)], True),
    "filter": ([subscribe(5, 1, [(NUL, 1)])], True),
    "filter of an unsubscribe": ([unsubscribe(5, 1, [NUL])], True),
    "response topic": ([publish(5, "t", "x", 1, 1, props={"response_topic": NUL})], True),
    "content type": ([publish(5, "t", "x", 1, 1, props={"content_type": NUL})], True),
    "user property": ([publish(5, "t", "x", 1, 1, props={"user": [(NUL, "x")]})], True),
    "value of a user property": ([publish(5, "t", "x", 1, 1, props={"user": [("x", NUL)]})], True),
}


@pytest.mark.parametrize("what", STRINGS)
def test_a_string_with_nul_is_malformed(broker, what):
    """[MQTT-1.5.4-2]"""
    packets, is_open = STRINGS[what]
    c = opened(broker, "c") if is_open else Raw(broker.port, 5)
    c.send(b"".join(packets))
    said = c.expect_closed()
    assert [(p.kind, p.code) for p in said] == [(DISCONNECT if is_open else CONNACK, 0x81)]


@pytest.mark.parametrize("topic", ["abc/" * 199 + "d", "/" * 199, "x" * 65_535])
def test_long_topics_go_through(broker, topic):
    """mosquitto allows 200 levels as well (02-subpub-qos0-long-topic)."""
    with opened(broker, "c", 4) as c:
        assert c.subscribe((topic, 1)) == [1]
        c.publish_acked(topic, "x")
        assert c.message().topic == topic
        if len(topic) < 65_535:
            c.send(publish(4, topic + "/", "x", 1, 5))
            assert c.expect_closed() == [], "one level more than that"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("topic_filter", ["", "a/#/b", "a+", "#a"])
def test_an_unsubscribe_with_what_is_no_filter_is_malformed(broker, version, topic_filter):
    """As a SUBSCRIBE with it; mosquitto 13-malformed-unsubscribe-v5."""
    c = opened(broker, "c", version)
    c.send(unsubscribe(version, 1, [topic_filter]))
    said = c.expect_closed()
    assert [(p.kind, p.code) for p in said] == ([(DISCONNECT, 0x81)] if version == 5 else [])


# -- CONNECT.

NO_ANSWER = {
    "no CONNECT": packet(PINGREQ, 0, b""),
    "a will topic with a wildcard": connect(4, "x", will=("a/#", "x", 0, False)),
    "a will topic of no length": connect(4, "x", will=("", "x", 0, False)),
    "a password without a user": packet(1, 0, text("MQTT") + bytes([4, 0x42, 0, 60]) + text("x") + text("p")),
    "will QoS 3": packet(1, 0, text("MQTT") + bytes([4, 0x1E, 0, 60]) + text("x") + text("w") + text("p")),
    "will QoS without a will": packet(1, 0, text("MQTT") + bytes([4, 0x0A, 0, 60]) + text("x")),
    "will retain without a will": packet(1, 0, text("MQTT") + bytes([4, 0x22, 0, 60]) + text("x")),
    "the reserved flag": packet(1, 0, text("MQTT") + bytes([4, 0x03, 0, 60]) + text("x")),
    "flags in the header": packet(1, 1, text("MQTT") + bytes([4, 2, 0, 60]) + text("x")),
    "bytes behind its end": packet(1, 0, text("MQTT") + bytes([4, 2, 0, 60]) + text("x") + b"more"),
    "another protocol": packet(1, 0, text("HTTP") + bytes([4, 2, 0, 60]) + text("x")),
    "a client id that is not UTF-8": connect(4, b"\xff"),
    "a client id with U+0000": connect(4, NUL),
}


@pytest.mark.parametrize("what", NO_ANSWER)
def test_a_connect_that_is_none_gets_no_answer_before_mqtt_5(broker, what):
    """3.1.1 [MQTT-3.1.4-1]: closed without a CONNACK."""
    with opened(broker, "bystander", 4) as bystander:
        raw = Raw(broker.port, 4)
        raw.send(NO_ANSWER[what])
        assert raw.expect_closed() == []
        assert bystander.before_pong() == []


def test_level_3_repeats_with_dup(broker):
    """MQTT 3.1 sets DUP in a repeated PUBREL, SUBSCRIBE and UNSUBSCRIBE; mosquitto 03-publish-c2b-disconnect-qos2."""
    raw = Raw(broker.port, 4)
    raw.send(connect(4, "c", level=3, name="MQIsdp"))
    assert raw.expect(CONNACK).code == 0
    raw.send(packet(8, 2 | 8, struct.pack("!H", 1) + text("t") + b"\2"))
    assert raw.expect(SUBACK).codes == [2]
    raw.publish_acked("t", "x", 2, packet_id=9)
    raw.message()
    raw.send(packet(PUBREL, 2 | 8, struct.pack("!H", 9)))
    raw.expect(PUBCOMP, packet_id=9)
    raw.send(packet(10, 2 | 8, struct.pack("!H", 2) + text("t")))
    raw.expect(UNSUBACK)
    # The versions after it reserve the bit.
    with opened(broker, "d", 4) as d:
        d.send(packet(8, 2 | 8, struct.pack("!H", 1) + text("t") + b"\2"))
        assert d.expect_closed() == []


def test_a_connect_with_thousands_of_user_properties_is_taken(broker):
    """mosquitto 01-connect-575314"""
    raw = Raw(broker.port, 5)
    raw.open("c", props={"user": [("key", "value")] * 5_000})
    assert raw.before_pong() == []


# -- What the codec lets through (ARCHITECTURE.md, "Codec").

LET_THROUGH = {
    "a wildcard in a topic": (publish(5, "a/+", "x", 1, 1), 0x90),
    "DUP at QoS 0": (packet(PUBLISH, 8, text("a") + b"\0x"), 0x81),
    "a subscription identifier from a client": (publish(5, "a", "x", 1, 1, props={"subscription_id": 3}), 0x82),
    "no topic and no alias": (publish(5, "", "x", 1, 1), 0x82),
    "a bad filter": (subscribe(5, 1, [("a/#/b", 1)]), 0x81),
    "shared and no-local": (subscribe(5, 1, [("$share/g/t", 5)]), 0x82),
    "a response topic with a wildcard": (publish(5, "a", "x", 1, 1, props={"response_topic": "#"}), 0x90),
    "a PINGREQ with a body": (packet(PINGREQ, 0, b"x"), 0x81),
    "a PINGREQ with flags": (packet(PINGREQ, 1, b""), 0x81),
    "packet id 0 in a PUBLISH": (packet(PUBLISH, 2, text("a") + b"\0\0\0x"), 0x81),
    "packet id 0 in a SUBSCRIBE": (packet(8, 2, b"\0\0\0" + text("t") + b"\1"), 0x81),
    "a SUBSCRIBE with flags 0": (packet(8, 0, b"\0\1\0" + text("t") + b"\1"), 0x81),
    "a PUBREL with flags 0": (packet(PUBREL, 0, b"\0\1"), 0x81),
    "a length of five bytes": (b"\x30\xff\xff\xff\xff\x01", 0x81),
    "a CONNACK": (packet(CONNACK, 0, b"\0\0\0"), 0x82),
    "packet type 0": (packet(0, 0, b""), 0x81),
    "QoS 3 in a subscription": (subscribe(5, 1, [("t", 3)]), 0x81),
    "a payload behind the properties' length": (packet(PUBLISH, 0, text("a") + b"\x7fx"), 0x81),
}


@pytest.mark.parametrize("what", LET_THROUGH)
def test_what_is_not_mqtt_is_named_and_closed(broker, what):
    data, code = LET_THROUGH[what]
    with opened(broker, "bystander") as bystander:
        bystander.subscribe("#")
        c = opened(broker, "c")
        c.send(data)
        said = [p.code for p in c.expect_closed() if p.kind == DISCONNECT]
        assert said == [code] or code == 0x81 and said == [0x82], said
        assert bystander.before_pong() == []


def test_reserved_bits_of_a_3_1_1_subscribe_close_the_connection(broker):
    c = opened(broker, "c", 4)
    c.send(subscribe(4, 1, [("t", 1 | 0x40)]))
    assert c.expect_closed() == []


# -- Where the specification leaves a choice, this is ours.


def test_a_publisher_is_told_that_nobody_is_there(broker):
    """0x10, as mosquitto tells it; not where the message is kept or somebody is owed it."""
    with opened(broker, "pub") as pub, opened(broker, "sub") as sub:
        assert pub.publish_acked("t", "x", 1) == 0x10
        assert pub.publish_acked("t", "x", 1, retain=True) == 0
        sub.subscribe("t")
        assert pub.publish_acked("t", "x", 1) == 0
        lasting(broker, "away").subscribe("away")
        assert pub.publish_acked("away", "x", 1) == 0
        sub.subscribe("$share/g/shared")
        assert pub.publish_acked("shared", "x", 1) == 0
