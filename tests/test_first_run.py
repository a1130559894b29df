"""A stranger's first five minutes: the repository's own gateway.toml runs without an account, another server or root, and says
within a second what runs, where to publish, where the data goes and what to try next."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time

import pytest

from support import BINARY, REPOSITORY, eventually, free_port


class FirstRun:
    """A clone's files in a folder of their own, the port changed, since 1883 may be taken where the tests run."""

    def __init__(self, folder):
        self.folder = folder
        self.port = free_port()
        text = (REPOSITORY / "gateway.toml").read_text()
        assert "1883" in text
        (folder / "gateway.toml").write_text(re.sub(r"(bind = \"[^\"]*:)1883\"", rf'\g<1>{self.port}"', text))
        shutil.copytree(REPOSITORY / "modules.d", folder / "modules.d")
        self.out = folder / "out.txt"
        self.process = None

    def start(self, *arguments):
        with open(self.out, "ab") as out:
            self.process = subprocess.Popen(
                [str(BINARY), *arguments], cwd=self.folder, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        self.began = time.monotonic()
        return self

    @property
    def said(self):
        return self.out.read_text()

    def archived(self):
        path = self.folder / "data/archive.jsonl"
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]

    def end(self):
        if self.process and self.process.poll() is None:
            self.process.kill()
        if self.process:
            self.process.wait()


@pytest.fixture
def first_run(tmp_path, _started):
    made = FirstRun(tmp_path)
    _started.append(made)
    return made


@pytest.mark.timeout(120)
def test_the_first_run_explains_itself_and_works(first_run):
    run = first_run.start("run")
    line = eventually(
        lambda: (m := re.search(r"mosquitto_pub .+", run.said)) and m.group(0).strip(), 5, lambda: f"a line to publish: {run.said}"
    )
    words = ("line-4", f"{run.port}", "boiler", "average", "archive.jsonl")
    eventually(lambda: all(word in run.said for word in words), 5, lambda: f"it names {words}: {run.said}", 0.005)
    took = time.monotonic() - run.began
    print(f"said all after {took * 1000:.0f} ms:\n{run.said}")
    assert took < 1.0
    assert f"{run.port}" in line

    # Exactly the line that it printed.
    done = subprocess.run(shlex.split(line), capture_output=True, timeout=20)
    assert done.returncode == 0, done.stderr
    words = shlex.split(line)
    topic, payload = words[words.index("-t") + 1], words[words.index("-m") + 1]

    def archived(wanted):
        return [entry for entry in run.archived() if entry["topic"] == wanted]

    mine = eventually(lambda: archived(topic), 10, "the message is in the archive")
    assert mine[0]["payload"] == payload

    boiler = eventually(lambda: archived("data/boiler"), 10, "the simulated boiler is in the archive")
    text = json.dumps(boiler[0])
    for point in ("temperature", "pressure", "valve", "burner"):
        assert point in text
    derived = eventually(lambda: [e for e in run.archived() if e["topic"].startswith("derived/")], 30, "the module's answer", 0.1)
    assert "temperature" in json.dumps(derived[0])

    began = time.monotonic()
    run.process.send_signal(signal.SIGINT)
    assert run.process.wait(5) == 0, run.said
    took = time.monotonic() - began
    print(f"Ctrl-C to exit: {took * 1000:.0f} ms")
    assert took < 2
    assert "panicked" not in run.said


def test_without_arguments_it_runs_the_file_in_the_current_folder(first_run):
    run = first_run.start()
    eventually(lambda: "mosquitto_pub" in run.said, 5, lambda: run.said)
    run.process.send_signal(signal.SIGTERM)
    assert run.process.wait(5) == 0


def test_it_needs_no_root(first_run):
    """As nobody, in a folder that nobody owns; the binary is copied, since the way to it may be closed to others."""
    if os.getuid() != 0:
        # Then every other test shows it already.
        return
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        nobody = 65534
        shutil.copytree(first_run.folder, folder, dirs_exist_ok=True)
        shutil.copy(BINARY, f"{folder}/tidegate")
        os.chmod(folder, 0o755)
        for root, dirs, files in os.walk(folder):
            for name in [root, *[os.path.join(root, n) for n in dirs + files]]:
                os.chown(name, nobody, nobody)
        with open(f"{folder}/out.txt", "wb") as out:
            process = subprocess.Popen(
                [f"{folder}/tidegate", "run"],
                cwd=folder,
                stdout=out,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                user=nobody,
                group=nobody,
                extra_groups=[],
                env={"PATH": os.environ["PATH"]},
            )
        try:
            eventually(lambda: "derived/" in _text(f"{folder}/data/archive.jsonl"), 30, lambda: _text(f"{folder}/out.txt"), 0.1)
            process.send_signal(signal.SIGINT)
            assert process.wait(5) == 0
        finally:
            process.kill()
            process.wait()


def _text(path):
    try:
        return open(path).read()
    except OSError:
        return ""


def second(folder, config):
    (folder / "second.toml").write_text(config)
    done = subprocess.run(
        [str(BINARY), "run", "--config", str(folder / "second.toml")],
        capture_output=True,
        timeout=15,
        stdin=subprocess.DEVNULL,
    )
    return done.returncode, done.stdout.decode() + done.stderr.decode()


def test_a_second_gateway_on_the_same_data_is_refused_with_a_sentence(gateway):
    made = gateway()
    config = made.path.read_text().replace(f":{made.port}", f":{free_port()}")
    code, said = second(made.folder, config)
    assert code == 1, said
    assert str(made.data) in said or '"data"' in said or "data" in said
    assert re.search(r"another|already|in use|second", said), said
    assert "panicked" not in said and len(said) < 2000
    # The first one is undisturbed.
    assert made.alive()
    made.restart()


def test_a_second_gateway_on_the_same_port_says_which(gateway, tmp_path):
    made = gateway()
    other = gateway(folder="other", port=made.port, start=False).spawn()
    eventually(lambda: re.search(rf"{made.port}.*in use", other.log), 10, lambda: other.log)
    assert "panicked" not in other.log
    assert made.alive()


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_it_stops_in_order_under_load(gateway, client, sig):
    """Exit 0 within 2 s with clients connected and messages under way; what was acknowledged is there afterwards."""
    made = gateway()
    keeper = client(made.port, "keeper", clean=False)
    keeper.subscribe("t")
    keeper.disconnect()
    talker = client(made.port, "talker")
    mids = [talker.publish("t", f"{n}", wait=False) for n in range(500)]
    eventually(lambda: len(talker.acked) >= 50)
    took = made.stop(sig)
    acked = {n for n, mid in enumerate(mids) if mid in talker.acked}
    talker.disconnect()
    assert took < 2
    made.start()
    keeper = client(made.port, "keeper", clean=False)
    eventually(lambda: acked <= {int(p) for p in keeper.payloads()}, 10, lambda: f"{len(acked)} acknowledged")
    print(f"stopped in {took * 1000:.0f} ms with {len(acked)} acknowledged")
