"""What hostile tests found and what had to be mended, one test each; none is about one input only.

Numbers in brackets are the specification's normative statements (MQTT 5; 3.1.1 where it says so).
"""

import pytest

import rawmqtt
from rawmqtt import DISCONNECT, PINGREQ, PUBLISH, SUBACK, Raw, packet, publish, subscribe
from support import eventually
from test_hostile_loads import FULL, MIB, connected, hostile, many_subscriptions, push  # noqa: F401


def durable(port, version, client_id, fresh=False, **props):
    """A connection of a session that lasts."""
    if version == 5:
        return Raw(port, 5).open(client_id, clean=fresh, props={"session_expiry": 3600, **props})
    return Raw(port, 4).open(client_id, clean=False)


def in_flight(client, count, timeout=10):
    """Reads `count` messages and acknowledges none."""
    return [client.expect(PUBLISH, timeout=timeout) for _ in range(count)]


# -- What is sent again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("qos", [1, 2])
def test_a_full_window_is_sent_again_and_the_rest_behind_it(gateway, version, qos):
    """[MQTT-4.4.0-1]: the client broke off with everything that may be in flight unacknowledged."""
    made = gateway()
    client = durable(made.port, version, "device", fresh=True)
    client.subscribe(("a/#", qos))
    with Raw(made.port, 4).open("p") as p:
        for n in range(250):
            p.publish("a/x", b"%d" % n, 1 if qos == 1 else 2, n + 1)
        for n in range(250 if qos == 2 else 0):
            p.send(rawmqtt.ack(rawmqtt.PUBREL, n + 1))
        p.before_pong()
    first = in_flight(client, 100)
    client.reset()
    client = durable(made.port, version, "device")
    again = client.messages(250)
    assert [m.payload for m in again] == [b"%d" % n for n in range(250)]
    assert [m.dup for m in again[:100]] == [True] * 100 and not any(m.dup for m in again[100:])
    assert [m.packet_id for m in again[:100]] == [m.packet_id for m in first]


@pytest.mark.parametrize("retained", [False, True], ids=["queued", "retained"])
def test_a_smaller_receive_maximum_holds_for_what_is_sent_again(gateway, retained):
    """[MQTT-3.3.4-9]: ten in flight, then a connection that takes two."""
    made = gateway()
    with Raw(made.port, 5).open("p") as p:
        if not retained:
            durable(made.port, 5, "device", fresh=True).subscribe("a/#")
        for n in range(10):
            p.publish_acked(f"a/{n}", b"%d" % n, 1, retain=retained)
    client = durable(made.port, 5, "device")
    if retained:
        client.subscribe("a/#")
    in_flight(client, 10)
    client.reset()
    client = durable(made.port, 5, "device", receive_maximum=2)
    got = []
    while len(got) < 10:
        two = in_flight(client, 2)
        assert client.before_pong_untouched() == [], f"more than two are in flight after {len(got)}"
        got += [m.payload for m in two]
        for m in two:
            client.acknowledge(m)
    assert got == [b"%d" % n for n in range(10)]


@pytest.mark.parametrize("retained", [False, True], ids=["queued", "retained"])
def test_a_smaller_maximum_packet_size_holds_for_what_is_sent_again(gateway, retained):
    """[MQTT-3.1.2-24, -25]: it counts as delivered."""
    made = gateway()
    with Raw(made.port, 5).open("p") as p:
        if not retained:
            durable(made.port, 5, "device", fresh=True).subscribe("a/#")
        p.publish_acked("a/large", b"x" * 500, 1, retain=retained)
        client = durable(made.port, 5, "device")
        if retained:
            client.subscribe("a/#")
        in_flight(client, 1)
        client.reset()
        client = durable(made.port, 5, "device", maximum_packet_size=100)
        p.publish_acked("a/small", b"s", 1)
        assert client.message().payload == b"s"
        client.reset()
        client = durable(made.port, 5, "device")
        p.publish_acked("a/small", b"last", 1)
        assert client.message().payload == b"last"


def test_what_is_sent_again_keeps_its_order_where_the_ids_begin_anew(gateway):
    """[MQTT-4.6.0-1]: ids 65,532 to 65,535 and then 1 to 6."""
    made = gateway()
    with Raw(made.port, 4).open("p") as p:
        for n in range(10):
            p.publish_acked(f"keep/{n}", b"%d" % n, 1, retain=True)
        client = durable(made.port, 4, "device")
        client.subscribe("count/#")
        sent = 0
        while sent < 65_531:
            some = min(500, 65_531 - sent)
            p.send(b"".join(publish(4, "count/x", b"", 1, n + 1) for n in range(some)))
            for _ in range(some):
                client.message()
            p.before_pong()
            sent += some
    client.subscribe("keep/#")
    first = [m.topic for m in in_flight(client, 10)]
    client.reset()
    client = durable(made.port, 4, "device")
    assert [m.topic for m in in_flight(client, 10)] == first


