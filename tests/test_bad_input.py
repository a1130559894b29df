"""Bad input is answered with a sentence that says what and what next, and the rest runs on where it can."""

import re
import socket
import subprocess

import pytest

from rawmqtt import Raw
from support import BINARY, REPOSITORY, eventually, free_port, mqtt_uplink

FIVE_FAULTS = """[gateway]
name = "line-4"
data_dir = "data"

[[listener]]
bind = "127.0.0.1:99999"

[[uplink]]
name = "cloud"
kind = "mqtt"
url = "mqtt://127.0.0.1:1"
keep_alvie = "60 s"

[[stream]]
name = "default"
filter = ["a/#/b"]
max_bytes = "1 gigglebyte"

[[route]]
from = ["#"]
to = "clouds"
"""


@pytest.mark.parametrize("command", ["check", "run"])
def test_five_faults_are_five_sentences_with_their_places(gateway, command):
    made = gateway(FIVE_FAULTS, head=False, start=False)
    code, said = made.run_to_end(arguments=[command, "--config", str(made.path)])
    assert code == 1
    places = re.findall(r"gateway\.toml:(\d+):(\d+): (.+)", said)
    assert [int(line) for line, _, _ in places] == [6, 12, 16, 17, 21], said
    # The line itself, and the nearest known key and name as hints.
    assert 'keep_alvie = "60 s"' in said and '"keep_alive"' in said and '"cloud"' in said, said
    assert "panicked" not in said
    assert not made.data.exists(), "nothing was made"


def test_check_accepts_the_repositorys_own_configuration_and_what_init_writes(gateway, tmp_path):
    made = gateway(start=False)
    code, said = made.run_to_end(arguments=["check", "--config", str(REPOSITORY / "gateway.toml")])
    assert code == 0, said
    code, said = made.run_to_end(arguments=["init", str(tmp_path / "new.toml")])
    assert code == 0, said
    code, said = made.run_to_end(arguments=["check", "--config", str(tmp_path / "new.toml")])
    assert code == 0, said
    code, said = made.run_to_end(arguments=["init", str(tmp_path / "new.toml")])
    assert code == 1 and "new.toml" in said, "never over a file that is there"


def test_a_missing_configuration_says_what_to_do(gateway):
    made = gateway(start=False)
    code, said = made.run_to_end(arguments=["run", "--config", str(made.folder / "none.toml")])
    assert code == 1 and "none.toml" in said
    made.path.unlink()
    code, said = made.run_to_end(arguments=["check"])
    if code != 0:
        assert "gateway.toml" in said and "init" in said, said


def test_a_taken_port_is_named_and_the_other_listener_serves(gateway):
    taken = socket.create_server(("127.0.0.1", free_port()))
    port = taken.getsockname()[1]
    made = gateway(f'[[listener]]\nbind = "127.0.0.1:{port}"\n')
    with Raw(made.port).open("c") as c:
        c.publish_acked("t", "x")
    bad = eventually(
        lambda: [p for (kind, _), p in made.status().items() if kind == "listener" and p["health"] == "failed"],
        10,
        lambda: made.status(),
    )
    assert len(bad) == 1 and f"127.0.0.1:{port}" in bad[0]["name"] + bad[0]["text"]
    assert "in use" in bad[0]["text"], bad
    # It takes the port once it is free.
    taken.close()
    eventually(lambda: all(p["health"] != "failed" for p in made.status().values()), 60, lambda: made.status(), 0.25)
    with Raw(port).open("c2") as c:
        c.publish_acked("t", "x")


def test_the_only_port_taken_is_a_sentence(gateway):
    taken = socket.create_server(("127.0.0.1", free_port()))
    made = gateway(port=taken.getsockname()[1], start=False).spawn()
    eventually(lambda: re.search(rf"127\.0\.0\.1:{made.port}.*in use", made.log), 10, lambda: made.log)
    assert "panicked" not in made.log
    if made.process.poll() is not None:
        assert made.process.returncode == 1


def test_a_data_dir_below_a_file_is_a_sentence(gateway):
    made = gateway(start=False)
    (made.folder / "file").write_text("")
    made.write_config(made.path.read_text().replace('"data"', '"file/data"'))
    code, said = made.run_to_end()
    assert code == 1
    assert "file/data" in said and "panicked" not in said, said
    assert len(said) < 2000


def test_a_read_only_data_dir_is_a_sentence(gateway):
    """Also for root: a read-only mount, in a mount namespace of the process's own."""
    made = gateway(start=False)
    made.data.mkdir()
    script = f'mount -t tmpfs -o ro none "{made.data}" && exec "{BINARY}" run --config "{made.path}"'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, timeout=20, stdin=subprocess.DEVNULL
    )
    said = done.stdout.decode() + done.stderr.decode()
    assert done.returncode == 1, said
    assert str(made.data) in said and "ead-only" in said, said
    assert "panicked" not in said


