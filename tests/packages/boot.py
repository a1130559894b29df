"""The package's life on a clean Debian with systemd: installed by apt from a signed repository, upgraded under traffic, killed,
hung, removed, purged, installed again. One box, one test after the other: run by tests/packages/run, with -x."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from box import Box, Repository  # noqa: E402
from support import eventually  # noqa: E402

PACKAGES = Path(os.environ["TIDEGATE_PACKAGES"]).resolve()
BASE = Path(os.environ["TIDEGATE_BASE"]).resolve()
UPGRADES = int(os.environ.get("TIDEGATE_UPGRADES", "20"))
CONFIG = "/etc/tidegate/gateway.toml"
ARCHIVE = '\n[[uplink]]\nname = "archive"\nkind = "file"\npath = "/var/lib/tidegate/archive.jsonl"\nmax_bytes = "1 GiB"\n\n[[route]]\nfrom = ["#"]\nto = "archive"\n'
CLOUD = '\n[[uplink]]\nname = "cloud"\nkind = "mqtt"\nurl = "mqtt://127.0.0.1:1899"\n\n[[route]]\nfrom = ["cf02/#"]\nto = "cloud"\ntopic = "up/{topic}"\n'
_versions = iter(f"0.0.{n}-1" for n in range(1, 1000))


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    (deb,) = PACKAGES.glob("pool/tidegate_*_amd64.deb")
    made = Repository(tmp_path_factory.mktemp("repository") / "repository", deb)
    yield made
    made.end()


@pytest.fixture(scope="module")
def box(tmp_path_factory, repository):
    made = Box(tmp_path_factory.mktemp("box") / "root", BASE)
    try:
        sources = made.path("/etc/apt")
        for old in [sources / "sources.list", *(sources / "sources.list.d").glob("*")]:
            old.unlink(missing_ok=True)
        (sources / "sources.list").write_text("deb [signed-by=/usr/share/keyrings/tidegate-archive-keyring.gpg] file:/srv/repository stable main\n")
        made.start()
        yield made
    finally:
        made.end()


def offer(box, repository):
    """The next version, in the box's repository; its number."""
    version = next(_versions)
    repository.publish(version)
    inside = box.path("/srv/repository")
    shutil.rmtree(inside, ignore_errors=True)
    shutil.copytree(repository.folder, inside)
    shutil.copy(inside / "tidegate-archive-keyring.gpg", box.path("/usr/share/keyrings"))
    box.run("apt-get update -q")
    return version


def installed(box):
    return box.run("dpkg-query -W -f '${Version}' tidegate")


def archived(box):
    """Payloads by topic of what the file uplink has delivered."""
    out = {}
    text = box.path("/var/lib/tidegate/archive.jsonl")
    if text.exists():
        for line in text.read_text().splitlines():
            message = json.loads(line)
            out.setdefault(message["topic"], set()).add(message["payload"])
    return out


def publish(box, topic, payload="x"):
    code, said = box.run_host("mosquitto_pub", "-h", "127.0.0.1", "-p", "1883", "-q", "1", "-t", topic, "-m", payload)
    assert code == 0, f"{said}\n{box.journal()}"


def arrives(box, topic, payload):
    eventually(lambda: str(payload) in archived(box).get(topic, ()), 15, lambda: f"{topic} arrives\n{box.journal()}", 0.05)


