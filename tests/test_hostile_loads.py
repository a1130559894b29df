"""What a hostile or broken client can do to the memory and to the other clients: bounded, and nothing at all.

A bystander publishes to itself at QoS 1 all the time: it must lose nothing and keep its connection; its waiting times are printed,
idle and during. Bounds on memory are generous, the figures are printed. Sizes here suit every run; TIDEGATE_HOSTILE=1 gives those
of the promises: 100,000 topics and subscriptions, 10,000 clients, 5,000 idle connections.
"""

import os
import resource
import select
import socket
import struct
import time

import pytest

import rawmqtt
from rawmqtt import PINGREQ, PUBACK, SUBACK, Closed, Raw, connect, packet, publish, subscribe, text
from support import eventually
from test_mutations import Bystander, as_it_was

FULL = os.environ.get("TIDEGATE_HOSTILE") == "1"
TOPICS = 100_000 if FULL else 20_000
CLIENTS = 10_000 if FULL else 1_000
IDLE = 5_000 if FULL else 1_000
MIB = 1024


@pytest.fixture
def hostile(gateway, request):
    """A gateway with a bystander; `during()` says what the load did to both."""

    class Scene:
        def __init__(self):
            wanted = 2 * max(CLIENTS, IDLE) + 1000
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            if soft < wanted:
                resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), hard))
            # Some above max_connections are wanted, one more for the bystander.
            self.made = gateway(listener=f"max_connections = {CLIENTS + 100}")
            self.port = self.made.port
            before = Bystander(self.port)
            before.start()
            eventually(lambda: before.fault or before.sent >= 200, 30, "200 messages of an idle broker")
            self.idle = before.finish()
            before.client.disconnect()
            self.bystander = Bystander(self.port)
            self.bystander.start()
            self.memory = self.made.memory_kb()

        def grown_kb(self):
            return self.made.memory_kb() - self.memory

        def finish(self, what):
            grown = self.grown_kb()
            during = self.bystander.finish()
            print(f"{what}: resident {self.memory} → {self.memory + grown} kB, at most {self.made.memory_kb('VmHWM')} kB")
            print(f"bystander idle:   {self.idle}\nbystander during: {during}")
            as_it_was(self.made)
            return grown

    return Scene()


def connected(port, client_id, version=4, **options):
    return Raw(port, version, timeout=20).open(client_id, **options)


def push(connection, data, timeout=0.5):
    """Sends until the other side takes no more; how much it took."""
    connection.socket.settimeout(timeout)
    sent = 0
    try:
        while sent < len(data):
            sent += connection.socket.send(data[sent : sent + (1 << 20)])
    except (socket.timeout, ConnectionError):
        pass
    return sent


# -- Before anybody has said who he is ----------------------------------------------------------------------------------


def test_a_connect_that_trickles_is_cut_at_its_deadline(hostile):
    """300 clients send their CONNECT byte by byte, others nothing at all; each is closed within 15 s of its start."""
    slow = [socket.create_connection(("127.0.0.1", hostile.port)) for _ in range(300)]
    mute = [socket.create_connection(("127.0.0.1", hostile.port)) for _ in range(100)]
    whole = connect(5, "slow" * 20, will=("w", b"x" * 2000, 0, False))
    began = time.monotonic()
    open_ones, at = {s.fileno(): s for s in slow + mute}, 0
    poll = select.epoll()
    for number in open_ones:
        poll.register(number, select.EPOLLIN | select.EPOLLHUP)
    while open_ones and time.monotonic() - began < 20:
        for number, _ in poll.poll(0.2):
            poll.unregister(number)
            open_ones.pop(number).close()
        for s in slow:
            if s.fileno() in open_ones:
                try:
                    s.send(whole[at : at + 1])
                except OSError:
                    pass
        at += 1
    took = time.monotonic() - began
    assert not open_ones, f"{len(open_ones)} are still open after {took:.1f} s"
    assert at < len(whole), "none had sent it all"
    grown = hostile.finish(f"400 slow CONNECTs, the last closed after {took:.1f} s")
    assert grown < 8 * MIB


