"""Who may do what: [anonymous] and [[user]] rules, deny wins, a wider subscription is granted and each delivery checked."""

import subprocess
import threading
import time

import pytest

from rawmqtt import CONNACK, PUBACK, Closed, Raw, connect
from support import BINARY, free_port

RULES = """
[anonymous]
publish = ["open/#", "mixed/#"]
subscribe = ["#"]
deny_publish = ["mixed/secret/#"]
deny_subscribe = ["secret/#", "mixed/secret/#"]

[[user]]
name = "press-7"
password_hash = "{hash}"
publish = ["sensors/press-7/#", "secret/#", "mixed/#"]
subscribe = ["commands/press-7/#", "secret/+"]

[[user]]
name = "mute"
password_hash = "{hash}"
publish = []
subscribe = ["#"]
"""


def hashed(password):
    """As an operator makes it: by the program itself, the password on stdin and never among the arguments."""
    done = subprocess.run([str(BINARY), "passwd"], input=password.encode() + b"\n", capture_output=True, timeout=20)
    assert done.returncode == 0, done.stderr
    made = done.stdout.decode().strip()
    assert made.startswith("$argon2id$") and password not in made
    return made


@pytest.fixture(scope="module")
def password_hash():
    return hashed("correct horse")


@pytest.fixture
def broker(gateway, password_hash):
    return gateway(RULES.format(hash=password_hash))


def opened(broker, client_id, version=5, **options):
    return Raw(broker.port, version).open(client_id, **options)


def as_user(broker, name="press-7", version=5, password="correct horse", **options):
    return opened(broker, f"as-{name}", version, user=name, password=password, **options)


@pytest.mark.parametrize("version,code", [(4, 0x04), (5, 0x86)])
@pytest.mark.parametrize("user,password", [("press-7", "not this one"), ("nobody", "correct horse"), ("press-7", ""), ("press-7", None)])
def test_a_wrong_user_or_password_is_refused(broker, version, code, user, password):
    with Raw(broker.port, version) as raw:
        # A user without any password may be told that it is not authorized.
        codes = (code, 0x05, 0x87) if password is None else (code,)
        raw.send(connect(version, "x", user=user, password=password))
        assert raw.expect(CONNACK).code in codes
        raw.expect_closed()
    assert "correct horse" not in broker.log and "not this one" not in broker.log, "a secret is never logged"


def test_the_right_password_lets_in_each_time(broker):
    for version in (4, 5):
        for _ in range(2):
            as_user(broker, version=version).disconnect()


def test_publish_rules(broker):
    """An MQTT 5 publisher is told 0x87; what is allowed goes through."""
    with opened(broker, "ear") as ear, opened(broker, "anonymous") as anonymous, as_user(broker) as press:
        assert ear.subscribe("#") == [1]
        table = [
            (anonymous, "open/x", True),
            (anonymous, "closed/x", False),
            (anonymous, "mixed/x", True),
            (anonymous, "mixed/secret/x", False),
            (anonymous, "mixed/secret", False),
            (press, "sensors/press-7/t", True),
            (press, "sensors/press-8/t", False),
            (press, "open/x", False),
        ]
        for who, topic, allowed in table:
            code = who.publish_acked(topic, topic)
            assert (code in (0, 0x10)) == allowed, f"{topic}: 0x{code:02x}"
            if not allowed:
                assert code == 0x87
        anonymous.publish_acked("open/end", "")
        assert [m.topic for m in ear.until("open/end")] == [t for _, t, allowed in table if allowed]


def test_a_3_1_1_publisher_that_may_not_is_acknowledged_or_cut_and_nothing_is_forwarded(broker):
    """3.1.1 has no way to say it [3.3.5.2]: a positive acknowledgement or the end of the connection."""
    with opened(broker, "ear") as ear, opened(broker, "pub", 4) as pub:
        ear.subscribe("#")
        try:
            pub.publish("closed/x", "x", 1, packet_id=1)
            assert pub.read(timeout=5).kind == PUBACK
        except Closed:
            pass
        with opened(broker, "marker") as marker:
            marker.publish_acked("open/end", "")
        assert ear.until("open/end") == []


