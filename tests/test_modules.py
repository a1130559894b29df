"""Modules are loaded, swapped and unloaded while the gateway runs, and one that misbehaves costs only itself.

The guests are built from source by modules/build; what they do is in their own sources below modules/. Cases MO-….
"""

import json
import threading
import time

import pytest

from rawmqtt import PUBACK, Raw, publish
from support import GUESTS, REPOSITORY, eventually

COMMITTED = REPOSITORY / "modules.d" / "average.wasm"


def dead_letters(part):
    return part["counters"]["poisonous"] + part["counters"]["rejected"]


def with_module(gateway, guest, config="", **options):
    made = gateway(config, start=False, **options)
    made.drop_module(GUESTS / f"{guest}.wasm")
    made.start()
    made.wait_for_module(guest)
    return made


def send(gateway, topic, payloads):
    with Raw(gateway.port).open("source") as source:
        for at in range(0, len(payloads), 500):
            chunk = payloads[at : at + 500]
            source.send(b"".join(publish(4, topic, p, 1, n + 1) for n, p in enumerate(chunk)))
            for _ in chunk:
                source.expect(PUBACK)


def test_a_dropped_file_runs_a_replaced_one_is_swapped_a_deleted_one_stops(gateway, client):
    made = gateway('[[module]]\nname = "echo"\nsubscribe = ["in"]\npublish = ["echo/#"]\nconfig = { tag = "one:" }\n')
    ear = client(made.port, "ear")
    ear.subscribe("echo/#")
    began = time.monotonic()
    made.drop_module(GUESTS / "echo.wasm")
    mouth = client(made.port, "mouth")

    # A subscription counts from the moment at which it is made: asked again until the first answer.
    def answered():
        mouth.publish("in", "hello")
        return ear.messages

    eventually(answered, 10, "the first answer", 0.005)
    print(f"dropped file to first answer: {(time.monotonic() - began) * 1000:.0f} ms (compiled for the first time)")
    assert ear.messages[0].payload == b"one:hello"

    # Swapped for a program that answers nothing, then for one that answers again: nothing in between is lost.
    mouth.publish("in", "mark 1")
    eventually(lambda: b"one:mark 1" in ear.payloads())
    other = made.folder / "echo2.wasm"
    other.write_bytes((GUESTS / "echo.wasm").read_bytes() + b"\x00\x08\x07version")
    stop = threading.Event()
    sent = []

    def talk():
        with Raw(made.port).open("talker") as t:
            while not stop.is_set():
                t.publish_acked("in", b"n%d" % len(sent))
                sent.append(len(sent))

    talker = threading.Thread(target=talk)
    talker.start()
    try:
        # Of one part the log says at most ten lines a minute.
        for _ in range(4):
            before = made.log.count("module runs")
            made.drop_module(other, "echo")
            eventually(lambda: made.log.count("module runs") > before, 10, "the swap")
            before = made.log.count("module runs")
            made.drop_module(GUESTS / "echo.wasm")
            eventually(lambda: made.log.count("module runs") > before, 10, "the swap back")
    finally:
        stop.set()
        talker.join()
    wanted = [b"one:n%d" % n for n in sent]
    eventually(lambda: set(wanted) <= set(ear.payloads()), 10, "every message, over eight swaps")
    firsts = list(dict.fromkeys(p for p in ear.payloads() if p.startswith(b"one:n")))
    assert firsts == wanted, "in order"
    print(f"{len(sent)} messages over eight swaps, {sum(p.startswith(b'one:n') for p in ear.payloads()) - len(wanted)} twice")

    made.remove_module("echo")
    eventually(lambda: ("module", "echo") not in made.status(), 10, "it is gone from the status")
    count = len(ear.messages)
    ear.subscribe("marker")
    mouth.publish("in", "nobody answers")
    mouth.publish("marker", "")
    ear.wait_for(count + 1)
    assert ear.messages[-1].topic == "marker"


def test_a_cached_module_answers_within_200_ms_of_its_drop(gateway, client):
    made = with_module(gateway, "echo", '[[module]]\nname = "echo"\nsubscribe = ["in"]\n')
    made.remove_module("echo")
    eventually(lambda: ("module", "echo") not in made.status())
    ear, mouth = client(made.port, "ear"), client(made.port, "mouth")
    ear.subscribe("echo/#")
    # The best of three: the machine is not ours alone.
    best = 9.0
    for _ in range(3):
        ear.messages.clear()
        began = time.monotonic()
        made.drop_module(GUESTS / "echo.wasm")

        def answered():
            mouth.publish("in", "x")
            return ear.messages

        eventually(answered, 10, "an answer", 0.002)
        best = min(best, time.monotonic() - began)
        made.remove_module("echo")
        eventually(lambda: ("module", "echo") not in made.status())
    print(f"dropped file to first answer: {best * 1000:.0f} ms")
    assert best <= 0.2


