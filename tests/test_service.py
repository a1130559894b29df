"""What systemd gets from the gateway and gives to it: readiness, reloading, the watchdog, sockets, credentials; and how
hard the unit is as shipped. The protocols are played by the test itself; the boot of a whole Debian is tests of the package.
"""

import fcntl
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from rawmqtt import Raw
from support import BINARY, GUESTS, REPOSITORY, eventually, free_port, listens

UNITS = REPOSITORY / "systemd"


class Manager:
    """systemd's end of the notification socket."""

    def __init__(self, folder):
        self.path = str(folder / "notify.sock")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.path)
        self.seen = []

    def env(self, **more):
        return {"NOTIFY_SOCKET": self.path, **more}

    def next(self, timeout=10):
        self.socket.settimeout(timeout)
        try:
            text = self.socket.recv(65536).decode()
        except TimeoutError:
            return None
        self.seen.append(text)
        return dict(line.split("=", 1) for line in text.splitlines())

    def until(self, key, timeout=15):
        """The first message with that key."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            message = self.next(max(0.01, deadline - time.monotonic()))
            if message and key in message:
                return message
        raise AssertionError(f"no {key} within {timeout} s, but {self.seen}")

    def drain(self):
        while self.next(0.01):
            pass

    def end(self):
        self.socket.close()


@pytest.fixture
def manager(tmp_path, _started):
    made = Manager(tmp_path)
    _started.append(made)
    return made


def spawned(gateway, env, prefix=(), config="", **options):
    made = gateway(config, start=False, **options)
    made.spawn(prefix=prefix, env=env)
    return made


def test_ready_comes_when_clients_can_connect(gateway, manager):
    made = spawned(gateway, manager.env())
    manager.until("READY")
    assert listens(made.port)
    assert manager.until("STATUS")["STATUS"] == "serving; everything is good"
    made.process.send_signal(signal.SIGTERM)
    manager.until("STOPPING")
    assert made.process.wait(5) == 0
    made.process = None


def test_ready_comes_also_where_a_listener_fails(gateway, manager):
    """Another program has the port: the rest runs, and the status text says it."""
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    spawned(gateway, manager.env(), port=port)
    manager.until("READY")
    assert f"listener 127.0.0.1:{port} has failed" in manager.until("STATUS")["STATUS"]
    taken.close()


def test_an_abstract_socket_is_a_notification_socket_too(gateway, manager):
    name = f"\0tidegate-test-{os.getpid()}"
    manager.socket.close()
    manager.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.socket.bind(name)
    spawned(gateway, {"NOTIFY_SOCKET": "@" + name[1:]})
    manager.until("READY")


def test_a_notification_socket_that_is_gone_harms_nothing(gateway):
    made = gateway(start=False)
    made.start(env={"NOTIFY_SOCKET": "/nonexistent/notify", "WATCHDOG_USEC": "200000"})
    Raw(made.port, 5).open("c").publish_acked("a", "x")


def test_a_reload_is_announced_and_over(gateway, manager):
    made = spawned(gateway, manager.env())
    manager.until("READY")
    manager.drain()
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    made.write_config(made.path.read_text() + "\n[anonymous]\npublish = ['#']\nsubscribe = []\n")
    made.process.send_signal(signal.SIGHUP)
    reloading = manager.until("RELOADING")
    assert reloading["RELOADING"] == "1"
    manager.until("READY")
    after = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert before <= int(reloading["MONOTONIC_USEC"]) <= after


# A disk that hangs, or fails: fdatasync does not return, or with an error, while the file is there.
BAD_DISK = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <unistd.h>
static int is_there(const char *name) {
    const char *path = getenv(name);
    return path && access(path, F_OK) == 0;
}
int fdatasync(int fd) {
    static int (*real)(int);
    if (!real) real = (int (*)(int))dlsym(RTLD_NEXT, "fdatasync");
    while (is_there("HANG_WHILE")) usleep(10000);
    if (is_there("FAIL_WHILE")) { errno = EIO; return -1; }
    return real(fd);
}
"""


