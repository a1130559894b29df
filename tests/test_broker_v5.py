"""The broker keeps the promises of MQTT 5, packet by packet, and with paho where its view is enough."""

import time

import pytest

from rawmqtt import CONNACK, DISCONNECT, PUBLISH, PUBREC, Raw, connect, packet, publish, subscribe, text, variable
from support import V5, eventually

NO_LOCAL, AS_PUBLISHED = 4, 8


@pytest.fixture
def broker(gateway):
    return gateway('[anonymous]\npublish = ["#"]\nsubscribe = ["#"]\ndeny_subscribe = ["test/nosubscribe"]\n')


def opened(broker, client_id, expiry=None, props=None, **options):
    """`expiry`: a session that outlives the connection by so many seconds."""
    props = dict(props or {})
    if expiry is not None:
        props["session_expiry"] = expiry
    return Raw(broker.port, 5).open(client_id, props=props, **options)


def resumed(broker, client_id, expiry=3600, **options):
    return opened(broker, client_id, expiry, clean=False, **options)


def test_the_properties_of_a_message_travel_unchanged(broker):
    """Payload format, content type, request/response, and user properties in their order, doubled names too; live, queued
    and retained."""
    sent = {
        "payload_format": 1,
        "content_type": "text/plain",
        "response_topic": "answers/here",
        "correlation_data": b"\0\1\2\xff",
        "user": [("a", "2"), ("b", "ü"), ("a", "1"), ("a", "1"), ("", "")],
    }
    resumed(broker, "later").subscribe("props/#")
    with opened(broker, "live") as live, opened(broker, "pub") as pub:
        live.subscribe("props/#")
        pub.publish_acked("props/a", "text", 1, retain=True, props=sent)
        assert live.message().properties == sent
    with resumed(broker, "later") as later:
        assert later.message().properties == sent
    broker.restart()
    with opened(broker, "new") as new:
        new.subscribe("props/#")
        assert new.message().properties == sent


def test_request_and_response_work_between_stock_clients(broker, client):
    from paho.mqtt.packettypes import PacketTypes
    from paho.mqtt.properties import Properties

    server, asker = client(broker.port, "server", version=V5), client(broker.port, "asker", version=V5)

    def answer(mqtt, _user, message):
        props = Properties(PacketTypes.PUBLISH)
        props.CorrelationData = message.properties.CorrelationData
        mqtt.publish(message.properties.ResponseTopic, message.payload.upper(), 1, properties=props)

    server.paho.on_message = answer
    server.subscribe("ask/#")
    asker.subscribe("answers/asker")
    asker.publish("ask/x", "hello", properties={"ResponseTopic": "answers/asker", "CorrelationData": b"7"})
    got = asker.wait_for(1)[0]
    assert (got.payload, got.properties.CorrelationData) == (b"HELLO", b"7")


def test_a_client_without_an_id_is_given_one(broker):
    """BR-01: [MQTT-3.2.2-16]"""
    ids = set()
    for clean in (True, False):
        with opened(broker, "", clean=clean) as c:
            ids.add(c.connack.properties["assigned_client_id"])
    assert len(ids) == 2 and "" not in ids
    # It works as an id.
    first = opened(broker, "", 60)
    name = first.connack.properties["assigned_client_id"]
    first.disconnect()
    assert resumed(broker, name).connack.session_present


def test_a_session_lives_as_long_as_it_asked(broker):
    for expiry in (None, 0):
        opened(broker, "short", expiry).disconnect()
        assert not resumed(broker, "short", 0).connack.session_present
    opened(broker, "long", 3600).disconnect()
    assert resumed(broker, "long").connack.session_present
    # DISCONNECT may shorten it, or prolong what was not 0 …
    resumed(broker, "long").disconnect(props={"session_expiry": 0})
    c = resumed(broker, "long", 1)
    assert not c.connack.session_present
    c.subscribe("x")
    c.disconnect()
    # … and when it has run out, it is gone.
    time_of_end = time.monotonic() + 1.1
    eventually(lambda: time.monotonic() > time_of_end, 3)
    assert not resumed(broker, "long", 0).connack.session_present


def test_from_0_the_session_expiry_cannot_be_raised_at_disconnect(broker):
    c = opened(broker, "c", 0)
    c.send(packet(DISCONNECT, 0, b"\x00\x05\x11\x00\x00\x00\x05"))
    assert [p.code for p in c.expect_closed() if p.kind == DISCONNECT] in ([0x82], [])
    assert not resumed(broker, "c", 0).connack.session_present


