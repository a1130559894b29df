"""The mqtt uplink's ways to a stock mosquitto: TLS with a client certificate, WebSocket, WebSocket over TLS, user and
password; and what it says when a certificate or a password is wrong."""

import socket
import subprocess
import threading
import time

import pytest

from support import Client, Gateway, Mosquitto, Recorder, eventually, free_port

COUNT = 200


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """A folder with ca.pem, server.pem/.key for 127.0.0.1, client.pem/.key, and other-ca.pem that signed none of them."""
    folder = tmp_path_factory.mktemp("pki")

    def openssl(*args):
        subprocess.run(["openssl", *args], cwd=folder, check=True, capture_output=True)

    for ca in ("ca", "other-ca"):
        openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30",
                "-subj", f"/CN={ca}", "-keyout", f"{ca}.key", "-out", f"{ca}.pem")
    for name, extension in (("server", "subjectAltName=IP:127.0.0.1"), ("client", "extendedKeyUsage=clientAuth")):
        openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", f"/CN={name}",
                "-keyout", f"{name}.key", "-out", f"{name}.csr")
        (folder / f"{name}.ext").write_text(f"{extension}\n")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "30",
                "-extfile", f"{name}.ext", "-out", f"{name}.pem")
    return folder


@pytest.fixture
def remote(pki, tmp_path, _started):
    """mosquitto with a listener a transport; `.ports` by URL scheme. TLS wants a client certificate."""
    ports = {scheme: free_port() for scheme in ("mqtts", "ws", "wss")}
    tls = f"cafile {pki}/ca.pem\ncertfile {pki}/server.pem\nkeyfile {pki}/server.key\n"
    made = Mosquitto(
        tmp_path / "remote",
        f"listener {ports['mqtts']} 127.0.0.1\n{tls}require_certificate true\n"
        f"listener {ports['ws']} 127.0.0.1\nprotocol websockets\n"
        f"listener {ports['wss']} 127.0.0.1\nprotocol websockets\n{tls}",
    )
    _started.append(made)
    made.start()
    made.ports = ports
    return made


def uplink(url, version, extra):
    return (
        f'[[uplink]]\nname = "cloud"\nkind = "mqtt"\nurl = "{url}"\nversion = "{version}"\n{extra}\n'
        '[[route]]\nfrom = ["up/#"]\nto = "cloud"\ntopic = "plants/{gateway}/{topic}"\n'
        '[[route]]\nfrom_uplink = "cloud"\nfrom = ["plants/{gateway}/down/#"]\ntopic = "commands/{rest}"\n'
    )


@pytest.mark.parametrize("version", ["3.1.1", "5"])
@pytest.mark.parametrize("scheme", ["mqtts", "ws", "wss"])
def test_messages_go_up_and_commands_come_down(gateway, remote, pki, _started, scheme, version):
    recorder = Recorder(remote.port, "plants/+/up/#")
    _started.append(recorder)
    recorder.start()
    tls = {
        "mqtts": f'tls = {{ ca = "{pki}/ca.pem", cert = "{pki}/client.pem", key = "{pki}/client.key" }}',
        "ws": "",
        "wss": f'tls = {{ ca = "{pki}/ca.pem" }}',
    }[scheme]
    made: Gateway = gateway(uplink(f"{scheme}://127.0.0.1:{remote.ports[scheme]}", version, tls))
    local = Client(made.port, "local")
    _started.append(local)
    local.connect().subscribe("commands/#")
    # A WebSocket frame may hold many packets, and a packet may need many frames: small ones, and one of 200 KB.
    payloads = [b"%d" % n for n in range(COUNT)] + [b"x" * 200_000]
    for payload in payloads:
        local.publish("up/t", payload, wait=False)
    eventually(lambda: len(recorder.seen) == len(payloads), 20, lambda: f"{len(recorder.seen)}; {made.part('uplink', 'cloud')}")
    assert recorder.first_arrivals() == {"plants/line-4/up/t": payloads}
    recorder.publish("plants/line-4/down/valve/3", "open")
    assert [(m.topic, m.payload) for m in local.wait_for(1)] == [("commands/valve/3", b"open")]


