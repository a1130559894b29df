"""Mutated packets of all three versions against the running gateway, judged by tests/oracle.py.

Each conversation is one stream: a CONNECT, mutants that the oracle takes for valid, at last one that it does not, a PINGREQ. The
gateway must answer what is owed, close where it has to with a reason that the specification allows, and stay open otherwise. A
bystander at QoS 1 sees nothing of it. TIDEGATE_MUTANTS says how many (100,000), TIDEGATE_SEED which.
"""

import multiprocessing
import os
import random
import re
import socket
import struct
import threading
import time
import traceback
from pathlib import Path

import oracle
import rawmqtt
from oracle import ALIVE, CLOSED, EITHER, GOODBYE, PENDING, Judge
from rawmqtt import CONNACK, DISCONNECT, PINGREQ, PUBLISH, PUBREC, PUBREL, Raw, packet, properties, text
from support import new_seed

COUNT = int(os.environ.get("TIDEGATE_MUTANTS", 100_000))
WORKERS = 3
# Nothing that is owed takes so long; a bystander that waits is disturbed.
STALL_S = 5
CORPUS = Path(__file__).parent / "corpus/packets.txt"


def corpus():
    """[(version, bytes)]; a line of an odd number of digits lacks its last half byte, which is as good a mutant."""
    out = []
    for line in CORPUS.read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        version, rest = line.split(" ", 1)
        digits = re.match(r"[0-9a-f ]+", rest + " ").group().replace(" ", "")
        out.append((int(version), bytes.fromhex(digits[: len(digits) // 2 * 2])))
    return out


def seeds(version):
    """Valid packets to begin with."""
    v = version
    user = [("k", "v"), ("k", "w")]
    out = [
        rawmqtt.publish(v, "m/a", b"hello", 0),
        rawmqtt.publish(v, "m/b/c", b"hello", 1, 7),
        rawmqtt.publish(v, "m/b/c", b"", 2, 8),
        rawmqtt.publish(v, "m/r", b"kept", 1, 9, retain=True),
        rawmqtt.publish(v, "m/r", b"", 0, retain=True),
        rawmqtt.publish(v, "m/long" + "/x" * 40, b"p" * 300, 1, 11, dup=True),
        rawmqtt.ack(rawmqtt.PUBACK, 1),
        rawmqtt.ack(PUBREC, 2),
        rawmqtt.ack(PUBREL, 8),
        rawmqtt.ack(rawmqtt.PUBCOMP, 2),
        rawmqtt.subscribe(v, 3, [("m/#", 1), ("m/+/c", 2), ("+", 0)]),
        rawmqtt.subscribe(v, 4, [("m/a", 0)]),
        rawmqtt.unsubscribe(v, 5, ["m/#", "m/+/c"]),
        packet(PINGREQ, 0, b""),
    ]
    if v == 5:
        every = {
            "payload_format": 1,
            "message_expiry": 60,
            "response_topic": "m/answer",
            "correlation_data": b"\x00\x01",
            "content_type": "text/plain",
            "user": user,
        }
        out += [
            rawmqtt.publish(5, "m/p", "hällo", 1, 12, props=every),
            rawmqtt.publish(5, "m/p", b"x", 2, 13, props={**every, "topic_alias": 3}),
            rawmqtt.publish(5, "m/q", b"x", 0, props={"topic_alias": 16}),
            rawmqtt.subscribe(5, 6, [("m/p", 1 | 4 | 8 | 16), ("m/q/#", 2 | 32)], {"subscription_id": 300, "user": user}),
            rawmqtt.ack(PUBREL, 13, 5, 0x92),
            packet(rawmqtt.PUBACK, 0, struct.pack("!HB", 1, 0x10) + properties({"reason": "so", "user": user})),
            packet(DISCONNECT, 0, b"\x04" + properties({"reason": "bye", "user": user})),
            packet(rawmqtt.AUTH, 0, b"\x19" + properties({"auth_method": "x"})),
        ]
    else:
        out.append(packet(DISCONNECT, 0, b""))
    return out


def connects(version, name):
    v = version
    if v == 3:
        return [rawmqtt.connect(4, name, level=3, name="MQIsdp")]
    out = [rawmqtt.connect(v, name), rawmqtt.connect(v, name, will=("m/will", b"gone", 1, False))]
    if v == 5:
        props = {
            "receive_maximum": 20,
            "maximum_packet_size": 4000,
            "topic_alias_maximum": 5,
            "request_problem": 1,
            "request_response": 1,
            "user": [("k", "v")],
        }
        will = {"will_delay": 1, "payload_format": 1, "message_expiry": 9, "content_type": "t", "response_topic": "m/x", "correlation_data": b"1", "user": [("a", "b")]}
        out += [
            rawmqtt.connect(5, name, props=props),
            rawmqtt.connect(5, name, will=("m/will", "gone", 2, False, will), props={"session_expiry": 1}),
            rawmqtt.connect(5, ""),
            rawmqtt.connect(5, name, user="u", password="p"),
            rawmqtt.connect(5, name, props={"auth_method": "SCRAM-SHA-1", "auth_data": b"x"}),
        ]
    return out


STRINGS = [b"", b"#", b"+", b"$SYS/x", b"$share/g/m", b"a/#/b", b"\xff", b"\0", b"\xed\xa0\x80", b"m/\xc3\xa4", b"/" * 200, b"m" * 300]
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF]


def reframe(first, body):
    return bytes([first]) + rawmqtt.variable(len(body)) + body


def mutate(rng, data, others):
    """One to four changes; mostly the frame's length is made to fit, so that what lies behind it is reached."""
    first = data[0]
    at = 1
    while at < len(data) and data[at] & 0x80:
        at += 1
    body = bytearray(data[at + 1 :])
    fits = rng.random() < 0.85
    if not fits:
        body = bytearray(data[1:])
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        how = rng.randrange(11)
        spot = rng.randrange(len(body) + 1)
        if how == 0 and body:
            body[spot % len(body)] ^= 1 << rng.randrange(8)
        elif how == 1 and body:
            body[spot % len(body)] = rng.randrange(256)
        elif how == 2:
            body[spot:spot] = rng.randbytes(rng.randrange(1, 5))
        elif how == 3:
            del body[spot : spot + rng.randrange(1, 5)]
        elif how == 4:
            del body[spot:]
        elif how == 5:
            other = rng.choice(others)
            body[spot:] = other[rng.randrange(len(other)) :]
        elif how == 6:
            first ^= 1 << rng.randrange(8)
        elif how == 7:
            body[spot : spot + 2] = struct.pack("!H", rng.choice(NUMBERS))
        elif how == 8:
            body[spot:spot] = text(rng.choice(STRINGS))
        elif how == 9 and body:
            end = spot + rng.randrange(1, 12)
            body[end:end] = body[spot:end]
        elif how == 10:
            name = rng.choice(list(rawmqtt.IDENTIFIERS))
            number, kind = rawmqtt.IDENTIFIERS[name]
            value = rng.choice((0, 1, 2, 255)) if kind in ("byte", "two", "four", "variable") else rng.choice(STRINGS)
            one = properties({name: (value, b"v") if kind == "pair" else value})[1:]
            body[spot:spot] = one[-40:]
    if len(body) > 60_000:
        del body[60_000:]
    return reframe(first, bytes(body)) if fits else bytes([first]) + bytes(body)


def gentle(rng, version):
    """Another valid packet, so that a conversation gets somewhere."""
    def level():
        return "".join(rng.choice("abé ") for _ in range(rng.randrange(4)))

    topic = "m/" + "/".join(level() for _ in range(rng.randrange(4)))
    packet_id = rng.choice((1, 2, 3, 65535))
    what = rng.randrange(7)
    if what < 3:
        qos = rng.randrange(3)
        props = {}
        if version == 5:
            props = {name: value for name, value in (("topic_alias", rng.randrange(1, 17)), ("user", [("a", "")]), ("message_expiry", 5)) if rng.random() < 0.3}
        return rawmqtt.publish(version, topic, rng.randbytes(rng.randrange(60)), qos, packet_id, retain=rng.random() < 0.1, dup=qos > 0 and rng.random() < 0.2, props=props)
    if what == 3:
        return rawmqtt.ack(rng.choice((rawmqtt.PUBACK, PUBREC, PUBREL, rawmqtt.PUBCOMP)), packet_id)
    filters = [rng.choice((topic, topic + "/#", "m/+/" + level(), "m/#")) for _ in range(rng.randrange(1, 4))]
    if what == 4:
        return rawmqtt.unsubscribe(version, packet_id, filters)
    return rawmqtt.subscribe(version, packet_id, [(f, rng.randrange(3) | (rng.choice((0, 4, 8, 16, 32)) if version == 5 else 0)) for f in filters])


class Worker:
    """Talks one conversation after another; keeps what differs from the verdict."""

    def __init__(self, port, seed, number, count, told):
        self.port, self.count, self.told = port, count, told
        self.rng = random.Random(f"{seed}/{number}")
        self.name = f"mutant-{number}"
        self.done = self.conversations = 0
        self.ended = {}
        self.codes = {}
        self.differ = []
        self.seeds = {v: seeds(4 if v == 3 else v) + [p for w, p in corpus() if w == v and p[0] != 0x10] for v in (3, 4, 5)}

    def run(self):
        rng = self.rng
        while self.done < self.count and len(self.differ) < 20:
            version = rng.choice((3, 4, 4, 5, 5, 5, 5))
            stream, judge = bytearray(), Judge()
            opening = rng.choice(connects(version, self.name))
            if rng.random() < 0.12:
                self.done += 1
                opening = mutate(rng, opening, connects(4, self.name))
                # A session that stays would gather messages.
                self.talk(bytes(opening) + oracle.PING)
                continue
            opening = connects(version, self.name)[0 if rng.random() < 0.8 else 1 % len(connects(version, self.name))]
            stream += opening
            for _ in range(16):
                if rng.random() < 0.5:
                    mutant = gentle(rng, version)
                else:
                    mutant = mutate(rng, rng.choice(self.seeds[version]), self.seeds[version])
                stream += mutant
                self.done += 1
                judged = Judge().stream(bytes(stream))
                if judged.how != ALIVE:
                    break
            self.talk(bytes(stream + oracle.PING))
        self.told.put(("end", self.name, self.done, self.conversations, self.ended, self.codes, self.differ))

    def talk(self, stream):
        self.conversations += 1
        verdict = Judge().stream(stream)
        try:
            fault = converse(self.port, stream, verdict, self.codes)
        except Exception:
            fault = traceback.format_exc()
        self.ended[verdict.how] = self.ended.get(verdict.how, 0) + 1
        if fault:
            self.differ.append((fault, verdict.how, sorted(verdict.codes), verdict.why, stream.hex()))
        if self.conversations % 200 == 0:
            self.told.put(("so far", self.name, self.done))


def converse(port, stream, verdict, codes):
    """What differs from the verdict, or None."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=STALL_S)
    # A client that is done resets: a hundred thousand ports in TIME_WAIT would be too many.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    try:
        try:
            connection.sendall(stream)
            if verdict.how == EITHER:
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        owed = sorted(verdict.owed)
        inbox, got, last, connack, ended = b"", [], None, None, False
        while True:
            frames, inbox = oracle.answers(inbox)
            for first, body in frames:
                kind = first >> 4
                if kind == CONNACK:
                    if connack is not None:
                        return "two CONNACKs"
                    connack = body[1]
                elif kind == PUBLISH:
                    continue
                elif kind == DISCONNECT:
                    last = body[0] if body else 0
                elif kind == oracle.PINGRESP:
                    got.append((kind, 0, 0))
                elif kind in (oracle.SUBACK, oracle.UNSUBACK):
                    at = 2
                    if verdict.version == 5:
                        at += 1 + body[2]
                    got.append((kind, struct.unpack_from("!H", body)[0], len(body) - at))
                else:
                    got.append((kind, struct.unpack_from("!H", body)[0], 0))
            if verdict.how in (ALIVE, PENDING):
                missing = list(owed)
                extra = []
                for one in got:
                    if one in missing:
                        missing.remove(one)
                    elif one not in verdict.allowed:
                        extra.append(one)
                if not missing and (connack is not None or verdict.connack is None):
                    break
            elif verdict.how == CLOSED and got.count((oracle.PINGRESP, 0, 0)) > owed.count((oracle.PINGRESP, 0, 0)):
                return "the ping behind it was answered"
            if ended:
                break
            try:
                data = connection.recv(65536)
            except socket.timeout:
                return f"nothing more came in {STALL_S} s; so far CONNACK {connack}, {got}, DISCONNECT {last}; owed {owed}"
            except ConnectionError:
                data = b""
            if not data:
                ended = True
            inbox += data
        if verdict.how != EITHER and connack is not None and verdict.connack is not None and connack not in verdict.connack:
            return f"CONNACK 0x{connack:02x}, not one of {verdict.connack}"
        if verdict.how == EITHER:
            return None
        if verdict.how == CLOSED:
            said = last
            if verdict.connack is None and connack is not None:
                if connack == 0:
                    return "CONNACK 0 for a CONNECT that is none"
                said = connack if verdict.version == 5 else None
            if said is not None:
                codes[said] = codes.get(said, 0) + 1
            if said is not None and verdict.version == 5 and verdict.codes and said not in verdict.codes:
                return f"reason 0x{said:02x}, not one of {[hex(c) for c in sorted(verdict.codes)]}"
            if said is None and verdict.version == 5 and verdict.connack is not None and verdict.codes and last is None and connack == 0:
                return "closed without a reason"
            return None
        if verdict.how == GOODBYE:
            return f"DISCONNECT 0x{last:02x} for a goodbye" if last is not None else None
        if ended:
            return f"closed with {last if last is None else hex(last)}, though nothing was wrong; got {got}, owed {owed}"
        if extra:
            return f"not owed: {extra}"
        return None
    finally:
        connection.close()


class Bystander(threading.Thread):
    """A client that minds its own business at QoS 1 all the time."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.client = Raw(port, 5, timeout=20).open("bystander")
        self.client.subscribe(("bystander/#", 1))
        self.over = threading.Event()
        self.sent = 0
        self.waits = []
        self.fault = None

    def run(self):
        try:
            while not self.over.is_set():
                began = time.monotonic()
                body = b"%d" % self.sent
                packet_id = self.client.publish("bystander/x", body, 1)
                message = self.client.message()
                assert message.payload == body, f"{message.payload} where {body} was due"
                self.client.expect(rawmqtt.PUBACK, packet_id=packet_id)
                self.waits.append(time.monotonic() - began)
                self.sent += 1
                self.over.wait(0.002)
        except Exception as error:
            self.fault = error

    def finish(self):
        self.over.set()
        self.join(30)
        waits = sorted(self.waits)
        if self.fault:
            raise AssertionError(f"the bystander was disturbed after {self.sent} messages: {self.fault!r}") from self.fault
        return f"{self.sent} messages, median {waits[len(waits) // 2] * 1e3:.2f} ms, p99 {waits[len(waits) * 99 // 100] * 1e3:.2f} ms, max {waits[-1] * 1e3:.1f} ms"


def as_it_was(made):
    """No part has failed, nothing panicked, the next client is served."""
    assert made.alive(), made.log[-3000:]
    assert "panicked" not in made.log, made.log[-3000:]
    bad = {k: p for k, p in made.status().items() if p["health"] not in ("good", "idle", "starting")}
    assert not bad, bad
    with Raw(made.port, 5).open("after") as after:
        after.publish_acked("after/t", "x")


def test_the_corpus_is_answered_as_the_specification_says(gateway):
    made = gateway("[broker]\nfailed_logins_per_minute = 0\n")  # it tries many wrong passwords
    differ = []
    for version, data in corpus():
        stream = data if data[0] == 0x10 and version != 3 and not data.startswith(b"\x10\x10\x00\x04MQTT\x05\x02\x00<\x00\x00\x01x\x01") else rawmqtt.connect(version, "corpus") + data
        for whole in (stream, stream + oracle.PING):
            verdict = Judge().stream(whole)
            fault = converse(made.port, whole, verdict, {})
            if fault:
                differ.append(f"{fault}: MQTT {version} {data.hex()} ({verdict.how}, {verdict.why})")
    assert not differ, "\n".join(differ)
    as_it_was(made)


def test_mutated_packets_disturb_nobody(gateway, request):
    seed = new_seed()
    made = gateway("[broker]\nfailed_logins_per_minute = 0\n")  # it tries many wrong passwords
    context = multiprocessing.get_context("fork")
    told = context.Queue()
    share = COUNT // WORKERS + 1
    workers = [
        context.Process(target=lambda n=n: Worker(made.port, seed, n, share, told).run(), daemon=True) for n in range(WORKERS)
    ]
    for worker in workers:
        worker.start()
    bystander = Bystander(made.port)
    bystander.start()
    began = time.monotonic()
    progress, ends, early = {}, [], None
    request.addfinalizer(lambda: [w.kill() for w in workers])
    while len(ends) < WORKERS:
        kind, name, *rest = told.get(timeout=60)
        if kind == "end":
            ends.append(rest)
            progress[name] = rest[0]
        else:
            progress[name] = rest[0]
        if early is None and sum(progress.values()) > COUNT // 5:
            early = made.memory_kb()
    took = time.monotonic() - began
    late = made.memory_kb()
    said = bystander.finish()
    count = sum(e[0] for e in ends)
    conversations = sum(e[1] for e in ends)
    ended, codes = {}, {}
    for e in ends:
        for into, part in ((ended, e[2]), (codes, e[3])):
            for k, n in part.items():
                into[k] = into.get(k, 0) + n
    print(f"{count} mutants in {conversations} conversations, {took:.1f} s; ended {ended}")
    print("reasons: " + ", ".join(f"0x{code:02x} {n}" for code, n in sorted(codes.items())))
    print(f"resident {early} kB after a fifth, {late} kB at the end; bystander: {said}")
    differ = [d for e in ends for d in e[4]]
    assert not differ, f"{len(differ)} differ, the first:\n" + "\n".join(
        f"{fault}\n  verdict {how} {[hex(c) for c in c_]} {why}\n  {hexed[:1000]}" for fault, how, c_, why, hexed in differ[:12]
    )
    assert conversations > count / 20
    # What mutants had retained stays, by design; a leak of 100 bytes a packet would be 8 MB in 80,000.
    assert late - early < 4096 + count // 100, f"resident {early} → {late} kB"
    as_it_was(made)