def test_an_announced_256_mb_reserves_nothing(hostile):
    """Before a CONNECT, and behind one; the bytes come, too."""
    for version in (4, 5):
        for head in (b"\x10\xff\xff\xff\x7f", connect(version, "big") + b"\x32\xff\xff\xff\x7f"):
            with Raw(hostile.port, version) as c:
                push(c, head + bytes(4 << 20))
    # As much as is allowed of it, from many at once.
    many = []
    for n in range(60):
        c = Raw(hostile.port, 4)
        c.send(b"\x10\xf0\xff\x0f" + b"\0\4MQTT\4\2\0\x3c" + bytes(100_000))
        many.append(c)
    grown = hostile.grown_kb()
    print(f"60 CONNECTs of which 100 kB of 256 kB have come: {grown} kB")
    assert grown < 60 * 256 + 8 * MIB
    for c in many:
        c.close()
    hostile.finish("256 MB announced")


# -- Much of everything -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retain", [False, True], ids=["live", "retained"])
def test_many_topics_of_one_client(hostile, retain):
    with connected(hostile.port, "topics", 5) as c:
        data = b"".join(publish(5, f"many/{n % 97}/{n}/topic", b"%d" % n, 0, retain=retain) for n in range(TOPICS))
        began = time.monotonic()
        c.socket.settimeout(30)
        c.send(data)
        assert c.before_pong() == []
        print(f"{TOPICS} topics in {time.monotonic() - began:.2f} s")
        grown = hostile.finish(f"{TOPICS} topics, {'retained' if retain else 'live'}")
    assert grown < (TOPICS * 600 // 1024 if retain else 0) + 16 * MIB


def test_many_subscriptions_of_one_client(hostile):
    """A hundred a packet; then each topic finds its way, and all go with the session."""
    many_subscriptions(hostile, TOPICS, durable=False)


def many_subscriptions(hostile, count, durable):
    options = {"clean": True, "props": {"session_expiry": 3600}} if durable else {}
    c = connected(hostile.port, "subscriptions", 5, **options)
    began = time.monotonic()
    for n in range(0, count, 100):
        c.send(subscribe(5, c.new_id(), [(f"many/{m % 97}/{m}/+", 1) for m in range(n, n + 100)]))
        c.expect(SUBACK)
    subscribed = time.monotonic() - began
    with connected(hostile.port, "publisher", 5) as p:
        for n in (0, 1, count // 2, count - 1):
            p.publish_acked(f"many/{n % 97}/{n}/x", b"%d" % n, 1)
            assert c.message().payload == b"%d" % n
        if durable:
            c.reset()
            p.publish_acked("many/5/5/x", b"while away", 1)
            began = time.monotonic()
            c = connected(hostile.port, "subscriptions", 5, clean=False, props={"session_expiry": 3600})
            assert c.connack.session_present and c.message().payload == b"while away"
            print(f"back after {time.monotonic() - began:.2f} s")
        grown = hostile.grown_kb()
        began = time.monotonic()
        c.disconnect(0, {"session_expiry": 0} if durable else None)
        p.publish_acked("many/5/5/x", b"nobody", 1)
        print(f"{count} subscriptions in {subscribed:.2f} s, {grown} kB; gone in {time.monotonic() - began:.2f} s")
    hostile.finish(f"{count} subscriptions")
    assert grown < count * 1500 // 1024 + 16 * MIB


# -- Who does not read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("durable", [False, True], ids=["clean", "durable"])
@pytest.mark.parametrize("qos", [0, 1])
def test_a_subscriber_that_never_reads_costs_a_bounded_sum(hostile, qos, durable):
    """ME-03: 100 MB past ten of them; an eleventh that reads gets everything, in order."""
    stuck = []
    for n in range(10):
        c = connected(hostile.port, f"stuck-{n}", 4, clean=not durable, keep_alive=0)
        c.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        c.subscribe(("flood/#", qos))
        stuck.append(c)
    reader = connected(hostile.port, "reader", 4)
    reader.subscribe(("flood/#", 1))
    p = connected(hostile.port, "flooder", 4)
    size, batch, count = 4096, 64, 100 * MIB * 1024 // 4096 // (1 if FULL else 4)
    for first in range(0, count, batch):
        p.send(b"".join(publish(4, "flood/x", b"%8d" % n + bytes(size - 8), 1, n % 60000 + 1) for n in range(first, first + batch)))
        for n in range(first, first + batch):
            m = reader.message()
            assert m.payload[:8] == b"%8d" % n, f"{m.payload[:8]} where {n} was due"
        for n in range(first, first + batch):
            p.expect(PUBACK)
    grown = hostile.finish(f"{count * size >> 20} MiB past 10 subscribers at QoS {qos} that never read, {'durable' if durable else 'clean'}")
    # Out buffer 1 MiB, queue 1 MiB, a window of 100 messages each; the log keeps 4 MiB of segments in memory.
    assert grown < 10 * (2 * MIB + 100 * size // 1024) + 24 * MIB
    for c in stuck:
        c.close()


# -- Many at once -------------------------------------------------------------------------------------------------------


def open_all(port, opening, count):
    """`count` connections that have their CONNACK."""
    poll, sockets = select.epoll(), {}
    for _ in range(count):
        s = socket.socket()
        s.setblocking(False)
        s.connect_ex(("127.0.0.1", port))
        sockets[s.fileno()] = s
        poll.register(s.fileno(), select.EPOLLOUT)
    waiting = dict(zip(sockets, range(count)))
    patience = 60 if count <= 1000 else 180
    deadline = time.monotonic() + patience
    while waiting:
        assert time.monotonic() < deadline, f"{len(waiting)} of {count} are without a CONNACK after {patience} s"
        for number, event in poll.poll(1):
            s = sockets[number]
            if event & select.EPOLLOUT:
                s.send(opening(waiting[number]))
                poll.modify(number, select.EPOLLIN)
            elif event & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR):
                data = s.recv(4096)
                assert data[:1] == b"\x20" and data[3] == 0, f"client {waiting[number]}: {data!r}"
                poll.unregister(number)
                del waiting[number]
    return list(sockets.values())


def test_all_clients_reconnect_at_once(hostile):
    """A switch comes back: every client with its durable session, its will, a keep-alive. Twice, the second time over the first."""
    def opening(n):
        return connect(4, f"device-{n}", clean=False, will=(f"gone/{n}", b"x", 1, False)) + subscribe(4, 1, [(f"to/{n}", 1)])

    began = time.monotonic()
    first = open_all(hostile.port, opening, CLIENTS)
    new = time.monotonic() - began
    here = hostile.grown_kb()
    for s in first:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        s.close()
    began = time.monotonic()
    second = open_all(hostile.port, opening, CLIENTS)
    again = time.monotonic() - began
    with connected(hostile.port, "caller", 5) as p:
        for n in (0, CLIENTS // 2, CLIENTS - 1):
            assert p.publish_acked(f"to/{n}", b"you", 1) == 0
    print(f"{CLIENTS} new in {new:.2f} s, again in {again:.2f} s, {here} kB with all of them here")
    for s in second:
        s.close()
    grown = hostile.finish(f"{CLIENTS} clients reconnect at once")
    assert here < CLIENTS * 16 + 16 * MIB
    assert grown < CLIENTS * 16 + 16 * MIB


def test_idle_connections_cost_little(hostile):
    sockets = open_all(hostile.port, lambda n: connect(4, f"idle-{n}") + subscribe(4, 1, [(f"idle/{n}", 1)]), IDLE)
    grown = hostile.grown_kb()
    print(f"{IDLE} idle connections with a subscription each: {grown} kB, {grown * 1024 // IDLE} bytes each; resident {hostile.made.memory_kb()} kB")
    for s in sockets:
        s.close()
    hostile.finish(f"{IDLE} idle connections")
    assert grown < IDLE * 10 + 4 * MIB


def test_above_the_limit_of_connections_clients_are_told(gateway):
    """CONNACK 0x89, 3.1.1: 0x03; who leaves makes room."""
    made = gateway(listener="max_connections = 20")
    here = [connected(made.port, f"c-{n}") for n in range(20)]
    Raw(made.port, 5).open("one-more", expect_code=0x89)
    Raw(made.port, 4).open("one-more", expect_code=3)
    here[0].disconnect()

    def served():
        try:
            Raw(made.port, 5).open("now").close()
            return True
        except (AssertionError, Closed, OSError):
            return False

    eventually(served, 10, "there is room again", 0.05)
    as_it_was(made)
