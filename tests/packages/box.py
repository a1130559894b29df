"""A clean Debian with systemd as process 1, in namespaces of its own on this machine: what a box is that tidegate is installed on.

Needs root, util-linux and a root file system made by mmdebstrap (`tests/packages/run` makes it). Nothing of it reaches the
host: mounts, processes, network, host name and control groups are its own. Ended by killing its process 1.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from support import REPOSITORY, eventually  # noqa: E402

# What is set up before systemd starts; $1 is the root. `make-rshared`: without it LoadCredential= leaves an empty folder;
# ptmx: without it PrivateDevices= fails.
BOOT = r"""
set -eu
R=$1
mount --bind "$R" "$R"
cd "$R"
mount -t proc proc proc
for d in run tmp dev; do mount -t tmpfs tmpfs $d; done
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mkdir dev/pts dev/shm
mount -t devpts -o newinstance,ptmxmode=0666 devpts dev/pts
for n in null:1:3 zero:1:5 full:1:7 random:1:8 urandom:1:9 tty:5:0; do
    IFS=: read -r name major minor <<< "$n"
    mknod -m 666 "dev/$name" c "$major" "$minor"
done
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ip link set lo up
mkdir -p .old
pivot_root . .old
umount -l .old
mount --make-rshared /
exec env -i container=tidegate-test PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 /lib/systemd/systemd
"""


class Box:
    def __init__(self, folder, base):
        """`base`: the tar of a Debian root."""
        self.root = Path(folder)
        self.root.mkdir(parents=True)
        subprocess.run(["tar", "-xf", str(base), "-C", str(self.root)], check=True)
        self.outer = self.init = None

    def start(self):
        log = open(self.root.parent / "boot.log", "ab")
        self.outer = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL", "--uts", "--ipc", "--net", "--cgroup"]
            + ["--propagation", "private", "bash", "-c", BOOT, "boot", str(self.root)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        # Its process 1 is the one child of `unshare`.
        children = Path(f"/proc/{self.outer.pid}/task/{self.outer.pid}/children")
        self.init = int(eventually(lambda: children.read_text().split(), 10, "process 1 of the box")[0])

        def running():
            said = self.run("systemctl is-system-running", check=False)
            return said.strip() in ("running", "degraded") or None

        eventually(running, 60, lambda: f"systemd runs: {self.run('systemctl is-system-running; systemctl list-jobs', check=False)}", 0.1)
        return self

    def end(self):
        if self.init is not None:
            os.kill(self.init, signal.SIGKILL)
            self.outer.wait(30)
            self.init = None
        shutil.rmtree(self.root, ignore_errors=True)

    def run(self, command, check=True, timeout=180, both=True):
        """A shell command inside; what it printed."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.init), "-m", "-p", "-u", "-i", "-n", "-C", "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
            + ["LANG=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if both else subprocess.PIPE,
            timeout=timeout,
        )
        text = done.stdout.decode(errors="replace")
        assert not check or done.returncode == 0, f"{command!r} ended with {done.returncode}:\n{text[-4000:]}\n{self.journal()}"
        return text

    def journal(self):
        return self.run("journalctl -u tidegate.service -u tidegate.socket --no-pager -n 40 -o cat", check=False)

    def spawn_host(self, arguments, **options):
        """A program of the host in the box's network: a client."""
        return subprocess.Popen(["nsenter", "-t", str(self.init), "-n", *map(str, arguments)], **options)

    def run_host(self, *arguments, timeout=60):
        done = subprocess.run(
            ["nsenter", "-t", str(self.init), "-n", *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
        return done.returncode, done.stdout.decode(errors="replace")

    # -- what the tests ask ---------------------------------------------------------------------------------------------

    def show(self, unit, key):
        return self.run(f"systemctl show {unit} -p {key} --value").strip()

    def main_pid(self):
        """As the box counts; 0 where it does not run."""
        return int(self.show("tidegate.service", "MainPID"))

    def active(self, unit="tidegate.service"):
        return self.show(unit, "ActiveState") == "active"

    def status(self):
        report = json.loads(self.run("tidegate status --json --config /etc/tidegate/gateway.toml", both=False))
        return {(part["kind"], part["name"]): part for part in report["parts"]}

    def path(self, inside):
        return self.root / inside.lstrip("/")


class Repository:
    """A signed apt repository of packages, by packaging/repository, and versions of a package that differ in their number."""

    def __init__(self, folder, deb):
        self.folder = Path(folder)
        self.pool = self.folder / "pool"
        self.pool.mkdir(parents=True)
        self.deb = Path(deb)
        # One key for all versions: the box is told of it once.
        self.gnupg = self.folder.parent / "gnupg"
        self.gnupg.mkdir(mode=0o700)
        self.key = "tests of tidegate"
        command = ["gpg", "--quiet", "--batch", "--passphrase", "", "--quick-generate-key", self.key, "ed25519", "sign", "never"]
        subprocess.run(command, check=True, env=self.env(), capture_output=True)

    def env(self):
        return {**os.environ, "GNUPGHOME": str(self.gnupg)}

    def publish(self, version):
        """The package again under another version; the only one in the repository."""
        unpacked = self.folder.parent / "unpacked"
        shutil.rmtree(unpacked, ignore_errors=True)
        subprocess.run(["dpkg-deb", "-R", self.deb, unpacked], check=True)
        control = unpacked / "DEBIAN/control"
        lines = [f"Version: {version}" if line.startswith("Version:") else line for line in control.read_text().splitlines()]
        control.write_text("\n".join(lines) + "\n")
        for old in self.pool.glob("*.deb"):
            old.unlink()
        to = self.pool / f"tidegate_{version}_amd64.deb"
        subprocess.run(["dpkg-deb", "-Znone", "--root-owner-group", "-b", unpacked, to], check=True, stdout=subprocess.DEVNULL)
        command = [REPOSITORY / "packaging/repository", self.folder, self.key]
        subprocess.run(command, check=True, env=self.env(), capture_output=True)

    def end(self):
        subprocess.run(["gpgconf", "--kill", "all"], env=self.env(), check=False)


def since(began):
    return time.monotonic() - began
