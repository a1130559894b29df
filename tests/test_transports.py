"""The ways in: TLS with and without client certificates, WebSocket, Unix sockets, the PROXY protocol. Stock clients over each;
what is refused and how it is said; handshakes that stall; certificates that are renewed under connected clients.
"""

import base64
import json
import os
import random
import resource
import shutil
import socket
import ssl
import stat
import struct
import subprocess
import threading
from pathlib import Path

import paho.mqtt.client as paho
import pytest

from certificates import Authority
from rawmqtt import CONNACK, Closed, Raw, connect, packet, publish, subscribe
from support import BINARY, REPOSITORY, TARGET, V3, V5, eventually, free_port, listens
from test_access import hashed
from test_reload import change

USERS = '[[user]]\nname = "press-7"\npublish = ["sensors/press-7/#"]\nsubscribe = ["#"]\n\n'


@pytest.fixture(scope="session")
def authority(tmp_path_factory):
    """An authority with a server's certificate, one of a client press-7, and others that are no good."""
    made = Authority(tmp_path_factory.mktemp("certificates"))
    made.server()
    made.issue("press-7", "press-7", dns=["press-7.example", "second.example"], uris=["urn:plant:press-7"])
    made.issue("nobody", "nobody")
    made.issue("nameless", "", dns=["other.example"])
    made.issue("expired", "press-7", days=(-30, -1))
    made.issue("early", "press-7", days=(10, 30))
    Authority(made.folder / "other", "other").issue("press-7", "press-7")
    return made


def listener(port, more="", tls=None, bind=None):
    text = f'[[listener]]\nbind = "{bind or f"127.0.0.1:{port}"}"\n{more}\n'
    return text + (f"tls = {{ {tls} }}\n\n" if tls else "\n")


def up(broker, *ports):
    """The listeners are opened one after the other."""
    for port in ports:
        eventually(lambda: listens(port), 10, lambda: f"{port} listens: {broker.log[-2000:]}")
    return broker


def server_tls(authority, more="", folder=None, file="server"):
    folder = folder or authority.folder
    return f'cert = "{folder}/{file}.pem", key = "{folder}/{file}.key"' + (f", {more}" if more else "")


def asking(authority, more=""):
    return server_tls(authority, f'client_ca = "{authority.path}"' + (f", {more}" if more else ""))


def client_context(authority, cert=None, folder=None, version=None, trust=None):
    context = ssl.create_default_context(cafile=str(trust or authority.path))
    if cert:
        folder = folder or authority.folder
        context.load_cert_chain(folder / f"{cert}.pem", folder / f"{cert}.key")
    if version:
        context.minimum_version = context.maximum_version = version
    return context


class Over(Raw):
    """Raw MQTT over TLS."""

    def __init__(self, port, context, version=4):
        super().__init__(port, version)
        self.socket = context.wrap_socket(self.socket, server_hostname="localhost")


class WebSocket:
    """By hand, so that a test decides where a frame ends."""

    def __init__(self, port, path="/mqtt", protocol="mqtt", headers="", host="127.0.0.1", timeout=10, context=None):
        self.socket = socket.create_connection((host, port), timeout)
        if context:
            self.socket = context.wrap_socket(self.socket, server_hostname="localhost")
        key = base64.b64encode(os.urandom(16)).decode()
        offered = f"Sec-WebSocket-Protocol: {protocol}\r\n" if protocol else ""
        self.socket.sendall(
            f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n{offered}{headers}\r\n".encode()
        )
        self.rest = b""
        while b"\r\n\r\n" not in self.rest:
            more = self.socket.recv(4096)
            assert more, f"closed instead of an answer: {self.rest}"
            self.rest += more
        self.answer, self.rest = self.rest.split(b"\r\n\r\n", 1)
        self.answer = self.answer.decode()
        self.status = int(self.answer.split()[1])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    @staticmethod
    def frame(opcode, content, last=True, mask=True, announce=None):
        length = announce if announce is not None else len(content)
        head = bytes([(0x80 if last else 0) | opcode])
        bit = 0x80 if mask else 0
        if length < 126:
            head += bytes([bit | length])
        elif length < 65536:
            head += bytes([bit | 126]) + struct.pack(">H", length)
        else:
            head += bytes([bit | 127]) + struct.pack(">Q", length)
        if not mask:
            return head + content
        key = os.urandom(4)
        return head + key + bytes(b ^ key[i % 4] for i, b in enumerate(content))

    def send(self, *frames):
        self.socket.sendall(b"".join(frames))

    def _exactly(self, n):
        while len(self.rest) < n:
            more = self.socket.recv(65536)
            if not more:
                raise Closed()
            self.rest += more
        out, self.rest = self.rest[:n], self.rest[n:]
        return out

    def receive(self):
        """(opcode, content) of the next frame."""
        first, second = self._exactly(2)
        assert first & 0x80 and not second & 0x80, "a server's frame is whole and unmasked"
        length = second
        if length == 126:
            (length,) = struct.unpack(">H", self._exactly(2))
        elif length == 127:
            (length,) = struct.unpack(">Q", self._exactly(8))
        return first & 0x0F, self._exactly(length)

    def open(self, client_id, version=4):
        self.send(self.frame(2, connect(version, client_id)))
        opcode, content = self.receive()
        assert opcode == 2 and content[0] == CONNACK << 4 and content[3] == 0, content
        return self