def test_clean_start_drops_the_session(broker):
    resumed(broker, "c").subscribe("x")
    with opened(broker, "pub") as pub:
        pub.publish_acked("x", "old")
    c = opened(broker, "c", 3600)
    assert not c.connack.session_present
    c.subscribe("x", "end")
    assert c.nothing_but("end")


def test_no_local_and_retain_as_published(broker):
    with opened(broker, "c") as c, opened(broker, "pub") as pub:
        assert c.subscribe(("mine/#", 1 | NO_LOCAL), ("plain/#", 1), ("kept/#", 1 | AS_PUBLISHED), ("end", 1)) == [1, 1, 1, 1]
        c.publish_acked("mine/a", "own")
        c.publish_acked("plain/a", "own")
        pub.publish_acked("mine/a", "of another")
        pub.publish_acked("plain/b", "x", retain=True)
        pub.publish_acked("kept/b", "x", retain=True)
        pub.publish_acked("kept/c", "x")
        pub.publish_acked("end", "")
        got = [(m.topic, m.payload, m.retain) for m in c.until("end")]
        assert got == [
            ("plain/a", b"own", False), ("mine/a", b"of another", False),
            ("plain/b", b"x", False), ("kept/b", b"x", True), ("kept/c", b"x", False),
        ]


@pytest.mark.parametrize("handling,at_first,at_the_second_time", [(0, 1, 1), (1, 1, 0), (2, 0, 0)])
def test_retain_handling(broker, handling, at_first, at_the_second_time):
    """BR-12, also on a resumed session."""
    with opened(broker, "pub") as pub:
        pub.publish_acked("r/a", "v", retain=True)
    c = resumed(broker, "c")
    c.subscribe(("r/#", 1 | handling << 4))
    assert len(c.before_pong()) == at_first
    c.subscribe(("r/#", 1 | handling << 4))
    assert len(c.before_pong()) == at_the_second_time
    c.disconnect()
    c = resumed(broker, "c")
    assert c.connack.session_present
    c.subscribe(("r/#", 1 | handling << 4))
    assert len(c.before_pong()) == at_the_second_time


def test_subscription_identifiers_say_which_subscriptions_matched(broker):
    with opened(broker, "c") as c, opened(broker, "pub") as pub:
        c.subscribe(("id/#", 1), props={"subscription_id": 268_435_455})
        c.subscribe(("id/+", 2), props={"subscription_id": 7})
        c.subscribe(("end", 1))
        pub.publish_acked("id/x", "both", 2)
        pub.publish_acked("id/x/y", "one")
        pub.publish_acked("end", "")
        got = c.until("end")
        both = sorted(n for m in got if m.payload == b"both" for n in m.properties["subscription_id"])
        assert both == [7, 268_435_455], "in one message, or in one for each"
        assert [m.properties["subscription_id"] for m in got if m.payload == b"one"] == [[268_435_455]]
        # A repeated SUBSCRIBE replaces it.
        c.subscribe(("id/+", 1), props={"subscription_id": 9})
        pub.publish_acked("id/z", "again")
        pub.publish_acked("end", "")
        assert sorted(n for m in c.until("end") for n in m.properties["subscription_id"]) == [9, 268_435_455]


def test_subscription_identifiers_survive_with_the_session(broker):
    resumed(broker, "c").subscribe(("id/#", 1), props={"subscription_id": 5})
    broker.restart()
    with opened(broker, "pub") as pub:
        pub.publish_acked("id/x", "x")
    assert resumed(broker, "c").message().properties["subscription_id"] == [5]


def test_unsubscribe_says_what_was_there(broker):
    with opened(broker, "c") as c:
        c.subscribe("a", "b/+")
        assert c.unsubscribe("a", "c", "b/+") == [0x00, 0x11, 0x00]


def test_a_denied_filter_is_answered_with_not_authorized(broker):
    with opened(broker, "c") as c:
        assert c.subscribe(("a", 2), ("test/nosubscribe", 1), ("b", 0)) == [2, 0x87, 0]


def test_a_publish_that_nobody_gets_is_accepted(broker):
    with opened(broker, "c") as c:
        assert c.publish_acked("nobody/home", "x", 1) in (0x00, 0x10)
        assert c.publish_acked("nobody/home", "x", 2) in (0x00, 0x10)


