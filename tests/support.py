"""What the tests drive: the gateway's binary, Debian's mosquitto as its upstream, and stock clients.

Everything runs on loopback in the test's own folder. Nothing waits by sleeping alone: `eventually` polls for the event and
fails with a reason at its deadline.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import paho.mqtt.client as paho
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

REPOSITORY = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))
BINARY = Path(os.environ.get("TIDEGATE_BIN", TARGET / "release/tidegate")).resolve()
# What modules/build leaves: core modules as cargo made them; the gateway makes components of them itself.
GUESTS = REPOSITORY / "modules/target/wasm32-unknown-unknown/release"

V3, V5 = paho.MQTTv311, paho.MQTTv5


def eventually(condition, timeout=10.0, what="the condition", interval=0.01):
    """Polls until `condition()` is true and returns its value. An AssertionError inside it counts as "not yet"."""
    deadline = time.monotonic() + timeout
    while True:
        last = None
        try:
            value = condition()
            if value:
                return value
        except AssertionError as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s: {what() if callable(what) else what}") from last
        time.sleep(interval)


_ports = set()


def free_port():
    """Below the range from which the kernel takes ports of outgoing connections: a client that retries a port nobody
    listens on must not end up connected to itself, nor take the port of a broker that is just restarting."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        if port in _ports:
            continue
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        _ports.add(port)
        return port


def listens(port):
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    except OSError:
        return False


def new_seed(request_name=""):
    """A seed to print; TIDEGATE_SEED repeats a run."""
    seed = int(os.environ.get("TIDEGATE_SEED", random.SystemRandom().randrange(1 << 32)))
    print(f"seed {seed} {request_name}".rstrip())
    return seed


