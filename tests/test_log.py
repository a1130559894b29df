"""PUBACK means on disk: what was acknowledged survives a kill at any moment, what could not be written is not acknowledged, and
what a limit drops is declared. Received + declared = produced."""

import json
import random
import re
import signal
import subprocess
import threading
import time

import pytest

from rawmqtt import DISCONNECT, PUBACK, PUBREC, Closed, Raw, publish
from support import eventually, mqtt_uplink, new_seed


def opened(gateway, client_id, version=4, durable=False, **options):
    if durable:
        options["clean"] = False
        if version == 5:
            options["props"] = {"session_expiry": 3600}
    return Raw(gateway.port, version).open(client_id, **options)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("version", [4, 5])
def test_what_was_acknowledged_survives_a_kill_at_any_moment(gateway, version):
    """Ten kills at random moments under load; acknowledged ⊆ recovered, in order, nothing made up."""
    rng = random.Random(new_seed("kill moments"))
    made = gateway()
    opened(made, "keeper", version, durable=True).subscribe("kept/#")
    sent, acked = 0, []
    for _ in range(10):
        delay = rng.random() * 0.25
        killer = threading.Timer(delay, made.process.kill)
        publisher = opened(made, "publisher", version)
        killer.start()
        ids = {}
        try:
            while True:
                data = []
                while len(ids) < 200:
                    sent += 1
                    packet_id = publisher.new_id()
                    ids[packet_id] = sent
                    data.append(publish(version, f"kept/{sent % 3}", b"%d" % sent + b" " * rng.randrange(400), 1, packet_id))
                if data:
                    publisher.send(b"".join(data))
                p = publisher.read()
                assert p.kind == PUBACK and p.code < 0x80, p
                acked.append(ids.pop(p.packet_id))
        except Closed:
            pass
        killer.join()
        made.process.wait()
        made.process = None
        made.start()
    with opened(made, "keeper", version, durable=True) as keeper, opened(made, "marker", version) as marker:
        assert keeper.connack.session_present
        marker.publish_acked("kept/end", "0")
        got = [(m.topic, int(m.payload)) for m in keeper.until("kept/end", timeout=30)]
    print(f"{sent} sent, {len(acked)} acknowledged, {len(got)} recovered over 10 kills")
    numbers = [n for _, n in got]
    assert len(acked) > 100, "the kills came too early to show anything"
    assert set(acked) <= set(numbers), f"lost: {sorted(set(acked) - set(numbers))[:10]}"
    assert set(numbers) <= set(range(1, sent + 1)) and len(set(numbers)) == len(numbers)
    for topic in {t for t, _ in got}:
        of_topic = [n for t, n in got if t == topic]
        assert of_topic == sorted(of_topic), f"order on {topic}"


@pytest.mark.timeout(60)
def test_from_the_first_accepted_connection_on_everything_routed_is_kept(gateway, standin):
    """A client that connects the moment the listener is open, at the first start and after each kill, finds every durable
    consumer in its place: what it is acknowledged then is delivered."""
    upstream = standin()
    upstream.stop()
    made = gateway(mqtt_uplink(upstream.port, topic="{topic}"))
    count = 0
    for _ in range(20):
        with opened(made, "first") as first:
            first.send(b"".join(publish(4, "n", b"%d" % (count + n), 1, n + 1) for n in range(100)))
            for _ in range(100):
                first.expect(PUBACK)
        count += 100
        made.kill9()
        made.start()
    upstream.start()
    got = eventually(
        lambda: upstream.distinct >= count and list(dict.fromkeys(int(m.payload) for m in upstream.accepted)),
        30,
        lambda: f"{count} acknowledged, {upstream.distinct} arrived; {made.status()}",
        0.05,
    )
    assert got == list(range(count))


def test_retained_messages_and_sessions_survive_a_kill(gateway):
    made = gateway()
    opened(made, "session", 5, durable=True).subscribe(("s/#", 2), ("t/+", 1))
    with opened(made, "publisher") as p:
        for n in range(200):
            p.publish_acked(f"r/{n % 50}", b"%d" % n, retain=True)
        p.publish_acked("r/7", b"", retain=True)
    made.kill9()
    made.start()
    with opened(made, "reader") as reader, opened(made, "publisher") as p, opened(made, "session", 5, durable=True) as s:
        assert s.connack.session_present
        reader.subscribe("r/#")
        got = {int(m.topic[2:]): int(m.payload) for m in reader.before_pong()}
        assert got == {k: 150 + k for k in range(50) if k != 7}
        p.publish_acked("s/x", "1", 2)
        p.publish_acked("t/x", "2", 2)
        assert [(m.payload, m.qos) for m in s.messages(2)] == [(b"1", 2), (b"2", 1)]


class Strace:
    """Attached to the running gateway, until the end of the `with`."""

    def __init__(self, gateway, *expressions):
        self.log = gateway.folder / "strace.txt"
        self.log.write_text("")
        self.command = ["strace", "-f", "-p", str(gateway.pid), "-o", str(self.log)]
        for expression in expressions:
            self.command += ["-e", expression]

    def __enter__(self):
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        # "strace: Process N attached", once all threads are.
        first = self.process.stderr.readline()
        assert b"attached" in first, first
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        self.process.wait(10)
        self.process.stdout.close()
        self.process.stderr.close()