@pytest.fixture(scope="module")
def bad_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "bad.c").write_text(BAD_DISK)
    library = folder / "bad.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, folder / "bad.c", "-ldl"], check=True)
    return library


def test_the_watchdog_is_fed_while_the_log_writes_and_only_then(gateway, manager, bad_disk, tmp_path):
    hang = tmp_path / "hang"
    period = 0.4
    env = manager.env(LD_PRELOAD=str(bad_disk), HANG_WHILE=str(hang), WATCHDOG_USEC=str(int(period * 1e6)))
    made = spawned(gateway, env)
    for _ in range(3):
        manager.until("WATCHDOG", 2 * period + 5)
    size = (made.data / "log.db").stat().st_size
    hang.touch()
    # What was on its way comes yet; then, with the writer in fdatasync, nothing: longer than systemd would wait.
    manager.drain()
    manager.next(period)
    deadline = time.monotonic() + 4 * period
    while (left := deadline - time.monotonic()) > 0:
        message = manager.next(left)
        assert not message or "WATCHDOG" not in message, "fed although nothing can be committed"
    # The network thread serves all the while: a ping that asked it alone would have gone on.
    with Raw(made.port, 5).open("c") as c:
        assert c.before_pong() == []
    hang.unlink()
    manager.until("WATCHDOG", 10)
    assert (made.data / "log.db").stat().st_size == size, "the proof makes the log grow"


def test_the_proof_is_seen_by_nobody(gateway, manager):
    made = spawned(gateway, manager.env(WATCHDOG_USEC="100000"), config='[broker]\nsys_interval = "0 s"\n')
    manager.until("READY")
    with Raw(made.port, 5).open("ear") as ear:
        ear.subscribe("#", "$SYS/#")
        for _ in range(5):
            manager.until("WATCHDOG")
        assert ear.before_pong() == []


def test_a_watchdog_that_is_meant_for_another_process_is_not_fed(gateway, manager):
    spawned(gateway, manager.env(WATCHDOG_USEC="100000", WATCHDOG_PID="1"))
    manager.until("READY")
    deadline = time.monotonic() + 0.5
    while (left := deadline - time.monotonic()) > 0:
        message = manager.next(left)
        assert not message or "WATCHDOG" not in message


def test_a_failing_disk_is_an_answer_and_no_reason_to_start_anew(gateway, manager, bad_disk, tmp_path):
    """Commits fail and say so: a restart would mend nothing, and cost every client its connection. The status says it."""
    fail = tmp_path / "fail"
    made = spawned(gateway, manager.env(LD_PRELOAD=str(bad_disk), FAIL_WHILE=str(fail), WATCHDOG_USEC="300000"))
    manager.until("WATCHDOG")
    fail.touch()
    while "log log has failed: cannot write" not in manager.until("STATUS")["STATUS"]:
        pass
    for _ in range(3):
        manager.until("WATCHDOG")
    assert made.alive()
    fail.unlink()
    while manager.until("STATUS")["STATUS"] != "serving; everything is good":
        pass


# ---- Sockets that systemd opened ------------------------------------------------------------------------------------

HAND_OVER = 'for fd in $FDS; do eval "exec $((n = ${n:-2} + 1))<&$fd"; done; LISTEN_PID=$$ LISTEN_FDS=$((n - 2)) exec "$0" "$@"'


def spawn_with(made, *sockets, env=None):
    """As systemd does: the sockets are descriptors 3, 4 …"""
    # High numbers, so that the shell puts none in the way of another.
    high = [fcntl.fcntl(s, fcntl.F_DUPFD, 100) for s in sockets]
    with open(made.log_path, "ab") as out:
        made.process = subprocess.Popen(
            ["bash", "-c", HAND_OVER, str(BINARY), "run", "--config", str(made.path)],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=made.folder,
            pass_fds=high,
            env={**os.environ, "FDS": " ".join(map(str, high)), **(env or {})},
        )
    for fd in high:
        os.close(fd)
    return made


