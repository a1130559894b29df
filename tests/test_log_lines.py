"""What the gateway logs: with priorities in the journal, one line an event, and never the same thing without end (CASES DI-05)."""

import os
import time
import re
import socket

from support import eventually, free_port, mqtt_uplink

USER = '[[user]]\nname = "u"\npassword_hash = "{}"\npublish = ["#"]\n'
HASH = "$argon2id$v=19$m=64,t=1,p=1$c29tZXNhbHQxMjM0NTY3OA$1Rm3CmVYTC0zX7IyqBbqpnQ9VqK9kJYUMPYWbcWbqMc"


def journal(made):
    made.log_path.touch()
    found = made.log_path.stat()
    return {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}


def test_lines_for_the_journal_begin_with_their_priority(gateway):
    made = gateway(mqtt_uplink(free_port()), start=False)
    made.start(env=journal(made))
    eventually(lambda: "uplink is down" in made.log, 10, lambda: made.log)
    lines = [line for line in made.log.splitlines() if line.startswith("<")]
    assert any(re.match(r"<6>listening for MQTT", line) for line in lines), made.log
    assert any(re.match(r"<4>uplink is down", line) for line in lines), made.log
    # The journal stamps them itself.
    assert not re.search(r"^<\d>\d{4}-", made.log, re.M) and "\x1b" not in made.log


def test_a_stderr_that_is_not_the_journal_gets_no_priorities(gateway):
    made = gateway(start=False)
    made.start(env={"JOURNAL_STREAM": "1:1"})
    eventually(lambda: "listening for MQTT" in made.log, 10, lambda: made.log)
    assert not re.search(r"^<\d>", made.log, re.M)
    assert re.search(r"^\d{4}-\d\d-\d\dT.* INFO .*listening for MQTT", made.log, re.M), made.log


def connect_packet(client_id, password):
    def field(text):
        data = text.encode()
        return len(data).to_bytes(2, "big") + data

    body = field("MQTT") + bytes([4, 0xC2, 0, 60]) + field(client_id) + field("u") + field(password)
    return bytes([0x10, len(body)]) + body


def refused(port, client_id):
    with socket.create_connection(("127.0.0.1", port), timeout=10) as one:
        one.sendall(connect_packet(client_id, "wrong"))
        return one.recv(4)


def test_a_storm_is_a_few_lines(gateway):
    """A refused uplink and wrong passwords, of one client and of many, as fast as they come."""
    made = gateway(mqtt_uplink(free_port()) + USER.format(HASH), start=False)
    made.start(env=journal(made))
    for n in range(300):
        assert refused(made.port, "same" if n % 2 else f"other-{n}\n<3>forged")[:2] == b"\x20\x02"
    eventually(lambda: made.alive() and made.log.count("\n") > 3, 10)
    lines = [line for line in made.log.splitlines() if line.strip()]
    print(f"{len(lines)} lines for 300 refusals")
    assert len(lines) < 180, made.log
    assert not any("forged" in line and line.startswith("<3>") for line in lines), "a client writes no line of its own"


if SECONDS := int(os.environ.get("TIDEGATE_LONG", "0")):

    def test_an_hour_of_faults_is_a_few_hundred_lines(gateway):
        """DI-05 in full, where TIDEGATE_LONG says for how many seconds; a minute and a half shows the first count."""
        made = gateway(mqtt_uplink(free_port()) + USER.format(HASH), start=False)
        made.start(env=journal(made))
        end = time.monotonic() + SECONDS
        count = 0
        while time.monotonic() < end:
            refused(made.port, f"client-{count % 3}")
            count += 1
            time.sleep(0.1)  # ten a second is the load, not a wait
        lines = [line for line in made.log.splitlines() if line.startswith("<")]
        print(f"{len(lines)} lines for {count} refusals in {SECONDS} s\n" + "\n".join(lines[-20:]))
        assert len(lines) < 300