def seen_by_strace(strace, made):
    """strace attaches thread by thread: until a commit of the writer shows in its log it does not count."""
    with opened(made, "prober") as prober:

        def probed():
            prober.publish("kept/probe", "x", 1)
            return "fdatasync" in strace.log.read_text()

        eventually(probed, 10, "strace sees a commit", 0.02)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("version,qos", [(4, 1), (5, 1), (4, 2), (5, 2)])
def test_no_acknowledgement_leaves_before_the_disk_has_it(gateway, version, qos):
    """Every fdatasync is held up by 300 ms: so is PUBACK or PUBREC; what nobody keeps is acknowledged at once."""
    made = gateway()
    opened(made, "keeper", durable=True).subscribe(("kept/#", 2))
    with opened(made, "p", version) as p, opened(made, "free", version) as free:
        with Strace(made, "trace=fdatasync", "inject=fdatasync:delay_enter=300000") as strace:
            seen_by_strace(strace, made)
            for n in range(3):
                began = time.monotonic()
                packet_id = p.publish("kept/x", b"%d" % n, qos)
                p.expect(PUBACK if qos == 1 else PUBREC, packet_id=packet_id)
                took = time.monotonic() - began
                assert took >= 0.28, f"acknowledged after {took * 1000:.0f} ms"
            began = time.monotonic()
            free.publish_acked("nobody/keeps", "x", 1)
            assert time.monotonic() - began < 0.25, "what needs no commit does not wait for one"


@pytest.mark.timeout(60)
def test_what_could_not_be_written_is_not_acknowledged(gateway):
    """fdatasync fails (EIO): MQTT 5 gets a reason code, 3.1.1 is disconnected, and the gateway goes on once the disk does."""
    made = gateway()
    opened(made, "keeper", durable=True).subscribe("kept/#")
    five, three = opened(made, "five", 5), opened(made, "three", 4)
    with Strace(made, "trace=fdatasync", "inject=fdatasync:error=EIO") as strace:
        seen_by_strace(strace, made)
        five.publish("kept/five", "lost?", 1)
        answer = five.read(timeout=10)
        assert answer.kind in (PUBACK, DISCONNECT) and answer.code >= 0x80, answer
        three.publish("kept/three", "lost?", 1)
        assert [p for p in three.expect_closed(timeout=10) if p.kind == PUBACK] == []
        assert made.alive()

    def works_again():
        try:
            with opened(made, "again", 5) as again:
                return again.publish_acked("kept/again", "x") == 0
        except (Closed, AssertionError, TimeoutError, OSError):
            return False

    eventually(works_again, 30, lambda: f"it writes again: {made.log[-2000:]}", 0.1)
    made.kill9()
    made.start()
    # What was refused may be there or not; what was acknowledged is.
    with opened(made, "keeper", durable=True) as keeper:
        keeper.until("kept/again")


@pytest.mark.timeout(60)
def test_only_fdatasync_is_called(gateway, standin):
    """fsync writes the inode's times too: it would double the cost of a commit."""
    upstream = standin()
    made = gateway(mqtt_uplink(upstream.port), start=False)
    trace = made.folder / "syncs.txt"
    # -D: the gateway keeps its own process id.
    made.start(prefix=["strace", "-D", "-f", "-q", "-o", str(trace), "-e", "trace=fsync,fdatasync,sync_file_range,msync"])
    opened(made, "keeper", durable=True).subscribe("kept/#")
    with opened(made, "p") as p:
        for n in range(200):
            p.publish_acked("kept/x", b"%d" % n, 1 + n % 2, retain=n % 5 == 0)
    upstream.wait_for(200, 20)
    made.stop()
    eventually(lambda: "+++ exited" in trace.read_text(), 10, "strace has written all")
    calls = re.findall(r"\b(fsync|fdatasync|sync_file_range|msync)\(", trace.read_text())
    counts = {name: calls.count(name) for name in sorted(set(calls))}
    print(f"200 messages one by one: {counts}")
    assert counts.get("fdatasync", 0) >= 200
    assert set(counts) == {"fdatasync"}


FULL = '[[stream]]\nname = "default"\nfilter = ["#"]\nmax_bytes = "1 MiB"\nwhen_full = "{mode}"\n\n'


