"""The same random script against the gateway and against Debian's mosquitto; what every client gets is compared.

A script is made from a seed alone: clients of 3.1.1 and 5 connect (clean or not, with wills), subscribe with options and overlapping
filters, publish, stop acknowledging, vanish, come back, take each other over. After each step a marker goes to every client that
is there, so that both brokers are at rest before the next one. Messages are compared by client, topic and payload: how often,
with which QoS, RETAIN and subscription identifiers; SUBACK, UNSUBACK and session present as well. A difference is red unless
EXPLAINED says by which section of the specification both are right. Order is looked at on the gateway's side: [MQTT-4.6.0-6].

TIDEGATE_SEED repeats a run, TIDEGATE_SCRIPTS says how many scripts (24).
"""

import os
import random
from collections import Counter
from dataclasses import dataclass, field

from oracle import PING
from rawmqtt import PINGRESP, PUBLISH, SUBACK, UNSUBACK, Raw, subscribe, unsubscribe
from support import Mosquitto, new_seed

SCRIPTS = int(os.environ.get("TIDEGATE_SCRIPTS", 24))
STEPS = 100
# A client that does not acknowledge does so below every broker's window.
HELD_MAX = 50
NAMES = {"a3": 4, "b3": 4, "c5": 5, "d5": 5}
TOPICS = ["t", "t/a", "t/b", "t/a/x", "u/a", "/", "t//a", "/a", "w/1", "w/2"]
FILTERS = ["t", "t/a", "t/#", "t/+", "+/a", "#", "t/+/x", "+/+", "/+", "+", "u/#", "t//a", "+/+/#", "w/+", "w/#"]

EXPLAINED = {
    "overlap": "MQTT 5 [3.3.4-2], 3.1.1 [3.3.5-1]: where subscriptions overlap a server delivers once at the highest QoS, and may "
    "deliver further copies, one for each further subscription at its QoS. The gateway sends one with every identifier, mosquitto "
    "each its own.",
    "own will": "[MQTT-3.1.4-3], 3.1.1 [MQTT-3.1.4-2]: of a client that is taken over with a clean session the old connection is closed and "
    "the session over; mosquitto still sends it its own will.",
    "takeover": "MQTT 5 [3.1.4-3] with 3.1.2.5, 3.1.1 [3.1.4-2] with [3.1.2-8]: the will of a connection that was taken over is published, its "
    "delay being 0. mosquitto leaves it out where the session goes on.",
}


def matches(topic_filter, topic):
    """4.7.1, by levels; the universe has no topics with $."""
    f, t = topic_filter.split("/"), topic.split("/")
    for n, level in enumerate(f):
        if level == "#":
            return True
        if n >= len(t) or level not in ("+", t[n]):
            return False
    return len(f) == len(t)


@dataclass
class Sub:
    qos: int
    no_local: bool = False
    as_published: bool = False
    handling: int = 0
    identifier: int = 0

    @property
    def options(self):
        return self.qos | self.no_local << 2 | self.as_published << 3 | self.handling << 4


@dataclass
class Model:
    """Of one client, as the script sees it: enough to say which subscriptions a message matched."""

    here: bool = False
    lasts: bool = False
    will: tuple = None
    subs: dict = field(default_factory=dict)