def test_the_clients_receive_maximum_is_kept(broker):
    resumed(broker, "slow").subscribe(("flow/#", 2))
    with opened(broker, "pub") as pub:
        for n in range(20):
            pub.publish_acked("flow/x", f"{n}", 1 + n % 2)
    with resumed(broker, "slow", props={"receive_maximum": 3}) as slow:
        got, open_now = [], [slow.message(acknowledge=False) for _ in range(3)]
        while True:
            assert [p for p in slow.before_pong_untouched() if p.kind == PUBLISH] == [], "more than three in flight"
            first = open_now.pop(0)
            got.append(int(first.payload))
            slow.acknowledge(first)
            if len(got) + len(open_now) == 20:
                break
            open_now.append(slow.message(acknowledge=False))
        assert got + [int(m.payload) for m in open_now] == list(range(20))


def test_a_client_above_the_brokers_receive_maximum_is_told(broker):
    c = opened(broker, "fast")
    granted = c.connack.properties.get("receive_maximum", 65535)
    if granted == 65535:
        # More than this cannot be in flight: there are no more ids.
        return
    # QoS 2 without PUBREL: an id counts until its PUBCOMP.
    data = b"".join(publish(5, "f", "x", 2, n) for n in range(1, granted + 1))
    c.send(data)
    for _ in range(granted):
        assert c.expect(PUBREC).code == 0
    c.send(publish(5, "f", "x", 2, granted + 1))
    assert c.expect(DISCONNECT).code == 0x93
    c.expect_closed()


def test_a_will_waits_for_its_delay_and_is_dropped_when_the_client_returns(broker):
    with opened(broker, "watcher") as watcher:
        watcher.subscribe("wills/#")
        opened(broker, "returns", 60, will=("wills/returns", "no", 1, False, {"will_delay": 1})).reset()
        began = time.monotonic()
        opened(broker, "stays-away", 60, will=("wills/away", "gone", 1, False, {"will_delay": 2, "user": [("k", "v")]})).reset()
        back = resumed(broker, "returns")
        assert back.connack.session_present
        will = watcher.message()
        took = time.monotonic() - began
        assert (will.topic, will.payload, will.properties.get("user")) == ("wills/away", b"gone", [("k", "v")])
        assert 1.9 <= took <= 3.5, f"after {took:.2f} s with a delay of 2 s"
        # The session's end comes before the delay's.
        began = time.monotonic()
        opened(broker, "short", 1, will=("wills/short", "gone", 1, False, {"will_delay": 60})).reset()
        assert watcher.message().topic == "wills/short"
        assert time.monotonic() - began < 3


def test_disconnect_with_will_publishes_it(broker):
    with opened(broker, "watcher") as watcher:
        watcher.subscribe("wills/#")
        opened(broker, "c", will=("wills/c", "asked for", 1, False)).disconnect(code=4)
        assert watcher.message().payload == b"asked for"


def test_the_clients_topic_aliases_are_understood(broker):
    with opened(broker, "c") as c, opened(broker, "sub") as sub:
        most = c.connack.properties.get("topic_alias_maximum", 0)
        assert most >= 1, "devices on thin links count on aliases"
        sub.subscribe("alias/#")
        c.publish_acked("alias/one", "1", 1, props={"topic_alias": 1})
        c.publish_acked("", "2", 1, props={"topic_alias": 1})
        c.publish_acked("alias/two", "3", 1, props={"topic_alias": 1})
        c.publish_acked("", "4", 1, props={"topic_alias": 1})
        assert [m.topic for m in sub.messages(4)] == ["alias/one", "alias/one", "alias/two", "alias/two"]
        assert all("topic_alias" not in m.properties for m in sub.early)
        c.publish("alias/x", "x", 1, props={"topic_alias": most + 1})
        assert c.expect(DISCONNECT).code == 0x94


def test_an_alias_does_not_outlive_its_connection(broker):
    c = opened(broker, "c", 60)
    c.publish_acked("alias/one", "1", 1, props={"topic_alias": 1})
    c.disconnect()
    c = resumed(broker, "c")
    c.publish("", "2", 1, props={"topic_alias": 1})
    assert c.expect(DISCONNECT).code in (0x82, 0x94)


