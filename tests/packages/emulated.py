"""The packages of other architectures, end to end under qemu-user: publish, queue while the uplink is away, kill -9, drain, and
one module. What is run is what the package holds, unpacked. Run by tests/packages/run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import support  # noqa: E402
from support import REPOSITORY, Gateway, Mosquitto, Recorder, eventually, free_port, mqtt_uplink  # noqa: E402
from test_package import check_depends  # noqa: E402

PACKAGES = Path(os.environ["TIDEGATE_PACKAGES"]).resolve()
EMULATORS = {
    "arm64": ("/usr/bin/qemu-aarch64-static", "/usr/aarch64-linux-gnu"),
    "armhf": ("/usr/bin/qemu-arm-static", "/usr/arm-linux-gnueabihf"),
}
# In a user namespace of its own this machine starts binaries of that architecture by the emulator: the gateway starts its
# module compiler by itself, and nothing is left registered on the host.
REGISTER = """
set -e
mount -t binfmt_misc none /proc/sys/fs/binfmt_misc
printf '%s' "$1" > /proc/sys/fs/binfmt_misc/register
shift
exec "$@"
"""
MAGIC = {
    "arm64": r":tg:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:",
    "armhf": r":tg:M::\x7fELF\x01\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\x28\x00:\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:",
}


@pytest.fixture(params=EMULATORS)
def installed(request, tmp_path, monkeypatch):
    """The unpacked package of an architecture; `support.BINARY` is its binary. Returns (folder, prefix, env)."""
    arch = request.param
    emulator, sysroot = EMULATORS[arch]
    (deb,) = PACKAGES.glob(f"pool/tidegate_*_{arch}.deb")
    folder = tmp_path / arch
    subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
    binary = folder / "usr/bin/tidegate"
    assert {"arm64": "AArch64", "armhf": "ARM"}[arch] in subprocess.run(["readelf", "-h", binary], capture_output=True, text=True).stdout
    monkeypatch.setattr(support, "BINARY", binary)
    prefix = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", REGISTER, "sh", MAGIC[arch] + emulator + ":F"]
    yield folder, prefix, {"QEMU_LD_PREFIX": sysroot}


@pytest.mark.parametrize("arch", EMULATORS)
def test_depends_says_what_the_binary_needs(arch, tmp_path):
    (deb,) = PACKAGES.glob(f"pool/tidegate_*_{arch}.deb")
    check_depends(deb, tmp_path)
    # What cannot be compiled there comes with it.
    bytecode = list(tmp_path.glob("usr/lib/tidegate/precompiled/average-*.pulley32"))
    assert len(bytecode) == (arch == "armhf")


class Emulated(Gateway):
    """`tidegate status` is asked of the host's own binary: the socket is the same."""

    host = REPOSITORY / "target/release/tidegate"

    def status(self):
        done = subprocess.run([self.host, "status", "--json", "--config", self.path], capture_output=True, timeout=20)
        assert done.returncode == 0, done.stderr
        return {(part["kind"], part["name"]): part for part in json.loads(done.stdout)["parts"]}


def test_end_to_end(installed, tmp_path):
    folder, prefix, env = installed
    upstream = Mosquitto(tmp_path / "upstream", port=free_port())
    config = mqtt_uplink(upstream.port, topic="up/{topic}") + '[[module]]\nname = "average"\nconfig = { window = "1 s" }\n'
    gateway = Emulated(tmp_path / "gateway", config)
    start = {"prefix": prefix, "env": env, "timeout": 60}
    try:
        gateway.start(**start)
        # The module that the package brings: compiled there, or run from the bytecode that came with it.
        gateway.drop_module(folder / "usr/share/tidegate/modules/average.wasm")
        gateway.wait_for_module("average", timeout=120)
        device = support.Client(gateway.port, "device").connect()
        for n in range(500):
            device.publish("sensors/queued", str(n), wait=n % 50 == 49)
        for n in range(20):
            reading = {"temperature": {"value": 20.0 + n % 2, "ts": f"2026-11-24T23:40:{n:02}.000Z", "q": "good"}}
            device.publish("data/boiler", json.dumps(reading))
        device.end()
        eventually(lambda: gateway.part("module", "average")["counters"]["published"] > 0, 60, "an average", 0.1)
        gateway.kill9()
        gateway.start(**start)
        gateway.wait_for_module("average", timeout=60)
        upstream.start()
        recorder = Recorder(upstream.port, "up/#").start()
        wanted = {("up/sensors/queued", str(n).encode()) for n in range(500)}
        eventually(lambda: wanted <= recorder.seen, 60, lambda: f"{len(wanted & recorder.seen)} of 500\n{gateway.log[-2000:]}", 0.1)
        averages = [json.loads(p) for t, p in recorder.seen if t.startswith("up/derived/")]
        assert averages, "the module's averages came up, too"
        print(averages[:2], f"ready after {gateway.ready_s:.2f} s")
        recorder.end()
        gateway.stop(timeout=30)
    finally:
        gateway.end()
        upstream.end()