# -- Stock clients -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everywhere(authority, tmp_path_factory):
    """One gateway with a listener of each sort; `ports[tls, websocket]`, and `unix`."""
    from support import Gateway

    ports = {(tls, web): free_port() for tls in (False, True) for web in (False, True)}
    folder = tmp_path_factory.mktemp("everywhere")
    config = "".join(
        listener(port, "websocket = true" if web else "", asking(authority) if tls else None)
        for (tls, web), port in ports.items()
        if tls or web
    )
    unix = folder / "mqtt.sock"
    config += listener(0, bind=f"unix:{unix}")
    made = Gateway(folder / "gateway", config, port=ports[False, False])
    made.ports, made.unix = ports, unix
    yield up(made.start(), *ports.values())
    made.end()


def mosquitto(command, *arguments, **options):
    return subprocess.Popen([command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


@pytest.mark.parametrize("way", ["tlsv1.2", "tlsv1.3", "unix"])
@pytest.mark.parametrize("version", ["mqttv311", "mqttv5"])
def test_mosquittos_clients(everywhere, authority, way, version):
    if way == "unix":
        at = ["--unix", everywhere.unix]
    else:
        folder = authority.folder
        at = ["-h", "localhost", "-p", everywhere.ports[True, False], "--cafile", authority.path, "--tls-version", way]
        at += ["--cert", folder / "press-7.pem", "--key", folder / "press-7.key"]
    topic = f"m/{way}/{version}"
    ear = mosquitto("mosquitto_sub", *at, "-V", version, "-q", 2, "-t", topic, "-C", 3, "-W", 20)
    try:
        # Retained, so that it does not matter who is first.
        for qos in (0, 1, 2):
            done = subprocess.run(
                ["mosquitto_pub", *map(str, at), "-V", version, "-q", str(qos), "-t", topic, "-m", f"q{qos}", "--repeat", "1"],
                capture_output=True,
                timeout=20,
            )
            assert done.returncode == 0, done.stderr
            if qos == 0:
                eventually(lambda: everywhere.part("broker", "broker")["counters"]["subscriptions"] > 0, 10, "SUBSCRIBE")
        # One that went by before the subscription is sent again.
        for _ in range(3):
            if ear.poll() is None:
                subprocess.run(["mosquitto_pub", *map(str, at), "-V", version, "-q", "1", "-t", topic, "-m", "again"], timeout=20)
        out, _ = ear.communicate(timeout=30)
        assert ear.returncode == 0 and b"q2" in out, out
    finally:
        ear.kill()
        ear.wait()


@pytest.mark.parametrize("version", [V3, V5])
@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("web", [False, True])
def test_paho(everywhere, authority, version, tls, web):
    got, granted, up = [], threading.Event(), threading.Event()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=version, transport="websockets" if web else "tcp")
    if web:
        client.ws_set_options(path="/mqtt")
    if tls:
        client.tls_set_context(client_context(authority, "press-7"))
    client.on_connect = lambda *_: up.set()
    client.on_subscribe = lambda *_: granted.set()
    client.on_message = lambda _c, _u, m: got.append(bytes(m.payload))
    client.connect("localhost", everywhere.ports[tls, web])
    client.loop_start()
    try:
        assert up.wait(10)
        topic = f"paho/{version}/{tls}/{web}"
        client.subscribe(topic, 2)
        assert granted.wait(10)
        sent = [b"", b"x", b"y" * 4095, b"z" * 300_000, b"end"]
        for i, payload in enumerate(sent):
            client.publish(topic, payload, i % 3).wait_for_publish(10)
        eventually(lambda: sorted(got) == sorted(sent), 10, lambda: [len(g) for g in got])
    finally:
        client.disconnect()
        client.loop_stop()


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("scheme", ["mqtt", "mqtts", "ws", "wss"])
def test_mqtt_js(everywhere, authority, version, scheme):
    module = TARGET / "mqttjs/node_modules/mqtt"
    assert module.exists() or "MQTTJS" in os.environ, "tests/all installs mqtt.js"
    tls, web = scheme in ("mqtts", "wss"), scheme in ("ws", "wss")
    url = f"{scheme}://localhost:{everywhere.ports[tls, web]}" + ("/mqtt" if web else "")
    files = [authority.path, authority.folder / "press-7.pem", authority.folder / "press-7.key"] if tls else []
    env = {"MQTTJS": str(module), **os.environ}
    command = ["node", REPOSITORY / "tests/mqttjs.js", url, version, *files]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=40, env=env)
    assert done.stdout == "ok\n", done.stderr


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize("scheme", ["mqtt", "mqtts", "ws", "wss"])
def test_rumqttc(everywhere, authority, version, scheme):
    program = TARGET / "rumqttc/release/rumqttc-peer"
    assert program.exists(), "tests/all builds tests/rumqttc"
    tls, web = scheme in ("mqtts", "wss"), scheme in ("ws", "wss")
    files = [authority.path, authority.folder / "press-7.pem", authority.folder / "press-7.key"] if tls else []
    command = [program, scheme, everywhere.ports[tls, web], version, *files]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=40)
    assert done.stdout == "ok\n", done.stderr