def make_script(rng):
    """[(what, …)], {(client, topic, payload): most subscriptions that matched}, and the wills of connections that are taken
    over, from the random numbers alone. A client's filter has the same no-local, retain-as-published and identifier throughout:
    mosquitto does not replace them [MQTT-3.8.4-3], so there is nothing to compare; test_broker_cases.py looks at that."""
    fixed = {
        (name, f): (rng.random() < 0.3, rng.random() < 0.4, rng.choice((0, n + 1))) for name in NAMES for n, f in enumerate(FILTERS)
    }
    taken_over = {}
    models = {name: Model() for name in NAMES}
    steps, matched = [], Counter()
    number = 0

    def published(topic, payload, by):
        for name, m in models.items():
            if m.here or m.lasts:
                hits = [s for f, s in m.subs.items() if matches(f, topic) and not (s.no_local and name == by)]
                key = name, topic, payload
                matched[key] = max(matched[key], len(hits))

    def gone(name, with_will):
        m = models[name]
        m.here = False
        if with_will and m.will:
            published(m.will[0], m.will[1], name)
        m.will = None
        if not m.lasts:
            m.subs = {}

    for _ in range(STEPS):
        here = [n for n, m in models.items() if m.here]
        what = rng.choices(
            ("connect", "drop", "subscribe", "unsubscribe", "publish", "lazy"), (10 if len(here) > 1 else 60, 6, 18, 4, 45, 3)
        )[0]
        if what == "connect":
            # Mostly one that is away; else a takeover.
            away = [n for n in NAMES if n not in here]
            name = rng.choice(away if away and rng.random() < 0.85 else list(NAMES))
            if models[name].here and models[name].will and models[name].will[3]:
                # mosquitto would not publish it, and what is retained would differ from there on.
                continue
            clean, lasts = rng.random() < 0.35, rng.random() < 0.7
            if NAMES[name] == 4:
                lasts = not clean
            number += 1
            will = None
            if rng.random() < 0.4:
                will = rng.choice(("w/1", "w/2")), b"will %d" % number, rng.randrange(3), rng.random() < 0.3
            m = models[name]
            took_over = m.here
            if m.here:
                if m.will:
                    taken_over[m.will[1]] = name
                gone(name, True)
            if clean:
                m.subs = {}
            m.here, m.lasts, m.will = True, lasts, will
            steps.append(("connect", name, clean, lasts, will, took_over))
        elif not here:
            continue
        elif what == "drop":
            name = rng.choice(here)
            how = rng.choice(("reset", "close", "goodbye", "goodbye with will"))
            if how == "goodbye with will" and NAMES[name] == 4:
                how = "reset"
            will = models[name].will if how != "goodbye" else None
            gone(name, how != "goodbye")
            steps.append(("drop", name, how, will))
        elif what == "subscribe":
            name = rng.choice(here)
            v5 = NAMES[name] == 5
            number += 1
            subs = {}
            for f in rng.sample(FILTERS, rng.choice((1, 1, 2, 3))):
                no_local, as_published, identifier = fixed[name, f] if v5 else (False, False, 0)
                subs[f] = Sub(rng.randrange(3), no_local, as_published, rng.randrange(3) if v5 else 0, identifier)
            models[name].subs.update(subs)
            steps.append(("subscribe", name, subs))
        elif what == "unsubscribe":
            name = rng.choice(here)
            filters = rng.sample(FILTERS, 2)
            for f in filters:
                models[name].subs.pop(f, None)
            steps.append(("unsubscribe", name, filters))
        elif what == "publish":
            name = rng.choice(here)
            number += 1
            topic, retain = rng.choice(TOPICS), rng.random() < 0.3
            payload = b"" if retain and rng.random() < 0.25 else b"%d" % number
            steps.append(("publish", name, topic, payload, rng.randrange(3), retain))
            published(topic, payload, name)
        else:
            steps.append(("lazy", rng.choice(here)))
    return steps, matched, taken_over


class Side:
    """One broker's run of a script. `got`: {(client, topic, payload): [(qos, retain, identifiers)]}"""

    def __init__(self, port):
        self.port = port
        self.clients = {}
        self.lazy = set()
        self.held = Counter()
        self.got = {}
        self.events = []
        self.marks = 0
        self.order = {}
        self.faults = []
        self.marker = Raw(port, 4).open("marker")
        self.observer = Raw(port, 4).open("observer")
        self.observer.subscribe(("w/#", 0))

    def run(self, steps):
        for n, step in enumerate(steps):
            getattr(self, "do_" + step[0])(n, *step[1:])
            self.settle()
        return self

    def record(self, name, p):
        if p.topic.startswith("mark/"):
            return
        identifiers = tuple(sorted(p.properties.get("subscription_id", [])))
        self.got.setdefault((name, p.topic, p.payload), []).append((p.qos, p.retain, identifiers))
        # Live messages of one topic and QoS come in the order of their publishing; a retained one may be old.
        if p.payload.isdigit() and not p.retain and not p.dup:
            key = self.clients[name], p.topic, p.qos
            if self.order.get(key, -1) > int(p.payload):
                self.faults.append(f"{name}: {p.payload} behind {self.order[key]} on {p.topic} at QoS {p.qos}")
            self.order[key] = int(p.payload)

    def take(self, name, until=None):
        client = self.clients[name]
        while True:
            p = client.message(acknowledge=False)
            self.record(name, p)
            if name not in self.lazy or p.topic.startswith("mark/") or self.held[name] >= HELD_MAX:
                client.acknowledge(p)
            else:
                self.held[name] += p.qos > 0
            if p.topic == f"mark/{name}" and p.payload == until:
                break
        # Its acknowledgements have been read: a takeover finds nothing in flight.
        client.send(PING)
        client.expect(PINGRESP)

    def settle(self):
        self.marks += 1
        mark = b"%d" % self.marks
        for name in self.clients:
            self.marker.publish(f"mark/{name}", mark, 1)
        self.marker.before_pong()
        for name in list(self.clients):
            self.take(name, mark)

    def forget(self, name):
        self.clients.pop(name, None)
        self.lazy.discard(name)
        self.held[name] = 0

    def see_will(self, will):
        """It is out when the observer has it. Both sides wait for it: one that never comes is a difference by itself."""
        if will:
            while self.observer.message(5).payload != will[1]:
                pass

    def do_connect(self, n, name, clean, lasts, will, took_over):
        version = NAMES[name]
        old = self.clients.get(name)
        new = Raw(self.port, version)
        props = {"props": {"session_expiry": 3600}} if version == 5 and lasts else {}
        new.open(name, clean=clean, will=will, **props)
        self.events.append((n, "session present", new.connack.session_present))
        if old:
            # What the old connection had been sent before.
            for p in old.expect_closed():
                if p.kind == PUBLISH:
                    self.record(name, p)
            old.close()
            self.forget(name)
        self.clients[name] = new
        new.subscribe((f"mark/{name}", 1))

    def do_drop(self, _n, name, how, will):
        client = self.clients[name]
        self.forget(name)
        if how == "reset":
            client.reset()
        elif how == "close":
            client.close()
        else:
            client.disconnect(4 if how == "goodbye with will" else 0)
        self.see_will(will)

    def do_subscribe(self, n, name, subs):
        client = self.clients[name]
        packets = [subs] if NAMES[name] == 4 else [{f: s} for f, s in subs.items()]
        for some in packets:
            identifier = next(iter(some.values())).identifier
            props = {"subscription_id": identifier} if identifier else {}
            client.send(subscribe(NAMES[name], client.new_id(), [(f, s.options) for f, s in some.items()], props))
            self.events.append((n, "SUBACK", client.expect(SUBACK).codes))

    def do_unsubscribe(self, n, name, filters):
        client = self.clients[name]
        client.send(unsubscribe(NAMES[name], client.new_id(), filters))
        self.events.append((n, "UNSUBACK", client.expect(UNSUBACK).codes))

    def do_publish(self, n, name, topic, payload, qos, retain):
        code = self.clients[name].publish_acked(topic, payload, qos, retain=retain)
        self.events.append((n, "refused", code >= 0x80))

    def do_lazy(self, _n, name):
        self.lazy.add(name)

    def end(self):
        for client in [*self.clients.values(), self.marker, self.observer]:
            client.close()


