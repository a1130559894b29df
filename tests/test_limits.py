"""Placeholders in rules, limits of a user's clients, failed logins by address; all of it changes on reload."""

import json
import socket
import subprocess
import threading
import time

import pytest

from rawmqtt import CONNACK, DISCONNECT, PUBACK, PUBLISH, SUBACK, Closed, Raw, ack, connect, packet, publish, subscribe
from support import BINARY, V5, eventually
from test_access import hashed
from test_reload import change

PASSWORD = "correct horse"


@pytest.fixture(scope="module")
def password_hash():
    return hashed(PASSWORD)


def user(password_hash, extra="", name="press", publish='["#"]', subscribe='["#"]'):
    return f'[[user]]\nname = "{name}"\npassword_hash = "{password_hash}"\npublish = {publish}\nsubscribe = {subscribe}\n{extra}\n'


def as_user(made, client_id, version=5, name="press", password=PASSWORD, host=None, **options):
    raw = Raw(made.port, version) if host is None else from_address(made, host, version)
    return raw.open(client_id, user=name, password=password, **options)


def from_address(made, address, version=5):
    """A connection whose source is another address of loopback."""
    raw = Raw.__new__(Raw)
    raw.version, raw.timeout, raw.inbox, raw.early, raw.next_id, raw.connack = version, 10, bytearray(), [], 0, None
    raw.socket = socket.create_connection(("127.0.0.1", made.port), timeout=10, source_address=(address, 0))
    return raw