class Traffic:
    def __init__(self, box, prefix):
        self.box, self.prefix = box, prefix
        script = Path(__file__).with_name("traffic.py")
        self.process = box.spawn_host([sys.executable, script, "1883", prefix], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "started\n"

    def end(self):
        """Its report, after every acknowledged message was seen at the uplink."""
        said, _ = self.process.communicate(timeout=120)
        report = json.loads(said)
        clients = {name: acked for name, acked in report.items() if isinstance(acked, list) and name != "refused"}

        def missing():
            there = archived(self.box)
            return {n: sorted(set(map(str, a)) - there.get(f"{self.prefix}/{n}", set()))[:5] for n, a in clients.items()}

        eventually(lambda: not any(missing().values()), 30, lambda: f"acknowledged and not there: {missing()}", 0.2)
        report["acknowledged"] = sum(len(a) for a in clients.values())
        assert all(len(a) > 0 for a in clients.values()), "a client did nothing"
        return report


def test_apt_installs_it_and_it_runs(box, repository):
    version = offer(box, repository)
    box.run("apt-get install -y -q tidegate")
    assert installed(box) == version
    assert box.active("tidegate.socket") and box.active("tidegate.service"), box.journal()
    assert box.run("stat -c '%U:%G %a' " + CONFIG) == "root:tidegate 640\n"
    assert box.run("stat -c '%U:%G %a' /var/lib/tidegate") == "tidegate:tidegate 750\n"
    assert box.run(f"stat -c %U /proc/{box.main_pid()}") == "tidegate\n"
    assert box.run("systemctl is-enabled tidegate.service tidegate.socket").split() == ["enabled", "enabled"]
    publish(box, "first/one")


def test_a_reload_brings_an_uplink_and_a_module(box):
    before = box.main_pid()
    with box.path(CONFIG).open("a") as file:
        file.write(ARCHIVE)
    box.run("systemctl reload tidegate")
    assert box.main_pid() == before
    publish(box, "first/two", "2")
    arrives(box, "first/two", "2")
    box.run("cp /usr/share/tidegate/modules/average.wasm /var/lib/tidegate/modules.d/")
    eventually(lambda: box.status().get(("module", "average"), {}).get("health") == "good", 60, lambda: f"the module runs: {box.status()}", 0.2)


def test_a_wrong_file_is_refused_and_changes_nothing(box):
    good = box.path(CONFIG).read_text()
    box.path(CONFIG).write_text(good.replace("max_bytes", "max_bites"))
    said = box.run("systemctl reload tidegate || journalctl -u tidegate -n 20 -o cat")
    assert "max_bites" in said and re.search(r"gateway\.toml:\d+:\d+", said), said
    publish(box, "first/three", "3")
    arrives(box, "first/three", "3")
    box.path(CONFIG).write_text(good)
    box.run("systemctl reload tidegate")


def test_upgrades_under_traffic_refuse_no_client_and_lose_nothing(box, repository):
    traffic = Traffic(box, "upgrade")
    pids = {box.main_pid()}
    for _ in range(UPGRADES):
        version = offer(box, repository)
        box.run("apt-get install -y -q tidegate")
        assert installed(box) == version
        assert box.active(), box.journal()
        pids.add(box.main_pid())
    report = traffic.end()
    print({k: v for k, v in report.items() if not isinstance(v, list) or k == "refused"})
    assert len(pids) == UPGRADES + 1, "each upgrade is a restart"
    assert report["refused"] == []
    assert report["probes"] > 100
    # The module came along.
    eventually(lambda: box.status().get(("module", "average"), {}).get("health") == "good", 60, "the module runs", 0.2)


def test_killed_it_is_back_and_nothing_is_lost(box):
    traffic = Traffic(box, "killed")
    for _ in range(3):
        seen = sum(map(len, archived(box).values()))
        eventually(lambda: sum(map(len, archived(box).values())) > seen + 300, 30, "the clients are at work", 0.1)
        before = box.main_pid()
        box.run(f"kill -9 {before}")
        eventually(lambda: box.main_pid() not in (0, before) and box.active(), 20, "a new process", 0.05)
    report = traffic.end()
    print({k: v for k, v in report.items() if not isinstance(v, list) or k == "refused"})
    assert report["refused"] == []


def test_hung_it_is_restarted_by_the_watchdog(box):
    box.run("mkdir -p /etc/systemd/system/tidegate.service.d; printf '[Service]\\nWatchdogSec=2s\\n' > /etc/systemd/system/tidegate.service.d/test.conf")
    box.run("systemctl daemon-reload && systemctl restart tidegate")
    before, restarts = box.main_pid(), int(box.show("tidegate.service", "NRestarts"))
    box.run(f"kill -STOP {before}")
    eventually(lambda: box.main_pid() not in (0, before) and box.active(), 30, "a new process", 0.05)
    assert int(box.show("tidegate.service", "NRestarts")) == restarts + 1
    assert "watchdog" in box.run("journalctl -u tidegate --no-pager -o cat -n 50").lower()
    publish(box, "watchdog/after", "1")
    arrives(box, "watchdog/after", "1")
    box.run("rm -r /etc/systemd/system/tidegate.service.d; systemctl daemon-reload; systemctl restart tidegate")


def test_an_upgrade_and_a_removal_keep_file_and_queue(box, repository):
    """CF-02."""
    config = box.path(CONFIG)
    config.write_text(config.read_text() + "\n# edited by hand\n" + CLOUD)
    # Its uplink is not there yet, which would be a reason to take the reload back.
    box.run(f"tidegate reload --no-revert --config {CONFIG}")
    lines = subprocess.run(["seq", "10000"], capture_output=True).stdout
    pub = box.spawn_host(["mosquitto_pub", "-h", "127.0.0.1", "-q", "1", "-t", "cf02/queued", "-l"], stdin=subprocess.PIPE)
    pub.communicate(lines, timeout=60)
    assert pub.returncode == 0

    eventually(lambda: box.queued("cloud") == 10_000, 20, lambda: f"10,000 are queued: {box.report()}", 0.1)
    text, mode = config.read_text(), box.run(f"stat -c '%U:%G %a' {CONFIG}")
    for step in ["install", "remove", "install"]:
        if step == "install":
            offer(box, repository)
        box.run(f"apt-get {step} -y -q tidegate")
        assert config.read_text() == text and box.run(f"stat -c '%U:%G %a' {CONFIG}") == mode, step
        if step == "remove":
            assert not box.path("/usr/bin/tidegate").exists()
            assert box.run_host("mosquitto_pub", "-h", "127.0.0.1", "-t", "x", "-m", "x")[0] != 0, "nothing listens"
        else:
            assert box.active() and box.active("tidegate.socket"), box.journal()
            assert box.queued("cloud") == 10_000
    # And all of it goes where it should once the other side is there.
    conf = box.root.parent / "mosquitto.conf"
    conf.write_text("listener 1899 127.0.0.1\nallow_anonymous true\nmax_queued_messages 0\n")
    upstream = box.spawn_host(["mosquitto", "-c", conf], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: box.run_host("mosquitto_pub", "-h", "127.0.0.1", "-p", "1899", "-t", "x", "-m", "x")[0] == 0, 10, "mosquitto is there")
        code, said = box.run_host("mosquitto_sub", "-h", "127.0.0.1", "-p", "1899", "-q", "1", "-t", "up/#", "-C", "10000", "-W", "90", timeout=100)
        assert code == 0 and len(set(said.split())) == 10_000, f"{len(set(said.split()))} of 10,000"
    finally:
        upstream.send_signal(signal.SIGTERM)
        upstream.wait(10)


def test_a_purge_keeps_the_data_and_says_so(box, repository):
    said = box.run("apt-get purge -y -q tidegate")
    assert "kept /var/lib/tidegate" in said, said
    assert box.path("/var/lib/tidegate/archive.jsonl").exists()
    assert not box.path("/etc/tidegate").exists()
    assert "tidegate" not in box.run("systemctl list-unit-files --no-pager; ls /etc/systemd/system")
    # What is installed after that begins with the data of before.
    offer(box, repository)
    box.run("apt-get install -y -q tidegate")
    assert box.active() and box.active("tidegate.socket"), box.journal()
    assert "edited by hand" not in box.path(CONFIG).read_text()
    assert box.run("stat -c '%U:%G %a' " + CONFIG) == "root:tidegate 640\n"
    eventually(lambda: box.status().get(("module", "average"), {}).get("health") == "good", 60, "the module runs", 0.2)


def test_a_purge_deletes_the_data_where_that_was_agreed_to(box, repository):
    box.run("echo 'tidegate tidegate/purge-data boolean true' | debconf-set-selections")
    said = box.run("apt-get purge -y -q tidegate")
    assert "deleted /var/lib/tidegate" in said, said
    assert not box.path("/var/lib/tidegate").exists()
    # Nor does the agreement outlive the package.
    offer(box, repository)
    box.run("apt-get install -y -q tidegate")
    assert box.active() and box.active("tidegate.socket"), box.journal()
    publish(box, "again/one")
    assert "kept" in box.run("apt-get purge -y -q tidegate")