def explain(key, ours, theirs, matched, taken_over):
    """The name in EXPLAINED, or None."""
    if key[2] in taken_over:
        if ours and not theirs:
            return "takeover"
        if key[0] == taken_over[key[2]] and ours == [d for d in theirs if d[1]]:
            return "own will"
    if matched[key] > 1 and ours and theirs:
        # Once for each time that mosquitto sent its copies: live, or again after a break.
        highest = max(q for q, _, _ in ours) == max(q for q, _, _ in theirs)
        # While it was away mosquitto kept the copies at QoS 1 and 2 alone.
        identifiers = {i for _, _, ids in ours for i in ids} >= {i for _, _, ids in theirs for i in ids}
        if highest and identifiers and len(ours) <= len(theirs):
            return "overlap"
    return None


def test_the_same_script_gives_the_same_deliveries_as_mosquitto(gateway, tmp_path, _started):
    seed = new_seed()
    made = gateway()
    peer = Mosquitto(tmp_path / "peer", "max_inflight_messages 0\nallow_duplicate_messages true\nsys_interval 0\n")
    _started.append(peer)
    peer.start()
    compared = deliveries = 0
    explained = Counter()
    red = []
    for number in range(SCRIPTS):
        steps, matched, taken_over = make_script(random.Random(f"{seed}/{number}"))
        sides = []
        for port in (made.port, peer.port):
            wipe(port)
            side = Side(port).run(steps)
            side.end()
            sides.append(side)
        ours, theirs = sides
        for fault in ours.faults:
            red.append(f"script {number}: order: {fault}")
        for a, b in zip(ours.events, theirs.events):
            compared += 1
            if a != b:
                red.append(f"script {number} step {a[0]} {steps[a[0]][:3]}: gateway {a[1:]}, mosquitto {b[1:]}")
        for key in sorted(ours.got.keys() | theirs.got.keys()):
            a, b = sorted(ours.got.get(key, [])), sorted(theirs.got.get(key, []))
            compared, deliveries = compared + 1, deliveries + len(a)
            if a == b:
                continue
            name = explain(key, a, b, matched, taken_over)
            if name:
                explained[name] += 1
            else:
                how = [s for s in steps if key[2] and key[2] in s or s[0] == "connect" and s[4] and s[4][1] == key[2]]
                red.append(f"script {number}: {key} (QoS, RETAIN, identifiers): gateway {a}, mosquitto {b}, matched {matched[key]}; {how}")
    print(f"{SCRIPTS} scripts of {STEPS} steps: {compared} comparisons, {deliveries} deliveries of the gateway; explained {dict(explained)}")
    for name in explained:
        print(f"{name}: {EXPLAINED[name]}")
    assert not red, f"{len(red)} differences, TIDEGATE_SEED={seed}:\n" + "\n".join(red[:20])


def wipe(port):
    """As before the first script: no sessions, nothing retained."""
    for name, version in NAMES.items():
        Raw(port, version).open(name, clean=True).disconnect()
    with Raw(port, 4).open("wiper") as w:
        for topic in TOPICS:
            w.publish_acked(topic, b"", 1, retain=True)
