"""Modbus against stock servers (libmodbus, pymodbus) over TCP, RTU and RTU over TCP, and through a relay that does to answers
what bad lines do: no wrong value is ever good, and a fault costs one poll."""

import datetime
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from modbus_relay import Relay, back_pty
from pymodbus.client import ModbusTcpClient
from support import BINARY, Gateway, eventually, free_port, new_seed
from test_assets import ask, client

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def libmodbus(tmp_path_factory):
    """The server of modbus_peer.c, built."""
    out = tmp_path_factory.mktemp("libmodbus") / "modbus_peer"
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "libmodbus"], capture_output=True, text=True, check=True).stdout.split()
    subprocess.run(["cc", "-O2", "-Wall", "-o", out, HERE / "modbus_peer.c", *flags], check=True)
    return str(out)


class Processes:
    """Servers and ptys of a test; all are gone after it."""

    def __init__(self, folder, libmodbus):
        self.folder, self.libmodbus, self.running = folder, libmodbus, []

    def start(self, *arguments):
        process = subprocess.Popen([str(a) for a in arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.running.append(process)
        return process

    def ready(self, process):
        line = process.stdout.readline()
        assert line == "ready\n", line + process.stdout.read()
        return process

    def lib(self, *arguments):
        return self.ready(self.start(self.libmodbus, *arguments))

    def py(self, *arguments):
        return self.ready(self.start(sys.executable, HERE / "modbus_pymodbus.py", *arguments))

    def socat(self, a="a", b="b"):
        """A pair of serial ports that are wired to each other."""
        ends = [self.folder / a, self.folder / b]
        process = self.start("socat", *(f"pty,raw,echo=0,link={end}" for end in ends))
        eventually(lambda: all(os.path.exists(end) for end in ends), 5, "the ports are there")
        return process, *map(str, ends)

    def stop(self, process):
        self.running.remove(process)
        process.kill()
        process.wait()

    def end(self):
        for process in self.running:
            process.kill()
            process.wait()


@pytest.fixture
def peers(tmp_path, libmodbus):
    processes = Processes(tmp_path, libmodbus)
    yield processes
    processes.end()


@pytest.fixture
def relay():
    relay = Relay()
    yield relay
    relay.end()


def connector(name, kind, place, extra=""):
    key = "device" if kind == "modbus-rtu" else "address"
    place = place if kind == "modbus-rtu" else f"127.0.0.1:{place}"
    serial = 'baud = 9600\nparity = "none"\n' if kind == "modbus-rtu" else ""
    return f'[[connector]]\nname = "{name}"\nkind = "{kind}"\n{key} = "{place}"\n{serial}{extra}\n'


def asset(name, of, unit, points, every="100 ms", extra=""):
    rows = ",\n  ".join(points)
    return f'[[asset]]\nname = "{name}"\nconnector = "{of}"\nunit_id = {unit}\nevery = "{every}"\n{extra}\npoints = [\n  {rows},\n]\n'


def point(name, address, more=""):
    return f'{{ name = "{name}", address = "{address}"{", " + more if more else ""} }}'


def registers(table, start, count):
    return [point(f"{table}-{at}", f"{table}:{at}") for at in range(start, start + count)]


def values(ear, name):
    """The messages of an asset; each is read once, there are thousands."""
    seen, found = getattr(ear, "read", (0, {}))
    fresh = ear.messages[seen:]
    for message in fresh:
        if message.topic.startswith("data/"):
            found.setdefault(message.topic[5:], []).append(json.loads(message.payload))
    ear.read = (seen + len(fresh), found)
    return found.get(name, [])


def is_good(message):
    return all(point["q"] == "good" for point in message.values())


def counter_of(message, unit, addresses=None):
    """The counter that all good registers of the message agree on (see modbus_peer.c)."""
    found = set()
    for name, point in message.items():
        at = int(name.split("-")[1])
        if point["q"] == "good" and not isinstance(point["value"], bool) and (addresses is None or at in addresses):
            found.add((point["value"] - at * 7 - unit * 1009) & 0xFFFF)
    assert len(found) == 1, f"values of several requests in one: {sorted(found)}"
    return found.pop()


def run(tmp_path, *parts):
    return Gateway(tmp_path / "gateway", "\n".join(parts)).start()


# -- Values ---------------------------------------------------------------------------------------------------------------


def test_stock_servers_are_read_over_every_transport(tmp_path, peers):
    ports = [free_port() for _ in range(3)]
    peers.lib("tcp", ports[0])
    peers.py("tcp", ports[1], 1, 7)
    peers.py("rtu-tcp", ports[2], 1, 7)
    parts = [connector("lib-tcp", "modbus-tcp", ports[0]), connector("py-tcp", "modbus-tcp", ports[1]), connector("py-rtu-tcp", "modbus-rtu-tcp", ports[2])]
    for name, server in [("lib-rtu", lambda port: peers.lib("rtu", port, 7)), ("py-rtu", lambda port: peers.py("rtu", port, 7))]:
        _, ours, theirs = peers.socat(f"{name}-a", f"{name}-b")
        server(theirs)
        parts.append(connector(name, "modbus-rtu", ours))
    names = ["lib-tcp", "py-tcp", "py-rtu-tcp", "lib-rtu", "py-rtu"]
    points = registers("holding", 0, 20) + registers("input", 100, 5) + [point("coil-3", "coil:3"), point("discrete-9", "discrete:9")]
    gateway = run(tmp_path, *parts, *(asset(name, name, 7, points) for name in names))
    try:
        ear = client(gateway, "ear", "data/#")
        for name in names:
            eventually(lambda: len(values(ear, name)) >= 10, 20, lambda: f"values of {name}: {gateway.part('connector', name)}")
            polls = [v for v in values(ear, name) if is_good(v)]
            assert len(polls) >= 9, values(ear, name)[:3]
            counters = [counter_of(v, 7, range(20)) for v in polls]
            assert all(0 < (b - a) & 0xFFFF < 20 for a, b in zip(counters, counters[1:])), f"{name}: each poll is newer: {counters}"
            assert all(counter_of(v, 7, range(100, 105)) > 0 and isinstance(v["coil-3"]["value"], bool) for v in polls)
        ear.end()
    finally:
        gateway.end()


TYPES = {"int32": ("i", -123456789), "uint32": ("I", 4_000_000_001), "float32": ("f", 21.5), "int64": ("q", -(2**53) - 2), "uint64": ("Q", 2**64 - 3),
         "float64": ("d", -1.1)}
ORDERS = ["ABCD", "CDAB", "BADC", "DCBA"]


def words(kind, value, order):
    """What the registers must hold, worked out apart from the gateway."""
    data = struct.pack(">" + kind, value)
    pairs = [data[n:n + 2] for n in range(0, len(data), 2)]
    if order in ("CDAB", "DCBA"):
        pairs.reverse()
    if order in ("BADC", "DCBA"):
        pairs = [pair[::-1] for pair in pairs]
    return [int.from_bytes(pair, "big") for pair in pairs]


def test_mb_11_orders_are_honoured_both_ways(tmp_path, peers):
    port = free_port()
    peers.lib("tcp", port, "static")
    places = {}
    for nth, (name, order) in enumerate((t, o) for t in TYPES for o in ORDERS):
        places[f"{name}-{order}"] = (10 * nth, name, order)
    points = [point(key, f"holding:{at}", f'type = "{name}", order = "{order}", writable = true, read_back = true') for key, (at, name, order) in places.items()]
    gateway = run(tmp_path, connector("tcp", "modbus-tcp", port), asset("press", "tcp", 1, points))
    try:
        ear = client(gateway, "ear", "data/#", "my/answers")
        other = ModbusTcpClient("127.0.0.1", port=port)
        assert other.connect()
        shown = lambda value: str(value) if abs(value) > 2**53 else value
        write = {key: TYPES[name][1] for key, (_, name, _) in places.items()}
        answer = ask(ear, ear, json.dumps({"write": write}), topic="commands/press")
        assert answer["result"] == "done", answer
        for key, (at, name, order) in places.items():
            kind, value = TYPES[name]
            held = other.read_holding_registers(at, count=struct.calcsize(kind) // 2, device_id=1).registers
            assert held == words(kind, value, order), f"{key}: written"
            other.write_registers(at, words(kind, value // 2 if kind not in "fd" else value / 2, order), device_id=1)
        answer = ask(ear, ear, json.dumps({"read": list(places)}), topic="commands/press")
        for key, (at, name, order) in places.items():
            kind, value = TYPES[name]
            expected = shown(value // 2 if kind not in "fd" else value / 2)
            assert answer["points"][key]["value"] == expected and answer["points"][key]["q"] == "good", f"{key}: read"
        other.close()
        ear.end()
    finally:
        gateway.end()


@pytest.mark.parametrize("server", ["libmodbus", "pymodbus"])
def test_every_function_writes_and_is_checked(tmp_path, peers, server):
    port = free_port()
    peers.lib("tcp", port, "static", "absent", 90) if server == "libmodbus" else peers.py("tcp", port, 1, "static")
    absent = 90 if server == "libmodbus" else 3000
    points = [
        point("coil-5", "coil:1", "writable = true"),
        point("coil-15", "coil:2", "writable = true, write_function = 15"),
        point("register-6", "holding:1", 'type = "int16", writable = true, read_back = true'),
        point("register-16", "holding:2", "writable = true, write_function = 16"),
        point("registers-16", "holding:4", 'type = "float32", scale = 0.5, writable = true'),
        point("register-23", "holding:6", "writable = true, write_function = 23"),
        point("text", "holding:10", 'type = "text", length = 8, writable = true, read_back = true'),
        point("bits-22", "holding:8.4-7", "writable = true, read_back = true"),
        point("bit-22", "holding:8.0", "writable = true"),
        point("bit-rmw", "holding:8.15", 'writable = true, write_function = "read-modify-write"'),
        point("absent", f"holding:{absent}", "writable = true"),
    ]
    gateway = run(tmp_path, connector("tcp", "modbus-tcp", port), asset("press", "tcp", 1, points))
    try:
        ear = client(gateway, "ear", "my/answers")
        other = ModbusTcpClient("127.0.0.1", port=port)
        assert other.connect()
        other.write_register(8, 0x0F0E, device_id=1)
        write = {"coil-5": True, "coil-15": True, "register-6": -2, "register-16": 500, "registers-16": 10.75, "register-23": 77, "text": "Pumpe",
                 "bits-22": 9, "bit-22": True, "bit-rmw": True}
        answer = ask(ear, ear, json.dumps({"write": write}), topic="commands/press")
        assert answer["result"] == "done", answer
        assert other.read_coils(1, count=2, device_id=1).bits[:2] == [True, True]
        held = other.read_holding_registers(1, count=13, device_id=1).registers
        assert held[0:2] == [0xFFFE, 500] and held[3:5] == words("f", 21.5, "ABCD") and held[5] == 77
        assert held[7] == 0x8F9F, f"only the bits that were meant: {held[7]:#x}"
        assert struct.pack(">4H", *held[9:13]) == b"Pumpe\0\0\0"
        answer = ask(ear, ear, json.dumps({"read": list(write)}), topic="commands/press")
        assert {name: answer["points"][name]["value"] for name in write} == write
        answer = ask(ear, ear, '{"write":{"bits-22":16}}', topic="commands/press")
        assert answer["result"] == "failed" and "do not hold" in answer["why"], answer
        answer = ask(ear, ear, '{"write":{"absent":1}}', topic="commands/press")
        assert answer["result"] == "failed" and "illegal data address (exception 2)" in answer["why"], answer
        other.close()
        ear.end()
    finally:
        gateway.end()


# -- Cases from the field -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tcp", "rtu", "rtu-tcp"])
def test_mb_01_a_late_answer_costs_one_poll_and_no_later_one(tmp_path, peers, relay, kind):
    line = a_line(peers, relay, kind, tmp_path, "libmodbus", timeout=0.3)
    points = registers("holding", 0, 10)
    gateway = run(tmp_path, connector("line", f"modbus-{kind}", line.front, 'timeout = "300 ms"'), asset("press", "line", 1, points, every="300 ms"))
    try:
        ear = client(gateway, "ear", "data/#")
        eventually(lambda: len(values(ear, "press")) >= 3, 10, "values")
        line.next_fault = "late"
        eventually(lambda: not all(map(is_good, values(ear, "press"))), 10, "the bad one")
        count = len(values(ear, "press"))
        eventually(lambda: len(values(ear, "press")) >= count + 8, 20, "those after it")
        polls = [is_good(v) for v in values(ear, "press")]
        assert polls.count(False) == 1, polls
        assert wrong_values(ear, "press", line, 1) == []
        ear.end()
    finally:
        gateway.end()


def test_mb_03_only_an_absent_point_is_bad(tmp_path, peers):
    port = free_port()
    peers.lib("tcp", port, "absent", 11, "absent", 1100)
    small = registers("holding", 10, 4)
    large = registers("holding", 1000, 300)
    gap = registers("input", 10, 1) + registers("input", 12, 2)
    gateway = run(tmp_path, connector("tcp", "modbus-tcp", port), asset("press", "tcp", 1, small + large + gap))
    try:
        ear = client(gateway, "ear", "data/#")
        eventually(lambda: len(values(ear, "press")) >= 5, 10, "values")
        for poll in values(ear, "press"):
            bad = {name: p for name, p in poll.items() if p["q"] != "good"}
            assert set(bad) == {"holding-11", "holding-1100"}
            assert bad["holding-11"]["value"] is None and bad["holding-11"]["why"].startswith("illegal data address (exception 2) at holding:11")
        # What was learned is kept: 4 blocks of the 300, 2 and 2 of the others, and the two that are asked for again.
        before, polls = gateway.part("connector", "tcp")["counters"], len(values(ear, "press"))
        eventually(lambda: len(values(ear, "press")) >= polls + 5, 10, "more")
        after = gateway.part("connector", "tcp")["counters"]
        assert after["requests"] - before["requests"] <= 10 * (after["polls"] - before["polls"] + 1), (before, after)
        ear.end()
    finally:
        gateway.end()


def test_mb_05_a_mute_unit_silences_no_other(tmp_path, peers):
    _, ours, theirs = peers.socat()
    peers.py("rtu", theirs, 1, 3, "mute")
    units = [asset(f"unit-{unit}", "bus", unit, registers("holding", 0, 10), every="1 s") for unit in (1, 2, 3)]
    gateway = run(tmp_path, connector("bus", "modbus-rtu", ours, 'timeout = "200 ms"'), *units)
    try:
        ear = client(gateway, "ear", "data/#")
        eventually(lambda: len(values(ear, "unit-1")) >= 6 and len(values(ear, "unit-3")) >= 6, 20, lambda: str(gateway.part("connector", "bus")))
        for unit in (1, 3):
            assert all(map(is_good, values(ear, f"unit-{unit}")))
        lost = values(ear, "unit-2")
        assert lost and all(p["q"] == "bad" and p["value"] is None and "no answer within 200ms since" in p["why"] for v in lost for p in v.values()), lost
        part = gateway.part("connector", "bus")
        assert part["counters"]["skipped"] > 0, "the lost unit is asked less often"
        assert part["health"] == "late" and "unit-2: no answer" in part["text"], part
        ear.end()
    finally:
        gateway.end()


def test_mb_07_a_lost_device_has_no_good_values(tmp_path, peers):
    port = free_port()
    server = peers.lib("tcp", port)
    gateway = run(tmp_path, connector("tcp", "modbus-tcp", port), asset("press", "tcp", 1, registers("holding", 0, 3)))
    try:
        ear = client(gateway, "ear", "data/#")
        eventually(lambda: len(values(ear, "press")) >= 3, 10, "values")
        peers.stop(server)
        eventually(lambda: not is_good(values(ear, "press")[-1]), 10, "bad values")
        first_bad = next(n for n, v in enumerate(values(ear, "press")) if not is_good(v))
        eventually(lambda: gateway.part("connector", "tcp")["counters"]["skipped"] >= 10, 10, "ten polls")
        for poll in values(ear, "press")[first_bad:]:
            assert all(p["q"] == "bad" and p["value"] is None and "since 20" in p["why"] for p in poll.values()), poll
        peers.lib("tcp", port)
        eventually(lambda: is_good(values(ear, "press")[-1]), 40, "it is back")
        ear.end()
    finally:
        gateway.end()


def test_mb_09_a_port_that_was_pulled_is_found_again(tmp_path, peers):
    wires, ours, theirs = peers.socat()
    server = peers.lib("rtu", theirs, 1)
    gateway = run(tmp_path, connector("bus", "modbus-rtu", ours, 'timeout = "200 ms"'), asset("press", "bus", 1, registers("holding", 0, 5), every="200 ms"))
    try:
        ear = client(gateway, "ear", "data/#")
        eventually(lambda: values(ear, "press") and is_good(values(ear, "press")[-1]), 10, "values")
        wires.send_signal(signal.SIGTERM)
        peers.stop(wires)
        peers.stop(server)
        gone = lambda part: part["health"] == "failed" and "cannot open" in part["text"]
        eventually(lambda: gone(gateway.part("connector", "bus")), 20, lambda: f"the port is gone: {gateway.part('connector', 'bus')}")
        count = len(values(ear, "press"))
        eventually(lambda: gateway.part("connector", "bus")["counters"]["skipped"] >= 10, 10, "some polls")
        assert not any(map(is_good, values(ear, "press")[count:]))
        peers.socat()
        peers.lib("rtu", theirs, 1)
        eventually(lambda: is_good(values(ear, "press")[-1]), 40, "it is found again")
        ear.end()
    finally:
        gateway.end()


# -- Faults ---------------------------------------------------------------------------------------------------------------


def a_line(peers, relay, kind, folder, server, **options):
    """A relayed line of a kind to a server of its own."""
    name = f"{kind}-{server}-{len(relay.lines)}"
    if kind == "rtu" or server == "libmodbus" and kind == "rtu-tcp":
        back = back_pty(folder / f"{name}-back")
        place = folder / f"{name}-back"
        peers.lib("rtu", place, 1) if server == "libmodbus" else peers.py("rtu", place, 1)
    else:
        port = free_port()
        peers.lib("tcp", port) if server == "libmodbus" else peers.py(kind, port, 1)
        back = ("tcp", port)
    front = str(folder / f"{name}-front") if kind == "rtu" else free_port()
    return relay.line(kind, back, front, **options)


def seconds(text):
    return datetime.datetime.fromisoformat(text).timestamp()


FUNCTIONS = {"holding": 3, "input": 4}


def wrong_values(ear, name, line, unit):
    """Good values that are not those of the last request before they were read."""
    wrong = []
    messages = list(values(ear, name))
    requests = list(line.requests)
    at_request = 0
    for message in messages:
        for key, value in message.items():
            if value["q"] != "good":
                continue
            table, at = key.split("-")
            at = int(at)
            counter = (value["value"] - at * 7 - unit * 1009) & 0xFFFF
            read = seconds(value["ts"])
            while at_request < len(requests) and requests[at_request].at <= read + 0.0015:
                at_request += 1
            covers = lambda r: r.function == FUNCTIONS[table] and r.start <= at < r.start + r.count
            before = [r for r in requests[max(0, at_request - 12):at_request] if covers(r)]
            # Times are in whole milliseconds: the next request may seem to be of the same one.
            allowed = before[-1:] + [r for r in before[-3:-1] if before[-1].at > read - 0.0015]
            if not any(r.answer == counter for r in allowed) and not any(r.excused for r in allowed):
                near = [(round(r.at - read, 4), r.function, r.start, r.count, r.answer, r.delivered) for r in requests[max(0, at_request - 6):at_request + 6]]
                wrong.append((key, counter, value["ts"], near))
    return wrong


def test_no_fault_makes_a_wrong_value_good_or_costs_more_than_a_poll(tmp_path, peers, relay):
    """TIDEGATE_MODBUS_FAULTS=10000 is the long run."""
    wanted = int(os.environ.get("TIDEGATE_MODBUS_FAULTS", 400))
    seed = new_seed("modbus faults")
    lines = []
    for _ in range(1 if wanted < 1_000 else 3):
        for kind, server in [(k, s) for k in ("tcp", "rtu", "rtu-tcp") for s in ("libmodbus", "pymodbus")]:
            lines.append((kind, a_line(peers, relay, kind, tmp_path, server, timeout=0.15, seed=seed + len(lines), fault_every=0)))
    points = registers("holding", 0, 20) + registers("holding", 200, 10) + registers("holding", 400, 10) + registers("input", 0, 10)
    parts = []
    for nth, (kind, line) in enumerate(lines):
        parts.append(connector(f"line-{nth}", f"modbus-{kind}", line.front, 'timeout = "150 ms"'))
        parts.append(asset(f"press-{nth}", f"line-{nth}", 1, points, every="100 ms", extra='max_silence = "1 day"'))
    gateway = run(tmp_path, *parts)
    try:
        ear = client(gateway, "ear", "data/#")
        for nth in range(len(lines)):
            eventually(lambda: sum(map(is_good, values(ear, f"press-{nth}"))) >= 3, 20, lambda: f"line {nth}: {gateway.part('connector', f'line-{nth}')}")
        for _, line in lines:
            line.fault_every = 5
        faults = lambda: sum(sum(line.faults.values()) for _, line in lines)
        eventually(lambda: faults() >= wanted, 60 + wanted / 8, lambda: f"{faults()} faults of {wanted}", 0.2)
        for _, line in lines:
            line.fault_every = 0
        report = []
        for nth, (kind, line) in enumerate(lines):
            polls = values(ear, f"press-{nth}")
            bad = sum(not is_good(poll) for poll in polls)
            wrong = wrong_values(ear, f"press-{nth}", line, 1)
            count = sum(line.faults.values())
            counters = gateway.part("connector", f"line-{nth}")["counters"]
            report.append(f"{kind}: {len(polls)} polls, {count} faults, {bad} polls bad, {len(wrong)} values wrong, {line.undetectable} not to be told apart; {counters}")
            print(report[-1])
            assert wrong == [], f"{report[-1]}: {wrong[:3]}"
            assert bad <= count, report[-1]
        before = [len(values(ear, f"press-{nth}")) for nth in range(len(lines))]
        for nth in range(len(lines)):
            # A lost device is asked again after half a minute at the latest.
            eventually(lambda: sum(map(is_good, values(ear, f"press-{nth}")[before[nth]:])) >= 3, 60, lambda: f"line {nth} is good again: {gateway.part('connector', f'line-{nth}')}", 0.1)
        assert set().union(*(line.faults for _, line in lines)) >= {"late", "late_into_next", "twice", "vanish", "longer", "flipped", "other_transaction"}
        ear.end()
    finally:
        gateway.end()


# -- Looking around -------------------------------------------------------------------------------------------------------


def test_discover_finds_the_units_and_prints_a_configuration(tmp_path, peers):
    _, ours, theirs = peers.socat()
    peers.py("rtu", theirs, 3, 9, "mute")
    scan = [BINARY, "discover", "modbus", "--device", ours, "--baud", "9600", "--parity", "none", "--units", "1-10", "--timeout", "150ms"]
    done = subprocess.run(scan, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert "unit 3 answers" in done.stderr and "9 of 10 units asked, 2 found" in done.stderr, done.stderr
    gateway = Gateway(tmp_path / "found", done.stdout).start()
    try:
        ear = client(gateway, "ear", "data/#")
        eventually(lambda: {m.topic for m in ear.messages} == {"data/unit-3", "data/unit-9"}, 10, "values of both")
        assert all(is_good(json.loads(m.payload)) for m in ear.messages)
        again = subprocess.run(scan, capture_output=True, text=True, timeout=30)
        assert again.returncode == 1 and "another program has locked it" in again.stderr, "the gateway has the port"
        ear.end()
    finally:
        gateway.end()
    # A unit that refuses is a unit that is there.
    port = free_port()
    peers.lib("tcp", port, "absent", 0)
    done = subprocess.run([BINARY, "discover", "modbus", "--tcp", f"127.0.0.1:{port}", "--units", "1"], capture_output=True, text=True, timeout=30)
    assert "[[asset]] # answers, holding:0 with illegal data address (exception 2)" in done.stdout
    for arguments, why in [([], "which line?"), (["--tcp", f"127.0.0.1:{free_port()}"], "cannot open"), (["--tcp", "a:b"], "is not an address")]:
        done = subprocess.run([BINARY, "discover", "modbus", *arguments], capture_output=True, text=True, timeout=30)
        assert done.returncode == 1 and why in done.stderr and not done.stdout
    done = subprocess.run([BINARY, "discover", "serial"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and ("# no serial port" in done.stdout or 'kind = "modbus-rtu"' in done.stdout)
