"""Shared subscriptions (MQTT 5, 4.8.2): each message goes to one of the group, and no acknowledged one is lost."""

import pytest

from rawmqtt import DISCONNECT, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, Raw, ack, publish, subscribe
from support import eventually
from test_access import RULES, hashed


@pytest.fixture
def broker(gateway):
    return gateway()


def opened(broker, client_id, version=5, **options):
    return Raw(broker.port, version).open(client_id, **options)


def lasting(broker, client_id, version=5, **options):
    """A session that outlives its connection."""
    props = {"session_expiry": 3600, **options.pop("props", {})}
    return Raw(broker.port, version).open(client_id, clean=False, props=props if version == 5 else None, **options)


def payloads(packets):
    return [int(p.payload) for p in packets if p.kind == PUBLISH]


def all_of(members, count, what="every message"):
    """Acknowledges whatever the members get until there are `count`; returns what each got."""
    got = [[] for _ in members]

    def collect():
        for index, member in enumerate(members):
            got[index] += payloads(member.before_pong())
        return sum(map(len, got)) >= count

    eventually(collect, 10, what)
    return got


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_shared_subscription_hands_each_message_to_one(broker, version, qos):
    members = [opened(broker, f"m{n}", version) for n in range(3)]
    with opened(broker, "plain") as plain, opened(broker, "pub") as pub:
        assert pub.connack.properties.get("shared_available", 1) == 1
        for m in members:
            assert m.subscribe(("$share/group/t/#", qos)) == [qos]
        plain.subscribe(("t/#", qos))
        for n in range(300):
            pub.publish_acked("t/x", f"{n}", qos)
        got = all_of(members, 300)
        assert sorted(n for g in got for n in g) == list(range(300))
        assert all(len(g) == 100 for g in got), "each in its turn"
        assert [int(m.payload) for m in plain.messages(300)] == list(range(300))


def test_groups_and_plain_subscriptions_are_apart(broker):
    """One client in two groups and with a plain subscription gets a copy by each, with the identifiers of its own."""
    both, other = opened(broker, "both"), opened(broker, "other")
    both.subscribe(("$share/one/t/+", 1), props={"subscription_id": 1})
    both.subscribe(("$share/two/t/x", 1), props={"subscription_id": 2})
    both.subscribe(("t/#", 1), props={"subscription_id": 3})
    other.subscribe(("$share/one/t/+", 1), props={"subscription_id": 9})
    with opened(broker, "pub") as pub:
        for n in range(2):
            pub.publish_acked("t/x", f"{n}")
    got = [(m.properties["subscription_id"], int(m.payload)) for m in both.messages(5)]
    assert sorted(got) == [([1], 0), ([2], 0), ([2], 1), ([3], 0), ([3], 1)]
    assert [(m.properties["subscription_id"], int(m.payload)) for m in other.messages(1)] == [([9], 1)]


def test_the_qos_of_a_delivery_is_the_members_own(broker):
    """[MQTT-4.8.2-3]"""
    members = [opened(broker, f"m{n}") for n in range(3)]
    for qos, m in enumerate(members):
        m.subscribe(("$share/g/t", qos))
    with opened(broker, "pub") as pub:
        for n in range(6):
            pub.publish_acked("t", f"{n}", 2)
    assert [[m.message().qos for _ in range(2)] for m in members] == [[0, 0], [1, 1], [2, 2]]


@pytest.mark.parametrize("qos", [1, 2])
@pytest.mark.parametrize("session", [opened, lasting])
def test_what_a_leaving_member_held_goes_to_another(broker, session, qos):
    """BR-17: [4.8.2]; one of three members is cut while it holds messages that it has not acknowledged. At QoS 1 another
    gets them at once, whether its session has ended or not; at QoS 2 they wait for it, or are declared lost."""
    members = [session(broker, f"m{n}", props={"receive_maximum": 10}) for n in range(3)]
    for m in members:
        m.subscribe(("$share/g/t", qos))
    with opened(broker, "pub") as pub:
        pub.send(b"".join(publish(5, "t", f"{n}", 1, n + 1) for n in range(500)) if qos == 1 else b"")
        if qos == 2:
            for n in range(500):
                pub.publish_acked("t", f"{n}", 2)
        held = [members[0].message(acknowledge=False) for _ in range(10)]
        members[0].reset()
        for n in range(500 if qos == 1 else 0):
            assert pub.expect(PUBACK).code in (0, 0x10)
    gone = payloads(held)
    if qos == 1:
        got = all_of(members[1:], 500)
        assert sorted(n for g in got for n in g) == list(range(500))
        return
    got = all_of(members[1:], 490)
    assert sorted([n for g in got for n in g] + gone) == list(range(500)), "not given to another [MQTT-4.8.2-5]"
    if session is lasting:
        back = lasting(broker, "m0")
        assert sorted(payloads(back.messages(10))) == sorted(gone), "completed with the same client [MQTT-4.8.2-4]"


