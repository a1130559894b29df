"""tidegate client list|show|kick and topic list|clear: what a person at the machine can see and do."""

import json
import threading

import pytest

from rawmqtt import DISCONNECT, PUBLISH, Closed, Raw, publish
from support import eventually
from test_cli import Socket, cli, fits

KEPT = {"session_expiry": 3600}


def lines(out):
    return [json.loads(line) for line in out.splitlines()]


def test_clients_are_listed_and_shown(gateway):
    made = gateway("[anonymous]\nmax_subscriptions = 7\n")
    with Raw(made.port, 5).open("here", will=("a/will", "x", 1, False)) as here, Raw(made.port, 4).open("old", clean=False) as old:
        here.subscribe("a/#", ("b", 0))
        old.subscribe("q")
        old.disconnect()
        here.publish_acked("q", "waits")
        code, out, _ = cli(made, "client", "list")
        assert code == 0 and fits(out), out
        assert "connected" in out and "away" in out and "1 messages" in out
        listed = {c["client_id"]: c for c in lines(cli(made, "client", "list", "--json")[1])}
        assert set(listed) == {"here", "old"}
        assert listed["here"]["connected"] and listed["here"]["version"] == "5" and listed["here"]["address"].startswith("127.0.0.1:")
        assert listed["old"]["queued_messages"] == 1 and listed["old"]["session_expiry_s"] is None and not listed["old"]["connected"]
        assert [c["client_id"] for c in lines(cli(made, "client", "list", "--json", "--connected")[1])] == ["here"]
        assert cli(made, "client", "list", "--user", "nobody")[1] == ""
        client = json.loads(cli(made, "client", "show", "here", "--json")[1])
        assert [(f["filter"], f["qos"]) for f in client["filters"]] == [("a/#", 1), ("b", 0)]
        assert client["will_topic"] == "a/will" and client["limits"]["max_subscriptions"] == 7 and client["listener"].endswith(str(made.port))
        code, out, _ = cli(made, "client", "show", "here")
        assert code == 0 and fits(out) and "2 of 7" in out and "qos 1 a/#" in out, out
        code, out, err = cli(made, "client", "show", "nobody")
        assert code == 1 and out == "" and "no client" in err and "client list" in err


def test_a_client_is_kicked_and_its_session_kept_or_not(gateway):
    made = gateway()
    with Raw(made.port, 5).open("ear") as ear:
        ear.subscribe("will")
        kicked = Raw(made.port, 5).open("c", clean=False, props=KEPT, will=("will", "gone", 1, False))
        kicked.subscribe("t")
        code, out, _ = cli(made, "client", "kick", "c")
        assert code == 0 and "session is kept" in out
        assert kicked.expect(DISCONNECT).code == 0x98
        kicked.expect_closed()
        assert ear.message().payload == b"gone", "the client did not say goodbye"
        code, _, err = cli(made, "client", "kick", "c")
        assert code == 1 and "not connected" in err and "--end-session" in err
        ear.publish_acked("t", "meanwhile")
        made.kill9()
        made.start()
    with Raw(made.port, 5).open("c", clean=False, props=KEPT) as again:
        assert again.connack.session_present and again.message().payload == b"meanwhile"
        code, out, _ = cli(made, "client", "kick", "c", "--end-session", "--json")
        assert code == 0 and json.loads(out) == {"kicked": "c", "session_ended": True}
        assert again.expect(DISCONNECT).code == 0x98
    made.kill9()
    made.start()
    assert cli(made, "client", "list")[1] == ""
    with Raw(made.port, 5).open("c", clean=False, props=KEPT) as last:
        assert not last.connack.session_present
        last.disconnect()
    assert cli(made, "client", "kick", "c", "--end-session")[0] == 0, "also one that is away"
    assert cli(made, "client", "kick", "c")[0] == 1
    with Raw(made.port, 4).open("three") as three:
        assert cli(made, "client", "kick", "three")[0] == 0
        three.expect_closed()


def test_many_sessions_are_paged(gateway):
    """A thousand and more, through the bounds of a page, each once."""
    made = gateway()
    held = [Raw(made.port, 4).open(f"c-{n}") for n in range(1100)]
    listed = [c["client_id"] for c in lines(cli(made, "client", "list", "--json")[1])]
    assert sorted(listed) == sorted(f"c-{n}" for n in range(1100))
    for one in held:
        one.close()


def test_retained_topics_are_listed_and_cleared_for_good(gateway):
    made = gateway()
    with Raw(made.port, 5).open("c") as c:
        for n in range(5000):
            c.publish(f"many/{n:04}", "x" * 100, 1, retain=True)
            if n % 500 == 499:
                for _ in range(500):
                    c.read()
        c.publish_acked("other/\u00e9", b"\x00\xff", retain=True)
        c.publish_acked("$own/x", "y", retain=True)
        assert cli(made, "topic", "list", "--json")[1].count("\n") == 5001, "# does not match $own"
        topics = [m["topic"] for m in lines(cli(made, "topic", "list", "many/+", "--json")[1])]
        assert topics == [f"many/{n:04}" for n in range(5000)]
        code, out, _ = cli(made, "topic", "list", "other/#")
        assert code == 0 and out.split()[1:] == ["2", "B", "other/\u00e9"]
        (message,) = lines(cli(made, "topic", "list", "$own/#", "--json")[1])
        assert message["payload"] == "y" and message["retain"]
        assert c.subscribe(("many/+", 0x21)) == [1]
        code, out, _ = cli(made, "topic", "clear", "many/1+")
        assert code == 1
        code, out, _ = cli(made, "topic", "clear", "many/#", "--json")
        assert code == 0 and json.loads(out) == {"cleared": 5000}
        made.kill9()
    made.start()
    assert [m["topic"] for m in lines(cli(made, "topic", "list", "--json")[1])] == ["other/\u00e9"]
    assert "1 retained message is removed" in cli(made, "topic", "clear", "$own/x")[1]
    assert "no retained message" in cli(made, "topic", "clear", "$own/x")[1]


def test_who_listens_hears_of_a_cleared_topic(gateway):
    made = gateway()
    with Raw(made.port, 5).open("c") as c:
        c.publish_acked("a/b", "x", retain=True)
        c.subscribe("a/#")
        assert c.message().payload == b"x"
        cli(made, "topic", "clear", "a/b")
        cleared = c.message()
        assert (cleared.topic, cleared.payload) == ("a/b", b"")


def test_the_admin_socket_refuses_what_is_no_filter(gateway):
    made = gateway()
    for request in ({"request": "retained", "filter": "a/#/b"}, {"request": "clear-retained", "filter": ""}, {"request": "clear-retained"}):
        answer = Socket(made).ask(request)
        assert "error" in answer[-1], answer
