"""Reload: what changes in gateway.toml is applied to the parts it touches, while everybody else goes on; a file with faults
changes nothing, and what does not come up is taken back.
"""

import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import threading

import pytest

from rawmqtt import DISCONNECT, Raw
from support import BINARY, GUESTS, V3, V5, Mosquitto, eventually, free_port, listens, mqtt_uplink, new_seed


def reload(gateway, check=False, no_revert=False):
    """By the admin socket, as `tidegate reload` does; the line with the outcome."""
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(60)
        s.connect(str(gateway.data / "admin.sock"))
        s.sendall(json.dumps({"request": "reload", "check": check, "no_revert": no_revert}).encode() + b"\n")
        lines = s.makefile().read().splitlines()
    assert json.loads(lines[-1]) == {"done": True}, lines
    return json.loads(lines[0])


def command(gateway, *arguments):
    done = subprocess.run(
        [str(BINARY), "reload", "--config", str(gateway.path), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout + done.stderr


def changes(report):
    """As the log says them: `~ uplink cloud: url`."""
    sign = {"added": "+", "removed": "-", "changed": "~"}
    return [f"{sign[c['action']]} {c['kind']} {c['name']}".strip() + (": " + ", ".join(c["keys"]) if c["keys"] else "") for c in report["changes"]]


def change(gateway, text, outcome="applied", **options):
    """Writes the file and reloads."""
    gateway.write_config(text)
    report = reload(gateway, **options)
    assert report["outcome"] == outcome, report
    return report


def fingerprint(gateway):
    return hashlib.sha256(gateway.path.read_bytes()).hexdigest()[:12]


def runs(gateway):
    """The fingerprint of the configuration that runs, where the last reload was good."""
    return gateway.part("config", "gateway.toml")["text"].split()[0]


def hashed(password):
    done = subprocess.run([str(BINARY), "passwd"], input=password.encode() + b"\n", capture_output=True, timeout=20)
    return done.stdout.decode().strip()


@pytest.fixture(scope="module")
def hashes():
    return [hashed("first"), hashed("second")]


def user(name, password_hash, publish='["#"]', subscribe='["#"]'):
    return f'[[user]]\nname = "{name}"\npassword_hash = "{password_hash}"\npublish = {publish}\nsubscribe = {subscribe}\n\n'


class Traffic(threading.Thread):
    """Publishes QoS 1 without end and counts what it sees; any fault of its connection is kept."""

    def __init__(self, port, topic="traffic", **options):
        super().__init__(daemon=True)
        self.raw = Raw(port, 5, timeout=30).open(f"traffic-{topic}", **options)
        self.topic, self.acked, self.fault, self.over = topic, 0, None, threading.Event()

    def run(self):
        try:
            while not self.over.is_set():
                code = self.raw.publish_acked(self.topic, str(self.acked + 1))
                assert code in (0, 0x10), f"PUBACK 0x{code:02x}"
                self.acked += 1
        except Exception as fault:  # noqa: BLE001: told to the test
            self.fault = fault

    def wait_for_more(self, n=20):
        goal = self.acked + n
        eventually(lambda: self.acked >= goal or self.fault, 20, "traffic goes on")
        assert self.fault is None, self.fault

    def end(self):
        self.over.set()
        if self.is_alive():
            self.join(30)
        self.raw.close()


@pytest.fixture
def traffic(_started):
    def make(port, *arguments, **options):
        made = Traffic(port, *arguments, **options)
        _started.append(made)
        made.start()
        return made

    return make


# ---- Nothing, and faults --------------------------------------------------------------------------------------------


def test_a_file_that_says_the_same_disturbs_no_uplink(gateway, upstream, recorder):
    """QU-08: 50 reloads with 10,000 queued, then 50 while they are delivered: none lost, none twice, no reconnect."""
    upstream.stop()
    made = gateway(mqtt_uplink(upstream.port, extra="window = 7"))
    base = made.path.read_text()
    with Raw(made.port, 5).open("p") as p:
        for start in range(0, 10_000, 500):
            ids = [p.publish(f"t/{n % 10}", str(n), 1) for n in range(start, start + 500)]
            for packet_id in ids:
                p.expect(4, packet_id=packet_id)
    other = "[[uplink]]\nname = 'other'\nkind = 'file'\npath = 'other.jsonl'\n"

    def fifty():
        for n in range(10):
            change(made, base, "unchanged")
            change(made, f"# {n}\n{base}", "unchanged")
            change(made, f"{base}\n{other}", "applied")
            change(made, f"# {n}\n{base}\n{other}", "unchanged")
            change(made, base, "applied")

    waiting = made.status_all()["consumers"]
    fifty()
    assert made.status_all()["consumers"] == waiting
    upstream.start()
    app = recorder(upstream.port, "plants/#")
    eventually(lambda: len(app.arrivals) > 100, 20, "it is being delivered")
    reconnects = made.part("uplink", "cloud")["counters"]["reconnects"]
    fifty()
    eventually(lambda: len(app.seen) == 10_000, 60, lambda: f"10,000, {len(app.seen)} came")
    assert app.duplicates == 0
    assert made.part("uplink", "cloud")["counters"]["reconnects"] == reconnects


def test_faults_are_all_named_and_nothing_changes(gateway, traffic):
    made = gateway()
    flow = traffic(made.port)
    base = made.path.read_text()
    ran = runs(made)
    made.write_config(base + "\n[[uplink]]\nname = 'a'\nkind = 'mqtt'\nurl = 'tcp://x'\nwindow = 'many'\n[[listner]]\n")
    code, said = command(made)
    assert code == 1
    line = base.count("\n") + 5
    for expected in (f"gateway.toml:{line}:7: ", f"gateway.toml:{line + 1}:10: ", f"gateway.toml:{line + 2}:3: ", "nothing was changed"):
        assert expected in said, f"{expected} is not in\n{said}"
    assert command(made, "--check")[0] == 1
    part = made.part("config", "gateway.toml")
    assert part["health"] == "late" and part["counters"]["refused"] == 1, part
    flow.wait_for_more()
    made.write_config(base)
    assert command(made) == (0, "nothing has changed\n")
    assert runs(made) == ran and made.part("config", "gateway.toml")["health"] == "good"
    made.path.unlink()
    code, said = command(made)
    # The command finds the gateway by the file; by SIGHUP it is the gateway that says so.
    assert code == 1 and "No such file" in said
    made.process.send_signal(signal.SIGHUP)
    eventually(lambda: "there is no such file" in made.log, 5, "the log says it")
    flow.wait_for_more()


def test_check_says_what_would_change_and_changes_nothing(gateway):
    made = gateway()
    base = made.path.read_text()
    made.write_config(base.replace("[modules]", "max_connections = 5\n[modules]"))
    code, said = command(made, "--check")
    assert code == 0 and said.startswith(f'~ listener "127.0.0.1:{made.port}": max_connections\n'), said
    report = json.loads(command(made, "--check", "--json")[1])
    assert report["outcome"] == "checked" and report["good"] is True
    assert report["changes"] == [
        {"action": "changed", "kind": "listener", "name": f"127.0.0.1:{made.port}", "keys": ["max_connections"], "needs_restart": False}
    ]
    assert runs(made) != fingerprint(made)


@pytest.mark.parametrize("old, new, key", [('name = "line-4"', 'name = "line-5"', "name"), ('data_dir = "data"', 'data_dir = "d2"', "data_dir")])
def test_what_needs_a_restart_is_said_before_anything_is_applied(gateway, old, new, key):
    made = gateway()
    base = made.path.read_text()
    report = change(made, base.replace(old, new) + "\n[[stream]]\nname = 'a'\nfilter = ['a/#']\n", "refused")
    assert report["changes"][0]["keys"] == [key] and report["changes"][0]["needs_restart"]
    assert "systemctl restart" in report["why"]
    made.write_config(base)
    assert [s["name"] for s in made.status_all()["streams"]] == ["default"]


# ---- Listeners ------------------------------------------------------------------------------------------------------


def test_sighup_throws_nobody_off(gateway, client, traffic, hashes):
    """TL-04: 20 clients, 20 times, each with a file that differs."""
    made = gateway(user("press", hashes[0]))
    base = made.path.read_text()
    flow = traffic(made.port)
    clients = [
        client(made.port, f"c{n}", version=(V3, V5)[n % 2], **({"user": "press", "password": "first"} if n % 4 < 2 else {}))
        for n in range(20)
    ]
    for c in clients:
        c.subscribe("traffic", 1)
    first = flow.acked + 1
    for n in range(20):
        made.write_config(f"{base}\n[anonymous]\npublish = ['#']\nsubscribe = ['#', 'x/{n}']\n")
        made.process.send_signal(signal.SIGHUP)
        eventually(lambda: runs(made) == fingerprint(made), 10, "it runs")
        flow.wait_for_more(5)
    flow.end()
    for c in clients:
        eventually(lambda: c.payloads() and int(c.payloads()[-1]) == flow.acked, 10, "the last message")
        numbers = [int(p) for p in c.payloads() if int(p) >= first]
        assert numbers == list(range(first, flow.acked + 1))
        assert c.disconnects == 0
        # Not by its end alone, which waits for a thread that sleeps.
        c.disconnect()


def test_listeners_come_change_and_go(gateway, traffic, hashes):
    made = gateway(user("press", hashes[0]))
    base = made.path.read_text()
    flow = traffic(made.port)
    other = free_port()
    with_other = base + f'[[listener]]\nbind = "127.0.0.1:{other}"\n'
    assert changes(change(made, with_other)) == [f"+ listener 127.0.0.1:{other}"]
    anonymous, named = Raw(other, 5).open("a"), Raw(other, 5).open("n", user="press", password="first")
    # Limits are for those who come from then on …
    change(made, with_other + "max_packet = '2 KiB'\n")
    assert Raw(other, 5).open("small").connack.properties["maximum_packet_size"] == 2048
    anonymous.publish_acked("a", "x" * 10_000)
    # … who may be here at all holds at once.
    change(made, with_other + "allow_anonymous = false\n")
    assert anonymous.expect(DISCONNECT).code == 0x98
    anonymous.expect_closed()
    Raw(other, 5).open("again", expect_code=0x87)
    named.publish_acked("a", "x")
    assert changes(change(made, base)) == [f"- listener 127.0.0.1:{other}"]
    assert named.expect(DISCONNECT).code == 0x98
    named.expect_closed()
    assert not listens(other)
    assert ("listener", f"127.0.0.1:{other}") not in made.status()
    # To every address: whoever is on 127.0.0.1 is still served.
    change(made, base.replace(f'"127.0.0.1:{made.port}"', f'"0.0.0.0:{made.port}"\nallow_anonymous = true'))
    flow.wait_for_more()
    change(made, base)
    flow.wait_for_more()


def test_a_listener_that_cannot_be_opened_takes_the_reload_back(gateway, traffic):
    made = gateway()
    base = made.path.read_text()
    flow = traffic(made.port)
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    wanted = base + f'[[listener]]\nbind = "127.0.0.1:{port}"\n[[stream]]\nname = "a"\nfilter = ["a/#"]\nmax_bytes = "1 MiB"\n'
    report = change(made, wanted, "reverted")
    assert f"127.0.0.1:{port} is in use by another program" in report["why"] and not report["good"]
    part = made.part("config", "gateway.toml")
    assert part["health"] == "late" and part["text"].startswith("taken back") and part["counters"]["reverted"] == 1
    assert ("listener", f"127.0.0.1:{port}") not in made.status()
    assert made.path.read_text() == wanted, "the file is its writer's"
    flow.wait_for_more()
    code, said = command(made)
    assert code == 1 and "taken back" in said
    # Kept where that is asked for: not good, but it runs, and tries again.
    report = change(made, wanted, "applied", no_revert=True)
    assert not report["good"] and "is in use" in report["why"]
    assert made.part("listener", f"127.0.0.1:{port}")["health"] == "failed"
    taken.close()
    eventually(lambda: listens(port), 10, "it listens once it can")
    # And where the time for it is none.
    change(made, base)
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    text = base.replace("data_dir", "revert_after = '0 s'\ndata_dir") + f'[[listener]]\nbind = "127.0.0.1:{port}"\n'
    assert "is in use" in change(made, text, "applied")["why"]
    taken.close()
    flow.wait_for_more()


# ---- Users and rights -----------------------------------------------------------------------------------------------


def test_rights_hold_at_once_also_for_what_is_queued(gateway, client, hashes):
    """TL-06: added, and taken from a client with live subscriptions, from one that is away with a backlog."""
    everything = user("press", hashes[0])
    made = gateway(everything)
    base = made.path.read_text()
    here = Raw(made.port, 5).open("here", user="press", password="first")
    here.subscribe("keep/#", "lose/#", ("lose0/#", 0))
    slow = Raw(made.port, 5).open("slow", user="press", password="first", props={"receive_maximum": 1})
    slow.subscribe("keep/#", "lose/#")
    away = Raw(made.port, 5).open("away", user="press", password="first", clean=False, props={"session_expiry": 1000})
    away.subscribe("keep/#", "lose/#")
    away.disconnect()
    sender = Raw(made.port, 5).open("sender")
    for n in range(20):
        for topic in ("keep", "lose"):
            sender.publish_acked(f"{topic}/x", str(n))
    # One is with it and not acknowledged; the rest waits in the gateway.
    first = slow.message(acknowledge=False)
    assert here.messages(40)

    narrower = base.replace(everything, user("press", hashes[0], '["keep/#"]', '["keep/#"]') + user("new", hashes[1]))
    report = change(made, narrower)
    assert changes(report) == ["~ user press: publish, subscribe", "+ user new"]
    for topic in ("lose/x", "lose0/x", "keep/x"):
        sender.publish_acked(topic, "after")
    assert [(p.topic, p.payload) for p in [here.message()]] == [("keep/x", b"after")]
    assert here.before_pong() == []
    assert here.publish_acked("lose/y", "x") == 0x87 and here.publish_acked("keep/y", "x") == 0
    assert here.subscribe("lose/#") == [0x87]
    slow.acknowledge(first)
    assert [slow.message().payload for _ in range(20)] == [b"%d" % n for n in range(1, 20)] + [b"after"]
    away = Raw(made.port, 5).open("away", user="press", password="first", clean=False, props={"session_expiry": 1000})
    assert away.connack.session_present
    got = [away.message() for _ in range(22)]
    assert {p.topic for p in got} == {"keep/x", "keep/y"}, {p.topic for p in got}
    Raw(made.port, 5).open("n", user="new", password="second").publish_acked("lose/z", "x")
    # And given back: what is published from then on comes again, by the old subscription.
    change(made, base)
    sender.publish_acked("lose/x", "again")
    p = here.message()
    while p.topic == "keep/y":
        p = here.message()
    assert (p.topic, p.payload) == ("lose/x", b"again")


def test_anonymous_rules_change_too(gateway):
    made = gateway()
    base = made.path.read_text()
    with Raw(made.port, 5).open("a") as a:
        a.subscribe("x/#")
        change(made, base + "[anonymous]\npublish = ['#']\ndeny_publish = ['x/no']\nsubscribe = ['x/yes']\n")
        assert a.publish_acked("x/no", "1") == 0x87
        a.publish_acked("x/other", "2")
        a.publish_acked("x/yes", "3")
        assert a.message().payload == b"3"


def test_only_whose_user_or_password_is_gone_is_disconnected(gateway, traffic, hashes):
    names = ("removed", "changed", "kept")
    made = gateway("".join(user(name, hashes[0]) for name in names))
    head = made.path.read_text().split("[[user]]")[0]
    flow = traffic(made.port)
    here = {n: Raw(made.port, 5).open(n, user=n, password="first", will=(f"will/{n}", "gone", 1, False)) for n in names}
    ear = Raw(made.port, 5).open("ear")
    ear.subscribe("will/#")
    report = change(made, head + user("changed", hashes[1]) + user("kept", hashes[0]))
    assert changes(report) == ["- user removed", "~ user changed: password_hash"]
    for name in ("removed", "changed"):
        assert here[name].expect(DISCONNECT).code == 0x87
        here[name].expect_closed()
    here["kept"].publish_acked("a", "x")
    # Whose rights are gone has no will any more.
    assert ear.message().topic == "will/changed"
    assert ear.before_pong() == []
    for name, password, code in (("removed", "first", 0x86), ("changed", "first", 0x86), ("changed", "second", 0)):
        Raw(made.port, 5).open(f"{name}-again", user=name, password=password, expect_code=code)
    flow.wait_for_more()


# ---- Streams --------------------------------------------------------------------------------------------------------


def test_streams_come_change_and_go(gateway, upstream, recorder):
    upstream.stop()
    made = gateway(mqtt_uplink(upstream.port))
    base = made.path.read_text()
    p = Raw(made.port, 5).open("p")
    p.publish_acked("alarm/1", "0")
    stream = '[[stream]]\nname = "alarms"\nfilter = ["alarm/#"]\nmax_bytes = "64 KiB"\nwhen_full = "reject"\n'
    change(made, base + stream)
    taken = 1
    while p.publish_acked("alarm/1", "x" * 5_000) == 0:
        taken += 1
    assert 5 < taken < 20, "the stream is full by its new limit"
    p.publish_acked("other/1", "1")

    def messages():
        return {s["name"]: s["messages"] for s in made.status_all()["streams"]}

    eventually(lambda: messages() == {"default": 2, "alarms": taken - 1}, 5, messages)
    change(made, base + stream.replace("64 KiB", "10 MiB"))
    assert p.publish_acked("alarm/1", "2") == 0
    # Taken out: nothing new goes in, what is in it is delivered.
    assert changes(change(made, base)) == ["- stream alarms"]
    assert p.publish_acked("alarm/1", "3") == 0
    eventually(lambda: messages() == {"default": 3, "alarms": taken}, 5, messages)
    made.restart()
    upstream.start()
    app = recorder(upstream.port, "plants/#")
    eventually(lambda: len(app.arrivals) == taken + 3, 20, lambda: f"{taken + 3}, {len(app.arrivals)} came")


def test_more_new_streams_than_there_are_places_need_a_restart(gateway):
    made = gateway()
    base = made.path.read_text()
    many = "".join(f'[[stream]]\nname = "s{n}"\nfilter = ["s{n}/#"]\n' for n in range(5))
    report = change(made, base + many, "refused")
    assert [c["needs_restart"] for c in report["changes"]] == [True] * 5
    four = many[: many.index('[[stream]]\nname = "s4"')]
    change(made, base + four)
    assert len(made.status_all()["streams"]) == 5


# ---- Uplinks --------------------------------------------------------------------------------------------------------


def test_an_uplink_comes_changes_and_goes_and_no_other_notices(gateway, upstream, recorder, traffic, tmp_path, _started):
    second = Mosquitto(tmp_path / "second")
    _started.append(second)
    second.start()
    made = gateway(mqtt_uplink(upstream.port))
    base = made.path.read_text()
    app, other = recorder(upstream.port, "plants/#"), recorder(second.port, "#", client_id="other")
    made_other = mqtt_uplink(second.port, name="second", topic="s/{topic}", route_from='["traffic"]')
    eventually(lambda: made.part("uplink", "cloud")["health"] == "good", 10, "it is connected")
    flow = traffic(made.port)
    before = made.part("uplink", "cloud")
    report = change(made, base + made_other)
    assert changes(report) == ["+ uplink second"]
    eventually(lambda: len(other.arrivals) > 10, 10, "it delivers")
    change(made, base + made_other.replace("s/{topic}", "z/{topic}"))
    eventually(lambda: any(t.startswith("z/") for t, _ in list(other.arrivals)), 10, "by its new route")
    # Gone, and its backlog stays: what came while it was away is not for it.
    second.stop()
    eventually(lambda: made.part("uplink", "second")["health"] == "late", 10, "it says so")
    flow.wait_for_more()
    change(made, base)
    assert ("uplink", "second") not in made.status()

    def waiting():
        return {c["name"]: c["queued_messages"] for c in made.status_all()["consumers"]}.get("uplink:second", 0)

    flow.wait_for_more()
    kept = waiting()
    assert kept > 0
    flow.wait_for_more(50)
    flow.end()
    assert waiting() == kept
    second.start()
    other.connected.wait(10)
    change(made, base + made_other)
    eventually(lambda: waiting() == 0, 10, "its backlog is delivered")
    after = made.part("uplink", "cloud")
    assert after["since"] == before["since"] and after["counters"]["reconnects"] == before["counters"]["reconnects"]
    eventually(lambda: len(app.seen) == flow.acked, 10, lambda: f"{flow.acked} up, {len(app.seen)} came")
    assert app.duplicates == 0


def test_an_uplink_that_does_not_come_up_takes_the_reload_back(gateway, upstream, recorder, traffic):
    made = gateway(mqtt_uplink(upstream.port))
    base = made.path.read_text().replace("data_dir", "revert_after = '1 s'\ndata_dir")
    change(made, base)
    app = recorder(upstream.port, "plants/#")
    flow = traffic(made.port)
    nobody = free_port()
    report = change(made, base.replace(f":{upstream.port}", f":{nobody}"), "reverted")
    assert "uplink cloud: " in report["why"] and "does not answer" in report["why"]
    eventually(lambda: made.part("uplink", "cloud")["health"] == "good", 10, "the old one works again")
    assert command(made)[0] == 1
    # A new one beside it.
    report = change(made, base + mqtt_uplink(nobody, name="more", topic="m/{topic}"), "reverted")
    assert "uplink more: " in report["why"]
    assert ("uplink", "more") not in made.status()
    # Asked for so.
    assert change(made, base + mqtt_uplink(nobody, name="more", topic="m/{topic}"), "applied", no_revert=True)["good"]
    eventually(lambda: made.part("uplink", "more")["health"] == "late", 10, "it tries")
    # That one is down for reasons of its own: another route for it is no reason to go back, nor is another part's change.
    text = base + mqtt_uplink(nobody, name="more", topic="n/{topic}")
    change(made, text)
    change(made, text + "[anonymous]\npublish = ['#']\nsubscribe = ['a']\n")
    flow.end()
    eventually(lambda: len(app.seen) == flow.acked, 20, lambda: f"{flow.acked} up, {len(app.seen)} came")


def test_a_later_reload_takes_the_place_of_one_that_is_not_decided(gateway, upstream):
    made = gateway(mqtt_uplink(upstream.port))
    base = made.path.read_text()
    eventually(lambda: made.part("uplink", "cloud")["health"] == "good", 10, "it is connected")
    made.write_config(base.replace(f":{upstream.port}", f":{free_port()}"))
    outcomes = []
    waits = threading.Thread(target=lambda: outcomes.append(reload(made)["outcome"]))
    waits.start()
    eventually(lambda: made.part("config", "gateway.toml")["health"] == "starting", 10, "it waits")
    # A file with faults decides nothing.
    made.write_config("[gateway\n")
    assert reload(made)["outcome"] == "refused"
    assert outcomes == []
    change(made, base)
    waits.join(10)
    assert outcomes == ["superseded"]
    eventually(lambda: made.part("uplink", "cloud")["health"] == "good", 10, "it is connected again")
    assert made.part("config", "gateway.toml")["health"] == "good"


def test_a_stop_does_not_wait_for_a_reload(gateway):
    made = gateway()
    made.write_config(made.path.read_text() + mqtt_uplink(free_port()))
    waits = subprocess.Popen([str(BINARY), "reload", "--config", str(made.path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    eventually(lambda: made.part("config", "gateway.toml")["health"] == "starting", 10, "it waits")
    assert made.stop() < 4
    assert waits.wait(10) == 1


# ---- Modules and connectors -----------------------------------------------------------------------------------------


def test_a_modules_settings_swap_it_alone(gateway):
    module = "[[module]]\nname = '{}'\nsubscribe = ['{}/#']\n"
    made = gateway(module.format("one", "first") + module.format("two", "second"), start=False)
    made.drop_module(GUESTS / "echo.wasm", "one")
    made.drop_module(GUESTS / "echo.wasm", "two")
    made.start()
    for name in ("one", "two"):
        made.wait_for_module(name)
    base = made.path.read_text()
    assert changes(change(made, base.replace("first/#", "only/#"))) == ["~ module one: subscribe"]
    eventually(lambda: "subscribes to only/#" in made.part("module", "one")["text"], 10, "it is swapped")
    with Raw(made.port, 5).open("c") as c:
        c.subscribe("echo/#")
        for topic in ("first/x", "only/x"):
            c.publish_acked(topic, "x")
        assert c.message().topic == "echo/only/x"
    assert made.log.count("module runs") == 3, "one of them once more, the other as it was"
    # Another folder: everything of it anew.
    (made.folder / "m2").mkdir()
    change(made, base.replace('dir = "modules.d"', 'dir = "m2"'))
    eventually(lambda: not [k for k in made.status() if k[0] == "module"], 10, "they are gone")
    change(made, base)
    made.wait_for_module("one")


MACHINES = """
[[connector]]
name = "{0}"
kind = "simulator"

[[asset]]
name = "{0}"
connector = "{0}"
every = "{1}"
points = [{{ name = "temperature" }}]
"""


def test_a_connector_changes_alone(gateway):
    made = gateway(MACHINES.format("one", "100 ms") + MACHINES.format("two", "100 ms"))
    base = made.path.read_text()

    def connectors():
        return [name for kind, name in made.status() if kind == "connector"]

    eventually(lambda: connectors() == ["one", "two"], 10, "they run")
    changed = base.replace('name = "one"\nconnector = "one"\nevery = "100 ms"', 'name = "uno"\nconnector = "one"\nevery = "200 ms"')
    assert changes(change(made, changed)) == ["~ connector one: assets"]
    with Raw(made.port, 5).open("ear") as ear:
        ear.subscribe("data/uno")
        assert ear.message(timeout=20).topic == "data/uno"
    head = base.split("[[connector]]")[0]
    assert changes(change(made, head + MACHINES.format("two", "100 ms"))) == ["- connector one"]
    assert connectors() == ["two"]
    # On a busy machine it may be late, but it was not touched.
    assert made.log.count("started by a reload connector=") == 1


# ---- Whatever is written into the file ------------------------------------------------------------------------------

# TIDEGATE_MUTATIONS=20000 for a long run.
MUTATIONS = int(os.environ.get("TIDEGATE_MUTATIONS", 1000))

LARGE = """
[modules]
dir = "modules.d"

[[module]]
name = "one"
subscribe = ["data/#"]
memory = "8 MiB"

[[stream]]
name = "alarms"
filter = ["alarm/#"]
max_bytes = "1 MiB"
when_full = "reject"

[[stream]]
name = "rest"
filter = ["#"]
max_age = "30 days"

[[listener]]
bind = "127.0.0.1:{other}"
allow_anonymous = false
max_packet = "64 KiB"
max_connections = 50

[anonymous]
publish = ["#"]
subscribe = ["#"]
deny_publish = ["secret/#"]

[[user]]
name = "press"
password_hash = "{hash}"
publish = ["sensors/#"]
subscribe = ["commands/#"]

[[uplink]]
name = "archive"
kind = "file"
path = "archive.jsonl"
max_bytes = "1 MiB"
keep = 2

[[uplink]]
name = "cloud"
kind = "mqtt"
url = "mqtt://127.0.0.1:{upstream}"
version = "5"
client_id = "gateway"
keep_alive = "30 s"
window = 50

[[route]]
from = ["#"]
to = "archive"

[[route]]
from = ["sensors/#", "data/#"]
to = "cloud"
topic = "plants/{{gateway}}/{{topic}}"

[[route]]
from_uplink = "cloud"
from = ["plants/{{gateway}}/commands/#"]
topic = "commands/{{rest}}"

[[connector]]
name = "sim"
kind = "simulator"

[[asset]]
name = "boiler"
connector = "sim"
every = "500 ms"
points = [{{ name = "temperature", type = "float64" }}, {{ name = "valve" }}]
"""


def mutate(rng, text):
    """One to three slips of the hand, of the editor or of the disk."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        kind = rng.randrange(9)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind == 2:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 3 and lines[at]:
            # A digit more, less or another: a different port, size or time.
            place = [i for i, c in enumerate(lines[at]) if c.isdigit()]
            if place:
                i = rng.choice(place)
                lines[at] = lines[at][:i] + rng.choice(("", "0", "7", lines[at][i] * 2)) + lines[at][i + 1 :]
        elif kind == 4 and lines[at]:
            i = rng.randrange(len(lines[at]))
            lines[at] = lines[at][:i] + rng.choice("\"'[]{}=#,.+/\\ äx\x00") + lines[at][i + rng.randrange(2) :]
        elif kind == 5:
            # A whole section gone.
            starts = [i for i, line in enumerate(lines) if line.startswith("[")]
            if starts:
                first = rng.choice(starts)
                last = next((i for i in starts if i > first), len(lines))
                del lines[first:last]
        elif kind == 6:
            lines = lines[: at + 1]
        elif kind == 7 and lines[at]:
            # A word for another of the file.
            words = [w for line in lines for w in line.replace('"', " ").split() if w.isalnum()]
            parts = lines[at].split(" ")
            if words and parts:
                parts[rng.randrange(len(parts))] = rng.choice(words)
                lines[at] = " ".join(parts)
        else:
            lines[at] = lines[at].replace("true", "false") if "true" in lines[at] else lines[at].replace("false", "true")
        text = "\n".join(lines)
    return text


def test_whatever_is_in_the_file_the_gateway_runs_on(gateway, upstream, traffic, hashes, request):
    """Mutated files under traffic: never down, nobody disconnected whom the change does not mean, and after each the
    configuration runs that was good last: the file's own where it was taken, else the one before."""
    rng = random.Random(new_seed(request.node.name))
    made = gateway(start=False)
    other = free_port()
    head = f"""[gateway]
name = "line-4"
data_dir = "data"
revert_after = "300 ms"

[[listener]]
bind = "127.0.0.1:{made.port}"

[[user]]
name = "keeper"
password_hash = "{hashes[0]}"
publish = ["traffic"]
subscribe = ["traffic"]

"""
    base = LARGE.format(other=other, hash=hashes[1], upstream=upstream.port)
    made.write_config(head + base)
    made.drop_module(GUESTS / "echo.wasm", "one")
    made.start()
    eventually(lambda: made.part("uplink", "cloud")["health"] == "good", 20, "the uplink is up")
    good = fingerprint(made)
    flow = traffic(made.port, user="keeper", password="first")
    outcomes = {}
    for n in range(MUTATIONS):
        # What the traffic itself stands on is left alone; everything else may be anything.
        text = head + mutate(rng, base)
        made.path.write_bytes(text.encode())
        report = reload(made)
        outcomes[report["outcome"]] = outcomes.get(report["outcome"], 0) + 1
        if report["outcome"] in ("applied", "unchanged"):
            good = fingerprint(made)
        else:
            assert report["outcome"] in ("refused", "reverted") and report["why"], report
        if report["outcome"] == "refused" and not report["changes"]:
            assert "gateway.toml" in report["why"], report
        assert flow.fault is None, f"mutation {n}: {flow.fault}\n{changes(report)}\n{text}"
        # And back to the whole: whatever ran, it is taken.
        made.write_config(head + base)
        report = reload(made)
        assert report["outcome"] in ("applied", "unchanged"), f"mutation {n}: {report}\n{text}"
        good = fingerprint(made)
        if n % 10 == 0:
            assert runs(made) == good
            flow.wait_for_more(5)
    print(f"{MUTATIONS} mutations: {outcomes}; {flow.acked} messages acknowledged meanwhile")
    flow.wait_for_more()
    assert made.starts == 1 and made.alive()
    assert "a fault in the program" not in made.log and "panicked" not in made.log
    assert runs(made) == fingerprint(made)
    assert len(outcomes) >= 3, outcomes