# -- Certificates ------------------------------------------------------------------------------------------------------


@pytest.fixture
def secure(gateway, authority):
    """secure(tls, more): a gateway whose second listener is one with TLS; its port is `tls_port`."""

    def make(tls, more="", config="", **options):
        port = free_port()
        made = gateway(listener(port, more, tls) + config, **options)
        made.tls_port = port
        return made if options else up(made, port)

    return make


def refused_by(port, context, version=4):
    """How a client sees it that its certificate is not taken: the handshake, or the first read, fails."""
    with pytest.raises((ssl.SSLError, ConnectionError, Closed)):
        with Over(port, context, version) as raw:
            raw.send(connect(version, "x"))
            assert raw.expect(CONNACK).code != 0
            raise Closed()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize(
    "cert,folder,says",
    [
        (None, "", "no client certificate"),
        ("press-7", "other", "not accepted"),
        ("expired", "", "expired"),
        ("early", "", "not valid yet"),
        ("server", "", "not accepted"),
    ],
)
def test_a_client_certificate_that_is_no_good(secure, authority, version, cert, folder, says):
    broker = secure(asking(authority, 'client_identity = "cn"'), config=USERS)
    refused_by(broker.tls_port, client_context(authority, cert, authority.folder / folder, version))
    eventually(lambda: says in broker.log, 5, lambda: broker.log[-2000:])
    with Over(broker.tls_port, client_context(authority, "press-7", version=version)) as raw:
        raw.open("good")


@pytest.mark.parametrize(
    "identity,user",
    [("cn", "press-7"), ("san-dns", "press-7.example"), ("san-uri", "urn:plant:press-7")],
)
@pytest.mark.parametrize("version", [4, 5])
def test_the_certificate_says_who_it_is(secure, authority, identity, user, version):
    """Without a password; a user name in CONNECT changes nothing. Rights are those of the [[user]]."""
    users = USERS.replace('"press-7"', f'"{user}"', 1)
    broker = secure(asking(authority, f'client_identity = "{identity}"'), config=users)
    for name in (None, "somebody"):
        with Over(broker.tls_port, client_context(authority, "press-7"), version) as raw:
            raw.open("device", user=name, password="x" if name else None)
            if version == 5:
                assert raw.publish_acked("sensors/press-7/x", b"1") in (0x00, 0x10)
                assert raw.publish_acked("sensors/other/x", b"1") == 0x87
    # Its session is not anybody's.
    with Raw(broker.port, version) as other:
        other.send(connect(version, "device", clean=False, props={"session_expiry": 100} if version == 5 else None))
        assert other.expect(CONNACK).code == 0, "the session ended with its connection"


@pytest.mark.parametrize("cert,says", [("nobody", "no [[user]] of that name"), ("nameless", "no usable CN")])
@pytest.mark.parametrize("version,code", [(4, 5), (5, 0x87)])
def test_a_certificate_of_nobody(secure, authority, cert, says, version, code):
    broker = secure(asking(authority, 'client_identity = "cn"'), config=USERS)
    with Over(broker.tls_port, client_context(authority, cert), version) as raw:
        raw.send(connect(version, "x"))
        assert raw.expect(CONNACK).code == code
        raw.expect_closed()
    assert says in broker.log


def test_an_optional_certificate_and_a_password(secure, authority):
    users = USERS + f'[[user]]\nname = "by-hand"\npassword_hash = "{hashed("horse")}"\npublish = ["#"]\n'
    broker = secure(asking(authority, 'client_identity = "cn", client_cert = "optional"'), "allow_anonymous = false", config=users)
    with Over(broker.tls_port, client_context(authority, "press-7")) as raw:
        raw.open("a")
    with Over(broker.tls_port, client_context(authority)) as raw:
        raw.open("b", user="by-hand", password="horse")
    # A user without a password_hash is not reached by any password, nor by none.
    for user, password in (("press-7", "x"), ("press-7", None), ("press-7", ""), (None, None)):
        with Over(broker.tls_port, client_context(authority)) as raw:
            raw.send(connect(4, "c", user=user, password=password))
            assert raw.expect(CONNACK).code in (4, 5)