def test_a_socket_from_systemd_is_listened_on_and_nobody_is_refused(gateway):
    made = gateway(start=False)
    ours = socket.create_server(("127.0.0.1", made.port))
    # Before it runs: the connection waits.
    early = Raw(made.port, 5)
    spawn_with(made, ours)
    early.open("early").publish_acked("a", "x")
    made.kill9()
    for _ in range(3):
        waiting = Raw(made.port, 5)
        spawn_with(made, ours)
        waiting.open("waiting").publish_acked("a", "x")
        made.stop()
    ours.close()


def test_a_reload_takes_a_handed_socket_out_and_in_again(gateway):
    made = gateway(start=False)
    base = made.path.read_text()
    other = free_port()
    ours = socket.create_server(("127.0.0.1", made.port))
    spawn_with(made, ours)
    with Raw(made.port, 5).open("a") as a:
        made.write_config(base.replace(f"127.0.0.1:{made.port}", f"127.0.0.1:{other}"))
        made.process.send_signal(signal.SIGHUP)
        a.expect_closed()
    eventually(lambda: listens(other), 5, "the other listener")
    # systemd holds it open: who comes meanwhile waits.
    waiting = Raw(made.port, 5)
    made.write_config(base)
    made.process.send_signal(signal.SIGHUP)
    waiting.open("waiting").publish_acked("a", "x")
    ours.close()


def test_sockets_that_nothing_here_names_are_said_and_closed(gateway, tmp_path):
    made = gateway(start=False)
    stray = socket.create_server(("127.0.0.1", 0))
    port = stray.getsockname()[1]
    datagram = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagram.bind(("127.0.0.1", 0))
    spawn_with(made, stray, datagram)
    stray.close()
    eventually(lambda: listens(made.port), 10, "its own listener")
    eventually(lambda: not listens(port), 5, "the stray one is closed")
    assert f"no [[listener]] names as its bind: it is closed at=127.0.0.1:{port}" in made.log
    assert "it is not for TCP" in made.log
    datagram.close()


def test_sockets_for_another_process_are_left_alone(gateway):
    made = gateway(start=False)
    made.start(env={"LISTEN_PID": "1", "LISTEN_FDS": "3"})
    Raw(made.port, 5).open("c").publish_acked("a", "x")


# ---- Credentials, and what is not there yet -------------------------------------------------------------------------

SECRET = '[[uplink]]\nname = "c"\nkind = "mqtt"\nurl = "mqtt://127.0.0.1:9"\nusername = "u"\npassword = { credential = "cloud.password" }\n'


def test_a_credential_of_systemd_is_a_secret(gateway, tmp_path):
    made = gateway(SECRET, start=False)
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    (credentials / "cloud.password").write_text("hunter2\n")
    made.start(env={"CREDENTIALS_DIRECTORY": str(credentials)})
    made.stop()
    assert "hunter2" not in made.log
    code, said = made.run_to_end()
    assert code == 1 and "LoadCredential=cloud.password" in said


def test_it_starts_before_there_is_a_network(gateway, manager):
    """Not even loopback is up: ready all the same, the status says why nobody can connect."""
    made = spawned(gateway, manager.env(), prefix=["unshare", "--map-root-user", "--net"], config=SECRET.replace("password =", "# password ="))
    manager.until("READY")
    made.stop()


# ---- The units ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analyze():
    assert shutil.which("systemd-analyze"), "the Debian package systemd is missing; tests/all installs it"
    return "systemd-analyze"


def exposure(analyze, unit):
    said = subprocess.run([analyze, "security", "--offline=true", "--no-pager", str(unit)], capture_output=True, text=True)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said.stdout)
    assert found, said.stdout + said.stderr
    return float(found[1])


def test_the_unit_as_shipped_is_hard(analyze):
    assert exposure(analyze, UNITS / "tidegate.service") <= 1.5


