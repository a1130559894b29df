"""GPIO, I²C, SPI and PWM on a host that has none of them: each connector says what is missing, the rest runs (CF-04)."""

import json
import pathlib
import subprocess
import time

from support import BINARY, V5, Client, Gateway, eventually

# Numbers that no host has, so that the test is the same on one with GPIO.
MACHINES = """
[[connector]]
name = "sim"
kind = "simulator"
[[asset]]
name = "boiler"
connector = "sim"
every = "50 ms"
points = [{ name = "temperature" }]

[[connector]]
name = "pins"
kind = "gpio"
chip = "gpiochip250"
[[asset]]
name = "door"
connector = "pins"
every = "100 ms"
max_silence = "500 ms"
points = [{ name = "open", address = "17", edge = "both" }, { name = "lock", address = "22", direction = "out", safe = true }]

[[connector]]
name = "bus"
kind = "i2c"
bus = 250
[[asset]]
name = "air"
connector = "bus"
sensor = "bme280"
device_address = 0x76
every = "100 ms"
points = [{ name = "temperature" }]

[[connector]]
name = "converter"
kind = "spi"
bus = 6
select = 7
[[asset]]
name = "tank"
connector = "converter"
sensor = "mcp3008"
every = "100 ms"
points = [{ name = "level", address = "channel:0" }]

[[connector]]
name = "fans"
kind = "pwm"
chip = 250
[[asset]]
name = "fan"
connector = "fans"
every = "100 ms"
points = [{ name = "duty", address = "channel:0", frequency = 25000 }]
"""
MISSING = {
    "pins": "no /dev/gpiochip250 on this host: enable",
    "bus": "no /dev/i2c-250 on this host: enable",
    "converter": "no /dev/spidev6.7 on this host: enable",
    "fans": "no /sys/class/pwm/pwmchip250 on this host: enable",
}


def test_what_is_missing_is_said_and_the_rest_runs(tmp_path):
    started = time.monotonic()
    gateway = Gateway(tmp_path, MACHINES).start()
    try:
        ear = Client(gateway.port, "ear", version=V5).connect()
        for topic in ("data/#", "status/connector/#", "answers/#"):
            ear.subscribe(topic, 1)
        on = lambda topic: [json.loads(m.payload) for m in ear.messages if m.topic == topic]
        eventually(lambda: len(on("data/boiler")) >= 10, 10, "the simulator's values")
        assert time.monotonic() - started < 10
        for name, why in MISSING.items():
            # It is tried again: a second fault is a second attempt.
            part = eventually(
                lambda: (p := gateway.part("connector", name)) and p["counters"]["faults"] >= 2 and p, 20, f"{name} failing twice"
            )
            assert part["health"] == "failed" and why in part["text"] and "or take this [[connector]] out since" in part["text"]
            told = eventually(lambda: on(f"status/connector/{name}"), 10, f"the status of {name}")
            assert told[-1]["health"] == "failed" and why in told[-1]["text"]
        door = eventually(lambda: on("data/door"), 10, "the door's values")[-1]
        assert (door["open"]["value"], door["open"]["q"]) == (None, "bad") and MISSING["pins"] in door["open"]["why"]
        assert gateway.part("connector", "sim")["health"] == "good"
        # A command is answered, and not as done.
        ear.publish("commands/door", '{"id":"1","write":{"lock":false}}', qos=1)
        answer = eventually(lambda: on("answers/door"), 10, "the answer")[0]
        assert answer["result"] == "failed" and MISSING["pins"] in answer["why"]
        ear.end()
        gateway.stop()
    finally:
        gateway.end()


def discover(*arguments):
    return subprocess.run([BINARY, "discover", "i2c", *arguments], capture_output=True, text=True, timeout=60)


def test_discover_i2c_lists_what_there_is_and_scans_nothing_unasked():
    ended = discover()
    if any(pathlib.Path("/sys/class/i2c-dev").glob("i2c-*")):
        assert ended.returncode == 0 and "/dev/i2c-" in ended.stdout and "probing" not in ended.stderr
    else:
        assert ended.returncode == 1 and ended.stdout == ""
        assert "no I²C bus on this host: enable one" in ended.stderr and "modprobe i2c-dev" in ended.stderr
    for bus in ("250", "/dev/i2c-250"):
        ended = discover("--bus", bus)
        assert ended.returncode == 1 and "no /dev/i2c-250 on this host" in ended.stderr and "[[connector]]" not in ended.stderr
    assert discover("--bus", "i2c").returncode == 2