def test_a_full_stream_refuses_mqtt_5_with_0x97_and_holds_back_3_1_1(gateway, standin):
    """when_full = "reject": 0x97 each time, 3.1.1 gets no PUBACK, keeps its connection, and goes on once there is room."""
    upstream = standin()
    upstream.ack = False
    made = gateway(FULL.format(mode="reject") + mqtt_uplink(upstream.port, topic="{topic}"))
    produced, refused = 0, 0
    with opened(made, "five", 5) as five:
        while refused < 20 and produced < 4000:
            code = five.publish_acked("n", b"%d" % produced + b" " * 1000)
            if code == 0:
                produced += 1
            else:
                assert code == 0x97, f"0x{code:02x}"
                refused += 1
        assert refused == 20, f"nothing was refused after {produced} messages of 1,000 bytes at a limit of 1 MiB"
        assert 200 <= produced <= 2200, produced
        # QoS 2 too.
        assert five.publish_acked("n", b"x" * 1000, 2) == 0x97
    three = opened(made, "three", 4, keep_alive=0)
    held = produced
    three.send(publish(4, "n", b"%d" % held + b" " * 1000, 1, 1))
    with pytest.raises(TimeoutError):
        three.read(timeout=1.5)
    upstream.ack = True
    upstream.cut_all()
    answer = three.read(timeout=30)
    assert (answer.kind, answer.packet_id) == (PUBACK, 1), "held back, and taken when there is room"
    upstream.wait_for(produced + 1, 30)
    firsts = list(dict.fromkeys(int(m.payload) for m in upstream.accepted if m.topic == "n"))
    assert firsts == list(range(produced + 1)), "exactly what was acknowledged"
    print(f"{produced} taken at 1 MiB, then 20 × 0x97")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("restart", ["", "kill"])
def test_what_a_limit_drops_is_declared_exactly(gateway, standin, restart):
    """when_full = "drop-oldest", 5 MiB into 1 MiB with the upstream away: the newest arrive, the rest is in the loss notices."""
    upstream = standin()
    upstream.stop()
    config = FULL.format(mode="drop-oldest") + mqtt_uplink(upstream.port, topic="{topic}")
    made = gateway(config)
    produced = 5000
    with opened(made, "source") as source:
        for first in range(0, produced, 500):
            source.send(b"".join(publish(4, "n", b"%d" % n + b" " * 1040, 1, n - first + 1) for n in range(first, first + 500)))
            for _ in range(500):
                source.expect(PUBACK)
            if restart and first == 2500:
                made.kill9()
                made.start()
                source.close()
                source.__init__(made.port)
                source.open("source")
    upstream.start()

    def received():
        return list(dict.fromkeys(int(m.payload) for m in upstream.accepted if m.topic == "n"))

    def declared():
        """By notice id its largest count: a growing entry comes again under the same id."""
        counts = {}
        for m in upstream.accepted:
            if "status/loss" in m.topic:
                notice = json.loads(m.payload)
                assert notice["reason"] and notice["first"] <= notice["last"]
                counts[notice["id"]] = max(counts.get(notice["id"], 0), notice["count"])
        return sum(counts.values())

    upstream.wait_until(lambda: len(received()) + declared() >= produced, 60, "all is received or declared")
    got, lost = received(), declared()
    print(f"{produced} produced, {len(got)} received, {lost} declared lost")
    assert len(got) + lost == produced
    assert got == list(range(lost, produced)), "the oldest went, the newest arrived in order"
    assert 200 <= len(got) <= 2200


def test_a_message_counts_once_however_many_want_it(gateway, standin):
    """Two uplinks and a session on the same messages: one copy in the log. Seen at the limit: it is not reached sooner."""
    one, two = standin(), standin()
    one.stop(), two.stop()
    config = FULL.format(mode="reject") + mqtt_uplink(one.port, "one") + mqtt_uplink(two.port, "two")
    made = gateway(config)
    opened(made, "session", durable=True).subscribe("#")
    taken = 0
    with opened(made, "five", 5) as five:
        while five.publish_acked("n", b"x" * 1000) == 0:
            taken += 1
            assert taken < 4000, "the limit is never reached"
    print(f"{taken} messages of 1,000 bytes in 1 MiB with three consumers")
    assert taken >= 700


def test_messages_that_expire_in_the_queue_are_declared_not_sent(gateway, standin):
    upstream = standin()
    upstream.stop()
    made = gateway(mqtt_uplink(upstream.port, topic="{topic}"))
    with opened(made, "p", 5) as p:
        for n in range(10):
            p.publish_acked("n", b"%d" % n, props={"message_expiry": 1} if n % 2 else {})
    began = time.monotonic()
    eventually(lambda: time.monotonic() - began > 2.1, 5)
    upstream.start()

    def lost():
        notices = [json.loads(m.payload) for m in upstream.accepted if "status/loss" in m.topic]
        return {n["id"]: n["count"] for n in notices if n["reason"] == "expired"}

    upstream.wait_until(lambda: sum(lost().values()) >= 5, 60, "5 declared as expired")
    assert [int(m.payload) for m in upstream.accepted if m.topic == "n"] == [0, 2, 4, 6, 8]
    assert sum(lost().values()) == 5


def test_qos_0_on_a_routed_topic_is_queued_too(gateway, standin):
    upstream = standin()
    upstream.stop()
    made = gateway(mqtt_uplink(upstream.port, topic="{topic}"))
    with opened(made, "p") as p:
        for n in range(100):
            p.publish_acked("n", b"%d" % n, 0)
        # A QoS 1 message behind them on the same stream: its PUBACK means that they are on disk as well.
        p.publish_acked("n", b"100", 1)
    made.kill9()
    made.start()
    upstream.start()
    upstream.wait_for(101, 30)
    assert [int(m.payload) for m in upstream.accepted] == list(range(101))