def test_a_remote_whose_certificate_is_not_trusted_gets_nothing_until_the_right_ca_is_there(gateway, remote, pki, tmp_path):
    ca = tmp_path / "ca.pem"
    ca.write_bytes((pki / "other-ca.pem").read_bytes())
    tls = f'tls = {{ ca = "{ca}", cert = "{pki}/client.pem", key = "{pki}/client.key" }}'
    made = gateway(uplink(f"mqtts://127.0.0.1:{remote.ports['mqtts']}", "5", tls))
    with_client = Client(made.port, "local").connect()
    with_client.publish("up/t", "waits")
    with_client.disconnect()
    part = eventually(lambda: (p := made.part("uplink", "cloud"))["health"] == "failed" and p or None, 20, lambda: made.status())
    assert "certificate" in part["text"].lower() and "127.0.0.1" in part["text"], part["text"]
    assert part["counters"]["sent"] == 0
    # The file is read at each connect: no restart.
    ca.write_bytes(b"a comment before it\r\n" + (pki / "ca.pem").read_bytes().replace(b"\n", b"\r\n"))
    eventually(lambda: made.part("uplink", "cloud")["counters"]["acknowledged"] == 1, 60, lambda: made.status())


@pytest.mark.parametrize("ending", ["\n", "\r\n", ""])
def test_user_and_password_from_a_file(gateway, tmp_path, _started, ending):
    folder = tmp_path / "remote"
    folder.mkdir()
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(folder / "users"), "line 4", "pass word"], check=True, capture_output=True)
    remote = Mosquitto(folder, f"allow_anonymous false\npassword_file {folder}/users\n")
    _started.append(remote)
    remote.start()
    secret = tmp_path / "password"
    secret.write_text("wrong" + ending, newline="")
    login = f'username = "line 4"\npassword = {{ file = "{secret}" }}\n'
    made = gateway(uplink(f"mqtt://127.0.0.1:{remote.port}", "5", login))
    part = eventually(lambda: (p := made.part("uplink", "cloud"))["health"] == "failed" and p or None, 20, lambda: made.status())
    assert "not authorized" in part["text"] and "user name and password" in part["text"], part["text"]
    assert "wrong" not in part["text"], "the secret is not shown"
    made.stop()
    secret.write_text("pass word" + ending, newline="")
    made.start()
    eventually(lambda: made.part("uplink", "cloud")["health"] == "good", 20, lambda: made.status())
    assert "pass word" not in made.log and "wrong" not in made.log, "a secret is never logged"


class Meter(threading.Thread):
    """A TCP relay that counts what goes each way."""

    def __init__(self, to):
        super().__init__(daemon=True)
        self.to, self.up, self.down = to, 0, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.start()

    def run(self):
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self.to))
            for source, sink, way in ((near, far, "up"), (far, near, "down")):
                threading.Thread(target=self.carry, args=(source, sink, way), daemon=True).start()

    def carry(self, source, sink, way):
        try:
            while data := source.recv(65536):
                setattr(self, way, getattr(self, way) + len(data))
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            end.close()


def test_an_idle_uplink_costs_a_mobile_link_next_to_nothing(gateway, remote, pki):
    """CF-06: an hour of idling over TLS at keep-alive 60 is at most 4 KB of TCP payload, and the uplink's own meter is right. A
    keep-alive of 5 s stands for the minute: what counts is the bytes a ping."""
    meter = Meter(remote.ports["mqtts"])
    tls = f'keep_alive = "5 s"\ntls = {{ ca = "{pki}/ca.pem", cert = "{pki}/client.pem", key = "{pki}/client.key" }}'
    made = gateway(uplink(f"mqtts://127.0.0.1:{meter.port}", "5", tls))
    eventually(lambda: made.part("uplink", "cloud")["health"] == "good", 20, "connected")
    counted = lambda: (meter.up, meter.down)
    # The handshake and the SUBSCRIBE are over when a ping has come and gone.
    first = counted()
    eventually(lambda: meter.up > first[0] and meter.down > first[1], 20, "a first ping", 0.01)
    settled = counted()
    began = time.monotonic()
    for _ in range(2):
        seen = counted()
        eventually(lambda: meter.up > seen[0] and meter.down > seen[1], 20, "a ping and its answer", 0.01)
    took = time.monotonic() - began
    up, down = (b - a for a, b in zip(settled, counted()))
    # All that happens here in 5 s happens in a minute then.
    hour = (up + down) / took * 3_600 * 5 / 60
    print(f"{up} bytes up and {down} down in {took:.1f} s: {hour:.0f} bytes an hour")
    assert hour <= 4_096
    said = made.part("uplink", "cloud")["counters"]
    for counter, real in (("bytes_out", meter.up), ("bytes_in", meter.down)):
        assert abs(said[counter] - real) <= 0.02 * real, (said, counted())
    meter.listener.close()