# -- Rights of the single packet ----------------------------------------------------------------------------------------


def test_an_own_message_does_not_come_by_a_no_local_subscription_that_overlaps(gateway):
    """[MQTT-3.8.3-3]: the other subscription alone counts, with its QoS and its identifier; also from the log."""
    made = gateway()
    for options in ({}, {"session_expiry": 60}):
        with Raw(made.port, 5).open("own", props=options) as c:
            for topic_filter, bits, identifier in (("n/#", 2 | 4, 1), ("n/+", 1, 2)):
                c.send(subscribe(5, c.new_id(), [(topic_filter, bits)], {"subscription_id": identifier}))
                c.expect(SUBACK)
            c.publish("n/x", b"own", 2)
            m = c.message()
            assert (m.qos, m.properties["subscription_id"]) == (1, [2])
            with Raw(made.port, 5).open("other") as other:
                other.publish_acked("n/x", b"other", 2)
            m = c.message()
            assert m.payload == b"other" and m.qos == 2 and sorted(m.properties["subscription_id"]) == [1, 2]


def test_a_disconnect_stays_below_the_clients_maximum_packet_size(gateway):
    """[MQTT-3.14.2-3]: the reason's words are left out where they do not fit."""
    made = gateway()
    for maximum in (5, 12, 1000):
        with Raw(made.port, 5).open("small", props={"maximum_packet_size": maximum}) as c:
            c.send(publish(5, "a/+", b"", 0))
            p = c.expect(DISCONNECT)
            assert p.code == 0x90 and len(p.body) + 2 <= maximum
            assert ("reason" in p.properties) == (maximum == 1000)


# -- What must stay bounded ---------------------------------------------------------------------------------------------


FLOODS = {
    "PINGREQ": packet(PINGREQ, 0, b"") * 4096,
    "QoS 1 PUBLISH": publish(4, "q", b"", 1, 1) * 2048,
    "PUBREL of unknown ids": rawmqtt.ack(rawmqtt.PUBREL, 77) * 2048,
    "PUBREC of unknown ids": rawmqtt.ack(rawmqtt.PUBREC, 77) * 2048,
    "UNSUBSCRIBE": rawmqtt.unsubscribe(4, 1, ["none"]) * 1024,
}


@pytest.mark.parametrize("what", list(FLOODS))
def test_answers_to_a_client_that_does_not_read_are_bounded(hostile, what):  # noqa: F811
    """It is not read from any more, and TCP holds it back."""
    c = connected(hostile.port, "mute", 4, keep_alive=0)
    sent, data = 0, FLOODS[what] * 16
    while sent < 40 << 20:
        some = push(c, data, 1)
        sent += some
        if some < len(data):
            break
    c.close()
    grown = hostile.finish(f"{sent >> 20} MiB of {what} without reading")
    assert grown < 12 * MIB


def test_a_subscribe_does_not_multiply_what_is_retained(hostile):  # noqa: F811
    """Two thousand filters that each match two thousand retained messages, by a client that reads nothing."""
    with connected(hostile.port, "keeper") as p:
        for n in range(2_000):
            p.publish(f"kept/{n}", b"x", 0, retain=True)
        p.before_pong()
    c = connected(hostile.port, "glutton", keep_alive=0)
    c.send(subscribe(4, 1, [("#", 0), ("kept/#", 0), ("kept/+", 0), ("+/+", 0)] * 500))
    # The bystander's next messages come behind it.
    sent = hostile.bystander.sent
    eventually(lambda: hostile.bystander.fault or hostile.bystander.sent > sent + 20, 30, "the bystander goes on")
    grown = hostile.grown_kb()
    c.close()
    hostile.finish("one SUBSCRIBE of 2,000 filters over 2,000 retained")
    assert grown < 16 * MIB


def test_subscriptions_of_a_durable_session_cost_no_square(hostile):  # noqa: F811
    """Twenty thousand, a hundred a packet, and the session comes back with them; nobody waits for it."""
    many_subscriptions(hostile, 100_000 if FULL else 20_000, durable=True)