def test_aliases_towards_a_client_stay_within_its_maximum(broker):
    with opened(broker, "c", props={"topic_alias_maximum": 2}) as c, opened(broker, "pub") as pub:
        c.subscribe(("s/#", 1))
        sent = [f"s/{n % 4}" for n in range(16)]
        for topic in sent:
            pub.publish_acked(topic, topic)
        aliases, got = {}, []
        for m in c.messages(16):
            alias = m.properties.get("topic_alias")
            if alias is not None:
                assert 1 <= alias <= 2
                if m.topic:
                    aliases[alias] = m.topic
            got.append(m.topic or aliases[alias])
        assert got == sent
    with opened(broker, "none") as c, opened(broker, "pub") as pub:
        c.subscribe(("s/#", 1))
        for _ in range(3):
            pub.publish_acked("s/1", "x")
        assert all("topic_alias" not in m.properties and m.topic for m in c.messages(3)), "its maximum is 0"


def test_a_message_above_the_clients_maximum_packet_size_is_not_sent(broker):
    resumed(broker, "small").subscribe("size/#")
    with opened(broker, "pub") as pub:
        for payload in (b"a" * 10, b"b" * 500, b"c" * 10):
            pub.publish_acked("size/x", payload)
    with resumed(broker, "small", props={"maximum_packet_size": 100}) as small:
        assert [m.payload[:1] for m in small.messages(2)] == [b"a", b"c"]
        assert small.nothing_but("size/end")
    # It counts as delivered: with a larger size it does not come again.
    with resumed(broker, "small") as small:
        assert small.nothing_but("size/end")


def test_a_packet_above_the_brokers_maximum_is_refused_with_0x95(broker):
    c = opened(broker, "c")
    limit = c.connack.properties["maximum_packet_size"]
    c.send(b"\x32" + variable(limit + 1) + text("big"))
    assert c.expect(DISCONNECT, timeout=5).code == 0x95
    c.expect_closed()
    # One that just fits goes through.
    with opened(broker, "c") as c:
        # Its remaining length takes three bytes instead of one.
        head = len(publish(5, "big", b"", 1, 1)) + 2
        assert c.publish_acked("big", b"x" * (limit - head)) in (0, 0x10)


def test_expiry_counts_down_while_a_message_waits(broker):
    """BR-10, in seconds: live it is as sent; queued and retained it is less; past it nothing comes."""
    resumed(broker, "late").subscribe("e/#")
    with opened(broker, "live") as live, opened(broker, "pub") as pub:
        live.subscribe("e/#")
        pub.publish_acked("e/long", "x", retain=True, props={"message_expiry": 100})
        pub.publish_acked("e/short", "x", retain=True, props={"message_expiry": 1})
        began = time.monotonic()
        assert {m.topic: m.properties["message_expiry"] for m in live.messages(2)} == {"e/long": 100, "e/short": 1}
    eventually(lambda: time.monotonic() - began > 2.2, 5)
    broker.restart()
    for client_id in ("late", "new"):
        with resumed(broker, client_id) as c:
            if client_id == "new":
                c.subscribe("e/#")
            first = c.message()
            waited = time.monotonic() - began
            assert first.topic == "e/long"
            assert 100 - waited - 1 <= first.properties["message_expiry"] <= 98
            assert c.nothing_but("e/end")


PROTOCOL_ERRORS = {
    # name: (packet after CONNECT, the reason codes that say it)
    "a subscription id from a client": (publish(5, "t", "x", 1, 1, props={"subscription_id": 3}), (0x82, 0x81)),
    "a subscription id of 0": (subscribe(5, 1, [("t", 1)], {"subscription_id": 0}), (0x82, 0x81)),
    "an empty topic without an alias": (publish(5, "", "x", 1, 1), (0x82, 0x90)),
    "alias 0": (publish(5, "t", "x", 1, 1, props={"topic_alias": 0}), (0x94, 0x82, 0x81)),
    "a wildcard in a topic": (publish(5, "a/#", "x", 1, 1), (0x90, 0x81, 0x82)),
    "a response topic with a wildcard": (publish(5, "t", "x", 1, 1, props={"response_topic": "a/+"}), (0x90, 0x82, 0x81)),
    "qos 3": (packet(PUBLISH, 6, text("a") + b"\0\1\0x"), (0x81, 0x82)),
    "retain handling 3": (subscribe(5, 1, [("t", 0x31)]), (0x81, 0x82)),
    "reserved subscription bits": (subscribe(5, 1, [("t", 0xC1)]), (0x81, 0x82)),
    "a second connect": (connect(5, "again"), (0x82,)),
    "no filters": (packet(8, 2, b"\0\1\0"), (0x81, 0x82, 0x8F)),
    "an unknown property": (packet(PUBLISH, 2, text("a") + b"\0\1\2\x7f\1x"), (0x81, 0x82)),
    "a property twice": (packet(PUBLISH, 2, text("a") + b"\0\1\4\1\1\1\1x"), (0x81, 0x82)),
    "auth without a method": (packet(15, 0, b"\x18\x00"), (0x81, 0x82, 0x8C)),
    "a topic that is not UTF-8": (publish(5, b"a\xff", "x", 1, 1), (0x81, 0x82, 0x90)),
}