def test_one_bad_record_is_set_aside_and_the_others_go_through(gateway, client):
    """MO-01: it traps on X; 1,000 good, X, 1,000 good. 2,000 through, X in the dead letters, the module started anew."""
    made = with_module(gateway, "misbehave")
    ear = client(made.port, "ear")
    ear.subscribe("done/do/#")
    send(made, "do/x", [b"%d" % n for n in range(1000)] + [b"trap"] + [b"%d" % n for n in range(1000, 2000)])
    ear.wait_for(2000, 30)
    firsts = [int(p) for p in dict.fromkeys(ear.payloads())]
    assert firsts == list(range(2000)), "all, in order"
    assert len(ear.messages) == 2000, "a trap undoes what its batch did: nothing twice"
    part = eventually(
        lambda: (p := made.part("module", "misbehave"))["counters"]["poisonous"] == 1 and p, 10, lambda: made.status()
    )
    assert part["health"] == "good", part
    # Once in its batch, once alone.
    assert 1 <= part["counters"]["restarts"] <= 2
    assert "unreachable" in made.log, "the reason is said"


@pytest.mark.parametrize(
    "what,word",
    [("panic", "the payload says panic"), ("loop", "deadline"), ("recurse", "stack"), ("memory bomb", ""), ("too few outcomes", "outcome")],
)
def test_each_kind_of_harm_is_stopped_and_named(gateway, client, what, word):
    made = with_module(gateway, "misbehave")
    ear = client(made.port, "ear")
    ear.subscribe("done/do/#")
    before_kb = made.memory_kb()
    send(made, "do/x", [b"before", what.encode(), b"after"])
    ear.wait_for(2, 15)
    assert ear.payloads() == [b"before", b"after"]
    eventually(lambda: dead_letters(made.part("module", "misbehave")) == 1, 10, lambda: made.status())
    assert word in made.log.lower()
    assert made.memory_kb() - before_kb < 12_000, "a bomb's memory is given back"


def test_an_endless_loop_ends_at_its_deadline_and_disturbs_nobody(gateway, client):
    """Deadline 50 ms (+ 50 ms), while another client's acknowledgements go on."""
    made = with_module(gateway, "misbehave")
    ear = client(made.port, "ear")
    ear.subscribe("done/do/#")
    with Raw(made.port).open("other") as other:
        quiet = latencies(other, 300)
        stop = threading.Event()

        def harm():
            for n in range(20):
                # A good one between: so many bad ones in a row would set the module aside.
                send(made, "do/x", [b"loop", b"good %d" % n])
            stop.set()

        harmer = threading.Thread(target=harm)
        harmer.start()
        during = []
        while not stop.is_set() or made.part("module", "misbehave")["counters"]["poisonous"] < 20:
            during += latencies(other, 50)
        harmer.join()
    print(f"p99 PUBACK: {p99(quiet) * 1000:.2f} ms quiet, {p99(during) * 1000:.2f} ms beside a looping module ({len(during)})")
    # Less than 10 % is for the bench; here: it is not held up by whole deadlines.
    assert p99(during) < p99(quiet) + 0.03
    assert len(set(ear.payloads())) == 20


def latencies(raw, count):
    out = []
    for _ in range(count):
        began = time.monotonic()
        raw.publish_acked("latency", b"x" * 100)
        out.append(time.monotonic() - began)
    return out


def p99(values):
    return sorted(values)[int(len(values) * 0.99)]


def test_one_that_fails_on_everything_is_set_aside_with_the_reason_and_comes_back_when_replaced(gateway):
    # The filter stays over the change of the file: a new one would count from now.
    made = with_module(gateway, "misbehave", '[[module]]\nname = "misbehave"\nsubscribe = ["do/#"]\n')
    send(made, "do/x", [b"trap"] * 10)
    part = made.wait_for_module("misbehave", "failed")
    assert "set aside" in part["text"] and "unreachable" in part["text"], part["text"]
    # Everything else runs, and its messages stay queued: a corrected file gets every one of them, and none is lost.
    send(made, "do/x", [b"later"])
    assert part["counters"]["poisonous"] == 0, "it may be the module's fault: no message is given up for it"
    made.drop_module(GUESTS / "passthrough.wasm", "misbehave")
    made.wait_for_module("misbehave")
    eventually(lambda: made.part("module", "misbehave")["counters"]["received"] >= 11, 10, lambda: made.status())