def test_tickets_resume_and_still_say_who_it_is(secure, authority):
    """A device that comes back by a ticket is the same user."""
    broker = secure(asking(authority, 'client_identity = "cn"'), config=USERS)
    context = client_context(authority, "press-7", version=ssl.TLSVersion.TLSv1_2)
    session = None
    for _ in range(2):
        sock = socket.create_connection(("127.0.0.1", broker.tls_port), 10)
        with context.wrap_socket(sock, server_hostname="localhost", session=session) as tls:
            tls.sendall(connect(5, "device"))
            assert tls.recv(100)[3] == 0
            was_resumed, session = tls.session_reused, tls.session
    assert was_resumed


# -- The wrong door ----------------------------------------------------------------------------------------------------


def test_the_wrong_port_is_said_clearly(gateway, authority):
    tls, web, proxied = free_port(), free_port(), free_port()
    config = listener(tls, tls=server_tls(authority)) + listener(web, "websocket = true") + listener(proxied, "proxy_protocol = true")
    broker = up(gateway(config), tls, web, proxied)

    def send(port, data):
        with socket.create_connection(("127.0.0.1", port), 10) as s:
            s.sendall(data)
            s.shutdown(socket.SHUT_WR)
            answer = b""
            while more := s.recv(4096):
                answer += more
            return answer

    mqtt = connect(4, "x")
    hello = b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(32)
    page = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    assert b"mqtt" not in send(tls, mqtt).lower()
    send(tls, page)
    send(broker.port, hello)
    send(broker.port, page)
    send(broker.port, b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n")
    answer = send(web, page)
    assert answer.startswith(b"HTTP/1.1 426 ") and b"MQTT broker of a gateway" in answer and len(answer) < 600
    assert send(web, mqtt).startswith(b"HTTP/1.1 400 ")
    send(proxied, mqtt)
    for line in (
        "plain MQTT to a listener with TLS",
        "plain HTTP to a listener with TLS",
        "TLS handshake on a listener without TLS",
        "HTTP request to a listener for plain MQTT",
        "PROXY protocol header to a listener without",
        "a web page where MQTT over WebSocket is spoken",
        "MQTT without WebSocket to a listener for WebSocket",
        "no PROXY protocol header, which this listener needs",
    ):
        eventually(lambda: line in broker.log, 5, lambda: f"{line}: {broker.log[-3000:]}")
    refused = [line for line in broker.log.splitlines() if "connection refused" in line]
    assert len(refused) == 8 and all("127.0.0.1:" in line for line in refused), refused
    for _ in range(20):
        send(tls, mqtt)
    assert broker.log.count("plain MQTT to a listener with TLS") == 1, "the same again is counted, not said"


# -- WebSocket ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def web(gateway):
    port = free_port()
    made = gateway(listener(port, "websocket = true"))
    made.web_port = port
    return up(made, port)


@pytest.mark.parametrize("path,protocol,status", [("/", "mqtt", 101), ("/mqtt", "mqttv3.1, mqtt", 101), ("/x", "mqtt", 404), ("/", None, 400), ("/", "chat", 400)])
def test_who_is_let_in_by_websocket(web, path, protocol, status):
    with WebSocket(web.web_port, path, protocol) as ws:
        assert ws.status == status, ws.answer
        if status == 101:
            chosen = protocol.split(",")[0]
            assert f"Sec-WebSocket-Protocol: {chosen}\r\n" in ws.answer + "\r\n"
            ws.open("x")


def test_packets_and_frames_need_not_end_together(web):
    with WebSocket(web.web_port) as ws:
        hello = connect(4, "x")
        f = ws.frame
        # CONNECT in three frames of one message, a ping between them, then two packets in one frame.
        ws.send(f(2, hello[:1], last=False), f(9, b"are you there"), f(0, hello[1:5], last=False), f(0, hello[5:]))
        assert ws.receive() == (10, b"are you there")
        assert ws.receive() == (2, bytes([0x20, 2, 0, 0]))
        ws.send(f(2, subscribe(4, 1, [("a", 0)]) + publish(4, "a", b"1")))
        got = b""
        while len(got) < 5 + 6:
            opcode, content = ws.receive()
            assert opcode == 2
            got += content
        assert got == bytes([0x90, 3, 0, 1, 0]) + publish(4, "a", b"1")
        # A byte a frame, an empty frame among them.
        for byte in publish(4, "a", b"22"):
            ws.send(f(2, bytes([byte])), f(2, b""))
        assert ws.receive() == (2, publish(4, "a", b"22"))
        # 300 KB in, and out in frames that a browser can hold.
        big = publish(4, "a", os.urandom(300_000))
        ws.send(f(2, big))
        got = b""
        while len(got) < len(big):
            got += ws.receive()[1]
        assert got == big
        ws.send(f(8, struct.pack(">H", 1000)))
        assert ws.receive() == (8, struct.pack(">H", 1000))


@pytest.mark.parametrize(
    "frame,code",
    [
        (WebSocket.frame(1, b"text"), 1003),
        (WebSocket.frame(2, b"unmasked", mask=False), 1002),
        (WebSocket.frame(0, b"continues nothing"), 1002),
        (WebSocket.frame(9, b"x" * 126), 1002),
        (WebSocket.frame(3, b""), 1002),
    ],
)
def test_a_frame_that_must_not_be(web, frame, code):
    for before in (False, True):
        with WebSocket(web.web_port) as ws, WebSocket(web.web_port) as other:
            other.open("other")
            if before:
                ws.open("x")
            ws.send(frame)
            assert ws.receive() == (8, struct.pack(">H", code))
            with pytest.raises((Closed, ConnectionError)):
                ws.receive()
            other.send(other.frame(2, packet(12, 0, b"")))
            assert other.receive() == (2, b"\xd0\x00")


def test_a_frame_reserves_nothing(web):
    """2 GB announced by forty clients, a little of it sent, before and after CONNECT."""
    before = web.memory_kb()
    open_ones = []
    for i in range(40):
        ws = WebSocket(web.web_port)
        open_ones.append(ws)
        if i % 2:
            ws.open(f"c{i}")
        ws.send(ws.frame(2, b"\x30\xff\xff\xff\x7f\x00\x01a" if i % 2 else b"\x10\xff\xff\xff\x7f", announce=2 << 30))
    with WebSocket(web.web_port) as ws:
        ws.open("last")
    grown = web.memory_kb() - before
    print(f"grown by {grown} kB")
    assert grown < 8 << 10
    for ws in open_ones:
        ws.socket.close()


def test_pages_from_elsewhere_stay_out_where_no_password_is_asked_for(gateway):
    open_port, closed_port = free_port(), free_port()
    users = f'[[user]]\nname = "u"\npassword_hash = "{hashed("horse")}"\npublish = ["#"]\n'
    more = 'websocket = true\norigins = ["https://dash.example"]'
    broker = gateway(listener(open_port, more) + listener(closed_port, "websocket = true\nallow_anonymous = false") + users)
    up(broker, open_port, closed_port)
    for origin, status in (("https://evil.example", 403), ("https://dash.example", 101), ("http://127.0.0.1:8080", 101), ("null", 403)):
        with WebSocket(open_port, headers=f"Origin: {origin}\r\n") as ws:
            assert ws.status == status, origin
        with WebSocket(closed_port, headers=f"Origin: {origin}\r\n") as ws:
            assert ws.status == 101, origin
    eventually(lambda: "evil.example" in broker.log, 5, "the log says whose page it was")


# -- Handshakes that stall ---------------------------------------------------------------------------------------------


def client_hello(context):
    """The first flight of a handshake, as bytes."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def test_thousands_of_half_open_handshakes(secure, authority):
    """More than may be unauthenticated: those who stall give their place, memory is bounded, others come in and talk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20_000), hard))
    count = int(os.environ.get("TIDEGATE_HALF_OPEN", "3000"))
    broker = secure(server_tls(authority))
    context = client_context(authority)
    ear = Over(broker.tls_port, context).open("ear")
    ear.subscribe(("t", 0))
    before = broker.memory_kb()
    hello, half = client_hello(context), []
    try:
        for i in range(count):
            s = socket.create_connection(("127.0.0.1", broker.tls_port), 20)
            s.sendall(hello if i % 2 else hello[: i % len(hello) + 1])
            half.append(s)
        # Those who are here are served, and somebody new comes in.
        with Over(broker.tls_port, context) as raw:
            raw.open("new")
            raw.publish("t", b"through")
        assert ear.expect(3).payload == b"through"
        counters = broker.part("broker", "broker")["counters"]
        grown = broker.memory_kb("VmHWM") - before
        print(f"{count} half open: grown by {grown} kB at most, {counters}")
        assert counters["unauthenticated"] <= 2_000 and counters["turned_away"] >= count - 2_000
        assert grown < 48 << 10
        assert not ear.before_pong(), "nobody else was disturbed"
    finally:
        for s in half:
            s.close()
        ear.socket.close()
    eventually(lambda: broker.part("broker", "broker")["counters"]["unauthenticated"] == 0, 10, "they are gone")