@pytest.mark.parametrize("what", PROTOCOL_ERRORS)
def test_a_protocol_error_is_named_and_nothing_of_it_is_forwarded(broker, what):
    """BR-25. A DISCONNECT with the reason, or for a bad filter or topic its own answer."""
    data, codes = PROTOCOL_ERRORS[what]
    with opened(broker, "bystander") as bystander:
        bystander.subscribe("#")
        bad = opened(broker, "bad")
        bad.send(data)
        first = bad.read(timeout=5)
        assert first.kind == DISCONNECT, f"got {first}"
        assert first.code in codes, f"0x{first.code:02x}"
        bad.expect_closed()
        assert bystander.before_pong() == []


def test_a_connect_with_a_property_twice_is_refused(broker):
    """BR-25; for the CONNECT a bare close will do."""
    twice = b"\x27\0\0\1\0" * 2
    body = text("MQTT") + bytes([5, 2, 0, 60, len(twice)]) + twice + text("x")
    raw = Raw(broker.port, 5)
    raw.send(packet(1, 0, body))
    said = raw.expect_closed(timeout=5)
    assert [p.code for p in said if p.kind == CONNACK] in ([], [0x82], [0x81])


def test_an_unsupported_version_is_named(broker):
    raw = Raw(broker.port, 5)
    raw.send(connect(5, "x", level=6))
    assert raw.read().code in (0x84, 1)


def test_an_unknown_authentication_method_is_named(broker):
    raw = Raw(broker.port, 5)
    raw.send(connect(5, "x", props={"auth_method": "SCRAM-SHA-1"}))
    assert raw.read().code == 0x8C


def test_the_connack_tells_what_the_broker_cannot_do(broker):
    """Whatever is missing is announced; what is not announced must work."""
    with opened(broker, "c", keep_alive=60) as c:
        properties = c.connack.properties
        for name in ("wildcard_available", "subscription_id_available", "retain_available"):
            assert properties.get(name, 1) == 1
        assert properties.get("maximum_qos", 2) == 2
        assert properties.get("receive_maximum", 65535) >= 100
        assert properties.get("server_keep_alive", 60) > 0


def test_aliases_spare_a_client_the_topics_it_knows(broker):
    """Paho test_server_topic_alias: at every QoS, and with the maximum of the connection at hand."""
    c, pub = resumed(broker, "c", props={"topic_alias_maximum": 1}), opened(broker, "pub")
    c.subscribe(("alias/#", 2))
    for qos in (0, 1, 2):
        pub.publish_acked("alias/one", f"{qos}", qos)
    got = c.messages(3)
    assert [(m.topic, m.properties["topic_alias"]) for m in got] == [("alias/one", 1), ("", 1), ("", 1)]
    assert [m.payload for m in got] == [b"0", b"1", b"2"]
    pub.publish_acked("alias/two", "full")
    m = c.message()
    assert (m.topic, "topic_alias" in m.properties) == ("alias/two", False)
    # What comes again on a new connection comes with its topic: an alias does not outlive its connection.
    pub.publish_acked("alias/one", "again")
    first = c.message(acknowledge=False)
    assert first.topic == ""
    c.reset()
    c = resumed(broker, "c", props={"topic_alias_maximum": 1})
    m = c.message()
    assert (m.topic, m.payload, m.packet_id, m.properties["topic_alias"]) == ("alias/one", b"again", first.packet_id, 1)
    # One that is too large for the client is not sent, and its alias is not known then.
    c = opened(broker, "tight", props={"topic_alias_maximum": 5, "maximum_packet_size": 60})
    c.subscribe(("alias/#", 0))
    pub.publish_acked("alias/big", "x" * 100, 0)
    pub.publish_acked("alias/big", "small", 0)
    m = c.message()
    assert (m.topic, m.payload) == ("alias/big", b"small")