class Gateway:
    """The binary under test, in a folder of its own: gateway.toml, data/, modules.d/, log.txt."""

    def __init__(self, folder, config="", name="line-4", port=None, head=True, listener=""):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        self.data = self.folder / "data"
        self.modules = self.folder / "modules.d"
        self.modules.mkdir(exist_ok=True)
        self.path = self.folder / "gateway.toml"
        self.log_path = self.folder / "log.txt"
        self.process = None
        self.kills = 0
        self.starts = 0
        top = f'[gateway]\nname = "{name}"\ndata_dir = "data"\n\n[[listener]]\nbind = "127.0.0.1:{self.port}"\n{listener}\n'
        top += '\n[modules]\ndir = "modules.d"\n\n'
        self.write_config((top if head else "") + config)

    def write_config(self, text):
        self.path.write_text(text)

    @property
    def log(self):
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    @property
    def pid(self):
        return self.process.pid

    def spawn(self, prefix=(), env=None):
        """Starts it and waits for nothing."""
        assert self.process is None, "it runs already"
        if not BINARY.exists():
            raise AssertionError(f"{BINARY} is not there: cargo build --release, or set TIDEGATE_BIN")
        with open(self.log_path, "ab") as out:
            self.process = subprocess.Popen(
                [*prefix, str(BINARY), "run", "--config", str(self.path)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env={**os.environ, **(env or {})},
            )
        self.starts += 1
        return self

    def start(self, timeout=15.0, **options):
        """Starts it; returns when its listener takes a connection. `ready_s` is how long that took."""
        began = time.monotonic()
        self.spawn(**options)

        def ready():
            if self.process.poll() is not None:
                raise RuntimeError(f"the gateway ended with {self.process.returncode} while starting:\n{self.log[-4000:]}")
            return listens(self.port)

        eventually(ready, timeout, lambda: f"the gateway listens on {self.port}; it says:\n{self.log[-4000:]}", 0.002)
        self.ready_s = time.monotonic() - began
        return self

    def run_to_end(self, timeout=10.0, arguments=None):
        """For starts that must fail: (exit code, what it said)."""
        done = subprocess.run(
            [str(BINARY), *(arguments or ["run", "--config", str(self.path)])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            timeout=timeout,
        )
        return done.returncode, done.stdout.decode(errors="replace")

    def stop(self, sig=signal.SIGTERM, timeout=5.0):
        """In order: exit code 0 within the time. Returns how long it took."""
        process, self.process = self.process, None
        began = time.monotonic()
        process.send_signal(sig)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise AssertionError(f"it did not stop within {timeout} s of {sig!r}:\n{self.log[-3000:]}") from None
        assert code == 0, f"exit code {code} after {sig!r}:\n{self.log[-3000:]}"
        return time.monotonic() - began

    def kill9(self):
        process, self.process = self.process, None
        assert process.poll() is None, f"it ended by itself with {process.returncode}:\n{self.log[-3000:]}"
        process.kill()
        process.wait()
        self.kills += 1

    def restart(self):
        self.stop()
        return self.start()

    def alive(self):
        return self.process is not None and self.process.poll() is None

    def end(self):
        """For the fixture: whatever happened, nothing stays behind."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def memory_kb(self, what="VmRSS"):
        """VmRSS now, or VmHWM, the most that this process ever had."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(what + ":"):
                return int(line.split()[1])
        raise AssertionError(f"/proc says nothing of {what}")

    def cpu_s(self):
        """User and system time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def status(self):
        """{(kind, name): part} as `tidegate status --json` says."""
        done = subprocess.run(
            [str(BINARY), "status", "--json", "--config", str(self.path)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=10,
        )
        assert done.returncode == 0, f"tidegate status: {done.stderr.decode(errors='replace')}"
        return {(part["kind"], part["name"]): part for part in json.loads(done.stdout)["parts"]}

    def status_all(self):
        """Everything that `tidegate status --json` says."""
        done = subprocess.run([str(BINARY), "status", "--json", "--config", str(self.path)], stdin=subprocess.DEVNULL, capture_output=True, timeout=10)
        assert done.returncode == 0, f"tidegate status: {done.stderr.decode(errors='replace')}"
        return json.loads(done.stdout)

    def part(self, kind, name):
        parts = self.status()
        assert (kind, name) in parts, f"no part {kind} {name} among {sorted(parts)}"
        return parts[kind, name]

    def drop_module(self, wasm, name=None):
        """Puts a module into the folder in one step, as `mv` does."""
        name = name or Path(wasm).stem
        aside = self.modules / f".{name}.part"
        shutil.copyfile(wasm, aside)
        os.replace(aside, self.modules / f"{name}.wasm")

    def remove_module(self, name):
        (self.modules / f"{name}.wasm").unlink()

    def wait_for_module(self, name, health="good", timeout=20.0):
        def as_wanted():
            part = self.status().get(("module", name))
            return part if part and part["health"] == health else None

        return eventually(as_wanted, timeout, lambda: f"module {name} is {health}; status {self.status()}", 0.05)


def mqtt_uplink(port, name="cloud", version="5", extra="", route_from='["#"]', topic="plants/{gateway}/{topic}"):
    """An [[uplink]] of kind mqtt and its route up."""
    return (
        f'[[uplink]]\nname = "{name}"\nkind = "mqtt"\nurl = "mqtt://127.0.0.1:{port}"\nversion = "{version}"\n{extra}\n\n'
        f'[[route]]\nfrom = {route_from}\nto = "{name}"\ntopic = "{topic}"\n\n'
    )


class Mosquitto:
    """Debian's mosquitto, its store in `folder`; a restart keeps port and store. Stop it with SIGTERM: killed with -9 it
    forgets what it acknowledged."""

    def __init__(self, folder, config="", port=None):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        self.process = None
        self.path = self.folder / "mosquitto.conf"
        user = "user root\n" if os.getuid() == 0 else ""
        self.path.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\n{user}"
            f"persistence true\npersistence_location {self.folder}/\nautosave_interval 0\n"
            "max_queued_messages 0\nmax_queued_bytes 0\nset_tcp_nodelay true\n" + config
        )

    def start(self):
        assert self.process is None
        binary = shutil.which("mosquitto") or "/usr/sbin/mosquitto"
        with open(self.folder / "mosquitto.log", "ab") as out:
            self.process = subprocess.Popen([binary, "-c", str(self.path)], stdout=out, stderr=out, cwd=self.folder)

        def ready():
            assert_running = self.process.poll()
            if assert_running is not None:
                raise RuntimeError("mosquitto ended: " + (self.folder / "mosquitto.log").read_text()[-2000:])
            return listens(self.port)

        eventually(ready, 10, "mosquitto listens", 0.005)
        return self

    def stop(self):
        process, self.process = self.process, None
        process.terminate()
        process.wait(20)

    def end(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def _properties(kind, values):
    props = Properties(kind)
    for name, value in (values or {}).items():
        setattr(props, name, value)
    return props


class Client:
    """A paho client in its own thread that keeps what it gets. `connect` returns when CONNACK came."""

    def __init__(self, port, client_id="", version=V3, clean=True, keep_alive=60, session_expiry=0, will=None, user=None, password=None):
        self.port, self.version, self.clean, self.keep_alive = port, version, clean, keep_alive
        self.session_expiry = session_expiry
        self.messages = []
        self.acked = {}
        self.granted = {}
        self.connected = threading.Event()
        self.connack = None
        self.session_present = None
        self.disconnects = 0
        options = {} if version == V5 else {"clean_session": clean}
        self.paho = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=version, **options)
        self.paho.reconnect_delay_set(0.05, 0.2)
        self.paho.on_connect = self._on_connect
        self.paho.on_disconnect = self._on_disconnect
        self.paho.on_message = lambda _c, _u, message: self.messages.append(message)
        self.paho.on_publish = lambda _c, _u, mid, code, _p: self.acked.__setitem__(mid, code)
        self.paho.on_subscribe = lambda _c, _u, mid, codes, _p: self.granted.__setitem__(mid, codes)
        self.paho.on_unsubscribe = lambda _c, _u, mid, codes, _p: self.granted.__setitem__(mid, codes)
        if will:
            self.paho.will_set(*will)
        if user is not None:
            self.paho.username_pw_set(user, password)

    def _on_connect(self, _client, _user, flags, code, _properties):
        self.connack, self.session_present = code, flags.session_present
        self.connected.set()

    def _on_disconnect(self, *_):
        self.connected.clear()
        self.disconnects += 1

    def connect(self, timeout=10):
        options = {}
        if self.version == V5:
            options["clean_start"] = self.clean
            if self.session_expiry:
                options["properties"] = _properties(PacketTypes.CONNECT, {"SessionExpiryInterval": self.session_expiry})
        self.paho.connect("127.0.0.1", self.port, self.keep_alive, **options)
        self.paho.loop_start()
        assert self.connected.wait(timeout), f"no CONNACK within {timeout} s"
        return self

    def subscribe(self, topic_filter, qos=1, **options):
        if self.version == V5 and options:
            code, mid = self.paho.subscribe(topic_filter, options=SubscribeOptions(qos=qos, **options))
        else:
            code, mid = self.paho.subscribe(topic_filter, qos)
        assert code == paho.MQTT_ERR_SUCCESS
        eventually(lambda: mid in self.granted, 10, "SUBACK")
        return [c.value for c in self.granted[mid]]

    def publish(self, topic, payload, qos=1, retain=False, properties=None, wait=True):
        props = _properties(PacketTypes.PUBLISH, properties) if properties else None
        info = self.paho.publish(topic, payload, qos, retain, props)
        if wait:
            eventually(lambda: info.mid in self.acked, 10, f"acknowledgement of {payload[:20]!r}")
            return self.acked[info.mid].value if self.version == V5 else 0
        return info.mid

    def wait_for(self, count, timeout=10):
        eventually(lambda: len(self.messages) >= count, timeout, lambda: f"{count} messages, {len(self.messages)} are there")
        return self.messages[:count]

    def payloads(self):
        return [m.payload for m in self.messages]

    def disconnect(self):
        self.paho.disconnect()
        self.paho.loop_stop()

    def vanish(self):
        """Without a DISCONNECT, for good."""
        self.paho.loop_stop()
        sock = self.paho.socket()
        if sock:
            sock.close()

    def end(self):
        self.paho.loop_stop()


class Recorder(Client):
    """Stands for the application behind the upstream broker: a persistent session that comes back after every cut. Keeps
    (topic, payload) in order of arrival."""

    def __init__(self, port, topic_filter="#", version=V5, client_id="recorder"):
        super().__init__(port, client_id, version, clean=False, session_expiry=0xFFFFFFFF)
        self.topic_filter = topic_filter
        self.arrivals = []
        self.seen = set()
        self.first_at = self.last_at = None
        self.paho.on_message = self._on_message

    def _on_message(self, _client, _user, message):
        now = time.monotonic()
        self.first_at = self.first_at or now
        self.last_at = now
        arrival = (message.topic, bytes(message.payload))
        self.arrivals.append(arrival)
        self.seen.add(arrival)

    def start(self):
        self.connect()
        self.subscribe(self.topic_filter)
        return self

    def first_arrivals(self):
        """{topic: payloads in order of their first arrival}"""
        out, seen = {}, set()
        for arrival in self.arrivals:
            if arrival not in seen:
                seen.add(arrival)
                out.setdefault(arrival[0], []).append(arrival[1])
        return out

    @property
    def duplicates(self):
        return len(self.arrivals) - len(self.seen)


def numbered(n, size=0):
    """The payload of message n: the number, padded to `size` bytes."""
    head = b"%d" % n
    return head if size <= len(head) + 1 else head + b" " + b"x" * (size - len(head) - 1)


def number(payload):
    return int(payload.split(b" ")[0])


class PahoPublisher:
    """Publishes 0 … count-1 at QoS 1 with paho, `window` outstanding, over any number of cuts; `acked` holds the numbers
    that were acknowledged, in that order.

    It publishes only from paho's network thread, after an acknowledgement: publish() from another thread may slip in
    between a new connection and the resending of what is open, and the order would be broken by the client."""

    def __init__(self, port, client_id, topic, count, version=V3, window=20, size=64):
        self.topic, self.count, self.window, self.size = topic, count, window, size
        self.version = version
        self.acked = []
        self.refused = []
        self.next = 0
        self.mids = {}
        self.reconnects = -1
        options = {} if version == V5 else {"clean_session": True}
        self.paho = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=version, **options)
        # The window is kept here; paho's own would hold messages back in a second queue, and resend it in a second order.
        self.paho.max_inflight_messages_set(0)
        self.paho.reconnect_delay_set(0.02, 0.1)
        self.paho.on_connect = self._on_connect
        self.paho.on_publish = self._on_publish
        self.port = port

    def start(self):
        self.paho.connect_async("127.0.0.1", self.port, 60)
        self.paho.loop_start()
        return self

    def _on_connect(self, _client, _user, _flags, code, _properties):
        if code.is_failure:
            return
        self.reconnects += 1
        if not self.mids:
            self._fill()

    def _fill(self):
        while len(self.mids) < self.window and self.next < self.count:
            n, self.next = self.next, self.next + 1
            info = self.paho.publish(self.topic, numbered(n, self.size), 1)
            self.mids[info.mid] = n

    def _on_publish(self, _client, _user, mid, code, _properties):
        n = self.mids.pop(mid)
        if code.is_failure:
            self.refused.append(n)
        else:
            self.acked.append(n)
        self._fill()

    @property
    def done(self):
        return len(self.acked) + len(self.refused) >= self.count

    def end(self):
        self.paho.disconnect()
        self.paho.loop_stop()


class MosquittoPub:
    """The same with mosquitto_pub -l, batch by batch; what was acknowledged is read from its debug output. A batch that a
    cut ends is taken up after the last acknowledged line."""

    def __init__(self, port, client_id, topic, count, version="311", batch=500, size=64):
        self.port, self.client_id, self.topic, self.count = port, client_id, topic, count
        self.version, self.batch, self.size = version, batch, size
        self.acked = []
        self.refused = []
        self.runs = 0
        self.failure = None
        self._stop = False
        self._process = None
        self._thread = threading.Thread(target=self._run, name=client_id, daemon=True)

    def start(self):
        self._thread.start()
        return self

    def _run(self):
        try:
            while len(self.acked) < self.count and not self._stop:
                self._one_batch()
        except Exception as error:  # shown by the test
            self.failure = error

    def _one_batch(self):
        first = len(self.acked)
        lines = [numbered(n, self.size) for n in range(first, min(first + self.batch, self.count))]
        command = ["mosquitto_pub", "-h", "127.0.0.1", "-p", str(self.port), "-V", self.version, "-i", self.client_id]
        command += ["-t", self.topic, "-q", "1", "-l", "-d"]
        # As a script would that is started by a timer: not in a busy loop while nobody listens.
        eventually(lambda: self._stop or listens(self.port), 60, "the gateway listens")
        self.runs += 1
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )
        # Its lines come block-wise through a pipe, all at the latest when it ends.
        # A batch fits into the pipe; one that found nobody listening has ended already.
        try:
            self._process.stdin.write(b"\n".join(lines) + b"\n")
            self._process.stdin.close()
        except BrokenPipeError:
            pass
        expected = 1
        guard = threading.Timer(20, self._process.kill)
        guard.start()
        try:
            for line in self._process.stdout:
                # "Client ID received PUBACK (Mid: 7, RC:0)"
                if b"received PUBACK" not in line:
                    continue
                mid = int(line.split(b"Mid: ")[1].split(b",")[0])
                code = int(line.split(b"RC:")[1].split(b")")[0])
                assert code < 0x80, f"refused: {line!r}"
                # The same id is never acknowledged twice, nor before an earlier one.
                assert mid == expected, f"PUBACK {mid} where {expected} was due"
                expected += 1
                self.acked.append(first + mid - 1)
        finally:
            guard.cancel()
            self._process.wait()

    @property
    def done(self):
        if self.failure:
            raise self.failure
        return len(self.acked) >= self.count

    def end(self):
        self._stop = True
        if self._process and self._process.poll() is None:
            self._process.kill()
        self._thread.join(10)