def test_whoever_stalls_is_shown_out_at_the_deadline(gateway, authority):
    """In each stage, all at the same time; whoever comes meanwhile is served."""
    tls, web, proxied = free_port(), free_port(), free_port()
    config = listener(tls, tls=server_tls(authority)) + listener(web, "websocket = true") + listener(proxied, "proxy_protocol = true")
    broker = up(gateway(config), tls, web, proxied)
    hello = client_hello(client_context(authority))
    stalled = {
        "in the TLS handshake": (tls, hello),
        "in the WebSocket request": (web, b"GET /mqtt HTTP/1.1\r\nHost: x\r\n"),
        "in the PROXY protocol header": (proxied, b"\r\n\r\n\0\r\nQUIT\n\x21"),
        "before CONNECT": (broker.port, connect(4, "x")[:5]),
    }
    sockets = []
    for port, data in stalled.values():
        s = socket.create_connection(("127.0.0.1", port), 20)
        s.sendall(data)
        sockets.append(s)
    with Over(tls, client_context(authority)) as raw, WebSocket(web) as ws:
        raw.open("a")
        ws.open("b")
    for s in sockets:
        with pytest.raises(ConnectionError):
            while s.recv(65536):
                pass
            raise ConnectionError("closed in order")
    for stage in stalled:
        eventually(lambda: f"stopped {stage}" in broker.log, 5, lambda: f"{stage}: {broker.log[-3000:]}")