@pytest.mark.parametrize("version,denied", [(4, 0x80), (5, 0x87)])
def test_a_filter_wholly_denied_is_refused_a_wider_one_is_granted_and_checked(broker, version, denied):
    with opened(broker, "ear", version) as ear, as_user(broker) as press, opened(broker, "other") as other:
        assert ear.subscribe("secret/#", "secret/+/x", "mixed/secret/a", "mixed/#", "#", "mixed/+/a") == [
            denied, denied, denied, 1, 1, 1,
        ]
        press.publish_acked("secret/x", "must not be seen")
        press.publish_acked("mixed/secret/a", "must not be seen")
        press.publish_acked("mixed/a", "seen")
        other.publish_acked("open/end", "")
        assert {(m.topic, m.payload) for m in ear.until("open/end")} == {("mixed/a", b"seen")}


def test_retained_and_queued_messages_are_checked_as_well(broker):
    with as_user(broker) as press:
        press.publish_acked("secret/r", "must not be seen", retain=True)
        press.publish_acked("mixed/r", "seen", retain=True)
    with opened(broker, "ear") as ear:
        ear.subscribe("#")
        assert [m.topic for m in ear.before_pong()] == ["mixed/r"]
    with as_user(broker) as press:
        assert press.subscribe("secret/+") == [1]
        assert press.message().payload == b"must not be seen"
        assert press.subscribe("secret/#", "commands/press-7/x", "#")[1] == 1


def test_a_will_is_checked_like_a_publish(broker):
    with as_user(broker, "mute") as ear:
        ear.subscribe("#")
        # Refused at once, or not published when its time has come.
        with Raw(broker.port, 5) as doomed:
            doomed.send(connect(5, "doomed", will=("closed/will", "gone", 1, False)))
            assert doomed.expect(CONNACK).code in (0, 0x87)
            doomed.reset()
        opened(broker, "doomed", will=("open/will", "gone", 1, False)).reset()
        assert ear.message().topic == "open/will"
        with opened(broker, "marker") as marker:
            marker.publish_acked("open/end", "")
        assert ear.until("open/end") == []


def test_an_empty_allow_list_allows_nothing(broker):
    with as_user(broker, "mute") as mute:
        assert mute.publish_acked("open/x", "x") == 0x87


def test_without_rules_clients_on_loopback_may_do_everything(gateway):
    made = gateway()
    with opened(made, "c") as c:
        assert c.subscribe("#", "$SYS/#", "secret/#") == [1, 1, 1]
        assert c.publish_acked("anything/at/all", "x") in (0, 0x10)


def test_an_anonymous_client_off_loopback_is_refused(gateway, password_hash):
    """0.0.0.0 without allow_anonymous: a user gets in, nobody else; on loopback too, since the listener is not bound to it."""
    port = free_port()
    config = (
        f'[gateway]\nname = "g"\ndata_dir = "data"\n[[listener]]\nbind = "0.0.0.0:{port}"\n'
        + RULES.format(hash=password_hash)
    )
    made = gateway(config, head=False, port=port)
    for version, code in ((4, 0x05), (5, 0x87)):
        with Raw(port, version) as raw:
            raw.send(connect(version, "anonymous"))
            assert raw.expect(CONNACK).code == code
            raw.expect_closed()
    as_user(made).disconnect()


def test_anonymous_off_loopback_can_be_allowed_in_so_many_words(gateway):
    port = free_port()
    made = gateway(
        f'[gateway]\nname = "g"\ndata_dir = "data"\n[[listener]]\nbind = "0.0.0.0:{port}"\nallow_anonymous = true\n',
        head=False,
        port=port,
    )
    opened(made, "anonymous").disconnect()


def test_many_wrong_passwords_do_not_hold_up_the_others(broker):
    """Hashing takes milliseconds of CPU and is done aside."""
    def knock():
        for _ in range(10):
            with Raw(broker.port, 5, timeout=60) as raw:
                raw.send(connect(5, "x", user="press-7", password="not this one"))
                raw.read()

    knockers = [threading.Thread(target=knock) for _ in range(4)]
    with opened(broker, "quiet") as quiet:
        for k in knockers:
            k.start()
        slowest = 0.0
        while any(k.is_alive() for k in knockers):
            began = time.monotonic()
            quiet.publish_acked("open/x", "x")
            slowest = max(slowest, time.monotonic() - began)
    print(f"slowest PUBACK beside 40 wrong passwords: {slowest * 1000:.1f} ms")
    assert slowest < 0.15
