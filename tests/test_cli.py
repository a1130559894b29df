"""The commands that talk to a running gateway, and those that look at one from outside: what they print, how they fail, and
what the admin socket bears."""

import json
import os
import pty
import re
import shutil
import socket
import stat
import subprocess
import threading
import time

import pytest

from support import BINARY, V5, eventually, free_port, mqtt_uplink

ROUTE = '[[uplink]]\nname = "archive"\nkind = "file"\npath = "archive.jsonl"\n[[route]]\nfrom = ["a/#"]\nto = "archive"\n'


def cli(made, *arguments, stdin=b"", timeout=20, env=None, binary=False):
    done = subprocess.run(
        [str(BINARY), *arguments, "--config", str(made.path)],
        input=stdin,
        capture_output=True,
        timeout=timeout,
        cwd=made.folder,
        env={**os.environ, **(env or {})},
    )
    return done.returncode, done.stdout if binary else done.stdout.decode(), done.stderr.decode()


def fits(out):
    """80 columns, but for a line that ends with a word too long for one, as a path is."""
    return all(len(line) <= 80 or len(line.split()[-1]) > 30 for line in out.splitlines())


def on_a_terminal(made, *arguments, env=None):
    """What the command draws where stdout is a terminal of 80 columns."""
    master, slave = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | (env or {})
    process = subprocess.Popen(
        [str(BINARY), *arguments, "--config", str(made.path)], stdout=slave, stdin=subprocess.DEVNULL, env=environment
    )
    os.close(slave)
    out = b""
    while True:
        try:
            read = os.read(master, 65536)
        except OSError:
            break
        if not read:
            break
        out += read
    os.close(master)
    assert process.wait(10) == 0
    return out.decode()