@pytest.mark.parametrize("sort", ["tls", "web"])
def test_one_that_never_reads_costs_only_itself(gateway, authority, sort):
    port = free_port()
    broker = gateway(listener(port, "websocket = true" if sort == "web" else "", server_tls(authority) if sort == "tls" else None))
    up(broker, port)
    context = client_context(authority)
    if sort == "tls":
        deaf, ear = Over(port, context).open("deaf"), Over(port, context).open("ear")
        deaf.subscribe(("flood", 0))
        ear.subscribe(("flood", 0))
        heard = lambda: ear.expect(3).payload  # noqa: E731
    else:
        deaf, ear = WebSocket(port).open("deaf"), WebSocket(port).open("ear")
        for ws in (deaf, ear):
            ws.send(ws.frame(2, subscribe(4, 1, [("flood", 0)])))
            assert ws.receive()[1][0] == 0x90
        heard = lambda: ear.receive()[1][9:]  # noqa: E731
    before = broker.memory_kb()
    payload = bytes(16_000)
    with Raw(broker.port) as raw:
        raw.open("flood")
        for i in range(2_000):
            raw.send(publish(4, "flood", payload))
            got = b""
            while len(got) < len(payload):
                got += heard()
    grown = broker.memory_kb() - before
    counters = broker.part("broker", "broker")["counters"]
    print(f"{sort}: grown by {grown} kB, {counters['messages_dropped']} dropped")
    assert counters["messages_dropped"] > 1_000 and grown < 8 << 10


# -- Certificates that are renewed -------------------------------------------------------------------------------------


def serial(port, authority):
    with socket.create_connection(("127.0.0.1", port), 10) as s:
        with client_context(authority).wrap_socket(s, server_hostname="localhost") as tls:
            return tls.getpeercert()["serialNumber"]


def test_a_renewed_certificate_is_shown_and_nobody_leaves(secure, authority, tmp_path):
    """The folder is swapped by a symbolic link, as cert-manager and certbot do it, then by files; then a bad pair comes."""
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        authority.server("tls", folder=tmp_path / name)
    live = tmp_path / "live"
    live.symlink_to("a")
    broker = secure(server_tls(authority, folder=live, file="tls"))
    stayed = [Over(broker.tls_port, client_context(authority)).open(f"c{i}") for i in range(30)]

    def shown(before):
        return eventually(lambda: (now := serial(broker.tls_port, authority)) != before and now, 10, "the new certificate", 0.2)

    first = serial(broker.tls_port, authority)
    (tmp_path / "next").symlink_to("b")
    os.replace(tmp_path / "next", live)
    second = shown(first)
    # In place, the certificate first and the key some time later.
    shutil.copy(tmp_path / "c/tls.pem", tmp_path / "b/tls.pem")
    shutil.copy(tmp_path / "c/tls.key", tmp_path / "b/tls.key")
    third = shown(second)
    assert len({first, second, third}) == 3

    shutil.copy(tmp_path / "a/tls.key", tmp_path / "b/tls.key")
    name = f"127.0.0.1:{broker.tls_port}"
    told = lambda: broker.part("listener", name)  # noqa: E731
    eventually(lambda: told()["health"] == "late" and "is not the key of the certificate" in told()["text"], 10, told)
    assert broker.log.count("the old one stays in use") == 1
    assert serial(broker.tls_port, authority) == third
    os.remove(tmp_path / "b/tls.pem")
    eventually(lambda: "there is no such file" in told()["text"], 10, told)
    assert serial(broker.tls_port, authority) == third
    shutil.copy(tmp_path / "a/tls.pem", tmp_path / "b/tls.pem")
    assert shown(third) == first
    eventually(lambda: told()["health"] == "good", 10, told)
    for one in stayed:
        assert not one.before_pong()
        one.socket.close()


