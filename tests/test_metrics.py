"""Metrics: off unless configured, and read by Prometheus' own parser."""

import socket
import time
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support import eventually, free_port, listens, mqtt_uplink


def config(port):
    return f'[metrics]\nbind = "127.0.0.1:{port}"\n'


def get(port, path="/metrics", method="GET"):
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", method=method)
    with urllib.request.urlopen(request, timeout=15) as answer:
        return answer.status, dict(answer.headers), answer.read().decode()


def samples(port):
    """{(name, labels): value}; the parser is strict about the form of names, labels and lines."""
    families = list(text_string_to_metric_families(get(port)[2]))
    assert len({f.name for f in families}) == len(families)
    assert all(f.documentation and f.type in ("counter", "gauge") for f in families)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_nothing_listens_unless_it_is_configured(gateway):
    made = gateway()
    assert not any(kind == "metrics" for kind, _ in made.status())


def test_the_counts_are_those_of_the_gateway(gateway, client):
    port = free_port()
    made = gateway(config(port) + mqtt_uplink(free_port(), name="cloud", route_from='["a/#"]'))
    eventually(lambda: listens(port), 10, "it serves metrics")
    status, headers, _ = get(port)
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    before = samples(port)
    assert before["tidegate_build_info", (("gateway", "line-4"), ("version", made_version(made)))] == 1
    received = "tidegate_broker_messages_received_total", ()
    talker = client(made.port, "talker")
    for n in range(50):
        talker.publish("a/x", f"{n}".ljust(100))
    after = samples(port)
    assert after[received] - before[received] >= 50
    queue = (("consumer", "uplink:cloud"),)
    assert after["tidegate_consumer_queued_messages", queue] == 50
    assert after["tidegate_consumer_queued_bytes", queue] >= 5000
    assert after["tidegate_broker_connections", ()] == 1
    assert after["tidegate_log_messages_stored_total", ()] >= 50
    health = {dict(labels)["health"]: v for (name, labels), v in after.items()
              if name == "tidegate_part_health" and dict(labels)["kind"] == "uplink"}
    assert sorted(health) == ["failed", "good", "late", "starting"] and sum(health.values()) == 1 and not health["good"]
    assert after["process_resident_memory_bytes", ()] == pytest.approx(made.memory_kb() * 1024, rel=0.2)
    assert after["process_open_fds", ()] > 5
    assert abs(after["process_start_time_seconds", ()] - time.time()) < 60
    assert after["tidegate_uptime_seconds", ()] > 0


def made_version(made):
    import json
    import subprocess

    from support import BINARY

    done = subprocess.run([str(BINARY), "status", "--json", "--config", str(made.path)], capture_output=True, timeout=10)
    return json.loads(done.stdout)["version"]


def test_sessions_are_summed_up(gateway, client):
    """A series a client would be a series without bound."""
    port = free_port()
    made = gateway(config(port))
    for n in range(5):
        one = client(made.port, f"keeper-{n}", clean=False)
        one.subscribe("t")
        one.disconnect()
    client(made.port, "talker").publish("t", "x")
    now = samples(port)
    assert now["tidegate_durable_sessions", ()] == 5 and now["tidegate_durable_sessions_queued_messages", ()] == 5
    assert "keeper" not in get(port)[2]


def raw(port, request, timeout=10):
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as one:
        one.sendall(request)
        answer = b""
        try:
            while read := one.recv(65536):
                answer += read
        except ConnectionError:
            pass
        return answer


def test_what_is_no_scrape_is_refused_and_bounded(gateway):
    port = free_port()
    made = gateway(config(port))
    eventually(lambda: listens(port), 10, "it serves metrics")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(port, "/")
    with pytest.raises(urllib.error.HTTPError, match="405"):
        get(port, method="POST")
    assert get(port, method="HEAD")[2] == ""
    assert raw(port, b"\x16\x03\x01\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert raw(port, b"GET /metrics HTTP/1.1\r\n" + b"x" * 20_000)[:12] in (b"HTTP/1.1 431", b"")
    # More idle connections than there are places: they are cut, and the scraper comes through.
    idle = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(20)]
    eventually(lambda: get(port)[0] == 200, 30, "a scrape comes through")
    assert made.alive()
    for one in idle:
        one.close()


def test_a_reload_turns_them_on_moves_them_and_off(gateway):
    made = gateway()
    whole = made.path.read_text()
    first, second = free_port(), free_port()
    for port, gone in ((first, None), (second, first), (None, second)):
        made.write_config(whole + (config(port) if port else ""))
        code, said = made.run_to_end(arguments=["reload", "--config", str(made.path)])
        assert code == 0 and "metrics" in said, said
        if port:
            eventually(lambda: listens(port), 10, "it listens where it should")
        if gone:
            eventually(lambda: not listens(gone), 10, "and no longer where it did")


def test_a_port_in_use_costs_only_the_metrics(gateway):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        made = gateway(config(port))
        part = eventually(lambda: made.part("metrics", f"127.0.0.1:{port}"), what="it says so")
        assert part["health"] == "failed" and str(port) in part["text"]
    eventually(lambda: made.part("metrics", f"127.0.0.1:{port}")["health"] == "good", 15, "it is tried again", 0.1)