@pytest.mark.parametrize("topic,payloads", [("loop/self", [b"x"]), ("loop/a", [b"%d" % n for n in range(20)])])
def test_a_module_that_answers_itself_is_stopped_and_named(gateway, client, topic, payloads):
    """MO-03: stopped within a bound, named in the status, others not disturbed."""
    made = with_module(gateway, "loop")
    with Raw(made.port).open("other") as other:
        quiet = latencies(other, 300)
        send(made, topic, payloads)
        during = latencies(other, 300)
    part = eventually(
        lambda: (p := made.part("module", "loop"))["health"] == "late" and p, 10, lambda: f"named: {made.status()}"
    )
    assert "loop/" in part["text"], part["text"]

    def calm():
        before = made.part("module", "loop")["counters"]["published"]
        cpu, began = made.cpu_s(), time.monotonic()
        eventually(lambda: time.monotonic() - began > 0.5, 2)
        return made.part("module", "loop")["counters"]["published"] == before and made.cpu_s() - cpu < 0.1

    eventually(calm, 10, "it has come to rest")
    published = made.part("module", "loop")["counters"]["published"]
    print(f"{published} published; p99 {p99(quiet) * 1000:.2f} → {p99(during) * 1000:.2f} ms")
    assert published <= 10_000


@pytest.mark.timeout(180)
def test_memory_does_not_grow_with_traps(gateway, client):
    """MO-05, 4 modules in parallel, traps in the midst of publish and state-set. The gateway's own rules set a module aside after
    100 failures a minute, so this many a module: growth is measured from the first fifth on, and must be < 1 MB."""
    config = "".join(
        f'[[module]]\nname = "m{n}"\nsubscribe = ["do/{n}"]\npublish = ["done/#"]\n' for n in range(4)
    )
    made = gateway(config, start=False)
    for n in range(4):
        made.drop_module(GUESTS / "misbehave.wasm", f"m{n}")
    made.start()
    for n in range(4):
        made.wait_for_module(f"m{n}")
    ear = client(made.port, "ear")
    ear.subscribe("done/#")

    def traps(first, count):
        for at in range(first, first + count):
            for n in range(4):
                send(made, f"do/{n}", [b"publish then trap", b"good %d" % at])
        eventually(
            lambda: all(made.part("module", f"m{n}")["counters"]["poisonous"] >= first + count for n in range(4)),
            30,
            lambda: made.status(),
            0.1,
        )

    traps(0, 18)
    before = made.memory_kb()
    traps(18, 72)
    after = made.memory_kb()
    print(f"360 traps, 72 after the measurement began for each of 4 modules: {before} → {after} kB")
    assert after - before < 1000
    assert b"must not appear" not in ear.payloads(), "nothing of a call that trapped happened"
    for n in range(4):
        assert made.part("module", f"m{n}")["health"] != "failed"


def test_what_leaves_the_publish_filters_is_stopped_and_named(gateway, client):
    made = with_module(gateway, "misbehave")
    ear = client(made.port, "ear")
    ear.subscribe("#")
    send(made, "do/x", [b"outside", b"bad topic", b"end"])
    eventually(lambda: b"end" in [m.payload for m in ear.messages if m.topic == "done/do/x"], 10, "the last one")
    assert [m.topic for m in ear.messages if m.payload == b"stray"] == []
    part = made.part("module", "misbehave")
    assert part["health"] == "late" and "elsewhere/x" in part["text"] + made.log
    assert part["counters"]["refused"] >= 2


def test_state_survives_a_kill_and_counts_each_message_once(gateway, client):
    """State, output and cursor are one commit: the averages of the sample and the counter of `misbehave` do not drift."""
    made = with_module(gateway, "misbehave")
    ear = client(made.port, "ear", clean=False)
    ear.subscribe("done/do/#", 2)
    ear.disconnect()
    for _ in range(3):
        send(made, "do/x", [b"n%d" % n for n in range(200)])
        made.kill9()
        made.start()
    ear = client(made.port, "ear", clean=False)
    # At least once: the batch that the kill caught may be done again.
    ear.wait_for(600, 20)
    assert {p for p in ear.payloads()} == {b"n%d" % n for n in range(200)}
    print(f"{len(ear.messages) - 600} duplicates over three kills")