@pytest.mark.parametrize("days,says", [(10, "expires on"), (-1, "has expired on")])
def test_a_certificate_that_ends_is_said(secure, authority, tmp_path, days, says):
    authority.server("ending", folder=tmp_path, days=(-40, days))
    broker = secure(server_tls(authority, folder=tmp_path, file="ending"))
    name = f"127.0.0.1:{broker.tls_port}"
    part = eventually(lambda: (p := broker.part("listener", name))["health"] == "late" and p, 5, lambda: broker.part("listener", name))
    assert says in part["text"] and part["text"].startswith("listening")
    assert broker.log.count(says) == 1
    done = subprocess.run(
        [str(BINARY), "doctor", "--offline", "--json", "--config", str(broker.path)], capture_output=True, text=True, timeout=20
    )
    found = [f for f in json.loads(done.stdout)["findings"] if f["subject"].endswith("tls.cert")]
    assert len(found) == 1 and says in found[0]["text"], done.stdout
    assert found[0]["verdict"] == ("warning" if days > 0 else "failed")


def test_a_certificate_that_is_not_there_costs_only_its_listener(gateway, authority, tmp_path):
    """`tidegate check` names the line; `run` starts the rest, and the listener as soon as the files are there."""
    port = free_port()
    text = listener(port, tls=server_tls(authority, folder=tmp_path, file="later"))
    broker = gateway(text, start=False)
    lines = broker.path.read_text().splitlines()
    line = next(i for i, text in enumerate(lines, 1) if "later.pem" in text)
    code, said = broker.run_to_end(arguments=["check", "--config", str(broker.path)])
    assert code == 1 and f"gateway.toml:{line}:" in said and "there is no such file" in said, said
    authority.server("later", folder=tmp_path)
    other = authority.server("other", folder=tmp_path)[1]
    right = (tmp_path / "later.key").read_bytes()
    shutil.copy(other, tmp_path / "later.key")
    code, said = broker.run_to_end(arguments=["check", "--config", str(broker.path)])
    assert code == 1 and f"gateway.toml:{line}:" in said and "is not the key of the certificate" in said, said
    broker.start()
    assert broker.part("listener", f"127.0.0.1:{port}")["health"] == "failed"
    with Raw(broker.port) as raw:
        raw.open("x")
    (tmp_path / "later.key").write_bytes(right)
    code, said = broker.run_to_end(arguments=["check", "--config", str(broker.path)])
    assert code == 0, said
    eventually(lambda: broker.part("listener", f"127.0.0.1:{port}")["health"] == "good", 15, "it listens", 0.1)
    assert serial(port, authority)


def test_a_key_from_a_credential_of_systemd(secure, authority, tmp_path):
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    shutil.copy(authority.folder / "server.key", credentials / "mqtt.key")
    tls = f'cert = "{authority.folder}/server.pem", key = {{ credential = "mqtt.key" }}'
    broker = secure(tls, start=False)
    broker.start(env={"CREDENTIALS_DIRECTORY": str(credentials)})
    assert serial(up(broker, broker.tls_port).tls_port, authority)


def test_a_reload_touches_who_could_not_have_come_in(secure, authority, tmp_path):
    """A new certificate file and a new listener disconnect nobody; a listener that becomes one with TLS its plain clients."""
    authority.server("new", folder=tmp_path)
    broker = secure(server_tls(authority))
    text = broker.path.read_text()
    with Raw(broker.port) as plain, Over(broker.tls_port, client_context(authority)) as secret:
        plain.open("plain")
        secret.open("secret")
        before = serial(broker.tls_port, authority)
        more = free_port()
        text = text.replace(str(authority.folder / "server."), str(tmp_path / "new.")) + listener(more, "websocket = true")
        change(broker, text)
        assert serial(broker.tls_port, authority) != before
        with WebSocket(more) as ws:
            ws.open("web")
            assert not plain.before_pong() and not secret.before_pong()
            # A certificate that is not there is taken back, and all stay.
            report = change(broker, text.replace("new.pem", "none.pem"), outcome="reverted")
            assert "none.pem" in report["why"]
            assert not plain.before_pong() and not secret.before_pong()
            change(broker, text.replace("websocket = true", f"tls = {{ {server_tls(authority)} }}"))
            with pytest.raises((Closed, ConnectionError)):
                while True:
                    ws.receive()
        assert serial(more, authority) and not plain.before_pong() and not secret.before_pong()