def test_the_units_have_no_mistakes(analyze, tmp_path):
    """On a copy whose program is there; with each drop-in as well."""
    folder = tmp_path / "units"
    folder.mkdir()
    for unit in UNITS.glob("tidegate.*"):
        (folder / unit.name).write_text(unit.read_text().replace("/usr/bin/tidegate", str(BINARY)))
    dropins = folder / "tidegate.service.d"
    dropins.mkdir()
    for dropin in (UNITS / "drop-ins").glob("*.conf"):
        shutil.copy(dropin, dropins)
    units = [str(folder / unit.name) for unit in UNITS.glob("tidegate.*")]
    said = subprocess.run([analyze, "verify", "--man=no", *units], capture_output=True, text=True)
    assert said.returncode == 0 and said.stderr == "", said.stderr


def test_the_reload_of_the_unit_is_a_command_that_there_is():
    text = (UNITS / "tidegate.service").read_text()
    for key in ("ExecStart", "ExecReload"):
        arguments = re.search(rf"^{key}=/usr/bin/tidegate (.*)$", text, re.M)[1].split()
        help_of = subprocess.run([str(BINARY), arguments[0], "--help"], capture_output=True, text=True)
        assert help_of.returncode == 0 and "--config" in help_of.stdout


MDWE = """
import ctypes, os, sys
# PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN: what MemoryDenyWriteExecute= refuses, by the kernel itself.
libc = ctypes.CDLL(None, use_errno=True)
if libc.prctl(65, 1, 0, 0, 0) != 0:
    sys.exit(f"the kernel has no MDWE: {os.strerror(ctypes.get_errno())}")
os.execv(sys.argv[1], sys.argv[1:])
"""


def has_mdwe():
    """Asked in a child: it cannot be taken back."""
    return subprocess.run([sys.executable, "-c", MDWE, "/bin/true"], capture_output=True).returncode == 0


def test_modules_run_where_memory_is_never_writable_and_executable(gateway, client):
    """The unit says MemoryDenyWriteExecute=; the compiling child is under it as well."""
    made = gateway(start=False)
    assert has_mdwe(), "this kernel has no MDWE (6.3 and later have it): nothing to test with"
    prefix = [sys.executable, "-c", MDWE]
    shutil.copy(GUESTS / "average.wasm", made.modules)
    made.start(prefix=prefix)
    made.wait_for_module("average")
    maps = open(f"/proc/{made.pid}/maps").read()
    code = [line for line in maps.splitlines() if ".cwasm" in line]
    assert code and all(line.split()[1] == "r-xp" for line in code), maps


def test_machine_code_of_a_module_that_is_gone_is_unmapped(gateway):
    made = gateway(start=False)
    shutil.copy(GUESTS / "echo.wasm", made.modules)
    made.start()
    made.wait_for_module("echo")

    def mapped():
        return open(f"/proc/{made.pid}/maps").read().count(".cwasm")

    assert mapped() == 1
    for name in ("passthrough", "echo", "passthrough", "echo"):
        made.drop_module(GUESTS / f"{name}.wasm", "echo")
        eventually(lambda: name in made.part("module", "echo")["text"], 20, f"{name} runs", 0.05)
        eventually(lambda: mapped() == 1, 10, "the old one's code is gone")
    made.remove_module("echo")
    eventually(lambda: mapped() == 0, 10, "no code without a module")


def test_an_idle_gateway_writes_nothing_of_itself(gateway, upstream):
    """A commit woke the readers, whose saying where they stand made the next one: a commit a second, for ever."""
    uplink = f'[[uplink]]\nname = "c"\nkind = "mqtt"\nurl = "mqtt://127.0.0.1:{upstream.port}"\n[[route]]\nfrom = ["#"]\nto = "c"\n'
    made = gateway(uplink)
    Raw(made.port, 5).open("c").publish_acked("a", "x")

    def commits():
        return made.part("log", "log")["counters"]["commits"]

    def none_in_three_seconds():
        before = commits()
        time.sleep(3)
        return commits() == before

    eventually(none_in_three_seconds, 20, "three seconds without a commit")
