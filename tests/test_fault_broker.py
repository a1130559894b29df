"""The log is the session: 20,000 numbered messages over a hundred random cuts and more in each of six kinds of upstream (session
present 0, 1, random; small receive maximum; every 50th refused; 3.1.1 and 5): none lost, none out of order on its topic,
nothing that an uplink must never do.

Six uplinks of one gateway drain the same log side by side, so the test also shows that they do not disturb each other.
"""

import time

import pytest

from rawmqtt import PUBACK, Raw, publish
from support import eventually, mqtt_uplink, new_seed

COUNT, TOPICS = 20_000, 8
MODES = {
    "v3-absent": ("3.1.1", {"session_present": 0}),
    "v3-present": ("3.1.1", {"session_present": 1}),
    "v3-random": ("3.1.1", {"session_present": "random"}),
    "v5-absent": ("5", {"session_present": 0, "refuse_every": 50}),
    "v5-small": ("5", {"session_present": 1, "receive_maximum": [20, 7, 3, 20]}),
    "v5-random": ("5", {"session_present": "random", "receive_maximum": 20, "refuse_every": 50}),
}
CUTS_MIN = 60


@pytest.mark.timeout(300)
def test_no_message_is_lost_or_overtaken_over_a_hundred_cuts(gateway, standin):
    seed = new_seed("the stand-ins' cuts")
    upstreams, config = {}, ""
    for index, (name, (version, behaviour)) in enumerate(MODES.items()):
        upstream = upstreams[name] = standin(seed=seed + index)
        for key, value in behaviour.items():
            setattr(upstream, key, value)
        upstream.cut_after = (1, 400)
        # Wide and narrow windows; a refusal costs the rest of its window, so a narrow one where every 50th is refused.
        window = 20 if "refuse_every" in behaviour else 100 if index % 2 else 10
        config += mqtt_uplink(
            upstream.port, name, version, extra=f"window = {window}\nack_timeout = \"3 s\"", topic="{topic}"
        )
    made = gateway(config)
    began = time.monotonic()
    with Raw(made.port).open("source") as source:
        for first in range(0, COUNT, 1000):
            source.send(b"".join(publish(4, f"n/{n % TOPICS}", b"%d" % n, 1, n - first + 1) for n in range(first, first + 1000)))
            for _ in range(1000):
                source.expect(PUBACK)

    def state():
        return {name: (u.distinct, sum(u.cuts.values())) for name, u in upstreams.items()}

    eventually(lambda: all(u.distinct >= COUNT for u in upstreams.values()), 240, state, 0.1)
    took = time.monotonic() - began
    for name, upstream in upstreams.items():
        cuts = sum(upstream.cuts.values())
        print(
            f"{name}: {upstream.distinct} distinct, {cuts} cuts, {upstream.duplicates} duplicates, {upstream.refused} refused, "
            f"{len(upstream.connections)} connections"
        )
        assert {(m.topic, m.payload) for m in upstream.accepted} == {
            (f"n/{n % TOPICS}", b"%d" % n) for n in range(COUNT)
        }
        assert upstream.out_of_order() == []
        assert upstream.violations == []
        assert cuts >= CUTS_MIN, "the upstream was not cut often enough to show anything"
    print(f"all in {took:.1f} s")
    # Nothing is left, nothing was given up.
    for name in MODES:
        counters = made.part("uplink", name)["counters"]
        assert counters["dead"] == 0


@pytest.mark.timeout(180)
@pytest.mark.parametrize("version", ["3.1.1", "5"])
def test_cuts_and_kills_together_lose_nothing(gateway, standin, version):
    """The gateway is killed while its upstream is cut: cursors come back from disk, and first arrivals stay in order."""
    import random

    seed = new_seed("cuts and kills")
    rng = random.Random(seed)
    upstream = standin(seed=seed)
    upstream.cut_after = (100, 1500)
    made = gateway(mqtt_uplink(upstream.port, version=version, topic="{topic}"))
    count, next_kill = 10_000, rng.randrange(500, 2000)
    for first in range(0, count, 500):
        with Raw(made.port).open("source") as source:
            source.send(b"".join(publish(4, f"n/{n % TOPICS}", b"%d" % n, 1, n - first + 1) for n in range(first, first + 500)))
            for _ in range(500):
                source.expect(PUBACK)
        if first + 500 > next_kill:
            next_kill += rng.randrange(1000, 3000)
            made.kill9()
            made.start()
    eventually(lambda: upstream.distinct >= count, 120, upstream.summary, 0.1)
    print(f"MQTT {version}: {upstream.summary()}, {upstream.duplicates} duplicates, {made.kills} kills")
    firsts = {}
    for m in upstream.accepted:
        seen = firsts.setdefault(m.topic, {})
        seen.setdefault(int(m.payload), None)
    for topic, numbers in firsts.items():
        assert list(numbers) == sorted(numbers), f"first arrivals on {topic}"
    assert sum(len(n) for n in firsts.values()) == count
    assert upstream.violations == []
    assert made.kills >= 2