def test_hangups_disturb_nobody(gateway, authority):
    """TL-04: SIGHUP 20 times beside clients without a user, with a password and with a certificate."""
    import signal

    port = free_port()
    users = USERS + f'[[user]]\nname = "u"\npassword_hash = "{hashed("horse")}"\npublish = ["#"]\nsubscribe = ["#"]\n'
    tls = asking(authority, 'client_identity = "cn", client_cert = "optional"')
    broker = up(gateway(listener(port, tls=tls) + users), port)
    clients = []
    for i in range(20):
        if i % 3 == 0:
            clients.append(Raw(broker.port).open(f"c{i}"))
        elif i % 3 == 1:
            clients.append(Over(port, client_context(authority)).open(f"c{i}", user="u", password="horse"))
        else:
            clients.append(Over(port, client_context(authority, "press-7")).open(f"c{i}"))
    for _ in range(20):
        os.kill(broker.pid, signal.SIGHUP)
        for one in random.sample(clients, 5):
            assert not one.before_pong()
    for one in clients:
        assert not one.before_pong()
        one.socket.close()


# -- Unix sockets and the PROXY protocol -------------------------------------------------------------------------------


class Unix(Raw):
    def __init__(self, path, version=4):
        self.version, self.timeout = version, 10
        self.inbox, self.early, self.next_id, self.connack = bytearray(), [], 0, None
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(path))


def test_a_unix_socket_is_made_shared_and_taken_away(gateway, tmp_path):
    path = tmp_path / "mqtt.sock"
    # What a gateway that was killed left behind.
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    broker = gateway(listener(0, bind=f"unix:{path}"))
    eventually(lambda: broker.part("listener", f"unix:{path}")["health"] == "good", 5, "it listens")
    mode = path.stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o660
    with Unix(path) as raw:
        raw.open("local")
        raw.publish_acked("a", b"1")
    assert f"listens    unix:{path}" in broker.log
    # Another gateway finds it taken, says so and leaves it alone; a plain file as well.
    file = tmp_path / "file"
    file.write_text("precious")
    second = gateway(listener(0, bind=f"unix:{path}") + listener(0, bind=f"unix:{file}"), folder="second")
    assert "another program listens there" in second.part("listener", f"unix:{path}")["text"]
    assert "no socket" in second.part("listener", f"unix:{file}")["text"] and file.read_text() == "precious"
    second.stop()
    with Unix(path) as raw:
        raw.open("local")
    broker.kill9()
    broker.start()
    eventually(lambda: broker.part("listener", f"unix:{path}")["health"] == "good", 5, "it listens again")
    broker.stop()
    assert not path.exists()


def proxy_header(source=("192.0.2.7", 50000), command=1):
    body = socket.inet_aton(source[0]) + socket.inet_aton("192.0.2.1") + struct.pack(">HH", source[1], 1883)
    return b"\r\n\r\n\0\r\nQUIT\n" + bytes([0x20 | command, 0x11]) + struct.pack(">H", len(body) + 5) + body + b"\x04\0\x02ab"


def test_the_proxy_says_who_it_is(gateway, authority):
    plain, tls = free_port(), free_port()
    users = f'[[user]]\nname = "u"\npassword_hash = "{hashed("horse")}"\npublish = ["#"]\n'
    more = "proxy_protocol = true\nallow_anonymous = false"
    broker = gateway(listener(plain, more) + listener(tls, more, server_tls(authority)) + users)
    up(broker, plain, tls)
    with Raw(plain) as raw:
        # In pieces, and CONNECT right behind it.
        whole = proxy_header() + connect(4, "x", user="u", password="wrong")
        for part in (whole[:3], whole[3:20], whole[20:]):
            raw.send(part)
        assert raw.expect(CONNACK).code == 4
    eventually(lambda: "peer=192.0.2.7:50000" in broker.log, 5, lambda: broker.log[-2000:])
    with Raw(tls) as raw:
        raw.send(proxy_header(("192.0.2.8", 1)))
        raw.socket = client_context(authority).wrap_socket(raw.socket, server_hostname="localhost")
        raw.open("y", user="u", password="horse")
    with Raw(plain) as raw:
        # The proxy's own check.
        raw.send(proxy_header(command=0))
        raw.open("z", user="u", password="horse")
    for bad, says in (
        (b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", "version 1"),
        (connect(4, "x", user="u", password="horse"), "no PROXY protocol header"),
        (b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xff", "longer than"),
    ):
        with Raw(plain) as raw:
            raw.send(bad)
            raw.expect_closed()
        eventually(lambda: says in broker.log, 5, lambda: f"{says}: {broker.log[-2000:]}")


def test_the_banner_names_each_way_in(everywhere):
    log = everywhere.log
    for (tls, web), port in everywhere.ports.items():
        scheme = {(False, False): "mqtt", (True, False): "mqtts", (False, True): "ws", (True, True): "wss"}[tls, web]
        assert f"listens    {scheme}://127.0.0.1:{port}" in log
    assert f"unix:{everywhere.unix}" in log