@pytest.mark.parametrize("asked,told,counts", [(60, 1, 1), (0, 1, 1), (1, None, 1)])
def test_the_servers_keep_alive_is_told_and_counts(gateway, asked, told, counts):
    """[MQTT-3.2.2-21]; 3.1.1 clients cannot be told and keep their own."""
    broker = gateway(listener='max_keep_alive = "1 s"')
    with opened(broker, "watcher", keep_alive=1) as watcher, Raw(broker.port, 4).open("old", keep_alive=0) as old:
        watcher.subscribe("wills/#")
        c = opened(broker, "c", keep_alive=asked, will=("wills/c", "silent", 0, False))
        assert c.connack.properties.get("server_keep_alive") == told
        began = time.monotonic()

        def cut():
            return [m for m in watcher.before_pong() if m.topic == "wills/c"]

        eventually(cut, 5, interval=0.2)
        assert time.monotonic() - began >= 1.4 * counts
        assert [p.code for p in c.expect_closed() if p.kind == DISCONNECT] == [0x8D]
        assert old.before_pong() == []


@pytest.mark.parametrize("refusal,code", [("not-authorized", 0x87), ("unspecified", 0x80)])
def test_a_refused_subscribe_says_as_much_as_it_may(gateway, refusal, code):
    """Paho test_subscribe_failure wants 0x80, which tells nothing; the specification leaves the choice to the server."""
    broker = gateway('[anonymous]\nsubscribe = ["#"]\ndeny_subscribe = ["secret/#"]\n', listener=f'subscribe_refusal = "{refusal}"')
    with opened(broker, "c") as c:
        c.send(subscribe(5, 1, [("secret/a", 1), ("open", 1)]))
        ack = c.read()
        assert ack.codes == [code, 1]
        assert ("secret/a" in ack.properties.get("reason", "")) == (code == 0x87)


def test_reasons_in_words_go_where_they_are_wanted(gateway):
    """[MQTT-3.1.2-29], [MQTT-3.4.2-2], [MQTT-3.9.2-1]: never with problem information 0, never above the maximum size."""
    broker = gateway('[anonymous]\npublish = ["open"]\nsubscribe = ["open"]\n')
    for props, is_told in [({}, True), ({"request_problem": 1}, True), ({"request_problem": 0}, False), ({"maximum_packet_size": 40}, False)]:
        with opened(broker, "c", props=props) as c:
            for qos in (1, 2):
                packet_id = c.publish("closed", "x", qos)
                answer = c.read()
                assert (answer.packet_id, answer.code, "reason" in answer.properties) == (packet_id, 0x87, is_told)
            c.send(subscribe(5, 9, [("closed", 1)]))
            answer = c.read()
            assert (answer.codes, "reason" in answer.properties) == ([0x87], is_told)


def test_a_client_that_takes_little_is_told_without_words(broker):
    """[MQTT-3.2.2-19], [MQTT-3.14.2-3]"""
    raw = Raw(broker.port, 5)
    raw.send(connect(5, "x", props={"auth_method": "SCRAM-SHA-1", "maximum_packet_size": 30}))
    refused = raw.read()
    assert (refused.kind, refused.code, "reason" in refused.properties) == (CONNACK, 0x8C, False)
    raw.expect_closed()
    c = opened(broker, "c", props={"maximum_packet_size": 25})
    c.send(publish(5, "a/#", "x", 1, 1))
    said = c.read()
    assert (said.kind, said.code, said.properties) == (DISCONNECT, 0x90, {})


AUTHS = {
    "in an open connection": (packet(15, 0, b""), 0x82),
    "to go on": (packet(15, 0, b"\x18\x0e" + b"\x15" + text("SCRAM-SHA-1")), 0x82),
    "to begin anew": (packet(15, 0, b"\x19\x0e" + b"\x15" + text("SCRAM-SHA-1")), 0x82),
    "with flags": (packet(15, 1, b""), 0x81),
}


@pytest.mark.parametrize("what", AUTHS)
def test_auth_is_refused(broker, what):
    """No method was agreed on in the CONNECT [MQTT-4.12.0-1], [MQTT-4.12.0-6]."""
    data, code = AUTHS[what]
    c = opened(broker, "c")
    c.send(data)
    assert [p.code for p in c.expect_closed() if p.kind == DISCONNECT] == [code]


def test_authentication_data_without_a_method_is_refused(broker):
    """MQTT 5, 3.1.2.11.10"""
    raw = Raw(broker.port, 5)
    raw.send(connect(5, "x", props={"auth_data": b"x"}))
    assert [p.code for p in raw.expect_closed() if p.kind == CONNACK] in ([0x82], [])


def test_auth_as_the_first_packet_gets_no_answer(broker):
    raw = Raw(broker.port, 5)
    raw.send(packet(15, 0, b""))
    assert raw.expect_closed() == []