class Socket:
    """The admin socket itself."""

    def __init__(self, made):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(10)
        self.socket.connect(str(made.data / "admin.sock"))
        self.lines = self.socket.makefile("rb")

    def send(self, request):
        self.socket.sendall(request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n")
        return self

    def next(self):
        line = self.lines.readline()
        return json.loads(line) if line else None

    def ask(self, request):
        self.send(request)
        answer = []
        while (line := self.next()) is not None:
            answer.append(line)
        self.close()
        return answer

    def close(self):
        self.lines.close()
        self.socket.close()


def archived(made):
    path = made.folder / "archive.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_status_is_plain_when_piped_and_coloured_on_a_terminal_only(gateway):
    made = gateway(ROUTE + mqtt_uplink(free_port()))
    eventually(lambda: made.part("uplink", "cloud")["health"] != "starting", what="the uplink has tried")
    code, out, _ = cli(made, "status")
    assert code == 0 and "\x1b" not in out
    assert fits(out), out
    assert "line-4" in out and "uplink archive" in out
    assert "\x1b[" in on_a_terminal(made, "status")
    assert "\x1b" not in on_a_terminal(made, "status", env={"NO_COLOR": "1"})
    code, out, _ = cli(made, "status", "--json")
    assert code == 0 and json.loads(out)["gateway"] == "line-4"


@pytest.mark.parametrize("command", [["status"], ["top", "--once"], ["tail", "#"], ["publish", "a", "b"]], ids=lambda c: c[0])
def test_without_a_gateway_it_says_how_to_start_one(gateway, command):
    made = gateway(start=False)
    code, out, err = cli(made, *command)
    assert (code, out) == (3, "")
    assert str(made.data) in err and "tidegate run --config" in err and "panicked" not in err
    # One that was killed leaves its socket behind.
    made.start()
    made.kill9()
    assert (made.data / "admin.sock").exists()
    assert cli(made, *command)[0] == 3


def test_a_gateway_that_runs_can_be_asked_while_its_file_is_broken(gateway):
    made = gateway()
    whole = made.path.read_text()
    made.write_config(whole.replace('data_dir = "data"', 'data_dir = "data"\nnonsense = ') + "\n[[uplink]\n")
    assert cli(made, "check")[0] == 1
    code, out, err = cli(made, "status")
    assert code == 0 and "broker" in out, err


def test_wrong_arguments_are_exit_code_2_and_help_names_the_codes(gateway):
    made = gateway(start=False)
    for wrong in (["statuss"], ["publish"], ["publish", "a", "-q", "3"], ["top", "--every", "0s"], ["completions", "tcsh"]):
        assert cli(made, *wrong)[0] == 2, wrong
    done = subprocess.run([str(BINARY), "--help"], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0 and "Exit codes" in done.stdout
    assert all(len(line) <= 80 for line in done.stdout.splitlines()), done.stdout


def test_the_socket_is_for_owner_and_group(gateway):
    made = gateway()
    mode = (made.data / "admin.sock").stat().st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o660
    made.stop()
    assert not (made.data / "admin.sock").exists()
    made.spawn(prefix=["sh", "-c", 'umask 077; exec "$0" "$@"'])
    eventually(lambda: (made.data / "admin.sock").exists() and made.status(), 10, "it runs")
    assert stat.S_IMODE((made.data / "admin.sock").stat().st_mode) == 0o660


def test_requests_that_are_none_are_refused_with_a_way_on(gateway):
    made = gateway()
    unknown = Socket(made).ask({"request": "make-coffee"})
    assert len(unknown) == 1 and unknown[0]["next"]
    assert all(name in unknown[0]["error"] for name in ("make-coffee", "status", "tail", "publish"))
    for bad in (b"\n", b"\x00\xff\n", b"[]\n", b"{}\n", b'{"request":"tail"}\n', b'{"request":"tail","filter":"a/#/b"}\n'):
        answer = Socket(made).ask(bad)
        assert len(answer) == 1 and answer[0]["error"] and answer[0]["next"], bad
    # Half a line, then gone; nothing at all, then gone.
    Socket(made).send(b'{"requ').close()
    Socket(made).close()
    answer = Socket(made).ask({"request": "status"})
    assert answer[-1] == {"done": True} and answer[0]["parts"]


def test_a_request_without_end_is_cut_at_its_limit(gateway):
    made = gateway()
    before = made.memory_kb()
    one = Socket(made)
    try:
        for _ in range(64):
            one.socket.sendall(b"x" * 65536)
    except OSError:
        pass
    # Told why, where the reset that follows unread bytes lets it through.
    try:
        answer = one.next()
        assert answer is None or "longer" in answer["error"]
    except OSError:
        pass
    one.close()
    assert made.status()
    assert made.memory_kb() - before < 16_000


def test_clients_are_bounded_and_told_so(gateway):
    made = gateway()
    tails = [Socket(made).send({"request": "tail", "filter": "#"}) for _ in range(16)]
    assert all(t.next() == {"listening": True} for t in tails)
    refused = Socket(made)
    assert "clients" in refused.next()["error"]
    refused.close()
    code, _, err = cli(made, "status")
    assert code == 1 and "16 clients" in err and "hint" in err
    for tail in tails:
        tail.close()
    eventually(lambda: cli(made, "status")[0] == 0, 10, "there is room again")


def test_tail_shows_what_passes(gateway, client):
    made = gateway()
    talker = client(made.port, "talker", version=V5)
    process = subprocess.Popen(
        [str(BINARY), "tail", "a/#", "--verbose", "-n", "2", "--config", str(made.path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stderr.readline() == b"listening to a/#\n"
    talker.publish("b", "not this", qos=0, wait=False)
    talker.publish("a/b", '{"value": 1}\n\x1b[2J', properties={"UserProperty": [("k", "v")], "ResponseTopic": "r"})
    talker.publish("a", b"\xff\x00", qos=0, wait=False)
    out, _ = process.communicate(timeout=10)
    out = out.decode()
    assert process.returncode == 0 and "not this" not in out and "\x1b" not in out
    assert re.search(r'^\d\d:\d\d:\d\d\.\d{3} a/b \{"value": 1\}', out, re.M), out
    for part in ("qos 1, from client:talker", "k = v", "response topic: r", "a hex ff00", "qos 0"):
        assert part in out, out


def test_a_filter_with_a_wildcard_first_does_not_match_dollar_topics(gateway, client):
    made = gateway()
    everything = Socket(made).send({"request": "tail", "filter": "#"})
    level = Socket(made).send({"request": "tail", "filter": "+/x"})
    dollar = Socket(made).send({"request": "tail", "filter": "$own/#"})
    assert [s.next() for s in (everything, level, dollar)] == [{"listening": True}] * 3
    talker = client(made.port, "talker")
    talker.publish("$own/x", "hidden", wait=False)
    talker.publish("a/x", "shown")
    assert dollar.next()["payload"] == "hidden"
    assert everything.next()["payload"] == "shown"
    assert level.next()["payload"] == "shown"
    for one in (everything, level, dollar):
        one.close()


def test_a_tail_that_does_not_read_loses_by_count_and_holds_nothing_up(gateway, client):
    made = gateway()
    slow = Socket(made).send({"request": "tail", "filter": "#"})
    assert slow.next() == {"listening": True}
    before = made.memory_kb()
    talker = client(made.port, "talker")
    count, size = 20_000, 1_000
    last = None
    for n in range(count):
        last = talker.publish("t", f"{n}".ljust(size), qos=0 if n < count - 1 else 1, wait=False)
    eventually(lambda: last in talker.acked, 30, "the last one is acknowledged though nobody reads the tail")
    assert made.memory_kb() - before < 24_000
    got, lost, newest = 0, 0, -1
    while got + lost < count:
        line = slow.next()
        if "lost" in line:
            lost += line["lost"]
        else:
            got += 1
            number = int(line["payload"])
            assert number > newest, "in order"
            newest = number
    print(f"shown {got}, lost {lost}")
    assert got + lost == count and got > 1000 and lost > 1000
    slow.close()


def test_publish_is_on_disk_when_it_returns(gateway):
    made = gateway(ROUTE)
    code, out, _ = cli(made, "publish", "a/b", "hello")
    made.kill9()
    assert code == 0 and "on disk for uplink:archive" in out
    made.start()
    # Once or more: the kill may come between the file's line and the cursor that says so.
    eventually(lambda: {(e["seq"], e["payload"]) for e in archived(made)} == {(1, "hello")}, 10, lambda: archived(made))
    code, out, _ = cli(made, "publish", "b", "x")
    assert code == 0 and "nobody" in out
    code, out, _ = cli(made, "publish", "a/c", "x", "--json")
    assert code == 0 and json.loads(out) == {"published": True, "durable": ["uplink:archive"], "live": 0}


def test_publish_carries_payload_and_properties(gateway, client, tmp_path):
    made = gateway()
    listener = client(made.port, "listener", version=V5)
    listener.subscribe("#", 2)
    blob = bytes(range(256)) * 100
    (tmp_path / "blob").write_bytes(blob)
    options = ["-q", "2", "-u", "k=v", "-u", "k=w", "--response-topic", "answers/1", "--correlation", "c1", "--expiry", "1h"]
    assert cli(made, "publish", "p", "text", *options)[0] == 0
    assert cli(made, "publish", "p", "-", stdin=b"from stdin\n")[0] == 0
    assert cli(made, "publish", "p", "--file", str(tmp_path / "blob"))[0] == 0
    code, out, _ = cli(made, "publish", "p", "kept", "--retain")
    assert code == 0 and "1 connected client" in out and "nothing durable" in out
    text, stdin, file, _ = listener.wait_for(4)
    assert text.payload == b"text" and text.qos == 2 and not text.retain
    properties = text.properties
    assert properties.UserProperty == [("k", "v"), ("k", "w")] and properties.ResponseTopic == "answers/1"
    assert properties.CorrelationData == b"c1" and 3500 < properties.MessageExpiryInterval <= 3600
    assert stdin.payload == b"from stdin\n" and file.payload == blob
    late = client(made.port, "late")
    late.subscribe("p")
    assert [(m.payload, m.retain) for m in late.wait_for(1)] == [(b"kept", True)]


def test_publish_refuses_what_cannot_be(gateway, tmp_path):
    made = gateway(ROUTE)
    (tmp_path / "large").write_bytes(b"x" * (600 << 10))
    for arguments, why in (
        (["a/#", "x"], "not a topic"),
        (["$SYS/x", "x"], "broker's own"),
        (["a", "--file", str(tmp_path / "large")], "512 KiB"),
        (["a", "--file", str(tmp_path / "none")], "No such file"),
        (["a", "x", "--response-topic", "r/#"], "response topic"),
    ):
        code, out, err = cli(made, "publish", *arguments)
        assert (code, out) == (1, "") and why in err, (arguments, err)
    assert archived(made) == []


def test_top_shows_rates(gateway, client):
    made = gateway(ROUTE)
    talker = client(made.port, "talker")
    stop = threading.Event()

    def talk():
        while not stop.wait(0.005):
            talker.publish("a/x", "1", wait=False)

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        code, out, _ = cli(made, "top", "--once", "--every", "300ms", "--json")
        top = json.loads(out)
        assert code == 0 and top["messages_in_per_s"] > 1
        broker = next(p for p in top["parts"] if p["kind"] == "broker")
        assert broker["rates_per_s"]["messages_received"] == top["messages_in_per_s"]
        code, out, _ = cli(made, "top", "--once", "--every", "300ms")
        assert code == 0 and "\x1b" not in out and "uplink:archive" in out and "clients 1" in out
        assert all(len(line) <= 80 for line in out.splitlines()), out
        process = subprocess.Popen(
            [str(BINARY), "top", "--every", "100ms", "--json", "--config", str(made.path)], stdout=subprocess.PIPE
        )
        assert all(json.loads(process.stdout.readline())["gateway"] == "line-4" for _ in range(3))
        # A reader that goes away ends it without a fault.
        process.stdout.close()
        assert process.wait(10) == 0
    finally:
        stop.set()
        thread.join()


def findings(made, *arguments, env=None):
    code, out, err = cli(made, "doctor", "--json", *arguments, timeout=60, env=env)
    report = json.loads(out)
    assert code == (1 if report["failed"] else 0), err
    assert all(f["remedy"] for f in report["findings"] if f["verdict"] != "good")
    return report, {f["subject"]: f for f in report["findings"]}


def test_doctor_finds_a_healthy_gateway_healthy_up_and_down(gateway, upstream):
    made = gateway(ROUTE + mqtt_uplink(upstream.port, route_from='["b/#"]'))
    eventually(lambda: made.part("uplink", "cloud")["health"] == "good", what="the uplink is good")
    report, by = findings(made)
    assert report["failed"] == 0, report
    assert by["gateway"]["verdict"] == "good" and by["uplink cloud"]["verdict"] == "good"
    assert by[f"listener 127.0.0.1:{made.port}"]["text"] == "takes connections"
    code, out, _ = cli(made, "doctor")
    assert code == 0 and fits(out), out
    made.stop()
    report, by = findings(made)
    assert report["failed"] == 0, report
    assert by["gateway"]["verdict"] == "warning" and by[f"listener 127.0.0.1:{made.port}"]["verdict"] == "good"
    assert not list(made.data.glob(".tidegate-doctor*"))


def certificate(folder, name, *validity):
    path = folder / f"{name}.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x"]
    subprocess.run([*command, "-keyout", str(folder / f"{name}.key"), "-out", str(path), *validity], check=True, capture_output=True)
    return path


def test_doctor_names_each_fault_with_its_remedy(gateway, tmp_path):
    taken = socket.create_server(("127.0.0.1", 0))
    certificate(tmp_path, "soon", "-days", "10")
    certificate(tmp_path, "long", "-days", "400")
    os.chmod(tmp_path / "soon.key", 0o644)
    (tmp_path / "secret").write_text("x\n")
    os.chmod(tmp_path / "secret", 0o644)
    closed = free_port()
    tls = f'tls = {{ ca = "{tmp_path}/long.pem", cert = "{tmp_path}/soon.pem", key = "{tmp_path}/soon.key" }}'
    config = (
        f'[[uplink]]\nname = "dns"\nkind = "mqtt"\nurl = "mqtts://no-such-host.invalid"\n{tls}\n'
        f'username = "u"\npassword = {{ file = "{tmp_path}/secret" }}\n'
        f'[[uplink]]\nname = "closed"\nkind = "mqtt"\nurl = "mqtt://127.0.0.1:{closed}"\n'
        f'[[uplink]]\nname = "nocert"\nkind = "mqtt"\nurl = "mqtts://127.0.0.1:{closed}"\ntls = {{ ca = "{tmp_path}/none.pem" }}\n'
        '[[module]]\nname = "ghost"\n'
        f'[metrics]\nbind = "127.0.0.1:{taken.getsockname()[1]}"\n'
    )
    made = gateway(config, start=False)
    report, by = findings(made)
    assert by["uplink dns"]["verdict"] == "failed" and "resolve" in by["uplink dns"]["text"]
    assert by["uplink closed"]["verdict"] == "failed" and "refused" in by["uplink closed"]["text"]
    assert by["uplink nocert"]["verdict"] == "failed"
    assert by["dns tls.ca"]["verdict"] == "good" and by["dns tls.cert"]["verdict"] == "warning"
    assert "in 9 days" in by["dns tls.cert"]["text"]
    assert by["dns tls.key"]["verdict"] == "warning" and "chmod" in by["dns tls.key"]["remedy"]
    assert by["nocert tls.ca"]["verdict"] == "failed"
    assert by["secret"]["verdict"] == "warning"
    assert by["modules"]["verdict"] == "warning" and "ghost" in by["modules"]["text"]
    metrics = by[f"metrics 127.0.0.1:{taken.getsockname()[1]}"]
    assert metrics["verdict"] == "failed" and "ss -ltnp" in metrics["remedy"]
    report, by = findings(made, "--offline")
    assert "uplink dns" not in by
    taken.close()


def test_doctor_works_with_a_file_that_has_faults(gateway):
    made = gateway("[[uplink]]\nname = 5\n", start=False)
    report, by = findings(made)
    assert by["configuration"]["verdict"] == "failed" and "tidegate check" in by["configuration"]["remedy"]
    assert by["data_dir"]["verdict"] == "good"


def test_completions_complete(gateway, tmp_path):
    script = subprocess.run([str(BINARY), "completions", "bash"], capture_output=True, text=True, timeout=10)
    assert script.returncode == 0
    (tmp_path / "c.bash").write_text(script.stdout)
    ask = f"source {tmp_path}/c.bash; COMP_WORDS=(tidegate sta); COMP_CWORD=1; _tidegate tidegate sta tidegate; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=10)
    assert done.stdout.split() == ["status"], done.stderr
    for shell in ("fish", "zsh"):
        done = subprocess.run([str(BINARY), "completions", shell], capture_output=True, text=True, timeout=10)
        assert done.returncode == 0 and "publish" in done.stdout


def test_man_pages_have_every_command(tmp_path):
    page = subprocess.run([str(BINARY), "man"], capture_output=True, text=True, timeout=10).stdout
    assert page.startswith(".\\\"") and "EXIT STATUS" in page
    commands = subprocess.run([str(BINARY), "--help"], capture_output=True, text=True, timeout=10).stdout
    names = re.findall(r"^  (\w+)  ", commands.split("Commands:")[1].split("Options:")[0], re.M)
    assert len(names) > 10
    # Groups stand there by their commands.
    for name in set(names) - {"help", "asset", "client", "discover", "module", "topic"}:
        assert f'.SS "tidegate {name}"' in page, name
    done = subprocess.run([str(BINARY), "man", str(tmp_path / "man")], capture_output=True, text=True, timeout=10)
    assert done.returncode == 0 and "man -M" in done.stdout
    assert (tmp_path / "man/man1/tidegate.1").read_text() == page
    assert "data_dir" in (tmp_path / "man/man5/gateway.toml.5").read_text()