def cli(made, *arguments):
    done = subprocess.run(
        [str(BINARY), *arguments, "--config", str(made.path)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def shown(made, client_id):
    code, out, err = cli(made, "client", "show", client_id, "--json")
    assert code == 0, err
    return json.loads(out)


# -- Placeholders


def test_user_and_client_id_stand_for_the_clients_own(gateway, password_hash):
    rules = user(password_hash, publish='["data/{user}/{client_id}/#"]', subscribe='["to/{client_id}"]', extra='deny_publish = ["data/{user}/{client_id}/raw"]')
    made = gateway(rules)
    with as_user(made, "a") as a:
        assert a.publish_acked("data/press/a/x", "x") in (0, 0x10)
        for refused in ("data/press/b/x", "data/a/press/x", "data/press/a/raw", "data/{user}/{client_id}/x"):
            assert a.publish_acked(refused, "x") == 0x87, refused
        assert a.subscribe("to/a", "to/b", "to/+") == [1, 0x87, 1]
        with Raw(made.port, 5).open("anyone") as other:
            other.publish_acked("to/b", "not for a")
            other.publish_acked("to/a", "for a")
        assert a.message().payload == b"for a"


@pytest.mark.parametrize("version,code", [(4, 0x02), (5, 0x85)])
def test_a_client_id_never_widens_a_rule(gateway, password_hash, version, code):
    """One that would change what the rule means is refused: leaving a denying rule out would widen as well."""
    for key in ("publish", "subscribe", "deny_publish", "deny_subscribe"):
        made = gateway(user(password_hash, f'{key} = ["data/{{client_id}}/#"]').replace(f'{key} = ["#"]\n', "", 1), folder=key)
        for bad in ("+", "#", "a/b", "/", "a+b", "$SYS"):
            with Raw(made.port, version) as raw:
                raw.send(connect(version, bad, user="press", password=PASSWORD))
                assert raw.expect(CONNACK).code == code, (key, bad)
                raw.expect_closed()
        as_user(made, "plain", version).disconnect()
        # Nobody's rule names the id of those without a user.
        Raw(made.port, version).open("a/+").disconnect()


def test_an_assigned_client_id_stands_in_the_rules(gateway):
    made = gateway('[anonymous]\npublish = ["data/{client_id}"]\nsubscribe = []\n')
    with Raw(made.port, 5).open("") as raw:
        own = raw.connack.properties["assigned_client_id"]
        assert raw.publish_acked(f"data/{own}", "x") in (0, 0x10) and raw.publish_acked("data/x", "x") == 0x87


def test_placeholders_that_stand_for_nothing_are_faults(gateway, password_hash):
    made = gateway('[anonymous]\npublish = ["data/{user}"]\n' + user(password_hash, name="a/b", publish='["data/{user}/#"]'), start=False)
    code, out = made.run_to_end()
    assert code == 1 and "{user} stands for nothing in [anonymous]" in out and 'the name "a/b" cannot stand for {user}' in out, out


def test_a_reload_fills_placeholders_in_for_those_connected(gateway, password_hash):
    made = gateway(user(password_hash))
    with as_user(made, "fits") as fits, as_user(made, "a/b") as unfit:
        assert fits.publish_acked("x", "x") in (0, 0x10)
        change(made, made.path.read_text().replace('publish = ["#"]', 'publish = ["own/{client_id}"]'))
        assert unfit.expect(DISCONNECT).code == 0x87
        assert fits.publish_acked("x", "x") == 0x87 and fits.publish_acked("own/fits", "x") in (0, 0x10)


# -- What a refusal looks like


@pytest.mark.parametrize("qos", [0, 1, 2])
def test_a_3_1_1_publisher_that_may_not_is_cut_where_the_configuration_says_so(gateway, qos):
    made = gateway('[broker]\nrefused_publish = "disconnect"\n[anonymous]\npublish = ["open/#"]\n')
    with Raw(made.port, 4).open("three") as three, Raw(made.port, 5).open("five") as five:
        three.publish_acked("open/x", "x", qos=max(qos, 1))
        three.publish("closed/x", "x", qos)
        three.expect_closed()
        assert five.publish_acked("closed/x", "x", qos) == (0x87 if qos else 0), "MQTT 5 is told"
        change(made, made.path.read_text().replace("disconnect", "acknowledge"))
        with Raw(made.port, 4).open("three") as again:
            assert again.publish_acked("closed/x", "x") == 0, "acknowledged and dropped"


# -- Limits


def test_connections_of_a_user(gateway, password_hash):
    made = gateway(user(password_hash, "max_connections = 2"))
    one, two = as_user(made, "one"), as_user(made, "two")
    for version, code in ((5, 0x97), (4, 0x03)):
        with Raw(made.port, version) as raw:
            raw.send(connect(version, "three", user="press", password=PASSWORD))
            assert raw.expect(CONNACK).code == code
            raw.expect_closed()
    # One that comes again is not a further one; nobody else is concerned.
    again = as_user(made, "one")
    assert one.expect(DISCONNECT).code == 0x8E
    Raw(made.port, 5).open("anonymous").disconnect()
    assert shown(made, "two")["clients_of_user"] == 2
    two.disconnect()
    eventually(lambda: shown(made, "one")["clients_of_user"] == 1, what="one is left")
    as_user(made, "three").disconnect()
    # Those who are there stay; the next is counted by the new limit.
    change(made, made.path.read_text().replace("max_connections = 2", "max_connections = 1"))
    assert again.publish_acked("x", "x") in (0, 0x10)
    with Raw(made.port, 5) as raw:
        raw.send(connect(5, "three", user="press", password=PASSWORD))
        assert raw.expect(CONNACK).code == 0x97


def test_subscriptions_of_a_client(gateway, password_hash):
    made = gateway(user(password_hash, "max_subscriptions = 2") + "[anonymous]\nmax_subscriptions = 1\n")
    for version, code in ((5, 0x97), (4, 0x80)):
        with as_user(made, "c", version) as c:
            assert c.subscribe("a", "b", "c", "a") == [1, 1, code, 1], "one that is renewed is no further one"
            c.unsubscribe("a")
            assert c.subscribe("c") == [1]
        with Raw(made.port, version).open("d") as d:
            assert d.subscribe("a", "b") == [1, code]
    with as_user(made, "c") as c:
        c.subscribe("a", "b")
        change(made, made.path.read_text().replace("max_subscriptions = 2", "max_subscriptions = 3"))
        assert c.subscribe("c", "d") == [1, 0x97]


def rate_of(raw, messages, payload=b"x"):
    """Sends all at once, and how long the acknowledgements took."""
    began = time.monotonic()
    burst = b"".join(publish(raw.version, "t", payload, 1, n) for n in range(1, messages + 1))
    sender = threading.Thread(target=raw.send, args=(burst,))
    sender.start()
    got = [raw.expect(PUBACK, timeout=30).packet_id for _ in range(messages)]
    sender.join()
    assert got == list(range(1, messages + 1)), "none is lost, in order"
    return time.monotonic() - began


@pytest.mark.parametrize("version", [4, 5])
def test_a_message_rate_holds_back_and_loses_nothing(gateway, password_hash, version):
    made = gateway(user(password_hash, "max_messages_per_second = 50"))
    with Raw(made.port, 5).open("ear") as ear, as_user(made, "fast", version) as fast, as_user(made, "sibling", version) as sibling:
        ear.subscribe("t")
        took = rate_of(fast, 150)
        # A second's worth may come at once.
        assert took > 1.9, f"150 messages at 50/s came within {took:.2f} s"
        assert len([ear.message() for _ in range(150)]) == 150
        client = shown(made, "fast")
        assert client["throttled"] > 0 and client["limits"]["max_messages_per_second"] == 50
        assert shown(made, "sibling")["throttled"] == 0, "a client's rate is its own"
        assert sibling.publish_acked("t", "x") in (0, 0x10)
        # Another rate holds at once.
        change(made, made.path.read_text().replace("per_second = 50", "per_second = 100000"))
        assert rate_of(fast, 150) < 1.9
        assert shown(made, "fast")["throttled"] == 0 or shown(made, "fast")["limits"]["max_messages_per_second"] == 100000


def test_a_byte_rate_holds_back_large_packets_too(gateway, password_hash):
    made = gateway(user(password_hash, 'max_bytes_per_second = "100 KiB"'))
    with as_user(made, "fast") as fast:
        # A second's worth may come at once, and the last read is paid for afterwards.
        took = rate_of(fast, 3, b"x" * (100 << 10))
        assert took > 1.3, f"300 KiB at 100 KiB/s came within {took:.2f} s"
    with as_user(made, "small") as small:
        took = rate_of(small, 300, b"x" * 1000)
        assert took > 1.2, f"300 KB at 100 KiB/s came within {took:.2f} s"


def test_a_client_that_waits_for_its_rate_is_not_silent(gateway, password_hash):
    """Its keep-alive does not run out while it is not read from."""
    made = gateway(user(password_hash, "max_messages_per_second = 1"))
    with as_user(made, "slow", keep_alive=1) as slow:
        assert rate_of(slow, 5) > 2.9
        assert slow.publish_acked("t", "x") in (0, 0x10)


def queued(made, client_id):
    return shown(made, client_id)["queued_bytes"]


def test_what_waits_for_a_session_is_bounded_and_the_rest_is_in_the_ledger(gateway, password_hash, client):
    """received + declared = published, and what is kept are the newest."""
    made = gateway(user(password_hash, 'max_queued_bytes = "64 KiB"'))
    ledger = Raw(made.port, 5).open("ledger")
    assert ledger.subscribe("status/loss/#") == [1]
    kept = {"session_expiry": 3600}
    with as_user(made, "away", clean=False, props=kept) as away:
        assert away.subscribe(("t", 1)) == [1]
        away.disconnect()
    with Raw(made.port, 5).open("pub") as pub:
        for n in range(1000):
            assert pub.publish_acked("t", f"{n:<1000}") in (0, 0x10)
    eventually(lambda: queued(made, "away") <= 64 << 10, what=lambda: f"{queued(made, 'away')} bytes wait")
    assert queued(made, "away") > 32 << 10, "no more than has to goes"
    with as_user(made, "away", clean=False, props=kept) as away:
        got = [int(p.payload) for p in (away.message() for _ in range(shown(made, "away")["queued_messages"]))]
        assert away.before_pong() == []
        eventually(lambda: shown(made, "away")["in_flight"] == 0 and queued(made, "away") == 0, what="all is acknowledged")
    assert got == list(range(1000 - len(got), 1000)), "the newest, in order"

    # By its id: an entry that grows while it is told is told again.
    entries = {}

    def declared():
        for p in ledger.before_pong():
            if p.kind == PUBLISH:
                entry = json.loads(p.payload)
                entries[entry["id"]] = entry
        return sum(e["count"] for e in entries.values()) == 1000 - len(got)

    eventually(declared, 15, lambda: f"{1000 - len(got)} declared lost; entries {entries}", 0.2)
    assert {(e["reason"], e["consumer"], e["source"]) for e in entries.values()} == {("queue full", "session:away", "client:pub")}
    ledger.close()


@pytest.mark.parametrize("qos", [1, 2])
def test_what_was_in_flight_and_was_dropped_leaves_nothing_behind(gateway, password_hash, qos):
    """Packet ids of dropped messages are free again, and the session goes on."""
    made = gateway(user(password_hash, 'max_queued_bytes = "16 KiB"'))
    kept = {"session_expiry": 3600}
    with as_user(made, "away", clean=False, props=kept) as away:
        away.subscribe(("t", qos))
        with Raw(made.port, 5).open("pub") as pub:
            for n in range(5):
                pub.publish_acked("t", f"first {n}", qos)
            for _ in range(5):
                away.message(acknowledge=False)
            away.reset()
            eventually(lambda: not shown(made, "away")["connected"], what="it is away")
            for n in range(40):
                pub.publish_acked("t", f"{n:<1000}", qos)
    eventually(lambda: queued(made, "away") <= 16 << 10, what=lambda: f"{queued(made, 'away')} bytes wait")
    with as_user(made, "away", clean=False, props=kept) as away:
        got = []
        while not got or got[-1] != 39:
            p = away._read()
            if p.kind == PUBLISH:
                got.append(int(p.payload.split()[-1]))
                away.send(ack(4 if qos == 1 else 5, p.packet_id))
            elif p.kind == 6:
                away.send(ack(7, p.packet_id))
        assert got == list(range(40 - len(got), 40)), got

        def settled():
            away.send(packet(12, 0, b""))
            while (p := away._read()).kind != 13:
                if p.kind == 6:
                    away.send(ack(7, p.packet_id))
            return shown(made, "away")["in_flight"] == 0

        eventually(settled, what=lambda: str(shown(made, "away")), interval=0.05)
        assert queued(made, "away") == 0


def test_the_queue_of_a_client_without_a_session_is_bounded_too(gateway, password_hash):
    made = gateway(user(password_hash, 'max_queued_bytes = "16 KiB"'))
    with as_user(made, "slow") as slow, Raw(made.port, 5).open("pub") as pub:
        slow.subscribe("t")
        for n in range(300):
            pub.publish_acked("t", f"{n:<1000}")
        client = shown(made, "slow")
        assert client["queued_bytes"] <= 16 << 10 and client["dropped"] > 100, client
        # In flight, then what waited.
        got = [int(slow.message().payload) for _ in range(client["in_flight"] + client["queued_messages"])]
        assert got == sorted(got) and len(got) + client["dropped"] == 300


def test_a_reload_bounds_what_waits_already(gateway, password_hash):
    made = gateway(user(password_hash))
    with as_user(made, "away", clean=False, props={"session_expiry": 3600}) as away:
        away.subscribe("t")
        away.disconnect()
    with Raw(made.port, 5).open("pub") as pub:
        for n in range(200):
            pub.publish_acked("t", f"{n:<1000}")
    assert queued(made, "away") > 190_000
    change(made, made.path.read_text() + 'max_queued_bytes = "32 KiB"\n')
    eventually(lambda: queued(made, "away") <= 32 << 10, what=lambda: f"{queued(made, 'away')} bytes wait")
    made.kill9()
    made.start()
    assert queued(made, "away") <= 32 << 10, "and it stays so"


# -- Failed logins


def knock(made, address, password="wrong", version=5, name="press"):
    with from_address(made, address, version) as raw:
        raw.send(connect(version, "knocker", user=name, password=password))
        return raw.expect(CONNACK).code


@pytest.mark.parametrize("version,wrong,wait", [(5, 0x86, 0x9F), (4, 0x04, 0x03)])
def test_an_address_that_sends_wrong_passwords_waits(gateway, password_hash, version, wrong, wait):
    made = gateway("[broker]\nfailed_logins_per_minute = 4\n" + user(password_hash))
    as_user(made, "remembered", version, host="127.0.0.2").disconnect()
    codes = [knock(made, "127.0.0.2", f"wrong {n}", version, name="press" if n % 2 else f"nobody {n}") for n in range(8)]
    assert codes == [wrong] * 4 + [wait] * 4
    assert knock(made, "127.0.0.2", PASSWORD, version) == wait, "also a right one: it may not be tried out"
    as_user(made, "elsewhere", version, host="127.0.0.3").disconnect()
    eventually(lambda: made.part("broker", "broker")["counters"]["logins_failed"] == 4, what="4 failed logins are counted", interval=0.1)
    # One line a minute says it, whatever the number.
    for _ in range(20):
        assert knock(made, "127.0.0.2", "wrong", version) == wait
    assert made.log.count("too many failed logins from 127.0.0.2") == 1
    # Without a limit it may try again, at once.
    change(made, made.path.read_text().replace("per_minute = 4", "per_minute = 0"))
    assert knock(made, "127.0.0.2", PASSWORD, version) == 0
    assert [knock(made, "127.0.0.2", "wrong", version) for _ in range(6)] == [wrong] * 6


def test_wrong_passwords_at_once_are_not_more_tries(gateway, password_hash):
    """Those that wait for their turn are not looked at either, once the share is used up."""
    made = gateway("[broker]\nfailed_logins_per_minute = 3\n" + user(password_hash))
    codes = []
    knockers = [threading.Thread(target=lambda n=n: codes.append(knock(made, "127.0.0.2", f"wrong {n}"))) for n in range(20)]
    for k in knockers:
        k.start()
    for k in knockers:
        k.join()
    assert sorted(codes) == [0x86] * 3 + [0x9F] * 17