def databases(made):
    return [p for p in made.data.iterdir() if p.is_file() and p.read_bytes()[:15] == b"SQLite format 3"]


@pytest.mark.parametrize("damage", ["garbage first pages", "all zeros", "empty", "half of it", "garbage in the middle"])
def test_a_damaged_database_is_set_aside_never_deleted_and_the_gateway_runs(gateway, damage):
    """DI-01: ready at once, the bad file set aside under another name, the status and the log say so."""
    made = gateway()
    with Raw(made.port).open("keeper", clean=False) as keeper:
        keeper.subscribe("kept/#")
    with Raw(made.port).open("p") as p:
        for n in range(500):
            p.publish_acked("kept/x", b"%d" % n + b"y" * 500)
    made.stop()
    found = databases(made)
    assert len(found) == 1, f"one database in {list(made.data.iterdir())}"
    path, content = found[0], found[0].read_bytes()
    damaged = {
        "garbage first pages": bytes(range(1, 256)) * 64 + content[255 * 64 :],
        "all zeros": bytes(len(content)),
        "empty": b"",
        "half of it": content[: len(content) // 2],
        "garbage in the middle": content[: len(content) // 3] + b"\xa5" * (len(content) // 3) + content[-(len(content) // 3) :],
    }[damage]
    path.write_bytes(damaged)
    made.start()
    print(f"ready after {made.ready_s * 1000:.0f} ms")
    assert made.ready_s < 1.5
    with Raw(made.port).open("after", clean=False) as after:
        after.subscribe("kept/#")
        with Raw(made.port).open("p") as p:
            p.publish_acked("kept/new", "x")
        assert after.message().payload == b"x"
    made.kill9()
    made.start()
    if damage in ("garbage first pages", "all zeros"):
        others = [p for p in made.data.rglob("*") if p.is_file() and p != path]
        assert any(p.stat().st_size == len(damaged) and p.read_bytes() == damaged for p in others), (
            f"the damaged file is kept: {[(p.name, p.stat().st_size) for p in others]}"
        )
        assert "set aside" in made.log, made.log[-2000:]
    if damage != "empty":
        said = made.log + str(made.status())
        assert any(word in said for word in ("set aside", "damaged", "malformed")), said[-2000:]
    assert "panicked" not in made.log


def test_a_wasm_that_is_not_wasm_is_named_and_the_rest_runs(gateway):
    made = gateway(start=False)
    (made.modules / "nonsense.wasm").write_text("hello")
    (made.modules / "empty.wasm").write_text("")
    (made.modules / "readme.txt").write_text("not a module at all")
    made.start()
    for name in ("nonsense", "empty"):
        part = made.wait_for_module(name, "failed")
        assert part["text"], part
    assert [name for kind, name in made.status() if kind == "module" and "readme" in name] == []
    with Raw(made.port).open("c") as c:
        c.publish_acked("t", "x")


def test_a_missing_modules_folder_stops_nothing(gateway):
    made = gateway(start=False)
    made.modules.rmdir()
    made.start()
    with Raw(made.port).open("c") as c:
        c.publish_acked("t", "x")


def test_an_upstream_that_does_not_resolve_is_named_and_the_rest_runs(gateway, standin):
    works = standin()
    config = mqtt_uplink(1883, "nowhere", topic="{topic}").replace("127.0.0.1", "no-such-host.invalid")
    made = gateway(config + mqtt_uplink(works.port, "works", topic="{topic}"))
    with Raw(made.port).open("c") as c:
        c.publish_acked("t", "x")
    works.wait_for(1, 10)
    part = eventually(
        lambda: (p := made.part("uplink", "nowhere"))["health"] not in ("good", "starting") and p, 20, lambda: made.status()
    )
    assert "no-such-host.invalid" in part["text"] and "next try" in part["text"], part["text"]
    assert "no-such-host.invalid" in made.log


def test_a_missing_certificate_file_is_the_uplinks_fault_alone(gateway):
    """TL-03 in short: the broker serves, CPU idle, the uplink says which file."""
    made = gateway(
        mqtt_uplink(8883, "tls", extra='tls = { ca = "missing-ca.pem" }').replace("mqtt://", "mqtts://")
    )
    part = eventually(
        lambda: (p := made.part("uplink", "tls"))["health"] not in ("good", "starting") and p, 20, lambda: made.status()
    )
    assert "missing-ca.pem" in part["text"], part["text"]
    with Raw(made.port).open("c") as c:
        c.publish_acked("t", "x")


def test_wrong_arguments_are_exit_code_2(gateway):
    made = gateway(start=False)
    code, said = made.run_to_end(arguments=["rnu"])
    assert code == 2 and "rnu" in said and "--help" in said