def test_a_wasm_that_is_not_wasm_is_named_and_the_one_before_runs_on(gateway, client):
    made = with_module(gateway, "echo", '[[module]]\nname = "echo"\nsubscribe = ["in"]\n')
    ear = client(made.port, "ear")
    ear.subscribe("echo/#")
    bad = made.folder / "bad"
    bad.write_bytes(b"this is no wasm at all")
    made.drop_module(bad, "echo")
    part = made.wait_for_module("echo", "late")
    assert "not taken" in part["text"], part["text"]
    client(made.port, "mouth").publish("in", "still here")
    assert ear.wait_for(1)[0].payload == b"still here"
    made.drop_module(bad, "other")
    part = made.wait_for_module("other", "failed")
    assert part["text"] and "wasm" in part["text"].lower(), part["text"]
    # Put right, it runs without a restart.
    made.drop_module(GUESTS / "passthrough.wasm", "other")
    made.wait_for_module("other")


def test_a_module_that_refuses_its_configuration_says_why(gateway):
    made = gateway('[[module]]\nname = "misbehave"\nconfig = { mode = "refuse" }\n', start=False)
    made.drop_module(GUESTS / "misbehave.wasm")
    made.start()
    part = made.wait_for_module("misbehave", "failed")
    assert 'the configuration says "refuse"' in part["text"]


@pytest.mark.parametrize("which", ["committed", "rebuilt"])
def test_the_sample_averages_and_raises_its_alarm(gateway, client, which):
    """The component that lies in the repository and the one that was just built from source behave the same."""
    wasm = COMMITTED if which == "committed" else GUESTS / "average.wasm"
    assert wasm.exists(), f"{wasm} is not there"
    config = '[[module]]\nname = "average"\nconfig = { window = "1 s", point = "temperature", threshold = 90.0, hysteresis = 2.0 }\n'
    made = gateway(config, start=False)
    made.drop_module(wasm, "average")
    made.start()
    made.wait_for_module("average")
    ear = client(made.port, "ear")
    ear.subscribe("derived/#")
    ear.subscribe("alarm/#")

    def reading(value, q="good"):
        value = {"temperature": {"value": value, "ts": "2026-11-24T23:40:03.120Z", "q": q}, "valve": {"value": True, "q": "good"}}
        return json.dumps(value).encode()

    send(made, "data/boiler", [reading(80.0), reading(82.0), reading(84.0), reading(None, "bad"), reading(999.0, "uncertain")])
    eventually(lambda: [m for m in ear.messages if m.topic == "derived/boiler/average"], 10, "the first average")
    average = json.loads(next(m.payload for m in ear.messages if m.topic == "derived/boiler/average"))["temperature"]
    assert (average["value"], average["min"], average["max"], average["count"], average["q"]) == (82.0, 80.0, 84.0, 3, "good")

    def alarms():
        return [(m.topic, m.payload) for m in ear.messages if m.topic.startswith("alarm/")]

    assert alarms() == []
    send(made, "data/boiler", [reading(95.0)])
    eventually(lambda: len(alarms()) == 1, 10, "the alarm goes on")
    assert alarms()[0][0] == "alarm/boiler/temperature"
    send(made, "data/boiler", [reading(89.0)])  # within the hysteresis
    eventually(lambda: sum(m.topic == "derived/boiler/average" for m in ear.messages) >= 3, 10, "the third average")
    assert len(alarms()) == 1
    send(made, "data/boiler", [reading(80.0)])
    eventually(lambda: len(alarms()) == 2, 10, "the alarm goes off")
    late = client(made.port, "late")
    late.subscribe("alarm/#")
    assert late.wait_for(1)[0].retain


def test_the_committed_component_is_the_one_that_the_source_makes():
    """Byte for byte only with the same compiler: what must agree is what it imports and exports, and its size to a tenth."""
    committed, rebuilt = COMMITTED.read_bytes(), (GUESTS / "average.wasm").read_bytes()
    assert abs(len(committed) - len(rebuilt)) <= len(rebuilt) / 10, f"{len(committed)} and {len(rebuilt)} bytes"
    for name in (b"tidegate:module", b"on-batch", b"on-timer", b"describe", b"init"):
        assert (name in committed) == (name in rebuilt) == True  # noqa: E712


def test_a_raw_core_module_is_taken_as_it_comes_from_cargo(gateway, client):
    """Dropped as `cargo build` left it: tidegate makes the component."""
    core = REPOSITORY / "modules/target/wasm32-unknown-unknown/release/echo.wasm"
    assert core.exists(), "modules/build leaves cargo's own output there"
    made = gateway('[[module]]\nname = "echo"\nsubscribe = ["in"]\n')
    made.drop_module(core, "echo")
    made.wait_for_module("echo")
    ear = client(made.port, "ear")
    ear.subscribe("echo/#")
    client(made.port, "mouth").publish("in", "core")
    assert ear.wait_for(1)[0].payload == b"core"
