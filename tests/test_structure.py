"""The folders keep their rules: who may know whom, which file alone names a crate, which files do no I/O."""

import re
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src"

# The order of dependency: a part may use itself and what stands before it.
ORDER = [
    "message", "clock", "status", "trie", "essential", "logging", "certificate", "config", "log", "broker", "modules", "connectors", "uplinks", "metrics", "control", "admin",
    "supervisor", "cli",
]
# message and clock are one layer: a message carries its time.
SAME_LAYER = {frozenset(("message", "clock"))}
# These meet only through the broker's handle and the log's consumers.
STRANGERS = {"modules", "connectors", "uplinks"}
# The command line starts the supervisor and the compiler's child; nothing looks up to it.
ALONE = {"rusqlite": ["log/store.rs"], "wasmtime": ["modules/host.rs"], "tokio_rustls": ["broker/transport/mod.rs", "certificate/server.rs", "uplinks/mqtt/wire.rs"],
         "tokio_modbus": ["connectors/modbus/wire.rs"], "serial2_tokio": ["connectors/modbus/wire.rs"],
         "gpiocdev": ["connectors/gpio/kernel.rs"]}
PURE = [
    "message.rs", "trie.rs", "log/record.rs", "log/segment.rs", "log/changes.rs", "log/ring.rs", "admin/encoding.rs", "logging/repeats.rs", "metrics/table.rs", "metrics/text.rs", "broker/access.rs", "broker/router.rs",
    "broker/session.rs", "broker/repeats.rs", "broker/properties.rs", "broker/logins.rs", "broker/pace.rs", "broker/sys.rs", "config/pattern.rs", "broker/transport/proxy.rs", "broker/transport/websocket.rs", "certificate/mod.rs", "uplinks/backoff.rs", "uplinks/routes.rs", "uplinks/mqtt/session.rs",
    "modules/runner.rs", "connectors/command.rs", "connectors/grid.rs", "connectors/report.rs", "connectors/scaling.rs",
    "connectors/values.rs", "config/difference.rs", "connectors/gpio/edges.rs", "connectors/gpio/line.rs", "connectors/sensors/mod.rs",
    "connectors/sensors/bme280.rs", "connectors/sensors/sht3x.rs", "connectors/sensors/ads1115.rs", "connectors/sensors/mcp3008.rs",
    "connectors/modbus/plan.rs", "connectors/modbus/value.rs", "connectors/modbus/guard.rs",
]


def code(path):
    """Without comments, and without the tests at the end."""
    text = re.split(r"#\[cfg\(test\)\]\n(pub(\(\w+\))? )?mod \w+ \{", path.read_text())[0]
    return re.sub(r"//.*", "", text)


def files():
    return [p for p in SRC.rglob("*.rs") if p.name != "tests.rs" and p.parent.name != "tests"]


def part_of(path):
    return path.relative_to(SRC).parts[0].removesuffix(".rs")


def test_nothing_depends_on_what_comes_after_it():
    wrong = []
    for path in files():
        part = part_of(path)
        if part in ("lib", "main"):
            continue
        assert part in ORDER, f"{part}: give it a place in ORDER"
        for used in set(re.findall(r"\bcrate::(\w+)", code(path))):
            later = used in ORDER and ORDER.index(used) > ORDER.index(part) and frozenset((used, part)) not in SAME_LAYER
            if later or (used in STRANGERS and part in STRANGERS and used != part):
                wrong.append(f"{path.relative_to(SRC)} uses {used}")
    assert wrong == []


@pytest.mark.parametrize("crate", ALONE)
def test_one_file_alone_names_a_crate(crate):
    naming = sorted(str(p.relative_to(SRC)) for p in files() if re.search(rf"\b{crate}\b(::|;)", code(p)))
    assert naming == ALONE[crate]


def test_only_the_clock_reads_the_clock():
    reading = [str(p.relative_to(SRC)) for p in files() if re.search(r"SystemTime::now\(|\bInstant::now\(", code(p))]
    assert [p for p in reading if p != "clock.rs"] == []


@pytest.mark.parametrize("name", PURE)
def test_a_pure_file_does_no_io(name):
    text = code(SRC / name)
    assert not re.search(r"\btokio::(?!sync::oneshot)|std::(fs|net|io|thread)::|clock::(wall|monotonic)\(", text)