def test_what_was_sent_at_qos_2_to_a_session_that_ended_is_declared(broker):
    """[MQTT-4.8.2-5]: nobody else may get it; received + declared = produced."""
    with opened(broker, "watcher") as watcher, opened(broker, "other") as other, opened(broker, "pub") as pub:
        watcher.subscribe("status/loss/#")
        member = opened(broker, "member")
        member.subscribe(("$share/g/t", 2))
        pub.publish_acked("t", "1", 2)
        assert member.message(acknowledge=False).payload == b"1"
        other.subscribe(("$share/g/t", 2))
        member.reset()
        notice = watcher.message()
        assert notice.topic == "status/loss/share/g/t" and b'"session ended"' in notice.payload and b'"count":1' in notice.payload
        pub.publish_acked("t", "2", 2)
        assert other.message().payload == b"2"


def test_a_member_that_is_back_first_gets_its_messages_under_the_same_ids(broker):
    """[MQTT-4.4.0-1]: nobody else took them meanwhile."""
    c = lasting(broker, "c")
    c.subscribe(("$share/g/t", 1))
    with opened(broker, "pub") as pub:
        for n in range(3):
            pub.publish_acked("t", f"{n}")
        first = [c.message(acknowledge=False) for _ in range(3)]
        c.reset()
        pub.publish_acked("t", "3")
        c = lasting(broker, "c")
        assert c.connack.session_present
        again = c.messages(4)
        assert [(m.packet_id, m.payload, m.dup) for m in again[:3]] == [(m.packet_id, m.payload, True) for m in first]
        assert again[3].payload == b"3"
        # Acknowledged, they come to nobody.
        pub.publish_acked("t", "4")
        assert c.message().payload == b"4"


@pytest.mark.parametrize("how", ["restart", "kill -9"])
@pytest.mark.parametrize("version", [4, 5])
def test_messages_wait_for_a_group_whose_members_are_all_away(broker, version, how):
    for name in ("m0", "m1"):
        c = lasting(broker, name, version)
        assert c.subscribe("$share/g/t/#") == [1]
        c.disconnect()
    with opened(broker, "pub") as pub:
        for n in range(600):
            pub.publish_acked(f"t/{n % 7}", f"{n}")
    if how == "restart":
        broker.restart()
    else:
        broker.kill9()
        broker.start()
    with opened(broker, "pub") as pub:
        for n in range(600, 700):
            pub.publish_acked(f"t/{n % 7}", f"{n}")
    members = [lasting(broker, name, version) for name in ("m0", "m1")]
    assert all(m.connack.session_present for m in members)
    got = all_of(members, 700)
    assert sorted(n for g in got for n in g) == list(range(700))


@pytest.mark.parametrize("step", ["sent", "received", "done"])
def test_qos_2_of_a_group_is_delivered_once_over_a_kill(broker, step):
    """The member that a message was sent to completes it after the start; one that was completed while an older one
    was still open does not come again."""
    slow, quick = lasting(broker, "slow"), lasting(broker, "quick")
    for m in (slow, quick):
        m.subscribe(("$share/g/t", 2))
    with opened(broker, "pub") as pub:
        for n in range(2):
            pub.publish_acked("t", f"{n}", 2)
        old, new = slow.message(acknowledge=False), quick.message(acknowledge=False)
        assert (old.payload, new.payload) == (b"0", b"1")
        if step != "sent":
            quick.send(ack(PUBREC, new.packet_id))
            quick.expect(PUBREL)
        if step == "done":
            quick.send(ack(PUBCOMP, new.packet_id))
            assert quick.before_pong() == []
            # It is on disk with the commit of what came after it.
            pub.publish_acked("other", "x", 1, retain=True)
    broker.kill9()
    broker.start()
    quick = lasting(broker, "quick")
    if step == "sent":
        again = quick.message()
        assert (again.payload, again.packet_id, again.dup) == (b"1", new.packet_id, True)
    else:
        # Its PUBREL may come (again), the message must not.
        assert {p.kind for p in quick.before_pong()} <= {PUBREL}
        quick.send(ack(PUBCOMP, new.packet_id))
    slow = lasting(broker, "slow")
    again = slow.message()
    assert (again.payload, again.packet_id, again.dup) == (b"0", old.packet_id, True)
    with opened(broker, "pub") as pub:
        for n in range(2, 4):
            pub.publish_acked("t", f"{n}", 2)
    assert sorted(n for g in all_of([slow, quick], 2) for n in g) == [2, 3]


def test_a_group_ends_with_its_last_member(broker):
    c = lasting(broker, "c")
    c.subscribe("$share/g/t")
    with opened(broker, "pub") as pub:
        pub.publish_acked("t", "1")
        assert c.message().payload == b"1"
        assert c.unsubscribe("$share/g/t", "$share/g/t", "$share/other/t") == [0, 0x11, 0x11]
        pub.publish_acked("t", "2")
        c.subscribe("$share/g/t")
        pub.publish_acked("t", "3")
        assert c.message().payload == b"3", "what came between is for nobody"
    lasting(broker, "c").disconnect(props={"session_expiry": 0})

    def consumers():
        return [one["name"] for one in broker.status_all()["consumers"]]

    eventually(lambda: "share:g/t" not in consumers(), what=consumers)


def test_an_error_from_a_member_ends_the_message(broker):
    """[MQTT-4.8.2-6]"""
    members = [opened(broker, f"m{n}") for n in range(2)]
    for m in members:
        m.subscribe(("$share/g/t", 2))
    with opened(broker, "pub") as pub:
        pub.publish_acked("t", "0", 1)
        pub.publish_acked("t", "1", 2)
        members[0].send(ack(PUBACK, members[0].message(acknowledge=False).packet_id, 5, 0x80))
        members[1].send(ack(PUBREC, members[1].message(acknowledge=False).packet_id, 5, 0x97))
        assert [m.before_pong() for m in members] == [[], []]
        for m in members:
            m.reset()
        with opened(broker, "late") as late:
            late.subscribe("$share/g/t")
            pub.publish_acked("t", "2")
            assert late.message().payload == b"2"


def test_a_message_that_one_member_cannot_take_goes_to_another(broker):
    small, large = opened(broker, "small", props={"maximum_packet_size": 100}), opened(broker, "large")
    for m in (small, large):
        m.subscribe(("$share/g/t", 1))
    with opened(broker, "pub") as pub:
        for _ in range(4):
            pub.publish_acked("t", "7" * 200)
    assert [len(m.payload) for m in large.messages(4)] == [200] * 4
    assert small.before_pong() == []


def test_a_member_without_the_right_is_passed_over(gateway):
    broker = gateway(RULES.format(hash=hashed("a password")))
    anybody, user = opened(broker, "anybody"), opened(broker, "user", user="mute", password="a password")
    for m in (anybody, user):
        assert m.subscribe("$share/g/+/x") == [1]
    with opened(broker, "pub", user="press-7", password="a password") as pub:
        for n in range(4):
            pub.publish_acked("secret/x", f"{n}")
        assert payloads(user.messages(4)) == [0, 1, 2, 3]
        for n in range(4):
            pub.publish_acked("mixed/x", f"{n}")
    assert [len(m.messages(2)) for m in (anybody, user)] == [2, 2]


def test_a_retained_message_does_not_come_through_a_shared_subscription(broker):
    with opened(broker, "c") as c:
        c.publish_acked("t/r", "v", retain=True)
        assert c.subscribe("$share/g/t/#") == [1]
        assert c.before_pong() == []


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("topic_filter", ["$share/g", "$share//t", "$share/g/", "$share/+/t", "$share/g#/t", "$share/g/a#"])
def test_what_is_no_shared_subscription_is_refused(broker, version, topic_filter):
    """[MQTT-4.8.2-1], [MQTT-4.8.2-2]"""
    with opened(broker, "c", version) as c:
        c.send(subscribe(version, 1, [(topic_filter, 1)]))
        said = c.expect_closed()
        assert [(p.kind, p.code) for p in said] == ([(DISCONNECT, 0x81)] if version == 5 else [])


def test_a_shared_subscription_with_no_local_is_a_protocol_error(broker):
    """BR-25: [MQTT-3.8.3-4]"""
    with opened(broker, "c") as c:
        c.send(subscribe(5, 1, [("$share/g/t", 1 | 4)]))
        answer = c.read()
        assert (answer.kind, answer.code) == (DISCONNECT, 0x82)
        c.expect_closed()
